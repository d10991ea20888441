//! snifctl: copy every packet of a Linux interface into a tunnel, with eBPF at the TC hook.

mod cli;
mod commands;
mod datapath;
mod output;
mod request;
mod session;
mod tools;

use std::process::ExitCode;

fn main() -> ExitCode {
    let args = match cli::parse() {
        Ok(args) => args,
        Err(code) => return code,
    };
    match cli::run(args) {
        Ok(code) => code,
        Err(err) => {
            eprintln!("snifctl: {err:#}");
            ExitCode::FAILURE
        }
    }
}
