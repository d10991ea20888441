//! What tells that something has changed: triggers, never data.

use std::fs;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::probes::Answers;
use crate::tools::exec::{Cmd, Runner};

/// What wakes the watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    Changed,
    /// Remotes were asked.
    Answered(Answers),
    /// A monitor, by its place among [`COMMANDS`], has ended.
    Ended(usize),
    Signal,
}

/// Everything whose change can mean that a mirror is not right any more.
pub(super) const COMMANDS: [&[&str]; 2] =
    [&["ip", "-o", "monitor", "link", "address", "route", "neigh", "rule", "nexthop"], &["tc", "monitor"]];

/// The command line of one of them.
pub(super) fn command(at: usize) -> String {
    COMMANDS[at].join(" ")
}

/// So long it is waited for a monitor to listen; one that does not is looked past.
const PATIENCE: Duration = Duration::from_secs(2);

/// Starts a monitor, and returns once it listens. Each of its lines, also on standard error, where it tells of messages that
/// were lost, is an event. It ends with us.
pub(super) fn start(runner: &Runner, at: usize, events: &Sender<Event>) -> Result<()> {
    let lines = runner.lines(&Cmd::new(COMMANDS[at][0], COMMANDS[at][1..].iter().copied()).mortal())?;
    let (pid, begun) = (lines.pid(), Instant::now());
    while !listens(pid) && begun.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(2));
    }
    let events = events.clone();
    std::thread::spawn(move || {
        let _ = lines.map(|_| Event::Changed).chain([Event::Ended(at)]).try_for_each(|event| events.send(event));
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
            start(&Runner::default(), at, &sender).unwrap();
            assert!(begun.elapsed() < PATIENCE, "{command:?} listens");
        }
        drop((sender, events));
    }
}
