//! How long the commands take.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::thread;
use std::time::Instant;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::lab::faults::{EMPTY_CACHE, in_mounts};
use crate::lab::{self, Ns, PATIENCE, poll};
use crate::report::{Report, Row};
use crate::rig::{Rig, SNIFCTL};

const UP: [&str; 6] = ["up", "eth0", "--tunnel", "gre", "--remote", "198.51.100.2"];
const FILTER: [&str; 3] = ["filter", "set", "tcp port 443 and host 203.0.113.99"];
const ORDER: [&str; 9] = [
    "up, cold",
    "up, warm",
    "map dump",
    "status --json",
    "sync, nothing to do",
    "filter set, cold",
    "filter set, warm",
    "down",
    "entering the namespaces",
];

pub(crate) const SCRAPE: &str = "scrape of 200 taps and 8 remotes";
const DUMP: &str = "bpftool map dump of their taps";

/// Milliseconds of each command.
type Times = BTreeMap<&'static str, Vec<f64>>;

pub(crate) fn run(report: &mut Report) {
    let rig = Rig::new(false);
    let mut times = Times::new();
    // Fills the cache.
    life(&rig, &mut Times::new());
    for _ in 0..report.rounds.max(7) {
        life(&rig, &mut times);
    }
    let begin = report.rows.len();
    let rows = ORDER.map(|name| Row::new("commands", "wall time", name).with("ms", times[name].clone()));
    report.rows.extend(rows);
    let [scrapes, dumps] = scrapes(report.rounds.max(7));
    report.rows.push(Row::new("commands", "wall time", SCRAPE).with("ms", scrapes));
    report.rows.push(Row::new("commands", "wall time", DUMP).with("ms", dumps));
    report.print_from(begin);
}

/// Every command once.
fn life(rig: &Rig, times: &mut Times) {
    let mut took = |name, ms| times.entry(name).or_default().push(ms);
    // The measured times have it in them.
    took("entering the namespaces", timed(rig, true, &["true"]));
    took("up, cold", timed(rig, true, &command(&UP)));
    timed(rig, false, &command(&["down"]));
    took("up, warm", timed(rig, false, &command(&UP)));
    took("map dump", timed(rig, false, &command(&["map", "dump"])));
    took("status --json", timed(rig, false, &command(&["status", "--json"])));
    took("sync, nothing to do", timed(rig, false, &command(&["sync"])));
    took("filter set, cold", timed(rig, true, &command(&FILTER)));
    timed(rig, false, &command(&["filter", "clear"]));
    took("filter set, warm", timed(rig, false, &command(&FILTER)));
    took("down", timed(rig, false, &command(&["down"])));
}

/// 100 watched interfaces both ways, and 8 remotes: milliseconds of scrapes of a server, and of a bpftool that dumps the
/// counters of the taps alone, in turns.
fn scrapes(count: usize) -> [Vec<f64>; 2] {
    let rig = Rig::new(true);
    let names: Vec<String> = (1..100).map(|n| format!("w{n}")).collect();
    let link = |name: &String| format!("link add {name} type veth peer name {name}p\nlink set dev {name} up");
    rig.lab.ip_batch(Ns::Host, &names.iter().map(link).collect::<Vec<_>>().join("\n"));
    let remotes: Vec<Ipv4Addr> = lab::remotes::remotes(8);
    remotes.iter().for_each(|remote| lab::remotes::know(&rig.lab, *remote));
    let listed = lab::remotes::listed(&remotes);
    let words = ["up", "eth0"].into_iter().chain(names.iter().map(String::as_str));
    let words: Vec<&str> = words.chain(["--tunnel", "gre", "--remote", &listed]).collect();
    rig.lab.host(&command(&words));
    let _server = rig.lab.background(Ns::Host, &command(&["metrics", "--listen", "9810"]));
    let pin = rig.lab.pins().join("default/maps/taps");
    let dump = ["bpftool", "-j", "map", "dump", "pinned", pin.to_str().expect("a plain path")];
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 9810));
    let first = poll(PATIENCE, || scraped(&rig, address));
    assert!(first.is_some(), "no metrics at {address}");
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..count {
        times[0].push(scraped(&rig, address).expect("metrics"));
        times[1].push(rig.timed(&dump));
    }
    rig.lab.host(&command(&["down"]));
    times
}

/// Milliseconds of one scrape, from within the namespace; none where nobody answers.
fn scraped(rig: &Rig, address: SocketAddr) -> Option<f64> {
    let namespace = File::open(rig.lab.ns_path(Ns::Host)).expect("the namespace");
    let scrape = move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).expect("enter it");
        let begin = Instant::now();
        let mut server = TcpStream::connect(address).ok()?;
        server.write_all(b"GET /metrics HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n").ok()?;
        let mut page = String::new();
        server.read_to_string(&mut page).ok()?;
        let taps = page.lines().filter(|line| line.starts_with("snifctl_tap_attached{")).count();
        assert_eq!(taps, 200, "{page}");
        Some(begin.elapsed().as_secs_f64() * 1000.0)
    };
    // Only this thread goes there.
    thread::spawn(scrape).join().expect("no panic")
}

fn command<'a>(args: &[&'a str]) -> Vec<&'a str> {
    [&[SNIFCTL], args].concat()
}

/// Milliseconds that a command takes, if `cold` with nothing in the object cache.
fn timed(rig: &Rig, cold: bool, argv: &[&str]) -> f64 {
    let wrapper = in_mounts(EMPTY_CACHE);
    let wrapper = wrapper.iter().map(String::as_str).filter(|_| cold);
    let argv: Vec<&str> = wrapper.chain(argv.iter().copied()).collect();
    rig.timed(&argv)
}
