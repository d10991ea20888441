//! `snifctl watch`: a mirror stays right while the machine changes, and whoever runs the watch is told.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use crate::lab;
use crate::lab::judge::UP;
use crate::lab::links::add_link;
use crate::lab::remotes::{answering, assert_replicated, listed, remotes};
use crate::lab::watcher::{SOON, Watcher};
use crate::lab::{Lab, Ns, PATIENCE, poll};

/// What happens, as a shell command; what the watch says then; and copies of each frame that the collector gets.
const EVENTS: [(&str, &str, usize); 19] = [
    ("tc filter del dev eth0 ingress", "tap eth0 ingress: its filter is gone; attached", 1),
    ("tc qdisc del dev eth0 clsact", "tap eth0 egress:", 1),
    ("tc filter add dev eth0 ingress pref 1 protocol all bpf bytecode '1,6 0 0 4294967295'", "tap eth0 ingress:", 1),
    ("ip link del $(ip -br link | grep -o '^snif[0-9]*\\b' | head -n 1)", "relay:", 1),
    ("ip link set dev out0 mtu 1550", "MTU 1600 → 1550", 1),
    ("ip link set dev out0 mtu 1600", "MTU 1550 → 1600", 1),
    ("ip route add 198.51.100.2/32 via 198.51.100.9 dev out0", "remote 198.51.100.2:", 1),
    ("ip neigh replace 198.51.100.9 lladdr 02:00:00:00:02:77 nud permanent dev out0", "02:00:00:00:02:77", 1),
    ("ip route del 198.51.100.2/32", "remote 198.51.100.2:", 1),
    (
        "ip addr add 198.51.100.44/24 dev out0 && ip route change 198.51.100.0/24 dev out0 src 198.51.100.44",
        "198.51.100.44",
        1,
    ),
    ("ip rule add to 198.51.100.2 lookup 77 pref 77 && ip route add unreachable default table 77", "has no route", 0),
    ("ip rule del pref 77", "over: remote 198.51.100.2", 1),
    ("ip link set dev out0 down", "remote 198.51.100.2", 0),
    (
        "ip link set dev out0 up && ip neigh replace 198.51.100.2 lladdr 02:00:00:00:02:02 nud permanent dev out0",
        "remote 198.51.100.2: it can be reached",
        1,
    ),
    ("ip link del eth1", "eth1: it is gone", 1),
    (
        "ip link add eth1 type veth peer name peer1 && for dev in eth1 peer1; do ip link set dev $dev addrgenmode none; ip link set dev $dev up; done",
        "tap eth1",
        1,
    ),
    ("ip link set dev eth1 down; ip link set dev eth1 name eth9", "eth9", 1),
    ("rm PINS/default/snif_tap_in", "snif_tap_in", 1),
    ("bpftool map delete pinned PINS/default/maps/remotes key 0 0 0 0", "remote 198.51.100.2", 1),
];

#[test]
fn whatever_happens_is_put_right_and_told() {
    let lab = Lab::roomy();
    add_link(&lab, 1);
    lab.ip_batch(Ns::Host, "neigh replace 198.51.100.9 lladdr 02:00:00:00:02:76 nud permanent dev out0");
    lab.said(&["up", "eth0", "eth1", "--tunnel", "gre", "--remote", "198.51.100.2"]).quietly_ok();
    let watch = Watcher::start(&lab, &["--interval", "1"]);
    let pins = lab.pins().to_string_lossy().into_owned();
    for (event, says, copies) in EVENTS {
        let before = watch.log().lines().count();
        lab.host(&["sh", "-euc", &event.replace("PINS", &pins)]);
        eprintln!("{event}"); // shown where it fails
        watch.wait_said(before, says);
        // What cannot be put right from here is all that is left.
        let left =
            if event.contains("del eth1") { "default: eth1: it is gone" } else { "default: remote 198.51.100.2: " };
        let may_be_left = copies == 0 || event.contains("del eth1");
        let is_right = poll(SOON, || {
            let check = lab.said(&["status", "--check"]);
            let is_told = !check.stdout.is_empty() && check.stdout.lines().all(|line| line.starts_with(left));
            (if may_be_left { is_told } else { check.status.success() }).then_some(())
        });
        assert!(is_right.is_some(), "{event}: {:#?}\n{}", lab.said(&["status", "--check"]), watch.log());
        if copies > 0 {
            lab.assert_copied(copies);
        }
    }
    let (status, log) = watch.end("TERM");
    assert!(status.success(), "{status:?}\n{log}");
    assert!(log.lines().all(|line| line.starts_with("snifctl: ")), "{log}");
    lab.assert_copied(1);
    lab.said(&["down"]).ok();
    lab.assert_no_pins();
}

#[test]
fn a_flap_costs_a_look_a_second_and_silence_costs_none() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    let mut watch = Watcher::start(&lab, &["--interval", "600"]);
    watch.wait_until_calm();
    let (before, start) = (watch.looks(), Instant::now());
    let flap = "i=0; while [ $i -lt 60 ]; do i=$((i + 1)); ip route add 203.0.113.0/24 dev out0; ip route del 203.0.113.0/24; sleep 0.03; done";
    lab.host(&["sh", "-euc", flap]);
    watch.wait_until_calm();
    let most = start.elapsed().as_secs() as usize + 2;
    assert!((1..=most).contains(&(watch.looks() - before)), "{} looks, {most} at most", watch.looks() - before);
    assert_eq!(watch.log(), "", "there was nothing to do");
}

#[test]
fn a_service_manager_is_told_and_signals_are_followed() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let mut watch = Watcher::start_by(&lab, &["env", "WATCHDOG_USEC=400000"], &["--interval", "1"]);
    watch.wait_told("STATUS=0 sessions, in order");
    lab.said(&UP).quietly_ok();
    watch.wait_told("STATUS=1 session, in order");
    watch.wait_told("WATCHDOG=1");
    watch.signal("HUP");
    watch.wait_told("RELOADING=1");
    watch.wait_told("READY=1");
    assert!(watch.told().iter().any(|line| line.starts_with("MONOTONIC_USEC=")), "{:?}", watch.told());
    let order: Vec<String> = watch.told().iter().filter(|line| !line.starts_with("WATCHDOG")).cloned().collect();
    assert!(order[0].starts_with("STATUS=") && order[1] == "READY=1", "after the first look: {order:?}");

    // The monitors are started again, and what happened meanwhile is seen.
    let children = watch.children();
    assert_eq!(children.len(), 2, "{children:?}");
    let said = watch.log().lines().count();
    children.iter().for_each(|pid| lab::signal(pid, "KILL"));
    lab.host(&["tc", "filter", "del", "dev", "eth0", "ingress"]);
    watch.wait_said(said, "`tc monitor` has ended; started again");
    watch.wait_said(said, "`ip -o monitor link address route neigh rule nexthop` has ended; started again");
    watch.wait_said(said, "its filter is gone; attached");

    // Killed, it takes its monitors with it; ended, it leaves the mirror, or takes it along.
    let children = watch.children();
    let (status, _) = watch.end("KILL");
    assert!(!status.success());
    let gone = || children.iter().all(|pid| !Path::new("/proc").join(pid).exists());
    assert!(poll(PATIENCE, || gone().then_some(())).is_some(), "{children:?} live on");
    let watch = Watcher::start(&lab, &[]);
    let begun = Instant::now();
    assert!(watch.end("INT").0.success());
    assert!(begun.elapsed() < PATIENCE / 2);
    lab.assert_copied(1);
    let mut watch = Watcher::start(&lab, &["--down-on-exit"]);
    watch.looks();
    assert!(watch.end("TERM").0.success());
    lab.assert_no_pins();
    lab.assert_as_before(&before);
}

#[test]
fn what_cannot_be_done_is_said_once_and_when_it_is_over() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    let fakes = lab.fakes();
    let real = lab::faults::real("tc");
    let broken = lab.dir().join("broken");
    let script = "#!/bin/sh\n[ ! -e @BROKEN@ ] || [ \"$1\" = monitor ] || { echo 'Error: no' >&2; exit 2; }\nexec @REAL@ \"$@\"\n";
    fakes.add("tc", &script.replace("@BROKEN@", &broken.to_string_lossy()).replace("@REAL@", &real.to_string_lossy()));
    let by = fakes.first_in_path();
    let by: Vec<&str> = by.iter().map(String::as_str).collect();
    let mut watch = Watcher::start_by(&lab, &by, &["--interval", "1", "--json"]);
    fs::write(&broken, "").expect("break it");
    watch.wait_said(0, "\"event\":\"problem\"");
    let looks = watch.looks();
    assert!(poll(SOON, || (watch.looks() > looks + 1).then_some(())).is_some(), "it goes on");
    fs::remove_file(&broken).expect("mend it");
    lab.host(&["ip", "link", "set", "dev", "out0", "mtu", "1590"]);
    watch.wait_said(0, "\"event\":\"over\"");
    let log = watch.log();
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let of = |event: &str| lines.iter().filter(|line| line["event"] == event).count();
    assert_eq!((of("problem"), of("over")), (1, 1), "{log}");
    assert!(lines.iter().all(|line| line["time"].as_f64() > Some(1e9) && line["message"].is_string()), "{log}");

    drop(watch);
    // The journal gets priorities; a session that is not up is waited for.
    let file = lab.dir().join("journal");
    fs::write(&file, "").expect("a journal");
    let meta = fs::metadata(&file).expect("a journal");
    let line = format!("export JOURNAL_STREAM={}:{}; exec 2>{}; exec \"$@\"", meta.dev(), meta.ino(), file.display());
    let _watch = Watcher::start_by(&lab, &["sh", "-c", &line, "sh"], &["--name", "other", "--name", "default"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "<4>no session other is up; it is waited for\n");
    lab.host(&["tc", "filter", "del", "dev", "eth0", "ingress"]);
    let said = || {
        fs::read_to_string(&file).unwrap().contains("\n<6>default: tap eth0 ingress: its filter is gone; attached\n")
    };
    assert!(poll(SOON, || said().then_some(())).is_some(), "{}", fs::read_to_string(&file).unwrap());
}

#[test]
fn a_remote_that_stops_answering_pings_is_down_until_it_does() {
    let lab = Lab::roomy();
    lab.ip_batch(Ns::Collector, "address add 198.51.100.2/24 dev col0");
    lab.ip_batch(Ns::Collector, "neigh replace 198.51.100.1 lladdr 02:00:00:00:02:01 nud permanent dev col0");
    lab.said(&lab::judge::up_with(&["--probe", "icmp"])).quietly_ok();
    let watch = Watcher::start(&lab, &[]);
    let state = |wanted: &str| {
        poll(PATIENCE * 2, || (lab.session().remotes[0].state == wanted).then_some(()))
            .unwrap_or_else(|| panic!("never {wanted}: {:#}\n{}", lab.session(), watch.log()))
    };
    state("ok");
    lab.collector(&["sysctl", "-qw", "net.ipv4.icmp_echo_ignore_all=1"]);
    state("down");
    lab.collector(&["sysctl", "-qw", "net.ipv4.icmp_echo_ignore_all=0"]);
    state("ok");
    let log = watch.log();
    assert!(log.contains("down") && log.contains("over: "), "{log}");
}

#[test]
fn the_sessions_of_a_directory_are_made_and_made_again() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let dir = lab.dir().join("d");
    fs::create_dir(&dir).expect("a directory");
    let session = |name: &str, more: &str| {
        format!(
            "[[session]]\nname = \"{name}\"\ninterfaces = [\"eth0\"]\ntunnel = \"gre\"\nremote = [\"198.51.100.2\"]\n{more}"
        )
    };
    let write = |name: &str, text: &str| fs::write(dir.join(name), text).expect("write a file");
    let shown = dir.to_string_lossy().into_owned();
    write("a.toml", &session("a", "").replace("gre", "gree"));
    let wrong = lab.said(&["watch", "--apply", &shown]);
    assert_eq!(wrong.status.code(), Some(2), "{wrong:#?}");
    assert!(wrong.stderr.contains("a.toml:4") && wrong.stderr.contains("try: "), "{wrong:#?}");

    write("a.toml", &session("a", ""));
    write("b.toml", &session("b", "filter = \"udp\"\n"));
    let mut watch = Watcher::start(&lab, &["--apply", &shown, "--interval", "1"]);
    lab.assert_up(&["a", "b"]);
    lab.assert_copied(2);
    // What a user changes by hand stays until a reload; a session that is down is made again.
    lab.said(&["filter", "set", "tcp", "--name", "b"]).ok();
    lab.said(&["down", "--name", "a"]).ok();
    let is_up = || lab.status().sessions.iter().any(|session| session.name == "a");
    assert!(poll(SOON, || is_up().then_some(())).is_some(), "{}", watch.log());
    let filter = |lab: &Lab| lab.session_called("b").filter;
    assert_eq!(filter(&lab).as_deref(), Some("tcp"));
    // With a mistake nothing changes; without, the files are in force, and what they no longer have goes.
    let said = watch.log().lines().count();
    write("a.toml", "[[session]]\nname = 5\n");
    watch.signal("HUP");
    watch.wait_said(said, "a.toml:1");
    watch.wait_told("READY=1");
    lab.assert_up(&["a", "b"]);
    assert_eq!(filter(&lab).as_deref(), Some("tcp"));
    fs::remove_file(dir.join("a.toml")).expect("remove a file");
    watch.signal("HUP");
    watch.wait_said(said, "- session a");
    let is_right = || filter(&lab).as_deref() == Some("udp");
    assert!(poll(SOON, || is_right().then_some(())).is_some(), "{}", watch.log());
    lab.assert_up(&["b"]);
    assert!(watch.end("TERM").0.success());
    lab.said(&["down", "--all"]).ok();
    lab.assert_as_before(&before);
}

#[test]
fn a_next_hop_that_goes_and_comes_back_elsewhere_is_followed() {
    let lab = answering(2);
    lab.said(&["up", "eth0", "--tunnel", "gre", "--remote", &listed(&remotes(2))]).ok();
    let watch = Watcher::start(&lab, &[]);
    let state = |wanted: &str| {
        let is_so = || {
            let check = lab.said(&["status", "--check"]);
            (lab.session().remotes[0].state == wanted && (check.status.success() == (wanted == "ok"))).then_some(())
        };
        poll(PATIENCE * 2, is_so).unwrap_or_else(|| panic!("never {wanted}: {:#}\n{}", lab.session(), watch.log()))
    };
    for notify in ["1", "0"] {
        lab.collector(&["sysctl", "-qw", &format!("net.ipv4.conf.m0.arp_notify={notify}")]);
        lab.ip_batch(Ns::Collector, "link set dev m0 down");
        // The kernel would doubt it by itself after half a minute.
        let old = lab.session().remotes[0].mac.clone().expect("a link address");
        lab.ip_batch(Ns::Host, &format!("neigh replace {} lladdr {old} dev out0 nud stale", remotes(1)[0]));
        state("down");
        lab.ip_batch(Ns::Collector, &format!("link set dev m0 address 02:00:00:00:04:a{notify}\nlink set dev m0 up"));
        state("ok");
        assert_eq!(lab.session().remotes[0].mac, Some(format!("02:00:00:00:04:a{notify}")));
        assert_replicated(&lab, &remotes(2));
    }
}

#[test]
fn a_mounted_config_map_is_read_again_and_a_held_watch_makes_nothing() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let (dir, heartbeat) = (lab.dir().join("d"), lab.dir().join("heartbeat"));
    // As kubelet writes it: the files are links into ..data, which is swapped.
    let swap = |at: &str, filter: &str| {
        fs::create_dir_all(dir.join(at)).expect("a directory");
        let text = format!(
            "[[session]]\ninterfaces = \"eth0\"\ntunnel = \"gre\"\nremote = \"198.51.100.2\"\nfilter = \"{filter}\"\n"
        );
        fs::write(dir.join(at).join("a.toml"), text).expect("write a file");
        std::os::unix::fs::symlink(at, dir.join("..new")).expect("a link");
        fs::rename(dir.join("..new"), dir.join("..data")).expect("swap");
    };
    swap("..1", "tcp");
    std::os::unix::fs::symlink("..data/a.toml", dir.join("a.toml")).expect("a link");
    let (shown, file) = (dir.to_string_lossy().into_owned(), heartbeat.to_string_lossy().into_owned());
    let wrong = lab.said(&["watch", "--heartbeat", "/nonexistent/heartbeat"]);
    assert_eq!(wrong.status.code(), Some(2), "{wrong:#?}");
    lab.said(&["watch", "--check", &file]).refused(1, &file, &file);
    let watch = Watcher::start(&lab, &["--apply", &shown, "--interval", "600", "--heartbeat", &file]);
    lab.said(&["watch", "--check", &file]).quietly_ok();
    swap("..2", "udp");
    let is_right = || (lab.session().filter.as_deref() == Some("udp")).then_some(());
    assert!(poll(SOON, is_right).is_some(), "{}", watch.log());

    // What is taken down stays down while the watch rests.
    lab.said(&["watch", "--hold", &file]).quietly_ok();
    lab.said(&["watch", "--check", &file]).quietly_ok();
    lab.said(&["down", "--all"]).ok();
    swap("..3", "icmp");
    let said = watch.log().lines().count();
    lab.host(&["ip", "route", "add", "203.0.113.0/24", "dev", "out0"]);
    lab.host(&["ip", "route", "del", "203.0.113.0/24", "dev", "out0"]);
    let beats = || fs::metadata(&heartbeat).map(|meta| meta.ino()).unwrap_or_default();
    for _ in 0..3 {
        let last = beats();
        assert!(poll(SOON, || (beats() != last).then_some(())).is_some(), "it beats");
    }
    assert_eq!(watch.lines_from(said), [""; 0]);
    lab.assert_no_pins();
    fs::remove_file(format!("{file}.hold")).expect("let it go on");
    watch.wait_said(said, "it goes on");
    let is_up = || lab.status().sessions.iter().any(|session| session.filter.as_deref() == Some("icmp")).then_some(());
    assert!(poll(SOON, is_up).is_some(), "{}", watch.log());
    assert!(watch.end("TERM").0.success());
    lab.said(&["down", "--all"]).ok();
    lab.assert_as_before(&before);
}
