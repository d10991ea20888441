//! From a request to what the machine has for it: interfaces, routes, out interfaces, neighbours. Reads only, except that
//! an unknown neighbour is asked for, as a packet to it would.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::datapath::abi::ETHERNET;
use crate::datapath::template::{self, Outer, Path};
use crate::request::{Oversize, Request, Underlay, Watch, Watched, example};
use crate::session::home::ALIAS;
use crate::session::machine::Machine;
use crate::session::stack;
use crate::session::stored::Stored;
use crate::tools::exec::{self, Runner};
use crate::tools::ip::{self, Link, RouteReply};
use crate::tools::kernel;

/// How long unknown neighbours may take: the kernel asks three times, a second apart.
const NEIGHBOUR_WAIT: Duration = Duration::from_millis(3500);

/// What is looked up.
#[derive(Clone, Debug, Default)]
pub(crate) struct Asked {
    /// The remotes whose way is looked up.
    pub remotes: Vec<IpAddr>,
    /// Those of them that the user has just named: where they can never be one, that is an error.
    pub new: Vec<IpAddr>,
    /// The argument that named them.
    pub argument: &'static str,
    /// The interfaces that are new, by the request's names: what the user should know of them is told.
    pub interfaces: Vec<String>,
}

impl Asked {
    /// A remote as the user knows it: by the argument that has just named it.
    fn named(&self, remote: IpAddr) -> String {
        let argument = if self.new.contains(&remote) { self.argument } else { "remote" };
        format!("{argument} {remote}")
    }

    /// What to do instead of naming one that can never be one.
    fn instead(&self, remote: IpAddr) -> String {
        match self.new.contains(&remote) {
            true => format!("name a collector elsewhere, as in: {}", example(self.argument, "10.0.0.7")),
            false => format!("take it out with: snifctl remote remove {remote}"),
        }
    }
}

/// Everything that the machine says about a request.
#[derive(Debug, Default)]
pub(crate) struct Resolved {
    pub remotes: BTreeMap<IpAddr, RemoteRoute>,
    /// Where out interfaces that are tunnels send their own packets.
    pub underlay: Vec<Underlay>,
    /// What the user should know although it does not stop us.
    pub warnings: Vec<Warning>,
}

/// What the user should know, of a remote or of all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Warning {
    pub remote: Option<IpAddr>,
    pub text: String,
}

/// The way to one remote.
#[derive(Debug)]
pub(crate) struct RemoteRoute {
    /// The out interface; `None` where there is no way.
    pub out: Option<Link>,
    pub outer: Outer,
}

/// The request with the names that its interfaces have now: one that was renamed is the same.
pub(crate) fn follow(stored: &Stored, machine: &Machine) -> Request {
    let mut request = stored.request.clone();
    for watched in &mut request.interfaces {
        let place = stored.interfaces.get(&watched.interface);
        let Some(link) = place.and_then(|place| machine.indexed(place.ifindex)) else { continue };
        if !link.altnames.contains(&watched.interface) {
            watched.interface = link.ifname.clone();
        }
    }
    request
}

/// The interfaces of a request, each with its link where it is there. By the number that the session knows, else by name.
pub(crate) fn interfaces(
    request: &Request,
    stored: Option<&Stored>,
    machine: &Machine,
) -> Vec<(Watched, Option<Link>)> {
    let place = |name: &str| {
        let stored = stored?;
        // One that was renamed since is known by its number, whatever the request calls it.
        stored.interfaces.get(name).map(|place| place.ifindex)
    };
    let known = |name: &str| {
        let link = machine.indexed(place(name)?)?;
        (link.ifname == name || link.altnames.iter().any(|alt| alt == name)).then_some(link)
    };
    let link = |name: &str| known(name).or_else(|| machine.named(name)).filter(|link| link.is_ethernet()).cloned();
    request.interfaces.iter().map(|watched| (watched.clone(), link(&watched.interface))).collect()
}

/// An interface that can be watched.
pub(crate) fn ensure_watchable(name: &str, machine: &Machine) -> Result<()> {
    let link = machine.named(name);
    let link = link.with_context(|| format!("IFACE {name} does not exist here; list interfaces with: ip link"))?;
    ensure!(
        link.is_ethernet(),
        "IFACE {name} has no Ethernet header (link type {}), which is not supported yet; watch the Ethernet interface \
         beneath it; list them with: ip link",
        link.link_type
    );
    ensure!(
        !link.ifalias.starts_with(ALIAS),
        "IFACE {name} is a relay of snifctl, which carries copies only; list other interfaces with: ip link"
    );
    Ok(())
}

/// No interface is there twice, by two of its names.
pub(crate) fn ensure_distinct(interfaces: &[(Watched, Option<Link>)]) -> Result<()> {
    let mut seen = BTreeSet::new();
    for link in interfaces.iter().filter_map(|(_, link)| link.as_ref()) {
        ensure!(
            seen.insert(link.ifindex),
            "IFACE {} is named twice, once by another name; name each interface once",
            link.ifname
        );
    }
    Ok(())
}

/// Looks up what is asked. `outs`: the out interfaces of the remotes that are not asked for.
pub(crate) fn resolve(
    machine: &Machine,
    request: &Request,
    interfaces: &[(Watched, Option<Link>)],
    asked: &Asked,
    outs: &[(IpAddr, Link)],
) -> Result<Resolved> {
    let runner = machine.runner;
    machine.routes(&asked.remotes)?;
    let mut resolved = Resolved::default();
    let mut ways: BTreeMap<IpAddr, Way> = BTreeMap::new();
    for remote in &asked.remotes {
        match way(machine, request, *remote, asked)? {
            Ok(way) => {
                ways.insert(*remote, way);
            }
            Err(problem) => resolved.problem(request, *remote, problem, asked)?,
        }
    }
    find_neighbours(runner, &mut ways)?;
    let others = outs.iter().map(|(remote, out)| (*remote, out)).filter(|(remote, _)| !ways.contains_key(remote));
    // What a new interface means for remotes that are there, and what a new way means for interfaces.
    for (remote, out) in others.filter(|_| !asked.interfaces.is_empty()) {
        let named = |text: String| anyhow::anyhow!("{text}");
        resolved.underlay.extend(underlay(machine, request, interfaces, remote, out, asked)?.map_err(named)?);
        too_deep(machine, interfaces, remote, out, asked)?.map_or(Ok(()), |text| Err(named(text)))?;
    }
    for (remote, way) in ways {
        let found = underlay(machine, request, interfaces, remote, &way.out, asked)?;
        let problem = match found {
            Err(text) => Some(text),
            Ok(underlay) => {
                resolved.underlay.extend(underlay);
                too_deep(machine, interfaces, remote, &way.out, asked)?
            }
        };
        match problem {
            Some(text) => resolved.problem(request, remote, Problem { text, is_for_ever: true }, asked)?,
            None => resolved.reach(machine, request, remote, way)?,
        }
    }
    resolved.warn(machine, request, interfaces, asked, outs);
    Ok(resolved)
}

impl Resolved {
    /// A remote that cannot be reached gets no copies: they are counted as `unresolved` until it can be.
    fn problem(&mut self, request: &Request, remote: IpAddr, problem: Problem, asked: &Asked) -> Result<()> {
        ensure!(!problem.is_for_ever || !asked.new.contains(&remote), "{}", problem.text);
        let unspecified = if remote.is_ipv6() { IpAddr::from([0u16; 8]) } else { IpAddr::from([0u8; 4]) };
        let options = &request.options;
        let outer = Outer { tunnel: options.tunnel, source: unspecified, remote, options: options.outer, path: None };
        self.remotes.insert(remote, RemoteRoute { out: None, outer });
        let text = format!("{}; until then its copies are counted as drops (unresolved)", problem.text);
        self.warnings.push(Warning { remote: Some(remote), text });
        Ok(())
    }

    fn reach(&mut self, machine: &Machine, request: &Request, remote: IpAddr, way: Way) -> Result<()> {
        let mut warn = |text: String| self.warnings.push(Warning { remote: Some(remote), text });
        if !way.out.is_up() {
            warn(format!("out interface {} is down: no copy leaves until: ip link set dev {0} up", way.out.ifname));
        }
        if way.next_hop_mac.is_none() && !way.out.is_l3() {
            warn(neighbour_warning(machine.runner, remote, &way));
        }
        let path = Path {
            ifindex: way.out.ifindex,
            mtu: path_mtu(&way),
            source_mac: way.out.mac().unwrap_or_default(),
            next_hop_mac: way.next_hop_mac,
            finish: stack::leaves_unfinished(&machine.links, &way.out, machine)?,
            per_frame: !kernel::encapsulates_frames(),
            l3: way.out.is_l3(),
            queued: way.out.has_queue(),
        };
        let options = &request.options;
        let (tunnel, outer) = (options.tunnel, options.outer);
        let outer = Outer { tunnel, source: way.source, remote, options: outer, path: Some(path) };
        self.remotes.insert(remote, RemoteRoute { out: Some(way.out), outer });
        Ok(())
    }

    /// What is to be said of interfaces and of all remotes together.
    fn warn(
        &mut self,
        machine: &Machine,
        request: &Request,
        interfaces: &[(Watched, Option<Link>)],
        asked: &Asked,
        outs: &[(IpAddr, Link)],
    ) {
        let watched: Vec<&Link> = interfaces.iter().filter_map(|(_, link)| link.as_ref()).collect();
        let is_new = |watched: &&(Watched, Option<Link>)| asked.interfaces.contains(&watched.0.interface);
        let new = interfaces.iter().filter(is_new).filter_map(|(_, link)| link.as_ref());
        let mut texts: Vec<String> = new.filter_map(down_warning).collect();
        let routes: Vec<&RemoteRoute> = self.remotes.values().collect();
        let outs = outs.iter().map(|(_, out)| out).chain(routes.iter().filter_map(|route| route.out.as_ref()));
        texts.extend(mtu_warning(request, &watched, &routes, &machine.links));
        if !asked.new.is_empty() || !asked.interfaces.is_empty() {
            texts.extend(rate_warning(request, &watched, outs));
        }
        self.warnings.extend(texts.into_iter().map(|text| Warning { remote: None, text }));
        let mut seen: Vec<String> = Vec::new();
        self.warnings.retain(|warning| {
            let is_new = !seen.contains(&warning.text);
            seen.push(warning.text.clone());
            is_new
        });
    }
}

/// Why a remote cannot be reached.
struct Problem {
    text: String,
    /// It will not pass by itself, as a missing route may.
    is_for_ever: bool,
}

impl Problem {
    fn for_ever(text: String) -> Problem {
        Problem { text, is_for_ever: true }
    }
}

/// A route that was found: the out interface and who answers for the remote there.
struct Way {
    out: Link,
    reply: RouteReply,
    source: IpAddr,
    next_hop: IpAddr,
    next_hop_mac: Option<[u8; 6]>,
}

impl Way {
    fn may_ask(&self) -> bool {
        self.next_hop_mac.is_none() && !self.out.is_l3() && self.out.is_up()
    }
}

/// The way to a remote, or why there is none.
fn way(machine: &Machine, request: &Request, remote: IpAddr, asked: &Asked) -> Result<Result<Way, Problem>> {
    let reply = match machine.route(remote)? {
        Ok(reply) => reply,
        Err(reason) => {
            let named = asked.named(remote);
            let text = format!("{named} has no route ({reason}); add one, as in: ip route add {remote} via GATEWAY");
            return Ok(Err(Problem { text, is_for_ever: false }));
        }
    };
    let problem = match reply.kind.as_str() {
        "local" => format!("{} is this machine itself; {}", asked.named(remote), asked.instead(remote)),
        "" | "unicast" => match machine.links.iter().find(|link| link.ifname == reply.dev) {
            None => format!("the route to {remote} names {}, which is gone; try again", reply.dev),
            Some(out) if out.link_type != "ether" && !out.is_l3() => format!(
                "{} is reached through {}, of link type {}, which is not supported; route it through another interface, as \
                 in: ip route add {remote} dev eth0",
                asked.named(remote),
                out.ifname,
                out.link_type
            ),
            Some(out) => {
                let next_hop = reply.gateway.unwrap_or(remote);
                let out = out.clone();
                return Ok(source(machine, request, remote, &reply)?
                    .map(|source| Way { out, next_hop, next_hop_mac: None, source, reply })
                    .map_err(Problem::for_ever));
            }
        },
        kind => format!("{} is a {kind} address here; {}", asked.named(remote), asked.instead(remote)),
    };
    Ok(Err(Problem::for_ever(problem)))
}

/// The outer source: the one asked for, if it is ours, or the one that the route prefers.
fn source(machine: &Machine, request: &Request, remote: IpAddr, reply: &RouteReply) -> Result<Result<IpAddr, String>> {
    let sources = &request.options.sources;
    if let Some(source) = sources.iter().find(|source| source.is_ipv6() == remote.is_ipv6()) {
        let ours = machine.addresses()?.iter().filter(|address| address.is_ipv6() == source.is_ipv6());
        let ours: Vec<IpAddr> = ours.filter(|address| !address.is_loopback()).copied().collect();
        if ours.contains(source) {
            return Ok(Ok(*source));
        }
        let shown = crate::request::listed(ours.iter().map(IpAddr::to_string));
        let shown = if shown.is_empty() { "none of that family".into() } else { shown };
        return Ok(Err(format!("--source {source} is not an address of this machine; it has: {shown}")));
    }
    let prefers = reply.prefsrc.filter(|source| source.is_ipv6() == remote.is_ipv6());
    Ok(prefers.ok_or_else(|| {
        format!("{0} has no address to send to {remote} from; add one: ip address add ADDR dev {0}", reply.dev)
    }))
}

/// Fills in the next hops' addresses; asks for those that are not known, all at once, unless this is a dry run.
fn find_neighbours(runner: &Runner, ways: &mut BTreeMap<IpAddr, Way>) -> Result<()> {
    let fill = |runner: &Runner, ways: &mut BTreeMap<IpAddr, Way>| -> Result<()> {
        if ways.values().all(|way| way.out.is_l3()) {
            return Ok(());
        }
        let known = ip::neighbours(runner)?;
        for way in ways.values_mut().filter(|way| !way.out.is_l3()) {
            let found = known.iter().find(|at| at.dst == way.next_hop && at.dev == way.out.ifname);
            way.next_hop_mac = found.and_then(ip::Neighbour::mac);
        }
        Ok(())
    };
    fill(runner, ways)?;
    let asked = ways.values().filter(|way| way.may_ask());
    let line =
        |way: &Way| format!("neigh replace {} dev {} use", way.next_hop, crate::tools::batch::word(&way.out.ifname));
    let mut lines: Vec<String> = asked.map(line).collect();
    lines.sort();
    lines.dedup();
    if lines.is_empty() {
        return Ok(());
    }
    if runner.dry_run {
        return lines.iter().try_for_each(|line| exec::print(&format!("ip {line}\n")));
    }
    ip::batch(runner, &lines)?;
    let start = Instant::now();
    let quiet = Runner { verbose: false, ..*runner };
    while start.elapsed() < NEIGHBOUR_WAIT && ways.values().any(Way::may_ask) {
        std::thread::sleep(Duration::from_millis(10));
        fill(&quiet, ways)?;
    }
    Ok(())
}

fn path_mtu(way: &Way) -> u32 {
    let route = way.reply.metrics.iter().filter_map(|metrics| metrics.mtu).min();
    route.map_or(way.out.mtu, |mtu| mtu.min(way.out.mtu))
}

/// Where copies would loop: an out interface that is a tunnel sends packets of its own, and where those pass a watched
/// interface they would be copied, sent through the tunnel, and so on. Most of the kernel's devices keep the mark that tells;
/// of WireGuard and user-space tunnels (tun, tap) the packets have to be known by where they go. Answers why it cannot be.
fn underlay(
    machine: &Machine,
    request: &Request,
    interfaces: &[(Watched, Option<Link>)],
    remote: IpAddr,
    out: &Link,
    asked: &Asked,
) -> Result<Result<Vec<Underlay>, String>> {
    if !request.options.underlay.is_empty() {
        return Ok(Ok(request.options.underlay.clone()));
    }
    let mut found = Vec::new();
    if interfaces.iter().all(|(watched, _)| watched.direction == Watch::Ingress) {
        return Ok(Ok(found));
    }
    for hider in stack::mark_losers(&machine.links, out, machine)? {
        let beside =
            interfaces.iter().filter_map(|(_, link)| link.as_ref()).filter(|link| link.ifindex != hider.ifindex);
        let beside = crate::request::listed(beside.map(|link| link.ifname.clone()));
        if beside.is_empty() {
            continue;
        }
        match machine.endpoints(hider) {
            Some(endpoints) => found.extend(endpoints),
            None => return Ok(Err(underlay_question(&asked.named(remote), out, hider, &beside))),
        }
    }
    Ok(Ok(found))
}

fn underlay_question(remote: &str, out: &Link, hider: &Link, watched: &str) -> String {
    let name = &hider.ifname;
    let over = if out.ifindex == hider.ifindex { String::new() } else { format!(" over {name}") };
    format!(
        "{remote} is reached through {}{over}, a tunnel whose own packets may pass {watched}: each copy would be copied \
         again; name where {name} sends them, or `none` if elsewhere, when the session is made: snifctl up --underlay \
         203.0.113.5:51820",
        out.ifname
    )
}

/// Tunnels of the kernel drop what comes to them out of more than four transmissions within one another. The relay takes
/// three, the tunnel is the fourth: nothing may stand between the two, nor on an interface whose outgoing packets are
/// watched, as what it sends is in a transmission already. What stands on it only to carry copies does not count.
fn too_deep(
    machine: &Machine,
    interfaces: &[(Watched, Option<Link>)],
    remote: IpAddr,
    out: &Link,
    asked: &Asked,
) -> Result<Option<String>> {
    let links = &machine.links;
    let depth = if kernel::limits_nesting() { stack::tunnel_depth(links, out, machine)? } else { 0 };
    if depth >= 2 {
        return Ok(Some(format!(
            "{} is reached through {}, which stands on a tunnel of the kernel's, or is one over another: copies would be \
             nested too deeply, and the kernel drops them; route it through another interface, as in: ip route add {remote} \
             dev eth0",
            asked.named(remote),
            out.ifname
        )));
    }
    let sending = interfaces.iter().filter(|(watched, _)| watched.direction != Watch::Ingress);
    for link in sending.filter_map(|(_, link)| link.as_ref()).filter(|_| depth > 0) {
        let Some(upper) = stack::stands_on(links, link).filter(|upper| upper.ifindex != out.ifindex) else { continue };
        return Ok(Some(format!(
            "{} is reached through the tunnel {}, and {} stands on {}: copies of what it sends would be nested too deeply, and \
             the kernel drops them; watch {2} itself, as in: snifctl up {2}",
            asked.named(remote),
            out.ifname,
            upper.ifname,
            link.ifname
        )));
    }
    Ok(None)
}

fn neighbour_warning(runner: &Runner, remote: IpAddr, way: &Way) -> String {
    let (next_hop, out) = (way.next_hop, &way.out.ifname);
    if runner.dry_run {
        return format!("{next_hop} is not known on {out} yet: its address is zero here, and `up` asks for it");
    }
    format!(
        "{next_hop} does not answer on {out}: copies are counted as drops (unresolved) until `snifctl sync` is run once it \
         does; check with: ping -c 1 {remote}"
    )
}

fn down_warning(link: &Link) -> Option<String> {
    let name = &link.ifname;
    (!link.is_up()).then(|| format!("{name} is down: it is watched, nothing passes until: ip link set dev {name} up"))
}

/// Copies that share a watched interface's link can take what its own packets need.
fn rate_warning<'a>(request: &Request, watched: &[&Link], mut outs: impl Iterator<Item = &'a Link>) -> Option<String> {
    if request.options.max_rate.is_some() {
        return None;
    }
    let shared = outs.find(|out| watched.iter().any(|link| link.ifindex == out.ifindex))?;
    Some(format!(
        "copies leave through {}, which is watched itself, and can take the room of its own packets; cap them, as in: \
         --max-rate 200mbit",
        shared.ifname
    ))
}

/// Says when exact copies cannot fit, with what is there and what it takes, for the tightest path.
fn mtu_warning(request: &Request, watched: &[&Link], remotes: &[&RemoteRoute], links: &[Link]) -> Option<String> {
    let options = &request.options;
    let largest = watched.iter().max_by_key(|link| link.mtu)?;
    let frame = (largest.mtu + ETHERNET as u32).min(options.snaplen.unwrap_or(u32::MAX));
    let needs = |route: &RemoteRoute| frame + template::overhead(&options.tunnel, route.outer.remote);
    let lacks = |route: &RemoteRoute| needs(route).saturating_sub(route.outer.path.map_or(u32::MAX, |path| path.mtu));
    let tightest = remotes.iter().filter(|route| route.out.is_some()).max_by_key(|route| lacks(route))?;
    let (needed, mtu, out) = (needs(tightest), tightest.outer.path?.mtu, tightest.out.as_ref()?);
    if mtu >= needed {
        return None;
    }
    let what = match options.snaplen {
        Some(bytes) if frame == bytes => format!("copies of {bytes} bytes of {}", largest.ifname),
        _ => format!("whole copies of {} (MTU {})", largest.ifname, largest.mtu),
    };
    let remote = tightest.outer.remote;
    // A larger MTU of a watched interface would need a still larger one.
    let fix = match watched.iter().any(|link| link.ifindex == out.ifindex) {
        true => format!(
            "; {} is watched itself, so send them another way, as in: ip route add {remote} dev OTHER",
            out.ifname
        ),
        false => ip::raise_mtu(links, out, needed).map_or_else(String::new, |fix| format!("; make room with: {fix}")),
    };
    Some(format!("MTU {mtu} towards {remote} is too small for {what}, which need {needed}: {}{fix}", fate(request)))
}

/// What becomes of copies that do not fit.
fn fate(request: &Request) -> &'static str {
    let options = &request.options;
    let tunnel = &options.tunnel;
    let whole = tunnel.patched().sequence == 0 && !tunnel.udp_checksum && options.snaplen.is_none();
    match (options.oversize, whole && kernel::encapsulates_frames(), options.outer.df) {
        (Oversize::Segment, true, false) => {
            "TCP super-packets are cut to fit, other frames that do not fit are fragmented"
        }
        (Oversize::Segment, true, true) => "TCP super-packets are cut to fit, other frames that do not fit are dropped",
        (Oversize::Segment | Oversize::Fragment, _, false) => "the outer packets of larger copies are fragmented",
        (Oversize::Truncate, ..) => "larger copies are cut",
        (Oversize::Segment | Oversize::Fragment, _, true) | (Oversize::Drop, ..) => "larger copies are dropped",
    }
}
