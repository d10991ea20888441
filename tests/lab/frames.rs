//! Byte-exact Ethernet frames of every kind that a mirror must copy.
//!
//! Each carries a number in its payload (after the mark "snif", where room permits), so that no two are equal. They go
//! from and to addresses that nobody in the lab has: a receiver takes the frame by its MAC address and then drops it
//! without an answer, so what a test sends is all that passes.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::decode::internet_checksum;
use super::{HOST_MAC, PEER_MAC};

pub(crate) type Mac = [u8; 6];

pub(crate) const BROADCAST: Mac = [0xff; 6];
const ALL_NODES_V4: Mac = [0x01, 0, 0x5e, 0, 0, 0xfb];
const ALL_NODES_V6: Mac = [0x33, 0x33, 0, 0, 0, 0x01];
const LLDP_GROUP: Mac = [0x01, 0x80, 0xc2, 0, 0, 0x0e];
const BRIDGE_GROUP: Mac = [0x01, 0x80, 0xc2, 0, 0, 0];
const CISCO_GROUP: Mac = [0x01, 0, 0x0c, 0xcc, 0xcc, 0xcc];

pub(crate) const ETH_IPV4: u16 = 0x0800;
pub(crate) const ETH_ARP: u16 = 0x0806;
pub(crate) const ETH_TEB: u16 = 0x6558; // transparent Ethernet bridging: a whole frame, in GRE
pub(crate) const ETH_8021Q: u16 = 0x8100;
pub(crate) const ETH_IPV6: u16 = 0x86dd;
pub(crate) const ETH_MPLS: u16 = 0x8847;
pub(crate) const ETH_PPPOE_DISCOVERY: u16 = 0x8863;
pub(crate) const ETH_PPPOE_SESSION: u16 = 0x8864;
pub(crate) const ETH_8021AD: u16 = 0x88a8;
pub(crate) const ETH_LOCAL: u16 = 0x88b5; // IEEE 802 local experimental
pub(crate) const ETH_LLDP: u16 = 0x88cc;
pub(crate) const ETH_OLD_QINQ: u16 = 0x9100;

pub(crate) const HOP_BY_HOP: u8 = 0;
pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const FRAGMENT: u8 = 44;
pub(crate) const GRE: u8 = 47;
pub(crate) const ICMPV6: u8 = 58;
pub(crate) const DESTINATION: u8 = 60;

/// The addresses of a frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ends {
    pub src_mac: Mac,
    pub dst_mac: Mac,
    pub src4: Ipv4Addr,
    pub dst4: Ipv4Addr,
    pub src6: Ipv6Addr,
    pub dst6: Ipv6Addr,
}

const STRANGER_A: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 66);
const STRANGER_B: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 77);
const STRANGER_A6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x66);
const STRANGER_B6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x77);

impl Ends {
    /// To send at peer0: eth0's ingress.
    pub(crate) const PEER_TO_HOST: Ends = Ends {
        src_mac: PEER_MAC,
        dst_mac: HOST_MAC,
        src4: STRANGER_A,
        dst4: STRANGER_B,
        src6: STRANGER_A6,
        dst6: STRANGER_B6,
    };

    /// To send at eth0: eth0's egress.
    pub(crate) const HOST_TO_PEER: Ends = Ends {
        src_mac: HOST_MAC,
        dst_mac: PEER_MAC,
        src4: STRANGER_B,
        dst4: STRANGER_A,
        src6: STRANGER_B6,
        dst6: STRANGER_A6,
    };

    /// The same with another destination MAC.
    pub(crate) fn to_mac(self, dst_mac: Mac) -> Ends {
        Ends { dst_mac, ..self }
    }

    /// The same with another IPv4 destination.
    pub(crate) fn to_ipv4(self, dst4: Ipv4Addr) -> Ends {
        Ends { dst4, ..self }
    }

    /// The same with another IPv6 destination.
    pub(crate) fn to_ipv6(self, dst6: Ipv6Addr) -> Ends {
        Ends { dst6, ..self }
    }
}

/// The IP version whose pseudo header a checksum covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

/// `len` bytes that name the frame: "snif", the number in network order, then a pattern made of it.
pub(crate) fn payload(n: u32, len: usize) -> Vec<u8> {
    let pattern = (0u32..).map(|i| (i.wrapping_mul(7).wrapping_add(n.wrapping_mul(31)) >> 1) as u8);
    b"snif".iter().copied().chain(n.to_be_bytes()).chain(pattern).take(len).collect()
}

/// An Ethernet II frame; never padded.
pub(crate) fn ethernet(ends: &Ends, ethertype: u16, body: &[u8]) -> Vec<u8> {
    [&ends.dst_mac[..], &ends.src_mac, &ethertype.to_be_bytes(), body].concat()
}

/// The frame with a tag put in front of its ethertype (outside of the tags that it has). `tci` is priority and VLAN id.
pub(crate) fn tagged(tpid: u16, tci: u16, frame: &[u8]) -> Vec<u8> {
    [&frame[..12], &tpid.to_be_bytes(), &tci.to_be_bytes(), &frame[12..]].concat()
}

/// The parts of an IPv4 header that differ between the corpus's frames.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ipv4<'a> {
    pub id: u16,
    /// Flags (0x4000 is DF, 0x2000 MF) and the offset in units of 8 bytes.
    pub fragment: u16,
    /// A multiple of four, at most 40 bytes.
    pub options: &'a [u8],
}

/// An IPv4 packet (no Ethernet header).
pub(crate) fn ipv4(ends: &Ends, proto: u8, ip: Ipv4, body: &[u8]) -> Vec<u8> {
    let header_len = 20 + ip.options.len();
    let mut packet = vec![0x40 | (header_len / 4) as u8, 0];
    packet.extend(((header_len + body.len()) as u16).to_be_bytes());
    packet.extend(ip.id.to_be_bytes());
    packet.extend(ip.fragment.to_be_bytes());
    packet.extend([64, proto, 0, 0]);
    packet.extend(ends.src4.octets());
    packet.extend(ends.dst4.octets());
    packet.extend(ip.options);
    let sum = internet_checksum(&[&packet]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(body);
    packet
}

/// An IPv6 packet (no Ethernet header); `next` is the type of the first header in `body`.
pub(crate) fn ipv6(ends: &Ends, next: u8, body: &[u8]) -> Vec<u8> {
    let len = (body.len() as u16).to_be_bytes();
    let fixed = [0x60, 0, 0, 0, len[0], len[1], next, 64];
    [&fixed[..], &ends.src6.octets(), &ends.dst6.octets(), body].concat()
}

/// A UDP datagram with its checksum.
pub(crate) fn udp(ends: &Ends, family: Family, ports: (u16, u16), data: &[u8]) -> Vec<u8> {
    let len = (8 + data.len()) as u16;
    let header = [ports.0.to_be_bytes(), ports.1.to_be_bytes(), len.to_be_bytes(), [0, 0]].concat();
    with_checksum(ends, family, UDP, [&header, data].concat(), 6)
}

/// A TCP segment with its checksum. `flags`: 0x02 SYN, 0x10 ACK, 0x18 PSH and ACK, 0x01 FIN.
pub(crate) fn tcp(ends: &Ends, family: Family, ports: (u16, u16), seq: u32, flags: u8, data: &[u8]) -> Vec<u8> {
    let mut segment = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
    segment.extend(seq.to_be_bytes());
    segment.extend([0, 0, 0, 1, 5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(data);
    with_checksum(ends, family, TCP, segment, 16)
}

/// An ICMP echo request.
pub(crate) fn icmp(data: &[u8]) -> Vec<u8> {
    let mut message = [&[8, 0, 0, 0, 0, 1, 0, 1], data].concat();
    let sum = internet_checksum(&[&message]);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// An ICMPv6 echo request.
pub(crate) fn icmpv6(ends: &Ends, data: &[u8]) -> Vec<u8> {
    with_checksum(ends, Family::V6, ICMPV6, [&[128, 0, 0, 0, 0, 1, 0, 1], data].concat(), 2)
}

/// A message of neighbour discovery that names its sender's MAC address in its last option.
fn discovery(ends: &Ends, kind: u8, rest: &[u8]) -> Vec<u8> {
    let body = [&[kind, 0, 0, 0], rest, &[1, 1], &ends.src_mac].concat();
    let mut packet = ipv6(ends, ICMPV6, &with_checksum(ends, Family::V6, ICMPV6, body, 2));
    packet[7] = 255; // no other one is believed
    ethernet(ends, ETH_IPV6, &packet)
}

/// A router that offers itself, for half an hour, with a prefix to make an address of.
pub(crate) fn router_advertisement(ends: &Ends, router: Ipv6Addr, prefix: Ipv6Addr) -> Vec<u8> {
    let (all, day) = (Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1), 86_400_u32.to_be_bytes());
    let ends = Ends { dst_mac: [0x33, 0x33, 0, 0, 0, 1], src6: router, dst6: all, ..*ends };
    let option = [&[3, 4, 64, 0xc0], &day[..], &day, &[0; 4], &prefix.octets()].concat();
    discovery(&ends, 134, &[&[64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0], &option[..]].concat())
}

/// Asks an address's owner for its MAC address, at that address itself.
pub(crate) fn neighbour_solicitation(ends: &Ends, router: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
    let ends = Ends { dst_mac: BROADCAST, src6: router, dst6: target, ..*ends };
    discovery(&ends, 135, &[&[0; 4], &target.octets()[..]].concat())
}

fn with_checksum(ends: &Ends, family: Family, proto: u8, mut body: Vec<u8>, at: usize) -> Vec<u8> {
    let (src, dst) = match family {
        Family::V4 => (ends.src4.octets().to_vec(), ends.dst4.octets().to_vec()),
        Family::V6 => (ends.src6.octets().to_vec(), ends.dst6.octets().to_vec()),
    };
    let len = (body.len() as u32).to_be_bytes();
    let sum = internet_checksum(&[&src, &dst, &len, &[0, proto], &body]);
    // UDP over IPv4 reads 0 as "no checksum"; all ones is the same sum (and as good for the others).
    let sum = if sum == 0 { 0xffff } else { sum };
    body[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    body
}

/// An IPv4 UDP frame with `len` bytes of data: the plain frame for tests that only count.
pub(crate) fn ipv4_udp(ends: &Ends, n: u32, len: usize) -> Vec<u8> {
    let datagram = udp(ends, Family::V4, (4000, 4001), &payload(n, len));
    ethernet(ends, ETH_IPV4, &ipv4(ends, UDP, Ipv4 { id: n as u16, ..Ipv4::default() }, &datagram))
}

/// An IPv6 UDP frame with `len` bytes of data.
pub(crate) fn ipv6_udp(ends: &Ends, n: u32, len: usize) -> Vec<u8> {
    let datagram = udp(ends, Family::V6, (4000, 4001), &payload(n, len));
    ethernet(ends, ETH_IPV6, &ipv6(ends, UDP, &datagram))
}

/// An IPv4 TCP frame with `len` bytes of data.
pub(crate) fn ipv4_tcp(ends: &Ends, n: u32, len: usize) -> Vec<u8> {
    let segment = tcp(ends, Family::V4, (4002, 4003), 1000 + n, 0x18, &payload(n, len));
    ethernet(ends, ETH_IPV4, &ipv4(ends, TCP, Ipv4 { id: n as u16, fragment: 0x4000, ..Ipv4::default() }, &segment))
}

/// An IPv4 UDP frame that is `frame_len` bytes long (42 to 65,549: the most that an IPv4 length can say).
pub(crate) fn jumbo(ends: &Ends, n: u32, frame_len: usize) -> Vec<u8> {
    ipv4_udp(ends, n, frame_len - 42)
}

/// A frame of an unknown ethertype that is `frame_len` bytes long (14 to 65,549).
pub(crate) fn raw(ends: &Ends, n: u32, frame_len: usize) -> Vec<u8> {
    ethernet(ends, ETH_LOCAL, &payload(n, frame_len - 14))
}

/// `count` IPv4 UDP frames of growing size, numbered from 1.
pub(crate) fn series(ends: &Ends, count: u32) -> Vec<Vec<u8>> {
    (1..=count).map(|n| ipv4_udp(ends, n, 18 + (n as usize * 13) % 1400)).collect()
}

/// An ARP request ("who has") that nobody in the lab answers.
pub(crate) fn arp(ends: &Ends) -> Vec<u8> {
    let fixed = [0, 1, 8, 0, 6, 4, 0, 1];
    let body = [&fixed[..], &ends.src_mac, &ends.src4.octets(), &[0; 6], &ends.dst4.octets()].concat();
    ethernet(&ends.to_mac(BROADCAST), ETH_ARP, &body)
}

/// An LLDP frame: chassis, port, time to live, a description with the number, end.
pub(crate) fn lldp(ends: &Ends, n: u32) -> Vec<u8> {
    let text = payload(n, 24);
    let chassis = [&[0x02, 7, 4], &ends.src_mac[..]].concat();
    let body = [&chassis[..], &[0x04, 3, 7, b'p', b'1', 0x06, 2, 0, 120, 0x08, 24], &text, &[0, 0]].concat();
    ethernet(&ends.to_mac(LLDP_GROUP), ETH_LLDP, &body)
}

/// A spanning tree hello: 802.3 with a length in place of the ethertype and an LLC header; padded to 60 bytes.
pub(crate) fn stp(ends: &Ends, n: u32) -> Vec<u8> {
    let llc = [0x42, 0x42, 0x03];
    let mut bpdu = vec![0; 35];
    bpdu[5..13].copy_from_slice(&payload(n, 8));
    let mut frame = ethernet(&ends.to_mac(BRIDGE_GROUP), 38, &[&llc[..], &bpdu].concat());
    frame.resize(60, 0);
    frame
}

/// 802.3 with LLC and SNAP, as Cisco's discovery protocol uses it.
pub(crate) fn snap(ends: &Ends, n: u32) -> Vec<u8> {
    let body = [&[0xaa, 0xaa, 0x03, 0, 0, 0x0c, 0x20, 0], &payload(n, 80)[..]].concat();
    ethernet(&ends.to_mac(CISCO_GROUP), body.len() as u16, &body)
}

/// MPLS with two labels around an IPv4 packet.
pub(crate) fn mpls(ends: &Ends, n: u32) -> Vec<u8> {
    let labels = [0, 1, 0x20, 64, 0, 1, 0x31, 64]; // 18, then 19 with the bottom-of-stack bit
    ethernet(ends, ETH_MPLS, &[&labels, &ipv4_udp(ends, n, 60)[14..]].concat())
}

/// A PPPoE session frame around an IPv4 packet.
pub(crate) fn pppoe_session(ends: &Ends, n: u32) -> Vec<u8> {
    let packet = ipv4_udp(ends, n, 60)[14..].to_vec();
    let len = ((packet.len() + 2) as u16).to_be_bytes();
    let header = [0x11, 0x00, 0, 7, len[0], len[1], 0, 0x21];
    ethernet(ends, ETH_PPPOE_SESSION, &[&header[..], &packet].concat())
}

/// A PPPoE discovery (PADI) broadcast with the number as Host-Uniq tag.
pub(crate) fn pppoe_discovery(ends: &Ends, n: u32) -> Vec<u8> {
    let header = [0x11, 0x09, 0, 0, 0, 16, 1, 1, 0, 0, 1, 3, 0, 8];
    ethernet(&ends.to_mac(BROADCAST), ETH_PPPOE_DISCOVERY, &[&header[..], &payload(n, 8)].concat())
}

/// One UDP datagram of `len` data bytes as frames with IPv4 fragments, `piece` bytes (a multiple of 8) in each.
pub(crate) fn ipv4_fragments(ends: &Ends, n: u32, len: usize, piece: usize) -> Vec<Vec<u8>> {
    let datagram = udp(ends, Family::V4, (4000, 4001), &payload(n, len));
    let last = (datagram.len() - 1) / piece;
    let fragment = |(i, body): (usize, &[u8])| {
        let more = if i == last { 0 } else { 0x2000 };
        let ip = Ipv4 { id: n as u16, fragment: more | (i * piece / 8) as u16, ..Ipv4::default() };
        ethernet(ends, ETH_IPV4, &ipv4(ends, UDP, ip, body))
    };
    datagram.chunks(piece).enumerate().map(fragment).collect()
}

/// IPv4 with the longest header, 60 bytes: 40 bytes of NOP options.
pub(crate) fn ipv4_max_options(ends: &Ends, n: u32) -> Vec<u8> {
    let datagram = udp(ends, Family::V4, (4000, 4001), &payload(n, 90));
    ethernet(ends, ETH_IPV4, &ipv4(ends, UDP, Ipv4 { id: n as u16, options: &[1; 40], ..Ipv4::default() }, &datagram))
}

/// IPv6 with hop-by-hop and destination options (all padding) before UDP.
pub(crate) fn ipv6_extensions(ends: &Ends, n: u32) -> Vec<u8> {
    let hop_by_hop = [DESTINATION, 0, 1, 4, 0, 0, 0, 0];
    let destination = [&[UDP, 1, 1, 12], &[0; 12][..]].concat();
    let datagram = udp(ends, Family::V6, (4000, 4001), &payload(n, 90));
    ethernet(ends, ETH_IPV6, &ipv6(ends, HOP_BY_HOP, &[&hop_by_hop, &destination[..], &datagram].concat()))
}

/// The first of two IPv6 fragments.
pub(crate) fn ipv6_fragment(ends: &Ends, n: u32) -> Vec<u8> {
    let datagram = udp(ends, Family::V6, (4000, 4001), &payload(n, 192));
    let header = [&[UDP, 0, 0, 1], &n.to_be_bytes()[..]].concat(); // offset 0, more to come
    ethernet(ends, ETH_IPV6, &ipv6(ends, FRAGMENT, &[&header, &datagram[..96]].concat()))
}

/// GRE around a whole Ethernet frame, as snifctl makes it, but to somewhere else.
pub(crate) fn gre(ends: &Ends, n: u32) -> Vec<u8> {
    let inner = ipv4_udp(ends, n, 70);
    let body = [&[0, 0], &ETH_TEB.to_be_bytes()[..], &inner].concat();
    ethernet(ends, ETH_IPV4, &ipv4(ends, GRE, Ipv4 { id: n as u16, ..Ipv4::default() }, &body))
}

/// VXLAN around a whole Ethernet frame.
pub(crate) fn vxlan(ends: &Ends, n: u32) -> Vec<u8> {
    let inner = ipv6_udp(ends, n, 70);
    let datagram = udp(ends, Family::V4, (49152, 4789), &[&[8, 0, 0, 0, 0, 0, 42, 0], &inner[..]].concat());
    ethernet(ends, ETH_IPV4, &ipv4(ends, UDP, Ipv4 { id: n as u16, ..Ipv4::default() }, &datagram))
}

/// An IPv4 header that claims more bytes than the frame has: a mirror copies it all the same.
pub(crate) fn ipv4_cut_short(ends: &Ends, n: u32) -> Vec<u8> {
    let mut frame = ipv4_udp(ends, n, 400);
    frame.truncate(100);
    frame
}

/// One frame of every kind, each with its name; all fit an MTU of 1500. 0x8100 and 0x88a8 frames under 20 bytes are
/// missing: the kernel drops them on receive before any hook.
pub(crate) fn corpus(ends: &Ends) -> Vec<(&'static str, Vec<u8>)> {
    let mut corpus = Corpus { frames: Vec::new() };
    add_ip(&mut corpus, ends);
    add_link_protocols(&mut corpus, ends);
    add_groups(&mut corpus, ends);
    add_tagged(&mut corpus, ends);
    add_tunnels(&mut corpus, ends);
    add_runts(&mut corpus, ends);
    corpus.frames
}

/// The corpus without its names.
pub(crate) fn corpus_frames(ends: &Ends) -> Vec<Vec<u8>> {
    corpus(ends).into_iter().map(|(_, frame)| frame).collect()
}

struct Corpus {
    frames: Vec<(&'static str, Vec<u8>)>,
}

impl Corpus {
    fn add(&mut self, name: &'static str, frame: impl FnOnce(u32) -> Vec<u8>) {
        let n = self.frames.len() as u32 + 1;
        self.frames.push((name, frame(n)));
    }
}

fn add_ip(corpus: &mut Corpus, e: &Ends) {
    let ip = |n: u32| Ipv4 { id: n as u16, ..Ipv4::default() };
    let v6 = |next, body: &[u8]| ethernet(e, ETH_IPV6, &ipv6(e, next, body));
    corpus.add("ipv4 udp", |n| ipv4_udp(e, n, 100));
    corpus.add("ipv4 udp of odd length", |n| ipv4_udp(e, n, 101));
    corpus.add("ipv4 udp of 1514 bytes", |n| jumbo(e, n, 1514));
    corpus.add("ipv4 udp without a checksum", |n| {
        let mut datagram = udp(e, Family::V4, (4000, 4001), &payload(n, 50));
        datagram[6..8].fill(0);
        ethernet(e, ETH_IPV4, &ipv4(e, UDP, ip(n), &datagram))
    });
    corpus.add("ipv4 tcp", |n| ipv4_tcp(e, n, 200));
    corpus.add("ipv4 tcp of 1514 bytes", |n| ipv4_tcp(e, n, 1460));
    corpus.add("ipv4 icmp", |n| ethernet(e, ETH_IPV4, &ipv4(e, ICMP, ip(n), &icmp(&payload(n, 56)))));
    corpus.add("ipv4 with 40 bytes of options", |n| ipv4_max_options(e, n));
    corpus.add("ipv4 first fragment", |n| ipv4_fragments(e, n, 100, 64).swap_remove(0));
    corpus.add("ipv4 last fragment", |n| ipv4_fragments(e, n, 100, 64).swap_remove(1));
    corpus.add("ipv4 cut short", |n| ipv4_cut_short(e, n));
    corpus.add("ipv6 udp", |n| ipv6_udp(e, n, 100));
    corpus.add("ipv6 udp of 1514 bytes", |n| ipv6_udp(e, n, 1514 - 62));
    corpus.add("ipv6 tcp", |n| v6(TCP, &tcp(e, Family::V6, (4002, 4003), n, 0x18, &payload(n, 201))));
    corpus.add("ipv6 icmp", |n| v6(ICMPV6, &icmpv6(e, &payload(n, 56))));
    corpus.add("ipv6 with extension headers", |n| ipv6_extensions(e, n));
    corpus.add("ipv6 fragment", |n| ipv6_fragment(e, n));
}

fn add_link_protocols(corpus: &mut Corpus, e: &Ends) {
    corpus.add("arp", |_| arp(e));
    corpus.add("lldp", |n| lldp(e, n));
    corpus.add("stp", |n| stp(e, n));
    corpus.add("802.3 snap", |n| snap(e, n));
    corpus.add("mpls", |n| mpls(e, n));
    corpus.add("pppoe session", |n| pppoe_session(e, n));
    corpus.add("pppoe discovery", |n| pppoe_discovery(e, n));
    corpus.add("unknown ethertype", |n| raw(e, n, 300));
}

fn add_groups(corpus: &mut Corpus, e: &Ends) {
    let (v4_group, v6_group) = (e.to_mac(ALL_NODES_V4), e.to_mac(ALL_NODES_V6));
    corpus.add("ipv4 multicast", |n| ipv4_udp(&v4_group.to_ipv4(Ipv4Addr::new(224, 0, 0, 251)), n, 80));
    corpus.add("ipv6 multicast", |n| ipv6_udp(&v6_group.to_ipv6(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1)), n, 80));
    corpus.add("ipv4 broadcast", |n| ipv4_udp(&e.to_mac(BROADCAST).to_ipv4(Ipv4Addr::BROADCAST), n, 80));
    corpus.add("to a foreign mac", |n| ipv4_udp(&e.to_mac([0x02, 0, 0, 0, 0xee, 0xee]), n, 80));
}

fn add_tagged(corpus: &mut Corpus, e: &Ends) {
    corpus.add("802.1q ipv4", |n| tagged(ETH_8021Q, 42, &ipv4_udp(e, n, 100)));
    corpus.add("802.1q ipv4 of 1518 bytes", |n| tagged(ETH_8021Q, 42, &jumbo(e, n, 1514)));
    corpus.add("802.1q with priority", |n| tagged(ETH_8021Q, 0xb000 | 4094, &ipv6_udp(e, n, 100)));
    corpus.add("802.1q priority only", |n| tagged(ETH_8021Q, 0x6000, &ipv4_udp(e, n, 100)));
    corpus.add("802.1q arp", |_| tagged(ETH_8021Q, 42, &arp(e)));
    corpus.add("802.1q unknown of 20 bytes", |n| tagged(ETH_8021Q, 42, &raw(e, n, 16)));
    corpus.add("802.1ad alone", |n| tagged(ETH_8021AD, 100, &ipv4_udp(e, n, 100)));
    corpus.add("qinq", |n| tagged(ETH_8021AD, 100, &tagged(ETH_8021Q, 42, &ipv4_udp(e, n, 100))));
    corpus.add("qinq with 8100 twice", |n| tagged(ETH_8021Q, 100, &tagged(ETH_8021Q, 42, &ipv6_udp(e, n, 100))));
    corpus.add("three tags", |n| {
        tagged(ETH_8021AD, 7, &tagged(ETH_8021Q, 8, &tagged(ETH_8021Q, 9, &ipv4_tcp(e, n, 100))))
    });
    corpus.add("9100 tag", |n| tagged(ETH_OLD_QINQ, 100, &ipv4_udp(e, n, 100)));
    corpus.add("9100 and 8100 tags", |n| tagged(ETH_OLD_QINQ, 100, &tagged(ETH_8021Q, 42, &ipv4_udp(e, n, 100))));
}

fn add_tunnels(corpus: &mut Corpus, e: &Ends) {
    corpus.add("gre", |n| gre(e, n));
    corpus.add("vxlan", |n| vxlan(e, n));
}

fn add_runts(corpus: &mut Corpus, e: &Ends) {
    corpus.add("runt of 14 bytes", |n| raw(e, n, 14));
    corpus.add("runt of 15 bytes", |n| raw(e, n, 15));
    corpus.add("runt of 20 bytes", |n| raw(e, n, 20));
    corpus.add("runt of 42 bytes", |n| raw(e, n, 42));
    corpus.add("runt of 59 bytes", |n| raw(e, n, 59));
    corpus.add("ipv4 ethertype and nothing more", |_| ethernet(e, ETH_IPV4, &[]));
    corpus.add("ipv6 ethertype and nothing more", |_| ethernet(e, ETH_IPV6, &[]));
    corpus.add("ipv4 header cut after 6 bytes", |n| ipv4_udp(e, n, 0)[..20].to_vec());
}

/// The numbers in the payloads of untagged UDP frames over IPv4.
pub(crate) fn numbers(frames: &[Vec<u8>]) -> Vec<u32> {
    let number = |frame: &Vec<u8>| u32::from_be_bytes(frame[46..50].try_into().expect("four bytes"));
    frames.iter().map(number).collect()
}
