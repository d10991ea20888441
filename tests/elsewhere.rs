//! Taps in other network namespaces: the lab's peer stands for a pod, whose end of the pair is watched by the host.

mod lab;

use std::fs;

use lab::capture::Direction;
use lab::check::assert_same_frames;
use lab::decode::{Port, decap_gre, gre_packets, inner_frames, tcp_stream, verify_checksums};
use lab::frames::{self, Ends};
use lab::order_case::{Case, Out, PLAIN, TUNNELS};
use lab::{COLLECTOR_IP, Lab, Ns, Options, PATIENCE, poll};

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
    for (out_mtu, mode) in [(1600, "segment"), (1500, "fragment")] {
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
    Case { tunnel: TUNNELS[4], out: Out::Bridge, host_gso: true, ..case }.run();
}
