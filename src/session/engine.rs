//! What every verb does: open the sessions, edit a request, and make the kernel agree.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Deref;

use anyhow::{Result, bail, ensure};

use crate::datapath::abi::{Config, Direction, Out, REQUEST_CHUNKS, Remote};
use crate::datapath::filter::{self, Filter};
use crate::datapath::parts::{Map, Program};
use crate::datapath::source::Source;
use crate::request::{Request, Watched};
use crate::session::ahead;
use crate::session::alive;
use crate::session::away::{self, Elsewhere};
use crate::session::bypassed::{self, Flow};
use crate::session::change::{Act, Change, Executor, explain};
use crate::session::clock;
use crate::session::difference::{self, Clsact, Wanted};
use crate::session::home::{self, Home, Lock, Wait};
use crate::session::machine::Machine;
use crate::session::pattern;
use crate::session::relay;
use crate::session::resolve::{self, Asked, RemoteRoute, Resolved, Warning};
use crate::session::rivals::{self, Copies};
use crate::session::stored::Stored;
use crate::session::there::There;
use crate::session::upgrade;
use crate::session::version;
use crate::tools::clang::Compiling;
use crate::tools::exec::{self, Runner};
use crate::tools::interrupt;
use crate::tools::ip::{self, Link};
use crate::tools::requirements;
use crate::tools::rights;
use crate::tools::tc::{self, Dev};

/// How a command runs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Context {
    pub runner: Runner,
    pub wait: Wait,
}

/// The sessions of this namespace, held by a lock. What is empty is tidied up at the end.
pub(crate) struct Open<'a> {
    pub runner: &'a Runner,
    pub home: Home,
    pub machine: Machine<'a>,
    _held: Held,
}

/// The machine as all sessions see it, or as one does.
pub(crate) enum Seen<'b, 'a> {
    Ours(&'b Open<'a>),
    Own(Box<Open<'a>>),
}

impl<'a> Deref for Seen<'_, 'a> {
    type Target = Open<'a>;

    fn deref(&self) -> &Open<'a> {
        match self {
            Seen::Ours(open) => open,
            Seen::Own(open) => open,
        }
    }
}

/// The lock, and what is done when it goes.
struct Held {
    home: Home,
    lock: Option<Lock>,
    is_written: bool,
}

impl<'a> Open<'a> {
    /// To change them. A dry run takes no lock and needs no root.
    pub(crate) fn to_write(context: &'a Context) -> Result<Open<'a>> {
        Open::with(context, &requirements::SESSION_TOOLS, rights::to_write)
    }

    /// To take them away, for which fewer tools do.
    pub(crate) fn to_remove(context: &'a Context) -> Result<Open<'a>> {
        Open::with(context, &["bpftool", "tc", "ip"], rights::to_remove)
    }

    fn with(context: &'a Context, tools: &[&str], ensure_rights: fn() -> Result<()>) -> Result<Open<'a>> {
        let runner = &context.runner;
        let mut home = Home::here()?;
        let lock = match runner.dry_run {
            true => {
                home.ensure_trusted()?;
                home.lock_to_read(context.wait).unwrap_or_default()
            }
            false => {
                ensure_rights()?;
                requirements::ensure_present(tools)?;
                Some(home.lock_to_write(runner, context.wait)?)
            }
        };
        let is_written = !runner.dry_run;
        let held = Held { home: home.clone(), lock, is_written };
        let machine = Machine::ask(runner)?;
        home.is_void = held.lock.is_some() && alive::is_void(runner, &home, &machine.links)?;
        if home.is_void {
            alive::clear(runner, &home)?;
            home.is_void = runner.dry_run;
        }
        Ok(Open { runner, machine, home, _held: held })
    }

    /// Removes what sessions of dead network namespaces have left, after all else: that it cannot be is nobody's failure, and
    /// the next one does it.
    pub(crate) fn sweep_dead(&self) -> usize {
        alive::sweep(self.runner, &self.home, |dead| leave_others(self.runner, dead)).unwrap_or_default()
    }

    /// To look at them.
    pub(crate) fn to_read(context: &'a Context) -> Result<Open<'a>> {
        rights::to_read()?;
        requirements::ensure_present(&["bpftool", "tc", "ip"])?;
        let mut home = Home::here()?;
        let lock = home.lock_to_read(context.wait)?;
        let runner = &context.runner;
        let machine = Machine::ask(runner)?;
        home.is_void = lock.is_some() && alive::is_void(runner, &home, &machine.links)?;
        let held = Held { home: home.clone(), lock, is_written: false };
        Ok(Open { runner, home, machine, _held: held })
    }

    /// The same with the links of now; the lock stays with the first.
    pub(crate) fn again<'b>(&self, runner: &'b Runner) -> Result<Open<'b>> {
        let held = Held { home: self.home.clone(), lock: None, is_written: false };
        Ok(Open { runner, home: self.home.clone(), machine: Machine::ask(runner)?, _held: held })
    }

    /// The same as a session sees it, whose interfaces may be in other network namespaces. `request`: what it is to be.
    pub(crate) fn seen_by<'b>(
        &'b self,
        session: &str,
        stored: Option<&Stored>,
        request: Option<&Request>,
    ) -> Result<Seen<'b, 'a>> {
        if !away::is_asked(stored, request) {
            return Ok(Seen::Ours(self));
        }
        let home: Vec<Link> = self.machine.links.iter().filter(|link| link.away.is_none()).cloned().collect();
        Ok(Seen::Own(Box::new(self.beside(away::look(self.runner, &self.home.mark(session), stored, request, &home)?))))
    }

    fn beside(&self, elsewhere: Elsewhere) -> Open<'a> {
        let held = Held { home: self.home.clone(), lock: None, is_written: false };
        Open { runner: self.runner, home: self.home.clone(), machine: self.machine.beside(elsewhere), _held: held }
    }

    /// A session that is there, and the machine as it sees it.
    pub(crate) fn read_around<'b>(&'b self, name: &str, request: Option<&Request>) -> Result<(There, Seen<'b, 'a>)> {
        let there = self.read(name)?;
        let open = self.seen_by(name, there.stored.as_ref().ok(), request)?;
        let there = there.with(&open);
        Ok((there, open))
    }

    /// The session that is meant.
    pub(crate) fn chosen(&self, name: Option<&str>) -> Result<String> {
        home::chosen(&self.home, name)
    }

    pub(crate) fn read(&self, name: &str) -> Result<There> {
        There::read(self.runner, &self.home, name, &self.machine.links)
    }

    /// What it has counted.
    pub(crate) fn read_counters(&self, name: &str) -> Result<There> {
        There::read_counters(self.runner, &self.home, name, &self.machine.links)
    }

    /// The session that is meant, if it is whole enough for an edit.
    pub(crate) fn edited(&self, name: Option<&str>) -> Result<There> {
        let there = self.read(&self.chosen(name)?)?;
        upgrade::ensure_known(&there)?;
        match &there.stored {
            Ok(stored) if !stored.compiled.is_ours() => bail!(
                "session {0}: its programs are {1}; move it to this one first: snifctl sync --name {0}",
                there.name,
                version::of_others(stored).unwrap_or_default()
            ),
            Ok(_) if difference::is_alterable(&there) => Ok(there),
            Ok(_) => bail!("session {0} has lost a map; put it right with: snifctl sync --name {0}", there.name),
            Err(why) => bail!("session {0}: {why}; {1}", there.name, why.help(&there.name)),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.is_written {
            self.home.remove_if_empty();
        }
        self.lock = None;
    }
}

/// What a verb has to do with the machine: nothing else is asked, or changed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Scope {
    pub asked: Asked,
    /// The watched interfaces whose hooks are looked at; `None` for all.
    pub hooks: Option<Vec<String>>,
    pub relay: bool,
}

impl Scope {
    /// Everything of a request.
    pub(crate) fn all(request: &Request) -> Scope {
        let asked = Asked { remotes: request.options.remotes.clone(), argument: "--remote", ..Asked::default() };
        Scope { asked, hooks: None, relay: true }
    }

    /// Of these interfaces; those of them are told apart that are new.
    pub(crate) fn interfaces(hooks: Vec<String>, new: Vec<String>) -> Scope {
        Scope { asked: Asked { interfaces: new, ..Asked::default() }, hooks: Some(hooks), relay: false }
    }

    pub(crate) fn remotes(remotes: Vec<IpAddr>) -> Scope {
        let asked = Asked { new: remotes.clone(), remotes, argument: "ADDR", ..Asked::default() };
        Scope { asked, hooks: Some(Vec::new()), relay: false }
    }

    pub(crate) fn taps() -> Scope {
        Scope { asked: Asked::default(), hooks: None, relay: false }
    }
}

/// One edit of a session.
#[derive(Clone)]
pub(crate) struct Edit {
    pub request: Request,
    pub scope: Scope,
    /// A session that is made is one of `apply`.
    pub applied: bool,
    pub clsact: Clsact,
    /// Compiled already, to see whether it can be.
    pub filter: Option<Filter>,
    pub compiling: Started,
}

/// What is being compiled for an edit, for its first attempt alone.
#[derive(Default)]
pub(crate) struct Started(pub Option<(Source, Compiling)>);

impl Clone for Started {
    fn clone(&self) -> Started {
        Started(None)
    }
}

impl Edit {
    pub(crate) fn new(request: Request, scope: Scope) -> Edit {
        Edit { request, scope, applied: false, clsact: Clsact::Remove, filter: None, compiling: Started::default() }
    }
}

/// What has been done.
#[derive(Debug)]
pub(crate) struct Done {
    pub changes: Vec<Change>,
    pub warnings: Vec<Warning>,
    /// The outer headers, by remote.
    pub headers: BTreeMap<IpAddr, Remote>,
    /// Uids of pods that have no process yet.
    pub pending: Vec<String>,
}

impl Done {
    /// The changes that something is said of.
    pub(crate) fn told(&self) -> impl Iterator<Item = &Change> {
        self.changes.iter().filter(|change| !change.is_silent())
    }

    pub(crate) fn is_nothing(&self) -> bool {
        self.changes.iter().all(|change| change.acts.is_empty())
    }
}

/// How often a change is begun anew that met a machine that was changing too.
const TRIES: usize = 3;

/// Makes the kernel agree with the edited request; all of it, or, where it fails, nothing. Where an interface has gone
/// meanwhile, it is done again with those that are left.
pub(crate) fn carry_out(open: &Open, there: There, mut edit: Edit) -> Result<Done> {
    let (name, compiling) = (there.name.clone(), edit.compiling.0.take());
    let mut links = open.machine.links.clone();
    let mut done = attempt(open, there, edit.clone(), compiling);
    for _ in 1..TRIES {
        let Err(err) = &done else { break };
        if open.runner.dry_run || interrupt::is_cause(err) {
            break;
        }
        let Ok(open) = open.again(open.runner) else { break };
        if links.iter().all(|link| open.machine.indexed(link.ifindex).is_some_and(|now| now.ifname == link.ifname)) {
            break;
        }
        links = open.machine.links.clone();
        let Ok(there) = open.read(&name) else { break };
        done = attempt(&open, there, edit.clone(), None);
    }
    done
}

fn attempt(open: &Open, mut there: There, mut edit: Edit, compiling: Option<(Source, Compiling)>) -> Result<Done> {
    let runner = open.runner;
    let open = &*open.seen_by(&there.name, there.stored.as_ref().ok(), Some(&edit.request))?;
    there = there.with(open);
    if there.is_published && !there.halves.is_empty() {
        // What a change has left half done is finished with this one.
        let Scope { asked, .. } = std::mem::take(&mut edit.scope);
        let remotes = edit.request.options.remotes.clone();
        edit.scope = Scope { asked: Asked { remotes, ..asked }, hooks: None, relay: true };
    }
    let stored = there.stored.clone().ok();
    let mut interfaces = resolve::interfaces(&edit.request, stored.as_ref(), &open.machine);
    resolve::ensure_distinct(&interfaces)?;
    let outs = outs_of(&there, &edit.request, &edit.scope);
    edit.scope.asked = remembered(&there, edit.scope.asked);
    let mut resolved = resolve::resolve(&open.machine, &edit.request, &interfaces, &edit.scope.asked, &outs)?;
    resolved.keep_fit(&mut interfaces);
    match resolved.neighbours.take() {
        Some(table) => there.neighbours = table,
        // Those of remotes that go are given up.
        None => there.look_at_neighbours(runner, |remote| !edit.request.options.remotes.contains(remote))?,
    }
    let indexes = hooks_asked(&there, &edit, &interfaces, &resolved);
    there.look(runner, &indexes, edit.scope.relay)?;
    ensure_free(&there, &interfaces, &edit)?;
    if edit.filter.is_none() && needs_programs(&there, &edit.request) {
        let expression = edit.request.options.filter.as_deref();
        edit.filter = expression.map(|expression| filter::compile(runner, "--filter", expression)).transpose()?;
    }
    let mut wanted = wanted(&there, &edit, interfaces, &resolved);
    let headers = headers(&wanted);
    let (mut changes, mut more) = difference::difference(&wanted, &there);
    let queues = queue_warnings(&there, &changes, edit.clsact);
    let bypassed = bypassed::of(&open.machine, &flows(&resolved, &edit));
    let bypassed = bypassed.into_iter().map(|found| Warning {
        remote: None,
        text: found.to_string(),
        is_of_now: false,
        is_once: true,
    });
    let hidden = hidden(open, &there, &wanted, &edit.scope.asked.interfaces);
    let rivals = rivals(open, &there, &edit, &resolved);
    let mut executor = Executor::new(runner, &open.home, &there.name, initial(&there));
    executor.compiling = compiling;
    if let Err(err) = executor.carry_out(&changes) {
        return Err(explain(err, undone(open, &there, &indexes, edit.scope.relay), &there.name));
    }
    let _held = interrupt::hold();
    wanted.hops.values_mut().for_each(|next| next.is_unkept = false);
    // What was taken out of the session is added up now that nothing counts for it any more.
    let mut now = there;
    while more {
        let read = || {
            let now = There::read(runner, &open.home, &now.name, &now.links)?;
            let open = open.seen_by(&now.name, now.stored.as_ref().ok(), Some(&edit.request))?;
            let mut now = now.with(&open);
            now.look(runner, &indexes, edit.scope.relay)?;
            Ok(now)
        };
        now = match if runner.dry_run { Ok(simulated(now.clone(), &changes)) } else { read() } {
            Ok(now) => now,
            Err(err) => {
                books_left(&now.name, &err);
                break;
            }
        };
        let (next, again) = difference::difference(&wanted, &now);
        let mut executor = Executor::new(runner, &open.home, &now.name, initial(&now));
        if let Err(err) = executor.carry_out(&next) {
            books_left(&now.name, &err);
            break;
        }
        more = again && !next.is_empty();
        changes.extend(
            next.into_iter().filter(|change| !change.acts.is_empty()).map(|change| Change::silent(change.acts)),
        );
    }
    let warnings = resolved.warnings.into_iter().chain(bypassed).chain(queues).chain(hidden).chain(rivals).collect();
    Ok(Done { changes, warnings, headers, pending: open.machine.elsewhere.pending.clone() })
}

/// A change is made, and only what was counted is still to be added up: that is no failure.
fn books_left(name: &str, err: &anyhow::Error) {
    eprintln!("snifctl: done, but counters are still to be added up ({err:#}); do it with: snifctl sync --name {name}");
}

/// clsact can be at the interfaces that are new and named. What a pattern matches is left out instead, and told.
fn ensure_free(there: &There, interfaces: &[(Watched, Option<Link>)], edit: &Edit) -> Result<()> {
    let new = &edit.scope.asked.interfaces;
    for (watched, link) in interfaces.iter().filter(|(watched, _)| new.contains(&watched.interface)) {
        let named = |link: &&Link| pattern::of(&edit.request, &watched.interface, link).is_none();
        let Some(link) = link.as_ref().filter(named) else { continue };
        let is_taken = there.hooks.get(&link.ifindex).is_some_and(|hooks| hooks.has_qdisc("ingress"));
        ensure!(
            !is_taken,
            "IFACE {0} has an `ingress` qdisc where clsact must go; if nothing needs it, remove it with: tc qdisc del dev {0} \
             ingress",
            link.ifname
        );
    }
    Ok(())
}

/// The configuration that the first write finds.
pub(super) fn initial(there: &There) -> Config {
    there.config.unwrap_or(Config { request: REQUEST_CHUNKS as u16, ..Config::default() })
}

/// A session as it is after these changes, as far as the next ones depend on it.
fn simulated(mut there: There, changes: &[Change]) -> There {
    for act in changes.iter().flat_map(|change| &change.acts) {
        match act {
            Act::Write(map, key, value) => {
                there.rows.entry(*map).or_default().insert(key.clone(), vec![value.clone()]);
            }
            Act::Delete(map, key) => {
                there.rows.entry(*map).or_default().remove(key);
            }
            Act::Store(stored) => {
                there.stored = Ok((**stored).clone());
                let half = |config: Config| Config { request: REQUEST_CHUNKS as u16 - config.request, ..config };
                there.config = there.config.map(half);
            }
            Act::Configure(config) => {
                there.config = there.config.map(|before| Config { request: before.request, ..**config });
            }
            Act::Detach { ifindex, direction, pref, .. } => {
                if let Some(hooks) = there.hooks.get_mut(ifindex) {
                    hooks.remove(*direction, *pref);
                }
            }
            Act::DelClsact { ifindex, .. } => {
                there.marks.remove(ifindex);
                if let Some(hooks) = there.hooks.get_mut(ifindex) {
                    hooks.marked = false;
                    hooks.qdiscs.retain(|qdisc| qdisc.kind != "clsact");
                }
            }
            Act::AddMark { ifindex, .. } => {
                there.marks.insert(*ifindex);
                there.hooks.entry(*ifindex).or_default().marked = true;
            }
            Act::DelMark { ifindex, .. } => {
                there.marks.remove(ifindex);
                there.hooks.entry(*ifindex).or_default().marked = false;
            }
            Act::Unmark(ifindex) => {
                there.notes.remove(ifindex);
            }
            Act::IpIn(netns, line) if line.starts_with("link delete ") => {
                let gone = there.guests.iter_mut().filter(|guest| guest.netns == *netns);
                gone.for_each(|guest| guest.device = None);
            }
            _ => {}
        }
    }
    there
}

/// Puts a session back that a change has failed for.
fn undone(open: &Open, before: &There, indexes: &BTreeSet<u32>, relay: bool) -> Result<()> {
    let runner = open.runner;
    if runner.dry_run {
        return Ok(());
    }
    let _held = interrupt::hold();
    let open = &open.again(runner)?;
    let now = There::read(runner, &open.home, &before.name, &open.machine.links)?;
    let known = before.stored.as_ref().ok().or(now.stored.as_ref().ok());
    let open = &*open.seen_by(&before.name, known, now.stored.as_ref().ok().map(|stored| &stored.request))?;
    let mut now = now.with(open);
    now.look(runner, indexes, relay)?;
    now.neighbours =
        if now.hops().is_empty() && before.hops().is_empty() { Vec::new() } else { ip::neighbours(runner)? };
    let changes = match difference::is_alterable(before) {
        true => difference::back(before, &now),
        false => difference::undo(&now, Clsact::Remove),
    };
    Executor::new(runner, &open.home, &before.name, initial(&now)).carry_out(&changes)
}

/// Takes a session away, by what the kernel has of it. Answers what was done. What goes while it is taken away is no
/// failure: it is looked at again, and the rest goes. Once it has begun, no signal breaks it off.
pub(crate) fn take_down(open: &Open, name: &str, clsact: Clsact) -> Result<Vec<Change>> {
    interrupt::check()?;
    let _held = interrupt::hold();
    let mut done = Vec::new();
    for _ in 1..TRIES {
        match taken_down(open, name, clsact, &mut done) {
            Err(_) if !open.runner.dry_run => {}
            ended => return ended.map(|()| done),
        }
    }
    taken_down(open, name, clsact, &mut done).map(|()| done)
}

/// What is begun is put into `done`.
fn taken_down(open: &Open, name: &str, clsact: Clsact, done: &mut Vec<Change>) -> Result<()> {
    let now;
    let open = match done.is_empty() {
        true => open,
        false => {
            now = open.again(open.runner)?;
            &now
        }
    };
    let there = There::read_to_remove(open.runner, &open.home, name, &open.machine.links)?;
    let own;
    let open = match &there.stored {
        Ok(stored) => {
            own = open.seen_by(name, Some(stored), None)?;
            &*own
        }
        Err(_) if !away::can_remain(&there) => open,
        Err(_) => {
            own = Seen::Own(Box::new(open.beside(away::remains(open.runner, &open.home.mark(name)))));
            &*own
        }
    };
    let mut there = there.with(open);
    let indexes = match (&there.stored, there.is_published) {
        (Ok(stored), true) => stored.interfaces.values().map(|place| place.ifindex).collect(),
        // Nothing says where its taps are.
        _ => {
            let mut found =
                tapped(open).unwrap_or_else(|_| open.machine.links.iter().map(|link| link.ifindex).collect());
            found.extend(open.machine.elsewhere.links.iter().map(|link| link.ifindex));
            found
        }
    };
    let indexes: BTreeSet<u32> = indexes.union(&there.marks).copied().collect();
    there.look(open.runner, &indexes, false)?;
    there.look_at_neighbours(open.runner, |_| true)?;
    let changes = difference::undo(&there, clsact);
    done.extend(changes.iter().cloned());
    Executor::new(open.runner, &open.home, name, initial(&there)).carry_out(&changes)
}

/// Takes the taps that the sessions of a dead network namespace have in others, which live on.
fn leave_others(runner: &Runner, dead: &Home) -> Result<()> {
    for name in dead.sessions() {
        let mut there = There::read_to_remove(runner, dead, &name, &[])?;
        let stored = there.stored.clone().ok().filter(|stored| away::is_asked(Some(stored), None));
        let Some(stored) = stored else { continue };
        there.links = away::look(runner, &there.mark(), Some(&stored), None, &[])?.links;
        let indexes = there.links.iter().map(|link| link.ifindex).collect();
        there.look(runner, &indexes, false)?;
        let changes = difference::leave(&there);
        Executor::new(runner, dead, &name, initial(&there)).carry_out(&changes)?;
    }
    Ok(())
}

/// Removes every tap of which nothing tells the session any more, and the clsact qdiscs of ours. Answers whether there was
/// one.
pub(crate) fn sweep(open: &Open) -> Result<bool> {
    let indexes = tapped(open)?;
    let links: Vec<&Link> = open.machine.links.iter().filter(|link| indexes.contains(&link.ifindex)).collect();
    let devices: Vec<Dev> = links.iter().map(|link| link.dev()).collect();
    let mut lines = Vec::new();
    for (Dev { name, .. }, hooks) in devices.iter().zip(tc::hooks(open.runner, &devices)?) {
        for direction in [Direction::Ingress, Direction::Egress] {
            let taps = hooks.filters(direction).iter().filter(|at| at.program() == Program::tap(direction).name());
            let line = |filter: &tc::Filter| {
                let (hook, pref, handle) = (direction.into(), filter.pref, filter.handle()?);
                Some(tc::del_filter(&tc::Place { dev: name, hook, pref, handle, classid: 0 }))
            };
            lines.extend(taps.filter_map(line));
        }
        let is_ours = |filter: &&tc::Filter| filter.options.is_none() || filter.program().starts_with("snif_tap_");
        if hooks.marked && hooks.ingress.iter().chain(&hooks.egress).all(|filter| is_ours(&filter)) {
            lines.push(tc::del_clsact(name));
        }
    }
    match open.runner.dry_run {
        true => lines.iter().try_for_each(|line| exec::print(&format!("tc {line}\n")))?,
        false => tc::batch(open.runner, None, &lines)?,
    }
    Ok(!lines.is_empty())
}

/// The interfaces that can run a tap of any session.
pub(super) fn tapped(open: &Open) -> Result<BTreeSet<u32>> {
    let names = tc::with_clsact(open.runner)?;
    let links = open.machine.links.iter().filter(|link| link.away.is_none() && names.contains(&link.ifname));
    Ok(links.map(|link| link.ifindex).collect())
}

/// Names of the sessions that are up, and of those whose relay alone tells that they are.
pub(crate) fn shown(open: &Open) -> Vec<String> {
    let is_up = open.home.sessions().into_iter();
    let halves = open.home.halves();
    let relays = open.machine.links.iter().filter_map(relay::session).map(String::from);
    let all: BTreeSet<String> = is_up.chain(relays.filter(|name| !halves.contains(name))).collect();
    all.into_iter().collect()
}

/// Names of everything of which something is left: sessions, halves of sessions, relays.
pub(crate) fn everything(open: &Open) -> Vec<String> {
    let relays = open.machine.links.iter().filter_map(relay::session).map(String::from);
    let all: BTreeSet<String> = open.home.sessions().into_iter().chain(open.home.halves()).chain(relays).collect();
    all.into_iter().collect()
}

/// The out interfaces of the remotes whose way is not looked up.
fn outs_of(there: &There, request: &Request, scope: &Scope) -> Vec<(IpAddr, Link)> {
    let Ok(stored) = &there.stored else { return Vec::new() };
    let rows = there.remote_rows();
    let others = request.options.remotes.iter().filter(|remote| !scope.asked.remotes.contains(remote));
    others
        .filter_map(|remote| {
            let ifindex = rows.get(stored.remotes.get(remote)?)?.ifindex;
            Some((*remote, there.link(ifindex)?.clone()))
        })
        .collect()
}

/// With what the session knows of its remotes.
fn remembered(there: &There, asked: Asked) -> Asked {
    let down = there.stored.as_ref().map_or_else(|_| BTreeMap::new(), |stored| stored.down.clone());
    Asked { known: there.next_hops(), down, unanswered: there.unanswered(), ..asked }
}

/// The interfaces whose hooks are looked at: those in question, and the out interfaces.
fn hooks_asked(
    there: &There,
    edit: &Edit,
    interfaces: &[(Watched, Option<Link>)],
    resolved: &Resolved,
) -> BTreeSet<u32> {
    let is_asked = |name: &String| edit.scope.hooks.as_ref().is_none_or(|asked| asked.contains(name));
    let wanted = interfaces.iter().filter(|(watched, _)| is_asked(&watched.interface));
    let mut indexes: BTreeSet<u32> = wanted.filter_map(|(_, link)| Some(link.as_ref()?.ifindex)).collect();
    if let Ok(stored) = &there.stored {
        let known = stored.interfaces.iter().filter(|(name, _)| is_asked(name));
        indexes.extend(known.map(|(_, place)| place.ifindex));
    }
    let is_new = |link: &&Link| there.value(Map::Outs, &link.ifindex.to_ne_bytes()).is_none();
    let outs = resolved.remotes.values().filter_map(|route| route.out.as_ref()).filter(is_new);
    indexes.extend(outs.map(|link| link.ifindex));
    indexes
}

fn needs_programs(there: &There, request: &Request) -> bool {
    let Ok(stored) = &there.stored else { return true };
    let known = there.programs.len() + there.unpinned_programs.len() == Program::ALL.len();
    !known || !stored.compiled.can(request) || !stored.compiled.has_filter(request.options.filter.as_deref())
}

fn wanted(there: &There, edit: &Edit, interfaces: Vec<(Watched, Option<Link>)>, resolved: &Resolved) -> Wanted {
    let outs = resolved.remotes.values().filter_map(|route| route.out.as_ref());
    let counted = |link: &Link| {
        let hooks = there.hooks.get(&link.ifindex)?;
        let device = link.stats64.tx.dropped + link.stats64.tx.errors;
        Some((link.ifindex, Out { device, queue: tc::qdisc_drops(hooks), dropped: 0 }))
    };
    let all = &edit.request.options.remotes;
    Wanted {
        request: edit.request.clone(),
        applied: edit.applied,
        interfaces,
        left_out: pattern::expand(&edit.request, there.stored.as_ref().ok(), &there.links).left_out,
        remotes: resolved.remotes.iter().map(|(remote, route)| (*remote, route.outer)).collect(),
        hops: resolved.remotes.iter().filter_map(|(remote, route)| Some((*remote, route.hop.clone()?))).collect(),
        down: resolved.remotes.iter().filter_map(|(remote, route)| Some((*remote, route.silence?))).collect(),
        underlay: resolved.underlay.clone(),
        is_whole_underlay: all.iter().all(|remote| edit.scope.asked.remotes.contains(remote)),
        outs: outs.filter_map(counted).collect(),
        clsact: edit.clsact,
        clock: clock::offset(),
        filter: edit.filter.clone(),
    }
}

/// What a session is to be now, by a look at the machine that changes nothing of it.
pub(crate) fn expected(there: &There, machine: &Machine) -> Option<Result<Wanted>> {
    let stored = there.stored.as_ref().ok()?;
    let request = resolve::follow(stored, machine);
    let mut interfaces = resolve::interfaces(&request, Some(stored), machine);
    let scope = Scope::all(&request);
    let asked = remembered(there, Asked { passive: true, ..scope.asked });
    let resolved = resolve::resolve(machine, &request, &interfaces, &asked, &[]);
    let edit = Edit::new(request, Scope { asked, ..scope });
    Some(resolved.map(|resolved| {
        resolved.keep_fit(&mut interfaces);
        wanted(there, &edit, interfaces, &resolved)
    }))
}

fn headers(wanted: &Wanted) -> BTreeMap<IpAddr, Remote> {
    wanted.remotes.iter().map(|(at, outer)| (*at, crate::datapath::template::remote(outer))).collect()
}

/// The outer packets of copies to remotes that are new.
fn flows(resolved: &Resolved, edit: &Edit) -> Vec<Flow> {
    let tunnel = &edit.request.options.tunnel;
    let new = resolved.remotes.iter().filter(|(remote, _)| edit.scope.asked.new.contains(remote));
    let flow = |(remote, route): (&IpAddr, &RemoteRoute)| {
        let out = route.out.as_ref()?.ifname.clone();
        Some(Flow { source: route.outer.source, remote: *remote, out, port: tunnel.udp_port() })
    };
    new.filter_map(flow).collect()
}

/// Other sessions whose numbers a collector takes for these, where that is new.
fn rivals(open: &Open, there: &There, edit: &Edit, resolved: &Resolved) -> Vec<Warning> {
    let tunnel = edit.request.options.tunnel;
    let is_same = there.stored.as_ref().is_ok_and(|stored| stored.request.options.tunnel == tunnel);
    let is_new = |remote: &IpAddr| tunnel.has_numbers() && (!is_same || edit.scope.asked.new.contains(remote));
    let new = resolved.remotes.iter().filter(|(remote, route)| is_new(remote) && route.out.is_some());
    let copies: Vec<Copies> =
        new.map(|(remote, route)| Copies { tunnel, source: route.outer.source, remote: *remote }).collect();
    // That they cannot be read hinders nothing.
    let found =
        rivals::of(open, &there.name, &copies).unwrap_or_default().into_iter().filter(|rival| rival.is_numbered);
    found.map(|rival| Warning { remote: None, text: rival.warning(), is_of_now: true, is_once: true }).collect()
}

/// So many of them are told one by one.
const MOST_HIDDEN: usize = 8;

/// Who can hide packets from the taps of these interfaces.
fn hidden(open: &Open, there: &There, wanted: &Wanted, interfaces: &[String]) -> Vec<Warning> {
    let new = wanted.interfaces.iter().filter(|(watched, _)| interfaces.contains(&watched.interface));
    let new: Vec<(&Watched, &Link)> = new.filter_map(|(watched, link)| Some((watched, link.as_ref()?))).collect();
    open.machine.ask_tcx(&new.iter().map(|(_, link)| *link).collect::<Vec<_>>());
    let of = |(watched, link): &(&Watched, &Link)| {
        let directions = watched.direction.directions().iter();
        directions.flat_map(|at| ahead::of(&open.machine, there, link, *at)).collect::<Vec<_>>()
    };
    let mut texts: Vec<String> = new.iter().flat_map(of).map(|ahead| ahead.warning()).collect();
    if texts.len() > MOST_HIDDEN {
        let more = texts.len() - MOST_HIDDEN;
        texts.truncate(MOST_HIDDEN);
        texts.push(format!("so it is at {more} hooks more; see: snifctl status --json | jq '.sessions[].ahead'"));
    }
    texts.into_iter().map(|text| Warning { remote: None, text, is_of_now: false, is_once: true }).collect()
}

/// What adding a clsact qdisc has cost, where packets stood in the interface's queue.
fn queue_warnings(there: &There, changes: &[Change], clsact: Clsact) -> Vec<Warning> {
    let acts = changes.iter().flat_map(|change| &change.acts);
    let added = acts.filter_map(|act| match act {
        Act::AddClsact { ifindex, .. } => there.link(*ifindex).filter(|link| !relay::is_one(link)),
        _ => None,
    });
    let standing = added.filter_map(|link| {
        let standing = there.hooks.get(&link.ifindex).map_or(0, tc::standing);
        (standing > 0).then_some((link, standing))
    });
    let help = "; --keep-clsact leaves that qdisc in place, so that no later `down` and `up` does this again";
    let text = |(link, standing): (&Link, u64)| {
        format!(
            "{standing} packets stood in the queue of {} when its clsact qdisc was added: the kernel then restarts the \
             queue and drops them{}",
            link.ifname,
            if clsact == Clsact::Leave { "" } else { help }
        )
    };
    standing.map(|found| Warning { remote: None, text: text(found), is_of_now: false, is_once: true }).collect()
}
