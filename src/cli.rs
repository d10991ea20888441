//! The command line: clap's structs, and what each command prints. Results go to stdout, all else to stderr.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};
use indoc::indoc;
use serde_json::Value;

use crate::doctor::{self, Level};
use crate::exec::Shell;
use crate::plan::{self, OuterOptions, Oversize, Plan, Request, Tunnel, Watch};
use crate::session::{self, Outcome, Target};
use crate::state::{self, Home};
use crate::{bpftool, clang, demo, report, status};

/// Copy every packet of a Linux interface into a tunnel, with eBPF: exact, counted, the watched traffic untouched
#[derive(Debug, Parser)]
#[command(name = "snifctl", version, propagate_version = true, disable_help_subcommand = true, after_help = indoc! {"
    Examples:
      sudo snifctl up eth0 --tunnel gre --remote 10.0.0.7   copy eth0, both directions, to 10.0.0.7
      sudo snifctl map dump                                 show the kernel's counters
      sudo snifctl down                                     leave nothing behind
      sudo snifctl demo                                     watch it work in a sandbox
"})]
pub struct Cli {
    /// Print each outer command on stderr as it runs
    #[arg(short, long, global = true)]
    verbose: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start copying: load, attach, and leave; no process stays
    #[command(after_help = indoc! {"
        Examples:
          sudo snifctl up eth0 --tunnel gre --remote 10.0.0.7
          sudo snifctl up eth0 eth1 --tunnel gre --remote 10.0.0.7 --name both --direction ingress
          sudo snifctl up eth0 --tunnel gre --remote 10.0.0.7 --oversize fragment
          snifctl up eth0 --tunnel gre --remote 10.0.0.7 --dry-run
    "})]
    Up(UpArgs),
    /// Stop copying and leave the machine as it was
    #[command(after_help = indoc! {"
        Examples:
          sudo snifctl down
          sudo snifctl down --name both
          sudo snifctl down --all
    "})]
    Down {
        /// Session to take down [default: default]
        #[arg(long, conflicts_with = "all")]
        name: Option<String>,
        /// Take down every session of this network namespace
        #[arg(long)]
        all: bool,
    },
    /// Show what is watched, where copies go, and what became of them
    #[command(after_help = indoc! {"
        Examples:
          sudo snifctl status
          sudo snifctl status --json | jq '.sessions[].drops'
    "})]
    Status {
        /// Only this session
        #[arg(long)]
        name: Option<String>,
        #[arg(long)]
        json: bool,
    },
    /// Read the kernel's maps
    #[command(subcommand, after_help = indoc! {"
        Examples:
          sudo snifctl map list
          sudo snifctl map dump
          sudo snifctl map dump taps
    "})]
    Map(MapCommand),
    /// Check tools, kernel, an interface and a remote, and say how to mend what is wrong
    #[command(after_help = indoc! {"
        Examples:
          sudo snifctl doctor
          sudo snifctl doctor eth0 --remote 10.0.0.7
    "})]
    Doctor {
        /// Interface to be watched
        iface: Option<String>,
        /// Address of a collector
        #[arg(long, value_name = "ADDR")]
        remote: Option<String>,
        #[arg(long)]
        json: bool,
    },
    /// Mirror real traffic in a sandbox of namespaces, explained as it runs
    #[command(after_help = indoc! {"
        Examples:
          sudo snifctl demo
          sudo snifctl demo -v
    "})]
    Demo {
        #[command(subcommand)]
        part: Option<DemoPart>,
    },
    /// Write the C sources of the datapath into a directory
    #[command(hide = true)]
    Source { dir: PathBuf },
}

#[derive(Debug, Subcommand)]
#[command(hide = true)]
enum DemoPart {
    #[command(hide = true)]
    Inside,
    #[command(hide = true)]
    Peer,
}

#[derive(Debug, Args)]
struct UpArgs {
    /// Interfaces to watch
    #[arg(required = true, value_name = "IFACE")]
    interfaces: Vec<String>,
    /// Encapsulation of the copies
    #[arg(long, value_enum)]
    tunnel: Tunnel,
    /// Collector: the address that the copies are sent to
    #[arg(long, value_name = "ADDR")]
    remote: String,
    /// Name of the session: 1 to 15 characters of a-z, 0-9 and '-'
    #[arg(long, default_value = "default")]
    name: String,
    /// Which packets of the interfaces to copy
    #[arg(long, value_enum, default_value_t = Watch::Both)]
    direction: Watch,
    /// What becomes of a copy that with its header exceeds the out interface's MTU
    #[arg(long, value_enum, default_value_t = Oversize::Segment)]
    oversize: Oversize,
    /// Outer source address [default: what the route prefers]
    #[arg(long, value_name = "ADDR")]
    source: Option<String>,
    /// Outer time to live, 1 to 255
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u8).range(1..))]
    ttl: u8,
    /// Outer type of service, 0 to 255
    #[arg(long, default_value_t = 0)]
    tos: u8,
    /// Set don't-fragment in the outer header; then what does not fit is dropped, cut by --oversize truncate
    #[arg(long)]
    df: bool,
    /// Print the commands that would run and the outer header, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Print the session as JSON, as `status --json` does
    #[arg(long, conflicts_with = "dry_run")]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum MapCommand {
    /// List the session's maps
    List {
        #[arg(long)]
        name: Option<String>,
        #[arg(long)]
        json: bool,
    },
    /// Print a map's elements as JSON by their field names, per-CPU counters summed; all maps without MAP
    Dump {
        /// Name of a map, as `map list` shows it
        map: Option<String>,
        #[arg(long)]
        name: Option<String>,
    },
}

/// Reads the arguments. Help and version go to stdout; what is wrong is told in one line, exit code 2.
pub fn parse() -> Result<Cli, ExitCode> {
    Cli::try_parse().map_err(|err| match err.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = err.print();
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("snifctl: {}", one_line(&err.render().to_string()));
            ExitCode::from(2)
        }
    })
}

/// clap's message without its usage block, ending in a command that works.
fn one_line(message: &str) -> String {
    let said = message
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:"));
    let said: Vec<&str> = said
        .filter(|line| !line.is_empty() && !line.starts_with("For more information"))
        .collect();
    let said = said.join(" ");
    let command = std::env::args()
        .nth(1)
        .filter(|word| matches!(word.as_str(), "up" | "down" | "status" | "map" | "doctor" | "demo"));
    let help = command.map_or_else(
        || "snifctl --help".into(),
        |command| format!("snifctl {command} --help"),
    );
    if said.is_empty() || !said.starts_with("error:") {
        return format!("a command is missing; try: {help}");
    }
    format!("{}; try: {help}", said.trim_start_matches("error: "))
}

/// Does what was asked.
pub fn run(cli: Cli) -> Result<ExitCode> {
    let shell = Shell {
        dry_run: false,
        verbose: cli.verbose,
    };
    match cli.command {
        Command::Up(args) => up(shell, args),
        Command::Down { name, all } => down(&shell, name, all),
        Command::Status { name, json } => show_status(&shell, name.as_deref(), json),
        Command::Map(MapCommand::List { name, json }) => map_list(&shell, name.as_deref(), json),
        Command::Map(MapCommand::Dump { map, name }) => map_dump(&shell, map.as_deref(), name.as_deref()),
        Command::Doctor { iface, remote, json } => show_doctor(&shell, iface.as_deref(), remote.as_deref(), json),
        Command::Demo { part: None } => demo::start(&shell),
        Command::Demo {
            part: Some(DemoPart::Inside),
        } => demo::run(&shell),
        Command::Demo {
            part: Some(DemoPart::Peer),
        } => demo::peer(),
        Command::Source { dir } => clang::write_source(&dir).map(|()| ExitCode::SUCCESS),
    }
}

fn up(shell: Shell, args: UpArgs) -> Result<ExitCode> {
    let (dry_run, json) = (args.dry_run, args.json);
    let shell = Shell { dry_run, ..shell };
    let plan = plan::plan(Request {
        name: args.name,
        interfaces: args.interfaces,
        direction: args.direction,
        tunnel: args.tunnel,
        remote: args.remote,
        source: args.source,
        oversize: args.oversize,
        outer: OuterOptions {
            ttl: args.ttl,
            tos: args.tos,
            df: args.df,
        },
    })?;
    let (outcome, warnings) = session::up(&shell, &plan)?;
    for warning in warnings {
        eprintln!("snifctl: {warning}");
    }
    match outcome {
        Outcome::Made => {}
        Outcome::Same { refreshed: false } => {
            eprintln!("snifctl: session {} is already up with this request", plan.name)
        }
        Outcome::Same { refreshed: true } => {
            eprintln!(
                "snifctl: session {} is already up; its remote was resolved anew",
                plan.name
            );
        }
        Outcome::Shown(header) => {
            println!("# the outer header, before lengths, id and checksum are patched:");
            println!("# {}", bpftool::hex(&header));
            return Ok(ExitCode::SUCCESS);
        }
    }
    tell_up(&shell, &plan, json)?;
    Ok(ExitCode::SUCCESS)
}

fn tell_up(shell: &Shell, plan: &Plan, json: bool) -> Result<()> {
    let home = Home::here()?;
    let _lock = home.lock_to_read()?;
    let status = status::status(shell, &home, Some(&plan.name))?;
    if json {
        return print_json(&serde_json::to_value(&status)?);
    }
    for session in &status.sessions {
        print!("{}", report::session_line(session));
    }
    Ok(())
}

/// A map's elements, one a line.
fn element_lines(dump: &Value) -> Result<String> {
    let elements = dump.as_array().map(Vec::as_slice).unwrap_or_default();
    let lines = elements
        .iter()
        .map(serde_json::to_string)
        .collect::<Result<Vec<_>, _>>()?;
    Ok(if lines.is_empty() {
        "[]".into()
    } else {
        format!("[\n  {}\n]", lines.join(",\n  "))
    })
}

fn print_json(value: &Value) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

fn down(shell: &Shell, name: Option<String>, all: bool) -> Result<ExitCode> {
    let name = name.unwrap_or_else(|| "default".into());
    plan::ensure_name(&name)?;
    let target = if all { Target::All } else { Target::One(&name) };
    if !session::down(shell, &target)? {
        let what = if all {
            "no session is up".into()
        } else {
            format!("session {name} is not up")
        };
        eprintln!("snifctl: {what}; nothing to do");
    }
    Ok(ExitCode::SUCCESS)
}

fn show_status(shell: &Shell, name: Option<&str>, json: bool) -> Result<ExitCode> {
    state::ensure_root()?;
    let home = Home::here()?;
    let _lock = home.lock_to_read()?;
    let status = status::status(shell, &home, name)?;
    match json {
        true => print_json(&serde_json::to_value(&status)?)?,
        false => print!("{}", report::status(&status)),
    }
    Ok(ExitCode::SUCCESS)
}

fn map_list(shell: &Shell, name: Option<&str>, json: bool) -> Result<ExitCode> {
    state::ensure_root()?;
    let home = Home::here()?;
    let _lock = home.lock_to_read()?;
    let session = session::chosen(&home, name)?;
    let maps = status::maps(shell, &home, &session)?;
    match json {
        true => print_json(&serde_json::to_value(&maps)?)?,
        false => print!("{}", report::maps(&maps)),
    }
    Ok(ExitCode::SUCCESS)
}

fn map_dump(shell: &Shell, map: Option<&str>, name: Option<&str>) -> Result<ExitCode> {
    state::ensure_root()?;
    let home = Home::here()?;
    let _lock = home.lock_to_read()?;
    let session = session::chosen(&home, name)?;
    if let Some(map) = map.filter(|map| !status::MAPS.contains(map)) {
        bail!(
            "MAP {map:?} is not a map of session {session}; it has: {}",
            status::MAPS.join(", ")
        );
    }
    let wanted: Vec<&str> = map.map_or_else(|| status::MAPS.to_vec(), |map| vec![map]);
    let dumps = status::dumps(shell, &home, &session, &wanted)?;
    let elements = dumps
        .iter()
        .map(|dump| element_lines(&bpftool::formatted(dump)))
        .collect::<Result<Vec<_>>>()?;
    match map {
        Some(_) => println!("{}", elements[0]),
        None => {
            let named = wanted
                .iter()
                .zip(elements)
                .map(|(name, lines)| format!("\"{name}\": {lines}"));
            println!("{{\n{}\n}}", named.collect::<Vec<_>>().join(",\n"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show_doctor(shell: &Shell, iface: Option<&str>, remote: Option<&str>, json: bool) -> Result<ExitCode> {
    let checks = doctor::checks(shell, iface, remote)?;
    match json {
        true => print_json(&serde_json::json!({ "checks": checks }))?,
        false => print!("{}", report::checks(&checks)),
    }
    Ok(if doctor::worst(&checks) == Level::Fail {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}
