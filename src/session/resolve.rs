//! From a checked request to what the machine has for it: interfaces, routes, out interfaces, neighbours. Reads only,
//! except that an unknown neighbour is asked for, as a packet to it would.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::datapath::abi::ETHERNET;
use crate::datapath::template::{Outer, Path};
use crate::request::{Carrier, Oversize, Plan, Watch};
use crate::session::stack;
use crate::tools::exec::{Cmd, Runner};
use crate::tools::ip::{self, Link, RouteReply};
use crate::tools::kernel;

/// How long unknown neighbours may take: the kernel asks three times, a second apart.
const NEIGHBOUR_WAIT: Duration = Duration::from_millis(3500);

/// Everything that the machine says about a request.
#[derive(Debug)]
pub struct Resolved {
    /// The watched interfaces, in the order of the request.
    pub watched: Vec<Link>,
    /// One for each remote of the request, in its order.
    pub remotes: Vec<RemoteRoute>,
    /// Where out interfaces that are tunnels send their own packets.
    pub carriers: Vec<Carrier>,
    /// What the user should know although it does not stop us.
    pub warnings: Vec<String>,
}

/// The way to one remote.
#[derive(Debug)]
pub struct RemoteRoute {
    /// The out interface; `None` where there is no route.
    pub out: Option<Link>,
    pub outer: Outer,
}

/// Looks up everything that `plan` names.
pub fn resolve(runner: &Runner, plan: &Plan, links: &[Link]) -> Result<Resolved> {
    let watched = watched(plan, links)?;
    let mut ways = plan.remotes.iter().map(|remote| way(runner, plan, *remote, links)).collect::<Result<Vec<_>>>()?;
    if let [only] = ways.as_slice()
        && let Err(reason) = only
    {
        bail!("{reason}");
    }
    find_neighbours(runner, &mut ways)?;
    let mut warnings: Vec<String> = watched.iter().filter_map(down_warning).collect();
    let carriers = carriers(runner, plan, &watched, &ways, links)?;
    for (remote, way) in reached(plan, &ways) {
        ensure_not_too_deep(runner, plan, &watched, *remote, way, links)?;
    }
    let remotes =
        plan.remotes.iter().zip(ways).map(|(remote, way)| route(runner, plan, *remote, way, links, &mut warnings));
    let remotes = remotes.collect::<Result<Vec<_>>>()?;
    warnings.extend(mtu_warning(plan, &watched, &remotes));
    warnings.extend(rate_warning(plan, &watched, &remotes));
    warnings.dedup();
    Ok(Resolved { watched, remotes, carriers, warnings })
}

fn watched(plan: &Plan, links: &[Link]) -> Result<Vec<Link>> {
    let found = plan.watched.iter().map(|watched| watchable(&watched.interface, links)).collect::<Result<Vec<_>>>()?;
    for (at, link) in found.iter().enumerate() {
        let twice = found[..at].iter().any(|other| other.ifindex == link.ifindex);
        ensure!(!twice, "IFACE {} is named twice, once by another name; name each interface once", link.ifname);
    }
    Ok(found)
}

fn watchable(name: &String, links: &[Link]) -> Result<Link> {
    let link = links.iter().find(|link| &link.ifname == name || link.altnames.contains(name));
    let link = link.with_context(|| format!("IFACE {name} does not exist here; list interfaces with: ip link"))?;
    ensure!(
        link.is_ethernet(),
        "IFACE {name} has no Ethernet header (link type {}), which is not supported yet; watch the Ethernet interface \
         beneath it; list them with: ip link",
        link.link_type
    );
    ensure!(
        !link.ifalias.starts_with(crate::session::home::ALIAS),
        "IFACE {name} is a relay of snifctl, which carries copies only; list other interfaces with: ip link"
    );
    Ok(link.clone())
}

/// A route that was found: the out interface and who answers for the remote there.
struct Way {
    out: Link,
    reply: RouteReply,
    next_hop: IpAddr,
    next_hop_mac: Option<[u8; 6]>,
}

/// The remotes of the request that have a route, with it.
fn reached<'a>(plan: &'a Plan, ways: &'a [Result<Way, String>]) -> impl Iterator<Item = (&'a IpAddr, &'a Way)> {
    plan.remotes.iter().zip(ways).filter_map(|(remote, way)| Some((remote, way.as_ref().ok()?)))
}

impl Way {
    fn neighbour(&self, runner: &Runner) -> Result<Option<[u8; 6]>> {
        Ok(ip::neighbour(runner, self.next_hop, &self.out.ifname)?.and_then(|found| found.mac()))
    }

    fn may_ask(&self) -> bool {
        self.next_hop_mac.is_none() && !self.out.is_l3() && self.out.is_up()
    }
}

/// The way to a remote. What is wrong with the request is an error; a missing route is a reason, which need not stop
/// the other remotes.
fn way(runner: &Runner, plan: &Plan, remote: IpAddr, links: &[Link]) -> Result<Result<Way, String>> {
    let reply = match ip::route_get(runner, remote, None)? {
        Ok(reply) => reply,
        Err(reason) => {
            return Ok(Err(format!(
                "--remote {remote} has no route ({reason}); add one, as in: ip route add {remote} via GATEWAY"
            )));
        }
    };
    match reply.kind.as_str() {
        "local" => {
            bail!("--remote {remote} is this machine itself; name a collector elsewhere, as in: --remote 10.0.0.7")
        }
        "" | "unicast" => {}
        kind => bail!("--remote {remote} is a {kind} address here; name the collector's own, as in: --remote 10.0.0.7"),
    }
    let out = links.iter().find(|link| link.ifname == reply.dev);
    let out = out.with_context(|| format!("the route to {remote} names {}, which is gone; try again", reply.dev))?;
    ensure!(
        out.link_type == "ether" || out.is_l3(),
        "--remote {remote} is reached through {}, of link type {}, which is not supported; route it through another \
         interface, as in: ip route add {remote} dev eth0",
        out.ifname,
        out.link_type
    );
    source(runner, plan, remote, &reply)?;
    let next_hop = reply.gateway.unwrap_or(remote);
    Ok(Ok(Way { out: out.clone(), next_hop, next_hop_mac: None, reply }))
}

/// The outer source: the one asked for, if it is ours, or the one that the route prefers.
fn source(runner: &Runner, plan: &Plan, remote: IpAddr, reply: &RouteReply) -> Result<IpAddr> {
    if let Some(source) = plan.sources.iter().find(|source| source.is_ipv6() == remote.is_ipv6()) {
        let ours = ip::addresses(runner)?.into_iter().filter(|address| address.is_ipv6() == source.is_ipv6());
        let ours: Vec<IpAddr> = ours.collect();
        let shown: Vec<String> = ours.iter().map(IpAddr::to_string).collect();
        ensure!(
            ours.contains(source),
            "--source {source} is not an address of this machine; it has: {}",
            if shown.is_empty() { "none of that family".into() } else { shown.join(", ") }
        );
        return Ok(*source);
    }
    let prefers = reply.prefsrc.filter(|source| source.is_ipv6() == remote.is_ipv6());
    prefers
        .with_context(|| format!("{} has no address to send to {remote} from; name one with: --source ADDR", reply.dev))
}

/// Fills in the next hops' addresses; asks for those that are not known, all at once, unless this is a dry run.
fn find_neighbours(runner: &Runner, ways: &mut [Result<Way, String>]) -> Result<()> {
    for way in ways.iter_mut().flatten() {
        way.next_hop_mac = if way.out.is_l3() { None } else { way.neighbour(runner)? };
        if way.may_ask() {
            ip::probe_neighbour(runner, way.next_hop, &way.out.ifname)?;
        }
    }
    let start = Instant::now();
    let quiet = Runner { verbose: false, ..*runner };
    while !runner.dry_run && start.elapsed() < NEIGHBOUR_WAIT && ways.iter().flatten().any(Way::may_ask) {
        std::thread::sleep(Duration::from_millis(10));
        for way in ways.iter_mut().flatten().filter(|way| way.may_ask()) {
            way.next_hop_mac = way.neighbour(&quiet)?;
        }
    }
    Ok(())
}

fn route(
    runner: &Runner,
    plan: &Plan,
    remote: IpAddr,
    way: Result<Way, String>,
    links: &[Link],
    warnings: &mut Vec<String>,
) -> Result<RemoteRoute> {
    let unspecified = if remote.is_ipv6() { IpAddr::from([0u16; 8]) } else { IpAddr::from([0u8; 4]) };
    let mut outer = Outer { tunnel: plan.tunnel, source: unspecified, remote, options: plan.outer, path: None };
    let way = match way {
        Ok(way) => way,
        Err(reason) => {
            warnings.push(format!("{reason}; until then its copies are counted as drops (unresolved)"));
            return Ok(RemoteRoute { out: None, outer });
        }
    };
    if !way.out.is_up() {
        warnings
            .push(format!("out interface {} is down: no copy leaves until: ip link set dev {0} up", way.out.ifname));
    }
    if way.next_hop_mac.is_none() && !way.out.is_l3() {
        warnings.push(neighbour_warning(runner, remote, &way));
    }
    outer.source = source(runner, plan, remote, &way.reply)?;
    outer.path = Some(Path {
        ifindex: way.out.ifindex,
        mtu: path_mtu(&way),
        source_mac: way.out.mac().unwrap_or_default(),
        next_hop_mac: way.next_hop_mac,
        finish: stack::leaves_unfinished(links, &way.out, runner)?,
        per_frame: !kernel::encapsulates_frames(),
        l3: way.out.is_l3(),
        queued: way.out.has_queue(),
    });
    Ok(RemoteRoute { out: Some(way.out), outer })
}

fn path_mtu(way: &Way) -> u32 {
    let route = way.reply.metrics.iter().filter_map(|metrics| metrics.mtu).min();
    route.map_or(way.out.mtu, |mtu| mtu.min(way.out.mtu))
}

/// Where copies would loop: an out interface that is a tunnel sends packets of its own, and where those pass a watched
/// interface they would be copied, sent through the tunnel, and so on. Most of the kernel's devices keep the mark that tells;
/// of WireGuard and user-space tunnels (tun, tap) the packets have to be known by where they go.
fn carriers(
    runner: &Runner,
    plan: &Plan,
    watched: &[Link],
    ways: &[Result<Way, String>],
    links: &[Link],
) -> Result<Vec<Carrier>> {
    if let Some(carriers) = &plan.carriers {
        return Ok(carriers.clone());
    }
    let mut found = Vec::new();
    if plan.watched.iter().all(|watched| watched.direction == Watch::Ingress) {
        return Ok(found);
    }
    for (remote, way) in reached(plan, ways) {
        for hider in stack::mark_losers(links, &way.out, runner)? {
            let beside = watched.iter().filter(|link| link.ifindex != hider.ifindex);
            let beside: Vec<&str> = beside.map(|link| link.ifname.as_str()).collect();
            if beside.is_empty() {
                continue;
            }
            let endpoints = wireguard_endpoints(runner, hider);
            found.extend(endpoints.with_context(|| carrier_question(*remote, way, hider, &beside.join(", ")))?);
        }
    }
    Ok(found)
}

fn carrier_question(remote: IpAddr, way: &Way, hider: &Link, watched: &str) -> String {
    let name = &hider.ifname;
    let over = if way.out.ifindex == hider.ifindex { String::new() } else { format!(" over {name}") };
    format!(
        "--remote {remote} is reached through {}{over}, a tunnel whose own packets may pass {watched}: each copy would be copied \
         again; name where {name} sends them, or `none` if elsewhere, when the session is made: snifctl up --carrier 203.0.113.5:51820",
        way.out.ifname
    )
}

/// Tunnels of the kernel drop what comes to them out of more than four transmissions within one another. The relay takes
/// three, the tunnel is the fourth: nothing may stand between the two, nor on an interface whose outgoing packets are
/// watched, as what it sends is in a transmission already. What stands on it only to carry copies does not count.
fn ensure_not_too_deep(
    runner: &Runner,
    plan: &Plan,
    watched: &[Link],
    remote: IpAddr,
    way: &Way,
    links: &[Link],
) -> Result<()> {
    let out = &way.out;
    let depth = if kernel::limits_nesting() { stack::tunnel_depth(links, out, runner)? } else { 0 };
    ensure!(
        depth < 2,
        "--remote {remote} is reached through {}, which stands on a tunnel of the kernel's, or is one over another: copies \
         would be nested too deeply, and the kernel drops them; route it through another interface, as in: ip route add \
         {remote} dev eth0",
        out.ifname
    );
    let sending = watched.iter().zip(&plan.watched).filter(|(_, watched)| watched.direction != Watch::Ingress);
    for (link, _) in sending.filter(|_| depth > 0) {
        let Some(upper) = stack::stands_on(links, link).filter(|upper| upper.ifindex != out.ifindex) else { continue };
        bail!(
            "--remote {remote} is reached through the tunnel {}, and {} stands on {}: copies of what it sends would be nested \
             too deeply, and the kernel drops them; watch {1} itself, as in: snifctl up {1}",
            out.ifname,
            upper.ifname,
            link.ifname
        );
    }
    Ok(())
}

/// The endpoints of a WireGuard interface, by `wg`, if that is what it is and the tool is there.
fn wireguard_endpoints(runner: &Runner, out: &Link) -> Option<Vec<Carrier>> {
    if out.kind() != "wireguard" {
        return None;
    }
    let text = runner.read(&Cmd::new("wg", ["show", &out.ifname, "endpoints"])).ok()?;
    let endpoints = text.lines().filter_map(|line| line.split('\t').nth(1)?.parse::<std::net::SocketAddr>().ok());
    Some(endpoints.map(|at| Carrier { address: at.ip(), port: at.port() }).collect())
}

fn neighbour_warning(runner: &Runner, remote: IpAddr, way: &Way) -> String {
    let (next_hop, out) = (way.next_hop, &way.out.ifname);
    if runner.dry_run {
        return format!("{next_hop} is not known on {out} yet: its address is zero here, and `up` asks for it");
    }
    format!(
        "{next_hop} does not answer on {out}: copies are counted as drops (unresolved) until the same `snifctl up` is run \
         again once it does; check with: ping -c 1 {remote}"
    )
}

fn down_warning(link: &Link) -> Option<String> {
    let name = &link.ifname;
    (!link.is_up()).then(|| format!("{name} is down: it is watched, nothing passes until: ip link set dev {name} up"))
}

/// Copies that share a watched interface's link can take what its own packets need.
fn rate_warning(plan: &Plan, watched: &[Link], remotes: &[RemoteRoute]) -> Option<String> {
    let outs = remotes.iter().filter_map(|route| route.out.as_ref());
    let shared =
        outs.filter(|out| watched.iter().any(|link| link.ifindex == out.ifindex)).find(|_| plan.max_rate.is_none())?;
    Some(format!(
        "copies leave through {}, which is watched itself, and can take the room of its own packets; cap them, as in: \
         --max-rate 200mbit",
        shared.ifname
    ))
}

/// Says when exact copies cannot fit, with what is there and what it takes, for the tightest path.
fn mtu_warning(plan: &Plan, watched: &[Link], remotes: &[RemoteRoute]) -> Option<String> {
    let largest = watched.iter().max_by_key(|link| link.mtu)?;
    let frame = (largest.mtu + ETHERNET as u32).min(plan.snaplen.unwrap_or(u32::MAX));
    let needs = |route: &RemoteRoute| frame + plan.tunnel.overhead(route.outer.remote);
    let lacks = |route: &RemoteRoute| needs(route).saturating_sub(route.outer.path.map_or(u32::MAX, |path| path.mtu));
    let tightest = remotes.iter().filter(|route| route.out.is_some()).max_by_key(|route| lacks(route))?;
    let (needed, mtu, out) = (needs(tightest), tightest.outer.path?.mtu, tightest.out.as_ref()?);
    if mtu >= needed {
        return None;
    }
    let what = match plan.snaplen {
        Some(bytes) if frame == bytes => format!("copies of {bytes} bytes of {}", largest.ifname),
        _ => format!("whole copies of {} (MTU {})", largest.ifname, largest.mtu),
    };
    let remote = tightest.outer.remote;
    // A larger MTU of a watched interface would need a still larger one.
    let fix = match watched.iter().any(|link| link.ifindex == out.ifindex) {
        true => format!(
            "{} is watched itself, so send them another way, as in: ip route add {remote} dev OTHER",
            out.ifname
        ),
        false => format!("make room with: ip link set dev {} mtu {needed}", out.ifname),
    };
    Some(format!("MTU {mtu} towards {remote} is too small for {what}, which need {needed}: {}; {fix}", fate(plan)))
}

/// What becomes of copies that do not fit.
fn fate(plan: &Plan) -> &'static str {
    let whole = plan.tunnel.patched().sequence == 0 && !plan.tunnel.udp_checksum && plan.snaplen.is_none();
    match (plan.oversize, whole && kernel::encapsulates_frames(), plan.outer.df) {
        (Oversize::Segment, true, false) => {
            "TCP super-packets are cut to fit, other frames that do not fit are fragmented"
        }
        (Oversize::Segment, true, true) => "TCP super-packets are cut to fit, other frames that do not fit are dropped",
        (Oversize::Segment | Oversize::Fragment, _, false) => "the outer packets of larger copies are fragmented",
        (Oversize::Truncate, ..) => "larger copies are cut",
        (Oversize::Segment | Oversize::Fragment, _, true) | (Oversize::Drop, ..) => "larger copies are dropped",
    }
}
