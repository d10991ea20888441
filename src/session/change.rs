//! Changes of a session in the kernel, and the one place that carries them out: for real, or printed as lines to paste.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::datapath::abi::{self, Config, Direction};
use crate::datapath::parts::{Map, Program};
use crate::datapath::source::Source;
use crate::session::ages;
use crate::session::alive;
use crate::session::away;
use crate::session::home::{Home, handle};
use crate::session::hops;
use crate::session::plain;
use crate::session::relay;
use crate::session::stored::Stored;
use crate::tools::clang::{Compiling, Object};
use crate::tools::exec::{self, Runner, quote};
use crate::tools::interrupt::{self, Partly};
use crate::tools::tc::Dev;
use crate::tools::{bpftool, ip, tc};

/// One row of the difference between what is wanted and what is there.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Change {
    /// What it is about: `tap eth0 ingress`.
    pub subject: String,
    /// What differs: `its filter is gone`.
    pub fault: String,
    /// What is done about it: `attached`.
    pub fix: String,
    /// Empty where nothing can be done from here.
    pub acts: Vec<Act>,
}

impl Change {
    pub(crate) fn new(
        subject: impl Into<String>,
        fault: impl Into<String>,
        fix: impl Into<String>,
        acts: Vec<Act>,
    ) -> Change {
        Change { subject: subject.into(), fault: fault.into(), fix: fix.into(), acts }
    }

    /// A step of another change, of which nothing is said.
    pub(crate) fn silent(acts: Vec<Act>) -> Change {
        Change { acts, ..Change::default() }
    }

    pub(crate) fn is_silent(&self) -> bool {
        self.subject.is_empty()
    }

    /// `tap eth0 ingress: its filter is gone; attached`.
    pub(crate) fn line(&self) -> String {
        format!("{}: {}; {}", self.subject, self.fault, self.fix)
    }
}

/// Which pins a filter takes its program from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum From {
    Session,
    /// Just loaded, and not yet in the session's place.
    Building,
}

/// A step that one tool does, or one call of the kernel.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Act {
    MakeHome,
    MakeBuilding,
    /// Load all programs with maps of their own.
    Load(Source),
    /// Load programs on the session's maps.
    LoadOn(Source),
    /// Load programs on these maps of the session, and on new ones of their own.
    LoadMoved(Source, Vec<Map>),
    /// Write into a map that is new.
    Fill(Map, Vec<u8>, Vec<u8>),
    /// A new map to the place of the session's. Where it has counted, the old one is kept under this name.
    MoveMap(Map, Option<String>),
    Publish,
    /// Out of the session's place, before it is taken apart.
    Retire,
    RemovePins(PathBuf),
    /// From where it was built to its place; the one that was there is kept beside, until that directory goes.
    MovePin(Program),
    /// The one that was kept, back to its place.
    RestorePin(Program),
    PinProgram(Program, u32),
    PinMap(Map, u32),
    Write(Map, Vec<u8>, Vec<u8>),
    Delete(Map, Vec<u8>),
    Store(Box<Stored>),
    /// All but the key of the request, which [`Act::Store`] alone changes.
    Configure(Box<Config>),
    /// Notes that a clsact qdisc is about to be added, which is not marked as ours at once.
    Mark(u32),
    Unmark(u32),
    AddClsact {
        ifindex: u32,
        dev: Dev,
        /// It goes with the last tap.
        is_ours: bool,
    },
    /// Marks a clsact qdisc as ours that is there.
    AddMark {
        ifindex: u32,
        dev: Dev,
    },
    DelMark {
        ifindex: u32,
        dev: Dev,
    },
    DelClsact {
        ifindex: u32,
        dev: Dev,
    },
    Attach {
        ifindex: u32,
        dev: Dev,
        direction: Direction,
        pref: u32,
        program: Program,
        from: From,
    },
    Replace {
        ifindex: u32,
        dev: Dev,
        direction: Direction,
        pref: u32,
        program: Program,
        from: From,
    },
    Detach {
        ifindex: u32,
        dev: Dev,
        direction: Direction,
        pref: u32,
    },
    Ip(String),
    /// In another network namespace.
    IpIn(PathBuf, String),
    Offloads(String),
    /// Until the bridge passes frames.
    Await {
        bridge: String,
        port: String,
    },
}

/// Who does an act; neighbours of one tool are done in one call of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Bpftool,
    Tc,
    Ip,
    Itself,
}

/// Carries changes out.
pub(crate) struct Executor<'a> {
    pub runner: &'a Runner,
    pub home: &'a Home,
    pub name: &'a str,
    /// As it is in the kernel, or will be with the first write.
    pub config: Config,
    /// Compiled while the rest was looked up.
    pub compiling: Option<(Source, Compiling)>,
    is_building: bool,
    progress: Progress,
}

impl<'a> Executor<'a> {
    pub(crate) fn new(runner: &'a Runner, home: &'a Home, name: &'a str, config: Config) -> Executor<'a> {
        Executor { runner, home, name, config, compiling: None, is_building: false, progress: Progress::new() }
    }

    pub(crate) fn carry_out(&mut self, changes: &[Change]) -> Result<()> {
        let acts: Vec<&Act> = changes.iter().flat_map(|change| &change.acts).collect();
        let mut at = 0;
        while at < acts.len() {
            let by = by(acts[at]);
            let most = if by == By::Itself || interrupts() { 1 } else { AT_A_TIME };
            let same = acts[at..].iter().take(most).take_while(|act| self::by(act) == by).count();
            interrupt::check()?;
            interrupted("before");
            match by {
                By::Itself => self.act(acts[at])?,
                by => self.batch(by, &acts[at..at + same])?,
            }
            at += same;
            interrupted("after");
            self.progress.show(at, acts.len());
        }
        self.progress.end();
        Ok(())
    }

    fn batch(&mut self, by: By, acts: &[&Act]) -> Result<()> {
        for acts in acts.chunk_by(|a, b| netns(a) == netns(b)) {
            let mut lines = Vec::new();
            for act in acts {
                lines.extend(self.lines(act)?);
            }
            // Of memory that is written: what is noted of it is noted before, and forgotten after.
            let stored =
                || acts.iter().filter_map(|act| if let Act::Store(stored) = act { Some(stored) } else { None });
            stored().try_for_each(|stored| {
                away::note(self.runner, &self.pins(), stored)?;
                hops::note(self.runner, &self.pins(), &stored.hops())
            })?;
            self.feed(by, netns(acts[0]), &lines)?;
            if stored().next().is_some() && !self.runner.dry_run {
                ages::touch(&self.pins());
            }
            let last = stored().next_back();
            last.map_or(Ok(()), |stored| hops::forget_others(self.runner, &self.pins(), &stored.hops()))?;
        }
        Ok(())
    }

    fn feed(&self, by: By, netns: Option<&Path>, lines: &[String]) -> Result<()> {
        if self.runner.dry_run {
            let tool = match by {
                By::Bpftool => "bpftool",
                By::Tc => "tc",
                By::Ip | By::Itself => "ip",
            };
            let enter = netns.map_or(String::new(), |netns| exec::enter(netns).map(|word| quote(&word) + " ").concat());
            return lines.iter().try_for_each(|line| exec::print(&format!("{enter}{tool} {line}\n")));
        }
        match by {
            By::Bpftool => bpftool::batch(self.runner, lines),
            By::Tc => tc::batch(self.runner, netns, lines),
            By::Ip | By::Itself => ip::batch(self.runner, netns, lines),
        }
    }

    /// Where the session's pins are now.
    fn pins(&self) -> PathBuf {
        if self.is_building { self.home.building(self.name) } else { self.home.session(self.name) }
    }

    fn map(&self, map: Map) -> PathBuf {
        self.pins().join("maps").join(map.name())
    }

    fn new_map(&self, map: Map) -> PathBuf {
        self.home.building(self.name).join("maps").join(map.name())
    }

    fn pin(&self, program: Program, from: From) -> String {
        let dir = if from == From::Building { self.home.building(self.name) } else { self.home.session(self.name) };
        dir.join(program.name()).to_string_lossy().into_owned()
    }

    /// Where a program is pinned while it is new, once it is old, and in between.
    fn pins_of(&self, program: Program) -> [PathBuf; 3] {
        let (building, session) = (self.home.building(self.name), self.home.session(self.name));
        [building.join(program.name()), building.join(format!("old_{}", program.name())), session.join(program.name())]
    }

    fn lines(&mut self, act: &Act) -> Result<Vec<String>> {
        let place = |dev, ifindex, direction, pref| place(self.home, self.name, dev, ifindex, direction, pref);
        Ok(match act {
            Act::Write(map, key, value) => vec![bpftool::update(&self.map(*map), key, value)],
            Act::Delete(map, key) => vec![bpftool::delete(&self.map(*map), key)],
            Act::Fill(map, key, value) => vec![bpftool::update(&self.new_map(*map), key, value)],
            Act::Store(stored) => self.store(stored)?,
            Act::Configure(config) => {
                self.config = Config { request: self.config.request, ..**config };
                vec![bpftool::update(&self.map(Map::Config), &[0; 4], &self.config.encode())]
            }
            Act::AddClsact { dev, is_ours: false, .. } => vec![tc::add_clsact(&dev.name)],
            Act::AddClsact { dev, .. } => vec![tc::add_clsact(&dev.name), tc::add_mark(&dev.name)],
            Act::AddMark { dev, .. } => vec![tc::add_mark(&dev.name)],
            Act::DelMark { dev, .. } => vec![tc::del_mark(&dev.name)],
            Act::DelClsact { dev, .. } => vec![tc::del_clsact(&dev.name)],
            Act::Attach { dev, direction, pref, program, from, ifindex } => {
                vec![tc::add_filter(&place(dev, *ifindex, *direction, *pref), &self.pin(*program, *from))]
            }
            Act::Replace { dev, direction, pref, program, from, ifindex } => {
                vec![tc::replace_filter(&place(dev, *ifindex, *direction, *pref), &self.pin(*program, *from))]
            }
            Act::Detach { dev, direction, pref, ifindex } => {
                vec![tc::del_filter(&place(dev, *ifindex, *direction, *pref))]
            }
            Act::Ip(line) | Act::IpIn(_, line) => vec![line.clone()],
            _ => Vec::new(),
        })
    }

    /// The lines that write a session's memory, ending with the one that puts it in force: before that, the session is as
    /// it was. The map has room for two.
    fn store(&mut self, stored: &Stored) -> Result<Vec<String>> {
        let chunks = abi::encode_request(&stored.encode())?;
        let free = if self.config.request == 0 { abi::REQUEST_CHUNKS as u16 } else { 0 };
        let map = self.map(Map::Request);
        let line = |(at, chunk): (u32, &Vec<u8>)| bpftool::update(&map, &at.to_ne_bytes(), chunk);
        let mut lines: Vec<String> = (u32::from(free)..).zip(&chunks).map(line).collect();
        self.config.request = free;
        lines.push(bpftool::update(&self.map(Map::Config), &[0; 4], &self.config.encode()));
        Ok(lines)
    }

    fn act(&mut self, act: &Act) -> Result<()> {
        let (runner, home) = (self.runner, self.home);
        match act {
            Act::MakeHome => {
                if runner.dry_run {
                    runner.act("mkdir -p -m 0700", home.dir(), |_| Ok(()))?;
                }
                alive::make(runner, home)
            }
            Act::MakeBuilding => runner.act("mkdir -m 0700", &home.building(self.name), make_private),
            Act::Load(source) => {
                self.is_building = true;
                let (object, dir) = (self.object(source)?, home.building(self.name));
                let plain = plain::make(runner, &dir, &Map::ALL)?;
                bpftool::load(runner, &object, &dir, &plain, source.has_filter())?;
                plain::tidy(runner, &dir)
            }
            Act::LoadOn(source) => {
                let object = self.object(source)?;
                let maps = home.session(self.name).join("maps");
                let names = Map::ALL.map(Map::name);
                bpftool::load_on(runner, &object, &home.building(self.name), &maps, &names)
            }
            Act::LoadMoved(source, kept) => {
                let (object, dir) = (self.object(source)?, home.building(self.name));
                let (maps, new) = (home.session(self.name).join("maps"), |map: &Map| !kept.contains(map));
                let plain = plain::make(runner, &dir, &Map::ALL.into_iter().filter(new).collect::<Vec<_>>())?;
                let there = kept.iter().map(|map| (map.name(), maps.join(map.name()))).chain(plain);
                bpftool::load(runner, &object, &dir, &there.collect::<Vec<_>>(), true)?;
                plain::tidy(runner, &dir)
            }
            Act::MoveMap(map, kept) => {
                let place = self.map(*map);
                if let Some(kept) = kept {
                    let kept = place.with_file_name(kept);
                    let shown = format!("ln {}", quote(&place.to_string_lossy()));
                    runner.act(&shown, &kept, |kept| fs::hard_link(&place, kept))?;
                }
                self.rename(&self.new_map(*map), &place)
            }
            Act::Publish => {
                self.is_building = false;
                self.rename(&home.building(self.name), &home.session(self.name))
            }
            Act::Retire => self.rename(&home.session(self.name), &home.ending(self.name)),
            Act::RemovePins(dir) => runner.act("rm -r", dir, |dir| fs::remove_dir_all(dir)),
            Act::MovePin(program) => {
                let [new, old, place] = self.pins_of(*program);
                if runner.dry_run || place.exists() {
                    self.rename(&place, &old)?;
                }
                self.rename(&new, &place)
            }
            Act::RestorePin(program) => {
                let [_, old, place] = self.pins_of(*program);
                if old.exists() { self.rename(&old, &place) } else { Ok(()) }
            }
            Act::PinProgram(program, id) => {
                let pin = home.session(self.name).join(program.name());
                bpftool::pin(runner, "prog", *id, &pin)
            }
            Act::PinMap(map, id) => {
                let maps = self.pins().join("maps");
                if !maps.is_dir() {
                    runner.act("mkdir -m 0700", &maps, make_private)?;
                }
                bpftool::pin(runner, "map", *id, &self.map(*map))
            }
            Act::Mark(ifindex) => runner.act("mkdir -p -m 0700", &home.clsact_mark(*ifindex), |dir| {
                DirBuilder::new().recursive(true).mode(0o700).create(dir)
            }),
            Act::Unmark(ifindex) => {
                runner.act("rm -rf", &home.clsact_mark(*ifindex), |dir| match fs::remove_dir(dir) {
                    Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
                    _ => Ok(()),
                })
            }
            Act::Offloads(bridge) => relay::turn_offloads_off(runner, bridge),
            Act::Await { bridge, port } => relay::wait(runner, bridge, port),
            _ => unreachable!("a tool does it"),
        }
    }

    fn object(&mut self, source: &Source) -> Result<Object> {
        let started = self.compiling.take().filter(|(started, _)| started == source);
        let compiling = match started {
            Some((_, compiling)) => compiling,
            None => source.clone().begin(self.runner)?,
        };
        compiling.object(self.runner, &source.words())
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        let shown = format!("mv -T {}", quote(&from.to_string_lossy()));
        self.runner.act(&shown, to, |to| fs::rename(from, to))
    }
}

/// Where a session's filter is. Elsewhere a session of that name can have come from anywhere.
fn place<'a>(home: &Home, session: &str, dev: &'a Dev, ifindex: u32, direction: Direction, pref: u32) -> tc::Place<'a> {
    let handle = if away::is_away(ifindex) { handle(&home.mark(session)) } else { handle(session) };
    let hook = direction.into();
    tc::Place { dev: &dev.name, hook, pref, handle, classid: away::classid(ifindex) }
}

/// The network namespace in which it is done, if that is not ours.
fn netns(act: &Act) -> Option<&Path> {
    match act {
        Act::IpIn(netns, _) => Some(netns),
        Act::AddClsact { dev, .. }
        | Act::AddMark { dev, .. }
        | Act::DelMark { dev, .. }
        | Act::DelClsact { dev, .. }
        | Act::Attach { dev, .. }
        | Act::Replace { dev, .. }
        | Act::Detach { dev, .. } => dev.netns.as_deref(),
        _ => None,
    }
}

fn make_private(dir: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(dir)
}

fn by(act: &Act) -> By {
    match act {
        Act::Write(..) | Act::Delete(..) | Act::Fill(..) | Act::Store(_) | Act::Configure(_) => By::Bpftool,
        Act::AddClsact { .. }
        | Act::AddMark { .. }
        | Act::DelMark { .. }
        | Act::DelClsact { .. }
        | Act::Attach { .. }
        | Act::Replace { .. }
        | Act::Detach { .. } => By::Tc,
        Act::Ip(_) | Act::IpIn(..) => By::Ip,
        _ => By::Itself,
    }
}

/// Acts in one call of a tool, so that a long change can say how far it is.
const AT_A_TIME: usize = 1000;

/// One line on a terminal that says how far a long change is, and goes away with it.
struct Progress {
    start: std::time::Instant,
    is_shown: bool,
}

impl Progress {
    fn new() -> Progress {
        Progress { start: std::time::Instant::now(), is_shown: false }
    }

    fn show(&mut self, done: usize, all: usize) {
        use std::io::IsTerminal;
        if self.start.elapsed() >= std::time::Duration::from_secs(1) && done < all && io::stderr().is_terminal() {
            eprint!("\rsnifctl: {} % of {all} steps\x1b[K", 100 * done / all);
            self.is_shown = true;
        }
    }

    fn end(&mut self) {
        if self.is_shown {
            eprint!("\r\x1b[K");
            self.is_shown = false;
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}

/// For the test that ends us at each step: `SNIFCTL_INTERRUPT="3 before"`. Not in a release build.
fn interrupts() -> bool {
    cfg!(debug_assertions) && std::env::var_os("SNIFCTL_INTERRUPT").is_some()
}

fn interrupted(when: &str) {
    use std::sync::atomic::{AtomicU32, Ordering};
    static STEP: AtomicU32 = AtomicU32::new(0);
    if !interrupts() {
        return;
    }
    let step = if when == "before" { STEP.fetch_add(1, Ordering::Relaxed) + 1 } else { STEP.load(Ordering::Relaxed) };
    if std::env::var("SNIFCTL_INTERRUPT").is_ok_and(|wanted| wanted == format!("{step} {when}")) {
        std::process::abort();
    }
}

/// A change that was asked for did not succeed; what undoing it met.
pub(crate) fn explain(err: anyhow::Error, undone: Result<()>, name: &str) -> anyhow::Error {
    match undone {
        Ok(()) => err,
        Err(undo) if interrupt::is_cause(&err) => {
            err.context(Partly(format!("cleaning up failed ({undo:#}); try: snifctl sync --name {name}")))
        }
        Err(undo) => err.context(format!("cleaning up failed too ({undo:#}); try: snifctl sync --name {name}")),
    }
}
