//! Puts back what a session has lost, without making it anew: its relay, and the filters of its taps. Programs, maps and
//! counters stay, and so do the clsact qdiscs of the watched interfaces.

use anyhow::Result;

use crate::datapath::abi::{Config, Direction};
use crate::session::home::{Home, handle};
use crate::session::make;
use crate::session::read::Session;
use crate::session::relay;
use crate::session::resolve::Resolved;
use crate::session::teardown::{self, Target};
use crate::tools::bpftool;
use crate::tools::exec::Runner;
use crate::tools::ip::{self, Link};
use crate::tools::tc::{self, Hooks};

/// Repairs a session that is not whole. Answers `None`, with nothing changed, where it must be made anew; else what is to
/// be said of its interfaces' queues.
pub fn repair(
    runner: &Runner,
    home: &Home,
    session: &Session,
    resolved: &Resolved,
    keep: bool,
) -> Result<Option<Vec<String>>> {
    let names: Vec<&str> = resolved.watched.iter().map(|link| link.ifname.as_str()).collect();
    let hooks = make::free_hooks(runner, &names)?;
    let watched: Vec<(&Link, &Hooks)> = resolved.watched.iter().zip(&hooks).collect();
    if !is_repairable(session, &watched) {
        return Ok(None);
    }
    let lost = if session.faults.is_empty() { "a tap's filter is gone".into() } else { session.faults.join(", ") };
    eprintln!("snifctl: session {} had lost a part ({lost}); putting it back", session.name);
    if !session.faults.is_empty() {
        renew_relay(runner, home, session)?;
    }
    let mut lines = Vec::new();
    for (link, hooks) in &watched {
        let missing = missing(session, link);
        if !missing.is_empty() {
            lines.extend(make::attach(runner, home, &session.name, link, hooks, &missing)?);
        }
    }
    tc::batch(runner, &lines)?;
    let attached = watched.iter().filter(|(link, _)| !missing(session, link).is_empty());
    Ok(Some(attached.filter_map(|(link, hooks)| make::queue_warning(link, hooks, keep)).collect()))
}

/// All that the maps say is there, the interfaces are those that they name, and no other filter stands where one of ours
/// is missing, as after a change of the filter that was killed.
fn is_repairable(session: &Session, watched: &[(&Link, &Hooks)]) -> bool {
    let same = |link: &Link| session.memory.ifindexes.values().any(|ifindex| *ifindex == link.ifindex);
    let is_free = |(link, hooks): &(&Link, &Hooks)| {
        let ours = |direction: &Direction| {
            hooks.filters(*direction).iter().any(|filter| filter.handle() == Some(handle(&session.name)))
        };
        !missing(session, link).iter().any(ours)
    };
    session.has_all_rows() && watched.iter().all(|(link, _)| same(link)) && watched.iter().all(is_free)
}

fn missing(session: &Session, link: &Link) -> Vec<Direction> {
    let taps = session.taps.iter().filter(|tap| tap.key.ifindex == link.ifindex && !tap.attached);
    taps.map(|tap| tap.key.direction).collect()
}

/// A new relay in the place of the old one. Until the last write, copies are counted as lost: `clone`.
fn renew_relay(runner: &Runner, home: &Home, session: &Session) -> Result<()> {
    teardown::remove_relays(runner, &Target::One(&session.name), &ip::links(runner)?)?;
    let links = ip::links(runner)?;
    let (name, [relay, port, peer]) = (relay::free(&links)?, relay::free_indexes(&links));
    let config = Config { relay, port, peer, ..session.config };
    let pins = home.session(&session.name);
    relay::make(runner, &name, &config, &session.name)?;
    relay::connect(runner, &name, &session.name, &pins)?;
    let mut lines = session.memory.updates(&pins.join("maps"), &config)?;
    lines.extend(relay::updates(&pins.join("maps"), &config));
    bpftool::batch(runner, &lines)
}
