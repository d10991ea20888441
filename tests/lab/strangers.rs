//! What others have made beside a session, and that it stops no command and is left as it is.

use super::capture::Direction;
use super::judge::UP;
use super::{Lab, Ns, frames};

/// Everything foreign that a kernel may take; what this one does not know is left out.
const STRANGERS: &str = r#"
try() { "$@" >/dev/null 2>&1 || true; }
ip link add v0 type veth peer name v1
for dev in v0 v1; do ip link set dev $dev up; tc qdisc add dev $dev clsact; done
for dev in v0 v1 "$@"; do for hook in ingress egress; do
    filter="try tc filter add dev $dev $hook protocol all"
    $filter pref 100 bpf bytecode '1,6 0 0 4294967295'
    $filter pref 101 u32 match u32 0 0
    $filter pref 102 u32 match u32 0 0 action mirred egress mirror dev lo
    $filter pref 103 basic match 'meta(priority eq 5)' action ok
    $filter pref 104 basic
    $filter pref 105 matchall action continue
    $filter pref 106 flower dst_mac 02:00:00:00:00:99 action drop
    $filter pref 107 fw
    $filter pref 108 u32 match u32 0 0 action pedit ex munge ip ttl set 5
    $filter pref 109 u32 match u32 0 0 action simple sdata '{"[hi'
    $filter pref 110 basic match 'nbyte("A[{" at 0)' action ok
    $filter pref 111 matchall action skbmod swap mac
    $filter pref 112 matchall action tunnel_key unset
    $filter pref 113 route from 5
    $filter pref 114 flower ip_proto tcp dst_port 80 action pass
done; done
for kind in "bridge" "ifb" "vxlan id 5 dstport 4789" "bond" "team" "dummy" "netkit" "wireguard" "gre" "vrf table 5"; do
    n=$((n + 1)); try ip link add t$n type $kind
done
for kind in macvlan ipvlan "vlan id 5" macsec; do n=$((n + 1)); try ip link add link v0 name t$n type $kind; done
try ip tuntap add dev tun7 mode tun
for qdisc in "tbf rate 1mbit burst 10k latency 5ms" htb prio pfifo fq_codel; do
    n=$((n + 1)); ip link add q$n type veth peer name r$n; try tc qdisc add dev q$n root $qdisc; try tc qdisc add dev r$n ingress
done
for name in "o'u" 'q"u' 'b\s' '$(id)' '#h' "$(printf 'q\377x')" "$(printf 'a\001b')" "$(printf 'c\177')" 'ünï' '[{' ']}'; do
    n=$((n + 1)); ip link add "$name" type veth peer name z$n
    try ip link property add dev z$n altname "$name$name"
    ip link set dev z$n alias "$(printf '%s\n"]' "$name")"
done
if command -v nft >/dev/null; then
    try nft add table inet snifctl
    try nft 'add table bridge foreign { comment "it is \"odd\" {[]}"; }'
    try nft 'add chain bridge foreign c { type filter hook output priority 0; }'
    try nft 'add rule bridge foreign c oifname "o'\''u" counter drop comment "x"'
fi
"#;

/// What is there beside us: links, qdiscs, filters, rules, without counters.
fn strangers(lab: &Lab) -> String {
    let script = r#"ip -o link show | sed 's/ state .*//; s/<[^>]*>//'; for dev in v0 v1 eth0; do for hook in ingress egress; do
        echo "$dev $hook"; tc filter show dev $dev $hook; done; done; tc qdisc show; ip -d link show type veth | grep alias
        command -v nft >/dev/null && nft -s list ruleset; true"#;
    String::from_utf8_lossy(&lab.host(&["sh", "-c", script]).stdout).into_owned()
}

/// Every verb works among them, copies flow, and in the end it is `before`.
#[track_caller]
fn assert_works(lab: &Lab, before: &str) {
    let mut copies = lab.capture(Ns::Collector, "col0", Direction::In);
    lab.said(&["sync"]).ok();
    for command in [&["filter", "set", "udp"][..], &["filter", "clear"], &["remote", "add", "198.51.100.3"]] {
        lab.said(command).ok();
    }
    lab.said(&["remote", "remove", "198.51.100.3"]).ok();
    lab.said(&["tap", "add", "v1"]).ok();
    lab.said(&["tap", "remove", "v1"]).ok();
    lab.send(Ns::Peer, "peer0", &frames::series(&frames::Ends::PEER_TO_HOST, 7));
    copies.wait_for(7);
    let session = lab.session();
    assert!(session.taps.iter().all(|tap| tap.attached) && session.faults.is_empty(), "{session:#}");
    lab.said(&["doctor"]);
    lab.said(&["down"]).ok();
    lab.assert_no_pins();
    assert_eq!(strangers(lab), before);
}

/// Those that were there before.
pub(crate) fn there_before() {
    let lab = Lab::roomy();
    lab.host(&["sh", "-c", STRANGERS, "sh"]);
    let before = strangers(&lab);
    lab.said(&UP).ok();
    assert_works(&lab, &before);
}

/// Those that came while the session ran.
pub(crate) fn come_between() {
    let lab = Lab::roomy();
    lab.said(&UP).ok();
    lab.host(&["sh", "-c", STRANGERS, "sh", "eth0"]);
    let ours = |text: &str| -> String {
        let of_relay = |line: &&str| !line.contains("snif");
        text.lines().filter(of_relay).collect::<Vec<_>>().join("\n")
    };
    let with_us = ours(&strangers(&lab));
    for command in [&["sync"][..], &["status", "--json"], &["tap", "add", "v1"], &["filter", "set", "udp"], &["down"]] {
        lab.said(command).ok();
    }
    assert_eq!(lab.status().sessions.len(), 0);
    let lines =
        |text: &str| text.lines().filter(|line| !line.contains("pref 1 ")).map(String::from).collect::<Vec<_>>();
    let after = ours(&strangers(&lab));
    for line in lines(&with_us) {
        assert!(after.lines().any(|at| at.trim() == line.trim()), "{line:?} is gone from\n{after}");
    }
}
