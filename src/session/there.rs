//! What the kernel has of a session, as plain data. Any part of it may be missing.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Error, Result};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::datapath::abi::{self, Config, Direction, Remote, Stat, Tap, TapCounts, TapKey, remote_flag};
use crate::datapath::parts::{Device, Map, Program};
use crate::request::Probe;
use crate::session::away::Guest;
use crate::session::engine::Open;
use crate::session::home::{self, ALIAS, Home, handle};
use crate::session::hops;
use crate::session::relay;
use crate::session::stored::{Hop, Silence, Stored, Unreadable};
use crate::session::upgrade;
use crate::session::version::Foreign;
use crate::tools::bpftool;
use crate::tools::ethtool;
use crate::tools::exec::{Failed, Runner};
use crate::tools::ip::{self, Link, Neighbour};
use crate::tools::rights::Lack;
use crate::tools::tc::{self, Dev, Filter, Hooks};

/// The elements of a map: one value, or one per CPU.
pub(crate) type Rows = BTreeMap<Vec<u8>, Vec<Vec<u8>>>;

/// A session in the kernel.
#[derive(Clone, Debug)]
pub(crate) struct There {
    pub name: String,
    /// When its counters were read.
    pub at: Instant,
    /// In the order of their numbers.
    pub links: Vec<Link>,
    /// The other network namespaces where it watches interfaces, or is to.
    pub guests: Vec<Guest>,
    /// Its pins are in place.
    pub is_published: bool,
    /// Where they are, are made, and go on their way out.
    pub dir: PathBuf,
    pub building: PathBuf,
    pub ending: PathBuf,
    /// Which of the two latter there are: of one half made, or half taken down.
    pub halves: Vec<PathBuf>,
    /// The pinned programs, by their ids.
    pub programs: BTreeMap<Program, u32>,
    /// Programs and maps that the kernel has although their pins are gone.
    pub unpinned_programs: BTreeMap<Program, u32>,
    pub unpinned_maps: BTreeMap<Map, u32>,
    pub rows: BTreeMap<Map, Rows>,
    /// What was dropped before other programs with another map of drops came: a value a CPU and map.
    pub earlier_drops: Vec<Vec<u8>>,
    pub stored: Result<Stored, Unreadable>,
    pub config: Option<Config>,
    /// What is at the hooks of interfaces, by ifindex: of those that were asked about.
    pub hooks: BTreeMap<u32, Hooks>,
    /// Offloads of the bridge that are on and must not be; `None` where nobody has asked.
    pub offloads: Option<Vec<&'static str>>,
    /// Interfaces whose clsact qdisc is ours: marked, or noted as such.
    pub marks: BTreeSet<u32>,
    /// The neighbour table, where somebody has asked.
    pub neighbours: Vec<Neighbour>,
    /// The entries of it that are noted as the session's.
    pub noted: Vec<Hop>,
    /// Interfaces of which it is noted that we were about to add one. A version before left such notes for all.
    pub notes: BTreeSet<u32>,
    /// The other sessions here whose filters have the same handle.
    pub namesakes: Option<Namesakes>,
}

/// Sessions whose names have the same hash: only their programs tell their filters from ours.
#[derive(Clone, Debug, Default)]
pub(crate) struct Namesakes {
    /// The programs that they have pinned.
    theirs: BTreeSet<u32>,
    /// Those that we have pinned, new ones and old ones too.
    ours: BTreeSet<u32>,
    /// One of them has lost its pins: what no one has pinned is its own, not ours.
    has_lost: bool,
}

impl Namesakes {
    fn owns(&self, program: Option<u32>) -> bool {
        let Some(id) = program else { return false };
        self.theirs.contains(&id) || (self.has_lost && !self.ours.is_empty() && !self.ours.contains(&id))
    }

    /// The programs that the session and its namesakes have pinned; `None` where it has no namesake.
    fn find(runner: &Runner, home: &Home, name: &str, links: &[Link]) -> Result<Option<Namesakes>> {
        let of_relays = links.iter().filter_map(relay::session).map(String::from);
        let all: BTreeSet<String> = home.sessions().into_iter().chain(home.halves()).chain(of_relays).collect();
        let others: Vec<&String> = all.iter().filter(|at| *at != name && handle(at) == handle(name)).collect();
        if others.is_empty() {
            return Ok(None);
        }
        let mut found = Namesakes { ours: pinned(runner, home, name)?, ..Namesakes::default() };
        for other in others {
            let theirs = pinned(runner, home, other)?;
            found.has_lost |= theirs.is_empty();
            found.theirs.extend(theirs);
        }
        Ok(Some(found))
    }
}

/// The programs that a session or its halves have pinned.
fn pinned(runner: &Runner, home: &Home, name: &str) -> Result<BTreeSet<u32>> {
    let dirs = [home.session(name), home.building(name), home.ending(name)];
    let pins = dirs.iter().flat_map(|dir| {
        let names = Program::ALL.iter().flat_map(|at| [at.name().to_string(), format!("old_{}", at.name())]);
        names.map(|name| dir.join(name)).filter(|pin| pin.exists())
    });
    let lines: Vec<String> = pins.map(|pin| format!("prog show pinned {}", pin.display())).collect();
    let answers = ask_each(runner, &lines)?;
    Ok(answers.iter().filter_map(|answer| bpftool::value(answer).ok()?["id"].as_u64()).map(|id| id as u32).collect())
}

impl There {
    /// Reads a session's pins: one bpftool, another one where a pin is gone.
    pub(crate) fn read(runner: &Runner, home: &Home, name: &str, links: &[Link]) -> Result<There> {
        There::read_maps(runner, home, name, links, &Map::ALL)
    }

    /// The same without the maps that only say how the session is.
    pub(crate) fn read_counters(runner: &Runner, home: &Home, name: &str, links: &[Link]) -> Result<There> {
        There::read_maps(runner, home, name, links, &COUNTED)
    }

    fn read_maps(runner: &Runner, home: &Home, name: &str, links: &[Link], maps: &[Map]) -> Result<There> {
        let mut there = There::named(runner, home, name, links)?;
        if there.is_published {
            let dir = there.dir.clone();
            there.read_pins(runner, &dir, maps).map_err(|err| unreadable(err, name))?;
            there.decode();
        }
        Ok(there)
    }

    /// The same to take it away, which needs no counters: what cannot be read is not needed.
    pub(crate) fn read_to_remove(runner: &Runner, home: &Home, name: &str, links: &[Link]) -> Result<There> {
        let mut there = There::named(runner, home, name, links)?;
        if !there.is_published {
            return Ok(there);
        }
        let maps = [Map::Config, Map::Request];
        let dumps = maps.iter().map(|map| bpftool::dump_question(&there.dir.join("maps").join(map.name())));
        let shows = Program::ALL.iter().map(|at| format!("prog show pinned {}", there.dir.join(at.name()).display()));
        let lines: Vec<String> = dumps.chain(shows).collect();
        let one = |line: &String| bpftool::ask_raw(runner, std::slice::from_ref(line)).ok()?.pop();
        let answers: Vec<Option<Box<RawValue>>> = match bpftool::ask_raw(runner, &lines) {
            Ok(answers) => answers.into_iter().map(Some).collect(),
            Err(_) => lines.iter().map(one).collect(),
        };
        let (dumps, shown) = answers.split_at(maps.len());
        for (map, dump) in maps.into_iter().zip(dumps) {
            there.rows.extend(dump.as_ref().and_then(|dump| rows(dump)).map(|rows| (map, rows)));
        }
        for (program, answer) in Program::ALL.into_iter().zip(shown) {
            let answer = answer.as_ref().and_then(|answer| bpftool::value(answer).ok()).unwrap_or_default();
            let id = answer["id"].as_u64().filter(|_| answer["name"] == program.name());
            there.programs.extend(id.map(|id| (program, id as u32)));
        }
        there.decode();
        Ok(there)
    }

    /// What sessions are asked for, and where they send: one bpftool for all of them.
    pub(crate) fn read_requests(runner: &Runner, home: &Home, names: &[String], links: &[Link]) -> Result<Vec<There>> {
        const MAPS: [Map; 3] = [Map::Config, Map::Remotes, Map::Request];
        let all = names.iter().map(|name| There::named(runner, home, name, links));
        let mut all = all.collect::<Result<Vec<There>>>()?;
        let pins = all.iter().flat_map(|there| MAPS.map(|map| there.dir.join("maps").join(map.name())));
        let lines: Vec<String> = pins.map(|pin| bpftool::dump_question(&pin)).collect();
        let answers = ask_each(runner, &lines)?;
        for (there, dumps) in all.iter_mut().zip(answers.chunks(MAPS.len())) {
            there.rows = MAPS.iter().zip(dumps).filter_map(|(map, dump)| Some((*map, rows(dump)?))).collect();
            there.decode();
        }
        Ok(all)
    }

    fn named(runner: &Runner, home: &Home, name: &str, links: &[Link]) -> Result<There> {
        let dir = home.session(name);
        let (building, ending) = (home.building(name), home.ending(name));
        let halves = [&building, &ending].into_iter().filter(|dir| home.has(dir)).cloned().collect();
        Ok(There {
            name: name.into(),
            at: Instant::now(),
            links: links.to_vec(),
            guests: Vec::new(),
            is_published: home.has(&dir),
            dir: dir.clone(),
            building,
            ending,
            halves,
            programs: BTreeMap::new(),
            unpinned_programs: BTreeMap::new(),
            unpinned_maps: BTreeMap::new(),
            rows: BTreeMap::new(),
            earlier_drops: Vec::new(),
            stored: Err(Unreadable::Gone),
            config: None,
            hooks: BTreeMap::new(),
            offloads: None,
            marks: home.clsact_marks().into_iter().collect(),
            notes: home.clsact_marks().into_iter().collect(),
            namesakes: Namesakes::find(runner, home, name, links)?,
            neighbours: Vec::new(),
            noted: hops::noted(&home.session(name)),
        })
    }

    fn read_pins(&mut self, runner: &Runner, dir: &Path, wanted: &[Map]) -> Result<()> {
        let programs: Vec<Program> = Program::ALL.into_iter().filter(|at| dir.join(at.name()).exists()).collect();
        // What counts later is read first: then nothing can seem to have been sent that was not asked for.
        let order = [Map::RemoteStats, Map::Drops].into_iter().chain(wanted.iter().copied());
        let mut maps: Vec<Map> = Vec::new();
        for map in order.filter(|map| dir.join("maps").join(map.name()).exists() && map.is_read()) {
            if !maps.contains(&map) {
                maps.push(map);
            }
        }
        let mut lines: Vec<String> =
            programs.iter().map(|at| format!("prog show pinned {}", dir.join(at.name()).display())).collect();
        lines.extend(maps.iter().map(|map| bpftool::dump_question(&dir.join("maps").join(map.name()))));
        lines.extend(upgrade::earlier_drops(dir).iter().map(|pin| bpftool::dump_question(pin)));
        let answers = ask_each(runner, &lines)?;
        self.at = Instant::now();
        let (shown, dumps) = answers.split_at(programs.len());
        let earlier = dumps[maps.len()..].iter().filter_map(|dump| rows(dump));
        self.earlier_drops = earlier.flat_map(|rows| rows.into_values().flatten()).collect();
        let mut held = BTreeSet::new();
        for (program, answer) in programs.iter().zip(shown) {
            let answer = bpftool::value(answer)?;
            let Some(id) = answer["id"].as_u64().filter(|_| answer["name"] == program.name()) else { continue };
            self.programs.insert(*program, id as u32);
            held.extend(answer["map_ids"].as_array().into_iter().flatten().filter_map(Value::as_u64));
        }
        for (map, dump) in maps.iter().zip(dumps) {
            if let Some(rows) = rows(dump) {
                self.rows.insert(*map, rows);
            }
        }
        let is_missing = wanted.iter().any(|map| match map.is_read() {
            true => !self.rows.contains_key(map),
            false => !dir.join("maps").join(map.name()).exists(),
        });
        if is_missing {
            held.extend(self.held_by_relay(runner)?);
            self.find_maps(runner, dir, &held)?;
        }
        Ok(())
    }

    /// The maps of the programs at the relay's hooks: they hold them all, whatever pins are gone.
    fn held_by_relay(&self, runner: &Runner) -> Result<Vec<u64>> {
        let devices: Vec<Dev> = self.relays().iter().map(|link| link.dev()).collect();
        let hooks = tc::hooks(runner, &devices)?;
        let filters = hooks.iter().flat_map(|hooks| hooks.ingress.iter().chain(&hooks.egress));
        let ids = filters.filter(|filter| filter.handle() == Some(handle(&self.name))).filter_map(Filter::id);
        let lines: Vec<String> = ids.map(|id| format!("prog show id {id}")).collect();
        let mut held = Vec::new();
        for shown in ask_each(runner, &lines)? {
            let shown = bpftool::value(&shown)?;
            held.extend(shown["map_ids"].as_array().into_iter().flatten().filter_map(Value::as_u64));
        }
        Ok(held)
    }

    /// Finds maps whose pins are gone among those that programs hold.
    fn find_maps(&mut self, runner: &Runner, dir: &Path, held: &BTreeSet<u64>) -> Result<()> {
        let ids: Vec<u64> = held.iter().copied().collect();
        let lines: Vec<String> = ids.iter().map(|id| format!("map show id {id}")).collect();
        for (id, shown) in ids.iter().zip(ask_each(runner, &lines)?) {
            let shown = bpftool::value(&shown)?;
            let Some(map) = shown["name"].as_str().and_then(Map::of) else { continue };
            let is_pinned = dir.join("maps").join(map.name()).exists();
            if self.rows.contains_key(&map) || (!map.is_read() && is_pinned) {
                continue;
            }
            self.unpinned_maps.insert(map, *id as u32);
            if let Some(rows) = ask_each(runner, &[format!("map dump id {id}")])?.first().and_then(|dump| rows(dump)) {
                self.rows.insert(map, rows);
            }
        }
        Ok(())
    }

    fn decode(&mut self) {
        let config = self.rows.get(&Map::Config).and_then(|rows| rows.values().next()?.first());
        self.config = config.and_then(|bytes| Config::decode(bytes).ok());
        let halves = [0, abi::REQUEST_CHUNKS as u16];
        self.stored = match (&self.config, self.rows.get(&Map::Config)) {
            (Some(config), _) if halves.contains(&config.request) => self.memory(config.request),
            (None, rows) if rows.is_none_or(Rows::is_empty) => self.memory_of(halves),
            // The layout of another version, which may still say which.
            _ => match self.memory_of(halves) {
                Err(why @ Unreadable::OtherVersion(_)) => Err(why),
                _ => Err(Unreadable::OtherVersion(Foreign::default())),
            },
        };
    }

    /// Where nothing says which half is in force.
    fn memory_of(&self, [first, second]: [u16; 2]) -> Result<Stored, Unreadable> {
        match self.memory(first) {
            Err(Unreadable::Gone | Unreadable::Damaged(_)) => self.memory(second),
            read => read,
        }
    }

    fn memory(&self, first: u16) -> Result<Stored, Unreadable> {
        let Some(rows) = self.rows.get(&Map::Request) else { return Err(Unreadable::Gone) };
        let half = u32::from(first)..u32::from(first) + abi::REQUEST_CHUNKS as u32;
        let chunks = half.map_while(|index| rows.get(&index.to_ne_bytes()[..])?.first().cloned());
        let text = abi::decode_request(&chunks.collect::<Vec<_>>());
        Stored::decode(&text.map_err(|err| Unreadable::Damaged(err.to_string()))?)
    }

    /// The same beside what a session has elsewhere.
    pub(crate) fn with(mut self, open: &Open) -> There {
        self.links = open.machine.links.clone();
        self.guests = open.machine.elsewhere.guests.clone();
        self
    }

    /// Looks at the hooks of these interfaces, and of the relay and at its features where `relay` says so.
    pub(crate) fn look(&mut self, runner: &Runner, interfaces: &BTreeSet<u32>, relay: bool) -> Result<()> {
        let devices = if relay { self.relay_indexes() } else { BTreeSet::new() };
        let wanted = |link: &&Link| interfaces.contains(&link.ifindex) || devices.contains(&link.ifindex);
        let found: Vec<Link> = self.links.iter().filter(wanted).cloned().collect();
        let devices: Vec<Dev> = found.iter().map(Link::dev).collect();
        for (link, mut hooks) in found.iter().zip(tc::hooks(runner, &devices)?) {
            if link.away.is_some() {
                // Where sessions of that name can come from anywhere, ours has another handle.
                hooks.rename(handle(&self.mark()), handle(&self.name));
            }
            if hooks.marked {
                self.marks.insert(link.ifindex);
            }
            self.hooks.insert(link.ifindex, hooks);
        }
        if relay {
            let bridge = self.device(Device::Bridge).map(|link| link.ifname.clone());
            self.offloads = Some(match bridge {
                Some(bridge) => relay::offloads(&ethtool::features(runner, &bridge)?),
                None => Vec::new(),
            });
        }
        for program in Program::ALL.into_iter().filter(|program| !self.programs.contains_key(program)) {
            let at = self.hooks.values().find_map(|hooks| {
                let mut filters = hooks.ingress.iter().chain(&hooks.egress);
                filters.find(|filter| self.is_ours(filter) && filter.program() == program.name())?.id()
            });
            if let Some(id) = at {
                self.unpinned_programs.insert(program, id);
            }
        }
        Ok(())
    }

    /// Looks at the neighbour table, if the session has entries in it for one of these remotes.
    pub(crate) fn look_at_neighbours(&mut self, runner: &Runner, of: impl Fn(&IpAddr) -> bool) -> Result<()> {
        let is_foreign = self.stored.is_err() && !self.hops().is_empty();
        if is_foreign || self.stored.as_ref().is_ok_and(|stored| stored.neighbours.keys().any(of)) {
            self.neighbours = ip::neighbours(runner)?;
        }
        Ok(())
    }

    /// The entries of the neighbour table that are kept fresh for the session, each once.
    pub(crate) fn hops(&self) -> Vec<Hop> {
        match &self.stored {
            Ok(stored) => stored.hops(),
            Err(Unreadable::OtherVersion(foreign)) if !foreign.hops.is_empty() => foreign.hops.clone(),
            Err(_) => self.noted.clone(),
        }
    }

    /// What the neighbour table has of one of them.
    pub(crate) fn neighbour(&self, hop: &Hop) -> Option<&Neighbour> {
        let dev = &self.link(hop.ifindex)?.ifname;
        self.neighbours.iter().find(|at| at.dst == hop.address && at.dev == *dev)
    }

    /// The session by a name that no other has, wherever it comes from.
    pub(crate) fn mark(&self) -> String {
        home::mark(&self.dir)
    }

    /// Is this filter one of the session's?
    pub(crate) fn is_ours(&self, filter: &Filter) -> bool {
        if self.namesakes.as_ref().is_some_and(|namesakes| namesakes.owns(filter.id())) {
            return false;
        }
        // Another version may have others.
        let known = filter.program().starts_with("snif_");
        let is_pinned = filter.id().is_some_and(|id| self.programs.values().any(|known| *known == id));
        // Before iproute2 6.0 `tc` tells no names.
        let by_id = filter.program().is_empty() && filter.kind == "bpf" && (is_pinned || filter.id().is_some());
        filter.handle() == Some(handle(&self.name)) && (known || by_id)
    }

    /// Is this filter the session's tap of a direction?
    pub(crate) fn is_tap(&self, filter: &Filter, direction: Direction) -> bool {
        let name = filter.program();
        self.is_ours(filter) && (name == Program::tap(direction).name() || Program::of(name).is_none())
    }

    /// The session's taps at a hook: where each is, and the program that it runs.
    pub(crate) fn taps_at(&self, key: TapKey) -> Vec<(u32, Option<u32>)> {
        let filters = self.hooks.get(&key.ifindex).map_or(&[][..], |hooks| hooks.filters(key.direction));
        let taps = filters.iter().filter(|filter| self.is_tap(filter, key.direction));
        taps.map(|filter| (filter.pref, filter.id())).collect()
    }

    /// Is the pinned tap at this hook?
    pub(crate) fn is_attached(&self, key: TapKey) -> bool {
        let program = Program::tap(key.direction);
        let pinned = self.programs.get(&program).or(self.unpinned_programs.get(&program));
        self.taps_at(key).iter().any(|(_, id)| pinned.is_some() && (id.is_none() || id.as_ref() == pinned))
    }

    pub(crate) fn link(&self, ifindex: u32) -> Option<&Link> {
        ip::find(&self.links, ifindex)
    }

    /// A device of the relay, if the one with its number is no stranger.
    pub(crate) fn device(&self, device: Device) -> Option<&Link> {
        let config = self.config.as_ref()?;
        let ifindex = match device {
            Device::Bridge => config.relay,
            Device::Port => config.port,
            Device::Peer => config.peer,
        };
        self.link(ifindex).filter(|link| relay::is_one(link))
    }

    fn relay_indexes(&self) -> BTreeSet<u32> {
        Device::ALL.into_iter().filter_map(|device| Some(self.device(device)?.ifindex)).collect()
    }

    /// The devices that the session's relays have or had, by alias and name.
    pub(crate) fn relays(&self) -> Vec<&Link> {
        let alias = format!("{ALIAS}{}", self.name);
        self.links.iter().filter(|link| link.ifalias == alias || relay::is_nameless(link)).collect()
    }

    fn rows_of(&self, map: Map) -> impl Iterator<Item = (&Vec<u8>, &Vec<Vec<u8>>)> {
        self.rows.get(&map).into_iter().flatten()
    }

    /// One element of a map with one value.
    pub(crate) fn value(&self, map: Map, key: &[u8]) -> Option<&[u8]> {
        self.rows.get(&map)?.get(key)?.first().map(Vec::as_slice)
    }

    /// The rows of taps, by their keys: slot and counters.
    pub(crate) fn tap_rows(&self) -> BTreeMap<(u32, u32), Tap> {
        let tap = |(key, cpus): (&Vec<u8>, &Vec<Vec<u8>>)| {
            let key = TapKey::decode(key).ok()?;
            Some(((key.ifindex, key.direction as u32), tap(cpus)?))
        };
        self.rows_of(Map::Taps).filter_map(tap).collect()
    }

    /// The rows of remotes, by slot.
    pub(crate) fn remote_rows(&self) -> BTreeMap<u32, Remote> {
        let remote =
            |(key, value): (&Vec<u8>, &Vec<Vec<u8>>)| Some((index(key)?, Remote::decode(value.first()?).ok()?));
        self.rows_of(Map::Remotes).filter_map(remote).collect()
    }

    /// The row of one of them.
    pub(crate) fn remote_row(&self, slot: u32) -> Option<Remote> {
        Remote::decode(self.value(Map::Remotes, &slot.to_ne_bytes())?).ok()
    }

    /// Where copies to each remote go now: out interface and link address.
    pub(crate) fn next_hops(&self) -> BTreeMap<IpAddr, (u32, [u8; 6])> {
        let Ok(stored) = &self.stored else { return BTreeMap::new() };
        let hop = |(remote, slot): (&IpAddr, &u32)| {
            let row = self.remote_row(*slot)?;
            let is_known = row.ifindex != 0 && !row.has(remote_flag::UNRESOLVED) && !row.has(remote_flag::L3);
            Some((*remote, (row.ifindex, row.mac().try_into().ok().filter(|_| is_known)?)))
        };
        stored.remotes.iter().filter_map(hop).collect()
    }

    /// The remotes that are down.
    #[cfg(test)]
    pub(crate) fn down(&self) -> BTreeSet<IpAddr> {
        self.stored.as_ref().map_or_else(|_| BTreeSet::new(), |stored| stored.down.keys().copied().collect())
    }

    /// The remotes that ping is to ask, each with the source of its copies.
    pub(crate) fn probed(&self) -> Vec<(IpAddr, IpAddr)> {
        let Ok(stored) = &self.stored else { return Vec::new() };
        let options = &stored.request.options;
        let remotes = options.remotes.iter().filter(|_| options.probe == Probe::Icmp);
        let probed = |remote: &IpAddr| {
            let row = self.remote_row(*stored.remotes.get(remote)?)?;
            (!row.has(remote_flag::UNRESOLVED)).then_some((*remote, row.addresses().0))
        };
        remotes.filter_map(probed).collect()
    }

    /// The remotes whose next hops are known not to answer, down or without an address.
    pub(crate) fn unanswered(&self) -> BTreeSet<IpAddr> {
        let Ok(stored) = &self.stored else { return BTreeSet::new() };
        let is_silent = |(remote, slot): &(&IpAddr, &u32)| {
            let is_unresolved = |row: Remote| row.ifindex != 0 && row.has(remote_flag::UNRESOLVED);
            stored.down.get(remote) == Some(&Silence::Neighbour) || self.remote_row(**slot).is_some_and(is_unresolved)
        };
        stored.remotes.iter().filter(is_silent).map(|(remote, _)| *remote).collect()
    }

    /// What a remote slot has counted.
    pub(crate) fn remote_stat(&self, slot: u32) -> Stat {
        let cpus = self.rows.get(&Map::RemoteStats).and_then(|rows| rows.get(&slot.to_ne_bytes()[..]));
        Stat::sum(cpus.into_iter().flatten().filter_map(|value| Stat::decode(value).ok()))
    }

    /// What a tap has counted.
    pub(crate) fn tap_counts(&self, key: TapKey) -> TapCounts {
        let cpus = self.rows.get(&Map::Taps).and_then(|rows| rows.get(&key.encode()));
        cpus.and_then(|cpus| tap(cpus)).map_or_else(TapCounts::default, |tap| tap.counts)
    }

    /// The device that programs send to by this key.
    pub(crate) fn referred(&self, key: u32) -> Option<u32> {
        index(self.value(Map::Devices, &key.to_ne_bytes())?)
    }
}

/// The rows of maps that the programs alone need, of a session with these pins. What cannot be read has none.
pub(crate) fn own_rows(runner: &Runner, dir: &Path, maps: &[Map]) -> Result<BTreeMap<Map, Rows>> {
    let pins = maps.iter().map(|map| (*map, dir.join("maps").join(map.name())));
    let pins: Vec<(Map, PathBuf)> = pins.filter(|(_, pin)| pin.exists()).collect();
    let lines: Vec<String> = pins.iter().map(|(_, pin)| bpftool::dump_question(pin)).collect();
    let answers = ask_each(runner, &lines)?;
    Ok(pins.iter().zip(answers).filter_map(|((map, _), dump)| Some((*map, rows(&dump)?))).collect())
}

/// What has counted, and what is needed to tell whose it is.
const COUNTED: [Map; 10] = [
    Map::Config,
    Map::Drops,
    Map::Forms,
    Map::Outs,
    Map::RemoteStats,
    Map::Remotes,
    Map::Request,
    Map::Sizes,
    Map::Taps,
    Map::Times,
];

impl Map {
    /// Do its elements say how the session is, or what it has counted?
    fn is_read(self) -> bool {
        !matches!(self, Map::Bucket | Map::RemoteState | Map::Sequences | Map::SequencesFar | Map::Rest | Map::Scratch)
    }
}

/// A tap's row: its slot, and what all CPUs have counted.
fn tap(cpus: &[Vec<u8>]) -> Option<Tap> {
    let cpus: Vec<Tap> = cpus.iter().filter_map(|value| Tap::decode(value).ok()).collect();
    let first = cpus.first()?;
    Some(Tap { slot: first.slot, relay: first.relay, counts: TapCounts::sum(cpus.iter().map(|tap| tap.counts)) })
}

/// A key, or a value, that is one number.
pub(crate) fn index(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn rows(dump: &RawValue) -> Option<Rows> {
    let rows = bpftool::rows(dump).ok()?;
    Some(rows.into_iter().map(|row| (row.key, row.values)).collect())
}

/// Asks bpftool many questions at once; one by one where one of them fails, which then has no answer.
pub(crate) fn ask_each(runner: &Runner, lines: &[String]) -> Result<Vec<Box<RawValue>>> {
    if lines.is_empty() {
        return Ok(Vec::new());
    }
    match bpftool::ask_raw(runner, lines) {
        Err(err) if err.is::<Failed>() => {
            let none = || RawValue::NULL.to_owned();
            let one = |line: &String| match bpftool::ask_raw(runner, std::slice::from_ref(line)) {
                Ok(mut answers) => Ok(answers.pop().unwrap_or_else(none)),
                Err(err) if err.downcast_ref().is_some_and(says_gone) => Ok(none()),
                Err(err) => Err(err),
            };
            lines.iter().map(one).collect()
        }
        answers => answers,
    }
}

/// What may not be read, with the session's name.
pub(crate) fn unreadable(err: Error, session: &str) -> Error {
    if err.is::<Lack>() { err.context(format!("session {session}")) } else { err }
}

/// It is not there, or it is something else: not merely that it could not be read.
fn says_gone(failed: &Failed) -> bool {
    ["incorrect object type", "No such file"].iter().any(|words| failed.stderr.contains(words))
}

/// The key of a tap.
pub(crate) fn key(ifindex: u32, direction: Direction) -> TapKey {
    TapKey { ifindex, direction }
}
