//! Interfaces by pattern, and interfaces that are waited for.

use std::fs;

use crate::lab::judge::Said;
use crate::lab::links::{ETH0, ETH1, add_link, assert_copied_on, tap, watched};
use crate::lab::remotes::remote;
use crate::lab::sessions::{down, lab_of};
use crate::lab::watcher::{SOON, Watcher};
use crate::lab::{Lab, Ns, poll};

/// `up` of these interfaces, and more words.
fn up(lab: &Lab, words: &[&str]) -> Said {
    lab.said(&[&["up", "--tunnel", "gre", "--remote", &remote(0).to_string()], words].concat())
}

/// What is not as it must be.
fn faults(lab: &Lab) -> (Option<i32>, String) {
    let said = lab.said(&["status", "--check"]);
    (said.status.code(), said.stdout)
}

#[track_caller]
fn assert_whole(lab: &Lab) {
    assert_eq!(faults(lab), (Some(0), String::new()));
    lab.session().assert_accounted();
}

/// Frames that all taps have seen, also those that are no more.
fn seen(lab: &Lab) -> u64 {
    let session = lab.session();
    let all = session.taps.iter().map(|tap| tap.counts).chain([session.removed_taps]);
    all.map(|counts| counts.seen).sum()
}

#[track_caller]
fn sync(lab: &Lab, lines: &[&str]) {
    let said = lab.said(&["sync"]).quietly_ok();
    let told: Vec<&str> = said.stdout.lines().map(|line| line.trim_start_matches("default: ")).collect();
    assert_eq!(told, lines);
    assert_whole(lab);
}

const ETH2: (&str, &str) = ("eth2", "peer2");

#[test]
fn what_a_pattern_matches_is_watched_as_it_comes_and_goes() {
    let lab = lab_of(2);
    add_link(&lab, 1);
    let before = lab.machine();
    let said = up(&lab, &["eth*"]).quietly_ok();
    let line = format!("default: eth0 (eth*), eth1 (eth*) -> gre -> {} through out0", remote(0));
    assert!(said.stdout.starts_with(&line), "{said:#?}");
    assert_eq!(watched(&lab), "eth0 ingress, eth0 egress, eth1 ingress, eth1 egress");
    assert_copied_on(&lab, ETH1, "both");
    let status = lab.status();
    let session = &status["sessions"][0];
    assert_eq!(session["taps"][2]["pattern"], "eth*");
    assert_eq!(session["patterns"], serde_json::json!([{ "pattern": "eth*", "interfaces": ["eth0", "eth1"] }]));
    let command = session["command"].as_str().unwrap();
    assert!(command.starts_with("snifctl up 'eth*' ") && !command.contains("--wait"), "{command}");
    for (words, is) in [(&["status"][..], "ok "), (&["tap", "list"], "yes")] {
        let shown = lab.said(words).quietly_ok().stdout;
        assert!(shown.contains(&format!("eth1 (eth*)  egress     {is}")), "{shown}");
    }
    up(&lab, &["eth*"]).ok_noting("already up with this request");

    // One that comes is told, left alone by other edits, and watched by `sync`.
    add_link(&lab, 2);
    lab.said(&["remote", "add", &remote(1).to_string()]).quietly_ok();
    lab.said(&["remote", "remove", &remote(1).to_string()]).quietly_ok();
    let told = (Some(1), "default: eth2: eth* matches it, and it is not watched yet\n".to_string());
    let (code, lines) = faults(&lab);
    assert_eq!((code, lines.lines().take(1).map(|line| format!("{line}\n")).collect::<String>()), told, "{lines}");
    assert_copied_on(&lab, ETH2, "none");
    let arrival = [
        "eth2: eth* matches it, and it is not watched yet; watched",
        "tap eth2 ingress: it is not there; attached",
        "tap eth2 egress: it is not there; attached",
    ];
    sync(&lab, &arrival);
    assert_copied_on(&lab, ETH2, "both");
    let programs = lab.program_ids();

    // Made again, it goes on counting.
    let counted = seen(&lab);
    lab.host(&["ip", "link", "del", "dev", "eth2"]);
    assert_eq!(lab.said(&["status"]).quietly_ok().stdout.matches("  gone  ").count(), 2);
    add_link(&lab, 2);
    sync(&lab, &["eth2: it was made again; watched", arrival[1], arrival[2]].map(|line| line));
    assert_eq!(seen(&lab), counted);
    assert_copied_on(&lab, ETH2, "both");
    assert_eq!(lab.session().tally("eth2", "ingress").seen, 14);

    // Renamed away and back by another name.
    lab.host(&["ip", "link", "set", "dev", "eth2", "name", "wan2"]);
    let [ingress, egress] =
        ["ingress", "egress"].map(|at| format!("tap wan2 {at}: eth* does not match it any more; detached"));
    let said = lab.said(&["sync"]).quietly_ok().stdout;
    assert!(said.contains(&ingress) && said.contains(&egress), "{said}");
    assert_whole(&lab);
    assert_eq!(watched(&lab), "eth0 ingress, eth0 egress, eth1 ingress, eth1 egress");
    assert_eq!(seen(&lab), counted + 14);
    assert_copied_on(&lab, ("wan2", "peer2"), "none");
    lab.host(&["ip", "link", "property", "add", "dev", "wan2", "altname", "eth-two"]);
    sync(&lab, &arrival.map(|line| line.replace("eth2", "wan2")).each_ref().map(String::as_str));
    assert_copied_on(&lab, ("wan2", "peer2"), "both");
    lab.host(&["ip", "link", "del", "dev", "wan2"]);
    sync(&lab, &["wan2: it is gone; left out, its counters kept"]);
    assert_eq!(seen(&lab), counted + 28);
    assert_eq!(lab.program_ids(), programs, "nothing was loaded");

    // Edits.
    lab.said(&["tap", "remove", "eth0"]).refused(
        1,
        "because 'eth*' matches it",
        "snifctl tap remove 'eth*' --name default",
    );
    lab.said(&["tap", "remove", "eth*"]).refused(1, "nothing but eth*", "snifctl down --name default");
    lab.said(&["tap", "add", "eth*"]).refused(1, "already watched", "snifctl tap list --name default");
    lab.said(&["tap", "add", "cali*"]).refused(1, "IFACE 'cali*' matches no interface", ": ip link");
    up(&lab, &["eth?"]).refused(1, "(IFACE 'eth*' → 'eth?')", "snifctl down --name default");
    tap(&lab, "add eth1:egress");
    assert_eq!(watched(&lab), "eth0 ingress, eth0 egress, eth1 ingress, eth1 egress");
    tap(&lab, "add ?th0:ingress");
    tap(&lab, "remove eth*");
    assert_eq!(watched(&lab), "eth0 ingress, eth1 ingress, eth1 egress");
    assert_copied_on(&lab, ETH0, "ingress");
    assert_copied_on(&lab, ETH1, "both");
    assert_whole(&lab);
    tap(&lab, "remove eth1:ingress");
    up(&lab, &["?th0:ingress", "eth1:egress"]).ok_noting("already up with this request");
    lab.said(&["tap", "add", "eth*", "--direction", "egress"]).quietly_ok();
    lab.said(&["tap", "remove", "eth1"]).ok_noting("eth1 is still watched, as 'eth*' matches it");
    assert_eq!(watched(&lab), "eth0 ingress, eth0 egress, eth1 egress");
    tap(&lab, "remove ?th0");
    assert_eq!(watched(&lab), "eth0 egress, eth1 egress");
    let said = up(&lab, &["eth[1-9]", "eth0:ingress", "--replace"]).ok();
    assert!(said.stdout.starts_with("default: eth1 (eth[1-9]), eth0:ingress -> gre"), "{said:#?}");
    assert_copied_on(&lab, ETH0, "ingress");
    assert_copied_on(&lab, ETH1, "both");
    assert_whole(&lab);
    down(&lab);
    lab.assert_as_before(&before);
}

#[test]
fn an_interface_of_that_very_name_wins() {
    let lab = lab_of(2);
    lab.host(&["ip", "link", "add", "name", "eth*", "type", "bridge"]);
    let dry = up(&lab, &["eth*", "--dry-run"]).ok();
    assert!(dry.stdout.contains("dev eth*") && !dry.stdout.contains("dev eth0"), "{dry:#?}");
    up(&lab, &["eth*", "--direction", "ingress"]).ok();
    assert_eq!(watched(&lab), "eth* ingress");
    lab.host(&["ip", "link", "del", "dev", "eth*"]);
    let (code, told) = faults(&lab);
    assert!(code == Some(1) && told.starts_with("default: eth*: it is gone"), "{told}");
    assert_eq!(watched(&lab), "eth* ingress");
    down(&lab);
    // But never a relay: this name was free when it was asked for.
    up(&lab, &["eth0", "snif0", "--wait-for-interface"]).quietly_ok();
    lab.said(&["sync"]).ok_noting("snif0: it is a relay of snifctl");
    assert_eq!(watched(&lab), "eth0 ingress, eth0 egress");
    assert_copied_on(&lab, ETH0, "both");
    down(&lab);
}

#[test]
fn what_is_not_there_yet_is_waited_for_where_that_is_asked() {
    let lab = lab_of(2);
    let before = lab.machine();
    up(&lab, &["pod*"]).refused(1, "IFACE 'pod*' matches no interface", ": ip link");
    up(&lab, &["late0", "eth0"]).refused(
        1,
        "IFACE late0 does not exist here; to wait for it, add --wait-for",
        ": ip link",
    );
    lab.assert_as_before(&before);
    let said = up(&lab, &["eth1", "pod*:ingress", "--wait-for-interface"]).quietly_ok();
    assert!(said.stdout.starts_with("default: eth1 (waiting), pod*:ingress (waiting) -> gre"), "{said:#?}");
    lab.said(&["tap", "add", "late0"]).refused(1, "--wait-for-interface", ": ip link");
    tap(&lab, "add late0 --wait-for-interface");
    let again = ["tap", "add", "late0", "--wait-for-interface"];
    lab.said(&again).refused(1, "late0 is already watched", "snifctl tap list --name default");
    assert_whole(&lab);
    let status = lab.status();
    assert_eq!(status["sessions"][0]["waiting"], serde_json::json!(["eth1", "pod*:ingress", "late0"]));
    assert_eq!(status["sessions"][0]["taps"], serde_json::json!([]));
    let command = status["sessions"][0]["command"].as_str().unwrap();
    assert!(command.ends_with(" --wait-for-interface"), "{command}");
    let shown = lab.said(&["status"]).quietly_ok().stdout;
    assert!(shown.contains("  pod*   ingress    waiting     -       -      -      -\n"), "{shown}");
    up(&lab, &["eth1", "pod*:ingress", "late0"]).ok_noting("already up with this request");
    sync(&lab, &[]);

    // They come: one as it was asked for, one that cannot have taps, one that has no Ethernet header.
    add_link(&lab, 1);
    lab.ip_batch(Ns::Host, "link add pod1 type bridge\nlink add pod2 type bridge\nlink add pod3 type bridge");
    lab.host(&["tc", "qdisc", "add", "dev", "pod2", "ingress"]);
    lab.host(&["ip", "tuntap", "add", "dev", "late0", "mode", "tun"]);
    let said = lab.said(&["sync"]).ok();
    assert!(said.stdout.contains("eth1: it is there, and it is not watched yet"), "{said:#?}");
    assert!(said.stdout.contains("tap pod3 ingress: it is not there; attached"), "{said:#?}");
    let notes = [
        "default: late0: it has no Ethernet header (link type none), which is not supported yet",
        "default: taps of pod2: an `ingress` qdisc is where clsact must go",
    ];
    let told: Vec<&str> = said.stderr.lines().collect();
    assert_eq!(told.len(), 2, "{said:#?}");
    assert!(notes.iter().zip(&told).all(|(note, line)| line.starts_with(&format!("snifctl: {note}"))), "{said:#?}");
    assert_eq!(watched(&lab), "eth1 ingress, eth1 egress, pod1 ingress, pod2 ingress, pod3 ingress");
    assert_copied_on(&lab, ETH1, "both");
    let (code, told) = faults(&lab);
    assert_eq!((code, told.lines().count()), (Some(1), 2), "{told}");
    lab.host(&["ip", "link", "del", "dev", "late0"]);
    lab.host(&["tc", "qdisc", "del", "dev", "pod2", "ingress"]);
    lab.said(&["sync"]).quietly_ok();
    assert_whole(&lab);
    assert_eq!(lab.status()["sessions"][0]["waiting"], serde_json::json!(["late0"]));

    // What is named and goes is missed; what came by a pattern is not.
    lab.ip_batch(Ns::Host, "link del dev eth1\nlink del dev pod1\nlink del dev pod2\nlink del dev pod3");
    lab.said(&["sync"]).ok_noting("eth1: it is gone; it is watched again once it is back");
    let (code, told) = faults(&lab);
    assert!(code == Some(1) && told.starts_with("default: eth1: it is gone") && told.lines().count() == 1, "{told}");
    assert_eq!(lab.status()["sessions"][0]["waiting"], serde_json::json!(["pod*:ingress", "late0"]));
    lab.said(&["sync", "--dry-run"]).ok_noting("it is gone");
    down(&lab);
    lab.assert_as_before(&before);

    // A new session passes over what cannot have taps, too.
    lab.ip_batch(Ns::Host, "link add pod1 type bridge\nlink add pod2 type bridge");
    lab.host(&["tc", "qdisc", "add", "dev", "pod2", "ingress"]);
    up(&lab, &["pod*"]).ok_noting("taps of pod2: an `ingress` qdisc is where clsact must go");
    lab.session().tap("pod1", "egress");
    down(&lab);
}

#[test]
fn files_wait_and_a_watch_finds_what_has_come() {
    let lab = lab_of(2);
    let before = lab.machine();
    let path = lab.dir().join("all.toml");
    let remote = remote(0);
    let text = format!(
        "[[session]]\nname = \"default\"\ninterfaces = [\"eth*\", \"pod?:ingress\", \"late0\"]\ntunnel = \"gre\"\n\
         remote = \"{remote}\"\n"
    );
    fs::write(&path, text).unwrap();
    let path = path.to_string_lossy().into_owned();
    let said = lab.said(&["apply", "-f", &path]).ok();
    let told: Vec<&str> = said.stderr.lines().collect();
    assert_eq!(told.len(), 2, "{said:#?}");
    assert!(told[0].contains("IFACE 'pod?' does not exist here yet"), "{said:#?}");
    assert!(told[1].contains("IFACE late0 does not exist here yet"), "{said:#?}");
    assert_whole(&lab);
    let exported = lab.said(&["export"]).quietly_ok().stdout;
    assert!(exported.contains("\"eth*\", \"pod?:ingress\", \"late0\""), "{exported}");
    fs::write(&path, exported).unwrap();
    assert_eq!(lab.said(&["apply", "-f", &path]).quietly_ok().stdout, "");

    let watch = Watcher::start(&lab, &["--interval", "600"]);
    let is_watched = |wanted: &str| {
        let found = poll(SOON, || (watched(&lab) == wanted).then_some(()));
        assert!(found.is_some(), "{wanted}: {:#?}\n{}", lab.session(), watch.log());
    };
    add_link(&lab, 1);
    is_watched("eth0 ingress, eth0 egress, eth1 ingress, eth1 egress");
    assert_copied_on(&lab, ETH1, "both");
    lab.host(&["sh", "-euc", "ip link set dev eth1 down; ip link set dev eth1 name late0; ip link set dev late0 up"]);
    is_watched("eth0 ingress, eth0 egress, late0 ingress, late0 egress");
    lab.ip_batch(Ns::Host, "link add podX type bridge");
    is_watched("eth0 ingress, eth0 egress, late0 ingress, late0 egress, podX ingress");
    let from = watch.log().lines().count();
    lab.host(&["ip", "link", "del", "dev", "podX"]);
    watch.wait_said(from, "podX: it is gone; left out, its counters kept");
    is_watched("eth0 ingress, eth0 egress, late0 ingress, late0 egress");
    let (_, log) = watch.end("TERM");
    assert!(!log.contains("error"), "{log}");
    assert_whole(&lab);
    assert_eq!(seen(&lab), 14);
    assert_eq!(lab.said(&["apply", "-f", &path]).quietly_ok().stdout, "");
    lab.host(&["ip", "link", "del", "dev", "late0"]);
    down(&lab);
    lab.assert_as_before(&before);
}
