//! `status`: what is watched, where copies go, what became of them.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;

use crate::cli::StatusArgs;
use crate::output::status::{self as text, View};
use crate::output::units::grouped;
use crate::output::{json, screen_width};
use crate::session::counted::{self, Known};
use crate::session::engine::{self, Context, Open};
use crate::session::law::{self, Look};
use crate::session::stats::{self, Machine, RemoteState, Session};
use crate::tools::exec::print;
use crate::tools::{interrupt, kernel};

pub(super) fn run(context: &Context, args: &StatusArgs) -> Result<ExitCode> {
    let first = (args.check || args.interval.is_some()).then(|| First::look(context, args)).transpose()?;
    let open = Open::to_read(context)?;
    let names = names(&open, args.name.as_deref())?;
    let mut status = stats::status(&open, &names)?;
    if let Some(first) = &first {
        status.sessions.iter_mut().try_for_each(|session| first.compare(&open, session))?;
        let since_boot = kernel::softnet_dropped();
        status.machine = Some(Machine { since_boot, dropped: since_boot.saturating_sub(first.softnet) });
    }
    let named = |session: &Session| {
        let name = session.name.clone();
        problems(session).into_iter().map(move |line| format!("{name}: {line}"))
    };
    let problems: Vec<String> = status.sessions.iter().flat_map(named).collect();
    match (args.json.json, args.check) {
        (true, _) => {
            if !context.runner.verbose {
                status.sessions = status.sessions.into_iter().map(Session::brief).collect();
            }
            json::print(&serde_json::to_value(&status)?)?;
        }
        (false, true) => {
            problems.iter().try_for_each(|line| print(&format!("{line}\n")))?;
            let machine = status.machine.filter(|at| at.dropped > 0 && !problems.is_empty());
            if let Some(at) = machine {
                print(&format!("machine: softnet has dropped {} packets meanwhile\n", grouped(at.dropped)))?;
            }
        }
        (false, false) => {
            let (color, width) = (args.color.is_on(), screen_width());
            let view = View { verbose: context.runner.verbose, all: args.all, color, width };
            print(&text::status(&status, view))?;
        }
    }
    Ok(if args.check && !problems.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn names(open: &Open, name: Option<&str>) -> Result<Vec<String>> {
    match name {
        None => Ok(engine::shown(open)),
        Some(name) if engine::shown(open).iter().any(|known| known == name) => Ok(vec![name.into()]),
        Some(name) => Ok(vec![open.chosen(Some(name))?]),
    }
}

/// The first of two looks.
struct First {
    /// Of each session that can be read, and when that was.
    sessions: BTreeMap<String, (Look, Instant)>,
    softnet: u64,
}

impl First {
    /// Looks, and waits for as long as the two are to be apart.
    fn look(context: &Context, args: &StatusArgs) -> Result<First> {
        let open = Open::to_read(context)?;
        let mut first = First { sessions: BTreeMap::new(), softnet: kernel::softnet_dropped() };
        for name in names(&open, args.name.as_deref())? {
            // What cannot be read is told by the second look.
            if let Ok(counted) = counted::counted(&open, &name, &mut Known::default()) {
                first.sessions.insert(name, (Look::from(&counted), counted.at));
            }
        }
        drop(open);
        interrupt::wait(args.interval.unwrap_or_default())?;
        Ok(first)
    }

    /// Adds to a session what the two looks tell together.
    fn compare(&self, open: &Open, session: &mut Session) -> Result<()> {
        let Some((first, at)) = self.sessions.get(&session.name) else { return Ok(()) };
        let seconds = session.at.saturating_duration_since(*at).as_secs_f64();
        let second = Look::from(&*session);
        let later = || Ok(Look::from(&counted::counted(open, &session.name, &mut Known::default())?));
        let mut faults = law::lasting_faults(first, &second, later)?;
        let behind = first.lost_behind(&second);
        if behind > 0 {
            faults.push(format!(
                "behind us: {} packets dropped by out interfaces in {seconds:.1} s, of all that they send",
                grouped(behind)
            ));
        }
        session.faults.extend(faults);
        law::rise(first, seconds, session);
        Ok(())
    }
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
