//! The command line: clap's types, and what is wrong with it in one line.

use std::io::IsTerminal;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use indoc::indoc;

use crate::collect::control::Place;
use crate::commands::collect::CollectArgs;
use crate::commands::metrics::Listen;
use crate::origin::Origin;
use crate::request::{self, DEFAULT, Named, Options, Request, Watch, Watched};
use crate::usage::{Usage, ensure_usage, number, refuse, spelled};

/// Copy every packet of a Linux interface into a tunnel, with eBPF: exact, counted, the watched traffic untouched
#[derive(Debug, Parser)]
#[command(name = "snifctl", version, propagate_version = true, disable_help_subcommand = true, after_help = indoc! {"
    Examples:
      sudo snifctl up eth0 --tunnel gre --remote 10.0.0.7  # copy eth0 to 10.0.0.7
      sudo snifctl map dump  # show the kernel's counters
      sudo snifctl down      # leave nothing behind
      sudo snifctl demo      # watch it work in a sandbox
"})]
pub(crate) struct Cli {
    /// Print each outer command on stderr as it runs
    #[arg(short, long, global = true, display_order = 900)]
    pub verbose: bool,
    /// Wait at most so long for another snifctl to finish [default: for ever]
    #[arg(long, global = true, value_name = "SECONDS", value_parser = seconds, display_order = 901,
        allow_negative_numbers = true)]
    pub wait: Option<Duration>,
    #[command(subcommand)]
    pub command: Command,
}

fn seconds(text: &str) -> Result<Duration, Usage> {
    number::<u32>("--wait", text, 0..=86400, "--wait 10").map(|seconds| Duration::from_secs(seconds.into()))
}

/// Which session is meant.
#[derive(Debug, Args)]
pub(crate) struct SessionName {
    /// The session [default: the only one, or the one called `default`]
    #[arg(long, value_name = "NAME", value_parser = request::name_option)]
    pub name: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Json {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DryRun {
    /// Print the commands that would run, one a line, and change nothing
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct KeepClsact {
    /// Leave clsact qdiscs in place for good, as removing one drops what is in the queue
    #[arg(long)]
    pub keep_clsact: bool,
}

#[derive(Debug, Args)]
pub(crate) struct MayBeAbsent {
    /// Take interfaces that are not there yet, and patterns that match none: `sync` watches them as soon as they are
    #[arg(long)]
    pub wait_for_interface: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start copying: load, attach, and leave; no process stays
    #[command(after_help = indoc! {"
        Examples:
          sudo snifctl up eth0 --tunnel gre --remote 10.0.0.7
          sudo snifctl up eth0 eth1:ingress --tunnel gre --remote 10.0.0.7 --name both
          sudo snifctl up 'eth*' 'cali*:ingress' --tunnel gre --remote 10.0.0.7
          sudo snifctl up eth0 --tunnel gre --remote 10.0.0.7 --oversize fragment
          sudo snifctl up eth0 --tunnel gre --remote 10.0.0.7 --filter 'tcp port 443'
          sudo snifctl up eth0 --tunnel vxlan --id 100 --remote 10.0.0.7,10.0.0.8
          sudo snifctl up eth0 --tunnel erspan3 --id 7 --remote 2001:db8::7
          sudo snifctl up eth0 --tunnel gre --remote 10.0.0.7 --while-stdin
          snifctl up eth0 --tunnel gre --remote 10.0.0.7 --dry-run
    "})]
    Up(Box<UpArgs>),
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
        #[arg(long, value_name = "NAME", conflicts_with = "all", value_parser = request::name_option)]
        name: Option<String>,
        /// Take down every session of this network namespace
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        clsact: KeepClsact,
        #[command(flatten)]
        dry_run: DryRun,
    },
    /// Make sessions as files have them, by the smallest change
    #[command(after_help = indoc! {"
        Examples:
          sudo snifctl apply -f web.toml
          sudo snifctl apply -f /etc/snifctl.d --prune
          snifctl apply -f web.toml --dry-run
          sudo snifctl export | sed s/10.0.0.7/10.0.0.8/ | sudo snifctl apply -f -

        The file is TOML: a table for each session, a key for each option of `up`:
          [[session]]
          name = \"web\"
          interfaces = [\"eth0:ingress\", \"eth1\"]
          tunnel = \"gre\"
          remote = [\"10.0.0.7\"]
          filter = \"tcp port 443\"
    "})]
    Apply {
        /// A TOML file, a directory of *.toml files, or - for standard input; may be repeated
        #[arg(short, long = "file", value_name = "FILE|DIR|-", required = true)]
        files: Vec<PathBuf>,
        /// Take down the sessions that apply has made and the files no longer have
        #[arg(long)]
        prune: bool,
        #[command(flatten)]
        json: Json,
        #[command(flatten)]
        dry_run: DryRun,
    },
    /// Print the running sessions as a file for apply
    #[command(after_help = indoc! {"
        Examples:
          sudo snifctl export > all.toml
          sudo snifctl export --name both
    "})]
    Export {
        /// Only this session
        #[arg(long, value_name = "NAME", value_parser = request::name_option)]
        name: Option<String>,
    },
    /// Make the kernel agree with what was asked for: after a change of routes, interfaces, or damage
    #[command(after_help = indoc! {"
        Examples:
          sudo snifctl sync
          sudo snifctl sync --all
          sudo snifctl sync --name both --dry-run
    "})]
    Sync {
        #[command(flatten)]
        session: SessionName,
        /// Every session of this network namespace
        #[arg(long, conflicts_with = "name")]
        all: bool,
        #[command(flatten)]
        json: Json,
        #[command(flatten)]
        dry_run: DryRun,
    },
    /// Keep mirrors right while the machine changes: a process that syncs whenever something happens
    #[command(after_help = indoc! {"
        Examples:
          sudo snifctl watch
          sudo snifctl watch --name both --interval 10
          sudo snifctl watch --apply /etc/snifctl.d
          sudo snifctl watch --down-on-exit
          snifctl watch --check /run/snifctl/heartbeat
    "})]
    Watch(WatchArgs),
    /// Show what is watched, where copies go, and what became of them
    #[command(after_help = indoc! {"
        Examples:
          sudo snifctl status
          sudo snifctl status -v
          sudo snifctl status --interval 2s
          sudo snifctl status --watch
          sudo snifctl status --check || sudo snifctl sync
          sudo snifctl status --json | jq '.sessions[].drops'
    "})]
    Status(StatusArgs),
    /// Receive copies on the collector: write them as a capture, put them on an interface, count what was lost
    #[command(after_help = indoc! {"
        Examples:
          sudo snifctl collect -w - | wireshark -k -i -
          sudo snifctl collect --tunnel vxlan -w day.pcapng -C 1000 -W 24 -Z tcpdump
          sudo snifctl collect --to tap0
          sudo snifctl collect --stats 10
    "})]
    Collect(Box<CollectArgs>),
    /// Ask the collector what has arrived: what was copied is sent or dropped here, what was sent received or lost
    #[command(after_help = indoc! {"
        Examples:
          sudo snifctl verify --remote 10.0.0.7
          sudo snifctl verify --remote 10.0.0.7 --interval 10s --json
          sudo snifctl verify --remote 10.0.0.7 --control 192.0.2.7:9811
    "})]
    Verify(VerifyArgs),
    /// Say what a reason of drops means, and what to do
    #[command(after_help = "Examples:\n  snifctl explain\n  snifctl explain unresolved")]
    Explain {
        /// The reason, as `status` names it; all of them without it
        reason: Option<String>,
    },
    /// Tell Prometheus the counters: printed, in a file, or served
    #[command(after_help = indoc! {"
        Examples:
          sudo snifctl metrics
          sudo snifctl metrics --textfile /var/lib/node_exporter/snifctl.prom
          sudo snifctl metrics --listen 127.0.0.1:9810
    "})]
    Metrics(MetricsArgs),
    /// Show who holds the programs and maps of sessions, also of those that are gone
    #[command(after_help = indoc! {"
        Examples:
          sudo snifctl refs
          sudo snifctl refs --name both --json
    "})]
    Refs {
        /// Only those of this session of this network namespace
        #[arg(long, value_name = "NAME", conflicts_with = "all", value_parser = request::name_option)]
        name: Option<String>,
        /// Those of every session and namespace, also of dead ones, which is the default
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        json: Json,
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
        #[arg(value_name = "IFACE", value_parser = request::interface_argument)]
        iface: Option<String>,
        /// Address of a collector
        #[arg(long, value_name = "ADDR")]
        remote: Option<String>,
        #[command(flatten)]
        json: Json,
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
    /// Write the C sources of the kernel programs into a directory
    #[command(after_help = indoc! {"
        Examples:
          snifctl source /tmp/snifctl-c
          snifctl source /tmp/snifctl-c --filter 'tcp port 443'
          snifctl source --compile ./objects
    "})]
    Source {
        /// Made where it is not there
        dir: PathBuf,
        /// A pcap-filter(7) expression, written beside them as C
        #[arg(long, value_name = "EXPR", allow_hyphen_values = true)]
        filter: Option<String>,
        /// Compiled objects instead, for machines without clang: what /usr/lib/snifctl/objects takes
        #[arg(long, conflicts_with = "filter")]
        compile: bool,
    },
    /// Print a shell's script that completes commands and options
    #[command(after_help = indoc! {"
        Examples:
          snifctl completions bash > ~/.local/share/bash-completion/completions/snifctl
          snifctl completions fish > ~/.config/fish/completions/snifctl.fish
    "})]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write the manual pages into a directory
    #[command(hide = true)]
    Man {
        /// Made where it is not there
        dir: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum DemoPart {
    #[command(hide = true)]
    Inside,
    #[command(hide = true)]
    Peer,
}

/// The flags that stand for interfaces.
const PLACES: [&str; 5] = ["netns", "pid", "container", "pod", "pods"];

/// Other network namespaces, whose interfaces are meant: those that are named, else all but `lo`.
#[derive(Debug, Args)]
#[command(next_help_heading = "Other network namespaces")]
pub(crate) struct ElsewhereArgs {
    /// Watch in this network namespace: a name of `ip netns`, or a path
    #[arg(long, value_name = "NAME|PATH")]
    pub netns: Vec<String>,
    /// Watch in the network namespace of this process
    #[arg(long, value_name = "PID", allow_negative_numbers = true)]
    pub pid: Vec<String>,
    /// Watch in this container: of Docker, containerd, CRI-O or Podman; an id, or its beginning
    #[arg(long, value_name = "ID")]
    pub container: Vec<String>,
    /// Watch in this pod of Kubernetes, where it is on this node
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub pod: Vec<String>,
    /// Watch in every pod on this node that has these labels: app=web,tier!=test; new ones with `watch`
    #[arg(long, value_name = "SELECTOR")]
    pub pods: Vec<String>,
    /// The namespace of --pods; '*' for all
    #[arg(long, value_name = "NAMESPACE", requires = "pods", default_value = "default", hide_default_value = true)]
    pub namespace: String,
    /// Watch the node's end of each pair instead, where there is one
    #[arg(long)]
    pub host_side: bool,
}

impl ElsewhereArgs {
    /// Pods by their labels.
    pub(crate) fn of_pods(namespace: String, selector: String, host_side: bool) -> ElsewhereArgs {
        let none = Vec::new;
        let (netns, pid, container, pod) = (none(), none(), none(), none());
        ElsewhereArgs { netns, pid, container, pod, pods: vec![selector], namespace, host_side }
    }

    /// What is meant: these interfaces, in the other network namespaces if there are any.
    pub(crate) fn named(&self, interfaces: &[Named]) -> Result<Vec<Named>, Usage> {
        let of = |flag: &'static str, kind: &'static str, values: &[String]| -> Vec<(String, String)> {
            values.iter().map(|value| (format!("--{flag} {value}"), format!("{kind}:{value}"))).collect()
        };
        let pods: Vec<String> = self.pods.iter().map(|selector| format!("{}/{selector}", self.namespace)).collect();
        let places = [
            of("netns", "netns", &self.netns),
            of("pid", "pid", &self.pid),
            of("container", "container", &self.container),
            of("pod", "pod", &self.pod),
            of("pods", "pods", &pods),
        ]
        .concat();
        if places.is_empty() {
            ensure_usage!(
                !self.host_side,
                "--host-side says which end of a pod's pair is meant; try: --pod shop/web-1 --host-side"
            );
            return Ok(interfaces.to_vec());
        }
        if let Some(other) = interfaces.iter().find(|at| at.interface.contains('/')) {
            refuse!("IFACE {:?} says where it is itself; leave out {}", other.interface, places[0].0);
        }
        let all = [Named { interface: "*".into(), direction: None }];
        let interfaces = if interfaces.is_empty() { &all } else { interfaces };
        let side = if self.host_side { "host:" } else { "" };
        let mut named = Vec::new();
        for (flag, place) in places {
            if let Err(Usage(said)) = place.parse::<Origin>() {
                refuse!("{flag}: {said}");
            }
            named.extend(
                interfaces
                    .iter()
                    .map(|at| Named { interface: format!("{side}{place}/{}", at.interface), direction: at.direction }),
            );
        }
        Ok(named)
    }
}

#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// Interfaces to watch, or patterns of names: 'eth*'; of one, a direction: eth0:ingress, eth0:egress
    #[arg(required_unless_present_any = PLACES, value_name = "IFACE[:DIRECTION]")]
    pub interfaces: Vec<Named>,
    #[command(flatten)]
    pub elsewhere: ElsewhereArgs,
    #[command(flatten)]
    pub options: Options,
    /// Name of the session: 1 to 15 characters of a-z, 0-9 and '-'
    #[arg(long, value_name = "NAME", default_value = DEFAULT, value_parser = request::name_option)]
    pub name: String,
    /// Which packets to copy of interfaces that name no direction
    #[arg(long, value_enum, default_value_t = Watch::Both)]
    pub direction: Watch,
    /// Change a session that is up with another request; counters are kept
    #[arg(long)]
    pub replace: bool,
    #[command(flatten)]
    pub absent: MayBeAbsent,
    #[command(flatten)]
    pub clsact: KeepClsact,
    #[command(flatten)]
    pub dry_run: DryRun,
    /// Print the session as JSON, as `status --json` does
    #[arg(long, conflicts_with = "dry_run")]
    pub json: bool,
    /// Stay, and take the session down once standard input ends, or nothing has come on it for SECONDS, or at a signal
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true, value_parser = silence,
        conflicts_with_all = ["dry_run", "replace"])]
    pub while_stdin: Option<Option<Duration>>,
}

fn silence(text: &str) -> Result<Duration, Usage> {
    let seconds = number::<u32>("--while-stdin", text, 1..=86400, "--while-stdin=30")?;
    Ok(Duration::from_secs(seconds.into()))
}

impl UpArgs {
    /// What is asked for, checked as far as that can be without a look at the machine.
    pub(crate) fn request(&self) -> Result<Request, Usage> {
        let interfaces = self.elsewhere.named(&self.interfaces)?;
        Request::new(self.name.clone(), interfaces, self.direction, self.options.clone())
    }
}

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// Print only what is not as it must be, a line for each; exit code 1 where there is any. Two looks at the counters
    /// must add up
    #[arg(long)]
    pub check: bool,
    /// Show rates as they are, until q is pressed; elsewhere than on a terminal a line for each session and look
    #[arg(long, conflicts_with_all = ["check", "all"])]
    pub watch: bool,
    /// Look twice, so far apart: 2, 2s, 500ms; show rates, and what was lost meanwhile. With --watch, so often
    #[arg(long, value_name = "TIME", value_parser = between_looks, allow_negative_numbers = true)]
    pub interval: Option<Duration>,
    /// Only this session
    #[arg(long, value_name = "NAME", value_parser = request::name_option)]
    pub name: Option<String>,
    /// Show every tap and remote, also where there are many
    #[arg(long)]
    pub all: bool,
    /// Colour the text [default: auto, on a terminal unless NO_COLOR is set]
    #[arg(long, value_enum, value_name = "WHEN", default_value_t = Color::Auto, hide_default_value = true)]
    pub color: Color,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// The session's remote where `collect --control` runs
    #[arg(long, value_name = "ADDR")]
    pub remote: IpAddr,
    /// Where that answers [default: the remote, port 9811]
    #[arg(long, value_name = "ADDR[:PORT]")]
    pub control: Option<Place>,
    /// Count what is sent from now on, for so long [default: since both ends began]
    #[arg(long, value_name = "TIME", value_parser = between_looks, allow_negative_numbers = true)]
    pub interval: Option<Duration>,
    /// The session [default: the only one, or the one called `default`]
    #[arg(long, value_name = "NAME", value_parser = request::name_option)]
    pub name: Option<String>,
    #[command(flatten)]
    pub json: Json,
}

/// When text is coloured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Color {
    /// On a terminal, unless NO_COLOR is set
    #[default]
    Auto,
    Always,
    Never,
}

impl Color {
    /// Whether standard output gets colours.
    pub(crate) fn is_on(self) -> bool {
        let has = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        match self {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => {
                std::io::stdout().is_terminal()
                    && has("NO_COLOR").is_none()
                    && has("TERM").is_some_and(|term| term != "dumb")
            }
        }
    }
}

/// Seconds, with a fraction or a unit: `2`, `0.5`, `2s`, `500ms`; up to an hour.
fn between_looks(text: &str) -> Result<Duration, Usage> {
    let (number, unit) = match text.strip_suffix("ms") {
        Some(number) => (number, 0.001),
        None => (text.strip_suffix('s').unwrap_or(text), 1.0),
    };
    let seconds = number.parse::<f64>().ok().map(|number| number * unit);
    match seconds.filter(|seconds| (0.05..=3600.0).contains(seconds)) {
        Some(seconds) => Ok(Duration::from_secs_f64(seconds)),
        None => refuse!("--interval {text:?} is not a time from 50ms to 3600s; try: --interval 2s"),
    }
}

#[derive(Debug, Args)]
pub(crate) struct MetricsArgs {
    /// Only this session
    #[arg(long, value_name = "NAME", conflicts_with = "all", value_parser = request::name_option)]
    pub name: Option<String>,
    /// Every session of this network namespace, which is the default
    #[arg(long)]
    pub all: bool,
    /// Write them into this file, whole or not at all, for node_exporter's textfile collector
    #[arg(long, value_name = "PATH", conflicts_with = "listen")]
    pub textfile: Option<PathBuf>,
    /// Serve them over HTTP until a signal comes; a port alone is one of 127.0.0.1. A socket that systemd passes is taken
    /// instead
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: Option<Listen>,
}

#[derive(Debug, Args)]
pub(crate) struct WatchArgs {
    /// Only this session; repeat it for several [default: all of this network namespace]
    #[arg(long = "name", value_name = "NAME", value_parser = request::name_option)]
    pub names: Vec<String>,
    /// Look at everything so often, for what tells nobody that it changes
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = interval, allow_negative_numbers = true)]
    pub interval: Duration,
    /// Make the sessions that the *.toml files of this directory have, as `apply --prune` does; again at SIGHUP, when
    /// a ConfigMap has changed, and where one is down
    #[arg(long, value_name = "DIR", conflicts_with = "names")]
    pub apply: Option<PathBuf>,
    /// Serve metrics over HTTP, as `metrics --listen` does
    #[arg(long, value_name = "ADDR:PORT")]
    pub metrics: Option<Listen>,
    /// Take the sessions down at the end; without it they run on
    #[arg(long)]
    pub down_on_exit: bool,
    /// Write this file every second, for --check and --hold
    #[arg(long, value_name = "FILE")]
    pub heartbeat: Option<PathBuf>,
    /// Watch nothing; say whether the watch with this heartbeat is at work, by the exit code
    #[arg(long, value_name = "FILE", exclusive = true)]
    pub check: Option<PathBuf>,
    /// Watch nothing; let the watch with this heartbeat rest, and return once it does
    #[arg(long, value_name = "FILE", exclusive = true)]
    pub hold: Option<PathBuf>,
    /// Log as JSON, one object a line
    #[arg(long)]
    pub json: bool,
}

/// Seconds, also as `1s`.
fn interval(text: &str) -> Result<Duration, Usage> {
    let seconds = number::<u32>("--interval", text.strip_suffix('s').unwrap_or(text), 1..=86400, "--interval 30")?;
    Ok(Duration::from_secs(seconds.into()))
}

#[derive(Debug, Subcommand)]
pub(crate) enum FilterCommand {
    /// Print the expression in force
    #[command(after_help = "Examples:\n  sudo snifctl filter show\n  sudo snifctl filter show --code")]
    Show {
        /// Print the C that it is compiled to
        #[arg(long)]
        code: bool,
        #[command(flatten)]
        session: SessionName,
    },
    /// Put another filter in force: no packet passes between the old and the new one
    #[command(after_help = indoc! {"
        Examples:
          sudo snifctl filter set 'tcp port 443 and not net 10.0.0.0/8'
          sudo snifctl filter set udp and port 53
    "})]
    Set {
        /// A pcap-filter(7) expression, in one word or several
        #[arg(value_name = "EXPR", required = true)]
        expression: Vec<String>,
        #[command(flatten)]
        session: SessionName,
        #[command(flatten)]
        dry_run: DryRun,
    },
    /// Copy every packet again
    #[command(after_help = "Examples:\n  sudo snifctl filter clear\n  sudo snifctl filter clear --name both")]
    Clear {
        #[command(flatten)]
        session: SessionName,
        #[command(flatten)]
        dry_run: DryRun,
    },
    /// Say which packets of a capture an expression takes, by running its program in the kernel
    #[command(after_help = indoc! {"
        Examples:
          sudo snifctl filter test 'tcp port 443' -r capture.pcap
          sudo snifctl filter test -r capture.pcap
          sudo tcpdump -c 100 -w - | sudo snifctl filter test udp -r -
    "})]
    Test {
        /// A pcap-filter(7) expression, in one word or several [default: the one in force]
        #[arg(value_name = "EXPR")]
        expression: Vec<String>,
        /// A capture of Ethernet that tcpdump can read; - for standard input
        #[arg(short, long, value_name = "FILE")]
        read: PathBuf,
        #[command(flatten)]
        session: SessionName,
        #[command(flatten)]
        json: Json,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum TapCommand {
    /// List the session's taps with their counters
    #[command(after_help = "Examples:\n  sudo snifctl tap list\n  sudo snifctl tap list --json")]
    List {
        #[command(flatten)]
        session: SessionName,
        #[command(flatten)]
        json: Json,
    },
    /// Watch one more interface, or one more direction of it
    #[command(after_help = indoc! {"
        Examples:
          sudo snifctl tap add eth1
          sudo snifctl tap add eth1 --direction ingress
          sudo snifctl tap add 'cali*' --wait-for-interface
    "})]
    Add {
        #[command(flatten)]
        tap: TapArgs,
        #[command(flatten)]
        absent: MayBeAbsent,
    },
    /// Watch an interface, or one direction of it, no more
    #[command(after_help = indoc! {"
        Examples:
          sudo snifctl tap remove eth1
          sudo snifctl tap remove eth0 --direction egress
    "})]
    Remove(TapArgs),
}

#[derive(Debug, Args)]
pub(crate) struct TapArgs {
    /// The interface, or one direction of it: eth0:ingress, eth0:egress; or a pattern of names: 'eth*'
    #[arg(required_unless_present_any = PLACES, value_name = "IFACE[:DIRECTION]")]
    pub interface: Option<Named>,
    #[command(flatten)]
    pub elsewhere: ElsewhereArgs,
    /// Which of its packets [default: both]
    #[arg(long, value_enum)]
    pub direction: Option<Watch>,
    #[command(flatten)]
    pub session: SessionName,
    #[command(flatten)]
    pub clsact: KeepClsact,
    #[command(flatten)]
    pub dry_run: DryRun,
}

impl TapArgs {
    /// The interface, or what stands for several, and which of its packets.
    pub(crate) fn watched(&self) -> Result<Watched, Usage> {
        let named = self.elsewhere.named(self.interface.as_slice())?;
        let [Named { interface, direction }] = &named[..] else {
            refuse!(
                "of --netns, --pid, --container, --pod and --pods one is possible here; try: snifctl tap add --netns blue"
            )
        };
        match (direction, self.direction) {
            (Some(named), Some(other)) if *named != other => refuse!(
                "--direction {} is not that of {interface}:{}; leave one of them out",
                spelled(other),
                spelled(*named)
            ),
            (named, other) => {
                let direction = named.or(other).unwrap_or(Watch::Both);
                Ok(Watched { interface: interface.clone(), direction })
            }
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum RemoteCommand {
    /// List the session's remotes with their counters
    #[command(after_help = "Examples:\n  sudo snifctl remote list\n  sudo snifctl remote list --json")]
    List {
        #[command(flatten)]
        session: SessionName,
        #[command(flatten)]
        json: Json,
    },
    /// Send copies to one more collector; nothing is reloaded
    #[command(after_help = indoc! {"
        Examples:
          sudo snifctl remote add 10.0.0.8
          sudo snifctl remote add 2001:db8::8 --name both
    "})]
    Add(RemoteArgs),
    /// Send no more copies to a collector; the others notice nothing
    #[command(after_help = "Examples:\n  sudo snifctl remote remove 10.0.0.8")]
    Remove(RemoteArgs),
}

#[derive(Debug, Args)]
pub(crate) struct RemoteArgs {
    /// Address of the collector
    #[arg(value_name = "ADDR", value_parser = request::remote_argument)]
    pub address: IpAddr,
    #[command(flatten)]
    pub session: SessionName,
    #[command(flatten)]
    pub dry_run: DryRun,
}

#[derive(Debug, Subcommand)]
pub(crate) enum MapCommand {
    /// List the session's maps
    #[command(after_help = "Examples:\n  sudo snifctl map list\n  sudo snifctl map list --json")]
    List {
        #[command(flatten)]
        session: SessionName,
        #[command(flatten)]
        json: Json,
    },
    /// Print a map's elements as JSON by their field names, per-CPU counters summed; all maps without MAP
    #[command(after_help = indoc! {"
        Examples:
          sudo snifctl map dump
          sudo snifctl map dump taps | jq '.[].value.stat'
    "})]
    Dump {
        /// Name of a map, as `map list` shows it
        map: Option<String>,
        #[command(flatten)]
        session: SessionName,
    },
}

/// Reads the arguments. Help and version go to stdout; what is wrong is told in one line, exit code 2.
pub(crate) fn parse() -> Result<Cli, ExitCode> {
    let words = || std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    told(Cli::try_parse(), || help_command(words()))
}

/// Help and version are printed; what is wrong is told with the command that `help` names.
pub(crate) fn told<T>(parsed: Result<T, clap::Error>, help: impl FnOnce() -> String) -> Result<T, ExitCode> {
    parsed.map_err(|err| match err.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => match err.print() {
            Ok(()) => ExitCode::SUCCESS,
            Err(err) if err.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
            Err(err) => {
                eprintln!("snifctl: cannot write to standard output: {err}");
                ExitCode::FAILURE
            }
        },
        _ => {
            eprintln!("snifctl: {}", one_line(&err, help));
            ExitCode::from(2)
        }
    })
}

/// clap's message without its usage block, ending in a command that works.
fn one_line(err: &clap::Error, help: impl FnOnce() -> String) -> String {
    let own = std::error::Error::source(err).and_then(|source| source.downcast_ref::<Usage>());
    if let Some(Usage(said)) = own {
        return said.clone();
    }
    let message = err.render().to_string();
    let said = message.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:"));
    // A tip to put `--` before a value does not help where an option takes the value.
    let is_said = |line: &&str| {
        !line.is_empty() && !line.starts_with("For more information") && !line.starts_with("tip: to pass")
    };
    let said: Vec<&str> = said.filter(is_said).collect();
    let said = said.join(" ");
    let help = help();
    if said.is_empty() || !said.starts_with("error:") {
        return format!("a command is missing; try: {help}");
    }
    format!("{}; try: {help}", said.trim_start_matches("error: "))
}

/// The command whose help tells of these words: `snifctl tap add --help`.
fn help_command(words: impl Iterator<Item = String>) -> String {
    let mut command = Cli::command();
    let mut path = vec!["snifctl".to_string()];
    for word in words.filter(|word| !word.starts_with('-')) {
        let Some(next) = command.get_subcommands().find(|next| next.get_name() == word && !next.is_hide_set()) else {
            break;
        };
        path.push(word);
        command = next.clone();
    }
    path.push("--help".into());
    path.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clap_finds_no_fault_with_the_types() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_is_that_of_the_command_that_was_meant() {
        let help = |line: &str| help_command(line.split(' ').map(String::from));
        assert_eq!(help("tap add"), "snifctl tap add --help");
        assert_eq!(help("-v remote list --foo"), "snifctl remote list --help");
        assert_eq!(help("up eth0"), "snifctl up --help");
        assert_eq!(help("frobnicate"), "snifctl --help");
    }

    #[test]
    fn every_help_fits_into_100_columns_and_its_examples_into_80() {
        fn look(command: &clap::Command, path: &str) {
            let help = command.clone().term_width(98).render_long_help().to_string();
            for line in help.lines() {
                assert!(line.chars().count() <= 100, "{path}: {line}");
            }
            let examples = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(command.is_hide_set() || examples.starts_with("Examples:"), "{path} has no examples");
            assert!(examples.lines().all(|line| line.chars().count() <= 80), "{path}: {examples}");
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{path} {} has no help", argument.get_id());
            }
            command.get_subcommands().filter(|next| !next.is_hide_set()).for_each(|next| {
                look(next, &format!("{path} {}", next.get_name()));
            });
        }
        look(&Cli::command(), "snifctl");
    }
}
