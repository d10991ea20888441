//! A session that another build of snifctl has made is moved to the programs of this one, while packets pass: on its maps
//! where these have the form that the programs need. A map that has none is made anew: the configuration is written into it,
//! and the old map of drops stays beside it, so that no count is lost. Nothing else of the session changes.
//!
//! The new maps come into their places before the new programs run: a run that is killed in between leaves the old ones
//! running, whose counts are still read, and the next `sync` begins again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::datapath::abi::Direction;
use crate::datapath::filter;
use crate::datapath::objects;
use crate::datapath::parts::{Map, Program};
use crate::datapath::shapes::Shape;
use crate::datapath::source::Source;
use crate::session::change::{Act, Change, Executor, From, explain};
use crate::session::difference;
use crate::session::engine::{self, Open};
use crate::session::relay;
use crate::session::stats::ShownMap;
use crate::session::stored::{Compiled, Stored, Unreadable};
use crate::session::there::{There, ask_each, key};
use crate::session::version;
use crate::tools::exec::Runner;
use crate::tools::interrupt;

/// Beginning of the names of the pins of maps of drops that programs of before have written.
const EARLIER: &str = "drops_before";

/// The maps of drops of programs of before.
pub(super) fn earlier_drops(dir: &Path) -> Vec<PathBuf> {
    let maps = dir.join("maps");
    let inode = |pin: &Path| fs::metadata(pin).map(|at| at.ino()).ok();
    // The move of a run that was killed: the same map by two names.
    let now = inode(&maps.join(Map::Drops.name()));
    let names = fs::read_dir(&maps).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_earlier = |pin: &PathBuf| pin.file_name().is_some_and(|name| name.to_string_lossy().starts_with(EARLIER));
    names.filter(|pin| is_earlier(pin) && inode(pin) != now).collect()
}

/// A name for the map of drops that is there.
fn next_name(dir: &Path) -> Option<String> {
    let maps = dir.join("maps");
    let inode = |name: &str| fs::metadata(maps.join(name)).map(|at| at.ino()).ok();
    let now = inode(Map::Drops.name());
    let mut names = (1..).map(|number| format!("{EARLIER}_{number}"));
    let free = names.find(|name| inode(name).is_none_or(|at| Some(at) == now)).expect("numbers do not end");
    // It has the name already where a run was killed.
    inode(&free).is_none().then_some(free)
}

/// The forms of the maps that are pinned in a directory.
pub(crate) fn shapes(runner: &Runner, maps: &Path) -> Result<BTreeMap<Map, Shape>> {
    let pinned: Vec<Map> = Map::ALL.into_iter().filter(|map| maps.join(map.name()).exists()).collect();
    let lines: Vec<String> =
        pinned.iter().map(|map| format!("map show pinned {}", maps.join(map.name()).display())).collect();
    let shape = |shown: ShownMap| Shape {
        kind: shown.kind,
        key: shown.bytes_key as usize,
        value: shown.bytes_value as usize,
        entries: shown.max_entries as usize,
    };
    let answers = ask_each(runner, &lines)?;
    let answers = answers.iter().map(|answer| serde_json::from_str::<ShownMap>(answer.get()).ok());
    Ok(pinned.into_iter().zip(answers).filter_map(|(map, shown)| Some((map, shape(shown?)))).collect())
}

/// What is to be known of a session of another version, and what helps; where it cannot be read, as an error.
pub(crate) fn note(there: &There) -> Result<Option<String>> {
    let name = &there.name;
    match &there.stored {
        Err(why @ Unreadable::OtherVersion(_)) => bail!("session {name}: {why}; {}", why.help(name)),
        Err(_) => Ok(None),
        Ok(stored) => Ok(match (stored.newer(), version::of_others(stored)) {
            (Some(newer), _) => Some(format!("session {name}: {newer}; {}", newer.help(name))),
            (None, Some(others)) => Some(format!(
                "session {name}: its programs are {others}; move it to this one: snifctl sync --name {name}"
            )),
            (None, None) => None,
        }),
    }
}

/// A session of a newer version can have more to it than is read, and is left to that one.
pub(crate) fn ensure_known(there: &There) -> Result<()> {
    let newer = there.stored.as_ref().ok().and_then(Stored::newer).map(Unreadable::OtherVersion);
    match newer {
        Some(why) => bail!("session {0}: {why}; {1}", there.name, why.help(&there.name)),
        None => Ok(()),
    }
}

/// The session with the programs of this build, and what was changed for it.
pub(crate) fn moved(open: &Open, there: There) -> Result<(There, Option<Change>)> {
    ensure_known(&there)?;
    let Ok(stored) = there.stored.clone() else { return Ok((there, None)) };
    let Some(others) = version::of_others(&stored).filter(|_| there.is_published && there.config.is_some()) else {
        return Ok((there, None));
    };
    let open = &*open.seen_by(&there.name, Some(&stored), None)?;
    let mut there = pinned(open, there)?.with(open);
    let places = stored.interfaces.values().map(|place| place.ifindex);
    let indexes: BTreeSet<u32> = places.chain(engine::tapped(open)?).collect();
    there.look(open.runner, &indexes, true)?;
    let shapes = shapes(open.runner, &there.dir.join("maps"))?;
    if let Some(map) = Map::ALL.into_iter().find(|map| !is_movable(*map, &shapes)) {
        bail!(
            "session {0}: its programs are {others}, and cannot be replaced, as its map {1} has another form; note its \
             counters (snifctl status --name {0}), then: snifctl down --name {0} && {2}",
            there.name,
            map.name(),
            stored.request.command()
        );
    }
    let change = change(open, &there, &stored, &shapes)?;
    let mut executor = Executor::new(open.runner, &open.home, &there.name, engine::initial(&there));
    if let Err(err) = executor.carry_out(std::slice::from_ref(&change)) {
        return Err(explain(err, back(open, &there, &indexes), &there.name));
    }
    if open.runner.dry_run {
        let compiled = Compiled::of(&stored.request);
        there.stored = Ok(Stored { compiled, ..stored });
        return Ok((there, Some(change)));
    }
    Ok((open.read(&there.name)?, Some(change)))
}

/// With pins for the maps that have lost theirs, or they would be taken for maps that the older build had not.
fn pinned(open: &Open, there: There) -> Result<There> {
    let pins: Vec<Act> = there.unpinned_maps.iter().map(|(map, id)| Act::PinMap(*map, *id)).collect();
    if pins.is_empty() {
        return Ok(there);
    }
    Executor::new(open.runner, &open.home, &there.name, engine::initial(&there)).carry_out(&[Change::silent(pins)])?;
    open.read(&there.name)
}

fn fits(map: Map, shapes: &BTreeMap<Map, Shape>) -> bool {
    shapes.get(&map) == Some(&map.shape())
}

/// Can programs of this build go on with the map, or with another one in its place? Working memory can be made anew.
fn is_movable(map: Map, shapes: &BTreeMap<Map, Shape>) -> bool {
    let is_replaced = matches!(map, Map::Config | Map::Drops | Map::Bucket | Map::Rest | Map::Scratch);
    is_replaced || !shapes.contains_key(&map) || fits(map, shapes)
}

fn change(open: &Open, there: &There, stored: &Stored, shapes: &BTreeMap<Map, Shape>) -> Result<Change> {
    let request = &stored.request;
    let expression = request.options.filter.as_deref();
    let filter = expression.map(|expression| filter::compile(open.runner, "--filter", expression)).transpose()?;
    let mut features: Vec<String> = request.features().into_iter().chain(stored.compiled.features.clone()).collect();
    features.sort();
    features.dedup();
    let features = objects::parts(features, filter.is_some());
    let (kept, new): (Vec<Map>, Vec<Map>) = Map::ALL.into_iter().partition(|map| fits(*map, shapes));
    let mut acts: Vec<Act> = there.halves.iter().cloned().map(Act::RemovePins).collect();
    acts.extend([Act::MakeBuilding, Act::LoadMoved(Source::datapath(filter, &features), kept)]);
    if let Some(config) = there.config.filter(|_| new.contains(&Map::Config)) {
        acts.push(Act::Fill(Map::Config, vec![0; 4], config.encode()));
    }
    let name = |map: &Map| next_name(&there.dir).filter(|_| *map == Map::Drops && shapes.contains_key(map));
    acts.extend(new.iter().map(|map| Act::MoveMap(*map, name(map))));
    acts.extend(replacements(there));
    acts.extend(Program::ALL.map(Act::MovePin));
    let compiled = Compiled { features, ..Compiled::of(request) };
    acts.push(Act::Store(Box::new(Stored { compiled, ..stored.clone() })));
    acts.push(Act::RemovePins(there.building.clone()));
    let (subject, fault) = version::fault(stored).unwrap_or_default();
    Ok(Change::new(subject, fault, "moved to those of this one", acts))
}

/// Puts the new programs in the place of those at the hooks: no packet passes between them.
fn replacements(there: &There) -> Vec<Act> {
    let links = there.hooks.keys().filter_map(|ifindex| there.link(*ifindex)).filter(|link| !relay::is_one(link));
    let taps = links.flat_map(|link| {
        let at = |direction: Direction| {
            let (pref, _) = there.taps_at(key(link.ifindex, direction)).into_iter().next()?;
            let (dev, program, from) = (link.dev(), Program::tap(direction), From::Building);
            Some(Act::Replace { ifindex: link.ifindex, dev, direction, pref, program, from })
        };
        [Direction::Ingress, Direction::Egress].into_iter().filter_map(at).collect::<Vec<_>>()
    });
    taps.chain(relay::replacements(there)).collect()
}

/// The old programs again. They read and count into maps that may have lost their places: until the next `sync`, which
/// alone can change the session, their configuration stays what it is.
fn back(open: &Open, before: &There, indexes: &BTreeSet<u32>) -> Result<()> {
    if open.runner.dry_run {
        return Ok(());
    }
    let _held = interrupt::hold();
    let mut now = There::read(open.runner, &open.home, &before.name, &open.machine.links)?.with(open);
    now.look(open.runner, indexes, true)?;
    let changes = difference::back(before, &now);
    Executor::new(open.runner, &open.home, &before.name, engine::initial(&now)).carry_out(&changes)
}
