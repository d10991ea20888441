use super::*;

const SOURCE: [u8; 4] = [10, 0, 0, 5];

fn sender() -> Sender {
    Sender { source: SOURCE.into(), tunnel: "gre".into(), ids: vec![Some(7), Some(8)] }
}

fn stream(received: u64, run: Option<(u32, u32, u64)>) -> Stream {
    let run = run.map(|(first, next, arrived)| Run { first, next, arrived, span: u64::from(next.wrapping_sub(first)) });
    let (id, tap, direction) = (Some(7), None, None);
    let (tunnel, sequence, first, last, begun) = ("gre".into(), run.map(|_| 3), None, None, None);
    Stream { source: SOURCE.into(), tunnel, id, tap, direction, received, sequence, run, first, last, begun }
}

fn sent(pcnt: u64, dcnt: u64, numbers: Numbers) -> Sent {
    Sent { stat: Stat { pcnt, dcnt, ..Stat::default() }, numbers }
}

fn both(before: u64, streams: Vec<Stream>, after: u64) -> Both {
    let of = |n| sent(n, 0, Numbers::OfRemote(n as u32));
    Both { before: of(before), arrived: Arrived { streams, ..Arrived::default() }, after: of(after) }
}

fn plain(before: u64, received: u64, after: u64) -> Both {
    let arrived = Arrived { streams: vec![stream(received, None)], ..Arrived::default() };
    Both { before: sent(before, 0, Numbers::None), arrived, after: sent(after, 0, Numbers::None) }
}

/// Sent, received, lost, and what is open.
fn told(first: Option<&Both>, second: &Both, heard_all: bool) -> Result<(u64, u64, u64, u64), Unclear> {
    let told = delivered(&sender(), first, second, heard_all)?;
    assert_eq!(told.sent, told.received + told.lost + told.open);
    Ok((told.sent, told.received, told.lost, told.open))
}

#[test]
fn numbers_tell_what_is_lost_at_the_beginning_in_between_and_at_the_end() {
    let one = |run| vec![stream(0, Some(run))];
    assert_eq!(told(None, &both(100, one((0, 100, 100)), 100), true), Ok((100, 100, 0, 0)));
    assert_eq!(told(None, &both(100, one((3, 90, 80)), 100), true), Ok((100, 80, 20, 0)));
    // What came before the collector began is not asked for.
    assert_eq!(told(None, &both(100, one((3, 90, 80)), 100), false), Ok((97, 80, 17, 0)));
    // While traffic runs the collector may be ahead of the first reading.
    assert_eq!(told(None, &both(100, one((0, 140, 139)), 150), true), Ok((140, 139, 1, 0)));
    assert_eq!(told(None, &both(100, vec![], 100), true), Ok((100, 0, 100, 0)));
    assert_eq!(told(None, &both(100, vec![], 100), false), Err(Unclear::Silent));
    assert_eq!(told(None, &both(0, vec![], 0), false), Ok((0, 0, 0, 0)));
    // From a collector that is none.
    let most = Run { first: 0, next: 100, arrived: u64::MAX, span: u64::MAX };
    let odd = vec![Stream { run: Some(most), ..stream(u64::MAX, None) }; 2];
    assert!(told(None, &both(100, odd, 100), true).is_ok());
    // The numbers of a session before this one.
    assert_eq!(told(None, &both(5, one((0, 100, 100)), 5), true), Ok((5, 0, 5, 0)));
    let around = both(10, one((u32::MAX - 9, 10, 18)), 10);
    assert_eq!(told(Some(&around), &both(20, one((u32::MAX - 9, 20, 28)), 20), false), Ok((10, 10, 0, 0)));
}

#[test]
fn from_one_look_to_the_next_only_what_is_new_counts() {
    let one = |run| vec![stream(0, Some(run))];
    let first = both(100, one((3, 90, 80)), 100);
    // Nine of those that were thought lost have come late.
    let late = delivered(&sender(), Some(&first), &both(200, one((3, 200, 189)), 200), false).unwrap();
    assert_eq!((late.received, late.lost), (109, 0));
    assert_eq!(told(Some(&first), &both(200, one((3, 200, 175)), 200), false), Ok((100, 95, 5, 0)));
    // The session was made anew in between.
    assert_eq!(told(Some(&first), &both(50, one((0, 50, 49)), 50), false), Ok((50, 49, 1, 0)));
}

#[test]
fn each_tap_is_told_by_itself_where_each_is_numbered() {
    let of = |tap, direction: &str, run| Stream { tap: Some(tap), direction: Some(direction.into()), ..stream(0, run) };
    let streams = vec![of(0, "ingress", Some((0, 10, 10))), of(1, "egress", Some((0, 18, 17)))];
    let numbers = Numbers::OfTaps([(0, 10), (1, 4), (3, 20)].into());
    let look = sent(32, 2, numbers);
    let both = Both { before: look.clone(), arrived: Arrived { streams, ..Arrived::default() }, after: look };
    let told = delivered(&sender(), None, &both, true).unwrap();
    let taps: Vec<_> = told.tallies.iter().map(|tally| (tally.slot, tally.sent, tally.received, tally.lost)).collect();
    assert_eq!(taps, [(Some(0), 10, 10, 0), (Some(1), 4, 0, 4), (Some(3), 20, 17, 3)]);
    // Two copies were dropped here once they had their numbers.
    assert_eq!((told.sent, told.received, told.lost, told.dropped), (32, 27, 5, 2));
}

#[test]
fn without_numbers_what_is_sent_meanwhile_is_open() {
    assert_eq!(told(None, &plain(100, 100, 100), true), Ok((100, 100, 0, 0)));
    assert_eq!(told(None, &plain(100, 95, 100), true), Ok((100, 95, 5, 0)));
    assert_eq!(told(None, &plain(100, 103, 110), true), Ok((110, 103, 0, 7)));
    assert_eq!(told(None, &plain(100, 95, 110), true), Ok((110, 95, 5, 10)));
    assert_eq!(told(None, &plain(100, 100, 100), false), Err(Unclear::BegunLater));
    assert_eq!(told(None, &plain(100, 140, 100), true), Err(Unclear::More));
    assert_eq!(told(Some(&plain(100, 40, 100)), &plain(150, 88, 150), false), Ok((50, 48, 2, 0)));
    assert_eq!(told(Some(&plain(100, 40, 104)), &plain(150, 88, 150), false), Ok((50, 48, 0, 2)));
}

#[test]
fn strangers_are_not_counted() {
    let stranger = |change: fn(&mut Stream)| {
        let mut one = stream(5, None);
        change(&mut one);
        one
    };
    let mut both = plain(9, 9, 9);
    both.arrived.streams.extend([
        stranger(|one| one.source = [10, 0, 0, 6].into()),
        stranger(|one| one.tunnel = "vxlan".into()),
        stranger(|one| one.id = Some(9)),
    ]);
    assert_eq!(told(None, &both, true), Ok((9, 9, 0, 0)));
    both.arrived.streams.push(stranger(|one| one.id = Some(8)));
    assert_eq!(told(None, &both, true), Err(Unclear::More));
}

#[test]
fn two_sequences_of_one_remote_are_told_apart() {
    let second = Stream { id: Some(8), sequence: Some(4), ..stream(0, Some((0, 9, 9))) };
    let look = both(20, vec![stream(0, Some((0, 20, 11))), second], 20);
    assert_eq!(told(None, &look, true), Err(Unclear::Apart));
}

#[test]
fn a_look_is_settled_once_the_collector_has_caught_up() {
    let settled = |look: &Both| is_settled(&sender(), None, &look.before, &look.arrived);
    let one = |run| vec![stream(0, Some(run))];
    assert!(settled(&both(100, one((0, 100, 98)), 100)) && !settled(&both(100, one((0, 99, 99)), 100)));
    assert!(settled(&both(0, vec![], 0)) && !settled(&both(1, vec![], 1)));
    assert!(settled(&plain(100, 100, 100)) && !settled(&plain(100, 99, 100)));
}

#[test]
fn what_came_of_a_session_before_is_told_apart_by_its_time() {
    let of = |first, begun, last| Stream { first: Some(first), begun, last: Some(last), ..stream(9, None) };
    let arrived = |stream| Arrived { now: Some(100.0), streams: vec![stream], ..Arrived::default() };
    // The session is ten seconds old.
    assert!(arrived(of(50.0, None, 89.0)).without_ended(10.0).streams.is_empty());
    let both = arrived(of(50.0, None, 95.0)).without_ended(10.0);
    assert!(both.streams.len() == 1 && both.goes_on(&sender(), 10.0));
    assert!(!arrived(of(50.0, Some(91.0), 95.0)).goes_on(&sender(), 10.0), "its sequence began anew");
    assert!(arrived(of(50.0, Some(60.0), 95.0)).goes_on(&sender(), 10.0));
    assert!(!arrived(of(91.0, None, 95.0)).goes_on(&sender(), 10.0));
    let silent = Arrived { now: None, ..arrived(of(50.0, None, 60.0)) };
    assert!(silent.clone().without_ended(10.0).streams.len() == 1 && !silent.goes_on(&sender(), 10.0));
}
