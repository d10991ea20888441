//! What `snifctl status --json` says, typed.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Index;

use serde::Deserialize;
use serde_json::Value;

use super::{Lab, PATIENCE, poll};

/// The sessions in the order in which they are listed. Members that the types here do not know are in `json` only.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(crate) struct Status {
    pub sessions: Vec<Session>,
    #[serde(skip)]
    json: Value,
}

/// One session. Its text, as `{session:#}`, is its JSON.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(crate) struct Session {
    pub name: String,
    pub tunnel: String,
    pub oversize: String,
    pub spread: String,
    pub filter: Option<String>,
    /// One of so many packets, and of so many flows, is copied.
    pub sample: u64,
    pub sample_flows: u64,
    /// In bytes.
    pub snaplen: Option<u64>,
    /// In tc's units.
    pub max_rate: Option<String>,
    pub taps: Vec<Tap>,
    pub remotes: Vec<Remote>,
    /// The counters of remotes that the session no longer has, together.
    pub removed: Stat,
    /// The counters of taps that the session no longer has, together.
    pub removed_taps: TapCounts,
    /// Copies that were not sent, by reason.
    pub drops: BTreeMap<String, u64>,
    /// Packets of any sender that the out interfaces have dropped.
    pub out_dropped: u64,
    /// Who is before the taps.
    pub ahead: Vec<String>,
    /// What is not as it must be: `SUBJECT: FAULT`.
    pub faults: Vec<String>,
    /// The request, as the session remembers it.
    pub request: Value,
    /// The command line that makes it.
    pub command: String,
    #[serde(skip)]
    json: Value,
}

/// Copies of wire frames and their bytes: asked for (at a tap) or sent (to a remote), and dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct Stat {
    pub pcnt: u64,
    pub bcnt: u64,
    pub dcnt: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Tap {
    pub interface: String,
    pub direction: String,
    pub attached: bool,
    /// The interface is there.
    pub exists: bool,
    #[serde(flatten)]
    pub counts: TapCounts,
}

/// In frames of the interface, but `stat`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct TapCounts {
    pub stat: Stat,
    pub seen: u64,
    pub filtered: u64,
    pub skipped: u64,
    pub own: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Remote {
    pub address: String,
    pub source: Option<String>,
    pub interface: Option<String>,
    pub mac: Option<String>,
    pub mtu: u64,
    /// `ok`, `outdated`, `gone` or `unresolved`.
    pub state: String,
    pub stat: Stat,
}

/// What a tap, or what was removed of a session's taps, has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub seen: u64,
    pub filtered: u64,
    pub skipped: u64,
    /// Frames that were to be copied, for each remote that gets them.
    pub asked: u64,
    pub dropped: u64,
}

impl Status {
    #[track_caller]
    pub(crate) fn of(json: Value) -> Status {
        let read = Status::deserialize(&json);
        let mut status = read.unwrap_or_else(|err| panic!("a status: {err}: {json:#}"));
        for (session, json) in status.sessions.iter_mut().zip(json["sessions"].as_array().into_iter().flatten()) {
            session.json = json.clone();
        }
        Status { json, ..status }
    }
}

/// A member of the JSON.
impl Index<&str> for Status {
    type Output = Value;

    fn index(&self, key: &str) -> &Value {
        &self.json[key]
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.json.fmt(f)
    }
}

impl fmt::Display for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.json.fmt(f)
    }
}

impl Session {
    /// The counters of all taps together.
    pub(crate) fn taps_total(&self) -> Stat {
        total(self.taps.iter().map(|tap| tap.counts.stat))
    }

    /// The counters of all remotes together.
    pub(crate) fn remotes_total(&self) -> Stat {
        total(self.remotes.iter().map(|remote| remote.stat))
    }

    /// Copies dropped, for any reason.
    pub(crate) fn drops(&self) -> u64 {
        self.drops.values().sum()
    }

    /// Copies dropped for this reason.
    #[track_caller]
    pub(crate) fn dropped(&self, reason: &str) -> u64 {
        self.drops.get(reason).copied().unwrap_or_else(|| panic!("no drops are called {reason:?} in {self:#}"))
    }

    /// Is every copy asked for sent or dropped, also by taps and remotes that were removed?
    pub(crate) fn is_settled(&self) -> bool {
        let asked = self.taps_total().pcnt + self.removed_taps.tally().asked;
        asked == self.remotes_total().pcnt + self.removed.pcnt + self.drops()
    }

    /// Copies asked for, sent, and dropped for this one reason; panics unless that is all.
    #[track_caller]
    pub(crate) fn accounts(&self, reason: &str) -> (u64, u64, u64) {
        let (asked, sent, lost) = (self.taps_total().pcnt, self.remotes_total().pcnt, self.dropped(reason));
        assert_eq!(asked, sent + lost, "asked = sent + {reason} in {self:#}");
        (asked, sent, lost)
    }

    #[track_caller]
    pub(crate) fn tap(&self, interface: &str, direction: &str) -> &Tap {
        let found = self.taps.iter().find(|tap| tap.interface == interface && tap.direction == direction);
        found.unwrap_or_else(|| panic!("{interface} {direction} in {self:#}"))
    }

    #[track_caller]
    pub(crate) fn remote(&self, address: impl ToString) -> &Remote {
        let address = address.to_string();
        let found = self.remotes.iter().find(|remote| remote.address == address);
        found.unwrap_or_else(|| panic!("{address} in {self:#}"))
    }

    /// What one tap has counted.
    #[track_caller]
    pub(crate) fn tally(&self, interface: &str, direction: &str) -> Tally {
        self.tap(interface, direction).counts.tally()
    }

    /// Panics unless copies asked for = copies sent, also by remotes that were removed, + copies dropped.
    #[track_caller]
    pub(crate) fn assert_balanced(&self) {
        let (asked, sent) = (self.taps_total().pcnt, self.remotes_total().pcnt);
        assert_eq!(asked, sent + self.removed.pcnt + self.drops(), "{self:#}");
    }

    /// Panics unless every frame that the taps have seen is accounted for, once for each remote that gets it, and what
    /// the taps say is what the remotes and the drops by reason say.
    #[track_caller]
    pub(crate) fn assert_accounted(&self) {
        let mut taps: Vec<Tally> = self.taps.iter().map(|tap| tap.counts.tally()).collect();
        taps.push(self.removed_taps.tally());
        let each = if self.spread == "flow" { 1 } else { self.remotes.len() as u64 };
        for tap in &taps {
            assert_eq!(each * (tap.seen - tap.filtered - tap.skipped), tap.copied() + tap.dropped, "{self:#}");
        }
        let sum = |of: fn(&Tally) -> u64| taps.iter().map(of).sum::<u64>();
        let lost = self.drops();
        let sent = self.remotes_total().pcnt + self.removed.pcnt;
        assert_eq!(sum(|tap| tap.asked), sent + lost, "{self:#}");
        assert_eq!(sum(Tally::copied), sent, "{self:#}");
        let by_remote = self.remotes_total().dcnt + self.removed.dcnt;
        assert_eq!((sum(|tap| tap.dropped), by_remote), (lost, lost), "{self:#}");
    }
}

fn total(stats: impl Iterator<Item = Stat>) -> Stat {
    stats.fold(Stat::default(), |all, one| Stat {
        pcnt: all.pcnt + one.pcnt,
        bcnt: all.bcnt + one.bcnt,
        dcnt: all.dcnt + one.dcnt,
    })
}

impl TapCounts {
    pub(crate) fn tally(&self) -> Tally {
        let TapCounts { stat, seen, filtered, skipped, .. } = *self;
        Tally { seen, filtered, skipped, asked: stat.pcnt, dropped: stat.dcnt }
    }
}

impl Tally {
    pub(crate) fn copied(&self) -> u64 {
        self.asked - self.dropped
    }
}

impl Lab {
    /// `snifctl status --json`.
    #[track_caller]
    pub(crate) fn status(&self) -> Status {
        Status::of(self.status_json())
    }

    /// The same, untyped.
    #[track_caller]
    pub(crate) fn status_json(&self) -> Value {
        self.said(&["status", "--json"]).quietly_ok().json()
    }

    /// The first session of it.
    #[track_caller]
    pub(crate) fn session(&self) -> Session {
        let mut status = self.status();
        assert!(!status.sessions.is_empty(), "no session is up");
        status.sessions.swap_remove(0)
    }

    /// The session of this name.
    #[track_caller]
    pub(crate) fn session_called(&self, name: &str) -> Session {
        let json = self.said(&["status", "--json", "--name", name]).quietly_ok().json();
        Status::of(json).sessions.swap_remove(0)
    }

    /// The session once every copy asked for is sent or dropped.
    #[track_caller]
    pub(crate) fn settled(&self) -> Session {
        let settled = poll(PATIENCE, || Some(self.session()).filter(Session::is_settled));
        settled.unwrap_or_else(|| panic!("Expected asked = sent + drops, got {:#}", self.session()))
    }

    /// Panics unless these sessions and no others are up, with all their taps at their hooks.
    #[track_caller]
    pub(crate) fn assert_up(&self, names: &[&str]) {
        let status = self.status();
        let found: Vec<&str> = status.sessions.iter().map(|session| session.name.as_str()).collect();
        assert_eq!(found, names);
        assert!(status.sessions.iter().flat_map(|session| &session.taps).all(|tap| tap.attached), "{status:#}");
    }
}
