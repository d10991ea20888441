//! What `kubectl` tells of pods.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use super::Cluster;
use crate::tools::exec::{Cmd, Runner, Running};
use crate::tools::requirements;

/// A pod of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pod {
    pub namespace: String,
    pub name: String,
    /// What its cgroups can be named after: its uid, and of a static pod the hash of its file.
    pub uids: Vec<String>,
    pub annotations: BTreeMap<String, String>,
    pub host_network: bool,
    /// It has not ended.
    pub runs: bool,
}

/// What kubectl needs of our environment: how to find its cluster, and what helps it to log in.
const ENVIRONMENT: [&str; 9] = [
    "KUBERNETES_SERVICE_HOST",
    "KUBERNETES_SERVICE_PORT",
    "KUBECONFIG",
    "HOME",
    "PATH",
    "HTTPS_PROXY",
    "https_proxy",
    "NO_PROXY",
    "no_proxy",
];

/// So long an API server may take to answer, in kubectl's words.
const PATIENCE: &str = "--request-timeout=5s";

/// So long kubectl may take in all, which asks again where nobody answers.
const LONGEST: Duration = Duration::from_secs(10);

/// The name of this node.
pub(super) fn node(cluster: &Cluster) -> String {
    let named = cluster.node.clone().or_else(|| std::env::var("NODE_NAME").ok().filter(|name| !name.is_empty()));
    named.unwrap_or_else(|| {
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        name.trim().to_lowercase()
    })
}

fn kubectl(cluster: &Cluster, words: &[&str]) -> Cmd {
    let mut all: Vec<String> = Vec::new();
    let flags = [("--kubeconfig", &cluster.kubeconfig), ("--context", &cluster.context)];
    all.extend(flags.iter().filter_map(|(flag, value)| Some(format!("{flag}={}", value.as_ref()?))));
    all.extend(words.iter().map(|word| word.to_string()));
    Cmd::new("kubectl", all).environment(&ENVIRONMENT)
}

fn of_node(cluster: &Cluster) -> String {
    format!("--field-selector=spec.nodeName={}", node(cluster))
}

/// Asks for the pods of a namespace on this node, or of all with `*`, that have these labels.
pub(super) fn ask(runner: &Runner, cluster: &Cluster, namespace: &str, selector: &str) -> Result<Running, String> {
    requirements::ensure_there(&requirements::KUBECTL).map_err(|err| format!("{err:#}"))?;
    let (node, selector) = (of_node(cluster), format!("--selector={selector}"));
    let namespace = if namespace == "*" { "--all-namespaces".into() } else { format!("--namespace={namespace}") };
    let mut words = vec!["get", "pods", "--output=json", PATIENCE, &node, &namespace];
    words.extend((selector != "--selector=").then_some(selector.as_str()));
    runner.start(&kubectl(cluster, &words).patience(LONGEST)).map_err(|err| format!("{err:#}"))
}

/// What it answers.
pub(super) fn answer(running: Running) -> Result<Vec<Pod>, String> {
    let text = running.wait().map_err(|err| format!("{err:#}"))?;
    let list: Value = serde_json::from_slice(&text).map_err(|err| format!("kubectl answered no JSON ({err})"))?;
    let items = list["items"].as_array().ok_or("kubectl answered no list of pods")?;
    Ok(items.iter().filter_map(pod).collect())
}

/// What tells of every change of pods on this node, a line each.
pub(crate) fn watch_command(cluster: &Cluster) -> Cmd {
    let node = of_node(cluster);
    kubectl(cluster, &["get", "pods", "--all-namespaces", "--watch", "--output-watch-events", "--output=name", &node])
}

/// Leniently: a pod without a name or uid is none of ours.
pub(super) fn pod(item: &Value) -> Option<Pod> {
    let (meta, spec) = (&item["metadata"], &item["spec"]);
    let text = |value: &Value| value.as_str().map(String::from);
    let annotations: BTreeMap<String, String> = match meta["annotations"].as_object() {
        Some(all) => all.iter().filter_map(|(key, value)| Some((key.clone(), text(value)?))).collect(),
        None => BTreeMap::new(),
    };
    let hash = annotations.get("kubernetes.io/config.hash").cloned();
    Some(Pod {
        namespace: text(&meta["namespace"])?,
        name: text(&meta["name"])?,
        uids: text(&meta["uid"]).into_iter().chain(hash).collect(),
        annotations,
        host_network: spec["hostNetwork"].as_bool().unwrap_or(false),
        runs: !matches!(item["status"]["phase"].as_str(), Some("Succeeded" | "Failed")),
    })
}
