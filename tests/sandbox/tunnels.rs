//! Every tunnel over IPv4 and IPv6 on the real kernel: outer headers field by field, inner frames byte by byte, against
//! the tests' own reading of the RFCs, tshark's, and tunnel devices of the kernel.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use crate::lab;
use crate::lab::capture::{Direction, tshark_fields};
use crate::lab::check::assert_same_frames;
use crate::lab::decode::{Port, tcp_stream, verify_checksums};
use crate::lab::frames::{self, Ends};
use crate::lab::status::Session;
use crate::lab::traffic::Transfer;
use crate::lab::tunnel_case::*;
use crate::lab::tunnels::{Kind, Tunnelled, decap, inner};
use crate::lab::{COLLECTOR_IP, COLLECTOR_IP6, Lab, Ns, Options};

/// Every copy of a 1500-byte link fits, with two tags and the longest header.
const ROOMY: u32 = 1700;

// ---- frames and streams that fit, or are cut to fit ----

fn every_frame_and_stream_arrives_exactly_in(tunnel: Tunnel) {
    let lab = Lab::new();
    for (mode, mtu, from) in [("drop", ROOMY, Ns::Host), ("segment", 1500, Ns::Peer)] {
        set_out_mtu(&lab, mtu);
        up(&lab, tunnel, &["--oversize", mode]);
        let mut sent_singly = corpus_both_ways(&lab, tunnel).to_vec();
        if mode == "drop" {
            sent_singly.push(packets_that_tshark_reads_the_same(&lab, tunnel));
        }
        let (stream, transfer) = stream(&lab, from);
        for case in tunnel.cases() {
            let mut copies = sent_singly.iter().flat_map(|packets| case.copies(packets)).collect::<Vec<_>>();
            assert!(copies.is_sorted_by_key(|copy| copy.header.sequence), "one sender's copies are in order");
            let streamed = case.copies(&stream);
            assert_stream(case, &transfer, &streamed);
            copies.extend(streamed);
            assert!(copies.iter().flat_map(|copy| &copy.outer.lens).all(|len| *len <= mtu as usize));
            assert!(mode == "segment" || copies.iter().all(|copy| copy.outer.lens.len() == 1));
            assert_unique_ids(&copies);
            assert_sequence(case, &copies);
            assert!(mode == "segment" || copies.len() as u64 == sent(&lab.settled(), case));
        }
        assert_eq!(lab.settled().drops(), 0);
        down(&lab);
    }
}

for_each_tunnel!(every_frame_and_stream_arrives_exactly_in);

fn corpus_both_ways(lab: &Lab, tunnel: Tunnel) -> [Vec<Vec<u8>>; 2] {
    [(Ns::Peer, Ends::PEER_TO_HOST), (Ns::Host, Ends::HOST_TO_PEER)].map(|(from, ends)| {
        let frames = frames::corpus_frames(&ends);
        let packets = mirrored(lab, from, &frames);
        for case in tunnel.cases() {
            let copies = case.copies(&packets);
            assert_same_frames(&frames, &inner(&copies));
            assert_headers(case, &copies, from);
        }
        packets
    })
}

/// Wire frames sent to this family's remote.
fn sent(status: &Session, case: Case) -> u64 {
    status.remotes[usize::from(case.v6)].stat.pcnt
}

/// A TCP connection over the watched link, and what reached the collector meanwhile.
fn stream(lab: &Lab, from: Ns) -> (Vec<Vec<u8>>, Transfer) {
    let to = if from == Ns::Host { Ns::Peer } else { Ns::Host };
    let mut capture = lab.capture_wire(Ns::Collector, "col0", Direction::In);
    let transfer = lab.tcp_transfer(MEGABYTES, from, to);
    (packets(lab, &mut capture), transfer)
}

#[track_caller]
fn assert_stream(case: Case, transfer: &Transfer, copies: &[Tunnelled]) {
    let frames = inner(copies);
    assert!(tcp_stream(&frames, Port::Dst(transfer.port)) == transfer.data, "{case:?}: the stream differs");
    frames.iter().for_each(|frame| verify_checksums(frame));
    copies.iter().for_each(|copy| assert_outer(case, copy));
    assert_one_flow(copies);
}

/// The two directions of one connection.
#[track_caller]
fn assert_one_flow(copies: &[Tunnelled]) {
    let paths: BTreeSet<_> = copies.iter().map(|copy| (copy.outer.port, copy.outer.flow_label)).collect();
    let ways: BTreeSet<_> = copies.iter().map(|copy| copy.frame[..6].to_vec()).collect();
    assert_eq!((paths.len(), ways.len()), (1, 2), "{paths:?}");
}

// ---- frames that do not fit ----

fn oversize_frames_meet_the_fate_that_was_asked_for_in(tunnel: Tunnel) {
    let lab = Lab::with(Options { watched_mtu: 9000, ..Options::default() });
    for (mode, from, ends) in [
        ("fragment", Ns::Peer, Ends::PEER_TO_HOST),
        ("truncate", Ns::Host, Ends::HOST_TO_PEER),
        ("drop", Ns::Peer, Ends::PEER_TO_HOST),
    ] {
        up(&lab, tunnel, &["--oversize", mode]);
        let frames = sized_frames(tunnel, &ends);
        let packets = mirrored(&lab, from, &frames);
        let dropped: u64 = tunnel.cases().map(|case| assert_fate(case, mode, from, &frames, &packets)).iter().sum();
        let status = lab.settled();
        assert_eq!((status.drops(), status.dropped("oversize")), (dropped, dropped), "{mode}");
        if mode == "fragment" {
            let (stream, transfer) = stream(&lab, Ns::Host);
            tunnel.cases().iter().for_each(|case| assert_stream(*case, &transfer, &case.copies(&stream)));
        }
        down(&lab);
    }
}

for_each_tunnel!(oversize_frames_meet_the_fate_that_was_asked_for_in:
    gre GRE, gre_with_key GRE_KEY, gre_with_key_and_sequence GRE_BOTH, vxlan VXLAN, vxlan_with_checksum VXLAN_SUM,
    geneve_with_checksum GENEVE_SUM, geneve_that_tells_with_checksum GENEVE_TELL_SUM, erspan1 ERSPAN1, erspan2 ERSPAN2, erspan3 ERSPAN3);

/// Around what fits at MTU 1500, and far above; plain, tagged, twice tagged, and not IP.
fn sized_frames(tunnel: Tunnel, ends: &Ends) -> Vec<Vec<u8>> {
    let mut all = vec![frames::arp(ends)];
    for (case, n) in tunnel.cases().iter().zip([0, 100]) {
        let fit = 1500 - case.overhead();
        let sizes = [60, fit - 1, fit, fit + 1, fit + 4, 2 * fit, 4000, 9014];
        all.extend((n..).zip(sizes).map(|(n, size)| frames::jumbo(ends, n, size)));
        all.extend([frames::raw(ends, n + 20, fit), frames::raw(ends, n + 21, fit + 1)]);
        for (n, size) in (n + 30..).zip([60, fit - 4, fit - 3, 3001]) {
            all.push(frames::tagged(frames::ETH_8021Q, 0xa000 | 42, &frames::jumbo(ends, n, size)));
        }
        for (n, size) in (n + 40..).zip([fit - 8, fit - 7, 5000]) {
            let once = frames::tagged(frames::ETH_8021Q, 7, &frames::jumbo(ends, n, size));
            all.push(frames::tagged(frames::ETH_8021AD, 0x6000 | 4094, &once));
        }
    }
    all
}

/// Returns how many are to be dropped.
#[track_caller]
fn assert_fate(case: Case, mode: &str, from: Ns, frames: &[Vec<u8>], packets: &[Vec<u8>]) -> u64 {
    let (copies, fit) = (case.copies(packets), 1500 - case.overhead());
    let expected: Vec<Vec<u8>> = match mode {
        "truncate" => frames.iter().map(|frame| frame[..frame.len().min(fit)].to_vec()).collect(),
        "drop" => frames.iter().filter(|frame| frame.len() <= fit).cloned().collect(),
        _ => frames.to_vec(),
    };
    assert_same_frames(&expected, &inner(&copies));
    let whole: BTreeSet<&Vec<u8>> = frames.iter().collect();
    for copy in &copies {
        let lens = &copy.outer.lens;
        assert_eq!(lens.len() > 1, copy.frame.len() > fit, "{case:?} {mode}: fragments {lens:?}");
        assert!(lens.iter().all(|len| *len <= 1500), "{case:?} {mode}: fragments {lens:?}");
        let tell = copy.header.tell;
        let told = copy.header.erspan.is_some_and(|erspan| erspan.truncated) || tell.is_some_and(|tell| tell.cut);
        let cut = (copy.header.erspan.is_some() || tell.is_some()) && !whole.contains(&copy.frame);
        assert_eq!(told, cut, "{case:?} {mode}: truncation of {} bytes", copy.frame.len());
    }
    assert_headers(case, &copies, from);
    assert_sequence(case, &copies);
    (frames.len() - expected.len()) as u64
}

// ---- tshark's reading ----

const FIELDS: [&str; 30] = [
    "ip.ttl",
    "ipv6.hlim",
    "ip.id",
    "ipv6.flow",
    "udp.srcport",
    "udp.dstport",
    "gre.proto",
    "gre.key",
    "gre.sequence_number",
    "vxlan.flags",
    "vxlan.vni",
    "geneve.version",
    "geneve.proto_type",
    "geneve.vni",
    "erspan.version",
    "erspan.spanid",
    "erspan.vlan",
    "erspan.cos",
    "erspan.encap",
    "erspan.truncated",
    "erspan.index",
    "erspan.direction",
    "erspan.gra",
    "erspan.timestamp",
    "erspan.platid",
    "erspan.pid5.port_index",
    "erspan.pid5.timestamp",
    "ip.checksum.status",
    "udp.checksum.status",
    "frame.time_epoch",
];

/// A few frames, tagged and not, both ways: tshark must read each as we do. Returns what reached the collector.
fn packets_that_tshark_reads_the_same(lab: &Lab, tunnel: Tunnel) -> Vec<Vec<u8>> {
    let mut capture = lab.capture(Ns::Collector, "col0", Direction::In);
    for (from, ends) in [(Ns::Peer, Ends::PEER_TO_HOST), (Ns::Host, Ends::HOST_TO_PEER)] {
        let once = frames::tagged(frames::ETH_8021Q, 0xa000 | 42, &frames::ipv4_udp(&ends, 50, 300));
        let twice = frames::tagged(frames::ETH_8021AD, 0x6000 | 4094, &once);
        lab.send(from, dev_of(from), &[frames::ipv4_tcp(&ends, 51, 100), frames::arp(&ends), once, twice]);
    }
    let packets = packets(lab, &mut capture);
    let rows = tshark_fields(capture.pcap(), "!_ws.malformed", &FIELDS);
    assert_eq!((packets.len(), rows.len()), (16, 16), "none malformed");
    for (packet, row) in packets.iter().zip(&rows) {
        assert_row(tunnel, packet, row);
    }
    packets
}

#[track_caller]
fn assert_row(tunnel: Tunnel, packet: &[u8], row: &[String]) {
    let case = tunnel.cases()[usize::from(packet[12] == 0x86)];
    let copy = case.copies(&[packet.to_vec()]).remove(0);
    for (field, expected) in expected_fields(case, &copy) {
        let cell = &row[FIELDS.iter().position(|name| *name == field).unwrap()];
        let first = cell.split(',').next().unwrap_or_default();
        assert_eq!(number(first), expected, "{case:?}: tshark's {field} is {cell:?}");
    }
    let statuses = row[27].split(',').chain(row[28].split(','));
    assert!(statuses.into_iter().all(|status| status != "0"), "a bad checksum: {row:?}");
    if let Some((_, seconds, nanoseconds)) = copy.header.erspan.and_then(|erspan| erspan.more) {
        let captured: f64 = row[29].parse().expect("seconds since 1970");
        let said = Duration::new(seconds.into(), nanoseconds).as_secs_f64();
        assert!((captured - said).abs() < 1.0, "{case:?}: captured at {captured}, the copy says {said}");
    }
}

fn number(cell: &str) -> Option<u64> {
    match cell.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None if cell == "True" => Some(1),
        None if cell == "False" => Some(0),
        None => cell.parse().ok(),
    }
}

/// The outermost value of each field, as our own decoder has it; fields that an inner frame may have are left out.
fn expected_fields(case: Case, copy: &Tunnelled) -> Vec<(&'static str, Option<u64>)> {
    let (outer, header) = (&copy.outer, &copy.header);
    let number = |value: Option<u32>| value.map(u64::from);
    let mut fields = match case.v6 {
        true => vec![("ipv6.hlim", Some(64)), ("ipv6.flow", Some(outer.flow_label.into()))],
        false => vec![("ip.ttl", Some(64)), ("ip.id", number(outer.id))],
    };
    let mut add = |names: &[&'static str], values: &[u32]| {
        fields.extend(names.iter().copied().zip(values.iter().map(|value| Some(u64::from(*value)))));
    };
    let id = header.id.unwrap_or_default();
    match case.tunnel.kind {
        Kind::Gre => add(&["gre.proto"], &[0x6558]),
        Kind::Erspan1 => add(&["gre.proto"], &[0x88be]),
        Kind::Vxlan(port) => add(&["udp.dstport", "vxlan.flags", "vxlan.vni"], &[port.into(), 0x0800, id]),
        Kind::Geneve(port) | Kind::Tell(port) => {
            add(&["udp.dstport", "geneve.version", "geneve.proto_type", "geneve.vni"], &[port.into(), 0, 0x6558, id])
        }
        Kind::Erspan2 => add(&["gre.proto", "erspan.version", "erspan.spanid"], &[0x88be, 1, id]),
        Kind::Erspan3 => add(
            &["gre.proto", "erspan.version", "erspan.spanid", "erspan.gra", "erspan.platid"],
            &[0x22eb, 2, id, 2, 5],
        ),
    }
    if let Some(erspan) = &header.erspan {
        add(&["erspan.vlan", "erspan.cos", "erspan.truncated"], &[erspan.vlan.into(), erspan.cos.into(), 0]);
        match erspan.more {
            None => add(&["erspan.encap", "erspan.index"], &[erspan.encap.into(), erspan.port]),
            Some((direction, seconds, nanoseconds)) => add(
                &["erspan.direction", "erspan.pid5.port_index", "erspan.pid5.timestamp", "erspan.timestamp"],
                &[direction.into(), erspan.port, seconds, nanoseconds],
            ),
        }
    }
    let is_gre = outer.port.is_none();
    fields.push(("udp.srcport", outer.port.map(u64::from)));
    fields.push(("gre.key", number(header.id).filter(|_| case.tunnel.kind == Kind::Gre)));
    fields.push(("gre.sequence_number", number(header.sequence)));
    // The outermost UDP header of GRE is that of an inner frame.
    fields.retain(|(name, _)| !is_gre || *name != "udp.srcport");
    fields
}

// ---- overhead and the warning ----

#[test]
fn the_mtu_warning_names_what_is_there_and_what_it_takes() {
    let lab = Lab::new();
    let tunnels = [GRE, GRE_KEY, GRE_SEQUENCE, GRE_BOTH, VXLAN, GENEVE, GENEVE_TELL, ERSPAN1, ERSPAN2, ERSPAN3];
    for case in tunnels.into_iter().flat_map(Tunnel::cases) {
        let need = 1514 + case.overhead() as u32;
        let warned = |mtu: u32| {
            set_out_mtu(&lab, mtu);
            up_to(&lab, case.tunnel.args, &[case.remote()], &["--dry-run"])
        };
        assert_eq!(warned(need), "", "{case:?}");
        let (there, takes) = (format!("MTU {} ", need - 1), format!("need {need}"));
        let warning = warned(need - 1);
        assert!(warning.contains(&there) && warning.contains(&takes), "{case:?}: {warning}");
        assert_eq!(warning.lines().count(), 1, "{warning}");
    }
}

// ---- options of the header ----

#[test]
fn the_outer_header_takes_ttl_tos_df_and_port_over_both_families() {
    let lab = Lab::with(Options { out_mtu: ROOMY, ..Options::default() });
    for (args, kind) in [
        (&["vxlan", "--port", "8472"][..], Kind::Vxlan(8472)),
        (&["geneve", "--port", "65535"], Kind::Geneve(65535)),
        (&["gre"], Kind::Gre),
    ] {
        up_to(&lab, args, &[COLLECTOR_IP.into(), COLLECTOR_IP6.into()], &["--ttl", "7", "--tos", "184", "--df"]);
        let packets = mirrored(&lab, Ns::Peer, &frames::series(&Ends::PEER_TO_HOST, 7));
        let copies = decap(kind, &packets);
        assert_eq!(copies.len(), 14, "{args:?}");
        for copy in &copies {
            let v4 = copy.outer.src.is_ipv4();
            assert_eq!((copy.outer.ttl, copy.outer.tos, copy.outer.df), (7, 184, v4), "{args:?}");
        }
        down(&lab);
    }
}

#[test]
fn erspan_tells_the_tap_of_every_interface_in_its_port_index() {
    let lab = Lab::with(Options { out_mtu: ROOMY, ..Options::default() });
    let peer = lab.ns_name(Ns::Peer);
    let link = format!("link add eth1 type veth peer name peer1 netns {peer}\nlink set eth1 addrgenmode none up");
    lab.ip_batch(Ns::Host, &link);
    lab.ip_batch(Ns::Peer, "link set peer1 addrgenmode none up");
    for tunnel in [ERSPAN2, ERSPAN3] {
        up(&lab, tunnel, &["eth1"]);
        for (slot, (ns, dev)) in
            [(Ns::Peer, "peer0"), (Ns::Host, "eth0"), (Ns::Peer, "peer1"), (Ns::Host, "eth1")].into_iter().enumerate()
        {
            let mut capture = lab.capture(Ns::Collector, "col0", Direction::In);
            lab.send(ns, dev, &[frames::raw(&Ends::PEER_TO_HOST.to_mac(frames::BROADCAST), 1, 100)]);
            let packets = packets(&lab, &mut capture);
            let ports = tunnel.cases().map(|case| case.copies(&packets)[0].header.erspan.unwrap().port);
            assert_eq!(ports, [slot as u32; 2], "{ns:?}'s {dev}");
        }
        down(&lab);
    }
}

// ---- flows ----

/// Both directions of many conversations, with UDP, TCP, either IP version, tagged or not.
fn conversations() -> Vec<[Vec<u8>; 2]> {
    let (to_host, to_peer) = (Ends::PEER_TO_HOST, Ends::HOST_TO_PEER);
    let conversation = |n: u16| {
        let (a, b) = (1024 + 7 * n, 443 + n / 16);
        [(to_host, (a, b)), (to_peer, (b, a))].map(|(ends, ports)| {
            let frame = match n % 3 {
                0 => ip_frame(&ends, frames::Family::V4, frames::UDP, ports),
                1 => ip_frame(&ends, frames::Family::V4, frames::TCP, ports),
                _ => ip_frame(&ends, frames::Family::V6, frames::TCP, ports),
            };
            if n.is_multiple_of(2) { frame } else { frames::tagged(frames::ETH_8021Q, 42, &frame) }
        })
    };
    (0..180).map(conversation).collect()
}

fn ip_frame(ends: &Ends, family: frames::Family, proto: u8, ports: (u16, u16)) -> Vec<u8> {
    let data = frames::payload(u32::from(ports.0), 40);
    let body = match proto {
        frames::UDP => frames::udp(ends, family, ports, &data),
        _ => frames::tcp(ends, family, ports, 1, 0x18, &data),
    };
    match family {
        frames::Family::V4 => {
            let ip = frames::Ipv4 { id: ports.0, ..frames::Ipv4::default() };
            frames::ethernet(ends, frames::ETH_IPV4, &frames::ipv4(ends, proto, ip, &body))
        }
        frames::Family::V6 => frames::ethernet(ends, frames::ETH_IPV6, &frames::ipv6(ends, proto, &body)),
    }
}

#[test]
fn each_flow_has_one_source_port_and_flow_label_in_both_directions() {
    let lab = Lab::with(Options { out_mtu: ROOMY, ..Options::default() });
    up(&lab, VXLAN, &[]);
    let conversations = conversations();
    let [incoming, outgoing] = [(0, Ns::Peer), (1, Ns::Host)].map(|(way, from)| {
        let frames: Vec<Vec<u8>> = conversations.iter().map(|both| both[way].clone()).collect();
        let packets = mirrored(&lab, from, &frames);
        VXLAN.cases().map(|case| path_of_each(&frames, &case.copies(&packets)))
    });
    assert_eq!(incoming, outgoing, "both directions of a flow go the same way");
    for paths in &incoming {
        let distinct: BTreeSet<_> = paths.iter().collect();
        // Of 16,384 ports, 180 draws hit one twice about once.
        assert!(distinct.len() > 170, "{} paths for 180 flows", distinct.len());
    }
}

fn path_of_each(frames: &[Vec<u8>], copies: &[Tunnelled]) -> Vec<(Option<u16>, u32)> {
    let path = |frame: &Vec<u8>| {
        let copy = copies.iter().find(|copy| copy.frame == *frame).expect("each frame is copied");
        (copy.outer.port, copy.outer.flow_label)
    };
    frames.iter().map(path).collect()
}

#[test]
fn fragments_of_one_datagram_have_one_source_port() {
    let lab = Lab::with(Options { out_mtu: ROOMY, ..Options::default() });
    up(&lab, VXLAN, &[]);
    let fragments = frames::ipv4_fragments(&Ends::PEER_TO_HOST, 9, 4000, 1000);
    let packets = mirrored(&lab, Ns::Peer, &fragments);
    for case in VXLAN.cases() {
        let paths: BTreeSet<_> = path_of_each(&fragments, &case.copies(&packets)).into_iter().collect();
        assert_eq!(paths.len(), 1, "{paths:?}");
    }
}

// ---- tunnel devices of the kernel at the far end ----

/// A device of the kernel that ends one of our tunnels: `ip link add t0 DEVICE`.
struct Device {
    tunnel: Tunnel,
    v6: bool,
    link: &'static str,
}

const fn device(tunnel: Tunnel, v6: bool, link: &'static str) -> Device {
    Device { tunnel, v6, link }
}

const KEY_5: Tunnel = tunnel(&["gre", "--id", "5"], Kind::Gre, 28).ids(5, 5);
const SESSION_5: Tunnel = tunnel(&["erspan2", "--id", "5"], Kind::Erspan2, 36).ids(5, 5).sequence();
const SESSION_6: Tunnel = tunnel(&["erspan3", "--id", "5"], Kind::Erspan3, 48).ids(5, 5).sequence();

const DEVICES: [Device; 14] = [
    device(VXLAN, false, "type vxlan id 1 dstport 4789 local LOCAL dev col0 nolearning"),
    device(VXLAN, true, "type vxlan id 1 dstport 4789 local LOCAL dev col0 nolearning udp6zerocsumrx"),
    device(VXLAN_SUMMED, false, "type vxlan id 1 dstport 4789 local LOCAL dev col0 nolearning"),
    device(VXLAN_SUMMED, true, "type vxlan id 1 dstport 4789 local LOCAL dev col0 nolearning noudp6zerocsumrx"),
    device(GENEVE, false, "type geneve id 1 remote REMOTE"),
    device(GENEVE, true, "type geneve id 1 remote REMOTE udp6zerocsumrx"),
    device(GENEVE_TELL_SUM, false, "type geneve id 1 remote REMOTE"),
    device(GENEVE_TELL_SUM, true, "type geneve id 1 remote REMOTE"),
    device(GRE, false, "type gretap local LOCAL remote REMOTE"),
    device(KEY_5, false, "type gretap local LOCAL remote REMOTE key 5"),
    device(GRE, true, "type ip6gretap local LOCAL remote REMOTE"),
    device(SESSION_5, false, "type erspan seq key 5 erspan_ver 1 erspan 1 local LOCAL remote REMOTE"),
    device(
        SESSION_6,
        false,
        "type erspan seq key 5 erspan_ver 2 erspan_dir ingress erspan_hwid 0 local LOCAL remote REMOTE",
    ),
    device(SESSION_5, true, "type ip6erspan seq key 5 erspan_ver 1 erspan 1 local LOCAL remote REMOTE"),
];

#[test]
fn vxlan_devices_of_the_kernel_end_the_tunnels() {
    assert_devices_end(&["vxlan"], true, 2);
}

#[test]
fn geneve_devices_of_the_kernel_end_the_tunnels() {
    assert_devices_end(&["geneve"], lab::GUEST, 4);
}

#[test]
fn gre_devices_of_the_kernel_end_the_tunnels() {
    assert_devices_end(&["gretap", "ip6gretap"], lab::GUEST, 3);
}

#[test]
fn erspan_devices_of_the_kernel_end_the_tunnels() {
    assert_devices_end(&["erspan", "ip6erspan"], lab::GUEST, 3);
}

/// Each device of these kinds ends the tunnel; one may be missing where it is not `required`. A guest, which is slow,
/// takes only the first ones, and one mode a device.
fn assert_devices_end(kinds: &[&str], required: bool, in_guest: usize) {
    let is_wanted = |device: &&Device| kinds.contains(&device.link.split(' ').nth(1).unwrap());
    let devices = DEVICES.iter().filter(is_wanted).take(if lab::GUEST { in_guest } else { usize::MAX });
    for (at, device) in devices.enumerate() {
        let modes = if lab::GUEST { &MODES[at % 2..][..1] } else { &MODES[..] };
        let ran = modes.iter().all(|mode| ends_tunnel(device, mode));
        assert!(ran || !required, "this kernel or iproute2 has no {}", device.link);
        println!("{}: {}", if ran { "ran" } else { "not run, as this kernel or iproute2 has none" }, device.link);
    }
}

const MODES: [&str; 2] = ["segment", "fragment"];

/// Whether the device is there; then, all that passes the watched link must come out of it. Each time a new device: one
/// with sequence numbers drops what is behind those of the session before.
fn ends_tunnel(device: &Device, mode: &str) -> bool {
    let (lab, case) = (Lab::new(), device.tunnel.cases()[usize::from(device.v6)]);
    let link = device.link.replace("LOCAL", &case.remote().to_string());
    let link = link.replace("REMOTE", &case.source().to_string());
    let add = format!("ip link add t0 mtu 1500 {link}");
    if !lab.try_run(Ns::Collector, &["sh", "-c", &add]).status.success() {
        return false;
    }
    let prefix = if device.v6 { "64 nodad" } else { "24" };
    lab.ip_batch(
        Ns::Collector,
        &format!("address add {}/{prefix} dev col0\nlink set t0 addrgenmode none arp off up", case.remote()),
    );
    // Merged segments would not be the frames that were sent.
    lab.collector(&["ethtool", "-K", "t0", "gro", "off"]);
    up_to(&lab, case.tunnel.args, &[case.remote()], &["--oversize", mode]);
    assert_ends(&lab, case, mode);
    down(&lab);
    true
}

#[track_caller]
fn assert_ends(lab: &Lab, case: Case, mode: &str) {
    let mut inside = lab.capture(Ns::Collector, "t0", Direction::In);
    // The device drops what claims to be IP and is too short for it: 34 bytes for IPv4, 54 for IPv6.
    let whole = |frame: &Vec<u8>| frame.len() >= 54;
    let frames: Vec<Vec<u8>> = frames::corpus_frames(&Ends::PEER_TO_HOST).into_iter().filter(whole).collect();
    lab.send(Ns::Peer, "peer0", &frames);
    lab.settled();
    inside.settle();
    assert_same_frames(&frames, &without_subheader(case, inside.stop()));
    let mut inside = lab.capture_wire(Ns::Collector, "t0", Direction::In);
    let transfer = lab.tcp_transfer(MEGABYTES, Ns::Host, Ns::Peer);
    let frames = without_subheader(case, packets(lab, &mut inside));
    assert!(tcp_stream(&frames, Port::Dst(transfer.port)) == transfer.data, "{case:?} {mode}: the stream differs");
    assert_eq!(lab.settled().drops(), 0, "{case:?} {mode}");
}

/// The kernel's device for type III knows no platform subheader, and leaves its 8 bytes before each frame.
#[track_caller]
fn without_subheader(case: Case, frames: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    if case.tunnel.kind != Kind::Erspan3 {
        return frames;
    }
    let strip = |frame: Vec<u8>| {
        assert_eq!(frame[0] >> 2, 5, "a subheader of platform 5: {frame:02x?}");
        frame[8..].to_vec()
    };
    frames.into_iter().map(strip).collect()
}

// ---- what is refused ----

fn up_remote<'a>(remote: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["up", "eth0", "--remote", remote, "--tunnel"], more].concat()
}

#[test]
fn an_id_out_of_range_is_refused_with_the_range() {
    let lab = Lab::new();
    for (tunnel, id, range) in [
        ("vxlan", "16777216", "0 to 16777215"),
        ("geneve", "16777216", "0 to 16777215"),
        ("erspan2", "1024", "0 to 1023"),
        ("erspan3", "1024", "0 to 1023"),
    ] {
        for flag in ["--id", "--egress-id"] {
            let args = up_remote("198.51.100.2", &[tunnel, flag, id]);
            lab.said(&args).refused(2, &format!("{flag} {id} is out of range for --tunnel {tunnel}"), range);
        }
    }
    for (flag, ends) in [("--id", "--id 7"), ("--egress-id", "--id 7 --egress-id 8")] {
        let args = up_remote("198.51.100.2", &["gre", flag, "4294967296"]);
        lab.said(&args).refused(2, "\"4294967296\" is not a number from 0 to 4294967295", ends);
    }
}

#[test]
fn an_option_that_the_type_lacks_is_refused_with_the_types_that_have_it() {
    let lab = Lab::new();
    for (more, names, ends) in [
        (&["erspan1", "--id", "1"][..], "--id", "gre, vxlan, geneve, erspan2, erspan3"),
        (&["erspan1", "--egress-id", "1"], "--egress-id", "gre, vxlan, geneve, erspan2, erspan3"),
        (&["gre", "--port", "1"], "--port", "vxlan, geneve"),
        (&["erspan3", "--port", "1"], "--port", "vxlan, geneve"),
        (&["gre", "--udp-checksum"], "--udp-checksum", "vxlan, geneve"),
        (&["erspan1", "--udp-checksum"], "--udp-checksum", "vxlan, geneve"),
        (&["vxlan", "--sequence"], "--sequence", "--tunnel gre --sequence"),
        (&["erspan1", "--sequence"], "--sequence", "--tunnel gre --sequence"),
        (&["gre", "--egress-id", "2"], "--egress-id", "--id 1 --egress-id 2"),
        (&["vxlan", "--tell"], "--tell", "--tunnel geneve --tell"),
        (&["erspan3", "--tell"], "--tell", "--tunnel geneve --tell"),
        (&["vxlan", "--port", "0"], "--port 0", "--port 4789"),
    ] {
        lab.said(&up_remote("198.51.100.2", more)).refused(2, names, ends);
    }
}

#[test]
fn an_unknown_type_is_refused_with_a_list() {
    let lab = Lab::new();
    let list = "gre, vxlan, geneve, erspan1, erspan2, erspan3";
    for unknown in ["l2tp", "erspan", "GRE", ""] {
        lab.said(&up_remote("198.51.100.2", &[unknown])).refused(2, list, "snifctl up --help");
    }
}

#[test]
fn remotes_that_cannot_be_are_refused() {
    let lab = Lab::new();
    let many: Vec<String> = (1..66).map(|n| format!("198.51.100.{n}")).collect();
    for (remote, names) in [
        ("198.51.100.2,198.51.100.2", "--remote 198.51.100.2 is named twice"),
        ("2001:db8:1::2,2001:DB8:1:0::2", "--remote 2001:db8:1::2 is named twice"),
        (&many.join(","), "one session holds 64"),
        ("fe80::1%out0", "\"fe80::1%out0\" is a link-local address with a zone"),
        ("fe80::1", "--remote fe80::1 is a link-local address"),
        ("::ffff:198.51.100.2", "is an IPv4 address in IPv6 form"),
        ("ff02::1", "is a multicast address"),
        ("::1", "is this machine itself"),
        ("2001:db8:1::1", "is this machine itself"),
    ] {
        let said = lab.said(&up_remote(remote, &["gre"]));
        // That it is an address of ours, only the machine can tell.
        let code = if remote == "2001:db8:1::1" { 1 } else { 2 };
        assert_eq!((said.status.code(), said.stderr.lines().count()), (Some(code), 1), "{remote}: {said:?}");
        assert!(said.stderr.contains(names) && said.stdout.is_empty(), "{remote}: {said:?}");
    }
}

#[test]
fn sixty_four_remotes_of_both_families_are_taken() {
    let lab = Lab::new();
    let remotes: Vec<IpAddr> =
        (0..64).map(|n| BEYOND_GATEWAY[n % 2]).zip(1u8..).map(|(network, n)| numbered(network, n)).collect();
    lab.ip_batch(
        Ns::Host,
        &format!("route add 203.0.113.0/24 via {COLLECTOR_IP}\nroute add 2001:db8:2::/64 via {COLLECTOR_IP6}"),
    );
    up_to(&lab, VXLAN.args, &remotes, &[]);
    let mut capture = lab.capture(Ns::Collector, "col0", Direction::In);
    let frame = frames::arp(&Ends::PEER_TO_HOST);
    lab.send(Ns::Peer, "peer0", std::slice::from_ref(&frame));
    let copies = decap(VXLAN.kind, &packets(&lab, &mut capture));
    let reached: BTreeSet<IpAddr> = copies.iter().map(|copy| copy.outer.dst).collect();
    assert_eq!(reached, remotes.into_iter().collect());
    assert_same_frames(&vec![frame; 64], &inner(&copies));
}

const BEYOND_GATEWAY: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(203, 0, 113, 0)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 0))];

fn numbered(network: IpAddr, n: u8) -> IpAddr {
    match network {
        IpAddr::V4(network) => Ipv4Addr::from_bits(network.to_bits() + u32::from(n)).into(),
        IpAddr::V6(network) => Ipv6Addr::from_bits(network.to_bits() + u128::from(n)).into(),
    }
}
