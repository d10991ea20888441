//! Each kind of tunnel over each address family: the request, and what every copy's headers must say.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use super::capture::{Capture, Direction};
use super::frames;
use super::tunnels::{Erspan, Kind, Tunnelled, decap, packets_to};
use super::{COLLECTOR_IP, COLLECTOR_IP6, COLLECTOR_MAC, Lab, Ns, OUT_IP, OUT_IP6, OUT_MAC};

pub(crate) const MEGABYTES: usize = if super::GUEST { 200 << 10 } else { 2 << 20 };

/// A request and what it must look like on the wire.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tunnel {
    pub args: &'static [&'static str],
    pub kind: Kind,
    /// Outer IPv4 and tunnel header.
    pub overhead: usize,
    /// In copies of incoming and of outgoing frames.
    pub ids: [Option<u32>; 2],
    pub sequence: bool,
    pub checksum: bool,
}

pub(crate) const fn tunnel(args: &'static [&'static str], kind: Kind, overhead: usize) -> Tunnel {
    Tunnel { args, kind, overhead, ids: [None; 2], sequence: false, checksum: false }
}

impl Tunnel {
    pub(crate) const fn ids(self, ingress: u32, egress: u32) -> Tunnel {
        Tunnel { ids: [Some(ingress), Some(egress)], ..self }
    }

    pub(crate) const fn sequence(self) -> Tunnel {
        Tunnel { sequence: true, ..self }
    }

    pub(crate) const fn checksum(self) -> Tunnel {
        Tunnel { checksum: true, ..self }
    }

    pub(crate) fn cases(self) -> [Case; 2] {
        [false, true].map(|v6| Case { tunnel: self, v6 })
    }
}

pub(crate) const GRE: Tunnel = tunnel(&["gre"], Kind::Gre, 24);
pub(crate) const GRE_KEY: Tunnel = tunnel(&["gre", "--id", "4294967295"], Kind::Gre, 28).ids(u32::MAX, u32::MAX);
pub(crate) const GRE_SEQUENCE: Tunnel = tunnel(&["gre", "--sequence"], Kind::Gre, 28).sequence();
pub(crate) const GRE_BOTH: Tunnel =
    tunnel(&["gre", "--id", "0", "--egress-id", "43", "--sequence"], Kind::Gre, 32).ids(0, 43).sequence();
pub(crate) const VXLAN: Tunnel = tunnel(&["vxlan"], Kind::Vxlan(4789), 36).ids(1, 1);
pub(crate) const VXLAN_SUM: Tunnel =
    tunnel(&["vxlan", "--id", "16777215", "--egress-id", "5", "--udp-checksum"], Kind::Vxlan(4789), 36)
        .ids(0xff_ffff, 5)
        .checksum();
pub(crate) const GENEVE: Tunnel = tunnel(&["geneve"], Kind::Geneve(6081), 36).ids(1, 1);
pub(crate) const GENEVE_SUM: Tunnel =
    tunnel(&["geneve", "--id", "65536", "--egress-id", "0", "--udp-checksum"], Kind::Geneve(6081), 36)
        .ids(65536, 0)
        .checksum();
pub(crate) const GENEVE_TELL: Tunnel =
    tunnel(&["geneve", "--tell", "--id", "9", "--egress-id", "16777215"], Kind::Tell(6081), 60).ids(9, 0xff_ffff);
pub(crate) const GENEVE_TELL_SUM: Tunnel =
    tunnel(&["geneve", "--tell", "--udp-checksum"], Kind::Tell(6081), 60).ids(1, 1).checksum();
pub(crate) const ERSPAN1: Tunnel = tunnel(&["erspan1"], Kind::Erspan1, 24);
pub(crate) const ERSPAN2: Tunnel =
    tunnel(&["erspan2", "--id", "1023", "--egress-id", "7"], Kind::Erspan2, 36).ids(1023, 7).sequence();
pub(crate) const ERSPAN3: Tunnel =
    tunnel(&["erspan3", "--id", "513", "--egress-id", "1022"], Kind::Erspan3, 48).ids(513, 1022).sequence();

/// One tunnel over one address family.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub tunnel: Tunnel,
    pub v6: bool,
}

impl Case {
    pub(crate) fn remote(&self) -> IpAddr {
        if self.v6 { COLLECTOR_IP6.into() } else { COLLECTOR_IP.into() }
    }

    pub(crate) fn source(&self) -> IpAddr {
        if self.v6 { OUT_IP6.into() } else { OUT_IP.into() }
    }

    pub(crate) fn overhead(&self) -> usize {
        self.tunnel.overhead + if self.v6 { 20 } else { 0 }
    }

    /// This family's copies among what was captured.
    #[track_caller]
    pub(crate) fn copies(&self, packets: &[Vec<u8>]) -> Vec<Tunnelled> {
        decap(self.tunnel.kind, &packets_to(packets, self.remote()))
    }
}

/// Starts a session to the collector over both families at once, and returns what it warned of.
#[track_caller]
pub(crate) fn up(lab: &Lab, tunnel: Tunnel, more: &[&str]) -> String {
    up_to(lab, tunnel.args, &[COLLECTOR_IP.into(), COLLECTOR_IP6.into()], more)
}

#[track_caller]
pub(crate) fn up_to(lab: &Lab, tunnel: &[&str], remotes: &[IpAddr], more: &[&str]) -> String {
    let remotes = remotes.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(",");
    let args = [&["up", "eth0", "--remote", &remotes, "--tunnel"], tunnel, more].concat();
    lab.said(&args).ok().stderr
}

#[track_caller]
pub(crate) fn down(lab: &Lab) {
    lab.said(&["down"]).quietly_ok();
}

pub(crate) const VXLAN_SUMMED: Tunnel =
    tunnel(&["vxlan", "--udp-checksum"], Kind::Vxlan(4789), 36).ids(1, 1).checksum();

/// Makes one test per tunnel out of a function that takes one; the module's name and the test's are its sentence.
#[allow(unused_macros)]
macro_rules! for_each_tunnel {
    ($name:ident) => {
        for_each_tunnel!($name: gre GRE, gre_with_key GRE_KEY, gre_with_sequence GRE_SEQUENCE,
            gre_with_key_and_sequence GRE_BOTH, vxlan VXLAN, vxlan_with_checksum VXLAN_SUM, geneve GENEVE,
            geneve_with_checksum GENEVE_SUM, geneve_that_tells GENEVE_TELL,
            geneve_that_tells_with_checksum GENEVE_TELL_SUM, erspan1 ERSPAN1, erspan2 ERSPAN2, erspan3 ERSPAN3);
    };
    ($name:ident: $($test:ident $tunnel:ident),*) => {
        mod $name {
            $(#[test] fn $test() { super::$name(super::$tunnel); })*
        }
    };
}

#[allow(unused_imports)]
pub(crate) use for_each_tunnel;

pub(crate) fn set_out_mtu(lab: &Lab, mtu: u32) {
    for (ns, dev) in [(Ns::Host, "out0"), (Ns::Collector, "col0")] {
        lab.run(ns, &["ip", "link", "set", "dev", dev, "mtu", &mtu.to_string()]);
    }
}

pub(crate) fn dev_of(ns: Ns) -> &'static str {
    if ns == Ns::Peer { "peer0" } else { "eth0" }
}

/// The packets once no more come.
pub(crate) fn packets(lab: &Lab, capture: &mut Capture) -> Vec<Vec<u8>> {
    lab.settled();
    capture.settle();
    capture.stop()
}

/// What of frames sent one way reaches the collector, in order.
#[track_caller]
pub(crate) fn mirrored(lab: &Lab, from: Ns, frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut capture = lab.capture(Ns::Collector, "col0", Direction::In);
    lab.send(from, dev_of(from), frames);
    packets(lab, &mut capture)
}

#[track_caller]
pub(crate) fn assert_headers(case: Case, copies: &[Tunnelled], from: Ns) {
    let direction = usize::from(from == Ns::Host);
    for copy in copies {
        assert_outer(case, copy);
        assert_eq!(copy.header.id, case.tunnel.ids[direction], "{case:?}");
        let is_erspan = matches!(case.tunnel.kind, Kind::Erspan2 | Kind::Erspan3);
        assert_eq!(copy.header.erspan.is_some(), is_erspan);
        if let Some(erspan) = &copy.header.erspan {
            assert_erspan(case, erspan, &copy.frame, direction);
        }
        assert_eq!(copy.header.tell.is_some(), matches!(case.tunnel.kind, Kind::Tell(_)));
        if let Some(tell) = &copy.header.tell {
            assert_eq!(usize::from(tell.tap), direction, "slot of the tap");
            assert_recent(tell.time);
        }
    }
    assert_unique_ids(copies);
}

#[track_caller]
pub(crate) fn assert_outer(case: Case, copy: &Tunnelled) {
    let outer = &copy.outer;
    assert_eq!(outer.macs, (OUT_MAC, COLLECTOR_MAC));
    assert_eq!((outer.src, outer.dst), (case.source(), case.remote()));
    assert_eq!((outer.ttl, outer.tos, outer.df), (64, 0, false));
    assert_eq!(outer.flow_label != 0, case.v6, "a flow label that is not zero over IPv6");
    if let [len] = outer.lens[..] {
        assert_eq!(len, copy.frame.len() + case.overhead(), "{case:?}");
    }
    let is_udp = matches!(case.tunnel.kind, Kind::Vxlan(_) | Kind::Geneve(_) | Kind::Tell(_));
    assert_eq!((outer.port.is_some(), outer.checksum), (is_udp, case.tunnel.checksum), "{case:?}");
}

#[track_caller]
pub(crate) fn assert_erspan(case: Case, erspan: &Erspan, frame: &[u8], direction: usize) {
    let tpid = u16::from_be_bytes([frame[12], frame[13]]);
    let tagged = [frames::ETH_8021Q, frames::ETH_8021AD].contains(&tpid);
    let tci = if tagged { u16::from_be_bytes([frame[14], frame[15]]) } else { 0 };
    assert_eq!((erspan.vlan, erspan.cos), (tci & 0xfff, (tci >> 13) as u8), "{frame:02x?}");
    let encap = if tagged && case.tunnel.kind == Kind::Erspan2 { 3 } else { 0 };
    assert_eq!(erspan.encap, encap, "{case:?}");
    assert_eq!(erspan.port, direction as u32, "slot of the tap");
    let says = erspan.more.map(|(direction, _, _)| usize::from(direction));
    assert_eq!(says, (case.tunnel.kind == Kind::Erspan3).then_some(direction));
    if let Some((_, seconds, nanoseconds)) = erspan.more {
        assert_recent(Duration::new(seconds.into(), nanoseconds));
    }
}

/// Tests end soon after the copy was made: not more than ten seconds ago, and not in the future.
#[track_caller]
pub(crate) fn assert_recent(time: Duration) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let age = now.as_secs_f64() - time.as_secs_f64();
    assert!((-1.0..10.0).contains(&age), "the copy says that it is {age} s old");
}

/// IPv4 ids are 16 bits: among as many packets as there are ids, none may repeat. IPv6 has ids in fragments only.
#[track_caller]
pub(crate) fn assert_unique_ids(copies: &[Tunnelled]) {
    for window in copies.chunks(65536) {
        let ids: Vec<u32> = window.iter().filter_map(|copy| copy.outer.id).collect();
        let unique: BTreeSet<u32> = ids.iter().copied().collect();
        assert_eq!(unique.len(), ids.len(), "IP ids repeat");
    }
}

/// From 0 and up by one for each copy, in whatever order several CPUs have sent them.
#[track_caller]
pub(crate) fn assert_sequence(case: Case, copies: &[Tunnelled]) {
    let mut numbers: Vec<u32> = copies.iter().filter_map(|copy| copy.header.sequence).collect();
    numbers.sort_unstable();
    let expected = if case.tunnel.sequence { copies.len() as u32 } else { 0 };
    assert_eq!(numbers, (0..expected).collect::<Vec<_>>(), "{case:?}");
    assert_numbers(copies);
}

/// The same of copies that are numbered by their taps, where each remote has copies of its own.
#[track_caller]
pub(crate) fn assert_numbers(copies: &[Tunnelled]) {
    let mut by_tap: BTreeMap<_, Vec<u32>> = BTreeMap::new();
    for (outer, tell) in copies.iter().filter_map(|copy| Some((&copy.outer, copy.header.tell?))) {
        by_tap.entry((outer.dst, tell.tap)).or_default().push(tell.sequence);
    }
    for (tap, mut numbers) in by_tap {
        numbers.sort_unstable();
        assert_eq!(numbers, (0..numbers.len() as u32).collect::<Vec<_>>(), "{tap:?}");
    }
}
