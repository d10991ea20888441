//! Seeing what passes an interface: tcpdump in the background, tshark afterwards.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::{Lab, Ns, PATIENCE, check_output, pcap, poll, signal};

/// Which packets of an interface a capture takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    In,
    Out,
    Both,
}

impl Direction {
    /// tcpdump's `-Q`. The filters `inbound` and `outbound` would say the same but lose the first packet (measured:
    /// libpcap runs a new filter in user space first, where the packet's direction is unknown).
    fn flag(self) -> &'static str {
        match self {
            Direction::In => "in",
            Direction::Out => "out",
            Direction::Both => "inout",
        }
    }
}

/// A running (or stopped) tcpdump on one interface. A tag that the kernel took off the frame is put back by libpcap.
pub(crate) struct Capture {
    what: String,
    tcpdump: Child,
    direction: Direction,
    pcap: PathBuf,
    stderr: PathBuf,
    counter: pcap::Counter,
    stopped: bool,
}

impl Lab {
    /// Starts capturing whole frames; returns when packets that pass from now on will be seen. 1023 frames may wait for
    /// tcpdump where the interface offloads (all but the out link).
    pub(crate) fn capture(&self, ns: Ns, iface: &str, direction: Direction) -> Capture {
        self.start_capture(ns, iface, direction, "0")
    }

    /// As [`Lab::capture`] for many frames of at most 2000 bytes: 30 times as many may wait.
    pub(crate) fn capture_wire(&self, ns: Ns, iface: &str, direction: Direction) -> Capture {
        self.start_capture(ns, iface, direction, "2000")
    }

    fn start_capture(&self, ns: Ns, iface: &str, direction: Direction, snaplen: &str) -> Capture {
        let (pcap, stderr) = (self.fresh_path("capture.pcap"), self.fresh_path("tcpdump.err"));
        let file = pcap.to_str().expect("a plain path");
        // No promiscuous mode (-p): it would change the interface that the test looks at, and a veth delivers all
        // anyway. -Z root: may write to the lab's private directory. -B in KiB: a ring of 64 MiB, in slots of 64 KiB
        // unless MTU (without offloads) or -s is smaller.
        let mut argv = vec!["tcpdump", "-p", "-n", "-i", iface, "-w", file, "-Z", "root", "-U", "--immediate-mode"];
        argv.extend(["-B", "65536", "-s", snaplen, "-Q", direction.flag()]);
        let log = File::create(&stderr).expect("make the file for tcpdump's messages");
        let tcpdump = self.command(ns, &argv).stdout(Stdio::null()).stderr(log).spawn().expect("start tcpdump");
        self.captures.lock().expect("no panic inside").push(tcpdump.id());
        let what = format!("{ns:?}'s {iface} ({direction:?})");
        let counter = pcap::Counter::new(&pcap);
        let mut capture = Capture { what, tcpdump, direction, pcap, stderr, counter, stopped: false };
        capture.wait_until_listening();
        capture
    }

    /// Whether every capture of the lab has read all that it was given (or has ended).
    pub(super) fn captures_at_rest(&self) -> bool {
        let captures = self.captures.lock().expect("no panic inside");
        captures.iter().all(|pid| process_state(*pid).is_none_or(|state| state == 'S'))
    }
}

impl Capture {
    /// Waits until at least `n` packets are captured; panics when they do not come.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, n: usize) {
        if poll(PATIENCE, || (self.count() >= n).then_some(())).is_none() {
            let got = self.count();
            self.end(); // for tcpdump's own tally
            panic!("{}: Expected to capture {n} packets, got {got}; {}", self.what, self.messages());
        }
    }

    /// Waits until no more packets come.
    pub(crate) fn settle(&mut self) {
        let mut before = usize::MAX;
        poll(PATIENCE, || {
            let now = self.count();
            let same = now == before;
            before = now;
            same.then_some(())
        });
    }

    /// How many packets are captured so far.
    pub(crate) fn count(&mut self) -> usize {
        self.counter.count()
    }

    /// Ends the capture and returns its frames in order, tags included; panics if any packet was lost on the way.
    #[track_caller]
    pub(crate) fn stop(&mut self) -> Vec<Vec<u8>> {
        pcap::read(self.finish())
    }

    /// As [`Capture::stop`] for tools: returns the file, in which frames may be cut.
    #[track_caller]
    pub(crate) fn finish(&mut self) -> &Path {
        if !self.stopped {
            self.end();
            self.assert_nothing_lost();
        }
        &self.pcap
    }

    /// Waits for `n` packets, ends the capture and panics unless there were exactly `n`.
    #[track_caller]
    pub(crate) fn take(&mut self, n: usize) -> Vec<Vec<u8>> {
        self.wait_for(n);
        let frames = self.stop();
        assert_eq!(frames.len(), n, "{}: Expected to capture {n} packets, got {}", self.what, frames.len());
        frames
    }

    /// The file, for tools; whole after [`Capture::stop`].
    pub(crate) fn pcap(&self) -> &Path {
        &self.pcap
    }

    fn wait_until_listening(&mut self) {
        let listening = poll(PATIENCE, || {
            let exited = self.tcpdump.try_wait().expect("wait for tcpdump").is_some();
            (exited || self.messages().contains("listening on")).then_some(!exited)
        });
        assert_eq!(listening, Some(true), "{}: tcpdump does not listen: {}", self.what, self.messages());
    }

    fn messages(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    fn end(&mut self) {
        self.wait_until_drained();
        signal(self.tcpdump.id(), "INT");
        let status = poll(PATIENCE, || self.tcpdump.try_wait().expect("wait for tcpdump"));
        let status = status.unwrap_or_else(|| panic!("{}: tcpdump ignored SIGINT", self.what));
        self.stopped = true;
        assert!(status.success(), "{}: tcpdump ended with {status}: {}", self.what, self.messages());
    }

    /// SIGINT makes tcpdump forget what its ring still holds, so it is sent only while tcpdump sleeps: it does so only
    /// when the ring is empty. Two looks, since it may be woken for a packet right after the first.
    fn wait_until_drained(&self) {
        let mut sleeps = 0;
        let drained = poll(PATIENCE, || {
            sleeps = if process_state(self.tcpdump.id()) == Some('S') { sleeps + 1 } else { 0 };
            (sleeps == 2).then_some(())
        });
        drained.unwrap_or_else(|| panic!("{}: tcpdump never came to rest", self.what));
    }

    #[track_caller]
    fn assert_nothing_lost(&self) {
        let messages = self.messages();
        assert_eq!(
            tally(&messages, "dropped by kernel"),
            Some(0),
            "{}: the capture lost packets: {messages}",
            self.what
        );
        // With one direction, "received" also counts the packets of the other.
        if self.direction == Direction::Both {
            let (captured, received) = (tally(&messages, "captured"), tally(&messages, "received by filter"));
            assert_eq!(captured, received, "{}: packets were left in the ring: {messages}", self.what);
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if !self.stopped {
            let _ = self.tcpdump.kill();
            let _ = self.tcpdump.wait();
        }
    }
}

/// The state of a process as ps shows it, S when it waits; none when there is no such process.
fn process_state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.trim_start().chars().next()
}

/// The number in tcpdump's last line of the kind "12 packets captured".
fn tally(messages: &str, what: &str) -> Option<u64> {
    let line = messages.lines().rfind(|line| line.ends_with(what))?;
    line.split_whitespace().next()?.parse().ok()
}

/// What tshark decodes of a pcap file: one row per packet that the display filter takes, one column per field (several
/// occurrences joined by `,`; a field that is absent is empty). tshark validates the IP, TCP and UDP checksums: field
/// `ip.checksum.status` and its like are 1 when good, 0 when bad, 2 when not verified.
pub(crate) fn tshark_fields(pcap: &Path, display_filter: &str, fields: &[&str]) -> Vec<Vec<String>> {
    let mut tshark = Command::new("tshark");
    tshark.env("HOME", "/tmp").env("LC_ALL", "C").arg("-n").arg("-r").arg(pcap);
    for preference in ["ip.check_checksum", "tcp.check_checksum", "udp.check_checksum"] {
        tshark.args(["-o", &format!("{preference}:TRUE")]);
    }
    tshark.args(["-Y", display_filter, "-T", "fields", "-E", "separator=/t", "-E", "occurrence=a"]);
    for field in fields {
        tshark.args(["-e", field]);
    }
    let out = check_output(&format!("tshark -r {} -Y '{display_filter}'", pcap.display()), tshark.output());
    let text = String::from_utf8(out.stdout).expect("UTF-8 from tshark");
    text.lines().map(|line| line.split('\t').map(str::to_owned).collect()).collect()
}
