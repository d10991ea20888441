//! From the C that is built into this binary to an object file, by clang; kept for the next time by content.

use std::fs::{self, DirBuilder};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::exec::{Cmd, Failed, Shell, print};

/// The datapath, and the layouts that it shares with this binary.
const SOURCE: &str = include_str!("../bpf/snifctl.bpf.c");
const HEADER: &str = include_str!("../bpf/snifctl.h");
const SOURCE_NAME: &str = "snifctl.bpf.c";

/// Compiled objects, by content. Root's alone: what lies here is loaded into the kernel.
pub const CACHE: &str = "/var/cache/snifctl";

const FLAGS: [&str; 8] = ["-O2", "-g", "-Wall", "-Werror", "-target", "bpf", "-mcpu=v3", "-c"];

/// Writes the sources into `dir`, so that the commands of a dry run can be followed by hand.
pub fn write_source(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    for (name, text) in [(SOURCE_NAME, SOURCE), ("snifctl.h", HEADER)] {
        fs::write(dir.join(name), text).with_context(|| format!("cannot write into {}", dir.display()))?;
    }
    Ok(())
}

fn cached() -> PathBuf {
    Path::new(CACHE).join(format!("{}.o", digest()))
}

/// Has this very source been compiled here before?
pub fn is_cached() -> bool {
    is_trusted(&cached())
}

/// The object file for this machine, compiled if the cache has none. A dry run prints the commands for it.
pub fn object(shell: &Shell) -> Result<PathBuf> {
    let cached = cached();
    if is_trusted(&cached) {
        return Ok(cached);
    }
    if shell.dry_run {
        let dir = std::env::temp_dir().join("snifctl-source");
        print(&format!("snifctl source {}\n", crate::exec::quote(&dir.to_string_lossy())));
        print(&format!("mkdir -p -m 0755 {CACHE}\n"));
        shell.write(&command(&dir, &cached))?;
        return Ok(cached);
    }
    compile(shell, &cached)?;
    Ok(cached)
}

fn digest() -> String {
    let mut hasher = DefaultHasher::new();
    (SOURCE, HEADER, FLAGS, include_dir()).hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// Only a file that no one but root can have written is loaded.
fn is_trusted(path: &Path) -> bool {
    let safe = |path: &Path| fs::symlink_metadata(path).is_ok_and(|at| at.uid() == 0 && at.mode() & 0o022 == 0);
    safe(path) && path.is_file() && path.parent().is_some_and(safe)
}

/// Compiles in a private directory and renames the result into the cache, so that no one sees half an object.
fn compile(shell: &Shell, cached: &Path) -> Result<()> {
    ensure_cache()?;
    let dir = tempfile::Builder::new().prefix("snifctl-").tempdir().context("cannot make a temporary directory")?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700))?;
    write_source(dir.path())?;
    let built = tempfile::Builder::new().prefix(".new-").suffix(".o").tempfile_in(CACHE);
    let built = built.with_context(|| format!("cannot write into {CACHE}"))?;
    if let Err(err) = shell.write(&command(dir.path(), built.path())) {
        return Err(explain(err));
    }
    fs::set_permissions(built.path(), fs::Permissions::from_mode(0o644))?;
    built.persist(cached).with_context(|| format!("cannot keep {}", cached.display()))?;
    ensure!(is_trusted(cached), "{} is not root's alone; try: rm -r {CACHE}", cached.display());
    Ok(())
}

/// Makes the cache, or makes it root's alone again.
fn ensure_cache() -> Result<()> {
    let cache = Path::new(CACHE);
    DirBuilder::new().recursive(true).mode(0o755).create(cache).with_context(|| format!("cannot make {CACHE}"))?;
    let owned = fs::symlink_metadata(cache).is_ok_and(|at| at.is_dir() && at.uid() == 0);
    ensure!(owned, "{CACHE} is not a directory of root's; try: rm -r {CACHE}");
    fs::set_permissions(cache, fs::Permissions::from_mode(0o755)).with_context(|| format!("cannot mend {CACHE}"))
}

fn command(source: &Path, object: &Path) -> Cmd {
    let mut args: Vec<String> = FLAGS.map(String::from).to_vec();
    args.push(source.join(SOURCE_NAME).to_string_lossy().into_owned());
    args.extend(["-o".into(), object.to_string_lossy().into_owned()]);
    args.extend(include_dir().map(|dir| format!("-I{dir}")));
    Cmd::new("clang", args)
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

/// The last lines of a long log in the message, all of it in a file that the message names.
pub fn log_failure(tool: &str, failed: &Failed, hint: &str) -> anyhow::Error {
    let kept = keep_log(tool, &failed.stderr);
    let lines: Vec<&str> = failed.stderr.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
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
