//! `--control`: tells its counters to whoever connects, as one JSON document a connection. Nothing is read from there, so
//! that nothing can be asked for but the counters.

use std::fmt;
use std::io::{self, Write as _};
use std::iter;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use serde_json::Value;

use crate::collect::{now, seconds};
use crate::usage::{Usage, refuse};

/// Where nothing else is said.
pub(crate) const PORT: u16 = 9811;
/// Answers that are on their way at a time; who comes then is sent away.
const MOST: usize = 8;
/// So long an answer may take, for each piece that the reader takes.
const PATIENCE: Duration = Duration::from_secs(5);

/// `ADDR` or `ADDR:PORT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place(pub SocketAddr);

impl Place {
    fn at(address: IpAddr) -> Place {
        Place(SocketAddr::new(address, PORT))
    }

    /// What was meant, perhaps, where a port stands behind an IPv6 address without brackets.
    fn bracketed(self) -> Option<Place> {
        let text = Some(self.0).filter(|at| at.is_ipv6() && at.port() == PORT)?.ip().to_string();
        let (address, port) = text.rsplit_once(':')?;
        Some(Place(SocketAddr::new(address.parse().ok()?, port.parse().ok().filter(|port| *port != 0)?)))
    }
}

impl FromStr for Place {
    type Err = Usage;

    fn from_str(text: &str) -> Result<Place, Usage> {
        let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
        let alone = bare.parse::<IpAddr>().ok().map(|address| SocketAddr::new(address, PORT));
        match alone.or_else(|| text.parse().ok()) {
            Some(address) if address.port() == 0 => {
                refuse!(
                    "--control {text} has port 0, which nobody would know; try: --control {}",
                    Place::at(address.ip())
                )
            }
            Some(address) => Ok(Place(address)),
            None => refuse!("--control {text:?} is no address; try: --control 10.0.0.7, or 10.0.0.7:{PORT}"),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Listens.
pub(crate) struct Control {
    listener: TcpListener,
    began: Instant,
    on_their_way: Arc<AtomicUsize>,
}

impl Control {
    pub(crate) fn open(at: Place) -> Result<Control> {
        let listener = TcpListener::bind(at.0).map_err(|err| match err.kind() {
            io::ErrorKind::AddrNotAvailable => {
                let meant = at.bracketed().map(|meant| format!("; with a port it is {meant}")).unwrap_or_default();
                anyhow!("--control {}: no address of this machine{meant}; see: ip address", at.0.ip())
            }
            _ => {
                anyhow!("--control {at}: cannot listen there ({err}); try another port: --control {}:19811", at.0.ip())
            }
        })?;
        listener.set_nonblocking(true).context("--control")?;
        Ok(Control { listener, began: Instant::now(), on_their_way: Arc::default() })
    }

    /// Answers those who wait, with one document, as there can be many streams; never waits for them.
    pub(crate) fn answer(&self, document: impl FnOnce() -> Value) {
        let came: Vec<TcpStream> =
            iter::from_fn(|| self.listener.accept().ok()).map(|(stream, _)| stream).take(MOST).collect();
        if came.is_empty() {
            return;
        }
        let mut document = document();
        document["seconds"] = self.began.elapsed().as_secs_f64().into();
        document["now"] = seconds(now()).into();
        let text: Arc<str> = format!("{document}\n").into();
        for stream in came {
            if self.on_their_way.load(Ordering::Relaxed) < MOST {
                self.tell(stream, Arc::clone(&text));
            }
        }
    }

    fn tell(&self, stream: TcpStream, text: Arc<str>) {
        let way = Arc::clone(&self.on_their_way);
        way.fetch_add(1, Ordering::Relaxed);
        thread::spawn(move || {
            // Who does not take the answer has none.
            let _ = send(stream, &text);
            way.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

fn send(mut stream: TcpStream, text: &str) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use serde_json::json;

    use super::*;

    #[test]
    fn all_who_wait_get_one_document() {
        let control = Control::open(Place("127.0.0.1:0".parse().unwrap())).unwrap();
        let at = control.listener.local_addr().unwrap();
        control.answer(|| unreachable!("nobody waits"));
        let waiting: Vec<TcpStream> = (0..MOST + 1).map(|_| TcpStream::connect(at).unwrap()).collect();
        control.answer(|| json!({ "received": 7 }));
        for mut stream in waiting.into_iter().take(MOST) {
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            assert!(text.starts_with(r#"{"received":7,"seconds":"#) && text.ends_with("}\n"), "{text}");
        }
    }

    #[test]
    fn a_place_is_an_address_with_or_without_a_port() {
        let read = |text: &str| text.parse::<Place>().map(|place| place.to_string()).ok();
        assert_eq!(read("10.0.0.7").as_deref(), Some("10.0.0.7:9811"));
        assert_eq!(read("10.0.0.7:80").as_deref(), Some("10.0.0.7:80"));
        assert_eq!(read("2001:db8::7").as_deref(), Some("[2001:db8::7]:9811"));
        assert_eq!(read("[2001:db8::7]").as_deref(), Some("[2001:db8::7]:9811"));
        assert_eq!(read("[2001:db8::7]:80").as_deref(), Some("[2001:db8::7]:80"));
        assert_eq!(read("collector"), None);
    }

    #[test]
    fn a_port_that_says_nothing_or_is_hidden_in_an_address_is_hinted_at() {
        let said = "10.0.0.7:0".parse::<Place>().unwrap_err().to_string();
        assert_eq!(said, "--control 10.0.0.7:0 has port 0, which nobody would know; try: --control 10.0.0.7:9811");
        let said = |text: &str| Control::open(text.parse().unwrap()).err().unwrap().to_string();
        let ends = "see: ip address";
        let hidden = "no address of this machine; with a port it is [2001:db8::7]:9812";
        assert_eq!(said("2001:db8::7:9812"), format!("--control 2001:db8::7:9812: {hidden}; {ends}"));
        assert_eq!(said("2001:db8::7"), format!("--control 2001:db8::7: no address of this machine; {ends}"));
    }
}
