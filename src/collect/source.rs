//! Who sends: a stream for each source address, tunnel, id, tap and direction, with what arrived of it and what did not.

use std::collections::HashMap;
use std::net::IpAddr;

use serde::Serialize;

use crate::collect::decode::{Copy, Fault, Kind, Tap};
use crate::collect::seconds;
use crate::collect::sequence::{Arrival, Counts, LEAP, Run, Seen, Sequence};
use crate::datapath::abi::Direction;

/// So many streams are told apart; anyone can send, and memory is not endless.
pub(crate) const MOST_STREAMS: usize = 1 << 14;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    pub source: IpAddr,
    pub kind: Kind,
    pub id: Option<u32>,
    pub tap: Option<Tap>,
    pub direction: Option<bool>,
}

impl Key {
    /// As interfaces are named in captures: `geneve 7 tap 0 egress @ 10.0.0.5`.
    pub(crate) fn name(&self) -> String {
        let id = self.id.map(|id| format!(" {id}")).unwrap_or_default();
        let tap = match self.tap {
            None => String::new(),
            Some(Tap::Port(port)) => format!(" port {port}"),
            Some(Tap::Interface(n)) => format!(" tap {n}"),
        };
        let direction = self.direction().map(|direction| format!(" {}", direction.hook())).unwrap_or_default();
        format!("{}{id}{tap}{direction} @ {}", self.kind, self.source)
    }

    pub(crate) fn direction(&self) -> Option<Direction> {
        self.direction.map(|is_egress| if is_egress { Direction::Egress } else { Direction::Ingress })
    }
}

/// Whose frames one sequence numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Domain {
    source: IpAddr,
    kind: Kind,
    id: Option<u32>,
    tap: Option<(Option<Tap>, Option<bool>)>,
}

#[derive(Debug)]
pub(crate) struct Stream {
    pub key: Key,
    pub received: u64,
    pub bytes: u64,
    pub cut: u64,
    /// Copies that `--filter` and `--dedup` left out.
    pub filtered: u64,
    pub duplicates: u64,
    /// When the first copy came and the last, in nanoseconds.
    pub first: u64,
    pub last: u64,
    domain: Option<usize>,
}

/// So many epochs of a sequence are gone on with.
const EPOCHS: usize = 8;

/// A number among those of one sequence, until it begins again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Number {
    pub domain: usize,
    pub epoch: u64,
    pub number: u32,
}

impl Number {
    /// How far it is behind another one, where they can be compared.
    pub(crate) fn behind(self, other: Number) -> Option<u32> {
        let behind = other.number.wrapping_sub(self.number);
        ((self.domain, self.epoch) == (other.domain, other.epoch)).then_some(behind)
    }
}

/// A sequence, and what was written of it last in each of the last epochs, which may go on.
#[derive(Debug, Default)]
struct Numbered {
    sequence: Sequence,
    written: Vec<Number>,
    /// Frames that are missing before the next one that is written, by epoch.
    gaps: Vec<(u64, u64)>,
}

/// All that was received, and from whom.
#[derive(Debug, Default)]
pub(crate) struct Sources {
    /// `--egress-id`: the id of outgoing packets' copies, which are numbered together with the others.
    egress_id: Option<u32>,
    streams: Vec<Stream>,
    found: HashMap<Key, usize>,
    numbered: Vec<Numbered>,
    domains: HashMap<Domain, usize>,
    last: Option<(Key, usize)>,
    faults: HashMap<(IpAddr, Fault), u64>,
    /// Copies of streams beyond [`MOST_STREAMS`], and faults of sources beyond it.
    pub unkept: u64,
    pub dropped: u64,
}

/// A row of the summary.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub source: IpAddr,
    pub tunnel: &'static str,
    pub id: Option<u32>,
    pub tap: Option<u32>,
    pub direction: Option<&'static str>,
    pub received: u64,
    pub bytes: u64,
    pub cut: u64,
    pub filtered: u64,
    pub duplicates: u64,
    /// When the first copy came and the last, in seconds since 1970.
    pub first: f64,
    pub last: f64,
    /// Of the sequence; absent where copies have no numbers.
    #[serde(flatten)]
    pub numbers: Option<Numbers>,
}

/// What a sequence tells. Streams that share one share these numbers: `sequence` says which.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Numbers {
    pub sequence: usize,
    pub lost: u64,
    pub reordered: u64,
    pub doubled: u64,
    pub restarts: u64,
    /// Since it last began.
    pub run: Run,
    /// When that was, in seconds since 1970.
    pub begun: f64,
}

impl Sources {
    pub(crate) fn new(egress_id: Option<u32>) -> Sources {
        Sources { egress_id, ..Sources::default() }
    }

    /// Counts a copy that came at `now`; the number of its stream, and what its sequence says of it. None where there are
    /// too many streams.
    pub(crate) fn receive(&mut self, source: IpAddr, copy: &Copy, now: u64) -> Option<(usize, Option<Seen>)> {
        let direction = copy.direction.map(|direction| direction == Direction::Egress);
        let direction = direction.or(self.egress_id.filter(|_| copy.id.is_some()).map(|id| copy.id == Some(id)));
        let key = Key { source, kind: copy.kind, id: copy.id, tap: copy.tap, direction };
        let at = self.stream(key, copy, now)?;
        let stream = &mut self.streams[at];
        stream.last = now;
        stream.received += 1;
        stream.bytes += copy.frame.len() as u64;
        stream.cut += u64::from(copy.cut);
        let numbered = stream.domain.map(|at| &mut self.numbered[at]);
        let seen = numbered.zip(copy.sequence).map(|(numbered, number)| {
            numbered.sequence.arrive(Arrival { number, print: copy.print(), taken: copy.time, now })
        });
        Some((at, seen))
    }

    fn stream(&mut self, key: Key, copy: &Copy, now: u64) -> Option<usize> {
        if let Some((last, at)) = self.last
            && last == key
        {
            return Some(at);
        }
        let at = match self.found.get(&key) {
            Some(at) => *at,
            None if self.streams.len() >= MOST_STREAMS => {
                self.unkept += 1;
                return None;
            }
            None => self.add(key, copy, now),
        };
        self.last = Some((key, at));
        Some(at)
    }

    fn add(&mut self, key: Key, copy: &Copy, now: u64) -> usize {
        let at = self.streams.len();
        let domain = copy.sequence.map(|_| {
            let id = key.id.filter(|_| self.egress_id.is_none() || copy.counts_tap);
            let tap = copy.counts_tap.then_some((key.tap, key.direction));
            let domain = Domain { source: key.source, kind: key.kind, id, tap };
            let next = self.numbered.len();
            let at = *self.domains.entry(domain).or_insert(next);
            if at == next {
                self.numbered.push(Numbered::default());
            }
            at
        });
        let (received, bytes, cut, filtered, duplicates) = (0, 0, 0, 0, 0);
        let (first, last) = (now, now);
        self.streams.push(Stream { key, received, bytes, cut, filtered, duplicates, first, last, domain });
        self.found.insert(key, at);
        at
    }

    pub(crate) fn fault(&mut self, source: IpAddr, fault: Fault) {
        if self.faults.len() >= MOST_STREAMS && !self.faults.contains_key(&(source, fault)) {
            self.unkept += 1;
            return;
        }
        *self.faults.entry((source, fault)).or_default() += 1;
    }

    pub(crate) fn get(&self, at: usize) -> &Stream {
        &self.streams[at]
    }

    pub(crate) fn get_mut(&mut self, at: usize) -> &mut Stream {
        &mut self.streams[at]
    }

    /// Where this number of a stream is: numbers of one sequence can be compared until it begins again.
    pub(crate) fn numbered(&self, at: usize, number: Option<u32>) -> Option<Number> {
        let domain = self.streams[at].domain?;
        Some(Number { domain, epoch: self.numbered[domain].sequence.epoch(), number: number? })
    }

    /// Frames that are missing before this one, which leaves now. With `written` the next call begins behind it. Those that
    /// have come and leave later are not missing: `come` says how many that lie between one and this wait.
    pub(crate) fn gap(&mut self, number: Number, written: bool, come: impl FnOnce(u32) -> u64) -> u64 {
        let Numbered { sequence, written: last, gaps } = &mut self.numbered[number.domain];
        let before = last.iter().position(|last| last.epoch == number.epoch);
        let ahead = before.map_or(1, |at| number.number.wrapping_sub(last[at].number));
        // A late one leaves the place where it is.
        if (1..LEAP).contains(&ahead) {
            let (epoch, at, between) = (number.epoch, number.number, ahead - 1);
            let not_waiting = || u64::from(between).saturating_sub(come(at.wrapping_sub(ahead)));
            let missing =
                if between > 0 { sequence.missing(epoch, at, between).unwrap_or_else(not_waiting) } else { 0 };
            if missing > 0 {
                gaps.push((number.epoch, missing));
            }
            match before {
                Some(at) => last[at] = number,
                None => last.push(number),
            }
            last.drain(..last.len().saturating_sub(EPOCHS));
        }
        // What an epoch lacked that was none after all.
        gaps.retain(|(epoch, _)| *epoch <= sequence.epoch());
        let certain = sequence.certain_epoch();
        gaps.extract_if(.., |(epoch, _)| written && *epoch <= certain).map(|(_, gap)| gap).sum()
    }

    pub(crate) fn rows(&self) -> Vec<Row> {
        let mut streams: Vec<&Stream> = self.streams.iter().collect();
        streams.sort_by_key(|stream| stream.key);
        streams.into_iter().map(|stream| self.row(stream)).collect()
    }

    fn row(&self, stream: &Stream) -> Row {
        let numbers = stream.domain.map(|at| {
            let sequence = &self.numbered[at].sequence;
            let (Counts { lost, reordered, doubled, restarts }, run) = (sequence.counts(), sequence.run());
            Numbers { sequence: at, lost, reordered, doubled, restarts, run, begun: seconds(sequence.begun()) }
        });
        let Stream { key, received, bytes, cut, filtered, duplicates, .. } = *stream;
        let tap = key.tap.map(|(Tap::Port(n) | Tap::Interface(n))| n);
        let direction = key.direction().map(Direction::hook);
        let (source, tunnel, id) = (key.source, key.kind.name(), key.id);
        let [first, last] = [stream.first, stream.last].map(seconds);
        Row { source, tunnel, id, tap, direction, received, bytes, cut, filtered, duplicates, first, last, numbers }
    }

    /// Packets that were no copies: source, reason, and how many.
    pub(crate) fn faults(&self) -> Vec<(IpAddr, Fault, u64)> {
        let mut faults: Vec<_> = self.faults.iter().map(|((source, fault), n)| (*source, *fault, *n)).collect();
        faults.sort();
        faults
    }

    pub(crate) fn lost(&self) -> u64 {
        self.numbered.iter().map(|numbered| numbered.sequence.counts().lost).sum()
    }

    pub(crate) fn received(&self) -> u64 {
        self.streams.iter().map(|stream| stream.received).sum()
    }
}
