//! What passes on the way to an address, by `ping`.

use std::net::IpAddr;
use std::time::Duration;

use crate::tools::exec::{Cmd, Runner};

/// How many sizes are tried at once.
const AT_ONCE: u32 = 8;

/// What other links commonly have, in bytes of an IP packet.
const COMMON: [u32; 9] = [1280, 1400, 1420, 1450, 1472, 1480, 1492, 1500, 8000];

/// The largest IP packet, in bytes up to `most`, that reaches an address and is answered without being fragmented; `None`
/// where none is answered.
pub(crate) fn largest(runner: &Runner, address: IpAddr, most: u32) -> Option<u32> {
    let least = if address.is_ipv6() { 1280 } else { 576 };
    let mut sizes: Vec<u32> = COMMON.into_iter().filter(|size| (least..most).contains(size)).collect();
    sizes.extend([least.min(most), most]);
    bisect(sizes, |sizes| passing(runner, address, sizes))
}

/// The largest size that passes, given which of some sizes do. Each round has the sizes between the largest that passes and
/// the smallest that does not.
fn bisect(mut sizes: Vec<u32>, passing: impl Fn(&[u32]) -> Vec<bool>) -> Option<u32> {
    let mut best = None;
    loop {
        sizes.sort_unstable();
        sizes.dedup();
        let answers = passing(&sizes);
        let passed =
            |passes: bool| sizes.iter().zip(&answers).filter(move |(_, at)| **at == passes).map(|(size, _)| *size);
        best = passed(true).max().max(best);
        let (low, high) = (best?, passed(false).filter(|size| Some(*size) > best).min().unwrap_or(0));
        if high <= low + 1 {
            return best;
        }
        let step = (high - low).div_ceil(AT_ONCE + 1).max(1);
        sizes = (1..=AT_ONCE).map(|n| low + n * step).filter(|size| *size < high).collect();
        // What did not pass bounds the next round, too.
        sizes.push(high);
    }
}

/// Which of these sizes are answered: of each two are sent, at the same time.
fn passing(runner: &Runner, address: IpAddr, sizes: &[u32]) -> Vec<bool> {
    let headers = if address.is_ipv6() { 48 } else { 28 };
    let passes = |size: u32| {
        let (bytes, address) = (size.saturating_sub(headers).to_string(), address.to_string());
        let words = ["-n", "-q", "-c", "2", "-i", "0.2", "-W", "1", "-M", "do", "-s", &bytes, &address];
        runner.read(&Cmd::new("ping", words).patience(Duration::from_secs(5))).is_ok()
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = sizes.iter().map(|size| scope.spawn(move || passes(*size))).collect();
        running.into_iter().map(|ping| ping.join().unwrap_or(false)).collect()
    })
}

/// Does an address answer within a second, when it is asked once, from this address and with this type of service?
pub(crate) fn answers(runner: &Runner, address: IpAddr, source: IpAddr, tos: u8) -> bool {
    let (address, source, tos) = (address.to_string(), source.to_string(), tos.to_string());
    let words = ["-n", "-q", "-c", "1", "-W", "1", "-Q", &tos, "-I", &source, &address];
    runner.read(&Cmd::new("ping", words).patience(Duration::from_secs(3))).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_size_that_passes_is_found_exactly() {
        let found = |mtu: u32, most: u32| {
            let sizes = COMMON.into_iter().filter(|size| *size < most).chain([576, most]).collect();
            bisect(sizes, |sizes| sizes.iter().map(|size| *size <= mtu).collect())
        };
        for mtu in [576, 577, 1279, 1400, 1437, 1499, 1500, 1501, 1538, 7999, 8999, 9000] {
            assert_eq!(found(mtu, 9000), Some(mtu));
        }
        assert_eq!(found(9000, 1500), Some(1500));
        assert_eq!(found(100, 1500), None);
    }
}
