//! Who is before our taps, and can hide packets from them: filters of others, tcx programs, XDP programs, hardware.

use std::fmt;

use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::datapath::abi::Direction;
use crate::session::machine::Machine;
use crate::session::there::There;
use crate::tools::exec::quote;
use crate::tools::ip::Link;
use crate::tools::tc::{Filter, Hooks};

/// As a line.
impl Serialize for Ahead {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.warning())
    }
}

/// One that a packet meets before the tap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ahead {
    pub interface: String,
    pub direction: Direction,
    /// What it is.
    what: String,
    /// What that means.
    means: &'static str,
    /// The command that shows it.
    pub look: String,
}

const HIDES: &str = "it is before the tap and can hide packets from it";

impl fmt::Display for Ahead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ahead { interface, direction, what, means, .. } = self;
        write!(f, "{what} at {interface} {}: {means}", direction.hook())
    }
}

impl Ahead {
    /// What the user should know, ending in what shows more.
    pub(crate) fn warning(&self) -> String {
        format!("{self}; look with: {}", self.look)
    }
}

/// The filters of others that come before a tap, in their order. `pref`: where it will be, if it is not there yet.
pub(crate) fn filters(
    hooks: &Hooks,
    direction: Direction,
    is_ours: impl Fn(&Filter) -> bool,
    pref: u32,
) -> Vec<&Filter> {
    let filters = hooks.filters(direction);
    let ours = filters.iter().position(is_ours);
    let is_before = |at: usize, filter: &Filter| ours.map_or(filter.pref < pref, |ours| at < ours);
    let found = filters.iter().enumerate().filter(|(at, filter)| is_foreign(filter) && is_before(*at, filter));
    found.map(|(_, filter)| filter).collect()
}

/// A filter of none of our sessions, in the chain where each packet begins. Before iproute2 6.0 `tc` tells no names of
/// programs: then a program may be ours.
fn is_foreign(filter: &Filter) -> bool {
    let may_be_ours = filter.id().is_some() && (filter.program().is_empty() || filter.program().starts_with("snif_"));
    filter.options.is_some() && filter.chain == 0 && !may_be_ours
}

/// Everyone who is before a tap that is at this interface, or is to be.
pub(crate) fn of(machine: &Machine, there: &There, link: &Link, direction: Direction) -> Vec<Ahead> {
    let dev = quote(&link.ifname);
    let ahead =
        |what: String, means, look: String| Ahead { interface: link.ifname.clone(), direction, what, means, look };
    let mut found = Vec::new();
    if direction == Direction::Ingress {
        let xdp = xdp(link)
            .into_iter()
            .map(|id| ahead(format!("XDP program {id}"), HIDES, format!("bpftool prog show id {id}")));
        found.extend(xdp);
    }
    let tcx = machine.tcx(link).into_iter().filter(|at| at.kind.ends_with(direction.hook()));
    found.extend(tcx.map(|at| ahead(format!("tcx program {}", at.name), HIDES, format!("bpftool net show dev {dev}"))));
    let Some(hooks) = there.hooks.get(&link.ifindex) else { return found };
    let look = || format!("tc filter show dev {dev} {}", direction.hook());
    let is_tap = |filter: &Filter| there.is_tap(filter, direction);
    for filter in filters(hooks, direction, is_tap, hooks.free_pref(direction)) {
        let name = if filter.program().is_empty() { String::new() } else { format!(" ({})", filter.program()) };
        found.push(ahead(format!("{} filter{name} at preference {}", filter.kind, filter.pref), HIDES, look()));
    }
    let means = "the hardware does it, and what it takes is seen by no tap";
    for filter in hooks.filters(direction).iter().filter(|filter| filter.is_in_hardware()) {
        found.push(ahead(format!("{} filter at preference {}", filter.kind, filter.pref), means, look()));
    }
    if !link.phys_switch_id.is_empty() && link.master.is_some() {
        let means = "what the switch forwards by itself is seen by no tap";
        found.push(ahead("forwarding in hardware".into(), means, format!("bridge -d link show dev {dev}")));
    }
    // A u32 filter is told once more for its hash table.
    found.dedup();
    found
}

/// The numbers of the XDP programs of an interface: one, or one a mode.
pub(crate) fn xdp(link: &Link) -> Vec<u64> {
    programs(&link.xdp)
}

fn programs(xdp: &Value) -> Vec<u64> {
    let id = |at: &Value| at["prog"]["id"].as_u64();
    let all = xdp["attached"].as_array().into_iter().flatten();
    let mut ids: Vec<u64> = all.chain([xdp]).filter_map(id).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn hooks(filters: Value) -> Hooks {
        let ingress = serde_json::from_value(filters).expect("filters");
        Hooks { ingress, ..Hooks::default() }
    }

    fn kinds(hooks: &Hooks, pref: u32) -> Vec<&str> {
        let found = filters(hooks, Direction::Ingress, |filter| filter.program() == "snif_tap_in", pref);
        found.iter().map(|filter| filter.kind.as_str()).collect()
    }

    #[test]
    fn only_filters_of_others_before_the_tap_count() {
        let tap =
            json!({"pref": 2, "kind": "bpf", "options": {"handle": "0x1", "prog": {"id": 7, "name": "snif_tap_in"}}});
        let u32 = json!({"pref": 1, "kind": "u32", "options": {"fh": "800:"}});
        let header = json!({"pref": 1, "kind": "u32"});
        let classic = json!({"pref": 2, "kind": "bpf", "options": {"handle": "0x1", "bytecode": {}}});
        let nameless = json!({"pref": 1, "kind": "bpf", "options": {"handle": "0x9", "prog": {"id": 9}}});
        let chained = json!({"pref": 1, "chain": 4, "kind": "u32", "options": {}});
        let after = json!({"pref": 3, "kind": "matchall", "options": {}});
        let all = hooks(json!([header, u32, chained, nameless, classic, tap, after]));
        assert_eq!(kinds(&all, 1), ["u32", "bpf"]);
        assert_eq!(kinds(&hooks(json!([u32, after])), 2), ["u32"]);
        assert!(kinds(&hooks(json!([tap, u32])), 1).is_empty());
    }

    #[test]
    fn xdp_programs_are_told_in_two_forms() {
        assert_eq!(programs(&json!({"mode": 2, "prog": {"id": 12}})), [12]);
        assert_eq!(programs(&json!({"mode": 4, "attached": [{"prog": {"id": 3}}, {"prog": {"id": 2}}, {}]})), [2, 3]);
        assert!(programs(&Value::Null).is_empty() && programs(&json!({"prog": "x"})).is_empty());
    }
}
