//! Sessions of every tunnel and oversize mode side by side, each with sources of its own, and what `collect` must write of
//! them: frames, order, interface, direction, length and time.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::time::Duration;

use super::collect::{Collector, Written, answering, assert_in_order, by_interface, count, since_1970, text, written};
use super::decode::{Port, tcp_stream};
use super::frames::{self, ETH_8021AD, ETH_8021Q, ETH_IPV4, ETH_IPV6, Ends};
use super::sessions::{WAYS, both_families, down, knowing, up_in};
use super::traffic::Transfer;
use super::{Lab, Ns, Options, PATIENCE, poll};

/// What is told of the length that a frame had before it was cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Nothing,
    /// That it was cut: an IP packet says how long it was.
    Cut,
    Length,
}

#[derive(Debug)]
pub(crate) struct Tunnel {
    args: &'static [&'static str],
    /// How the interfaces of incoming and outgoing frames are called, before the source.
    names: [&'static str; 2],
    /// Outer IPv4 and tunnel header.
    overhead: usize,
    told: Told,
}

/// The id of outgoing packets' copies.
const EGRESS_ID: &str = "8";

pub(crate) const TUNNELS: [Tunnel; 7] = [
    Tunnel {
        args: &["gre", "--id", "7", "--egress-id", EGRESS_ID],
        names: ["gre 7 ingress", "gre 8 egress"],
        overhead: 28,
        told: Told::Nothing,
    },
    Tunnel { args: &["erspan1"], names: ["erspan1"; 2], overhead: 24, told: Told::Nothing },
    Tunnel {
        args: &["erspan2", "--id", "7", "--egress-id", EGRESS_ID],
        names: ["erspan2 7 port 0 ingress", "erspan2 8 port 1 egress"],
        overhead: 36,
        told: Told::Cut,
    },
    Tunnel {
        args: &["erspan3", "--id", "7", "--egress-id", EGRESS_ID],
        names: ["erspan3 7 tap 0 ingress", "erspan3 8 tap 0 egress"],
        overhead: 48,
        told: Told::Cut,
    },
    Tunnel {
        args: &["vxlan", "--id", "7", "--egress-id", EGRESS_ID],
        names: ["vxlan 7 ingress", "vxlan 8 egress"],
        overhead: 36,
        told: Told::Nothing,
    },
    Tunnel {
        args: &["geneve", "--id", "7", "--egress-id", EGRESS_ID, "--udp-checksum"],
        names: ["geneve 7 ingress", "geneve 8 egress"],
        overhead: 36,
        told: Told::Nothing,
    },
    Tunnel {
        args: &["geneve", "--tell", "--id", "7", "--egress-id", EGRESS_ID],
        names: ["geneve 7 tap 0 ingress", "geneve 8 tap 0 egress"],
        overhead: 60,
        told: Told::Length,
    },
];

pub(crate) const OVERSIZE: [&str; 4] = ["segment", "fragment", "truncate", "drop"];

/// A session, which sends to a remote of each family from a source of its own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub tunnel: &'static Tunnel,
    pub oversize: &'static str,
    /// Its number among those that are side by side.
    pub n: u8,
}

const OUT_MTU: usize = 1500;
/// Clocks are read to a microsecond.
const OFF: Duration = Duration::from_micros(50);

impl Case {
    fn sources(&self) -> [IpAddr; 2] {
        let v6 = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x100 + u16::from(self.n));
        [Ipv4Addr::new(198, 51, 100, 100 + self.n).into(), v6.into()]
    }

    fn up(&self, lab: &Lab) {
        let listed = |all: [IpAddr; 2]| all.map(|address| address.to_string()).join(",");
        let (remotes, sources) = (listed(both_families(self.n)), listed(self.sources()));
        up_in(lab, self.n, self.tunnel.args, &remotes, &["--oversize", self.oversize, "--source", &sources]);
    }

    /// Bytes of the longest frame that fits.
    fn fit(&self, source: IpAddr) -> usize {
        OUT_MTU - self.tunnel.overhead - if source.is_ipv6() { 20 } else { 0 }
    }

    /// What is to be written of a frame, and how long that says it was; none where it is dropped.
    fn expected(&self, source: IpAddr, frame: &[u8]) -> Option<(Vec<u8>, usize)> {
        let (fit, whole) = (self.fit(source), frame.len());
        let is_known = match self.tunnel.told {
            Told::Nothing => false,
            Told::Cut => is_ip(frame),
            Told::Length => true,
        };
        match self.oversize {
            "drop" if whole > fit => None,
            "truncate" if whole > fit => Some((frame[..fit].to_vec(), if is_known { whole } else { fit })),
            _ => Some((frame.to_vec(), whole)),
        }
    }

    #[track_caller]
    fn assert_written(&self, source: IpAddr, way: usize, sent: &Sent, got: &[Written]) {
        let what = format!("{:?} {} from {source}, {}", self.tunnel.args, self.oversize, ["ingress", "egress"][way]);
        let (frames, lengths): (Vec<_>, Vec<_>) =
            sent.frames.iter().filter_map(|frame| self.expected(source, frame)).unzip();
        println!("{what}"); // shown with a failure
        assert_in_order(&frames, &got.iter().map(|written| written.frame.clone()).collect::<Vec<_>>());
        assert_eq!(got.iter().map(|written| written.wire).collect::<Vec<_>>(), lengths, "{what}");
        let has_direction = self.tunnel.names[0] != self.tunnel.names[1];
        let direction = if has_direction { way as u8 + 1 } else { 0 };
        assert!(got.iter().all(|written| written.direction == direction), "{what}: {}", got[0].direction);
        let times: Vec<Duration> = got.iter().map(|written| written.time).collect();
        assert!(times.iter().all(|time| sent.when.contains(time)), "{what}: {times:?} in {:?}", sent.when);
        assert!(times.is_sorted(), "{what}: {times:?}");
    }
}

fn is_ip(frame: &[u8]) -> bool {
    let mut at = 12;
    let ethertype = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    while [ETH_8021Q, ETH_8021AD].contains(&ethertype(at)) {
        at += 4;
    }
    [ETH_IPV4, ETH_IPV6].contains(&ethertype(at))
}

/// What was sent one way, and between when.
struct Sent {
    frames: Vec<Vec<u8>>,
    when: RangeInclusive<Duration>,
}

/// Every kind of frame; then around what fits of each tunnel, and far above; plain, tagged, twice tagged, and not IP.
fn frames(ends: &Ends) -> Vec<Vec<u8>> {
    let mut fits: Vec<usize> =
        TUNNELS.iter().flat_map(|tunnel| [OUT_MTU - tunnel.overhead, OUT_MTU - tunnel.overhead - 20]).collect();
    fits.sort_unstable();
    fits.dedup();
    let sizes = fits.iter().flat_map(|fit| [*fit, fit + 1]).chain([3000, 9014]);
    let sized = (1000..).zip(sizes).map(|(n, size)| frames::jumbo(ends, n, size));
    let raw = [frames::raw(ends, 2000, fits[0]), frames::raw(ends, 2001, 1600)];
    let once = frames::tagged(ETH_8021Q, 0xa000 | 42, &frames::jumbo(ends, 2002, 1500));
    let twice = frames::tagged(ETH_8021AD, 0x6000 | 4094, &once);
    frames::corpus_frames(ends).into_iter().chain(sized).chain(raw).chain([once, twice]).collect()
}

fn lab_of(cases: &[Case], watched_mtu: u32) -> Lab {
    let lab = knowing(Lab::with(Options { watched_mtu, ..Options::default() }), cases.len() as u8);
    answering(&lab, &cases.iter().flat_map(|case| both_families(case.n)).collect::<Vec<_>>());
    let line = |source: IpAddr| match source {
        IpAddr::V4(source) => format!("address add {source}/32 dev out0"),
        IpAddr::V6(source) => format!("address add {source}/128 dev out0 nodad"),
    };
    lab.ip_batch(Ns::Host, &cases.iter().flat_map(Case::sources).map(line).collect::<Vec<_>>().join("\n"));
    cases.iter().for_each(|case| case.up(&lab));
    lab
}

/// Watches with all of these sessions at once; panics unless what is written is what was watched.
#[track_caller]
pub(crate) fn run(cases: &[Case], time: &str) {
    let lab = lab_of(cases, 9000);
    let file = lab.fresh_path("all.pcapng");
    let args = ["-w", text(&file), "--egress-id", EGRESS_ID, "--time", time, "--json"];
    let collector = Collector::start(&lab, &args);
    let sent = WAYS.map(|(ns, dev, ends)| {
        let (frames, begin) = (frames(&ends), since_1970() - OFF);
        lab.send(ns, dev, &frames);
        Sent { frames, when: begin..=since_1970() + OFF }
    });
    let expected = |case: &Case, source: IpAddr| {
        let all = sent.iter().flat_map(|sent| &sent.frames);
        all.filter(|frame| case.expected(source, frame).is_some()).count()
    };
    let total = cases.iter().flat_map(|case| case.sources().map(|source| expected(case, source))).sum();
    let report = collector.stop_after(&file, total).ok().json();
    down(&lab);

    let mut found = by_interface(written(&lab, &file));
    for case in cases {
        for source in case.sources() {
            let mut take = |way: usize| found.remove(&format!("{} @ {source}", case.tunnel.names[way]));
            let incoming = take(0).unwrap_or_default();
            let (incoming, outgoing) = match take(1) {
                Some(outgoing) => (incoming, outgoing),
                None => {
                    let mut both = incoming.into_iter();
                    let first = sent[0].frames.iter().filter(|frame| case.expected(source, frame).is_some()).count();
                    (both.by_ref().take(first).collect(), both.collect())
                }
            };
            for (way, got) in [incoming, outgoing].iter().enumerate() {
                case.assert_written(source, way, &sent[way], got);
            }
        }
    }
    assert!(found.is_empty(), "{:?}", found.keys());
    assert_eq!((&report["lost"], &report["received"]), (&0.into(), &total.into()), "{report:#}");
    assert!(report["malformed"].as_array().expect("a list").is_empty(), "{report:#}");
}

/// A connection of super-packets: each byte of it is in what is written, of either family.
#[track_caller]
pub(crate) fn stream(tunnel: &'static Tunnel, oversize: &'static str) {
    let case = Case { tunnel, oversize, n: 0 };
    let lab = lab_of(&[case], 1500);
    let file = lab.fresh_path("stream.pcapng");
    let collector = Collector::start(&lab, &["-w", text(&file), "--egress-id", EGRESS_ID]);
    let Transfer { port, data } = lab.tcp_transfer(super::tunnel_case::MEGABYTES, Ns::Host, Ns::Peer);
    lab.wait_until_received();
    collector.stop_after(&file, settled(&file)).ok();
    down(&lab);
    let found = by_interface(written(&lab, &file));
    for source in case.sources() {
        let of_it = found.iter().filter(|(name, _)| name.ends_with(&format!("@ {source}")));
        let frames: Vec<Vec<u8>> = of_it.flat_map(|(_, all)| all.iter().map(|written| written.frame.clone())).collect();
        assert!(tcp_stream(&frames, Port::Dst(port)) == data, "{case:?} from {source}: the stream differs");
    }
}

/// Frames in the file, once no more come: what waits is written after 100 ms.
fn settled(file: &std::path::Path) -> usize {
    let (mut before, mut same) = (0, 0);
    poll(PATIENCE, || {
        let now = count(file);
        same = if now == before { same + 1 } else { 0 };
        before = now;
        (same > 30).then_some(now)
    })
    .expect("the file rests")
}
