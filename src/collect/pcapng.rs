//! The bytes of captures: pcapng (draft-ietf-opsawg-pcapng), and pcap with nanoseconds. Both are written little-endian.

use crate::datapath::abi::Direction;

const SECTION: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const STATISTICS: u32 = 5;
const PACKET: u32 = 6;
const ETHERNET: u16 = 1;
const MAGIC: u32 = 0x1a2b_3c4d;
const PCAP_NANOSECONDS: u32 = 0xa1b2_3c4d;
/// The largest frame that readers take as sound (MAXIMUM_SNAPLEN in libpcap).
const SNAPLEN: u32 = 262_144;

/// A frame, and what is told of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame<'a> {
    /// Nanoseconds since 1970.
    pub time: u64,
    pub direction: Option<Direction>,
    /// Frames that are missing before it.
    pub gap: u64,
    /// Bytes that it had on the wire.
    pub wire: u32,
    pub bytes: &'a [u8],
}

/// What became of an interface's frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Statistics {
    /// Of the first frame and the last one.
    pub begin: u64,
    pub end: u64,
    pub received: u64,
    pub lost: u64,
}

/// Writes a block: its type, what `body` writes, and its length on both sides.
fn block(out: &mut Vec<u8>, kind: u32, body: impl FnOnce(&mut Vec<u8>)) {
    let begin = out.len();
    out.extend(kind.to_le_bytes());
    out.extend([0; 4]);
    body(out);
    let length = ((out.len() - begin + 4) as u32).to_le_bytes();
    out.extend(length);
    out[begin + 4..begin + 8].copy_from_slice(&length);
}

fn padded(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(bytes);
    out.extend_from_slice(&[0; 3][..bytes.len().next_multiple_of(4) - bytes.len()]);
}

fn option(out: &mut Vec<u8>, code: u16, value: &[u8]) {
    out.extend(code.to_le_bytes());
    out.extend((value.len() as u16).to_le_bytes());
    padded(out, value);
}

fn end_of_options(out: &mut Vec<u8>) {
    out.extend([0; 4]);
}

/// What begins a file.
pub(crate) fn section(out: &mut Vec<u8>) {
    block(out, SECTION, |out| {
        out.extend(MAGIC.to_le_bytes());
        out.extend(1_u16.to_le_bytes());
        out.extend(0_u16.to_le_bytes());
        out.extend(u64::MAX.to_le_bytes()); // the section's length is not told
        option(out, 3, b"Linux");
        option(out, 4, concat!("snifctl ", env!("CARGO_PKG_VERSION")).as_bytes());
        end_of_options(out);
    });
}

/// Interfaces are numbered as they come, from 0.
pub(crate) fn interface(out: &mut Vec<u8>, name: &str) {
    block(out, INTERFACE, |out| {
        out.extend(ETHERNET.to_le_bytes());
        out.extend([0; 2]);
        out.extend(SNAPLEN.to_le_bytes());
        option(out, 2, name.as_bytes());
        option(out, 9, &[9]); // if_tsresol: nanoseconds
        end_of_options(out);
    });
}

fn halves(out: &mut Vec<u8>, time: u64) {
    out.extend(((time >> 32) as u32).to_le_bytes());
    out.extend((time as u32).to_le_bytes());
}

pub(crate) fn packet(out: &mut Vec<u8>, interface: u32, frame: &Frame) {
    block(out, PACKET, |out| {
        out.extend(interface.to_le_bytes());
        halves(out, frame.time);
        out.extend((frame.bytes.len() as u32).to_le_bytes());
        out.extend(frame.wire.to_le_bytes());
        padded(out, frame.bytes);
        let flags = match frame.direction {
            None => 0_u32,
            Some(Direction::Ingress) => 1,
            Some(Direction::Egress) => 2,
        };
        if flags != 0 {
            option(out, 2, &flags.to_le_bytes());
        }
        if frame.gap != 0 {
            option(out, 4, &frame.gap.to_le_bytes());
        }
        if flags != 0 || frame.gap != 0 {
            end_of_options(out);
        }
    });
}

pub(crate) fn statistics(out: &mut Vec<u8>, interface: u32, of: &Statistics) {
    block(out, STATISTICS, |out| {
        out.extend(interface.to_le_bytes());
        halves(out, of.end);
        for (code, time) in [(2, of.begin), (3, of.end)] {
            let mut bytes = Vec::new();
            halves(&mut bytes, time);
            option(out, code, &bytes);
        }
        option(out, 4, &(of.received + of.lost).to_le_bytes());
        option(out, 5, &of.lost.to_le_bytes());
        end_of_options(out);
    });
}

/// What begins a file of the old format.
pub(crate) fn pcap_header(out: &mut Vec<u8>) {
    out.extend(PCAP_NANOSECONDS.to_le_bytes());
    out.extend([2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    out.extend(SNAPLEN.to_le_bytes());
    out.extend(u32::from(ETHERNET).to_le_bytes());
}

pub(crate) fn pcap_packet(out: &mut Vec<u8>, frame: &Frame) {
    let (seconds, nanoseconds) = (frame.time / 1_000_000_000, frame.time % 1_000_000_000);
    for value in [seconds as u32, nanoseconds as u32, frame.bytes.len() as u32, frame.wire] {
        out.extend(value.to_le_bytes());
    }
    out.extend_from_slice(frame.bytes);
}
