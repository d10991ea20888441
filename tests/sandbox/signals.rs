//! Commands that a signal ends, that are killed with a tool at work, or stopped: they leave nothing, and nobody collides.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::lab;
use crate::lab::faults::{EMPTY_CACHE, Fakes, in_mounts, real};
use crate::lab::frames;
use crate::lab::judge::{Said, UP};
use crate::lab::kills::{BOTH, words};
use crate::lab::sessions::lab_of;
use crate::lab::{Lab, Ns, PATIENCE, poll};

/// A tool's stand-in that says so and waits, at the call with the number in `at`, until the file `go` is there.
const WAITING: &str = r#"#!/bin/sh
dir=@DIR@
[ -e "$dir/count" ] || echo 0 >"$dir/count"
read -r count <"$dir/count"
count=$((count + 1))
echo "$count" >"$dir/count"
read -r at <"$dir/at"
if [ "$count" = "$at" ]; then
    echo $$ >"$dir/new"
    mv "$dir/new" "$dir/waits"
    while [ ! -e "$dir/go" ]; do sleep 0.05; done
fi
exec @REAL@ "$@"
"#;

struct Bench {
    lab: Lab,
    fakes: Fakes,
    before: String,
}

impl Bench {
    fn new() -> Bench {
        let lab = Lab::roomy();
        lab.said(&UP).quietly_ok();
        lab.said(&["down"]).quietly_ok();
        let before = lab.machine();
        let fakes = lab.fakes();
        for tool in ["bpftool", "tc", "ip", "ethtool", "clang"] {
            let dir = lab.dir().to_string_lossy().into_owned();
            fakes.add(tool, &WAITING.replace("@DIR@", &dir).replace("@REAL@", &real(tool).to_string_lossy()));
        }
        Bench { lab, fakes, before }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.lab.dir().join(name)
    }

    /// Starts a command whose call with this number waits.
    fn start(&self, mounts: &[String], args: &[&str], at: usize) -> Child {
        for name in ["waits", "go", "count"] {
            let _ = fs::remove_file(self.file(name));
        }
        fs::write(self.file("at"), format!("{at}\n")).expect("tell the stand-ins");
        let mut command = self.lab.command(Ns::Host, &[]);
        command.args(mounts).args(self.fakes.first_in_path()).arg(env!("CARGO_BIN_EXE_snifctl")).args(args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start snifctl")
    }

    /// The process id of the tool that waits; `None` where the command ended without.
    fn tool(&self, child: &mut Child) -> Option<String> {
        let found = poll(PATIENCE, || {
            let pid = fs::read_to_string(self.file("waits")).ok().map(|pid| Some(pid.trim().to_string()));
            pid.or_else(|| child.try_wait().expect("a child").map(|_| None))
        });
        found.expect("it neither waits nor ends")
    }

    fn go(&self) {
        fs::write(self.file("go"), "").expect("let the tool go on");
    }

    /// What is in the directory for temporary files that is ours.
    fn temporary(&self) -> Vec<String> {
        let dir = self.fakes.first_in_path()[1].trim_start_matches("TMPDIR=").to_string();
        let names = fs::read_dir(dir).expect("the directory").flatten();
        let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.starts_with("snifctl-")).collect()
    }
}

fn send(signal: &str, pid: &str) {
    assert!(Command::new("kill").args(["-s", signal, pid]).status().expect("run kill").success());
}

/// The signal comes while a tool is at work, at each of the calls.
fn assert_undone(signal: &str, code: i32, start: &[&str], command: &str, mounts: &[String], step: usize) {
    let bench = Bench::new();
    start.iter().for_each(|command| drop(bench.lab.said(&words(command)).ok()));
    let mut interrupted = 0;
    for at in (1..).step_by(step) {
        let mut child = bench.start(mounts, &words(command), at);
        let is_there = bench.tool(&mut child).is_some();
        if is_there {
            send(signal, &child.id().to_string());
            // Long enough for us to take note, and less than a tool is let alone.
            poll(std::time::Duration::from_millis(200), || None::<()>);
            bench.go();
        }
        let said = Said::of(child);
        let what = format!("{command}, {signal} at call {at}: {said:#?}");
        assert_eq!(bench.temporary(), [""; 0], "{what}");
        if !is_there {
            assert!(said.status.success(), "{what}");
            break;
        }
        if said.status.success() {
            // It was done already.
            bench.lab.said(&["down"]).ok();
            start.iter().for_each(|command| drop(bench.lab.said(&words(command)).ok()));
            continue;
        }
        assert_eq!(said.status.code(), Some(code), "{what}");
        assert_eq!(said.stderr, "snifctl: interrupted; nothing was changed\n", "{what}");
        if start.is_empty() {
            bench.lab.assert_no_pins();
            bench.lab.assert_as_before(&bench.before);
        } else {
            let quiet = bench.lab.said(&["sync", "--all"]);
            assert!(quiet.status.success() && quiet.stdout.is_empty(), "{what}: {quiet:#?}");
        }
        interrupted += 1;
    }
    assert!(interrupted > 3, "interrupted {interrupted} times");
    bench.lab.said(&["down", "--all"]).ok();
    bench.lab.assert_as_before(&bench.before);
}

#[test]
fn up_that_is_terminated_leaves_nothing() {
    assert_undone("TERM", 143, &[], "up eth0 --tunnel gre --remote 198.51.100.2", &[], 2);
}

#[test]
fn up_that_is_interrupted_while_it_compiles_leaves_nothing() {
    let mounts = in_mounts(EMPTY_CACHE);
    assert_undone("INT", 130, &[], "up eth0 --tunnel gre --remote 198.51.100.2", &mounts, 3);
}

#[test]
fn a_filter_that_is_hung_up_on_is_not_set() {
    assert_undone("HUP", 129, &["up eth0 --tunnel gre --remote 198.51.100.2 --filter udp"], "filter set icmp", &[], 2);
}

#[test]
fn down_that_has_begun_is_finished() {
    let bench = Bench::new();
    for at in 1.. {
        bench.lab.said(&UP).quietly_ok();
        let mut child = bench.start(&[], &["down"], at);
        let is_there = bench.tool(&mut child).is_some();
        if is_there {
            send("INT", &child.id().to_string());
        }
        bench.go();
        let said = Said::of(child);
        match said.status.code() {
            Some(0) => {}
            Some(130) => {
                assert_eq!(said.stderr, "snifctl: interrupted; nothing was changed\n", "{said:#?}");
                bench.lab.assert_up(&["default"]);
                bench.lab.said(&["down"]).quietly_ok();
            }
            _ => panic!("at call {at}: {said:#?}"),
        }
        bench.lab.assert_as_before(&bench.before);
        if !is_there {
            break;
        }
    }
}

#[test]
fn a_tool_that_does_not_end_is_ended() {
    let bench = Bench::new();
    let mut child = bench.start(&[], &UP, 4);
    let tool = bench.tool(&mut child).expect("a tool at work");
    send("INT", &child.id().to_string());
    let said = Said::of(child);
    assert_eq!(said.status.code(), Some(130), "{said:#?}");
    assert_eq!(said.stderr, "snifctl: interrupted; nothing was changed\n");
    assert!(!PathBuf::from("/proc").join(tool).exists());
    bench.lab.assert_as_before(&bench.before);
}

#[test]
fn what_a_killed_command_has_started_keeps_the_others_waiting() {
    let bench = Bench::new();
    // The first of its writes, and more.
    for at in [5, 8, 11] {
        let mut child = bench.start(&[], &UP, at);
        let tool = bench.tool(&mut child).expect("a tool at work");
        // `kill` hits snifctl itself: nsenter and env have become it.
        send("KILL", &child.id().to_string());
        child.wait().expect("a child");
        let refused = bench.lab.said(&["--wait", "0", "down", "--all"]);
        assert_eq!(refused.status.code(), Some(1), "{refused:#?}");
        let named = format!("process {tool}) has been at work for 0 s; try again, or wait longer with: --wait 60\n");
        assert!(refused.stderr.starts_with("snifctl: what a killed snifctl has left at work ("), "{refused:#?}");
        assert!(refused.stderr.ends_with(&named), "{refused:#?}");
        bench.go();
        bench.lab.said(&UP).ok();
        bench.lab.assert_up(&["default"]);
        bench.lab.said(&["down"]).quietly_ok();
        bench.lab.assert_as_before(&bench.before);
    }
}

#[test]
fn a_stopped_command_that_keeps_others_waiting_is_told() {
    let bench = Bench::new();
    let mut child = bench.start(&[], &UP, 8);
    bench.tool(&mut child).expect("a tool at work");
    let pid = child.id().to_string();
    send("STOP", &pid);
    let stat = || fs::read_to_string(format!("/proc/{pid}/stat")).expect("its state");
    poll(PATIENCE, || stat().contains(") T ").then_some(())).expect("it stops");
    let refused = bench.lab.said(&["--wait", "0", "down"]);
    refused.refused(1, &format!("another snifctl (process {pid}) is stopped"), &format!("with: kill -CONT {pid}"));
    let mut waiting = bench.lab.command(Ns::Host, &[env!("CARGO_BIN_EXE_snifctl"), "down"]);
    let waiting = waiting.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start snifctl");
    poll(std::time::Duration::from_millis(1300), || None::<()>);
    send("CONT", &pid);
    bench.go();
    Said::of(child).ok();
    let said = Said::of(waiting).ok();
    let line = format!(
        "snifctl: waiting for another snifctl (process {pid}), which is stopped; let it go on with: kill -CONT {pid}\n"
    );
    assert_eq!(said.stderr, line);
    bench.lab.assert_as_before(&bench.before);
}

#[test]
fn a_removal_of_a_remote_that_was_killed_is_finished_by_an_addition() {
    let lab = lab_of(3);
    lab::links::add_link(&lab, 1);
    for n in 1.. {
        lab.said(&words(BOTH)).ok();
        lab.send(Ns::Peer, "peer0", &frames::series(&frames::Ends::PEER_TO_HOST, 5));
        let sent = |lab: &Lab| {
            let session = lab.session();
            session.remotes_total().pcnt + session.removed.pcnt
        };
        let before = sent(&lab);
        assert!(before >= 5);
        let interrupt = format!("SNIFCTL_INTERRUPT={n} after");
        let killed = lab.said_by(&["env", &interrupt], &words("remote remove 198.51.100.11"));
        assert_eq!(sent(&lab), before, "what was counted, after act {n}");
        lab.said(&words("remote add 198.51.100.12")).ok();
        assert_eq!(sent(&lab), before, "what was counted, after act {n} and an addition");
        let session = lab.session();
        assert!(session.faults.is_empty(), "after act {n}: {session:#}");
        let quiet = lab.said(&["sync"]).quietly_ok();
        assert_eq!(quiet.stdout, "", "after act {n}");
        lab.said(&["down"]).quietly_ok();
        if killed.status.success() {
            assert!(n > 3, "killed {n} times");
            break;
        }
    }
}
