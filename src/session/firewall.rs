//! Rules of the bridge family, which see what crosses a relay on its way out of the bridge, and rules at the egress of a
//! relay's own devices: a copy that they drop is lost and counted as `relay`. Read from nft's JSON, of which anything that is not known is passed over.

use std::fmt;
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::session::machine::Machine;
use crate::session::relay;
use crate::tools::exec::{self, Cmd, Runner};
use crate::tools::kernel;

/// What a rule matches where all relays are meant.
const RELAYS: &str = "snif*";

/// A chain that can drop what crosses a relay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Obstacle {
    family: String,
    table: String,
    chain: String,
    /// `policy drop`, or the rule's handle.
    what: String,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Obstacle { family, table, chain, what } = self;
        write!(f, "chain {chain} of nft's table {family} {table} ({what})")
    }
}

impl Obstacle {
    /// The command after which copies pass.
    pub(crate) fn fix(&self) -> String {
        let [table, chain] = [&self.table, &self.chain].map(|name| exec::quote(name));
        match self.family.as_str() {
            "bridge" => format!("nft insert rule bridge {table} {chain} oifname '\"{RELAYS}\"' accept"),
            // A chain of the relay's device alone.
            family => format!("nft insert rule {family} {table} {chain} accept"),
        }
    }

    /// What the user should know, ending with what helps.
    pub(crate) fn warning(&self) -> String {
        format!("{self} can drop copies that cross the relay (counted as relay); let them pass with: {}", self.fix())
    }
}

/// The chains of this namespace that can drop what crosses a relay. Empty where nft is not there or says nothing.
pub(crate) fn obstacles(machine: &Machine) -> Vec<Obstacle> {
    let (runner, chains) = (machine.runner, machine.chains());
    let in_family = |family| {
        let bases = base_chains(chains).filter(move |chain| chain["family"] == family);
        let mut tables: Vec<&str> = bases.filter_map(|chain| chain["table"].as_str()).collect();
        tables.dedup();
        tables.into_iter().flat_map(move |table| in_table(&nft(runner, &["list", "table", family, table])))
    };
    ["bridge", "netdev"].into_iter().flat_map(in_family).collect()
}

/// The objects of each table that has a chain at the hook that the host's own packets meet.
pub(crate) fn at_output(machine: &Machine) -> Vec<Vec<Value>> {
    let runner = machine.runner;
    let own = machine.chains().iter().map(|object| &object["chain"]).filter(|chain| chain["hook"] == "output");
    let tables = own.filter_map(|chain| Some((chain["family"].as_str()?, chain["table"].as_str()?)));
    let mut tables: Vec<(&str, &str)> = tables.filter(|(family, _)| ["ip", "ip6", "inet"].contains(family)).collect();
    tables.sort_unstable();
    tables.dedup();
    tables.into_iter().map(|(family, table)| nft(runner, &["list", "table", family, table])).collect()
}

/// Every chain; none where nft is not there.
pub(crate) fn chains(runner: &Runner) -> Vec<Value> {
    match exec::find("nft").is_some() && may_have_rules() {
        true => nft(runner, &["list", "chains"]),
        false => Vec::new(),
    }
}

/// Asking loads nf_tables where it is a module, and a machine without it has no rules.
fn may_have_rules() -> bool {
    let Ok(modules) = fs::read_to_string("/proc/modules") else { return true };
    let builtin = Path::new("/lib/modules").join(kernel::release()).join("modules.builtin");
    modules.lines().any(|line| line.starts_with("nf_tables "))
        || fs::read_to_string(builtin).is_ok_and(|text| text.contains("/nf_tables.ko"))
}

/// The objects that nft lists.
fn nft(runner: &Runner, words: &[&str]) -> Vec<Value> {
    let text = runner.read(&Cmd::new("nft", ["-j"].iter().chain(words).copied())).unwrap_or_default();
    let mut all: Value = serde_json::from_str(&text).unwrap_or_default();
    match all.get_mut("nftables").map(Value::take) {
        Some(Value::Array(objects)) => objects,
        _ => Vec::new(),
    }
}

/// What leaves a bridge meets the hooks `output` and `postrouting` of its family, and `egress` of the devices.
fn base_chains(objects: &[Value]) -> impl Iterator<Item = &Value> {
    let chains = objects.iter().map(|object| &object["chain"]);
    chains.filter(|chain| match chain["family"].as_str() {
        Some("netdev") => chain["hook"] == "egress" && devices(chain).iter().any(|name| relay::is_name(name)),
        _ => chain["hook"] == "output" || chain["hook"] == "postrouting",
    })
}

/// The devices of a chain: one, or a list.
fn devices(chain: &Value) -> Vec<&str> {
    match chain["dev"].as_array() {
        Some(list) => list.iter().filter_map(Value::as_str).collect(),
        None => chain["dev"].as_str().into_iter().collect(),
    }
}

/// The obstacles in one table, of which these are all objects.
fn in_table(objects: &[Value]) -> Vec<Obstacle> {
    let bases = base_chains(objects);
    bases.filter_map(|chain| obstacle(objects, chain)).collect()
}

fn obstacle(objects: &[Value], chain: &Value) -> Option<Obstacle> {
    let (table, name) = (chain["table"].as_str()?, chain["name"].as_str()?);
    let family = chain["family"].as_str().unwrap_or("bridge");
    let found = |what: String| Some(Obstacle { family: family.into(), table: table.into(), chain: name.into(), what });
    for rule in rules(objects, name).filter(|rule| may_match(rule)) {
        match fate(objects, rule, DEPTH) {
            Fate::Dropped => return found(format!("rule with handle {}", rule["handle"])),
            Fate::Passes if matches_all(rule) => return None,
            Fate::Passes | Fate::Unknown => {}
        }
    }
    if chain["policy"] == "drop" { found("policy drop".into()) } else { None }
}

fn rules<'a>(objects: &'a [Value], chain: &'a str) -> impl Iterator<Item = &'a Value> {
    objects.iter().map(|object| &object["rule"]).filter(move |rule| rule["chain"] == chain)
}

fn statements(rule: &Value) -> impl Iterator<Item = &Value> {
    rule["expr"].as_array().into_iter().flatten()
}

/// How deep chains may lead to one another.
const DEPTH: u32 = 16;

/// What becomes of a packet that a rule matches.
enum Fate {
    Dropped,
    Passes,
    Unknown,
}

fn fate(objects: &[Value], rule: &Value, depth: u32) -> Fate {
    for statement in statements(rule) {
        let Some(verb) = statement.as_object().and_then(|statement| statement.keys().next()) else { continue };
        match verb.as_str() {
            "drop" | "reject" | "queue" => return Fate::Dropped,
            "accept" => return Fate::Passes,
            "jump" | "goto" if depth > 0 => {
                let target = statement[verb]["target"].as_str().unwrap_or_default();
                let mut rules = rules(objects, target).filter(|rule| may_match(rule));
                return match rules.any(|rule| matches!(fate(objects, rule, depth - 1), Fate::Dropped)) {
                    true => Fate::Dropped,
                    false => Fate::Unknown,
                };
            }
            "vmap" if statement.to_string().contains("\"drop\"") => return Fate::Dropped,
            _ => {}
        }
    }
    Fate::Unknown
}

/// Can a rule's matches be true of what crosses a relay? It comes from no port, and leaves by one that is called
/// `snif0l` or the like.
fn may_match(rule: &Value) -> bool {
    !statements(rule).any(|statement| excludes(&statement["match"]))
}

fn excludes(condition: &Value) -> bool {
    let key = condition["left"]["meta"]["key"].as_str().unwrap_or_default();
    let is_equal = condition["op"] == "==" || condition["op"] == "in";
    match key {
        "iifname" | "iif" | "ibrname" => is_equal,
        "oifname" | "oif" => is_equal != names(&condition["right"]).iter().any(|name| is_relays(name)),
        _ => false,
    }
}

/// Does it match all that leaves by a relay's port, and ask nothing else?
fn matches_all(rule: &Value) -> bool {
    let is_harmless = |verb: &String| ["accept", "counter", "log"].contains(&verb.as_str());
    let is_for_all = |found: &Value| found["left"]["meta"]["key"] == "oifname" && found["op"] == "==";
    statements(rule).all(|statement| {
        is_for_all(&statement["match"])
            || statement.as_object().is_some_and(|statement| statement.keys().all(is_harmless))
    })
}

/// The names that a match is compared with: one, or a set.
fn names(right: &Value) -> Vec<&str> {
    match right["set"].as_array() {
        Some(set) => set.iter().filter_map(Value::as_str).collect(),
        None => right.as_str().into_iter().collect(),
    }
}

/// Is this the name of a relay's port, or a beginning of it?
fn is_relays(name: &str) -> bool {
    match name.strip_suffix('*') {
        Some(start) => "snif".starts_with(start) || start.starts_with("snif"),
        None => name.starts_with("snif"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// nft 1.0.6 does not tell the device of an egress chain: then it is passed over.
    #[test]
    fn a_chain_at_the_egress_of_a_relays_device_is_an_obstacle() {
        let chain = |dev: Value| {
            serde_json::json!([{"chain": {"family": "netdev", "table": "t", "name": "c", "hook": "egress", "dev": dev,
                "policy": "drop"}}])
        };
        let found = |dev: Value| in_table(chain(dev).as_array().expect("a list"));
        let fix = found("snif0l".into())[0].fix();
        assert_eq!(fix, "nft insert rule netdev t c accept");
        assert_eq!(found(serde_json::json!(["eth0", "snif0"])).len(), 1);
        assert_eq!((found("eth0".into()), found(Value::Null)), (Vec::new(), Vec::new()));
    }

    use serde_json::json;

    /// A table with the chain `out` at a hook, and these rules in it.
    fn table(hook: &str, policy: &str, rules: &[Value]) -> Vec<Value> {
        let chain = json!({"chain": {"family": "bridge", "table": "t", "name": "out", "type": "filter",
            "hook": hook, "prio": 0, "policy": policy}});
        let rules = rules.iter().map(|expr| json!({"rule": {"table": "t", "chain": "out", "handle": 7, "expr": expr}}));
        [json!({"metainfo": {"version": "1.0.6"}}), chain].into_iter().chain(rules).collect()
    }

    fn found(hook: &str, policy: &str, rules: &[Value]) -> Option<String> {
        in_table(&table(hook, policy, rules)).first().map(|found| found.what.clone())
    }

    fn named(key: &str, op: &str, right: Value) -> Value {
        json!({"match": {"op": op, "left": {"meta": {"key": key}}, "right": right}})
    }

    #[test]
    fn a_policy_and_a_rule_that_drop_are_found_at_the_hooks_of_what_leaves_a_bridge() {
        for hook in ["output", "postrouting"] {
            assert_eq!(found(hook, "drop", &[]).as_deref(), Some("policy drop"));
            assert_eq!(found(hook, "accept", &[json!([{"drop": null}])]).as_deref(), Some("rule with handle 7"));
            assert_eq!(
                found(hook, "accept", &[json!([{"counter": {"packets": 0, "bytes": 0}}, {"accept": null}])]),
                None
            );
        }
        for hook in ["input", "forward", "prerouting"] {
            assert_eq!(found(hook, "drop", &[json!([{"drop": null}])]), None, "{hook}");
        }
    }

    #[test]
    fn a_rule_that_lets_the_relay_pass_first_is_respected() {
        let pass = json!([named("oifname", "==", json!("snif*")), {"accept": null}]);
        let some = json!([named("oifname", "==", json!("snif*")),
            {"match": {"op": "==", "left": {"payload": {"protocol": "ether", "field": "type"}}, "right": "ip"}}, {"accept": null}]);
        let drop = json!([{"drop": null}]);
        assert_eq!(found("output", "drop", std::slice::from_ref(&pass)), None);
        assert_eq!(found("output", "accept", &[pass.clone(), drop.clone()]), None);
        assert!(found("output", "accept", &[drop, pass]).is_some());
        assert!(found("output", "drop", &[some]).is_some());
    }

    #[test]
    fn rules_for_other_interfaces_are_none_of_ours() {
        let drops = |condition: Value| found("output", "accept", &[json!([condition, {"drop": null}])]).is_some();
        assert!(!drops(named("oifname", "==", json!("eth1"))));
        assert!(!drops(named("oifname", "==", json!({"set": ["eth1", "eth2"]}))));
        assert!(!drops(named("oifname", "!=", json!("snif*"))));
        assert!(!drops(named("iifname", "==", json!("eth1"))));
        assert!(drops(named("oifname", "==", json!({"set": ["eth1", "snif0l"]}))));
        assert!(drops(named("oifname", "!=", json!("eth1"))));
        assert!(drops(named("oifname", "==", json!("s*"))));
        assert!(drops(named("mark", "==", json!(1))));
    }

    #[test]
    fn chains_that_a_rule_leads_to_are_looked_at() {
        let mut objects = table("postrouting", "accept", &[json!([{"jump": {"target": "more"}}])]);
        assert_eq!(in_table(&objects), []);
        objects.push(json!({"rule": {"table": "t", "chain": "more", "handle": 9, "expr": [{"drop": null}]}}));
        assert_eq!(in_table(&objects).len(), 1);
        let around = json!([{"goto": {"target": "out"}}]);
        assert_eq!(found("output", "accept", &[around]), None);
    }

    #[test]
    fn what_nft_says_in_another_form_is_passed_over() {
        let odd =
            [json!(null), json!({"chain": 7}), json!({"rule": {"expr": "x"}}), json!({"chain": {"hook": "output"}})];
        assert_eq!(in_table(&odd), []);
        assert_eq!(found("output", "accept", &[json!([null, 7, {"xt": null}])]), None);
    }

    #[test]
    fn a_warning_ends_with_what_helps() {
        let found = in_table(&table("output", "drop", &[])).remove(0);
        assert!(found.warning().ends_with("with: nft insert rule bridge t out oifname '\"snif*\"' accept"), "{found}");
    }
}
