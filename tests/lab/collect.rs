//! A `snifctl collect` in the lab, packets of other senders for it, and captures as Wireshark's own code reads them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::capture::tshark_fields;
use super::check::assert_same_frames;
use super::frames::{self, ETH_IPV4, ETH_IPV6, Ends, Family, GRE, Ipv4, UDP};
use super::judge::Said;
use super::{COLLECTOR_IP, COLLECTOR_IP6, COLLECTOR_MAC, Lab, Ns, OUT_MAC, PATIENCE, pcap, poll, signal};

/// A `snifctl collect` in the collector's namespace.
pub(crate) struct Collector {
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

impl Collector {
    /// Starts it, and waits until it listens.
    pub(crate) fn start(lab: &Lab, args: &[&str]) -> Collector {
        Collector::start_by(lab, &[], args)
    }

    /// The same by way of another program.
    pub(crate) fn start_by(lab: &Lab, by: &[&str], args: &[&str]) -> Collector {
        let (out, err) = (lab.fresh_path("collect.out"), lab.fresh_path("collect.err"));
        let mut command = lab.command(Ns::Collector, &[]);
        command.args(by).arg(env!("CARGO_BIN_EXE_snifctl")).arg("collect").args(args);
        let files = [&out, &err].map(|path| File::create(path).expect("make a file"));
        let [to, said] = files;
        let child = command.stdout(to).stderr(said).spawn().expect("start snifctl collect");
        let collector = Collector { child, out, err };
        let listens = poll(PATIENCE, || collector.said().contains("snifctl: receiving").then_some(()));
        assert!(listens.is_some(), "{}", collector.said());
        collector
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The file with its standard output.
    pub(crate) fn out(&self) -> &Path {
        &self.out
    }

    /// Has it not ended by itself?
    pub(crate) fn goes_on(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }

    pub(crate) fn said(&self) -> String {
        fs::read_to_string(&self.err).expect("what it says")
    }

    /// Waits until it ends by itself.
    pub(crate) fn ended(mut self) -> Said {
        let status = poll(PATIENCE, || self.child.try_wait().expect("wait"));
        let status = status.unwrap_or_else(|| panic!("it goes on: {}", self.said()));
        Said { status, stdout: fs::read_to_string(&self.out).unwrap_or_default(), stderr: self.said() }
    }

    /// Ends it, once it has written so many frames to the file.
    pub(crate) fn stop_after(self, file: &Path, frames: usize) -> Said {
        let all = poll(PATIENCE, || (count(file) >= frames).then_some(()));
        assert!(all.is_some(), "{} of {frames} frames; {}", count(file), self.said());
        signal(self.child.id(), "TERM");
        self.ended()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Packet blocks in a pcapng file, by its blocks' lengths alone.
pub(crate) fn count(file: &Path) -> usize {
    let bytes = fs::read(file).unwrap_or_default();
    let word = |at: usize| bytes.get(at..at + 4).map(|word| u32::from_le_bytes(word.try_into().expect("four")));
    let (mut at, mut count) = (0, 0);
    while let (Some(kind), Some(length)) = (word(at), word(at + 4)) {
        count += usize::from(kind == 6);
        at += length.max(12) as usize;
    }
    count
}

/// The frames of a capture, read by Wireshark's own code.
pub(crate) fn frames_in(lab: &Lab, file: &Path, display_filter: &str) -> Vec<Vec<u8>> {
    pcap::read(&plain(lab, file, display_filter))
}

/// The same as a file of the old format.
fn plain(lab: &Lab, file: &Path, display_filter: &str) -> PathBuf {
    let plain = lab.fresh_path("plain.pcap");
    let mut tshark = Command::new("tshark");
    tshark.env("HOME", "/tmp").args(["-n", "-F", "pcap", "-Y", display_filter, "-r"]).arg(file).arg("-w").arg(&plain);
    assert!(tshark.stderr(Stdio::null()).status().expect("run tshark").success(), "{}", file.display());
    plain
}

/// Panics unless these are the same frames in the same order.
#[track_caller]
pub(crate) fn assert_in_order(expected: &[Vec<u8>], got: &[Vec<u8>]) {
    assert_same_frames(expected, got);
    let other = (1..).zip(expected.iter().zip(got)).find(|(_, (one, other))| one != other);
    assert!(other.is_none(), "frame {} is out of order", other.map_or(0, |(n, _)| n));
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

/// Gives the collector addresses, so that it takes packets to them. Those of IPv6 are `lo`'s: for one of `col0`'s it would
/// send reports (MLD) at random times.
pub(crate) fn answering(lab: &Lab, addresses: &[IpAddr]) {
    let line = |address: &IpAddr| match address {
        IpAddr::V4(address) => format!("address add {address}/32 dev col0"),
        IpAddr::V6(address) => format!("address add {address}/128 dev lo nodad"),
    };
    lab.ip_batch(Ns::Collector, &addresses.iter().map(line).collect::<Vec<_>>().join("\n"));
    lab.collector(&["sysctl", "-qw", "net.ipv4.conf.col0.rp_filter=0", "net.ipv4.conf.all.rp_filter=0"]);
    let routes = "route add 198.51.100.0/24 dev col0\nroute add 2001:db8:1::/64 dev col0";
    lab.ip_batch(Ns::Collector, routes);
}

/// Sends frames both ways over the watched link; those that came in there, and those that went out.
pub(crate) fn exchange(lab: &Lab) -> [Vec<Vec<u8>>; 2] {
    let (incoming, outgoing) = (frames::corpus_frames(&Ends::PEER_TO_HOST), frames::corpus_frames(&Ends::HOST_TO_PEER));
    lab.send(Ns::Peer, "peer0", &incoming);
    lab.send(Ns::Host, "eth0", &outgoing);
    [incoming, outgoing]
}

/// A frame of a capture, and what is told of it.
#[derive(Debug)]
pub(crate) struct Written {
    pub interface: String,
    /// Since 1970.
    pub time: Duration,
    /// Bytes that it had on the wire.
    pub wire: usize,
    /// As pcapng has it: 1 for ingress, 2 for egress, 0 where nothing is told.
    pub direction: u8,
    pub frame: Vec<u8>,
}

/// Everything in a capture, read by Wireshark's own code.
pub(crate) fn written(lab: &Lab, file: &Path) -> Vec<Written> {
    let fields = ["frame.interface_name", "frame.time_epoch", "frame.len", "frame.packet_flags_direction"];
    let rows = tshark_fields(file, "frame", &fields);
    let frames = pcap::read_cut(&plain(lab, file, "frame"));
    assert_eq!(rows.len(), frames.len(), "{}", file.display());
    let row = |(row, frame): (Vec<String>, Vec<u8>)| Written {
        interface: row[0].clone(),
        time: time_of(&row[1]),
        wire: row[2].parse().expect("a length"),
        direction: u8::from_str_radix(row[3].trim_start_matches("0x"), 16).unwrap_or(0),
        frame,
    };
    rows.into_iter().zip(frames).map(row).collect()
}

/// Seconds with nine digits behind the point.
fn time_of(text: &str) -> Duration {
    let (seconds, nanoseconds) = text.split_once('.').expect("seconds and their parts");
    assert_eq!(nanoseconds.len(), 9, "{text}");
    Duration::new(seconds.parse().expect("seconds"), nanoseconds.parse().expect("nanoseconds"))
}

/// What each interface of a capture has, in order.
pub(crate) fn by_interface(all: Vec<Written>) -> BTreeMap<String, Vec<Written>> {
    let mut found: BTreeMap<String, Vec<Written>> = BTreeMap::new();
    for written in all {
        found.entry(written.interface.clone()).or_default().push(written);
    }
    found
}

pub(crate) fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a time after 1970")
}

// ---- packets of other senders ----

/// A packet on the out link from one of many senders, of either family.
pub(crate) fn outer(source: IpAddr, protocol: u8, body: &[u8]) -> Vec<u8> {
    let ends = outer_ends(source);
    match source {
        IpAddr::V4(_) => frames::ethernet(&ends, ETH_IPV4, &frames::ipv4(&ends, protocol, Ipv4::default(), body)),
        IpAddr::V6(_) => frames::ethernet(&ends, ETH_IPV6, &frames::ipv6(&ends, protocol, body)),
    }
}

/// From that source to the collector's address of the same family.
fn outer_ends(source: IpAddr) -> Ends {
    let to = Ends {
        src_mac: OUT_MAC,
        dst_mac: COLLECTOR_MAC,
        dst4: COLLECTOR_IP,
        dst6: COLLECTOR_IP6,
        ..Ends::HOST_TO_PEER
    };
    match source {
        IpAddr::V4(src4) => Ends { src4, ..to },
        IpAddr::V6(src6) => Ends { src6, ..to },
    }
}

/// GRE with a sequence number.
pub(crate) fn numbered(source: impl Into<IpAddr>, number: u32, frame: &[u8]) -> Vec<u8> {
    outer(source.into(), GRE, &[&[0x10, 0, 0x65, 0x58], &number.to_be_bytes()[..], frame].concat())
}

/// Without a checksum.
pub(crate) fn udp_to(source: impl Into<IpAddr>, port: u16, body: &[u8]) -> Vec<u8> {
    let length = (8 + body.len()) as u16;
    let header = [50_000_u16, port, length, 0].map(u16::to_be_bytes).concat();
    outer(source.into(), UDP, &[&header, body].concat())
}

/// With a checksum.
pub(crate) fn summed_udp_to(source: IpAddr, port: u16, body: &[u8]) -> Vec<u8> {
    let family = if source.is_ipv4() { Family::V4 } else { Family::V6 };
    outer(source, UDP, &frames::udp(&outer_ends(source), family, (50_000, port), body))
}
