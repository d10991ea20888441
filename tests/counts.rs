//! Loops that end, and losses that are counted: asked = arrived + counted.

mod lab;

use std::collections::BTreeMap;

use lab::capture::Direction;
use lab::check::assert_same_frames;
use lab::decode::{decap_gre, gre_packets, inner_frames};
use lab::frames::{self, Ends};
use lab::judge::{Said, UP, total};
use lab::{Lab, Ns, Options, PATIENCE, poll};
use serde_json::Value;

const SNIFCTL: &str = env!("CARGO_BIN_EXE_snifctl");

/// Runs snifctl with the words of this line in a namespace; panics unless it succeeds.
#[track_caller]
fn line(lab: &Lab, ns: Ns, words: &str) -> Said {
    let mut command = lab.command(ns, &[SNIFCTL]);
    let said = Said::from(command.args(words.split(' ')).output().expect("run snifctl"));
    said.ok()
}

fn session(lab: &Lab, ns: Ns) -> Value {
    line(lab, ns, "status --json").json()["sessions"][0].clone()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no count"))
}

fn of_taps(session: &Value, what: &str) -> u64 {
    session["taps"].as_array().expect("taps").iter().map(|tap| number(&tap[what])).sum()
}

/// Copies asked for, sent, and dropped for this one reason; panics unless that is all.
#[track_caller]
fn tally(session: &Value, reason: &str) -> (u64, u64, u64) {
    let (asked, sent, lost) =
        (total(&session["taps"], "pcnt"), total(&session["remotes"], "pcnt"), number(&session["drops"][reason]));
    assert_eq!(asked, sent + lost, "asked = sent + {reason} in {session:#}");
    (asked, sent, lost)
}

// ---- loops ----

/// The two ends of the watched link, each the other's collector: the words that each `up` ends with, and what each then
/// does with 13 frames that the host sends: copies asked for, sent, and given up as copies of copies.
const PAIRS: [(&str, &str, (u64, u64, u64)); 3] = [
    // The other's copies are known by protocol, key and addresses.
    ("--tunnel gre --id 7", "--tunnel gre --id 7", (13, 13, 0)),
    // Else they are traffic, and copied once: 13 frames, 13 copies of these, 13 copies of those given up.
    ("--tunnel gre --id 7", "--tunnel gre --id 8", (39, 26, 13)),
    ("--tunnel gre", "--tunnel vxlan", (39, 26, 13)),
];

#[test]
fn two_hosts_that_are_each_others_collector_do_not_copy_without_end() {
    for (host, peer, expected) in PAIRS {
        let lab = Lab::with(Options { watched_mtu: 9000, watched_offloads_off: true, ..Options::default() });
        let ends = [(Ns::Host, "eth0"), (Ns::Peer, "peer0")];
        // Nothing listens at either end: the kernel would answer each copy with an ICMP error, which is traffic.
        let silence =
            "table ip t { chain c { type filter hook output priority 0; icmp type destination-unreachable drop; }; }";
        ends.iter().for_each(|(ns, _)| drop(lab.run(*ns, &["nft", silence])));
        let before = ends.map(|(ns, dev)| lab.packets(ns, dev));
        line(&lab, Ns::Host, &format!("up eth0 --remote 192.0.2.2 --max-rate 1gbit {host}"));
        line(&lab, Ns::Peer, &format!("up peer0 --remote 192.0.2.1 --max-rate 1gbit {peer}"));
        lab.send(Ns::Host, "eth0", &frames::series(&Ends::HOST_TO_PEER, 13));
        for ((ns, dev), before) in ends.into_iter().zip(before) {
            let settled = poll(PATIENCE, || (total(&session(&lab, ns)["taps"], "pcnt") >= expected.0).then_some(()));
            assert!(settled.is_some(), "{host} and {peer}: {:#}", session(&lab, ns));
            let session = session(&lab, ns);
            assert_eq!(tally(&session, "depth"), expected, "{ns:?} of {host} and {peer}: {session:#}");
            let passed = poll(PATIENCE, || {
                let (received, sent) = lab.packets(ns, dev);
                (received + sent - before.0 - before.1 == of_taps(&session, "seen") + of_taps(&session, "own"))
                    .then_some(())
            });
            assert!(passed.is_some(), "seen + own = all: {:?} of {dev}, {session:#}", lab.packets(ns, dev));
        }
        ends.iter().for_each(|(ns, _)| drop(line(&lab, *ns, "down")));
    }
}

/// GRE around a frame, between hosts that we do not know.
fn in_gre(ends: &Ends, frame: &[u8]) -> Vec<u8> {
    let body = [&[0, 0], &frames::ETH_TEB.to_be_bytes()[..], frame].concat();
    frames::ethernet(ends, frames::ETH_IPV4, &frames::ipv4(ends, frames::GRE, frames::Ipv4::default(), &body))
}

/// A copy that comes back with other addresses is traffic; a copy of that, come back again, is one too many.
#[test]
fn copies_that_come_back_changed_by_nat_end_soon() {
    let lab = Lab::with(Options { out_mtu: 1700, ..Options::default() });
    line(&lab, Ns::Host, "up eth0 --tunnel gre --remote 198.51.100.2");
    let ends = Ends::PEER_TO_HOST;
    let plain = frames::series(&ends, 7);
    let once: Vec<Vec<u8>> = (0..11).map(|n| frames::gre(&ends, n)).collect();
    let twice: Vec<Vec<u8>> = once.iter().map(|frame| in_gre(&ends, frame)).collect();
    let thrice: Vec<Vec<u8>> = twice.iter().take(5).map(|frame| in_gre(&ends, frame)).collect();
    let foreign: Vec<Vec<u8>> = (0..3).map(|n| in_gre(&ends, &frames::vxlan(&ends, n))).collect();
    let mut collector = lab.capture(Ns::Collector, "col0", Direction::In);
    lab.send(Ns::Peer, "peer0", &[&plain[..], &once, &twice, &thrice, &foreign].concat());
    // VXLAN is not this session's kind of tunnel, and its ends are strangers: how deep it lies does not matter.
    let copied = [plain, once, foreign].concat();
    assert_same_frames(&copied, &inner_frames(&decap_gre(&collector.take(copied.len()))));
    assert_eq!(tally(&session(&lab, Ns::Host), "depth"), (37, 21, 16));
}

/// The link's other end sends our copies back with another source, as a router that translates addresses does.
#[test]
fn copies_that_a_router_sends_back_translated_are_copied_once_more_and_no_further() {
    let lab = Lab::with(Options { watched_mtu: 9000, watched_offloads_off: true, ..Options::default() });
    line(&lab, Ns::Host, "up eth0 --tunnel gre --remote 192.0.2.2 --max-rate 1gbit");
    // 192.0.2.1 becomes 192.0.2.99, the MAC addresses change places, and the packet goes back where it came from.
    let back = "table netdev t { chain c { type filter hook ingress device peer0 priority 0;
        ip protocol 47 ip saddr set 192.0.2.99 ether saddr set 02:00:00:00:01:02 ether daddr set 02:00:00:00:01:01 \
            fwd to peer0; }; }";
    lab.peer(&["nft", back]);
    let mut wire = lab.capture(Ns::Peer, "peer0", Direction::In);
    let frames = frames::series(&Ends::HOST_TO_PEER, 13);
    lab.send(Ns::Host, "eth0", &frames);
    let settled = poll(PATIENCE, || (total(&session(&lab, Ns::Host)["taps"], "pcnt") >= 39).then_some(()));
    assert!(settled.is_some(), "{:#}", session(&lab, Ns::Host));
    // The frames, their copies come back, and the copies of those, which are given up.
    assert_eq!(tally(&session(&lab, Ns::Host), "depth"), (39, 26, 13));
    wire.settle();
    assert_eq!(gre_packets(&wire.stop(), lab::PEER_IP).len(), 26);
}

// ---- losses behind us ----

fn qdisc(lab: &Lab, words: &str) {
    let all = [&["tc", "qdisc", "replace", "dev", "out0", "root"], &words.split(' ').collect::<Vec<_>>()[..]].concat();
    lab.host(&all);
}

/// How many outer packets, of two fragments each, are whole.
fn whole(packets: &[Vec<u8>]) -> u64 {
    let mut parts: BTreeMap<[u8; 2], u64> = BTreeMap::new();
    packets.iter().for_each(|packet| *parts.entry([packet[18], packet[19]]).or_default() += 1);
    parts.values().filter(|count| **count == 2).count() as u64
}

/// The out interface is asked about each fragment.
#[test]
fn a_copy_of_which_the_queue_refuses_a_fragment_counts_once() {
    let lab = Lab::new();
    // A queue that is there at `up`, as at every NIC: then each fragment is a clone, whose fate is told.
    qdisc(&lab, "tbf rate 5mbit burst 3100 limit 8000");
    line(&lab, Ns::Host, &[&UP.join(" "), " --oversize fragment"].concat());
    let mut collector = lab.capture(Ns::Collector, "col0", Direction::In);
    let large: Vec<Vec<u8>> = (0..211).map(|n| frames::jumbo(&Ends::PEER_TO_HOST, n, 1514)).collect();
    lab.send(Ns::Peer, "peer0", &large);
    let (asked, sent, lost) = tally(&session(&lab, Ns::Host), "out");
    assert_eq!(asked, 211);
    assert!(sent > 0 && lost > 0, "{sent} sent, {lost} lost");
    let empty = || lab.shown(&["tc", "-j", "-s", "qdisc", "show", "dev", "out0", "root"]).contains("\"qlen\":0");
    poll(PATIENCE, || empty().then_some(())).expect("the queue runs empty");
    collector.settle();
    assert_eq!(whole(&collector.stop()), sent);
    qdisc(&lab, "pfifo limit 0");
    lab.send(Ns::Peer, "peer0", &large[..13]);
    assert_eq!(tally(&session(&lab, Ns::Host), "out"), (224, sent, lost + 13));
}

/// What is dropped of copies that leave whole is known from the interface alone, by whatever name and queue it has.
#[test]
fn what_out_interfaces_have_dropped_never_falls() {
    let lab = Lab::roomy();
    line(&lab, Ns::Host, &UP.join(" "));
    let dropped = || number(&session(&lab, Ns::Host)["out_dropped"]);
    let send = |n: u32| lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, n));
    qdisc(&lab, "pfifo limit 0");
    send(13);
    assert_eq!(dropped(), 13);
    qdisc(&lab, "pfifo limit 1000");
    send(7);
    assert_eq!(dropped(), 13, "a queue that drops nothing");
    qdisc(&lab, "tbf rate 1gbit burst 100000 limit 100000");
    assert_eq!(dropped(), 13, "a new queue");
    qdisc(&lab, "pfifo limit 0");
    send(11);
    assert_eq!(dropped(), 24, "and another");
    lab.host(&["ip", "link", "set", "dev", "out0", "name", "up0"]);
    send(5);
    assert_eq!(dropped(), 29, "by another name");
    lab.host(&["ip", "link", "del", "dev", "up0"]);
    assert_eq!(dropped(), 29, "without the interface");
    let collector = lab.ns_name(Ns::Collector);
    lab.ip_batch(
        Ns::Host,
        &format!(
            "link add out0 mtu 1600 type veth peer name col0 mtu 1600 netns {collector}\n\
             link set out0 addrgenmode none up\naddress add 198.51.100.1/24 dev out0\n\
             neigh replace 198.51.100.2 lladdr 02:00:00:00:02:02 nud permanent dev out0"
        ),
    );
    lab.ip_batch(Ns::Collector, "link set col0 addrgenmode none up");
    line(&lab, Ns::Host, &UP.join(" "));
    assert_eq!(dropped(), 29, "with another interface of that name");
    qdisc(&lab, "pfifo limit 0");
    send(3);
    assert_eq!(dropped(), 32, "which drops, too");
}
