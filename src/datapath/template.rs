//! The outer header as data: for each remote the finished bytes that the kernel puts before a copy, and where in them it
//! patches what differs from copy to copy.

use std::net::IpAddr;

use crate::datapath::abi::{Direction, ETHERNET, HEADER_L3, Positions, Remote, Template, remote_flag};
use crate::request::OuterOptions;
use crate::tunnel::{Header, PROTO_UDP, Tunnel};

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const IPV4: usize = 20;
const IPV6: usize = 40;
const UDP: usize = 8;
const IP_DF: u16 = 0x4000;

/// linux/bpf.h: `BPF_F_ADJ_ROOM_ENCAP_L3_IPV4`, `_L3_IPV6`, `_L4_GRE`, `_L4_UDP`, `_L2_ETH`.
const ENCAP_L3_IPV4: u64 = 1 << 1;
const ENCAP_L3_IPV6: u64 = 1 << 2;
const ENCAP_L4_GRE: u64 = 1 << 3;
const ENCAP_L4_UDP: u64 = 1 << 4;
const ENCAP_L2_ETH: u64 = 1 << 6;

/// What the outer header of one remote is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outer {
    pub tunnel: Tunnel,
    pub source: IpAddr,
    pub remote: IpAddr,
    pub options: OuterOptions,
    /// The way out; without it copies are dropped, not sent.
    pub path: Option<Path>,
}

/// How packets to a remote leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Path {
    /// Of the out interface.
    pub ifindex: u32,
    /// Bytes of the largest outer IP packet.
    pub mtu: u32,
    pub source_mac: [u8; 6],
    /// `None` while the neighbour does not answer.
    pub next_hop_mac: Option<[u8; 6]>,
    /// Copies must be made whole before they reach the out interface.
    pub finish: bool,
    /// Super-packets must be cut into the wire's frames before they get a header.
    pub per_frame: bool,
    /// The out interface takes IP packets without a link header.
    pub l3: bool,
    /// The out interface has a queue, which may refuse packets.
    pub queued: bool,
}

/// Bytes that the tunnel adds to a frame inside the outer link header: outer IP and tunnel header.
pub(crate) fn overhead(tunnel: &Tunnel, remote: IpAddr) -> u32 {
    (ip_len(remote) + tunnel.overhead()) as u32
}

fn ip_len(remote: IpAddr) -> usize {
    if remote.is_ipv6() { IPV6 } else { IPV4 }
}

/// Moves positions that count from the tunnel header's start, plus one, to where that stands in a template.
fn positions(at: Positions, start: usize) -> Positions {
    let moved = |position: u8| if position == 0 { 0 } else { position - 1 + start as u8 };
    Positions {
        udp: moved(at.udp),
        sequence: moved(at.sequence),
        vlan: moved(at.vlan),
        port: moved(at.port),
        time: moved(at.time),
        seconds: moved(at.seconds),
    }
}

/// The remote's map value: templates, patch positions and flags.
pub(crate) fn remote(outer: &Outer) -> Remote {
    let ip_len = ip_len(outer.remote);
    let tunnels = [Direction::Ingress, Direction::Egress].map(|direction| outer.tunnel.header(direction));
    let ip = ip_header(outer);
    let template = |tunnel: &Header| {
        let bytes = [&ethernet_header(outer)[..], &ip, &tunnel.bytes].concat();
        let mut template = Template::default();
        template.0[HEADER_L3 - ETHERNET..][..bytes.len()].copy_from_slice(&bytes);
        template
    };
    Remote {
        room_flags: room_flags(outer),
        ifindex: outer.path.map_or(0, |path| path.ifindex),
        mtu: outer.path.map_or(0, |path| path.mtu),
        sum: if outer.remote.is_ipv4() { sum_without_fragment(&ip) } else { 0 },
        udp_sum: tunnels.each_ref().map(|tunnel| if tunnel.at.udp == 0 { 0 } else { udp_sum(outer, tunnel) }),
        flags: flags(outer, tunnels[0].at),
        outer_len: (ETHERNET + ip_len + tunnels[0].bytes.len()) as u8,
        ip_len: ip_len as u8,
        at: positions(tunnels[0].at, HEADER_L3 + ip_len),
        device: 0,
        tagged: outer.tunnel.tagged(),
        headers: tunnels.each_ref().map(template),
    }
}

fn room_flags(outer: &Outer) -> u64 {
    let l3 = if outer.remote.is_ipv6() { ENCAP_L3_IPV6 } else { ENCAP_L3_IPV4 };
    let l4 = if outer.tunnel.protocol() == PROTO_UDP { ENCAP_L4_UDP } else { ENCAP_L4_GRE };
    l3 | l4 | ENCAP_L2_ETH
}

fn flags(outer: &Outer, at: Positions) -> u16 {
    use remote_flag::{DF, FINISH, FLOW, IPV6, L3, PER_FRAME, QUEUED, TELL, UDP_CHECKSUM, UNRESOLVED};
    let path = outer.path.as_ref();
    let resolved = path.is_some_and(|path| path.l3 || path.next_hop_mac.is_some());
    let checksum = outer.tunnel.udp_checksum;
    [
        (UNRESOLVED, !resolved),
        (FINISH, checksum || path.is_some_and(|path| path.finish)),
        (DF, outer.options.df),
        (PER_FRAME, outer.tunnel.is_per_frame() || path.is_some_and(|path| path.per_frame)),
        (IPV6, outer.remote.is_ipv6()),
        (L3, path.is_some_and(|path| path.l3)),
        (FLOW, at.udp != 0 || outer.remote.is_ipv6()),
        (UDP_CHECKSUM, checksum),
        (QUEUED, path.is_some_and(|path| path.queued)),
        (TELL, outer.tunnel.tell),
    ]
    .into_iter()
    .fold(0, |flags, (flag, on)| if on { flags | flag } else { flags })
}

fn ethernet_header(outer: &Outer) -> [u8; ETHERNET] {
    let mut header = [0; ETHERNET];
    if let Some(path) = &outer.path {
        header[..6].copy_from_slice(&path.next_hop_mac.unwrap_or_default());
        header[6..12].copy_from_slice(&path.source_mac);
    }
    let ethertype = if outer.remote.is_ipv6() { ETH_P_IPV6 } else { ETH_P_IP };
    header[12..].copy_from_slice(&ethertype.to_be_bytes());
    header
}

/// RFC 791 or RFC 8200, with length, id, flow label and checksum zero: the kernel writes them for every copy.
fn ip_header(outer: &Outer) -> Vec<u8> {
    let OuterOptions { ttl, tos, df } = outer.options;
    let protocol = outer.tunnel.protocol();
    match (outer.source, outer.remote) {
        (IpAddr::V4(source), IpAddr::V4(remote)) => {
            let fixed = [0x45, tos, 0, 0, 0, 0, if df { (IP_DF >> 8) as u8 } else { 0 }, 0, ttl, protocol, 0, 0];
            [&fixed[..], &source.octets(), &remote.octets()].concat()
        }
        (source, remote) => {
            let octets = |address: IpAddr| match address {
                IpAddr::V6(address) => address.octets(),
                IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
            };
            let fixed = [0x60 | tos >> 4, tos << 4, 0, 0, 0, 0, protocol, ttl];
            [&fixed[..], &octets(source), &octets(remote)].concat()
        }
    }
}

/// Sum of 16-bit words as they lie in memory: RFC 1071 sums are the same in any byte order.
fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks_exact(2).map(|word| u32::from(u16::from_ne_bytes([word[0], word[1]]))).sum()
}

/// The header's sum without the fragment word, which the kernel patches and adds.
fn sum_without_fragment(ip: &[u8]) -> u32 {
    sum(&ip[..6]) + sum(&ip[8..])
}

/// What is constant under the UDP checksum: addresses and protocol of the pseudo header, destination port, and what
/// follows the UDP header. RFC 768, RFC 8200.
fn udp_sum(outer: &Outer, tunnel: &Header) -> u32 {
    let octets = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    sum(&octets(outer.source))
        + sum(&octets(outer.remote))
        + sum(&[0, PROTO_UDP])
        + sum(&tunnel.bytes[2..4])
        + sum(&tunnel.bytes[UDP..])
}

#[cfg(test)]
#[path = "template_test.rs"]
mod tests;
