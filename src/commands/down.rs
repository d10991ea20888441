//! `down`: take sessions away.

use std::process::ExitCode;

use anyhow::Result;

use crate::request::DEFAULT;
use crate::session::difference::Clsact;
use crate::session::engine::{self, Context, Open};
use crate::tools::exec::print;

pub(super) fn run(context: &Context, name: Option<&str>, all: bool, keep_clsact: bool) -> Result<ExitCode> {
    let open = Open::to_remove(context)?;
    let clsact = if keep_clsact { Clsact::Leave } else { Clsact::Remove };
    let name = name.unwrap_or(DEFAULT);
    let names = if all { engine::everything(&open) } else { vec![name.to_string()] };
    let mut is_done = all && names.is_empty() && engine::sweep(&open)?;
    for name in &names {
        is_done |= engine::take_down(&open, name, clsact)?.iter().any(|change| !change.acts.is_empty());
    }
    match context.runner.dry_run {
        true => open.home.lines_to_tidy().iter().try_for_each(|line| print(&format!("{line}\n")))?,
        false => open.home.remove_stale_tests(),
    }
    if !is_done {
        let what = if all { "no session is up".into() } else { format!("session {name} is not up") };
        eprintln!("snifctl: {what}; nothing to do");
    }
    Ok(ExitCode::SUCCESS)
}
