//! What of the watched traffic is copied: sampling, the snap length, the rate cap, and taps that come and go while the
//! session runs.
//!
//! Several sessions often watch the same traffic at once, each with another choice, and send to remotes of their own: one
//! capture sees the copies of all, told apart by their outer destination.

mod lab;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Stdio};
use std::time::Duration;

use lab::capture::{Capture, Direction};
use lab::check::assert_same_frames;
use lab::decode::{Copy, Port, decap_gre, inner_frames, tcp_stream, verify_checksums};
use lab::faults::{Fakes, Fault};
use lab::frames::{self, Ends, Family};
use lab::judge::{Said, UP, drops};
use lab::tunnels::{Kind, Tunnelled, decap, inner, packets_to};
use lab::{COLLECTOR_MAC, HOST_IP, Lab, Ns, Options, PATIENCE, PEER_IP, mac_text, pcap, poll};
use serde_json::Value;

/// The n-th remote.
fn remote(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 51, 100, 10 + n)
}

/// The n-th remote over IPv6.
fn remote6(n: u8) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x10 + u16::from(n))
}

/// Makes the collector answer for so many remotes of both families.
fn knowing(lab: Lab, n: u8) -> Lab {
    let mac = mac_text(COLLECTOR_MAC);
    let entry = |address: String| format!("neigh replace {address} lladdr {mac} nud permanent dev out0");
    let entries = (0..n).flat_map(|n| [entry(remote(n).to_string()), entry(remote6(n).to_string())]);
    lab.ip_batch(Ns::Host, &entries.collect::<Vec<_>>().join("\n"));
    lab
}

/// A lab in which every copy fits, with so many remotes.
fn lab_of(n: u8) -> Lab {
    knowing(Lab::with(Options { out_mtu: 1700, ..Options::default() }), n)
}

/// Starts the session called `s` and its number, which sends to that remote.
#[track_caller]
fn up(lab: &Lab, n: u8, more: &[&str]) {
    up_in(lab, n, &["gre"], &remote(n).to_string(), more);
}

#[track_caller]
fn up_in(lab: &Lab, n: u8, tunnel: &[&str], remotes: &str, more: &[&str]) {
    let name = format!("s{n}");
    let args = [&["up", "eth0", "--name", &name, "--remote", remotes, "--tunnel"], tunnel, more].concat();
    lab.said(&args).ok();
}

#[track_caller]
fn down(lab: &Lab) {
    lab.said(&["down", "--all"]).quietly_ok();
}

/// The only session.
fn session(lab: &Lab) -> Value {
    lab.status()["sessions"][0].clone()
}

/// The session called `s` and its number.
#[track_caller]
fn session_of(lab: &Lab, n: u8) -> Value {
    let sessions = lab.said(&["status", "--json", "--name", &format!("s{n}")]).quietly_ok().json();
    sessions["sessions"][0].clone()
}

fn rows<'a>(session: &'a Value, list: &str) -> &'a [Value] {
    session[list].as_array().expect("a list")
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no counter"))
}

fn total(session: &Value, list: &str, counter: &str) -> u64 {
    rows(session, list).iter().map(|row| number(&row["stat"][counter])).sum()
}

fn drop_of(session: &Value, reason: &str) -> u64 {
    number(&session["drops"][reason])
}

/// What a tap, or what was removed of a session's taps, has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally {
    seen: u64,
    filtered: u64,
    skipped: u64,
    /// Frames that were to be copied, for each remote that gets them.
    asked: u64,
    dropped: u64,
}

impl Tally {
    fn of(row: &Value) -> Tally {
        let [seen, filtered, skipped] = ["seen", "filtered", "skipped"].map(|name| number(&row[name]));
        Tally { seen, filtered, skipped, asked: number(&row["stat"]["pcnt"]), dropped: number(&row["stat"]["dcnt"]) }
    }

    fn copied(&self) -> u64 {
        self.asked - self.dropped
    }
}

/// The tally of one tap.
#[track_caller]
fn tally(session: &Value, interface: &str, direction: &str) -> Tally {
    let found = rows(session, "taps").iter().find(|row| row["interface"] == interface && row["direction"] == direction);
    Tally::of(found.unwrap_or_else(|| panic!("{interface} {direction} in {session:#}")))
}

/// Panics unless every frame that the taps have seen is accounted for, once for each remote that gets it, and what the
/// taps say is what the remotes and the drops by reason say.
#[track_caller]
fn assert_accounted(session: &Value) {
    let mut taps: Vec<Tally> = rows(session, "taps").iter().map(Tally::of).collect();
    taps.push(Tally::of(&session["removed_taps"]));
    let each = if session["spread"] == "flow" { 1 } else { rows(session, "remotes").len() as u64 };
    for tap in &taps {
        assert_eq!(each * (tap.seen - tap.filtered - tap.skipped), tap.copied() + tap.dropped, "{session:#}");
    }
    let sum = |of: fn(&Tally) -> u64| taps.iter().map(of).sum::<u64>();
    let lost = drops(session);
    let sent = total(session, "remotes", "pcnt") + number(&session["removed"]["pcnt"]);
    assert_eq!(sum(|tap| tap.asked), sent + lost, "{session:#}");
    assert_eq!(sum(Tally::copied), sent, "{session:#}");
    assert_eq!((sum(|tap| tap.dropped), total(session, "remotes", "dcnt")), (lost, lost), "{session:#}");
}

fn collector(lab: &Lab) -> Capture {
    lab.capture_wire(Ns::Collector, "col0", Direction::In)
}

/// Copies that all sessions together have sent.
fn sent(lab: &Lab) -> u64 {
    let status = lab.status();
    rows(&status, "sessions").iter().map(|session| total(session, "remotes", "pcnt")).sum()
}

/// Everything that reaches the collector while `traffic` runs, none of it in fragments.
#[track_caller]
fn captured<T>(lab: &Lab, traffic: impl FnOnce() -> T) -> (Vec<Vec<u8>>, T) {
    let (before, mut capture) = (sent(lab), collector(lab));
    let done = traffic();
    let all = poll(PATIENCE, || (capture.count() as u64 == sent(lab) - before).then_some(()));
    assert!(all.is_some(), "{} captured, {} sent", capture.count(), sent(lab) - before);
    capture.settle();
    (capture.stop(), done)
}

type ByRemote = BTreeMap<Ipv4Addr, Vec<Vec<u8>>>;

/// The inner frames that each remote got.
fn by_remote(copies: &[Copy]) -> ByRemote {
    let mut found = ByRemote::new();
    for copy in copies {
        found.entry(copy.outer_dst).or_default().push(copy.frame.clone());
    }
    found
}

/// Both ways over a watched link: who sends out of which interface, and the frames' addresses.
const WAYS: [(Ns, &str, Ends); 2] = [(Ns::Peer, "peer0", Ends::PEER_TO_HOST), (Ns::Host, "eth0", Ends::HOST_TO_PEER)];

/// The same frames over and over out of an interface, as a process of its own.
struct Stream {
    tcpreplay: Child,
}

impl Stream {
    /// `speed` is an option of tcpreplay.
    fn start(lab: &Lab, (ns, dev): (Ns, &str), frames: &[Vec<u8>], loops: u32, speed: &str) -> Stream {
        let file = lab.dir().join(format!("{dev}.stream.pcap"));
        pcap::write(&file, frames);
        let (file, loops) = (file.to_str().expect("a plain path"), format!("--loop={loops}"));
        // Others use the machine too, and a cap is only reached while nothing holds up the sender: it goes first, and
        // sleeps between packets (its own way is to ask for the time without end).
        let nice = ["nice", "-n", "-15"];
        let tcpreplay = ["tcpreplay", "--preload-pcap", "--timer=nano", &loops, speed, "--intf1", dev, file];
        let mut command = lab.command(ns, &[&nice[..], &tcpreplay].concat());
        Stream { tcpreplay: command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("start tcpreplay") }
    }

    /// Ends it wherever it is; panics if it has ended before.
    #[track_caller]
    fn stop(mut self) {
        assert_eq!(self.tcpreplay.try_wait().expect("wait for tcpreplay"), None, "the stream ended too soon");
        self.tcpreplay.kill().expect("stop tcpreplay");
        self.tcpreplay.wait().expect("wait for tcpreplay");
    }

    #[track_caller]
    fn end(mut self) {
        let status = poll(PATIENCE * 2, || self.tcpreplay.try_wait().expect("wait for tcpreplay"));
        assert!(status.is_some_and(|status| status.success()), "tcpreplay: {status:?}");
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Both fail, rightly, when it has already ended.
        let _ = self.tcpreplay.kill();
        let _ = self.tcpreplay.wait();
    }
}

// ---- sampling by packet ----

/// How far a sum of independent draws of this variance may be off its mean: further less than once in a million runs
/// (Bernstein's inequality; 5.4 standard deviations where there are many).
fn slack(variance: f64) -> f64 {
    let nats = 2e6f64.ln();
    nats / 3.0 + (nats * nats / 9.0 + 2.0 * nats * variance).sqrt()
}

/// Panics unless about one in `n` of so many was taken; all where `n` is 1.
#[track_caller]
fn assert_share(what: &str, taken: u64, of: u64, n: u32) {
    let (fair, share) = (of as f64 / f64::from(n), 1.0 / f64::from(n));
    let slack = if n == 1 { 0.0 } else { slack(fair * (1.0 - share)) };
    eprintln!("{what}: {taken} of {of}, fair is {fair:.1}, give or take {slack:.1}");
    assert!((taken as f64 - fair).abs() <= slack, "{what}: {taken} of {of} is not 1/{n}");
}

#[test]
fn of_n_packets_one_is_copied_and_the_others_are_counted_as_skipped() {
    let lab = lab_of(4);
    let host = (Ns::Host, "eth0");
    let frames = frames::series(&Ends::HOST_TO_PEER, 1000);
    let (few, many) = (20, 100);
    up(&lab, 0, &["--sample", "1/1000"]);
    Stream::start(&lab, host, &frames, many - few, "--topspeed").end();
    for (n, share) in [(1, "1/10"), (2, "1/2"), (3, "1/1")] {
        up(&lab, n, &["--sample", share]);
    }
    Stream::start(&lab, host, &frames, few, "--topspeed").end();
    for (n, one_of, loops) in [(0, 1000, many), (1, 10, few), (2, 2, few), (3, 1, few)] {
        let session = session_of(&lab, n);
        let tap = tally(&session, "eth0", "egress");
        assert_eq!((tap.seen, tap.filtered, tap.dropped), (1000 * u64::from(loops), 0, 0), "{session:#}");
        assert_eq!((number(&session["sample"]), number(&session["sample_flows"])), (one_of, 1));
        assert_share(&format!("1/{one_of}"), tap.asked, tap.seen, one_of as u32);
        assert_accounted(&session);
    }
}

/// Which of the frames sent are among the copies; panics unless each copy is one of them, once.
#[track_caller]
fn chosen(sent: &[Vec<u8>], copies: &[Vec<u8>]) -> Vec<bool> {
    let taken: HashSet<&Vec<u8>> = copies.iter().collect();
    let chosen: Vec<bool> = sent.iter().map(|frame| taken.contains(frame)).collect();
    let known: Vec<Vec<u8>> = sent.iter().zip(&chosen).filter(|(_, is)| **is).map(|(frame, _)| frame.clone()).collect();
    assert_same_frames(&known, copies);
    chosen
}

#[test]
fn packets_are_chosen_at_random_and_copied_exactly_in_both_directions() {
    const FRAMES: u32 = 2000;
    let lab = lab_of(2);
    up(&lab, 0, &["--sample", "1/2"]);
    up(&lab, 1, &["--sample", "1/2"]);
    for (at, (from, dev, ends)) in WAYS.iter().enumerate() {
        let sent: Vec<Vec<u8>> = (0..FRAMES).map(|n| frames::ipv4_udp(ends, n, 60)).collect();
        let before = [0, 1].map(|n| Tally::of(&session_of(&lab, n)["taps"][at]));
        let mut capture = collector(&lab);
        lab.send(*from, dev, &sent);
        let after = [0, 1].map(|n| Tally::of(&session_of(&lab, n)["taps"][at]));
        let asked = [0, 1].map(|n| (after[n].asked - before[n].asked) as usize);
        let got = by_remote(&decap_gre(&capture.take(asked[0] + asked[1])));
        let chosen = [0, 1].map(|n| chosen(&sent, &got[&remote(n)]));
        assert_eq!(asked, [0, 1].map(|n| chosen[n].iter().filter(|is| **is).count()));
        // Not every second one, and not the same in each session.
        let turns = chosen[0].windows(2).filter(|pair| pair[0] != pair[1]).count() as u64;
        assert_share("turns", turns, u64::from(FRAMES) - 1, 2);
        let alike = chosen[0].iter().zip(&chosen[1]).filter(|(one, other)| one == other).count() as u64;
        assert_share("alike", alike, FRAMES.into(), 2);
    }
}

// ---- sampling by flow ----

/// Who talks to whom, through so many VLAN tags.
#[derive(Clone, Copy, Debug)]
struct Talk {
    ends: Ends,
    family: Family,
    protocol: u8,
    ports: (u16, u16),
    tags: usize,
}

impl Talk {
    fn reversed(&self) -> Talk {
        let e = self.ends;
        let ends =
            Ends { src_mac: e.dst_mac, dst_mac: e.src_mac, src4: e.dst4, dst4: e.src4, src6: e.dst6, dst6: e.src6 };
        Talk { ends, ports: (self.ports.1, self.ports.0), ..*self }
    }

    fn frame(&self, n: u32) -> Vec<u8> {
        let (ends, data) = (&self.ends, frames::payload(n, 20));
        let body = match self.protocol {
            frames::TCP => frames::tcp(ends, self.family, self.ports, n, 0x18, &data),
            frames::UDP => frames::udp(ends, self.family, self.ports, &data),
            _ => data,
        };
        let frame = match self.family {
            Family::V4 => {
                let packet = frames::ipv4(ends, self.protocol, frames::Ipv4::default(), &body);
                frames::ethernet(ends, frames::ETH_IPV4, &packet)
            }
            Family::V6 => frames::ethernet(ends, frames::ETH_IPV6, &frames::ipv6(ends, self.protocol, &body)),
        };
        (0..self.tags).fold(frame, |frame, _| frames::tagged(frames::ETH_8021Q, 42, &frame))
    }
}

/// A well-mixed number, the same each time.
fn mixed(n: u32) -> u64 {
    let mut x = u64::from(n).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 27)
}

fn ends_between(a: Ipv4Addr, b: Ipv4Addr) -> Ends {
    let v6 = |v4: Ipv4Addr| {
        Ipv6Addr::from(u128::from(Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 0)) + u128::from(u32::from(v4)))
    };
    Ends { src4: a, dst4: b, src6: v6(a), dst6: v6(b), ..Ends::PEER_TO_HOST }
}

fn host(net: [u8; 4], n: u32) -> Ipv4Addr {
    (u32::from(Ipv4Addr::from(net)) + n).into()
}

/// TCP and UDP over IPv4 and IPv6, tagged and not: eight kinds, all of different addresses and ports.
fn various(n: u32) -> Talk {
    let random = mixed(n);
    let address = |shift: u32| host([10, 0, 0, 0], 1 + (random >> shift) as u32 % 60_000);
    Talk {
        ends: ends_between(address(0), address(16)),
        family: if n & 1 == 0 { Family::V4 } else { Family::V6 },
        protocol: if n & 2 == 0 { frames::TCP } else { frames::UDP },
        ports: (1024 + (random >> 32) as u16 % 60_000, 1 + (random >> 48) as u16 % 60_000),
        tags: if n & 4 == 0 { 0 } else { 1 + (n as usize >> 3) % 2 },
    }
}

/// One client's connections to one server: only the client's port differs.
fn by_port(n: u32) -> Talk {
    let ends = ends_between(host([10, 0, 0, 0], 7), host([10, 0, 3, 0], 132));
    Talk { ends, family: Family::V4, protocol: frames::TCP, ports: (40_000 + n as u16, 443), tags: 0 }
}

/// Many clients of one server, each from the same port.
fn by_client(n: u32) -> Talk {
    let ends = ends_between(host([10, 1, 0, 0], n), host([10, 0, 3, 0], 132));
    Talk { ends, family: Family::V4, protocol: frames::UDP, ports: (53, 53), tags: 0 }
}

/// The same over IPv6.
fn by_client6(n: u32) -> Talk {
    Talk { family: Family::V6, ..by_client(n) }
}

/// Frames each way in a flow that tests send.
const EACH_WAY: u32 = 2;

/// A flow's frames, forth and back.
fn conversation(talk: &Talk, n: u32) -> [Vec<Vec<u8>>; 2] {
    let (first, reversed) = (n * 2 * EACH_WAY, talk.reversed());
    let forth = (first..first + EACH_WAY).map(|n| talk.frame(n)).collect();
    [forth, (first + EACH_WAY..first + 2 * EACH_WAY).map(|n| reversed.frame(n)).collect()]
}

/// Sends all forward frames at the peer and all answers at the host.
fn send_both_ways(lab: &Lab, flows: &[[Vec<Vec<u8>>; 2]]) {
    for (way, (ns, dev, _)) in WAYS.iter().enumerate() {
        let frames: Vec<Vec<u8>> = flows.iter().flat_map(|flow| flow[way].clone()).collect();
        lab.send(*ns, dev, &frames);
    }
}

/// Which groups of frames were copied; panics unless of each group every frame came once, or none.
#[track_caller]
fn whole_or_nothing(groups: &[Vec<Vec<u8>>], copies: &[Vec<u8>]) -> Vec<bool> {
    let frames = groups.concat();
    let chosen = chosen(&frames, copies);
    let mut rest = &chosen[..];
    let verdict = |(n, group): (usize, &Vec<Vec<u8>>)| {
        let (own, others) = rest.split_at(group.len());
        rest = others;
        assert!(own.iter().all(|is| *is == own[0]), "group {n} is torn apart: {own:?}");
        own[0]
    };
    groups.iter().enumerate().map(verdict).collect()
}

/// One group of frames per flow.
fn grouped(flows: &[[Vec<Vec<u8>>; 2]]) -> Vec<Vec<Vec<u8>>> {
    flows.iter().map(|flow| flow.concat()).collect()
}

#[test]
fn flows_of_every_kind_are_copied_whole_in_both_directions_or_not_at_all() {
    const FLOWS: u32 = 2000;
    let lab = lab_of(3);
    let shares = [2, 10, 100];
    for (n, one_of) in (0..).zip(shares) {
        up(&lab, n, &["--sample-flows", &format!("1/{one_of}")]);
    }
    let flows: Vec<_> = (0..FLOWS).map(|n| conversation(&various(n), n)).collect();
    let got = by_remote(&decap_gre(&captured(&lab, || send_both_ways(&lab, &flows)).0));
    for (n, one_of) in (0..).zip(shares) {
        let chosen = whole_or_nothing(&grouped(&flows), &got[&remote(n)]);
        let count = |of: &dyn Fn(usize) -> bool| (0..chosen.len()).filter(|at| of(*at)).count() as u64;
        assert_share("flows", count(&|at| chosen[at]), FLOWS.into(), one_of);
        for kind in 0..8 {
            assert_share(&format!("kind {kind}"), count(&|at| at % 8 == kind && chosen[at]), 250, one_of);
        }
        let session = session_of(&lab, n);
        let skipped = count(&|at| !chosen[at]) * u64::from(EACH_WAY);
        for direction in ["ingress", "egress"] {
            let tap = tally(&session, "eth0", direction);
            assert_eq!((tap.seen, tap.skipped), (u64::from(FLOWS * EACH_WAY), skipped), "{session:#}");
        }
        assert_accounted(&session);
    }
}

#[test]
fn one_in_one_flows_is_every_flow() {
    let lab = lab_of(1);
    up(&lab, 0, &["--sample-flows", "1/1"]);
    let flows: Vec<_> = (0..100).map(|n| conversation(&various(n), n)).collect();
    let mut capture = collector(&lab);
    send_both_ways(&lab, &flows);
    let copies = inner_frames(&decap_gre(&capture.take(200 * EACH_WAY as usize)));
    assert!(whole_or_nothing(&grouped(&flows), &copies).iter().all(|is| *is));
    assert_accounted(&session(&lab));
}

/// Sends one frame of each flow at the peer and panics unless the sessions, which take one flow in these numbers, have
/// taken that share.
#[track_caller]
fn assert_flows_shared(lab: &Lab, shares: &[u32], what: &str, talks: &[Talk]) {
    let asked = |n: usize| tally(&session_of(lab, n as u8), "eth0", "ingress").asked;
    let before: Vec<u64> = (0..shares.len()).map(asked).collect();
    let sent: Vec<Vec<u8>> = talks.iter().zip(0..).map(|(talk, n)| talk.frame(n)).collect();
    lab.send(Ns::Peer, "peer0", &sent);
    for (n, one_of) in shares.iter().enumerate() {
        assert_share(&format!("{what}, 1/{one_of}"), asked(n) - before[n], talks.len() as u64, *one_of);
    }
}

#[test]
fn flows_that_differ_in_one_number_only_are_sampled_fairly_too() {
    let lab = lab_of(2);
    let shares = [2, 10];
    up(&lab, 0, &["--sample-flows", "1/2"]);
    up(&lab, 1, &["--sample-flows", "1/10"]);
    let series = |talk: fn(u32) -> Talk| (0..2000).map(talk).collect::<Vec<_>>();
    assert_flows_shared(&lab, &shares, "by port", &series(by_port));
    assert_flows_shared(&lab, &shares, "by client", &series(by_client));
    assert_flows_shared(&lab, &shares, "by IPv6 client", &series(by_client6));
}

const ESP: u8 = 50;

/// The hosts of a /24 and one server, talking in a protocol without ports.
fn neighbours(protocol: u8, net: [u8; 4], server: [u8; 4]) -> Vec<Talk> {
    let ends = |n| ends_between(host(net, n), server.into());
    (0..256).map(|n| Talk { ends: ends(n), family: Family::V4, protocol, ports: (0, 0), tags: 0 }).collect()
}

#[test]
fn flows_without_ports_are_sampled_fairly_too() {
    let lab = lab_of(2);
    let shares = [2, 3];
    up(&lab, 0, &["--sample-flows", "1/2"]);
    up(&lab, 1, &["--sample-flows", "1/3"]);
    for (protocol, net, server) in [
        (frames::ICMP, [10, 7, 0, 0], [10, 4, 0, 0]),
        (frames::ICMP, [172, 16, 5, 0], [10, 0, 0, 1]),
        (ESP, [10, 7, 0, 0], [10, 4, 0, 1]),
        (ESP, [192, 168, 1, 0], [192, 168, 0, 1]),
    ] {
        let what = format!("protocol {protocol}, {net:?} and {server:?}");
        assert_flows_shared(&lab, &shares, &what, &neighbours(protocol, net, server));
    }
}

/// One UDP datagram in IPv6 fragments.
fn ipv6_fragments(ends: &Ends, n: u32) -> Vec<Vec<u8>> {
    let datagram = frames::udp(ends, Family::V6, (4000, n as u16), &frames::payload(n, 3000));
    let last = (datagram.len() - 1) / 1200;
    let fragment = |(i, piece): (usize, &[u8])| {
        let place = (i * 1200) as u16 | u16::from(i != last);
        let header = [&[frames::UDP, 0], &place.to_be_bytes()[..], &n.to_be_bytes()].concat();
        frames::ethernet(ends, frames::ETH_IPV6, &frames::ipv6(ends, frames::FRAGMENT, &[&header, piece].concat()))
    };
    datagram.chunks(1200).enumerate().map(fragment).collect()
}

#[test]
fn fragments_of_one_datagram_are_copied_together() {
    const EACH: u32 = 150;
    let lab = lab_of(1);
    up(&lab, 0, &["--sample-flows", "1/2"]);
    let ends = |n: u32| ends_between(host([10, 0, 0, 0], 1 + 251 * n), host([10, 3, 0, 0], 2000 + 3 * n));
    let tag = |group: &Vec<Vec<u8>>| group.iter().map(|f| frames::tagged(frames::ETH_8021Q, 42, f)).collect();
    let mut groups: Vec<Vec<Vec<u8>>> = Vec::new();
    for n in 0..EACH {
        groups.push(frames::ipv4_fragments(&ends(n), n, 3000, 1200));
        groups.push(ipv6_fragments(&ends(n + 1000), n + 1000));
        groups.push(tag(&frames::ipv4_fragments(&ends(n + 2000), n + 2000, 3000, 1200)));
        groups.push(tag(&ipv6_fragments(&ends(n + 3000), n + 3000)));
    }
    assert!(groups.iter().all(|group| group.len() == 3));
    let (packets, ()) = captured(&lab, || lab.send(Ns::Peer, "peer0", &groups.concat()));
    let copies = inner_frames(&decap_gre(&packets));
    let chosen = whole_or_nothing(&groups, &copies);
    for kind in 0..4 {
        let taken = chosen.iter().skip(kind).step_by(4).filter(|is| **is).count();
        assert_share(&format!("datagrams of kind {kind}"), taken as u64, EACH.into(), 2);
    }
}

#[test]
fn sampled_flows_are_spread_over_the_remotes_as_evenly_as_all_are() {
    const FLOWS: u32 = 3000;
    let lab = lab_of(15);
    let shares = [1, 2, 16];
    for (n, one_of) in (0..).zip(shares) {
        let remotes: Vec<String> = (0..5).map(|at| remote(5 * n + at).to_string()).collect();
        let options = ["--spread", "flow", "--sample-flows", &format!("1/{one_of}")];
        up_in(&lab, n, &["gre"], &remotes.join(","), &options);
    }
    let sent: Vec<Vec<u8>> = (0..FLOWS).map(|n| various(n).frame(n)).collect();
    lab.send(Ns::Peer, "peer0", &sent);
    for (n, one_of) in (0..).zip(shares) {
        let session = session_of(&lab, n);
        let asked = tally(&session, "eth0", "ingress").asked;
        assert_share("sampled", asked, FLOWS.into(), one_of);
        for row in rows(&session, "remotes") {
            // The table itself gives each of five remotes its share within a tenth.
            let (got, fair) = (number(&row["stat"]["pcnt"]) as f64, asked as f64 / 5.0);
            let slack = fair / 10.0 + 4.0 * (fair * 0.8).sqrt();
            eprintln!("1/{one_of}, {}: {got} flows, fair is {fair}, give or take {slack:.1}", row["address"]);
            assert!((got - fair).abs() <= slack, "{session:#}");
        }
        assert_accounted(&session);
    }
}

#[test]
fn both_samplings_together_take_some_packets_of_some_flows() {
    const FLOWS: u32 = 500;
    let lab = lab_of(2);
    up(&lab, 0, &["--sample-flows", "1/2"]);
    up(&lab, 1, &["--sample-flows", "1/2", "--sample", "1/2"]);
    let flows: Vec<_> = (0..FLOWS).map(|n| conversation(&various(n), n)).collect();
    let got = by_remote(&decap_gre(&captured(&lab, || send_both_ways(&lab, &flows)).0));
    let of_flows: HashSet<&Vec<u8>> = got[&remote(0)].iter().collect();
    let of_both = &got[&remote(1)];
    chosen(&grouped(&flows).concat(), of_both);
    assert!(of_both.iter().all(|frame| of_flows.contains(frame)), "packets of flows that were not chosen");
    assert_share("packets of the chosen flows", of_both.len() as u64, of_flows.len() as u64, 2);
    let session = session_of(&lab, 1);
    let taps = ["ingress", "egress"].map(|direction| tally(&session, "eth0", direction));
    let all = u64::from(FLOWS * 2 * EACH_WAY);
    assert_eq!(taps[0].skipped + taps[1].skipped, all - of_both.len() as u64, "{session:#}");
    assert_accounted(&session);
}

/// The same hash names the remote.
#[test]
fn flows_without_ports_are_spread_evenly_too() {
    let lab = lab_of(4);
    let remotes = [0, 1, 2, 3].map(|n| remote(n).to_string()).join(",");
    up_in(&lab, 0, &["gre"], &remotes, &["--spread", "flow"]);
    let mut before = [0; 4];
    for server in [[10, 4, 0, 0], [10, 4, 0, 1], [8, 8, 8, 8]] {
        let talks = neighbours(ESP, [192, 168, 1, 0], server);
        lab.send(Ns::Peer, "peer0", &talks.iter().map(|talk| talk.frame(1)).collect::<Vec<_>>());
        let session = session(&lab);
        for (row, before) in rows(&session, "remotes").iter().zip(&mut before) {
            let now = number(&row["stat"]["pcnt"]);
            assert_share(&format!("{server:?} at {}", row["address"]), now - *before, 256, 4);
            *before = now;
        }
    }
}

// ---- the snap length ----

/// Every kind of frame, plain and with a VLAN tag around it.
fn every_kind(ends: &Ends) -> Vec<Vec<u8>> {
    let plain = frames::corpus_frames(ends);
    // The kernel takes tagged frames of 20 to 1518 bytes only.
    let taggable = plain.iter().filter(|frame| (16..=1514).contains(&frame.len()));
    let tagged: Vec<Vec<u8>> = taggable.map(|frame| frames::tagged(frames::ETH_8021Q, 0xa000 | 42, frame)).collect();
    [plain, tagged].concat()
}

/// What a copy must be: the frame's first bytes, and whether the tunnel header says that it was cut.
type Cut = (Vec<u8>, bool);

fn cut_to(snaplen: usize, frame: &[u8]) -> Cut {
    (frame[..frame.len().min(snaplen)].to_vec(), frame.len() > snaplen)
}

/// Panics unless the copies are these, and where the header has a truncation bit, it says so.
#[track_caller]
fn assert_cut(expected: &[Cut], copies: &[Tunnelled]) {
    let flagged = |frame: &[u8], cut: bool| [frame, &[u8::from(cut)]].concat();
    let told = copies.iter().any(|copy| copy.header.erspan.is_some());
    let expected: Vec<Vec<u8>> = expected.iter().map(|(frame, cut)| flagged(frame, *cut && told)).collect();
    let says = |copy: &Tunnelled| copy.header.erspan.is_some_and(|erspan| erspan.truncated);
    let got: Vec<Vec<u8>> = copies.iter().map(|copy| flagged(&copy.frame, says(copy))).collect();
    assert_same_frames(&expected, &got);
}

/// A tunnel as `--tunnel` takes it, and what its copies are.
type Tunnel = (&'static [&'static str], Kind);

const GRE: Tunnel = (&["gre"], Kind::Gre);
const GRE_SEQUENCE: Tunnel = (&["gre", "--sequence"], Kind::Gre);
const VXLAN: Tunnel = (&["vxlan"], Kind::Vxlan(4789));
const GENEVE_SUM: Tunnel = (&["geneve", "--udp-checksum"], Kind::Geneve(6081));
const ERSPAN1: Tunnel = (&["erspan1"], Kind::Erspan1);
const ERSPAN2: Tunnel = (&["erspan2"], Kind::Erspan2);
const ERSPAN3: Tunnel = (&["erspan3"], Kind::Erspan3);

/// The session's two remotes: one of each family.
fn both_families(n: u8) -> [IpAddr; 2] {
    [remote(n).into(), remote6(n).into()]
}

#[track_caller]
fn up_both(lab: &Lab, n: u8, tunnel: Tunnel, more: &[&str]) {
    up_in(lab, n, tunnel.0, &both_families(n).map(|remote| remote.to_string()).join(","), more);
}

/// Sends frames both ways and panics unless the sessions, numbered as they are listed, have cut each to their snap length.
#[track_caller]
fn assert_all_cut(lab: &Lab, kind: Kind, snaplens: &[usize], every_kind: fn(&Ends) -> Vec<Vec<u8>>) {
    for (from, dev, ends) in WAYS {
        let sent = every_kind(&ends);
        let (packets, ()) = captured(lab, || lab.send(from, dev, &sent));
        for (n, snaplen) in (0..).zip(snaplens) {
            let expected: Vec<Cut> = sent.iter().map(|frame| cut_to(*snaplen, frame)).collect();
            for address in both_families(n) {
                assert_cut(&expected, &decap(kind, &packets_to(&packets, address)));
            }
        }
    }
}

fn frames_of_every_kind_are_cut_in(tunnel: Tunnel, snaplens: &[usize]) {
    let lab = lab_of(snaplens.len() as u8);
    for (n, snaplen) in (0..).zip(snaplens) {
        up_both(&lab, n, tunnel, &["--snaplen", &snaplen.to_string()]);
    }
    assert_all_cut(&lab, tunnel.1, snaplens, every_kind);
    for (n, snaplen) in (0..).zip(snaplens) {
        let session = session_of(&lab, n);
        assert_eq!((number(&session["snaplen"]), drops(&session)), (*snaplen as u64, 0), "{session:#}");
        let sent: Vec<Vec<u8>> = WAYS.iter().flat_map(|(_, _, ends)| every_kind(ends)).collect();
        let cut: usize = sent.iter().map(|frame| frame.len().min(*snaplen)).sum();
        for row in rows(&session, "remotes") {
            assert_eq!(number(&row["stat"]["bcnt"]), cut as u64, "{session:#}");
        }
        // What was to be copied is counted as it was: whole frames, for each of two remotes.
        let whole: usize = sent.iter().map(Vec::len).sum();
        assert_eq!(total(&session, "taps", "bcnt"), 2 * whole as u64, "{session:#}");
    }
}

#[test]
fn frames_of_every_kind_are_cut_to_any_length_in_gre() {
    frames_of_every_kind_are_cut_in(GRE, &[60, 61, 64, 128, 1000, 1514]);
}

#[test]
fn frames_of_every_kind_are_cut_in_vxlan() {
    frames_of_every_kind_are_cut_in(VXLAN, &[60, 128]);
}

#[test]
fn frames_of_every_kind_are_cut_in_geneve_and_checksums_fit_the_cut_frames() {
    frames_of_every_kind_are_cut_in(GENEVE_SUM, &[61, 1000]);
}

#[test]
fn frames_of_every_kind_are_cut_in_gre_with_sequence_numbers_and_erspan1() {
    frames_of_every_kind_are_cut_in(GRE_SEQUENCE, &[64]);
    frames_of_every_kind_are_cut_in(ERSPAN1, &[60]);
}

#[test]
fn frames_of_every_kind_are_cut_in_erspan2_which_says_so() {
    frames_of_every_kind_are_cut_in(ERSPAN2, &[60, 64, 1514]);
}

#[test]
fn frames_of_every_kind_are_cut_in_erspan3_which_says_so() {
    frames_of_every_kind_are_cut_in(ERSPAN3, &[60, 128, 1000]);
}

/// Headers that reach behind the snap length, where the kernel's helper refuses to cut.
fn long_headers_behind_tags(ends: &Ends) -> Vec<Vec<u8>> {
    let long = [frames::ipv4_max_options(ends, 1), frames::ipv6_extensions(ends, 2), frames::gre(ends, 3)];
    let more = [frames::vxlan(ends, 4), frames::ipv6_udp(ends, 5, 200), frames::mpls(ends, 6), frames::snap(ends, 7)];
    let all = [&long[..], &more].concat();
    let once = all.iter().map(|frame| frames::tagged(frames::ETH_8021Q, 42, frame));
    let twice = once.map(|frame| frames::tagged(frames::ETH_8021AD, 100, &frame));
    let four = |frame: &Vec<u8>| (0..4).fold(frame.clone(), |f, n| frames::tagged(frames::ETH_8021Q, 7 + n, &f));
    twice.chain(all.iter().map(four)).collect()
}

#[test]
fn long_headers_behind_several_tags_are_cut_like_any_other() {
    let lab = lab_of(2);
    up_both(&lab, 0, GRE, &["--snaplen", "60"]);
    up_both(&lab, 1, GRE, &["--snaplen", "64"]);
    assert_all_cut(&lab, Kind::Gre, &[60, 64], long_headers_behind_tags);
}

/// UDP_SEGMENT (setsockopt 17, 103): one write leaves as datagrams of `size` bytes.
fn send_udp_super_packet(lab: &Lab, bytes: usize, size: usize) {
    let data = lab.dir().join("datagrams");
    std::fs::write(&data, frames::payload(1, bytes)).expect("write what will be sent");
    let (open, block) = (format!("OPEN:{},rdonly", data.display()), bytes.to_string());
    let target = format!("UDP4-SENDTO:192.0.2.2:9,setsockopt-int=17:103:{size}");
    lab.host(&["socat", "-b", &block, "-u", &open, &target]);
}

const SUPER_SNAPLENS: [(Tunnel, usize); 6] =
    [(GRE, 60), (VXLAN, 128), (GENEVE_SUM, 200), (ERSPAN2, 1000), (GRE, 1513), (GRE, 1514)];

/// Sessions that cut, beside the last one, which copies every wire frame whole.
fn lab_that_cuts_super_packets(options: Options) -> Lab {
    let lab = knowing(Lab::with(options), 7);
    for (n, (tunnel, snaplen)) in (0..).zip(SUPER_SNAPLENS) {
        up_in(&lab, n, tunnel.0, &remote(n).to_string(), &["--snaplen", &snaplen.to_string()]);
    }
    up(&lab, 6, &["--oversize", "fragment"]);
    lab
}

/// Panics unless each session's copies are these wire frames, cut.
#[track_caller]
fn assert_wire_frames_cut(packets: &[Vec<u8>], wire: &[Vec<u8>]) {
    for (n, (tunnel, snaplen)) in (0..).zip(SUPER_SNAPLENS) {
        let expected: Vec<Cut> = wire.iter().map(|frame| cut_to(snaplen, frame)).collect();
        assert_cut(&expected, &decap(tunnel.1, &packets_to(packets, remote(n).into())));
    }
}

#[test]
fn super_packets_are_cut_wire_frame_by_wire_frame() {
    let lab = lab_that_cuts_super_packets(Options { out_mtu: 1700, ..Options::default() });
    for (from, to, v6) in [(Ns::Host, Ns::Peer, false), (Ns::Peer, Ns::Host, false), (Ns::Host, Ns::Peer, true)] {
        let transfer = || if v6 { lab.tcp_transfer6(200_000, from, to) } else { lab.tcp_transfer(200_000, from, to) };
        let (packets, transfer) = captured(&lab, transfer);
        let wire = inner(&decap(Kind::Gre, &packets_to(&packets, remote(6).into())));
        assert!(tcp_stream(&wire, Port::Dst(transfer.port)) == transfer.data, "the copied stream differs");
        wire.iter().for_each(|frame| verify_checksums(frame));
        assert!(wire.iter().filter(|frame| frame.len() == 1514).count() > 100, "the stream has full frames");
        assert_wire_frames_cut(&packets, &wire);
    }
    let (packets, ()) = captured(&lab, || send_udp_super_packet(&lab, 20_000, 1000));
    let wire = inner(&decap(Kind::Gre, &packets_to(&packets, remote(6).into())));
    // The peer's answer, which quotes the first, is there as well.
    assert_eq!(wire.iter().filter(|frame| frame.len() == 1042).count(), 20);
    assert_wire_frames_cut(&packets, &wire);
    (0..7).for_each(|n| assert_accounted(&session_of(&lab, n)));
}

/// Without offloads the stack makes wire frames behind the tap, so the receiver has what the copies must begin like.
#[test]
fn super_packets_are_cut_as_the_receiver_gets_them() {
    let options = Options { out_mtu: 1700, watched_offloads_off: true, ..Options::default() };
    let lab = lab_that_cuts_super_packets(options);
    let mut receiver = lab.capture_wire(Ns::Peer, "peer0", Direction::Both);
    let (packets, _) = captured(&lab, || lab.tcp_transfer(200_000, Ns::Host, Ns::Peer));
    receiver.settle();
    let wire = receiver.stop();
    assert!(wire.iter().filter(|frame| frame.len() == 1514).count() > 100, "the stream has full frames");
    assert_wire_frames_cut(&packets, &wire);
}

/// A VXLAN tunnel of the kernel over the watched link: super-packets stay whole in it, and the kernel calls them
/// encapsulated.
fn add_vxlan(lab: &Lab) {
    for (ns, dev, local, remote, address) in
        [(Ns::Host, "eth0", HOST_IP, PEER_IP, "203.0.113.1"), (Ns::Peer, "peer0", PEER_IP, HOST_IP, "203.0.113.2")]
    {
        let add = format!("link add vx0 mtu 1500 type vxlan id 5 local {local} remote {remote} dstport 4789 dev {dev}");
        lab.ip_batch(
            ns,
            &format!("{add}\nlink set vx0 addrgenmode none\naddress add {address}/24 dev vx0\nlink set vx0 up"),
        );
    }
}

/// Moves bytes from host to peer through that tunnel.
fn transfer_inside_vxlan(lab: &Lab, data: &[u8]) {
    let (source, sink) = (lab.dir().join("inside"), lab.dir().join("inside.received"));
    std::fs::write(&source, data).expect("write what will be sent");
    let open = [format!("OPEN:{},creat,trunc", sink.display()), format!("OPEN:{},rdonly", source.display())];
    let mut listener = lab.command(Ns::Peer, &["socat", "-u", "TCP4-LISTEN:7777,bind=203.0.113.2", &open[0]]);
    let mut listener = listener.spawn().expect("start socat");
    let listens = || String::from_utf8_lossy(&lab.peer(&["ss", "-Hltn"]).stdout).contains(":7777").then_some(());
    poll(PATIENCE, listens).expect("the listener is up");
    lab.host(&["socat", "-b", "65536", "-u", &open[1], "TCP4:203.0.113.2:7777"]);
    assert!(listener.wait().expect("wait for socat").success());
    assert!(std::fs::read(&sink).expect("read the bytes received") == data, "the watched stream differs");
}

#[test]
fn super_packets_inside_another_tunnel_are_cut_wire_frame_by_wire_frame() {
    let options = Options { watched_mtu: 1600, out_mtu: 1800, ..Options::default() };
    let lab = lab_that_cuts_super_packets(options);
    add_vxlan(&lab);
    let (packets, ()) = captured(&lab, || transfer_inside_vxlan(&lab, &frames::payload(7, 200_000)));
    let wire = inner(&decap(Kind::Gre, &packets_to(&packets, remote(6).into())));
    assert!(wire.iter().filter(|frame| frame.len() == 1564).count() > 50, "the stream has full frames");
    assert_wire_frames_cut(&packets, &wire);
    (0..7).for_each(|n| assert_accounted(&session_of(&lab, n)));
}

/// Long enough for three fragments, and shorter than the longest frames sent.
const LONG_SNAPLEN: usize = 3000;

/// Frames around the MTU's and the snap length's edges, plain, tagged, and not IP.
fn jumbo_frames(ends: &Ends) -> Vec<Vec<u8>> {
    let sizes =
        [60, 1400, 1432, 1433, 1444, 1445, 1452, 1453, 1464, 1465, 1476, 1477, 2000, 2999, 3000, 3001, 4000, 9014];
    let plain: Vec<Vec<u8>> = (0..).zip(sizes).map(|(n, size)| frames::jumbo(ends, n, size)).collect();
    let tagged = plain.iter().map(|frame| frames::tagged(frames::ETH_8021Q, 42, &frame[..frame.len().min(9014)]));
    let raw = [(100, 3000), (101, 3001), (102, 8000)].map(|(n, size)| frames::raw(ends, n, size));
    tagged.chain(plain.clone()).chain(raw).collect()
}

/// What becomes of a frame in a session of this mode where the copy's headers take `overhead` bytes of the MTU; nothing
/// where it is dropped.
fn fate(mode: &str, overhead: usize, frame: &[u8]) -> Option<Cut> {
    let fit = 1500 - overhead;
    let cut = cut_to(LONG_SNAPLEN, frame);
    match mode {
        "truncate" => Some(cut_to(fit.min(LONG_SNAPLEN), frame)),
        "drop" => (cut.0.len() <= fit).then_some(cut),
        _ => Some(cut),
    }
}

fn cut_frames_that_still_do_not_fit_meet_their_fate_in(tunnel: Tunnel, overhead: usize) {
    const MODES: [&str; 4] = ["segment", "fragment", "truncate", "drop"];
    let options = Options { watched_mtu: 9000, watched_offloads_off: true, ..Options::default() };
    let lab = knowing(Lab::with(options), 5);
    for (n, mode) in (0..).zip(MODES) {
        up_both(&lab, n, tunnel, &["--snaplen", &LONG_SNAPLEN.to_string(), "--oversize", mode]);
    }
    // What fits when it is cut never meets the mode.
    up_both(&lab, 4, tunnel, &["--snaplen", "1000", "--oversize", "drop"]);
    let mut dropped = 0;
    for (from, dev, ends) in WAYS {
        let sent = jumbo_frames(&ends);
        let mut capture = collector(&lab);
        lab.send(from, dev, &sent);
        capture.settle();
        let packets = capture.stop();
        let copies = |n: u8, v6: usize| decap(tunnel.1, &packets_to(&packets, both_families(n)[v6]));
        for (n, mode) in (0..).zip(MODES) {
            for v6 in [0, 1] {
                let fates = sent.iter().map(|frame| fate(mode, overhead + 20 * v6, frame));
                let expected: Vec<Cut> = fates.flatten().collect();
                dropped += sent.len() - expected.len();
                assert_cut(&expected, &copies(n, v6));
                assert!(copies(n, v6).iter().flat_map(|copy| &copy.outer.lens).all(|len| *len <= 1500), "{mode}");
            }
        }
        let expected: Vec<Cut> = sent.iter().map(|frame| cut_to(1000, frame)).collect();
        assert_cut(&expected, &copies(4, 0));
        assert_cut(&expected, &copies(4, 1));
    }
    let lost: Vec<u64> = (0..5).map(|n| drop_of(&session_of(&lab, n), "oversize")).collect();
    assert_eq!(lost, [0, 0, 0, dropped as u64, 0]);
    assert_eq!((0..5).map(|n| drops(&session_of(&lab, n))).sum::<u64>(), dropped as u64);
}

#[test]
fn cut_frames_that_still_do_not_fit_meet_the_fate_that_was_asked_for() {
    cut_frames_that_still_do_not_fit_meet_their_fate_in(GRE, 24);
}

#[test]
fn cut_frames_that_still_do_not_fit_have_right_udp_checksums() {
    cut_frames_that_still_do_not_fit_meet_their_fate_in(GENEVE_SUM, 36);
}

#[test]
fn cut_frames_that_still_do_not_fit_are_called_cut_by_erspan2() {
    cut_frames_that_still_do_not_fit_meet_their_fate_in(ERSPAN2, 36);
}

#[test]
fn cut_frames_that_still_do_not_fit_are_called_cut_by_erspan3() {
    cut_frames_that_still_do_not_fit_meet_their_fate_in(ERSPAN3, 48);
}

/// Where whole super-packets would be cut smaller to fit, cut ones keep to the wire's boundaries.
#[test]
fn super_packets_that_are_cut_keep_the_wires_boundaries_where_the_path_is_narrow() {
    let lab = lab_that_cuts_super_packets(Options::default());
    let mut capture = collector(&lab);
    let transfer = lab.tcp_transfer(200_000, Ns::Host, Ns::Peer);
    capture.settle();
    let packets = capture.stop();
    let wire = inner(&decap(Kind::Gre, &packets_to(&packets, remote(6).into())));
    assert!(tcp_stream(&wire, Port::Dst(transfer.port)) == transfer.data, "the copied stream differs");
    for (n, (tunnel, snaplen)) in (0..4).zip(SUPER_SNAPLENS) {
        let expected: Vec<Cut> = wire.iter().map(|frame| cut_to(snaplen, frame)).collect();
        assert_cut(&expected, &decap(tunnel.1, &packets_to(&packets, remote(n).into())));
    }
}

// ---- the rate cap ----

/// A captured outer packet: when it came, in seconds, and how long it was with its Ethernet header.
type Arrival = (f64, usize);

/// What came for each remote, in order.
fn arrivals(capture: &Capture) -> BTreeMap<IpAddr, Vec<Arrival>> {
    let file = std::fs::read(capture.pcap()).expect("read the capture");
    let (mut rest, mut found) = (&file[24..], BTreeMap::<IpAddr, Vec<Arrival>>::new());
    while let Some((header, body)) = rest.split_at_checked(16) {
        let word = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|i| header[at + i]));
        let (time, len) = (f64::from(word(0)) + f64::from(word(4)) / 1e6, word(8) as usize);
        let to = match body[12..14] {
            [8, 0] => IpAddr::from(<[u8; 4]>::try_from(&body[30..34]).expect("four bytes")),
            _ => IpAddr::from(<[u8; 16]>::try_from(&body[38..54]).expect("sixteen bytes")),
        };
        found.entry(to).or_default().push((time, word(12) as usize));
        rest = &body[len..];
    }
    found
}

/// A cap as the user says it, and what it allows in a second.
#[derive(Clone, Copy, Debug)]
enum Cap {
    Bytes(&'static str, f64),
    Packets(&'static str, f64),
}

impl Cap {
    fn said(&self) -> &'static str {
        match self {
            Cap::Bytes(said, _) | Cap::Packets(said, _) => said,
        }
    }

    fn rate(&self) -> f64 {
        match self {
            Cap::Bytes(_, rate) | Cap::Packets(_, rate) => *rate,
        }
    }

    fn cost(&self, arrival: &Arrival) -> f64 {
        self.of((arrival.1 as f64, 1.0))
    }

    /// Of bytes and packets what this cap is about.
    fn of(&self, (bytes, packets): (f64, f64)) -> f64 {
        if matches!(self, Cap::Bytes(..)) { bytes } else { packets }
    }
}

/// What each second that begins with an arrival has cost, the least and the most.
fn seconds(cap: Cap, arrivals: &[Arrival]) -> (f64, f64) {
    let (mut end, mut cost, mut range) = (0, 0.0, (f64::MAX, 0f64));
    for first in arrivals.iter().take_while(|first| first.0 + 1.0 <= arrivals[arrivals.len() - 1].0) {
        while arrivals[end].0 < first.0 + 1.0 {
            cost += cap.cost(&arrivals[end]);
            end += 1;
        }
        range = (range.0.min(cost), range.1.max(cost));
        cost -= cap.cost(first);
    }
    range
}

/// What is wrong with how a session under this cap has sent while it had more to send all the time: each second must be
/// within five per cent of the cap, give or take the largest copy, and the whole as well, with the 20 ms at the start.
fn amiss(cap: Cap, largest: f64, arrivals: &[Arrival]) -> Option<String> {
    let (rate, elapsed) = (cap.rate(), arrivals.last()?.0 - arrivals.first()?.0);
    let total: f64 = arrivals.iter().map(|arrival| cap.cost(arrival)).sum();
    let (least, most) = seconds(cap, arrivals);
    let share = total / rate / elapsed;
    let found = format!("{}: {total} in {elapsed:.3} s ({share:.3}), {least} to {most} in a second", cap.said());
    eprintln!("{found}");
    let whole = 0.95 * rate * elapsed..=1.05 * rate * elapsed + 0.02 * rate + largest;
    let right = whole.contains(&total) && least >= 0.95 * rate - largest && most <= 1.05 * rate + largest;
    (elapsed < 1.9 || !right).then_some(found)
}

/// Sends `flood` until one try has gone well: a busy machine can hold up the sender for longer than the bucket lasts.
/// `largest` is what one packet of the flood makes at most, in bytes and packets. Returns how many packets have come for
/// each remote in all tries.
#[track_caller]
fn assert_capped(
    lab: &Lab,
    caps: &[(Cap, Vec<IpAddr>)],
    largest: (f64, f64),
    flood: impl Fn(&Lab),
) -> BTreeMap<IpAddr, u64> {
    let mut wrong = Vec::new();
    let mut came = BTreeMap::new();
    for _ in 0..3 {
        let mut capture = collector(lab);
        flood(lab);
        capture.settle();
        capture.stop();
        let got = arrivals(&capture);
        got.iter().for_each(|(to, all)| *came.entry(*to).or_default() += all.len() as u64);
        let judge = |(cap, remotes): &(Cap, Vec<IpAddr>)| {
            let mut all: Vec<Arrival> = remotes.iter().filter_map(|to| got.get(to)).flatten().copied().collect();
            all.sort_by(|a, b| a.0.total_cmp(&b.0));
            if all.is_empty() { Some(format!("{cap:?}: nothing came")) } else { amiss(*cap, cap.of(largest), &all) }
        };
        wrong = caps.iter().filter_map(judge).collect();
        if wrong.is_empty() {
            return came;
        }
    }
    panic!("three times: {wrong:#?}");
}

/// Frames of many sizes, 1000 bytes in the mean.
fn mixed_sizes(ends: &Ends) -> Vec<Vec<u8>> {
    (0..200).map(|n| frames::jumbo(ends, n, 600 + (n as usize * 37) % 800)).collect()
}

#[test]
fn what_leaves_in_a_second_is_capped_in_each_of_tcs_units() {
    let lab = lab_of(6);
    let host = (Ns::Host, "eth0");
    let frames = mixed_sizes(&Ends::HOST_TO_PEER);
    let caps = [
        Cap::Bytes("8mbit", 1e6),
        Cap::Bytes("0.5mbps", 0.5e6),
        Cap::Bytes("1.5mbit", 187_500.0),
        Cap::Bytes("2048kibit", 262_144.0),
        Cap::Packets("500pps", 500.0),
        Cap::Packets("0.7kpps", 700.0),
    ];
    for (n, cap) in (0..).zip(caps) {
        let to: IpAddr = if n % 2 == 0 { remote(n).into() } else { remote6(n).into() };
        let tunnel = if n < 3 { &["gre"][..] } else { &["vxlan"] };
        up_in(&lab, n, tunnel, &to.to_string(), &["--max-rate", cap.said()]);
    }
    let remotes = |n: u8| both_families(n).to_vec();
    let judged: Vec<_> = (0..).zip(caps).map(|(n, cap)| (cap, remotes(n))).collect();
    let flood = |lab: &Lab| Stream::start(lab, host, &frames, 50, "--pps=4000").end();
    let came = assert_capped(&lab, &judged, (1500.0, 1.0), flood);
    for n in 0..6 {
        let session = session_of(&lab, n);
        let sent: u64 = remotes(n).iter().filter_map(|to| came.get(to)).sum();
        assert_eq!(total(&session, "remotes", "pcnt"), sent, "{session:#}");
        let tap = tally(&session, "eth0", "egress");
        assert_eq!((tap.seen % 10_000, tap.seen), (0, tap.asked), "{session:#}");
        assert_eq!((drop_of(&session, "rate"), drops(&session)), (tap.dropped, tap.dropped), "{session:#}");
        assert!(tap.dropped > tap.seen / 2, "{session:#}");
        assert_accounted(&session);
    }
}

#[test]
fn one_cap_is_shared_by_all_remotes_and_both_directions() {
    let lab = lab_of(4);
    let [four, six] = both_families(0);
    up_in(&lab, 0, &["gre"], &format!("{four},{six},{}", remote(1)), &["--max-rate", "8mbit"]);
    up_in(&lab, 1, &["gre"], &format!("{},{}", remote(2), remote(3)), &["--max-rate", "800pps", "--spread", "flow"]);
    let judged = [
        (Cap::Bytes("8mbit", 1e6), vec![four, six, remote(1).into()]),
        (Cap::Packets("800pps", 800.0), vec![remote(2).into(), remote(3).into()]),
    ];
    assert_capped(&lab, &judged, (1500.0, 1.0), |lab| {
        let [peer, host] = WAYS.map(|(ns, dev, ends)| {
            let frames: Vec<Vec<u8>> = (0..200).map(|n| Talk { ends, ..various(8 * n) }.frame(n)).collect();
            Stream::start(lab, (ns, dev), &[frames, mixed_sizes(&ends)].concat(), 12, "--pps=2200")
        });
        peer.end();
        host.end();
    });
    for n in [0, 1] {
        let session = session_of(&lab, n);
        for direction in ["ingress", "egress"] {
            let tap = tally(&session, "eth0", direction);
            assert!(tap.copied() > 100 && tap.dropped > 100, "{session:#}");
        }
        assert!(rows(&session, "remotes").iter().all(|row| number(&row["stat"]["pcnt"]) > 100), "{session:#}");
        assert_eq!(drops(&session), drop_of(&session, "rate"));
        assert_accounted(&session);
    }
}

#[test]
fn every_fragment_of_a_copy_counts_towards_the_cap() {
    let options = Options { watched_mtu: 9000, watched_offloads_off: true, ..Options::default() };
    let lab = knowing(Lab::with(options), 3);
    let caps = [Cap::Bytes("8mbit", 1e6), Cap::Packets("600pps", 600.0), Cap::Bytes("6mbit", 0.75e6)];
    for (n, cap) in (0..).zip(caps) {
        let to = both_families(n)[usize::from(n == 2)].to_string();
        up_in(&lab, n, &["gre"], &to, &["--oversize", "fragment", "--max-rate", cap.said()]);
    }
    let frames: Vec<Vec<u8>> =
        (0..200).map(|n| frames::jumbo(&Ends::HOST_TO_PEER, n, 3000 + 10 * n as usize)).collect();
    let judged: Vec<_> = (0..).zip(caps).map(|(n, cap)| (cap, both_families(n).to_vec())).collect();
    let flood = |lab: &Lab| Stream::start(lab, (Ns::Host, "eth0"), &frames, 15, "--pps=1300").end();
    assert_capped(&lab, &judged, (5300.0, 4.0), flood);
    for n in 0..3 {
        let session = session_of(&lab, n);
        assert!(drop_of(&session, "rate") > 1000 && drops(&session) == drop_of(&session, "rate"), "{session:#}");
        assert_accounted(&session);
    }
}

/// A cap below one super-packet lets one through when its bucket is not empty, and then none until that is paid for.
#[test]
fn super_packets_are_capped_on_average() {
    let lab = knowing(Lab::new(), 3);
    let caps = [
        (Cap::Bytes("2mbit", 250_000.0), "segment"),
        (Cap::Packets("400pps", 400.0), "segment"),
        (Cap::Bytes("1.5mbit", 187_500.0), "fragment"),
    ];
    for (n, (cap, mode)) in (0..).zip(caps) {
        up(&lab, n, &["--direction", "egress", "--oversize", mode, "--max-rate", cap.said()]);
    }
    // A narrow link makes the connection last long enough, and the qdisc is behind the taps.
    lab.host(&[
        "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "40mbit", "burst", "64k", "latency", "100ms",
    ]);
    let judged: Vec<_> = (0..).zip(caps).map(|(n, (cap, _))| (cap, vec![remote(n).into()])).collect();
    // 64 KiB at once, in 46 segments or, cut smaller, a few more, with their headers.
    assert_capped(&lab, &judged, (71_000.0, 48.0), |lab| drop(lab.tcp_transfer(12 << 20, Ns::Host, Ns::Peer)));
    for n in 0..3 {
        let session = session_of(&lab, n);
        assert!(drop_of(&session, "rate") > 1000 && drops(&session) == drop_of(&session, "rate"), "{session:#}");
        assert_accounted(&session);
    }
}

/// Where the kernel refuses to make a UDP super-packet smaller, its wire frames are sent one by one, and cost once.
#[test]
fn super_packets_that_the_relay_must_cut_cost_no_more_than_what_leaves() {
    let lab = knowing(Lab::new(), 1);
    up(&lab, 0, &["--direction", "egress", "--max-rate", "1mbit"]);
    send_udp_super_packet(&lab, 20 * 1472, 1472);
    let session = session(&lab);
    let tap = tally(&session, "eth0", "egress");
    // The bucket holds 2,500 bytes and each of the copies takes 1,606 with its two fragments' headers.
    assert_eq!((tap.seen, tap.dropped), (20, drop_of(&session, "rate")), "{session:#}");
    assert!((2..=4).contains(&tap.copied()), "{session:#}");
    assert_accounted(&session);
}

/// Nor those that are in a tunnel of the kernel, which it does not put into another one.
#[test]
fn super_packets_inside_another_tunnel_pay_once_as_well() {
    let options = Options { watched_mtu: 1600, out_mtu: 1800, ..Options::default() };
    let lab = knowing(Lab::with(options), 1);
    add_vxlan(&lab);
    up(&lab, 0, &["--direction", "egress", "--max-rate", "2mbit"]);
    let (packets, ()) = captured(&lab, || transfer_inside_vxlan(&lab, &frames::payload(7, 500_000)));
    let full = inner_frames(&decap_gre(&packets)).iter().filter(|frame| frame.len() == 1564).count();
    let session = session(&lab);
    assert!(full > 0 && drop_of(&session, "rate") > 100, "{full} full frames, {session:#}");
    assert_accounted(&session);
}

#[test]
fn nothing_is_dropped_below_the_cap() {
    let lab = lab_of(2);
    up(&lab, 0, &["--max-rate", "80mbit"]);
    up(&lab, 1, &["--max-rate", "10kpps"]);
    Stream::start(&lab, (Ns::Host, "eth0"), &mixed_sizes(&Ends::HOST_TO_PEER), 5, "--pps=1000").end();
    lab.tcp_transfer(20_000, Ns::Host, Ns::Peer);
    for n in [0, 1] {
        let session = session_of(&lab, n);
        assert!(tally(&session, "eth0", "egress").copied() > 1000, "{session:#}");
        assert_eq!(drops(&session), 0, "{session:#}");
    }
}

/// The bucket fills while nothing comes, however long that is.
#[test]
fn single_packets_far_apart_are_not_dropped_below_the_cap() {
    let lab = lab_of(2);
    up(&lab, 0, &["--max-rate", "10pps"]);
    up(&lab, 1, &["--max-rate", "8kbit"]);
    for n in 0..6 {
        // 208 bytes leave each time: 4 packets and 832 bytes a second, or fewer.
        lab.send(Ns::Peer, "peer0", &[frames::jumbo(&Ends::PEER_TO_HOST, n, 170)]);
        std::thread::sleep(Duration::from_millis(250));
    }
    for n in [0, 1] {
        let session = session_of(&lab, n);
        assert_eq!((tally(&session, "eth0", "ingress").asked, drop_of(&session, "rate")), (6, 0), "{session:#}");
    }
}

/// How many lines recommend a cap.
fn recommendations(said: &Said) -> usize {
    let lines = said.stderr.lines().filter(|line| line.contains("copies leave through out0, which is watched itself"));
    lines.filter(|line| line.ends_with("--max-rate 200mbit")).count()
}

#[test]
fn a_cap_is_recommended_where_copies_leave_through_a_watched_interface() {
    let lab = lab_of(1);
    let args = [&["up", "out0", "eth0"][..], &UP[2..]].concat();
    let said = lab.said(&args).ok();
    assert_eq!(recommendations(&said), 1, "{said:#?}");
    down(&lab);
    let said = lab.said(&[&args[..], &["--max-rate", "200mbit"]].concat()).ok();
    assert!(!said.stderr.contains("--max-rate"), "{said:#?}");
    assert_eq!(session(&lab)["max_rate"], "200mbit");
    assert!(lab.said(&["status"]).quietly_ok().stdout.contains(", max-rate 200mbit"));
    down(&lab);
    lab.said(&UP).quietly_ok();
    let said = lab.said(&["tap", "add", "out0"]).ok();
    assert_eq!(recommendations(&said), 1, "{said:#?}");
}

// ---- all at once ----

#[test]
fn seen_frames_are_filtered_skipped_copied_or_dropped_and_nothing_else() {
    const ARP: usize = 100;
    const SMALL: usize = 600;
    const LARGE: usize = 300;
    let lab = knowing(Lab::with(Options { watched_mtu: 9000, ..Options::default() }), 1);
    let choices = ["--filter", "not arp", "--sample", "1/2", "--oversize", "drop", "--max-rate", "1mbit"];
    up(&lab, 0, &choices);
    let (packets, ()) = captured(&lab, || {
        for (ns, dev, ends) in WAYS {
            let small = (0..SMALL as u32).map(|n| frames::ipv4_udp(&ends, n, 100));
            let large = (0..LARGE as u32).map(|n| frames::jumbo(&ends, n, 2000));
            let sent: Vec<Vec<u8>> = vec![frames::arp(&ends); ARP].into_iter().chain(small).chain(large).collect();
            lab.send(ns, dev, &sent);
        }
    });
    let session = session(&lab);
    for direction in ["ingress", "egress"] {
        let tap = tally(&session, "eth0", direction);
        assert_eq!((tap.seen, tap.filtered), ((ARP + SMALL + LARGE) as u64, ARP as u64), "{session:#}");
        assert_share(direction, tap.skipped, (SMALL + LARGE) as u64, 2);
        assert!(tap.copied() > 0 && tap.dropped > LARGE as u64 / 4, "{session:#}");
        assert_eq!(tap.seen, tap.filtered + tap.skipped + tap.copied() + tap.dropped);
    }
    let lost = ["oversize", "rate"].map(|reason| drop_of(&session, reason));
    assert_share("too large", lost[0], 2 * LARGE as u64, 2);
    assert!(lost[1] > 0 && drops(&session) == lost[0] + lost[1], "{session:#}");
    let copies = inner_frames(&decap_gre(&packets));
    let stat = &rows(&session, "remotes")[0]["stat"];
    assert_eq!(number(&stat["pcnt"]), copies.len() as u64);
    assert_eq!(number(&stat["bcnt"]), copies.iter().map(|frame| frame.len() as u64).sum::<u64>());
    assert_accounted(&session);
    // Super-packets count by their wire frames, whatever becomes of them.
    lab.tcp_transfer(200_000, Ns::Host, Ns::Peer);
    lab.tcp_transfer(200_000, Ns::Peer, Ns::Host);
    let after = self::session(&lab);
    let seen = |session: &Value| ["ingress", "egress"].map(|direction| tally(session, "eth0", direction).seen);
    assert!((0..2).all(|at| seen(&after)[at] > seen(&session)[at] + 200_000 / 9000), "{after:#}");
    assert_accounted(&after);
}

// ---- values that cannot be ----

/// As [`Said::refused`] for `up` with more arguments, which also must have left nothing.
#[track_caller]
fn assert_up_refused(lab: &Lab, before: &str, more: &[&str], code: i32, names: &str, ends: &str) {
    let said = lab.said(&[&UP[..], more].concat());
    assert!(!said.status.success(), "{more:?} is taken: {said:#?}");
    said.refused(code, names, ends);
    lab.assert_as_before(before);
}

#[test]
fn samples_that_cannot_be_are_refused_in_one_line_and_leave_nothing() {
    let lab = Lab::roomy();
    let before = lab.machine();
    for flag in ["--sample", "--sample-flows"] {
        for value in ["0", "1/0", "2/3", "x", "", "1", "0.5", "1/", "/2", "1/-2", "1/2/3", "1/ 2", "1/4294967296"] {
            assert_up_refused(&lab, &before, &[flag, value], 1, &format!("{flag} {value:?}"), &format!("{flag} 1/100"));
        }
    }
    assert_up_refused(&lab, &before, &["--sample"], 2, "--sample", "snifctl up --help");
}

#[test]
fn snap_lengths_that_cannot_be_are_refused_in_one_line_and_leave_nothing() {
    let lab = Lab::roomy();
    let before = lab.machine();
    for value in ["59", "0", "15001", "4294967295"] {
        let names = format!("--snaplen {value} ");
        assert_up_refused(&lab, &before, &["--snaplen", value], 1, &names, "--snaplen 128");
    }
    for value in ["x", "", "128B", "1e3", "60.5", "4294967296", "-1"] {
        let arg = format!("--snaplen={value}");
        assert_up_refused(&lab, &before, &[&arg], 2, "--snaplen", "snifctl up --help");
    }
    assert_up_refused(&lab, &before, &["--snaplen", "60", "--snaplen", "61"], 2, "--snaplen", "snifctl up --help");
}

#[test]
fn rates_that_cannot_be_are_refused_in_one_line_and_leave_nothing() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let too_much = "99999999999999999999999gbit";
    for value in ["5", "0", "0mbit", "7kbit", "999bps", "0pps", "0.4pps", "1001gbit", "2tbit", too_much] {
        let names = format!("--max-rate {value} is out of range");
        assert_up_refused(&lab, &before, &["--max-rate", value], 1, &names, "--max-rate 200mbit");
    }
    let no_rates = [
        "fast",
        "",
        "10mb",
        "10m",
        "mbit",
        "1e3mbit",
        "1.2.3mbit",
        "1,5mbit",
        "1 mbit",
        "1ibit",
        "10kpp",
        "inf",
        "0x10",
    ];
    for value in no_rates.iter().chain(&["-1mbit", "+1mbit", "1mbit ", "1mbit/s", "100%"]) {
        let names = format!("--max-rate {value:?} is not a rate");
        assert_up_refused(&lab, &before, &[&format!("--max-rate={value}")], 1, &names, "--max-rate 200mbit");
    }
    assert_up_refused(&lab, &before, &["--max-rate", "-1mbit"], 2, "-1", "snifctl up --help");
}

/// The least and the most of each, as the session then says them.
#[test]
fn the_least_and_the_most_of_each_value_are_taken() {
    let lab = lab_of(4);
    for (n, sample, snaplen, rate, shown) in [
        (0, "1/1", "60", "8kbit", "8kbit"),
        (1, "1/4294967295", "15000", "1000gbit", "1000gbit"),
        (2, "1/2", "61", "1pps", "1pps"),
        (3, "1/3", "14999", "1.5MBIT", "1500kbit"),
    ] {
        up(&lab, n, &["--sample", sample, "--sample-flows", sample, "--snaplen", snaplen, "--max-rate", rate]);
        let session = session_of(&lab, n);
        let shown_sample = format!("1/{}", session["sample"]);
        assert_eq!((shown_sample.as_str(), &session["sample"]), (sample, &session["sample_flows"]));
        assert_eq!((session["snaplen"].to_string(), session["max_rate"].as_str()), (snaplen.into(), Some(shown)));
    }
    lab.assert_up(&["s0", "s1", "s2", "s3"]);
}

#[test]
fn choices_are_part_of_the_request() {
    let lab = lab_of(1);
    let all = ["--sample", "1/2", "--sample-flows", "1/3", "--snaplen", "100", "--max-rate", "1.5mbit"];
    let request = |more: &[&str]| lab.said(&[&UP[..], more].concat());
    request(&all).quietly_ok();
    let words = "--sample 1/2 --sample-flows 1/3 --snaplen 100 --max-rate 1500kbit";
    request(&[]).refused(1, words, "snifctl down --name default");
    for at in 0..4 {
        let fewer = [&all[..2 * at], &all[2 * at + 2..]].concat();
        request(&fewer).refused(1, words, "snifctl down --name default");
    }
    request(&all).ok_noting("already up with this request");
    request(&words.split(' ').collect::<Vec<_>>()).ok_noting("already up with this request");
    let text = lab.said(&["status"]).quietly_ok().stdout;
    assert!(text.contains(", sample 1/2, sample-flows 1/3, snaplen 100, max-rate 1500kbit\n"), "{text}");
}

// ---- taps that come and go ----

/// One more watched link: eth`n` here, peer`n` in the peer namespace, both without addresses.
fn add_link(lab: &Lab, n: u8) {
    let peer = lab.ns_name(Ns::Peer);
    let make = format!("link add eth{n} type veth peer name peer{n} netns {peer}");
    lab.ip_batch(Ns::Host, &format!("{make}\nlink set eth{n} addrgenmode none\nlink set eth{n} up"));
    lab.ip_batch(Ns::Peer, &format!("link set peer{n} addrgenmode none\nlink set peer{n} up"));
    // The kernel takes note of a carrier some time after it is there.
    for (ns, dev) in [(Ns::Host, format!("eth{n}")), (Ns::Peer, format!("peer{n}"))] {
        let shown = || String::from_utf8_lossy(&lab.run(ns, &["ip", "link", "show", "dev", &dev]).stdout).into_owned();
        let ready = poll(PATIENCE, || shown().contains("state UP").then_some(()));
        assert!(ready.is_some(), "{}", shown());
    }
}

/// A lab with so many links besides eth0, and what it was like before its session, which watches eth0.
fn lab_with_links(n: u8) -> (Lab, String) {
    let lab = lab_of(2);
    (1..=n).for_each(|n| add_link(&lab, n));
    let before = lab.machine();
    up(&lab, 0, &[]);
    (lab, before)
}

/// Changes the taps of the only session.
#[track_caller]
fn tap(lab: &Lab, words: &str) {
    lab.said(&[&["tap"], &words.split(' ').collect::<Vec<_>>()[..]].concat()).quietly_ok();
}

/// The interfaces and directions that the session watches, in order.
fn watched(lab: &Lab) -> String {
    let session = session(lab);
    let text = |value: &Value| value.as_str().expect("text").to_string();
    let names = rows(&session, "taps").iter().map(|tap| text(&tap["interface"]) + " " + &text(&tap["direction"]));
    names.collect::<Vec<_>>().join(", ")
}

/// Panics unless, of frames sent both ways over a link, those of the watched directions are copied, and no others.
#[track_caller]
fn assert_copied_on(lab: &Lab, link: (&str, &str), ways: &str) {
    let [ingress, egress] = WAYS.map(|(_, _, ends)| frames::series(&ends, 7));
    let mut capture = collector(lab);
    lab.send(Ns::Host, link.0, &egress);
    lab.send(Ns::Peer, link.1, &ingress);
    let expected = match ways {
        "none" => Vec::new(),
        "ingress" => ingress,
        "egress" => egress,
        _ => [ingress, egress].concat(),
    };
    assert_same_frames(&expected, &inner_frames(&decap_gre(&capture.take(expected.len()))));
}

const ETH0: (&str, &str) = ("eth0", "peer0");
const ETH1: (&str, &str) = ("eth1", "peer1");

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
    assert_accounted(&session(&lab));
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
        assert_accounted(&session(&lab));
    }
    tap(&lab, "remove eth0 --direction ingress");
    assert_eq!(watched(&lab), "eth0 egress, eth1 ingress, eth1 egress");
    assert_copied_on(&lab, ETH0, "egress");
    tap(&lab, "remove eth0");
    assert_copied_on(&lab, ETH0, "none");
    assert_copied_on(&lab, ETH1, "both");
    let session = session(&lab);
    let seen = rows(&session, "taps").iter().chain([&session["removed_taps"]]).map(|row| Tally::of(row).seen);
    assert_eq!(seen.sum::<u64>(), 7 * (1 + 2 + 1 + 2 + 1 + 1 + 2 + 1 + 2), "{session:#}");
    assert_accounted(&session);
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
    request(&["eth0"]).refused(1, "up eth0 eth1 ", "snifctl down --name s0");
    tap(&lab, "remove eth0");
    request(&["eth1"]).ok_noting("already up with this request");
    tap(&lab, "remove eth1 --direction ingress");
    request(&["eth1"]).refused(1, "--direction egress", "snifctl down --name s0");
    request(&["eth1", "--direction", "egress"]).ok_noting("already up with this request");
    lab.assert_up(&["s0"]);
}

// ---- under traffic ----

/// The numbers of frames, in order of arrival.
fn numbers(frames: &[Vec<u8>]) -> Vec<u32> {
    let number = |frame: &Vec<u8>| u32::from_be_bytes(frame[46..50].try_into().expect("four bytes"));
    frames.iter().map(number).collect()
}

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
    let session = session(&lab);
    assert_accounted(&session);
    assert_eq!(drops(&session), 0, "{session:#}");
    let asked = total(&session, "taps", "pcnt") + number(&session["removed_taps"]["stat"]["pcnt"]);
    let got = numbers(&inner_frames(&decap_gre(&capture.take(asked as usize))));
    let (of_second, of_first): (Vec<u32>, Vec<u32>) = got.iter().partition(|n| **n >= SECOND);
    assert_eq!(stretches(&of_first), [(0, of_first.len())]);
    assert_eq!(tally(&session, "eth0", "ingress").seen, of_first.len() as u64, "{session:#}");
    // The other link's frames come from some frame on to some other, twice.
    let stretches = stretches(&of_second);
    assert_eq!(stretches.len(), 2, "{stretches:?}");
    assert!(stretches[0].0 + (stretches[0].1 as u32) < stretches[1].0, "{stretches:?}");
    assert!(stretches.iter().all(|(_, count)| *count > 20), "{stretches:?}");
    assert_eq!(Tally::of(&session["removed_taps"]).seen, of_second.len() as u64, "{session:#}");
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
    let session = session(&lab);
    assert_eq!((rows(&session, "taps").len(), rows(&session, "remotes").len()), (6, 2), "{session:#}");
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
    let before = session(&lab);
    assert_accounted(&before);
    let [incoming, outgoing] = ["ingress", "egress"].map(|direction| tally(&before, "eth1", direction));
    assert!(incoming.filtered == 20 && incoming.skipped > 0 && incoming.dropped > 0 && incoming.copied() > 0);
    let removed = |session: &Value| Tally::of(&session["removed_taps"]);
    lab.said(&["tap", "remove", "eth1", "--direction", "egress"]).quietly_ok();
    assert_eq!(removed(&session(&lab)), outgoing);
    lab.said(&["tap", "remove", "eth1"]).quietly_ok();
    let after = session(&lab);
    let sum = |of: fn(&Tally) -> u64| of(&incoming) + of(&outgoing);
    let both = Tally {
        seen: sum(|tap| tap.seen),
        filtered: sum(|tap| tap.filtered),
        skipped: sum(|tap| tap.skipped),
        asked: sum(|tap| tap.asked),
        dropped: sum(|tap| tap.dropped),
    };
    assert_eq!(removed(&after), both);
    let bytes = |session: &Value| total(session, "taps", "bcnt") + number(&session["removed_taps"]["stat"]["bcnt"]);
    assert_eq!(bytes(&after), bytes(&before));
    assert_eq!((&after["remotes"], &after["drops"]), (&before["remotes"], &before["drops"]));
    assert_accounted(&after);
    // A tap that comes again counts from zero, and the sums go on.
    lab.said(&["tap", "add", "eth1"]).ok();
    assert_eq!(tally(&session(&lab), "eth1", "ingress"), Tally::default());
    lab.send(Ns::Peer, "peer1", &sent);
    assert_eq!(tally(&session(&lab), "eth1", "ingress").seen, sent.len() as u64);
    assert_eq!(removed(&session(&lab)), both);
    assert_accounted(&session(&lab));
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
    assert_accounted(&session(&lab));
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
    assert_eq!(json["taps"], session(&lab)["taps"]);
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
    lab.said(&["tap", "add", "eth1"]).refused(1, "default", "--name s0 or --name s1");
    lab.said(&["tap", "add", "eth1", "--name", "s1"]).quietly_ok();
    let untouched = session_of(&lab, 0);
    assert_eq!(rows(&untouched, "taps").len(), 2);
    let (packets, ()) = captured(&lab, || lab.send(Ns::Peer, "peer1", &frames::series(&Ends::PEER_TO_HOST, 7)));
    assert!(by_remote(&decap_gre(&packets)).keys().eq([&remote(1)]));
    lab.said(&["tap", "add", "eth1", "--name", "s0", "--direction", "egress"]).quietly_ok();
    lab.said(&["tap", "remove", "eth1", "--name", "s1"]).quietly_ok();
    lab.assert_up(&["s0", "s1"]);
    assert_eq!(rows(&session_of(&lab, 0), "taps").len(), 3);
    // The hooks that the other still needs stay.
    assert!(lab.shown(&["tc", "qdisc", "show", "dev", "eth1"]).contains("clsact"));
    lab.said(&["tap", "remove", "eth1", "--name", "s0"]).quietly_ok();
    assert!(!lab.shown(&["tc", "qdisc", "show", "dev", "eth1"]).contains("clsact"));
    down(&lab);
    lab.assert_as_before(&before);
}

// ---- refused ----

/// What is at the hooks of all interfaces, without what differs from one `up` to the next.
fn hooks(lab: &Lab) -> String {
    let ask = "tc -j qdisc show; for dev in $(ls /sys/class/net); do for hook in ingress egress; do
        echo \"\\\"$dev $hook\\\"\"; tc -j filter show dev $dev $hook; done; done";
    let shown = lab.shown(&["sh", "-c", ask]);
    let mut found = String::new();
    for part in serde_json::Deserializer::from_str(&shown).into_iter::<Value>() {
        let part = part.expect("JSON of tc");
        found += part.as_str().map(|place| format!("\n{place}:")).unwrap_or_default().as_str();
        for row in part.as_array().into_iter().flatten() {
            let filter = &row["options"];
            found += &format!(" {} {} {}", row["dev"], row["kind"], row["pref"]);
            found += &format!(" {} {};", filter["handle"], filter["prog"]["name"]);
        }
    }
    found
}

/// As [`Said::refused`] for a change of the taps, which also must have changed nothing.
#[track_caller]
fn assert_tap_refused(lab: &Lab, words: &str, names: &str, ends: &str) {
    let before = (hooks(lab), session(lab));
    lab.said(&[&["tap"], &words.split(' ').collect::<Vec<_>>()[..]].concat()).refused(1, names, ends);
    assert_eq!(before, (hooks(lab), session(lab)), "{words}");
}

#[test]
fn changes_of_taps_that_cannot_be_made_are_refused_in_one_line() {
    let (lab, before) = lab_with_links(2);
    lab.host(&["tc", "qdisc", "add", "dev", "eth2", "ingress"]);
    lab.host(&["ip", "tuntap", "add", "dev", "tun0", "mode", "tun"]);
    assert_tap_refused(&lab, "add nosuch0", "IFACE nosuch0", ": ip link");
    assert_tap_refused(&lab, "add a'b", "IFACE \"a'b\"", ": ip link");
    assert_tap_refused(&lab, "add snif0", "IFACE snif0 is a relay", ": ip link");
    assert_tap_refused(&lab, "add snif0p --direction ingress", "IFACE snif0p is a relay", ": ip link");
    assert_tap_refused(&lab, "add tun0", "IFACE tun0 has no Ethernet header", ": ip link");
    assert_tap_refused(&lab, "add eth2", "IFACE eth2 has an `ingress` qdisc", "tc qdisc del dev eth2 ingress");
    assert_tap_refused(&lab, "add eth0", "IFACE eth0 is already watched", "snifctl tap list --name s0");
    assert_tap_refused(&lab, "add eth0 --direction egress", "(egress)", "snifctl tap list --name s0");
    assert_tap_refused(&lab, "add eth1 --name other", "no session other", "--name s0");
    let known = "it watches: eth0 ingress, eth0 egress";
    assert_tap_refused(&lab, "remove eth1", "IFACE eth1 is not watched", known);
    assert_tap_refused(&lab, "remove nosuch0", "IFACE nosuch0 is not watched", known);
    assert_tap_refused(&lab, "remove eth0", "nothing but eth0", "snifctl down --name s0");
    tap(&lab, "remove eth0 --direction egress");
    assert_tap_refused(&lab, "remove eth0 --direction egress", "not watched", "it watches: eth0 ingress");
    assert_tap_refused(&lab, "remove eth0 --direction ingress", "nothing but eth0", "snifctl down --name s0");
    assert_tap_refused(&lab, "remove eth0", "nothing but eth0", "snifctl down --name s0");
    lab.said(&["tap", "add", "eth1", "--direction", "sideways"]).refused(2, "sideways", "snifctl tap --help");
    lab.said(&["tap", "remove"]).refused(2, "IFACE", "snifctl tap --help");
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
    assert!(watched(&lab).contains("gone"), "{}", watched(&lab));
    tap(&lab, "remove eth1 --direction egress");
    tap(&lab, "remove eth1");
    assert_eq!(watched(&lab), "eth0 ingress, eth0 egress, eth2 ingress, eth2 egress");
    assert_eq!(Tally::of(&session(&lab)["removed_taps"]).seen, 14);
    assert_accounted(&session(&lab));
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
    let session = session(&lab);
    assert_eq!(tally(&session, "eth1", "ingress").seen, 7, "{session:#}");
    assert_accounted(&session);
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
    assert_accounted(&session(&lab));
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
    assert_tap_refused(&lab, "remove eth1", "IFACE eth1 is not watched", "lan1 ingress, lan1 egress");
    tap(&lab, "add eth1");
    assert_copied_on(&lab, ("lan1", "peer1"), "both");
    assert_copied_on(&lab, ("eth1", "peer2"), "both");
    assert_eq!(watched(&lab), "eth0 ingress, eth0 egress, lan1 ingress, lan1 egress, eth1 ingress, eth1 egress");
    assert_accounted(&session(&lab));
    tap(&lab, "remove eth1");
    assert_copied_on(&lab, ("lan1", "peer1"), "both");
    assert_copied_on(&lab, ("eth1", "peer2"), "none");
    tap(&lab, "remove lan1");
    assert_copied_on(&lab, ("lan1", "peer1"), "none");
    assert_accounted(&session(&lab));
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
    assert_accounted(&session(&lab));
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
    assert_eq!(session(&lab)["taps"][2]["attached"], false);
    tap(&lab, "add eth1");
    lab.assert_up(&["s0"]);
    assert_copied_on(&lab, ETH1, "both");
    assert_eq!(tally(&session(&lab), "eth1", "ingress").seen, 14);
    lose();
    let (lost, fakes) = (session(&lab), lab.counting_fakes());
    lab.said_by(&fakes.first_in_path(), &["tap", "add", "eth1"]).quietly_ok();
    let last = fakes.calls().iter().rposition(|call| call.starts_with("tc -batch")).expect("tc attaches") + 1;
    lose();
    fakes.arm(last, Fault::Fail { done: None });
    lab.said_by(&fakes.first_in_path(), &["tap", "add", "eth1"]).refused(1, "injected", "");
    assert_eq!(watched(&lab), "eth0 ingress, eth0 egress, eth1 ingress, eth1 egress");
    assert_eq!(session(&lab), lost);
    down(&lab);
    lab.assert_as_before(&before);
}

// ---- killed and failed at every step ----

/// What a change of taps changes: the session, and what is at the hooks of its interfaces.
type State = (Value, String);

/// A session whose changes of taps can be made to fail.
struct Bench {
    lab: Lab,
    fakes: Fakes,
    /// Before the session.
    before: String,
    change: [&'static str; 3],
    undo: [&'static str; 3],
    /// Of the session, before and after the change.
    states: [State; 2],
}

const ADD: [&str; 3] = ["tap", "add", "eth1"];
const REMOVE: [&str; 3] = ["tap", "remove", "eth1"];

impl Bench {
    fn new(change: [&'static str; 3], undo: [&'static str; 3]) -> Bench {
        let (lab, before) = lab_with_links(1);
        if change == REMOVE {
            lab.said(&undo).quietly_ok();
        }
        let state = |lab: &Lab| (session(lab), hooks(lab));
        let first = state(&lab);
        lab.said(&change).quietly_ok();
        let second = state(&lab);
        lab.said(&undo).quietly_ok();
        let fakes = lab.counting_fakes();
        let bench = Bench { lab, fakes, before, change, undo, states: [first, second] };
        assert_eq!(bench.state(), bench.states[0], "undoing leaves the session as it was");
        bench
    }

    fn state(&self) -> State {
        (session(&self.lab), hooks(&self.lab))
    }

    /// Makes the change while the fault is armed; `None` if it has ended before the call that would go wrong.
    fn run(&self, at: usize, fault: Fault) -> Option<Said> {
        self.fakes.arm(at, fault);
        let said = self.lab.said_by(&self.fakes.first_in_path(), &self.change);
        (self.fakes.calls().len() >= at).then_some(said)
    }

    /// The numbers of the calls that change the machine and the lines that each is fed.
    fn writes(&self) -> Vec<(usize, usize)> {
        self.run(usize::MAX, Fault::Fail { done: None });
        self.lab.said(&self.undo).quietly_ok();
        let is_write = |call: &String| call.starts_with("tc -batch") || call.starts_with("bpftool batch");
        let calls = self.fakes.calls();
        let writes = calls.iter().zip(1..).filter(|(call, _)| is_write(call)).map(|(_, at)| at);
        let lines = |at: usize| {
            // Fed none of its lines, it fails, and what it was fed is there to be counted.
            self.run(at, Fault::Fail { done: Some(0) });
            self.lab.said(&self.change);
            self.lab.said(&self.undo).quietly_ok();
            (at, self.fakes.input_lines())
        };
        writes.map(lines).collect()
    }

    /// Brings the session back to the first state, whatever it is in.
    #[track_caller]
    fn heal(&self) {
        // Each refuses where there is nothing to do.
        self.lab.said(&self.change);
        self.lab.said(&self.undo);
        if self.state() != self.states[0] {
            self.start_anew();
        }
    }

    /// `down` leaves the machine as it was, and a new session is like the first one.
    #[track_caller]
    fn start_anew(&self) {
        down(&self.lab);
        self.lab.assert_as_before(&self.before);
        up(&self.lab, 0, &[]);
        if self.change == REMOVE {
            self.lab.said(&self.undo).quietly_ok();
        }
    }

    /// What is wrong after the change has failed in this way; `None` as answer if it has not come so far. A write that
    /// has done a part may leave the change undone, or made, and nothing between.
    fn failed(&self, at: usize, done: Option<usize>) -> Option<Vec<String>> {
        let said = self.run(at, Fault::Fail { done })?;
        let (call, state) = (self.fakes.calls()[at - 1].clone(), self.state());
        let well = said.status.success();
        let right = if well { state == self.states[1] } else { state == self.states[0] };
        let mut wrong = Vec::new();
        if !right && (done.is_none() || state != self.states[1]) {
            let attached = rows(&state.0, "taps").iter().map(|tap| format!("{}", tap["attached"])).collect::<Vec<_>>();
            let attached = attached.join(", ");
            wrong.push(format!("call {at}, `{call}`, failed with {done:?} lines done; taps attached: {attached}"));
        }
        if !well {
            said.refused(1, "", "");
        }
        if state != self.states[0] {
            self.heal();
        }
        Some(wrong)
    }
}

/// A change that fails, whichever call has failed, leaves the session and the machine as they were.
#[track_caller]
fn assert_unwound(bench: &Bench, least: usize) {
    let mut wrong = Vec::new();
    let mut at = 1;
    while let Some(more) = bench.failed(at, None) {
        wrong.extend(more);
        at += 1;
    }
    assert!(at > least, "failed {at} times");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn an_addition_is_unwound_whichever_of_its_calls_fails() {
    assert_unwound(&Bench::new(ADD, REMOVE), 8);
}

#[test]
fn a_removal_is_unwound_whichever_of_its_calls_fails() {
    assert_unwound(&Bench::new(REMOVE, ADD), 8);
}

/// Also where a write has done a part of its lines.
#[track_caller]
fn assert_unwound_half_way(bench: &Bench) {
    let writes = bench.writes();
    let partial = |(at, lines): &(usize, usize)| [(*at, 1), (*at, lines / 2), (*at, lines - 1)];
    let mut cases: Vec<(usize, usize)> = writes.iter().flat_map(partial).filter(|(_, done)| *done > 0).collect();
    cases.dedup();
    assert!(cases.len() >= 4, "{writes:?}");
    let wrong: Vec<String> = cases.iter().filter_map(|(at, done)| bench.failed(*at, Some(*done))).flatten().collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn an_addition_is_unwound_when_a_write_fails_half_way() {
    assert_unwound_half_way(&Bench::new(ADD, REMOVE));
}

#[test]
fn a_removal_is_unwound_when_a_write_fails_half_way() {
    assert_unwound_half_way(&Bench::new(REMOVE, ADD));
}

/// Kills the change at a call, after so many of its lines; false if it has ended before.
#[track_caller]
fn killed(bench: &Bench, at: usize, done: Option<usize>) -> bool {
    let Some(said) = bench.run(at, Fault::Kill { done }) else { return false };
    assert_eq!(said.status.signal(), Some(9), "{said:#?}");
    true
}

/// The same command again completes what was killed, and `down` removes it.
#[track_caller]
fn assert_healed(bench: &Bench) {
    let heals = |what: &str| {
        let again = bench.lab.said(&bench.change);
        assert_eq!(bench.state(), bench.states[1], "killed at {what}: {again:#?}");
        bench.lab.said(&bench.undo).quietly_ok();
    };
    let writes = bench.writes();
    // Before the first of these, nothing has been changed.
    let kills = (writes[0].0..).take_while(|at| killed(bench, *at, None)).inspect(|at| heals(&format!("call {at}")));
    assert!(kills.count() >= writes.len());
    bench.lab.said(&bench.undo).quietly_ok();
    for (at, lines) in writes {
        for done in BTreeSet::from([1, lines / 2, lines - 1]).into_iter().filter(|done| *done > 0) {
            assert!(killed(bench, at, Some(done)));
            heals(&format!("call {at} with {done} lines done"));
        }
        assert!(killed(bench, at, Some(lines / 2)));
        bench.start_anew();
    }
    assert_eq!(bench.state(), bench.states[0]);
    assert_copied_on(&bench.lab, ETH0, "both");
}

#[test]
fn an_addition_that_was_killed_is_healed_by_the_same_command_and_by_down() {
    assert_healed(&Bench::new(ADD, REMOVE));
}

#[test]
fn a_removal_that_was_killed_is_healed_by_the_same_command_and_by_down() {
    assert_healed(&Bench::new(REMOVE, ADD));
}
