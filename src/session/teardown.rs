//! Taking sessions down. Goes by what the kernel has, not by what was remembered, so it also cleans up half a session.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;

use crate::commands::doctor;
use crate::datapath::abi::Direction;
use crate::session::home::{self, ALIAS, Home, handle};
use crate::session::relay;
use crate::tools::bpftool;
use crate::tools::exec::Runner;
use crate::tools::ip::{self, Link};
use crate::tools::tc::{self, Hooks};

/// What to take down.
pub enum Target<'a> {
    One(&'a str),
    All,
}

/// What becomes of a clsact qdisc that we have added, once nothing uses it any more. Removing it, as adding it, makes the
/// kernel restart the interface's queues, and what stands in them is lost.
pub enum Clsact<'a> {
    Remove,
    /// It stays and is no longer ours, also where others still use it.
    Leave,
    /// It stays ours at these interfaces, whose taps come back at once.
    Hold(&'a [u32]),
}

/// Takes sessions down. Returns whether there was anything to remove; nothing to remove is no error.
pub fn down(runner: &Runner, target: &Target, clsact: &Clsact) -> Result<bool> {
    home::ensure_root()?;
    doctor::ensure_present(&["bpftool", "tc", "ip"])?;
    let home = Home::here()?;
    let _lock = home.lock_to_write(runner)?;
    let removed = ip::links(runner).and_then(|links| teardown(runner, &home, target, clsact, &links));
    home.remove_stale_tests();
    home.remove_if_empty();
    removed
}

/// Taps first, then the relay, then the pins. `links` are those of now.
pub fn teardown(runner: &Runner, home: &Home, target: &Target, clsact: &Clsact, links: &[Link]) -> Result<bool> {
    let mut removed = detach(runner, home, target, clsact, links)?;
    removed |= remove_relays(runner, target, links)?;
    for dir in pins(home, target) {
        runner.act("rm -r", &dir, |dir| fs::remove_dir_all(dir))?;
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

/// Removes the devices of relays. Removing one end of a veth pair removes the other.
pub fn remove_relays(runner: &Runner, target: &Target, links: &[Link]) -> Result<bool> {
    let ours: Vec<&Link> = links.iter().filter(|link| is_relay_of(link, target)).collect();
    // A bridge of ours is also known by its port, where someone has given it another alias.
    let is_bridge = |link: &&Link| relay::is_name(&link.ifname) && link.kind() == "bridge";
    let bridges = links.iter().filter(is_bridge).filter(|link| {
        ours.iter().all(|own| own.ifindex != link.ifindex)
            && ours.iter().any(|own| own.master.as_ref() == Some(&link.ifname))
    });
    let mut doomed: Vec<&Link> = Vec::new();
    for link in bridges.chain(ours.iter().copied()) {
        if link.link.is_none() || doomed.iter().all(|other| Some(&other.ifname) != link.link.as_ref()) {
            doomed.push(link);
        }
    }
    let lines: Vec<String> = doomed.iter().map(|link| format!("link delete dev {}", link.ifname)).collect();
    if !lines.is_empty() {
        ip::batch(runner, &lines)?;
    }
    Ok(!lines.is_empty())
}

/// A device of a relay without an alias was made by a run that ended before it could say whose it is.
fn is_relay_of(link: &Link, target: &Target) -> bool {
    if link.ifalias.is_empty() {
        return relay::is_name(&link.ifname) && ["veth", "bridge"].contains(&link.kind());
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

/// Removes our filters from the watched interfaces, and sees to their clsact qdiscs.
fn detach(runner: &Runner, home: &Home, target: &Target, clsact: &Clsact, links: &[Link]) -> Result<bool> {
    let marks = home.clsact_marks();
    let tapped = tapped(runner)?;
    let ours = |link: &&Link| {
        (tapped.contains(&link.ifindex) || marks.contains(&link.ifindex)) && !link.ifalias.starts_with(ALIAS)
    };
    let devices: Vec<&Link> = links.iter().filter(ours).collect();
    let names: Vec<&str> = devices.iter().map(|link| link.ifname.as_str()).collect();
    let (mut lines, mut left) = (Vec::new(), Vec::new());
    for (link, hooks) in devices.iter().zip(tc::hooks(runner, &names)?) {
        let filters = filters_of(&link.ifname, &hooks, target, &BOTH);
        left.extend((!filters.is_empty()).then_some(link.ifindex));
        lines.extend(filters);
    }
    tc::batch(runner, &lines)?;
    settle_clsact(runner, home, clsact, &devices, &left)?;
    for gone in marks.iter().filter(|mark| !links.iter().any(|link| link.ifindex == **mark)) {
        home.forget_clsact(runner, *gone)?;
    }
    Ok(!lines.is_empty())
}

/// Removes a session's filters from these hooks of one interface, and sees to its clsact qdisc.
pub fn detach_taps(
    runner: &Runner,
    home: &Home,
    session: &str,
    link: &Link,
    directions: &[Direction],
    clsact: &Clsact,
) -> Result<()> {
    let found = tc::hooks(runner, &[&link.ifname])?;
    let lines: Vec<String> =
        found.iter().flat_map(|hooks| filters_of(&link.ifname, hooks, &Target::One(session), directions)).collect();
    tc::batch(runner, &lines)?;
    settle_clsact(runner, home, clsact, &[link], &[link.ifindex])
}

/// ifindexes of the interfaces that run a tap of any session.
fn tapped(runner: &Runner) -> Result<Vec<u32>> {
    let answers = bpftool::ask(runner, &[bpftool::NET_QUESTION.to_string()])?;
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

/// Removes the clsact qdiscs of ours that nothing uses, or gives them up, as `clsact` wants it. `left`: interfaces that
/// filters were just removed from.
fn settle_clsact(runner: &Runner, home: &Home, clsact: &Clsact, devices: &[&Link], left: &[u32]) -> Result<()> {
    let marks = home.clsact_marks();
    let marked: Vec<&&Link> = devices.iter().filter(|link| marks.contains(&link.ifindex)).collect();
    let names: Vec<&str> = marked.iter().map(|link| link.ifname.as_str()).collect();
    let (mut lines, mut done) = (Vec::new(), Vec::new());
    for (link, hooks) in marked.iter().zip(tc::hooks(runner, &names)?) {
        let (goes, is_given_up) = match clsact {
            Clsact::Remove => (hooks.is_unused(), false),
            Clsact::Leave => (false, hooks.is_unused() || left.contains(&link.ifindex)),
            Clsact::Hold(held) => (hooks.is_unused() && !held.contains(&link.ifindex), false),
        };
        lines.extend((goes && hooks.has_qdisc("clsact")).then(|| tc::del_clsact(&link.ifname)));
        done.extend((goes || is_given_up).then_some(link.ifindex));
    }
    tc::batch(runner, &lines)?;
    done.into_iter().try_for_each(|ifindex| home.forget_clsact(runner, ifindex))
}
