//! `watch`: keep mirrors right while the machine changes. It is when to [`sync`](super::sync), and nothing else.

mod log;
mod monitor;
mod notify;
mod probes;
mod timing;

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::cli::WatchArgs;
use crate::commands::metrics::{Collector, Server};
use crate::commands::sync::{self, Put};
use crate::commands::{apply, status};
use crate::file::Entry;
use crate::session::difference::Clsact;
use crate::session::engine::{self, Context, Open};
use crate::session::home::{self, Wait};
use crate::session::resolve::{Asked, Warning};
use crate::session::stats;
use crate::tools::interrupt;
use crate::tools::requirements;
use log::{Level, Log};
use monitor::Event;
use notify::Notify;
use probes::Probes;
use timing::Timing;

/// Another snifctl may be at work for so long before a look is given up, and tried again later.
const PATIENCE: Duration = Duration::from_secs(10);
/// A monitor that has ended is started again, but not more often.
const RESTART: Duration = Duration::from_secs(1);

pub(super) fn run(context: &Context, args: &WatchArgs) -> Result<ExitCode> {
    home::ensure_root()?;
    requirements::ensure_present(&requirements::SESSION_TOOLS)?;
    let (sender, events) = mpsc::channel();
    let notify = Notify::from_environment();
    let wake = sender.clone();
    interrupt::serve(notify.is_heard() || args.apply.is_some(), move || {
        let _ = wake.send(Event::Signal);
    });
    let wait = Wait(context.wait.0.or(Some(PATIENCE)));
    let mut watcher = Watcher {
        context: Context { wait, ..*context },
        args,
        log: Log::new(args.json),
        notify,
        timing: Timing::new(args.interval),
        probes: Probes::default(),
        files: Files::default(),
        suspects: BTreeMap::new(),
        waits: false,
        monitors: Monitors { sender, started: [None; monitor::COMMANDS.len()], runs: [false; monitor::COMMANDS.len()] },
    };
    watcher.read_files().map_err(apply::usage)?;
    let collector = Collector::new(context, None);
    let _server = args.metrics.as_ref().map(|listen| Server::start(listen, collector)).transpose()?;
    watcher.go_on(&events)?;
    watcher.notify.say("STOPPING=1");
    if args.down_on_exit {
        watcher.take_down()?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The monitors, each by its place.
struct Monitors {
    sender: Sender<Event>,
    /// When it was last started.
    started: [Option<Instant>; monitor::COMMANDS.len()],
    runs: [bool; monitor::COMMANDS.len()],
}

/// What is said of all files.
const FILES: &str = "files";

/// The sessions of the directory.
#[derive(Default)]
struct Files {
    entries: Vec<Entry>,
    /// They are to be applied, and those pruned that the files no longer have.
    is_due: bool,
}

impl Files {
    fn has(&self, name: &str) -> bool {
        self.entries.iter().any(|entry| entry.request.name == name)
    }
}

struct Watcher<'a> {
    context: Context,
    args: &'a WatchArgs,
    log: Log,
    notify: Notify,
    timing: Timing,
    probes: Probes,
    files: Files,
    /// What was not as it must be after the last look, by session: most of it comes from a change in between.
    suspects: BTreeMap<String, BTreeSet<String>>,
    /// A next hop of theirs does not answer, and no event tells when it does.
    waits: bool,
    monitors: Monitors,
}

/// All mistakes in files, which have a line each, as one line.
fn one_line(err: &anyhow::Error) -> String {
    format!("{err:#}").replace("\nsnifctl: ", "; ")
}

impl Watcher<'_> {
    /// Until a signal ends it.
    fn go_on(&mut self, events: &Receiver<Event>) -> Result<()> {
        let mut is_ready = false;
        while interrupt::code().is_none() {
            if interrupt::is_reload() {
                self.notify.reloading();
                match self.read_files() {
                    Ok(()) => self.timing.event(Instant::now()),
                    Err(err) => {
                        let text = format!("{}; what was read before stays in force", one_line(&err));
                        self.log.say(Level::Error, "", "reload", &text);
                    }
                }
                is_ready = false;
            }
            let restart = self.start_monitors()?;
            let now = Instant::now();
            if self.timing.due(now) <= now {
                let has_failed = self.look(now)?;
                self.timing.end(Instant::now(), has_failed, self.waits);
                if !is_ready {
                    self.notify.say("READY=1");
                    is_ready = true;
                }
                continue;
            }
            let round = self.probes.go_on(&self.context.runner, now, &self.monitors.sender);
            let dues = [restart, self.notify.feed(now), round].into_iter().flatten();
            let next = dues.fold(self.timing.due(now), Instant::min);
            let event = match events.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            for event in [event].into_iter().chain(events.try_iter()) {
                match event {
                    Event::Changed => self.timing.event(Instant::now()),
                    Event::Ended(at) => self.monitors.runs[at] = false,
                    Event::Answered(answers) => {
                        if self.probes.answered(answers) {
                            self.timing.event(Instant::now());
                        }
                    }
                    Event::Signal => {}
                }
            }
        }
        Ok(())
    }

    /// Is this session to be watched?
    fn is_meant(&self, name: &String) -> bool {
        self.args.names.is_empty() || self.args.names.contains(name)
    }

    /// Reads the directory.
    fn read_files(&mut self) -> Result<()> {
        if let Some(dir) = &self.args.apply {
            self.files = Files { entries: apply::read(std::slice::from_ref(dir))?, is_due: true };
        }
        Ok(())
    }

    /// Makes the sessions of the files, all of them or those that are not up. Has one failed?
    fn apply(&mut self, prune: bool, is_meant: impl Fn(&str) -> bool) -> Result<bool> {
        let entries = self.files.entries.iter().filter(|entry| is_meant(&entry.request.name)).cloned().collect();
        let outcome = match apply::apply(&self.context, entries, prune) {
            Err(err) if interrupt::is_cause(&err) => return Err(err),
            // What is up is kept in order all the same.
            outcome => outcome,
        };
        let failed = outcome.as_ref().err().map(|err| (Level::Error, one_line(err)));
        self.log.standing(FILES, &failed.into_iter().collect::<Vec<_>>());
        let Ok(outcome) = outcome else { return Ok(true) };
        for session in &outcome.sessions {
            let name = &session.name;
            session.lines().iter().for_each(|line| self.log.say(Level::Info, "", "applied", line));
            let own = format!("{name}: ");
            let notes = session.notes.iter().map(|note| note.strip_prefix(&own).unwrap_or(note));
            notes.for_each(|note| self.log.say(Level::Warning, name, "warning", note));
            let failed = session.error.iter().map(|err| (Level::Error, format!("{err:#}")));
            self.log.standing(&format!("{name} of a file"), &failed.collect::<Vec<_>>());
        }
        outcome.notes.iter().for_each(|note| self.log.say(Level::Warning, "", "warning", note));
        Ok(outcome.has_failed())
    }

    /// Starts those that have ended; answers when the next may be.
    fn start_monitors(&mut self) -> Result<Option<Instant>> {
        let mut next = None;
        for at in (0..monitor::COMMANDS.len()).filter(|at| !self.monitors.runs[*at]).collect::<Vec<_>>() {
            let (now, last) = (Instant::now(), self.monitors.started[at]);
            if let Some(due) = last.map(|last| last + RESTART).filter(|due| *due > now) {
                next = next.into_iter().chain([due]).min();
                continue;
            }
            self.monitors.started[at] = Some(now);
            match monitor::start(&self.context.runner, at, &self.monitors.sender) {
                Ok(()) => self.monitors.runs[at] = true,
                Err(err) if interrupt::is_cause(&err) => return Ok(None),
                Err(err) if last.is_none() => return Err(err),
                Err(err) => self.log.say(Level::Warning, "", "monitor", &format!("{err:#}")),
            }
            // What has changed meanwhile had no listener.
            if last.is_some() {
                self.log.say(
                    Level::Warning,
                    "",
                    "monitor",
                    &format!("`{}` has ended; started again", monitor::command(at)),
                );
                self.timing.event(now);
            }
        }
        Ok(next)
    }

    /// Puts everything right that can be. Has something failed?
    fn look(&mut self, now: Instant) -> Result<bool> {
        let is_for_all = self.timing.is_for_all(now);
        self.timing.begin(now);
        let looked = match self.sessions(is_for_all) {
            Err(err) if interrupt::is_cause(&err) => return Ok(false),
            looked => looked,
        };
        let (names, has_failed) = match looked {
            Ok(looked) => looked,
            Err(err) => {
                self.log.standing("", &[(Level::Error, format!("{err:#}"))]);
                self.notify.say(&format!("STATUS={err:#}"));
                return Ok(true);
            }
        };
        let missing = self.args.names.iter().filter(|name| !names.contains(*name));
        let missing: Vec<(Level, String)> =
            missing.map(|name| (Level::Warning, format!("no session {name} is up; it is waited for"))).collect();
        self.log.standing("", &missing);
        let files = &self.files;
        self.log.keep_only(|name| {
            name == FILES || names.contains(name) || name.strip_suffix(" of a file").is_some_and(|name| files.has(name))
        });
        self.suspects.retain(|name, _| names.contains(name));
        self.probes.keep_only(|name| names.contains(name));
        let sessions = if names.len() == 1 { "1 session".into() } else { format!("{} sessions", names.len()) };
        let state = match self.log.problems() {
            0 => "in order".into(),
            1 => "1 problem".into(),
            n => format!("{n} problems"),
        };
        self.notify.say(&format!("STATUS={sessions}, {state}"));
        Ok(has_failed)
    }

    /// The sessions that are watched, each put right; and has one of them failed?
    fn sessions(&mut self, is_for_all: bool) -> Result<(BTreeSet<String>, bool)> {
        let context = self.context;
        let mut has_failed = false;
        if self.files.is_due {
            has_failed |= self.apply(true, |_| true)?;
            self.files.is_due = has_failed;
        }
        let up: BTreeSet<String> = engine::everything(&Open::to_read(&context)?).into_iter().collect();
        if self.files.entries.iter().any(|entry| !up.contains(&entry.request.name)) {
            has_failed |= self.apply(false, |name| !up.contains(name))?;
        } else if up.is_empty() {
            // Where there is nothing, nothing is made for the lock.
            return Ok((BTreeSet::new(), has_failed));
        }
        let open = Open::to_write(&context)?;
        let names: BTreeSet<String> =
            engine::everything(&open).into_iter().filter(|name| self.is_meant(name)).collect();
        self.waits = false;
        for name in &names {
            let mut standing = Vec::new();
            let pinged = self.probes.of(name);
            // Nothing is waited for: an answer is an event.
            let how = |asked: &mut Asked| (asked.passive, asked.sends, asked.pinged) = (true, true, pinged);
            match sync::session(&open, name, how) {
                Ok(Put { changes, done, there }) => {
                    if let Some(there) = there {
                        self.probes.ask(name, &there);
                        self.waits |= !there.unanswered().is_empty();
                    }
                    let made = changes.iter().filter(|change| !change.acts.is_empty());
                    made.for_each(|change| self.log.say(Level::Info, name, "changed", &change.line()));
                    let warnings = done.map(|done| done.warnings).unwrap_or_default();
                    let (once, lasting): (Vec<Warning>, Vec<Warning>) = warnings.into_iter().partition(|at| at.is_once);
                    once.iter().for_each(|warning| self.log.say(Level::Warning, name, "warning", &warning.text));
                    standing.extend(lasting.into_iter().map(|warning| (Level::Warning, warning.text)));
                }
                Err(err) if interrupt::is_cause(&err) => return Err(err),
                Err(err) => {
                    has_failed = true;
                    standing.push((Level::Error, format!("{err:#}")));
                }
            }
            let left = self.left(&open, name)?;
            let is_said = |line: &str| {
                let subject = line.split(": ").next().unwrap_or_default();
                standing.iter().any(|(_, said): &(Level, String)| said.starts_with(&format!("{subject} ")))
            };
            let left: Vec<String> = left.into_iter().filter(|line| !is_said(line)).collect();
            let suspects: BTreeSet<String> = left.iter().map(|line| log::numberless(line)).collect();
            let before = self.suspects.insert(name.clone(), suspects.clone()).unwrap_or_default();
            if !suspects.is_subset(&before) {
                self.timing.event(Instant::now());
            }
            let lasting = left.into_iter().filter(|line| before.contains(&log::numberless(line)));
            standing.extend(lasting.map(|line| (Level::Warning, line)));
            self.log.standing(name, &standing);
        }
        if is_for_all {
            open.sweep_dead();
        }
        Ok((names, has_failed))
    }

    /// What is still not as it must be with a session.
    fn left(&self, open: &Open, name: &str) -> Result<Vec<String>> {
        let open = open.again(open.runner)?;
        let session = match stats::session(&open, name) {
            Ok(session) => session,
            Err(err) if interrupt::is_cause(&err) => return Err(err),
            Err(_) => return Ok(Vec::new()),
        };
        Ok(status::problems(&session))
    }

    /// Takes down what was watched.
    fn take_down(&self) -> Result<()> {
        let _held = interrupt::hold();
        let open = Open::to_remove(&self.context)?;
        engine::everything(&open)
            .iter()
            .filter(|name| self.is_meant(name))
            .try_for_each(|name| engine::take_down(&open, name, Clsact::Remove).map(drop))
    }
}
