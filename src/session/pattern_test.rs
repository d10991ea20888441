//! What a request stands for, on machines in memory.

use serde_json::json;

use super::*;
use crate::request::tests::request;

fn link(ifindex: u32, ifname: &str) -> Link {
    serde_json::from_value(json!({ "ifindex": ifindex, "ifname": ifname, "mtu": 1500, "link_type": "ether" })).unwrap()
}

fn with(mut link: Link, change: impl Fn(&mut Link)) -> Link {
    change(&mut link);
    link
}

/// A machine with what no pattern takes, too.
fn links() -> Vec<Link> {
    vec![
        with(link(1, "lo"), |link| link.link_type = "loopback".into()),
        link(2, "eth0"),
        with(link(3, "wan"), |link| link.altnames = vec!["eth-uplink".into()]),
        with(link(4, "tun0"), |link| link.link_type = "none".into()),
        with(link(5, "snif0"), |link| link.ifalias = "snifctl:a".into()),
        link(6, "eth1"),
        link(7, "e#h"),
    ]
}

/// The interfaces that these words stand for, those that wait with a question mark.
fn stand_for(words: &[&str], links: &[Link]) -> Vec<String> {
    let found = expand(&request(words), None, links).interfaces;
    found.iter().map(|(at, link)| format!("{at}{}", if link.is_some() { "" } else { "?" })).collect()
}

#[test]
fn a_pattern_stands_for_what_could_be_watched_if_it_were_named() {
    let links = links();
    assert_eq!(stand_for(&["*"], &links), ["eth0", "wan", "eth1"]);
    assert_eq!(stand_for(&["eth*:ingress"], &links), ["eth0:ingress", "wan:ingress", "eth1:ingress"]);
    assert_eq!(stand_for(&["*1", "lo", "*0"], &links), ["eth1", "lo", "eth0"]);
    assert_eq!(stand_for(&["cali*", "snif*", "nosuch0", "l?"], &links), ["cali*?", "snif*?", "nosuch0?", "l??"]);
}

#[test]
fn a_name_goes_before_a_pattern_and_two_patterns_join_their_directions() {
    let links = links();
    assert_eq!(stand_for(&["eth*", "eth1:egress"], &links), ["eth0", "wan", "eth1:egress"]);
    assert_eq!(stand_for(&["eth-uplink:egress", "*"], &links), ["eth-uplink:egress", "eth0", "eth1"]);
    assert_eq!(stand_for(&["*0:ingress", "eth*:egress"], &links), ["eth0", "wan:egress", "eth1:egress"]);
    assert_eq!(stand_for(&["*:egress", "eth0*:egress"], &links), ["eth0:egress", "wan:egress", "eth1:egress"]);
}

#[test]
fn an_interface_of_that_very_name_wins_also_when_it_is_gone() {
    let mut links = links();
    links.push(link(8, "eth*"));
    assert_eq!(stand_for(&["eth*"], &links), ["eth*"]);
    assert_eq!(stand_for(&["e*"], &links), ["eth0", "wan", "eth1", "eth*"]);
    let mut stored = Stored::new(request(&["eth*"]));
    let place = |pattern: Option<&str>| Place {
        ifindex: 8,
        number: 0,
        mtu: 1500,
        watch: Watch::Both,
        before: None,
        passed: None,
        pattern: pattern.map(String::from),
        guest: None,
    };
    stored.interfaces.insert("eth*".into(), place(None));
    links.pop();
    let gone = expand(&stored.request, Some(&stored), &links).interfaces;
    assert!(matches!(&gone[..], [(at, None)] if at.interface == "eth*"), "{gone:?}");
    assert!(waiting(&stored, &links).is_empty());
    // Which another pattern had matched.
    stored.interfaces.insert("eth*".into(), place(Some("e*")));
    assert_eq!(expand(&stored.request, Some(&stored), &links).interfaces.len(), 3);
}

#[test]
fn what_there_is_no_room_for_are_the_last_ones() {
    let links: Vec<Link> = (1..=1030).map(|at| link(at, &format!("v{at}"))).collect();
    let found = expand(&request(&["v*:ingress", "v1030", "waits"]), None, &links);
    assert_eq!((found.interfaces.len(), found.left_out), (MOST, 7));
    assert_eq!(found.interfaces[MOST - 3].0.to_string(), "v1022:ingress");
    assert_eq!(found.interfaces[MOST - 2].0.to_string(), "v1030");
}
