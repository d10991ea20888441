//! Proves the test lab itself: what the other tests rest on.

use std::collections::HashSet;
use std::fs;
use std::net::Ipv4Addr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use crate::lab;
use crate::lab::capture::{Direction, tshark_fields};
use crate::lab::check::assert_same_frames;
use crate::lab::collect::answering;
use crate::lab::decode::{self, Port};
use crate::lab::frames::{self, Ends, Family, GRE, Ipv4, TCP};
use crate::lab::order::{Missing, assert_in_order, joined};
use crate::lab::pairs::{all_pairs, pairs_of_all};
use crate::lab::{COLLECTOR_IP, COLLECTOR_IP6, COLLECTOR_MAC, Lab, Ns, OUT_IP, OUT_MAC, Options};

/// A tunnel packet's addresses, as snifctl would send it over the out link.
const TUNNEL: Ends =
    Ends { src_mac: OUT_MAC, dst_mac: COLLECTOR_MAC, src4: OUT_IP, dst4: COLLECTOR_IP, ..Ends::HOST_TO_PEER };

/// The GRE packet (behind its IP header) around a frame.
fn gre_body(inner: &[u8]) -> Vec<u8> {
    [&[0, 0, 0x65, 0x58], inner].concat()
}

fn outer(id: u16, fragment: u16, body: &[u8]) -> Vec<u8> {
    frames::ethernet(&TUNNEL, frames::ETH_IPV4, &frames::ipv4(&TUNNEL, GRE, Ipv4 { id, fragment, options: &[] }, body))
}

fn error_of<T: std::fmt::Debug>(result: anyhow::Result<T>) -> String {
    format!("{:#}", result.expect_err("the decoder must refuse this"))
}

#[test]
fn every_frame_kind_sent_by_the_peer_reaches_the_host_byte_for_byte_and_unanswered() {
    let lab = Lab::new();
    let sent = frames::corpus_frames(&Ends::PEER_TO_HOST);
    let mut capture = lab.capture(Ns::Host, "eth0", Direction::Both);
    lab.send(Ns::Peer, "peer0", &sent);
    assert_same_frames(&sent, &capture.take(sent.len()));
}

#[test]
fn every_frame_kind_sent_by_the_host_reaches_the_peer_byte_for_byte_and_unanswered() {
    let lab = Lab::new();
    let sent = frames::corpus_frames(&Ends::HOST_TO_PEER);
    let mut at_peer = lab.capture(Ns::Peer, "peer0", Direction::Both);
    let mut at_host = lab.capture(Ns::Host, "eth0", Direction::Out);
    lab.send(Ns::Host, "eth0", &sent);
    assert_same_frames(&sent, &at_peer.take(sent.len()));
    assert_same_frames(&sent, &at_host.take(sent.len()));
}

#[test]
fn the_largest_frames_pass_when_the_mtu_allows_them() {
    let lab = Lab::with(Options { watched_mtu: 65_535, ..Options::default() });
    let sizes = [14, 1514, 9014, 32_000, 65_535, 65_549];
    let mut sent: Vec<_> = sizes.iter().zip(1..).map(|(size, n)| frames::raw(&Ends::PEER_TO_HOST, n, *size)).collect();
    sent.push(frames::jumbo(&Ends::PEER_TO_HOST, 99, 65_549));
    let mut capture = lab.capture(Ns::Host, "eth0", Direction::In);
    lab.send(Ns::Peer, "peer0", &sent);
    assert_eq!(capture.take(sent.len()), sent, "also in order");
}

#[test]
fn a_long_series_is_neither_lost_nor_reordered() {
    let lab = Lab::new();
    let sent = frames::series(&Ends::PEER_TO_HOST, 4001);
    let mut capture = lab.capture_wire(Ns::Host, "eth0", Direction::In);
    lab.send(Ns::Peer, "peer0", &sent);
    assert!(capture.take(4001) == sent);
}

#[test]
fn corpus_frames_are_distinct_fit_the_mtu_and_survive_the_kernels_vlan_untagging() {
    let corpus = frames::corpus(&Ends::PEER_TO_HOST);
    let names: HashSet<_> = corpus.iter().map(|(name, _)| name).collect();
    let bytes: HashSet<_> = corpus.iter().map(|(_, frame)| frame).collect();
    assert_eq!((names.len(), bytes.len()), (corpus.len(), corpus.len()));
    for (name, frame) in &corpus {
        let is_tagged = matches!(frame[12..14], [0x81, 0] | [0x88, 0xa8]);
        assert!((14..=if is_tagged { 1518 } else { 1514 }).contains(&frame.len()), "{name}: {} bytes", frame.len());
        assert!(!is_tagged || frame.len() >= 20, "{name}: the kernel drops it before any hook");
    }
}

#[test]
fn tshark_and_our_decoder_find_every_corpus_checksum_right() {
    let dir = tempfile::tempdir().unwrap();
    let pcap = dir.path().join("corpus.pcap");
    let malformed = |name: &str| name.contains("cut") || name.contains("nothing more");
    let sound: Vec<_> = frames::corpus(&Ends::PEER_TO_HOST).into_iter().filter(|(name, _)| !malformed(name)).collect();
    let sound: Vec<_> = sound.into_iter().map(|(_, frame)| frame).collect();
    sound.iter().for_each(|frame| decode::verify_checksums(frame));
    lab::pcap::write(&pcap, &sound);
    let fields = ["ip.checksum.status", "udp.checksum.status", "tcp.checksum.status", "icmp.checksum.status"];
    let bad = fields.map(|field| format!("{field} == \"Bad\"")).join(" || ");
    assert_eq!(tshark_fields(&pcap, &bad, &["frame.number", "_ws.col.Info"]), Vec::<Vec<String>>::new());
    let good = tshark_fields(&pcap, "ip.checksum.status == \"Good\"", &["ip.id", "ip.checksum.status"]);
    assert!(good.len() > 20, "tshark did verify: {good:?}");
    assert!(good.iter().all(|row| row.len() == 2 && row[1].split(',').all(|status| status == "1")), "{good:?}");
}

#[test]
fn tshark_sees_a_bad_checksum() {
    let dir = tempfile::tempdir().unwrap();
    let pcap = dir.path().join("bad.pcap");
    let mut frame = frames::ipv4_udp(&Ends::PEER_TO_HOST, 1, 100);
    *frame.last_mut().unwrap() ^= 1;
    lab::pcap::write(&pcap, &[frame]);
    assert_eq!(tshark_fields(&pcap, "ip", &["ip.checksum.status", "udp.checksum.status", "tcp.seq"]), [["1", "0", ""]]);
}

#[test]
fn nothing_passes_a_lab_in_which_nothing_is_sent() {
    for addresses in [&[][..], &[COLLECTOR_IP.into(), COLLECTOR_IP6.into()]] {
        let lab = Lab::new();
        answering(&lab, addresses);
        assert_silent(&lab);
    }
}

#[track_caller]
fn assert_silent(lab: &Lab) {
    let mut watched = lab.capture(Ns::Host, "eth0", Direction::Both);
    let mut out = lab.capture(Ns::Host, "out0", Direction::Both);
    let mut collector = lab.capture(Ns::Collector, "col0", Direction::In);
    // A second is when the kernel's own noise would come: router solicitations, multicast reports, neighbour probes.
    lab::poll(std::time::Duration::from_secs(1), || {
        (watched.count() + out.count() + collector.count() > 0).then_some(())
    });
    assert_eq!((watched.stop(), out.stop(), collector.stop()), (vec![], vec![], vec![]));
    for (ns, iface) in [(Ns::Host, "eth0"), (Ns::Peer, "peer0"), (Ns::Host, "out0"), (Ns::Collector, "col0")] {
        assert_eq!(lab.packets(ns, iface), (0, 0), "{ns:?} {iface}, since it was made");
    }
}

#[test]
fn watched_traffic_does_not_reach_the_out_link_by_itself() {
    let lab = Lab::new();
    let sent = frames::corpus_frames(&Ends::PEER_TO_HOST);
    let mut watched = lab.capture(Ns::Host, "eth0", Direction::In);
    let mut out = lab.capture(Ns::Host, "out0", Direction::Both);
    lab.send(Ns::Peer, "peer0", &sent);
    watched.wait_for(sent.len());
    assert_eq!(out.stop(), Vec::<Vec<u8>>::new());
    assert_eq!(lab.packets(Ns::Collector, "col0"), (0, 0));
}

#[test]
fn the_collector_answers_no_tunnel_packet() {
    let lab = Lab::new();
    let sent: Vec<_> = (0..13).map(|id| outer(id, 0, &gre_body(&frames::arp(&Ends::PEER_TO_HOST)))).collect();
    let mut collector = lab.capture(Ns::Collector, "col0", Direction::Both);
    lab.send(Ns::Host, "out0", &sent);
    assert_same_frames(&sent, &collector.take(13));
    assert_eq!(lab.packets(Ns::Collector, "col0"), (13, 0));
}

#[test]
fn both_links_resolve_without_asking() {
    let lab = Lab::new();
    let mut watched = lab.capture(Ns::Host, "eth0", Direction::Both);
    lab.host(&["ping", "-c", "1", "-W", "2", "192.0.2.2"]);
    lab.peer(&["ping", "-c", "1", "-W", "2", "2001:db8::1"]);
    assert_eq!(watched.take(4).len(), 4, "two requests, two replies, no ARP, no neighbour discovery");
    let mut out = lab.capture(Ns::Collector, "col0", Direction::Both);
    for address in ["198.51.100.2", "2001:db8:1::2"] {
        let ping = lab.try_host(&["ping", "-c", "1", "-W", "0.1", address]);
        assert_eq!(ping.status.code(), Some(1), "the collector has no address to answer from");
    }
    assert_eq!(out.take(2).len(), 2);
}

#[test]
fn a_tcp_transfer_arrives_unchanged_and_its_wire_frames_tell_the_same_bytes() {
    let lab = Lab::with(Options { watched_offloads_off: true, ..Options::default() });
    let mut capture = lab.capture(Ns::Host, "eth0", Direction::Both);
    let transfer = lab.tcp_transfer(1_000_003, Ns::Peer, Ns::Host);
    let frames = capture.stop();
    assert!(frames.iter().all(|frame| frame.len() <= 1514));
    assert!(decode::tcp_stream(&frames, Port::Dst(transfer.port)) == transfer.data);
    assert!(decode::tcp_stream(&frames, Port::Src(transfer.port)).is_empty(), "the listener sends nothing");
}

#[test]
fn a_tcp_transfer_uses_super_packets_unless_told_otherwise() {
    let lab = Lab::new();
    for (from, to) in [(Ns::Host, Ns::Peer), (Ns::Peer, Ns::Host)] {
        let mut capture = lab.capture(Ns::Host, "eth0", Direction::Both);
        lab.tcp_transfer(20_000_000, from, to);
        assert!(capture.stop().iter().any(|frame| frame.len() > 20_000), "{from:?} to {to:?}");
    }
}

#[test]
fn a_tcp_transfer_over_ipv6_arrives_unchanged() {
    let lab = Lab::with(Options { watched_offloads_off: true, ..Options::default() });
    let mut capture = lab.capture(Ns::Peer, "peer0", Direction::In);
    let transfer = lab.tcp_transfer6(100_003, Ns::Host, Ns::Peer);
    assert!(decode::tcp_stream(&capture.stop(), Port::Dst(transfer.port)) == transfer.data);
}

#[test]
fn offload_options_reach_the_right_interfaces() {
    let lab = Lab::with(Options { peer_offloads_off: true, out_mtu: 9000, ..Options::default() });
    let tso = |ns, iface| {
        let out = lab.run(ns, &["ethtool", "-k", iface]);
        String::from_utf8_lossy(&out.stdout).contains("tcp-segmentation-offload: on")
    };
    assert!(tso(Ns::Host, "eth0"));
    assert!(!tso(Ns::Peer, "peer0") && !tso(Ns::Host, "out0") && !tso(Ns::Collector, "col0"));
    for (ns, iface) in [(Ns::Host, "out0"), (Ns::Collector, "col0")] {
        let link = lab.run(ns, &["ip", "link", "show", "dev", iface]);
        assert!(String::from_utf8_lossy(&link.stdout).contains("mtu 9000 "));
    }
}

#[test]
fn snifctl_runs_in_the_host_namespace() {
    let lab = Lab::new();
    lab.snifctl(["--version"]).assert().success();
}

#[test]
fn the_decoder_opens_a_gre_packet() {
    let inner = frames::arp(&Ends::PEER_TO_HOST);
    let copies = decode::decap_gre(&[outer(7, 0x4000, &gre_body(&inner))]);
    assert_eq!(copies.len(), 1);
    let copy = &copies[0];
    assert_eq!((copy.outer_src, copy.outer_dst, copy.ttl, copy.tos, copy.df), (OUT_IP, COLLECTOR_IP, 64, 0, true));
    assert_eq!((copy.eth_src, copy.eth_dst), (OUT_MAC, COLLECTOR_MAC));
    assert_eq!((&copy.ids, &copy.outer_lens, &copy.frame), (&vec![7], &vec![20 + 4 + 42], &inner));
}

#[test]
fn the_decoder_puts_fragments_together_in_any_order_and_interleaved() {
    let inners = [frames::jumbo(&Ends::PEER_TO_HOST, 1, 1514), frames::jumbo(&Ends::PEER_TO_HOST, 2, 1500)];
    let (a, b) = (gre_body(&inners[0]), gre_body(&inners[1]));
    let packets = [
        outer(1, 1024 / 8, &a[1024..]),
        outer(2, 0x2000, &b[..752]),
        outer(1, 0x2000, &a[..512]),
        outer(2, 752 / 8, &b[752..]),
        outer(1, 0x2000 | (512 / 8), &a[512..1024]),
    ];
    let copies = decode::decap_gre(&packets);
    assert_eq!(decode::inner_frames(&copies), [inners[1].clone(), inners[0].clone()], "in order of completion");
    assert_eq!(copies[1].ids, [1, 1, 1]);
    assert_eq!(copies[1].outer_lens, [20 + 1518 - 1024, 532, 532]);
}

#[test]
fn the_decoder_refuses_wrong_outer_packets() {
    let good = outer(1, 0, &gre_body(&frames::arp(&Ends::PEER_TO_HOST)));
    let with = |at: usize, value: u8| {
        let mut packet = good.clone();
        packet[at] = value;
        error_of(decode::try_decap_gre(&[packet]))
    };
    assert!(with(22, 63).contains("header checksum is wrong"));
    assert!(with(12, 0x86).contains("ethertype"));
    assert!(with(34, 0x20).contains("GRE flags and version are 0x2000"));
    assert!(with(36, 0x08).contains("GRE protocol is 0x0858"));
    let longer = [&good[..], &[0]].concat();
    assert!(error_of(decode::try_decap_gre(&[longer])).contains("length says 66 bytes, there are 67"));
    let not_gre = frames::ethernet(&TUNNEL, frames::ETH_IPV4, &frames::ipv4(&TUNNEL, 17, Ipv4::default(), &[0; 40]));
    assert!(error_of(decode::try_decap_gre(&[not_gre])).contains("IP protocol 17 is not GRE"));
}

#[test]
fn the_decoder_refuses_wrong_fragments() {
    let body = gre_body(&frames::jumbo(&Ends::PEER_TO_HOST, 1, 1000));
    let first = outer(1, 0x2000, &body[..512]);
    let refused = |packets: &[Vec<u8>]| error_of(decode::try_decap_gre(packets));
    assert!(refused(std::slice::from_ref(&first)).contains("never became whole"));
    assert!(refused(&[first.clone(), first.clone()]).contains("two fragments at offset 0"));
    assert!(refused(&[first.clone(), outer(1, 504 / 8, &body[504..])]).contains("overlap"));
    assert!(refused(&[first, outer(1, 0x4000 | (512 / 8), &body[512..])]).contains("DF differs"));
    assert!(refused(&[outer(1, 0x2000, &body[..510])]).contains("not the last has 510 bytes"));
}

#[test]
fn the_decoder_picks_gre_packets_to_one_address() {
    let ours = outer(1, 0, &gre_body(&frames::arp(&Ends::PEER_TO_HOST)));
    let mixed = [&frames::corpus_frames(&Ends::PEER_TO_HOST)[..], std::slice::from_ref(&ours)].concat();
    assert_eq!(decode::gre_packets(&mixed, COLLECTOR_IP), [ours]);
    assert_eq!(decode::gre_packets(&mixed, Ipv4Addr::new(203, 0, 113, 1)), Vec::<Vec<u8>>::new());
}

#[test]
fn the_decoder_sees_every_flipped_byte_under_a_checksum() {
    for frame in [frames::ipv4_tcp(&Ends::PEER_TO_HOST, 1, 31), frames::ipv6_extensions(&Ends::PEER_TO_HOST, 2)] {
        let covered = if frame[12] == 8 { 14..frame.len() } else { 14 + 40 + 24..frame.len() };
        for at in covered {
            let mut bad = frame.clone();
            bad[at] ^= 0x10;
            assert!(decode::check_checksums(&bad).is_err(), "byte {at}");
        }
    }
}

#[test]
fn the_internet_checksum_is_that_of_rfc_1071() {
    assert_eq!(decode::internet_checksum(&[&[0x00, 0x01, 0xf2, 0x03], &[0xf4, 0xf5, 0xf6, 0xf7]]), !0xddf2);
    assert_eq!(decode::internet_checksum(&[&[0x01]]), !0x0100);
}

#[test]
fn a_tcp_stream_tolerates_repeats_and_disorder_but_no_hole_and_no_change() {
    let segment = |seq, flags, data: &[u8]| {
        let tcp = frames::tcp(&TUNNEL, frames::Family::V4, (1, 2), seq, flags, data);
        frames::ethernet(&TUNNEL, frames::ETH_IPV4, &frames::ipv4(&TUNNEL, frames::TCP, Ipv4::default(), &tcp))
    };
    let seq = u32::MAX - 2; // the stream wraps around
    let (syn, abc, cd) = (segment(seq, 2, b""), segment(seq.wrapping_add(1), 0x18, b"abc"), segment(0, 0x18, b"cd"));
    let (efg, other) = (segment(2, 0x18, b"efg"), segment(0, 0x18, b"xd"));
    let stream = |segments: &[&Vec<u8>]| {
        let frames: Vec<_> = segments.iter().map(|frame| frame.to_vec()).collect();
        decode::try_tcp_stream(&frames, Port::Dst(2))
    };
    assert_eq!(stream(&[&efg, &cd, &syn, &abc, &abc]).unwrap(), b"abcdefg");
    assert!(error_of(stream(&[&syn, &abc, &efg])).contains("1 bytes are missing at 3"));
    assert!(error_of(stream(&[&syn, &abc, &other])).contains("differ"));
    assert!(error_of(stream(&[&abc])).contains("no SYN"));
}

#[test]
fn a_difference_of_frames_is_shown_where_it_is() {
    let sent = frames::series(&Ends::PEER_TO_HOST, 3);
    let mut got: Vec<_> = sent.iter().rev().cloned().collect();
    assert_same_frames(&sent, &got);
    got[0][50] ^= 0xff;
    let message = panic_of(|| assert_same_frames(&sent, &got));
    assert!(message.starts_with("expected 3 frames, got 3: 1 missing, 1 unexpected\nfirst missing"), "{message}");
    assert!(message.contains("differs first at offset 50"), "{message}");
    got.push(got[1].clone());
    let message = panic_of(|| assert_same_frames(&sent, &got));
    assert!(message.contains("expected 3 frames, got 4: 1 missing, 2 unexpected"), "{message}");
}

#[test]
fn a_capture_that_gets_too_little_says_how_much() {
    let lab = Lab::new();
    let mut capture = lab.capture(Ns::Host, "eth0", Direction::In);
    lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, 3));
    capture.wait_for(3);
    let message = panic_of(|| drop(capture.take(2)));
    assert!(message.contains("Host's eth0 (In): Expected to capture 2 packets, got 3"), "{message}");
}

#[test]
fn a_failing_command_panics_with_its_name_and_stderr() {
    let lab = Lab::new();
    let message = panic_of(|| drop(lab.host(&["ip", "link", "show", "dev", "nosuch0"])));
    assert!(message.contains("ip link show dev nosuch0") && message.contains("does not exist"), "{message}");
}

#[test]
fn nothing_is_left_of_a_lab_even_after_a_panic_with_processes_and_pins() {
    let mut seen = None;
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let lab = Lab::new();
        let names = [Ns::Host, Ns::Peer, Ns::Collector].map(|ns| lab.ns_name(ns));
        let pins = format!("/sys/fs/bpf/snifctl/{}", lab.ns_inode(Ns::Host));
        let child = lab.command(Ns::Host, &["sleep", "60"]).spawn().unwrap();
        let _capture = lab.capture(Ns::Host, "eth0", Direction::Both);
        fs::create_dir_all(Path::new(&pins).join("default/maps")).ok();
        seen = Some((names, pins, lab.dir().to_owned(), child));
        panic!("on purpose");
    }));
    assert!(panicked.is_err());
    let (names, pins, dir, mut child) = seen.unwrap();
    assert!(names.iter().all(|name| name.starts_with("snif") && !Path::new("/run/netns").join(name).exists()));
    assert!(!Path::new(&pins).exists() && !dir.exists());
    assert!(!child.wait().unwrap().success(), "it was ended");
}

/// The message with which `f` panics.
fn panic_of(f: impl FnOnce()) -> String {
    let payload = catch_unwind(AssertUnwindSafe(f)).expect_err("this must panic");
    payload.downcast_ref::<String>().cloned().unwrap_or_else(|| "a panic without a formatted message".to_owned())
}

// ---- the judge of order ----

/// A segment from the peer with the bytes of its stream from `seq` on.
fn segment(seq: u32, len: usize) -> Vec<u8> {
    let ends = &Ends::PEER_TO_HOST;
    let stream = frames::payload(1, 100_000);
    let data = &stream[seq as usize..][..len];
    let segment = frames::tcp(ends, Family::V4, (80, 40000), seq, 0x10, data);
    frames::ethernet(ends, frames::ETH_IPV4, &frames::ipv4(ends, TCP, Ipv4::default(), &segment))
}

fn missing(wire: &[Vec<u8>], copies: &[Vec<u8>]) -> Missing {
    assert_in_order(wire, copies, usize::MAX)
}

fn is_refused(wire: &[Vec<u8>], copies: &[Vec<u8>]) -> bool {
    catch_unwind(AssertUnwindSafe(|| missing(wire, copies))).is_err()
}

#[test]
fn the_judge_of_order_takes_segments_of_super_packets_and_counts_what_is_missing() {
    let other = frames::ipv4_udp(&Ends::HOST_TO_PEER, 7, 50);
    let wire = vec![segment(0, 3000), other.clone(), segment(3000, 500), segment(3500, 0), segment(3500, 0)];
    let whole = [segment(0, 1000), segment(1000, 2000), other.clone(), segment(3000, 500)].to_vec();
    let acks = [segment(3500, 0), segment(3500, 0)];
    assert_eq!(missing(&wire, &[&whole[..], &acks].concat()), Missing::default());
    assert_eq!(missing(&wire, &[&whole[..], &acks[..1]].concat()), Missing { whole: 1, partly: 0 });
    assert_eq!(missing(&wire, &[&whole[1..], &acks].concat()), Missing { whole: 0, partly: 1 });
    assert_eq!(missing(&wire, &whole[..1]), Missing { whole: 4, partly: 1 });
    assert_eq!(missing(&wire, &[]), Missing { whole: 5, partly: 0 });
}

#[test]
fn the_judge_of_order_puts_together_what_may_have_been_one_super_packet() {
    let other = frames::ipv4_udp(&Ends::HOST_TO_PEER, 7, 50);
    let wire = [segment(0, 1000), segment(1000, 1000), other.clone(), segment(2000, 1000), segment(3000, 0)];
    assert_eq!(joined(&wire)[1..], [other.clone(), segment(2000, 1000), segment(3000, 0)]);
    let copies = [segment(0, 900), segment(900, 900), segment(1800, 200)];
    assert_eq!(missing(&joined(&wire[..2]), &copies), Missing::default());
    assert!(is_refused(&wire, &copies) && is_refused(&joined(&wire), &[segment(1900, 200)]));
}

#[test]
fn the_judge_of_order_refuses_what_was_overtaken_came_twice_or_never_passed() {
    let other = frames::ipv4_udp(&Ends::HOST_TO_PEER, 7, 50);
    let wire = vec![segment(0, 3000), other.clone(), segment(3000, 500)];
    let [first, second, last] = [segment(0, 1000), segment(1000, 2000), segment(3000, 500)];
    assert!(is_refused(&wire, &[other.clone(), first.clone()]), "overtaken by another");
    assert!(is_refused(&wire, &[second.clone(), first.clone()]), "within a super-packet");
    assert!(is_refused(&wire, &[first.clone(), other.clone(), second]), "a part after the next frame");
    assert!(is_refused(&wire, &[first.clone(), first.clone()]), "twice");
    assert!(is_refused(&wire, &[segment(0, 3000), other.clone(), segment(3500, 0)]), "an ack that never passed");
    let mut changed = last.clone();
    changed[60] ^= 1;
    assert!(is_refused(&wire, &[changed]), "other bytes");
    assert!(is_refused(&wire, &[last[..100].to_vec()]), "cut where nothing may cut");
    assert_eq!(assert_in_order(&wire, &[last[..100].to_vec()], 100), Missing { whole: 2, partly: 0 });
}

/// tshark, as the judge uses it: silent on what is in order, also when it is cut; not when an ack is early.
#[test]
fn tshark_finds_what_is_out_of_order() {
    let lab = Lab::new();
    let ends = &Ends::HOST_TO_PEER;
    let ack = |ack: u32| {
        let mut segment = frames::tcp(ends, Family::V4, (40000, 80), 0, 0x10, &[]);
        segment[8..12].copy_from_slice(&ack.to_be_bytes());
        frames::ethernet(ends, frames::ETH_IPV4, &frames::ipv4(ends, TCP, Ipv4::default(), &segment))
    };
    let wire = [ack(0), segment(0, 1000), segment(1000, 1000), ack(2000), segment(2000, 1000), ack(3000)];
    let cut: Vec<Vec<u8>> = wire.iter().map(|frame| frame[..frame.len().min(100)].to_vec()).collect();
    assert!(lab.read_tcp(&wire).strange.is_empty(), "{:?}", lab.read_tcp(&wire));
    assert!(lab.read_tcp(&cut).strange.is_empty(), "{:?}", lab.read_tcp(&cut));
    for [a, b] in [[1, 2], [2, 3], [4, 5]] {
        let mut swapped = wire.clone();
        swapped.swap(a, b);
        assert!(!lab.read_tcp(&swapped).strange.is_empty(), "{a} and {b} swapped");
        assert!(catch_unwind(AssertUnwindSafe(|| lab.assert_tcp_reads_the_same(&wire, &swapped, true))).is_err());
    }
}

#[test]
fn every_pair_of_values_is_in_a_row() {
    let counts = [6, 5, 4, 2, 2];
    let rows = all_pairs(counts, |_| {});
    for ((a, x), (b, y)) in pairs_of_all(&counts) {
        assert!(rows.iter().any(|row| row[a] == x && row[b] == y), "factor {a} with {x} and {b} with {y}");
    }
    assert!(rows.len() < 50, "{} rows, where the product has 480", rows.len());
}
