//! A machine on which something happens all the time, under traffic and with a `snifctl watch`: at the end everything is as
//! it must be.

use std::fs;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant, SystemTime};

use super::capture::Direction;
use super::check::assert_same_frames;
use super::decode::{decap_gre, gre_packets, inner_frames};
use super::frames;
use super::links::add_link;
use super::remotes::{answering, remote};
use super::status::Session;
use super::talk::{flows, untagged};
use super::traffic::Background;
use super::watcher::{SOON, Watcher};
use super::{Lab, Ns, PATIENCE, PEER_IP, poll};

/// The remote behind an interface of its own, out1, which comes and goes.
const FAR: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// The one that is added and removed.
const THIRD: u8 = 2;
/// Around an event that adds or removes a clsact qdisc, which restarts the queue, watched packets may be lost.
const RESTART: Duration = Duration::from_millis(100);

/// What happens: a name, and a shell command in the host namespace; `COL` enters the collector's, `PEER` the peer's, `PINS`
/// are the session's. Those that destroy something wait until the look before has ended.
const EVENTS: [(&str, &str); 34] = [
    ("route moved", "ip route replace 198.51.100.10/32 via 198.51.100.11 dev out0"),
    ("route back", "ip route del 198.51.100.10/32 || true"),
    ("route of others", "ip route add 10.77.0.0/24 dev out0; ip route del 10.77.0.0/24"),
    ("rule added", "ip rule add to 198.51.100.10 lookup main pref 70 || true"),
    ("rule removed", "ip rule del pref 70 || true"),
    (
        "gateway announces another MAC",
        "COL sysctl -qw net.ipv4.conf.m0.arp_notify=1; COL ip link set dev m0 down address 02:00:00:00:04:a$((SERIAL % 10)); COL ip link set dev m0 up",
    ),
    (
        "gateway has another MAC",
        "COL sysctl -qw net.ipv4.conf.m0.arp_notify=0; COL ip link set dev m0 down address 02:00:00:00:04:b$((SERIAL % 10)); COL ip link set dev m0 up",
    ),
    ("collector down!", "COL ip link set dev m0 down"),
    ("collector up", "COL ip link set dev m0 up"),
    ("out interface deleted!", "ip link del out1 || true"),
    ("out interface made", "MAKE_OUT1"),
    ("out MTU down", "ip link set dev out0 mtu 1400"),
    ("out MTU up", "ip link set dev out0 mtu 1600"),
    ("out interface down!", "ip link set dev out1 down || true"),
    ("out interface up", "ip link set dev out1 up && ip addr replace 203.0.113.1/24 dev out1 || true"),
    ("watched interface deleted!", "ip link del eth1 || true"),
    ("watched interface made", "MAKE_ETH1"),
    ("watched interface renamed!", "ip link set dev eth1 down name eth9 && ip link set dev eth9 up || true"),
    ("watched interface named back", "ip link set dev eth9 down name eth1 && ip link set dev eth1 up || true"),
    ("watched interface moved away!", "ip link set dev eth1 netns COLNS || true"),
    ("watched interface moved back", "COL ip link set dev eth1 netns HOSTNS && ip link set dev eth1 up || true"),
    ("watched MTU down", "ip link set dev eth1 mtu 1300 || true"),
    ("watched MTU up", "ip link set dev eth1 mtu 1500 || true"),
    (
        "address removed",
        "ip addr add 198.51.100.44/24 dev out0; ip route replace 198.51.100.0/24 dev out0 src 198.51.100.44",
    ),
    (
        "address added",
        "ip route replace 198.51.100.0/24 dev out0 src 198.51.100.1; ip addr del 198.51.100.44/24 dev out0 || true",
    ),
    ("relay deleted!", "ip link del $(ip -br link | grep -o '^snif[0-9]*\\b' | head -n 1) || true"),
    ("our filter deleted!", "tc filter del dev eth0 ingress || true"),
    ("clsact deleted!", "tc qdisc del dev eth0 clsact || true"),
    (
        "foreign filter in front",
        "tc filter add dev eth0 ingress pref 1 protocol all bpf bytecode '1,6 0 0 4294967295' || true",
    ),
    ("pin removed!", "rm -f PINS/snif_tap_in"),
    (
        "map row removed!",
        "bpftool map delete pinned PINS/maps/devices key $(bpftool map getnext pinned PINS/maps/devices | sed -n '/next/{n;p}') || true",
    ),
    ("filter set!", "SNIFCTL filter set 'not port 9'"),
    ("filter cleared!", "SNIFCTL filter clear"),
    ("watch killed", "KILL_WATCH"),
];

/// More kinds, by snifctl itself.
const VERBS: [(&str, &str); 2] =
    [("remote added!", "SNIFCTL remote add THIRD || true"), ("remote removed!", "SNIFCTL remote remove THIRD || true")];

/// What makes the machine whole again, in this order.
const WHOLE: [&str; 11] = [
    "route back",
    "rule removed",
    "collector up",
    "out interface made",
    "out MTU up",
    "out interface up",
    "watched interface moved back",
    "watched interface named back",
    "watched interface made",
    "watched MTU up",
    "address added",
];

struct Chaos {
    lab: Lab,
    watch: Option<Watcher>,
    state: u64,
    serial: u32,
    /// When a clsact qdisc of eth0 came or went, in seconds since 1970.
    restarts: Vec<f64>,
    logs: String,
    last: Option<Session>,
    /// Looks that had ended at the last event, and when it was.
    event: (usize, Instant),
}

/// Panics, with the seed, unless all is well at the end.
pub(crate) fn run(seed: u64, duration: Duration) {
    eprintln!("chaos with seed {seed}; the same events again: SNIFCTL_CHAOS_SEEDS={seed}");
    let mut chaos = Chaos::begin(seed);
    let pings = chaos.lab.dir().join("pings");
    let traffic = chaos.traffic(&pings);
    let begun = Instant::now();
    let mut count = 0;
    while begun.elapsed() < duration {
        let all: Vec<(&str, &str)> = EVENTS.iter().chain(&VERBS).copied().collect();
        let (name, command) = all[chaos.below(all.len())];
        chaos.event(name, command);
        count += 1;
        if count % 5 == 0 {
            chaos.look_at_counters();
        }
        let pause = Duration::from_millis(100 + chaos.below(200) as u64);
        let until = Instant::now() + pause;
        poll(pause * 2, || (Instant::now() >= until).then_some(()));
    }
    for name in WHOLE {
        let command = EVENTS.iter().find(|(event, _)| *event == name).expect("an event").1;
        chaos.event(name, command);
    }
    chaos.end(traffic, &pings, count);
}

impl Chaos {
    fn begin(seed: u64) -> Chaos {
        let lab = answering(3);
        add_link(&lab, 1);
        let chaos = Chaos {
            lab,
            watch: None,
            state: seed,
            serial: 0,
            restarts: vec![],
            logs: String::new(),
            last: None,
            event: (0, Instant::now()),
        };
        // The collector knows each address of ours: its questions would tell another link address of its own.
        let own = super::mac_text(super::OUT_MAC);
        chaos.lab.ip_batch(Ns::Collector, &format!("neigh replace 198.51.100.44 lladdr {own} nud permanent dev col0"));
        chaos.sh(MAKE_OUT1);
        let remotes = format!("{},{FAR}", remote(0));
        chaos.lab.said(&["up", "eth0", "eth1", "--tunnel", "gre", "--remote", &remotes, "--spread", "flow"]).ok();
        let watch = Watcher::start(&chaos.lab, &["--interval", "1", "--json"]);
        Chaos { watch: Some(watch), ..chaos }
    }

    /// Pings whose answers are looked at, a stream of UDP, and TCP connections, all over eth0.
    fn traffic(&self, pings: &std::path::Path) -> Vec<Background> {
        let peer = PEER_IP.to_string();
        let ping = format!("exec ping -D -n -i 0.02 {peer} > {}", pings.display());
        let tcp = format!(
            "while :; do head -c 200000 /dev/zero | socat -u - TCP4:{peer}:5999,connect-timeout=5 || true; done"
        );
        let udp = format!("while :; do head -c 60000 /dev/zero | socat -u -b 1200 - UDP4-SENDTO:{peer}:5998; done");
        vec![
            self.lab.background(Ns::Peer, &["socat", "-u", "TCP4-LISTEN:5999,fork,reuseaddr", "OPEN:/dev/null"]),
            self.lab.background(Ns::Peer, &["socat", "-u", "UDP4-RECV:5998", "OPEN:/dev/null"]),
            self.lab.background(Ns::Host, &["sh", "-c", &ping]),
            self.lab.background(Ns::Host, &["sh", "-c", &tcp]),
            self.lab.background(Ns::Host, &["nice", "sh", "-c", &udp]),
        ]
    }

    fn below(&mut self, n: usize) -> usize {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.state >> 33) as usize % n
    }

    /// Runs a command with its names filled in.
    fn sh(&self, command: &str) {
        let lab = &self.lab;
        let enter = |ns: Ns| format!("nsenter --net={} ", lab.ns_path(ns).display());
        let command = command
            .replace("MAKE_OUT1", MAKE_OUT1)
            .replace("MAKE_ETH1", MAKE_ETH1)
            .replace("COLNS", &lab.ns_name(Ns::Collector))
            .replace("PEERNS", &lab.ns_name(Ns::Peer))
            .replace("HOSTNS", &lab.ns_name(Ns::Host))
            .replace("COL ", &enter(Ns::Collector))
            .replace("PEER ", &enter(Ns::Peer))
            .replace("PINS", &lab.pins().join("default").to_string_lossy())
            .replace("SNIFCTL", env!("CARGO_BIN_EXE_snifctl"))
            .replace("THIRD", &remote(THIRD).to_string())
            .replace("SERIAL", &self.serial.to_string());
        lab.host(&["sh", "-uc", &format!("exec 2>/dev/null; {command}; true")]);
    }

    fn event(&mut self, name: &str, command: &str) {
        self.serial += 1;
        eprintln!("{:.1} {name}", since_1970());
        if name.ends_with('!') {
            self.wait_for_sync();
        }
        if name == "clsact deleted!" {
            self.restarts.push(since_1970());
        }
        if name == "watch killed" {
            let watch = self.watch.take().expect("a watch");
            self.logs += &watch.end("KILL").1;
            self.watch = Some(Watcher::start(&self.lab, &["--interval", "1", "--json"]));
            self.event = (0, Instant::now());
            return;
        }
        self.sh(command);
        self.event = (self.watch.as_mut().map_or(0, Watcher::looks), Instant::now());
    }

    /// Waits until a look has ended that came after the last event.
    fn wait_for_sync(&mut self) {
        let watch = self.watch.as_mut().expect("a watch");
        let (looks, since) = self.event;
        let ended = poll(PATIENCE * 2, || {
            (watch.looks() > looks && since.elapsed() > Duration::from_millis(150)).then_some(())
        });
        assert!(ended.is_some(), "the watch looks no more:\n{}", watch.log());
    }

    /// No counter goes back.
    fn look_at_counters(&mut self) {
        let said = self.lab.said(&["status", "--json"]);
        assert!(said.status.success(), "{said:#?}");
        let Some(now) = super::status::Status::of(said.json()).sessions.pop() else { panic!("the session is gone") };
        if let Some(before) = &self.last {
            let sums = |session: &Session| {
                let taps: u64 = session.taps.iter().map(|tap| tap.counts.tally().seen).sum();
                let sent = session.remotes_total().pcnt + session.removed.pcnt;
                [taps + session.removed_taps.tally().seen, sent, session.drops()]
            };
            let (before, after) = (sums(before), sums(&now));
            assert!(before.iter().zip(&after).all(|(before, after)| before <= after), "{before:?} went to {after:?}");
        }
        self.last = Some(now);
    }

    /// Soon after the last event everything is as it must be.
    fn end(mut self, traffic: Vec<Background>, pings: &std::path::Path, count: usize) {
        let begun = Instant::now();
        let is_right = || {
            let check = self.lab.said(&["status", "--check"]);
            check.status.success().then_some(())
        };
        let right = poll(SOON, is_right);
        eprintln!("{count} events, in order {:?} after the last", begun.elapsed());
        let log = |chaos: &Chaos| chaos.logs.clone() + &chaos.watch.as_ref().map(Watcher::log).unwrap_or_default();
        if right.is_none() {
            let told = self.watch.as_mut().map(|watch| watch.told().to_vec()).unwrap_or_default();
            panic!(
                "{:#?}\n{}\n{:?}",
                self.lab.said(&["status"]),
                log(&self),
                told.iter().rev().take(8).collect::<Vec<_>>()
            );
        }
        drop(traffic);
        let status = self.lab.said(&["status", "--json"]).json();
        assert_eq!(status["sessions"][0]["taps"].as_array().map(Vec::len), Some(4), "{status:#}");
        self.lab.settled();
        self.look_at_counters();
        self.lab.said(&["filter", "clear"]);
        let remotes: Vec<Ipv4Addr> =
            self.lab.session().remotes.iter().map(|remote| remote.address.parse().expect("an address")).collect();
        let sent: Vec<Vec<u8>> =
            flows(40, untagged).into_iter().flat_map(|flow| [flow.forward, flow.reverse]).collect();
        let mut captures = ["col0", "col1"].map(|dev| self.lab.capture(Ns::Collector, dev, Direction::In));
        let before = self.lab.session();
        self.lab.send(Ns::Peer, "peer0", &sent);
        let after = self.lab.settled();
        assert_eq!(after.drops(), before.drops(), "{after:#}");
        captures.iter_mut().for_each(|capture| capture.settle());
        let all: Vec<Vec<u8>> = captures.iter_mut().flat_map(|capture| capture.stop()).collect();
        let mut copies = Vec::new();
        for remote in &remotes {
            let of = inner_frames(&decap_gre(&gre_packets(&all, *remote)));
            assert!(!of.is_empty(), "{remote} gets none of {} copies, of {remotes:?}", sent.len());
            copies.extend(of);
        }
        // The kernel is at work on the watched links too: ARP, and what it tells IPv6 multicast groups.
        let is_ours = |frame: &Vec<u8>| {
            frame.get(12..14) != Some(&frames::ETH_ARP.to_be_bytes()[..]) && !frame.starts_with(&[0x33, 0x33])
        };
        copies.retain(is_ours);
        assert_same_frames(&sent, &copies);
        self.lab.settled().assert_accounted();
        let logs = log(&self);
        self.assert_pinged(pings, &logs);
        assert!(self.watch.take().expect("a watch").end("TERM").0.success());
        self.lab.said(&["down"]).ok();
        self.lab.assert_no_pins();
        let left = self.lab.shown(&["sh", "-c", "ip -br link; tc qdisc show; tc filter show dev eth0 ingress"]);
        assert!(!left.contains("snif"), "{left}");
    }

    /// No ping is lost but close to an event that adds or removes a clsact qdisc of eth0.
    fn assert_pinged(&self, pings: &std::path::Path, logs: &str) {
        let added =
            logs.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()).filter(|line| {
                let said = line["message"].as_str().unwrap_or_default();
                said.starts_with("tap eth0") && said.contains("clsact")
            });
        let near: Vec<f64> = added.filter_map(|line| line["time"].as_f64()).chain(self.restarts.clone()).collect();
        let text = fs::read_to_string(pings).expect("what ping said");
        let answers: Vec<(f64, u64)> = text.lines().filter_map(answer).collect();
        assert!(answers.len() > 100, "{} pings are answered", answers.len());
        for pair in answers.windows(2).filter(|pair| pair[1].1 > pair[0].1 + 1) {
            let window = RESTART.as_secs_f64() + 0.25;
            let is_near = near.iter().any(|at| *at > pair[0].0 - window && *at < pair[1].0 + window);
            assert!(
                is_near,
                "pings {} to {} are lost at {}, and no clsact came or went: {near:?}",
                pair[0].1 + 1,
                pair[1].1 - 1,
                pair[0].0
            );
        }
    }
}

/// `[1764176400.123456] 64 bytes from 192.0.2.2: icmp_seq=7 ttl=64 time=0.05 ms`
fn answer(line: &str) -> Option<(f64, u64)> {
    let time = line.strip_prefix('[')?.split(']').next()?.parse().ok()?;
    let seq = line.split("icmp_seq=").nth(1)?.split(' ').next()?.parse().ok()?;
    line.contains("bytes from").then_some((time, seq))
}

fn since_1970() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a clock").as_secs_f64()
}

/// out1 with the far remote behind it.
const MAKE_OUT1: &str = "ip link show dev out1 >/dev/null || { ip link add out1 mtu 1600 type veth peer name col1 mtu 1600 netns COLNS && \
    ip addr add 203.0.113.1/24 dev out1 && ip link set dev out1 up && COL ip addr add 203.0.113.10/24 dev col1 && \
    COL ip link set dev col1 up; }";

/// eth1, wherever it was before.
const MAKE_ETH1: &str = "ip link show dev eth1 >/dev/null || ip link show dev eth9 >/dev/null || COL ip link show dev eth1 >/dev/null || { \
    ip link add eth1 type veth peer name peer1 netns PEERNS && ip link set dev eth1 up && PEER ip link set dev peer1 up; }";

/// The seeds in SNIFCTL_CHAOS_SEEDS (with commas), or these.
pub(crate) fn seeds(default: &[u64]) -> Vec<u64> {
    let told = std::env::var("SNIFCTL_CHAOS_SEEDS").unwrap_or_default();
    let told: Vec<u64> = told.split(',').filter_map(|seed| seed.parse().ok()).collect();
    if told.is_empty() { default.to_vec() } else { told }
}
