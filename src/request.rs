//! From the command line to a checked request. Pure: no look at the machine.

use std::net::IpAddr;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::datapath::abi::{Direction, MAX_REMOTES, MAX_TAPS};

/// `enum oversize`: what becomes of a copy larger than the out interface's MTU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Oversize {
    /// Cut TCP super-packets so that each copy fits; fragment other frames
    Segment = 0,
    /// Keep every wire frame exact; fragment the outer packet
    Fragment = 1,
    /// Cut the copy's tail
    Truncate = 2,
    /// Count it and drop it
    Drop = 3,
}

/// The encapsulation of the copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Tunnel {
    /// GRE with transparent Ethernet bridging (RFC 2784, protocol 0x6558)
    Gre,
    /// VXLAN (RFC 7348)
    Vxlan,
    /// Geneve (RFC 8926)
    Geneve,
    /// ERSPAN type I: GRE with protocol 0x88be and nothing more
    Erspan1,
    /// ERSPAN type II: sequence, session id, inner VLAN
    Erspan2,
    /// ERSPAN type III: also direction and a timestamp of 64 bits
    Erspan3,
}

/// `enum spread`: which of several remotes get a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Spread {
    /// Every remote gets every copy
    Replicate = 0,
    /// Each flow, both directions, goes to one remote
    Flow = 1,
}

/// Which packets of an interface are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
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
}

/// An interface and which of its packets are copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watched {
    pub interface: String,
    pub direction: Watch,
}

/// Which of the packets that pass the filter are copied: one of so many, 1 for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sampling {
    pub packets: u32,
    pub flows: u32,
}

/// What may leave towards the remotes in a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rate {
    /// Of outer packets with their Ethernet headers.
    Bytes(u64),
    Packets(u64),
}

impl std::fmt::Display for Rate {
    /// In tc's units, the largest that says it without a fraction.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (amount, unit) = match self {
            Rate::Bytes(bytes) => (bytes * 8, "bit"),
            Rate::Packets(packets) => (*packets, "pps"),
        };
        let scales = [(1_000_000_000, "g"), (1_000_000, "m"), (1000, "k")];
        let scale = scales.into_iter().find(|(scale, _)| amount % scale == 0).unwrap_or((1, ""));
        write!(f, "{}{}{unit}", amount / scale.0, scale.1)
    }
}

/// The tunnel and what its header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelOptions {
    pub kind: Tunnel,
    /// GRE key, VNI or ERSPAN session id.
    pub id: Option<u32>,
    /// The same for copies of outgoing packets, where it differs.
    pub egress_id: Option<u32>,
    /// UDP destination port.
    pub port: Option<u16>,
    /// GRE sequence numbers.
    pub sequence: bool,
    pub udp_checksum: bool,
}

impl TunnelOptions {
    /// The largest id that the type can carry.
    fn largest_id(&self) -> Option<u32> {
        match self.kind {
            Tunnel::Gre => Some(u32::MAX),
            Tunnel::Vxlan | Tunnel::Geneve => Some((1 << 24) - 1),
            Tunnel::Erspan1 => None,
            Tunnel::Erspan2 | Tunnel::Erspan3 => Some((1 << 10) - 1),
        }
    }

    fn is_udp(&self) -> bool {
        matches!(self.kind, Tunnel::Vxlan | Tunnel::Geneve)
    }
}

/// The name of a unit enum's value on the command line.
pub fn spelled(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_string()).unwrap_or_default()
}

/// Fields of the outer IP header that the user chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OuterOptions {
    pub ttl: u8,
    pub tos: u8,
    pub df: bool,
}

/// Where an out interface that is a tunnel sends its own packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carrier {
    pub address: IpAddr,
    /// UDP destination port, 0 for any packet.
    pub port: u16,
}

impl std::fmt::Display for Carrier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.port {
            0 => write!(f, "{}", self.address),
            port => write!(f, "{}", std::net::SocketAddr::new(self.address, port)),
        }
    }
}

/// A checked request for a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub name: String,
    pub watched: Vec<Watched>,
    /// A pcap-filter(7) expression.
    pub filter: Option<String>,
    pub sampling: Sampling,
    /// Bytes of a frame that are copied.
    pub snaplen: Option<u32>,
    pub max_rate: Option<Rate>,
    pub tunnel: TunnelOptions,
    pub remotes: Vec<IpAddr>,
    pub spread: Spread,
    /// At most one of each address family.
    pub sources: Vec<IpAddr>,
    /// `None`: nothing was said of them.
    pub carriers: Option<Vec<Carrier>>,
    pub oversize: Oversize,
    pub outer: OuterOptions,
}

impl Plan {
    /// What such a session never does, by the `HAS_` names of `bpf/common.h`: it is left out of its programs.
    pub fn unused(&self) -> Vec<&'static str> {
        let patched = self.tunnel.patched();
        let parts = [
            ("UDP", patched.udp != 0),
            ("SEQUENCE", patched.sequence != 0),
            ("ERSPAN", patched.vlan != 0 || patched.port != 0 || patched.time != 0),
            ("CUT", self.snaplen.is_some() || self.oversize == Oversize::Truncate),
            ("RATE", self.max_rate.is_some()),
            ("SAMPLE", self.sampling.packets > 1 || self.sampling.flows > 1),
            ("SPREAD", self.spread == Spread::Flow),
        ];
        parts.into_iter().filter(|(_, used)| !used).map(|(name, _)| name).collect()
    }
}

/// What `up` was given, before any check.
#[derive(Clone, Debug)]
pub struct Request {
    pub name: String,
    pub interfaces: Vec<String>,
    pub direction: Watch,
    pub filter: Option<String>,
    pub sample: Option<String>,
    pub sample_flows: Option<String>,
    pub snaplen: Option<u32>,
    pub max_rate: Option<String>,
    pub tunnel: TunnelOptions,
    pub remotes: Vec<String>,
    pub spread: Spread,
    pub sources: Vec<String>,
    pub carriers: Vec<String>,
    pub oversize: Oversize,
    pub outer: OuterOptions,
}

/// Checks everything that can be known without looking at the machine.
pub fn plan(request: Request) -> Result<Plan> {
    ensure_name(&request.name)?;
    ensure_interfaces(&request.interfaces, request.direction)?;
    ensure_filter(request.filter.as_deref())?;
    ensure_snaplen(request.snaplen)?;
    ensure_tunnel(&request.tunnel)?;
    ensure_df_fits(&request)?;
    let sources = addresses("--source", &request.sources)?;
    let remotes = request.remotes.iter().map(|text| remote(text)).collect::<Result<Vec<_>>>()?;
    ensure_remotes(&remotes)?;
    ensure_sources(&sources, &remotes)?;
    Ok(Plan {
        name: request.name,
        watched: watched(request.interfaces, request.direction),
        filter: request.filter,
        sampling: Sampling {
            packets: sample("--sample", request.sample.as_deref())?,
            flows: sample("--sample-flows", request.sample_flows.as_deref())?,
        },
        snaplen: request.snaplen,
        max_rate: request.max_rate.map(|text| rate(&text)).transpose()?,
        tunnel: request.tunnel,
        remotes,
        spread: request.spread,
        sources,
        carriers: carriers(&request.carriers)?,
        oversize: request.oversize,
        outer: request.outer,
    })
}

/// A session name is a directory name, a filter's key and part of a link alias.
pub fn ensure_name(name: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    ensure!(
        (1..=15).contains(&name.len()) && name.chars().all(good) && !name.starts_with('-'),
        "--name {name:?} is not 1 to 15 characters of a-z, 0-9 and '-' with no '-' first; try: --name mirror-1"
    );
    Ok(())
}

/// Names that outer tools would read as something else (quotes and comments of `tc -batch`) are refused.
pub fn ensure_interface_name(name: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_graphic() && !"'\"\\#/".contains(c);
    ensure!(
        (1..=15).contains(&name.len()) && name.chars().all(good),
        "IFACE {name:?} is not an interface name (1 to 15 printable characters without quotes, '#', '/' and '\\'); \
         list them with: ip link"
    );
    Ok(())
}

fn ensure_interfaces(interfaces: &[String], direction: Watch) -> Result<()> {
    for (at, name) in interfaces.iter().enumerate() {
        ensure_interface_name(name)?;
        ensure!(!interfaces[..at].contains(name), "IFACE {name} is named twice; name each interface once");
    }
    let taps = interfaces.len() * direction.directions().len();
    ensure!(
        interfaces.len() * 2 <= MAX_TAPS as usize,
        "{} interfaces make {taps} taps, one session holds {MAX_TAPS}; start another session with: --name OTHER",
        interfaces.len()
    );
    Ok(())
}

fn watched(interfaces: Vec<String>, direction: Watch) -> Vec<Watched> {
    interfaces.into_iter().map(|interface| Watched { interface, direction }).collect()
}

/// What a session can remember of an expression; an argument of a program may be 128 KiB long.
const FILTER_BYTES: usize = 120_000;

/// A filter that can be remembered. What it says is tcpdump's to judge.
pub fn ensure_filter(expression: Option<&str>) -> Result<()> {
    let len = expression.map_or(0, str::len);
    ensure!(
        len <= FILTER_BYTES,
        "--filter takes {len} bytes, at most {FILTER_BYTES} are possible; name nets instead of hosts, as in: --filter 'net \
         10.0.0.0/8'"
    );
    Ok(())
}

/// Room for all headers of plain TCP over IPv6, and what the kernel's resize helpers take.
const SNAPLEN: std::ops::RangeInclusive<u32> = 60..=15_000;

fn ensure_snaplen(snaplen: Option<u32>) -> Result<()> {
    let fits = snaplen.is_none_or(|bytes| SNAPLEN.contains(&bytes));
    ensure!(
        fits,
        "--snaplen {} is out of range; it takes {} to {} bytes, as in: --snaplen 128",
        snaplen.unwrap_or_default(),
        SNAPLEN.start(),
        SNAPLEN.end()
    );
    Ok(())
}

/// `1/N`: one of N.
fn sample(flag: &str, text: Option<&str>) -> Result<u32> {
    let Some(text) = text else { return Ok(1) };
    let digits = text.strip_prefix("1/").filter(|n| n.bytes().all(|byte| byte.is_ascii_digit()));
    let n = digits.and_then(|n| n.parse().ok()).filter(|n: &u32| *n > 0);
    n.with_context(|| format!("{flag} {text:?} is not 1/N with N from 1 to {}; try: {flag} 1/100", u32::MAX))
}

/// tc's units: bits a second, or bytes with `bps`, by powers of 1000, or 1024 with an `i`; or packets with `pps`.
fn rate(text: &str) -> Result<Rate> {
    let parsed = parse_rate(&text.to_ascii_lowercase());
    let rate = parsed.with_context(|| {
        format!(
            "--max-rate {text:?} is not a rate in tc's units (bit, kbit, mbit, gbit, bps, kbps, ... or pps, kpps, mpps); try: \
             --max-rate 200mbit"
        )
    })?;
    let (amount, least) = match rate {
        Rate::Bytes(amount) => (amount, 1000),
        Rate::Packets(amount) => (amount, 1),
    };
    ensure!(
        (least..=LARGEST_RATE).contains(&amount),
        "--max-rate {text} is out of range; it takes 8kbit to 1000gbit, or 1pps and more; try: --max-rate 200mbit"
    );
    Ok(rate)
}

/// 1 Tbit/s in bytes: what the kernel program can count in billionths for as long as its bucket fills.
const LARGEST_RATE: u64 = 125_000_000_000;

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

/// Every option fits the type of the tunnel.
fn ensure_tunnel(tunnel: &TunnelOptions) -> Result<()> {
    let kind = spelled(tunnel.kind);
    for (flag, id) in [("--id", tunnel.id), ("--egress-id", tunnel.egress_id)] {
        let Some(id) = id else { continue };
        let Some(largest) = tunnel.largest_id() else {
            bail!(
                "{flag} does not go with --tunnel {kind}, which carries no id; types that do: gre, vxlan, geneve, erspan2, erspan3"
            );
        };
        ensure!(id <= largest, "{flag} {id} is out of range for --tunnel {kind}; it takes 0 to {largest}");
    }
    ensure!(
        tunnel.kind != Tunnel::Gre || tunnel.egress_id.is_none() || tunnel.id.is_some(),
        "--egress-id needs a key for the other direction too with --tunnel gre; try: --id 1 --egress-id 2"
    );
    let sequence = "--sequence is an option of gre (erspan2 and erspan3 always count); try: --tunnel gre --sequence";
    ensure!(!tunnel.sequence || tunnel.kind == Tunnel::Gre, "{sequence}");
    for (flag, used) in [("--port", tunnel.port.is_some()), ("--udp-checksum", tunnel.udp_checksum)] {
        ensure!(
            !used || tunnel.is_udp(),
            "{flag} does not go with --tunnel {kind}, which has no UDP header; types that do: vxlan, geneve"
        );
    }
    ensure!(tunnel.port != Some(0), "--port 0 is no UDP port; try: --port 4789");
    Ok(())
}

fn ensure_df_fits(request: &Request) -> Result<()> {
    ensure!(
        !request.outer.df || request.oversize != Oversize::Fragment,
        "--df forbids the outer fragments that --oversize fragment makes; try: --df --oversize truncate"
    );
    Ok(())
}

fn address(flag: &str, text: &str) -> Result<IpAddr> {
    ensure!(
        !text.contains('%'),
        "{flag} {text:?} is a link-local address with a zone, which is not supported; name a global address, as in: {flag} \
         2001:db8::7"
    );
    let parsed: Result<IpAddr, _> = text.parse();
    parsed.ok().with_context(|| format!("{flag} {text:?} is not an IP address; try: {flag} 10.0.0.7"))
}

fn addresses(flag: &str, texts: &[String]) -> Result<Vec<IpAddr>> {
    texts.iter().map(|text| address(flag, text)).collect()
}

/// A remote's address: one host elsewhere.
pub fn remote(text: &str) -> Result<IpAddr> {
    let address = address("--remote", text)?;
    let kind = match address {
        a if a.is_multicast() => "a multicast address",
        a if a.is_unspecified() => "the unspecified address",
        a if a.is_loopback() => "this machine itself",
        IpAddr::V4(a) if a.is_broadcast() => "the broadcast address",
        IpAddr::V6(a) if a.is_unicast_link_local() => "a link-local address, which needs a zone and is not supported",
        IpAddr::V6(a) if a.to_ipv4_mapped().is_some() => "an IPv4 address in IPv6 form",
        _ => return Ok(address),
    };
    let example = if address.is_ipv6() { "2001:db8::7" } else { "10.0.0.7" };
    bail!("--remote {address} is {kind}; name the collector's own address, as in: --remote {example}")
}

fn ensure_remotes(remotes: &[IpAddr]) -> Result<()> {
    for (at, remote) in remotes.iter().enumerate() {
        ensure!(!remotes[..at].contains(remote), "--remote {remote} is named twice; name each remote once");
    }
    ensure!(
        remotes.len() <= MAX_REMOTES,
        "--remote is given {} times, one session holds {MAX_REMOTES}; start another session with: --name OTHER",
        remotes.len()
    );
    Ok(())
}

fn ensure_sources(sources: &[IpAddr], remotes: &[IpAddr]) -> Result<()> {
    for source in sources {
        let used = remotes.iter().any(|remote| remote.is_ipv6() == source.is_ipv6());
        let example = if source.is_ipv6() { "10.0.0.7" } else { "2001:db8::7" };
        ensure!(used, "--source {source} is of another address family than each --remote; try: --source {example}");
        let host = !source.is_loopback() && !source.is_multicast() && !source.is_unspecified();
        ensure!(
            host,
            "--source {source} is no address that a packet can come from; list this machine's with: ip address"
        );
    }
    for v6 in [false, true] {
        let same: Vec<&IpAddr> = sources.iter().filter(|source| source.is_ipv6() == v6).collect();
        ensure!(
            same.len() <= 1,
            "--source names {} and {} of one address family; name at most one of each, as in: --source {}",
            same[0],
            same[1],
            same[0]
        );
    }
    Ok(())
}

/// `ADDR`, `ADDR:PORT`, `[ADDR]:PORT`, or the word `none`.
fn carriers(texts: &[String]) -> Result<Option<Vec<Carrier>>> {
    if texts.is_empty() {
        return Ok(None);
    }
    let named = texts.iter().filter(|text| *text != "none");
    Ok(Some(named.map(|text| carrier(text)).collect::<Result<Vec<_>>>()?))
}

fn carrier(text: &str) -> Result<Carrier> {
    if let Ok(address) = text.parse() {
        return Ok(Carrier { address, port: 0 });
    }
    let parsed: Result<std::net::SocketAddr, _> = text.parse();
    let at = parsed.ok().with_context(|| {
        format!("--carrier {text:?} is not ADDR, ADDR:PORT, [ADDR]:PORT or none; try: --carrier 203.0.113.5:51820")
    })?;
    Ok(Carrier { address: at.ip(), port: at.port() })
}

#[cfg(test)]
#[path = "request_test.rs"]
mod tests;
