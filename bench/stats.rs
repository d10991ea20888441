//! Medians and quartiles.

use serde::{Deserialize, Serialize};

/// What many rounds said about one figure.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Spread {
    pub median: f64,
    pub q1: f64,
    pub q3: f64,
    /// How many values.
    pub n: usize,
}

impl Spread {
    /// None of no values. Those that are no number (a ratio to nothing) are left out.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Spread> {
        let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let n = values.len();
        (n > 0).then(|| Spread {
            median: quantile(&values, 0.5),
            q1: quantile(&values, 0.25),
            q3: quantile(&values, 0.75),
            n,
        })
    }
}

/// Between the two nearest values, in proportion.
pub(crate) fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    below + (above - below) * at.fract()
}
