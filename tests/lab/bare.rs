//! A network namespace with the least that a session needs, which comes and goes: its pins are nobody's but snifctl's to
//! remove.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::{PATIENCE, poll, random};

/// Removed with its value; what its sessions have pinned stays.
pub(crate) struct Bare {
    pub name: String,
}

const LINKS: &str = "link add v0 type veth peer name v1
address add 198.51.100.1/24 dev v1
link set dev v0 up
link set dev v1 up
neigh replace 198.51.100.2 lladdr 02:00:00:00:02:02 nud permanent dev v1
";

pub(crate) const UP: &str = "up v0 --tunnel gre --remote 198.51.100.2";

impl Bare {
    pub(crate) fn new() -> Bare {
        let bare = Bare { name: format!("snifb{:08x}", random()) };
        super::feed(Command::new("ip").args(["-batch", "-"]), &format!("netns add {}", bare.name));
        super::feed(Command::new("ip").args(["-n", &bare.name, "-batch", "-"]), LINKS);
        bare
    }

    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    pub(crate) fn inode(&self) -> u64 {
        fs::metadata(self.path()).expect("the namespace's file").ino()
    }

    pub(crate) fn pins(&self) -> PathBuf {
        Path::new("/sys/fs/bpf/snifctl").join(self.inode().to_string())
    }

    /// Runs a command in it, whatever comes of it.
    pub(crate) fn run(&self, argv: &[&str]) -> Output {
        let net = format!("--net={}", self.path().display());
        Command::new("nsenter").args([&net, "--"]).args(argv).env("LC_ALL", "C").output().expect("nsenter starts")
    }

    /// Runs snifctl; panics unless it succeeds. What it said: standard output, then standard error.
    #[track_caller]
    pub(crate) fn snifctl(&self, line: &str) -> String {
        let argv: Vec<&str> = [env!("CARGO_BIN_EXE_snifctl")].into_iter().chain(line.split(' ')).collect();
        let out = self.run(&argv);
        let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{line}: {said}");
        said
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
    }
}

/// So many namespaces come and go with a session in each: a session is never seen by a later one, and what they have
/// loaded goes.
pub(crate) fn come_and_go(count: usize) {
    let mut left: Vec<(u64, PathBuf)> = Vec::new();
    for _ in 0..count {
        let bare = Bare::new();
        assert!(bare.snifctl("status").starts_with("no session is up"));
        bare.snifctl(UP);
        let pins = bare.pins();
        left.push((program(&pins), pins));
    }
    // The kernel takes a namespace apart some time after it is gone.
    let (last, still) = (Bare::new(), |(id, pins): &&(u64, PathBuf)| pins.exists() && program(pins) == *id);
    let swept = poll(PATIENCE, || {
        last.snifctl("sync --all");
        left.iter().all(|at| !still(&at)).then_some(())
    });
    assert!(swept.is_some(), "{:?}", left.iter().filter(still).collect::<Vec<_>>());
}

/// Pods that come and go, some at once, under one session of their node: each is watched while it lives, and takes its taps
/// with it.
pub(crate) fn pods_come_and_go(lives: usize, at_once: usize) {
    let node = Bare::new();
    let names: Vec<String> = (0..at_once).map(|n| format!("{}p{n}", node.name)).collect();
    let flags: Vec<String> = names.iter().map(|name| format!("--netns {name}")).collect();
    node.snifctl(&format!("up {} --tunnel gre --remote 198.51.100.2 --wait-for-interface", flags.join(" ")));
    let id = program(&node.pins());
    for round in 0..lives.div_ceil(at_once) {
        let pods: Vec<Pod> = names.iter().map(|name| Pod::new(&node, name)).collect();
        node.snifctl("sync");
        let taps: serde_json::Value = serde_json::from_str(&node.snifctl("tap list --json")).expect("JSON");
        let attached = taps["taps"].as_array().expect("a list").iter().filter(|tap| tap["attached"] == true);
        assert_eq!(attached.count(), 2 * at_once, "round {round}: {taps:#}");
        drop(pods);
    }
    node.snifctl("sync");
    assert_eq!((node.snifctl("status --check").as_str(), program(&node.pins())), ("", id), "the session has lived on");
    node.snifctl("down");
}

/// A network namespace with an eth0, whose other end the node has. It ends with its value.
struct Pod<'a>(&'a str);

impl Pod<'_> {
    fn new<'a>(node: &Bare, name: &'a str) -> Pod<'a> {
        super::feed(Command::new("ip").args(["-batch", "-"]), &format!("netns add {name}"));
        // The kernel takes a namespace apart some time after it is gone, and the pair with it.
        let end = format!("pod{:08x}", random());
        let line = format!("link add {end} type veth peer name eth0 netns {name}");
        super::feed(Command::new("ip").args(["-n", &node.name, "-batch", "-"]), &line);
        Pod(name)
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", self.0]).output();
    }
}

/// The id of a session's first program; 0 where it is gone.
fn program(pins: &Path) -> u64 {
    let pin = pins.join("default/snif_tap_in");
    let out = Command::new("bpftool").args(["-j", "prog", "show", "pinned"]).arg(pin).output().expect("bpftool");
    let shown: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
    shown["id"].as_u64().unwrap_or_default()
}
