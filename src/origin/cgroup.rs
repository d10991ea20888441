//! Which pod and which container a process belongs to: as its cgroups say it, which every runtime names after them.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Processes by pod and by container: of each the one to go by.
#[derive(Debug, Default)]
pub(super) struct Processes {
    pods: BTreeMap<String, Process>,
    containers: BTreeMap<String, Process>,
}

/// The least is the one that holds the network namespace of its pod or container. One in our own network namespace is the
/// last to count: a runtime's process joins the cgroup first, and the namespace then. What runs in a container of its own
/// inside has a cgroup further down. The first that has begun has made the namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Process {
    is_ours: bool,
    depth: usize,
    begun: u64,
    pid: u32,
}

/// The inode of a network namespace; none where it is gone.
pub(super) fn inode(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|meta| meta.ino())
}

impl Processes {
    /// `proc`: where procfs is mounted; `own`: our own network namespace. What ends meanwhile is passed over, and so is one
    /// that has ended and was not waited for, which has no namespace any more.
    pub(super) fn read(proc: &Path, own: u64) -> Processes {
        let mut processes = Processes::default();
        for entry in fs::read_dir(proc).into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            let Ok(text) = fs::read_to_string(entry.path().join("cgroup")) else { continue };
            let Place { pod, containers, depth } = Place::of(&text);
            if pod.is_none() && containers.is_empty() {
                continue;
            }
            let Some(inode) = inode(&entry.path().join("ns/net")) else { continue };
            let begun = begun(&entry.path()).unwrap_or(u64::MAX);
            let process = Process { is_ours: inode == own, depth, begun, pid };
            let least = |of: &mut BTreeMap<String, Process>, key: String| {
                let at = of.entry(key).or_insert(process);
                *at = (*at).min(process);
            };
            pod.into_iter().for_each(|pod| least(&mut processes.pods, pod));
            containers.into_iter().for_each(|container| least(&mut processes.containers, container));
        }
        processes
    }

    /// A process of the pod with this uid, in a network namespace other than ours.
    pub(super) fn of_pod(&self, uid: &str) -> Option<u32> {
        self.pods.get(uid).filter(|process| !process.is_ours).map(|process| process.pid)
    }

    /// The containers whose ids begin so, each with a process.
    pub(super) fn of_container(&self, id: &str) -> Vec<(&str, u32)> {
        let found = self.containers.range(id.to_string()..).take_while(|(key, _)| key.starts_with(id));
        found.map(|(key, process)| (key.as_str(), process.pid)).collect()
    }
}

/// When a process has begun, in ticks since boot: the 22nd field of its `stat` (proc(5)).
fn begun(process: &Path) -> Option<u64> {
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    stat.rsplit(") ").next()?.split(' ').nth(19)?.parse().ok()
}

/// Where a process is.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Place {
    /// The uid of its pod.
    pub pod: Option<String>,
    /// The ids of its container, and of those around it.
    pub containers: Vec<String>,
    /// How many parts its cgroup's path has.
    pub depth: usize,
}

impl Place {
    /// From the lines of /proc/PID/cgroup, `HIERARCHY:CONTROLLERS:PATH`, of either version. Runtimes name a container's cgroup
    /// after its id, systemd's with a prefix and `.scope`; kubelet names a pod's after its uid, systemd's with `_` for `-`.
    /// The monitor of a container, whose cgroup is named like it, has nothing to do with its network. Names below
    /// `user.slice` count for nothing: users give them to cgroups as they like.
    pub(super) fn of(text: &str) -> Place {
        let paths = text.lines().filter_map(|line| line.splitn(3, ':').nth(2)).filter(|path| !path.contains("conmon"));
        let places = paths.map(|path| {
            let mut place = Place::default();
            // Who has a cgroup namespace of its own, as a container has, does not see the parts that both have.
            let mut in_pods = path.starts_with("/..");
            let mut is_users = false;
            for part in path.split(['/', ':']).filter(|part| !part.is_empty()) {
                place.depth += 1;
                is_users |= part == "user.slice";
                if is_users {
                    continue;
                }
                in_pods |= part.contains("kubepods");
                if let Some(uid) = pod(part).filter(|_| in_pods) {
                    place.pod.get_or_insert(uid);
                } else {
                    place.containers.extend(container(part));
                }
            }
            place
        });
        places.into_iter().find(|place| place.pod.is_some() || !place.containers.is_empty()).unwrap_or_default()
    }
}

/// The uid in `pod2b5f…`, or in `kubepods-burstable-pod2b5f_….slice`.
fn pod(part: &str) -> Option<String> {
    let name = part.strip_suffix(".slice").unwrap_or(part);
    let uid = name.strip_prefix("pod").or_else(|| name.rsplit_once("-pod").map(|(_, uid)| uid))?;
    let is_uid = uid.len() >= 8 && uid.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-' || byte == b'_');
    is_uid.then(|| uid.replace('_', "-"))
}

/// The id in `3f2a…`, `docker-3f2a….scope`, `cri-containerd-3f2a….scope`, `crio-3f2a…`, `libpod-3f2a….scope`.
fn container(part: &str) -> Option<String> {
    let name = part.strip_suffix(".scope").unwrap_or(part);
    let id = name.rsplit_once('-').map_or(name, |(_, id)| id);
    let is_id = id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_id.then(|| id.to_string())
}
