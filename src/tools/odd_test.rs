//! What tools said, with one member changed at random: the others are read as before, and nothing panics.

use std::fmt::Debug;

use serde_json::{Value, json};

use crate::tools::ip::{self, Link, Neighbour, RouteReply};
use crate::tools::{bpftool, json as lists, tc};

/// The same numbers each time.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n.max(1)
    }
}

fn odd(random: &mut Random, value: &Value) -> Value {
    match random.below(8) {
        0 => Value::Null,
        1 => json!(-1),
        2 => json!(1e300),
        3 => json!("\u{1}\u{fffd}\"'[{"),
        4 => json!([[value, null], {}]),
        5 => json!({ "new": value }),
        6 => json!(u64::MAX),
        _ => value.as_u64().map_or_else(|| json!(7), |number| json!(number.to_string())),
    }
}

/// Changes one value somewhere in this one.
fn mutate(random: &mut Random, value: &mut Value) {
    let deeper = random.below(3) > 0;
    match value {
        Value::Object(fields) if deeper && !fields.is_empty() => {
            let key = fields.keys().nth(random.below(fields.len())).cloned().unwrap_or_default();
            match random.below(4) {
                0 => drop(fields.remove(&key)),
                1 => drop(fields.insert("a new one".into(), json!([{}]))),
                _ => mutate(random, &mut fields[&key]),
            }
        }
        Value::Array(members) if deeper && !members.is_empty() => {
            let at = random.below(members.len());
            match random.below(4) {
                0 => members.truncate(at),
                _ => mutate(random, &mut members[at]),
            }
        }
        value => *value = odd(random, value),
    }
}

/// What each member says is as it was, but for the one that has changed.
fn assert_others<T: Debug>(text: &str, read: impl Fn(Vec<Value>) -> Vec<T>) {
    let mut random = Random(15);
    let shown = |members: Vec<Value>| read(members).iter().map(|read| format!("{read:?}")).collect::<Vec<_>>();
    for list in lists::lists(text, "it").unwrap() {
        let alone: Vec<Vec<String>> = list.iter().map(|member| shown(vec![member.clone()])).collect();
        for _ in 0..400 {
            let mut odd = list.clone();
            let at = random.below(odd.len());
            if let Some(member) = odd.get_mut(at) {
                mutate(&mut random, member);
            }
            let mut found = shown(odd.clone()).into_iter();
            let others = alone.iter().enumerate().filter(|(other, _)| *other != at).flat_map(|(_, shown)| shown);
            for other in others {
                assert!(found.any(|found| found == *other), "{other} in {}", json!(odd));
            }
            odd.iter_mut().for_each(|member| mutate(&mut random, member));
            shown(odd);
        }
    }
}

macro_rules! fixtures {
    ($tool:literal, $name:literal, $($version:literal),*) => {
        [$(include_str!(concat!("../../tests/fixtures/", $tool, "-", $version, "/", $name))),*]
    };
}

#[test]
fn an_odd_member_spoils_no_other_that_ip_and_tc_tell() {
    for text in fixtures!("iproute2", "ip-link.json", "5.10", "6.1", "6.15", "7.3") {
        assert_others(text, lists::known::<Link>);
    }
    for text in fixtures!("iproute2", "ip-neigh.json", "5.10", "6.1", "6.15", "7.3") {
        assert_others(text, lists::known::<Neighbour>);
    }
    for text in fixtures!("iproute2", "ip-routes.json", "5.10", "6.1", "6.15", "7.3") {
        assert_others(text, lists::known::<RouteReply>);
    }
    for text in fixtures!("iproute2", "tc-hooks.json", "5.10", "6.1", "6.15", "7.3") {
        assert_others(text, tc::filters);
        assert_others(text, lists::known::<tc::Qdisc>);
    }
}

#[test]
fn an_odd_member_spoils_no_other_that_bpftool_tells() {
    let more = r#"[{"devname":"d0","ifindex":8,"kind":"clsact/ingress"},{"devname":"e","ifindex":3,"kind":"clsact/ingress",
        "name":"snif_tap_in","id":5},{"ifindex":9,"kind":"tcx/ingress","name":"x","prog_id":7,"link_id":8}]"#;
    assert_others(more, |tc| bpftool::attachments(&json!([{"xdp": [], "tc": tc}])).unwrap());
    let mut random = Random(1);
    for text in fixtures!("bpftool", "batch.json", "7.1", "7.5", "7.8") {
        let answers: Value = serde_json::from_str(text).unwrap();
        for answer in answers.as_array().unwrap().iter().map(|answer| &answer["output"]) {
            for _ in 0..400 {
                let mut odd = answer.clone();
                mutate(&mut random, &mut odd);
                let _ = (bpftool::attachments(&odd), bpftool::formatted(&odd), bpftool::rows(odd));
            }
        }
    }
}

#[test]
fn a_classic_filter_has_no_program_and_is_a_filter_all_the_same() {
    let shown = r#"[{"protocol":"all","pref":5,"kind":"bpf","chain":0},{"protocol":"all","pref":5,"kind":"bpf","chain":0,
        "options":{"handle":"0x1","not_in_hw":true,"bytecode":{"length":1,"insns":[{"code":6,"jt":0,"jf":0,"k":1}]}}},null]"#;
    let filters = tc::filters(serde_json::from_str(shown).unwrap());
    let seen: Vec<_> = filters.iter().map(|filter| (filter.pref, filter.handle(), filter.id())).collect();
    assert_eq!(seen, [(5, None, None), (5, Some(1), None), (0, None, None)]);
    assert!(filters[2].options.is_some(), "one that cannot be read is somebody's");
}

#[test]
fn a_links_odd_field_is_unknown_and_the_rest_of_it_is_read() {
    let text = r#"[{"ifindex":7,"ifname":"b","mtu":"1500","flags":["UP",7],"altnames":{},"linkinfo":{"info_kind":3,
        "info_data":{"id":1}},"link":9,"address":null,"stats64":[]}]"#;
    let link = &lists::members::<Link>(text, "ip link").unwrap()[0];
    assert_eq!((link.mtu, link.is_up(), link.kind(), link.lower(), link.mac()), (0, true, "", None, None));
    assert_eq!(link.linkinfo.info_data["id"], 1);
    assert!(ip::find(std::slice::from_ref(link), 7).is_some());
}
