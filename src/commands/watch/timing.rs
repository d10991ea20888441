//! When to look: pure, so that its rules can be tested without a clock.

use std::time::{Duration, Instant};

/// So long nothing more must come before an event is followed.
const QUIET: Duration = Duration::from_millis(100);
/// An event is followed after so long at most, and there is one look in so long.
const SECOND: Duration = Duration::from_secs(1);
/// How often it is looked for what tells nobody that it has come.
const WAITING: Duration = Duration::from_secs(5);
/// The longest wait after failures.
const LONGEST: Duration = Duration::from_secs(60);

/// What is known of events and looks.
#[derive(Debug)]
pub(super) struct Timing {
    interval: Duration,
    /// The first and the last event since the last look began.
    events: Option<(Instant, Instant)>,
    /// When the last look began, and ended.
    looked: Option<(Instant, Instant)>,
    /// Looks in a row that have failed.
    failures: u32,
    /// Something is waited for of which no event tells.
    is_waiting: bool,
}

impl Timing {
    pub(super) fn new(interval: Duration) -> Timing {
        Timing { interval, events: None, looked: None, failures: 0, is_waiting: false }
    }

    /// Something has changed.
    pub(super) fn event(&mut self, now: Instant) {
        let first = self.events.map_or(now, |(first, _)| first);
        self.events = Some((first, now));
    }

    /// A look begins: it sees all that has come before.
    pub(super) fn begin(&mut self, now: Instant) {
        self.events = None;
        self.looked = Some((now, now));
    }

    pub(super) fn end(&mut self, now: Instant, has_failed: bool, is_waiting: bool) {
        self.is_waiting = is_waiting;
        self.looked = self.looked.map(|(begun, _)| (begun, now));
        self.failures = if has_failed { self.failures + 1 } else { 0 };
    }

    /// When the next look is due.
    pub(super) fn due(&self, now: Instant) -> Instant {
        let Some((begun, ended)) = self.looked else { return now };
        let again = ended + self.pause();
        match self.events {
            Some((first, last)) => (last + QUIET).min(first + SECOND).max(begun + SECOND).min(again.max(now)),
            None => again,
        }
    }

    /// Has the next look no event behind it?
    pub(super) fn is_for_all(&self, now: Instant) -> bool {
        self.looked.is_none_or(|(_, ended)| now >= ended + self.interval)
    }

    /// From one look to the next without an event.
    fn pause(&self) -> Duration {
        match self.failures {
            0 if self.is_waiting => self.interval.min(WAITING),
            0 => self.interval,
            n => SECOND.saturating_mul(1 << (n - 1).min(6)).min(LONGEST),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// The milliseconds at which looks begin that take 50 each, until `end`; `fails` says which of them fail.
    fn looks(events: &[u32], end: u32, interval: u32, fails: impl Fn(usize) -> bool) -> Vec<u32> {
        let start = Instant::now();
        let mut timing = Timing::new(interval * MS);
        let (mut begun, mut ends): (Vec<u32>, Option<u32>) = (Vec::new(), None);
        for at in 0..end {
            let now = start + at * MS;
            if events.contains(&at) {
                timing.event(now);
            }
            if ends == Some(at) {
                timing.end(now, fails(begun.len() - 1), false);
                ends = None;
            }
            if ends.is_none() && timing.due(now) <= now {
                timing.begin(now);
                begun.push(at);
                ends = Some(at + 50);
            }
        }
        begun
    }

    #[test]
    fn an_event_is_followed_soon_and_a_flap_once_a_second_and_once_more() {
        let never = |_| false;
        assert_eq!(looks(&[], 3000, 30_000, never), [0]);
        assert_eq!(looks(&[2000], 4000, 30_000, never), [0, 2100], "100 ms of quiet");
        assert_eq!(looks(&[10], 4000, 30_000, never), [0, 1000], "no two in one second");
        assert_eq!(looks(&[2000, 2050, 2120], 4000, 30_000, never), [0, 2220]);
        let flap: Vec<u32> = (2000..5000).step_by(50).collect();
        assert_eq!(looks(&flap, 8000, 30_000, never), [0, 3000, 4050, 5050], "after a second at most");
        let slow: Vec<u32> = (2000..5000).step_by(300).collect();
        let begun = looks(&slow, 8000, 30_000, never);
        assert!(begun.windows(2).all(|pair| pair[1] - pair[0] >= 1000), "at most one a second: {begun:?}");
        assert!(slow.iter().all(|at| begun.iter().any(|look| (*at..=at + 1000).contains(look))), "{begun:?}");
    }

    #[test]
    fn without_events_there_is_a_look_an_interval_and_after_failures_later_and_later() {
        assert_eq!(looks(&[], 3200, 1000, |_| false), [0, 1050, 2100, 3150]);
        let failing = looks(&[], 300_000, 1000, |_| true);
        let pauses: Vec<u32> = failing.windows(2).map(|pair| (pair[1] - pair[0] - 50) / 1000).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        let begun = looks(&[20_000], 25_000, 1000, |at| at < 5);
        assert_eq!(
            begun,
            [0, 1050, 3100, 7150, 15_200, 20_100, 21_150, 22_200, 23_250, 24_300],
            "any event ends the wait"
        );
    }
}
