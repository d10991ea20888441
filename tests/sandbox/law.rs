//! The law of conservation, live: while frames pass, and whatever happens to the session, `status --check` finds every copy
//! that was asked for sent or dropped for a reason, and what was sent is what the collector counts.

use crate::lab::capture::{Capture, Direction};
use crate::lab::frames::{self, Ends};
use crate::lab::judge::{UP, up_with};
use crate::lab::status::Session;
use crate::lab::traffic::Stream;
use crate::lab::{Lab, Ns, PATIENCE, poll, remotes};
use serde_json::Value;

/// Traffic towards eth0, and a look at the collector's end, until [`Law::end`].
struct Law<'a> {
    lab: &'a Lab,
    stream: Option<Stream>,
    capture: Capture,
    /// What `status --check` said meanwhile.
    said: Vec<String>,
}

/// What came of it.
struct Outcome {
    session: Session,
    /// Outer packets at the collector.
    arrived: u64,
    said: Vec<String>,
}

impl Law<'_> {
    fn begin(lab: &Lab) -> Law<'_> {
        Law::of(lab, &frames::series(&Ends::PEER_TO_HOST, 100))
    }

    fn of<'a>(lab: &'a Lab, frames: &[Vec<u8>]) -> Law<'a> {
        let capture = lab.capture(Ns::Collector, "col0", Direction::In);
        let stream = Stream::start(lab, (Ns::Peer, "peer0"), frames, 2000, "--pps=1500");
        let mut law = Law { lab, stream: Some(stream), capture, said: Vec::new() };
        law.check();
        law
    }

    /// Looks twice, a little apart.
    fn check(&mut self) {
        let said = self.lab.said(&["status", "--check", "--interval", "150ms"]);
        self.said.extend(said.stdout.lines().map(String::from));
    }

    /// Does something to the session, and looks.
    fn after(&mut self, words: &str) {
        self.lab.said(&words.split(' ').collect::<Vec<_>>()).ok();
        self.check();
    }

    fn on_host(&mut self, words: &str) {
        self.lab.host(&words.split(' ').collect::<Vec<_>>());
        self.check();
    }

    /// Panics unless all adds up, then and in the end, and the collector has counted what was sent.
    #[track_caller]
    fn end(mut self) -> Outcome {
        if let Some(stream) = self.stream.take() {
            stream.stop();
        }
        self.lab.wait_until_received();
        let settled = poll(PATIENCE, || Some(self.lab.session()).filter(Session::is_settled));
        let session = settled.unwrap_or_else(|| panic!("{:#}", self.lab.session()));
        self.check();
        for fault in ["unaccounted", "too many", "more than all reasons", "more was left out"] {
            assert!(!self.said.iter().any(|line| line.contains(fault)), "{:#?}", self.said);
        }
        let forms = self.lab.status_json()["sessions"][0]["forms"].clone();
        let form = |name: &str| forms[name].as_u64().unwrap_or_else(|| panic!("{name} in {forms}"));
        let sent = session.remotes_total().pcnt + session.removed.pcnt;
        let outer = sent - form("fragmented") + form("fragments");
        self.capture.settle();
        let is_gre = |packet: &&Vec<u8>| packet[12..14] == [8, 0] && packet[23] == 47;
        let arrived = self.capture.stop().iter().filter(is_gre).count() as u64;
        assert_eq!(arrived, outer - session.out_dropped, "{session:#}");
        assert!(sent > 0, "{session:#}");
        Outcome { session, arrived, said: self.said }
    }
}

/// The reasons for which copies were dropped.
fn reasons(session: &Session) -> Vec<&str> {
    session.drops.iter().filter(|(_, count)| **count > 0).map(|(reason, _)| reason.as_str()).collect()
}

#[test]
fn filters_taps_and_remotes_that_change_under_traffic_lose_nothing() {
    let lab = remotes::lab_of(3);
    lab.said(&["up", "eth0", "--tunnel", "gre", "--remote", &remotes::listed(&remotes::remotes(3))]).quietly_ok();
    let mut law = Law::begin(&lab);
    law.check();
    law.after("filter set udp");
    law.after("filter set tcp");
    law.after("filter clear");
    law.after("tap remove eth0 --direction egress");
    law.after("tap add eth0 --direction egress");
    law.after(&format!("remote remove {}", remotes::remote(2)));
    law.after(&format!("remote add {}", remotes::remote(2)));
    law.after("sync");
    let out = law.end();
    // A copy that was on its way as its remote was removed is counted as that.
    assert!(reasons(&out.session).iter().all(|reason| *reason == "remote"), "{:#}", out.session);
    assert_eq!(out.said, [""; 0]);
}

#[test]
fn what_the_out_link_cannot_take_is_told_as_lost_behind_us() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    let mut law = Law::begin(&lab);
    law.on_host("tc qdisc replace dev out0 root tbf rate 400kbit burst 3100 limit 6000");
    let said = lab.said(&["status", "--check", "--interval", "500ms"]);
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    let is_told =
        |line: &str| line.starts_with("default: behind us: ") && line.contains(" dropped by out interfaces in ");
    assert!(said.stdout.lines().any(is_told), "{said:?}");
    let out = law.end();
    assert!(out.session.out_dropped > 0 && out.arrived > 0, "{:#}", out.session);
    assert_eq!(reasons(&out.session), [""; 0]);
}

#[test]
fn what_a_link_that_is_down_swallows_is_told_as_lost_behind_us() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    let mut law = Law::begin(&lab);
    law.on_host("ip link set dev out0 down");
    let told = |start: &str| law.said.iter().any(|line| line.starts_with(start));
    assert!(told("default: remote 198.51.100.2: it was reached through out0") && told("default: behind us: "));
    let out = law.end();
    assert!(out.session.out_dropped > 0 && out.arrived > 0, "{:#}", out.session);
    assert_eq!(reasons(&out.session), [""; 0]);
}

#[test]
fn a_rate_cap_and_fragments_are_accounted_for() {
    let lab = Lab::new();
    lab.said(&up_with(&["--oversize", "fragment", "--max-rate", "1mbit"])).ok();
    let large: Vec<Vec<u8>> = (0..50).map(|n| frames::jumbo(&Ends::PEER_TO_HOST, n, 1514)).collect();
    let mut law = Law::of(&lab, &large);
    law.check();
    let out = law.end();
    assert_eq!((reasons(&out.session), out.said), (vec!["rate"], vec![]), "{:#}", out.session);
    let forms = lab.status_json()["sessions"][0]["forms"].clone();
    let sent = Value::from(out.session.remotes_total().pcnt);
    assert_eq!((&forms["fragmented"], forms["fragments"].as_u64()), (&sent, sent.as_u64().map(|n| 2 * n)));
}

#[test]
fn a_dead_remote_costs_its_own_copies_only() {
    let lab = remotes::answering(2);
    lab.said(&["up", "eth0", "--tunnel", "gre", "--remote", &remotes::listed(&remotes::remotes(2))]).quietly_ok();
    let mut law = Law::begin(&lab);
    lab.collector(&["ip", "link", "del", "dev", "m1"]);
    lab.ip_batch(Ns::Host, &format!("neigh replace {} dev out0 nud failed", remotes::remote(1)));
    law.after("sync");
    let told =
        format!("default: remote {}: its next hop does not answer: it is down, and gets no copies", remotes::remote(1));
    assert_eq!(law.said.last(), Some(&told));
    let out = law.end();
    assert_eq!(reasons(&out.session), ["down"], "{:#}", out.session);
}

#[test]
fn super_packets_are_accounted_for_by_their_wire_frames() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    let capture = lab.capture(Ns::Collector, "col0", Direction::In);
    let mut law = Law { lab: &lab, stream: None, capture, said: Vec::new() };
    std::thread::scope(|scope| {
        let transfer = scope.spawn(|| lab.tcp_transfer(3_000_000, Ns::Host, Ns::Peer));
        while !transfer.is_finished() {
            law.check();
        }
    });
    let out = law.end();
    assert_eq!((reasons(&out.session), out.said), (vec![], vec![]), "{:#}", out.session);
    let forms = lab.status_json()["sessions"][0]["forms"].clone();
    assert!(forms["segments"].as_u64() > forms["super_packets"].as_u64(), "{forms}");
}

/// What no program of ours does: a counter that is told lies.
#[test]
fn a_term_that_does_not_add_up_is_named() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, 7));
    assert_eq!(lab.said(&["status", "--check"]).quietly_ok().stdout, "");
    let pin = lab.pins().join("default/maps/drops");
    let dump = lab.shown(&["bpftool", "-j", "map", "dump", "pinned", pin.to_str().expect("a plain path")]);
    let dump: Value = serde_json::from_str(&dump).expect("JSON");
    let values = dump[0]["values"].as_array().expect("a value per CPU");
    let bytes = values[0]["value"].as_array().expect("bytes").len();
    // bpftool writes one value for all CPUs.
    let value: Vec<&str> = (0..bytes).map(|at| if at == 0 { "3" } else { "0" }).collect();
    let key = ["bpftool", "map", "update", "pinned", pin.to_str().expect("a plain path"), "key", "0", "0", "0", "0"];
    lab.host(&[&key[..], &["value"], &value].concat());
    let told = 3 * values.len();
    let line = format!("default: copies: {told} too many: 7 sent and {told} dropped of 7 that were asked for\n");
    let said = lab.said(&["status", "--check"]);
    assert_eq!((said.status.code(), said.stdout), (Some(1), line));
}
