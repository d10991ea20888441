//! One combination of what can change the way that a copy takes, and the traffic that must come out of it in order.

use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::check::assert_same_frames;
use super::decode::verify_checksums;
use super::mac_text;
use super::order::{Missing, Seen, assert_in_order, joined};
use super::status::Session;
use super::traffic::Cpus;
use super::tunnels::{Kind, Tunnelled, decap, inner, packets_to};
use super::{COLLECTOR_IP, COLLECTOR_MAC, HOST_IP6, Lab, Ns, OUT_MAC, Options, PEER_IP, PEER_MAC};

/// By what the copies leave. The lab's out0 is beneath it, or eth0 itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Out {
    Veth,
    Bridge,
    Macvlan,
    Vxlan,
    Watched,
}

impl Out {
    pub(crate) const ALL: [Out; 5] = [Out::Veth, Out::Bridge, Out::Macvlan, Out::Vxlan, Out::Watched];
}

/// `--max-rate`: none, one that nothing reaches, one that drops some.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rate {
    None,
    Loose,
    Tight,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub tunnel: (&'static str, Kind, usize),
    pub oversize: &'static str,
    pub snaplen: Option<usize>,
    pub rate: Rate,
    /// Whether eth0, peer0 and out0 offload checksums and super-packets. An out0 that does not stands for a NIC.
    pub host_gso: bool,
    pub peer_gso: bool,
    pub out_gso: bool,
    pub watched_mtu: usize,
    pub out_mtu: usize,
    pub out: Out,
    pub remotes: usize,
    /// The filter changes meanwhile, between two that take everything.
    pub swaps: bool,
    /// The other end of the watched link is watched, in its network namespace.
    pub elsewhere: bool,
}

/// Name, what decodes it, bytes that it adds over IPv4.
pub(crate) const TUNNELS: [(&str, Kind, usize); 6] = [
    ("gre", Kind::Gre, 24),
    ("vxlan", Kind::Vxlan(4789), 36),
    ("geneve", Kind::Geneve(6081), 36),
    ("erspan1", Kind::Erspan1, 24),
    ("erspan2", Kind::Erspan2, 36),
    ("erspan3", Kind::Erspan3, 48),
];

pub(crate) const PLAIN: Case = Case {
    tunnel: TUNNELS[0],
    oversize: "segment",
    snaplen: None,
    rate: Rate::None,
    host_gso: false,
    peer_gso: false,
    out_gso: false,
    watched_mtu: 1500,
    out_mtu: 1500,
    out: Out::Veth,
    remotes: 1,
    swaps: false,
    elsewhere: false,
};

/// The kernel's own tunnel, when it is the out interface.
const VXLAN_PORT: u16 = 8472;
const VXLAN_BYTES: usize = 50;

/// Bodies of the HTTP responses, 4 to 20 KB.
const DOWNLOADS: [usize; 8] = [4096, 6161, 8229, 10301, 12377, 14449, 17011, 20480];

impl Case {
    /// Makes the lab, watches it, and panics unless all copies are in order and what is missing is counted.
    pub(crate) fn run(&self) {
        println!("{self:?}"); // shown with a failure
        let lab = self.lab();
        self.up(&lab);
        self.request_and_answer(&lab);
        self.download(&lab, &DOWNLOADS);
        lab.said(&["down"]).quietly_ok();
    }

    /// Pings of sizes around every threshold: each packet causes the next, so there is one order on any CPUs.
    pub(crate) fn request_and_answer(&self, lab: &Lab) {
        let passed = self.passed(lab, || {
            lab.ping_each(Ns::Host, PEER_IP.into(), &self.ping_sizes(42));
            lab.ping_each(Ns::Peer, HOST_IP6.into(), &self.ping_sizes(62));
        });
        self.assert_in_order(&passed);
    }

    /// HTTP downloads with both CPUs at work: a receiver must read the copies as it reads the wire. Where copies are
    /// dropped it cannot; there all is done by one CPU.
    pub(crate) fn download(&self, lab: &Lab, sizes: &[usize]) {
        if self.drops() {
            return self.download_on_one_cpu(lab, sizes);
        }
        lab.receive_each_flow_on_one_cpu();
        let passed = self.passed(lab, || download_both_ways(lab, Cpus::Two, sizes));
        self.assert_reads_the_same(lab, &passed);
    }

    /// HTTP downloads of which one CPU does everything, so that there is one order of all packets.
    pub(crate) fn download_on_one_cpu(&self, lab: &Lab, sizes: &[usize]) {
        let passed = self.passed(lab, || download_both_ways(lab, Cpus::One, sizes));
        self.assert_in_order(&passed);
        assert!(!self.must_drop() || passed.dropped > 0, "full frames are too many, or too large");
    }

    pub(crate) fn lab(&self) -> Lab {
        let below = if self.out == Out::Vxlan { VXLAN_BYTES } else { 0 };
        let (watched_mtu, out_mtu) = (self.watched_mtu as u32, (self.out_mtu + below) as u32);
        let lab = Lab::with(Options { watched_mtu, out_mtu, peer_offloads_off: !self.peer_gso, ..Options::default() });
        match (self.host_gso, self.peer_gso) {
            (true, _) => {}
            (false, false) => lab.offloads_off(Ns::Host, "eth0"),
            // Were all off, libpcap would not expect the peer's super-packets, and cut them.
            (false, true) => drop(lab.host(&["ethtool", "-K", "eth0", "tso", "off"])),
        }
        if self.out_gso {
            lab.host(&["ethtool", "-K", "out0", "tx", "on", "sg", "on", "tso", "on", "gso", "on"]);
        }
        lab.ip_batch(Ns::Host, &self.out_lines());
        lab
    }

    pub(crate) fn up(&self, lab: &Lab) {
        let remotes = self.remotes().iter().map(IpAddr::to_string).collect::<Vec<_>>().join(",");
        let elsewhere = format!("netns:{}/peer0", lab.ns_name(Ns::Peer));
        let watched = if self.elsewhere { &elsewhere } else { "eth0" };
        let mut args =
            vec!["up", watched, "--remote", &remotes, "--tunnel", self.tunnel.0, "--oversize", self.oversize];
        let snaplen = self.snaplen.map(|snaplen| snaplen.to_string());
        args.extend(snaplen.iter().flat_map(|snaplen| ["--snaplen", snaplen]));
        match self.rate {
            Rate::None => {}
            Rate::Loose => args.extend(["--max-rate", "50gbit"]),
            Rate::Tight => args.extend(["--max-rate", "1mbit"]),
        }
        lab.said(&args).ok();
    }

    /// Whether copies may be missing, each counted.
    pub(crate) fn drops(&self) -> bool {
        self.oversize == "drop" || self.rate == Rate::Tight
    }

    /// Whether full frames of the watched link cannot all be copied.
    fn must_drop(&self) -> bool {
        let too_large = self.oversize == "drop" && self.out_mtu - self.tunnel.2 < self.watched_mtu + 14;
        self.snaplen.is_none() && (too_large || self.rate == Rate::Tight)
    }

    /// The longest frame of which the copy fits the out interface.
    fn fitting(&self, remote: IpAddr) -> usize {
        self.out_mtu - self.tunnel.2 - if remote.is_ipv6() { 20 } else { 0 }
    }

    /// No copied frame is longer.
    fn limit(&self, remote: IpAddr) -> usize {
        let truncated = if self.oversize == "truncate" { self.fitting(remote) } else { usize::MAX };
        truncated.min(self.snaplen.unwrap_or(usize::MAX))
    }

    /// Data bytes of pings whose frames have sizes around every threshold; `headers` are the frame's other bytes.
    fn ping_sizes(&self, headers: usize) -> Vec<usize> {
        let largest = self.watched_mtu + 14;
        let fitting = [0, 20].map(|family| self.out_mtu - self.tunnel.2 - family);
        let two_fragments = 2 * ((self.out_mtu - 20) & !7) - (self.tunnel.2 - 20);
        let snaplen = self.snaplen.unwrap_or(60);
        let around =
            [60, snaplen, fitting[0], fitting[1], two_fragments, largest].map(|size| [size - 1, size, size + 1]);
        let mut sizes = around.concat();
        sizes.extend([750, fitting[0] + 8]);
        sizes.retain(|size| (headers..=largest).contains(size));
        // More than fits the link: IP fragments.
        sizes.push(largest + 1000);
        sizes.iter().map(|size| size - headers).collect()
    }

    // ---- the way out ----

    fn out_dev(&self) -> &'static str {
        match self.out {
            Out::Veth => "out0",
            Out::Bridge => "br1",
            Out::Macvlan => "mv1",
            Out::Vxlan => "vx1",
            Out::Watched => "eth0",
        }
    }

    /// Makes the out interface over out0, and its neighbours.
    fn out_lines(&self) -> String {
        let (mac, mtu) = (mac_text(OUT_MAC), self.out_mtu);
        let flush = "address flush dev out0\naddress flush dev out0 scope link";
        let made = match self.out {
            Out::Veth | Out::Watched => String::new(),
            Out::Bridge => format!(
                "{flush}\nlink add br1 address {mac} type bridge stp_state 0 mcast_snooping 0\n\
                 link set dev out0 master br1\nlink set dev br1 mtu {mtu}"
            ),
            Out::Macvlan => format!("{flush}\nlink add mv1 link out0 mtu {mtu} type macvlan mode bridge"),
            Out::Vxlan => format!(
                "link add vx1 mtu {mtu} type vxlan id 7 local 198.51.100.1 remote 198.51.100.2 dstport {VXLAN_PORT} \
                 srcport 49152 65535 noudpcsum dev out0"
            ),
        };
        [made, self.address_lines(), self.neighbour_lines()].join("\n")
    }

    fn address_lines(&self) -> String {
        if matches!(self.out, Out::Veth | Out::Watched) {
            return String::new();
        }
        let (dev, [v4, v6]) = (self.out_dev(), self.nets());
        format!(
            "link set dev {dev} addrgenmode none\naddress add {v4}1/24 dev {dev}\n\
             address add {v6}1/64 dev {dev} nodad\nlink set dev {dev} up"
        )
    }

    fn neighbour_lines(&self) -> String {
        let mac = mac_text(if self.out == Out::Watched { PEER_MAC } else { COLLECTOR_MAC });
        let remotes = self.remotes().into_iter();
        let line = |to| format!("neigh replace {to} lladdr {mac} nud permanent dev {}", self.out_dev());
        remotes.map(line).collect::<Vec<_>>().join("\n")
    }

    /// What the addresses on the out interface's link begin with.
    fn nets(&self) -> [&'static str; 2] {
        match self.out {
            Out::Watched => ["192.0.2.", "2001:db8::"],
            Out::Vxlan => ["203.0.113.", "2001:db8:2::"],
            _ => ["198.51.100.", "2001:db8:1::"],
        }
    }

    /// Nobody has these addresses, so nobody answers a copy.
    fn remotes(&self) -> Vec<IpAddr> {
        let [v4, v6] = self.nets();
        let all = [format!("{v4}7"), format!("{v4}8"), format!("{v6}7")].map(|text| text.parse().expect("an address"));
        all[..self.remotes].to_vec()
    }

    // ---- what passed ----

    /// Does something under the eyes of both captures, while the filter changes if that is asked for.
    fn passed(&self, lab: &Lab, traffic: impl FnOnce()) -> Passed {
        let before = lab.settled();
        // Copies are captured beneath devices that only pass them on: there they are on the wire.
        let mut watch = lab.watch_order(if self.out == Out::Watched { "eth0" } else { "out0" });
        if self.swaps {
            while_swapping(lab, traffic);
        } else {
            traffic();
        }
        let after = lab.settled();
        let sent = (0..self.remotes).map(|n| sent(&after, n) - sent(&before, n)).collect();
        Passed { seen: watch.stop(&self.remotes()), sent, dropped: after.drops() - before.drops() }
    }

    /// What was copied to a remote: finished, within the MTU, and as many as are counted.
    fn copies(&self, passed: &Passed, number: usize) -> Vec<Tunnelled> {
        let remote = self.remotes()[number];
        let below = match self.out {
            Out::Vxlan => inner(&decap(Kind::Vxlan(VXLAN_PORT), &packets_to(&passed.seen.out, COLLECTOR_IP.into()))),
            _ => passed.seen.out.clone(),
        };
        let copies = decap(self.tunnel.1, &packets_to(&below, remote));
        let longest = copies.iter().flat_map(|copy| &copy.outer.lens).max().copied().unwrap_or(0);
        assert!(longest <= self.out_mtu, "an outer packet of {longest} bytes");
        if self.limit(remote) == usize::MAX {
            copies.iter().for_each(|copy| verify_checksums(&copy.frame));
        }
        if self.has_wire_frames(remote) {
            assert_eq!(copies.len() as u64, passed.sent[number], "copies to {remote}, and those counted as sent");
        }
        copies
    }

    fn assert_in_order(&self, passed: &Passed) {
        let wire = &passed.seen.wire;
        let mut lost = 0;
        for (number, remote) in self.remotes().into_iter().enumerate() {
            let copies = self.copies(passed, number);
            assert!(copies.is_sorted_by_key(|copy| copy.header.sequence), "sequence numbers are in order");
            let copies = inner(&copies);
            let missing = match self.has_wire_frames(remote) {
                true => assert_in_order(wire, &copies, self.limit(remote)),
                false => assert_in_order(&joined(wire), &copies, self.limit(remote)),
            };
            assert!(self.drops() || missing == Missing::default(), "to {remote}: {missing:?} of {}", wire.len());
            assert!(self.drops() || !self.is_exact(remote) || *wire == copies, "byte by byte");
            lost += missing.whole as u64;
        }
        // Of a super-packet the capture does not tell how many frames it is.
        if !self.host_gso && !self.peer_gso && self.remotes().iter().all(|remote| self.has_wire_frames(*remote)) {
            assert_eq!(lost, passed.dropped, "copies that are missing, and drops that are counted");
        }
    }

    fn assert_reads_the_same(&self, lab: &Lab, passed: &Passed) {
        let wire = &passed.seen.wire;
        for (number, remote) in self.remotes().into_iter().enumerate() {
            let copies = inner(&self.copies(passed, number));
            if self.is_exact(remote) {
                assert_same_frames(wire, &copies);
            }
            let cut = self.limit(remote) < self.watched_mtu + 14;
            lab.assert_tcp_reads_the_same(wire, &copies, cut);
        }
        assert_eq!(passed.dropped, 0);
    }

    /// Whether copies of super-packets are the wire's own frames: not where `segment` mode cuts them smaller.
    fn has_wire_frames(&self, remote: IpAddr) -> bool {
        self.oversize != "segment" || self.fitting(remote) >= self.watched_mtu + 14
    }

    /// Whether the copies are byte for byte what the capture of the watched interface shows: finished frames.
    fn is_exact(&self, remote: IpAddr) -> bool {
        !self.host_gso && !self.peer_gso && self.has_wire_frames(remote) && self.limit(remote) >= self.watched_mtu + 14
    }
}

/// By the watched host, and some by the peer: the copies' super-packets are incoming and outgoing.
fn download_both_ways(lab: &Lab, cpus: Cpus, sizes: &[usize]) {
    let some: Vec<usize> = sizes.iter().copied().skip(1).step_by(3).collect();
    for (at, sizes) in [(Ns::Peer, sizes), (Ns::Host, &some)] {
        let server = lab.http_server(at, cpus, sizes);
        lab.download_all(&server, cpus);
    }
}

struct Passed {
    seen: Seen,
    /// Copies, as they are counted: to each remote, and dropped ones.
    sent: Vec<u64>,
    dropped: u64,
}

/// Changes the filter again and again while something happens. Nothing is lost, as both filters take everything.
fn while_swapping(lab: &Lab, traffic: impl FnOnce()) {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let swaps = scope.spawn(|| {
            let mut swaps = 0;
            while !done.load(Ordering::Relaxed) {
                lab.said(&["filter", "set", "ip or ip6 or arp"]).quietly_ok();
                lab.said(&["filter", "clear"]).quietly_ok();
                swaps += 2;
            }
            swaps
        });
        let ended = catch_unwind(AssertUnwindSafe(traffic));
        done.store(true, Ordering::Relaxed);
        assert!(swaps.join().expect("every swap succeeds") > 0);
        ended.unwrap_or_else(|panic| resume_unwind(panic));
    });
}

/// Copies to a remote, the one with this number in the request.
fn sent(session: &Session, remote: usize) -> u64 {
    session.remotes[remote].stat.pcnt
}
