//! The judge of order: what leaves towards a collector must pass there in the order in which the watched interface saw
//! it, both directions as one sequence.
//!
//! Copies are captured where they leave, in the host namespace: the collector's end of a veth mixes what two CPUs send.
//! Packets that two CPUs handle at the same moment have no order; so [`assert_in_order`] is for traffic of one CPU, or
//! of which each packet causes the next, and [`assert_tcp_reads_the_same`] for all other.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::process::Command;

use super::capture::{Capture, Direction};
use super::frames::TCP;
use super::tunnels::packets_to;
use super::{Lab, Ns, check_output, pcap};

/// The watched interface and the one through which copies leave, seen from the host namespace.
pub(crate) struct Watch {
    wire: Capture,
    /// None where copies leave through the watched interface itself.
    out: Option<Capture>,
}

/// What passed: the watched frames in order, and all packets on the way out.
pub(crate) struct Seen {
    pub wire: Vec<Vec<u8>>,
    pub out: Vec<Vec<u8>>,
}

impl Lab {
    /// Captures both directions of eth0 as one sequence, and what leaves through `out`, which may be eth0, too.
    pub(crate) fn watch_order(&self, out: &str) -> Watch {
        let wire = self.capture(Ns::Host, "eth0", Direction::Both);
        let out = (out != "eth0").then(|| self.capture(Ns::Host, out, Direction::Out));
        Watch { wire, out }
    }
}

impl Watch {
    /// Ends both captures. `remotes` tell copies from watched frames on an interface that carries both.
    #[track_caller]
    pub(crate) fn stop(&mut self, remotes: &[IpAddr]) -> Seen {
        self.wire.settle();
        let wire = self.wire.stop();
        let Some(out) = &mut self.out else {
            let is_copy =
                |frame: &Vec<u8>| remotes.iter().any(|to| !packets_to(std::slice::from_ref(frame), *to).is_empty());
            let (out, wire) = wire.into_iter().partition(is_copy);
            return Seen { wire, out };
        };
        out.settle();
        Seen { wire, out: out.stop() }
    }
}

// ---- the sequence ----

/// What of the watched frames has no copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Missing {
    /// Frames without any copy.
    pub whole: usize,
    /// Super-packets of which segments are missing.
    pub partly: usize,
}

/// Panics unless the copies are what passed, in the same order, though some may be missing; says how many. A copy of TCP
/// over IPv4 may be a part of a super-packet. None is longer than `limit`, and only that cuts one.
#[track_caller]
pub(crate) fn assert_in_order(wire: &[Vec<u8>], copies: &[Vec<u8>], limit: usize) -> Missing {
    let mut cursor = Cursor { wire, at: 0, taken: 0, torn: false, missing: Missing::default() };
    for (number, copy) in copies.iter().enumerate() {
        assert!(cursor.find(copy), "copy {} of {}: {}", number + 1, copies.len(), cursor.explain(copy));
        let len = Segment::of(copy).map_or(copy.len(), |segment| segment.end).min(limit);
        assert_eq!(copy.len(), len, "copy {} is cut at the wrong place: {}", number + 1, show(copy));
    }
    cursor.skip_to(wire.len());
    cursor.missing
}

/// The watched frames, and how far copies have come.
struct Cursor<'a> {
    wire: &'a [Vec<u8>],
    at: usize,
    /// Of the stream in frame `at`: where the last copy ended, and whether there was a hole before.
    taken: u32,
    torn: bool,
    missing: Missing,
}

impl Cursor<'_> {
    /// Goes on behind the frame, or the part of it, that this is a copy of; false where none follows.
    fn find(&mut self, copy: &[u8]) -> bool {
        let taken = |at: usize| if at == self.at { self.taken } else { 0 };
        let found = (self.at..self.wire.len()).find_map(|at| Some((at, take(&self.wire[at], taken(at), copy)?)));
        let Some((at, (from, end))) = found else { return false };
        self.skip_to(at);
        self.torn |= from > self.taken;
        self.taken = end;
        if end == span(&self.wire[at]) {
            self.missing.partly += usize::from(self.torn);
            (self.at, self.taken, self.torn) = (at + 1, 0, false);
        }
        true
    }

    fn skip_to(&mut self, at: usize) {
        if at > self.at {
            let partly = usize::from(self.taken > 0);
            self.missing.partly += partly;
            self.missing.whole += at - self.at - partly;
            (self.at, self.taken, self.torn) = (at, 0, false);
        }
    }

    /// Why no frame that follows is the one.
    fn explain(&self, copy: &[u8]) -> String {
        let passed =
            (0..self.wire.len()).find(|at| (0..=span(&self.wire[*at])).any(|from| self.starts(*at, from, copy)));
        let passed =
            passed.map_or("no frame that passed is like it".into(), |at| format!("it passed as frame {}", at + 1));
        format!("{} {passed}; the copies before it have come to frame {} of {}", show(copy), self.at, self.wire.len())
    }

    fn starts(&self, at: usize, from: u32, copy: &[u8]) -> bool {
        take(&self.wire[at], from, copy).is_some()
    }
}

/// The frames with neighbours put together that one super-packet may have been: what was cut in another way than on the wire
/// is compared with that. TCP stacks make super-packets whatever their interface offloads.
pub(crate) fn joined(wire: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut all: Vec<Vec<u8>> = Vec::new();
    for frame in wire {
        match all.last_mut() {
            Some(last) if follows(last, frame) => append(last, frame),
            _ => all.push(frame.clone()),
        }
    }
    all
}

/// Whether the frame's data go on where those of the one before it end.
fn follows(before: &[u8], frame: &[u8]) -> bool {
    let (Some(before), Some(frame)) = (Segment::of(before), Segment::of(frame)) else { return false };
    let same = (before.flow, before.ack) == (frame.flow, frame.ack) && before.flags + frame.flags == 0;
    same && before.len > 0
        && frame.len > 0
        && before.seq.wrapping_add(before.len) == frame.seq
        && before.end + frame.data.len() < 65_000
}

fn append(last: &mut Vec<u8>, frame: &[u8]) {
    last.extend(Segment::of(frame).map_or(&[][..], |segment| segment.data));
    let len = (last.len() - 14) as u16;
    last[16..18].copy_from_slice(&len.to_be_bytes());
}

/// Where in a frame's stream the copy begins and ends, if it is one of the frame's part from `from` on; 0 where there is no
/// stream.
fn take(frame: &[u8], from: u32, copy: &[u8]) -> Option<(u32, u32)> {
    let (Some(whole), Some(part)) = (Segment::of(frame), Segment::of(copy)) else {
        return frame.starts_with(copy).then_some((0, 0));
    };
    let at = part.seq.wrapping_sub(whole.seq);
    let end = at.checked_add(part.span())?;
    let same = (whole.flow, whole.ack) == (part.flow, part.ack) && (whole.span() == 0) == (part.span() == 0);
    let data = |segment: &Segment, skip: u32| segment.data.get(skip as usize..).unwrap_or_default().to_vec();
    let same = same && at >= from && end <= whole.span() && data(&whole, at).starts_with(part.data);
    same.then_some((at, end))
}

fn span(frame: &[u8]) -> u32 {
    Segment::of(frame).map_or(0, |segment| segment.span())
}

fn show(frame: &[u8]) -> String {
    match Segment::of(frame) {
        Some(Segment { flow, seq, ack, .. }) => {
            let ports = (be16(flow, 8), be16(flow, 10));
            format!("TCP, ports {ports:?}, sequence {seq} and {}, ack {ack},", span(frame))
        }
        None => format!("{} bytes {:02x?}", frame.len(), &frame[..frame.len().min(48)]),
    }
}

/// A TCP segment over IPv4, perhaps cut, and its place in the stream.
struct Segment<'a> {
    /// Addresses and ports.
    flow: &'a [u8],
    seq: u32,
    ack: u32,
    /// Of the sequence numbers, SYN and FIN take one each.
    flags: u32,
    /// Bytes of the stream by the IP header, and those that are there.
    len: u32,
    data: &'a [u8],
    /// Where the frame ends that is not cut.
    end: usize,
}

impl Segment<'_> {
    fn of(frame: &[u8]) -> Option<Segment<'_>> {
        let is_tcp = frame.get(12..15)? == [8, 0, 0x45] && *frame.get(23)? == TCP;
        let (ip, tcp) = (frame.get(14..34)?, frame.get(34..54)?);
        if !is_tcp || be16(ip, 6) & 0x3fff != 0 {
            return None;
        }
        let (end, header) = (14 + usize::from(be16(ip, 2)), 34 + usize::from(tcp[12] >> 4) * 4);
        Some(Segment {
            flow: &frame[26..38],
            seq: be32(tcp, 4),
            ack: be32(tcp, 8),
            flags: u32::from(tcp[13] & 1) + u32::from(tcp[13] >> 1 & 1),
            len: end.checked_sub(header)? as u32,
            data: frame.get(header..frame.len().min(end)).unwrap_or_default(),
            end,
        })
    }

    fn span(&self) -> u32 {
        self.len + self.flags
    }
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from(be16(bytes, at)) << 16 | u32::from(be16(bytes, at + 2))
}

// ---- what a receiver makes of it ----

/// What tshark finds strange in the order of a TCP connection.
const STRANGE: [&str; 5] = ["retransmission", "out_of_order", "lost_segment", "ack_lost_segment", "duplicate_ack"];

/// What a receiver reads in a sequence of frames.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reading {
    /// What is strange, and the connection in which it is.
    pub strange: BTreeSet<(&'static str, String)>,
    /// Connections, by the addresses and ports of both ends.
    pub connections: BTreeSet<String>,
    /// HTTP responses that are whole.
    pub responses: usize,
}

impl Lab {
    /// Has tshark read frames in this order. One that is cut is read as from a capture that has cut it.
    #[track_caller]
    pub(crate) fn read_tcp(&self, frames: &[Vec<u8>]) -> Reading {
        let path = self.fresh_path("order.pcap");
        pcap::write_cut(&path, frames, |frame| Segment::of(frame).map_or(frame.len(), |segment| segment.end));
        let mut tshark = Command::new("tshark");
        tshark.env("HOME", "/tmp").env("LC_ALL", "C").arg("-n").arg("-r").arg(&path);
        tshark.args(["-Y", "tcp", "-T", "fields", "-E", "separator=/t", "-e", "http.response.code"]);
        tshark.args(["-e", "ip.src", "-e", "tcp.srcport", "-e", "ip.dst", "-e", "tcp.dstport"]);
        tshark.args(STRANGE.iter().flat_map(|name| ["-e".into(), format!("tcp.analysis.{name}")]));
        let out = check_output("tshark", tshark.output());
        let mut reading = Reading::default();
        String::from_utf8_lossy(&out.stdout).lines().for_each(|line| reading.add(line));
        reading
    }

    /// Panics if tshark finds anything strange in the copies of a connection in which it finds nothing strange where it
    /// passed, or not a response in each. `cut` copies hold no whole response.
    #[track_caller]
    pub(crate) fn assert_tcp_reads_the_same(&self, wire: &[Vec<u8>], copies: &[Vec<u8>], cut: bool) {
        let (wire, copies) = (self.read_tcp(wire), self.read_tcp(copies));
        assert_eq!(copies.connections, wire.connections, "connections");
        let strange_there: BTreeSet<&String> = wire.strange.iter().map(|(_, ends)| ends).collect();
        let strange = copies.strange.iter().filter(|(_, ends)| !strange_there.contains(ends)).collect::<Vec<_>>();
        assert!(strange.is_empty(), "in the copies alone: {strange:?}");
        assert!(strange_there.len() < wire.connections.len(), "every watched connection is strange: {wire:#?}");
        let responses = [wire.responses, if cut { wire.responses } else { copies.responses }];
        assert_eq!(responses, [wire.connections.len(); 2], "responses that passed and were copied, one a connection");
    }
}

impl Reading {
    /// A line of tshark: response code, both ends, and a field for each thing that may be strange.
    fn add(&mut self, line: &str) {
        let fields: Vec<&str> = line.split('\t').collect();
        let mut ends = [fields[1..3].join(":"), fields[3..5].join(":")];
        ends.sort_unstable();
        let ends = ends.join(" ");
        self.responses += usize::from(fields[0] == "200");
        let found = STRANGE.iter().zip(&fields[5..]).filter(|(_, field)| !field.is_empty());
        self.strange.extend(found.map(|(name, _)| (*name, ends.clone())));
        self.connections.insert(ends);
    }
}
