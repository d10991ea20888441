//! `refs`: who holds the programs and maps of sessions.

use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt;
use std::process::ExitCode;

use anyhow::Result;

use crate::output::json;
use crate::session::engine::{Context, Open};
use crate::session::refs::{self, Held, Kind};
use crate::tools::exec::print;

pub(super) fn run(context: &Context, name: Option<&str>, as_json: bool) -> Result<ExitCode> {
    let open = Open::to_read(context)?;
    let name = name.map(|name| open.chosen(Some(name))).transpose()?;
    let held = refs::refs(&context.runner, &open.home, name.as_deref())?;
    match as_json {
        true => json::print(&serde_json::json!({ "refs": held }))?,
        false => print(&text(&held))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn text(held: &[Held]) -> String {
    let here = std::fs::metadata("/proc/self/ns/net").map_or(0, |at| at.ino());
    if held.is_empty() {
        return "There are no programs and maps of sessions.\n".into();
    }
    let mut text = String::new();
    let mut last = None;
    for one in held {
        if last != Some(&one.session) {
            let _ = match &one.session {
                None => writeln!(text, "of no session"),
                Some(owner) if owner.life == "here" => writeln!(text, "session {}", owner.name),
                Some(owner) => writeln!(text, "session {}, {}, netns {}", owner.name, owner.life, owner.netns),
            };
            last = Some(&one.session);
        }
        let kind = if one.kind == Kind::Program { "program" } else { "map" };
        let _ = writeln!(text, "  {kind} {} {}", one.id, one.name);
        for holder in &one.holders {
            let _ = writeln!(text, "    {}", holder.line(here));
        }
        if one.holders.is_empty() {
            let _ = writeln!(text, "    unseen   who holds it can be seen from outside this container only");
        }
    }
    text
}
