//! Remotes that are gone: no clone is made for them, their flows go to the others, and both come back with them.

use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;
use std::time::Instant;

use crate::lab;
use crate::lab::capture::Capture;
use crate::lab::decode::decap_gre;
use crate::lab::frames::{self, Ends};
use crate::lab::remotes::{answering, assert_no_counter_went_back, collector, listed, mac, remote, remotes, said_up};
use crate::lab::status::Session;
use crate::lab::talk::{Flow, flows, untagged};
use crate::lab::{COLLECTOR_MAC, Lab, Ns, OUT_MAC, PATIENCE, mac_text, poll};

/// Has a remote answer, or nobody.
fn answers(lab: &Lab, n: u8, does: bool) {
    lab.ip_batch(Ns::Collector, &format!("link set m{n} {}", if does { "up" } else { "down" }));
}

/// A remote no longer answers, and its address here is old.
fn silence(lab: &Lab, n: u8) {
    answers(lab, n, false);
    lab.ip_batch(Ns::Host, &format!("neigh replace {} lladdr {} dev out0 nud stale", remote(n), mac(n)));
}

fn states(session: &Session) -> Vec<&str> {
    session.remotes.iter().map(|remote| remote.state.as_str()).collect()
}

/// Packets that have come to the relay.
fn cloned(lab: &Lab) -> u64 {
    let shown = lab.shown(&["tc", "-s", "-j", "qdisc", "show"]);
    let shown: serde_json::Value = serde_json::from_str(&shown).expect("JSON of tc");
    let at_relay = shown.as_array().expect("qdiscs").iter().filter(|qdisc| {
        qdisc["kind"] == "clsact" && qdisc["dev"].as_str().is_some_and(|dev| !["eth0", "out0"].contains(&dev))
    });
    at_relay.map(|qdisc| qdisc["packets"].as_u64().expect("a count")).max().expect("a relay")
}

/// Sends frames to the watched interface. Panics unless each of these remotes is asked for as many copies as the counters
/// say, all of those that are up are sent, and the others counted by this reason and not cloned. No clone but those.
#[track_caller]
fn assert_replicated(lab: &Lab, up: &[u8], down: &[u8], reason: &str) {
    let (before, clones) = (lab.settled(), cloned(lab));
    lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, 13));
    let after = lab.settled();
    let grown = |n: u8| {
        let [was, is] = [&before, &after].map(|session| session.remote(remote(n)).stat);
        (is.pcnt - was.pcnt, is.dcnt - was.dcnt)
    };
    up.iter().for_each(|n| assert_eq!(grown(*n), (13, 0), "remote {n} of {after:#}"));
    down.iter().for_each(|n| assert_eq!(grown(*n), (0, 13), "remote {n} of {after:#}"));
    let lost = 13 * down.len() as u64;
    assert_eq!((after.dropped(reason) - before.dropped(reason), after.drops() - before.drops()), (lost, lost));
    assert_eq!(cloned(lab) - clones, 13 * (after.remotes.len() - down.len()) as u64);
    assert_no_counter_went_back(&before, &after);
    after.assert_accounted();
}

#[test]
fn a_remote_whose_next_hop_fails_costs_no_clone_until_it_answers_again() {
    let lab = answering(2);
    said_up(&lab, &listed(&remotes(2)), &[]).quietly_ok();
    assert_replicated(&lab, &[0, 1], &[], "down");

    // The kernel has found that it fails: told, and asked once more.
    answers(&lab, 1, false);
    lab.ip_batch(Ns::Host, "neigh replace 198.51.100.11 dev out0 nud failed");
    let session = lab.session();
    assert_eq!(states(&session), ["ok", "outdated"], "{session:#}");
    let fault = "remote 198.51.100.11: its next hop does not answer";
    assert!(session.faults.iter().any(|at| at == fault), "{session:#}");
    let said = lab.said(&["sync"]).ok_noting("198.51.100.11 does not answer on out0: remote 198.51.100.11 is down");
    assert!(said.stdout.ends_with(&format!("default: {fault}; down\n")), "{said:#?}");

    let session = lab.session();
    assert_eq!((states(&session), session.faults.len()), (vec!["ok", "down"], 0), "{session:#}");
    assert_eq!(session.remotes[1].mac, Some(mac(1)), "what was known is kept");
    assert_eq!(lab.status_json()["sessions"][0]["remotes"][1]["silence"], "neighbour");
    assert!(lab.said(&["status"]).quietly_ok().stdout.contains("  out0  1600  down  "));
    let said = lab.said(&["status", "--check"]);
    let line = "default: remote 198.51.100.11: its next hop does not answer: it is down, and gets no copies\n";
    assert_eq!((said.status.code(), said.stdout.as_str()), (Some(1), line));
    let doctor = lab.said(&["doctor"]).stdout;
    assert!(
        doctor.contains("default: remote 198.51.100.11: its next hop does not answer: it is down; try:"),
        "{doctor}"
    );
    assert_replicated(&lab, &[0], &[1], "down");

    // The next one does not wait long for it, and edits of something else leave it as it is.
    let start = Instant::now();
    assert_eq!(lab.said(&["sync"]).ok_noting("is down").stdout, "");
    assert!(start.elapsed().as_secs_f32() < 3.0 || lab::GUEST, "{:?}", start.elapsed());
    lab.said(&["filter", "set", "udp"]).ok();
    assert_replicated(&lab, &[0], &[1], "down");

    answers(&lab, 1, true);
    assert_eq!(lab.said(&["sync"]).quietly_ok().stdout, "default: remote 198.51.100.11: it answers; up\n");
    assert_eq!(lab.said(&["status", "--check"]).quietly_ok().stdout, "");
    assert_replicated(&lab, &[0, 1], &[], "down");

    // Of one without a route, the reason is another, and no clone is made either.
    lab.host(&["ip", "route", "add", "unreachable", "198.51.100.11"]);
    lab.said(&["sync"]).ok_noting("no route");
    assert_eq!(states(&lab.session()), ["ok", "unresolved"]);
    assert_replicated(&lab, &[0], &[1], "unresolved");
    lab.said(&["down"]).quietly_ok();
}

/// Sends a frame of each flow. Each one's remote, if it came.
#[track_caller]
fn placed(lab: &Lab, flows: &[Flow]) -> Vec<Option<Ipv4Addr>> {
    let before = lab.settled().remotes_total().pcnt;
    let mut capture: Capture = collector(lab);
    let sent: Vec<Vec<u8>> = flows.iter().map(|flow| flow.forward.clone()).collect();
    lab.send(Ns::Peer, "peer0", &sent);
    let session = lab.settled();
    session.assert_accounted();
    let copies = session.remotes_total().pcnt - before;
    assert!(poll(PATIENCE, || (capture.count() as u64 >= copies).then_some(())).is_some());
    let gre: Vec<Vec<u8>> = capture.stop().into_iter().filter(|at| at[12..14] == [8, 0] && at[23] == 47).collect();
    assert_eq!(gre.len() as u64, copies);
    let at: HashMap<Vec<u8>, Ipv4Addr> = decap_gre(&gre).into_iter().map(|copy| (copy.frame, copy.outer_dst)).collect();
    sent.iter().map(|frame| at.get(frame).copied()).collect()
}

fn shares(placed: &[Option<Ipv4Addr>]) -> BTreeMap<Ipv4Addr, u64> {
    let mut shares = BTreeMap::new();
    placed.iter().flatten().for_each(|at| *shares.entry(*at).or_default() += 1);
    shares
}

#[test]
fn flows_of_a_remote_that_is_down_go_to_the_others_and_come_back() {
    let lab = answering(3);
    said_up(&lab, &listed(&remotes(3)), &["--spread", "flow"]).quietly_ok();
    let flows = flows(300, untagged);
    let whole = placed(&lab, &flows);
    assert!(shares(&whole).keys().copied().eq(remotes(3)), "{:?}", shares(&whole));

    silence(&lab, 1);
    let said = lab.said(&["sync"]).ok_noting("is down");
    assert!(said.stdout.ends_with("default: remote 198.51.100.11: its next hop does not answer; down\n"), "{said:#?}");
    let rest = placed(&lab, &flows);
    for (before, now) in whole.iter().zip(&rest) {
        match *before == Some(remote(1)) {
            true => assert!([Some(remote(0)), Some(remote(2))].contains(now), "{now:?}"),
            false => assert_eq!(before, now, "a flow of the living has moved"),
        }
    }
    let heirs: Vec<_> =
        whole.iter().zip(&rest).filter(|(at, _)| **at == Some(remote(1))).map(|(_, now)| *now).collect();
    assert_eq!(shares(&heirs).len(), 2, "both take some: {:?}", shares(&heirs));
    assert_eq!(lab.session().drops(), 0);

    // With nobody left, each is counted where it would be.
    silence(&lab, 0);
    silence(&lab, 2);
    lab.said(&["sync"]).ok();
    assert_eq!(states(&lab.session()), ["down"; 3]);
    let clones = cloned(&lab);
    assert_eq!(placed(&lab, &flows), vec![None; flows.len()]);
    let session = lab.session();
    assert_eq!((session.dropped("down"), session.drops(), cloned(&lab)), (300, 300, clones));
    for (address, share) in shares(&whole) {
        assert_eq!(session.remote(address).stat.dcnt, share, "{address} of {session:#}");
    }

    (0..3).for_each(|n| answers(&lab, n, true));
    lab.said(&["sync"]).quietly_ok();
    assert_eq!(placed(&lab, &flows), whole);
    lab.session().assert_balanced();
    lab.said(&["down"]).quietly_ok();
}

const REMOTE6: &str = "2001:db8:1::a";

/// Lets the collector drop pings to its second remote, and count them.
fn no_ping(lab: &Lab) {
    let rules = "table ip probe {
        counter pings { }
        chain input {
            type filter hook input priority 0
            ip daddr 198.51.100.11 icmp type echo-request counter name pings drop
        }
    }";
    let file = lab.dir().join("rules.nft");
    std::fs::write(&file, rules).expect("write the rules");
    lab.collector(&["nft", "-f", file.to_str().expect("a plain path")]);
}

fn pings(lab: &Lab) -> u64 {
    let shown = lab.collector(&["nft", "-j", "list", "counter", "ip", "probe", "pings"]).stdout;
    let shown: serde_json::Value = serde_json::from_slice(&shown).expect("JSON of nft");
    shown["nftables"][1]["counter"]["packets"].as_u64().expect("a count")
}

#[test]
fn a_remote_that_does_not_answer_ping_is_down_where_ping_is_asked_for() {
    let lab = answering(2);
    lab.ip_batch(Ns::Collector, &format!("address add {REMOTE6}/64 dev col0 nodad"));
    for (ns, address, mac, dev) in
        [(Ns::Host, REMOTE6, COLLECTOR_MAC, "out0"), (Ns::Collector, "2001:db8:1::1", OUT_MAC, "col0")]
    {
        lab.ip_batch(ns, &format!("neigh replace {address} lladdr {} nud permanent dev {dev}", mac_text(mac)));
    }
    let list = format!("{},{REMOTE6}", listed(&remotes(2)));
    said_up(&lab, &list, &["--probe", "icmp"]).quietly_ok();
    said_up(&lab, &listed(&remotes(2)), &["--name", "plain", "--direction", "egress"]).quietly_ok();
    assert_eq!(states(&lab.session()), ["ok"; 3]);

    no_ping(&lab);
    let said = lab.said(&["sync", "--all"]).ok();
    assert_eq!(said.stdout, "default: remote 198.51.100.11: it does not answer ping; down\n");
    assert!(said.stderr.contains("198.51.100.11 does not answer ping from 198.51.100.1: remote"), "{said:#?}");
    assert_eq!((states(&lab.session()), pings(&lab)), (vec!["ok", "down", "ok"], 2));
    assert_eq!(states(&lab.session_called("plain")), ["ok"; 2]);
    // A look sends nothing, an edit of something else neither.
    lab.said(&["filter", "set", "udp"]).ok();
    let said = lab.said(&["status", "--check"]);
    let line = "default: remote 198.51.100.11: it does not answer ping: it is down, and gets no copies\n";
    assert_eq!((said.status.code(), said.stdout.as_str(), pings(&lab)), (Some(1), line, 2));
    assert_replicated(&lab, &[0], &[1], "down");
    assert!(lab.said(&["status", "-v"]).stdout.contains("    down: the remote does not answer"));

    lab.collector(&["nft", "flush", "ruleset"]);
    assert_eq!(lab.said(&["sync"]).quietly_ok().stdout, "default: remote 198.51.100.11: it answers; up\n");
    assert_eq!(states(&lab.session()), ["ok"; 3]);
    lab.said(&["down"]).quietly_ok();

    // One that is silent from the beginning is made all the same; without ping it is as before.
    no_ping(&lab);
    said_up(&lab, &list, &["--probe", "icmp"]).ok_noting("remote 198.51.100.11 is down");
    assert_replicated(&lab, &[0], &[1], "down");
    let said = said_up(&lab, &list, &["--replace"]).ok();
    assert!(said.stderr.contains("--probe icmp → none") && said.stderr.contains("it answers; up"), "{said:#?}");
    assert_eq!((states(&lab.session()), pings(&lab)), (vec!["ok"; 3], 2));
    assert_replicated(&lab, &[0, 1], &[], "down");
    said_up(&lab, &list, &["--probe", "arp"]).refused(2, "--probe", "");
    lab.said(&["down", "--all"]).quietly_ok();
}
