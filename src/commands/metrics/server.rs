//! Serves the metrics over HTTP/1, one request a connection.

use std::convert::Infallible;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use http_body_util::Full;
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::{Mutex, Semaphore};

use super::Collector;
use crate::usage::{Usage, refuse};

/// Where nothing else is said.
pub(crate) const PORT: u16 = 9810;
/// So many connections are open at a time; others wait in the kernel's queue.
const CONNECTIONS: usize = 400;
/// Bytes of a request's line and headers.
const MOST_BYTES: usize = 8192;
const MOST_HEADERS: usize = 64;
/// A request has to be here after so long, and its answer taken after so much longer.
const REQUEST_TIME: Duration = Duration::from_secs(5);
const WHOLE_TIME: Duration = Duration::from_secs(30);
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Where to listen: a port alone is one of the loopback address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Listen(pub SocketAddr);

impl FromStr for Listen {
    type Err = Usage;

    fn from_str(text: &str) -> Result<Listen, Usage> {
        let loopback = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
        let port = text.strip_prefix(':').unwrap_or(text).parse::<u16>().ok();
        match port.map(loopback).or_else(|| text.parse().ok()) {
            Some(address) => Ok(Listen(address)),
            None => {
                refuse!("ADDR:PORT {text:?} is no address with a port; try: 127.0.0.1:{PORT}, [::]:{PORT}, or {PORT}")
            }
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// As long as this lives, metrics are served.
pub(crate) struct Server(Option<tokio::runtime::Runtime>);

impl Server {
    /// Listens there, or at the socket that systemd has made for us.
    pub(crate) fn start(listen: &Listen, collector: Collector) -> Result<Server> {
        let listener = match listenfd::ListenFd::from_env().take_tcp_listener(0) {
            Ok(Some(listener)) => listener,
            Ok(None) => TcpListener::bind(listen.0).map_err(|err| {
                anyhow!("ADDR:PORT {listen}: cannot listen there ({err}); try another, such as: 127.0.0.1:{PORT}")
            })?,
            Err(err) => return Err(err).context("the socket of LISTEN_FDS is no TCP socket that listens"),
        };
        // Not for our tools.
        rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::CLOEXEC).context("cannot listen")?;
        listener.set_nonblocking(true).context("cannot listen")?;
        let at = listener.local_addr().context("cannot listen")?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.context("cannot listen")?;
        let listener = {
            let _inside = runtime.enter();
            tokio::net::TcpListener::from_std(listener).context("cannot listen")?
        };
        runtime.spawn(accept(listener, Arc::new(Mutex::new(Shared { collector: Some(collector), last: None }))));
        eprintln!("snifctl: metrics at http://{at}/metrics");
        Ok(Server(Some(runtime)))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_timeout(Duration::from_secs(1));
        }
    }
}

/// What the requests share.
struct Shared {
    /// Not here while it is at work.
    collector: Option<Collector>,
    /// What was read last, and when that began.
    last: Option<(Instant, Result<Bytes, String>)>,
}

async fn accept(listener: tokio::net::TcpListener, shared: Arc<Mutex<Shared>>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            // No more descriptors: some will be given back.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let shared = shared.clone();
        tokio::spawn(async move {
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(REQUEST_TIME).max_buf_size(MOST_BYTES);
            http.max_headers(MOST_HEADERS).keep_alive(false);
            let service = service_fn(move |request| answer(shared.clone(), request));
            let served = http.serve_connection(TokioIo::new(stream), service);
            // How a connection ends is the client's affair.
            let _ = tokio::time::timeout(WHOLE_TIME, served).await;
            drop(slot);
        });
    }
}

async fn answer(shared: Arc<Mutex<Shared>>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let said = |status: StatusCode, text: String| {
        let mut response = Response::new(Full::new(Bytes::from(text)));
        *response.status_mut() = status;
        response
    };
    if request.uri().path() != "/metrics" {
        return Ok(said(StatusCode::NOT_FOUND, "There is only /metrics.\n".into()));
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = said(StatusCode::METHOD_NOT_ALLOWED, "Only GET and HEAD.\n".into());
        response.headers_mut().insert(ALLOW, "GET, HEAD".parse().expect("a header"));
        return Ok(response);
    }
    if request.body().size_hint().upper() != Some(0) {
        return Ok(said(StatusCode::PAYLOAD_TOO_LARGE, "No body is taken.\n".into()));
    }
    Ok(match read(shared).await {
        Ok(text) => {
            let mut response = Response::new(Full::new(text));
            response.headers_mut().insert(CONTENT_TYPE, TEXT.parse().expect("a header"));
            response
        }
        Err(text) => said(StatusCode::SERVICE_UNAVAILABLE, format!("{text}\n")),
    })
}

/// The metrics of now. Who waited while others were read for gets what was begun after his request came: many requests at
/// once cost no more than two.
async fn read(shared: Arc<Mutex<Shared>>) -> Result<Bytes, String> {
    let asked = Instant::now();
    let mut shared = shared.lock_owned().await;
    if let Some((_, text)) = shared.last.as_ref().filter(|(begun, _)| *begun >= asked) {
        return text.clone();
    }
    let Some(mut collector) = shared.collector.take() else { return Err("the collection was broken off".into()) };
    // It goes on, and gives back what it has, also where the client does not wait for it.
    let work = tokio::task::spawn_blocking(move || {
        let begun = Instant::now();
        let text = collector.text().map(Bytes::from).map_err(|err| format!("{err:#}"));
        shared.collector = Some(collector);
        shared.last = Some((begun, text.clone()));
        text
    });
    work.await.unwrap_or_else(|err| Err(err.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_alone_is_one_of_the_loopback_address() {
        for (text, wanted) in [
            ("9810", "127.0.0.1:9810"),
            (":80", "127.0.0.1:80"),
            ("0.0.0.0:80", "0.0.0.0:80"),
            ("[::1]:80", "[::1]:80"),
        ] {
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), wanted);
        }
        for odd in ["", "localhost", "host:80", "1.2.3.4", "70000", "::1:80:"] {
            assert!(odd.parse::<Listen>().is_err(), "{odd}");
        }
    }
}
