//! `status` tells what is written from what the machine has now: a remote that differs is outdated, one whose out interface
//! is gone is gone, and `sync` puts each right.

use crate::lab::frames::{self, Ends};
use crate::lab::status::Session;
use crate::lab::{Lab, Ns, PATIENCE, poll};

const UP: [&str; 6] = ["up", "eth0", "--tunnel", "gre", "--remote", "198.51.100.2"];

fn in_order(lab: &Lab) -> Session {
    assert_eq!(lab.said(&["status", "--check"]).quietly_ok().stdout, "");
    let session = lab.session();
    assert_eq!((session.remotes[0].state.as_str(), session.faults.len()), ("ok", 0), "{session:#}");
    session
}

/// Panics unless a change of the machine makes the remote outdated by this fault, in every answer, until `sync`.
#[track_caller]
fn assert_outdated(lab: &Lab, change: &[&str], fault: &str) {
    in_order(lab);
    lab.host(change);
    let line = format!("remote 198.51.100.2: {fault}");
    let session = lab.session();
    assert_eq!((session.remotes[0].state.as_str(), &session.faults), ("outdated", &vec![line.clone()]), "{change:?}");
    let text = lab.said(&["status"]).quietly_ok().stdout;
    assert!(text.contains("  outdated  ") && text.contains(&format!("  fault: {line}\n")), "{text}");
    let said = lab.said(&["status", "--check"]);
    assert_eq!((said.status.code(), said.stdout), (Some(1), format!("default: {line}\n")));
    let doctor = lab.said(&["doctor"]).stdout;
    assert!(doctor.contains(&line), "{doctor}");
    assert_eq!(lab.said(&["sync"]).quietly_ok().stdout, format!("default: {line}; written\n"));
    in_order(lab);
}

#[test]
fn whatever_a_remotes_way_consists_of_is_compared() {
    let lab = Lab::roomy();
    lab.said(&UP).ok();
    let neighbour = "ip neigh replace 198.51.100.2 lladdr 02:00:00:00:00:99 dev out0 nud permanent";
    assert_outdated(&lab, &words(neighbour), "next hop 02:00:00:00:02:02 → 02:00:00:00:00:99");
    assert_outdated(&lab, &words("ip link set dev out0 mtu 1580"), "MTU 1600 → 1580");
    assert_outdated(&lab, &words("ip route add 198.51.100.2 dev out0 mtu 1560"), "MTU 1580 → 1560");
    lab.host(&words("ip address add 198.51.100.9/24 dev out0"));
    let route = "ip route replace 198.51.100.2 dev out0 src 198.51.100.9 mtu 1560";
    assert_outdated(&lab, &words(route), "source 198.51.100.1 → 198.51.100.9");
    lab.said(&["down"]).quietly_ok();
}

#[test]
fn an_out_interface_that_is_gone_is_told_and_what_goes_there_is_counted() {
    let lab = Lab::roomy();
    lab.said(&UP).ok();
    lab.host(&words("ip link del dev out0"));
    lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, 44));
    let counted = poll(PATIENCE, || (lab.session().accounts("gone") == (44, 0, 44)).then_some(()));
    assert!(counted.is_some(), "{:#}", lab.session());
    let session = lab.session();
    assert_eq!(session.remotes[0].state, "gone", "{session:#}");
    let text = lab.said(&["status"]).quietly_ok().stdout;
    assert!(text.contains("  gone  "), "{text}");
    let said = lab.said(&["status", "--check", "--json"]);
    assert_eq!(
        (said.status.code(), said.json()["sessions"][0]["remotes"][0]["state"].as_str()),
        (Some(1), Some("gone"))
    );
    lab.said(&["sync"]).ok_noting("no route");
    let said = lab.said(&["status", "--check"]);
    assert_eq!(said.stdout, "default: remote 198.51.100.2: it has no route, or its next hop does not answer\n");
    lab.said(&["down"]).quietly_ok();
}

#[test]
fn where_nothing_is_up_nothing_is_wrong() {
    let lab = Lab::new();
    assert_eq!(lab.said(&["status", "--check"]).quietly_ok().stdout, "");
    lab.said(&["status", "--check", "--name", "x"]).refused(1, "no session x", "--remote ADDR");
}

fn words(line: &str) -> Vec<&str> {
    line.split(' ').collect()
}
