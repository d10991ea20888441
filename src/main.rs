//! snifctl: copy every packet of a Linux interface into a tunnel, with eBPF at the TC hook.

mod abi;
mod bpftool;
mod capture;
mod clang;
mod cli;
mod demo;
mod doctor;
mod exec;
mod filter;
mod firewall;
mod header;
mod ip;
mod kernel;
mod outs;
mod plan;
mod relay;
mod remotes;
mod repair;
mod report;
mod route;
mod session;
mod stack;
mod state;
mod status;
mod swap;
mod taps;
mod tc;
mod teardown;

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
