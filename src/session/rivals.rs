//! Sessions that a collector cannot tell apart: their copies come from one address, in one tunnel, with one id. It takes the
//! numbers of both for one sequence, and what does not fit together for losses.

use std::net::IpAddr;

use anyhow::Result;

use crate::session::engine::Open;
use crate::session::there::There;
use crate::tunnel::Tunnel;
use crate::usage::spelled;

/// Copies of one session to one remote.
#[derive(Clone, Debug)]
pub(crate) struct Copies {
    pub tunnel: Tunnel,
    pub source: IpAddr,
    pub remote: IpAddr,
}

/// Another session whose copies a collector takes for these.
#[derive(Clone, Debug)]
pub(crate) struct Rival {
    pub session: String,
    pub remote: IpAddr,
    /// Both number their copies.
    pub is_numbered: bool,
    /// `geneve from 10.0.0.5`.
    pub tunnel: String,
    /// What makes one of them another.
    pub apart: String,
}

impl Rival {
    pub(crate) fn warning(&self) -> String {
        let Rival { session, remote, tunnel, apart, .. } = self;
        format!(
            "session {session} sends to {remote} with the same id, too ({tunnel}): a collector takes the numbers of both for \
             one sequence, and sees losses where there are none; give one of them another id: {apart}"
        )
    }

    pub(crate) fn refusal(&self, name: &str) -> String {
        let Rival { session, remote, tunnel, apart, .. } = self;
        format!(
            "session {session} sends to {remote} with the same id as session {name} ({tunnel}), so the collector cannot tell \
             their copies apart; give one of them another id: {apart}"
        )
    }
}

/// The rivals of a session. Where it is the only one, nobody is asked.
pub(crate) fn of(open: &Open, name: &str, copies: &[Copies]) -> Result<Vec<Rival>> {
    let others: Vec<String> = open.home.sessions().into_iter().filter(|other| other != name).collect();
    if others.is_empty() || copies.is_empty() {
        return Ok(Vec::new());
    }
    let others = There::read_requests(open.runner, &open.home, &others, &open.machine.links)?;
    Ok(copies.iter().flat_map(|ours| others.iter().filter_map(|other| rival(ours, other))).collect())
}

fn rival(ours: &Copies, other: &There) -> Option<Rival> {
    let stored = other.stored.as_ref().ok()?;
    let theirs = &stored.request.options.tunnel;
    let row = other.remote_row(*stored.remotes.get(&ours.remote)?)?;
    let is_one = row.addresses().0 == ours.source && ours.tunnel.is_one_with(theirs);
    is_one.then(|| Rival {
        session: other.name.clone(),
        remote: ours.remote,
        is_numbered: ours.tunnel.has_numbers() && theirs.has_numbers(),
        tunnel: format!("{} from {}", spelled(theirs.kind), ours.source),
        apart: theirs.apart_from(&[&ours.tunnel, theirs]),
    })
}
