//! Reading a pcapng file by hand (draft-ietf-opsawg-pcapng): in a guest, which is slow, tshark takes its time to start.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::collect::Written;

const INTERFACE: u32 = 1;
const PACKET: u32 = 6;
/// Options: an interface's name, and a packet's flags.
const NAME: u16 = 2;
const FLAGS: u16 = 2;
const NANOSECONDS: (u16, &[u8]) = (9, &[9]);

/// Every frame of a file of one section, little-endian, with times in nanoseconds; panics on anything else.
pub(crate) fn read(file: &Path) -> Vec<Written> {
    let bytes = fs::read(file).unwrap_or_else(|err| panic!("read {}: {err}", file.display()));
    let (mut names, mut all) = (Vec::new(), Vec::new());
    for (kind, body) in blocks(&bytes) {
        match kind {
            INTERFACE => {
                let options = &body[8..];
                assert_eq!(option(options, NANOSECONDS.0), Some(NANOSECONDS.1), "if_tsresol");
                let name = option(options, NAME).expect("a name").to_vec();
                names.push(String::from_utf8(name).expect("UTF-8"));
            }
            PACKET => all.push(packet(&names, body)),
            _ => {}
        }
    }
    all
}

fn packet(names: &[String], body: &[u8]) -> Written {
    let length = word(body, 12);
    let padded = 20 + length.next_multiple_of(4);
    let flags = option(&body[padded..], FLAGS).map_or(0, |flags| flags[0]);
    Written {
        interface: names[word(body, 0)].clone(),
        time: Duration::from_nanos((word(body, 4) as u64) << 32 | word(body, 8) as u64),
        wire: word(body, 16),
        direction: flags & 3,
        frame: body[20..20 + length].to_vec(),
    }
}

/// Type and body of each block.
fn blocks(mut bytes: &[u8]) -> Vec<(u32, &[u8])> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let length = word(bytes, 4);
        assert_eq!(word(bytes, length - 4), length, "a block's length at its end");
        all.push((word(bytes, 0) as u32, &bytes[8..length - 4]));
        bytes = &bytes[length..];
    }
    all
}

/// The value of an option.
fn option(mut options: &[u8], code: u16) -> Option<&[u8]> {
    while let [low, high, short, long, rest @ ..] = options {
        let (found, length) = (u16::from_le_bytes([*low, *high]), usize::from(u16::from_le_bytes([*short, *long])));
        if found == code {
            return Some(&rest[..length]);
        }
        options = rest.get(length.next_multiple_of(4)..)?;
    }
    None
}

fn word(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize
}
