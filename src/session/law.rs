//! The law of conservation: what was asked for was sent, or dropped for a reason. Under traffic there is no common snapshot
//! of the maps, so two looks are compared, the first of which was over before the second began. A copy is counted as asked
//! for before it is counted as sent or dropped, and a frame as seen before all else; so what a later look has of the former
//! is never less than what an earlier one has of the latter.

use std::net::IpAddr;

use anyhow::Result;

use crate::datapath::abi::{Stat, TapCounts};
use crate::output::units::grouped;
use crate::session::counted::Counted;
use crate::session::stats::{RemoteStatus, Rise, Session, TapStatus};
use crate::tools::interrupt;

/// A session's counters at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Look {
    /// By interface and direction.
    taps: Vec<(String, &'static str, TapCounts)>,
    remotes: Vec<(IpAddr, Stat)>,
    /// What it no longer has.
    removed_taps: TapCounts,
    removed: Stat,
    /// By all reasons together.
    dropped: u64,
    /// By the out interfaces and their queues, whoever sent.
    behind: u64,
}

impl From<&Session> for Look {
    fn from(at: &Session) -> Look {
        Look::of(&at.taps, &at.remotes, (at.removed_taps, at.removed), at.drops.values().sum(), at.out_dropped)
    }
}

impl From<&Counted> for Look {
    fn from(at: &Counted) -> Look {
        Look::of(&at.taps, &at.remotes, (at.removed_taps, at.removed), at.drops.values().sum(), at.out_dropped)
    }
}

impl Look {
    fn of(
        taps: &[TapStatus],
        remotes: &[RemoteStatus],
        (removed_taps, removed): (TapCounts, Stat),
        dropped: u64,
        behind: u64,
    ) -> Look {
        let taps = taps.iter().map(|tap| (tap.interface.clone(), tap.direction, tap.counts)).collect();
        let remotes = remotes.iter().map(|remote| (remote.address, remote.stat)).collect();
        Look { taps, remotes, removed_taps, removed, dropped, behind }
    }

    /// All taps together.
    fn tapped(&self) -> Stat {
        Stat::sum(self.taps.iter().map(|(.., counts)| counts.stat).chain([self.removed_taps.stat]))
    }

    /// All remotes together.
    fn sent(&self) -> Stat {
        Stat::sum(self.remotes.iter().map(|(_, stat)| *stat).chain([self.removed]))
    }

    fn accounted(&self) -> u64 {
        self.sent().pcnt + self.dropped
    }

    fn tap(&self, interface: &str, direction: &str) -> Option<&TapCounts> {
        let found = self.taps.iter().find(|(at, towards, _)| at == interface && *towards == direction);
        found.map(|(.., counts)| counts)
    }

    fn remote(&self, address: IpAddr) -> Option<&Stat> {
        self.remotes.iter().find(|(at, _)| *at == address).map(|(_, stat)| stat)
    }

    /// What a tap has counted since this look; all of it where it has come since.
    pub(crate) fn rise_of_tap(&self, seconds: f64, tap: &TapStatus) -> Rise {
        let before = self.tap(&tap.interface, tap.direction).copied().unwrap_or_default();
        let seen = since(tap.counts.choice.seen, before.choice.seen);
        copies_since(seconds, &tap.counts.stat, &before.stat, seen)
    }

    /// The same of a remote.
    pub(crate) fn rise_of_remote(&self, seconds: f64, remote: &RemoteStatus) -> Rise {
        let before = self.remote(remote.address).copied().unwrap_or_default();
        copies_since(seconds, &remote.stat, &before, 0)
    }

    /// Packets that the out interfaces have dropped between this look and a later one.
    pub(crate) fn lost_behind(&self, later: &Look) -> u64 {
        later.behind.saturating_sub(self.behind)
    }
}

/// What does not add up between two looks, a line each: `SUBJECT: FAULT`.
fn faults(first: &Look, second: &Look) -> Vec<String> {
    let mut lines = Vec::new();
    let (asked, dropped) = (grouped(second.tapped().pcnt), grouped(second.dropped));
    let terms = format!("{} sent and {dropped} dropped of {asked} that were asked for", grouped(second.sent().pcnt));
    if let Some(missing) = first.tapped().pcnt.checked_sub(second.accounted()).filter(|n| *n > 0) {
        lines.push(format!("copies: {} are unaccounted for: {terms}", grouped(missing)));
    }
    if let Some(more) = first.accounted().checked_sub(second.tapped().pcnt).filter(|n| *n > 0) {
        lines.push(format!("copies: {} too many: {terms}", grouped(more)));
    }
    for (whose, dropped) in [("taps", first.tapped().dcnt), ("remotes", first.sent().dcnt)] {
        if let Some(more) = dropped.checked_sub(second.dropped).filter(|n| *n > 0) {
            lines.push(format!("drops: the {whose} have {} more than all reasons together", grouped(more)));
        }
    }
    for (interface, direction, counts) in &second.taps {
        let before = first.tap(interface, direction).copied().unwrap_or_default();
        let fault = tap_fault(&before, counts);
        lines.extend(fault.map(|fault| format!("tap {interface} {direction}: {fault}")));
    }
    lines
}

/// How often a fault is asked for again.
const LATER: usize = 3;

/// Those of [`faults`] that stay: what is on its way while a CPU does something else comes a little later.
pub(crate) fn lasting_faults(
    first: &Look,
    second: &Look,
    mut later: impl FnMut() -> Result<Look>,
) -> Result<Vec<String>> {
    let mut lines = faults(first, second);
    for _ in 0..LATER {
        if lines.is_empty() {
            break;
        }
        interrupt::check()?;
        let again = faults(first, &later()?);
        lines.retain(|fault| again.iter().any(|other| subject(other) == subject(fault)));
    }
    Ok(lines)
}

fn subject(fault: &str) -> Option<&str> {
    fault.split(": ").next()
}

/// The same of one tap: seen = filtered + skipped + what is copied. Of each frame that is copied there is one copy at least.
fn tap_fault(first: &TapCounts, second: &TapCounts) -> Option<String> {
    let passed = |counts: &TapCounts| counts.choice.filtered + counts.choice.skipped;
    let shown = |seen: u64, counts: &TapCounts| {
        let (seen, filtered, skipped) =
            (grouped(seen), grouped(counts.choice.filtered), grouped(counts.choice.skipped));
        format!("{seen} seen, {filtered} filtered, {skipped} skipped, {} copies", grouped(counts.stat.pcnt))
    };
    if passed(first) > second.choice.seen {
        return Some(format!("more was left out than seen: {}", shown(second.choice.seen, first)));
    }
    let is_short = first.choice.seen > passed(second) + second.stat.pcnt;
    is_short.then(|| format!("frames are unaccounted for: {}", shown(first.choice.seen, second)))
}

/// Writes what has come since an earlier look into each tap and remote.
pub(crate) fn rise(first: &Look, seconds: f64, second: &mut Session) {
    for tap in &mut second.taps {
        tap.rise = Some(first.rise_of_tap(seconds, tap));
    }
    for remote in &mut second.remotes {
        remote.rise = Some(first.rise_of_remote(seconds, remote));
    }
    second.judge();
}

/// A counter that began again, as with an interface that was made anew, counts from there.
pub(super) fn since(now: u64, before: u64) -> u64 {
    now.checked_sub(before).unwrap_or(now)
}

fn copies_since(seconds: f64, now: &Stat, before: &Stat, seen: u64) -> Rise {
    Rise {
        seconds,
        seen,
        copies: since(now.pcnt, before.pcnt),
        bytes: since(now.bcnt, before.bcnt),
        dropped: since(now.dcnt, before.dcnt),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::abi::Choice;

    fn look(asked: u64, sent: u64, dropped: u64) -> Look {
        let counts = TapCounts {
            stat: Stat { pcnt: asked, ..Stat::default() },
            choice: Choice { seen: asked, ..Choice::default() },
        };
        let sent = Stat { pcnt: sent, ..Stat::default() };
        Look {
            taps: vec![("eth0".into(), "ingress", counts)],
            remotes: vec![([10, 0, 0, 7].into(), sent)],
            dropped,
            ..Look::default()
        }
    }

    #[test]
    fn what_is_asked_for_is_sent_or_dropped_by_the_next_look() {
        assert!(faults(&look(10, 7, 3), &look(10, 7, 3)).is_empty());
        // On their way at the first look, and more asked for since.
        assert!(faults(&look(10, 5, 3), &look(900, 7, 3)).is_empty());
        let missing = faults(&look(1000, 7, 3), &look(1000, 7, 3));
        assert_eq!(missing, ["copies: 990 are unaccounted for: 7 sent and 3 dropped of 1,000 that were asked for"]);
        let more = faults(&look(10, 9, 3), &look(11, 9, 3));
        assert_eq!(more, ["copies: 1 too many: 9 sent and 3 dropped of 11 that were asked for"]);
        let mut by_taps = look(10, 7, 3);
        by_taps.taps[0].2.stat.dcnt = 5;
        assert_eq!(faults(&by_taps, &look(10, 7, 3)), ["drops: the taps have 2 more than all reasons together"]);
    }

    #[test]
    fn what_a_tap_sees_it_copies_or_leaves_out() {
        let counts = |seen, filtered, skipped, pcnt| TapCounts {
            stat: Stat { pcnt, ..Stat::default() },
            choice: Choice { seen, filtered, skipped, own: 0 },
        };
        let fault = |counts: TapCounts| tap_fault(&counts, &counts);
        assert_eq!(fault(counts(9, 3, 1, 5)), None);
        assert_eq!(fault(counts(9, 3, 1, 15)), None, "to three remotes");
        assert!(fault(counts(9, 3, 1, 4)).unwrap().starts_with("frames are unaccounted"));
        assert!(fault(counts(9, 8, 2, 0)).unwrap().starts_with("more was left out"));
    }
}
