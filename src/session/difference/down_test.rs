//! Remotes that are down: who gets copies, whose flows move, and in which order that is written.

use std::collections::BTreeSet;

use super::tests::{Dice, Kernel, made, wanted};
use super::*;
use crate::request::tests::request;
use crate::session::change::Act;
use crate::session::stored::Silence;

const REMOTES: [&str; 4] = ["10.0.0.6", "10.0.0.7", "10.0.0.8", "10.0.0.9"];

fn all() -> Request {
    request(&["eth0", "--spread", "flow", "--remote", &REMOTES.join(",")])
}

/// The same session with these of its remotes down.
fn with_down(there: &There, down: &[usize]) -> Wanted {
    let silent = |at: &usize| (REMOTES[*at].parse().unwrap(), Silence::Ping);
    Wanted { down: down.iter().map(silent).collect(), ..wanted(there, all()) }
}

fn slot(there: &There, remote: usize) -> u32 {
    there.stored.as_ref().unwrap().remotes[&REMOTES[remote].parse::<IpAddr>().unwrap()]
}

/// The remote slot of each bucket.
fn table(there: &There) -> Vec<u8> {
    let mut rows: Vec<(u32, Vec<u8>)> = there.rows[&Map::Spread]
        .iter()
        .map(|(key, value)| (crate::session::there::index(key).unwrap(), value[0].clone()))
        .collect();
    rows.sort_unstable();
    rows.into_iter().flat_map(|(_, slots)| slots).collect()
}

fn set(there: &There, remotes: &[usize]) -> u64 {
    remotes.iter().fold(0, |set, at| set | 1 << slot(there, *at))
}

/// Panics unless exactly the flows of those that are down are elsewhere than in `whole`, and all is remembered.
#[track_caller]
fn assert_down(kernel: &Kernel, whole: &[u8], down: &[usize]) {
    let there = &kernel.there;
    let slots: BTreeSet<u8> = down.iter().map(|at| slot(there, *at) as u8).collect();
    assert_eq!(there.config.unwrap().down, set(there, down));
    assert_eq!(there.down(), down.iter().map(|at| REMOTES[*at].parse().unwrap()).collect());
    for (bucket, (before, now)) in whole.iter().zip(table(there)).enumerate() {
        let stays = !slots.contains(before) || slots.len() == REMOTES.len();
        assert_eq!(*before == now, stays, "bucket {bucket} with {down:?} down");
        assert!(stays || !slots.contains(&now), "bucket {bucket} goes to one that is down, too");
    }
}

#[test]
fn whatever_remotes_are_down_only_their_flows_move_and_they_come_back() {
    let (mut kernel, _) = made(all());
    let whole = table(&kernel.there);
    let mut dice = Dice(0xd0);
    for _ in 0..23 {
        let down: Vec<usize> = (0..REMOTES.len()).filter(|_| dice.below(2) == 0).collect();
        let wanted = with_down(&kernel.there, &down);
        kernel.settle(&wanted, &format!("{down:?}"));
        assert_down(&kernel, &whole, &down);
        // What was not looked up stays as it is.
        let unasked = Wanted { remotes: BTreeMap::new(), down: BTreeMap::new(), ..wanted };
        assert_eq!(difference(&unasked, &kernel.there), (Vec::new(), false));
    }
    kernel.settle(&with_down(&kernel.there, &[]), "all up");
    assert_eq!((table(&kernel.there), kernel.there.config.unwrap().down), (whole, 0));
}

#[test]
fn flows_leave_a_remote_before_it_gets_no_copies_and_come_when_it_gets_them_again() {
    let (mut kernel, _) = made(all());
    let mut turn = |down: &[usize]| {
        let (changes, _) = difference(&with_down(&kernel.there, down), &kernel.there);
        kernel.apply_all(&changes);
        let acts = changes.iter().flat_map(|change| &change.acts);
        let order = acts.filter_map(|act| match act {
            Act::Configure(config) => Some(config.down),
            Act::Write(Map::Spread, ..) => Some(u64::MAX),
            _ => None,
        });
        let mut order: Vec<u64> = order.collect();
        order.dedup();
        let told: Vec<String> = changes.iter().filter(|at| !at.is_silent()).map(Change::line).collect();
        (order, told)
    };
    let (second, third) = (1 << 1, 1 << 2);
    assert_eq!(
        turn(&[1]),
        (vec![u64::MAX, second], vec!["remote 10.0.0.7: it does not answer ping; down".to_string()])
    );
    let both = ["remote 10.0.0.7: it answers; up", "remote 10.0.0.8: it does not answer ping; down"];
    assert_eq!(turn(&[2]), (vec![0, u64::MAX, third], both.map(String::from).to_vec()));
    assert_eq!(turn(&[]), (vec![0, u64::MAX], vec!["remote 10.0.0.8: it answers; up".to_string()]));
    assert_eq!(turn(&[]), (Vec::new(), Vec::new()));
}

#[test]
fn a_remote_that_cannot_be_reached_gets_no_flows_and_is_not_called_down() {
    let (mut kernel, mut wanted) = made(all());
    let whole = table(&kernel.there);
    let lost: IpAddr = REMOTES[3].parse().unwrap();
    let outer = wanted.remotes.get_mut(&lost).unwrap();
    outer.path = None;
    kernel.settle(&wanted, "no route");
    assert_eq!((kernel.there.config.unwrap().down, kernel.there.down().len()), (set(&kernel.there, &[3]), 0));
    assert!(!table(&kernel.there).contains(&(slot(&kernel.there, 3) as u8)));
    kernel.settle(&with_down(&kernel.there, &[]), "a route");
    assert_eq!((table(&kernel.there), kernel.there.config.unwrap().down), (whole, 0));
}

#[test]
fn a_remote_that_is_down_can_be_removed_and_its_slot_given_to_another() {
    let (mut kernel, _) = made(all());
    kernel.settle(&with_down(&kernel.there, &[0, 3]), "two down");
    let freed = set(&kernel.there, &[0]);
    let fewer = request(&["eth0", "--spread", "flow", "--remote", &REMOTES[1..].join(",")]);
    let down = BTreeMap::from([(REMOTES[3].parse().unwrap(), Silence::Ping)]);
    let wanted = Wanted { down, ..wanted(&kernel.there, fewer) };
    // While copies are still made for it, it stays down.
    let (changes, _) = difference(&wanted, &kernel.there);
    let configs = changes.iter().flat_map(|change| &change.acts).filter_map(|act| match act {
        Act::Configure(config) => Some(config.remotes & freed != 0 && config.down & freed == 0),
        _ => None,
    });
    assert_eq!(configs.filter(|wakes| *wakes).count(), 0);
    kernel.settle(&wanted, "one removed");
    assert_eq!(kernel.there.config.unwrap().down, set(&kernel.there, &[3]));
    assert_eq!(kernel.there.config.unwrap().remotes & freed, 0);
    kernel.settle(&with_down(&kernel.there, &[3]), "it is back");
    assert_eq!(kernel.there.config.unwrap().down, set(&kernel.there, &[3]));
}

#[test]
fn what_is_half_done_is_finished_or_taken_back() {
    for done in 0..80 {
        let (mut kernel, _) = made(all());
        let whole = table(&kernel.there);
        kernel.settle(&with_down(&kernel.there, &[1]), "one down");
        let before = kernel.there.clone();
        let wanted = with_down(&kernel.there, &[2, 3]);
        let (changes, _) = difference(&wanted, &kernel.there);
        let acts: Vec<Act> = changes.into_iter().flat_map(|change| change.acts).collect();
        let part = Change::silent(acts.into_iter().take(done).collect());
        kernel.apply_all(&[part]);
        let mut other = kernel.clone();
        kernel.settle(&wanted, "half done");
        assert_down(&kernel, &whole, &[2, 3]);
        let undone = back(&before, &other.there);
        other.apply_all(&undone);
        assert_down(&other, &whole, &[1]);
    }
}
