//! A session's request is edited while it runs: `up --replace`, what is the same request, who may edit at a time, and what
//! becomes of requests that cannot be read.

use std::time::{Duration, Instant};

use crate::lab;
use crate::lab::capture::Direction;
use crate::lab::check::{assert_same_frames, multiset_diff};
use crate::lab::frames::{self, Ends};
use crate::lab::judge::{Said, UP, up_with};
use crate::lab::links::{add_link, lab_with_links, tap};
use crate::lab::remotes::{lab_of, remote};
use crate::lab::status::{Session, Tally};
use crate::lab::tunnels::{Kind, Tunnelled, decap, inner};
use crate::lab::{Lab, Ns, PATIENCE, poll};
use serde_json::Value;

// ---- up --replace ----

const A: &str = "198.51.100.10";
const B: &str = "198.51.100.11";

/// What is to reach the collector of 7 frames sent each way over eth0.
#[derive(Clone, Copy)]
enum Copied {
    Both,
    Ingress,
    Egress,
    /// Any part of them.
    Some,
    None,
    /// Of each at most so many bytes.
    Cut(usize),
    /// Each so often.
    Times(usize),
}

/// A request: the words after `up`, in the order in which the session shows them; what copies there are, by which tunnel,
/// and what holds for each of them.
type Step = (&'static [&'static str], Copied, Kind, fn(&Tunnelled) -> bool);

fn any(_: &Tunnelled) -> bool {
    true
}

fn quoted(word: &str) -> String {
    if word.contains(' ') { format!("'{word}'") } else { word.into() }
}

/// The command line that must be shown.
fn command(words: &[&str]) -> String {
    let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    format!("snifctl up {}", words.join(" "))
}

fn up(lab: &Lab, words: &[&str], more: &[&str]) -> Said {
    lab.said(&[&["up"], words, more].concat())
}

/// Counters of the whole session, also of what it no longer has: none of them may ever fall.
fn totals(session: &Session) -> Vec<(String, u64)> {
    let tallies: Vec<Tally> =
        session.taps.iter().map(|tap| tap.counts).chain([session.removed_taps]).map(|counts| counts.tally()).collect();
    let sum = |of: fn(&Tally) -> u64| tallies.iter().map(of).sum::<u64>();
    let sent = session.remotes_total().pcnt + session.removed.pcnt;
    let named = [
        ("seen", sum(|tap| tap.seen)),
        ("filtered", sum(|tap| tap.filtered)),
        ("skipped", sum(|tap| tap.skipped)),
        ("asked", sum(|tap| tap.asked)),
        ("dropped", sum(|tap| tap.dropped)),
        ("sent", sent),
    ];
    let drops = session.drops.iter().map(|(reason, count)| (format!("drops {reason}"), *count));
    named.map(|(name, count)| (name.to_string(), count)).into_iter().chain(drops).collect()
}

#[track_caller]
fn assert_kept(before: &Session, after: &Session, words: &[&str]) {
    assert_eq!(totals(before), totals(after), "{words:?} changes counters: {before:#} {after:#}");
    for tap in &before.taps {
        let is_same =
            |other: &&lab::status::Tap| (&other.interface, &other.direction) == (&tap.interface, &tap.direction);
        if let Some(now) = after.taps.iter().find(is_same) {
            assert_eq!(now.counts, tap.counts, "{words:?}: {} {}", tap.interface, tap.direction);
        }
    }
    for remote in &before.remotes {
        if let Some(now) = after.remotes.iter().find(|now| now.address == remote.address) {
            assert_eq!(now.stat, remote.stat, "{words:?}: {}", remote.address);
        }
    }
}

/// Sends 7 frames each way over eth0, and panics unless of them what is wanted is copied, and counted.
#[track_caller]
fn assert_copies(lab: &Lab, (words, copied, kind, holds): Step) {
    let ingress = frames::series(&Ends::PEER_TO_HOST, 7);
    let egress = frames::series(&Ends::HOST_TO_PEER, 7);
    let mut capture = lab.capture(Ns::Collector, "col0", Direction::In);
    lab.send(Ns::Peer, "peer0", &ingress);
    lab.send(Ns::Host, "eth0", &egress);
    let balanced = |session: &Session| {
        let (asked, sent) = (session.taps_total().pcnt + session.removed_taps.stat.pcnt, session.remotes_total().pcnt);
        asked == sent + session.removed.pcnt + session.drops()
    };
    let settled = poll(PATIENCE, || Some(lab.session()).filter(balanced));
    assert!(settled.is_some(), "{words:?}: {:#}", lab.session());
    capture.settle();
    let copies = decap(kind, &capture.stop());
    assert!(copies.iter().all(holds), "{words:?}: {copies:?}");
    let (both, got) = ([ingress.clone(), egress.clone()].concat(), inner(&copies));
    match copied {
        Copied::Both => assert_same_frames(&both, &got),
        Copied::Ingress => assert_same_frames(&ingress, &got),
        Copied::Egress => assert_same_frames(&egress, &got),
        Copied::Some => assert!(multiset_diff(&both, &got).1.is_empty(), "{words:?}"),
        Copied::None => assert_same_frames(&[], &got),
        Copied::Cut(most) => {
            let cut: Vec<Vec<u8>> = both.iter().map(|frame| frame[..frame.len().min(most)].to_vec()).collect();
            assert_same_frames(&cut, &got);
        }
        Copied::Times(times) => assert_same_frames(&vec![both; times].concat(), &got),
    }
}

/// Makes a session by the first request, and of it by `--replace` each of the others in turn.
#[track_caller]
fn assert_replaced(lab: &Lab, steps: &[Step]) {
    let before = lab.machine();
    up(lab, steps[0].0, &[]).ok();
    assert_copies(lab, steps[0]);
    for step in &steps[1..] {
        let words = step.0;
        let was = lab.session();
        up(lab, words, &[]).refused(1, "is taken by a session with another request (", "snifctl down --name default");
        let said = up(lab, words, &["--replace"]).ok();
        assert!(said.stdout.starts_with("default: ") && !said.stderr.contains("already up"), "{said:#?}");
        let now = lab.session();
        assert_kept(&was, &now, words);
        assert_eq!(now.command, command(words));
        assert_eq!(now.faults, [""; 0], "{words:?}");
        let shown = lab.said(&["status", "-v"]).stdout;
        assert!(shown.contains(&format!("\n  command: {}\n", command(words))), "{shown}");
        assert_eq!(lab.said(&["sync"]).quietly_ok().stdout, "", "{words:?}");
        assert!(up(lab, words, &[]).ok().stderr.ends_with("session default is already up with this request\n"));
        assert_copies(lab, *step);
    }
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

const BASE: Step = (&["eth0", "--tunnel", "gre", "--remote", A], Copied::Both, Kind::Gre, any);

#[test]
fn what_is_copied_is_replaced_and_counters_stay() {
    const ONLY: &str = "ether src 02:00:00:00:01:02";
    assert_replaced(
        &lab_of(1),
        &[
            BASE,
            (&["eth0", "--tunnel", "gre", "--remote", A, "--filter", ONLY], Copied::Ingress, Kind::Gre, any),
            (&["eth0", "--tunnel", "gre", "--remote", A, "--filter", "tcp"], Copied::None, Kind::Gre, any),
            (&["eth0", "--tunnel", "gre", "--remote", A, "--sample", "1/2"], Copied::Some, Kind::Gre, any),
            (&["eth0", "--tunnel", "gre", "--remote", A, "--sample-flows", "1/2"], Copied::Some, Kind::Gre, any),
            (&["eth0", "--tunnel", "gre", "--remote", A, "--snaplen", "100"], Copied::Cut(100), Kind::Gre, any),
            (&["eth0", "--tunnel", "gre", "--remote", A, "--snaplen", "64"], Copied::Cut(64), Kind::Gre, any),
            (&["eth0", "--tunnel", "gre", "--remote", A, "--max-rate", "1gbit"], Copied::Both, Kind::Gre, any),
            (&["eth0", "--tunnel", "gre", "--remote", A, "--max-rate", "2gbit"], Copied::Both, Kind::Gre, any),
            (&["eth0", "--tunnel", "gre", "--remote", A, "--oversize", "drop"], Copied::Both, Kind::Gre, any),
            (&["eth0", "--tunnel", "gre", "--remote", A, "--oversize", "fragment"], Copied::Both, Kind::Gre, any),
            (&["eth0", "--tunnel", "gre", "--remote", A, "--oversize", "truncate"], Copied::Both, Kind::Gre, any),
            BASE,
        ],
    );
}

#[test]
fn the_tunnel_is_replaced_and_counters_stay() {
    assert_replaced(
        &lab_of(1),
        &[
            BASE,
            (&["eth0", "--tunnel", "vxlan", "--remote", A], Copied::Both, Kind::Vxlan(4789), |copy| {
                copy.header.id == Some(1)
            }),
            (&["eth0", "--tunnel", "vxlan", "--remote", A, "--id", "7"], Copied::Both, Kind::Vxlan(4789), |copy| {
                copy.header.id == Some(7)
            }),
            (
                &["eth0", "--tunnel", "vxlan", "--remote", A, "--id", "7", "--egress-id", "8"],
                Copied::Both,
                Kind::Vxlan(4789),
                |copy| copy.header.id == Some(if copy.frame[6..12] == lab::PEER_MAC { 7 } else { 8 }),
            ),
            (
                &["eth0", "--tunnel", "vxlan", "--remote", A, "--port", "4790", "--udp-checksum"],
                Copied::Both,
                Kind::Vxlan(4790),
                |copy| copy.outer.checksum,
            ),
            (&["eth0", "--tunnel", "geneve", "--remote", A], Copied::Both, Kind::Geneve(6081), any),
            (&["eth0", "--tunnel", "erspan2", "--remote", A, "--id", "5"], Copied::Both, Kind::Erspan2, |copy| {
                copy.header.id == Some(5)
            }),
            (&["eth0", "--tunnel", "erspan3", "--remote", A, "--id", "5"], Copied::Both, Kind::Erspan3, |copy| {
                copy.header.id == Some(5)
            }),
            (&["eth0", "--tunnel", "gre", "--remote", A, "--id", "9", "--sequence"], Copied::Both, Kind::Gre, |copy| {
                copy.header.id == Some(9) && copy.header.sequence.is_some()
            }),
            BASE,
        ],
    );
}

#[test]
fn the_outer_header_is_replaced_and_counters_stay() {
    assert_replaced(
        &lab_of(1),
        &[
            BASE,
            (&["eth0", "--tunnel", "gre", "--remote", A, "--ttl", "7"], Copied::Both, Kind::Gre, |copy| {
                copy.outer.ttl == 7
            }),
            (&["eth0", "--tunnel", "gre", "--remote", A, "--tos", "16"], Copied::Both, Kind::Gre, |copy| {
                (copy.outer.ttl, copy.outer.tos, copy.outer.df) == (64, 16, false)
            }),
            (&["eth0", "--tunnel", "gre", "--remote", A, "--df"], Copied::Both, Kind::Gre, |copy| copy.outer.df),
            (
                &["eth0", "--tunnel", "gre", "--remote", A, "--source", "198.51.100.1"],
                Copied::Both,
                Kind::Gre,
                |copy| !copy.outer.df && copy.outer.src == lab::OUT_IP,
            ),
            (&["eth0", "--tunnel", "gre", "--remote", A, "--underlay", "none"], Copied::Both, Kind::Gre, any),
            BASE,
        ],
    );
}

#[test]
fn the_remotes_are_replaced_and_counters_stay() {
    assert_replaced(
        &lab_of(2),
        &[
            BASE,
            (&["eth0", "--tunnel", "gre", "--remote", A, "--remote", B], Copied::Times(2), Kind::Gre, any),
            (
                &["eth0", "--tunnel", "gre", "--remote", A, "--remote", B, "--spread", "flow"],
                Copied::Both,
                Kind::Gre,
                any,
            ),
            (&["eth0", "--tunnel", "gre", "--remote", B], Copied::Both, Kind::Gre, |copy| copy.outer.dst == remote(1)),
            BASE,
        ],
    );
}

#[test]
fn the_interfaces_are_replaced_and_counters_stay() {
    let lab = lab_of(1);
    add_link(&lab, 1);
    assert_replaced(
        &lab,
        &[
            BASE,
            (&["eth0:ingress", "--tunnel", "gre", "--remote", A], Copied::Ingress, Kind::Gre, any),
            (&["eth0:egress", "--tunnel", "gre", "--remote", A], Copied::Egress, Kind::Gre, any),
            (&["eth0:egress", "eth1", "--tunnel", "gre", "--remote", A], Copied::Egress, Kind::Gre, any),
            (&["eth1:ingress", "--tunnel", "gre", "--remote", A], Copied::None, Kind::Gre, any),
            BASE,
        ],
    );
}

/// What cannot be put in force leaves the session as it was.
#[test]
fn a_replacement_that_is_refused_changes_nothing() {
    let lab = lab_of(1);
    up(&lab, BASE.0, &[]).quietly_ok();
    let before = (lab.machine(), lab.status_json());
    for (words, code, names) in [
        (&["nosuch0", "--tunnel", "gre", "--remote", A][..], 1, "IFACE nosuch0"),
        (&["eth0", "--tunnel", "gre", "--remote", "198.51.100.1"], 1, "this machine itself"),
        (&["eth0", "--tunnel", "gre", "--remote", A, "--filter", "tcp prot"], 2, "--filter"),
        (&["eth0", "--tunnel", "gre", "--remote", A, "--source", "203.0.113.1"], 1, "--source"),
    ] {
        up(&lab, words, &["--replace"]).refused(code, names, "");
        assert_eq!((lab.machine(), lab.status_json()), before, "{words:?}");
    }
    assert_copies(&lab, BASE);
}

// ---- the same request ----

#[test]
fn another_order_of_interfaces_and_remotes_is_the_same_request() {
    let lab = lab_of(2);
    add_link(&lab, 1);
    up(&lab, &["eth0", "eth1:ingress", "--tunnel", "gre", "--remote", A, "--remote", B], &[]).ok();
    let list = format!("{B},{A}");
    up(&lab, &["eth1:ingress", "eth0", "--tunnel", "gre", "--remote", &list], &[]).ok_noting("already up");
    up(&lab, &["eth1:ingress", "eth0", "--tunnel", "gre", "--remote", &list], &["--replace"]).ok_noting("already up");
    up(&lab, &["eth0", "eth1", "--tunnel", "gre", "--remote", &list], &[]).refused(
        1,
        "(IFACE eth0, eth1:ingress → eth0, eth1)",
        "snifctl down --name default",
    );
}

#[test]
fn the_request_that_edits_have_made_can_be_typed_again() {
    let (lab, _) = lab_with_links(1);
    tap(&lab, "add eth1");
    tap(&lab, "remove eth0 --direction egress");
    lab.said(&["remote", "add", B]).quietly_ok();
    lab.said(&["filter", "set", "udp or (tcp and not port 80)"]).quietly_ok();
    let command = lab.session().command;
    assert!(command.starts_with("snifctl up eth0:ingress eth1 --tunnel gre "), "{command}");
    let shown = lab.said(&["status", "-v"]).stdout;
    let typed = shown.lines().find_map(|line| line.strip_prefix("  command: snifctl ")).expect("a command");
    assert_eq!(format!("snifctl {typed}"), command);
    let script = format!("exec {} {typed}", env!("CARGO_BIN_EXE_snifctl"));
    let again: Said = lab.try_host(&["sh", "-c", &script]).into();
    again.ok_noting("session s0 is already up with this request");
}

#[test]
fn the_old_name_of_underlay_is_still_taken() {
    let lab = Lab::roomy();
    lab.said(&up_with(&["--carrier", "192.0.2.2:4444"])).quietly_ok();
    lab.said(&up_with(&["--underlay", "192.0.2.2:4444"])).ok_noting("already up with this request");
    assert!(lab.session().command.ends_with(" --underlay 192.0.2.2:4444"), "{:#}", lab.session());
}

// ---- exit codes ----

/// What can be known without a look at the machine is told with 2, also where no session is up.
#[test]
fn usage_errors_end_with_2_and_what_the_machine_says_with_1() {
    let lab = Lab::roomy();
    let before = lab.machine();
    for more in [
        &["--remote", "collector"][..],
        &["--remote", "198.51.100.2"],
        &["--name", "A"],
        &["--max-rate", "fast"],
        &["--source", "out0"],
        &["--ttl", "0"],
        &["--tos", "256"],
        &["--id", "many"],
        &["--id", "4294967296"],
        &["--port", "4789"],
        &["--egress-id", "7"],
        &["--udp-checksum"],
        &["--filter", "tcp prot"],
        &["--filter", ""],
        &["--filter", "inbound"],
        &["--sample", "2"],
        &["--snaplen", "1"],
        &["--df", "--oversize", "fragment"],
        &["--underlay", "nonsense"],
        &["--wait", "soon"],
        &["eth0"],
        &["a b"],
        &["eth1:sideways"],
    ] {
        let said = lab.said(&up_with(more));
        assert_eq!(said.status.code(), Some(2), "{more:?}: {said:#?}");
        said.refused(2, "", "");
    }
    for words in [
        "map dump nosuch",
        "filter set inbound",
        "tap add a/b",
        "tap remove eth0:sideways",
        "remote add collector",
        "remote remove 224.0.0.1 --name A",
        "doctor --remote collector",
        "doctor a/b",
        "sync --all --name x",
    ] {
        lab.said(&words.split(' ').collect::<Vec<_>>()).refused(2, "", "");
    }
    for words in [
        "up nosuch0 --tunnel gre --remote 198.51.100.2",
        "up eth0 --tunnel gre --remote 198.51.100.1",
        "up eth0 --tunnel gre --remote 198.51.100.2 --source 203.0.113.1",
        "map dump taps",
        "sync",
        "tap add eth0",
        "remote add 198.51.100.2",
        "filter clear",
        "status --name other",
    ] {
        lab.said(&words.split(' ').collect::<Vec<_>>()).refused(1, "", "");
    }
    lab.assert_as_before(&before);
}

// ---- one at a time ----

#[test]
fn whoever_waits_for_another_says_so_and_can_say_how_long() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    let dir = lab.pins().to_string_lossy().into_owned();
    {
        let _holder = lab.background(Ns::Host, &["flock", "--close", &dir, "sleep", "60"]);
        let held = || lab.try_host(&["flock", "--nonblock", &dir, "true"]).status.code() == Some(1);
        assert!(poll(PATIENCE, || held().then_some(())).is_some(), "the lock is not held");
        for words in [&["status"][..], &["down"], &["sync"], &["filter", "clear"], &UP, &["tap", "list"]] {
            let started = Instant::now();
            let said = lab.said(&[&["--wait", "0"], words].concat());
            assert!(said.stderr.contains("another snifctl (process "), "{words:?}: {said:#?}");
            said.refused(1, " has been at work for 0 s", "--wait 60");
            assert!(started.elapsed() < Duration::from_secs(5), "{words:?}");
        }
        let said = lab.said(&["status", "--wait", "2"]);
        assert_eq!((said.status.code(), said.stderr.lines().count()), (Some(1), 2), "{said:#?}");
        assert!(said.stderr.starts_with("snifctl: waiting for another snifctl (process "), "{said:#?}");
    }
    assert!(
        poll(PATIENCE, || lab.try_host(&["flock", "--nonblock", &dir, "true"]).status.success().then_some(()))
            .is_some()
    );
    let _holder = lab.background(Ns::Host, &["flock", "--close", &dir, "sleep", "2"]);
    std::thread::sleep(Duration::from_millis(300));
    lab.said(&["filter", "set", "udp"]).ok_noting("waiting for another snifctl (process ");
    // Readers do not wait for each other.
    let _reader = lab.background(Ns::Host, &["flock", "--close", "--shared", &dir, "sleep", "60"]);
    std::thread::sleep(Duration::from_millis(300));
    lab.said(&["status", "--wait", "0"]).quietly_ok();
    lab.said(&["sync", "--wait", "0"]).refused(1, "another snifctl", "--wait 60");
}

// ---- requests that cannot be read ----

/// Two sessions, of which `a` is damaged by these lines, with its pins at $1.
fn beside_a_broken_one(damage: &str) -> Lab {
    let lab = Lab::roomy();
    for name in ["a", "b"] {
        lab.said(&up_with(&["--name", name])).quietly_ok();
    }
    lab.host(&["sh", "-euc", damage, "sh", &lab.pins().join("a").to_string_lossy()]);
    lab
}

#[test]
fn a_session_that_cannot_be_read_is_shown_beside_the_others_and_goes_by_down() {
    for damage in ["rm $1/maps/request $1/snif_*", "rm -r $1/maps $1/snif_*", "rm -r $1/*"]
        .map(|pins| format!("{pins}\nip link del snif0l"))
    {
        let lab = beside_a_broken_one(&damage);
        let status = lab.status_json();
        let [a, b] = [0, 1].map(|at| status["sessions"][at].clone());
        assert_eq!((&a["name"], &a["tunnel"], &a["request"]), (&"a".into(), &Value::Null, &Value::Null), "{a:#}");
        assert_eq!(a["faults"].as_array().map(Vec::len), Some(1), "{a:#}");
        assert_eq!((&b["name"], &b["tunnel"], &b["faults"]), (&"b".into(), &"gre".into(), &serde_json::json!([])));
        let text = lab.said(&["status"]).quietly_ok().stdout;
        assert!(text.contains("  fault: ") && text.contains("  put it right with: snifctl down --name a\n"), "{text}");
        assert!(text.contains("\nb: gre, "), "{text}");
        // The others are brought in order all the same.
        lab.host(&["sh", "-c", "ip link set snif1 down 2>/dev/null || ip link set snif0 down"]);
        let synced = lab.said(&["sync", "--all"]);
        assert_eq!(synced.status.code(), Some(1), "{synced:#?}");
        assert!(synced.stderr.ends_with("snifctl down --name a\n"), "{synced:#?}");
        assert_eq!(lab.session_called("b").faults, [""; 0]);
        lab.said(&["down", "--name", "a"]).quietly_ok();
        lab.assert_up(&["b"]);
        lab.assert_copied(1);
        lab.said(&["down", "--all"]).quietly_ok();
        lab.assert_no_pins();
    }
}

/// Writes a text over what the session remembers.
fn remember(lab: &Lab, text: impl Fn(&str) -> String) {
    let map = lab.pins().join("default/maps/request").to_string_lossy().into_owned();
    let rows: Value =
        serde_json::from_str(&lab.shown(&["bpftool", "-j", "map", "dump", "pinned", &map])).expect("JSON");
    let bytes: Vec<u8> = rows
        .as_array()
        .expect("rows")
        .iter()
        .find(|row| row["key"].as_array().is_some_and(|key| key.iter().all(|byte| byte == "0x00")))
        .expect("the first part")["value"]
        .as_array()
        .expect("bytes")
        .iter()
        .map(|byte| u8::from_str_radix(byte.as_str().expect("text").trim_start_matches("0x"), 16).expect("hex"))
        .collect();
    let old = String::from_utf8_lossy(&bytes).into_owned();
    let mut new = text(&old).into_bytes();
    new.resize(bytes.len(), 0);
    let hex: Vec<String> = new.iter().map(|byte| format!("{byte:02x}")).collect();
    let hex: Vec<&str> = hex.iter().map(String::as_str).collect();
    let key = ["key", "hex", "00", "00", "00", "00", "value", "hex"];
    lab.host(&[&["bpftool", "map", "update", "pinned", &map][..], &key, &hex].concat());
}

#[test]
fn a_session_of_another_version_is_told_as_such_and_goes_by_down() {
    let ours = env!("CARGO_PKG_VERSION");
    let newer = format!("made by a newer snifctl ({ours}; this is {ours}, and does not know form 9 of what it stores)");
    let older = format!("made by an older snifctl, in a form that this one ({ours}) cannot read");
    for (version, why) in [("\"version\":9", newer.as_str()), ("\"plan___\":1", &older)] {
        let lab = Lab::roomy();
        let before = lab.machine();
        lab.said(&UP).quietly_ok();
        remember(&lab, |old| {
            assert!(old.starts_with("{\"version\":1,"), "{old}");
            // Of the same length, as the rest follows.
            old.replacen("\"version\":1", version, 1)
        });
        let text = lab.said(&["status"]).quietly_ok().stdout;
        assert!(text.contains(&format!("  fault: {why}\n")), "{text}");
        assert!(text.contains("  put it right with: ") && text.contains("snifctl down --name default\n"), "{text}");
        assert_eq!(lab.status_json()["sessions"][0]["faults"], serde_json::json!([why]));
        for words in [&["sync"][..], &["filter", "set", "udp"], &["tap", "add", "out0"], &["remote", "add", B]] {
            lab.said(words).refused(1, why, "snifctl down --name default");
        }
        lab.said(&["down"]).quietly_ok();
        lab.assert_as_before(&before);
    }
}
