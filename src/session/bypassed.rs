//! What would hold or encrypt the host's own packets to a collector, and does not see copies: they are made below IPsec and
//! below the firewall's output. Of both only what surely matches is told.

use std::fmt;
use std::net::IpAddr;

use serde_json::Value;

use crate::session::firewall;
use crate::session::machine::Machine;
use crate::tools::exec::Cmd;

/// The outer packets of copies to one remote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Flow {
    pub source: IpAddr,
    pub remote: IpAddr,
    pub out: String,
    /// UDP destination port; 0 for GRE.
    pub port: u16,
}

/// What copies bypass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bypassed {
    remote: IpAddr,
    what: String,
    would: &'static str,
}

impl fmt::Display for Bypassed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Bypassed { remote, what, would } = self;
        write!(
            f,
            "{what} would {would} the host's own packets to {remote}, but copies leave below it, as they are; where that must \
             not be, send them through WireGuard (docs/tunnels.md), or end it with: snifctl remote remove {remote}"
        )
    }
}

/// What the outer packets of these flows bypass.
pub(crate) fn of(machine: &Machine, flows: &[Flow]) -> Vec<Bypassed> {
    if flows.is_empty() {
        return Vec::new();
    }
    let policies = policies(&machine.runner.read(&Cmd::new("ip", ["xfrm", "policy"])).unwrap_or_default());
    let chains = firewall::at_output(machine);
    flows.iter().flat_map(|flow| by_policy(&policies, flow).into_iter().chain(by_chains(&chains, flow))).collect()
}

// ---- IPsec ----

/// An outgoing policy of IPsec, from the text of `ip xfrm policy`: it has no JSON.
#[derive(Debug, Default)]
struct Policy {
    /// `src 10.0.0.0/8 dst 0.0.0.0/0 proto gre`.
    selector: String,
    is_outgoing: bool,
    priority: u64,
    is_block: bool,
    is_template: bool,
}

fn policies(text: &str) -> Vec<Policy> {
    let mut all: Vec<Policy> = Vec::new();
    for line in text.lines() {
        if line.starts_with("src ") {
            all.push(Policy { selector: line.trim().into(), ..Policy::default() });
            continue;
        }
        let Some(policy) = all.last_mut() else { continue };
        let words: Vec<&str> = line.split_whitespace().collect();
        policy.is_outgoing |= words.first() == Some(&"dir") && words.get(1) == Some(&"out");
        policy.is_block |= value(&words, "action") == Some("block");
        policy.is_template |= words.first() == Some(&"tmpl");
        policy.priority = value(&words, "priority").and_then(|n| n.parse().ok()).unwrap_or(policy.priority);
    }
    all.retain(|policy| policy.is_outgoing);
    all
}

/// The word behind a name.
fn value<'a>(words: &[&'a str], name: &str) -> Option<&'a str> {
    let at = words.iter().position(|word| *word == name)?;
    words.get(at + 1).copied()
}

/// The policy in force for a flow, if it does something.
fn by_policy(policies: &[Policy], flow: &Flow) -> Option<Bypassed> {
    let matching = policies.iter().filter(|policy| selects(&policy.selector, flow));
    let first = matching.min_by_key(|policy| policy.priority)?;
    let would = match (first.is_block, first.is_template) {
        (true, _) => "hold",
        (_, true) => "encrypt",
        _ => return None,
    };
    Some(Bypassed { remote: flow.remote, what: format!("the IPsec policy `{}`", first.selector), would })
}

fn selects(selector: &str, flow: &Flow) -> bool {
    let words: Vec<&str> = selector.split_whitespace().collect();
    let covers = |name, address| value(&words, name).and_then(|text| is_in(text, address)) == Some(true);
    let is_port = |port: &str| flow.port.to_string() == port;
    covers("src", flow.source)
        && covers("dst", flow.remote)
        && value(&words, "proto").is_none_or(|name| is_protocol(name, flow))
        && value(&words, "dport").is_none_or(is_port)
        && value(&words, "sport").is_none()
        && value(&words, "dev").is_none_or(|dev| dev == flow.out)
}

fn is_protocol(name: &str, flow: &Flow) -> bool {
    let names: &[&str] = if flow.port == 0 { &["gre", "47"] } else { &["udp", "17"] };
    names.contains(&name)
}

/// Is an address in this one, or in this net? `None` where the text is neither.
fn is_in(text: &str, address: IpAddr) -> Option<bool> {
    let (net, length) = match text.split_once('/') {
        Some((net, length)) => (net.parse::<IpAddr>().ok()?, length.parse::<u32>().ok()?),
        None => (text.parse().ok()?, 128),
    };
    let bits = |address: IpAddr| match address {
        IpAddr::V4(address) => (u128::from(u32::from(address)) << 96, 32),
        IpAddr::V6(address) => (u128::from(address), 128),
    };
    let ((net_bits, most), (own, _)) = (bits(net), bits(address));
    let shift = 128 - length.min(most);
    let cut = |value: u128| value.checked_shr(shift).unwrap_or(0);
    Some(net.is_ipv6() == address.is_ipv6() && cut(net_bits) == cut(own))
}

// ---- nft ----

/// What becomes of the flow in a chain, as far as that is sure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Passes,
    Dropped,
    /// The end of the chain is reached.
    GoesOn,
    Unknown,
}

/// How deep chains may lead to one another.
const DEPTH: u32 = 16;

/// `tables`: the objects of each table that has a chain at the hook `output`.
fn by_chains(tables: &[Vec<Value>], flow: &Flow) -> Vec<Bypassed> {
    let mut found = Vec::new();
    for objects in tables {
        for chain in objects.iter().map(|object| &object["chain"]).filter(|chain| chain["hook"] == "output") {
            let (family, table, name) = (text(&chain["family"]), text(&chain["table"]), text(&chain["name"]));
            if family == if flow.remote.is_ipv6() { "ip" } else { "ip6" } || chain["type"] == "nat" {
                continue;
            }
            let fate = match in_chain(objects, name, flow, DEPTH) {
                Fate::GoesOn if chain["policy"] == "drop" => Fate::Dropped,
                fate => fate,
            };
            if fate == Fate::Dropped {
                let what = format!("chain {name} of nft's table {family} {table}");
                found.push(Bypassed { remote: flow.remote, what, would: "hold" });
            }
        }
    }
    found
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn in_chain(objects: &[Value], chain: &str, flow: &Flow, depth: u32) -> Fate {
    let rules = objects.iter().map(|object| &object["rule"]).filter(|rule| rule["chain"] == chain);
    for rule in rules {
        match in_rule(objects, rule, flow, depth) {
            Fate::GoesOn => {}
            fate => return fate,
        }
    }
    Fate::GoesOn
}

/// A rule whose match is not sure is passed over where it drops, and ends the look where it accepts.
fn in_rule(objects: &[Value], rule: &Value, flow: &Flow, depth: u32) -> Fate {
    let mut is_sure = true;
    for statement in rule["expr"].as_array().into_iter().flatten() {
        let Some((verb, what)) = statement.as_object().and_then(|statement| statement.iter().next()) else {
            is_sure = false;
            continue;
        };
        let fate = match verb.as_str() {
            "match" => match is_match(what, flow) {
                Some(true) => continue,
                Some(false) => return Fate::GoesOn,
                None => {
                    is_sure = false;
                    continue;
                }
            },
            "counter" | "log" | "comment" => continue,
            "accept" => Fate::Passes,
            "drop" | "reject" => Fate::Dropped,
            "return" => Fate::Unknown,
            "jump" | "goto" if depth > 0 => in_chain(objects, text(&what["target"]), flow, depth - 1),
            _ => {
                is_sure = false;
                continue;
            }
        };
        return match fate {
            _ if is_sure => fate,
            Fate::Dropped | Fate::GoesOn => Fate::GoesOn,
            _ => Fate::Unknown,
        };
    }
    Fate::GoesOn
}

/// Does a match hold for the flow? `None` where that cannot be said.
fn is_match(condition: &Value, flow: &Flow) -> Option<bool> {
    let (left, right) = (&condition["left"], &condition["right"]);
    let payload = |protocol: &[&str], field: &str| {
        protocol.contains(&text(&left["payload"]["protocol"])) && left["payload"]["field"] == field
    };
    let family = if flow.remote.is_ipv6() { "ip6" } else { "ip" };
    let holds = if payload(&["ip", "ip6"], "daddr") || payload(&["ip", "ip6"], "saddr") {
        let is_source = left["payload"]["field"] == "saddr";
        let address = if is_source { flow.source } else { flow.remote };
        match left["payload"]["protocol"] == family {
            true => any(right, &|one| covers(one, address))?,
            false => return Some(false),
        }
    } else if left["meta"]["key"] == "l4proto" || payload(&["ip"], "protocol") || payload(&["ip6"], "nexthdr") {
        any(right, &|one| Some(is_protocol(&one.to_string().replace('"', ""), flow)))?
    } else if payload(&["udp"], "dport") {
        flow.port != 0 && any(right, &|one| is_number(one, flow.port))?
    } else if ["tcp", "icmp", "icmpv6", "sctp"].contains(&text(&left["payload"]["protocol"])) {
        return Some(false);
    } else if ["oif", "oifname"].contains(&text(&left["meta"]["key"])) {
        any(right, &|one| Some(is_name(text(one), &flow.out)))?
    } else if left["meta"]["key"] == "nfproto" {
        any(right, &|one| Some(text(one) == if flow.remote.is_ipv6() { "ipv6" } else { "ipv4" }))?
    } else if left["ct"]["key"] == "state" {
        any(right, &|one| Some(text(one) == "new"))?
    } else {
        return None;
    };
    match text(&condition["op"]) {
        "==" | "in" => Some(holds),
        "!=" => Some(!holds),
        _ => None,
    }
}

/// Does it hold for one value, or for one of a set or list?
fn any(right: &Value, holds: &dyn Fn(&Value) -> Option<bool>) -> Option<bool> {
    let list = right["set"].as_array().or(right.as_array());
    let Some(list) = list else { return holds(right) };
    let answers: Vec<Option<bool>> = list.iter().map(holds).collect();
    match answers.contains(&Some(true)) {
        true => Some(true),
        false if answers.contains(&None) => None,
        false => Some(false),
    }
}

fn covers(one: &Value, address: IpAddr) -> Option<bool> {
    if let Some(text) = one.as_str() {
        return is_in(text, address);
    }
    if let (Some(net), Some(length)) = (one["prefix"]["addr"].as_str(), one["prefix"]["len"].as_u64()) {
        return is_in(&format!("{net}/{length}"), address);
    }
    let range = one["range"].as_array()?;
    let end = |at: usize| range.get(at)?.as_str()?.parse::<IpAddr>().ok();
    Some((end(0)?..=end(1)?).contains(&address))
}

fn is_number(one: &Value, port: u16) -> Option<bool> {
    if let Some(range) = one["range"].as_array() {
        let end = |at: usize| range.get(at)?.as_u64();
        return Some((end(0)?..=end(1)?).contains(&port.into()));
    }
    one.as_u64().map(|number| number == u64::from(port))
}

fn is_name(pattern: &str, name: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == name, |start| name.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn flow() -> Flow {
        let [source, remote] = ["198.51.100.1", "198.51.100.2"].map(|text| text.parse().expect("an address"));
        Flow { source, remote, out: "out0".into(), port: 0 }
    }

    const POLICIES: &str = "\
src 198.51.100.1/32 dst 198.51.100.2/32 proto gre
\tdir out priority 10 ptype main
\ttmpl src 198.51.100.1 dst 198.51.100.2
\t\tproto esp reqid 0 mode transport
src 0.0.0.0/0 dst 198.51.100.0/24
\tdir out action block priority 20 ptype main
src 0.0.0.0/0 dst 198.51.100.0/24
\tdir in action block priority 0 ptype main
odd line
";

    #[test]
    fn the_first_policy_that_selects_the_flow_counts() {
        let all = policies(POLICIES);
        let told = |flow: &Flow| by_policy(&all, flow).map(|found| found.would);
        assert_eq!(told(&flow()), Some("encrypt"));
        assert_eq!(told(&Flow { port: 4789, ..flow() }), Some("hold"));
        assert_eq!(told(&Flow { remote: "203.0.113.1".parse().unwrap(), ..flow() }), None);
        assert_eq!(told(&Flow { remote: "2001:db8::1".parse().unwrap(), ..flow() }), None);
        assert!(policies("").is_empty() && policies("dir out\nsrc").is_empty());
        let allowed = policies("src 0.0.0.0/0 dst 0.0.0.0/0\n\tdir out priority 1\n");
        assert_eq!(by_policy(&allowed, &flow()), None, "it does nothing");
    }

    fn table(policy: &str, rules: &[Value]) -> Vec<Value> {
        let chain = json!({"chain": {"family": "inet", "table": "t", "name": "out", "type": "filter", "hook": "output",
            "prio": 0, "policy": policy}});
        let rules = rules.iter().map(|expr| json!({"rule": {"table": "t", "chain": "out", "expr": expr}}));
        [chain].into_iter().chain(rules).collect()
    }

    fn held(policy: &str, rules: &[Value]) -> bool {
        !by_chains(&[table(policy, rules)], &flow()).is_empty()
    }

    fn to(op: &str, right: Value) -> Value {
        json!({"match": {"op": op, "left": {"payload": {"protocol": "ip", "field": "daddr"}}, "right": right}})
    }

    #[test]
    fn rules_that_surely_match_are_told() {
        let drop = json!({"drop": null});
        let net = json!({"prefix": {"addr": "198.51.100.0", "len": 24}});
        assert!(held("accept", &[json!([to("==", net.clone()), drop])]));
        assert!(held(
            "accept",
            &[json!([to("==", json!({"set": ["10.0.0.1", "198.51.100.2"]})), {"counter": {}}, drop])]
        ));
        assert!(!held("accept", &[json!([to("!=", net.clone()), drop])]));
        assert!(!held("accept", &[json!([to("==", json!("@set")), drop])]));
        assert!(held("drop", &[]) && !held("accept", &[]));
        assert!(!held("drop", &[json!([to("==", net), {"accept": null}])]));
        let state =
            json!({"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established", "related"]}});
        assert!(held("drop", &[json!([state, {"accept": null}])]), "no copy belongs to a connection");
        let mark = json!({"match": {"op": "==", "left": {"meta": {"key": "mark"}}, "right": 1}});
        assert!(!held("drop", &[json!([mark, {"accept": null}])]), "it may be accepted");
        assert!(!held("accept", &[json!([mark, {"drop": null}])]));
        let tcp =
            json!({"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": 22}});
        assert!(!held("accept", &[json!([tcp, {"reject": null}])]));
        let gre = json!({"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": "gre"}});
        assert!(held("accept", &[json!([gre, {"reject": {"type": "icmpx"}}])]));
    }

    #[test]
    fn chains_that_a_rule_leads_to_are_followed_and_odd_ones_are_passed_over() {
        let mut objects = table("accept", &[json!([{"jump": {"target": "more"}}])]);
        assert!(by_chains(&[objects.clone()], &flow()).is_empty());
        objects.push(json!({"rule": {"table": "t", "chain": "more", "expr": [{"drop": null}]}}));
        assert_eq!(by_chains(&[objects], &flow()).len(), 1);
        assert!(!held("accept", &[json!(null), json!([null, 7, {"xt": null}]), json!([{"goto": {"target": "out"}}])]));
        let odd = vec![json!(null), json!({"chain": 7}), json!({"chain": {"hook": "output", "policy": 3}})];
        assert!(by_chains(&[odd], &flow()).is_empty());
    }

    #[test]
    fn nets_hold_their_addresses() {
        let is_in = |net: &str, address: &str| is_in(net, address.parse().unwrap());
        assert_eq!(is_in("10.0.0.0/8", "10.255.0.1"), Some(true));
        assert_eq!(is_in("10.0.0.0/8", "11.0.0.1"), Some(false));
        assert_eq!(is_in("0.0.0.0/0", "11.0.0.1"), Some(true));
        assert_eq!(is_in("0.0.0.0/0", "::1"), Some(false));
        assert_eq!(is_in("2001:db8::/32", "2001:db8:7::1"), Some(true));
        assert_eq!(is_in("@set", "11.0.0.1"), None);
    }
}
