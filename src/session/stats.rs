//! What is shown of a session: how it is, and what it has counted.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::datapath::abi::{self, Bin, Direction, Forms, Out, Remote, Stat, TapCounts, remote_flag};
use crate::datapath::parts::Map;
use crate::datapath::reason::Reason;
use crate::request::{Oversize, Rate, Request, Spread, Watch, Watched};
use crate::session::ages::Times;
use crate::session::ahead::{self, Ahead};
use crate::session::change::{Act, Change};
use crate::session::difference;
use crate::session::engine::{self, Open};
use crate::session::firewall::{self, Obstacle};
use crate::session::health::{self, Health};
use crate::session::home::Home;
use crate::session::pattern;
use crate::session::relay;
use crate::session::resolve;
use crate::session::stored::{Place, Silence, Stored, Unreadable};
use crate::session::there::{There, index, key, unreadable};
use crate::session::version::{self, Foreign};
use crate::tools::bpftool;
use crate::tools::exec::Runner;
use crate::tools::ip::{Link, mac_text};
use crate::tools::tc;
use crate::tunnel::Kind;

#[derive(Debug, Serialize)]
pub(crate) struct Status {
    pub sessions: Vec<Session>,
    /// Where there were two looks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine: Option<Machine>,
}

/// Packets that the machine itself has dropped before any tap, as a CPU's backlog was full (softnet_stat).
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Machine {
    #[serde(rename = "softnet_dropped")]
    pub since_boot: u64,
    /// Between the two looks.
    #[serde(rename = "softnet_dropped_meanwhile")]
    pub dropped: u64,
}

/// One session. Counters are of copies of wire frames and their bytes. What a broken session does not tell is null.
#[derive(Debug, Serialize)]
pub(crate) struct Session {
    pub name: String,
    /// When its counters were read.
    #[serde(skip)]
    pub at: Instant,
    pub tunnel: Option<Kind>,
    pub oversize: Option<Oversize>,
    pub spread: Option<Spread>,
    pub filter: Option<String>,
    /// One of so many packets, and of so many flows, is copied.
    pub sample: Option<u32>,
    pub sample_flows: Option<u32>,
    pub snaplen: Option<u32>,
    pub max_rate: Option<Rate>,
    /// All of it.
    pub request: Option<Request>,
    /// The command line that makes it.
    pub command: Option<String>,
    pub taps: Vec<TapStatus>,
    /// What each pattern of the request stands for.
    pub patterns: Vec<Stands>,
    /// Names and patterns of the request for which there is no interface yet.
    pub waiting: Vec<Watched>,
    pub remotes: Vec<RemoteStatus>,
    /// The counters of remotes that the session no longer has, together.
    pub removed: Stat,
    /// The counters of taps that the session no longer has, together.
    pub removed_taps: TapCounts,
    /// Copies that were not sent, by reason.
    pub drops: BTreeMap<String, u64>,
    pub forms: Forms,
    /// Copies that were to be sent, by powers of two of their bytes: those that there are; with --verbose.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sizes: Option<Vec<Class>>,
    /// Calls of taps, by powers of two of their nanoseconds; the same, with --profile.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub times: Option<Vec<Class>>,
    /// When it was made, and last changed. Not in JSON, where two looks at the same session are the same.
    #[serde(skip)]
    pub times_of: Option<Times>,
    /// Packets of any sender that the out interfaces and their queues have dropped while the session used them.
    pub out_dropped: u64,
    /// Who is before the taps and can hide packets from them, each a line.
    pub ahead: Vec<Ahead>,
    /// What is not as it must be, each a line.
    pub faults: Vec<String>,
    /// The command that puts it right.
    #[serde(skip)]
    pub fix: Option<String>,
    /// The version of snifctl that wrote its request; `null` before they said so.
    pub made_by: Option<String>,
    /// What there is of a session of a version whose request cannot be read.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub found: Vec<String>,
    /// Chains of the bridge family that can have dropped copies; looked for only where some were lost in the relay.
    #[serde(skip)]
    pub obstacles: Vec<Obstacle>,
}

/// Those of more than half of `up_to` and up to it.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Class {
    pub up_to: u64,
    pub count: u64,
    /// Of their bytes, or nanoseconds.
    pub sum: u64,
}

fn classes(there: &There, map: Map) -> Vec<Class> {
    let bins = bins(there, map).into_iter().enumerate();
    let class = |(power, bin): (usize, Bin)| Class { up_to: 1 << power, count: bin.count, sum: bin.sum };
    bins.map(class).filter(|class| class.count > 0).collect()
}

/// A pattern, and the interfaces that are watched by it.
#[derive(Debug, Serialize)]
pub(crate) struct Stands {
    pub pattern: Watched,
    pub interfaces: Vec<String>,
}

/// `pcnt` frames were to be copied, `dcnt` of them were dropped by our programs. In frames of the interface, `seen` is
/// the sum of `filtered`, `skipped` and those that were to be copied.
#[derive(Debug, Serialize)]
pub(crate) struct TapStatus {
    /// Its name now, or the one that it had.
    pub interface: String,
    pub direction: &'static str,
    /// What the kernel says: our program is at this hook.
    pub attached: bool,
    /// The interface is there.
    pub exists: bool,
    /// By which it is watched; left out where the request names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pattern: Option<String>,
    /// Packets that the interface has counted while the tap has seen none; left out where it sees them, or none pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unseen: Option<u64>,
    #[serde(flatten)]
    pub counts: TapCounts,
    pub health: Health,
    /// Why it is not well, if it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// What has come between two looks, where there were two.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rise: Option<Rise>,
}

/// What a tap or a remote has counted between two looks.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Rise {
    pub seconds: f64,
    /// In frames of the interface; 0 of remotes.
    pub seen: u64,
    /// Copies that were asked for, or sent to the remote, and their bytes.
    pub copies: u64,
    pub bytes: u64,
    pub dropped: u64,
}

impl Rise {
    pub(crate) fn per_second(&self, count: u64) -> f64 {
        count as f64 / self.seconds.max(1e-9)
    }
}

/// `pcnt` copies were handed to the out interface, `dcnt` were dropped by our programs before.
#[derive(Debug, Serialize)]
pub(crate) struct RemoteStatus {
    pub address: IpAddr,
    /// `null` without a route.
    pub source: Option<IpAddr>,
    /// `null` without a route, and where it is gone.
    pub interface: Option<String>,
    /// Of the next hop; `null` while it does not answer, and where the out interface has no Ethernet.
    pub mac: Option<String>,
    /// Bytes of the largest outer IP packet.
    pub mtu: u32,
    pub state: RemoteState,
    /// Why it is down, if it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub silence: Option<Silence>,
    pub stat: Stat,
    pub health: Health,
    /// Why it is not well, if it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// What has come between two looks, where there were two.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rise: Option<Rise>,
}

/// What is written for a remote, compared with what the machine has now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RemoteState {
    Ok,
    /// Its route, source, next hop, MTU or out interface is another by now: copies go the old way until `sync`.
    Outdated,
    /// Its out interface no longer exists.
    Gone,
    /// It has no route, or its next hop has never answered.
    Unresolved,
    /// It does not answer: no copies are made for it.
    Down,
}

/// These sessions, as the kernel has them.
pub(crate) fn status(open: &Open, names: &[String]) -> Result<Status> {
    Ok(Status { sessions: names.iter().map(|name| session(open, name)).collect::<Result<_>>()?, machine: None })
}

/// One session, whatever there is of it.
pub(crate) fn session(open: &Open, name: &str) -> Result<Session> {
    let (mut there, open) = open.read_around(name, None)?;
    let open = &*open;
    let outs: Vec<(u32, Out)> = outs(&there);
    let mut asked: std::collections::BTreeSet<u32> = outs.iter().map(|(ifindex, _)| *ifindex).collect();
    match &there.stored {
        Ok(stored) => {
            asked.extend(stored.interfaces.values().map(|place| place.ifindex));
            // What has come since, by a pattern or because it was waited for.
            let now = resolve::interfaces(&stored.request, Some(stored), &open.machine);
            asked.extend(now.iter().filter_map(|(_, link)| Some(link.as_ref()?.ifindex)));
        }
        Err(_) if there.is_published => asked.extend(engine::tapped(open)?),
        Err(_) => {}
    }
    there.look(open.runner, &asked, true)?;
    let out_dropped = out_dropped(open.runner, &open.home.session(name).join("maps"), &there, &outs)?;
    Ok(view(open, &there, out_dropped))
}

/// Who is before the session's taps.
fn ahead(open: &Open, there: &There) -> Vec<Ahead> {
    let Ok(stored) = &there.stored else { return Vec::new() };
    let places = stored.interfaces.values().filter_map(|place| Some((place, there.link(place.ifindex)?)));
    let places: Vec<(&Place, &Link)> = places.collect();
    open.machine.ask_tcx(&places.iter().map(|(_, link)| *link).collect::<Vec<_>>());
    let of = |(place, link): &(&Place, &Link)| {
        let directions = place.watch.directions().iter();
        directions.flat_map(|at| ahead::of(&open.machine, there, link, *at)).collect::<Vec<_>>()
    };
    places.iter().flat_map(of).collect()
}

/// So many packets may pass between a look at the interface's counters and the attaching of its taps.
const UNSEEN: u64 = 8;

/// How many packets an interface has counted while its tap has seen none; none where that is nothing odd. Copies that
/// leave by the interface are no packets for its egress tap.
fn unseen(there: &There, place: &Place, direction: Direction, counts: &TapCounts) -> Option<u64> {
    let is_out = there.remote_rows().values().any(|remote| remote.ifindex == place.ifindex);
    if counts.choice.seen + counts.choice.own > 0 || (is_out && direction == Direction::Egress) {
        return None;
    }
    let at = direction as usize;
    let passed = there.link(place.ifindex)?.passed()[at].checked_sub(place.passed?[at])?;
    (passed >= UNSEEN).then_some(passed)
}

fn view(open: &Open, there: &There, out_dropped: u64) -> Session {
    let stored = there.stored.as_ref().ok();
    let request = stored.map(|stored| &stored.request);
    let options = request.map(|request| &request.options);
    let drops = drops(there);
    let (changes, mut faults, fix) = faults(open, there);
    let taps = taps(there);
    let blind = taps.iter().filter_map(|tap| Some((tap, tap.unseen?)));
    faults.extend(blind.map(|(tap, passed)| {
        format!("tap {} {}: blind? it has seen none of {passed} packets", tap.interface, tap.direction)
    }));
    let waiting = stored.map_or_else(Vec::new, |stored| pattern::waiting(stored, &there.links));
    let lost = drops.get("relay").is_some_and(|lost| *lost > 0);
    let mut session = Session {
        name: there.name.clone(),
        at: there.at,
        tunnel: options.map(|options| options.tunnel.kind),
        oversize: options.map(|options| options.oversize),
        spread: options.map(|options| options.spread),
        filter: options.and_then(|options| options.filter.clone()),
        sample: options.map(|options| options.sample.0),
        sample_flows: options.map(|options| options.sample_flows.0),
        snaplen: options.and_then(|options| options.snaplen),
        max_rate: options.and_then(|options| options.max_rate),
        request: request.cloned(),
        command: request.map(|request| request.command_waiting(!waiting.is_empty())),
        taps,
        patterns: patterns(there),
        waiting,
        remotes: remotes(there, &changes),
        removed: removed(there),
        removed_taps: removed_taps(there),
        drops,
        forms: forms(there),
        sizes: Some(classes(there, Map::Sizes)),
        times: options.is_some_and(|options| options.profile).then(|| classes(there, Map::Times)),
        times_of: Times::of(&there.dir),
        out_dropped,
        ahead: ahead(open, there),
        faults,
        fix,
        made_by: made_by(there).filter(|by| !by.is_empty()),
        found: if stored.is_none() { found(there) } else { Vec::new() },
        obstacles: if lost { firewall::obstacles(&open.machine) } else { Vec::new() },
    };
    session.judge();
    session
}

impl Session {
    /// Without what `status --json` has only with --verbose.
    pub(crate) fn brief(self) -> Session {
        Session { sizes: None, times: None, ..self }
    }

    /// Says of each tap and remote how it is.
    pub(crate) fn judge(&mut self) {
        for tap in &mut self.taps {
            (tap.health, tap.why) = health::of_tap(tap, tap.rise.as_ref(), &self.faults);
        }
        for remote in &mut self.remotes {
            (remote.health, remote.why) = health::of_remote(remote, remote.rise.as_ref(), &self.faults);
        }
    }
}

/// In what the session differs from what was asked for, as the machine is now: the changes that `sync` would make, a line
/// for each, and the command that puts it right, where one does.
fn faults(open: &Open, there: &There) -> (Vec<Change>, Vec<String>, Option<String>) {
    let name = &there.name;
    let broken = |why: String, fix: &str| (Vec::new(), vec![why], Some(format!("snifctl {fix} --name {name}")));
    let newer = |foreign: &Foreign| {
        let fix = if foreign.is_newer() { "that one, or take it down with: " } else { "" };
        (Vec::new(), vec![foreign.to_string()], Some(format!("{fix}snifctl down --name {name}")))
    };
    match &there.stored {
        Err(Unreadable::OtherVersion(foreign)) => return newer(foreign),
        Ok(stored) => {
            if let Some(foreign) = stored.newer() {
                return newer(&foreign);
            }
        }
        Err(_) => {}
    }
    let wanted = match engine::expected(there, &open.machine).filter(|_| difference::is_alterable(there)) {
        Some(Ok(wanted)) => wanted,
        Some(Err(err)) => return broken(format!("{err:#}"), "sync"),
        None => match &there.stored {
            Err(_) if !there.is_published => {
                let why = "its pins are out of reach: its relay is here, and taps that still copy may be";
                return broken(why.into(), "down");
            }
            Err(why) => return broken(why.to_string(), "down"),
            Ok(stored) => {
                let older = version::fault(stored).map(|(subject, fault)| format!("{subject}: {fault}"));
                return broken(older.unwrap_or("it has lost a map".into()), "sync");
            }
        },
    };
    let (mut changes, _) = difference::difference(&wanted, there);
    changes.retain(|change| !change.is_silent());
    let older = there.stored.as_ref().ok().and_then(version::fault);
    // What `sync` does first.
    let moved = older.map(|(subject, fault)| Change::new(subject, fault, "", vec![Act::MakeBuilding]));
    changes.splice(0..0, moved);
    let told = || changes.iter();
    let fault = |change: &Change| match change.acts.is_empty() {
        true => change.line(),
        false => format!("{}: {}", change.subject, change.fault),
    };
    let fix = told().any(|change| !change.acts.is_empty()).then(|| format!("snifctl sync --name {name}"));
    let faults = told().map(fault).collect();
    (changes, faults, fix)
}

fn made_by(there: &There) -> Option<String> {
    match &there.stored {
        Ok(stored) => Some(stored.snifctl.clone()),
        Err(Unreadable::OtherVersion(foreign)) => Some(foreign.by.clone()),
        Err(_) => None,
    }
}

/// The taps and relays of a session of which nothing else can be read.
fn found(there: &There) -> Vec<String> {
    let links = there.links.iter().filter(|link| there.hooks.contains_key(&link.ifindex) && !relay::is_one(link));
    let taps = links.flat_map(|link| {
        let directions = [Direction::Ingress, Direction::Egress].into_iter();
        let at = directions.filter(|direction| !there.taps_at(key(link.ifindex, *direction)).is_empty());
        at.map(|direction| format!("tap {} {}", link.ifname, direction.hook())).collect::<Vec<_>>()
    });
    let relays = there.relays().into_iter().filter(|link| link.kind() == "bridge");
    taps.chain(relays.map(|link| format!("relay {}", link.ifname))).collect()
}

/// The places of a session, with the directions in which each is to be watched.
fn watched<'a>(there: &There, stored: &'a Stored) -> Vec<(&'a String, &'a Place, Option<Watch>)> {
    let places = stored.interfaces.iter();
    let watch =
        |name: &str, place: &Place| pattern::directions(&stored.request, name, place, there.link(place.ifindex));
    places.map(|(name, place)| (name, place, watch(name, place))).collect()
}

fn patterns(there: &There) -> Vec<Stands> {
    let Ok(stored) = &there.stored else { return Vec::new() };
    let mut places: Vec<(&String, &Place)> = stored.interfaces.iter().collect();
    places.sort_by_key(|(_, place)| place.number);
    let open = stored.request.interfaces.iter();
    let open = open.filter(|at| pattern::is_open(&at.interface, Some(stored), &there.links));
    let stands = |pattern: &Watched| {
        let own = places.iter().filter_map(|(name, place)| {
            let link = there.link(place.ifindex);
            let is_own = pattern::stands_for(&pattern.interface, name, place, link);
            is_own.then(|| link.map_or_else(|| (*name).clone(), |link| link.ifname.clone()))
        });
        Stands { pattern: pattern.clone(), interfaces: own.collect() }
    };
    open.map(stands).collect()
}

pub(super) fn taps(there: &There) -> Vec<TapStatus> {
    let Ok(stored) = &there.stored else { return Vec::new() };
    let mut taps = Vec::new();
    for (name, place, watch) in watched(there, stored) {
        for direction in [Direction::Ingress, Direction::Egress] {
            if !place.watch.has(direction) || watch.is_none_or(|watch| !watch.has(direction)) {
                continue;
            }
            let (at, link) = (key(place.ifindex, direction), there.link(place.ifindex));
            let counts = TapCounts::sum([there.tap_counts(at), place.before(direction)]);
            let tap = TapStatus {
                interface: link.map_or_else(|| name.clone(), |link| link.ifname.clone()),
                direction: direction.hook(),
                attached: there.is_attached(at),
                exists: link.is_some(),
                pattern: place.pattern.clone(),
                unseen: unseen(there, place, direction, &there.tap_counts(at)),
                counts,
                health: Health::Ok,
                why: None,
                rise: None,
            };
            taps.push((place.slot(direction), tap));
        }
    }
    taps.sort_by_key(|(slot, _)| *slot);
    taps.into_iter().map(|(_, tap)| tap).collect()
}

/// `changes`: what differs from what the machine has now.
pub(super) fn remotes(there: &There, changes: &[Change]) -> Vec<RemoteStatus> {
    let Ok(stored) = &there.stored else { return Vec::new() };
    let rows = there.remote_rows();
    let mut found: Vec<(u32, RemoteStatus)> = Vec::new();
    for (address, slot) in &stored.remotes {
        if stored.request.options.remotes.contains(address) {
            let subject = format!("remote {address}");
            let differs = changes.iter().any(|change| change.subject == subject);
            let silence = stored.down.get(address).copied();
            found.push((*slot, remote(there, (*address, *slot), rows.get(slot), differs, silence)));
        }
    }
    found.sort_by_key(|(slot, _)| *slot);
    found.into_iter().map(|(_, remote)| remote).collect()
}

fn remote(
    there: &There,
    (address, slot): (IpAddr, u32),
    row: Option<&Remote>,
    differs: bool,
    silence: Option<Silence>,
) -> RemoteStatus {
    let has = |flag| row.is_none_or(|row| row.has(flag));
    let ifindex = row.map_or(0, |row| row.ifindex);
    let out = there.link(ifindex).filter(|_| ifindex != 0);
    let source = row.map(|row| row.addresses().0).filter(|source| !source.is_unspecified());
    let has_mac = !has(remote_flag::UNRESOLVED) && !has(remote_flag::L3);
    RemoteStatus {
        address,
        source,
        interface: out.map(|link| link.ifname.clone()),
        mac: row.filter(|_| has_mac).map(|row| mac_text(row.mac())),
        mtu: row.map_or(0, |row| row.mtu),
        stat: there.remote_stat(slot),
        silence,
        health: Health::Ok,
        why: None,
        rise: None,
        state: match has(remote_flag::UNRESOLVED) {
            _ if ifindex != 0 && out.is_none() => RemoteState::Gone,
            _ if differs => RemoteState::Outdated,
            true => RemoteState::Unresolved,
            false if silence.is_some() => RemoteState::Down,
            false => RemoteState::Ok,
        },
    }
}

/// With what a change that ended half-way has left behind.
pub(super) fn removed(there: &There) -> Stat {
    let Ok(stored) = &there.stored else { return Stat::default() };
    let leaving = stored.remotes.iter().filter(|(address, _)| !stored.request.options.remotes.contains(address));
    Stat::sum(leaving.map(|(_, slot)| there.remote_stat(*slot)).chain([stored.removed]))
}

pub(super) fn removed_taps(there: &There) -> TapCounts {
    let Ok(stored) = &there.stored else { return TapCounts::default() };
    let mut counts = vec![stored.removed_taps];
    for (_, place, watch) in watched(there, stored) {
        for direction in place.watch.directions() {
            if watch.is_none_or(|watch| !watch.has(*direction)) {
                counts.extend([there.tap_counts(key(place.ifindex, *direction)), place.before(*direction)]);
            }
        }
    }
    TapCounts::sum(counts)
}

pub(super) fn drops(there: &There) -> BTreeMap<String, u64> {
    let now = there.rows.get(&Map::Drops).and_then(|rows| rows.values().next());
    let cpus = now.into_iter().flatten().chain(&there.earlier_drops);
    let mut sums: BTreeMap<String, u64> = Reason::ALL.iter().map(|reason| (reason.name().to_string(), 0)).collect();
    for value in cpus {
        for (reason, count) in Reason::ALL.iter().zip(value.chunks_exact(8)) {
            let count = count.try_into().map(u64::from_ne_bytes).unwrap_or_default();
            *sums.entry(reason.name().into()).or_default() += count;
        }
    }
    sums
}

/// The sums over the CPUs, by powers of two.
pub(super) fn bins(there: &There, map: Map) -> Vec<Bin> {
    let mut sums = vec![Bin::default(); abi::SIZES];
    for (key, cpus) in there.rows.get(&map).into_iter().flatten() {
        let Some(sum) = index(key).and_then(|power| sums.get_mut(power as usize)) else { continue };
        for bin in cpus.iter().filter_map(|value| Bin::decode(value).ok()) {
            *sum = Bin { count: sum.count + bin.count, sum: sum.sum + bin.sum };
        }
    }
    sums
}

pub(super) fn forms(there: &There) -> Forms {
    let cpus = there.rows.get(&Map::Forms).and_then(|rows| rows.values().next());
    Forms::sum(cpus.into_iter().flatten().filter_map(|value| Forms::decode(value).ok()))
}

pub(super) fn outs(there: &There) -> Vec<(u32, Out)> {
    let rows = there.rows.get(&Map::Outs).into_iter().flatten();
    rows.filter_map(|(key, value)| Some((index(key)?, Out::decode(value.first()?).ok()?))).collect()
}

/// Packets dropped by the out interfaces and their queues since the session uses them. A program that ends in a redirect
/// never learns of it, so this is what the kernel counts of all their traffic, a super-packet once: a lower bound for
/// copies where nobody else sends. What has changed is written back, so that a count survives its interface and its qdisc.
pub(super) fn out_dropped(runner: &Runner, maps: &Path, there: &There, known: &[(u32, Out)]) -> Result<u64> {
    let mut lines = Vec::new();
    let mut sum: u64 = known.iter().map(|(_, out)| out.dropped).sum();
    for (ifindex, before) in known {
        let (Some(link), Some(hooks)) = (there.link(*ifindex), there.hooks.get(ifindex)) else { continue };
        let now = before.now(lost(link), tc::qdisc_drops(hooks));
        sum += now.dropped - before.dropped;
        if now != *before {
            lines.push(bpftool::update(&maps.join(Map::Outs.name()), &ifindex.to_ne_bytes(), &now.encode()));
        }
    }
    if !lines.is_empty() {
        bpftool::batch(&Runner { dry_run: false, ..*runner }, &lines)?;
    }
    Ok(sum)
}

fn lost(link: &Link) -> u64 {
    link.stats64.tx.dropped + link.stats64.tx.errors
}

/// A pinned map, from `bpftool map show`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ShownMap {
    #[serde(default)]
    pub name: String,
    pub id: u32,
    #[serde(rename = "type")]
    pub kind: String,
    pub bytes_key: u32,
    pub bytes_value: u32,
    pub max_entries: u32,
    /// Where it is pinned.
    #[serde(default)]
    pub pinned: String,
}

/// The maps of a session that say something, those that are there.
pub(crate) fn maps(runner: &Runner, home: &Home, session: &str) -> Result<Vec<ShownMap>> {
    let dir = home.session(session).join("maps");
    let maps: Vec<Map> = Map::shown().filter(|map| dir.join(map.name()).exists()).collect();
    let lines: Vec<String> =
        maps.iter().map(|map| format!("map show pinned {}", dir.join(map.name()).display())).collect();
    let shown = bpftool::ask(runner, &lines)?.into_iter().zip(maps);
    let map = |(answer, map): (Value, Map)| {
        let shown: ShownMap = serde_json::from_value(answer).ok()?;
        let pinned = dir.join(map.name()).display().to_string();
        Some(ShownMap { name: map.name().into(), pinned, ..shown })
    };
    Ok(shown.filter_map(map).collect())
}

/// Dumps of these maps by the field names of the BTF, per-CPU counters summed, in the order of their keys. Of the arrays by
/// remote slot only the slots that hold a remote, of the request only the half in force.
pub(crate) fn dumps(runner: &Runner, home: &Home, session: &str, wanted: &[Map]) -> Result<Vec<Value>> {
    let dir = home.session(session).join("maps");
    let asked = wanted.iter().chain(&[Map::Remotes, Map::Config]);
    let lines: Vec<String> = asked.map(|map| bpftool::dump_question(&dir.join(map.name()))).collect();
    let mut answers = bpftool::ask(runner, &lines).map_err(|err| unreadable(err, session))?;
    let config = answers.pop().unwrap_or_default();
    let remotes = answers.pop().unwrap_or_default();
    let used: Vec<&Value> = remotes.as_array().into_iter().flatten().map(|row| &row["key"]).collect();
    let config = bpftool::rows(&config).ok().and_then(|rows| rows.first()?.values.first().cloned());
    let first = config.and_then(|bytes| crate::datapath::abi::Config::decode(&bytes).ok()).map_or(0, |at| at.request);
    for (answer, map) in answers.iter_mut().zip(wanted) {
        let Some(rows) = answer.as_array_mut() else { continue };
        if map.is_by_remote() {
            rows.retain(|row| used.contains(&&row["key"]));
        }
        rows.sort_by_key(bpftool::key_of);
        if *map == Map::Request {
            let chunks = crate::datapath::abi::REQUEST_CHUNKS as u32;
            let half = u32::from(first)..u32::from(first) + chunks;
            rows.retain(|row| bpftool::key_of(row).as_deref().and_then(index).is_some_and(|at| half.contains(&at)));
        }
    }
    Ok(wanted
        .iter()
        .zip(&answers)
        .map(|(map, dump)| match map {
            Map::Request => request_text(dump),
            _ => bpftool::formatted(dump),
        })
        .collect())
}

/// What a session remembers, as JSON.
fn request_text(dump: &Value) -> Value {
    let rows = bpftool::rows(dump).unwrap_or_default();
    let chunks: Vec<Vec<u8>> = rows.into_iter().filter_map(|row| row.values.into_iter().next()).collect();
    let text = crate::datapath::abi::decode_request(&chunks).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or(Value::Null)
}
