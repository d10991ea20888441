//! How long the commands take.

use std::collections::BTreeMap;

use crate::lab::faults::{EMPTY_CACHE, in_mounts};
use crate::report::{Report, Row};
use crate::rig::{Rig, SNIFCTL};

const UP: [&str; 6] = ["up", "eth0", "--tunnel", "gre", "--remote", "198.51.100.2"];
const FILTER: [&str; 3] = ["filter", "set", "tcp port 443 and host 203.0.113.99"];
const ORDER: [&str; 9] = [
    "up, cold",
    "up, warm",
    "map dump",
    "status --json",
    "sync, nothing to do",
    "filter set, cold",
    "filter set, warm",
    "down",
    "entering the namespaces",
];

/// Milliseconds of each command.
type Times = BTreeMap<&'static str, Vec<f64>>;

pub(crate) fn run(report: &mut Report) {
    let rig = Rig::new(false);
    let mut times = Times::new();
    // Fills the cache.
    life(&rig, &mut Times::new());
    for _ in 0..report.rounds.max(7) {
        life(&rig, &mut times);
    }
    let begin = report.rows.len();
    let rows = ORDER.map(|name| Row::new("commands", "wall time", name).with("ms", times[name].clone()));
    report.rows.extend(rows);
    report.print_from(begin);
}

/// Every command once.
fn life(rig: &Rig, times: &mut Times) {
    let mut took = |name, ms| times.entry(name).or_default().push(ms);
    // The measured times have it in them.
    took("entering the namespaces", timed(rig, true, &["true"]));
    took("up, cold", timed(rig, true, &command(&UP)));
    timed(rig, false, &command(&["down"]));
    took("up, warm", timed(rig, false, &command(&UP)));
    took("map dump", timed(rig, false, &command(&["map", "dump"])));
    took("status --json", timed(rig, false, &command(&["status", "--json"])));
    took("sync, nothing to do", timed(rig, false, &command(&["sync"])));
    took("filter set, cold", timed(rig, true, &command(&FILTER)));
    timed(rig, false, &command(&["filter", "clear"]));
    took("filter set, warm", timed(rig, false, &command(&FILTER)));
    took("down", timed(rig, false, &command(&["down"])));
}

fn command<'a>(args: &[&'a str]) -> Vec<&'a str> {
    [&[SNIFCTL], args].concat()
}

/// Milliseconds that a command takes, if `cold` with nothing in the object cache.
fn timed(rig: &Rig, cold: bool, argv: &[&str]) -> f64 {
    let wrapper = in_mounts(EMPTY_CACHE);
    let wrapper = wrapper.iter().map(String::as_str).filter(|_| cold);
    let argv: Vec<&str> = wrapper.chain(argv.iter().copied()).collect();
    rig.timed(&argv)
}
