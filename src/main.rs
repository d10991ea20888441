//! snifctl: copy every packet of a Linux interface into a tunnel, with eBPF at the TC hook.

/// In place of the standard one, which panics where nobody reads.
macro_rules! eprintln {
    ($($text:tt)*) => { $crate::tools::notes::say(&format!($($text)*)) };
}

mod cli;
mod collect;
mod commands;
mod datapath;
mod extcap;
mod file;
mod origin;
mod output;
mod plugin;
mod request;
mod session;
mod tools;
mod tunnel;
mod usage;
mod wildcard;

use std::process::ExitCode;

use tools::exec::ReaderGone;
use tools::interrupt;
use usage::Usage;

fn main() -> ExitCode {
    let done = match plugin::words(std::env::args_os()) {
        Some(words) => plugin::parse(words).map(plugin::run),
        None => match extcap::words(std::env::args_os()) {
            Some(words) => extcap::parse(words).map(extcap::run),
            None => cli::parse().map(commands::run),
        },
    };
    let done = match done {
        Ok(done) => done,
        Err(code) => return code,
    };
    match done {
        Ok(code) => code,
        // Who reads no more has seen enough.
        Err(err) if err.is::<ReaderGone>() => ExitCode::SUCCESS,
        Err(err) => {
            let line = if interrupt::is_cause(&err) { interrupt::line(&err) } else { format!("{err:#}") };
            eprintln!("snifctl: {line}");
            ExitCode::from(interrupt::code().unwrap_or(if err.is::<Usage>() { 2 } else { 1 }))
        }
    }
}
