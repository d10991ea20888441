//! `status`: what is watched, where copies go, what became of them.

use std::process::ExitCode;

use anyhow::Result;

use crate::output::{json, text};
use crate::session::engine::{Context, Open};
use crate::session::stats;
use crate::tools::exec::print;

pub(super) fn run(context: &Context, name: Option<&str>, as_json: bool) -> Result<ExitCode> {
    let open = Open::to_read(context)?;
    let names = match name {
        None => open.home.sessions(),
        Some(name) => vec![open.chosen(Some(name))?],
    };
    let status = stats::status(&open, &names)?;
    match as_json {
        true => json::print(&serde_json::to_value(&status)?)?,
        false => print(&text::status(&status, context.runner.verbose))?,
    }
    Ok(ExitCode::SUCCESS)
}
