//! `filter`: which packets are copied, while the session runs.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;

use crate::cli::FilterCommand;
use crate::commands::capture;
use crate::commands::read_session;
use crate::datapath::filter;
use crate::datapath::source::Source;
use crate::output::text;
use crate::request::ensure_filter;
use crate::session::engine::{self, Context, Edit, Open, Scope, Started};
use crate::session::resolve;
use crate::tools::exec::print;
use crate::tools::rights;

pub(super) fn run(context: &Context, command: FilterCommand) -> Result<ExitCode> {
    match command {
        FilterCommand::Show { code, session } => show_filter(context, code, session.name.as_deref()),
        FilterCommand::Set { expression, session, dry_run } => {
            set(&context.dry(&dry_run), Some(&expression.join(" ")), session.name.as_deref())
        }
        FilterCommand::Clear { session, dry_run } => set(&context.dry(&dry_run), None, session.name.as_deref()),
        FilterCommand::Test { expression, read, session, json } => {
            let given = (!expression.is_empty()).then(|| expression.join(" "));
            test(context, given.as_deref(), &read, session.name.as_deref(), json.json)
        }
    }
}

fn show_filter(context: &Context, code: bool, name: Option<&str>) -> Result<ExitCode> {
    let session = read_session(context, name)?;
    match session.filter {
        Some(expression) if code => print(&filter::compile(&context.runner, "--filter", &expression)?.code)?,
        Some(expression) => print(&format!("{expression}\n"))?,
        None => eprintln!("snifctl: session {} has no filter: every packet is copied", session.name),
    }
    Ok(ExitCode::SUCCESS)
}

/// Puts a filter in force, or none. Compiled before anything changes; then each tap is replaced by `tc filter replace`, so
/// that every packet meets the old filter or the new one.
fn set(context: &Context, expression: Option<&str>, name: Option<&str>) -> Result<ExitCode> {
    let runner = &context.runner;
    ensure_filter("EXPR", expression)?;
    rights::to_write()?;
    let filter = expression.map(|expression| filter::compile(runner, "EXPR", expression)).transpose()?;
    let source = Source::taps(filter.clone());
    let compiling = Started(Some((source.clone(), source.begin(runner)?)));
    let open = Open::to_write(context)?;
    let there = open.edited(name)?;
    let name = there.name.clone();
    let mut request = match &there.stored {
        Ok(stored) => resolve::follow(stored, &open.machine),
        Err(_) => unreachable!("it can be edited"),
    };
    request.options.filter = expression.map(String::from);
    let edit = Edit { filter, compiling, ..Edit::new(request, Scope::taps()) };
    let done = engine::carry_out(&open, there, edit)?;
    if done.is_nothing() {
        let what = if expression.is_some() { "already has this filter" } else { "has no filter" };
        eprintln!("snifctl: session {name} {what}; nothing to do");
    }
    Ok(ExitCode::SUCCESS)
}

fn test(
    context: &Context,
    expression: Option<&str>,
    file: &Path,
    name: Option<&str>,
    as_json: bool,
) -> Result<ExitCode> {
    ensure_filter("EXPR", expression)?;
    let expression = match expression {
        None => read_session(context, name)?.filter.unwrap_or_default(),
        Some(given) => given.into(),
    };
    let verdict = capture::test(context, &expression, file)?;
    capture::note(&verdict);
    match as_json {
        true => {
            crate::output::json::print(&serde_json::json!({ "packets": verdict.packets, "matched": verdict.matched }))?
        }
        false => print(&text::verdict(&verdict))?,
    }
    Ok(ExitCode::SUCCESS)
}
