//! `--reorder`: copies wait a while, so that one that comes late takes its place.

use std::collections::VecDeque;

/// What orders a copy among those that wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Behind all that have come before.
    Last,
    /// By the numbers of one sequence, until it begins again (`epoch`). Only one that is `late` overtakes others.
    Number { domain: usize, epoch: u64, number: u32, late: bool },
    /// By time, among all sources.
    Time(u64),
}

impl Place {
    /// Does a copy with this place go before one with the other?
    fn precedes(self, other: Place) -> Option<bool> {
        match (self, other) {
            (Place::Time(ours), Place::Time(theirs)) => Some(ours < theirs),
            (
                Place::Number { domain, epoch, number, late },
                Place::Number { domain: other, epoch: then, number: theirs, .. },
            ) if (domain, epoch) == (other, then) => Some(late && (1..1 << 31).contains(&theirs.wrapping_sub(number))),
            _ => None,
        }
    }
}

/// Copies that wait, in the order in which they will leave.
#[derive(Debug)]
pub(crate) struct Waiting<T> {
    queue: VecDeque<(u64, Place, T)>,
    patience: u64,
}

impl<T> Waiting<T> {
    pub(crate) fn new(patience: u64) -> Waiting<T> {
        Waiting { queue: VecDeque::new(), patience }
    }

    pub(crate) fn push(&mut self, now: u64, place: Place, value: T) {
        let mut at = self.queue.len();
        if !matches!(place, Place::Last | Place::Number { late: false, .. }) {
            for (n, (_, other, _)) in self.queue.iter().enumerate().rev() {
                match place.precedes(*other) {
                    Some(true) => at = n,
                    Some(false) => break,
                    None => {}
                }
            }
        }
        let until = if at < self.queue.len() { self.queue[at].0 } else { now + self.patience };
        self.queue.insert(at, (until, place, value));
    }

    /// The next one that has waited long enough, or, with `all`, the next one.
    pub(crate) fn pop(&mut self, now: u64, all: bool) -> Option<T> {
        let (until, ..) = self.queue.front()?;
        if all || *until <= now { self.queue.pop_front().map(|(_, _, value)| value) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn late_ones_take_their_place_and_others_keep_theirs() {
        let mut waiting = Waiting::new(10);
        let number = |domain, number| Place::Number { domain, epoch: 0, number, late: false };
        let after = |domain, number| Place::Number { domain, epoch: 0, number, late: true };
        let all = [(number(0, 1), "a1"), (number(1, 7), "b7"), (number(0, 3), "a3"), (Place::Last, "x")];
        let late = [(after(0, 2), "a2"), (after(1, 6), "b6"), (after(1, u32::MAX), "before"), (number(0, 4), "a4")];
        for (n, (place, name)) in (0..).zip(all.into_iter().chain(late)) {
            waiting.push(n, place, name);
        }
        assert_eq!(waiting.pop(9, false), None);
        let order: Vec<&str> = std::iter::from_fn(|| waiting.pop(12, false)).collect();
        assert_eq!(order, ["a1", "before", "b6", "b7", "a2", "a3"], "{waiting:?}");
        assert_eq!(std::iter::from_fn(|| waiting.pop(12, true)).collect::<Vec<_>>(), ["x", "a4"]);
    }
}
