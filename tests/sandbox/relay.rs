//! The relay: whatever is wrong with it is shown, repaired and counted, and what does not belong to it does not leave by it.
//!
//! Frames whose checksum is still open cross it where the out interface is a veth that would leave them so: datagrams of
//! the host's own do, frames that tcpreplay sends are finished and do not.

use std::fs;
use std::path::Path;

use crate::lab;
use crate::lab::capture::{Direction, tshark_fields};
use crate::lab::check::assert_same_frames;
use crate::lab::decode::{decap_gre, gre_packets, inner_frames, verify_checksums};
use crate::lab::frames::{self, Ends};
use crate::lab::judge::{Said, UP};
use crate::lab::{Lab, Ns, Options, PATIENCE, poll};
use serde_json::Value;

/// A lab in which whatever the host itself sends crosses the relay.
fn crossing_lab(options: Options) -> Lab {
    let lab = Lab::with(options);
    lab.host(&["ethtool", "-K", "out0", "tx", "on", "sg", "on", "tso", "on", "gso", "on"]);
    lab
}

fn roomy() -> Options {
    Options { out_mtu: 1600, ..Options::default() }
}

fn up_with(lab: &Lab, words: &str) -> Said {
    let more: Vec<&str> = words.split(' ').filter(|word| !word.is_empty()).collect();
    lab.said(&[&UP[..], &more].concat()).ok()
}

/// Sends so many datagrams of `bytes` from the host to the port where nobody listens: one write each.
fn datagrams_to(lab: &Lab, to: &str, count: usize, bytes: usize, options: &str) {
    let data = lab.dir().join(format!("data-{bytes}"));
    fs::write(&data, frames::payload(count as u32, count * bytes)).expect("write the data");
    let open = format!("OPEN:{},rdonly", data.display());
    let target = format!("UDP4-SENDTO:{to}:9{options}");
    lab.host(&["socat", "-b", &bytes.to_string(), "-u", &open, &target]);
}

fn datagrams(lab: &Lab, count: usize) {
    datagrams_to(lab, "192.0.2.2", count, 700, "");
}

/// A super-packet of the host: one write that leaves as `count` datagrams of 1000 bytes (UDP_SEGMENT).
fn super_packet(lab: &Lab, count: usize) {
    super_packet_to(lab, "192.0.2.2", count);
}

fn super_packet_to(lab: &Lab, to: &str, count: usize) {
    datagrams_to(lab, to, 1, count * 1000, ",setsockopt-int=17:103:1000");
}

/// What the session has done: copies asked for, sent, and dropped for this one reason; panics unless that is all.
#[track_caller]
fn tally(lab: &Lab, reason: &str) -> (u64, u64, u64) {
    let session = lab.session();
    let (asked, sent) = (session.taps_total().pcnt, session.remotes_total().pcnt);
    let lost = session.dropped(reason);
    assert_eq!(asked, sent + session.drops(), "asked = sent + drops in {session:#}");
    (asked, sent, lost)
}

fn faults(lab: &Lab) -> Vec<String> {
    lab.session().faults
}

/// Levels and details of doctor's checks of this name.
fn doctor(lab: &Lab, name: &str) -> Vec<(String, String)> {
    let report = lab.said(&["doctor", "--json"]).ok().json();
    let checks = report["checks"].as_array().expect("checks").iter().filter(|check| check["name"] == name);
    let text = |check: &Value, key: &str| check[key].as_str().unwrap_or_default().to_string();
    checks.map(|check| (text(check, "level"), format!("{} {}", text(check, "detail"), text(check, "fix")))).collect()
}

// ---- faults ----

/// What is done to the relay, how that is told, and why copies that cross it are lost then, if they are.
const FAULTS: [(&str, &str, Option<&str>); 15] = [
    ("ethtool -K snif0 tx on", "tx-checksumming of snif0 is on", None),
    ("ip link set snif0 down", "snif0 is down", Some("relay")),
    ("ip link set snif0l down", "snif0l is down", Some("relay")),
    ("ip link set snif0p down", "snif0p is down", Some("relay")),
    ("ip link set snif0l mtu 600", "the MTU of snif0l is 600", Some("relay")),
    ("ip link set snif0l type bridge_slave flood off", "the bridge port snif0l does not flood", Some("relay")),
    ("bridge link set dev snif0l state 0", "the bridge port snif0l is disabled", Some("relay")),
    ("ip link set snif0 type bridge stp_state 1", "STP of snif0 is on", None),
    ("ip link set snif0l nomaster", "snif0 has lost its port", Some("relay")),
    (
        "ip link add more0 type veth peer name more1; ip link set more0 master snif0 up",
        "more0 is another port of snif0",
        None,
    ),
    ("tc filter del dev snif0 egress", "snif_encap is not at the egress hook of snif0", Some("clone")),
    ("tc filter del dev snif0l egress", "snif_wire is not at the egress hook of snif0l", Some("relay")),
    ("bpftool map delete pinned $1/devices key hex 00 00 00 00", "the programs do not know snif0", Some("clone")),
    ("ip link del snif0", "its bridge is gone", Some("clone")),
    ("ip link del snif0p", "its port is gone", Some("relay")),
];

#[test]
fn every_fault_of_the_relay_is_shown_and_repaired_and_what_it_cost_is_counted() {
    let lab = crossing_lab(roomy());
    let before = lab.machine();
    up_with(&lab, "--direction egress").quietly_ok();
    assert_eq!(doctor(&lab, "session"), [("ok".into(), "default: in order ".into())]);
    let (ids, maps) = (lab.program_ids(), lab.pins().join("default/maps").to_string_lossy().into_owned());
    let (mut asked, mut lost) = (0, 0);
    for (damage, fault, reason) in FAULTS {
        lab.host(&["sh", "-euc", damage, "sh", &maps]);
        assert!(faults(&lab).iter().any(|told| told.contains(fault)), "{fault} in {:?}", faults(&lab));
        assert!(lab.said(&["status"]).quietly_ok().stdout.contains(fault), "{fault}");
        let mut received = lab.capture(Ns::Peer, "peer0", Direction::In);
        datagrams(&lab, 13);
        received.take(13);
        (asked, lost) = (asked + 13, lost + if reason.is_some() { 13 } else { 0 });
        let reasons = reason.map_or(0, |reason| tally(&lab, reason).2);
        assert!(reason.is_none() || reasons >= 13, "{damage}: {reasons} of {reason:?}: {:#}", lab.session());
        assert_eq!(lab.session().drops(), lost, "{damage}: {:#}", lab.session());
        if damage.starts_with("ethtool") {
            let told = doctor(&lab, "session");
            assert!(told[0].0 == "warn" && told[0].1.contains(fault), "{told:?}");
            let (_, fix) = told[0].1.split_once("snifctl ").expect("a command");
            let said = lab.said(&fix.split(' ').collect::<Vec<_>>()).quietly_ok();
            assert!(said.stdout.starts_with("default: ") && said.stdout.contains(fault), "{said:#?}");
        } else {
            let said = up_with(&lab, "--direction egress").ok();
            assert!(said.stderr.starts_with("snifctl: default: ") && said.stderr.contains(fault), "{said:#?}");
            assert!(said.stderr.ends_with("up with this request, and in order again\n"), "{said:#?}");
        }
        assert_eq!(lab.said(&["sync"]).quietly_ok().stdout, "", "after {damage}");
        assert_eq!(faults(&lab), [""; 0], "after {damage}");
        let mut collector = lab.capture(Ns::Collector, "col0", Direction::In);
        datagrams(&lab, 7);
        inner_frames(&decap_gre(&collector.take(7))).iter().for_each(|frame| verify_checksums(frame));
        asked += 7;
        assert_eq!(lab.session().taps_total().pcnt, asked, "{damage}");
        assert_eq!(lab.program_ids(), ids, "{damage}: the programs are the same");
    }
    lab.host(&["ip", "link", "del", "more0"]);
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

/// A relay is known by its parts, whatever others call one of them, and a stranger with its number is not one.
#[test]
fn a_relay_with_another_alias_goes_with_its_session() {
    let lab = Lab::roomy();
    let before = lab.machine();
    for device in ["snif0", "snif0l", "snif0p"] {
        up_with(&lab, "--direction egress").quietly_ok();
        lab.host(&["ip", "link", "set", "dev", device, "alias", "mine"]);
        lab.said(&["down"]).quietly_ok();
        lab.assert_as_before(&before);
    }
}

/// A port that learns where a MAC address is takes the copies to it with it.
#[test]
fn copies_that_another_port_of_the_relay_takes_are_counted() {
    let lab = crossing_lab(roomy());
    up_with(&lab, "--direction egress").quietly_ok();
    lab.ip_batch(
        Ns::Host,
        "link add more0 type veth peer name more1\nlink set more0 master snif0 up\nlink set more1 up",
    );
    let ends = Ends { src_mac: lab::PEER_MAC, ..Ends::HOST_TO_PEER.to_mac([2, 0, 0, 0, 0, 9]) };
    let ready = || lab.shown(&["bridge", "fdb", "show", "br", "snif0"]).contains("02:00:00:00:01:02");
    let learnt = poll(PATIENCE, || {
        lab.send(Ns::Host, "more1", &[frames::raw(&ends, 1, 100)]);
        ready().then_some(())
    });
    assert!(learnt.is_some(), "{}", lab.shown(&["bridge", "fdb", "show", "br", "snif0"]));
    datagrams(&lab, 13);
    assert_eq!(tally(&lab, "relay"), (13, 0, 13));
    let said = up_with(&lab, "--direction egress").ok();
    assert!(said.stderr.contains("default: relay: more0 is another port of snif0; taken out of it\n"), "{said:#?}");
    datagrams(&lab, 11);
    assert_eq!(tally(&lab, "relay"), (24, 11, 13));
}

/// Rules of the bridge family, by hook and what they do.
const RULES: [(&str, &str, &str); 4] = [
    ("output", "drop", ""),
    ("postrouting", "drop", ""),
    ("output", "accept", "counter drop"),
    ("postrouting", "accept", "oifname \"snif*\" ether type ip drop"),
];

#[test]
fn rules_of_the_bridge_family_that_drop_copies_are_counted_and_named() {
    let lab = crossing_lab(roomy());
    up_with(&lab, "--direction egress").quietly_ok();
    let (mut asked, mut sent) = (0, 0);
    for (hook, policy, rule) in RULES {
        let table =
            format!("table bridge t {{ chain c {{ type filter hook {hook} priority 0; policy {policy}; {rule}; }}; }}");
        lab.host(&["nft", &table.replace("; ; }", "; }")]);
        datagrams(&lab, 13);
        asked += 13;
        assert_eq!(tally(&lab, "relay"), (asked, sent, asked - sent), "{hook} {policy} {rule}");
        let shown = lab.said(&["status"]).quietly_ok().stdout;
        let fix = "nft insert rule bridge t c oifname '\"snif*\"' accept";
        assert!(shown.contains("chain c of nft's table bridge t") && shown.contains(fix), "{shown}");
        let told = doctor(&lab, "bridge");
        assert!(told[0].0 == "warn" && told[0].1.ends_with(fix), "{told:?}");
        let said = up_with(&lab, "--direction egress").stderr;
        assert!(said.lines().any(|line| line.ends_with(fix)), "{said}");
        lab.host(&["sh", "-euc", fix]);
        assert_eq!(doctor(&lab, "bridge"), []);
        datagrams(&lab, 11);
        (asked, sent) = (asked + 11, sent + 11);
        assert_eq!(tally(&lab, "relay"), (asked, sent, asked - sent), "{hook} {policy} {rule} and an exception");
        lab.host(&["nft", "delete table bridge t"]);
    }
    // Rules of the bridge family where copies do not pass do no harm, nor are they named.
    lab.host(&["nft", "table bridge t { chain c { type filter hook forward priority 0; policy drop; }; }"]);
    datagrams(&lab, 7);
    assert_eq!(tally(&lab, "relay"), (asked + 7, sent + 7, asked - sent));
    assert_eq!(doctor(&lab, "bridge"), []);
}

// ---- what crosses ----

/// UDP super-packets that were received as a list of frames: cut again, their checksums are still open.
#[test]
fn frames_of_received_super_packets_are_finished_in_the_copies() {
    for mode in ["segment", "fragment"] {
        let lab = Lab::with(Options { peer_offloads_off: true, ..roomy() });
        lab.ip_batch(Ns::Host, "link add away0 type veth peer name away1\nlink set away0 addrgenmode none arp off up");
        lab.host(&["sh", "-euc", "echo 1 >/proc/sys/net/ipv4/ip_forward; ip route add 203.0.113.0/24 dev away0"]);
        lab.host(&["ethtool", "-K", "eth0", "gro", "on", "rx-gro-list", "on"]);
        lab.peer(&["ip", "route", "add", "203.0.113.0/24", "via", "192.0.2.1"]);
        lab.host(&["ethtool", "-K", "out0", "tx", "on", "sg", "on", "tso", "on", "gso", "on"]);
        let args = ["up", "eth0", "away0", "--tunnel", "gre", "--remote", "198.51.100.2", "--oversize", mode];
        lab.said(&args).ok();
        let mut received = lab.capture(Ns::Host, "eth0", Direction::In);
        let mut collector = lab.capture_wire(Ns::Collector, "col0", Direction::In);
        let data = lab.dir().join("data");
        fs::write(&data, frames::payload(3, 25 * 20_000 - 1000)).expect("write the data");
        let open = format!("OPEN:{},rdonly", data.display());
        lab.peer(&["socat", "-b", "20000", "-u", &open, "UDP4-SENDTO:203.0.113.9:9,setsockopt-int=17:103:1000"]);
        let copies = decap_gre(&collector.take(2 * 499));
        copies.iter().for_each(|copy| verify_checksums(&copy.frame));
        let bad =
            tshark_fields(collector.pcap(), "udp.checksum.status == 0 || ip.checksum.status == 0", &["frame.number"]);
        assert_eq!(bad.len(), 0, "{mode}");
        assert_eq!(tally(&lab, "relay"), (998, 998, 0));
        received.settle();
        let longest = received.stop().iter().map(Vec::len).max();
        assert!(longest > Some(1514), "no super-packet was received: {longest:?}");
    }
}

/// A bridge has an opinion on some addresses; none may keep a copy from crossing.
#[test]
fn frames_to_any_address_and_of_any_length_cross() {
    let lab = crossing_lab(Options { watched_mtu: 65535, out_mtu: 1500, ..Options::default() });
    up_with(&lab, "--direction egress --oversize fragment").ok();
    let links: Value = serde_json::from_str(&lab.shown(&["ip", "-j", "link", "show", "dev", "snif0"])).unwrap();
    let own = links[0]["address"].as_str().expect("a MAC address");
    let macs =
        [own, "00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff", "01:80:c2:00:00:00", "01:80:c2:00:00:0e", "01:00:5e:00:00:09"];
    // The longest frame of which an outer packet can be made has 65,511 bytes.
    let sizes = [1usize, 18, 19, 1430, 1472, 1473, 15_950, 16_000, 32_768, 65_511 - 42];
    let mut wire = lab.capture(Ns::Peer, "peer0", Direction::In);
    let mut collector = lab.capture(Ns::Collector, "col0", Direction::In);
    for (at, mac) in macs.iter().enumerate() {
        let address = format!("192.0.2.{}", 50 + at);
        lab.host(&["ip", "neigh", "replace", &address, "lladdr", mac, "nud", "permanent", "dev", "eth0"]);
        for size in sizes {
            datagrams_to(&lab, &address, 1, size, "");
        }
    }
    let all = macs.len() * sizes.len();
    let sent = wire.take(all);
    assert_eq!(tally(&lab, "relay"), (all as u64, all as u64, 0));
    collector.settle();
    let copies = inner_frames(&decap_gre(&collector.stop()));
    copies.iter().for_each(|frame| verify_checksums(frame));
    assert_same_frames(&without_checksums(&sent), &without_checksums(&copies));
    datagrams_to(&lab, "192.0.2.50", 1, 65_549 - 42, "");
    let (asked, _, lost) = tally(&lab, "too_long");
    assert_eq!((asked, lost), (all as u64 + 1, 1));
}

/// On the watched link the UDP checksum is still open, at bytes 40 and 41.
fn without_checksums(frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let masked = |frame: &Vec<u8>| [&frame[..40], &[0, 0], &frame[42..]].concat();
    frames.iter().map(masked).collect()
}

// ---- what does not belong to the relay ----

/// Packets that an egress hook has dropped, as its clsact qdisc counts them.
fn refused(lab: &Lab, dev: &str) -> u64 {
    let shown = lab.shown(&["tc", "-j", "-s", "qdisc", "show", "dev", dev]);
    let qdiscs: Value = serde_json::from_str(&shown).expect("JSON of tc");
    let clsact = qdiscs.as_array().expect("qdiscs").iter().find(|qdisc| qdisc["kind"] == "clsact");
    clsact.expect("a clsact qdisc")["drops"].as_u64().expect("a count")
}

/// Sends a frame that is refused, which tcpreplay would try without end.
fn send_into(lab: &Lab, dev: &str, frame: &[u8]) {
    let file = lab.dir().join("stray");
    fs::write(&file, frame).expect("write the frame");
    let open = format!("OPEN:{},rdonly", file.display());
    lab.try_host(&["socat", "-u", &open, &format!("INTERFACE:{dev}")]);
}

#[test]
fn foreign_frames_and_the_bridges_own_noise_do_not_leave_and_are_not_counted() {
    let lab = crossing_lab(roomy());
    up_with(&lab, "").quietly_ok();
    let counted = lab.session();
    let mut collector = lab.capture(Ns::Collector, "col0", Direction::In);
    lab.host(&[
        "ip",
        "link",
        "set",
        "snif0",
        "type",
        "bridge",
        "stp_state",
        "1",
        "mcast_snooping",
        "1",
        "mcast_querier",
        "1",
    ]);
    for dev in ["snif0", "snif0l", "snif0p"] {
        lab.host(&["sh", "-c", &format!("echo 1 >/proc/sys/net/ipv6/conf/{dev}/accept_dad")]);
        lab.host(&["ip", "link", "set", dev, "addrgenmode", "eui64"]);
        lab.host(&["ip", "link", "set", dev, "arp", "on"]);
        lab.host(&["ip", "address", "add", "203.0.113.77/32", "dev", dev]);
        let before = refused(&lab, dev);
        let ends = Ends::PEER_TO_HOST;
        let strays = [frames::arp(&ends), frames::stp(&ends, 1), frames::ipv6_udp(&ends, 2, 90), frames::gre(&ends, 3)];
        strays.iter().for_each(|frame| send_into(&lab, dev, frame));
        assert!(refused(&lab, dev) >= before + strays.len() as u64, "{dev}: {} refused", refused(&lab, dev));
    }
    let noise = refused(&lab, "snif0l");
    // Hellos of the spanning tree come each two seconds.
    assert!(poll(PATIENCE, || (refused(&lab, "snif0l") > noise).then_some(())).is_some(), "the bridge made no noise");
    assert_eq!(collector.stop(), Vec::<Vec<u8>>::new());
    let now = lab.session();
    assert_eq!((now.taps, now.remotes), (counted.taps, counted.remotes));
    assert_eq!((now.drops, now.out_dropped), (counted.drops, counted.out_dropped));
}

fn ifindex(lab: &Lab, dev: &str) -> u64 {
    let links: Value = serde_json::from_str(&lab.shown(&["ip", "-j", "link", "show", "dev", dev])).unwrap();
    links[0]["ifindex"].as_u64().expect("a number")
}

#[test]
fn no_interface_that_is_made_after_the_relay_is_gone_gets_a_frame() {
    let lab = crossing_lab(roomy());
    up_with(&lab, "").quietly_ok();
    let numbers = ["snif0", "snif0l", "snif0p"].map(|dev| ifindex(&lab, dev).to_string());
    let sent: Vec<Vec<u8>> = (0..997).map(|n| frames::raw(&Ends::PEER_TO_HOST, n, 100)).collect();
    let file = lab.dir().join("flow.pcap");
    lab::pcap::write(&file, &sent);
    let mut flow = lab.command(Ns::Peer, &["tcpreplay", "--pps=1000", "--intf1=peer0", &file.to_string_lossy()]);
    let mut flow = flow.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
    poll(PATIENCE, || (lab.session().taps_total().pcnt > 0).then_some(())).expect("frames are copied");
    lab.ip_batch(Ns::Host, "link del snif0\nlink del snif0p");
    let made: Vec<String> = (0..6).map(|n| format!("new{n}")).collect();
    for (at, name) in made.iter().enumerate() {
        let number = numbers.get(at).map_or_else(String::new, |number| format!("index {number}"));
        lab.ip_batch(
            Ns::Host,
            &format!(
                "link add {name} {number} type veth peer name {name}p\nlink set {name} addrgenmode none up\n\
                 link set {name}p addrgenmode none up"
            ),
        );
    }
    datagrams(&lab, 13);
    assert!(flow.wait().expect("wait for tcpreplay").success());
    let all = poll(PATIENCE, || (lab.session().taps_total().pcnt >= 997 + 13).then_some(()));
    assert!(all.is_some(), "{:#}", lab.session());
    let (asked, handed, lost) = tally(&lab, "clone");
    assert_eq!(asked, handed + lost);
    assert!(lost > 13, "{lost}");
    for name in made {
        assert_eq!(lab.packets(Ns::Host, &name), (0, 0), "{name}");
    }
}

#[test]
fn no_copy_leaves_by_another_interface_with_the_out_interfaces_number() {
    let lab = Lab::with(roomy());
    up_with(&lab, "--direction ingress").quietly_ok();
    let (number, collector) = (ifindex(&lab, "out0"), lab.ns_name(Ns::Collector));
    lab.host(&["ip", "link", "del", "out0"]);
    let make = format!("link add out0 index {number} mtu 1600 type veth peer name col0 mtu 1600 netns {collector}");
    lab.ip_batch(
        Ns::Host,
        &format!(
            "{make}\nlink set out0 addrgenmode none up\naddress add 198.51.100.1/24 dev out0\n\
             neigh replace 198.51.100.2 lladdr 02:00:00:00:02:02 nud permanent dev out0"
        ),
    );
    lab.ip_batch(Ns::Collector, "link set col0 addrgenmode none up");
    let mut behind = lab.capture(Ns::Collector, "col0", Direction::In);
    lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, 13));
    assert_eq!(tally(&lab, "gone"), (13, 0, 13));
    let said = up_with(&lab, "--direction ingress").ok();
    assert!(said.stderr.starts_with("snifctl: default: remote 198.51.100.2: "), "{said:#?}");
    let frames = frames::series(&Ends::PEER_TO_HOST, 11);
    lab.send(Ns::Peer, "peer0", &frames);
    assert_same_frames(&frames, &inner_frames(&decap_gre(&behind.take(11))));
    assert_eq!(tally(&lab, "gone"), (24, 11, 13));
}

// ---- order and nesting ----

/// Numbers in the tunnel headers, in the order in which copies leave.
fn sequence_numbers(pcap: &Path) -> Vec<u64> {
    let rows = tshark_fields(pcap, "gre.sequence_number", &["gre.sequence_number"]);
    rows.iter().map(|row| row[0].split(',').next().expect("a number").parse().expect("a number")).collect()
}

/// One sender is on one CPU at a time: what it sends is numbered as it leaves. Two CPUs may take numbers in one order and
/// send in another, but none is lost or given twice.
#[test]
fn sequence_numbers_are_in_the_order_in_which_copies_leave() {
    for tunnel in ["gre --sequence", "erspan2", "erspan3"] {
        let lab = crossing_lab(Options::default());
        let words = format!("up eth0 --tunnel {tunnel} --remote 198.51.100.2 --oversize fragment --direction egress");
        lab.said(&words.split(' ').collect::<Vec<_>>()).ok();
        let leaving = |traffic: &dyn Fn()| {
            let mut leaving = lab.capture_wire(Ns::Host, "out0", Direction::Out);
            traffic();
            leaving.settle();
            leaving.stop();
            sequence_numbers(leaving.pcap())
        };
        let numbers = leaving(&|| {
            for _ in 0..3 {
                super_packet(&lab, 17);
                datagrams_to(&lab, "192.0.2.2", 5, 1472, "");
                lab.send(Ns::Host, "eth0", &frames::series(&Ends::HOST_TO_PEER, 7));
            }
        });
        assert_eq!(numbers, (0..87).collect::<Vec<u64>>(), "{tunnel}");
        let mut numbers = leaving(&|| drop(lab.tcp_transfer(300_000, Ns::Host, Ns::Peer)));
        numbers.sort_unstable();
        let (asked, sent, _) = tally(&lab, "relay");
        assert_eq!((asked, numbers), (sent, (87..sent).collect()), "{tunnel}");
    }
}

/// ```text
///     vx0 (203.0.113.1)  on  br0 (192.0.2.1)  on  eth0  ── peer0: the collector, too
/// ```
#[test]
fn devices_that_stand_on_one_another_are_watched_all_at_once() {
    for sessions in [1, 2] {
        let lab = Lab::with(Options { watched_mtu: 9000, watched_offloads_off: true, ..Options::default() });
        lab.ip_batch(
            Ns::Host,
            "address flush dev eth0\nlink add br0 mtu 9000 type bridge mcast_snooping 0\nlink set br0 addrgenmode none\n\
             link set eth0 master br0\nlink set br0 up\naddress add 192.0.2.1/24 dev br0\n\
             neigh replace 192.0.2.2 lladdr 02:00:00:00:01:02 nud permanent dev br0\n\
             link add vx0 mtu 1500 type vxlan id 5 local 192.0.2.1 remote 192.0.2.2 dstport 4790 dev br0\n\
             link set vx0 addrgenmode none\naddress add 203.0.113.1/24 dev vx0\nlink set vx0 up\n\
             neigh replace 203.0.113.2 lladdr 02:00:00:00:09:02 nud permanent dev vx0",
        );
        for key in 1..=sessions {
            let words = format!(
                "up vx0 br0 eth0 --tunnel gre --ttl {key}0 --name s{key} --remote 192.0.2.2 --direction egress"
            );
            lab.said(&format!("{words} --max-rate 1gbit").split(' ').collect::<Vec<_>>()).ok();
        }
        let mut wire = lab.capture(Ns::Peer, "peer0", Direction::In);
        datagrams_to(&lab, "203.0.113.2", 13, 700, "");
        super_packet_to(&lab, "203.0.113.2", 17);
        let packets = wire.take(30 + 90 * sessions);
        let (gre, vxlan): (Vec<_>, Vec<_>) = packets.into_iter().partition(|packet| packet[23] == frames::GRE);
        let copies = inner_frames(&decap_gre(&gre_packets(&gre, lab::PEER_IP)));
        copies.iter().for_each(|frame| verify_checksums(frame));
        let inside: Vec<Vec<u8>> = vxlan.iter().map(|packet| packet[50..].to_vec()).collect();
        let (outer, inner): (Vec<_>, Vec<_>) =
            copies.into_iter().partition(|frame| frame[36..38] == 4790u16.to_be_bytes());
        assert_same_frames(&vec![inside; sessions].concat(), &inner);
        assert_same_frames(&vec![vxlan; 2 * sessions].concat(), &outer);
        for session in lab.status().sessions {
            let (asked, sent) = (session.taps_total().pcnt, session.remotes_total().pcnt);
            assert_eq!((asked, sent, session.drops()), (90, 90, 0), "{session:#}");
        }
    }
}
