//! Taking sessions down. Goes by what the kernel has, not by what was remembered, so it also cleans up half a session.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;

use crate::abi::Direction;
use crate::exec::Shell;
use crate::ip::{self, Link};
use crate::state::{self, ALIAS, Home, handle};
use crate::tc::{self, Hooks};
use crate::{bpftool, doctor, relay};

/// What to take down.
pub enum Target<'a> {
    One(&'a str),
    All,
}

/// Takes sessions down. Returns whether there was anything to remove; nothing to remove is no error.
pub fn down(shell: &Shell, target: &Target) -> Result<bool> {
    state::ensure_root()?;
    doctor::ensure_present(&["bpftool", "tc", "ip"])?;
    let home = Home::here()?;
    let _lock = home.lock_to_write(shell)?;
    let removed = ip::links(shell).and_then(|links| teardown(shell, &home, target, &links));
    home.remove_stale_tests();
    home.remove_if_empty();
    removed
}

/// Taps first, then the relay, then the pins. `links` are those of now.
pub fn teardown(shell: &Shell, home: &Home, target: &Target, links: &[Link]) -> Result<bool> {
    let mut removed = detach(shell, home, target, links)?;
    removed |= remove_relays(shell, target, links)?;
    for dir in pins(home, target) {
        shell.act("rm -r", &dir, |dir| fs::remove_dir_all(dir))?;
        removed = true;
    }
    Ok(removed)
}

/// Is there anything of these sessions but taps, which take long to look for where there are many interfaces?
pub fn is_left(home: &Home, target: &Target, links: &[Link]) -> bool {
    !pins(home, target).is_empty() || links.iter().any(|link| is_relay_of(link, target))
}

/// Does a tap of this session sit at these hooks?
pub fn holds_tap(hooks: &Hooks, session: &str) -> bool {
    !filters_of("", hooks, &Target::One(session), &BOTH).is_empty()
}

/// Removing one end of a veth pair removes the other.
fn remove_relays(shell: &Shell, target: &Target, links: &[Link]) -> Result<bool> {
    let mut doomed: Vec<&Link> = Vec::new();
    for link in links.iter().filter(|link| is_relay_of(link, target)) {
        if link.link.is_none() || doomed.iter().all(|other| Some(&other.ifname) != link.link.as_ref()) {
            doomed.push(link);
        }
    }
    let lines: Vec<String> = doomed.iter().map(|link| format!("link delete dev {}", link.ifname)).collect();
    if !lines.is_empty() {
        ip::batch(shell, &lines)?;
    }
    Ok(!lines.is_empty())
}

/// A device of a relay without an alias was made by a run that ended before it could say whose it is.
fn is_relay_of(link: &Link, target: &Target) -> bool {
    if link.ifalias.is_empty() {
        return relay::is_name(&link.ifname) && ["veth", "bridge"].contains(&link.linkinfo.info_kind.as_str());
    }
    link.ifalias.strip_prefix(ALIAS).is_some_and(|owner| match target {
        Target::One(name) => owner == *name,
        Target::All => true,
    })
}

fn pins(home: &Home, target: &Target) -> Vec<PathBuf> {
    let dirs: Vec<PathBuf> = match target {
        Target::One(name) => vec![home.session(name), home.building(name)],
        Target::All => {
            let made = home.sessions().into_iter().map(|name| home.session(&name));
            made.chain(home.half_made().into_iter().map(|name| home.building(&name))).collect()
        }
    };
    dirs.into_iter().filter(|dir| dir.exists()).collect()
}

const BOTH: [Direction; 2] = [Direction::Ingress, Direction::Egress];

/// Removes our filters from the watched interfaces, and a clsact qdisc that we added and nothing uses any more.
fn detach(shell: &Shell, home: &Home, target: &Target, links: &[Link]) -> Result<bool> {
    let marks = home.clsact_marks();
    let tapped = tapped(shell)?;
    let ours = |link: &&Link| {
        (tapped.contains(&link.ifindex) || marks.contains(&link.ifindex)) && !link.ifalias.starts_with(ALIAS)
    };
    let devices: Vec<&Link> = links.iter().filter(ours).collect();
    let names: Vec<&str> = devices.iter().map(|link| link.ifname.as_str()).collect();
    let lines: Vec<String> = names
        .iter()
        .zip(tc::hooks(shell, &names)?)
        .flat_map(|(dev, hooks)| filters_of(dev, &hooks, target, &BOTH))
        .collect();
    tc::batch(shell, &lines)?;
    remove_clsact(shell, home, &devices, &marks)?;
    for gone in marks.iter().filter(|mark| !links.iter().any(|link| link.ifindex == **mark)) {
        remove_mark(shell, home, *gone)?;
    }
    Ok(!lines.is_empty())
}

/// Removes a session's filters from these hooks of one interface, and clsact if it was ours and is unused then.
pub fn detach_taps(shell: &Shell, home: &Home, session: &str, link: &Link, directions: &[Direction]) -> Result<()> {
    let found = tc::hooks(shell, &[&link.ifname])?;
    let lines: Vec<String> =
        found.iter().flat_map(|hooks| filters_of(&link.ifname, hooks, &Target::One(session), directions)).collect();
    tc::batch(shell, &lines)?;
    remove_clsact(shell, home, &[link], &home.clsact_marks())
}

/// ifindexes of the interfaces that run a tap of any session.
fn tapped(shell: &Shell) -> Result<Vec<u32>> {
    let answers = bpftool::ask(shell, &[bpftool::NET_QUESTION.to_string()])?;
    let attachments = bpftool::attachments(&answers[0])?;
    Ok(attachments.into_iter().filter(|at| at.name.starts_with("snif_tap_")).map(|at| at.ifindex).collect())
}

fn filters_of(dev: &str, hooks: &Hooks, target: &Target, directions: &[Direction]) -> Vec<String> {
    let mut lines = Vec::new();
    for direction in directions.iter().copied() {
        let taps = hooks.filters(direction).iter().filter(|filter| filter.program() == direction.program());
        for filter in taps {
            let Some(at) = filter.handle() else { continue };
            if matches!(target, Target::One(name) if handle(name) != at) {
                continue;
            }
            lines.push(tc::del_filter(dev, direction, filter.pref, at));
        }
    }
    lines
}

fn remove_clsact(shell: &Shell, home: &Home, devices: &[&Link], marks: &[u32]) -> Result<()> {
    let marked: Vec<&&Link> = devices.iter().filter(|link| marks.contains(&link.ifindex)).collect();
    let names: Vec<&str> = marked.iter().map(|link| link.ifname.as_str()).collect();
    let unused = marked.iter().zip(tc::hooks(shell, &names)?).filter(|(_, hooks)| hooks.is_unused());
    let (mut lines, mut done) = (Vec::new(), Vec::new());
    for (link, hooks) in unused {
        if hooks.has_qdisc("clsact") {
            lines.push(tc::del_clsact(&link.ifname));
        }
        done.push(link.ifindex);
    }
    tc::batch(shell, &lines)?;
    done.into_iter().try_for_each(|ifindex| remove_mark(shell, home, ifindex))
}

fn remove_mark(shell: &Shell, home: &Home, ifindex: u32) -> Result<()> {
    shell.act("rmdir", &home.clsact_mark(ifindex), |dir| fs::remove_dir(dir))
}
