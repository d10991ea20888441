//! The outer header as data: for each remote the finished bytes that the kernel puts before a copy.
//!
//! A new tunnel type is another list of bytes here; the kernel program only patches lengths, ids and checksums.

use std::net::Ipv4Addr;

use crate::abi::{HEADER_BYTES, HEADER_L3, Remote, remote_flag};
use crate::plan::{OuterOptions, Tunnel};

/// Bytes of an Ethernet header.
pub const ETH: usize = 14;
const ETH_P_IP: u16 = 0x0800;
const IPV4: usize = 20;
const IP_DF: u16 = 0x4000;

/// linux/bpf.h: `BPF_F_ADJ_ROOM_ENCAP_L3_IPV4`, `_L4_GRE`, `_L2_ETH`.
const ENCAP_L3_IPV4: u64 = 1 << 1;
const ENCAP_L4_GRE: u64 = 1 << 3;
const ENCAP_L2_ETH: u64 = 1 << 6;

/// RFC 2784: no flags, version 0, and the protocol type of transparent Ethernet bridging.
const GRE: [u8; 4] = [0, 0, 0x65, 0x58];

/// What the outer header of one remote is made from.
#[derive(Clone, Copy, Debug)]
pub struct Outer {
    pub tunnel: Tunnel,
    pub source: Ipv4Addr,
    pub remote: Ipv4Addr,
    pub options: OuterOptions,
    /// The out interface's address and the next hop's; without the latter copies are dropped, not sent.
    pub source_mac: [u8; 6],
    pub next_hop_mac: Option<[u8; 6]>,
    /// ifindex of the out interface.
    pub ifindex: u32,
    /// Bytes of the largest outer IP packet.
    pub mtu: u32,
    /// Whether copies must be made whole before they reach the out interface.
    pub finish: bool,
}

impl Tunnel {
    /// The bytes between the outer IP header and the inner frame.
    fn header(self) -> Vec<u8> {
        match self {
            Tunnel::Gre => GRE.to_vec(),
        }
    }

    /// The IP protocol number of the tunnel's packets.
    pub fn protocol(self) -> u8 {
        match self {
            Tunnel::Gre => 47,
        }
    }

    /// UDP port, 0 without UDP.
    pub fn port(self) -> u16 {
        match self {
            Tunnel::Gre => 0,
        }
    }

    fn room_flags(self) -> u64 {
        match self {
            Tunnel::Gre => ENCAP_L3_IPV4 | ENCAP_L4_GRE | ENCAP_L2_ETH,
        }
    }

    /// Bytes that the tunnel adds to a frame inside the outer link header: outer IP and tunnel header.
    pub fn overhead(self) -> u32 {
        (IPV4 + self.header().len()) as u32
    }
}

/// The remote's map value: template, patch facts and flags.
pub fn remote(outer: &Outer) -> Remote {
    let ip = ipv4_header(outer);
    let tunnel = outer.tunnel.header();
    let mut header = [0; HEADER_BYTES];
    let bytes = [ethernet_header(outer).as_slice(), &ip, &tunnel].concat();
    header[HEADER_L3 - ETH..][..bytes.len()].copy_from_slice(&bytes);
    Remote {
        room_flags: outer.tunnel.room_flags(),
        ifindex: outer.ifindex,
        mtu: outer.mtu,
        sum: sum_without_fragment(&ip),
        flags: flags(outer),
        link_len: ETH as u8,
        outer_len: bytes.len() as u8,
        header,
    }
}

fn flags(outer: &Outer) -> u16 {
    let unresolved = if outer.next_hop_mac.is_none() {
        remote_flag::UNRESOLVED
    } else {
        0
    };
    let finish = if outer.finish { remote_flag::FINISH } else { 0 };
    let df = if outer.options.df { remote_flag::DF } else { 0 };
    unresolved | finish | df
}

fn ethernet_header(outer: &Outer) -> [u8; ETH] {
    let mut header = [0; ETH];
    header[..6].copy_from_slice(&outer.next_hop_mac.unwrap_or_default());
    header[6..12].copy_from_slice(&outer.source_mac);
    header[12..].copy_from_slice(&ETH_P_IP.to_be_bytes());
    header
}

/// RFC 791, with length, id and checksum zero: the kernel writes them for every copy.
fn ipv4_header(outer: &Outer) -> [u8; IPV4] {
    let mut header = [0; IPV4];
    header[0] = 0x45;
    header[1] = outer.options.tos;
    header[6..8].copy_from_slice(&if outer.options.df { IP_DF } else { 0 }.to_be_bytes());
    header[8] = outer.options.ttl;
    header[9] = outer.tunnel.protocol();
    header[12..16].copy_from_slice(&outer.source.octets());
    header[16..].copy_from_slice(&outer.remote.octets());
    header
}

/// The sum of the header's words as they lie in memory (RFC 1071 sums are the same in any byte order), without the
/// fragment word, which the kernel patches and adds.
fn sum_without_fragment(ip: &[u8; IPV4]) -> u32 {
    let words = ip.chunks_exact(2).enumerate().filter(|(at, _)| *at != 3);
    words
        .map(|(_, word)| u32::from(u16::from_ne_bytes([word[0], word[1]])))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outer() -> Outer {
        Outer {
            tunnel: Tunnel::Gre,
            source: Ipv4Addr::new(192, 0, 2, 1),
            remote: Ipv4Addr::new(198, 51, 100, 7),
            options: OuterOptions {
                ttl: 64,
                tos: 0,
                df: false,
            },
            source_mac: [2, 0, 0, 0, 0, 1],
            next_hop_mac: Some([2, 0, 0, 0, 0, 2]),
            ifindex: 5,
            mtu: 1500,
            finish: false,
        }
    }

    #[test]
    fn the_gre_header_is_the_one_of_the_rfcs() {
        let remote = remote(&outer());
        let expected = [
            &[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0][..],
            &[0x45, 0, 0, 0, 0, 0, 0, 0, 64, 47, 0, 0, 192, 0, 2, 1, 198, 51, 100, 7],
            &[0, 0, 0x65, 0x58],
        ]
        .concat();
        assert_eq!(remote.outer(), expected);
        assert_eq!(Tunnel::Gre.overhead(), 24);
    }

    #[test]
    fn df_and_a_missing_neighbour_are_flags() {
        let mut odd = outer();
        odd.options.df = true;
        odd.next_hop_mac = None;
        let remote = remote(&odd);
        assert_eq!(remote.flags, remote_flag::DF | remote_flag::UNRESOLVED);
        assert_eq!(remote.outer_ip()[6], 0x40);
    }

    #[test]
    fn the_sum_completes_to_a_right_checksum() {
        let remote = remote(&outer());
        let patched = [
            u16::from_ne_bytes(84u16.to_be_bytes()),
            u16::from_ne_bytes(7u16.to_be_bytes()),
        ];
        let mut sum = patched.iter().map(|word| u32::from(*word)).sum::<u32>() + remote.sum;
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        let mut ip = remote.outer_ip()[..IPV4].to_vec();
        ip[2..4].copy_from_slice(&84u16.to_be_bytes());
        ip[4..6].copy_from_slice(&7u16.to_be_bytes());
        ip[10..12].copy_from_slice(&(!(sum as u16)).to_ne_bytes());
        let total: u32 = ip
            .chunks(2)
            .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
            .sum();
        assert_eq!((total & 0xffff) + (total >> 16), 0xffff);
    }
}
