//! The model's rates, the view at 80 columns and in any window, and the terminal that comes back.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::process::Command;
use std::time::{Duration, Instant};

use indoc::indoc;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::tcgetattr;

use super::model::{Model, Sort};
use super::terminal::Terminal;
use super::view::{Choice, draw, sparkline, text};
use crate::datapath::abi::{Choice as Chosen, Forms, Stat, TapCounts};
use crate::request::tests::request;
use crate::session::counted::Counted;
use crate::session::health::Health;
use crate::session::stats::{RemoteState, RemoteStatus, TapStatus};

fn tap(interface: &str, direction: &'static str, [seen, copies, dropped]: [u64; 3]) -> TapStatus {
    TapStatus {
        interface: interface.into(),
        direction,
        attached: true,
        exists: true,
        pattern: None,
        unseen: None,
        counts: TapCounts {
            stat: Stat { pcnt: copies, bcnt: 100 * copies, dcnt: dropped },
            choice: Chosen { seen, ..Chosen::default() },
        },
        health: Health::Ok,
        why: None,
        rise: None,
    }
}

fn remote(last: u8, [sent, dropped]: [u64; 2]) -> RemoteStatus {
    RemoteStatus {
        address: [10, 0, 0, last].into(),
        source: None,
        interface: Some("out0".into()),
        mac: None,
        mtu: 1500,
        state: RemoteState::Ok,
        silence: None,
        stat: Stat { pcnt: sent, bcnt: 100 * sent, dcnt: dropped },
        health: Health::Ok,
        why: None,
        rise: None,
    }
}

fn counted(at: Instant, taps: Vec<TapStatus>, remotes: Vec<RemoteStatus>) -> Counted {
    Counted {
        name: "web".into(),
        at,
        version: String::new(),
        options: request(&["eth0", "--filter", "udp"]).options,
        taps,
        removed_taps: TapCounts::default(),
        remotes,
        removed: Stat::default(),
        drops: [("rate".to_string(), 5), ("out".to_string(), 0)].into(),
        forms: Forms::default(),
        sizes: Vec::new(),
        times: None,
        out_dropped: 0,
    }
}

/// Two looks, two seconds apart.
fn model() -> Model {
    let (mut model, start) = (Model::default(), Instant::now());
    let taps =
        |n: u64| vec![tap("eth0", "ingress", [1000 * n, 1000 * n, 0]), tap("eth0", "egress", [10 * n, 10 * n, 5])];
    model.sample(vec![counted(start, taps(1), vec![remote(7, [1005, 5])])]);
    let mut second = taps(3);
    second[1].counts.stat.dcnt = 9;
    model.sample(vec![counted(start + Duration::from_secs(2), second, vec![remote(7, [3021, 9])])]);
    model
}

#[test]
fn rates_are_of_the_time_between_two_looks_and_never_fall_below_zero() {
    let mut model = model();
    let live = &model.sessions[0];
    assert_eq!([live.taps[0].rate(), live.taps[1].rate(), live.remotes[0].rate()], [1000.0, 10.0, 1008.0]);
    assert_eq!((live.taps[1].health, live.unwell().len()), (Health::Dropping, 2));
    assert_eq!(live.total().map(|rise| (rise.seen, rise.dropped)), Some((2020, 4)));
    // The interface was made anew, and its counters with it; another has come.
    let later = Instant::now() + Duration::from_secs(3);
    let taps = vec![tap("eth0", "ingress", [30, 30, 0]), tap("eth1", "ingress", [7, 7, 0])];
    model.sample(vec![counted(later, taps, vec![remote(7, [3030, 9])])]);
    let live = &model.sessions[0];
    assert_eq!(live.taps.iter().map(|tap| tap.rise.unwrap().copies).collect::<Vec<_>>(), [30, 7]);
    assert!(live.taps.iter().all(|tap| tap.history.iter().all(|rate| *rate >= 0.0)));
    assert_eq!(live.taps[0].history.len(), 2);
    model.sample(Vec::new());
    assert!(model.sessions.is_empty());
}

#[test]
fn the_view_in_80_columns() {
    let shown = text(&draw(&model(), &Choice::default(), (80, 24)));
    let expected = indoc! {"
        web: gre, oversize segment
          filter: udp
          1,010 seen/s, 1,010 copies/s, 808kbit, 2.0 drops/s
          TAP                SIDE     HEALTH     COPIES/s    BITS/s DROPS/s COPIES
          eth0               egress   dropping         10  8.00kbit     2.0 █
          eth0               ingress  ok            1,000   800kbit       0 █
          REMOTE             OUT      HEALTH     COPIES/s    BITS/s DROPS/s COPIES
          10.0.0.7           out0     dropping      1,008   806kbit     2.0 █
          drops: rate 5
    "};
    assert!(shown.starts_with(expected), "{shown}");
    assert!(shown.ends_with("\n\nq quit  p pause  s sort: worst  f filter  n next  ↑↓ scroll  ? help\n"), "{shown}");
    assert_eq!(shown.lines().count(), 24);
    let by = |sort| {
        let lines = draw(&model(), &Choice { sort, ..Choice::default() }, (80, 24));
        text(&lines).lines().nth(4).unwrap().split_whitespace().nth(1).unwrap().to_string()
    };
    assert_eq!([Sort::Worst, Sort::Rate, Sort::Drops, Sort::Name].map(by), ["egress", "ingress", "egress", "egress"]);
    let typing = Choice { prompt: Some("tcp".into()), helps: true, ..Choice::default() };
    let shown = text(&draw(&model(), &typing, (80, 24)));
    assert!(shown.ends_with("filter: tcp▏\n") && shown.contains("  f              type a filter"), "{shown}");
}

#[test]
fn every_window_is_filled_and_never_overflows() {
    let start = Instant::now();
    let name = |n: usize| format!("netns:customer-{n}/eth0-{n}");
    let taps = |at: u64| (0..200).map(|n| tap(&name(n), "ingress", [at * n as u64, at, 0])).collect::<Vec<_>>();
    let mut model = Model::default();
    model.sample(vec![counted(start, taps(1), (0..8).map(|n| remote(n, [1, 0])).collect())]);
    model.sample(vec![counted(start + Duration::from_secs(1), taps(9), (0..8).map(|n| remote(n, [9, 0])).collect())]);
    for size in (0..200).step_by(7).flat_map(|width| (0..60).step_by(5).map(move |height| (width, height))) {
        for (model, scroll) in [(&model, 0), (&model, 150), (&Model::default(), 9)] {
            let lines = draw(model, &Choice { scroll, ..Choice::default() }, size);
            assert_eq!(lines.len(), size.1, "{size:?}");
            assert!(text(&lines).lines().all(|line| line.chars().count() <= size.0), "{size:?}");
        }
    }
    let shown = text(&draw(&model, &Choice { scroll: 150, ..Choice::default() }, (80, 24)));
    assert!(shown.contains("  TAP 151-161/200 ") && shown.contains("eth0-150 ingress"), "{shown}");
}

#[test]
fn a_sparkline_shows_the_latest_against_the_highest() {
    let history = VecDeque::from([80.0, 0.0, 10.0, 20.0, 40.0, 5.0]);
    assert_eq!(sparkline(&history, 6), "█ ▁▂▄▁");
    assert_eq!(sparkline(&history, 2), "▄▁");
    assert_eq!(sparkline(&VecDeque::from([0.0, 0.0]), 9), "  ");
}

/// In a process of its own on a terminal of its own: this test again, which then panics.
#[test]
fn a_panic_gives_the_terminal_back() {
    const INSIDE: &str = "SNIFCTL_TEST_PANICS";
    if std::env::var_os(INSIDE).is_some() {
        let _terminal = Terminal::take(true).unwrap();
        panic!("as it must");
    }
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let path = ptsname(&master, Vec::new()).unwrap();
    let slave = OpenOptions::new().read(true).write(true).open(path.to_str().unwrap()).unwrap();
    let before = format!("{:?}", tcgetattr(&slave).unwrap());
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "commands::live::tests::a_panic_gives_the_terminal_back", "--nocapture"])
        .env(INSIDE, "1")
        .stdin(slave.try_clone().unwrap())
        .stdout(slave.try_clone().unwrap())
        .stderr(slave.try_clone().unwrap())
        .spawn()
        .unwrap();
    // Before the other end is closed, so that what it wrote is still there.
    let mut out = File::from(master);
    let mut said = String::new();
    let mut buffer = [0; 4096];
    while !said.contains("as it must") || !said.contains("FAILED") {
        let n = out.read(&mut buffer).unwrap();
        said += &String::from_utf8_lossy(&buffer[..n]);
    }
    assert!(!child.wait().unwrap().success());
    out.flush().unwrap();
    let (entered, left) = (said.find("\u{1b}[?1049h"), said.find("\u{1b}[?1049l"));
    assert!(entered.is_some() && left > entered && said.find("as it must") > left, "{said}");
    assert!(said.contains("\u{1b}[?25h"), "the cursor is shown: {said}");
    assert_eq!(format!("{:?}", tcgetattr(&slave).unwrap()), before);
}
