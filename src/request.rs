//! What is wanted of a session: one type for the command line, for what a session remembers of itself, and for the line
//! that makes it again. Pure: no look at the machine.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::datapath::abi::{Direction, MAX_REMOTES, MAX_TAPS};
use crate::origin::Origin;
use crate::session::away;
use crate::tools::batch;
use crate::tools::exec::quote;
use crate::tunnel::Tunnel;
use crate::usage::{Usage, ensure_usage, number, refuse, spelled};
use crate::wildcard::is_pattern;

/// `enum oversize`: what becomes of a copy larger than the out interface's MTU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Oversize {
    /// Cut TCP super-packets so that each copy fits; fragment other frames
    #[default]
    Segment = 0,
    /// Keep every wire frame exact; fragment the outer packet
    Fragment = 1,
    /// Cut the copy's tail
    Truncate = 2,
    /// Count it and drop it
    Drop = 3,
}

/// `enum spread`: which of several remotes get a copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Spread {
    /// Every remote gets every copy
    #[default]
    Replicate = 0,
    /// Each flow, both directions, goes to one remote
    Flow = 1,
}

/// How remotes are asked whether they are there. Of their next hops the neighbour table tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Probe {
    /// Not at all
    #[default]
    None,
    /// By ping
    Icmp,
}

impl Probe {
    fn is_none(&self) -> bool {
        *self == Probe::None
    }
}

/// Which packets of an interface are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Watch {
    Both,
    Ingress,
    Egress,
}

impl Watch {
    /// The name for these directions; none for none.
    pub fn of(directions: &[Direction]) -> Option<Watch> {
        let has = |direction| directions.contains(&direction);
        match (has(Direction::Ingress), has(Direction::Egress)) {
            (true, true) => Some(Watch::Both),
            (true, false) => Some(Watch::Ingress),
            (false, true) => Some(Watch::Egress),
            (false, false) => None,
        }
    }

    pub fn directions(self) -> &'static [Direction] {
        match self {
            Watch::Both => &[Direction::Ingress, Direction::Egress],
            Watch::Ingress => &[Direction::Ingress],
            Watch::Egress => &[Direction::Egress],
        }
    }

    pub fn has(self, direction: Direction) -> bool {
        self.directions().contains(&direction)
    }

    pub fn with(self, other: Watch) -> Watch {
        if self == other { self } else { Watch::Both }
    }

    pub fn without(self, other: Watch) -> Option<Watch> {
        let left: Vec<Direction> = self.directions().iter().filter(|at| !other.has(**at)).copied().collect();
        Watch::of(&left)
    }
}

/// An interface and which of its packets are copied, as it is typed: `eth0`, `eth0:ingress`, `eth0:egress`.
#[derive(Clone, Debug)]
pub(crate) struct Named {
    pub interface: String,
    /// As it was said, if it was.
    pub direction: Option<Watch>,
}

impl FromStr for Named {
    type Err = Usage;

    fn from_str(text: &str) -> Result<Named, Usage> {
        // Elsewhere, the name there is behind the last `/`.
        let name = text.rfind('/').map_or(0, |at| at + 1);
        let at = text[name..].find(':').map(|at| (&text[..name + at], &text[name + at + 1..]));
        let (interface, direction) = match at {
            Some((interface, "both")) => (interface, Some(Watch::Both)),
            Some((interface, "ingress")) => (interface, Some(Watch::Ingress)),
            Some((interface, "egress")) => (interface, Some(Watch::Egress)),
            Some((interface, other)) => {
                let [ingress, egress] = ["ingress", "egress"].map(|at| quote(&format!("{interface}:{at}")));
                refuse!("IFACE {text:?}: {other:?} is no direction; try: {ingress} or {egress}")
            }
            None => (text, None),
        };
        ensure_interface(interface)?;
        Ok(Named { interface: interface.into(), direction })
    }
}

/// An interface and which of its packets are copied.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Watched {
    pub interface: String,
    pub direction: Watch,
}

impl fmt::Display for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.direction {
            Watch::Both => f.write_str(&self.interface),
            direction => write!(f, "{}:{}", self.interface, spelled(direction)),
        }
    }
}

impl From<Watched> for String {
    fn from(watched: Watched) -> String {
        watched.to_string()
    }
}

impl TryFrom<String> for Watched {
    type Error = Usage;

    fn try_from(text: String) -> Result<Watched, Usage> {
        let named: Named = text.parse()?;
        Ok(Watched { interface: named.interface, direction: named.direction.unwrap_or(Watch::Both) })
    }
}

/// `1/N`: one of N is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Sample(pub u32);

impl Default for Sample {
    fn default() -> Sample {
        Sample(1)
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "1/{}", self.0)
    }
}

impl FromStr for Sample {
    type Err = Usage;

    fn from_str(text: &str) -> Result<Sample, Usage> {
        let digits = text.strip_prefix("1/").filter(|n| n.bytes().all(|byte| byte.is_ascii_digit()));
        match digits.and_then(|n| n.parse().ok()).filter(|n| *n > 0) {
            Some(n) => Ok(Sample(n)),
            None => refuse!("{text:?} is not 1/N with N from 1 to {}; try: 1/100", u32::MAX),
        }
    }
}

/// What may leave towards the remotes in a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Rate {
    /// Of outer packets with their Ethernet headers.
    Bytes(u64),
    Packets(u64),
}

impl fmt::Display for Rate {
    /// In tc's units, the largest that says it without a fraction.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (amount, unit) = match self {
            Rate::Bytes(bytes) => (bytes * 8, "bit"),
            Rate::Packets(packets) => (*packets, "pps"),
        };
        let scales = [(1_000_000_000, "g"), (1_000_000, "m"), (1000, "k")];
        let scale = scales.into_iter().find(|(scale, _)| amount % scale == 0).unwrap_or((1, ""));
        write!(f, "{}{}{unit}", amount / scale.0, scale.1)
    }
}

/// 1 Tbit/s in bytes: what the kernel program can count in billionths for as long as its bucket fills.
const LARGEST_RATE: u64 = 125_000_000_000;

impl FromStr for Rate {
    type Err = Usage;

    /// tc's units: bits a second, or bytes with `bps`, by powers of 1000, or 1024 with an `i`; or packets with `pps`.
    fn from_str(text: &str) -> Result<Rate, Usage> {
        let Some(rate) = parse_rate(&text.to_ascii_lowercase()) else {
            refuse!(
                "{text:?} is not a rate in tc's units (bit, kbit, mbit, gbit, bps, kbps, ... or pps, kpps, mpps); try: 200mbit"
            )
        };
        let (amount, least) = match rate {
            Rate::Bytes(amount) => (amount, 1000),
            Rate::Packets(amount) => (amount, 1),
        };
        ensure_usage!(
            (least..=LARGEST_RATE).contains(&amount),
            "{text} is out of range; it takes 8kbit to 1000gbit, or 1pps and more; try: 200mbit"
        );
        Ok(rate)
    }
}

fn parse_rate(text: &str) -> Option<Rate> {
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let number: f64 = number.parse().ok()?;
    let (prefix, packets, bits) = match unit {
        "" | "bit" => ("", false, 8.0),
        _ => match (unit.strip_suffix("bit"), unit.strip_suffix("pps"), unit.strip_suffix("bps")) {
            (Some(prefix), ..) => (prefix, false, 8.0),
            (_, Some(prefix), _) => (prefix, true, 1.0),
            (.., Some(prefix)) => (prefix, false, 1.0),
            _ => return None,
        },
    };
    let (letter, base) = match prefix.strip_suffix('i') {
        Some(letter) => (letter, 1024f64),
        None => (prefix, 1000f64),
    };
    let power = ["", "k", "m", "g", "t"].iter().position(|known| *known == letter)?;
    if prefix == "i" {
        return None;
    }
    let amount = (number * base.powi(power as i32) / bits).round() as u64;
    Some(if packets { Rate::Packets(amount) } else { Rate::Bytes(amount) })
}

/// Where an out interface that is a tunnel sends its own packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Underlay {
    /// Nowhere that is watched.
    Nowhere,
    /// To this address; UDP destination port, 0 for any packet.
    At(IpAddr, u16),
}

impl fmt::Display for Underlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Underlay::Nowhere => f.write_str("none"),
            Underlay::At(address, 0) => write!(f, "{address}"),
            Underlay::At(address, port) => write!(f, "{}", SocketAddr::new(*address, *port)),
        }
    }
}

impl FromStr for Underlay {
    type Err = Usage;

    /// `ADDR`, `ADDR:PORT`, `[ADDR]:PORT`, or the word `none`.
    fn from_str(text: &str) -> Result<Underlay, Usage> {
        if text == "none" {
            return Ok(Underlay::Nowhere);
        }
        if let Ok(address) = text.parse() {
            return Ok(Underlay::At(address, 0));
        }
        match text.parse::<SocketAddr>() {
            Ok(at) => Ok(Underlay::At(at.ip(), at.port())),
            Err(_) => refuse!("{text:?} is not ADDR, ADDR:PORT, [ADDR]:PORT or none; try: 203.0.113.5:51820"),
        }
    }
}

/// Text on its way into a session's memory and back.
macro_rules! as_text {
    ($($kind:ty),*) => {$(
        impl From<$kind> for String {
            fn from(value: $kind) -> String {
                value.to_string()
            }
        }

        impl TryFrom<String> for $kind {
            type Error = Usage;

            fn try_from(text: String) -> Result<$kind, Usage> {
                text.parse()
            }
        }
    )*};
}

as_text!(Sample, Rate, Underlay);

/// Reads the value of `flag`: what is wrong with it is told with the flag's name.
fn of_flag<T: FromStr<Err = Usage>>(flag: &str, text: &str) -> Result<T, Usage> {
    text.parse().map_err(|Usage(said)| Usage(format!("{flag} {}", said.replace("; try: ", &format!("; try: {flag} ")))))
}

/// Fields of the outer IP header that the user chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Args)]
pub(crate) struct OuterOptions {
    /// Outer time to live, 1 to 255
    #[arg(long, default_value_t = 64, allow_negative_numbers = true, value_parser = |text: &str| number::<u8>("--ttl", text, 1..=255, "--ttl 64"))]
    #[serde(default = "default_ttl")]
    pub ttl: u8,
    /// Outer type of service, 0 to 255; decimal or 0x hex
    #[arg(long, default_value_t = 0, allow_negative_numbers = true, value_parser = |text: &str| number::<u8>("--tos", text, 0..=255, "--tos 0x10"))]
    #[serde(default)]
    pub tos: u8,
    /// Set don't-fragment in the outer header; then what does not fit is dropped, cut by --oversize truncate
    #[arg(long)]
    #[serde(default)]
    pub df: bool,
}

fn default_ttl() -> u8 {
    64
}

/// What is wanted of a session besides its name and interfaces.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    #[serde(flatten)]
    pub tunnel: Tunnel,
    /// Collector: the address that the copies are sent to; several with commas or by repeating
    #[arg(long = "remote", value_name = "ADDR", required = true, value_delimiter = ',', value_parser = remote_option)]
    pub remotes: Vec<IpAddr>,
    /// Which of several remotes get a copy
    #[arg(long, value_enum, default_value_t = Spread::Replicate)]
    #[serde(default)]
    pub spread: Spread,
    /// Ask remotes, too, whether they are there: one that does not answer is down, and gets no copies
    #[arg(long, value_enum, default_value_t = Probe::None)]
    #[serde(default, skip_serializing_if = "Probe::is_none")]
    pub probe: Probe,
    /// Copy only what this pcap-filter(7) expression takes
    #[arg(long, value_name = "EXPR", allow_hyphen_values = true)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// Copy one of N packets, at random
    #[arg(long, value_name = "1/N", default_value_t, hide_default_value = true,
        value_parser = |text: &str| of_flag::<Sample>("--sample", text))]
    #[serde(default)]
    pub sample: Sample,
    /// Copy one of N flows, both directions of it, or nothing of it
    #[arg(long, value_name = "1/N", default_value_t, hide_default_value = true,
        value_parser = |text: &str| of_flag::<Sample>("--sample-flows", text))]
    #[serde(default)]
    pub sample_flows: Sample,
    /// Copy only the first BYTES of each frame, 60 to 15000
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true, value_parser = snaplen)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snaplen: Option<u32>,
    /// Let no more leave towards the remotes, in tc's units: 200mbit, 50kpps
    #[arg(long, value_name = "RATE", allow_hyphen_values = true,
        value_parser = |text: &str| of_flag::<Rate>("--max-rate", text))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_rate: Option<Rate>,
    /// What becomes of a copy that with its header exceeds the out interface's MTU
    #[arg(long, value_enum, default_value_t = Oversize::Segment)]
    #[serde(default)]
    pub oversize: Oversize,
    /// Outer source address, at most one of each family [default: what the route prefers]
    #[arg(long = "source", value_name = "ADDR", value_delimiter = ',', value_parser = source_option)]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<IpAddr>,
    /// Where an out interface that is a tunnel sends its own packets, which are then not copied; `none` if nowhere watched
    #[arg(long, alias = "carrier", value_name = "ADDR[:PORT]", value_delimiter = ',',
        value_parser = |text: &str| of_flag::<Underlay>("--underlay", text))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub underlay: Vec<Underlay>,
    #[command(flatten)]
    #[serde(flatten)]
    pub outer: OuterOptions,
    /// Count the taps' own time, for `status` and `metrics`
    #[arg(long)]
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub profile: bool,
    #[command(flatten)]
    #[serde(flatten)]
    pub cluster: ClusterOptions,
    /// Watch at most so many interfaces by patterns and labels; those that are over are told
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = max_taps)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_taps: Option<u32>,
}

/// Where pods are asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, Args)]
#[command(next_help_heading = "Other network namespaces")]
pub(crate) struct ClusterOptions {
    /// The file that tells kubectl of its cluster [default: kubectl's own]
    #[arg(long, value_name = "FILE", value_parser = |text: &str| said("--kubeconfig", text, "/etc/kubernetes/admin.conf"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kubeconfig: Option<String>,
    /// Which context of that file
    #[arg(long, value_name = "CONTEXT", value_parser = |text: &str| said("--context", text, "kind-kind"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<String>,
    /// The name of this node in its cluster [default: NODE_NAME of the environment, else the host's name]
    #[arg(long, value_name = "NAME", value_parser = |text: &str| said("--node", text, "worker-1"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

/// A word that is passed on.
fn said(flag: &str, text: &str, example: &str) -> Result<String, Usage> {
    ensure_usage!(
        !text.is_empty() && !text.contains(char::is_control),
        "{flag} {text:?} is not a name; try: {flag} {example}"
    );
    Ok(text.into())
}

fn max_taps(text: &str) -> Result<u32, Usage> {
    number("--max-taps", text, 1..=u64::from(MAX_TAPS / 2), "--max-taps 100")
}

/// What is wanted of a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Request {
    pub name: String,
    pub interfaces: Vec<Watched>,
    #[serde(flatten)]
    pub options: Options,
}

/// The session that is meant where none is named.
pub(crate) const DEFAULT: &str = "default";

impl Request {
    /// Checks everything that can be known without a look at the machine. `direction` is that of interfaces which say none.
    pub(crate) fn new(name: String, named: Vec<Named>, direction: Watch, options: Options) -> Result<Request, Usage> {
        let interfaces = named
            .into_iter()
            .map(|named| Watched { interface: named.interface, direction: named.direction.unwrap_or(direction) });
        let request = Request { name, interfaces: interfaces.collect(), options };
        request.check()?;
        Ok(request)
    }

    /// Every rule that holds between values, each with a line that names the flag.
    pub(crate) fn check(&self) -> Result<(), Usage> {
        let options = &self.options;
        ensure_name(&self.name)?;
        ensure_interfaces(&self.interfaces)?;
        ensure_filter("--filter", options.filter.as_deref())?;
        options.tunnel.check()?;
        ensure_usage!(
            !options.outer.df || options.oversize != Oversize::Fragment,
            "--df forbids the outer fragments that --oversize fragment makes; try: --df --oversize truncate"
        );
        ensure_remotes(&options.remotes)?;
        ensure_sources(&options.sources, &options.remotes)
    }

    /// What such a session needs of its programs, by the `HAS_` names of `bpf/common.h`: the rest is left out of them.
    pub(crate) fn features(&self) -> Vec<String> {
        let (options, patched) = (&self.options, self.options.tunnel.patched());
        let parts = [
            ("UDP", patched.udp != 0),
            ("SEQUENCE", patched.sequence != 0),
            ("ERSPAN", patched.vlan != 0 || patched.port != 0 || patched.time != 0),
            ("TELL", options.tunnel.tell),
            ("CUT", options.snaplen.is_some() || options.oversize == Oversize::Truncate),
            ("RATE", options.max_rate.is_some()),
            ("SAMPLE", options.sample.0 > 1 || options.sample_flows.0 > 1),
            ("SPREAD", options.spread == Spread::Flow),
            ("PROFILE", options.profile),
        ];
        parts.into_iter().filter(|(_, used)| *used).map(|(name, _)| name.to_string()).collect()
    }

    /// The same request, in one order of its interfaces and remotes: their order says nothing.
    pub(crate) fn sorted(&self) -> Request {
        let mut sorted = self.clone();
        sorted.interfaces.sort();
        sorted.options.remotes.sort();
        sorted.options.sources.sort();
        sorted.options.underlay.sort_by_key(Underlay::to_string);
        sorted
    }

    /// The words of the command line that makes it, those of values that nobody has to say left out.
    pub(crate) fn args(&self) -> Vec<String> {
        let mut words = vec!["up".to_string()];
        words.extend(self.interfaces.iter().map(Watched::to_string));
        for (flag, values) in self.flags() {
            match values {
                Values::Switch(on) => words.extend(on.then(|| flag.to_string())),
                Values::Some(values, Said::Needed) => {
                    words.extend(values.into_iter().flat_map(|value| [flag.to_string(), value]));
                }
                Values::Some(..) => {}
            }
        }
        words
    }

    /// The command that makes it, for a shell.
    pub(crate) fn command(&self) -> String {
        let words: Vec<String> = self.args().iter().map(|word| quote(word)).collect();
        format!("snifctl {}", words.join(" "))
    }

    /// The same where some of its interfaces are not there yet.
    pub(crate) fn command_waiting(&self, waits: bool) -> String {
        let flag = if waits { " --wait-for-interface" } else { "" };
        format!("{}{flag}", self.command())
    }

    /// Every option by its flag.
    pub(crate) fn flags(&self) -> Vec<(&'static str, Values)> {
        fn one(value: impl ToString, default: bool) -> Values {
            Values::Some(vec![value.to_string()], if default { Said::ByDefault } else { Said::Needed })
        }
        fn any<T: ToString>(values: impl IntoIterator<Item = T>) -> Values {
            Values::Some(values.into_iter().map(|value| value.to_string()).collect(), Said::Needed)
        }
        let Options { tunnel, outer, .. } = &self.options;
        let options = &self.options;
        vec![
            ("--tunnel", one(spelled(tunnel.kind), false)),
            ("--remote", any(&options.remotes)),
            ("--name", one(&self.name, self.name == DEFAULT)),
            ("--spread", one(spelled(options.spread), options.spread == Spread::default())),
            ("--probe", one(spelled(options.probe), options.probe.is_none())),
            ("--id", any(tunnel.id)),
            ("--egress-id", any(tunnel.egress_id)),
            ("--port", any(tunnel.port)),
            ("--sequence", Values::Switch(tunnel.sequence)),
            ("--udp-checksum", Values::Switch(tunnel.udp_checksum)),
            ("--tell", Values::Switch(tunnel.tell)),
            ("--filter", any(&options.filter)),
            ("--sample", one(options.sample, options.sample == Sample::default())),
            ("--sample-flows", one(options.sample_flows, options.sample_flows == Sample::default())),
            ("--snaplen", any(options.snaplen)),
            ("--max-rate", any(options.max_rate)),
            ("--oversize", one(spelled(options.oversize), options.oversize == Oversize::default())),
            ("--source", any(&options.sources)),
            ("--underlay", any(&options.underlay)),
            ("--ttl", one(outer.ttl, outer.ttl == default_ttl())),
            ("--tos", one(outer.tos, outer.tos == 0)),
            ("--df", Values::Switch(outer.df)),
            ("--profile", Values::Switch(options.profile)),
            ("--kubeconfig", any(&options.cluster.kubeconfig)),
            ("--context", any(&options.cluster.context)),
            ("--node", any(&options.cluster.node)),
            ("--max-taps", any(options.max_taps)),
        ]
    }

    /// Every option with its value, those that nobody has said included.
    pub(crate) fn told(&self) -> Vec<(String, String)> {
        let flags =
            self.flags().into_iter().map(|(flag, values)| (flag.trim_start_matches('-').into(), values.shown()));
        flags.collect()
    }

    /// In what `wanted` differs, by flags: `--filter 'x' → 'y'`.
    pub(crate) fn differences(&self, wanted: &Request) -> Vec<String> {
        let (own, other) = (self.sorted(), wanted.sorted());
        let mut found = Vec::new();
        if own.interfaces != other.interfaces {
            let listed = |request: &Request| listed(request.interfaces.iter().map(|at| quote(&at.to_string())));
            found.push(format!("IFACE {} → {}", listed(&own), listed(&other)));
        }
        for ((flag, before), (_, after)) in own.flags().into_iter().zip(other.flags()) {
            if before != after {
                found.push(format!("{flag} {} → {}", before.shown(), after.shown()));
            }
        }
        found
    }
}

/// The values of one flag.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Values {
    Switch(bool),
    Some(Vec<String>, Said),
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Said {
    ByDefault,
    Needed,
}

impl Values {
    pub(crate) fn shown(&self) -> String {
        match self {
            Values::Switch(on) => (if *on { "on" } else { "off" }).into(),
            Values::Some(values, _) if values.is_empty() => "none".into(),
            Values::Some(values, _) => listed(values.iter().map(|value| shown(value))),
        }
    }
}

/// How many things a message names before it only counts.
const FEW: usize = 8;

/// Things in one line, which stays a line however many they are.
pub(crate) fn listed(things: impl IntoIterator<Item = String>) -> String {
    let all: Vec<String> = things.into_iter().collect();
    match all.len() {
        n if n > FEW => format!("{} and {} more", all[..FEW - 1].join(", "), n - FEW + 1),
        _ => all.join(", "),
    }
}

/// A value in one line, its middle left out where it is long; quoted where a shell would need that.
fn shown(text: &str) -> String {
    let all: Vec<char> = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let text = |part: &[char]| quote(&String::from_iter(part));
    match all.len() {
        0..=80 => text(&all),
        n => format!("{} ... {}", text(&all[..40]), text(&all[n - 30..])),
    }
}

/// A session name is a directory name, a filter's key and part of a link alias.
pub(crate) fn ensure_name(name: &str) -> Result<(), Usage> {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    ensure_usage!(
        (1..=15).contains(&name.len()) && name.chars().all(good) && !name.starts_with('-'),
        "--name {name:?} is not 1 to 15 characters of a-z, 0-9 and '-' with no '-' first; try: --name mirror-1"
    );
    Ok(())
}

/// `--name NAME`.
pub(crate) fn name_option(text: &str) -> Result<String, Usage> {
    ensure_name(text).map(|()| text.into())
}

fn is_odd(c: char) -> bool {
    c.is_control() || c.is_whitespace() || c == '/' || c == ':'
}

/// Any name that the kernel takes, if a person can read it and `tc -batch` can be told it.
pub(crate) fn ensure_interface_name(name: &str) -> Result<(), Usage> {
    ensure_usage!(
        (1..=15).contains(&name.len()) && !name.contains(is_odd) && name != "." && name != "..",
        "IFACE {name:?} is not an interface name (1 to 15 bytes without white space, control characters, '/' and ':'); \
         list them with: ip link"
    );
    ensure_usage!(
        batch::can_say(name),
        "IFACE {name:?} has a name that tc cannot be told: it takes '#' for a comment, and ends a name that begins with a \
         quote at the next one; rename it with: ip link set dev {} name NAME",
        quote(name)
    );
    Ok(())
}

/// The longest pattern: each interface that came by it remembers it.
const PATTERN_BYTES: usize = 63;

/// The longest text for interfaces in other network namespaces.
const AWAY_BYTES: usize = 500;

/// The name of an interface, or a pattern of names, here or in another network namespace.
fn ensure_interface(text: &str) -> Result<(), Usage> {
    if let Some((origin, name)) = away::parts(text).filter(|(origin, _)| origin.contains(':')) {
        let (origin, _) = away::origin_of(origin);
        ensure_usage!(
            text.len() <= AWAY_BYTES,
            "IFACE {text:?} has {} bytes, at most {AWAY_BYTES} are possible; try: 'pods:shop/app=web/*'",
            text.len()
        );
        origin.parse::<Origin>().map_err(|Usage(said)| Usage(format!("IFACE {text:?}: {said}")))?;
        return ensure_interface(name);
    }
    if !is_pattern(text) {
        return ensure_interface_name(text);
    }
    ensure_usage!(
        text.len() <= PATTERN_BYTES && !text.contains(is_odd) && batch::can_say(text),
        "IFACE {text:?} is not a pattern of interface names (1 to {PATTERN_BYTES} bytes without white space, control \
         characters, '#', '/' and ':'); try: 'eth*'"
    );
    Ok(())
}

/// `IFACE` alone.
pub(crate) fn interface_argument(text: &str) -> Result<String, Usage> {
    ensure_interface_name(text).map(|()| text.into())
}

fn ensure_interfaces(interfaces: &[Watched]) -> Result<(), Usage> {
    for (at, watched) in interfaces.iter().enumerate() {
        ensure_interface(&watched.interface)?;
        let twice = interfaces[..at].iter().any(|other| other.interface == watched.interface);
        ensure_usage!(!twice, "IFACE {} is named twice; name each interface once", watched.interface);
    }
    ensure_usage!(
        interfaces.len() * 2 <= MAX_TAPS as usize,
        "{} interfaces are too many, one session watches {}; start another session with: --name OTHER",
        interfaces.len(),
        MAX_TAPS / 2
    );
    Ok(())
}

/// What a session can remember of an expression; an argument of a program may be 128 KiB long.
const FILTER_BYTES: usize = 120_000;

/// A filter that can be remembered. What it says is tcpdump's to judge.
pub(crate) fn ensure_filter(what: &str, expression: Option<&str>) -> Result<(), Usage> {
    let Some(expression) = expression else { return Ok(()) };
    let way = if what.starts_with('-') { "leave it out, or " } else { "" };
    ensure_usage!(
        !expression.trim().is_empty(),
        "{what} is empty, which would take every packet; {way}copy every packet again with: snifctl filter clear"
    );
    ensure_usage!(
        expression.len() <= FILTER_BYTES,
        "{what} takes {} bytes, at most {FILTER_BYTES} are possible; name nets instead of hosts, as in: {}",
        expression.len(),
        example(what, "'net 10.0.0.0/8'")
    );
    Ok(())
}

/// Room for all headers of plain TCP over IPv6, and what the kernel's resize helpers take.
const SNAPLEN: std::ops::RangeInclusive<u64> = 60..=15_000;

fn snaplen(text: &str) -> Result<u32, Usage> {
    number("--snaplen", text, SNAPLEN, "--snaplen 128")
}

fn address(what: &str, text: &str) -> Result<IpAddr, Usage> {
    ensure_usage!(
        !text.contains('%'),
        "{what} {text:?} is a link-local address with a zone, which is not supported; name a global address, as in: {}",
        example(what, "2001:db8::7")
    );
    match text.parse() {
        Ok(address) => Ok(address),
        Err(_) => refuse!("{what} {text:?} is not an IP address; try: {}", example(what, "10.0.0.7")),
    }
}

/// A value as it is typed: behind its flag, or alone.
pub(crate) fn example(what: &str, value: &str) -> String {
    if what.starts_with('-') { format!("{what} {value}") } else { value.into() }
}

fn source_option(text: &str) -> Result<IpAddr, Usage> {
    address("--source", text)
}

fn remote_option(text: &str) -> Result<IpAddr, Usage> {
    remote("--remote", text)
}

/// `ADDR` of `remote add`.
pub(crate) fn remote_argument(text: &str) -> Result<IpAddr, Usage> {
    remote("ADDR", text)
}

/// A remote's address: one host elsewhere. `what` is the argument that it came from.
pub(crate) fn remote(what: &str, text: &str) -> Result<IpAddr, Usage> {
    let address = address(what, text)?;
    let kind = match address {
        a if a.is_multicast() => "a multicast address",
        a if a.is_unspecified() => "the unspecified address",
        a if a.is_loopback() => "this machine itself",
        IpAddr::V4(a) if a.is_broadcast() => "the broadcast address",
        IpAddr::V6(a) if a.is_unicast_link_local() => "a link-local address, which needs a zone and is not supported",
        IpAddr::V6(a) if a.to_ipv4_mapped().is_some() => "an IPv4 address in IPv6 form",
        _ => return Ok(address),
    };
    let value = if address.is_ipv6() { "2001:db8::7" } else { "10.0.0.7" };
    refuse!("{what} {address} is {kind}; name the collector's own address, as in: {}", example(what, value))
}

fn ensure_remotes(remotes: &[IpAddr]) -> Result<(), Usage> {
    for (at, remote) in remotes.iter().enumerate() {
        ensure_usage!(!remotes[..at].contains(remote), "--remote {remote} is named twice; name each remote once");
    }
    ensure_usage!(
        remotes.len() <= MAX_REMOTES,
        "--remote is given {} times, one session holds {MAX_REMOTES}; start another session with: --name OTHER",
        remotes.len()
    );
    Ok(())
}

fn ensure_sources(sources: &[IpAddr], remotes: &[IpAddr]) -> Result<(), Usage> {
    for source in sources {
        let used = remotes.iter().any(|remote| remote.is_ipv6() == source.is_ipv6());
        let family = if source.is_ipv6() { "IPv6" } else { "IPv4" };
        ensure_usage!(
            used,
            "--source {source} is an {family} address and no --remote is one; leave it out, or name an address of this machine \
             of the remotes' family: ip address"
        );
        let host = !source.is_loopback() && !source.is_multicast() && !source.is_unspecified();
        ensure_usage!(
            host,
            "--source {source} is no address that a packet can come from; list this machine's with: ip address"
        );
    }
    for v6 in [false, true] {
        let same: Vec<&IpAddr> = sources.iter().filter(|source| source.is_ipv6() == v6).collect();
        ensure_usage!(
            same.len() <= 1,
            "--source names {} and {} of one address family; name at most one of each, as in: --source {}",
            same[0],
            same[1],
            same[0]
        );
    }
    Ok(())
}

#[cfg(test)]
#[path = "request_test.rs"]
pub(crate) mod tests;
