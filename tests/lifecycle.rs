//! A session from `up` to `down`: what it shows, whom it lives with, and that it survives being killed, raced and failed.

mod lab;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use lab::capture::Direction;
use lab::faults::{EMPTY_CACHE, Fakes, Fault, in_mounts, real};
use lab::frames::{self, Ends};
use lab::judge::{Said, UP};
use lab::{Lab, Ns};
use serde_json::{Value, json};

const SNIFCTL: &str = env!("CARGO_BIN_EXE_snifctl");

/// `up` with more or other arguments.
fn up_with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&UP[..], more].concat()
}

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
    let line = "default: eth0 ingress, eth0 egress -> gre -> 198.51.100.2 through out0 (MTU 1600)\n";
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
    let status = lab.status();
    let stat = json!({"pcnt": "count", "bcnt": "count", "dcnt": "count"});
    let mut shown = shape(&status);
    let drops = shown["sessions"][0]["drops"].take();
    let expected = json!({"sessions": [{
        "name": "text", "tunnel": "text", "oversize": "text", "spread": "text",
        "filter": "text", "sample": "count", "sample_flows": "count", "snaplen": "count", "max_rate": "text",
        "taps": [{
            "interface": "text", "direction": "text", "attached": "bool", "stat": stat,
            "seen": "count", "filtered": "count", "skipped": "count", "own": "count",
        }],
        "remotes": [{"address": "text", "source": "text", "interface": "text", "mac": "text", "mtu": "count", "stat": stat}],
        "removed": stat,
        "removed_taps": {"stat": stat, "seen": "count", "filtered": "count", "skipped": "count", "own": "count"},
        "drops": null, "out_dropped": "count", "faults": [],
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
        "interface": "eth0", "direction": "ingress", "attached": true, "stat": stat,
        "seen": 7, "filtered": 0, "skipped": 0, "own": 0,
    });
    let choices = ["filter", "sample", "sample_flows", "snaplen", "max_rate"].map(|key| session[key].clone());
    assert_eq!(json!(choices), json!(["udp", 1, 1, 9000, "1gbit"]));
    let remote = json!({
        "address": "198.51.100.2", "source": "198.51.100.1", "interface": "out0", "mac": "02:00:00:00:02:02",
        "mtu": 1600, "stat": stat,
    });
    let head = [&session["name"], &session["tunnel"], &session["oversize"]];
    assert_eq!(head, ["mirror-1", "gre", "drop"]);
    assert_eq!((&session["taps"], &session["remotes"]), (&json!([tap]), &json!([remote])));
    for reason in ["unresolved", "oversize", "out", "relay", "gone", "depth"] {
        assert_eq!(session["drops"][reason], 0, "{reason}");
    }
}

#[test]
fn status_without_a_session_is_an_empty_list() {
    let lab = Lab::roomy();
    assert_eq!(lab.status(), json!({"sessions": []}));
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
        ["default: gre, oversize segment", "eth0", "ingress", "yes", "1,009", "KiB", "198.51.100.2", "drops: none"]
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
    let status = lab.status();
    let attached: Vec<&Value> = (0..2).map(|at| &status["sessions"][0]["taps"][at]["attached"]).collect();
    assert_eq!(attached, [&json!(false), &json!(true)]);
    assert!(lab.said(&["status"]).quietly_ok().stdout.contains(" NO "));
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
    lab.said(&UP).ok_noting("its remotes were resolved anew");
    assert_eq!(lab.status()["sessions"][0]["remotes"][0]["mac"], "02:00:00:00:02:07");
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

// ---- others at the same hooks ----

/// A program that is not ours: drops frames of 1009 bytes, and passes all others at once.
const FOREIGN: &str = r#"
    struct __sk_buff { unsigned int len; };
    __attribute__((section("tc"), used)) int foreign(struct __sk_buff *skb) { return skb->len == 1009 ? 2 : 0; }
    __attribute__((section("license"), used)) char _license[] = "GPL";
"#;

/// The foreign program, pinned in a directory of bpffs of its own; gone on drop.
struct Foreign(PathBuf);

impl Foreign {
    fn new(lab: &Lab) -> Foreign {
        let (source, object) = (lab.dir().join("foreign.c"), lab.dir().join("foreign.o"));
        fs::write(&source, FOREIGN).unwrap();
        let foreign = Foreign(Path::new("/sys/fs/bpf").join(lab.ns_name(Ns::Host)));
        let clang =
            ["clang", "-O2", "-target", "bpf", "-c", &source.to_string_lossy(), "-o", &object.to_string_lossy()];
        lab.host(&clang);
        lab.host(&["mkdir", &foreign.0.to_string_lossy()]);
        lab.host(&["bpftool", "prog", "load", &object.to_string_lossy(), &foreign.pin(), "type", "classifier"]);
        foreign
    }

    fn pin(&self) -> String {
        self.0.join("program").to_string_lossy().into_owned()
    }

    fn attach(&self, lab: &Lab, hook: &str, pref: &str) {
        let filter = ["tc", "filter", "add", "dev", "eth0", hook, "pref", pref, "handle", "0x7", "bpf", "da"];
        lab.host(&[&filter[..], &["object-pinned", &self.pin()]].concat());
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Pings both ways with frames of a length that the foreign program drops, and of one that it passes; panics unless it
/// does, and the collector gets `copies` of the six frames that pass our taps if we have any.
#[track_caller]
fn assert_foreign_works(lab: &Lab, copies: usize) {
    let mut collector = lab.capture(Ns::Collector, "col0", Direction::In);
    for (ns, to) in [(Ns::Host, "192.0.2.2"), (Ns::Peer, "192.0.2.1")] {
        let answers = |frame: usize| {
            let size = (frame - 42).to_string();
            let patience = if frame == 1009 { "0.2" } else { "5" };
            lab.try_run(ns, &["ping", "-c", "1", "-W", patience, "-s", &size, to]).status.success()
        };
        assert_eq!((answers(1009), answers(500)), (false, true), "frames that {ns:?} sent");
    }
    collector.take(copies);
}

#[test]
fn foreign_filters_and_their_qdisc_work_before_during_and_after() {
    let lab = Lab::roomy();
    let foreign = Foreign::new(&lab);
    lab.host(&["tc", "qdisc", "add", "dev", "eth0", "clsact"]);
    for hook in ["ingress", "egress"] {
        for pref in ["1", "49152"] {
            foreign.attach(&lab, hook, pref);
        }
    }
    let before = lab.machine();
    assert_foreign_works(&lab, 0);
    lab.said(&UP).quietly_ok();
    assert_foreign_works(&lab, 6);
    lab.assert_copied(1);
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
    assert_foreign_works(&lab, 0);
}

#[test]
fn a_foreign_filter_that_comes_later_keeps_our_qdisc() {
    let lab = Lab::roomy();
    let (foreign, before) = (Foreign::new(&lab), lab.machine());
    lab.said(&UP).quietly_ok();
    foreign.attach(&lab, "egress", "3");
    lab.said(&["down"]).quietly_ok();
    assert_foreign_works(&lab, 0);
    let qdiscs = lab.shown(&["tc", "qdisc", "show", "dev", "eth0"]);
    assert!(qdiscs.contains("clsact"), "{qdiscs}");
    // What marks the qdisc as ours stays too, so that the next `down` without a foreign filter removes both.
    lab.host(&["tc", "filter", "del", "dev", "eth0", "egress"]);
    lab.said(&["down"]).ok();
    lab.assert_as_before(&before);
}

#[test]
fn a_qdisc_without_filters_that_was_there_before_stays() {
    let lab = Lab::roomy();
    lab.host(&["tc", "qdisc", "add", "dev", "eth0", "clsact"]);
    let before = lab.machine();
    lab.said(&UP).quietly_ok();
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

#[test]
fn doctor_lists_foreign_filters_and_which_of_them_hide_packets() {
    let lab = Lab::roomy();
    let foreign = Foreign::new(&lab);
    lab.said(&UP).quietly_ok();
    // Of two bpf filters with one preference the one that came last runs first.
    foreign.attach(&lab, "ingress", "1");
    foreign.attach(&lab, "egress", "9");
    lab.assert_copied(0);
    let report = lab.said(&["doctor", "eth0", "--json"]).quietly_ok().json();
    let checks = report["checks"].as_array().unwrap();
    let level = |hook: &str| {
        let what = format!("\"foreign\" at {hook}");
        checks.iter().find(|check| check["detail"].as_str().unwrap().contains(&what)).map(|check| &check["level"])
    };
    assert_eq!((level("egress"), level("ingress")), (Some(&json!("ok")), Some(&json!("warn"))), "{report:#}");
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
    let taps = lab.status()["sessions"][0]["taps"].clone();
    for tap in taps.as_array().unwrap() {
        assert_eq!(tap["attached"], false, "{taps:#}");
        assert!(tap["interface"].as_str().unwrap().contains("gone"), "{taps:#}");
    }
    lab.said(&["status"]).quietly_ok();
    lab.said(&UP).refused(1, "IFACE eth0", ": ip link");
    lab.said(&["down"]).quietly_ok();
    lab.assert_no_pins();
    assert_eq!(lab.interfaces(), ["lo", "out0"]);
}

#[test]
fn an_out_interface_that_is_deleted_is_shown_and_down_still_works() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    lab.host(&["ip", "link", "del", "dev", "out0"]);
    let remotes = lab.status()["sessions"][0]["remotes"].clone();
    assert!(remotes[0]["interface"].as_str().unwrap().contains("gone"), "{remotes:#}");
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
    lab.host(&["ip", "link", "del", "dev", "new0"]);
    lab.ip_batch(Ns::Host, make);
    let before = lab.shown(&["tc", "qdisc", "show", "dev", "new0"]);
    lab.said(&args).ok_noting("making it anew");
    lab.assert_up(&["default"]);
    lab.said(&["down"]).quietly_ok();
    lab.assert_no_pins();
    assert_eq!(lab.shown(&["tc", "qdisc", "show", "dev", "new0"]), before);
}

// ---- killed and failed at every step ----

/// A lab whose tools can be made to fail, and what it was like before.
struct Bench {
    lab: Lab,
    fakes: Fakes,
    before: String,
}

impl Bench {
    fn new() -> Bench {
        let lab = Lab::roomy();
        // The object is compiled now, so that every later `up` makes the same calls.
        lab.said(&UP).quietly_ok();
        lab.said(&["down"]).quietly_ok();
        let (fakes, before) = (lab.counting_fakes(), lab.machine());
        Bench { lab, fakes, before }
    }

    /// Runs snifctl while the fault is armed; `None` if it has ended before the call that would go wrong.
    fn run(&self, args: &[&str], at: usize, fault: Fault) -> Option<Said> {
        self.fakes.arm(at, fault);
        let said = self.lab.said_by(&self.fakes.first_in_path(), args);
        (self.fakes.calls().len() >= at).then_some(said)
    }

    /// Numbers of the calls that change the machine.
    fn writes(&self, args: &[&str]) -> Vec<usize> {
        self.run(args, usize::MAX, Fault::Fail { done: None });
        let writing = |call: &str| {
            ["bpftool batch", "bpftool prog load", "ip -batch", "ip link del", "ethtool -K", "tc -batch"]
                .iter()
                .any(|verb| call.starts_with(verb))
        };
        let calls = self.fakes.calls();
        let numbered = calls.iter().zip(1..).filter(|(call, _)| writing(call));
        numbered.map(|(_, at)| at).collect()
    }

    /// `down` after a kill leaves nothing, and so do `up` and `down` after the same kill. False if nothing was killed.
    #[track_caller]
    fn assert_heals(&self, kill: impl Fn() -> Option<Said>) -> bool {
        for heal in [false, true] {
            let Some(killed) = kill() else { return false };
            assert_eq!(killed.status.signal(), Some(9), "{killed:#?}");
            if heal {
                self.lab.said(&UP).ok();
                self.lab.assert_up(&["default"]);
            }
            self.lab.said(&["down"]).ok();
            self.lab.assert_as_before(&self.before);
        }
        true
    }
}

#[test]
fn up_killed_before_any_of_its_calls_is_healed_by_up_and_by_down() {
    let bench = Bench::new();
    let first = bench.writes(&UP)[0];
    bench.lab.said(&["down"]).quietly_ok();
    let kill = |at| bench.run(&UP, at, Fault::Kill { done: None });
    let kills = (first..).take_while(|at| bench.assert_heals(|| kill(*at))).count();
    assert!(kills > 6, "killed {kills} times");
}

/// Kills `up` after its writing call with this number has done one line, and after each `step` lines more.
fn assert_heals_within(write: usize, step: usize) {
    let bench = Bench::new();
    let at = bench.writes(&UP)[write];
    bench.lab.said(&["down"]).quietly_ok();
    for done in (1..).step_by(step) {
        assert!(bench.assert_heals(|| bench.run(&UP, at, Fault::Kill { done: Some(done) })));
        if done >= bench.fakes.input_lines() {
            break;
        }
    }
}

#[test]
fn up_killed_when_its_programs_are_loaded_is_healed() {
    assert_heals_within(0, 1);
}

#[test]
fn up_killed_within_its_map_writes_is_healed() {
    assert_heals_within(1, 4);
}

#[test]
fn up_killed_within_making_its_relay_is_healed() {
    assert_heals_within(2, 1);
}

#[test]
fn up_killed_after_its_relay_was_told_to_make_wire_frames_is_healed() {
    assert_heals_within(3, 1);
}

#[test]
fn up_killed_within_attaching_to_its_relay_is_healed() {
    assert_heals_within(4, 1);
}

#[test]
fn up_killed_within_starting_its_relay_is_healed() {
    assert_heals_within(5, 1);
}

#[test]
fn up_killed_within_attaching_its_taps_is_healed() {
    assert_heals_within(6, 1);
}

#[test]
fn down_killed_before_any_of_its_calls_is_healed_by_up_and_by_down() {
    let bench = Bench::new();
    let kill = |at| {
        bench.lab.said(&UP).ok();
        bench.run(&["down"], at, Fault::Kill { done: None })
    };
    let kills = (1..).take_while(|at| bench.assert_heals(|| kill(*at))).count();
    assert!(kills > 5, "killed {kills} times");
}

#[test]
fn down_killed_within_any_of_its_writes_is_healed_by_up_and_by_down() {
    let bench = Bench::new();
    bench.lab.said(&UP).quietly_ok();
    for at in bench.writes(&["down"]) {
        for done in 1..=2 {
            let killed = bench.assert_heals(|| {
                bench.lab.said(&UP).ok();
                bench.run(&["down"], at, Fault::Kill { done: Some(done) })
            });
            assert!(killed);
        }
    }
}

/// One call of `up` has gone wrong: it refuses in one line and leaves nothing, or it does without what that call would have
/// told it. What it does wrong, if anything.
fn wrong_about(bench: &Bench, said: Said, call: &str) -> Option<String> {
    let (changed, stderr) = (bench.lab.machine() != bench.before || bench.lab.pins().exists(), said.stderr.clone());
    let all_up = said.status.success() && changed;
    if changed {
        bench.lab.said(&["down"]).ok();
        bench.lab.assert_as_before(&bench.before);
    }
    if all_up {
        return None;
    }
    said.refused(1, "", "");
    changed.then(|| format!("`{call}` failed, so did `up` ({stderr}), and left the machine changed"))
}

#[test]
fn up_is_unwound_whichever_of_its_calls_fails() {
    let bench = Bench::new();
    let (mut at, mut wrong) = (1, Vec::new());
    while let Some(said) = bench.run(&UP, at, Fault::Fail { done: None }) {
        let call = format!("{at}: {}", bench.fakes.calls()[at - 1]);
        wrong.extend(wrong_about(&bench, said, &call));
        at += 1;
    }
    assert!(at > 15, "failed {at} times");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn up_is_unwound_when_a_write_fails_half_way() {
    let bench = Bench::new();
    let writes = bench.writes(&UP);
    bench.lab.said(&["down"]).quietly_ok();
    assert_eq!(writes.len(), 7);
    for at in writes {
        for done in 1..=2 {
            let said = bench.run(&UP, at, Fault::Fail { done: Some(done) }).expect("a failure");
            let call = bench.fakes.calls()[at - 1].clone();
            if call.starts_with("ethtool") {
                // It has done its work, whatever it says: what counts is what the bridge has then.
                said.ok();
                bench.lab.said(&["down"]).quietly_ok();
                continue;
            }
            assert!(!said.status.success(), "{call}: {said:#?}");
            assert_eq!(wrong_about(&bench, said, &call), None);
        }
    }
}

#[test]
fn down_that_failed_can_be_run_again() {
    let bench = Bench::new();
    let mut at = 1;
    loop {
        bench.lab.said(&UP).ok();
        let Some(said) = bench.run(&["down"], at, Fault::Fail { done: None }) else {
            break;
        };
        assert_eq!((said.status.code(), said.stderr.lines().count()), (Some(1), 1), "{said:#?}");
        bench.lab.said(&["down"]).ok();
        bench.lab.assert_as_before(&bench.before);
        at += 1;
    }
    assert!(at > 5, "failed {at} times");
}

#[test]
fn a_failure_of_one_session_leaves_the_others_alone() {
    let bench = Bench::new();
    bench.lab.said(&up_with(&["--name", "other"])).quietly_ok();
    let one = bench.lab.machine();
    for at in bench.writes(&UP) {
        bench.lab.said(&["down"]).ok();
        let said = bench.run(&UP, at, Fault::Fail { done: Some(1) }).expect("a failure");
        if said.status.success() {
            // ethtool, which has done its work, whatever it says.
            bench.lab.said(&["down"]).quietly_ok();
        }
        assert!(bench.lab.machine() == one, "{:?}", bench.fakes.calls().get(at - 1));
    }
    bench.lab.assert_up(&["other"]);
    bench.lab.assert_copied(1);
}

#[test]
fn a_compilation_that_was_killed_does_not_stop_the_next_up() {
    let lab = Lab::roomy();
    let (fakes, runs) = (lab.fakes(), lab.dir().join("runs"));
    let script = format!(
        r#"#!/bin/sh
case "$*" in *-target*)
    echo run >>{0}
    [ "$(wc -l <{0})" != 1 ] || kill -9 "$PPID";;
esac
exec {1} "$@"
"#,
        runs.display(),
        real("clang").display()
    );
    fakes.add("clang", &script);
    let twice = in_mounts(&format!("{EMPTY_CACHE}; \"$@\" && exit 9"));
    let tmp = format!("TMPDIR={}", lab.dir().display());
    let by = [&twice[..], &fakes.first_in_path(), &[tmp]].concat();
    assert_eq!(lab.said_by(&by, &UP).status.code(), Some(0));
    assert_eq!(fs::read_to_string(&runs).expect("the runs of clang").lines().count(), 2);
    lab.assert_up(&["default"]);
}

// ---- at the same time ----

fn start(lab: &Lab, args: &[&str]) -> Child {
    let mut command = lab.command(Ns::Host, &[SNIFCTL]);
    command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("start snifctl")
}

fn finish(child: Child) -> Said {
    child.wait_with_output().expect("wait for snifctl").into()
}

#[test]
fn the_same_up_twice_at_once_makes_one_session() {
    let lab = Lab::roomy();
    let before = lab.machine();
    for _ in 0..3 {
        let ups = [start(&lab, &UP), start(&lab, &UP), start(&lab, &UP)];
        let said = ups.map(|up| finish(up).ok());
        let told = said.iter().filter(|said| said.stderr.contains("already up")).count();
        assert_eq!(told, 2, "{said:#?}");
        lab.assert_up(&["default"]);
        lab.assert_copied(1);
        lab.said(&["down"]).quietly_ok();
        lab.assert_as_before(&before);
    }
}

#[test]
fn several_sessions_can_start_and_end_at_once() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let names = ["a", "b", "c", "d"];
    for child in names.map(|name| start(&lab, &up_with(&["--name", name]))) {
        finish(child).quietly_ok();
    }
    lab.assert_up(&names);
    lab.assert_copied(4);
    for child in names.map(|name| start(&lab, &["down", "--name", name])) {
        finish(child).quietly_ok();
    }
    lab.assert_as_before(&before);
}

#[test]
fn up_and_down_and_status_at_once_do_not_disturb_each_other() {
    let lab = Lab::roomy();
    let before = lab.machine();
    for _ in 0..7 {
        let all = [&UP[..], &["down"], &["status", "--json"], &["down"]].map(|args| start(&lab, args));
        let said = all.map(finish);
        assert!(said.iter().all(|said| said.status.success()), "{said:#?}");
    }
    lab.said(&["down"]).ok();
    lab.assert_as_before(&before);
}

// ---- bpffs, dry run, cache ----

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
    lab.host(&["unshare", "--mount", "sh", "-exc", &script, "sh", SNIFCTL]);
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
    lab.host(&["unshare", "--mount", "sh", "-exc", &script, "sh", SNIFCTL]);
    lab.assert_as_before(&before);
}

/// Runs the lines of a dry run as a person would paste them, and sees the session at work.
fn assert_pasteable(lab: &Lab, mounts: &str, more: &[&str]) {
    let before = lab.machine();
    let (plan, bin) = (lab.dir().join("plan"), Path::new(SNIFCTL).parent().unwrap());
    let script = format!(
        "{mounts}; export TMPDIR={tmp} PATH={bin}:$PATH
        snifctl \"$@\" --dry-run >{plan}
        sh -e {plan}",
        tmp = lab.dir().display(),
        bin = bin.display(),
        plan = plan.display()
    );
    let words = ["unshare", "--mount", "sh", "-euc", &script, "sh"];
    lab.host(&[&words[..], &UP, more].concat());
    let text = fs::read_to_string(&plan).unwrap();
    assert!(text.lines().any(|line| line.starts_with("# 02 00 00 00 02 02 02 00 00 00 02 01 08 00 45")), "{text}");
    lab.assert_up(&["default"]);
    lab.assert_copied(1);
    lab.said(&up_with(more)).ok_noting("already up");
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

#[test]
fn the_lines_of_a_dry_run_can_be_pasted() {
    assert_pasteable(&Lab::roomy(), "true", &[]);
}

#[test]
fn the_lines_of_a_dry_run_without_a_compiled_object_can_be_pasted() {
    assert_pasteable(&Lab::roomy(), EMPTY_CACHE, &["--oversize", "fragment", "--ttl", "7"]);
}

#[test]
fn a_dry_run_changes_nothing() {
    let lab = Lab::roomy();
    lab.host(&["ip", "neigh", "del", "198.51.100.2", "dev", "out0"]);
    let before = lab.machine();
    let neighbours = lab.shown(&["ip", "neigh"]);
    let (made, tmp) = (lab.dir().join("made"), lab.dir().join("tmp"));
    fs::create_dir(&tmp).unwrap();
    let (shown, tmp) = (made.display(), tmp.display());
    let script = format!("{EMPTY_CACHE}; export TMPDIR={tmp}; \"$@\"; ls -A /var/cache $TMPDIR >{shown}; exit 0");
    let said = lab.said_by(&in_mounts(&script), &up_with(&["--dry-run"]));
    assert_eq!(fs::read_to_string(&made).unwrap(), format!("{tmp}:\n\n/var/cache:\n"));
    let said = said.ok_noting("198.51.100.2 is not known on out0 yet");
    assert!(said.stdout.starts_with("ip neigh replace 198.51.100.2 dev out0 use\n"), "{said:#?}");
    assert_eq!(lab.shown(&["ip", "neigh"]), neighbours);
    lab.assert_as_before(&before);
}

#[test]
fn a_dry_run_beside_a_session_says_that_it_is_up() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    let up = lab.machine();
    lab.said(&up_with(&["--dry-run"])).ok_noting("already up");
    lab.said(&up_with(&["--dry-run", "--ttl", "7"])).refused(1, "--name default", "snifctl down --name default");
    assert_eq!(lab.machine(), up);
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

const MAPS: [&str; 13] = [
    "bucket",
    "carriers",
    "config",
    "drops",
    "outs",
    "remote_state",
    "remote_stats",
    "remotes",
    "request",
    "slots",
    "spread",
    "taps",
    "tunnels",
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
}

#[test]
fn map_dump_of_an_unknown_map_lists_those_that_there_are() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    lab.said(&["map", "dump", "nosuch"]).refused(1, "MAP \"nosuch\"", &MAPS.join(", "));
    lab.said(&["map", "dump", "../taps"]).refused(1, "MAP \"../taps\"", &MAPS.join(", "));
}

#[test]
fn map_commands_without_a_name_take_the_only_session() {
    let lab = Lab::roomy();
    lab.said(&up_with(&["--name", "mirror-1"])).quietly_ok();
    let named = lab.said(&["map", "dump", "config", "--name", "mirror-1"]).quietly_ok().json();
    assert_eq!(lab.said(&["map", "dump", "config"]).quietly_ok().json(), named);
}

// ---- doctor, help ----

#[test]
fn doctor_finds_the_lab_in_order() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let said = lab.said(&["doctor", "eth0", "--remote", "198.51.100.2"]).quietly_ok();
    for word in
        ["clang", "bpftool", "tc", "ip", "ethtool", "kernel", "btf", "bpffs", "privileges", "eth0", "route", "mtu"]
    {
        let found = said.stdout.lines().any(|line| line.split_whitespace().nth(1) == Some(word));
        assert!(found, "{word} in\n{}", said.stdout);
    }
    let report = lab.said(&["doctor", "eth0", "--remote", "198.51.100.2", "--json"]).quietly_ok().json();
    for check in report["checks"].as_array().unwrap() {
        let level = check["level"].as_str().unwrap();
        assert!(["ok", "warn"].contains(&level) && check["name"].is_string(), "{check}");
        assert_eq!((level == "ok", check["detail"].is_string()), (check["fix"].is_null(), true), "{check}");
    }
    lab.assert_as_before(&before);
}

/// Panics unless doctor ends with 1, and one failure that says this.
#[track_caller]
fn assert_doctor_fails(lab: &Lab, args: &[&str], says: &str) {
    let said = lab.said(&[&["doctor", "--json"], args].concat());
    assert_eq!((said.status.code(), said.stderr.as_str()), (Some(1), ""), "{said:#?}");
    let report = said.json();
    let checks = report["checks"].as_array().unwrap();
    let fails: Vec<&Value> = checks.iter().filter(|check| check["level"] == "fail").collect();
    assert_eq!(fails.len(), 1, "{fails:#?}");
    assert!(fails[0]["detail"].as_str().unwrap().contains(says), "{fails:#?}");
    assert!(fails[0]["fix"].is_string(), "{fails:#?}");
}

#[test]
fn doctor_fails_where_up_would() {
    let lab = Lab::roomy();
    lab.host(&["ip", "tuntap", "add", "dev", "tun0", "mode", "tun"]);
    lab.host(&["tc", "qdisc", "add", "dev", "eth0", "ingress"]);
    for (args, says) in [
        (&["nosuch0"][..], "does not exist"),
        (&["tun0"], "no Ethernet header"),
        (&["eth0"], "`ingress` qdisc"),
        (&["--remote", "198.51.100.1"], "this machine itself"),
        (&["--remote", "203.0.113.9"], "cannot be sent"),
        (&["--remote", "224.0.0.5"], "multicast"),
        (&["--remote", "192.0.2.255"], "broadcast"),
    ] {
        assert_doctor_fails(&lab, args, says);
    }
}

#[test]
fn doctor_refuses_what_is_no_address_and_no_interface_name() {
    let lab = Lab::roomy();
    lab.said(&["doctor", "--remote", "collector"]).refused(1, "--remote \"collector\"", "--remote 10.0.0.7");
    lab.said(&["doctor", "a b"]).refused(1, "IFACE \"a b\"", ": ip link");
}

#[test]
fn doctor_knows_an_interface_by_its_other_name() {
    let lab = Lab::roomy();
    lab.host(&["ip", "link", "property", "add", "dev", "eth0", "altname", "uplink"]);
    lab.said(&["doctor", "uplink"]).quietly_ok();
}

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
fn doctor_warns_of_what_up_would_warn_of() {
    let lab = Lab::new();
    lab.host(&["ip", "neigh", "del", "198.51.100.2", "dev", "out0"]);
    lab.host(&["ip", "link", "set", "dev", "eth0", "down"]);
    let said = lab.said(&["doctor", "eth0", "--remote", "198.51.100.2"]).quietly_ok();
    for word in ["eth0", "neighbour", "mtu"] {
        let warned = |line: &str| line.starts_with("warn") && line.split_whitespace().nth(1) == Some(word);
        assert!(said.stdout.lines().any(warned), "{word} in\n{}", said.stdout);
    }
}

#[test]
fn verbose_prints_each_outer_command_on_stderr() {
    let lab = Lab::roomy();
    for (args, part) in [
        (&up_with(&["-v"])[..], "+ bpftool prog loadall "),
        (&["-v", "status", "--json"], "| bpftool -j batch file -"),
        (&["doctor", "-v"], "+ clang --version"),
        (&["down", "-v"], "link delete dev snif0"),
    ] {
        let said = lab.said(args);
        assert!(said.status.success(), "{said:#?}");
        assert!(said.stderr.lines().any(|line| line.starts_with("+ ") && line.contains(part)), "{said:#?}");
        assert!(said.stderr.lines().all(|line| line.starts_with("+ ")), "{said:#?}");
    }
}

#[test]
fn every_command_has_help_with_examples() {
    let commands = ["", "up", "down", "status", "map", "map list", "map dump", "doctor", "demo"];
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
