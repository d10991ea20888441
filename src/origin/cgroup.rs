//! Which pod and which container a process belongs to: as its cgroups say it, which every runtime names after them.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Processes by pod and by container: of each the one that has begun first, as that holds the network namespace.
#[derive(Debug, Default)]
pub(super) struct Processes {
    pods: BTreeMap<String, (u64, u32)>,
    containers: BTreeMap<String, (u64, u32)>,
}

/// The inode of a network namespace; none where it is gone.
pub(super) fn inode(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|meta| meta.ino())
}

impl Processes {
    /// `proc`: where procfs is mounted. What ends meanwhile is passed over, and so is one that has ended and was not waited
    /// for, which has no namespace any more.
    pub(super) fn read(proc: &Path) -> Processes {
        let mut processes = Processes::default();
        for entry in fs::read_dir(proc).into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            let Ok(text) = fs::read_to_string(entry.path().join("cgroup")) else { continue };
            let Place { pod, container } = Place::of(&text);
            if (pod.is_none() && container.is_none()) || inode(&entry.path().join("ns/net")).is_none() {
                continue;
            }
            let begun = begun(&entry.path()).unwrap_or(u64::MAX);
            let mut first = |map: fn(&mut Processes) -> &mut BTreeMap<String, (u64, u32)>, key: Option<String>| {
                let Some(key) = key else { return };
                let at = map(&mut processes).entry(key).or_insert((begun, pid));
                *at = (*at).min((begun, pid));
            };
            first(|processes| &mut processes.pods, pod);
            first(|processes| &mut processes.containers, container);
        }
        processes
    }

    /// A process of the pod with this uid.
    pub(super) fn of_pod(&self, uid: &str) -> Option<u32> {
        self.pods.get(uid).map(|(_, pid)| *pid)
    }

    /// The containers whose ids begin so, each with a process.
    pub(super) fn of_container(&self, id: &str) -> Vec<(&str, u32)> {
        let found = self.containers.range(id.to_string()..).take_while(|(key, _)| key.starts_with(id));
        found.map(|(key, (_, pid))| (key.as_str(), *pid)).collect()
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
    /// The id of its container.
    pub container: Option<String>,
}

impl Place {
    /// From the lines of /proc/PID/cgroup, `HIERARCHY:CONTROLLERS:PATH`, of either version. Runtimes name a container's cgroup
    /// after its id, systemd's with a prefix and `.scope`; kubelet names a pod's after its uid, systemd's with `_` for `-`.
    pub(super) fn of(text: &str) -> Place {
        let mut place = Place::default();
        for path in text.lines().filter_map(|line| line.splitn(3, ':').nth(2)) {
            let mut in_pods = false;
            for part in path.split(['/', ':']) {
                in_pods |= part.contains("kubepods");
                if let Some(uid) = pod(part).filter(|_| in_pods) {
                    place.pod.get_or_insert(uid);
                } else if let Some(id) = container(part) {
                    place.container = place.container.or(Some(id));
                }
            }
            if place.pod.is_some() || place.container.is_some() {
                break;
            }
        }
        place
    }
}

/// The uid in `pod2b5f…`, or in `kubepods-burstable-pod2b5f_….slice`.
fn pod(part: &str) -> Option<String> {
    let name = part.strip_suffix(".slice").unwrap_or(part);
    let uid = name.strip_prefix("pod").or_else(|| name.rsplit_once("-pod").map(|(_, uid)| uid))?;
    let is_uid = uid.len() >= 8 && uid.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-' || byte == b'_');
    is_uid.then(|| uid.replace('_', "-"))
}

/// The id in `3f2a…`, `docker-3f2a….scope`, `cri-containerd-3f2a….scope`, `crio-3f2a…`, `libpod-3f2a….scope`. The monitor of
/// a container, whose cgroup is named like it, is none of its processes.
fn container(part: &str) -> Option<String> {
    let name = part.strip_suffix(".scope").unwrap_or(part);
    let id = name.rsplit_once('-').map_or(name, |(_, id)| id);
    let is_id = id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    (is_id && !name.contains("conmon")).then(|| id.to_string())
}
