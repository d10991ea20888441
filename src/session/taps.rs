//! The taps of a session, changed while it runs.

use anyhow::{Context, Result, bail, ensure};

use crate::datapath::abi::{Config, Direction, MAX_TAPS, TapCounts, TapKey};
use crate::request::{self, Plan, Watch, Watched};
use crate::session::home::{self, Home};
use crate::session::make::{self, attach, tap_updates};
use crate::session::read::{self, Memory, Session};
use crate::session::resolve;
use crate::session::teardown::{self, Clsact};
use crate::tools::bpftool;
use crate::tools::exec::Runner;
use crate::tools::ip::{self, Link};
use crate::tools::tc;

/// Watches one more interface, or one more direction of it. `keep`: its clsact qdisc stays for good. Returns warnings.
pub fn add(runner: &Runner, interface: &str, direction: Watch, name: Option<&str>, keep: bool) -> Result<Vec<String>> {
    request::ensure_interface_name(interface)?;
    let (home, _lock) = make::lock_to_change(runner)?;
    let added = add_locked(runner, &home, Watched { interface: interface.into(), direction }, name, keep);
    home.remove_if_empty();
    added
}

fn add_locked(runner: &Runner, home: &Home, watched: Watched, name: Option<&str>, keep: bool) -> Result<Vec<String>> {
    let name = home::chosen(home, name)?;
    let links = ip::links(runner)?;
    forget_namesake(runner, home, &name, &links, &watched.interface)?;
    let mut session = read::session(runner, home, &name, &links)?;
    session.memory.follow_names(&links);
    let directions = watched.direction.directions();
    let only = Plan { watched: vec![watched], ..session.memory.plan.clone() };
    let resolved = resolve::resolve(runner, &only, &links)?;
    let link = &resolved.watched[0];
    let find = |direction: &Direction| session.taps.iter().find(|tap| tap.key == key(link, *direction));
    let is_there = |direction: &&Direction| find(direction).is_some_and(|tap| tap.attached);
    let missing: Vec<Direction> = directions.iter().filter(|direction| !is_there(direction)).copied().collect();
    ensure!(
        !missing.is_empty(),
        "IFACE {} is already watched by session {name} ({}); see: snifctl tap list --name {name}",
        link.ifname,
        hook_names(directions)
    );
    // A tap that has lost its filter gets only that.
    let new: Vec<TapKey> = missing.iter().filter(|at| find(at).is_none()).map(|at| key(link, *at)).collect();
    let number = number(&session, link)?;
    let hooks = make::free_hooks(runner, &[&link.ifname])?;
    let mut memory = Memory { plan: watching(&session, link, &missing), ..session.memory.clone() };
    memory.ifindexes.insert(known_name(&session, link), link.ifindex);
    let config = Config { carriers: session.config.carriers || !resolved.carriers.is_empty(), ..session.config };
    let maps = home.session(&name).join("maps");
    let mut lines = make::implied(runner, &maps, &resolved, &session.outs)?;
    lines.extend(new.iter().flat_map(|key| tap_updates(&maps, number, *key)));
    lines.extend(memory.updates(&maps, &config)?);
    let added = bpftool::batch(runner, &lines)
        .and_then(|()| attach(runner, home, &name, link, &hooks[0], &missing))
        .and_then(|lines| tc::batch(runner, &lines));
    if let Err(err) = added {
        let undone = teardown::detach_taps(runner, home, &name, link, &missing, &Clsact::Remove)
            .and_then(|()| read::restore_memory(runner, home, &session))
            .map(|()| forget_rows(runner, home, &name, &new, number));
        return Err(explain(err, undone, &name));
    }
    if keep {
        home.forget_clsact(runner, link.ifindex)?;
    }
    let queue = make::queue_warning(link, &hooks[0], keep);
    Ok(resolved.warnings.into_iter().chain(queue).collect())
}

/// An interface of that name which is gone, and whose name another has now, is watched no more.
fn forget_namesake(runner: &Runner, home: &Home, name: &str, links: &[Link], interface: &str) -> Result<()> {
    let session = read::session(runner, home, name, links)?;
    let Some(ifindex) = session.memory.ifindexes.get(interface) else { return Ok(()) };
    let exists = links.iter().any(|link| link.ifindex == *ifindex);
    let renewed = links.iter().any(|link| link.ifname == interface);
    if exists || !renewed {
        return Ok(());
    }
    let gone: Vec<TapKey> = session.taps.iter().map(|tap| tap.key).filter(|key| key.ifindex == *ifindex).collect();
    remember_without(runner, home, &session, &gone)
}

/// The error of a change, and what undoing it met.
fn explain(err: anyhow::Error, undone: Result<()>, name: &str) -> anyhow::Error {
    match undone {
        Ok(()) => err,
        Err(undo) => err.context(format!("cleaning up failed too ({undo:#}); try: snifctl down --name {name}")),
    }
}

fn key(link: &Link, direction: Direction) -> TapKey {
    TapKey { ifindex: link.ifindex, direction }
}

fn hook_names(directions: &[Direction]) -> String {
    directions.iter().map(|direction| direction.hook()).collect::<Vec<_>>().join(" and ")
}

/// The name that the request has for an interface, which may be one of its other names.
fn known_name(session: &Session, link: &Link) -> String {
    let known = session.memory.ifindexes.iter().find(|(_, ifindex)| **ifindex == link.ifindex);
    known.map_or_else(|| link.ifname.clone(), |(name, _)| name.clone())
}

/// The request with these directions of the interface in it.
fn watching(session: &Session, link: &Link, new: &[Direction]) -> Plan {
    let mut plan = session.memory.plan.clone();
    let interface = known_name(session, link);
    let at = plan.watched.iter().position(|watched| watched.interface == interface);
    let mut all = at.map_or(Vec::new(), |at| plan.watched[at].direction.directions().to_vec());
    all.extend(new);
    let Some(direction) = Watch::of(&all) else { return plan };
    match at {
        Some(at) => plan.watched[at].direction = direction,
        None => plan.watched.push(Watched { interface, direction }),
    }
    plan
}

/// The number of an interface in the session: that of its other tap, or the first free one.
fn number(session: &Session, link: &Link) -> Result<u32> {
    if let Some(tap) = session.taps.iter().find(|tap| tap.key.ifindex == link.ifindex) {
        return Ok(tap.slot / 2);
    }
    let free = (0..MAX_TAPS / 2).find(|number| session.taps.iter().all(|tap| tap.slot / 2 != *number));
    free.with_context(|| {
        format!(
            "session {} watches {} interfaces, which is all it can; start another with: snifctl up --name OTHER",
            session.name,
            MAX_TAPS / 2
        )
    })
}

/// Watches an interface, or one direction of it, no more. What its taps have counted stays in the session's sums.
pub fn remove(runner: &Runner, interface: &str, direction: Watch, name: Option<&str>, clsact: &Clsact) -> Result<()> {
    request::ensure_interface_name(interface)?;
    let (home, _lock) = make::lock_to_change(runner)?;
    let removed = remove_locked(runner, &home, interface, direction, name, clsact);
    home.remove_if_empty();
    removed
}

fn remove_locked(
    runner: &Runner,
    home: &Home,
    interface: &str,
    direction: Watch,
    name: Option<&str>,
    clsact: &Clsact,
) -> Result<()> {
    let name = home::chosen(home, name)?;
    let links = ip::links(runner)?;
    let mut session = read::session(runner, home, &name, &links)?;
    session.memory.follow_names(&links);
    let link = links.iter().find(|link| link.ifname == interface || link.altnames.iter().any(|alt| alt == interface));
    let ifindex = link.map(|link| link.ifindex).or(session.memory.ifindexes.get(interface).copied());
    let keys = direction.directions().iter().map(|direction| Some(TapKey { ifindex: ifindex?, direction: *direction }));
    let gone: Vec<TapKey> = keys.flatten().filter(|key| session.memory.watches(key)).collect();
    if gone.is_empty() {
        let known: Vec<String> =
            session.taps.iter().map(|tap| format!("{} {}", tap.interface, tap.direction)).collect();
        bail!("IFACE {interface} is not watched by session {name} in that direction; it watches: {}", known.join(", "));
    }
    let others = session.taps.iter().any(|tap| !gone.contains(&tap.key));
    ensure!(
        others,
        "session {name} watches nothing but {interface}; add another tap first, or end the session with: snifctl down \
         --name {name}"
    );
    let link = links.iter().find(|link| Some(link.ifindex) == ifindex);
    remove_taps(runner, home, &session, link, &gone, clsact)
}

/// Takes the filters away first; what the taps have counted until then goes into the session's memory. A failure puts
/// the filters back that were there.
fn remove_taps(
    runner: &Runner,
    home: &Home,
    session: &Session,
    link: Option<&Link>,
    gone: &[TapKey],
    clsact: &Clsact,
) -> Result<()> {
    let name = &session.name;
    let Some(link) = link else { return remember_without(runner, home, session, gone) };
    let directions: Vec<Direction> = gone.iter().map(|key| key.direction).collect();
    let removed = teardown::detach_taps(runner, home, name, link, &directions, clsact)
        .and_then(|()| read::session(runner, home, name, &ip::links(runner)?))
        .and_then(|session| remember_without(runner, home, &session, gone));
    removed.map_err(|err| {
        let was = session.taps.iter().filter(|tap| tap.attached && gone.contains(&tap.key));
        let undone = read::restore_memory(runner, home, session).and_then(|()| {
            attach_again(runner, home, name, link, &was.map(|tap| tap.key.direction).collect::<Vec<_>>())
        });
        explain(err, undone, name)
    })
}

/// Attaches those of these taps that are not there.
fn attach_again(runner: &Runner, home: &Home, name: &str, link: &Link, directions: &[Direction]) -> Result<()> {
    let hooks = tc::hooks(runner, &[&link.ifname])?.remove(0);
    let has = |direction: &&Direction| {
        hooks.filters(**direction).iter().any(|filter| filter.handle() == Some(home::handle(name)))
    };
    let missing: Vec<Direction> = directions.iter().filter(|direction| !has(direction)).copied().collect();
    tc::batch(runner, &attach(runner, home, name, link, &hooks, &missing)?)
}

/// Takes taps that are not attached out of the session, all but what they have counted.
fn remember_without(runner: &Runner, home: &Home, session: &Session, gone: &[TapKey]) -> Result<()> {
    let mut memory = session.memory.clone();
    let rows: Vec<_> = session.taps.iter().filter(|tap| gone.contains(&tap.key)).collect();
    memory.removed_taps = TapCounts::sum(rows.iter().map(|tap| tap.counts).chain([memory.removed_taps]));
    forget(&mut memory, gone);
    let maps = home.session(&session.name).join("maps");
    bpftool::batch(runner, &memory.updates(&maps, &session.config)?)?;
    if let Some(tap) = rows.first() {
        forget_rows(runner, home, &session.name, gone, tap.slot / 2);
    }
    Ok(())
}

/// Deletes the map rows of taps that the session no longer has. One that stays is not shown, and is overwritten when its
/// slot is used again.
fn forget_rows(runner: &Runner, home: &Home, name: &str, gone: &[TapKey], number: u32) {
    let maps = home.session(name).join("maps");
    for key in gone {
        let slot = 2 * number + key.direction as u32;
        let lines = [
            bpftool::delete(&maps.join("slots"), &slot.to_ne_bytes()),
            bpftool::delete(&maps.join("taps"), &key.encode()),
        ];
        let _ = bpftool::batch(runner, &lines);
    }
}

/// Takes taps out of the request.
fn forget(memory: &mut Memory, gone: &[TapKey]) {
    let ifindexes = memory.ifindexes.clone();
    memory.plan.watched.retain_mut(|watched| {
        let Some(ifindex) = ifindexes.get(&watched.interface) else { return true };
        let stays = |direction: &&Direction| !gone.contains(&TapKey { ifindex: *ifindex, direction: **direction });
        let left: Vec<Direction> = watched.direction.directions().iter().filter(stays).copied().collect();
        let direction = Watch::of(&left);
        watched.direction = direction.unwrap_or(watched.direction);
        direction.is_some()
    });
    let watched = &memory.plan.watched;
    memory.ifindexes.retain(|name, _| watched.iter().any(|watched| watched.interface == *name));
}
