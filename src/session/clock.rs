//! What the programs add to the time since boot, which they can read, to tell the time since 1970.

use std::fs;

use rustix::time::{ClockId, Timespec, clock_gettime};

/// Nanoseconds that a session's number may be off before it is written anew: more than two readings are apart. Both times
/// go equally fast, so that only a clock that was set makes more of it.
const MOST_OFF: u64 = 10_000;
/// Readings, of which the one that took the least time counts: a process may be stopped between two.
const READINGS: usize = 5;

/// Nanoseconds from the time since boot to the time since 1970, good to a microsecond.
pub(crate) fn offset() -> u64 {
    let reading = || {
        let [before, now, after] =
            [ClockId::Boottime, ClockId::Realtime, ClockId::Boottime].map(|clock| nanoseconds(clock_gettime(clock)));
        (after - before, now - (before + after) / 2)
    };
    let best = std::iter::repeat_with(reading).take(READINGS).min_by_key(|(took, _)| *took);
    let ours = fs::read_to_string("/proc/self/timens_offsets").map_or(0, |text| ahead(&text));
    best.and_then(|(_, offset)| u64::try_from(offset + ours).ok()).unwrap_or_default()
}

/// Nanoseconds by which the time since boot of our time namespace is ahead of the kernel's, which the programs read.
fn ahead(offsets: &str) -> i128 {
    let words = offsets.lines().find_map(|line| line.strip_prefix("boottime "));
    let numbers: Vec<i128> = words.into_iter().flat_map(str::split_whitespace).flat_map(str::parse).collect();
    if let [seconds, nanoseconds] = numbers[..] { seconds * 1_000_000_000 + nanoseconds } else { 0 }
}

fn nanoseconds(time: Timespec) -> i128 {
    i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
}

/// The number for the programs: that of before, unless the clock has been set.
pub(crate) fn kept(before: u64, now: u64) -> u64 {
    if before.abs_diff(now) > MOST_OFF { now } else { before }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime, UNIX_EPOCH};

    use super::*;

    #[test]
    fn the_offset_turns_the_time_since_boot_into_that_since_1970() {
        let since_1970 = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let off = (0..20).map(|_| {
            let (before, offset) = (since_1970(), offset());
            let told = Duration::from_nanos(nanoseconds(clock_gettime(ClockId::Boottime)) as u64 + offset);
            let after = since_1970();
            told.saturating_sub(after).max(before.saturating_sub(told))
        });
        // Not more than the clocks are apart in the one reading of the best that nobody interrupts.
        assert!(off.min().unwrap() <= Duration::from_micros(1));
    }

    #[test]
    fn the_offsets_of_a_time_namespace_are_read_as_the_kernel_writes_them() {
        assert_eq!(ahead("monotonic           0         0\nboottime         1000         5\n"), 1_000_000_000_005);
        assert_eq!(ahead("monotonic           7         0\nboottime        -1000         0\n"), -1_000_000_000_000);
        assert_eq!(ahead(""), 0, "a kernel without them");
    }

    #[test]
    fn a_clock_that_was_set_is_followed_and_what_two_readings_are_apart_is_left_alone() {
        let before = 1_800_000_000_000_000_000;
        for (now, kept_now) in [
            (before + 9_999, before),
            (before - 9_999, before),
            (before + 10_001, before + 10_001),
            (before - 3_600_000_000_000, before - 3_600_000_000_000),
        ] {
            assert_eq!(kept(before, now), kept_now);
        }
        assert_eq!(kept(0, before), before);
    }
}
