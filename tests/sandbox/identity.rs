//! Whose is what: nothing is taken for ours by its name, its number or its handle alone, and what is ours is found.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::lab;
use crate::lab::bare::{Bare, UP as UP_BARE};
use crate::lab::judge::{UP, up_with};
use crate::lab::{Lab, PATIENCE, poll};
use serde_json::Value;

const SNIFCTL: &str = env!("CARGO_BIN_EXE_snifctl");

/// Names with the same handle.
const NAMESAKES: [&str; 2] = ["costarring", "liquid"];

// ---- names ----

#[test]
fn devices_that_are_only_called_as_ours_are_left_alone() {
    let lab = Lab::roomy();
    lab.host(&["ip", "link", "add", "snif7", "type", "veth", "peer", "name", "snif7p"]);
    lab.host(&["ip", "link", "add", "snif0", "type", "bridge"]);
    let before = lab.machine();
    lab.said(&UP).quietly_ok();
    let names = lab.interfaces();
    for name in ["snif0", "snif7", "snif7p", "snif1", "snif1l", "snif1p"] {
        assert!(names.iter().any(|known| known == name), "{name} in {names:?}");
    }
    lab.assert_copied(1);
    lab.host(&["ip", "link", "del", "snif1"]);
    lab.said(&["sync"]).ok();
    lab.assert_copied(1);
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
    lab.said(&["down", "--all"]).ok_noting("no session is up");
    lab.assert_as_before(&before);
}

// ---- handles ----

fn up_named(lab: &Lab, name: &str) {
    lab.said(&up_with(&["--name", name])).quietly_ok();
}

#[test]
fn two_sessions_with_one_handle_do_not_touch_each_other() {
    let lab = Lab::roomy();
    let before = lab.machine();
    for (first, second) in [(NAMESAKES[0], NAMESAKES[1]), (NAMESAKES[1], NAMESAKES[0])] {
        up_named(&lab, first);
        let alone = lab.machine();
        lab.assert_copied(1);
        up_named(&lab, second);
        lab.assert_copied(2);
        for words in [
            &["sync", "--all"][..],
            &["filter", "set", "--name", second, "udp"],
            &["sync", "--all"],
            &["filter", "clear", "--name", second],
        ] {
            assert_eq!(lab.said(words).ok().stdout, "", "{words:?}");
            for name in NAMESAKES {
                assert!(lab.session_called(name).taps.iter().all(|tap| tap.attached), "{words:?} {name}");
                assert_eq!(lab.session_called(name).faults, [""; 0], "{words:?} {name}");
            }
        }
        lab.said(&["tap", "remove", "eth0", "--direction", "egress", "--name", second]).ok();
        lab.said(&["tap", "add", "eth0", "--name", second]).ok();
        lab.assert_copied(2);
        lab.said(&["down", "--name", second]).quietly_ok();
        assert_eq!(lab.machine(), alone);
        lab.assert_copied(1);
        up_named(&lab, second);
        lab.said(&["down", "--name", first]).quietly_ok();
        lab.assert_copied(1);
        lab.said(&["down", "--all"]).quietly_ok();
        lab.assert_as_before(&before);
    }
}

#[test]
fn a_session_without_pins_leaves_those_with_its_handle_alone() {
    let lab = Lab::roomy();
    let before = lab.machine();
    for gone_first in [true, false] {
        let [lost, other] = NAMESAKES;
        NAMESAKES.iter().for_each(|name| up_named(&lab, name));
        fs::remove_dir_all(lab.pins().join(lost)).expect("its pins");
        let order = if gone_first { [lost, other] } else { [other, lost] };
        lab.said(&["down", "--name", order[0]]).quietly_ok();
        lab.assert_copied(1);
        lab.said(&["down", "--name", order[1]]).quietly_ok();
        lab.assert_as_before(&before);
    }
}

// ---- dead namespaces ----

/// A namespace that has what a dead one's session has pinned, as if it had got that one's inode, and that one's programs. The
/// kernel gives the lowest number that is free to whatever asks first: so the pins are given another number instead.
fn reborn_with_a_dead_session() -> (Bare, Vec<u64>) {
    let (first, second) = (Bare::new(), Bare::new());
    first.snifctl(UP_BARE);
    let ids = ids_in(&first.pins());
    assert_eq!(ids.len(), 5);
    fs::rename(first.pins(), second.pins()).expect("give the pins the other number");
    let mark = second.pins().join("_alive");
    assert!(lives(&mark));
    drop(first);
    // The kernel takes a namespace apart some time after it is gone; others may sweep it then.
    assert!(poll(PATIENCE, || (!lives(&mark)).then_some(())).is_some(), "{} goes on", mark.display());
    (second, ids)
}

/// Does the namespace live that made this mark?
fn lives(mark: &Path) -> bool {
    let out = Command::new("bpftool").args(["-j", "map", "dump", "pinned"]).arg(mark).output().expect("bpftool");
    serde_json::from_slice::<Value>(&out.stdout).unwrap_or_default()[0]["value"].is_array()
}

/// The ids of the programs that a session called `default` has pinned here.
fn ids_in(pins: &Path) -> Vec<u64> {
    let all = fs::read_dir(pins.join("default")).into_iter().flatten().flatten().map(|entry| entry.path());
    let shown = all.filter(|path| path.is_file()).map(|path| {
        let out = Command::new("bpftool").args(["-j", "prog", "show", "pinned"]).arg(path).output().expect("bpftool");
        serde_json::from_slice::<Value>(&out.stdout).expect("JSON")["id"].as_u64().expect("an id")
    });
    shown.collect()
}

/// Waits until the kernel has none of these programs.
#[track_caller]
fn assert_unloaded(ids: &[u64]) {
    let is_loaded = |id: &u64| {
        let out = Command::new("bpftool").args(["prog", "show", "id", &id.to_string()]).output().expect("bpftool");
        String::from_utf8_lossy(&out.stdout).contains("snif_")
    };
    let gone = poll(PATIENCE, || ids.iter().all(|id| !is_loaded(id)).then_some(()));
    assert!(gone.is_some(), "{ids:?} are still loaded");
}

#[test]
fn a_namespace_does_not_take_a_dead_ones_session_for_its_own() {
    let (second, ids) = reborn_with_a_dead_session();
    assert!(second.snifctl("status").starts_with("no session is up"));
    assert_eq!(second.snifctl("status --json").trim(), "{\n  \"sessions\": []\n}");
    let refused = second.run(&[SNIFCTL, "filter", "set", "udp"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("no session is up"), "{refused:?}");
    let doctor = String::from_utf8_lossy(&second.run(&[SNIFCTL, "doctor"]).stdout).into_owned();
    assert!(!doctor.contains("default"), "{doctor}");
    assert_unloaded(&ids);
    assert!(!second.pins().exists());
}

#[test]
fn up_in_a_namespace_with_a_dead_ones_inode_just_works() {
    let (second, ids) = reborn_with_a_dead_session();
    let shown = second.snifctl(&format!("{UP_BARE} --dry-run"));
    assert!(shown.contains("name snif_alive"), "{shown}");
    // Another test may have swept it meanwhile.
    assert!(shown.contains("rm -r ") || !second.pins().join("default").exists(), "{shown}");
    let said = second.snifctl(UP_BARE);
    assert!(said.starts_with("default: v0 -> gre -> 198.51.100.2 through v1 (MTU 1500)\n"), "{said}");
    assert_unloaded(&ids);
    assert!(second.snifctl(UP_BARE).contains("already up"));
    second.snifctl("down");
    assert!(!second.pins().exists());
}

#[test]
fn a_dead_ones_mark_does_not_delete_a_qdisc() {
    let (second, ids) = reborn_with_a_dead_session();
    second.run(&["tc", "qdisc", "add", "dev", "v0", "clsact"]);
    second.snifctl("down --all");
    assert!(String::from_utf8_lossy(&second.run(&["tc", "qdisc"]).stdout).contains("clsact"));
    assert_unloaded(&ids);
    assert!(!second.pins().exists());
}

#[test]
fn what_the_dead_have_left_is_told_and_swept_by_others() {
    for sweeper in ["sync --all", "down --all", UP_BARE] {
        let (first, other) = (Bare::new(), Bare::new());
        first.snifctl(UP_BARE);
        let (pins, ids) = (first.pins(), ids_in(&first.pins()));
        other.snifctl(sweeper);
        assert!(pins.exists(), "{sweeper} leaves the living alone");
        drop(first);
        // The kernel takes it apart some time after; others may sweep it as well.
        let doctor = || String::from_utf8_lossy(&other.run(&[SNIFCTL, "doctor"]).stdout).into_owned();
        let is_told = poll(PATIENCE, || (doctor().contains("snifctl sync --all") || !pins.exists()).then_some(()));
        assert!(is_told.is_some(), "{}", doctor());
        other.snifctl(sweeper);
        assert_unloaded(&ids);
        other.snifctl("down --all");
    }
}

#[test]
fn a_session_whose_relay_is_gone_is_still_its_namespaces_own() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    lab.host(&["ip", "link", "del", "snif0"]);
    lab.assert_up(&["default"]);
    lab.said(&["sync"]).ok();
    lab.assert_copied(1);
    lab.said(&["down"]).quietly_ok();
}

// ---- sessions whose pins are out of reach ----

#[test]
fn a_session_without_pins_is_shown_and_taken_down_whole() {
    for words in [&["down"][..], &["down", "--all"]] {
        let lab = Lab::roomy();
        let before = lab.machine();
        lab.said(&UP).quietly_ok();
        fs::remove_dir_all(lab.pins()).expect("its pins");
        let status = lab.status_json();
        let session = &status["sessions"][0];
        assert_eq!((&session["name"], &session["request"]), (&"default".into(), &Value::Null));
        assert!(session["faults"][0].as_str().expect("a fault").contains("out of reach"), "{session:#}");
        let shown = lab.said(&["status"]).quietly_ok().stdout;
        assert!(shown.ends_with("put it right with: snifctl down --name default\n"), "{shown}");
        lab.said(words).quietly_ok();
        lab.assert_as_before(&before);
    }
}

// ---- ip netns exec ----

/// Runs snifctl as `ip netns exec` does.
fn exec(bare: &Bare, line: &str) -> std::process::Output {
    let words = ["netns", "exec", &bare.name, SNIFCTL].into_iter().chain(line.split(' '));
    Command::new("ip").args(words).env("LC_ALL", "C").output().expect("ip starts")
}

#[test]
fn a_session_is_the_same_from_ip_netns_exec_and_from_nsenter() {
    let bare = Bare::new();
    let qdiscs = || String::from_utf8_lossy(&bare.run(&["tc", "qdisc"]).stdout).into_owned();
    let before = qdiscs();
    for (first, second) in [(true, false), (false, true), (true, true)] {
        let run = |line: &str, by_exec: bool| match by_exec {
            true => {
                let out = exec(&bare, line);
                assert!(out.status.success(), "{line}: {out:?}");
                String::from_utf8_lossy(&out.stdout).into_owned()
            }
            false => bare.snifctl(line),
        };
        run(UP_BARE, first);
        let ids = ids_in(&bare.pins());
        assert_eq!(ids.len(), 5);
        for by_exec in [true, false] {
            let status: Value = serde_json::from_str(&run("status --json", by_exec)).expect("JSON");
            assert_eq!(status["sessions"][0]["taps"][0]["attached"], true, "{status:#}");
        }
        run("down", second);
        assert_unloaded(&ids);
        assert!(!bare.pins().exists());
        assert_eq!(qdiscs(), before);
    }
}

#[test]
fn ip_netns_exec_passes_files_and_exit_codes_on() {
    let bare = Bare::new();
    let dir = tempfile::tempdir().expect("a directory");
    let capture = dir.path().join("a.pcap");
    let head: Vec<u8> = [&[0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0][..], &[0; 8], &[0, 0, 4, 0, 1, 0, 0, 0]].concat();
    fs::write(capture, head).expect("a capture");
    let run = |line: &str| {
        let words = ["netns", "exec", &bare.name, SNIFCTL].into_iter().chain(line.split(' '));
        Command::new("ip").args(words).current_dir(dir.path()).output().expect("ip starts")
    };
    let said = run("filter test -r a.pcap udp");
    assert!(said.status.success(), "{said:?}");
    assert_eq!(run("filter set").status.code(), Some(2));
    assert_eq!(run("down --name none").status.code(), Some(0));
    assert_eq!(run("filter show").status.code(), Some(1));
}

#[test]
fn what_cannot_be_run_outside_is_refused_with_the_line_that_works() {
    let bare = Bare::new();
    // Where only this mount namespace has the program.
    let script = "mount -t tmpfs tmpfs /mnt && cp \"$1\" /mnt/snifctl && exec /mnt/snifctl up v0 --tunnel gre --remote 198.51.100.2";
    let out = Command::new("ip").args(["netns", "exec", &bare.name, "sh", "-c", script, "sh", SNIFCTL]).output();
    let out = out.expect("ip starts");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    let line = format!("try: nsenter --net=/run/netns/{} snifctl {UP_BARE}\n", bare.name);
    assert!(!out.status.success() && said.ends_with(&line) && said.lines().count() == 1, "{said}");
    assert!(!bare.pins().exists());
}

// ---- hostile users ----

/// A bpffs of its own, where `user` and `root` make what they like before `up`; what the shell said.
#[track_caller]
fn hostile(lab: &Lab, given: &str, then: &str) -> String {
    let script = format!(
        "mount -t bpf bpf /sys/fs/bpf; pins=/sys/fs/bpf/snifctl; own=$pins/{}
        user() {{ setpriv --reuid 65534 --regid 65534 --clear-groups \"$@\"; }}
        {given}
        {then} 2>&1",
        lab.ns_inode(lab::Ns::Host)
    );
    let out = lab.try_host(&["unshare", "--mount", "sh", "-uc", &script, "sh", SNIFCTL]);
    String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr)
}

#[test]
fn what_another_user_has_made_is_refused_with_the_command_that_helps() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let up = UP.join(" ");
    for (given, names, help) in [
        (
            "user mkdir -m 0777 $pins",
            "/sys/fs/bpf/snifctl is not root's, but user 65534's (mode 0777)",
            "rm -r /sys/fs/bpf/snifctl",
        ),
        (
            "user mkdir -p $own/default/maps; chmod 1777 $pins",
            "/sys/fs/bpf/snifctl is not root's",
            "rm -r /sys/fs/bpf/snifctl",
        ),
        (
            "mkdir -m 0777 $pins; user mkdir $own",
            "snifctl can be written by others than root (mode 0777)",
            "chmod 0700 /sys/fs/bpf/snifctl",
        ),
        ("mkdir -p $own; chown 65534 $own", "is not root's, but user 65534's", "rm -r /sys/fs/bpf/snifctl/"),
        ("mkdir -p $own/default; chown 65534 $own/default", "/default is not root's, but user 65534's", "/default"),
        ("mkdir -p $own/default; chmod 0777 $own/default", "/default can be written by others", "chmod 0700"),
        (
            "user mkdir /sys/fs/bpf/x; user ln -s /sys/fs/bpf/x $pins",
            "/sys/fs/bpf/snifctl is no directory",
            "rm /sys/fs/bpf/snifctl",
        ),
        ("chmod 0777 /sys/fs/bpf", "/sys/fs/bpf can be written by others", "chmod 1777 /sys/fs/bpf"),
        ("chown 65534 /sys/fs/bpf", "/sys/fs/bpf is not root's", "chown root /sys/fs/bpf"),
        (
            "user mkdir -m 0777 $pins; user mkdir $own; setpriv --reuid 65534 --regid 65534 --clear-groups flock --no-fork $own sleep 60 >/dev/null 2>&1 & user=$!; while ! [ -d $own ]; do :; done",
            "is not root's",
            "rm -r /sys/fs/bpf/snifctl",
        ),
    ] {
        for command in [&up, "status", "down --all", "sync", "filter show"] {
            let end = if given.contains("flock") { "; kill $user" } else { "" };
            let said = hostile(&lab, given, &format!("{{ $1 {command}{end}; }}"));
            let line = said.lines().find(|line| line.starts_with("snifctl: ")).unwrap_or_default();
            assert!(line.contains(names) && line.contains(help), "{given}: {command}: {said}");
        }
    }
    lab.assert_as_before(&before);
}

#[test]
fn what_helps_against_it_helps() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let given = "user mkdir -p $own/default/maps; chmod 1777 $pins; rm -r $pins";
    let said = hostile(&lab, given, &format!("{{ $1 {} && $1 status && $1 down && ls $pins; }}", UP.join(" ")));
    assert!(said.contains("default: gre") && said.contains("No such file"), "{said}");
    lab.assert_as_before(&before);
}

#[test]
fn bpffs_that_we_mount_is_roots_alone() {
    let lab = Lab::roomy();
    let script = "umount /sys/fs/bpf; $1 status; $1 down; stat -c '%u %a' /sys/fs/bpf";
    let words = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-euc", script, "sh", SNIFCTL];
    let out = lab.host(&words);
    assert!(String::from_utf8_lossy(&out.stdout).ends_with("\n0 1700\n"), "{out:?}");
}

#[test]
fn the_callers_environment_and_odd_names_do_nothing() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let bad = lab.dir().join("bad");
    fs::create_dir(&bad).expect("a directory");
    fs::write(bad.join("bpf_helpers.h"), "#error read").expect("a header");
    fs::write(bad.join("evil.so"), "no library").expect("a library");
    let env = |name: &str, value: &str| format!("{name}={}{value}", bad.display());
    let words =
        [env("CPATH", ""), env("C_INCLUDE_PATH", ""), env("LD_PRELOAD", "/evil.so"), env("LD_LIBRARY_PATH", "")];
    let words: Vec<&str> = ["env"].into_iter().chain(words.iter().map(String::as_str)).collect();
    // What the loader says of our own start is not ours.
    assert!(lab.said_by(&words, &UP).status.success());
    lab.assert_copied(1);
    assert!(lab.said_by(&words, &["down"]).status.success());
    lab.assert_as_before(&before);
    for name in ["$(id>x)", "`id`", "a;id", "a|id"] {
        lab.host(&["ip", "link", "add", name, "type", "veth", "peer", "name", "odd1"]);
        let before = lab.machine();
        lab.said(&["up", name, "--tunnel", "gre", "--remote", "198.51.100.2", "--name", "odd"]).ok();
        lab.said(&["down", "--name", "odd"]).ok();
        lab.assert_as_before(&before);
        lab.host(&["ip", "link", "del", name]);
    }
}

// ---- clsact qdiscs ----

#[test]
fn a_qdisc_that_others_have_made_anew_is_theirs() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    lab.host(&["tc", "qdisc", "del", "dev", "eth0", "clsact"]);
    lab.host(&["tc", "qdisc", "add", "dev", "eth0", "clsact"]);
    lab.said(&["sync"]).ok();
    lab.assert_copied(1);
    lab.said(&["down"]).quietly_ok();
    assert!(lab.shown(&["tc", "qdisc", "show", "dev", "eth0"]).contains("clsact"));
}

#[test]
fn a_note_that_an_older_version_left_is_heeded() {
    for words in [&["down"][..], &["sync"]] {
        let lab = Lab::roomy();
        let before = lab.machine();
        lab.said(&UP).quietly_ok();
        let link: Value = serde_json::from_str(&lab.shown(&["ip", "-j", "link", "show", "dev", "eth0"])).expect("JSON");
        let note = lab.pins().join("_clsact").join(link[0]["ifindex"].to_string());
        assert!(!note.exists());
        lab.host(&["tc", "chain", "del", "dev", "eth0", "ingress", "chain", "5459529"]);
        fs::create_dir_all(&note).expect("a note");
        lab.said(words).quietly_ok();
        assert!(!note.exists());
        lab.said(&["down"]).ok();
        lab.assert_as_before(&before);
    }
}
