//! Tunnel devices of the kernel as senders to `snifctl collect`: what goes into a device is what is written. And as its
//! neighbours, which end tunnels where it runs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::collect::{Collector, Written, answering, assert_in_order, by_interface, text};
use super::frames::{self, Ends};
use super::judge::Said;
use super::{COLLECTOR_IP, COLLECTOR_IP6, Lab, Ns, OUT_IP, OUT_IP6, Options, pcapng};

/// A device, and what `collect` makes of its packets.
struct Sender {
    /// Kind and options, of `ip link add`.
    link: &'static str,
    v6: bool,
    /// How the interface of its frames is called, before the source.
    name: &'static str,
    /// As pcapng has it: 1 for ingress, 2 for egress, 0 where nothing is told.
    direction: u8,
}

const fn v4(link: &'static str, name: &'static str) -> Sender {
    Sender { link, v6: false, name, direction: 0 }
}

const fn v6(link: &'static str, name: &'static str) -> Sender {
    Sender { link, v6: true, name, direction: 0 }
}

impl Sender {
    const fn ingress(self) -> Sender {
        Sender { direction: 1, ..self }
    }

    const fn egress(self) -> Sender {
        Sender { direction: 2, ..self }
    }

    fn kind(&self) -> &str {
        self.link.split(' ').next().expect("a kind")
    }

    fn remote(&self) -> IpAddr {
        if self.v6 { COLLECTOR_IP6.into() } else { COLLECTOR_IP.into() }
    }

    /// Each has an address of its own; a geneve device takes what the route gives it.
    fn source(&self, n: u8) -> IpAddr {
        match (self.kind() == "geneve", self.v6) {
            (true, false) => OUT_IP.into(),
            (true, true) => OUT_IP6.into(),
            (false, false) => Ipv4Addr::new(198, 51, 100, 100 + n).into(),
            (false, true) => Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x100 + u16::from(n)).into(),
        }
    }

    /// The lines of `ip -batch` that make it, with room for any of the frames.
    fn lines(&self, n: u8) -> String {
        let source = self.source(n);
        // Deprecated, so that no other device takes it as its own.
        let how = if self.v6 { "/128 dev out0 nodad preferred_lft 0" } else { "/32 dev out0" };
        let (address, local) = match self.kind() {
            "geneve" => (String::new(), String::new()),
            _ => (format!("address add {source}{how}\n"), format!("local {source}")),
        };
        let link = format!("link add s{n} mtu 1550 type {} {local} remote {}", self.link, self.remote());
        format!("{address}{link}\nlink set dev s{n} addrgenmode none arp off up")
    }

    #[track_caller]
    fn assert_written(&self, sent: &[Vec<u8>], got: &[Written]) {
        println!("{}{}", self.link, if self.v6 { " over IPv6" } else { "" }); // shown with a failure
        assert_in_order(sent, &got.iter().map(|written| written.frame.clone()).collect::<Vec<_>>());
        let is_told = |written: &&Written| (written.direction, written.wire) == (self.direction, written.frame.len());
        let other = got.iter().find(|written| !is_told(written));
        assert!(other.is_none(), "{other:?}");
    }
}

const SENDERS: [Sender; 23] = [
    v4("gretap", "gre"),
    v4("gretap key 7", "gre 7"),
    v4("gretap seq", "gre"),
    v4("gretap csum", "gre"),
    v4("gretap key 7 seq csum", "gre 7"),
    v6("ip6gretap", "gre"),
    v6("ip6gretap key 7 encaplimit none", "gre 7"),
    v6("ip6gretap seq csum", "gre"),
    v6("ip6gretap key 7 seq csum", "gre 7"),
    v4("erspan erspan_ver 0", "erspan1"),
    v4("erspan seq key 5 erspan_ver 1 erspan 3", "erspan2 5 port 3"),
    v4("erspan seq key 5 erspan_ver 2 erspan_dir ingress erspan_hwid 9", "erspan3 5 ingress").ingress(),
    v4("erspan seq key 6 erspan_ver 2 erspan_dir egress erspan_hwid 0", "erspan3 6 egress").egress(),
    v6("ip6erspan seq key 5 erspan_ver 1 erspan 3", "erspan2 5 port 3"),
    v6("ip6erspan seq key 6 erspan_ver 2 erspan_dir egress erspan_hwid 9", "erspan3 6 egress").egress(),
    v4("vxlan id 41 dstport 4789 noudpcsum", "vxlan 41"),
    v4("vxlan id 42 dstport 4789 udpcsum", "vxlan 42"),
    v6("vxlan id 43 dstport 4789 udp6zerocsumtx", "vxlan 43"),
    v6("vxlan id 44 dstport 4789 noudp6zerocsumtx", "vxlan 44"),
    v4("geneve id 51", "geneve 51"),
    v4("geneve id 52 udpcsum", "geneve 52"),
    v6("geneve id 53 udp6zerocsumtx", "geneve 53"),
    v6("geneve id 54 noudp6zerocsumtx", "geneve 54"),
];

/// What a tunnel device sends: all but frames that end within the IP header that their ethertype promises. Nor one that is
/// shorter than its IP header says: ip6erspan of newer kernels (7.2, not 6.1) marks it as cut.
fn frames() -> Vec<Vec<u8>> {
    let is_out = |name: &str| {
        name.ends_with("ethertype and nothing more")
            || ["ipv4 header cut after 6 bytes", "ipv4 cut short"].contains(&name)
    };
    let all = frames::corpus(&Ends::HOST_TO_PEER).into_iter();
    all.filter(|(name, _)| !is_out(name)).map(|(_, frame)| frame).collect()
}

/// Devices that come after this say nothing by themselves: no group reports.
fn quiet_devices(lab: &Lab) {
    for ns in [Ns::Host, Ns::Collector] {
        lab.run(ns, &["sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1"]);
    }
}

/// Makes the devices, and mirrors to each of them what leaves through a dummy: a process for each would take a guest's time.
fn make(lab: &Lab) {
    let lines: Vec<String> = (0..).zip(&SENDERS).map(|(n, sender)| sender.lines(n)).collect();
    let dummy = "link add all0 mtu 1550 type dummy\nlink set dev all0 addrgenmode none arp off up";
    lab.ip_batch(Ns::Host, &[&lines.join("\n"), dummy].join("\n"));
    lab.host(&["tc", "qdisc", "add", "dev", "all0", "clsact"]);
    let to = |n: usize| format!("action mirred egress mirror dev s{n}");
    let actions = (0..SENDERS.len()).map(to).collect::<Vec<_>>().join(" ");
    let filter = format!("tc filter add dev all0 egress matchall {actions}");
    lab.host(&filter.split(' ').collect::<Vec<_>>());
}

/// Every device sends; panics unless what is written is what went into those that are `heard`. What `collect` said.
#[track_caller]
fn assert_collected(lab: &Lab, heard: impl Fn(&Sender) -> bool) -> Said {
    let file = lab.fresh_path("devices.pcapng");
    let collector = Collector::start(lab, &["-w", text(&file), "--json"]);
    let (sent, senders) = (frames(), SENDERS.iter().filter(|sender| heard(sender)).count());
    lab.send(Ns::Host, "all0", &sent);
    let total = senders * sent.len();
    let said = collector.stop_after(&file, total).ok();

    let mut found = by_interface(pcapng::read(&file));
    for (n, sender) in (0..).zip(&SENDERS).filter(|(_, sender)| heard(sender)) {
        let got = found.remove(&format!("{} @ {}", sender.name, sender.source(n))).unwrap_or_default();
        sender.assert_written(&sent, &got);
    }
    assert!(found.is_empty(), "{:?}", found.keys());
    let report = said.json();
    assert_eq!((&report["lost"], &report["received"]), (&0.into(), &total.into()), "{report:#}");
    assert_eq!(report["streams"].as_array().map(Vec::len), Some(senders), "{report:#}");
    assert!(report["malformed"].as_array().expect("a list").is_empty(), "{report:#}");
    said
}

/// UDP tunnels over IPv4 that devices end where `collect` runs: kind, device, port.
const RIVALS: [(&str, &str, u16); 2] = [("vxlan", "vx0", 4789), ("geneve", "gnv0", 6081)];

/// A gretap device as well, which ends the first sender's tunnel.
fn make_rivals(lab: &Lab) {
    let up = "addrgenmode none arp off up";
    let gretap = format!("type gretap local {COLLECTOR_IP} remote {}", SENDERS[0].source(0));
    let lines = [
        format!("link add gt0 mtu 1550 {gretap}"),
        format!("link add vx0 type vxlan id 42 dstport 4789 remote {OUT_IP} dev col0"),
        format!("link add gnv0 type geneve id 52 remote {OUT_IP}"),
        format!("link set dev gt0 {up}"),
        format!("link set dev vx0 {up}"),
        format!("link set dev gnv0 {up}"),
    ];
    lab.ip_batch(Ns::Collector, &lines.join("\n"));
}

fn is_rivals(sender: &Sender) -> bool {
    !sender.v6 && RIVALS.iter().any(|(kind, ..)| sender.kind() == *kind)
}

/// Refused where the tunnel was asked for; else the others are received, and the same tunnel over IPv6.
fn assert_named_or_harmless(lab: &Lab) {
    let says = |kind: &str, dev: &str, port: u16| {
        format!("UDP port {port} belongs to the interface {dev}, a {kind} device of the kernel")
    };
    for (kind, dev, port) in RIVALS {
        let collect = [env!("CARGO_BIN_EXE_snifctl"), "collect", "--tunnel", kind, "--stats", "1"];
        let said = Said::from(lab.try_run(Ns::Collector, &collect));
        said.refused(1, &says(kind, dev, port), &format!("ip link delete {dev}"));
    }
    let said = assert_collected(lab, |sender| !is_rivals(sender));
    for (kind, dev, port) in RIVALS {
        let told = format!("snifctl: no {kind} over IPv4 is received: {}", says(kind, dev, port));
        assert_eq!(said.stderr.matches(&told).count(), 1, "{said:#?}");
    }
    assert_eq!(said.stderr.matches(" is received: ").count(), RIVALS.len(), "{said:#?}");
    assert_eq!(lab.packets(Ns::Collector, "gt0").0, frames().len() as u64, "the device has its frames as well");
}

/// Every device of the kernel sends to one `collect`, then to one beside devices that end tunnels.
#[track_caller]
pub(crate) fn run() {
    let lab = Lab::with(Options { out_mtu: 1700, ..Options::default() });
    answering(&lab, &[COLLECTOR_IP.into(), COLLECTOR_IP6.into()]);
    quiet_devices(&lab);
    make(&lab);
    assert_collected(&lab, |_| true);
    make_rivals(&lab);
    assert_named_or_harmless(&lab);
}
