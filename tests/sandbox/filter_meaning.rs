//! What a filter selects is what tcpdump selects, whatever the expression.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::process::Command;

use crate::lab::capture::{Capture, Direction};
use crate::lab::check::assert_same_frames;
use crate::lab::decode::{Port, decap_gre, inner_frames, tcp_stream};
use crate::lab::filters::{
    Corpus, HELP, assert_counted, assert_tested, filter_of, matched, numbers, said, up_filtering, whole_corpus,
};
use crate::lab::frames::{self, Ends};
use crate::lab::judge::UP;
use crate::lab::tunnels::raw_packets;
use crate::lab::{Lab, Ns, Options, corpus};

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
const EDGES: [&str; 13] = [
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

// ---- every expression by `filter test` ----

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
    for expression in &EDGES {
        assert_eq!(matched(&lab, expression, &corpus.file), corpus.selected(expression), "'{expression}'");
    }
}

#[test]
fn expressions_with_several_loads_at_an_index_are_tested_as_tcpdump_does() {
    assert_tested(&INDEXED);
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
    for expression in &EDGES[..2] {
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
    said(lab, &["filter", "test", "-r", &file, "--", expression]).refused(2, "EXPR \"", HELP);
    said(lab, &["filter", "set", "--", expression]).refused(2, "EXPR \"", HELP);
    let filter = format!("--filter={expression}");
    said(lab, &[&UP[..], &["--name", "other", &filter]].concat()).refused(2, "--filter \"", HELP);
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
    said(&lab, &[&UP[..], &["--filter", &deep]].concat()).refused(2, "--filter \"((((", HELP);
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
