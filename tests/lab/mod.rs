//! A sandbox of three network namespaces in which the built `snifctl` meets a real kernel and real packets.
//!
//! ```text
//!     peer namespace            host namespace                               collector namespace
//!   ┌─────────────────┐       ┌────────────────────────────────────┐       ┌──────────────────┐
//!   │ peer0           │ veth  │ eth0                          out0 │ veth  │ col0             │
//!   │ 192.0.2.2/24    ├───────┤ 192.0.2.1/24       198.51.100.1/24 ├───────┤ (no address)     │
//!   │ 2001:db8::2/64  │       │ 2001:db8::1/64   2001:db8:1::1/64  │       │                  │
//!   └─────────────────┘       └────────────────────────────────────┘       └──────────────────┘
//!        the watched link: default offloads           the out link: no offload, so it looks like a wire
//! ```
//!
//! Only what a test sends appears on the links: every neighbour is permanent, nothing is autoconfigured, no multicast
//! group is reported, and the collector has no address, so that it never answers a tunnel packet with an ICMP error.
//! (To have it answer, give col0 the address [`COLLECTOR_IP`].)
#![allow(dead_code)] // every test binary compiles the whole lab and uses a part of it

pub(crate) mod bare;
pub(crate) mod capture;
pub(crate) mod chaos;
pub(crate) mod check;
pub(crate) mod cluster;
pub(crate) mod collect;
pub(crate) mod collect_case;
pub(crate) mod corpus;
pub(crate) mod decode;
pub(crate) mod faults;
pub(crate) mod filters;
pub(crate) mod frames;
pub(crate) mod http;
pub(crate) mod judge;
pub(crate) mod kills;
pub(crate) mod links;
pub(crate) mod nobody;
pub(crate) mod order;
pub(crate) mod order_case;
pub(crate) mod pairs;
pub(crate) mod pcap;
pub(crate) mod pcapng;
pub(crate) mod pods;
pub(crate) mod remotes;
pub(crate) mod senders;
pub(crate) mod sessions;
pub(crate) mod sshd;
pub(crate) mod status;
pub(crate) mod strangers;
pub(crate) mod super_packets;
pub(crate) mod talk;
pub(crate) mod traffic;
pub(crate) mod tunnel_case;
pub(crate) mod tunnels;
pub(crate) mod watcher;

use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use frames::Mac;

pub(crate) const HOST_MAC: Mac = [0x02, 0, 0, 0, 0x01, 0x01];
pub(crate) const PEER_MAC: Mac = [0x02, 0, 0, 0, 0x01, 0x02];
pub(crate) const OUT_MAC: Mac = [0x02, 0, 0, 0, 0x02, 0x01];
pub(crate) const COLLECTOR_MAC: Mac = [0x02, 0, 0, 0, 0x02, 0x02];

pub(crate) const HOST_IP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub(crate) const PEER_IP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
pub(crate) const OUT_IP: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
pub(crate) const COLLECTOR_IP: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);

pub(crate) const HOST_IP6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
pub(crate) const PEER_IP6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);
pub(crate) const OUT_IP6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1);
pub(crate) const COLLECTOR_IP6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2);

/// Built for a guest of tests/kernels/run: its kernel has every module, and it is emulated, ten times slower.
pub(crate) const GUEST: bool = option_env!("SNIFCTL_GUEST").is_some();

/// How long anything in the lab may take before the test fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(if GUEST { 40 } else { 10 });

/// One of the lab's three namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ns {
    /// Where snifctl runs: eth0 (watched) and out0.
    Host,
    /// The other end of the watched link: peer0.
    Peer,
    /// The other end of the out link: col0.
    Collector,
}

impl Ns {
    const ALL: [Ns; 3] = [Ns::Host, Ns::Peer, Ns::Collector];
}

/// What a test may want different from the default lab.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// MTU of eth0 and peer0 (veth takes 68 to 65535).
    pub watched_mtu: u32,
    /// MTU of out0 and col0.
    pub out_mtu: u32,
    /// The peer sends real wire frames with finished checksums; the host keeps its offloads.
    pub peer_offloads_off: bool,
    /// Neither end of the watched link offloads anything.
    pub watched_offloads_off: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { watched_mtu: 1500, out_mtu: 1500, peer_offloads_off: false, watched_offloads_off: false }
    }
}

/// Three namespaces and their links. Dropping it ends what still runs in them and removes them, also after a panic.
pub(crate) struct Lab {
    name: String,
    dir: tempfile::TempDir,
    serial: AtomicU16,
    /// Process ids of the captures started, also of those that have ended.
    captures: Mutex<Vec<u32>>,
}

impl Lab {
    /// The topology drawn above, MTU 1500 everywhere.
    pub(crate) fn new() -> Lab {
        Lab::with(Options::default())
    }

    /// The topology drawn above with other MTUs or offloads.
    pub(crate) fn with(options: Options) -> Lab {
        let dir = tempfile::Builder::new().prefix("sniflab").tempdir().expect("make the lab's directory");
        // The value comes first: should a later step panic, its Drop removes what is already there.
        let lab =
            Lab { name: format!("snif{:08x}", random()), dir, serial: AtomicU16::new(0), captures: Mutex::default() };
        feed(Command::new("ip").args(["-batch", "-"]), &lab.each_ns(|ns| format!("netns add {ns}")));
        for ns in Ns::ALL {
            // A dead namespace may have had this one's number, and have left its pins.
            lab.remove_pins(ns);
            lab.run(ns, &["sh", "-euc", QUIET]);
        }
        lab.make_links(&options);
        lab.answer_arp();
        lab.set_offloads(&options);
        lab
    }

    /// Runs a command in the host namespace; panics with its stderr unless it succeeds.
    #[track_caller]
    pub(crate) fn host(&self, argv: &[&str]) -> Output {
        self.run(Ns::Host, argv)
    }

    /// Runs a command in the peer namespace; panics with its stderr unless it succeeds.
    #[track_caller]
    pub(crate) fn peer(&self, argv: &[&str]) -> Output {
        self.run(Ns::Peer, argv)
    }

    /// Runs a command in the collector namespace; panics with its stderr unless it succeeds.
    #[track_caller]
    pub(crate) fn collector(&self, argv: &[&str]) -> Output {
        self.run(Ns::Collector, argv)
    }

    /// Runs a command in a namespace; panics with its stderr unless it succeeds.
    #[track_caller]
    pub(crate) fn run(&self, ns: Ns, argv: &[&str]) -> Output {
        check_output(&format!("{ns:?}: {}", argv.join(" ")), self.command(ns, argv).output())
    }

    /// Runs a command in the host namespace; its failure is the caller's to judge.
    pub(crate) fn try_host(&self, argv: &[&str]) -> Output {
        self.try_run(Ns::Host, argv)
    }

    /// Runs a command in a namespace; its failure is the caller's to judge.
    pub(crate) fn try_run(&self, ns: Ns, argv: &[&str]) -> Output {
        self.command(ns, argv).output().unwrap_or_else(|err| panic!("could not start {argv:?}: {err}"))
    }

    /// A command that will run in a namespace, in the C locale and with nothing on stdin.
    pub(crate) fn command(&self, ns: Ns, argv: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(self.enter(ns)).arg("--").args(argv).env("LC_ALL", "C").stdin(Stdio::null());
        command
    }

    /// The built snifctl, to run in the host namespace.
    pub(crate) fn snifctl<I, S>(&self, args: I) -> assert_cmd::Command
    where
        I: IntoIterator<Item = S>,
        S: AsRef<std::ffi::OsStr>,
    {
        let mut command = assert_cmd::Command::new("nsenter");
        command.arg(self.enter(Ns::Host)).arg("--").arg(env!("CARGO_BIN_EXE_snifctl")).args(args);
        command.timeout(Duration::from_secs(if GUEST { 240 } else { 60 }));
        command
    }

    /// The namespace's name, `/run/netns/NAME`.
    pub(crate) fn ns_name(&self, ns: Ns) -> String {
        let suffix = match ns {
            Ns::Host => "h",
            Ns::Peer => "p",
            Ns::Collector => "c",
        };
        format!("{}{suffix}", self.name)
    }

    /// The namespace's file, for `nsenter --net=`.
    pub(crate) fn ns_path(&self, ns: Ns) -> PathBuf {
        Path::new("/run/netns").join(self.ns_name(ns))
    }

    /// The namespace's inode, by which snifctl keys its pins.
    pub(crate) fn ns_inode(&self, ns: Ns) -> u64 {
        fs::metadata(self.ns_path(ns)).expect("the namespace's file").ino()
    }

    /// A directory of the lab's own, gone with it.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Packets that an interface has received and sent since it was made: (rx, tx).
    pub(crate) fn packets(&self, ns: Ns, iface: &str) -> (u64, u64) {
        let out = self.run(ns, &["ip", "-j", "-s", "link", "show", "dev", iface]);
        let links: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON of ip link");
        let count = |way: &str| links[0]["stats64"][way]["packets"].as_u64().expect("a packet counter");
        (count("rx"), count("tx"))
    }

    /// A path in the lab's directory that no other call has got.
    pub(crate) fn fresh_path(&self, name: &str) -> PathBuf {
        self.dir().join(format!("{}-{name}", self.next_serial()))
    }

    fn next_serial(&self) -> u16 {
        self.serial.fetch_add(1, Ordering::Relaxed)
    }

    fn enter(&self, ns: Ns) -> String {
        format!("--net={}", self.ns_path(ns).display())
    }

    /// One line for each namespace.
    fn each_ns(&self, line: impl Fn(String) -> String) -> String {
        Ns::ALL.map(|ns| line(self.ns_name(ns))).join("\n")
    }

    fn make_links(&self, options: &Options) {
        let pair = |near: &str, near_mac, far: &str, far_mac, far_ns, mtu| {
            let (near_mac, far_mac, far_ns) = (mac_text(near_mac), mac_text(far_mac), self.ns_name(far_ns));
            let end = format!("name {far} address {far_mac} mtu {mtu} netns {far_ns}");
            format!("link add {near} address {near_mac} mtu {mtu} type veth peer {end}")
        };
        let host = [
            "link set dev lo up".into(),
            pair("eth0", HOST_MAC, "peer0", PEER_MAC, Ns::Peer, options.watched_mtu),
            pair("out0", OUT_MAC, "col0", COLLECTOR_MAC, Ns::Collector, options.out_mtu),
            link_up("eth0", HOST_IP, HOST_IP6),
            link_up("out0", OUT_IP, OUT_IP6),
        ];
        self.ip_batch(Ns::Host, &host.join("\n"));
        let peer = link_up("peer0", PEER_IP, PEER_IP6);
        self.ip_batch(Ns::Peer, &format!("link set dev lo up\n{peer}"));
        self.ip_batch(Ns::Collector, "link set dev lo up\nlink set dev col0 addrgenmode none\nlink set dev col0 up");
    }

    /// Ends the silence of [`link_up`], and makes every neighbour permanent.
    fn answer_arp(&self) {
        self.wait_for_address(Ns::Host, "eth0", HOST_IP6);
        self.wait_for_address(Ns::Host, "out0", OUT_IP6);
        self.wait_for_address(Ns::Peer, "peer0", PEER_IP6);
        let host = [
            arp_on("eth0"),
            arp_on("out0"),
            neighbours("eth0", PEER_MAC, PEER_IP, PEER_IP6),
            neighbours("out0", COLLECTOR_MAC, COLLECTOR_IP, COLLECTOR_IP6),
        ];
        self.ip_batch(Ns::Host, &host.join("\n"));
        self.ip_batch(Ns::Peer, &[arp_on("peer0"), neighbours("peer0", HOST_MAC, HOST_IP, HOST_IP6)].join("\n"));
    }

    /// Waits until the kernel has put an IPv6 address to use, which it does some time after the carrier came; the
    /// address's local route is the sign.
    pub(crate) fn wait_for_address(&self, ns: Ns, iface: &str, address: Ipv6Addr) {
        let in_use = poll(PATIENCE, || {
            let routes = self.run(ns, &["ip", "-6", "route", "show", "table", "local", "dev", iface]).stdout;
            String::from_utf8_lossy(&routes).contains(&format!("local {address} ")).then_some(())
        });
        in_use.unwrap_or_else(|| panic!("{ns:?}'s {iface} never put {address} to use"));
    }

    fn set_offloads(&self, options: &Options) {
        self.offloads_off(Ns::Host, "out0");
        self.offloads_off(Ns::Collector, "col0");
        if options.peer_offloads_off || options.watched_offloads_off {
            self.offloads_off(Ns::Peer, "peer0");
        }
        if options.watched_offloads_off {
            self.offloads_off(Ns::Host, "eth0");
        }
    }

    /// Makes an interface's sender finish every checksum and cut every super-packet, as a wire needs it.
    pub(crate) fn offloads_off(&self, ns: Ns, iface: &str) {
        let features = ["tx", "off", "rx", "off", "tso", "off", "gso", "off", "gro", "off", "sg", "off"];
        self.run(ns, &[&["ethtool", "-K", iface], &features[..]].concat());
    }

    /// Runs several `ip` commands, one a line, in one process.
    pub(crate) fn ip_batch(&self, ns: Ns, lines: &str) {
        feed(Command::new("ip").args(["-n", &self.ns_name(ns), "-batch", "-"]), lines);
    }

    /// Ends what still runs in the namespaces: a namespace lives as long as one of its processes.
    fn end_processes(&self, ns: Ns) {
        let Ok(out) = Command::new("ip").args(["netns", "pids", &self.ns_name(ns)]).output() else {
            return;
        };
        for pid in String::from_utf8_lossy(&out.stdout).split_whitespace() {
            signal(pid, "KILL");
        }
    }

    /// Removes the pins of a session that a failed test left up: bpffs outlives namespaces, and inodes are used again.
    fn remove_pins(&self, ns: Ns) {
        if let Ok(meta) = fs::metadata(self.ns_path(ns)) {
            let _ = fs::remove_dir_all(format!("/sys/fs/bpf/snifctl/{}", meta.ino()));
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for ns in Ns::ALL.into_iter().filter(|ns| self.ns_path(*ns).exists()) {
            self.end_processes(ns);
            self.remove_pins(ns);
        }
        let mut ip = Command::new("ip");
        ip.args(["-force", "-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        if let Ok(mut child) = ip.spawn() {
            let lines = self.each_ns(|ns| format!("netns del {ns}"));
            let _ = child.stdin.take().map(|mut stdin| stdin.write_all(lines.as_bytes()));
            let _ = child.wait();
        }
    }
}

/// Silences a namespace before it has links: no autoconfiguration, no forwarding, no reverse path filter.
const QUIET: &str = "
    cd /proc/sys/net
    echo 0 > ipv4/ip_forward
    for conf in all default; do
        echo 0 > ipv4/conf/$conf/rp_filter
        for key in accept_ra router_solicitations accept_dad dad_transmits; do
            echo 0 > ipv6/conf/$conf/$key
        done
    done";

/// The `ip -batch` lines that give a link its addresses and bring it up without a packet: with `arp off` the kernel
/// joins no solicited-node group, whose reports (MLD) would otherwise come at random times.
fn link_up(iface: &str, ip: Ipv4Addr, ip6: Ipv6Addr) -> String {
    let lines = [
        format!("link set dev {iface} addrgenmode none arp off"),
        format!("address add {ip}/24 dev {iface}"),
        format!("address add {ip6}/64 dev {iface} nodad"),
        format!("link set dev {iface} up"),
    ];
    lines.join("\n")
}

/// The lines that let a link answer ARP. While it is dormant: a ready link that gets ARP starts its addresses anew, and
/// joins the group after all.
fn arp_on(iface: &str) -> String {
    let steps = ["mode dormant", "state dormant", "arp on", "mode default", "state up"];
    steps.map(|step| format!("link set dev {iface} {step}")).join("\n")
}

fn neighbours(iface: &str, mac: Mac, ip: Ipv4Addr, ip6: Ipv6Addr) -> String {
    let entry = |address: String| format!("neigh replace {address} lladdr {} nud permanent dev {iface}", mac_text(mac));
    [entry(ip.to_string()), entry(ip6.to_string())].join("\n")
}

/// `02:00:00:00:01:01`
pub(crate) fn mac_text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Asks again every few milliseconds until there is an answer, at most `patience` long.
pub(crate) fn poll<T>(patience: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + patience;
    loop {
        let answer = ask();
        if answer.is_some() || Instant::now() >= deadline {
            return answer;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Sends a signal to one process; the standard library has no call for it.
pub(crate) fn signal(pid: impl ToString, name: &str) {
    let _ = Command::new("kill").args(["-s", name, &pid.to_string()]).stderr(Stdio::null()).status();
}

/// Runs a command with these lines on its stdin; panics with its stderr unless it succeeds.
#[track_caller]
fn feed(command: &mut Command, lines: &str) {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|err| panic!("could not start {command:?}: {err}"));
    child.stdin.take().expect("a pipe").write_all(lines.as_bytes()).expect("write to the command");
    check_output(&format!("{command:?}:\n{lines}"), child.wait_with_output());
}

#[track_caller]
fn check_output(what: &str, output: std::io::Result<Output>) -> Output {
    let output = output.unwrap_or_else(|err| panic!("could not start {what}: {err}"));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{what}\nended with {}\n{out}{err}", output.status);
    output
}

/// 32 random bits; `RandomState` is the standard library's only source of them.
fn random() -> u32 {
    RandomState::new().build_hasher().finish() as u32
}
