//! Every tunnel over IPv4 and IPv6 on the real kernel: outer headers field by field, inner frames byte by byte, against
//! the tests' own reading of the RFCs, tshark's, and tunnel devices of the kernel.

mod lab;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::Child;
use std::time::{Duration, SystemTime};

use lab::capture::{Capture, Direction, tshark_fields};
use lab::check::assert_same_frames;
use lab::decode::{Port, tcp_stream, verify_checksums};
use lab::frames::{self, Ends};
use lab::judge::{drops, total};
use lab::traffic::Transfer;
use lab::tunnels::{Erspan, Kind, Link, Tunnelled, decap, decap_on, inner, packets_to, raw_packets};
use lab::{COLLECTOR_IP, COLLECTOR_IP6, COLLECTOR_MAC, HOST_IP, Lab, Ns, OUT_IP, OUT_IP6, OUT_MAC, Options};
use lab::{PEER_IP, PEER_IP6, poll};
use serde_json::Value;

/// Every copy of a 1500-byte link fits, with two tags and the longest header.
const ROOMY: u32 = 1700;
const MEGABYTES: usize = if lab::GUEST { 200 << 10 } else { 2 << 20 };

// ---- the tunnels ----

/// A request and what it must look like on the wire.
#[derive(Clone, Copy, Debug)]
struct Tunnel {
    args: &'static [&'static str],
    kind: Kind,
    /// Outer IPv4 and tunnel header.
    overhead: usize,
    /// In copies of incoming and of outgoing frames.
    ids: [Option<u32>; 2],
    sequence: bool,
    checksum: bool,
}

const fn tunnel(args: &'static [&'static str], kind: Kind, overhead: usize) -> Tunnel {
    Tunnel { args, kind, overhead, ids: [None; 2], sequence: false, checksum: false }
}

impl Tunnel {
    const fn ids(self, ingress: u32, egress: u32) -> Tunnel {
        Tunnel { ids: [Some(ingress), Some(egress)], ..self }
    }

    const fn sequence(self) -> Tunnel {
        Tunnel { sequence: true, ..self }
    }

    const fn checksum(self) -> Tunnel {
        Tunnel { checksum: true, ..self }
    }

    fn cases(self) -> [Case; 2] {
        [false, true].map(|v6| Case { tunnel: self, v6 })
    }
}

const GRE: Tunnel = tunnel(&["gre"], Kind::Gre, 24);
const GRE_KEY: Tunnel = tunnel(&["gre", "--id", "4294967295"], Kind::Gre, 28).ids(u32::MAX, u32::MAX);
const GRE_SEQUENCE: Tunnel = tunnel(&["gre", "--sequence"], Kind::Gre, 28).sequence();
const GRE_BOTH: Tunnel =
    tunnel(&["gre", "--id", "0", "--egress-id", "43", "--sequence"], Kind::Gre, 32).ids(0, 43).sequence();
const VXLAN: Tunnel = tunnel(&["vxlan"], Kind::Vxlan(4789), 36).ids(1, 1);
const VXLAN_SUM: Tunnel =
    tunnel(&["vxlan", "--id", "16777215", "--egress-id", "5", "--udp-checksum"], Kind::Vxlan(4789), 36)
        .ids(0xff_ffff, 5)
        .checksum();
const GENEVE: Tunnel = tunnel(&["geneve"], Kind::Geneve(6081), 36).ids(1, 1);
const GENEVE_SUM: Tunnel =
    tunnel(&["geneve", "--id", "65536", "--egress-id", "0", "--udp-checksum"], Kind::Geneve(6081), 36)
        .ids(65536, 0)
        .checksum();
const ERSPAN1: Tunnel = tunnel(&["erspan1"], Kind::Erspan1, 24);
const ERSPAN2: Tunnel =
    tunnel(&["erspan2", "--id", "1023", "--egress-id", "7"], Kind::Erspan2, 36).ids(1023, 7).sequence();
const ERSPAN3: Tunnel =
    tunnel(&["erspan3", "--id", "513", "--egress-id", "1022"], Kind::Erspan3, 48).ids(513, 1022).sequence();

/// One tunnel over one address family.
#[derive(Clone, Copy, Debug)]
struct Case {
    tunnel: Tunnel,
    v6: bool,
}

impl Case {
    fn remote(&self) -> IpAddr {
        if self.v6 { COLLECTOR_IP6.into() } else { COLLECTOR_IP.into() }
    }

    fn source(&self) -> IpAddr {
        if self.v6 { OUT_IP6.into() } else { OUT_IP.into() }
    }

    fn overhead(&self) -> usize {
        self.tunnel.overhead + if self.v6 { 20 } else { 0 }
    }

    /// This family's copies among what was captured.
    #[track_caller]
    fn copies(&self, packets: &[Vec<u8>]) -> Vec<Tunnelled> {
        decap(self.tunnel.kind, &packets_to(packets, self.remote()))
    }
}

/// Starts a session to the collector over both families at once, and returns what it warned of.
#[track_caller]
fn up(lab: &Lab, tunnel: Tunnel, more: &[&str]) -> String {
    up_to(lab, tunnel.args, &[COLLECTOR_IP.into(), COLLECTOR_IP6.into()], more)
}

#[track_caller]
fn up_to(lab: &Lab, tunnel: &[&str], remotes: &[IpAddr], more: &[&str]) -> String {
    let remotes = remotes.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(",");
    let args = [&["up", "eth0", "--remote", &remotes, "--tunnel"], tunnel, more].concat();
    lab.said(&args).ok().stderr
}

#[track_caller]
fn down(lab: &Lab) {
    lab.said(&["down"]).quietly_ok();
}

/// Makes one test per tunnel out of a function that takes one; the module's name and the test's are its sentence.
macro_rules! for_each_tunnel {
    ($name:ident) => {
        for_each_tunnel!($name: gre GRE, gre_with_key GRE_KEY, gre_with_sequence GRE_SEQUENCE,
            gre_with_key_and_sequence GRE_BOTH, vxlan VXLAN, vxlan_with_checksum VXLAN_SUM, geneve GENEVE,
            geneve_with_checksum GENEVE_SUM, erspan1 ERSPAN1, erspan2 ERSPAN2, erspan3 ERSPAN3);
    };
    ($name:ident: $($test:ident $tunnel:ident),*) => {
        mod $name {
            $(#[test] fn $test() { super::$name(super::$tunnel); })*
        }
    };
}

// ---- the lab ----

fn set_out_mtu(lab: &Lab, mtu: u32) {
    for (ns, dev) in [(Ns::Host, "out0"), (Ns::Collector, "col0")] {
        lab.run(ns, &["ip", "link", "set", "dev", dev, "mtu", &mtu.to_string()]);
    }
}

fn dev_of(ns: Ns) -> &'static str {
    if ns == Ns::Peer { "peer0" } else { "eth0" }
}

/// The packets once no more come.
fn packets(lab: &Lab, capture: &mut Capture) -> Vec<Vec<u8>> {
    lab.settled();
    capture.settle();
    capture.stop()
}

/// What of frames sent one way reaches the collector, in order.
#[track_caller]
fn mirrored(lab: &Lab, from: Ns, frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut capture = lab.capture(Ns::Collector, "col0", Direction::In);
    lab.send(from, dev_of(from), frames);
    packets(lab, &mut capture)
}

// ---- what every copy's headers must say ----

#[track_caller]
fn assert_headers(case: Case, copies: &[Tunnelled], from: Ns) {
    let direction = usize::from(from == Ns::Host);
    for copy in copies {
        assert_outer(case, copy);
        assert_eq!(copy.header.id, case.tunnel.ids[direction], "{case:?}");
        let is_erspan = matches!(case.tunnel.kind, Kind::Erspan2 | Kind::Erspan3);
        assert_eq!(copy.header.erspan.is_some(), is_erspan);
        if let Some(erspan) = &copy.header.erspan {
            assert_erspan(case, erspan, &copy.frame, direction);
        }
    }
    assert_unique_ids(copies);
}

#[track_caller]
fn assert_outer(case: Case, copy: &Tunnelled) {
    let outer = &copy.outer;
    assert_eq!(outer.macs, (OUT_MAC, COLLECTOR_MAC));
    assert_eq!((outer.src, outer.dst), (case.source(), case.remote()));
    assert_eq!((outer.ttl, outer.tos, outer.df), (64, 0, false));
    assert_eq!(outer.flow_label != 0, case.v6, "a flow label that is not zero over IPv6");
    if let [len] = outer.lens[..] {
        assert_eq!(len, copy.frame.len() + case.overhead(), "{case:?}");
    }
    let is_udp = matches!(case.tunnel.kind, Kind::Vxlan(_) | Kind::Geneve(_));
    assert_eq!((outer.port.is_some(), outer.checksum), (is_udp, case.tunnel.checksum), "{case:?}");
}

#[track_caller]
fn assert_erspan(case: Case, erspan: &Erspan, frame: &[u8], direction: usize) {
    let tpid = u16::from_be_bytes([frame[12], frame[13]]);
    let tagged = [frames::ETH_8021Q, frames::ETH_8021AD].contains(&tpid);
    let tci = if tagged { u16::from_be_bytes([frame[14], frame[15]]) } else { 0 };
    assert_eq!((erspan.vlan, erspan.cos), (tci & 0xfff, (tci >> 13) as u8), "{frame:02x?}");
    let encap = if tagged && case.tunnel.kind == Kind::Erspan2 { 3 } else { 0 };
    assert_eq!(erspan.encap, encap, "{case:?}");
    assert_eq!(erspan.port, direction as u32, "slot of the tap");
    let says = erspan.more.map(|(direction, _, _)| usize::from(direction));
    assert_eq!(says, (case.tunnel.kind == Kind::Erspan3).then_some(direction));
    if let Some((_, seconds, nanoseconds)) = erspan.more {
        assert_recent(Duration::new(seconds.into(), nanoseconds));
    }
}

/// Tests end soon after the copy was made: not more than ten seconds ago, and not in the future.
#[track_caller]
fn assert_recent(time: Duration) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let age = now.as_secs_f64() - time.as_secs_f64();
    assert!((-1.0..10.0).contains(&age), "the copy says that it is {age} s old");
}

/// IPv4 ids are 16 bits: among as many packets as there are ids, none may repeat. IPv6 has ids in fragments only.
#[track_caller]
fn assert_unique_ids(copies: &[Tunnelled]) {
    for window in copies.chunks(65536) {
        let ids: Vec<u32> = window.iter().filter_map(|copy| copy.outer.id).collect();
        let unique: BTreeSet<u32> = ids.iter().copied().collect();
        assert_eq!(unique.len(), ids.len(), "IP ids repeat");
    }
}

/// From 0 and up by one for each copy, in whatever order several CPUs have sent them.
#[track_caller]
fn assert_sequence(case: Case, copies: &[Tunnelled]) {
    let mut numbers: Vec<u32> = copies.iter().filter_map(|copy| copy.header.sequence).collect();
    numbers.sort_unstable();
    let expected = if case.tunnel.sequence { copies.len() as u32 } else { 0 };
    assert_eq!(numbers, (0..expected).collect::<Vec<_>>(), "{case:?}");
}

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
        assert_eq!(drops(&lab.settled()), 0);
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
fn sent(status: &Value, case: Case) -> u64 {
    status["remotes"][usize::from(case.v6)]["stat"]["pcnt"].as_u64().unwrap()
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
        assert_eq!((drops(&status), status["drops"]["oversize"].as_u64()), (dropped, Some(dropped)), "{mode}");
        if mode == "fragment" {
            let (stream, transfer) = stream(&lab, Ns::Host);
            tunnel.cases().iter().for_each(|case| assert_stream(*case, &transfer, &case.copies(&stream)));
        }
        down(&lab);
    }
}

for_each_tunnel!(oversize_frames_meet_the_fate_that_was_asked_for_in:
    gre GRE, gre_with_key GRE_KEY, gre_with_key_and_sequence GRE_BOTH, vxlan VXLAN, vxlan_with_checksum VXLAN_SUM,
    geneve_with_checksum GENEVE_SUM, erspan1 ERSPAN1, erspan2 ERSPAN2, erspan3 ERSPAN3);

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
        let told = copy.header.erspan.is_some_and(|erspan| erspan.truncated);
        let cut = copy.header.erspan.is_some() && !whole.contains(&copy.frame);
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
        Kind::Geneve(port) => {
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
    let tunnels = [GRE, GRE_KEY, GRE_SEQUENCE, GRE_BOTH, VXLAN, GENEVE, ERSPAN1, ERSPAN2, ERSPAN3];
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
const VXLAN_SUMMED: Tunnel = tunnel(&["vxlan", "--udp-checksum"], Kind::Vxlan(4789), 36).ids(1, 1).checksum();
const SESSION_5: Tunnel = tunnel(&["erspan2", "--id", "5"], Kind::Erspan2, 36).ids(5, 5).sequence();
const SESSION_6: Tunnel = tunnel(&["erspan3", "--id", "5"], Kind::Erspan3, 48).ids(5, 5).sequence();

const DEVICES: [Device; 12] = [
    device(VXLAN, false, "type vxlan id 1 dstport 4789 local LOCAL dev col0 nolearning"),
    device(VXLAN, true, "type vxlan id 1 dstport 4789 local LOCAL dev col0 nolearning udp6zerocsumrx"),
    device(VXLAN_SUMMED, false, "type vxlan id 1 dstport 4789 local LOCAL dev col0 nolearning"),
    device(VXLAN_SUMMED, true, "type vxlan id 1 dstport 4789 local LOCAL dev col0 nolearning noudp6zerocsumrx"),
    device(GENEVE, false, "type geneve id 1 remote REMOTE"),
    device(GENEVE, true, "type geneve id 1 remote REMOTE udp6zerocsumrx"),
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
    assert_devices_end(&["geneve"], lab::GUEST, 2);
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
    assert_eq!(drops(&lab.settled()), 0, "{case:?} {mode}");
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
        assert_eq!(total(&lab.settled()["taps"], "pcnt"), frames.len() as u64, "{tunnel:?} to {remote}");
        // Their twins, which quote something else, are copied.
        let mut other = errors[0].clone();
        let quoted_remote = if remote.is_ipv4() { 34 + 8 + 16 } else { 54 + 8 + 24 };
        other[quoted_remote + 1] ^= 0x55;
        lab.send(Ns::Peer, "peer0", &[other]);
        assert_eq!(total(&lab.settled()["taps"], "pcnt"), frames.len() as u64 + 1, "{tunnel:?} to {remote}");
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
    up_to(&lab, tunnel.args, &BEYOND, &["--carrier", "none"]);
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
        assert_eq!(drops(&lab.settled()), 0, "{tunnel:?}");
    }
}

for_each_tunnel!(copies_leave_through_a_tun_device_in:
    gre GRE, vxlan_with_checksum VXLAN_SUM, geneve GENEVE, erspan2 ERSPAN2);

#[test]
fn a_tun_device_beside_a_watched_egress_needs_a_carrier() {
    let lab = Lab::new();
    let _tun = Tun::open(&lab, Ns::Host, &["OPEN:/dev/null", "-u"]);
    let remote = BEYOND[0].to_string();
    let up = ["up", "eth0", "--tunnel", "gre", "--remote", &remote];
    lab.said(&up).refused(1, "tun0", "--carrier 203.0.113.5:51820");
    lab.said(&[&up[..], &["--direction", "egress"]].concat()).refused(1, "tun0", "--carrier 203.0.113.5:51820");
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
        up_to(&lab, GRE_SEQUENCE.args, &BEYOND, &["--carrier", &format!("{PEER_IP}{port}")]);
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
        assert_eq!(total(&lab.settled()["taps"], "pcnt"), 26);
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
    up_to(&lab, GRE.args, &BEYOND[..1], &["--carrier", &format!("{PEER_IP}:{VPN_PORT}")]);
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
    up_to(&lab, GRE.args, &BEYOND[..1], &["--carrier", &format!("{PEER_IP}:{VPN_PORT}")]);
    let mut arrived = lab.capture(Ns::Peer, "tun0", Direction::In);
    let frames: Vec<Vec<u8>> = (0..13).map(|n| frames::jumbo(&Ends::HOST_TO_PEER, n, 1476)).collect();
    lab.send(Ns::Host, "eth0", &frames);
    arrived.wait_for(frames.len());
    let copies = copies_on_tun(&lab, &mut arrived, Kind::Gre);
    assert_same_frames(&frames, &inner(&copies));
    assert_eq!(total(&lab.settled()["taps"], "pcnt"), 13);
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
            lab.said(&args).refused(1, &format!("{flag} {id} is out of range for --tunnel {tunnel}"), range);
        }
    }
    for flag in ["--id", "--egress-id"] {
        let args = up_remote("198.51.100.2", &["gre", flag, "4294967296"]);
        lab.said(&args).refused(2, "0..=4294967295", "snifctl up --help");
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
        (&["vxlan", "--port", "0"], "--port 0", "--port 4789"),
    ] {
        lab.said(&up_remote("198.51.100.2", more)).refused(1, names, ends);
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
        assert_eq!((said.status.code(), said.stderr.lines().count()), (Some(1), 1), "{remote}: {said:?}");
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
