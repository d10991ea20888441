//! A `snifctl watch` beside a test, and what it says: in its log, and to a service manager.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::{Lab, Ns, PATIENCE, poll};

/// What tests wait for after an event: repairs begin within a second of it.
pub(crate) const SOON: Duration = Duration::from_secs(if super::GUEST { 30 } else { 5 });

/// Ended with its value.
pub(crate) struct Watcher {
    child: Child,
    log: PathBuf,
    socket: UnixDatagram,
    told: Vec<String>,
}

impl Watcher {
    /// Starts it, and waits until it has looked once.
    pub(crate) fn start(lab: &Lab, args: &[&str]) -> Watcher {
        Watcher::start_by(lab, &[], args)
    }

    /// The same by way of another program, such as `env`.
    pub(crate) fn start_by(lab: &Lab, by: &[&str], args: &[&str]) -> Watcher {
        let mut watcher = Watcher::begin(lab, by, args);
        watcher.wait_told("READY=1");
        watcher
    }

    /// Starts it.
    pub(crate) fn begin(lab: &Lab, by: &[&str], args: &[&str]) -> Watcher {
        let path = lab.fresh_path("notify");
        let socket = UnixDatagram::bind(&path).expect("the manager's socket");
        socket.set_nonblocking(true).expect("a socket");
        let log = lab.fresh_path("watch.log");
        let file = fs::File::create(&log).expect("make the log");
        let mut command = lab.command(Ns::Host, &[]);
        command.args(by).arg(env!("CARGO_BIN_EXE_snifctl")).arg("watch").args(args);
        command.env("NOTIFY_SOCKET", path).stdout(Stdio::null()).stderr(file);
        Watcher { child: command.spawn().expect("start snifctl watch"), log, socket, told: Vec::new() }
    }

    pub(crate) fn pid(&self) -> String {
        self.child.id().to_string()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).expect("the log")
    }

    /// The log's lines from one on.
    pub(crate) fn lines_from(&self, at: usize) -> Vec<String> {
        self.log().lines().skip(at).map(String::from).collect()
    }

    /// Waits until a line from one on says this.
    #[track_caller]
    pub(crate) fn wait_said(&self, from: usize, text: &str) {
        let said = poll(SOON, || self.lines_from(from).iter().any(|line| line.contains(text)).then_some(()));
        assert!(said.is_some(), "the watch never says {text:?}:\n{}", self.lines_from(from).join("\n"));
    }

    /// What the service manager was told, all of it.
    pub(crate) fn told(&mut self) -> &[String] {
        let mut buffer = [0; 4096];
        while let Ok(bytes) = self.socket.recv(&mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..bytes]).into_owned();
            self.told.extend(text.lines().map(String::from));
        }
        &self.told
    }

    /// Waits until the service manager is told this once more than `before`, and answers how often it was.
    #[track_caller]
    pub(crate) fn wait_told(&mut self, what: &str) -> usize {
        let before = self.told.iter().filter(|line| line.starts_with(what)).count();
        let count = |told: &[String]| told.iter().filter(|line| line.starts_with(what)).count();
        let found = poll(PATIENCE, || Some(count(self.told())).filter(|now| *now > before));
        found.unwrap_or_else(|| panic!("it never told {what:?}: {:?}\n{}", self.told, self.log()))
    }

    /// How many looks it has ended.
    pub(crate) fn looks(&mut self) -> usize {
        self.told().iter().filter(|line| line.starts_with("STATUS=")).count()
    }

    /// Waits until it has not looked for longer than it waits after any event.
    #[track_caller]
    pub(crate) fn wait_until_calm(&mut self) {
        let (mut looks, mut since) = (self.looks(), Instant::now());
        let calm = poll(PATIENCE, || {
            let now = self.looks();
            if now != looks {
                (looks, since) = (now, Instant::now());
            }
            (since.elapsed() > Duration::from_millis(1500)).then_some(())
        });
        assert!(calm.is_some(), "its own looks are no events: {:?}", self.told);
    }

    pub(crate) fn signal(&self, name: &str) {
        super::signal(self.pid(), name);
    }

    /// Ends it by a signal; how it ended, and its log.
    #[track_caller]
    pub(crate) fn end(mut self, signal: &str) -> (ExitStatus, String) {
        self.signal(signal);
        let status = poll(PATIENCE, || self.child.try_wait().expect("a child"));
        (status.unwrap_or_else(|| panic!("it does not end:\n{}", self.log())), self.log())
    }

    /// The processes that it has started.
    pub(crate) fn children(&self) -> Vec<String> {
        let found = std::process::Command::new("pgrep").args(["-P", &self.pid()]).output().expect("run pgrep");
        String::from_utf8_lossy(&found.stdout).split_whitespace().map(String::from).collect()
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
