//! The programs that snifctl runs, how old they may be, and what is lost without them.

use std::path::Path;

use anyhow::{Result, bail};

use crate::tools::exec::{self, Cmd, Runner};
use crate::tools::kernel::version;

/// A program that snifctl runs.
pub(crate) struct Tool {
    pub name: &'static str,
    version: &'static [&'static str],
    minimum: (u32, u32),
    package: &'static str,
    /// What cannot be done without it.
    prevents: &'static str,
}

/// Those that every session needs.
pub(crate) const TOOLS: [Tool; 5] = [
    Tool {
        name: "clang",
        version: &["--version"],
        minimum: (12, 0),
        package: "clang",
        prevents: "the kernel program cannot be compiled",
    },
    Tool {
        name: "bpftool",
        version: &["version"],
        minimum: (7, 0),
        package: "bpftool",
        prevents: "programs and maps cannot be loaded, read or written",
    },
    Tool {
        name: "tc",
        version: &["-V"],
        minimum: (5, 10),
        package: "iproute2",
        prevents: "programs cannot be attached",
    },
    Tool {
        name: "ip",
        version: &["-V"],
        minimum: (5, 10),
        package: "iproute2",
        prevents: "routes cannot be looked up and the relay cannot be made",
    },
    Tool {
        name: "ethtool",
        version: &["--version"],
        minimum: (5, 17),
        package: "ethtool",
        prevents: "the relay cannot be told to make wire frames",
    },
];

/// Needed only where a filter is used.
pub(crate) const TCPDUMP: Tool = Tool {
    name: "tcpdump",
    version: &["--version"],
    minimum: (4, 9),
    package: "tcpdump",
    prevents: "filters cannot be read (only --filter and `filter` need it)",
};

/// Needed only where remotes are pinged.
pub(crate) const PING: Tool = Tool {
    name: "ping",
    version: &["-V"],
    minimum: (0, 0),
    package: "iputils-ping",
    prevents: "remotes cannot be asked whether they are there (only --probe icmp needs it)",
};

/// Needed only where pods are watched by name or label.
pub(crate) const KUBECTL: Tool = Tool {
    name: "kubectl",
    version: &["version", "--client", "--output=yaml"],
    minimum: (1, 20),
    package: "kubernetes-client",
    prevents: "pods cannot be found (only --pod and --pods need it)",
};

/// What a session needs once its programs are compiled.
pub(crate) const SESSION_TOOLS: [&str; 4] = ["bpftool", "tc", "ip", "ethtool"];

const BPF_HELPERS: &str = "/usr/include/bpf/bpf_helpers.h";

/// How a requirement is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Met,
    /// It is there, and says no version.
    Unknown,
    Lacking,
}

/// One requirement, as it was found.
#[derive(Clone, Debug)]
pub(crate) struct Finding {
    pub name: &'static str,
    pub state: State,
    /// What was found, and what a lack prevents.
    pub detail: String,
    /// The Debian package that has it.
    pub package: &'static str,
}

/// Runs the tool for its version.
pub(crate) fn check(runner: &Runner, tool: &Tool) -> Finding {
    if exec::find(tool.name).is_none() {
        return missing(tool);
    }
    judge(tool, runner.read(&Cmd::new(tool.name, tool.version.iter().copied())).ok().as_deref())
}

fn missing(tool: &Tool) -> Finding {
    tool.finding(State::Lacking, format!("missing: {}", tool.prevents))
}

/// `said`: what the tool answers when it is asked for its version.
fn judge(tool: &Tool, said: Option<&str>) -> Finding {
    let (major, minor) = tool.minimum;
    match said.and_then(version) {
        Some(found) if found < tool.minimum => {
            let detail = format!("{}.{} is older than {major}.{minor}: {}", found.0, found.1, tool.prevents);
            tool.finding(State::Lacking, detail)
        }
        Some(found) => tool.finding(State::Met, format!("{}.{} (at least {major}.{minor})", found.0, found.1)),
        None => {
            let detail = format!("says no version that can be read; at least {major}.{minor} is needed");
            tool.finding(State::Unknown, detail)
        }
    }
}

impl Tool {
    fn finding(&self, state: State, detail: String) -> Finding {
        Finding { name: self.name, state, detail, package: self.package }
    }
}

/// The headers that the datapath includes.
pub(crate) fn check_headers() -> Finding {
    let (state, detail) = match Path::new(BPF_HELPERS).exists() {
        true => (State::Met, "headers are there".into()),
        false => (State::Lacking, format!("{BPF_HELPERS} is missing: the program cannot be compiled")),
    };
    Finding { name: "libbpf-dev", state, detail, package: "libbpf-dev" }
}

/// Refuses to begin while anything is missing or too old, naming all of it at once. Versions are asked once for each
/// object, when it has to be compiled.
pub(crate) fn ensure_tools(runner: &Runner, is_compiled: bool) -> Result<()> {
    if is_compiled {
        return ensure_present(&SESSION_TOOLS);
    }
    let quiet = Runner { verbose: false, ..*runner };
    let found = TOOLS.iter().map(|tool| check(&quiet, tool)).chain([check_headers()]);
    refuse(found.filter(|found| found.state == State::Lacking).collect())
}

/// Refuses to begin without these tools.
pub(crate) fn ensure_present(names: &[&str]) -> Result<()> {
    let lacking = TOOLS.iter().filter(|tool| names.contains(&tool.name) && exec::find(tool.name).is_none());
    refuse(lacking.map(missing).collect())
}

/// Refuses to begin without this tool.
pub(crate) fn ensure_there(tool: &Tool) -> Result<()> {
    refuse(exec::find(tool.name).is_none().then(|| missing(tool)).into_iter().collect())
}

fn refuse(lacking: Vec<Finding>) -> Result<()> {
    if lacking.is_empty() {
        return Ok(());
    }
    let what: Vec<String> = lacking.iter().map(|found| format!("{}: {}", found.name, found.detail)).collect();
    let mut packages: Vec<&str> = lacking.iter().map(|found| found.package).collect();
    packages.dedup();
    bail!("{}; try: {}", what.join("; "), install(&packages))
}

/// What brings these packages.
pub(crate) fn install(packages: &[&str]) -> String {
    let image = if packages.contains(&"clang") { ", or the image snifctl:clang" } else { "" };
    format!("apt-get install {}{image}", packages.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_missing_is_named_at_once() {
        let lacking = [&TOOLS[2], &TOOLS[3], &TOOLS[0]].map(|tool| tool.finding(State::Lacking, "missing: x".into()));
        let text = refuse(lacking.to_vec()).unwrap_err().to_string();
        assert_eq!(
            text,
            "tc: missing: x; ip: missing: x; clang: missing: x; try: apt-get install iproute2 clang, or the image snifctl:clang"
        );
        assert!(refuse(Vec::new()).is_ok());
    }

    #[test]
    fn what_only_an_option_needs_is_named_with_it() {
        let lacking = Tool { name: "no-such-ping", ..PING };
        let text = ensure_there(&lacking).unwrap_err().to_string();
        assert!(text.starts_with("no-such-ping: missing: ") && text.contains("only --probe icmp"), "{text}");
        assert!(text.ends_with("; try: apt-get install iputils-ping"), "{text}");
    }

    #[test]
    fn a_version_is_judged_by_the_least_that_is_needed() {
        let bpftool = &TOOLS[1];
        for (said, state, detail) in [
            (Some("bpftool v7.1.0"), State::Met, "7.1 (at least 7.0)"),
            (Some("bpftool v5.10.223"), State::Lacking, "5.10 is older than 7.0"),
            (Some("odd"), State::Unknown, "says no version"),
            (None, State::Unknown, "says no version"),
        ] {
            let found = judge(bpftool, said);
            assert_eq!(found.state, state, "{said:?}");
            assert!(found.detail.starts_with(detail), "{}", found.detail);
        }
    }
}
