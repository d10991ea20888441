//! A session from `up` to `down`: what it shows, whom it lives with, and that it survives being raced.

use std::fs;
use std::path::Path;
use std::process::{Child, Command};

use crate::lab;
use crate::lab::capture::Direction;
use crate::lab::faults::EMPTY_CACHE;
use crate::lab::frames::{self, Ends};
use crate::lab::judge::{Said, UP, up_with};
use crate::lab::{Lab, Ns};
use serde_json::{Value, json};

const SNIFCTL: &str = env!("CARGO_BIN_EXE_snifctl");

/// The same shape with the type's name for each leaf: what a reader of JSON relies on.
fn shape(value: &Value) -> Value {
    match value {
        Value::Object(map) => map.iter().map(|(key, value)| (key.clone(), shape(value))).collect(),
        Value::Array(list) => list.iter().map(shape).collect(),
        Value::String(_) => "text".into(),
        Value::Number(n) if n.is_u64() => "count".into(),
        Value::Bool(_) => "bool".into(),
        other => panic!("{other} has no place here"),
    }
}

// ---- up, look, down ----

#[test]
fn up_status_map_down_leave_the_machine_as_it_was() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let said = lab.said(&UP).quietly_ok();
    let line = "default: eth0 -> gre -> 198.51.100.2 through out0 (MTU 1600)\n";
    assert_eq!(said.stdout, line);
    let ids = lab.program_ids();
    assert_eq!(ids.len(), 5);
    lab.assert_up(&["default"]);
    lab.assert_copied(1);
    for args in [&["status"][..], &["map", "list"], &["map", "dump"]] {
        lab.said(args).quietly_ok();
    }
    assert_eq!(lab.said(&["down"]).quietly_ok().stdout, "");
    lab.assert_as_before(&before);
    lab.assert_unloaded(&ids);
}

#[test]
fn no_copy_flows_before_up_and_after_down() {
    let lab = Lab::roomy();
    for _ in 0..2 {
        lab.assert_copied(0);
        lab.said(&UP).quietly_ok();
        lab.assert_copied(1);
        lab.said(&["down"]).quietly_ok();
        lab.assert_copied(0);
    }
}

#[test]
fn down_is_idempotent() {
    let lab = Lab::roomy();
    let before = lab.machine();
    lab.said(&["down"]).ok_noting("session default is not up");
    lab.said(&["down", "--all"]).ok_noting("no session is up");
    lab.assert_as_before(&before);
    lab.said(&UP).quietly_ok();
    lab.said(&["down"]).quietly_ok();
    lab.said(&["down"]).ok_noting("session default is not up");
    lab.said(&["down", "--name", "other"]).ok_noting("session other is not up");
    lab.assert_as_before(&before);
}

#[test]
fn status_json_has_the_promised_schema() {
    let lab = Lab::roomy();
    let choices = ["--filter", "udp", "--snaplen", "9000", "--max-rate", "1gbit"];
    let more = [&["--direction", "ingress", "--oversize", "drop", "--name", "mirror-1"][..], &choices].concat();
    lab.said(&up_with(&more)).quietly_ok();
    lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, 7));
    let status = lab.status_json();
    let stat = json!({"pcnt": "count", "bcnt": "count", "dcnt": "count"});
    let mut shown = shape(&status);
    let drops = shown["sessions"][0]["drops"].take();
    let class = json!({"up_to": "count", "count": "count", "sum": "count"});
    let more = shape(&lab.said(&["status", "--json", "--verbose"]).json());
    let sizes = more["sessions"][0]["sizes"].as_array().expect("sizes");
    assert!(!sizes.is_empty() && sizes.iter().all(|at| *at == class), "{sizes:?}");
    let expected = json!({"sessions": [{
        "name": "text", "tunnel": "text", "oversize": "text", "spread": "text",
        "filter": "text", "sample": "count", "sample_flows": "count", "snaplen": "count", "max_rate": "text",
        "request": {
            "name": "text", "interfaces": ["text"], "tunnel": "text", "sequence": "bool", "udp_checksum": "bool",
            "tell": "bool",
            "remotes": ["text"], "spread": "text", "filter": "text", "sample": "text", "sample_flows": "text",
            "snaplen": "count", "max_rate": "text", "oversize": "text", "ttl": "count", "tos": "count", "df": "bool",
        },
        "command": "text",
        "taps": [{
            "interface": "text", "direction": "text", "attached": "bool", "exists": "bool", "stat": stat,
            "seen": "count", "filtered": "count", "skipped": "count", "own": "count", "health": "text",
        }],
        "patterns": [], "waiting": [],
        "remotes": [{"address": "text", "source": "text", "interface": "text", "mac": "text", "mtu": "count",
            "state": "text", "stat": stat, "health": "text"}],
        "removed": stat,
        "removed_taps": {"stat": stat, "seen": "count", "filtered": "count", "skipped": "count", "own": "count"},
        "drops": null, "forms": {
            "super_packets": "count", "segments": "count", "vlan": "count", "truncated": "count",
            "fragmented": "count", "fragments": "count",
        },
        "out_dropped": "count", "ahead": [], "faults": [], "made_by": "text",
    }]});
    assert_eq!(shown, expected);
    assert!(drops.as_object().unwrap().values().all(|count| count == "count"), "{drops}");
    assert_session_values(&status["sessions"][0]);
}

/// The values of the session above, after 7 frames.
#[track_caller]
fn assert_session_values(session: &Value) {
    let bytes: usize = frames::series(&Ends::PEER_TO_HOST, 7).iter().map(Vec::len).sum();
    let stat = json!({"pcnt": 7, "bcnt": bytes, "dcnt": 0});
    let tap = json!({
        "interface": "eth0", "direction": "ingress", "attached": true, "exists": true, "stat": stat,
        "seen": 7, "filtered": 0, "skipped": 0, "own": 0, "health": "ok",
    });
    let choices = ["filter", "sample", "sample_flows", "snaplen", "max_rate"].map(|key| session[key].clone());
    assert_eq!(json!(choices), json!(["udp", 1, 1, 9000, "1gbit"]));
    let remote = json!({
        "address": "198.51.100.2", "source": "198.51.100.1", "interface": "out0", "mac": "02:00:00:00:02:02",
        "mtu": 1600, "state": "ok", "stat": stat, "health": "ok",
    });
    let head = [&session["name"], &session["tunnel"], &session["oversize"]];
    assert_eq!(head, ["mirror-1", "gre", "drop"]);
    let command = "snifctl up eth0:ingress --tunnel gre --remote 198.51.100.2 --filter udp --snaplen 9000 --max-rate 1gbit \
                   --oversize drop --name mirror-1";
    assert_eq!(words(&session["command"]), words(&json!(command)));
    assert_eq!((&session["taps"], &session["remotes"]), (&json!([tap]), &json!([remote])));
    for reason in ["unresolved", "oversize", "out", "relay", "gone", "depth"] {
        assert_eq!(session["drops"][reason], 0, "{reason}");
    }
}

/// The words of a command line, in no order.
fn words(line: &Value) -> Vec<String> {
    let mut words: Vec<String> = line.as_str().expect("a line").split(' ').map(String::from).collect();
    words.sort();
    words
}

#[test]
fn status_without_a_session_is_an_empty_list() {
    let lab = Lab::roomy();
    assert_eq!(lab.status_json(), json!({"sessions": []}));
    let said = lab.said(&["status"]).quietly_ok();
    assert_eq!(said.stdout, "no session is up; start one with: snifctl up IFACE --tunnel gre --remote ADDR\n");
    lab.assert_no_pins();
}

#[test]
fn up_json_is_the_status_of_the_session() {
    let lab = Lab::roomy();
    lab.said(&up_with(&["--name", "other"])).quietly_ok();
    let said = lab.said(&up_with(&["--json"])).quietly_ok();
    let status = lab.said(&["status", "--json", "--name", "default"]).quietly_ok();
    assert_eq!(said.json(), status.json());
    assert_eq!(said.json()["sessions"][0]["name"], "default");
}

#[test]
fn status_text_shows_counters_for_a_person() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, 1009));
    let said = lab.said(&["status"]).quietly_ok();
    for word in
        ["default: gre, oversize segment", "eth0", "ingress", "  ok  ", "1,009", "KiB", "198.51.100.2", "drops: none"]
    {
        assert!(said.stdout.contains(word), "{word} in\n{}", said.stdout);
    }
    assert!(said.stdout.lines().all(|line| line.len() <= 120), "{}", said.stdout);
}

#[test]
fn attached_is_what_the_kernel_says() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    lab.host(&["tc", "filter", "del", "dev", "eth0", "ingress"]);
    let attached: Vec<bool> = lab.session().taps.iter().map(|tap| tap.attached).collect();
    assert_eq!(attached, [false, true]);
    let shown = lab.said(&["status"]).quietly_ok().stdout;
    assert!(shown.contains("  detached  "), "{shown}");
    assert!(shown.contains("\n  fault: tap eth0 ingress: its filter is gone\n"), "{shown}");
    assert!(shown.ends_with("\n  put it right with: snifctl sync --name default\n"), "{shown}");
    assert_eq!(lab.session().faults, ["tap eth0 ingress: its filter is gone"]);
    assert_eq!(lab.said(&["sync"]).quietly_ok().stdout, "default: tap eth0 ingress: its filter is gone; attached\n");
    assert_eq!(lab.session().faults, [""; 0]);
}

#[test]
fn the_same_up_again_says_so_and_changes_nothing() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    let (up, ids) = (lab.machine(), lab.program_ids());
    lab.said(&UP).ok_noting("session default is already up with this request");
    assert_eq!((lab.machine(), lab.program_ids()), (up, ids));
    lab.assert_copied(1);
}

#[test]
fn the_same_up_follows_a_neighbour_that_has_moved() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    let entry =
        ["ip", "neigh", "replace", "198.51.100.2", "lladdr", "02:00:00:00:02:07", "nud", "permanent", "dev", "out0"];
    lab.host(&entry);
    let change = "default: remote 198.51.100.2: next hop 02:00:00:00:02:02 → 02:00:00:00:02:07; written";
    let again = "session default is up with this request, and in order again";
    assert_eq!(lab.said(&UP).ok().stderr, format!("snifctl: {change}\nsnifctl: {again}\n"));
    assert_eq!(lab.session().remotes[0].mac.as_deref(), Some("02:00:00:00:02:07"));
    lab.said(&UP).ok_noting("already up with this request");
}

// ---- several sessions ----

#[test]
fn two_sessions_share_an_interface_and_leave_it_one_by_one() {
    let lab = Lab::roomy();
    let before = lab.machine();
    lab.said(&UP).quietly_ok();
    let one = lab.machine();
    lab.said(&up_with(&["--name", "second"])).quietly_ok();
    lab.assert_up(&["default", "second"]);
    lab.assert_copied(2);
    lab.said(&["down", "--name", "second"]).quietly_ok();
    lab.assert_up(&["default"]);
    assert_eq!(lab.machine(), one);
    lab.assert_copied(1);
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

#[test]
fn the_session_that_added_the_qdisc_may_leave_first() {
    let lab = Lab::roomy();
    let before = lab.machine();
    lab.said(&UP).quietly_ok();
    lab.said(&up_with(&["--name", "second"])).quietly_ok();
    lab.said(&["down"]).quietly_ok();
    lab.assert_up(&["second"]);
    lab.assert_copied(1);
    lab.said(&["down", "--name", "second"]).quietly_ok();
    lab.assert_as_before(&before);
}

#[test]
fn down_all_takes_every_session_down() {
    let lab = Lab::roomy();
    let before = lab.machine();
    for name in ["default", "a", "b-2"] {
        lab.said(&up_with(&["--name", name])).quietly_ok();
    }
    lab.said(&["up", "out0", "eth0", "--tunnel", "gre", "--remote", "198.51.100.2", "--name", "both"]).ok();
    let ids = lab.program_ids();
    lab.assert_up(&["a", "b-2", "both", "default"]);
    lab.said(&["down", "--all"]).quietly_ok();
    lab.assert_as_before(&before);
    lab.assert_unloaded(&ids);
}

#[test]
fn sessions_of_two_namespaces_do_not_know_each_other() {
    let (one, other) = (Lab::roomy(), Lab::roomy());
    one.said(&UP).quietly_ok();
    other.said(&UP).quietly_ok();
    other.said(&["down", "--all"]).quietly_ok();
    one.assert_up(&["default"]);
    one.assert_copied(1);
}

// ---- the watched interface's queue ----

/// Runs snifctl with the words of this line.
#[track_caller]
fn line(lab: &Lab, words: &str) -> Said {
    lab.said(&words.split(' ').collect::<Vec<_>>()).ok()
}

fn clsact(lab: &Lab) -> bool {
    lab.shown(&["tc", "qdisc", "show", "dev", "eth0"]).contains("clsact")
}

/// Packets that stand in eth0's queue.
fn standing(lab: &Lab) -> u64 {
    let shown = lab.shown(&["tc", "-j", "-s", "qdisc", "show", "dev", "eth0", "root"]);
    let qdiscs: Value = serde_json::from_str(&shown).expect("JSON of tc");
    qdiscs[0]["qlen"].as_u64().expect("a length")
}

/// A queue that lets a frame of 100 bytes pass each 0.8 s.
const TBF: [&str; 11] = ["tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "burst", "2000", "limit", "1000000"];

/// A link whose frames may all wait.
fn queue(lab: &Lab, rate: &str) {
    lab.host(&[&TBF[..], &["rate", rate]].concat());
}

/// Neither adding nor removing a clsact qdisc is part of these commands, so no packet is lost that stands in the queue.
#[test]
fn no_command_but_the_first_up_and_the_last_down_touches_the_queue() {
    const FRAMES: usize = 199;
    let lab = Lab::roomy();
    line(&lab, &UP.join(" "));
    queue(&lab, "1kbit");
    let sent: Vec<Vec<u8>> = (0..FRAMES as u32).map(|n| frames::raw(&Ends::HOST_TO_PEER, n, 100)).collect();
    let mut received = lab.capture(Ns::Peer, "peer0", Direction::In);
    lab.send(Ns::Host, "eth0", &sent);
    assert!(standing(&lab) > 100, "{} stand", standing(&lab));
    for words in [
        "tap remove eth0 --direction egress",
        "tap add eth0 --direction egress",
        "tap remove eth0 --direction ingress",
        "tap add eth0",
        "filter set udp",
        "filter clear",
        "remote add 2001:db8:1::2",
        "remote remove 2001:db8:1::2",
        "up eth0 --tunnel gre --remote 198.51.100.2 --name second",
        "down --name second",
    ] {
        line(&lab, words);
    }
    let session = lab.pins().join("default");
    for damage in
        ["ip link del snif0", "ip link set snif0 down", "tc filter del dev eth0 ingress", "rm $1/maps/taps", "rm -r $1"]
    {
        lab.host(&["sh", "-euc", damage, "sh", &session.to_string_lossy()]);
        line(&lab, &UP.join(" "));
        lab.assert_up(&["default"]);
    }
    for words in ["down --keep-clsact", &UP.join(" "), "down --all"] {
        line(&lab, words);
        assert!(clsact(&lab), "{words}");
    }
    assert!(standing(&lab) > 100, "{} stand", standing(&lab));
    queue(&lab, "1gbit");
    lab::check::assert_same_frames(&sent, &received.take(FRAMES));
}

#[test]
fn up_says_where_packets_stand_when_it_adds_the_qdisc() {
    let lab = Lab::roomy();
    let stands = || {
        queue(&lab, "1kbit");
        lab.send(Ns::Host, "eth0", &frames::series(&Ends::HOST_TO_PEER, 31));
    };
    let told = |words: &str, keeps: bool| {
        let said = line(&lab, words);
        assert_eq!(said.stderr.lines().count(), 1, "{said:#?}");
        assert!(said.stderr.contains("stood in the queue of eth0"), "{said:#?}");
        assert_eq!(said.stderr.contains("--keep-clsact leaves"), keeps, "{said:#?}");
    };
    let up = UP.join(" ");
    stands();
    told(&up, true);
    line(&lab, "down");
    stands();
    told(&format!("{up} --keep-clsact"), false);
    assert!(clsact(&lab));
    line(&lab, "down");
    assert!(clsact(&lab));
    stands();
    line(&lab, &up).quietly_ok();
    line(&lab, "down");
    lab.assert_no_pins();
}

#[test]
fn a_qdisc_that_is_to_stay_stays_and_is_no_longer_ours() {
    let lab = Lab::roomy();
    let up = UP.join(" ");
    let lasting = |words: &[&str]| {
        lab.host(&["sh", "-c", "tc qdisc del dev eth0 clsact 2>&1 || true"]);
        let before = lab.machine();
        words.iter().for_each(|words| drop(line(&lab, words)));
        assert!(clsact(&lab), "{words:?}");
        lab.host(&["tc", "qdisc", "del", "dev", "eth0", "clsact"]);
        lab.assert_as_before(&before);
    };
    lasting(&[&up, "down --keep-clsact"]);
    lasting(&[&up, &format!("{up} --keep-clsact"), "down"]);
    let second = format!("{up} --name second");
    lasting(&[&up, &second, "down --keep-clsact", "down --name second"]);
    let out0 = "up out0 --tunnel gre --remote 198.51.100.2 --max-rate 1gbit";
    lasting(&[out0, "tap add eth0 --keep-clsact", "tap remove eth0", "down"]);
    lasting(&[out0, "tap add eth0", "tap remove eth0 --keep-clsact", "down"]);
}

// ---- interfaces that go away ----

#[test]
fn a_watched_interface_that_is_deleted_is_shown_and_down_still_works() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    lab.host(&["ip", "link", "del", "dev", "eth0"]);
    let session = lab.session();
    assert!(session.taps.iter().all(|tap| !tap.attached && !tap.exists && tap.interface == "eth0"), "{session:#}");
    assert_eq!(lab.said(&["status"]).quietly_ok().stdout.matches("  gone  ").count(), 2);
    let said = lab.said(&UP).ok();
    assert!(
        said.stderr.starts_with("snifctl: default: eth0: it is gone; it is watched again once it is back"),
        "{said:#?}"
    );
    assert!(!said.stderr.contains("in order again"), "{said:#?}");
    lab.said(&["down"]).quietly_ok();
    lab.assert_no_pins();
    assert_eq!(lab.interfaces(), ["lo", "out0"]);
}

#[test]
fn an_out_interface_that_is_deleted_is_shown_and_down_still_works() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    lab.host(&["ip", "link", "del", "dev", "out0"]);
    let session = lab.session();
    assert_eq!(session.remotes[0].interface, None, "{session:#}");
    let shown = lab.said(&["status"]).quietly_ok().stdout;
    assert!(shown.contains("  gone  "), "{shown}");
    lab.said(&["down"]).quietly_ok();
    lab.assert_no_pins();
    assert_eq!(lab.interfaces(), ["lo", "eth0"]);
    assert!(!lab.shown(&["tc", "qdisc"]).contains("clsact"));
}

#[test]
fn an_interface_that_is_made_again_is_watched_by_the_same_up() {
    let lab = Lab::roomy();
    let args = ["up", "new0", "eth0", "--tunnel", "gre", "--remote", "198.51.100.2"];
    let make = "link add dev new0 type veth peer name new1\nlink set dev new0 up\nlink set dev new1 up";
    lab.ip_batch(Ns::Host, make);
    lab.said(&args).quietly_ok();
    let send = || lab.send(Ns::Host, "new1", &frames::series(&Ends::PEER_TO_HOST, 7));
    let seen = || lab.session().tally("new0", "ingress").seen;
    send();
    let (mut last, mut before) = (seen(), String::new());
    assert!(last >= 7, "{last}");
    for again in [&args[..], &["sync"]] {
        lab.host(&["ip", "link", "del", "dev", "new0"]);
        assert!(seen() >= last, "the counters of what is gone are shown");
        lab.ip_batch(Ns::Host, make);
        before = lab.shown(&["tc", "qdisc", "show", "dev", "new0"]);
        let said = lab.said(again).ok();
        let told = said.stdout + &said.stderr;
        assert!(told.contains("default: new0: it was made again; watched\n"), "{again:?}: {told}");
        lab.assert_up(&["default"]);
        let kept = seen();
        send();
        assert!(kept >= last && seen() >= kept + 7, "{again:?}: {last}, then {kept} and {}", seen());
        last = seen();
    }
    assert_eq!(lab.said(&["sync"]).quietly_ok().stdout, "");
    lab.said(&["down"]).quietly_ok();
    lab.assert_no_pins();
    assert_eq!(lab.shown(&["tc", "qdisc", "show", "dev", "new0"]), before);
}

// ---- at the same time ----

fn start(lab: &Lab, args: &[&str]) -> Child {
    lab.start_by::<&str, &str>(&[], args)
}

#[test]
fn the_same_up_twice_at_once_makes_one_session() {
    let lab = Lab::roomy();
    let before = lab.machine();
    for _ in 0..3 {
        let ups = [start(&lab, &UP), start(&lab, &UP), start(&lab, &UP)];
        let said = ups.map(|up| Said::of(up).ok());
        let told = said
            .iter()
            .filter(|said| said.stderr.ends_with("session default is already up with this request\n"))
            .count();
        assert_eq!(told, 2, "{said:#?}");
        lab.assert_up(&["default"]);
        lab.assert_copied(1);
        lab.said(&["down"]).quietly_ok();
        lab.assert_as_before(&before);
    }
}

/// Panics unless it ended well, and said no more than that it waited for another.
#[track_caller]
fn patiently_ok(child: Child) {
    let said = Said::of(child).ok();
    assert!(said.stderr.lines().all(|line| line.contains("waiting for another snifctl")), "{said:#?}");
}

#[test]
fn several_sessions_can_start_and_end_at_once() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let names = ["a", "b", "c", "d"];
    for child in names.map(|name| start(&lab, &up_with(&["--name", name]))) {
        patiently_ok(child);
    }
    lab.assert_up(&names);
    lab.assert_copied(4);
    for child in names.map(|name| start(&lab, &["down", "--name", name])) {
        patiently_ok(child);
    }
    lab.assert_as_before(&before);
}

#[test]
fn up_and_down_and_status_at_once_do_not_disturb_each_other() {
    let lab = Lab::roomy();
    let before = lab.machine();
    for _ in 0..7 {
        let all = [&UP[..], &["down"], &["status", "--json"], &["down"]].map(|args| start(&lab, args));
        let said = all.map(Said::of);
        assert!(said.iter().all(|said| said.status.success()), "{said:#?}");
    }
    lab.said(&["down"]).ok();
    lab.assert_as_before(&before);
}

// ---- bpffs, cache ----

#[test]
fn bpffs_is_mounted_where_it_is_not() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let fed = lab.dir().join("go");
    let script = format!(
        "while mountpoint -q /sys/fs/bpf; do umount /sys/fs/bpf; done
        $1 status; $1 doctor
        $1 {up}; $1 {up}; mountpoint -q /sys/fs/bpf; $1 status --json >{fed}
        $1 map dump taps; $1 down; ! ls -d /sys/fs/bpf/snifctl; $1 down",
        up = UP.join(" "),
        fed = fed.display()
    );
    lab.host(&["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-exc", &script, "sh", SNIFCTL]);
    let status: Value = serde_json::from_str(&fs::read_to_string(fed).unwrap()).unwrap();
    assert_eq!(status["sessions"][0]["taps"][0]["attached"], true, "{status:#}");
    lab.assert_as_before(&before);
}

#[test]
fn down_cleans_up_although_bpffs_was_unmounted_meanwhile() {
    let lab = Lab::roomy();
    lab.host(&["tc", "qdisc", "add", "dev", "eth0", "clsact"]);
    let before = lab.machine();
    let script = format!("umount /sys/fs/bpf; $1 {}; umount /sys/fs/bpf; $1 down", UP.join(" "));
    lab.host(&["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-exc", &script, "sh", SNIFCTL]);
    lab.assert_as_before(&before);
}

/// Owner and mode of the cache and what is in it, after an `up` that found `given` there.
fn cache_after_up(lab: &Lab, given: &str) -> Vec<String> {
    let shown = lab.dir().join("cache");
    let script = format!(
        "{EMPTY_CACHE}; {given}; \"$@\"; stat -c '%u %g %a %F' /var/cache/snifctl /var/cache/snifctl/* >{}",
        shown.display()
    );
    let words = ["unshare", "--mount", "sh", "-euc", &script, "sh", SNIFCTL];
    lab.host(&[&words[..], &UP].concat());
    lab.said(&["down"]).quietly_ok();
    let text = fs::read_to_string(shown).unwrap();
    text.lines().map(String::from).collect()
}

#[test]
fn the_compiled_object_is_roots_and_nobody_else_can_write_it() {
    let lab = Lab::roomy();
    let expected = ["0 0 755 directory", "0 0 644 regular file"];
    assert_eq!(cache_after_up(&lab, "umask 0022"), expected);
    assert_eq!(cache_after_up(&lab, "umask 0000"), expected);
}

#[test]
fn a_cache_that_others_can_write_is_not_used_as_it_is() {
    let lab = Lab::roomy();
    let mended = cache_after_up(&lab, "mkdir -m 0777 /var/cache/snifctl");
    assert_eq!(mended, ["0 0 755 directory", "0 0 644 regular file"]);
}

#[test]
fn an_object_that_another_has_planted_is_replaced() {
    let lab = Lab::roomy();
    // The names of the objects, by which a stranger would plant his own.
    lab.said(&UP).quietly_ok();
    lab.said(&["down"]).quietly_ok();
    let objects = fs::read_dir("/var/cache/snifctl").unwrap();
    let names = objects.map(|object| object.unwrap().path().to_string_lossy().into_owned());
    let names = names.collect::<Vec<_>>().join(" ");
    let plant = &format!("mkdir /var/cache/snifctl; touch {names}; chown 65534 {names}");
    let after = cache_after_up(&lab, plant);
    assert!(after.contains(&"0 0 644 regular file".to_string()), "{after:?}");
}

// ---- maps ----

const MAPS: [&str; 16] = [
    "bucket",
    "config",
    "drops",
    "forms",
    "outs",
    "remote_state",
    "remote_stats",
    "remotes",
    "request",
    "sizes",
    "slots",
    "spread",
    "taps",
    "times",
    "tunnels",
    "underlay",
];

#[test]
fn map_list_names_every_map_and_where_it_is_pinned() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    let text = lab.said(&["map", "list"]).quietly_ok().stdout;
    let listed: Vec<&str> = text.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(listed, [&["MAP"][..], &MAPS].concat());
    let maps = lab.said(&["map", "list", "--json"]).quietly_ok().json();
    for (map, name) in maps.as_array().unwrap().iter().zip(MAPS) {
        assert_eq!(map["name"], name);
        assert!(Path::new(map["pinned"].as_str().unwrap()).exists(), "{map}");
        for key in ["id", "bytes_key", "bytes_value", "max_entries"] {
            assert!(map[key].as_u64().is_some_and(|n| n > 0), "{key} of {map}");
        }
    }
    assert_eq!(maps.as_array().unwrap().len(), MAPS.len());
}

#[test]
fn map_dump_shows_every_map_by_field_names() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, 7));
    let all = lab.said(&["map", "dump"]).quietly_ok().json();
    let names: Vec<&String> = all.as_object().unwrap().keys().collect();
    assert_eq!(names, MAPS);
    for name in MAPS {
        let one = lab.said(&["map", "dump", name]).quietly_ok().json();
        assert_eq!(one, all[name], "{name}");
    }
    let taps = all["taps"].as_array().unwrap();
    let ingress = taps.iter().find(|tap| tap["key"]["direction"] == "INGRESS").unwrap();
    assert_eq!(ingress["value"]["stat"]["pcnt"], 7, "{taps:#?}");
    assert_eq!(all["remote_stats"][0]["value"]["pcnt"], 7, "{all:#}");
    assert_eq!(all["request"]["request"]["remotes"], json!(["198.51.100.2"]), "{all:#}");
    assert_eq!(all["request"]["version"], 1, "{all:#}");
}

#[test]
fn map_dump_of_an_unknown_map_lists_those_that_there_are() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    lab.said(&["map", "dump", "nosuch"]).refused(2, "MAP \"nosuch\"", &MAPS.join(", "));
    lab.said(&["map", "dump", "../taps"]).refused(2, "MAP \"../taps\"", &MAPS.join(", "));
}

#[test]
fn map_commands_without_a_name_take_the_only_session() {
    let lab = Lab::roomy();
    lab.said(&up_with(&["--name", "mirror-1"])).quietly_ok();
    let named = lab.said(&["map", "dump", "config", "--name", "mirror-1"]).quietly_ok().json();
    assert_eq!(lab.said(&["map", "dump", "config"]).quietly_ok().json(), named);
}

// ---- names, help, output ----

#[test]
fn an_interface_can_be_watched_by_its_other_name() {
    let lab = Lab::roomy();
    lab.host(&["ip", "link", "property", "add", "dev", "eth0", "altname", "uplink"]);
    let args = ["up", "uplink", "--tunnel", "gre", "--remote", "198.51.100.2"];
    lab.said(&args).quietly_ok();
    lab.assert_copied(1);
    lab.said(&args).ok_noting("already up");
    lab.said(&["down"]).quietly_ok();
}

#[test]
fn every_command_has_help_with_examples() {
    let commands = [
        "",
        "up",
        "down",
        "sync",
        "status",
        "filter",
        "filter set",
        "filter clear",
        "filter show",
        "filter test",
        "tap",
        "tap list",
        "tap add",
        "tap remove",
        "remote",
        "remote list",
        "remote add",
        "remote remove",
        "map",
        "map list",
        "map dump",
        "doctor",
        "demo",
        "source",
    ];
    let lacking: Vec<&str> = commands.into_iter().filter(|command| !helps(command)).collect();
    assert_eq!(lacking, Vec::<&str>::new(), "no examples in the help of these");
}

/// The help is on stdout, and has examples that name the command itself.
fn helps(command: &str) -> bool {
    let help = Command::new(SNIFCTL).args(command.split_whitespace()).arg("--help").output().unwrap();
    assert!(help.status.success() && help.stderr.is_empty());
    let text = String::from_utf8(help.stdout).unwrap();
    let example = format!("snifctl {command}");
    let examples = text.split_once("Examples:").map(|(_, examples)| examples.to_owned());
    examples.is_some_and(|examples| examples.contains(example.trim()))
}

#[test]
fn the_version_is_that_of_the_package() {
    let version = Command::new(SNIFCTL).arg("--version").output().unwrap();
    let expected = format!("snifctl {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(String::from_utf8(version.stdout).unwrap(), expected);
}

#[test]
fn output_into_a_closed_pipe_is_no_panic() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    let script = format!("set -e; {{ {SNIFCTL} map dump; echo $? >&2; }} | true");
    let output = lab.host(&["sh", "-c", &script]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(!stderr.contains("panicked"), "{stderr}");
}
