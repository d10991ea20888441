//! `--tell`: what the Geneve option says of each copy, on the real kernel, by the tests' own reading and by tshark with
//! the dissector of the docs.

use std::process::Command;
use std::time::Duration;

use crate::lab::capture::Direction;
use crate::lab::check::assert_same_frames;
use crate::lab::collect::since_1970;
use crate::lab::frames::{self, Ends};
use crate::lab::super_packets::send_udp_super_packet;
use crate::lab::tunnel_case::{
    ERSPAN3, GENEVE, GENEVE_TELL, GENEVE_TELL_SUM, MEGABYTES, Tunnel, assert_numbers, down, packets, up,
};
use crate::lab::tunnels::{Tell, Tunnelled, inner};
use crate::lab::{COLLECTOR_IP, COLLECTOR_IP6, Lab, Ns, Options};
use serde_json::Value;

/// Every copy of a 1500-byte link fits, with two tags and the longest header.
const ROOMY: u32 = 1700;

/// The clocks of the sender's programs and of the captures are one: what is told may be off by what two readings are apart.
const OFF: Duration = Duration::from_micros(50);

/// eth0 and eth1 on the host, with a peer each.
fn two_links() -> Lab {
    let lab = Lab::with(Options { out_mtu: ROOMY, ..Options::default() });
    let peer = lab.ns_name(Ns::Peer);
    let link = format!("link add eth1 type veth peer name peer1 netns {peer}\nlink set eth1 addrgenmode none up");
    lab.ip_batch(Ns::Host, &link);
    lab.ip_batch(Ns::Peer, "link set peer1 addrgenmode none up");
    lab
}

/// By tap slot: who sends so that it passes.
const WAYS: [(Ns, &str, Ends); 4] = [
    (Ns::Peer, "peer0", Ends::PEER_TO_HOST),
    (Ns::Host, "eth0", Ends::HOST_TO_PEER),
    (Ns::Peer, "peer1", Ends::PEER_TO_HOST),
    (Ns::Host, "eth1", Ends::HOST_TO_PEER),
];

/// What of frames sent out of an interface reaches the collector.
fn mirrored(lab: &Lab, from: Ns, dev: &str, sent: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut capture = lab.capture(Ns::Collector, "col0", Direction::In);
    lab.send(from, dev, sent);
    packets(lab, &mut capture)
}

fn tells(copies: &[Tunnelled]) -> Vec<Tell> {
    copies.iter().map(|copy| copy.header.tell.expect("what it tells")).collect()
}

/// Plain, short, tagged and twice tagged.
fn some_frames(ends: &Ends, first: u32) -> Vec<Vec<u8>> {
    let plain = [60, 61, 300, 1514].map(|size| frames::jumbo(ends, first + size as u32, size));
    let once = frames::tagged(frames::ETH_8021Q, 0xa000 | 42, &plain[2]);
    let twice = frames::tagged(frames::ETH_8021AD, 0x6000 | 4094, &once);
    [&plain[..], &[once, twice, frames::arp(ends)]].concat()
}

/// Bytes on the wire of the frame that a copy begins with, by its IPv4 header.
fn by_its_header(frame: &[u8]) -> usize {
    assert_eq!(frame[12..14], [8, 0], "an IPv4 frame");
    14 + usize::from(u16::from_be_bytes([frame[16], frame[17]]))
}

#[track_caller]
fn each_copy_says_where_when_which_and_how_long(tunnel: Tunnel, more: &[&str], snaplen: usize) {
    let lab = two_links();
    up(&lab, tunnel, &[&["eth1"], more].concat());
    let mut all = [Vec::new(), Vec::new()];
    for (slot, (ns, dev, ends)) in (0..).zip(&WAYS) {
        let sent = some_frames(ends, 100);
        let mut capture = lab.capture(Ns::Collector, "col0", Direction::In);
        let before = since_1970();
        lab.send(*ns, dev, &sent);
        let found = packets(&lab, &mut capture);
        let after = since_1970();
        for (case, all) in tunnel.cases().iter().zip(&mut all) {
            let copies = case.copies(&found);
            let cut: Vec<Vec<u8>> = sent.iter().map(|frame| frame[..frame.len().min(snaplen)].to_vec()).collect();
            assert_same_frames(&cut, &inner(&copies));
            for (frame, tell) in sent.iter().zip(tells(&copies)) {
                let expected = (slot, frame.len() > snaplen, frame.len());
                assert_eq!((tell.tap, tell.cut, tell.length), expected, "{case:?} {dev}");
                let (time, range) = (tell.time, before - OFF..after + OFF);
                assert!(range.contains(&time), "{case:?} {dev}: {time:?} in {range:?}");
            }
            assert!(tells(&copies).is_sorted_by_key(|tell| (tell.time, tell.sequence)), "{case:?} {dev}");
            assert!(copies.iter().all(|copy| copy.outer.checksum == tunnel.checksum), "{case:?} {dev}");
            all.extend(copies);
        }
    }
    super_packets(&lab, tunnel, snaplen, &mut all);
    for copies in &all {
        let taps: Vec<u16> = tells(copies).iter().map(|tell| tell.tap).collect();
        assert!((0..4).all(|tap| taps.contains(&tap)), "{taps:?}");
        assert_numbers(copies);
    }
    assert_eq!(lab.settled().drops(), 0);
}

/// Frames cut out of super-packets, of TCP and of UDP: each copy tells the length of its own.
#[track_caller]
fn super_packets(lab: &Lab, tunnel: Tunnel, snaplen: usize, all: &mut [Vec<Tunnelled>; 2]) {
    let mut capture = lab.capture_wire(Ns::Collector, "col0", Direction::In);
    lab.tcp_transfer(MEGABYTES, Ns::Host, Ns::Peer);
    send_udp_super_packet(lab, 20_000, 1000);
    let found = packets(lab, &mut capture);
    for (case, all) in tunnel.cases().iter().zip(all) {
        let copies: Vec<Tunnelled> = case.copies(&found);
        for (copy, tell) in copies.iter().zip(tells(&copies)) {
            let length = by_its_header(&copy.frame);
            assert_eq!((tell.length, tell.cut), (length, length > snaplen), "{case:?}");
            assert_eq!(copy.frame.len(), length.min(snaplen), "{case:?}");
        }
        let of = |protocol: u8, length: usize| {
            let of_it = |copy: &&Tunnelled| copy.frame[23] == protocol && by_its_header(&copy.frame) == length;
            copies.iter().filter(of_it).count()
        };
        let (tcp, udp) = (of(6, 1514), of(17, 1042));
        assert!(tcp > MEGABYTES / 1514 / 2 && udp == 20, "{case:?}: {tcp}, {udp}");
        all.extend(copies);
    }
}

#[test]
fn each_copy_says_where_when_which_and_how_long_whole() {
    each_copy_says_where_when_which_and_how_long(GENEVE_TELL, &[], usize::MAX);
}

#[test]
fn each_copy_says_where_when_which_and_how_long_cut_under_a_checksum() {
    each_copy_says_where_when_which_and_how_long(GENEVE_TELL_SUM, &["--snaplen", "100"], 100);
}

/// The numbers of taps that do not fit the array of the first ones.
#[test]
fn copies_of_the_33rd_interface_are_numbered_like_those_of_the_first() {
    let lab = Lab::with(Options { out_mtu: ROOMY, ..Options::default() });
    let peer = lab.ns_name(Ns::Peer);
    let names: Vec<String> = (1..33).map(|n| format!("eth{n}")).collect();
    let links = names.iter().map(|name| {
        let far = name.replace("eth", "peer");
        format!("link add {name} type veth peer name {far} netns {peer}\nlink set {name} addrgenmode none up\n")
    });
    lab.ip_batch(Ns::Host, &links.collect::<String>());
    lab.ip_batch(Ns::Peer, "link set peer32 addrgenmode none up");
    up(&lab, GENEVE_TELL, &names.iter().map(String::as_str).collect::<Vec<_>>());
    let mut found = Vec::new();
    for (ns, dev, ends) in [WAYS[0], (Ns::Peer, "peer32", Ends::PEER_TO_HOST), (Ns::Host, "eth32", Ends::HOST_TO_PEER)]
    {
        found.extend(mirrored(&lab, ns, dev, &frames::series(&ends, 11)));
    }
    for case in GENEVE_TELL.cases() {
        let copies = case.copies(&found);
        let expected: Vec<(u16, u32)> = [0, 64, 65].iter().flat_map(|tap| (0..11).map(|n| (*tap, n))).collect();
        let mut told: Vec<(u16, u32)> = tells(&copies).iter().map(|tell| (tell.tap, tell.sequence)).collect();
        told.sort_unstable();
        assert_eq!(told, expected, "{case:?}");
    }
}

// ---- the clock ----

/// The bytes of the configuration, and the pin of its map.
fn config(lab: &Lab) -> (Vec<u8>, String) {
    let pin = lab.pins().join("default/maps/config").to_str().expect("UTF-8").to_string();
    let dump = lab.shown(&["bpftool", "-j", "map", "dump", "pinned", &pin]);
    let dump: Value = serde_json::from_str(&dump).expect("JSON of bpftool");
    let bytes = dump[0]["value"].as_array().expect("the bytes of the value").iter();
    let hex = bytes.map(|byte| byte.as_str().expect("hex").trim_start_matches("0x"));
    (hex.map(|byte| u8::from_str_radix(byte, 16).expect("hex")).collect(), pin)
}

/// What the programs add to the time since boot.
fn clock(lab: &Lab) -> u64 {
    u64::from_ne_bytes(config(lab).0[8..16].try_into().expect("eight bytes"))
}

/// Makes the programs' clock go ahead of 1970's, as it does when the machine's clock is set back.
fn put_ahead(lab: &Lab, ahead: Duration) {
    let (mut value, pin) = config(lab);
    let clock = clock(lab) + ahead.as_nanos() as u64;
    value[8..16].copy_from_slice(&clock.to_ne_bytes());
    let value: Vec<String> = value.iter().map(u8::to_string).collect();
    let words = ["bpftool", "map", "update", "pinned", &pin, "key", "0", "0", "0", "0", "value"];
    lab.host(&words.into_iter().chain(value.iter().map(String::as_str)).collect::<Vec<_>>());
}

/// When each copy says that it was made.
fn times(copies: &[Tunnelled]) -> Vec<Duration> {
    let erspan = |copy: &Tunnelled| {
        let (_, seconds, nanoseconds) = copy.header.erspan.as_ref()?.more?;
        Some(Duration::new(seconds.into(), nanoseconds))
    };
    let tell = |copy: &Tunnelled| Some(copy.header.tell?.time);
    copies.iter().map(|copy| erspan(copy).or(tell(copy)).expect("a time")).collect()
}

/// Panics unless copies tell times that are ahead by as much.
#[track_caller]
fn assert_ahead(lab: &Lab, tunnel: Tunnel, ahead: Duration) {
    let before = since_1970();
    let found = mirrored(lab, Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, 7));
    let range = before + ahead - OFF..since_1970() + ahead + OFF;
    let times: Vec<Duration> = tunnel.cases().iter().flat_map(|case| times(&case.copies(&found))).collect();
    assert_eq!(times.len(), 14);
    assert!(times.iter().all(|time| range.contains(time)), "{tunnel:?}: {times:?} in {range:?}");
}

#[test]
fn sync_follows_a_clock_that_was_set_without_a_word_and_whoever_does_not_tell_the_time_is_left_alone() {
    let lab = Lab::with(Options { out_mtu: ROOMY, ..Options::default() });
    for tunnel in [GENEVE_TELL, ERSPAN3] {
        up(&lab, tunnel, &[]);
        assert_ahead(&lab, tunnel, Duration::ZERO);
        for step in [Duration::from_millis(20), Duration::from_secs(3600)] {
            put_ahead(&lab, step);
            assert_ahead(&lab, tunnel, step);
            lab.said(&["status", "--check"]).quietly_ok();
            assert_eq!(lab.said(&["sync"]).quietly_ok().stdout, "");
            assert_ahead(&lab, tunnel, Duration::ZERO);
        }
        let clock = clock(&lab);
        assert_eq!(lab.said(&["sync"]).quietly_ok().stdout, "");
        assert_eq!(self::clock(&lab), clock, "what is right is left alone");
        put_ahead(&lab, Duration::from_micros(100));
        assert_eq!(lab.said(&["sync"]).quietly_ok().stdout, "");
        assert!(self::clock(&lab).abs_diff(clock) < 20_000, "{}, {clock}", self::clock(&lab));
        down(&lab);
    }
    in_a_time_namespace(&lab);
    up(&lab, GENEVE, &[]);
    put_ahead(&lab, Duration::from_secs(7));
    let clock = clock(&lab);
    assert_eq!(lab.said(&["sync"]).quietly_ok().stdout, "");
    assert_eq!(self::clock(&lab), clock, "nobody reads it");
    // Whoever begins to tell begins with the right time.
    let both = format!("{COLLECTOR_IP},{COLLECTOR_IP6}");
    let args = ["up", "eth0", "--remote", &both, "--replace", "--tunnel"];
    lab.said(&[&args, GENEVE_TELL.args].concat()).ok();
    assert_ahead(&lab, GENEVE_TELL, Duration::ZERO);
}

/// A container may have another time since boot than the kernel, whose time the programs read.
fn in_a_time_namespace(lab: &Lab) {
    up(lab, GENEVE_TELL, &[]);
    let right = clock(lab);
    put_ahead(lab, Duration::from_secs(1));
    let sync = ["unshare", "-T", "--boottime", "1000", env!("CARGO_BIN_EXE_snifctl"), "sync"];
    lab.host(&sync);
    assert!(clock(lab).abs_diff(right) < 20_000, "{}, {right}", clock(lab));
    assert_ahead(lab, GENEVE_TELL, Duration::ZERO);
    down(lab);
}

// ---- Wireshark ----

#[test]
fn the_dissector_of_the_docs_reads_what_is_told() {
    let lab = Lab::with(Options { out_mtu: ROOMY, ..Options::default() });
    up(&lab, GENEVE_TELL_SUM, &["--snaplen", "100"]);
    let mut capture = lab.capture(Ns::Collector, "col0", Direction::In);
    for (ns, dev, ends) in &WAYS[..2] {
        lab.send(*ns, dev, &some_frames(ends, 100));
    }
    let found = packets(&lab, &mut capture);
    let script = format!("lua_script:{}/docs/geneve-tell.lua", env!("CARGO_MANIFEST_DIR"));
    let mut tshark = Command::new("tshark");
    tshark.env("HOME", "/tmp").env("TZ", "UTC").args(["-n", "-X", &script, "-o", "udp.check_checksum:TRUE"]);
    tshark.arg("-r").arg(capture.pcap()).args(["-T", "fields", "-E", "separator=/t", "-E", "occurrence=f"]);
    let names = "tap interface direction cut sequence length time delay missing";
    let fields = names.split(' ').map(|name| format!("snifctl.{name}")).chain(["udp.checksum.status".into()]);
    for field in fields {
        tshark.args(["-e", &field]);
    }
    let out = tshark.output().expect("start tshark");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let rows = String::from_utf8(out.stdout).expect("UTF-8 of tshark");
    assert_eq!((found.len(), rows.lines().count()), (28, 28), "{rows}");
    for (packet, row) in found.iter().zip(rows.lines()) {
        let case = GENEVE_TELL_SUM.cases()[usize::from(packet[12] == 0x86)];
        let Tell { tap, cut, time, sequence, length } = tells(&case.copies(&[packet.to_vec()]))[0];
        let numbers = format!("{tap}\t0\t{tap}\t{}\t{sequence}\t{length}\t", u8::from(cut));
        let rest = row.strip_prefix(&numbers).unwrap_or_else(|| panic!("{row:?}, not {numbers:?}"));
        let [told, delay, missing, checksum] = rest.split('\t').collect::<Vec<_>>()[..] else { panic!("{row:?}") };
        assert!(told.ends_with(&format!(".{:09} UTC", time.subsec_nanos())), "{told:?}, {time:?}");
        let delay: f64 = delay.parse().expect("seconds");
        assert!((-2e-6..1.0).contains(&delay), "captured {delay} s after it was copied");
        assert_eq!((missing, checksum), ("", "1"), "{row:?}");
    }
    // Of a file that lacks a copy the next one says so.
    let less = lab.dir().join("less.pcap");
    let out = Command::new("editcap").arg(capture.pcap()).arg(&less).args(["3", "5"]).output().expect("start editcap");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let args = ["-n", "-X", &script, "-Y", "snifctl.missing", "-T", "fields", "-e", "snifctl.missing", "-r"];
    let out = Command::new("tshark").env("HOME", "/tmp").args(args).arg(&less).output().expect("start tshark");
    assert_eq!(String::from_utf8_lossy(&out.stdout), "2\n");
}
