//! `--reorder`: copies wait a while, so that one that comes late takes its place, and those of several sockets are put in
//! the order in which they came.

use std::collections::VecDeque;

use crate::collect::source::Number;

/// So many wait at most: memory is not endless, and a frame can have 64 KB.
const MOST: usize = 1 << 18;

/// A number that is so far ahead, and no more, is a later one.
const LATER: u32 = (1 << 31) - 1;

/// What orders a copy among those that wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    /// Sorts all, if there is one: as it came, if not.
    pub time: Option<u64>,
    pub number: Option<Number>,
    /// It has its place by the numbers of its sequence.
    pub late: bool,
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

    pub(crate) fn push(&mut self, now: u64, mut place: Place, value: T) {
        let own = now + self.patience;
        let late = place.number.filter(|_| place.late).and_then(|number| self.before_later(number));
        let at = match (late, place.time) {
            (Some(at), _) => at,
            (None, Some(time)) => self.queue.partition_point(|(_, other, _)| other.time <= Some(time)),
            (None, None) => self.as_it_came(own),
        };
        let mut until = own;
        // One that overtakes others has waited for as long as they have.
        if let Some((theirs, other, _)) = self.queue.get(at)
            && (late.is_some() || place.time.is_some())
        {
            until = *theirs;
            place.time = if late.is_some() { other.time } else { place.time };
        }
        self.queue.insert(at, (until, place, value));
    }

    /// Before those that came later by another socket. Who is to wait much longer came before the clock was set back.
    fn as_it_came(&self, until: u64) -> usize {
        let came_later = |(other, ..): &&(u64, Place, T)| (1..=self.patience).contains(&other.saturating_sub(until));
        self.queue.len() - self.queue.iter().rev().take_while(came_later).count()
    }

    /// Before those of its sequence that are later, and behind the others; None if none is later.
    fn before_later(&self, number: Number) -> Option<usize> {
        let mut at = None;
        for (n, (_, other, _)) in self.queue.iter().enumerate().rev() {
            match other.number.and_then(|other| number.behind(other)) {
                Some(1..=LATER) => at = Some(n),
                Some(_) => break,
                None => {}
            }
        }
        at
    }

    /// Those that wait.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.queue.iter().map(|(_, _, value)| value)
    }

    /// The next one that has waited long enough, or, with `all`, the next one. Nobody waits longer because the clock was
    /// set back.
    pub(crate) fn pop(&mut self, now: u64, all: bool) -> Option<T> {
        let (until, ..) = self.queue.front()?;
        let leaves = all || *until <= now || *until > now + self.patience || self.queue.len() > MOST;
        if leaves { self.queue.pop_front().map(|(_, _, value)| value) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn late_ones_take_their_place_and_others_keep_theirs() {
        let mut waiting = Waiting::new(10);
        let place =
            |late| move |domain, number| Place { time: None, number: Some(Number { domain, epoch: 0, number }), late };
        let (number, after) = (place(false), place(true));
        let all = [(number(0, 1), "a1"), (number(1, 7), "b7"), (number(0, 3), "a3"), (Place::default(), "x")];
        let late = [(after(0, 2), "a2"), (after(1, 6), "b6"), (after(1, u32::MAX), "before"), (number(0, 4), "a4")];
        for (n, (place, name)) in (0..).zip(all.into_iter().chain(late)) {
            waiting.push(n, place, name);
        }
        assert_eq!(waiting.pop(9, false), None);
        let order: Vec<&str> = std::iter::from_fn(|| waiting.pop(12, false)).collect();
        assert_eq!(order, ["a1", "before", "b6", "b7", "a2", "a3"], "{waiting:?}");
        assert_eq!(std::iter::from_fn(|| waiting.pop(12, true)).collect::<Vec<_>>(), ["x", "a4"]);
    }

    #[test]
    fn those_of_several_sockets_are_put_in_the_order_in_which_they_came() {
        let mut waiting = Waiting::new(10);
        [1, 4, 6, 2, 4, 5].into_iter().zip(0..).for_each(|(now, n)| waiting.push(now, Place::default(), (now, n)));
        let order: Vec<(u64, u64)> = std::iter::from_fn(|| waiting.pop(16, false)).collect();
        assert_eq!(order, [(1, 0), (2, 3), (4, 1), (4, 4), (5, 5), (6, 2)]);
    }

    #[test]
    fn late_ones_whose_tunnel_tells_no_time_are_put_before_those_that_they_missed() {
        let mut waiting = Waiting::new(10);
        for (time, (number, late)) in (100..).zip([(0, false), (5, false), (2, true), (4, true), (3, true), (6, false)])
        {
            let number = Some(Number { domain: 0, epoch: 0, number });
            waiting.push(1, Place { time: Some(time), number, late }, number.map(|number| number.number));
        }
        // Another sender's clock is ahead.
        waiting.push(1, Place { time: Some(500), ..Place::default() }, None);
        let twin = Some(Number { domain: 0, epoch: 0, number: 6 });
        waiting.push(1, Place { time: Some(106), number: twin, late: true }, Some(6));
        let order: Vec<Option<u32>> = std::iter::from_fn(|| waiting.pop(1, true)).collect();
        assert_eq!(order, [Some(0), Some(2), Some(3), Some(4), Some(5), Some(6), Some(6), None]);
    }

    #[test]
    fn times_of_all_sources_are_put_in_order() {
        let mut waiting = Waiting::new(10);
        [5, 9, 5, 7, u64::MAX, 1, 8]
            .into_iter()
            .zip(0..)
            .for_each(|(time, n)| waiting.push(n, Place { time: Some(time), ..Place::default() }, (time, n)));
        let order: Vec<(u64, u64)> = std::iter::from_fn(|| waiting.pop(16, false)).collect();
        assert_eq!(order, [(1, 5), (5, 0), (5, 2), (7, 3), (8, 6), (9, 1), (u64::MAX, 4)]);
    }

    #[test]
    fn nobody_waits_for_a_clock_that_was_set_back_nor_do_more_than_there_is_room_for() {
        let mut waiting = Waiting::new(10);
        waiting.push(3_600, Place::default(), "before");
        waiting.push(7, Place::default(), "after");
        assert_eq!([8, 8, 17].map(|now| waiting.pop(now, false)), [Some("before"), None, Some("after")]);
        (0..=MOST).for_each(|_| waiting.push(20, Place::default(), "many"));
        assert_eq!([20, 20].map(|now| waiting.pop(now, false)), [Some("many"), None]);
    }
}
