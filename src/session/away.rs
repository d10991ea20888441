//! Interfaces in other network namespaces that a session watches. Their numbers say nothing here, so each has one of our own,
//! which the kernel hands out to nobody: its tap is told it as the classid of its filter. What a tap there clones goes to a
//! macvlan over the relay's bridge, which hands it on to the bridge in the same call; so copies go home, and out by our
//! routes, and nobody in that namespace can stop them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::origin::{self, Absent, Cluster, Origin, Space};
use crate::request::Request;
use crate::session::change::{Act, Change};
use crate::session::home::ALIAS;
use crate::session::relay;
use crate::session::stored::{Guest as Known, Stored};
use crate::session::there::There;
use crate::tools::batch::word;
use crate::tools::exec::Runner;
use crate::tools::ip::{self, Away, Link};
use crate::tools::rights;

/// The first of the numbers that stand for interfaces elsewhere; the rest of one is a classid.
const ELSEWHERE: u32 = 0x8000_0000;

/// The least number of a macvlan of ours. The devices of relays have lower ones, and the kernel hands out none so high.
const FIRST_INDEX: u32 = 0x7100_0001;

const MTU: u32 = 65535;

/// Before an origin: the node's end of the pair is meant.
const HOST: &str = "host:";

/// Does this number stand for an interface in another network namespace?
pub(crate) fn is_away(ifindex: u32) -> bool {
    ifindex & ELSEWHERE != 0
}

/// What the filter of a tap says of where it is; 0 in our own network namespace.
pub(crate) fn classid(ifindex: u32) -> u16 {
    if is_away(ifindex) { ifindex as u16 } else { 0 }
}

/// The two parts of what a request has for interfaces elsewhere: where they are, and their name, or a pattern of names,
/// there. None for those of our own network namespace, whose names have no `/`.
pub(crate) fn parts(text: &str) -> Option<(&str, &str)> {
    text.rsplit_once('/')
}

/// Is it the node's end of the pair that is meant?
pub(crate) fn origin_of(text: &str) -> (&str, bool) {
    match text.strip_prefix(HOST) {
        Some(origin) => (origin, true),
        None => (text, false),
    }
}

/// A network namespace in which a session watches something, or did.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    /// `pod:shop/web-1`.
    pub label: String,
    pub netns: PathBuf,
    pub inode: u64,
    /// The number of the device there that takes copies home.
    pub relay: u32,
    /// That device, as it is now.
    pub device: Option<Link>,
    /// The names that are taken there.
    names: Vec<String>,
}

/// What there is of a session in other network namespaces.
#[derive(Clone, Debug, Default)]
pub(crate) struct Elsewhere {
    pub guests: Vec<Guest>,
    /// Their interfaces, with numbers and names of our own.
    pub links: Vec<Link>,
    /// Why nothing was found of an origin.
    pub absent: BTreeMap<String, Absent>,
    /// Uids of pods that have no process yet.
    pub pending: Vec<String>,
    /// Pods that cannot be watched so, a line each.
    pub left_out: Vec<String>,
    /// Interfaces of our own that are the other ends: by number, what each was found by.
    hosts: Vec<(u32, (String, String))>,
}

/// Has a session to do with other network namespaces?
pub(crate) fn is_asked(stored: Option<&Stored>, request: Option<&Request>) -> bool {
    let has = |request: &Request| request.interfaces.iter().any(|watched| parts(&watched.interface).is_some());
    request.is_some_and(has)
        || stored.is_some_and(|stored| has(&stored.request) || stored.interfaces.values().any(|at| at.guest.is_some()))
}

/// What a request asks of a cluster.
pub(crate) fn questions(request: &Request) -> Vec<(Cluster, Origin)> {
    let origins = request.interfaces.iter().filter_map(|watched| Some(origin_of(parts(&watched.interface)?.0).0));
    let origins = origins.filter_map(|text| text.parse::<Origin>().ok()).filter(Origin::is_of_cluster);
    origins.map(|origin| (Cluster::of(Some(request)), origin)).collect()
}

/// Looks into the network namespaces of a session: those that it asks for, and those where it has taps. `mark`: by which it
/// is known there.
pub(crate) fn look(
    runner: &Runner,
    mark: &str,
    stored: Option<&Stored>,
    request: Option<&Request>,
    home: &[Link],
) -> Result<Elsewhere> {
    let requests = request.into_iter().chain(stored.map(|stored| &stored.request));
    let texts = requests.flat_map(|request| &request.interfaces).filter_map(|at| Some(parts(&at.interface)?.0));
    let texts: BTreeSet<&str> = texts.collect();
    let origins: BTreeMap<&str, Origin> =
        texts.iter().filter_map(|text| Some((*text, origin_of(text).0.parse().ok()?))).collect();
    // Pods are asked for where that can change what is watched: others look at what is there.
    let is_asked = |origin: &Origin| request.is_some() || !origin.is_of_cluster();
    let wanted: Vec<Option<Origin>> = origins.values().map(|at| Some(at.clone()).filter(|at| is_asked(at))).collect();
    match origins.values().any(|origin| !matches!(origin, Origin::Netns(_))) {
        true => rights::for_namespaces()?,
        false => rights::to_enter()?,
    }
    let mut elsewhere = Elsewhere::default();
    let mut spaces: BTreeMap<u64, (Space, Vec<(String, String)>)> = BTreeMap::new();
    for ((text, _), found) in origins.iter().zip(origin::find(runner, &wanted, &Cluster::of(request))) {
        match found {
            Ok(found) => {
                elsewhere.pending.extend(found.pending);
                elsewhere.left_out.extend(found.left_out);
                for space in found.spaces {
                    let label = space.label.clone();
                    spaces.entry(space.inode).or_insert_with(|| (space, Vec::new())).1.push((text.to_string(), label));
                }
            }
            Err(absent) => drop(elsewhere.absent.insert(text.to_string(), absent)),
        }
    }
    let places = || stored.into_iter().flat_map(|stored| &stored.interfaces);
    let known = || places().filter_map(|(name, place)| Some((name, place, place.guest?)));
    let lost: BTreeSet<u64> = known().map(|(_, _, at)| at.inode).filter(|inode| !spaces.contains_key(inode)).collect();
    let ways = if lost.is_empty() { BTreeMap::new() } else { entrances() };
    for (name, place, guest) in known() {
        let Some((label, _)) = parts(name) else { continue };
        let Some(path) = ways.get(&guest.inode).filter(|_| lost.contains(&guest.inode)) else { continue };
        let space = Space { label: label.into(), path: path.clone(), inode: guest.inode };
        let (_, by) = spaces.entry(guest.inode).or_insert((space, Vec::new()));
        // Nobody can say that it is not wanted any more.
        let from = place.pattern.as_deref().and_then(parts).map_or(label, |(origin, _)| origin);
        let is_unknown = |absent: &Absent| matches!(absent, Absent::Unknown(_) | Absent::Unasked);
        if elsewhere.absent.get(from).is_some_and(is_unknown) {
            by.push((from.into(), label.into()));
        }
    }
    let paths: Vec<&Path> = spaces.values().map(|(space, _)| space.path.as_path()).collect();
    let links = ip::links_of(runner, &paths);
    let mut look = Look { mark, stored, home, numbers: Numbers::of(stored), found: elsewhere };
    // One that has ended meanwhile has nothing.
    for ((space, by), links) in spaces.into_values().zip(links) {
        links.into_iter().for_each(|links| look.add(&space, &by, links));
    }
    let mut elsewhere = look.found;
    elsewhere.links.sort_by_key(|link| link.ifindex);
    Ok(elsewhere)
}

/// A look into other network namespaces.
struct Look<'a> {
    /// What a session is known by there.
    mark: &'a str,
    stored: Option<&'a Stored>,
    /// The links of our own network namespace.
    home: &'a [Link],
    numbers: Numbers,
    found: Elsewhere,
}

/// Numbers for interfaces elsewhere.
struct Numbers {
    taken: BTreeSet<u32>,
}

impl Numbers {
    fn of(stored: Option<&Stored>) -> Numbers {
        let places = stored.into_iter().flat_map(|stored| stored.interfaces.values());
        Numbers { taken: places.map(|place| place.ifindex).collect() }
    }

    fn next(&mut self) -> Option<u32> {
        let free = (1..=u32::from(u16::MAX)).map(|n| ELSEWHERE | n).find(|n| !self.taken.contains(n))?;
        self.taken.insert(free);
        Some(free)
    }
}

impl Look<'_> {
    /// What one of them has. `by`: the origins that it was found by, each with what it is called by that.
    fn add(&mut self, space: &Space, by: &[(String, String)], links: Vec<Link>) {
        let Space { label, path: netns, inode } = space;
        let (stored, inode) = (self.stored, *inode);
        let places = || stored.into_iter().flat_map(|stored| &stored.interfaces);
        let known = || places().filter(|(_, place)| place.guest.is_some_and(|at| at.inode == inode));
        let labels = || by.iter().map(|(_, label)| label.as_str()).chain([label.as_str()]);
        // What it was called before is what it is called.
        let before = known().filter_map(|(name, _)| Some(parts(name)?.0)).find(|at| labels().any(|label| label == *at));
        let label = before.or(labels().next()).unwrap_or(label).to_string();
        let is_device = |link: &&Link| is_device(link, self.mark);
        let device = links.iter().find(is_device).cloned();
        let is_free = |index: u32| links.iter().all(|link| link.ifindex != index || is_device(&link));
        let relay = known().filter_map(|(_, place)| Some(place.guest?.relay)).find(|index| is_free(*index));
        let relay = relay.or(device.as_ref().map(|device| device.ifindex));
        let relay = relay.or_else(|| (FIRST_INDEX..).find(|index| is_free(*index))).unwrap_or(FIRST_INDEX);
        for link in links.iter().filter(|link| link.link_type != "loopback" && !relay::is_one(link)) {
            let name = format!("{label}/{}", link.ifname);
            for (host, (origin, _)) in by.iter().filter_map(|at| Some((other_end(link, self.home)?, at))) {
                if origin.starts_with(HOST) {
                    self.found.hosts.push((host, (origin.clone(), link.ifname.clone())));
                }
            }
            let found_by: Vec<(String, String)> = by
                .iter()
                .filter(|(origin, _)| !origin.starts_with(HOST))
                .map(|(origin, _)| (origin.clone(), link.ifname.clone()))
                .collect();
            let own = Known { inode, ifindex: link.ifindex, relay };
            let number = known().find(|(at, place)| **at == name && place.guest == Some(own)).map(|(_, at)| at.ifindex);
            if found_by.is_empty() && number.is_none() {
                continue;
            }
            let Some(ifindex) = number.or_else(|| self.numbers.next()) else { continue };
            let others = by.iter().map(|(_, other)| other).filter(|other| **other != label);
            let altnames = others.map(|other| format!("{other}/{}", link.ifname)).collect();
            let away = Away { netns: netns.clone(), inode, name: link.ifname.clone(), ifindex: link.ifindex, relay };
            self.found.links.push(Link {
                ifindex,
                ifname: name,
                altnames,
                link: None,
                master: None,
                away: Some(Box::new(away)),
                found_by,
                ..link.clone()
            });
        }
        let names = links.into_iter().flat_map(|link| [vec![link.ifname], link.altnames].concat()).collect();
        self.found.guests.push(Guest { label, netns: netns.clone(), inode, relay, device, names });
    }
}

/// Does it take copies home for the session with this mark?
fn is_device(link: &Link, mark: &str) -> bool {
    link.ifalias.strip_prefix(ALIAS) == Some(mark) && link.kind() == "macvlan"
}

impl Elsewhere {
    /// The places of which nobody can say anything, a line each.
    pub(crate) fn unknown(&self) -> Vec<String> {
        let unknown = self.absent.iter().filter(|(_, absent)| matches!(absent, Absent::Unknown(_)));
        unknown.map(|(origin, absent)| format!("{origin}: {}; what is watched stays so", absent.reason())).collect()
    }

    /// The links of our own network namespace and these, in the order of their numbers.
    pub(crate) fn beside(&self, home: &[Link]) -> Vec<Link> {
        let mut links = home.to_vec();
        for (ifindex, by) in &self.hosts {
            links.iter_mut().filter(|link| link.ifindex == *ifindex).for_each(|link| link.found_by.push(by.clone()));
        }
        links.extend(self.links.iter().cloned());
        links
    }
}

/// The number of the interface of ours that is the other end of one elsewhere.
fn other_end(link: &Link, home: &[Link]) -> Option<u32> {
    let own = ip::find(home, link.link_index?)?;
    (own.link_index == Some(link.ifindex)).then_some(own.ifindex)
}

/// A way into each network namespace of this machine that has one: a name, or a process. By inode.
pub(crate) fn entrances() -> BTreeMap<u64, PathBuf> {
    let names = |dir: &str| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_process =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().parse::<u32>().is_ok());
    let processes = names("/proc").filter(is_process).map(|path| path.join("ns/net"));
    let mut found = BTreeMap::new();
    for path in names("/run/netns").chain(processes) {
        if let Ok(meta) = fs::metadata(&path) {
            found.entry(meta.ino()).or_insert(path);
        }
    }
    found
}

/// In a session's directory: it has, or had, taps in other network namespaces.
const NOTE: &str = "elsewhere";

/// Notes that a session has taps elsewhere, before it is remembered: who has lost its memory must look for them everywhere.
pub(super) fn note(runner: &Runner, pins: &Path, stored: &Stored) -> Result<()> {
    let note = pins.join(NOTE);
    if note.exists() || stored.interfaces.values().all(|place| place.guest.is_none()) {
        return Ok(());
    }
    runner.act("mkdir -p -m 0700", &note, |note| DirBuilder::new().recursive(true).mode(0o700).create(note))
}

/// Can a session of which nothing else is known have left something elsewhere? Its pins say so, or are gone, while its
/// relay is here.
pub(crate) fn can_remain(there: &There) -> bool {
    let pins: Vec<&PathBuf> =
        [&there.dir, &there.building, &there.ending].into_iter().filter(|dir| dir.exists()).collect();
    match pins.is_empty() {
        true => !there.relays().is_empty(),
        false => pins.iter().any(|dir| dir.join(NOTE).exists()),
    }
}

/// The network namespaces in which a session of which nothing else is known has left something.
pub(crate) fn remains(runner: &Runner, mark: &str) -> Elsewhere {
    let ours = fs::metadata("/proc/self/ns/net").map_or(0, |meta| meta.ino());
    let others: Vec<(u64, PathBuf)> = entrances().into_iter().filter(|(inode, _)| *inode != ours).collect();
    let links = ip::links_of(runner, &others.iter().map(|(_, path)| path.as_path()).collect::<Vec<_>>());
    let found = Elsewhere::default();
    let mut look = Look { mark, stored: None, home: &[], numbers: Numbers::of(None), found };
    for ((inode, path), links) in others.into_iter().zip(links) {
        let Some(links) = links.filter(|links| links.iter().any(|link| is_device(link, mark))) else { continue };
        let label = format!("netns:{}", path.display());
        let by = [(label.clone(), label.clone())];
        look.add(&Space { label, path, inode }, &by, links);
    }
    look.found
}

impl Guest {
    #[cfg(test)]
    pub(crate) fn new(label: &str, netns: PathBuf, inode: u64, relay: u32) -> Guest {
        Guest { label: label.into(), netns, inode, relay, device: None, names: Vec::new() }
    }

    /// What is wrong with the device that takes copies home, if `bridge` is the relay's; and what puts it right.
    pub(crate) fn difference(&self, mark: &str, bridge: &str, is_new: bool) -> Option<Change> {
        let subject = format!("relay of {}", self.label);
        let device = self.device.as_ref().filter(|_| !is_new);
        let Some(device) = device.filter(|device| device.ifindex == self.relay) else {
            // With the bridge goes what stands on it.
            let stale = self.device.as_ref().filter(|_| !is_new).map(|device| self.delete(device));
            let acts = stale.into_iter().chain(self.make(mark, bridge)).collect();
            return Some(Change::new(subject, "it is not there", "made", acts));
        };
        let name = &device.ifname;
        let mut lines = Vec::new();
        let mut faults = Vec::new();
        let mut differs = |fault: String, line: String| {
            faults.push(fault);
            lines.push(Act::IpIn(self.netns.clone(), line));
        };
        if !device.asks_nobody() {
            differs(format!("ARP of {name} is on"), relay::quiet(&word(name)));
        }
        if device.mtu < MTU {
            let line = format!("link set dev {} mtu {MTU}", word(name));
            differs(format!("the MTU of {name} is {}", device.mtu), line);
        }
        if !device.is_up() {
            differs(format!("{name} is down"), format!("link set dev {} up", word(name)));
        }
        (!lines.is_empty()).then(|| Change::new(subject, faults.join(", "), "put right", lines))
    }

    fn make(&self, mark: &str, bridge: &str) -> Vec<Act> {
        let is_free =
            |name: &String| !self.names.contains(name) || self.device.as_ref().is_some_and(|at| at.ifname == *name);
        let name = (0..).map(|n| format!("snif{n}")).find(is_free).expect("numbers do not end");
        let netns = self.netns.display();
        let make = format!(
            "link add link {bridge} name {name} index {} mtu {MTU} netns {netns} type macvlan mode private",
            self.relay
        );
        let there = [
            format!("link set dev {name} alias {ALIAS}{mark}"),
            relay::quiet(&name),
            format!("link set dev {name} up"),
        ];
        let there = there.into_iter().map(|line| Act::IpIn(self.netns.clone(), line));
        [Act::Ip(make)].into_iter().chain(there).collect()
    }

    fn delete(&self, device: &Link) -> Act {
        Act::IpIn(self.netns.clone(), format!("link delete dev {}", word(&device.ifname)))
    }

    /// What takes the device away.
    pub(crate) fn removal(&self) -> Option<Act> {
        self.device.as_ref().map(|device| self.delete(device))
    }
}

/// Why an interface elsewhere cannot be watched.
pub(crate) fn refusal(text: &str, absent: Option<&Absent>) -> Result<()> {
    match absent {
        Some(absent) => bail!("IFACE {text}: {}", absent.reason()),
        None => bail!(
            "IFACE {text} is not there: that network namespace has no such interface; to wait for it, add \
             --wait-for-interface"
        ),
    }
}
