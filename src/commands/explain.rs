//! `explain`: what a reason of drops means, and what to do.

use std::process::ExitCode;

use anyhow::Result;

use crate::datapath::reason::Reason;
use crate::tools::exec::print;
use crate::usage::refuse;

pub(super) fn run(name: Option<&str>) -> Result<ExitCode> {
    let plain = |words: &str| words.replace('`', "");
    let Some(name) = name else {
        let width = Reason::ALL.iter().map(|reason| reason.name().len()).max().unwrap_or(0);
        let rows = Reason::ALL.iter().map(|reason| format!("{:width$}  {}\n", reason.name(), plain(reason.happened())));
        print(&rows.collect::<String>())?;
        return Ok(ExitCode::SUCCESS);
    };
    let Some(reason) = Reason::of(name) else {
        let known: Vec<&str> = Reason::ALL.iter().map(|reason| reason.name()).collect();
        refuse!("REASON {name:?} is none that copies are dropped for; there are: {}", known.join(", "))
    };
    print(&format!("{}: {}\nto do: {}\n", reason.name(), plain(reason.happened()), plain(reason.remedy())))?;
    Ok(ExitCode::SUCCESS)
}
