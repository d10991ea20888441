//! `tap`: the interfaces that a running session watches.

use std::collections::BTreeSet;
use std::process::ExitCode;

use anyhow::{Result, bail, ensure};

use crate::cli::{TapArgs, TapCommand};
use crate::commands::{read_session, show, warn};
use crate::output::text;
use crate::request::{Request, Watch, Watched, listed};
use crate::session::difference::Clsact;
use crate::session::engine::{self, Context, Edit, Open, Scope, Seen};
use crate::session::pattern;
use crate::session::resolve;
use crate::session::stored::Stored;
use crate::session::there::{There, key};
use crate::tools::exec::quote;

pub(super) fn run(context: &Context, command: TapCommand) -> Result<ExitCode> {
    match command {
        TapCommand::List { session, json } => {
            let session = read_session(context, session.name.as_deref())?;
            show(json.json, "taps", &session.taps, || text::taps(&session))
        }
        TapCommand::Add { tap, absent } => add(&context.dry(&tap.dry_run), &tap, absent.wait_for_interface),
        TapCommand::Remove(args) => remove(&context.dry(&args.dry_run), &args),
    }
}

/// A session that is open for an edit: what there is of it, what it remembers, its request with the names of today.
fn edited<'b, 'a>(open: &'b Open<'a>, args: &TapArgs) -> Result<(There, Stored, Request, Seen<'b, 'a>)> {
    let there = open.edited(args.session.name.as_deref())?;
    let Ok(stored) = there.stored.clone() else { bail!("session {} cannot be read", there.name) };
    let mut asked = stored.request.clone();
    asked.interfaces.push(args.watched()?);
    let open = open.seen_by(&there.name, Some(&stored), Some(&asked))?;
    let request = resolve::follow(&stored, &open.machine);
    Ok((there.with(&open), stored, request, open))
}

/// The name that the request has for an interface, which may be called otherwise; of one that a pattern matches its own.
fn known_name(request: &Request, stored: &Stored, open: &Open, name: &str) -> Option<String> {
    if pattern::is_open(name, Some(stored), &open.machine.links) {
        return request.interfaces.iter().find(|watched| watched.interface == name).map(|_| name.into());
    }
    let found = resolve::interfaces(request, Some(stored), &open.machine);
    let link = open.machine.named(name);
    let by_link =
        found.iter().find(|(_, at)| at.as_ref().zip(link).is_some_and(|(at, link)| at.ifindex == link.ifindex));
    let by_name = || found.iter().find(|(watched, _)| watched.interface == name);
    by_link.or_else(by_name).map(|(watched, _)| watched.interface.clone())
}

fn hook_names(watch: Watch) -> String {
    watch.directions().iter().map(|direction| direction.hook()).collect::<Vec<_>>().join(" and ")
}

/// The interfaces that an edit of this argument is about, by the names that the request or the session has for them.
fn affected(request: &Request, stored: &Stored, open: &Open, name: &str) -> Vec<String> {
    let links = &open.machine.links;
    if !pattern::is_open(name, Some(stored), links) {
        return vec![name.into()];
    }
    let places = stored.interfaces.iter();
    let own =
        places.filter(|(known, place)| pattern::stands_for(name, known, place, open.machine.indexed(place.ifindex)));
    let now = resolve::interfaces(request, Some(stored), &open.machine).into_iter();
    let now = now.filter(|(_, link)| link.as_ref().is_some_and(|link| pattern::matches_link(name, link)));
    let all: BTreeSet<String> = own.map(|(known, _)| known.clone()).chain(now.map(|(at, _)| at.interface)).collect();
    all.into_iter().collect()
}

fn add(context: &Context, args: &TapArgs, waits: bool) -> Result<ExitCode> {
    let open = Open::to_write(context)?;
    let (there, stored, mut request, open) = edited(&open, args)?;
    let open = &*open;
    let Watched { interface: asked, direction } = &args.watched()?;
    let direction = *direction;
    let known = known_name(&request, &stored, open, asked);
    resolve::ensure_there(asked, Some(&stored), &open.machine, waits)?;
    let name = known.clone().unwrap_or_else(|| asked.clone());
    let before = request.clone();
    match request.interfaces.iter_mut().find(|watched| watched.interface == name) {
        Some(watched) => watched.direction = watched.direction.with(direction),
        None => {
            // What a pattern has it watched in, it stays watched in.
            let now = resolve::interfaces(&before, Some(&stored), &open.machine);
            let by_pattern = now.iter().find(|(watched, link)| watched.interface == name && link.is_some());
            let direction = by_pattern.map_or(direction, |(watched, _)| watched.direction.with(direction));
            request.interfaces.push(Watched { interface: name.clone(), direction });
        }
    }
    request.check()?;
    let session = there.name.clone();
    let names = affected(&request, &stored, open, &name);
    if request == before && is_attached(open, &there, &names, direction)? {
        bail!(
            "IFACE {asked} is already watched by session {session} ({}); see: snifctl tap list --name {session}",
            hook_names(direction)
        );
    }
    let edit = Edit {
        clsact: if args.clsact.keep_clsact { Clsact::Leave } else { Clsact::Remove },
        ..Edit::new(
            request.clone(),
            Scope::interfaces(names.clone(), if request == before { Vec::new() } else { names }),
        )
    };
    let done = engine::carry_out(open, there, edit)?;
    warn(&done.warnings);
    Ok(ExitCode::SUCCESS)
}

/// Are the session's taps at these hooks, as far as they are there?
fn is_attached(open: &Open, there: &There, interfaces: &[String], direction: Watch) -> Result<bool> {
    let links: Vec<u32> = interfaces.iter().filter_map(|name| Some(open.machine.named(name)?.ifindex)).collect();
    let mut there = there.clone();
    there.look(open.runner, &links.iter().copied().collect(), false)?;
    let has = |ifindex: &u32| direction.directions().iter().all(|way| there.is_attached(key(*ifindex, *way)));
    Ok(links.iter().all(has))
}

fn remove(context: &Context, args: &TapArgs) -> Result<ExitCode> {
    let open = Open::to_write(context)?;
    let (there, stored, mut request, open) = edited(&open, args)?;
    let open = &*open;
    let Watched { interface: asked, direction } = &args.watched()?;
    let direction = *direction;
    let session = there.name.clone();
    let clsact = if args.clsact.keep_clsact { Clsact::Leave } else { Clsact::Remove };
    let name = known_name(&request, &stored, open, asked);
    let at = request.interfaces.iter().position(|watched| Some(&watched.interface) == name.as_ref());
    let is_watched = |at: &usize| direction.directions().iter().any(|way| request.interfaces[*at].direction.has(*way));
    let links = &open.machine.links;
    let by_pattern = name.as_ref().filter(|_| at.is_none()).and_then(|name| {
        let link = open.machine.named(name)?;
        pattern::of(&request, name, link)
    });
    if let Some(pattern) = by_pattern {
        bail!(
            "IFACE {asked} is watched by session {session} because {0} matches it; name the others instead, and take the \
             pattern out: snifctl tap remove {0} --name {session}",
            quote(pattern)
        );
    }
    // A removal that was killed has left it in the maps.
    let place = match open.machine.named(asked) {
        Some(link) => stored.place(link.ifindex).map(|(_, place)| place),
        None => stored.interfaces.get(asked),
    };
    let is_leaving = place.is_some_and(|place| {
        let wanted = request.interfaces.iter().find(|watched| Some(&watched.interface) == name.as_ref());
        direction
            .directions()
            .iter()
            .any(|way| place.watch.has(*way) && wanted.is_none_or(|at| !at.direction.has(*way)))
    });
    let is_open = pattern::is_open(asked, Some(&stored), links);
    let is_leaving = match is_open {
        true => at.is_none() && stored.interfaces.values().any(|place| place.pattern.as_ref() == Some(asked)),
        false => is_leaving,
    };
    if at.filter(is_watched).is_none() && is_leaving {
        let names = affected(&request, &stored, open, asked);
        let edit = Edit { clsact, ..Edit::new(request, Scope::interfaces(names, Vec::new())) };
        return engine::carry_out(open, there, edit).map(|_| ExitCode::SUCCESS);
    }
    let Some(at) = at.filter(is_watched) else {
        let known = listed(request.interfaces.iter().map(|at| quote(&at.to_string())));
        bail!("IFACE {asked} is not watched by session {session} in that direction; it watches: {known}");
    };
    match request.interfaces[at].direction.without(direction) {
        Some(left) => request.interfaces[at].direction = left,
        None => {
            request.interfaces.remove(at);
        }
    }
    ensure!(
        !request.interfaces.is_empty(),
        "session {session} watches nothing but {asked}; add another tap first, or end the session with: snifctl down --name \
         {session}"
    );
    let name = name.unwrap_or_else(|| asked.clone());
    let names = affected(&request, &stored, open, &name);
    let still = open.machine.named(&name).and_then(|link| pattern::of(&request, &name, link)).map(String::from);
    let edit = Edit { clsact, ..Edit::new(request, Scope::interfaces(names, Vec::new())) };
    engine::carry_out(open, there, edit)?;
    if let Some(pattern) = still {
        eprintln!("snifctl: {name} is still watched, as {} matches it", quote(&pattern));
    }
    Ok(ExitCode::SUCCESS)
}
