//! Taps that come and go while the session runs, and what else is at their hooks.

use std::fs;
use std::path::{Path, PathBuf};

use crate::lab::capture::Direction;
use crate::lab::decode::{decap_gre, inner_frames};
use crate::lab::faults::Fault;
use crate::lab::frames::{self, Ends};
use crate::lab::judge::UP;
use crate::lab::links::{ETH0, ETH1, add_link, assert_copied_on, hooks, lab_with_links, tap, watched};
use crate::lab::remotes::{by_remote, collector, remote};
use crate::lab::sessions::{WAYS, captured, down, knowing, lab_of, session_of, up, up_in};
use crate::lab::status::{Session, Tally};
use crate::lab::traffic::Stream;
use crate::lab::tunnels::{Kind, decap};
use crate::lab::{Lab, Ns, Options};
use serde_json::json;

// ---- taps that come and go ----

#[test]
fn a_second_interface_is_watched_from_tap_add_to_tap_remove() {
    let (lab, before) = lab_with_links(1);
    assert_copied_on(&lab, ETH1, "none");
    tap(&lab, "add eth1");
    assert_eq!(watched(&lab), "eth0 ingress, eth0 egress, eth1 ingress, eth1 egress");
    lab.assert_up(&["s0"]);
    assert_copied_on(&lab, ETH1, "both");
    assert_copied_on(&lab, ETH0, "both");
    let ids = lab.program_ids();
    tap(&lab, "remove eth1");
    assert_eq!(watched(&lab), "eth0 ingress, eth0 egress");
    assert_copied_on(&lab, ETH1, "none");
    assert_copied_on(&lab, ETH0, "both");
    lab.session().assert_accounted();
    assert_eq!(lab.program_ids(), ids, "a change of taps loads nothing");
    down(&lab);
    lab.assert_as_before(&before);
    lab.assert_unloaded(&ids);
}

#[test]
fn directions_come_and_go_one_by_one() {
    let (lab, before) = lab_with_links(1);
    for (words, ways) in [
        ("add eth1 --direction ingress", "ingress"),
        ("add eth1 --direction egress", "both"),
        ("remove eth1 --direction ingress", "egress"),
        ("add eth1", "both"),
        ("remove eth1 --direction egress", "ingress"),
        ("remove eth1", "none"),
        ("add eth1 --direction egress", "egress"),
        ("add eth1 --direction both", "both"),
    ] {
        tap(&lab, words);
        assert_copied_on(&lab, ETH1, ways);
        lab.session().assert_accounted();
    }
    tap(&lab, "remove eth0 --direction ingress");
    assert_eq!(watched(&lab), "eth0 egress, eth1 ingress, eth1 egress");
    assert_copied_on(&lab, ETH0, "egress");
    tap(&lab, "remove eth0");
    assert_copied_on(&lab, ETH0, "none");
    assert_copied_on(&lab, ETH1, "both");
    let session = lab.session();
    let seen = session.taps.iter().map(|tap| tap.counts).chain([session.removed_taps]).map(|counts| counts.seen);
    assert_eq!(seen.sum::<u64>(), 7 * (1 + 2 + 1 + 2 + 1 + 1 + 2 + 1 + 2), "{session:#}");
    session.assert_accounted();
    down(&lab);
    lab.assert_as_before(&before);
}

#[test]
fn a_session_with_another_tap_answers_to_the_request_that_it_now_is() {
    let (lab, _) = lab_with_links(1);
    let request = |interfaces: &[&str]| {
        let remote = remote(0).to_string();
        lab.said(&[&["up", "--name", "s0", "--tunnel", "gre", "--remote", &remote], interfaces].concat())
    };
    tap(&lab, "add eth1");
    request(&["eth0", "eth1"]).ok_noting("already up with this request");
    request(&["eth0"]).refused(1, "(IFACE eth0, eth1 → eth0)", "snifctl down --name s0");
    tap(&lab, "remove eth0");
    request(&["eth1"]).ok_noting("already up with this request");
    tap(&lab, "remove eth1 --direction ingress");
    request(&["eth1"]).refused(1, "(IFACE eth1:egress → eth1)", "snifctl down --name s0");
    request(&["eth1", "--direction", "egress"]).ok_noting("already up with this request");
    lab.assert_up(&["s0"]);
}

// ---- under traffic ----

/// Frames of the second link have numbers from here on.
const SECOND: u32 = 1_000_000;

/// Frames without holes or repetitions, from each of which the next is one more: first and number of each stretch.
fn stretches(numbers: &[u32]) -> Vec<(u32, usize)> {
    let follows = |pair: &u32, next: &u32| *next == pair + 1;
    numbers.chunk_by(follows).map(|stretch| (stretch[0], stretch.len())).collect()
}

#[test]
fn changes_under_traffic_lose_and_repeat_no_copy_of_other_taps() {
    let (lab, before) = lab_with_links(1);
    let numbered = |first: u32| -> Vec<Vec<u8>> {
        (first..first + 40_000).map(|n| frames::ipv4_udp(&Ends::PEER_TO_HOST, n, 60)).collect()
    };
    let mut capture = collector(&lab);
    let streams = [("peer0", 0), ("peer1", SECOND)]
        .map(|(dev, first)| Stream::start(&lab, (Ns::Peer, dev), &numbered(first), 1, "--pps=2000"));
    let changes = ["add eth1", "remove eth1", "add eth1 --direction ingress", "remove eth0 --direction egress"];
    for change in changes.into_iter().chain(["add eth0", "remove eth1"]) {
        // Let some frames pass between the changes.
        let from = capture.count();
        capture.wait_for(from + 100);
        tap(&lab, change);
    }
    streams.into_iter().for_each(Stream::stop);
    let session = lab.session();
    session.assert_accounted();
    assert_eq!(session.drops(), 0, "{session:#}");
    let asked = session.taps_total().pcnt + session.removed_taps.stat.pcnt;
    let got = frames::numbers(&inner_frames(&decap_gre(&capture.take(asked as usize))));
    let (of_second, of_first): (Vec<u32>, Vec<u32>) = got.iter().partition(|n| **n >= SECOND);
    assert_eq!(stretches(&of_first), [(0, of_first.len())]);
    assert_eq!(session.tally("eth0", "ingress").seen, of_first.len() as u64, "{session:#}");
    // The other link's frames come from some frame on to some other, twice.
    let stretches = stretches(&of_second);
    assert_eq!(stretches.len(), 2, "{stretches:?}");
    assert!(stretches[0].0 + (stretches[0].1 as u32) < stretches[1].0, "{stretches:?}");
    assert!(stretches.iter().all(|(_, count)| *count > 20), "{stretches:?}");
    assert_eq!(session.removed_taps.tally().seen, of_second.len() as u64, "{session:#}");
    down(&lab);
    lab.assert_as_before(&before);
}

#[test]
fn several_changes_at_once_are_made_one_after_another() {
    let (lab, before) = lab_with_links(3);
    let changes = [["tap", "add", "eth1"], ["tap", "add", "eth2"], ["tap", "add", "eth3"]];
    let add = remote(1).to_string();
    let more = [["remote", "add", &add], ["tap", "remove", "eth0"]];
    std::thread::scope(|scope| {
        let running: Vec<_> = changes.iter().map(|args| scope.spawn(|| lab.said(args))).collect();
        running.into_iter().for_each(|change| drop(change.join().expect("no panic").quietly_ok()));
        let running: Vec<_> = more.iter().map(|args| scope.spawn(|| lab.said(args))).collect();
        running.into_iter().for_each(|change| drop(change.join().expect("no panic").quietly_ok()));
    });
    lab.assert_up(&["s0"]);
    let session = lab.session();
    assert_eq!((session.taps.len(), session.remotes.len()), (6, 2), "{session:#}");
    down(&lab);
    lab.assert_as_before(&before);
}

// ---- counters, slots, listing, names ----

#[test]
fn what_removed_taps_have_counted_stays_in_the_sums() {
    let lab = knowing(Lab::with(Options { watched_mtu: 9000, ..Options::default() }), 1);
    add_link(&lab, 1);
    up(&lab, 0, &["--filter", "not arp", "--sample", "1/2", "--oversize", "drop"]);
    lab.said(&["tap", "add", "eth1"]).ok();
    let [arp, small] = [frames::arp(&Ends::PEER_TO_HOST), frames::ipv4_udp(&Ends::PEER_TO_HOST, 1, 50)];
    let sent = [vec![arp; 20], vec![small; 50], vec![frames::jumbo(&Ends::PEER_TO_HOST, 2, 1500); 50]].concat();
    lab.send(Ns::Peer, "peer1", &sent);
    lab.send(Ns::Host, "eth1", &sent[..60]);
    lab.send(Ns::Peer, "peer0", &sent);
    let before = lab.session();
    before.assert_accounted();
    let [incoming, outgoing] = ["ingress", "egress"].map(|direction| before.tally("eth1", direction));
    assert!(incoming.filtered == 20 && incoming.skipped > 0 && incoming.dropped > 0 && incoming.copied() > 0);
    let removed = |session: &Session| session.removed_taps.tally();
    lab.said(&["tap", "remove", "eth1", "--direction", "egress"]).quietly_ok();
    assert_eq!(removed(&lab.session()), outgoing);
    lab.said(&["tap", "remove", "eth1"]).quietly_ok();
    let after = lab.session();
    let sum = |of: fn(&Tally) -> u64| of(&incoming) + of(&outgoing);
    let both = Tally {
        seen: sum(|tap| tap.seen),
        filtered: sum(|tap| tap.filtered),
        skipped: sum(|tap| tap.skipped),
        asked: sum(|tap| tap.asked),
        dropped: sum(|tap| tap.dropped),
    };
    assert_eq!(removed(&after), both);
    let bytes = |session: &Session| session.taps_total().bcnt + session.removed_taps.stat.bcnt;
    assert_eq!(bytes(&after), bytes(&before));
    assert_eq!((&after.remotes, &after.drops), (&before.remotes, &before.drops));
    after.assert_accounted();
    // A tap that comes again counts from zero, and the sums go on.
    lab.said(&["tap", "add", "eth1"]).ok();
    assert_eq!(lab.session().tally("eth1", "ingress"), Tally::default());
    lab.send(Ns::Peer, "peer1", &sent);
    assert_eq!(lab.session().tally("eth1", "ingress").seen, sent.len() as u64);
    assert_eq!(removed(&lab.session()), both);
    lab.session().assert_accounted();
}

/// Sends a frame each way over each link and panics unless its copies say these port indexes, of incoming and outgoing.
#[track_caller]
fn assert_port_indexes(lab: &Lab, indexes: &[[Option<u32>; 2]]) {
    let frame = |n: usize, way: usize| frames::ipv4_udp(&WAYS[way].2, n as u32, 40);
    let mut capture = collector(lab);
    for n in 0..indexes.len() {
        lab.send(Ns::Peer, &format!("peer{n}"), &[frame(n, 0)]);
        lab.send(Ns::Host, &format!("eth{n}"), &[frame(n, 1)]);
    }
    let copies = decap(Kind::Erspan2, &capture.take(indexes.iter().flatten().flatten().count()));
    let index = |n, way| {
        let copy = copies.iter().find(|copy| copy.frame == frame(n, way))?;
        Some(copy.header.erspan.expect("ERSPAN").port)
    };
    let got: Vec<_> = (0..indexes.len()).map(|n| [index(n, 0), index(n, 1)]).collect();
    assert_eq!(got, indexes);
}

#[test]
fn the_port_index_follows_the_slot_which_is_used_again() {
    const NONE: [Option<u32>; 2] = [None; 2];
    let lab = lab_of(1);
    (1..=4).for_each(|n| add_link(&lab, n));
    up_in(&lab, 0, &["erspan2"], &remote(0).to_string(), &[]);
    tap(&lab, "add eth1");
    tap(&lab, "add eth2");
    assert_port_indexes(&lab, &[[Some(0), Some(1)], [Some(2), Some(3)], [Some(4), Some(5)], NONE, NONE]);
    tap(&lab, "remove eth1");
    tap(&lab, "add eth3 --direction egress");
    tap(&lab, "add eth4 --direction ingress");
    assert_port_indexes(&lab, &[[Some(0), Some(1)], NONE, [Some(4), Some(5)], [None, Some(3)], [Some(6), None]]);
    // The other direction of an interface gets the slot beside, also where a free one is lower.
    tap(&lab, "remove eth0");
    tap(&lab, "add eth4");
    tap(&lab, "add eth1");
    assert_port_indexes(&lab, &[NONE, [Some(0), Some(1)], [Some(4), Some(5)], [None, Some(3)], [Some(6), Some(7)]]);
    let order = "eth1 ingress, eth1 egress, eth3 egress, eth2 ingress, eth2 egress, eth4 ingress, eth4 egress";
    assert_eq!(watched(&lab), order);
    lab.session().assert_accounted();
}

#[test]
fn tap_list_shows_each_tap_with_its_counters() {
    let (lab, _) = lab_with_links(1);
    tap(&lab, "add eth1 --direction egress");
    lab.send(Ns::Host, "eth1", &frames::series(&Ends::HOST_TO_PEER, 7));
    let text = lab.said(&["tap", "list"]).quietly_ok().stdout;
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["TAP", "DIRECTION", "ATTACHED", "COPIES", "BYTES", "DROPPED"]);
    assert_eq!((lines.len(), &lines[1][..4]), (4, &["eth0", "ingress", "yes", "0"][..]));
    assert_eq!(lines[3][..4], ["eth1", "egress", "yes", "7"]);
    let json = lab.said(&["tap", "list", "--json", "--name", "s0"]).quietly_ok().json();
    assert_eq!(json["taps"], lab.status_json()["sessions"][0]["taps"]);
    lab.said(&["tap", "list", "--name", "other"]).refused(1, "other", "--name s0");
    // Where packets are left out, the table says how many.
    up(&lab, 1, &["--sample", "1/2"]);
    let text = lab.said(&["tap", "list", "--name", "s1"]).quietly_ok().stdout;
    let head: Vec<&str> = text.lines().next().expect("a line").split_whitespace().collect();
    assert_eq!(head[2..], ["ATTACHED", "SEEN", "FILTERED", "SKIPPED", "COPIES", "BYTES", "DROPPED"]);
}

#[test]
fn of_several_sessions_the_named_one_is_changed() {
    let (lab, before) = lab_with_links(1);
    up(&lab, 1, &[]);
    lab.said(&["tap", "add", "eth1"]).refused(1, "default", "--name s0, --name s1");
    lab.said(&["tap", "add", "eth1", "--name", "s1"]).quietly_ok();
    let untouched = session_of(&lab, 0);
    assert_eq!(untouched.taps.len(), 2);
    let (packets, ()) = captured(&lab, || lab.send(Ns::Peer, "peer1", &frames::series(&Ends::PEER_TO_HOST, 7)));
    assert!(by_remote(&decap_gre(&packets)).keys().eq([&remote(1)]));
    lab.said(&["tap", "add", "eth1", "--name", "s0", "--direction", "egress"]).quietly_ok();
    lab.said(&["tap", "remove", "eth1", "--name", "s1"]).quietly_ok();
    lab.assert_up(&["s0", "s1"]);
    assert_eq!(session_of(&lab, 0).taps.len(), 3);
    // The hooks that the other still needs stay.
    assert!(lab.shown(&["tc", "qdisc", "show", "dev", "eth1"]).contains("clsact"));
    lab.said(&["tap", "remove", "eth1", "--name", "s0"]).quietly_ok();
    assert!(!lab.shown(&["tc", "qdisc", "show", "dev", "eth1"]).contains("clsact"));
    down(&lab);
    lab.assert_as_before(&before);
}

// ---- refused ----

/// As [`Said::refused`] for a change of the taps, which also must have changed nothing.
#[track_caller]
fn assert_tap_refused(lab: &Lab, words: &str, names: &str, ends: &str) {
    let before = (hooks(lab), lab.session());
    lab.said(&[&["tap"], &words.split(' ').collect::<Vec<_>>()[..]].concat()).refused(1, names, ends);
    assert_eq!(before, (hooks(lab), lab.session()), "{words}");
}

#[test]
fn changes_of_taps_that_cannot_be_made_are_refused_in_one_line() {
    let (lab, before) = lab_with_links(2);
    lab.host(&["tc", "qdisc", "add", "dev", "eth2", "ingress"]);
    lab.host(&["ip", "tuntap", "add", "dev", "tun0", "mode", "tun"]);
    assert_tap_refused(&lab, "add nosuch0", "IFACE nosuch0", ": ip link");
    assert_tap_refused(&lab, "add a'b", "IFACE a'b does not exist here", ": ip link");
    assert_tap_refused(&lab, "add snif0", "IFACE snif0 is a relay", ": ip link");
    assert_tap_refused(&lab, "add snif0p --direction ingress", "IFACE snif0p is a relay", ": ip link");
    assert_tap_refused(&lab, "add tun0", "IFACE tun0 has no Ethernet header", ": ip link");
    assert_tap_refused(&lab, "add eth2", "IFACE eth2 has an `ingress` qdisc", "tc qdisc del dev eth2 ingress");
    assert_tap_refused(&lab, "add eth0", "IFACE eth0 is already watched", "snifctl tap list --name s0");
    assert_tap_refused(&lab, "add eth0 --direction egress", "(egress)", "snifctl tap list --name s0");
    assert_tap_refused(&lab, "add eth1 --name other", "no session other", "--name s0");
    let known = "it watches: eth0";
    assert_tap_refused(&lab, "remove eth1", "IFACE eth1 is not watched", known);
    assert_tap_refused(&lab, "remove nosuch0", "IFACE nosuch0 is not watched", known);
    assert_tap_refused(&lab, "remove eth0", "nothing but eth0", "snifctl down --name s0");
    tap(&lab, "remove eth0 --direction egress");
    assert_tap_refused(&lab, "remove eth0 --direction egress", "not watched", "it watches: eth0:ingress");
    assert_tap_refused(&lab, "remove eth0 --direction ingress", "nothing but eth0", "snifctl down --name s0");
    assert_tap_refused(&lab, "remove eth0", "nothing but eth0", "snifctl down --name s0");
    lab.said(&["tap", "add", "eth1", "--direction", "sideways"]).refused(2, "sideways", "snifctl tap add --help");
    lab.said(&["tap", "add", "eth1:sideways"]).refused(2, "sideways", "");
    lab.said(&["tap", "add", "a b"]).refused(2, "IFACE \"a b\"", ": ip link");
    lab.said(&["tap", "remove"]).refused(2, "IFACE", "snifctl tap remove --help");
    down(&lab);
    for words in [&["tap", "add", "eth1"][..], &["tap", "remove", "eth1"], &["tap", "list"]] {
        lab.said(words).refused(1, "no session is up", "--remote ADDR");
    }
    lab.host(&["tc", "qdisc", "del", "dev", "eth2", "ingress"]);
    lab.host(&["ip", "link", "del", "dev", "tun0"]);
    lab.assert_as_before(&before);
}

// ---- interfaces that go, come again, or have other names; qdiscs that are not ours ----

#[test]
fn an_interface_that_is_down_is_added_with_a_warning() {
    let (lab, _) = lab_with_links(1);
    lab.host(&["ip", "link", "set", "dev", "eth1", "down"]);
    lab.said(&["tap", "add", "eth1"]).ok_noting("eth1 is down");
    lab.host(&["ip", "link", "set", "dev", "eth1", "up"]);
    assert_copied_on(&lab, ETH1, "both");
}

#[test]
fn an_interface_that_was_deleted_can_be_removed() {
    let (lab, _) = lab_with_links(2);
    tap(&lab, "add eth1");
    tap(&lab, "add eth2");
    assert_copied_on(&lab, ETH1, "both");
    lab.host(&["ip", "link", "del", "dev", "eth1"]);
    assert_eq!(watched(&lab), "eth0 ingress, eth0 egress, eth1 ingress, eth1 egress, eth2 ingress, eth2 egress");
    let gone = lab.session().taps.into_iter().filter(|tap| !tap.exists).map(|tap| tap.interface).collect::<Vec<_>>();
    assert_eq!(gone, ["eth1", "eth1"]);
    tap(&lab, "remove eth1 --direction egress");
    tap(&lab, "remove eth1");
    assert_eq!(watched(&lab), "eth0 ingress, eth0 egress, eth2 ingress, eth2 egress");
    assert_eq!(lab.session().removed_taps.tally().seen, 14);
    lab.session().assert_accounted();
    lab.assert_up(&["s0"]);
    lab.host(&["ip", "link", "del", "dev", "eth2"]);
    down(&lab);
    lab.assert_no_pins();
    assert_eq!(lab.interfaces(), ["lo", "eth0", "out0"]);
    assert!(!lab.shown(&["tc", "qdisc"]).contains("clsact"));
}

/// Deleted and made anew, it has another index: what the old one has counted must not be lost.
#[test]
fn an_interface_that_was_made_anew_can_be_added_again() {
    let (lab, _) = lab_with_links(1);
    tap(&lab, "add eth1");
    assert_copied_on(&lab, ETH1, "both");
    lab.host(&["ip", "link", "del", "dev", "eth1"]);
    add_link(&lab, 1);
    tap(&lab, "add eth1");
    assert_copied_on(&lab, ETH1, "both");
    assert_copied_on(&lab, ETH0, "both");
    let session = lab.session();
    assert_eq!(session.tally("eth1", "ingress").seen, 14, "{session:#}");
    session.assert_accounted();
    down(&lab);
    assert!(!lab.shown(&["tc", "qdisc"]).contains("clsact"));
}

#[test]
fn a_renamed_interface_stays_watched_under_its_new_name() {
    let (lab, before) = lab_with_links(1);
    tap(&lab, "add eth1 --direction ingress");
    lab.host(&["ip", "link", "set", "dev", "eth1", "name", "lan1"]);
    assert_eq!(watched(&lab), "eth0 ingress, eth0 egress, lan1 ingress");
    assert_copied_on(&lab, ("lan1", "peer1"), "ingress");
    assert_tap_refused(&lab, "add lan1 --direction ingress", "lan1 is already watched", "snifctl tap list --name s0");
    tap(&lab, "add lan1");
    assert_copied_on(&lab, ("lan1", "peer1"), "both");
    tap(&lab, "remove lan1 --direction ingress");
    assert_copied_on(&lab, ("lan1", "peer1"), "egress");
    tap(&lab, "remove lan1");
    assert_copied_on(&lab, ("lan1", "peer1"), "none");
    lab.session().assert_accounted();
    lab.host(&["ip", "link", "set", "dev", "lan1", "name", "eth1"]);
    down(&lab);
    lab.assert_as_before(&before);
}

/// The name that a watched interface had when it was added is another one's now.
#[test]
fn an_interface_that_took_a_watched_ones_old_name_is_another_one() {
    let (lab, _) = lab_with_links(2);
    tap(&lab, "add eth1");
    lab.host(&["ip", "link", "set", "dev", "eth1", "name", "lan1"]);
    lab.host(&["ip", "link", "set", "dev", "eth2", "name", "eth1"]);
    assert_tap_refused(&lab, "remove eth1", "IFACE eth1 is not watched", "eth0, lan1");
    tap(&lab, "add eth1");
    assert_copied_on(&lab, ("lan1", "peer1"), "both");
    assert_copied_on(&lab, ("eth1", "peer2"), "both");
    assert_eq!(watched(&lab), "eth0 ingress, eth0 egress, lan1 ingress, lan1 egress, eth1 ingress, eth1 egress");
    lab.session().assert_accounted();
    tap(&lab, "remove eth1");
    assert_copied_on(&lab, ("lan1", "peer1"), "both");
    assert_copied_on(&lab, ("eth1", "peer2"), "none");
    tap(&lab, "remove lan1");
    assert_copied_on(&lab, ("lan1", "peer1"), "none");
    lab.session().assert_accounted();
}

#[test]
fn an_interface_is_known_by_its_other_name_too() {
    let (lab, _) = lab_with_links(1);
    lab.host(&["ip", "link", "property", "add", "dev", "eth1", "altname", "uplink"]);
    tap(&lab, "add uplink --direction ingress");
    assert_eq!(watched(&lab), "eth0 ingress, eth0 egress, eth1 ingress");
    assert_tap_refused(&lab, "add eth1 --direction ingress", "already watched", "snifctl tap list --name s0");
    tap(&lab, "add eth1 --direction egress");
    assert_copied_on(&lab, ETH1, "both");
    tap(&lab, "remove uplink --direction egress");
    assert_copied_on(&lab, ETH1, "ingress");
    tap(&lab, "remove eth1");
    tap(&lab, "add eth1");
    tap(&lab, "remove uplink");
    assert_eq!(watched(&lab), "eth0 ingress, eth0 egress");
    assert_copied_on(&lab, ETH1, "none");
    lab.session().assert_accounted();
}

#[test]
fn a_clsact_qdisc_goes_with_the_last_tap_of_its_interface_if_it_is_ours() {
    let lab = lab_of(1);
    add_link(&lab, 1);
    add_link(&lab, 2);
    lab.host(&["tc", "qdisc", "add", "dev", "eth2", "clsact"]);
    let before = lab.machine();
    up(&lab, 0, &[]);
    let one = lab.machine();
    for dev in ["eth1", "eth2"] {
        tap(&lab, &format!("add {dev}"));
        tap(&lab, &format!("remove {dev} --direction egress"));
        assert!(lab.shown(&["tc", "qdisc", "show", "dev", dev]).contains("clsact"), "{dev}");
        tap(&lab, &format!("remove {dev}"));
        assert_eq!(lab.machine(), one, "{dev}");
    }
    tap(&lab, "add eth1");
    tap(&lab, "add eth2");
    tap(&lab, "remove eth0");
    down(&lab);
    lab.assert_as_before(&before);
}

/// A tap whose filter someone has removed is attached again by `tap add`, and stays in the session where that fails.
#[test]
fn a_tap_that_lost_its_filter_is_attached_again() {
    let (lab, before) = lab_with_links(1);
    tap(&lab, "add eth1");
    assert_copied_on(&lab, ETH1, "both");
    let lose = || lab.host(&["tc", "filter", "del", "dev", "eth1", "ingress"]);
    lose();
    assert!(!lab.session().taps[2].attached);
    tap(&lab, "add eth1");
    lab.assert_up(&["s0"]);
    assert_copied_on(&lab, ETH1, "both");
    assert_eq!(lab.session().tally("eth1", "ingress").seen, 14);
    lose();
    let (lost, fakes) = (lab.session(), lab.counting_fakes());
    lab.said_by(&fakes.first_in_path(), &["tap", "add", "eth1"]).quietly_ok();
    let last = fakes.calls().iter().rposition(|call| call.starts_with("tc -batch")).expect("tc attaches") + 1;
    lose();
    fakes.arm(last, Fault::Fail { done: None });
    lab.said_by(&fakes.first_in_path(), &["tap", "add", "eth1"]).refused(1, "injected", "");
    assert_eq!(watched(&lab), "eth0 ingress, eth0 egress, eth1 ingress, eth1 egress");
    assert_eq!(lab.session(), lost);
    down(&lab);
    lab.assert_as_before(&before);
}

// ---- others at the same hooks ----

/// A program that is not ours: drops frames of 1009 bytes, and passes all others at once.
const FOREIGN: &str = r#"
    struct __sk_buff { unsigned int len; };
    __attribute__((section("tc"), used)) int foreign(struct __sk_buff *skb) { return skb->len == 1009 ? 2 : 0; }
    __attribute__((section("license"), used)) char _license[] = "GPL";
"#;

/// The foreign program, pinned in a directory of bpffs of its own; gone on drop.
struct Foreign(PathBuf);

impl Foreign {
    fn new(lab: &Lab) -> Foreign {
        let (source, object) = (lab.dir().join("foreign.c"), lab.dir().join("foreign.o"));
        fs::write(&source, FOREIGN).unwrap();
        let foreign = Foreign(Path::new("/sys/fs/bpf").join(lab.ns_name(Ns::Host)));
        let clang =
            ["clang", "-O2", "-target", "bpf", "-c", &source.to_string_lossy(), "-o", &object.to_string_lossy()];
        lab.host(&clang);
        lab.host(&["mkdir", &foreign.0.to_string_lossy()]);
        lab.host(&["bpftool", "prog", "load", &object.to_string_lossy(), &foreign.pin(), "type", "classifier"]);
        foreign
    }

    fn pin(&self) -> String {
        self.0.join("program").to_string_lossy().into_owned()
    }

    fn attach(&self, lab: &Lab, hook: &str, pref: &str) {
        let filter = ["tc", "filter", "add", "dev", "eth0", hook, "pref", pref, "handle", "0x7", "bpf", "da"];
        lab.host(&[&filter[..], &["object-pinned", &self.pin()]].concat());
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Pings both ways with frames of a length that the foreign program drops, and of one that it passes; panics unless it
/// does, and the collector gets `copies` of the six frames that pass our taps if we have any.
#[track_caller]
fn assert_foreign_works(lab: &Lab, copies: usize) {
    let mut collector = lab.capture(Ns::Collector, "col0", Direction::In);
    for (ns, to) in [(Ns::Host, "192.0.2.2"), (Ns::Peer, "192.0.2.1")] {
        let answers = |frame: usize| {
            let size = (frame - 42).to_string();
            let patience = if frame == 1009 { "0.2" } else { "5" };
            lab.try_run(ns, &["ping", "-c", "1", "-W", patience, "-s", &size, to]).status.success()
        };
        assert_eq!((answers(1009), answers(500)), (false, true), "frames that {ns:?} sent");
    }
    collector.take(copies);
}

#[test]
fn foreign_filters_and_their_qdisc_work_before_during_and_after() {
    let lab = Lab::roomy();
    let foreign = Foreign::new(&lab);
    lab.host(&["tc", "qdisc", "add", "dev", "eth0", "clsact"]);
    for hook in ["ingress", "egress"] {
        for pref in ["1", "49152"] {
            foreign.attach(&lab, hook, pref);
        }
    }
    let before = lab.machine();
    assert_foreign_works(&lab, 0);
    lab.said(&UP).quietly_ok();
    assert_foreign_works(&lab, 6);
    lab.assert_copied(1);
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
    assert_foreign_works(&lab, 0);
}

#[test]
fn a_foreign_filter_that_comes_later_keeps_our_qdisc() {
    let lab = Lab::roomy();
    let (foreign, before) = (Foreign::new(&lab), lab.machine());
    lab.said(&UP).quietly_ok();
    foreign.attach(&lab, "egress", "3");
    lab.said(&["down"]).quietly_ok();
    assert_foreign_works(&lab, 0);
    let qdiscs = lab.shown(&["tc", "qdisc", "show", "dev", "eth0"]);
    assert!(qdiscs.contains("clsact"), "{qdiscs}");
    // What marks the qdisc as ours stays too, so that the next `down` without a foreign filter removes both.
    lab.host(&["tc", "filter", "del", "dev", "eth0", "egress"]);
    lab.said(&["down"]).ok();
    lab.assert_as_before(&before);
}

#[test]
fn a_qdisc_without_filters_that_was_there_before_stays() {
    let lab = Lab::roomy();
    lab.host(&["tc", "qdisc", "add", "dev", "eth0", "clsact"]);
    let before = lab.machine();
    lab.said(&UP).quietly_ok();
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

#[test]
fn doctor_lists_foreign_filters_and_which_of_them_hide_packets() {
    let lab = Lab::roomy();
    let foreign = Foreign::new(&lab);
    lab.said(&UP).quietly_ok();
    // Of two bpf filters with one preference the one that came last runs first.
    foreign.attach(&lab, "ingress", "1");
    foreign.attach(&lab, "egress", "9");
    lab.assert_copied(0);
    let report = lab.said(&["doctor", "eth0", "--json"]).quietly_ok().json();
    let checks = report["checks"].as_array().unwrap();
    let level = |hook: &str| {
        let what = format!("\"foreign\" at {hook}");
        checks.iter().find(|check| check["detail"].as_str().unwrap().contains(&what)).map(|check| &check["level"])
    };
    assert_eq!((level("egress"), level("ingress")), (Some(&json!("ok")), Some(&json!("warn"))), "{report:#}");
}
