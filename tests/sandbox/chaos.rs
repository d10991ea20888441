//! Everything at once: a machine that changes all the time, under traffic. `make soak` has more of it.

use crate::lab;
use std::time::Duration;

#[test]
fn what_is_left_after_chaos_is_a_mirror_in_order() {
    for seed in lab::chaos::seeds(&[16]) {
        lab::chaos::run(seed, Duration::from_secs(20));
    }
}
