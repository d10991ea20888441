//! Which packets of a capture a filter takes: said by the kernel, which runs the compiled filter on each.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::datapath::filter;
use crate::session::home::{self, Home};
use crate::tools::bpftool;
use crate::tools::clang::Source;
use crate::tools::exec::{Cmd, Failed, Runner};

/// One packet of a capture: what was kept of it, and its length on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Packet {
    bytes: Vec<u8>,
    length: u32,
}

/// What the filter took.
#[derive(Debug)]
pub struct Verdict {
    pub packets: usize,
    /// Numbers of packets, from 1.
    pub matched: Vec<usize>,
    /// Packets of which the kernel's test took only the first [`TESTED`] bytes.
    pub cut: usize,
}

/// Bytes of a packet that the kernel's test surely takes: a page less what surrounds a packet.
pub const TESTED: usize = 3000;
/// What the program expects before the frame: see `bpf/match.bpf.c`.
const BEFORE: [u8; 14] = [0; 14];
/// Offset of `cb` in `struct __sk_buff`.
const CB_AT: usize = 48;
/// Packets that lie in files at a time.
const AT_A_TIME: usize = 2000;

/// Runs an expression's program on every packet of `file`, a capture of Ethernet in a format that tcpdump reads.
pub fn test(runner: &Runner, expression: &str, file: &Path) -> Result<Verdict> {
    home::ensure_root()?;
    let compiling = Source::matcher(filter::compile(runner, "EXPR", expression)?).begin(runner)?;
    let packets = read(runner, file)?;
    let object = compiling.object(runner, &[])?;
    let home = Home::here()?;
    let pin = Pin::load(runner, &home, &object)?;
    let mut matched = Vec::new();
    for (at, packets) in packets.chunks(AT_A_TIME).enumerate() {
        let taken = run(runner, &pin.path, packets)?;
        matched.extend(taken.iter().enumerate().filter(|(_, taken)| **taken).map(|(n, _)| at * AT_A_TIME + n + 1));
    }
    let cut = packets.iter().filter(|packet| packet.bytes.len() > TESTED).count();
    Ok(Verdict { packets: packets.len(), matched, cut })
}

/// The loaded program, pinned as long as this lives.
struct Pin<'a> {
    home: &'a Home,
    path: PathBuf,
}

impl<'a> Pin<'a> {
    fn load(runner: &Runner, home: &'a Home, object: &Path) -> Result<Pin<'a>> {
        let _lock = home.lock_to_write(runner)?;
        home.remove_stale_tests();
        let pin = Pin { home, path: home.test_pin() };
        bpftool::load_one(runner, object, &pin.path)?;
        Ok(pin)
    }
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        self.home.remove_if_empty();
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
        .map(|answer| {
            Ok(answer["retval"].as_u64().context("bpftool gave JSON of another form; try: snifctl doctor")? != 0)
        })
        .collect()
}

/// The packets of a capture. tcpdump reads it, whatever its format, and writes it as classic pcap.
fn read(runner: &Runner, file: &Path) -> Result<Vec<Packet>> {
    let shown = file.to_string_lossy();
    let shown = if shown.contains(char::is_control) { format!("{shown:?}") } else { shown.into_owned() };
    let classic = runner.read_bytes(&Cmd::new("tcpdump", ["-r", &file.to_string_lossy(), "-w", "-"]));
    match classic {
        Ok(bytes) => parse(&bytes).with_context(|| format!("-r {shown} cannot be used; try a capture of Ethernet")),
        Err(err) => match err.downcast::<Failed>() {
            Ok(failed) => {
                let last = failed.stderr.lines().last().unwrap_or_default();
                let reason = last.trim_start_matches("tcpdump: ");
                bail!("-r {shown} cannot be read ({reason}); make a capture with: tcpdump -i eth0 -w FILE.pcap")
            }
            Err(err) => Err(err),
        },
    }
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
