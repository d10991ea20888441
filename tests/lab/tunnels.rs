//! An independent reading of every tunnel's packets over IPv4 and IPv6, by the RFCs and not by the product's code. Every
//! field that has one right value is checked here; what a test may choose or compare is returned.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::check::hex;
use super::decode::internet_checksum;
use super::frames::{ETH_IPV4, ETH_IPV6, ETH_TEB, FRAGMENT, GRE, Mac, UDP};

/// What a collector expects to receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Gre,
    /// The UDP destination port.
    Vxlan(u16),
    Geneve(u16),
    /// With the option of `--tell`.
    Tell(u16),
    Erspan1,
    Erspan2,
    Erspan3,
}

/// What begins a captured packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Link {
    Ethernet,
    /// Nothing: IP packets.
    Raw,
}

/// The outer IP (and UDP) headers of one whole copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outer {
    /// Source and destination, zero on a link without them.
    pub macs: (Mac, Mac),
    pub src: IpAddr,
    pub dst: IpAddr,
    pub ttl: u8,
    pub tos: u8,
    pub df: bool,
    /// IPv4 id or IPv6 fragment id; none in a whole IPv6 packet.
    pub id: Option<u32>,
    pub flow_label: u32,
    /// Bytes from the outer IP header on, of each packet in order of capture.
    pub lens: Vec<usize>,
    /// UDP source port.
    pub port: Option<u16>,
    /// A UDP checksum is there (and right).
    pub checksum: bool,
}

/// What the tunnel header says; what a type lacks is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Header {
    /// GRE key, VNI, ERSPAN session id.
    pub id: Option<u32>,
    pub sequence: Option<u32>,
    pub erspan: Option<Erspan>,
    pub tell: Option<Tell>,
}

/// What `--tell` says of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tell {
    /// Twice the number of the interface, plus one for egress.
    pub tap: u16,
    pub cut: bool,
    /// Since 1970.
    pub time: Duration,
    pub sequence: u32,
    /// Bytes of the frame on the wire.
    pub length: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Erspan {
    pub vlan: u16,
    pub cos: u8,
    /// Encapsulation (II) or BSO (III).
    pub encap: u8,
    pub truncated: bool,
    pub port: u32,
    /// Type III: direction, and time in seconds and nanoseconds.
    pub more: Option<(u8, u32, u32)>,
}

/// One copied frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tunnelled {
    pub outer: Outer,
    pub header: Header,
    pub frame: Vec<u8>,
}

/// The copied frames in captured packets, in order of completion; panics, showing the packet, on anything that is wrong.
#[track_caller]
pub(crate) fn decap(kind: Kind, packets: &[Vec<u8>]) -> Vec<Tunnelled> {
    decap_on(Link::Ethernet, kind, packets)
}

/// As [`decap`], for packets captured on another kind of link.
#[track_caller]
pub(crate) fn decap_on(link: Link, kind: Kind, packets: &[Vec<u8>]) -> Vec<Tunnelled> {
    try_decap(link, kind, packets).unwrap_or_else(|err| panic!("{kind:?}: {err:#}"))
}

fn try_decap(link: Link, kind: Kind, packets: &[Vec<u8>]) -> Result<Vec<Tunnelled>> {
    let datagrams = reassemble(link, packets)?;
    let open = |datagram: Datagram| {
        let shown = hex(&datagram.body);
        open_datagram(kind, datagram).with_context(|| format!("tunnel packet, after its IP header:\n{shown}"))
    };
    datagrams.into_iter().map(open).collect()
}

/// The inner frames, to compare with what was sent.
pub(crate) fn inner(copies: &[Tunnelled]) -> Vec<Vec<u8>> {
    copies.iter().map(|copy| copy.frame.clone()).collect()
}

/// Of captured Ethernet frames, the IP packets to an address.
pub(crate) fn packets_to(frames: &[Vec<u8>], to: IpAddr) -> Vec<Vec<u8>> {
    let is_to = |frame: &&Vec<u8>| match to {
        IpAddr::V4(to) => frame.get(12..14) == Some(&[8, 0]) && frame.get(30..34) == Some(&to.octets()),
        IpAddr::V6(to) => frame.get(12..14) == Some(&[0x86, 0xdd]) && frame.get(38..54) == Some(&to.octets()),
    };
    frames.iter().filter(is_to).cloned().collect()
}

// ---- the outer IP packet ----

struct Datagram {
    outer: Outer,
    proto: u8,
    body: Vec<u8>,
}

struct Piece {
    outer: Outer,
    proto: u8,
    /// In bytes.
    offset: usize,
    more: bool,
    body: Vec<u8>,
}

fn piece(link: Link, packet: &[u8]) -> Result<Piece> {
    let (macs, ethertype, ip) = match link {
        Link::Raw => (Default::default(), None, packet),
        Link::Ethernet => {
            ensure!(packet.len() > 14, "too short for Ethernet");
            let macs = (packet[6..12].try_into()?, packet[..6].try_into()?);
            (macs, Some(be16(packet, 12)), &packet[14..])
        }
    };
    match ip.first().map(|first| first >> 4) {
        Some(4) if ethertype.is_none_or(|ethertype| ethertype == ETH_IPV4) => piece_v4(macs, ip),
        Some(6) if ethertype.is_none_or(|ethertype| ethertype == ETH_IPV6) => piece_v6(macs, ip),
        version => bail!("ethertype {ethertype:04x?} before IP version {version:?}"),
    }
}

fn piece_v4(macs: (Mac, Mac), ip: &[u8]) -> Result<Piece> {
    ensure!(ip.len() >= 20 && ip[0] == 0x45, "IPv4 starts with {:#04x}", ip[0]);
    ensure!(internet_checksum(&[&ip[..20]]) == 0, "the IPv4 header checksum is wrong");
    let (len, flags) = (usize::from(be16(ip, 2)), be16(ip, 6));
    ensure!(len == ip.len(), "IPv4 says {len} bytes, there are {}", ip.len());
    ensure!(flags & 0x8000 == 0, "the reserved IP flag is set");
    let address = |at: usize| IpAddr::from(Ipv4Addr::from([ip[at], ip[at + 1], ip[at + 2], ip[at + 3]]));
    let outer = Outer {
        macs,
        src: address(12),
        dst: address(16),
        ttl: ip[8],
        tos: ip[1],
        df: flags & 0x4000 != 0,
        id: Some(be16(ip, 4).into()),
        flow_label: 0,
        lens: vec![len],
        port: None,
        checksum: false,
    };
    Ok(Piece {
        outer,
        proto: ip[9],
        offset: usize::from(flags & 0x1fff) * 8,
        more: flags & 0x2000 != 0,
        body: ip[20..].to_vec(),
    })
}

fn piece_v6(macs: (Mac, Mac), ip: &[u8]) -> Result<Piece> {
    ensure!(ip.len() >= 40, "too short for IPv6");
    let len = 40 + usize::from(be16(ip, 4));
    ensure!(len == ip.len(), "IPv6 says {len} bytes, there are {}", ip.len());
    let address = |at: usize| {
        let octets: [u8; 16] = ip[at..at + 16].try_into().expect("sixteen bytes");
        IpAddr::from(Ipv6Addr::from(octets))
    };
    let first = be32(ip, 0);
    let mut outer = Outer {
        macs,
        src: address(8),
        dst: address(24),
        ttl: ip[7],
        tos: (first >> 20) as u8,
        df: false,
        id: None,
        flow_label: first & 0xfffff,
        lens: vec![len],
        port: None,
        checksum: false,
    };
    if ip[6] != FRAGMENT {
        let body = ip[40..].to_vec();
        return Ok(Piece { outer, proto: ip[6], offset: 0, more: false, body });
    }
    ensure!(ip.len() > 48, "an IPv6 fragment without data");
    let place = be16(ip, 42);
    ensure!(ip[41] == 0 && place & 6 == 0, "reserved bits of the fragment header: {:02x?}", &ip[40..48]);
    ensure!(place != 0, "a fragment that is the whole packet");
    outer.id = Some(be32(ip, 44));
    let body = ip[48..].to_vec();
    Ok(Piece { outer, proto: ip[40], offset: usize::from(place & !7), more: place & 1 != 0, body })
}

#[derive(Default)]
struct Partial {
    pieces: BTreeMap<usize, Piece>,
    lens: Vec<usize>,
    end: Option<usize>,
}

impl Partial {
    fn add(&mut self, piece: Piece) -> Result<()> {
        ensure!(!piece.more || piece.body.len().is_multiple_of(8), "a fragment of {} bytes", piece.body.len());
        if let Some(other) = self.pieces.values().next() {
            let mut same = piece.outer.clone();
            same.lens.clone_from(&other.outer.lens);
            ensure!(same == other.outer, "fragments of one packet differ: {:?}, {:?}", piece.outer, other.outer);
        }
        if !piece.more {
            let end = piece.offset + piece.body.len();
            ensure!(self.end.replace(end).is_none(), "two last fragments, or an id came again");
        }
        self.lens.extend(&piece.outer.lens);
        ensure!(self.pieces.insert(piece.offset, piece).is_none(), "two fragments at one offset, or an id came again");
        Ok(())
    }

    fn is_complete(&self) -> bool {
        self.end == Some(self.pieces.values().map(|piece| piece.body.len()).sum())
    }

    /// Also checks that all fragments but the last are of one size, and that they lie side by side.
    fn finish(self) -> Result<Datagram> {
        let sizes: Vec<usize> = self.pieces.values().map(|piece| piece.body.len()).collect();
        let (last, rest) = sizes.split_last().context("at least one piece")?;
        ensure!(rest.iter().all(|size| *size == rest[0] && last <= size), "fragments of unequal size: {sizes:?}");
        let mut body = Vec::new();
        for piece in self.pieces.values() {
            ensure!(piece.offset == body.len(), "fragments overlap or leave a hole: {sizes:?}");
            body.extend(&piece.body);
        }
        let first = self.pieces.into_values().next().context("at least one piece")?;
        let outer = Outer { lens: self.lens, ..first.outer };
        Ok(Datagram { outer, proto: first.proto, body })
    }
}

fn reassemble(link: Link, packets: &[Vec<u8>]) -> Result<Vec<Datagram>> {
    let (mut open, mut done) = (BTreeMap::<_, Partial>::new(), Vec::new());
    for (number, packet) in packets.iter().enumerate() {
        let context = || format!("packet {} of {} bytes:\n{}", number + 1, packet.len(), hex(packet));
        let piece = piece(link, packet).with_context(context)?;
        if !piece.more && piece.offset == 0 {
            let Piece { outer, proto, body, .. } = piece;
            done.push(Datagram { outer, proto, body });
            continue;
        }
        let key = (piece.outer.src, piece.outer.dst, piece.proto, piece.outer.id);
        let partial = open.entry(key).or_default();
        partial.add(piece).with_context(context)?;
        if partial.is_complete() {
            let whole = open.remove(&key).map(Partial::finish).context("it is there")?;
            done.push(whole.with_context(context)?);
        }
    }
    let left = open.first_key_value().map(|(key, partial)| (key, &partial.lens));
    ensure!(left.is_none(), "fragments that never became whole: {left:?}");
    Ok(done)
}

// ---- the tunnel header ----

fn open_datagram(kind: Kind, mut datagram: Datagram) -> Result<Tunnelled> {
    let proto = if matches!(kind, Kind::Vxlan(_) | Kind::Geneve(_) | Kind::Tell(_)) { UDP } else { GRE };
    ensure!(datagram.proto == proto, "IP protocol {}", datagram.proto);
    let (header, at) = match kind {
        Kind::Gre => gre(&datagram.body, ETH_TEB)?,
        Kind::Erspan1 => {
            let (header, at) = gre(&datagram.body, 0x88be)?;
            ensure!(at == 4, "type I has no GRE flags");
            (header, at)
        }
        Kind::Erspan2 => erspan2(&datagram.body)?,
        Kind::Erspan3 => erspan3(&datagram.body)?,
        Kind::Vxlan(port) => (open_udp(&mut datagram, port)?, 16),
        Kind::Geneve(port) => (open_geneve(&mut datagram, port)?, 16),
        Kind::Tell(port) => (open_tell(&mut datagram, port)?, 40),
    };
    ensure!(datagram.body.len() >= at + 14, "the inner frame is shorter than an Ethernet header");
    Ok(Tunnelled { outer: datagram.outer, header, frame: datagram.body[at..].to_vec() })
}

/// RFC 2784 and 2890.
fn gre(body: &[u8], proto: u16) -> Result<(Header, usize)> {
    ensure!(body.len() >= 12, "too short for GRE");
    let flags = be16(body, 0);
    ensure!(flags & !0x3000 == 0, "GRE flags and version {flags:#06x}");
    ensure!(be16(body, 2) == proto, "GRE protocol {:#06x}", be16(body, 2));
    let mut at = 4;
    let mut word = |there: bool| {
        at += if there { 4 } else { 0 };
        there.then(|| be32(body, at - 4))
    };
    let id = word(flags & 0x2000 != 0);
    let sequence = word(flags & 0x1000 != 0);
    Ok((Header { id, sequence, ..Header::default() }, at))
}

fn erspan_word(body: &[u8], version: u32) -> Result<(u32, Erspan)> {
    let word = be32(body, 8);
    ensure!(word >> 28 == version, "ERSPAN version {}", word >> 28);
    let erspan = Erspan {
        vlan: (word >> 16 & 0xfff) as u16,
        cos: (word >> 13 & 7) as u8,
        encap: (word >> 11 & 3) as u8,
        truncated: word & 1 << 10 != 0,
        port: 0,
        more: None,
    };
    Ok((word & 0x3ff, erspan))
}

/// draft-foschiano-erspan-03, section 4.2.
fn erspan2(body: &[u8]) -> Result<(Header, usize)> {
    ensure!(body.len() >= 16, "too short for ERSPAN type II");
    let (header, at) = gre(body, 0x88be)?;
    ensure!(at == 8 && header.id.is_none(), "type II has a sequence number and no key");
    let (session, erspan) = erspan_word(body, 1)?;
    let index = be32(body, 12);
    ensure!(index >> 20 == 0, "reserved bits before the index: {index:#x}");
    let erspan = Erspan { port: index, ..erspan };
    Ok((Header { id: Some(session), erspan: Some(erspan), ..header }, 16))
}

/// Section 4.3, with platform specific subheader 5.
fn erspan3(body: &[u8]) -> Result<(Header, usize)> {
    ensure!(body.len() >= 28, "too short for ERSPAN type III");
    let (header, at) = gre(body, 0x22eb)?;
    ensure!(at == 8 && header.id.is_none(), "type III has a sequence number and no key");
    let (session, erspan) = erspan_word(body, 2)?;
    let (sgt, flags) = (be16(body, 16), be16(body, 18));
    ensure!(sgt == 0, "security group tag {sgt}");
    ensure!(flags & !0x0008 == 0x8005, "P, frame type, hardware id, granularity and O are {flags:#06x}");
    let platform = be32(body, 20);
    ensure!(platform >> 16 == 5 << 10, "platform and switch id {:#06x}", platform >> 16);
    let (nanoseconds, seconds) = (be32(body, 12), be32(body, 24));
    ensure!(nanoseconds < 1_000_000_000, "{nanoseconds} nanoseconds");
    let direction = (flags >> 3 & 1) as u8;
    let erspan = Erspan { port: platform & 0xffff, more: Some((direction, seconds, nanoseconds)), ..erspan };
    Ok((Header { id: Some(session), erspan: Some(erspan), ..header }, 28))
}

/// RFC 7348.
fn open_udp(datagram: &mut Datagram, port: u16) -> Result<Header> {
    check_udp(datagram, port)?;
    let (first, second) = (be32(&datagram.body, 8), be32(&datagram.body, 12));
    ensure!(first == 0x0800_0000, "VXLAN flags and reserved bits {first:#010x}");
    ensure!(second & 0xff == 0, "VXLAN's last reserved byte {:#04x}", second & 0xff);
    Ok(Header { id: Some(second >> 8), ..Header::default() })
}

/// RFC 8926: version 0, no options, no flags.
fn open_geneve(datagram: &mut Datagram, port: u16) -> Result<Header> {
    check_udp(datagram, port)?;
    let (first, second) = (be32(&datagram.body, 8), be32(&datagram.body, 12));
    ensure!(first == u32::from(ETH_TEB), "Geneve's version, options, flags and protocol {first:#010x}");
    ensure!(second & 0xff == 0, "Geneve's last reserved byte {:#04x}", second & 0xff);
    Ok(Header { id: Some(second >> 8), ..Header::default() })
}

/// The same with one option, of five words: class 0xff5a, type 1, not critical.
fn open_tell(datagram: &mut Datagram, port: u16) -> Result<Header> {
    check_udp(datagram, port)?;
    let body = &datagram.body;
    ensure!(body.len() >= 40, "too short for Geneve and its option");
    let (first, second, option) = (be32(body, 8), be32(body, 12), be32(body, 16));
    ensure!(first == 0x0600_0000 | u32::from(ETH_TEB), "Geneve's version, options, flags and protocol {first:#010x}");
    ensure!(second & 0xff == 0, "Geneve's last reserved byte {:#04x}", second & 0xff);
    ensure!(option == 0xff5a_0105, "the option's class, type and length {option:#010x}");
    let flags = be16(body, 22);
    ensure!(flags & !1 == 0, "flags {flags:#06x}");
    let nanoseconds = u64::from(be32(body, 24)) << 32 | u64::from(be32(body, 28));
    let (tap, length) = (be16(body, 20), be32(body, 36) as usize);
    ensure!(
        if flags == 1 { length > body.len() - 40 } else { length == body.len() - 40 },
        "{} bytes of a frame of {length}, flags {flags:#06x}",
        body.len() - 40
    );
    let time = Duration::from_nanos(nanoseconds);
    let tell = Tell { tap, cut: flags == 1, time, sequence: be32(body, 32), length };
    Ok(Header { id: Some(second >> 8), tell: Some(tell), ..Header::default() })
}

fn check_udp(datagram: &mut Datagram, port: u16) -> Result<()> {
    let Datagram { outer, body, .. } = datagram;
    ensure!(body.len() >= 16, "too short for UDP and its tunnel");
    let (source, len) = (be16(body, 0), usize::from(be16(body, 4)));
    ensure!(source >= 49152, "UDP source port {source}");
    ensure!(be16(body, 2) == port, "UDP destination port {}", be16(body, 2));
    ensure!(len == body.len(), "UDP says {len} bytes, there are {}", body.len());
    outer.port = Some(source);
    outer.checksum = be16(body, 6) != 0;
    let pseudo = match (outer.src, outer.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => [&src.octets()[..], &dst.octets()].concat(),
        (IpAddr::V6(src), IpAddr::V6(dst)) => [&src.octets()[..], &dst.octets()].concat(),
        mixed => bail!("addresses of two families: {mixed:?}"),
    };
    let sum = internet_checksum(&[&pseudo, &(len as u32).to_be_bytes(), &[0, UDP], body]);
    ensure!(!outer.checksum || sum == 0, "the UDP checksum is wrong, off by {sum:#06x}");
    Ok(())
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from(be16(bytes, at)) << 16 | u32::from(be16(bytes, at + 2))
}

/// The packets of a pcap file that is still being written, of any link type.
pub(crate) fn raw_packets(pcap: &Path) -> Vec<Vec<u8>> {
    let file = fs::read(pcap).unwrap_or_else(|err| panic!("read {}: {err}", pcap.display()));
    let (mut rest, mut packets) = (file.get(24..).unwrap_or_default(), Vec::new());
    while let Some(header) = rest.get(..16) {
        let [captured, len] = [8, 12].map(|at| u32::from_ne_bytes([0, 1, 2, 3].map(|i| header[at + i])) as usize);
        assert_eq!(captured, len, "packet {} was cut by the capture", packets.len() + 1);
        let Some(packet) = rest.get(16..16 + len) else { break };
        packets.push(packet.to_vec());
        rest = &rest[16 + len..];
    }
    packets
}
