//! What the figures should be.

use std::fmt::{self, Display};

use serde::{Deserialize, Serialize};

use crate::cost::{IDLE, MAIN, SLOW};
use crate::report::Report;

/// A target, and what was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Verdict {
    pub target: String,
    pub limit: f64,
    pub measured: Option<f64>,
    /// None where it was not measured in this run.
    pub met: Option<bool>,
}

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
    vec![
        ("64 B ingress, GRE: added time to mirred to a vxlan device's", gre("to vxlan device"), AtMost(0.6)),
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
        ("up of 1,000 interfaces, ms", ["scale", "watched interfaces", "1000", "up ms"], AtMost(3000.0)),
    ]
}

/// Every target with its figure's median.
pub fn judge(report: &Report) -> Vec<Verdict> {
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

impl Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (word, measured) = match (self.met, self.measured) {
            (Some(true), Some(measured)) => ("met", format!("{measured:.3}")),
            (Some(false), Some(measured)) => ("missed", format!("{measured:.3}")),
            _ => ("-", "not measured".into()),
        };
        write!(f, "{word:<6}  {:<72}  {measured}", self.target)
    }
}
