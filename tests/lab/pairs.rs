//! Few rows that hold every pair of values of every two factors, instead of the full product.

use std::collections::BTreeSet;

/// Two factors with a value each, the first factor being the smaller.
type Pair = ((usize, usize), (usize, usize));

/// Candidates for a row, of which the one with most new pairs is taken.
const CANDIDATES: usize = 60;

/// Rows, one value for each factor, that hold all pairs. `counts` are the factors' numbers of values. `effective`
/// changes a row to what it really tests, where one factor's value makes another factor meaningless.
pub(crate) fn all_pairs<const N: usize>(counts: [usize; N], effective: impl Fn(&mut [usize; N])) -> Vec<[usize; N]> {
    let mut left = pairs_of_all(&counts);
    let (mut rows, mut state) = (Vec::new(), 0x9e37_79b9_7f4a_7c15_u64);
    while let Some(wanted) = left.first().copied() {
        let candidates = std::iter::repeat_with(|| candidate(&counts, wanted, &effective, &mut state)).take(CANDIDATES);
        let best = candidates.max_by_key(|row| new_pairs(row, &left).count()).expect("there are candidates");
        let taken: Vec<Pair> = new_pairs(&best, &left).collect();
        left.retain(|pair| !taken.contains(pair));
        if !taken.is_empty() {
            rows.push(best);
        }
    }
    rows
}

/// Every pair of values of these factors.
pub(crate) fn pairs_of_all(counts: &[usize]) -> BTreeSet<Pair> {
    let values = |factor: usize| (0..counts[factor]).map(move |value| (factor, value));
    let factors = (0..counts.len()).flat_map(|b| (0..b).map(move |a| (a, b)));
    factors.flat_map(|(a, b)| values(a).flat_map(move |one| values(b).map(move |other| (one, other)))).collect()
}

/// A random row with the wanted pair, as far as it stays effective.
fn candidate<const N: usize>(
    counts: &[usize; N],
    wanted: Pair,
    effective: &impl Fn(&mut [usize; N]),
    state: &mut u64,
) -> [usize; N] {
    let mut row = counts.map(|count| random(state) as usize % count);
    for (factor, value) in [wanted.0, wanted.1] {
        row[factor] = value;
    }
    effective(&mut row);
    row
}

fn new_pairs<'a, const N: usize>(row: &'a [usize; N], left: &'a BTreeSet<Pair>) -> impl Iterator<Item = Pair> + 'a {
    let pairs = (0..N).flat_map(|b| (0..b).map(move |a| (a, b)));
    pairs.map(|(a, b)| ((a, row[a]), (b, row[b]))).filter(|pair| left.contains(pair))
}

/// The same numbers in every run (xorshift), so that a failure comes again.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state >> 33
}
