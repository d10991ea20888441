//! What other programs and other people's machines do to snifctl: odd names, a cache that cannot be written, an output that
//! is full.

use std::fs;
use std::io::Write;
use std::process::Stdio;

use crate::lab::capture::Direction;
use crate::lab::faults::in_mounts;
use crate::lab::frames::{self, Ends};
use crate::lab::judge::{Said, UP};
use crate::lab::{Lab, Ns};

const SNIFCTL: &str = env!("CARGO_BIN_EXE_snifctl");

// ---- names ----

/// Watches an interface of this name, with the remote behind another one, and sees copies.
#[track_caller]
fn assert_watchable(lab: &Lab, watched: &str, out: &str) {
    lab.said(&["up", "--tunnel", "gre", "--remote", "198.51.100.2", "--", watched]).quietly_ok();
    let status = lab.said(&["status", "--json"]).quietly_ok().json();
    assert_eq!(status["sessions"][0]["taps"][0]["interface"], watched);
    assert_eq!(status["sessions"][0]["remotes"][0]["interface"], out);
    let mut copies = lab.capture(Ns::Collector, "col0", Direction::In);
    lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, 7));
    copies.take(7);
    let doctor = lab.said(&["doctor", "--remote", "198.51.100.2", "--", watched]);
    assert!(doctor.status.success(), "{doctor:#?}");
    lab.said(&["down"]).quietly_ok();
    assert!(lab.said(&["status"]).quietly_ok().stdout.starts_with("no session is up"));
}

#[test]
fn interfaces_of_any_name_that_the_kernel_takes_are_watched() {
    let lab = Lab::roomy();
    let (mut watched, mut out) = ("eth0", "out0");
    for (next_watched, next_out) in [("日本語", "o'u"), ("o'u", "日本語"), ("'q", "\"q"), ("\"q", "b\\"), ("b\\", "'")]
    {
        lab.host(&["ip", "link", "set", "dev", out, "name", "between"]);
        lab.host(&["ip", "link", "set", "dev", watched, "name", next_watched]);
        lab.host(&["ip", "link", "set", "dev", "between", "name", next_out]);
        (watched, out) = (next_watched, next_out);
        assert_watchable(&lab, watched, out);
    }
}

#[test]
fn a_name_that_tc_cannot_be_told_is_refused_with_the_reason() {
    let lab = Lab::roomy();
    for (name, shown) in [("a#b", "'a#b'"), ("\"'", r#"'"'\'''"#)] {
        lab.host(&["ip", "link", "set", "dev", "eth0", "name", name]);
        let up = lab.said(&["up", "--tunnel", "gre", "--remote", "198.51.100.2", "--", name]);
        up.refused(2, "tc cannot be told", &format!("ip link set dev {shown} name NAME"));
        lab.host(&["ip", "link", "set", "dev", name, "name", "eth0"]);
    }
}

#[test]
fn foreign_interfaces_of_odd_names_disturb_nothing() {
    let lab = Lab::roomy();
    for name in ["c\u{1}d", "e\u{1b}[1m", "o'u", "q\"\\", "a#b", "c\u{7f}"] {
        lab.host(&["ip", "link", "add", "name", name, "type", "bridge"]);
    }
    assert_watchable(&lab, "eth0", "out0");
    lab.said(&["up", "o'u", "--tunnel", "gre", "--remote", "198.51.100.2"]).ok();
    lab.said(&["tap", "add", "eth0"]).ok();
    lab.said(&["down"]).quietly_ok();
}

// ---- output ----

/// Runs snifctl with a standard output that is full.
fn into_full(lab: &Lab, args: &str) -> Said {
    lab.try_host(&["sh", "-c", &format!("exec {SNIFCTL} {args} >/dev/full")]).into()
}

#[test]
fn an_output_that_cannot_be_written_is_told_and_is_a_failure() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    for args in ["doctor --json", "doctor", "status", "status --json", "map dump", "tap list"] {
        let said = into_full(&lab, args);
        assert_eq!(said.status.code(), Some(1), "{args}: {said:#?}");
        let expected = "snifctl: cannot write to standard output: No space left on device (os error 28)\n";
        assert_eq!(said.stderr, expected, "{args}");
    }
    lab.said(&["down"]).quietly_ok();
}

#[test]
fn who_reads_no_further_has_seen_enough() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    let script = format!("{{ sleep 0.2; {SNIFCTL} map dump; echo $? >&2; }} | true");
    let said: Said = lab.host(&["sh", "-c", &script]).into();
    assert_eq!(said.stderr, "0\n");
    lab.said(&["down"]).quietly_ok();
}

// ---- cache ----

#[test]
fn a_cache_that_cannot_be_written_is_done_without() {
    let lab = Lab::roomy();
    let tmp = lab.dir().join("tmp");
    fs::create_dir(&tmp).unwrap();
    for options in ["ro", "size=4k", "nr_inodes=1"] {
        let mount = format!("mount -t tmpfs -o mode=0755,{options} tmpfs /var/cache; export TMPDIR={}", tmp.display());
        for args in [&UP[..], &["filter", "set", "tcp"]] {
            lab.said_by(&in_mounts(&mount), args).quietly_ok();
        }
        let status = lab.said(&["status", "--json"]).quietly_ok().json();
        assert_eq!(status["sessions"][0]["filter"], "tcp", "{options}");
        lab.said(&["down"]).quietly_ok();
        assert_eq!(fs::read_dir(&tmp).unwrap().count(), 0, "left after {options}");
    }
}

// ---- captures ----

/// A capture of UDP, TCP, and UDP, as tcpdump writes it.
fn capture(lab: &Lab) -> Vec<u8> {
    let file = lab.dir().join("some.pcap").to_string_lossy().into_owned();
    let text = lab.dir().join("some.txt");
    let udp = "0200000001010200000001020800450000 1c000100004011f6d2c0000202c00002010007000700080000";
    let tcp = "02000000010102000000010208004500002800010000 4006f6d1c0000202c0000201000700070000000000000000500000000000 0000";
    let line = |hex: &str| {
        let hex = hex.replace(' ', "");
        let bytes: Vec<&str> = (0..hex.len()).step_by(2).map(|at| &hex[at..at + 2]).collect();
        format!("0000 {}\n\n", bytes.join(" "))
    };
    fs::write(&text, [udp, tcp, udp].map(line).concat()).unwrap();
    lab.host(&["text2pcap", "-q", "-F", "pcap", &text.to_string_lossy(), &file]);
    fs::read(&file).unwrap()
}

fn tested(lab: &Lab, input: &[u8]) -> Said {
    let mut command = lab.command(Ns::Host, &[SNIFCTL, "filter", "test", "udp", "-r", "-"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap().into()
}

#[test]
fn a_capture_is_read_from_standard_input() {
    let lab = Lab::new();
    let said = tested(&lab, &capture(&lab)).quietly_ok();
    assert_eq!(said.stdout, "2 of 3 packets match: 1, 3\n");
}

#[test]
fn a_capture_that_is_still_being_written_is_read_as_far_as_it_is_there() {
    let lab = Lab::new();
    let whole = capture(&lab);
    for cut in [1, 30] {
        let said = tested(&lab, &whole[..whole.len() - cut]).ok_noting("-r - ends early, so that 2 packets were read");
        assert_eq!(said.stdout, "1 of 2 packets match: 1\n");
    }
    let said = tested(&lab, &whole[..10]);
    said.refused(1, "-r - cannot be read (truncated dump file", "tcpdump -i eth0 -w FILE.pcap");
}
