//! Sampling by packet and by flow, and all choices of what is copied together.

use std::collections::HashSet;

use crate::lab::check::assert_same_frames;
use crate::lab::decode::{decap_gre, inner_frames};
use crate::lab::frames::{self, Ends, Family};
use crate::lab::judge::UP;
use crate::lab::remotes::{by_remote, collector, remote};
use crate::lab::sessions::{WAYS, assert_up_refused, captured, knowing, lab_of, session_of, up, up_in};
use crate::lab::status::Session;
use crate::lab::talk::{Talk, by_client, by_client6, by_port, ends_between, host, ipv6_fragments, various};
use crate::lab::traffic::Stream;
use crate::lab::{Lab, Ns, Options};

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
        let tap = session.tally("eth0", "egress");
        assert_eq!((tap.seen, tap.filtered, tap.dropped), (1000 * u64::from(loops), 0, 0), "{session:#}");
        assert_eq!((session.sample, session.sample_flows), (one_of, 1));
        assert_share(&format!("1/{one_of}"), tap.asked, tap.seen, one_of as u32);
        session.assert_accounted();
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
        let before = [0, 1].map(|n| session_of(&lab, n).taps[at].counts.tally());
        let mut capture = collector(&lab);
        lab.send(*from, dev, &sent);
        let after = [0, 1].map(|n| session_of(&lab, n).taps[at].counts.tally());
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
            let tap = session.tally("eth0", direction);
            assert_eq!((tap.seen, tap.skipped), (u64::from(FLOWS * EACH_WAY), skipped), "{session:#}");
        }
        session.assert_accounted();
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
    lab.session().assert_accounted();
}

/// Sends one frame of each flow at the peer and panics unless the sessions, which take one flow in these numbers, have
/// taken that share.
#[track_caller]
fn assert_flows_shared(lab: &Lab, shares: &[u32], what: &str, talks: &[Talk]) {
    let asked = |n: usize| session_of(lab, n as u8).tally("eth0", "ingress").asked;
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
        groups.push(ipv6_fragments(&ends(n + 1000), n + 1000, false));
        groups.push(tag(&frames::ipv4_fragments(&ends(n + 2000), n + 2000, 3000, 1200)));
        groups.push(tag(&ipv6_fragments(&ends(n + 3000), n + 3000, false)));
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
        let asked = session.tally("eth0", "ingress").asked;
        assert_share("sampled", asked, FLOWS.into(), one_of);
        for row in &session.remotes {
            // The table itself gives each of five remotes its share within a tenth.
            let (got, fair) = (row.stat.pcnt as f64, asked as f64 / 5.0);
            let slack = fair / 10.0 + 4.0 * (fair * 0.8).sqrt();
            eprintln!("1/{one_of}, {}: {got} flows, fair is {fair}, give or take {slack:.1}", row.address);
            assert!((got - fair).abs() <= slack, "{session:#}");
        }
        session.assert_accounted();
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
    let taps = ["ingress", "egress"].map(|direction| session.tally("eth0", direction));
    let all = u64::from(FLOWS * 2 * EACH_WAY);
    assert_eq!(taps[0].skipped + taps[1].skipped, all - of_both.len() as u64, "{session:#}");
    session.assert_accounted();
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
        let session = lab.session();
        for (row, before) in session.remotes.iter().zip(&mut before) {
            let now = row.stat.pcnt;
            assert_share(&format!("{server:?} at {}", row.address), now - *before, 256, 4);
            *before = now;
        }
    }
}

#[test]
fn samples_that_cannot_be_are_refused_in_one_line_and_leave_nothing() {
    let lab = Lab::roomy();
    let before = lab.machine();
    for flag in ["--sample", "--sample-flows"] {
        for value in ["0", "1/0", "2/3", "x", "", "1", "0.5", "1/", "/2", "1/-2", "1/2/3", "1/ 2", "1/4294967296"] {
            assert_up_refused(&lab, &before, &[flag, value], 2, &format!("{flag} {value:?}"), &format!("{flag} 1/100"));
        }
    }
    assert_up_refused(&lab, &before, &["--sample"], 2, "--sample", "snifctl up --help");
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
    let session = lab.session();
    for direction in ["ingress", "egress"] {
        let tap = session.tally("eth0", direction);
        assert_eq!((tap.seen, tap.filtered), ((ARP + SMALL + LARGE) as u64, ARP as u64), "{session:#}");
        assert_share(direction, tap.skipped, (SMALL + LARGE) as u64, 2);
        assert!(tap.copied() > 0 && tap.dropped > LARGE as u64 / 4, "{session:#}");
        assert_eq!(tap.seen, tap.filtered + tap.skipped + tap.copied() + tap.dropped);
    }
    let lost = ["oversize", "rate"].map(|reason| session.dropped(reason));
    assert_share("too large", lost[0], 2 * LARGE as u64, 2);
    assert!(lost[1] > 0 && session.drops() == lost[0] + lost[1], "{session:#}");
    let copies = inner_frames(&decap_gre(&packets));
    let stat = session.remotes[0].stat;
    assert_eq!(stat.pcnt, copies.len() as u64);
    assert_eq!(stat.bcnt, copies.iter().map(|frame| frame.len() as u64).sum::<u64>());
    session.assert_accounted();
    // Super-packets count by their wire frames, whatever becomes of them.
    lab.tcp_transfer(200_000, Ns::Host, Ns::Peer);
    lab.tcp_transfer(200_000, Ns::Peer, Ns::Host);
    let after = lab.session();
    let seen = |session: &Session| ["ingress", "egress"].map(|direction| session.tally("eth0", direction).seen);
    assert!((0..2).all(|at| seen(&after)[at] > seen(&session)[at] + 200_000 / 9000), "{after:#}");
    after.assert_accounted();
}

// ---- choices together ----

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
        let shown_sample = format!("1/{}", session.sample);
        assert_eq!((shown_sample.as_str(), &session.sample), (sample, &session.sample_flows));
        assert_eq!((session.snaplen, session.max_rate.as_deref()), (snaplen.parse().ok(), Some(shown)));
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
    let changes =
        ["--sample 1/2 → 1/1", "--sample-flows 1/3 → 1/1", "--snaplen 100 → none", "--max-rate 1500kbit → none"];
    request(&[]).refused(1, &format!("({})", changes.join(", ")), "snifctl down --name default");
    for at in 0..4 {
        let fewer = [&all[..2 * at], &all[2 * at + 2..]].concat();
        request(&fewer).refused(1, &format!("({})", changes[at]), "snifctl down --name default");
    }
    request(&all).ok_noting("already up with this request");
    request(&words.split(' ').collect::<Vec<_>>()).ok_noting("already up with this request");
    let text = lab.said(&["status"]).quietly_ok().stdout;
    assert!(text.contains(", sample 1/2, sample-flows 1/3, snaplen 100, max-rate 1500kbit\n"), "{text}");
}
