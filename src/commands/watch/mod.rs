//! `watch`: keep mirrors right while the machine changes. It is when to [`sync`](super::sync), and nothing else.

mod log;
mod monitor;
mod notify;
mod probes;
mod timing;

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::cli::WatchArgs;
use crate::commands::status;
use crate::commands::sync::{self, Put};
use crate::session::difference::Clsact;
use crate::session::engine::{self, Context, Open};
use crate::session::home::{self, Wait};
use crate::session::resolve::Warning;
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
    interrupt::serve(notify.is_heard(), move || {
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
        waits: false,
        monitors: Monitors { sender, started: [None; monitor::COMMANDS.len()] },
    };
    watcher.go_on(&events)?;
    watcher.notify.say("STOPPING=1");
    if args.down_on_exit {
        watcher.take_down()?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The monitors, by when they were last started; `None` for one that is to be.
struct Monitors {
    sender: Sender<Event>,
    started: [Option<Instant>; monitor::COMMANDS.len()],
}

struct Watcher<'a> {
    context: Context,
    args: &'a WatchArgs,
    log: Log,
    notify: Notify,
    timing: Timing,
    probes: Probes,
    /// A next hop of theirs does not answer, and no event tells when it does.
    waits: bool,
    monitors: Monitors,
}

impl Watcher<'_> {
    /// Until a signal ends it.
    fn go_on(&mut self, events: &Receiver<Event>) -> Result<()> {
        let mut ended = [None; monitor::COMMANDS.len()].map(|_: Option<Instant>| Some(Instant::now()));
        let mut is_ready = false;
        while interrupt::code().is_none() {
            if interrupt::is_reload() {
                self.notify.reloading();
                self.timing.event(Instant::now());
                is_ready = false;
            }
            let mut next = self.start_monitors(&mut ended)?;
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
            let dues = next.into_iter().chain([self.timing.due(now)]).chain(self.notify.feed(now)).chain(round);
            next = dues.min();
            let wait = next.map_or(RESTART, |next| next.saturating_duration_since(Instant::now()));
            let event = match events.recv_timeout(wait) {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            for event in [event].into_iter().chain(events.try_iter()) {
                match event {
                    Event::Changed => self.timing.event(Instant::now()),
                    Event::Ended(at) => ended[at] = Some(Instant::now()),
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

    /// Starts those that have ended; answers when the next may be.
    fn start_monitors(&mut self, ended: &mut [Option<Instant>]) -> Result<Option<Instant>> {
        let mut next = None;
        for (at, ended) in ended.iter_mut().enumerate().filter(|(_, ended)| ended.is_some()) {
            let (now, last) = (Instant::now(), self.monitors.started[at]);
            if let Some(due) = last.map(|last| last + RESTART).filter(|due| *due > now) {
                next = next.into_iter().chain([due]).min();
                continue;
            }
            self.monitors.started[at] = Some(now);
            match monitor::start(&self.context.runner, at, &self.monitors.sender) {
                Ok(()) => *ended = None,
                Err(err) if interrupt::is_cause(&err) => return Ok(None),
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
        let (names, mut has_failed) = match looked {
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
        self.log.keep_only(&names);
        self.probes.keep_only(|name| names.contains(name));
        let sessions = if names.len() == 1 { "1 session".into() } else { format!("{} sessions", names.len()) };
        let state = match self.log.problems() {
            0 => "in order".into(),
            1 => "1 problem".into(),
            n => format!("{n} problems"),
        };
        has_failed &= interrupt::code().is_none();
        self.notify.say(&format!("STATUS={sessions}, {state}"));
        Ok(has_failed)
    }

    /// The sessions that are watched, each put right; and has one of them failed?
    fn sessions(&mut self, is_for_all: bool) -> Result<(BTreeSet<String>, bool)> {
        let context = self.context;
        let is_meant = |name: &String| self.args.names.is_empty() || self.args.names.contains(name);
        // Where there is nothing, nothing is made for the lock.
        if engine::everything(&Open::to_read(&context)?).is_empty() {
            return Ok((BTreeSet::new(), false));
        }
        let open = Open::to_write(&context)?;
        let names: BTreeSet<String> = engine::everything(&open).into_iter().filter(is_meant).collect();
        let mut has_failed = false;
        self.waits = false;
        for name in &names {
            let mut standing = Vec::new();
            match sync::session(&open, name, self.probes.of(name)) {
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
            let left: Vec<(Level, String)> = left.into_iter().filter(|(_, line)| !is_said(line)).collect();
            standing.extend(left);
            self.log.standing(name, &standing);
        }
        if is_for_all {
            open.sweep_dead();
        }
        Ok((names, has_failed))
    }

    /// What is still not as it must be with a session.
    fn left(&self, open: &Open, name: &str) -> Result<Vec<(Level, String)>> {
        let open = open.again(open.runner)?;
        let session = match stats::session(&open, name) {
            Ok(session) => session,
            Err(err) if interrupt::is_cause(&err) => return Err(err),
            Err(_) => return Ok(Vec::new()),
        };
        let bare = |line: String| line.strip_prefix(&format!("{name}: ")).map_or(line.clone(), String::from);
        Ok(status::problems(&session).into_iter().map(|line| (Level::Warning, bare(line))).collect())
    }

    /// Takes down what was watched.
    fn take_down(&self) -> Result<()> {
        let _held = interrupt::hold();
        let open = Open::to_remove(&self.context)?;
        let is_meant = |name: &String| self.args.names.is_empty() || self.args.names.contains(name);
        engine::everything(&open)
            .iter()
            .filter(|name| is_meant(name))
            .try_for_each(|name| engine::take_down(&open, name, Clsact::Remove).map(drop))
    }
}
