//! A new session, and the end of one.

use std::collections::BTreeSet;
use std::path::PathBuf;

use crate::datapath::abi::{Config, Direction};
use crate::datapath::source::Source;
use crate::session::away;
use crate::session::change::{Act, Change};
use crate::session::difference::hooks::{attach_all, detach, marks, unmarks};
use crate::session::difference::rows::{Expected, ORDER, config, down, spread_writes, writes};
use crate::session::difference::{Clsact, Wanted, crowd, neighbours};
use crate::session::pattern;
use crate::session::relay;
use crate::session::stored::{Guest, Place, Stored};
use crate::session::there::{Rows, There, key};

pub(super) fn make(wanted: &Wanted, there: &There) -> Vec<Change> {
    let request = &wanted.request;
    let mut stored = Stored { applied: wanted.applied, ..Stored::new(request.clone()) };
    stored.neighbours = neighbours::wanted_hops(wanted, there);
    stored.down = down(wanted, None);
    // While the old session's memory is there.
    let mut changes: Vec<Change> = neighbours::release(there, &stored.hops()).into_iter().collect();
    changes.extend(clear(there));
    changes.extend(crowd(wanted));
    let found = wanted.interfaces.iter().filter_map(|(watched, link)| Some((watched, link.as_ref()?)));
    for ((watched, link), number) in found.zip(0..) {
        let place = Place {
            ifindex: link.ifindex,
            number,
            mtu: link.mtu,
            watch: watched.direction,
            before: None,
            passed: Some(link.passed()),
            pattern: pattern::of(request, &watched.interface, link).map(String::from),
            guest: Guest::of(link),
        };
        stored.interfaces.insert(watched.interface.clone(), place);
    }
    for remote in &request.options.remotes {
        stored.remotes.insert(*remote, stored.free_slot());
    }
    let relay = relay::New::choose(&there.links, &removed_links(&changes));
    let config = Config { relay: relay.bridge, port: relay.port, peer: relay.peer, ..config(wanted, &stored, None) };
    let source = Source::datapath(wanted.filter.clone(), &stored.compiled.features);
    let mut load = vec![Act::MakeHome, Act::MakeBuilding, Act::Load(source)];
    load.push(Act::Configure(Box::new(config)));
    let empty = Rows::new();
    let mut rows = Vec::new();
    let expected = Expected::of(wanted, &stored, there, true);
    for map in ORDER {
        rows.extend(writes(map, &empty, &expected.rows(map)));
    }
    load.extend(rows);
    load.extend(spread_writes(&stored, request, config.down, None));
    load.push(Act::Store(Box::new(stored.clone())));
    load.push(Act::Publish);
    changes.push(Change::new("session", "it is not there", "made", load));
    changes.push(Change::new("relay", "it is not there", "made", relay.make(&there.name)));
    changes.push(Change::silent(relay.refer()));
    changes.extend(guests(wanted, there, relay.name(), true));
    changes.push(Change::silent(marks(wanted, there)));
    changes.extend(wanted.interfaces.iter().flat_map(|(watched, link)| {
        let link = link.as_ref()?;
        Some(attach_all(there, link, watched.direction))
    }));
    changes.push(Change::silent(unmarks(wanted, there)));
    changes.extend(neighbours::keep(wanted, there, &stored, false));
    changes
}

/// What is wrong with the devices that take copies home from other network namespaces; those where nothing is watched any
/// more go.
pub(super) fn guests(wanted: &Wanted, there: &There, bridge: &str, is_new: bool) -> Vec<Change> {
    let links = wanted.interfaces.iter().filter_map(|(_, link)| link.as_ref()?.away.as_ref());
    let watched: BTreeSet<u64> = links.map(|away| away.inode).collect();
    let change = |guest: &away::Guest| match watched.contains(&guest.inode) {
        true => guest.difference(&there.name, bridge, is_new),
        false => guest.removal().filter(|_| !is_new).map(|act| Change::silent(vec![act])),
    };
    there.guests.iter().filter_map(change).collect()
}

/// Takes away what is left of a session of this name; clsact qdiscs stay for the taps that come.
pub(super) fn clear(there: &There) -> Vec<Change> {
    let mut pins: Vec<PathBuf> = there.halves.clone();
    pins.extend(there.is_published.then(|| there.dir.clone()));
    let mut changes = remains(there, "it is not whole");
    changes.extend(removed(pins, "it is not whole"));
    changes
}

pub(super) fn removed_links(changes: &[Change]) -> Vec<String> {
    let acts = changes.iter().flat_map(|change| &change.acts);
    let gone = acts.filter_map(|act| match act {
        Act::Ip(line) => line.strip_prefix("link delete dev "),
        _ => None,
    });
    gone.map(String::from).collect()
}

pub(super) fn removed(pins: Vec<PathBuf>, why: &str) -> Option<Change> {
    let acts: Vec<Act> = pins.into_iter().map(Act::RemovePins).collect();
    (!acts.is_empty()).then(|| Change::new("session", why, "removed", acts))
}

/// Takes away the filters and relays of a session, whatever there is of them.
pub(super) fn remains(there: &There, why: &str) -> Vec<Change> {
    let mut changes = Vec::new();
    let links = there.hooks.keys().filter_map(|ifindex| there.link(*ifindex));
    for link in links.filter(|link| !relay::is_one(link)) {
        let acts = detach(there, link, |_| true);
        if !acts.is_empty() {
            changes.push(Change::new(format!("taps of {}", link.ifname), why, "detached", acts));
        }
    }
    let gone = relay::removals(there);
    if !gone.is_empty() {
        changes.push(Change::new("relay", why, "removed", gone));
    }
    changes
}

/// Everything that takes a session away. Its pins leave their place first: so what a process leaves that was killed is
/// known for the half of a session.
pub(crate) fn undo(there: &There, clsact: Clsact) -> Vec<Change> {
    // While it is remembered what they are.
    let mut changes: Vec<Change> = neighbours::release(there, &[]).into_iter().collect();
    let mut pins = there.halves.clone();
    if there.is_published {
        let stale = pins.iter().filter(|half| **half == there.ending).cloned().map(Act::RemovePins);
        changes.push(Change::silent(stale.chain([Act::Retire]).collect()));
        pins.retain(|half| *half != there.ending);
        pins.push(there.ending.clone());
    }
    changes.extend(remains(there, "nobody wants it"));
    changes.extend(settle(there, clsact, |_| Vec::new()));
    // The pins last: while they are there, it is known that something may be left.
    changes.extend(removed(pins, "nobody wants it"));
    changes
}

/// Takes the taps of a session away where they are, and nothing else.
pub(crate) fn leave(there: &There) -> Vec<Change> {
    let taps = there.links.iter().map(|link| Change::silent(detach(there, link, |_| true)));
    taps.chain(settle(there, Clsact::Remove, |_| Vec::new())).collect()
}

/// Removes the clsact qdiscs of ours that nothing uses any more, or gives them up. `kept`: the directions of an interface
/// that the session still watches.
pub(super) fn settle(there: &There, clsact: Clsact, kept: impl Fn(u32) -> Vec<Direction>) -> Vec<Change> {
    let mut changes = Vec::new();
    for ifindex in &there.marks {
        let Some(link) = there.link(*ifindex) else {
            changes.push(Change::silent(vec![Act::Unmark(*ifindex)]));
            continue;
        };
        let Some(hooks) = there.hooks.get(ifindex) else { continue };
        let is_ours = |direction: Direction| there.taps_at(key(*ifindex, direction)).len();
        let others = [Direction::Ingress, Direction::Egress].into_iter().any(|direction| {
            hooks.filters(direction).iter().filter(|filter| filter.options.is_some()).count() > is_ours(direction)
        });
        let stays = !kept(*ifindex).is_empty();
        let goes = !others && !stays && clsact == Clsact::Remove;
        if goes && hooks.has_qdisc("clsact") {
            let remove = Act::DelClsact { ifindex: *ifindex, dev: link.dev() };
            changes.push(Change::new(format!("clsact of {}", link.ifname), "nothing uses it", "removed", vec![remove]));
        }
        let left = is_ours(Direction::Ingress) + is_ours(Direction::Egress) > 0;
        let is_given_up = clsact == Clsact::Leave && !stays && (left || !others);
        if stays {
            continue;
        }
        let (ifindex, dev, is_there) = (*ifindex, link.dev(), hooks.has_qdisc("clsact"));
        if is_given_up && hooks.marked {
            changes.push(Change::silent(vec![Act::DelMark { ifindex, dev }]));
        } else if !goes && !is_given_up && is_there && !hooks.marked {
            changes.push(Change::silent(vec![Act::AddMark { ifindex, dev }]));
        }
        if there.notes.contains(&ifindex) {
            changes.push(Change::silent(vec![Act::Unmark(ifindex)]));
        }
    }
    // Silent ones last: calls of one tool stay together.
    changes.sort_by_key(Change::is_silent);
    changes
}
