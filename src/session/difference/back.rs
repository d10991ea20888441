//! The way back, where a change has failed.

use crate::datapath::abi::{Config, Direction};
use crate::datapath::parts::{Map, Program};
use crate::session::away::Guest;
use crate::session::change::{Act, Change, From};
use crate::session::difference::neighbours;
use crate::session::difference::rows::ORDER;
use crate::session::relay;
use crate::session::there::{There, key};

/// The changes after which a session is as it was `before`, whatever of a change has been made since.
pub(crate) fn back(before: &There, now: &There) -> Vec<Change> {
    let mut acts = Vec::new();
    // The rows of taps count: one that is gone cannot come back.
    let kept = |map: &Map| !matches!(map, Map::Outs | Map::Taps);
    for map in ORDER.into_iter().chain([Map::Spread]).filter(kept) {
        let new = now.rows.get(&map);
        for (key, cpus) in before.rows.get(&map).into_iter().flatten() {
            let is_there = new.and_then(|new| new.get(key)?.first()) == cpus.first();
            let value = cpus.first().filter(|_| !is_there);
            acts.extend(value.map(|value| Act::Write(map, key.clone(), value.clone())));
        }
    }
    if let (Some(old), Some(new)) = (before.config, now.config)
        && old != (Config { request: old.request, ..new })
    {
        acts.push(Act::Configure(Box::new(old)));
    }
    acts.extend(neighbours::release(now, &before.hops()).into_iter().flat_map(|change| change.acts));
    if let (Ok(old), true) = (&before.stored, before.stored != now.stored) {
        acts.push(Act::Store(Box::new(old.clone())));
    }
    acts.extend(neighbours::back(before, now));
    let moved = before.programs.iter().filter(|(program, id)| now.programs.get(program) != Some(id));
    acts.extend(moved.map(|(program, _)| Act::RestorePin(*program)));
    acts.extend(hooks_back(before, now));
    acts.extend(relay::filters_back(before, now));
    let had = |guest: &Guest| before.guests.iter().any(|at| at.inode == guest.inode && at.device.is_some());
    acts.extend(now.guests.iter().filter(|guest| !had(guest)).filter_map(Guest::removal));
    for map in ORDER.into_iter().rev().filter(|map| *map != Map::Outs) {
        let old = before.rows.get(&map);
        let new = now.rows.get(&map).into_iter().flatten();
        let gone = new.filter(|(key, _)| old.is_none_or(|old| !old.contains_key(*key)));
        acts.extend(gone.map(|(key, _)| Act::Delete(map, key.clone())));
    }
    acts.extend(now.halves.iter().filter(|half| !before.halves.contains(half)).cloned().map(Act::RemovePins));
    vec![Change::silent(acts)]
}

/// The filters and qdiscs as they were.
pub(super) fn hooks_back(before: &There, now: &There) -> Vec<Act> {
    let mut acts = Vec::new();
    for (ifindex, old) in &before.hooks {
        let (Some(link), Some(new)) = (now.link(*ifindex), now.hooks.get(ifindex)) else { continue };
        if relay::is_one(link) {
            continue;
        }
        let dev = link.dev();
        if old.has_qdisc("clsact") && !new.has_qdisc("clsact") {
            acts.push(Act::AddClsact { ifindex: *ifindex, dev: dev.clone(), is_ours: before.marks.contains(ifindex) });
        }
        for direction in [Direction::Ingress, Direction::Egress] {
            let program = Program::tap(direction);
            let (was, is) = (before.taps_at(key(*ifindex, direction)), now.taps_at(key(*ifindex, direction)));
            let from = From::Session;
            for (pref, id) in &was {
                let (pref, dev) = (*pref, dev.clone());
                match is.iter().find(|(at, _)| *at == pref) {
                    None => acts.push(Act::Attach { ifindex: *ifindex, dev, direction, pref, program, from }),
                    Some((_, other)) if other != id => {
                        acts.push(Act::Replace { ifindex: *ifindex, dev, direction, pref, program, from });
                    }
                    Some(_) => {}
                }
            }
            for (pref, _) in is.iter().filter(|(pref, _)| was.iter().all(|(at, _)| at != pref)) {
                acts.push(Act::Detach { ifindex: *ifindex, dev: dev.clone(), direction, pref: *pref });
            }
        }
        let (ifindex, was_ours) = (*ifindex, before.marks.contains(ifindex));
        match (old.has_qdisc("clsact"), new.has_qdisc("clsact")) {
            (false, true) if now.marks.contains(&ifindex) => acts.push(Act::DelClsact { ifindex, dev }),
            (true, true) if was_ours && !new.marked => acts.push(Act::AddMark { ifindex, dev }),
            (true, true) if !was_ours && new.marked => acts.push(Act::DelMark { ifindex, dev }),
            _ => {}
        }
    }
    let new = now.notes.iter().filter(|note| !before.notes.contains(note));
    acts.extend(new.map(|note| Act::Unmark(*note)));
    acts
}
