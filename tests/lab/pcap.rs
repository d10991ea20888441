//! Classic pcap files, read and written by hand so that the lab needs no further crate.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

const MAGIC: u32 = 0xa1b2_c3d4; // microseconds, this machine's byte order
const ETHERNET: u32 = 1;
const SNAPLEN: u32 = 262_144;
const FILE_HEADER: usize = 24;
const RECORD_HEADER: usize = 16;

/// Writes Ethernet frames as a pcap file, in order, all at time 0.
pub(crate) fn write(path: &Path, frames: &[Vec<u8>]) {
    write_cut(path, frames, |frame| frame.len());
}

/// The same of frames that a capture has cut; `whole` tells how long each was.
pub(crate) fn write_cut(path: &Path, frames: &[Vec<u8>], whole: impl Fn(&[u8]) -> usize) {
    let mut file = Vec::new();
    for word in [MAGIC, 4 << 16 | 2, 0, 0, SNAPLEN, ETHERNET] {
        file.extend(word.to_ne_bytes());
    }
    for frame in frames {
        for word in [0, 0, frame.len() as u32, whole(frame) as u32] {
            file.extend(word.to_ne_bytes());
        }
        file.extend(frame);
    }
    fs::write(path, file).unwrap_or_else(|err| panic!("write {}: {err}", path.display()));
}

/// Reads all frames of a pcap file; panics on anything but whole Ethernet frames.
pub(crate) fn read(path: &Path) -> Vec<Vec<u8>> {
    let frame = |(n, (frame, original)): (usize, (Vec<u8>, usize))| {
        // libpcap sizes its ring by the MTU when the interface offloads nothing: a super-packet would be cut there.
        assert_eq!(frame.len(), original, "frame {} of {} was cut by the capture", n + 1, path.display());
        frame
    };
    records(path).into_iter().enumerate().map(frame).collect()
}

/// The same of frames that may have been cut.
pub(crate) fn read_cut(path: &Path) -> Vec<Vec<u8>> {
    records(path).into_iter().map(|(frame, _)| frame).collect()
}

/// Each frame, and how long it was on the wire.
fn records(path: &Path) -> Vec<(Vec<u8>, usize)> {
    let file = fs::read(path).unwrap_or_else(|err| panic!("read {}: {err}", path.display()));
    assert!(file.len() >= FILE_HEADER, "{} has no pcap header", path.display());
    assert_eq!(word(&file, 0), MAGIC, "{} is no pcap file", path.display());
    assert_eq!(word(&file, 20), ETHERNET, "{} holds no Ethernet frames", path.display());
    let mut frames = Vec::new();
    let mut rest = &file[FILE_HEADER..];
    while !rest.is_empty() {
        let (captured, original) = (word(rest, 8) as usize, word(rest, 12) as usize);
        frames.push((rest[RECORD_HEADER..RECORD_HEADER + captured].to_vec(), original));
        rest = &rest[RECORD_HEADER + captured..];
    }
    frames
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// Counts the packets of a pcap file that is still being written, reading only what is new.
pub(crate) struct Counter {
    path: PathBuf,
    at: u64,
    count: usize,
}

impl Counter {
    pub(crate) fn new(path: &Path) -> Counter {
        Counter { path: path.to_owned(), at: FILE_HEADER as u64, count: 0 }
    }

    /// How many whole packets the file holds now.
    pub(crate) fn count(&mut self) -> usize {
        while let Some(end) = self.next_record_end() {
            (self.at, self.count) = (end, self.count + 1);
        }
        self.count
    }

    fn next_record_end(&self) -> Option<u64> {
        let mut file = File::open(&self.path).ok()?;
        let size = file.metadata().ok()?.len();
        file.seek(SeekFrom::Start(self.at)).ok()?;
        let mut header = [0; RECORD_HEADER];
        match file.read_exact(&mut header) {
            Err(err) if err.kind() == ErrorKind::UnexpectedEof => return None,
            read => read.expect("read the capture"),
        }
        let end = self.at + (RECORD_HEADER + word(&header, 8) as usize) as u64;
        (end <= size).then_some(end)
    }
}
