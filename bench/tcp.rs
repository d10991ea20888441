//! What a copy does to the watched traffic: a TCP connection's goodput, and round-trip times.

use std::collections::BTreeMap;
use std::process::{Child, Stdio};

use serde_json::Value;

use crate::lab::{Ns, PATIENCE, PEER_IP, poll};
use crate::modes::{Mode, What};
use crate::report::{Report, Row};
use crate::rig::Rig;
use crate::stats::quantile;

const SECONDS: &str = "3";
const VXLAN: &str = "mirred to vxlan device";

fn modes() -> Vec<Mode> {
    let (segment, fragment) =
        (["--tunnel", "gre", "--oversize", "segment"], ["--tunnel", "gre", "--oversize", "fragment"]);
    let mut modes = vec![
        Mode::new("none", What::Nothing),
        Mode::new("mirred", What::Mirred("out0")),
        Mode::new(VXLAN, What::Mirred("vxlan0")),
        Mode::snifctl("snifctl gre segment", &segment),
        Mode::snifctl("snifctl gre fragment", &fragment),
        Mode::snifctl("snifctl vxlan", &["--tunnel", "vxlan"]),
    ];
    modes.extend(Mode::baseline("baseline gre segment", &segment));
    modes.extend(Mode::baseline("baseline gre fragment", &fragment));
    modes
}

/// From the host to the peer, both directions copied, over an out link whose MTU is too small for whole copies.
pub(crate) fn goodput(report: &mut Report) {
    let rig = Rig::new(false);
    let mut server = serve(&rig);
    let mut rates: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let mut again: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let (names, mut modes): (Vec<&str>, Vec<Mode>) = modes().into_iter().map(|mode| (mode.name, mode)).unzip();
    for _ in 0..fewer(report.rounds) {
        for mode in &modes {
            let running = mode.start(&rig);
            let (rate, retransmits) = transfer(&rig);
            rates.entry(mode.name).or_default().push(rate);
            again.entry(mode.name).or_default().push(retransmits);
            running.stop();
        }
        modes.rotate_left(1);
    }
    let _ = server.kill();
    let _ = server.wait();
    let ratio = |name: &str, to: &str| -> Vec<f64> {
        rates[name].iter().zip(&rates[to]).map(|(own, other)| own / other).collect()
    };
    // One more of each, as there may be none.
    let more_often = |name: &str| -> Vec<f64> {
        again[name].iter().zip(&again[VXLAN]).map(|(own, other)| (own + 1.0) / (other + 1.0)).collect()
    };
    let begin = report.rows.len();
    report.rows.extend(names.iter().map(|name| {
        Row::new("tcp", "goodput of the watched flow", name)
            .with("Gbit/s", rates[name].iter().map(|rate| rate / 1e9))
            .with("to none", ratio(name, "none"))
            .with("to vxlan device", ratio(name, VXLAN))
            .with("retransmitted", again[name].iter().copied())
            .with("again to vxlan device", more_often(name))
    }));
    report.print_from(begin);
}

/// Rounds of what takes seconds each.
fn fewer(rounds: usize) -> usize {
    (rounds / 3).max(rounds.min(3))
}

fn serve(rig: &Rig) -> Child {
    let mut server = rig.lab.command(Ns::Peer, &["iperf3", "--server"]);
    let server = server.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("start iperf3");
    let listens = || {
        let sockets = rig.lab.peer(&["ss", "-Htln", "sport = 5201"]).stdout;
        (!sockets.is_empty()).then_some(())
    };
    poll(PATIENCE, listens).expect("iperf3 never listened");
    server
}

/// Bits a second that the receiver has got, and segments that the sender has sent again: on a veth, whose receive queues are
/// one a CPU, two that swap places.
fn transfer(rig: &Rig) -> (f64, f64) {
    let out = rig.lab.host(&["iperf3", "--client", &PEER_IP.to_string(), "--time", SECONDS, "--json"]);
    let report: Value = serde_json::from_slice(&out.stdout).expect("JSON of iperf3");
    let figure = |sum: &str, name: &str| report["end"][sum][name].as_f64().expect("a figure of iperf3");
    (figure("sum_received", "bits_per_second"), figure("sum_sent", "retransmits"))
}

/// Round-trip times with nothing else to do.
pub(crate) fn latency(report: &mut Report) {
    let rig = Rig::new(false);
    let mut modes = modes();
    modes.retain(|mode| mode.name != "snifctl vxlan");
    let names: Vec<&str> = modes.iter().map(|mode| mode.name).collect();
    let mut times: BTreeMap<&str, Vec<Vec<f64>>> = BTreeMap::new();
    for _ in 0..fewer(report.rounds) {
        for mode in &modes {
            let running = mode.start(&rig);
            times.entry(mode.name).or_default().push(ping(&rig));
            running.stop();
        }
        modes.rotate_left(1);
    }
    let begin = report.rows.len();
    // What a watched packet waits while it is copied, on both its ways.
    let added = |name: &str| {
        let pairs = times[name].iter().zip(&times["none"]);
        pairs.map(|(own, none)| quantile(own, 0.5) - quantile(none, 0.5)).collect::<Vec<_>>()
    };
    report.rows.extend(names.iter().map(|name| {
        let at = |share| times[name].iter().map(move |times| quantile(times, share));
        Row::new("latency", "round trip of the watched flow", name)
            .with("50% us", at(0.5))
            .with("90% us", at(0.9))
            .with("99% us", at(0.99))
            .with("added us", added(name))
    }));
    report.print_from(begin);
}

/// Microseconds of each round trip, sorted.
fn ping(rig: &Rig) -> Vec<f64> {
    let out = rig.lab.host(&["ping", "-n", "-i", "0.002", "-c", "500", &PEER_IP.to_string()]);
    let text = String::from_utf8_lossy(&out.stdout);
    let words = text.lines().filter_map(|line| line.split_once("time=")?.1.strip_suffix(" ms"));
    let mut times: Vec<f64> = words.map(|word| word.parse::<f64>().expect("milliseconds") * 1000.0).collect();
    times.sort_by(f64::total_cmp);
    assert_eq!(times.len(), 500, "answers lost:\n{text}");
    times
}
