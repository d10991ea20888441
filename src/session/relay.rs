//! The relay of a session: a bridge with one port, one end of an idle veth pair. What a tap clones to the bridge meets
//! `snif_encap` at its egress hook; what goes on is cut into wire frames and finished on its way into the bridge, and meets
//! `snif_wire` at the port's egress hook: all inside the tap's own call, so copies leave in the order of the wire.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::datapath::abi::{Direction, device};
use crate::datapath::parts::{Device, Map, Program};
use crate::session::change::{Act, Change, From};
use crate::session::home::ALIAS;
use crate::session::there::There;
use crate::tools::exec::{Cmd, Runner};
use crate::tools::ip::{self, Link};
use crate::tools::tc::Dev;
use crate::tools::{ethtool, tc};

/// A relay must take any super-packet and any frame.
const MTU: u32 = 65535;

/// How long the bridge may take to pass frames.
const PATIENCE: Duration = Duration::from_secs(1);

/// Numbers that the kernel does not hand out by itself, so that they can be chosen before the devices are made.
const FIRST_INDEX: u32 = 0x7000_0001;

/// What the bridge must not leave to a device behind it: then the kernel does it on the way into the bridge.
const OFFLOADS: [(&str, &str); 4] = [
    ("tx", "tx-checksumming"),
    ("sg", "scatter-gather"),
    ("tso", "tcp-segmentation-offload"),
    ("gso", "generic-segmentation-offload"),
];

/// The bridge, its port, and the port's peer.
fn devices(relay: &str) -> [String; 3] {
    [relay.to_string(), format!("{relay}l"), format!("{relay}p")]
}

/// Is this the name of a relay's device?
pub(crate) fn is_name(name: &str) -> bool {
    let number = name.strip_prefix("snif").map(|rest| rest.trim_end_matches(['l', 'p']));
    number.is_some_and(|number| number.parse::<u32>().is_ok())
}

/// Is this a device of a relay, and not a stranger that has got its number?
pub(crate) fn is_one(link: &Link) -> bool {
    link.ifalias.starts_with(ALIAS) || is_made_as_one(link)
}

/// Whose relay a device is of; none of what carries copies of others away from here.
pub(crate) fn session(link: &Link) -> Option<&str> {
    link.ifalias.strip_prefix(ALIAS).filter(|name| !name.contains('@'))
}

/// Was it made as a device of a relay is? A name alone says nothing: its number must be one that the kernel does not hand
/// out by itself.
fn is_made_as_one(link: &Link) -> bool {
    link.ifindex >= FIRST_INDEX && is_name(&link.ifname) && ["veth", "bridge"].contains(&link.kind())
}

/// One of a run that ended before it could say whose it is.
pub(crate) fn is_nameless(link: &Link) -> bool {
    link.ifalias.is_empty() && is_made_as_one(link)
}

/// A relay that is to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct New {
    name: String,
    pub bridge: u32,
    pub port: u32,
    pub peer: u32,
}

impl New {
    /// Of its bridge.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The first names that are not taken, and three numbers. `gone`: devices that are removed before.
    pub(crate) fn choose(links: &[Link], gone: &[String]) -> New {
        let left: Vec<&Link> = links.iter().filter(|link| !gone.contains(&link.ifname)).collect();
        let taken = |name: &String| left.iter().any(|link| link.ifname == *name || link.altnames.contains(name));
        let free = (0..).map(|n| format!("snif{n}")).find(|relay| !devices(relay).iter().any(taken));
        let last = links.iter().filter(|link| link.away.is_none()).map(|link| link.ifindex).max().unwrap_or(0);
        let first = FIRST_INDEX.max(last + 1);
        New { name: free.expect("numbers do not end"), bridge: first, port: first + 1, peer: first + 2 }
    }

    /// Makes the devices, and attaches the programs before anything passes. The bridge gets its MTU before its port, as it
    /// would follow it down, and loses its offloads after it, as a new port brings its own.
    pub(crate) fn make(&self, session: &str) -> Vec<Act> {
        let all = devices(&self.name);
        let [bridge, port, peer] = &all;
        let mut lines = vec![
            format!(
                "link add {port} index {} mtu {MTU} type veth peer name {peer} index {} mtu {MTU}",
                self.port, self.peer
            ),
            format!("link add {bridge} index {} type bridge stp_state 0 mcast_snooping 0", self.bridge),
            format!("link set dev {bridge} mtu {MTU}"),
            format!("link set dev {port} master {bridge}"),
        ];
        for device in &all {
            lines.push(format!("link set dev {device} alias {ALIAS}{session}"));
            lines.push(quiet(device));
        }
        let mut acts: Vec<Act> = lines.into_iter().map(Act::Ip).collect();
        acts.push(Act::Offloads(bridge.clone()));
        let indexes = [self.bridge, self.port, self.peer];
        for (dev, ifindex) in all.iter().zip(indexes) {
            acts.push(Act::AddClsact { ifindex, dev: Dev::ours(dev), is_ours: false });
        }
        for ((dev, ifindex), device) in all.iter().zip(indexes).zip(Device::ALL) {
            acts.push(attach(ifindex, dev, device.program(), tc::FIRST_PREF));
        }
        acts.extend(all.iter().rev().map(|dev| Act::Ip(format!("link set dev {dev} up"))));
        acts.push(Act::Await { bridge: bridge.clone(), port: port.clone() });
        acts
    }

    /// The writes after which copies go through this relay.
    pub(crate) fn refer(&self) -> Vec<Act> {
        [(device::RELAY, self.bridge), (device::PEER, self.peer)].map(|(key, ifindex)| refer(key, ifindex)).to_vec()
    }
}

/// The line after which a device asks for nobody.
pub(super) fn quiet(device: &str) -> String {
    let ipv6 = if Path::new("/proc/sys/net/ipv6").exists() { " addrgenmode none" } else { "" };
    format!("link set dev {device} arp off{ipv6}")
}

fn refer(key: u32, ifindex: u32) -> Act {
    Act::Write(Map::Devices, key.to_ne_bytes().to_vec(), ifindex.to_ne_bytes().to_vec())
}

fn attach(ifindex: u32, dev: &str, program: Program, pref: u32) -> Act {
    let direction = Direction::Egress;
    Act::Attach { ifindex, dev: Dev::ours(dev), direction, pref, program, from: From::Session }
}

/// The writes after which programs know the devices of a relay that is there, where they do not.
pub(crate) fn references(there: &There) -> Vec<Act> {
    let known = [(device::RELAY, Device::Bridge), (device::PEER, Device::Peer)];
    let found = known.into_iter().filter_map(|(key, at)| Some((key, there.device(at)?.ifindex)));
    found.filter(|(key, ifindex)| there.referred(*key) != Some(*ifindex)).map(|(key, at)| refer(key, at)).collect()
}

/// Turns the offloads of a bridge off. What ethtool says of itself proves nothing: it also fails where there was nothing
/// to turn off.
pub(crate) fn turn_offloads_off(runner: &Runner, bridge: &str) -> Result<()> {
    let off = OFFLOADS.iter().flat_map(|(flag, _)| [*flag, "off"]);
    let said = runner.write(&Cmd::new("ethtool", ["-K", bridge].into_iter().chain(off)));
    if runner.dry_run {
        return said.map(drop);
    }
    let left = offloads(&ethtool::features(runner, bridge)?);
    if left.is_empty() {
        return Ok(());
    }
    said?;
    bail!("ethtool cannot turn off {} of {bridge}; try: snifctl doctor", left.join(", "))
}

/// The offloads that are on and must not be.
pub(crate) fn offloads(features: &BTreeMap<String, bool>) -> Vec<&'static str> {
    let on = OFFLOADS.iter().filter(|(_, name)| features.get(*name).copied().unwrap_or(false));
    on.map(|(_, name)| *name).collect()
}

/// Until the bridge passes frames: the kernel lets it do so some time after its port came up, or as soon as it is asked for
/// the port and then for the bridge (from 6.8). Where it takes long, with thousands of new links, copies that cross until
/// then are counted as lost by the relay.
pub(crate) fn wait(runner: &Runner, bridge: &str, port: &str) -> Result<()> {
    let start = Instant::now();
    while !runner.dry_run && !ip::link(runner, bridge)?.is_some_and(|link| link.has_carrier()) {
        if start.elapsed() >= PATIENCE {
            eprintln!(
                "snifctl: {bridge} does not pass frames yet: copies that cross it until then are counted as relay"
            );
            break;
        }
        ip::link(runner, port)?;
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// The acts that remove the devices of a session's relays. Removing one end of a veth pair removes the other.
pub(crate) fn removals(there: &There) -> Vec<Act> {
    let ours = there.relays();
    // A bridge of ours is also known by its port, where someone has given it another alias.
    let is_bridge = |link: &&Link| is_made_as_one(link) && link.kind() == "bridge";
    let bridges = there.links.iter().filter(is_bridge).filter(|link| {
        ours.iter().all(|own| own.ifindex != link.ifindex)
            && ours.iter().any(|own| own.master.as_ref() == Some(&link.ifname))
    });
    let mut doomed: Vec<&Link> = Vec::new();
    for link in bridges.chain(ours.iter().copied()) {
        if link.link.is_none() || doomed.iter().all(|other| Some(&other.ifname) != link.link.as_ref()) {
            doomed.push(link);
        }
    }
    doomed.iter().map(|link| Act::Ip(format!("link delete dev {}", link.ifname))).collect()
}

/// Puts programs that were just loaded in the place of those at the relay's hooks.
pub(crate) fn replacements(there: &There) -> Vec<Act> {
    let at = |device: Device| {
        let link = there.device(device)?;
        let (pref, _) = filter_at(there, link, device.program())?;
        let (ifindex, dev, program) = (link.ifindex, link.dev(), device.program());
        Some(Act::Replace { ifindex, dev, direction: Direction::Egress, pref, program, from: From::Building })
    };
    Device::ALL.into_iter().filter_map(at).collect()
}

/// Puts the programs that were at the relay's hooks back there, from their pins.
pub(crate) fn filters_back(before: &There, now: &There) -> Vec<Act> {
    let at = |device: Device| {
        let (link, program) = (now.device(device)?, device.program());
        let (_, was) = filter_at(before, link, program)?;
        let (pref, is) = filter_at(now, link, program)?;
        let (ifindex, dev, direction) = (link.ifindex, link.dev(), Direction::Egress);
        (was != is).then_some(Act::Replace { ifindex, dev, direction, pref, program, from: From::Session })
    };
    Device::ALL.into_iter().filter_map(at).collect()
}

/// The session's filter at the egress hook of a relay's device: its preference, and the program that it runs.
fn filter_at(there: &There, link: &Link, program: Program) -> Option<(u32, Option<u32>)> {
    let filters = there.hooks.get(&link.ifindex)?.filters(Direction::Egress);
    let is_it = |name: &str| name == program.name() || name.is_empty();
    let found = filters.iter().find(|filter| there.is_ours(filter) && is_it(filter.program()));
    found.map(|filter| (filter.pref, filter.id()))
}

/// What puts a relay right.
pub(crate) enum Difference {
    Repair(Vec<Change>),
    /// It has to be made again.
    Renew {
        faults: Vec<String>,
        new: New,
        acts: Vec<Act>,
    },
}

/// What is wrong with a session's relay. `reloaded`: its programs have just been replaced.
pub(crate) fn difference(there: &There, reloaded: bool) -> Difference {
    let missing: Vec<Device> = Device::ALL.into_iter().filter(|device| there.device(*device).is_none()).collect();
    if !missing.is_empty() {
        let faults = missing.iter().map(|device| format!("its {} is gone", device.name())).collect();
        let mut acts = removals(there);
        let gone: Vec<String> = there.relays().iter().map(|link| link.ifname.clone()).collect();
        let new = New::choose(&there.links, &gone);
        acts.extend(new.make(&there.name));
        return Difference::Renew { faults, new, acts };
    }
    let links = Device::ALL.map(|device| there.device(device).expect("none is missing"));
    let mut changes = Vec::new();
    let mut push = |fault: String, fix: &str, acts: Vec<Act>| changes.push(Change::new("relay", fault, fix, acts));
    let alias = format!("{ALIAS}{}", there.name);
    for (link, device) in links.iter().zip(Device::ALL) {
        let name = &link.ifname;
        if link.ifalias != alias {
            let line = format!("link set dev {name} alias {alias}");
            push(format!("{name} does not say whose it is"), "named", vec![Act::Ip(line)]);
        }
        if !link.flags.iter().any(|flag| flag == "NOARP") {
            push(format!("ARP of {name} is on"), "turned off", vec![Act::Ip(quiet(name))]);
        }
        if link.mtu < MTU {
            let line = format!("link set dev {name} mtu {MTU}");
            push(format!("the MTU of {name} is {}", link.mtu), "set", vec![Act::Ip(line)]);
        }
        if let Some(acts) = filter_acts(there, link, device.program(), reloaded) {
            let fault = format!("{} is not at the egress hook of {name}", device.program().name());
            push(fault, "attached", acts);
        }
    }
    let [bridge, port, _] = links;
    if port.master.as_ref() != Some(&bridge.ifname) {
        let lines = [
            format!("link set dev {} master {}", port.ifname, bridge.ifname),
            format!("link set dev {} mtu {MTU}", bridge.ifname),
        ];
        let acts = lines.map(Act::Ip).into_iter().chain([Act::Offloads(bridge.ifname.clone())]);
        push(format!("{} has lost its port", bridge.ifname), "put back", acts.collect());
    }
    for link in links.iter().rev().filter(|link| !link.is_up()) {
        push(format!("{} is down", link.ifname), "set up", vec![Act::Ip(format!("link set dev {} up", link.ifname))]);
    }
    for (fault, line) in port_faults(port) {
        push(fault, "set", vec![Act::Ip(line)]);
    }
    if bridge.linkinfo.info_data["stp_state"].as_u64().is_some_and(|state| state != 0) {
        let line = format!("link set dev {} type bridge stp_state 0", bridge.ifname);
        push(format!("STP of {} is on", bridge.ifname), "turned off", vec![Act::Ip(line)]);
    }
    let is_port = |link: &&Link| link.master.as_ref() == Some(&bridge.ifname) && link.ifindex != port.ifindex;
    for other in there.links.iter().filter(is_port) {
        let line = format!("link set dev {} nomaster", other.ifname);
        let fault = format!("{} is another port of {}", other.ifname, bridge.ifname);
        push(fault, "taken out of it", vec![Act::Ip(line), Act::Offloads(bridge.ifname.clone())]);
    }
    let on = there.offloads.clone().unwrap_or_default();
    if !on.is_empty() {
        let fault = format!("{} of {} is on", on.join(", "), bridge.ifname);
        push(fault, "turned off", vec![Act::Offloads(bridge.ifname.clone())]);
    }
    if changes.iter().flat_map(|change| &change.acts).any(|act| matches!(act, Act::Ip(_))) {
        let (bridge, port) = (bridge.ifname.clone(), port.ifname.clone());
        changes.push(Change::silent(vec![Act::Await { bridge, port }]));
    }
    Difference::Repair(changes)
}

/// What puts a program at a device's egress hook, where it is not there.
fn filter_acts(there: &There, link: &Link, program: Program, reloaded: bool) -> Option<Vec<Act>> {
    let hooks = there.hooks.get(&link.ifindex)?;
    let (ifindex, dev, direction) = (link.ifindex, link.dev(), Direction::Egress);
    match filter_at(there, link, program) {
        Some((_, id)) if reloaded || id.is_none() || id.as_ref() == there.programs.get(&program) => None,
        Some((_, id)) if id.as_ref() == there.unpinned_programs.get(&program) => None,
        Some((pref, _)) => Some(vec![Act::Replace { ifindex, dev, direction, pref, program, from: From::Session }]),
        None => {
            let mut acts = Vec::new();
            if !hooks.has_qdisc("clsact") {
                acts.push(Act::AddClsact { ifindex, dev, is_ours: false });
            }
            acts.push(attach(ifindex, &link.ifname, program, hooks.free_pref(direction)));
            Some(acts)
        }
    }
}

/// What keeps a port from passing frames, although it is up, and the line that ends it. Half a relay that is down is no
/// other fault.
fn port_faults(port: &Link) -> Vec<(String, String)> {
    let (name, data) = (&port.ifname, &port.linkinfo.info_slave_data);
    let mut faults = Vec::new();
    let mut push = |fault: String, option: &str| {
        faults.push((fault, format!("link set dev {name} type bridge_slave {option}")));
    };
    if port.has_carrier() && data["state"].as_str().is_some_and(|state| state != "forwarding") {
        let state = data["state"].as_str().unwrap_or_default();
        push(format!("the bridge port {name} is {state}"), "state 3");
    }
    if data["flood"] == false {
        push(format!("the bridge port {name} does not flood"), "flood on");
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_passes_no_frames_is_a_fault() {
        let port = |data: &str| -> Link {
            let text = format!(
                r#"{{"ifindex":1,"ifname":"snif0l","flags":["UP","LOWER_UP"],"mtu":65535,"link_type":"ether",
                "linkinfo":{{"info_kind":"veth","info_slave_data":{data}}}}}"#
            );
            serde_json::from_str(&text).expect("a link")
        };
        assert_eq!(port_faults(&port(r#"{"state":"forwarding","flood":true}"#)), []);
        assert_eq!(port_faults(&port("{}")), []);
        assert_eq!(port_faults(&port(r#"{"state":"disabled","flood":false}"#)).len(), 2);
    }

    #[test]
    fn a_name_alone_makes_nothing_ours() {
        let link = |ifindex: u32, name: &str, kind: &str, alias: &str| -> Link {
            let text = format!(
                r#"{{"ifindex":{ifindex},"ifname":"{name}","ifalias":"{alias}","linkinfo":{{"info_kind":"{kind}"}}}}"#
            );
            serde_json::from_str(&text).expect("a link")
        };
        assert!(is_nameless(&link(FIRST_INDEX, "snif0", "bridge", "")));
        for stranger in [
            link(7, "snif0", "bridge", ""),
            link(7, "snif7", "veth", ""),
            link(FIRST_INDEX, "snif0", "dummy", ""),
            link(FIRST_INDEX, "br0", "bridge", ""),
        ] {
            assert!(!is_nameless(&stranger) && !is_one(&stranger), "{stranger:?}");
        }
        let named = link(FIRST_INDEX, "snif0", "bridge", "snifctl:a");
        assert!(is_one(&named) && !is_nameless(&named));
    }

    #[test]
    fn the_devices_of_a_relay_are_known_by_name() {
        for name in devices("snif12") {
            assert!(is_name(&name), "{name}");
        }
        for name in ["snif", "snifl", "snifx1", "snif1a", "eth0"] {
            assert!(!is_name(name), "{name}");
        }
    }
}
