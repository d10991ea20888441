//! Commands that are killed, or fail, at every step: what they leave is what was before, or heals.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;

use crate::lab::Lab;
use crate::lab::faults::{Bench, EMPTY_CACHE, Fault, in_mounts, real};
use crate::lab::filters::{Snapshot, filter_of, own_cache, said, snapshot, up_filtering};
use crate::lab::judge::{Said, UP, up_with};
use crate::lab::links::{ETH0, assert_copied_on, hooks, lab_with_links};
use crate::lab::remotes::{assert_replicated, dump, know, lab_up, remote, remotes};
use crate::lab::sessions::{down, up};
use crate::lab::status::Session;

// ---- up and down ----

/// A lab in which the object is compiled, so that every `up` makes the same calls.
fn compiled() -> Bench {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    lab.said(&["down"]).quietly_ok();
    let before = lab.machine();
    Bench::new(lab, before, Vec::new())
}

/// `down` after a kill leaves nothing, and so do `up` and `down` after the same kill. False if nothing was killed.
#[track_caller]
fn assert_heals(bench: &Bench, kill: impl Fn() -> Option<Said>) -> bool {
    for heal in [false, true] {
        let Some(killed) = kill() else { return false };
        assert_eq!(killed.status.signal(), Some(9), "{killed:#?}");
        if heal {
            bench.lab.said(&UP).ok();
            bench.lab.assert_up(&["default"]);
        }
        bench.lab.said(&["down"]).ok();
        bench.lab.assert_as_before(&bench.before);
    }
    true
}

#[test]
fn up_killed_before_any_of_its_calls_is_healed_by_up_and_by_down() {
    let bench = compiled();
    let first = bench.writes(&UP)[0];
    bench.lab.said(&["down"]).quietly_ok();
    let kill = |at| bench.run(&UP, at, Fault::Kill { done: None });
    let kills = (first..).take_while(|at| assert_heals(&bench, || kill(*at))).count();
    assert!(kills > 6, "killed {kills} times");
}

/// Kills `up` after its writing call with this number has done one line, and after each `step` lines more.
fn assert_heals_within(write: usize, step: usize) {
    let bench = compiled();
    let at = bench.writes(&UP)[write];
    bench.lab.said(&["down"]).quietly_ok();
    for done in (1..).step_by(step) {
        assert!(assert_heals(&bench, || bench.run(&UP, at, Fault::Kill { done: Some(done) })));
        if done >= bench.fakes.input_lines() {
            break;
        }
    }
}

#[test]
fn up_killed_when_it_tells_that_its_namespace_lives_is_healed() {
    assert_heals_within(0, 1);
}

#[test]
fn up_killed_when_its_programs_are_loaded_is_healed() {
    assert_heals_within(1, 1);
}

#[test]
fn up_killed_within_its_map_writes_is_healed() {
    assert_heals_within(2, 4);
}

#[test]
fn up_killed_within_making_its_relay_is_healed() {
    assert_heals_within(3, 1);
}

#[test]
fn up_killed_after_its_relay_was_told_to_make_wire_frames_is_healed() {
    assert_heals_within(4, 1);
}

#[test]
fn up_killed_within_attaching_to_its_relay_is_healed() {
    assert_heals_within(5, 1);
}

#[test]
fn up_killed_within_starting_its_relay_is_healed() {
    assert_heals_within(6, 1);
}

#[test]
fn up_killed_within_attaching_its_taps_is_healed() {
    assert_heals_within(7, 1);
}

#[test]
fn down_killed_before_any_of_its_calls_is_healed_by_up_and_by_down() {
    let bench = compiled();
    let kill = |at| {
        bench.lab.said(&UP).ok();
        bench.run(&["down"], at, Fault::Kill { done: None })
    };
    let kills = (1..).take_while(|at| assert_heals(&bench, || kill(*at))).count();
    assert!(kills > 5, "killed {kills} times");
}

#[test]
fn down_killed_within_any_of_its_writes_is_healed_by_up_and_by_down() {
    let bench = compiled();
    bench.lab.said(&UP).quietly_ok();
    for at in bench.writes(&["down"]) {
        for done in 1..=2 {
            let killed = assert_heals(&bench, || {
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
    let bench = compiled();
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
    let bench = compiled();
    let writes = bench.writes(&UP);
    bench.lab.said(&["down"]).quietly_ok();
    assert_eq!(writes.len(), 9);
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
    let bench = compiled();
    let mut at = 1;
    loop {
        bench.lab.said(&UP).ok();
        let Some(said) = bench.run(&["down"], at, Fault::Fail { done: None }) else {
            break;
        };
        // A question that fails is asked once more, in parts.
        assert!(said.status.success() || said.stderr.lines().count() == 1, "{said:#?}");
        bench.lab.said(&["down"]).ok();
        bench.lab.assert_as_before(&bench.before);
        at += 1;
    }
    assert!(at > 5, "failed {at} times");
}

/// What is gone already, or fails once, is looked at again.
#[test]
fn down_goes_on_after_a_line_that_fails() {
    let bench = compiled();
    bench.lab.said(&UP).quietly_ok();
    for at in bench.writes(&["down"]) {
        for done in 0..=2 {
            bench.lab.said(&UP).ok();
            bench.run(&["down"], at, Fault::Fail { done: Some(done) }).expect("a failure").quietly_ok();
            bench.lab.assert_as_before(&bench.before);
        }
    }
}

#[test]
fn a_failure_of_one_session_leaves_the_others_alone() {
    let bench = compiled();
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

// ---- filter set ----

const OLD: &str = "udp port 4001";
const NEW: &str = "udp and not port 1";
const SET_NEW: [&str; 4] = ["filter", "set", "--", NEW];

/// A session whose filter is being changed by tools that can be made to fail.
struct Setting {
    bench: Bench,
}

impl Setting {
    fn new() -> Setting {
        let lab = Lab::roomy();
        let (before, mounts) = (lab.machine(), own_cache(&lab));
        let setting = Setting { bench: Bench::new(lab, before, mounts) };
        // Compiled now, so that every later run makes the same calls.
        up_filtering(&setting.bench.lab, OLD);
        setting.set(NEW);
        setting.set(OLD);
        setting
    }

    #[track_caller]
    fn set(&self, filter: &str) {
        said(&self.bench.lab, &["filter", "set", "--", filter]).quietly_ok();
        assert_eq!(filter_of(&self.bench.lab), filter);
        self.bench.lab.assert_up(&["default"]);
    }

    /// Sets the new filter while the fault is armed; `None` if it has ended before the call that would go wrong.
    fn run(&self, at: usize, fault: Fault) -> Option<Said> {
        self.bench.run(&SET_NEW, at, fault)
    }

    /// Number and lines of input of each call that changes the kernel.
    fn writes(&self) -> Vec<(usize, usize)> {
        let writes = self.bench.writes(&SET_NEW);
        self.set(OLD);
        writes.into_iter().map(|at| (at, self.bench.input_lines(&SET_NEW, at))).collect()
    }
}

#[test]
fn a_failed_set_leaves_the_old_filter_whichever_of_its_calls_failed() {
    let setting = Setting::new();
    let (mut at, mut refused) = (1, 0);
    let mut before = snapshot(&setting.bench.lab);
    while let Some(said) = setting.run(at, Fault::Fail { done: None }) {
        if said.status.success() {
            // It does without what that call would have told it.
            assert_eq!(filter_of(&setting.bench.lab), NEW, "{said:#?}");
            setting.set(OLD);
            before = snapshot(&setting.bench.lab);
        } else {
            // What tcpdump refuses is a wrong word of the user's.
            let code = if said.stderr.contains("is not a filter") { 2 } else { 1 };
            said.refused(code, "", "");
            assert_eq!(snapshot(&setting.bench.lab), before, "call {at}: {:?}", setting.bench.fakes.calls());
            refused += 1;
        }
        at += 1;
    }
    assert!(refused >= 6, "{refused} of {at} calls made it fail");
    setting.set(OLD);
    setting.bench.lab.assert_copied(1);
}

#[test]
fn a_set_that_failed_half_way_leaves_the_old_filter() {
    let setting = Setting::new();
    let writes = setting.writes();
    assert_eq!(writes.len(), 4, "{writes:?}");
    let before = snapshot(&setting.bench.lab);
    for (at, lines) in writes {
        for done in 0..lines.max(2) {
            assert_old_after(&setting, at, done, &before);
        }
    }
    setting.set(NEW);
}

#[track_caller]
fn assert_old_after(setting: &Setting, at: usize, done: usize, before: &Snapshot) {
    setting.run(at, Fault::Fail { done: Some(done) }).expect("a failure").refused(1, "", "");
    assert_eq!(snapshot(&setting.bench.lab), *before, "call {at} failed after {done} lines");
}

#[test]
fn a_set_whose_last_write_failed_after_all_its_lines_leaves_the_old_filter() {
    let setting = Setting::new();
    let (at, lines) = setting.writes().pop().expect("a write");
    let before = snapshot(&setting.bench.lab);
    assert_old_after(&setting, at, lines, &before);
}

/// Kills `filter set`. Each tap runs the old filter or the new one then, and frames that both take are copied.
#[track_caller]
fn kill(setting: &Setting, at: usize, done: Option<usize>) -> bool {
    let Some(killed) = setting.run(at, Fault::Kill { done }) else { return false };
    assert_eq!(killed.status.signal(), Some(9), "{killed:#?}");
    setting.bench.lab.assert_copied(1);
    true
}

/// Setting it again heals.
#[track_caller]
fn assert_set_heals(setting: &Setting, at: usize, done: Option<usize>) -> bool {
    let killed = kill(setting, at, done);
    if killed {
        said(&setting.bench.lab, &["filter", "set", "--", NEW]).ok();
        assert_eq!(filter_of(&setting.bench.lab), NEW);
        setting.bench.lab.assert_up(&["default"]);
        assert!(!setting.bench.lab.pins().join("_new_default").exists(), "half a session is left");
        setting.set(OLD);
    }
    killed
}

/// `down` leaves the machine as it was.
#[track_caller]
fn assert_down_heals(setting: &Setting, at: usize, done: Option<usize>) {
    assert!(kill(setting, at, done));
    said(&setting.bench.lab, &["down"]).ok();
    setting.bench.lab.assert_as_before(&setting.bench.before);
    up_filtering(&setting.bench.lab, OLD);
}

#[test]
fn a_set_that_was_killed_before_any_of_its_calls_is_healed() {
    let setting = Setting::new();
    let first = setting.writes()[0].0;
    let kills = (first..).take_while(|at| assert_set_heals(&setting, *at, None)).count();
    assert!(kills >= 4, "killed {kills} times");
    setting.set(OLD);
    assert_down_heals(&setting, first + 1, None);
}

#[test]
fn a_set_that_was_killed_within_a_write_is_healed() {
    let setting = Setting::new();
    let writes = setting.writes();
    let [(request, asked), _, (attach, taps), (remember, lines)] = writes[..] else { panic!("{writes:?}") };
    for (at, done) in [(request, 1), (request, asked), (attach, 1), (attach, taps), (remember, 1), (remember, lines)] {
        assert!(assert_set_heals(&setting, at, Some(done)));
    }
    for (at, done) in [(attach, 1), (remember, lines)] {
        assert_down_heals(&setting, at, Some(done));
    }
}

// ---- taps ----

/// What a change of taps changes: the session, and what is at the hooks of its interfaces.
type State = (Session, String);

const ADD: [&str; 3] = ["tap", "add", "eth1"];
const REMOVE: [&str; 3] = ["tap", "remove", "eth1"];

/// A session whose changes of taps can be made to fail.
struct TapChange {
    bench: Bench,
    change: [&'static str; 3],
    undo: [&'static str; 3],
    /// Of the session, before and after the change.
    states: [State; 2],
}

impl TapChange {
    fn new(change: [&'static str; 3], undo: [&'static str; 3]) -> TapChange {
        let (lab, before) = lab_with_links(1);
        if change == REMOVE {
            lab.said(&undo).quietly_ok();
        }
        let state = |lab: &Lab| (lab.session(), hooks(lab));
        let first = state(&lab);
        lab.said(&change).quietly_ok();
        let second = state(&lab);
        lab.said(&undo).quietly_ok();
        let bench = Bench::new(lab, before, Vec::new());
        let taps = TapChange { bench, change, undo, states: [first, second] };
        assert_eq!(taps.state(), taps.states[0], "undoing leaves the session as it was");
        taps
    }

    fn state(&self) -> State {
        (self.bench.lab.session(), hooks(&self.bench.lab))
    }

    /// Makes the change while the fault is armed; `None` if it has ended before the call that would go wrong.
    fn run(&self, at: usize, fault: Fault) -> Option<Said> {
        self.bench.run(&self.change, at, fault)
    }

    /// The numbers of the calls that change the machine and the lines that each is fed.
    fn writes(&self) -> Vec<(usize, usize)> {
        let writes = self.bench.writes(&self.change);
        self.bench.lab.said(&self.undo).quietly_ok();
        let lines = |at: usize| {
            let lines = self.bench.input_lines(&self.change, at);
            self.bench.lab.said(&self.change);
            self.bench.lab.said(&self.undo).quietly_ok();
            (at, lines)
        };
        writes.into_iter().map(lines).collect()
    }

    /// Brings the session back to the first state, whatever it is in.
    #[track_caller]
    fn heal(&self) {
        // Each refuses where there is nothing to do.
        self.bench.lab.said(&self.change);
        self.bench.lab.said(&self.undo);
        if self.state() != self.states[0] {
            self.start_anew();
        }
    }

    /// `down` leaves the machine as it was, and a new session is like the first one.
    #[track_caller]
    fn start_anew(&self) {
        down(&self.bench.lab);
        self.bench.lab.assert_as_before(&self.bench.before);
        up(&self.bench.lab, 0, &[]);
        if self.change == REMOVE {
            self.bench.lab.said(&self.undo).quietly_ok();
        }
    }

    /// What is wrong after the change has failed in this way; `None` as answer if it has not come so far. A write that
    /// has done a part may leave the change undone, or made, and nothing between.
    fn failed(&self, at: usize, done: Option<usize>) -> Option<Vec<String>> {
        let said = self.run(at, Fault::Fail { done })?;
        if said.stderr.contains("counters are still to be added up") {
            self.bench.lab.said(&["sync"]).quietly_ok();
        }
        let (call, state) = (self.bench.fakes.calls()[at - 1].clone(), self.state());
        let well = said.status.success();
        let right = if well { state == self.states[1] } else { state == self.states[0] };
        let mut wrong = Vec::new();
        if !right && (done.is_none() || state != self.states[1]) {
            let attached = state.0.taps.iter().map(|tap| tap.attached.to_string()).collect::<Vec<_>>();
            let attached = attached.join(", ");
            wrong.push(format!("call {at}, `{call}`, failed with {done:?} lines done; taps attached: {attached}"));
        }
        if !well {
            said.refused(1, "", "");
        }
        if state != self.states[0] {
            self.heal();
        }
        Some(wrong)
    }
}

/// A change that fails, whichever call has failed, leaves the session and the machine as they were.
#[track_caller]
fn assert_unwound(taps: &TapChange, least: usize) {
    let mut wrong = Vec::new();
    let mut at = 1;
    while let Some(more) = taps.failed(at, None) {
        wrong.extend(more);
        at += 1;
    }
    assert!(at > least, "failed {at} times");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn an_addition_is_unwound_whichever_of_its_calls_fails() {
    assert_unwound(&TapChange::new(ADD, REMOVE), 5);
}

#[test]
fn a_removal_is_unwound_whichever_of_its_calls_fails() {
    assert_unwound(&TapChange::new(REMOVE, ADD), 8);
}

/// Also where a write has done a part of its lines.
#[track_caller]
fn assert_unwound_half_way(taps: &TapChange) {
    let writes = taps.writes();
    let partial = |(at, lines): &(usize, usize)| [(*at, 1), (*at, lines / 2), (*at, lines - 1)];
    let mut cases: Vec<(usize, usize)> = writes.iter().flat_map(partial).filter(|(_, done)| *done > 0).collect();
    cases.dedup();
    assert!(cases.len() >= 4, "{writes:?}");
    let wrong: Vec<String> = cases.iter().filter_map(|(at, done)| taps.failed(*at, Some(*done))).flatten().collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn an_addition_is_unwound_when_a_write_fails_half_way() {
    assert_unwound_half_way(&TapChange::new(ADD, REMOVE));
}

#[test]
fn a_removal_is_unwound_when_a_write_fails_half_way() {
    assert_unwound_half_way(&TapChange::new(REMOVE, ADD));
}

/// Kills the change at a call, after so many of its lines; false if it has ended before.
#[track_caller]
fn killed(taps: &TapChange, at: usize, done: Option<usize>) -> bool {
    let Some(said) = taps.run(at, Fault::Kill { done }) else { return false };
    assert_eq!(said.status.signal(), Some(9), "{said:#?}");
    true
}

/// The same command again completes what was killed, and `down` removes it.
#[track_caller]
fn assert_healed(taps: &TapChange) {
    let heals = |what: &str| {
        let again = taps.bench.lab.said(&taps.change);
        // Where the change was made, and only rows were left that stand for nothing.
        taps.bench.lab.said(&["sync"]).ok();
        assert_eq!(taps.state(), taps.states[1], "killed at {what}: {again:#?}");
        taps.bench.lab.said(&taps.undo).quietly_ok();
    };
    let writes = taps.writes();
    // Before the first of these, nothing has been changed.
    let kills = (writes[0].0..).take_while(|at| killed(taps, *at, None)).inspect(|at| heals(&format!("call {at}")));
    assert!(kills.count() >= writes.len());
    taps.bench.lab.said(&taps.undo).quietly_ok();
    for (at, lines) in writes {
        for done in BTreeSet::from([1, lines / 2, lines - 1]).into_iter().filter(|done| *done > 0) {
            assert!(killed(taps, at, Some(done)));
            heals(&format!("call {at} with {done} lines done"));
        }
        assert!(killed(taps, at, Some(lines / 2)));
        taps.start_anew();
    }
    assert_eq!(taps.state(), taps.states[0]);
    assert_copied_on(&taps.bench.lab, ETH0, "both");
}

#[test]
fn an_addition_that_was_killed_is_healed_by_the_same_command_and_by_down() {
    assert_healed(&TapChange::new(ADD, REMOVE));
}

#[test]
fn a_removal_that_was_killed_is_healed_by_the_same_command_and_by_down() {
    assert_healed(&TapChange::new(REMOVE, ADD));
}

// ---- remotes ----

/// `bpftool` fails after some of the lines of a change; making it once more completes it, to so many remotes.
#[track_caller]
fn assert_repeatable(change: &str, back: &str, left: u8) {
    let lab = lab_up(1, &[]);
    know(&lab, remote(1));
    let (fakes, changed) = (lab.counting_fakes(), remote(1).to_string());
    let run = |change: &str| lab.said_by(&fakes.first_in_path(), &["remote", change, &changed]);
    if change == "remove" {
        lab.said(&["remote", back, &changed]).quietly_ok();
    }
    run(change).quietly_ok();
    let last = fakes.calls().len();
    // A removal has two batches, with a question in between.
    let calls = if change == "remove" { vec![last - 2, last] } else { vec![last] };
    for (at, done) in calls.into_iter().flat_map(|at| [0, 1, 4, 6].map(|done| (at, done))) {
        lab.said(&["remote", back, &changed]).quietly_ok();
        fakes.arm(at, Fault::Fail { done: Some(done) });
        let said = run(change);
        let is_done = said.status.success() && said.stderr.contains("counters are still to be added up");
        assert!(is_done || said.status.code() == Some(1), "{change} with {done} lines done: {said:#?}");
        // A refusal is right where all had been done but the tool's exit code.
        let again = lab.said(&["remote", change, &changed]);
        eprintln!("{change} after one that failed with {done} lines done: {again:?}");
        // Rows that stand for nothing may be left.
        lab.said(&["sync"]).ok();
        assert_replicated(&lab, &remotes(left));
        assert_eq!(dump(&lab, "tunnels").len(), usize::from(left));
    }
}

#[test]
fn an_addition_that_failed_half_way_can_be_made_again() {
    assert_repeatable("add", "remove", 2);
}

#[test]
fn a_removal_that_failed_half_way_can_be_made_again() {
    assert_repeatable("remove", "add", 1);
}
