//! The flow table: which remote gets a flow.

use std::net::IpAddr;

use crate::datapath::abi::{self, BUCKETS};

/// The remote slot of each bucket: the remote that scores highest for it. So a remote that goes takes only its own
/// buckets with it, and a new one takes an equal share from each (rendezvous hashing, Thaler and Ravishankar 1998).
pub(crate) fn spread(remotes: &[(u32, IpAddr)]) -> Vec<u8> {
    let winner = |bucket: usize| {
        let best = remotes.iter().max_by_key(|(_, address)| score(bucket as u64, *address));
        best.map_or(0, |(slot, _)| *slot as u8)
    };
    (0..BUCKETS).map(winner).collect()
}

/// A well-mixed number from a bucket and an address (FNV-1a over the address, finished by splitmix64).
fn score(bucket: u64, address: IpAddr) -> u64 {
    let text = abi::tunnel_key(address, address);
    let seed = text[..16]
        .iter()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
    let mut mixed = seed ^ bucket.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remotes(n: u8) -> Vec<(u32, IpAddr)> {
        (0..n).map(|i| (u32::from(i), IpAddr::from([10, 0, 0, i + 1]))).collect()
    }

    fn moved(a: &[u8], b: &[u8]) -> usize {
        a.iter().zip(b).filter(|(a, b)| a != b).count()
    }

    #[test]
    fn buckets_are_shared_evenly() {
        for n in [2u8, 5, 16, 64] {
            let table = spread(&remotes(n));
            let fair = BUCKETS / usize::from(n);
            for slot in 0..n {
                let share = table.iter().filter(|at| **at == slot).count();
                // Four standard deviations of a fair draw.
                let slack = 4.0 * (fair as f64).sqrt();
                assert!((share as f64 - fair as f64).abs() < slack, "{n} remotes, slot {slot}: {share}");
            }
        }
    }

    #[test]
    fn a_remote_that_goes_moves_only_its_own_buckets() {
        let all = remotes(5);
        let before = spread(&all);
        let after = spread(&[all[0], all[1], all[3], all[4]]);
        let own = before.iter().filter(|slot| **slot == 2).count();
        assert_eq!(moved(&before, &after), own);
    }

    #[test]
    fn a_new_remote_takes_about_its_share_and_nothing_else_moves() {
        let before = spread(&remotes(4));
        let after = spread(&remotes(5));
        let taken = after.iter().filter(|slot| **slot == 4).count();
        assert_eq!(moved(&before, &after), taken);
        assert!(taken.abs_diff(BUCKETS / 5) < BUCKETS / 25, "{taken}");
    }
}
