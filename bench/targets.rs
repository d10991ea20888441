//! What the figures should be.

use crate::commands::SCRAPE;
use crate::cost::{ELSEWHERE, IDLE, MAIN, SLOW, TELLS};
use crate::report::{Report, Verdict};
use crate::scale::{INTERFACES, REMOTES};

enum Limit {
    AtMost(f64),
    AtLeast(f64),
    Exactly(f64),
}
use Limit::{AtLeast, AtMost, Exactly};

/// A target: its words, where its figure is (group, case, mode, name), and the limit.
type Target = (&'static str, [&'static str; 4], Limit);

fn all() -> Vec<Target> {
    let gre = |name| ["cost", MAIN, "snifctl gre", name];
    let tcp = |mode, name| ["tcp", "goodput of the watched flow", mode, name];
    let command = |mode| ["commands", "wall time", mode, "ms"];
    let interfaces = |name| ["scale", INTERFACES, "1000", name];
    let remotes = |name| ["scale", REMOTES, "64", name];
    vec![
        ("64 B ingress, GRE: added time to mirred to a vxlan device's", gre("to vxlan device"), AtMost(0.6)),
        (
            "64 B ingress, GRE: added time from another network namespace to that at home",
            ["cost", MAIN, ELSEWHERE, "to home"],
            AtMost(1.5),
        ),
        (
            "64 B ingress: added time of geneve --tell to that of geneve",
            ["cost", MAIN, TELLS, "to geneve"],
            AtMost(1.05),
        ),
        (
            "filter that rejects, less an empty program, ns",
            ["cost", IDLE, "snifctl gre, filter rejects", "over empty ns"],
            AtMost(60.0),
        ),
        ("copies a frame, below saturation", ["cost", SLOW, "snifctl gre", "copies/frame"], Exactly(1.0)),
        (
            "TCP goodput, segment, to mirred to a vxlan device's",
            tcp("snifctl gre segment", "to vxlan device"),
            AtLeast(2.1),
        ),
        (
            "TCP goodput, fragment, to mirred to a vxlan device's",
            tcp("snifctl gre fragment", "to vxlan device"),
            AtLeast(0.95),
        ),
        (
            "TCP retransmissions, fragment, to mirred to a vxlan device's",
            tcp("snifctl gre fragment", "again to vxlan device"),
            AtMost(1.0),
        ),
        ("up, cold, ms", command("up, cold"), AtMost(450.0)),
        ("up, warm, ms", command("up, warm"), AtMost(120.0)),
        ("map dump, ms", command("map dump"), AtMost(30.0)),
        ("status --json, ms", command("status --json"), AtMost(30.0)),
        ("sync, nothing to do, ms", command("sync, nothing to do"), AtMost(40.0)),
        ("a scrape of 200 taps and 8 remotes, ms", command(SCRAPE), AtMost(30.0)),
        ("1,000 interfaces: up, ms", interfaces("up ms"), AtMost(2500.0)),
        ("1,000 interfaces: sync, nothing to do, ms", interfaces("sync ms"), AtMost(1000.0)),
        ("1,000 interfaces: status, ms", interfaces("status ms"), AtMost(1000.0)),
        ("1,000 interfaces: down, ms", interfaces("down ms"), AtMost(1500.0)),
        ("64 remotes: up, warm, ms", remotes("up ms"), AtMost(500.0)),
        ("64 remotes: sync, nothing to do, ms", remotes("sync ms"), AtMost(100.0)),
    ]
}

/// Every target with its figure's median.
pub(crate) fn judge(report: &Report) -> Vec<Verdict> {
    let judged = all().into_iter().map(|(target, [group, case, mode, name], limit)| {
        let row = report.find(group, case, mode);
        let measured = row.and_then(|row| row.figure(name)).map(|spread| spread.median);
        let (words, number) = match limit {
            AtMost(number) => ("at most", number),
            AtLeast(number) => ("at least", number),
            Exactly(number) => ("exactly", number),
        };
        let met = measured.map(|measured| match limit {
            AtMost(most) => measured <= most,
            AtLeast(least) => measured >= least,
            Exactly(number) => (measured - number).abs() < 0.0005,
        });
        Verdict { target: format!("{target}: {words} {number}"), limit: number, measured, met }
    });
    judged.collect()
}
