//! `down`: take sessions away.

use std::process::ExitCode;

use anyhow::Result;

use crate::request::{DEFAULT, listed};
use crate::session::difference::Clsact;
use crate::session::engine::{self, Context, Open};
use crate::tools::exec::print;
use crate::tools::interrupt;

pub(super) fn run(context: &Context, name: Option<&str>, all: bool, keep_clsact: bool) -> Result<ExitCode> {
    let open = Open::to_remove(context)?;
    let clsact = if keep_clsact { Clsact::Leave } else { Clsact::Remove };
    let name = name.unwrap_or(DEFAULT);
    let names = if all { engine::everything(&open) } else { vec![name.to_string()] };
    let mut is_done = all && names.is_empty() && engine::sweep(&open)?;
    for (at, name) in names.iter().enumerate() {
        let before =
            (at > 0).then(|| format!("taken down before: {}; go on with: snifctl down --all", names[..at].join(", ")));
        let changes = engine::take_down(&open, name, clsact).map_err(|err| interrupt::partly(err, before))?;
        is_done |= changes.iter().any(|change| !change.acts.is_empty());
    }
    let swept = if all { open.sweep_dead() } else { 0 };
    match context.runner.dry_run {
        true => open.home.lines_to_tidy(&names).iter().try_for_each(|line| print(&format!("{line}\n")))?,
        false => open.home.remove_stale_tests(),
    }
    if !is_done {
        let what = if all { "no session is up".into() } else { format!("session {name} is not up") };
        let others = listed(open.home.sessions().iter().map(|other| format!("snifctl down --name {other}")));
        let next = if swept > 0 {
            format!("what {swept} dead network namespaces have left is removed")
        } else if others.is_empty() {
            "nothing to do".into()
        } else {
            format!("those that are: {others}")
        };
        eprintln!("snifctl: {what}; {next}");
    }
    Ok(ExitCode::SUCCESS)
}
