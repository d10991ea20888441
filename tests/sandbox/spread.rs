//! Spreading flows over remotes: who gets which, what a change of the remotes moves, and what it must leave alone.

use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;

use crate::lab::capture::Capture;
use crate::lab::check::assert_same_frames;
use crate::lab::decode::{Port, decap_gre, inner_frames, tcp_stream};
use crate::lab::frames::{self, Ends, Family};
use crate::lab::remotes::{
    assert_no_counter_went_back, by_remote, collector, know, lab_of, lab_up, listed, remote, remotes, said_up, settled,
};
use crate::lab::talk::{
    Flow, Talk, by_client, by_client6, by_port, ends_between, flows, host, ipv6_fragments, untagged,
};
use crate::lab::traffic::Stream;
use crate::lab::{Lab, Ns};

// ---- spread by flow ----

/// Where flows are that differ in chosen numbers.
const NET: [u8; 4] = [10, 0, 0, 0];

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
    let at = placed(&lab, &flows(1000, untagged));
    assert_fair("various", &at, &remotes(5), 20);
    let session = lab.session();
    for (address, share) in shares(&at) {
        assert_eq!(session.remote(address).stat.pcnt, 2 * share as u64);
    }
    assert_eq!((session.taps[0].counts.stat.pcnt, session.taps[1].counts.stat.pcnt), (1000, 1000));
    session.assert_balanced();
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
    lab.session().assert_balanced();
}

/// Whether a TCP frame has this port on either side.
fn has_port(frames: &[Vec<u8>], port: u16) -> bool {
    let port = port.to_be_bytes();
    frames.iter().any(|frame| {
        let at = if frame[12..14] == [8, 0] { 34 } else { 54 };
        frame.get(at..at + 2) == Some(&port[..]) || frame.get(at + 2..at + 4) == Some(&port[..])
    })
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
    let ends = |n: u32| ends_between(host(NET, n + 1), host(NET, 2000 + 3 * n));
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
    let talk = |n: u32| Talk {
        family: Family::V4,
        protocol: frames::UDP,
        ports: (4000, 4001),
        ends: ends_between(host(NET, n + 1), host(NET, 7000 + n)),
        tags: 0,
    };
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
        let plain = untagged(n).flow(n);
        Flow { forward: tag(n, &plain.forward), reverse: tag(n, &plain.reverse) }
    };
    let at = placed(&lab, &(0..600).map(flow).collect::<Vec<_>>());
    assert_fair("tagged", &at, &remotes(5), 40);
    // ICMP has no ports, and IPv6 options hide them: the addresses keep such flows together.
    let portless = |n: u32| {
        let (there, back) =
            (Talk { family: Family::V4, ..untagged(n) }, Talk { family: Family::V4, ..untagged(n).reversed() });
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
    let flows = flows(1000, untagged);
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
    let flows = flows(1000, untagged);
    let before = placed(&lab, &flows);
    lab.said(&["remote", "add", &remote(5).to_string()]).quietly_ok();
    let after = placed(&lab, &flows);
    let gone = moved(&before, &after);
    eprintln!("add 6th: {} of {} flows moved", gone.len(), flows.len());
    assert!((100..=300).contains(&gone.len()), "{} of {} moved", gone.len(), flows.len());
    assert!(gone.iter().all(|n| after[*n] == remote(5)), "all that moved went to the new remote");
    assert_fair("after add", &after, &remotes(6), 25);
    assert_eq!(lab.session().drops(), 0);
}

/// The place of a flow depends on the set of remotes, not on how it came about.
#[test]
fn a_session_that_was_changed_spreads_like_one_that_was_made_so() {
    let lab = lab_of(6);
    let flows = flows(300, untagged);
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

/// More frames than are sent while changes are made.
const PLENTY: u32 = 40_000;

/// Changes remotes while these frames are sent, looking at the counters in between. How many were sent.
#[track_caller]
fn change_under(lab: &Lab, frames: &[Vec<u8>], capture: &mut Capture, changes: &[(&str, u8)]) -> u32 {
    let sent = || lab.packets(Ns::Peer, "peer0").1;
    let sent_before = sent();
    let stream = Stream::start(lab, (Ns::Peer, "peer0"), frames, 1, "--pps=2000");
    let mut before = lab.session();
    for (change, n) in changes {
        // Let some frames pass between the changes.
        let from = capture.count();
        capture.wait_for(from + 200);
        lab.said(&["remote", change, &remote(*n).to_string()]).quietly_ok();
        let after = lab.session();
        assert_no_counter_went_back(&before, &after);
        assert!(after.removed.pcnt >= before.removed.pcnt);
        before = after;
    }
    let from = capture.count();
    capture.wait_for(from + 200);
    stream.stop();
    (sent() - sent_before).try_into().expect("fewer than there are")
}

fn range(first: u32, count: usize) -> Vec<u32> {
    (first..first + count as u32).collect()
}

#[test]
fn changes_under_traffic_lose_and_repeat_no_copy_for_the_other_remotes() {
    let lab = lab_up(3, &[]);
    know(&lab, remote(3));
    let frames: Vec<Vec<u8>> = (0..PLENTY).map(|n| frames::ipv4_udp(&Ends::PEER_TO_HOST, n, 60)).collect();
    let mut capture = collector(&lab);
    let sent = change_under(&lab, &frames, &mut capture, &[("add", 3), ("remove", 1)]);
    lab.session().assert_balanced();
    let all = lab.session();
    assert_eq!(all.drops(), 0, "{all:#}");
    let got = by_remote(&decap_gre(&settled_after_changes(&lab, &mut capture)));
    for n in [0, 2] {
        assert_eq!(frames::numbers(&got[&remote(n)]), range(0, sent as usize), "remote {n}");
        assert_eq!(all.remote(remote(n)).stat.pcnt, u64::from(sent));
    }
    // The one that went got all up to some frame, the one that came all from some frame on.
    let (went, came) = (frames::numbers(&got[&remote(1)]), frames::numbers(&got[&remote(3)]));
    assert_eq!(went, range(0, went.len()));
    assert_eq!(came, range(sent - came.len() as u32, came.len()));
    assert!([&went, &came].iter().all(|of_one| (200..sent as usize).contains(&of_one.len())));
    assert_eq!(all.remote(remote(3)).stat.pcnt, came.len() as u64);
}

/// Everything captured, once no more comes: a remote that was removed has taken its counters with it.
fn settled_after_changes(lab: &Lab, capture: &mut Capture) -> Vec<Vec<u8>> {
    let asked = lab.session().taps_total().pcnt as usize;
    capture.take(asked)
}

#[test]
fn changes_under_traffic_lose_and_repeat_no_copy_of_flows_that_stay() {
    let lab = lab_up(4, &["--spread", "flow"]);
    know(&lab, remote(4));
    let of_flow = |n: u32| Talk { family: Family::V4, protocol: frames::UDP, ..untagged(n % 97) };
    let frames: Vec<Vec<u8>> = (0..PLENTY).map(|n| of_flow(n).frame(n)).collect();
    let mut capture = collector(&lab);
    let changes = [("add", 4), ("remove", 1), ("remove", 4), ("add", 1)];
    let sent = change_under(&lab, &frames, &mut capture, &changes);
    lab.session().assert_balanced();
    let copies = decap_gre(&settled_after_changes(&lab, &mut capture));
    let mut places: BTreeMap<u32, Vec<(u32, Ipv4Addr)>> = BTreeMap::new();
    for copy in &copies {
        let n = frames::numbers(std::slice::from_ref(&copy.frame))[0];
        places.entry(n % 97).or_default().push((n, copy.outer_dst));
    }
    let mut stayed = 0;
    for (flow, at) in &places {
        let (numbers, at): (Vec<u32>, Vec<Ipv4Addr>) = at.iter().copied().unzip();
        let own: Vec<u32> = (0..sent).filter(|n| n % 97 == *flow).collect();
        if shares(&at).len() == 1 {
            stayed += 1;
            assert_eq!(numbers, own, "flow {flow} lost or repeated a frame");
        } else {
            assert!(at.contains(&remote(1)) || at.contains(&remote(4)), "flow {flow} moved from {:?}", shares(&at));
        }
    }
    eprintln!("{stayed} of 97 flows stayed through four changes");
    assert!((30..97).contains(&stayed), "{stayed} flows stayed");
    assert_same_frames(&frames[..sent as usize], &inner_frames(&copies));
    assert_eq!(lab.session().drops(), 0);
}
