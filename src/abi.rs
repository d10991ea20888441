//! The layouts of `bpf/snifctl.h`, encode and decode side by side. A test compares them with the object's BTF.

use anyhow::{Context, Result, ensure};

pub const MAX_TAPS: u32 = 2048;
/// Bytes of `struct request`, and how many of them a session has.
pub const REQUEST_BYTES: usize = 256;
pub const REQUEST_CHUNKS: usize = 1024;
/// Bytes of room for a template.
pub const HEADER_BYTES: usize = 96;
/// Offset of the outer IP header in a template.
pub const HEADER_L3: usize = 16;

/// `enum direction`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Ingress = 0,
    Egress = 1,
}

impl Direction {
    /// The name of the hook, as `tc` and the reports say it.
    pub fn hook(self) -> &'static str {
        match self {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        }
    }

    /// The name of the program for this hook, which is also the name of its pin.
    pub fn program(self) -> &'static str {
        match self {
            Direction::Ingress => "snif_tap_in",
            Direction::Egress => "snif_tap_out",
        }
    }
}

/// `struct config`: ifindexes of the relay's two ends, `enum oversize`, and how the tunnel's own packets look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    pub relay: u32,
    pub peer: u32,
    pub oversize: u8,
    /// IP protocol number of the tunnel.
    pub protocol: u8,
    /// UDP port of the tunnel, 0 without UDP.
    pub port: u16,
}

impl Config {
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.relay.to_ne_bytes());
        bytes.extend(self.peer.to_ne_bytes());
        bytes.extend([self.oversize, self.protocol]);
        bytes.extend(self.port.to_ne_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Result<Config> {
        let mut cursor = Cursor::new(bytes, 12, "config")?;
        Ok(Config {
            relay: cursor.u32(),
            peer: cursor.u32(),
            oversize: cursor.u8(),
            protocol: cursor.u8(),
            port: cursor.u16(),
        })
    }
}

/// `struct stat`: packets, bytes, drops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Stat {
    pub pcnt: u64,
    pub bcnt: u64,
    pub dcnt: u64,
}

impl Stat {
    pub fn decode(bytes: &[u8]) -> Result<Stat> {
        let mut cursor = Cursor::new(bytes, 24, "stat")?;
        Ok(Stat {
            pcnt: cursor.u64(),
            bcnt: cursor.u64(),
            dcnt: cursor.u64(),
        })
    }

    /// The sum over the CPUs.
    pub fn sum(stats: impl IntoIterator<Item = Stat>) -> Stat {
        stats.into_iter().fold(Stat::default(), |sum, stat| Stat {
            pcnt: sum.pcnt + stat.pcnt,
            bcnt: sum.bcnt + stat.bcnt,
            dcnt: sum.dcnt + stat.dcnt,
        })
    }
}

/// `struct tap_key`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TapKey {
    pub ifindex: u32,
    pub direction: Direction,
}

impl TapKey {
    pub fn encode(&self) -> Vec<u8> {
        [self.ifindex.to_ne_bytes(), (self.direction as u32).to_ne_bytes()].concat()
    }

    pub fn decode(bytes: &[u8]) -> Result<TapKey> {
        let mut cursor = Cursor::new(bytes, 8, "tap_key")?;
        let ifindex = cursor.u32();
        let direction = if cursor.u32() == 0 {
            Direction::Ingress
        } else {
            Direction::Egress
        };
        Ok(TapKey { ifindex, direction })
    }
}

/// `struct tap`: the slot that a copy's mark names, and the counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tap {
    pub slot: u32,
    pub stat: Stat,
}

impl Tap {
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.slot.to_ne_bytes().to_vec();
        bytes.extend([0; 4]);
        for count in [self.stat.pcnt, self.stat.bcnt, self.stat.dcnt] {
            bytes.extend(count.to_ne_bytes());
        }
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Result<Tap> {
        let mut cursor = Cursor::new(bytes, 32, "tap")?;
        let slot = cursor.u32();
        Ok(Tap {
            slot,
            stat: Stat::decode(&bytes[8..])?,
        })
    }
}

/// `enum remote_flag`.
pub mod remote_flag {
    pub const UNRESOLVED: u16 = 1;
    pub const FINISH: u16 = 2;
    pub const DF: u16 = 4;
}

/// `struct remote`: finished outer header bytes and what the kernel needs to patch and send them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remote {
    /// `BPF_F_ADJ_ROOM_ENCAP_*`.
    pub room_flags: u64,
    pub ifindex: u32,
    /// Bytes of the largest outer IP packet.
    pub mtu: u32,
    /// Unfolded sum of the outer IPv4 header's 16-bit words as they lie in memory.
    pub sum: u32,
    pub flags: u16,
    pub link_len: u8,
    pub outer_len: u8,
    pub header: [u8; HEADER_BYTES],
}

impl Remote {
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.room_flags.to_ne_bytes().to_vec();
        for word in [self.ifindex, self.mtu, self.sum] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(self.flags.to_ne_bytes());
        bytes.extend([self.link_len, self.outer_len]);
        bytes.extend(self.header);
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Result<Remote> {
        let mut cursor = Cursor::new(bytes, 24 + HEADER_BYTES, "remote")?;
        Ok(Remote {
            room_flags: cursor.u64(),
            ifindex: cursor.u32(),
            mtu: cursor.u32(),
            sum: cursor.u32(),
            flags: cursor.u16(),
            link_len: cursor.u8(),
            outer_len: cursor.u8(),
            header: bytes[24..].try_into().context("header")?,
        })
    }

    /// The outer headers as they go out, before patching.
    pub fn outer(&self) -> &[u8] {
        let start = HEADER_L3 - usize::from(self.link_len);
        &self.header[start..start + usize::from(self.outer_len)]
    }

    /// The outer IP header and what follows.
    pub fn outer_ip(&self) -> &[u8] {
        &self.header[HEADER_L3..]
    }
}

/// `struct tunnel_key`: outer source and remote, IPv4 as `::ffff:a.b.c.d`.
pub fn tunnel_key(source: std::net::Ipv4Addr, remote: std::net::Ipv4Addr) -> Vec<u8> {
    [source.to_ipv6_mapped().octets(), remote.to_ipv6_mapped().octets()].concat()
}

/// `struct request`: text in chunks, the last one padded with zeros.
pub fn encode_request(json: &str) -> Result<Vec<Vec<u8>>> {
    ensure!(
        json.len() <= REQUEST_BYTES * REQUEST_CHUNKS,
        "the request takes {} bytes, a session remembers at most {}; split it into sessions with --name",
        json.len(),
        REQUEST_BYTES * REQUEST_CHUNKS
    );
    let pad = |chunk: &[u8]| [chunk, &vec![0; REQUEST_BYTES - chunk.len()]].concat();
    Ok(json.as_bytes().chunks(REQUEST_BYTES).map(pad).collect())
}

/// The text again, from the chunks in their order.
pub fn decode_request(chunks: &[Vec<u8>]) -> Result<String> {
    let text = chunks.concat();
    Ok(std::str::from_utf8(text.split(|byte| *byte == 0).next().unwrap_or_default())?.to_string())
}

/// Reads fixed-size fields in host byte order off the front of a value whose length was checked.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn new(bytes: &'a [u8], expected: usize, what: &str) -> Result<Cursor<'a>> {
        let len = bytes.len();
        ensure!(
            len == expected,
            "{what} in the kernel has {len} bytes, not {expected}: another version of snifctl made it; remove it with that \
             version's: snifctl down"
        );
        Ok(Cursor(bytes))
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, rest) = self.0.split_at(N);
        self.0 = rest;
        head.try_into().expect("split_at gives N bytes")
    }

    fn u8(&mut self) -> u8 {
        self.take::<1>()[0]
    }

    fn u16(&mut self) -> u16 {
        u16::from_ne_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_ne_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_ne_bytes(self.take())
    }
}

#[cfg(test)]
#[path = "abi_test.rs"]
mod tests;
