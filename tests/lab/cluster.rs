//! A cluster of Kubernetes in small: an API server that knows pods, and pods that are processes in network namespaces and
//! cgroups of their own, named as kubelet and the runtimes name them. kubectl is real.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use super::{Lab, Ns, PATIENCE, poll, random};

const PYTHON: &str = "/usr/bin/python3";

/// Serves the objects in a directory, `pods/NAMESPACE.NAME.json`, with labels and fields selected, and tells who watches of
/// each change. While there is a file `away`, it drops every connection.
const SERVER: &str = r#"
import http.server, json, os, re, socket, socketserver, sys, threading, time, urllib.parse
port, root = int(sys.argv[1]), sys.argv[2]
KINDS = {"pods": "Pod", "configmaps": "ConfigMap"}

def is_away():
    return os.path.exists(root + "/away")

def objects(kind):
    found = {}
    for name in sorted(os.listdir(root + "/" + kind)):
        if name.endswith(".json"):
            try:
                found[name] = json.load(open(root + "/" + kind + "/" + name))
            except (OSError, ValueError):
                pass
    return found

def selects(query, item):
    labels = item["metadata"].get("labels", {})
    for part in filter(None, query.get("labelSelector", [""])[0].split(",")):
        key, sign, value = re.match(r"([^!=]+)(!=|==|=|$)(.*)", part).groups()
        if sign == "!=" and labels.get(key) == value or sign in ("=", "==") and labels.get(key) != value:
            return False
        if not sign and key not in labels:
            return False
    for part in filter(None, query.get("fieldSelector", [""])[0].split(",")):
        key, value = part.split("=", 1)
        at = item
        for step in key.split("."):
            at = at.get(step, {}) if isinstance(at, dict) else {}
        if at != value:
            return False
    return True

def namespaced(namespace, item):
    return not namespace or item["metadata"]["namespace"] == namespace

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def answer(self, body, code=200):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def missing(self, what):
        self.answer({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404,
                     "message": what + " not found"}, 404)

    def drop(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self):
        if is_away():
            return self.drop()
        url = urllib.parse.urlparse(self.path)
        query = urllib.parse.parse_qs(url.query)
        if url.path == "/api":
            return self.answer({"kind": "APIVersions", "versions": ["v1"]})
        if url.path == "/apis":
            return self.answer({"kind": "APIGroupList", "apiVersion": "v1", "groups": []})
        if url.path == "/api/v1":
            verbs = ["get", "list", "watch", "create", "update", "patch", "delete"]
            all = [{"name": name, "singularName": "", "namespaced": True, "kind": kind, "verbs": verbs} for name, kind in KINDS.items()]
            return self.answer({"kind": "APIResourceList", "groupVersion": "v1", "resources": all})
        found = re.fullmatch(r"/api/v1(?:/namespaces/([^/]+))?/(pods|configmaps)(?:/([^/]+))?", url.path)
        if not found:
            return self.missing(url.path)
        namespace, kind, name = found.groups()
        if name:
            item = objects(kind).get(namespace + "." + name + ".json")
            return self.answer(item) if item else self.missing(kind + " " + name)
        chosen = lambda: {at: item for at, item in objects(kind).items() if namespaced(namespace, item) and selects(query, item)}
        if "true" in query.get("watch", []):
            return self.watch(chosen)
        meta = {"resourceVersion": "1"}
        self.answer({"kind": KINDS[kind] + "List", "apiVersion": "v1", "metadata": meta, "items": list(chosen().values())})

    def watch(self, chosen):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        def tell(kind, item):
            line = json.dumps({"type": kind, "object": item}).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.flush()
        known = chosen()
        while not is_away():
            time.sleep(0.02)
            now = chosen()
            for name, item in now.items():
                if name not in known:
                    tell("ADDED", item)
                elif known[name] != item:
                    tell("MODIFIED", item)
            for name, item in known.items():
                if name not in now:
                    tell("DELETED", item)
            known = now
        self.drop()

    def write(self, change):
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length) or b"{}")
        path = urllib.parse.urlparse(self.path).path
        found = re.fullmatch(r"/api/v1/namespaces/([^/]+)/(configmaps)(?:/([^/]+))?", path)
        if not found:
            return self.missing(path)
        namespace, kind, name = found.groups()
        name = name or body["metadata"]["name"]
        file = root + "/" + kind + "/" + namespace + "." + name + ".json"
        before = objects(kind).get(namespace + "." + name + ".json")
        if change == "patch" and not before:
            return self.missing(kind + " " + name)
        item = body
        if change == "patch":
            item = before
            for key, value in (body.get("data") or {}).items():
                if value is None:
                    item.get("data", {}).pop(key, None)
                else:
                    item.setdefault("data", {})[key] = value
        item["metadata"]["namespace"] = namespace
        item.update({"kind": KINDS[kind], "apiVersion": "v1"})
        with open(file + ".new", "w") as out:
            json.dump(item, out)
        os.rename(file + ".new", file)
        self.answer(item, 201 if change == "create" else 200)

    def do_PATCH(self):
        self.write("patch")

    def do_PUT(self):
        self.write("update")

    def do_POST(self):
        self.write("create")

class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address, daemon_threads = True, True

server = Server(("127.0.0.1", port), Handler)
print("listening", flush=True)
server.serve_forever()
"#;

const PORT: u16 = 6443;

/// The node that the lab's host is.
pub(crate) const NODE: &str = "node-1";

/// An API server in the host's network namespace. Ended with its value.
pub(crate) struct Cluster {
    dir: PathBuf,
    server: Child,
}

impl Cluster {
    pub(crate) fn start(lab: &Lab) -> Cluster {
        let dir = lab.fresh_path("cluster");
        for kind in ["pods", "configmaps", "home"] {
            fs::create_dir_all(dir.join(kind)).expect("make the cluster's directories");
        }
        let config = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: lab\nclusters:\n- name: lab\n  cluster:\n    server: \
             http://127.0.0.1:{PORT}\ncontexts:\n- name: lab\n  context:\n    cluster: lab\n    user: lab\nusers:\n- name: lab\n"
        );
        fs::write(dir.join("kubeconfig"), config).expect("write the kubeconfig");
        let said = dir.join("said");
        let out = File::create(&said).expect("make the file for the server's messages");
        let err = File::create(dir.join("errors")).expect("make the file for the server's errors");
        let argv = [PYTHON, "-c", SERVER, &PORT.to_string(), dir.to_str().expect("a plain path")];
        let server = lab.command(Ns::Host, &argv).stdout(out).stderr(err).spawn().expect("start the API server");
        let cluster = Cluster { dir, server };
        let listens = || fs::read_to_string(&said).unwrap_or_default().contains("listening").then_some(());
        poll(PATIENCE, listens).expect("the API server listens");
        cluster
    }

    /// What snifctl and kubectl have to be told.
    pub(crate) fn flags(&self) -> [String; 4] {
        ["--kubeconfig".into(), self.kubeconfig(), "--node".into(), NODE.into()]
    }

    pub(crate) fn kubeconfig(&self) -> String {
        self.dir.join("kubeconfig").display().to_string()
    }

    /// A directory for what kubectl remembers.
    pub(crate) fn home(&self) -> String {
        format!("HOME={}", self.dir.join("home").display())
    }

    /// From now on it answers nobody, or everybody again.
    pub(crate) fn is_away(&self, away: bool) {
        match away {
            true => fs::write(self.dir.join("away"), "").expect("write the mark"),
            false => fs::remove_file(self.dir.join("away")).expect("remove the mark"),
        }
    }

    /// Puts a pod into its list, or another one in its place.
    pub(crate) fn tell(&self, pod: &Told) {
        let object = json!({
            "kind": "Pod", "apiVersion": "v1",
            "metadata": {"name": pod.name, "namespace": pod.namespace, "uid": pod.uid, "resourceVersion": random().to_string(),
                "labels": pod.labels.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
                "annotations": pod.annotations.iter().cloned().collect::<std::collections::BTreeMap<_, _>>()},
            "spec": {"nodeName": pod.node, "hostNetwork": pod.host_network, "containers": [{"name": "main"}]},
            "status": {"phase": pod.phase},
        });
        self.put("pods", &pod.namespace, &pod.name, &object);
    }

    pub(crate) fn put(&self, kind: &str, namespace: &str, name: &str, object: &Value) {
        let file = self.dir.join(kind).join(format!("{namespace}.{name}.json"));
        let new = file.with_extension("new");
        fs::write(&new, object.to_string()).expect("write an object");
        fs::rename(new, file).expect("put an object into its place");
    }

    pub(crate) fn object(&self, kind: &str, namespace: &str, name: &str) -> Value {
        let file = self.dir.join(kind).join(format!("{namespace}.{name}.json"));
        serde_json::from_slice(&fs::read(file).unwrap_or_default()).unwrap_or_default()
    }

    /// Takes a pod out of its list.
    pub(crate) fn forget(&self, pod: &Told) {
        let _ = fs::remove_file(self.dir.join("pods").join(format!("{}.{}.json", pod.namespace, pod.name)));
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// A pod as the API server tells it.
#[derive(Clone, Debug)]
pub(crate) struct Told {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub labels: Vec<(String, String)>,
    pub annotations: Vec<(String, String)>,
    pub node: String,
    pub host_network: bool,
    pub phase: String,
}

impl Told {
    pub(crate) fn new(name: &str, labels: &[(&str, &str)]) -> Told {
        let n = random;
        Told {
            namespace: "shop".into(),
            name: name.into(),
            uid: format!("{:08x}-{:04x}-4000-8000-{:08x}{:04x}", n(), n() as u16, n(), n() as u16),
            labels: labels.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect(),
            annotations: Vec::new(),
            node: NODE.into(),
            host_network: false,
            phase: "Running".into(),
        }
    }
}

/// Which cgroups a runtime makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Driver {
    Systemd,
    Cgroupfs,
    /// systemd's, and that of a container's monitor, as CRI-O has it.
    Monitor,
}

/// A process in a cgroup, and in a network namespace of its own or another one's. Ended with its value.
pub(crate) struct Process {
    child: Child,
    cgroups: Vec<PathBuf>,
    /// Of its container.
    pub id: String,
}

impl Process {
    /// One of a pod. `beside`: it joins that one's network namespace, `host`: the host's.
    pub(crate) fn of_pod(lab: &Lab, pod: &Told, driver: Driver, joins: Option<&Path>) -> Process {
        let id = format!("{:016x}", random()).repeat(4);
        let uid = match driver {
            Driver::Systemd | Driver::Monitor => pod.uid.replace('-', "_"),
            Driver::Cgroupfs => pod.uid.clone(),
        };
        let path = match driver {
            Driver::Systemd | Driver::Monitor => vec![
                "kubepods.slice".into(),
                "kubepods-burstable.slice".into(),
                format!("kubepods-burstable-pod{uid}.slice"),
                format!("{}-{id}.scope", if driver == Driver::Monitor { "crio-conmon" } else { "cri-containerd" }),
            ],
            Driver::Cgroupfs => vec!["kubepods".into(), "besteffort".into(), format!("pod{uid}"), id.clone()],
        };
        Process::start(lab, driver, &path, id, joins)
    }

    /// One of a container without a pod.
    pub(crate) fn of_container(lab: &Lab) -> Process {
        let id = format!("{:016x}", random()).repeat(4);
        Process::start(lab, Driver::Cgroupfs, &["docker".into(), id.clone()], id, None)
    }

    fn start(lab: &Lab, driver: Driver, path: &[String], id: String, joins: Option<&Path>) -> Process {
        let own = match joins {
            Some(netns) => vec!["nsenter".to_string(), format!("--net={}", netns.display())],
            None => vec!["unshare".into(), "--net".into()],
        };
        let mut argv: Vec<&str> = own.iter().map(String::as_str).collect();
        argv.extend(["--", "sleep", "600"]);
        let mut command = lab.command(Ns::Host, &argv);
        let child = command.stdin(Stdio::null()).spawn().expect("start a pod's process");
        let mut process = Process { child, cgroups: Vec::new(), id };
        let comm = process.proc().join("comm");
        poll(PATIENCE, || fs::read_to_string(&comm).is_ok_and(|name| name.trim() == "sleep").then_some(()))
            .expect("sleeps");
        let mut at = hierarchy(driver);
        for part in path {
            at.push(part);
            let _ = fs::create_dir(&at);
            process.cgroups.push(at.clone());
        }
        fs::write(at.join("cgroup.procs"), process.child.id().to_string()).expect("join the cgroup");
        process
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn proc(&self) -> PathBuf {
        Path::new("/proc").join(self.pid().to_string())
    }

    pub(crate) fn netns(&self) -> PathBuf {
        self.proc().join("ns/net")
    }

    pub(crate) fn inode(&self) -> u64 {
        fs::metadata(self.netns()).expect("a living process").ino()
    }

    /// Gives it an eth0 with this address, whose other end the host has.
    pub(crate) fn join(&self, lab: &Lab, host_end: &str, address: &str) {
        let pid = self.pid().to_string();
        lab.host(&["ip", "link", "add", host_end, "type", "veth", "peer", "name", "eth0", "netns", &pid]);
        lab.host(&["ip", "link", "set", "dev", host_end, "addrgenmode", "none", "up"]);
        lab.host(&["ip", "address", "add", "10.42.0.1/32", "dev", host_end]);
        // A pod that is gone has its route until the kernel has freed its namespace.
        lab.host(&["ip", "route", "replace", &format!("{address}/32"), "dev", host_end]);
        self.run(&["ip", "link", "set", "dev", "eth0", "addrgenmode", "none", "up"]);
        self.run(&["ip", "address", "add", &format!("{address}/24"), "dev", "eth0"]);
    }

    pub(crate) fn run(&self, argv: &[&str]) -> String {
        let net = format!("--net={}", self.netns().display());
        let out = Command::new("nsenter").args([&net, "--"]).args(argv).output().expect("nsenter starts");
        assert!(out.status.success(), "{argv:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for cgroup in self.cgroups.drain(..).rev() {
            let _ = fs::remove_dir(cgroup);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

/// Where cgroups of a driver are made: with systemd version 2, where this machine has it beside version 1.
fn hierarchy(driver: Driver) -> PathBuf {
    let all = match driver {
        Driver::Systemd | Driver::Monitor => ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"],
        Driver::Cgroupfs => ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"],
    };
    let found = all.iter().map(Path::new).find(|path| path.join("cgroup.procs").exists());
    found.expect("a hierarchy of cgroups").to_path_buf()
}
