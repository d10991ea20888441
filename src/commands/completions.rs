//! `completions`: a shell's script.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Command, CommandFactory};
use clap_complete::Shell;

use crate::cli::Cli;
use crate::tools::exec::print;

pub(super) fn run(shell: Shell) -> Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut without_hidden(&Cli::command()), "snifctl", &mut script);
    print(&String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}

/// The same command with the subcommands that are listed: the generators offer all, and nothing takes one away.
fn without_hidden(command: &Command) -> Command {
    let shown = Command::new(command.get_name().to_string())
        .version(env!("CARGO_PKG_VERSION"))
        .about(command.get_about().cloned().unwrap_or_default())
        .disable_help_subcommand(true)
        .args(command.get_arguments());
    shown.subcommands(command.get_subcommands().filter(|next| !next.is_hide_set()).map(without_hidden))
}
