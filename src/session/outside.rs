//! Where bpffs is out of sight: `ip netns exec` gives a command a mount namespace of its own with another /sys. A bpffs that
//! is mounted in there goes with the command, and its session with it. So we run again where who called us is.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use crate::session::home;
use crate::tools::exec::{self, quote};
use crate::tools::rights;

/// Runs us again where bpffs is or belongs, if that is outside. Once there, nothing is out of sight any more.
pub(crate) fn enter() -> Result<()> {
    if home::bpffs_is_mounted() || !rights::enters_mounts() {
        return Ok(());
    }
    let Some(process) = outside() else { return Ok(()) };
    let program = PathBuf::from(exec::own_path()?);
    ensure!(exec::find("nsenter").is_some(), "bpffs is out of sight here, and nsenter is not installed; {}", help());
    let theirs = process.join("root").join(program.strip_prefix("/").unwrap_or(&program));
    let is_there = is_same(Path::new("/proc/self/exe"), &theirs);
    ensure!(is_there, "bpffs is out of sight here, and so is {} where it is not; {}", program.display(), help());
    let words = [format!("--mount={}", process.join("ns/mnt").display()), "--wd=.".into(), "--".into()].map(Into::into);
    let all = words.into_iter().chain([program.into_os_string()]).chain(std::env::args_os().skip(1));
    exec::replace_by("nsenter", all).map(drop)
}

/// Whoever has started us, from the nearest on, as far as we may look: the first with another mount namespace over the same
/// files, if that has bpffs, or the last, where it can be mounted. A container has other files.
fn outside() -> Option<PathBuf> {
    let ours = fs::read_link("/proc/self/ns/mnt").ok()?;
    let is_outside = |process: &PathBuf| {
        let other = fs::read_link(process.join("ns/mnt")).is_ok_and(|theirs| theirs != ours);
        other && is_same(Path::new("/"), &process.join("root/"))
    };
    let all: Vec<PathBuf> = ancestors().into_iter().filter(is_outside).collect();
    let has_bpffs = |process: &&PathBuf| home::has_bpffs(&process.join("mounts"));
    all.iter().find(has_bpffs).or(all.last()).cloned()
}

/// The directories in /proc of our parent, its parent, and so on.
fn ancestors() -> Vec<PathBuf> {
    let parent = |process: &PathBuf| {
        let status = fs::read_to_string(process.join("status")).ok()?;
        let pid: u32 = status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()?;
        (pid != 0).then(|| Path::new("/proc").join(pid.to_string()))
    };
    std::iter::successors(Some(PathBuf::from("/proc/self")), parent).skip(1).collect()
}

fn is_same(one: &Path, other: &Path) -> bool {
    matches!((fs::metadata(one), fs::metadata(other)), (Ok(one), Ok(other)) if same(&one, &other))
}

fn same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// The line that works.
fn help() -> String {
    let is_ours = |path: &PathBuf| is_same(Path::new("/proc/self/ns/net"), path);
    let named = fs::read_dir("/run/netns").into_iter().flatten().flatten().map(|entry| entry.path()).find(is_ours);
    let path = named.unwrap_or_else(|| PathBuf::from("/run/netns/NAME"));
    let line: Vec<String> = std::env::args_os().skip(1).map(|arg| quote(&arg.to_string_lossy())).collect();
    format!("try: nsenter --net={} snifctl {}", path.display(), line.join(" "))
}
