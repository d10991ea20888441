//! `remote`: the collectors of a running session.

use std::net::IpAddr;
use std::process::ExitCode;

use anyhow::{Result, bail, ensure};

use crate::cli::{RemoteArgs, RemoteCommand};
use crate::commands::{read_session, show, warn};
use crate::datapath::abi::MAX_REMOTES;
use crate::output::text;
use crate::request::listed;
use crate::session::engine::{self, Context, Edit, Open, Scope};
use crate::session::resolve;

pub(super) fn run(context: &Context, command: RemoteCommand) -> Result<ExitCode> {
    match command {
        RemoteCommand::List { session, json } => {
            let remotes = read_session(context, session.name.as_deref())?.remotes;
            show(json.json, "remotes", &remotes, || text::remotes(&remotes))
        }
        RemoteCommand::Add(args) => add(&context.dry(&args.dry_run), &args),
        RemoteCommand::Remove(args) => remove(&context.dry(&args.dry_run), &args),
    }
}

/// Sends copies to one more collector: written whole before the first copy can name it.
fn add(context: &Context, args: &RemoteArgs) -> Result<ExitCode> {
    let open = Open::to_write(context)?;
    let there = open.edited(args.session.name.as_deref())?;
    let (name, address) = (there.name.clone(), args.address);
    let Ok(stored) = &there.stored else { bail!("session {name} cannot be read") };
    let mut request = resolve::follow(stored, &open.machine);
    let remotes = &mut request.options.remotes;
    ensure!(
        !remotes.contains(&address),
        "remote {address} is already one of session {name}; see: snifctl remote list --name {name}"
    );
    ensure!(
        remotes.len() < MAX_REMOTES,
        "session {name} has {MAX_REMOTES} remotes, which is all it can; start another with: snifctl up --name OTHER"
    );
    remotes.push(address);
    let done = engine::carry_out(&open, there, Edit::new(request, Scope::remotes(vec![address])))?;
    warn(&done.warnings);
    Ok(ExitCode::SUCCESS)
}

/// Sends no more copies to a collector: its flows go elsewhere first.
fn remove(context: &Context, args: &RemoteArgs) -> Result<ExitCode> {
    let open = Open::to_write(context)?;
    let there = open.edited(args.session.name.as_deref())?;
    let (name, address) = (there.name.clone(), args.address);
    let Ok(stored) = &there.stored else { bail!("session {name} cannot be read") };
    let mut request = resolve::follow(stored, &open.machine);
    let remotes = &mut request.options.remotes;
    if !remotes.contains(&address) && !stored.remotes.contains_key(&address) {
        let known = listed(remotes.iter().map(IpAddr::to_string));
        bail!("remote {address} is not one of session {name}, which has: {known}");
    }
    remotes.retain(|remote| *remote != address);
    ensure!(
        !remotes.is_empty(),
        "remote {address} is the only one of session {name}; add another first, or end the session with: snifctl down --name \
         {name}"
    );
    engine::carry_out(&open, there, Edit::new(request, Scope::remotes(Vec::new())))?;
    Ok(ExitCode::SUCCESS)
}
