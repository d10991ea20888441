//! Copies do not copy themselves without end: collectors on the watched link, hosts that watch each other, routers that
//! send copies back, VPNs that carry them; and out interfaces without Ethernet, which these are.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::Child;
use std::time::Duration;

use crate::lab;
use crate::lab::capture::{Capture, Direction};
use crate::lab::check::assert_same_frames;
use crate::lab::decode::{Port, decap_gre, gre_packets, inner_frames, tcp_stream, verify_checksums};
use crate::lab::frames::{self, Ends};
use crate::lab::judge::Said;
use crate::lab::status::{Session, Status, TapCounts};
use crate::lab::tunnel_case::*;
use crate::lab::tunnels::{Kind, Link, Tunnelled, decap, decap_on, inner, packets_to, raw_packets};
use crate::lab::{HOST_IP, Lab, Ns, Options, PATIENCE, PEER_IP, PEER_IP6, poll};

const SNIFCTL: &str = env!("CARGO_BIN_EXE_snifctl");

/// Runs snifctl with the words of this line in a namespace; panics unless it succeeds.
#[track_caller]
fn line(lab: &Lab, ns: Ns, words: &str) -> Said {
    let mut command = lab.command(ns, &[SNIFCTL]);
    let said = Said::from(command.args(words.split(' ')).output().expect("run snifctl"));
    said.ok()
}

fn session(lab: &Lab, ns: Ns) -> Session {
    Status::of(line(lab, ns, "status --json").json()).sessions.swap_remove(0)
}

fn of_taps(session: &Session, what: impl Fn(&TapCounts) -> u64) -> u64 {
    session.taps.iter().map(|tap| what(&tap.counts)).sum()
}

// ---- copies that come back ----

/// The two ends of the watched link, each the other's collector: the words that each `up` ends with, and what each then
/// does with 13 frames that the host sends: copies asked for, sent, and given up as copies of copies.
const PAIRS: [(&str, &str, (u64, u64, u64)); 3] = [
    // The other's copies are known by protocol, key and addresses.
    ("--tunnel gre --id 7", "--tunnel gre --id 7", (13, 13, 0)),
    // Else they are traffic, and copied once: 13 frames, 13 copies of these, 13 copies of those given up.
    ("--tunnel gre --id 7", "--tunnel gre --id 8", (39, 26, 13)),
    ("--tunnel gre", "--tunnel vxlan", (39, 26, 13)),
];

#[test]
fn two_hosts_that_are_each_others_collector_do_not_copy_without_end() {
    for (host, peer, expected) in PAIRS {
        let lab = Lab::with(Options { watched_mtu: 9000, watched_offloads_off: true, ..Options::default() });
        let ends = [(Ns::Host, "eth0"), (Ns::Peer, "peer0")];
        // Nothing listens at either end: the kernel would answer each copy with an ICMP error, which is traffic.
        let silence =
            "table ip t { chain c { type filter hook output priority 0; icmp type destination-unreachable drop; }; }";
        ends.iter().for_each(|(ns, _)| drop(lab.run(*ns, &["nft", silence])));
        let before = ends.map(|(ns, dev)| lab.packets(ns, dev));
        line(&lab, Ns::Host, &format!("up eth0 --remote 192.0.2.2 --max-rate 1gbit {host}"));
        line(&lab, Ns::Peer, &format!("up peer0 --remote 192.0.2.1 --max-rate 1gbit {peer}"));
        lab.send(Ns::Host, "eth0", &frames::series(&Ends::HOST_TO_PEER, 13));
        for ((ns, dev), before) in ends.into_iter().zip(before) {
            let settled = poll(PATIENCE, || (session(&lab, ns).taps_total().pcnt >= expected.0).then_some(()));
            assert!(settled.is_some(), "{host} and {peer}: {:#}", session(&lab, ns));
            let session = session(&lab, ns);
            assert_eq!(session.accounts("depth"), expected, "{ns:?} of {host} and {peer}: {session:#}");
            let passed = poll(PATIENCE, || {
                let (received, sent) = lab.packets(ns, dev);
                (received + sent - before.0 - before.1 == of_taps(&session, |tap| tap.seen + tap.own)).then_some(())
            });
            assert!(passed.is_some(), "seen + own = all: {:?} of {dev}, {session:#}", lab.packets(ns, dev));
        }
        ends.iter().for_each(|(ns, _)| drop(line(&lab, *ns, "down")));
    }
}

/// GRE around a frame, between hosts that we do not know.
fn in_gre(ends: &Ends, frame: &[u8]) -> Vec<u8> {
    let body = [&[0, 0], &frames::ETH_TEB.to_be_bytes()[..], frame].concat();
    frames::ethernet(ends, frames::ETH_IPV4, &frames::ipv4(ends, frames::GRE, frames::Ipv4::default(), &body))
}

/// A copy that comes back with other addresses is traffic; a copy of that, come back again, is one too many.
#[test]
fn copies_that_come_back_changed_by_nat_end_soon() {
    let lab = Lab::with(Options { out_mtu: 1700, ..Options::default() });
    line(&lab, Ns::Host, "up eth0 --tunnel gre --remote 198.51.100.2");
    let ends = Ends::PEER_TO_HOST;
    let plain = frames::series(&ends, 7);
    let once: Vec<Vec<u8>> = (0..11).map(|n| frames::gre(&ends, n)).collect();
    let twice: Vec<Vec<u8>> = once.iter().map(|frame| in_gre(&ends, frame)).collect();
    let thrice: Vec<Vec<u8>> = twice.iter().take(5).map(|frame| in_gre(&ends, frame)).collect();
    let foreign: Vec<Vec<u8>> = (0..3).map(|n| in_gre(&ends, &frames::vxlan(&ends, n))).collect();
    let mut collector = lab.capture(Ns::Collector, "col0", Direction::In);
    lab.send(Ns::Peer, "peer0", &[&plain[..], &once, &twice, &thrice, &foreign].concat());
    // VXLAN is not this session's kind of tunnel, and its ends are strangers: how deep it lies does not matter.
    let copied = [plain, once, foreign].concat();
    assert_same_frames(&copied, &inner_frames(&decap_gre(&collector.take(copied.len()))));
    assert_eq!(session(&lab, Ns::Host).accounts("depth"), (37, 21, 16));
}

/// The link's other end sends our copies back with another source, as a router that translates addresses does.
#[test]
fn copies_that_a_router_sends_back_translated_are_copied_once_more_and_no_further() {
    let lab = Lab::with(Options { watched_mtu: 9000, watched_offloads_off: true, ..Options::default() });
    line(&lab, Ns::Host, "up eth0 --tunnel gre --remote 192.0.2.2 --max-rate 1gbit");
    // 192.0.2.1 becomes 192.0.2.99, the MAC addresses change places, and the packet goes back where it came from.
    let back = "table netdev t { chain c { type filter hook ingress device peer0 priority 0;
        ip protocol 47 ip saddr set 192.0.2.99 ether saddr set 02:00:00:00:01:02 ether daddr set 02:00:00:00:01:01 \
            fwd to peer0; }; }";
    lab.peer(&["nft", back]);
    let mut wire = lab.capture(Ns::Peer, "peer0", Direction::In);
    let frames = frames::series(&Ends::HOST_TO_PEER, 13);
    lab.send(Ns::Host, "eth0", &frames);
    let settled = poll(PATIENCE, || (session(&lab, Ns::Host).taps_total().pcnt >= 39).then_some(()));
    assert!(settled.is_some(), "{:#}", session(&lab, Ns::Host));
    // The frames, their copies come back, and the copies of those, which are given up.
    assert_eq!(session(&lab, Ns::Host).accounts("depth"), (39, 26, 13));
    wire.settle();
    assert_eq!(gre_packets(&wire.stop(), lab::PEER_IP).len(), 26);
}

// ---- a collector on the watched link ----

#[test]
fn copies_through_the_watched_interface_and_errors_that_quote_them_are_not_copied() {
    for (tunnel, remote) in [
        (VXLAN, IpAddr::from(PEER_IP)),
        (VXLAN_SUMMED, PEER_IP6.into()),
        (GRE_SEQUENCE, PEER_IP6.into()),
        (ERSPAN3, PEER_IP.into()),
    ] {
        let lab = Lab::new();
        answer_without_limit(&lab);
        up_to(&lab, tunnel.args, &[remote], &[]);
        let mut wire = lab.capture(Ns::Peer, "peer0", Direction::In);
        let mut answers = lab.capture(Ns::Host, "eth0", Direction::In);
        let mut frames = frames::series(&Ends::HOST_TO_PEER, 13);
        frames.push(frames::jumbo(&Ends::HOST_TO_PEER, 99, 1514));
        lab.send(Ns::Host, "eth0", &frames);
        let errors = answers.take(frames.len());
        assert!(errors.iter().all(|frame| is_icmp_error(frame)), "{tunnel:?} to {remote}: {errors:02x?}");
        let seen = packets(&lab, &mut wire);
        let ours = packets_to(&seen, remote);
        assert_eq!(seen.len() - ours.len(), frames.len(), "{tunnel:?} to {remote}");
        let copies = decap(tunnel.kind, &ours);
        assert_same_frames(&frames, &inner(&copies));
        assert_eq!(lab.settled().taps_total().pcnt, frames.len() as u64, "{tunnel:?} to {remote}");
        // Their twins, which quote something else, are copied.
        let mut other = errors[0].clone();
        let quoted_remote = if remote.is_ipv4() { 34 + 8 + 16 } else { 54 + 8 + 24 };
        other[quoted_remote + 1] ^= 0x55;
        lab.send(Ns::Peer, "peer0", &[other]);
        assert_eq!(lab.settled().taps_total().pcnt, frames.len() as u64 + 1, "{tunnel:?} to {remote}");
    }
}

/// The peer sends an ICMP error for each packet that it cannot take.
fn answer_without_limit(lab: &Lab) {
    let limits = [
        "net.ipv4.icmp_ratelimit=0",
        "net.ipv4.icmp_msgs_per_sec=100000",
        "net.ipv4.icmp_msgs_burst=100000",
        "net.ipv6.icmp.ratelimit=0",
    ];
    lab.peer(&[&["sysctl", "-qw"], &limits[..]].concat());
}

/// Destination unreachable, or an IPv6 parameter problem.
fn is_icmp_error(frame: &[u8]) -> bool {
    match frame[12] {
        0x86 => frame[20] == frames::ICMPV6 && [1, 4].contains(&frame[54]),
        _ => frame[23] == frames::ICMP && frame[34] == 3,
    }
}

// ---- an out interface without Ethernet ----

/// The remotes behind the tun device. Nobody there answers.
const BEYOND: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 98, 0, 2)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 98, 0, 0, 0, 0, 2))];
const TUN_IP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 1));
const TUN_IP6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 99, 0, 0, 0, 0, 1));

/// One end of a user-space VPN, or a tun device whose packets go nowhere.
struct Tun(Child);

impl Tun {
    /// The device with its addresses and, in the host namespace, the routes to what is beyond.
    fn open(lab: &Lab, ns: Ns, to: &[&str]) -> Tun {
        let tun = "TUN,tun-name=tun0,tun-type=tun,iff-no-pi,iff-up";
        let socat = [&["socat", "-b", "65536"], &to[1..], &[tun, to[0]]].concat();
        let child = lab.command(ns, &socat).spawn().expect("start socat");
        let tun = Tun(child);
        let exists = || lab.try_run(ns, &["ip", "link", "show", "dev", "tun0", "up"]).stdout.len() > 1;
        poll(lab::PATIENCE, || exists().then_some(())).expect("socat makes its tun device");
        if ns == Ns::Host {
            lab.ip_batch(
                ns,
                &format!(
                    "link set tun0 txqueuelen 10000\naddress add {TUN_IP}/24 dev tun0\naddress add {TUN_IP6}/64 dev \
                     tun0 nodad\nroute add {}/32 dev tun0 src {TUN_IP}\nroute add {}/128 dev tun0 src {TUN_IP6}",
                    BEYOND[0], BEYOND[1]
                ),
            );
        }
        tun
    }
}

impl Drop for Tun {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The copies among the packets of a tun device, once no more come.
fn copies_on_tun(lab: &Lab, capture: &mut Capture, kind: Kind) -> Vec<Tunnelled> {
    lab.settled();
    capture.settle();
    let packets = raw_packets(capture.pcap());
    let is_ours = |packet: &Vec<u8>| match packet[0] >> 4 {
        4 => IpAddr::from(<[u8; 4]>::try_from(&packet[16..20]).unwrap()) == BEYOND[0],
        _ => IpAddr::from(<[u8; 16]>::try_from(&packet[24..40]).unwrap()) == BEYOND[1],
    };
    let ours: Vec<Vec<u8>> = packets.into_iter().filter(is_ours).collect();
    decap_on(Link::Raw, kind, &ours)
}

fn copies_of_family(copies: &[Tunnelled], v6: bool) -> Vec<Tunnelled> {
    copies.iter().filter(|copy| copy.outer.dst.is_ipv6() == v6).cloned().collect()
}

fn copies_leave_through_a_tun_device_in(tunnel: Tunnel) {
    let lab = Lab::new();
    let _tun = Tun::open(&lab, Ns::Host, &["OPEN:/dev/null", "-u"]);
    up_to(&lab, tunnel.args, &BEYOND, &["--underlay", "none"]);
    for (from, ends) in [(Ns::Peer, Ends::PEER_TO_HOST), (Ns::Host, Ends::HOST_TO_PEER)] {
        let frames = frames::corpus_frames(&ends);
        let mut capture = lab.capture(Ns::Host, "tun0", Direction::Out);
        lab.send(from, dev_of(from), &frames);
        let copies = copies_on_tun(&lab, &mut capture, tunnel.kind);
        for case in tunnel.cases() {
            let copies = copies_of_family(&copies, case.v6);
            assert_same_frames(&frames, &inner(&copies));
            let source = if case.v6 { TUN_IP6 } else { TUN_IP };
            assert!(copies.iter().all(|copy| copy.outer.src == source), "{case:?}");
            assert_unique_ids(&copies);
        }
        let mut capture = lab.capture_wire(Ns::Host, "tun0", Direction::Out);
        let to = if from == Ns::Host { Ns::Peer } else { Ns::Host };
        let transfer = lab.tcp_transfer(MEGABYTES / 8, from, to);
        let copies = copies_on_tun(&lab, &mut capture, tunnel.kind);
        assert!(copies.iter().flat_map(|copy| &copy.outer.lens).all(|len| *len <= 1500));
        for v6 in [false, true] {
            let frames = inner(&copies_of_family(&copies, v6));
            assert!(tcp_stream(&frames, Port::Dst(transfer.port)) == transfer.data, "{tunnel:?} {v6}: differs");
            frames.iter().for_each(|frame| verify_checksums(frame));
        }
        assert_eq!(lab.settled().drops(), 0, "{tunnel:?}");
    }
}

for_each_tunnel!(copies_leave_through_a_tun_device_in:
    gre GRE, vxlan_with_checksum VXLAN_SUM, geneve GENEVE, erspan2 ERSPAN2);

#[test]
fn a_tun_device_beside_a_watched_egress_needs_an_underlay() {
    let lab = Lab::new();
    let _tun = Tun::open(&lab, Ns::Host, &["OPEN:/dev/null", "-u"]);
    let remote = BEYOND[0].to_string();
    let up = ["up", "eth0", "--tunnel", "gre", "--remote", &remote];
    lab.said(&up).refused(1, "tun0", "--underlay 203.0.113.5:51820");
    lab.said(&[&up[..], &["--direction", "egress"]].concat()).refused(1, "tun0", "--underlay 203.0.113.5:51820");
    lab.said(&[&up[..], &["--direction", "ingress"]].concat()).ok();
}

const VPN_PORT: u16 = 7000;

/// A user-space VPN over the watched link: what enters one tun0 comes out of the other's.
fn vpn(lab: &Lab) -> [Tun; 2] {
    [(Ns::Host, HOST_IP, PEER_IP), (Ns::Peer, PEER_IP, HOST_IP)]
        .map(|(ns, from, to)| Tun::open(lab, ns, &[&format!("UDP4-DATAGRAM:{to}:{VPN_PORT},bind={from}:{VPN_PORT}")]))
}

#[test]
fn copies_that_a_vpn_carries_over_the_watched_link_do_not_loop() {
    for port in [format!(":{VPN_PORT}"), String::new()] {
        let lab = Lab::new();
        let _vpn = vpn(&lab);
        up_to(&lab, GRE_SEQUENCE.args, &BEYOND, &["--underlay", &format!("{PEER_IP}{port}")]);
        let mut arrived = lab.capture(Ns::Peer, "tun0", Direction::In);
        let mut wire = lab.capture(Ns::Peer, "peer0", Direction::In);
        let frames = frames::series(&Ends::HOST_TO_PEER, 13);
        lab.send(Ns::Host, "eth0", &frames);
        arrived.wait_for(2 * frames.len());
        let copies = copies_on_tun(&lab, &mut arrived, Kind::Gre);
        for v6 in [false, true] {
            assert_same_frames(&frames, &inner(&copies_of_family(&copies, v6)));
        }
        assert_eq!(wire.take(3 * frames.len()).len(), 39, "each frame and the packets that carry its two copies");
        assert_eq!(lab.settled().taps_total().pcnt, 26);
    }
}

/// The carried copies' answers come back inside the VPN too, which must not make a circle: copy, error, copy of the error.
#[test]
fn errors_that_a_vpn_brings_back_do_not_loop() {
    let lab = Lab::new();
    answer_without_limit(&lab);
    let _vpn = vpn(&lab);
    // The remote is there, answers that it knows no GRE, and routes that through the VPN.
    lab.ip_batch(Ns::Peer, &format!("address add {}/32 dev tun0\nroute add {TUN_IP}/32 dev tun0 src {0}", BEYOND[0]));
    up_to(&lab, GRE.args, &BEYOND[..1], &["--underlay", &format!("{PEER_IP}:{VPN_PORT}")]);
    let mut errors = lab.capture(Ns::Host, "tun0", Direction::In);
    let frames = frames::series(&Ends::HOST_TO_PEER, 13);
    lab.send(Ns::Host, "eth0", &frames);
    errors.wait_for(frames.len());
    let mut quiet = 0;
    let mut before = 0;
    let calm = poll(Duration::from_secs(3), || {
        let now = errors.count();
        quiet = if now == before { quiet + 1 } else { 0 };
        before = now;
        (quiet == 20).then_some(())
    });
    assert!(calm.is_some(), "{before} errors for 13 copies, and still more");
    assert_eq!(before, frames.len(), "one error for each copy");
}

/// The VPN's own packets are longer than the watched link's MTU: their later fragments have no UDP port to know them by.
#[test]
fn fragments_of_a_vpns_packets_do_not_loop() {
    let lab = Lab::new();
    let _vpn = vpn(&lab);
    up_to(&lab, GRE.args, &BEYOND[..1], &["--underlay", &format!("{PEER_IP}:{VPN_PORT}")]);
    let mut arrived = lab.capture(Ns::Peer, "tun0", Direction::In);
    let frames: Vec<Vec<u8>> = (0..13).map(|n| frames::jumbo(&Ends::HOST_TO_PEER, n, 1476)).collect();
    lab.send(Ns::Host, "eth0", &frames);
    arrived.wait_for(frames.len());
    let copies = copies_on_tun(&lab, &mut arrived, Kind::Gre);
    assert_same_frames(&frames, &inner(&copies));
    assert_eq!(lab.settled().taps_total().pcnt, 13);
}
