//! Makes a session, or heals it.
//!
//! Order of making: relay, load, write maps, publish, and the taps last, so that no packet meets half a session. A
//! failure anywhere runs the same code as `down`, which also cleans up after a process that was killed half-way.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder};
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Result, ensure};

use crate::commands::doctor;
use crate::datapath::abi::{self, Config, Direction, Out, Remote, Stat, Tap, TapCounts, TapKey};
use crate::datapath::filter;
use crate::datapath::template;
use crate::request::{Carrier, Plan, Rate, Spread, Watch, spelled};
use crate::session::firewall::{self, Obstacle};
use crate::session::home::{self, Home, Lock, handle};
use crate::session::outs;
use crate::session::read::{self, Broken, Memory, Session};
use crate::session::relay;
use crate::session::remotes;
use crate::session::repair;
use crate::session::resolve::{self, Resolved};
use crate::session::teardown::{Clsact, Target, holds_tap, is_left, teardown};
use crate::tools::bpftool;
use crate::tools::clang::{Compiling, Source};
use crate::tools::exec::Runner;
use crate::tools::ip::{self, Link};
use crate::tools::tc::{self, Hooks};

/// How `up` ended. The session is `None` where it is up but its status could not be read.
pub enum Outcome {
    Made(Option<Session>),
    /// It was up with the same request.
    Same(Option<Session>),
    /// It was up with the same request, and a route or neighbour had changed.
    Refreshed(Option<Session>),
    /// A dry run has printed what would be done; the outer headers.
    Shown(Vec<(IpAddr, Remote)>),
}

impl Outcome {
    fn session(&self) -> Option<&Session> {
        match self {
            Outcome::Made(session) | Outcome::Same(session) | Outcome::Refreshed(session) => session.as_ref(),
            Outcome::Shown(_) => None,
        }
    }
}

/// Makes the session, or finds it made. `keep`: clsact qdiscs stay for good. Returns what the user should know besides.
pub fn up(runner: &Runner, plan: &Plan, keep: bool) -> Result<(Outcome, Vec<String>)> {
    if !runner.dry_run {
        home::ensure_root()?;
    }
    let filter = compiled_filter(runner, "--filter", plan.filter.as_deref())?;
    let compiling = Source::datapath(filter, plan.unused()).begin(runner)?;
    let home = Home::here()?;
    let resolved = resolve::resolve(runner, plan, &ip::links(runner)?)?;
    if runner.dry_run {
        let words: Vec<&str> = plan.filter.iter().flat_map(|filter| ["--filter", filter]).collect();
        let object = compiling.object(runner, &words)?;
        let (outcome, queues) = show(runner, plan, &resolved, &home, &object, keep)?;
        return Ok((outcome, [resolved.warnings, queues].concat()));
    }
    let _lock = home.lock_to_write(runner)?;
    let outcome = ip::links(runner).and_then(|links| up_locked(runner, plan, &resolved, &home, compiling, links, keep));
    let outcome = outcome.and_then(|outcome| give_up_clsact(runner, &home, &resolved, keep).map(|()| outcome));
    home.remove_if_empty();
    let (outcome, queues) = outcome?;
    let mut warnings = [resolved.warnings, queues].concat();
    warnings.extend(outcome.session().and_then(tcx_warning));
    warnings.extend(firewall::obstacles(runner).iter().map(Obstacle::warning));
    Ok((outcome, warnings))
}

/// With `keep`, the clsact qdiscs of the watched interfaces are not ours any more.
fn give_up_clsact(runner: &Runner, home: &Home, resolved: &Resolved, keep: bool) -> Result<()> {
    let watched = resolved.watched.iter().filter(|_| keep);
    watched.map(|link| link.ifindex).try_for_each(|ifindex| home.forget_clsact(runner, ifindex))
}

fn tcx_warning(session: &Session) -> Option<String> {
    let what =
        || format!("tcx programs run before the taps and can hide packets from them: {}", session.tcx.join(", "));
    (!session.tcx.is_empty()).then(|| what() + "; look at them with: bpftool net show")
}

/// What every command that changes a running session needs.
pub fn lock_to_change(runner: &Runner) -> Result<(Home, Lock)> {
    home::ensure_root()?;
    doctor::ensure_present(&doctor::SESSION_TOOLS)?;
    let home = Home::here()?;
    let lock = home.lock_to_write(runner)?;
    Ok((home, lock))
}

/// The C of a filter that the argument `what` gave.
pub fn compiled_filter(runner: &Runner, what: &str, expression: Option<&str>) -> Result<Option<String>> {
    expression.map(|expression| filter::compile(runner, what, expression)).transpose()
}

fn show(
    runner: &Runner,
    plan: &Plan,
    resolved: &Resolved,
    home: &Home,
    object: &Path,
    keep: bool,
) -> Result<(Outcome, Vec<String>)> {
    let links = ip::links(runner)?;
    if let Some(session) = existing(runner, plan, home, &links)?
        && session.is_complete()
    {
        return Ok((Outcome::Same(Some(session)), Vec::new()));
    }
    home.create(runner)?;
    let making = Making::new(runner, plan, resolved, home, &links)?;
    making.make(runner, || Ok(object.to_path_buf()))?;
    give_up_clsact(runner, home, resolved, keep)?;
    let headers = resolved.remotes.iter().map(|route| (route.outer.remote, template::remote(&route.outer)));
    Ok((Outcome::Shown(headers.collect()), making.queues(keep)))
}

/// Also says in which watched interfaces' queues packets stood when their clsact qdisc had to be added.
fn up_locked(
    runner: &Runner,
    plan: &Plan,
    resolved: &Resolved,
    home: &Home,
    compiling: Compiling,
    mut links: Vec<Link>,
    keep: bool,
) -> Result<(Outcome, Vec<String>)> {
    let status = || ip::links(runner).and_then(|links| read::session(runner, home, &plan.name, &links)).ok();
    if let Some(session) = existing(runner, plan, home, &links)? {
        if session.is_complete() {
            return Ok((refreshed(runner, home, session, resolved, status)?, Vec::new()));
        }
        if let Some(queues) = repair::repair(runner, home, &session, resolved, keep)? {
            refresh(runner, home, &read::session(runner, home, &plan.name, &ip::links(runner)?)?, resolved)?;
            return Ok((Outcome::Made(status()), queues));
        }
        eprintln!("snifctl: session {} had lost a part; making it anew", plan.name);
    }
    let target = Target::One(&plan.name);
    let held: Vec<u32> = resolved.watched.iter().map(|link| link.ifindex).collect();
    if is_left(home, &target, &links) && teardown(runner, home, &target, &Clsact::Hold(&held), &links)? {
        links = ip::links(runner)?;
    }
    let mut making = Making::new(runner, plan, resolved, home, &links);
    if making.as_ref().is_ok_and(|making| making.hooks.iter().any(|hooks| holds_tap(hooks, &plan.name))) {
        teardown(runner, home, &target, &Clsact::Hold(&held), &links)?;
        making = Making::new(runner, plan, resolved, home, &links);
    }
    let made = making.and_then(|making| {
        making.make(runner, || compiling.object(runner, &[]))?;
        Ok(making.queues(keep))
    });
    match made {
        Ok(queues) => Ok((Outcome::Made(status()), queues)),
        Err(err) => {
            let undone = ip::links(runner).and_then(|links| teardown(runner, home, &target, &Clsact::Remove, &links));
            Err(match undone {
                Ok(_) => err,
                Err(undo) => {
                    err.context(format!("cleaning up failed too ({undo:#}); try: snifctl down --name {}", plan.name))
                }
            })
        }
    }
}

fn refreshed(
    runner: &Runner,
    home: &Home,
    session: Session,
    resolved: &Resolved,
    status: impl Fn() -> Option<Session>,
) -> Result<Outcome> {
    Ok(match refresh(runner, home, &session, resolved)? {
        true => Outcome::Refreshed(status()),
        false => Outcome::Same(Some(session)),
    })
}

/// The session of that name, if all its pins are there and it was asked for in the same words.
fn existing(runner: &Runner, plan: &Plan, home: &Home, links: &[Link]) -> Result<Option<Session>> {
    if !home.session(&plan.name).is_dir() {
        return Ok(None);
    }
    let session = match read::session(runner, home, &plan.name, links) {
        Ok(session) => session,
        Err(err) if err.is::<Broken>() => {
            eprintln!("snifctl: session {} was only half there; making it anew", plan.name);
            return Ok(None);
        }
        Err(err) => return Err(err),
    };
    ensure!(
        session.memory.plan == *plan,
        "--name {0} is taken by a session with another request ({1}); use another --name, or first: snifctl down --name {0}",
        plan.name,
        words(&session.memory.plan)
    );
    Ok(Some(session))
}

/// The command that makes, or repairs, the session of a request.
pub fn command(plan: &Plan) -> String {
    let name = if plan.name == "default" { String::new() } else { format!(" --name {}", plan.name) };
    format!("snifctl {}{name}", words(plan))
}

/// The command line of a request.
fn words(plan: &Plan) -> String {
    let remotes = plan.remotes.iter().map(|remote| format!("--remote {remote}"));
    let interfaces: Vec<&str> = plan.watched.iter().map(|watched| watched.interface.as_str()).collect();
    let mut words = vec!["up".to_string(), interfaces.join(" "), format!("--tunnel {}", spelled(plan.tunnel.kind))];
    words.extend(remotes);
    let mut add = |flag: &str, value: Option<String>| words.extend(value.map(|value| format!("{flag} {value}")));
    add("--id", plan.tunnel.id.map(|id| id.to_string()));
    add("--egress-id", plan.tunnel.egress_id.map(|id| id.to_string()));
    add("--port", plan.tunnel.port.map(|port| port.to_string()));
    let direction = plan.watched.first().map_or(Watch::Both, |watched| watched.direction);
    let uniform = plan.watched.iter().all(|watched| watched.direction == direction);
    add("--direction", (uniform && direction != Watch::Both).then(|| spelled(direction)));
    add("--filter", plan.filter.as_ref().map(|filter| filter::shown(filter)));
    add("--sample", (plan.sampling.packets > 1).then(|| format!("1/{}", plan.sampling.packets)));
    add("--sample-flows", (plan.sampling.flows > 1).then(|| format!("1/{}", plan.sampling.flows)));
    add("--snaplen", plan.snaplen.map(|bytes| bytes.to_string()));
    add("--max-rate", plan.max_rate.map(|rate| rate.to_string()));
    add("--spread", (plan.spread != Spread::Replicate).then(|| spelled(plan.spread)));
    add("--oversize", Some(spelled(plan.oversize)));
    plan.sources.iter().for_each(|source| add("--source", Some(source.to_string())));
    for carrier in plan.carriers.iter().flatten() {
        add("--carrier", Some(carrier.to_string()));
    }
    add("--carrier", plan.carriers.as_ref().filter(|carriers| carriers.is_empty()).map(|_| "none".into()));
    add("--ttl", Some(plan.outer.ttl.to_string()));
    add("--tos", Some(plan.outer.tos.to_string()));
    for (flag, on) in
        [("--df", plan.outer.df), ("--sequence", plan.tunnel.sequence), ("--udp-checksum", plan.tunnel.udp_checksum)]
    {
        words.extend(on.then(|| flag.to_string()));
    }
    words.join(" ")
}

/// Writes remotes anew where their route or neighbour has changed, or their out interface was made anew: one atomic map
/// update each.
fn refresh(runner: &Runner, home: &Home, session: &Session, resolved: &Resolved) -> Result<bool> {
    let maps = home.session(&session.name).join("maps");
    let mut lines = Vec::new();
    for route in &resolved.remotes {
        let known = session.remotes.iter().find(|known| known.address == route.outer.remote);
        let Some(known) = known.filter(|known| !known.is_as(&route.outer)) else { continue };
        if known.source != Some(route.outer.source) {
            lines.extend(remotes::forget_tunnel(&maps, known));
        }
        lines.extend(remotes::updates(&maps, known.slot, &route.outer, Some(known)));
    }
    let mut implied = implied(runner, &maps, resolved, &session.outs)?;
    if !resolved.carriers.is_empty() && !session.config.carriers {
        implied.extend(session.memory.updates(&maps, &Config { carriers: true, ..session.config })?);
    }
    let changed = !lines.is_empty();
    implied.extend(lines);
    bpftool::batch(runner, &implied)?;
    Ok(changed)
}

/// A session on its way into the kernel.
struct Making<'a> {
    plan: &'a Plan,
    resolved: &'a Resolved,
    home: &'a Home,
    relay: String,
    config: Config,
    /// What is at the hooks of the watched interfaces.
    hooks: Vec<Hooks>,
    memory: Memory,
}

impl<'a> Making<'a> {
    fn new(
        runner: &Runner,
        plan: &'a Plan,
        resolved: &'a Resolved,
        home: &'a Home,
        links: &[Link],
    ) -> Result<Making<'a>> {
        let names: Vec<&str> = resolved.watched.iter().map(|link| link.ifname.as_str()).collect();
        let hooks = free_hooks(runner, &names)?;
        let memory = Memory {
            plan: plan.clone(),
            removed: Stat::default(),
            removed_taps: TapCounts::default(),
            ifindexes: watched_ifindexes(plan, resolved),
        };
        Ok(Making {
            plan,
            resolved,
            home,
            relay: relay::free(links)?,
            config: config(plan, resolved, links),
            hooks,
            memory,
        })
    }

    /// The relay is made while clang may still run; nothing goes through it before its programs are there.
    fn make(&self, runner: &Runner, object: impl FnOnce() -> Result<PathBuf>) -> Result<()> {
        let building = self.home.building(&self.plan.name);
        runner.act("mkdir -m 0700", &building, |dir| DirBuilder::new().mode(0o700).create(dir))?;
        relay::make(runner, &self.relay, &self.config, &self.plan.name)?;
        bpftool::load(runner, &object()?, &building, self.plan.filter.is_some())?;
        bpftool::batch(runner, &self.map_updates(runner, &building.join("maps"))?)?;
        relay::connect(runner, &self.relay, &self.plan.name, &building)?;
        self.publish(runner, &building)?;
        self.attach(runner)
    }

    fn map_updates(&self, runner: &Runner, maps: &Path) -> Result<Vec<String>> {
        let mut lines = self.memory.updates(maps, &self.config)?;
        lines.extend(relay::updates(maps, &self.config));
        lines.extend(implied(runner, maps, self.resolved, &[])?);
        for (slot, route) in (0..).zip(&self.resolved.remotes) {
            lines.extend(remotes::updates(maps, slot, &route.outer, None));
        }
        let addresses: Vec<_> = (0..).zip(self.plan.remotes.iter().copied()).collect();
        lines.extend(remotes::spread_updates(maps, &remotes::spread(&addresses), None));
        for ((number, link), watched) in (0..).zip(&self.resolved.watched).zip(&self.plan.watched) {
            for direction in watched.direction.directions() {
                lines.extend(tap_updates(maps, number, TapKey { ifindex: link.ifindex, direction: *direction }));
            }
        }
        Ok(lines)
    }

    fn publish(&self, runner: &Runner, building: &Path) -> Result<()> {
        let session = self.home.session(&self.plan.name);
        let shown = format!("mv -T {}", building.display());
        runner.act(&shown, &session, |session| fs::rename(building, session))
    }

    /// What `up` says of the watched interfaces' queues.
    fn queues(&self, keep: bool) -> Vec<String> {
        let watched = self.resolved.watched.iter().zip(&self.hooks);
        watched.filter_map(|(link, hooks)| queue_warning(link, hooks, keep)).collect()
    }

    fn attach(&self, runner: &Runner) -> Result<()> {
        let mut lines = Vec::new();
        for ((link, hooks), watched) in self.resolved.watched.iter().zip(&self.hooks).zip(&self.plan.watched) {
            lines.extend(attach(runner, self.home, &self.plan.name, link, hooks, watched.direction.directions())?);
        }
        tc::batch(runner, &lines)
    }
}

/// What is at the hooks of these interfaces, if clsact can be there.
pub fn free_hooks(runner: &Runner, interfaces: &[&str]) -> Result<Vec<Hooks>> {
    let hooks = tc::hooks(runner, interfaces)?;
    for (name, hooks) in interfaces.iter().zip(&hooks) {
        ensure!(
            !hooks.has_qdisc("ingress"),
            "IFACE {name} has an `ingress` qdisc where clsact must go; if nothing needs it, remove it with: tc qdisc del dev \
             {name} ingress"
        );
    }
    Ok(hooks)
}

/// The batch lines that make room for a tap. Its slot is twice the number of its interface, plus one for egress.
pub fn tap_updates(maps: &Path, number: u32, key: TapKey) -> [String; 2] {
    let tap = Tap { slot: 2 * number + key.direction as u32, ..Tap::default() };
    [
        bpftool::update(&maps.join("slots"), &tap.slot.to_ne_bytes(), &key.encode()),
        bpftool::update(&maps.join("taps"), &key.encode(), &tap.encode()),
    ]
}

/// The `tc` lines that attach taps to an interface, with a clsact qdisc, marked as ours, where there is none.
pub fn attach(
    runner: &Runner,
    home: &Home,
    session: &str,
    link: &Link,
    hooks: &Hooks,
    directions: &[Direction],
) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    if !hooks.has_qdisc("clsact") {
        let mark = home.clsact_mark(link.ifindex);
        runner.act("mkdir -p -m 0700", &mark, |dir| DirBuilder::new().recursive(true).mode(0o700).create(dir))?;
        lines.push(tc::add_clsact(&link.ifname));
    }
    for direction in directions {
        let pin = home.session(session).join(direction.program());
        let pref = hooks.free_pref(*direction);
        lines.push(tc::add_filter(&link.ifname, *direction, pref, handle(session), &pin.to_string_lossy()));
    }
    Ok(lines)
}

/// What adding a clsact qdisc has cost, where none was there and packets stood in the interface's queue.
pub fn queue_warning(link: &Link, hooks: &Hooks, keep: bool) -> Option<String> {
    let (name, standing) = (&link.ifname, tc::standing(hooks));
    if hooks.has_qdisc("clsact") || standing == 0 {
        return None;
    }
    let help = "; --keep-clsact leaves that qdisc in place, so that no later `down` and `up` does this again";
    Some(format!(
        "{standing} packets stood in the queue of {name} when its clsact qdisc was added: the kernel then restarts the \
         queue and drops them{}",
        if keep { "" } else { help }
    ))
}

/// The interfaces of the request by their ifindex: names can change.
fn watched_ifindexes(plan: &Plan, resolved: &Resolved) -> BTreeMap<String, u32> {
    let names = plan.watched.iter().map(|watched| watched.interface.clone());
    names.zip(resolved.watched.iter().map(|link| link.ifindex)).collect()
}

/// The batch lines for what routes imply besides the remotes themselves: out interfaces whose drops are counted from now
/// on, and the packets of those that are tunnels.
pub fn implied(runner: &Runner, maps: &Path, resolved: &Resolved, known: &[(u32, Out)]) -> Result<Vec<String>> {
    let outs = resolved.remotes.iter().filter_map(|route| route.out.as_ref());
    let mut lines = outs::meet(runner, maps, known, outs)?;
    lines.extend(resolved.carriers.iter().flat_map(|carrier| carrier_updates(maps, carrier)));
    Ok(lines)
}

/// The batch lines that write a carrier. One with a port is known in fragments, too, which have none.
fn carrier_updates(maps: &Path, carrier: &Carrier) -> Vec<String> {
    let line = |port, what: u32| {
        bpftool::update(&maps.join("carriers"), &abi::carrier_key(carrier.address, port), &what.to_ne_bytes())
    };
    match carrier.port {
        0 => vec![line(0, abi::carrier::ANY)],
        port => vec![line(0, abi::carrier::FRAGMENTS), line(port, abi::carrier::ANY)],
    }
}

/// The relay's ifindexes are chosen here, so that the programs can be told them before the relay is made.
fn config(plan: &Plan, resolved: &Resolved, links: &[Link]) -> Config {
    let [relay, port, peer] = relay::free_indexes(links);
    Config {
        remotes: (0..plan.remotes.len()).fold(0, |set, slot| set | 1 << slot),
        clock: clock(),
        rate: match plan.max_rate {
            None => 0,
            Some(Rate::Bytes(amount) | Rate::Packets(amount)) => amount,
        },
        relay,
        port,
        peer,
        sample: plan.sampling.packets,
        sample_flows: plan.sampling.flows,
        snaplen: plan.snaplen.unwrap_or(0),
        oversize: plan.oversize as u8,
        protocol: plan.tunnel.protocol(),
        udp_port: plan.tunnel.port(),
        spread: plan.spread as u8,
        carriers: !resolved.carriers.is_empty(),
        // Which the first write turns to the first half.
        request: abi::REQUEST_CHUNKS as u16,
        rate_packets: matches!(plan.max_rate, Some(Rate::Packets(_))),
        gre: plan.tunnel.gre(),
        keys: plan.tunnel.keys(),
    }
}

/// Nanoseconds from the time since boot, which the programs can read, to the time since 1970. Good to 10 ms, the
/// resolution of /proc/uptime; 0 where either cannot be told.
fn clock() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let uptime = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = uptime.split(' ').next().and_then(|text| text.parse::<f64>().ok()).unwrap_or_default();
    now.saturating_sub(Duration::from_secs_f64(seconds)).as_nanos() as u64
}
