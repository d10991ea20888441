//! What a copy costs: time added to each frame, on the CPU that receives or sends it, and CPU time of the machine.

use std::collections::BTreeMap;

use crate::lab::PEER_IP;
use crate::modes::{Mode, What, lacking, more_remotes};
use crate::report::{Report, Row};
use crate::rig::{Load, Rig, Sample, Way};

const GROUP: &str = "cost";
pub(crate) const MAIN: &str = "64 B ingress";
pub(crate) const IDLE: &str = "64 B ingress, nothing copied";
const EMPTY: &str = "empty program";
const GENEVE: &str = "snifctl geneve";
pub(crate) const TELLS: &str = "snifctl geneve --tell";
pub(crate) const ELSEWHERE: &str = "snifctl gre, from elsewhere";
const REJECTS: &str = "snifctl gre, filter rejects";
const WHOLE: &str = "snifctl gre, every part";
const USERSPACE: &str = "tcpdump and socat";
pub(crate) const SLOW: &str = "64 B ingress, 25,000 a second";

/// Samples of each mode, a round each.
type Samples = BTreeMap<&'static str, Vec<Sample>>;

pub(crate) fn run(report: &mut Report) {
    let rig = Rig::new(true);
    more_remotes(&rig, 3);
    compare(&rig, report, MAIN, every_mode(), &Load::new(Way::Ingress, 64));
    // Small differences: longer.
    let load = Load { bursts: 40, ..Load::new(Way::Ingress, 64) };
    compare(&rig, report, IDLE, idle_modes(), &load);
    for (case, way, size) in [
        ("512 B ingress", Way::Ingress, 512),
        ("1500 B ingress", Way::Ingress, 1500),
        ("64 B egress", Way::Egress, 64),
        ("512 B egress", Way::Egress, 512),
        ("1500 B egress", Way::Egress, 1500),
    ] {
        let mut modes = main_modes();
        if size == 1500 {
            modes.extend(fragmenting());
        }
        compare(&rig, report, case, modes, &Load::new(way, size));
    }
    compare(&rig, report, SLOW, slow_modes(), &Load::slow());
}

/// Neighbours in this list are measured one right after the other, which matters for what is compared.
fn main_modes() -> Vec<Mode> {
    let mut modes = vec![
        Mode::new("none", What::Nothing),
        Mode::new("floor", What::Mirred("out0")),
        Mode::snifctl("snifctl gre", &["--tunnel", "gre"]),
        Mode::new("mirred to vxlan device", What::Mirred("vxlan0")),
        Mode::snifctl("snifctl vxlan", &["--tunnel", "vxlan"]),
        Mode::new("floor-bpf", What::Program("mirror")),
    ];
    modes.extend(Mode::baseline("baseline gre", &["--tunnel", "gre"]));
    modes
}

fn fragmenting() -> Vec<Mode> {
    let options = ["--tunnel", "gre", "--oversize", "fragment"];
    let own = Mode::snifctl("snifctl gre fragment", &options);
    [own].into_iter().chain(Mode::baseline("baseline gre fragment", &options)).collect()
}

/// Nothing is copied.
fn idle_modes() -> Vec<Mode> {
    let rejects = ["--tunnel", "gre", "--filter", "tcp port 443 and host 203.0.113.99"];
    vec![Mode::new("none", What::Nothing), Mode::new(EMPTY, What::Program("empty")), Mode::snifctl(REJECTS, &rejects)]
}

fn every_mode() -> Vec<Mode> {
    let thirty = (1..30).map(|n| format!("host 203.0.113.{n} or ")).collect::<String>() + "host 192.0.2.2";
    let gre = |name, options: &[&str]| Mode::snifctl(name, &[&["--tunnel", "gre"], options].concat());
    let three = "198.51.100.2,198.51.100.3,198.51.100.4";
    let peer = PEER_IP.to_string();
    let mut modes = main_modes();
    modes.extend(fragmenting());
    modes.extend([
        Mode::snifctl(GENEVE, &["--tunnel", "geneve"]),
        Mode::snifctl(TELLS, &["--tunnel", "geneve", "--tell"]),
        Mode::new("nft dup to vxlan device", What::NftDup),
        Mode::whole(WHOLE, &["--tunnel", "gre"]),
        gre("snifctl gre, 3 remotes", &["--remote", three]),
        gre("snifctl gre, filter of 1 host", &["--filter", "host 192.0.2.2"]),
        gre("snifctl gre, filter of 30 hosts", &["--filter", &thirty]),
        gre("snifctl gre, out of eth0 itself", &["--remote", &peer]),
        Mode::elsewhere(ELSEWHERE, &["--tunnel", "gre"]),
    ]);
    modes
}

fn slow_modes() -> Vec<Mode> {
    let mut modes = main_modes();
    modes.push(Mode::new(USERSPACE, What::Userspace));
    modes
}

/// Measures all modes in every round, each time beginning with another, and reports them.
pub(crate) fn compare(rig: &Rig, report: &mut Report, case: &str, modes: Vec<Mode>, load: &Load) {
    let (able, lacking): (Vec<_>, Vec<_>) =
        modes.into_iter().map(|mode| (lacking(rig, &mode), mode)).partition(|it| it.0.is_none());
    let mut modes: Vec<Mode> = able.into_iter().map(|(_, mode)| mode).collect();
    let names: Vec<&str> = modes.iter().map(|mode| mode.name).collect();
    let mut samples = Samples::new();
    for _ in 0..report.rounds {
        for mode in &modes {
            samples.entry(mode.name).or_default().push(mode.measure(rig, load));
        }
        modes.rotate_left(1);
    }
    let begin = report.rows.len();
    report.rows.extend(names.iter().map(|name| row(case, name, &samples)));
    let skipped =
        lacking.into_iter().map(|(reason, mode)| Row::new(GROUP, case, mode.name).noted(reason.unwrap_or_default()));
    report.rows.extend(skipped);
    report.print_from(begin);
}

fn row(case: &str, mode: &str, samples: &Samples) -> Row {
    let own = &samples[mode];
    let row = Row::new(GROUP, case, mode).with("frame ns", own.iter().map(|sample| sample.ns));
    if mode == "none" {
        return row;
    }
    let row = row
        .with("added ns", added(samples, mode, "none"))
        .with("to floor", ratio(samples, mode, "floor"))
        .with("to vxlan device", ratio(samples, mode, "mirred to vxlan device"))
        .with("CPU s/million", cpu(samples, mode))
        .with("copies/frame", own.iter().filter_map(|sample| Some(sample.copies? / sample.offered)))
        .with("packets/frame", own.iter().map(|sample| sample.outer / sample.offered));
    match mode {
        REJECTS => row.with("over empty ns", added(samples, mode, EMPTY)),
        ELSEWHERE => row.with("to home", ratio(samples, mode, "snifctl gre")),
        USERSPACE => row.noted("its work is done elsewhere: see CPU s/million"),
        TELLS => row.with("to geneve", ratio(samples, mode, GENEVE)),
        WHOLE => row.with("to snifctl gre", ratio(samples, mode, "snifctl gre")),
        _ => row,
    }
}

/// Nanoseconds a frame more than another mode of the same round.
fn added(samples: &Samples, mode: &str, other: &str) -> Vec<f64> {
    samples[mode].iter().zip(&samples[other]).map(|(own, other)| own.ns - other.ns).collect()
}

/// What a mode adds, as a multiple of what another adds in the same round.
fn ratio(samples: &Samples, mode: &str, other: &str) -> Vec<f64> {
    if !samples.contains_key(other) || mode == other {
        return Vec::new();
    }
    let pairs = added(samples, mode, "none").into_iter().zip(added(samples, other, "none"));
    pairs.map(|(own, other)| own / other).collect()
}

/// CPU seconds of the machine for a million frames, more than without copies.
fn cpu(samples: &Samples, mode: &str) -> Vec<f64> {
    let each = |sample: &Sample| sample.busy / sample.offered * 1e6;
    samples[mode].iter().zip(&samples["none"]).map(|(own, none)| each(own) - each(none)).collect()
}
