//! Several remotes against the real kernel: who gets which copy, what a change moves, and what it must leave alone.
//!
//! Most remotes are addresses of the out link with the collector's MAC, so that one capture sees the copies of all, told
//! apart by their outer destination.

mod lab;

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::{Child, Stdio};

use lab::capture::{Capture, Direction};
use lab::check::assert_same_frames;
use lab::decode::{Copy, Port, decap_gre, inner_frames, tcp_stream};
use lab::faults::Fault;
use lab::frames::{self, Ends, Family};
use lab::judge::{Said, UP, drops};
use lab::{COLLECTOR_IP6, COLLECTOR_MAC, Lab, Ns, OUT_IP6, PATIENCE, mac_text, pcap, poll};
use serde_json::Value;

/// The n-th remote.
fn remote(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 51, 100, 10 + n)
}

fn remotes(n: u8) -> Vec<Ipv4Addr> {
    (0..n).map(remote).collect()
}

/// As `--remote` takes them.
fn listed(remotes: &[Ipv4Addr]) -> String {
    let texts: Vec<String> = remotes.iter().map(Ipv4Addr::to_string).collect();
    texts.join(",")
}

/// A lab whose collector answers for so many remotes.
fn lab_of(n: u8) -> Lab {
    let lab = Lab::roomy();
    remotes(n).into_iter().for_each(|address| know(&lab, address));
    lab
}

/// Makes the collector the neighbour with this address.
fn know(lab: &Lab, address: Ipv4Addr) {
    let mac = mac_text(COLLECTOR_MAC);
    lab.ip_batch(Ns::Host, &format!("neigh replace {address} lladdr {mac} nud permanent dev out0"));
}

fn said_up(lab: &Lab, remotes: &str, more: &[&str]) -> Said {
    lab.said(&[&["up", "eth0", "--tunnel", "gre", "--remote", remotes], more].concat())
}

/// A lab with a session to so many remotes.
fn lab_up(n: u8, more: &[&str]) -> Lab {
    let lab = lab_of(n);
    said_up(&lab, &listed(&remotes(n)), more).quietly_ok();
    lab
}

fn session(lab: &Lab) -> Value {
    lab.status()["sessions"][0].clone()
}

fn rows<'a>(session: &'a Value, list: &str) -> &'a [Value] {
    session[list].as_array().expect("a list")
}

fn count(row: &Value, counter: &str) -> u64 {
    row["stat"][counter].as_u64().expect("a counter")
}

fn total(session: &Value, list: &str, counter: &str) -> u64 {
    rows(session, list).iter().map(|row| count(row, counter)).sum()
}

#[track_caller]
fn row_of(session: &Value, address: impl ToString) -> &Value {
    let address = address.to_string();
    let found = rows(session, "remotes").iter().find(|row| row["address"] == address.as_str());
    found.unwrap_or_else(|| panic!("{address} in {session:#}"))
}

/// Copies asked for = copies sent, also by remotes that were removed, + copies dropped.
#[track_caller]
fn assert_balanced(session: &Value) {
    let (asked, sent) = (total(session, "taps", "pcnt"), total(session, "remotes", "pcnt"));
    let removed = session["removed"]["pcnt"].as_u64().expect("a counter");
    assert_eq!(asked, sent + removed + drops(session), "{session:#}");
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

fn collector(lab: &Lab) -> Capture {
    lab.capture_wire(Ns::Collector, "col0", Direction::In)
}

/// The next `n` copies, by remote.
#[track_caller]
fn taken(capture: &mut Capture, n: usize) -> ByRemote {
    by_remote(&decap_gre(&capture.take(n)))
}

/// Sends frames at the peer and panics unless exactly these remotes get each of them once.
#[track_caller]
fn assert_replicated(lab: &Lab, remotes: &[Ipv4Addr]) {
    let sent = frames::series(&Ends::PEER_TO_HOST, 7);
    let mut capture = collector(lab);
    lab.send(Ns::Peer, "peer0", &sent);
    let got = taken(&mut capture, sent.len() * remotes.len());
    assert!(got.keys().eq(remotes), "{remotes:?}, got {:?}", got.keys());
    got.values().for_each(|frames| assert_same_frames(&sent, frames));
}

// ---- replicate ----

#[test]
fn each_of_three_remotes_gets_every_kind_of_frame_of_both_directions_exactly() {
    let lab = lab_up(3, &[]);
    for (at, (from, dev, ends)) in
        [(Ns::Peer, "peer0", Ends::PEER_TO_HOST), (Ns::Host, "eth0", Ends::HOST_TO_PEER)].iter().enumerate()
    {
        let sent = frames::corpus_frames(ends);
        let bytes: usize = sent.iter().map(Vec::len).sum();
        let before = session(&lab);
        let mut capture = collector(&lab);
        lab.send(*from, dev, &sent);
        let got = taken(&mut capture, 3 * sent.len());
        assert!(got.keys().eq(&remotes(3)), "{:?}", got.keys());
        got.values().for_each(|frames| assert_same_frames(&sent, frames));
        let after = session(&lab);
        for address in remotes(3) {
            let grown = |counter| count(row_of(&after, address), counter) - count(row_of(&before, address), counter);
            assert_eq!((grown("pcnt"), grown("bcnt"), grown("dcnt")), (sent.len() as u64, bytes as u64, 0));
        }
        assert_eq!(count(&after["taps"][at], "pcnt"), 3 * sent.len() as u64);
        assert_eq!(count(&after["taps"][at], "bcnt"), 3 * bytes as u64);
        assert_eq!(drops(&after), 0);
        assert_balanced(&after);
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
    let session = session(&lab);
    for address in remotes(3) {
        assert_eq!(count(row_of(&session, address), "pcnt"), got[&address].len() as u64);
    }
    assert_balanced(&session);
}

/// Everything captured, once all copies that the session says it sent are there.
#[track_caller]
fn settled(lab: &Lab, capture: &mut Capture) -> Vec<Vec<u8>> {
    let all = poll(PATIENCE, || {
        let sent = total(&session(lab), "remotes", "pcnt");
        (capture.count() as u64 == sent && total(&session(lab), "remotes", "pcnt") == sent).then_some(())
    });
    assert!(all.is_some(), "{} captured, {:#}", capture.count(), session(lab));
    capture.stop()
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
    let session = session(&lab);
    assert_eq!(rows(&session, "remotes").len(), 64);
    assert!(rows(&session, "remotes").iter().all(|row| count(row, "pcnt") == 14));
    assert_balanced(&session);
    assert_change_refused(&lab, "add", "198.51.100.200", "64 remotes", "--name OTHER");
    lab.said(&["remote", "remove", &remote(63).to_string()]).quietly_ok();
    assert_replicated(&lab, &remotes(63));
    lab.said(&["remote", "add", &remote(63).to_string()]).quietly_ok();
    assert_replicated(&lab, &remotes(64));
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&machine);
}

// ---- spread by flow ----

/// One flow, by the two frames of it that tests send.
struct Flow {
    forward: Vec<u8>,
    reverse: Vec<u8>,
}

/// Who talks to whom.
struct Talk {
    ends: Ends,
    family: Family,
    tcp: bool,
    ports: (u16, u16),
}

impl Talk {
    fn reversed(&self) -> Talk {
        let e = self.ends;
        let ends =
            Ends { src_mac: e.dst_mac, dst_mac: e.src_mac, src4: e.dst4, dst4: e.src4, src6: e.dst6, dst6: e.src6 };
        Talk { ends, family: self.family, tcp: self.tcp, ports: (self.ports.1, self.ports.0) }
    }

    fn frame(&self, n: u32) -> Vec<u8> {
        let (ends, data) = (&self.ends, frames::payload(n, 20));
        let (proto, body) = match self.tcp {
            true => (frames::TCP, frames::tcp(ends, self.family, self.ports, n, 0x18, &data)),
            false => (frames::UDP, frames::udp(ends, self.family, self.ports, &data)),
        };
        self.packet(proto, &body)
    }

    fn packet(&self, proto: u8, body: &[u8]) -> Vec<u8> {
        let ends = &self.ends;
        match self.family {
            Family::V4 => {
                frames::ethernet(ends, frames::ETH_IPV4, &frames::ipv4(ends, proto, frames::Ipv4::default(), body))
            }
            Family::V6 => frames::ethernet(ends, frames::ETH_IPV6, &frames::ipv6(ends, proto, body)),
        }
    }

    fn flow(&self, n: u32) -> Flow {
        Flow { forward: self.frame(2 * n), reverse: self.reversed().frame(2 * n + 1) }
    }
}

/// A well-mixed number, the same each time.
fn mixed(n: u32) -> u64 {
    let mut x = u64::from(n).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 27)
}

fn ends_between(a: u32, b: u32) -> Ends {
    let (v4, v6) = (u32::from(Ipv4Addr::new(10, 0, 0, 0)), u128::from(Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 0)));
    Ends {
        src4: (v4 + a).into(),
        dst4: (v4 + b).into(),
        src6: (v6 + u128::from(a)).into(),
        dst6: (v6 + u128::from(b)).into(),
        ..Ends::PEER_TO_HOST
    }
}

/// Flows of TCP and UDP over IPv4 and IPv6, all of different addresses and ports.
fn various(n: u32) -> Talk {
    let random = mixed(n);
    let address = |shift: u32| 1 + (random >> shift) as u32 % 60_000;
    Talk {
        ends: ends_between(address(0), address(16)),
        family: if n & 1 == 0 { Family::V4 } else { Family::V6 },
        tcp: n & 2 == 0,
        ports: (1024 + (random >> 32) as u16 % 60_000, 1 + (random >> 48) as u16 % 60_000),
    }
}

/// One client's connections to one server: only the client's port differs.
fn by_port(n: u32) -> Talk {
    Talk { ends: ends_between(7, 900), family: Family::V4, tcp: true, ports: (40_000 + n as u16, 443) }
}

/// Many clients of one server, each from the same port.
fn by_client(n: u32) -> Talk {
    Talk { ends: ends_between(0x1_0000 + n, 900), family: Family::V4, tcp: false, ports: (53, 53) }
}

/// The same over IPv6.
fn by_client6(n: u32) -> Talk {
    Talk { family: Family::V6, ..by_client(n) }
}

fn flows(n: u32, talk: impl Fn(u32) -> Talk) -> Vec<Flow> {
    (0..n).map(|n| talk(n).flow(n)).collect()
}

/// Sends both directions of each flow; panics unless each frame comes once, and both at the same remote. Returns each
/// flow's remote.
#[track_caller]
fn placed(lab: &Lab, flows: &[Flow]) -> Vec<Ipv4Addr> {
    let forward: Vec<Vec<u8>> = flows.iter().map(|flow| flow.forward.clone()).collect();
    let reverse: Vec<Vec<u8>> = flows.iter().map(|flow| flow.reverse.clone()).collect();
    let mut capture = collector(lab);
    lab.send(Ns::Peer, "peer0", &forward);
    lab.send(Ns::Host, "eth0", &reverse);
    let copies = decap_gre(&capture.take(2 * flows.len()));
    assert_same_frames(&[forward, reverse].concat(), &inner_frames(&copies));
    let at: HashMap<&[u8], Ipv4Addr> = copies.iter().map(|copy| (&copy.frame[..], copy.outer_dst)).collect();
    assert_eq!(at.len(), copies.len(), "the frames sent are all different");
    for (n, flow) in flows.iter().enumerate() {
        assert_eq!(at[&flow.forward[..]], at[&flow.reverse[..]], "the directions of flow {n} are apart");
    }
    flows.iter().map(|flow| at[&flow.forward[..]]).collect()
}

fn shares(placed: &[Ipv4Addr]) -> BTreeMap<Ipv4Addr, usize> {
    let mut shares = BTreeMap::new();
    placed.iter().for_each(|at| *shares.entry(*at).or_default() += 1);
    shares
}

/// Panics unless each remote has its fair share of flows within so many per cent.
#[track_caller]
fn assert_fair(what: &str, placed: &[Ipv4Addr], remotes: &[Ipv4Addr], percent: usize) {
    let shares = shares(placed);
    let fair = placed.len() / remotes.len();
    eprintln!("{what}: {} flows over {} remotes: {:?}", placed.len(), remotes.len(), shares.values());
    assert!(shares.keys().eq(remotes), "{what}: {shares:?}");
    let off = shares.values().map(|share| share.abs_diff(fair)).max().unwrap_or(0);
    assert!(off * 100 <= fair * percent, "{what}: off by {off} of {fair}: {shares:?}");
}

#[test]
fn flows_keep_to_one_remote_in_both_directions_and_share_the_remotes_evenly() {
    let lab = lab_up(5, &["--spread", "flow"]);
    let at = placed(&lab, &flows(1000, various));
    assert_fair("various", &at, &remotes(5), 20);
    let session = session(&lab);
    for (address, share) in shares(&at) {
        assert_eq!(count(row_of(&session, address), "pcnt"), 2 * share as u64);
    }
    assert_eq!((count(&session["taps"][0], "pcnt"), count(&session["taps"][1], "pcnt")), (1000, 1000));
    assert_balanced(&session);
}

#[test]
fn flows_that_differ_in_one_number_only_share_the_remotes_evenly_too() {
    let lab = lab_up(5, &["--spread", "flow"]);
    assert_fair("by port", &placed(&lab, &flows(1000, by_port)), &remotes(5), 20);
    assert_fair("by client", &placed(&lab, &flows(1000, by_client)), &remotes(5), 20);
    assert_fair("by IPv6 client", &placed(&lab, &flows(1000, by_client6)), &remotes(5), 20);
}

#[test]
fn real_connections_keep_to_one_remote_each_in_both_directions() {
    let lab = lab_up(5, &["--spread", "flow"]);
    let mut capture = collector(&lab);
    let ways = [(Ns::Host, Ns::Peer), (Ns::Peer, Ns::Host)];
    let transfers = (0..4).flat_map(|_| ways.map(|(from, to)| lab.tcp_transfer(200_000, from, to)));
    let transfers: Vec<_> = transfers.collect();
    let transfers6: Vec<_> = ways.iter().map(|(from, to)| lab.tcp_transfer6(50_000, *from, *to)).collect();
    let got = by_remote(&decap_gre(&settled(&lab, &mut capture)));
    let mut used = Vec::new();
    for transfer in transfers.iter().chain(&transfers6) {
        let holders: Vec<&Ipv4Addr> =
            got.iter().filter(|(_, f)| has_port(f, transfer.port)).map(|(at, _)| at).collect();
        assert_eq!(holders.len(), 1, "the connection to port {} is at {holders:?}", transfer.port);
        let frames = &got[holders[0]];
        assert!(tcp_stream(frames, Port::Dst(transfer.port)) == transfer.data, "the copied stream differs");
        assert!(tcp_stream(frames, Port::Src(transfer.port)).is_empty(), "the answers hold no data");
        used.push(*holders[0]);
    }
    assert!(shares(&used).len() > 1, "all connections are at one remote: {used:?}");
    assert_balanced(&session(&lab));
}

/// Whether a TCP frame has this port on either side.
fn has_port(frames: &[Vec<u8>], port: u16) -> bool {
    let port = port.to_be_bytes();
    frames.iter().any(|frame| {
        let at = if frame[12..14] == [8, 0] { 34 } else { 54 };
        frame.get(at..at + 2) == Some(&port[..]) || frame.get(at + 2..at + 4) == Some(&port[..])
    })
}

/// One UDP datagram in IPv6 fragments; `before` is a header before the UDP header inside the fragments.
fn ipv6_fragments(ends: &Ends, n: u32, options: bool) -> Vec<Vec<u8>> {
    let datagram = frames::udp(ends, Family::V6, (4000, n as u16), &frames::payload(n, 3000));
    let (next, body) = match options {
        true => (frames::DESTINATION, [&[frames::UDP, 0, 1, 4, 0, 0, 0, 0], &datagram[..]].concat()),
        false => (frames::UDP, datagram),
    };
    let last = (body.len() - 1) / 1200;
    let fragment = |(i, piece): (usize, &[u8])| {
        let place = (i * 1200) as u16 | u16::from(i != last);
        let header = [&[next, 0], &place.to_be_bytes()[..], &n.to_be_bytes()].concat();
        frames::ethernet(ends, frames::ETH_IPV6, &frames::ipv6(ends, frames::FRAGMENT, &[&header, piece].concat()))
    };
    body.chunks(1200).enumerate().map(fragment).collect()
}

/// Sends groups of frames at the peer; panics unless each frame comes once and each group is at one remote.
#[track_caller]
fn assert_groups_stay_together(lab: &Lab, groups: &[Vec<Vec<u8>>]) -> Vec<Ipv4Addr> {
    let sent = groups.concat();
    let mut capture = collector(lab);
    lab.send(Ns::Peer, "peer0", &sent);
    let copies = decap_gre(&capture.take(sent.len()));
    assert_same_frames(&sent, &inner_frames(&copies));
    let at: HashMap<&[u8], Ipv4Addr> = copies.iter().map(|copy| (&copy.frame[..], copy.outer_dst)).collect();
    for (n, group) in groups.iter().enumerate() {
        let places: Vec<Ipv4Addr> = group.iter().map(|frame| at[&frame[..]]).collect();
        assert_eq!(shares(&places).len(), 1, "group {n} is apart: {places:?}");
    }
    groups.iter().map(|group| at[&group[0][..]]).collect()
}

#[test]
fn fragments_of_one_datagram_go_to_one_remote() {
    let lab = lab_up(5, &["--spread", "flow"]);
    let ends = |n: u32| ends_between(n + 1, 2000 + 3 * n);
    let v4: Vec<_> = (0..60).map(|n| frames::ipv4_fragments(&ends(n), n, 3000, 1200)).collect();
    let v6: Vec<_> = (0..60).map(|n| ipv6_fragments(&ends(n), n, false)).collect();
    let options: Vec<_> = (60..120).map(|n| ipv6_fragments(&ends(n), n, true)).collect();
    let tag = |group: &Vec<Vec<u8>>| group.iter().map(|f| frames::tagged(frames::ETH_8021Q, 42, f)).collect();
    let tagged: Vec<Vec<Vec<u8>>> = v4.iter().map(tag).collect();
    for (what, groups) in [("IPv4", v4), ("IPv6", v6), ("IPv6 with options", options), ("tagged", tagged)] {
        assert!(groups.iter().all(|group| group.len() == 3));
        let at = assert_groups_stay_together(&lab, &groups);
        assert!(shares(&at).len() >= 4, "{what}: {:?}", shares(&at));
    }
}

/// The answer to a fragmented datagram may be fragmented as well.
#[test]
fn fragments_of_both_directions_go_to_one_remote() {
    let lab = lab_up(5, &["--spread", "flow"]);
    let talk =
        |n: u32| Talk { family: Family::V4, tcp: false, ports: (4000, 4001), ends: ends_between(n + 1, 7000 + n) };
    let first = |ends: &Ends, n: u32| frames::ipv4_fragments(ends, n, 1000, 800).swap_remove(0);
    let last = |ends: &Ends, n: u32| frames::ipv4_fragments(ends, n, 1000, 800).swap_remove(1);
    let flow = |n: u32| Flow { forward: first(&talk(n).ends, n), reverse: last(&talk(n).reversed().ends, n) };
    placed(&lab, &(0..100).map(flow).collect::<Vec<_>>());
}

#[test]
fn frames_that_are_not_ip_go_by_their_pair_of_mac_addresses() {
    let lab = lab_up(5, &["--spread", "flow"]);
    let mac = |n: u32| [0x02, 0, 0, 0xcc, (n >> 8) as u8, n as u8];
    let pair = |n: u32| Ends { src_mac: mac(n), dst_mac: mac(1000 + 7 * n), ..Ends::PEER_TO_HOST };
    let back = |n: u32| Ends { src_mac: pair(n).dst_mac, dst_mac: pair(n).src_mac, ..Ends::HOST_TO_PEER };
    let flow =
        |n: u32| Flow { forward: frames::raw(&pair(n), 2 * n, 60), reverse: frames::raw(&back(n), 2 * n + 1, 70) };
    let at = placed(&lab, &(0..400).map(flow).collect::<Vec<_>>());
    assert_fair("MAC pairs", &at, &remotes(5), 40);
    // Of one pair, also with another protocol and with a tag, all go to one remote.
    let groups: Vec<Vec<Vec<u8>>> = (0..50)
        .map(|n| {
            let tagged = frames::tagged(frames::ETH_8021Q, 42, &frames::raw(&pair(n), 5000 + n, 60));
            vec![
                frames::raw(&pair(n), 4000 + n, 60),
                frames::mpls(&pair(n), n),
                tagged,
                frames::raw(&pair(n), n, 14 + 18),
            ]
        })
        .collect();
    let again = assert_groups_stay_together(&lab, &groups);
    assert_eq!(again, at[..50]);
}

#[test]
fn tagged_flows_keep_to_one_remote_in_both_directions() {
    let lab = lab_up(5, &["--spread", "flow"]);
    let tag = |n: u32, frame: &[u8]| match n % 3 {
        0 => frames::tagged(frames::ETH_8021Q, 42, frame),
        1 => frames::tagged(frames::ETH_8021AD, 100, &frames::tagged(frames::ETH_8021Q, 42, frame)),
        _ => frames::tagged(
            frames::ETH_8021AD,
            7,
            &frames::tagged(frames::ETH_8021Q, 8, &frames::tagged(frames::ETH_8021Q, 9, frame)),
        ),
    };
    let flow = |n: u32| {
        let plain = various(n).flow(n);
        Flow { forward: tag(n, &plain.forward), reverse: tag(n, &plain.reverse) }
    };
    let at = placed(&lab, &(0..600).map(flow).collect::<Vec<_>>());
    assert_fair("tagged", &at, &remotes(5), 40);
    // ICMP has no ports, and IPv6 options hide them: the addresses keep such flows together.
    let portless = |n: u32| {
        let (there, back) =
            (Talk { family: Family::V4, ..various(n) }, Talk { family: Family::V4, ..various(n).reversed() });
        match n & 1 {
            0 => Flow {
                forward: there.packet(frames::ICMP, &frames::icmp(&frames::payload(n, 30))),
                reverse: back.packet(frames::ICMP, &frames::icmp(&frames::payload(n + 1, 30))),
            },
            _ => Flow {
                forward: frames::ipv6_extensions(&there.ends, n),
                reverse: frames::ipv6_extensions(&back.ends, n + 1),
            },
        }
    };
    let at = placed(&lab, &(0..200).map(portless).collect::<Vec<_>>());
    assert!(shares(&at).len() == 5, "{:?}", shares(&at));
}

// ---- movement ----

fn moved(before: &[Ipv4Addr], after: &[Ipv4Addr]) -> Vec<usize> {
    (0..before.len()).filter(|n| before[*n] != after[*n]).collect()
}

#[test]
fn a_remote_that_goes_moves_its_own_flows_only_and_gets_them_back() {
    let lab = lab_up(5, &["--spread", "flow"]);
    let flows = flows(1000, various);
    let before = placed(&lab, &flows);
    lab.said(&["remote", "remove", &remote(2).to_string()]).quietly_ok();
    let after = placed(&lab, &flows);
    let own: Vec<usize> = (0..flows.len()).filter(|n| before[*n] == remote(2)).collect();
    eprintln!("remove 1 of 5: {} of {} flows moved", own.len(), flows.len());
    assert_eq!(moved(&before, &after), own);
    let rest: Vec<Ipv4Addr> = remotes(5).into_iter().filter(|at| *at != remote(2)).collect();
    assert_fair("after remove", &after, &rest, 20);
    // The flows that lost their remote are shared by all that stay.
    let heirs: Vec<Ipv4Addr> = own.iter().map(|n| after[*n]).collect();
    assert_eq!(shares(&heirs).len(), 4, "{:?}", shares(&heirs));
    lab.said(&["remote", "add", &remote(2).to_string()]).quietly_ok();
    assert_eq!(moved(&before, &placed(&lab, &flows)), [0usize; 0]);
}

#[test]
fn a_remote_that_comes_takes_its_share_and_nothing_else_moves() {
    let lab = lab_up(5, &["--spread", "flow"]);
    know(&lab, remote(5));
    let flows = flows(1000, various);
    let before = placed(&lab, &flows);
    lab.said(&["remote", "add", &remote(5).to_string()]).quietly_ok();
    let after = placed(&lab, &flows);
    let gone = moved(&before, &after);
    eprintln!("add 6th: {} of {} flows moved", gone.len(), flows.len());
    assert!((100..=300).contains(&gone.len()), "{} of {} moved", gone.len(), flows.len());
    assert!(gone.iter().all(|n| after[*n] == remote(5)), "all that moved went to the new remote");
    assert_fair("after add", &after, &remotes(6), 25);
    assert_eq!(drops(&session(&lab)), 0);
}

/// The place of a flow depends on the set of remotes, not on how it came about.
#[test]
fn a_session_that_was_changed_spreads_like_one_that_was_made_so() {
    let lab = lab_of(6);
    let flows = flows(300, various);
    said_up(&lab, &listed(&[remote(4), remote(0), remote(5)]), &["--spread", "flow"]).quietly_ok();
    for (change, n) in [("add", 1), ("remove", 0), ("add", 2), ("remove", 4)] {
        lab.said(&["remote", change, &remote(n).to_string()]).quietly_ok();
    }
    let changed = placed(&lab, &flows);
    lab.said(&["down"]).quietly_ok();
    said_up(&lab, &listed(&[remote(1), remote(2), remote(5)]), &["--spread", "flow"]).quietly_ok();
    assert_eq!(changed, placed(&lab, &flows));
}

// ---- live ----

/// A steady stream out of peer0.
struct Stream {
    tcpreplay: Child,
}

impl Stream {
    fn start(lab: &Lab, frames: &[Vec<u8>], pps: u32) -> Stream {
        let file = lab.dir().join("stream.pcap");
        pcap::write(&file, frames);
        let (file, pps) = (file.to_str().expect("a plain path"), format!("--pps={pps}"));
        let mut command = lab.command(Ns::Peer, &["tcpreplay", &pps, "--intf1", "peer0", file]);
        Stream { tcpreplay: command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("start tcpreplay") }
    }

    fn runs(&mut self) -> bool {
        self.tcpreplay.try_wait().expect("wait for tcpreplay").is_none()
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

/// Panics if a counter of what is in both is smaller than before.
#[track_caller]
fn assert_no_counter_went_back(before: &Value, after: &Value) {
    let stats = |session: &Value| -> HashMap<String, u64> {
        let named = |list: &str, key: &str| -> Vec<(String, u64)> {
            let stat = |row: &Value| ["pcnt", "bcnt", "dcnt"].map(|c| (format!("{} {c}", row[key]), count(row, c)));
            rows(session, list).iter().flat_map(stat).collect()
        };
        let drops = session["drops"].as_object().expect("drops by reason").iter();
        let drops = drops.map(|(reason, count)| (reason.clone(), count.as_u64().expect("a counter")));
        drops.chain(named("taps", "direction")).chain(named("remotes", "address")).collect()
    };
    let after = stats(after);
    for (name, was) in stats(before) {
        let is = after.get(&name).copied().unwrap_or(was);
        assert!(is >= was, "{name} went from {was} back to {is}");
    }
}

/// Changes remotes while a stream runs, looking at the counters in between; panics if the stream ends too soon.
#[track_caller]
fn change_under(lab: &Lab, stream: &mut Stream, capture: &mut Capture, changes: &[(&str, u8)]) {
    let mut before = session(lab);
    for (change, n) in changes {
        // Let some frames pass between the changes.
        let from = capture.count();
        capture.wait_for(from + 200);
        lab.said(&["remote", change, &remote(*n).to_string()]).quietly_ok();
        let after = session(lab);
        assert_no_counter_went_back(&before, &after);
        assert!(after["removed"]["pcnt"].as_u64() >= before["removed"]["pcnt"].as_u64());
        before = after;
    }
    assert!(stream.runs(), "the stream ended before the last change");
}

/// The numbers of the frames, in order of arrival.
fn numbers(frames: &[Vec<u8>]) -> Vec<u32> {
    let number = |frame: &Vec<u8>| u32::from_be_bytes(frame[46..50].try_into().expect("four bytes"));
    frames.iter().map(number).collect()
}

fn range(first: u32, count: usize) -> Vec<u32> {
    (first..first + count as u32).collect()
}

#[test]
fn changes_under_traffic_lose_and_repeat_no_copy_for_the_other_remotes() {
    const FRAMES: u32 = 6000;
    let lab = lab_up(3, &[]);
    know(&lab, remote(3));
    let sent: Vec<Vec<u8>> = (0..FRAMES).map(|n| frames::ipv4_udp(&Ends::PEER_TO_HOST, n, 60)).collect();
    let mut capture = collector(&lab);
    let mut stream = Stream::start(&lab, &sent, 2000);
    change_under(&lab, &mut stream, &mut capture, &[("add", 3), ("remove", 1)]);
    stream.end();
    assert_balanced(&session(&lab));
    let all = session(&lab);
    assert_eq!(drops(&all), 0, "{all:#}");
    let got = by_remote(&decap_gre(&settled_after_changes(&lab, &mut capture)));
    for n in [0, 2] {
        assert_eq!(numbers(&got[&remote(n)]), range(0, FRAMES as usize), "remote {n}");
        assert_eq!(count(row_of(&all, remote(n)), "pcnt"), u64::from(FRAMES));
    }
    // The one that went got all up to some frame, the one that came all from some frame on.
    let (went, came) = (numbers(&got[&remote(1)]), numbers(&got[&remote(3)]));
    assert_eq!(went, range(0, went.len()));
    assert_eq!(came, range(FRAMES - came.len() as u32, came.len()));
    assert!((200..FRAMES as usize).contains(&went.len()) && (200..FRAMES as usize).contains(&came.len()));
    assert_eq!(count(row_of(&all, remote(3)), "pcnt"), came.len() as u64);
}

/// Everything captured, once no more comes: a remote that was removed has taken its counters with it.
fn settled_after_changes(lab: &Lab, capture: &mut Capture) -> Vec<Vec<u8>> {
    let asked = total(&session(lab), "taps", "pcnt") as usize;
    capture.take(asked)
}

#[test]
fn changes_under_traffic_lose_and_repeat_no_copy_of_flows_that_stay() {
    const FRAMES: u32 = 6000;
    let lab = lab_up(4, &["--spread", "flow"]);
    know(&lab, remote(4));
    let of_flow = |n: u32| Talk { family: Family::V4, tcp: false, ..various(n % 97) };
    let sent: Vec<Vec<u8>> = (0..FRAMES).map(|n| of_flow(n).frame(n)).collect();
    let mut capture = collector(&lab);
    let mut stream = Stream::start(&lab, &sent, 2000);
    change_under(&lab, &mut stream, &mut capture, &[("add", 4), ("remove", 1), ("remove", 4), ("add", 1)]);
    stream.end();
    assert_balanced(&session(&lab));
    let copies = decap_gre(&settled_after_changes(&lab, &mut capture));
    let mut places: BTreeMap<u32, Vec<(u32, Ipv4Addr)>> = BTreeMap::new();
    for copy in &copies {
        let n = numbers(std::slice::from_ref(&copy.frame))[0];
        places.entry(n % 97).or_default().push((n, copy.outer_dst));
    }
    let mut stayed = 0;
    for (flow, at) in &places {
        let (numbers, at): (Vec<u32>, Vec<Ipv4Addr>) = at.iter().copied().unzip();
        let own: Vec<u32> = (0..FRAMES).filter(|n| n % 97 == *flow).collect();
        if shares(&at).len() == 1 {
            stayed += 1;
            assert_eq!(numbers, own, "flow {flow} lost or repeated a frame");
        } else {
            assert!(at.contains(&remote(1)) || at.contains(&remote(4)), "flow {flow} moved from {:?}", shares(&at));
        }
    }
    eprintln!("{stayed} of 97 flows stayed through four changes");
    assert!((30..97).contains(&stayed), "{stayed} flows stayed");
    assert_same_frames(&sent, &inner_frames(&copies));
    assert_eq!(drops(&session(&lab)), 0);
}

#[test]
fn a_remote_that_comes_again_counts_from_zero() {
    let lab = lab_up(3, &[]);
    assert_replicated(&lab, &remotes(3));
    lab.said(&["remote", "remove", &remote(0).to_string()]).quietly_ok();
    assert_replicated(&lab, &[remote(1), remote(2)]);
    lab.said(&["remote", "add", &remote(0).to_string()]).quietly_ok();
    assert_replicated(&lab, &remotes(3));
    let session = session(&lab);
    let sent = [0, 1, 2].map(|n| count(row_of(&session, remote(n)), "pcnt"));
    assert_eq!((sent, drops(&session)), ([7, 21, 21], 0));
    assert_eq!(session["removed"]["pcnt"], 7);
    assert_balanced(&session);
}

/// `bpftool` fails after some of the lines of a change; making it once more completes it, to so many remotes.
#[track_caller]
fn assert_repeatable(change: &str, back: &str, left: u8) {
    let lab = lab_up(1, &[]);
    know(&lab, remote(1));
    let (fakes, changed) = (lab.counting_fakes(), remote(1).to_string());
    let run = |change: &str| lab.said_by(&fakes.first_in_path(), &["remote", change, &changed]);
    if change == "remove" {
        lab.said(&["remote", back, &changed]).quietly_ok();
    }
    run(change).quietly_ok();
    let last = fakes.calls().len();
    // A removal has two batches, with a question in between.
    let calls = if change == "remove" { vec![last - 2, last] } else { vec![last] };
    for (at, done) in calls.into_iter().flat_map(|at| [0, 1, 4, 6].map(|done| (at, done))) {
        lab.said(&["remote", back, &changed]).quietly_ok();
        fakes.arm(at, Fault::Fail { done: Some(done) });
        assert_eq!(run(change).status.code(), Some(1), "{change} with {done} lines done");
        // A refusal is right where all had been done but the tool's exit code.
        let again = lab.said(&["remote", change, &changed]);
        eprintln!("{change} after one that failed with {done} lines done: {again:?}");
        assert_replicated(&lab, &remotes(left));
        assert_eq!(dump(&lab, "tunnels").len(), usize::from(left));
    }
}

#[test]
fn an_addition_that_failed_half_way_can_be_made_again() {
    assert_repeatable("add", "remove", 2);
}

#[test]
fn a_removal_that_failed_half_way_can_be_made_again() {
    assert_repeatable("remove", "add", 1);
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
    assert_eq!(json["remotes"], session(&lab)["remotes"]);
    lab.said(&["remote", "remove", &remote(0).to_string()]).quietly_ok();
    let json = lab.said(&["remote", "list", "--json"]).quietly_ok().json();
    assert_eq!(json["remotes"].as_array().map(Vec::len), Some(1));
    assert_eq!(json["remotes"][0]["address"], remote(1).to_string());
    lab.said(&["remote", "list", "--name", "other"]).refused(1, "other", "--name default");
}

fn dump(lab: &Lab, map: &str) -> Vec<Value> {
    let dump = lab.said(&["map", "dump", map]).quietly_ok().json();
    dump.as_array().expect("elements").clone()
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
    let list = format!("--remote {} --remote {} --remote {}", remote(0), remote(1), remote(2));
    said_up(&lab, &listed(&remotes(2)), &[]).refused(1, &list, "first: snifctl down --name default");
    // In the words that it now answers to, it is the same.
    said_up(&lab, &listed(&remotes(3)), &[]).ok_noting("already");
    assert_replicated(&lab, &remotes(3));
}

/// As [`Said::refused`] for a change of the remotes, which also must have changed nothing.
#[track_caller]
fn assert_change_refused(lab: &Lab, change: &str, address: &str, names: &str, ends: &str) {
    let before = session(lab);
    lab.said(&["remote", change, address]).refused(1, names, ends);
    assert_eq!(before, session(lab));
}

#[test]
fn changes_that_cannot_be_made_are_refused_in_one_line() {
    let lab = lab_of(2);
    lab.said(&["remote", "add", "198.51.100.10"]).refused(1, "no session is up", "--remote ADDR");
    lab.said(&["remote", "list"]).refused(1, "no session is up", "--remote ADDR");
    said_up(&lab, &listed(&remotes(2)), &[]).quietly_ok();
    let [a, b] = [0, 1].map(|n| remote(n).to_string());
    assert_change_refused(&lab, "add", &b, &format!("{b} is already one"), "snifctl remote list --name default");
    assert_change_refused(&lab, "add", "collector", "\"collector\"", "10.0.0.7");
    assert_change_refused(&lab, "add", "10.1.2.3.4", "\"10.1.2.3.4\"", "10.0.0.7");
    assert_change_refused(&lab, "add", "203.0.113.9", "203.0.113.9 has no route", "via GATEWAY");
    assert_change_refused(&lab, "add", "2001:db8:99::1", "2001:db8:99::1 has no route", "via GATEWAY");
    assert_change_refused(&lab, "add", "198.51.100.1", "this machine itself", "10.0.0.7");
    assert_change_refused(&lab, "add", "224.0.0.1", "multicast", "10.0.0.7");
    assert_change_refused(&lab, "add", "fe80::7%out0", "zone", "2001:db8::7");
    assert_change_refused(&lab, "remove", "198.51.100.99", "198.51.100.99 is not one", &format!("{a}, {b}"));
    assert_change_refused(&lab, "remove", "collector", "\"collector\"", "10.0.0.7");
    lab.said(&["remote", "add", &a, "--name", "other"]).refused(1, "other", "--name default");
    lab.said(&["remote", "remove", &a]).quietly_ok();
    assert_change_refused(&lab, "remove", &b, "only one", "snifctl down --name default");
    assert_replicated(&lab, &[remote(1)]);
}

#[test]
fn requests_with_wrong_remotes_are_refused_in_one_line() {
    let lab = lab_of(2);
    let before = lab.machine();
    let [a, b] = [0, 1].map(|n| remote(n).to_string());
    let refused = |remotes: &str, more: &[&str], names: &str, ends: &str| {
        said_up(&lab, remotes, more).refused(1, names, ends);
    };
    refused(&format!("{a},{b},{a}"), &[], &format!("{a} is named twice"), "once");
    refused("2001:db8:1::2,2001:DB8:1:0::2", &[], "2001:db8:1::2 is named twice", "once");
    refused(&listed(&remotes(65)), &[], "65", "--name OTHER");
    refused(&a, &["--source", "198.51.100.1,198.51.100.9"], "one address family", "--source 198.51.100.1");
    let v6 = COLLECTOR_IP6.to_string();
    refused(&v6, &["--source", OUT6, "--source", "2001:db8::9"], "one address family", &format!("--source {OUT6}"));
    refused(&format!("{a},nonsense"), &[], "\"nonsense\"", "10.0.0.7");
    refused(&format!("{a},"), &[], "\"\"", "10.0.0.7");
    refused(&format!("{a},198.51.100.1"), &[], "198.51.100.1 is this machine itself", "10.0.0.7");
    refused("203.0.113.9", &[], "203.0.113.9 has no route", "via GATEWAY");
    lab.assert_as_before(&before);
}

const OUT6: &str = "2001:db8:1::1";

// ---- remotes that cannot be reached ----

const FAR: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);

/// Panics unless the first remote got seven more frames, and seven more for the other were dropped as unresolved.
#[track_caller]
fn assert_only_first_gets_copies(lab: &Lab, other: Ipv4Addr) {
    let before = session(lab);
    assert_replicated(lab, &[remote(0)]);
    let after = session(lab);
    let grown = |of: &dyn Fn(&Value) -> u64| of(&after) - of(&before);
    assert_eq!(grown(&|session| count(row_of(session, remote(0)), "pcnt")), 7);
    assert_eq!(grown(&|session| count(row_of(session, other), "dcnt")), 7);
    assert_eq!(grown(&|session| session["drops"]["unresolved"].as_u64().expect("a counter")), 7);
    assert_eq!(count(row_of(&after, other), "pcnt"), 0);
    assert_balanced(&after);
}

#[test]
fn a_remote_without_a_route_does_not_stop_the_others_and_heals_when_the_route_comes() {
    let lab = lab_of(1);
    let list = listed(&[remote(0), FAR]);
    said_up(&lab, &list, &[]).ok_noting("203.0.113.9 has no route");
    let row = row_of(&session(&lab), FAR).clone();
    assert!(row["interface"].is_null() && row["source"].is_null() && row["mac"].is_null(), "{row:#}");
    assert!(lab.said(&["remote", "list"]).quietly_ok().stdout.contains("(no route)"));
    assert_only_first_gets_copies(&lab, FAR);
    lab.host(&["ip", "route", "add", "203.0.113.0/24", "via", "198.51.100.2"]);
    said_up(&lab, &list, &[]).ok();
    assert_eq!(row_of(&session(&lab), FAR)["interface"], "out0");
    assert_replicated(&lab, &[remote(0), FAR]);
    assert_balanced(&session(&lab));
    assert_eq!(dump(&lab, "tunnels").len(), 2, "what is known of our packets: {:#?}", dump(&lab, "tunnels"));
    // Without a route again, it is as before.
    lab.host(&["ip", "route", "delete", "203.0.113.0/24"]);
    said_up(&lab, &list, &[]).ok();
    assert_replicated(&lab, &[remote(0)]);
    assert!(row_of(&session(&lab), FAR)["interface"].is_null());
}

#[test]
fn a_remote_whose_neighbour_is_silent_does_not_stop_the_others_and_heals_when_it_answers() {
    let lab = lab_of(1);
    let list = listed(&remotes(2));
    said_up(&lab, &list, &[]).ok_noting("198.51.100.11 does not answer on out0");
    let row = row_of(&session(&lab), remote(1)).clone();
    assert!(row["interface"] == "out0" && row["mac"].is_null(), "{row:#}");
    assert!(lab.said(&["remote", "list"]).quietly_ok().stdout.contains("(no answer)"));
    assert_only_first_gets_copies(&lab, remote(1));
    know(&lab, remote(1));
    said_up(&lab, &list, &[]).ok();
    assert_eq!(row_of(&session(&lab), remote(1))["mac"], mac_text(COLLECTOR_MAC));
    assert_replicated(&lab, &remotes(2));
    assert_balanced(&session(&lab));
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
fn a_remote_without_a_route_loses_its_own_flows_only() {
    let lab = lab_of(1);
    said_up(&lab, &listed(&[remote(0), FAR]), &["--spread", "flow"]).ok_noting("203.0.113.9 has no route");
    let sent: Vec<Vec<u8>> = flows(100, various).into_iter().map(|flow| flow.forward).collect();
    let mut capture = collector(&lab);
    lab.send(Ns::Peer, "peer0", &sent);
    let session = session(&lab);
    let (came, lost) = (count(row_of(&session, remote(0)), "pcnt"), count(row_of(&session, FAR), "dcnt"));
    assert_eq!((came + lost, session["drops"]["unresolved"].as_u64()), (100, Some(lost)));
    assert!((30..=70).contains(&lost), "{lost} of 100 lost");
    assert_eq!(taken(&mut capture, came as usize).len(), 1);
    assert_balanced(&session);
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
    assert_eq!(row_of(&session(&lab), FAR)["interface"], "out1");
    assert_eq!(session(&lab)["out_dropped"], 0);
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
    let session = session(&lab);
    assert_eq!(row_of(&session, SECOND)["interface"], "out1");
    assert_eq!(row_of(&session, SECOND)["source"], "192.0.2.129");
    assert_eq!(row_of(&session, remote(1))["source"], "198.51.100.1");
    assert_balanced(&session);
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

/// Everything captured, once the session has sent all it was asked to and no more packets come.
fn at_rest(lab: &Lab, capture: &mut Capture) -> Vec<Vec<u8>> {
    let mut before = (0, 0);
    let rest = poll(PATIENCE, || {
        let now = (capture.count(), total(&session(lab), "taps", "pcnt"));
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
        let mtus = list.map(|address| row_of(&session(&lab), address)["mtu"].as_u64());
        assert_eq!(mtus, [Some(1600), Some(1000), Some(1600)]);
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
        let session = session(&lab);
        assert_eq!(drops(&session), 0, "{session:#}");
        assert_balanced(&session);
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
    let before = session(&lab);
    assert_eq!(before["out_dropped"], 7, "{before:#}");
    lab.said(&["remote", "remove", &SECOND.to_string()]).quietly_ok();
    assert_no_counter_went_back(&before, &session(&lab));
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
    let session = session(&lab);
    assert_eq!(row_of(&session, COLLECTOR_IP6)["source"], OUT_IP6.to_string());
    assert_balanced(&session);
}

#[test]
fn flows_are_spread_over_both_families_too() {
    let lab = lab_of(1);
    said_up(&lab, &remote(0).to_string(), &["--spread", "flow"]).quietly_ok();
    lab.said(&["remote", "add", &COLLECTOR_IP6.to_string()]).quietly_ok();
    let flows = flows(200, various);
    let sent: Vec<Vec<u8>> = flows.iter().map(|flow| flow.forward.clone()).collect();
    let mut capture = collector(&lab);
    lab.send(Ns::Peer, "peer0", &sent);
    let (v6, v4): (Vec<_>, Vec<_>) = capture.take(200).into_iter().partition(|packet| packet[12..14] == [0x86, 0xdd]);
    assert!((70..130).contains(&v6.len()), "{} of 200 flows over IPv6", v6.len());
    let mut got = inner_frames(&decap_gre(&v4));
    got.extend(v6.iter().map(|packet| decap_gre6(packet, COLLECTOR_IP6)));
    assert_same_frames(&sent, &got);
}

#[test]
fn a_dry_run_shows_the_header_to_each_remote_and_changes_nothing() {
    let lab = lab_of(2);
    let before = lab.machine();
    let all: [IpAddr; 3] = [remote(0).into(), COLLECTOR_IP6.into(), remote(1).into()];
    let list = all.map(|address| address.to_string()).join(",");
    let text = said_up(&lab, &list, &["--dry-run"]).quietly_ok().stdout;
    for address in all {
        let at = text.lines().position(|line| line.starts_with(&format!("# the outer header to {address},")));
        let at = at.unwrap_or_else(|| panic!("the header to {address} in:\n{text}"));
        let digits: String =
            text.lines().nth(at + 1).expect("a line").chars().filter(char::is_ascii_hexdigit).collect();
        let octets = match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        let octets: String = octets.iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(digits.contains(&octets), "{octets} in {digits}");
    }
    assert_eq!(text.matches("# the outer header to").count(), 3);
    lab.assert_as_before(&before);
}

// ---- sessions beside each other, down ----

#[test]
fn two_sessions_with_several_remotes_each_share_an_interface() {
    let lab = lab_of(4);
    let machine = lab.machine();
    said_up(&lab, &listed(&[remote(0), remote(1), remote(2)]), &["--name", "a"]).quietly_ok();
    said_up(&lab, &listed(&[remote(2), remote(3)]), &["--name", "b", "--spread", "flow"]).quietly_ok();
    let sent = flows(50, various).into_iter().map(|flow| flow.forward).collect::<Vec<_>>();
    let mut capture = collector(&lab);
    lab.send(Ns::Peer, "peer0", &sent);
    let got = taken(&mut capture, 200);
    assert_same_frames(&sent, &got[&remote(0)]);
    assert_same_frames(&sent, &got[&remote(1)]);
    assert_same_frames(&[&sent[..], &sent].concat(), &[&got[&remote(2)][..], &got[&remote(3)]].concat());
    lab.said(&["remote", "remove", &remote(2).to_string(), "--name", "b"]).quietly_ok();
    lab.said(&["remote", "remove", &remote(0).to_string()]).refused(1, "default", "--name a or --name b");
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
