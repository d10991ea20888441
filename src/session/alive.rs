//! Does the network namespace of a directory still live? Its inode is given to another one at once, so the directory's name
//! does not tell. The kernel does: it takes `lo` out of a devmap when the namespace goes, and says so to everybody.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::session::home::{ALIAS, Home};
use crate::session::relay;
use crate::session::there::ask_each;
use crate::tools::bpftool;
use crate::tools::exec::{self, Runner};
use crate::tools::ip::Link;

/// The pin of a map with one element: `lo` of the namespace that made it, which is always its first interface.
pub(crate) const PIN: &str = "_alive";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Alive,
    Dead,
    /// Nothing says so: another version made the directory, or nobody has finished to make it.
    Unknown,
}

/// Makes the pin, where it is not there.
pub(crate) fn make(runner: &Runner, home: &Home) -> Result<()> {
    let pin = home.dir().join(PIN);
    if pin.exists() && !home.is_void {
        return Ok(());
    }
    let create = format!("map create {} type devmap key 4 value 4 entries 1 name snif_alive", pin.display());
    let lines = [create, bpftool::update(&pin, &[0; 4], &1u32.to_ne_bytes())];
    match runner.dry_run {
        true => lines.iter().try_for_each(|line| exec::print(&format!("bpftool {line}\n"))),
        false => bpftool::batch(runner, &lines),
    }
}

fn ask(runner: &Runner, dirs: &[PathBuf]) -> Result<Vec<Life>> {
    let has_pin = |dir: &&PathBuf| dir.join(PIN).exists();
    let lines: Vec<String> = dirs.iter().filter(has_pin).map(|dir| bpftool::dump_question(&dir.join(PIN))).collect();
    let mut answers = ask_each(runner, &lines)?.into_iter();
    let mut life = |dir: &PathBuf| match has_pin(&dir) {
        true => answers.next().and_then(|answer| bpftool::value(&answer).ok()).map_or(Life::Unknown, |at| life(&at)),
        false => Life::Unknown,
    };
    Ok(dirs.iter().map(&mut life).collect())
}

/// What the dump of the map tells: of an element that is gone, versions say `null`, an error, or nothing.
fn life(dump: &serde_json::Value) -> Life {
    match dump.as_array() {
        None => Life::Unknown,
        Some(rows) if rows.iter().any(|row| row["value"].is_array()) => Life::Alive,
        Some(_) => Life::Dead,
    }
}

/// Is what lies in the directory of this namespace another one's, which had its inode before? Where a relay of one of its
/// sessions is here, nobody has to be asked.
pub(crate) fn is_void(runner: &Runner, home: &Home, links: &[Link]) -> Result<bool> {
    let names: Vec<String> = home.sessions().into_iter().chain(home.halves()).collect();
    let has_pin = home.dir().join(PIN).exists();
    if names.is_empty() && home.clsact_marks().is_empty() && !has_pin {
        return Ok(false);
    }
    let is_here = |link: &&Link| {
        let owner = link.ifalias.strip_prefix(ALIAS);
        relay::is_one(link) && owner.is_some_and(|owner| names.iter().any(|name| name == owner))
    };
    if links.iter().any(|link| is_here(&link)) {
        return Ok(false);
    }
    match ask(runner, &[home.dir().to_path_buf()])?.first() {
        Some(Life::Dead) => Ok(true),
        // An older version made no pin: then the relay alone tells.
        Some(Life::Unknown) => Ok(!has_pin && !names.is_empty()),
        _ => Ok(false),
    }
}

/// Removes what a dead namespace has left in the directory of ours, which is locked.
pub(crate) fn clear(runner: &Runner, home: &Home) -> Result<()> {
    for entry in fs::read_dir(home.dir()).into_iter().flatten().flatten() {
        runner.act("rm -r", &entry.path(), remove)?;
    }
    Ok(())
}

fn remove(path: &Path) -> std::io::Result<()> {
    if fs::symlink_metadata(path)?.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

/// The directories of other namespaces that are dead.
pub(crate) fn dead(runner: &Runner, home: &Home) -> Result<Vec<PathBuf>> {
    let others = home.others();
    let lives = ask(runner, &others)?;
    Ok(others.into_iter().zip(lives).filter(|(_, life)| *life == Life::Dead).map(|(dir, _)| dir).collect())
}

/// Removes the directories of dead namespaces; answers how many. One that someone is at work in is left to him. A new
/// namespace may have got the inode meanwhile: so each is asked for again once it is locked. `before`: what else their
/// sessions have left.
pub(crate) fn sweep(runner: &Runner, home: &Home, before: impl Fn(&Home) -> Result<()>) -> Result<usize> {
    let found = dead(runner, home)?;
    if runner.dry_run {
        found.iter().try_for_each(|dir| exec::print(&format!("rm -r {}\n", dir.display())))?;
        return Ok(found.len());
    }
    let locked: Vec<_> = found.into_iter().filter_map(|dir| Some((Home::try_lock(&dir)?, dir))).collect();
    let dirs: Vec<PathBuf> = locked.iter().map(|(_, dir)| dir.clone()).collect();
    let mut swept = 0;
    for (dir, life) in dirs.iter().zip(ask(runner, &dirs)?) {
        if life == Life::Dead {
            before(&Home::of(dir))?;
            runner.act("rm -r", dir, |dir| fs::remove_dir_all(dir)).context("cannot remove a dead namespace's pins")?;
            swept += 1;
        }
    }
    Ok(swept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_namespace_lives_as_long_as_its_first_interface() {
        let row = |value: serde_json::Value| json!([{"key": ["0x00", "0x00", "0x00", "0x00"], "value": value}]);
        assert_eq!(life(&row(json!(["0x01", "0x00", "0x00", "0x00"]))), Life::Alive);
        for gone in [row(json!({"error": "No such file or directory"})), row(json!(null)), json!([])] {
            assert_eq!(life(&gone), Life::Dead, "{gone}");
        }
        for silent in [json!(null), json!({"error": "bpf obj get: No such file or directory"})] {
            assert_eq!(life(&silent), Life::Unknown, "{silent}");
        }
    }
}
