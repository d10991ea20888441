//! Filters: what tcpdump selects, and a session whose filter changes.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::faults::in_mounts;
use super::frames::{self, ETH_IPV4, Ends, Family, Ipv4, UDP, ethernet, payload};
use super::judge::{Said, UP};
use super::status::TapCounts;
use super::{Lab, corpus, pcap};

/// Frames, each with its number in the capture that holds them all.
pub(crate) struct Corpus {
    pub file: PathBuf,
    pub frames: Vec<Vec<u8>>,
    pub numbers: HashMap<Vec<u8>, usize>,
}

impl Corpus {
    pub(crate) fn new(lab: &Lab, frames: Vec<Vec<u8>>) -> Corpus {
        let file = lab.dir().join("corpus.pcap");
        pcap::write(&file, &frames);
        let numbers: HashMap<_, _> = frames.iter().cloned().zip(1..).collect();
        assert_eq!(numbers.len(), frames.len(), "two frames of the corpus are equal");
        Corpus { file, frames, numbers }
    }

    /// Numbers of the frames that tcpdump selects, in order.
    #[track_caller]
    pub(crate) fn selected(&self, expression: &str) -> Vec<usize> {
        let out = self.file.with_extension("selected");
        let mut tcpdump = Command::new("tcpdump");
        tcpdump.arg("-r").arg(&self.file).arg("-w").arg(&out).args(["-Z", "root", "--", expression]);
        let run = tcpdump.output().expect("run tcpdump");
        assert!(run.status.success(), "tcpdump '{expression}': {}", String::from_utf8_lossy(&run.stderr));
        pcap::read(&out).iter().map(|frame| self.numbers[frame]).collect()
    }

    /// The same of an expression that must select some frames and not all.
    #[track_caller]
    pub(crate) fn some_selected(&self, expression: &str) -> Vec<usize> {
        let selected = self.selected(expression);
        let (some, all) = (selected.len(), self.frames.len());
        assert!((1..all).contains(&some), "'{expression}' tells nothing: it selects {some} of {all} frames");
        selected
    }
}

pub(crate) fn whole_corpus(lab: &Lab) -> Corpus {
    let ends = Ends::PEER_TO_HOST;
    Corpus::new(lab, [corpus::many(&ends), corpus::unsendable(&ends)].concat())
}

/// Mounts that give the lab an object cache of its own, as hundreds of filters would push out what others have there; and
/// a place in memory for the file that `filter test` writes for each packet.
pub(crate) fn own_cache(lab: &Lab) -> Vec<String> {
    let [cache, tmp] = ["cache", "tmp"].map(|name| lab.dir().join(name).display().to_string());
    let script = format!(
        "mkdir -p -m 0755 {cache} {tmp}; mount --bind {cache} /var/cache; mount -t tmpfs tmpfs {tmp}; export TMPDIR={tmp}"
    );
    in_mounts(&script)
}

pub(crate) fn said(lab: &Lab, args: &[&str]) -> Said {
    lab.said_by(&own_cache(lab), args)
}

/// Numbers of the packets that `filter test` says match.
#[track_caller]
pub(crate) fn matched(lab: &Lab, expression: &str, file: &Path) -> Vec<usize> {
    let file = file.to_string_lossy();
    let verdict = said(lab, &["filter", "test", "--json", "-r", &file, "--", expression]).quietly_ok().json();
    numbers(&verdict["matched"])
}

pub(crate) fn numbers(list: &Value) -> Vec<usize> {
    list.as_array().expect("a list").iter().map(|n| n.as_u64().expect("a number") as usize).collect()
}

/// `up` with a filter, quietly.
#[track_caller]
pub(crate) fn up_filtering(lab: &Lab, filter: &str) {
    said(lab, &[&UP[..], &["--filter", filter]].concat()).quietly_ok();
}

/// The filter that `status` shows.
#[track_caller]
pub(crate) fn filter_of(lab: &Lab) -> String {
    lab.session().filter.expect("a filter")
}

/// All that a change of the filter must leave alone, and all that it may change.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Snapshot {
    /// Ids by name of pin.
    pub taps: Vec<u64>,
    pub others: Vec<u64>,
    pub maps: Vec<u64>,
    pub status: Value,
    pub machine: String,
}

pub(crate) fn snapshot(lab: &Lab) -> Snapshot {
    let session = lab.pins().join("default");
    let (taps, others) = pins(&session).into_iter().partition(|pin| pin.to_string_lossy().contains("snif_tap_"));
    let of = |kind: &str, pins: Vec<PathBuf>| {
        pins.iter().map(|pin| format!("{kind} show pinned {}", pin.display())).collect()
    };
    Snapshot {
        taps: ids(lab, of("prog", taps)),
        others: ids(lab, of("prog", others)),
        maps: ids(lab, of("map", pins(&session.join("maps")))),
        status: lab.status_json(),
        machine: lab.machine(),
    }
}

fn pins(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).expect("pins").map(|entry| entry.expect("a pin").path());
    let mut pins: Vec<PathBuf> = entries.filter(|path| !path.is_dir()).collect();
    pins.sort();
    pins
}

/// The ids in bpftool's answers.
fn ids(lab: &Lab, questions: Vec<String>) -> Vec<u64> {
    let script = "printf '%s\\n' \"$@\" | bpftool -j batch file -";
    let words: Vec<&str> = ["sh", "-c", script, "sh"].into_iter().chain(questions.iter().map(String::as_str)).collect();
    let answers: Value = serde_json::from_str(&lab.shown(&words)).expect("JSON of bpftool");
    let ids = answers.as_array().expect("a list").iter().map(|answer| answer["output"]["id"].as_u64());
    ids.map(|id| id.expect("an id")).collect()
}

/// Flow A has the odd numbers, flow B the even ones.
pub(crate) const FLOWS: [&str; 2] = ["udp port 1001", "udp port 1002"];

pub(crate) fn numbered(ends: &Ends, n: u32) -> Vec<u8> {
    let port = if n % 2 == 1 { 1001 } else { 1002 };
    let datagram = frames::udp(ends, Family::V4, (port, port), &payload(n, 20));
    ethernet(ends, ETH_IPV4, &frames::ipv4(ends, UDP, Ipv4 { id: n as u16, ..Ipv4::default() }, &datagram))
}

/// Frames to a port each, from 2000 on.
pub(crate) fn to_ports(count: u16) -> Vec<Vec<u8>> {
    let ends = Ends::PEER_TO_HOST;
    let frame = |n: u16| {
        let datagram = frames::udp(&ends, Family::V4, (7, 2000 + n), &payload(n.into(), 20));
        ethernet(&ends, ETH_IPV4, &frames::ipv4(&ends, UDP, Ipv4::default(), &datagram))
    };
    (0..count).map(frame).collect()
}

/// Panics unless the taps have seen so many packets, and copied so many and filtered the rest.
#[track_caller]
pub(crate) fn assert_counted(lab: &Lab, seen: u64, copied: u64) {
    let session = lab.session();
    let sum = |of: fn(&TapCounts) -> u64| session.taps.iter().map(|tap| of(&tap.counts)).sum::<u64>();
    let counted = [sum(|tap| tap.seen), sum(|tap| tap.filtered), sum(|tap| tap.skipped)];
    assert_eq!(counted, [seen, seen - copied, 0], "{session:#}");
    assert_eq!(session.taps_total().pcnt, copied, "{session:#}");
    assert_eq!(session.remotes[0].stat.pcnt, copied, "{session:#}");
}

/// How messages about an expression end.
pub(crate) const HELP: &str = "see pcap-filter(7), as in: --filter 'tcp port 443 and not net 10.0.0.0/8'";

#[track_caller]
pub(crate) fn assert_tested(expressions: &[&str]) {
    let lab = Lab::new();
    let corpus = whole_corpus(&lab);
    for expression in expressions {
        let expected = corpus.some_selected(expression);
        assert_eq!(matched(&lab, expression, &corpus.file), expected, "'{expression}'");
    }
    lab.assert_no_pins();
}
