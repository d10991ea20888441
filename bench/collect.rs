//! How much `collect` takes in, beside tcpdump that writes the same packets.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::lab::{COLLECTOR_IP, Ns, PATIENCE, poll};
use crate::modes::Mode;
use crate::report::{Report, Row};
use crate::rig::{Load, Rig, SNIFCTL, Way, busy, succeed};

const GROUP: &str = "collect";
/// A million frames.
const FLOOD: u32 = 80;

pub(crate) fn run(report: &mut Report) {
    let rig = Rig::new(false);
    rig.lab.collector(&["tc", "qdisc", "del", "dev", "col0", "clsact"]);
    rig.lab.collector(&["ip", "address", "replace", &format!("{COLLECTOR_IP}/24"), "dev", "col0"]);
    let shared = PathBuf::from("/dev/shm").join(format!("snifctl-bench-{}", std::process::id()));
    let file = shared.to_string_lossy().into_owned();
    let from = report.rows.len();
    for tunnel in ["vxlan", "geneve", "gre", "erspan2"] {
        for to in ["/dev/null", &file] {
            measure(&rig, report, tunnel, to);
        }
    }
    let _ = fs::remove_file(&shared);
    report.print_from(from);
}

/// What one receiver did with a flood.
#[derive(Clone, Copy, Default)]
struct Taken {
    /// Frames a second that it wrote, of those that were sent, and the nanoseconds of CPU time that it took for one.
    rate: f64,
    share: f64,
    ns: f64,
    /// The same of all CPUs: sending, copying, and the kernel's part of receiving are in it. What it takes, one core could do.
    all_ns: f64,
}

fn measure(rig: &Rig, report: &mut Report, tunnel: &str, to: &str) {
    let names = ["collect", "tcpdump"];
    let mut samples = [Vec::new(), Vec::new()];
    for round in 0..report.rounds.div_ceil(2) {
        for at in [round % 2, (round + 1) % 2] {
            samples[at].push(flooded(rig, tunnel, names[at], to));
        }
    }
    let case = format!("{tunnel}, {}", if to == "/dev/null" { to } else { "a file in tmpfs" });
    for (name, own) in names.iter().zip(&samples) {
        let of = |value: fn(&Taken) -> f64| own.iter().map(value).collect::<Vec<_>>();
        let ratios: Vec<f64> = own.iter().zip(&samples[1]).map(|(one, other)| other.all_ns / one.all_ns).collect();
        let row =
            Row::new(GROUP, &case, name).with("frames/s", of(|one| one.rate)).with("of sent", of(|one| one.share));
        let row = row.with("ns/frame", of(|one| one.ns)).with("of all CPUs", of(|one| one.all_ns));
        report.rows.push(row.with("frames/s of one core, to tcpdump", ratios));
    }
}

fn flooded(rig: &Rig, tunnel: &str, name: &str, to: &str) -> Taken {
    let running = Mode::snifctl("collect", &["--tunnel", tunnel]).start(rig);
    let log = rig.lab.dir().join("receiver.log");
    let said = || fs::read_to_string(&log).unwrap_or_default();
    let argv: Vec<&str> = match name {
        "collect" => vec![SNIFCTL, "collect", "--tunnel", tunnel, "--json", "-w", to],
        _ => vec!["tcpdump", "-p", "-n", "-i", "col0", "-Z", "root", "-B", "65536", "-w", to, "ip"],
    };
    // Another CPU than the sender's.
    let mut command = rig.lab.command(Ns::Collector, &["taskset", "-c", "0"]);
    let (out, err) = (File::create(rig.lab.dir().join("receiver.out")), File::create(&log));
    let mut child = command.args(argv).stdout(out.expect("a file")).stderr(err.expect("a file")).spawn().expect(name);
    let listens = || (said().contains("receiving") || said().contains("listening on")).then_some(());
    poll(PATIENCE, listens).expect("it never listened");
    let load = Load { bursts: FLOOD, ..Load::new(Way::Ingress, 64) };
    let (begin, worked) = (Instant::now(), busy());
    let sample = rig.measure(&load, (Ns::Collector, "col0"));
    let seconds = begin.elapsed().as_secs_f64();
    let cpu = settled(&mut child);
    let worked = busy() - worked;
    succeed(Command::new("kill").args(["-s", "INT", &child.id().to_string()]).stdout(Stdio::null()));
    child.wait().expect("wait for the receiver");
    running.stop();
    let written = match name {
        "collect" => {
            let report = fs::read(rig.lab.dir().join("receiver.out")).expect("its report");
            let report: serde_json::Value = serde_json::from_slice(&report).expect("JSON");
            report["written"].as_f64().expect("a number")
        }
        _ => {
            let text = said();
            let count = text.lines().find_map(|line| line.strip_suffix(" packets captured"));
            count.expect("a line of tcpdump").trim().parse().expect("a number of packets")
        }
    };
    Taken { rate: written / seconds, share: written / sample.outer, ns: cpu / written, all_ns: worked * 1e9 / written }
}

/// Nanoseconds of CPU time, once it takes no more.
fn settled(child: &mut Child) -> f64 {
    let spent = |pid: u32| -> f64 {
        let text = fs::read_to_string(format!("/proc/{pid}/schedstat")).expect("its CPU time");
        text.split(' ').next().and_then(|word| word.parse().ok()).expect("nanoseconds")
    };
    let mut before = f64::MIN;
    loop {
        let now = spent(child.id());
        // Waking up now and then takes less.
        if now - before < 1e6 {
            return now;
        }
        before = now;
        std::thread::sleep(Duration::from_millis(200));
    }
}
