//! Which packets of a capture a filter takes: said by the kernel, which runs the compiled filter on each.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

use crate::datapath::filter;
use crate::datapath::source::Source;
use crate::session::engine::Context;
use crate::session::home::Home;
use crate::tools::bpftool;
use crate::tools::exec::{Cmd, Runner};
use crate::tools::json;
use crate::tools::rights;

/// One packet of a capture: what was kept of it, and its length on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Packet {
    bytes: Vec<u8>,
    length: u32,
}

/// What the filter took.
#[derive(Debug)]
pub(crate) struct Verdict {
    pub packets: usize,
    /// Numbers of packets, from 1.
    pub matched: Vec<usize>,
    /// Packets of which the kernel's test took only the first [`TESTED`] bytes.
    pub cut: usize,
}

/// Bytes of a packet that the kernel's test surely takes: a page less what surrounds a packet.
const TESTED: usize = 3000;
/// What the program expects before the frame: see `bpf/match.bpf.c`.
const BEFORE: [u8; 14] = [0; 14];
/// Offset of `cb` in `struct __sk_buff`.
const CB_AT: usize = 48;
/// Packets that lie in files at a time.
const AT_A_TIME: usize = 2000;

/// Runs an expression's program on every packet of `file`, a capture of Ethernet in a format that tcpdump reads.
pub(super) fn test(context: &Context, expression: &str, file: &Path) -> Result<Verdict> {
    let runner = &context.runner;
    rights::to_write()?;
    let compiling = Source::matcher(filter::compile(runner, "EXPR", expression)?).begin(runner)?;
    let (packets, broken_off) = read(runner, file)?;
    if let Some(reason) = broken_off {
        let shown = shown(file);
        eprintln!("snifctl: -r {shown} ends early, so that {} packets were read: {reason}", packets.len());
    }
    let object = compiling.object(runner, &[])?;
    let home = Home::here()?;
    let pin = Pin::load(context, &home, &object)?;
    let mut matched = Vec::new();
    for (at, packets) in packets.chunks(AT_A_TIME).enumerate() {
        let taken = run(runner, &pin.path, packets)?;
        matched.extend(taken.iter().enumerate().filter(|(_, taken)| **taken).map(|(n, _)| at * AT_A_TIME + n + 1));
    }
    let cut = packets.iter().filter(|packet| packet.bytes.len() > TESTED).count();
    Ok(Verdict { packets: packets.len(), matched, cut })
}

/// What is to be known of how a verdict was reached.
pub(super) fn note(verdict: &Verdict) {
    if verdict.cut > 0 {
        eprintln!(
            "snifctl: {} packets are longer than {TESTED} bytes: what lies behind was not there for the filter",
            verdict.cut
        );
    }
}

/// The loaded program, pinned as long as this lives.
struct Pin<'a> {
    home: &'a Home,
    path: PathBuf,
}

impl<'a> Pin<'a> {
    fn load(context: &Context, home: &'a Home, object: &Path) -> Result<Pin<'a>> {
        // Dropped after the lock, which it takes itself.
        let pin = Pin { home, path: home.test_pin() };
        let _lock = home.lock_to_write(&context.runner, context.wait)?;
        home.remove_stale_tests();
        bpftool::load_one(&context.runner, object, &pin.path)?;
        Ok(pin)
    }
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        self.home.remove_if_unused();
    }
}

/// Does the program take each of these packets?
fn run(runner: &Runner, pin: &Path, packets: &[Packet]) -> Result<Vec<bool>> {
    let dir = tempfile::Builder::new().prefix("snifctl-").tempdir().context("cannot make a temporary directory")?;
    let context = |length: u32| dir.path().join(format!("length-{length}"));
    for length in packets.iter().map(|packet| packet.length).collect::<BTreeSet<_>>() {
        fs::write(context(length), [&[0; CB_AT], &length.to_ne_bytes()[..]].concat())?;
    }
    let mut lines = Vec::new();
    for (at, packet) in packets.iter().enumerate() {
        let data = dir.path().join(at.to_string());
        fs::write(&data, [&BEFORE, &packet.bytes[..packet.bytes.len().min(TESTED)]].concat())?;
        let (pin, data, context) = (pin.display(), data.display(), context(packet.length));
        lines.push(format!("prog run pinned {pin} data_in {data} ctx_in {}", context.display()));
    }
    let answers = bpftool::ask(runner, &lines)?;
    answers
        .iter()
        .map(|answer| Ok(answer["retval"].as_u64().with_context(|| json::unexpected("bpftool prog run"))? != 0))
        .collect()
}

/// The packets of a capture, and why they are not all where it ends in the middle of one, as it does while it is being
/// written. tcpdump reads it, whatever its format, and writes it as classic pcap. `-` is standard input.
fn read(runner: &Runner, file: &Path) -> Result<(Vec<Packet>, Option<String>)> {
    let answer = runner.answer(&Cmd::new("tcpdump", ["-r", &file.to_string_lossy(), "-w", "-"]).our_input())?;
    let shown = shown(file);
    let last = answer.stderr.lines().last().unwrap_or_default();
    let reason = last.trim_start_matches("tcpdump: ").trim_start_matches("pcap_loop: ").to_string();
    let broken_off = answer.has_failed() && !answer.stdout.is_empty() && reason.starts_with("truncated");
    if answer.has_failed() && !broken_off {
        if reason.starts_with("Couldn't change to") {
            return Err(rights::of_tcpdump(&reason));
        }
        bail!("-r {shown} cannot be read ({reason}); make a capture with: tcpdump -i eth0 -w FILE.pcap");
    }
    let packets = parse(&answer.stdout);
    let packets = packets.with_context(|| format!("-r {shown} cannot be used; try a capture of Ethernet"))?;
    Ok((packets, broken_off.then_some(reason)))
}

/// A file's name in one line.
fn shown(file: &Path) -> String {
    let name = file.to_string_lossy();
    if name.contains(char::is_control) { format!("{name:?}") } else { name.into_owned() }
}

/// The classic format in this machine's byte order: a header of 24 bytes, then 16 before each packet.
fn parse(bytes: &[u8]) -> Result<Vec<Packet>> {
    let word = |at: usize| -> Result<u32> {
        let bytes = bytes.get(at..at + 4).context("it ends in the middle")?;
        Ok(u32::from_ne_bytes(bytes.try_into()?))
    };
    ensure!([0xa1b2_c3d4, 0xa1b2_3c4d].contains(&word(0)?), "it is not in pcap format");
    let link = word(20)? & 0xffff;
    ensure!(link == 1, "its packets have link type {link}, not Ethernet (1)");
    let mut packets = Vec::new();
    let mut at = 24;
    while at < bytes.len() {
        let (kept, length) = (word(at + 8)? as usize, word(at + 12)?);
        let bytes = bytes.get(at + 16..at + 16 + kept).context("it ends in the middle of a packet")?;
        packets.push(Packet { bytes: bytes.to_vec(), length });
        at += 16 + kept;
    }
    Ok(packets)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A capture of packets of these lengths, each with its number as its bytes.
    fn capture(lengths: &[usize]) -> Vec<u8> {
        let mut bytes: Vec<u8> = [0xa1b2_c3d4, 0x0004_0002, 0, 0, 65535, 1].map(u32::to_ne_bytes).concat();
        for (n, length) in lengths.iter().enumerate() {
            bytes.extend([0, 0, *length as u32, 1000 + n as u32].map(u32::to_ne_bytes).concat());
            bytes.extend(vec![n as u8; *length]);
        }
        bytes
    }

    #[test]
    fn packets_have_their_bytes_and_their_length_on_the_wire() {
        let packets = parse(&capture(&[60, 0, 3])).unwrap();
        let expected = [(0, 60), (1, 0), (2, 3)]
            .map(|(n, length): (u8, usize)| Packet { bytes: vec![n; length], length: 1000 + u32::from(n) });
        assert_eq!(packets, expected);
    }

    #[test]
    fn a_capture_that_is_cut_anywhere_is_refused_or_read_as_far_as_whole_packets_go() {
        let whole = capture(&[60, 14, 0, 300]);
        let ends = [24, 100, 130, 146, whole.len()];
        for cut in 0..=whole.len() {
            match (parse(&whole[..cut]), ends.iter().position(|end| *end == cut)) {
                (Ok(packets), Some(count)) => assert_eq!(packets.len(), count),
                (Err(_), None) => {}
                (found, expected) => panic!("cut at {cut}: {found:?}, not {expected:?}"),
            }
        }
    }

    #[test]
    fn no_bytes_make_the_parser_panic() {
        let whole = capture(&[60, 14, 7]);
        let mut state = 1u64;
        for _ in 0..20_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let mut bytes = whole.clone();
            let (at, value) = ((state >> 33) as usize % bytes.len(), (state >> 24) as u8);
            bytes[at] = value;
            if let Ok(packets) = parse(&bytes) {
                assert!(packets.iter().map(|packet| packet.bytes.len()).sum::<usize>() <= bytes.len());
            }
        }
    }

    #[test]
    fn what_is_no_capture_of_ethernet_is_refused() {
        let mut raw = capture(&[60]);
        raw[20] = 101;
        assert!(parse(&raw).unwrap_err().to_string().contains("link type 101"));
        assert!(parse(b"\0\0\0\0").unwrap_err().to_string().contains("not in pcap format"));
    }
}
