//! What tells that something has changed: triggers, never data.

use std::fs;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::probes::Answers;
use crate::origin::{self, Cluster};
use crate::tools::exec::{Cmd, Line, Runner};
use crate::tools::interrupt;

/// What wakes the watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    Changed,
    /// A cluster tells of pods.
    Pods,
    /// Remotes were asked.
    Answered(Answers),
    /// The monitor with this place has ended, with the last it said on standard error.
    Ended(usize, String),
    Signal,
}

/// Everything whose change can mean that a mirror is not right any more.
pub(super) const COMMANDS: [&[&str]; 2] =
    [&["ip", "-o", "monitor", "link", "address", "route", "neigh", "rule", "nexthop"], &["tc", "monitor"]];

/// A monitor is started again after so long, and where it does not last, after twice as long.
const RESTART: Duration = Duration::from_secs(1);
/// One that has run for so long has lasted.
const LASTS: Duration = Duration::from_secs(30);

/// What is listened to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Source {
    /// The kernel, by the command with this place among [`COMMANDS`].
    Kernel(usize),
    /// The pods of a cluster.
    Pods(Cluster),
}

impl Source {
    fn command(&self) -> Cmd {
        match self {
            Source::Kernel(at) => Cmd::new(COMMANDS[*at][0], COMMANDS[*at][1..].iter().copied()),
            Source::Pods(cluster) => origin::watch_command(cluster),
        }
    }
}

/// One that is kept running.
struct Monitor {
    source: Source,
    /// When it was last started.
    started: Option<Instant>,
    runs: bool,
    /// How often in a row it has ended soon, and what it said.
    failures: u32,
    why: String,
    /// What was told of that.
    told: Option<String>,
}

impl Monitor {
    fn new(source: Source) -> Monitor {
        Monitor { source, started: None, runs: false, failures: 0, why: String::new(), told: None }
    }

    /// When it may be started again.
    fn due(&self) -> Option<Instant> {
        self.started.map(|last| last + RESTART * if self.failures > 1 { 2 } else { 1 })
    }
}

/// All of them.
pub(super) struct Monitors {
    pub sender: Sender<Event>,
    all: Vec<Monitor>,
}

/// What has become of monitors that were to be started.
#[derive(Default)]
pub(super) struct Started {
    /// When the next may be.
    pub next: Option<Instant>,
    /// What is to be said of those that had ended.
    pub said: Vec<String>,
    /// What has changed meanwhile had no listener.
    pub is_event: bool,
}

impl Monitors {
    pub(super) fn new(sender: Sender<Event>) -> Monitors {
        Monitors { sender, all: (0..COMMANDS.len()).map(|at| Monitor::new(Source::Kernel(at))).collect() }
    }

    /// Pods of these clusters are followed from now on.
    pub(super) fn follow(&mut self, clusters: impl IntoIterator<Item = Cluster>) {
        for source in clusters.into_iter().map(Source::Pods) {
            if !self.all.iter().any(|monitor| monitor.source == source) {
                self.all.push(Monitor::new(source));
            }
        }
    }

    pub(super) fn ended(&mut self, at: usize, why: String) {
        let Some(monitor) = self.all.get_mut(at) else { return };
        (monitor.runs, monitor.why) = (false, why);
        let lasted = monitor.started.map_or(Duration::ZERO, |started| started.elapsed());
        monitor.failures = if lasted < LASTS { monitor.failures + 1 } else { 0 };
        monitor.told = monitor.told.take().filter(|_| monitor.failures > 0);
    }

    /// Starts those that do not run.
    pub(super) fn start(&mut self, runner: &Runner) -> Result<Started> {
        let mut done = Started::default();
        for (at, monitor) in self.all.iter_mut().enumerate().filter(|(_, monitor)| !monitor.runs) {
            let (now, last) = (Instant::now(), monitor.started);
            if let Some(due) = monitor.due().filter(|due| *due > now) {
                done.next = done.next.into_iter().chain([due]).min();
                continue;
            }
            monitor.started = Some(now);
            let is_kernel = matches!(monitor.source, Source::Kernel(_));
            match start(runner, &monitor.source, at, &self.sender) {
                Ok(()) => monitor.runs = true,
                Err(err) if interrupt::is_cause(&err) => return Ok(done),
                Err(err) if last.is_none() && is_kernel => return Err(err),
                Err(err) => {
                    monitor.failures += 1;
                    if is_kernel || monitor.failures == 1 {
                        done.said.push(format!("{err:#}"));
                    }
                    continue;
                }
            }
            // A server ends what it is asked for when it likes.
            let is_news = monitor.failures > 0 && monitor.told.as_ref() != Some(&monitor.why);
            if last.is_some() && (is_kernel || is_news) {
                let why = if monitor.why.is_empty() { String::new() } else { format!(" ({})", monitor.why) };
                done.said.push(format!("`{}` has ended{why}; started again", monitor.source.command()));
                monitor.told = Some(monitor.why.clone());
            }
            // A cluster tells first of all that it has.
            done.is_event |= last.is_some() && is_kernel;
        }
        Ok(done)
    }
}

/// So long it is waited for a monitor to listen; one that does not is looked past.
const PATIENCE: Duration = Duration::from_secs(2);

/// Starts a monitor, and returns once it listens. Each of its lines is an event, of the kernel's also on standard error, where
/// they tell of messages that were lost. It ends with us.
fn start(runner: &Runner, source: &Source, at: usize, events: &Sender<Event>) -> Result<()> {
    let lines = runner.lines(&source.command().mortal())?;
    let (pid, begun) = (lines.pid(), Instant::now());
    let is_cluster = matches!(source, Source::Pods(_));
    while !is_cluster && !listens(pid) && begun.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(2));
    }
    let events = events.clone();
    std::thread::spawn(move || {
        let mut why = String::new();
        for line in lines {
            let event = match line {
                Line::Out(_) if is_cluster => Event::Pods,
                Line::Err(said) if is_cluster => {
                    why = said;
                    continue;
                }
                _ => Event::Changed,
            };
            if events.send(event).is_err() {
                return;
            }
        }
        let _ = events.send(Event::Ended(at, why));
    });
    Ok(())
}

/// Has a process joined a group of the kernel's route messages? /proc/net/netlink has a line for each socket: `sk Eth Pid
/// Groups Rmem Wmem Dump Locks Drops Inode`.
fn listens(pid: u32) -> bool {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let own: Vec<String> = files
        .filter_map(|file| {
            let target = fs::read_link(file.path()).ok()?.to_string_lossy().into_owned();
            Some(target.strip_prefix("socket:[")?.trim_end_matches(']').to_string())
        })
        .collect();
    let sockets = fs::read_to_string("/proc/net/netlink").unwrap_or_default();
    sockets.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let joined = |groups: &&str| groups.bytes().any(|byte| byte != b'0');
        fields.get(1) == Some(&"0")
            && fields.get(3).is_some_and(joined)
            && own.iter().any(|at| fields.last() == Some(&at.as_str()))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_monitor_listens_when_it_is_started() {
        let (sender, events) = mpsc::channel();
        for (at, command) in COMMANDS.iter().enumerate() {
            let begun = Instant::now();
            start(&Runner::default(), &Source::Kernel(at), at, &sender).unwrap();
            assert!(begun.elapsed() < PATIENCE, "{command:?} listens");
        }
        drop((sender, events));
    }
}
