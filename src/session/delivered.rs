//! Both ends together: what a session has sent to a remote, and what a collector says has arrived of it. Pure.
//!
//! Where copies are numbered, the collector's own gaps tell what is lost, frame by frame, while traffic runs. Where they are
//! not, only counts can be compared: what is sent between two readings may be on its way, or lost.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Deserialize;

use crate::collect::sequence::Run;
use crate::datapath::abi::Stat;
use crate::session::law::since;

/// What one side of a sender's look says of a remote.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sent {
    pub stat: Stat,
    pub numbers: Numbers,
}

/// What the next copy is numbered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Numbers {
    /// Copies have no numbers.
    #[default]
    None,
    /// All copies to the remote are counted together.
    OfRemote(u32),
    /// Each tap's are, by its slot.
    OfTaps(BTreeMap<u32, u32>),
}

/// The collector's answer, as far as it is needed.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct Arrived {
    /// How long it has been receiving.
    pub seconds: f64,
    /// When it answered, in seconds since 1970, by its clock.
    pub now: Option<f64>,
    /// Packets that found its queue full, whoever sent them.
    #[serde(default)]
    pub dropped: u64,
    pub streams: Vec<Stream>,
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Stream {
    pub source: IpAddr,
    #[serde(default)]
    pub tunnel: String,
    pub id: Option<u32>,
    pub tap: Option<u32>,
    pub direction: Option<String>,
    #[serde(default)]
    pub received: u64,
    pub sequence: Option<usize>,
    pub run: Option<Run>,
    /// When its first copy came, its last, and the first since its sequence began, as `now`.
    pub first: Option<f64>,
    pub last: Option<f64>,
    pub begun: Option<f64>,
}

impl Stream {
    /// The tap's slot, where the tunnel tells it.
    fn slot(&self) -> Option<u32> {
        let egress = match self.direction.as_deref()? {
            "ingress" => 0,
            "egress" => 1,
            _ => return None,
        };
        self.tap.map(|tap| 2 * tap + egress)
    }
}

/// Whose copies are meant.
#[derive(Clone, Debug)]
pub(crate) struct Sender {
    pub source: IpAddr,
    pub tunnel: String,
    /// By direction; none where the tunnel has none.
    pub ids: Vec<Option<u32>>,
}

impl Sender {
    /// Its streams.
    pub(crate) fn own<'a>(&'a self, arrived: &'a Arrived) -> impl Iterator<Item = &'a Stream> {
        arrived.streams.iter().filter(|stream| {
            let is_same = stream.source == self.source && stream.tunnel == self.tunnel;
            is_same && self.ids.contains(&stream.id)
        })
    }
}

impl Arrived {
    /// Without streams that had ended before a session began, so many seconds ago.
    pub(crate) fn without_ended(mut self, age: f64) -> Arrived {
        let now = self.now;
        self.streams.retain(|stream| !is_before(now, stream.last, age));
        self
    }

    /// Does a stream of this sender go on from before that?
    pub(crate) fn goes_on(&self, sender: &Sender, age: f64) -> bool {
        sender.own(self).any(|stream| is_before(self.now, stream.begun.or(stream.first), age))
    }
}

fn is_before(now: Option<f64>, at: Option<f64>, age: f64) -> bool {
    now.zip(at).is_some_and(|(now, at)| now - at > age)
}

/// A look at both ends: the sender's before and after the collector's.
#[derive(Clone, Debug)]
pub(crate) struct Both {
    pub before: Sent,
    pub arrived: Arrived,
    pub after: Sent,
}

/// How many were sent, and how many of them came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Slot of the tap, where each tap is counted.
    pub slot: Option<u32>,
    pub sent: u64,
    pub received: u64,
    pub lost: u64,
}

/// What became of the copies to a remote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Delivered {
    pub is_numbered: bool,
    /// By taps, where each is counted; else one.
    pub tallies: Vec<Tally>,
    /// Dropped here, and counted there by reason.
    pub dropped: u64,
    pub sent: u64,
    pub received: u64,
    /// Lost for sure.
    pub lost: u64,
    /// Lost or still on their way.
    pub open: u64,
}

/// Why nothing can be said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unclear {
    /// Of copies without numbers, as the collector has not heard all of them.
    BegunLater,
    /// The collector began later, and has heard nothing.
    Silent,
    /// What the collector has heard began with a session before this one.
    GoesOn,
    /// The collector has heard more than was sent: another session sent so, too.
    More,
    /// Two sequences where there is one, as the collector does not know both ids.
    Apart,
}

/// Since the first look; without one since both ends began, `heard_all` saying that the collector began first.
///
/// # Errors
/// The numbers do not belong together.
pub(crate) fn delivered(
    sender: &Sender,
    first: Option<&Both>,
    second: &Both,
    heard_all: bool,
) -> Result<Delivered, Unclear> {
    let dropped = since(second.after.stat.dcnt, first.map_or(0, |first| first.after.stat.dcnt));
    if second.before.numbers == Numbers::None {
        return counted(sender, first, second, heard_all).map(|delivered| Delivered { dropped, ..delivered });
    }
    let heard_all = heard_all || first.is_some();
    let before = first.map(|first| numbered(sender, first, heard_all)).transpose()?.unwrap_or_default();
    let now = numbered(sender, second, heard_all)?;
    let tallies: Vec<Tally> = now.iter().map(|tally| later(&before, tally)).collect();
    let sum = |of: fn(&Tally) -> u64| tallies.iter().map(of).fold(0, u64::saturating_add);
    let refused = since(refused(&second.after), first.map_or(0, |first| refused(&first.after))).min(dropped);
    if !heard_all && sum(|tally| tally.sent) == 0 && second.before.stat.pcnt > 0 {
        return Err(Unclear::Silent);
    }
    let missing = sum(|tally| tally.lost);
    let lost = missing.saturating_sub(refused);
    let received = sum(|tally| tally.received);
    Ok(Delivered { is_numbered: true, tallies, dropped, sent: received.saturating_add(lost), received, lost, open: 0 })
}

/// Copies that got a number, and were dropped all the same.
fn refused(sent: &Sent) -> u64 {
    let numbers = match &sent.numbers {
        Numbers::None => return 0,
        Numbers::OfRemote(next) => *next,
        Numbers::OfTaps(all) => all.values().fold(0_u32, |sum, next| sum.wrapping_add(*next)),
    };
    let more = numbers.wrapping_sub(sent.stat.pcnt as u32);
    if more < 1 << 31 { u64::from(more).min(sent.stat.dcnt) } else { 0 }
}

/// By the numbers of the copies.
fn numbered(sender: &Sender, both: &Both, heard_all: bool) -> Result<Vec<Tally>, Unclear> {
    let own: Vec<&Stream> = sender.own(&both.arrived).collect();
    match (&both.before.numbers, &both.after.numbers) {
        (Numbers::OfTaps(before), Numbers::OfTaps(after)) => {
            let of = |(slot, before): (&u32, &u32)| {
                let run = run_of(&own, *slot);
                let after = after.get(slot).copied().unwrap_or(*before);
                Tally { slot: Some(*slot), ..tally(*before, after, run, heard_all) }
            };
            Ok(before.iter().map(of).collect())
        }
        (Numbers::OfRemote(before), Numbers::OfRemote(after)) => {
            let told = own.iter().filter_map(|stream| Some((stream.sequence?, stream.run?)));
            let runs: BTreeMap<usize, Run> = told.collect();
            match runs.len() {
                0 | 1 => Ok(vec![tally(*before, *after, runs.into_values().next(), heard_all)]),
                _ => Err(Unclear::Apart),
            }
        }
        _ => Ok(Vec::new()),
    }
}

/// What has come of a tap.
fn run_of(own: &[&Stream], slot: u32) -> Option<Run> {
    own.iter().find(|stream| stream.slot() == Some(slot))?.run
}

/// Of one sequence: the copy behind all that were sent had this number before the collector was asked, and that one after.
fn tally(before: u32, after: u32, run: Option<Run>, heard_all: bool) -> Tally {
    // What is ahead of us was sent by somebody before us.
    let run = run.filter(|run| after.wrapping_sub(run.next) < 1 << 31);
    let Some(run) = run else {
        let sent = if heard_all { u64::from(before) } else { 0 };
        return Tally { slot: None, sent, received: 0, lost: sent };
    };
    let head = if heard_all { u64::from(run.first) } else { 0 };
    let tail = before.wrapping_sub(run.next);
    let tail = if tail < 1 << 31 { u64::from(tail) } else { 0 };
    let sent = head.saturating_add(run.span).saturating_add(tail);
    let received = run.arrived.min(sent);
    Tally { slot: None, sent, received, lost: sent - received }
}

/// What has come since an earlier look; all of it where the sequence has begun again.
fn later(before: &[Tally], now: &Tally) -> Tally {
    let Some(before) = before.iter().find(|tally| tally.slot == now.slot) else { return *now };
    match (now.sent.checked_sub(before.sent), now.received.checked_sub(before.received)) {
        // One that was late at the first look has come since.
        (Some(sent), Some(received)) => Tally { slot: now.slot, sent, received, lost: sent.saturating_sub(received) },
        _ => *now,
    }
}

/// By counts alone.
fn counted(sender: &Sender, first: Option<&Both>, second: &Both, heard_all: bool) -> Result<Delivered, Unclear> {
    let (before, after, came) = match first {
        Some(first) => (
            second.before.stat.pcnt.saturating_sub(first.after.stat.pcnt),
            since(second.after.stat.pcnt, first.before.stat.pcnt),
            since(received(sender, &second.arrived), received(sender, &first.arrived)),
        ),
        None if !heard_all => return Err(Unclear::BegunLater),
        None => (second.before.stat.pcnt, second.after.stat.pcnt, received(sender, &second.arrived)),
    };
    let most = after.checked_sub(came).ok_or(Unclear::More)?;
    let lost = before.saturating_sub(came);
    let tally = Tally { slot: None, sent: after, received: came, lost };
    let open = most - lost;
    Ok(Delivered { is_numbered: false, tallies: vec![tally], dropped: 0, sent: after, received: came, lost, open })
}

fn received(sender: &Sender, arrived: &Arrived) -> u64 {
    sender.own(arrived).map(|stream| stream.received).fold(0, u64::saturating_add)
}

/// Has all come that was sent since the first look, before the collector was asked, or is it known to be lost?
pub(crate) fn is_settled(sender: &Sender, first: Option<&Both>, before: &Sent, arrived: &Arrived) -> bool {
    let own: Vec<&Stream> = sender.own(arrived).collect();
    let has_come = |next: u32, run: Option<Run>| match run {
        Some(run) => run.next.wrapping_sub(next) < 1 << 31,
        None => next == 0,
    };
    match &before.numbers {
        Numbers::None => {
            let (sent, heard) = first.map_or((0, 0), |first| (first.after.stat.pcnt, received(sender, &first.arrived)));
            since(received(sender, arrived), heard) >= since(before.stat.pcnt, sent)
        }
        Numbers::OfRemote(next) => has_come(*next, own.iter().find_map(|stream| stream.run)),
        Numbers::OfTaps(all) => all.iter().all(|(slot, next)| has_come(*next, run_of(&own, *slot))),
    }
}

#[cfg(test)]
#[path = "delivered_test.rs"]
mod tests;
