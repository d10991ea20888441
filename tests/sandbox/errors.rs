//! What snifctl refuses, how it says so, and that nothing stays behind: one test for each error.

use std::fs;
use std::path::{Path, PathBuf};

use crate::lab;
use crate::lab::faults::{BPF_HEADERS, EMPTY_CACHE, Fakes, hide, in_mounts, real};
use crate::lab::frames::{self, Ends};
use crate::lab::judge::UP;
use crate::lab::nobody::PublicCopy;
use crate::lab::{COLLECTOR_IP, Lab, Ns};

/// Panics unless snifctl refuses with this exit code and one line, and leaves the machine as it was.
#[track_caller]
fn refused<S: AsRef<str>>(lab: &Lab, args: &[S], code: i32, names: &str, ends: &str) {
    let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
    let before = lab.machine();
    lab.said(&args).refused(code, names, ends);
    lab.assert_as_before(&before);
}

/// `up` with more or other arguments.
fn up_with(more: &[&'static str]) -> Vec<&'static str> {
    [&UP[..], more].concat()
}

fn up_to(remote: &str) -> [&str; 6] {
    ["up", "eth0", "--tunnel", "gre", "--remote", remote]
}

fn up_on<'a>(interfaces: &[&'a str]) -> Vec<&'a str> {
    [&["up", "--tunnel", "gre", "--remote", "198.51.100.2", "--"], interfaces].concat()
}

// ---- interfaces ----

#[test]
fn an_unknown_interface_is_refused() {
    let lab = Lab::roomy();
    refused(&lab, &up_on(&["nosuch0"]), 1, "IFACE nosuch0", ": ip link");
    refused(&lab, &up_on(&["eth0", "nosuch0"]), 1, "IFACE nosuch0", ": ip link");
}

#[test]
fn an_interface_named_twice_is_refused() {
    let lab = Lab::roomy();
    refused(&lab, &up_on(&["eth0", "out0", "eth0"]), 2, "IFACE eth0", "name each interface once");
}

#[test]
fn an_interface_named_twice_by_another_name_is_refused() {
    let lab = Lab::roomy();
    lab.host(&["ip", "link", "property", "add", "dev", "eth0", "altname", "uplink"]);
    refused(&lab, &up_on(&["eth0", "uplink"]), 1, "IFACE eth0", "name each interface once");
}

#[test]
fn an_interface_without_an_ethernet_header_is_refused() {
    let lab = Lab::roomy();
    lab.host(&["ip", "tuntap", "add", "dev", "tun0", "mode", "tun"]);
    refused(&lab, &up_on(&["tun0"]), 1, "IFACE tun0 has no Ethernet header", ": ip link");
}

#[test]
fn the_relay_itself_is_refused() {
    let lab = Lab::roomy();
    let before = lab.machine();
    lab.said(&UP).quietly_ok();
    let up = lab.machine();
    for relay in ["snif0", "snif0l", "snif0p"] {
        let args = [&up_on(&[relay])[..1], &["--name", "other"], &up_on(&[relay])[1..]].concat();
        lab.said(&args).refused(1, &format!("IFACE {relay} is a relay"), ": ip link");
        assert_eq!(lab.machine(), up);
    }
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

#[test]
fn an_interface_that_is_down_is_watched_with_a_warning() {
    let lab = Lab::roomy();
    lab.host(&["ip", "link", "set", "dev", "eth0", "down"]);
    let before = lab.machine();
    lab.said(&UP).ok_noting("eth0 is down");
    lab.assert_up(&["default"]);
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

#[test]
fn an_out_interface_that_is_down_has_no_route() {
    let lab = Lab::roomy();
    lab.host(&["ip", "link", "set", "dev", "out0", "down"]);
    assert_unresolved(&lab, "198.51.100.2");
}

#[test]
fn a_name_that_is_no_interface_name_is_refused() {
    let lab = Lab::roomy();
    for name in ["", "a b", "a\tb", "a\nb", "a\u{1b}b", "../eth0", "sixteen-letters-", "日本語日本語"] {
        refused(&lab, &up_on(&[name]), 2, &format!("IFACE {name:?}"), ": ip link");
    }
}

/// Watches an interface of this name, with the remote behind another one of an odd name, and sees copies.
fn assert_watchable(watched: &str, out: &str) {
    let lab = Lab::roomy();
    for (old, new) in [("eth0", watched), ("out0", out)] {
        lab.host(&["ip", "link", "set", "dev", old, "name", new]);
    }
    let before = lab.machine();
    lab.said(&up_on(&[watched])).quietly_ok();
    assert_eq!(lab.status()["sessions"][0]["taps"][0]["interface"], watched);
    assert_eq!(lab.status()["sessions"][0]["remotes"][0]["interface"], out);
    let mut copies = lab.capture(Ns::Collector, "col0", lab::capture::Direction::In);
    lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, 7));
    copies.take(7);
    let doctor = lab.said(&["doctor", "--remote", "198.51.100.2", "--", watched]);
    assert!(doctor.status.success(), "{doctor:#?}");
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

#[test]
fn an_interface_name_is_never_read_as_an_option() {
    assert_watchable("-x0", "--help");
}

#[test]
fn an_interface_name_is_never_read_as_a_command_or_keyword() {
    assert_watchable("e;$(id)&*|", "dev");
}

#[test]
fn an_interface_name_is_never_read_as_a_keyword_of_tc() {
    assert_watchable("ingress", "egress");
}

// ---- remotes ----

#[test]
fn a_remote_that_is_no_address_is_refused() {
    let lab = Lab::roomy();
    for remote in ["collector.example", "198.51.100", "198.51.100.2/24", "198.51.100.256", "", "0x7f000001"] {
        refused(&lab, &up_to(remote), 2, &format!("--remote {remote:?}"), "--remote 10.0.0.7");
    }
}

#[test]
fn an_ipv6_remote_that_is_no_host_elsewhere_is_refused() {
    let lab = Lab::roomy();
    refused(&lab, &up_to("fe80::1%out0"), 2, "--remote \"fe80::1%out0\" is a link-local", "2001:db8::7");
}

/// Panics unless a session with this remote alone starts, warns of it, counts its copies as drops, and goes.
#[track_caller]
fn assert_unresolved(lab: &Lab, remote: &str) {
    let before = lab.machine();
    let said = lab.said(&up_to(remote)).ok_noting(&format!("--remote {remote} has no route"));
    assert!(said.stderr.contains("via GATEWAY; until then"), "{said:#?}");
    assert_eq!(said.stdout, format!("default: eth0 -> gre -> {remote} (no route)\n"));
    lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, 7));
    let session = lab.session();
    assert_eq!(session.accounts("unresolved"), (7, 0, 7));
    assert_eq!(session.remotes[0].interface, None, "{session:#}");
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

#[test]
fn a_remote_without_a_route_is_warned_of_and_counted_and_healed_by_sync() {
    let lab = Lab::roomy();
    assert_unresolved(&lab, "203.0.113.9");
    assert_unresolved(&lab, "2001:db8:99::9");
    for kind in ["blackhole", "unreachable", "prohibit"] {
        lab.host(&["ip", "route", "replace", kind, "203.0.113.0/24"]);
        assert_unresolved(&lab, "203.0.113.9");
    }
    lab.said(&up_to("203.0.113.9")).ok_noting("has no route");
    lab.host(&["ip", "route", "replace", "203.0.113.0/24", "via", "198.51.100.2"]);
    let said = lab.said(&["sync"]).quietly_ok();
    assert!(said.stdout.starts_with("default: remote 203.0.113.9: ") && said.stdout.lines().count() == 1, "{said:#?}");
    lab.assert_copied(1);
    assert_eq!(lab.said(&["sync"]).quietly_ok().stdout, "");
}

#[test]
fn a_remote_that_is_this_machine_itself_is_refused() {
    let lab = Lab::roomy();
    // Of a loopback address that is known without a look at the machine.
    for (remote, code) in [("192.0.2.1", 1), ("198.51.100.1", 1), ("127.0.0.1", 2), ("::1", 2)] {
        let names = format!("--remote {remote} is this machine itself");
        refused(&lab, &up_to(remote), code, &names, "");
    }
}

#[test]
fn a_remote_that_is_not_one_machine_is_refused() {
    let lab = Lab::roomy();
    for (remote, kind, code) in [
        ("224.0.0.5", "multicast", 2),
        ("255.255.255.255", "broadcast", 2),
        ("192.0.2.255", "broadcast", 1),
        ("0.0.0.0", "unspecified", 2),
    ] {
        let before = lab.machine();
        let said = lab.said(&up_to(remote));
        assert!(said.stderr.contains(kind), "{said:#?}");
        said.refused(code, &format!("--remote {remote} is "), "--remote 10.0.0.7");
        lab.assert_as_before(&before);
    }
}

#[test]
fn a_remote_behind_a_tunnel_that_may_run_over_the_watched_interface_is_refused() {
    let lab = Lab::roomy();
    lab.host(&["ip", "tuntap", "add", "dev", "tun0", "mode", "tun"]);
    lab.host(&["ip", "link", "set", "dev", "tun0", "up"]);
    lab.host(&["ip", "route", "add", "203.0.113.0/24", "dev", "tun0"]);
    refused(
        &lab,
        &up_to("203.0.113.9"),
        1,
        "--remote 203.0.113.9 is reached through tun0",
        "--underlay 203.0.113.5:51820",
    );
}

#[test]
fn a_neighbour_that_never_answers_is_warned_of_and_counted_and_healed_by_the_same_up() {
    let lab = Lab::roomy();
    lab.host(&["ip", "neigh", "del", "198.51.100.2", "dev", "out0"]);
    let before = lab.machine();
    lab.said(&UP).ok_noting("198.51.100.2 does not answer on out0");
    lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, 11));
    let session = &lab.status()["sessions"][0];
    assert_eq!(session["drops"]["unresolved"], 11, "{session:#}");
    assert_eq!(session["taps"][0]["stat"]["pcnt"], 11, "{session:#}");
    assert_eq!(session["remotes"][0]["stat"]["pcnt"], 0, "{session:#}");
    assert!(session["remotes"][0]["mac"].is_null(), "{session:#}");
    let address = format!("{COLLECTOR_IP}/24");
    lab.collector(&["ip", "address", "add", &address, "dev", "col0"]);
    let said = lab.said(&UP).ok();
    let lines = "snifctl: default: remote 198.51.100.2: next hop unknown → 02:00:00:00:02:02; written\n\
                 snifctl: session default is up with this request, and in order again\n";
    assert_eq!(said.stderr, lines);
    assert_eq!(lab.status()["sessions"][0]["remotes"][0]["mac"], "02:00:00:00:02:02");
    let mut copies = lab.capture(Ns::Collector, "col0", lab::capture::Direction::In);
    lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, 7));
    copies.wait_for(7);
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

// ---- options ----

#[test]
fn a_source_that_is_not_ours_is_refused() {
    let lab = Lab::roomy();
    refused(&lab, &up_with(&["--source", "203.0.113.5"]), 1, "--source 203.0.113.5", "198.51.100.1");
    refused(&lab, &up_with(&["--source", "out0"]), 2, "--source \"out0\"", "--source 10.0.0.7");
    refused(&lab, &up_with(&["--source", "2001:db8:1::1"]), 2, "--source 2001:db8:1::1", ": ip address");
}

#[test]
fn df_with_fragments_is_refused() {
    let args = up_with(&["--df", "--oversize", "fragment"]);
    refused(&Lab::roomy(), &args, 2, "--df", "--df --oversize truncate");
}

#[test]
fn a_bad_session_name_is_refused() {
    let lab = Lab::roomy();
    for name in ["--name=", "--name=A", "--name=a b", "--name=a/b", "--name=..", "--name=-a", "--name=sixteen-letters-"]
    {
        refused(&lab, &up_with(&[name]), 2, "--name ", "--name mirror-1");
        for command in [&["down"][..], &["status"], &["sync"], &["tap", "list"], &["map", "dump"], &["filter", "clear"]]
        {
            refused(&lab, &[command, &[name]].concat(), 2, "--name ", "--name mirror-1");
        }
    }
}

#[test]
fn a_bad_ttl_or_tos_is_refused() {
    let lab = Lab::roomy();
    for (flag, values, ends) in
        [("--ttl", ["0", "256", "-1", "many"], "--ttl 64"), ("--tos", ["-1", "256", "1.5", "low"], "--tos 0x10")]
    {
        for value in values {
            refused(&lab, &[&UP[..], &[&format!("{flag}={value}")]].concat(), 2, flag, ends);
        }
    }
}

/// Values of the same kind are told by the argument that they were typed as, with what it takes.
#[test]
fn what_is_wrong_is_told_by_the_argument_that_was_typed() {
    let lab = Lab::roomy();
    lab.said(&UP).ok();
    for (args, code, names, ends) in [
        (&["remote", "add", "198.51.100.1"][..], 1, "ADDR 198.51.100.1 is this machine itself", "as in: 10.0.0.7"),
        (&["remote", "add", "198.51.100.255"], 1, "ADDR 198.51.100.255 is a broadcast address", "as in: 10.0.0.7"),
        (&["remote", "add", "224.0.0.5"], 2, "ADDR 224.0.0.5 is a multicast address", "as in: 10.0.0.7"),
        (&["filter", "set", ""], 2, "EXPR is empty", ": snifctl filter clear"),
        (&up_with(&["--filter", ""]), 2, "--filter is empty", ": snifctl filter clear"),
        (&up_with(&["--ttl", "256"]), 2, "--ttl \"256\" is not a number from 1 to 255", "--ttl 64"),
        (&up_with(&["--snaplen", "59"]), 2, "--snaplen 59 is out of range; it takes 60 to 15000", "--snaplen 128"),
        (&up_with(&["--port", "0"]), 2, "--port 0 is out of range; it takes 1 to 65535", "--port 4789"),
        (&["--wait", "-1", "status"], 2, "--wait \"-1\" is not a number from 0 to 86400", "--wait 10"),
        (&["source", "/proc/x"], 1, "DIR /proc/x cannot be written", ": snifctl source ./snifctl-c"),
    ] {
        lab.said(args).refused(code, names, ends);
    }
    let said = lab.said(&["remote", "add", "203.0.113.9"]).ok_noting("ADDR 203.0.113.9 has no route");
    assert!(!said.stderr.contains("--remote"), "{said:#?}");
    lab.said(&["sync"]).quietly_ok();
    lab.said(&["down"]).quietly_ok();
}

#[test]
fn an_unknown_choice_is_refused_with_those_that_there_are() {
    let lab = Lab::roomy();
    for (args, there_are) in [
        (["up", "eth0", "--remote", "198.51.100.2", "--tunnel", "carrier-pigeon"], "gre"),
        (["up", "eth0", "--remote", "198.51.100.2", "--direction", "sideways"], "both, ingress, egress"),
        (["up", "eth0", "--remote", "198.51.100.2", "--oversize", "shrink"], "segment, fragment, truncate, drop"),
    ] {
        let said = lab.said(&args);
        assert!(said.stderr.contains(args[4]) && said.stderr.contains(args[5]), "{said:#?}");
        said.refused(2, there_are, "try: snifctl up --help");
    }
}

#[test]
fn a_wrong_command_line_is_refused_with_the_help_that_there_is() {
    let lab = Lab::roomy();
    for (args, names, ends) in [
        (&[][..], "command", "try: snifctl --help"),
        (&["-v"], "command", "try: snifctl --help"),
        (&["map"], "command", "try: snifctl map --help"),
        (&["copy"], "'copy'", "try: snifctl --help"),
        (&["up"], "<IFACE[:DIRECTION]>", "try: snifctl up --help"),
        (&["up", "eth0"], "--remote", "try: snifctl up --help"),
        (&["up", "eth0", "--remote", "198.51.100.2"], "--tunnel", "try: snifctl up --help"),
        (&up_with(&["--frobnicate"]), "--frobnicate", "try: snifctl up --help"),
        (&up_with(&["--dry-run", "--json"]), "--json", "try: snifctl up --help"),
        (&["down", "--all", "--name", "x"], "--all", "try: snifctl down --help"),
        (&["status", "extra"], "'extra'", "try: snifctl status --help"),
        (&["map", "dump", "taps", "drops"], "'drops'", "try: snifctl map dump --help"),
        (&["doctor", "--colour"], "--colour", "try: snifctl doctor --help"),
        (&["-v", "down", "extra"], "'extra'", "try: snifctl down --help"),
    ] {
        lab.said(args).refused(2, names, ends);
    }
    lab.assert_no_pins();
}

#[test]
fn a_session_that_is_not_up_is_named_with_those_that_are() {
    let lab = Lab::roomy();
    refused(&lab, &["status", "--name", "other"], 1, "session other", "--remote ADDR");
    refused(&lab, &["map", "list"], 1, "no session", "--remote ADDR");
    lab.said(&up_with(&["--name", "mirror-1"])).quietly_ok();
    lab.said(&["status", "--name", "other"]).refused(1, "session other", "mirror-1");
    lab.said(&["map", "dump", "--name", "other"]).refused(1, "session other", "--name mirror-1");
}

#[test]
fn a_name_taken_by_another_request_is_refused_with_the_command_that_frees_it() {
    let lab = Lab::roomy();
    let before = lab.machine();
    lab.said(&UP).quietly_ok();
    let up = lab.machine();
    let taken = |args: &[&str], differences: &str| {
        let names = format!(
            "--name default is taken by a session with another request ({differences}); change it by the same command with \
             --replace, use another --name, or first: "
        );
        lab.said(args).refused(1, &names, "first: snifctl down --name default");
    };
    for (other, differences) in [
        (&["--direction", "ingress"][..], "IFACE eth0 → eth0:ingress"),
        (&["--oversize", "drop"], "--oversize segment → drop"),
        (&["--ttl", "63"], "--ttl 64 → 63"),
        (&["--tos", "4"], "--tos 0 → 4"),
        (&["--df"], "--df off → on"),
        (&["--source", "198.51.100.1"], "--source none → 198.51.100.1"),
    ] {
        taken(&up_with(other), differences);
    }
    taken(&up_on(&["eth0", "out0"]), "IFACE eth0 → eth0, out0");
    taken(&up_to("198.51.100.3"), "--remote 198.51.100.2 → 198.51.100.3");
    assert_eq!(lab.machine(), up);
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

// ---- the machine ----

#[test]
fn an_ingress_qdisc_in_the_way_is_refused() {
    let lab = Lab::roomy();
    lab.host(&["tc", "qdisc", "add", "dev", "eth0", "ingress"]);
    refused(&lab, &UP, 1, "IFACE eth0 has an `ingress` qdisc", "tc qdisc del dev eth0 ingress");
    refused(&lab, &up_on(&["out0", "eth0"]), 1, "IFACE eth0", "tc qdisc del dev eth0 ingress");
}

#[test]
fn whoever_is_not_root_is_refused_with_the_sudo_command() {
    let (lab, nobodys) = (Lab::roomy(), PublicCopy::new());
    let before = lab.machine();
    for args in [
        &UP[..],
        &["down"],
        &["down", "--name", "mirror-1"],
        &["down", "--all"],
        &["status"],
        &["status", "--json"],
        &["map", "list"],
        &["map", "dump", "taps"],
    ] {
        let ends = format!("try: sudo snifctl {}", args.join(" "));
        nobodys.said(&lab, args).refused(1, "this needs root", &ends);
    }
    lab.assert_as_before(&before);
}

#[test]
fn whoever_is_not_root_can_see_what_up_would_do() {
    let (lab, nobodys) = (Lab::roomy(), PublicCopy::new());
    let before = lab.machine();
    let said = nobodys.said(&lab, &up_with(&["--dry-run"])).quietly_ok();
    assert!(said.stdout.contains("\ntc filter add dev eth0 ingress "), "{said:#?}");
    lab.assert_as_before(&before);
}

#[test]
fn whoever_is_not_root_learns_it_from_doctor() {
    let (lab, nobodys) = (Lab::roomy(), PublicCopy::new());
    let said = nobodys.said(&lab, &["doctor", "eth0", "--remote", "198.51.100.2"]);
    assert_eq!((said.status.code(), said.stderr.as_str()), (Some(1), ""), "{said:#?}");
    let fails: Vec<&str> = said.stdout.lines().filter(|line| line.starts_with("fail")).collect();
    assert!(fails.len() == 1 && fails[0].contains("privileges"), "{said:#?}");
    assert!(fails[0].contains("try: sudo snifctl doctor"), "{said:#?}");
}

// ---- tools ----

/// Each tool, its package, and whether `down` needs it too.
const PACKAGES: [(&str, &str, bool); 5] = [
    ("clang", "clang", false),
    ("bpftool", "bpftool", true),
    ("tc", "iproute2", true),
    ("ip", "iproute2", true),
    ("ethtool", "ethtool", false),
];

/// What brings a package.
fn install(package: &str) -> String {
    let image = if package == "clang" { ", or the image snifctl:clang" } else { "" };
    format!("try: apt-get install {package}{image}")
}

#[test]
fn a_missing_tool_is_named_with_its_package() {
    let lab = Lab::roomy();
    let before = lab.machine();
    for (tool, package, down_too) in PACKAGES {
        let without = in_mounts(&format!("{EMPTY_CACHE}; {}", hide(&[tool])));
        let (names, ends) = (format!("{tool}: missing: "), install(package));
        lab.said_by(&without, &UP).refused(1, &names, &ends);
        let demo = lab.said_by(&without, &["demo"]);
        assert!(demo.stderr.starts_with(&format!("snifctl: {names}")), "{demo:#?}");
        demo.refused(1, &names, &ends);
        if down_too {
            lab.said_by(&without, &["down"]).refused(1, &names, &ends);
        }
        let doctor = lab.said_by(&without, &["doctor"]);
        assert_eq!(doctor.status.code(), Some(1), "{doctor:#?}");
        let fail = |line: &str| line.starts_with("fail") && line.contains(tool) && line.ends_with(&ends);
        assert!(doctor.stdout.lines().any(fail), "{doctor:#?}");
    }
    lab.assert_as_before(&before);
}

#[test]
fn all_that_is_missing_is_named_in_one_line_with_one_command() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let missing = format!("{EMPTY_CACHE}; {BPF_HEADERS}; {}", hide(&["clang", "bpftool", "tc", "ip", "ethtool"]));
    let said = lab.said_by(&in_mounts(&missing), &UP);
    for name in ["clang", "bpftool", "tc", "ip", "ethtool", "libbpf-dev"] {
        assert!(said.stderr.contains(&format!("{name}: ")), "{name} in {said:#?}");
    }
    let packages = "try: apt-get install clang bpftool iproute2 ethtool libbpf-dev, or the image snifctl:clang";
    said.refused(1, "missing", packages);
    let said = lab.said_by(&in_mounts(&missing), &["down"]);
    said.refused(1, "missing", "try: apt-get install bpftool iproute2");
    lab.assert_as_before(&before);
}

#[test]
fn reading_without_bpftool_names_it() {
    let lab = Lab::roomy();
    let before = lab.machine();
    lab.said(&UP).quietly_ok();
    let without = in_mounts(&hide(&["bpftool"]));
    for args in [&["status"][..], &["map", "list"], &["map", "dump"]] {
        let said = lab.said_by(&without, args);
        assert!(said.stderr.contains("bpftool"), "{said:#?}");
        said.refused(1, "bpftool", "try: apt-get install bpftool");
    }
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

#[test]
fn clang_and_headers_are_not_needed_once_the_program_is_compiled() {
    let lab = Lab::roomy();
    let before = lab.machine();
    lab.said(&UP).quietly_ok();
    lab.said(&["down"]).quietly_ok();
    let without = in_mounts(&format!("{BPF_HEADERS}; {}", hide(&["clang"])));
    lab.said_by(&without, &UP).quietly_ok();
    lab.assert_copied(1);
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

/// Runs `up` with an empty object cache and these fake tools, temporary files in `tmp`.
fn up_with_fakes(lab: &Lab, fakes: &Fakes, tmp: &Path) -> lab::judge::Said {
    let tmp = format!("TMPDIR={}", tmp.display());
    let by = [&in_mounts(EMPTY_CACHE)[..], &fakes.first_in_path(), &[tmp]].concat();
    lab.said_by(&by, &UP)
}

#[test]
fn a_tool_that_is_too_old_is_named_with_its_package() {
    let lab = Lab::roomy();
    let before = lab.machine();
    for (tool, said) in [
        ("clang", "Debian clang version 9.0.1-16"),
        ("bpftool", "bpftool v5.10.0\nfeatures:"),
        ("tc", "tc utility, iproute2-4.20.0"),
        ("ip", "ip utility, iproute2-4.20.0"),
        ("ethtool", "ethtool version 4.19"),
    ] {
        let fakes = lab.fakes();
        fakes.add(tool, &format!("#!/bin/sh\necho '{said}'\n"));
        let package = PACKAGES.iter().find(|(name, ..)| *name == tool).expect("a package").1;
        let ends = install(package);
        up_with_fakes(&lab, &fakes, lab.dir()).refused(1, &format!("{tool}: "), &ends);
    }
    lab.assert_as_before(&before);
}

/// A file that the message names by an absolute path under `tmp`.
fn named_file(message: &str, tmp: &Path) -> PathBuf {
    let tmp = tmp.to_string_lossy();
    let start = message.find(&*tmp).unwrap_or_else(|| panic!("a file under {tmp} in {message:?}"));
    let path = message[start..].split(|c: char| c == ';' || c.is_whitespace()).next();
    PathBuf::from(path.expect("a path"))
}

/// Panics unless the tool's failure is told by its last lines, with all of its log in the only file that is left.
#[track_caller]
fn assert_log_kept(lab: &Lab, tool: &str, script: &str, log: &str) {
    let before = lab.machine();
    let (fakes, tmp) = (lab.fakes(), lab.dir().join("tmp"));
    fs::create_dir(&tmp).expect("a directory for temporary files");
    fakes.add(tool, script);
    let said = up_with_fakes(lab, &fakes, &tmp);
    let kept = named_file(&said.stderr, &tmp);
    let last: Vec<&str> = log.lines().rev().take(2).collect();
    assert!(last.iter().all(|line| said.stderr.contains(line)), "{last:?} in {said:#?}");
    said.refused(1, &format!("{tool} failed"), "try: snifctl doctor");
    assert_eq!(fs::read_to_string(&kept).expect("the log").trim_end(), log.trim_end());
    let left: Vec<PathBuf> = fs::read_dir(&tmp).expect("tmp").map(|entry| entry.expect("an entry").path()).collect();
    assert_eq!(left, [kept], "nothing but the log stays");
    lab.assert_as_before(&before);
}

/// A fake tool that fails with `log` when `case` matches its arguments, and is the real one else.
fn failing(tool: &str, case: &str, log: &Path, code: u8) -> String {
    let real = real(tool);
    format!(
        "#!/bin/sh\ncase \"$*\" in {case}) cat {} >&2; exit {code};; esac\nexec {} \"$@\"\n",
        log.display(),
        real.display()
    )
}

fn long_log(lab: &Lab, line: &str) -> (PathBuf, String) {
    let log: String = (1..=2000).map(|n| format!("{n}: {line}\n")).collect();
    let path = lab.dir().join("log");
    fs::write(&path, &log).expect("write the log");
    (path, log)
}

#[test]
fn a_failure_of_clang_is_told_by_its_last_lines_with_the_log_kept() {
    let lab = Lab::roomy();
    let (path, log) = long_log(&lab, "error: use of undeclared identifier");
    assert_log_kept(&lab, "clang", &failing("clang", "*-target*", &path, 1), &log);
}

#[test]
fn a_failure_of_the_verifier_is_told_by_its_last_lines_with_the_log_kept() {
    let lab = Lab::roomy();
    let (path, log) = long_log(&lab, "R1 type=scalar expected=ctx, it is always invalid");
    assert_log_kept(&lab, "bpftool", &failing("bpftool", "'prog loadall'*", &path, 255), &log);
}

#[test]
fn a_failure_without_a_word_is_told_too() {
    let lab = Lab::roomy();
    let before = lab.machine();
    for (tool, case) in [("ip", "'-batch -'"), ("ethtool", "-K*"), ("tc", "'-batch -'")] {
        let fakes = lab.fakes();
        fakes.add(tool, &failing(tool, case, Path::new("/dev/null"), 3));
        let said = lab.said_by(&fakes.first_in_path(), &UP);
        assert!(said.stderr.contains(tool), "{said:#?}");
        said.refused(1, "exit", "it gave no reason");
        lab.assert_as_before(&before);
    }
}

#[test]
fn a_tool_that_answers_in_another_form_is_told_without_a_panic() {
    let lab = Lab::roomy();
    let before = lab.machine();
    for (tool, case) in [
        ("ip", "'-j'*link*"),
        ("ip", "'-j -force -batch -'"),
        ("ip", "'-j'*neigh*"),
        ("tc", "'-j'*"),
        ("ethtool", "--json*"),
    ] {
        let said = lab.said_by(&nonsense(&lab, tool, case).first_in_path(), &UP);
        assert!(!said.status.success(), "what {tool} {case} says is not looked at: {said:#?}");
        said.refused(1, "JSON", "");
        lab.assert_as_before(&before);
    }
    // `up` asks bpftool last: then the session is up.
    let fakes = nonsense(&lab, "bpftool", "'-j'*");
    let said = lab.said_by(&fakes.first_in_path(), &up_with(&["--json"]));
    assert!(said.status.success() && said.stderr.contains("its status could not be read"), "{said:#?}");
    lab.said_by(&fakes.first_in_path(), &["status"]).refused(1, "JSON", "");
    lab.assert_copied(1);
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

/// A tool that answers such calls in another form.
fn nonsense(lab: &Lab, tool: &str, case: &str) -> Fakes {
    let fakes = lab.fakes();
    let answer = format!("case \"$*\" in {case}) echo nonsense; exit 0;; esac");
    fakes.add(tool, &format!("#!/bin/sh\n{answer}\nexec {} \"$@\"\n", real(tool).display()));
    fakes
}

// ---- state that was half removed by hand ----

/// Makes a session, breaks it, and panics unless `status` copes, `up` heals it, and `down` leaves nothing of it, healed or
/// not.
#[track_caller]
fn assert_heals(damage: &str) {
    let lab = Lab::roomy();
    let before = lab.machine();
    for heal in [false, true] {
        lab.said(&UP).quietly_ok();
        let ids = lab.program_ids();
        let script = format!("session={}/default\n{damage}", lab.pins().display());
        lab.host(&["sh", "-euc", &script]);
        assert_status_copes(&lab);
        if heal {
            lab.said(&UP).ok();
            lab.assert_up(&["default"]);
            lab.assert_copied(1);
        }
        lab.said(&["down"]).ok();
        lab.assert_as_before(&before);
        lab.assert_unloaded(&ids);
    }
}

/// Whatever is left of a session, `status` shows it or says in one line that it is broken.
#[track_caller]
fn assert_status_copes(lab: &Lab) {
    for args in [&["status"][..], &["status", "--json"]] {
        let said = lab.said(args);
        let lines = if said.status.success() { 0 } else { 1 };
        assert_eq!(said.stderr.lines().count(), lines, "{said:#?}");
        assert!(matches!(said.status.code(), Some(0 | 1)), "{said:#?}");
    }
}

#[test]
fn a_broken_session_is_told_with_the_command_that_cleans_up() {
    let lab = Lab::roomy();
    for damage in
        ["rm $1/maps/taps", "rm $1/snif_encap", "bpftool map delete pinned $1/maps/request key hex 00 00 00 00"]
    {
        lab.said(&UP).quietly_ok();
        let session = lab.pins().join("default");
        lab.host(&["sh", "-euc", damage, "sh", &session.to_string_lossy()]);
        let shown = lab.said(&["status"]).quietly_ok().stdout;
        assert!(shown.contains("\n  fault: "), "{damage}: {shown}");
        let fix = shown.lines().find_map(|line| line.strip_prefix("  put it right with: ")).expect("a fix");
        let words: Vec<&str> = fix.split(' ').skip(1).collect();
        lab.said(&words).ok();
        if words[0] == "sync" {
            assert_eq!(lab.session().faults, [""; 0], "{damage}");
            lab.assert_copied(1);
            lab.said(&["down"]).quietly_ok();
        }
        lab.assert_no_pins();
    }
}

#[test]
fn a_session_without_its_taps_map_heals() {
    assert_heals("rm $session/maps/taps");
}

#[test]
fn a_session_without_its_request_heals() {
    assert_heals("rm $session/maps/request");
}

#[test]
fn a_session_without_its_maps_heals() {
    assert_heals("rm -r $session/maps");
}

#[test]
fn a_session_without_a_program_heals() {
    assert_heals("rm $session/snif_wire");
}

#[test]
fn a_session_without_any_pin_heals() {
    assert_heals("rm -r $session");
}

#[test]
fn a_session_with_an_empty_directory_heals() {
    assert_heals("rm -r $session/*");
}

#[test]
fn a_session_without_a_remote_heals() {
    assert_heals("bpftool map delete pinned $session/maps/remotes key hex 00 00 00 00");
}

#[test]
fn a_session_whose_request_was_emptied_heals() {
    assert_heals("bpftool map delete pinned $session/maps/request key hex 00 00 00 00");
}

#[test]
fn a_session_without_its_ingress_filter_heals() {
    assert_heals("tc filter del dev eth0 ingress");
}

#[test]
fn a_session_without_the_qdisc_of_its_taps_heals() {
    assert_heals("tc qdisc del dev eth0 clsact");
}

#[test]
fn a_session_without_its_relay_heals() {
    assert_heals("ip link del dev snif0");
}

#[test]
fn a_session_whose_relay_was_renamed_heals() {
    assert_heals("ip link set dev snif0 name mine0");
}

#[test]
fn a_session_whose_relay_is_down_heals() {
    assert_heals("ip link set dev snif0p down");
}

#[test]
fn a_session_whose_relay_has_lost_a_filter_heals() {
    assert_heals("tc filter del dev snif0p egress");
}

#[test]
fn a_session_without_pins_and_relay_heals() {
    assert_heals("rm -r $session; ip link del dev snif0");
}

#[test]
fn a_session_without_all_state_heals() {
    let lab = Lab::roomy();
    let before = lab.machine();
    for heal in [false, true] {
        lab.said(&UP).quietly_ok();
        fs::remove_dir_all(lab.pins()).expect("remove the pins");
        assert_status_copes(&lab);
        if heal {
            lab.said(&UP).ok();
            lab.assert_up(&["default"]);
            lab.assert_copied(1);
        }
        lab.said(&["down"]).ok();
        lab.assert_as_before(&before);
    }
}
