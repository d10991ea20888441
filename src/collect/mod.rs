//! The other end: copies are received, read, put in order, and written.

pub(crate) mod classic;
pub(crate) mod control;
pub(crate) mod decode;
pub(crate) mod dedup;
pub(crate) mod files;
pub(crate) mod pcapng;
pub(crate) mod receive;
pub(crate) mod reorder;
pub(crate) mod sequence;
pub(crate) mod source;
pub(crate) mod tap;

use std::collections::HashSet;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;

use crate::collect::classic::Program;
use crate::collect::decode::{Copy, Kind};
use crate::collect::dedup::Recent;
use crate::collect::files::{Next, Output};
use crate::collect::pcapng::Frame;
use crate::collect::receive::Received;
use crate::collect::reorder::{Place, Waiting};
use crate::collect::sequence::Seen;
use crate::collect::source::{Number, Sources};
use crate::collect::tap::Tap;

/// Nanoseconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |passed| passed.as_nanos() as u64)
}

/// The same as told in JSON.
pub(crate) fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e9
}

/// A frame on its way from the socket to where it is written.
#[derive(Clone, Copy, Debug)]
struct Passing {
    stream: usize,
    time: u64,
    number: Option<Number>,
    wire: u32,
}

/// The way of each copy.
pub(crate) struct Flow {
    pub sources: Sources,
    /// None for all.
    pub kinds: Vec<Kind>,
    pub filter: Option<Program>,
    pub dedup: Option<Recent>,
    waiting: Option<Waiting<(Passing, Option<Vec<u8>>)>>,
    /// `--time capture`.
    pub by_capture: bool,
    pub output: Option<Output>,
    pub tap: Option<Tap>,
    /// Frames that are still wanted.
    pub left: Option<u64>,
}

impl Flow {
    pub(crate) fn new(sources: Sources) -> Flow {
        let (filter, dedup, waiting, output, tap, left) = (None, None, None, None, None, None);
        Flow { sources, kinds: Vec::new(), filter, dedup, waiting, by_capture: false, output, tap, left }
    }

    pub(crate) fn reorder(&mut self, patience: u64) {
        self.waiting = Some(Waiting::new(patience));
    }

    /// Takes a packet; false once no more are wanted.
    pub(crate) fn take(&mut self, received: Received) -> Result<bool> {
        let Received { source, time, copy } = received;
        let copy = match copy {
            Ok(copy) => copy,
            Err(fault) => {
                self.sources.fault(source, fault);
                return Ok(true);
            }
        };
        if !self.kinds.is_empty() && !self.kinds.contains(&copy.kind) {
            return Ok(true);
        }
        let Some((stream, seen)) = self.sources.receive(source, &copy, time) else { return Ok(true) };
        let wire = wire_bytes(&copy);
        let is_wanted = self.is_wanted(stream, seen, &copy, wire, time);
        let shown = if self.by_capture { copy.time.unwrap_or(time) } else { time };
        let number = copy.sequence.filter(|_| seen != Some(Seen::Behind));
        let number = self.sources.numbered(stream, number);
        let passing = Passing { stream, time: shown, number, wire };
        let Some(waiting) = &mut self.waiting else {
            return self.pass(&passing, is_wanted.then_some(copy.frame), time);
        };
        let is_timed = self.by_capture && copy.time.is_some();
        let late = matches!(seen, Some(Seen::Late | Seen::Twice)) && !is_timed;
        let place = Place { time: self.by_capture.then_some(shown), number: passing.number, late };
        waiting.push(time, place, (passing, is_wanted.then(|| copy.frame.to_vec())));
        Ok(true)
    }

    /// Counts what `--filter` and `--dedup` leave out.
    fn is_wanted(&mut self, stream: usize, seen: Option<Seen>, copy: &Copy, wire: u32, time: u64) -> bool {
        if self.filter.as_ref().is_some_and(|filter| !filter.takes(copy.frame, wire)) {
            self.sources.get_mut(stream).filtered += 1;
            return false;
        }
        let twice = seen == Some(Seen::Twice);
        if self.dedup.as_mut().is_some_and(|recent| recent.has(time, stream, copy.frame, twice)) {
            self.sources.get_mut(stream).duplicates += 1;
            return false;
        }
        true
    }

    /// Lets go what has waited long enough, or all.
    pub(crate) fn release(&mut self, now: u64, all: bool) -> Result<bool> {
        while let Some((passing, frame)) = self.waiting.as_mut().and_then(|waiting| waiting.pop(now, all)) {
            if !self.pass(&passing, frame.as_deref(), now)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes a frame; without `bytes` one that is left out, but not missing.
    fn pass(&mut self, passing: &Passing, bytes: Option<&[u8]>, now: u64) -> Result<bool> {
        if self.left == Some(0) {
            return Ok(false);
        }
        let Passing { stream, time, number, wire } = *passing;
        let waiting = &self.waiting;
        let gap = number.map_or(0, |number| {
            self.sources.gap(number, bytes.is_some(), |last| {
                let wait = waiting.iter().flat_map(Waiting::iter).filter_map(|(other, _)| other.number);
                let between = Number { number: last, ..number }.behind(number).unwrap_or(0);
                let waits = |other: Number| other.behind(number).is_some_and(|behind| (1..between).contains(&behind));
                wait.filter(|other| waits(*other)).map(|other| other.number).collect::<HashSet<_>>().len() as u64
            })
        });
        let Some(bytes) = bytes else { return Ok(true) };
        let key = self.sources.get(stream).key;
        if let Some(output) = &mut self.output {
            let frame = Frame { time, direction: key.direction(), gap, wire, bytes };
            if output.write(stream, || key.name(), &frame, now)? == Next::Done {
                return Ok(false);
            }
        }
        if let Some(tap) = &mut self.tap {
            tap.send(bytes)?;
        }
        if let Some(left) = &mut self.left {
            *left -= 1;
            return Ok(*left > 0);
        }
        Ok(true)
    }

    /// Writes what is buffered.
    pub(crate) fn flush(&mut self) -> Result<()> {
        self.output.as_mut().map_or(Ok(()), Output::flush)
    }
}

/// Bytes that the frame had on the wire, as far as that can be told: the tunnel says it, or, of a frame that was cut, its
/// own IP header.
fn wire_bytes(copy: &Copy) -> u32 {
    let there = copy.frame.len() as u32;
    match copy.wire {
        Some(wire) => wire.max(there),
        None if copy.cut => ip_bytes(copy.frame).unwrap_or(there).max(there),
        None => there,
    }
}

/// Up to the end of the IP packet.
fn ip_bytes(frame: &[u8]) -> Option<u32> {
    let word = |at: usize| frame.get(at..at + 2).map(|bytes| usize::from(u16::from_be_bytes([bytes[0], bytes[1]])));
    let mut at = 12;
    while matches!(word(at)?, 0x8100 | 0x88a8 | 0x9100) {
        at += 4;
    }
    let length = match word(at)? {
        0x0800 => at + 2 + word(at + 4)?,
        0x86dd => at + 2 + 40 + word(at + 6)?,
        _ => return None,
    };
    u32::try_from(length).ok()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::collect::decode::Fault;
    use crate::collect::decode::tests::Random;
    use crate::tools::exec::Runner;

    /// A frame of anything: what its headers say need not be so.
    fn any_frame(random: &mut Random) -> Vec<u8> {
        let mut frame: Vec<u8> = (0..14 + random.below(80)).map(|_| random.below(4) as u8).collect();
        let ethertype = [0x0800, 0x86dd, 0x8100, 0x88a8, 0x0806_u16][random.below(5)];
        frame[12..14].copy_from_slice(&ethertype.to_be_bytes());
        let version = [0x45, 0x4f, 0x60, 0x40, 0][random.below(5)];
        frame.iter_mut().skip(14).take(1).for_each(|byte| *byte = version);
        frame
    }

    fn any_copy<'a>(random: &mut Random, frame: &'a [u8]) -> Copy<'a> {
        let kind = [Kind::Gre, Kind::Erspan3, Kind::Vxlan, Kind::Geneve][random.below(4)];
        let number = [random.next() as u32, random.below(9) as u32, u32::MAX - random.below(9) as u32][random.below(3)];
        let any = |value: u64| if value.is_multiple_of(3) { None } else { Some(value as u32) };
        Copy {
            kind,
            id: any(random.next() % 4),
            tap: None,
            direction: None,
            sequence: (kind != Kind::Vxlan).then_some(number),
            counts_tap: kind == Kind::Geneve,
            time: any(random.next()).map(u64::from),
            cut: random.below(2) == 0,
            wire: any(random.next()),
            frame,
        }
    }

    /// In either order, and with a clock that is set again and again.
    #[test]
    fn whatever_comes_is_written_left_out_or_a_fault() {
        const COUNT: u64 = 50_000;
        for by_capture in [false, true] {
            let mut random = Random(7);
            let mut flow = Flow::new(Sources::new(None));
            flow.filter = Some(Program::compile(&Runner::default(), "ip or (vlan and ip6) or len > 60").unwrap());
            (flow.dedup, flow.left, flow.by_capture) = (Some(Recent::new(1000)), Some(u64::MAX), by_capture);
            flow.reorder(500);
            let mut time = 1 << 40;
            for _ in 0..COUNT {
                time = if random.below(1000) == 0 { random.next() >> 20 } else { time + random.below(30) as u64 };
                let source = Ipv4Addr::from(random.below(5) as u32).into();
                let frame = any_frame(&mut random);
                let copy = if random.below(50) == 0 { Err(Fault::Short) } else { Ok(any_copy(&mut random, &frame)) };
                assert!(flow.take(Received { source, time, copy }).unwrap() && flow.release(time, false).unwrap());
            }
            assert!(flow.release(time, true).unwrap());
            let faults: u64 = flow.sources.faults().iter().map(|(.., count)| count).sum();
            let left_out: u64 = flow.sources.rows().iter().map(|row| row.filtered + row.duplicates).sum();
            assert_eq!(flow.sources.received() + faults, COUNT);
            assert_eq!(u64::MAX - flow.left.unwrap() + left_out, flow.sources.received());
            assert!(left_out > COUNT / 10 && faults > COUNT / 100, "{left_out} {faults}");
        }
    }

    #[test]
    fn a_frame_that_was_cut_tells_its_length() {
        let mut frame = vec![0; 60];
        frame[12..18].copy_from_slice(&[8, 0, 0x45, 0, 5, 0xdc]);
        assert_eq!(ip_bytes(&frame), Some(1514));
        frame[12..24].copy_from_slice(&[0x81, 0, 0, 10, 0x86, 0xdd, 0x60, 0, 0, 0, 1, 0]);
        assert_eq!(ip_bytes(&frame), Some(4 + 14 + 40 + 256));
        assert_eq!(ip_bytes(&frame[..13]), None);
    }
}
