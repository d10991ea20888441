//! The difference against a kernel in memory: it ends, touches what differs, and can be undone.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::*;
use crate::datapath::abi::{self, BUCKETS, Config, Direction, SPREAD_BYTES, device};
use crate::datapath::parts::Program;
use crate::datapath::template::Path as Way;
use crate::request::Watch;
use crate::request::tests::request;
use crate::session::away::Guest;
use crate::session::change::{Act, From};
use crate::session::difference::rows::ORDER;
use crate::session::home::handle;
use crate::session::there::{Rows, key};
use crate::tools::ip::Away;
use crate::tools::tc::Hooks;
use crate::tools::tc::{Filter as TcFilter, Qdisc};

/// The interfaces of the machine, by ifindex.
const LINKS: [(u32, &str); 5] = [(2, "eth0"), (3, "eth1"), (4, "eth2"), (5, "out0"), (6, "out1")];

/// Random enough, and the same each time (xorshift).
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) as usize % n
    }

    fn one<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }
}

fn link(ifindex: u32, ifname: &str) -> Link {
    let link =
        json!({ "ifindex": ifindex, "ifname": ifname, "flags": ["UP", "LOWER_UP"], "mtu": 1500, "link_type": "ether" });
    serde_json::from_value(link).unwrap()
}

/// An interface in another network namespace.
fn elsewhere() -> Link {
    let away = Away { netns: "/blue".into(), inode: 77, name: "eth0".into(), ifindex: 2, relay: 0x7100_0001 };
    let found_by = vec![("netns:blue".into(), "eth0".into())];
    Link { away: Some(Box::new(away)), found_by, ..link(0x8000_0001, "netns:blue/eth0") }
}

// ---- the kernel ----

/// What the kernel has, and the programs that are being loaded.
#[derive(Clone)]
pub(super) struct Kernel {
    pub(super) there: There,
    building: BTreeMap<Program, u32>,
    old: BTreeMap<Program, u32>,
    last_id: u32,
}

impl Kernel {
    pub(super) fn new() -> Kernel {
        let mut links: Vec<Link> = LINKS.iter().map(|(ifindex, name)| link(*ifindex, name)).collect();
        links.push(elsewhere());
        let there = There {
            at: std::time::Instant::now(),
            name: "default".into(),
            hooks: links.iter().map(|link| (link.ifindex, Hooks::default())).collect(),
            links,
            guests: vec![Guest::new("netns:blue", "/blue".into(), 77, 0x7100_0001)],
            is_published: false,
            dir: "/pins/default".into(),
            building: "/pins/_new_default".into(),
            ending: "/pins/_old_default".into(),
            halves: Vec::new(),
            programs: BTreeMap::new(),
            unpinned_programs: BTreeMap::new(),
            unpinned_maps: BTreeMap::new(),
            rows: BTreeMap::new(),
            earlier_drops: Vec::new(),
            stored: Err(crate::session::stored::Unreadable::Gone),
            config: None,
            offloads: Some(Vec::new()),
            marks: BTreeSet::new(),
            notes: BTreeSet::new(),
            namesakes: None,
            noted: Vec::new(),
            neighbours: Vec::new(),
        };
        Kernel { there, building: BTreeMap::new(), old: BTreeMap::new(), last_id: 100 }
    }

    fn load(&mut self) {
        for program in Program::ALL {
            self.last_id += 1;
            self.building.insert(program, self.last_id);
        }
    }

    fn program(&self, program: Program, from: From) -> u32 {
        let pins = if from == From::Building { &self.building } else { &self.there.programs };
        *pins.get(&program).unwrap_or_else(|| panic!("{program:?} is not pinned in {from:?}"))
    }

    fn apply(&mut self, act: &Act) {
        let there = &mut self.there;
        match act {
            Act::MakeHome | Act::Await { .. } => {}
            Act::MakeBuilding => there.halves.push(there.building.clone()),
            Act::Load(_) => {
                there.rows = Map::ALL.into_iter().map(|map| (map, Rows::new())).collect();
                there.config = Some(Config { request: abi::REQUEST_CHUNKS as u16, ..Config::default() });
                for at in 0..abi::MAX_REMOTES as u32 {
                    self.there
                        .rows
                        .entry(Map::RemoteStats)
                        .or_default()
                        .insert(at.to_ne_bytes().into(), vec![vec![0; 24]]);
                }
                for at in 0..(BUCKETS / SPREAD_BYTES) as u32 {
                    let zeros = vec![vec![0; SPREAD_BYTES]];
                    self.there.rows.entry(Map::Spread).or_default().insert(at.to_ne_bytes().into(), zeros);
                }
                self.load();
            }
            Act::LoadOn(_) => {
                assert!(there.is_published);
                self.load();
            }
            Act::Publish => {
                assert!(!there.is_published, "a session is in its place");
                there.is_published = true;
                there.halves.retain(|half| *half != there.building);
                there.programs = std::mem::take(&mut self.building);
            }
            Act::Retire => {
                there.is_published = false;
                there.halves.push(there.ending.clone());
            }
            Act::RemovePins(dir) => {
                if *dir == there.dir {
                    there.is_published = false;
                    there.programs.clear();
                    there.rows.clear();
                    there.config = None;
                    there.stored = Err(crate::session::stored::Unreadable::Gone);
                } else {
                    assert!(there.halves.contains(dir), "{dir:?} is not there");
                    there.halves.retain(|half| half != dir);
                    self.building.clear();
                    self.old.clear();
                }
            }
            Act::MovePin(program) => {
                let new = self.building.remove(program).expect("it was built");
                there.unpinned_programs.remove(program);
                self.old.extend(there.programs.insert(*program, new).map(|id| (*program, id)));
            }
            Act::RestorePin(program) => {
                let old = self.old.remove(program).expect("it was kept");
                there.programs.insert(*program, old);
            }
            Act::PinProgram(program, id) => {
                assert_eq!(there.unpinned_programs.remove(program), Some(*id));
                assert_eq!(there.programs.insert(*program, *id), None, "it is pinned already");
            }
            Act::PinMap(map, id) => assert_eq!(there.unpinned_maps.remove(map), Some(*id)),
            Act::Write(map, key, value) => {
                there.rows.get_mut(map).expect("a map").insert(key.clone(), vec![value.clone()]);
            }
            Act::Delete(map, key) => {
                let gone = there.rows.get_mut(map).expect("a map").remove(key);
                assert!(gone.is_some(), "no row {key:?} in {map:?}");
            }
            Act::Store(stored) => {
                let config = there.config.as_mut().expect("a config");
                config.request = if config.request == 0 { abi::REQUEST_CHUNKS as u16 } else { 0 };
                there.stored = Ok((**stored).clone());
            }
            Act::Configure(config) => {
                let request = there.config.expect("a config").request;
                there.config = Some(Config { request, ..**config });
            }
            Act::Mark(ifindex) => {
                there.marks.insert(*ifindex);
                there.notes.insert(*ifindex);
            }
            Act::Unmark(ifindex) => {
                there.notes.remove(ifindex);
                if !self.hooks(*ifindex).marked {
                    self.there.marks.remove(ifindex);
                }
            }
            Act::AddMark { ifindex, .. } => {
                there.marks.insert(*ifindex);
                self.hooks(*ifindex).marked = true;
            }
            Act::DelMark { ifindex, .. } => {
                there.marks.remove(ifindex);
                let hooks = self.hooks(*ifindex);
                assert!(std::mem::take(&mut hooks.marked), "no mark at {ifindex}");
            }
            Act::AddClsact { ifindex, is_ours, .. } => {
                if *is_ours {
                    there.marks.insert(*ifindex);
                }
                let hooks = self.hooks(*ifindex);
                hooks.marked = *is_ours;
                assert!(!hooks.has_qdisc("clsact"), "two clsact at {ifindex}");
                let qdisc = Qdisc { kind: "clsact".into(), dev: String::new(), root: false, drops: 0, qlen: 0 };
                hooks.qdiscs.push(qdisc);
            }
            Act::DelClsact { ifindex, .. } => {
                let hooks = self.hooks(*ifindex);
                assert!(hooks.has_qdisc("clsact"), "no clsact at {ifindex}");
                *hooks = Hooks::default();
                self.there.marks.remove(ifindex);
            }
            Act::Attach { ifindex, direction, pref, program, from, .. } => {
                let id = self.program(*program, *from);
                self.attach(*ifindex, *direction, *pref, *program, id);
            }
            Act::Replace { ifindex, direction, pref, program, from, .. } => {
                let id = self.program(*program, *from);
                let hooks = self.hooks(*ifindex);
                assert!(hooks.filters(*direction).iter().any(|filter| filter.pref == *pref), "nothing to replace");
                hooks.remove(*direction, *pref);
                self.attach(*ifindex, *direction, *pref, *program, id);
            }
            Act::Detach { ifindex, direction, pref, .. } => {
                let hooks = self.hooks(*ifindex);
                assert!(hooks.filters(*direction).iter().any(|filter| filter.pref == *pref), "nothing to detach");
                hooks.remove(*direction, *pref);
            }
            Act::LoadMoved(..) | Act::Fill(..) | Act::MoveMap(..) => unreachable!("of no difference"),
            Act::Offloads(_) => there.offloads = Some(Vec::new()),
            Act::Ip(line) => self.ip(line),
            Act::IpIn(netns, line) => {
                let guest = there.guests.iter_mut().find(|guest| guest.netns == *netns).expect("a guest");
                if line.starts_with("link delete dev ") {
                    guest.device.take().expect("it is there");
                    return;
                }
                let device = guest.device.as_mut().expect("it is there");
                set(device, &line.split(' ').collect::<Vec<_>>()[4..]);
            }
        }
    }

    fn hooks(&mut self, ifindex: u32) -> &mut Hooks {
        self.there.hooks.get_mut(&ifindex).unwrap_or_else(|| panic!("no interface {ifindex}"))
    }

    fn attach(&mut self, ifindex: u32, direction: Direction, pref: u32, program: Program, id: u32) {
        let handle = format!("0x{:x}", handle(&self.there.name));
        let hooks = self.hooks(ifindex);
        assert!(hooks.has_qdisc("clsact"), "no clsact at {ifindex}");
        assert!(hooks.filters(direction).iter().all(|filter| filter.pref != pref), "{pref} is taken at {ifindex}");
        let options = json!({ "handle": handle, "prog": { "id": id, "name": program.name() } });
        let filter = json!({ "pref": pref, "kind": "bpf", "options": options });
        let filter: TcFilter = serde_json::from_value(filter).unwrap();
        match direction {
            Direction::Ingress => hooks.ingress.push(filter),
            Direction::Egress => hooks.egress.push(filter),
        }
    }

    /// The lines that make and change a relay.
    fn ip(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        let after = |word: &str| {
            let at = words.iter().position(|known| *known == word);
            at.map(|at| words[at + 1])
        };
        if let Some(name) = line.strip_prefix("link delete dev ") {
            let gone = self.there.links.iter().find(|link| link.ifname == name).expect("it is there").clone();
            self.remove(&gone.ifname);
            gone.link.iter().for_each(|other| self.remove(other));
        } else if let Some(netns) = after("netns") {
            let lower = after("link").expect("a bridge");
            assert!(self.there.links.iter().any(|link| link.ifname == words[3]), "no {lower}");
            let guest = self.there.guests.iter_mut().find(|guest| guest.netns.to_str() == Some(netns));
            let guest = guest.expect("a guest");
            assert!(guest.device.is_none());
            let index = after("index").expect("an index").parse().expect("a number");
            let mut device = Link { mtu: 65535, ..link(index, after("name").expect("a name")) };
            device.flags.clear();
            guest.device = Some(device);
        } else if words[1] == "add" {
            let number = |at: usize| words.iter().enumerate().filter(|(_, word)| **word == "index").nth(at);
            let index = |at| words[number(at).expect("an index").0 + 1].parse().expect("a number");
            let mut first = link(index(0), words[2]);
            first.linkinfo.info_kind = after("type").expect("a kind").into();
            first.flags.clear();
            first.mtu = after("mtu").map_or(1500, |mtu| mtu.parse().unwrap());
            if let Some(peer) = after("name") {
                let mut second = Link { ifindex: index(1), ifname: peer.into(), ..first.clone() };
                (second.link, first.link) = (Some(first.ifname.clone()), Some(peer.into()));
                self.add(second);
            }
            self.add(first);
        } else {
            let name = after("dev").expect("a device");
            let link = self.there.links.iter_mut().find(|link| link.ifname == name).expect("it is there");
            set(link, &words[4..]);
        }
    }

    fn add(&mut self, link: Link) {
        assert!(self.there.links.iter().all(|other| other.ifname != link.ifname && other.ifindex != link.ifindex));
        self.there.hooks.insert(link.ifindex, Hooks::default());
        self.there.links.push(link);
        self.there.links.sort_by_key(|link| link.ifindex);
    }

    fn remove(&mut self, name: &str) {
        let at = self.there.links.iter().position(|link| link.ifname == name).expect("it is there");
        let gone = self.there.links.remove(at);
        self.there.hooks.remove(&gone.ifindex);
        if gone.kind() == "bridge" {
            // What stands on it goes with it.
            self.there.guests.iter_mut().for_each(|guest| guest.device = None);
        }
        for link in &mut self.there.links {
            link.master = link.master.take().filter(|master| *master != gone.ifname);
        }
        let rows = self.there.rows.entry(Map::Devices).or_default();
        rows.retain(|_, value| value[0] != gone.ifindex.to_ne_bytes());
    }

    pub(super) fn apply_all(&mut self, changes: &[Change]) {
        changes.iter().flat_map(|change| &change.acts).for_each(|act| self.apply(act));
    }

    /// Applies differences until there is none; the acts of the first round. Panics if that takes more than three.
    #[track_caller]
    pub(super) fn settle(&mut self, wanted: &Wanted, what: &str) -> Vec<Act> {
        let mut first = None;
        for _ in 0..3 {
            let (changes, _) = difference(wanted, &self.there);
            let acts: Vec<Act> = changes.iter().flat_map(|change| change.acts.clone()).collect();
            self.apply_all(&changes);
            first.get_or_insert(acts);
        }
        let (changes, more) = difference(wanted, &self.there);
        // What is named and gone is only told.
        let is_over = changes.iter().all(|change| change.acts.is_empty() && change.fault == "it is gone");
        assert!(!more && is_over, "{what}: after three rounds {changes:#?}");
        first.unwrap_or_default()
    }
}

fn set(link: &mut Link, words: &[&str]) {
    match words {
        ["mtu", mtu] => link.mtu = mtu.parse().unwrap(),
        ["master", master] => link.master = Some(master.to_string()),
        ["alias", alias] => link.ifalias = alias.to_string(),
        ["arp", "off", ..] => link.flags.push("NOARP".into()),
        ["up"] => link.flags.extend(["UP".into(), "LOWER_UP".into()]),
        other => panic!("{other:?} of {}", link.ifname),
    }
}

// ---- what is wanted ----

pub(super) fn wanted(there: &There, request: Request) -> Wanted {
    let expanded = pattern::expand(&request, there.stored.as_ref().ok(), &there.links);
    let outer = |remote: &IpAddr| Outer {
        tunnel: request.options.tunnel,
        source: [10, 0, 0, 1].into(),
        remote: *remote,
        options: request.options.outer,
        path: Some(Way {
            ifindex: 5,
            mtu: 1600,
            source_mac: [2; 6],
            next_hop_mac: Some([4; 6]),
            finish: false,
            per_frame: false,
            l3: false,
            queued: false,
        }),
    };
    Wanted {
        applied: false,
        interfaces: expanded.interfaces,
        left_out: expanded.left_out,
        remotes: request.options.remotes.iter().map(|remote| (*remote, outer(remote))).collect(),
        hops: BTreeMap::new(),
        down: BTreeMap::new(),
        underlay: request.options.underlay.clone(),
        is_whole_underlay: true,
        outs: BTreeMap::from([(5, Out::default())]),
        clsact: Clsact::Remove,
        clock: 7,
        filter: None,
        request,
    }
}

/// A request of any interfaces, remotes and options.
fn any_request(dice: &mut Dice) -> Request {
    let mut words: Vec<&str> = Vec::new();
    while words.is_empty() {
        for (_, name) in &LINKS[..3] {
            let watched = match *name {
                "eth0" => ["", "eth0", "eth0:ingress", "eth0:egress"],
                "eth1" => ["", "eth1", "eth1:ingress", "eth1:egress"],
                _ => ["", "eth2", "eth2:ingress", "eth2:egress"],
            };
            words.extend(Some(dice.one(&watched)).filter(|word| !word.is_empty()));
        }
        let patterns = ["", "", "eth*", "eth[01]:ingress", "?t?2:egress", "none*", "waits"];
        words.extend(Some(dice.one(&patterns)).filter(|word| !word.is_empty()));
        let others = ["", "netns:blue/eth0", "netns:blue/e*:ingress", "netns:blue/*:egress", "netns:red/*"];
        words.extend(Some(dice.one(&others)).filter(|word| !word.is_empty()));
    }
    words.extend(["--remote", dice.one(&["10.0.0.7", "10.0.0.8", "10.0.0.7,10.0.0.8", "10.0.0.9,10.0.0.7,10.0.0.6"])]);
    words.extend(dice.one(&[vec![], vec!["--id", "7"], vec!["--tunnel", "vxlan", "--id", "9"]]));
    words.extend(dice.one(&[vec![], vec!["--filter", "udp"], vec!["--filter", "tcp port 443"]]));
    words.extend(dice.one(&[vec![], vec!["--spread", "flow"]]));
    words.extend(dice.one(&[vec![], vec!["--sample", "1/10"]]));
    words.extend(dice.one(&[vec![], vec!["--max-rate", "100mbit"]]));
    words.extend(dice.one(&[vec![], vec!["--snaplen", "128"], vec!["--oversize", "truncate"]]));
    words.extend(dice.one(&[vec![], vec!["--underlay", "10.9.9.9:51820"], vec!["--underlay", "10.9.9.8"]]));
    request(&words)
}

/// A session that has just been made.
pub(super) fn made(request: Request) -> (Kernel, Wanted) {
    let mut kernel = Kernel::new();
    let wanted = wanted(&kernel.there, request);
    let (changes, more) = difference(&wanted, &kernel.there);
    assert!(!more);
    kernel.apply_all(&changes);
    (kernel, wanted)
}

fn keys(there: &There, map: Map) -> BTreeSet<Vec<u8>> {
    there.rows.get(&map).into_iter().flatten().map(|(key, _)| key.clone()).collect()
}

/// The kernel has the taps and remotes that are wanted, and no others.
#[track_caller]
fn assert_has(there: &There, wanted: &Wanted) {
    let mut taps = BTreeSet::new();
    for (watched, link) in &wanted.interfaces {
        // The rows of what is named and gone stay.
        let gone = || there.stored.as_ref().ok()?.interfaces.get(&watched.interface).map(|at| (at.ifindex, at.watch));
        let place = link.as_ref().map(|link| (link.ifindex, Watch::Both)).or_else(gone);
        let Some((ifindex, watch)) = place else { continue };
        let directions = watched.direction.directions().iter().filter(|at| watch.has(**at));
        taps.extend(directions.map(|direction| key(ifindex, *direction).encode()));
    }
    assert_eq!(keys(there, Map::Taps), taps);
    for (ifindex, name) in there.links.iter().map(|link| (link.ifindex, &link.ifname)) {
        for direction in [Direction::Ingress, Direction::Egress] {
            let at = there.taps_at(key(ifindex, direction));
            let pinned = there.programs[&Program::tap(direction)];
            let is_wanted = taps.contains(&key(ifindex, direction).encode());
            assert_eq!(at.len(), usize::from(is_wanted), "{name} {direction:?}");
            assert!(at.iter().all(|(_, id)| *id == Some(pinned)), "{name} {direction:?}");
        }
    }
    let stored = there.stored.as_ref().unwrap();
    let is_away = stored.interfaces.values().any(|place| place.guest.is_some());
    assert_eq!(there.guests[0].device.is_some(), is_away, "a device there takes copies home");
    for tap in there.tap_rows() {
        let ((ifindex, _), tap) = tap;
        assert_eq!(tap.relay, if ifindex == 0x8000_0001 { 0x7100_0001 } else { 0 });
    }
    assert_eq!(stored.request, wanted.request);
    let slots: BTreeSet<Vec<u8>> = stored.remotes.values().map(|slot| slot.to_ne_bytes().to_vec()).collect();
    assert_eq!((slots.len(), keys(there, Map::Remotes)), (wanted.request.options.remotes.len(), slots));
    let bits = stored.remotes.values().fold(0, |set, slot| set | 1u64 << slot);
    assert_eq!(there.config.unwrap().remotes, bits);
}

// ---- properties ----

#[test]
fn a_session_that_was_just_made_differs_in_nothing() {
    let mut dice = Dice(0x5eed);
    for _ in 0..30 {
        let (kernel, wanted) = made(any_request(&mut dice));
        let (changes, more) = difference(&wanted, &kernel.there);
        assert!(!more && changes.is_empty(), "{:?}: {changes:#?}", wanted.request);
        assert_has(&kernel.there, &wanted);
    }
}

#[test]
fn any_edit_ends_in_what_is_wanted() {
    let mut dice = Dice(0xed17);
    for _ in 0..6 {
        let (mut kernel, _) = made(any_request(&mut dice));
        for _ in 0..7 {
            let wanted = wanted(&kernel.there, any_request(&mut dice));
            kernel.settle(&wanted, &format!("{:?}", wanted.request));
            assert_has(&kernel.there, &wanted);
        }
        let changes = undo(&kernel.there, Clsact::Remove);
        kernel.apply_all(&changes);
        let there = &kernel.there;
        assert!(!there.is_published && there.halves.is_empty() && there.marks.is_empty());
        assert!(there.hooks.values().all(|hooks| hooks.qdiscs.is_empty()), "{:#?}", there.hooks);
        assert_eq!(there.links.len(), LINKS.len() + 1);
    }
}

#[test]
fn a_difference_that_was_made_in_part_is_made_whole_by_the_next() {
    let mut dice = Dice(0xca11);
    for _ in 0..41 {
        let (mut kernel, _) = made(any_request(&mut dice));
        let wanted = wanted(&kernel.there, any_request(&mut dice));
        let (changes, _) = difference(&wanted, &kernel.there);
        let acts: Vec<&Act> = changes.iter().flat_map(|change| &change.acts).collect();
        let done = dice.below(acts.len() + 1);
        acts[..done].iter().for_each(|act| kernel.apply(act));
        // What a program that is not pinned any more runs at a hook is known from there.
        kernel.settle(&wanted, &format!("{done} of {acts:#?}"));
        assert_has(&kernel.there, &wanted);
    }
}

/// Deletes or overwrites a row; which one.
fn damage(dice: &mut Dice, kernel: &mut Kernel) -> Option<(Map, Vec<u8>)> {
    let maps = [Map::Slots, Map::Taps, Map::Outs, Map::Underlay, Map::Tunnels, Map::Devices, Map::Remotes, Map::Spread];
    let map = dice.one(&maps);
    let rows = kernel.there.rows.get_mut(&map)?;
    let all: Vec<Vec<u8>> = rows.keys().cloned().collect();
    if all.is_empty() {
        return None;
    }
    let key = dice.one(&all);
    let is_kept = map == Map::Spread || dice.below(2) == 0;
    match rows.get_mut(&key).filter(|_| is_kept) {
        // What stands in a row of `outs` counts, and anything can be right.
        Some(_) if map == Map::Outs => return None,
        Some(value) => {
            let at = dice.below(if map == Map::Taps { 4 } else { value[0].len() });
            value[0][at] ^= 1 << dice.below(8);
        }
        None => drop(rows.remove(&key)),
    }
    Some((map, key))
}

#[test]
fn one_damaged_row_is_written_again_and_nothing_else() {
    let mut dice = Dice(0xda3a9e);
    for _ in 0..101 {
        let (mut kernel, wanted) = made(any_request(&mut dice));
        let before = kernel.there.clone();
        let Some((map, key)) = damage(&mut dice, &mut kernel) else { continue };
        let acts = kernel.settle(&wanted, &format!("{map:?} {key:?}"));
        let slot = |key: &[u8]| crate::session::there::index(key).unwrap_or_default();
        let is_touched = |act: &Act| match act {
            Act::Write(at, row, _) | Act::Delete(at, row) => {
                // A remote whose row does not tell where it goes may move to its other key of `devices`.
                let moved = map == Map::Remotes
                    && *at == Map::Devices
                    && device::of_remote(slot(&key)).iter().any(|device| u32::from(*device) == slot(row));
                let named = *at == Map::Remotes && map == Map::Devices;
                (*at == map && *row == key) || moved || named
            }
            _ => false,
        };
        assert!(!acts.is_empty() && acts.iter().all(is_touched), "{map:?} {key:?}: {acts:#?}");
        for at in ORDER.into_iter().filter(|at| map != Map::Remotes || ![Map::Remotes, Map::Devices].contains(at)) {
            assert_eq!(kernel.there.rows[&at], before.rows[&at], "{at:?} after damage of {map:?} {key:?}");
        }
    }
}

#[test]
fn a_damaged_config_is_written_again_and_nothing_else() {
    let mut dice = Dice(0xc0f16);
    for _ in 0..31 {
        let (mut kernel, wanted) = made(any_request(&mut dice));
        let before = kernel.there.config.unwrap();
        let damages: [fn(&mut Config); 10] = [
            |config| config.remotes ^= 1 << 5,
            |config| config.rate ^= 1,
            |config| config.sample ^= 4,
            |config| config.snaplen ^= 8,
            |config| config.oversize ^= 3,
            |config| config.udp_port ^= 1,
            |config| config.spread ^= 1,
            |config| config.underlay ^= true,
            |config| config.gre ^= 1,
            |config| config.down ^= 1,
        ];
        dice.one(&damages)(kernel.there.config.as_mut().unwrap());
        let acts = kernel.settle(&wanted, "config");
        assert!(matches!(acts[..], [Act::Configure(_)]), "{acts:#?}");
        assert_eq!(kernel.there.config, Some(before));
    }
}

#[test]
fn what_is_lost_at_the_hooks_comes_back_and_nothing_else_changes() {
    let mut dice = Dice(0x4003);
    for _ in 0..31 {
        let (mut kernel, wanted) = made(any_request(&mut dice));
        let before = kernel.there.rows.clone();
        let there: Vec<u32> = wanted.interfaces.iter().filter_map(|(_, link)| Some(link.as_ref()?.ifindex)).collect();
        let Some(ifindex) = (!there.is_empty()).then(|| dice.one(&there)) else { continue };
        let hooks = kernel.hooks(ifindex);
        match dice.below(3) {
            0 => hooks.ingress.clear(),
            1 => hooks.egress.clear(),
            _ => {
                *hooks = Hooks::default();
                kernel.there.marks.remove(&ifindex);
            }
        }
        let acts = kernel.settle(&wanted, "hooks");
        let is_there = |act: &Act| match act {
            Act::Attach { ifindex: at, .. } | Act::AddClsact { ifindex: at, .. } => *at == ifindex,
            Act::Mark(at) | Act::Unmark(at) => *at == ifindex,
            _ => false,
        };
        assert!(acts.iter().all(is_there), "{acts:#?}");
        assert_eq!(kernel.there.rows, before);
        assert_has(&kernel.there, &wanted);
    }
}

#[test]
fn a_pin_that_is_gone_is_made_again_from_what_runs() {
    for program in Program::ALL {
        let (mut kernel, wanted) = made(request(&["eth0"]));
        let id = kernel.there.programs.remove(&program).unwrap();
        kernel.there.unpinned_programs.insert(program, id);
        assert_eq!(kernel.settle(&wanted, "a pin"), [Act::PinProgram(program, id)]);
    }
    for map in Map::ALL {
        let (mut kernel, wanted) = made(request(&["eth0"]));
        kernel.there.unpinned_maps.insert(map, 77);
        assert_eq!(kernel.settle(&wanted, "a pin"), [Act::PinMap(map, 77)]);
    }
}

/// What a session is, less what counts and cannot come back.
fn state(there: &There) -> Value {
    let kept = |map: &Map| !matches!(map, Map::Outs | Map::Taps | Map::RemoteStats | Map::RemoteState);
    let rows: Vec<String> =
        Map::ALL.iter().filter(|map| kept(map)).map(|map| format!("{:?}", there.rows.get(map))).collect();
    let filters = |filters: &[TcFilter]| {
        let mut found: Vec<(u32, Option<u32>)> = filters.iter().map(|filter| (filter.pref, filter.id())).collect();
        found.sort_unstable();
        found
    };
    let hooks: Vec<_> = there
        .hooks
        .iter()
        .map(|(ifindex, hooks)| {
            json!([ifindex, hooks.has_qdisc("clsact"), filters(&hooks.ingress), filters(&hooks.egress)])
        })
        .collect();
    let config = there.config.map(|config| Config { request: 0, ..config });
    json!([
        rows,
        hooks,
        format!("{config:?}"),
        format!("{:?}", there.stored),
        there.halves,
        there.marks,
        format!("{:?}", there.programs)
    ])
}

#[test]
fn whatever_has_been_made_of_a_difference_can_be_taken_back() {
    let mut dice = Dice(0xbac4);
    for _ in 0..71 {
        let (mut kernel, _) = made(any_request(&mut dice));
        let before = kernel.there.clone();
        let wanted = wanted(&kernel.there, any_request(&mut dice));
        let (changes, _) = difference(&wanted, &kernel.there);
        let acts: Vec<&Act> = changes.iter().flat_map(|change| &change.acts).collect();
        let done = dice.below(acts.len());
        acts[..done].iter().for_each(|act| kernel.apply(act));
        let undone = back(&before, &kernel.there);
        kernel.apply_all(&undone);
        let (was, is) = (state(&before), state(&kernel.there));
        assert!(was == is, "{done} of {acts:#?}\nundone by {undone:#?}\n{was:#}\n{is:#}");
    }
}

// ---- interfaces that come and go ----

/// The interfaces that come and go: those of the pattern, and others.
const NAMES: [&str; 7] = ["eth0", "eth1", "eth2", "eth3", "foo0", "foo1", "eth*"];

/// Something happens to an interface that is no out interface.
fn happens(dice: &mut Dice, kernel: &mut Kernel, last: &mut u32) -> String {
    let is_free = |kernel: &Kernel, name: &str| kernel.there.links.iter().all(|link| link.ifname != name);
    let mut name = dice.one(&NAMES);
    while !is_free(kernel, name) && dice.below(3) > 0 {
        name = dice.one(&NAMES);
    }
    let own: Vec<usize> =
        (0..kernel.there.links.len()).filter(|at| NAMES.contains(&kernel.there.links[*at].ifname.as_str())).collect();
    let at = (!own.is_empty()).then(|| dice.one(&own));
    match (dice.below(4), at) {
        (0, Some(at)) => {
            let gone = kernel.there.links.remove(at);
            kernel.there.hooks.remove(&gone.ifindex);
            kernel.there.marks.remove(&gone.ifindex);
            format!("{} goes", gone.ifname)
        }
        (1, Some(at)) if is_free(kernel, name) => {
            let before = std::mem::replace(&mut kernel.there.links[at].ifname, name.into());
            format!("{before} becomes {name}")
        }
        (2, Some(at)) => {
            let link = &mut kernel.there.links[at];
            let alt = format!("alt-of-{}", link.ifindex);
            if link.altnames.pop().is_none() {
                link.altnames.push(alt);
            }
            format!("{} is called otherwise too, or no more", link.ifname)
        }
        _ if is_free(kernel, name) => {
            *last += 1;
            kernel.add(link(*last, name));
            format!("{name} comes as {last}")
        }
        _ => "nothing".into(),
    }
}

/// Each tap counts some frames; how many in all.
fn count(dice: &mut Dice, there: &mut There) -> u64 {
    let mut sum = 0;
    for cpus in there.rows.get_mut(&Map::Taps).into_iter().flat_map(BTreeMap::values_mut) {
        let mut tap = crate::datapath::abi::Tap::decode(&cpus[0]).unwrap();
        let seen = dice.below(50) as u64;
        (tap.counts.choice.seen, sum) = (tap.counts.choice.seen + seen, sum + seen);
        cpus[0] = tap.encode();
    }
    sum
}

/// What a session tells of it, of taps that it has and had.
fn counted(there: &There) -> u64 {
    let stored = there.stored.as_ref().unwrap();
    let places = stored.interfaces.values();
    let both = [Direction::Ingress, Direction::Egress];
    let of = |place: &crate::session::stored::Place| {
        let directions = both.iter().filter(|at| place.watch.has(**at));
        let seen =
            |at: &Direction| there.tap_counts(key(place.ifindex, *at)).choice.seen + place.before(*at).choice.seen;
        directions.map(seen).sum::<u64>()
    };
    places.map(of).sum::<u64>() + stored.removed_taps.choice.seen
}

#[test]
fn whatever_comes_and_goes_the_taps_are_those_of_the_patterns_and_no_count_is_lost() {
    let requests: [&[&str]; 7] = [
        &["eth*"],
        &["eth*:ingress", "*0:egress"],
        &["eth[0-1]", "foo0"],
        &["alt-of-*", "eth3:ingress"],
        &["foo1", "*[02]:egress"],
        &["?t*:egress", "eth1", "foo*:ingress"],
        &["eth0", "foo1"],
    ];
    for seed in 0..28u64 {
        let mut dice = Dice(0x7a77e2 + 7919 * seed);
        let (mut kernel, mut wanted_now) = made(request(requests[seed as usize % requests.len()]));
        let (mut last, mut sum, mut story) = (10, 0, Vec::new());
        for _ in 0..15 {
            sum += count(&mut dice, &mut kernel.there);
            (0..=dice.below(2)).for_each(|_| story.push(happens(&mut dice, &mut kernel, &mut last)));
            if dice.below(6) == 0 {
                let other = request(dice.one(&requests));
                story.push(format!("asked is {:?}", other.interfaces));
                wanted_now.request = other;
            }
            let stored = kernel.there.stored.as_ref().ok();
            // As `resolve::follow` does.
            let mut asked = wanted_now.request.clone();
            for watched in &mut asked.interfaces {
                let place = stored.and_then(|stored| stored.interfaces.get(&watched.interface));
                let place = place.filter(|place| place.pattern.is_none());
                let now = place.and_then(|place| kernel.there.link(place.ifindex));
                watched.interface = now.map_or_else(|| watched.interface.clone(), |link| link.ifname.clone());
            }
            asked.interfaces.dedup_by(|a, b| a.interface == b.interface);
            let wanted = wanted(&kernel.there, asked);
            let indexes: Vec<u32> =
                wanted.interfaces.iter().filter_map(|(_, link)| Some(link.as_ref()?.ifindex)).collect();
            if indexes.iter().collect::<BTreeSet<_>>().len() < indexes.len() {
                // Named twice by now, which is refused.
                continue;
            }
            kernel.settle(&wanted, &format!("{story:#?}"));
            assert_has(&kernel.there, &wanted);
            assert_eq!(counted(&kernel.there), sum, "{story:#?} {:#?}", kernel.there.stored);
            let stored = kernel.there.stored.as_ref().unwrap();
            for (name, place) in &stored.interfaces {
                let link = kernel.there.link(place.ifindex);
                let by = link.and_then(|link| pattern::of(&wanted.request, name, link));
                assert_eq!(place.pattern.as_deref(), by, "{name} {story:#?}");
            }
            wanted_now = wanted;
        }
    }
}

#[test]
fn more_than_there_is_room_for_are_told_and_those_that_leave_make_room() {
    let (mut kernel, _) = made(request(&["v*", "eth0"]));
    for at in 0..pattern::MOST as u32 + 6 {
        kernel.add(link(100 + at, &format!("v{at}")));
    }
    let wanted_now = wanted(&kernel.there, request(&["v*", "eth0"]));
    assert_eq!((wanted_now.interfaces.len(), wanted_now.left_out), (pattern::MOST, 7));
    let told = |kernel: &Kernel, wanted: &Wanted| {
        let (changes, more) = difference(wanted, &kernel.there);
        assert!(!more && changes.iter().all(|change| change.acts.is_empty()), "{changes:#?}");
        changes.iter().map(Change::line).collect::<Vec<_>>()
    };
    for _ in 0..3 {
        let (changes, _) = difference(&wanted_now, &kernel.there);
        kernel.apply_all(&changes);
    }
    let lines = told(&kernel, &wanted_now);
    assert_eq!(lines.len(), 1);
    assert!(lines[0].starts_with("patterns: they match 7 interfaces more than the 1024"), "{lines:?}");
    assert_has(&kernel.there, &wanted_now);
    // The first ones that are watched go, others come in their place, and all is told at once.
    for at in 0..20 {
        kernel.there.links.retain(|link| link.ifindex != 100 + at);
        kernel.there.hooks.remove(&(100 + at));
        kernel.there.marks.remove(&(100 + at));
        kernel.add(link(5000 + at, &format!("v-new{at}")));
    }
    let wanted_now = wanted(&kernel.there, request(&["v*", "eth0"]));
    for _ in 0..3 {
        let (changes, _) = difference(&wanted_now, &kernel.there);
        kernel.apply_all(&changes);
    }
    assert_eq!(told(&kernel, &wanted_now).len(), 1);
    assert_has(&kernel.there, &wanted_now);
    let numbers: BTreeSet<u32> = kernel.there.stored.unwrap().interfaces.values().map(|place| place.number).collect();
    assert_eq!((numbers.len(), numbers.last()), (pattern::MOST, Some(&(pattern::MOST as u32 - 1))));
}

#[test]
fn a_new_interface_whose_hooks_nobody_asked_about_is_left_to_the_next_sync() {
    let (mut kernel, _) = made(request(&["eth*"]));
    kernel.add(link(9, "eth9"));
    let hooks = kernel.there.hooks.remove(&9).unwrap();
    let wanted = wanted(&kernel.there, request(&["eth*"]));
    assert_eq!(difference(&wanted, &kernel.there), (Vec::new(), false));
    kernel.there.hooks.insert(9, hooks);
    kernel.settle(&wanted, "eth9");
    assert_has(&kernel.there, &wanted);
}
