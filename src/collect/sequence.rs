//! What sequence numbers tell: what is missing, what came late, and what came twice. A sequence that begins again, as with
//! a new session of the sender, is no loss.
//!
//! A number that is not ahead can mean several things, and what comes next tells which. So each reading of it is followed,
//! and the one that has the least to explain is believed: a frame that is lost, late or there twice costs one, a sequence
//! that begins again a little more.

use serde::{Deserialize, Serialize};

/// Numbers whose frames are remembered: so late a frame may be.
const WINDOW: u32 = 4096;
const WORDS: usize = WINDOW as usize / 64;
/// A leap forward by more is another sequence.
pub(crate) const LEAP: u32 = 1 << 24;
/// So far before the first number that was seen a frame can still be a late one.
const BEFORE: u32 = 64;
/// A 0 that comes so much later than the sequence began is the first of another, in nanoseconds.
const LATE: u64 = 1_000_000_000;
/// A frame with an earlier number that was taken so much later is one of another sequence, in nanoseconds.
const TAKEN_LATER: u64 = 10_000_000;
/// Old frames may still come when a sequence has begun again, so many frames long.
const HARDLY_BEGUN: u64 = 3;

/// What readings cost. A frame that is lost, late or doubled costs `FRAME`.
mod cost {
    pub(super) const FRAME: u64 = 2;
    /// A sequence begins again: at number 0 after a while, or anywhere; and for each number of it that did not come first.
    pub(super) const AGAIN_LATER: u64 = 1;
    pub(super) const AGAIN: u64 = 5;
    /// Besides: another frame with a number that was there, or one that was taken later than those behind it.
    pub(super) const OTHER: u64 = 6;
    /// One more, before the next that is ahead.
    pub(super) const OTHERS: u64 = 30;
    pub(super) const TAKEN_LATER: u64 = 64;
    /// A number is late by far.
    pub(super) const FAR: u64 = 4;
    /// A sequence that began again repeats a frame with its time, or lacks what the one before lacked.
    pub(super) const SAME_TIME: u64 = 8;
    pub(super) const SAME_GAP: u64 = 128;
    /// The same frames begin a sequence elsewhere than the first did.
    pub(super) const ELSEWHERE: u64 = 128;
    /// One whose frames are those of before has a gap where the old numbers go on.
    pub(super) const GOES_ON: u64 = 1 << 32;
    /// A reading that costs so much more than the best is not thought of, or is given up.
    pub(super) const DOUBT: u64 = 256;
    pub(super) const MOST: u64 = 2048;
}

/// So many readings are followed at most, and so many of the past are known.
const READINGS: usize = 6;
const PAST: usize = 4;

/// What a number says of its frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// The next one, or one behind a gap of so many.
    New(u32),
    /// One that was missing.
    Late,
    /// The same frame again.
    Twice,
    /// One behind the others that has no place among them: late by far, or of another sequence.
    Behind,
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

/// One sequence of a sender.
#[derive(Debug, Default)]
pub(crate) struct Sequence {
    /// Those that may be right, older ones first, and the one that is believed.
    readings: Vec<Reading>,
    believed: usize,
    /// Those that were believed, as they were then.
    past: Vec<Reading>,
    epochs: u64,
}

impl Sequence {
    /// Takes what arrives, and tells what its number says.
    pub(crate) fn arrive(&mut self, new: Arrival) -> Seen {
        if self.readings.is_empty() {
            self.readings.push(Reading::begin(&new, 0));
            return Seen::New(0);
        }
        if let [only] = &mut self.readings[..] {
            match new.number.wrapping_sub(only.highest) {
                0 if only.knows(&new) == Some(true) => {
                    only.counts.doubled += 1;
                    return Seen::Twice;
                }
                ahead @ 1..LEAP => return only.advance(ahead, &new),
                _ => {}
            }
        }
        let before = &self.readings[self.believed];
        let (epoch, start) = (before.epoch, self.epochs + 1);
        let again = before.again(&new, start);
        let said = self.hear(&new);
        let is_explained = said.contains(&Said::Seen(Seen::New(0)));
        if !is_explained && let Some(again) = again {
            self.epochs = start;
            let is_certain = again.is_certain || said[self.believed] == Said::Other;
            let is_same = said[self.believed] == Said::Seen(Seen::Twice);
            let elsewhere = if is_same && again.skipped > 0 { cost::ELSEWHERE } else { 0 };
            self.readings.push(Reading { is_certain, is_same, extra: again.extra + elsewhere, ..again });
        }
        let seen = self.believe(&said, epoch);
        self.tidy();
        seen
    }

    /// Each reading hears of it, older ones first: what they know helps the younger ones.
    fn hear(&mut self, new: &Arrival) -> Vec<Said> {
        let mut known = Known::default();
        let hear = |reading: &mut Reading| {
            let said = reading.hear(new, &known);
            known = known.and(said, reading, new);
            said
        };
        self.readings.iter_mut().map(hear).collect()
    }

    /// Believes the reading that costs least; of equal ones, the one that is believed.
    fn believe(&mut self, said: &[Said], epoch: u64) -> Seen {
        let best = (0..self.readings.len()).min_by_key(|at| (self.readings[*at].cost(), *at != self.believed));
        let before = std::mem::replace(&mut self.believed, best.unwrap_or(0));
        if self.believed != before {
            self.leave(before);
        }
        let is_younger = self.readings[self.believed].epoch > epoch;
        match said.get(self.believed) {
            Some(said) if !is_younger => said.seen(),
            _ => Seen::Again,
        }
    }

    /// Keeps what had come of a reading that is believed no more: frames of it may still wait for late ones.
    fn leave(&mut self, at: usize) {
        let epoch = self.readings[self.believed].epoch;
        self.past.retain(|past| past.epoch != epoch);
        let prints = std::mem::take(&mut self.readings[at].prints);
        self.past.push(self.readings[at].clone());
        self.readings[at].prints = prints;
        self.past.drain(..self.past.len().saturating_sub(PAST));
    }

    /// Gives up readings that have become the same, and those that cost too much.
    fn tidy(&mut self) {
        let believed = &self.readings[self.believed];
        let (epoch, most) = (believed.epoch, believed.cost() + cost::MOST);
        let costs: Vec<(u32, u64, u64)> = self.readings.iter().map(|it| (it.highest, it.cost(), it.epoch)).collect();
        let is_certain = believed.is_certain;
        let stays = |it: &Reading| {
            let beats = |(highest, cost, other): &(u32, u64, u64)| {
                *highest == it.highest && (*cost, *other != epoch, *other) < (it.cost(), it.epoch != epoch, it.epoch)
            };
            let is_dear = it.cost() > most && (is_certain || it.epoch > epoch);
            it.epoch == epoch || !(is_dear || costs.iter().any(beats))
        };
        self.readings.retain(stays);
        if self.readings.len() > READINGS {
            let dearest = (0..self.readings.len()).filter(|at| self.readings[*at].epoch != epoch);
            let dearest = dearest.max_by_key(|at| self.readings[*at].cost());
            dearest.map(|at| self.readings.remove(at));
        }
        self.believed = self.readings.iter().position(|it| it.epoch == epoch).unwrap_or(0);
    }

    /// What is missing in epochs behind this one may turn out to be nothing: the sequence has perhaps not begun again.
    pub(crate) fn certain_epoch(&self) -> u64 {
        let Some(believed) = self.now().filter(|it| it.is_same && !it.is_certain) else { return u64::MAX };
        let rivals = |it: &&Reading| it.epoch < believed.epoch && it.cost() <= believed.cost() + cost::DOUBT;
        self.readings.iter().find(rivals).map_or(u64::MAX, |it| it.epoch)
    }

    /// How many of the numbers before this one, back to so many, have not come yet; None where that is not remembered.
    pub(crate) fn missing(&self, epoch: u64, number: u32, back: u32) -> Option<u64> {
        let is_believed = self.epoch() == epoch;
        let reading = if is_believed { self.now() } else { self.past.iter().rfind(|it| it.epoch == epoch) }?;
        let is_remembered = reading.remembers(number) && reading.highest.wrapping_sub(number) + back < WINDOW;
        is_remembered.then(|| (1..=back).filter(|n| !reading.came(number.wrapping_sub(*n))).count() as u64)
    }

    fn now(&self) -> Option<&Reading> {
        self.readings.get(self.believed)
    }

    /// Numbers of one epoch can be compared.
    pub(crate) fn epoch(&self) -> u64 {
        self.now().map_or(0, |it| it.epoch)
    }

    /// When it began, or last began again, in nanoseconds.
    pub(crate) fn begun(&self) -> u64 {
        self.now().map_or(0, |it| it.begun)
    }

    pub(crate) fn counts(&self) -> Counts {
        self.now().map_or(Counts::default(), |it| it.counts)
    }

    pub(crate) fn run(&self) -> Run {
        self.now().map_or(Run::default(), |it| it.run)
    }
}

/// What a reading says of a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Seen(Seen),
    /// It was there, and another frame.
    Other,
}

impl Said {
    fn seen(self) -> Seen {
        match self {
            Said::Seen(seen) => seen,
            Said::Other => Seen::Behind,
        }
    }
}

/// What older readings know of a frame: the sequence may have begun again, and this one be of those before.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    is_same: bool,
    is_other: bool,
    is_next: bool,
    /// The number before it is missing there.
    is_behind_gap: bool,
}

impl Known {
    fn and(self, said: Said, older: &Reading, new: &Arrival) -> Known {
        Known {
            is_same: self.is_same || said == Said::Seen(Seen::Twice),
            is_other: self.is_other || said == Said::Other,
            is_next: self.is_next || matches!(said, Said::Seen(Seen::New(0..BEFORE))),
            is_behind_gap: self.is_behind_gap || older.lacks(new.number.wrapping_sub(1)),
        }
    }
}

/// One reading of all that came: where the sequence began last, and what that makes of the rest.
#[derive(Clone, Debug)]
struct Reading {
    epoch: u64,
    /// Its frames are others than those with the same numbers before, or were taken later; or some are the same.
    is_certain: bool,
    is_same: bool,
    begun: u64,
    /// When the last of its frames was taken.
    taken: u64,
    highest: u32,
    /// A bit for each of the last numbers; and the prints of their frames, from the first number on.
    seen: [u64; WORDS],
    prints: Vec<u32>,
    base: u32,
    /// What it costs besides what it counts; and how many numbers have not come that should have come first.
    extra: u64,
    skipped: u64,
    /// Other frames with numbers that were there, since the last that was ahead.
    others: u32,
    run: Run,
    counts: Counts,
}

impl Reading {
    fn begin(new: &Arrival, epoch: u64) -> Reading {
        let mut reading = Reading {
            epoch,
            is_certain: false,
            is_same: false,
            begun: new.now,
            taken: new.taken.unwrap_or(0),
            highest: new.number,
            seen: [0; WORDS],
            prints: Vec::new(),
            base: new.number,
            extra: 0,
            skipped: 0,
            others: 0,
            run: Run { first: new.number, next: new.number.wrapping_add(1), arrived: 1, span: 1 },
            counts: Counts::default(),
        };
        reading.set(new);
        reading
    }

    /// The reading that the sequence begins again with this number, unless it is ahead.
    fn again(&self, new: &Arrival, epoch: u64) -> Option<Reading> {
        if self.ahead_by(new.number).is_some() {
            return None;
        }
        let mut again = Reading::begin(new, epoch);
        let behind = self.highest.wrapping_sub(new.number);
        let is_start = new.number == 0 || !self.spans(behind);
        again.skipped = if is_start { 0 } else { (self.run.span - 1 - u64::from(behind)).min(WINDOW.into()) };
        let is_later = new.number == 0 && new.now.saturating_sub(self.begun) > LATE;
        let begins = if is_later { cost::AGAIN_LATER } else { cost::AGAIN };
        let is_same = new.taken.is_some() && self.knows(new) == Some(true);
        let same = if is_same { cost::SAME_TIME } else { 0 };
        again.is_certain = self.was_taken_before(new);
        again.counts = Counts { restarts: self.counts.restarts + 1, ..self.counts };
        again.extra = self.extra + cost::FRAME * self.skipped + begins + same;
        Some(again)
    }

    fn cost(&self) -> u64 {
        let Counts { lost, reordered, doubled, .. } = self.counts;
        cost::FRAME * (lost + reordered + doubled + self.skipped) + self.extra
    }

    fn hear(&mut self, new: &Arrival, older: &Known) -> Said {
        if let Some(ahead) = self.ahead_by(new.number) {
            return Said::Seen(self.ahead(ahead, new, older));
        }
        let behind = self.highest.wrapping_sub(new.number);
        self.extra += if self.was_taken_before(new) { cost::TAKEN_LATER } else { 0 };
        match self.knows(new) {
            Some(is_same) => {
                self.counts.doubled += 1;
                if is_same {
                    return Said::Seen(Seen::Twice);
                }
                self.extra += if self.others == 0 { cost::OTHER } else { cost::OTHERS };
                self.others += 1;
                Said::Other
            }
            None if self.spans(behind) => Said::Seen(self.late(new, behind)),
            None => Said::Seen(self.before_first(new, (u64::from(behind) + 1).saturating_sub(self.run.span))),
        }
    }

    /// A number that is ahead, unless the frame is one of those before the sequence began again.
    fn ahead(&mut self, ahead: u32, new: &Arrival, older: &Known) -> Seen {
        if self.is_certain && older.is_same && ahead > 1 {
            self.counts.doubled += 1;
            return Seen::Behind;
        }
        if self.is_certain && older.is_next && ahead > BEFORE && self.run.arrived < HARDLY_BEGUN {
            self.extra += cost::FRAME;
            return Seen::Behind;
        }
        self.is_same |= older.is_same;
        self.extra += if older.is_next && self.is_same && !self.is_certain && ahead > 1 { cost::GOES_ON } else { 0 };
        self.is_certain |= older.is_other;
        self.extra += if older.is_same && new.taken.is_some() { cost::SAME_TIME } else { 0 };
        self.extra += if older.is_same && older.is_behind_gap && ahead > 1 { cost::SAME_GAP } else { 0 };
        self.advance(ahead, new)
    }

    fn advance(&mut self, ahead: u32, new: &Arrival) -> Seen {
        if ahead >= WINDOW {
            self.seen = [0; WORDS];
        } else {
            (1..ahead).for_each(|n| self.clear(self.highest.wrapping_add(n)));
        }
        self.highest = new.number;
        self.others = 0;
        self.taken = self.taken.max(new.taken.unwrap_or(0));
        self.run.next = new.number.wrapping_add(1);
        self.run.arrived += 1;
        self.run.span += u64::from(ahead);
        self.counts.lost += u64::from(ahead - 1);
        self.set(new);
        Seen::New(ahead - 1)
    }

    /// One that was missing; or, from before those that are remembered, one that was there if none is missing.
    fn late(&mut self, new: &Arrival, behind: u32) -> Seen {
        if behind < WINDOW {
            self.set(new);
            self.run.arrived += 1;
            self.counts.lost = self.counts.lost.saturating_sub(1);
            self.counts.reordered += 1;
            return Seen::Late;
        }
        let is_there = self.run.arrived == self.run.span;
        *(if is_there { &mut self.counts.doubled } else { &mut self.counts.reordered }) += 1;
        self.extra += cost::FAR;
        Seen::Behind
    }

    /// From before the first one, which it becomes if that is near.
    fn before_first(&mut self, new: &Arrival, before: u64) -> Seen {
        self.counts.reordered += 1;
        let is_near = before <= BEFORE.into() && self.run.span + before <= WINDOW.into();
        if !is_near {
            self.extra += cost::FAR;
            return Seen::Behind;
        }
        self.set(new);
        self.skipped = self.skipped.saturating_sub(before);
        self.run.first = new.number;
        self.run.span += before;
        self.run.arrived += 1;
        self.counts.lost += before - 1;
        Seen::Late
    }

    /// How far a number is ahead of the highest one, if it is.
    fn ahead_by(&self, number: u32) -> Option<u32> {
        Some(number.wrapping_sub(self.highest)).filter(|ahead| (1..LEAP).contains(ahead))
    }

    /// Were frames with higher numbers taken long before this one?
    fn was_taken_before(&self, new: &Arrival) -> bool {
        let is_later = new.taken.is_some_and(|taken| taken > self.taken.saturating_add(TAKEN_LATER));
        is_later && self.highest.wrapping_sub(new.number) < LEAP
    }

    /// Is a number that is so far behind the highest one of those since it began?
    fn spans(&self, behind: u32) -> bool {
        u64::from(behind) < self.run.span
    }

    /// Was the number there, and is it the same frame? None where that is not known.
    fn knows(&self, new: &Arrival) -> Option<bool> {
        self.came(new.number).then(|| self.prints.get(self.print_at(new.number)) == Some(&new.print))
    }

    /// Has this number come, as far as it is remembered?
    fn came(&self, number: u32) -> bool {
        self.remembers(number) && self.has(number)
    }

    /// Is this number missing, as far as it is remembered?
    fn lacks(&self, number: u32) -> bool {
        self.remembers(number) && !self.has(number)
    }

    fn remembers(&self, number: u32) -> bool {
        let behind = self.highest.wrapping_sub(number);
        behind < WINDOW && self.spans(behind)
    }

    fn at(number: u32) -> (usize, u64) {
        let bit = number % WINDOW;
        (bit as usize / 64, 1 << (bit % 64))
    }

    fn print_at(&self, number: u32) -> usize {
        (number.wrapping_sub(self.base) % WINDOW) as usize
    }

    fn has(&self, number: u32) -> bool {
        let (word, bit) = Reading::at(number);
        self.seen[word] & bit != 0
    }

    fn set(&mut self, new: &Arrival) {
        let (word, bit) = Reading::at(new.number);
        self.seen[word] |= bit;
        let at = self.print_at(new.number);
        if at >= self.prints.len() {
            self.prints.resize((at + 1).next_power_of_two(), 0);
        }
        self.prints[at] = new.print;
    }

    fn clear(&mut self, number: u32) {
        let (word, bit) = Reading::at(number);
        self.seen[word] &= !bit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collect::decode::tests::Random;

    /// Frames with one number are the same.
    fn same(number: u32, now: u64) -> Arrival {
        Arrival { number, print: number, taken: None, now }
    }

    fn all(arrivals: impl IntoIterator<Item = Arrival>) -> Sequence {
        let mut sequence = Sequence::default();
        arrivals.into_iter().for_each(|new| {
            sequence.arrive(new);
        });
        sequence
    }

    fn after(numbers: impl IntoIterator<Item = u32>) -> Counts {
        all(numbers.into_iter().map(|number| same(number, 0))).counts()
    }

    /// Each frame is another.
    fn other(numbers: impl IntoIterator<Item = u32>) -> Counts {
        let others = (0..).zip(numbers).map(|(print, number)| Arrival { number, print, taken: None, now: 0 });
        all(others).counts()
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
        let mut sequence = Sequence::default();
        assert_eq!([0, 1, 2].map(|n| sequence.arrive(same(n, 5))), [Seen::New(0); 3]);
        assert_eq!(
            (sequence.arrive(same(0, 2 * LATE)), sequence.arrive(same(1, 2 * LATE))),
            (Seen::Again, Seen::New(0))
        );
        assert_eq!(sequence.counts(), counts(0, 0, 0, 1));
    }

    #[test]
    fn one_number_far_off_away_is_no_sequence() {
        assert_eq!(after((0..8000).chain([10]).chain(8000..8002)), counts(0, 0, 1, 0), "none is missing");
        assert_eq!(after((0..8000).filter(|n| *n != 10).chain([10]).chain(8000..8002)), counts(1, 1, 0, 0));
        assert_eq!(after([10_000, 5905, 10_001, 100_000_000, 10_002]), counts(0, 2, 0, 0));
        assert_eq!(after((0..8000).chain(10..13).chain(14..40)), counts(1, 0, 0, 1));
        let mut sequence = Sequence::default();
        for number in 0..9000 {
            sequence.arrive(same(number, 0));
        }
        assert_eq!((sequence.arrive(same(0, 2 * LATE)), sequence.begun()), (Seen::Again, 2 * LATE));
        assert_eq!(sequence.counts(), counts(0, 0, 0, 1));
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

    /// Frames as they come, `0-9 3 | 0-4 <9`: `|` begins another session, five seconds later, whose frames are others, and
    /// `<9` is one of the session before. With `told` each tells when it was taken.
    fn played(text: &str, told: bool) -> [u64; 4] {
        let (mut sequence, mut session, mut now) = (Sequence::default(), 0, 0);
        for word in text.split_whitespace() {
            if word == "|" {
                session += 1;
                continue;
            }
            let (of, word) = word.strip_prefix('<').map_or((session, word), |word| (session - 1, word));
            let number = |text: &str| text.parse::<u32>().expect("a number");
            let (first, last) = word.split_once('-').map_or((word, word), |ends| ends);
            for number in number(first)..=number(last) {
                now += 1000;
                let taken = told.then(|| u64::from(of) * 5_000_000_000 + u64::from(number) * 1000);
                sequence.arrive(Arrival { number, print: of * 1_000_000 + number, taken, now });
            }
        }
        let Counts { lost, reordered, doubled, restarts } = sequence.counts();
        [lost, reordered, doubled, restarts]
    }

    /// The same with times and without.
    #[track_caller]
    fn assert_played(cases: &[(&str, [u64; 4])]) {
        for (text, expected) in cases {
            assert_eq!([false, true].map(|told| played(text, told)), [*expected; 2], "{text}");
        }
    }

    #[test]
    fn frames_that_came_twice_in_any_pattern_are_no_loss() {
        assert_played(&[
            ("0-119 0-39 0-39 120-139", [0, 0, 80, 0]),
            ("0-119 0-2 0-2 120-139", [0, 0, 6, 0]),
            ("0-5999 100-102 6000-6009", [0, 0, 3, 0]),
            ("0-5999 100 6000-6009", [0, 0, 1, 0]),
            ("0-14 16-59 0-14 16-59 60-79", [1, 0, 59, 0]),
            ("0-4 6-7 0-4 6-7 8-9", [1, 0, 7, 0]),
            ("0-14 16-119 0-14 16-39 120-139", [1, 0, 39, 0]),
            ("0-118 120 0-39 119 121-139", [0, 1, 40, 0]),
            ("0-119 0-19 21 20 22-39 120-139", [0, 0, 40, 0]),
            ("0-299 200-299 300-309", [0, 0, 100, 0]),
            ("0-199 136-199 200-299", [0, 0, 64, 0]),
            ("0-59 0 12 60-70", [0, 0, 2, 0]),
            ("0 1 3 1 2 4 5", [0, 1, 1, 0]),
            ("0-119 20-99 120-139", [0, 0, 80, 0]),
            ("0-119 0-63 120-199", [0, 0, 64, 0]),
            ("0-34 9-28 35-60", [0, 0, 20, 0]),
            ("0-9 1-8 10-20", [0, 0, 8, 0]),
            ("0-4 1-4 5-20", [0, 0, 4, 0]),
            ("0-2999 0-1999 3000-3009", [0, 0, 2000, 0]),
        ]);
        // The time tells that they are the same, and no others.
        for (text, expected) in
            [("0-19 0-19 20-39", [0, 0, 20, 0]), ("0-19 0-2", [0, 0, 3, 0]), ("0-119 0-119", [0, 0, 120, 0])]
        {
            assert_eq!(played(text, true), expected, "{text}");
        }
    }

    #[test]
    fn late_frames_in_a_row_are_no_sequence() {
        assert_played(&[
            ("0-9 13-5999 10-12 6000-6099", [3, 3, 0, 0]),
            ("10-99 7-9 100-199", [0, 3, 0, 0]),
            ("10-99 8-9 100-199", [0, 2, 0, 0]),
            ("10-999 0-9 1000-1099", [0, 10, 0, 0]),
        ]);
    }

    #[test]
    fn a_sequence_that_begins_again_is_told_from_what_is_lost_late_and_twice_in_it() {
        assert_played(&[
            ("0-9 | 1 0 2-99", [0, 1, 0, 1]),
            ("0-99 | 2 0 1 3-99", [0, 2, 0, 1]),
            ("0-3 | 1-3 0 4-6", [0, 1, 0, 1]),
            ("50-99 | 1 0 2-59", [0, 1, 0, 1]),
            ("0-99 | 0-2 <99 3-99", [0, 0, 1, 1]),
            ("0-99 | 0-9 <98-99 10-99", [0, 0, 2, 1]),
            ("0-98 | 0 <99 1-99", [0, 0, 0, 1]),
            ("0-2 | 0 1 3-9", [1, 0, 0, 1]),
            ("0-2 | 0 1 3-19", [1, 0, 0, 1]),
            ("0-1 | 0 2-99", [1, 0, 0, 1]),
            ("0 2-299 | 0-39", [1, 0, 0, 1]),
            ("0 3-299 | 0 3-39", [4, 0, 0, 1]),
            ("0-299 | 0 1", [0, 0, 0, 1]),
            ("0-299 | 0-298 300-359", [1, 0, 0, 1]),
            ("0-299 | 0-298 300-350 299", [0, 1, 0, 1]),
            ("50-99 | 0-98 100-120", [1, 0, 0, 1]),
            ("0-9 12-19 | 10-39", [2, 0, 0, 1]),
            ("0-9 | 0-9 | 0-9 | 0-20", [0, 0, 0, 3]),
            ("0-99 | 3 0 1 2 4-49", [0, 3, 0, 1]),
            ("5000-5009 | 0 1 32-59", [30, 0, 0, 1]),
            ("1000000-1000009 | 0-19 50-59", [30, 0, 0, 1]),
            ("0-4999 | 0 1", [0, 0, 0, 1]),
            ("0-4100 | 0 2-39", [1, 0, 0, 1]),
            ("0-8999 | 0-9 11-20", [1, 0, 0, 1]),
        ]);
        let every_fourth =
            "0-2 ".to_string() + &(1..250).map(|n| format!("{}-{} ", 4 * n, 4 * n + 2)).collect::<String>();
        assert_eq!(played(&(every_fourth + "| 0-399"), false), [249, 0, 0, 1]);
    }

    /// A session's numbers as they arrive: some lost, some late, some twice, some of them in bursts.
    fn damaged(first: u32, count: u32, random: &mut Random) -> Vec<u32> {
        let mut arriving: Vec<(u64, u32)> = Vec::new();
        let mut n = 0;
        while n < count {
            let (at, number) = (u64::from(n) * 10, first.wrapping_add(n));
            match random.below(60) {
                0 => {}
                1 => n += random.below(20) as u32,
                2 => arriving.push((at + 10 * random.below(60) as u64 + 5, number)),
                3 => arriving.extend([(at, number), (at + 10 * random.below(40) as u64, number)]),
                _ => arriving.push((at, number)),
            }
            n += 1;
        }
        arriving.sort_by_key(|(at, _)| *at);
        arriving.into_iter().map(|(_, number)| number).collect()
    }

    /// What was planted: lost between the first and the last, come behind a higher one, come again.
    fn planted(numbers: &[u32], first: u32) -> [u64; 3] {
        let (mut there, mut highest, mut late, mut twice) = (std::collections::BTreeSet::new(), 0, 0, 0);
        for number in numbers.iter().map(|number| number.wrapping_sub(first)) {
            match there.insert(number) {
                false => twice += 1,
                true => late += u64::from(number < highest),
            }
            highest = highest.max(number);
        }
        let span = highest - there.first().expect("some arrive") + 1;
        [u64::from(span) - there.len() as u64, late, twice]
    }

    #[test]
    fn what_is_planted_is_counted() {
        let mut all = [0; 3];
        for seed in 1..400 {
            let mut random = Random(seed);
            let told = seed % 2 == 0;
            let (mut sequence, mut now, mut expected) = (Sequence::default(), 0, [0; 3]);
            let sessions = 1 + random.below(3) as u64;
            for session in 0..sessions {
                let first = if sessions == 1 { random.next() as u32 } else { 0 };
                let numbers = damaged(first, 300 + random.below(6000) as u32, &mut random);
                let more = planted(&numbers, first);
                expected.iter_mut().zip(more).for_each(|(all, more)| *all += more);
                for number in numbers {
                    now += 1000;
                    let at = session * 5_000_000_000 + u64::from(number.wrapping_sub(first)) * 1000;
                    let print = session as u32 * 1_000_000 + number;
                    sequence.arrive(Arrival { number, print, taken: told.then_some(at), now });
                }
            }
            all.iter_mut().zip(expected).for_each(|(all, more)| *all += more);
            let Counts { lost, reordered, doubled, restarts } = sequence.counts();
            assert_eq!(
                [lost, reordered, doubled, restarts],
                [expected[0], expected[1], expected[2], sessions - 1],
                "seed {seed}"
            );
        }
        assert!(all.iter().all(|planted| *planted > 10_000), "{all:?}");
    }

    #[test]
    fn an_earlier_number_that_was_taken_later_begins_a_sequence() {
        let taken = |numbers: &[(u32, u64)]| {
            all(numbers.iter().map(|(number, ms)| Arrival { taken: Some(ms * 1_000_000), ..same(*number, 0) })).counts()
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
            let Run { first, next, arrived, span } = all(numbers.iter().map(|number| same(*number, 0))).run();
            (first, next, arrived, span)
        };
        assert_eq!(run(&[5, 6, 9, 9, 8]), (5, 10, 4, 5));
        assert_eq!(run(&[3, 1, 4]), (1, 5, 3, 4));
        assert_eq!(run(&[u32::MAX, 1]), (u32::MAX, 2, 2, 3));
        assert_eq!(run(&[0, 1, 2, 3, 4, 0, 1, 2, 4]), (0, 5, 4, 5), "the second time");
    }
}
