//! What sequence numbers tell: what is missing, what came late, and what came twice. A sequence that begins again, as with
//! a new session of the sender, is no loss.

use serde::{Deserialize, Serialize};

/// Numbers that are remembered: so late a frame may be.
const WINDOW: u32 = 4096;
const WORDS: usize = WINDOW as usize / 64;
/// Numbers whose frames are known again.
const PRINTS: u32 = 256;
/// A leap forward by more is another sequence.
pub(crate) const LEAP: u32 = 1 << 24;
/// So many frames that were there before, one after the other from the first number on, are a sequence that has begun
/// again, as are more from elsewhere, and two of which one is another frame than before. Number 0 alone is one if it is
/// another frame, or comes so much later, in nanoseconds.
const AGAIN: u32 = 3;
const MANY: u32 = 64;
const LATE: u64 = 1_000_000_000;
/// So far before the first number that was seen a frame can still be a late one; a 0, which begins a sequence, less far.
const BEFORE: u32 = 64;
const ZERO_BEFORE: u32 = 8;
/// A frame with an earlier number that was taken so much later is one of another sequence, in nanoseconds.
const TAKEN_LATER: u64 = 10_000_000;

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

/// What arrives: a frame's number, what it is known again by, and when it was taken and came, in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    pub number: u32,
    /// Of frames with one number, those with another print are others.
    pub print: u32,
    pub taken: Option<u64>,
    pub now: u64,
}

/// Frames with numbers that follow one another, all of which are behind the highest: they may be another sequence.
#[derive(Clone, Copy, Debug)]
struct Row {
    start: u32,
    last: u32,
    length: u32,
    /// Numbers of it that came once more.
    repeated: u64,
    /// The counts before it.
    before: Counts,
}

/// The sequence as it was before it began again, as long as that may have been a mistake.
#[derive(Debug)]
struct Former {
    sequence: Sequence,
    /// Frames that it has counted, and that the new one has taken over.
    taken_over: u64,
    /// The counts with which the new one has begun.
    base: Counts,
    is_certain: bool,
}

/// One sequence of a sender.
#[derive(Debug)]
pub(crate) struct Sequence {
    /// The first number, the highest, and when the first came.
    begin: Option<(u32, u64)>,
    highest: u32,
    /// When the last of its frames was taken.
    taken: u64,
    /// A bit for each of the last numbers, and the prints of the last frames.
    seen: [u64; WORDS],
    prints: [u32; PRINTS as usize],
    row: Option<Row>,
    /// One from far away. If the next one follows it, the sequence has begun again there.
    far: Option<u32>,
    former: Option<Box<Former>>,
    /// Numbers of one epoch can be compared.
    pub epoch: u64,
    epochs: u64,
    pub run: Run,
    pub counts: Counts,
}

impl Sequence {
    pub(crate) fn new() -> Sequence {
        Sequence {
            begin: None,
            highest: 0,
            taken: 0,
            seen: [0; WORDS],
            prints: [0; PRINTS as usize],
            row: None,
            far: None,
            former: None,
            epoch: 0,
            epochs: 0,
            run: Run::default(),
            counts: Counts::default(),
        }
    }

    /// Takes what arrives, and tells what its number says.
    pub(crate) fn arrive(&mut self, new: Arrival) -> Seen {
        let Some((first, _)) = self.begin else {
            self.start(&new);
            return Seen::New(0);
        };
        self.resume(new.number);
        let far = self.far.take();
        let ahead = new.number.wrapping_sub(self.highest);
        if (1..LEAP).contains(&ahead) {
            self.row = None;
            self.advance(ahead, new.print);
            self.taken = self.taken.max(new.taken.unwrap_or(0));
            self.counts.lost += u64::from(ahead - 1);
            return Seen::New(ahead - 1);
        }
        let behind = self.highest.wrapping_sub(new.number);
        if behind < LEAP && new.taken.is_some_and(|taken| taken > self.taken.saturating_add(TAKEN_LATER)) {
            return self.again(&new, true);
        }
        if behind >= WINDOW {
            return self.far_off(&new, far);
        }
        if self.has(new.number) {
            return self.repeated(&new);
        }
        if (1..LEAP).contains(&first.wrapping_sub(new.number)) {
            return self.before_first(&new, first, far);
        }
        self.row = None;
        self.late(&new);
        self.counts.lost = self.counts.lost.saturating_sub(1);
        Seen::Late
    }

    fn late(&mut self, new: &Arrival) {
        self.set(new.number, new.print);
        self.run.arrived += 1;
        self.counts.reordered += 1;
    }

    /// A number that was there: the same frame came twice, or it is one of a sequence that begins again.
    fn repeated(&mut self, new: &Arrival) -> Seen {
        let is_other = self.highest.wrapping_sub(new.number) < PRINTS && self.print(new.number) != new.print;
        let row = self.row(new.number);
        if is_other && (new.number == 0 || row.length > 1) {
            return self.again(new, true);
        }
        if self.is_later_zero(new) || row.length >= MANY || (row.length >= AGAIN && row.start == self.run.first) {
            return self.again(new, false);
        }
        self.counts.doubled += 1;
        Seen::Twice
    }

    /// Before the first one: it was overtaken there, or another sequence begins.
    fn before_first(&mut self, new: &Arrival, first: u32, far: Option<u32>) -> Seen {
        let before = first.wrapping_sub(new.number);
        if new.number == 0 && before > ZERO_BEFORE {
            return self.again(new, false);
        }
        if before > BEFORE || self.highest.wrapping_sub(first) > BEFORE {
            return self.far_off(new, far);
        }
        self.row(new.number);
        self.late(new);
        match self.run.first.wrapping_sub(new.number) {
            earlier @ 1..LEAP => {
                self.run.first = new.number;
                self.run.span += u64::from(earlier);
                self.counts.lost += u64::from(earlier - 1);
            }
            _ => self.counts.lost = self.counts.lost.saturating_sub(1),
        }
        Seen::Late
    }

    /// A number far from the others is that of a packet that was very late, or the first of a sequence that begins again:
    /// the next one tells, or a 0 so much later.
    fn far_off(&mut self, new: &Arrival, far: Option<u32>) -> Seen {
        if let Some(far) = far
            && let follows @ 1..=BEFORE = new.number.wrapping_sub(far)
        {
            self.counts.reordered -= 1;
            self.again(&Arrival { number: far, ..*new }, true);
            self.advance(follows, new.print);
            self.counts.lost += u64::from(follows - 1);
            return Seen::Again;
        }
        if self.is_later_zero(new) {
            return self.again(new, true);
        }
        self.far = Some(new.number);
        self.counts.reordered += 1;
        Seen::Late
    }

    fn is_later_zero(&self, new: &Arrival) -> bool {
        new.number == 0 && new.now.saturating_sub(self.begun()) > LATE
    }

    /// The row that this number, which is behind the highest, goes on or begins. To be called before it is counted.
    fn row(&mut self, number: u32) -> Row {
        let row = match self.row {
            Some(row) if row.last == number => Row { repeated: row.repeated + 1, ..row },
            Some(row) if row.last.wrapping_add(1) == number => Row { last: number, length: row.length + 1, ..row },
            _ => Row { start: number, last: number, length: 1, repeated: 0, before: self.counts },
        };
        *self.row.insert(row)
    }

    /// Begins again with this number, or with the row that it ends or would go on: what that has counted is undone.
    fn again(&mut self, new: &Arrival, is_certain: bool) -> Seen {
        let row = self.row.take().filter(|row| new.number.wrapping_sub(row.last) <= 1 && row.length > 1);
        let (start, mut counts) = row.map_or((new.number, self.counts), |row| (row.start, row.before));
        counts.doubled += row.map_or(0, |row| row.repeated);
        counts.restarts += 1;
        let epoch = self.epochs + 1;
        let mut sequence = Sequence { counts, epoch, epochs: epoch, ..Sequence::new() };
        sequence.start(&Arrival { number: start, print: self.print(start), ..*new });
        for _ in 0..new.number.wrapping_sub(start) {
            let number = sequence.highest.wrapping_add(1);
            sequence.advance(1, self.print(number));
        }
        sequence.set(new.number, new.print);
        let taken_over = sequence.run.arrived - 1;
        let mut former = std::mem::replace(self, sequence);
        former.former = None;
        self.former = Some(Box::new(Former { sequence: former, taken_over, base: counts, is_certain }));
        Seen::Again
    }

    fn print(&self, number: u32) -> u32 {
        self.prints[(number % PRINTS) as usize]
    }

    /// It had not begun again where its old numbers go on: those in between came twice.
    fn resume(&mut self, number: u32) {
        let Some(former) = &self.former else { return };
        let [ahead, old] = [self.highest, former.sequence.highest].map(|highest| number.wrapping_sub(highest));
        let is_overtaken = former.sequence.highest.wrapping_sub(self.highest) >= LEAP;
        if is_overtaken || (former.is_certain && self.run.arrived >= u64::from(AGAIN)) {
            self.former = None;
        } else if (1..=BEFORE).contains(&old)
            && old < ahead
            && let Some(former) = self.former.take()
        {
            let Former { mut sequence, taken_over, base, .. } = *former;
            let since = self.counts.doubled - base.doubled + self.counts.reordered - base.reordered;
            sequence.counts.doubled += self.run.arrived - taken_over + since;
            sequence.epochs = self.epochs;
            *self = sequence;
        }
    }

    fn start(&mut self, new: &Arrival) {
        self.begin = Some((new.number, new.now));
        self.highest = new.number;
        self.taken = new.taken.unwrap_or(0);
        self.run = Run { first: new.number, next: new.number.wrapping_add(1), arrived: 1, span: 1 };
        self.set(new.number, new.print);
    }

    /// When it began, or last began again, in nanoseconds.
    pub(crate) fn begun(&self) -> u64 {
        self.begin.map_or(0, |(_, begun)| begun)
    }

    fn advance(&mut self, by: u32, print: u32) {
        if by >= WINDOW {
            self.seen = [0; WORDS];
        } else {
            (1..by).for_each(|n| self.clear(self.highest.wrapping_add(n)));
        }
        self.highest = self.highest.wrapping_add(by);
        self.run.next = self.highest.wrapping_add(1);
        self.run.arrived += 1;
        self.run.span += u64::from(by);
        self.set(self.highest, print);
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

    fn set(&mut self, number: u32, print: u32) {
        let (word, bit) = Sequence::at(number);
        self.seen[word] |= bit;
        if self.highest.wrapping_sub(number) < PRINTS {
            self.prints[(number % PRINTS) as usize] = print;
        }
    }

    fn clear(&mut self, number: u32) {
        let (word, bit) = Sequence::at(number);
        self.seen[word] &= !bit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Frames with one number are the same.
    fn same(number: u32, now: u64) -> Arrival {
        Arrival { number, print: number, taken: None, now }
    }

    fn all(arrivals: impl IntoIterator<Item = Arrival>) -> Sequence {
        let mut sequence = Sequence::new();
        arrivals.into_iter().for_each(|new| {
            sequence.arrive(new);
        });
        sequence
    }

    fn after(numbers: impl IntoIterator<Item = u32>) -> Counts {
        all(numbers.into_iter().map(|number| same(number, 0))).counts
    }

    /// Each frame is another.
    fn other(numbers: impl IntoIterator<Item = u32>) -> Counts {
        let others = (0..).zip(numbers).map(|(print, number)| Arrival { number, print, taken: None, now: 0 });
        all(others).counts
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
        assert_eq!([0, 1, 2].map(|n| sequence.arrive(same(n, 5))), [Seen::New(0); 3]);
        assert_eq!(
            (sequence.arrive(same(0, 2 * LATE)), sequence.arrive(same(1, 2 * LATE))),
            (Seen::Again, Seen::New(0))
        );
        assert_eq!(sequence.counts, counts(0, 0, 0, 1));
    }

    #[test]
    fn one_number_far_off_away_is_no_sequence() {
        assert_eq!(after((0..8000).chain([10]).chain(8000..8002)), counts(0, 1, 0, 0));
        assert_eq!(after([10_000, 5905, 10_001, 100_000_000, 10_002]), counts(0, 2, 0, 0));
        assert_eq!(after((0..8000).chain([10, 13, 14])), counts(2, 0, 0, 1));
        let mut sequence = Sequence::new();
        for number in 0..9000 {
            sequence.arrive(same(number, 0));
        }
        assert_eq!((sequence.arrive(same(0, 2 * LATE)), sequence.begun()), (Seen::Again, 2 * LATE));
        assert_eq!(sequence.counts, counts(0, 0, 0, 1));
    }

    #[test]
    fn frames_that_came_twice_are_no_sequence() {
        assert_eq!(after((0..20).chain(5..8).chain(20..40)), counts(0, 0, 3, 0));
        assert_eq!(after((0..200).chain(0..3).chain(200..300)), counts(0, 0, 3, 0), "its first ones");
        assert_eq!(after((0..200).chain(0..3).chain(202..300)), counts(2, 0, 3, 0), "with a loss behind them");
        assert_eq!(after((0..200).chain(100..170).chain(200..300)), counts(0, 0, 70, 0), "many");
        assert_eq!(other((0..100).chain([40]).chain(100..200)), counts(0, 0, 1, 0), "one of others");
    }

    #[test]
    fn other_frames_with_the_same_numbers_are_a_sequence_that_begins_again() {
        assert_eq!(other([0, 0]), counts(0, 0, 0, 1));
        assert_eq!(other([0, 1, 2, 5, 4, 6, 6, 9, 0, 1, 2, 3, 4]), counts(3, 1, 1, 1));
        assert_eq!(other([0, 1, 2, 0, 1, 2]), counts(0, 0, 0, 1));
        assert_eq!(other((5..10).chain(0..7)), counts(0, 0, 0, 1), "from before the first");
        assert_eq!(other((20..30).chain(0..10)), counts(0, 0, 0, 1));
        assert_eq!(other((0..100).chain(0..50).chain(101..110)), counts(51, 0, 0, 1));
        assert_eq!(after((0..100).chain([0, 0, 1, 1, 2, 2, 3, 3])), counts(0, 0, 4, 1));
    }

    #[test]
    fn an_earlier_number_that_was_taken_later_begins_a_sequence() {
        let taken = |numbers: &[(u32, u64)]| {
            all(numbers.iter().map(|(number, ms)| Arrival { taken: Some(ms * 1_000_000), ..same(*number, 0) })).counts
        };
        assert_eq!(taken(&[(5, 100), (6, 101), (4, 99), (7, 103)]), counts(0, 1, 0, 0));
        assert_eq!(taken(&[(5, 100), (7, 101), (6, 105)]), counts(0, 1, 0, 0), "of two CPUs");
        assert_eq!(taken(&[(5, 100), (6, 101), (4, 400), (5, 401), (6, 402), (7, 403)]), counts(0, 0, 0, 1));
        assert_eq!(taken(&[(9000, 100), (1, 400)]), counts(0, 0, 0, 1));
        assert_eq!(taken(&[(0, 100), (0, 100)]), counts(0, 0, 1, 0));
    }

    /// Lost is what the numbers since it began span, without those that arrived.
    #[test]
    fn what_is_missing_before_the_first_is_lost_until_it_comes() {
        assert_eq!(after([5, 6, 7, 3, 8]), counts(1, 1, 0, 0));
        assert_eq!(after([5, 6, 7, 3, 4, 8]), counts(0, 2, 0, 0));
    }

    #[test]
    fn what_came_since_it_last_began_is_told() {
        let run = |numbers: &[u32]| {
            let Run { first, next, arrived, span } = all(numbers.iter().map(|number| same(*number, 0))).run;
            (first, next, arrived, span)
        };
        assert_eq!(run(&[5, 6, 9, 9, 8]), (5, 10, 4, 5));
        assert_eq!(run(&[3, 1, 4]), (1, 5, 3, 4));
        assert_eq!(run(&[u32::MAX, 1]), (u32::MAX, 2, 2, 3));
        assert_eq!(run(&[0, 1, 2, 3, 4, 0, 1, 2, 4]), (0, 5, 4, 5), "the second time");
    }
}
