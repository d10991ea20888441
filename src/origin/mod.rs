//! Where interfaces of other network namespaces are asked for: by a namespace's name, a process, a container, a pod, or the
//! labels of pods. What each stands for is found in /proc; of pods `kubectl` tells which there are.

mod cgroup;
mod kube;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use crate::request::Request;
use crate::tools::exec::Runner;
use crate::usage::{Usage, ensure_usage, refuse};
use cgroup::Processes;

use kube::Pod;
pub(crate) use kube::watch_command;

/// Who is asked for. As text: `netns:blue`, `pid:4711`, `container:3f2a91c0ffee`, `pod:shop/web-1`, `pods:shop/app=web`,
/// `pods:*/app=web;mirror=yes` with annotations behind the labels.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Origin {
    /// A name of `ip netns`, or a path.
    Netns(String),
    Pid(u32),
    /// An id, or the beginning of one.
    Container(String),
    Pod {
        namespace: String,
        name: String,
    },
    Pods(Pods),
}

/// The pods of a namespace, or of all, that have these labels, and these annotations.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Pods {
    /// `*` for all.
    pub namespace: String,
    /// In kubectl's language; empty for all.
    pub selector: String,
    /// Those that must be there with these values.
    pub annotations: Vec<(String, String)>,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Netns(name) => write!(f, "netns:{name}"),
            Origin::Pid(pid) => write!(f, "pid:{pid}"),
            Origin::Container(id) => write!(f, "container:{id}"),
            Origin::Pod { namespace, name } => write!(f, "pod:{namespace}/{name}"),
            Origin::Pods(Pods { namespace, selector, annotations }) => {
                write!(f, "pods:{namespace}/{selector}")?;
                let all: Vec<String> = annotations.iter().map(|(key, value)| format!("{key}={value}")).collect();
                if all.is_empty() { Ok(()) } else { write!(f, ";{}", all.join(",")) }
            }
        }
    }
}

impl FromStr for Origin {
    type Err = Usage;

    fn from_str(text: &str) -> Result<Origin, Usage> {
        let Some((kind, rest)) = text.split_once(':') else {
            refuse!("{text:?} is no place for interfaces elsewhere; try: netns:blue/eth0 or pod:shop/web-1/eth0");
        };
        match kind {
            "netns" => {
                let is_name = !rest.contains('/') && rest != "." && rest != "..";
                ensure_usage!(
                    !rest.is_empty() && (is_name || rest.starts_with('/')) && !rest.contains(char::is_control),
                    "{rest:?} is neither a name of `ip netns` nor a path; try: --netns blue or --netns /run/netns/blue"
                );
                Ok(Origin::Netns(rest.into()))
            }
            "pid" => match rest.parse().ok().filter(|pid| *pid > 0 && rest.bytes().all(|byte| byte.is_ascii_digit())) {
                Some(pid) => Ok(Origin::Pid(pid)),
                None => refuse!("{rest:?} is no process id; try: --pid 4711"),
            },
            "container" => {
                let id = rest.rsplit_once("://").map_or(rest, |(_, id)| id);
                let is_id = (6..=64).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_hexdigit());
                ensure_usage!(
                    is_id,
                    "{rest:?} is no container id (6 to 64 hex digits, as `docker ps` and `crictl ps` show it); try: \
                     --container 3f2a91c0ffee"
                );
                Ok(Origin::Container(id.to_ascii_lowercase()))
            }
            "pod" => match rest.split_once('/') {
                Some((namespace, name)) if is_name(namespace) && is_name(name) => {
                    Ok(Origin::Pod { namespace: namespace.into(), name: name.into() })
                }
                _ => refuse!("{rest:?} is not NAMESPACE/NAME of a pod; try: --pod shop/web-1"),
            },
            "pods" => pods(rest).map(Origin::Pods),
            _ => refuse!("{kind:?} is no kind of place (netns, pid, container, pod, pods); try: netns:blue/eth0"),
        }
    }
}

fn pods(text: &str) -> Result<Pods, Usage> {
    let Some((namespace, rest)) = text.split_once('/').filter(|(namespace, _)| *namespace == "*" || is_name(namespace))
    else {
        refuse!("{text:?} does not begin with a namespace of Kubernetes, or `*` for all; try: pods:shop/app=web/eth0");
    };
    let (selector, annotated) = rest.split_once(';').unwrap_or((rest, ""));
    let mut annotations = Vec::new();
    for each in annotated.split(',').filter(|each| !each.is_empty()) {
        let Some((key, value)) = each.split_once('=').filter(|(key, _)| !key.is_empty()) else {
            refuse!("{each:?} is no annotation with its value; try: mirror=yes");
        };
        annotations.push((key.into(), value.into()));
    }
    let is_odd = |c: char| c.is_control() || "#'\"\\".contains(c);
    ensure_usage!(
        !selector.contains(is_odd) && !selector.starts_with('-'),
        "{selector:?} is no selector of labels; try: --pods app=web,tier!=test"
    );
    Ok(Pods { namespace: namespace.into(), selector: selector.into(), annotations })
}

/// A name of Kubernetes' (RFC 1123), which begins with no dash that a tool could take for an option.
fn is_name(text: &str) -> bool {
    let is_good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    (1..=253).contains(&text.len()) && text.chars().all(is_good) && !text.starts_with(['-', '.'])
}

/// A network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Space {
    /// What it is called here: `pod:shop/web-1`.
    pub label: String,
    /// What `nsenter --net` takes.
    pub path: PathBuf,
    pub inode: u64,
}

/// What an origin stands for now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    pub spaces: Vec<Space>,
    /// Uids of pods that have no process yet.
    pub pending: Vec<String>,
    /// Pods that cannot be watched so, and what to use instead: a line each.
    pub left_out: Vec<String>,
}

/// Why there is nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Absent {
    /// It is not there, or no more.
    Gone(String),
    /// It cannot be watched in this way.
    Unfit(String),
    /// Nobody can say: what was there stays as it is.
    Unknown(String),
    /// Nobody was asked.
    Unasked,
}

impl Absent {
    pub(crate) fn reason(&self) -> &str {
        match self {
            Absent::Gone(why) | Absent::Unfit(why) | Absent::Unknown(why) => why,
            Absent::Unasked => "nobody was asked for it",
        }
    }
}

/// How `kubectl` finds its cluster, and which of its nodes this is.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Cluster {
    pub kubeconfig: Option<String>,
    pub context: Option<String>,
    /// Else what NODE_NAME says, or the host's name.
    pub node: Option<String>,
}

impl Cluster {
    pub(crate) fn of(request: Option<&Request>) -> Cluster {
        let Some(request) = request else { return Cluster::default() };
        let options = &request.options.cluster;
        Cluster { kubeconfig: options.kubeconfig.clone(), context: options.context.clone(), node: options.node.clone() }
    }
}

/// The inode of our own network namespace.
fn own_inode() -> u64 {
    fs::metadata("/proc/self/ns/net").map_or(0, |meta| meta.ino())
}

/// What each of these stands for, but those that are none: one look through /proc, and one `kubectl` for each kind of pods.
pub(crate) fn find(runner: &Runner, origins: &[Option<Origin>], cluster: &Cluster) -> Vec<Result<Found, Absent>> {
    let is_direct = |origin: &Origin| matches!(origin, Origin::Netns(_) | Origin::Pid(_));
    let is_read = !origins.iter().flatten().all(is_direct);
    let processes = if is_read { Processes::read(Path::new("/proc"), own_inode()) } else { Processes::default() };
    let mut finder = Finder { runner, cluster, processes, own: own_inode(), lists: BTreeMap::new() };
    origins.iter().map(|origin| finder.find(origin.as_ref().ok_or(Absent::Unasked)?)).collect()
}

/// What is asked of a cluster: the namespace, and the selector.
type Question = (Cluster, String, String);

/// Answers that were got ahead, for who must not wait for them.
static AHEAD: Mutex<BTreeMap<Question, Ahead>> = Mutex::new(BTreeMap::new());

type Answer = Result<Vec<Pod>, String>;

struct Ahead {
    answer: Answer,
    /// Why the answer is an older one.
    failure: Option<String>,
}

/// Asks for the pods of these origins, so that `find` need not; until the next time, or with none of them. What was known
/// before is asked again where `is_changed`, and holds where nobody answers any more. Why nobody does is the answer, a line
/// each.
pub(crate) fn ask_ahead(runner: &Runner, asked: &[(Cluster, Origin)], is_changed: bool) -> Vec<String> {
    let mut before = std::mem::take(&mut *AHEAD.lock().unwrap_or_else(PoisonError::into_inner));
    let questions = asked.iter().filter_map(|(cluster, origin)| {
        let (namespace, selector) = origin.question()?;
        Some((cluster.clone(), namespace.to_string(), selector.to_string()))
    });
    let (mut answers, mut started) = (BTreeMap::new(), BTreeMap::new());
    for question in questions.collect::<BTreeSet<Question>>() {
        match before.remove(&question) {
            Some(known) if !is_changed => drop(answers.insert(question, known)),
            known => {
                let (cluster, namespace, selector) = &question;
                let running = kube::ask(runner, cluster, namespace, selector);
                started.insert(question, (running, known));
            }
        }
    }
    for (question, (running, known)) in started {
        let ahead = match (running.and_then(kube::answer), known) {
            (Err(why), Some(Ahead { answer: Ok(known), .. })) => Ahead { answer: Ok(known), failure: Some(why) },
            (answer, _) => Ahead { answer, failure: None },
        };
        answers.insert(question, ahead);
    }
    let failures: BTreeSet<&String> = answers.values().filter_map(|ahead| ahead.failure.as_ref()).collect();
    let failures =
        failures.iter().map(|why| format!("pods are not told any more, those known last are watched: {why}")).collect();
    *AHEAD.lock().unwrap_or_else(PoisonError::into_inner) = answers;
    failures
}

impl Origin {
    /// The namespace and selector that the cluster is asked with; none where it is not asked.
    fn question(&self) -> Option<(&str, &str)> {
        match self {
            Origin::Pod { namespace, .. } => Some((namespace, "")),
            Origin::Pods(Pods { namespace, selector, .. }) => Some((namespace, selector)),
            _ => None,
        }
    }

    pub(crate) fn is_of_cluster(&self) -> bool {
        self.question().is_some()
    }
}

/// The uids among these that have a process by now.
pub(crate) fn started(uids: &[String]) -> bool {
    let processes = Processes::read(Path::new("/proc"), own_inode());
    uids.iter().any(|uid| processes.of_pod(uid).is_some())
}

struct Finder<'a> {
    runner: &'a Runner,
    cluster: &'a Cluster,
    processes: Processes,
    own: u64,
    /// What was asked for already.
    lists: BTreeMap<(String, String), Answer>,
}

impl Finder<'_> {
    fn find(&mut self, origin: &Origin) -> Result<Found, Absent> {
        let label = origin.to_string();
        match origin {
            Origin::Netns(name) => {
                let path = if name.starts_with('/') { PathBuf::from(name) } else { Path::new("/run/netns").join(name) };
                let gone = || format!("there is no network namespace {name}; list them with: ip netns list");
                self.one(label, path, gone)
            }
            Origin::Pid(pid) => {
                let path = PathBuf::from(format!("/proc/{pid}/ns/net"));
                self.one(label, path, || format!("there is no process {pid}; list them with: ps -e"))
            }
            Origin::Container(id) => match self.processes.of_container(id)[..] {
                [] => Err(Absent::Gone(format!("no process is in a container {id}; list them with: crictl ps"))),
                [(_, pid)] => self.one(label, PathBuf::from(format!("/proc/{pid}/ns/net")), || {
                    format!("container {id} has just ended; list them with: crictl ps")
                }),
                _ => Err(Absent::Unfit(format!("container {id} is the beginning of several; give more of the id"))),
            },
            Origin::Pod { namespace, name } => {
                let pods = self.pods(namespace, "").map_err(Absent::Unknown)?;
                let pod = pods.into_iter().find(|pod| pod.name == *name);
                let gone = || {
                    let node = kube::node(self.cluster);
                    Absent::Gone(format!(
                        "there is no pod {name} in {namespace} on node {node}; see: kubectl get pod -n {namespace} {name} -o wide"
                    ))
                };
                let found = self.spaces(&[pod.ok_or_else(gone)?]);
                match found.left_out.first() {
                    Some(why) => Err(Absent::Unfit(why.clone())),
                    None => Ok(found),
                }
            }
            Origin::Pods(Pods { namespace, selector, annotations }) => {
                let pods = self.pods(namespace, selector).map_err(Absent::Unknown)?;
                let has = |pod: &&Pod| annotations.iter().all(|(key, value)| pod.annotations.get(key) == Some(value));
                let pods: Vec<Pod> = pods.iter().filter(has).cloned().collect();
                Ok(self.spaces(&pods))
            }
        }
    }

    fn one(&self, label: String, path: PathBuf, gone: impl Fn() -> String) -> Result<Found, Absent> {
        let inode = cgroup::inode(&path).ok_or_else(|| Absent::Gone(gone()))?;
        if inode == self.own {
            return Err(Absent::Unfit(
                "that is this network namespace itself; name its interfaces alone, as in: snifctl up eth0".into(),
            ));
        }
        Ok(Found { spaces: vec![Space { label, path, inode }], ..Found::default() })
    }

    fn pods(&mut self, namespace: &str, selector: &str) -> Answer {
        let key = (namespace.to_string(), selector.to_string());
        let all = AHEAD.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ahead) = all.get(&(self.cluster.clone(), key.0.clone(), key.1.clone())) {
            return ahead.answer.clone();
        }
        drop(all);
        let (runner, cluster) = (self.runner, self.cluster);
        let ask = || kube::ask(runner, cluster, namespace, selector).and_then(kube::answer);
        self.lists.entry(key).or_insert_with(ask).clone()
    }

    fn spaces(&self, pods: &[Pod]) -> Found {
        let mut found = Found::default();
        for pod in pods.iter().filter(|pod| pod.runs) {
            let name = format!("{}/{}", pod.namespace, pod.name);
            if pod.host_network {
                found.left_out.push(format!(
                    "pod {name} is in its node's network: watch an interface of the node, with a filter by the pod's ports, as \
                     in: snifctl up eth0 --filter 'port 8080'"
                ));
                continue;
            }
            let process = pod.uids.iter().find_map(|uid| self.processes.of_pod(uid));
            let path = process.map(|pid| PathBuf::from(format!("/proc/{pid}/ns/net")));
            let space = path.and_then(|path| Some((cgroup::inode(&path)?, path)));
            match space {
                Some((inode, path)) => found.spaces.push(Space { label: format!("pod:{name}"), path, inode }),
                None => found.pending.extend(pod.uids.clone()),
            }
        }
        found
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
