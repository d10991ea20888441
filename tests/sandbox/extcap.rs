//! Wireshark's extcap: real tshark and dumpcap capture what arrives here, and interfaces of another machine behind a real
//! sshd, which is left as it was, however the capture ends.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::lab::capture::{Direction, tshark_fields};
use crate::lab::check::assert_same_frames;
use crate::lab::collect::*;
use crate::lab::frames::{self, Ends};
use crate::lab::judge::Said;
use crate::lab::sshd::{Sshd, child_of, descendants, runs};
use crate::lab::{
    COLLECTOR_IP, COLLECTOR_IP6, Lab, Ns, OUT_IP, OUT_IP6, OUT_MAC, Options, PATIENCE, mac_text, poll, signal,
};

const SNIFCTL: &str = env!("CARGO_BIN_EXE_snifctl");
const PRIME: usize = 7;

/// A lab whose collector has Wireshark's directory with the link in it, and addresses.
struct Desk {
    lab: Lab,
    before: String,
}

impl Desk {
    fn new() -> Desk {
        let lab = Lab::with(Options { out_mtu: 1700, ..Options::default() });
        answering(&lab, &[COLLECTOR_IP.into(), COLLECTOR_IP6.into()]);
        // Neither asks for the other's MAC address.
        let known =
            |address: String| format!("neigh replace {address} lladdr {} nud permanent dev col0", mac_text(OUT_MAC));
        lab.ip_batch(Ns::Collector, &[known(OUT_IP.to_string()), known(OUT_IP6.to_string())].join("\n"));
        let plugins = lab.dir().join("home/.config/wireshark/extcap");
        fs::create_dir_all(&plugins).expect("a directory");
        symlink(SNIFCTL, plugins.join("snifctl-extcap")).expect("a link");
        let before = lab.machine();
        Desk { lab, before }
    }

    fn link(&self) -> PathBuf {
        self.lab.dir().join("home/.config/wireshark/extcap/snifctl-extcap")
    }

    fn tshark<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Command {
        let mut command = self.lab.command(Ns::Collector, &["tshark"]);
        command.args(args).env("HOME", self.lab.dir().join("home")).env_remove("XDG_CONFIG_HOME");
        command
    }

    /// The program as Wireshark calls it.
    fn extcap<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Command {
        let mut command = self.lab.command(Ns::Collector, &[]);
        command.arg(self.link()).args(args);
        command
    }

    fn asked(&self, args: &[&str]) -> String {
        Said::from(self.extcap(args).output().expect("run it")).quietly_ok().stdout
    }

    /// Waits until the other machine is watched.
    #[track_caller]
    fn wait_until_up(&self, capture: &mut Running) {
        let is_up = poll(PATIENCE, || {
            assert!(capture.child.try_wait().expect("a child").is_none(), "{}", capture.said());
            // It may have to wait for the `up`, and say so.
            let status = self.lab.said(&["status", "--json"]).ok().json();
            let taps = status["sessions"][0]["taps"].as_array().map_or(0, Vec::len);
            (taps == 2).then_some(())
        });
        assert!(is_up.is_some(), "{}", capture.said());
        assert!(self.lab.session().name.starts_with("extcap-"));
    }

    /// Waits until the other machine is as it was.
    #[track_caller]
    fn wait_until_down(&self) {
        poll(PATIENCE, || (!self.lab.pins().exists() && self.lab.machine() == self.before).then_some(()));
        self.lab.assert_as_before(&self.before);
    }
}

/// A capture at work.
struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    fn start(lab: &Lab, command: &mut Command) -> Running {
        let log = lab.fresh_path("said");
        let child = command.stdout(Stdio::null()).stderr(File::create(&log).expect("a file")).spawn();
        Running { child: child.expect("start a capture"), log }
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits for its end. Its exit code, where no signal was the end, and what it said.
    #[track_caller]
    fn ended(mut self) -> (Option<i32>, String) {
        let status = poll(PATIENCE, || self.child.try_wait().expect("a child"));
        (status.unwrap_or_else(|| panic!("it goes on: {}", self.said())).code(), self.said())
    }

    #[track_caller]
    fn stop(self, name: &str) -> (Option<i32>, String) {
        signal(self.child.id(), name);
        self.ended()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[track_caller]
fn wait_for_frames(file: &Path, frames: usize, capture: &Running) {
    let all = poll(PATIENCE, || (count(file) >= frames).then_some(()));
    assert!(all.is_some(), "{} of {frames} frames; {}", count(file), capture.said());
}

/// An interface of the host by its sshd.
struct Remote {
    desk: Desk,
    sshd: Sshd,
}

impl Remote {
    fn new() -> Remote {
        let desk = Desk::new();
        let sshd = Sshd::start(&desk.lab);
        Remote { desk, sshd }
    }

    /// tshark, which captures on it with these options besides.
    fn tshark(&self, file: &Path, more: &[&str]) -> Running {
        let config = format!("sshconfig:{}", self.sshd.client().display());
        let (host, program) = (format!("remotehost:{OUT_IP}"), format!("remotesnifctl:{SNIFCTL}"));
        let preferences = [host, program, config, "remoteinterface:eth0".into()];
        let preferences = preferences.iter().flat_map(|at| ["-o".to_string(), format!("extcap.snifctl_remote.{at}")]);
        let mut command = self.desk.tshark(&["-i", "snifctl-remote", "-w", text(file)]);
        Running::start(&self.desk.lab, command.args(preferences).args(more))
    }

    /// The program by itself, which writes into this file or pipe.
    fn extcap(&self, fifo: &Path, host: &str, more: &[&str]) -> Running {
        let config = self.sshd.client();
        let words = ["--capture", "--extcap-interface", "snifctl-remote", "--fifo", text(fifo), "--remote-host", host];
        let program = if more.contains(&"--remote-snifctl") { &[][..] } else { &["--remote-snifctl", SNIFCTL] };
        let also = [&["--ssh-config", text(&config)], program].concat();
        Running::start(&self.desk.lab, self.desk.extcap(&[&words[..], &also, more].concat()).stdin(Stdio::null()))
    }

    /// What takes the session down by hand.
    fn down(&self, name: &str) -> String {
        format!("ssh -F {} {OUT_IP} {SNIFCTL} down --name {name}", self.sshd.client().display())
    }

    fn fifo(&self) -> PathBuf {
        let fifo = self.desk.lab.fresh_path("fifo");
        assert!(Command::new("mkfifo").arg(&fifo).status().expect("run mkfifo").success());
        fifo
    }
}

/// dumpcap, which reads the pipe.
fn dumpcap(lab: &Lab, fifo: &Path, file: &Path) -> Running {
    let mut command = lab.command(Ns::Collector, &["dumpcap", "-q", "-i", text(fifo), "-w", text(file)]);
    Running::start(lab, &mut command)
}

/// Frames of an unknown type, to which nobody answers.
fn silent(first: u32, ends: &Ends) -> Vec<Vec<u8>> {
    (0..PRIME as u32).map(|n| frames::raw(ends, first + n, 60 + 31 * n as usize)).collect()
}

#[test]
fn wireshark_lists_both_interfaces_each_with_its_options() {
    let desk = Desk::new();
    let listed = String::from_utf8(desk.tshark(&["-D"]).output().expect("run tshark").stdout).expect("text");
    assert!(listed.contains("snifctl (snifctl collector)"), "{listed}");
    assert!(listed.contains("snifctl-remote (snifctl on a remote machine)"), "{listed}");
    let config = |interface: &str| desk.asked(&["--extcap-interface", interface, "--extcap-config"]);
    let (here, there) = (config("snifctl"), config("snifctl-remote"));
    assert!(here.contains("--dedup") && !here.contains("--remote-host"), "{here}");
    assert!(there.contains("--remote-host") && !there.contains("--dedup"), "{there}");
    for interface in ["snifctl", "snifctl-remote"] {
        let types = desk.asked(&["--extcap-interface", interface, "--extcap-dlts"]);
        assert_eq!(types, "dlt {number=1}{name=EN10MB}{display=Ethernet}\n");
    }
}

#[test]
fn tshark_captures_what_arrives_here() {
    let desk = Desk::new();
    let file = desk.lab.fresh_path("extcap.pcapng");
    let args = ["-i", "snifctl", "-f", "udp", "-o", "extcap.snifctl.tunnel:gre", "-c", "7", "-w", text(&file)];
    let mut running = Running::start(&desk.lab, &mut desk.tshark(&args));
    // It says nothing once it listens; so frames are sent until it has enough.
    let sent: Vec<Vec<u8>> = (0..7).map(|n| frames::ipv4_udp(&Ends::HOST_TO_PEER, n, 100)).collect();
    let packets: Vec<Vec<u8>> = sent.iter().map(|frame| numbered(OUT_IP, 0, frame)).collect();
    let ended = poll(PATIENCE, || {
        desk.lab.send(Ns::Host, "out0", &packets);
        running.child.try_wait().expect("wait for tshark")
    });
    let said = running.said();
    assert!(ended.is_some_and(|status| status.success()), "{ended:?} {said}");
    assert!(!said.contains("Error"), "{said}");
    let got = frames_in(&desk.lab, &file, "frame");
    assert!(got.len() == 7 && got.iter().all(|frame| sent.contains(frame)), "{} {said}", got.len());
}

#[test]
fn a_capture_of_nothing_ends_when_its_reader_goes() {
    let desk = Desk::new();
    let fifo = desk.lab.fresh_path("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().expect("run mkfifo").success());
    let words = ["--capture", "--fifo", text(&fifo), "--tunnel", "vxlan", "--listen", "198.51.100.2"];
    let running = Running::start(&desk.lab, &mut desk.extcap(&words));
    let mut begin = [0; 4];
    let mut reader = File::open(&fifo).expect("the pipe");
    std::io::Read::read_exact(&mut reader, &mut begin).expect("how pcapng begins");
    assert_eq!(begin, 0x0a0d_0d0a_u32.to_le_bytes());
    drop(reader);
    assert_eq!(running.ended(), (Some(0), String::new()));
    // With its terminal it goes, too.
    let running = Running::start(&desk.lab, &mut desk.extcap(&words));
    let mut reader = File::open(&fifo).expect("the pipe");
    std::io::Read::read_exact(&mut reader, &mut begin).expect("how pcapng begins");
    assert_eq!(running.stop("HUP"), (Some(0), String::new()));
}

#[test]
fn tshark_captures_a_remote_interface_exactly_with_directions_and_times() {
    let remote = Remote::new();
    let lab = &remote.desk.lab;
    let file = lab.fresh_path("remote.pcapng");
    // A filter, which leaves out ssh, takes no frame that ends before what it looks at.
    let mut capture = remote.tshark(&file, &["-o", "extcap.snifctl_remote.leaveoutssh:false"]);
    remote.desk.wait_until_up(&mut capture);
    let begin = since_1970();
    let [incoming, outgoing] = exchange(lab);
    wait_for_frames(&file, incoming.len() + outgoing.len(), &capture);
    let end = since_1970();
    let (code, said) = capture.stop("INT");
    assert!(code == Some(0) && !said.contains("Error"), "{code:?} {said}");
    remote.desk.wait_until_down();
    assert_in_order(&[&incoming[..], &outgoing].concat(), &frames_in(lab, &file, "frame"));
    assert_in_order(&incoming, &frames_in(lab, &file, "frame.packet_flags_direction == 1"));
    assert_in_order(&outgoing, &frames_in(lab, &file, "frame.packet_flags_direction == 2"));
    let times = tshark_fields(&file, "frame", &["frame.time_epoch"]);
    let times = times.iter().map(|row| row[0].parse::<f64>().expect("a time")).map(Duration::from_secs_f64);
    let off = Duration::from_millis(1);
    assert!(times.into_iter().all(|time| (begin - off..end + off).contains(&time)));
}

#[test]
fn the_capture_filter_is_in_force_on_the_other_machine() {
    let remote = Remote::new();
    let lab = &remote.desk.lab;
    let file = lab.fresh_path("remote.pcapng");
    let mut capture = remote.tshark(&file, &["-f", "udp or arp"]);
    remote.desk.wait_until_up(&mut capture);
    let filter = format!("not (host {COLLECTOR_IP} and tcp port 22) and (udp or arp)");
    assert_eq!(lab.session().filter.as_deref(), Some(filter.as_str()));
    let wanted = frames::series(&Ends::PEER_TO_HOST, PRIME as u32);
    lab.send(Ns::Peer, "peer0", &[silent(0, &Ends::PEER_TO_HOST), wanted.clone()].concat());
    wait_for_frames(&file, PRIME, &capture);
    assert_eq!(lab.settled().remotes_total().pcnt, PRIME as u64);
    assert_eq!(capture.stop("TERM").0, Some(0));
    remote.desk.wait_until_down();
    assert_in_order(&wanted, &frames_in(lab, &file, "frame"));
}

/// The way of ssh and of the copies is itself the watched interface.
#[test]
fn dumpcap_captures_the_interface_of_ssh_without_ssh_and_without_copies() {
    let remote = Remote::new();
    let lab = &remote.desk.lab;
    let (fifo, file) = (remote.fifo(), lab.fresh_path("remote.pcapng"));
    let reader = dumpcap(lab, &fifo, &file);
    let more = ["--remote-interface", "out0", "--extcap-capture-filter", "not arp"];
    let mut capture = remote.extcap(&fifo, &OUT_IP.to_string(), &more);
    remote.desk.wait_until_up(&mut capture);
    let sent = silent(0, &Ends::PEER_TO_HOST);
    lab.send(Ns::Collector, "col0", &sent);
    wait_for_frames(&file, PRIME, &capture);
    assert_eq!(capture.stop("TERM"), (Some(0), String::new()));
    assert_eq!(reader.ended().0, Some(0));
    remote.desk.wait_until_down();
    assert_in_order(&sent, &frames_in(lab, &file, "frame"));
}

#[test]
fn ssh_is_captured_where_it_is_wanted() {
    let remote = Remote::new();
    let lab = &remote.desk.lab;
    let (fifo, file) = (remote.fifo(), lab.fresh_path("remote.pcapng"));
    let reader = dumpcap(lab, &fifo, &file);
    let more = ["--remote-interface", "out0", "--leave-out-ssh", "false"];
    let mut capture = remote.extcap(&fifo, &OUT_IP.to_string(), &more);
    remote.desk.wait_until_up(&mut capture);
    assert_eq!(lab.session().filter, None);
    // The first sign of life comes after five seconds.
    wait_for_frames(&file, 2, &capture);
    assert_eq!(capture.stop("TERM"), (Some(0), String::new()));
    assert_eq!(reader.ended().0, Some(0));
    remote.desk.wait_until_down();
    assert!(!frames_in(lab, &file, "tcp.port == 22").is_empty());
    assert!(frames_in(lab, &file, "udp").is_empty());
}

#[test]
fn vxlan_over_ipv6_tells_directions_too() {
    let remote = Remote::new();
    let lab = &remote.desk.lab;
    let (fifo, file) = (remote.fifo(), lab.fresh_path("remote.pcapng"));
    let reader = dumpcap(lab, &fifo, &file);
    let more = ["--remote-interface", "eth0", "--tunnel", "vxlan", "--port", "4789", "--up-options", "--ttl 3"];
    let mut capture = remote.extcap(&fifo, &OUT_IP6.to_string(), &more);
    remote.desk.wait_until_up(&mut capture);
    assert!(lab.session().command.contains("--ttl 3"), "{}", lab.session().command);
    let (incoming, outgoing) = (silent(0, &Ends::PEER_TO_HOST), silent(100, &Ends::HOST_TO_PEER));
    lab.send(Ns::Peer, "peer0", &incoming);
    lab.send(Ns::Host, "eth0", &outgoing);
    wait_for_frames(&file, 2 * PRIME, &capture);
    assert_eq!(capture.stop("TERM"), (Some(0), String::new()));
    assert_eq!(reader.ended().0, Some(0));
    remote.desk.wait_until_down();
    assert_in_order(&incoming, &frames_in(lab, &file, "frame.packet_flags_direction == 1"));
    assert_in_order(&outgoing, &frames_in(lab, &file, "frame.packet_flags_direction == 2"));
}

/// What ends a capture, given ours and dumpcap's process. The exit code of ours, and what it says.
type End = (fn(&Remote, u32, u32), Option<i32>, &'static str);

const ENDS: [End; 6] = [
    (|_, ours, _| signal(ours, "KILL"), None, ""),
    (|_, ours, _| signal(ours, "INT"), Some(0), ""),
    (|_, ours, _| signal(ours, "HUP"), Some(0), ""),
    (|_, _, reader| signal(reader, "KILL"), Some(0), ""),
    (
        |_, ours, _| signal(child_of(ours, "ssh").expect("ssh"), "KILL"),
        Some(1),
        "snifctl: ssh to 198.51.100.1 was ended by a signal\n",
    ),
    (
        |remote, _, _| signal(child_of(remote.sshd.id(), "sshd").expect("a connection"), "KILL"),
        Some(1),
        "snifctl: ssh to 198.51.100.1 failed: Connection to 198.51.100.1 closed by remote host; session NAME may still be up there; try: DOWN\n",
    ),
];

#[test]
fn nothing_is_left_there_however_a_capture_ends_and_what_is_watched_goes_on() {
    let remote = Remote::new();
    let lab = &remote.desk.lab;
    for (end, code, said) in ENDS {
        let mut watched = lab.capture(Ns::Host, "eth0", Direction::In);
        let (fifo, file) = (remote.fifo(), lab.fresh_path("remote.pcapng"));
        let reader = dumpcap(lab, &fifo, &file);
        let mut capture = remote.extcap(&fifo, &OUT_IP.to_string(), &["--remote-interface", "eth0"]);
        remote.desk.wait_until_up(&mut capture);
        let [first, second] = [0, 100].map(|n| silent(n, &Ends::PEER_TO_HOST));
        lab.send(Ns::Peer, "peer0", &first);
        wait_for_frames(&file, PRIME, &capture);
        let name = lab.session().name;
        end(&remote, capture.child.id(), reader.child.id());
        let said = said.replace("DOWN", &remote.down(&name)).replace("NAME", &name);
        assert_eq!(capture.ended(), (code, said));
        remote.desk.wait_until_down();
        lab.send(Ns::Peer, "peer0", &second);
        assert_same_frames(&[first.clone(), second].concat(), &watched.take(2 * PRIME));
        drop(reader);
        assert_in_order(&first, &frames_in(lab, &file, "frame"));
    }
}

#[test]
fn the_line_about_a_session_that_nobody_takes_down_says_how() {
    let remote = Remote::new();
    let lab = &remote.desk.lab;
    let (fifo, file) = (remote.fifo(), lab.fresh_path("remote.pcapng"));
    let _reader = dumpcap(lab, &fifo, &file);
    let mut capture = remote.extcap(&fifo, &OUT_IP.to_string(), &["--remote-interface", "eth0"]);
    remote.desk.wait_until_up(&mut capture);
    let name = lab.session().name;
    let connections = descendants(remote.sshd.id());
    let there = connections.into_iter().find(|pid| runs(*pid, "snifctl")).expect("the program there");
    signal(there, "KILL");
    let (code, said) = capture.ended();
    let down = remote.down(&name);
    let expected = format!("ssh to {OUT_IP} failed; session {name} may still be up there; try: {down}");
    assert_eq!((code, said), (Some(1), format!("snifctl: {expected}\n")));
    lab.run(Ns::Collector, &["sh", "-c", &down]);
    remote.desk.wait_until_down();
}

#[test]
fn what_goes_wrong_there_is_one_line_here() {
    let remote = Remote::new();
    let nowhere = remote.desk.lab.dir().join("nowhere");
    let by_hand = |options: &str| {
        format!("; try: ssh -F {} {options} {OUT_IP} {SNIFCTL} --version\n", remote.sshd.client().display())
    };
    let (port, user) = (by_hand("-p 9"), by_hand("-l nobody"));
    let cases: [(&[&str], &str, &str); 5] = [
        (&["--remote-interface", "eth7"], "snifctl: 198.51.100.1: ", "eth7"),
        (&["--remote-interface", "eth0", "--remote-port", "9"], "port 9: Connection refused", &port),
        (&["--remote-interface", "eth0", "--remote-username", "nobody"], "Permission denied", &user),
        (
            &["--remote-interface", "eth0", "--remote-snifctl", "/nowhere"],
            "/nowhere",
            "; try: --remote-snifctl /usr/local/bin/snifctl\n",
        ),
        (&["--remote-interface", "eth0", "--extcap-capture-filter", "nonsense"], "--filter", ""),
    ];
    for (more, names, ends) in cases {
        let (code, said) = remote.extcap(&nowhere, &OUT_IP.to_string(), more).ended();
        assert_eq!((code, said.lines().count()), (Some(1), 1), "{more:?}: {said}");
        assert!(said.contains(names) && said.contains(ends) && said.starts_with("snifctl: "), "{more:?}: {said}");
        remote.desk.wait_until_down();
    }
    // Before ssh is asked.
    for (flag, value) in [("--remote-port", "0"), ("--remote-port", "ssh"), ("--time", "noon"), ("--port", "70000")] {
        let (code, said) =
            remote.extcap(&nowhere, &OUT_IP.to_string(), &["--remote-interface", "eth0", flag, value]).ended();
        let names = said.starts_with(&format!("snifctl: {flag} ")) && said.matches(flag).count() == 2;
        assert!(code == Some(2) && names && said.lines().count() == 1, "{said}");
    }
}

#[test]
fn tshark_shows_why_it_captures_nothing() {
    let remote = Remote::new();
    let file = remote.desk.lab.fresh_path("remote.pcapng");
    for (preference, why) in
        [("remoteport:9", "port 9: Connection refused"), ("remoteinterface:", "--remote-interface")]
    {
        let capture = remote.tshark(&file, &["-o", &format!("extcap.snifctl_remote.{preference}")]);
        let (_, said) = capture.ended();
        assert!(said.contains("Error by extcap pipe: snifctl: ") && said.contains(why), "{said}");
        remote.desk.wait_until_down();
    }
}

/// The processes of a group that live.
fn members(group: u32) -> Vec<u32> {
    let all = fs::read_dir("/proc").expect("/proc").flatten();
    let all = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_member = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let words: Vec<&str> = stat.split_whitespace().collect();
        words.get(4) == Some(&group.to_string().as_str()) && words.get(2) != Some(&"Z")
    };
    all.filter(is_member).collect()
}

/// ssh that waits for a connection, which never comes: signals, the exit code, and what is said.
const STUCK: [(&[&str], Option<i32>, &str); 3] = [
    (
        &["TERM"],
        Some(143),
        "snifctl: ssh to 198.51.100.1 did not get through; try: ssh -F CONFIG -o 'ProxyCommand=sleep 100' 198.51.100.1 SNIFCTL --version\n",
    ),
    (&["TERM", "TERM"], Some(143), ""),
    (&["KILL"], None, ""),
];

#[test]
fn no_ssh_is_left_that_did_not_get_through() {
    let remote = Remote::new();
    for (signals, code, said) in STUCK {
        let file = remote.desk.lab.fresh_path("stuck.pcapng");
        let more = ["--remote-interface", "eth0", "--proxycommand", "sleep 100"];
        let mut capture = remote.extcap(&file, &OUT_IP.to_string(), &more);
        let ours = capture.child.id();
        // It is ready for signals once it captures.
        let ssh = poll(PATIENCE, || child_of(ours, "ssh").filter(|_| file.exists())).expect("ssh");
        let proxy = poll(PATIENCE, || child_of(ssh, "sleep")).expect("its proxy");
        let (mut left, mut next) = (signals.iter(), Instant::now());
        let ended = poll(2 * PATIENCE, || {
            if Instant::now() >= next
                && let Some(name) = left.next()
            {
                signal(ours, name);
                next += Duration::from_millis(1200);
            }
            capture.child.try_wait().expect("a child")
        });
        assert_eq!(
            (ended.map(|status| status.code()), capture.said()),
            (Some(code), said.replace("SNIFCTL", SNIFCTL).replace("CONFIG", text(&remote.sshd.client())))
        );
        // Who is killed can end ssh alone: its proxy learns of that by its pipe, if it looks.
        let stays = if *signals == ["KILL"] { vec![proxy] } else { Vec::new() };
        let left = poll(PATIENCE, || (members(ssh) == stays).then_some(()));
        stays.iter().for_each(|pid| signal(pid, "KILL"));
        assert!(left.is_some(), "{signals:?}: {:?}", members(ssh));
    }
}
