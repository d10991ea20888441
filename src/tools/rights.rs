//! What this process may do: its capabilities, and what cannot be done without each. Being user 0 is not enough: a container
//! or a unit can take capabilities away. `docs/rights.md` has the table, `tests/sandbox/rights.rs` measures it.

use std::fmt;
use std::fs;
use std::sync::LazyLock;

use anyhow::{Error, Result, bail};
use rustix::process::{Resource, geteuid, getrlimit};

use crate::tools::exec::{Cmd, Failed, Runner, quote};
use crate::tools::kernel;

/// A capability, as the kernel numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cap {
    DacOverride = 1,
    SetGid = 6,
    SetUid = 7,
    NetAdmin = 12,
    NetRaw = 13,
    SysPtrace = 19,
    SysAdmin = 21,
    SysResource = 24,
    Perfmon = 38,
    Bpf = 39,
}

impl Cap {
    /// Without the `CAP_` before it.
    fn name(self) -> &'static str {
        match self {
            Cap::DacOverride => "DAC_OVERRIDE",
            Cap::SetGid => "SETGID",
            Cap::SetUid => "SETUID",
            Cap::NetAdmin => "NET_ADMIN",
            Cap::NetRaw => "NET_RAW",
            Cap::SysPtrace => "SYS_PTRACE",
            Cap::SysAdmin => "SYS_ADMIN",
            Cap::SysResource => "SYS_RESOURCE",
            Cap::Perfmon => "PERFMON",
            Cap::Bpf => "BPF",
        }
    }
}

/// What a verb needs, and what cannot be done without it.
#[derive(Clone, Copy, Debug)]
struct Need(Cap, &'static str);

const CHANGES: Need = Need(Cap::NetAdmin, "interfaces, qdiscs and filters cannot be changed");
const MAPS: Need = Need(Cap::Bpf, "programs and maps cannot be made or opened");
const POINTERS: Need = Need(Cap::Perfmon, "the kernel refuses programs that compare pointers, as these do");
const MEMORY: Need = Need(Cap::SysResource, "maps need more locked memory than the limit, before Linux 5.11");
const PINS: Need = Need(Cap::DacOverride, "the pins, which are root's, cannot be opened");
const ENTER: Need = Need(Cap::SysAdmin, "other namespaces cannot be entered");
const FIND: Need = Need(Cap::SysPtrace, "the namespaces of other processes cannot be told");
const MOUNT: Need = Need(Cap::SysAdmin, "bpffs cannot be mounted");
const SANDBOX: Need = Need(Cap::SysAdmin, "the sandbox's namespaces cannot be made");
const PING: Need = Need(Cap::NetRaw, "ping may not send, and every remote of --probe icmp would look down");

/// Bits of capabilities, as /proc tells them.
#[derive(Clone, Copy, Debug, Default)]
struct Rights {
    user: u32,
    effective: u64,
    /// What the programs that we start have, where we are not user 0.
    ambient: u64,
    /// In a user namespace of our own, where capabilities are over nothing of the machine.
    is_apart: bool,
}

static RIGHTS: LazyLock<Rights> = LazyLock::new(|| {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bits = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or_default()
    };
    // The first user namespace has this inode in every kernel.
    let is_apart = fs::read_link("/proc/self/ns/user").is_ok_and(|at| at.as_os_str() != "user:[4026531837]");
    Rights { user: geteuid().as_raw(), effective: bits("CapEff:"), ambient: bits("CapAmb:"), is_apart }
});

impl Rights {
    /// The bits that the tools have: they do the work.
    fn usable(&self) -> u64 {
        match (self.is_apart, self.user) {
            (true, _) => 0,
            (false, 0) => self.effective,
            (false, _) => self.effective & self.ambient,
        }
    }

    fn has(&self, cap: Cap) -> bool {
        let has = |cap: Cap| self.usable() & (1 << cap as u32) != 0;
        // As before Linux 5.8, where it was all of these.
        has(cap) || (matches!(cap, Cap::Bpf | Cap::Perfmon) && has(Cap::SysAdmin))
    }

    /// Why this process may not do what needs these, or nothing; `line` is what was typed after `snifctl`.
    fn lack(&self, needs: &[Need], line: &str) -> Option<Lack> {
        let lacking: Vec<&Need> = needs.iter().filter(|need| !self.has(need.0)).collect();
        if lacking.is_empty() {
            return None;
        }
        let (detail, fix) = if self.is_apart {
            let detail = "the capabilities of a user namespace of its own, as a rootless container has it, are not over the \
                          machine's interfaces: this must run outside of it";
            (detail.into(), format!("sudo snifctl {line}"))
        } else if self.user != 0 && self.effective & !self.ambient != 0 {
            let caps: Vec<String> = lacking.iter().map(|need| format!("+{}", need.0.name().to_lowercase())).collect();
            let (user, caps) = (self.user, caps.join(","));
            let detail = "the tools that do the work inherit ambient capabilities, not those of a file".into();
            (detail, format!("sudo setpriv --reuid {user} --inh-caps {caps} --ambient-caps {caps} snifctl {line}"))
        } else if self.user != 0 && self.usable() == 0 {
            let detail = "this needs root, to load BPF programs and change interfaces".into();
            (detail, format!("sudo snifctl {line}"))
        } else {
            let what = lacking.iter().map(|need| format!("CAP_{} is missing: {}", need.0.name(), need.1));
            let caps: Vec<Cap> = lacking.iter().map(|need| need.0).collect();
            let fix = if self.user == 0 { added(&caps) } else { format!("sudo snifctl {line}") };
            (what.collect::<Vec<_>>().join("; "), fix)
        };
        Some(Lack { detail, fix, is_fatal: true })
    }
}

/// What this process may not do, and what would work.
#[derive(Debug)]
pub(crate) struct Lack {
    pub detail: String,
    pub fix: String,
    /// No session can be made.
    pub is_fatal: bool,
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; try: {}", self.detail, self.fix)
    }
}

impl std::error::Error for Lack {}

/// What gives these to a container.
fn added(caps: &[Cap]) -> String {
    let words = caps.iter().map(|cap| format!(" --cap-add {}", cap.name()));
    format!("docker run{}", words.collect::<String>())
}

fn line() -> String {
    std::env::args_os().skip(1).map(|arg| quote(&arg.to_string_lossy())).collect::<Vec<_>>().join(" ")
}

fn ensure(needs: &[Need]) -> Result<()> {
    // For the test that what is asked for is what the kernel wants, and what is compiled for guests. Not in a release build.
    let is_test = cfg!(debug_assertions) || option_env!("SNIFCTL_GUEST").is_some();
    if is_test && std::env::var_os("SNIFCTL_UNCHECKED").is_some() {
        return Ok(());
    }
    RIGHTS.lack(needs, &line()).map_or(Ok(()), |lack| Err(lack.into()))
}

/// What pins are made by, whatever capabilities there are.
pub(crate) fn ensure_owner() -> Result<()> {
    match RIGHTS.user {
        0 => Ok(()),
        user => bail!("pins must be root's, and what user {user} makes is not; try: sudo snifctl {}", line()),
    }
}

fn of_writers() -> Vec<Need> {
    let is_limited = getrlimit(Resource::Memlock).maximum.is_some() && kernel::locks_maps();
    [CHANGES, MAPS, POINTERS].into_iter().chain(is_limited.then_some(MEMORY)).collect()
}

fn of_readers() -> Vec<Need> {
    let pins = (RIGHTS.user != 0).then_some(PINS);
    pins.into_iter().chain(kernel::keeps_pins_from_others().then_some(MAPS)).collect()
}

/// To make sessions and change them.
pub(crate) fn to_write() -> Result<()> {
    if RIGHTS.effective != 0 {
        ensure_owner()?;
    }
    ensure(&of_writers())
}

/// To take them away.
pub(crate) fn to_remove() -> Result<()> {
    ensure(&[CHANGES].into_iter().chain(of_readers()).collect::<Vec<_>>())
}

/// To look at them. What it may need besides is told where a map cannot be read: see [`explained`].
pub(crate) fn to_read() -> Result<()> {
    ensure(&of_readers())
}

pub(crate) fn may_read() -> bool {
    RIGHTS.lack(&of_readers(), "").is_none()
}

/// For taps in network namespaces that have names.
pub(crate) fn to_enter() -> Result<()> {
    ensure(&[ENTER])
}

/// For taps in the network namespaces of processes, containers, pods.
pub(crate) fn for_namespaces() -> Result<()> {
    ensure(&[ENTER, FIND])
}

/// For a sandbox of namespaces.
pub(crate) fn for_sandbox() -> Result<()> {
    to_write()?;
    ensure(&[SANDBOX])
}

pub(crate) fn to_mount() -> Result<()> {
    ensure(&[MOUNT])
}

/// For ping, which needs no capability where the group may use its own sockets; a file with capabilities cannot even be run
/// without them.
pub(crate) fn for_ping(runner: &Runner) -> Result<()> {
    let is_open = fs::read_to_string("/proc/sys/net/ipv4/ping_group_range").is_ok_and(|range| {
        let ends: Vec<u32> = range.split_whitespace().filter_map(|end| end.parse().ok()).collect();
        let group = rustix::process::getegid().as_raw();
        matches!(ends[..], [first, last] if (first..=last).contains(&group))
    });
    let quiet = Runner { verbose: false, ..*runner };
    match is_open && quiet.read(&Cmd::new("ping", ["-V"])).is_ok() {
        true => Ok(()),
        false => ensure(&[PING]),
    }
}

/// Can bpftool read maps whose fields the kernel knows by names?
pub(crate) fn reads_typed_maps() -> bool {
    RIGHTS.has(Cap::SysAdmin)
}

/// Are maps to be made without the names of their fields, so that we can read them?
pub(crate) fn needs_plain_maps() -> bool {
    RIGHTS.user == 0 && !reads_typed_maps()
}

/// Can we enter the mount namespace of who has started us?
pub(crate) fn enters_mounts() -> bool {
    reads_typed_maps()
}

/// A failure of bpftool for want of a capability, as one that names it.
pub(crate) fn explained(err: Error) -> Error {
    let Some(failed) = err.downcast_ref::<Failed>().filter(|_| !reads_typed_maps()) else { return err };
    let what = if failed.stderr.contains("failed to get btf") {
        "what was made with it has maps that bpftool reads with it alone"
    } else if failed.stderr.contains("by id") && failed.stderr.contains("Operation not permitted") {
        "what has lost its pin can only be found with it"
    } else {
        return err;
    };
    Lack { detail: format!("CAP_SYS_ADMIN is missing: {what}"), fix: added(&[Cap::SysAdmin]), is_fatal: false }.into()
}

/// tcpdump, started as user 0, becomes another user before it reads a capture.
pub(crate) fn of_tcpdump(said: &str) -> Error {
    let why = "tcpdump gives up being root before it reads";
    let detail = format!("CAP_SETUID or CAP_SETGID is missing: {why} ({said})");
    Lack { detail, fix: added(&[Cap::SetUid, Cap::SetGid]), is_fatal: false }.into()
}

/// What `doctor` tells: what this process may do, or not.
pub(crate) fn summary() -> Result<String, Lack> {
    if RIGHTS.user != 0 && RIGHTS.usable() != 0 {
        let detail = format!("what user {} pins is not root's: it can only look, and take down", RIGHTS.user);
        return Err(Lack { detail, fix: format!("sudo snifctl {}", line()), is_fatal: false });
    }
    if let Some(lack) = RIGHTS.lack(&of_writers(), &line()) {
        return Err(lack);
    }
    let less = [ENTER, FIND].into_iter().filter(|need| !RIGHTS.has(need.0)).map(|need| need.0);
    match less.collect::<Vec<Cap>>() {
        less if less.is_empty() => Ok("root, with all capabilities that are needed".into()),
        less => {
            let names: Vec<String> = less.iter().map(|cap| format!("CAP_{}", cap.name())).collect();
            let detail = format!("root without {}: no taps in other namespaces", names.join(" and "));
            Err(Lack { detail, fix: added(&less), is_fatal: false })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITE: [Need; 3] = [CHANGES, MAPS, POINTERS];

    fn rights(user: u32, effective: &[Cap], ambient: &[Cap]) -> Rights {
        let bits = |caps: &[Cap]| caps.iter().fold(0, |bits, cap| bits | 1 << *cap as u32);
        Rights { user, effective: bits(effective), ambient: bits(ambient), is_apart: false }
    }

    #[test]
    fn every_capability_that_is_missing_is_named() {
        let said = |rights: Rights| rights.lack(&WRITE, "down --all").map(|lack| lack.to_string()).unwrap_or_default();
        let all = [Cap::NetAdmin, Cap::Bpf, Cap::Perfmon];
        for enough in [&all[..], &[Cap::NetAdmin, Cap::SysAdmin]] {
            assert_eq!(said(rights(0, enough, &[])), "");
            assert_eq!(said(rights(7, enough, enough)), "");
        }
        let two = said(rights(0, &[Cap::Bpf], &[]));
        assert!(two.starts_with("CAP_NET_ADMIN is missing: ") && two.contains("; CAP_PERFMON is missing: "), "{two}");
        assert!(two.ends_with("; try: docker run --cap-add NET_ADMIN --cap-add PERFMON"), "{two}");
        let nobody = said(rights(7, &[], &[]));
        assert!(nobody.ends_with("; try: sudo snifctl down --all"), "{nobody}");
        let by_file = said(rights(7, &all, &[]));
        assert!(by_file.contains("--ambient-caps +net_admin,+bpf,+perfmon snifctl down --all"), "{by_file}");
        let apart = said(Rights { is_apart: true, ..rights(0, &all, &[]) });
        assert!(apart.starts_with("the capabilities of a user namespace"), "{apart}");
    }
}
