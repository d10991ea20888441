//! From a checked request to what the machine has for it: interfaces, route, out interface, neighbour. Reads only,
//! except that an unknown neighbour is asked for, as a packet to it would.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::exec::Shell;
use crate::header::{ETH, Outer};
use crate::ip::{self, Link, RouteReply};
use crate::plan::{Oversize, Plan};

/// How long an unknown neighbour may take: the kernel asks three times, a second apart.
const NEIGHBOUR_WAIT: Duration = Duration::from_millis(3500);

/// Everything that the machine says about a request.
#[derive(Debug)]
pub struct Resolved {
    /// The watched interfaces, in the order of the request.
    pub watched: Vec<Link>,
    pub out: Link,
    pub outer: Outer,
    /// What the user should know although it does not stop us.
    pub warnings: Vec<String>,
}

/// Looks up everything that `plan` names.
pub fn resolve(shell: &Shell, plan: &Plan, links: &[Link]) -> Result<Resolved> {
    let watched = watched(plan, links)?;
    let reply = route(shell, plan)?;
    let out = links.iter().find(|link| link.ifname == reply.dev);
    let out = out.with_context(|| {
        format!(
            "the route to {} names {}, which is gone; try again",
            plan.remote, reply.dev
        )
    })?;
    ensure_out(plan, out)?;
    let source = source(shell, plan, &reply)?;
    let next_hop = reply.gateway.unwrap_or(IpAddr::V4(plan.remote));
    let next_hop_mac = neighbour(shell, next_hop, out)?;
    let mut warnings = down_warnings(&watched, out);
    if next_hop_mac.is_none() && out.link_type == "ether" {
        warnings.push(neighbour_warning(shell, plan, next_hop, out));
    }
    let outer = Outer {
        tunnel: plan.tunnel,
        source,
        remote: plan.remote,
        options: plan.outer,
        source_mac: out.mac().unwrap_or_default(),
        next_hop_mac,
        ifindex: out.ifindex,
        mtu: path_mtu(&reply, out),
        finish: needs_finishing(shell, out)?,
    };
    warnings.extend(mtu_warning(plan, &watched, out, &outer));
    Ok(Resolved {
        watched,
        out: out.clone(),
        outer,
        warnings,
    })
}

fn watched(plan: &Plan, links: &[Link]) -> Result<Vec<Link>> {
    let find = |name: &String| {
        let link = links
            .iter()
            .find(|link| &link.ifname == name || link.altnames.contains(name));
        let link = link.with_context(|| format!("IFACE {name} does not exist here; list interfaces with: ip link"))?;
        ensure!(
            link.is_ethernet(),
            "IFACE {name} has no Ethernet header (link type {}), which is not supported yet; watch the Ethernet \
             interface beneath it; list them with: ip link",
            link.link_type
        );
        ensure!(
            !link.ifalias.starts_with(crate::session::ALIAS),
            "IFACE {name} is a relay of snifctl, which carries copies only; list other interfaces with: ip link"
        );
        Ok(link.clone())
    };
    let found = plan.interfaces.iter().map(find).collect::<Result<Vec<_>>>()?;
    for (at, link) in found.iter().enumerate() {
        let twice = found[..at].iter().any(|other| other.ifindex == link.ifindex);
        ensure!(
            !twice,
            "IFACE {} is named twice, once by another name; name each interface once",
            link.ifname
        );
    }
    Ok(found)
}

fn route(shell: &Shell, plan: &Plan) -> Result<RouteReply> {
    let remote = plan.remote;
    let reply = match ip::route_get(shell, remote, None)? {
        Ok(reply) => reply,
        Err(reason) => {
            bail!("--remote {remote} has no route ({reason}); add one, as in: ip route add {remote} via GATEWAY")
        }
    };
    match reply.kind.as_str() {
        "local" => {
            bail!("--remote {remote} is this machine itself; name a collector elsewhere, as in: --remote 10.0.0.7")
        }
        "" | "unicast" => Ok(reply),
        kind => bail!("--remote {remote} is a {kind} address here; name the collector's own, as in: --remote 10.0.0.7"),
    }
}

fn ensure_out(plan: &Plan, out: &Link) -> Result<()> {
    ensure!(
        out.link_type == "ether",
        "--remote {} is reached through {}, which has no Ethernet header (link type {}): not supported yet; route it \
         through an Ethernet interface, as in: ip route add {} dev eth0",
        plan.remote,
        out.ifname,
        out.link_type,
        plan.remote
    );
    Ok(())
}

/// The outer source: the one asked for, if it is ours, or the one that the route prefers.
fn source(shell: &Shell, plan: &Plan, reply: &RouteReply) -> Result<Ipv4Addr> {
    if let Some(source) = plan.source {
        let ours: Vec<IpAddr> = ip::addresses(shell)?.into_iter().filter(IpAddr::is_ipv4).collect();
        let shown: Vec<String> = ours.iter().map(IpAddr::to_string).collect();
        ensure!(
            ours.contains(&IpAddr::V4(source)),
            "--source {source} is not an address of this machine; it has: {}",
            shown.join(", ")
        );
        return Ok(source);
    }
    match reply.prefsrc {
        Some(IpAddr::V4(source)) => Ok(source),
        _ => bail!(
            "{} has no IPv4 address to send from; name one with: --source ADDR",
            reply.dev
        ),
    }
}

fn path_mtu(reply: &RouteReply, out: &Link) -> u32 {
    let route = reply.metrics.iter().filter_map(|metrics| metrics.mtu).min();
    route.map_or(out.mtu, |mtu| mtu.min(out.mtu))
}

/// A veth hands packets on with checksums and segments unfinished, so a collector behind it would see what no wire
/// ever carried. A real device finishes them on transmission.
fn needs_finishing(shell: &Shell, out: &Link) -> Result<bool> {
    Ok(out.linkinfo.info_kind == "veth" && ip::offloads_checksums(shell, &out.ifname)?)
}

/// The next hop's address; asks for it when it is not known, unless this is a dry run.
fn neighbour(shell: &Shell, next_hop: IpAddr, out: &Link) -> Result<Option<[u8; 6]>> {
    let known = |shell: &Shell| ip::neighbour(shell, next_hop, &out.ifname).map(|found| found.and_then(|n| n.mac()));
    let mac = known(shell)?;
    if mac.is_some() || !out.is_up() {
        return Ok(mac);
    }
    ip::probe_neighbour(shell, next_hop, &out.ifname)?;
    if shell.dry_run {
        return Ok(None);
    }
    let start = Instant::now();
    let quiet = Shell {
        verbose: false,
        ..*shell
    };
    while start.elapsed() < NEIGHBOUR_WAIT {
        std::thread::sleep(Duration::from_millis(10));
        if let Some(mac) = known(&quiet)? {
            return Ok(Some(mac));
        }
    }
    Ok(None)
}

fn neighbour_warning(shell: &Shell, plan: &Plan, next_hop: IpAddr, out: &Link) -> String {
    if shell.dry_run {
        return format!(
            "{next_hop} is not known on {} yet: its address is zero here, and `up` asks for it",
            out.ifname
        );
    }
    format!(
        "{next_hop} does not answer on {}: copies are counted as drops (neighbour) until the same `snifctl up` is run \
         again once it does; check with: ping -c 1 {}",
        out.ifname, plan.remote
    )
}

fn down_warnings(watched: &[Link], out: &Link) -> Vec<String> {
    let down = watched.iter().filter(|link| !link.is_up());
    let mut warnings: Vec<String> = down
        .map(|link| {
            format!(
                "{} is down: it is watched, nothing passes until: ip link set dev {0} up",
                link.ifname
            )
        })
        .collect();
    if !out.is_up() {
        warnings.push(format!(
            "out interface {} is down: no copy leaves until: ip link set dev {0} up",
            out.ifname
        ));
    }
    warnings
}

/// Says when exact copies cannot fit, with what is there and what it takes.
fn mtu_warning(plan: &Plan, watched: &[Link], out: &Link, outer: &Outer) -> Option<String> {
    let largest = watched.iter().max_by_key(|link| link.mtu)?;
    let needed = largest.mtu + ETH as u32 + plan.tunnel.overhead();
    if outer.mtu >= needed {
        return None;
    }
    let fate = match plan.oversize {
        Oversize::Segment => "TCP super-packets are cut to fit, other frames that do not fit are fragmented",
        Oversize::Fragment => "the outer packets of larger copies are fragmented",
        Oversize::Truncate => "larger copies are cut",
        Oversize::Drop => "larger copies are dropped",
    };
    Some(format!(
        "MTU {} towards {} is too small for whole copies of {} (MTU {}), which need {needed}: {fate}; mend with: ip link \
         set dev {} mtu {needed}",
        outer.mtu, plan.remote, largest.ifname, largest.mtu, out.ifname
    ))
}
