//! Who holds the programs and maps of sessions: why something that "hangs" is still there. Nothing of it needs a session
//! that can be read: programs are known by their names, maps by name and form, owners by pins.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::datapath::abi::Direction;
use crate::datapath::parts::Map;
use crate::datapath::shapes::Shape;
use crate::session::alive;
use crate::session::home::Home;
use crate::tools::exec::{self, Cmd, Runner};
use crate::tools::tc::Filter;

/// Beginning of the names of our programs.
const PREFIX: &str = "snif_";

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    Program,
    Map,
}

/// A program or map, and its holders. Without any it goes at once, so there is at least one that could not be seen.
#[derive(Debug, Serialize)]
pub(crate) struct Held {
    pub kind: Kind,
    pub id: u32,
    pub name: String,
    /// The session that has pinned it, or something that it is used with; `null` where none has.
    pub session: Option<Owner>,
    pub holders: Vec<Holder>,
}

/// A session, by its directory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) struct Owner {
    pub name: String,
    /// Inode of its network namespace.
    pub netns: u64,
    /// `here`, `elsewhere` or `dead`.
    pub life: &'static str,
}

/// In the order in which they are shown.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(tag = "by", rename_all = "lowercase")]
pub(crate) enum Holder {
    Pin {
        path: String,
    },
    /// A program at a hook. `pref` is that of a tc filter.
    Hook {
        netns: u64,
        /// Where the namespace is entered.
        place: String,
        interface: String,
        /// `clsact/ingress`, `tcx/egress` and the like.
        hook: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        pref: Option<u32>,
    },
    Process {
        pid: u32,
        comm: String,
    },
    /// A program that uses the map.
    Program {
        id: u32,
        name: String,
    },
}

/// What `bpftool prog show` and `bpftool map show` tell.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Shown {
    id: u32,
    name: String,
    map_ids: Vec<u32>,
    pinned: Vec<String>,
    pids: Vec<Value>,
    #[serde(rename = "type")]
    kind: String,
    bytes_key: usize,
    bytes_value: usize,
    max_entries: usize,
}

/// All of them, or those of one session of this namespace.
pub(crate) fn refs(runner: &Runner, home: &Home, name: Option<&str>) -> Result<Vec<Held>> {
    let [programs, maps] = ["prog", "map"].map(|noun| shown(runner, noun));
    let (mut programs, mut maps) = (programs?, maps?);
    programs.retain(|program| program.name.starts_with(PREFIX));
    let used: BTreeSet<u32> = programs.iter().flat_map(|program| program.map_ids.clone()).collect();
    maps.retain(|map| used.contains(&map.id) || is_ours(map));
    let owners = owners(runner, home, &programs, &maps)?;
    let mut held: Vec<Held> = Vec::new();
    let processes = processes();
    let hooks = hooks(runner, &programs.iter().map(|program| program.id).collect());
    for (kind, all) in [(Kind::Program, &programs), (Kind::Map, &maps)] {
        for at in all {
            let mut holders: BTreeSet<Holder> =
                at.pinned.iter().map(|path| Holder::Pin { path: path.clone() }).collect();
            holders.extend(processes.get(&(kind, at.id)).into_iter().flatten().cloned());
            holders.extend(at.pids.iter().filter_map(process_of));
            match kind {
                Kind::Program => holders.extend(hooks.get(&at.id).into_iter().flatten().cloned()),
                Kind::Map => holders.extend(
                    programs
                        .iter()
                        .filter(|program| program.map_ids.contains(&at.id))
                        .map(|program| Holder::Program { id: program.id, name: program.name.clone() }),
                ),
            }
            let session = owners.get(&(kind, at.id)).cloned();
            held.push(Held { kind, id: at.id, name: at.name.clone(), session, holders: holders.into_iter().collect() });
        }
    }
    let is_meant = |held: &Held| match name {
        None => true,
        Some(name) => held.session.as_ref().is_some_and(|owner| owner.name == name && owner.life == "here"),
    };
    held.retain(is_meant);
    held.sort_by(|a, b| (&a.session, a.kind, &a.name, a.id).cmp(&(&b.session, b.kind, &b.name, b.id)));
    Ok(held)
}

fn shown(runner: &Runner, noun: &str) -> Result<Vec<Shown>> {
    let text = runner.read(&Cmd::new("bpftool", ["-j", "-f", noun, "show"]))?;
    let all: Vec<Value> = serde_json::from_str(&text)?;
    Ok(all.into_iter().filter_map(|one| serde_json::from_value(one).ok()).collect())
}

/// A map with the name and the form of one of ours, or a tap's own of before.
fn is_ours(map: &Shown) -> bool {
    let (kind, key, value, entries) = (map.kind.clone(), map.bytes_key, map.bytes_value, map.max_entries);
    let is_pinned = map.pinned.iter().any(|pin| owner_of(Path::new(pin)).is_some());
    is_pinned || Map::of(&map.name).is_some_and(|ours| ours.shape() == Shape { kind, key, value, entries })
}

/// The namespace and the session of a pin of ours.
fn owner_of(pin: &Path) -> Option<(u64, String)> {
    let mut names = pin.strip_prefix(Home::root()).ok()?.iter().filter_map(|name| name.to_str());
    let netns = names.next()?.parse().ok()?;
    let name = names.next().filter(|name| *name != alive::PIN)?;
    Some((netns, Home::named_by(name)))
}

/// The sessions of programs and maps: by their pins, else by those of what they are used with.
fn owners(runner: &Runner, home: &Home, programs: &[Shown], maps: &[Shown]) -> Result<BTreeMap<(Kind, u32), Owner>> {
    let dead: BTreeSet<PathBuf> = alive::dead(runner, home)?.into_iter().collect();
    let owner = |pins: &[String]| {
        let (netns, name) = pins.iter().find_map(|pin| owner_of(Path::new(pin)))?;
        let dir = Home::root().join(netns.to_string());
        let life = match () {
            () if dir == home.dir() && !home.is_void => "here",
            () if dir == home.dir() || dead.contains(&dir) => "dead",
            () => "elsewhere",
        };
        Some(Owner { name, netns, life })
    };
    let of = |kind, all: &[Shown]| -> Vec<((Kind, u32), Owner)> {
        all.iter().filter_map(|at| Some(((kind, at.id), owner(&at.pinned)?))).collect()
    };
    let mut owners: BTreeMap<_, _> = of(Kind::Program, programs).into_iter().chain(of(Kind::Map, maps)).collect();
    // Twice: what one program tells of a map, the map tells of the next program.
    for _ in 0..2 {
        for program in programs {
            let parts = || program.map_ids.iter().map(|id| (Kind::Map, *id)).chain([(Kind::Program, program.id)]);
            let Some(known) = parts().find_map(|part| owners.get(&part)).cloned() else { continue };
            for part in parts() {
                owners.entry(part).or_insert_with(|| known.clone());
            }
        }
    }
    Ok(owners)
}

fn comm(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().into()
}

/// What bpftool tells of a process, where it was built to.
fn process_of(told: &Value) -> Option<Holder> {
    let pid = told["pid"].as_u64()? as u32;
    let comm = comm(pid);
    // bpftool itself has had it open while it looked.
    (!comm.is_empty()).then_some(Holder::Process { pid, comm })
}

fn numbers(dir: impl AsRef<Path>) -> Vec<u32> {
    let found = fs::read_dir(dir).into_iter().flatten().flatten();
    found.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// The processes that have a program or map open, as the kernel tells of each descriptor.
fn processes() -> BTreeMap<(Kind, u32), BTreeSet<Holder>> {
    let mut found: BTreeMap<(Kind, u32), BTreeSet<Holder>> = BTreeMap::new();
    for pid in numbers("/proc") {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let is_bpf = |fd: &u32| {
            let at = fs::read_link(proc.join(format!("fd/{fd}"))).unwrap_or_default();
            at.to_str().is_some_and(|at| at.starts_with("anon_inode:bpf"))
        };
        for fd in numbers(proc.join("fd")).into_iter().filter(is_bpf) {
            let text = fs::read_to_string(proc.join(format!("fdinfo/{fd}"))).unwrap_or_default();
            for line in text.lines() {
                let kind = match line.split_once(':') {
                    Some(("prog_id", id)) => Some((Kind::Program, id)),
                    Some(("map_id", id)) => Some((Kind::Map, id)),
                    _ => None,
                };
                let Some((kind, Ok(id))) = kind.map(|(kind, id)| (kind, id.trim().parse())) else { continue };
                found.entry((kind, id)).or_default().insert(Holder::Process { pid, comm: comm(pid) });
            }
        }
    }
    found
}

/// The network namespaces that can be entered: inode, and where, as a process that leads there may end.
fn namespaces() -> BTreeMap<u64, Vec<PathBuf>> {
    let named = fs::read_dir("/run/netns").into_iter().flatten().flatten().map(|entry| entry.path());
    let of_processes = numbers("/proc").into_iter().map(|pid| PathBuf::from(format!("/proc/{pid}/ns/net")));
    let ours = PathBuf::from("/proc/self/ns/net");
    let mut found: BTreeMap<u64, Vec<PathBuf>> = BTreeMap::new();
    for path in [ours].into_iter().chain(named).chain(of_processes) {
        if let Ok(at) = fs::metadata(&path) {
            found.entry(at.ino()).or_default().push(path);
        }
    }
    found
}

/// What a tool says inside a namespace.
fn inside(runner: &Runner, place: &Path, words: &[&str]) -> Option<Value> {
    let tool = exec::find(words[0])?.display().to_string();
    let enter = format!("--net={}", place.display());
    let words = [&[enter.as_str(), "--", &tool], &words[1..]].concat();
    serde_json::from_str(&runner.read(&Cmd::new("nsenter", words.iter().copied())).ok()?).ok()
}

/// How many ways into a namespace are tried.
const WAYS: usize = 3;

#[derive(Debug, Deserialize)]
struct At {
    devname: String,
    #[serde(default)]
    kind: String,
    #[serde(default, alias = "prog_id")]
    id: u32,
}

/// The hooks at which these programs are. A filter has the name of the pin that it was made from, which may be any. A
/// namespace that goes meanwhile has none.
fn hooks(runner: &Runner, programs: &BTreeSet<u32>) -> BTreeMap<u32, BTreeSet<Holder>> {
    let mut found: BTreeMap<u32, BTreeSet<Holder>> = BTreeMap::new();
    for (netns, places) in namespaces() {
        let told = places.iter().take(WAYS).find_map(|place| {
            let told = inside(runner, place, &["bpftool", "-j", "net", "show"])?;
            Some((place, told))
        });
        let Some((place, told)) = told else { continue };
        let tc = told.as_array().into_iter().flatten().filter_map(|part| part["tc"].as_array()).flatten();
        let at: Vec<At> = tc.filter_map(|at| serde_json::from_value(at.clone()).ok()).collect();
        for at in at.into_iter().filter(|at| programs.contains(&at.id)) {
            let direction =
                [Direction::Ingress, Direction::Egress].into_iter().find(|hook| at.kind.ends_with(hook.hook()));
            let asked = direction.filter(|_| at.kind.starts_with("clsact"));
            let filters = asked.and_then(|hook| {
                inside(runner, place, &["tc", "-j", "filter", "show", "dev", &at.devname, hook.hook()])
            });
            let filters: Vec<Filter> = filters.and_then(|told| serde_json::from_value(told).ok()).unwrap_or_default();
            let prefs: Vec<u32> = filters.iter().filter(|one| one.id() == Some(at.id)).map(|one| one.pref).collect();
            let holder = |pref| Holder::Hook {
                netns,
                place: place.display().to_string(),
                interface: at.devname.clone(),
                hook: at.kind.clone(),
                pref,
            };
            let all = found.entry(at.id).or_default();
            all.extend(prefs.iter().map(|pref| holder(Some(*pref))));
            if prefs.is_empty() {
                all.insert(holder(None));
            }
        }
    }
    found
}

impl Holder {
    /// `here`: the inode of our namespace.
    pub(crate) fn line(&self, here: u64) -> String {
        match self {
            Holder::Pin { path } => format!("pin      {path}"),
            Holder::Hook { netns, place, interface, hook, pref } => {
                let pref = pref.map_or_else(String::new, |pref| format!(" pref {pref}"));
                let inside = if *netns == here { String::new() } else { format!(", in netns {netns} ({place})") };
                format!("hook     {interface} {hook}{pref}{inside}")
            }
            Holder::Process { pid, comm } => format!("process  {pid} ({comm})"),
            Holder::Program { id, name } => format!("program  {id} {name}"),
        }
    }
}
