//! From a request to what the machine has for it: interfaces, routes, out interfaces, neighbours. Reads only, except that
//! an unknown neighbour is asked for, as a packet to it would.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::datapath::abi::ETHERNET;
use crate::datapath::template::{self, Outer, Path};
use crate::request::{Oversize, Probe, Request, Underlay, Watch, Watched, example};
use crate::session::away;
use crate::session::home::ALIAS;
use crate::session::machine::Machine;
use crate::session::pattern;
use crate::session::probe;
use crate::session::stack;
use crate::session::stored::{Hop, Silence, Stored};
use crate::tools::exec::{self, Runner};
use crate::tools::interrupt;
use crate::tools::ip::{self, Link, Neighbour, Packet, RouteReply};
use crate::tools::kernel;
use crate::tools::requirements;
use crate::tools::rights;
use crate::tunnel::PROTO_UDP;

/// How long unknown neighbours may take: the kernel asks three times, a second apart.
const NEIGHBOUR_WAIT: Duration = Duration::from_millis(3500);

/// The same of those that have not answered before: an answer takes no longer, and comes to the second question of the
/// kernel's at the latest where it is asking already. Who waits for others is not to wait for these.
const QUICK_ANSWER: Duration = Duration::from_millis(500);
const SECOND_QUESTION: Duration = Duration::from_millis(1200);

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
    /// Only look: no neighbour is asked, nothing is waited for.
    pub passive: bool,
    /// With it: they are asked, and nobody waits for the answers.
    pub sends: bool,
    /// Where the session's rows send copies now, by remote: out interface and link address.
    pub known: BTreeMap<IpAddr, (u32, [u8; 6])>,
    /// The remotes that are down.
    pub down: BTreeMap<IpAddr, Silence>,
    /// Those whose next hops have not answered when they were asked last.
    pub unanswered: BTreeSet<IpAddr>,
    /// Which remotes answer ping, where somebody has asked just now: then nobody is pinged.
    pub pinged: Option<BTreeMap<IpAddr, bool>>,
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
    /// The neighbour table, where it was read.
    pub neighbours: Option<Vec<Neighbour>>,
    /// Interfaces that a pattern matches, and that cannot be watched while copies leave as they do.
    pub unfit: BTreeSet<u32>,
}

/// What the user should know, of a remote or of all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Warning {
    pub remote: Option<IpAddr>,
    pub text: String,
    /// Said each time, not only with a change of the remote.
    pub is_of_now: bool,
    /// Of one change: it is not said again when the machine is looked at anew.
    pub is_once: bool,
}

/// The way to one remote.
#[derive(Debug)]
pub(crate) struct RemoteRoute {
    /// The out interface; `None` where there is no way.
    pub out: Option<Link>,
    pub outer: Outer,
    /// Its next hop, where that is a neighbour whose address can change.
    pub hop: Option<NextHop>,
    /// Why it is down, if it is.
    pub silence: Option<Silence>,
}

/// Who takes the copies to a remote, as the neighbour table has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NextHop {
    pub hop: Hop,
    pub dev: String,
    /// Its address is known, and the kernel can keep it fresh and does not.
    pub is_unkept: bool,
}

/// The request with the names that its interfaces have now: one that was renamed is the same.
pub(crate) fn follow(stored: &Stored, machine: &Machine) -> Request {
    let mut request = stored.request.clone();
    for watched in &mut request.interfaces {
        // What came by a pattern is not called anything in the request.
        let place = stored.interfaces.get(&watched.interface).filter(|place| place.pattern.is_none());
        let Some(link) = place.and_then(|place| machine.indexed(place.ifindex)) else { continue };
        if !link.altnames.contains(&watched.interface) {
            watched.interface = link.ifname.clone();
        }
    }
    request
}

/// The interfaces of a request, each with its link where it is there; in the place of a pattern those that it matches.
pub(crate) fn interfaces(
    request: &Request,
    stored: Option<&Stored>,
    machine: &Machine,
) -> Vec<(Watched, Option<Link>)> {
    pattern::expand(request, stored, &machine.links).interfaces
}

/// An interface that can be watched, or a pattern that matches one. `waits`: it may be absent, and `sync` watches it as soon
/// as it is there.
pub(crate) fn ensure_there(text: &str, stored: Option<&Stored>, machine: &Machine, waits: bool) -> Result<()> {
    if !pattern::is_open(text, stored, &machine.links) {
        let is_awaited = waits && machine.named(text).is_none();
        return if is_awaited { Ok(()) } else { ensure_watchable(text, machine) };
    }
    if let Some((origin, _)) = away::parts(text).filter(|_| !waits && !pattern::any(text, &machine.links)) {
        return away::refusal(text, machine.elsewhere.absent.get(origin));
    }
    ensure!(
        waits || pattern::any(text, &machine.links),
        "IFACE {} matches no interface here that can be watched; to wait for one, add --wait-for-interface; list interfaces \
         with: ip link",
        exec::quote(text)
    );
    Ok(())
}

/// An interface that can be watched.
pub(crate) fn ensure_watchable(name: &str, machine: &Machine) -> Result<()> {
    let link = machine.named(name);
    if let Some((origin, _)) = away::parts(name).filter(|_| link.is_none()) {
        return away::refusal(name, machine.elsewhere.absent.get(origin));
    }
    let link = link.with_context(|| no_interface(name))?;
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

fn no_interface(name: &str) -> String {
    format!("IFACE {name} does not exist here; to wait for it, add --wait-for-interface; list interfaces with: ip link")
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
    let packets: Vec<Packet> = asked.remotes.iter().map(|remote| packet(request, *remote)).collect();
    machine.routes(&packets)?;
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
    resolved.neighbours = find_neighbours(runner, &mut ways, asked)?;
    ping(runner, request, &mut ways, asked)?;
    let all_outs = ways.values().map(|way| &way.out).chain(outs.iter().map(|(_, out)| out));
    resolved.leave_out(machine, request, interfaces, all_outs)?;
    let fit =
        interfaces.iter().filter(|(_, link)| link.as_ref().is_none_or(|at| !resolved.unfit.contains(&at.ifindex)));
    let interfaces: &[(Watched, Option<Link>)] = &fit.cloned().collect::<Vec<_>>();
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
    /// Takes out what cannot be watched.
    pub(crate) fn keep_fit(&self, interfaces: &mut Vec<(Watched, Option<Link>)>) {
        interfaces.retain(|(_, link)| link.as_ref().is_none_or(|link| !self.unfit.contains(&link.ifindex)));
    }

    /// What would be refused if it were named is left out where a pattern matches it: see [`too_deep`].
    fn leave_out<'a>(
        &mut self,
        machine: &Machine,
        request: &Request,
        interfaces: &[(Watched, Option<Link>)],
        outs: impl Iterator<Item = &'a Link>,
    ) -> Result<()> {
        let is_sent = |(watched, link): &&(Watched, Option<Link>)| {
            let by = link.as_ref().and_then(|link| pattern::of(request, &watched.interface, link));
            by.is_some() && watched.direction != Watch::Ingress
        };
        let matched: Vec<&Link> = interfaces.iter().filter(is_sent).filter_map(|(_, link)| link.as_ref()).collect();
        if matched.is_empty() || !kernel::limits_nesting() {
            return Ok(());
        }
        for out in outs {
            if stack::tunnel_depth(&machine.links, out, machine)? == 0 {
                continue;
            }
            for link in &matched {
                let upper = stack::stands_on(&machine.links, link).filter(|upper| upper.ifindex != out.ifindex);
                let Some(upper) = upper.filter(|_| self.unfit.insert(link.ifindex)) else { continue };
                let text = format!(
                    "{} is left out: {} stands on it, and copies of what that sends would be nested too deeply in the tunnel {}",
                    link.ifname, upper.ifname, out.ifname
                );
                self.warnings.push(Warning { remote: None, text, is_of_now: false, is_once: false });
            }
        }
        Ok(())
    }

    /// A remote that cannot be reached gets no copies: they are counted as `unresolved` until it can be.
    fn problem(&mut self, request: &Request, remote: IpAddr, problem: Problem, asked: &Asked) -> Result<()> {
        ensure!(!problem.is_for_ever || !asked.new.contains(&remote), "{}", problem.text);
        let unspecified = if remote.is_ipv6() { IpAddr::from([0u16; 8]) } else { IpAddr::from([0u8; 4]) };
        let options = &request.options;
        let outer = Outer { tunnel: options.tunnel, source: unspecified, remote, options: options.outer, path: None };
        self.remotes.insert(remote, RemoteRoute { out: None, outer, hop: None, silence: None });
        let text = format!("{}; until then its copies are counted as drops (unresolved)", problem.text);
        self.warnings.push(Warning { remote: Some(remote), text, is_of_now: false, is_once: false });
        Ok(())
    }

    fn reach(&mut self, machine: &Machine, request: &Request, remote: IpAddr, way: Way) -> Result<()> {
        let mut warn = |text: String, is_of_now| {
            self.warnings.push(Warning { remote: Some(remote), text, is_of_now, is_once: false });
        };
        if !way.out.is_up() {
            warn(
                format!("out interface {} is down: no copy leaves until: ip link set dev {0} up", way.out.ifname),
                false,
            );
        }
        if way.next_hop_mac.is_none() && !way.out.is_l3() {
            warn(neighbour_warning(machine.runner, remote, &way), false);
        } else if let Some(silence) = way.silence {
            warn(rest_warning(remote, &way, silence), true);
        } else if let Some(mac) = way.next_hop_mac.filter(|_| way.is_silent) {
            warn(silent_warning(&way, mac), true);
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
        self.remotes.insert(remote, RemoteRoute { out: Some(way.out), outer, hop: way.hop, silence: way.silence });
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
        let note = |is_of_now| move |text| Warning { remote: None, text, is_of_now, is_once: false };
        self.warnings.extend(machine.elsewhere.left_out.iter().cloned().map(note(false)));
        self.warnings.extend(machine.elsewhere.unknown().into_iter().map(note(true)));
        let watched: Vec<&Link> = interfaces.iter().filter_map(|(_, link)| link.as_ref()).collect();
        let is_new = |watched: &&(Watched, Option<Link>)| asked.interfaces.contains(&watched.0.interface);
        // A pattern stands for whatever is there.
        let is_named = |(watched, link): &&(Watched, Option<Link>)| {
            link.as_ref().is_some_and(|link| pattern::of(request, &watched.interface, link).is_none())
        };
        let new = interfaces.iter().filter(is_new).filter(is_named).filter_map(|(_, link)| link.as_ref());
        let mut texts: Vec<String> = new.filter_map(down_warning).collect();
        let routes: Vec<&RemoteRoute> = self.remotes.values().collect();
        let outs = outs.iter().map(|(_, out)| out).chain(routes.iter().filter_map(|route| route.out.as_ref()));
        texts.extend(mtu_warning(request, &watched, &routes, &machine.links));
        if !asked.interfaces.is_empty() {
            texts.extend(doubles_warning(&watched));
        }
        if !asked.new.is_empty() || !asked.interfaces.is_empty() {
            texts.extend(rate_warning(request, &watched, outs));
        }
        self.warnings.extend(texts.into_iter().map(|text| Warning {
            remote: None,
            text,
            is_of_now: false,
            is_once: false,
        }));
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
    hop: Option<NextHop>,
    /// It was asked and has not answered: the address is what was known before.
    is_silent: bool,
    silence: Option<Silence>,
    /// How long its answer may take.
    patience: Duration,
}

impl Way {
    fn neighbour<'a>(&self, table: &'a [Neighbour]) -> Option<&'a Neighbour> {
        table.iter().find(|at| at.dst == self.next_hop && at.dev == self.out.ifname)
    }

    /// Is there somebody to ask for its next hop?
    fn can_be_asked(&self) -> bool {
        !self.out.is_l3() && self.out.is_up() && !self.out.asks_nobody()
    }

    /// Must its next hop be asked, by what the table says?
    fn is_open(&self, table: &[Neighbour]) -> bool {
        self.can_be_asked() && !self.neighbour(table).is_some_and(Neighbour::is_sure)
    }

    /// The line that asks it: by unicast where it is known, else as a packet to it would.
    fn question(&self, table: &[Neighbour]) -> String {
        let known = self.neighbour(table);
        let how = if known.is_some_and(|at| at.mac().is_some()) { "nud probe" } else { "use" };
        // The flag goes where it is not said again.
        let kept = if known.is_some_and(Neighbour::is_managed) { " managed" } else { "" };
        format!("neigh replace {} dev {} {how}{kept}", self.next_hop, crate::tools::batch::word(&self.out.ifname))
    }

    /// Its next hop as an entry that the kernel could keep fresh. `before`: the table before anybody was asked.
    fn hop(&self, before: &[Neighbour], now: &[Neighbour], asked: &Asked, dry_run: bool) -> Option<NextHop> {
        let entry = self.neighbour(now);
        if self.out.is_l3() || self.out.asks_nobody() || entry.is_some_and(Neighbour::is_set) {
            return None;
        }
        let was_there = self.neighbour(before).is_some_and(|at| at.mac().is_some());
        let is_asked = !asked.passive && !dry_run;
        // One that was asked is in the table, unless it is of a kind that `ip` does not list. A dry run takes it that who
        // would be asked would answer.
        let is_known = match entry {
            None if is_asked => false,
            _ => self.next_hop_mac.is_some() || (dry_run && !asked.passive),
        };
        Some(NextHop {
            hop: Hop { address: self.next_hop, ifindex: self.out.ifindex, made: !was_there },
            dev: self.out.ifname.clone(),
            is_unkept: is_known && !entry.is_some_and(Neighbour::is_managed),
        })
    }

    /// Does its next hop not answer? Where nobody has asked now, the table says what the kernel has found, and the session
    /// what it was before. A late answer is none: so an entry that is old, or is being asked, is not silent.
    fn has_failed(&self, remote: IpAddr, asked: &Asked, table: &[Neighbour], is_asking: bool) -> bool {
        let entry = self.neighbour(table);
        let was_down = asked.down.get(&remote) == Some(&Silence::Neighbour);
        self.next_hop_mac.is_some()
            && self.is_open(table)
            && match is_asking {
                true => entry.is_some_and(Neighbour::is_unanswered),
                false => was_down || entry.is_some_and(Neighbour::has_failed),
            }
    }

    /// Where the session sends copies now, if that is no other neighbour's address.
    fn address_of_before(&self, remote: IpAddr, asked: &Asked, table: &[Neighbour]) -> Option<[u8; 6]> {
        let (ifindex, mac) = *asked.known.get(&remote)?;
        let is_other = |at: &Neighbour| {
            // One of the other family is often the same machine.
            let is_elsewhere = at.dst != self.next_hop && at.dst.is_ipv6() == self.next_hop.is_ipv6();
            is_elsewhere && at.dev == self.out.ifname && at.mac() == Some(mac)
        };
        (ifindex == self.out.ifindex && !table.iter().any(is_other)).then_some(mac)
    }
}

/// Of the UDP source ports, which the programs choose by flow, the one that routes are looked up for.
const SOURCE_PORT: u16 = 49152;

/// What the route of copies to a remote is looked up for. As a socket that is not bound, one lookup without a source
/// where none is asked for: the source that it answers is what copies have.
fn packet(request: &Request, remote: IpAddr) -> Packet {
    let options = &request.options;
    let ports = (options.tunnel.protocol() == PROTO_UDP).then(|| (SOURCE_PORT, options.tunnel.udp_port()));
    Packet { to: remote, from: asked_source(request, remote), tos: options.outer.tos, ports }
}

/// The source of copies to a remote, where the user has chosen one.
fn asked_source(request: &Request, remote: IpAddr) -> Option<IpAddr> {
    request.options.sources.iter().find(|source| source.is_ipv6() == remote.is_ipv6()).copied()
}

/// The way to a remote, or why there is none.
fn way(machine: &Machine, request: &Request, remote: IpAddr, asked: &Asked) -> Result<Result<Way, Problem>> {
    // Of a source that is not ours the kernel has no route either: the better reason goes first.
    if let Some(Err(text)) = asked_source(request, remote).map(|source| ensure_ours(machine, source)).transpose()? {
        return Ok(Err(Problem::for_ever(text)));
    }
    let reply = match machine.route(packet(request, remote))? {
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
                let next_hop = reply.next_hop(remote);
                let out = out.clone();
                return Ok(source(request, remote, &reply)
                    .map(|source| Way {
                        out,
                        reply,
                        source,
                        next_hop,
                        next_hop_mac: None,
                        hop: None,
                        is_silent: false,
                        silence: None,
                        patience: NEIGHBOUR_WAIT,
                    })
                    .map_err(Problem::for_ever));
            }
        },
        kind => format!("{} is a {kind} address here; {}", asked.named(remote), asked.instead(remote)),
    };
    Ok(Err(Problem::for_ever(problem)))
}

/// Is this an address that copies can be sent from? Why not, else.
fn ensure_ours(machine: &Machine, source: IpAddr) -> Result<Result<(), String>> {
    let ours = machine.addresses()?.iter().filter(|address| address.is_ipv6() == source.is_ipv6());
    let ours: Vec<IpAddr> = ours.filter(|address| !address.is_loopback()).copied().collect();
    if ours.contains(&source) {
        return Ok(Ok(()));
    }
    let shown = crate::request::listed(ours.iter().map(IpAddr::to_string));
    let shown = if shown.is_empty() { "none of that family".into() } else { shown };
    Ok(Err(format!("--source {source} is not an address of this machine; it has: {shown}")))
}

/// The outer source: the one asked for, or the one that the route prefers.
fn source(request: &Request, remote: IpAddr, reply: &RouteReply) -> Result<IpAddr, String> {
    let prefers = || reply.prefsrc.filter(|source| source.is_ipv6() == remote.is_ipv6());
    asked_source(request, remote).or_else(prefers).ok_or_else(|| {
        format!("{0} has no address to send to {remote} from; add one: ip address add ADDR dev {0}", reply.dev)
    })
}

/// Fills in the next hops' addresses. What is not sure is asked for, all at once: also an old address, which may have gone
/// over to another. A dry run prints the questions, and [`Asked::passive`] leaves them.
/// Answers the table of then.
fn find_neighbours(runner: &Runner, ways: &mut BTreeMap<IpAddr, Way>, asked: &Asked) -> Result<Option<Vec<Neighbour>>> {
    if ways.values().all(|way| way.out.is_l3()) {
        return Ok(None);
    }
    let before = ip::neighbours(runner)?;
    let is_asking = !asked.passive && !runner.dry_run;
    let now = if is_asking { ask_twice(runner, ways, asked, &before)? } else { before.clone() };
    if asked.passive && asked.sends && !runner.dry_run {
        let is_being_asked = |way: &Way| way.neighbour(&now).is_some_and(Neighbour::is_being_asked);
        let lines = questions(ways, &now, |_, way| !is_being_asked(way));
        // That one cannot be asked is seen by what becomes of it.
        if !lines.is_empty() && ip::batch(runner, None, &lines).is_err() {
            interrupt::check()?;
        }
    }
    if runner.dry_run && !asked.passive {
        let lines = questions(ways, &now, |_, _| true);
        lines.iter().try_for_each(|line| exec::print(&format!("ip {line}\n")))?;
    }
    for (remote, way) in ways.iter_mut().filter(|(_, way)| !way.out.is_l3()) {
        let known = |table| way.neighbour(table).and_then(Neighbour::mac);
        let mac = known(&now).or_else(|| known(&before)).or_else(|| way.address_of_before(*remote, asked, &now));
        (way.is_silent, way.next_hop_mac) = (is_asking && way.is_open(&now), mac);
        way.silence = way.has_failed(*remote, asked, &now, is_asking).then_some(Silence::Neighbour);
        way.hop = way.hop(&before, &now, asked, runner.dry_run);
    }
    let mut hops: Vec<&mut NextHop> = ways.values_mut().filter_map(|way| way.hop.as_mut()).collect();
    if hops.iter().any(|next| next.is_unkept) && !(kernel::keeps_neighbours() && ip::keeps_neighbours(runner)) {
        hops.iter_mut().for_each(|next| next.is_unkept = false);
    }
    Ok(Some(now))
}

/// Asks the next hops that are not sure, and those again that were not asked by all of it: what does not answer at its old
/// address is asked for by everybody, and nobody who has answered is given up after one question. What the kernel has asked
/// in vain was asked once; what it was asking may have been at its end.
fn ask_twice(
    runner: &Runner,
    ways: &mut BTreeMap<IpAddr, Way>,
    asked: &Asked,
    before: &[Neighbour],
) -> Result<Vec<Neighbour>> {
    let was_being_asked = |way: &Way| way.neighbour(before).is_some_and(|at| at.is_unanswered() && !at.has_failed());
    for (_, way) in ways.iter_mut().filter(|(remote, _)| asked.unanswered.contains(remote)) {
        way.patience = if was_being_asked(way) { SECOND_QUESTION } else { QUICK_ANSWER };
    }
    let now = ask_open(runner, ways, before.to_vec(), |_, _| true)?;
    let again = |remote: &IpAddr, way: &Way| {
        let entry = way.neighbour(before);
        let has_answered = asked.known.contains_key(remote) && !asked.unanswered.contains(remote);
        entry.is_some_and(|at| at.mac().is_some())
            || was_being_asked(way)
            || (has_answered && !entry.is_some_and(Neighbour::has_failed))
    };
    ask_open(runner, ways, now, again)
}

/// Asks those of the next hops that are not sure, and waits for their answers. Answers the table of then.
fn ask_open(
    runner: &Runner,
    ways: &BTreeMap<IpAddr, Way>,
    table: Vec<Neighbour>,
    asked: impl Fn(&IpAddr, &Way) -> bool,
) -> Result<Vec<Neighbour>> {
    let lines = questions(ways, &table, asked);
    if lines.is_empty() {
        return Ok(table);
    }
    ip::batch(runner, None, &lines)?;
    let quiet = Runner { verbose: false, ..*runner };
    let start = Instant::now();
    let is_waiting = |table: &[Neighbour]| {
        let failed = |way: &Way| way.neighbour(table).is_some_and(Neighbour::has_failed);
        ways.values().any(|way| start.elapsed() < way.patience && way.is_open(table) && !failed(way))
    };
    loop {
        let now = ip::neighbours(&quiet)?;
        if !is_waiting(&now) {
            return Ok(now);
        }
        interrupt::check()?;
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn questions(ways: &BTreeMap<IpAddr, Way>, table: &[Neighbour], asked: impl Fn(&IpAddr, &Way) -> bool) -> Vec<String> {
    let open = ways.iter().filter(|(remote, way)| way.is_open(table) && asked(remote, way));
    let lines: BTreeSet<String> = open.map(|(_, way)| way.question(table)).collect();
    lines.into_iter().collect()
}

/// Asks the remotes themselves, where the request says so, and where somebody takes packets to them. A look that sends
/// nothing leaves it at what was found last.
fn ping(runner: &Runner, request: &Request, ways: &mut BTreeMap<IpAddr, Way>, asked: &Asked) -> Result<()> {
    let is_reached = |way: &Way| way.silence.is_none() && way.out.is_up();
    let probed = ways.iter().filter(|(_, way)| is_reached(way) && (way.out.is_l3() || way.next_hop_mac.is_some()));
    let probed: Vec<(IpAddr, IpAddr)> = probed.map(|(remote, way)| (*remote, way.source)).collect();
    if request.options.probe == Probe::None || probed.is_empty() {
        return Ok(());
    }
    let was_silent = |remote: &IpAddr| asked.down.get(remote) == Some(&Silence::Ping);
    let silent = match &asked.pinged {
        Some(pinged) => {
            let is_silent = |remote: &IpAddr| pinged.get(remote).map_or(was_silent(remote), |answers| !answers);
            probed.into_iter().map(|(remote, _)| remote).filter(is_silent).collect()
        }
        None if asked.passive || runner.dry_run => {
            probed.into_iter().map(|(remote, _)| remote).filter(was_silent).collect()
        }
        None => {
            requirements::ensure_there(&requirements::PING)?;
            rights::for_ping(runner)?;
            probe::silent(runner, &probed, request.options.outer.tos, was_silent)
        }
    };
    interrupt::check()?;
    for (_, way) in ways.iter_mut().filter(|(remote, _)| silent.contains(remote)) {
        way.silence = Some(Silence::Ping);
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
        // One that is waited for will be there.
        let beside = interfaces.iter().filter(|(watched, link)| match link {
            Some(link) => link.ifindex != hider.ifindex,
            None => watched.interface != hider.ifname,
        });
        let name = |(watched, link): &(Watched, Option<Link>)| match link {
            Some(link) => link.ifname.clone(),
            None => watched.interface.clone(),
        };
        let beside = crate::request::listed(beside.map(name));
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

fn silent_warning(way: &Way, mac: [u8; 6]) -> String {
    format!(
        "{} does not answer on {}: copies go on to the address that it had, {}; when it is back, or if it has another one: \
         snifctl sync",
        way.next_hop,
        way.out.ifname,
        ip::mac_text(&mac)
    )
}

fn rest_warning(remote: IpAddr, way: &Way, silence: Silence) -> String {
    let who = match silence {
        Silence::Neighbour => format!("{} does not answer on {}", way.next_hop, way.out.ifname),
        Silence::Ping => format!("{remote} does not answer ping from {}", way.source),
    };
    format!(
        "{who}: remote {remote} is down, and gets no copies until `snifctl sync` is run once it does; check with: ping -c 1 \
         {remote}"
    )
}

fn down_warning(link: &Link) -> Option<String> {
    let name = &link.ifname;
    (!link.is_up()).then(|| format!("{name} is down: it is watched, nothing passes until: ip link set dev {name} up"))
}

/// What is watched where it begins, or ends, is copied once more where it passes.
fn doubles_warning(watched: &[&Link]) -> Option<String> {
    let away = watched.iter().find(|link| link.away.is_some())?;
    let ours = watched.iter().find(|link| link.away.is_none())?;
    Some(format!(
        "what {} sends and gets is copied twice where it passes {}, too: watch that in a session of its own, whose filter \
         leaves those addresses out, as in: --filter 'not net 10.42.0.0/16'",
        away.ifname, ours.ifname
    ))
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
    let watched: Vec<u32> = watched.iter().map(|link| link.ifindex).collect();
    let fix = room(links, &watched, out, mtu, remote, needed);
    Some(format!("MTU {mtu} towards {remote} is too small for {what}, which need {needed}: {}{fix}", fate(request)))
}

/// How copies get room on the way to a remote. It is all of the way that must have it, and never the watched interface: a
/// larger MTU there would need a still larger one.
pub(crate) fn room(links: &[Link], watched: &[u32], out: &Link, mtu: u32, remote: IpAddr, needed: u32) -> String {
    if mtu < out.mtu && out.mtu >= needed {
        return format!(
            "; the route itself says {mtu}: if all of the way takes {needed}, take that out of it (ip route get {remote} shows \
             it), and then: snifctl sync"
        );
    }
    match ip::raise_mtu(links, watched, out, needed) {
        Some(fix) => format!("; if all of the way to {remote} takes {needed}, make room with: {fix} && snifctl sync"),
        None => format!(
            "; {} cannot have more{}, so send them another way, as in: ip route add {remote} dev OTHER && snifctl sync",
            out.ifname,
            if watched.is_empty() { "" } else { " without a watched interface" }
        ),
    }
}

/// What becomes of copies that do not fit.
fn fate(request: &Request) -> &'static str {
    let options = &request.options;
    let tunnel = &options.tunnel;
    let whole = !tunnel.is_per_frame() && options.snaplen.is_none();
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
