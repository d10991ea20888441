//! Another filter for a running session: new taps on the same maps, put in the place of the old ones.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use anyhow::{Context, Result};

use crate::request;
use crate::session::home::{self, Home, TAPS, handle};
use crate::session::make;
use crate::session::read::{self, Memory, Session};
use crate::tools::bpftool;
use crate::tools::clang::Source;
use crate::tools::exec::Runner;
use crate::tools::ip::{self, Link};
use crate::tools::tc;

/// Puts a filter in force, or none. Returns the session's name, and whether there was anything to do.
///
/// Compiled and verified before anything changes; then each tap is replaced by `tc filter replace`, so that every packet
/// meets the old filter or the new one. A failure puts the old taps back.
pub fn set(runner: &Runner, expression: Option<&str>, name: Option<&str>) -> Result<(String, bool)> {
    home::ensure_root()?;
    request::ensure_filter(expression)?;
    let filter = make::compiled_filter(runner, "EXPR", expression)?;
    let object = Source::taps(filter).begin(runner)?.object(runner, &[])?;
    let (home, _lock) = make::lock_to_change(runner)?;
    let done = set_locked(runner, &home, &object, expression, name);
    home.remove_if_empty();
    done
}

fn set_locked(
    runner: &Runner,
    home: &Home,
    object: &Path,
    expression: Option<&str>,
    name: Option<&str>,
) -> Result<(String, bool)> {
    let name = home::chosen(home, name)?;
    let links = ip::links(runner)?;
    let session = read::session(runner, home, &name, &links)?;
    if session.memory.plan.filter.as_deref() == expression && session.taps.iter().all(|tap| tap.attached) {
        return Ok((name, false));
    }
    let building = home.building(&name);
    // What a run that was killed has left.
    let _ = fs::remove_dir_all(&building);
    runner.act("mkdir -m 0700", &building, |dir| DirBuilder::new().mode(0o700).create(dir))?;
    let maps = home.session(&name).join("maps");
    let loaded = bpftool::load_on(runner, object, &building, &maps);
    let swapped = loaded.and_then(|()| swap(runner, home, &session, &links, expression));
    fs::remove_dir_all(&building).with_context(|| format!("cannot remove {}", building.display()))?;
    swapped.map(|()| (name, true))
}

fn swap(runner: &Runner, home: &Home, session: &Session, links: &[Link], expression: Option<&str>) -> Result<()> {
    let (old, new) = (home.session(&session.name), home.building(&session.name));
    let mut memory = Memory { plan: session.memory.plan.clone(), ..session.memory.clone() };
    memory.plan.filter = expression.map(String::from);
    let remembered = memory.updates(&old.join("maps"), &session.config)?;
    let swapped = replace(runner, session, links, &new).and_then(|()| bpftool::batch(runner, &remembered));
    if let Err(err) = swapped {
        let undone = replace(runner, session, links, &old);
        return Err(match undone.and_then(|()| read::restore_memory(runner, home, session)) {
            Ok(()) => err,
            Err(undo) => err.context(format!(
                "putting the old filter back failed too ({undo:#}); try: snifctl down --name {}",
                session.name
            )),
        });
    }
    // Until both are renamed, `status` says that taps are not attached: the pins are not what runs.
    TAPS.iter().try_for_each(|tap| {
        let moved = |pin: &Path| fs::rename(new.join(tap), pin);
        runner.act(&format!("mv -T {}", new.join(tap).display()), &old.join(tap), moved)
    })
}

/// Puts the taps that are pinned in `pins` in the place of the session's.
fn replace(runner: &Runner, session: &Session, links: &[Link], pins: &Path) -> Result<()> {
    let find = |ifindex| links.iter().find(|link| link.ifindex == ifindex);
    let mut devices: Vec<&Link> = session.taps.iter().filter_map(|tap| find(tap.key.ifindex)).collect();
    devices.dedup_by_key(|link| link.ifindex);
    let names: Vec<&str> = devices.iter().map(|link| link.ifname.as_str()).collect();
    let handle = handle(&session.name);
    let mut lines = Vec::new();
    for (link, hooks) in devices.iter().zip(tc::hooks(runner, &names)?) {
        for tap in session.taps.iter().filter(|tap| tap.key.ifindex == link.ifindex) {
            let direction = tap.key.direction;
            let ours = hooks
                .filters(direction)
                .iter()
                .find(|filter| filter.handle() == Some(handle) && filter.program() == direction.program());
            let Some(ours) = ours else { continue };
            let pin = pins.join(direction.program());
            lines.push(tc::replace_filter(&link.ifname, direction, ours.pref, handle, &pin.to_string_lossy()));
        }
    }
    tc::batch(runner, &lines)
}
