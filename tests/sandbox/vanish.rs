//! What a command works on vanishes while it works: that is an error told, never a panic, and `sync` and `down` go on from
//! there.

use std::fs;

use crate::lab::faults::{Fakes, TOOLS, real};
use crate::lab::kills::{BASE, BOTH, words};
use crate::lab::links::add_link;
use crate::lab::sessions::lab_of;
use crate::lab::{Lab, Ns, frames};

/// A tool's stand-in that makes something happen before one of the calls.
const EVENT: &str = r#"#!/bin/sh
dir=@DIR@
read -r count <"$dir/count"
count=$((count + 1))
echo "$count" >"$dir/count"
read -r at <"$dir/at"
[ "$count" != "$at" ] || sh "$dir/event" >/dev/null 2>&1
exec @REAL@ "$@"
"#;

fn stand_ins(lab: &Lab, event: &str) -> Fakes {
    let fakes = lab.fakes();
    let dir = lab.dir().to_string_lossy().into_owned();
    for tool in TOOLS {
        let script = EVENT.replace("@DIR@", &dir).replace("@REAL@", &real(tool).to_string_lossy());
        fakes.add(tool, &script);
    }
    fs::write(lab.dir().join("event"), event).expect("write the event");
    fakes
}

/// Runs the command again and again, each time with the event before another of its calls, every `step`th of them.
fn assert_told(start: &[&str], command: &str, event: &str, step: usize) {
    let lab = lab_of(3);
    let event = event.replace("$pins", &lab.pins().join("default").to_string_lossy());
    let event = event.replace("ip ", &format!("{} ", real("ip").display()));
    let fakes = stand_ins(&lab, &event);
    let mut happened = 0;
    for at in (1..).step_by(step) {
        add_link(&lab, 1);
        start.iter().for_each(|command| drop(lab.said(&words(command)).ok()));
        fs::write(lab.dir().join("at"), format!("{at}\n")).expect("tell the stand-ins");
        fs::write(lab.dir().join("count"), "0\n").expect("tell the stand-ins");
        let said = lab.said_by(&fakes.first_in_path(), &words(command));
        let calls = fs::read_to_string(lab.dir().join("count")).expect("the count");
        let what = format!("{command}, with `{event}` before call {at}: {said:#?}");
        assert!(matches!(said.status.code(), Some(0 | 1)), "{what}");
        assert!(said.stderr.lines().all(|line| line.starts_with("snifctl: ")), "{what}");
        assert!(said.status.success() || said.stderr.lines().count() >= 1, "{what}");
        assert!(!said.stderr.contains("panicked"), "{what}");
        let healed = lab.said(&["sync", "--all"]);
        assert!(healed.status.success(), "{what}\nand then {healed:#?}");
        if lab.interfaces().iter().all(|name| name != "eth1") {
            add_link(&lab, 1);
        }
        let again = lab.said(&["sync", "--all"]);
        assert!(again.status.success(), "{what}\nand then {again:#?}");
        let quiet = lab.said(&["sync", "--all"]);
        assert!(quiet.status.success() && quiet.stdout.is_empty() && quiet.stderr.is_empty(), "{what}\n{quiet:#?}");
        if !lab.status().sessions.is_empty() {
            let session = lab.session();
            assert!(session.taps.iter().all(|tap| tap.attached) && session.faults.is_empty(), "{what}: {session:#}");
            lab.send(Ns::Peer, "peer0", &frames::series(&frames::Ends::PEER_TO_HOST, 2));
            lab.settled().assert_balanced();
            lab.said(&["down", "--all"]).quietly_ok();
        }
        lab.assert_no_pins();
        let left: Vec<String> = lab.interfaces().into_iter().filter(|name| name.starts_with("snif")).collect();
        assert!(left.is_empty(), "{what}: {left:?}");
        assert!(!lab.shown(&["tc", "qdisc"]).contains("clsact"), "{what}: {}", lab.shown(&["tc", "qdisc"]));
        lab.host(&["ip", "link", "del", "eth1"]);
        if calls.trim().parse::<usize>().expect("a count") < at {
            break;
        }
        happened += 1;
    }
    assert!(happened > 2, "it happened {happened} times");
}

#[test]
fn an_interface_that_goes_while_it_is_added_is_told() {
    assert_told(&[BASE], "tap add eth1", "ip link del eth1", 2);
}

#[test]
fn an_interface_that_goes_while_a_session_starts_is_told() {
    assert_told(&[], BOTH, "ip link del eth1", 3);
}

#[test]
fn an_interface_that_goes_while_the_filter_is_set_is_told() {
    assert_told(&[BOTH], "filter set udp", "ip link del eth1", 3);
}

#[test]
fn an_interface_that_goes_while_its_session_goes_is_told() {
    assert_told(&[BOTH], "down", "ip link del eth1", 2);
}

#[test]
fn a_program_that_goes_while_a_tap_is_added_is_told() {
    assert_told(&[BASE], "tap add eth1", "rm $pins/snif_tap_in $pins/snif_tap_out", 1);
}

#[test]
fn a_relay_that_goes_while_a_session_is_put_right_is_told() {
    assert_told(&[BOTH], "sync", "ip link del snif0", 2);
}

/// Really at the same time, at another moment each round.
#[test]
fn a_command_that_races_with_the_end_of_an_interface_ends_well() {
    let lab = lab_of(3);
    let known = lab.host(&["ip", "-4", "neigh", "show", "dev", "out0", "nud", "permanent"]);
    let known = String::from_utf8(known.stdout).expect("text");
    let restore: String = known
        .lines()
        .map(|at| format!("neigh replace {at} dev out0\n").replace("PERMANENT", "nud permanent"))
        .collect();
    for round in 0..5 {
        for (command, event) in [
            ("down", "ip link del eth1"),
            ("down", "ip link del out0"),
            ("sync", "ip link del eth1"),
            ("tap remove eth1", "ip link del eth1"),
            ("down", "ip link del snif0"),
        ] {
            add_link(&lab, 1);
            lab.said(&words(BOTH)).ok();
            let later = format!("sleep 0.{:03}; {event}", 24 * round);
            let event = if event.contains("out0") { later.replace("del out0", "set out0 down") } else { later };
            let mut racer = lab.command(Ns::Host, &["sh", "-c", &event]).spawn().expect("start the event");
            let said = lab.said(&words(command));
            racer.wait().expect("the event");
            lab.host(&["ip", "link", "set", "out0", "up"]);
            // They have gone with it.
            lab.ip_batch(Ns::Host, &restore);
            assert!(said.status.success(), "{command} and {event}: {said:#?}");
            lab.said(&["down", "--all"]).ok();
            lab.assert_no_pins();
            let left: Vec<String> = lab.interfaces().into_iter().filter(|name| name.starts_with("snif")).collect();
            assert!(left.is_empty(), "{command} and {event}: {left:?}");
            let _ = lab.try_host(&["ip", "link", "del", "eth1"]);
        }
    }
}
