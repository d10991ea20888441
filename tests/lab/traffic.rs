//! Putting traffic on the links: exact frames with tcpreplay, a real TCP connection with socat.

use std::fs::{self, File};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use super::{HOST_IP, HOST_IP6, Lab, Ns, PATIENCE, PEER_IP, PEER_IP6, pcap, poll};

/// Frames sent at a stretch: well below what waits in line at most, 1000 packets in a CPU's receive backlog (which all
/// namespaces and every hop of a copy share) and 1023 in a capture. A busy machine lost thousands without the pauses.
const BURST: usize = 200;

/// A finished TCP connection over the watched link.
pub(crate) struct Transfer {
    /// The listener's port; the sender's is the kernel's choice.
    pub port: u16,
    /// What was sent and arrived.
    pub data: Vec<u8>,
}

/// An HTTP server on the host or the peer, port 80, whose CPU can be chosen, as its client's. (A sensor wants a whole HTTP
/// exchange: see [`super::http::Site`].) Ends when it is dropped.
pub(crate) struct HttpServer {
    at: Ns,
    _socat: Socat,
    /// What it has, by name: header and body.
    responses: Vec<(String, Vec<u8>)>,
}

/// Which CPUs the two ends of a connection may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cpus {
    /// Both ends on the first CPU, so that there is one order of all packets.
    One,
    /// The server on the first, its client on the second, if there is one.
    Two,
}

impl Cpus {
    /// The CPU for the server and for the client.
    fn each(self) -> [&'static str; 2] {
        let there = std::thread::available_parallelism().map_or(1, usize::from);
        if self == Cpus::One || there < 2 { ["0", "0"] } else { ["0", "1"] }
    }
}

/// The same frames over and over out of an interface, as a process of its own; ended on drop.
pub(crate) struct Stream {
    tcpreplay: Child,
}

impl Stream {
    /// `speed` is an option of tcpreplay.
    pub(crate) fn start(lab: &Lab, at: (Ns, &str), frames: &[Vec<u8>], loops: u32, speed: &str) -> Stream {
        // Others use the machine too, and a cap is only reached while nothing holds up the sender: it goes first, and
        // sleeps between packets (its own way is to ask for the time without end).
        let by = ["nice", "-n", "-15"];
        Stream::start_by(&by, lab, at, frames, &["--preload-pcap", "--timer=nano", &format!("--loop={loops}"), speed])
    }

    /// The frames once, at a rate that no queue has to hold, sent from one CPU so that they stay in order.
    pub(crate) fn in_order(lab: &Lab, at: (Ns, &str), frames: &[Vec<u8>]) -> Stream {
        Stream::start_by(&["taskset", "-c", "0"], lab, at, frames, &["--pps=1000"])
    }

    fn start_by(by: &[&str], lab: &Lab, (ns, dev): (Ns, &str), frames: &[Vec<u8>], options: &[&str]) -> Stream {
        let file = lab.dir().join(format!("{dev}.stream.pcap"));
        pcap::write(&file, frames);
        let ends = ["--intf1", dev, file.to_str().expect("a plain path")];
        let mut command = lab.command(ns, &[by, &["tcpreplay"], options, &ends].concat());
        Stream { tcpreplay: command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("start tcpreplay") }
    }

    /// Ends it wherever it is; panics if it has ended before.
    #[track_caller]
    pub(crate) fn stop(mut self) {
        assert_eq!(self.tcpreplay.try_wait().expect("wait for tcpreplay"), None, "the stream ended too soon");
        self.tcpreplay.kill().expect("stop tcpreplay");
        self.tcpreplay.wait().expect("wait for tcpreplay");
    }

    /// Waits for its end.
    #[track_caller]
    pub(crate) fn end(mut self) {
        let status = poll(PATIENCE * 2, || self.tcpreplay.try_wait().expect("wait for tcpreplay"));
        assert!(status.is_some_and(|status| status.success()), "tcpreplay: {status:?}");
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Both fail, rightly, when it has already ended.
        let _ = self.tcpreplay.kill();
        let _ = self.tcpreplay.wait();
    }
}

impl Lab {
    /// Has eth0 receive all packets of a flow on one CPU, each flow on any, as a NIC's receive queues do. A veth receives a
    /// packet where it was sent; two of one connection, sent by two CPUs, then pass at the same moment, and have no order.
    pub(crate) fn receive_each_flow_on_one_cpu(&self) {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from).min(8);
        let mask = format!("{:x}", (1 << cpus) - 1);
        let set = "mount -t sysfs sysfs /sys
            for queue in /sys/class/net/eth0/queues/rx-*; do echo $1 > $queue/rps_cpus; done";
        self.host(&["unshare", "--mount", "sh", "-euc", set, "sh", &mask]);
    }

    /// Starts a server of one response for each of these body sizes.
    #[track_caller]
    pub(crate) fn http_server(&self, at: Ns, cpus: Cpus, sizes: &[usize]) -> HttpServer {
        let dir = self.fresh_path("www");
        fs::create_dir(&dir).expect("make the server's directory");
        let responses: Vec<(String, Vec<u8>)> = sizes.iter().map(|size| (size.to_string(), response(*size))).collect();
        for (name, response) in &responses {
            fs::write(dir.join(name), response).expect("write a response");
        }
        let answer = format!("SYSTEM:read -r _ path _; cat {}$path", dir.display());
        let argv = ["taskset", "-c", cpus.each()[0], "socat", "-d", "-d", "-t", "10"];
        let mut socat = self.start_socat(at, &argv, "TCP4-LISTEN:80,reuseaddr,fork", &answer);
        socat.wait_until("listening on");
        HttpServer { at, _socat: socat, responses }
    }

    /// Gets each response of the server from the link's other end, one after the other, over a connection each, and waits
    /// until the last packet has passed; panics unless all are right.
    #[track_caller]
    pub(crate) fn download_all(&self, server: &HttpServer, cpus: Cpus) {
        const GET: &str = r#"printf 'GET /%s HTTP/1.0\r\n\r\n' "$1" | socat -t 10 - TCP4:$2:80"#;
        let (client, address) = if server.at == Ns::Peer { (Ns::Host, PEER_IP) } else { (Ns::Peer, HOST_IP) };
        let get = ["taskset", "-c", cpus.each()[1], "sh", "-c", GET, "sh"];
        for (name, response) in &server.responses {
            let got = self.run(client, &[&get[..], &[name, &address.to_string()]].concat());
            assert!(got.stdout == *response, "the response of {name} bytes differs");
            self.wait_until_received();
        }
        self.wait_for_closed_connections();
    }

    /// Waits until both ends of every connection know that it is closed: no packet follows.
    #[track_caller]
    fn wait_for_closed_connections(&self) {
        let ss = ["ss", "-Htn", "state", "connected", "exclude", "time-wait"];
        let closed = || [Ns::Host, Ns::Peer].iter().all(|ns| self.run(*ns, &ss).stdout.is_empty());
        poll(PATIENCE, || closed().then_some(())).expect("every connection is closed");
    }

    /// Sends pings of these sizes, each after the answer to the one before; panics unless each is answered.
    #[track_caller]
    pub(crate) fn ping_each(&self, from: Ns, to: IpAddr, sizes: &[usize]) {
        let each = "to=$1; shift; for size; do ping -n -q -c 1 -W 10 -s $size $to; done";
        let sizes: Vec<String> = sizes.iter().map(usize::to_string).collect();
        let argv = ["sh", "-euc", each, "sh", &to.to_string()].map(String::from);
        let argv: Vec<&str> = argv.iter().chain(&sizes).map(String::as_str).collect();
        self.run(from, &argv);
        self.wait_until_received();
    }

    /// Sends frames out of an interface, in order, byte for byte; returns when all have left, the receivers' backlog
    /// has been empty and the lab's captures have come to rest. They may be 14 to MTU + 14 bytes (MTU + 18 with
    /// ethertype 0x8100): 65,549 at most.
    #[track_caller]
    pub(crate) fn send(&self, ns: Ns, iface: &str, frames: &[Vec<u8>]) {
        for burst in frames.chunks(BURST) {
            self.send_burst(ns, iface, burst);
            self.wait_until_received();
        }
    }

    /// Waits until the receivers' backlog is empty and the lab's captures have come to rest.
    #[track_caller]
    pub(crate) fn wait_until_received(&self) {
        let calm = poll(PATIENCE, || (backlog() == 0 && self.captures_at_rest()).then_some(()));
        assert!(calm.is_some(), "still not received: {} packets in the backlog, or a busy tcpdump", backlog());
    }

    #[track_caller]
    fn send_burst(&self, ns: Ns, iface: &str, frames: &[Vec<u8>]) {
        let file = self.fresh_path("send.pcap");
        pcap::write(&file, frames);
        let file = file.to_str().expect("a plain path");
        let out = self.run(ns, &["tcpreplay", "--topspeed", "--intf1", iface, file]);
        let report = String::from_utf8_lossy(&out.stdout);
        let mut lines = report.lines().map(str::trim);
        let sent = lines.find_map(|line| line.strip_prefix("Successful packets:"));
        let sent: Option<usize> = sent.and_then(|count| count.trim().parse().ok());
        let all = frames.len();
        assert_eq!(sent, Some(all), "tcpreplay on {iface} sent {sent:?} of {all} frames\n{report}");
    }

    /// Moves pseudo-random bytes between host and peer over one IPv4 TCP connection; panics unless all arrive
    /// unchanged.
    #[track_caller]
    pub(crate) fn tcp_transfer(&self, bytes: usize, from: Ns, to: Ns) -> Transfer {
        self.transfer(bytes, from, to, IpAddr::from(if to == Ns::Host { HOST_IP } else { PEER_IP }))
    }

    /// The same over IPv6.
    #[track_caller]
    pub(crate) fn tcp_transfer6(&self, bytes: usize, from: Ns, to: Ns) -> Transfer {
        self.transfer(bytes, from, to, IpAddr::from(if to == Ns::Host { HOST_IP6 } else { PEER_IP6 }))
    }

    /// The same to another address of the receiver's.
    #[track_caller]
    pub(crate) fn tcp_transfer_at(&self, bytes: usize, from: Ns, to: Ns, address: IpAddr) -> Transfer {
        self.transfer(bytes, from, to, address)
    }

    #[track_caller]
    fn transfer(&self, bytes: usize, from: Ns, to: Ns, address: IpAddr) -> Transfer {
        assert!(
            from != to && from != Ns::Collector && to != Ns::Collector,
            "the watched link has no {from:?} to {to:?}"
        );
        let port = 5000 + self.next_serial();
        let data = pseudo_random(bytes, port);
        let (source, sink) = (self.fresh_path("sent"), self.fresh_path("received"));
        fs::write(&source, &data).expect("write the bytes to send");
        let family = if address.is_ipv6() { "6" } else { "4" };
        let open = format!("OPEN:{},creat,trunc", sink.display());
        let mut listener = self.socat(to, &format!("TCP{family}-LISTEN:{port}"), &open);
        listener.wait_until("listening on");
        let target = if address.is_ipv6() { format!("[{address}]") } else { address.to_string() };
        let mut sender =
            self.socat(from, &format!("OPEN:{},rdonly", source.display()), &format!("TCP:{target}:{port}"));
        sender.wait();
        listener.wait();
        assert_same_bytes(&data, &sink);
        Transfer { port, data }
    }

    /// One-way socat, telling its steps (-d -d) in a file.
    fn socat(&self, ns: Ns, from: &str, to: &str) -> Socat {
        self.start_socat(ns, &["socat", "-d", "-d", "-b", "65536", "-u"], from, to)
    }

    fn start_socat(&self, ns: Ns, argv: &[&str], from: &str, to: &str) -> Socat {
        let stderr = self.fresh_path("socat.err");
        let log = File::create(&stderr).expect("make the file for socat's messages");
        let mut command = self.command(ns, &[argv, &[from, to]].concat());
        let child = command.stdout(Stdio::null()).stderr(log).spawn().expect("start socat");
        Socat { what: format!("{ns:?}: socat {from} {to}"), child, stderr }
    }
}

/// Packets that wait in the receive backlogs of all CPUs (the twelfth column, in hex).
fn backlog() -> u64 {
    let stat = fs::read_to_string("/proc/net/softnet_stat").expect("read the backlog's length");
    let columns = stat.lines().filter_map(|line| line.split_whitespace().nth(11));
    columns.map(|column| u64::from_str_radix(column, 16).expect("a hex number")).sum()
}

struct Socat {
    what: String,
    child: Child,
    stderr: PathBuf,
}

impl Socat {
    #[track_caller]
    fn wait_until(&mut self, said: &str) {
        let found = poll(PATIENCE, || self.messages().contains(said).then_some(()));
        assert!(found.is_some(), "{} never said '{said}':\n{}", self.what, self.messages());
    }

    #[track_caller]
    fn wait(&mut self) {
        let status = poll(PATIENCE * 3, || self.child.try_wait().expect("wait for socat"));
        assert!(status.is_some_and(|status| status.success()), "{}: {status:?}\n{}", self.what, self.messages());
    }

    fn messages(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap_or_default()
    }
}

impl Drop for Socat {
    fn drop(&mut self) {
        // Both fail, rightly, when it has already ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[track_caller]
fn assert_same_bytes(sent: &[u8], sink: &Path) {
    let received = fs::read(sink).expect("read the bytes received");
    assert_eq!(received.len(), sent.len(), "the receiver has another number of bytes than were sent");
    let differs = received.iter().zip(sent).position(|(got, want)| got != want);
    assert_eq!(differs, None, "the received bytes differ from those sent, first at this offset");
}

/// An HTTP response with so many bytes of body.
fn response(size: usize) -> Vec<u8> {
    let head = format!("HTTP/1.0 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: {size}\r\n\r\n");
    [head.into_bytes(), pseudo_random(size, size as u16)].concat()
}

/// Bytes that do not repeat (xorshift), so that a misplaced segment cannot go unseen.
pub(super) fn pseudo_random(bytes: usize, seed: u16) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ u64::from(seed);
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(bytes.div_ceil(8)).flatten().take(bytes).collect()
}

/// A program in the background, ended with this.
pub(crate) struct Background(Child);

impl Lab {
    /// Starts a program that runs as long as what this returns is there.
    pub(crate) fn background(&self, ns: Ns, argv: &[&str]) -> Background {
        let log = File::create(self.fresh_path("background.err")).expect("make the file for its messages");
        let child = self.command(ns, argv).stdout(Stdio::null()).stderr(log).spawn();
        Background(child.unwrap_or_else(|err| panic!("could not start {argv:?}: {err}")))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
