//! Where a session lives: its pins in bpffs, keyed by network namespace, since bpffs is shared by namespaces while
//! interfaces are not. No other state exists.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::request::{DEFAULT, listed};
use crate::session::alive::PIN;
use crate::tools::exec::{Cmd, Runner};
use crate::tools::interrupt;
use crate::tools::rights;

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
    /// What lies there is of a namespace that had our inode before, and is dead.
    pub is_void: bool,
}

/// Held while sessions are read (shared) or written (exclusive). The kernel lets go of it when we end, however we end.
#[derive(Debug)]
pub(crate) struct Lock(#[allow(dead_code)] File);

impl Home {
    pub(crate) fn here() -> Result<Home> {
        let inode = fs::metadata("/proc/self/ns/net").context("cannot tell the network namespace")?.ino();
        Ok(Home { dir: Path::new(ROOT).join(inode.to_string()), is_void: false })
    }

    /// Of another network namespace, by its directory.
    pub(super) fn of(dir: &Path) -> Home {
        Home { dir: dir.into(), is_void: false }
    }

    /// A session by a name that no other one has that lives, in whatever namespace: for what it has elsewhere.
    pub(crate) fn mark(&self, session: &str) -> String {
        mark(&self.session(session))
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

    /// Is this directory of a session there, and of this namespace?
    pub(crate) fn has(&self, dir: &Path) -> bool {
        !self.is_void && dir.is_dir()
    }

    /// What lies in the directory, if it is of this namespace.
    fn entries(&self) -> Vec<String> {
        if self.is_void { Vec::new() } else { entries(&self.dir) }
    }

    /// The directories of other namespaces.
    pub(crate) fn others(&self) -> Vec<PathBuf> {
        let all = entries(Path::new(ROOT)).into_iter().filter(|name| name.parse::<u64>().is_ok());
        all.map(|name| Path::new(ROOT).join(name)).filter(|dir| *dir != self.dir).collect()
    }

    /// Where all sessions of all namespaces are.
    pub(crate) fn root() -> &'static Path {
        Path::new(ROOT)
    }

    /// The session that an entry of a directory belongs to, whole or half a one.
    pub(crate) fn named_by(entry: &str) -> String {
        entry.strip_prefix(BUILDING).or(entry.strip_prefix(ENDING)).unwrap_or(entry).into()
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
        if self.is_void {
            return Vec::new();
        }
        entries(&self.dir.join(CLSACT)).iter().filter_map(|name| name.parse().ok()).collect()
    }

    /// Names of the sessions that are up.
    pub(crate) fn sessions(&self) -> Vec<String> {
        self.entries().into_iter().filter(|name| !name.starts_with('_')).collect()
    }

    /// Names of those that were left half made, or half taken down.
    pub(crate) fn halves(&self) -> Vec<String> {
        let half = |entry: &String| entry.strip_prefix(BUILDING).or(entry.strip_prefix(ENDING)).map(String::from);
        self.entries().iter().filter_map(half).collect()
    }

    fn create(&self, runner: &Runner) -> Result<()> {
        ensure_bpffs(runner)?;
        ensure_roots(Path::new(BPFFS))?;
        for dir in [Path::new(ROOT), &self.dir] {
            if !dir.exists() {
                rights::ensure_owner()?;
            }
            let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
            made.with_context(|| format!("cannot make {}", dir.display()))?;
            ensure_roots(dir)?;
        }
        Ok(())
    }

    /// Refuses what anyone but root may have made or changed: all on the way to the sessions, and they themselves.
    pub(crate) fn ensure_trusted(&self) -> Result<()> {
        [Path::new(BPFFS), Path::new(ROOT), &self.dir].into_iter().try_for_each(ensure_roots)?;
        let all = entries(&self.dir).into_iter().map(|name| self.dir.join(name));
        all.filter(|path| !path.is_file()).try_for_each(|path| ensure_roots(&path))
    }

    /// The lines that do what [`Home::remove_if_empty`] does once these sessions are gone, for a dry run.
    pub(crate) fn lines_to_tidy(&self, gone: &[String]) -> Vec<String> {
        let dirs = [self.dir.join(CLSACT), self.dir.clone(), PathBuf::from(ROOT)];
        let there = dirs.iter().filter(|dir| dir.is_dir());
        let tidy = there.map(|dir| format!("rmdir --ignore-fail-on-non-empty {}", dir.display()));
        let stays = self.sessions().iter().chain(&self.halves()).any(|name| !gone.contains(name));
        let alive = self.dir.join(PIN);
        let last = (!stays && alive.exists()).then(|| format!("rm {}", alive.display()));
        last.into_iter().chain(tidy).collect()
    }

    /// Removes what is empty: the directory of this namespace, and the one of all. Only under the lock.
    pub(crate) fn remove_if_empty(&self) {
        let _ = fs::remove_dir(self.dir.join(CLSACT));
        if entries(&self.dir) == [PIN] {
            let _ = fs::remove_file(self.dir.join(PIN));
        }
        for dir in [&self.dir, Path::new(ROOT)] {
            let _ = fs::remove_dir(dir);
        }
    }

    /// The same without the lock: where someone holds it, it is left to him.
    pub(crate) fn remove_if_unused(&self) {
        let lock = Home::try_lock(&self.dir);
        if lock.is_some() {
            self.remove_if_empty();
        }
    }

    /// The lock of a directory, if nobody has it.
    pub(crate) fn try_lock(dir: &Path) -> Option<Lock> {
        let file = open(dir).ok()??;
        file.try_lock().ok()?;
        is_same(&file, dir).then_some(Lock(file))
    }

    /// Waits for the lock, making the directory where it is not, and mounting bpffs. The directory may be removed by who
    /// held the lock before us: then it is made and taken again.
    pub(crate) fn lock_to_write(&self, runner: &Runner, wait: Wait) -> Result<Lock> {
        loop {
            self.create(runner)?;
            let Some(file) = open(&self.dir)? else { continue };
            wait.until(|| file.try_lock(), &file, &self.dir)?;
            if is_same(&file, &self.dir) {
                self.ensure_trusted()?;
                // Our tools hold it too: were we killed, the last of them would still be at work.
                rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).context("cannot lock the sessions")?;
                return Ok(Lock(file));
            }
        }
    }

    /// A shared lock, or `None` where there is no session to read.
    pub(crate) fn lock_to_read(&self, wait: Wait) -> Result<Option<Lock>> {
        self.ensure_trusted()?;
        let Some(file) = open(&self.dir)? else { return Ok(None) };
        wait.until(|| file.try_lock_shared(), &file, &self.dir)?;
        Ok(is_same(&file, &self.dir).then_some(Lock(file)))
    }
}

/// How long to wait for the lock; for ever without a number.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wait(pub Option<Duration>);

/// After so long it is said who is waited for.
const SILENCE: Duration = Duration::from_secs(1);

impl Wait {
    fn until(self, lock: impl Fn() -> Result<(), TryLockError>, file: &File, dir: &Path) -> Result<()> {
        let (start, mut said, mut told_stopped) = (Instant::now(), Duration::ZERO, false);
        loop {
            match lock() {
                Ok(()) => return Ok(()),
                Err(TryLockError::Error(err)) => return Err(err).context("cannot lock the sessions"),
                Err(TryLockError::WouldBlock) => interrupt::check()?,
            }
            let waited = start.elapsed();
            if self.0.is_some_and(|most| waited >= most) {
                bail!(Holder::of(file, dir).refusal(waited.as_secs()));
            }
            if waited >= said + SILENCE {
                let holder = Holder::of(file, dir);
                let is_stopped = holder.stopped.is_some();
                if said.is_zero() || (is_stopped && !told_stopped) {
                    eprintln!("snifctl: {}", holder.notice());
                }
                (said, told_stopped) = (waited, told_stopped || is_stopped);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Who holds the lock.
#[derive(Debug, Default)]
struct Holder {
    pid: Option<u32>,
    /// What a snifctl that was killed has started, by its name.
    orphan: Option<String>,
    /// The process that does not go on.
    stopped: Option<u32>,
}

impl Holder {
    /// As /proc/locks tells it. That is who took it: where it is gone, somebody that it has started has it.
    fn of(file: &File, dir: &Path) -> Holder {
        let inode = file.metadata().map_or(0, |meta| meta.ino());
        let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
        let taker = locks.lines().filter_map(|line| holds(line, inode)).find(|pid| *pid != 0);
        let taker = taker.filter(|pid| state(*pid).is_some_and(|state| state != 'Z' && state != 'X'));
        let heirs = if taker.is_none() { heirs(dir, inode) } else { Vec::new() };
        let pid = taker.or(heirs.first().copied());
        let name = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).map(|name| name.trim().to_string()).ok();
        let stopped = pid.filter(|pid| state(*pid).is_some_and(|state| matches!(state, 'T' | 't')));
        Holder { pid, orphan: heirs.first().and_then(name), stopped }
    }

    fn who(&self) -> String {
        match (self.pid, &self.orphan) {
            (Some(pid), Some(name)) => format!("what a killed snifctl has left at work ({name}, process {pid})"),
            (Some(pid), None) => format!("another snifctl (process {pid})"),
            (None, _) => "another snifctl".into(),
        }
    }

    fn notice(&self) -> String {
        match self.stopped {
            Some(pid) => format!("waiting for {}, which is stopped; let it go on with: kill -CONT {pid}", self.who()),
            None => format!("waiting for {}; --wait SECONDS says how long", self.who()),
        }
    }

    fn refusal(&self, seconds: u64) -> String {
        match self.stopped {
            Some(pid) => {
                format!("{} is stopped and keeps others waiting; let it go on with: kill -CONT {pid}", self.who())
            }
            None => {
                format!("{} has been at work for {seconds} s; try again, or wait longer with: --wait 60", self.who())
            }
        }
    }
}

/// The process in a line that tells of a lock on this inode: `1: FLOCK  ADVISORY  WRITE 17 00:1a:42 0 EOF`.
fn holds(line: &str, inode: u64) -> Option<u32> {
    let words: Vec<&str> = line.split_whitespace().skip_while(|word| word.ends_with(':')).collect();
    let at = words.get(4).filter(|_| words.first() == Some(&"FLOCK"))?;
    (at.rsplit(':').next()? == inode.to_string()).then(|| words[3].parse().unwrap_or(0))
}

/// The processes that have the lock's own descriptor open, not merely one of the same directory, as those that wait have.
fn heirs(dir: &Path, inode: u64) -> Vec<u32> {
    let pids = entries(Path::new("/proc")).into_iter().filter_map(|name| name.parse::<u32>().ok());
    let has = |pid: &u32| {
        let proc = Path::new("/proc").join(pid.to_string());
        let of_dir = |fd: &String| fs::read_link(proc.join("fd").join(fd)).is_ok_and(|at| at.starts_with(dir));
        let locks = |fd: String| fs::read_to_string(proc.join("fdinfo").join(fd)).unwrap_or_default();
        let fds = entries(&proc.join("fd")).into_iter().filter(of_dir);
        fds.map(locks).any(|text| text.lines().any(|line| holds(line, inode).is_some()))
    };
    pids.filter(has).collect()
}

/// The state of a process, as `T` for one that is stopped.
fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(") ").next()?.chars().next()
}

/// The same of a session with these pins: `default@4026532389`, by the inode of its own network namespace.
pub(super) fn mark(pins: &Path) -> String {
    let part = |path: Option<&Path>| path.and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned();
    format!("{}@{}", part(Some(pins)), part(pins.parent()))
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

/// Refuses a directory that is not root's alone. The one that bpffs is mounted at may be everybody's, as it is by default,
/// where it keeps users from each other's names.
fn ensure_roots(dir: &Path) -> Result<()> {
    let Ok(found) = fs::symlink_metadata(dir) else { return Ok(()) };
    let (place, mode) = (dir.display(), found.mode() & 0o7777);
    ensure!(found.is_dir(), "{place} is no directory, so someone else has made it; remove it with: rm {place}");
    if found.uid() != 0 {
        let help = if dir == Path::new(BPFFS) { "chown root" } else { "rm -r" };
        bail!("{place} is not root's, but user {}'s (mode {mode:04o}); put it right with: {help} {place}", found.uid());
    }
    let is_shared = dir == Path::new(BPFFS) && mode & 0o1000 != 0;
    let help = format!("put it right with: chmod {} {place}", if dir == Path::new(BPFFS) { "1777" } else { "0700" });
    ensure!(mode & 0o022 == 0 || is_shared, "{place} can be written by others than root (mode {mode:04o}); {help}");
    Ok(())
}

/// Is bpffs mounted where the tools expect it?
pub(crate) fn bpffs_is_mounted() -> bool {
    has_bpffs(Path::new("/proc/self/mounts"))
}

/// The same of the mounts that a process sees.
pub(crate) fn has_bpffs(mounts: &Path) -> bool {
    let mounts = fs::read_to_string(mounts).unwrap_or_default();
    mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next() == Some(BPFFS) && fields.next() == Some("bpf")
    })
}

pub(crate) fn ensure_bpffs(runner: &Runner) -> Result<()> {
    if bpffs_is_mounted() {
        return Ok(());
    }
    rights::to_mount()?;
    let mounted = runner.write(&Cmd::new("mount", ["-t", "bpf", "-o", "mode=0700", "bpf", BPFFS]));
    mounted
        .map(drop)
        .with_context(|| format!("{BPFFS} is not mounted and cannot be; try: mount -t bpf -o mode=0700 bpf {BPFFS}"))
}
