//! Fault injection: fake tools put first in snifctl's PATH, and mount namespaces in which files are not what they were.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Lab, check_output};

/// The programs that snifctl runs.
pub const TOOLS: [&str; 6] = ["bpftool", "clang", "ethtool", "ip", "tc", "tcpdump"];

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
pub enum Fault {
    /// The tool says that it failed.
    Fail { done: Option<usize> },
    /// snifctl is killed.
    Kill { done: Option<usize> },
}

/// A directory of fake tools.
pub struct Fakes {
    dir: PathBuf,
}

impl Lab {
    pub fn fakes(&self) -> Fakes {
        let dir = self.fresh_path("fakes");
        fs::create_dir(&dir).expect("make the directory of fake tools");
        Fakes { dir }
    }

    /// Stand-ins for every tool that do as the real ones until [`Fakes::arm`].
    pub fn counting_fakes(&self) -> Fakes {
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
    pub fn add(&self, tool: &str, script: &str) {
        let mut install = Command::new("install");
        install.args(["-m", "0755", "/dev/stdin"]).arg(self.dir.join(tool));
        let mut child = install.stdin(Stdio::piped()).spawn().expect("start install");
        let mut stdin = child.stdin.take().expect("a pipe");
        stdin.write_all(script.as_bytes()).expect("write the fake tool");
        drop(stdin);
        check_output("install", child.wait_with_output());
    }

    /// The way to run snifctl so that it meets these tools first; the logs that it keeps of failures go with the lab.
    pub fn first_in_path(&self) -> [String; 3] {
        let (dir, path) = (self.dir.display(), std::env::var("PATH").unwrap_or_default());
        ["env".into(), format!("TMPDIR={dir}"), format!("PATH={dir}:{path}")]
    }

    /// At the call with this number, counted over all tools from 1, something goes wrong.
    pub fn arm(&self, at: usize, fault: Fault) {
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

    pub fn disarm(&self) {
        self.arm(0, Fault::Fail { done: None });
    }

    /// The calls since the last [`Fakes::arm`], each as its words.
    pub fn calls(&self) -> Vec<String> {
        self.read("calls").lines().map(String::from).collect()
    }

    /// How many lines the call that went wrong had on its stdin, if it ran.
    pub fn input_lines(&self) -> usize {
        self.read("input").lines().count()
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.dir.join(name)).expect("read what the fake tools wrote")
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.dir.join(name), text).expect("tell the fake tools");
    }
}

/// The absolute path of a tool.
pub fn real(tool: &str) -> PathBuf {
    let dirs = BIN_DIRS.split(' ').map(Path::new);
    let mut paths = dirs.map(|dir| dir.join(tool));
    paths.find(|path| path.exists()).unwrap_or_else(|| panic!("{tool} is not installed"))
}

/// The way to run a command in a mount namespace of its own, after `script` has changed it. The pins in bpffs are shared.
pub fn in_mounts(script: &str) -> Vec<String> {
    let script = format!("{script}\nexec \"$@\"");
    let words = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", &script, "sh"];
    words.map(String::from).to_vec()
}

/// Mounts that make snifctl compile anew, into a cache that is gone with the mount namespace.
pub const EMPTY_CACHE: &str = "mount -t tmpfs -o mode=0755 tmpfs /var/cache";

/// Mounts that take these tools away: what is at their paths cannot be executed.
pub fn hide(tools: &[&str]) -> String {
    let tools = tools.join(" ");
    format!(
        "for tool in {tools}; do for dir in {BIN_DIRS}; do
            [ ! -e $dir/$tool ] || mount --bind /dev/null $dir/$tool
        done; done"
    )
}

/// Mounts that take the headers of libbpf away.
pub const BPF_HEADERS: &str = "mount -t tmpfs tmpfs /usr/include/bpf";
