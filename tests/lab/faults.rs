//! Fault injection: fake tools put first in snifctl's PATH, and mount namespaces in which files are not what they were.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::judge::Said;
use super::{Lab, check_output};

/// The programs that snifctl runs.
pub(crate) const TOOLS: [&str; 6] = ["bpftool", "clang", "ethtool", "ip", "tc", "tcpdump"];

/// Where snifctl looks for tools besides PATH.
const BIN_DIRS: &str = "/usr/local/sbin /usr/sbin /sbin /usr/local/bin /usr/bin /bin";

/// A tool's stand-in that counts the calls of all tools and, at one of them, does what the file `fault` says.
const COUNTING: &str = r#"#!/bin/sh
dir=@DIR@
read -r count <"$dir/count"
count=$((count + 1))
echo "$count" >"$dir/count"
echo "@TOOL@ $*" >>"$dir/calls"
read -r at fault lines <"$dir/fault"
[ "$count" = "$at" ] || exec @REAL@ "$@"
if [ "$lines" != none ]; then
    cat >"$dir/input"
    head -n "$lines" "$dir/input" | @REAL@ "$@" >/dev/null 2>&1
fi
if [ "$fault" = kill ]; then kill -9 "$PPID"; fi
echo "@TOOL@: injected failure" >&2
exit 1
"#;

/// What happens at the chosen call; `done` says how many lines of its input the tool does before, if it runs at all.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    /// The tool says that it failed.
    Fail { done: Option<usize> },
    /// snifctl is killed.
    Kill { done: Option<usize> },
}

/// A directory of fake tools.
pub(crate) struct Fakes {
    dir: PathBuf,
}

impl Lab {
    pub(crate) fn fakes(&self) -> Fakes {
        let dir = self.fresh_path("fakes");
        fs::create_dir(&dir).expect("make the directory of fake tools");
        Fakes { dir }
    }

    /// Stand-ins for every tool that do as the real ones until [`Fakes::arm`].
    pub(crate) fn counting_fakes(&self) -> Fakes {
        let fakes = self.fakes();
        for tool in TOOLS {
            let dir = fakes.dir.to_string_lossy();
            let script = COUNTING.replace("@DIR@", &dir).replace("@TOOL@", tool);
            fakes.add(tool, &script.replace("@REAL@", &real(tool).to_string_lossy()));
        }
        fakes.disarm();
        fakes
    }
}

impl Fakes {
    /// Writes a fake tool. Another process does it: a file that is open for writing in this one, or for a moment in a
    /// child that another test's thread is starting, cannot be executed.
    pub(crate) fn add(&self, tool: &str, script: &str) {
        let mut install = Command::new("install");
        install.args(["-m", "0755", "/dev/stdin"]).arg(self.dir.join(tool));
        let mut child = install.stdin(Stdio::piped()).spawn().expect("start install");
        let mut stdin = child.stdin.take().expect("a pipe");
        stdin.write_all(script.as_bytes()).expect("write the fake tool");
        drop(stdin);
        check_output("install", child.wait_with_output());
    }

    /// The way to run snifctl so that it meets these tools first; the logs that it keeps of failures go with the lab.
    pub(crate) fn first_in_path(&self) -> [String; 3] {
        let (dir, path) = (self.dir.display(), std::env::var("PATH").unwrap_or_default());
        ["env".into(), format!("TMPDIR={dir}"), format!("PATH={dir}:{path}")]
    }

    /// At the call with this number, counted over all tools from 1, something goes wrong.
    pub(crate) fn arm(&self, at: usize, fault: Fault) {
        let (word, done) = match fault {
            Fault::Fail { done } => ("fail", done),
            Fault::Kill { done } => ("kill", done),
        };
        let done = done.map_or_else(|| "none".into(), |lines| lines.to_string());
        self.write("fault", &format!("{at} {word} {done}\n"));
        self.write("count", "0\n");
        self.write("calls", "");
        self.write("input", "");
    }

    pub(crate) fn disarm(&self) {
        self.arm(0, Fault::Fail { done: None });
    }

    /// The calls since the last [`Fakes::arm`], each as its words.
    pub(crate) fn calls(&self) -> Vec<String> {
        self.read("calls").lines().map(String::from).collect()
    }

    /// How many lines the call that went wrong had on its stdin, if it ran.
    pub(crate) fn input_lines(&self) -> usize {
        self.read("input").lines().count()
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.dir.join(name)).expect("read what the fake tools wrote")
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.dir.join(name), text).expect("tell the fake tools");
    }
}

/// Calls that change the machine begin with one of these.
const WRITES: [&str; 6] = ["bpftool batch", "bpftool prog load", "ip -batch", "ip link del", "ethtool -K", "tc -batch"];

/// A lab whose tools can be made to fail at any call.
pub(crate) struct Bench {
    pub lab: Lab,
    pub fakes: Fakes,
    /// What the machine was like before.
    pub before: String,
    by: Vec<String>,
}

impl Bench {
    /// `mounts` is the way to run snifctl, if not plainly: see [`in_mounts`].
    pub(crate) fn new(lab: Lab, before: String, mounts: Vec<String>) -> Bench {
        let fakes = lab.counting_fakes();
        let by = [&mounts[..], &fakes.first_in_path()].concat();
        Bench { lab, fakes, before, by }
    }

    /// Runs snifctl while the fault is armed; `None` if it has ended before the call that would go wrong.
    pub(crate) fn run(&self, args: &[&str], at: usize, fault: Fault) -> Option<Said> {
        self.fakes.arm(at, fault);
        let said = self.lab.said_by(&self.by, args);
        (self.fakes.calls().len() >= at).then_some(said)
    }

    /// Runs snifctl, and returns the numbers of its calls that change the machine.
    pub(crate) fn writes(&self, args: &[&str]) -> Vec<usize> {
        self.run(args, usize::MAX, Fault::Fail { done: None });
        let is_write = |call: &String| WRITES.iter().any(|verb| call.starts_with(verb));
        let calls = self.fakes.calls();
        let numbered = calls.iter().zip(1..).filter(|(call, _)| is_write(call));
        numbered.map(|(_, at)| at).collect()
    }

    /// How many lines the call with this number is fed: it does none of them, and fails.
    #[track_caller]
    pub(crate) fn input_lines(&self, args: &[&str], at: usize) -> usize {
        self.run(args, at, Fault::Fail { done: Some(0) }).expect("a call");
        self.fakes.input_lines()
    }
}

/// The absolute path of a tool.
pub(crate) fn real(tool: &str) -> PathBuf {
    let dirs = BIN_DIRS.split(' ').map(Path::new);
    let mut paths = dirs.map(|dir| dir.join(tool));
    paths.find(|path| path.exists()).unwrap_or_else(|| panic!("{tool} is not installed"))
}

/// The way to run a command in a mount namespace of its own, after `script` has changed it. The pins in bpffs are shared.
pub(crate) fn in_mounts(script: &str) -> Vec<String> {
    let script = format!("{script}\nexec \"$@\"");
    let words = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", &script, "sh"];
    words.map(String::from).to_vec()
}

/// Mounts that make snifctl compile anew, into a cache that is gone with the mount namespace.
pub(crate) const EMPTY_CACHE: &str = "mount -t tmpfs -o mode=0755 tmpfs /var/cache";

/// Mounts that take these tools away: what is at their paths cannot be executed.
pub(crate) fn hide(tools: &[&str]) -> String {
    let tools = tools.join(" ");
    format!(
        "for tool in {tools}; do for dir in {BIN_DIRS}; do
            [ ! -e $dir/$tool ] || mount --bind /dev/null $dir/$tool
        done; done"
    )
}

/// Mounts that take the headers of libbpf away.
pub(crate) const BPF_HEADERS: &str = "mount -t tmpfs tmpfs /usr/include/bpf";
