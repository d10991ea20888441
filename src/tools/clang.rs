//! From C to an object file, by clang; kept for the next time by content.

use std::fs::{self, DirBuilder, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::ops::Deref;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow, ensure};
use tempfile::TempDir;

use crate::tools::exec::{Cmd, Failed, Runner, Running, own_path, print};
use crate::tools::{log, requirements};

/// Compiled objects, by content. Root's alone: what lies here is loaded into the kernel.
pub(crate) const CACHE: &str = "/var/cache/snifctl";
/// How many of them are kept.
const CACHED: usize = 100;
/// Where the commands of a dry run put the sources, by content. Root's alone, like all of /run.
const SHOWN_SOURCE: &str = "/run/snifctl-source";

pub(crate) const FLAGS: [&str; 8] = ["-O2", "-g", "-Wall", "-Werror", "-target", "bpf", "-mcpu=v3", "-c"];

/// One C file to compile, with all that it includes.
#[derive(Clone, Debug, Hash)]
pub(crate) struct Unit {
    /// Name of the file that clang is given.
    pub main: &'static str,
    /// Names and texts.
    pub files: Vec<(&'static str, String)>,
    /// As `NAME` or `NAME=VALUE`.
    pub defines: Vec<String>,
}

/// Beginning of the names of our temporary directories; the process id follows.
const TEMPORARY: &str = "snifctl-build-";

/// A process that is not in our /proc may be in another PID namespace: no compilation takes so long.
const STALE: Duration = Duration::from_secs(60);

/// Removes the directories of our own that runs which were killed have left.
fn remove_stale(temporary: &Path) {
    let own = fs::metadata("/proc/self").map(|meta| meta.uid()).ok();
    for entry in fs::read_dir(temporary).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix(TEMPORARY).and_then(|rest| rest.split('-').next());
        let is_stale = pid.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists());
        let is_old = |meta: &fs::Metadata| meta.modified().is_ok_and(|at| at.elapsed().is_ok_and(|age| age > STALE));
        let is_ours = || entry.metadata().is_ok_and(|meta| meta.is_dir() && Some(meta.uid()) == own && is_old(&meta));
        if is_stale && is_ours() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

impl Unit {
    pub(crate) fn write(&self, dir: &Path) -> Result<()> {
        let write = || {
            fs::create_dir_all(dir)?;
            self.files.iter().try_for_each(|(name, text)| fs::write(dir.join(name), text))
        };
        write().map_err(|err: io::Error| {
            anyhow!("DIR {} cannot be written ({err}); name another, as in: snifctl source ./snifctl-c", dir.display())
        })
    }

    /// Starts clang where neither the cache nor `before`, an object that was compiled before, is there, and looks meanwhile whether the tools are there. What goes wrong with
    /// clang itself is told by [`Compiling::object`].
    pub(crate) fn begin(self, runner: &Runner, before: Option<PathBuf>) -> Result<Compiling> {
        if let Some(cached) = before {
            requirements::ensure_tools(runner, true)?;
            return Ok(Compiling { unit: self, cached, job: None });
        }
        let cached = self.cached();
        let is_compiled = is_trusted(&cached);
        if is_compiled && !runner.dry_run {
            mark_used(&cached);
        }
        let job = (!is_compiled && !runner.dry_run).then(|| self.start(runner));
        requirements::ensure_tools(runner, is_compiled)?;
        Ok(Compiling { unit: self, cached, job })
    }

    /// Compiles it into a file, at once.
    pub(crate) fn compile(self, runner: &Runner, object: &Path) -> Result<()> {
        requirements::ensure_tools(runner, false)?;
        let Job { clang, built, dir: _dir } = self.start(runner)?;
        clang.wait().map_err(explain)?;
        fs::copy(&built, object).with_context(|| format!("{} cannot be written", object.display()))?;
        Ok(fs::set_permissions(object, fs::Permissions::from_mode(0o644))?)
    }

    fn cached(&self) -> PathBuf {
        let mut hasher = DefaultHasher::new();
        (self, FLAGS, include_dir()).hash(&mut hasher);
        Path::new(CACHE).join(format!("{:016x}.o", hasher.finish()))
    }

    fn start(&self, runner: &Runner) -> Result<Job> {
        remove_stale(&std::env::temp_dir());
        let prefix = format!("{TEMPORARY}{}-", std::process::id());
        let dir = tempfile::Builder::new().prefix(&prefix).tempdir().context("cannot make a temporary directory")?;
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700))?;
        self.write(dir.path())?;
        let built = dir.path().join("built.o");
        let clang = runner.start(&self.command(dir.path(), &built))?;
        Ok(Job { clang, built, dir })
    }

    fn command(&self, source: &Path, object: &Path) -> Cmd {
        let mut args: Vec<String> = FLAGS.map(String::from).to_vec();
        args.push(source.join(self.main).to_string_lossy().into_owned());
        args.extend(["-o".into(), object.to_string_lossy().into_owned()]);
        args.extend(self.defines.iter().map(|define| format!("-D{define}")));
        args.extend(include_dir().map(|dir| format!("-I{dir}")));
        Cmd::new("clang", args)
    }
}

/// An object that clang makes, or need not make, while something else is done.
pub(crate) struct Compiling {
    unit: Unit,
    /// Where the object is, or will be.
    cached: PathBuf,
    job: Option<Result<Job>>,
}

/// A run of clang in a private directory, and the object that it writes there.
struct Job {
    clang: Running,
    built: PathBuf,
    dir: TempDir,
}

/// The path of a compiled object. It is there as long as this value lives.
#[derive(Debug)]
pub(crate) struct Object {
    path: PathBuf,
    /// Where it could not be cached: the private directory that it is in.
    _dir: Option<TempDir>,
}

impl Deref for Object {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.path
    }
}

impl Compiling {
    /// The compiled object. A dry run prints the commands for it, where `words` are the options of `snifctl source` that
    /// write this source.
    pub(crate) fn object(self, runner: &Runner, words: &[&str]) -> Result<Object> {
        if runner.dry_run && !is_trusted(&self.cached) {
            self.show(runner, words)?;
        }
        match self.job {
            Some(job) => job?.keep(self.cached),
            None => Ok(Object { path: self.cached, _dir: None }),
        }
    }

    fn show(&self, runner: &Runner, words: &[&str]) -> Result<()> {
        let dir = Path::new(SHOWN_SOURCE).join(self.cached.file_stem().unwrap_or_default());
        let place = dir.to_string_lossy();
        let words = ["source", &place].into_iter().chain(words.iter().copied());
        print(&format!("{}\n", Cmd::new(&own_path()?, words)))?;
        print(&format!("mkdir -p -m 0755 {CACHE}\n"))?;
        runner.write(&self.unit.command(&dir, &self.cached))?;
        print(&format!("rm -r {place}\n"))
    }
}

impl Job {
    /// Waits for clang and puts the object into the cache. Where that cannot be, the object stays where it is.
    fn keep(self, cached: PathBuf) -> Result<Object> {
        self.clang.wait().map_err(explain)?;
        Ok(match cache(&self.built, &cached) {
            Ok(()) => Object { path: cached, _dir: None },
            Err(_) => Object { path: self.built, _dir: Some(self.dir) },
        })
    }
}

/// Copies an object into the cache under another name and renames it, so that no one sees half of it.
fn cache(built: &Path, cached: &Path) -> Result<()> {
    ensure_cache()?;
    let kept = tempfile::Builder::new().prefix(".new-").suffix(".o").tempfile_in(CACHE)?;
    fs::copy(built, kept.path())?;
    fs::set_permissions(kept.path(), fs::Permissions::from_mode(0o644))?;
    kept.persist(cached)?;
    ensure!(is_trusted(cached), "{} is not root's alone", cached.display());
    forget_unused(Path::new(CACHE), CACHED);
    Ok(())
}

/// The time of the last use is the file's own. A file system that cannot be written keeps the old one.
fn mark_used(object: &Path) {
    let _ = File::open(object).and_then(|file| file.set_modified(SystemTime::now()));
}

/// Every filter has an object of its own, so those go that have not been used for the longest time.
fn forget_unused(dir: &Path, kept: usize) {
    let files = fs::read_dir(dir).into_iter().flatten().flatten();
    let objects = files.filter(|file| file.path().extension().is_some_and(|kind| kind == "o"));
    let mut aged: Vec<_> =
        objects.filter_map(|file| Some((file.metadata().ok()?.modified().ok()?, file.path()))).collect();
    aged.sort();
    for (_, path) in aged.iter().rev().skip(kept) {
        let _ = fs::remove_file(path);
    }
}

/// Only a file that no one but root can have written is loaded.
pub(crate) fn is_trusted(path: &Path) -> bool {
    let safe = |path: &Path| fs::symlink_metadata(path).is_ok_and(|at| at.uid() == 0 && at.mode() & 0o022 == 0);
    safe(path) && path.is_file() && path.parent().is_some_and(safe)
}

/// Makes the cache, or makes it root's alone again.
fn ensure_cache() -> Result<()> {
    let cache = Path::new(CACHE);
    DirBuilder::new().recursive(true).mode(0o755).create(cache)?;
    let owned = fs::symlink_metadata(cache).is_ok_and(|at| at.is_dir() && at.uid() == 0);
    ensure!(owned, "{CACHE} is not a directory of root's");
    Ok(fs::set_permissions(cache, fs::Permissions::from_mode(0o755))?)
}

/// Debian keeps `asm/types.h` in a directory named after the architecture.
fn include_dir() -> Option<String> {
    let dir = format!("/usr/include/{}-linux-gnu", std::env::consts::ARCH);
    Path::new(&dir).join("asm").is_dir().then_some(dir)
}

fn explain(err: anyhow::Error) -> anyhow::Error {
    match err.downcast::<Failed>() {
        Ok(failed) => log::failure("clang", &failed, "is libbpf-dev installed? try: snifctl doctor"),
        Err(err) => err,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_a_killed_run_has_left_is_removed_once_it_is_old() {
        let temporary = tempfile::tempdir().unwrap();
        let make = |pid: u32, is_old: bool| {
            let dir = temporary.path().join(format!("{TEMPORARY}{pid}-x"));
            fs::create_dir(&dir).unwrap();
            let age = if is_old { 2 * STALE } else { Duration::ZERO };
            File::open(&dir).unwrap().set_modified(SystemTime::now() - age).unwrap();
            dir
        };
        let (dead, alive, young) = (make(u32::MAX, true), make(std::process::id(), true), make(u32::MAX - 1, false));
        remove_stale(temporary.path());
        assert_eq!([&dead, &alive, &young].map(|dir| dir.exists()), [false, true, true]);
    }

    #[test]
    fn the_object_that_was_not_used_for_the_longest_time_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let hour = |n: u64| SystemTime::now() - Duration::from_secs(3600 * n);
        for (name, age) in [("default.o", 9), ("a.o", 3), ("b.o", 2), ("c.o", 1), ("other", 20)] {
            File::create(dir.path().join(name)).unwrap().set_modified(hour(age)).unwrap();
        }
        mark_used(&dir.path().join("default.o"));
        forget_unused(dir.path(), 3);
        let left = |name: &str| dir.path().join(name).exists();
        assert_eq!(["default.o", "a.o", "b.o", "c.o", "other"].map(left), [true, false, true, true, true]);
    }

    #[test]
    fn only_what_root_alone_can_write_is_trusted() {
        let dir = tempfile::tempdir().unwrap();
        let object = dir.path().join("x.o");
        assert!(!is_trusted(&object));
        fs::write(&object, "x").unwrap();
        for (mode, trusted) in [(0o644, true), (0o664, false), (0o646, false)] {
            fs::set_permissions(&object, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(is_trusted(&object), trusted, "{mode:o}");
        }
        let link = dir.path().join("link.o");
        std::os::unix::fs::symlink(&object, &link).unwrap();
        assert!(!is_trusted(&link));
    }

    #[test]
    fn the_command_names_what_is_left_out() {
        let unit = Unit { main: "a.c", files: Vec::new(), defines: vec!["HAS_X=0".into()] };
        let line = unit.command(Path::new("/s"), Path::new("/o")).to_string();
        assert!(line.starts_with("clang -O2 ") && line.contains(" -c /s/a.c -o /o -DHAS_X=0"), "{line}");
    }
}
