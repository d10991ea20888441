//! Several watched links, whose taps come and go.

use serde_json::Value;

use super::check::assert_same_frames;
use super::decode::{decap_gre, inner_frames};
use super::frames;
use super::remotes::collector;
use super::sessions::{WAYS, lab_of, up};
use super::{Lab, Ns, PATIENCE, poll};

/// One more watched link: eth`n` here, peer`n` in the peer namespace, both without addresses.
pub(crate) fn add_link(lab: &Lab, n: u8) {
    let peer = lab.ns_name(Ns::Peer);
    let make = format!("link add eth{n} type veth peer name peer{n} netns {peer}");
    lab.ip_batch(Ns::Host, &format!("{make}\nlink set eth{n} addrgenmode none\nlink set eth{n} up"));
    lab.ip_batch(Ns::Peer, &format!("link set peer{n} addrgenmode none\nlink set peer{n} up"));
    // The kernel takes note of a carrier some time after it is there.
    for (ns, dev) in [(Ns::Host, format!("eth{n}")), (Ns::Peer, format!("peer{n}"))] {
        let shown = || String::from_utf8_lossy(&lab.run(ns, &["ip", "link", "show", "dev", &dev]).stdout).into_owned();
        let ready = poll(PATIENCE, || shown().contains("state UP").then_some(()));
        assert!(ready.is_some(), "{}", shown());
    }
}

/// A lab with so many links besides eth0, and what it was like before its session, which watches eth0.
pub(crate) fn lab_with_links(n: u8) -> (Lab, String) {
    let lab = lab_of(2);
    (1..=n).for_each(|n| add_link(&lab, n));
    let before = lab.machine();
    up(&lab, 0, &[]);
    (lab, before)
}

/// Changes the taps of the only session.
#[track_caller]
pub(crate) fn tap(lab: &Lab, words: &str) {
    lab.said(&[&["tap"], &words.split(' ').collect::<Vec<_>>()[..]].concat()).quietly_ok();
}

/// The interfaces and directions that the session watches, in order.
pub(crate) fn watched(lab: &Lab) -> String {
    let session = lab.session();
    let names = session.taps.iter().map(|tap| format!("{} {}", tap.interface, tap.direction));
    names.collect::<Vec<_>>().join(", ")
}

/// Panics unless, of frames sent both ways over a link, those of the watched directions are copied, and no others.
#[track_caller]
pub(crate) fn assert_copied_on(lab: &Lab, link: (&str, &str), ways: &str) {
    let [ingress, egress] = WAYS.map(|(_, _, ends)| frames::series(&ends, 7));
    let mut capture = collector(lab);
    lab.send(Ns::Host, link.0, &egress);
    lab.send(Ns::Peer, link.1, &ingress);
    let expected = match ways {
        "none" => Vec::new(),
        "ingress" => ingress,
        "egress" => egress,
        _ => [ingress, egress].concat(),
    };
    assert_same_frames(&expected, &inner_frames(&decap_gre(&capture.take(expected.len()))));
}

pub(crate) const ETH0: (&str, &str) = ("eth0", "peer0");

pub(crate) const ETH1: (&str, &str) = ("eth1", "peer1");

/// What is at the hooks of all interfaces, without what differs from one `up` to the next.
pub(crate) fn hooks(lab: &Lab) -> String {
    let ask = "tc -j qdisc show; for dev in $(ls /sys/class/net); do for hook in ingress egress; do
        echo \"\\\"$dev $hook\\\"\"; tc -j filter show dev $dev $hook; done; done";
    let shown = lab.shown(&["sh", "-c", ask]);
    let mut found = String::new();
    for part in serde_json::Deserializer::from_str(&shown).into_iter::<Value>() {
        let part = part.expect("JSON of tc");
        found += part.as_str().map(|place| format!("\n{place}:")).unwrap_or_default().as_str();
        for row in part.as_array().into_iter().flatten() {
            let filter = &row["options"];
            found += &format!(" {} {} {}", row["dev"], row["kind"], row["pref"]);
            found += &format!(" {} {};", filter["handle"], filter["prog"]["name"]);
        }
    }
    found
}
