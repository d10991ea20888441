//! What systemd is told: sd_notify(3), by datagrams to NOTIFY_SOCKET.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

/// Where nobody listens nothing is said.
#[derive(Debug)]
pub(super) struct Notify {
    socket: Option<(UnixDatagram, SocketAddr)>,
    /// How often the watchdog wants to hear of us, and when it last did.
    watchdog: Option<(Duration, Instant)>,
}

impl Notify {
    pub(super) fn from_environment() -> Notify {
        let path = std::env::var_os("NOTIFY_SOCKET").unwrap_or_default();
        let address = match path.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name).ok(),
            [b'/', ..] => SocketAddr::from_pathname(&path).ok(),
            _ => None,
        };
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
        let is_ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        // Twice as often as it wants it, as sd_watchdog_enabled(3) advises.
        let watchdog = number("WATCHDOG_USEC").filter(|usec| is_ours && *usec > 0);
        let watchdog = watchdog.map(|usec| (Duration::from_micros(usec / 2), Instant::now()));
        let socket = UnixDatagram::unbound().ok().filter(|socket| socket.set_nonblocking(true).is_ok());
        Notify { socket: socket.zip(address), watchdog }
    }

    pub(super) fn is_heard(&self) -> bool {
        self.socket.is_some()
    }

    /// Lines such as `READY=1`. A manager that does not read them holds nothing up.
    pub(super) fn say(&self, lines: &str) {
        if let Some((socket, address)) = &self.socket {
            let _ = socket.send_to_addr(lines.as_bytes(), address);
        }
    }

    /// Tells the watchdog that we go on, if it is time to. Answers when it will be again.
    pub(super) fn feed(&mut self, now: Instant) -> Option<Instant> {
        let (every, last) = self.watchdog?;
        if now >= last + every {
            self.say("WATCHDOG=1");
            self.watchdog = Some((every, now));
            return Some(now + every);
        }
        Some(last + every)
    }

    /// The beginning of a reload, with the time that systemd compares it by.
    pub(super) fn reloading(&self) {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        self.say(&format!("RELOADING=1\nMONOTONIC_USEC={}", now.tv_sec * 1_000_000 + now.tv_nsec / 1000));
    }
}
