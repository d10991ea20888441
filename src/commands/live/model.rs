//! What the live view knows: of each session the rates between the last two looks, and those before as a history. Pure.

use std::collections::{BTreeMap, VecDeque};

use crate::output::status;
use crate::session::counted::Counted;
use crate::session::health::{self, Health};
use crate::session::law::Look;
use crate::session::stats::{RemoteState, Rise, Session};

/// So many rates are kept of each row.
const HISTORY: usize = 120;

#[derive(Debug, Default)]
pub(super) struct Model {
    pub sessions: Vec<Live>,
    /// There was a look.
    pub has_looked: bool,
}

#[derive(Debug, Default)]
pub(super) struct Live {
    pub name: String,
    /// What tells it from others: tunnel and options.
    pub about: String,
    pub filter: Option<String>,
    pub taps: Vec<Series>,
    pub remotes: Vec<Series>,
    /// Copies that were not sent, by reason, since the session is up.
    pub drops: Vec<(String, u64)>,
    /// What is not as it must be, from the last whole look.
    pub faults: Vec<String>,
    last: Option<Counted>,
}

/// A tap or a remote.
#[derive(Clone, Debug)]
pub(super) struct Series {
    pub name: String,
    /// The direction of a tap, the out interface of a remote.
    pub side: String,
    pub health: Health,
    pub why: Option<String>,
    /// Since the look before; none at the first.
    pub rise: Option<Rise>,
    pub dropped: u64,
    /// Copies a second, the latest at the end.
    pub history: VecDeque<f64>,
}

/// What rows are sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Sort {
    #[default]
    Worst,
    Rate,
    Drops,
    Name,
}

impl Sort {
    pub(super) fn next(self) -> Sort {
        match self {
            Sort::Worst => Sort::Rate,
            Sort::Rate => Sort::Drops,
            Sort::Drops => Sort::Name,
            Sort::Name => Sort::Worst,
        }
    }

    pub(super) fn word(self) -> &'static str {
        match self {
            Sort::Worst => "worst",
            Sort::Rate => "rate",
            Sort::Drops => "drops",
            Sort::Name => "name",
        }
    }

    /// The rows in this order; equal ones as they were.
    pub(super) fn sorted(self, rows: &[Series]) -> Vec<&Series> {
        let mut sorted: Vec<&Series> = rows.iter().collect();
        match self {
            Sort::Worst => sorted.sort_by_key(|row| std::cmp::Reverse(row.health)),
            Sort::Rate => sorted.sort_by(|a, b| b.rate().total_cmp(&a.rate())),
            Sort::Drops => sorted.sort_by_key(|row| std::cmp::Reverse((row.rise.map(|at| at.dropped), row.dropped))),
            Sort::Name => sorted.sort_by(|a, b| (&a.name, &a.side).cmp(&(&b.name, &b.side))),
        }
        sorted
    }
}

impl Series {
    /// Copies a second.
    pub(super) fn rate(&self) -> f64 {
        self.rise.map_or(0.0, |rise| rise.per_second(rise.copies))
    }

    fn followed(mut self, before: &[Series]) -> Series {
        let same = before.iter().find(|other| other.name == self.name && other.side == self.side);
        let same = same.or_else(|| before.iter().find(|other| other.name == self.name));
        self.history = same.map(|other| other.history.clone()).unwrap_or_default();
        if self.rise.is_some() {
            self.history.push_back(self.rate());
        }
        while self.history.len() > HISTORY {
            self.history.pop_front();
        }
        self
    }
}

impl Model {
    /// Takes another look at the counters of all sessions.
    pub(super) fn sample(&mut self, all: Vec<Counted>) {
        let mut before: BTreeMap<String, Live> =
            self.sessions.drain(..).map(|session| (session.name.clone(), session)).collect();
        let follow = |counted: Counted| before.remove(&counted.name).unwrap_or_default().sample(counted);
        self.sessions = all.into_iter().map(follow).collect();
        self.has_looked = true;
    }

    /// Takes a whole look, which tells of routes, hooks and relays.
    pub(super) fn look(&mut self, all: &[Session]) {
        for live in &mut self.sessions {
            let Some(session) = all.iter().find(|session| session.name == live.name) else { continue };
            live.faults.clone_from(&session.faults);
            live.about = status::about(session);
            for row in &mut live.remotes {
                let found = session.remotes.iter().find(|remote| remote.address.to_string() == row.name);
                let is_worse = found.is_some_and(|remote| remote.state != RemoteState::Ok);
                if let Some(remote) = found.filter(|_| is_worse) {
                    (row.health, row.why) = (remote.health, remote.why.clone());
                }
            }
        }
    }
}

impl Live {
    fn sample(self, counted: Counted) -> Live {
        let seconds = |last: &Counted| counted.at.saturating_duration_since(last.at).as_secs_f64();
        let last = self.last.as_ref().map(|last| (Look::from(last), seconds(last)));
        let tap = |tap: &crate::session::stats::TapStatus| {
            let rise = last.as_ref().map(|(look, seconds)| look.rise_of_tap(*seconds, tap));
            let (health, why) = health::of_tap(tap, rise.as_ref(), &self.faults);
            let (name, side) = (tap.interface.clone(), tap.direction.to_string());
            let dropped = tap.counts.stat.dcnt;
            Series { name, side, health, why, rise, dropped, history: VecDeque::new() }.followed(&self.taps)
        };
        let remote = |remote: &crate::session::stats::RemoteStatus| {
            let rise = last.as_ref().map(|(look, seconds)| look.rise_of_remote(*seconds, remote));
            let subject = format!("remote {}: ", remote.address);
            let (health, why) = match self.faults.iter().find_map(|fault| fault.strip_prefix(&subject)) {
                Some(why) if remote.state == RemoteState::Ok => (Health::Outdated, Some(why.to_string())),
                _ => health::of_remote(remote, rise.as_ref(), &self.faults),
            };
            let (name, side) = (remote.address.to_string(), remote.interface.clone().unwrap_or_else(|| "-".into()));
            let dropped = remote.stat.dcnt;
            Series { name, side, health, why, rise, dropped, history: VecDeque::new() }.followed(&self.remotes)
        };
        let drops = counted.drops.iter().filter(|(_, count)| **count > 0);
        Live {
            name: counted.name.clone(),
            filter: counted.options.filter.clone(),
            taps: counted.taps.iter().map(tap).collect(),
            remotes: counted.remotes.iter().map(remote).collect(),
            drops: drops.map(|(reason, count)| (reason.clone(), *count)).collect(),
            about: match self.about.is_empty() {
                true => status::tunnel(&counted.options),
                false => self.about,
            },
            faults: self.faults,
            last: Some(counted),
        }
    }

    /// All taps together.
    pub(super) fn total(&self) -> Option<Rise> {
        let rises = self.taps.iter().filter_map(|tap| tap.rise);
        rises.reduce(|sum, rise| Rise {
            seconds: rise.seconds,
            seen: sum.seen + rise.seen,
            copies: sum.copies + rise.copies,
            bytes: sum.bytes + rise.bytes,
            dropped: sum.dropped + rise.dropped,
        })
    }

    /// Those that are not well, a word or two each.
    pub(super) fn unwell(&self) -> Vec<String> {
        let taps = self.taps.iter().map(|row| (format!("tap {} {}", row.name, row.side), row));
        let remotes = self.remotes.iter().map(|row| (format!("remote {}", row.name), row));
        let unwell = taps.chain(remotes).filter(|(_, row)| row.health != Health::Ok);
        unwell.map(|(name, row)| format!("{name} {}", row.health.word())).collect()
    }
}
