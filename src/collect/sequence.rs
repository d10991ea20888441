//! What sequence numbers tell: what is missing, what came late, and what came twice. A sequence that begins again, as with
//! a new session of the sender, is no loss.

use serde::{Deserialize, Serialize};

/// Numbers that are remembered: so late a frame may be.
const WINDOW: u32 = 4096;
const WORDS: usize = WINDOW as usize / 64;
/// A leap forward by more is another sequence.
const LEAP: u32 = 1 << 24;
/// So many numbers that were there before, one after the other, are a sequence that has begun again. Number 0 alone is one
/// if it comes so much later, in nanoseconds.
const AGAIN: u32 = 3;
const LATE: u64 = 1_000_000_000;
/// So far before the first number that was seen a frame can still be a late one.
const BEFORE: u32 = 64;

/// What a number says of its frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// The next one, or one behind a gap of so many.
    New(u32),
    /// One that was missing.
    Late,
    Twice,
    /// The sequence has begun again.
    Again,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub lost: u64,
    pub reordered: u64,
    pub doubled: u64,
    pub restarts: u64,
}

/// The numbers since a sequence has begun, or begun again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Run {
    /// The one that came first.
    pub first: u32,
    /// The one behind the highest.
    pub next: u32,
    /// From the first to the highest, those that came.
    pub arrived: u64,
    /// All of them.
    pub span: u64,
}

/// One sequence of a sender.
#[derive(Debug)]
pub(crate) struct Sequence {
    /// The first number, the highest, and when the first came.
    begin: Option<(u32, u64)>,
    highest: u32,
    /// A bit for each of the last numbers.
    seen: [u64; WORDS],
    /// The last number that came twice, and how many did before it in one row.
    again: Option<(u32, u32)>,
    /// One from far away. If the next one follows it, the sequence has begun again there.
    far: Option<u32>,
    pub run: Run,
    pub counts: Counts,
}

impl Sequence {
    pub(crate) fn new() -> Sequence {
        Sequence {
            begin: None,
            highest: 0,
            seen: [0; WORDS],
            again: None,
            far: None,
            run: Run::default(),
            counts: Counts::default(),
        }
    }

    /// Takes the number of a frame that came at `now`, in nanoseconds.
    pub(crate) fn arrive(&mut self, number: u32, now: u64) -> Seen {
        let Some((first, begun)) = self.begin else {
            self.start(number, now);
            return Seen::New(0);
        };
        let far = self.far.take();
        let ahead = number.wrapping_sub(self.highest);
        if (1..LEAP).contains(&ahead) {
            self.again = None;
            self.advance(ahead);
            self.counts.lost += u64::from(ahead - 1);
            return Seen::New(ahead - 1);
        }
        let behind = self.highest.wrapping_sub(number);
        let before = first.wrapping_sub(number);
        if behind >= WINDOW {
            return self.far_off(number, far, now);
        }
        if self.has(number) {
            let run = self.again.filter(|(last, _)| last.wrapping_add(1) == number).map_or(1, |(_, length)| length + 1);
            let is_much_later = number == 0 && now.saturating_sub(begun) > LATE;
            if is_much_later || (run >= AGAIN && behind > 0) {
                self.counts.doubled -= u64::from(run - 1);
                let start = number.wrapping_sub(run - 1);
                self.again(start, now);
                (1..run).for_each(|_| self.advance(1));
                return Seen::Again;
            }
            self.again = Some((number, run));
            self.counts.doubled += 1;
            return Seen::Twice;
        }
        if (1..LEAP).contains(&before) {
            // Before the first one: it was overtaken there, or another sequence begins.
            if before > BEFORE || self.highest.wrapping_sub(first) > BEFORE {
                return self.far_off(number, far, now);
            }
            let earlier = self.run.first.wrapping_sub(number);
            if (1..LEAP).contains(&earlier) {
                self.run.first = number;
                self.run.span += u64::from(earlier);
            }
        } else {
            self.counts.lost = self.counts.lost.saturating_sub(1);
        }
        self.set(number);
        self.run.arrived += 1;
        self.counts.reordered += 1;
        Seen::Late
    }

    fn start(&mut self, number: u32, now: u64) {
        self.begin = Some((number, now));
        self.highest = number;
        self.seen = [0; WORDS];
        self.again = None;
        self.run = Run { first: number, next: number.wrapping_add(1), arrived: 1, span: 1 };
        self.set(number);
    }

    /// A number far from the others is that of a packet that was very late, or the first of a sequence that begins again:
    /// the next one tells, or a 0 so much later.
    fn far_off(&mut self, number: u32, far: Option<u32>, now: u64) -> Seen {
        if let Some(far) = far
            && let follows @ 1..=BEFORE = number.wrapping_sub(far)
        {
            self.counts.reordered -= 1;
            self.again(far, now);
            self.advance(follows);
            self.counts.lost += u64::from(follows - 1);
            return Seen::Again;
        }
        if number == 0 && now.saturating_sub(self.begun()) > LATE {
            return self.again(number, now);
        }
        self.far = Some(number);
        self.counts.reordered += 1;
        Seen::Late
    }

    /// When it began, or last began again, in nanoseconds.
    pub(crate) fn begun(&self) -> u64 {
        self.begin.map_or(0, |(_, begun)| begun)
    }

    fn again(&mut self, number: u32, now: u64) -> Seen {
        self.counts.restarts += 1;
        self.start(number, now);
        Seen::Again
    }

    fn advance(&mut self, by: u32) {
        if by >= WINDOW {
            self.seen = [0; WORDS];
        } else {
            (1..by).for_each(|n| self.clear(self.highest.wrapping_add(n)));
        }
        self.highest = self.highest.wrapping_add(by);
        self.run.next = self.highest.wrapping_add(1);
        self.run.arrived += 1;
        self.run.span += u64::from(by);
        self.set(self.highest);
        // What lies before the window is settled. The first number stays near, so that it is not taken for a later one.
        if let Some((first, _)) = &mut self.begin
            && self.highest.wrapping_sub(*first) > WINDOW
        {
            *first = self.highest.wrapping_sub(WINDOW);
        }
    }

    fn at(number: u32) -> (usize, u64) {
        let bit = number % WINDOW;
        (bit as usize / 64, 1 << (bit % 64))
    }

    fn has(&self, number: u32) -> bool {
        let (word, bit) = Sequence::at(number);
        self.seen[word] & bit != 0
    }

    fn set(&mut self, number: u32) {
        let (word, bit) = Sequence::at(number);
        self.seen[word] |= bit;
    }

    fn clear(&mut self, number: u32) {
        let (word, bit) = Sequence::at(number);
        self.seen[word] &= !bit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(numbers: impl IntoIterator<Item = u32>) -> Counts {
        let mut sequence = Sequence::new();
        numbers.into_iter().for_each(|number| {
            sequence.arrive(number, 0);
        });
        sequence.counts
    }

    fn counts(lost: u64, reordered: u64, doubled: u64, restarts: u64) -> Counts {
        Counts { lost, reordered, doubled, restarts }
    }

    #[test]
    fn numbers_are_counted_as_what_they_are() {
        assert_eq!(after(0..10_000), counts(0, 0, 0, 0));
        assert_eq!(after([5, 6, 9, 10]), counts(2, 0, 0, 0));
        assert_eq!(after([5, 7, 6, 8]), counts(0, 1, 0, 0));
        assert_eq!(after([1, 0, 2]), counts(0, 1, 0, 0));
        assert_eq!(after((0..500).flat_map(|n| [n, n])), counts(0, 0, 500, 0));
        assert_eq!(after([u32::MAX - 1, u32::MAX, 0, 2]), counts(1, 0, 0, 0));
        assert_eq!(after((0..9000).filter(|n| n % 100 != 7)), counts(90, 0, 0, 0));
    }

    #[test]
    fn a_sequence_that_begins_again_is_no_loss() {
        assert_eq!(after((0..100).chain(0..100)), counts(0, 0, 0, 1));
        assert_eq!(after((500..600).chain(0..10)), counts(0, 0, 0, 1));
        assert_eq!(after((0..50_000).chain(0..50_000).chain(0..9)), counts(0, 0, 0, 2));
        assert_eq!(after((0..100).chain(100_000_000..100_000_009)), counts(0, 0, 0, 1));
        let mut sequence = Sequence::new();
        assert_eq!([0, 1, 2].map(|n| sequence.arrive(n, 5)), [Seen::New(0); 3]);
        assert_eq!((sequence.arrive(0, 2 * LATE), sequence.arrive(1, 2 * LATE)), (Seen::Again, Seen::New(0)));
        assert_eq!(sequence.counts, counts(0, 0, 0, 1));
    }

    #[test]
    fn one_number_far_off_away_is_no_sequence() {
        assert_eq!(after((0..8000).chain([10]).chain(8000..8002)), counts(0, 1, 0, 0));
        assert_eq!(after([10_000, 5905, 10_001, 100_000_000, 10_002]), counts(0, 2, 0, 0));
        assert_eq!(after((0..8000).chain([10, 13, 14])), counts(2, 0, 0, 1));
        let mut sequence = Sequence::new();
        for number in 0..9000 {
            sequence.arrive(number, 0);
        }
        assert_eq!((sequence.arrive(0, 2 * LATE), sequence.begun()), (Seen::Again, 2 * LATE));
        assert_eq!(sequence.counts, counts(0, 0, 0, 1));
    }

    #[test]
    fn what_came_since_it_last_began_is_told() {
        let run = |numbers: &[u32]| {
            let mut sequence = Sequence::new();
            numbers.iter().for_each(|number| {
                sequence.arrive(*number, 0);
            });
            let Run { first, next, arrived, span } = sequence.run;
            (first, next, arrived, span)
        };
        assert_eq!(run(&[5, 6, 9, 9, 8]), (5, 10, 4, 5));
        assert_eq!(run(&[3, 1, 4]), (1, 5, 3, 4));
        assert_eq!(run(&[u32::MAX, 1]), (u32::MAX, 2, 2, 3));
        assert_eq!(run(&[0, 1, 2, 3, 4, 0, 1, 2, 4]), (0, 5, 4, 5), "the second time");
    }
}
