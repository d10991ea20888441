//! The lab with sinks at its ends, the generators, and what they measure.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::lab::{Lab, Ns};
use crate::stats::quantile;

pub(crate) const SNIFCTL: &str = env!("CARGO_BIN_EXE_snifctl");
/// Ticks a second in /proc/stat (USER_HZ), the same wherever Rust's Linux targets run.
const TICKS: f64 = 100.0;

/// Which TC hook of eth0 the frames pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Ingress,
    Egress,
}

/// What is sent in one measurement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub way: Way,
    /// Bytes of a frame, with its Ethernet header.
    pub size: u32,
    /// Frames in a burst.
    pub count: u32,
    /// The time is the lower decile of so many bursts: what else runs on the same hardware only adds, and for longer than
    /// a burst takes.
    pub bursts: u32,
    /// Frames that the receiver handles at a stretch: more copies than its backlog holds (1,000) would be lost.
    pub batch: u32,
    /// Source ports, drawn at random; 0: always the same, and nothing is drawn.
    pub flows: u32,
    /// How long after the last frame the copies may still be under way.
    pub settle: Duration,
}

impl Load {
    pub(crate) fn new(way: Way, size: u32) -> Load {
        Load { way, size, count: 12_500, bursts: 12, batch: 64, flows: 0, settle: Duration::from_millis(5) }
    }

    /// Frames with pauses, some 25,000 a second: below what any mode can take.
    pub(crate) fn slow() -> Load {
        Load { count: 640, bursts: 40, ..Load::new(Way::Ingress, 64) }
    }

    fn frames(&self) -> f64 {
        f64::from(self.count) * f64::from(self.bursts)
    }
}

/// What one measurement found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// Nanoseconds a frame.
    pub ns: f64,
    /// Frames that reached the hook.
    pub offered: f64,
    /// Packets that the sink has got.
    pub outer: f64,
    /// Copies as snifctl counts them, a fragmented one once.
    pub copies: Option<f64>,
    /// CPU seconds of the whole machine.
    pub busy: f64,
}

pub(crate) struct Rig {
    pub lab: Lab,
    /// The CPU that does all the work of a measurement: the last, as the first gets most interrupts.
    cpu: String,
}

impl Rig {
    /// The collector drops every frame as soon as it can, and so does the peer if it is a sink, too.
    pub(crate) fn new(peer_drops: bool) -> Rig {
        let cpus = std::thread::available_parallelism().expect("the number of CPUs").get();
        let rig = Rig { lab: Lab::new(), cpu: (cpus - 1).to_string() };
        // With GRO a veth device receives by NAPI, which frames from XDP need.
        rig.lab.host(&["ethtool", "-K", "eth0", "gro", "on"]);
        rig.build();
        rig.drop_at(Ns::Collector, "col0");
        if peer_drops {
            rig.drop_at(Ns::Peer, "peer0");
        }
        rig
    }

    /// Builds the generators and the programs to compare with.
    fn build(&self) {
        for tool in ["inject", "flood"] {
            let flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-o", &self.built(tool)];
            succeed(Command::new("cc").args(flags).arg(source(&format!("{tool}.c"))));
        }
        let out = format!("-DOUT={}", self.ifindex("out0"));
        let include = format!("-I/usr/include/{}-linux-gnu", std::env::consts::ARCH);
        let flags = ["-O2", "-g", "-Wall", "-Werror", "-target", "bpf", "-mcpu=v3", &include, &out, "-c", "-o"];
        succeed(Command::new("clang").args(flags).arg(self.programs()).arg(source("floor.bpf.c")));
    }

    /// The object file with the programs to compare with.
    pub(crate) fn programs(&self) -> String {
        self.built("floor.bpf.o")
    }

    fn built(&self, name: &str) -> String {
        self.lab.dir().join(name).to_string_lossy().into_owned()
    }

    pub(crate) fn drop_at(&self, ns: Ns, dev: &str) {
        self.lab.run(ns, &["tc", "qdisc", "add", "dev", dev, "clsact"]);
        let program = ["bpf", "direct-action", "object-file", &self.programs(), "section", "classifier/drop"];
        self.lab.run(ns, &[&["tc", "filter", "add", "dev", dev, "ingress"], &program[..]].concat());
    }

    fn ifindex(&self, dev: &str) -> u64 {
        let shown = self.lab.shown(&["ip", "-j", "link", "show", "dev", dev]);
        let links: Value = serde_json::from_str(&shown).expect("JSON of ip link");
        links[0]["ifindex"].as_u64().expect("an interface's number")
    }

    /// Sends the load and measures it; copies arrive at `sink`.
    pub(crate) fn measure(&self, load: &Load, sink: (Ns, &str)) -> Sample {
        let (received, arrived) = (self.received(load), self.lab.packets(sink.0, sink.1).0);
        let busy = busy();
        let ns = self.send(load);
        sleep(load.settle);
        let busy = self::busy() - busy;
        let offered = match load.way {
            Way::Ingress => self.received(load) - received,
            Way::Egress => load.frames() + f64::from(load.batch),
        };
        let outer = (self.lab.packets(sink.0, sink.1).0 - arrived) as f64;
        Sample { ns, offered, outer, copies: None, busy }
    }

    /// Frames that have come in on eth0; of those that leave it knows no number but the generator's.
    fn received(&self, load: &Load) -> f64 {
        match load.way {
            Way::Ingress => self.lab.packets(Ns::Host, "eth0").0 as f64,
            Way::Egress => 0.0,
        }
    }

    fn send(&self, load: &Load) -> f64 {
        let [size, count, bursts] = [load.size, load.count, load.bursts].map(|number| number.to_string());
        let out = match load.way {
            Way::Ingress => {
                let [batch, flows] = [load.batch, load.flows].map(|number| number.to_string());
                let inject = self.built("inject");
                self.lab.peer(&[&inject, "peer0", &self.cpu, &size, &batch, &flows, &count, &bursts])
            }
            Way::Egress => self.lab.host(&[&self.built("flood"), "eth0", &self.cpu, &size, &count, &bursts]),
        };
        let text = String::from_utf8_lossy(&out.stdout);
        let mut bursts: Vec<f64> = text.lines().map(|line| line.parse().expect("nanoseconds")).collect();
        bursts.sort_by(f64::total_cmp);
        quantile(&bursts, 0.1)
    }

    /// Milliseconds that a command takes in the host's namespaces, with entering them.
    pub(crate) fn timed(&self, argv: &[&str]) -> f64 {
        let begin = Instant::now();
        self.lab.host(argv);
        begin.elapsed().as_secs_f64() * 1000.0
    }

    /// What all remotes of the session have been sent, as snifctl counts it.
    pub(crate) fn sent_copies(&self, ns: Ns, program: &str) -> f64 {
        let status = self.lab.run(ns, &[program, "status", "--json"]).stdout;
        let status: Value = serde_json::from_slice(&status).expect("JSON");
        let remotes = status["sessions"][0]["remotes"].as_array().expect("remotes");
        remotes.iter().map(|remote| remote["stat"]["pcnt"].as_f64().expect("a counter")).sum()
    }
}

/// Seconds that all CPUs together have worked since the machine started.
pub(crate) fn busy() -> f64 {
    let stat = fs::read_to_string("/proc/stat").expect("read the CPUs' times");
    let line = stat.lines().next().expect("the line of all CPUs");
    let ticks: Vec<f64> = line.split_whitespace().skip(1).map(|word| word.parse().expect("ticks")).collect();
    // user nice system idle iowait irq softirq steal; guests are counted in user.
    [0, 1, 2, 5, 6].iter().map(|at| ticks[*at]).sum::<f64>() / TICKS
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("bench").join(name)
}

/// Runs a command to its end; panics unless it succeeds.
#[track_caller]
pub(crate) fn succeed(command: &mut Command) {
    let status = command.status().unwrap_or_else(|err| panic!("could not start {command:?}: {err}"));
    assert!(status.success(), "{command:?} ended with {status}");
}
