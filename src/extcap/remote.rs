//! An interface of another machine: `up` there, by ssh, for as long as the capture runs, and `collect` here.

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, ToSocketAddrs, UdpSocket};
use std::process::ExitCode;

use anyhow::{Context as _, Result, anyhow};
use clap::{ArgAction, Args, ValueEnum};

use crate::commands::collect::Time;
use crate::extcap::far::{Far, Host, SILENCE, Words};
use crate::extcap::sentence::{Argument, sentences};
use crate::extcap::{Extcap, Interface, collect, given, words_of};
use crate::usage::{Usage, ensure_usage, number, refuse, spelled};

/// What only the remote interface asks; names are those of Wireshark's sshdump where that has them.
#[derive(Debug, Args)]
pub(super) struct Wanted {
    /// The other machine, as ssh takes it
    #[arg(long, value_name = "[USER@]HOST")]
    remote_host: Option<String>,
    /// Of ssh there
    #[arg(long, value_name = "PORT")]
    remote_port: Option<String>,
    /// Of ssh there
    #[arg(long, value_name = "USER")]
    remote_username: Option<String>,
    /// ssh's private key
    #[arg(long, value_name = "FILE")]
    sshkey: Option<String>,
    /// By which ssh connects
    #[arg(long, value_name = "COMMAND")]
    proxycommand: Option<String>,
    /// ssh's configuration
    #[arg(long, value_name = "FILE")]
    ssh_config: Option<String>,
    /// What is watched there
    #[arg(long, value_name = "IFACE")]
    remote_interface: Option<String>,
    /// Run snifctl there by sudo
    #[arg(long)]
    remote_sudo: bool,
    /// Its path there
    #[arg(long, value_name = "PATH")]
    remote_snifctl: Option<String>,
    /// Leave out this ssh connection's packets
    #[arg(long, value_name = "true|false", action = ArgAction::Set, default_value_t = true)]
    leave_out_ssh: bool,
    /// UDP port of the copies
    #[arg(long, value_name = "PORT")]
    port: Option<String>,
    /// More options of snifctl up there
    #[arg(long, value_name = "OPTIONS", allow_hyphen_values = true)]
    up_options: Option<String>,
}

/// Tunnels that need no rights here, and a port of which is ours alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Tunnel {
    /// It tells direction and time.
    Geneve,
    Vxlan,
}

/// The id of outgoing packets' copies, where it is by this that the direction is told.
const EGRESS: &str = "2";

impl Tunnel {
    /// The options of `up` for it.
    fn up(self) -> &'static [&'static str] {
        match self {
            Tunnel::Geneve => &["--tunnel", "geneve", "--tell"],
            Tunnel::Vxlan => &["--tunnel", "vxlan", "--id", "1", "--egress-id", EGRESS],
        }
    }
}

/// What Wireshark asks the user.
pub(super) fn config() -> String {
    let argument = |call, display, kind, tip, more| Argument { call, display, kind, tip, more, values: Vec::new() };
    let selector = |call, display, tip, more, values: Vec<String>| Argument {
        values,
        ..argument(call, display, "selector", tip, more)
    };
    let tunnels = Tunnel::value_variants().iter().map(|tunnel| spelled(*tunnel)).collect();
    let times = ["capture", "arrival"].map(String::from).to_vec();
    sentences(&[
        argument(
            "remote-host",
            "Host",
            "string",
            "As ssh takes it: host, user@host, or a name of its configuration",
            "{required=true}{group=Server}",
        ),
        argument("remote-port", "Port", "unsigned", "Of ssh; as configured if empty", "{range=1,65535}{group=Server}"),
        argument("remote-username", "User", "string", "As configured if empty", "{group=Server}"),
        argument(
            "sshkey",
            "Private key",
            "fileselect",
            "Without a passphrase, or in an agent; as configured if empty",
            "{mustexist=true}{group=Server}",
        ),
        argument("proxycommand", "ProxyCommand", "string", "By which ssh connects", "{group=Server}"),
        argument(
            "ssh-config",
            "ssh's configuration",
            "fileselect",
            "Instead of ~/.ssh/config",
            "{mustexist=true}{group=Server}",
        ),
        argument(
            "remote-interface",
            "Interface",
            "string",
            "To watch there; several with spaces; of one a direction: eth0:ingress",
            "{required=true}{group=Capture}",
        ),
        argument(
            "remote-sudo",
            "Use sudo",
            "boolflag",
            "It must not ask for a password",
            "{default=false}{group=Capture}",
        ),
        argument("remote-snifctl", "snifctl", "string", "Its path there", "{default=snifctl}{group=Capture}"),
        argument(
            "leave-out-ssh",
            "Leave out this ssh connection",
            "boolean",
            "Its own packets are no news",
            "{default=true}{group=Capture}",
        ),
        argument(
            "up-options",
            "More options",
            "string",
            "Of snifctl up there: --snaplen 200 --max-rate 100mbit",
            "{group=Capture}",
        ),
        selector("tunnel", "Tunnel", "In which copies come", "{group=Copies}", tunnels),
        argument(
            "listen",
            "Our address",
            "string",
            "Where copies go to; the one by which that machine is reached if empty",
            "{group=Copies}",
        ),
        argument("port", "UDP port", "unsigned", "Of the copies; a free one if empty", "{range=1,65535}{group=Copies}"),
        selector(
            "time",
            "Time",
            "Of capture there, where the tunnel tells it, or of arrival here",
            "{group=Copies}",
            times,
        ),
    ])
}

/// Everything that both machines are told.
#[derive(Debug)]
struct Plan {
    host: Host,
    there: Words,
    /// The options of `collect` here.
    collect: Vec<String>,
}

/// Where copies go.
struct Target {
    address: IpAddr,
    port: u16,
    /// Is the address one of this machine? One that is translated on the way is not.
    is_ours: bool,
}

/// Captures, until a signal comes, the reader goes, or the session there ends.
pub(super) fn capture(extcap: &Extcap) -> Result<ExitCode> {
    let plan = Plan::of(extcap)?;
    let far = Far::start(&plan.host, &plan.there)?;
    let done = collect(&plan.collect);
    let ended = far.end();
    // Who has been refused here needs not hear of the session there.
    let code = done?;
    ended.map(|()| code)
}

impl Plan {
    fn of(extcap: &Extcap) -> Result<Plan> {
        let wanted = &extcap.remote;
        extcap.ensure_own(Interface::Remote)?;
        let tunnel = wanted.tunnel(extcap)?;
        ensure_time(given(&extcap.time))?;
        let (host, interfaces) = (wanted.host()?, wanted.interfaces()?);
        let place = host.place()?;
        let target = wanted.target(&place, given(&extcap.listen))?;
        let excluded = wanted.leave_out_ssh.then_some((target.address, place.1));
        let filter = filter(given(&extcap.extcap_capture_filter), excluded);
        let program = given(&wanted.remote_snifctl).unwrap_or("snifctl").to_string();
        let sudo: &[&str] = if wanted.remote_sudo { &["sudo", "-n"] } else { &[] };
        let call = |verb| sudo.iter().copied().chain([program.as_str(), verb]);
        let mut up: Vec<String> = call("up").chain(tunnel.up().iter().copied()).map(String::from).collect();
        let name = name();
        let down = call("down").chain(["--name", &name]).map(String::from).collect();
        let (address, port) = (target.address.to_string(), target.port.to_string());
        let flags = ["--name", &name, "--remote", &address, "--port", &port].map(String::from);
        up.extend(flags);
        up.push(format!("--while-stdin={}", SILENCE.as_secs()));
        // Without rights we receive UDP over IPv6 with a checksum alone.
        up.extend(target.address.is_ipv6().then(|| "--udp-checksum".into()));
        up.extend(words_of([("--filter", &filter)]));
        up.extend(wanted.more(&up)?);
        up.push("--".into());
        up.extend(interfaces);
        let there = Words { program, name, up, down };
        Ok(Plan { host, there, collect: target.collect(extcap, tunnel) })
    }
}

impl Wanted {
    fn host(&self) -> Result<Host, Usage> {
        let Some(destination) = given(&self.remote_host) else {
            refuse!("--remote-host is missing; try: --remote-host user@10.0.0.5");
        };
        if let Some(port) = given(&self.remote_port) {
            number::<u16>("--remote-port", port, 1..=65535, "--remote-port 22")?;
        }
        let proxy = given(&self.proxycommand).map(|command| format!("ProxyCommand={command}"));
        let options = words_of([
            ("-F", &self.ssh_config),
            ("-p", &self.remote_port),
            ("-l", &self.remote_username),
            ("-i", &self.sshkey),
            ("-o", &proxy),
        ]);
        Ok(Host { destination: destination.into(), options })
    }

    fn interfaces(&self) -> Result<Vec<String>, Usage> {
        let names: Vec<String> =
            given(&self.remote_interface).unwrap_or_default().split_whitespace().map(String::from).collect();
        ensure_usage!(!names.is_empty(), "--remote-interface is missing; try: --remote-interface eth0");
        Ok(names)
    }

    /// More options of `up`, besides ours.
    fn more(&self, ours: &[String]) -> Result<Vec<String>, Usage> {
        let words: Vec<String> =
            given(&self.up_options).unwrap_or_default().split_whitespace().map(String::from).collect();
        for word in &words {
            let flag = word.split('=').next().unwrap_or_default();
            if let Some(instead) = instead(flag, ours) {
                refuse!("--up-options has {flag}, which is not for it; {instead}");
            }
        }
        Ok(words)
    }

    /// The first option that is given and is of this interface alone.
    pub(super) fn own(&self) -> Option<&'static str> {
        let values = [
            ("--remote-host", &self.remote_host),
            ("--remote-port", &self.remote_port),
            ("--remote-username", &self.remote_username),
            ("--sshkey", &self.sshkey),
            ("--proxycommand", &self.proxycommand),
            ("--ssh-config", &self.ssh_config),
            ("--remote-interface", &self.remote_interface),
            ("--remote-snifctl", &self.remote_snifctl),
            ("--port", &self.port),
            ("--up-options", &self.up_options),
        ];
        let flags = [("--remote-sudo", self.remote_sudo), ("--leave-out-ssh", !self.leave_out_ssh)];
        let values = values.into_iter().map(|(flag, value)| (flag, given(value).is_some()));
        values.chain(flags).find(|(_, is_given)| *is_given).map(|(flag, _)| flag)
    }

    fn tunnel(&self, extcap: &Extcap) -> Result<Tunnel, Usage> {
        match given(&extcap.tunnel).map(|name| Tunnel::from_str(name, false)) {
            None => Ok(Tunnel::Geneve),
            Some(Ok(tunnel)) => Ok(tunnel),
            Some(Err(_)) => refuse!(
                "--tunnel {:?} is none of this interface; try: --tunnel geneve, or vxlan",
                given(&extcap.tunnel).unwrap_or_default()
            ),
        }
    }

    fn target(&self, place: &(String, u16), listen: Option<&str>) -> Result<Target> {
        let address = match listen {
            Some(text) => text.parse().map_err(|_| {
                Usage(format!("--listen {text:?} is no IP address; try: --listen 10.0.0.7, or leave it out"))
            })?,
            None => towards(place).map_err(|err| {
                anyhow!("which address of ours {} reaches is not known ({err}); try: --listen 10.0.0.7", place.0)
            })?,
        };
        let is_ours = UdpSocket::bind((address, 0)).is_ok();
        let port = match given(&self.port) {
            Some(text) => number::<u16>("--port", text, 1..=65535, "--port 6081")?,
            None => free_port(if is_ours { address } else { any(address) })?,
        };
        Ok(Target { address, port, is_ours })
    }
}

impl Target {
    fn collect(&self, extcap: &Extcap, tunnel: Tunnel) -> Vec<String> {
        let time = Some(given(&extcap.time).unwrap_or("capture").to_string());
        words_of([
            ("-w", &extcap.fifo),
            ("--tunnel", &Some(spelled(tunnel))),
            ("--listen", &self.is_ours.then(|| self.address.to_string())),
            ("--port", &Some(self.port.to_string())),
            ("--egress-id", &(tunnel == Tunnel::Vxlan).then(|| EGRESS.to_string())),
            ("--time", &time),
        ])
    }
}

/// What `collect` would refuse once ssh has begun.
fn ensure_time(time: Option<&str>) -> Result<(), Usage> {
    let is_known = time.is_none_or(|time| Time::from_str(time, false).is_ok());
    ensure_usage!(is_known, "--time {:?} is none; try: --time capture, or arrival", time.unwrap_or_default());
    Ok(())
}

/// What to use instead of an option of `up` that does not go with ours, or with a session that is up while we are.
fn instead(flag: &str, ours: &[String]) -> Option<&'static str> {
    let is_short = |letter| flag.starts_with('-') && !flag.starts_with("--") && flag.contains(letter);
    match flag {
        "--filter" => Some("use the capture filter, as in: tshark -f 'tcp port 443'"),
        "--remote" => Some("use the option of this interface: --listen 10.0.0.7"),
        "--port" => Some("use the option of this interface: --port 6081"),
        "--tunnel" => Some("use the option of this interface: --tunnel vxlan"),
        "--help" | "--version" | "--name" | "--while-stdin" | "--dry-run" | "--json" => Some(LEAVE_OUT),
        _ if is_short('h') || is_short('V') || ours.iter().any(|ours| ours == flag) => Some(LEAVE_OUT),
        _ => None,
    }
}

const LEAVE_OUT: &str = "leave it out, as in: --up-options '--snaplen 200'";

/// A session of our own.
fn name() -> String {
    format!("extcap-{:08x}", RandomState::new().hash_one(std::process::id()) as u32)
}

/// The filter there: what the user wants, without ssh's own packets. What `vlan` changes in an expression is behind it.
fn filter(wanted: Option<&str>, ssh: Option<(IpAddr, u16)>) -> Option<String> {
    let without = ssh.map(|(address, port)| format!("not (host {address} and tcp port {port})"));
    match (without, wanted) {
        (Some(without), Some(wanted)) => Some(format!("{without} and ({wanted})")),
        (without, wanted) => without.or(wanted.map(String::from)),
    }
}

/// The address of ours from which packets to that place leave.
fn towards(place: &(String, u16)) -> Result<IpAddr> {
    let mut last = None;
    for at in (place.0.as_str(), place.1).to_socket_addrs()? {
        let socket = UdpSocket::bind((any(at.ip()), 0))?;
        match socket.connect(at).and_then(|()| socket.local_addr()) {
            Ok(local) => return Ok(local.ip()),
            Err(err) => last = Some(err),
        }
    }
    Err(last.map_or_else(|| anyhow!("it has no address"), Into::into))
}

fn any(like: IpAddr) -> IpAddr {
    if like.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

/// A UDP port that nobody has, so that no others' copies come to it.
fn free_port(address: IpAddr) -> Result<u16> {
    let socket = UdpSocket::bind((address, 0)).context("no UDP port is free")?;
    Ok(socket.local_addr()?.port())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;
    use crate::extcap::sentence::offered;

    fn extcap(more: &[&str]) -> Extcap {
        let start = ["snifctl-extcap", "--extcap-interface", "snifctl-remote", "--capture", "--fifo", "/tmp/x"];
        Extcap::try_parse_from([&start, more].concat()).unwrap()
    }

    /// A plan, but for its name.
    fn plan(more: &[&str]) -> [String; 3] {
        let plan = Plan::of(&extcap(more)).unwrap();
        let at = plan.there.up.iter().position(|word| word == "--name").unwrap();
        let mut up = plan.there.up.clone();
        assert!(up.remove(at + 1).starts_with("extcap-"));
        let program = plan.there.up.iter().position(|word| word == "up").unwrap();
        let as_words = ["snifctl".to_string()].into_iter().chain(plan.there.up[program..].iter().cloned());
        assert!(Cli::try_parse_from(as_words).is_ok(), "{up:?}");
        assert_eq!(plan.there.down[..program], plan.there.up[..program]);
        let down = ["snifctl".to_string()].into_iter().chain(plan.there.down[program..].iter().cloned());
        assert!(Cli::try_parse_from(down).is_ok(), "{:?}", plan.there.down);
        let collect = ["snifctl", "collect"].into_iter().chain(plan.collect.iter().map(String::as_str));
        assert!(Cli::try_parse_from(collect).is_ok(), "{:?}", plan.collect);
        [plan.host.options, up, plan.collect].map(|words| words.join(" "))
    }

    #[test]
    fn both_machines_are_told_the_same() {
        let [options, up, collect] = plan(&[
            "--remote-host",
            "127.0.0.1",
            "--remote-interface",
            "eth0",
            "--listen",
            "203.0.113.7",
            "--port",
            "6000",
            "--ssh-config",
            "none",
        ]);
        assert_eq!(options, "-F none");
        assert_eq!(
            up,
            "snifctl up --tunnel geneve --tell --name --remote 203.0.113.7 --port 6000 --while-stdin=30 --filter not \
             (host 203.0.113.7 and tcp port 22) -- eth0"
        );
        // An address that is not ours, as behind a NAT.
        assert_eq!(collect, "-w /tmp/x --tunnel geneve --port 6000 --time capture");
    }

    #[test]
    fn the_address_is_the_one_by_which_the_other_is_reached() {
        let wanted = extcap(&["--remote-host", "127.0.0.1", "--remote-interface", "eth0"]).remote;
        let target = wanted.target(&("127.0.0.1".into(), 22), None).unwrap();
        assert_eq!((target.address, target.is_ours), (Ipv4Addr::LOCALHOST.into(), true));
        assert!(target.port > 1024);
        let said = wanted.target(&("no.such.host.invalid".into(), 22), None).err().unwrap();
        assert!(said.to_string().ends_with("try: --listen 10.0.0.7"), "{said}");
    }

    #[test]
    fn each_option_that_is_offered_is_taken() {
        let mut given = Vec::new();
        let values = [
            "me@127.0.0.1",
            "2222",
            "root",
            "/key",
            "nc %h %p",
            "none",
            "eth0 eth1:ingress",
            "",
            "/opt/snifctl",
            "true",
            "--snaplen 200  --ttl 3",
            "vxlan",
            "2001:db8::7",
            "6000",
            "arrival",
        ];
        let offered = offered(&config());
        assert_eq!(offered.len(), values.len());
        for (flag, value) in offered.iter().zip(values) {
            given.push(flag.as_str());
            given.extend((flag != "--remote-sudo").then_some(value));
        }
        given.extend(["--extcap-capture-filter", "udp"]);
        let [options, up, collect] = plan(&given);
        assert_eq!(options, "-F none -p 2222 -l root -i /key -o ProxyCommand=nc %h %p");
        assert_eq!(
            up,
            "sudo -n /opt/snifctl up --tunnel vxlan --id 1 --egress-id 2 --name --remote 2001:db8::7 --port 6000 \
             --while-stdin=30 --udp-checksum --filter not (host 2001:db8::7 and tcp port 2222) and (udp) --snaplen 200 \
             --ttl 3 -- eth0 eth1:ingress"
        );
        assert_eq!(collect, "-w /tmp/x --tunnel vxlan --port 6000 --egress-id 2 --time arrival");
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let host = ["--remote-host", "127.0.0.1", "--ssh-config", "none"];
        let interface = ["--remote-interface", "eth0"];
        let both = [&host[..], &interface].concat();
        for (words, names) in [
            (interface.to_vec(), "--remote-host is missing"),
            (host.to_vec(), "--remote-interface is missing"),
            ([&both[..], &["--tunnel", "gre"]].concat(), "--tunnel \"gre\" is none of this interface"),
            ([&both[..], &["--listen", "here"]].concat(), "--listen \"here\" is no IP address"),
            ([&both[..], &["--port", "0"]].concat(), "--port 0 is out of range"),
            ([&both[..], &["--dedup", "50"]].concat(), "--dedup is of another interface"),
            ([&both[..], &["--up-options", "--filter udp"]].concat(), "tshark -f 'tcp port 443'"),
            ([&both[..], &["--up-options", "--ttl 3 --filter=udp"]].concat(), "--up-options has --filter,"),
            ([&both[..], &["--up-options", "--remote 10.0.0.7"]].concat(), "--listen 10.0.0.7"),
            ([&both[..], &["--up-options", "--port 6000"]].concat(), "--port 6081"),
            ([&both[..], &["--up-options", "--tunnel gre"]].concat(), "--tunnel vxlan"),
        ] {
            let said = Plan::of(&extcap(&words)).unwrap_err();
            assert!(said.to_string().contains(names) && said.is::<Usage>(), "{said}");
        }
    }

    #[test]
    fn further_options_are_those_that_go_with_ours() {
        for flag in
            ["--help", "-h", "-vh", "--version", "-V", "--while-stdin=5", "--name", "--dry-run", "--json", "--tell"]
        {
            let call = ["--remote-host", "127.0.0.1", "--ssh-config", "none", "--remote-interface", "eth0"];
            let said = Plan::of(&extcap(&[&call[..], &["--up-options", flag]].concat())).unwrap_err();
            let name = flag.split('=').next().unwrap();
            let expected = format!("--up-options has {name}, which is not for it; {LEAVE_OUT}");
            assert!(said.to_string() == expected && said.is::<Usage>(), "{said}");
        }
    }

    #[test]
    fn a_filter_leaves_out_ssh_alone() {
        let ssh = Some((IpAddr::from(Ipv4Addr::new(10, 0, 0, 7)), 22));
        assert_eq!(filter(None, None), None);
        assert_eq!(filter(Some("udp or arp"), None).unwrap(), "udp or arp");
        assert_eq!(filter(None, ssh).unwrap(), "not (host 10.0.0.7 and tcp port 22)");
        let both = filter(Some("udp or arp"), ssh).unwrap();
        assert_eq!(both, "not (host 10.0.0.7 and tcp port 22) and (udp or arp)");
    }
}
