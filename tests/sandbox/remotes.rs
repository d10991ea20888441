//! Several remotes: each gets every copy, by its own way, whatever becomes of the others.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::lab::capture::{Capture, Direction};
use crate::lab::check::assert_same_frames;
use crate::lab::decode::{Copy, Port, decap_gre, inner_frames, tcp_stream};
use crate::lab::frames::{self, Ends};
use crate::lab::judge::{Said, UP};
use crate::lab::remotes::{
    assert_no_counter_went_back, assert_replicated, by_remote, collector, dump, know, lab_of, lab_up, listed, remote,
    remotes, said_up, settled, taken,
};
use crate::lab::status::{Session, Stat};
use crate::lab::talk::{flows, untagged};
use crate::lab::{COLLECTOR_IP6, COLLECTOR_MAC, Lab, Ns, OUT_IP6, PATIENCE, mac_text, poll};
use serde_json::Value;

// ---- replicate ----

#[test]
fn each_of_three_remotes_gets_every_kind_of_frame_of_both_directions_exactly() {
    let lab = lab_up(3, &[]);
    for (at, (from, dev, ends)) in
        [(Ns::Peer, "peer0", Ends::PEER_TO_HOST), (Ns::Host, "eth0", Ends::HOST_TO_PEER)].iter().enumerate()
    {
        let sent = frames::corpus_frames(ends);
        let bytes: usize = sent.iter().map(Vec::len).sum();
        let before = lab.session();
        let mut capture = collector(&lab);
        lab.send(*from, dev, &sent);
        let got = taken(&mut capture, 3 * sent.len());
        assert!(got.keys().eq(&remotes(3)), "{:?}", got.keys());
        got.values().for_each(|frames| assert_same_frames(&sent, frames));
        let after = lab.session();
        for address in remotes(3) {
            let grown = |of: fn(&Stat) -> u64| of(&after.remote(address).stat) - of(&before.remote(address).stat);
            let grown = (grown(|stat| stat.pcnt), grown(|stat| stat.bcnt), grown(|stat| stat.dcnt));
            assert_eq!(grown, (sent.len() as u64, bytes as u64, 0));
        }
        assert_eq!(after.taps[at].counts.stat.pcnt, 3 * sent.len() as u64);
        assert_eq!(after.taps[at].counts.stat.bcnt, 3 * bytes as u64);
        assert_eq!(after.drops(), 0);
        after.assert_balanced();
    }
}

#[test]
fn super_packets_reach_each_of_three_remotes_whole() {
    let lab = lab_up(3, &[]);
    let mut capture = collector(&lab);
    let transfer = lab.tcp_transfer(400_000, Ns::Host, Ns::Peer);
    let copies = decap_gre(&settled(&lab, &mut capture));
    let got = by_remote(&copies);
    assert!(got.keys().eq(&remotes(3)), "{:?}", got.keys());
    for frames in got.values() {
        assert!(tcp_stream(frames, Port::Dst(transfer.port)) == transfer.data, "the copied stream differs");
    }
    let session = lab.session();
    for address in remotes(3) {
        assert_eq!(session.remote(address).stat.pcnt, got[&address].len() as u64);
    }
    session.assert_balanced();
}

#[test]
fn remotes_are_named_with_commas_or_by_repeating_the_option() {
    let lab = lab_of(4);
    let [a, b, c, d] = [0, 1, 2, 3].map(|n| remote(n).to_string());
    let args = ["--remote", &format!("{b},{c}"), "--remote", &d];
    said_up(&lab, &a, &args).quietly_ok();
    assert_replicated(&lab, &remotes(4));
    // The same request in other words.
    let again = said_up(&lab, &format!("{a},{b}"), &["--remote", &format!("{c},{d}")]).ok();
    assert!(again.stderr.contains("already"), "{again:#?}");
}

#[test]
fn sixty_four_remotes_work_at_once() {
    let before = lab_of(64);
    let machine = before.machine();
    let lab = before;
    said_up(&lab, &listed(&remotes(64)), &[]).quietly_ok();
    assert_replicated(&lab, &remotes(64));
    assert_replicated(&lab, &remotes(64));
    let session = lab.session();
    assert_eq!(session.remotes.len(), 64);
    assert!(session.remotes.iter().all(|row| row.stat.pcnt == 14));
    session.assert_balanced();
    assert_change_refused(&lab, "add", "198.51.100.200", 1, "64 remotes", "--name OTHER");
    lab.said(&["remote", "remove", &remote(63).to_string()]).quietly_ok();
    assert_replicated(&lab, &remotes(63));
    lab.said(&["remote", "add", &remote(63).to_string()]).quietly_ok();
    assert_replicated(&lab, &remotes(64));
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&machine);
}

/// What `-v` says was asked: each call of a tool for JSON, with what it was fed.
fn questions(said: &Said) -> Vec<String> {
    let mut lines = said.stderr.lines().filter_map(|line| line.strip_prefix("+ "));
    let mut found = Vec::new();
    while let Some(call) = lines.next() {
        let fed: Vec<&str> = match call.ends_with("<<'END'") {
            true => lines.by_ref().take_while(|line| *line != "END").collect(),
            false => Vec::new(),
        };
        // The bridge is asked until it passes frames.
        if (call.contains(" -j ") || call.contains(" --json ")) && !call.contains("link show dev snif") {
            found.push(format!("{call}\n{}", fed.join("\n")));
        }
    }
    found
}

#[test]
fn no_question_is_asked_twice_and_sixty_four_remotes_take_less_than_ten() {
    let lab = lab_of(64);
    let up = ["up", "eth0", "--tunnel", "gre", "--remote", &listed(&remotes(63))];
    let (last, all) = (remote(63).to_string(), listed(&remotes(64)));
    let again = [&up[..5], &[&all]].concat();
    let commands: [&[&str]; 7] =
        [&up, &["remote", "add", &last], &again, &["tap", "add", "out0"], &["sync"], &["status"], &["remote", "list"]];
    for command in commands {
        let said = lab.said(&[&["-v"], command].concat());
        assert!(said.status.success(), "{command:?}: {}", said.stderr);
        let mut asked = questions(&said);
        let count = asked.len();
        assert!((2..10).contains(&count), "{command:?} asked {count} questions: {asked:#?}");
        asked.sort();
        asked.dedup();
        assert_eq!(asked.len(), count, "{command:?} asked twice: {asked:#?}");
    }
}

// ---- coming again ----

#[test]
fn a_remote_that_comes_again_counts_from_zero() {
    let lab = lab_up(3, &[]);
    assert_replicated(&lab, &remotes(3));
    lab.said(&["remote", "remove", &remote(0).to_string()]).quietly_ok();
    assert_replicated(&lab, &[remote(1), remote(2)]);
    lab.said(&["remote", "add", &remote(0).to_string()]).quietly_ok();
    assert_replicated(&lab, &remotes(3));
    let session = lab.session();
    let sent = [0, 1, 2].map(|n| session.remote(remote(n)).stat.pcnt);
    assert_eq!((sent, session.drops()), ([7, 21, 21], 0));
    assert_eq!(session.removed.pcnt, 7);
    session.assert_balanced();
}

// ---- remote list, map dump, requests ----

#[test]
fn remote_list_shows_each_remote_with_its_way_and_counters() {
    let lab = lab_up(2, &[]);
    assert_replicated(&lab, &remotes(2));
    let text = lab.said(&["remote", "list"]).quietly_ok().stdout;
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert_eq!(lines[0], ["REMOTE", "SOURCE", "OUT", "MAC", "MTU", "SENT", "BYTES", "DROPPED"]);
    let mac = mac_text(COLLECTOR_MAC);
    for n in [0, 1] {
        assert_eq!(lines[1 + n][..6], [&remote(n as u8).to_string(), "198.51.100.1", "out0", &mac, "1600", "7"]);
    }
    let json = lab.said(&["remote", "list", "--json", "--name", "default"]).quietly_ok().json();
    assert_eq!(json["remotes"], lab.status_json()["sessions"][0]["remotes"]);
    lab.said(&["remote", "remove", &remote(0).to_string()]).quietly_ok();
    let json = lab.said(&["remote", "list", "--json"]).quietly_ok().json();
    assert_eq!(json["remotes"].as_array().map(Vec::len), Some(1));
    assert_eq!(json["remotes"][0]["address"], remote(1).to_string());
    lab.said(&["remote", "list", "--name", "other"]).refused(1, "other", "--name default");
}

#[test]
fn map_dump_shows_what_a_change_has_written() {
    let lab = lab_up(2, &["--spread", "flow"]);
    know(&lab, remote(2));
    let before = ["remotes", "spread", "tunnels", "config"].map(|map| dump(&lab, map));
    lab.said(&["remote", "add", &remote(2).to_string()]).quietly_ok();
    let after = ["remotes", "spread", "tunnels", "config"].map(|map| dump(&lab, map));
    assert_eq!((before[0].len(), after[0].len()), (2, 3));
    assert_eq!((before[2].len(), after[2].len()), (2, 3));
    assert_eq!(before[3][0]["value"]["remotes"], 0b11);
    assert_eq!(after[3][0]["value"]["remotes"], 0b111);
    let slots = |spread: &[Value]| -> Vec<u64> {
        let of = |row: &Value| row["value"]["slot"].as_array().expect("slots").clone();
        spread.iter().flat_map(of).map(|slot| slot.as_u64().expect("a slot")).collect()
    };
    let (was, is) = (slots(&before[1]), slots(&after[1]));
    assert_eq!((was.len(), is.len()), (4096, 4096));
    assert!(was.iter().all(|slot| *slot < 2));
    assert!(was.iter().zip(&is).all(|(was, is)| is == was || *is == 2));
    assert!((1000..1700).contains(&is.iter().filter(|slot| **slot == 2).count()));
    lab.said(&["remote", "remove", &remote(2).to_string()]).quietly_ok();
    let [remotes, spread, tunnels, config] = ["remotes", "spread", "tunnels", "config"].map(|map| dump(&lab, map));
    assert_eq!(before[..3], [remotes, spread, tunnels]);
    assert_eq!(config[0]["value"]["remotes"], 0b11);
}

#[test]
fn a_changed_session_is_another_request_than_the_one_that_made_it() {
    let lab = lab_up(2, &[]);
    know(&lab, remote(2));
    lab.said(&["remote", "add", &remote(2).to_string()]).quietly_ok();
    let list = format!("(--remote {0}, {1}, {2} → {0}, {1})", remote(0), remote(1), remote(2));
    said_up(&lab, &listed(&remotes(2)), &[]).refused(1, &list, "first: snifctl down --name default");
    // In the words that it now answers to, it is the same.
    said_up(&lab, &listed(&remotes(3)), &[]).ok_noting("already");
    said_up(&lab, &listed(&[remote(2), remote(0), remote(1)]), &[]).ok_noting("already");
    assert_replicated(&lab, &remotes(3));
}

/// As [`Said::refused`] for a change of the remotes, which also must have changed nothing.
#[track_caller]
fn assert_change_refused(lab: &Lab, change: &str, address: &str, code: i32, names: &str, ends: &str) {
    let before = lab.session();
    lab.said(&["remote", change, address]).refused(code, names, ends);
    assert_eq!(before, lab.session());
}

#[test]
fn changes_that_cannot_be_made_are_refused_in_one_line() {
    let lab = lab_of(2);
    lab.said(&["remote", "add", "198.51.100.10"]).refused(1, "no session is up", "--remote ADDR");
    lab.said(&["remote", "list"]).refused(1, "no session is up", "--remote ADDR");
    said_up(&lab, &listed(&remotes(2)), &[]).quietly_ok();
    let [a, b] = [0, 1].map(|n| remote(n).to_string());
    assert_change_refused(&lab, "add", &b, 1, &format!("{b} is already one"), "snifctl remote list --name default");
    assert_change_refused(&lab, "add", "collector", 2, "\"collector\"", "10.0.0.7");
    assert_change_refused(&lab, "add", "10.1.2.3.4", 2, "\"10.1.2.3.4\"", "10.0.0.7");
    for far in ["203.0.113.9", "2001:db8:99::1"] {
        lab.said(&["remote", "add", far]).ok_noting(&format!("{far} has no route"));
        assert_eq!(lab.session().remote(far).interface, None);
        lab.said(&["remote", "remove", far]).quietly_ok();
    }
    assert_change_refused(&lab, "add", "198.51.100.1", 1, "this machine itself", "10.0.0.7");
    assert_change_refused(&lab, "add", "224.0.0.1", 2, "multicast", "10.0.0.7");
    assert_change_refused(&lab, "add", "fe80::7%out0", 2, "zone", "2001:db8::7");
    assert_change_refused(&lab, "remove", "198.51.100.99", 1, "198.51.100.99 is not one", &format!("{a}, {b}"));
    assert_change_refused(&lab, "remove", "collector", 2, "\"collector\"", "10.0.0.7");
    lab.said(&["remote", "add", &a, "--name", "other"]).refused(1, "other", "--name default");
    lab.said(&["remote", "remove", &a]).quietly_ok();
    assert_change_refused(&lab, "remove", &b, 1, "only one", "snifctl down --name default");
    assert_replicated(&lab, &[remote(1)]);
}

#[test]
fn requests_with_wrong_remotes_are_refused_in_one_line() {
    let lab = lab_of(2);
    let before = lab.machine();
    let [a, b] = [0, 1].map(|n| remote(n).to_string());
    let refused = |remotes: &str, more: &[&str], names: &str, ends: &str| {
        said_up(&lab, remotes, more).refused(2, names, ends);
    };
    refused(&format!("{a},{b},{a}"), &[], &format!("{a} is named twice"), "once");
    refused("2001:db8:1::2,2001:DB8:1:0::2", &[], "2001:db8:1::2 is named twice", "once");
    refused(&listed(&remotes(65)), &[], "65", "--name OTHER");
    refused(&a, &["--source", "198.51.100.1,198.51.100.9"], "one address family", "--source 198.51.100.1");
    let v6 = COLLECTOR_IP6.to_string();
    refused(&v6, &["--source", OUT6, "--source", "2001:db8::9"], "one address family", &format!("--source {OUT6}"));
    refused(&format!("{a},nonsense"), &[], "\"nonsense\"", "10.0.0.7");
    refused(&format!("{a},"), &[], "\"\"", "10.0.0.7");
    let own = said_up(&lab, &format!("{a},198.51.100.1"), &[]);
    own.refused(1, "198.51.100.1 is this machine itself", "10.0.0.7");
    lab.assert_as_before(&before);
}

const OUT6: &str = "2001:db8:1::1";

// ---- remotes that cannot be reached ----

const FAR: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);

/// Panics unless the first remote got seven more frames, and seven more for the other were dropped as unresolved.
#[track_caller]
fn assert_only_first_gets_copies(lab: &Lab, other: Ipv4Addr) {
    let before = lab.session();
    assert_replicated(lab, &[remote(0)]);
    let after = lab.session();
    let grown = |of: &dyn Fn(&Session) -> u64| of(&after) - of(&before);
    assert_eq!(grown(&|session| session.remote(remote(0)).stat.pcnt), 7);
    assert_eq!(grown(&|session| session.remote(other).stat.dcnt), 7);
    assert_eq!(grown(&|session| session.dropped("unresolved")), 7);
    assert_eq!(after.remote(other).stat.pcnt, 0);
    after.assert_balanced();
}

#[test]
fn a_remote_without_a_route_does_not_stop_the_others_and_heals_when_the_route_comes() {
    let lab = lab_of(1);
    let list = listed(&[remote(0), FAR]);
    said_up(&lab, &list, &[]).ok_noting("203.0.113.9 has no route");
    let row = lab.session().remote(FAR).clone();
    assert!(row.interface.is_none() && row.source.is_none() && row.mac.is_none(), "{row:#?}");
    assert!(lab.said(&["remote", "list"]).quietly_ok().stdout.contains("(no route)"));
    assert_only_first_gets_copies(&lab, FAR);
    lab.host(&["ip", "route", "add", "203.0.113.0/24", "via", "198.51.100.2"]);
    said_up(&lab, &list, &[]).ok();
    assert_eq!(lab.session().remote(FAR).interface.as_deref(), Some("out0"));
    assert_replicated(&lab, &[remote(0), FAR]);
    lab.session().assert_balanced();
    assert_eq!(dump(&lab, "tunnels").len(), 2, "what is known of our packets: {:#?}", dump(&lab, "tunnels"));
    // Without a route again, it is as before.
    lab.host(&["ip", "route", "delete", "203.0.113.0/24"]);
    said_up(&lab, &list, &[]).ok();
    assert_replicated(&lab, &[remote(0)]);
    assert_eq!(lab.session().remote(FAR).interface, None);
}

#[test]
fn a_remote_whose_neighbour_is_silent_does_not_stop_the_others_and_heals_when_it_answers() {
    let lab = lab_of(1);
    let list = listed(&remotes(2));
    said_up(&lab, &list, &[]).ok_noting("198.51.100.11 does not answer on out0");
    let row = lab.session().remote(remote(1)).clone();
    assert!(row.interface.as_deref() == Some("out0") && row.mac.is_none(), "{row:#?}");
    assert!(lab.said(&["remote", "list"]).quietly_ok().stdout.contains("(no answer)"));
    assert_only_first_gets_copies(&lab, remote(1));
    know(&lab, remote(1));
    said_up(&lab, &list, &[]).ok();
    assert_eq!(lab.session().remote(remote(1)).mac, Some(mac_text(COLLECTOR_MAC)));
    assert_replicated(&lab, &remotes(2));
    lab.session().assert_balanced();
}

#[test]
fn a_remote_that_is_added_while_its_neighbour_is_silent_leaves_the_others_alone() {
    let lab = lab_up(1, &[]);
    lab.said(&["remote", "add", &remote(1).to_string()]).ok_noting("198.51.100.11 does not answer on out0");
    assert_only_first_gets_copies(&lab, remote(1));
    know(&lab, remote(1));
    said_up(&lab, &listed(&remotes(2)), &[]).ok();
    assert_replicated(&lab, &remotes(2));
}

#[test]
fn a_remote_without_a_route_gets_no_flows_and_loses_none() {
    let lab = lab_of(1);
    said_up(&lab, &listed(&[remote(0), FAR]), &["--spread", "flow"]).ok_noting("203.0.113.9 has no route");
    let sent: Vec<Vec<u8>> = flows(100, untagged).into_iter().map(|flow| flow.forward).collect();
    let mut capture = collector(&lab);
    lab.send(Ns::Peer, "peer0", &sent);
    let session = lab.session();
    assert_eq!((session.remote(remote(0)).stat.pcnt, session.drops()), (100, 0));
    assert_eq!(taken(&mut capture, 100).len(), 1);
    session.assert_balanced();
}

/// As many remotes as there can be, all but one without a route at first, then with one.
#[test]
fn sixty_four_remotes_heal_at_once() {
    let lab = lab_of(1);
    let far = |n: u8| Ipv4Addr::new(203, 0, 113, n);
    let all: Vec<Ipv4Addr> = std::iter::once(remote(0)).chain((1..64).map(far)).collect();
    said_up(&lab, &listed(&all), &[]).ok();
    assert_replicated(&lab, &[remote(0)]);
    lab.host(&["ip", "route", "add", "203.0.113.0/24", "via", "198.51.100.2"]);
    said_up(&lab, &listed(&all), &[]).ok();
    assert_replicated(&lab, &all);
    assert_eq!(dump(&lab, "tunnels").len(), 64);
}

#[test]
fn an_interface_that_comes_with_a_route_starts_with_no_drops() {
    let lab = lab_of(1);
    second_out(&lab);
    let list = listed(&[remote(0), FAR]);
    said_up(&lab, &list, &[]).ok();
    // What is lost there before the session uses it is not the session's.
    lab.host(&["tc", "qdisc", "add", "dev", "out1", "root", "pfifo", "limit", "0"]);
    lose_on_out1(&lab);
    lab.host(&["ip", "route", "add", "203.0.113.0/24", "via", "192.0.2.130"]);
    said_up(&lab, &list, &[]).ok();
    assert_eq!(lab.session().remote(FAR).interface.as_deref(), Some("out1"));
    assert_eq!(lab.session().out_dropped, 0);
}

/// Lets the host's own packets run into out1's qdisc, which drops them all.
fn lose_on_out1(lab: &Lab) {
    let data = lab.dir().join("lost");
    std::fs::write(&data, "lost").expect("write what will be lost");
    let open = format!("OPEN:{},rdonly", data.display());
    lab.host(&["socat", "-u", &open, &format!("UDP4-SENDTO:{SECOND}:9")]);
    let qdiscs = lab.shown(&["tc", "-s", "qdisc", "show", "dev", "out1"]);
    assert!(qdiscs.contains("dropped 1,"), "{qdiscs}");
}

// ---- several ways out, both families ----

const SECOND: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 130);

/// A second out link: 192.0.2.129/30 at out1, the collector's col1 answers for 192.0.2.130.
fn second_out(lab: &Lab) {
    let collector = lab.ns_name(Ns::Collector);
    lab.ip_batch(
        Ns::Host,
        &format!(
            "link add out1 mtu 1600 type veth peer name col1 address 02:00:00:00:03:02 mtu 1600 netns {collector}\n\
             link set out1 addrgenmode none arp off\naddress add 192.0.2.129/30 dev out1\nlink set out1 up"
        ),
    );
    lab.ip_batch(Ns::Collector, "link set col1 addrgenmode none\nlink set col1 up");
    let steps = ["mode dormant", "state dormant", "arp on", "mode default", "state up"];
    lab.ip_batch(Ns::Host, &steps.map(|step| format!("link set dev out1 {step}")).join("\n"));
    lab.ip_batch(Ns::Host, "neigh replace 192.0.2.130 lladdr 02:00:00:00:03:02 nud permanent dev out1");
    lab.offloads_off(Ns::Host, "out1");
    lab.offloads_off(Ns::Collector, "col1");
}

#[test]
fn remotes_behind_different_interfaces_get_their_copies_there() {
    let lab = lab_of(2);
    second_out(&lab);
    let before = lab.machine();
    said_up(&lab, &listed(&[remote(0), SECOND, remote(1)]), &[]).quietly_ok();
    let sent = frames::series(&Ends::PEER_TO_HOST, 13);
    let mut first = collector(&lab);
    let mut second = lab.capture_wire(Ns::Collector, "col1", Direction::In);
    lab.send(Ns::Peer, "peer0", &sent);
    let mut got = taken(&mut first, 26);
    got.extend(taken(&mut second, 13));
    assert_eq!(got.len(), 3, "{:?}", got.keys());
    got.values().for_each(|frames| assert_same_frames(&sent, frames));
    let session = lab.session();
    assert_eq!(session.remote(SECOND).interface.as_deref(), Some("out1"));
    assert_eq!(session.remote(SECOND).source.as_deref(), Some("192.0.2.129"));
    assert_eq!(session.remote(remote(1)).source.as_deref(), Some("198.51.100.1"));
    session.assert_balanced();
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

/// Everything captured, once the session has sent all it was asked to and no more packets come.
fn at_rest(lab: &Lab, capture: &mut Capture) -> Vec<Vec<u8>> {
    let mut before = (0, 0);
    let rest = poll(PATIENCE, || {
        let now = (capture.count(), lab.session().taps_total().pcnt);
        let same = now == before;
        before = now;
        same.then_some(())
    });
    assert!(rest.is_some(), "copies come without end");
    capture.stop()
}

/// Each copy is made to fit its own remote's path, whatever the others need.
#[test]
fn each_remote_has_its_own_path_mtu() {
    for mode in ["segment", "fragment"] {
        let lab = lab_of(2);
        lab.host(&["ip", "route", "add", "203.0.113.0/24", "via", "198.51.100.2", "mtu", "1000"]);
        let list = [remote(0), FAR, remote(1)];
        said_up(&lab, &listed(&list), &["--oversize", mode]).ok_noting("MTU 1000 towards 203.0.113.9");
        let mtus = list.map(|address| lab.session().remote(address).mtu);
        assert_eq!(mtus, [1600, 1000, 1600]);
        let narrow_only = |copies: &[Copy]| copies.iter().all(|copy| copy.outer_dst == FAR || copy.ids.len() == 1);
        let mut capture = collector(&lab);
        let transfer = lab.tcp_transfer(100_000, Ns::Host, Ns::Peer);
        let copies = decap_gre(&at_rest(&lab, &mut capture));
        assert!(narrow_only(&copies), "{mode}: a wide path has fragments");
        let got = by_remote(&copies);
        assert_eq!(got.len(), 3);
        for (at, frames) in got {
            assert!(
                tcp_stream(&frames, Port::Dst(transfer.port)) == transfer.data,
                "{mode}: the stream at {at} differs"
            );
        }
        let mut capture = collector(&lab);
        let sent = frames::corpus_frames(&Ends::PEER_TO_HOST);
        lab.send(Ns::Peer, "peer0", &sent);
        let copies = decap_gre(&capture.stop());
        assert!(narrow_only(&copies), "{mode}: a wide path has fragments");
        by_remote(&copies).values().for_each(|frames| assert_same_frames(&sent, frames));
        assert_eq!(copies.len(), 3 * sent.len());
        let session = lab.session();
        assert_eq!(session.drops(), 0, "{session:#}");
        session.assert_balanced();
    }
}

/// What one out interface loses harms no remote behind another, is counted, and stays counted when its remote goes.
#[test]
fn what_one_out_interface_drops_stays_counted_when_its_remote_goes() {
    let lab = lab_of(1);
    second_out(&lab);
    lab.host(&["tc", "qdisc", "add", "dev", "out1", "root", "pfifo", "limit", "0"]);
    said_up(&lab, &listed(&[remote(0), SECOND]), &[]).quietly_ok();
    assert_replicated(&lab, &[remote(0)]);
    let before = lab.session();
    assert_eq!(before.out_dropped, 7, "{before:#}");
    lab.said(&["remote", "remove", &SECOND.to_string()]).quietly_ok();
    assert_no_counter_went_back(&before, &lab.session());
}

/// The inner frame of a GRE packet over IPv6, its outer destination checked.
#[track_caller]
fn decap_gre6(packet: &[u8], to: Ipv6Addr) -> Vec<u8> {
    assert_eq!(packet[..6], COLLECTOR_MAC);
    assert_eq!(packet[12..14], [0x86, 0xdd]);
    assert_eq!((packet[14] >> 4, packet[20], packet[21]), (6, frames::GRE, 64));
    assert_eq!(usize::from(u16::from_be_bytes([packet[18], packet[19]])), packet.len() - 54);
    assert_eq!(packet[22..38], OUT_IP6.octets());
    assert_eq!(packet[38..54], to.octets());
    assert_eq!(packet[54..58], [0, 0, 0x65, 0x58]);
    packet[58..].to_vec()
}

#[test]
fn remotes_of_both_families_each_get_their_own_header() {
    let lab = lab_of(2);
    let list = format!("{},{COLLECTOR_IP6},{}", remote(0), remote(1));
    said_up(&lab, &list, &[]).quietly_ok();
    let mut capture = collector(&lab);
    for (from, dev, ends) in [(Ns::Peer, "peer0", Ends::PEER_TO_HOST), (Ns::Host, "eth0", Ends::HOST_TO_PEER)] {
        lab.send(from, dev, &frames::corpus_frames(&ends));
    }
    let sent = [frames::corpus_frames(&Ends::PEER_TO_HOST), frames::corpus_frames(&Ends::HOST_TO_PEER)].concat();
    let (v6, v4): (Vec<_>, Vec<_>) =
        capture.take(3 * sent.len()).into_iter().partition(|packet| packet[12..14] == [0x86, 0xdd]);
    let inner: Vec<Vec<u8>> = v6.iter().map(|packet| decap_gre6(packet, COLLECTOR_IP6)).collect();
    assert_same_frames(&sent, &inner);
    let got = by_remote(&decap_gre(&v4));
    assert!(got.keys().eq(&remotes(2)), "{:?}", got.keys());
    got.values().for_each(|frames| assert_same_frames(&sent, frames));
    let session = lab.session();
    assert_eq!(session.remote(COLLECTOR_IP6).source, Some(OUT_IP6.to_string()));
    session.assert_balanced();
}

#[test]
fn flows_are_spread_over_both_families_too() {
    let lab = lab_of(1);
    said_up(&lab, &remote(0).to_string(), &["--spread", "flow"]).quietly_ok();
    lab.said(&["remote", "add", &COLLECTOR_IP6.to_string()]).quietly_ok();
    let flows = flows(200, untagged);
    let sent: Vec<Vec<u8>> = flows.iter().map(|flow| flow.forward.clone()).collect();
    let mut capture = collector(&lab);
    lab.send(Ns::Peer, "peer0", &sent);
    let (v6, v4): (Vec<_>, Vec<_>) = capture.take(200).into_iter().partition(|packet| packet[12..14] == [0x86, 0xdd]);
    assert!((70..130).contains(&v6.len()), "{} of 200 flows over IPv6", v6.len());
    let mut got = inner_frames(&decap_gre(&v4));
    got.extend(v6.iter().map(|packet| decap_gre6(packet, COLLECTOR_IP6)));
    assert_same_frames(&sent, &got);
}

// ---- sessions beside each other, down ----

#[test]
fn two_sessions_with_several_remotes_each_share_an_interface() {
    let lab = lab_of(4);
    let machine = lab.machine();
    said_up(&lab, &listed(&[remote(0), remote(1), remote(2)]), &["--name", "a"]).quietly_ok();
    said_up(&lab, &listed(&[remote(2), remote(3)]), &["--name", "b", "--spread", "flow"]).quietly_ok();
    let sent = flows(50, untagged).into_iter().map(|flow| flow.forward).collect::<Vec<_>>();
    let mut capture = collector(&lab);
    lab.send(Ns::Peer, "peer0", &sent);
    let got = taken(&mut capture, 200);
    assert_same_frames(&sent, &got[&remote(0)]);
    assert_same_frames(&sent, &got[&remote(1)]);
    assert_same_frames(&[&sent[..], &sent].concat(), &[&got[&remote(2)][..], &got[&remote(3)]].concat());
    lab.said(&["remote", "remove", &remote(2).to_string(), "--name", "b"]).quietly_ok();
    lab.said(&["remote", "remove", &remote(0).to_string()]).refused(1, "default", "--name a, --name b");
    lab.said(&["down", "--name", "a"]).quietly_ok();
    assert_replicated(&lab, &[remote(3)]);
    lab.said(&["down", "--all"]).quietly_ok();
    lab.assert_as_before(&machine);
}

#[test]
fn down_leaves_nothing_of_many_remotes_behind_also_after_changes() {
    let lab = lab_of(20);
    second_out(&lab);
    let before = lab.machine();
    let list = format!("{},{COLLECTOR_IP6},{SECOND}", listed(&remotes(19)));
    said_up(&lab, &list, &["--spread", "flow"]).quietly_ok();
    lab.said(&["remote", "add", &remote(19).to_string()]).quietly_ok();
    lab.said(&["remote", "remove", &COLLECTOR_IP6.to_string()]).quietly_ok();
    let ids = lab.program_ids();
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
    lab.assert_unloaded(&ids);
    // The plain request of other tests works as if nothing had been.
    lab.said(&UP).quietly_ok();
}
