//! A large corpus for filters: each kind of packet bare and in each wrapping, with headers varied, wrong and cut.
//!
//! What is sent gets no answer: destinations are nobody's, groups nobody has joined, options only padding.

use std::collections::HashSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::frames::{
    self, BROADCAST, DESTINATION, ETH_8021AD, ETH_8021Q, ETH_ARP, ETH_IPV4, ETH_IPV6, ETH_MPLS, ETH_OLD_QINQ,
    ETH_PPPOE_SESSION, ETH_TEB, Ends, FRAGMENT, Family, GRE, HOP_BY_HOP, ICMP, ICMPV6, Ipv4, TCP, UDP, ethernet, icmp,
    icmpv6, ipv4, ipv6, payload, tagged, tcp, udp,
};

const IGMP: u8 = 2;
const ROUTING: u8 = 43;
const ESP: u8 = 50;
const AH: u8 = 51;
const OSPF: u8 = 89;
const PIM: u8 = 103;
const VRRP: u8 = 112;
const SCTP: u8 = 132;

const ETH_RARP: u16 = 0x8035;

/// Frames of all kinds that can be sent, no two equal, 14 to 1518 bytes long. 0x8100 and 0x88a8 frames under 20 bytes
/// are missing: the kernel drops them on receive before any hook.
pub(crate) fn many(ends: &Ends) -> Vec<Vec<u8>> {
    let mut all = Many { frames: Vec::new(), known: HashSet::new() };
    frames::corpus_frames(ends).into_iter().for_each(|frame| all.add(frame));
    add_wrapped(&mut all, ends);
    add_addresses(&mut all, ends);
    add_ports(&mut all, ends);
    add_headers(&mut all, ends);
    add_link_protocols(&mut all, ends);
    add_lengths(&mut all, ends);
    add_cut(&mut all, ends);
    all.frames
}

/// Frames that a capture may hold but no interface takes or passes on: shorter than an Ethernet header, or cut within a
/// tag.
pub(crate) fn unsendable(ends: &Ends) -> Vec<Vec<u8>> {
    let plain = frames::ipv4_udp(ends, 1, 50);
    let runts = (1..14).map(|len| plain[..len].to_vec());
    let inner = frames::ipv4_tcp(ends, 2, 50);
    let short = [ETH_8021Q, ETH_8021AD].into_iter().flat_map(|tpid| {
        let frame = tagged(tpid, 10, &inner);
        (14..20).map(move |len| frame[..len].to_vec())
    });
    runts.chain(short).collect()
}

struct Many {
    frames: Vec<Vec<u8>>,
    known: HashSet<Vec<u8>>,
}

impl Many {
    fn add(&mut self, frame: Vec<u8>) {
        if self.known.insert(frame.clone()) {
            self.frames.push(frame);
        }
    }

    /// A number that no other frame has.
    fn n(&self) -> u32 {
        self.frames.len() as u32 + 1
    }

    fn add_ipv4(&mut self, ends: &Ends, packet: &[u8]) {
        self.add(ethernet(ends, ETH_IPV4, packet));
    }

    fn add_ipv6(&mut self, ends: &Ends, packet: &[u8]) {
        self.add(ethernet(ends, ETH_IPV6, packet));
    }
}

// ---- packets ----

fn id(n: u32) -> Ipv4<'static> {
    Ipv4 { id: n as u16, ..Ipv4::default() }
}

/// SCTP with an INIT chunk's type; nobody looks at the checksum.
fn sctp(ports: (u16, u16), n: u32) -> Vec<u8> {
    [&ports.0.to_be_bytes()[..], &ports.1.to_be_bytes(), &[0; 8], &[1, 0, 0, 20], &payload(n, 16)].concat()
}

fn icmp_of_type(kind: u8, code: u8, n: u32) -> Vec<u8> {
    let mut message = icmp(&payload(n, 40));
    (message[0], message[1]) = (kind, code);
    message
}

/// One IPv4 packet of each kind, each with its number.
fn ipv4_packets(e: &Ends, n: u32) -> Vec<Vec<u8>> {
    let data = payload(n, 24);
    let web = |flags, data: &[u8]| tcp(e, Family::V4, (40000, 80), n, flags, data);
    let middle = Ipv4 { fragment: 0x2000 | 4, ..id(n) };
    vec![
        ipv4(e, TCP, Ipv4 { fragment: 0x4000, ..id(n) }, &web(0x02, &[])),
        ipv4(e, TCP, Ipv4 { options: &[1; 8], ..id(n) }, &web(0x18, &data)),
        ipv4(e, UDP, id(n), &udp(e, Family::V4, (5353, 53), &data)),
        ipv4(e, UDP, Ipv4 { fragment: 0x2000, ..id(n) }, &udp(e, Family::V4, (4000, 4001), &data)),
        ipv4(e, UDP, middle, &data),
        ipv4(e, SCTP, id(n), &sctp((2905, 36412), n)),
        ipv4(e, ICMP, id(n), &icmp(&data)),
        ipv4(e, ICMP, id(n), &icmp_of_type(3, 1, n)),
    ]
}

/// One IPv6 packet of each kind.
fn ipv6_packets(e: &Ends, n: u32) -> Vec<Vec<u8>> {
    let data = payload(n, 24);
    let datagram = udp(e, Family::V6, (5353, 53), &data);
    let hop_by_hop = [&[UDP, 0, 1, 4, 0, 0, 0, 0], &datagram[..]].concat();
    let last = [&[TCP, 0, 0, 64], &n.to_be_bytes()[..], &data].concat();
    vec![
        ipv6(e, TCP, &tcp(e, Family::V6, (40000, 443), n, 0x02, &data)),
        ipv6(e, UDP, &datagram),
        ipv6(e, ICMPV6, &icmpv6(e, &data)),
        ipv6(e, HOP_BY_HOP, &hop_by_hop),
        ipv6(e, FRAGMENT, &last),
    ]
}

fn arp_of(e: &Ends, operation: u8) -> Vec<u8> {
    let mut frame = frames::arp(e);
    frame[21] = operation;
    frame
}

// ---- wrappings ----

/// A wrapping takes an ethertype and what follows it.
type Wrap = fn(&Ends, u16, &[u8]) -> Vec<u8>;

const WRAPPINGS: [Wrap; 16] = [
    ethernet,
    |e, ethertype, packet| tagged(ETH_8021Q, 10, &ethernet(e, ethertype, packet)),
    |e, ethertype, packet| tagged(ETH_8021Q, 0xe000 | 20, &ethernet(e, ethertype, packet)),
    |e, ethertype, packet| tagged(ETH_8021AD, 10, &ethernet(e, ethertype, packet)),
    |e, ethertype, packet| tagged(ETH_8021AD, 100, &tagged(ETH_8021Q, 10, &ethernet(e, ethertype, packet))),
    |e, ethertype, packet| tagged(ETH_8021Q, 10, &tagged(ETH_8021Q, 20, &ethernet(e, ethertype, packet))),
    |e, ethertype, packet| tagged(ETH_OLD_QINQ, 100, &tagged(ETH_8021Q, 10, &ethernet(e, ethertype, packet))),
    |e, ethertype, packet| {
        tagged(ETH_8021Q, 1, &tagged(ETH_8021Q, 2, &tagged(ETH_8021Q, 3, &ethernet(e, ethertype, packet))))
    },
    |e, _, packet| ethernet(e, ETH_MPLS, &[&[0, 1, 0x21, 64], packet].concat()),
    |e, _, packet| ethernet(e, ETH_MPLS, &[&[0, 1, 0x20, 64, 0, 1, 0x31, 64], packet].concat()),
    |e, _, packet| tagged(ETH_8021Q, 10, &ethernet(e, ETH_MPLS, &[&[0, 1, 0x21, 64], packet].concat())),
    |e, ethertype, packet| ethernet(e, ETH_PPPOE_SESSION, &in_pppoe(ethertype, packet)),
    |e, ethertype, packet| tagged(ETH_8021Q, 10, &ethernet(e, ETH_PPPOE_SESSION, &in_pppoe(ethertype, packet))),
    |e, ethertype, packet| {
        let snap = [&[0xaa, 0xaa, 3, 0, 0, 0], &ethertype.to_be_bytes()[..], packet].concat();
        ethernet(e, snap.len() as u16, &snap)
    },
    |e, ethertype, packet| {
        let body = [&[0, 0], &ETH_TEB.to_be_bytes()[..], &ethernet(e, ethertype, packet)].concat();
        ethernet(e, ETH_IPV4, &ipv4(e, GRE, Ipv4::default(), &body))
    },
    |e, ethertype, packet| {
        let header = [0x01, 0, 0x65, 0x58, 0, 0, 42, 0, 0xff, 0xff, 0x80, 0]; // one option, without data
        let body = [&header[..], &ethernet(e, ethertype, packet)].concat();
        ethernet(e, ETH_IPV4, &ipv4(e, UDP, Ipv4::default(), &udp(e, Family::V4, (49152, 6081), &body)))
    },
];

fn in_pppoe(ethertype: u16, packet: &[u8]) -> Vec<u8> {
    let protocol: u16 = if ethertype == ETH_IPV6 { 0x57 } else { 0x21 };
    let len = ((packet.len() + 2) as u16).to_be_bytes();
    [&[0x11, 0, 0, 7], &len[..], &protocol.to_be_bytes(), packet].concat()
}

fn add_wrapped(all: &mut Many, e: &Ends) {
    for wrap in WRAPPINGS {
        for packet in ipv4_packets(e, all.n()) {
            all.add(wrap(e, ETH_IPV4, &packet));
        }
        for packet in ipv6_packets(e, all.n()) {
            all.add(wrap(e, ETH_IPV6, &packet));
        }
        all.add(wrap(e, ETH_ARP, &frames::arp(e)[14..]));
    }
}

// ---- variations of one thing each ----

fn add_addresses(all: &mut Many, e: &Ends) {
    let nets = [[10, 1, 2, 3], [10, 200, 0, 1], [172, 16, 5, 4], [192, 168, 7, 7], [203, 0, 113, 9], [192, 0, 3, 66]];
    for net in nets.map(Ipv4Addr::from) {
        for ends in [e.to_ipv4(net), Ends { src4: net, ..*e }] {
            all.add(frames::ipv4_udp(&ends, all.n(), 30));
            all.add(frames::ipv4_tcp(&ends, all.n(), 30));
        }
    }
    for last in [0x1_0001, 0x2_0002, 0xffff_0001] {
        let bits = 0x2001_0db8 << 96 | last;
        let other = Ipv6Addr::from_bits(bits);
        for ends in [e.to_ipv6(other), Ends { src6: other, ..*e }] {
            all.add(frames::ipv6_udp(&ends, all.n(), 30));
        }
    }
    for mac in [BROADCAST, [2, 0, 0, 0, 0xee, 1], [3, 0, 0, 0, 0xee, 1], [0x01, 0, 0x5e, 0, 0, 0xfb]] {
        all.add(frames::raw(&e.to_mac(mac), all.n(), 64));
        let foreign = Ends { src_mac: [2, 0, 0, 0, 0xee, 2], ..e.to_mac(mac) };
        all.add_ipv4(&foreign, &ipv4(e, UDP, id(all.n()), &udp(e, Family::V4, (7, 7), &payload(all.n(), 20))));
    }
    for group in [[224, 0, 0, 251], [239, 1, 2, 3], [255, 255, 255, 255], [192, 0, 2, 255]] {
        all.add(frames::ipv4_udp(&e.to_mac(BROADCAST).to_ipv4(group.into()), all.n(), 30));
    }
}

fn add_ports(all: &mut Many, e: &Ends) {
    let ports = [(1, 20), (20, 21), (22, 1023), (53, 53), (80, 443), (65535, 4001)];
    for ports in ports {
        let data = payload(all.n(), 20);
        all.add_ipv4(e, &ipv4(e, TCP, id(all.n()), &tcp(e, Family::V4, ports, 9, 0x10, &data)));
        all.add_ipv4(e, &ipv4(e, UDP, id(all.n()), &udp(e, Family::V4, ports, &data)));
        all.add_ipv4(e, &ipv4(e, SCTP, id(all.n()), &sctp(ports, all.n())));
        all.add_ipv6(e, &ipv6(e, TCP, &tcp(e, Family::V6, ports, all.n(), 0x11, &data)));
    }
}

fn add_headers(all: &mut Many, e: &Ends) {
    for flags in [0, 0x01, 0x02, 0x04, 0x08, 0x10, 0x11, 0x12, 0x18, 0x20, 0x29, 0x40, 0x80, 0xc2, 0xff] {
        let data = payload(all.n(), if flags & 0x10 != 0 { 10 } else { 0 });
        all.add_ipv4(e, &ipv4(e, TCP, id(all.n()), &tcp(e, Family::V4, (40000, 80), 7, flags, &data)));
    }
    for offset in [0, 4, 6, 8, 15] {
        let mut segment = tcp(e, Family::V4, (40000, 80), 7, 0x18, &payload(all.n(), 48));
        segment[12] = offset << 4;
        all.add_ipv4(e, &ipv4(e, TCP, id(all.n()), &segment));
    }
    for (kind, code) in [(0, 0), (3, 0), (3, 3), (3, 4), (4, 0), (5, 1), (8, 0), (11, 0), (12, 0), (13, 0), (255, 255)]
    {
        all.add_ipv4(e, &ipv4(e, ICMP, id(all.n()), &icmp_of_type(kind, code, all.n())));
    }
    for kind in [1, 2, 3, 4, 128, 129, 133, 135, 136] {
        let mut message = icmpv6(e, &payload(all.n(), 24));
        message[0] = kind;
        all.add_ipv6(e, &ipv6(e, ICMPV6, &message));
    }
    for proto in [IGMP, GRE, ESP, AH, OSPF, PIM, VRRP, 9, 4, 41, 255] {
        all.add_ipv4(e, &ipv4(e, proto, id(all.n()), &payload(all.n(), 40)));
        all.add_ipv6(e, &ipv6(e, proto, &payload(all.n(), 40)));
    }
    add_ipv4_headers(all, e);
    add_ipv6_headers(all, e);
}

/// Versions, lengths, TTLs and fragment fields, right and wrong.
fn add_ipv4_headers(all: &mut Many, e: &Ends) {
    for first in [0x40, 0x41, 0x44, 0x46, 0x4a, 0x4f, 0x55, 0x65, 0x05, 0xff] {
        let mut packet = ipv4(e, TCP, id(all.n()), &tcp(e, Family::V4, (80, 80), 7, 0x18, &payload(all.n(), 60)));
        packet[0] = first;
        all.add_ipv4(e, &packet);
    }
    for options in [4, 12, 24, 40] {
        let segment = tcp(e, Family::V4, (443, 443), 7, 0x18, &payload(all.n(), 20));
        all.add_ipv4(e, &ipv4(e, TCP, Ipv4 { options: &[1; 40][..options], ..id(all.n()) }, &segment));
    }
    for (at, value) in [(1, 0xb8), (1, 1), (1, 17), (2, 0), (2, 0xff), (3, 10), (8, 0), (8, 1), (8, 3), (8, 128)] {
        let mut packet = ipv4(e, UDP, id(all.n()), &udp(e, Family::V4, (1, 2), &payload(all.n(), 30)));
        packet[at] = value;
        all.add_ipv4(e, &packet);
    }
    for fragment in [0x2000, 0x4000, 0x8000, 0x0001, 0x1fff, 0x3fff, 0x6001] {
        let segment = tcp(e, Family::V4, (22, 22), 7, 0x18, &payload(all.n(), 24));
        all.add_ipv4(e, &ipv4(e, TCP, Ipv4 { fragment, ..id(all.n()) }, &segment));
    }
}

fn add_ipv6_headers(all: &mut Many, e: &Ends) {
    let segment = |n| tcp(e, Family::V6, (40000, 80), n, 0x18, &payload(n, 24));
    let header = |next: u8, rest: &[u8], n: u32| [&[next], rest, &segment(n)].concat();
    let padding = [0, 1, 4, 0, 0, 0, 0];
    for first in [DESTINATION, HOP_BY_HOP] {
        all.add_ipv6(e, &ipv6(e, first, &header(TCP, &padding, all.n())));
        let twice = header(DESTINATION, &padding, 1)[..8].to_vec();
        all.add_ipv6(e, &ipv6(e, first, &[twice, header(TCP, &padding, all.n())].concat()));
    }
    all.add_ipv6(e, &ipv6(e, ROUTING, &header(TCP, &[0, 4, 0, 0, 0, 0, 0], all.n())));
    all.add_ipv6(e, &ipv6(e, AH, &header(TCP, &[1, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1], all.n())));
    for place in [0x0000, 0x0001, 0x0008, 0x0009, 0xfff8] {
        let [high, low] = u16::to_be_bytes(place);
        all.add_ipv6(e, &ipv6(e, FRAGMENT, &header(TCP, &[0, high, low, 0, 0, 0, 9], all.n())));
    }
    for (at, value) in [(0, 0x40), (0, 0x6f), (1, 0xff), (4, 0xff), (5, 0), (7, 0), (7, 255), (6, 59), (6, 135)] {
        let mut packet = ipv6(e, UDP, &udp(e, Family::V6, (1, 2), &payload(all.n(), 30)));
        packet[at] = value;
        all.add_ipv6(e, &packet);
    }
}

fn add_link_protocols(all: &mut Many, e: &Ends) {
    for operation in [2, 3, 8] {
        all.add(arp_of(e, operation));
        let mut reverse = arp_of(e, operation);
        reverse[12..14].copy_from_slice(&ETH_RARP.to_be_bytes());
        all.add(reverse);
    }
    for sap in [0x42, 0xe0, 0xf0, 0xfe, 0xff] {
        for control in [[0x03, 0], [0x00, 0x10], [0x01, 0x11], [0xe3, 0x83]] {
            let body = [&[sap, sap], &control[..], &payload(all.n(), 46)].concat();
            all.add(ethernet(e, body.len() as u16, &body));
        }
    }
    for network in [0x81, 0x82, 0x83] {
        let body = [&[0xfe, 0xfe, 0x03, network], &payload(all.n(), 46)[..]].concat();
        all.add(ethernet(e, body.len() as u16, &body));
    }
    for (oui, ethertype) in [([8, 0, 7], 0x809b_u16), ([0, 0, 0], 0x80f3), ([0, 0, 0], 0x8137), ([0, 0, 0x0c], 0x2000)]
    {
        let body = [&[0xaa, 0xaa, 3], &oui[..], &ethertype.to_be_bytes(), &payload(all.n(), 46)].concat();
        all.add(ethernet(e, body.len() as u16, &body));
    }
    for ethertype in [
        0x0600, 0x05dc, 0x05dd, 0x6001, 0x6002, 0x6003, 0x6004, 0x6007, 0x809b, 0x80f3, 0x8137, 0x8848, 0x888e, 0x88cc,
        0x88e5, 0x88f7, 0x9000, 0xffff,
    ] {
        all.add(ethernet(e, ethertype, &payload(all.n(), 50)));
    }
}

fn add_lengths(all: &mut Many, e: &Ends) {
    for len in [60, 63, 64, 65, 99, 100, 101, 127, 128, 129, 255, 256, 511, 512, 1000, 1023, 1024, 1500, 1513, 1514] {
        all.add(frames::jumbo(e, all.n(), len));
    }
    all.add(tagged(ETH_8021Q, 10, &frames::jumbo(e, all.n(), 1514)));
}

/// Packets that end within their headers.
fn add_cut(all: &mut Many, e: &Ends) {
    let n = all.n();
    let packets = [ipv4_packets(e, n), ipv6_packets(e, n)].concat();
    let bare = |at: usize, ethertype| ethernet(e, ethertype, &packets[at]);
    let whole = [
        bare(1, ETH_IPV4),
        bare(7, ETH_IPV4),
        bare(11, ETH_IPV6),
        frames::arp(e),
        tagged(ETH_8021Q, 30, &bare(0, ETH_IPV4)),
        tagged(ETH_8021AD, 30, &tagged(ETH_8021Q, 31, &bare(2, ETH_IPV4))),
        frames::pppoe_session(e, n),
        WRAPPINGS[15](e, ETH_IPV4, &packets[0]),
    ];
    for frame in &whole {
        let from = if matches!(frame[12..14], [0x81, 0] | [0x88, 0xa8]) { 20 } else { 14 };
        let to = frame.len().min(80);
        (from..to).filter(|len| len % 7 == 2 || *len == 14).for_each(|len| all.add(frame[..len].to_vec()));
    }
}
