//! One file a verb or noun of the command line: each runs what was asked and prints the result. Results go to stdout, all
//! else to stderr.

pub(crate) mod apply;
mod capture;
pub(crate) mod collect;
mod completions;
mod demo;
mod doctor;
mod down;
mod explain;
mod export;
mod filter;
mod live;
mod manual;
mod map;
pub(crate) mod metrics;
mod refs;
mod remote;
mod status;
mod stay;
mod sync;
mod tap;
mod up;
mod verify;
mod watch;

use std::process::ExitCode;

use anyhow::Result;

use crate::cli::{Cli, Command, DemoPart, DryRun};
use crate::datapath::objects;
use crate::datapath::source::Source;
use crate::output::json;
use crate::session::change::Change;
use crate::session::engine::{Context, Done, Open};
use crate::session::home::Wait;
use crate::session::outside;
use crate::session::resolve::Warning;
use crate::session::stats;
use crate::session::there::There;
use crate::session::upgrade;
use crate::tools::exec::{Runner, print};
use crate::tools::interrupt;

pub(crate) use capture::Verdict;
pub(crate) use doctor::{Check, Level};

/// Does what was asked.
pub(crate) fn run(cli: Cli) -> Result<ExitCode> {
    let runner = Runner { dry_run: false, verbose: cli.verbose };
    let context = Context { runner, wait: Wait(cli.wait) };
    if !cli.command.only_writes() && !matches!(cli.command, Command::Demo { .. }) {
        outside::enter()?;
    }
    if !cli.command.sees_to_signals() {
        interrupt::watch();
    }
    match cli.command {
        Command::Up(args) => up::run(&context, &args),
        Command::Down { name, all, clsact, dry_run } => {
            down::run(&context.dry(&dry_run), name.as_deref(), all, clsact.keep_clsact)
        }
        Command::Apply { files, prune, json, dry_run } => apply::run(&context.dry(&dry_run), &files, prune, json.json),
        Command::Export { name } => export::run(&context, name.as_deref()),
        Command::Sync { session, all, json, dry_run } => {
            sync::run(&context.dry(&dry_run), session.name.as_deref(), all, json.json)
        }
        Command::Watch(args) => watch::run(&context, &args),
        Command::Status(args) if args.watch => live::run(&context, &args),
        Command::Status(args) => status::run(&context, &args),
        Command::Collect(args) => collect::run(&runner, &args),
        Command::Verify(args) => verify::run(&context, &args),
        Command::Explain { reason } => explain::run(reason.as_deref()),
        Command::Metrics(args) => metrics::run(&context, &args),
        Command::Refs { name, all: _, json } => refs::run(&context, name.as_deref(), json.json),
        Command::Filter(command) => filter::run(&context, command),
        Command::Tap(command) => tap::run(&context, command),
        Command::Remote(command) => remote::run(&context, command),
        Command::Map(command) => map::run(&context, command),
        Command::Doctor { iface, remote, json } => {
            doctor::run(&context, iface.as_deref(), remote.as_deref(), json.json)
        }
        Command::Demo { part: None } => demo::start(&runner),
        Command::Demo { part: Some(DemoPart::Inside) } => demo::run(&runner),
        Command::Demo { part: Some(DemoPart::Peer) } => demo::peer(),
        Command::Source { dir, compile: true, .. } => objects::write(&runner, &dir).map(|()| ExitCode::SUCCESS),
        Command::Source { dir, filter, .. } => {
            let compile = |expression: &String| crate::datapath::filter::compile(&runner, "--filter", expression);
            let filter = filter.as_ref().map(compile).transpose()?;
            Source::datapath(filter, &[]).write(&dir).map(|()| ExitCode::SUCCESS)
        }
        Command::Completions { shell } => completions::run(shell),
        Command::Man { dir } => manual::run(&dir),
    }
}

impl Command {
    /// Does it wait for signals by itself? The demo's sandbox ends with it, however it ends.
    fn sees_to_signals(&self) -> bool {
        match self {
            Command::Demo { .. } | Command::Watch(_) | Command::Metrics(_) | Command::Collect(_) => true,
            Command::Up(args) => args.while_stdin.is_some(),
            _ => false,
        }
    }

    /// Does it only write files or text, and look at nothing of the machine?
    fn only_writes(&self) -> bool {
        matches!(
            self,
            Command::Source { .. }
                | Command::Completions { .. }
                | Command::Man { .. }
                | Command::Explain { .. }
                | Command::Collect(_)
        )
    }
}

impl Context {
    /// The same, changing nothing where `dry_run` says so.
    fn dry(self, dry_run: &DryRun) -> Context {
        Context { runner: Runner { dry_run: dry_run.dry_run, ..self.runner }, ..self }
    }
}

/// What the user should know of a change that was made.
fn warn<'a>(warnings: impl IntoIterator<Item = &'a Warning>) {
    warnings.into_iter().for_each(|warning| eprintln!("snifctl: {}", warning.text));
}

/// Of these warnings those about what has just changed: the rest was said when it did.
fn news(done: &Done) -> Vec<&Warning> {
    let changed = |subject: &str| done.told().any(|change| change.subject == subject);
    let is_news = |warning: &&Warning| match warning.remote {
        Some(remote) => warning.is_of_now || changed(&format!("remote {remote}")),
        // What does not fit, where something has changed that it depends on.
        None => {
            let is_near = |change: &Change| change.subject.starts_with("remote ") || change.fault.contains("MTU");
            warning.is_of_now || done.told().any(is_near)
        }
    };
    done.warnings.iter().filter(is_news).collect()
}

/// Prints a session's taps, remotes or the like.
fn show<T: serde::Serialize>(as_json: bool, name: &str, values: &T, text: impl FnOnce() -> String) -> Result<ExitCode> {
    match as_json {
        true => json::print(&serde_json::json!({ name: values }))?,
        false => print(&text())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The session that is meant, as the kernel has it.
fn read_session(context: &Context, name: Option<&str>) -> Result<stats::Session> {
    let open = Open::to_read(context)?;
    let name = open.chosen(name)?;
    tell_version(&open, &name)?;
    stats::session(&open, &name)
}

/// Says where another version has made the session.
fn tell_version(open: &Open, name: &str) -> Result<()> {
    let there = There::read_to_remove(open.runner, &open.home, name, &open.machine.links)?;
    upgrade::note(&there)?.iter().for_each(|note| eprintln!("snifctl: {note}"));
    Ok(())
}
