//! An independent reading of what reaches the collector: it shares no code with the product, trusts no length, and
//! verifies every checksum on the way.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use anyhow::{Context, Result, bail, ensure};

use super::check::hex;
use super::frames::{
    DESTINATION, ETH_8021AD, ETH_8021Q, ETH_IPV4, ETH_IPV6, ETH_OLD_QINQ, ETH_TEB, FRAGMENT, GRE, HOP_BY_HOP, ICMP,
    ICMPV6, Mac, TCP, UDP,
};

/// One copied frame with what its tunnel header said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Copy {
    pub eth_src: Mac,
    pub eth_dst: Mac,
    pub outer_src: Ipv4Addr,
    pub outer_dst: Ipv4Addr,
    pub ttl: u8,
    pub tos: u8,
    pub df: bool,
    /// The IP id of each captured packet that carried a part, in order of capture: more than one when fragmented.
    pub ids: Vec<u16>,
    /// The outer IP total length of each of these packets.
    pub outer_lens: Vec<usize>,
    /// The inner frame, from its destination MAC on.
    pub frame: Vec<u8>,
}

/// The copied frames in captured GRE packets, in order of completion; panics, showing the packet, on anything that is
/// not right.
#[track_caller]
pub(crate) fn decap_gre(frames: &[Vec<u8>]) -> Vec<Copy> {
    try_decap_gre(frames).unwrap_or_else(|err| panic!("{err:#}"))
}

/// As [`decap_gre`], the first fault as an error.
pub(crate) fn try_decap_gre(frames: &[Vec<u8>]) -> Result<Vec<Copy>> {
    reassemble(frames)?.into_iter().map(open_gre).collect()
}

/// The inner frames of copies, to compare with what was sent.
pub(crate) fn inner_frames(copies: &[Copy]) -> Vec<Vec<u8>> {
    copies.iter().map(|copy| copy.frame.clone()).collect()
}

/// Of captured frames, the GRE packets to an address: for captures that also hold other traffic.
pub(crate) fn gre_packets(frames: &[Vec<u8>], to: Ipv4Addr) -> Vec<Vec<u8>> {
    let is_ours = |frame: &[u8]| frame.get(12..14) == Some(&[8, 0]) && frame.get(23) == Some(&GRE);
    frames.iter().filter(|frame| is_ours(frame) && frame.get(30..34) == Some(&to.octets())).cloned().collect()
}

/// A whole outer IPv4 packet, put together from its fragments.
struct Datagram {
    /// Everything but the frame is final.
    copy: Copy,
    proto: u8,
    body: Vec<u8>,
}

fn open_gre(datagram: Datagram) -> Result<Copy> {
    let body = &datagram.body;
    let shown = || format!("tunnel packet, after its IP header:\n{}", hex(body));
    ensure!(datagram.proto == GRE, "IP protocol {} is not GRE; {}", datagram.proto, shown());
    ensure!(body.len() >= 4, "a GRE header needs 4 bytes; {}", shown());
    ensure!(be16(body, 0) == 0, "GRE flags and version are {:#06x}, not 0; {}", be16(body, 0), shown());
    ensure!(be16(body, 2) == ETH_TEB, "GRE protocol is {:#06x}, not 0x6558; {}", be16(body, 2), shown());
    ensure!(body.len() >= 4 + 14, "the inner frame is shorter than an Ethernet header; {}", shown());
    Ok(Copy { frame: body[4..].to_vec(), ..datagram.copy })
}

/// One captured outer packet.
struct Outer<'a> {
    eth_src: Mac,
    eth_dst: Mac,
    src: Ipv4Addr,
    dst: Ipv4Addr,
    proto: u8,
    id: u16,
    ttl: u8,
    tos: u8,
    df: bool,
    more: bool,
    /// In bytes.
    offset: usize,
    total_len: usize,
    body: &'a [u8],
}

fn parse_outer(frame: &[u8]) -> Result<Outer<'_>> {
    ensure!(frame.len() >= 14 + 20, "too short for Ethernet and IPv4");
    ensure!(be16(frame, 12) == ETH_IPV4, "outer ethertype is {:#06x}, not 0x0800", be16(frame, 12));
    let ip = &frame[14..];
    ensure!(ip[0] == 0x45, "outer IP starts with {:#04x}, not 0x45", ip[0]);
    ensure!(internet_checksum(&[&ip[..20]]) == 0, "outer IP header checksum is wrong");
    let total_len = usize::from(be16(ip, 2));
    ensure!(total_len == ip.len(), "outer IP length says {total_len} bytes, there are {}", ip.len());
    let flags = be16(ip, 6);
    ensure!(flags & 0x8000 == 0, "the reserved IP flag is set");
    let outer = Outer {
        eth_src: frame[6..12].try_into()?,
        eth_dst: frame[..6].try_into()?,
        src: address(&ip[12..16]),
        dst: address(&ip[16..20]),
        proto: ip[9],
        id: be16(ip, 4),
        ttl: ip[8],
        tos: ip[1],
        df: flags & 0x4000 != 0,
        more: flags & 0x2000 != 0,
        offset: usize::from(flags & 0x1fff) * 8,
        total_len,
        body: &ip[20..],
    };
    ensure!(
        !outer.more || outer.body.len().is_multiple_of(8),
        "a fragment that is not the last has {} bytes",
        outer.body.len()
    );
    ensure!(outer.offset + outer.body.len() <= 65_515, "a fragment ends beyond the largest IP packet");
    Ok(outer)
}

type FragmentKey = (Ipv4Addr, Ipv4Addr, u8, u16);

/// Puts fragments together. Every packet must be complete: a fragment left over is an error.
fn reassemble(frames: &[Vec<u8>]) -> Result<Vec<Datagram>> {
    let mut open: BTreeMap<FragmentKey, Partial> = BTreeMap::new();
    let mut done = Vec::new();
    for (number, frame) in frames.iter().enumerate() {
        let context = || format!("captured packet {} of {} bytes:\n{}", number + 1, frame.len(), hex(frame));
        let outer = parse_outer(frame).with_context(context)?;
        let key = (outer.src, outer.dst, outer.proto, outer.id);
        let partial = open.entry(key).or_insert_with(|| Partial::new(&outer));
        partial.add(&outer).with_context(context)?;
        if partial.is_complete() {
            done.extend(open.remove(&key).map(Partial::finish));
        }
    }
    if let Some((key, partial)) = open.first_key_value() {
        bail!("{} fragments of {key:?} never became whole: {:?}", partial.pieces.len(), partial.spans());
    }
    Ok(done)
}

struct Partial {
    copy: Copy,
    proto: u8,
    pieces: BTreeMap<usize, Vec<u8>>,
    /// Known when the last fragment is here.
    len: Option<usize>,
}

impl Partial {
    fn new(outer: &Outer) -> Partial {
        let copy = Copy {
            eth_src: outer.eth_src,
            eth_dst: outer.eth_dst,
            outer_src: outer.src,
            outer_dst: outer.dst,
            ttl: outer.ttl,
            tos: outer.tos,
            df: outer.df,
            ids: Vec::new(),
            outer_lens: Vec::new(),
            frame: Vec::new(),
        };
        Partial { copy, proto: outer.proto, pieces: BTreeMap::new(), len: None }
    }

    fn add(&mut self, outer: &Outer) -> Result<()> {
        let copy = &mut self.copy;
        let same = (outer.ttl, outer.tos, outer.df) == (copy.ttl, copy.tos, copy.df);
        ensure!(same, "its TTL, TOS or DF differs from that of its other fragments");
        let same = (outer.eth_src, outer.eth_dst) == (copy.eth_src, copy.eth_dst);
        ensure!(same, "its MAC addresses differ from those of its other fragments");
        copy.ids.push(outer.id);
        copy.outer_lens.push(outer.total_len);
        ensure!(outer.more || self.len.is_none(), "there are two last fragments (or the IP id came again too soon)");
        if !outer.more {
            self.len = Some(outer.offset + outer.body.len());
        }
        let twice = self.pieces.insert(outer.offset, outer.body.to_vec());
        ensure!(
            twice.is_none(),
            "there are two fragments at offset {} (or the IP id came again too soon)",
            outer.offset
        );
        self.ensure_no_overlap()
    }

    fn ensure_no_overlap(&self) -> Result<()> {
        let spans = self.spans();
        ensure!(spans.windows(2).all(|pair| pair[0].1 <= pair[1].0), "fragments overlap: {spans:?}");
        let end = spans.last().map_or(0, |span| span.1);
        ensure!(self.len.is_none_or(|len| end <= len), "a fragment lies beyond the last one: {spans:?}");
        Ok(())
    }

    /// First and one past the last byte of each fragment.
    fn spans(&self) -> Vec<(usize, usize)> {
        self.pieces.iter().map(|(at, body)| (*at, at + body.len())).collect()
    }

    fn is_complete(&self) -> bool {
        self.len == Some(self.pieces.values().map(Vec::len).sum())
    }

    fn finish(self) -> Datagram {
        Datagram { copy: self.copy, proto: self.proto, body: self.pieces.into_values().flatten().collect() }
    }
}

/// Panics unless the frame's IPv4 header, TCP, UDP, ICMP and ICMPv6 checksums are right.
#[track_caller]
pub(crate) fn verify_checksums(frame: &[u8]) {
    check_checksums(frame).unwrap_or_else(|err| panic!("{err:#}"));
}

/// As [`verify_checksums`], with an error. What is not IP, and the upper layer of a fragment, cannot be judged and
/// passes.
pub(crate) fn check_checksums(frame: &[u8]) -> Result<()> {
    upper_layer(frame).map(|_| ()).with_context(|| format!("frame of {} bytes:\n{}", frame.len(), hex(frame)))
}

/// The protocol and bytes above IP, their checksum verified; none in frames that are not IP or only a fragment.
fn upper_layer(frame: &[u8]) -> Result<Option<(u8, &[u8])>> {
    let Some(upper) = strip_ip(frame)? else { return Ok(None) };
    let Some(at) = checksum_offset(upper.proto) else {
        return Ok(Some((upper.proto, upper.body)));
    };
    ensure!(upper.body.len() >= at + 2, "too short for protocol {}", upper.proto);
    let unused = upper.proto == UDP && upper.pseudo.len() == 8 && be16(upper.body, at) == 0;
    let len = (upper.body.len() as u32).to_be_bytes();
    let sum = match upper.proto {
        ICMP => internet_checksum(&[upper.body]),
        _ => internet_checksum(&[upper.pseudo, &len, &[0, upper.proto], upper.body]),
    };
    ensure!(unused || sum == 0, "the checksum of protocol {} is wrong (off by {sum:#06x})", upper.proto);
    Ok(Some((upper.proto, upper.body)))
}

fn checksum_offset(proto: u8) -> Option<usize> {
    match proto {
        TCP => Some(16),
        UDP => Some(6),
        ICMP | ICMPV6 => Some(2),
        _ => None,
    }
}

struct Upper<'a> {
    proto: u8,
    /// Source and destination address, as the pseudo header has them.
    pseudo: &'a [u8],
    body: &'a [u8],
}

fn strip_ip(frame: &[u8]) -> Result<Option<Upper<'_>>> {
    let mut at = 12;
    while frame.len() >= at + 6 && [ETH_8021Q, ETH_8021AD, ETH_OLD_QINQ].contains(&be16(frame, at)) {
        at += 4;
    }
    ensure!(frame.len() >= at + 2, "too short for an ethertype");
    match be16(frame, at) {
        ETH_IPV4 => strip_ipv4(&frame[at + 2..]),
        ETH_IPV6 => strip_ipv6(&frame[at + 2..]),
        _ => Ok(None),
    }
}

fn strip_ipv4(ip: &[u8]) -> Result<Option<Upper<'_>>> {
    ensure!(ip.len() >= 20 && ip[0] >> 4 == 4, "no IPv4 header");
    let (header, total) = (usize::from(ip[0] & 15) * 4, usize::from(be16(ip, 2)));
    ensure!(header >= 20 && header <= total && total <= ip.len(), "IPv4 lengths {header}, {total} of {}", ip.len());
    ensure!(internet_checksum(&[&ip[..header]]) == 0, "the IPv4 header checksum is wrong");
    let is_fragment = be16(ip, 6) & 0x3fff != 0;
    Ok((!is_fragment).then_some(Upper { proto: ip[9], pseudo: &ip[12..20], body: &ip[header..total] }))
}

fn strip_ipv6(ip: &[u8]) -> Result<Option<Upper<'_>>> {
    ensure!(ip.len() >= 40 && ip[0] >> 4 == 6, "no IPv6 header");
    let end = 40 + usize::from(be16(ip, 4));
    ensure!(end <= ip.len(), "the IPv6 length says {end} bytes, there are {}", ip.len());
    let (mut proto, mut body) = (ip[6], &ip[40..end]);
    while [HOP_BY_HOP, DESTINATION].contains(&proto) {
        ensure!(body.len() >= 8, "an IPv6 extension header is cut");
        let len = 8 + usize::from(body[1]) * 8;
        ensure!(body.len() >= len, "an IPv6 extension header is cut");
        (proto, body) = (body[0], &body[len..]);
    }
    Ok((proto != FRAGMENT).then_some(Upper { proto, pseudo: &ip[8..40], body }))
}

/// Which side of a connection names the wanted direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Port {
    Src(u16),
    Dst(u16),
}

/// The bytes of one direction of a TCP connection as the frames tell them, from SYN on. Verifies every IPv4 header
/// checksum and the TCP checksums of that direction; ignores what was sent again but panics when it differs, and on a
/// missing piece.
#[track_caller]
pub(crate) fn tcp_stream(frames: &[Vec<u8>], port: Port) -> Vec<u8> {
    try_tcp_stream(frames, port).unwrap_or_else(|err| panic!("{err:#}"))
}

/// As [`tcp_stream`], the first fault as an error.
pub(crate) fn try_tcp_stream(frames: &[Vec<u8>], port: Port) -> Result<Vec<u8>> {
    let mut segments = Vec::new();
    for (number, frame) in frames.iter().enumerate() {
        let context = || format!("frame {} of {} bytes:\n{}", number + 1, frame.len(), hex(frame));
        segments.extend(segment(frame, port).with_context(context)?);
    }
    let syn = segments.iter().find(|segment| segment.syn);
    let first = syn.with_context(|| format!("no SYN of {port:?} in {} frames", frames.len()))?.seq.wrapping_add(1);
    segments.retain(|segment| !segment.data.is_empty());
    segments.sort_by_key(|segment| segment.seq.wrapping_sub(first));
    let mut stream = Vec::new();
    for segment in &segments {
        append(&mut stream, segment.seq.wrapping_sub(first) as usize, segment.data)?;
    }
    Ok(stream)
}

struct Segment<'a> {
    seq: u32,
    syn: bool,
    data: &'a [u8],
}

/// The frame's TCP segment if it is one of the wanted direction.
fn segment(frame: &[u8], port: Port) -> Result<Option<Segment<'_>>> {
    let Some(Upper { proto: TCP, body: tcp, .. }) = strip_ip(frame)? else {
        return Ok(None);
    };
    ensure!(tcp.len() >= 20, "too short for TCP");
    let wanted = match port {
        Port::Src(port) => be16(tcp, 0) == port,
        Port::Dst(port) => be16(tcp, 2) == port,
    };
    if !wanted {
        return Ok(None);
    }
    upper_layer(frame)?;
    let header = usize::from(tcp[12] >> 4) * 4;
    ensure!(header >= 20 && header <= tcp.len(), "the TCP header's length is {header}");
    let seq = u32::from_be_bytes(tcp[4..8].try_into()?);
    Ok(Some(Segment { seq, syn: tcp[13] & 0x02 != 0, data: &tcp[header..] }))
}

/// Adds data at its place in the stream, where it may repeat what is there but not differ or leave a hole.
fn append(stream: &mut Vec<u8>, at: usize, data: &[u8]) -> Result<()> {
    ensure!(at <= stream.len(), "{} bytes are missing at {} of the TCP stream", at - stream.len(), stream.len());
    let known = data.len().min(stream.len() - at);
    ensure!(stream[at..at + known] == data[..known], "bytes sent again at {at} of the TCP stream differ");
    stream.extend(&data[known..]);
    Ok(())
}

/// The Internet checksum (RFC 1071) over parts, each of even length but the last; 0 over data that includes its own
/// right checksum.
pub(crate) fn internet_checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for (i, part) in parts.iter().enumerate() {
        debug_assert!(part.len() % 2 == 0 || i + 1 == parts.len(), "only the last part may be odd");
        sum += part.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0))).sum::<u64>();
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn address(bytes: &[u8]) -> Ipv4Addr {
    Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3])
}
