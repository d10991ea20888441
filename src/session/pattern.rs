//! Interfaces by pattern: which of a machine's interfaces a request stands for. Pure.

use std::collections::{BTreeMap, BTreeSet};

use crate::datapath::abi::MAX_TAPS;
use crate::request::{Request, Watch, Watched, ensure_interface_name};
use crate::session::away;
use crate::session::relay;
use crate::session::stored::{Place, Stored};
use crate::tools::ip::Link;
use crate::wildcard::{is_pattern, matches};

/// So many interfaces one session watches.
pub(crate) const MOST: usize = MAX_TAPS as usize / 2;

/// Can it stand for several interfaces?
pub(crate) fn is_set(text: &str) -> bool {
    match away::parts(text) {
        Some((origin, name)) => is_pattern(name) || away::origin_of(origin).1 || origin.starts_with("pods:"),
        None => is_pattern(text),
    }
}

/// Does the pattern match the name, or one of the other names, of this interface?
pub(crate) fn matches_link(pattern: &str, link: &Link) -> bool {
    if let Some((origin, name)) = away::parts(pattern) {
        return link.found_by.iter().any(|(by, at)| by == origin && matches(name, at));
    }
    link.away.is_none() && matches_name(pattern, link)
}

fn matches_name(pattern: &str, link: &Link) -> bool {
    matches(pattern, &link.ifname) || link.altnames.iter().any(|alt| matches(pattern, alt))
}

/// The interface of that name, which may be one of its other names.
pub(crate) fn named<'a>(links: &'a [Link], name: &str) -> Option<&'a Link> {
    links
        .iter()
        .find(|link| link.ifname == name)
        .or_else(|| links.iter().find(|link| link.altnames.iter().any(|alt| alt == name)))
}

/// Is this a pattern here? An interface of that very name wins, also when it was watched and is gone.
pub(crate) fn is_open(text: &str, stored: Option<&Stored>, links: &[Link]) -> bool {
    let is_known = || stored.and_then(|stored| stored.interfaces.get(text)).is_some_and(|at| at.pattern.is_none());
    is_set(text) && !is_known() && named(links, text).is_none()
}

/// Would it be watched if it were named? All but the loopback interface, which is nobody's link.
fn can_be_watched(link: &Link) -> bool {
    let is_own = relay::is_one(link) || link.link_type == "loopback";
    let can_be_told = ensure_interface_name(&link.dev().name).is_ok();
    link.is_ethernet() && !is_own && can_be_told
}

/// Does the pattern match an interface that can be watched?
pub(crate) fn any(pattern: &str, links: &[Link]) -> bool {
    links.iter().any(|link| can_be_watched(link) && matches_link(pattern, link))
}

/// What a request stands for.
#[derive(Debug, Default)]
pub(crate) struct Expanded {
    /// In the order of the request; of a pattern what it matches, by ifindex. No link: what is named is not there, or the
    /// pattern matches nothing.
    pub interfaces: Vec<(Watched, Option<Link>)>,
    /// Interfaces that a pattern matches, and that one session has no room for.
    pub left_out: usize,
}

/// The interfaces of a request, each with its link where it is there. A name goes by the number that the session knows, else
/// by name. What is named is not taken by a pattern too; what two patterns match is watched in the directions of both.
pub(crate) fn expand(request: &Request, stored: Option<&Stored>, links: &[Link]) -> Expanded {
    let known = |name: &str| {
        let ifindex = stored?.interfaces.get(name)?.ifindex;
        let link = links.iter().find(|link| link.ifindex == ifindex)?;
        (link.ifname == name || link.altnames.iter().any(|alt| alt == name)).then_some(link)
    };
    // One that was waited for can be anything.
    let is_fit = |link: &&Link| link.is_ethernet() && !relay::is_one(link);
    let link = |name: &str| known(name).or_else(|| named(links, name)).filter(is_fit);
    let is_open = |watched: &&Watched| is_open(&watched.interface, stored, links);
    let (open, closed): (Vec<&Watched>, Vec<&Watched>) = request.interfaces.iter().partition(is_open);
    let taken: BTreeSet<u32> = closed.iter().filter_map(|at| Some(link(&at.interface)?.ifindex)).collect();
    let is_matched = |link: &&Link| open.iter().any(|at| matches_link(&at.interface, link));
    let free = links.iter().filter(|link| !open.is_empty() && !taken.contains(&link.ifindex) && can_be_watched(link));
    let mut matched: BTreeMap<u32, &Link> = free.filter(is_matched).map(|link| (link.ifindex, link)).collect();
    let most = request.options.max_taps.map_or(MOST, |most| (most as usize).min(MOST));
    let room = most.saturating_sub(closed.len());
    let left_out = matched.len().saturating_sub(room);
    while matched.len() > room {
        matched.pop_last();
    }
    let mut interfaces = Vec::new();
    for watched in &request.interfaces {
        if !is_open(&watched) {
            interfaces.push((watched.clone(), link(&watched.interface).cloned()));
            continue;
        }
        let own: Vec<u32> =
            matched.values().filter(|at| matches_link(&watched.interface, at)).map(|at| at.ifindex).collect();
        for found in own.iter().filter_map(|ifindex| matched.remove(ifindex)) {
            let directions = open.iter().filter(|at| matches_link(&at.interface, found)).map(|at| at.direction);
            let direction = directions.reduce(Watch::with).unwrap_or(watched.direction);
            interfaces.push((Watched { interface: found.ifname.clone(), direction }, Some(found.clone())));
        }
        let is_of_another =
            || interfaces.iter().any(|(_, at)| at.as_ref().is_some_and(|at| matches_link(&watched.interface, at)));
        if own.is_empty() && !is_of_another() {
            interfaces.push((watched.clone(), None));
        }
    }
    Expanded { interfaces, left_out }
}

/// The pattern by which an interface came into a session; none where the request has its name.
pub(crate) fn of<'a>(request: &'a Request, name: &str, link: &Link) -> Option<&'a str> {
    if request.interfaces.iter().any(|watched| watched.interface == name) {
        return None;
    }
    let mut all = request.interfaces.iter().map(|watched| watched.interface.as_str()).filter(|text| is_set(text));
    all.find(|text| matches_link(text, link))
}

/// Is this one of the interfaces of a pattern, by what it is called now, or by what it was when it was last looked at?
pub(crate) fn stands_for(pattern: &str, name: &str, place: &Place, link: Option<&Link>) -> bool {
    place.pattern.is_some()
        && is_set(pattern)
        && (place.pattern.as_deref() == Some(pattern)
            || matches(pattern, name)
            || link.is_some_and(|link| matches_link(pattern, link)))
}

/// The directions in which the request wants a place to be watched; none where it does not.
pub(crate) fn directions(request: &Request, name: &str, place: &Place, link: Option<&Link>) -> Option<Watch> {
    if let Some(watched) = request.interfaces.iter().find(|watched| watched.interface == name) {
        return Some(watched.direction);
    }
    let own = request.interfaces.iter().filter(|at| stands_for(&at.interface, name, place, link));
    own.map(|watched| watched.direction).reduce(Watch::with)
}

/// The names in the request for which there is nothing yet: interfaces that were never there, patterns that match none.
pub(crate) fn waiting(stored: &Stored, links: &[Link]) -> Vec<Watched> {
    let places = || stored.interfaces.iter();
    let link = |place: &Place| links.iter().find(|link| link.ifindex == place.ifindex);
    let is_there = |at: &Watched| match is_open(&at.interface, Some(stored), links) {
        true => places().any(|(name, place)| stands_for(&at.interface, name, place, link(place))),
        false => stored.interfaces.contains_key(&at.interface),
    };
    stored.request.interfaces.iter().filter(|watched| !is_there(watched)).cloned().collect()
}

#[cfg(test)]
#[path = "pattern_test.rs"]
mod tests;
