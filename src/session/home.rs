//! Where a session lives: its pins in bpffs, keyed by network namespace, since bpffs is shared by namespaces while
//! interfaces are not. No other state exists.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::tools::exec::{Cmd, Runner};

const BPFFS: &str = "/sys/fs/bpf";
const ROOT: &str = "/sys/fs/bpf/snifctl";
/// Directory of one empty directory per interface whose clsact qdisc is ours. '_' is in no session's name.
const CLSACT: &str = "_clsact";
/// Prefix of a session that is being made.
const BUILDING: &str = "_new_";

/// Prefix of a filter that a process, whose id follows, is testing.
const TESTING: &str = "_test_";

/// Beginning of the relay's link alias; the session's name follows.
pub const ALIAS: &str = "snifctl:";

/// The pinned programs of a session.
pub const PROGRAMS: [&str; 5] = ["snif_tap_in", "snif_tap_out", "snif_encap", "snif_wire", "snif_deliver"];

/// Those of them that are at the hooks of watched interfaces.
pub const TAPS: [&str; 2] = ["snif_tap_in", "snif_tap_out"];

/// The maps of a session that say something, by name, as they are pinned.
pub const MAPS: [&str; 13] = [
    "bucket",
    "carriers",
    "config",
    "drops",
    "outs",
    "remote_state",
    "remote_stats",
    "remotes",
    "request",
    "slots",
    "spread",
    "taps",
    "tunnels",
];

/// Those that say nothing to a person: references to devices, and working memory.
const OTHER_MAPS: [&str; 3] = ["devices", "rest", "scratch"];

/// All that are pinned.
pub const ALL_MAPS: [&str; 16] = {
    let mut all = [""; 16];
    let (shown, rest) = all.split_at_mut(MAPS.len());
    shown.copy_from_slice(&MAPS);
    rest.copy_from_slice(&OTHER_MAPS);
    all
};

/// The sessions of this network namespace.
#[derive(Clone, Debug)]
pub struct Home {
    dir: PathBuf,
}

/// Held while sessions are read (shared) or written (exclusive). The kernel lets go of it when we end, however we end.
#[derive(Debug)]
pub struct Lock(#[allow(dead_code)] File);

impl Home {
    pub fn here() -> Result<Home> {
        let inode = fs::metadata("/proc/self/ns/net").context("cannot tell the network namespace")?.ino();
        Ok(Home { dir: Path::new(ROOT).join(inode.to_string()) })
    }

    /// The pins of a session.
    pub fn session(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Where a session is put together before it is renamed into place.
    pub fn building(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{BUILDING}{name}"))
    }

    /// Where this process pins a filter that it tests.
    pub fn test_pin(&self) -> PathBuf {
        self.dir.join(format!("{TESTING}{}", std::process::id()))
    }

    /// Removes what tests that were killed have left.
    pub fn remove_stale_tests(&self) {
        for name in entries(&self.dir) {
            let stale = |pid: &str| !Path::new("/proc").join(pid).exists();
            if name.strip_prefix(TESTING).is_some_and(stale) {
                let _ = fs::remove_file(self.dir.join(name));
            }
        }
    }

    /// Marks the clsact qdisc of an interface as ours, so that `down` knows whether to remove it.
    pub fn clsact_mark(&self, ifindex: u32) -> PathBuf {
        self.dir.join(CLSACT).join(ifindex.to_string())
    }

    /// From now on the clsact qdisc of this interface is not ours, if it was.
    pub fn forget_clsact(&self, runner: &Runner, ifindex: u32) -> Result<()> {
        let mark = self.clsact_mark(ifindex);
        if !runner.dry_run && !mark.exists() {
            return Ok(());
        }
        runner.act("rm -rf", &mark, |dir| fs::remove_dir(dir))
    }

    /// The ifindexes whose clsact qdisc we have added.
    pub fn clsact_marks(&self) -> Vec<u32> {
        entries(&self.dir.join(CLSACT)).iter().filter_map(|name| name.parse().ok()).collect()
    }

    /// Names of the sessions that are up, and of those that were left half made.
    pub fn sessions(&self) -> Vec<String> {
        entries(&self.dir).into_iter().filter(|name| !name.starts_with('_')).collect()
    }

    pub fn half_made(&self) -> Vec<String> {
        entries(&self.dir).iter().filter_map(|name| name.strip_prefix(BUILDING).map(String::from)).collect()
    }

    /// Makes the directory, mounting bpffs first where it is not mounted.
    pub fn create(&self, runner: &Runner) -> Result<()> {
        ensure_bpffs(runner)?;
        if runner.dry_run || !self.dir.is_dir() {
            runner
                .act("mkdir -p -m 0700", &self.dir, |dir| DirBuilder::new().recursive(true).mode(0o700).create(dir))?;
        }
        Ok(())
    }

    /// Removes what is empty: the directory of this namespace, and the one of all.
    pub fn remove_if_empty(&self) {
        for dir in [&self.dir.join(CLSACT), &self.dir, Path::new(ROOT)] {
            let _ = fs::remove_dir(dir);
        }
    }

    /// Waits for the lock. The directory may be removed by who held it before us: then it is made and taken again.
    pub fn lock_to_write(&self, runner: &Runner) -> Result<Lock> {
        loop {
            self.create(runner)?;
            let Some(file) = open(&self.dir)? else { continue };
            file.lock().with_context(|| format!("cannot lock {}", self.dir.display()))?;
            if is_same(&file, &self.dir) {
                return Ok(Lock(file));
            }
        }
    }

    /// A shared lock, or `None` where there is no session to read.
    pub fn lock_to_read(&self) -> Result<Option<Lock>> {
        let Some(file) = open(&self.dir)? else { return Ok(None) };
        file.lock_shared().with_context(|| format!("cannot lock {}", self.dir.display()))?;
        Ok(is_same(&file, &self.dir).then_some(Lock(file)))
    }
}

/// The key of a session's filters, from its name (FNV-1a): `down` finds them even where the pins are gone.
pub fn handle(name: &str) -> u32 {
    let hash = name.bytes().fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    hash.max(1)
}

/// The session that a command without `--name` means: the only one, or the one called `default`.
pub fn chosen(home: &Home, name: Option<&str>) -> Result<String> {
    let names = home.sessions();
    match (names.as_slice(), name) {
        ([], _) => bail!("no session is up; start one with: snifctl up IFACE --tunnel gre --remote ADDR"),
        ([only], None) => Ok(only.clone()),
        (names, name) => {
            let name = name.unwrap_or("default");
            ensure!(
                names.iter().any(|known| known == name),
                "no session {name} is up; choose one with: --name {}",
                names.join(" or --name ")
            );
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
pub fn bpffs_is_mounted() -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next() == Some(BPFFS) && fields.next() == Some("bpf")
    })
}

pub fn ensure_bpffs(runner: &Runner) -> Result<()> {
    if bpffs_is_mounted() {
        return Ok(());
    }
    let mounted = runner.write(&Cmd::new("mount", ["-t", "bpf", "bpf", BPFFS]));
    mounted.map(drop).with_context(|| format!("{BPFFS} is not mounted and cannot be; try: mount -t bpf bpf {BPFFS}"))
}

/// Refuses anyone who may not load programs and change interfaces.
pub fn ensure_root() -> Result<()> {
    if is_root() {
        return Ok(());
    }
    let line: Vec<String> = std::env::args().skip(1).map(|arg| crate::tools::exec::quote(&arg)).collect();
    bail!("this needs root, to load BPF programs and change interfaces; try: sudo snifctl {}", line.join(" "))
}

/// The effective user, as the owner of our own /proc entry.
pub fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}
