//! Filters: what is copied is what tcpdump selects, and changing a filter loses, doubles and breaks nothing.

mod lab;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use lab::capture::{Capture, Direction};
use lab::check::assert_same_frames;
use lab::decode::{Port, decap_gre, inner_frames, tcp_stream};
use lab::faults::{EMPTY_CACHE, Fakes, Fault, hide, in_mounts, real};
use lab::frames::{self, ETH_IPV4, Ends, Family, Ipv4, UDP, ethernet, payload};
use lab::judge::{Said, UP};
use lab::tunnels::raw_packets;
use lab::{Lab, Ns, Options, corpus, pcap};
use serde_json::{Value, json};

// ---- expressions, by kind: each selects some frames of the corpus and not all; the first ones are mirrored too ----

const HOSTS: [&str; 11] = [
    "host 192.0.2.66",
    "src or dst host 10.1.2.3",
    "src and dst net 192.0.2.0/24",
    "dst net 203.0.113.0 mask 255.255.255.0",
    "net 2001:db8::1:0/112",
    "ip host 192.0.2.77 and not ip src host 192.0.2.66",
    "arp host 192.0.2.66",
    "src net 192.168",
    "host 2001:db8::ffff:1 or host 203.0.113.9",
    "rarp src host 192.0.2.66",
    "dst host 255.255.255.255",
];

const PORTS: [&str; 10] = [
    "port 53",
    "tcp src portrange 1-1023",
    "udp dst port 53",
    "src or dst portrange 1-20",
    "src and dst port 53",
    "port 80 or 443",
    "ip6 and tcp dst port 443",
    "sctp port 2905",
    "udp port 4789 or udp port 6081",
    "dst portrange 1024-65535",
];

const LINKS: [&str; 22] = [
    "ether host 02:00:00:00:ee:01",
    "ether dst ff:ff:ff:ff:ff:ff",
    "ether multicast and not broadcast",
    "ether proto 0x88cc",
    "llc s",
    "stp",
    "ipx",
    "atalk or aarp",
    "ether src 02:00:00:00:ee:02",
    "ether broadcast",
    "ether proto \\ip6",
    "ether proto 0xf0",
    "llc",
    "llc i",
    "llc u",
    "llc rr",
    "iso",
    "clnp or esis",
    "isis",
    "netbeui",
    "decnet or lat",
    "moprc or mopdl",
];

const PROTOCOLS: [&str; 18] = [
    "ip",
    "icmp6",
    "sctp",
    "ah or esp",
    "proto 41",
    "ip multicast",
    "ip broadcast",
    "ip6",
    "arp",
    "rarp",
    "tcp",
    "udp",
    "icmp",
    "igmp or igrp",
    "vrrp or pim",
    "ip proto 89",
    "ip6 proto 44",
    "ip6 multicast",
];

const TAGS: [&str; 21] = [
    "vlan",
    "vlan 10",
    "not vlan",
    "vlan 10 and tcp",
    "vlan and vlan",
    "vlan 100 and vlan 10 and udp port 53",
    "vlan and (ip6 or arp)",
    "vlan 0 or ip6",
    "vlan and ether[14:2] & 0xe000 != 0",
    "ether[12:2] = 0x88a8 and ether[16:2] = 0x8100",
    "mpls 18 and mpls 19 and tcp",
    "vlan 10 and mpls and ip6",
    "pppoes 7 and tcp port 80",
    "vlan 10 and pppoes and ip6",
    "geneve 42",
    "vlan and vlan and vlan",
    "ether[14:2] & 0xfff = 10",
    "mpls",
    "pppoes",
    "pppoed",
    "geneve and tcp",
];

const BYTES: [&str; 22] = [
    "ip[0] & 0xf != 5",
    "ip[6:2] & 0x3fff = 0",
    "tcp[tcpflags] & (tcp-syn|tcp-fin) != 0",
    "tcp[((tcp[12] & 0xf0) >> 2):4] = 0x736e6966",
    "icmp[icmptype] = icmp-echo or icmp[icmptype] = icmp-unreach",
    "icmp6[icmp6type] = icmp6-echo",
    "ip6[6] = 0 and ip6[40] = 17",
    "((ip[2:2] - ((ip[0]&0xf)<<2)) - ((tcp[12]&0xf0)>>2)) != 0",
    "ip[8] / ip[1] = 3",
    "(ip[4:2] ^ ip[10:2]) & 1 = 1",
    "ether[len - 4:4] = 0",
    "ip[8] < 5",
    "tcp[tcpflags] = tcp-syn|tcp-ack",
    "icmp[icmpcode] > 2",
    "ether[0] & 1 = 1 and ip[16] < 224",
    "ether[6:4] = 0x02000000 and ether[12:2] > 0x8800",
    "udp[4:2] > 100",
    "ip[8] % ip[1] = 0",
    "ip[2:2] * 3 - 7 > 200",
    "(ip[8] | 1) << ip[1] != ip[8]",
    "ip[4:2] >> (ip[8] & 3) & 3 = 1",
    "ip[ip[8] / 8:2] & 7 = 6",
];

const LENGTHS: [&str; 7] = [
    "less 60",
    "greater 1000",
    "len & 1 = 1",
    "ether[12:2] = len - 14",
    "len > 100 and len <= 129",
    "len % 7 = 3",
    "len - 14 < ip[2:2]",
];

const TOGETHER: [&str; 7] = [
    "not (tcp or udp) and (ip or ip6)",
    "(src host 192.0.2.66 and (tcp or (udp and dst port 53))) or (ip6 and not tcp)",
    "(tcp port 80 or udp port 53) and not (vlan or ip6)",
    "tcp || udp && !ip6",
    "not not tcp",
    "((((udp))))",
    "host 192.0.2.66 and port 53 or ether proto 0x88cc or len = 14",
];

/// Several loads at offsets that the packet tells.
const INDEXED: [&str; 5] = [
    "geneve 42 and tcp",
    "geneve and host 192.0.2.66",
    "geneve 42 and udp port 53",
    "tcp[((tcp[12] & 0xf0) >> 2):4] = 0x736e6966 or tcp[((tcp[12] & 0xf0) >> 2) + 8:2] = 7 or tcp[((tcp[12] & 0xf0) >> 2) + 12:2] = 9 or tcp[((tcp[12] & 0xf0) >> 2) + 16:4] = 1",
    "ip[ip[8]:2] > 7 and ip[ip[9]:2] > 7 and ip[ip[3] - 4:4] > 7 and ip[ip[0] & 31:1] > 7 and ip[ip[1]:4] > 7",
];

/// Expressions at the edges: some select everything, some nothing.
const EDGES: [&str; 14] = [
    "",
    "-len > 0",
    "not ip[100000:4] = 1",
    "ip[65535 * 65537] = 0 or not ip[65535 * 65537] = 0",
    "len >= 0",
    "len > 70000",
    "1 = 1",
    "-ip[0] != 0",
    "ip[100000:4] = 1",
    "ether[0x7fffffff] = 0 or udp",
    "ip[ip[4:4]] = 1",
    "ip[0] / (ip[8] - ip[8]) = 1 or udp",
    "ip[8] << ip[2:2] = 0",
    "link[0] = 2",
];

// ---- what tcpdump selects ----

/// Frames, each with its number in the capture that holds them all.
struct Corpus {
    file: PathBuf,
    frames: Vec<Vec<u8>>,
    numbers: HashMap<Vec<u8>, usize>,
}

impl Corpus {
    fn new(lab: &Lab, frames: Vec<Vec<u8>>) -> Corpus {
        let file = lab.dir().join("corpus.pcap");
        pcap::write(&file, &frames);
        let numbers: HashMap<_, _> = frames.iter().cloned().zip(1..).collect();
        assert_eq!(numbers.len(), frames.len(), "two frames of the corpus are equal");
        Corpus { file, frames, numbers }
    }

    /// Numbers of the frames that tcpdump selects, in order.
    #[track_caller]
    fn selected(&self, expression: &str) -> Vec<usize> {
        let out = self.file.with_extension("selected");
        let mut tcpdump = Command::new("tcpdump");
        tcpdump.arg("-r").arg(&self.file).arg("-w").arg(&out).args(["-Z", "root", "--", expression]);
        let run = tcpdump.output().expect("run tcpdump");
        assert!(run.status.success(), "tcpdump '{expression}': {}", String::from_utf8_lossy(&run.stderr));
        pcap::read(&out).iter().map(|frame| self.numbers[frame]).collect()
    }

    /// The same of an expression that must select some frames and not all.
    #[track_caller]
    fn some_selected(&self, expression: &str) -> Vec<usize> {
        let selected = self.selected(expression);
        let (some, all) = (selected.len(), self.frames.len());
        assert!((1..all).contains(&some), "'{expression}' tells nothing: it selects {some} of {all} frames");
        selected
    }
}

// ---- snifctl ----

/// Mounts that give the lab an object cache of its own, as hundreds of filters would push out what others have there; and
/// a place in memory for the file that `filter test` writes for each packet.
fn own_cache(lab: &Lab) -> Vec<String> {
    let [cache, tmp] = ["cache", "tmp"].map(|name| lab.dir().join(name).display().to_string());
    let script = format!(
        "mkdir -p -m 0755 {cache} {tmp}; mount --bind {cache} /var/cache; mount -t tmpfs tmpfs {tmp}; export TMPDIR={tmp}"
    );
    in_mounts(&script)
}

fn said(lab: &Lab, args: &[&str]) -> Said {
    lab.said_by(&own_cache(lab), args)
}

/// Numbers of the packets that `filter test` says match.
#[track_caller]
fn matched(lab: &Lab, expression: &str, file: &Path) -> Vec<usize> {
    let file = file.to_string_lossy();
    let verdict = said(lab, &["filter", "test", "--json", "-r", &file, "--", expression]).quietly_ok().json();
    numbers(&verdict["matched"])
}

fn numbers(list: &Value) -> Vec<usize> {
    list.as_array().expect("a list").iter().map(|n| n.as_u64().expect("a number") as usize).collect()
}

// ---- every expression by `filter test` ----

fn whole_corpus(lab: &Lab) -> Corpus {
    let ends = Ends::PEER_TO_HOST;
    Corpus::new(lab, [corpus::many(&ends), corpus::unsendable(&ends)].concat())
}

#[track_caller]
fn assert_tested(expressions: &[&str]) {
    let lab = Lab::new();
    let corpus = whole_corpus(&lab);
    for expression in expressions {
        let expected = corpus.some_selected(expression);
        assert_eq!(matched(&lab, expression, &corpus.file), expected, "'{expression}'");
    }
    lab.assert_no_pins();
}

#[test]
fn the_corpus_is_large_and_its_expressions_many() {
    for ends in [Ends::PEER_TO_HOST, Ends::HOST_TO_PEER] {
        let frames = corpus::many(&ends);
        assert!(frames.len() >= 500, "{} frames", frames.len());
        assert!(frames.iter().all(|frame| frame.len() >= 14 && frame.len() <= 1518));
    }
    let expressions: usize = mirrored().iter().map(Vec::len).sum();
    assert!(expressions >= 60, "{expressions} are mirrored");
}

#[test]
fn hosts_are_tested_as_tcpdump_does() {
    assert_tested(&HOSTS);
}

#[test]
fn ports_are_tested_as_tcpdump_does() {
    assert_tested(&PORTS);
}

#[test]
fn link_protocols_are_tested_as_tcpdump_does() {
    assert_tested(&LINKS);
}

#[test]
fn protocols_are_tested_as_tcpdump_does() {
    assert_tested(&PROTOCOLS);
}

#[test]
fn tags_and_tunnels_are_tested_as_tcpdump_does() {
    assert_tested(&TAGS);
}

#[test]
fn bytes_are_tested_as_tcpdump_does() {
    assert_tested(&BYTES);
}

#[test]
fn lengths_are_tested_as_tcpdump_does() {
    assert_tested(&LENGTHS);
}

#[test]
fn expressions_with_and_or_not_are_tested_as_tcpdump_does() {
    assert_tested(&TOGETHER);
}

#[test]
fn expressions_at_the_edges_are_tested_as_tcpdump_does() {
    let lab = Lab::new();
    let corpus = whole_corpus(&lab);
    // With an empty EXPR, `filter test` takes the filter in force.
    for expression in &EDGES[1..] {
        assert_eq!(matched(&lab, expression, &corpus.file), corpus.selected(expression), "'{expression}'");
    }
}

// ---- many expressions by a mirror ----

/// The expressions that are mirrored, those of a session together.
fn mirrored() -> [Vec<&'static str>; 4] {
    [
        [&HOSTS[..7], &PORTS[..7]].concat(),
        [&LINKS[..8], &PROTOCOLS[..7]].concat(),
        TAGS[..15].to_vec(),
        [&BYTES[..11], &LENGTHS[..4], &TOGETHER[..2]].concat(),
    ]
}

/// A mirror of which the collector's capture is read while it runs.
struct Mirror {
    lab: Lab,
    corpus: Corpus,
    capture: Capture,
    read: usize,
}

impl Mirror {
    /// The first half of the corpus comes in, the second goes out.
    fn new() -> Mirror {
        let lab = Lab::roomy();
        let frames = [Ends::PEER_TO_HOST, Ends::HOST_TO_PEER].map(|ends| corpus::many(&ends)).concat();
        let corpus = Corpus::new(&lab, frames);
        said(&lab, &UP).quietly_ok();
        let capture = lab.capture_wire(Ns::Collector, "col0", Direction::In);
        Mirror { lab, corpus, capture, read: 0 }
    }

    /// Sends the corpus, and panics unless the copies are the frames with these numbers.
    #[track_caller]
    fn assert_copies(&mut self, expression: &str, expected: &[usize]) {
        let frames = &self.corpus.frames;
        let half = frames.len() / 2;
        self.lab.send(Ns::Peer, "peer0", &frames[..half]);
        self.lab.send(Ns::Host, "eth0", &frames[half..]);
        self.capture.wait_for(self.read + expected.len());
        self.capture.settle();
        let copied = inner_frames(&decap_gre(&raw_packets(self.capture.pcap())[self.read..]));
        self.read += copied.len();
        let mut copied: Vec<usize> = copied.iter().map(|frame| self.corpus.numbers[frame]).collect();
        copied.sort_unstable();
        assert_eq!(copied, expected, "'{expression}'");
    }
}

/// Each expression in turn is the filter of one session; in the end every packet is counted.
#[track_caller]
fn assert_mirrored(expressions: &[&str]) {
    let mut mirror = Mirror::new();
    for expression in expressions {
        let expected = mirror.corpus.some_selected(expression);
        said(&mirror.lab, &["filter", "set", "--", expression]).quietly_ok();
        mirror.assert_copies(expression, &expected);
    }
    mirror.capture.stop();
    let seen = mirror.corpus.frames.len() * expressions.len();
    assert_counted(&mirror.lab, seen as u64, mirror.read as u64);
}

/// Panics unless the taps have seen so many packets, and copied so many and filtered the rest.
#[track_caller]
fn assert_counted(lab: &Lab, seen: u64, copied: u64) {
    let status = lab.status();
    let session = &status["sessions"][0];
    let counted = ["seen", "filtered", "skipped"].map(|counter| sum(session, |tap| &tap[counter]));
    assert_eq!(counted, [seen, seen - copied, 0], "{session:#}");
    assert_eq!(sum(session, |tap| &tap["stat"]["pcnt"]), copied, "{session:#}");
    assert_eq!(session["remotes"][0]["stat"]["pcnt"], copied, "{session:#}");
}

/// A counter, summed over the taps.
fn sum(session: &Value, counter: impl Fn(&Value) -> &Value) -> u64 {
    let taps = session["taps"].as_array().expect("taps");
    taps.iter().map(|tap| counter(tap).as_u64().expect("a counter")).sum()
}

#[test]
fn hosts_and_ports_are_copied_as_tcpdump_selects() {
    assert_mirrored(&mirrored()[0]);
}

#[test]
fn protocols_are_copied_as_tcpdump_selects() {
    assert_mirrored(&mirrored()[1]);
}

#[test]
fn tags_and_tunnels_are_copied_as_tcpdump_selects() {
    assert_mirrored(&mirrored()[2]);
}

#[test]
fn bytes_and_lengths_are_copied_as_tcpdump_selects() {
    assert_mirrored(&mirrored()[3]);
}

#[test]
fn expressions_at_the_edges_are_copied_as_tcpdump_selects() {
    let mut mirror = Mirror::new();
    for expression in &EDGES[..3] {
        let expected = mirror.corpus.selected(expression);
        said(&mirror.lab, &["filter", "set", "--", expression]).quietly_ok();
        mirror.assert_copies(expression, &expected);
    }
}

/// Where a host bridges, the outermost tag is in the packet's metadata on egress too.
#[test]
fn tags_in_metadata_on_egress_are_seen_by_filters() {
    let lab = Lab::roomy();
    let source = lab.ns_name(Ns::Collector);
    lab.ip_batch(
        Ns::Host,
        &format!(
            "link add br0 type bridge\nlink add in0 type veth peer name src0 netns {source}\n\
             link set in0 addrgenmode none\nlink set br0 addrgenmode none\nlink set in0 master br0\n\
             link set eth0 master br0\nlink set br0 type bridge mcast_snooping 0\nlink set in0 up\nlink set br0 up"
        ),
    );
    lab.ip_batch(Ns::Collector, "link set src0 addrgenmode none\nlink set src0 up");
    said(&lab, &[&UP[..], &["--direction", "egress"]].concat()).quietly_ok();
    let stranger = Ends::PEER_TO_HOST.to_mac([2, 0, 0, 0, 0xee, 1]);
    // Bridges look into bare IP packets, and drop what is wrong with them.
    let bridged = |frame: &Vec<u8>| {
        frame.len() >= 60 && frame[..6] == stranger.dst_mac && matches!(frame[12..14], [0x81, 0] | [0x88, 0xa8])
    };
    let frames = corpus::many(&stranger).into_iter().filter(bridged).collect();
    let corpus = Corpus::new(&lab, frames);
    for expression in ["vlan 10 and tcp", "vlan and vlan", "ether[12:4] = 0x8100000a"] {
        let expected = corpus.some_selected(expression);
        said(&lab, &["filter", "set", "--", expression]).quietly_ok();
        let mut capture = lab.capture_wire(Ns::Collector, "col0", Direction::In);
        lab.send(Ns::Collector, "src0", &corpus.frames);
        let expected: Vec<Vec<u8>> = expected.iter().map(|n| corpus.frames[n - 1].clone()).collect();
        capture.wait_for(expected.len());
        capture.settle();
        assert_same_frames(&expected, &inner_frames(&decap_gre(&capture.stop())));
    }
}

/// Frames of which the kernel keeps the greater part in pages.
#[test]
fn filters_see_the_far_bytes_of_jumbo_frames() {
    let lab = Lab::with(Options { watched_mtu: 9000, out_mtu: 9100, watched_offloads_off: true, ..Options::default() });
    said(&lab, &UP).quietly_ok();
    let jumbo = |ends: &Ends| (1..=60).map(|n| frames::jumbo(ends, n, 9014 - 100 * n as usize)).collect::<Vec<_>>();
    let corpus = Corpus::new(&lab, [Ends::PEER_TO_HOST, Ends::HOST_TO_PEER].map(|ends| jumbo(&ends)).concat());
    for expression in ["ether[8100] & 1 = 0", "ether[4095:4] & 3 > 1", "ether[len - 1] & 1 = 1"] {
        let expected = corpus.some_selected(expression);
        said(&lab, &["filter", "set", "--", expression]).quietly_ok();
        let mut capture = lab.capture(Ns::Collector, "col0", Direction::In);
        lab.send(Ns::Peer, "peer0", &corpus.frames[..60]);
        lab.send(Ns::Host, "eth0", &corpus.frames[60..]);
        let expected: Vec<Vec<u8>> = expected.iter().map(|n| corpus.frames[n - 1].clone()).collect();
        assert_same_frames(&expected, &inner_frames(&decap_gre(&capture.take(expected.len()))));
    }
}

/// A super-packet is as long, for a filter, as the longest frame that it stands for.
#[test]
fn the_length_of_a_super_packet_is_that_of_its_wire_frames() {
    let lab = Lab::roomy();
    up_filtering(&lab, "tcp and len <= 1514");
    let copied = |from: Ns, to: Ns| {
        let mut capture = lab.capture_wire(Ns::Collector, "col0", Direction::In);
        let transfer = lab.tcp_transfer(1 << 20, from, to);
        capture.settle();
        (transfer, inner_frames(&decap_gre(&capture.stop())))
    };
    for (from, to) in [(Ns::Host, Ns::Peer), (Ns::Peer, Ns::Host)] {
        let (transfer, copies) = copied(from, to);
        assert!(tcp_stream(&copies, Port::Dst(transfer.port)) == transfer.data, "the stream from {from:?} differs");
    }
    said(&lab, &["filter", "set", "--", "greater 1515"]).quietly_ok();
    for (from, to) in [(Ns::Host, Ns::Peer), (Ns::Peer, Ns::Host)] {
        assert_eq!(copied(from, to).1.len(), 0, "from {from:?}");
    }
}

// ---- setting and clearing ----

/// `up` with a filter, quietly.
#[track_caller]
fn up_filtering(lab: &Lab, filter: &str) {
    said(lab, &[&UP[..], &["--filter", filter]].concat()).quietly_ok();
}

/// The filter that `status` shows.
fn filter_of(lab: &Lab) -> Value {
    lab.status()["sessions"][0]["filter"].clone()
}

/// All that a change of the filter must leave alone, and all that it may change.
#[derive(Debug, PartialEq, Eq)]
struct Snapshot {
    /// Ids by name of pin.
    taps: Vec<u64>,
    others: Vec<u64>,
    maps: Vec<u64>,
    status: Value,
    machine: String,
}

fn snapshot(lab: &Lab) -> Snapshot {
    let session = lab.pins().join("default");
    let (taps, others) = pins(&session).into_iter().partition(|pin| pin.to_string_lossy().contains("snif_tap_"));
    let of = |kind: &str, pins: Vec<PathBuf>| {
        pins.iter().map(|pin| format!("{kind} show pinned {}", pin.display())).collect()
    };
    Snapshot {
        taps: ids(lab, of("prog", taps)),
        others: ids(lab, of("prog", others)),
        maps: ids(lab, of("map", pins(&session.join("maps")))),
        status: lab.status(),
        machine: lab.machine(),
    }
}

fn pins(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).expect("pins").map(|entry| entry.expect("a pin").path());
    let mut pins: Vec<PathBuf> = entries.filter(|path| !path.is_dir()).collect();
    pins.sort();
    pins
}

/// The ids in bpftool's answers.
fn ids(lab: &Lab, questions: Vec<String>) -> Vec<u64> {
    let script = "printf '%s\\n' \"$@\" | bpftool -j batch file -";
    let words: Vec<&str> = ["sh", "-c", script, "sh"].into_iter().chain(questions.iter().map(String::as_str)).collect();
    let answers: Value = serde_json::from_str(&lab.shown(&words)).expect("JSON of bpftool");
    let ids = answers.as_array().expect("a list").iter().map(|answer| answer["output"]["id"].as_u64());
    ids.map(|id| id.expect("an id")).collect()
}

/// Panics unless only the taps' programs and the filter differ.
#[track_caller]
fn assert_swapped(before: &Snapshot, after: &Snapshot, filter: &Value) {
    assert!(after.taps.len() == 2 && before.taps.iter().all(|id| !after.taps.contains(id)), "{before:?}\n{after:?}");
    assert_eq!((&after.others, &after.maps), (&before.others, &before.maps));
    let mut expected = before.status.clone();
    expected["sessions"][0]["filter"] = filter.clone();
    assert_eq!(after.status, expected);
}

#[test]
fn setting_and_clearing_replace_the_taps_and_keep_maps_and_counters() {
    let lab = Lab::roomy();
    let before = lab.machine();
    said(&lab, &UP).quietly_ok();
    lab.assert_copied(1);
    let plain = snapshot(&lab);
    assert_eq!(plain.status["sessions"][0]["taps"][0]["stat"]["pcnt"], 7);
    said(&lab, &["filter", "set", "--", "udp port 4001"]).quietly_ok();
    let set = snapshot(&lab);
    assert_swapped(&plain, &set, &json!("udp port 4001"));
    lab.assert_copied(1);
    said(&lab, &["filter", "set", "--", "tcp"]).quietly_ok();
    lab.assert_copied(0);
    assert_counted(&lab, 21, 14);
    let filtering = snapshot(&lab);
    said(&lab, &["filter", "clear"]).quietly_ok();
    assert_swapped(&filtering, &snapshot(&lab), &Value::Null);
    lab.assert_copied(1);
    lab.assert_unloaded(&[plain.taps, set.taps, filtering.taps].concat());
    said(&lab, &["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

#[test]
fn the_same_filter_again_and_no_filter_cleared_are_nothing_to_do() {
    let lab = Lab::roomy();
    up_filtering(&lab, "udp port 4001");
    let up = snapshot(&lab);
    said(&lab, &["filter", "set", "--", "udp port 4001"]).ok_noting("already has this filter; nothing to do");
    assert_eq!(snapshot(&lab), up);
    said(&lab, &["filter", "clear"]).quietly_ok();
    let cleared = snapshot(&lab);
    said(&lab, &["filter", "clear"]).ok_noting("has no filter; nothing to do");
    assert_eq!(snapshot(&lab), cleared);
}

#[test]
fn a_filter_can_be_set_in_several_words() {
    let lab = Lab::roomy();
    said(&lab, &UP).quietly_ok();
    said(&lab, &["filter", "set", "udp", "port", "4001", "and", "not", "tcp"]).quietly_ok();
    assert_eq!(filter_of(&lab), "udp port 4001 and not tcp");
    lab.assert_copied(1);
}

#[test]
fn filters_of_two_sessions_are_their_own() {
    let lab = Lab::roomy();
    up_filtering(&lab, "udp");
    said(&lab, &[&UP[..], &["--name", "other", "--filter", "tcp"]].concat()).quietly_ok();
    lab.assert_copied(1);
    said(&lab, &["filter", "set", "--name", "other", "--", "udp port 4001"]).quietly_ok();
    lab.assert_copied(2);
    said(&lab, &["filter", "set", "--name", "default", "--", "icmp"]).quietly_ok();
    lab.assert_copied(1);
    let status = lab.status();
    let filters: Vec<&Value> = (0..2).map(|at| &status["sessions"][at]["filter"]).collect();
    assert_eq!(filters, ["icmp", "udp port 4001"]);
    lab.assert_up(&["default", "other"]);
}

#[test]
fn several_filters_set_at_once_leave_one_of_them_in_force() {
    let lab = Lab::roomy();
    said(&lab, &UP).quietly_ok();
    let filters = ["tcp", "udp port 4001", "icmp"];
    let setting = filters.map(|filter| start(&lab, &["filter", "set", "--", filter]));
    setting.into_iter().for_each(|child| drop(finish(child).quietly_ok()));
    lab.assert_up(&["default"]);
    let filter = filter_of(&lab);
    assert!(filters.iter().any(|known| filter == *known), "{filter}");
    lab.assert_copied(usize::from(filter == "udp port 4001"));
}

fn start(lab: &Lab, args: &[&str]) -> Child {
    start_by(lab, &own_cache(lab), args)
}

fn start_by(lab: &Lab, by: &[String], args: &[&str]) -> Child {
    let mut command = lab.command(Ns::Host, &[]);
    command.args(by).arg(env!("CARGO_BIN_EXE_snifctl")).args(args);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start snifctl")
}

fn finish(child: Child) -> Said {
    child.wait_with_output().expect("wait for snifctl").into()
}

#[test]
fn up_with_the_filter_in_force_is_idempotent_and_with_another_refused() {
    let lab = Lab::roomy();
    let up = |filter: &[&str]| said(&lab, &[&UP[..], filter].concat());
    up(&["--filter", "udp"]).quietly_ok();
    let before = snapshot(&lab);
    up(&["--filter", "udp"]).ok_noting("already up with this request");
    for other in [&["--filter", "tcp"][..], &["--filter", "udp "], &[]] {
        up(other).refused(1, "--filter \"udp\"", "snifctl down --name default");
    }
    assert_eq!(snapshot(&lab), before);
    said(&lab, &["filter", "set", "--", "tcp"]).quietly_ok();
    up(&["--filter", "tcp"]).ok_noting("already up with this request");
    up(&["--filter", "udp"]).refused(1, "--filter \"tcp\"", "snifctl down --name default");
    said(&lab, &["filter", "clear"]).quietly_ok();
    up(&[]).ok_noting("already up with this request");
}

// ---- a swap under load ----

/// Flow A has the odd numbers, flow B the even ones.
const FLOWS: [&str; 2] = ["udp port 1001", "udp port 1002"];

fn numbered(ends: &Ends, n: u32) -> Vec<u8> {
    let port = if n % 2 == 1 { 1001 } else { 1002 };
    let datagram = frames::udp(ends, Family::V4, (port, port), &payload(n, 20));
    ethernet(ends, ETH_IPV4, &frames::ipv4(ends, UDP, Ipv4 { id: n as u16, ..Ipv4::default() }, &datagram))
}

fn number(frame: &[u8]) -> u32 {
    assert_eq!(&frame[42..46], b"snif");
    u32::from_be_bytes(frame[46..50].try_into().expect("four bytes"))
}

/// Frames numbered from 1, at a rate that no queue has to hold, sent from one CPU so that they stay in order; ended on
/// drop.
struct Flows(Child);

impl Flows {
    fn start(lab: &Lab, ns: Ns, dev: &str, ends: &Ends) -> Flows {
        let file = lab.dir().join(format!("{dev}.pcap"));
        pcap::write(&file, &(1..=20_000).map(|n| numbered(ends, n)).collect::<Vec<_>>());
        let file = file.to_string_lossy();
        let paced = ["taskset", "-c", "0", "tcpreplay", "--pps", "1000", "--intf1", dev, &file];
        let mut tcpreplay = lab.command(ns, &paced);
        Flows(tcpreplay.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("start tcpreplay"))
    }
}

impl Drop for Flows {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What is copied of the packets up to `last` when the filter goes from A to B to none: all of A up to a packet, all of B
/// from there up to another, and everything from there.
#[track_caller]
fn assert_two_swaps(copied: &[u32], last: u32) {
    let first_even = *copied.iter().find(|n| *n % 2 == 0).expect("a copy of B");
    // The swap was before this copy, or before the packet of A ahead of it, if that one has no copy.
    let to_b = if copied.contains(&(first_even - 1)) { first_even } else { first_even - 1 };
    let to_all = *copied.iter().find(|n| *n % 2 == 1 && **n > to_b).expect("a copy of A after the filter was cleared");
    let copies = |n: &u32| *n >= to_all || (n % 2 == 1) == (*n < to_b);
    let expected: Vec<u32> = (1..=last).filter(copies).collect();
    assert!(1 < to_b && to_b < to_all && to_all < last, "swapped before {to_b} and {to_all} of {last}");
    assert!(copied == expected, "swapped before {to_b} and {to_all}: {} copies, not {}", copied.len(), expected.len());
}

/// Seen, filtered, skipped and copied by each tap, all of them at their hooks.
fn counters(lab: &Lab) -> Vec<[u64; 4]> {
    let status = lab.status();
    let taps = status["sessions"][0]["taps"].as_array().expect("taps");
    assert!(taps.iter().all(|tap| tap["attached"] == true), "{status:#}");
    let counter = |value: &Value| value.as_u64().expect("a counter");
    let of = |tap: &Value| [&tap["seen"], &tap["filtered"], &tap["skipped"], &tap["stat"]["pcnt"]].map(counter);
    taps.iter().map(of).collect()
}

#[track_caller]
fn assert_not_back(before: &[[u64; 4]], after: &[[u64; 4]]) {
    let back = |(before, after): (&[u64; 4], &[u64; 4])| before.iter().zip(after).any(|(before, after)| after < before);
    assert!(!before.iter().zip(after).any(back), "{before:?} became {after:?}");
}

/// Changes the filter while others look at the counters again and again; then there is some traffic more.
fn swap_watched(lab: &Lab, capture: &mut Capture, args: &[&str], last: &mut Vec<[u64; 4]>) {
    let mut swap = start(lab, args);
    while swap.try_wait().expect("wait for snifctl").is_none() {
        let now = counters(lab);
        assert_not_back(last, &now);
        *last = now;
    }
    finish(swap).quietly_ok();
    let so_far = capture.count();
    capture.wait_for(so_far + 100);
}

#[test]
fn a_swap_under_load_loses_and_doubles_nothing_of_either_side() {
    let lab = Lab::roomy();
    // Compiled now, so that the swaps come while packets flow.
    said(&lab, &UP).quietly_ok();
    FLOWS.iter().rev().for_each(|flow| drop(said(&lab, &["filter", "set", "--", flow]).quietly_ok()));
    let mut capture = lab.capture_wire(Ns::Collector, "col0", Direction::In);
    let before = [lab.packets(Ns::Peer, "peer0").1, lab.packets(Ns::Host, "eth0").1];
    let flows = [("peer0", Ns::Peer, Ends::PEER_TO_HOST), ("eth0", Ns::Host, Ends::HOST_TO_PEER)]
        .map(|(dev, ns, ends)| Flows::start(&lab, ns, dev, &ends));
    capture.wait_for(100);
    let mut last = counters(&lab);
    swap_watched(&lab, &mut capture, &["filter", "set", "--", FLOWS[1]], &mut last);
    swap_watched(&lab, &mut capture, &["filter", "clear"], &mut last);
    drop(flows);
    capture.settle();
    let copies = inner_frames(&decap_gre(&capture.stop()));
    let after = counters(&lab);
    assert_not_back(&last, &after);
    assert!(after.iter().all(|[seen, filtered, skipped, pcnt]| *seen == filtered + skipped + pcnt), "{after:?}");
    let sent = [lab.packets(Ns::Peer, "peer0").1 - before[0], lab.packets(Ns::Host, "eth0").1 - before[1]];
    assert_eq!([after[0][0], after[1][0]], sent, "seen and sent");
    for (mac, sent) in [lab::PEER_MAC, lab::HOST_MAC].into_iter().zip(sent) {
        let of_one: Vec<u32> = copies.iter().filter(|frame| frame[6..12] == mac).map(|frame| number(frame)).collect();
        assert_two_swaps(&of_one, sent as u32);
    }
}

// ---- long filters ----

/// How many instructions tcpdump makes of an expression.
fn instructions(expression: &str) -> usize {
    let tcpdump = Command::new("tcpdump").args(["-y", "EN10MB", "-ddd", "--", expression]).output();
    let text = String::from_utf8(tcpdump.expect("run tcpdump").stdout).expect("text");
    text.lines().next().and_then(|count| count.parse().ok()).expect("a count")
}

/// Frames to a port each, from 2000 on.
fn to_ports(count: u16) -> Vec<Vec<u8>> {
    let ends = Ends::PEER_TO_HOST;
    let frame = |n: u16| {
        let datagram = frames::udp(&ends, Family::V4, (7, 2000 + n), &payload(n.into(), 20));
        ethernet(&ends, ETH_IPV4, &frames::ipv4(&ends, UDP, Ipv4::default(), &datagram))
    };
    (0..count).map(frame).collect()
}

#[test]
fn a_filter_of_300_instructions_verifies_and_works() {
    let terms: Vec<String> = (0..100).map(|n| format!("udp port {}", 2000 + 2 * n)).collect();
    let expression = terms.join(" or ");
    assert!(instructions(&expression) >= 300, "{} instructions", instructions(&expression));
    let lab = Lab::roomy();
    up_filtering(&lab, &expression);
    let mut capture = lab.capture(Ns::Collector, "col0", Direction::In);
    let sent = to_ports(210);
    lab.send(Ns::Peer, "peer0", &sent);
    let expected: Vec<Vec<u8>> = sent.iter().take(200).step_by(2).cloned().collect();
    assert_same_frames(&expected, &inner_frames(&decap_gre(&capture.take(100))));
}

/// As many terms of this form as make at least 300 instructions, each with its number for N.
fn three_hundred(term: &str) -> String {
    let terms = |count: usize| (0..count).map(|n| term.replace('N', &n.to_string())).collect::<Vec<_>>().join(" or ");
    let long = (1..).map(|n| terms(10 * n)).find(|expression| instructions(expression) >= 300);
    long.expect("an expression is long enough")
}

#[test]
fn filters_of_300_instructions_of_any_kind_verify() {
    let lab = Lab::roomy();
    said(&lab, &UP).quietly_ok();
    for term in ["host 10.0.0.N", "tcp[N:4] = N", "ip[ip[N]:4] = N", "tcp[((tcp[12] & 0xf0) >> 2) + N:4] = N"] {
        said(&lab, &["filter", "set", "--", &three_hundred(term)]).quietly_ok();
    }
}

#[test]
fn expressions_with_several_loads_at_an_index_are_tested_as_tcpdump_does() {
    assert_tested(&INDEXED);
}

/// Hosts that take tcpdump half an hour: its time grows with more than the square of the terms.
fn hundred_kilobytes() -> String {
    let mut expression = String::from("host 10.0.0.1");
    for n in 0u32.. {
        let term = format!(" or host {}", std::net::Ipv4Addr::from_bits(0x0a00_0100 + 7 * n));
        if expression.len() + term.len() > 100_000 {
            break;
        }
        expression += &term;
    }
    expression
}

#[test]
fn a_filter_that_takes_tcpdump_too_long_is_refused_and_disturbs_nobody() {
    let lab = Lab::roomy();
    up_filtering(&lab, "udp");
    let (slow, started) = (hundred_kilobytes(), Instant::now());
    assert!(slow.len() > 99_000, "{} bytes", slow.len());
    let patient = [&["nice".to_string()], &own_cache(&lab)[..]].concat();
    let setting = start_by(&lab, &patient, &["filter", "set", "--", &slow]);
    // Meanwhile the session can be used, and changed.
    lab.assert_copied(1);
    said(&lab, &["filter", "set", "--", "udp port 4001"]).quietly_ok();
    let before = snapshot(&lab);
    let refused = finish(setting);
    let took = started.elapsed();
    assert!((20..=25).contains(&took.as_secs()), "it took {took:?}");
    assert!(refused.stderr.len() < 250, "shown short: {refused:#?}");
    refused.refused(1, "EXPR \"host 10.0.0.1 or ", "tcpdump took longer than 20 s");
    assert_eq!(snapshot(&lab), before);
    let left = lab.shown(&["ps", "-eo", "args"]);
    assert!(!left.contains("-ddd -- host 10.0.0.1 or"), "tcpdump still runs");
}

#[test]
fn a_long_filter_that_is_cheap_works() {
    let lab = Lab::roomy();
    let spacious = format!("udp{}and port 4001", " ".repeat(100_000));
    up_filtering(&lab, &spacious);
    lab.assert_copied(1);
    assert_eq!(said(&lab, &["filter", "show"]).quietly_ok().stdout, format!("{spacious}\n"));
    said(&lab, &[&UP[..], &["--filter", &spacious]].concat()).ok_noting("already up with this request");
    let nested = format!("{}tcp{}", "(".repeat(500), ")".repeat(500));
    said(&lab, &["filter", "set", "--", &nested]).quietly_ok();
    lab.assert_copied(0);
}

#[test]
fn a_filter_that_is_longer_than_a_session_can_remember_is_refused() {
    let lab = Lab::roomy();
    said(&lab, &UP).quietly_ok();
    let before = snapshot(&lab);
    let long = format!("udp{}", " ".repeat(125_000));
    for args in [&["filter", "set", "--", &long][..], &[&UP[..], &["--filter", &long]].concat()] {
        said(&lab, args).refused(1, "--filter takes 125003 bytes", "--filter 'net 10.0.0.0/8'");
    }
    assert_eq!(snapshot(&lab), before);
}

// ---- what goes wrong changes nothing ----

/// How messages about an expression end.
const HELP: &str = "see pcap-filter(7), as in: --filter 'tcp port 443 and not net 10.0.0.0/8'";

/// Panics unless the session can be given another filter no more than this refusal allows: everything stays as it was.
#[track_caller]
fn assert_refused(lab: &Lab, by: &[String], expression: &str, names: &str, ends: &str) {
    let before = snapshot(lab);
    lab.said_by(by, &["filter", "set", "--", expression]).refused(1, names, ends);
    assert_eq!(snapshot(lab), before);
    assert!(!lab.pins().join("_new_default").exists(), "half a session is left");
}

#[test]
fn a_filter_that_does_not_compile_changes_nothing() {
    let lab = Lab::roomy();
    up_filtering(&lab, "udp port 4001");
    let by = own_cache(&lab);
    for (expression, reason) in [
        ("tcp prot 80", "syntax error"),
        ("ip[0:3] = 1", "data size must be 1, 2, or 4"),
        ("0 = 1", "expression rejects all packets"),
        ("ip[0] / 0 = 1", "division by zero"),
        ("type mgt", "802.11"),
        ("host nosuch.invalid", "unknown host 'nosuch.invalid'"),
    ] {
        assert_refused(&lab, &by, expression, reason, HELP);
    }
    for expression in ["ip6 protochain 6", "udp or ip protochain 17"] {
        let names = format!("EXPR {expression:?} cannot run in the kernel: it jumps backwards");
        assert_refused(&lab, &by, expression, &names, "as in: ip6 proto 6");
    }
    lab.assert_copied(1);
}

#[test]
fn a_filter_on_what_only_a_socket_knows_is_refused() {
    let lab = Lab::roomy();
    up_filtering(&lab, "udp port 4001");
    let by = own_cache(&lab);
    for expression in ["inbound", "outbound", "not inbound", "ifindex 1", "udp and inbound"] {
        assert_refused(&lab, &by, expression, &format!("EXPR {expression:?}"), "");
    }
}

/// A fake tool that fails with these words when `case` matches its arguments, and is the real one else.
fn failing(tool: &str, case: &str) -> String {
    let real = real(tool);
    format!("#!/bin/sh\ncase \"$*\" in {case}) echo 'said {tool}' >&2; exit 1;; esac\nexec {} \"$@\"\n", real.display())
}

#[test]
fn a_filter_that_clang_or_the_kernel_refuses_changes_nothing() {
    let lab = Lab::roomy();
    up_filtering(&lab, "udp port 4001");
    for (tool, case) in [("clang", "*-target*"), ("bpftool", "'prog loadall'*"), ("tcpdump", "*"), ("tc", "'-batch -'")]
    {
        let fakes = lab.fakes();
        fakes.add(tool, &failing(tool, case));
        let by = [&own_cache(&lab)[..], &fakes.first_in_path()].concat();
        assert_refused(&lab, &by, "tcp port 1", &format!("said {tool}"), "");
    }
    lab.assert_copied(1);
}

#[test]
fn without_tcpdump_only_filters_are_refused() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let ends = "try: apt-get install tcpdump";
    let without = [&own_cache(&lab)[..], &in_mounts(&hide(&["tcpdump"]))].concat();
    lab.said_by(&without, &[&UP[..], &["--filter", "udp"]].concat()).refused(1, "--filter needs it", ends);
    lab.assert_as_before(&before);
    lab.said_by(&without, &UP).quietly_ok();
    lab.assert_copied(1);
    assert_refused(&lab, &without, "udp", "EXPR needs it", ends);
    let file = whole_corpus(&lab).file;
    let test = ["filter", "test", "-r", &file.to_string_lossy(), "--", "udp"];
    lab.said_by(&without, &test).refused(1, "EXPR needs it", ends);
    let fails = lab.said_by(&without, &["doctor"]);
    assert!(fails.stdout.contains("tcpdump"), "{fails:#?}");
    lab.said_by(&without, &["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

#[test]
fn a_filter_for_no_session_is_refused() {
    let lab = Lab::roomy();
    let (start_one, choose) = ("snifctl up IFACE --tunnel gre --remote ADDR", "--name default or --name other");
    for args in
        [&["filter", "set", "udp"][..], &["filter", "clear"], &["filter", "show"], &["filter", "show", "--code"]]
    {
        said(&lab, args).refused(1, "no session is up", start_one);
    }
    lab.assert_no_pins();
    said(&lab, &UP).quietly_ok();
    said(&lab, &[&UP[..], &["--name", "other"]].concat()).quietly_ok();
    for args in [&["filter", "set", "--name", "third", "udp"][..], &["filter", "clear", "--name", "third"]] {
        said(&lab, args).refused(1, "no session third is up", choose);
    }
}

// ---- killed and failed at every step ----

const OLD: &str = "udp port 4001";
const NEW: &str = "udp and not port 1";

/// A session whose filter is being changed by tools that can be made to fail.
struct Bench {
    lab: Lab,
    fakes: Fakes,
    by: Vec<String>,
    before: String,
}

impl Bench {
    fn new() -> Bench {
        let lab = Lab::roomy();
        let before = lab.machine();
        let fakes = lab.counting_fakes();
        let by = [&own_cache(&lab)[..], &fakes.first_in_path()].concat();
        let bench = Bench { lab, fakes, by, before };
        // Compiled now, so that every later run makes the same calls.
        up_filtering(&bench.lab, OLD);
        bench.set(NEW);
        bench.set(OLD);
        bench
    }

    #[track_caller]
    fn set(&self, filter: &str) {
        said(&self.lab, &["filter", "set", "--", filter]).quietly_ok();
        assert_eq!(filter_of(&self.lab), filter);
        self.lab.assert_up(&["default"]);
    }

    /// Sets the new filter while the fault is armed; `None` if it has ended before the call that would go wrong.
    fn run(&self, at: usize, fault: Fault) -> Option<Said> {
        self.fakes.arm(at, fault);
        let said = self.lab.said_by(&self.by, &["filter", "set", "--", NEW]);
        (self.fakes.calls().len() >= at).then_some(said)
    }

    /// Number and lines of input of each call that changes the kernel.
    fn writes(&self) -> Vec<(usize, usize)> {
        self.run(usize::MAX, Fault::Fail { done: None });
        let writing = |call: &&(String, usize)| {
            ["bpftool batch", "bpftool prog load", "tc -batch"].iter().any(|verb| call.0.starts_with(verb))
        };
        let calls: Vec<(String, usize)> = self.fakes.calls().into_iter().zip(1..).collect();
        let at: Vec<usize> = calls.iter().filter(writing).map(|(_, at)| *at).collect();
        self.set(OLD);
        at.into_iter().map(|at| (at, self.input_lines(at))).collect()
    }

    fn input_lines(&self, at: usize) -> usize {
        self.run(at, Fault::Fail { done: Some(0) }).expect("a call");
        self.fakes.input_lines()
    }
}

#[test]
fn a_failed_set_leaves_the_old_filter_whichever_of_its_calls_failed() {
    let bench = Bench::new();
    let (mut at, mut refused) = (1, 0);
    let mut before = snapshot(&bench.lab);
    while let Some(said) = bench.run(at, Fault::Fail { done: None }) {
        if said.status.success() {
            // It does without what that call would have told it.
            assert_eq!(filter_of(&bench.lab), NEW, "{said:#?}");
            bench.set(OLD);
            before = snapshot(&bench.lab);
        } else {
            said.refused(1, "", "");
            assert_eq!(snapshot(&bench.lab), before, "call {at}: {:?}", bench.fakes.calls());
            refused += 1;
        }
        at += 1;
    }
    assert!(refused >= 6, "{refused} of {at} calls made it fail");
    bench.set(OLD);
    bench.lab.assert_copied(1);
}

#[test]
fn a_set_that_failed_half_way_leaves_the_old_filter() {
    let bench = Bench::new();
    let writes = bench.writes();
    assert_eq!(writes.len(), 3, "{writes:?}");
    let before = snapshot(&bench.lab);
    for (at, lines) in writes {
        for done in 0..lines.max(2) {
            assert_old_after(&bench, at, done, &before);
        }
    }
    bench.set(NEW);
}

#[track_caller]
fn assert_old_after(bench: &Bench, at: usize, done: usize, before: &Snapshot) {
    bench.run(at, Fault::Fail { done: Some(done) }).expect("a failure").refused(1, "", "");
    assert_eq!(snapshot(&bench.lab), *before, "call {at} failed after {done} lines");
}

#[test]
fn a_set_whose_last_write_failed_after_all_its_lines_leaves_the_old_filter() {
    let bench = Bench::new();
    let (at, lines) = bench.writes().pop().expect("a write");
    let before = snapshot(&bench.lab);
    assert_old_after(&bench, at, lines, &before);
}

/// Kills `filter set`. Each tap runs the old filter or the new one then, and frames that both take are copied.
#[track_caller]
fn kill(bench: &Bench, at: usize, done: Option<usize>) -> bool {
    let Some(killed) = bench.run(at, Fault::Kill { done }) else { return false };
    assert_eq!(killed.status.signal(), Some(9), "{killed:#?}");
    bench.lab.assert_copied(1);
    true
}

/// Setting it again heals.
#[track_caller]
fn assert_set_heals(bench: &Bench, at: usize, done: Option<usize>) -> bool {
    let killed = kill(bench, at, done);
    if killed {
        said(&bench.lab, &["filter", "set", "--", NEW]).ok();
        assert_eq!(filter_of(&bench.lab), NEW);
        bench.lab.assert_up(&["default"]);
        assert!(!bench.lab.pins().join("_new_default").exists(), "half a session is left");
        bench.set(OLD);
    }
    killed
}

/// `down` leaves the machine as it was.
#[track_caller]
fn assert_down_heals(bench: &Bench, at: usize, done: Option<usize>) {
    assert!(kill(bench, at, done));
    said(&bench.lab, &["down"]).ok();
    bench.lab.assert_as_before(&bench.before);
    up_filtering(&bench.lab, OLD);
}

#[test]
fn a_set_that_was_killed_before_any_of_its_calls_is_healed() {
    let bench = Bench::new();
    let first = bench.writes()[0].0;
    let kills = (first..).take_while(|at| assert_set_heals(&bench, *at, None)).count();
    assert!(kills >= 4, "killed {kills} times");
    bench.set(OLD);
    assert_down_heals(&bench, first + 1, None);
}

#[test]
fn a_set_that_was_killed_within_a_write_is_healed() {
    let bench = Bench::new();
    let writes = bench.writes();
    let [_, (attach, taps), (remember, lines)] = writes[..] else { panic!("{writes:?}") };
    for (at, done) in [(attach, 1), (attach, taps), (remember, 1), (remember, lines)] {
        assert!(assert_set_heals(&bench, at, Some(done)));
    }
    for (at, done) in [(attach, 1), (remember, lines)] {
        assert_down_heals(&bench, at, Some(done));
    }
}

// ---- hostile expressions ----

/// What tcpdump takes works the same way; what it refuses is refused in one line that names the argument.
#[track_caller]
fn assert_same_or_refused(lab: &Lab, corpus: &Corpus, expression: &str) {
    let compiled = Command::new("tcpdump").args(["-y", "EN10MB", "-ddd", "--", expression]).output();
    if compiled.expect("run tcpdump").status.success() {
        assert_eq!(matched(lab, expression, &corpus.file), corpus.selected(expression), "{expression:?}");
        return;
    }
    let file = corpus.file.to_string_lossy();
    said(lab, &["filter", "test", "-r", &file, "--", expression]).refused(1, "EXPR \"", HELP);
    said(lab, &["filter", "set", "--", expression]).refused(1, "EXPR \"", HELP);
    let filter = format!("--filter={expression}");
    said(lab, &[&UP[..], &["--name", "other", &filter]].concat()).refused(1, "--filter \"", HELP);
}

#[test]
fn a_hostile_expression_works_or_is_refused_in_one_line() {
    let lab = Lab::roomy();
    let corpus = whole_corpus(&lab);
    said(&lab, &UP).quietly_ok();
    let marker = lab.dir().join("marker");
    let (shell, write) =
        (format!("udp $(touch {0}) `touch {0}`; touch {0}", marker.display()), format!("-w{}", marker.display()));
    for expression in [
        "-len < 0",
        "--help",
        "-F/etc/passwd",
        "-d",
        &write,
        "--",
        "-",
        "udp\n\nor\ttcp\r\n",
        "\n",
        "udp \\\n or tcp",
        "udp\n*/ return 1; /*",
        "udp /* comment */",
        "udp // comment",
        "udp # comment",
        "udp'",
        "\"udp\"",
        "\\",
        "ether proto \\ip",
        &shell,
        "udp; tcp",
        "udp && tcp || ip",
        "udp | tcp",
        "%s%n%d",
        "{} {0}",
        "udp\u{a0}or tcp",
        "übertragung",
        "\u{1f980}",
        "\u{1b}[31mudp",
        "null",
        "host ::",
        "port 65536",
        "port -1",
        "ip[0] = 4294967296",
        "ip[99999999999999999999] = 1",
        "net 10.0.0.1/8",
        "vlan 4096",
        "((((((((((((((((((((((((((((((",
    ] {
        assert_same_or_refused(&lab, &corpus, expression);
    }
    assert!(!marker.exists(), "an expression was run");
    said(&lab, &["down"]).quietly_ok();
    lab.assert_no_pins();
}

#[test]
fn deep_parentheses_are_refused_in_one_line() {
    let lab = Lab::roomy();
    let deep = format!("{}tcp{}", "(".repeat(50_000), ")".repeat(50_000));
    said(&lab, &[&UP[..], &["--filter", &deep]].concat()).refused(1, "--filter \"((((", HELP);
    lab.assert_no_pins();
}

#[test]
fn an_expression_that_is_no_text_is_refused() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let no_text = OsStr::from_bytes(b"udp\xff");
    for args in [&["filter", "set"][..], &["filter", "test", "-r", "any.pcap"], &["up", "eth0", "--filter"]] {
        let args: Vec<&OsStr> = args.iter().map(OsStr::new).chain([no_text]).collect();
        lab.said(&args).refused(2, "UTF-8", "--help");
    }
    lab.assert_as_before(&before);
}

#[test]
fn options_can_follow_the_expression() {
    let lab = Lab::roomy();
    said(&lab, &UP).quietly_ok();
    let corpus = whole_corpus(&lab);
    let file = corpus.file.to_string_lossy();
    let verdict = said(&lab, &["filter", "test", "tcp port 80", "-r", &file, "--json"]).quietly_ok().json();
    assert_eq!(numbers(&verdict["matched"]), corpus.selected("tcp port 80"));
    said(&lab, &["filter", "set", "tcp port 80", "--name", "default"]).quietly_ok();
    assert_eq!(filter_of(&lab), "tcp port 80");
}

// ---- filter test ----

/// What `filter test` says of this file.
fn tested(lab: &Lab, expression: &str, file: &Path) -> Said {
    said(lab, &["filter", "test", "-r", &file.to_string_lossy(), "--", expression])
}

/// A pcap file of packets of which the capture has kept a part.
fn write_cut(path: &Path, magic: u32, link: u32, packets: &[(Vec<u8>, u32)]) {
    let mut file = Vec::new();
    for word in [magic, 4 << 16 | 2, 0, 0, 262_144, link] {
        file.extend(word.to_ne_bytes());
    }
    for (kept, length) in packets {
        for word in [0, 0, kept.len() as u32, *length] {
            file.extend(word.to_ne_bytes());
        }
        file.extend(kept);
    }
    fs::write(path, file).expect("write a capture");
}

const MICROSECONDS: u32 = 0xa1b2_c3d4;
const NANOSECONDS: u32 = 0xa1b2_3c4d;
const RAW_IP: u32 = 101;

#[test]
fn a_file_that_is_no_capture_of_ethernet_is_refused() {
    let lab = Lab::new();
    let path = |name: &str| lab.dir().join(name);
    fs::write(path("text"), "no capture\n".repeat(20)).expect("write");
    fs::write(path("nothing"), "").expect("write");
    pcap::write(&path("whole"), &frames::series(&Ends::PEER_TO_HOST, 3));
    let whole = fs::read(path("whole")).expect("read");
    fs::write(path("torn"), &whole[..whole.len() - 5]).expect("write");
    write_cut(&path("raw"), MICROSECONDS, RAW_IP, &[(frames::ipv4_udp(&Ends::PEER_TO_HOST, 1, 20)[14..].into(), 48)]);
    let (make, ethernet) = ("tcpdump -i eth0 -w FILE.pcap", "link type 101, not Ethernet (1)");
    for (name, ends) in
        [("missing", make), ("text", make), ("nothing", make), (".", make), ("torn", make), ("raw", ethernet)]
    {
        let names = format!("-r {}", path(name).display()).lines().next().expect("a line").to_owned();
        tested(&lab, "udp", &path(name)).refused(1, &names, ends);
    }
    lab.assert_no_pins();
}

#[test]
fn a_capture_of_an_odd_name_is_refused_in_one_line() {
    let lab = Lab::new();
    tested(&lab, "udp", &lab.dir().join("a\nb")).refused(1, "-r ", "tcpdump -i eth0 -w FILE.pcap");
}

#[test]
fn an_empty_capture_has_no_match() {
    let lab = Lab::new();
    let file = lab.dir().join("empty.pcap");
    pcap::write(&file, &[]);
    assert_eq!(tested(&lab, "udp", &file).quietly_ok().stdout, "0 of 0 packets match\n");
    assert!(matched(&lab, "udp", &file).is_empty());
    lab.assert_no_pins();
}

#[test]
fn matches_are_told_by_their_numbers() {
    let lab = Lab::new();
    let file = lab.dir().join("numbers.pcap");
    let ends = Ends::PEER_TO_HOST;
    let frame = |n: u32| {
        if [1, 2, 3, 5, 8, 9].contains(&n) { frames::ipv4_tcp(&ends, n, 9) } else { frames::raw(&ends, n, 60) }
    };
    pcap::write(&file, &(1..=9).map(frame).collect::<Vec<_>>());
    assert_eq!(tested(&lab, "tcp", &file).quietly_ok().stdout, "6 of 9 packets match: 1-3, 5, 8-9\n");
    let verdict =
        said(&lab, &["filter", "test", "--json", "-r", &file.to_string_lossy(), "--", "tcp"]).quietly_ok().json();
    assert_eq!(verdict, json!({"packets": 9, "matched": [1, 2, 3, 5, 8, 9]}));
}

#[test]
fn a_long_capture_is_tested_to_its_end() {
    let lab = Lab::new();
    let file = lab.dir().join("long.pcap");
    pcap::write(&file, &(1..=4007).map(|n| numbered(&Ends::PEER_TO_HOST, n)).collect::<Vec<_>>());
    let expected: Vec<usize> = (1..=4007).filter(|n| n % 2 == 0).collect();
    assert_eq!(matched(&lab, FLOWS[1], &file), expected);
}

/// Packets without an Ethernet header, down to none at all, and packets of which only a part was kept: `len` is what was on
/// the wire.
#[test]
fn runts_and_cut_packets_are_tested_as_tcpdump_does() {
    let lab = Lab::new();
    let whole = frames::ipv4_tcp(&Ends::PEER_TO_HOST, 7, 400);
    let runts = (0..16).map(|len| (whole[..len].to_vec(), len as u32));
    let cut = [14, 34, 54, 60, 100].map(|kept: usize| (whole[..kept].to_vec(), whole.len() as u32));
    let packets: Vec<(Vec<u8>, u32)> = runts.chain(cut).collect();
    for magic in [MICROSECONDS, NANOSECONDS] {
        let file = lab.dir().join("cut.pcap");
        write_cut(&file, magic, 1, &packets);
        for (expression, expected) in [
            ("len > 400", &[17, 18, 19, 20, 21][..]),
            ("len < 4", &[1, 2, 3, 4]),
            ("greater 14 and less 16", &[15, 16]),
            ("tcp and len = 454", &[18, 19, 20, 21]),
            ("tcp dst port 4003", &[19, 20, 21]),
            ("tcp[30] >= 0", &[21]),
            ("ether[len - 1] >= 0", &(2..=16).collect::<Vec<_>>()),
        ] {
            assert_eq!(matched(&lab, expression, &file), expected, "'{expression}'");
            assert_eq!(tcpdump_count(&file, expression), expected.len(), "'{expression}'");
        }
    }
}

fn tcpdump_count(file: &Path, expression: &str) -> usize {
    let out =
        Command::new("tcpdump").arg("-r").arg(file).args(["--count", "--", expression]).output().expect("run tcpdump");
    let text = String::from_utf8_lossy(&out.stdout);
    text.split(' ').next().and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("'{expression}': {out:?}"))
}

#[test]
fn packets_that_are_longer_than_the_kernel_tests_are_noted() {
    let lab = Lab::new();
    let file = lab.dir().join("jumbo.pcap");
    let sizes = [60, 3000, 3001, 9014, 65_549];
    let frames: Vec<Vec<u8>> = sizes.iter().map(|size| frames::jumbo(&Ends::PEER_TO_HOST, 1, *size)).collect();
    pcap::write(&file, &frames);
    let note = "3 packets are longer than 3000 bytes";
    let said = tested(&lab, "udp and ether[2999] >= 0", &file).ok_noting(note);
    assert_eq!(said.stdout, "4 of 5 packets match: 2-5\n");
    assert_eq!(tested(&lab, "len > 9000", &file).ok_noting(note).stdout, "2 of 5 packets match: 4-5\n");
}

#[test]
fn any_format_that_tcpdump_reads_is_tested() {
    let lab = Lab::new();
    let file = lab.dir().join("classic.pcap");
    let frames: Vec<Vec<u8>> = (1..=30).map(|n| numbered(&Ends::PEER_TO_HOST, n)).collect();
    pcap::write(&file, &frames);
    let swapped = lab.dir().join("swapped.pcap");
    fs::write(&swapped, other_byte_order(&fs::read(&file).expect("read"))).expect("write");
    let next_generation = lab.dir().join("new.pcapng");
    let convert = Command::new("editcap").args(["-F", "pcapng"]).args([&file, &next_generation]).status();
    assert!(convert.expect("run editcap").success());
    assert!(fs::read(&next_generation).expect("read").starts_with(&[0x0a, 0x0d, 0x0d, 0x0a]), "it is pcapng");
    let expected: Vec<usize> = (1..=30).filter(|n| n % 2 == 1).collect();
    for file in [file, swapped, next_generation] {
        assert_eq!(matched(&lab, FLOWS[0], &file), expected, "{}", file.display());
    }
}

/// A pcap file as a machine of the other byte order writes it.
fn other_byte_order(file: &[u8]) -> Vec<u8> {
    let mut file = file.to_vec();
    let mut at = 24;
    file[..4].reverse();
    file[4..6].reverse();
    file[6..8].reverse();
    file[8..24].chunks_mut(4).for_each(<[u8]>::reverse);
    while at < file.len() {
        let kept = u32::from_ne_bytes(file[at + 8..at + 12].try_into().expect("four bytes")) as usize;
        file[at..at + 16].chunks_mut(4).for_each(<[u8]>::reverse);
        at += 16 + kept;
    }
    file
}

#[test]
fn without_an_expression_the_filter_in_force_is_tested() {
    let lab = Lab::roomy();
    let corpus = whole_corpus(&lab);
    let file = corpus.file.to_string_lossy();
    let test = |more: &[&str]| said(&lab, &[&["filter", "test", "--json", "-r", &file], more].concat());
    test(&[]).refused(1, "no session is up", "snifctl up IFACE --tunnel gre --remote ADDR");
    lab.assert_no_pins();
    up_filtering(&lab, "tcp port 80");
    said(&lab, &[&UP[..], &["--name", "other"]].concat()).quietly_ok();
    let verdict = |more: &[&str]| numbers(&test(more).quietly_ok().json()["matched"]);
    assert_eq!(verdict(&[]), corpus.selected("tcp port 80"));
    assert_eq!(verdict(&["--name", "other"]), corpus.selected(""));
    said(&lab, &["filter", "set", "--name", "other", "--", "vlan"]).quietly_ok();
    assert_eq!(verdict(&["--name", "other"]), corpus.selected("vlan"));
}

#[test]
fn testing_leaves_a_running_session_alone() {
    let lab = Lab::roomy();
    up_filtering(&lab, OLD);
    let corpus = whole_corpus(&lab);
    let before = snapshot(&lab);
    assert_eq!(matched(&lab, "tcp", &corpus.file), corpus.selected("tcp"));
    tested(&lab, "tcp prot", &corpus.file).refused(1, "EXPR \"tcp prot\"", HELP);
    assert_eq!(snapshot(&lab), before);
    let pins: Vec<_> = fs::read_dir(lab.pins()).expect("pins").map(|pin| pin.expect("a pin").file_name()).collect();
    assert!(pins.iter().all(|pin| pin == "default" || pin == "_clsact"), "{pins:?}");
}

#[test]
fn a_test_that_was_killed_is_cleaned_up_by_the_next_and_by_down() {
    let lab = Lab::roomy();
    let corpus = whole_corpus(&lab);
    let file = corpus.file.to_string_lossy();
    let fakes = lab.counting_fakes();
    let by = [&own_cache(&lab)[..], &fakes.first_in_path()].concat();
    let args = ["filter", "test", "-r", &file, "--", "tcp"];
    // Compiled by the first run, so that every later one makes the same calls.
    matched(&lab, "tcp", &corpus.file);
    lab.said_by(&by, &args).quietly_ok();
    let running =
        fakes.calls().iter().position(|call| call.starts_with("bpftool -j batch")).expect("the call that runs it");
    for by_test in [true, false] {
        fakes.arm(running + 1, Fault::Kill { done: None });
        let killed = lab.said_by(&by, &args);
        assert_eq!(killed.status.signal(), Some(9), "{killed:#?}");
        assert_eq!(fs::read_dir(lab.pins()).expect("pins").count(), 1);
        match by_test {
            true => assert_eq!(matched(&lab, "tcp", &corpus.file), corpus.selected("tcp")),
            false => drop(said(&lab, &["down"]).ok()),
        }
        lab.assert_no_pins();
    }
}

#[test]
fn a_test_whose_calls_fail_leaves_nothing() {
    let lab = Lab::roomy();
    let corpus = whole_corpus(&lab);
    let file = corpus.file.to_string_lossy();
    let fakes = lab.counting_fakes();
    let by = [&own_cache(&lab)[..], &fakes.first_in_path()].concat();
    let args = ["filter", "test", "-r", &file, "--", "tcp"];
    // Compiled by the first run, so that every later one makes the same calls.
    matched(&lab, "tcp", &corpus.file);
    lab.said_by(&by, &args).quietly_ok();
    let calls = fakes.calls().len();
    let mut refused = 0;
    for at in 1..=calls {
        fakes.arm(at, Fault::Fail { done: None });
        let said = lab.said_by(&by, &args);
        assert!(fakes.calls().len() >= at, "it made {calls} calls before");
        lab.assert_no_pins();
        // It does without knowing how old a tool is.
        let call = &fakes.calls()[at - 1];
        if !call.ends_with("version") && !call.ends_with(" -V") {
            said.refused(1, "", "");
            refused += 1;
        }
    }
    assert!(refused >= 3, "{refused} of {calls} calls made it fail");
}

// ---- filter show ----

#[test]
fn the_filter_is_shown_as_it_was_given() {
    let lab = Lab::roomy();
    let given = "udp\n\tor (ether proto \\ip6 and  not tcp port 80)  ";
    up_filtering(&lab, given);
    assert_eq!(said(&lab, &["filter", "show"]).quietly_ok().stdout, format!("{given}\n"));
    assert_eq!(filter_of(&lab), given);
    let status = said(&lab, &["status"]).quietly_ok();
    assert!(status.stdout.contains("filter"), "{status:#?}");
    let code = said(&lab, &["filter", "show", "--code"]).quietly_ok().stdout;
    assert!(code.contains("filter(struct __sk_buff *skb") && code.contains("load(skb, tagged, 12u, 2, &a)"), "{code}");
    said(&lab, &["filter", "clear"]).quietly_ok();
    for args in [&["filter", "show"][..], &["filter", "show", "--code"]] {
        assert_eq!(said(&lab, args).ok_noting("has no filter: every packet is copied").stdout, "");
    }
}

// ---- dry run ----

/// Runs the lines of a dry run as a person would paste them, and sees the filter at work.
#[track_caller]
fn assert_pasteable(lab: &Lab, mounts: &str, filter: &str) {
    let before = lab.machine();
    let (plan, bin) = (lab.dir().join("plan"), Path::new(env!("CARGO_BIN_EXE_snifctl")).parent().expect("a directory"));
    let script = format!(
        "{mounts}; export TMPDIR={tmp} PATH={bin}:$PATH
        snifctl \"$@\" --dry-run >{plan}
        sh -e {plan}",
        tmp = lab.dir().display(),
        bin = bin.display(),
        plan = plan.display()
    );
    let words = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", &script, "sh"];
    lab.host(&[&words[..], &UP, &["--filter", filter]].concat());
    lab.assert_up(&["default"]);
    assert_eq!(filter_of(lab), filter);
    lab.assert_copied(1);
    lab.send(Ns::Peer, "peer0", &to_ports(5));
    assert_counted(lab, 12, 7);
    said(lab, &[&UP[..], &["--filter", filter]].concat()).ok_noting("already up");
    said(lab, &["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

#[test]
fn the_lines_of_a_dry_run_with_a_filter_can_be_pasted() {
    assert_pasteable(&Lab::roomy(), EMPTY_CACHE, "udp port 4001 or (tcp and not port 80)");
    assert_pasteable(&Lab::roomy(), EMPTY_CACHE, "udp\n\tport 4001 or ether proto \\arp && not host 10.0.0.1");
}

#[test]
fn the_lines_of_a_dry_run_with_a_compiled_filter_can_be_pasted() {
    let lab = Lab::roomy();
    up_filtering(&lab, "-len > 0 and udp port 4001");
    said(&lab, &["down"]).quietly_ok();
    let cached = format!("mount --bind {} /var/cache", lab.dir().join("cache").display());
    assert_pasteable(&lab, &cached, "-len > 0 and udp port 4001");
    let plan = fs::read_to_string(lab.dir().join("plan")).expect("the plan");
    assert!(!plan.contains("clang"), "{plan}");
}

#[test]
fn a_dry_run_with_a_filter_changes_nothing() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let (made, tmp) = (lab.dir().join("made"), lab.dir().join("tmp"));
    fs::create_dir(&tmp).expect("a directory");
    let (shown, tmp) = (made.display(), tmp.display());
    let script = format!("{EMPTY_CACHE}; export TMPDIR={tmp}; \"$@\"; ls -A /var/cache $TMPDIR >{shown}; exit 0");
    let dry = lab.said_by(&in_mounts(&script), &[&UP[..], &["--filter", "udp", "--dry-run"]].concat()).quietly_ok();
    assert_eq!(fs::read_to_string(&made).expect("what was made"), format!("{tmp}:\n\n/var/cache:\n"));
    assert!(dry.stdout.starts_with("snifctl source ") && dry.stdout.contains("--filter udp\n"), "{dry:#?}");
    lab.assert_as_before(&before);
    lab.said(&[&UP[..], &["--filter", "tcp prot", "--dry-run"]].concat()).refused(1, "--filter \"tcp prot\"", HELP);
    lab.assert_as_before(&before);
}
