//! The main job in a sandbox. The sandbox is a mount and a network namespace that no name keeps alive: when this process
//! ends, also by a signal, the kernel ends its helpers and takes interfaces, programs, pins and namespaces away with them.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::session::home;
use crate::tools::exec::{self, Background, Cmd, Runner, print};
use crate::tools::requirements;
use crate::tools::rights;

const WATCHED: &str = "192.0.2.1";
const PEER: &str = "192.0.2.2";
const COLLECTOR: &str = "198.51.100.7";
const PORT: u16 = 7;
const PATIENCE: Duration = Duration::from_secs(10);

/// Enters the sandbox: runs the demo in namespaces of its own.
pub(super) fn start(runner: &Runner) -> Result<ExitCode> {
    rights::for_sandbox()?;
    requirements::ensure_tools(runner, false)?;
    let program = exec::own_path()?;
    let mut args = vec!["--mount", "--net", "--", &program, "demo", "inside"];
    if runner.verbose {
        args.push("--verbose");
    }
    exec::replace(&Cmd::new("unshare", args))
}

/// The demo itself, inside its namespaces.
pub(super) fn run(runner: &Runner) -> Result<ExitCode> {
    let runner = &Runner { dry_run: false, ..*runner };
    runner.write(&Cmd::new("mount", ["-t", "bpf", "bpf", "/sys/fs/bpf"]))?;
    say("A sandbox: this namespace watches eth0; a peer talks to it; a collector waits behind out0.")?;
    let peer = Namespace::new()?;
    let collector = Namespace::new()?;
    wire(runner, &peer, &collector)?;
    let capture = Capture::start(&collector, private_dir(runner)?)?;
    let _service = peer.background(&[&exec::own_path()?, "demo", "peer"])?;

    say(&format!("$ snifctl up eth0 --tunnel gre --remote {COLLECTOR}"))?;
    own(runner, &["up", "eth0", "--tunnel", "gre", "--remote", COLLECTOR])?;
    say(
        "A little traffic on eth0: ARP to find the peer, TCP and UDP to its echo service, and a closed port for ICMP.",
    )?;
    traffic()?;
    say("What the kernel counted:   $ snifctl status")?;
    own(runner, &["status"])?;
    say("The same, raw:   $ snifctl map dump taps")?;
    own(runner, &["map", "dump", "taps"])?;
    say("What arrived at the collector, each frame of eth0 whole inside GRE:")?;
    capture.show(runner, &collector)?;
    say("$ snifctl down")?;
    own(runner, &["down"])?;
    ensure_clean(runner)?;
    say(
        "Nothing is left: no program, filter, qdisc, link or pin. On a real machine: sudo snifctl up eth0 --tunnel gre --remote ADDR",
    )?;
    Ok(ExitCode::SUCCESS)
}

/// A directory in memory that, like the sandbox, ends with us: mounted where nothing is needed meanwhile.
fn private_dir(runner: &Runner) -> Result<&'static Path> {
    let own = exec::own_path()?;
    let places = ["/mnt", "/srv", "/media", "/opt"].map(Path::new);
    let place = places.into_iter().find(|place| place.is_dir() && !Path::new(&own).starts_with(place));
    let place = place.context("none of /mnt, /srv, /media and /opt is a directory; try: mkdir /mnt")?;
    runner.write(&Cmd::new("mount", ["-t", "tmpfs", "tmpfs", &place.to_string_lossy()]))?;
    Ok(place)
}

fn say(text: &str) -> Result<()> {
    print(&format!("\n== {text}\n"))
}

/// Runs a command of our own and shows what it prints.
fn own(runner: &Runner, args: &[&str]) -> Result<()> {
    let program = exec::own_path()?;
    print(&runner.read(&Cmd::new(&program, args.iter().copied()))?)?;
    Ok(())
}

/// A network namespace that lives as long as the process that holds it.
struct Namespace {
    holder: Background,
}

impl Namespace {
    fn new() -> Result<Namespace> {
        let holder = Background::start(&Cmd::new("unshare", ["--net", "--", "sleep", "600"]))?;
        let namespace = Namespace { holder };
        let ours = std::fs::read_link("/proc/self/ns/net")?;
        let theirs = format!("/proc/{}/ns/net", namespace.pid());
        wait("the namespace", || std::fs::read_link(&theirs).is_ok_and(|theirs| theirs != ours))?;
        Ok(namespace)
    }

    fn pid(&self) -> String {
        self.holder.pid().to_string()
    }

    fn command(&self, words: &[&str]) -> Cmd {
        let pid = self.pid();
        Cmd::new("nsenter", [&["--target", &pid, "--net", "--"][..], words].concat())
    }

    fn background(&self, words: &[&str]) -> Result<Background> {
        Background::start(&self.command(words))
    }
}

fn wait(what: &str, ready: impl Fn() -> bool) -> Result<()> {
    let start = Instant::now();
    while !ready() {
        ensure!(
            start.elapsed() < PATIENCE,
            "{what} was not ready within {} s; try: snifctl demo -v",
            PATIENCE.as_secs()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// peer:peer0 <-> eth0 (here) out0 <-> collector:col0, the last without offloads, like a wire.
fn wire(runner: &Runner, peer: &Namespace, collector: &Namespace) -> Result<()> {
    let here = [
        "link set dev lo up".to_string(),
        format!("link add eth0 type veth peer name peer0 netns {}", peer.pid()),
        format!("link add out0 mtu 1600 type veth peer name col0 mtu 1600 netns {}", collector.pid()),
        format!("address add {WATCHED}/24 dev eth0"),
        "address add 198.51.100.1/24 dev out0".to_string(),
        "link set dev eth0 up".to_string(),
        "link set dev out0 up".to_string(),
    ];
    runner.write(&Cmd::new("ip", ["-batch", "-"]).input(&here))?;
    for (namespace, dev, address) in [(peer, "peer0", PEER), (collector, "col0", COLLECTOR)] {
        let lines = [
            format!("address add {address}/24 dev {dev}"),
            format!("link set dev {dev} up"),
            "link set dev lo up".into(),
        ];
        runner.write(&namespace.command(&["ip", "-batch", "-"]).input(&lines))?;
    }
    runner.write(&Cmd::new("ethtool", ["-K", "out0", "tx", "off", "tso", "off", "gso", "off"])).map(drop)
}

/// The peer's part: answers on TCP and UDP port 7, until it is ended.
pub(super) fn peer() -> Result<ExitCode> {
    let listener = TcpListener::bind((PEER, PORT))?;
    let socket = UdpSocket::bind((PEER, PORT))?;
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..len], from);
        }
    });
    for stream in listener.incoming() {
        let mut stream = stream?;
        let mut text = Vec::new();
        stream.read_to_end(&mut text)?;
        stream.write_all(&text)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn traffic() -> Result<()> {
    let start = Instant::now();
    let mut stream = loop {
        match TcpStream::connect((PEER, PORT)) {
            Ok(stream) => break stream,
            Err(err) if start.elapsed() > PATIENCE => return Err(err).context("the peer does not answer"),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    stream.write_all(b"hello from the watched interface\n")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut echo = String::new();
    stream.read_to_string(&mut echo)?;
    let socket = UdpSocket::bind((WATCHED, 0))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send_to(b"one datagram", (PEER, PORT))?;
    socket.recv_from(&mut [0; 64])?;
    let refused = UdpSocket::bind((WATCHED, 0))?;
    refused.connect((PEER, 9))?;
    refused.set_read_timeout(Some(PATIENCE))?;
    refused.send(b"nobody listens here")?;
    ensure!(refused.recv(&mut [0; 64]).is_err(), "a closed port has answered");
    Ok(())
}

/// What the collector sees, by the tools that are there: a running capture and its file, or nothing.
struct Capture(Option<(Background, PathBuf)>);

impl Capture {
    fn start(collector: &Namespace, dir: &Path) -> Result<Capture> {
        let path = dir.join("copies.pcap");
        let file = path.to_string_lossy().into_owned();
        let tcpdump = ["tcpdump", "-i", "col0", "-Z", "root", "-U", "--immediate-mode", "-w", &file, "proto", "gre"];
        // What tshark starts to capture. It is one process, which tshark would not be.
        let dumpcap = ["dumpcap", "-q", "-P", "-i", "col0", "-f", "proto gre", "-w", &file];
        let words: &[&str] = match (exec::find("tcpdump"), exec::find("dumpcap")) {
            (Some(_), _) => &tcpdump,
            (None, Some(_)) => &dumpcap,
            (None, None) => return Ok(Capture(None)),
        };
        let process = collector.background(words)?;
        wait("the capture", || path.metadata().is_ok_and(|file| file.len() > 0))?;
        Ok(Capture(Some((process, path))))
    }

    fn show(self, runner: &Runner, collector: &Namespace) -> Result<()> {
        let Some((process, path)) = self.0 else {
            return summarize(runner, collector);
        };
        let file = path.to_string_lossy().into_owned();
        settle(&path)?;
        drop(process);
        let cmd = match exec::find("tshark") {
            Some(_) => Cmd::new("tshark", ["-n", "-r", &file]),
            None => Cmd::new("tcpdump", ["-n", "-e", "-r", &file]),
        };
        print(&runner.read(&cmd)?)?;
        Ok(())
    }
}

/// One line, where no tool is there that decodes.
fn summarize(runner: &Runner, collector: &Namespace) -> Result<()> {
    let text = runner.read(&collector.command(&["ip", "-j", "-s", "link", "show", "dev", "col0"]))?;
    let links: serde_json::Value = serde_json::from_str(&text)?;
    let rx = &links[0]["stats64"]["rx"];
    let (packets, bytes) = (&rx["packets"], &rx["bytes"]);
    print(&format!("{packets} packets, {bytes} bytes; to see them decoded: apt-get install tshark\n"))?;
    Ok(())
}

/// Waits until the capture file has stopped growing.
fn settle(path: &Path) -> Result<()> {
    let length = || path.metadata().map_or(0, |file| file.len());
    let mut before = length();
    let mut quiet = 0;
    wait("the end of the capture", || length() > 24)?;
    while quiet < 5 {
        std::thread::sleep(Duration::from_millis(30));
        let now = length();
        quiet = if now == before { quiet + 1 } else { 0 };
        before = now;
    }
    Ok(())
}

fn ensure_clean(runner: &Runner) -> Result<()> {
    let links = crate::tools::ip::links(runner)?;
    let relay = links.iter().find(|link| link.ifalias.starts_with(home::ALIAS));
    ensure!(relay.is_none(), "a relay is left; please report this");
    ensure!(!Path::new("/sys/fs/bpf/snifctl").exists(), "pins are left; please report this");
    Ok(())
}
