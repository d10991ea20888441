//! What stands below an interface, and what that means for copies that leave there: whether somebody finishes them, and
//! whether the packets that carry them further still have their mark.

use std::net::IpAddr;

use anyhow::Result;

use crate::tools::ip::Link;

/// What is asked of the machine about a device besides what `ip link` says.
pub(crate) trait Facts {
    /// Does the kernel itself finish checksums and cut super-packets before this device gets them?
    fn gets_finished(&self, link: &Link) -> Result<bool>;
    /// The bus that the device is on, if it is one of a driver.
    fn bus(&self, link: &Link) -> Option<String>;
    /// The interface that packets to this address leave by.
    fn way(&self, address: IpAddr) -> Result<Option<String>>;
}

/// Buses of NICs that hand packets to the machine's host as they are, the rest of the work to be done there: virtio, Xen,
/// Hyper-V.
const PARAVIRTUAL: [&str; 3] = ["virtio", "xen", "vmbus"];

/// Kinds of interfaces whose `link` is the device that they send by. (That of a veth is its other end.)
const UPPER: [&str; 8] = ["vlan", "macvlan", "macvtap", "ipvlan", "ipvtap", "macsec", "dsa", "rmnet"];

/// Of these, those that give packets to their siblings on the same device, past that device.
const SIBLINGS: [&str; 4] = ["macvlan", "macvtap", "ipvlan", "ipvtap"];
const TO_OUTSIDE_ONLY: [&str; 4] = ["private", "vepa", "passthru", "source"];

/// Tunnels of the kernel that put a packet with its mark into their own.
const TUNNELS: [&str; 14] = [
    "vxlan",
    "geneve",
    "gretap",
    "ip6gretap",
    "erspan",
    "ip6erspan",
    "gre",
    "ip6gre",
    "ipip",
    "sit",
    "ip6tnl",
    "vti",
    "vti6",
    "bareudp",
];

/// Other virtual devices that leave a packet's mark alone. Not in the list, so that one must ask: user-space tunnels (tun,
/// which a tap is too), wireguard and ovpn, which set a mark of their own, xfrm, where a state may do so, ppp, and whatever
/// nobody has looked at.
const KEEPS_MARK: [&str; 11] =
    ["veth", "netkit", "bridge", "bond", "team", "vrf", "dummy", "ifb", "hsr", "openvswitch", "nlmon"];

/// The devices that an interface sends by, as far as they are known: of a bridge or bond all its ports, as it is not said
/// which one it will take.
fn below<'a>(links: &'a [Link], link: &Link) -> Vec<&'a Link> {
    if UPPER.contains(&link.kind()) {
        return named(links, link.lower()).into_iter().collect();
    }
    links.iter().filter(|port| port.master.as_ref() == Some(&link.ifname)).collect()
}

fn named<'a>(links: &'a [Link], name: Option<&str>) -> Option<&'a Link> {
    links.iter().find(|link| Some(link.ifname.as_str()) == name)
}

/// May a packet reach its receiver from this interface with checksums open or segments uncut, as no wire ever carries it?
/// So it does through virtual devices; a NIC finishes it. In doubt the answer is yes.
pub(crate) fn leaves_unfinished(links: &[Link], out: &Link, facts: &impl Facts) -> Result<bool> {
    unfinished(links, out, facts, &mut Vec::new())
}

fn unfinished(links: &[Link], link: &Link, facts: &impl Facts, above: &mut Vec<u32>) -> Result<bool> {
    if above.contains(&link.ifindex) {
        return Ok(true);
    }
    if facts.gets_finished(link)? {
        return Ok(false);
    }
    if let Some(bus) = facts.bus(link) {
        return Ok(PARAVIRTUAL.contains(&bus.as_str()));
    }
    let below = below(links, link);
    if below.is_empty() || has_siblings(link) {
        return Ok(true);
    }
    above.push(link.ifindex);
    for lower in below {
        if unfinished(links, lower, facts, above)? {
            return Ok(true);
        }
    }
    above.pop();
    Ok(false)
}

fn has_siblings(link: &Link) -> bool {
    let (mode, flags) = (link.detail("mode"), link.detail("mode_flag"));
    SIBLINGS.contains(&link.kind()) && ![mode, flags].iter().flatten().any(|word| TO_OUTSIDE_ONLY.contains(word))
}

/// The devices at or below this interface whose own packets do not have the mark of the copies in them.
pub(crate) fn mark_losers<'a>(links: &'a [Link], out: &'a Link, facts: &impl Facts) -> Result<Vec<&'a Link>> {
    let (mut found, mut seen) = (Vec::new(), Vec::new());
    let mut left = vec![out];
    while let Some(link) = left.pop() {
        if seen.contains(&link.ifindex) {
            continue;
        }
        seen.push(link.ifindex);
        match carriers_of(links, link, facts)? {
            Some(below) => left.extend(below),
            None => found.push(link),
        }
    }
    Ok(found)
}

/// How many devices a packet passes from this interface to the lowest tunnel of the kernel's on its way, that one
/// included; 0 where there is none. Those tunnels drop what comes to them out of too many transmissions within one another.
pub(crate) fn tunnel_depth(links: &[Link], out: &Link, facts: &impl Facts) -> Result<usize> {
    let (mut deepest, mut seen, mut left) = (0, Vec::new(), vec![(out, 1)]);
    while let Some((link, depth)) = left.pop() {
        if seen.contains(&link.ifindex) {
            continue;
        }
        seen.push(link.ifindex);
        if TUNNELS.contains(&link.kind()) {
            deepest = deepest.max(depth);
        }
        left.extend(carriers_of(links, link, facts)?.into_iter().flatten().map(|lower| (lower, depth + 1)));
    }
    Ok(deepest)
}

/// A virtual device that sends its packets by this interface.
pub(crate) fn stands_on<'a>(links: &'a [Link], base: &Link) -> Option<&'a Link> {
    let is_upper = |link: &&Link| {
        let kinds = UPPER.iter().chain(&TUNNELS);
        link.lower() == Some(&base.ifname) && kinds.into_iter().any(|kind| *kind == link.kind())
    };
    named(links, base.master.as_deref()).or_else(|| links.iter().find(is_upper))
}

/// The devices that carry this one's packets on, their mark kept; none if that cannot be said.
fn carriers_of<'a>(links: &'a [Link], link: &Link, facts: &impl Facts) -> Result<Option<Vec<&'a Link>>> {
    let kind = link.kind();
    if TUNNELS.contains(&kind) {
        return Ok(tunnel_carrier(links, link, facts)?.map(|lower| vec![lower]));
    }
    let keeps = facts.bus(link).is_some() || UPPER.contains(&kind) || KEEPS_MARK.contains(&kind);
    Ok(keeps.then(|| below(links, link)))
}

/// The device that a tunnel's packets leave by: the one it is bound to, or that of the route to its other end.
fn tunnel_carrier<'a>(links: &'a [Link], link: &Link, facts: &impl Facts) -> Result<Option<&'a Link>> {
    if let Some(lower) = named(links, link.lower()) {
        return Ok(Some(lower));
    }
    let remote = ["remote", "remote6"].iter().find_map(|key| link.detail(key)?.parse().ok());
    let Some(remote) = remote.filter(|remote: &IpAddr| !remote.is_unspecified()) else { return Ok(None) };
    Ok(named(links, facts.way(remote)?.as_deref()))
}

#[cfg(test)]
#[path = "stack_test.rs"]
mod tests;
