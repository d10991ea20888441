//! The sockets: raw ones for GRE, UDP ones for the others, so that the kernel puts outer fragments together. Packets come
//! many at a time, with the kernel's time and its count of those that found no room.

use std::collections::HashMap;
use std::fs;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use nix::cmsg_space;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, setsockopt, sockopt};
use nix::sys::time::TimeSpec;
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use crate::collect::decode::{self, Copy, Fault, Kind};
use crate::tools::exec::Runner;
use crate::tools::ip;

/// Packets that one call takes, and room for each: no IP packet is longer.
const BATCH: usize = 64;
const ROOM: usize = 1 << 16;
/// Room for packets that wait, in the kernel.
const QUEUE: usize = 64 << 20;

const PROTO_UDP: i32 = 17;
const PROTO_GRE: i32 = 47;

/// A kind's UDP port by default (RFC 7348, draft-ietf-nvo3-vxlan-gpe, RFC 8926); none of GRE's.
pub(crate) fn port_of(kind: Kind) -> Option<u16> {
    match kind {
        Kind::Vxlan => Some(4789),
        Kind::VxlanGpe => Some(4790),
        Kind::Geneve => Some(6081),
        Kind::Gre | Kind::Erspan1 | Kind::Erspan2 | Kind::Erspan3 => None,
    }
}

/// How a socket's packets begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// GRE behind an IPv4 header.
    GreV4,
    Gre,
    /// The payload of UDP.
    Udp(Kind),
    /// The same behind its UDP header.
    RawUdp(Kind),
}

impl Form {
    fn read(self, packet: &[u8]) -> Result<Copy<'_>, Fault> {
        let open =
            |kind, payload| if kind == Kind::Geneve { decode::geneve(payload) } else { decode::vxlan(payload, kind) };
        match self {
            Form::GreV4 => decode::behind_ipv4(packet).and_then(decode::gre),
            Form::Gre => decode::gre(packet),
            Form::Udp(kind) => open(kind, packet),
            Form::RawUdp(kind) => decode::behind_udp(packet).and_then(|payload| open(kind, payload)),
        }
    }
}

struct Listener {
    socket: Socket,
    form: Form,
    /// The kernel's counter of packets that found no room.
    dropped: u32,
}

/// What is listened to.
#[derive(Clone, Debug)]
pub(crate) struct Ears {
    /// Addresses of ours; none for all.
    pub addresses: Vec<IpAddr>,
    /// None for every kind.
    pub kinds: Vec<Kind>,
    pub port: Option<u16>,
}

/// A packet, and what it is.
pub(crate) struct Received<'a> {
    pub source: IpAddr,
    /// Nanoseconds since 1970 at which the kernel took it.
    pub time: u64,
    pub copy: Result<Copy<'a>, Fault>,
}

pub(crate) struct Receiver {
    listeners: Vec<Listener>,
    /// They hold ports, so that the kernel answers no packet with an error, and get nothing.
    _held: Vec<Socket>,
    buffer: Vec<u8>,
    /// Did the last call leave packets behind?
    is_full: bool,
}

impl Receiver {
    pub(crate) fn open(runner: &Runner, ears: &Ears) -> Result<Receiver> {
        let mut receiver =
            Receiver { listeners: Vec::new(), _held: Vec::new(), buffer: vec![0; BATCH * ROOM], is_full: false };
        let every = [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()];
        let own = distinct(&ears.addresses);
        let (addresses, is_every) = if own.is_empty() { (&every[..], true) } else { (&own[..], false) };
        let all = [Kind::Gre, Kind::Vxlan, Kind::VxlanGpe, Kind::Geneve];
        let kinds = if ears.kinds.is_empty() { &all[..] } else { &ears.kinds[..] };
        let is_taken = |kind: Kind| port_of(kind).is_some() || kinds.iter().any(|other| port_of(*other).is_none());
        for address in addresses {
            // IPv6 can be absent.
            if is_every && address.is_ipv6() && Socket::new(Domain::IPV6, Type::DGRAM, None).is_err() {
                continue;
            }
            for kind in all.into_iter().filter(|kind| is_taken(*kind)) {
                match port_of(kind) {
                    None => receiver.raw(*address, PROTO_GRE, &[]).map(|socket| {
                        let form = if address.is_ipv4() { Form::GreV4 } else { Form::Gre };
                        receiver.listeners.push(Listener { socket, form, dropped: 0 });
                    })?,
                    Some(_) if !kinds.contains(&kind) => {}
                    Some(port) => {
                        let port = ears.port.unwrap_or(port);
                        match receiver.udp(runner, *address, port, kind) {
                            Err(err) if ears.kinds.is_empty() && err.is::<Taken>() => {
                                let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
                                eprintln!("snifctl: no {kind} over {family} is received: {err}");
                            }
                            done => done?,
                        }
                    }
                }
            }
        }
        Ok(receiver)
    }

    fn raw(&self, address: IpAddr, protocol: i32, filter: &[SockFilter]) -> Result<Socket> {
        let domain = if address.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(protocol))).map_err(|err| match err.kind() {
            io::ErrorKind::PermissionDenied => anyhow!(
                "a raw socket needs root or CAP_NET_RAW; try: sudo snifctl collect, or --tunnel vxlan --listen 10.0.0.7"
            ),
            _ => anyhow!("no raw socket can be opened: {err}"),
        })?;
        if !filter.is_empty() {
            socket.attach_filter(filter).context("a raw socket takes no filter")?;
        }
        bind(&socket, SocketAddr::new(address, 0))?;
        ready(&socket)?;
        Ok(socket)
    }

    fn udp(&mut self, runner: &Runner, address: IpAddr, port: u16, kind: Kind) -> Result<()> {
        let domain = if address.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)).context("no UDP socket can be opened")?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        match socket.bind(&SocketAddr::new(address, port).into()) {
            Err(err) if err.kind() == io::ErrorKind::AddrInUse => return Err(taken(runner, port).into()),
            Err(err) if err.kind() == io::ErrorKind::AddrNotAvailable => return Err(elsewhere(address)),
            Err(err) if err.kind() == io::ErrorKind::PermissionDenied => bail!(
                "--port {port} needs root or CAP_NET_BIND_SERVICE; try: sudo snifctl collect, or another port: --port 8472"
            ),
            done => done.with_context(|| format!("UDP port {port} of {address} cannot be had"))?,
        }
        if address.is_ipv4() {
            ready(&socket)?;
            self.listeners.push(Listener { socket, form: Form::Udp(kind), dropped: 0 });
            return Ok(());
        }
        // A UDP socket over IPv6 takes no packet without a checksum, and no safe call tells it to. Tunnels send such (RFC
        // 6935), so a raw socket takes them all.
        match self.raw(address, PROTO_UDP, &only_to(port)) {
            Ok(raw) => {
                socket.attach_filter(&[SockFilter::new(0x06, 0, 0, 0)]).context("a UDP socket takes no filter")?;
                self._held.push(socket);
                self.listeners.push(Listener { socket: raw, form: Form::RawUdp(kind), dropped: 0 });
            }
            Err(err) => {
                eprintln!("snifctl: {kind} over IPv6 is received with UDP checksums only: {err}");
                ready(&socket)?;
                self.listeners.push(Listener { socket, form: Form::Udp(kind), dropped: 0 });
            }
        }
        Ok(())
    }

    /// Waits for packets, at most so long, and gives those that are there to `take`, until that wants no more. How many
    /// there were.
    pub(crate) fn receive(
        &mut self,
        patience: Duration,
        mut take: impl FnMut(Received) -> Result<bool>,
    ) -> Result<usize> {
        let mut ready: Vec<PollFd> =
            self.listeners.iter().map(|at| PollFd::new(at.socket.as_fd(), PollFlags::POLLIN)).collect();
        let patience = PollTimeout::try_from(patience).unwrap_or(PollTimeout::ZERO);
        match poll(&mut ready, patience) {
            Err(Errno::EINTR) => return Ok(0),
            done => done.context("poll")?,
        };
        let ready: Vec<bool> = ready.iter().map(|at| at.any().unwrap_or(false)).collect();
        let mut count = 0;
        self.is_full = false;
        for (listener, _) in self.listeners.iter_mut().zip(ready).filter(|(_, ready)| *ready) {
            let (taken, goes_on) = listener.batch(&mut self.buffer, &mut take)?;
            count += taken;
            self.is_full |= taken == BATCH;
            if !goes_on {
                break;
            }
        }
        Ok(count)
    }
}

impl Receiver {
    /// Packets for which the sockets had no room. A packet tells how many were dropped before it; what was dropped since the
    /// last one, the kernel's tables of sockets know.
    pub(crate) fn dropped(&self) -> u64 {
        let tables = ["udp", "udp6", "raw", "raw6"].map(|name| fs::read_to_string(format!("/proc/net/{name}")));
        let table: HashMap<u64, u64> =
            tables.iter().flatten().flat_map(|text| text.lines().filter_map(drops)).collect();
        let of = |listener: &Listener| {
            let inode = rustix::fs::fstat(&listener.socket).map(|stat| stat.st_ino).ok();
            inode.and_then(|inode| table.get(&inode)).copied().unwrap_or(0).max(listener.dropped.into())
        };
        self.listeners.iter().map(of).sum()
    }

    /// More packets may be there than the last call has taken.
    pub(crate) fn is_full(&self) -> bool {
        self.is_full
    }
}

impl Listener {
    fn batch(&mut self, buffer: &mut [u8], take: &mut impl FnMut(Received) -> Result<bool>) -> Result<(usize, bool)> {
        // Made anew for each call: the kernel writes into the lengths, and nix does not set them back.
        let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(BATCH, Some(cmsg_space!(TimeSpec, u32)));
        let mut slices: Vec<[IoSliceMut; 1]> = buffer.chunks_mut(ROOM).map(|room| [IoSliceMut::new(room)]).collect();
        let got = recvmmsg(self.socket.as_raw_fd(), &mut headers, slices.iter_mut(), MsgFlags::MSG_DONTWAIT, None);
        let got = match got {
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok((0, true)),
            // What ICMP says of packets that we have never sent.
            Err(Errno::ECONNREFUSED | Errno::EHOSTUNREACH | Errno::ENETUNREACH) => return Ok((0, true)),
            got => got.context("recvmmsg")?,
        };
        let mut count = 0;
        for message in got {
            let mut time = 0;
            for control in message.cmsgs().into_iter().flatten() {
                match control {
                    ControlMessageOwned::ScmTimestampns(at) => time = nanoseconds(at),
                    ControlMessageOwned::RxqOvfl(dropped) => self.dropped = dropped,
                    _ => {}
                }
            }
            let packet = message.iovs().next().unwrap_or_default();
            let Some(source) = message.address.and_then(address_of) else { continue };
            count += 1;
            if !take(Received { source, time, copy: self.form.read(packet) })? {
                return Ok((count, false));
            }
        }
        Ok((count, true))
    }
}

/// Each once, so that no packet comes twice: one that stands for all of its family has the others.
fn distinct(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let all: Vec<IpAddr> = addresses.iter().map(IpAddr::to_canonical).collect();
    let is_held = |one: IpAddr| {
        !one.is_unspecified() && all.iter().any(|other| other.is_unspecified() && other.is_ipv4() == one.is_ipv4())
    };
    let mut kept: Vec<IpAddr> = Vec::new();
    for one in all.iter().copied().filter(|one| !is_held(*one)) {
        if !kept.contains(&one) {
            kept.push(one);
        }
    }
    kept
}

fn nanoseconds(at: TimeSpec) -> u64 {
    (at.tv_sec().max(0) as u64).wrapping_mul(1_000_000_000).wrapping_add(at.tv_nsec().max(0) as u64)
}

fn address_of(address: SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|at| IpAddr::from(at.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|at| at.ip().into()))
}

fn bind(socket: &Socket, address: SocketAddr) -> Result<()> {
    match socket.bind(&address.into()) {
        Err(err) if err.kind() == io::ErrorKind::AddrNotAvailable => Err(elsewhere(address.ip())),
        done => done.with_context(|| format!("--listen {} cannot be had", address.ip())),
    }
}

fn elsewhere(address: IpAddr) -> anyhow::Error {
    anyhow!("--listen {address} is no address of this machine; see: ip address")
}

/// A long queue, times, and the count of what found no room in it.
fn ready(socket: &Socket) -> Result<()> {
    if setsockopt(socket, sockopt::RcvBufForce, &QUEUE).is_err() {
        socket.set_recv_buffer_size(QUEUE).context("SO_RCVBUF")?;
    }
    setsockopt(socket, sockopt::ReceiveTimestampns, &true).context("SO_TIMESTAMPNS")?;
    setsockopt(socket, sockopt::RxqOvfl, &1).context("SO_RXQ_OVFL")?;
    Ok(())
}

/// Of a line of /proc/net/udp or raw: the socket's inode, and its drops.
fn drops(line: &str) -> Option<(u64, u64)> {
    let mut words = line.split_ascii_whitespace();
    let inode = words.nth(9)?.parse().ok()?;
    Some((inode, words.next_back()?.parse().ok()?))
}

/// UDP packets to this port: the destination lies 2 bytes into the header, where a raw socket's packet begins.
fn only_to(port: u16) -> [SockFilter; 4] {
    [
        SockFilter::new(0x28, 0, 0, 2),
        SockFilter::new(0x15, 0, 1, port.into()),
        SockFilter::new(0x06, 0, 0, u32::MAX),
        SockFilter::new(0x06, 0, 0, 0),
    ]
}

/// A port that somebody else has.
#[derive(Debug)]
struct Taken(String);

impl std::fmt::Display for Taken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Taken {}

fn taken(runner: &Runner, port: u16) -> Taken {
    let links = ip::links(runner).unwrap_or_default();
    // A device that is down holds no socket.
    let has_port = |link: &&ip::Link| {
        let told = &link.linkinfo.info_data["port"];
        let told = told.as_u64().or_else(|| told.as_str()?.parse().ok());
        link.is_up() && told == Some(port.into()) && port_kinds(link.kind())
    };
    Taken(match links.iter().find(has_port) {
        Some(link) => format!(
            "UDP port {port} belongs to the interface {}, a {} device of the kernel, which takes the packets; read the frames \
             there (tcpdump -i {}), or remove it: ip link delete {}",
            link.ifname,
            link.kind(),
            link.ifname,
            link.ifname
        ),
        None => format!("UDP port {port} belongs to another program; see: ss -lunp sport = :{port}"),
    })
}

fn port_kinds(kind: &str) -> bool {
    ["vxlan", "geneve"].contains(&kind)
}

/// `-Z`: from now on another user, without capabilities.
pub(crate) fn become_user(name: &str) -> Result<()> {
    use nix::unistd::{User, setgid, setgroups, setuid};
    let user = User::from_name(name).with_context(|| format!("-Z {name} cannot be looked up"))?;
    let Some(user) = user else { bail!("-Z {name} is no user of this machine; see: getent passwd") };
    let become_it = || setgroups(&[user.gid]).and_then(|()| setgid(user.gid)).and_then(|()| setuid(user.uid));
    become_it()
        .map_err(|err| anyhow!("-Z {name} needs root ({err}); leave it out, or try: sudo snifctl collect -Z {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_is_said_twice_is_listened_to_once() {
        let distinct = |list: &str| {
            let addresses: Vec<IpAddr> = list.split(' ').map(|address| address.parse().unwrap()).collect();
            super::distinct(&addresses).iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(distinct("10.0.0.7 ::1 ::ffff:10.0.0.7 10.0.0.7 10.0.0.8"), "10.0.0.7 ::1 10.0.0.8");
        assert_eq!(distinct("10.0.0.7 0.0.0.0 ::1"), "0.0.0.0 ::1");
        assert_eq!(distinct("10.0.0.7 :: ::1"), "10.0.0.7 ::");
    }

    #[test]
    fn a_sockets_line_tells_its_drops() {
        let udp = " 1188: 00000000:12B5 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 81573 2 000 17";
        assert_eq!(drops(udp), Some((81573, 17)));
        assert_eq!(
            drops("   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid inode"),
            None
        );
        assert_eq!(drops(""), None);
    }
}
