//! `filter test`: which packets of a capture match.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use crate::lab::faults::Fault;
use crate::lab::filters::{
    FLOWS, HELP, matched, numbered, numbers, own_cache, said, snapshot, up_filtering, whole_corpus,
};
use crate::lab::frames::{self, Ends};
use crate::lab::judge::{Said, UP};
use crate::lab::{Lab, pcap};
use serde_json::json;

// ---- filter test ----

/// What `filter test` says of this file.
fn tested(lab: &Lab, expression: &str, file: &Path) -> Said {
    said(lab, &["filter", "test", "-r", &file.to_string_lossy(), "--", expression])
}

/// A pcap file of packets of which the capture has kept a part.
fn write_cut(path: &Path, magic: u32, link: u32, packets: &[(Vec<u8>, u32)]) {
    let mut file = Vec::new();
    for word in [magic, 4 << 16 | 2, 0, 0, 262_144, link] {
        file.extend(word.to_ne_bytes());
    }
    for (kept, length) in packets {
        for word in [0, 0, kept.len() as u32, *length] {
            file.extend(word.to_ne_bytes());
        }
        file.extend(kept);
    }
    fs::write(path, file).expect("write a capture");
}

const MICROSECONDS: u32 = 0xa1b2_c3d4;
const NANOSECONDS: u32 = 0xa1b2_3c4d;
const RAW_IP: u32 = 101;

#[test]
fn a_file_that_is_no_capture_of_ethernet_is_refused() {
    let lab = Lab::new();
    let path = |name: &str| lab.dir().join(name);
    fs::write(path("text"), "no capture\n".repeat(20)).expect("write");
    fs::write(path("nothing"), "").expect("write");
    write_cut(&path("raw"), MICROSECONDS, RAW_IP, &[(frames::ipv4_udp(&Ends::PEER_TO_HOST, 1, 20)[14..].into(), 48)]);
    let (make, ethernet) = ("tcpdump -i eth0 -w FILE.pcap", "link type 101, not Ethernet (1)");
    for (name, ends) in [("missing", make), ("text", make), ("nothing", make), (".", make), ("raw", ethernet)] {
        let names = format!("-r {}", path(name).display()).lines().next().expect("a line").to_owned();
        tested(&lab, "udp", &path(name)).refused(1, &names, ends);
    }
    lab.assert_no_pins();
}

#[test]
fn a_capture_that_ends_in_the_middle_is_read_as_far_as_it_is_there() {
    let lab = Lab::new();
    let path = |name: &str| lab.dir().join(name);
    pcap::write(&path("whole"), &frames::series(&Ends::PEER_TO_HOST, 3));
    let whole = fs::read(path("whole")).expect("read");
    fs::write(path("torn"), &whole[..whole.len() - 5]).expect("write");
    let said = tested(&lab, "udp", &path("torn")).ok_noting("torn ends early, so that 2 packets were read: ");
    assert_eq!(said.stdout, "2 of 2 packets match: 1-2\n");
    lab.assert_no_pins();
}

#[test]
fn a_capture_of_an_odd_name_is_refused_in_one_line() {
    let lab = Lab::new();
    tested(&lab, "udp", &lab.dir().join("a\nb")).refused(1, "-r ", "tcpdump -i eth0 -w FILE.pcap");
}

#[test]
fn an_empty_capture_has_no_match() {
    let lab = Lab::new();
    let file = lab.dir().join("empty.pcap");
    pcap::write(&file, &[]);
    assert_eq!(tested(&lab, "udp", &file).quietly_ok().stdout, "0 of 0 packets match\n");
    assert!(matched(&lab, "udp", &file).is_empty());
    lab.assert_no_pins();
}

#[test]
fn matches_are_told_by_their_numbers() {
    let lab = Lab::new();
    let file = lab.dir().join("numbers.pcap");
    let ends = Ends::PEER_TO_HOST;
    let frame = |n: u32| {
        if [1, 2, 3, 5, 8, 9].contains(&n) { frames::ipv4_tcp(&ends, n, 9) } else { frames::raw(&ends, n, 60) }
    };
    pcap::write(&file, &(1..=9).map(frame).collect::<Vec<_>>());
    assert_eq!(tested(&lab, "tcp", &file).quietly_ok().stdout, "6 of 9 packets match: 1-3, 5, 8-9\n");
    let verdict =
        said(&lab, &["filter", "test", "--json", "-r", &file.to_string_lossy(), "--", "tcp"]).quietly_ok().json();
    assert_eq!(verdict, json!({"packets": 9, "matched": [1, 2, 3, 5, 8, 9]}));
}

#[test]
fn a_long_capture_is_tested_to_its_end() {
    let lab = Lab::new();
    let file = lab.dir().join("long.pcap");
    pcap::write(&file, &(1..=4007).map(|n| numbered(&Ends::PEER_TO_HOST, n)).collect::<Vec<_>>());
    let expected: Vec<usize> = (1..=4007).filter(|n| n % 2 == 0).collect();
    assert_eq!(matched(&lab, FLOWS[1], &file), expected);
}

/// Packets without an Ethernet header, down to none at all, and packets of which only a part was kept: `len` is what was on
/// the wire.
#[test]
fn runts_and_cut_packets_are_tested_as_tcpdump_does() {
    let lab = Lab::new();
    let whole = frames::ipv4_tcp(&Ends::PEER_TO_HOST, 7, 400);
    let runts = (0..16).map(|len| (whole[..len].to_vec(), len as u32));
    let cut = [14, 34, 54, 60, 100].map(|kept: usize| (whole[..kept].to_vec(), whole.len() as u32));
    let packets: Vec<(Vec<u8>, u32)> = runts.chain(cut).collect();
    for magic in [MICROSECONDS, NANOSECONDS] {
        let file = lab.dir().join("cut.pcap");
        write_cut(&file, magic, 1, &packets);
        for (expression, expected) in [
            ("len > 400", &[17, 18, 19, 20, 21][..]),
            ("len < 4", &[1, 2, 3, 4]),
            ("greater 14 and less 16", &[15, 16]),
            ("tcp and len = 454", &[18, 19, 20, 21]),
            ("tcp dst port 4003", &[19, 20, 21]),
            ("tcp[30] >= 0", &[21]),
            ("ether[len - 1] >= 0", &(2..=16).collect::<Vec<_>>()),
        ] {
            assert_eq!(matched(&lab, expression, &file), expected, "'{expression}'");
            assert_eq!(tcpdump_count(&file, expression), expected.len(), "'{expression}'");
        }
    }
}

fn tcpdump_count(file: &Path, expression: &str) -> usize {
    let out =
        Command::new("tcpdump").arg("-r").arg(file).args(["--count", "--", expression]).output().expect("run tcpdump");
    let text = String::from_utf8_lossy(&out.stdout);
    text.split(' ').next().and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("'{expression}': {out:?}"))
}

#[test]
fn packets_that_are_longer_than_the_kernel_tests_are_noted() {
    let lab = Lab::new();
    let file = lab.dir().join("jumbo.pcap");
    let sizes = [60, 3000, 3001, 9014, 65_549];
    let frames: Vec<Vec<u8>> = sizes.iter().map(|size| frames::jumbo(&Ends::PEER_TO_HOST, 1, *size)).collect();
    pcap::write(&file, &frames);
    let note = "3 packets are longer than 3000 bytes";
    let said = tested(&lab, "udp and ether[2999] >= 0", &file).ok_noting(note);
    assert_eq!(said.stdout, "4 of 5 packets match: 2-5\n");
    assert_eq!(tested(&lab, "len > 9000", &file).ok_noting(note).stdout, "2 of 5 packets match: 4-5\n");
}

#[test]
fn any_format_that_tcpdump_reads_is_tested() {
    let lab = Lab::new();
    let file = lab.dir().join("classic.pcap");
    let frames: Vec<Vec<u8>> = (1..=30).map(|n| numbered(&Ends::PEER_TO_HOST, n)).collect();
    pcap::write(&file, &frames);
    let swapped = lab.dir().join("swapped.pcap");
    fs::write(&swapped, other_byte_order(&fs::read(&file).expect("read"))).expect("write");
    let next_generation = lab.dir().join("new.pcapng");
    let convert = Command::new("editcap").args(["-F", "pcapng"]).args([&file, &next_generation]).status();
    assert!(convert.expect("run editcap").success());
    assert!(fs::read(&next_generation).expect("read").starts_with(&[0x0a, 0x0d, 0x0d, 0x0a]), "it is pcapng");
    let expected: Vec<usize> = (1..=30).filter(|n| n % 2 == 1).collect();
    for file in [file, swapped, next_generation] {
        assert_eq!(matched(&lab, FLOWS[0], &file), expected, "{}", file.display());
    }
}

/// A pcap file as a machine of the other byte order writes it.
fn other_byte_order(file: &[u8]) -> Vec<u8> {
    let mut file = file.to_vec();
    let mut at = 24;
    file[..4].reverse();
    file[4..6].reverse();
    file[6..8].reverse();
    file[8..24].chunks_mut(4).for_each(<[u8]>::reverse);
    while at < file.len() {
        let kept = u32::from_ne_bytes(file[at + 8..at + 12].try_into().expect("four bytes")) as usize;
        file[at..at + 16].chunks_mut(4).for_each(<[u8]>::reverse);
        at += 16 + kept;
    }
    file
}

#[test]
fn without_an_expression_the_filter_in_force_is_tested() {
    let lab = Lab::roomy();
    let corpus = whole_corpus(&lab);
    let file = corpus.file.to_string_lossy();
    let test = |more: &[&str]| said(&lab, &[&["filter", "test", "--json", "-r", &file], more].concat());
    test(&[]).refused(1, "no session is up", "snifctl up IFACE --tunnel gre --remote ADDR");
    lab.assert_no_pins();
    up_filtering(&lab, "tcp port 80");
    said(&lab, &[&UP[..], &["--name", "other"]].concat()).quietly_ok();
    let verdict = |more: &[&str]| numbers(&test(more).quietly_ok().json()["matched"]);
    assert_eq!(verdict(&[]), corpus.selected("tcp port 80"));
    assert_eq!(verdict(&["--name", "other"]), corpus.selected(""));
    said(&lab, &["filter", "set", "--name", "other", "--", "vlan"]).quietly_ok();
    assert_eq!(verdict(&["--name", "other"]), corpus.selected("vlan"));
}

#[test]
fn testing_leaves_a_running_session_alone() {
    let lab = Lab::roomy();
    up_filtering(&lab, "udp port 4001");
    let corpus = whole_corpus(&lab);
    let before = snapshot(&lab);
    assert_eq!(matched(&lab, "tcp", &corpus.file), corpus.selected("tcp"));
    tested(&lab, "tcp prot", &corpus.file).refused(2, "EXPR \"tcp prot\"", HELP);
    assert_eq!(snapshot(&lab), before);
    let pins: Vec<_> = fs::read_dir(lab.pins()).expect("pins").map(|pin| pin.expect("a pin").file_name()).collect();
    assert!(pins.iter().all(|pin| ["default", "_clsact", "_alive"].iter().any(|known| pin == known)), "{pins:?}");
}

#[test]
fn a_test_that_was_killed_is_cleaned_up_by_the_next_and_by_down() {
    let lab = Lab::roomy();
    let corpus = whole_corpus(&lab);
    let file = corpus.file.to_string_lossy();
    let fakes = lab.counting_fakes();
    let by = [&own_cache(&lab)[..], &fakes.first_in_path()].concat();
    let args = ["filter", "test", "-r", &file, "--", "tcp"];
    // Compiled by the first run, so that every later one makes the same calls.
    matched(&lab, "tcp", &corpus.file);
    lab.said_by(&by, &args).quietly_ok();
    let running =
        fakes.calls().iter().position(|call| call.starts_with("bpftool -j batch")).expect("the call that runs it");
    for by_test in [true, false] {
        fakes.arm(running + 1, Fault::Kill { done: None });
        let killed = lab.said_by(&by, &args);
        assert_eq!(killed.status.signal(), Some(9), "{killed:#?}");
        assert_eq!(fs::read_dir(lab.pins()).expect("pins").count(), 1);
        match by_test {
            true => assert_eq!(matched(&lab, "tcp", &corpus.file), corpus.selected("tcp")),
            false => drop(said(&lab, &["down"]).ok()),
        }
        lab.assert_no_pins();
    }
}

#[test]
fn a_test_whose_calls_fail_leaves_nothing() {
    let lab = Lab::roomy();
    let corpus = whole_corpus(&lab);
    let file = corpus.file.to_string_lossy();
    let fakes = lab.counting_fakes();
    let by = [&own_cache(&lab)[..], &fakes.first_in_path()].concat();
    let args = ["filter", "test", "-r", &file, "--", "tcp"];
    // Compiled by the first run, so that every later one makes the same calls.
    matched(&lab, "tcp", &corpus.file);
    lab.said_by(&by, &args).quietly_ok();
    let calls = fakes.calls().len();
    let mut refused = 0;
    for at in 1..=calls {
        fakes.arm(at, Fault::Fail { done: None });
        let said = lab.said_by(&by, &args);
        assert!(fakes.calls().len() >= at, "it made {calls} calls before");
        lab.assert_no_pins();
        // It does without knowing how old a tool is.
        let call = &fakes.calls()[at - 1];
        if !call.ends_with("version") && !call.ends_with(" -V") {
            // What tcpdump says is about the expression.
            said.refused(if call.starts_with("tcpdump -y") { 2 } else { 1 }, "", "");
            refused += 1;
        }
    }
    assert!(refused >= 3, "{refused} of {calls} calls made it fail");
}
