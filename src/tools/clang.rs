//! From the C that is built into this binary to an object file, by clang; kept for the next time by content.

use std::fs::{self, DirBuilder};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::commands::doctor;
use crate::tools::exec::{Cmd, Failed, Runner, Running, print};
use crate::tools::kernel;

/// The sources by file name: the datapath, its taps alone and a filter alone, and what they include.
const FILES: [(&str, &str); 8] = [
    (DATAPATH, include_str!("../../bpf/snifctl.bpf.c")),
    (TAPS, include_str!("../../bpf/taps.bpf.c")),
    (MATCHER, include_str!("../../bpf/match.bpf.c")),
    ("tap.h", include_str!("../../bpf/tap.h")),
    ("relay.h", include_str!("../../bpf/relay.h")),
    ("common.h", include_str!("../../bpf/common.h")),
    ("snifctl.h", include_str!("../../bpf/snifctl.h")),
    ("classic.h", include_str!("../../bpf/classic.h")),
];
const DATAPATH: &str = "snifctl.bpf.c";
const TAPS: &str = "taps.bpf.c";
const MATCHER: &str = "match.bpf.c";
/// Where a translated filter goes; without it every packet is taken.
const FILTER: &str = "expression.h";

/// Compiled objects, by content. Root's alone: what lies here is loaded into the kernel.
pub const CACHE: &str = "/var/cache/snifctl";
/// How many of them are kept.
const CACHED: usize = 100;

const FLAGS: [&str; 8] = ["-O2", "-g", "-Wall", "-Werror", "-target", "bpf", "-mcpu=v3", "-c"];

/// A program to compile, with the C of its filter if it has one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    main: &'static str,
    filter: Option<String>,
    /// What is left out: names of `bpf/common.h` without their `HAS_`.
    without: Vec<&'static str>,
}

impl Source {
    /// A session's programs.
    pub fn datapath(filter: Option<String>, without: Vec<&'static str>) -> Source {
        Source { main: DATAPATH, filter, without }
    }

    /// The taps of a running session, whatever it does besides.
    pub fn taps(filter: Option<String>) -> Source {
        Source { main: TAPS, filter, without: Vec::new() }
    }

    /// One program that says whether a packet passes the filter.
    pub fn matcher(filter: String) -> Source {
        Source { main: MATCHER, filter: Some(filter), without: Vec::new() }
    }

    /// Writes the sources into `dir`, so that the commands of a dry run can be followed by hand.
    pub fn write(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let filter = self.filter.as_ref().map(|text| (FILTER, text.as_str()));
        for (name, text) in FILES.into_iter().chain(filter) {
            fs::write(dir.join(name), text).with_context(|| format!("cannot write into {}", dir.display()))?;
        }
        Ok(())
    }

    fn cached(&self) -> PathBuf {
        let mut hasher = DefaultHasher::new();
        (self, FILES, FLAGS, kernel_flag(), include_dir()).hash(&mut hasher);
        Path::new(CACHE).join(format!("{:016x}.o", hasher.finish()))
    }

    /// Starts clang where the cache has no object, and looks meanwhile whether the tools are there. What goes wrong with
    /// clang itself is told by [`Compiling::object`].
    pub fn begin(self, runner: &Runner) -> Result<Compiling> {
        let cached = self.cached();
        let is_compiled = is_trusted(&cached);
        let job = (!is_compiled && !runner.dry_run).then(|| self.start(runner));
        doctor::ensure_tools(runner, is_compiled)?;
        Ok(Compiling { source: self, cached, job })
    }

    fn start(&self, runner: &Runner) -> Result<Job> {
        let dir = tempfile::Builder::new().prefix("snifctl-").tempdir().context("cannot make a temporary directory")?;
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700))?;
        self.write(dir.path())?;
        let built = dir.path().join("built.o");
        let clang = runner.start(&self.command(dir.path(), &built))?;
        Ok(Job { clang, built, _dir: dir })
    }

    fn command(&self, source: &Path, object: &Path) -> Cmd {
        let mut args: Vec<String> = FLAGS.map(String::from).to_vec();
        args.push(source.join(self.main).to_string_lossy().into_owned());
        args.extend(["-o".into(), object.to_string_lossy().into_owned()]);
        args.extend(self.without.iter().map(|what| format!("-DHAS_{what}=0")));
        args.extend(kernel_flag().map(String::from));
        args.extend(include_dir().map(|dir| format!("-I{dir}")));
        Cmd::new("clang", args)
    }
}

/// An object that clang makes, or need not make, while something else is done.
pub struct Compiling {
    source: Source,
    /// Where the object is, or will be.
    cached: PathBuf,
    job: Option<Result<Job>>,
}

/// A run of clang in a private directory, and the object that it writes there.
struct Job {
    clang: Running,
    built: PathBuf,
    _dir: TempDir,
}

impl Compiling {
    /// The object in the cache. A dry run prints the commands for it, where `words` are the options of `snifctl source`
    /// that write this source.
    pub fn object(self, runner: &Runner, words: &[&str]) -> Result<PathBuf> {
        let Compiling { source, cached, job } = self;
        if let Some(job) = job {
            job?.keep(&cached)?;
        } else if runner.dry_run && !is_trusted(&cached) {
            let dir = std::env::temp_dir().join("snifctl-source");
            let place = dir.to_string_lossy();
            let words = ["source", &place].into_iter().chain(words.iter().copied());
            print(&format!("{}\n", Cmd::new("snifctl", words)));
            print(&format!("mkdir -p -m 0755 {CACHE}\n"));
            runner.write(&source.command(&dir, &cached))?;
        }
        Ok(cached)
    }
}

impl Job {
    /// Waits for clang, and renames the object into the cache, so that no one sees half of it.
    fn keep(self, cached: &Path) -> Result<()> {
        self.clang.wait().map_err(explain)?;
        ensure_cache()?;
        let kept = tempfile::Builder::new().prefix(".new-").suffix(".o").tempfile_in(CACHE);
        let kept = kept.with_context(|| format!("cannot write into {CACHE}"))?;
        fs::copy(&self.built, kept.path()).with_context(|| format!("cannot write into {CACHE}"))?;
        fs::set_permissions(kept.path(), fs::Permissions::from_mode(0o644))?;
        kept.persist(cached).with_context(|| format!("cannot keep {}", cached.display()))?;
        ensure!(is_trusted(cached), "{} is not root's alone; try: rm -r {CACHE}", cached.display());
        forget_oldest();
        Ok(())
    }
}

/// Every filter has an object of its own, so the oldest go.
fn forget_oldest() {
    let files = fs::read_dir(CACHE).into_iter().flatten().flatten();
    let objects = files.filter(|file| file.path().extension().is_some_and(|kind| kind == "o"));
    let mut aged: Vec<_> =
        objects.filter_map(|file| Some((file.metadata().ok()?.modified().ok()?, file.path()))).collect();
    aged.sort();
    for (_, path) in aged.iter().rev().skip(CACHED) {
        let _ = fs::remove_file(path);
    }
}

/// Only a file that no one but root can have written is loaded.
fn is_trusted(path: &Path) -> bool {
    let safe = |path: &Path| fs::symlink_metadata(path).is_ok_and(|at| at.uid() == 0 && at.mode() & 0o022 == 0);
    safe(path) && path.is_file() && path.parent().is_some_and(safe)
}

/// Makes the cache, or makes it root's alone again.
fn ensure_cache() -> Result<()> {
    let cache = Path::new(CACHE);
    DirBuilder::new().recursive(true).mode(0o755).create(cache).with_context(|| format!("cannot make {CACHE}"))?;
    let owned = fs::symlink_metadata(cache).is_ok_and(|at| at.is_dir() && at.uid() == 0);
    ensure!(owned, "{CACHE} is not a directory of root's; try: rm -r {CACHE}");
    fs::set_permissions(cache, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("cannot set the mode of {CACHE}"))
}

/// What the source has to do without on an older kernel.
fn kernel_flag() -> Option<&'static str> {
    (!kernel::has_atomic_fetch()).then_some("-DNO_ATOMIC_FETCH")
}

/// Debian keeps `asm/types.h` in a directory named after the architecture.
fn include_dir() -> Option<String> {
    let dir = format!("/usr/include/{}-linux-gnu", std::env::consts::ARCH);
    Path::new(&dir).join("asm").is_dir().then_some(dir)
}

fn explain(err: anyhow::Error) -> anyhow::Error {
    match err.downcast::<Failed>() {
        Ok(failed) => log_failure("clang", &failed, "is libbpf-dev installed? try: snifctl doctor"),
        Err(err) => err,
    }
}

/// What bpftool says after the verifier's reason, always.
const NOISE: [&str; 8] = [
    "Error: failed to load object file",
    "Warning: bpftool is now running",
    "If it used to work",
    "libbpf: failed to load",
    "libbpf: prog",
    "-- END PROG",
    "processed",
    "verification time",
];

/// The last lines of a long log in the message, all of it in a file that the message names.
pub fn log_failure(tool: &str, failed: &Failed, hint: &str) -> anyhow::Error {
    let kept = keep_log(tool, &failed.stderr);
    let says = |line: &&str| !line.is_empty() && !NOISE.iter().any(|noise| line.starts_with(noise));
    let lines: Vec<&str> = failed.stderr.lines().map(str::trim).filter(says).collect();
    let last = lines[lines.len().saturating_sub(3)..].join(" | ");
    match kept {
        Ok(path) => anyhow::anyhow!("{tool} failed: {last}; the whole log is in {}; {hint}", path.display()),
        Err(_) => anyhow::anyhow!("{tool} failed: {last}; {hint}"),
    }
}

fn keep_log(tool: &str, text: &str) -> Result<PathBuf> {
    let file = tempfile::Builder::new().prefix(&format!("snifctl-{tool}-")).suffix(".log").tempfile()?;
    fs::write(file.path(), text)?;
    let (_, path) = file.keep()?;
    if !path.is_file() {
        bail!("the log is gone");
    }
    Ok(path)
}
