//! `tap`: the interfaces that a running session watches.

use std::collections::BTreeSet;
use std::process::ExitCode;

use anyhow::{Result, bail, ensure};

use crate::cli::{TapArgs, TapCommand};
use crate::commands::{read_session, show, warn};
use crate::output::text;
use crate::request::{Request, Watch, Watched, listed};
use crate::session::difference::Clsact;
use crate::session::engine::{self, Context, Edit, Open, Scope};
use crate::session::resolve;
use crate::session::stored::Stored;
use crate::session::there::{There, key};

pub(super) fn run(context: &Context, command: TapCommand) -> Result<ExitCode> {
    match command {
        TapCommand::List { session, json } => {
            let session = read_session(context, session.name.as_deref())?;
            show(json.json, "taps", &session.taps, || text::taps(&session))
        }
        TapCommand::Add(args) => add(&context.dry(&args.dry_run), &args),
        TapCommand::Remove(args) => remove(&context.dry(&args.dry_run), &args),
    }
}

/// A session that is open for an edit: what there is of it, what it remembers, its request with the names of today.
fn edited(open: &Open, args: &TapArgs) -> Result<(There, Stored, Request)> {
    let there = open.edited(args.session.name.as_deref())?;
    let Ok(stored) = there.stored.clone() else { bail!("session {} cannot be read", there.name) };
    let request = resolve::follow(&stored, &open.machine);
    Ok((there, stored, request))
}

/// The name that the request has for an interface, which may be called otherwise.
fn known_name(request: &Request, stored: &Stored, open: &Open, name: &str) -> Option<String> {
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

fn add(context: &Context, args: &TapArgs) -> Result<ExitCode> {
    let open = Open::to_write(context)?;
    let (there, stored, mut request) = edited(&open, args)?;
    let (asked, direction) = (&args.interface.interface, args.direction()?);
    resolve::ensure_watchable(asked, &open.machine)?;
    let known = known_name(&request, &stored, &open, asked);
    let name = known.clone().unwrap_or_else(|| asked.clone());
    let before = request.clone();
    match request.interfaces.iter_mut().find(|watched| watched.interface == name) {
        Some(watched) => watched.direction = watched.direction.with(direction),
        None => request.interfaces.push(Watched { interface: name.clone(), direction }),
    }
    request.check()?;
    let session = there.name.clone();
    if request == before && is_attached(&open, &there, asked, direction)? {
        bail!(
            "IFACE {asked} is already watched by session {session} ({}); see: snifctl tap list --name {session}",
            hook_names(direction)
        );
    }
    let edit = Edit {
        clsact: if args.clsact.keep_clsact { Clsact::Leave } else { Clsact::Remove },
        ..Edit::new(request.clone(), Scope::interface(&name, request != before))
    };
    let done = engine::carry_out(&open, there, edit)?;
    warn(&done.warnings);
    Ok(ExitCode::SUCCESS)
}

/// Are the session's taps at these hooks?
fn is_attached(open: &Open, there: &There, interface: &str, direction: Watch) -> Result<bool> {
    let Some(link) = open.machine.named(interface) else { return Ok(false) };
    let mut there = there.clone();
    there.look(open.runner, &BTreeSet::from([link.ifindex]), false)?;
    Ok(direction.directions().iter().all(|way| there.is_attached(key(link.ifindex, *way))))
}

fn remove(context: &Context, args: &TapArgs) -> Result<ExitCode> {
    let open = Open::to_write(context)?;
    let (there, stored, mut request) = edited(&open, args)?;
    let (asked, direction) = (&args.interface.interface, args.direction()?);
    let session = there.name.clone();
    let clsact = if args.clsact.keep_clsact { Clsact::Leave } else { Clsact::Remove };
    let name = known_name(&request, &stored, &open, asked);
    let at = request.interfaces.iter().position(|watched| Some(&watched.interface) == name.as_ref());
    let is_watched = |at: &usize| direction.directions().iter().any(|way| request.interfaces[*at].direction.has(*way));
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
    if at.filter(is_watched).is_none() && is_leaving {
        let edit = Edit { clsact, ..Edit::new(request, Scope::interface(asked, false)) };
        return engine::carry_out(&open, there, edit).map(|_| ExitCode::SUCCESS);
    }
    let Some(at) = at.filter(is_watched) else {
        let known = listed(request.interfaces.iter().map(Watched::to_string));
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
    let edit = Edit { clsact, ..Edit::new(request, Scope::interface(&name, false)) };
    engine::carry_out(&open, there, edit)?;
    Ok(ExitCode::SUCCESS)
}
