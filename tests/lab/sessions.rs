//! Several sessions side by side, called `s` and a number, which send to remotes of their own: one capture sees the copies
//! of all, told apart by their outer destination.

use std::net::{IpAddr, Ipv6Addr};

use super::frames::Ends;
use super::judge::UP;
use super::remotes::{collector, remote};
use super::status::Session;
use super::{COLLECTOR_MAC, Lab, Ns, Options, PATIENCE, mac_text, poll};

/// The n-th remote over IPv6.
pub(crate) fn remote6(n: u8) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x10 + u16::from(n))
}

/// Makes the collector answer for so many remotes of both families.
pub(crate) fn knowing(lab: Lab, n: u8) -> Lab {
    let mac = mac_text(COLLECTOR_MAC);
    let entry = |address: String| format!("neigh replace {address} lladdr {mac} nud permanent dev out0");
    let entries = (0..n).flat_map(|n| [entry(remote(n).to_string()), entry(remote6(n).to_string())]);
    lab.ip_batch(Ns::Host, &entries.collect::<Vec<_>>().join("\n"));
    lab
}

/// A lab in which every copy fits, with so many remotes.
pub(crate) fn lab_of(n: u8) -> Lab {
    knowing(Lab::with(Options { out_mtu: 1700, ..Options::default() }), n)
}

/// Starts the session called `s` and its number, which sends to that remote.
#[track_caller]
pub(crate) fn up(lab: &Lab, n: u8, more: &[&str]) {
    up_in(lab, n, &["gre"], &remote(n).to_string(), more);
}

#[track_caller]
pub(crate) fn up_in(lab: &Lab, n: u8, tunnel: &[&str], remotes: &str, more: &[&str]) {
    let name = format!("s{n}");
    let args = [&["up", "eth0", "--name", &name, "--remote", remotes, "--tunnel"], tunnel, more].concat();
    lab.said(&args).ok();
}

#[track_caller]
pub(crate) fn down(lab: &Lab) {
    lab.said(&["down", "--all"]).quietly_ok();
}

/// The session called `s` and its number.
#[track_caller]
pub(crate) fn session_of(lab: &Lab, n: u8) -> Session {
    lab.session_called(&format!("s{n}"))
}

/// Copies that all sessions together have sent.
fn sent(lab: &Lab) -> u64 {
    let status = lab.status();
    status.sessions.iter().map(|session| session.remotes_total().pcnt).sum()
}

/// Everything that reaches the collector while `traffic` runs, none of it in fragments.
#[track_caller]
pub(crate) fn captured<T>(lab: &Lab, traffic: impl FnOnce() -> T) -> (Vec<Vec<u8>>, T) {
    let (before, mut capture) = (sent(lab), collector(lab));
    let done = traffic();
    let all = poll(PATIENCE, || (capture.count() as u64 == sent(lab) - before).then_some(()));
    assert!(all.is_some(), "{} captured, {} sent", capture.count(), sent(lab) - before);
    capture.settle();
    (capture.stop(), done)
}

/// Both ways over a watched link: who sends out of which interface, and the frames' addresses.
pub(crate) const WAYS: [(Ns, &str, Ends); 2] =
    [(Ns::Peer, "peer0", Ends::PEER_TO_HOST), (Ns::Host, "eth0", Ends::HOST_TO_PEER)];

/// The session's two remotes: one of each family.
pub(crate) fn both_families(n: u8) -> [IpAddr; 2] {
    [remote(n).into(), remote6(n).into()]
}

/// As [`super::judge::Said::refused`] for `up` with more arguments, which also must have left nothing.
#[track_caller]
pub(crate) fn assert_up_refused(lab: &Lab, before: &str, more: &[&str], code: i32, names: &str, ends: &str) {
    let said = lab.said(&[&UP[..], more].concat());
    assert!(!said.status.success(), "{more:?} is taken: {said:#?}");
    said.refused(code, names, ends);
    lab.assert_as_before(before);
}
