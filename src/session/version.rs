//! Which snifctl made a session, seen from this one.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use serde::Deserialize;
use serde_json::Value;

use crate::session::stored::{Hop, Stored, VERSION};

/// The version of this snifctl.
pub(crate) const OURS: &str = env!("CARGO_PKG_VERSION");

/// A session that another version of snifctl has written in a way that this one does not know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Foreign {
    /// The number of its form; 0 before there was one.
    form: u64,
    /// The version that wrote it; empty before they said so.
    pub by: String,
    /// The entries of the neighbour table that it keeps, where they can be read.
    pub hops: Vec<Hop>,
}

impl Foreign {
    /// What can be told of it in any form.
    pub(crate) fn of(stored: &Value) -> Foreign {
        let known = BTreeMap::<IpAddr, Hop>::deserialize(&stored["neighbours"]).unwrap_or_default();
        let mut hops: Vec<Hop> = Vec::new();
        for hop in known.into_values() {
            if !hops.iter().any(|other| other.is_of(&hop)) {
                hops.push(hop);
            }
        }
        let by = stored["snifctl"].as_str().unwrap_or_default();
        Foreign { form: stored["version"].as_u64().unwrap_or(0), hops, ..Foreign::by(by) }
    }

    pub(crate) fn by(version: &str) -> Foreign {
        Foreign { form: VERSION.into(), by: version.into(), hops: Vec::new() }
    }

    pub(crate) fn is_newer(&self) -> bool {
        self.form > u64::from(VERSION) || (self.form > 0 && order(&self.by) > order(OURS))
    }

    /// What helps, as the end of a sentence about the session.
    pub(crate) fn help(&self, name: &str) -> String {
        match self.is_newer() {
            true => format!("use that one, or take it down: snifctl down --name {name}"),
            false => format!("take it down, and start it again: snifctl down --name {name}"),
        }
    }
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.is_newer() {
            return write!(f, "made by an older snifctl, in a form that this one ({OURS}) cannot read");
        }
        match (self.by.as_str(), self.form > u64::from(VERSION)) {
            ("", _) => {
                write!(
                    f,
                    "made by a newer snifctl (this is {OURS}, and does not know form {} of what it stores)",
                    self.form
                )
            }
            (by, true) => write!(
                f,
                "made by a newer snifctl ({by}; this is {OURS}, and does not know form {} of what it stores)",
                self.form
            ),
            (by, false) => write!(f, "made by a newer snifctl ({by}; this is {OURS})"),
        }
    }
}

/// Whose a session's programs are, where they are not made of the sources of this snifctl.
pub(crate) fn of_others(stored: &Stored) -> Option<String> {
    let by = match stored.snifctl.as_str() {
        _ if stored.compiled.is_ours() => return None,
        "" => "an older snifctl".into(),
        OURS => format!("another build of snifctl {OURS}"),
        by => format!("snifctl {by}"),
    };
    Some(format!("those of {by}, and this is {OURS}"))
}

/// The fault that it is, which harms no copy, and its subject.
pub(crate) fn fault(stored: &Stored) -> Option<(&'static str, String)> {
    Some((PROGRAMS, format!("they are {}", of_others(stored)?)))
}

/// Does a line of faults tell of a version, and of nothing that goes wrong?
pub(crate) fn is_told_by(line: &str) -> bool {
    line.starts_with("made by ") || line.starts_with(&format!("{PROGRAMS}: they are those of "))
}

const PROGRAMS: &str = "programs";

/// Numbers by which versions can be compared; a pre-release comes before its release.
fn order(version: &str) -> (Vec<u64>, bool) {
    let version = version.split('+').next().unwrap_or_default();
    let (release, pre) = version.split_once('-').map_or((version, ""), |(release, pre)| (release, pre));
    (release.split('.').map(|part| part.parse().unwrap_or(0)).collect(), pre.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_their_numbers() {
        let sorted = ["", "0.1.0-dev", "0.1.0", "0.2.0", "0.10.0", "1.0.0-rc", "1.0.0"];
        assert!(sorted.is_sorted_by(|a, b| order(a) < order(b)));
        assert_eq!(order("1.2.3+build"), order("1.2.3"));
        assert!(Foreign::by("99.0.0").is_newer() && !Foreign::by(OURS).is_newer() && !Foreign::by("").is_newer());
        assert!(!Foreign::of(&serde_json::json!({ "version": "2" })).is_newer());
    }

    #[test]
    fn the_next_hops_of_a_newer_session_are_known_each_once() {
        let hop = serde_json::json!({ "address": "10.0.0.1", "ifindex": 2, "made": true, "later": [] });
        let stored = serde_json::json!({ "version": 2, "neighbours": { "10.0.0.7": hop, "10.0.0.8": hop } });
        let known = Hop { address: [10, 0, 0, 1].into(), ifindex: 2, made: true };
        assert_eq!(Foreign::of(&stored).hops, [known]);
        assert_eq!(Foreign::of(&serde_json::json!({ "version": 2, "neighbours": [7] })).hops, []);
    }
}
