//! Running snifctl as a user would, and judging what it said and what it left behind.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Output, Stdio};

use serde_json::Value;

use super::capture::Direction;
use super::check::assert_same_frames;
use super::decode::{decap_gre, inner_frames};
use super::frames::{self, Ends};
use super::{Lab, Ns, Options, PATIENCE, check_output, poll};

/// A line of what a tool says, without what changes by itself: the timers of a relay's bridge, and the carrier of its
/// devices, of which the kernel takes note some time after they are up.
fn settled(line: &str) -> Option<String> {
    if line.starts_with("multicast ff00::/8 dev snif") {
        return None;
    }
    let is_relay = line.split(' ').nth(1).is_some_and(|name| name.starts_with("snif"));
    let line = if is_relay { line.replace("NO-CARRIER,", "") } else { line.into() };
    let (mut kept, mut before) = (Vec::new(), "");
    for word in line.split_whitespace() {
        let moves = before.ends_with("_timer") || is_relay && before == "state";
        kept.extend((!moves).then_some(word));
        before = word;
    }
    Some(kept.join(" "))
}

/// The request that most tests make.
pub(crate) const UP: [&str; 6] = ["up", "eth0", "--tunnel", "gre", "--remote", "198.51.100.2"];

/// That request with more or other arguments.
pub(crate) fn up_with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&UP[..], more].concat()
}

/// A finished snifctl.
#[derive(Debug)]
pub(crate) struct Said {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Said {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8 from snifctl");
        Said { status: output.status, stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }
}

impl Said {
    /// Waits for a snifctl that [`Lab::start_by`] has started.
    pub(crate) fn of(child: Child) -> Said {
        child.wait_with_output().expect("wait for snifctl").into()
    }

    /// Panics unless it ended with 0 and each line on stderr says who speaks.
    #[track_caller]
    pub(crate) fn ok(self) -> Said {
        assert!(self.status.success(), "{self:#?}");
        assert!(self.stderr.lines().all(|line| line.starts_with("snifctl: ")), "{self:#?}");
        self
    }

    /// What it said on stderr, but that it waited for a live snifctl, as any may on a busy machine.
    fn complaints(&self) -> Vec<&str> {
        let waits = |line: &str| {
            line.starts_with("snifctl: waiting for another snifctl") && line.ends_with("; --wait SECONDS says how long")
        };
        self.stderr.lines().filter(|line| !waits(line)).collect()
    }

    /// Panics unless it ended with 0 and complained of nothing.
    #[track_caller]
    pub(crate) fn quietly_ok(self) -> Said {
        let said = self.ok();
        assert_eq!(said.complaints(), [""; 0], "{said:#?}");
        said
    }

    /// Panics unless it ended with 0 and said this on stderr, and nothing else.
    #[track_caller]
    pub(crate) fn ok_noting(self, note: &str) -> Said {
        let said = self.ok();
        assert!(said.complaints().len() <= 1 && said.stderr.contains(note), "{note:?} in {said:#?}");
        said
    }

    /// Panics unless it refused: this exit code, nothing on stdout, and one line that names what is wrong and ends with
    /// what would work.
    #[track_caller]
    pub(crate) fn refused(self, code: i32, names: &str, ends: &str) {
        assert_eq!((self.status.code(), self.stdout.as_str()), (Some(code), ""), "{self:#?}");
        let [line] = self.complaints()[..] else { panic!("one line on stderr in {self:#?}") };
        assert!(line.starts_with("snifctl: ") && line.len() < 1000, "{} bytes: {line:?}", line.len());
        assert!(line.contains(names), "{line:?}\nnames {names:?}");
        assert!(line.ends_with(ends), "{line:?}\nends with {ends:?}");
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|err| panic!("JSON on stdout: {err}: {self:#?}"))
    }
}

impl Lab {
    /// A lab in which every copy of the watched link fits the out link, so that `up` has nothing to warn of.
    pub(crate) fn roomy() -> Lab {
        Lab::with(Options { out_mtu: 1600, ..Options::default() })
    }

    /// Runs snifctl in the host namespace.
    pub(crate) fn said<S: AsRef<OsStr>>(&self, args: &[S]) -> Said {
        self.said_by::<&str, S>(&[], args)
    }

    /// Runs snifctl in the host namespace by way of another program, as `sudo` is one.
    pub(crate) fn said_by<P: AsRef<OsStr>, S: AsRef<OsStr>>(&self, by: &[P], args: &[S]) -> Said {
        let mut command = self.command(Ns::Host, &[]);
        command.args(by).arg(env!("CARGO_BIN_EXE_snifctl")).args(args);
        command.output().expect("run snifctl").into()
    }

    /// As [`Lab::said_by`], but does not wait.
    pub(crate) fn start_by<P: AsRef<OsStr>, S: AsRef<OsStr>>(&self, by: &[P], args: &[S]) -> Child {
        let mut command = self.command(Ns::Host, &[]);
        command.args(by).arg(env!("CARGO_BIN_EXE_snifctl")).args(args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start snifctl")
    }

    /// Runs a command in the host namespace with something on its stdin; panics unless it succeeds.
    #[track_caller]
    fn host_fed(&self, argv: &[&str], input: &str) -> String {
        let mut command = self.command(Ns::Host, argv);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|err| panic!("could not start {argv:?}: {err}"));
        let mut stdin = child.stdin.take().expect("a pipe");
        stdin.write_all(input.as_bytes()).expect("write to the command");
        drop(stdin);
        let output = check_output(&argv.join(" "), child.wait_with_output());
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// What a command in the host namespace prints.
    #[track_caller]
    pub(crate) fn shown(&self, argv: &[&str]) -> String {
        String::from_utf8(self.host(argv).stdout).expect("UTF-8")
    }

    /// Names of the host namespace's interfaces.
    pub(crate) fn interfaces(&self) -> Vec<String> {
        let links: Value = serde_json::from_str(&self.shown(&["ip", "-j", "link"])).expect("JSON of ip");
        let links = links.as_array().expect("a list of links");
        links.iter().map(|link| link["ifname"].as_str().expect("a name").into()).collect()
    }

    /// The neighbours of the host namespace that its kernel keeps fresh, without their states, which come and go.
    pub(crate) fn managed_neighbours(&self) -> Vec<String> {
        let table: Value = serde_json::from_str(&self.shown(&["ip", "-j", "neigh"])).expect("JSON of ip");
        let managed = table.as_array().expect("a table").iter().filter(|entry| entry.get("managed").is_some());
        managed.map(|entry| format!("managed {} {}", entry["dst"], entry["dev"])).collect()
    }

    /// Everything of the host namespace that snifctl could leave changed: links, addresses, routes, static and managed
    /// neighbours, qdiscs, filters, programs.
    pub(crate) fn machine(&self) -> String {
        let filters: String = self
            .interfaces()
            .iter()
            .map(|dev| format!("filter show dev {dev} ingress\nfilter show dev {dev} egress\n"))
            .collect();
        let shown = [
            without_timers(&self.shown(&["ip", "-d", "link"])),
            self.shown(&["ip", "address"]),
            self.shown(&["ip", "route", "show", "table", "all"]),
            self.shown(&["ip", "neigh", "show", "nud", "permanent"]),
            self.managed_neighbours().join("\n"),
            self.shown(&["tc", "qdisc"]),
            self.host_fed(&["tc", "-batch", "-"], &filters),
            self.shown(&["bpftool", "-j", "net", "show"]),
        ];
        // In what order a tool lists things says nothing.
        let shown = shown.join("\n");
        let mut lines: Vec<String> = shown.lines().filter_map(settled).collect();
        lines.sort_unstable();
        lines.join("\n")
    }

    /// Panics unless the host namespace is as `machine` said before, and no pin is left.
    #[track_caller]
    pub(crate) fn assert_as_before(&self, before: &str) {
        let after = self.machine();
        let lacks = |text: &str, line: &str| !text.lines().any(|other| other == line);
        let gone: Vec<&str> = before.lines().filter(|line| lacks(&after, line)).collect();
        let left: Vec<&str> = after.lines().filter(|line| lacks(before, line)).collect();
        assert!(before == after, "left behind: {left:#?}\ngone: {gone:#?}");
        self.assert_no_pins();
    }

    #[track_caller]
    pub(crate) fn assert_no_pins(&self) {
        let pins = self.pins();
        assert!(!pins.exists(), "{} is left", pins.display());
    }

    /// The directory of the host namespace's sessions.
    pub(crate) fn pins(&self) -> PathBuf {
        Path::new("/sys/fs/bpf/snifctl").join(self.ns_inode(Ns::Host).to_string())
    }

    /// Sends a prime number of frames over the watched link, and panics unless each arrives there, and `each` copies of
    /// it at the collector.
    #[track_caller]
    pub(crate) fn assert_copied(&self, each: usize) {
        let sent = frames::series(&Ends::PEER_TO_HOST, 7);
        let mut watched = self.capture(Ns::Host, "eth0", Direction::In);
        let mut collector = self.capture(Ns::Collector, "col0", Direction::In);
        self.send(Ns::Peer, "peer0", &sent);
        assert_same_frames(&sent, &watched.take(sent.len()));
        let copies = inner_frames(&decap_gre(&collector.take(sent.len() * each)));
        assert_same_frames(&vec![sent; each].concat(), &copies);
    }

    /// Programs that the sessions have pinned, by the kernel's number for each.
    pub(crate) fn program_ids(&self) -> Vec<u64> {
        let sessions = fs::read_dir(self.pins()).into_iter().flatten().flatten();
        let pins = sessions.flat_map(|session| fs::read_dir(session.path()).into_iter().flatten().flatten());
        let pins = pins.filter(|pin| pin.file_name().to_string_lossy().starts_with("snif_"));
        pins.map(|pin| {
            let path = pin.path();
            let shown = self.shown(&["bpftool", "-j", "prog", "show", "pinned", &path.to_string_lossy()]);
            let program: Value = serde_json::from_str(&shown).expect("JSON of bpftool");
            program["id"].as_u64().expect("an id")
        })
        .collect()
    }

    /// Panics unless the kernel forgets these programs, which it does a little after their last user has gone.
    #[track_caller]
    pub(crate) fn assert_unloaded(&self, ids: &[u64]) {
        for id in ids.iter().map(u64::to_string) {
            let show = ["bpftool", "prog", "show", "id", &id];
            let gone = poll(PATIENCE, || (!self.try_host(&show).status.success()).then_some(()));
            assert!(gone.is_some(), "program {id} is still loaded: {}", self.shown(&show));
        }
    }
}

/// The text without the numbers that follow names like `gc_timer`: what a bridge's clocks say changes by itself.
fn without_timers(text: &str) -> String {
    let line = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let is_time = |at: usize| at > 0 && words[at - 1].ends_with("_timer");
        let kept = words.iter().enumerate().filter(|(at, _)| !is_time(*at)).map(|(_, word)| *word);
        kept.collect::<Vec<_>>().join(" ")
    };
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}
