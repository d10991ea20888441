//! From the command line to a checked request. Pure: no look at the machine.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::abi::{Direction, MAX_TAPS};

/// `enum oversize`: what becomes of a copy larger than the out interface's MTU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Tunnel {
    /// GRE with transparent Ethernet bridging (RFC 2784, protocol 0x6558)
    Gre,
}

/// Which packets of an interface are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Watch {
    Both,
    Ingress,
    Egress,
}

impl Watch {
    pub fn directions(self) -> &'static [Direction] {
        match self {
            Watch::Both => &[Direction::Ingress, Direction::Egress],
            Watch::Ingress => &[Direction::Ingress],
            Watch::Egress => &[Direction::Egress],
        }
    }
}

/// Fields of the outer IP header that the user chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OuterOptions {
    pub ttl: u8,
    pub tos: u8,
    pub df: bool,
}

/// A checked request for a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub name: String,
    pub interfaces: Vec<String>,
    pub direction: Watch,
    pub tunnel: Tunnel,
    pub remote: Ipv4Addr,
    pub source: Option<Ipv4Addr>,
    pub oversize: Oversize,
    pub outer: OuterOptions,
}

/// What `up` was given, before any check.
#[derive(Clone, Debug)]
pub struct Request {
    pub name: String,
    pub interfaces: Vec<String>,
    pub direction: Watch,
    pub tunnel: Tunnel,
    pub remote: String,
    pub source: Option<String>,
    pub oversize: Oversize,
    pub outer: OuterOptions,
}

/// Checks everything that can be known without looking at the machine.
pub fn plan(request: Request) -> Result<Plan> {
    ensure_name(&request.name)?;
    ensure_interfaces(&request.interfaces, request.direction)?;
    ensure_df_fits(&request)?;
    let source = request
        .source
        .as_deref()
        .map(|text| address("--source", text))
        .transpose()?;
    let remote = address("--remote", &request.remote)?;
    ensure_unicast("--remote", remote)?;
    Ok(Plan {
        name: request.name,
        interfaces: request.interfaces,
        direction: request.direction,
        tunnel: request.tunnel,
        remote,
        source,
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
        ensure!(
            !interfaces[..at].contains(name),
            "IFACE {name} is named twice; name each interface once"
        );
    }
    let taps = interfaces.len() * direction.directions().len();
    ensure!(
        taps <= MAX_TAPS as usize,
        "{} interfaces make {taps} taps, one session holds {MAX_TAPS}; start another session with: --name OTHER",
        interfaces.len()
    );
    Ok(())
}

fn ensure_df_fits(request: &Request) -> Result<()> {
    ensure!(
        !request.outer.df || request.oversize != Oversize::Fragment,
        "--df forbids the outer fragments that --oversize fragment makes; try: --df --oversize truncate"
    );
    Ok(())
}

fn address(flag: &str, text: &str) -> Result<Ipv4Addr> {
    match text.parse::<IpAddr>() {
        Ok(IpAddr::V4(address)) => Ok(address),
        Ok(IpAddr::V6(_)) => {
            bail!("{flag} {text} is an IPv6 address, which is not supported yet; try: {flag} 10.0.0.7")
        }
        Err(_) => bail!("{flag} {text:?} is not an IP address; try: {flag} 10.0.0.7"),
    }
}

fn ensure_unicast(flag: &str, address: Ipv4Addr) -> Result<()> {
    let kind = match address {
        a if a.is_multicast() => "a multicast address",
        a if a.is_broadcast() => "the broadcast address",
        a if a.is_unspecified() => "the unspecified address",
        a if a.is_loopback() => "this machine itself",
        _ => return Ok(()),
    };
    bail!("{flag} {address} is {kind}; name the collector's own address, as in: {flag} 10.0.0.7")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Request {
        Request {
            name: "default".into(),
            interfaces: vec!["eth0".into()],
            direction: Watch::Both,
            tunnel: Tunnel::Gre,
            remote: "10.0.0.7".into(),
            source: None,
            oversize: Oversize::Segment,
            outer: OuterOptions {
                ttl: 64,
                tos: 0,
                df: false,
            },
        }
    }

    /// The one line that the request is refused with.
    fn refusal(change: impl FnOnce(&mut Request)) -> String {
        let mut request = request();
        change(&mut request);
        let text = plan(request).unwrap_err().to_string();
        assert!(!text.contains('\n'), "{text}");
        text
    }

    #[test]
    fn a_good_request_is_kept_as_it_is() {
        let plan = plan(request()).unwrap();
        assert_eq!(plan.remote, Ipv4Addr::new(10, 0, 0, 7));
        let again: Plan = serde_json::from_str(&serde_json::to_string(&plan).unwrap()).unwrap();
        assert_eq!(plan, again);
    }

    #[test]
    fn each_bad_value_is_named_with_what_would_work() {
        for name in ["", "A", "sixteen-letters-", "a_b", "-a", "a/b"] {
            assert!(refusal(|r| r.name = name.into()).contains("--name"), "{name:?}");
        }
        for remote in [
            "",
            "collector",
            "10.0.0",
            "fe80::1",
            "224.0.0.1",
            "255.255.255.255",
            "0.0.0.0",
            "127.0.0.1",
        ] {
            let text = refusal(|r| r.remote = remote.into());
            assert!(text.contains("--remote") && text.ends_with("10.0.0.7"), "{text}");
        }
        assert!(refusal(|r| r.source = Some("x".into())).contains("--source"));
    }

    #[test]
    fn interface_names_cannot_reach_the_tools_as_anything_else() {
        for name in ["", "a b", "a'b", "a\"b", "a#b", "a\nb", "sixteen-letters-", "../x"] {
            assert!(
                refusal(|r| r.interfaces = vec![name.into()]).starts_with("IFACE"),
                "{name:?}"
            );
        }
        assert!(refusal(|r| r.interfaces = vec!["eth0".into(), "eth0".into()]).contains("named twice"));
        let many = (0..1025).map(|i| format!("v{i}")).collect();
        assert!(refusal(|r| r.interfaces = many).contains("2050 taps"));
    }

    #[test]
    fn df_excludes_fragments() {
        let text = refusal(|r| {
            r.outer.df = true;
            r.oversize = Oversize::Fragment;
        });
        assert!(text.contains("--oversize truncate"));
    }
}
