//! `map`: the kernel's maps of a session.

use std::process::ExitCode;

use anyhow::Result;

use crate::cli::MapCommand;
use crate::commands::tell_version;
use crate::datapath::parts::Map;
use crate::output::{json, text};
use crate::session::engine::{Context, Open};
use crate::session::stats;
use crate::tools::exec::print;
use crate::tools::rights;
use crate::usage::{Usage, refuse};

pub(super) fn run(context: &Context, command: MapCommand) -> Result<ExitCode> {
    match command {
        MapCommand::List { session, json } => list(context, session.name.as_deref(), json.json),
        MapCommand::Dump { map, session } => dump(context, map.as_deref(), session.name.as_deref()),
    }
}

fn list(context: &Context, name: Option<&str>, as_json: bool) -> Result<ExitCode> {
    let open = Open::to_read(context)?;
    let name = open.chosen(name)?;
    tell_version(&open, &name)?;
    let maps = stats::maps(&context.runner, &open.home, &name)?;
    match as_json {
        true => json::print(&serde_json::to_value(&maps)?)?,
        false => print(&text::maps(&maps))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn named(name: &str) -> Result<Map, Usage> {
    let names: Vec<&str> = Map::shown().map(Map::name).collect();
    match Map::of(name).filter(|map| map.is_shown()) {
        Some(map) => Ok(map),
        None => refuse!("MAP {name:?} is not a map of a session; it has: {}", names.join(", ")),
    }
}

fn dump(context: &Context, map: Option<&str>, name: Option<&str>) -> Result<ExitCode> {
    let map = map.map(named).transpose()?;
    let open = Open::to_read(context)?;
    let session = open.chosen(name)?;
    tell_version(&open, &session)?;
    let is_left_out = |map: &Map| map.has_lock() && !rights::reads_typed_maps();
    let (left_out, all): (Vec<Map>, Vec<Map>) = Map::shown().partition(is_left_out);
    let wanted = map.map_or(all, |map| vec![map]);
    if map.is_none() && !left_out.is_empty() {
        let names: Vec<&str> = left_out.into_iter().map(Map::name).collect();
        eprintln!("snifctl: left out, as they can be read with CAP_SYS_ADMIN alone: {}", names.join(", "));
    }
    let dumps = stats::dumps(&context.runner, &open.home, &session, &wanted)?;
    let elements = dumps.iter().map(json::elements).collect::<Result<Vec<_>>>()?;
    match map {
        Some(_) => print(&format!("{}\n", elements[0]))?,
        None => {
            let named = wanted.iter().zip(elements).map(|(map, lines)| format!("\"{}\": {lines}", map.name()));
            print(&format!("{{\n{}\n}}\n", named.collect::<Vec<_>>().join(",\n")))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
