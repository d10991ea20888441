//! Maps without the names of their fields. bpftool (7.1) asks the kernel for the names (BTF) before it reads a map that has
//! them, and the kernel gives them to CAP_SYS_ADMIN alone. Who makes a session without that capability makes its maps without
//! names, so that it can read them, too.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::datapath::parts::Map;
use crate::tools::bpftool;
use crate::tools::exec::{self, Runner};
use crate::tools::rights;

/// In the directory where a session is built: the maps until programs have them.
const MAPS: &str = "plain";

impl Map {
    /// Do its values hold a lock, which the kernel knows by its name alone?
    pub(crate) fn has_lock(self) -> bool {
        matches!(self, Map::Bucket | Map::RemoteState)
    }

    /// Is it read, and can it be without names?
    fn can_be_plain(self) -> bool {
        self.is_shown() && !self.has_lock()
    }

    /// Its elements are allocated as they come.
    fn grows(self) -> bool {
        matches!(self, Map::Request | Map::Outs)
    }
}

/// Those of these maps that are made without names, by name and pin; none where we can read the others, too. `dir`: where
/// the session is built.
pub(crate) fn make(runner: &Runner, dir: &Path, maps: &[Map]) -> Result<Vec<(&'static str, PathBuf)>> {
    if !rights::needs_plain_maps() {
        return Ok(Vec::new());
    }
    let maps: Vec<Map> = maps.iter().copied().filter(|map| map.can_be_plain()).collect();
    let dir = dir.join(MAPS);
    runner.act("mkdir -m 0700", &dir, |dir| DirBuilder::new().mode(0o700).create(dir))?;
    let line = |map: &Map| {
        let (shape, flags) = (map.shape(), u8::from(map.grows()));
        let (pin, name) = (dir.join(map.name()), map.name());
        format!(
            "map create {} type {} key {} value {} entries {} name {name} flags {flags}",
            pin.display(),
            shape.kind,
            shape.key,
            shape.value,
            shape.entries
        )
    };
    let lines: Vec<String> = maps.iter().map(line).collect();
    match runner.dry_run {
        true => lines.iter().try_for_each(|line| exec::print(&format!("bpftool {line}\n")))?,
        false => bpftool::batch(runner, &lines)?,
    }
    Ok(maps.iter().map(|map| (map.name(), dir.join(map.name()))).collect())
}

/// Once they have other pins.
pub(crate) fn tidy(runner: &Runner, dir: &Path) -> Result<()> {
    let dir = dir.join(MAPS);
    match dir.is_dir() || (runner.dry_run && rights::needs_plain_maps()) {
        true => runner.act("rm -r", &dir, |dir| fs::remove_dir_all(dir)),
        false => Ok(()),
    }
}
