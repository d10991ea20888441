//! `status`: what is watched, where copies go, what became of them.

use std::process::ExitCode;

use anyhow::Result;

use crate::output::{json, text};
use crate::session::engine::{self, Context, Open};
use crate::session::stats::{self, RemoteState, Session};
use crate::tools::exec::print;

pub(super) fn run(context: &Context, name: Option<&str>, check: bool, as_json: bool) -> Result<ExitCode> {
    let open = Open::to_read(context)?;
    let names = match name {
        None => engine::shown(&open),
        Some(name) if engine::shown(&open).iter().any(|known| known == name) => vec![name.into()],
        Some(name) => vec![open.chosen(Some(name))?],
    };
    let status = stats::status(&open, &names)?;
    let named = |session: &Session| {
        let name = session.name.clone();
        problems(session).into_iter().map(move |line| format!("{name}: {line}"))
    };
    let problems: Vec<String> = status.sessions.iter().flat_map(named).collect();
    match (as_json, check) {
        (true, _) => json::print(&serde_json::to_value(&status)?)?,
        (false, true) => problems.iter().try_for_each(|line| print(&format!("{line}\n")))?,
        (false, false) => print(&text::status(&status, context.runner.verbose))?,
    }
    Ok(if check && !problems.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// What is not as it must be with a session, a line for each.
pub(crate) fn problems(session: &Session) -> Vec<String> {
    let mut lines = session.faults.clone();
    for remote in &session.remotes {
        let subject = format!("remote {}: ", remote.address);
        let is_told = lines.iter().any(|line| line.starts_with(&subject));
        if remote.state != RemoteState::Ok && !is_told {
            let why = match remote.silence {
                Some(silence) => format!("{silence}: it is down, and gets no copies"),
                None => "it has no route, or its next hop does not answer".into(),
            };
            lines.push(format!("{subject}{why}"));
        }
    }
    lines
}
