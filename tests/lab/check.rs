//! Comparing frames so that a failure can be read.

use std::collections::HashMap;
use std::fmt::Write;

/// How many bytes of a frame a message shows.
const SHOWN: usize = 128;

/// Panics unless both hold the same frames equally often, in any order; shows the first missing and the first
/// unexpected one.
#[track_caller]
pub(crate) fn assert_same_frames(expected: &[Vec<u8>], got: &[Vec<u8>]) {
    let (missing, unexpected) = multiset_diff(expected, got);
    if missing.is_empty() && unexpected.is_empty() {
        return;
    }
    let mut message = format!(
        "expected {} frames, got {}: {} missing, {} unexpected",
        expected.len(),
        got.len(),
        missing.len(),
        unexpected.len()
    );
    if let Some(frame) = missing.first() {
        let _ = write!(message, "\nfirst missing, {}", show(frame, closest(frame, &unexpected)));
    }
    if let Some(frame) = unexpected.first() {
        let _ = write!(message, "\nfirst unexpected, {}", show(frame, closest(frame, &missing)));
    }
    panic!("{message}");
}

/// The frames of `expected` that `got` lacks, and those of `got` that were not expected, both in their order.
pub(crate) fn multiset_diff<'a>(expected: &'a [Vec<u8>], got: &'a [Vec<u8>]) -> (Vec<&'a [u8]>, Vec<&'a [u8]>) {
    (without(expected, got), without(got, expected))
}

fn without<'a>(frames: &'a [Vec<u8>], taken: &[Vec<u8>]) -> Vec<&'a [u8]> {
    let mut budget: HashMap<&[u8], usize> = HashMap::new();
    for frame in taken {
        *budget.entry(frame).or_default() += 1;
    }
    let mut left = Vec::new();
    for frame in frames {
        match budget.get_mut(frame.as_slice()) {
            Some(count) if *count > 0 => *count -= 1,
            _ => left.push(frame.as_slice()),
        }
    }
    left
}

/// The candidate that most bytes of `frame` equal, so that the message can show where they part.
fn closest<'a>(frame: &[u8], candidates: &[&'a [u8]]) -> Option<&'a [u8]> {
    let equal = |other: &&&[u8]| frame.iter().zip(**other).filter(|(a, b)| a == b).count();
    candidates.iter().max_by_key(equal).copied()
}

fn show(frame: &[u8], closest: Option<&[u8]>) -> String {
    let Some(other) = closest else {
        return format!("{} bytes:\n{}", frame.len(), hex(frame));
    };
    let parting = frame.iter().zip(other).position(|(a, b)| a != b).unwrap_or(frame.len().min(other.len()));
    let from = parting.saturating_sub(SHOWN / 2) & !15;
    format!(
        "{} bytes:\n{}\nthe closest opposite has {} bytes and differs first at offset {parting} ({parting:#x}):\n{}",
        frame.len(),
        hex_from(frame, from),
        other.len(),
        hex_from(other, from)
    )
}

/// The first bytes in hex, 16 a line with their offset.
pub(crate) fn hex(bytes: &[u8]) -> String {
    hex_from(bytes, 0)
}

fn hex_from(bytes: &[u8], from: usize) -> String {
    let end = bytes.len().min(from + SHOWN);
    let mut lines = Vec::new();
    for (at, row) in bytes.get(from..end).unwrap_or_default().chunks(16).enumerate() {
        let row: Vec<String> = row.iter().map(|byte| format!("{byte:02x}")).collect();
        lines.push(format!("    {:04x}: {}", from + at * 16, row.join(" ")));
    }
    if end < bytes.len() {
        lines.push(format!("    ... {} more", bytes.len() - end));
    }
    lines.join("\n")
}
