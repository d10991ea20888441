//! `verify` with `collect --control`: the law over both machines, with every loss where it was.

use std::fs;
use std::time::{Duration, Instant};

use crate::lab::collect::Collector;
use crate::lab::frames::{self, Ends};
use crate::lab::judge::Said;
use crate::lab::traffic::Background;
use crate::lab::{COLLECTOR_IP, Lab, Ns, OUT_IP, Options, PATIENCE, poll, signal};
use serde_json::Value;

/// A collector whose counters can be asked for.
fn counting(lab: &Lab, more: &[&str]) -> Collector {
    Collector::start(lab, &[&["-w", "/dev/null", "--control", &COLLECTOR_IP.to_string()], more].concat())
}

/// The collector's device answers at its address.
fn lab() -> Lab {
    let lab = Lab::with(Options { out_mtu: 1700, ..Options::default() });
    lab.ip_batch(Ns::Collector, &format!("address replace {COLLECTOR_IP}/24 dev col0"));
    lab
}

fn up(lab: &Lab, tunnel: &[&str]) {
    let remote = COLLECTOR_IP.to_string();
    lab.said(&[&["up", "eth0", "--remote", &remote, "--tunnel"], tunnel].concat()).quietly_ok();
}

fn verify(lab: &Lab, more: &[&str]) -> Said {
    lab.said(&[&["verify", "--remote", &COLLECTOR_IP.to_string()], more].concat())
}

/// The same as JSON, and whether it was content.
fn verified(lab: &Lab, more: &[&str]) -> (Value, bool) {
    let said = verify(lab, &[&["--json"], more].concat());
    let value = serde_json::from_str(&said.stdout).unwrap_or_else(|err| panic!("{err}: {said:?}"));
    (value, said.status.success())
}

fn pass(lab: &Lab, count: u32) {
    lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, count));
    lab.send(Ns::Host, "eth0", &frames::series(&Ends::HOST_TO_PEER, 2 * count));
}

/// What becomes of packets towards the collector.
fn on_the_way(lab: &Lab, statement: &str) {
    lab.collector(&["nft", "add table netdev way"]);
    lab.collector(&["nft", "add chain netdev way in { type filter hook ingress device col0 priority 0 ; }"]);
    lab.collector(&["nft", &format!("add rule netdev way in {statement}")]);
}

fn free_the_way(lab: &Lab) {
    lab.collector(&["nft", "delete table netdev way"]);
}

#[track_caller]
fn assert_counts(value: &Value, expected: [u64; 6]) {
    let names = ["copied", "sent", "dropped", "received", "lost", "open"];
    let got = names.map(|name| value[name].as_u64().unwrap_or_else(|| panic!("{name} in {value:#}")));
    assert_eq!(got, expected, "{names:?} in {value:#}");
}

/// Of each tap: sent, received, lost.
fn taps(value: &Value) -> Vec<String> {
    let rows = value["taps"].as_array().expect("a list").iter();
    let row = |tap: &Value| {
        let [interface, direction] = ["interface", "direction"].map(|key| tap[key].as_str().expect("a word"));
        format!("{interface} {direction} {} {} {}", tap["sent"], tap["received"], tap["lost"])
    };
    rows.map(row).collect()
}

#[test]
fn a_tunnel_that_tells_is_verified_tap_by_tap_wherever_copies_are_lost() {
    let lab = lab();
    let collector = counting(&lab, &[]);
    up(&lab, &["geneve", "--tell", "--id", "7"]);
    pass(&lab, 31);
    let (all, is_whole) = verified(&lab, &[]);
    assert_counts(&all, [93, 93, 0, 93, 0, 0]);
    assert_eq!(taps(&all), ["eth0 ingress 31 31 0", "eth0 egress 62 62 0"]);
    assert!(is_whole && all["numbered"] == true, "{all:#}");

    // Lost on the way: those of outgoing frames, as Geneve's option says (slot 1, 24 bytes into the UDP header's packet).
    on_the_way(&lab, "udp dport 6081 @th,160,16 1 drop");
    pass(&lab, 10);
    free_the_way(&lab);
    let (some, is_whole) = verified(&lab, &[]);
    assert_counts(&some, [123, 123, 0, 103, 20, 0]);
    assert_eq!(taps(&some), ["eth0 ingress 41 41 0", "eth0 egress 82 62 20"]);
    assert!(!is_whole, "{some:#}");
    pass(&lab, 10);
    let said = verify(&lab, &[]);
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    for line in ["153 copied = 153 sent + 0 dropped here", "153 sent = 133 received + 20 lost", "eth0  egress"] {
        assert!(said.stdout.contains(line), "{line} in {said:#?}");
    }

    // A session of the same kind comes after it: the collector knows its numbers from those before.
    lab.said(&["down"]).ok();
    up(&lab, &["geneve", "--tell", "--id", "7"]);
    pass(&lab, 31);
    let (again, _) = verified(&lab, &[]);
    assert_counts(&again, [93, 93, 0, 93, 0, 0]);

    // Nothing comes of the next one: what it has of those before is not taken for that. Then its numbers go on from there.
    lab.said(&["down"]).ok();
    up(&lab, &["geneve", "--tell", "--id", "7"]);
    on_the_way(&lab, "udp dport 6081 drop");
    pass(&lab, 31);
    free_the_way(&lab);
    let (none, is_whole) = verified(&lab, &[]);
    assert_counts(&none, [93, 93, 0, 0, 93, 0]);
    assert!(!is_whole);
    pass(&lab, 1);
    verify(&lab, &[]).refused(1, "counts on from a session before this one", "--interval 10s");
    drop(collector);

    // A collector that came later judges what it can know; so does one look after another.
    let collector = counting(&lab, &[]);
    verify(&lab, &[]).refused(1, "has heard nothing of the session", "--interval 10s");
    pass(&lab, 5);
    let (later, _) = verified(&lab, &[]);
    assert_counts(&later, [15, 15, 0, 15, 0, 0]);
    let (silent, _) = verified(&lab, &["--interval", "100ms"]);
    assert_counts(&silent, [0; 6]);
    // The next session's numbers are lower than any that it has heard.
    lab.said(&["down"]).ok();
    up(&lab, &["geneve", "--tell", "--id", "7"]);
    pass(&lab, 3);
    let (lower, _) = verified(&lab, &[]);
    assert_counts(&lower, [9, 9, 0, 9, 0, 0]);
    drop(collector);
    verify(&lab, &[]).refused(1, &format!("no collector answers at {COLLECTOR_IP}:9811"), "-w day.pcapng");
}

#[test]
fn one_direction_alone_is_one_row() {
    let lab = lab();
    let _collector = counting(&lab, &[]);
    lab.said(&["up", "eth0:ingress", "--remote", &COLLECTOR_IP.to_string(), "--tunnel", "geneve", "--tell"])
        .quietly_ok();
    pass(&lab, 5);
    let (value, is_whole) = verified(&lab, &[]);
    assert!(is_whole && taps(&value) == ["eth0 ingress 5 5 0"], "{value:#}");
}

#[test]
fn a_collector_that_receives_something_else_is_hinted_at() {
    let lab = lab();
    let collector = counting(&lab, &["--tunnel", "vxlan"]);
    up(&lab, &["geneve"]);
    pass(&lab, 3);
    let said = verify(&lab, &[]);
    let hint =
        format!("none has come: collect there must have --tunnel geneve and --listen {COLLECTOR_IP}, or neither");
    assert!(said.status.code() == Some(1) && said.stdout.contains("9 sent = 0 received + 9 lost"), "{said:#?}");
    assert!(said.stdout.lines().any(|line| line.trim() == hint), "{said:#?}");
    drop(collector);
}

#[test]
fn numbers_of_all_copies_together_tell_what_is_lost_and_what_was_dropped_here() {
    let lab = lab();
    let _collector = counting(&lab, &["--egress-id", "8"]);
    up(&lab, &["gre", "--sequence", "--id", "7", "--egress-id", "8", "--oversize", "drop"]);
    pass(&lab, 31);
    on_the_way(&lab, "ip protocol gre counter drop");
    pass(&lab, 3);
    free_the_way(&lab);
    // Some that do not fit are counted here with their reason.
    let large = frames::jumbo(&Ends::HOST_TO_PEER, 1, 1514);
    lab.host(&["ip", "link", "set", "out0", "mtu", "1400"]);
    lab.said(&["sync"]).ok();
    lab.send(Ns::Host, "eth0", &[large.clone(), large]);
    pass(&lab, 1);
    let (all, is_whole) = verified(&lab, &[]);
    assert_counts(&all, [107, 105, 2, 96, 9, 0]);
    assert!(all["drops"]["oversize"] == 2 && !is_whole, "{all:#}");
    assert_eq!(all["taps"], serde_json::json!([]));
}

/// Sessions before which the collector has heard others, of which it did not hear the first copies, or only one.
#[test]
fn a_session_that_begins_again_is_told_from_the_one_before_by_its_copies() {
    for tunnel in [&["erspan2"][..], &["gre", "--sequence"]] {
        let lab = lab();
        up(&lab, tunnel);
        pass(&lab, 20);
        let _collector = counting(&lab, &[]);
        for count in [5, 10, 1, 2] {
            pass(&lab, count);
            let (all, is_whole) = verified(&lab, &[]);
            assert_eq!((&all["lost"], is_whole), (&0.into(), true), "{tunnel:?} {count}: {all:#}");
            lab.said(&["down"]).ok();
            up(&lab, tunnel);
        }
    }
}

#[test]
fn counts_alone_are_compared_where_copies_have_no_numbers() {
    let lab = lab();
    up(&lab, &["vxlan"]);
    // It is later by more than two clocks are apart.
    let made = Instant::now();
    assert!(poll(PATIENCE, || (made.elapsed() > Duration::from_millis(200)).then_some(())).is_some());
    let _collector = counting(&lab, &[]);
    verify(&lab, &[]).refused(1, "less than the session sends", "--interval 10s");
    lab.said(&["down"]).ok();
    up(&lab, &["vxlan"]);
    pass(&lab, 31);
    let (all, is_whole) = verified(&lab, &[]);
    assert_counts(&all, [93, 93, 0, 93, 0, 0]);
    assert!(is_whole && all["numbered"] == false, "{all:#}");
    on_the_way(&lab, "udp dport 4789 drop");
    pass(&lab, 2);
    free_the_way(&lab);
    let (some, is_whole) = verified(&lab, &[]);
    assert_counts(&some, [99, 99, 0, 93, 6, 0]);
    assert!(!is_whole);
    lab.said(&["down"]).ok();
    up(&lab, &["vxlan"]);
    let (none, is_whole) = verified(&lab, &[]);
    assert_counts(&none, [0; 6]);
    assert!(is_whole);
    on_the_way(&lab, "udp dport 4789 drop");
    pass(&lab, 2);
    free_the_way(&lab);
    let (lost, is_whole) = verified(&lab, &[]);
    assert_counts(&lost, [6, 6, 0, 0, 6, 0]);
    assert!(!is_whole);
    pass(&lab, 1);
    verify(&lab, &[]).refused(1, "counts on from a session before this one", "--interval 10s");
    verify(&lab, &["--control", "collector"]).refused(2, "--control", "10.0.0.7:9811");
    lab.said(&["verify", "--remote", "192.0.2.1"]).refused(
        1,
        "is no remote of session default",
        &COLLECTOR_IP.to_string(),
    );
}

#[test]
fn copies_that_the_collectors_full_queue_dropped_are_told_while_it_stands_still() {
    let lab = lab();
    let collector = counting(&lab, &["--tunnel", "geneve", "--listen", &COLLECTOR_IP.to_string()]);
    up(&lab, &["geneve", "--tell"]);
    pass(&lab, 31);
    signal(collector.id(), "STOP");
    // More than 64 MiB of queue.
    let many: Vec<Vec<u8>> = (0..70_000).map(|n| frames::jumbo(&Ends::PEER_TO_HOST, n, 1400)).collect();
    lab.send(Ns::Peer, "peer0", &many);
    lab.wait_until_received();
    signal(collector.id(), "CONT");
    let (all, is_whole) = verified(&lab, &[]);
    let number = |name: &str| all[name].as_u64().expect("a number");
    assert_eq!((number("sent"), number("dropped")), (70_093, 0), "{all:#}");
    assert!(number("lost") > 0 && number("lost") == number("collector_dropped") && !is_whole, "{all:#}");
}

#[test]
fn the_counters_are_told_to_whoever_asks_and_nothing_is_read() {
    let lab = lab();
    let _collector = counting(&lab, &[]);
    let at = format!("TCP:{COLLECTOR_IP}:9811");
    for _ in 0..20 {
        let said = lab.host(&["socat", "-T", "5", "SYSTEM:echo down; echo '{}'; cat >&2", &at]);
        let value: Value = serde_json::from_slice(&said.stderr).expect("JSON");
        assert!(value["seconds"].as_f64().expect("a number") > 0.0, "{value:#}");
        assert_eq!(value["streams"], serde_json::json!([]));
    }
}

#[test]
fn sessions_that_a_collector_takes_for_one_are_warned_of_and_not_verified() {
    let lab = lab();
    let collector = counting(&lab, &[]);
    let other = "198.51.100.77";
    lab.ip_batch(Ns::Collector, &format!("address add {other}/24 dev col0"));
    let start = |name: &str, remote: &str, tunnel: &[&str]| {
        lab.said(&[&["up", "eth0", "--name", name, "--remote", remote, "--tunnel"], tunnel].concat())
    };
    let at = COLLECTOR_IP.to_string();
    up(&lab, &["geneve", "--tell"]);
    let same = format!("session default sends to {at} with the same id, too (geneve from {OUT_IP})");
    start("second", &at, &["geneve", "--tell"]).ok_noting(&format!("snifctl: {same}"));
    pass(&lab, 31);
    let refused = |name: &str, rival: &str, ends: &str| {
        let names = format!("session {rival} sends to {at} with the same id as session {name} (");
        verify(&lab, &["--name", name]).refused(1, &names, ends);
    };
    refused("default", "second", "give one of them another id: --id 9");
    refused("second", "default", "give one of them another id: --id 9");
    // What it says works.
    lab.said(&["down", "--all"]).quietly_ok();
    drop(collector);
    let _collector = counting(&lab, &[]);
    up(&lab, &["geneve", "--tell"]);
    start("second", &at, &["geneve", "--tell", "--id", "9"]).quietly_ok();
    pass(&lab, 31);
    for name in ["default", "second"] {
        assert_counts(&verified(&lab, &["--name", name]).0, [93, 93, 0, 93, 0, 0]);
    }
    // Another request, and another remote, can make such a pair, too. Another tunnel, id or address does not.
    let said = start("second", &at, &["geneve", "--tell", "--replace"]).ok();
    assert!(said.stderr.lines().last().is_some_and(|line| line.contains(&same)), "{said:#?}");
    lab.said(&["sync", "--all"]).quietly_ok();
    start("third", other, &["geneve", "--tell"]).quietly_ok();
    lab.said(&["down", "--name", "second"]).quietly_ok();
    lab.said(&["remote", "add", &at, "--name", "third"]).ok_noting(&same);
    lab.said(&["down", "--name", "third"]).quietly_ok();
    start("second", &at, &["erspan2"]).quietly_ok();
    start("third", &at, &["gre", "--sequence"]).quietly_ok();
    let erspan = format!("session second sends to {at} with the same id, too (erspan2 from ");
    start("fourth", &at, &["erspan2", "--id", "7", "--egress-id", "1"]).ok_noting(&erspan);
    refused("fourth", "second", "--id 9");
    // Copies without numbers are in the way, too, except of those that tell their taps.
    start("fifth", &at, &["gre"]).quietly_ok();
    start("sixth", &at, &["geneve"]).quietly_ok();
    pass(&lab, 31);
    refused("fifth", "third", "--id 9");
    refused("third", "fifth", "--id 9");
    refused("sixth", "default", "--id 9");
    assert_counts(&verified(&lab, &["--name", "default"]).0, [186, 186, 0, 186, 0, 0]);
}

/// Answers whoever connects to the collector's control, by an address of socat's.
fn who_answers(lab: &Lab, by: &str) -> Background {
    let listen = format!("TCP-LISTEN:9811,bind={COLLECTOR_IP},reuseaddr,fork");
    let server = lab.background(Ns::Collector, &["socat", "-U", &listen, by]);
    let listens = || lab.collector(&["ss", "-Hltn", "sport = :9811"]).stdout;
    assert!(poll(PATIENCE, || (!listens().is_empty()).then_some(())).is_some(), "socat listens");
    server
}

#[test]
fn who_is_no_collector_is_told_from_one_that_is_not_there() {
    let lab = lab();
    up(&lab, &["geneve", "--tell"]);
    pass(&lab, 1);
    let at = format!("{COLLECTOR_IP}:9811");
    let file = lab.fresh_path("answer");
    for said in ["{}", "[]", r#"{"seconds":1}"#, r#"{"streams":[]}"#, "hello", ""] {
        fs::write(&file, said).expect("write the answer");
        let _server = who_answers(&lab, &format!("OPEN:{},rdonly", file.display()));
        let names = format!("--control {at} does not answer as a collector of snifctl does");
        verify(&lab, &[]).refused(1, &names, "see there: snifctl collect --help");
    }
    let silent = format!("--control {at} accepted and did not answer within 5 s");
    let server = who_answers(&lab, "SYSTEM:while printf x; do sleep 0.5; done");
    let begin = Instant::now();
    verify(&lab, &[]).refused(1, &silent, "-w day.pcapng");
    assert!(begin.elapsed() < Duration::from_secs(9), "{:?}", begin.elapsed());
    drop(server);
    let collector = counting(&lab, &[]);
    signal(collector.id(), "STOP");
    verify(&lab, &[]).refused(1, &silent, "-w day.pcapng");
    signal(collector.id(), "CONT");
}
