//! What a tunnel's packet holds: pure, and made for bytes from anyone. Each field that a header tells is returned, each
//! packet that is none is a [`Fault`].

use std::fmt;

use clap::ValueEnum;

use crate::datapath::abi::Direction;

/// The tunnel types that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Kind {
    /// GRE with transparent Ethernet bridging; with or without key, sequence and checksum
    Gre,
    /// ERSPAN type I
    Erspan1,
    /// ERSPAN type II
    Erspan2,
    /// ERSPAN type III, with or without a platform subheader
    Erspan3,
    /// VXLAN (RFC 7348)
    Vxlan,
    /// VXLAN-GPE of Ethernet frames
    VxlanGpe,
    /// Geneve (RFC 8926), whatever its options are
    Geneve,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Gre => "gre",
            Kind::Erspan1 => "erspan1",
            Kind::Erspan2 => "erspan2",
            Kind::Erspan3 => "erspan3",
            Kind::Vxlan => "vxlan",
            Kind::VxlanGpe => "vxlan-gpe",
            Kind::Geneve => "geneve",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a packet is not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Fault {
    /// The outer IP header does not fit the packet.
    Ip,
    /// It ends within the tunnel header.
    Short,
    /// GRE of another version, or with routing.
    Gre,
    /// A GRE checksum that is wrong.
    Checksum,
    /// What it carries is no Ethernet frame.
    Protocol,
    /// ERSPAN of another version, or of frames that are not Ethernet.
    Erspan,
    /// VXLAN without a VNI, or of another version.
    Vxlan,
    /// Geneve of another version, a control packet, or options that do not fit.
    Geneve,
    /// A Geneve option that must be understood, and is not.
    Critical,
    /// A frame below the 14 bytes of an Ethernet header.
    Frame,
}

impl Fault {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Fault::Ip => "ip",
            Fault::Short => "short",
            Fault::Gre => "gre",
            Fault::Checksum => "checksum",
            Fault::Protocol => "protocol",
            Fault::Erspan => "erspan",
            Fault::Vxlan => "vxlan",
            Fault::Geneve => "geneve",
            Fault::Critical => "critical",
            Fault::Frame => "frame",
        }
    }
}

impl Fault {
    pub(crate) fn meaning(self) -> &'static str {
        match self {
            Fault::Ip => "their IP header is wrong",
            Fault::Short => "they end within the tunnel header",
            Fault::Gre => "GRE of another version, or with routing",
            Fault::Checksum => "their GRE checksum is wrong",
            Fault::Protocol => "they carry no Ethernet frames",
            Fault::Erspan => "ERSPAN of another version, or of no Ethernet frames",
            Fault::Vxlan => "VXLAN without a VNI, or of another version",
            Fault::Geneve => "Geneve of another version, control packets, or options that do not fit",
            Fault::Critical => "a Geneve option that must be understood",
            Fault::Frame => "their frames are shorter than an Ethernet header",
        }
    }
}

/// The number of a tap within its session, and a direction where its number tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Tap {
    /// A port of ERSPAN type II: any number that the sender likes.
    Port(u32),
    /// An interface of the sender, counted from 0.
    Interface(u32),
}

/// One copy of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Copy<'a> {
    pub kind: Kind,
    /// GRE key, VNI, ERSPAN session id.
    pub id: Option<u32>,
    pub tap: Option<Tap>,
    pub direction: Option<Direction>,
    pub sequence: Option<u32>,
    /// Sequence numbers count the copies of one tap, not those of the tunnel.
    pub counts_tap: bool,
    /// Nanoseconds since 1970 at which the sender took it.
    pub time: Option<u64>,
    pub cut: bool,
    /// Bytes of the frame on the wire, where the tunnel tells.
    pub wire: Option<u32>,
    pub frame: &'a [u8],
}

impl Copy<'_> {
    /// By which copies with one sequence number are known to be one: of the time, the length and the headers.
    pub(crate) fn print(&self) -> u32 {
        let seed = self.time.unwrap_or(0) ^ (self.frame.len() as u64) << 48;
        let print = self.frame[..self.frame.len().min(PRINTED)].chunks(8).fold(seed, |print, bytes| {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            (print.rotate_left(29) ^ u64::from_le_bytes(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        });
        (print >> 32) as u32
    }
}

/// Bytes that [`Copy::print`] looks at: IP ids, sequence numbers and checksums are among them.
const PRINTED: usize = 128;

type Result<T> = std::result::Result<T, Fault>;

/// RFC 2784, RFC 2890.
mod gre {
    pub(super) const CHECKSUM: u16 = 0x8000;
    pub(super) const ROUTING: u16 = 0x4000;
    pub(super) const KEY: u16 = 0x2000;
    pub(super) const SEQUENCE: u16 = 0x1000;
    pub(super) const VERSION: u16 = 0x0007;
}

const ETH_P_TEB: u16 = 0x6558;
const ETH_P_ERSPAN: u16 = 0x88be;
const ETH_P_ERSPAN3: u16 = 0x22eb;
/// draft-ietf-nvo3-vxlan-gpe: the next protocol is Ethernet.
const GPE_ETHERNET: u8 = 3;
/// Our Geneve option: class and type (RFC 8926, experimental), and the bytes of its data.
const TELL: (u16, u8) = (0xff5a, 1);
const TELL_BYTES: usize = 20;

fn take(bytes: &[u8], n: usize) -> Result<(&[u8], &[u8])> {
    bytes.split_at_checked(n).ok_or(Fault::Short)
}

fn take_u16(bytes: &[u8]) -> Result<(u16, &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<2>().ok_or(Fault::Short)?;
    Ok((u16::from_be_bytes(*head), rest))
}

fn take_u32(bytes: &[u8]) -> Result<(u32, &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<4>().ok_or(Fault::Short)?;
    Ok((u32::from_be_bytes(*head), rest))
}

/// What lies behind the IPv4 header that raw sockets leave in place.
pub(crate) fn behind_ipv4(packet: &[u8]) -> Result<&[u8]> {
    let first = *packet.first().ok_or(Fault::Ip)?;
    let header = usize::from(first & 0xf) * 4;
    let fits = first >> 4 == 4 && header >= 20 && packet.len() >= header;
    if fits { Ok(&packet[header..]) } else { Err(Fault::Ip) }
}

/// A GRE packet, from its header on: of Ethernet frames, or ERSPAN.
pub(crate) fn gre(packet: &[u8]) -> Result<Copy<'_>> {
    let (flags, rest) = take_u16(packet)?;
    let (protocol, mut rest) = take_u16(rest)?;
    if flags & (gre::VERSION | gre::ROUTING) != 0 {
        return Err(Fault::Gre);
    }
    if flags & gre::CHECKSUM != 0 {
        rest = take(rest, 4)?.1;
        if checksum(packet) != 0 {
            return Err(Fault::Checksum);
        }
    }
    let (mut key, mut sequence) = (None, None);
    if flags & gre::KEY != 0 {
        let (value, behind) = take_u32(rest)?;
        (key, rest) = (Some(value), behind);
    }
    if flags & gre::SEQUENCE != 0 {
        let (value, behind) = take_u32(rest)?;
        (sequence, rest) = (Some(value), behind);
    }
    let plain = |kind| Copy {
        kind,
        id: key,
        tap: None,
        direction: None,
        sequence,
        counts_tap: false,
        time: None,
        cut: false,
        wire: None,
        frame: rest,
    };
    let copy = match protocol {
        ETH_P_TEB => plain(Kind::Gre),
        ETH_P_ERSPAN if sequence.is_none() => plain(Kind::Erspan1),
        ETH_P_ERSPAN => erspan2(plain(Kind::Erspan2))?,
        ETH_P_ERSPAN3 => erspan3(plain(Kind::Erspan3))?,
        _ => return Err(Fault::Protocol),
    };
    whole(copy)
}

/// draft-foschiano-erspan-03, section 4.2.
fn erspan2(copy: Copy<'_>) -> Result<Copy<'_>> {
    let (first, rest) = take_u32(copy.frame)?;
    let (index, frame) = take_u32(rest)?;
    if first >> 28 != 1 {
        return Err(Fault::Erspan);
    }
    let tap = Some(Tap::Port(index & 0xfffff));
    Ok(Copy { id: Some(first & 0x3ff), tap, cut: first & 0x400 != 0, frame, ..copy })
}

/// draft-foschiano-erspan-03, section 4.3.
fn erspan3(copy: Copy<'_>) -> Result<Copy<'_>> {
    let (first, rest) = take_u32(copy.frame)?;
    let (stamp, rest) = take_u32(rest)?;
    let (flags, mut frame) = take_u32(rest)?;
    let frame_type = flags >> 10 & 0x1f;
    if first >> 28 != 2 || frame_type != 0 {
        return Err(Fault::Erspan);
    }
    let direction = if flags & 8 != 0 { Direction::Egress } else { Direction::Ingress };
    let (mut tap, mut time) = (None, None);
    if flags & 1 != 0 {
        let (platform, rest) = take_u32(frame)?;
        let (seconds, rest) = take_u32(rest)?;
        frame = rest;
        // Platforms 5 and 6 have a port and seconds; a granularity of 2 is IEEE 1588: nanoseconds.
        if matches!(platform >> 26, 5 | 6) {
            tap = Some(Tap::Interface((platform & 0xffff) >> 1));
            let is_exact = flags >> 1 & 3 == 2 && seconds != 0 && stamp < 1_000_000_000;
            time = is_exact.then(|| u64::from(seconds) * 1_000_000_000 + u64::from(stamp));
        }
    }
    let (id, cut) = (Some(first & 0x3ff), first & 0x400 != 0);
    Ok(Copy { id, tap, direction: Some(direction), time, cut, frame, ..copy })
}

/// The payload of a VXLAN packet's UDP header.
pub(crate) fn vxlan(packet: &[u8], kind: Kind) -> Result<Copy<'_>> {
    let (head, rest) = take_u32(packet)?;
    let (vni, frame) = take_u32(rest)?;
    let flags = (head >> 24) as u8;
    if flags & 0x08 == 0 {
        return Err(Fault::Vxlan);
    }
    if kind == Kind::VxlanGpe {
        let (version, is_control, has_next) = (flags & 0x30, flags & 0x01 != 0, flags & 0x04 != 0);
        if version != 0 || is_control {
            return Err(Fault::Vxlan);
        }
        if has_next && head as u8 != GPE_ETHERNET {
            return Err(Fault::Protocol);
        }
    }
    whole(Copy { kind, id: Some(vni >> 8), ..of_udp(kind, frame) })
}

/// The payload of a Geneve packet's UDP header.
pub(crate) fn geneve(packet: &[u8]) -> Result<Copy<'_>> {
    let (head, rest) = take_u32(packet)?;
    let (vni, rest) = take_u32(rest)?;
    let (version, length) = (head >> 30, (head >> 24 & 0x3f) as usize * 4);
    let is_control = head & 0x0080_0000 != 0;
    if version != 0 || is_control {
        return Err(Fault::Geneve);
    }
    let (mut options, frame) = rest.split_at_checked(length).ok_or(Fault::Geneve)?;
    if head as u16 != ETH_P_TEB {
        return Err(Fault::Protocol);
    }
    let mut copy = Copy { id: Some(vni >> 8), ..of_udp(Kind::Geneve, frame) };
    while !options.is_empty() {
        let (option, rest) = take_u32(options).map_err(|_| Fault::Geneve)?;
        let (class, kind, length) = ((option >> 16) as u16, (option >> 8) as u8, (option & 0x1f) as usize * 4);
        let (data, rest) = rest.split_at_checked(length).ok_or(Fault::Geneve)?;
        options = rest;
        if (class, kind) == TELL && data.len() >= TELL_BYTES {
            copy = told(copy, data)?;
        } else if kind & 0x80 != 0 {
            return Err(Fault::Critical);
        }
    }
    whole(copy)
}

/// The data of our Geneve option: tap, flags, nanoseconds, sequence, bytes on the wire.
fn told<'a>(copy: Copy<'a>, data: &[u8]) -> Result<Copy<'a>> {
    let (tap, data) = take_u16(data)?;
    let (flags, data) = take_u16(data)?;
    let (high, data) = take_u32(data)?;
    let (low, data) = take_u32(data)?;
    let (sequence, data) = take_u32(data)?;
    let (wire, _) = take_u32(data)?;
    let time = u64::from(high) << 32 | u64::from(low);
    let direction = if tap & 1 == 1 { Direction::Egress } else { Direction::Ingress };
    Ok(Copy {
        tap: Some(Tap::Interface(u32::from(tap >> 1))),
        direction: Some(direction),
        sequence: Some(sequence),
        counts_tap: true,
        time: (time != 0).then_some(time),
        cut: flags & 1 != 0,
        wire: (wire != 0).then_some(wire),
        ..copy
    })
}

fn of_udp(kind: Kind, frame: &[u8]) -> Copy<'_> {
    let (id, tap, direction, sequence, time, wire) = (None, None, None, None, None, None);
    Copy { kind, id, tap, direction, sequence, counts_tap: false, time, cut: false, wire, frame }
}

/// The payload of a UDP header, from its packet: of raw sockets, which leave the header in place.
pub(crate) fn behind_udp(packet: &[u8]) -> Result<&[u8]> {
    let (head, _) = take(packet, 8)?;
    let length = usize::from(u16::from_be_bytes([head[4], head[5]]));
    if length < 8 || length > packet.len() {
        return Err(Fault::Short);
    }
    Ok(&packet[8..length])
}

fn whole(copy: Copy<'_>) -> Result<Copy<'_>> {
    if copy.frame.len() < 14 { Err(Fault::Frame) } else { Ok(copy) }
}

/// RFC 1071: 0 where the checksum among these bytes is right.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u64 = words.map(u64::from).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
#[path = "decode_test.rs"]
pub(in crate::collect) mod tests;
