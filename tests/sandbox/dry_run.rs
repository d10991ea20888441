//! What snifctl tells before anything happens: the lines of a dry run, and what doctor finds.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use crate::lab::faults::{EMPTY_CACHE, in_mounts};
use crate::lab::filters::{HELP, assert_counted, filter_of, said, to_ports, up_filtering};
use crate::lab::judge::{UP, up_with};
use crate::lab::remotes::{lab_of, remote, said_up};
use crate::lab::{COLLECTOR_IP6, Lab, Ns};
use serde_json::Value;

const SNIFCTL: &str = env!("CARGO_BIN_EXE_snifctl");

// ---- dry run ----

/// Runs the lines of a dry run as a person would paste them, and sees the session at work.
fn assert_pasteable(lab: &Lab, mounts: &str, more: &[&str]) {
    let before = lab.machine();
    let (plan, bin) = (lab.dir().join("plan"), Path::new(SNIFCTL).parent().unwrap());
    let script = format!(
        "{mounts}; export TMPDIR={tmp} PATH={bin}:$PATH
        snifctl \"$@\" --dry-run >{plan}
        sh -e {plan}",
        tmp = lab.dir().display(),
        bin = bin.display(),
        plan = plan.display()
    );
    let words = ["unshare", "--mount", "sh", "-euc", &script, "sh"];
    lab.host(&[&words[..], &UP, more].concat());
    let text = fs::read_to_string(&plan).unwrap();
    assert!(text.lines().any(|line| line.starts_with("# 02 00 00 00 02 02 02 00 00 00 02 01 08 00 45")), "{text}");
    lab.assert_up(&["default"]);
    lab.assert_copied(1);
    lab.said(&up_with(more)).ok_noting("already up");
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

#[test]
fn the_lines_of_a_dry_run_can_be_pasted() {
    assert_pasteable(&Lab::roomy(), "true", &[]);
}

#[test]
fn the_lines_of_a_dry_run_without_a_compiled_object_can_be_pasted() {
    assert_pasteable(&Lab::roomy(), EMPTY_CACHE, &["--oversize", "fragment", "--ttl", "7"]);
}

#[test]
fn a_dry_run_changes_nothing() {
    let lab = Lab::roomy();
    lab.host(&["ip", "neigh", "del", "198.51.100.2", "dev", "out0"]);
    let before = lab.machine();
    let neighbours = lab.shown(&["ip", "neigh"]);
    let (made, tmp) = (lab.dir().join("made"), lab.dir().join("tmp"));
    fs::create_dir(&tmp).unwrap();
    let (shown, tmp) = (made.display(), tmp.display());
    let script = format!("{EMPTY_CACHE}; export TMPDIR={tmp}; \"$@\"; ls -A /var/cache $TMPDIR >{shown}; exit 0");
    let said = lab.said_by(&in_mounts(&script), &up_with(&["--dry-run"]));
    assert_eq!(fs::read_to_string(&made).unwrap(), format!("{tmp}:\n\n/var/cache:\n"));
    let said = said.ok_noting("198.51.100.2 is not known on out0 yet");
    assert!(said.stdout.starts_with("ip neigh replace 198.51.100.2 dev out0 use\n"), "{said:#?}");
    assert_eq!(lab.shown(&["ip", "neigh"]), neighbours);
    lab.assert_as_before(&before);
}

#[test]
fn a_dry_run_beside_a_session_says_that_it_is_up() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    let up = lab.machine();
    lab.said(&up_with(&["--dry-run"])).ok_noting("already up");
    lab.said(&up_with(&["--dry-run", "--ttl", "7"])).refused(1, "(--ttl 64 → 7)", "snifctl down --name default");
    assert_eq!(lab.machine(), up);
}

#[test]
fn a_dry_run_shows_the_header_to_each_remote_and_changes_nothing() {
    let lab = lab_of(2);
    let before = lab.machine();
    let all: [IpAddr; 3] = [remote(0).into(), COLLECTOR_IP6.into(), remote(1).into()];
    let list = all.map(|address| address.to_string()).join(",");
    let text = said_up(&lab, &list, &["--dry-run"]).quietly_ok().stdout;
    for address in all {
        let at = text.lines().position(|line| line.starts_with(&format!("# the outer header to {address},")));
        let at = at.unwrap_or_else(|| panic!("the header to {address} in:\n{text}"));
        let digits: String =
            text.lines().nth(at + 1).expect("a line").chars().filter(char::is_ascii_hexdigit).collect();
        let octets = match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        let octets: String = octets.iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(digits.contains(&octets), "{octets} in {digits}");
    }
    assert_eq!(text.matches("# the outer header to").count(), 3);
    lab.assert_as_before(&before);
}

/// Pastes what the dry run of each command prints, one line after the other, each into a shell of its own; the command itself
/// must then have nothing to do, and the same `machine` must result from running it.
#[test]
fn the_lines_of_every_verb_can_be_pasted_one_by_one() {
    let lab = lab_of(2);
    lab.ip_batch(Ns::Host, "link add dev new0 type veth peer name new1\nlink set dev new0 up\nlink set dev new1 up");
    let before = lab.machine();
    let other = remote(1).to_string();
    said_up(&lab, &remote(0).to_string(), &[]).quietly_ok();
    for (words, done) in [
        (&["tap", "add", "new0"][..], "new0"),
        (&["tap", "remove", "new0", "--direction", "egress"], "new0"),
        (&["remote", "add", &other], &other),
        (&["filter", "set", "udp port 4001"], "nothing to do"),
        (&["filter", "clear"], "nothing to do"),
        (&["remote", "remove", &other], &other),
        (&["tap", "remove", "new0"], "new0"),
    ] {
        pasted(&lab, words);
        let again = lab.said(words);
        assert!(again.stderr.contains(done) && again.stderr.lines().count() == 1, "{words:?} again: {again:#?}");
        assert_eq!(lab.session().faults, [""; 0], "{words:?}");
        assert_eq!(lab.said(&["sync"]).quietly_ok().stdout, "", "{words:?}");
    }
    lab.host(&["tc", "filter", "del", "dev", "eth0", "ingress"]);
    assert!(!lab.session().faults.is_empty());
    pasted(&lab, &["sync"]);
    assert_eq!(lab.said(&["sync"]).quietly_ok().stdout, "");
    lab.assert_copied(1);
    pasted(&lab, &["down"]);
    assert_eq!(lab.machine(), before);
    // Of the pins nothing but empty directories is left.
    lab.said(&["down"]).ok_noting("not up");
    lab.assert_no_pins();
}

/// Runs each line that the dry run of a command prints. Panics if the dry run itself changes anything.
#[track_caller]
fn pasted(lab: &Lab, words: &[&str]) {
    let before = lab.machine();
    let dry = lab.said(&[words, &["--dry-run"]].concat()).quietly_ok();
    assert_eq!(lab.machine(), before, "the dry run of {words:?} changes something");
    assert!(dry.stdout.lines().any(|line| !line.starts_with('#')), "{words:?} prints nothing");
    for line in dry.stdout.lines().filter(|line| !line.starts_with('#')) {
        lab.host(&["bash", "-c", line]);
    }
}

// ---- with a filter ----

/// Runs the lines of a dry run as a person would paste them, and sees the filter at work.
#[track_caller]
fn assert_filter_pasteable(lab: &Lab, mounts: &str, filter: &str) {
    let before = lab.machine();
    let (plan, bin) = (lab.dir().join("plan"), Path::new(env!("CARGO_BIN_EXE_snifctl")).parent().expect("a directory"));
    let script = format!(
        "{mounts}; export TMPDIR={tmp} PATH={bin}:$PATH
        snifctl \"$@\" --dry-run >{plan}
        sh -e {plan}",
        tmp = lab.dir().display(),
        bin = bin.display(),
        plan = plan.display()
    );
    let words = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", &script, "sh"];
    lab.host(&[&words[..], &UP, &["--filter", filter]].concat());
    lab.assert_up(&["default"]);
    assert_eq!(filter_of(lab), filter);
    lab.assert_copied(1);
    lab.send(Ns::Peer, "peer0", &to_ports(5));
    assert_counted(lab, 12, 7);
    said(lab, &[&UP[..], &["--filter", filter]].concat()).ok_noting("already up");
    said(lab, &["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

#[test]
fn the_lines_of_a_dry_run_with_a_filter_can_be_pasted() {
    assert_filter_pasteable(&Lab::roomy(), EMPTY_CACHE, "udp port 4001 or (tcp and not port 80)");
    assert_filter_pasteable(&Lab::roomy(), EMPTY_CACHE, "udp\n\tport 4001 or ether proto \\arp && not host 10.0.0.1");
}

#[test]
fn the_lines_of_a_dry_run_with_a_compiled_filter_can_be_pasted() {
    let lab = Lab::roomy();
    up_filtering(&lab, "-len > 0 and udp port 4001");
    said(&lab, &["down"]).quietly_ok();
    let cached = format!("mount --bind {} /var/cache", lab.dir().join("cache").display());
    assert_filter_pasteable(&lab, &cached, "-len > 0 and udp port 4001");
    let plan = fs::read_to_string(lab.dir().join("plan")).expect("the plan");
    assert!(!plan.contains("clang"), "{plan}");
}

#[test]
fn a_dry_run_with_a_filter_changes_nothing() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let (made, tmp) = (lab.dir().join("made"), lab.dir().join("tmp"));
    fs::create_dir(&tmp).expect("a directory");
    let (shown, tmp) = (made.display(), tmp.display());
    let script = format!("{EMPTY_CACHE}; export TMPDIR={tmp}; \"$@\"; ls -A /var/cache $TMPDIR >{shown}; exit 0");
    let dry = lab.said_by(&in_mounts(&script), &[&UP[..], &["--filter", "udp", "--dry-run"]].concat()).quietly_ok();
    assert_eq!(fs::read_to_string(&made).expect("what was made"), format!("{tmp}:\n\n/var/cache:\n"));
    let source =
        dry.stdout.lines().find(|line| line.contains("/snifctl source /run/")).expect("a line for the sources");
    assert!(source.starts_with('/') && source.ends_with(" --filter udp"), "{source}");
    lab.assert_as_before(&before);
    lab.said(&[&UP[..], &["--filter", "tcp prot", "--dry-run"]].concat()).refused(2, "--filter \"tcp prot\"", HELP);
    lab.assert_as_before(&before);
}

// ---- doctor ----

#[test]
fn doctor_finds_the_lab_in_order() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let said = lab.said(&["doctor", "eth0", "--remote", "198.51.100.2"]).quietly_ok();
    for word in
        ["clang", "bpftool", "tc", "ip", "ethtool", "kernel", "btf", "bpffs", "privileges", "eth0", "route", "mtu"]
    {
        let found = said.stdout.lines().any(|line| line.split_whitespace().nth(1) == Some(word));
        assert!(found, "{word} in\n{}", said.stdout);
    }
    let report = lab.said(&["doctor", "eth0", "--remote", "198.51.100.2", "--json"]).quietly_ok().json();
    for check in report["checks"].as_array().unwrap() {
        let level = check["level"].as_str().unwrap();
        assert!(["ok", "warn"].contains(&level) && check["name"].is_string(), "{check}");
        assert_eq!((level == "ok", check["detail"].is_string()), (check["fix"].is_null(), true), "{check}");
    }
    lab.assert_as_before(&before);
}

/// Panics unless doctor ends with 1, and one failure that says this.
#[track_caller]
fn assert_doctor_fails(lab: &Lab, args: &[&str], says: &str) {
    let said = lab.said(&[&["doctor", "--json"], args].concat());
    assert_eq!((said.status.code(), said.stderr.as_str()), (Some(1), ""), "{said:#?}");
    let report = said.json();
    let checks = report["checks"].as_array().unwrap();
    let fails: Vec<&Value> = checks.iter().filter(|check| check["level"] == "fail").collect();
    assert_eq!(fails.len(), 1, "{fails:#?}");
    assert!(fails[0]["detail"].as_str().unwrap().contains(says), "{fails:#?}");
    assert!(fails[0]["fix"].is_string(), "{fails:#?}");
}

#[test]
fn doctor_fails_where_up_would() {
    let lab = Lab::roomy();
    lab.host(&["ip", "tuntap", "add", "dev", "tun0", "mode", "tun"]);
    lab.host(&["tc", "qdisc", "add", "dev", "eth0", "ingress"]);
    for (args, says) in [
        (&["nosuch0"][..], "does not exist"),
        (&["tun0"], "no Ethernet header"),
        (&["eth0"], "`ingress` qdisc"),
        (&["--remote", "198.51.100.1"], "this machine itself"),
        (&["--remote", "203.0.113.9"], "cannot be sent"),
        (&["--remote", "224.0.0.5"], "multicast"),
        (&["--remote", "192.0.2.255"], "broadcast"),
    ] {
        assert_doctor_fails(&lab, args, says);
    }
}

#[test]
fn doctor_refuses_what_is_no_address_and_no_interface_name() {
    let lab = Lab::roomy();
    lab.said(&["doctor", "--remote", "collector"]).refused(2, "--remote \"collector\"", "--remote 10.0.0.7");
    lab.said(&["doctor", "a b"]).refused(2, "IFACE \"a b\"", ": ip link");
}

#[test]
fn doctor_knows_an_interface_by_its_other_name() {
    let lab = Lab::roomy();
    lab.host(&["ip", "link", "property", "add", "dev", "eth0", "altname", "uplink"]);
    lab.said(&["doctor", "uplink"]).quietly_ok();
}

#[test]
fn doctor_warns_of_what_up_would_warn_of() {
    let lab = Lab::new();
    lab.host(&["ip", "neigh", "del", "198.51.100.2", "dev", "out0"]);
    lab.host(&["ip", "link", "set", "dev", "eth0", "down"]);
    let said = lab.said(&["doctor", "eth0", "--remote", "198.51.100.2"]).quietly_ok();
    for word in ["eth0", "neighbour", "mtu"] {
        let warned = |line: &str| line.starts_with("warn") && line.split_whitespace().nth(1) == Some(word);
        assert!(said.stdout.lines().any(warned), "{word} in\n{}", said.stdout);
    }
}

#[test]
fn verbose_prints_each_outer_command_on_stderr() {
    let lab = Lab::roomy();
    for (args, part) in [
        (&up_with(&["-v"])[..], "+ bpftool prog loadall "),
        (&["-v", "status", "--json"], "+ bpftool -j batch file - <<'END'"),
        (&["doctor", "-v"], "+ clang --version"),
        (&["down", "-v"], "link delete dev snif0"),
    ] {
        let said = lab.said(args);
        assert!(said.status.success(), "{said:#?}");
        assert!(said.stderr.lines().any(|line| line.starts_with("+ ") && line.contains(part)), "{said:#?}");
        assert!(said.stderr.lines().all(|line| line.starts_with("+ ")), "{said:#?}");
    }
}
