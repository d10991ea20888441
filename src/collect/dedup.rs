//! `--dedup`: one frame that two taps have seen is kept once. What a router changes is left out of the comparison: MAC
//! addresses, tags, TTL and checksums of IP packets.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, Hasher, RandomState};

/// So many are remembered at most, in some 100 MB.
const MOST: usize = 1 << 20;

/// Frames that were seen in the last while.
#[derive(Debug)]
pub(crate) struct Recent {
    window: u64,
    seen: HashMap<u128, (u64, usize)>,
    order: VecDeque<(u64, u128)>,
    hashers: [RandomState; 2],
    /// The frame without what differs.
    room: Vec<u8>,
}

impl Recent {
    pub(crate) fn new(window: u64) -> Recent {
        let hashers = [RandomState::new(), RandomState::new()];
        Recent { window, seen: HashMap::new(), order: VecDeque::new(), hashers, room: Vec::new() }
    }

    /// Was this frame there a while ago, in another stream, or in this one with the same number (`twice`)? The same
    /// frame of one stream is another packet otherwise.
    pub(crate) fn has(&mut self, now: u64, stream: usize, frame: &[u8], twice: bool) -> bool {
        if self.order.back().is_some_and(|(last, _)| now + self.window < *last) {
            // The clock was set back.
            self.order.clear();
            self.seen.clear();
        }
        while let Some((time, key)) = self.order.front().copied()
            && (time + self.window < now || self.order.len() > MOST)
        {
            self.order.pop_front();
            if self.seen.get(&key).is_some_and(|(last, _)| *last == time) {
                self.seen.remove(&key);
            }
        }
        normal(frame, &mut self.room);
        let [high, low] = [0, 1].map(|n| {
            let mut hasher = self.hashers[n].build_hasher();
            hasher.write(&self.room);
            u128::from(hasher.finish())
        });
        let key = high << 64 | low;
        if let Some((_, first)) = self.seen.get(&key)
            && (*first != stream || twice)
        {
            return true;
        }
        self.seen.insert(key, (now, stream));
        self.order.push_back((now, key));
        false
    }
}

/// The part of a frame that stays the same from hop to hop.
fn normal(frame: &[u8], out: &mut Vec<u8>) {
    out.clear();
    let ethertype = |at: usize| frame.get(at..at + 2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
    let mut at = 12;
    while matches!(ethertype(at), Some(0x8100 | 0x88a8 | 0x9100)) {
        at += 4;
    }
    let ip = frame.get(at + 2..).unwrap_or_default();
    let (transport, protocol) = match ethertype(at) {
        Some(0x0800) if ip.len() >= 20 && ip[0] >> 4 == 4 && ip[0] & 0xf >= 5 => {
            let length = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
            // Behind the packet is padding. A length of 0 is a super-packet's.
            out.extend_from_slice(&ip[..if length >= 20 { length.min(ip.len()) } else { ip.len() }]);
            out[8] = 0;
            out[10..12].fill(0);
            let is_first = u16::from_be_bytes([ip[6], ip[7]]) & 0x1fff == 0;
            (usize::from(ip[0] & 0xf) * 4, is_first.then_some(ip[9]))
        }
        Some(0x86dd) if ip.len() >= 40 && ip[0] >> 4 == 6 => {
            let length = usize::from(u16::from_be_bytes([ip[4], ip[5]]));
            out.extend_from_slice(&ip[..if length > 0 { (40 + length).min(ip.len()) } else { ip.len() }]);
            out[7] = 0;
            (40, Some(ip[6]))
        }
        _ => return out.extend_from_slice(frame),
    };
    let sum = match protocol {
        Some(6) => 16,
        Some(17) => 6,
        Some(1 | 58) => 2,
        _ => return,
    };
    if let Some(sum) = out.get_mut(transport + sum..transport + sum + 2) {
        sum.fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(ttl: u8, sum: u8, mac: u8, id: u8) -> Vec<u8> {
        let mut frame = vec![mac; 60];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14..34].copy_from_slice(&[0x45, 0, 0, 40, 0, id, 0, 0, ttl, 6, sum, sum, 1, 1, 1, 1, 2, 2, 2, 2]);
        frame[34..54].fill(3);
        frame[50..52].fill(sum);
        frame
    }

    #[test]
    fn a_frame_of_two_taps_is_kept_once_and_two_of_one_tap_twice() {
        let mut recent = Recent::new(10);
        assert!(!recent.has(0, 0, &packet(64, 1, 1, 1), false));
        assert!(recent.has(1, 1, &packet(63, 2, 2, 1), false));
        assert!(!recent.has(2, 1, &packet(63, 2, 2, 2), false));
        assert!(!recent.has(3, 0, &packet(64, 1, 1, 1), false));
        assert!(recent.has(4, 0, &packet(64, 1, 1, 1), true));
        assert!(!recent.has(50, 1, &packet(63, 2, 2, 1), false));
        assert_eq!(recent.seen.len(), 1);
        assert!(!recent.has(3, 0, &packet(63, 2, 2, 1), false), "the clock was set back");
        assert!(recent.has(4, 1, &packet(63, 2, 2, 1), false));
        let arp = |mac| [[mac; 12].as_slice(), &[8, 6], &[0; 28]].concat();
        assert!(!recent.has(51, 0, &arp(1), false) && !recent.has(51, 1, &arp(2), false));
        assert!(recent.has(51, 1, &arp(1), false));
    }
}
