//! The relay of a session: a bridge with one port, one end of an idle veth pair. What a tap clones to the bridge meets
//! `snif_encap` at its egress hook; what goes on is cut into wire frames and finished on its way into the bridge, and meets
//! `snif_wire` at the port's egress hook: all inside the tap's own call, so copies leave in the order of the wire.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::datapath::abi::{Config, Direction, device};
use crate::session::home::{ALIAS, handle};
use crate::tools::bpftool;
use crate::tools::exec::{Cmd, Runner};
use crate::tools::ip::{self, Link};
use crate::tools::tc;

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

/// The programs of the relay: on which of its devices each one's egress hook is.
const PROGRAMS: [&str; 3] = ["snif_encap", "snif_wire", "snif_deliver"];

/// The bridge, its port, and the port's peer.
fn devices(relay: &str) -> [String; 3] {
    [relay.to_string(), format!("{relay}l"), format!("{relay}p")]
}

/// Is this the name of a relay's device?
pub fn is_name(name: &str) -> bool {
    let number = name.strip_prefix("snif").map(|rest| rest.trim_end_matches(['l', 'p']));
    number.is_some_and(|number| number.parse::<u32>().is_ok())
}

/// The first relay whose names are not taken.
pub fn free(links: &[Link]) -> Result<String> {
    let taken = |name: &String| links.iter().any(|link| link.ifname == *name || link.altnames.contains(name));
    let free = (0..1000).map(|n| format!("snif{n}")).find(|relay| !devices(relay).iter().any(taken));
    free.context("no relay name from snif0 to snif999 is free; remove sessions with: snifctl down --all")
}

/// Three numbers for the devices of a new relay.
pub fn free_indexes(links: &[Link]) -> [u32; 3] {
    let last = links.iter().map(|link| link.ifindex).max().unwrap_or(0);
    let first = FIRST_INDEX.max(last + 1);
    [first, first + 1, first + 2]
}

/// Makes the devices. They pass nothing yet. The bridge gets its MTU before its port, as it would follow it down, and loses
/// its offloads after it, as a new port brings its own.
pub fn make(runner: &Runner, relay: &str, config: &Config, session: &str) -> Result<()> {
    let all = devices(relay);
    let [bridge, port, peer] = &all;
    let mut lines = vec![
        format!(
            "link add {port} index {} mtu {MTU} type veth peer name {peer} index {} mtu {MTU}",
            config.port, config.peer
        ),
        format!("link add {bridge} index {} type bridge stp_state 0 mcast_snooping 0", config.relay),
        format!("link set dev {bridge} mtu {MTU}"),
        format!("link set dev {port} master {bridge}"),
    ];
    let quiet = if Path::new("/proc/sys/net/ipv6").exists() { "arp off addrgenmode none" } else { "arp off" };
    for device in &all {
        lines.push(format!("link set dev {device} alias {ALIAS}{session}"));
        lines.push(format!("link set dev {device} {quiet}"));
    }
    ip::batch(runner, &lines)?;
    let off = OFFLOADS.iter().flat_map(|(flag, _)| [*flag, "off"]);
    let said = runner.write(&Cmd::new("ethtool", ["-K", bridge].into_iter().chain(off)));
    if runner.dry_run {
        return said.map(drop);
    }
    // What it says of itself proves nothing: it also fails where there was nothing to turn off.
    let left = offloads(runner, bridge)?;
    if left.is_empty() {
        return Ok(());
    }
    said?;
    bail!("ethtool cannot turn off {} of {bridge}; try: snifctl doctor", left.join(", "))
}

/// The offloads that are on and must not be.
fn offloads(runner: &Runner, bridge: &str) -> Result<Vec<&'static str>> {
    let features = ip::features(runner, bridge)?;
    let on = OFFLOADS.iter().filter(|(_, name)| features.get(*name).copied().unwrap_or(false));
    Ok(on.map(|(_, name)| *name).collect())
}

/// Attaches the programs and lets the devices pass frames.
pub fn connect(runner: &Runner, relay: &str, session: &str, pins: &Path) -> Result<()> {
    let all = devices(relay);
    let mut hooks: Vec<String> = all.iter().map(|device| tc::add_clsact(device)).collect();
    hooks.extend(all.iter().zip(PROGRAMS).map(|(device, program)| {
        let pin = pins.join(program);
        tc::add_filter(device, Direction::Egress, tc::FIRST_PREF, handle(session), &pin.to_string_lossy())
    }));
    tc::batch(runner, &hooks)?;
    let up: Vec<String> = all.iter().rev().map(|device| format!("link set dev {device} up")).collect();
    ip::batch(runner, &up)?;
    wait(runner, relay)
}

/// Until the bridge passes frames: the kernel lets it do so some time after its port came up, or as soon as it is asked for
/// the port and then for the bridge (from 6.8). Where it takes long, with thousands of new links, copies that cross until
/// then are counted as lost by the relay.
fn wait(runner: &Runner, relay: &str) -> Result<()> {
    let [bridge, port, _] = devices(relay);
    let start = Instant::now();
    while !runner.dry_run && !ip::link(runner, &bridge)?.is_some_and(|link| link.has_carrier()) {
        if start.elapsed() >= PATIENCE {
            eprintln!(
                "snifctl: {bridge} does not pass frames yet: copies that cross it until then are counted as relay"
            );
            break;
        }
        ip::link(runner, &port)?;
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// The batch lines after which copies go through this relay.
pub fn updates(maps: &Path, config: &Config) -> [String; 2] {
    [(device::RELAY, config.relay), (device::PEER, config.peer)]
        .map(|(key, ifindex)| bpftool::update(&maps.join("devices"), &key.to_ne_bytes(), &ifindex.to_ne_bytes()))
}

/// What is wrong with a relay: each a half sentence. `attached` tells whether one of the session's programs is at an
/// interface's egress hook.
pub fn faults(runner: &Runner, config: &Config, links: &[Link], attached: impl Fn(u32) -> bool) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    let parts = [("bridge", config.relay), ("port", config.port), ("peer", config.peer)];
    for ((part, ifindex), program) in parts.into_iter().zip(PROGRAMS) {
        let Some(link) = links.iter().find(|link| link.ifindex == ifindex && is_one(link)) else {
            faults.push(format!("its {part} is gone"));
            continue;
        };
        let name = &link.ifname;
        if !link.is_up() {
            faults.push(format!("{name} is down"));
        }
        if link.mtu < MTU {
            faults.push(format!("the MTU of {name} is {}", link.mtu));
        }
        if !attached(ifindex) {
            faults.push(format!("{program} is not at the egress hook of {name}"));
        }
    }
    let Some(bridge) = links.iter().find(|link| link.ifindex == config.relay && is_one(link)) else {
        return Ok(faults);
    };
    let is_port = |link: &&Link| link.master.as_ref() == Some(&bridge.ifname);
    match links.iter().filter(is_port).find(|link| link.ifindex == config.port) {
        Some(port) => faults.extend(port_faults(port)),
        None => faults.push(format!("{} has lost its port", bridge.ifname)),
    }
    if bridge.linkinfo.info_data["stp_state"].as_u64().is_some_and(|state| state != 0) {
        faults.push(format!("STP of {} is on", bridge.ifname));
    }
    let others = links.iter().filter(is_port).filter(|link| link.ifindex != config.port);
    faults.extend(others.map(|link| format!("{} is another port of {}", link.ifname, bridge.ifname)));
    let offloads = offloads(runner, &bridge.ifname)?;
    faults.extend(offloads.iter().map(|name| format!("{name} of {} is on", bridge.ifname)));
    Ok(faults)
}

/// Is this a device of a relay, and not a stranger that has got its number?
pub fn is_one(link: &Link) -> bool {
    link.ifalias.starts_with(ALIAS) || is_name(&link.ifname)
}

/// What keeps a port from passing frames, although it is up. Half a relay that is down is no other fault.
fn port_faults(port: &Link) -> Vec<String> {
    let (name, data) = (&port.ifname, &port.linkinfo.info_slave_data);
    let mut faults = Vec::new();
    if port.has_carrier() && data["state"].as_str().is_some_and(|state| state != "forwarding") {
        faults.push(format!("the bridge port {name} is {}", data["state"].as_str().unwrap_or_default()));
    }
    if data["flood"] == false {
        faults.push(format!("the bridge port {name} does not flood"));
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
        assert_eq!(port_faults(&port(r#"{"state":"forwarding","flood":true}"#)), [""; 0]);
        assert_eq!(port_faults(&port("{}")), [""; 0]);
        assert_eq!(port_faults(&port(r#"{"state":"disabled","flood":false}"#)).len(), 2);
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
