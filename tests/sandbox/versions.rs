//! Sessions of other versions: a recorded one of an older version is told, edited by nobody, moved to the programs of today
//! with all its counters, and taken down; newer ones are told and taken down whole.
//!
//! A recorded session is a directory `tests/fixtures/session-N`: the object, and the commands that made the session, as
//! `up --dry-run` prints them. How to record another: tests/fixtures/README.

use std::fs;
use std::path::{Path, PathBuf};

use crate::lab;
use crate::lab::capture::Direction;
use crate::lab::check::assert_same_frames;
use crate::lab::frames::{self, Ends};
use crate::lab::status::Session;
use crate::lab::tunnels::{Kind, decap, inner};
use crate::lab::{Lab, Ns, PATIENCE, poll};
use serde_json::Value;

/// The session that is recorded: with a filter, two remotes, and maps that hold rows of every kind that counts.
const UP: [&str; 12] = [
    "up",
    "eth0",
    "--tunnel",
    "gre",
    "--id",
    "7",
    "--remote",
    "198.51.100.2,198.51.100.3",
    "--filter",
    "udp or icmp",
    "--oversize",
    "drop",
];
const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/session-1");
const OBJECT: &str = "@OBJECT@";
const NETNS: &str = "@NETNS@";

/// A sandbox in which the numbers of interfaces, and the ways to the remotes, are those of the record.
fn sandbox() -> Lab {
    let lab = Lab::new();
    lab.host(&["ip", "neigh", "add", "198.51.100.3", "lladdr", "02:00:00:00:02:02", "dev", "out0", "nud", "permanent"]);
    lab
}

/// Makes the recorded session, by the tools alone.
fn make_recorded(lab: &Lab, altered: impl Fn(String) -> String) {
    let commands = fs::read_to_string(Path::new(FIXTURE).join("commands")).expect("the record");
    let netns = lab.ns_inode(Ns::Host).to_string();
    let script = commands.replace(NETNS, &netns).replace(OBJECT, &format!("{FIXTURE}/programs.o"));
    lab.host(&["sh", "-euc", &altered(script)]);
}

/// The same with maps of larger values than its programs need, as those of another version can have.
fn with_larger_values(script: String, lab: &Lab, sizes: &[(&str, &str, usize)]) -> String {
    let mut lines: Vec<String> = script.lines().map(String::from).collect();
    for (map, kind, bytes) in sizes {
        let pin = format!("/sys/fs/bpf/{}_{map}", lab.ns_name(Ns::Host));
        let load = lines.iter().position(|line| line.contains(" prog loadall ")).expect("programs are loaded");
        lines[load] = lines[load].replace(" pinmaps ", &format!(" map name {map} pinned {pin} pinmaps "));
        lines.insert(load, format!("bpftool map create {pin} type {kind} key 4 value {bytes} entries 1 name {map}"));
        lines.push(format!("rm {pin}"));
        for line in lines.iter_mut().filter(|line| line.contains(&format!("/maps/{map} key hex "))) {
            let have = line.split(" value hex ").nth(1).expect("a value").split(' ').count();
            *line += &" 00".repeat(bytes - have);
        }
    }
    lines.join("\n")
}

#[test]
#[ignore = "writes into the sources: SNIFCTL_RECORD=FILE has it record what that snifctl makes"]
fn record() {
    let snifctl = std::env::var("SNIFCTL_RECORD").expect("SNIFCTL_RECORD: the path of a snifctl");
    let lab = sandbox();
    // Once, so that the object is there.
    lab.host(&[&[snifctl.as_str()], &UP[..]].concat());
    lab.host(&[&snifctl, "down"]);
    let said = lab.host(&[&[snifctl.as_str()], &UP[..], &["--dry-run"]].concat());
    let text = String::from_utf8(said.stdout).expect("UTF-8");
    let object = text.split(' ').find(|word| word.ends_with(".o")).expect("an object");
    fs::create_dir_all(FIXTURE).expect("the directory");
    fs::copy(object, format!("{FIXTURE}/programs.o")).expect("the object");
    lab.host(&["llvm-strip", "-g", &format!("{FIXTURE}/programs.o")]);
    let netns = lab.ns_inode(Ns::Host).to_string();
    let text = text.replace(object, OBJECT).replace(&format!("/{netns}"), &format!("/{NETNS}"));
    fs::write(format!("{FIXTURE}/commands"), text).expect("the commands");
}

// ---- what is seen ----

const OLDER: &str = "programs: they are those of an older snifctl, and this is ";
const OURS: &str = env!("CARGO_PKG_VERSION");
const MOVED: &str = "; moved to those of this one\n";

/// Sends 7 frames that are copied, 5 that the filter does not take and 3 that do not fit; panics unless exactly the first
/// come out, to both remotes.
#[track_caller]
fn assert_copies(lab: &Lab) {
    let taken = frames::series(&Ends::PEER_TO_HOST, 7);
    let refused = (0..5).map(|n| frames::ipv4_tcp(&Ends::PEER_TO_HOST, n, 100));
    let large = (0..3).map(|n| frames::ipv4_udp(&Ends::PEER_TO_HOST, n, 1472));
    let capture = lab.capture(Ns::Collector, "col0", Direction::In);
    let before = lab.session();
    lab.send(Ns::Peer, "peer0", &taken.iter().cloned().chain(refused).chain(large).collect::<Vec<_>>());
    let counted = poll(PATIENCE, || {
        Some(lab.session()).filter(|now| now.remotes_total().pcnt == before.remotes_total().pcnt + 14)
    });
    let now = counted.unwrap_or_else(|| panic!("{:#}", lab.session()));
    assert_same_frames(&[taken.clone(), taken].concat(), &copied(capture));
    let risen = |of: fn(&Session) -> u64| of(&now) - of(&before);
    let tap = |of: fn(&lab::status::TapCounts) -> u64| {
        of(&now.tap("eth0", "ingress").counts) - of(&before.tap("eth0", "ingress").counts)
    };
    assert_eq!((tap(|at| at.seen), tap(|at| at.filtered), tap(|at| at.stat.pcnt)), (15, 5, 20), "{now:#}");
    assert_eq!((risen(Session::drops), risen(|at| at.dropped("oversize"))), (6, 6), "{now:#}");
}

fn copied(mut capture: lab::capture::Capture) -> Vec<Vec<u8>> {
    capture.settle();
    inner(&decap(Kind::Gre, &capture.stop()))
}

/// All that the session has counted.
fn counters(session: &Session) -> String {
    format!(
        "{:?} {:?} {:?} {:?}",
        session.taps,
        session.remotes,
        session.drops,
        (session.removed, session.removed_taps)
    )
}

/// Moves the session while packets pass: each of them is copied once, and no counter falls.
#[track_caller]
fn assert_moved(lab: &Lab, fault: &str) {
    let before = lab.session();
    assert_eq!(before.faults, [fault], "{before:#}");
    let ids = lab.program_ids();
    let stream = frames::series(&Ends::PEER_TO_HOST, 1499);
    let capture = lab.capture(Ns::Collector, "col0", Direction::In);
    let sent = lab::traffic::Stream::in_order(lab, (Ns::Peer, "peer0"), &stream);
    poll(PATIENCE, || (lab.packets(Ns::Host, "eth0").0 > 100).then_some(())).expect("packets");
    let said = lab.said(&["sync"]).quietly_ok();
    assert_eq!(said.stdout, format!("default: {fault}{MOVED}"));
    sent.end();
    let counted = poll(PATIENCE, || {
        Some(lab.session()).filter(|now| now.remotes_total().pcnt == before.remotes_total().pcnt + 2998)
    });
    let now = counted.unwrap_or_else(|| panic!("{:#}", lab.session()));
    assert_same_frames(&[stream.clone(), stream].concat(), &copied(capture));
    assert_eq!((&now.drops, now.faults.len()), (&before.drops, 0), "{now:#}");
    assert_eq!(now.tap("eth0", "ingress").counts.seen, before.tap("eth0", "ingress").counts.seen + 1499, "{now:#}");
    lab.assert_unloaded(&ids);
    assert_eq!(lab.said(&["sync"]).quietly_ok().stdout, "");
    assert_eq!(lab.said(&["status", "--check"]).quietly_ok().stdout, "");
    assert_copies(lab);
}

#[test]
fn a_recorded_session_is_told_and_moved_to_the_programs_of_today_with_all_its_counters() {
    let lab = sandbox();
    let before = lab.machine();
    make_recorded(&lab, |script| script);
    assert_copies(&lab);
    let fault = format!("{OLDER}{OURS}");
    let said = lab.said(&["status", "--check"]);
    assert_eq!((said.status.code(), said.stdout), (Some(1), format!("default: {fault}\n")));
    let text = lab.said(&["status"]).quietly_ok().stdout;
    assert!(text.contains("eth0  ingress    ok") && text.contains(&format!("  fault: {fault}\n")), "{text}");
    assert!(text.contains("  put it right with: snifctl sync --name default\n"), "{text}");
    assert_eq!(lab.status_json()["sessions"][0]["made_by"], Value::Null);
    let doctor = lab.said(&["doctor"]).stdout;
    assert!(doctor.contains(&format!("default: {fault}")) && !doctor.contains(&format!("{fault}: copies")), "{doctor}");
    // What reads says so beside, what edits refuses.
    for words in
        [&["tap", "list"][..], &["remote", "list"], &["map", "list"], &["map", "dump", "taps"], &["filter", "show"]]
    {
        lab.said(words).ok_noting("; move it to this one: snifctl sync --name default");
    }
    for words in [
        &["tap", "add", "out0"][..],
        &["tap", "remove", "eth0:ingress"],
        &["remote", "add", "198.51.100.4"],
        &["filter", "set", "tcp"],
        &["filter", "clear"],
    ] {
        lab.said(words).refused(1, "its programs are those of an older snifctl", "snifctl sync --name default");
    }
    // A dry run changes nothing.
    let (ids, counted) = (lab.program_ids(), counters(&lab.session()));
    assert!(lab.said(&["sync", "--dry-run"]).quietly_ok().stdout.contains(" replace dev eth0 ingress "));
    assert_eq!((lab.program_ids(), counters(&lab.session())), (ids, counted));
    assert_moved(&lab, &fault);
    assert_eq!(lab.status_json()["sessions"][0]["made_by"], OURS);
    lab.said(&UP).ok_noting("session default is already up with this request");
    lab.said(&["filter", "set", "udp"]).quietly_ok();
    assert_copies(&lab);
    // As one of another build of the same version.
    remember(&lab, |old| {
        let (head, rest) = old.split_once("\"sources\":").expect("the mark");
        let end = rest.find('}').expect("its end");
        format!("{head}\"sources\":7{}", &rest[end..])
    });
    assert_moved(&lab, &format!("programs: they are those of another build of snifctl {OURS}, and this is {OURS}"));
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

#[test]
fn maps_of_another_form_are_made_anew_where_nothing_is_lost_by_it() {
    let lab = sandbox();
    let before = lab.machine();
    make_recorded(&lab, |script| {
        with_larger_values(script, &lab, &[("drops", "percpu_array", 200), ("config", "array", 160)])
    });
    assert_copies(&lab);
    let ids = lab.program_ids();
    // By `up` with the same request, too; one that fails leaves what was there.
    let fakes = lab.fakes();
    fakes.add("tc", "case \"$(cat)\" in *replace*) exit 3;; esac");
    let failed = lab.said_by(&fakes.first_in_path(), &["sync"]);
    assert_eq!(failed.status.code(), Some(1), "{failed:#?}");
    assert_eq!(lab.program_ids(), ids);
    assert_copies(&lab);
    assert_moved(&lab, &format!("{OLDER}{OURS}"));
    let pins = lab.pins().join("default/maps");
    assert!(pins.join("drops_before_1").exists());
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

#[test]
fn a_move_that_is_killed_anywhere_loses_nothing_and_is_ended_by_the_next() {
    let lab = sandbox();
    let before = lab.machine();
    let sizes = [("drops", "percpu_array", 200), ("config", "array", 160)];
    // After the load, within the maps and after them, within the hooks, within the pins, and after it is remembered.
    let replaced = [&UP[..], &["--ttl", "63", "--replace"]].concat();
    for (at, again) in [3, 5, 6, 8, 13, 17].into_iter().zip([&["sync"][..], &UP, &replaced].into_iter().cycle()) {
        make_recorded(&lab, |script| with_larger_values(script, &lab, &sizes));
        assert_copies(&lab);
        let mut killed = lab.command(Ns::Host, &[env!("CARGO_BIN_EXE_snifctl"), "sync"]);
        let output = killed.env("SNIFCTL_INTERRUPT", format!("{at} before")).output().expect("run snifctl");
        assert!(!output.status.success(), "the move has fewer than {at} steps: {output:?}");
        let counted = counters(&lab.session());
        assert_copies(&lab);
        lab.said(again).ok();
        let now = lab.session();
        assert_eq!((now.faults.len(), now.drops()), (0, 12), "{at}: {counted} {now:#}");
        assert_copies(&lab);
        lab.said(&["down"]).quietly_ok();
        lab.assert_as_before(&before);
    }
}

#[test]
fn a_session_that_cannot_be_moved_is_told_with_the_commands_that_make_it_anew() {
    let lab = sandbox();
    let before = lab.machine();
    make_recorded(&lab, |script| script);
    let pin = lab.pins().join("default/maps/tunnels");
    fs::remove_file(&pin).expect("the pin");
    let pin = pin.to_string_lossy();
    lab.host(&[
        "bpftool", "map", "create", &pin, "type", "hash", "key", "40", "value", "8", "entries", "64", "name", "tunnels",
    ]);
    let ends = format!("then: snifctl down --name default && {}", lab.session().command);
    for words in [&["sync"][..], &UP] {
        lab.said(words).refused(
            1,
            "cannot be replaced, as its map tunnels has another form; note its counters (snifctl status",
            &ends,
        );
    }
    assert_copies(&lab);
    lab.said(&["down"]).quietly_ok();
    lab.host(&[
        "sh",
        "-euc",
        &ends.trim_start_matches("then: ").replace("snifctl ", &format!("{} ", env!("CARGO_BIN_EXE_snifctl"))),
    ]);
    assert_copies(&lab);
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

/// A session of a version that is not there yet: more of everything, and a request that nobody here can read.
#[test]
fn a_newer_session_is_told_by_every_command_and_taken_down_whole() {
    let lab = sandbox();
    lab.host(&["tc", "qdisc", "add", "dev", "out0", "clsact"]);
    let before = lab.machine();
    lab.said(&UP).ok();
    let pins = lab.pins().join("default");
    lab.host(&[
        "bpftool",
        "map",
        "create",
        &pins.join("maps/later").to_string_lossy(),
        "type",
        "array",
        "key",
        "4",
        "value",
        "8",
        "entries",
        "1",
        "name",
        "later",
    ]);
    attach_later(&lab, &pins);
    for (change, why) in [
        (
            ("\"oversize\":\"drop\"", "\"oversize\":\"shrink\",\"later\":[7]"),
            format!("made by a newer snifctl (99.1.0; this is {OURS})"),
        ),
        (
            ("\"version\":1", "\"version\":2"),
            format!("made by a newer snifctl (99.1.0; this is {OURS}, and does not know form 2 of what it stores)"),
        ),
    ] {
        remember(&lab, |old| {
            assert!(old.contains(change.0), "{old}");
            let ours = format!("\"snifctl\":\"{OURS}\"");
            old.replacen(change.0, change.1, 1).replacen(&ours, "\"snifctl\":\"99.1.0\"", 1)
        });
        let json = lab.status_json();
        let session = &json["sessions"][0];
        assert_eq!(
            (&session["faults"], &session["made_by"]),
            (&serde_json::json!([why]), &serde_json::json!("99.1.0"))
        );
        assert_eq!(
            session["found"],
            serde_json::json!(["tap eth0 ingress", "tap eth0 egress", "tap out0 ingress", "relay snif0"])
        );
        let text = lab.said(&["status"]).quietly_ok().stdout;
        assert!(
            text.contains("  there is: tap eth0 ingress, tap eth0 egress, tap out0 ingress, relay snif0\n"),
            "{text}"
        );
        assert!(
            text.ends_with("  put it right with: that one, or take it down with: snifctl down --name default\n"),
            "{text}"
        );
        let checked = lab.said(&["status", "--check"]);
        assert_eq!((checked.status.code(), checked.stdout), (Some(1), format!("default: {why}\n")));
        let doctor = lab.said(&["doctor"]).stdout;
        assert!(doctor.contains(&format!("default: {why}")), "{doctor}");
        let verbs: [&[&str]; 14] = [
            &["tap", "list"],
            &["tap", "add", "out0"],
            &["tap", "remove", "eth0"],
            &["remote", "list"],
            &["remote", "add", "198.51.100.4"],
            &["remote", "remove", "198.51.100.3"],
            &["filter", "show"],
            &["filter", "set", "tcp"],
            &["filter", "clear"],
            &["map", "list"],
            &["map", "dump"],
            &["sync"],
            &UP,
            &[&UP[..], &["--replace"]].concat(),
        ];
        for words in verbs {
            lab.said(words).refused(1, &why, "use that one, or take it down: snifctl down --name default");
        }
    }
    assert_eq!(lab.program_ids().len(), 6);
    let ids = lab.program_ids();
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
    lab.assert_unloaded(&ids);
}

/// A program that no version has yet, at a hook of its own, by the session's handle.
fn attach_later(lab: &Lab, pins: &Path) {
    let source = lab.dir().join("later.c");
    let (object, pin) = (lab.dir().join("later.o"), pins.join("snif_later"));
    let (object, pin) = (object.to_string_lossy(), pin.to_string_lossy());
    let text = "__attribute__((section(\"tc\"), used)) int snif_later(void *skb) { return -1; }\n";
    fs::write(&source, text).expect("the source");
    lab.host(&["clang", "-O2", "-g", "-target", "bpf", "-c", &source.to_string_lossy(), "-o", &object]);
    lab.host(&["bpftool", "prog", "load", &object, &pin, "type", "classifier"]);
    let hooks: Value =
        serde_json::from_str(&lab.shown(&["tc", "-j", "filter", "show", "dev", "eth0", "ingress"])).expect("JSON");
    let handle =
        hooks.as_array().and_then(|all| all.iter().find_map(|at| at["options"]["handle"].as_str())).expect("a handle");
    lab.host(&[
        "tc",
        "filter",
        "add",
        "dev",
        "out0",
        "ingress",
        "pref",
        "1",
        "handle",
        handle,
        "bpf",
        "da",
        "object-pinned",
        &pin,
    ]);
}

fn dump(lab: &Lab, map: &Path) -> Vec<(u32, Vec<u8>)> {
    let json = lab.shown(&["bpftool", "-j", "map", "dump", "pinned", &map.to_string_lossy()]);
    let rows: Value = serde_json::from_str(&json).expect("JSON");
    let bytes = |value: &Value| -> Vec<u8> {
        let words = value.as_array().expect("bytes").iter();
        words.map(|word| u8::from_str_radix(&word.as_str().expect("hex")[2..], 16).expect("hex")).collect()
    };
    let row = |row: &Value| (u32::from_ne_bytes(bytes(&row["key"]).try_into().expect("4 bytes")), bytes(&row["value"]));
    let mut rows: Vec<_> = rows.as_array().expect("rows").iter().map(row).collect();
    rows.sort();
    rows
}

/// Writes another text in the place of what the session remembers.
fn remember(lab: &Lab, text: impl Fn(&str) -> String) {
    let maps: PathBuf = lab.pins().join("default/maps");
    let config = &dump(lab, &maps.join("config"))[0].1;
    let first = u32::from(u16::from_ne_bytes([config[54], config[55]]));
    let rows = dump(lab, &maps.join("request")).into_iter().filter(|(at, _)| (first..first + 1024).contains(at));
    let bytes: Vec<u8> = rows.flat_map(|(_, chunk)| chunk).take_while(|byte| *byte != 0).collect();
    let mut new = text(&String::from_utf8(bytes).expect("UTF-8")).into_bytes();
    new.resize((new.len() / 256 + 1) * 256, 0);
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ");
    let map = maps.join("request").to_string_lossy().into_owned();
    for (at, chunk) in (first..).zip(new.chunks(256)) {
        let line =
            format!("bpftool map update pinned {map} key hex {} value hex {}", hex(&at.to_ne_bytes()), hex(chunk));
        lab.host(&["sh", "-euc", &line]);
    }
}
