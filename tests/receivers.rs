//! Sensors that people put behind a mirror, as the judges: they must see in the copies what they see on the wire. Not part
//! of `cargo test`: `make test-receivers` makes the roots in which they are installed, and prints the table.
//!
//! The watched host downloads files from the peer; the sensor reads what the collector received and what the wire had, or
//! listens on the tap device on which `collect` puts the frames.

mod lab;
#[path = "receivers/tap.rs"]
mod tap;

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use lab::capture::Direction;
use lab::http::{HTTP_PORT, Page, Site};
use lab::{COLLECTOR_IP, COLLECTOR_IP6, COLLECTOR_MAC, Lab, Ns, OUT_IP, OUT_IP6, OUT_MAC, Options};
use lab::{PEER_IP, PEER_IP6, mac_text, pcap};
use serde_json::Value;

// ---- the receivers ----

/// A sensor that reads captures in a root of its own.
struct Receiver {
    /// Its package and the root's directory.
    name: &'static str,
    /// What it reads of `--tunnel`.
    tunnels: &'static [&'static str],
    read: fn(&Path, Checksums) -> Reading,
}

/// Suricata 7 does not decode ERSPAN type III.
const RECEIVERS: [Receiver; 1] = [Receiver { name: "suricata", tunnels: &TUNNELS, read: suricata }];

/// `--tunnel`, and what goes with it.
const TUNNELS: [&str; 6] = ["gre", "erspan1", "erspan2", "vxlan", "geneve", "geneve --tell"];

/// What a sensor does with a frame whose checksum is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Checksums {
    /// Ignores it.
    Validated,
    /// Looks at it all the same: a capture taken before the sender's interface has finished checksums.
    Any,
}

/// What a sensor saw, in order of its text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Reading {
    /// Of each HTTP transaction: path, status, length of the body.
    transactions: Vec<String>,
    /// Of each file that was seen whole: path, size, SHA-256.
    files: Vec<String>,
}

impl Reading {
    /// What the web server knows that it has sent.
    fn of_pages(pages: &[Page]) -> Reading {
        let transaction = |page: &Page| format!("{} 200 {}", page.path, page.size);
        let file = |page: &Page| format!("{} {} {}", page.path, page.size, page.sha256);
        Reading { transactions: pages.iter().map(transaction).collect(), files: pages.iter().map(file).collect() }
    }
}

/// Where the receivers' roots are.
fn roots() -> PathBuf {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/receivers");
    std::env::var_os("SNIFCTL_RECEIVERS").map_or_else(default, PathBuf::from)
}

/// A directory within a receiver's root, and the root.
fn place(name: &str) -> (PathBuf, tempfile::TempDir) {
    let root = roots().join(name);
    let dir = tempfile::Builder::new().prefix("snif").tempdir_in(root.join("tmp"));
    let dir = dir.unwrap_or_else(|err| panic!("no {name} in {}: {err}; try: make test-receivers", root.display()));
    (root, dir)
}

fn suricata(capture: &Path, checksums: Checksums) -> Reading {
    let (dir, inside, argv) = suricata_in_its_root(checksums);
    fs::copy(capture, dir.path().join("capture.pcap")).expect("copy the capture into the root");
    let mut command = Command::new(&argv[0]);
    command.args(&argv[1..]).args(["--runmode", "single", "-r"]).arg(inside.join("capture.pcap"));
    succeed(&mut command);
    read_eve(&eve_of(dir.path()))
}

/// Suricata's own directory, as it is called outside and inside of its root, and the command that is still to be told
/// what to read.
fn suricata_in_its_root(checksums: Checksums) -> (tempfile::TempDir, PathBuf, Vec<String>) {
    let (root, dir) = place("suricata");
    fs::write(dir.path().join("suricata.yaml"), include_str!("receivers/suricata.yaml")).expect("write the yaml");
    let inside = Path::new("/").join(dir.path().strip_prefix(&root).expect("within the root"));
    let [root, own, yaml] = [root, inside.clone(), inside.join("suricata.yaml")].map(|path| path.display().to_string());
    let checked = if checksums == Checksums::Validated { "all" } else { "none" };
    let argv = ["chroot", &root, "suricata", "-k", checked, "-c", &yaml, "-l", &own].map(String::from);
    (dir, inside, argv.to_vec())
}

fn eve_of(dir: &Path) -> String {
    fs::read_to_string(dir.join("eve.json")).expect("Suricata's eve.json")
}

fn read_eve(eve: &str) -> Reading {
    let mut reading = Reading::default();
    for line in eve.lines() {
        let event: Value = serde_json::from_str(line).expect("JSON of Suricata");
        let (http, file) = (&event["http"], &event["fileinfo"]);
        if event["event_type"] == "http" {
            reading.transactions.push(joined([&http["url"], &http["status"], &http["length"]]));
        } else if event["event_type"] == "fileinfo" && file["state"] == "CLOSED" && file["gaps"] == false {
            reading.files.push(joined([&file["filename"], &file["size"], &file["sha256"]]));
        }
    }
    reading.transactions.sort();
    reading.files.sort();
    reading
}

fn joined(values: [&Value; 3]) -> String {
    values.map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned)).join(" ")
}

#[track_caller]
fn succeed(command: &mut Command) -> Output {
    let out = command.output().unwrap_or_else(|err| panic!("could not start {command:?}: {err}"));
    assert!(out.status.success(), "{command:?}: {}\n{}", out.status, String::from_utf8_lossy(&out.stderr));
    out
}

// ---- what is tried ----

/// The interface through which copies leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Out {
    Veth,
    /// A veth that neither finishes checksums nor takes super-packets stands for a NIC.
    Nic,
    Bridge,
    Macvlan,
    Vxlan,
    /// The collector is behind the watched interface.
    Watched,
}

const OUTS: [Out; 6] = [Out::Veth, Out::Nic, Out::Bridge, Out::Macvlan, Out::Vxlan, Out::Watched];

impl Out {
    fn remote(self, v6: bool) -> IpAddr {
        match (self, v6) {
            (Out::Watched, false) => PEER_IP.into(),
            (Out::Watched, true) => PEER_IP6.into(),
            (_, false) => COLLECTOR_IP.into(),
            (_, true) => COLLECTOR_IP6.into(),
        }
    }

    /// Where the collector receives.
    fn collector(self) -> (Ns, &'static str) {
        match self {
            Out::Watched => (Ns::Peer, "peer0"),
            Out::Vxlan => (Ns::Collector, "vx0"),
            _ => (Ns::Collector, "col0"),
        }
    }
}

impl fmt::Display for Out {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Out::Veth => "veth",
            Out::Nic => "no offloads (as a NIC)",
            Out::Bridge => "bridge",
            Out::Macvlan => "macvlan",
            Out::Vxlan => "vxlan device",
            Out::Watched => "the watched one",
        })
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    tunnel: &'static str,
    v6: bool,
    oversize: &'static str,
    /// The watched link carries super-packets with unfinished checksums, as between containers.
    offloads: bool,
    out: Out,
}

/// Each tunnel with each family, oversize mode and kind of watched link; and each out interface with each of these.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (shift, tunnel) in TUNNELS.into_iter().enumerate() {
        for n in 0..8 {
            let (v6, oversize) = (n & 4 != 0, if n & 2 != 0 { "fragment" } else { "segment" });
            cases.push(Case { tunnel, v6, oversize, offloads: n & 1 != 0, out: OUTS[(n + shift) % OUTS.len()] });
        }
    }
    cases
}

#[test]
fn every_out_interface_is_tried_with_every_tunnel_family_oversize_mode_and_kind_of_watched_link() {
    let pairs =
        |with: fn(&Case) -> String| cases().iter().map(|case| (case.out, with(case))).collect::<BTreeSet<_>>().len();
    assert_eq!(pairs(|case| case.tunnel.into()), OUTS.len() * TUNNELS.len());
    assert_eq!(pairs(|case| case.oversize.into()), OUTS.len() * 2);
    assert_eq!(pairs(|case| case.v6.to_string()), OUTS.len() * 2);
    assert_eq!(pairs(|case| case.offloads.to_string()), OUTS.len() * 2);
}

// ---- the lab ----

const DOWNLOADS: usize = 40;

/// 4 to 20 KB: from three segments to more than the first window.
fn sizes() -> Vec<usize> {
    (0..DOWNLOADS).map(|n| 4_000 + n * 16_000 / (DOWNLOADS - 1)).collect()
}

/// The outer addresses leave out0.
fn take_addresses(lab: &Lab) {
    lab.host(&["ip", "address", "flush", "dev", "out0"]);
}

/// Another interface has the outer addresses as out0 has them in the lab.
fn give_addresses(lab: &Lab, dev: &str) {
    let mac = mac_text(COLLECTOR_MAC);
    let lines = [
        format!("link set dev {dev} addrgenmode none"),
        format!("link set dev {dev} up"),
        format!("address add {OUT_IP}/24 dev {dev}"),
        format!("address add {OUT_IP6}/64 dev {dev} nodad"),
        format!("neigh replace {COLLECTOR_IP} lladdr {mac} nud permanent dev {dev}"),
        format!("neigh replace {COLLECTOR_IP6} lladdr {mac} nud permanent dev {dev}"),
    ];
    lab.ip_batch(Ns::Host, &lines.join("\n"));
    lab.wait_for_address(Ns::Host, dev, OUT_IP6);
}

/// The lab with another kind of out interface; those above out0 find a veth there as it is made.
fn make_out(lab: &Lab, out: Out) {
    if !matches!(out, Out::Nic | Out::Watched) {
        lab.host(&["ethtool", "-K", "out0", "tx", "on", "sg", "on", "tso", "on", "gso", "on"]);
    }
    match out {
        Out::Veth | Out::Nic | Out::Watched => {}
        Out::Bridge => {
            let bridge = format!("link add br0 address {} type bridge mcast_snooping 0", mac_text(OUT_MAC));
            lab.ip_batch(Ns::Host, &format!("{bridge}\nlink set dev out0 master br0"));
            take_addresses(lab);
            give_addresses(lab, "br0");
        }
        Out::Macvlan => {
            lab.ip_batch(Ns::Host, "link add link out0 name mv0 address 02:00:00:00:02:03 type macvlan");
            take_addresses(lab);
            give_addresses(lab, "mv0");
        }
        Out::Vxlan => make_vxlan(lab),
    }
}

/// A VXLAN of the kernel between the two ends of the out link, on addresses of its own.
fn make_vxlan(lab: &Lab) {
    let (near, far) = ("203.0.113.1", "203.0.113.2");
    take_addresses(lab);
    let ends = [
        (Ns::Host, "out0", (near, OUT_MAC), (far, COLLECTOR_MAC)),
        (Ns::Collector, "col0", (far, COLLECTOR_MAC), (near, OUT_MAC)),
    ];
    for (ns, dev, (local, mac), (remote, other)) in ends {
        let (mac, other) = (mac_text(mac), mac_text(other));
        let lines = [
            format!("address add {local}/24 dev {dev}"),
            format!("neigh replace {remote} lladdr {other} nud permanent dev {dev}"),
            format!("link add vx0 address {mac} type vxlan id 9 local {local} remote {remote} dstport 8472 dev {dev}"),
            "link set dev vx0 addrgenmode none".into(),
            "link set dev vx0 up".into(),
        ];
        lab.ip_batch(ns, &lines.join("\n"));
    }
    // Else the collector's kernel would put copies together again, with unfinished checksums.
    lab.collector(&["ethtool", "-K", "vx0", "gro", "off"]);
    give_addresses(lab, "vx0");
}

/// An interface receives as a NIC does, in one queue. A veth has one for each CPU that sends to it: measured, even what
/// the kernel's mirred sends in order is then captured out of order in a third of the runs.
fn receive_in_order(lab: &Lab, ns: Ns, dev: &str) {
    let script = format!("mount -t sysfs sysfs /sys\necho 1 > /sys/class/net/{dev}/queues/rx-0/rps_cpus");
    lab.run(ns, &["unshare", "--mount", "sh", "-euc", &script]);
}

/// The frames of a capture that a filter takes, with their times, beside it.
fn filtered(capture: &Path, filter: &str) -> PathBuf {
    let to = capture.with_extension("filtered");
    succeed(Command::new("tcpdump").args(["-Z", "root", "-r"]).arg(capture).arg("-w").arg(&to).arg(filter));
    to
}

/// The downloads as the wire had them and as the collector received them.
struct Captured {
    wire: PathBuf,
    copies: PathBuf,
    pages: Vec<Page>,
}

fn site(lab: &Lab) -> Site {
    receive_in_order(lab, Ns::Collector, "col0");
    receive_in_order(lab, Ns::Peer, "peer0");
    lab.serve(&sizes())
}

fn captured(lab: &Lab, out: Out) -> Captured {
    let site = site(lab);
    let (ns, dev) = out.collector();
    let mut wire = lab.capture(Ns::Peer, "peer0", Direction::Both);
    let mut copies = lab.capture(ns, dev, Direction::In);
    lab.download(&site);
    Captured {
        wire: filtered(wire.finish(), &format!("tcp port {HTTP_PORT}")),
        copies: filtered(copies.finish(), "not tcp and not icmp and not icmp6 and not arp"),
        pages: site.pages.clone(),
    }
}

fn up(lab: &Lab, case: Case) {
    let remote = case.out.remote(case.v6).to_string();
    let tunnel: Vec<&str> = case.tunnel.split(' ').collect();
    let more = ["--oversize", case.oversize, "--remote", &remote];
    lab.said(&[&["up", "eth0", "--tunnel"], &tunnel[..], &more].concat()).ok();
}

fn lab_for(case: Case) -> Lab {
    Lab::with(Options { watched_offloads_off: !case.offloads, ..Options::default() })
}

// ---- what they see ----

/// How much of the wire a receiver has seen in the copies.
struct Row {
    receiver: &'static str,
    case: Case,
    transactions: usize,
    files: usize,
    /// And nothing else, nor anything twice.
    same: bool,
}

impl Row {
    fn read(receiver: &Receiver, case: Case, captured: &Captured) -> Row {
        let unfinished = if case.offloads { Checksums::Any } else { Checksums::Validated };
        let wire = (receiver.read)(&captured.wire, unfinished);
        let sent = Reading::of_pages(&captured.pages);
        assert!(wire == sent, "{} reads the wire itself, {case:?}: {}", receiver.name, first_difference(&wire, &sent));
        let copies = (receiver.read)(&captured.copies, Checksums::Validated);
        Row::of(receiver.name, case, &copies, &wire)
    }

    fn of(receiver: &'static str, case: Case, copies: &Reading, wire: &Reading) -> Row {
        let count = |seen: &[String], wire: &[String]| wire.iter().filter(|one| seen.contains(one)).count();
        let transactions = count(&copies.transactions, &wire.transactions);
        let files = count(&copies.files, &wire.files);
        Row { receiver, case, transactions, files, same: copies == wire }
    }
}

const HEADING: &str = "
| receiver | tunnel | outer | oversize | out interface | watched link | transactions | files whole |
|---|---|---|---|---|---|---|---|";

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Case { tunnel, v6, oversize, offloads, out } = self.case;
        let outer = if v6 { "IPv6" } else { "IPv4" };
        let link = if offloads { "super-packets" } else { "wire frames" };
        let (transactions, files) = (self.transactions, self.files);
        write!(f, "| {} | {tunnel} | {outer} | {oversize} | {out} | {link} ", self.receiver)?;
        write!(f, "| {transactions} of {DOWNLOADS} | {files} of {DOWNLOADS} |")
    }
}

/// What a reading lacks or has besides, for a message.
fn first_difference(seen: &Reading, sent: &Reading) -> String {
    let pairs = [(&seen.transactions, &sent.transactions), (&seen.files, &sent.files)];
    let differs = |(seen, sent): &(&Vec<String>, &Vec<String>)| seen != sent;
    let Some((seen, sent)) = pairs.into_iter().find(differs) else { return "no difference".into() };
    let missing = sent.iter().find(|one| !seen.contains(one));
    let unexpected = seen.iter().find(|one| !sent.contains(one));
    format!("{} of {}, first missing {missing:?}, first unexpected {unexpected:?}", seen.len(), sent.len())
}

/// A receiver's files whole, by out interface and tunnel: short enough for the docs.
fn print_summary(receiver: &Receiver, rows: &[Row]) {
    println!("\n| {}: files whole, out through | {} |", receiver.name, receiver.tunnels.join(" | "));
    println!("|---|{}", "---|".repeat(receiver.tunnels.len()));
    for out in OUTS {
        let cell = |tunnel: &&str| {
            let of_cell = |row: &&Row| (row.receiver, row.case.out, row.case.tunnel) == (receiver.name, out, tunnel);
            let rows: Vec<&Row> = rows.iter().filter(of_cell).collect();
            format!("{} of {}", rows.iter().map(|row| row.files).sum::<usize>(), rows.len() * DOWNLOADS)
        };
        println!("| {out} | {} |", receiver.tunnels.iter().map(cell).collect::<Vec<_>>().join(" | "));
    }
}

/// The captures of a case stay for a look at them.
fn keep(case: Case, captured: &Captured) -> PathBuf {
    let family = if case.v6 { "ipv6" } else { "ipv4" };
    let link = if case.offloads { "super-packets" } else { "wire-frames" };
    let tunnel = case.tunnel.replace(" --", "-");
    let name = format!("{tunnel}-{family}-{}-{:?}-{link}", case.oversize, case.out).to_lowercase();
    let dir = roots().join("failed").join(name);
    fs::create_dir_all(&dir).expect("make a directory for what failed");
    for (from, to) in [(&captured.wire, "wire.pcap"), (&captured.copies, "copies.pcap")] {
        fs::copy(from, dir.join(to)).expect("keep a capture");
    }
    dir
}

#[test]
fn every_transaction_and_every_file_of_the_wire_is_whole_in_the_copies() {
    let _ = fs::remove_dir_all(roots().join("failed")); // an earlier run's
    println!("{HEADING}");
    let (mut rows, mut failed) = (Vec::new(), Vec::new());
    for case in cases() {
        let lab = lab_for(case);
        make_out(&lab, case.out);
        up(&lab, case);
        let captured = captured(&lab, case.out);
        let readers = RECEIVERS.iter().filter(|receiver| receiver.tunnels.contains(&case.tunnel));
        let read: Vec<Row> = readers.map(|receiver| Row::read(receiver, case, &captured)).collect();
        read.iter().for_each(|row| println!("{row}"));
        if !read.iter().all(|row| row.same) {
            failed.push(keep(case, &captured));
        }
        rows.extend(read);
    }
    RECEIVERS.iter().for_each(|receiver| print_summary(receiver, &rows));
    assert!(failed.is_empty(), "{} of {} cases are not as on the wire, see {failed:#?}", failed.len(), cases().len());
}

// ---- whether lab and receivers can be trusted ----

/// What the kernel's own mirred and tunnel device copy is in order: what is lost is lost by the lab.
#[test]
fn the_kernels_own_copies_are_whole() {
    for offloads in [false, true] {
        let case = Case { tunnel: "vxlan", v6: false, oversize: "fragment", offloads, out: Out::Nic };
        let lab = lab_for(case);
        mirror_by_the_kernel(&lab);
        let captured = captured(&lab, case.out);
        for receiver in RECEIVERS {
            let row = Row::read(&receiver, case, &captured);
            assert!(row.same, "{row}");
        }
    }
}

fn mirror_by_the_kernel(lab: &Lab) {
    let ends = format!("local {OUT_IP} remote {COLLECTOR_IP} dstport 4789 dev out0");
    let link = format!("link add vxlan0 type vxlan id 1 {ends}\nlink set dev vxlan0 addrgenmode none");
    lab.ip_batch(Ns::Host, &format!("{link}\nlink set dev vxlan0 up"));
    // A tunnel device passes unfinished checksums on unless told not to.
    lab.host(&["ethtool", "-K", "vxlan0", "tx", "off"]);
    lab.host(&["tc", "qdisc", "add", "dev", "eth0", "clsact"]);
    for hook in ["ingress", "egress"] {
        let every = ["protocol", "all", "u32", "match", "u32", "0", "0"];
        let mirred = ["action", "mirred", "egress", "mirror", "dev", "vxlan0"];
        lab.host(&[&["tc", "filter", "add", "dev", "eth0", hook], &every[..], &mirred].concat());
    }
}

/// Else the table would say nothing.
#[test]
fn a_missing_frame_and_a_wrong_checksum_are_seen() {
    let case = Case { tunnel: "vxlan", v6: false, oversize: "fragment", offloads: false, out: Out::Nic };
    let lab = lab_for(case);
    let captured = captured(&lab, case.out);
    let frames = pcap::read(&captured.wire);
    let damaged = lab.dir().join("damaged.pcap");
    let full = frames.iter().position(|frame| frame.len() == 1514).expect("a full segment");
    let mut without = frames.clone();
    without.remove(full);
    let mut wrong = frames;
    wrong[full][1500] ^= 1;
    for receiver in RECEIVERS {
        for frames in [&without, &wrong] {
            pcap::write(&damaged, frames);
            let seen = (receiver.read)(&damaged, Checksums::Validated);
            assert_eq!(seen.files.len(), DOWNLOADS - 1, "{}: {seen:?}", receiver.name);
        }
    }
}
