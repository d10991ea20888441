//! Next hops in the neighbour table: copies bypass it, so the kernel is told to keep their addresses fresh. What is wanted
//! is remembered before it is done, and undone before it is forgotten: so it is known after any end.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::session::change::{Act, Change};
use crate::session::difference::Wanted;
use crate::session::stored::{Hop, Stored};
use crate::session::there::There;
use crate::tools::ip;

/// The entries that are to be kept, by remote: of those that were not looked up, the ones that are. One that is kept
/// already, and not for us, is somebody else's.
pub(super) fn wanted_hops(wanted: &Wanted, there: &There) -> BTreeMap<IpAddr, Hop> {
    let (ours, before) = (there.hops(), there.stored.as_ref().ok().map(|stored| &stored.neighbours));
    let remembered = |remote: &IpAddr| before?.get(remote).copied();
    let hop = |remote: &IpAddr| {
        if !wanted.remotes.contains_key(remote) {
            return remembered(remote);
        }
        let next = wanted.hops.get(remote)?;
        let own = ours.iter().find(|own| own.is_of(&next.hop)).copied();
        own.or(next.is_unkept.then_some(next.hop))
    };
    let remotes = wanted.request.options.remotes.iter();
    remotes.filter_map(|remote| Some((*remote, hop(remote)?))).collect()
}

/// Has the kernel keep those of the session's entries that it does not. `has_moved`: what is said of a remote says it for
/// a new entry, too.
pub(super) fn keep(wanted: &Wanted, there: &There, target: &Stored, has_moved: bool) -> Vec<Change> {
    let known = there.hops();
    let is_open = |hop: &Hop| wanted.hops.values().find(|next| next.hop.is_of(hop) && next.is_unkept);
    let hops = target.hops();
    let change = |hop: &Hop| {
        let next = is_open(hop)?;
        let keep = Act::Ip(ip::keep_neighbour(hop.address, &next.dev));
        if has_moved && !known.iter().any(|own| own.is_of(hop)) {
            return Some(Change::silent(vec![keep]));
        }
        let subject = format!("neighbour {} on {}", hop.address, next.dev);
        Some(Change::new(subject, "the kernel does not keep it fresh", "managed", vec![keep]))
    };
    hops.iter().filter_map(change).collect()
}

/// Gives up the entries that the session has and the target has not: as they were before it.
pub(super) fn release(there: &There, target: &[Hop]) -> Option<Change> {
    let gone = there.hops().into_iter().filter(|hop| !target.iter().any(|kept| kept.is_of(hop)));
    let act = |hop: Hop| {
        let entry = there.neighbour(&hop).filter(|entry| !entry.is_set())?;
        let line = if hop.made { ip::delete_neighbour } else { ip::let_neighbour_go };
        (hop.made || entry.is_managed()).then(|| Act::Ip(line(hop.address, &entry.dev)))
    };
    let acts: Vec<Act> = gone.filter_map(act).collect();
    (!acts.is_empty()).then(|| Change::silent(acts))
}

/// The entries of a session as it was before a change that has failed.
pub(super) fn back(before: &There, now: &There) -> Vec<Act> {
    let is_kept = |hop: &Hop| now.neighbour(hop).is_some_and(|entry| entry.is_managed() || entry.is_set());
    let lost = before.hops().into_iter().filter(|hop| !is_kept(hop));
    let links = lost.filter_map(|hop| Some((hop.address, now.link(hop.ifindex).filter(|link| link.is_up())?)));
    links.map(|(address, link)| Act::Ip(ip::keep_neighbour(address, &link.ifname))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::tests::request;
    use crate::session::difference::tests::{Kernel, wanted};
    use crate::session::resolve::NextHop;
    use crate::tools::ip::Neighbour;

    const HOP: [u8; 4] = [10, 0, 0, 1];
    const REMOTES: [&str; 2] = ["10.1.0.1", "10.1.0.2"];

    /// A session with the entry for these of its remotes, and what the neighbour table has.
    fn there(remotes: &[&str], made: bool, table: &str) -> There {
        let mut there = Kernel::new().there;
        let mut stored = Stored::new(request(&["eth0", "--remote", &REMOTES.join(",")]));
        let hop = Hop { address: HOP.into(), ifindex: 5, made };
        stored.neighbours = remotes.iter().map(|remote| (remote.parse().unwrap(), hop)).collect();
        there.stored = Ok(stored);
        there.neighbours = serde_json::from_str::<Vec<Neighbour>>(table).unwrap();
        there
    }

    fn entry(more: &str) -> String {
        format!("[{{\"dst\":\"10.0.0.1\",\"dev\":\"out0\",\"lladdr\":\"02:00:00:00:00:09\",{more}}}]")
    }

    fn released(there: &There) -> Vec<Act> {
        release(there, &[]).map(|change| change.acts).unwrap_or_default()
    }

    #[test]
    fn what_was_made_goes_and_what_was_there_stays() {
        let managed = entry("\"managed\":null,\"state\":[\"REACHABLE\"]");
        let line = |line: &str| vec![Act::Ip(line.into())];
        assert_eq!(released(&there(&REMOTES, true, &managed)), line("neigh delete 10.0.0.1 dev out0"));
        assert_eq!(released(&there(&REMOTES, false, &managed)), line("neigh replace 10.0.0.1 dev out0 use"));
        // It is gone, not kept any more, or set by somebody.
        assert_eq!(released(&there(&REMOTES, true, "[]")), []);
        assert_eq!(released(&there(&REMOTES, false, &entry("\"state\":[\"STALE\"]"))), []);
        assert_eq!(released(&there(&REMOTES, true, &entry("\"state\":[\"PERMANENT\"]"))), []);
        assert_eq!(released(&there(&REMOTES, true, &entry("\"extern_learn\":null,\"state\":[\"REACHABLE\"]"))), []);
        // Another remote is behind it.
        let there = there(&REMOTES, true, &managed);
        assert_eq!(release(&there, &there.hops()), None);
    }

    #[test]
    fn an_entry_is_ours_only_if_nobody_keeps_it() {
        let next = |is_unkept| NextHop {
            hop: Hop { address: HOP.into(), ifindex: 5, made: false },
            dev: "out0".into(),
            is_unkept,
        };
        let both = request(&["eth0", "--remote", &REMOTES.join(",")]);
        let remotes = REMOTES.map(|remote| remote.parse::<IpAddr>().unwrap());
        // With a session that has it, how it came to be stays; with none, another's is left alone.
        for (known, is_unkept, expected) in
            [(1, false, Some(true)), (1, true, Some(true)), (0, true, Some(false)), (0, false, None)]
        {
            let there = there(&REMOTES[..known], true, "[]");
            let mut wanted = wanted(&there, both.clone());
            wanted.hops = remotes.iter().map(|remote| (*remote, next(is_unkept))).collect();
            let hops = wanted_hops(&wanted, &there);
            assert_eq!(hops.values().map(|hop| Some(hop.made)).max().flatten(), expected, "{known} {is_unkept}");
            let target = Stored { neighbours: hops, ..Stored::new(both.clone()) };
            assert_eq!(keep(&wanted, &there, &target, false).len(), usize::from(is_unkept), "once, for both remotes");
        }
        // Those that were not looked up keep theirs.
        let there = there(&REMOTES, true, "[]");
        let mut wanted = wanted(&there, both);
        wanted.remotes.remove(&remotes[1]);
        assert_eq!(wanted_hops(&wanted, &there).into_keys().collect::<Vec<_>>(), [remotes[1]]);
    }
}
