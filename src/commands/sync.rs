//! `sync`: make the kernel agree with what was asked for.

use std::process::ExitCode;

use anyhow::{Result, bail};
use serde_json::{Value, json};

use crate::commands::{news, warn};
use crate::output::json;
use crate::session::change::Change;
use crate::session::difference::Clsact;
use crate::session::engine::{self, Context, Done, Edit, Open, Scope};
use crate::session::resolve::{self, Asked};
use crate::session::there::There;
use crate::session::upgrade;
use crate::tools::exec::print;
use crate::tools::interrupt;

pub(super) fn run(context: &Context, name: Option<&str>, all: bool, as_json: bool) -> Result<ExitCode> {
    let open = Open::to_write(context)?;
    let names = names(&open, name, all).inspect_err(|_| {
        open.sweep_dead();
    })?;
    let (mut sessions, mut failed) = (Vec::new(), false);
    for name in &names {
        match session(&open, name, |_| ()) {
            Ok(Put { changes, done, .. }) => {
                warn(done.iter().flat_map(news));
                let (changes, notes): (Vec<Change>, Vec<Change>) =
                    changes.into_iter().partition(|change| !change.acts.is_empty());
                if !as_json && !context.runner.dry_run {
                    changes.iter().try_for_each(|change| print(&format!("{name}: {}\n", change.line())))?;
                }
                notes.iter().for_each(|note| eprintln!("snifctl: {name}: {}", note.line()));
                sessions.push(json!({ "name": name, "changes": changes.iter().map(shown).collect::<Vec<Value>>() }));
            }
            Err(err) if interrupt::is_cause(&err) => {
                let before = (!sessions.is_empty())
                    .then_some("sessions before this one were put right; try: snifctl sync --all");
                return Err(interrupt::partly(err, before.map(String::from)));
            }
            // The others are brought in order all the same.
            Err(err) if names.len() > 1 => {
                eprintln!("snifctl: {err:#}");
                failed = true;
            }
            Err(err) => return Err(err),
        }
    }
    if as_json && !context.runner.dry_run {
        json::print(&json!({ "sessions": sessions }))?;
    }
    open.sweep_dead();
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

pub(super) fn shown(change: &Change) -> Value {
    json!({ "subject": change.subject, "fault": change.fault, "fix": change.fix })
}

/// The sessions that are meant. Of those of which only a half is left, the half goes.
fn names(open: &Open, name: Option<&str>, all: bool) -> Result<Vec<String>> {
    let everything = engine::everything(open);
    if all || (name.is_none() && open.home.sessions().is_empty() && !everything.is_empty()) {
        return Ok(everything);
    }
    match name {
        Some(name) if everything.iter().any(|known| known == name) => Ok(vec![name.into()]),
        name => Ok(vec![open.chosen(name)?]),
    }
}

/// What was done about one session.
pub(crate) struct Put {
    pub changes: Vec<Change>,
    /// `None` where only a half of it was left, which has been taken away.
    pub done: Option<Done>,
    /// How it was before.
    pub there: Option<There>,
}

/// Brings one session in order. `how` may change what is asked for it.
pub(crate) fn session(open: &Open, name: &str, how: impl FnOnce(&mut Asked)) -> Result<Put> {
    let there = open.read(name)?;
    if !there.is_published {
        let changes = engine::take_down(open, name, Clsact::Remove)?;
        let changes = changes.into_iter().filter(|change| !change.is_silent()).collect();
        return Ok(Put { changes, done: None, there: None });
    }
    let (there, moved) = upgrade::moved(open, there)?;
    let stored = match &there.stored {
        Ok(stored) => stored,
        Err(why) => bail!("session {name}: {why}; {}", why.help(name)),
    };
    let request = resolve::follow(stored, &open.machine);
    let mut scope = Scope::all(&request);
    how(&mut scope.asked);
    let done = engine::carry_out(open, there.clone(), Edit::new(request, scope))?;
    Ok(Put { changes: moved.into_iter().chain(done.told().cloned()).collect(), done: Some(done), there: Some(there) })
}
