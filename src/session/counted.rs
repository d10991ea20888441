//! What a session has counted, for metrics: the same numbers as `status`, without its questions about routes, neighbours,
//! rules and offloads, which take longer than all else.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, bail};

use crate::datapath::abi::{SIZES, Size, Stat, TapCounts};
use crate::datapath::parts::Map;
use crate::request::Options;
use crate::session::engine::Open;
use crate::session::stats::{self, RemoteStatus, TapStatus};
use crate::session::there::{There, index};

/// One session.
#[derive(Debug)]
pub(crate) struct Counted {
    pub name: String,
    /// The version of snifctl that wrote its request.
    pub version: String,
    pub options: Options,
    pub taps: Vec<TapStatus>,
    /// The counters of taps that the session no longer has, together.
    pub removed_taps: TapCounts,
    pub remotes: Vec<RemoteStatus>,
    pub removed: Stat,
    pub drops: BTreeMap<String, u64>,
    /// Copies that were asked for, by powers of two of their bytes.
    pub sizes: [Size; SIZES],
    pub out_dropped: u64,
}

/// Reads one session: one bpftool, and one tc for the hooks of its interfaces.
pub(crate) fn counted(open: &Open, name: &str) -> Result<Counted> {
    let mut there = open.read(name)?;
    let outs = stats::outs(&there);
    let Ok(stored) = there.stored.clone() else {
        bail!("session {name} cannot be read; see: snifctl status --name {name}");
    };
    let places = stored.interfaces.values().map(|place| place.ifindex);
    let asked: BTreeSet<u32> = places.chain(outs.iter().map(|(ifindex, _)| *ifindex)).collect();
    there.look(open.runner, &asked, false)?;
    Ok(Counted {
        name: name.into(),
        version: stored.snifctl.clone(),
        options: stored.request.options.clone(),
        taps: stats::taps(&there),
        removed_taps: stats::removed_taps(&there),
        remotes: stats::remotes(&there, &[]),
        removed: stats::removed(&there),
        drops: stats::drops(&there),
        sizes: sizes(&there),
        out_dropped: stats::out_dropped(open.runner, &there.dir.join("maps"), &there, &outs)?,
    })
}

fn sizes(there: &There) -> [Size; SIZES] {
    let mut sums = [Size::default(); SIZES];
    for (key, cpus) in there.rows.get(&Map::Sizes).into_iter().flatten() {
        let Some(sum) = index(key).and_then(|power| sums.get_mut(power as usize)) else { continue };
        for size in cpus.iter().filter_map(|value| Size::decode(value).ok()) {
            *sum = Size { frames: sum.frames + size.frames, bytes: sum.bytes + size.bytes };
        }
    }
    sums
}
