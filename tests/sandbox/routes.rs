//! Which way copies leave: what policy routing, ports and next hops choose, and whom the neighbour table names.

use crate::lab::capture::Direction;
use crate::lab::faults::{Bench, Fault};
use crate::lab::frames::{self, Ends, Mac};
use crate::lab::{COLLECTOR_IP, COLLECTOR_MAC, Lab, Ns, PATIENCE, mac_text, poll};

const SECOND_MAC: Mac = [2, 0, 0, 0, 3, 2];

/// A lab with a second uplink: out1 here, 203.0.113.1, and col1 at the collector, 203.0.113.2. The main table has a route
/// to 10.9.0.0/16 by the first; table 7 by the second.
fn two_uplinks() -> Lab {
    let lab = Lab::roomy();
    let (collector, mac) = (lab.ns_name(Ns::Collector), mac_text(SECOND_MAC));
    let links = [
        format!("link add out1 mtu 9000 type veth peer name col1 address {mac} mtu 9000 netns {collector}"),
        "link set out1 addrgenmode none".into(),
        "address add 203.0.113.1/24 dev out1".into(),
        "address add 2001:db8:3::1/64 dev out1 nodad".into(),
        "link set out1 up".into(),
    ];
    lab.ip_batch(Ns::Host, &links.join("\n"));
    lab.ip_batch(Ns::Collector, "link set col1 addrgenmode none\nlink set col1 up");
    for (ns, dev) in [(Ns::Host, "out1"), (Ns::Collector, "col1")] {
        let shown = || String::from_utf8_lossy(&lab.run(ns, &["ip", "link", "show", "dev", dev]).stdout).into_owned();
        assert!(poll(PATIENCE, || shown().contains("state UP").then_some(())).is_some(), "{}", shown());
        lab.offloads_off(ns, dev);
    }
    let lines = [
        format!("neigh replace 203.0.113.2 lladdr {mac} nud permanent dev out1"),
        format!("neigh replace 2001:db8:3::2 lladdr {mac} nud permanent dev out1"),
        format!("neigh replace fe80::5 lladdr {mac} nud permanent dev out1"),
        format!("route add 10.9.0.0/16 via {COLLECTOR_IP}"),
        "route add 10.9.0.0/16 via 203.0.113.2 table 7".into(),
        "route add 10.8.0.0/16 via 203.0.113.2 table 7".into(),
        "route add 2001:db8:9::/64 via 2001:db8:1::2".into(),
        "route add 2001:db8:9::/64 via 2001:db8:3::2 table 7".into(),
    ];
    lab.ip_batch(Ns::Host, &lines.join("\n"));
    lab.wait_for_address(Ns::Host, "out1", "2001:db8:3::1".parse().expect("an address"));
    lab
}

/// GRE or UDP, to who takes it here.
fn is_copy(frame: &[u8]) -> bool {
    let protocol = if frame[12..14] == [0x08, 0] { frame[23] } else { frame[20] };
    [17, 47].contains(&protocol) && [&COLLECTOR_MAC[..], &SECOND_MAC].contains(&&frame[..6])
}

/// Panics unless, with this session, a watched frame's copy arrives at this interface of the collector.
#[track_caller]
fn assert_leaves_to(lab: &Lab, up: &str, dev: &str) {
    lab.said(&up.split(' ').collect::<Vec<_>>()).quietly_ok();
    let mut capture = lab.capture_wire(Ns::Collector, dev, Direction::In);
    let sent = frames::series(&Ends::PEER_TO_HOST, 3);
    lab.send(Ns::Peer, "peer0", &sent);
    let all = poll(PATIENCE, || (capture.count() >= sent.len()).then_some(()));
    let copies = capture.stop().into_iter().filter(|frame| is_copy(frame)).count();
    assert_eq!((all, copies), (Some(()), sent.len()), "{up}: copies at {dev}");
    lab.said(&["down"]).ok();
}

#[test]
fn a_rule_about_the_source_chooses_the_uplink() {
    let lab = two_uplinks();
    lab.host(&["ip", "rule", "add", "from", "203.0.113.1", "lookup", "7"]);
    lab.host(&["ip", "-6", "rule", "add", "from", "2001:db8:3::1", "lookup", "7"]);
    let up = "up eth0:ingress --tunnel gre --remote 10.9.0.1";
    assert_leaves_to(&lab, up, "col0");
    assert_leaves_to(&lab, &format!("{up} --source 203.0.113.1"), "col1");
    // Where only the rule's table has a route.
    assert_leaves_to(&lab, "up eth0:ingress --tunnel gre --remote 10.8.0.1 --source 203.0.113.1", "col1");
    let up6 = "up eth0:ingress --tunnel gre --remote 2001:db8:9::1";
    assert_leaves_to(&lab, up6, "col0");
    assert_leaves_to(&lab, &format!("{up6} --source 2001:db8:3::1"), "col1");
}

#[test]
fn rules_about_tos_and_udp_ports_choose_the_uplink() {
    let lab = two_uplinks();
    lab.host(&["ip", "rule", "add", "tos", "0x10", "lookup", "7"]);
    lab.host(&["ip", "rule", "add", "ipproto", "udp", "dport", "4789", "lookup", "7"]);
    assert_leaves_to(&lab, "up eth0:ingress --tunnel gre --remote 10.9.0.1", "col0");
    assert_leaves_to(&lab, "up eth0:ingress --tunnel gre --remote 10.9.0.1 --tos 0x10", "col1");
    assert_leaves_to(&lab, "up eth0:ingress --tunnel vxlan --remote 10.9.0.1", "col1");
    assert_leaves_to(&lab, "up eth0:ingress --tunnel geneve --remote 10.9.0.1", "col0");
}

#[test]
fn next_hops_of_another_family_on_link_and_in_objects_are_found() {
    let lab = two_uplinks();
    let routes = [
        "route add 10.7.1.0/24 via inet6 fe80::5 dev out1",
        "route add 10.7.2.0/24 via 203.0.113.2 dev out1 onlink",
        "nexthop add id 5 via 203.0.113.2 dev out1",
        "route add 10.7.3.0/24 nhid 5",
        "route add 10.7.4.0/24 nexthop via 203.0.113.2 dev out1 weight 1 nexthop via 203.0.113.2 dev out1 weight 1",
        "route add 2001:db8:7::/64 via fe80::5 dev out1",
    ];
    lab.ip_batch(Ns::Host, &routes.join("\n"));
    for remote in ["10.7.1.1", "10.7.2.1", "10.7.3.1", "10.7.4.1"] {
        assert_leaves_to(&lab, &format!("up eth0:ingress --tunnel gre --remote {remote} --source 203.0.113.1"), "col1");
    }
    assert_leaves_to(&lab, "up eth0:ingress --tunnel gre --remote 2001:db8:7::1", "col1");
}

#[test]
fn the_mtu_of_a_route_counts() {
    let lab = two_uplinks();
    lab.host(&["ip", "route", "add", "10.7.5.0/24", "via", "203.0.113.2", "mtu", "lock", "1400"]);
    let said = lab.said(&["up", "eth0", "--tunnel", "gre", "--remote", "10.7.5.1"]).ok();
    assert!(said.stderr.contains("MTU 1400 towards 10.7.5.1"), "{said:#?}");
}

/// The collector answers for itself, and the host has asked it: nothing is permanent.
fn answering() -> Lab {
    let lab = Lab::roomy();
    lab.ip_batch(Ns::Collector, &format!("address add {COLLECTOR_IP}/24 dev col0"));
    lab.host(&["ip", "neigh", "del", "198.51.100.2", "dev", "out0"]);
    lab
}

const TO_COLLECTOR: [&str; 6] = ["up", "eth0", "--tunnel", "gre", "--remote", "198.51.100.2"];

fn set_neighbour(lab: &Lab, words: &str) {
    lab.ip_batch(Ns::Host, &format!("neigh replace 198.51.100.2 dev out0 {words}"));
}

/// The destination of the template's Ethernet header.
fn next_hop(lab: &Lab) -> String {
    let rows = lab.said(&["map", "dump", "remotes"]).ok().json();
    let header = rows[0]["value"]["header"][0].as_array().expect("a template");
    let bytes: Vec<String> =
        header[2..8].iter().map(|byte| format!("{:02x}", byte.as_u64().expect("a byte"))).collect();
    bytes.join(":")
}

#[test]
fn an_old_address_is_asked_before_it_is_believed() {
    let lab = answering();
    set_neighbour(&lab, "lladdr 02:00:00:00:03:02 nud stale");
    lab.said(&TO_COLLECTOR).quietly_ok();
    assert_eq!(next_hop(&lab), mac_text(COLLECTOR_MAC));
    // It has another one now, which nobody has said.
    lab.collector(&["ip", "link", "set", "col0", "address", &mac_text(SECOND_MAC)]);
    set_neighbour(&lab, &format!("lladdr {} nud stale", mac_text(COLLECTOR_MAC)));
    lab.said(&["sync"]).ok();
    assert_eq!(next_hop(&lab), mac_text(SECOND_MAC));
}

#[test]
fn silence_does_not_take_a_remote_away_for_good() {
    let lab = answering();
    lab.host(&["sysctl", "-qw", "net.ipv4.neigh.out0.retrans_time_ms=200"]);
    lab.said(&TO_COLLECTOR).quietly_ok();
    lab.collector(&["ip", "link", "set", "col0", "arp", "off"]);
    set_neighbour(&lab, &format!("lladdr {} nud stale", mac_text(COLLECTOR_MAC)));
    for _ in 0..2 {
        // At first its address is old, then it has failed: it is asked twice, and is down; the address is kept.
        lab.said(&["sync"]).ok_noting("198.51.100.2 is down");
        assert_eq!(next_hop(&lab), mac_text(COLLECTOR_MAC));
    }
    lab.collector(&["ip", "link", "set", "col0", "arp", "on"]);
    assert!(lab.said(&["sync"]).quietly_ok().stdout.ends_with("default: remote 198.51.100.2: it answers; up\n"));
    assert_eq!(next_hop(&lab), mac_text(COLLECTOR_MAC));
    lab.assert_copied(1);
}

// ---- entries that the kernel keeps fresh ----

/// The collector's entry in the neighbour table: its link address, and whether the kernel keeps it fresh.
fn entry(lab: &Lab) -> Option<(String, bool)> {
    let shown = lab.shown(&["ip", "-j", "neigh", "show", "to", "198.51.100.2", "dev", "out0"]);
    let shown: serde_json::Value = serde_json::from_str(&shown).expect("JSON of ip");
    let found = shown.as_array()?.first()?;
    Some((found["lladdr"].as_str().unwrap_or("none").into(), found.get("managed").is_some()))
}

fn at_collector(is_managed: bool) -> Option<(String, bool)> {
    Some((mac_text(COLLECTOR_MAC), is_managed))
}

#[test]
fn down_leaves_the_neighbour_table_as_it_was() {
    let lab = answering();
    let known = format!("lladdr {}", mac_text(COLLECTOR_MAC));
    for (words, during, after) in [
        ("", at_collector(true), None),
        ("nud reachable", at_collector(true), at_collector(false)),
        ("nud stale", at_collector(true), at_collector(false)),
        ("nud permanent", at_collector(false), at_collector(false)),
        ("nud reachable extern_learn", at_collector(false), at_collector(false)),
        // Somebody else wants it kept.
        ("managed", at_collector(true), at_collector(true)),
    ] {
        let _ = lab.try_host(&["ip", "neigh", "del", "198.51.100.2", "dev", "out0"]);
        match words {
            "" => {}
            "managed" => {
                set_neighbour(&lab, &format!("{known} nud reachable"));
                set_neighbour(&lab, words);
            }
            words => set_neighbour(&lab, &format!("{known} {words}")),
        }
        lab.said(&TO_COLLECTOR).quietly_ok();
        assert_eq!(entry(&lab), during, "{words:?}, up");
        lab.said(&["sync"]).quietly_ok();
        lab.said(&["down"]).quietly_ok();
        assert_eq!(entry(&lab), after, "{words:?}, down");
    }
}

#[test]
fn an_entry_that_is_not_kept_any_more_is_told_and_kept_again() {
    let lab = answering();
    lab.said(&TO_COLLECTOR).quietly_ok();
    for damage in ["neigh replace 198.51.100.2 dev out0 use", "neigh del 198.51.100.2 dev out0"] {
        lab.ip_batch(Ns::Host, damage);
        let said = lab.said(&["status", "--check"]);
        assert!(said.stdout.contains("neighbour 198.51.100.2 on out0: the kernel does not keep it fresh"), "{said:#?}");
        let said = lab.said(&["sync"]).ok();
        assert!(said.stdout.contains("neighbour 198.51.100.2 on out0: "), "{damage}: {said:#?}");
        assert_eq!(entry(&lab), at_collector(true), "{damage}");
        lab.said(&["sync"]).quietly_ok();
        lab.said(&["status", "--check"]).quietly_ok();
    }
    lab.said(&["down"]).quietly_ok();
    assert_eq!(entry(&lab), None);
}

#[test]
fn an_entry_is_given_up_with_the_last_remote_behind_it() {
    let lab = answering();
    let routes = "route add 10.9.0.0/16 via 198.51.100.2\n\
                  neigh replace 198.51.100.10 lladdr 02:00:00:00:02:02 nud permanent dev out0";
    lab.ip_batch(Ns::Host, routes);
    lab.said(&[&TO_COLLECTOR[..5], &["10.9.0.1,10.9.0.2,198.51.100.10"]].concat()).quietly_ok();
    lab.said(&["remote", "remove", "10.9.0.1"]).quietly_ok();
    assert_eq!(entry(&lab), at_collector(true));
    lab.said(&["remote", "add", "10.9.0.3"]).quietly_ok();
    lab.said(&["remote", "remove", "10.9.0.2"]).quietly_ok();
    assert_eq!(entry(&lab), at_collector(true));
    lab.said(&["remote", "remove", "10.9.0.3"]).quietly_ok();
    assert_eq!(entry(&lab), None);
    // And with the route to another next hop.
    lab.said(&["remote", "add", "10.9.0.1"]).quietly_ok();
    assert_eq!(entry(&lab), at_collector(true));
    lab.host(&["ip", "route", "replace", "10.9.0.0/16", "via", "198.51.100.10"]);
    lab.said(&["sync"]).ok();
    assert_eq!(entry(&lab), None);
    lab.said(&["sync"]).quietly_ok();
}

#[test]
fn a_session_that_was_killed_gives_up_its_entry_too() {
    let lab = answering();
    let known = format!("lladdr {} nud reachable", mac_text(COLLECTOR_MAC));
    let up = TO_COLLECTOR.to_vec();
    let tail = |step: usize| (1..).step_by(step);
    let verbs: [(&[&str], Vec<&str>, _); 3] = [
        (&[], up, tail(8)),
        (&TO_COLLECTOR, vec!["down"], tail(1)),
        (&TO_COLLECTOR, vec!["up", "eth0", "--tunnel", "gre", "--remote", "198.51.100.10", "--replace"], tail(8)),
    ];
    lab.ip_batch(Ns::Host, "neigh replace 198.51.100.10 lladdr 02:00:00:00:02:02 nud permanent dev out0");
    for (start, verb, numbers) in verbs {
        let mut whens = ["before", "after"].into_iter().cycle();
        for (n, when) in numbers.zip(whens.by_ref()) {
            set_neighbour(&lab, &known);
            if !start.is_empty() {
                lab.said(start).quietly_ok();
            }
            let killed = lab.said_by(&["env", &format!("SNIFCTL_INTERRUPT={n} {when}")], &verb);
            let is_killed = killed.status.code().is_none();
            lab.said(&["sync", "--all"]);
            let wanted = lab.status_json()["sessions"][0]["remotes"][0]["address"] == "198.51.100.2";
            assert_eq!(entry(&lab), at_collector(wanted), "{verb:?} killed {when} act {n}");
            lab.said(&["down", "--all"]);
            assert_eq!(entry(&lab), at_collector(false), "{verb:?} killed {when} act {n}, and down");
            if !is_killed {
                break;
            }
        }
    }
}

#[test]
fn a_collector_that_changes_its_address_without_a_word_is_found_again() {
    let lab = answering();
    let faster = "cd /proc/sys/net/ipv4/neigh/out0
        echo 300 > base_reachable_time_ms; echo 100 > retrans_time_ms; echo 1 > delay_first_probe_time
        echo 100 > interval_probe_time_ms";
    lab.host(&["sh", "-euc", faster]);
    lab.said(&TO_COLLECTOR).quietly_ok();
    lab.collector(&["ip", "link", "set", "col0", "address", &mac_text(SECOND_MAC)]);
    let found = poll(PATIENCE, || (entry(&lab)? == (mac_text(SECOND_MAC), true)).then_some(()));
    assert!(found.is_some(), "{:?}", entry(&lab));
    let said = lab.said(&["status", "--check"]);
    assert!(said.stdout.contains("remote 198.51.100.2: next hop"), "{said:#?}");
    lab.said(&["sync"]).ok();
    let mut capture = lab.capture_wire(Ns::Collector, "col0", Direction::In);
    let sent = frames::series(&Ends::PEER_TO_HOST, 3);
    lab.send(Ns::Peer, "peer0", &sent);
    assert!(poll(PATIENCE, || (capture.count() >= sent.len()).then_some(())).is_some());
    assert_eq!(capture.stop().iter().filter(|frame| is_copy(frame) && frame[..6] == SECOND_MAC).count(), sent.len());
}

#[test]
fn sessions_that_share_a_next_hop_keep_it_in_turn() {
    let lab = answering();
    for name in ["one", "two"] {
        lab.said(&[&TO_COLLECTOR[..], &["--name", name]].concat()).quietly_ok();
    }
    lab.said(&["down", "--name", "one"]).quietly_ok();
    lab.said(&["sync"]).ok();
    assert_eq!(entry(&lab), at_collector(true));
    lab.said(&["sync"]).quietly_ok();
    lab.said(&["down", "--name", "two"]).quietly_ok();
    assert_eq!(entry(&lab), None);
}

#[test]
fn a_dry_run_shows_who_would_be_kept() {
    let lab = answering();
    let dry = |words: &[&str]| lab.said(&[words, &["--dry-run"]].concat()).ok().stdout;
    let keep = "ip neigh replace 198.51.100.2 dev out0 managed\n";
    assert!(dry(&TO_COLLECTOR).contains(keep));
    assert_eq!(entry(&lab), None);
    lab.said(&TO_COLLECTOR).quietly_ok();
    assert!(!dry(&["sync"]).contains(keep));
    assert!(dry(&["down"]).contains("ip neigh delete 198.51.100.2 dev out0\n"));
    assert_eq!(entry(&lab), at_collector(true));
}

#[test]
fn a_change_that_fails_leaves_the_entry_as_it_was() {
    let lab = answering();
    lab.ip_batch(Ns::Host, "neigh replace 198.51.100.10 lladdr 02:00:00:00:02:02 nud permanent dev out0");
    let bench = Bench::new(lab, String::new(), Vec::new());
    let known = format!("lladdr {} nud reachable", mac_text(COLLECTOR_MAC));
    let replace = ["up", "eth0", "--tunnel", "gre", "--remote", "198.51.100.10", "--replace"];
    for (start, verb) in [(&[][..], &TO_COLLECTOR[..]), (&TO_COLLECTOR, &replace)] {
        let begin = || {
            bench.lab.said(&["down", "--all"]);
            set_neighbour(&bench.lab, &known);
            if !start.is_empty() {
                bench.lab.said(start).quietly_ok();
            }
        };
        begin();
        for at in bench.writes(verb) {
            begin();
            let said = bench.run(verb, at, Fault::Fail { done: Some(0) }).expect("a failure");
            if !said.status.success() {
                let call = &bench.fakes.calls()[at - 1];
                assert_eq!(entry(&bench.lab), at_collector(!start.is_empty()), "{call}: {said:#?}");
            }
        }
    }
}
