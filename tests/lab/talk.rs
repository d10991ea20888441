//! Conversations of many kinds, and the frames of each.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::frames::{self, Ends, Family};

/// Who talks to whom, through so many VLAN tags.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Talk {
    pub ends: Ends,
    pub family: Family,
    pub protocol: u8,
    pub ports: (u16, u16),
    pub tags: usize,
}

impl Talk {
    pub(crate) fn reversed(&self) -> Talk {
        let e = self.ends;
        let ends =
            Ends { src_mac: e.dst_mac, dst_mac: e.src_mac, src4: e.dst4, dst4: e.src4, src6: e.dst6, dst6: e.src6 };
        Talk { ends, ports: (self.ports.1, self.ports.0), ..*self }
    }

    /// The frame of a fragment or of a protocol of its own.
    pub(crate) fn packet(&self, protocol: u8, body: &[u8]) -> Vec<u8> {
        let ends = &self.ends;
        let frame = match self.family {
            Family::V4 => {
                frames::ethernet(ends, frames::ETH_IPV4, &frames::ipv4(ends, protocol, frames::Ipv4::default(), body))
            }
            Family::V6 => frames::ethernet(ends, frames::ETH_IPV6, &frames::ipv6(ends, protocol, body)),
        };
        (0..self.tags).fold(frame, |frame, _| frames::tagged(frames::ETH_8021Q, 42, &frame))
    }

    /// Its two frames with the numbers from `2 * n` on.
    pub(crate) fn flow(&self, n: u32) -> Flow {
        Flow { forward: self.frame(2 * n), reverse: self.reversed().frame(2 * n + 1) }
    }

    pub(crate) fn frame(&self, n: u32) -> Vec<u8> {
        let (ends, data) = (&self.ends, frames::payload(n, 20));
        let body = match self.protocol {
            frames::TCP => frames::tcp(ends, self.family, self.ports, n, 0x18, &data),
            frames::UDP => frames::udp(ends, self.family, self.ports, &data),
            _ => data,
        };
        self.packet(self.protocol, &body)
    }
}

/// A well-mixed number, the same each time.
pub(crate) fn mixed(n: u32) -> u64 {
    let mut x = u64::from(n).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 27)
}

pub(crate) fn ends_between(a: Ipv4Addr, b: Ipv4Addr) -> Ends {
    let v6 = |v4: Ipv4Addr| {
        Ipv6Addr::from(u128::from(Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 0)) + u128::from(u32::from(v4)))
    };
    Ends { src4: a, dst4: b, src6: v6(a), dst6: v6(b), ..Ends::PEER_TO_HOST }
}

pub(crate) fn host(net: [u8; 4], n: u32) -> Ipv4Addr {
    (u32::from(Ipv4Addr::from(net)) + n).into()
}

/// TCP and UDP over IPv4 and IPv6, tagged and not: eight kinds, all of different addresses and ports.
pub(crate) fn various(n: u32) -> Talk {
    let random = mixed(n);
    let address = |shift: u32| host([10, 0, 0, 0], 1 + (random >> shift) as u32 % 60_000);
    Talk {
        ends: ends_between(address(0), address(16)),
        family: if n & 1 == 0 { Family::V4 } else { Family::V6 },
        protocol: if n & 2 == 0 { frames::TCP } else { frames::UDP },
        ports: (1024 + (random >> 32) as u16 % 60_000, 1 + (random >> 48) as u16 % 60_000),
        tags: if n & 4 == 0 { 0 } else { 1 + (n as usize >> 3) % 2 },
    }
}

/// The same, none of them tagged.
pub(crate) fn untagged(n: u32) -> Talk {
    Talk { tags: 0, ..various(n) }
}

/// One client's connections to one server: only the client's port differs.
pub(crate) fn by_port(n: u32) -> Talk {
    let ends = ends_between(host([10, 0, 0, 0], 7), host([10, 0, 3, 0], 132));
    Talk { ends, family: Family::V4, protocol: frames::TCP, ports: (40_000 + n as u16, 443), tags: 0 }
}

/// Many clients of one server, each from the same port.
pub(crate) fn by_client(n: u32) -> Talk {
    let ends = ends_between(host([10, 1, 0, 0], n), host([10, 0, 3, 0], 132));
    Talk { ends, family: Family::V4, protocol: frames::UDP, ports: (53, 53), tags: 0 }
}

/// The same over IPv6.
pub(crate) fn by_client6(n: u32) -> Talk {
    Talk { family: Family::V6, ..by_client(n) }
}

/// One flow, by the two frames of it that tests send.
pub(crate) struct Flow {
    pub forward: Vec<u8>,
    pub reverse: Vec<u8>,
}

pub(crate) fn flows(n: u32, talk: impl Fn(u32) -> Talk) -> Vec<Flow> {
    (0..n).map(|n| talk(n).flow(n)).collect()
}

/// One UDP datagram in IPv6 fragments; `before` is a header before the UDP header inside the fragments.
pub(crate) fn ipv6_fragments(ends: &Ends, n: u32, options: bool) -> Vec<Vec<u8>> {
    let datagram = frames::udp(ends, Family::V6, (4000, n as u16), &frames::payload(n, 3000));
    let (next, body) = match options {
        true => (frames::DESTINATION, [&[frames::UDP, 0, 1, 4, 0, 0, 0, 0], &datagram[..]].concat()),
        false => (frames::UDP, datagram),
    };
    let last = (body.len() - 1) / 1200;
    let fragment = |(i, piece): (usize, &[u8])| {
        let place = (i * 1200) as u16 | u16::from(i != last);
        let header = [&[next, 0], &place.to_be_bytes()[..], &n.to_be_bytes()].concat();
        frames::ethernet(ends, frames::ETH_IPV6, &frames::ipv6(ends, frames::FRAGMENT, &[&header, piece].concat()))
    };
    body.chunks(1200).enumerate().map(fragment).collect()
}
