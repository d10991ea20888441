//! `snifctl collect` where its surroundings are not as it would like them: readers that go, devices that go, names and
//! addresses that are odd, and more senders than are told apart.

use std::fs::{self, File};
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use crate::lab::capture::Direction;
use crate::lab::collect::*;
use crate::lab::frames::{self, Ends};
use crate::lab::judge::Said;
use crate::lab::nobody::PublicCopy;
use crate::lab::{COLLECTOR_IP, COLLECTOR_IP6, Lab, Ns, OUT_IP, Options, PATIENCE, poll, signal};
use serde_json::{Deserializer, Value};

fn lab() -> Lab {
    let lab = Lab::with(Options { out_mtu: 1700, ..Options::default() });
    answering(&lab, &[COLLECTOR_IP.into(), COLLECTOR_IP6.into()]);
    lab
}

fn some_frames(count: u32) -> Vec<Vec<u8>> {
    (0..count).map(|n| frames::ipv4_udp(&Ends::HOST_TO_PEER, n, 100)).collect()
}

/// Sends the frames as copies, numbered from there on.
fn send(lab: &Lab, first: u32, frames: &[Vec<u8>]) {
    let copies = (first..).zip(frames).map(|(n, frame)| numbered(OUT_IP, n, frame));
    lab.send(Ns::Host, "out0", &copies.collect::<Vec<_>>());
}

/// Panics unless `collect` refuses these arguments.
#[track_caller]
fn assert_refused(lab: &Lab, args: &[&str], code: i32, names: &str, ends: &str) {
    let mut command = lab.command(Ns::Collector, &[env!("CARGO_BIN_EXE_snifctl"), "collect"]);
    Said::from(command.args(args).output().expect("run snifctl")).refused(code, names, ends);
}

// ---- readers ----

#[test]
fn it_ends_with_its_reader_though_nothing_comes() {
    let lab = lab();
    let mut command = lab.command(Ns::Collector, &[env!("CARGO_BIN_EXE_snifctl"), "collect", "-w", "-"]);
    let err = lab.fresh_path("err");
    let said = || fs::read_to_string(&err).unwrap_or_default();
    command.stdout(Stdio::piped()).stderr(File::create(&err).expect("a file"));
    let mut child = command.spawn().expect("start snifctl collect");
    let mut out = child.stdout.take().expect("a pipe");
    let mut magic = [0; 4];
    out.read_exact(&mut magic).expect("the first bytes");
    assert_eq!(magic, [0x0a, 0x0d, 0x0d, 0x0a]);
    assert!(poll(PATIENCE, || said().contains("receiving").then_some(())).is_some(), "{}", said());
    drop(out);
    let status = poll(PATIENCE, || child.try_wait().expect("wait"));
    let _ = child.kill();
    let _ = child.wait();
    assert!(status.is_some_and(|status| status.success()), "{status:?}: {}", said());
    assert!(said().contains("source  tunnel"), "{}", said());
}

#[test]
fn a_named_pipe_and_a_full_device_end_it_as_a_pipe_and_a_full_disk_do() {
    let lab = lab();
    let pipe = lab.fresh_path("pipe");
    lab.run(Ns::Collector, &["mkfifo", text(&pipe)]);
    let script = "head -c 4 \"$1\" >/dev/null & shift; exec \"$@\"";
    let collector = Collector::start_by(&lab, &["sh", "-c", script, "sh", text(&pipe)], &["-w", text(&pipe)]);
    collector.ended().ok();

    let args = ["--tunnel", "gre", "-w", "/dev/full"];
    assert_refused(&lab, &args, 1, "cannot write -w /dev/full: No space left on device", "as in: -C 100 -W 10");
}

#[test]
fn what_has_come_is_counted_though_a_signal_ends_it() {
    let lab = lab();
    let collector = Collector::start(&lab, &["--tunnel", "gre", "--stats", "1000", "--json"]);
    signal(collector.id(), "STOP");
    send(&lab, 0, &some_frames(3000));
    lab.wait_until_received();
    ["TERM", "CONT"].iter().for_each(|name| signal(collector.id(), name));
    let told: Value = serde_json::from_str(&collector.ended().ok().stdout).expect("JSON");
    assert_eq!((&told["received"], &told["dropped"]), (&3000.into(), &0.into()), "{told:#}");
}

#[test]
fn a_signal_ends_it_though_nobody_reads_its_pipe() {
    let lab = lab();
    let pipe = lab.fresh_path("pipe");
    lab.run(Ns::Collector, &["mkfifo", text(&pipe)]);
    let start = || {
        let mut command = lab.command(Ns::Collector, &[env!("CARGO_BIN_EXE_snifctl"), "collect", "--tunnel", "gre"]);
        command.args(["-w", text(&pipe)]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start it")
    };
    // Without a reader it waits for one.
    let child = start();
    let waits = || fs::read_to_string(format!("/proc/{}/wchan", child.id())).unwrap_or_default().contains("nanosleep");
    assert!(poll(PATIENCE, || waits().then_some(())).is_some());
    signal(child.id(), "TERM");
    assert_eq!(Said::of(child).status.code(), Some(143));
    // One that reads nothing holds what the pipe has no room for.
    let child = start();
    let mut reader = File::open(&pipe).expect("the pipe");
    let is_there = || lab.run(Ns::Collector, &["ss", "-Hwln"]).stdout.len() > 10;
    assert!(poll(PATIENCE, || is_there().then_some(())).is_some());
    send(&lab, 0, &some_frames(3000));
    lab.wait_until_received();
    signal(child.id(), "TERM");
    let said = Said::of(child);
    assert_eq!(said.status.code(), Some(143), "{said:?}");
    let file = lab.fresh_path("taken.pcapng");
    io::copy(&mut reader, &mut File::create(&file).expect("a file")).expect("what the pipe held");
    let left = format!("{} frames were not written", 3000 - whole(&file));
    let line = format!("snifctl: the reader of -w {} takes no more: {left}\n", pipe.display());
    assert!(said.stderr.ends_with(&line) && said.stdout.contains(" 3000 "), "{line}{said:#?}");
}

/// Packet blocks that a file has up to their ends.
fn whole(file: &Path) -> usize {
    let bytes = fs::read(file).expect("a file");
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"));
    let (mut at, mut count) = (0, 0);
    while at + 8 <= bytes.len() {
        let end = at + word(at + 4) as usize;
        count += usize::from(word(at) == 6 && end <= bytes.len());
        at = end;
    }
    count
}

#[test]
fn a_reader_that_is_slow_gets_all_that_has_come_before_a_signal() {
    let lab = lab();
    let (err, file) = (lab.fresh_path("err"), lab.fresh_path("slow.pcapng"));
    let mut command = lab.command(Ns::Collector, &[env!("CARGO_BIN_EXE_snifctl"), "collect", "--tunnel", "gre"]);
    command.args(["-w", "-"]).stdout(Stdio::piped()).stderr(File::create(&err).expect("a file"));
    let mut child = command.spawn().expect("start snifctl collect");
    let said = || fs::read_to_string(&err).unwrap_or_default();
    assert!(poll(PATIENCE, || said().contains("receiving").then_some(())).is_some(), "{}", said());
    let sent: Vec<Vec<u8>> = (0..500).map(|n| frames::ipv4_udp(&Ends::HOST_TO_PEER, n, 958)).collect();
    send(&lab, 0, &sent);
    lab.wait_until_received();
    signal(child.id(), "TERM");
    let (mut out, mut to) = (child.stdout.take().expect("a pipe"), File::create(&file).expect("a file"));
    // It takes a piece now and then, and later what is left.
    for _ in 0..7 {
        let none: Option<()> = poll(Duration::from_millis(300), || None);
        assert_eq!(none, None);
        io::copy(&mut out.by_ref().take(16 << 10), &mut to).expect("a piece");
    }
    io::copy(&mut out, &mut to).expect("what is left");
    let status = child.wait().expect("its end");
    assert!(status.success(), "{status:?}: {}", said());
    assert_in_order(&sent, &frames_in(&lab, &file, "frame"));
}

#[test]
fn a_named_pipe_goes_on_after_a_signal_that_begins_another_file() {
    let lab = lab();
    let (pipe, file) = (lab.fresh_path("pipe"), lab.fresh_path("read.pcapng"));
    lab.run(Ns::Collector, &["mkfifo", text(&pipe)]);
    let script = "cat \"$1\" >\"$2\" & shift 2; exec \"$@\"";
    let by = ["sh", "-c", script, "sh", text(&pipe), text(&file)];
    let collector = Collector::start_by(&lab, &by, &["--tunnel", "gre", "-w", text(&pipe)]);
    signal(collector.id(), "HUP");
    let sent = some_frames(2);
    for n in 0..2 {
        send(&lab, n, &sent[n as usize..][..1]);
        assert!(poll(PATIENCE, || (count(&file) > n as usize).then_some(())).is_some(), "{}", collector.said());
    }
    let said = collector.stop_after(&file, 2).ok();
    assert_eq!(said.stderr, "snifctl: receiving\n");
    assert_in_order(&sent, &frames_in(&lab, &file, "frame"));
}

#[test]
fn the_summary_as_json_is_json_each_time() {
    let lab = lab();
    let collector = Collector::start(&lab, &["--stats", "1", "--json"]);
    send(&lab, 0, &some_frames(3));
    let out = collector.out().to_owned();
    let documents = || -> Vec<Value> {
        let text = fs::read_to_string(&out).expect("what it says");
        Deserializer::from_str(&text).into_iter().filter_map(Result::ok).collect()
    };
    let told = poll(PATIENCE, || (documents().last()?["received"] == 3).then_some(()));
    assert!(told.is_some(), "{:?}", documents());
    signal(collector.id(), "TERM");
    let said = collector.ended().ok();
    let all: Result<Vec<Value>, _> = Deserializer::from_str(&said.stdout).into_iter().collect();
    let all = all.unwrap_or_else(|err| panic!("{err}: {}", said.stdout));
    assert!(all.len() >= 2 && all[all.len() - 1]["received"] == 3, "{all:?}");
}

// ---- devices ----

#[test]
fn a_tap_device_that_is_deleted_ends_it() {
    let lab = lab();
    let collector = Collector::start(&lab, &["--to", "tap7"]);
    send(&lab, 0, &some_frames(1));
    lab.ip_batch(Ns::Collector, "link delete tap7");
    send(&lab, 1, &some_frames(1));
    let said = collector.ended();
    assert_eq!(said.status.code(), Some(1), "{said:#?}");
    assert!(said.stderr.ends_with("--to tap7 was deleted; start it again, and it is made anew\n"), "{said:#?}");
}

/// What the collector's kernel knows of addresses, routes and neighbours.
fn tables(lab: &Lab) -> String {
    let ask = |words: &str| {
        let argv: Vec<&str> = ["ip"].into_iter().chain(words.split(' ')).collect();
        String::from_utf8(lab.collector(&argv).stdout).expect("text")
    };
    let told = ["-o address", "route show table all", "-6 route show table all", "neigh"].map(ask).concat();
    told.lines().map(|line| line.split(" expires").next().unwrap_or_default().to_string() + "\n").collect()
}

#[test]
fn a_tap_device_of_ours_is_quiet_and_no_frame_on_it_is_for_the_collector() {
    let lab = lab();
    // As a machine has it by default.
    let defaults = "cd /proc/sys/net/ipv6/conf/default; echo 1 >accept_ra; echo 3 >router_solicitations";
    lab.run(Ns::Collector, &["sh", "-euc", defaults]);
    let before = tables(&lab);
    let collector = Collector::start(&lab, &["--to", "tap7"]);
    let mut tap = lab.capture(Ns::Collector, "tap7", Direction::In);
    let (router, prefix) = ("fe80::1".parse().expect("an address"), "2001:db8:77::".parse().expect("a prefix"));
    let sent = [
        frames::router_advertisement(&Ends::PEER_TO_HOST, router, prefix),
        frames::neighbour_solicitation(&Ends::PEER_TO_HOST, router, COLLECTOR_IP6),
        frames::arp(&Ends { src4: OUT_IP, dst4: COLLECTOR_IP, ..Ends::PEER_TO_HOST }),
    ];
    send(&lab, 0, &sent);
    assert_in_order(&sent, &tap.take(sent.len()));
    assert_eq!(tables(&lab), before);
    // What it has sent since it is up, though nobody reads that.
    let queue = String::from_utf8(lab.collector(&["tc", "-s", "qdisc", "show", "dev", "tap7"]).stdout).expect("text");
    assert!(queue.contains(" Sent 0 bytes 0 pkt "), "{queue}");
    signal(collector.id(), "TERM");
    collector.ended().ok();
}

#[test]
fn a_tap_device_that_is_there_is_used_as_it_is_and_stays() {
    let lab = lab();
    lab.ip_batch(Ns::Collector, "tuntap add dev tap7 mode tap\nlink set dev tap7 addrgenmode none");
    let settings =
        || lab.collector(&["sh", "-c", "ip -d link show tap7; cat /proc/sys/net/ipv6/conf/tap7/disable_ipv6"]).stdout;
    let before = settings();
    let sent = some_frames(5);
    let collector = Collector::start(&lab, &["--to", "tap7", "--json", "--count", "5"]);
    send(&lab, 0, &sent);
    let said = collector.ended().ok().json();
    assert_eq!((&said["sent"], &said["refused"]), (&0.into(), &5.into()), "it is down: {said:#}");
    assert_eq!(settings(), before);

    lab.ip_batch(Ns::Collector, "link set dev tap7 up");
    let mut tap = lab.capture(Ns::Collector, "tap7", Direction::In);
    let collector = Collector::start(&lab, &["--to", "tap7", "--json", "--count", "5"]);
    send(&lab, 0, &sent);
    let said = collector.ended().ok().json();
    assert_in_order(&sent, &tap.take(sent.len()));
    assert_eq!((&said["sent"], &said["refused"]), (&5.into(), &0.into()), "{said:#}");
    lab.collector(&["ip", "link", "show", "dev", "tap7"]);
}

#[test]
fn what_is_no_tap_device_is_refused() {
    let lab = lab();
    for name in ["", ".", "a b", "tap%d", "eth/0", "a:b", "averyveryverylong"] {
        assert_refused(&lab, &["--to", name], 2, &format!("--to {name:?} is no name of an interface"), "--to tap7");
    }
    lab.ip_batch(Ns::Collector, "tuntap add dev tun3 mode tun\ntuntap add dev tap3 mode tap multi_queue");
    for name in ["col0", "tun3", "tap3"] {
        assert_refused(&lab, &["--to", name], 1, "is an interface, and no tap device of one queue", "--to tap7");
    }
    lab.ip_batch(Ns::Collector, "tuntap add dev tap4 mode tap");
    let _first = Collector::start(&lab, &["--tunnel", "gre", "--to", "tap4"]);
    let busy = "--to tap4 cannot be had: Device or resource busy";
    assert_refused(&lab, &["--tunnel", "gre", "--to", "tap4"], 1, busy, "a device that nobody else has open");
}

#[test]
fn what_is_empty_or_negative_is_named() {
    let lab = lab();
    for (args, names, ends) in [
        (["-w", ""], "-w is empty", "-w day.pcapng"),
        (["--filter", ""], "--filter is empty", "--filter 'tcp port 443'"),
        (["--dedup", "-1"], "--dedup \"-1\" is not a number from 1 to 60000", "--dedup 50"),
        (["--stats", "-1"], "--stats \"-1\" is not a number from 1 to 86400", "--stats 10"),
        (["-C", "-1"], "-C \"-1\" is not a number", "-C 100"),
    ] {
        assert_refused(&lab, &[&["--to", "tap7"], &args[..]].concat(), 2, names, ends);
    }
    let nowhere = ["-w", "/nonexistent/x"];
    assert_refused(&lab, &nowhere, 1, "cannot write -w /nonexistent/x: No such file", "as in: -w /tmp/all.pcapng");
}

// ---- addresses and senders ----

#[test]
fn an_address_that_is_said_twice_gets_each_packet_once() {
    let lab = lab();
    let [v4, v6] = [COLLECTOR_IP.to_string(), COLLECTOR_IP6.to_string()];
    let mapped = format!("::ffff:{v4}");
    let listen: Vec<&str> = [&v4, &v6, &v4, &mapped, "::"].iter().flat_map(|one| ["--listen", *one]).collect();
    let file = lab.fresh_path("once.pcapng");
    let collector = Collector::start(&lab, &[&["-w", text(&file)], &listen[..]].concat());
    let sent = some_frames(7);
    send(&lab, 0, &sent);
    collector.stop_after(&file, sent.len()).ok();
    assert_in_order(&sent, &frames_in(&lab, &file, "frame"));
    let near = "--listen fe80::1 is an address of one link alone";
    assert_refused(&lab, &["--stats", "1", "--listen", "fe80::1"], 2, near, "or --listen ::");
}

/// Down, it holds no socket.
#[test]
fn a_device_that_is_down_is_not_blamed_for_a_port_that_another_program_has() {
    let lab = lab();
    lab.ip_batch(Ns::Collector, "link add vx0 type vxlan id 42 dstport 4789");
    let _first = Collector::start(&lab, &["--tunnel", "vxlan", "--stats", "1000"]);
    let (names, ends) = ("UDP port 4789 belongs to another program", "see: ss -lunp sport = :4789");
    assert_refused(&lab, &["--tunnel", "vxlan", "--stats", "1"], 1, names, ends);
}

#[test]
fn who_is_not_root_is_told_what_would_work() {
    let (lab, copy) = (lab(), PublicCopy::new());
    let listen = OUT_IP.to_string();
    let call = ["collect", "--stats", "1", "--tunnel", "vxlan", "--listen", &listen];
    for (more, names, ends) in [
        (["-Z", "root"], "-Z root needs root (EPERM", "leave it out, or try: sudo snifctl collect -Z root"),
        (["--port", "80"], "--port 80 needs root or CAP_NET_BIND_SERVICE", "or another port: --port 8472"),
    ] {
        copy.said(&lab, &[&call[..], &more].concat()).refused(1, names, ends);
    }
}

/// Who sends from ever new addresses takes no more memory than this.
#[test]
fn more_senders_than_are_told_apart_are_counted_and_take_little_memory() {
    const MOST: u32 = 16_384;
    const MORE: u32 = 101;
    let lab = lab();
    let file = lab.fresh_path("many.pcapng");
    let collector = Collector::start(&lab, &["-w", text(&file), "--json"]);
    let from = |n: u32| IpAddr::from(Ipv4Addr::from(0x0a00_0000 + n));
    let frame = frames::ipv4_udp(&Ends::HOST_TO_PEER, 1, 30);
    let copies: Vec<Vec<u8>> = (0..MOST + MORE).map(|n| numbered(from(n), 0, &frame)).collect();
    lab.send(Ns::Host, "out0", &copies);
    let id = collector.id();
    assert!(poll(PATIENCE, || (count(&file) >= MOST as usize).then_some(())).is_some(), "{}", count(&file));
    let status = fs::read_to_string(format!("/proc/{id}/status")).expect("a process");
    let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
    let most: u64 = most.expect("its memory").parse().expect("a number");
    assert!(most < 100_000, "{most} kB");
    let report = collector.stop_after(&file, MOST as usize).ok().json();
    assert_eq!(report["streams"].as_array().map(Vec::len), Some(MOST as usize));
    assert_eq!((&report["received"], &report["unkept"]), (&MOST.into(), &MORE.into()));
}
