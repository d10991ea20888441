//! Every kind of out interface: what leaves it is finished, fits and is whole; and where it is a tunnel whose own packets
//! pass the watched interface, they are not copied again.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::lab;
use crate::lab::capture::{Capture, Direction, tshark_fields};
use crate::lab::decode::{Copy, Port, decap_gre, gre_packets, inner_frames, tcp_stream, verify_checksums};
use crate::lab::frames::{self, Ends};
use crate::lab::judge::UP;
use crate::lab::traffic::Background;
use crate::lab::tunnels::{self, Kind, raw_packets};
use crate::lab::{
    COLLECTOR_IP, COLLECTOR_IP6, COLLECTOR_MAC, Lab, Ns, OUT_IP, OUT_IP6, Options, PEER_IP, mac_text, poll,
};

/// Through each out interface, each way.
const BYTES: usize = 1 << 20;

/// A way out.
struct Out {
    lab: Lab,
    remote: String,
    /// Where copies are looked at: as they leave, or as they arrive.
    at: (Ns, &'static str, Direction),
    mtu: usize,
    options: &'static [&'static str],
    /// Packets there have no Ethernet header.
    bare: bool,
    /// The user-space tunnel that the out interface is.
    _tunnel: Option<Background>,
}

impl Out {
    /// By out0, or something over it, to col0, where everything comes as it leaves.
    fn over_out0(lines: &str) -> Out {
        Out::from_lab(Lab::new(), lines)
    }

    fn from_lab(lab: Lab, lines: &str) -> Out {
        lab.host(&["ethtool", "-K", "out0", "tx", "on", "sg", "on", "tso", "on", "gso", "on"]);
        if !lines.is_empty() {
            lab.ip_batch(Ns::Host, lines);
        }
        Out {
            lab,
            remote: COLLECTOR_IP.to_string(),
            at: (Ns::Collector, "col0", Direction::In),
            mtu: 1500,
            options: &[],
            bare: false,
            _tunnel: None,
        }
    }

    fn capture(&self) -> Capture {
        let (ns, dev, direction) = self.at;
        match dev {
            "peer0" => self.lab.capture(ns, dev, direction), // where the watched super-packets are, too
            _ => self.lab.capture_wire(ns, dev, direction),
        }
    }

    fn up(&self, more: &[&str]) {
        let args = [&["up", "eth0", "--tunnel", "gre", "--remote", &self.remote], self.options, more].concat();
        self.lab.said(&args).ok();
    }
}

/// Addresses of out0 go to `dev`, which is made by `lines`.
fn moved_to(dev: &str, lines: &str) -> String {
    format!(
        "address flush dev out0\n{lines}\nlink set dev {dev} addrgenmode none\nlink set dev {dev} up\n\
         address add {OUT_IP}/24 dev {dev}\nneigh replace {COLLECTOR_IP} lladdr {} nud permanent dev {dev}",
        mac_text(COLLECTOR_MAC)
    )
}

fn veth() -> Out {
    Out::over_out0("")
}

const BRIDGE: &str = "link add br0 type bridge mcast_snooping 0\nlink set dev out0 master br0";

fn bridge() -> Out {
    Out::over_out0(&moved_to("br0", BRIDGE))
}

fn macvlan() -> Out {
    Out::over_out0(&moved_to("mv0", "link add mv0 link out0 type macvlan mode bridge"))
}

/// A vxlan device over `dev`, which is out0 or, made by `lines`, stands on it. The collector's own device ends it.
fn vxlan_over(dev: &str, lines: &str) -> Out {
    let lower = Out::from_lab(Lab::with(Options { out_mtu: 1600, ..Options::default() }), lines);
    let (near, far) = (mac_text([2, 0, 0, 0, 3, 1]), mac_text([2, 0, 0, 0, 3, 2]));
    let device = |address: &str, local, remote, dev: &str| {
        format!(
            "link add vx0 address {address} mtu 1500 type vxlan id 9 local {local} remote {remote} dstport 4789 dev {dev}\n\
             link set dev vx0 addrgenmode none\nlink set dev vx0 up"
        )
    };
    lower.lab.ip_batch(
        Ns::Host,
        &format!(
            "{}\naddress add 203.0.113.1/24 dev vx0\nneigh replace 203.0.113.2 lladdr {far} nud permanent dev vx0",
            device(&near, OUT_IP, COLLECTOR_IP, dev)
        ),
    );
    lower.lab.ip_batch(
        Ns::Collector,
        &format!("address add {COLLECTOR_IP}/24 dev col0\n{}", device(&far, COLLECTOR_IP, OUT_IP, "col0")),
    );
    lower.lab.offloads_off(Ns::Collector, "vx0");
    Out { remote: "203.0.113.2".into(), at: (Ns::Collector, "vx0", Direction::In), ..lower }
}

/// No offloads, as a NIC's wire has none.
fn like_a_nic() -> Out {
    let out = Out::over_out0("");
    out.lab.offloads_off(Ns::Host, "out0");
    out
}

fn watched() -> Out {
    Out { remote: PEER_IP.to_string(), at: (Ns::Peer, "peer0", Direction::In), ..Out::over_out0("") }
}

const TUNNEL_PORT: u16 = 4444;

/// A user-space tunnel whose packets go to the peer by the watched interface, and are dropped there.
fn user_space(mode: &'static str, more: &str) -> Out {
    let lab = Lab::new();
    lab.peer(&["sysctl", "-qw", "net.ipv4.icmp_ratelimit=0", "net.ipv4.icmp_msgs_per_sec=10000"]);
    let tunnel = lab.background(
        Ns::Host,
        &[
            "socat",
            "-b",
            "65536",
            &format!("TUN,tun-name=utun,tun-type={mode},iff-no-pi,iff-up"),
            &format!("UDP4-SENDTO:{PEER_IP}:{TUNNEL_PORT},bind=:{TUNNEL_PORT}"),
        ],
    );
    let made = poll(lab::PATIENCE, || {
        let link = lab.try_host(&["ip", "link", "show", "dev", "utun"]);
        String::from_utf8_lossy(&link.stdout).contains("LOWER_UP").then_some(())
    });
    made.expect("socat makes its interface");
    lab.ip_batch(Ns::Host, more);
    let options = &["--underlay", "192.0.2.2:4444"];
    let at = (Ns::Host, "utun", Direction::Out);
    Out { lab, remote: "203.0.113.2".into(), at, mtu: 1500, options, bare: mode == "tun", _tunnel: Some(tunnel) }
}

fn tap() -> Out {
    user_space("tap", &addressed("utun"))
}

fn tun() -> Out {
    user_space("tun", "address add 203.0.113.1/24 dev utun")
}

/// An address on an Ethernet interface, and a neighbour there.
fn addressed(dev: &str) -> String {
    format!(
        "link set dev {dev} addrgenmode none\nlink set dev {dev} up\naddress add 203.0.113.1/24 dev {dev}\n\
         neigh replace 203.0.113.2 lladdr 02:00:00:00:03:02 nud permanent dev {dev}"
    )
}

/// Waits until everything asked for is sent; nothing may be dropped.
#[track_caller]
fn all_sent(lab: &Lab, what: &str) -> u64 {
    let sent = poll(lab::PATIENCE, || {
        let status = lab.session();
        let sent = status.remotes_total().pcnt;
        (status.taps_total().pcnt == sent).then_some(sent)
    });
    sent.unwrap_or_else(|| panic!("{what}: Expected asked = sent, got {:#}", lab.session()))
}

/// The copies in a capture, whatever else is in it.
fn copies(out: &Out, capture: &mut Capture) -> Vec<Copy> {
    capture.settle();
    let frames = if out.bare {
        capture.finish();
        let ethernet = [&[0; 12][..], &[8, 0]].concat();
        raw_packets(capture.pcap()).into_iter().map(|packet| [&ethernet[..], &packet].concat()).collect()
    } else {
        capture.stop()
    };
    decap_gre(&gre_packets(&frames, out.remote.parse().unwrap()))
}

/// Checksums inside and outside the copies, as tshark sees them.
#[track_caller]
fn assert_no_fault(what: &str, capture: &Capture) {
    // 0xffff is as right as 0, which the kernel makes of it where it finishes a checksum itself.
    let faulty = "ip.checksum.status == 0 || (tcp.checksum.status == 0 && tcp.checksum != 0xffff) || udp.checksum.status == 0 || _ws.malformed";
    let faults = tshark_fields(capture.pcap(), &format!("gre && ({faulty})"), &["frame.number", "_ws.col.Info"]);
    assert!(faults.is_empty(), "{what}: {} faults, first {:?}", faults.len(), faults.first());
}

/// A TCP transfer each way arrives whole, finished and within the MTU; with `segment` most of it unfragmented.
fn assert_whole(out: &Out) {
    for mode in ["segment", "fragment"] {
        out.up(&["--oversize", mode]);
        for (from, to) in [(Ns::Host, Ns::Peer), (Ns::Peer, Ns::Host)] {
            let what = format!("{mode}, from {from:?}");
            let before = all_sent(&out.lab, &what);
            let mut capture = out.capture();
            // All of what is captured with the watched super-packets must find room.
            let bytes = if out.at.1 == "peer0" { BYTES / 4 } else { BYTES };
            let transfer = out.lab.tcp_transfer(bytes, from, to);
            let sent = all_sent(&out.lab, &what) - before;
            let copies = copies(out, &mut capture);
            assert_no_fault(&what, &capture);
            assert_stream(out, &what, &copies, (transfer.port, &transfer.data));
            match mode {
                "segment" => assert_mostly_whole(&what, &copies),
                _ => assert_eq!(copies.len() as u64, sent, "{what}: each wire frame is one copy"),
            }
        }
        out.lab.said(&["down"]).ok();
    }
}

#[track_caller]
fn assert_stream(out: &Out, what: &str, copies: &[Copy], (port, data): (u16, &[u8])) {
    let longest = copies.iter().flat_map(|copy| &copy.outer_lens).max();
    assert!(longest.is_some_and(|longest| *longest <= out.mtu), "{what}: {longest:?} bytes over an MTU of {}", out.mtu);
    let inner = inner_frames(copies);
    inner.iter().for_each(|frame| verify_checksums(frame));
    assert!(tcp_stream(&inner, Port::Dst(port)) == data, "{what}: the copied stream differs");
}

/// Super-packets are cut to fit; frames that were sent by themselves are in fragments.
#[track_caller]
fn assert_mostly_whole(what: &str, copies: &[Copy]) {
    let fragmented = copies.iter().filter(|copy| copy.outer_lens.len() > 1).count();
    assert!(2 * fragmented < copies.len(), "{what}: {fragmented} of {} are in fragments", copies.len());
}

#[test]
fn copies_leave_a_veth_finished_and_whole() {
    assert_whole(&veth());
}

#[test]
fn copies_leave_a_bridge_finished_and_whole() {
    assert_whole(&bridge());
}

#[test]
fn copies_leave_a_macvlan_finished_and_whole() {
    assert_whole(&macvlan());
}

#[test]
fn copies_leave_a_vxlan_device_finished_and_whole() {
    assert_whole(&vxlan_over("out0", ""));
}

#[test]
fn copies_leave_a_vxlan_device_over_a_bridge_finished_and_whole() {
    assert_whole(&vxlan_over("br0", &moved_to("br0", BRIDGE)));
}

#[test]
fn copies_leave_an_interface_without_offloads_finished_and_whole() {
    assert_whole(&like_a_nic());
}

#[test]
fn copies_leave_the_watched_interface_finished_and_whole() {
    assert_whole(&watched());
}

#[test]
fn copies_leave_a_tap_finished_and_whole() {
    assert_whole(&tap());
}

#[test]
fn copies_leave_a_tun_finished_and_whole() {
    assert_whole(&tun());
}

/// Where even the watched frame is longer than the way out, segments are cut by more than the headers that they get.
#[test]
fn super_packets_are_cut_to_fit_whatever_the_mtu() {
    for (out, devices) in [(veth(), ["out0", "col0"]), (like_a_nic(), ["out0", "col0"])] {
        for mtu in [1420, 600] {
            for (ns, dev) in [Ns::Host, Ns::Collector].into_iter().zip(devices) {
                out.lab.run(ns, &["sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1"]);
                out.lab.run(ns, &["ip", "link", "set", "dev", dev, "mtu", &mtu.to_string()]);
            }
            let what = format!("MTU {mtu}");
            out.up(&[]);
            let mut capture = out.capture();
            let transfer = out.lab.tcp_transfer(BYTES / 4, Ns::Host, Ns::Peer);
            all_sent(&out.lab, &what);
            let copies = copies(&out, &mut capture);
            let longest = copies.iter().flat_map(|copy| &copy.outer_lens).max();
            assert_eq!(longest, Some(&mtu), "{what}: the room is used");
            assert_no_fault(&what, &capture);
            assert_stream(&out, &what, &copies, (transfer.port, &transfer.data));
            assert_mostly_whole(&what, &copies);
            out.lab.said(&["down"]).ok();
        }
    }
}

/// Of each tunnel and outer family: what gets its header before it is cut and finished, and what only after.
const TUNNELS: [(&[&str], Kind); 8] = [
    (&["gre", "--id", "7"], Kind::Gre),
    (&["vxlan"], Kind::Vxlan(4789)),
    (&["vxlan", "--udp-checksum"], Kind::Vxlan(4789)),
    (&["geneve"], Kind::Geneve(6081)),
    (&["geneve", "--tell"], Kind::Tell(6081)),
    (&["erspan1"], Kind::Erspan1),
    (&["erspan2"], Kind::Erspan2),
    (&["erspan3"], Kind::Erspan3),
];

#[test]
fn copies_in_every_tunnel_leave_a_bridge_finished_and_whole() {
    let out = bridge();
    out.lab.ip_batch(
        Ns::Host,
        &format!(
            "address add {OUT_IP6}/64 dev br0 nodad\nneigh replace {COLLECTOR_IP6} lladdr {} nud permanent dev br0",
            mac_text(COLLECTOR_MAC)
        ),
    );
    let (v4, v6) = (IpAddr::from(COLLECTOR_IP), IpAddr::from(COLLECTOR_IP6));
    for (mtu, remotes) in [(1500, &[v4, v6][..]), (1600, &[v4])] {
        for dev in ["out0", "br0"] {
            out.lab.host(&["ip", "link", "set", "dev", dev, "mtu", &mtu.to_string()]);
        }
        out.lab.collector(&["ip", "link", "set", "dev", "col0", "mtu", &mtu.to_string()]);
        for (tunnel, kind) in TUNNELS {
            for remote in remotes {
                assert_tunnel_whole(&out, mtu, tunnel, kind, *remote);
            }
        }
    }
}

#[track_caller]
fn assert_tunnel_whole(out: &Out, mtu: usize, tunnel: &[&str], kind: Kind, remote: IpAddr) {
    let what = format!("{tunnel:?} to {remote}, MTU {mtu}");
    out.lab.said(&[&["up", "eth0", "--remote", &remote.to_string(), "--tunnel"], tunnel].concat()).ok();
    let mut capture = out.capture();
    let transfer = out.lab.tcp_transfer(BYTES / 4, Ns::Host, Ns::Peer);
    let sent = all_sent(&out.lab, &what) as usize;
    capture.settle();
    let copies = tunnels::decap(kind, &tunnels::packets_to(&capture.stop(), remote));
    assert!(copies.iter().flat_map(|copy| &copy.outer.lens).all(|len| *len <= mtu), "{what}");
    assert!(
        if mtu == 1600 { copies.len() == sent } else { copies.len() >= sent },
        "{what}: {} of {sent}",
        copies.len()
    );
    let inner = tunnels::inner(&copies);
    inner.iter().for_each(|frame| verify_checksums(frame));
    assert!(tcp_stream(&inner, Port::Dst(transfer.port)) == transfer.data, "{what}: the copied stream differs");
    out.lab.said(&["down"]).ok();
}

/// A super-packet of which a part is lost is lost as a whole, and counts by its wire frames.
#[test]
fn super_packets_that_the_relay_loses_are_counted_in_wire_frames() {
    let out = veth();
    out.up(&[]);
    out.lab.host(&["ip", "link", "set", "dev", "snif0p", "down"]);
    out.lab.tcp_transfer(BYTES, Ns::Host, Ns::Peer);
    let counted = poll(lab::PATIENCE, || {
        let status = out.lab.session();
        let (asked, sent) = (status.taps_total().pcnt, status.remotes_total().pcnt);
        let lost = status.dropped("relay");
        // What the stack finishes itself, the last acknowledgement of a closed connection, need not cross.
        (lost > (BYTES / 1448) as u64 && asked == lost + sent && sent <= 2).then_some(status)
    });
    let status = counted.unwrap_or_else(|| panic!("Expected all to be lost by the relay, got {:#}", out.lab.session()));
    assert_eq!(status.remotes_total().dcnt, status.taps_total().dcnt);
}

// ---- tunnels whose own packets pass the watched interface ----

/// Sends pings one after another, and panics unless each makes two copies and no more.
#[track_caller]
fn assert_each_ping_copied_once(out: &Out) {
    let mut capture = out.capture();
    for pings in 1..=3 {
        out.lab.host(&["ping", "-c", "1", "-W", "5", &PEER_IP.to_string()]);
        let sent = all_sent(&out.lab, "ping");
        assert_eq!(sent, 2 * pings, "copies of {pings} pings, one request and one reply each");
    }
    let copies = copies(out, &mut capture);
    let icmp: Vec<u8> = copies.iter().map(|copy| copy.frame[34]).collect();
    assert_eq!(icmp, [8, 0, 8, 0, 8, 0], "each request and each reply is copied once, in their order");
}

#[test]
fn a_ping_beside_a_tap_is_copied_once() {
    let out = tap();
    out.up(&[]);
    assert_each_ping_copied_once(&out);
}

#[test]
fn a_ping_beside_a_tun_is_copied_once() {
    let out = tun();
    out.up(&[]);
    assert_each_ping_copied_once(&out);
}

/// What stands on a tap, and what the kernel's own tunnel sends into it.
const OVER_A_TAP: [(&str, &str); 4] = [
    ("utun", ""),
    ("br1", "link add br1 type bridge mcast_snooping 0\nlink set dev utun master br1\n"),
    ("mv1", "link add mv1 link utun type macvlan mode bridge\n"),
    (
        "vx1",
        "address add 203.0.113.65/26 dev utun\n\
         neigh replace 203.0.113.66 lladdr 02:00:00:00:03:03 nud permanent dev utun\n\
         link add vx1 mtu 1400 type vxlan id 3 local 203.0.113.65 remote 203.0.113.66 dstport 4789\n",
    ),
];

#[test]
fn whatever_stands_on_a_tap_is_asked_where_its_packets_go() {
    for (dev, lines) in OVER_A_TAP {
        let address = if dev == "vx1" { "203.0.113.1/26" } else { "203.0.113.1/24" };
        let out = user_space("tap", &format!("{lines}{}", addressed(dev).replace("203.0.113.1/24", address)));
        let up = ["up", "eth0", "--tunnel", "gre", "--remote", &out.remote];
        let over =
            if dev == "utun" { "through utun, a tunnel".into() } else { format!("through {dev} over utun, a tunnel") };
        out.lab.said(&up).refused(1, &over, "--underlay 203.0.113.5:51820");
        out.lab.assert_no_pins();
        // Where nothing that it sends can pass a tap, nobody is asked.
        out.lab.said(&[&up[..], &["--direction", "ingress"]].concat()).ok();
        out.lab.said(&["down"]).ok();
        out.up(&[]);
        assert_each_ping_copied_once(&Out { at: (Ns::Host, dev, Direction::Out), ..out });
    }
}

#[test]
fn a_remote_behind_a_tap_is_not_added_without_a_word() {
    let out = tap();
    out.lab.said(&["up", "eth0", "--tunnel", "gre", "--remote", &COLLECTOR_IP.to_string()]).ok();
    let add = ["remote", "add", &out.remote];
    out.lab.said(&add).refused(1, "through utun, a tunnel", "--underlay 203.0.113.5:51820");
    let up = ["up", "out0", "--tunnel", "gre", "--name", "b", "--underlay", "192.0.2.2:4444", "--remote"];
    out.lab.said(&[&up[..], &[&COLLECTOR_IP.to_string()]].concat()).ok();
    out.lab.said(&["tap", "add", "eth0", "--name", "b"]).ok();
    out.lab.said(&[&add[..], &["--name", "b"]].concat()).ok();
    out.lab.said(&["down", "--name", "default"]).ok();
    out.lab.host(&["ping", "-c", "1", "-W", "5", &PEER_IP.to_string()]);
    // Two frames, each to both remotes. The copies to the collector pass out0, which is watched too.
    assert_eq!(all_sent(&out.lab, "ping"), 4);
}

// ---- many devices above one another ----

/// The ends of what stands on the watched link.
const NEAR_TOP: &str = "203.0.113.129";
const FAR_TOP: [u8; 4] = [203, 0, 113, 130];

/// Devices over eth0, the first at the bottom, each with its line. A packet to FAR_TOP passes all of them.
const STACK: [&str; 4] = [
    "link add w1 mtu 1400 type vxlan id 7 local 192.0.2.1 remote 192.0.2.2 dstport 4790 dev eth0",
    "link add w2 mtu 1400 type bridge mcast_snooping 0\nlink set dev w1 master w2",
    "link add w3 link w2 type macvlan mode private",
    "link add w4 mtu 1400 type bridge mcast_snooping 0\nlink set dev w3 master w4",
];

/// Builds the lowest `height` of them. The peer has only the bottom's other end.
fn make_stack(lab: &Lab, height: usize) {
    let [near, far] = [[2, 0, 0, 0, 4, 1], [2, 0, 0, 0, 4, 2]].map(mac_text);
    let mut lines: Vec<String> = STACK[..height].iter().map(|line| line.to_string()).collect();
    for level in 1..=height {
        let mac = if level == height { near.clone() } else { mac_text([2, 0, 0, 0, 5, level as u8]) };
        lines.push(format!("link set dev w{level} addrgenmode none address {mac}\nlink set dev w{level} up"));
    }
    lines.push(format!("address add {NEAR_TOP}/25 dev w{height}"));
    let to = IpAddr::from(FAR_TOP);
    lines.push(format!("neigh replace {to} lladdr {far} nud permanent dev w{height}"));
    lab.ip_batch(Ns::Host, &lines.join("\n"));
    lab.ip_batch(
        Ns::Peer,
        &format!(
            "link add w1 address {far} mtu 1400 type vxlan id 7 local 192.0.2.2 remote 192.0.2.1 dstport 4790 dev peer0\n\
             link set dev w1 addrgenmode none\nlink set dev w1 up\naddress add {to}/25 dev w1\n\
             neigh replace {NEAR_TOP} lladdr {near} nud permanent dev w1"
        ),
    );
}

/// What the host sends through a stack, watched at its top or at its bottom, leaves whole by other devices.
#[test]
fn copies_of_a_stack_of_devices_are_whole() {
    for out in [bridge(), macvlan(), vxlan_over("out0", ""), vxlan_over("br0", &moved_to("br0", BRIDGE))] {
        let by_tunnel = out.at.1 == "vx0";
        for height in [1, 3] {
            make_stack(&out.lab, height);
            let top = format!("w{height}");
            for mode in ["segment", "fragment"] {
                assert_stack_whole(&out, &top, mode);
                match by_tunnel {
                    true => assert_refused_below_a_stack(&out, mode),
                    false => assert_stack_whole(&out, "eth0", mode),
                }
            }
            for level in (1..=height).rev() {
                out.lab.host(&["ip", "link", "del", "dev", &format!("w{level}")]);
            }
            out.lab.peer(&["ip", "link", "del", "dev", "w1"]);
        }
    }
}

#[track_caller]
fn assert_stack_whole(out: &Out, watch: &str, mode: &str) {
    let what = format!("{watch} {mode}");
    out.lab.said(&["up", watch, "--tunnel", "gre", "--remote", &out.remote, "--oversize", mode]).ok();
    let mut capture = out.capture();
    out.lab.tcp_transfer_at(BYTES / 4, Ns::Host, Ns::Peer, FAR_TOP.into());
    let sent = all_sent(&out.lab, &what);
    let copies = copies(out, &mut capture);
    assert!(copies.len() as u64 >= sent, "{what}: {} of {sent} copies arrived", copies.len());
    copies.iter().for_each(|copy| verify_checksums(&copy.frame));
    assert_no_fault(&what, &capture);
    out.lab.said(&["down"]).ok();
}

/// From Linux 6.12 on, what the host sends by a device that stands on the watched one would be lost.
#[track_caller]
fn assert_refused_below_a_stack(out: &Out, mode: &str) {
    let up = ["up", "eth0", "--tunnel", "gre", "--remote", &out.remote, "--oversize", mode];
    out.lab.said(&up).refused(1, "through the tunnel vx0, and w1 stands on eth0", "as in: snifctl up w1");
    // What comes in has not been through any of them.
    out.lab.said(&[&up[..], &["--direction", "ingress"]].concat()).ok();
    out.lab.said(&["down"]).ok();
    // A pattern passes it over.
    let said = out.lab.said(&[&["up", "eth*"], &up[2..]].concat()).ok();
    assert!(said.stderr.contains("eth0 is left out: w1 stands on it"), "{said:#?}");
    assert_eq!(out.lab.session().taps, []);
    assert_eq!(out.lab.said(&["status", "--check"]).ok().stdout, "");
    out.lab.said(&["down"]).ok();
}

#[test]
fn what_stands_on_a_tunnel_of_the_kernels_is_no_way_out() {
    let out = vxlan_over("out0", "");
    let lines = "address flush dev vx0\nlink add mv1 link vx0 type macvlan mode private\n";
    out.lab.ip_batch(Ns::Host, &format!("{lines}{}", addressed("mv1")));
    let up = ["up", "eth0", "--tunnel", "gre", "--remote", &out.remote];
    out.lab.said(&up).refused(1, "through mv1, which stands on a tunnel", "ip route add 203.0.113.2 dev eth0");
}

/// What `up` could not see: the stack comes later.
#[test]
fn what_a_tunnel_drops_as_nested_too_deeply_is_counted() {
    let out = vxlan_over("out0", "");
    out.up(&[]);
    make_stack(&out.lab, 1);
    let mut capture = out.capture();
    out.lab.tcp_transfer_at(BYTES / 4, Ns::Host, Ns::Peer, FAR_TOP.into());
    let sent = all_sent(&out.lab, "a stack");
    let arrived = copies(&out, &mut capture).len() as u64;
    assert!(arrived < sent, "the kernel has lost its limit: {arrived} of {sent}");
    assert_eq!(out.lab.session().out_dropped, sent - arrived);
}

// ---- losses behind us ----

fn qdisc(lab: &Lab, words: &str) {
    let all = [&["tc", "qdisc", "replace", "dev", "out0", "root"], &words.split(' ').collect::<Vec<_>>()[..]].concat();
    lab.host(&all);
}

/// How many outer packets, of two fragments each, are whole.
fn whole(packets: &[Vec<u8>]) -> u64 {
    let mut parts: BTreeMap<[u8; 2], u64> = BTreeMap::new();
    packets.iter().for_each(|packet| *parts.entry([packet[18], packet[19]]).or_default() += 1);
    parts.values().filter(|count| **count == 2).count() as u64
}

/// The out interface is asked about each fragment.
#[test]
fn a_copy_of_which_the_queue_refuses_a_fragment_counts_once() {
    let lab = Lab::new();
    // A queue that is there at `up`, as at every NIC: then each fragment is a clone, whose fate is told.
    qdisc(&lab, "tbf rate 5mbit burst 3100 limit 8000");
    lab.said(&[&UP[..], &["--oversize", "fragment"]].concat()).ok();
    let mut collector = lab.capture(Ns::Collector, "col0", Direction::In);
    let large: Vec<Vec<u8>> = (0..211).map(|n| frames::jumbo(&Ends::PEER_TO_HOST, n, 1514)).collect();
    lab.send(Ns::Peer, "peer0", &large);
    let (asked, sent, lost) = lab.session().accounts("out");
    assert_eq!(asked, 211);
    assert!(sent > 0 && lost > 0, "{sent} sent, {lost} lost");
    let empty = || lab.shown(&["tc", "-j", "-s", "qdisc", "show", "dev", "out0", "root"]).contains("\"qlen\":0");
    poll(lab::PATIENCE, || empty().then_some(())).expect("the queue runs empty");
    collector.settle();
    assert_eq!(whole(&collector.stop()), sent);
    qdisc(&lab, "pfifo limit 0");
    lab.send(Ns::Peer, "peer0", &large[..13]);
    assert_eq!(lab.session().accounts("out"), (224, sent, lost + 13));
}

/// What is dropped of copies that leave whole is known from the interface alone, by whatever name and queue it has.
#[test]
fn what_out_interfaces_have_dropped_never_falls() {
    let lab = Lab::roomy();
    lab.said(&UP).ok();
    let dropped = || lab.session().out_dropped;
    let send = |n: u32| lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, n));
    qdisc(&lab, "pfifo limit 0");
    send(13);
    assert_eq!(dropped(), 13);
    qdisc(&lab, "pfifo limit 1000");
    send(7);
    assert_eq!(dropped(), 13, "a queue that drops nothing");
    qdisc(&lab, "tbf rate 1gbit burst 100000 limit 100000");
    assert_eq!(dropped(), 13, "a new queue");
    qdisc(&lab, "pfifo limit 0");
    send(11);
    assert_eq!(dropped(), 24, "and another");
    lab.host(&["ip", "link", "set", "dev", "out0", "name", "up0"]);
    send(5);
    assert_eq!(dropped(), 29, "by another name");
    lab.host(&["ip", "link", "del", "dev", "up0"]);
    assert_eq!(dropped(), 29, "without the interface");
    let collector = lab.ns_name(Ns::Collector);
    lab.ip_batch(
        Ns::Host,
        &format!(
            "link add out0 mtu 1600 type veth peer name col0 mtu 1600 netns {collector}\n\
             link set out0 addrgenmode none up\naddress add 198.51.100.1/24 dev out0\n\
             neigh replace 198.51.100.2 lladdr 02:00:00:00:02:02 nud permanent dev out0"
        ),
    );
    lab.ip_batch(Ns::Collector, "link set col0 addrgenmode none up");
    lab.said(&UP).ok();
    assert_eq!(dropped(), 29, "with another interface of that name");
    qdisc(&lab, "pfifo limit 0");
    send(3);
    assert_eq!(dropped(), 32, "which drops, too");
}
