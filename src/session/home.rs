//! Where a session lives: its pins in bpffs, keyed by network namespace, since bpffs is shared by namespaces while
//! interfaces are not. No other state exists.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::request::{DEFAULT, listed};
use crate::tools::exec::{Cmd, Runner};

const BPFFS: &str = "/sys/fs/bpf";
const ROOT: &str = "/sys/fs/bpf/snifctl";
/// Directory of one empty directory per interface whose clsact qdisc is ours. '_' is in no session's name.
const CLSACT: &str = "_clsact";
/// Prefix of a session that is being made, and of programs that are being loaded for one.
const BUILDING: &str = "_new_";
/// Prefix of a session that is being taken down.
const ENDING: &str = "_old_";

/// Prefix of a filter that a process, whose id follows, is testing.
const TESTING: &str = "_test_";

/// Beginning of the relay's link alias; the session's name follows.
pub(crate) const ALIAS: &str = "snifctl:";

/// The sessions of this network namespace.
#[derive(Clone, Debug)]
pub(crate) struct Home {
    dir: PathBuf,
}

/// Held while sessions are read (shared) or written (exclusive). The kernel lets go of it when we end, however we end.
#[derive(Debug)]
pub(crate) struct Lock(#[allow(dead_code)] File);

impl Home {
    pub(crate) fn here() -> Result<Home> {
        let inode = fs::metadata("/proc/self/ns/net").context("cannot tell the network namespace")?.ino();
        Ok(Home { dir: Path::new(ROOT).join(inode.to_string()) })
    }

    /// The pins of a session.
    pub(crate) fn session(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Where a session is put together before it is renamed into place.
    pub(crate) fn building(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{BUILDING}{name}"))
    }

    /// Where a session is while it is taken down.
    pub(crate) fn ending(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{ENDING}{name}"))
    }

    /// The directory itself.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where this process pins a filter that it tests.
    pub(crate) fn test_pin(&self) -> PathBuf {
        self.dir.join(format!("{TESTING}{}", std::process::id()))
    }

    /// Removes what tests that were killed have left.
    pub(crate) fn remove_stale_tests(&self) {
        for name in entries(&self.dir) {
            let stale = |pid: &str| !Path::new("/proc").join(pid).exists();
            if name.strip_prefix(TESTING).is_some_and(stale) {
                let _ = fs::remove_file(self.dir.join(name));
            }
        }
    }

    /// Marks the clsact qdisc of an interface as ours, so that `down` knows whether to remove it.
    pub(crate) fn clsact_mark(&self, ifindex: u32) -> PathBuf {
        self.dir.join(CLSACT).join(ifindex.to_string())
    }

    /// The ifindexes whose clsact qdisc we have added.
    pub(crate) fn clsact_marks(&self) -> Vec<u32> {
        entries(&self.dir.join(CLSACT)).iter().filter_map(|name| name.parse().ok()).collect()
    }

    /// Names of the sessions that are up.
    pub(crate) fn sessions(&self) -> Vec<String> {
        entries(&self.dir).into_iter().filter(|name| !name.starts_with('_')).collect()
    }

    /// Names of those that were left half made, or half taken down.
    pub(crate) fn halves(&self) -> Vec<String> {
        let half = |entry: &String| entry.strip_prefix(BUILDING).or(entry.strip_prefix(ENDING)).map(String::from);
        entries(&self.dir).iter().filter_map(half).collect()
    }

    fn create(&self, runner: &Runner) -> Result<()> {
        ensure_bpffs(runner)?;
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.dir);
        made.with_context(|| format!("cannot make {}", self.dir.display()))
    }

    /// The lines that do the same, for a dry run.
    pub(crate) fn lines_to_tidy(&self) -> Vec<String> {
        let dirs = [self.dir.join(CLSACT), self.dir.clone(), PathBuf::from(ROOT)];
        let there = dirs.iter().filter(|dir| dir.is_dir());
        there.map(|dir| format!("rmdir --ignore-fail-on-non-empty {}", dir.display())).collect()
    }

    /// Removes what is empty: the directory of this namespace, and the one of all.
    pub(crate) fn remove_if_empty(&self) {
        for dir in [&self.dir.join(CLSACT), &self.dir, Path::new(ROOT)] {
            let _ = fs::remove_dir(dir);
        }
    }

    /// Waits for the lock, making the directory where it is not, and mounting bpffs. The directory may be removed by who
    /// held the lock before us: then it is made and taken again.
    pub(crate) fn lock_to_write(&self, runner: &Runner, wait: Wait) -> Result<Lock> {
        loop {
            self.create(runner)?;
            let Some(file) = open(&self.dir)? else { continue };
            wait.until(|| file.try_lock(), &file)?;
            if is_same(&file, &self.dir) {
                return Ok(Lock(file));
            }
        }
    }

    /// A shared lock, or `None` where there is no session to read.
    pub(crate) fn lock_to_read(&self, wait: Wait) -> Result<Option<Lock>> {
        let Some(file) = open(&self.dir)? else { return Ok(None) };
        wait.until(|| file.try_lock_shared(), &file)?;
        Ok(is_same(&file, &self.dir).then_some(Lock(file)))
    }
}

/// How long to wait for the lock; for ever without a number.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wait(pub Option<Duration>);

/// After so long it is said who is waited for.
const SILENCE: Duration = Duration::from_secs(1);

impl Wait {
    fn until(self, lock: impl Fn() -> Result<(), TryLockError>, file: &File) -> Result<()> {
        let (start, mut said) = (Instant::now(), false);
        loop {
            match lock() {
                Ok(()) => return Ok(()),
                Err(TryLockError::Error(err)) => return Err(err).context("cannot lock the sessions"),
                Err(TryLockError::WouldBlock) => {}
            }
            let waited = start.elapsed();
            if self.0.is_some_and(|most| waited >= most) {
                bail!(
                    "another snifctl{} has been at work for {} s; try again, or wait longer with: --wait 60",
                    holder(file),
                    waited.as_secs()
                );
            }
            if waited >= SILENCE && !said {
                eprintln!("snifctl: waiting for another snifctl{}; --wait SECONDS says how long", holder(file));
                said = true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// ` (process 17)`: who holds the lock, as /proc/locks tells it.
fn holder(file: &File) -> String {
    let inode = file.metadata().map_or(0, |meta| meta.ino());
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let of = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let pid = words.get(4).filter(|_| words.get(1) == Some(&"FLOCK"))?;
        let at = words.get(5)?.rsplit(':').next()?;
        (at == inode.to_string() && *pid != "0").then(|| format!(" (process {pid})"))
    };
    locks.lines().find_map(of).unwrap_or_default()
}

/// The key of a session's filters, from its name (FNV-1a): `down` finds them even where the pins are gone.
pub(crate) fn handle(name: &str) -> u32 {
    let hash = name.bytes().fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    hash.max(1)
}

/// The session that a command without `--name` means: the only one, or the one called `default`.
pub(crate) fn chosen(home: &Home, name: Option<&str>) -> Result<String> {
    let names = home.sessions();
    match (names.as_slice(), name) {
        ([], name) => {
            let which = name.map_or_else(String::new, |name| format!(" {name}"));
            bail!("no session{which} is up; start one with: snifctl up IFACE --tunnel gre --remote ADDR")
        }
        ([only], None) => Ok(only.clone()),
        (names, name) => {
            let name = name.unwrap_or(DEFAULT);
            let others = listed(names.iter().map(|name| format!("--name {name}")));
            ensure!(names.iter().any(|known| known == name), "no session {name} is up; choose one with: {others}");
            Ok(name.to_string())
        }
    }
}

fn open(dir: &Path) -> Result<Option<File>> {
    match File::open(dir) {
        Ok(file) => Ok(Some(file)),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(err) => Err(err).with_context(|| format!("cannot open {}", dir.display())),
    }
}

fn is_same(file: &File, path: &Path) -> bool {
    let identity = |meta: &fs::Metadata| (meta.dev(), meta.ino());
    matches!((&file.metadata(), &fs::metadata(path)), (Ok(a), Ok(b)) if identity(a) == identity(b))
}

fn entries(dir: &Path) -> Vec<String> {
    let Ok(found) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut names: Vec<String> = found.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// Is bpffs mounted where the tools expect it?
pub(crate) fn bpffs_is_mounted() -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next() == Some(BPFFS) && fields.next() == Some("bpf")
    })
}

pub(crate) fn ensure_bpffs(runner: &Runner) -> Result<()> {
    if bpffs_is_mounted() {
        return Ok(());
    }
    let mounted = runner.write(&Cmd::new("mount", ["-t", "bpf", "bpf", BPFFS]));
    mounted.map(drop).with_context(|| format!("{BPFFS} is not mounted and cannot be; try: mount -t bpf bpf {BPFFS}"))
}

/// Refuses anyone who may not load programs and change interfaces.
pub(crate) fn ensure_root() -> Result<()> {
    if is_root() {
        return Ok(());
    }
    let line: Vec<String> =
        std::env::args_os().skip(1).map(|arg| crate::tools::exec::quote(&arg.to_string_lossy())).collect();
    bail!("this needs root, to load BPF programs and change interfaces; try: sudo snifctl {}", line.join(" "))
}

/// The effective user, as the owner of our own /proc entry.
pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}
