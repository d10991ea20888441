//! The command line: clap's structs, and what each command prints. Results go to stdout, all else to stderr.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};
use indoc::indoc;
use serde_json::Value;

use crate::commands::capture;
use crate::commands::demo;
use crate::commands::doctor::{self, Level};
use crate::datapath::abi::{Direction, Remote};
use crate::datapath::filter;
use crate::output::text;
use crate::request::{self, OuterOptions, Oversize, Request, Spread, Tunnel, TunnelOptions, Watch};
use crate::session::home::{self, Home, MAPS};
use crate::session::make::{self, Outcome};
use crate::session::read;
use crate::session::read::{Session, Status};
use crate::session::remotes;
use crate::session::swap;
use crate::session::taps;
use crate::session::teardown::{self, Clsact, Target};
use crate::tools::bpftool;
use crate::tools::clang::Source;
use crate::tools::exec::{Runner, print};

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
          sudo snifctl up eth0 --tunnel gre --remote 10.0.0.7 --filter 'tcp port 443' --snaplen 128
          sudo snifctl up eth0 --tunnel vxlan --id 100 --remote 10.0.0.7,10.0.0.8 --spread flow
          sudo snifctl up eth0 --tunnel erspan3 --id 7 --remote 2001:db8::7
          snifctl up eth0 --tunnel gre --remote 10.0.0.7 --dry-run
    "})]
    Up(UpArgs),
    /// Stop copying and leave the machine as it was
    #[command(after_help = indoc! {"
        Examples:
          sudo snifctl down
          sudo snifctl down --name both
          sudo snifctl down --all
          sudo snifctl down --keep-clsact
    "})]
    Down {
        /// Session to take down [default: default]
        #[arg(long, conflicts_with = "all")]
        name: Option<String>,
        /// Take down every session of this network namespace
        #[arg(long)]
        all: bool,
        /// Leave the interfaces' clsact qdiscs in place, as removing one drops what stands in the queue
        #[arg(long)]
        keep_clsact: bool,
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
    /// Choose what is copied, while the session runs
    #[command(subcommand, after_help = indoc! {"
        Examples:
          sudo snifctl filter set 'tcp port 443 and not net 10.0.0.0/8'
          sudo snifctl filter test 'vlan 10 and tcp' -r capture.pcap
          sudo snifctl filter clear
    "})]
    Filter(FilterCommand),
    /// List, add and remove the taps of a running session
    #[command(subcommand, after_help = indoc! {"
        Examples:
          sudo snifctl tap list
          sudo snifctl tap add eth1
          sudo snifctl tap remove eth0 --direction egress
    "})]
    Tap(TapCommand),
    /// List, add and remove the remotes of a running session
    #[command(subcommand, after_help = indoc! {"
        Examples:
          sudo snifctl remote list
          sudo snifctl remote add 10.0.0.8
          sudo snifctl remote remove 10.0.0.7
    "})]
    Remote(RemoteCommand),
    /// Read the kernel's maps
    #[command(subcommand, after_help = indoc! {"
        Examples:
          sudo snifctl map list
          sudo snifctl map dump
          sudo snifctl map dump taps
    "})]
    Map(MapCommand),
    /// Check tools, kernel, an interface and a remote, and say how to fix what is wrong
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
    Source {
        dir: PathBuf,
        #[arg(long, value_name = "EXPR", allow_hyphen_values = true)]
        filter: Option<String>,
    },
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
    /// Collector: the address that the copies are sent to; several with commas or by repeating
    #[arg(long = "remote", value_name = "ADDR", required = true, value_delimiter = ',')]
    remotes: Vec<String>,
    /// Which of several remotes get a copy
    #[arg(long, value_enum, default_value_t = Spread::Replicate)]
    spread: Spread,
    /// GRE key, VXLAN or Geneve VNI [default: 1], ERSPAN session id [default: 1]
    #[arg(long, value_name = "N")]
    id: Option<u32>,
    /// The id of copies of outgoing packets [default: that of --id]
    #[arg(long, value_name = "N")]
    egress_id: Option<u32>,
    /// UDP destination port [default: vxlan 4789, geneve 6081]
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// Add GRE sequence numbers
    #[arg(long)]
    sequence: bool,
    /// Compute the outer UDP checksum instead of leaving it zero
    #[arg(long)]
    udp_checksum: bool,
    /// Name of the session: 1 to 15 characters of a-z, 0-9 and '-'
    #[arg(long, default_value = "default")]
    name: String,
    /// Which packets of the interfaces to copy
    #[arg(long, value_enum, default_value_t = Watch::Both)]
    direction: Watch,
    /// Copy only what this pcap-filter(7) expression takes
    #[arg(long, value_name = "EXPR", allow_hyphen_values = true)]
    filter: Option<String>,
    /// Copy one of N packets, at random
    #[arg(long, value_name = "1/N")]
    sample: Option<String>,
    /// Copy one of N flows, both directions of it, or nothing of it
    #[arg(long, value_name = "1/N")]
    sample_flows: Option<String>,
    /// Copy only the first BYTES of each frame, 60 to 15000
    #[arg(long, value_name = "BYTES")]
    snaplen: Option<u32>,
    /// Let no more leave towards the remotes, in tc's units: 200mbit, 50kpps
    #[arg(long, value_name = "RATE")]
    max_rate: Option<String>,
    /// What becomes of a copy that with its header exceeds the out interface's MTU
    #[arg(long, value_enum, default_value_t = Oversize::Segment)]
    oversize: Oversize,
    /// Outer source address, at most one of each family [default: what the route prefers]
    #[arg(long = "source", value_name = "ADDR", value_delimiter = ',')]
    sources: Vec<String>,
    /// Where an out interface that is a tunnel sends its own packets, which are then not copied; `none` if nowhere watched
    #[arg(long = "carrier", value_name = "ADDR[:PORT]", value_delimiter = ',')]
    carriers: Vec<String>,
    /// Outer time to live, 1 to 255
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u8).range(1..))]
    ttl: u8,
    /// Outer type of service, 0 to 255
    #[arg(long, default_value_t = 0)]
    tos: u8,
    /// Set don't-fragment in the outer header; then what does not fit is dropped, cut by --oversize truncate
    #[arg(long)]
    df: bool,
    /// Leave the interfaces' clsact qdiscs in place for good, as removing one drops what stands in the queue
    #[arg(long)]
    keep_clsact: bool,
    /// Print the commands that would run and the outer header, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Print the session as JSON, as `status --json` does
    #[arg(long, conflicts_with = "dry_run")]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum FilterCommand {
    /// Print the expression in force
    #[command(after_help = "Examples:\n  sudo snifctl filter show\n  sudo snifctl filter show --code")]
    Show {
        /// Print the C that it is compiled to
        #[arg(long)]
        code: bool,
        #[arg(long)]
        name: Option<String>,
    },
    /// Put another filter in force: no packet passes between the old and the new one
    #[command(
        after_help = "Examples:\n  sudo snifctl filter set 'tcp port 443 and not net 10.0.0.0/8'\n  sudo snifctl filter set udp and port 53"
    )]
    Set {
        /// A pcap-filter(7) expression, in one word or several
        #[arg(value_name = "EXPR", required = true)]
        expression: Vec<String>,
        #[arg(long)]
        name: Option<String>,
    },
    /// Copy every packet again
    #[command(after_help = "Examples:\n  sudo snifctl filter clear\n  sudo snifctl filter clear --name both")]
    Clear {
        #[arg(long)]
        name: Option<String>,
    },
    /// Say which packets of a capture an expression takes, by running its program in the kernel
    #[command(
        after_help = "Examples:\n  sudo snifctl filter test 'tcp port 443' -r capture.pcap\n  sudo snifctl filter test -r capture.pcap"
    )]
    Test {
        /// A pcap-filter(7) expression, in one word or several [default: the one in force]
        #[arg(value_name = "EXPR")]
        expression: Vec<String>,
        /// A capture of Ethernet that tcpdump can read
        #[arg(short, long, value_name = "FILE")]
        read: PathBuf,
        #[arg(long)]
        name: Option<String>,
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Subcommand)]
enum TapCommand {
    /// List the session's taps with their counters
    #[command(after_help = "Examples:\n  sudo snifctl tap list\n  sudo snifctl tap list --json")]
    List {
        #[arg(long)]
        name: Option<String>,
        #[arg(long)]
        json: bool,
    },
    /// Watch one more interface, or one more direction of it
    #[command(after_help = "Examples:\n  sudo snifctl tap add eth1\n  sudo snifctl tap add eth1 --direction ingress")]
    Add {
        #[arg(value_name = "IFACE")]
        interface: String,
        /// Which of its packets to copy
        #[arg(long, value_enum, default_value_t = Watch::Both)]
        direction: Watch,
        #[arg(long)]
        name: Option<String>,
        /// Leave the interface's clsact qdisc in place for good
        #[arg(long)]
        keep_clsact: bool,
    },
    /// Watch an interface, or one direction of it, no more
    #[command(
        after_help = "Examples:\n  sudo snifctl tap remove eth1\n  sudo snifctl tap remove eth0 --direction egress"
    )]
    Remove {
        #[arg(value_name = "IFACE")]
        interface: String,
        /// Which of its packets to copy no more
        #[arg(long, value_enum, default_value_t = Watch::Both)]
        direction: Watch,
        #[arg(long)]
        name: Option<String>,
        /// Leave the interface's clsact qdisc in place
        #[arg(long)]
        keep_clsact: bool,
    },
}

#[derive(Debug, Subcommand)]
enum RemoteCommand {
    /// List the session's remotes with their counters
    #[command(after_help = "Examples:\n  sudo snifctl remote list\n  sudo snifctl remote list --json")]
    List {
        #[arg(long)]
        name: Option<String>,
        #[arg(long)]
        json: bool,
    },
    /// Send copies to one more collector; nothing is reloaded
    #[command(
        after_help = "Examples:\n  sudo snifctl remote add 10.0.0.8\n  sudo snifctl remote add 2001:db8::8 --name both"
    )]
    Add {
        #[arg(value_name = "ADDR")]
        address: String,
        #[arg(long)]
        name: Option<String>,
    },
    /// Send no more copies to a collector; the others notice nothing
    #[command(after_help = "Examples:\n  sudo snifctl remote remove 10.0.0.8")]
    Remove {
        #[arg(value_name = "ADDR")]
        address: String,
        #[arg(long)]
        name: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
enum MapCommand {
    /// List the session's maps
    #[command(after_help = "Examples:\n  sudo snifctl map list\n  sudo snifctl map list --json")]
    List {
        #[arg(long)]
        name: Option<String>,
        #[arg(long)]
        json: bool,
    },
    /// Print a map's elements as JSON by their field names, per-CPU counters summed; all maps without MAP
    #[command(after_help = "Examples:\n  sudo snifctl map dump\n  sudo snifctl map dump taps | jq '.[].value.stat'")]
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

const COMMANDS: [&str; 9] = ["up", "down", "status", "filter", "tap", "remote", "map", "doctor", "demo"];

/// clap's message without its usage block, ending in a command that works.
fn one_line(message: &str) -> String {
    let said = message.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:"));
    let said: Vec<&str> = said.filter(|line| !line.is_empty() && !line.starts_with("For more information")).collect();
    let said = said.join(" ");
    let command = std::env::args().skip(1).find(|word| COMMANDS.contains(&word.as_str()));
    let help = command.map_or_else(|| "snifctl --help".into(), |command| format!("snifctl {command} --help"));
    if said.is_empty() || !said.starts_with("error:") {
        return format!("a command is missing; try: {help}");
    }
    format!("{}; try: {help}", said.trim_start_matches("error: "))
}

/// Does what was asked.
pub fn run(cli: Cli) -> Result<ExitCode> {
    let runner = Runner { dry_run: false, verbose: cli.verbose };
    match cli.command {
        Command::Up(args) => up(runner, args),
        Command::Down { name, all, keep_clsact } => down(&runner, name, all, keep_clsact),
        Command::Status { name, json } => show_status(&runner, name.as_deref(), json),
        Command::Filter(FilterCommand::Show { code, name }) => filter_show(&runner, code, name.as_deref()),
        Command::Filter(FilterCommand::Set { expression, name }) => {
            filter_set(&runner, Some(&expression.join(" ")), name.as_deref())
        }
        Command::Filter(FilterCommand::Clear { name }) => filter_set(&runner, None, name.as_deref()),
        Command::Filter(FilterCommand::Test { expression, read, name, json }) => {
            filter_test(&runner, &expression.join(" "), &read, name.as_deref(), json)
        }
        Command::Tap(TapCommand::List { name, json }) => tap_list(&runner, name.as_deref(), json),
        Command::Tap(TapCommand::Add { interface, direction, name, keep_clsact }) => {
            warn(taps::add(&runner, &interface, direction, name.as_deref(), keep_clsact)?)
        }
        Command::Tap(TapCommand::Remove { interface, direction, name, keep_clsact }) => {
            let clsact = clsact(keep_clsact);
            taps::remove(&runner, &interface, direction, name.as_deref(), &clsact).map(|()| ExitCode::SUCCESS)
        }
        Command::Remote(RemoteCommand::List { name, json }) => remote_list(&runner, name.as_deref(), json),
        Command::Remote(RemoteCommand::Add { address, name }) => {
            warn(remotes::add(&runner, &address, name.as_deref())?)
        }
        Command::Remote(RemoteCommand::Remove { address, name }) => {
            remotes::remove(&runner, &address, name.as_deref()).map(|()| ExitCode::SUCCESS)
        }
        Command::Map(MapCommand::List { name, json }) => map_list(&runner, name.as_deref(), json),
        Command::Map(MapCommand::Dump { map, name }) => map_dump(&runner, map.as_deref(), name.as_deref()),
        Command::Doctor { iface, remote, json } => show_doctor(&runner, iface.as_deref(), remote.as_deref(), json),
        Command::Demo { part: None } => demo::start(&runner),
        Command::Demo { part: Some(DemoPart::Inside) } => demo::run(&runner),
        Command::Demo { part: Some(DemoPart::Peer) } => demo::peer(),
        Command::Source { dir, filter } => {
            let filter = make::compiled_filter(&runner, "--filter", filter.as_deref())?;
            Source::datapath(filter, Vec::new()).write(&dir).map(|()| ExitCode::SUCCESS)
        }
    }
}

fn up(runner: Runner, args: UpArgs) -> Result<ExitCode> {
    let (dry_run, json, keep) = (args.dry_run, args.json, args.keep_clsact);
    let runner = Runner { dry_run, ..runner };
    let plan = request::plan(Request {
        name: args.name,
        interfaces: args.interfaces,
        direction: args.direction,
        filter: args.filter,
        sample: args.sample,
        sample_flows: args.sample_flows,
        snaplen: args.snaplen,
        max_rate: args.max_rate,
        tunnel: TunnelOptions {
            kind: args.tunnel,
            id: args.id,
            egress_id: args.egress_id,
            port: args.port,
            sequence: args.sequence,
            udp_checksum: args.udp_checksum,
        },
        remotes: args.remotes,
        spread: args.spread,
        sources: args.sources,
        carriers: args.carriers,
        oversize: args.oversize,
        outer: OuterOptions { ttl: args.ttl, tos: args.tos, df: args.df },
    })?;
    let (outcome, warnings) = make::up(&runner, &plan, keep)?;
    warn(warnings)?;
    let name = &plan.name;
    let session = match outcome {
        Outcome::Made(session) => session,
        Outcome::Same(session) => {
            eprintln!("snifctl: session {name} is already up with this request");
            session
        }
        Outcome::Refreshed(session) => {
            eprintln!("snifctl: session {name} is already up; its remotes were resolved anew");
            session
        }
        Outcome::Shown(headers) => {
            headers.iter().for_each(|(address, remote)| show_headers(*address, remote));
            return Ok(ExitCode::SUCCESS);
        }
    };
    match session {
        Some(session) if json => print_json(&serde_json::to_value(Status { sessions: vec![session] })?)?,
        Some(session) => print(&text::session_line(&session)),
        None => eprintln!("snifctl: session {name} is up, but its status could not be read; try: snifctl status"),
    }
    Ok(ExitCode::SUCCESS)
}

/// The outer headers of a remote, as comment lines: one, or one a direction where they differ.
fn show_headers(address: IpAddr, remote: &Remote) {
    let [ingress, egress] = [Direction::Ingress, Direction::Egress].map(|direction| remote.outer(direction));
    print(&format!("# the outer header to {address}, before lengths, ids and checksums are patched:\n"));
    print(&format!("# {}\n", bpftool::hex(ingress)));
    if egress != ingress {
        print("# and of copies of outgoing packets:\n");
        print(&format!("# {}\n", bpftool::hex(egress)));
    }
}

/// A map's elements, one a line.
fn element_lines(dump: &Value) -> Result<String> {
    let elements = dump.as_array().map(Vec::as_slice).unwrap_or_default();
    let lines = elements.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>()?;
    Ok(if lines.is_empty() { "[]".into() } else { format!("[\n  {}\n]", lines.join(",\n  ")) })
}

fn print_json(value: &Value) -> Result<()> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?));
    Ok(())
}

fn clsact(keep: bool) -> Clsact<'static> {
    if keep { Clsact::Leave } else { Clsact::Remove }
}

fn down(runner: &Runner, name: Option<String>, all: bool, keep_clsact: bool) -> Result<ExitCode> {
    let name = name.unwrap_or_else(|| "default".into());
    request::ensure_name(&name)?;
    let target = if all { Target::All } else { Target::One(&name) };
    if !teardown::down(runner, &target, &clsact(keep_clsact))? {
        let what = if all { "no session is up".into() } else { format!("session {name} is not up") };
        eprintln!("snifctl: {what}; nothing to do");
    }
    Ok(ExitCode::SUCCESS)
}

/// What every command that reads sessions needs.
fn ready_to_read() -> Result<Home> {
    home::ensure_root()?;
    doctor::ensure_present(&["bpftool", "tc", "ip"])?;
    Home::here()
}

fn show_status(runner: &Runner, name: Option<&str>, json: bool) -> Result<ExitCode> {
    let home = ready_to_read()?;
    let _lock = home.lock_to_read()?;
    let status = read::status(runner, &home, name)?;
    match json {
        true => print_json(&serde_json::to_value(&status)?)?,
        false => print(&text::status(&status)),
    }
    Ok(ExitCode::SUCCESS)
}

fn remote_list(runner: &Runner, name: Option<&str>, json: bool) -> Result<ExitCode> {
    let remotes = read_session(runner, name)?.remotes;
    match json {
        true => print_json(&serde_json::json!({ "remotes": remotes }))?,
        false => print(&text::remotes(&remotes)),
    }
    Ok(ExitCode::SUCCESS)
}

/// What the user should know of a change that was made.
fn warn(warnings: Vec<String>) -> Result<ExitCode> {
    warnings.iter().for_each(|warning| eprintln!("snifctl: {warning}"));
    Ok(ExitCode::SUCCESS)
}

/// The session that is meant, as the kernel has it.
fn read_session(runner: &Runner, name: Option<&str>) -> Result<Session> {
    let home = ready_to_read()?;
    let _lock = home.lock_to_read()?;
    let name = home::chosen(&home, name)?;
    let mut status = read::status(runner, &home, Some(&name))?;
    status.sessions.pop().context("the session is gone; see: snifctl status")
}

fn filter_show(runner: &Runner, code: bool, name: Option<&str>) -> Result<ExitCode> {
    let session = read_session(runner, name)?;
    match session.filter {
        Some(expression) if code => print(&filter::compile(runner, "--filter", &expression)?),
        Some(expression) => print(&format!("{expression}\n")),
        None => eprintln!("snifctl: session {} has no filter: every packet is copied", session.name),
    }
    Ok(ExitCode::SUCCESS)
}

fn filter_set(runner: &Runner, expression: Option<&str>, name: Option<&str>) -> Result<ExitCode> {
    let (session, changed) = swap::set(runner, expression, name)?;
    if !changed {
        let what = if expression.is_some() { "already has this filter" } else { "has no filter" };
        eprintln!("snifctl: session {session} {what}; nothing to do");
    }
    Ok(ExitCode::SUCCESS)
}

fn filter_test(runner: &Runner, expression: &str, file: &Path, name: Option<&str>, json: bool) -> Result<ExitCode> {
    let in_force = match expression {
        "" => read_session(runner, name)?.filter.unwrap_or_default(),
        given => given.into(),
    };
    let verdict = capture::test(runner, &in_force, file)?;
    match json {
        true => print_json(&serde_json::json!({ "packets": verdict.packets, "matched": verdict.matched }))?,
        false => print(&text::verdict(&verdict)),
    }
    if verdict.cut > 0 {
        let (cut, tested) = (verdict.cut, capture::TESTED);
        eprintln!(
            "snifctl: {cut} packets are longer than {tested} bytes: what lies behind was not there for the filter"
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn tap_list(runner: &Runner, name: Option<&str>, json: bool) -> Result<ExitCode> {
    let session = read_session(runner, name)?;
    match json {
        true => print_json(&serde_json::json!({ "taps": session.taps }))?,
        false => print(&text::taps(&session)),
    }
    Ok(ExitCode::SUCCESS)
}

fn map_list(runner: &Runner, name: Option<&str>, json: bool) -> Result<ExitCode> {
    let home = ready_to_read()?;
    let _lock = home.lock_to_read()?;
    let session = home::chosen(&home, name)?;
    let maps = read::maps(runner, &home, &session)?;
    match json {
        true => print_json(&serde_json::to_value(&maps)?)?,
        false => print(&text::maps(&maps)),
    }
    Ok(ExitCode::SUCCESS)
}

fn map_dump(runner: &Runner, map: Option<&str>, name: Option<&str>) -> Result<ExitCode> {
    let home = ready_to_read()?;
    let _lock = home.lock_to_read()?;
    let session = home::chosen(&home, name)?;
    if let Some(map) = map.filter(|map| !MAPS.contains(map)) {
        bail!("MAP {map:?} is not a map of session {session}; it has: {}", MAPS.join(", "));
    }
    let wanted: Vec<&str> = map.map_or_else(|| MAPS.to_vec(), |map| vec![map]);
    let dumps = read::dumps(runner, &home, &session, &wanted)?;
    let elements = dumps.iter().map(|dump| element_lines(&bpftool::formatted(dump))).collect::<Result<Vec<_>>>()?;
    match map {
        Some(_) => print(&format!("{}\n", elements[0])),
        None => {
            let named = wanted.iter().zip(elements).map(|(name, lines)| format!("\"{name}\": {lines}"));
            print(&format!("{{\n{}\n}}\n", named.collect::<Vec<_>>().join(",\n")));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show_doctor(runner: &Runner, iface: Option<&str>, remote: Option<&str>, json: bool) -> Result<ExitCode> {
    let checks = doctor::checks(runner, iface, remote)?;
    match json {
        true => print_json(&serde_json::json!({ "checks": checks }))?,
        false => print(&text::checks(&checks)),
    }
    Ok(if doctor::worst(&checks) == Level::Fail { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
