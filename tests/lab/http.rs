//! Web traffic on the watched link: a server in the peer namespace, downloads by the watched host.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use super::traffic::pseudo_random;
use super::{Lab, Ns, PATIENCE, PEER_IP, check_output, poll};

pub(crate) const HTTP_PORT: u16 = 8080;

/// Debian's own; another one may come first in PATH.
const PYTHON: &str = "/usr/bin/python3";

/// Serves a directory, a connection for each request. `http.server`'s own start looks up the address's name, which may
/// take long here.
const SERVER: &str = r#"
import functools, http.server, socketserver, sys
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address, daemon_threads = True, True
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[3])
server = Server((sys.argv[1], int(sys.argv[2])), handler)
print("listening", flush=True)
server.serve_forever()
"#;

/// Downloads files one after the other; fails unless each is what the directory holds.
const CLIENT: &str = r#"
import http.client, sys
address, port, directory, *paths = sys.argv[1:]
for path in paths:
    connection = http.client.HTTPConnection(address, int(port), timeout=10)
    connection.request("GET", path)
    body = connection.getresponse().read()
    connection.close()
    assert body == open(directory + path, "rb").read(), path
"#;

/// Downloads at a stretch: some 300 packets, of which few wait in line at any time.
const BATCH: usize = 10;

/// A web server in the peer namespace and what it serves.
pub(crate) struct Site {
    dir: PathBuf,
    server: Child,
    pub pages: Vec<Page>,
}

/// A file that can be downloaded.
#[derive(Clone, Debug)]
pub(crate) struct Page {
    /// `/07`
    pub path: String,
    pub size: usize,
    /// In hex.
    pub sha256: String,
}

impl Lab {
    /// Starts a web server in the peer namespace with a file of each size; returns when it listens.
    pub(crate) fn serve(&self, sizes: &[usize]) -> Site {
        let dir = self.fresh_path("site");
        fs::create_dir(&dir).expect("make the site's directory");
        let pages = sizes.iter().zip(0u16..).map(|(size, n)| self.page(&dir, n, *size)).collect();
        let said = self.fresh_path("server.out");
        let out = File::create(&said).expect("make the file for the server's messages");
        let err = File::create(self.fresh_path("server.err")).expect("make the file for the server's log");
        let (address, port) = (PEER_IP.to_string(), HTTP_PORT.to_string());
        let argv = [PYTHON, "-c", SERVER, &address, &port, path_text(&dir)];
        let server = self.command(Ns::Peer, &argv).stdout(out).stderr(err).spawn().expect("start the web server");
        let site = Site { dir, server, pages };
        let listens = || fs::read_to_string(&said).unwrap_or_default().contains("listening").then_some(());
        poll(PATIENCE, listens).expect("the web server listens");
        site
    }

    fn page(&self, dir: &Path, n: u16, size: usize) -> Page {
        let path = format!("/{n:02}");
        let file = dir.join(&path[1..]);
        fs::write(&file, pseudo_random(size, n)).expect("write a page");
        let out = check_output("sha256sum", self.command(Ns::Host, &["sha256sum", path_text(&file)]).output());
        let sha256 = String::from_utf8_lossy(&out.stdout).chars().take(64).collect();
        Page { path, size, sha256 }
    }

    /// The watched host downloads every page, a connection each; returns when all have arrived unchanged, the receivers'
    /// backlog has been empty and the lab's captures have come to rest.
    #[track_caller]
    pub(crate) fn download(&self, site: &Site) {
        let (address, port) = (PEER_IP.to_string(), HTTP_PORT.to_string());
        for pages in site.pages.chunks(BATCH) {
            let mut argv = vec![PYTHON, "-c", CLIENT, &address, &port, path_text(&site.dir)];
            argv.extend(pages.iter().map(|page| page.path.as_str()));
            check_output("the downloads", self.command(Ns::Host, &argv).stdout(Stdio::piped()).output());
            self.wait_until_received();
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

fn path_text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}
