//! The rate cap: what leaves in a second, and what a copy costs.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use crate::lab::capture::Capture;
use crate::lab::decode::{decap_gre, inner_frames};
use crate::lab::frames::{self, Ends};
use crate::lab::judge::{Said, UP};
use crate::lab::remotes::{collector, remote};
use crate::lab::sessions::{
    WAYS, assert_up_refused, both_families, captured, down, knowing, lab_of, remote6, session_of, up, up_in,
};
use crate::lab::super_packets::{add_vxlan, send_udp_super_packet, transfer_inside_vxlan};
use crate::lab::talk::{Talk, various};
use crate::lab::traffic::Stream;
use crate::lab::{Lab, Ns, Options};

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
        assert_eq!(session.remotes_total().pcnt, sent, "{session:#}");
        let tap = session.tally("eth0", "egress");
        assert_eq!((tap.seen % 10_000, tap.seen), (0, tap.asked), "{session:#}");
        assert_eq!((session.dropped("rate"), session.drops()), (tap.dropped, tap.dropped), "{session:#}");
        assert!(tap.dropped > tap.seen / 2, "{session:#}");
        session.assert_accounted();
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
            let tap = session.tally("eth0", direction);
            assert!(tap.copied() > 100 && tap.dropped > 100, "{session:#}");
        }
        assert!(session.remotes.iter().all(|row| row.stat.pcnt > 100), "{session:#}");
        assert_eq!(session.drops(), session.dropped("rate"));
        session.assert_accounted();
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
        assert!(session.dropped("rate") > 1000 && session.drops() == session.dropped("rate"), "{session:#}");
        session.assert_accounted();
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
        assert!(session.dropped("rate") > 1000 && session.drops() == session.dropped("rate"), "{session:#}");
        session.assert_accounted();
    }
}

/// Where the kernel refuses to make a UDP super-packet smaller, its wire frames are sent one by one, and cost once.
#[test]
fn super_packets_that_the_relay_must_cut_cost_no_more_than_what_leaves() {
    let lab = knowing(Lab::new(), 1);
    up(&lab, 0, &["--direction", "egress", "--max-rate", "1mbit"]);
    send_udp_super_packet(&lab, 20 * 1472, 1472);
    let session = lab.session();
    let tap = session.tally("eth0", "egress");
    // The bucket holds 2,500 bytes and each of the copies takes 1,606 with its two fragments' headers.
    assert_eq!((tap.seen, tap.dropped), (20, session.dropped("rate")), "{session:#}");
    assert!((2..=4).contains(&tap.copied()), "{session:#}");
    session.assert_accounted();
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
    let session = lab.session();
    assert!(full > 0 && session.dropped("rate") > 100, "{full} full frames, {session:#}");
    session.assert_accounted();
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
        assert!(session.tally("eth0", "egress").copied() > 1000, "{session:#}");
        assert_eq!(session.drops(), 0, "{session:#}");
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
        assert_eq!((session.tally("eth0", "ingress").asked, session.dropped("rate")), (6, 0), "{session:#}");
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
    assert_eq!(lab.session().max_rate.as_deref(), Some("200mbit"));
    assert!(lab.said(&["status"]).quietly_ok().stdout.contains(", max-rate 200mbit"));
    down(&lab);
    lab.said(&UP).quietly_ok();
    let said = lab.said(&["tap", "add", "out0"]).ok();
    assert_eq!(recommendations(&said), 1, "{said:#?}");
}

#[test]
fn rates_that_cannot_be_are_refused_in_one_line_and_leave_nothing() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let too_much = "99999999999999999999999gbit";
    for value in ["5", "0", "0mbit", "7kbit", "999bps", "0pps", "0.4pps", "1001gbit", "2tbit", too_much] {
        let names = format!("--max-rate {value} is out of range");
        assert_up_refused(&lab, &before, &["--max-rate", value], 2, &names, "--max-rate 200mbit");
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
        assert_up_refused(&lab, &before, &[&format!("--max-rate={value}")], 2, &names, "--max-rate 200mbit");
    }
    assert_up_refused(&lab, &before, &["--max-rate", "-1mbit"], 2, "\"-1mbit\" is not a rate", "--max-rate 200mbit");
}
