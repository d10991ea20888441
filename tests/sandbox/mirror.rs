//! The datapath against the real kernel: every kind of frame, both directions, every oversize mode, exact and counted.

use crate::lab;
use crate::lab::capture::{Capture, Direction, tshark_fields};
use crate::lab::check::assert_same_frames;
use crate::lab::decode::{Copy, Port, decap_gre, gre_packets, inner_frames, tcp_stream, verify_checksums};
use crate::lab::frames::{self, Ends};
use crate::lab::status::Session;
use crate::lab::{COLLECTOR_IP, COLLECTOR_MAC, Lab, Ns, OUT_IP, OUT_MAC, Options, poll};

/// Large enough that every copy of a 1500-byte link fits.
const ROOMY: u32 = 1600;
/// Bytes that GRE adds inside the outer link header.
const OVERHEAD: usize = 24;

fn up(lab: &Lab, more: &[&str]) {
    let remote = COLLECTOR_IP.to_string();
    let args = [&["up", "eth0", "--tunnel", "gre", "--remote", &remote], more].concat();
    lab.snifctl(args).assert().success();
}

/// Copies asked for = copies sent + drops by reason, and `sent` of them were not dropped behind us.
#[track_caller]
fn assert_counted(lab: &Lab, sent: u64) -> Session {
    let settled = poll(lab::PATIENCE, || {
        let status = lab.session();
        let handed = status.remotes_total().pcnt;
        let lost_after = status.out_dropped;
        let asked = status.taps_total().pcnt;
        (asked == handed + status.drops() && handed - lost_after == sent).then_some(status)
    });
    settled.unwrap_or_else(|| panic!("Expected {sent} copies sent and all counted, got {:#}", lab.session()))
}

/// Everything asked for was sent.
#[track_caller]
fn assert_no_drops(lab: &Lab) {
    let status = lab.settled();
    assert_eq!(status.drops(), 0, "{status:#}");
}

/// The copies at the collector, once `n` of them are whole.
#[track_caller]
fn copies(capture: &mut Capture, n: usize) -> Vec<Copy> {
    // Fragments make more packets than copies: wait for as many packets, then until no more come.
    capture.wait_for(n);
    capture.settle();
    let copies = decap_gre(&capture.stop());
    assert_eq!(copies.len(), n, "Expected to capture {n} copies, got {}", copies.len());
    copies
}

fn lab_with_out_mtu(out_mtu: u32) -> Lab {
    let lab = Lab::with(Options { out_mtu: out_mtu.max(1280), ..Options::default() });
    // IPv6 leaves a link below 1280, so the lab cannot be made with it.
    if out_mtu < 1280 {
        lab.host(&["ip", "link", "set", "dev", "out0", "mtu", &out_mtu.to_string()]);
    }
    lab
}

// ---- every kind of frame ----

/// Sends frames one way, and asserts that the receiver and the collector got each of them, unchanged.
fn assert_mirrored(lab: &Lab, from: Ns, frames: &[Vec<u8>]) {
    let (dev, to, far) = match from {
        Ns::Peer => ("peer0", Ns::Host, "eth0"),
        _ => ("eth0", Ns::Peer, "peer0"),
    };
    let mut received = lab.capture(to, far, Direction::In);
    let mut mirrored = lab.capture(Ns::Collector, "col0", Direction::In);
    lab.send(from, dev, frames);
    assert_same_frames(frames, &received.take(frames.len()));
    assert_same_frames(frames, &inner_frames(&copies(&mut mirrored, frames.len())));
}

#[test]
fn every_kind_of_incoming_frame_arrives_exactly() {
    let lab = lab_with_out_mtu(ROOMY);
    up(&lab, &[]);
    let frames = frames::corpus_frames(&Ends::PEER_TO_HOST);
    assert_mirrored(&lab, Ns::Peer, &frames);
    let status = assert_counted(&lab, frames.len() as u64);
    assert_eq!(status.taps[0].counts.stat.pcnt, frames.len() as u64);
    assert_eq!(status.taps[1].counts.stat.pcnt, 0);
    let bytes: usize = frames.iter().map(Vec::len).sum();
    assert_eq!(status.taps[0].counts.stat.bcnt, bytes as u64);
    assert_eq!(status.remotes[0].stat.bcnt, bytes as u64);
}

#[test]
fn every_kind_of_outgoing_frame_arrives_exactly() {
    let lab = lab_with_out_mtu(ROOMY);
    up(&lab, &[]);
    let frames = frames::corpus_frames(&Ends::HOST_TO_PEER);
    assert_mirrored(&lab, Ns::Host, &frames);
    let status = assert_counted(&lab, frames.len() as u64);
    assert_eq!(status.taps[0].counts.stat.pcnt, 0);
    assert_eq!(status.taps[1].counts.stat.pcnt, frames.len() as u64);
}

#[test]
fn every_kind_of_frame_arrives_exactly_over_a_path_that_needs_fragments() {
    for (from, ends) in [(Ns::Peer, Ends::PEER_TO_HOST), (Ns::Host, Ends::HOST_TO_PEER)] {
        let lab = lab_with_out_mtu(576);
        up(&lab, &["--oversize", "fragment"]);
        let frames = frames::corpus_frames(&ends);
        assert_mirrored(&lab, from, &frames);
        assert_counted(&lab, frames.len() as u64);
    }
}

/// Where a host bridges, a tag sits in the packet's metadata on egress too.
#[test]
fn tags_in_metadata_on_egress_end_up_inside_the_copy() {
    let lab = lab_with_out_mtu(ROOMY);
    let collector = lab.ns_name(Ns::Collector);
    lab.ip_batch(
        Ns::Host,
        &format!(
            "link add br0 type bridge\nlink add in0 type veth peer name src0 netns {collector}\n\
             link set in0 addrgenmode none\nlink set br0 addrgenmode none\nlink set in0 master br0\n\
             link set eth0 master br0\nlink set br0 type bridge mcast_snooping 0\nlink set in0 up\nlink set br0 up"
        ),
    );
    lab.ip_batch(Ns::Collector, "link set src0 addrgenmode none\nlink set src0 up");
    up(&lab, &["--direction", "egress"]);
    let stranger = Ends::PEER_TO_HOST.to_mac([2, 0, 0, 0, 0xee, 1]);
    let frames = tagged_frames(&stranger);
    let mut received = lab.capture(Ns::Peer, "peer0", Direction::In);
    let mut mirrored = lab.capture(Ns::Collector, "col0", Direction::In);
    lab.send(Ns::Collector, "src0", &frames);
    assert_same_frames(&frames, &received.take(frames.len()));
    assert_same_frames(&frames, &inner_frames(&copies(&mut mirrored, frames.len())));
    assert_counted(&lab, frames.len() as u64);
}

fn tagged_frames(ends: &Ends) -> Vec<Vec<u8>> {
    let all = frames::corpus(ends).into_iter();
    let tagged = all.filter(|(name, _)| name.contains("802.1") || name.contains("qinq") || name.contains("tag"));
    let tagged: Vec<Vec<u8>> = tagged.map(|(_, frame)| frame).filter(|frame| frame.len() >= 60).collect();
    assert!(tagged.len() >= 7, "the corpus has tagged frames");
    tagged
}

// ---- large frames ----

fn jumbo_lab(watched_mtu: u32, out_mtu: u32) -> Lab {
    Lab::with(Options { watched_mtu, out_mtu, watched_offloads_off: true, ..Options::default() })
}

#[test]
fn jumbo_frames_are_fragmented_and_come_together_exactly() {
    for mode in ["fragment", "segment"] {
        let lab = jumbo_lab(9000, 1500);
        up(&lab, &["--oversize", mode]);
        let sizes = [1463, 1476, 1477, 1478, 1490, 1514, 2934, 2935, 4000, 8999, 9014];
        let sized = |ends: &Ends| -> Vec<Vec<u8>> {
            sizes.iter().enumerate().map(|(n, size)| frames::jumbo(ends, n as u32, *size)).collect()
        };
        assert_mirrored(&lab, Ns::Peer, &sized(&Ends::PEER_TO_HOST));
        assert_mirrored(&lab, Ns::Host, &sized(&Ends::HOST_TO_PEER));
        assert_counted(&lab, 2 * sizes.len() as u64);
    }
}

#[test]
fn tagged_jumbo_frames_are_fragmented_and_come_together_exactly() {
    let lab = jumbo_lab(9000, 1500);
    up(&lab, &["--oversize", "fragment"]);
    let frames: Vec<Vec<u8>> = (1..12)
        .map(|n| {
            let inner = frames::jumbo(&Ends::PEER_TO_HOST, n, 1400 + 600 * n as usize);
            let once = frames::tagged(frames::ETH_8021Q, 42, &inner);
            if n % 2 == 0 { frames::tagged(frames::ETH_8021AD, 7, &once) } else { once }
        })
        .collect();
    assert_mirrored(&lab, Ns::Peer, &frames);
    assert_counted(&lab, frames.len() as u64);
}

#[test]
fn the_largest_frames_that_an_outer_packet_can_hold_arrive_and_larger_ones_are_counted() {
    let lab = jumbo_lab(65535, 1500);
    up(&lab, &["--oversize", "fragment"]);
    let sizes = [9014, 15999, 16000, 16500, 32768, 65000, 65535 - OVERHEAD];
    let fitting: Vec<Vec<u8>> =
        sizes.iter().enumerate().map(|(n, size)| frames::jumbo(&Ends::PEER_TO_HOST, n as u32, *size)).collect();
    let mut sent = fitting.clone();
    sent.push(frames::jumbo(&Ends::PEER_TO_HOST, 99, 65536 - OVERHEAD));
    sent.push(frames::jumbo(&Ends::PEER_TO_HOST, 100, 65549));
    let mut mirrored = lab.capture(Ns::Collector, "col0", Direction::In);
    lab.send(Ns::Peer, "peer0", &sent);
    let status = assert_counted(&lab, fitting.len() as u64);
    assert_eq!(status.dropped("too_long"), 2);
    let fragments: usize = sizes.iter().map(|size| (size + 4).div_ceil(1480)).sum();
    mirrored.wait_for(fragments);
    assert_same_frames(&fitting, &inner_frames(&decap_gre(&mirrored.stop())));
}

#[test]
fn kubernetes_sized_frames_stay_whole_where_the_path_takes_them() {
    for mode in ["segment", "fragment", "truncate", "drop"] {
        let lab = jumbo_lab(65535, 65535);
        up(&lab, &["--oversize", mode]);
        let sizes = [1514, 9014, 15800, 15872, 15873, 15874, 15876, 15877, 16384, 40000, 65535 - OVERHEAD];
        let frames: Vec<Vec<u8>> =
            sizes.iter().enumerate().map(|(n, size)| frames::jumbo(&Ends::PEER_TO_HOST, n as u32, *size)).collect();
        assert_mirrored(&lab, Ns::Peer, &frames);
        assert_counted(&lab, frames.len() as u64);
    }
}

#[test]
fn fragments_are_multiples_of_eight_with_one_id() {
    let lab = jumbo_lab(9000, 1500);
    up(&lab, &["--oversize", "fragment"]);
    let frames = vec![frames::jumbo(&Ends::PEER_TO_HOST, 1, 9014), frames::jumbo(&Ends::PEER_TO_HOST, 2, 9014)];
    let mut mirrored = lab.capture(Ns::Collector, "col0", Direction::In);
    lab.send(Ns::Peer, "peer0", &frames);
    let copies = copies_of_fragments(&mut mirrored, 14);
    for copy in &copies {
        let (last, rest) = copy.outer_lens.split_last().unwrap();
        assert!(rest.iter().all(|len| len == &rest[0] && (len - 20) % 8 == 0), "{:?}", copy.outer_lens);
        assert!(rest[0] <= 1500 && *last <= rest[0], "{:?}", copy.outer_lens);
        assert!(copy.ids.iter().all(|id| *id == copy.ids[0]), "{:?}", copy.ids);
    }
    assert_ne!(copies[0].ids[0], copies[1].ids[0]);
}

fn copies_of_fragments(capture: &mut Capture, packets: usize) -> Vec<Copy> {
    decap_gre(&capture.take(packets))
}

#[test]
fn truncate_cuts_the_tail_and_nothing_else() {
    let lab = jumbo_lab(9000, 1500);
    up(&lab, &["--oversize", "truncate"]);
    let frames: Vec<Vec<u8>> = vec![
        frames::jumbo(&Ends::PEER_TO_HOST, 1, 9014),
        frames::jumbo(&Ends::PEER_TO_HOST, 2, 1476),
        frames::tagged(frames::ETH_8021Q, 42, &frames::jumbo(&Ends::PEER_TO_HOST, 3, 4000)),
        frames::jumbo(&Ends::PEER_TO_HOST, 4, 60),
    ];
    let mut mirrored = lab.capture(Ns::Collector, "col0", Direction::In);
    lab.send(Ns::Peer, "peer0", &frames);
    let cut: Vec<Vec<u8>> = frames.iter().map(|frame| frame[..frame.len().min(1500 - OVERHEAD)].to_vec()).collect();
    assert_same_frames(&cut, &inner_frames(&copies(&mut mirrored, frames.len())));
    assert_counted(&lab, frames.len() as u64);
}

#[test]
fn drop_and_df_count_what_does_not_fit_and_send_the_rest() {
    for args in [&["--oversize", "drop"][..], &["--df"]] {
        let lab = jumbo_lab(9000, 1500);
        up(&lab, args);
        let small = frames::series(&Ends::PEER_TO_HOST, 7);
        let mut all = small.clone();
        all.extend((0..5).map(|n| frames::jumbo(&Ends::PEER_TO_HOST, 100 + n, 3000)));
        let mut mirrored = lab.capture(Ns::Collector, "col0", Direction::In);
        lab.send(Ns::Peer, "peer0", &all);
        assert_same_frames(&small, &inner_frames(&copies(&mut mirrored, small.len())));
        let status = assert_counted(&lab, small.len() as u64);
        assert_eq!(status.dropped("oversize"), 5);
        assert_eq!(status.taps[0].counts.stat.dcnt, 5);
        assert_eq!(status.remotes[0].stat.dcnt, 5);
    }
}

// ---- super-packets ----

const MEGABYTES: usize = if lab::GUEST { 300 << 10 } else { 10 << 20 };
/// Who sends; a guest, which is slow, takes one direction a test.
const EGRESS: &[Ns] = if lab::GUEST { &[Ns::Host] } else { &[Ns::Host, Ns::Peer] };
const INGRESS: &[Ns] = if lab::GUEST { &[Ns::Peer] } else { &[Ns::Host, Ns::Peer] };

/// Moves a TCP stream over the watched link with the mirror on, and returns the copies at the collector and, as the
/// other end of the link saw them, the frames.
fn mirrored_transfer(lab: &Lab, bytes: usize, from: Ns) -> (lab::traffic::Transfer, Vec<Copy>, Capture) {
    let to = if from == Ns::Host { Ns::Peer } else { Ns::Host };
    let mut mirrored = lab.capture(Ns::Collector, "col0", Direction::In);
    let transfer = lab.tcp_transfer(bytes, from, to);
    lab.settled();
    mirrored.settle();
    let copies = decap_gre(&mirrored.stop());
    (transfer, copies, mirrored)
}

fn assert_no_fault(capture: &Capture) {
    // 0xffff is as right as 0, which the kernel makes of it where it finishes a checksum itself.
    let filter = "ip.checksum.status == 0 || (tcp.checksum.status == 0 && tcp.checksum != 0xffff) || udp.checksum.status == 0 || _ws.malformed";
    let faults = tshark_fields(capture.pcap(), filter, &["frame.number", "_ws.col.Info"]);
    assert!(faults.is_empty(), "{} faults, first {:?}", faults.len(), faults.first());
}

#[test]
fn a_tcp_stream_survives_segment_mode_with_every_copy_within_the_mtu() {
    for from in EGRESS.iter().copied() {
        let lab = Lab::new();
        up(&lab, &[]);
        let (transfer, copies, capture) = mirrored_transfer(&lab, MEGABYTES, from);
        assert_no_drops(&lab);
        let inner = inner_frames(&copies);
        assert!(tcp_stream(&inner, Port::Dst(transfer.port)) == transfer.data, "the copied stream differs");
        assert!(copies.iter().flat_map(|copy| &copy.outer_lens).all(|len| *len <= 1500));
        inner.iter().for_each(|frame| verify_checksums(frame));
        // tshark takes 10 s of a guest.
        if !lab::GUEST {
            assert_no_fault(&capture);
        }
    }
}

#[test]
fn fragment_mode_copies_every_wire_frame_of_a_tcp_stream_exactly() {
    for from in INGRESS.iter().copied() {
        let lab = Lab::new();
        up(&lab, &["--oversize", "fragment"]);
        let (transfer, copies, _) = mirrored_transfer(&lab, MEGABYTES, from);
        let inner = inner_frames(&copies);
        assert!(tcp_stream(&inner, Port::Dst(transfer.port)) == transfer.data, "the copied stream differs");
        assert_wire_segments(&inner, transfer.port);
        inner.iter().for_each(|frame| verify_checksums(frame));
        let status = lab.settled();
        assert_eq!(copies.len() as u64, status.taps_total().pcnt);
        assert_eq!(status.drops(), 0);
        let bytes: usize = inner.iter().map(Vec::len).sum();
        assert_eq!(status.taps_total().bcnt, bytes as u64);
        assert_eq!(status.remotes_total().bcnt, bytes as u64);
    }
}

/// With timestamps on, a full segment of a 1500-byte link is 1514 bytes: nothing may be longer, most must be as long.
fn assert_wire_segments(frames: &[Vec<u8>], port: u16) {
    let data = frames.iter().filter(|frame| frame[36..38] == port.to_be_bytes() && frame.len() > 66);
    let (full, other): (Vec<_>, Vec<_>) = data.partition(|frame| frame.len() == 1514);
    assert!(other.iter().all(|frame| frame.len() < 1514));
    assert!(full.len() * 1448 > MEGABYTES / 2, "{} full, {} other", full.len(), other.len());
}

#[test]
fn where_the_mtu_suffices_every_mode_gives_the_wires_own_segments() {
    for mode in ["segment", "fragment", "truncate", "drop"] {
        let lab = lab_with_out_mtu(ROOMY);
        up(&lab, &["--oversize", mode]);
        let (transfer, copies, capture) = mirrored_transfer(&lab, MEGABYTES, Ns::Host);
        let inner = inner_frames(&copies);
        assert!(tcp_stream(&inner, Port::Dst(transfer.port)) == transfer.data, "{mode}: the copied stream differs");
        assert_wire_segments(&inner, transfer.port);
        assert_eq!(lab.session().drops(), 0, "{mode}");
        assert_eq!(copies.len() as u64, lab.session().taps_total().pcnt, "{mode}");
        assert_no_fault(&capture);
        assert_unique_ids(&copies);
    }
}

/// Ids are 16 bits: among as many packets as there are ids, none may repeat.
fn assert_unique_ids(copies: &[Copy]) {
    for window in copies.chunks(65536) {
        let mut ids: Vec<u16> = window.iter().map(|copy| copy.ids[0]).collect();
        ids.sort_unstable();
        let before = ids.len();
        ids.dedup();
        assert_eq!(ids.len(), before, "IP ids repeat");
    }
}

#[test]
fn super_packets_over_ipv6_and_of_a_jumbo_link_are_cut_to_fit() {
    for (watched_mtu, out_mtu) in [(1500, 1500), (1500, ROOMY), (9000, 1500), (9000, 9100)] {
        let lab = Lab::with(Options { watched_mtu, out_mtu, ..Options::default() });
        up(&lab, &[]);
        let mut mirrored = lab.capture(Ns::Collector, "col0", Direction::In);
        let transfer = lab.tcp_transfer6(MEGABYTES / 4, Ns::Host, Ns::Peer);
        assert_no_drops(&lab);
        mirrored.settle();
        let copies = decap_gre(&mirrored.stop());
        assert!(
            tcp_stream(&inner_frames(&copies), Port::Dst(transfer.port)) == transfer.data,
            "{watched_mtu}/{out_mtu}"
        );
        assert!(copies.iter().flat_map(|copy| &copy.outer_lens).all(|len| *len <= out_mtu as usize));
    }
}

/// UDP_SEGMENT (setsockopt 17, 103): one 20,000-byte write leaves as datagrams of 1,000 bytes.
fn send_udp_gso(lab: &Lab) {
    let data = lab.dir().join("datagrams");
    std::fs::write(&data, frames::payload(1, 20_000)).unwrap();
    let open = format!("OPEN:{},rdonly", data.display());
    let target = "UDP4-SENDTO:192.0.2.2:9,setsockopt-int=17:103:1000";
    lab.host(&["socat", "-b", "20000", "-u", &open, target]);
}

#[test]
fn udp_super_packets_arrive_as_their_datagrams() {
    for (out_mtu, mode) in [(ROOMY, "segment"), (1500, "segment"), (900, "segment"), (900, "fragment")] {
        let lab = lab_with_out_mtu(out_mtu);
        up(&lab, &["--oversize", mode, "--direction", "egress"]);
        let mut mirrored = lab.capture(Ns::Collector, "col0", Direction::In);
        send_udp_gso(&lab);
        assert_counted(&lab, 20);
        let copies = copies_of(&mut mirrored, 20);
        let datagrams: Vec<&[u8]> = copies.iter().map(|copy| &copy.frame[42..]).collect();
        assert!(copies.iter().all(|copy| copy.frame.len() == 1042), "{out_mtu} {mode}");
        assert!(datagrams.concat() == frames::payload(1, 20_000), "{out_mtu} {mode}: the datagrams differ");
        copies.iter().for_each(|copy| verify_checksums(&copy.frame));
    }
}

fn copies_of(capture: &mut Capture, n: usize) -> Vec<Copy> {
    let mut all = copies(capture, n);
    all.sort_by_key(|copy| copy.frame[18..20].to_vec()); // by inner IP id: the order of sending
    all
}

/// Traffic that is itself in a tunnel: the kernel marks it as encapsulated, and super-packets stay whole in it.
#[test]
fn tcp_inside_a_kernel_vxlan_tunnel_is_copied_as_it_is_on_the_wire() {
    for mode in ["segment", "fragment"] {
        let lab = Lab::with(Options { watched_mtu: 1600, ..Options::default() });
        make_vxlan(&lab, 1500);
        up(&lab, &["--oversize", mode]);
        let mut wire = lab.capture(Ns::Peer, "peer0", Direction::Both);
        let mut mirrored = lab.capture(Ns::Collector, "col0", Direction::In);
        transfer_inside_vxlan(&lab);
        assert_no_drops(&lab);
        mirrored.settle();
        let copies = decap_gre(&mirrored.stop());
        assert_eq!(copies.len() as u64, lab.session().remotes_total().pcnt, "{mode}");
        copies.iter().for_each(|copy| verify_checksums(&copy.frame));
        wire.stop();
        assert_vxlan_stream(&copies);
    }
}

/// A VXLAN tunnel over the watched link, as a second user of it.
fn make_vxlan(lab: &Lab, mtu: u32) {
    for (ns, dev, local, remote, address) in [
        (Ns::Host, "eth0", lab::HOST_IP, lab::PEER_IP, "203.0.113.1"),
        (Ns::Peer, "peer0", lab::PEER_IP, lab::HOST_IP, "203.0.113.2"),
    ] {
        lab.ip_batch(
            ns,
            &format!(
                "link add vx0 mtu {mtu} type vxlan id 5 local {local} remote {remote} dstport 4789 dev \
                 {dev}\nlink set vx0 addrgenmode none\naddress add {address}/24 dev vx0\nlink set vx0 up"
            ),
        );
    }
}

const INSIDE: &str = "203.0.113.2";

fn transfer_inside_vxlan(lab: &Lab) {
    let (source, sink) = (lab.dir().join("inside"), lab.dir().join("inside.received"));
    std::fs::write(&source, frames::payload(7, MEGABYTES / 10)).unwrap();
    let listen = format!("TCP4-LISTEN:7777,bind={INSIDE},reuseaddr");
    let mut listener = lab
        .command(Ns::Peer, &["socat", "-u", &listen, &format!("OPEN:{},creat,trunc", sink.display())])
        .spawn()
        .unwrap();
    let listening = || String::from_utf8(lab.peer(&["ss", "-Hltn", "sport = 7777"]).stdout).unwrap().contains(":7777");
    poll(lab::PATIENCE, || listening().then_some(())).expect("the listener is up");
    let connect = format!("TCP4:{INSIDE}:7777");
    lab.host(&["socat", "-u", &format!("OPEN:{},rdonly", source.display()), &connect]);
    assert!(listener.wait().unwrap().success());
    assert!(std::fs::read(&sink).unwrap() == frames::payload(7, MEGABYTES / 10), "the watched stream differs");
}

/// The stream again, out of VXLAN out of the copies.
fn assert_vxlan_stream(copies: &[Copy]) {
    let vxlan = copies.iter().filter(|copy| copy.frame.get(36..38) == Some(&4789u16.to_be_bytes()));
    let inside: Vec<Vec<u8>> = vxlan.map(|copy| copy.frame[50..].to_vec()).collect();
    assert!(tcp_stream(&inside, Port::Dst(7777)) == frames::payload(7, MEGABYTES / 10), "the copied stream differs");
}

/// Datagrams that are not super-packets, in VXLAN, too large for the path: the kernel does not cut their tail.
#[test]
fn single_encapsulated_packets_are_fragmented_and_truncated_too() {
    for (mode, longest) in [("fragment", 9000), ("segment", 9000), ("truncate", 1500 - OVERHEAD)] {
        let lab = Lab::with(Options { watched_mtu: 9000, ..Options::default() });
        make_vxlan(&lab, 8900);
        up(&lab, &["--oversize", mode, "--direction", "egress"]);
        let mut wire = lab.capture(Ns::Peer, "peer0", Direction::In);
        let mut mirrored = lab.capture(Ns::Collector, "col0", Direction::In);
        let sizes = [1400, 1450, 3000, 5000, 8000];
        for size in sizes {
            let data = lab.dir().join("datagram");
            std::fs::write(&data, frames::payload(size, size as usize)).unwrap();
            let open = format!("OPEN:{},rdonly", data.display());
            lab.host(&["socat", "-b", "10000", "-u", &open, &format!("UDP4-SENDTO:{INSIDE}:9")]);
        }
        // ARP inside the tunnel comes with them.
        wire.wait_for(sizes.len());
        assert_no_drops(&lab);
        mirrored.settle();
        let cut = |frame: Vec<u8>| frame[..frame.len().min(longest)].to_vec();
        // Checksums are finished in the copy, on this link only at the receiver: look past them.
        let masked = |mut frame: Vec<u8>| {
            frame[24..26].fill(0);
            frame[40..42].fill(0);
            frame[90..92].fill(0);
            frame
        };
        let sent: Vec<Vec<u8>> = wire.stop().into_iter().map(cut).map(masked).collect();
        let copied = inner_frames(&decap_gre(&mirrored.stop()));
        if mode != "truncate" {
            copied.iter().for_each(|frame| verify_checksums(frame));
        }
        assert_same_frames(&sent, &copied.into_iter().map(masked).collect::<Vec<_>>());
    }
}

/// A veth hands unfinished packets on; the copies in it must be finished all the same.
#[test]
fn a_collector_behind_a_veth_with_offloads_gets_finished_wire_frames() {
    for out_mtu in [1500, ROOMY] {
        let lab = lab_with_out_mtu(out_mtu);
        lab.host(&["ethtool", "-K", "out0", "tx", "on", "sg", "on", "tso", "on", "gso", "on"]);
        up(&lab, &["--oversize", "fragment"]);
        let (transfer, copies, capture) = mirrored_transfer(&lab, MEGABYTES / 10, Ns::Host);
        let inner = inner_frames(&copies);
        assert!(tcp_stream(&inner, Port::Dst(transfer.port)) == transfer.data, "the copied stream differs");
        assert!(inner.iter().all(|frame| frame.len() <= 1514));
        inner.iter().for_each(|frame| verify_checksums(frame));
        if out_mtu == ROOMY {
            assert_no_fault(&capture);
        }
        let frames = frames::corpus_frames(&Ends::PEER_TO_HOST);
        assert_mirrored(&lab, Ns::Peer, &frames);
    }
}

// ---- what is copied and what is not ----

#[test]
fn each_direction_alone_copies_only_itself() {
    for (direction, from, other) in [("ingress", Ns::Peer, Ns::Host), ("egress", Ns::Host, Ns::Peer)] {
        let lab = Lab::new();
        up(&lab, &["--direction", direction]);
        let wanted = frames::series(if from == Ns::Peer { &Ends::PEER_TO_HOST } else { &Ends::HOST_TO_PEER }, 13);
        let unwanted = frames::series(if other == Ns::Peer { &Ends::PEER_TO_HOST } else { &Ends::HOST_TO_PEER }, 17);
        let dev = |ns| if ns == Ns::Peer { "peer0" } else { "eth0" };
        let mut mirrored = lab.capture(Ns::Collector, "col0", Direction::In);
        lab.send(other, dev(other), &unwanted);
        lab.send(from, dev(from), &wanted);
        assert_same_frames(&wanted, &inner_frames(&copies(&mut mirrored, wanted.len())));
        let status = assert_counted(&lab, wanted.len() as u64);
        assert_eq!(status.taps.len(), 1);
        assert_eq!(status.taps[0].direction, direction);
    }
}

#[test]
fn nothing_is_copied_after_down() {
    let lab = Lab::new();
    up(&lab, &[]);
    lab.snifctl(["down"]).assert().success();
    let mut received = lab.capture(Ns::Host, "eth0", Direction::In);
    let mut mirrored = lab.capture(Ns::Collector, "col0", Direction::In);
    lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, 11));
    received.take(11);
    assert_eq!(mirrored.stop().len(), 0);
}

#[test]
fn an_interface_that_is_not_named_is_not_copied_and_several_share_a_session() {
    let lab = Lab::new();
    let peer = lab.ns_name(Ns::Peer);
    for n in 1..3 {
        lab.ip_batch(
            Ns::Host,
            &format!(
                "link add eth{n} type veth peer name peer{n} netns {peer}\nlink set eth{n} addrgenmode none\n\
                 link set eth{n} up"
            ),
        );
        lab.ip_batch(Ns::Peer, &format!("link set peer{n} addrgenmode none\nlink set peer{n} up"));
    }
    up(&lab, &["eth1"]);
    let mut mirrored = lab.capture(Ns::Collector, "col0", Direction::In);
    let series = |first: u32| (first..first + 7).map(|n| frames::raw(&Ends::PEER_TO_HOST, n, 100)).collect::<Vec<_>>();
    for (n, first) in [(0, 100), (2, 200), (1, 300)] {
        lab.send(Ns::Peer, &format!("peer{n}"), &series(first));
    }
    let expected = [series(100), series(300)].concat();
    assert_same_frames(&expected, &inner_frames(&copies(&mut mirrored, 14)));
    let status = assert_counted(&lab, 14);
    assert_eq!(status.taps.len(), 4);
}

/// The collector is reached through the watched interface itself: no copy of a copy, also not of what comes back.
#[test]
fn copies_through_the_watched_interface_are_not_copied_again() {
    let lab = Lab::with(Options { watched_mtu: 1600, ..Options::default() });
    let remote = lab::PEER_IP.to_string();
    lab.snifctl(["up", "eth0", "--tunnel", "gre", "--remote", &remote]).assert().success();
    let mut wire = lab.capture(Ns::Peer, "peer0", Direction::In);
    let frames = frames::series(&Ends::HOST_TO_PEER, 13);
    lab.send(Ns::Host, "eth0", &frames);
    wire.wait_for(2 * frames.len());
    assert_counted(&lab, frames.len() as u64);
    let seen = wire.stop();
    assert_eq!(seen.len(), 2 * frames.len());
    let mirrored = decap_gre(&gre_packets(&seen, lab::PEER_IP));
    assert_same_frames(&frames, &inner_frames(&mirrored));
}

/// The peer answers each GRE packet with an ICMP error that quotes it. Those errors are the mirror's own noise.
#[test]
fn icmp_errors_that_quote_our_copies_are_not_copied() {
    let lab = Lab::with(Options { watched_mtu: 1600, ..Options::default() });
    lab.peer(&["sysctl", "-qw", "net.ipv4.icmp_ratelimit=0", "net.ipv4.icmp_msgs_per_sec=10000"]);
    let remote = lab::PEER_IP.to_string();
    lab.snifctl(["up", "eth0", "--tunnel", "gre", "--remote", &remote]).assert().success();
    let mut errors = lab.capture(Ns::Host, "eth0", Direction::In);
    let frames = frames::series(&Ends::HOST_TO_PEER, 13);
    lab.send(Ns::Host, "eth0", &frames);
    let answers = errors.take(frames.len());
    assert!(answers.iter().all(|frame| frame[23] == 1 && frame[34] == 3), "ICMP destination unreachable");
    assert_counted(&lab, frames.len() as u64);
    // Its twin: an error that quotes something else is copied.
    let mut other = answers[0].clone();
    other[34 + 8 + 16..34 + 8 + 20].copy_from_slice(&[192, 0, 2, 99]);
    lab.send(Ns::Peer, "peer0", &[other]);
    assert_counted(&lab, frames.len() as u64 + 1);
}

#[test]
fn the_watched_stream_is_the_same_with_and_without_the_mirror() {
    for mode in [None, Some("segment"), Some("fragment"), Some("truncate"), Some("drop")] {
        let lab = Lab::new();
        if let Some(mode) = mode {
            up(&lab, &["--oversize", mode]);
        }
        for (from, to) in [(Ns::Host, Ns::Peer), (Ns::Peer, Ns::Host)] {
            lab.tcp_transfer(MEGABYTES / 2, from, to);
        }
        let mut received = lab.capture(Ns::Host, "eth0", Direction::In);
        let frames = frames::corpus_frames(&Ends::PEER_TO_HOST);
        lab.send(Ns::Peer, "peer0", &frames);
        assert_same_frames(&frames, &received.take(frames.len()));
    }
}

// ---- the outer header ----

#[test]
fn the_outer_header_says_what_was_asked_for() {
    let lab = lab_with_out_mtu(ROOMY);
    lab.host(&["ip", "address", "add", "198.51.100.9/24", "dev", "out0"]);
    let source = ["--source", "198.51.100.9", "--ttl", "7", "--tos", "184", "--df"];
    for (args, (from, ttl, tos, df)) in
        [(&[][..], (OUT_IP, 64, 0, false)), (&source, ([198, 51, 100, 9].into(), 7, 184, true))]
    {
        up(&lab, args);
        let mut mirrored = lab.capture(Ns::Collector, "col0", Direction::In);
        lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, 7));
        let copies = copies(&mut mirrored, 7);
        assert_no_fault(&mirrored);
        for copy in &copies {
            assert_eq!((copy.outer_src, copy.outer_dst), (from, COLLECTOR_IP));
            assert_eq!((copy.ttl, copy.tos, copy.df), (ttl, tos, df));
            assert_eq!((copy.eth_src, copy.eth_dst), (OUT_MAC, COLLECTOR_MAC));
        }
        if !df {
            assert_unique_ids(&copies);
        }
        lab.snifctl(["down"]).assert().success();
    }
}

#[test]
fn a_gateway_and_a_route_mtu_are_respected() {
    let lab = lab_with_out_mtu(ROOMY);
    lab.host(&["ip", "route", "add", "203.0.113.0/24", "via", "198.51.100.2", "mtu", "1000"]);
    lab.snifctl(["up", "eth0", "--tunnel", "gre", "--remote", "203.0.113.77"]).assert().success();
    let mut mirrored = lab.capture(Ns::Collector, "col0", Direction::In);
    let frames = vec![frames::jumbo(&Ends::PEER_TO_HOST, 1, 1514), frames::jumbo(&Ends::PEER_TO_HOST, 2, 976)];
    lab.send(Ns::Peer, "peer0", &frames);
    let copies = copies_of_fragments(&mut mirrored, 3);
    assert_same_frames(&frames, &inner_frames(&copies));
    assert!(copies.iter().all(|copy| copy.eth_dst == COLLECTOR_MAC && copy.outer_dst.to_string() == "203.0.113.77"));
    assert_eq!(lab.session().remotes[0].mtu, 1000);
}

// ---- losses are counted ----

#[test]
fn what_the_relay_loses_is_counted() {
    let lab = lab_with_out_mtu(900);
    up(&lab, &["--oversize", "fragment", "--direction", "egress"]);
    lab.host(&["ip", "link", "set", "dev", "snif0p", "down"]);
    // Only what the kernel has to cut or to finish crosses.
    send_udp_gso(&lab);
    lab.send(Ns::Host, "eth0", &frames::series(&Ends::HOST_TO_PEER, 7));
    let status = assert_counted(&lab, 7);
    assert_eq!(status.dropped("relay"), 20);
}

#[test]
fn what_the_out_interface_drops_is_counted() {
    let lab = Lab::new();
    lab.host(&["tc", "qdisc", "add", "dev", "out0", "root", "pfifo", "limit", "0"]);
    up(&lab, &[]);
    lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, 13));
    let status = assert_counted(&lab, 0);
    assert_eq!(status.out_dropped, 13);
    assert_eq!(status.remotes[0].stat.pcnt, 13);
}

#[test]
fn a_clone_that_cannot_be_made_is_counted_and_the_packet_passes() {
    let lab = Lab::new();
    up(&lab, &[]);
    lab.host(&["ip", "link", "delete", "dev", "snif0"]);
    let mut received = lab.capture(Ns::Host, "eth0", Direction::In);
    let frames = frames::series(&Ends::PEER_TO_HOST, 13);
    lab.send(Ns::Peer, "peer0", &frames);
    assert_same_frames(&frames, &received.take(13));
    let status = assert_counted(&lab, 0);
    assert_eq!(status.dropped("clone"), 13);
    assert_eq!(status.taps[0].counts.stat.dcnt, 13);
}
