//! What has to change so that the kernel has what is wanted: pure, from data to data. Whatever was not asked about is
//! left as it is.

mod alter;
mod back;
mod hooks;
mod make;
mod neighbours;
mod rows;

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::datapath::abi::Out;
use crate::datapath::filter::Filter;
use crate::datapath::parts::Map;
use crate::datapath::template::Outer;
use crate::request::{Request, Underlay, Watched};
use crate::session::change::Change;
use crate::session::pattern;
use crate::session::resolve::NextHop;
use crate::session::stored::{Silence, Stored};
use crate::session::there::There;
use crate::tools::ip::Link;

pub(crate) use back::back;
pub(crate) use make::{leave, undo};

/// What becomes of a clsact qdisc that we have added, once nothing uses it any more. Removing it, as adding it, makes the
/// kernel restart the interface's queues, and what stands in them is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Clsact {
    #[default]
    Remove,
    /// It stays and is no longer ours, also where others still use it.
    Leave,
}

/// A session as it is wanted, with what the machine says of it.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub request: Request,
    /// A session that is made is one of `apply`.
    pub applied: bool,
    /// The interfaces of the request, in its order; no link where it is gone.
    pub interfaces: Vec<(Watched, Option<Link>)>,
    /// How many interfaces its patterns match besides, for which there is no room.
    pub left_out: usize,
    /// Of those remotes whose way was looked up.
    pub remotes: BTreeMap<IpAddr, Outer>,
    /// Their next hops that the kernel is to keep fresh.
    pub hops: BTreeMap<IpAddr, NextHop>,
    /// Those of them that are down.
    pub down: BTreeMap<IpAddr, Silence>,
    pub underlay: Vec<Underlay>,
    /// Nothing else is wanted in the map of underlays.
    pub is_whole_underlay: bool,
    /// What the out interfaces say they have dropped.
    pub outs: BTreeMap<u32, Out>,
    pub clsact: Clsact,
    /// Nanoseconds from the time since boot to the time since 1970.
    pub clock: u64,
    /// The request's filter, where programs may have to be compiled.
    pub filter: Option<Filter>,
}

impl Wanted {
    /// The interfaces that are there, by their numbers.
    pub(super) fn by_index(&self) -> BTreeMap<u32, &Watched> {
        self.interfaces.iter().filter_map(|(watched, link)| Some((link.as_ref()?.ifindex, watched))).collect()
    }
}

/// The changes that make what is wanted of what is there, and whether more are due once they are made: what is taken out
/// of a session is counted after its last packet.
pub(crate) fn difference(wanted: &Wanted, there: &There) -> (Vec<Change>, bool) {
    match &there.stored {
        Ok(stored) if there.is_published && there.config.is_some() && has_all_maps(there) => {
            let (trimmed, is_full) = trimmed(wanted, there, stored);
            let wanted = trimmed.as_ref().unwrap_or(wanted);
            let (changes, more) =
                alter::Alter { wanted, there, stored, changes: Vec::new(), idle: Vec::new() }.changes();
            (changes, more || is_full)
        }
        _ => (make::make(wanted, there), false),
    }
}

/// Without the new interfaces whose hooks nobody has asked about, which are for `sync`, and those for which there is no room
/// until others have left; whether there are any of the latter.
fn trimmed(wanted: &Wanted, there: &There, stored: &Stored) -> (Option<Wanted>, bool) {
    let mut room = pattern::MOST.saturating_sub(stored.interfaces.len());
    let mut is_full = false;
    let mut stays = |(watched, link): &(Watched, Option<Link>)| {
        let Some(link) = link else { return true };
        if stored.interfaces.contains_key(&watched.interface) || stored.place(link.ifindex).is_some() {
            return true;
        }
        if !there.hooks.contains_key(&link.ifindex) {
            return false;
        }
        is_full |= room == 0;
        let fits = room > 0;
        room = room.saturating_sub(1);
        fits
    };
    let kept: Vec<(Watched, Option<Link>)> = wanted.interfaces.iter().filter(|at| stays(at)).cloned().collect();
    let is_less = kept.len() < wanted.interfaces.len();
    (is_less.then(|| Wanted { interfaces: kept, ..wanted.clone() }), is_full)
}

/// What is told of interfaces that a pattern matches in vain.
fn crowd(wanted: &Wanted) -> Option<Change> {
    let (fault, fix) = match wanted.request.options.max_taps {
        Some(most) => (
            format!("they match {} interfaces more than the {most} of --max-taps", wanted.left_out),
            "allow more, or ask for fewer, by `up` with --replace",
        ),
        None => (
            format!(
                "they match {} interfaces more than the {} that one session watches",
                wanted.left_out,
                pattern::MOST
            ),
            "watch those in another session, as in: snifctl up 'eth1*' --name OTHER",
        ),
    };
    (wanted.left_out > 0).then(|| Change::new("patterns", fault, fix, Vec::new()))
}

fn has_all_maps(there: &There) -> bool {
    [Map::Slots, Map::Taps, Map::Remotes, Map::RemoteStats, Map::Devices, Map::Tunnels, Map::Spread, Map::Drops]
        .iter()
        .all(|map| there.rows.contains_key(map))
}

/// Can the session be altered, or must it be made anew?
pub(crate) fn is_alterable(there: &There) -> bool {
    there.stored.is_ok() && there.is_published && there.config.is_some() && has_all_maps(there)
}

#[cfg(test)]
mod down_test;
#[cfg(test)]
mod tests;
