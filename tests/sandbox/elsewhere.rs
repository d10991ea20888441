//! Taps in other network namespaces: the lab's peer stands for a pod, whose end of the pair is watched by the host.

use std::fs;

use crate::lab;
use crate::lab::capture::Direction;
use crate::lab::check::assert_same_frames;
use crate::lab::decode::{Port, decap_gre, gre_packets, inner_frames, tcp_stream, verify_checksums};
use crate::lab::frames::{self, Ends};
use crate::lab::order_case::{Case, Out, PLAIN, TUNNELS};
use crate::lab::pods::{Cni, Gone, assert_pod_is_watched};
use crate::lab::{COLLECTOR_IP, Lab, Ns, Options, PATIENCE, poll};

/// What the peer's end of the link is called here.
fn pod(lab: &Lab) -> String {
    format!("netns:{}/peer0", lab.ns_name(Ns::Peer))
}

#[track_caller]
fn up(lab: &Lab, interfaces: &[&str], more: &[&str]) -> String {
    let remote = COLLECTOR_IP.to_string();
    let args = [&["up"], interfaces, &["--tunnel", "gre", "--remote", &remote], more].concat();
    lab.said(&args).ok().stderr
}

/// The pod's namespace, as tools show it.
fn peer(lab: &Lab) -> String {
    let show = |argv: &[&str]| String::from_utf8(lab.run(Ns::Peer, argv).stdout).unwrap();
    let filters = ["ingress", "egress"].map(|hook| show(&["tc", "filter", "show", "dev", "peer0", hook]));
    [show(&["ip", "-d", "link"]), show(&["ip", "address"]), show(&["tc", "qdisc"]), filters.concat()].concat()
}

// ---- exact ----

#[test]
fn every_kind_of_frame_arrives_exactly_both_ways_and_no_copy_is_on_the_pods_link() {
    // A guest, which is slow, takes the longer way alone.
    let ways = [(1600, "segment"), (1500, "fragment")];
    for (out_mtu, mode) in ways.into_iter().skip(usize::from(lab::GUEST)) {
        let lab = Lab::with(Options { out_mtu, ..Options::default() });
        let (host, there) = (lab.machine(), peer(&lab));
        up(&lab, &[&pod(&lab)], &["--oversize", mode]);
        let mut sum = 0;
        for (from, dev, to, far, ends) in [
            (Ns::Host, "eth0", Ns::Peer, "peer0", Ends::HOST_TO_PEER),
            (Ns::Peer, "peer0", Ns::Host, "eth0", Ends::PEER_TO_HOST),
        ] {
            let frames = frames::corpus_frames(&ends);
            let mut received = lab.capture(to, far, Direction::In);
            let mut beside = lab.capture(Ns::Peer, "peer0", Direction::Out);
            let mut mirrored = lab.capture(Ns::Collector, "col0", Direction::In);
            lab.send(from, dev, &frames);
            assert_same_frames(&frames, &received.take(frames.len()));
            mirrored.wait_for(frames.len());
            mirrored.settle();
            assert_same_frames(&frames, &inner_frames(&decap_gre(&mirrored.stop())));
            assert!(gre_packets(&beside.stop(), COLLECTOR_IP).is_empty(), "copies go home, not over the pod's link");
            sum += frames.len() as u64;
            let session = lab.settled();
            assert_eq!((session.taps_total().pcnt, session.drops()), (sum, 0), "{session:#}");
        }
        lab.said(&["down"]).quietly_ok();
        lab.assert_as_before(&host);
        assert_eq!(peer(&lab), there);
    }
}

#[test]
fn super_packets_both_ways_become_the_wires_frames() {
    for from in [Ns::Host, Ns::Peer] {
        let lab = Lab::new();
        up(&lab, &[&pod(&lab)], &["--oversize", "fragment"]);
        let to = if from == Ns::Host { Ns::Peer } else { Ns::Host };
        let mut mirrored = lab.capture(Ns::Collector, "col0", Direction::In);
        let transfer = lab.tcp_transfer(4 << 20, from, to);
        let session = lab.settled();
        mirrored.settle();
        let inner = inner_frames(&decap_gre(&mirrored.stop()));
        assert!(tcp_stream(&inner, Port::Dst(transfer.port)) == transfer.data, "the copied stream differs");
        inner.iter().for_each(|frame| verify_checksums(frame));
        assert_eq!((inner.len() as u64, session.drops()), (session.taps_total().pcnt, 0));
    }
}

#[test]
fn copies_leave_in_order() {
    let case = Case { elsewhere: true, ..PLAIN };
    Case { remotes: 3, ..case }.run();
    Case { oversize: "fragment", host_gso: true, peer_gso: true, ..case }.run();
    Case { out: Out::Vxlan, ..case }.run();
    Case { tunnel: TUNNELS[4], out: Out::Bridge, host_gso: true, ..case }.run();
}

// ---- right, and gone without a trace ----

/// Frames that the host sends to the pod are copied, each once.
#[track_caller]
fn assert_copied(lab: &Lab, n: u32) {
    let before = lab.session().taps_total().pcnt;
    lab.send(Ns::Host, "eth0", &frames::series(&Ends::HOST_TO_PEER, n));
    let copied = poll(PATIENCE, || (lab.settled().taps_total().pcnt == before + u64::from(n)).then_some(()));
    assert!(copied.is_some(), "{:#}", lab.session());
}

/// The device that takes copies home, as the pod has it.
fn device(lab: &Lab) -> Option<String> {
    let shown = String::from_utf8(lab.run(Ns::Peer, &["ip", "-br", "link"]).stdout).unwrap();
    shown.lines().find_map(|line| Some(line.split('@').next()?.to_string()).filter(|name| name.starts_with("snif")))
}

#[test]
fn what_is_damaged_there_is_told_and_mended() {
    let lab = Lab::roomy();
    let (host, there, pod) = (lab.machine(), peer(&lab), pod(&lab));
    up(&lab, &[&pod], &["--direction", "ingress"]);
    let space = pod.strip_suffix("/peer0").unwrap();
    let relay = format!("relay of {space}");
    let damages: [(&[&str], String); 6] = [
        (&["ip", "link", "delete", "dev", "snif0"], format!("{relay}: it is not there")),
        (&["ip", "link", "set", "dev", "snif0", "down"], format!("{relay}: snif0 is down")),
        (&["ip", "link", "set", "dev", "snif0", "mtu", "1500"], format!("{relay}: the MTU of snif0 is 1500")),
        (&["ip", "link", "set", "dev", "snif0", "arp", "on"], format!("{relay}: ARP of snif0 is on")),
        (&["tc", "filter", "del", "dev", "peer0", "ingress"], format!("tap {pod} ingress: its filter is gone")),
        (&["tc", "qdisc", "del", "dev", "peer0", "clsact"], format!("tap {pod} ingress: its clsact qdisc is gone")),
    ];
    for (damage, fault) in damages {
        lab.run(Ns::Peer, damage);
        assert_eq!(lab.said(&["status", "--check"]).stdout, format!("default: {fault}\n"), "{damage:?}");
        let told = lab.said(&["sync"]).quietly_ok().stdout;
        assert!(told.starts_with(&format!("default: {fault}; ")), "{damage:?}: {told}");
        assert_eq!(lab.said(&["sync"]).quietly_ok().stdout, "");
        assert_copied(&lab, 3);
    }
    lab.host(&["ip", "link", "delete", "dev", "snif0"]);
    assert_eq!(device(&lab), None, "with the bridge goes what stands on it");
    lab.said(&["sync"]).quietly_ok();
    assert_copied(&lab, 3);
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&host);
    assert_eq!(peer(&lab), there);
}

#[test]
fn taps_come_and_go_beside_others_and_each_session_has_its_own() {
    let lab = Lab::roomy();
    let (host, there, pod) = (lab.machine(), peer(&lab), pod(&lab));
    let (name, netns) = (lab.ns_name(Ns::Peer), lab.ns_path(Ns::Peer).display().to_string());
    up(&lab, &["out0:ingress"], &[]);
    let said = lab.said(&["tap", "add", "peer0:ingress", "--netns", &name]).ok().stderr;
    let doubles = format!("snifctl: what {pod} sends and gets is copied twice where it passes out0, too");
    assert!(said.starts_with(&doubles), "{said}");
    assert_copied(&lab, 2);
    // The same by another name is one interface.
    let twice = lab.said(&["tap", "add", &format!("netns:{netns}/peer0:ingress")]);
    twice.refused(1, "is already watched", "snifctl tap list --name default");
    let other = ["--netns", &name, "--name", "other", "--filter", "udp"];
    up(&lab, &[], &other);
    let shown = lab.status()["sessions"][1]["taps"][0]["interface"].clone();
    assert_eq!(shown, pod.as_str(), "of a whole namespace everything but lo");
    assert_copied(&lab, 2);
    assert_eq!(lab.said(&["status", "--check"]).quietly_ok().stdout, "");
    lab.said(&["down", "--name", "other"]).quietly_ok();
    assert_copied(&lab, 2);
    lab.said(&["tap", "remove", &pod]).quietly_ok();
    assert_eq!(peer(&lab), there);
    assert_eq!(lab.session().removed_taps.stat.pcnt, 6, "its counters are kept");
    lab.said(&["tap", "add", &pod]).ok();
    assert_copied(&lab, 2);
    let exported = lab.said(&["export"]).quietly_ok().stdout;
    assert!(exported.contains(&format!("interfaces = [\"out0:ingress\", \"{pod}\"]")), "{exported}");
    // Nothing tells any more where its taps are.
    std::fs::remove_dir_all(lab.pins().join("default")).unwrap();
    lab.said(&["down"]).ok();
    lab.assert_as_before(&host);
    assert_eq!(peer(&lab), there);
}

#[test]
fn sessions_of_one_name_from_several_namespaces_leave_each_other_alone() {
    let lab = Lab::roomy();
    let (there, pod) = (peer(&lab), pod(&lab));
    // Without what answers the copies of the pod's own session, which arrive at a host that knows no tunnel.
    up(&lab, &[&pod], &["--direction", "ingress", "--filter", "udp"]);
    let node = lab::bare::Bare::new();
    node.snifctl(&format!("up {pod} --tunnel gre --remote 198.51.100.2"));
    // The pod has one of its own, on the same interface.
    let own = |words: &[&str]| {
        let out = lab.run(Ns::Peer, &[&[env!("CARGO_BIN_EXE_snifctl")], words].concat());
        String::from_utf8_lossy(&out.stdout).into_owned()
    };
    own(&["up", "peer0", "--tunnel", "gre", "--remote", "192.0.2.1", "--direction", "ingress"]);
    let all_are_well = |lab: &Lab| {
        assert_eq!(lab.said(&["status", "--check"]).quietly_ok().stdout, "");
        assert_eq!(own(&["status", "--check"]), "");
        assert_copied(lab, 3);
    };
    all_are_well(&lab);
    assert_eq!(node.snifctl("status --check"), "");
    node.snifctl("down");
    assert!(node.snifctl("down").contains("nothing to do"));
    all_are_well(&lab);
    own(&["sync", "--all"]);
    own(&["down", "--all"]);
    assert_eq!(lab.said(&["status", "--check"]).quietly_ok().stdout, "");
    assert_copied(&lab, 3);
    // What has no session can still have left something; what others have is not it.
    lab.said(&["down", "--name", "other"]).ok_noting("is not up");
    node.snifctl("sync --all");
    assert_copied(&lab, 3);
    lab.said(&["down"]).quietly_ok();
    assert_eq!(peer(&lab), there);
}

#[test]
fn a_namespace_that_comes_again_is_watched_again() {
    let lab = Lab::roomy();
    let name = format!("{}x", lab.ns_name(Ns::Peer));
    let gone = Gone(name.clone());
    let origin = format!("netns:{name}");
    up(&lab, &["--netns", &name, "--wait-for-interface"], &[]);
    assert_eq!(lab.status()["sessions"][0]["waiting"][0], format!("{origin}/*"));
    for life in 1..=3 {
        gone.make(&lab);
        assert_eq!(lab.said(&["status", "--check"]).status.code(), Some(1));
        lab.said(&["sync"]).ok();
        let taps = lab.session().taps;
        assert_eq!((taps.len(), taps[0].interface.as_str()), (2, format!("{origin}/eth0").as_str()), "{life}");
        gone.end();
        lab.said(&["sync"]).ok();
        assert_eq!(lab.session().taps.len(), 0, "what came by a pattern goes with its namespace");
        assert_eq!(lab.said(&["status", "--check"]).quietly_ok().stdout, "");
    }
    lab.said(&["down"]).quietly_ok();
}

#[test]
fn the_nodes_end_is_watched_where_that_is_asked_for() {
    let lab = Lab::roomy();
    let name = lab.ns_name(Ns::Peer);
    up(&lab, &["--netns", &name, "--host-side"], &["--direction", "egress"]);
    let taps = lab.session().taps;
    assert_eq!((taps.len(), taps[0].interface.as_str()), (1, "eth0"));
    assert_copied(&lab, 3);
    lab.said(&["down"]).quietly_ok();
}

#[test]
fn what_cannot_be_is_refused_in_one_line() {
    let lab = Lab::roomy();
    let name = lab.ns_name(Ns::Peer);
    let up = |words: &[&str]| lab.said(&[&["up", "--tunnel", "gre", "--remote", "198.51.100.2"], words].concat());
    up(&["--netns", "no-such"]).refused(1, "IFACE netns:no-such/*", "ip netns list");
    up(&["eth7", "--netns", &name]).refused(1, &format!("IFACE netns:{name}/eth7"), "--wait-for-interface");
    up(&["--pid", "none"]).refused(2, "--pid none", "--pid 4711");
    up(&["netns:a/eth0", "--netns", &name]).refused(2, "IFACE \"netns:a/eth0\"", &format!("--netns {name}"));
    up(&["box:a/b"]).refused(2, "IFACE \"box:a/b\"", "netns:blue/eth0");
    up(&["eth0", "--host-side"]).refused(2, "--host-side", "--pod shop/web-1 --host-side");
    assert!(fs::metadata(lab.pins()).is_err(), "nothing half-done stays");
}

#[test]
fn where_the_watching_namespace_ends_its_taps_elsewhere_go_too() {
    let lab = Lab::roomy();
    let there = peer(&lab);
    let node = lab::bare::Bare::new();
    node.snifctl(&format!("up {} --tunnel gre --remote 198.51.100.2", pod(&lab)));
    let ids = lab.run(Ns::Peer, &["tc", "filter", "show", "dev", "peer0", "ingress"]).stdout;
    assert!(String::from_utf8_lossy(&ids).contains("snif_tap_in"));
    drop(node);
    // Whoever comes next finds what is left of it.
    let gone = poll(PATIENCE, || {
        lab.said(&["sync", "--all"]);
        (peer(&lab) == there).then_some(())
    });
    assert!(gone.is_some(), "{}", peer(&lab));
}

/// Kills a command at some of its steps; `down` leaves both namespaces as they were.
#[test]
fn whatever_a_kill_leaves_is_taken_down() {
    let lab = Lab::roomy();
    let (host, there, pod) = (lab.machine(), peer(&lab), pod(&lab));
    let remote = COLLECTOR_IP.to_string();
    let words = ["up", &pod, "--tunnel", "gre", "--remote", &remote];
    let mut kills = 0;
    for step in (1..).step_by(5) {
        let said = lab.said_by(&["env", &format!("SNIFCTL_INTERRUPT={step} before")], &words);
        let is_killed = !said.status.success();
        if is_killed {
            kills += 1;
            lab.said(&words).ok();
        }
        lab.said(&["down"]).ok();
        lab.assert_as_before(&host);
        assert_eq!(peer(&lab), there, "killed at step {step}");
        if !is_killed {
            break;
        }
    }
    assert!(kills > 8, "killed {kills} times");
}

// ---- whatever the CNI ----

#[test]
fn pods_of_every_cni_are_watched_inside() {
    [Cni::Bridge, Cni::PointToPoint, Cni::RedirectPeer, Cni::Macvlan].into_iter().for_each(assert_pod_is_watched);
}

#[test]
fn of_a_whole_namespace_every_interface_but_lo_is_watched() {
    let lab = Lab::roomy();
    let (name, there) = (lab.ns_name(Ns::Peer), peer(&lab));
    up(&lab, &["--netns", &name], &[]);
    let watched = || {
        let mut all: Vec<String> = lab.session().taps.into_iter().map(|tap| tap.interface).collect();
        all.sort();
        all.dedup();
        all
    };
    let named = |names: &[&str]| names.iter().map(|at| format!("netns:{name}/{at}")).collect::<Vec<_>>();
    assert_eq!(watched(), named(&["peer0"]));
    let links =
        "link add x0 type veth peer name x1\nlink set dev x0 addrgenmode none up\nlink set dev x1 addrgenmode none up";
    lab.ip_batch(Ns::Peer, links);
    assert_eq!(lab.said(&["status", "--check"]).status.code(), Some(1));
    lab.said(&["sync"]).quietly_ok();
    assert_eq!(watched(), named(&["peer0", "x0", "x1"]));
    assert_copied(&lab, 3);
    // One of them is named besides, and stays where the others go.
    lab.said(&["tap", "add", "x0:ingress", "--netns", &name]).quietly_ok();
    lab.said(&["tap", "remove", &format!("netns:{name}/*")]).quietly_ok();
    assert_eq!(watched(), named(&["x0"]));
    lab.said(&["down"]).quietly_ok();
    lab.ip_batch(Ns::Peer, "link delete dev x0");
    assert_eq!(peer(&lab), there);
}
