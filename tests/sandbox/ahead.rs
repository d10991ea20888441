//! What others do before our taps is named, put behind them where that can be, and a tap that sees nothing is told.

use crate::lab::frames::{self, Ends};
use crate::lab::{Lab, Ns, PATIENCE, poll};

const UP: [&str; 6] = ["up", "eth0", "--tunnel", "gre", "--remote", "198.51.100.2"];

/// A program for the section `tc` or `xdp` that ends with this verdict, pinned for as long as the test needs it.
struct Foreign {
    pin: String,
}

impl Foreign {
    fn load(lab: &Lab, kind: &str, verdict: i32) -> Foreign {
        let pin = format!("/sys/fs/bpf/{}-{kind}", lab.ns_name(Ns::Host));
        let [source, object] = ["c", "o"].map(|end| lab.dir().join(format!("{kind}.{end}")).display().to_string());
        let code = format!("__attribute__((section(\"{kind}\"), used)) int foreign(void *c) {{ return {verdict}; }}");
        std::fs::write(&source, code).unwrap();
        lab.host(&["clang", "-O2", "-target", "bpf", "-c", &source, "-o", &object]);
        lab.host(&["bpftool", "prog", "load", &object, &pin]);
        Foreign { pin }
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.pin);
    }
}

/// The copies of frames that the peer sends, once they are counted.
#[track_caller]
fn assert_sees(lab: &Lab, n: u32) {
    let before = lab.session().remotes[0].stat.pcnt;
    lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, n));
    let seen = poll(PATIENCE, || (lab.session().remotes[0].stat.pcnt == before + u64::from(n)).then_some(()));
    assert!(seen.is_some(), "{:#}", lab.session());
}

#[test]
fn a_filter_that_came_later_is_put_behind_the_tap() {
    let lab = Lab::roomy();
    let foreign = Foreign::load(&lab, "tc", 0);
    lab.said(&UP).ok();
    assert_sees(&lab, 3);
    let place = ["tc", "filter", "add", "dev", "eth0", "ingress", "pref", "1", "handle", "9", "bpf", "da"];
    lab.host(&[&place[..], &["object-pinned", &foreign.pin]].concat());
    lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, 3));
    let fault = "tap eth0 ingress: another filter is before it and can hide packets from it";
    assert_eq!(lab.session().faults, [fault]);
    let said = lab.said(&["status", "--check"]);
    assert_eq!((said.status.code(), said.stdout.as_str()), (Some(1), format!("default: {fault}\n").as_str()));
    assert_eq!(lab.said(&["sync"]).quietly_ok().stdout, format!("default: {fault}; put first\n"));
    assert_eq!(lab.said(&["sync"]).quietly_ok().stdout, "");
    assert_eq!(lab.said(&["status", "--check"]).quietly_ok().stdout, "");
    assert_sees(&lab, 5);
    lab.said(&["down"]).quietly_ok();
    let left = lab.host(&["tc", "filter", "show", "dev", "eth0", "ingress"]);
    assert!(String::from_utf8_lossy(&left.stdout).contains("foreign"), "{left:?}");
}

#[test]
fn a_filter_that_cannot_be_passed_is_named_and_what_it_hides_is_told() {
    let lab = Lab::roomy();
    lab.host(&["tc", "qdisc", "add", "dev", "eth0", "clsact"]);
    let u32 = "tc filter add dev eth0 ingress pref 1 protocol all u32 match u32 0 0 classid 1:1 action ok";
    let words: Vec<&str> = u32.split(' ').collect();
    if !lab.try_host(&words).status.success() {
        lab.host(&words[..words.len() - 2]);
    }
    let names = "u32 filter at preference 1 at eth0 ingress: it is before the tap and can hide packets from it; look with: \
                 tc filter show dev eth0 ingress";
    lab.said(&UP).ok_noting(names);
    assert_eq!(lab.session().ahead, [names]);
    lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, 20));
    let session = lab.session();
    assert_eq!(session.faults.len(), 1, "{session:#}");
    assert!(session.faults[0].starts_with("tap eth0 ingress: blind? it has seen none of 2"), "{session:#}");
    let text = lab.said(&["status"]).quietly_ok().stdout;
    assert!(text.contains("  before us: u32 filter") && text.contains("ingress    blind  "), "{text}");
    assert!(lab.said(&["doctor", "eth0"]).stdout.contains("preference 1 runs before our tap"));
    assert_eq!(lab.said(&["sync"]).quietly_ok().stdout, "", "nothing can be done about it from here");
    lab.host(&["tc", "filter", "del", "dev", "eth0", "ingress", "pref", "1"]);
    assert_sees(&lab, 5);
    assert_eq!(lab.session().faults, [""; 0]);
    lab.said(&["down"]).quietly_ok();
}

#[test]
fn an_xdp_program_is_named_and_what_it_takes_is_told() {
    let lab = Lab::roomy();
    let drops = Foreign::load(&lab, "xdp", 1);
    lab.host(&["ip", "link", "set", "dev", "eth0", "xdpgeneric", "pinned", &drops.pin]);
    let said = lab.said(&UP).ok_noting("at eth0 ingress: it is before the tap and can hide packets from it");
    assert!(said.stderr.contains("snifctl: XDP program ") && said.stderr.contains("bpftool prog show id"), "{said:#?}");
    assert!(lab.said(&["doctor", "eth0"]).stdout.contains("XDP program"));
    lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, 20));
    let blind = poll(PATIENCE, || lab.session().faults.iter().any(|fault| fault.contains("blind?")).then_some(()));
    assert!(blind.is_some(), "{:#}", lab.session());
    lab.host(&["ip", "link", "set", "dev", "eth0", "xdpgeneric", "off"]);
    assert_sees(&lab, 5);
    lab.said(&["down"]).quietly_ok();
}
