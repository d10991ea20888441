//! How a tap or a remote is, in one word, with the reason beside it.

use serde::Serialize;

use crate::session::stats::{RemoteState, RemoteStatus, Rise, TapStatus};

/// From the best to the worst.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Health {
    #[default]
    Ok,
    /// It is asked for, and there is no such interface yet.
    Waiting,
    /// Copies of it are lost now.
    Dropping,
    /// Copies go the old way, although there is another by now.
    Outdated,
    /// Packets pass that the tap does not see.
    Blind,
    /// The remote does not answer.
    Down,
    /// The remote has no route, or its next hop has never answered.
    Unresolved,
    /// The tap's program is not at its hook.
    Detached,
    /// The interface no longer exists.
    Gone,
}

/// How much somebody has to care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Grade {
    Good,
    /// Copies arrive, but not all, or not as they should.
    Doubtful,
    Bad,
}

impl Health {
    pub(crate) fn grade(self) -> Grade {
        match self {
            Health::Ok => Grade::Good,
            Health::Waiting | Health::Dropping | Health::Outdated => Grade::Doubtful,
            Health::Blind | Health::Down | Health::Unresolved | Health::Detached | Health::Gone => Grade::Bad,
        }
    }

    pub(crate) fn word(self) -> &'static str {
        match self {
            Health::Ok => "ok",
            Health::Waiting => "waiting",
            Health::Dropping => "dropping",
            Health::Outdated => "outdated",
            Health::Blind => "blind",
            Health::Down => "down",
            Health::Unresolved => "unresolved",
            Health::Detached => "detached",
            Health::Gone => "gone",
        }
    }
}

/// How it is, and why, if it is not well. `faults`: what the session has, `SUBJECT: FAULT` each.
pub(crate) fn of_tap(tap: &TapStatus, rise: Option<&Rise>, faults: &[String]) -> (Health, Option<String>) {
    let told = || of_subject(&format!("tap {} {}", tap.interface, tap.direction), faults);
    match () {
        () if !tap.exists => (Health::Gone, Some("the interface no longer exists".into())),
        () if !tap.attached => (Health::Detached, told().or_else(|| Some("its program is not at the hook".into()))),
        () if tap.unseen.is_some() => {
            let passed = tap.unseen.unwrap_or_default();
            (Health::Blind, Some(format!("it has seen none of {passed} packets")))
        }
        () => dropping(rise).unwrap_or_default(),
    }
}

pub(crate) fn of_remote(remote: &RemoteStatus, rise: Option<&Rise>, faults: &[String]) -> (Health, Option<String>) {
    let told = || of_subject(&format!("remote {}", remote.address), faults);
    match remote.state {
        RemoteState::Ok => dropping(rise).unwrap_or_default(),
        RemoteState::Outdated => (Health::Outdated, told()),
        RemoteState::Gone => (Health::Gone, told().or_else(|| Some("its out interface no longer exists".into()))),
        RemoteState::Unresolved => {
            (Health::Unresolved, told().or_else(|| Some("it has no route, or its next hop does not answer".into())))
        }
        RemoteState::Down => (Health::Down, remote.silence.map(|silence| silence.to_string()).or_else(told)),
    }
}

fn dropping(rise: Option<&Rise>) -> Option<(Health, Option<String>)> {
    let rise = rise.filter(|rise| rise.dropped > 0)?;
    Some((Health::Dropping, Some(format!("{} copies were not sent", rise.dropped))))
}

fn of_subject(subject: &str, faults: &[String]) -> Option<String> {
    faults.iter().find_map(|fault| fault.strip_prefix(subject)?.strip_prefix(": ").map(String::from))
}
