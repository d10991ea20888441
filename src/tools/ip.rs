//! What `ip` and `ethtool` know: links, routes, neighbours, addresses. JSON in, typed values out.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::tools::exec::{Cmd, Failed, Runner};

/// One interface, from `ip -j -d -s link show`.
#[derive(Clone, Debug, Deserialize)]
pub struct Link {
    pub ifindex: u32,
    pub ifname: String,
    #[serde(default)]
    pub altnames: Vec<String>,
    #[serde(default)]
    pub flags: Vec<String>,
    /// Bytes of the largest L3 packet.
    pub mtu: u32,
    pub link_type: String,
    /// The root qdisc.
    #[serde(default)]
    pub qdisc: String,
    #[serde(default)]
    pub address: String,
    #[serde(default)]
    pub ifalias: String,
    /// The interface that this one stands on, or the other end of a veth pair in this namespace.
    pub link: Option<String>,
    /// The bridge, bond or the like that this is a port of.
    pub master: Option<String>,
    /// The bus of the device, if it is not a virtual one.
    pub parentbus: Option<String>,
    #[serde(default)]
    pub linkinfo: LinkInfo,
    #[serde(default)]
    pub stats64: LinkStats,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct LinkInfo {
    #[serde(default)]
    pub info_kind: String,
    /// What only interfaces of this kind have.
    #[serde(default)]
    pub info_data: serde_json::Value,
    /// What only ports of a bridge, bond or the like have.
    #[serde(default)]
    pub info_slave_data: serde_json::Value,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct LinkStats {
    #[serde(default)]
    pub tx: Lost,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct Lost {
    #[serde(default)]
    pub dropped: u64,
    /// Of a tunnel, also what the kernel found too deeply nested.
    #[serde(default)]
    pub errors: u64,
}

impl Link {
    pub fn is_up(&self) -> bool {
        self.flags.iter().any(|flag| flag == "UP")
    }

    /// Packets wait in a queue, which drops what it cannot hold.
    pub fn has_queue(&self) -> bool {
        self.qdisc != "noqueue"
    }

    pub fn has_carrier(&self) -> bool {
        self.flags.iter().any(|flag| flag == "LOWER_UP")
    }

    /// Frames of this interface begin with an Ethernet header.
    pub fn is_ethernet(&self) -> bool {
        matches!(self.link_type.as_str(), "ether" | "loopback")
    }

    /// Packets of this interface begin with the IP header.
    pub fn is_l3(&self) -> bool {
        ["none", "ipip", "tunnel6", "sit", "gre", "gre6", "void", "rawip", "ppp"].contains(&self.link_type.as_str())
    }

    /// What kind of virtual interface it is; empty for a device of a driver.
    pub fn kind(&self) -> &str {
        &self.linkinfo.info_kind
    }

    /// A word of what only its kind has.
    pub fn detail(&self, key: &str) -> Option<&str> {
        self.linkinfo.info_data.get(key)?.as_str()
    }

    /// The interface that this one stands on, by name; a vxlan device has it elsewhere.
    pub fn lower(&self) -> Option<&str> {
        self.link.as_deref().or_else(|| self.detail("link"))
    }

    pub fn mac(&self) -> Option<[u8; 6]> {
        parse_mac(&self.address)
    }
}

/// `02:00:00:00:00:01` as bytes.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|part| u8::from_str_radix(part, 16).ok()).collect();
    bytes?.try_into().ok()
}

/// Bytes as `02:00:00:00:00:01`.
pub fn mac_text(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

/// Every interface of this network namespace.
pub fn links(runner: &Runner) -> Result<Vec<Link>> {
    let cmd = Cmd::new("ip", ["-j", "-d", "-s", "link", "show"]);
    parse(&runner.read(&cmd)?, "ip link")
}

/// One interface of it.
pub fn link(runner: &Runner, name: &str) -> Result<Option<Link>> {
    let cmd = Cmd::new("ip", ["-j", "-d", "-s", "link", "show", "dev", name]);
    Ok(parse(&runner.read(&cmd)?, "ip link")?.into_iter().next())
}

/// What the kernel's route lookup answers, from `ip -j route get`.
#[derive(Clone, Debug, Deserialize)]
pub struct RouteReply {
    /// `local`, `multicast`, `broadcast`; absent for a unicast route.
    #[serde(rename = "type", default)]
    pub kind: String,
    pub dev: String,
    pub gateway: Option<IpAddr>,
    pub prefsrc: Option<IpAddr>,
    #[serde(default)]
    pub metrics: Vec<Metrics>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Metrics {
    pub mtu: Option<u32>,
}

/// The route to `address`, or the kernel's reason why there is none.
pub fn route_get(runner: &Runner, address: IpAddr, source: Option<IpAddr>) -> Result<Result<RouteReply, String>> {
    let mut args = vec!["-j".to_string(), "route".into(), "get".into(), address.to_string()];
    if let Some(source) = source {
        args.extend(["from".into(), source.to_string()]);
    }
    match runner.read(&Cmd::new("ip", args)) {
        Ok(text) => {
            let replies: Vec<RouteReply> = parse(&text, "ip route get")?;
            Ok(replies.into_iter().next().ok_or_else(|| "no route".to_string()))
        }
        Err(err) => match err.downcast::<Failed>() {
            Ok(failed) => Ok(Err(failed.stderr.trim().trim_start_matches("RTNETLINK answers: ").to_string())),
            Err(err) => Err(err),
        },
    }
}

/// A neighbour entry, from `ip -j neigh show`.
#[derive(Clone, Debug, Deserialize)]
pub struct Neighbour {
    pub lladdr: Option<String>,
    #[serde(default)]
    pub state: Vec<String>,
}

impl Neighbour {
    /// The link-layer address, unless the kernel has given the neighbour up.
    pub fn mac(&self) -> Option<[u8; 6]> {
        let usable = !self.state.iter().any(|state| state == "FAILED" || state == "INCOMPLETE");
        self.lladdr.as_deref().filter(|_| usable).and_then(parse_mac)
    }
}

pub fn neighbour(runner: &Runner, address: IpAddr, dev: &str) -> Result<Option<Neighbour>> {
    let cmd = Cmd::new("ip", ["-j", "neigh", "show", "to", &address.to_string(), "dev", dev]);
    let found: Vec<Neighbour> = parse(&runner.read(&cmd)?, "ip neigh")?;
    Ok(found.into_iter().next())
}

/// Makes the kernel ask for the neighbour, as a packet to it would.
pub fn probe_neighbour(runner: &Runner, address: IpAddr, dev: &str) -> Result<()> {
    let cmd = Cmd::new("ip", ["neigh", "replace", &address.to_string(), "dev", dev, "use"]);
    runner.write(&cmd).map(drop)
}

#[derive(Deserialize)]
struct AddressReply {
    #[serde(default)]
    addr_info: Vec<AddressInfo>,
}

#[derive(Deserialize)]
struct AddressInfo {
    local: Option<IpAddr>,
}

/// Every address that this network namespace owns.
pub fn addresses(runner: &Runner) -> Result<Vec<IpAddr>> {
    let replies: Vec<AddressReply> = parse(&runner.read(&Cmd::new("ip", ["-j", "address", "show"]))?, "ip address")?;
    Ok(replies.into_iter().flat_map(|reply| reply.addr_info).filter_map(|info| info.local).collect())
}

#[derive(Deserialize)]
struct Feature {
    #[serde(default)]
    active: bool,
}

/// Which features of a device are on, by ethtool's names.
pub fn features(runner: &Runner, dev: &str) -> Result<BTreeMap<String, bool>> {
    let text = runner.read(&Cmd::new("ethtool", ["--json", "-k", dev]))?;
    let all: Vec<serde_json::Map<String, serde_json::Value>> = parse(&text, "ethtool")?;
    let is_on = |value| serde_json::from_value::<Feature>(value).is_ok_and(|feature| feature.active);
    Ok(all.into_iter().flatten().map(|(name, value)| (name, is_on(value))).collect())
}

/// Runs many changes in one `ip`; it stops at the first that fails.
pub fn batch(runner: &Runner, lines: &[String]) -> Result<()> {
    runner.write(&Cmd::new("ip", ["-batch", "-"]).input(lines)).map(drop)
}

/// Reads a tool's JSON. An empty answer is an empty list: `ip` prints nothing where it finds nothing.
fn parse<T: serde::de::DeserializeOwned>(text: &str, tool: &str) -> Result<Vec<T>> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_str(text).with_context(|| format!("{tool} gave JSON of another form; try: snifctl doctor"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_neighbour_has_no_address() {
        let known = |state: &str| Neighbour { lladdr: Some("02:00:00:00:00:01".into()), state: vec![state.into()] };
        assert_eq!(known("STALE").mac(), Some([2, 0, 0, 0, 0, 1]));
        assert_eq!(known("FAILED").mac(), None);
    }

    #[test]
    fn only_six_bytes_are_a_mac_address() {
        assert_eq!(parse_mac("02:00:00:00:00:0g"), None);
        assert_eq!(parse_mac("0.0.0.0"), None);
        assert_eq!(parse_mac("ff:ff:ff:ff:ff:ff"), Some([255; 6]));
    }
}
