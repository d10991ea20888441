//! The text of `status`: what stands where, in 80 columns, with few taps and with many.

use crate::lab::frames::{self, Ends};
use crate::lab::judge::{UP, up_with};
use crate::lab::links::add_link;
use crate::lab::traffic::Stream;
use crate::lab::{Lab, Ns};
use indoc::indoc;
use serde_json::{Value, json};

/// What `status` prints with these options, where lines have 80 columns.
#[track_caller]
fn text(lab: &Lab, more: &str) -> String {
    let words: Vec<&str> = ["status"].into_iter().chain(more.split_whitespace()).collect();
    let out = lab.snifctl(&words).env("COLUMNS", "80").output().expect("snifctl starts");
    assert!(out.status.success() && out.stderr.is_empty(), "{out:?}");
    let text = String::from_utf8(out.stdout).expect("text");
    let plain =
        text.replace("\u{1b}[0m", "").replace("\u{1b}[31m", "").replace("\u{1b}[32m", "").replace("\u{1b}[33m", "");
    assert!(plain.lines().all(|line| line.chars().count() <= 80), "{plain}");
    text
}

/// Without ages, which no test knows.
fn ageless(text: &str) -> String {
    text.lines().filter(|line| !line.starts_with("  up ")).map(|line| format!("{line}\n")).collect()
}

#[test]
fn a_session_in_80_columns() {
    let lab = Lab::new();
    let words = ["--filter", "udp", "--ttl", "9", "--snaplen", "1000", "--oversize", "fragment", "--name", "web"];
    lab.said(&up_with(&words)).ok();
    lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, 1009));
    lab.send(Ns::Peer, "peer0", &[frames::arp(&Ends::PEER_TO_HOST)]);
    lab.send(Ns::Peer, "peer0", &[frames::jumbo(&Ends::PEER_TO_HOST, 1, 1514)]);
    lab.send(Ns::Host, "eth0", &frames::series(&Ends::HOST_TO_PEER, 7));
    let shown = text(&lab, "");
    assert!(shown.starts_with("web: gre, oversize fragment, snaplen 1000\n  up "), "{shown}");
    let expected = indoc! {"
        web: gre, oversize fragment, snaplen 1000
          filter: udp
          options: ttl 9
          TAP   DIRECTION  HEALTH   SEEN  LEFT OUT  COPIES    BYTES  DROPS
          eth0  ingress    ok      1,011         1   1,010  734 KiB      0
          eth0  egress     ok          7         0       7    784 B      0
          REMOTE        OUT    MTU  HEALTH   SENT    BYTES  DROPS
          198.51.100.2  out0  1500  ok      1,017  663 KiB      0
          drops: none
          of the copies: 319 truncated
    "};
    assert_eq!(ageless(&shown), expected, "{shown}");
    // What is wrong is said in one word, and why beside it.
    lab.host(&["ip", "link", "set", "dev", "out0", "mtu", "1400"]);
    lab.host(&["tc", "filter", "del", "dev", "eth0", "egress"]);
    let shown = text(&lab, "");
    let taps = "  eth0  egress     detached      7         0       7    784 B      0\n      its filter is gone\n  eth0  ingress    ok  ";
    assert!(shown.contains(taps), "the worst first:\n{shown}");
    assert!(shown.contains("1500  outdated  1,017  663 KiB      0\n      MTU 1500 → 1400\n"), "{shown}");
    assert_eq!(ageless(&text(&lab, "--color never")), ageless(&text(&lab, "--color auto")), "no terminal");
    let painted = text(&lab, "--color always");
    assert!(
        painted.contains("\u{1b}[31mdetached\u{1b}[0m ") && painted.contains("\u{1b}[33moutdated\u{1b}[0m "),
        "{painted}"
    );
    assert!(painted.contains("\u{1b}[32mok\u{1b}[0m "), "{painted}");
    let verbose = lab.said(&["status", "-v"]).stdout;
    let sizes = "  sizes of copies:\n    up to     64 B          3  █\n    up to    128 B         54  █████\n";
    assert!(
        verbose.contains(sizes) && verbose.contains("\n    up to 2.00 KiB        303  ██████████████████████████\n"),
        "{verbose}"
    );
}

#[test]
fn what_copies_were_like_is_counted() {
    let lab = Lab::new();
    lab.said(&up_with(&["--oversize", "fragment", "--profile"])).ok();
    let large: Vec<Vec<u8>> = (0..3).map(|n| frames::jumbo(&Ends::PEER_TO_HOST, n, 1514)).collect();
    let tagged: Vec<Vec<u8>> =
        frames::series(&Ends::PEER_TO_HOST, 5).iter().map(|frame| frames::tagged(0x8100, 7, frame)).collect();
    lab.send(Ns::Peer, "peer0", &large);
    lab.send(Ns::Host, "eth0", &tagged);
    let session = lab.said(&["status", "--json", "-v"]).json()["sessions"][0].clone();
    let forms = json!({
        "super_packets": 0, "segments": 0, "vlan": 5, "truncated": 0, "fragmented": 3, "fragments": 6,
    });
    assert_eq!(session["forms"], forms);
    let calls: u64 = session["times"].as_array().expect("times").iter().map(|at| at["count"].as_u64().unwrap()).sum();
    assert_eq!(calls, 8, "{session:#}");
    let metrics = lab.said(&["metrics"]).quietly_ok().stdout;
    for line in [
        "snifctl_copies_vlan_packets_total{session=\"default\"} 5",
        "snifctl_fragments_total{session=\"default\"} 6",
        "snifctl_tap_time_seconds_count{session=\"default\"} 8",
    ] {
        assert!(metrics.lines().any(|at| at == line), "{line} in\n{metrics}");
    }
    let shown = text(&lab, "");
    assert!(shown.contains("  options: profile\n"), "{shown}");
    assert!(shown.contains("  of the copies: 5 with a VLAN tag, 3 in 6 fragments\n  time in taps: "), "{shown}");
    // It goes on with what there is, and counts no more once it is off.
    lab.said(&up_with(&["--oversize", "fragment", "--replace"])).ok();
    lab.send(Ns::Peer, "peer0", &large);
    let session = lab.said(&["status", "--json", "-v"]).json()["sessions"][0].clone();
    assert_eq!((session.get("times"), &session["forms"]["fragments"]), (None, &json!(12)), "{session:#}");
}

#[test]
fn rates_are_what_comes_between_two_looks() {
    let lab = Lab::roomy();
    lab.said(&up_with(&["--max-rate", "100pps"])).quietly_ok();
    let stream = Stream::start(&lab, (Ns::Peer, "peer0"), &frames::series(&Ends::PEER_TO_HOST, 10), 2000, "--pps=500");
    let status = lab.said(&["status", "--interval", "1s", "--json"]).quietly_ok().json();
    let (tap, remote) = (&status["sessions"][0]["taps"][0], &status["sessions"][0]["remotes"][0]);
    let per_second = |at: &Value, what: &str| {
        at["rise"][what].as_f64().expect("a number") / at["rise"]["seconds"].as_f64().expect("seconds")
    };
    assert!((20.0..=150.0).contains(&per_second(remote, "copies")), "{remote:#}");
    assert!(per_second(tap, "seen") > per_second(remote, "copies"), "{tap:#}");
    assert!(remote["rise"]["seconds"].as_f64() >= Some(1.0), "{remote:#}");
    assert_eq!((&tap["health"], &remote["health"]), (&json!("dropping"), &json!("dropping")));
    assert!(status["machine"]["softnet_dropped"].is_u64(), "{status:#}");
    let shown = text(&lab, "--interval 200ms");
    stream.stop();
    assert!(shown.contains("  TAP   DIRECTION  HEALTH    SEEN/s  COPIES/s "), "{shown}");
    assert!(shown.contains(" copies were not sent\n"), "{shown}");
    for interval in ["0", "-1", "x", "4000s"] {
        let line = format!("--interval {interval:?} is not a time from 50ms to 3600s");
        lab.said(&["status", "--interval", interval]).refused(2, &line, "try: --interval 2s");
    }
}

#[test]
fn the_pins_tell_how_old_a_session_and_its_last_change_are() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    let line = |lab: &Lab| text(lab, "").lines().nth(1).expect("a second line").to_string();
    assert!(line(&lab).starts_with("  up ") && !line(&lab).contains("changed"), "{}", line(&lab));
    // As if it were from then.
    let age = |lab: &Lab, when: &str| {
        let pins = lab.pins().join("default");
        lab.host(&["find", pins.to_str().expect("a plain path"), "-exec", "touch", "-d", when, "{}", "+"]);
    };
    age(&lab, "75 hours ago");
    assert_eq!(line(&lab), "  up 3d 3h");
    let status = lab.status_json();
    lab.said(&["sync"]).quietly_ok();
    assert_eq!((line(&lab).as_str(), lab.status_json()), ("  up 3d 3h", status), "nothing has changed");
    for words in [
        "filter set udp",
        "tap remove eth0 --direction egress",
        "remote add 198.51.100.9",
        "up eth0 --tunnel gre --remote 198.51.100.2 --replace",
    ] {
        lab.said(&words.split(' ').collect::<Vec<_>>()).ok();
        let shown = line(&lab);
        assert!(shown.starts_with("  up 3d 3h, changed ") && shown.ends_with("s ago"), "{words}: {shown}");
        age(&lab, "75 hours ago");
    }
}

#[test]
fn of_many_taps_the_worst_are_shown() {
    let lab = Lab::roomy();
    (1..=100).for_each(|n| add_link(&lab, n));
    let names: Vec<String> = (1..=100).map(|n| format!("eth{n}")).collect();
    let up = [&["up"], &names.iter().map(String::as_str).collect::<Vec<_>>()[..], &UP[2..]].concat();
    lab.said(&up).ok();
    lab.host(&["tc", "filter", "del", "dev", "eth77", "egress"]);
    let shown = text(&lab, "");
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(
        lines[3].split_whitespace().collect::<Vec<_>>(),
        ["eth77", "egress", "detached", "0", "0", "0", "B", "0"]
    );
    assert_eq!(lines[4], "      its filter is gone");
    assert_eq!(lines[24], "  and 180 more: 180 ok; all of them with: snifctl status --all", "{shown}");
    assert_eq!(text(&lab, "--all").lines().filter(|line| line.contains("  ok  ")).count(), 199 + 1);
    lab.said(&["down"]).quietly_ok();
}
