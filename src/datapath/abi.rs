//! The layouts of `bpf/snifctl.h`, encode and decode side by side. A test compares them with the object's BTF.

use std::net::IpAddr;

use anyhow::{Result, ensure};

use crate::tools::tc::Hook;

pub(crate) const MAX_TAPS: u32 = 2048;
/// Bytes of `struct request`, and how many of them one request may take: half of what the map holds.
pub(crate) const REQUEST_BYTES: usize = 256;
pub(crate) const REQUEST_CHUNKS: usize = 1024;
/// Bytes of the first `struct config` that is read; it has grown since. The same holds for the other structs.
const OLDEST_CONFIG: usize = 72;
/// Bytes of room for a template.
pub(crate) const HEADER_BYTES: usize = 96;
/// Offset of the outer IP header in a template.
pub(crate) const HEADER_L3: usize = 16;
/// Bytes of an Ethernet header.
pub(crate) const ETHERNET: usize = 14;
pub(crate) const MAX_REMOTES: usize = 64;
/// Elements of the maps of sizes and times: powers of two.
pub(crate) const SIZES: usize = 32;
/// Buckets of the flow table, in elements of so many bytes.
pub(crate) const BUCKETS: usize = 4096;
pub(crate) const SPREAD_BYTES: usize = 64;

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

impl From<Direction> for Hook {
    fn from(direction: Direction) -> Hook {
        match direction {
            Direction::Ingress => Hook::Ingress,
            Direction::Egress => Hook::Egress,
        }
    }
}

/// `struct config`: what the programs need to know of the session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Config {
    /// Bit n: remote slot n is in use.
    pub remotes: u64,
    /// Nanoseconds from the time since boot to the time since 1970.
    pub clock: u64,
    /// Bytes, or packets, a second; 0 for any.
    pub rate: u64,
    /// ifindexes of the relay: the bridge, its port, and the port's peer.
    pub relay: u32,
    pub port: u32,
    pub peer: u32,
    /// One of so many packets, and of so many flows, is copied; 0 and 1 mean all.
    pub sample: u32,
    pub sample_flows: u32,
    /// Bytes of a frame that are copied; 0 for all.
    pub snaplen: u32,
    /// `enum oversize`.
    pub oversize: u8,
    /// IP protocol number of the tunnel.
    pub protocol: u8,
    /// UDP port of the tunnel, 0 without UDP.
    pub udp_port: u16,
    /// `enum spread`.
    pub spread: u8,
    /// Whether the underlay map has entries.
    pub underlay: bool,
    /// Key of the first chunk of the request in force.
    pub request: u16,
    /// Whether `rate` is of packets.
    pub rate_packets: bool,
    /// GRE protocol type of the tunnel, 0 over UDP.
    pub gre: u16,
    /// GRE keys, by direction.
    pub keys: Option<[u32; 2]>,
    /// Whether taps count their own time.
    pub profile: bool,
    /// Bit n: remote slot n is in use and gets no copies.
    pub down: u64,
}

impl Config {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = self.remotes.to_ne_bytes().to_vec();
        bytes.extend(self.clock.to_ne_bytes());
        bytes.extend(self.rate.to_ne_bytes());
        for word in [self.relay, self.port, self.peer, self.sample, self.sample_flows, self.snaplen] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend([self.oversize, self.protocol]);
        bytes.extend(self.udp_port.to_ne_bytes());
        bytes.extend([self.spread, self.underlay.into()]);
        bytes.extend(self.request.to_ne_bytes());
        bytes.extend([u8::from(self.rate_packets), u8::from(self.keys.is_some())]);
        bytes.extend(self.gre.to_ne_bytes());
        for word in self.keys.unwrap_or_default().into_iter().chain([self.profile.into()]) {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(self.down.to_ne_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Config> {
        let mut cursor = Cursor::new(bytes, OLDEST_CONFIG, "config")?;
        Ok(Config {
            remotes: cursor.u64(),
            clock: cursor.u64(),
            rate: cursor.u64(),
            relay: cursor.u32(),
            port: cursor.u32(),
            peer: cursor.u32(),
            sample: cursor.u32(),
            sample_flows: cursor.u32(),
            snaplen: cursor.u32(),
            oversize: cursor.u8(),
            protocol: cursor.u8(),
            udp_port: cursor.u16(),
            spread: cursor.u8(),
            underlay: cursor.u8() != 0,
            request: cursor.u16(),
            rate_packets: cursor.u8() != 0,
            ..Config::decode_gre(&mut cursor)
        })
    }
}

impl Config {
    fn decode_gre(cursor: &mut Cursor) -> Config {
        let (keyed, gre, keys) = (cursor.u8() != 0, cursor.u16(), [cursor.u32(), cursor.u32()]);
        let (profile, down) = (cursor.u32() != 0, cursor.u64());
        Config { gre, keys: keyed.then_some(keys), profile, down, ..Config::default() }
    }
}

/// `struct stat`: packets, bytes, drops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Stat {
    pub pcnt: u64,
    pub bcnt: u64,
    pub dcnt: u64,
}

impl Stat {
    pub(crate) fn decode(bytes: &[u8]) -> Result<Stat> {
        let mut cursor = Cursor::new(bytes, 24, "stat")?;
        Ok(Stat { pcnt: cursor.u64(), bcnt: cursor.u64(), dcnt: cursor.u64() })
    }

    /// The sum over the CPUs.
    pub(crate) fn sum(stats: impl IntoIterator<Item = Stat>) -> Stat {
        stats.into_iter().fold(Stat::default(), |sum, stat| Stat {
            pcnt: sum.pcnt + stat.pcnt,
            bcnt: sum.bcnt + stat.bcnt,
            dcnt: sum.dcnt + stat.dcnt,
        })
    }
}

/// `struct size`, copies and their bytes, or `struct time`, calls and their nanoseconds: those of one power of two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bin {
    pub count: u64,
    pub sum: u64,
}

impl Bin {
    pub(crate) fn decode(bytes: &[u8]) -> Result<Bin> {
        let mut cursor = Cursor::new(bytes, 16, "size or time")?;
        Ok(Bin { count: cursor.u64(), sum: cursor.u64() })
    }
}

/// `struct forms`: what copies were like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Forms {
    /// Super-packets that were to be copied, one for each remote, and the wire frames in them.
    pub super_packets: u64,
    pub segments: u64,
    /// Copies with a VLAN tag.
    pub vlan: u64,
    /// Copies that were cut, and sent.
    pub truncated: u64,
    /// Copies that were sent in outer fragments, and the outer packets that these took.
    pub fragmented: u64,
    pub fragments: u64,
}

impl Forms {
    pub(crate) const BYTES: usize = 48;

    pub(crate) fn decode(bytes: &[u8]) -> Result<Forms> {
        let mut cursor = Cursor::new(bytes, Forms::BYTES, "forms")?;
        Ok(Forms {
            super_packets: cursor.u64(),
            segments: cursor.u64(),
            vlan: cursor.u64(),
            truncated: cursor.u64(),
            fragmented: cursor.u64(),
            fragments: cursor.u64(),
        })
    }

    /// The sum over the CPUs.
    pub(crate) fn sum(forms: impl IntoIterator<Item = Forms>) -> Forms {
        forms.into_iter().fold(Forms::default(), |sum, at| Forms {
            super_packets: sum.super_packets + at.super_packets,
            segments: sum.segments + at.segments,
            vlan: sum.vlan + at.vlan,
            truncated: sum.truncated + at.truncated,
            fragmented: sum.fragmented + at.fragmented,
            fragments: sum.fragments + at.fragments,
        })
    }
}

/// `struct choice`: what a tap has met, in wire frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Choice {
    /// All but the session's own packets.
    pub seen: u64,
    /// The filter did not take them.
    pub filtered: u64,
    /// Sampling left them out.
    pub skipped: u64,
    /// Copies, and other packets of the session's tunnels.
    pub own: u64,
}

/// `struct tap_key`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TapKey {
    pub ifindex: u32,
    pub direction: Direction,
}

impl TapKey {
    pub(crate) fn encode(&self) -> Vec<u8> {
        [self.ifindex.to_ne_bytes(), (self.direction as u32).to_ne_bytes()].concat()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<TapKey> {
        let mut cursor = Cursor::new(bytes, 8, "tap_key")?;
        let ifindex = cursor.u32();
        let direction = if cursor.u32() == 0 { Direction::Ingress } else { Direction::Egress };
        Ok(TapKey { ifindex, direction })
    }
}

/// `struct tap`: the slot that a copy's mark names, and the counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tap {
    pub slot: u32,
    /// The device that takes its copies home from another network namespace; 0 in our own.
    pub relay: u32,
    pub counts: TapCounts,
}

/// The counters of a tap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct TapCounts {
    pub stat: Stat,
    #[serde(flatten)]
    pub choice: Choice,
}

impl TapCounts {
    /// The sum over the CPUs, or over taps.
    pub(crate) fn sum(counts: impl IntoIterator<Item = TapCounts>) -> TapCounts {
        counts.into_iter().fold(TapCounts::default(), |sum, counts| TapCounts {
            stat: Stat::sum([sum.stat, counts.stat]),
            choice: Choice {
                seen: sum.choice.seen + counts.choice.seen,
                filtered: sum.choice.filtered + counts.choice.filtered,
                skipped: sum.choice.skipped + counts.choice.skipped,
                own: sum.choice.own + counts.choice.own,
            },
        })
    }
}

impl Tap {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = self.slot.to_ne_bytes().to_vec();
        bytes.extend(self.relay.to_ne_bytes());
        let TapCounts { stat, choice } = &self.counts;
        for count in [stat.pcnt, stat.bcnt, stat.dcnt, choice.seen, choice.filtered, choice.skipped, choice.own] {
            bytes.extend(count.to_ne_bytes());
        }
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Tap> {
        let mut cursor = Cursor::new(bytes, 64, "tap")?;
        let (slot, relay) = (cursor.u32(), cursor.u32());
        let stat = Stat { pcnt: cursor.u64(), bcnt: cursor.u64(), dcnt: cursor.u64() };
        let choice = Choice { seen: cursor.u64(), filtered: cursor.u64(), skipped: cursor.u64(), own: cursor.u64() };
        Ok(Tap { slot, relay, counts: TapCounts { stat, choice } })
    }
}

/// `enum remote_flag`.
pub(crate) mod remote_flag {
    pub(crate) const UNRESOLVED: u16 = 1;
    pub(crate) const FINISH: u16 = 2;
    pub(crate) const DF: u16 = 4;
    pub(crate) const PER_FRAME: u16 = 8;
    pub(crate) const IPV6: u16 = 16;
    pub(crate) const L3: u16 = 32;
    pub(crate) const FLOW: u16 = 64;
    pub(crate) const UDP_CHECKSUM: u16 = 128;
    pub(crate) const QUEUED: u16 = 256;
    pub(crate) const TELL: u16 = 512;
}

/// Bytes of `struct remote` before its templates.
const REMOTE_HEAD: usize = 40;

/// `struct remote`: finished outer header bytes and what the kernel needs to patch and send them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Remote {
    /// `BPF_F_ADJ_ROOM_ENCAP_*`.
    pub room_flags: u64,
    pub ifindex: u32,
    /// Bytes of the largest outer IP packet.
    pub mtu: u32,
    /// Unfolded sum of the outer IPv4 header's 16-bit words as they lie in memory.
    pub sum: u32,
    /// The same of the UDP checksum's constant words, by direction.
    pub udp_sum: [u32; 2],
    pub flags: u16,
    /// Bytes from the outer Ethernet header to the last of the tunnel header.
    pub outer_len: u8,
    pub ip_len: u8,
    /// Where to patch: offsets in a template, 0 for nowhere.
    pub at: Positions,
    /// ERSPAN's encapsulation field for a tagged frame.
    pub tagged: u8,
    /// Key of the out interface in the devices map.
    pub device: u8,
    /// By direction.
    pub headers: [Template; 2],
}

/// Room for the outer headers, the IP header at [`HEADER_L3`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Template(pub [u8; HEADER_BYTES]);

impl Default for Template {
    fn default() -> Template {
        Template([0; HEADER_BYTES])
    }
}

/// Offsets in a template.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Positions {
    pub udp: u8,
    pub sequence: u8,
    pub vlan: u8,
    pub port: u8,
    pub time: u8,
    pub seconds: u8,
}

impl Remote {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = self.room_flags.to_ne_bytes().to_vec();
        for word in [self.ifindex, self.mtu, self.sum, self.udp_sum[0], self.udp_sum[1]] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(self.flags.to_ne_bytes());
        bytes.extend([self.outer_len, self.ip_len]);
        let at = &self.at;
        bytes.extend([at.udp, at.sequence, at.vlan, at.port, at.time, at.seconds, self.tagged, self.device]);
        bytes.extend(self.headers.iter().flat_map(|header| header.0));
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Remote> {
        let mut cursor = Cursor::new(bytes, REMOTE_HEAD + 2 * HEADER_BYTES, "remote")?;
        let header = |at: usize| -> Result<Template> { Ok(Template(bytes[at..at + HEADER_BYTES].try_into()?)) };
        Ok(Remote {
            room_flags: cursor.u64(),
            ifindex: cursor.u32(),
            mtu: cursor.u32(),
            sum: cursor.u32(),
            udp_sum: [cursor.u32(), cursor.u32()],
            flags: cursor.u16(),
            outer_len: cursor.u8(),
            ip_len: cursor.u8(),
            at: Positions {
                udp: cursor.u8(),
                sequence: cursor.u8(),
                vlan: cursor.u8(),
                port: cursor.u8(),
                time: cursor.u8(),
                seconds: cursor.u8(),
            },
            tagged: cursor.u8(),
            device: cursor.u8(),
            headers: [header(REMOTE_HEAD)?, header(REMOTE_HEAD + HEADER_BYTES)?],
        })
    }

    pub(crate) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// The outer headers of a direction as they go out, before patching; without the Ethernet header where the out
    /// interface takes none.
    pub(crate) fn outer(&self, direction: Direction) -> &[u8] {
        let start = HEADER_L3 - ETHERNET;
        let bytes = &self.headers[direction as usize].0[start..start + usize::from(self.outer_len)];
        if self.has(remote_flag::L3) { &bytes[ETHERNET..] } else { bytes }
    }

    /// The next hop's link-layer address.
    pub(crate) fn mac(&self) -> &[u8] {
        &self.headers[0].0[HEADER_L3 - ETHERNET..][..6]
    }

    /// Outer source and remote address.
    pub(crate) fn addresses(&self) -> (IpAddr, IpAddr) {
        let ip = &self.headers[0].0[HEADER_L3..];
        if self.has(remote_flag::IPV6) {
            let at = |start: usize| <[u8; 16]>::try_from(&ip[start..start + 16]).unwrap_or_default().into();
            return (at(8), at(24));
        }
        let at = |start: usize| <[u8; 4]>::try_from(&ip[start..start + 4]).unwrap_or_default().into();
        (at(12), at(16))
    }
}

fn mapped(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

/// `struct tunnel_key`: outer source and remote, IPv4 as `::ffff:a.b.c.d`.
pub(crate) fn tunnel_key(source: IpAddr, remote: IpAddr) -> Vec<u8> {
    [mapped(source), mapped(remote)].concat()
}

/// `enum device_key`: keys of the devices map.
pub(crate) mod device {
    pub(crate) const RELAY: u32 = 0;
    pub(crate) const PEER: u32 = 1;

    /// A remote's two keys, used in turn, so that one write of the remote moves it to another interface.
    pub(crate) fn of_remote(slot: u32) -> [u8; 2] {
        [(2 + 2 * slot) as u8, (3 + 2 * slot) as u8]
    }
}

/// `struct out`: what an out interface and its queue have dropped of all their traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Out {
    /// What the device and its qdiscs said when they were last asked.
    pub device: u64,
    pub queue: u64,
    /// Since the session uses it.
    pub dropped: u64,
}

impl Out {
    pub(crate) fn encode(&self) -> Vec<u8> {
        [self.device, self.queue, self.dropped].map(u64::to_ne_bytes).concat()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Out> {
        let mut cursor = Cursor::new(bytes, 24, "out")?;
        Ok(Out { device: cursor.u64(), queue: cursor.u64(), dropped: cursor.u64() })
    }

    /// After another look. A counter that is smaller than before has begun again: then all of it is new.
    pub(crate) fn now(self, device: u64, queue: u64) -> Out {
        let risen = |before: u64, now: u64| now.checked_sub(before).unwrap_or(now);
        let dropped = self.dropped + risen(self.device, device) + risen(self.queue, queue);
        Out { device, queue, dropped }
    }
}

/// `enum underlay`.
pub(crate) mod underlay {
    pub(crate) const ANY: u32 = 1;
    pub(crate) const FRAGMENTS: u32 = 2;
}

/// `struct underlay_key`: where an out interface that is a tunnel sends its own packets; port 0 for any.
pub(crate) fn underlay_key(address: IpAddr, port: u16) -> Vec<u8> {
    [&mapped(address)[..], &port.to_ne_bytes(), &[0; 2]].concat()
}

/// `struct request`: text in chunks, ended by a zero, the last one padded with them: what an older, longer request has
/// left behind it is not read.
pub(crate) fn encode_request(json: &str) -> Result<Vec<Vec<u8>>> {
    ensure!(
        json.len() < REQUEST_BYTES * REQUEST_CHUNKS,
        "the request takes {} bytes, a session remembers at most {}; split it into sessions with --name",
        json.len(),
        REQUEST_BYTES * REQUEST_CHUNKS - 1
    );
    let pad = |chunk: &[u8]| [chunk, &vec![0; REQUEST_BYTES - chunk.len()]].concat();
    Ok([json.as_bytes(), &[0]].concat().chunks(REQUEST_BYTES).map(pad).collect())
}

/// The text again, from the chunks in their order.
pub(crate) fn decode_request(chunks: &[Vec<u8>]) -> Result<String> {
    let text = chunks.concat();
    Ok(std::str::from_utf8(text.split(|byte| *byte == 0).next().unwrap_or_default())?.to_string())
}

/// Reads fixed-size fields in host byte order off the front of a value. Structs grow at their ends: what an older version
/// did not have is 0, what a newer one has more is passed over.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    /// `oldest`: the bytes of the first version that is read.
    fn new(bytes: &'a [u8], oldest: usize, what: &str) -> Result<Cursor<'a>> {
        let len = bytes.len();
        ensure!(len >= oldest, "{what} in the kernel has {len} bytes, not {oldest}: an older snifctl made it");
        Ok(Cursor(bytes))
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, rest) = self.0.split_at(N.min(self.0.len()));
        self.0 = rest;
        let mut bytes = [0; N];
        bytes[..head.len()].copy_from_slice(head);
        bytes
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
