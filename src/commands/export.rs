//! `export`: the running sessions as a file that `apply` takes.

use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::file;
use crate::session::engine::{Context, Open};
use crate::session::resolve;
use crate::tools::exec::print;

pub(super) fn run(context: &Context, name: Option<&str>) -> Result<ExitCode> {
    let open = Open::to_read(context)?;
    let names = match name {
        Some(name) => vec![open.chosen(Some(name))?],
        None => open.home.sessions(),
    };
    let mut is_whole = true;
    for (at, name) in names.iter().enumerate() {
        match open.read(name).and_then(|there| match there.stored {
            // With the names that its interfaces have today.
            Ok(stored) => Ok(resolve::follow(&stored, &open.machine)),
            Err(why) => bail!("session {name}: {why}; it is not in the file; see: snifctl status"),
        }) {
            Ok(request) => print(&format!("{}{}", if at > 0 { "\n" } else { "" }, file::shown(&request)))?,
            Err(err) => {
                eprintln!("snifctl: {err:#}");
                is_whole = false;
            }
        }
    }
    if names.is_empty() {
        eprintln!("snifctl: no session is up; nothing to export");
    }
    Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
