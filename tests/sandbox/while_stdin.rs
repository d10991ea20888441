//! `up --while-stdin`: the session ends with whoever holds standard input, and leaves nothing, in whichever way that ends.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Stdio};

use crate::lab::judge::{Said, UP, up_with};
use crate::lab::{Lab, Ns, PATIENCE, poll, signal};

/// Starts `up` with more arguments, its standard input held by us.
fn start(lab: &Lab, more: &[&str]) -> Child {
    let mut command = lab.command(Ns::Host, &[env!("CARGO_BIN_EXE_snifctl")]);
    command.args(up_with(more)).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("start snifctl")
}

/// The line that says that it is up.
fn line(child: &mut Child) -> String {
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().expect("a pipe")).read_line(&mut line).expect("a line");
    line
}

/// Starts it, and waits until it is up.
#[track_caller]
fn up(lab: &Lab, more: &[&str]) -> Child {
    let mut child = start(lab, more);
    assert_eq!(line(&mut child), "default: eth0 -> gre -> 198.51.100.2 through out0 (MTU 1600)\n");
    lab.assert_copied(1);
    child
}

#[track_caller]
fn assert_over(lab: &Lab, before: &str, child: Child, why: &str) {
    let said = Said::of(child).ok_noting(&format!("snifctl: session default is down: {why}\n"));
    assert_eq!(said.stdout, "");
    lab.assert_as_before(before);
}

#[test]
fn a_session_lasts_as_long_as_standard_input() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let mut child = up(&lab, &["--while-stdin"]);
    child.stdin.as_mut().expect("a pipe").write_all(b"anything\n").expect("write");
    lab.assert_copied(1);
    drop(child.stdin.take());
    assert_over(&lab, &before, child, "standard input has ended");
}

#[test]
fn each_signal_takes_the_session_down() {
    let lab = Lab::roomy();
    let before = lab.machine();
    for name in ["TERM", "INT", "HUP"] {
        let mut child = up(&lab, &["--while-stdin"]);
        // Held until it has ended.
        let stdin = child.stdin.take();
        signal(child.id(), name);
        assert_over(&lab, &before, child, "a signal came");
        drop(stdin);
    }
}

#[test]
fn silence_takes_the_session_down_where_that_is_asked_for() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let mut child = up(&lab, &["--while-stdin=1"]);
    let stdin = child.stdin.take();
    assert_over(&lab, &before, child, "nothing came on standard input for 1 s");
    drop(stdin);
}

#[test]
fn signs_of_life_keep_it_up() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let mut child = up(&lab, &["--while-stdin=1"]);
    let mut stdin = child.stdin.take().expect("a pipe");
    let begin = std::time::Instant::now();
    let lived = poll(PATIENCE, || {
        stdin.write_all(b"\n").expect("somebody reads");
        (begin.elapsed().as_secs() >= 3).then_some(())
    });
    assert!(lived.is_some() && child.try_wait().expect("a child").is_none());
    lab.assert_copied(1);
    drop(stdin);
    assert_over(&lab, &before, child, "standard input has ended");
}

#[test]
fn without_any_input_it_goes_at_once() {
    let lab = Lab::roomy();
    let before = lab.machine();
    lab.said(&up_with(&["--while-stdin"])).ok_noting("is down: standard input has ended");
    lab.assert_as_before(&before);
}

/// As after the end of ssh, while it still compiles and has much to say.
#[test]
fn nobody_at_the_other_ends_is_an_end_too() {
    let lab = Lab::new();
    let before = lab.machine();
    let mut child = start(&lab, &["--while-stdin", "--name", "new", "-v", "--filter", "udp port 53 or tcp port 22"]);
    drop((child.stdin.take(), child.stdout.take(), child.stderr.take()));
    let ended = poll(PATIENCE, || child.try_wait().expect("a child"));
    assert!(ended.is_some_and(|status| status.success()), "{ended:?}");
    lab.assert_as_before(&before);
}

#[test]
fn a_session_of_others_is_left_alone() {
    let lab = Lab::roomy();
    let before = lab.machine();
    lab.said(&UP).quietly_ok();
    let names = "--name default is taken by a session that is up";
    lab.said(&up_with(&["--while-stdin"])).refused(1, names, "snifctl down --name default");
    lab.said(&up_with(&["--while-stdin", "--ttl", "3"])).refused(1, names, "snifctl down --name default");
    lab.assert_copied(1);
    // What is taken down meanwhile is down already.
    let mut child = start(&lab, &["--while-stdin", "--name", "second"]);
    assert!(line(&mut child).starts_with("second: eth0 -> gre"));
    lab.assert_copied(2);
    lab.said(&["down", "--all"]).quietly_ok();
    drop(child.stdin.take());
    Said::of(child).ok_noting("session second is down");
    // Who waits for it learns that.
    let mut child = up(&lab, &["--while-stdin"]);
    let stdin = child.stdin.take();
    lab.said(&["down"]).quietly_ok();
    Said::of(child).refused(1, "session default has been taken down by others", "snifctl up");
    drop(stdin);
    // Another of that name is not ours.
    let mut child = up(&lab, &["--while-stdin"]);
    lab.said(&["down"]).quietly_ok();
    lab.said(&UP).quietly_ok();
    drop(child.stdin.take());
    Said::of(child).ok_noting("session default is another one by now, and stays: standard input has ended");
    lab.assert_copied(1);
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

#[test]
fn it_goes_with_no_other_way_to_end() {
    let lab = Lab::roomy();
    let before = lab.machine();
    for (more, names) in [("--dry-run", "'--dry-run'"), ("--replace", "'--replace'")] {
        lab.said(&up_with(&["--while-stdin", more])).refused(2, names, "snifctl up --help");
    }
    let ends = "try: --while-stdin=30";
    lab.said(&up_with(&["--while-stdin=soon"])).refused(2, "--while-stdin \"soon\" is not a number", ends);
    lab.said(&up_with(&["--while-stdin=0"])).refused(2, "out of range", "as in: --while-stdin=30");
    lab.assert_as_before(&before);
}
