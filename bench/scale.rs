//! How the cost of a copy grows with the number of interfaces, remotes and flows.

use std::time::Instant;

use crate::lab::Ns;
use crate::modes::{Mode, What, more_remotes};
use crate::report::{Report, Row};
use crate::rig::{Load, Rig, SNIFCTL, Way};

const GROUP: &str = "scale";
pub(crate) const INTERFACES: &str = "watched interfaces";
pub(crate) const REMOTES: &str = "remotes, each gets every copy";
/// Copies that may wait at a time in the receive backlog, which holds 1,000 packets of a CPU.
const BACKLOG: u32 = 512;

pub(crate) fn run(report: &mut Report) {
    flows(report);
    remotes(report);
    interfaces(report);
}

/// What of many things was tried: the number, and the mode.
type Step = (u32, Mode);

fn flows(report: &mut Report) {
    let rig = Rig::new(true);
    // VXLAN's source port and the choice of the remote need the flow's hash.
    let remotes = more_remotes(&rig, 3).join(",");
    let options = ["--tunnel", "vxlan", "--spread", "flow", "--remote", &remotes];
    let steps = [1, 100, 10_000].map(|count| (count, Mode::snifctl("vxlan", &options)));
    measure(&rig, report, "flows, over 3 remotes", &steps, |count| Load {
        flows: count,
        ..Load::new(Way::Ingress, 64)
    });
}

fn remotes(report: &mut Report) {
    let rig = Rig::new(true);
    let all = more_remotes(&rig, 64);
    let steps = [1, 3, 16, 64].map(|count: u32| {
        let remotes = all[..count as usize].join(",");
        (count, Mode::snifctl("gre", &["--tunnel", "gre", "--remote", &remotes]))
    });
    let load = |count: u32| {
        let batch = (BACKLOG / count).clamp(1, 64);
        Load { batch, count: if count > 3 { 2_500 } else { 12_500 }, ..Load::new(Way::Ingress, 64) }
    };
    measure(&rig, report, REMOTES, &steps, load);
}

fn interfaces(report: &mut Report) {
    let rig = Rig::new(true);
    let names: Vec<String> = (1..1000).map(|n| format!("w{n}")).collect();
    let away = rig.lab.ns_name(Ns::Peer);
    let batch = |ns, line: &dyn Fn(&String) -> String| {
        rig.lab.ip_batch(ns, &names.iter().map(line).collect::<Vec<_>>().join("\n"));
    };
    batch(Ns::Host, &|name| format!("link add {name} type veth peer name {name}p netns {away}"));
    // As interfaces in use: a clsact qdisc that comes or goes restarts the queues of one that is up.
    batch(Ns::Host, &|name| format!("link set dev {name} up"));
    batch(Ns::Peer, &|name| format!("link set dev {name}p up"));
    let steps = [1, 10, 100, 1000].map(|count: u32| {
        let more = names.iter().take(count as usize - 1).map(String::as_str);
        let options: Vec<&str> = more.chain(["--tunnel", "gre"]).collect();
        (count, Mode::snifctl("gre", &options))
    });
    measure(&rig, report, INTERFACES, &steps, |_| Load::new(Way::Ingress, 64));
}

/// Rounds of what takes seconds each.
fn fewer(rounds: usize) -> usize {
    (rounds / 3).max(rounds.min(3))
}

/// Each step beside nothing, in turns.
fn measure(rig: &Rig, report: &mut Report, case: &str, steps: &[Step], load: impl Fn(u32) -> Load) {
    let none = Mode::new("none", What::Nothing);
    let mut rows: Vec<[Vec<f64>; 7]> = vec![Default::default(); steps.len()];
    for round in 0..fewer(report.rounds) {
        for at in (0..steps.len()).map(|at| (at + round) % steps.len()) {
            let (count, mode) = &steps[at];
            let load = load(*count);
            let base = none.measure(rig, &load);
            let begin = Instant::now();
            let mut running = mode.start(rig);
            let up = begin.elapsed();
            let sample = running.measure(&load);
            let [sync, status] = ["sync", "status"].map(|verb| rig.timed(&[SNIFCTL, verb]));
            let begin = Instant::now();
            running.stop();
            let down = begin.elapsed();
            let copies = sample.copies.unwrap_or(f64::NAN) / sample.offered;
            let added = sample.ns - base.ns;
            let [up, down] = [up, down].map(|time| time.as_secs_f64() * 1000.0);
            let values = [added, added / copies, copies, up, sync, status, down];
            rows[at].iter_mut().zip(values).for_each(|(row, value)| row.push(value));
        }
    }
    let begin = report.rows.len();
    let names = ["added ns", "per copy ns", "copies/frame", "up ms", "sync ms", "status ms", "down ms"];
    report.rows.extend(steps.iter().zip(rows).map(|((count, _), values)| {
        let row = Row::new(GROUP, case, &count.to_string());
        names.iter().zip(values).fold(row, |row, (name, values)| row.with(name, values))
    }));
    report.print_from(begin);
}
