//! Sessions with several remotes.
//!
//! Most remotes are addresses of the out link with the collector's MAC, so that one capture sees the copies of all, told
//! apart by their outer destination.

use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;

use serde_json::Value;

use super::capture::{Capture, Direction};
use super::check::assert_same_frames;
use super::decode::{Copy, decap_gre};
use super::frames::{self, Ends};
use super::judge::Said;
use super::status::{Session, Stat};
use super::{COLLECTOR_MAC, Lab, Ns, OUT_IP, OUT_MAC, PATIENCE, mac_text, poll};

/// The n-th remote.
pub(crate) fn remote(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 51, 100, 10 + n)
}

pub(crate) fn remotes(n: u8) -> Vec<Ipv4Addr> {
    (0..n).map(remote).collect()
}

/// A lab whose collector answers for so many remotes, each by a device and a link address of its own: nothing of them in
/// the neighbour table is permanent. The kernel asks five times a second instead of once.
pub(crate) fn answering(n: u8) -> Lab {
    let lab = Lab::roomy();
    let host = format!("neigh replace {OUT_IP} lladdr {} nud permanent dev col0", mac_text(OUT_MAC));
    lab.ip_batch(Ns::Collector, &format!("address add 198.51.100.200/24 dev col0\n{host}"));
    lab.collector(&["sysctl", "-qw", "net.ipv4.conf.all.arp_ignore=1"]);
    lab.host(&["sysctl", "-qw", "net.ipv4.neigh.out0.retrans_time_ms=200"]);
    for n in 0..n {
        let lines = [
            format!("link add link col0 name m{n} address {} type macvlan mode bridge", mac(n)),
            format!("link set m{n} addrgenmode none"),
            format!("address add {}/32 dev m{n}", remote(n)),
            format!("link set m{n} up"),
        ];
        lab.ip_batch(Ns::Collector, &lines.join("\n"));
    }
    lab
}

/// The link address of the n-th remote of [`answering`].
pub(crate) fn mac(n: u8) -> String {
    mac_text([2, 0, 0, 0, 4, n])
}

/// As `--remote` takes them.
pub(crate) fn listed(remotes: &[Ipv4Addr]) -> String {
    let texts: Vec<String> = remotes.iter().map(Ipv4Addr::to_string).collect();
    texts.join(",")
}

/// A lab whose collector answers for so many remotes.
pub(crate) fn lab_of(n: u8) -> Lab {
    let lab = Lab::roomy();
    remotes(n).into_iter().for_each(|address| know(&lab, address));
    lab
}

/// Makes the collector the neighbour with this address.
pub(crate) fn know(lab: &Lab, address: Ipv4Addr) {
    let mac = mac_text(COLLECTOR_MAC);
    lab.ip_batch(Ns::Host, &format!("neigh replace {address} lladdr {mac} nud permanent dev out0"));
}

pub(crate) fn said_up(lab: &Lab, remotes: &str, more: &[&str]) -> Said {
    lab.said(&[&["up", "eth0", "--tunnel", "gre", "--remote", remotes], more].concat())
}

/// A lab with a session to so many remotes.
pub(crate) fn lab_up(n: u8, more: &[&str]) -> Lab {
    let lab = lab_of(n);
    said_up(&lab, &listed(&remotes(n)), more).quietly_ok();
    lab
}

pub(crate) type ByRemote = BTreeMap<Ipv4Addr, Vec<Vec<u8>>>;

/// The inner frames that each remote got.
pub(crate) fn by_remote(copies: &[Copy]) -> ByRemote {
    let mut found = ByRemote::new();
    for copy in copies {
        found.entry(copy.outer_dst).or_default().push(copy.frame.clone());
    }
    found
}

pub(crate) fn collector(lab: &Lab) -> Capture {
    lab.capture_wire(Ns::Collector, "col0", Direction::In)
}

/// The next `n` copies, by remote.
#[track_caller]
pub(crate) fn taken(capture: &mut Capture, n: usize) -> ByRemote {
    by_remote(&decap_gre(&capture.take(n)))
}

/// Sends frames at the peer and panics unless exactly these remotes get each of them once.
#[track_caller]
pub(crate) fn assert_replicated(lab: &Lab, remotes: &[Ipv4Addr]) {
    let sent = frames::series(&Ends::PEER_TO_HOST, 7);
    let mut capture = collector(lab);
    lab.send(Ns::Peer, "peer0", &sent);
    let got = taken(&mut capture, sent.len() * remotes.len());
    assert!(got.keys().eq(remotes), "{remotes:?}, got {:?}", got.keys());
    got.values().for_each(|frames| assert_same_frames(&sent, frames));
}

/// Everything captured, once all copies that the session says it sent are there.
#[track_caller]
pub(crate) fn settled(lab: &Lab, capture: &mut Capture) -> Vec<Vec<u8>> {
    let all = poll(PATIENCE, || {
        let sent = lab.session().remotes_total().pcnt;
        (capture.count() as u64 == sent && lab.session().remotes_total().pcnt == sent).then_some(())
    });
    assert!(all.is_some(), "{} captured, {:#}", capture.count(), lab.session());
    capture.stop()
}

/// Panics if a counter of what is in both is smaller than before.
#[track_caller]
pub(crate) fn assert_no_counter_went_back(before: &Session, after: &Session) {
    let stats = |session: &Session| -> HashMap<String, u64> {
        let named = |(name, stat): (&String, &Stat)| {
            let Stat { pcnt, bcnt, dcnt } = *stat;
            [("pcnt", pcnt), ("bcnt", bcnt), ("dcnt", dcnt)]
                .map(|(counter, count)| (format!("{name} {counter}"), count))
        };
        let taps = session.taps.iter().map(|tap| (&tap.direction, &tap.counts.stat));
        let remotes = session.remotes.iter().map(|remote| (&remote.address, &remote.stat));
        session.drops.clone().into_iter().chain(taps.chain(remotes).flat_map(named)).collect()
    };
    let after = stats(after);
    for (name, was) in stats(before) {
        let is = after.get(&name).copied().unwrap_or(was);
        assert!(is >= was, "{name} went from {was} back to {is}");
    }
}

pub(crate) fn dump(lab: &Lab, map: &str) -> Vec<Value> {
    let dump = lab.said(&["map", "dump", map]).quietly_ok().json();
    dump.as_array().expect("elements").clone()
}
