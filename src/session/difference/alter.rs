//! A session that is there, and is to be otherwise.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::datapath::abi::{self, Config, Direction, Remote, Stat, TapCounts, TapKey, device, remote_flag};
use crate::datapath::objects;
use crate::datapath::parts::{Device, Map, Program};
use crate::datapath::source::Source;
use crate::datapath::template;
use crate::request::{Watch, Watched, listed};
use crate::session::ahead;
use crate::session::change::{Act, Change, From};
use crate::session::difference::hooks::{attach, detach, free_pref, taken, unmarks};
use crate::session::difference::make::{guests, settle};
use crate::session::difference::neighbours;
use crate::session::difference::rows::{Expected, ORDER, config, down, slots, spread_writes, writes, zeros};
use crate::session::difference::{Wanted, crowd};
use crate::session::pattern;
use crate::session::relay;
use crate::session::stored::{Compiled, Guest, Place, Stored};
use crate::session::there::{Rows, There, key};
use crate::tools::exec::quote;
use crate::tools::ip::{Link, mac_text};

pub(super) struct Alter<'a> {
    pub(super) wanted: &'a Wanted,
    pub(super) there: &'a There,
    pub(super) stored: &'a Stored,
    pub(super) changes: Vec<Change>,
    /// What goes once no tap needs it.
    pub(super) idle: Vec<Change>,
}

impl Alter<'_> {
    pub(super) fn changes(mut self) -> (Vec<Change>, bool) {
        self.halves();
        self.pins();
        self.changes.extend(crowd(self.wanted));
        let (target, more) = self.memory();
        self.rows(&target);
        let has_moved = self.changes.iter().any(|change| change.subject.starts_with("remote "));
        self.changes.extend(neighbours::keep(self.wanted, self.there, &target, has_moved));
        let target = self.programs(target);
        let down = self.flows(&target);
        self.relay_and_config(&target, down);
        self.taps();
        self.surplus(&target);
        let idle = std::mem::take(&mut self.idle);
        self.changes.extend(idle);
        if self.is_reloaded() {
            // The old programs go last: until then, they can come back.
            self.changes.push(Change::silent(vec![Act::RemovePins(self.there.building.clone())]));
        }
        (self.changes, more)
    }

    fn push(&mut self, subject: &str, fault: &str, fix: &str, acts: Vec<Act>) {
        if !acts.is_empty() {
            self.changes.push(Change::new(subject, fault, fix, acts));
        }
    }

    /// What a process that was killed has left.
    fn halves(&mut self) {
        let pins = self.there.halves.iter().cloned().map(Act::RemovePins).collect();
        self.push("session", "half a change was left", "removed", pins);
    }

    fn pins(&mut self) {
        for (map, id) in &self.there.unpinned_maps {
            self.changes.push(Change::new(
                format!("map {}", map.name()),
                "its pin is gone",
                "pinned",
                vec![Act::PinMap(*map, *id)],
            ));
        }
        let kept = if self.must_load() { BTreeMap::new() } else { self.there.unpinned_programs.clone() };
        for (program, id) in &kept {
            let pin = vec![Act::PinProgram(*program, *id)];
            self.changes.push(Change::new(format!("program {}", program.name()), "its pin is gone", "pinned", pin));
        }
    }

    /// Does a program have to be loaded because nothing has it any more?
    fn must_load(&self) -> bool {
        let has = |program: &Program| {
            self.there.programs.contains_key(program) || self.there.unpinned_programs.contains_key(program)
        };
        // Where hooks were not asked about, nothing is known of what they hold.
        self.there.offloads.is_some() && !Program::ALL.iter().all(has)
    }

    /// What the session is to remember, with notes of what has changed in it.
    fn memory(&mut self) -> (Stored, bool) {
        let (wanted, there) = (self.wanted, self.there);
        let mut target = Stored { request: wanted.request.clone(), ..self.stored.clone() };
        let mut notes: Vec<(String, String, String)> = Vec::new();
        self.renamed(&mut target, &mut notes);
        let mut numbers = target.free_numbers();
        let mut before = self.stored.request.clone();
        for (new, place) in &target.interfaces {
            let old = self.stored.place(place.ifindex).map(|(old, _)| old);
            for watched in before.interfaces.iter_mut().filter(|watched| Some(&watched.interface) == old) {
                watched.interface.clone_from(new);
            }
        }
        for flag in before.differences(&wanted.request) {
            notes.push(("request".into(), flag, "stored".into()));
        }
        for (watched, link) in &wanted.interfaces {
            let name = &watched.interface;
            let Some(link) = link else {
                // What the request names came by no pattern, whatever was before.
                target.interfaces.get_mut(name).into_iter().for_each(|place| place.pattern = None);
                if let Some((why, fix)) = self.unfit(name) {
                    self.changes.push(Change::new(name.clone(), why, fix, Vec::new()));
                } else if self.stored.interfaces.contains_key(name) {
                    self.changes.push(Change::new(
                        name.clone(),
                        "it is gone",
                        "it is watched again once it is back and `snifctl sync` is run",
                        Vec::new(),
                    ));
                }
                continue;
            };
            self.interface(&mut target, watched, link, &mut numbers, &mut notes);
        }
        let mut more = self.leaving_interfaces(&mut target, &mut notes);
        for remote in &wanted.request.options.remotes {
            if !target.remotes.contains_key(remote) {
                let slot = free_slot(&target, there);
                target.remotes.insert(*remote, slot);
            }
        }
        more |= self.leaving_remotes(&mut target);
        target.neighbours = neighbours::wanted_hops(wanted, there);
        target.down = down(wanted, Some(self.stored));
        self.changes.extend(neighbours::release(there, &target.hops()));
        let (hops, down) = (target.neighbours.clone(), target.down.clone());
        if (Stored { neighbours: hops, down, ..self.stored.clone() }) == target {
            // A step of what is said of the next hops and remotes.
            let store = (target != *self.stored).then(|| Act::Store(Box::new(target.clone())));
            self.changes.extend(store.map(|store| Change::silent(vec![store])));
        } else {
            let subject = |notes: &[(String, String, String)]| match notes {
                [] => ("counters".into(), "some belong to what is no longer copied".into(), "added up".into()),
                [only] => only.clone(),
                [first, rest @ ..] => {
                    // Of another subject, the fault says which.
                    let other = |(subject, fault, _): &(String, String, String)| match *subject == first.0 {
                        true => fault.clone(),
                        false => format!("{subject}: {fault}"),
                    };
                    let faults = [first.1.clone()].into_iter().chain(rest.iter().map(other));
                    (first.0.clone(), listed(faults), first.2.clone())
                }
            };
            let (subject, fault, fix) = subject(&notes);
            self.changes.push(Change::new(subject, fault, fix, vec![Act::Store(Box::new(target.clone()))]));
        }
        (target, more)
    }

    /// Why a name that is waited for is not watched although it is there.
    fn unfit(&self, name: &str) -> Option<(String, String)> {
        let link = pattern::named(&self.there.links, name)?;
        let told = match (relay::is_one(link), link.is_ethernet()) {
            (true, _) => "it is a relay of snifctl, which carries copies only".into(),
            (_, false) => {
                format!("it has no Ethernet header (link type {}), which is not supported yet", link.link_type)
            }
            _ => return None,
        };
        Some((told, format!("take it out with: snifctl tap remove {} --name {}", quote(name), self.there.name)))
    }

    /// The places that are known, by the names that the request has for them now; of a pattern's, by their own.
    fn renamed(&self, target: &mut Stored, notes: &mut Vec<(String, String, String)>) {
        let now = self.wanted.by_index();
        let mut places: BTreeMap<String, Place> = BTreeMap::new();
        let is_there = |place: &Place| self.there.link(place.ifindex).is_some();
        // Those that are gone give way to others of that name.
        let (there, gone): (Vec<_>, Vec<_>) = self.stored.interfaces.iter().partition(|(_, place)| is_there(place));
        for (name, place) in there {
            let own = || self.there.link(place.ifindex).filter(|_| place.pattern.is_some()).map(|link| &link.ifname);
            let new = now.get(&place.ifindex).map(|watched| &watched.interface).or_else(own).unwrap_or(name).clone();
            if new != *name {
                notes.push((new.clone(), format!("it was called {name}"), "followed".into()));
            }
            places.insert(new, place.clone());
        }
        for (name, place) in gone {
            match places.get_mut(name) {
                Some(other) => self.merge(place, other, &mut target.removed_taps),
                None => drop(places.insert(name.clone(), place.clone())),
            }
        }
        target.interfaces = places;
    }

    /// Counts what an interface that is gone has counted for the one that has its name now.
    fn merge(&self, gone: &Place, other: &mut Place, removed: &mut TapCounts) {
        for direction in gone.watch.directions() {
            let counted = [self.there.tap_counts(key(gone.ifindex, *direction)), gone.before(*direction)];
            if other.watch.has(*direction) {
                let mut before = other.before.unwrap_or_default();
                let sum = TapCounts::sum(counted.into_iter().chain([before[*direction as usize]]));
                before[*direction as usize] = sum;
                other.before = Some(before);
            } else {
                *removed = TapCounts::sum(counted.into_iter().chain([*removed]));
            }
        }
    }

    /// What is said of an interface that has come by itself.
    fn arrival(&self, name: &str, by: Option<&str>) -> Option<(String, String, String)> {
        let said = by.unwrap_or(name);
        self.stored.request.interfaces.iter().find(|watched| watched.interface == said)?;
        let fault = match by {
            Some(pattern) => format!("{pattern} matches it, and it is not watched yet"),
            None => "it is there, and it is not watched yet".into(),
        };
        Some((name.into(), fault, "watched".into()))
    }

    fn interface(
        &self,
        target: &mut Stored,
        watched: &Watched,
        link: &Link,
        numbers: &mut impl Iterator<Item = u32>,
        notes: &mut Vec<(String, String, String)>,
    ) {
        let name = &watched.interface;
        let by = pattern::of(&self.wanted.request, name, link);
        if !target.interfaces.contains_key(name) {
            notes.extend(self.arrival(name, by));
        }
        let place = target.interfaces.entry(name.clone()).or_insert_with(|| Place {
            ifindex: link.ifindex,
            number: numbers.next().expect("numbers do not end"),
            mtu: link.mtu,
            watch: watched.direction,
            before: None,
            passed: Some(link.passed()),
            pattern: by.map(String::from),
            guest: Guest::of(link),
        });
        if place.pattern.as_deref() != by {
            place.pattern = by.map(String::from);
            if self.stored.request.interfaces == self.wanted.request.interfaces {
                notes.push((name.clone(), format!("it came by {}", by.unwrap_or("another name")), "noted".into()));
            }
        }
        if place.ifindex != link.ifindex {
            let counted = |direction| {
                let own = self.there.tap_counts(key(place.ifindex, direction));
                TapCounts::sum([own, place.before(direction)])
            };
            place.before = Some([counted(Direction::Ingress), counted(Direction::Egress)]);
            (place.ifindex, place.mtu, place.passed) = (link.ifindex, link.mtu, Some(link.passed()));
            place.guest = Guest::of(link);
            notes.push((name.clone(), "it was made again".into(), "watched".into()));
        }
        if place.watch.with(watched.direction) != place.watch {
            place.passed = Some(link.passed());
        }
        place.watch = place.watch.with(watched.direction);
        if place.mtu != link.mtu {
            notes.push((name.clone(), format!("its MTU was {}", place.mtu), format!("noted: {}", link.mtu)));
            place.mtu = link.mtu;
        }
    }

    /// Takes out of the memory what is not watched any more, once no filter counts for it.
    fn leaving_interfaces(&self, target: &mut Stored, notes: &mut Vec<(String, String, String)>) -> bool {
        let mut more = false;
        let all = self.wanted.interfaces.iter();
        let wanted: BTreeMap<&str, Watch> = all.map(|(at, _)| (at.interface.as_str(), at.direction)).collect();
        for (name, place) in target.interfaces.clone() {
            for direction in place.watch.directions() {
                if wanted.get(name.as_str()).is_some_and(|watch| watch.has(*direction)) {
                    continue;
                }
                let at = key(place.ifindex, *direction);
                let is_asked = self.there.hooks.contains_key(&place.ifindex);
                let counts =
                    self.there.link(place.ifindex).is_some() && (!is_asked || !self.there.taps_at(at).is_empty());
                if counts {
                    more |= is_asked;
                    continue;
                }
                let counted = [self.there.tap_counts(at), place.before(*direction), target.removed_taps];
                target.removed_taps = TapCounts::sum(counted);
                forget_direction(target, &name, *direction);
                if self.pattern_of(&place).is_some() && !target.interfaces.contains_key(&name) {
                    notes.push((name.clone(), "it is gone".into(), "left out, its counters kept".into()));
                }
            }
        }
        more
    }

    /// The pattern of the request by which an interface was watched.
    fn pattern_of<'a>(&self, place: &'a Place) -> Option<&'a str> {
        let by = place.pattern.as_deref()?;
        self.wanted.request.interfaces.iter().any(|watched| watched.interface == by).then_some(by)
    }

    /// The same of remotes that get no copies any more.
    fn leaving_remotes(&self, target: &mut Stored) -> bool {
        let used = self.there.config.as_ref().map_or(0, |config| config.remotes);
        let mut more = false;
        for (address, slot) in target.remotes.clone() {
            if self.wanted.request.options.remotes.contains(&address) {
                continue;
            }
            if used & (1 << slot) != 0 {
                more = true;
                continue;
            }
            target.removed = Stat::sum([target.removed, self.there.remote_stat(slot)]);
            target.remotes.remove(&address);
        }
        more
    }

    fn rows(&mut self, target: &Stored) {
        let there = self.there;
        // A slot that is given to a new remote has counted for another.
        let new = target.remotes.iter().filter(|(address, _)| !self.stored.remotes.contains_key(address));
        let zeros: Vec<Act> = new.flat_map(|(_, slot)| zeros(*slot)).collect();
        self.changes.extend((!zeros.is_empty()).then(|| Change::silent(zeros)));
        let expected = Expected::of(self.wanted, target, there, false);
        let empty = Rows::new();
        let writes = |map| writes(map, there.rows.get(&map).unwrap_or(&empty), &expected.rows(map));
        let is_written = |slot: u32| {
            let key = slot.to_ne_bytes();
            writes(Map::Remotes).iter().any(|act| matches!(act, Act::Write(_, at, _) if at[..] == key))
        };
        for map in ORDER {
            for act in writes(map) {
                match remote_of_device(&act, target).filter(|(slot, _)| !is_written(*slot)) {
                    Some((_, address)) => {
                        let fault = "the programs do not know its out interface";
                        self.changes.push(Change::new(format!("remote {address}"), fault, "told", vec![act]));
                    }
                    None => self.row(map, act, target),
                }
            }
        }
    }

    /// One row, and what it stands for.
    fn row(&mut self, map: Map, act: Act, target: &Stored) {
        let Act::Write(_, key, value) = &act else { return };
        let is_new = self.there.value(map, key).is_none();
        let change = match map {
            Map::Remotes => {
                let slot = crate::session::there::index(key).unwrap_or_default();
                let (subject, fault) = self.remote_fault(slot, value, target);
                Change::new(subject, fault, "written", vec![act])
            }
            Map::Outs if self.is_out(key) => Change::new("map outs", "a row is missing", "written", vec![act]),
            // Steps of what follows, or of a tap that is new.
            Map::Devices | Map::Outs => Change::silent(vec![act]),
            Map::Tunnels if self.has_changed(value) => Change::silent(vec![act]),
            Map::Tunnels | Map::Underlay => {
                Change::new(format!("map {}", map.name()), "a row is missing or damaged", "written", vec![act])
            }
            _ if self.stored.interfaces != target.interfaces => Change::silent(vec![act]),
            _ => {
                let tap = self.tap_of(map, key, value, target);
                let fault = format!("its row in {} is {}", map.name(), if is_new { "missing" } else { "damaged" });
                Change::new(tap, fault, "written", vec![act])
            }
        };
        self.changes.push(change);
    }

    /// Does the row of the remote with this slot change, too?
    fn has_changed(&self, slot: &[u8]) -> bool {
        let number = crate::session::there::index(slot).unwrap_or_default();
        let found =
            self.wanted.remotes.iter().find(|(at, _)| self.stored.remotes.get(at).is_none_or(|at| *at == number));
        let Some((_, outer)) = found else { return true };
        self.there.remote_rows().get(&number).is_none_or(|row| {
            let wanted = template::remote(outer);
            row.addresses() != wanted.addresses() || row.ifindex != wanted.ifindex
        })
    }

    /// Does a remote leave by this interface already?
    fn is_out(&self, key: &[u8]) -> bool {
        let ifindex = crate::session::there::index(key);
        self.there.remote_rows().values().any(|remote| Some(remote.ifindex) == ifindex)
    }

    fn tap_of(&self, map: Map, key: &[u8], value: &[u8], target: &Stored) -> String {
        let bytes = if map == Map::Slots { value } else { key };
        match TapKey::decode(bytes).ok() {
            Some(at) => {
                let name = target.place(at.ifindex).map_or("?", |(name, _)| name);
                format!("tap {name} {}", at.direction.hook())
            }
            None => format!("map {}", map.name()),
        }
    }

    /// In what a remote differs from its row.
    fn remote_fault(&self, slot: u32, value: &[u8], target: &Stored) -> (String, String) {
        let address = target.remotes.iter().find(|(_, at)| **at == slot).map(|(address, _)| address.to_string());
        let subject = format!("remote {}", address.unwrap_or_default());
        let now = Remote::decode(value).unwrap_or_default();
        let Some(before) = &self.there.remote_row(slot) else { return (subject, "it has no row".into()) };
        let name = |ifindex: u32| match self.there.link(ifindex) {
            Some(link) => link.ifname.clone(),
            None if ifindex == 0 => "no route".into(),
            None => "an interface that is gone".into(),
        };
        let address = |remote: &Remote| match remote.addresses().0 {
            source if source.is_unspecified() => "none".into(),
            source => source.to_string(),
        };
        let mac = |remote: &Remote| match remote.has(remote_flag::UNRESOLVED) {
            true => "unknown".into(),
            false => mac_text(remote.mac()),
        };
        if now.ifindex == 0 && before.ifindex != 0 {
            return (subject, format!("it was reached through {}, and cannot be any more", name(before.ifindex)));
        }
        if now.ifindex != 0 && before.ifindex == 0 {
            return (subject, format!("it can be reached, through {}", name(now.ifindex)));
        }
        let mut found = Vec::new();
        let mut differs = |what: &str, before: String, now: String| {
            if before != now {
                found.push(format!("{what} {before} → {now}"));
            }
        };
        differs("out interface", name(before.ifindex), name(now.ifindex));
        if before.ifindex != now.ifindex && name(before.ifindex) == name(now.ifindex) {
            differs("index of its out interface", before.ifindex.to_string(), now.ifindex.to_string());
        }
        differs("source", address(before), address(&now));
        differs("next hop", mac(before), mac(&now));
        differs("MTU", before.mtu.to_string(), now.mtu.to_string());
        let text = if found.is_empty() { "its outer header differs".into() } else { found.join(", ") };
        (subject, text)
    }

    /// Other programs, where the request needs them or the old ones are lost.
    fn programs(&mut self, mut target: Stored) -> Stored {
        let wanted = self.wanted;
        let filter = wanted.request.options.filter.as_deref();
        let is_able = target.compiled.can(&wanted.request);
        let (lost, is_filtered) = (self.must_load(), target.compiled.has_filter(filter));
        if is_able && is_filtered && !lost {
            return target;
        }
        let whole = !is_able || lost;
        let mut features = if whole { wanted.request.features() } else { target.compiled.features.clone() };
        features.extend(target.compiled.features.iter().filter(|_| whole).cloned());
        features.sort();
        features.dedup();
        if whole {
            features = objects::parts(features, filter.is_some());
        }
        let source = match whole {
            true => Source::datapath(wanted.filter.clone(), &features),
            false => Source::taps(wanted.filter.clone()),
        };
        let mut acts = vec![Act::MakeBuilding, Act::LoadOn(source)];
        acts.extend(self.replacements(whole));
        let programs = if whole { Program::ALL.to_vec() } else { Program::TAPS.to_vec() };
        acts.extend(programs.into_iter().map(Act::MovePin));
        target.compiled = Compiled { features, ..Compiled::of(&wanted.request) };
        acts.push(Act::Store(Box::new(target.clone())));
        let fault = match (lost, is_filtered) {
            (true, _) => "some are gone",
            (false, false) => "they have another filter",
            (false, true) => "they lack what the request needs",
        };
        self.push("programs", fault, "loaded, and put in the place of the old ones", acts);
        target
    }

    /// Are other programs put in the place of those that are there?
    fn is_reloaded(&self) -> bool {
        self.changes.iter().flat_map(|change| &change.acts).any(|act| matches!(act, Act::LoadOn(_)))
    }

    /// Puts the programs that were just loaded in the place of those at the hooks: no packet passes between them.
    fn replacements(&self, whole: bool) -> Vec<Act> {
        let there = self.there;
        let mut acts = Vec::new();
        for ifindex in there.hooks.keys() {
            let Some(link) = there.link(*ifindex) else { continue };
            for direction in [Direction::Ingress, Direction::Egress] {
                let taps = there.taps_at(key(*ifindex, direction));
                acts.extend(taps.iter().take(1).map(|(pref, _)| Act::Replace {
                    ifindex: *ifindex,
                    dev: link.dev(),
                    direction,
                    pref: *pref,
                    program: Program::tap(direction),
                    from: From::Building,
                }));
            }
        }
        if whole {
            acts.extend(relay::replacements(there));
        }
        acts
    }

    /// Which remotes get copies, and which of them gets which flow: one that comes back before flows go to it, one that goes
    /// after they have left it. Answers the set of those that get none.
    fn flows(&mut self, target: &Stored) -> u64 {
        let (wanted, there) = (self.wanted, self.there);
        let Some(before) = there.config else { return 0 };
        let used = slots(target, &wanted.request).iter().fold(0, |set, (slot, _)| set | 1 << slot);
        let down = config(wanted, target, Some(&before)).down;
        // Those that leave the session rest until they have left.
        let awake = before.down & (down | !used);
        self.turn(target, before.down, awake);
        let spread = spread_writes(target, &wanted.request, down, Some(there));
        match before.down & used == down {
            true => self.push("flow table", "it names other remotes", "written", spread),
            false => self.changes.push(Change::silent(spread)),
        }
        self.turn(target, awake, awake | down);
        awake | down
    }

    /// Has the programs pass over other remotes than before.
    fn turn(&mut self, target: &Stored, mut set: u64, new: u64) {
        let Some(before) = self.there.config else { return };
        for (slot, address) in slots(target, &self.wanted.request) {
            if (set ^ new) & 1 << slot == 0 {
                continue;
            }
            set ^= 1 << slot;
            let acts = vec![Act::Configure(Box::new(Config { down: set, ..before }))];
            let subject = format!("remote {address}");
            let is_told = self.changes.iter().any(|change| change.subject == subject);
            let change = match (self.stored.down.get(&address), target.down.get(&address)) {
                (None, Some(silence)) => Change::new(subject, silence.to_string(), "down", acts),
                (Some(_), None) if set & 1 << slot == 0 => Change::new(subject, "it answers", "up", acts),
                _ if is_told || !self.stored.remotes.contains_key(&address) => Change::silent(acts),
                _ => Change::new(subject, "the programs do not know whether it is down", "told", acts),
            };
            self.changes.push(change);
        }
    }

    /// `down`: the set that is in the configuration by now.
    fn relay_and_config(&mut self, target: &Stored, down: u64) {
        let there = self.there;
        let Some(before) = there.config.map(|before| Config { down, ..before }) else { return };
        let mut config = config(self.wanted, target, Some(&before));
        let (mut refers, mut is_new) = (Vec::new(), false);
        let mut bridge = there.device(Device::Bridge).map(|link| link.ifname.clone());
        if there.offloads.is_some() {
            match relay::difference(there, self.is_reloaded()) {
                relay::Difference::Repair(changes) => {
                    refers = relay::references(there);
                    self.changes.extend(changes);
                }
                relay::Difference::Renew { faults, new, acts } => {
                    config = Config { relay: new.bridge, port: new.port, peer: new.peer, ..config };
                    bridge = Some(new.name().into());
                    (refers, is_new) = (new.refer(), true);
                    self.push("relay", &faults.join(", "), "made again", acts);
                }
            }
        }
        let guests = bridge.map_or_else(Vec::new, |bridge| guests(self.wanted, there, &bridge, is_new));
        if config != before {
            let fault = self.config_fault(&before, &config);
            let configure = vec![Act::Configure(Box::new(config))];
            // Nobody has to be told that a clock has been set.
            let rest = Config { clock: before.clock, ..config };
            let is_step =
                is_new && Config { relay: before.relay, port: before.port, peer: before.peer, ..rest } == before;
            match is_step || rest == before {
                true => self.changes.push(Change::silent(configure)),
                false => self.push("config", &fault, "written", configure),
            }
        }
        if is_new {
            self.changes.push(Change::silent(refers));
            self.changes.extend(guests);
            return;
        }
        self.changes.extend(guests.iter().filter(|change| !change.is_silent()).cloned());
        self.idle = guests.into_iter().filter(Change::is_silent).collect();
        let devices = [Device::Bridge, Device::Peer].into_iter().filter_map(|device| there.device(device));
        let names: Vec<&str> = devices.map(|link| link.ifname.as_str()).collect();
        self.push("relay", &format!("the programs do not know {}", names.join(" or ")), "told", refers);
    }

    fn config_fault(&self, before: &Config, now: &Config) -> String {
        let mut found = Vec::new();
        let mut differs = |what: &str, same: bool| found.extend((!same).then(|| what.to_string()));
        differs("remotes", (before.remotes, before.down) == (now.remotes, now.down));
        differs("relay", (before.relay, before.port, before.peer) == (now.relay, now.port, now.peer));
        differs("rate", (before.rate, before.rate_packets) == (now.rate, now.rate_packets));
        differs("sampling", (before.sample, before.sample_flows) == (now.sample, now.sample_flows));
        differs("snaplen", before.snaplen == now.snaplen);
        differs("oversize", before.oversize == now.oversize);
        differs("spread", before.spread == now.spread);
        differs("underlay", before.underlay == now.underlay);
        differs("profile", before.profile == now.profile);
        let tunnel = |config: &Config| (config.protocol, config.udp_port, config.gre, config.keys);
        differs("tunnel", tunnel(before) == tunnel(now));
        match found.is_empty() {
            true => "it differs".into(),
            false => format!("it has another value of {}", found.join(", ")),
        }
    }

    fn taps(&mut self) {
        let there = self.there;
        let (mut marks, mut found) = (Vec::new(), Vec::new());
        for (watched, link) in &self.wanted.interfaces {
            let Some(link) = link else { continue };
            let Some(hooks) = there.hooks.get(&link.ifindex).filter(|hooks| !hooks.gone) else { continue };
            if hooks.has_qdisc("ingress") {
                found.push(taken(link));
                continue;
            }
            let lacks_clsact = !hooks.has_qdisc("clsact");
            let mut clsact = Vec::new();
            if lacks_clsact {
                marks.extend(link.away.is_none().then_some(Act::Mark(link.ifindex)));
                clsact.push(Act::AddClsact { ifindex: link.ifindex, dev: link.dev(), is_ours: true });
            }
            for direction in watched.direction.directions() {
                let Some(((fault, fix), acts)) = self.tap(link, *direction) else { continue };
                let is_new = !self
                    .stored
                    .interfaces
                    .get(&watched.interface)
                    .is_some_and(|place| place.ifindex == link.ifindex && place.watch.has(*direction));
                let fault = match (lacks_clsact, is_new) {
                    (_, true) => "it is not there",
                    (true, false) => "its clsact qdisc is gone",
                    (false, false) => fault,
                };
                let acts = std::mem::take(&mut clsact).into_iter().chain(acts).collect();
                let subject = format!("tap {} {}", link.ifname, direction.hook());
                found.push(Change::new(subject, fault, fix, acts));
            }
        }
        self.changes.extend((!marks.is_empty()).then(|| Change::silent(marks)));
        self.changes.extend(found);
        let unmarks = unmarks(self.wanted, there);
        self.changes.extend((!unmarks.is_empty()).then(|| Change::silent(unmarks)));
    }

    /// What is wrong at a tap's hook, and what puts it right.
    fn tap(&self, link: &Link, direction: Direction) -> Option<((&'static str, &'static str), Vec<Act>)> {
        let there = self.there;
        let (ifindex, dev, program) = (link.ifindex, link.dev(), Program::tap(direction));
        let mut at = there.taps_at(key(ifindex, direction)).into_iter();
        let Some((pref, id)) = at.next() else {
            return Some((("its filter is gone", "attached"), vec![attach(there, link, direction, From::Session)]));
        };
        let mut acts = Vec::new();
        let pinned = there.programs.get(&program).or(there.unpinned_programs.get(&program));
        let is_other = id.is_some() && pinned.is_some() && id.as_ref() != pinned && !self.is_reloaded();
        if is_other {
            acts.push(Act::Replace { ifindex, dev: dev.clone(), direction, pref, program, from: From::Session });
        }
        let doubles = at.map(|(pref, _)| Act::Detach { ifindex, dev: dev.clone(), direction, pref });
        acts.extend(doubles);
        let told = if is_other {
            ("its filter runs another program", "replaced")
        } else {
            ("it is there twice", "one detached")
        };
        if acts.is_empty() && self.can_be_earlier(link, direction) {
            let acts =
                vec![Act::Detach { ifindex, dev, direction, pref }, attach(there, link, direction, From::Session)];
            return Some((("another filter is before it and can hide packets from it", "put first"), acts));
        }
        (!acts.is_empty()).then_some((told, acts))
    }

    /// Would the tap, attached anew, have fewer filters of others before it? Of one preference the newest is the first.
    fn can_be_earlier(&self, link: &Link, direction: Direction) -> bool {
        let Some(hooks) = self.there.hooks.get(&link.ifindex) else { return false };
        let pref = free_pref(self.there, hooks, direction);
        let before = ahead::filters(hooks, direction, |filter| self.there.is_tap(filter, direction), pref);
        before.iter().any(|filter| filter.pref >= pref)
    }

    /// Filters and rows that nobody wants any more.
    fn surplus(&mut self, target: &Stored) {
        let (wanted, there) = (self.wanted, self.there);
        let watched = wanted.by_index();
        let watch_of = |ifindex: u32| watched.get(&ifindex).map(|watched| watched.direction);
        let mut gone = Vec::new();
        for ifindex in there.hooks.keys() {
            let Some(link) = there.link(*ifindex).filter(|link| !relay::is_one(link)) else { continue };
            let goes = |direction| watch_of(*ifindex).is_none_or(|watch| !watch.has(direction));
            for direction in [Direction::Ingress, Direction::Egress] {
                let acts = detach(there, link, |at| at == direction && goes(at));
                if !acts.is_empty() {
                    let subject = format!("tap {} {}", link.ifname, direction.hook());
                    let by = self.stored.place(*ifindex).and_then(|(_, place)| self.pattern_of(place));
                    let fault = match by.filter(|_| watch_of(*ifindex).is_none()) {
                        Some(pattern) => format!("{pattern} does not match it any more"),
                        None => "nobody wants it".into(),
                    };
                    gone.push(Change::new(subject, fault, "detached", acts));
                }
            }
        }
        self.changes.extend(gone);
        // An interface that is not watched any more may still be by another session.
        let kept = |ifindex: u32| watch_of(ifindex).map_or(Vec::new(), |watch| watch.directions().to_vec());
        let settled = settle(there, wanted.clsact, kept);
        self.changes.extend(settled);
        self.deletions(target);
    }

    fn deletions(&mut self, target: &Stored) {
        let there = self.there;
        let taps: BTreeMap<Vec<u8>, Vec<u8>> = target
            .interfaces
            .values()
            .flat_map(|place| {
                let row = |direction: &Direction| {
                    (key(place.ifindex, *direction).encode(), place.slot(*direction).to_ne_bytes().to_vec())
                };
                place.watch.directions().iter().map(row).collect::<Vec<_>>()
            })
            .collect();
        let slots: BTreeSet<&Vec<u8>> = taps.values().collect();
        let remotes: BTreeSet<u32> = target.remotes.values().copied().collect();
        let resolved: BTreeSet<u32> =
            self.wanted.remotes.keys().filter_map(|address| target.remotes.get(address)).copied().collect();
        let expected = Expected::of(self.wanted, target, there, false);
        let mut acts = Vec::new();
        let rows = |map: Map| there.rows.get(&map).into_iter().flatten();
        let mut delete = |map: Map, goes: &dyn Fn(&Vec<u8>, &[u8]) -> bool| {
            let gone = rows(map).filter(|(key, cpus)| goes(key, cpus.first().map_or(&[], Vec::as_slice)));
            acts.extend(gone.map(|(key, _)| Act::Delete(map, key.clone())));
        };
        let number = crate::session::there::index;
        let tunnels = expected.rows(Map::Tunnels);
        delete(Map::Tunnels, &|key, slot| {
            // One that is expected has just been written, whatever it was.
            let goes = |slot: u32| !remotes.contains(&slot) || resolved.contains(&slot);
            !tunnels.contains_key(key) && number(slot).is_none_or(goes)
        });
        let underlay = expected.rows(Map::Underlay);
        delete(Map::Underlay, &|key, _| self.wanted.is_whole_underlay && !underlay.contains_key(key));
        delete(Map::Slots, &|key, _| !slots.contains(key));
        delete(Map::Taps, &|key, _| !taps.contains_key(key));
        for slot in there.remote_rows().keys().filter(|slot| !remotes.contains(slot)) {
            acts.extend(zeros(*slot));
            acts.push(Act::Delete(Map::Remotes, slot.to_ne_bytes().to_vec()));
        }
        if acts.is_empty() {
            return;
        }
        let has_moved = self.changes.iter().any(|change| change.subject.starts_with("remote "));
        let is_step = has_moved || self.stored.request != self.wanted.request || *self.stored != *target;
        match is_step {
            true => self.changes.push(Change::silent(acts)),
            false => self.push("maps", "rows are left that stand for nothing", "deleted", acts),
        }
    }
}

/// The remote whose out interface this act makes known.
pub(super) fn remote_of_device(act: &Act, target: &Stored) -> Option<(u32, IpAddr)> {
    let Act::Write(Map::Devices, key, _) = act else { return None };
    let key = crate::session::there::index(key)?;
    let found = target.remotes.iter().find(|(_, slot)| device::of_remote(**slot).map(u32::from).contains(&key));
    found.map(|(address, slot)| (*slot, *address))
}

pub(super) fn forget_direction(target: &mut Stored, name: &str, direction: Direction) {
    let Some(place) = target.interfaces.get_mut(name) else { return };
    match place.watch.without(Watch::of(&[direction]).expect("one direction has a name")) {
        Some(left) => {
            place.watch = left;
            // They are among the removed ones now.
            place.before.iter_mut().for_each(|before| before[direction as usize] = TapCounts::default());
        }
        None => {
            target.interfaces.remove(name);
        }
    }
}

/// A slot that neither the memory nor a row has; one that only a row has where all are taken.
pub(super) fn free_slot(target: &Stored, there: &There) -> u32 {
    let rows = there.remote_rows();
    let is_free = |slot: &u32| target.remotes.values().all(|taken| taken != slot);
    let all = 0..abi::MAX_REMOTES as u32;
    all.clone().find(|slot| is_free(slot) && !rows.contains_key(slot)).or(all.clone().find(is_free)).unwrap_or_default()
}
