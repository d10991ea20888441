//! `status --watch`: on a terminal of its own, read back as a screen, and without one.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::num::NonZeroU16;
use std::process::{Child, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use crate::lab;
use crate::lab::frames::{self, Ends};
use crate::lab::judge::UP;
use crate::lab::traffic::Stream;
use crate::lab::{Lab, Ns, PATIENCE, poll};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};
use serde_json::Value;

const SNIFCTL: &str = env!("CARGO_BIN_EXE_snifctl");

/// A terminal with a program on it, ended with its value.
struct Screen {
    child: Child,
    master: File,
    slave: File,
    bytes: Receiver<Vec<u8>>,
    parser: vt100::Parser,
    /// The terminal's modes before.
    before: String,
    /// What came, as it came.
    raw: Vec<u8>,
}

fn modes(slave: &File) -> String {
    format!("{:?}", tcgetattr(slave).expect("a terminal"))
}

impl Screen {
    /// Starts snifctl on a terminal of 24 lines and 80 columns.
    fn start(lab: &Lab, words: &[&str], environment: &[(&str, &str)]) -> Screen {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        grantpt(&master).and_then(|()| unlockpt(&master)).expect("its other end");
        let path = ptsname(&master, Vec::new()).expect("its name");
        let slave = OpenOptions::new().read(true).write(true).open(path.to_str().expect("a path")).expect("open it");
        let (master, before) = (File::from(master), modes(&slave));
        resize(&master, 80, 24);
        let end = || Stdio::from(slave.try_clone().expect("another handle"));
        let argv = [&[SNIFCTL], words].concat();
        let mut command = lab.command(Ns::Host, &argv);
        command.env("TERM", "xterm").env_remove("NO_COLOR").envs(environment.iter().copied());
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().expect("snifctl starts");
        let (send, bytes) = mpsc::channel();
        let mut reader = master.try_clone().expect("another handle");
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n) = reader.read(&mut buffer) {
                if n == 0 || send.send(buffer[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        Screen {
            child,
            master,
            slave,
            bytes,
            parser: vt100::Parser::new(some(24), some(80), 0),
            before,
            raw: Vec::new(),
        }
    }

    /// What is on the screen by now.
    fn text(&mut self) -> String {
        while let Ok(bytes) = self.bytes.recv_timeout(Duration::from_millis(1)) {
            self.parser.process(&bytes);
            self.raw.extend(bytes);
        }
        self.parser.screen().contents()
    }

    /// Waits until the screen is as it must be.
    #[track_caller]
    fn until(&mut self, what: &str, is_it: impl Fn(&str) -> bool) -> String {
        let found = poll(PATIENCE, || Some(self.text()).filter(|text| is_it(text)));
        found.unwrap_or_else(|| panic!("{what}:\n{}", self.text()))
    }

    #[track_caller]
    fn shows(&mut self, words: &str) -> String {
        self.until(words, |text| text.contains(words))
    }

    fn press(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).expect("a key");
    }

    /// Panics unless it ends by itself, with success, and leaves the terminal as it was.
    #[track_caller]
    fn ends(mut self) {
        let status = poll(PATIENCE, || self.child.try_wait().expect("wait"));
        assert!(status.is_some_and(|status| status.success()), "{status:?}:\n{}", self.text());
        // What it wrote last may still be on its way here.
        let is_back = poll(PATIENCE, || {
            self.text();
            let screen = self.parser.screen();
            (!screen.alternate_screen() && !screen.hide_cursor()).then_some(())
        });
        assert!(is_back.is_some(), "the main screen, and the cursor");
        assert_eq!(modes(&self.slave), self.before);
        // Nothing is left on the screen that was there before.
        assert_eq!(self.parser.screen().contents(), "");
    }
}

fn some(n: u16) -> NonZeroU16 {
    NonZeroU16::new(n).expect("not zero")
}

fn resize(master: &File, columns: u16, lines: u16) {
    let size = Winsize { ws_row: lines, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(master, size).expect("another size");
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const WATCH: [&str; 4] = ["status", "--watch", "--interval", "200ms"];

#[test]
fn the_screen_shows_rates_and_obeys_keys() {
    let lab = Lab::roomy();
    lab.said(&[&UP[..], &["--max-rate", "300pps"]].concat()).quietly_ok();
    let stream =
        Stream::start(&lab, (Ns::Peer, "peer0"), &frames::series(&Ends::PEER_TO_HOST, 10), 20000, "--pps=1000");
    let mut screen = Screen::start(&lab, &WATCH, &[]);
    let is_dropping = |text: &str| {
        let row = text.lines().find(|line| line.contains("  eth0               ingress  dropping "));
        row.is_some_and(|row| row.contains('▇') || row.contains('█')) && text.contains("  drops: rate ")
    };
    let shown = screen.until("a tap that drops, with a history", is_dropping);
    let lines: Vec<&str> = shown.lines().collect();
    assert!(lines[0].starts_with("default: gre, oversize segment, max-rate 300pps"), "{shown}");
    assert!(lines[1].contains(" seen/s, ") && lines[1].contains(" drops/s"), "{shown}");
    assert!(shown.contains("  198.51.100.2       out0     dropping "), "{shown}");
    assert!(shown.contains("q quit  p pause  s sort: worst  f filter"), "{shown}");
    assert_eq!((lines.len(), lines.iter().all(|line| line.chars().count() <= 80)), (24, true), "{shown}");
    assert!(String::from_utf8_lossy(&screen.raw).contains("\u{1b}[38;5;1m"), "drops are red");

    screen.press("s");
    screen.shows("s sort: rate");
    screen.press("p");
    screen.shows("  paused");
    screen.press("p");
    screen.until("it goes on", |text| !text.contains("  paused"));
    screen.press("?");
    screen.shows("this help");
    screen.press("x");
    screen.until("the help is gone", |text| !text.contains("this help"));

    // A filter with a mistake, and a right one.
    screen.press("f");
    screen.shows("filter: ▏");
    screen.press("udp port\r");
    screen.shows("EXPR \"udp port\"");
    screen.press("fudp port 53\r");
    screen.shows("the filter is in force");
    assert_eq!(lab.session().filter.as_deref(), Some("udp port 53"));
    screen.shows("  filter: udp port 53");
    screen.press("f\u{15}\r");
    screen.until("every packet", |text| !text.contains("  filter: udp"));
    assert_eq!(lab.session().filter, None);

    // Larger, smaller, too small.
    resize(&screen.master, 100, 40);
    screen.parser.screen_mut().set_size(some(40), some(100));
    let shown = screen.until("40 lines", |text| text.lines().count() == 40);
    assert!(shown.lines().last().is_some_and(|line| line.starts_with("q quit")), "{shown}");
    resize(&screen.master, 30, 8);
    screen.parser.screen_mut().set_size(some(8), some(30));
    screen.shows("60x10 is needed");
    resize(&screen.master, 80, 24);
    screen.parser.screen_mut().set_size(some(24), some(80));
    screen.shows("q quit");

    // The session goes, and comes again.
    lab.said(&["down"]).quietly_ok();
    screen.shows("no session is up; waiting for one");
    lab.said(&UP).quietly_ok();
    screen.shows("  eth0  ");
    stream.stop();
    screen.press("q");
    screen.ends();
}

#[test]
fn signals_leave_the_terminal_as_it_was() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    for signal in ["TERM", "INT", "HUP"] {
        let mut screen = Screen::start(&lab, &WATCH, &[("NO_COLOR", "1")]);
        screen.shows("  eth0  ");
        assert!(screen.parser.screen().alternate_screen(), "{signal}");
        lab::signal(screen.child.id(), signal);
        assert!(!String::from_utf8_lossy(&screen.raw).contains("\u{1b}[38;5;"), "no colours");
        screen.ends();
    }
    let mut screen = Screen::start(&lab, &WATCH, &[]);
    screen.shows("  eth0  ");
    screen.press("\u{3}");
    screen.ends();
}

#[test]
fn each_session_has_its_screen_and_its_filter() {
    let lab = Lab::roomy();
    lab.said(&[&UP[..], &["--name", "a"]].concat()).quietly_ok();
    lab.said(&[&UP[..], &["--name", "b", "--id", "7"]].concat()).quietly_ok();
    let mut screen = Screen::start(&lab, &WATCH, &[]);
    screen.shows("(session 1 of 2)");
    screen.press("\t");
    screen.until("the other one", |text| text.starts_with("b: gre id 7") && text.contains("(session 2 of 2)"));
    // The other one goes while a filter is typed for this one.
    screen.press("fudp");
    screen.shows("filter: udp▏");
    lab.said(&["down", "--name", "a"]).quietly_ok();
    screen.until("it stays", |text| text.starts_with("b: ") && !text.contains("(session "));
    screen.press(" port 53\r");
    screen.shows("the filter is in force");
    assert_eq!(lab.session_called("b").filter.as_deref(), Some("udp port 53"));
    screen.press("q");
    screen.ends();
}

/// The lines of a look, until there are so many.
fn lines(lab: &Lab, more: &[&str], count: usize) -> Vec<String> {
    let argv = [&[SNIFCTL][..], &WATCH, more].concat();
    let mut child = lab.command(Ns::Host, &argv).stdout(Stdio::piped()).spawn().expect("snifctl starts");
    let mut out = std::io::BufReader::new(child.stdout.take().expect("its output"));
    let lines = (0..count).map(|_| {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut out, &mut line).expect("a line");
        line
    });
    let lines = lines.collect();
    // Whose reader has gone ends, and that is no failure.
    drop(out);
    let status = poll(PATIENCE, || child.try_wait().expect("wait"));
    assert!(status.is_some_and(|status| status.success()), "{status:?}");
    lines
}

#[test]
fn without_a_terminal_there_is_a_line_a_look() {
    let lab = Lab::roomy();
    lab.said(&UP).quietly_ok();
    let stream = Stream::start(&lab, (Ns::Peer, "peer0"), &frames::series(&Ends::PEER_TO_HOST, 10), 20000, "--pps=500");
    lab.host(&["tc", "filter", "del", "dev", "eth0", "egress"]);
    let plain = lines(&lab, &[], 3);
    let is_right = |line: &String| {
        line.starts_with("default: ")
            && line.ends_with(" 0 drops/s; tap eth0 egress detached\n")
            && !line.starts_with("default: 0 seen/s")
    };
    assert!(plain.iter().all(is_right), "{plain:?}");
    let json = lines(&lab, &["--json"], 2);
    stream.stop();
    for line in json {
        let look: Value = serde_json::from_str(&line).expect("an object a line");
        assert!(look["rise"]["seen"].as_u64() > Some(0) && look["unwell"][0] == "tap eth0 egress detached", "{look}");
    }
    for signal in ["INT", "TERM"] {
        let argv = [&[SNIFCTL][..], &WATCH].concat();
        let mut child = lab.command(Ns::Host, &argv).stdout(Stdio::piped()).spawn().expect("snifctl starts");
        let mut out = child.stdout.take().expect("its output");
        assert!(out.read(&mut [0; 1]).is_ok_and(|n| n == 1), "{signal}");
        lab::signal(child.id(), signal);
        let status = poll(PATIENCE, || child.try_wait().expect("wait"));
        assert!(status.is_some_and(|status| status.success()), "{signal}: {status:?}");
    }
    lab.said(&[&WATCH[..], &["--check"]].concat()).refused(2, "--watch", "try: snifctl status --help");
    lab.said(&[&WATCH[..], &["--name", "x"]].concat()).refused(1, "x", "");
}
