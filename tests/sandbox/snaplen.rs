//! The snap length: each copy is the first bytes of its wire frame, and says so where its header can.

use crate::lab::capture::Direction;
use crate::lab::check::assert_same_frames;
use crate::lab::decode::{Port, tcp_stream, verify_checksums};
use crate::lab::frames::{self, Ends};
use crate::lab::remotes::{collector, remote};
use crate::lab::sessions::{WAYS, assert_up_refused, both_families, captured, knowing, lab_of, session_of, up, up_in};
use crate::lab::super_packets::{add_vxlan, send_udp_super_packet, transfer_inside_vxlan};
use crate::lab::tunnels::{Kind, Tunnelled, decap, inner, packets_to};
use crate::lab::{Lab, Ns, Options};

// ---- the snap length ----

/// Every kind of frame, plain and with a VLAN tag around it.
fn every_kind(ends: &Ends) -> Vec<Vec<u8>> {
    let plain = frames::corpus_frames(ends);
    // The kernel takes tagged frames of 20 to 1518 bytes only.
    let taggable = plain.iter().filter(|frame| (16..=1514).contains(&frame.len()));
    let tagged: Vec<Vec<u8>> = taggable.map(|frame| frames::tagged(frames::ETH_8021Q, 0xa000 | 42, frame)).collect();
    [plain, tagged].concat()
}

/// What a copy must be: the frame's first bytes, and whether the tunnel header says that it was cut.
type Cut = (Vec<u8>, bool);

fn cut_to(snaplen: usize, frame: &[u8]) -> Cut {
    (frame[..frame.len().min(snaplen)].to_vec(), frame.len() > snaplen)
}

/// Panics unless the copies are these, and where the header has a truncation bit, it says so.
#[track_caller]
fn assert_cut(expected: &[Cut], copies: &[Tunnelled]) {
    let flagged = |frame: &[u8], cut: bool| [frame, &[u8::from(cut)]].concat();
    let told = copies.iter().any(|copy| copy.header.erspan.is_some());
    let expected: Vec<Vec<u8>> = expected.iter().map(|(frame, cut)| flagged(frame, *cut && told)).collect();
    let says = |copy: &Tunnelled| copy.header.erspan.is_some_and(|erspan| erspan.truncated);
    let got: Vec<Vec<u8>> = copies.iter().map(|copy| flagged(&copy.frame, says(copy))).collect();
    assert_same_frames(&expected, &got);
}

/// A tunnel as `--tunnel` takes it, and what its copies are.
type Tunnel = (&'static [&'static str], Kind);

const GRE: Tunnel = (&["gre"], Kind::Gre);
const GRE_SEQUENCE: Tunnel = (&["gre", "--sequence"], Kind::Gre);
const VXLAN: Tunnel = (&["vxlan"], Kind::Vxlan(4789));
const GENEVE_SUM: Tunnel = (&["geneve", "--udp-checksum"], Kind::Geneve(6081));
const ERSPAN1: Tunnel = (&["erspan1"], Kind::Erspan1);
const ERSPAN2: Tunnel = (&["erspan2"], Kind::Erspan2);
const ERSPAN3: Tunnel = (&["erspan3"], Kind::Erspan3);

#[track_caller]
fn up_both(lab: &Lab, n: u8, tunnel: Tunnel, more: &[&str]) {
    up_in(lab, n, tunnel.0, &both_families(n).map(|remote| remote.to_string()).join(","), more);
}

/// Sends frames both ways and panics unless the sessions, numbered as they are listed, have cut each to their snap length.
#[track_caller]
fn assert_all_cut(lab: &Lab, kind: Kind, snaplens: &[usize], every_kind: fn(&Ends) -> Vec<Vec<u8>>) {
    for (from, dev, ends) in WAYS {
        let sent = every_kind(&ends);
        let (packets, ()) = captured(lab, || lab.send(from, dev, &sent));
        for (n, snaplen) in (0..).zip(snaplens) {
            let expected: Vec<Cut> = sent.iter().map(|frame| cut_to(*snaplen, frame)).collect();
            for address in both_families(n) {
                assert_cut(&expected, &decap(kind, &packets_to(&packets, address)));
            }
        }
    }
}

fn frames_of_every_kind_are_cut_in(tunnel: Tunnel, snaplens: &[usize]) {
    let lab = lab_of(snaplens.len() as u8);
    for (n, snaplen) in (0..).zip(snaplens) {
        up_both(&lab, n, tunnel, &["--snaplen", &snaplen.to_string()]);
    }
    assert_all_cut(&lab, tunnel.1, snaplens, every_kind);
    for (n, snaplen) in (0..).zip(snaplens) {
        let session = session_of(&lab, n);
        assert_eq!((session.snaplen, session.drops()), (Some(*snaplen as u64), 0), "{session:#}");
        let sent: Vec<Vec<u8>> = WAYS.iter().flat_map(|(_, _, ends)| every_kind(ends)).collect();
        let cut: usize = sent.iter().map(|frame| frame.len().min(*snaplen)).sum();
        for row in &session.remotes {
            assert_eq!(row.stat.bcnt, cut as u64, "{session:#}");
        }
        // What was to be copied is counted as it was: whole frames, for each of two remotes.
        let whole: usize = sent.iter().map(Vec::len).sum();
        assert_eq!(session.taps_total().bcnt, 2 * whole as u64, "{session:#}");
    }
}

#[test]
fn frames_of_every_kind_are_cut_to_any_length_in_gre() {
    frames_of_every_kind_are_cut_in(GRE, &[60, 61, 64, 128, 1000, 1514]);
}

#[test]
fn frames_of_every_kind_are_cut_in_vxlan() {
    frames_of_every_kind_are_cut_in(VXLAN, &[60, 128]);
}

#[test]
fn frames_of_every_kind_are_cut_in_geneve_and_checksums_fit_the_cut_frames() {
    frames_of_every_kind_are_cut_in(GENEVE_SUM, &[61, 1000]);
}

#[test]
fn frames_of_every_kind_are_cut_in_gre_with_sequence_numbers_and_erspan1() {
    frames_of_every_kind_are_cut_in(GRE_SEQUENCE, &[64]);
    frames_of_every_kind_are_cut_in(ERSPAN1, &[60]);
}

#[test]
fn frames_of_every_kind_are_cut_in_erspan2_which_says_so() {
    frames_of_every_kind_are_cut_in(ERSPAN2, &[60, 64, 1514]);
}

#[test]
fn frames_of_every_kind_are_cut_in_erspan3_which_says_so() {
    frames_of_every_kind_are_cut_in(ERSPAN3, &[60, 128, 1000]);
}

/// Headers that reach behind the snap length, where the kernel's helper refuses to cut.
fn long_headers_behind_tags(ends: &Ends) -> Vec<Vec<u8>> {
    let long = [frames::ipv4_max_options(ends, 1), frames::ipv6_extensions(ends, 2), frames::gre(ends, 3)];
    let more = [frames::vxlan(ends, 4), frames::ipv6_udp(ends, 5, 200), frames::mpls(ends, 6), frames::snap(ends, 7)];
    let all = [&long[..], &more].concat();
    let once = all.iter().map(|frame| frames::tagged(frames::ETH_8021Q, 42, frame));
    let twice = once.map(|frame| frames::tagged(frames::ETH_8021AD, 100, &frame));
    let four = |frame: &Vec<u8>| (0..4).fold(frame.clone(), |f, n| frames::tagged(frames::ETH_8021Q, 7 + n, &f));
    twice.chain(all.iter().map(four)).collect()
}

#[test]
fn long_headers_behind_several_tags_are_cut_like_any_other() {
    let lab = lab_of(2);
    up_both(&lab, 0, GRE, &["--snaplen", "60"]);
    up_both(&lab, 1, GRE, &["--snaplen", "64"]);
    assert_all_cut(&lab, Kind::Gre, &[60, 64], long_headers_behind_tags);
}

const SUPER_SNAPLENS: [(Tunnel, usize); 6] =
    [(GRE, 60), (VXLAN, 128), (GENEVE_SUM, 200), (ERSPAN2, 1000), (GRE, 1513), (GRE, 1514)];

/// Sessions that cut, beside the last one, which copies every wire frame whole.
fn lab_that_cuts_super_packets(options: Options) -> Lab {
    let lab = knowing(Lab::with(options), 7);
    for (n, (tunnel, snaplen)) in (0..).zip(SUPER_SNAPLENS) {
        up_in(&lab, n, tunnel.0, &remote(n).to_string(), &["--snaplen", &snaplen.to_string()]);
    }
    up(&lab, 6, &["--oversize", "fragment"]);
    lab
}

/// Panics unless each session's copies are these wire frames, cut.
#[track_caller]
fn assert_wire_frames_cut(packets: &[Vec<u8>], wire: &[Vec<u8>]) {
    for (n, (tunnel, snaplen)) in (0..).zip(SUPER_SNAPLENS) {
        let expected: Vec<Cut> = wire.iter().map(|frame| cut_to(snaplen, frame)).collect();
        assert_cut(&expected, &decap(tunnel.1, &packets_to(packets, remote(n).into())));
    }
}

#[test]
fn super_packets_are_cut_wire_frame_by_wire_frame() {
    let lab = lab_that_cuts_super_packets(Options { out_mtu: 1700, ..Options::default() });
    for (from, to, v6) in [(Ns::Host, Ns::Peer, false), (Ns::Peer, Ns::Host, false), (Ns::Host, Ns::Peer, true)] {
        let transfer = || if v6 { lab.tcp_transfer6(200_000, from, to) } else { lab.tcp_transfer(200_000, from, to) };
        let (packets, transfer) = captured(&lab, transfer);
        let wire = inner(&decap(Kind::Gre, &packets_to(&packets, remote(6).into())));
        assert!(tcp_stream(&wire, Port::Dst(transfer.port)) == transfer.data, "the copied stream differs");
        wire.iter().for_each(|frame| verify_checksums(frame));
        assert!(wire.iter().filter(|frame| frame.len() == 1514).count() > 100, "the stream has full frames");
        assert_wire_frames_cut(&packets, &wire);
    }
    let (packets, ()) = captured(&lab, || send_udp_super_packet(&lab, 20_000, 1000));
    let wire = inner(&decap(Kind::Gre, &packets_to(&packets, remote(6).into())));
    // The peer's answer, which quotes the first, is there as well.
    assert_eq!(wire.iter().filter(|frame| frame.len() == 1042).count(), 20);
    assert_wire_frames_cut(&packets, &wire);
    (0..7).for_each(|n| session_of(&lab, n).assert_accounted());
}

/// Without offloads the stack makes wire frames behind the tap, so the receiver has what the copies must begin like.
#[test]
fn super_packets_are_cut_as_the_receiver_gets_them() {
    let options = Options { out_mtu: 1700, watched_offloads_off: true, ..Options::default() };
    let lab = lab_that_cuts_super_packets(options);
    let mut receiver = lab.capture_wire(Ns::Peer, "peer0", Direction::Both);
    let (packets, _) = captured(&lab, || lab.tcp_transfer(200_000, Ns::Host, Ns::Peer));
    receiver.settle();
    let wire = receiver.stop();
    assert!(wire.iter().filter(|frame| frame.len() == 1514).count() > 100, "the stream has full frames");
    assert_wire_frames_cut(&packets, &wire);
}

#[test]
fn super_packets_inside_another_tunnel_are_cut_wire_frame_by_wire_frame() {
    let options = Options { watched_mtu: 1600, out_mtu: 1800, ..Options::default() };
    let lab = lab_that_cuts_super_packets(options);
    add_vxlan(&lab);
    let (packets, ()) = captured(&lab, || transfer_inside_vxlan(&lab, &frames::payload(7, 200_000)));
    let wire = inner(&decap(Kind::Gre, &packets_to(&packets, remote(6).into())));
    assert!(wire.iter().filter(|frame| frame.len() == 1564).count() > 50, "the stream has full frames");
    assert_wire_frames_cut(&packets, &wire);
    (0..7).for_each(|n| session_of(&lab, n).assert_accounted());
}

/// Long enough for three fragments, and shorter than the longest frames sent.
const LONG_SNAPLEN: usize = 3000;

/// Frames around the MTU's and the snap length's edges, plain, tagged, and not IP.
fn jumbo_frames(ends: &Ends) -> Vec<Vec<u8>> {
    let sizes =
        [60, 1400, 1432, 1433, 1444, 1445, 1452, 1453, 1464, 1465, 1476, 1477, 2000, 2999, 3000, 3001, 4000, 9014];
    let plain: Vec<Vec<u8>> = (0..).zip(sizes).map(|(n, size)| frames::jumbo(ends, n, size)).collect();
    let tagged = plain.iter().map(|frame| frames::tagged(frames::ETH_8021Q, 42, &frame[..frame.len().min(9014)]));
    let raw = [(100, 3000), (101, 3001), (102, 8000)].map(|(n, size)| frames::raw(ends, n, size));
    tagged.chain(plain.clone()).chain(raw).collect()
}

/// What becomes of a frame in a session of this mode where the copy's headers take `overhead` bytes of the MTU; nothing
/// where it is dropped.
fn fate(mode: &str, overhead: usize, frame: &[u8]) -> Option<Cut> {
    let fit = 1500 - overhead;
    let cut = cut_to(LONG_SNAPLEN, frame);
    match mode {
        "truncate" => Some(cut_to(fit.min(LONG_SNAPLEN), frame)),
        "drop" => (cut.0.len() <= fit).then_some(cut),
        _ => Some(cut),
    }
}

fn cut_frames_that_still_do_not_fit_meet_their_fate_in(tunnel: Tunnel, overhead: usize) {
    const MODES: [&str; 4] = ["segment", "fragment", "truncate", "drop"];
    let options = Options { watched_mtu: 9000, watched_offloads_off: true, ..Options::default() };
    let lab = knowing(Lab::with(options), 5);
    for (n, mode) in (0..).zip(MODES) {
        up_both(&lab, n, tunnel, &["--snaplen", &LONG_SNAPLEN.to_string(), "--oversize", mode]);
    }
    // What fits when it is cut never meets the mode.
    up_both(&lab, 4, tunnel, &["--snaplen", "1000", "--oversize", "drop"]);
    let mut dropped = 0;
    for (from, dev, ends) in WAYS {
        let sent = jumbo_frames(&ends);
        let mut capture = collector(&lab);
        lab.send(from, dev, &sent);
        capture.settle();
        let packets = capture.stop();
        let copies = |n: u8, v6: usize| decap(tunnel.1, &packets_to(&packets, both_families(n)[v6]));
        for (n, mode) in (0..).zip(MODES) {
            for v6 in [0, 1] {
                let fates = sent.iter().map(|frame| fate(mode, overhead + 20 * v6, frame));
                let expected: Vec<Cut> = fates.flatten().collect();
                dropped += sent.len() - expected.len();
                assert_cut(&expected, &copies(n, v6));
                assert!(copies(n, v6).iter().flat_map(|copy| &copy.outer.lens).all(|len| *len <= 1500), "{mode}");
            }
        }
        let expected: Vec<Cut> = sent.iter().map(|frame| cut_to(1000, frame)).collect();
        assert_cut(&expected, &copies(4, 0));
        assert_cut(&expected, &copies(4, 1));
    }
    let lost: Vec<u64> = (0..5).map(|n| session_of(&lab, n).dropped("oversize")).collect();
    assert_eq!(lost, [0, 0, 0, dropped as u64, 0]);
    assert_eq!((0..5).map(|n| session_of(&lab, n).drops()).sum::<u64>(), dropped as u64);
}

#[test]
fn cut_frames_that_still_do_not_fit_meet_the_fate_that_was_asked_for() {
    cut_frames_that_still_do_not_fit_meet_their_fate_in(GRE, 24);
}

#[test]
fn cut_frames_that_still_do_not_fit_have_right_udp_checksums() {
    cut_frames_that_still_do_not_fit_meet_their_fate_in(GENEVE_SUM, 36);
}

#[test]
fn cut_frames_that_still_do_not_fit_are_called_cut_by_erspan2() {
    cut_frames_that_still_do_not_fit_meet_their_fate_in(ERSPAN2, 36);
}

#[test]
fn cut_frames_that_still_do_not_fit_are_called_cut_by_erspan3() {
    cut_frames_that_still_do_not_fit_meet_their_fate_in(ERSPAN3, 48);
}

/// Where whole super-packets would be cut smaller to fit, cut ones keep to the wire's boundaries.
#[test]
fn super_packets_that_are_cut_keep_the_wires_boundaries_where_the_path_is_narrow() {
    let lab = lab_that_cuts_super_packets(Options::default());
    let mut capture = collector(&lab);
    let transfer = lab.tcp_transfer(200_000, Ns::Host, Ns::Peer);
    capture.settle();
    let packets = capture.stop();
    let wire = inner(&decap(Kind::Gre, &packets_to(&packets, remote(6).into())));
    assert!(tcp_stream(&wire, Port::Dst(transfer.port)) == transfer.data, "the copied stream differs");
    for (n, (tunnel, snaplen)) in (0..4).zip(SUPER_SNAPLENS) {
        let expected: Vec<Cut> = wire.iter().map(|frame| cut_to(snaplen, frame)).collect();
        assert_cut(&expected, &decap(tunnel.1, &packets_to(&packets, remote(n).into())));
    }
}

#[test]
fn snap_lengths_that_cannot_be_are_refused_in_one_line_and_leave_nothing() {
    let lab = Lab::roomy();
    let before = lab.machine();
    for value in ["59", "0", "15001", "4294967295"] {
        let names = format!("--snaplen {value} ");
        assert_up_refused(&lab, &before, &["--snaplen", value], 2, &names, "--snaplen 128");
    }
    for value in ["x", "", "128B", "1e3", "60.5", "4294967296", "-1"] {
        let arg = format!("--snaplen={value}");
        assert_up_refused(&lab, &before, &[&arg], 2, &format!("--snaplen {value:?} is not a number"), "--snaplen 128");
    }
    assert_up_refused(&lab, &before, &["--snaplen", "60", "--snaplen", "61"], 2, "--snaplen", "snifctl up --help");
}
