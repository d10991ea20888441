//! What only a kernel with its modules can show: interfaces of many kinds as watched or out interface, and what another
//! kernel version answers. Not part of `cargo test`: tests/kernels/run runs it in guests with stock kernels.

mod lab;

use std::net::IpAddr;

use lab::capture::Direction;
use lab::check::assert_same_frames;
use lab::decode::{decap_gre, inner_frames};
use lab::frames::{self, ETH_8021AD, ETH_8021Q, Ends, tagged};
use lab::order_case::{Case, Out, PLAIN};
use lab::pods::{Cni, assert_pod_is_watched};
use lab::tunnels::{Kind, Link, decap_on, inner, raw_packets};
use lab::{COLLECTOR_IP, COLLECTOR_MAC, HOST_MAC, Lab, Ns, PATIENCE, mac_text, poll, senders, strangers};

/// A lab whose out link takes every copy whole.
fn roomy() -> Lab {
    Lab::with(lab::Options { out_mtu: 1700, ..lab::Options::default() })
}

/// Watches interfaces, sends frames out of others, and compares what the collector gets with `expected`, in any order.
fn assert_copied(lab: &Lab, watched: &[&str], sent: &[(Ns, &str, &[Vec<u8>])], expected: &[Vec<u8>]) {
    let remote = COLLECTOR_IP.to_string();
    let up = [&["up"], watched, &["--tunnel", "gre", "--remote", &remote]].concat();
    lab.snifctl(&up).assert().success();
    let mut mirrored = lab.capture(Ns::Collector, "col0", Direction::In);
    sent.iter().for_each(|(ns, dev, frames)| lab.send(*ns, dev, frames));
    mirrored.wait_for(expected.len());
    mirrored.settle();
    assert_same_frames(expected, &inner_of(&mirrored.stop()));
    assert_all_sent(lab, expected.len());
    lab.snifctl(["down"]).assert().success();
}

fn inner_of(packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    inner_frames(&decap_gre(packets))
}

/// Exactly so many copies were sent, and none was dropped.
fn assert_all_sent(lab: &Lab, copies: usize) {
    let session = lab.session();
    assert_eq!(session.remotes[0].stat.pcnt, copies as u64, "{session:#}");
    assert_eq!(session.drops(), 0, "{session:#}");
}

fn wait_until_up(lab: &Lab, dev: &str) {
    let is_up = || lab.shown(&["ip", "-br", "link", "show", "dev", dev]).contains(" UP ").then_some(());
    poll(PATIENCE, is_up).unwrap_or_else(|| panic!("{dev} never came up"));
}

fn series() -> Vec<Vec<u8>> {
    frames::series(&Ends::PEER_TO_HOST, 25)
}

#[test]
fn a_vlan_interface_is_watched_without_its_tag_in_both_directions() {
    let lab = roomy();
    lab.ip_batch(Ns::Host, "link add link eth0 name eth0.10 type vlan id 10\nlink set dev eth0.10 addrgenmode none up");
    let incoming: Vec<Vec<u8>> = series().iter().map(|frame| tagged(ETH_8021Q, 10, frame)).collect();
    let outgoing = frames::series(&Ends::HOST_TO_PEER, 25);
    let sent = [(Ns::Peer, "peer0", &incoming[..]), (Ns::Host, "eth0.10", &outgoing[..])];
    assert_copied(&lab, &["eth0.10"], &sent, &[series(), outgoing.clone()].concat());
}

#[test]
fn a_qinq_interface_is_watched_without_its_tags_and_the_wire_beneath_with_them() {
    let lab = roomy();
    lab.ip_batch(
        Ns::Host,
        "link add link eth0 name eth0.30 type vlan proto 802.1ad id 30\nlink set dev eth0.30 addrgenmode none up\n\
         link add link eth0.30 name eth0.30.10 type vlan id 10\nlink set dev eth0.30.10 addrgenmode none up",
    );
    let double = |frame: &Vec<u8>| tagged(ETH_8021AD, 30, &tagged(ETH_8021Q, 10, frame));
    let incoming: Vec<Vec<u8>> = series().iter().map(double).collect();
    let sent = [(Ns::Peer, "peer0", &incoming[..])];
    assert_copied(&lab, &["eth0.30.10", "eth0"], &sent, &[series(), incoming.clone()].concat());
}

#[test]
fn copies_leave_through_a_vlan_interface() {
    let lab = roomy();
    let mac = mac_text(COLLECTOR_MAC);
    lab.ip_batch(
        Ns::Host,
        &format!(
            "link add link out0 name out0.20 type vlan id 20\nlink set dev out0.20 addrgenmode none up\n\
             address add 203.0.113.1/24 dev out0.20\nneigh replace 203.0.113.2 lladdr {mac} nud permanent dev out0.20"
        ),
    );
    let up = ["up", "eth0", "--tunnel", "gre", "--remote", "203.0.113.2", "--direction", "ingress"];
    lab.snifctl(up).assert().success();
    let mut mirrored = lab.capture(Ns::Collector, "col0", Direction::In);
    lab.send(Ns::Peer, "peer0", &series());
    mirrored.wait_for(series().len());
    let outer = mirrored.stop();
    let untagged: Vec<Vec<u8>> = outer
        .iter()
        .map(|frame| {
            assert_eq!(frame[12..16], [0x81, 0, 0, 20], "the outer frame has the tag of out0.20");
            [&frame[..12], &frame[16..]].concat()
        })
        .collect();
    assert_same_frames(&series(), &inner_of(&untagged));
    assert_all_sent(&lab, series().len());
}

#[test]
fn a_bridge_and_its_port_are_watched() {
    let lab = roomy();
    lab.ip_batch(
        Ns::Host,
        &format!(
            "link add br0 address {} type bridge\nlink set dev eth0 master br0\nlink set dev br0 addrgenmode none up",
            mac_text(HOST_MAC)
        ),
    );
    assert_copied(&lab, &["br0", "eth0"], &[(Ns::Peer, "peer0", &series())], &[series(), series()].concat());
}

#[test]
fn a_bond_is_watched_and_sends_copies() {
    let lab = roomy();
    let mac = mac_text(COLLECTOR_MAC);
    lab.ip_batch(
        Ns::Host,
        &format!(
            "link add bond0 type bond mode active-backup\nlink set dev eth0 down\nlink set dev eth0 master bond0\n\
             link set dev bond0 addrgenmode none up\nlink set dev eth0 up\n\
             link add bond1 mtu 1700 type bond mode active-backup\nlink set dev out0 down\naddress flush dev out0\n\
             link set dev out0 master bond1\nlink set dev bond1 addrgenmode none up\nlink set dev out0 up\n\
             address add 198.51.100.1/24 dev bond1\nneigh replace {COLLECTOR_IP} lladdr {mac} nud permanent dev bond1"
        ),
    );
    ["bond0", "bond1"].iter().for_each(|bond| wait_until_up(&lab, bond));
    let sent = [(Ns::Peer, "peer0", &series()[..])];
    assert_copied(&lab, &["bond0", "--direction", "ingress"], &sent, &series());
}

#[test]
fn a_dummy_is_watched() {
    let lab = roomy();
    lab.ip_batch(Ns::Host, "link add dummy0 type dummy\nlink set dev dummy0 addrgenmode none arp off up");
    let outgoing = frames::series(&Ends::HOST_TO_PEER, 25);
    assert_copied(&lab, &["dummy0"], &[(Ns::Host, "dummy0", &outgoing)], &outgoing);
}

#[test]
fn interfaces_of_a_vrf_are_watched_and_copies_leave_through_one() {
    let lab = roomy();
    let mac = mac_text(COLLECTOR_MAC);
    lab.ip_batch(
        Ns::Host,
        &format!(
            "link add blue type vrf table 10\nlink set dev blue up\nlink set dev eth0 master blue\n\
             link set dev out0 master blue\nneigh replace {COLLECTOR_IP} lladdr {mac} nud permanent dev out0\n\
             route add {COLLECTOR_IP}/32 dev out0"
        ),
    );
    let sent = [(Ns::Peer, "peer0", &series()[..])];
    assert_copied(&lab, &["eth0", "--direction", "ingress"], &sent, &series());
}

#[test]
fn copies_leave_through_wireguard_and_arrive_decrypted() {
    let lab = roomy();
    WireGuard::pair(&lab);
    // Watched is the interface that WireGuard's own packets pass, too: they are not copied again.
    let up = ["up", "eth0", "out0", "--tunnel", "gre", "--remote", "10.99.0.2"];
    lab.snifctl(up).assert().success();
    let mut mirrored = lab.capture(Ns::Collector, "wg0", Direction::In);
    lab.send(Ns::Peer, "peer0", &series());
    mirrored.wait_for(series().len());
    mirrored.settle();
    let address = IpAddr::from([10, 99, 0, 2]);
    let is_ours =
        |packet: &Vec<u8>| packet[9] == 47 && IpAddr::from(<[u8; 4]>::try_from(&packet[16..20]).unwrap()) == address;
    let ours: Vec<Vec<u8>> = raw_packets(mirrored.pcap()).into_iter().filter(is_ours).collect();
    assert_same_frames(&series(), &inner(&decap_on(Link::Raw, Kind::Gre, &ours)));
    lab.snifctl(["down"]).assert().success();
}

/// Pings the peer twice, and panics unless each frame is copied once to each remote: WireGuard's own packets pass out0.
/// Before it is a way to a remote they are traffic: its keepalives come ten seconds after it has received something.
#[track_caller]
fn assert_pings_copied_once(lab: &Lab, remotes: u64) {
    let before = lab.session().taps_total().pcnt;
    for pings in 1..=2 {
        lab.host(&["ping", "-c", "1", "-W", "5", &lab::PEER_IP.to_string()]);
        let session = lab.session();
        assert_eq!(session.taps_total().pcnt - before, 2 * pings * remotes, "{session:#}");
    }
}

#[test]
fn a_route_that_moves_to_wireguard_and_a_remote_behind_it_make_no_loop() {
    let lab = roomy();
    WireGuard::pair(&lab);
    let up = |remote: &str| {
        let filter = ["--filter", "icmp or udp"]; // no ARP of the collector's
        lab.said(&[&["up", "eth0", "out0", "--tunnel", "gre", "--remote", remote], &filter[..]].concat()).ok();
    };
    let other = ["10.99.0.2/32", "via", &COLLECTOR_IP.to_string(), "dev", "out0"];
    lab.host(&[&["ip", "route", "add"], &other[..]].concat());
    up("10.99.0.2");
    lab.host(&[&["ip", "route", "del"], &other[..]].concat());
    up("10.99.0.2");
    assert_eq!(lab.session().remotes[0].interface.as_deref(), Some("wg0"));
    assert_pings_copied_once(&lab, 1);
    lab.snifctl(["down"]).assert().success();

    up(&COLLECTOR_IP.to_string());
    lab.snifctl(["remote", "add", "10.99.0.2"]).assert().success();
    assert_pings_copied_once(&lab, 2);
    lab.snifctl(["down"]).assert().success();
}

/// A program that another has put before ours, without any header file.
const FOREIGN: &str = r#"__attribute__((section("classifier"))) int foreign(void *skb) { return -1; }"#;

#[test]
fn programs_at_tcx_hooks_are_told() {
    let lab = roomy();
    let before = lab.machine();
    let path = format!("PATH={}:/usr/sbin:/usr/bin", std::env::var("NEWER_BPFTOOL").expect("set by tests/kernels/run"));
    let [source, object] = ["foreign.c", "foreign.o"].map(|name| lab.dir().join(name).display().to_string());
    std::fs::write(&source, FOREIGN).unwrap();
    lab.host(&["clang", "-O2", "-target", "bpf", "-c", &source, "-o", &object]);
    let pin = format!("/sys/fs/bpf/{}", lab.ns_name(Ns::Host));
    let attach = ["env", &path, "bpftool", "net", "attach", "tcx_ingress", "pinned", &pin, "dev", "eth0"];
    lab.host(&["bpftool", "prog", "load", &object, &pin, "type", "classifier"]);
    let attached = lab.try_host(&attach).status.success();
    std::fs::remove_file(&pin).unwrap();
    assert_eq!(attached, has_tcx(), "tcx hooks are there from 6.6 on");

    let by = |args: &[&str]| lab.said_by(&["env".into(), path.clone()], args);
    let told = |text: &str| text.contains("foreign");
    assert_eq!(told(&by(&["doctor", "eth0"]).stdout), attached);
    let up = by(&["up", "eth0", "--tunnel", "gre", "--remote", &COLLECTOR_IP.to_string()]);
    assert_eq!(told(&up.stderr), attached, "{}", up.stderr);
    lab.send(Ns::Peer, "peer0", &series());
    let status = poll(PATIENCE, || {
        let session = lab.session();
        (session.remotes[0].stat.pcnt == series().len() as u64).then_some(session)
    });
    assert!(status.is_some(), "a program that passes packets on hides none: {:#}", lab.status());
    by(&["down"]);
    if attached {
        lab.host(&["env", &path, "bpftool", "net", "detach", "tcx_ingress", "dev", "eth0"]);
    }
    lab.assert_as_before(&before);
}

fn has_tcx() -> bool {
    is_at_least((6, 6))
}

fn is_at_least(version: (u32, u32)) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut parts = release.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    (parts.next(), parts.next()) >= (Some(version.0), Some(version.1))
}

/// One end of a WireGuard tunnel.
struct WireGuard {
    ns: Ns,
    public: String,
}

impl WireGuard {
    /// A tunnel over the out link, 10.99.0.1 on the host and 10.99.0.2 at the collector.
    fn pair(lab: &Lab) {
        let [host, collector] = [Ns::Host, Ns::Collector].map(|ns| WireGuard::make(lab, ns));
        lab.ip_batch(Ns::Collector, &format!("address add {COLLECTOR_IP}/24 dev col0"));
        host.meet(lab, &collector, "10.99.0.1", Some(&format!("{COLLECTOR_IP}:51820")));
        collector.meet(lab, &host, "10.99.0.2", None);
        // Out of the first packets' way: the handshake.
        lab.host(&["ping", "-c", "1", "-W", "5", "10.99.0.2"]);
    }

    fn make(lab: &Lab, ns: Ns) -> WireGuard {
        lab.ip_batch(ns, "link add wg0 mtu 1600 type wireguard");
        let key = lab.dir().join(format!("key-{ns:?}"));
        let script = format!(
            "umask 077; wg genkey > {0}; wg set wg0 listen-port 51820 private-key {0}; wg pubkey < {0}",
            key.display()
        );
        let public = String::from_utf8(lab.run(ns, &["sh", "-euc", &script]).stdout).unwrap();
        WireGuard { ns, public: public.trim().into() }
    }

    fn meet(&self, lab: &Lab, other: &WireGuard, address: &str, endpoint: Option<&str>) {
        let endpoint: Vec<&str> = endpoint.iter().flat_map(|at| ["endpoint", at]).collect();
        let peer = ["wg", "set", "wg0", "peer", &other.public, "allowed-ips", "10.99.0.0/24"];
        lab.run(self.ns, &[&peer[..], &endpoint].concat());
        lab.ip_batch(self.ns, &format!("address add {address}/24 dev wg0\nlink set dev wg0 up"));
    }
}

/// Data that a host receives is acknowledged only after its copy has left, also where each copy is fragmented and leaves
/// through the watched interface.
#[test]
fn copies_of_downloads_leave_packet_by_packet_in_order() {
    let case = Case { out: Out::Watched, oversize: "fragment", ..PLAIN };
    let lab = case.lab();
    case.up(&lab);
    case.download_on_one_cpu(&lab, &[4096, 20480]);
}

#[test]
fn a_filter_changes_and_everything_goes_without_a_trace() {
    let lab = roomy();
    let before = lab.machine();
    let remote = COLLECTOR_IP.to_string();
    lab.snifctl(["up", "eth0", "--tunnel", "gre", "--remote", &remote, "--filter", "tcp"]).assert().success();
    lab.snifctl(["filter", "set", "vlan 10 and udp"]).assert().success();
    let mut mirrored = lab.capture(Ns::Collector, "col0", Direction::In);
    let tags: Vec<Vec<u8>> = series().iter().map(|frame| tagged(ETH_8021Q, 10, frame)).collect();
    lab.send(Ns::Peer, "peer0", &[&tags[..], &series()].concat());
    mirrored.wait_for(tags.len());
    mirrored.settle();
    assert_same_frames(&tags, &inner_of(&mirrored.stop()));
    lab.snifctl(["filter", "clear"]).assert().success();
    lab.snifctl(["tap", "remove", "eth0", "--direction", "egress"]).assert().success();
    lab.snifctl(["remote", "add", "198.51.100.3"]).assert().success();
    lab.snifctl(["down"]).assert().success();
    lab.assert_as_before(&before);
}

#[test]
fn pods_that_have_no_end_at_the_node_are_watched_inside() {
    [Cni::Macvlan, Cni::Ipvlan].into_iter().for_each(assert_pod_is_watched);
}

/// From 6.7 on there is netkit, and before 5.10 nothing that puts packets straight into a pod.
#[test]
fn pods_are_watched_where_packets_are_put_straight_into_them() {
    assert_pod_is_watched(Cni::RedirectPeer);
    if is_at_least((6, 7)) {
        assert_pod_is_watched(Cni::Netkit);
    }
}

#[test]
fn strangers_of_every_kind_that_were_there_before_stop_nothing() {
    strangers::there_before();
}

#[test]
fn strangers_of_every_kind_that_came_between_stop_nothing() {
    strangers::come_between();
}

#[test]
fn frames_that_tunnel_devices_send_are_collected_exactly_also_beside_devices_that_end_tunnels() {
    senders::run();
}
