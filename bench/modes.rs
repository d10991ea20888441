//! The ways to copy packets that are compared: starting and ending each.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::lab::{COLLECTOR_IP, COLLECTOR_MAC, Ns, OUT_IP, OUT_MAC, PATIENCE, PEER_IP, mac_text, poll};
use crate::rig::{Load, Rig, SNIFCTL, Sample, succeed};

/// One way to copy, or none.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Mode {
    pub name: &'static str,
    pub what: What,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum What {
    Nothing,
    /// A program of [`Rig::programs`] at both hooks.
    Program(&'static str),
    /// tc's mirred action at both hooks, to this interface.
    Mirred(&'static str),
    /// nftables' dup statement at both netdev hooks, to vxlan0.
    NftDup,
    /// tcpdump, and socat to the network.
    Userspace,
    /// A session with these options, by this program.
    Snifctl {
        program: String,
        words: Vec<String>,
        /// Options of the sessions that it replaces, one after the other; their programs' parts stay.
        before: &'static [&'static [&'static str]],
    },
    /// A session of the collector's network namespace that watches eth0 in ours, as a node does a pod's: copies leave by the
    /// collector's end of that pair.
    Elsewhere(Vec<String>),
}

impl Mode {
    pub(crate) fn new(name: &'static str, what: What) -> Mode {
        Mode { name, what }
    }

    /// snifctl on eth0 with these options, and the collector as its remote unless they name others.
    pub(crate) fn snifctl(name: &'static str, options: &[&str]) -> Mode {
        let collector = COLLECTOR_IP.to_string();
        let remote = ["--remote", &collector];
        let remote = if options.contains(&"--remote") { &[] } else { &remote[..] };
        let words = [&["eth0"], options, remote].concat().into_iter().map(String::from).collect();
        Mode::new(name, What::Snifctl { program: SNIFCTL.into(), words, before: &[] })
    }

    /// snifctl in another network namespace than eth0.
    pub(crate) fn elsewhere(name: &'static str, options: &[&str]) -> Mode {
        Mode::new(name, What::Elsewhere(options.iter().map(|word| word.to_string()).collect()))
    }

    /// The same by another build, for a comparison within one run: `BASELINE=PATH make bench`.
    pub(crate) fn baseline(name: &'static str, options: &[&str]) -> Option<Mode> {
        let other = std::env::var("SNIFCTL_BASELINE").ok()?;
        let mut mode = Mode::snifctl(name, options);
        if let What::Snifctl { program, .. } = &mut mode.what {
            *program = other;
        }
        Some(mode)
    }

    /// The same, whose programs have every part that there is, as those that were compiled before have.
    pub(crate) fn whole(name: &'static str, options: &[&str]) -> Mode {
        let mut mode = Mode::snifctl(name, options);
        if let What::Snifctl { before, .. } = &mut mode.what {
            *before = &[
                &["--tunnel", "vxlan", "--spread", "flow"],
                &["--tunnel", "erspan3", "--snaplen", "100", "--sample", "1/2", "--max-rate", "1gbit"],
            ];
        }
        mode
    }

    /// Where its copies arrive.
    fn sink(&self) -> (Ns, &'static str) {
        let peer = PEER_IP.to_string();
        match &self.what {
            What::Elsewhere(_) => (Ns::Host, "out0"),
            What::Snifctl { words, .. } if words.contains(&peer) => (Ns::Peer, "peer0"),
            _ => (Ns::Collector, "col0"),
        }
    }

    pub(crate) fn start<'a>(&self, rig: &'a Rig) -> Running<'a> {
        let mut running = Running { rig, what: self.what.clone(), sink: self.sink(), forwarder: None };
        match &self.what {
            What::Nothing => {}
            What::Program(section) => attach_program(rig, section),
            What::Mirred(dev) => attach_mirred(rig, dev),
            What::NftDup => {
                make_vxlan(rig);
                rig.lab.host(&["nft", NFT_DUP]);
            }
            What::Userspace => running.forwarder = Some(Forwarder::start(rig)),
            What::Snifctl { program, words, before } => {
                let words: Vec<&str> = words.iter().map(String::as_str).collect();
                let collector = COLLECTOR_IP.to_string();
                for options in *before {
                    let place = [program.as_str(), "up", "--replace", "eth0", "--remote", &collector];
                    rig.lab.host(&[&place[..], options].concat());
                }
                rig.lab.host(&[&[program.as_str(), "up", "--replace"], &words[..]].concat());
            }
            What::Elsewhere(words) => {
                let (out, host) = (OUT_IP.to_string(), format!("{}/eth0", origin(rig)));
                rig.drop_at(Ns::Host, "out0");
                let address = format!("{COLLECTOR_IP}/24");
                rig.lab.collector(&["ip", "address", "replace", &address, "dev", "col0"]);
                let neighbour = [&out, "lladdr", &mac_text(OUT_MAC), "nud", "permanent", "dev", "col0"];
                rig.lab.collector(&[&["ip", "neigh", "replace"], &neighbour[..]].concat());
                let words: Vec<&str> = words.iter().map(String::as_str).collect();
                rig.lab.collector(&[&[SNIFCTL, "up", &host, "--remote", &out], &words[..]].concat());
            }
        }
        running
    }

    /// Starts the mode, sends the load, ends the mode.
    pub(crate) fn measure(&self, rig: &Rig, load: &Load) -> Sample {
        let mut running = self.start(rig);
        let sample = running.measure(load);
        running.stop();
        sample
    }
}

/// A mode in force. Dropped, it is left to the lab's end, as after a panic.
pub(crate) struct Running<'a> {
    rig: &'a Rig,
    what: What,
    sink: (Ns, &'static str),
    forwarder: Option<Forwarder>,
}

impl Running<'_> {
    pub(crate) fn measure(&mut self, load: &Load) -> Sample {
        // tcpdump reads its last packets when its timeout of a second has passed.
        let settle = if self.forwarder.is_some() { Duration::from_millis(1300) } else { load.settle };
        let sample = self.rig.measure(&Load { settle, ..*load }, self.sink);
        Sample { copies: self.copies(), ..sample }
    }

    /// How many copies it says it has made.
    fn copies(&mut self) -> Option<f64> {
        match &self.what {
            What::Snifctl { program, .. } => Some(self.rig.sent_copies(Ns::Host, program)),
            What::Elsewhere(_) => Some(self.rig.sent_copies(Ns::Collector, SNIFCTL)),
            _ => self.forwarder.as_mut().map(Forwarder::end),
        }
    }

    pub(crate) fn stop(self) {
        let lab = &self.rig.lab;
        match self.what {
            What::Nothing => {}
            What::Program(_) => drop(lab.host(&["tc", "qdisc", "del", "dev", "eth0", "clsact"])),
            What::Mirred(dev) => {
                lab.host(&["tc", "qdisc", "del", "dev", "eth0", "clsact"]);
                if dev == "vxlan0" {
                    lab.host(&["ip", "link", "del", dev]);
                }
            }
            What::NftDup => {
                lab.host(&["nft", "delete", "table", "netdev", "bench"]);
                lab.host(&["ip", "link", "del", "vxlan0"]);
            }
            What::Userspace => {}
            What::Snifctl { program, .. } => drop(lab.host(&[&program, "down"])),
            What::Elsewhere(_) => {
                lab.collector(&[SNIFCTL, "down"]);
                lab.collector(&["ip", "address", "flush", "dev", "col0"]);
                lab.host(&["tc", "qdisc", "del", "dev", "out0", "clsact"]);
            }
        }
    }
}

/// What the host's network namespace is called from elsewhere.
fn origin(rig: &Rig) -> String {
    format!("netns:{}", rig.lab.ns_name(Ns::Host))
}

const NFT_DUP: &str = "table netdev bench {
    chain ingress { type filter hook ingress device eth0 priority 0; dup to vxlan0; }
    chain egress { type filter hook egress device eth0 priority 0; dup to vxlan0; }
}";

/// Why a mode cannot run on this machine.
pub(crate) fn lacking(rig: &Rig, mode: &Mode) -> Option<String> {
    if mode.what != What::NftDup {
        return None;
    }
    make_vxlan(rig);
    let tried = rig.lab.try_host(&["nft", NFT_DUP]);
    rig.lab.try_host(&["nft", "delete", "table", "netdev", "bench"]);
    rig.lab.host(&["ip", "link", "del", "vxlan0"]);
    let said = String::from_utf8_lossy(&tried.stderr).lines().next().unwrap_or("no message").to_string();
    (!tried.status.success()).then_some(format!("nft refuses dup in netdev hooks: {said}"))
}

fn attach_program(rig: &Rig, section: &str) {
    let section = format!("classifier/{section}");
    let program = ["bpf", "direct-action", "object-file", &rig.programs(), "section", &section];
    attach(rig, &[&program[..]]);
}

fn attach_mirred(rig: &Rig, dev: &str) {
    if dev == "vxlan0" {
        make_vxlan(rig);
    }
    let action = ["action", "mirred", "egress", "mirror", "dev", dev];
    // u32 is next best where the kernel has no matchall.
    let (matchall, u32) = (["matchall"], ["u32", "match", "u32", "0", "0"]);
    attach(rig, &[&[&matchall[..], &action].concat(), &[&u32[..], &action].concat()]);
}

/// Puts the first filter that the kernel knows at both hooks of eth0.
fn attach(rig: &Rig, filters: &[&[&str]]) {
    rig.lab.host(&["tc", "qdisc", "add", "dev", "eth0", "clsact"]);
    for hook in ["ingress", "egress"] {
        let place = ["tc", "filter", "add", "dev", "eth0", hook, "protocol", "all"];
        let attached = filters.iter().any(|filter| rig.lab.try_host(&[&place, *filter].concat()).status.success());
        assert!(attached, "tc takes none of {filters:?}");
    }
}

/// The kernel's own tunnel device, as cheap as it can be: no checksum, no learning, the neighbour known.
fn make_vxlan(rig: &Rig) {
    let ends = format!("local {OUT_IP} remote {COLLECTOR_IP} dev out0 dstport 4789");
    let device = format!("link add vxlan0 type vxlan id 1 {ends} ttl 64 noudpcsum nolearning");
    rig.lab.ip_batch(Ns::Host, &format!("{device}\nlink set dev vxlan0 addrgenmode none\nlink set dev vxlan0 up"));
}

/// More addresses behind the out link, all of the collector: 198.51.100.3 and on.
pub(crate) fn more_remotes(rig: &Rig, count: usize) -> Vec<String> {
    let [a, b, c, d] = COLLECTOR_IP.octets();
    let addresses: Vec<String> = (0..count).map(|n| format!("{a}.{b}.{c}.{}", usize::from(d) + n)).collect();
    let mac = mac_text(COLLECTOR_MAC);
    let lines = addresses.iter().map(|ip| format!("neigh replace {ip} lladdr {mac} nud permanent dev out0"));
    rig.lab.ip_batch(Ns::Host, &lines.collect::<Vec<_>>().join("\n"));
    addresses
}

/// What people do without the kernel's help. Dropping it ends it.
struct Forwarder {
    tcpdump: Child,
    socat: Child,
    /// What tcpdump has said.
    log: PathBuf,
}

impl Forwarder {
    fn start(rig: &Rig) -> Forwarder {
        let log: PathBuf = rig.lab.dir().join("tcpdump.err");
        let argv = ["tcpdump", "-p", "-n", "-i", "eth0", "-U", "-Z", "root", "-w", "-"];
        let mut tcpdump = rig.lab.command(Ns::Host, &argv);
        tcpdump.stdout(Stdio::piped()).stderr(File::create(&log).expect("make the file for tcpdump's messages"));
        let mut tcpdump = tcpdump.spawn().expect("start tcpdump");
        let stream = tcpdump.stdout.take().expect("a pipe");
        let to = format!("UDP-SENDTO:{COLLECTOR_IP}:4789");
        let mut socat: Command = rig.lab.command(Ns::Host, &["socat", "-u", "-b", "1400", "STDIN", &to]);
        let socat = socat.stdin(Stdio::from(stream)).spawn().expect("start socat");
        let listens = || fs::read_to_string(&log).is_ok_and(|text| text.contains("listening on")).then_some(());
        poll(PATIENCE, listens).expect("tcpdump never listened");
        std::thread::sleep(Duration::from_millis(100));
        Forwarder { tcpdump, socat, log }
    }

    /// Ends tcpdump, which then says how many packets it has passed on.
    fn end(&mut self) -> f64 {
        succeed(Command::new("kill").args(["-s", "INT", &self.tcpdump.id().to_string()]));
        self.tcpdump.wait().expect("wait for tcpdump");
        let text = fs::read_to_string(&self.log).expect("read what tcpdump said");
        let count = text.lines().find_map(|line| line.strip_suffix(" packets captured"));
        count.expect("a line of tcpdump").trim().parse().expect("a number of packets")
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        for child in [&mut self.tcpdump, &mut self.socat] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
