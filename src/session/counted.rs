//! What a session has counted, for metrics: the same numbers as `status`, without its questions about routes, neighbours,
//! rules and offloads, which take longer than all else.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::Instant;

use anyhow::{Result, bail};

use crate::datapath::abi::{Bin, Forms, Stat, TapCounts};
use crate::datapath::parts::Map;
use crate::request::Options;
use crate::session::engine::Open;
use crate::session::stats::{self, RemoteStatus, TapStatus};
use crate::tools::interrupt;
use crate::tools::tc::{self, Dev};

/// One session.
#[derive(Debug)]
pub(crate) struct Counted {
    pub name: String,
    /// When it was read.
    pub at: Instant,
    /// The version of snifctl that wrote its request.
    pub version: String,
    pub options: Options,
    pub taps: Vec<TapStatus>,
    /// The counters of taps that the session no longer has, together.
    pub removed_taps: TapCounts,
    pub remotes: Vec<RemoteStatus>,
    pub removed: Stat,
    pub drops: BTreeMap<String, u64>,
    pub forms: Forms,
    /// Copies that were asked for, by powers of two of their bytes.
    pub sizes: Vec<Bin>,
    /// Calls of taps, by powers of two of their nanoseconds; with --profile.
    pub times: Option<Vec<Bin>>,
    pub out_dropped: u64,
}

/// The interfaces whose hooks were asked for last, by session: they can be asked for before the session is read.
#[derive(Debug, Default)]
pub(crate) struct Known(BTreeMap<String, BTreeSet<u32>>);

/// Reads all sessions, or the one of this name. One that cannot be read is left out, and told.
///
/// # Errors
/// A signal came.
pub(crate) fn all(
    open: &Open,
    name: Option<&str>,
    known: &mut Known,
    mut failed: impl FnMut(anyhow::Error),
) -> Result<Vec<Counted>> {
    let mut sessions = Vec::new();
    for session in open.home.sessions().into_iter().filter(|at| name.is_none_or(|name| name == at)) {
        match counted(open, &session, known) {
            Ok(session) => sessions.push(session),
            Err(err) if interrupt::is_cause(&err) => return Err(err),
            Err(err) => failed(err),
        }
    }
    Ok(sessions)
}

/// Reads one session: one bpftool, and one tc for the hooks of its interfaces, beside each other where it is known which
/// these are.
pub(crate) fn counted(open: &Open, name: &str, known: &mut Known) -> Result<Counted> {
    let before = known.0.remove(name).unwrap_or_default();
    let links: Vec<(u32, Dev)> = open
        .machine
        .links
        .iter()
        .filter(|link| before.contains(&link.ifindex))
        .map(|link| (link.ifindex, link.dev()))
        .collect();
    let runner = *open.runner;
    let (there, hooks) = thread::scope(|scope| {
        let devices: Vec<Dev> = links.iter().map(|(_, dev)| dev.clone()).collect();
        let hooks = (!devices.is_empty()).then(|| scope.spawn(move || tc::hooks(&runner, &devices)));
        let there = open.read_counters(name);
        (there, hooks.and_then(|hooks| hooks.join().ok()?.ok()))
    });
    let there = there?;
    let open = open.seen_by(name, there.stored.as_ref().ok(), None)?;
    let mut there = there.with(&open);
    there.hooks.extend(links.iter().map(|(ifindex, _)| *ifindex).zip(hooks.unwrap_or_default()));
    let outs = stats::outs(&there);
    let Ok(stored) = there.stored.clone() else {
        bail!("session {name} cannot be read; see: snifctl status --name {name}");
    };
    let places = stored.interfaces.values().map(|place| place.ifindex);
    let asked: BTreeSet<u32> = places.chain(outs.iter().map(|(ifindex, _)| *ifindex)).collect();
    let rest = asked.iter().copied().filter(|ifindex| !there.hooks.contains_key(ifindex)).collect();
    there.look(open.runner, &rest, false)?;
    known.0.insert(name.into(), asked);
    Ok(Counted {
        name: name.into(),
        at: there.at,
        version: stored.snifctl.clone(),
        options: stored.request.options.clone(),
        taps: stats::taps(&there),
        removed_taps: stats::removed_taps(&there),
        remotes: stats::remotes(&there, &[]),
        removed: stats::removed(&there),
        drops: stats::drops(&there),
        forms: stats::forms(&there),
        sizes: stats::bins(&there, Map::Sizes),
        times: stored.request.options.profile.then(|| stats::bins(&there, Map::Times)),
        out_dropped: stats::out_dropped(open.runner, &there.dir.join("maps"), &there, &outs)?,
    })
}
