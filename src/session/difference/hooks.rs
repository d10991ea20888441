//! What is at the hooks of watched interfaces.

use crate::datapath::abi::Direction;
use crate::datapath::parts::Program;
use crate::request::Watch;
use crate::session::change::{Act, Change, From};
use crate::session::difference::{Clsact, Wanted};
use crate::session::there::{There, key};
use crate::tools::ip::Link;
use crate::tools::tc::Hooks;

/// Notes of the clsact qdiscs that are about to be added.
pub(super) fn marks(wanted: &Wanted, there: &There) -> Vec<Act> {
    let links = wanted.interfaces.iter().filter_map(|(_, link)| link.as_ref());
    let lacks = |link: &&Link| {
        let hooks = there.hooks.get(&link.ifindex);
        hooks.is_some_and(|hooks| !hooks.gone && !hooks.has_qdisc("clsact") && !hooks.has_qdisc("ingress"))
    };
    let is_ours = |link: &&Link| link.away.is_none();
    links.filter(lacks).filter(is_ours).map(|link| Act::Mark(link.ifindex)).collect()
}

/// The end of these notes: the qdiscs themselves are marked. With [`Clsact::Leave`], those of the watched interfaces are not
/// ours any more.
pub(super) fn unmarks(wanted: &Wanted, there: &There) -> Vec<Act> {
    let links = wanted.interfaces.iter().filter_map(|(_, link)| link.as_ref());
    let (mut acts, mut notes) = (Vec::new(), Vec::new());
    for link in links {
        let Some(hooks) = there.hooks.get(&link.ifindex).filter(|hooks| !hooks.gone) else { continue };
        if hooks.has_qdisc("ingress") {
            continue;
        }
        let (ifindex, dev, is_new) = (link.ifindex, link.dev(), !hooks.has_qdisc("clsact"));
        let is_noted = there.notes.contains(&ifindex);
        if wanted.clsact == Clsact::Leave && (is_new || hooks.marked) {
            acts.push(Act::DelMark { ifindex, dev });
        } else if wanted.clsact == Clsact::Remove && is_noted && !is_new && !hooks.marked {
            acts.push(Act::AddMark { ifindex, dev });
        }
        if (is_new && link.away.is_none()) || is_noted {
            notes.push(Act::Unmark(ifindex));
        }
    }
    acts.append(&mut notes);
    acts
}

/// What is told of an interface that cannot have taps.
pub(super) fn taken(link: &Link) -> Change {
    Change::new(
        format!("taps of {}", link.ifname),
        "an `ingress` qdisc is where clsact must go",
        format!("if nothing needs it, remove it with: tc qdisc del dev {} ingress", link.ifname),
        Vec::new(),
    )
}

pub(super) fn attach_all(there: &There, link: &Link, watch: Watch) -> Change {
    let hooks = there.hooks.get(&link.ifindex);
    if hooks.is_some_and(|hooks| hooks.has_qdisc("ingress")) {
        return taken(link);
    }
    let mut acts = Vec::new();
    if hooks.is_none_or(|hooks| !hooks.has_qdisc("clsact")) {
        acts.push(Act::AddClsact { ifindex: link.ifindex, dev: link.dev(), is_ours: true });
    }
    acts.extend(watch.directions().iter().map(|direction| attach(there, link, *direction, From::Session)));
    Change::new(format!("taps of {}", link.ifname), "they are not there", "attached", acts)
}

pub(super) fn attach(there: &There, link: &Link, direction: Direction, from: From) -> Act {
    let pref =
        there.hooks.get(&link.ifindex).map_or(crate::tools::tc::FIRST_PREF, |hooks| free_pref(there, hooks, direction));
    let program = Program::tap(direction);
    Act::Attach { ifindex: link.ifindex, dev: link.dev(), direction, pref, program, from }
}

/// The lowest preference that our filter can take: before all others, unless another kind sits there, or a stranger has
/// our handle there.
pub(super) fn free_pref(there: &There, hooks: &Hooks, direction: Direction) -> u32 {
    let handle = crate::session::home::handle(&there.name);
    let taken = |pref| {
        let filters = hooks.filters(direction).iter().filter(|filter| filter.pref == pref);
        filters
            .into_iter()
            .any(|filter| filter.kind != "bpf" || filter.handle() == Some(handle) && !there.is_ours(filter))
    };
    (hooks.free_pref(direction)..).find(|pref| !taken(*pref)).unwrap_or(1)
}

pub(super) fn detach(there: &There, link: &Link, goes: impl Fn(Direction) -> bool) -> Vec<Act> {
    let directions = [Direction::Ingress, Direction::Egress].into_iter().filter(|direction| goes(*direction));
    let at = |direction: Direction| {
        let dev = link.dev();
        there.taps_at(key(link.ifindex, direction)).into_iter().map(move |(pref, _)| Act::Detach {
            ifindex: link.ifindex,
            dev: dev.clone(),
            direction,
            pref,
        })
    };
    directions.flat_map(at).collect()
}
