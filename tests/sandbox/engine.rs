//! The engine: killed before or after any of its acts it is put right by `sync`, and so is whatever is damaged.

use crate::lab::kills::{self, Verb, kill_at};

/// A part of the acts, before them and after them in turn; `make soak` takes each act, both ways.
fn sampled(verb: Verb, acts: impl Iterator<Item = u32>) {
    let turn = std::cell::Cell::new(0);
    kill_at(verb, acts, |_| {
        turn.set(turn.get() + 1);
        vec![if turn.get() % 2 == 1 { "before" } else { "after" }]
    });
}

/// Every so manyth act.
fn each(step: usize) -> impl Iterator<Item = u32> {
    (1..).step_by(step)
}

/// The flow table takes 64 acts; what comes after them, all of it.
fn past_the_flow_table() -> impl Iterator<Item = u32> {
    (1..65).step_by(21).chain(65..)
}

macro_rules! killed {
    ($($test:ident $verb:ident $acts:expr),*) => {
        $(#[test] fn $test() { sampled(kills::$verb, $acts); })*
    };
}

killed!(
    up_that_was_killed_is_put_right UP each(13),
    up_with_a_filter_that_was_killed_is_put_right UP_FILTERED each(17),
    a_replacement_that_was_killed_is_put_right REPLACE each(11),
    a_tap_that_was_being_added_is_put_right TAP_ADD each(2),
    a_tap_that_was_being_removed_is_put_right TAP_REMOVE each(2),
    a_remote_that_was_being_added_is_put_right REMOTE_ADD past_the_flow_table(),
    a_remote_that_was_being_removed_is_put_right REMOTE_REMOVE past_the_flow_table(),
    a_filter_that_was_being_set_is_put_right FILTER_SET each(2),
    a_filter_that_was_being_cleared_is_put_right FILTER_CLEAR each(5),
    a_repair_of_the_relay_that_was_killed_is_put_right SYNC_RELAY each(5),
    a_repair_of_taps_that_was_killed_is_put_right SYNC_TAP each(2),
    down_that_was_killed_is_put_right DOWN each(3)
);
