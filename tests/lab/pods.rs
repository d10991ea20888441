//! Pods: network namespaces that are joined to the host's as CNI plugins do it.

use std::fs;
use std::process::Command;

use super::capture::Direction;
use super::decode::{decap_gre, inner_frames};
use super::{COLLECTOR_IP, Lab, Ns};

/// A network namespace of this test's own, that ends and comes again.
pub(crate) struct Gone(pub String);

impl Gone {
    pub(crate) fn make(&self, lab: &Lab) {
        let add = Command::new("ip").args(["netns", "add", &self.0]).status().unwrap();
        assert!(add.success());
        lab.host(&["ip", "link", "add", "pod0", "type", "veth", "peer", "name", "eth0", "netns", &self.0]);
    }

    pub(crate) fn end(&self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

impl Drop for Gone {
    fn drop(&mut self) {
        self.end();
    }
}

/// How a pod's link is made.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cni {
    /// A pair into a bridge.
    Bridge,
    /// A pair, and a route to the one address.
    PointToPoint,
    /// The same where a program puts incoming packets straight into the pod: the node's end never sees them.
    RedirectPeer,
    Macvlan,
    Ipvlan,
    Netkit,
}

const POD_IP: &str = "192.0.2.5";

/// The node's end of the pair hands every packet that arrives on eth0 for the pod to the pod's own end.
const REDIRECT: &str = r#"static int (*redirect_peer)(unsigned int ifindex, unsigned long long flags) = (void *) 155;
__attribute__((section("tc"), used)) int to_pod(void *skb) { return redirect_peer(INDEX, 0); }
char _license[] __attribute__((section("license"), used)) = "GPL";
"#;

impl Cni {
    fn make(self, lab: &Lab, pod: &str) {
        let host = |argv: &[&str]| lab.host(argv);
        let pair = ["ip", "link", "add", "pod0", "type", "veth", "peer", "name", "eth0", "netns", pod];
        let to_pod = ["ip", "route", "add", "192.0.2.5/32", "dev", "pod0"];
        match self {
            Cni::Bridge => {
                host(&pair);
                lab.ip_batch(
                    Ns::Host,
                    "link add br0 type bridge\nlink set dev eth0 master br0\nlink set dev pod0 master br0\nlink set dev br0 up",
                );
            }
            Cni::PointToPoint | Cni::RedirectPeer => {
                host(&pair);
                host(&["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.proxy_arp=1"]);
            }
            Cni::Macvlan => {
                // With an index, older kernels do not mind that the host has one of that name.
                let over = ["ip", "link", "add", "link", "eth0", "name", "eth0", "index", "4242", "netns", pod, "type"];
                host(&[&over[..], &["macvlan", "mode", "bridge"]].concat());
            }
            Cni::Ipvlan => {
                // With an index, older kernels do not mind that the host has one of that name.
                let over = ["ip", "link", "add", "link", "eth0", "name", "eth0", "index", "4242", "netns", pod, "type"];
                host(&[&over[..], &["ipvlan", "mode", "l2"]].concat());
            }
            Cni::Netkit => {
                let ip = std::env::var("NEWER_IP").expect("set by tests/kernels/run");
                host(&[&ip, "link", "add", "pod0", "type", "netkit", "peer", "name", "eth0", "netns", pod]);
                host(&["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.proxy_arp=1"]);
            }
        }
        let inside = |argv: &[&str]| {
            let net = format!("--net=/run/netns/{pod}");
            let out = Command::new("nsenter").args([&net, "--"]).args(argv).output().unwrap();
            assert!(out.status.success(), "{argv:?}: {}", String::from_utf8_lossy(&out.stderr));
        };
        inside(&["ip", "link", "set", "dev", "eth0", "addrgenmode", "none", "up"]);
        inside(&["ip", "address", "add", "192.0.2.5/24", "dev", "eth0"]);
        if matches!(self, Cni::Bridge | Cni::PointToPoint | Cni::RedirectPeer | Cni::Netkit) {
            host(&["ip", "link", "set", "dev", "pod0", "addrgenmode", "none", "up"]);
        }
        if matches!(self, Cni::PointToPoint | Cni::RedirectPeer | Cni::Netkit) {
            host(&to_pod);
        }
        if matches!(self, Cni::RedirectPeer) {
            let shown = lab.shown(&["ip", "-j", "link", "show", "dev", "pod0"]);
            let shown: serde_json::Value = serde_json::from_str(&shown).expect("JSON of ip link");
            let index = shown[0]["ifindex"].to_string();
            let [source, object] = ["c", "o"].map(|end| lab.dir().join(format!("peer.{end}")).display().to_string());
            fs::write(&source, REDIRECT.replace("INDEX", &index)).unwrap();
            host(&["clang", "-O2", "-target", "bpf", "-c", &source, "-o", &object]);
            host(&["tc", "qdisc", "add", "dev", "eth0", "clsact"]);
            let place = ["tc", "filter", "add", "dev", "eth0", "ingress", "protocol", "ip", "pref", "7", "bpf", "da"];
            host(&[&place[..], &["object-file", &object, "section", "tc"]].concat());
        }
    }

    /// Of 5 requests and their answers, how many packets pass the node's end of the pair, if it has one.
    fn at_home(self) -> Option<u64> {
        match self {
            Cni::Bridge | Cni::PointToPoint | Cni::Netkit => Some(10),
            Cni::RedirectPeer => Some(5),
            Cni::Macvlan | Cni::Ipvlan => None,
        }
    }
}

#[track_caller]
pub(crate) fn assert_pod_is_watched(cni: Cni) {
    let lab = Lab::roomy();
    let pod = Gone(format!("{}x", lab.ns_name(Ns::Peer)));
    let add = Command::new("ip").args(["netns", "add", &pod.0]).status().unwrap();
    assert!(add.success());
    cni.make(&lab, &pod.0);
    let remote = COLLECTOR_IP.to_string();
    let up = ["up", "--tunnel", "gre", "--remote", &remote, "--filter", "icmp"];
    lab.said(&[&up[..], &["--netns", &pod.0]].concat()).ok();
    if cni.at_home().is_some() {
        lab.said(&[&up[..], &["pod0", "--name", "home"]].concat()).ok();
    }
    let mut mirrored = lab.capture(Ns::Collector, "col0", Direction::In);
    lab.peer(&["ping", "-c", "5", "-i", "0.01", "-W", "5", POD_IP]);
    let sessions = lab.status()["sessions"].as_array().unwrap().clone();
    let copied = |at: usize| {
        let taps = sessions[at]["taps"].as_array().unwrap();
        taps.iter().map(|tap| tap["stat"]["pcnt"].as_u64().unwrap()).sum::<u64>()
    };
    assert_eq!(copied(0), 10, "{cni:?}: each request and each answer, once: {sessions:#?}");
    if let Some(at_home) = cni.at_home() {
        assert_eq!(copied(1), at_home, "{cni:?}: at the node's end");
        lab.said(&["down", "--name", "home"]).quietly_ok();
    }
    mirrored.settle();
    let frames = inner_frames(&decap_gre(&mirrored.stop()));
    assert_eq!(frames.len() as u64, 10 + cni.at_home().unwrap_or(0), "{cni:?}: at the collector");
    lab.said(&["down"]).quietly_ok();
}
