//! Another filter for a running session: new taps on the same maps, put in the place of the old ones.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use anyhow::{Context, Result};

use crate::clang::Source;
use crate::exec::Shell;
use crate::ip::{self, Link};
use crate::plan;
use crate::session;
use crate::state::{self, Home, TAPS, handle};
use crate::status::{self, Memory, Session};
use crate::{bpftool, tc};

/// Puts a filter in force, or none. Returns the session's name, and whether there was anything to do.
///
/// Compiled and verified before anything changes; then each tap is replaced by `tc filter replace`, so that every packet
/// meets the old filter or the new one. A failure puts the old taps back.
pub fn set(shell: &Shell, expression: Option<&str>, name: Option<&str>) -> Result<(String, bool)> {
    state::ensure_root()?;
    plan::ensure_filter(expression)?;
    let filter = session::compiled_filter(shell, "EXPR", expression)?;
    let object = Source::taps(filter).begin(shell)?.object(shell, &[])?;
    let (home, _lock) = session::lock_to_change(shell)?;
    let done = set_locked(shell, &home, &object, expression, name);
    home.remove_if_empty();
    done
}

fn set_locked(
    shell: &Shell,
    home: &Home,
    object: &Path,
    expression: Option<&str>,
    name: Option<&str>,
) -> Result<(String, bool)> {
    let name = state::chosen(home, name)?;
    let links = ip::links(shell)?;
    let session = status::session(shell, home, &name, &links)?;
    if session.memory.plan.filter.as_deref() == expression && session.taps.iter().all(|tap| tap.attached) {
        return Ok((name, false));
    }
    let building = home.building(&name);
    // What a run that was killed has left.
    let _ = fs::remove_dir_all(&building);
    shell.act("mkdir -m 0700", &building, |dir| DirBuilder::new().mode(0o700).create(dir))?;
    let maps = home.session(&name).join("maps");
    let loaded = bpftool::load_on(shell, object, &building, &maps);
    let swapped = loaded.and_then(|()| swap(shell, home, &session, &links, expression));
    fs::remove_dir_all(&building).with_context(|| format!("cannot remove {}", building.display()))?;
    swapped.map(|()| (name, true))
}

fn swap(shell: &Shell, home: &Home, session: &Session, links: &[Link], expression: Option<&str>) -> Result<()> {
    let (old, new) = (home.session(&session.name), home.building(&session.name));
    let mut memory = Memory { plan: session.memory.plan.clone(), ..session.memory.clone() };
    memory.plan.filter = expression.map(String::from);
    let remembered = memory.updates(&old.join("maps"), &session.config)?;
    let swapped = replace(shell, session, links, &new).and_then(|()| bpftool::batch(shell, &remembered));
    if let Err(err) = swapped {
        let undone = replace(shell, session, links, &old);
        return Err(match undone.and_then(|()| status::restore_memory(shell, home, session)) {
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
        shell.act(&format!("mv -T {}", new.join(tap).display()), &old.join(tap), moved)
    })
}

/// Puts the taps that are pinned in `pins` in the place of the session's.
fn replace(shell: &Shell, session: &Session, links: &[Link], pins: &Path) -> Result<()> {
    let find = |ifindex| links.iter().find(|link| link.ifindex == ifindex);
    let mut devices: Vec<&Link> = session.taps.iter().filter_map(|tap| find(tap.key.ifindex)).collect();
    devices.dedup_by_key(|link| link.ifindex);
    let names: Vec<&str> = devices.iter().map(|link| link.ifname.as_str()).collect();
    let handle = handle(&session.name);
    let mut lines = Vec::new();
    for (link, hooks) in devices.iter().zip(tc::hooks(shell, &names)?) {
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
    tc::batch(shell, &lines)
}
