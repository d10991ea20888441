//! `watch`: keep mirrors right while the machine changes. It is when to [`sync`](super::sync), and nothing else.

mod log;
mod monitor;
mod notify;
mod probes;
mod pulse;
mod timing;

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::cli::WatchArgs;
use crate::commands::metrics::{Collector, Server};
use crate::commands::sync::{self, Put};
use crate::commands::{apply, status};
use crate::file::Entry;
use crate::origin::{self, Cluster, Origin};
use crate::session::away;
use crate::session::change::Change;
use crate::session::difference::Clsact;
use crate::session::engine::{self, Context, Open};
use crate::session::home::Wait;
use crate::session::resolve::{Asked, Warning};
use crate::session::stats;
use crate::tools::interrupt;
use crate::tools::requirements;
use crate::tools::rights;
use log::{Level, Log};
use monitor::{Event, Monitors};
use notify::Notify;
use probes::Probes;
use pulse::Pulse;
use timing::Timing;

/// Another snifctl may be at work for so long before a look is given up, and tried again later.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked whether a pod that is to come has a process: at first, and at last.
const PODS: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(1)];
/// So long is it looked: one that does not come is found by the next event.
const LONGEST: Duration = Duration::from_secs(600);

pub(super) fn run(context: &Context, args: &WatchArgs) -> Result<ExitCode> {
    if let Some(file) = &args.check {
        return pulse::check(file);
    }
    if let Some(file) = &args.hold {
        interrupt::watch();
        return pulse::hold(file);
    }
    rights::to_write()?;
    requirements::ensure_present(&requirements::SESSION_TOOLS)?;
    let (sender, events) = mpsc::channel();
    let notify = Notify::from_environment();
    let wake = sender.clone();
    interrupt::serve(notify.is_heard() || args.apply.is_some(), move || {
        let _ = wake.send(Event::Signal);
    });
    let wait = Wait(context.wait.0.or(Some(PATIENCE)));
    let pulse = Pulse::new(args.heartbeat.as_deref(), args.apply.as_deref())?;
    let mut watcher = Watcher {
        pulse,
        context: Context { wait, ..*context },
        args,
        log: Log::new(args.json),
        notify,
        timing: Timing::new(args.interval),
        probes: Probes::default(),
        files: Files::default(),
        suspects: BTreeMap::new(),
        waits: false,
        pods: Pending::default(),
        questions: Vec::new(),
        asked: None,
        monitors: Monitors::new(sender),
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
    pulse: Pulse,
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
    pods: Pending,
    /// What clusters are asked for, by what was found at the last look.
    questions: Vec<(Cluster, Origin)>,
    /// When they were asked; none where they have told of pods since.
    asked: Option<Instant>,
    monitors: Monitors,
}

/// Pods that have no process yet.
#[derive(Default)]
struct Pending {
    uids: Vec<String>,
    /// When it was first waited for these, and when they are looked for next.
    since: Option<Instant>,
    due: Option<Instant>,
}

impl Pending {
    /// After a look.
    fn are(&mut self, uids: Vec<String>, now: Instant) {
        if uids != self.uids {
            self.since = Some(now);
        }
        self.due = self.next(now).filter(|_| !uids.is_empty());
        self.uids = uids;
    }

    /// Later and later.
    fn next(&self, now: Instant) -> Option<Instant> {
        let waited = now.saturating_duration_since(self.since?);
        (waited < LONGEST).then(|| now + (waited / 20).clamp(PODS[0], PODS[1]))
    }

    /// Has one of them come? Answers when that is asked next, too.
    fn look(&mut self, now: Instant) -> (bool, Option<Instant>) {
        if self.due.is_none_or(|due| due > now) {
            return (false, self.due);
        }
        let has_come = origin::started(&self.uids);
        self.due = self.next(now).filter(|_| !has_come);
        (has_come, self.due)
    }
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
            let beat = self.pulse.beat(Instant::now());
            if beat.is_turn {
                let text = if self.pulse.is_held() { "held: it looks at nothing" } else { "it goes on" };
                self.log.say(Level::Notice, "", "hold", text);
            }
            if interrupt::is_reload() || beat.is_changed {
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
            if self.timing.due(now) <= now && !self.pulse.is_held() {
                let has_failed = self.look(now)?;
                self.timing.end(Instant::now(), has_failed, self.waits);
                if !is_ready {
                    self.notify.say("READY=1");
                    is_ready = true;
                }
                continue;
            }
            let round = self.probes.go_on(&self.context.runner, now, &self.monitors.sender);
            let (has_come, pods) = self.pods.look(now);
            if has_come {
                self.timing.event(now);
            }
            let dues = [restart, self.notify.feed(now), round, pods, beat.next].into_iter().flatten();
            let due = if self.pulse.is_held() { now + PATIENCE } else { self.timing.due(now) };
            let next = dues.fold(due, Instant::min);
            let event = match events.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            for event in [event].into_iter().chain(events.try_iter()) {
                match event {
                    Event::Changed => self.timing.event(Instant::now()),
                    Event::Pods => {
                        self.asked = None;
                        self.timing.event(Instant::now());
                    }
                    Event::Ended(at, why) => self.monitors.ended(at, why),
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

    /// Starts the monitors that do not run; answers when the next may be.
    fn start_monitors(&mut self) -> Result<Option<Instant>> {
        let started = self.monitors.start(&self.context.runner)?;
        started.said.iter().for_each(|said| self.log.say(Level::Warning, "", "monitor", said));
        if started.is_event {
            self.timing.event(Instant::now());
        }
        Ok(started.next)
    }

    /// Puts everything right that can be. Has something failed?
    fn look(&mut self, now: Instant) -> Result<bool> {
        let is_for_all = self.timing.is_for_all(now);
        self.timing.begin(now);
        // Nobody waits for us while a cluster is asked.
        let is_changed = self.asked.is_none_or(|asked| now >= asked + self.args.interval);
        self.asked = self.asked.filter(|_| !is_changed).or(Some(now));
        let unasked = origin::ask_ahead(&self.context.runner, &self.questions, is_changed);
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
        let missing = missing.map(|name| format!("no session {name} is up; it is waited for"));
        let missing: Vec<(Level, String)> = missing.chain(unasked).map(|text| (Level::Warning, text)).collect();
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
        let (mut pending, mut questions) = (Vec::new(), Vec::new());
        for name in &names {
            let (mut standing, mut told) = (Vec::new(), Vec::new());
            let pinged = self.probes.of(name);
            // Nothing is waited for: an answer is an event.
            let how = |asked: &mut Asked| (asked.passive, asked.sends, asked.pinged) = (true, true, pinged);
            match sync::session(&open, name, how) {
                Ok(Put { changes, done, there }) => {
                    if let Some(there) = there {
                        match rights::for_ping(&context.runner) {
                            Err(err) if !there.probed().is_empty() => standing.push((Level::Error, format!("{err:#}"))),
                            _ => self.probes.ask(name, &there),
                        }
                        self.waits |= !there.unanswered().is_empty();
                        let request = there.stored.as_ref().ok().map(|stored| &stored.request);
                        questions.extend(request.into_iter().flat_map(away::questions));
                    }
                    pending.extend(done.iter().flat_map(|done| done.pending.clone()));
                    let made = changes.iter().filter(|change| !change.acts.is_empty());
                    made.for_each(|change| self.log.say(Level::Info, name, "changed", &change.line()));
                    told.extend(changes.iter().filter(|change| change.acts.is_empty()).map(Change::line));
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
            // What only who asks a cluster knows.
            told.retain(|line| !left.contains(line));
            let left: Vec<String> = left.into_iter().filter(|line| !is_said(line)).collect();
            standing.extend(told.into_iter().map(|line| (Level::Warning, line)));
            let suspects: BTreeSet<String> = left.iter().map(|line| log::numberless(line)).collect();
            let before = self.suspects.insert(name.clone(), suspects.clone()).unwrap_or_default();
            if !suspects.is_subset(&before) {
                self.timing.event(Instant::now());
            }
            let lasting = left.into_iter().filter(|line| before.contains(&log::numberless(line)));
            standing.extend(lasting.map(|line| (Level::Warning, line)));
            self.log.standing(name, &standing);
        }
        self.pods.are(pending, Instant::now());
        self.monitors.follow(questions.iter().map(|(cluster, _)| cluster.clone()));
        self.questions = questions;
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
