//! snifctl: copy every packet of a Linux interface into a tunnel, with eBPF at the TC hook.

mod cli;
mod commands;
mod datapath;
mod output;
mod request;
mod session;
mod tools;
mod tunnel;
mod usage;

use std::process::ExitCode;

use tools::exec::ReaderGone;
use usage::Usage;

fn main() -> ExitCode {
    let args = match cli::parse() {
        Ok(args) => args,
        Err(code) => return code,
    };
    match commands::run(args) {
        Ok(code) => code,
        // Who reads no more has seen enough.
        Err(err) if err.is::<ReaderGone>() => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("snifctl: {err:#}");
            ExitCode::from(if err.is::<Usage>() { 2 } else { 1 })
        }
    }
}
