//! `snifctl collect`: what it writes is what was watched, frame for frame, and what it counts is what happened.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::lab::capture::{Direction, tshark_fields};
use crate::lab::collect::*;
use crate::lab::collect_case::{self, Case, TUNNELS};
use crate::lab::decode::internet_checksum;
use crate::lab::frames::{self, Ends, GRE};
use crate::lab::judge::Said;
use crate::lab::sessions::{both_families, down, lab_of, up_in};
use crate::lab::{COLLECTOR_IP, COLLECTOR_IP6, Lab, Ns, OUT_IP, OUT_IP6, Options, PATIENCE, poll, signal};

#[test]
fn every_tunnel_is_written_as_it_was_watched_with_its_names_and_directions() {
    let tunnels: [(&[&str], &str, &str); 7] = [
        (&["gre", "--id", "7", "--egress-id", "8", "--sequence"], "gre 7 ingress", "gre 8 egress"),
        (&["vxlan", "--id", "7", "--egress-id", "8"], "vxlan 7 ingress", "vxlan 8 egress"),
        (&["geneve", "--id", "7", "--egress-id", "8", "--udp-checksum"], "geneve 7 ingress", "geneve 8 egress"),
        (&["erspan1"], "erspan1", "erspan1"),
        (&["erspan2", "--id", "7", "--egress-id", "8"], "erspan2 7 port 0 ingress", "erspan2 8 port 1 egress"),
        (&["erspan3", "--id", "7"], "erspan3 7 tap 0 ingress", "erspan3 7 tap 0 egress"),
        (&["geneve", "--tell", "--id", "9"], "geneve 9 tap 0 ingress", "geneve 9 tap 0 egress"),
    ];
    let lab = lab_of(7);
    answering(&lab, &(0..7).flat_map(both_families).collect::<Vec<_>>());
    for (n, (tunnel, ..)) in (0..).zip(tunnels) {
        let remotes = both_families(n).map(|remote| remote.to_string()).join(",");
        up_in(&lab, n, tunnel, &remotes, &[]);
    }
    let file = lab.fresh_path("all.pcapng");
    let collector = Collector::start(&lab, &["-w", text(&file), "--egress-id", "8", "--json"]);
    let [incoming, outgoing] = exchange(&lab);
    let total = 2 * tunnels.len() * (incoming.len() + outgoing.len());
    let report = collector.stop_after(&file, total).ok().json();
    down(&lab);

    for (_, ingress, egress) in tunnels {
        for source in [IpAddr::from(OUT_IP), OUT_IP6.into()] {
            let named = |name: &str| frames_in(&lab, &file, &format!("frame.interface_name == \"{name} @ {source}\""));
            if ingress == egress {
                assert_in_order(&[&incoming[..], &outgoing].concat(), &named(ingress));
            } else {
                assert_in_order(&incoming, &named(ingress));
                assert_in_order(&outgoing, &named(egress));
            }
        }
    }
    for (direction, word) in [("1", "ingress"), ("2", "egress")] {
        let told =
            tshark_fields(&file, &format!("frame.packet_flags_direction == {direction}"), &["frame.interface_name"]);
        assert_eq!(told.len(), total * 6 / 7 / 2);
        assert!(told.iter().all(|row| row[0].contains(word)), "{direction} is {word}: {:?}", told[0]);
    }
    assert_eq!((&report["lost"], &report["received"]), (&0.into(), &total.into()), "{report:#}");
    let streams = report["streams"].as_array().expect("streams");
    assert_eq!(streams.len(), 2 * (2 * 7 - 1), "{report:#}");
    assert!(report["malformed"].as_array().expect("a list").is_empty(), "{report:#}");
}

/// Each tunnel, over both families, from a source each.
fn what_does_not_fit_is_written_as_was_asked_for_in(oversize: &'static str, time: &str) {
    let case = |(n, tunnel)| Case { tunnel, oversize, n };
    collect_case::run(&(0..).zip(&TUNNELS).map(case).collect::<Vec<_>>(), time);
}

#[test]
fn what_does_not_fit_is_written_as_was_asked_for_in_segment_mode() {
    what_does_not_fit_is_written_as_was_asked_for_in("segment", "arrival");
}

#[test]
fn what_does_not_fit_is_written_as_was_asked_for_in_fragment_mode() {
    what_does_not_fit_is_written_as_was_asked_for_in("fragment", "capture");
}

#[test]
fn what_does_not_fit_is_written_as_was_asked_for_in_truncate_mode() {
    what_does_not_fit_is_written_as_was_asked_for_in("truncate", "arrival");
}

#[test]
fn what_does_not_fit_is_written_as_was_asked_for_in_drop_mode() {
    what_does_not_fit_is_written_as_was_asked_for_in("drop", "capture");
}

#[test]
fn each_byte_of_a_stream_of_super_packets_is_written() {
    collect_case::stream(&TUNNELS[0], "segment");
    collect_case::stream(&TUNNELS[6], "fragment");
}

/// A copy with the option: class 0xff5a, type 1, 20 bytes: tap, cut, the time, a sequence of the tap, and 1500 bytes on
/// the wire.
fn told(tap: u16, time: u64, number: u32, frame: &[u8]) -> Vec<u8> {
    let option = [&[0xff, 0x5a, 1, 5][..], &tap.to_be_bytes(), &[0, 1], &time.to_be_bytes(), &number.to_be_bytes()];
    let header = [&[6, 0, 0x65, 0x58, 0, 0, 7, 0][..], &option.concat(), &1500_u32.to_be_bytes()].concat();
    udp_to(OUT_IP, 6081, &[&header, frame].concat())
}

/// Two CPUs take numbers in another order than times. Then number 4 is missing, and the sequence begins again.
#[test]
fn a_file_in_the_order_of_times_tells_of_no_other_losses() {
    let lab = Lab::with(Options { out_mtu: 1700, ..Options::default() });
    answering(&lab, &[COLLECTOR_IP.into()]);
    let frame = frames::ipv4_udp(&Ends::HOST_TO_PEER, 1, 100);
    let times =
        [(20, 100), (21, 500), (22, 101), (23, 102), (25, 501), (0, 90_000_000), (1, 90_000_001), (2, 90_000_002)];
    let copies: Vec<_> = times.iter().map(|(number, time)| told(3, 1 << 60 | time, *number, &frame)).collect();
    let file = lab.fresh_path("times.pcapng");
    let collector = Collector::start(&lab, &["-w", text(&file), "--time", "capture", "--reorder", "300", "--json"]);
    lab.send(Ns::Host, "out0", &copies);
    let report = collector.stop_after(&file, copies.len()).ok().json();
    let counts = ["lost", "reordered", "doubled", "restarts"].map(|key| report["streams"][0][key].as_u64());
    assert_eq!(counts, [1, 0, 0, 1].map(Some), "{report:#}");
    let gaps = tshark_fields(&file, "frame", &["frame.drop_count"]);
    assert_eq!(gaps.concat(), ["", "", "", "", "1", "", "", ""]);
}

#[test]
fn a_tunnel_that_tells_is_believed() {
    let lab = Lab::with(Options { out_mtu: 1700, ..Options::default() });
    answering(&lab, &[COLLECTOR_IP.into()]);
    let frame = frames::ipv4_udp(&Ends::HOST_TO_PEER, 1, 100);
    let copy = |tap, number| told(tap, 1_700_000_000_123_456_789 - u64::from(number), number, &frame);
    let file = lab.fresh_path("told.pcapng");
    let collector = Collector::start(&lab, &["-w", text(&file), "--time", "capture", "--reorder", "300", "--json"]);
    lab.send(Ns::Host, "out0", &[copy(3, 0), copy(3, 2), copy(2, 1)]);
    let report = collector.stop_after(&file, 3).ok().json();
    let fields = ["frame.interface_name", "frame.time_epoch", "frame.len", "frame.packet_flags_direction"];
    let rows: Vec<String> = tshark_fields(&file, "frame", &fields).iter().map(|row| row.join(" ")).collect();
    let expected = [("egress", "787", 2), ("ingress", "788", 1), ("egress", "789", 2)];
    let line = |(direction, end, flag): (&str, &str, u8)| {
        format!("geneve 7 tap 1 {direction} @ {OUT_IP} 1700000000.123456{end} 1500 {flag}")
    };
    let shown: Vec<String> = rows.iter().map(|row| row.replace("0x00000001", "1").replace("0x00000002", "2")).collect();
    assert_eq!(shown, expected.map(line), "{rows:?}");
    let lost: Vec<Option<u64>> =
        report["streams"].as_array().expect("streams").iter().map(|row| row["lost"].as_u64()).collect();
    assert_eq!(lost, [Some(0), Some(1)], "{report:#}");
}

#[test]
fn planted_losses_doubles_and_garbage_of_64_sources_are_counted_exactly() {
    let lab = Lab::with(Options { out_mtu: 1700, ..Options::default() });
    answering(&lab, &[COLLECTOR_IP.into()]);
    let sources: Vec<Ipv4Addr> = (0..64).map(|n| Ipv4Addr::new(198, 51, 100, 100 + n)).collect();
    // 3, 7 and 8 are missing, 4 is late, 6 comes twice; then the sequence begins again.
    let numbers = [0, 1, 2, 5, 4, 6, 6, 9, 0, 1, 2, 3, 4];
    let frame = |number: usize| frames::ipv4_udp(&Ends::PEER_TO_HOST, number as u32, 200);
    let planted: Vec<Vec<u8>> = (0..numbers.len())
        .flat_map(|at| sources.iter().map(move |source| numbered(*source, numbers[at], &frame(at))))
        .collect();
    let bad = sources[5];
    let garbage = vec![
        outer(bad.into(), GRE, &[0x40, 0, 0x65, 0x58]),
        outer(bad.into(), GRE, &[0, 0, 8, 0, 1, 2, 3, 4]),
        outer(bad.into(), GRE, &[0x80, 0, 0x65, 0x58, 9, 9, 0, 0, 1, 2]),
        udp_to(bad, 4789, &[0; 60]),
        udp_to(bad, 6081, &[63, 0, 0x65, 0x58, 0, 0, 0, 0, 1]),
        udp_to(bad, 4790, &[8]),
    ];
    let file = lab.fresh_path("planted.pcapng");
    let collector = Collector::start(&lab, &["-w", text(&file), "--reorder", "300", "--json"]);
    lab.send(Ns::Host, "out0", &[planted, garbage].concat());
    let report = collector.stop_after(&file, 64 * numbers.len()).ok().json();
    let streams = report["streams"].as_array().expect("streams");
    assert_eq!(streams.len(), 64, "{report:#}");
    for stream in streams {
        let counts = ["received", "lost", "reordered", "doubled", "restarts"].map(|key| stream[key].as_u64());
        assert_eq!(counts, [13, 3, 1, 1, 1].map(Some), "{stream:#}");
    }
    let faults = &report["malformed"][0]["faults"];
    for fault in ["gre", "protocol", "checksum", "vxlan", "geneve", "short"] {
        assert_eq!(faults[fault], 1, "{fault} in {report:#}");
    }
    // In order, and the loss is told where it was.
    let of = format!("frame.interface_name == \"gre @ {}\"", sources[9]);
    let order = [0, 1, 2, 4, 3, 5, 6, 7, 8, 9, 10, 11, 12].map(frame);
    assert_in_order(&order, &frames_in(&lab, &file, &of));
    let gaps = tshark_fields(&file, &of, &["frame.drop_count"]);
    let gaps: Vec<&str> = gaps.iter().map(|row| row[0].as_str()).collect();
    assert_eq!(gaps, ["", "", "", "1", "", "", "", "2", "", "", "", "", ""]);
}

/// What another sender makes of a frame: the interface's name before the source, its direction as pcapng has it, and the
/// packet.
type Form = (&'static str, u8, fn(IpAddr, u32, &[u8]) -> Vec<u8>);

/// Every header that is read, and no one of ours makes some of them.
const FORMS: [Form; 15] = [
    ("gre", 0, |from, _, frame| outer(from, GRE, &[&[0, 0, 0x65, 0x58], frame].concat())),
    ("gre 9", 0, |from, _, frame| outer(from, GRE, &[&[0x20, 0, 0x65, 0x58, 0, 0, 0, 9], frame].concat())),
    ("gre", 0, |from, n, frame| numbered(from, n, frame)),
    ("gre", 0, |from, _, frame| outer(from, GRE, &summed(&[&[0x80, 0, 0x65, 0x58, 0, 0, 0, 0], frame].concat()))),
    ("gre 9", 0, |from, n, frame| {
        let header = [&[0xb0, 0, 0x65, 0x58, 0, 0, 0, 0, 0, 0, 0, 9][..], &n.to_be_bytes()].concat();
        outer(from, GRE, &summed(&[&header, frame].concat()))
    }),
    ("erspan1", 0, |from, _, frame| outer(from, GRE, &[&[0, 0, 0x88, 0xbe], frame].concat())),
    // Version 1, VLAN 10, session 7, port 5.
    ("erspan2 7 port 5", 0, |from, n, frame| erspan(from, 0x88be, n, &[0x10, 10, 0, 7, 0, 0, 0, 5], frame)),
    // Version 2; outgoing; without a subheader, with one of a platform that tells nothing, and with a port and seconds.
    ("erspan3 7 egress", 2, |from, n, frame| {
        erspan(from, 0x22eb, n, &[0x20, 0, 0, 7, 0, 0, 0, 1, 0x80, 0, 0, 0x0c], frame)
    }),
    ("erspan3 7 ingress", 1, |from, n, frame| {
        erspan(from, 0x22eb, n, &[0x20, 0, 0, 7, 0, 0, 0, 1, 0x80, 0, 0, 5, 4, 1, 2, 3, 4, 5, 6, 7], frame)
    }),
    ("erspan3 7 tap 3 ingress", 1, |from, n, frame| {
        erspan(from, 0x22eb, n, &[0x20, 0, 0, 7, 0, 0, 0, 1, 0x80, 0, 0, 5, 0x14, 0, 0, 7, 0, 0, 0, 3], frame)
    }),
    ("vxlan 7", 0, |from, _, frame| udp_to(from, 4789, &[&[8, 0, 0, 0, 0, 0, 7, 0], frame].concat())),
    ("vxlan-gpe 7", 0, |from, _, frame| udp_to(from, 4790, &[&[0x0c, 0, 0, 3, 0, 0, 7, 0], frame].concat())),
    ("geneve 7", 0, |from, _, frame| summed_udp_to(from, 6081, &[&[0, 0, 0x65, 0x58, 0, 0, 7, 0], frame].concat())),
    // Two options that nobody knows, one without data.
    ("geneve 7", 0, |from, _, frame| {
        let header = [&[3, 0, 0x65, 0x58, 0, 0, 7, 0][..], &[1, 2, 3, 1, 9, 9, 9, 9], &[1, 3, 4, 0]].concat();
        udp_to(from, 6081, &[&header, frame].concat())
    }),
    ("geneve 7 tap 1 egress", 2, |from, n, frame| {
        let option = [&[0xff, 0x5a, 1, 5, 0, 3, 0, 0][..], &7_u64.to_be_bytes(), &n.to_be_bytes(), &[0; 4]].concat();
        udp_to(from, 6081, &[&[6, 0, 0x65, 0x58, 0, 0, 7, 0], &option[..], frame].concat())
    }),
];

/// The GRE packet with the checksum for which it has room.
fn summed(packet: &[u8]) -> Vec<u8> {
    let sum = internet_checksum(&[packet]).to_be_bytes();
    [&packet[..4], &sum, &packet[6..]].concat()
}

fn erspan(from: IpAddr, protocol: u16, number: u32, header: &[u8], frame: &[u8]) -> Vec<u8> {
    let gre = [&[0x10, 0][..], &protocol.to_be_bytes(), &number.to_be_bytes()].concat();
    outer(from, GRE, &[&gre, header, frame].concat())
}

#[test]
fn streams_of_64_senders_of_every_form_and_family_at_once_are_written_exactly() {
    const SENDERS: u8 = 64;
    const EACH: u32 = 3;
    let lab = Lab::with(Options { out_mtu: 1700, ..Options::default() });
    answering(&lab, &[COLLECTOR_IP.into(), COLLECTOR_IP6.into()]);
    let sources = |form: usize, n: u8| -> [IpAddr; 2] {
        let v6 = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, form as u16, n.into());
        [Ipv4Addr::new(10, 0, form as u8, n).into(), v6.into()]
    };
    let senders: Vec<(usize, IpAddr)> = (0..SENDERS)
        .flat_map(|n| (0..FORMS.len()).flat_map(move |form| sources(form, n).map(|from| (form, from))))
        .collect();
    let frame = |sender: usize, round: u32| {
        let n = round * senders.len() as u32 + sender as u32;
        frames::ipv4_udp(&Ends::PEER_TO_HOST, n, 8 + n as usize * 7 % 1400)
    };
    let packets: Vec<Vec<u8>> = (0..EACH)
        .flat_map(|round| (0..).zip(&senders).map(move |(n, (form, from))| (round, n, *form, *from)))
        .map(|(round, n, form, from)| FORMS[form].2(from, round, &frame(n, round)))
        .collect();
    let file = lab.fresh_path("foreign.pcapng");
    let collector = Collector::start(&lab, &["-w", text(&file), "--json"]);
    let begin = since_1970();
    lab.send(Ns::Host, "out0", &packets);
    let when = begin..=since_1970();
    let report = collector.stop_after(&file, packets.len()).ok().json();
    let mut found = by_interface(written(&lab, &file));
    for (n, (form, from)) in senders.iter().enumerate() {
        let (name, direction, _) = FORMS[*form];
        let got = found.remove(&format!("{name} @ {from}")).unwrap_or_default();
        let expected: Vec<Vec<u8>> = (0..EACH).map(|round| frame(n, round)).collect();
        assert_in_order(&expected, &got.iter().map(|written| written.frame.clone()).collect::<Vec<_>>());
        let is_told = |written: &Written| {
            (written.direction, written.wire) == (direction, written.frame.len()) && when.contains(&written.time)
        };
        assert!(got.iter().all(is_told), "{when:?}, not so: {got:#?}");
    }
    assert!(found.is_empty(), "{:?}", found.keys());
    assert_eq!(report["streams"].as_array().map(Vec::len), Some(senders.len()));
    assert_eq!((&report["lost"], &report["received"]), (&0.into(), &packets.len().into()));
    assert!(report["malformed"].as_array().expect("a list").is_empty(), "{:#}", report["malformed"]);
}

#[test]
fn the_kernels_vxlan_device_is_a_sender_and_a_rival() {
    let lab = Lab::with(Options { out_mtu: 1700, ..Options::default() });
    answering(&lab, &[COLLECTOR_IP.into(), COLLECTOR_IP6.into()]);
    let device = |more: &str| {
        format!("link add vx0 type vxlan id 42 dstport 4789 {more}\nlink set vx0 addrgenmode none mtu 1500 up")
    };
    lab.ip_batch(Ns::Host, &device(&format!("local {OUT_IP} remote {COLLECTOR_IP} dev out0")));
    let sent: Vec<Vec<u8>> = (0..97).map(|n| frames::ipv4_udp(&Ends::HOST_TO_PEER, n, 100)).collect();
    let file = lab.fresh_path("vxlan.pcapng");
    let collector = Collector::start(
        &lab,
        &["--tunnel", "vxlan", "-w", text(&file), "--to", "tap7", "--filter", "udp", "--stats", "1"],
    );
    let mut tap = lab.capture(Ns::Collector, "tap7", Direction::In);
    lab.send(Ns::Host, "vx0", &sent);
    assert_in_order(&sent, &tap.take(sent.len()));
    let said = collector.stop_after(&file, sent.len()).ok();
    // The device may have sent a group report of its own, which the filter leaves out.
    let row = format!("{OUT_IP} vxlan 42 - - ");
    let said_rows = said.stdout.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
    assert!(said_rows.into_iter().any(|line| line.starts_with(&row)), "{said:#?}");
    assert_in_order(&sent, &frames_in(&lab, &file, &format!("frame.interface_name == \"vxlan 42 @ {OUT_IP}\"")));
    assert!(
        !lab.try_run(Ns::Collector, &["ip", "link", "show", "dev", "tap7"]).status.success(),
        "the tap device is left"
    );

    // The same stream on the kernel's own device is the same.
    lab.ip_batch(Ns::Collector, &device(""));
    let mut kernel = lab.capture(Ns::Collector, "vx0", Direction::In);
    lab.send(Ns::Host, "vx0", &sent);
    // Here, too, the device may have sent a report of its own.
    let is_sent = |frame: &Vec<u8>| sent.contains(frame);
    assert!(poll(PATIENCE, || (kernel.count() >= sent.len()).then_some(())).is_some());
    kernel.settle();
    let got: Vec<Vec<u8>> = kernel.stop().into_iter().filter(is_sent).collect();
    assert_in_order(&sent, &got);
    let mut command = lab.command(Ns::Collector, &[env!("CARGO_BIN_EXE_snifctl"), "collect", "--tunnel", "vxlan"]);
    let said = Said::from(command.args(["--stats", "1"]).output().expect("run snifctl"));
    said.refused(1, "belongs to the interface vx0, a vxlan device", "ip link delete vx0");

    // The device has the port of IPv4 alone: where nothing else was asked for, the other family is received.
    let file = lab.fresh_path("beside.pcapng");
    let collector = Collector::start(&lab, &["-w", text(&file)]);
    let over_v6 = |frame: &Vec<u8>| udp_to(OUT_IP6, 4789, &[&[8, 0, 0, 0, 0, 0, 42, 0], &frame[..]].concat());
    lab.send(Ns::Host, "out0", &sent.iter().map(over_v6).collect::<Vec<_>>());
    let said = collector.stop_after(&file, sent.len()).ok();
    assert_eq!(said.stderr.matches(" is received: ").count(), 1, "{said:#?}");
    assert!(said.stderr.contains("no vxlan over IPv4 is received: UDP port 4789 belongs to"), "{said:#?}");
    assert_in_order(&sent, &frames_in(&lab, &file, &format!("frame.interface_name == \"vxlan 42 @ {OUT_IP6}\"")));
}

#[test]
fn files_follow_size_signals_and_a_full_disk_and_stay_readable() {
    let lab = Lab::with(Options { out_mtu: 1700, ..Options::default() });
    answering(&lab, &[COLLECTOR_IP.into()]);
    let sent: Vec<Vec<u8>> = (0..2003).map(|n| frames::ipv4_udp(&Ends::HOST_TO_PEER, n, 1000)).collect();
    let packets: Vec<Vec<u8>> = (0..).zip(&sent).map(|(n, frame)| numbered(OUT_IP, n, frame)).collect();
    let dir = lab.dir().join("files");
    fs::create_dir(&dir).expect("a directory");
    let read = |names: &[String]| -> Vec<Vec<u8>> {
        names.iter().flat_map(|name| frames_in(&lab, &dir.join(name), "frame")).collect()
    };

    // By size: three files, the last begun anew where there may be two.
    let path = dir.join("size");
    let size = |more: &[&str]| {
        let args = [&["-w", text(&path), "-C", "1", "--count", "2003"], more].concat();
        let collector = Collector::start(&lab, &args);
        lab.send(Ns::Host, "out0", &packets);
        collector.ended().ok();
    };
    size(&[]);
    assert_in_order(&sent, &read(&["size".into(), "size1".into(), "size2".into()]));
    size(&["-W", "2"]);
    let [first, second] = ["size0", "size1"].map(|name| read(&[name.into()]));
    assert!(sent.ends_with(&first) && sent.len() > first.len() + second.len(), "{} {}", first.len(), second.len());

    // By a signal, once the file has been moved away; as a user without rights.
    lab.run(Ns::Collector, &["chown", "nobody", text(&dir)]);
    let path = dir.join("hup");
    let collector = Collector::start(&lab, &["-w", text(&path), "-Z", "nobody", "--pcap", "--count", "20"]);
    let size_is = |name: &str, frames: usize| {
        let bytes = 24 + frames * (16 + sent[0].len());
        let path = dir.join(name);
        let there = || fs::metadata(&path).map_or(0, |file| file.len());
        assert!(poll(PATIENCE, || (there() == bytes as u64).then_some(())).is_some(), "{name}: {} of {bytes}", there());
    };
    lab.send(Ns::Host, "out0", &packets[..10]);
    size_is("hup", 10);
    fs::rename(&path, dir.join("moved")).expect("move");
    signal(collector.id(), "HUP");
    size_is("hup", 0);
    lab.send(Ns::Host, "out0", &packets[10..20]);
    collector.ended().ok();
    assert_in_order(&sent[..20], &read(&["moved".into(), "hup".into()]));

    // A disk with room for a few hundred frames.
    let full = "dir=$1 && shift && mount -t tmpfs -o size=300k tmpfs /mnt && \"$@\"; code=$?; cp /mnt/full \"$dir\"; exit $code";
    let by = ["unshare", "--mount", "sh", "-c", full, "sh", text(&dir)];
    let collector = Collector::start_by(&lab, &by, &["-w", "/mnt/full"]);
    lab.send(Ns::Host, "out0", &packets);
    let said = collector.ended();
    assert_eq!(said.status.code(), Some(1), "{said:#?}");
    assert!(said.stderr.contains("cannot write -w /mnt/full: No space left on device"), "{said:#?}");
    let kept = read(&["full".into()]);
    assert!(kept.len() > 200 && sent.starts_with(&kept), "{}", kept.len());
    assert!(said.stdout.contains("2003") || said.stdout.contains(" gre"), "{said:#?}");
}

#[test]
fn a_pipe_gets_each_frame_at_once_and_mistakes_are_named() {
    let lab = Lab::with(Options { out_mtu: 1700, ..Options::default() });
    answering(&lab, &[COLLECTOR_IP.into()]);
    let collector = Collector::start(&lab, &["-w", "-", "--dedup", "1000"]);
    let frame = frames::ipv4_udp(&Ends::HOST_TO_PEER, 1, 100);
    let other = Ipv4Addr::new(198, 51, 100, 77);
    lab.send(Ns::Host, "out0", &[numbered(OUT_IP, 0, &frame), numbered(other, 0, &frame)]);
    let out = collector.out().to_owned();
    let said = collector.stop_after(&out, 1);
    assert!(said.status.success() && said.stderr.contains("gre"), "{said:#?}");
    assert_in_order(&[frame], &frames_in(&lab, &out, "frame"));

    let refused = |args: &[&str], names: &str, ends: &str| {
        let mut command = lab.command(Ns::Collector, &[env!("CARGO_BIN_EXE_snifctl"), "collect"]);
        Said::from(command.args(args).output().expect("run snifctl")).refused(2, names, ends);
    };
    refused(&[], "nothing says what to do with the frames", "--to tap0 or --stats 10");
    refused(&["-w", "-", "-C", "1"], "-C and -G do not go with -w -", "-w day.pcapng -C 100");
    refused(&["--stats", "1", "--port", "8472"], "--port is that of one type", "--tunnel vxlan --port 8472");
    refused(&["--stats", "1", "--filter", "tcp prot 1"], "--filter", "'tcp port 443 and not net 10.0.0.0/8'");
}
