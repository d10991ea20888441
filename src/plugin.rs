//! `kubectl snif`: the same binary under the name `kubectl-snif`, for whoever has a cluster with snifctl on its nodes. A tap is
//! a file in the ConfigMap that every node's `watch --apply` follows; what nodes say comes by `kubectl exec`. All is asked of
//! `kubectl`, by labels, so that it finds what helm or kustomize have made under any name.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use indoc::indoc;
use serde_json::{Map, Value, json};

use crate::cli::{self, ElsewhereArgs};
use crate::file::{self, Text};
use crate::output::{json as out, text};
use crate::request::{self, ClusterOptions, DEFAULT, Named, Options, Request, Watch};
use crate::tools::exec::{Cmd, Runner, print};
use crate::usage::{Usage, ensure_usage, refuse};

/// The name of the binary, and the word that stands for it where there is no link of that name.
const NAME: &str = "kubectl-snif";
/// The labels of what belongs to an installation, and of its parts.
const LABEL: &str = "app.kubernetes.io/name=snifctl";
const SESSIONS: &str = "app.kubernetes.io/component=sessions";
const AGENT: &str = "app.kubernetes.io/component=agent";
/// The DaemonSet's container, and where its watch writes that it is at work.
const CONTAINER: &str = "snifctl";
const HEARTBEAT: &str = "/run/snifctl/heartbeat";
/// So many nodes are asked at once.
const AT_ONCE: usize = 16;
/// So long an API server may take, a node to tell, and a node to take down.
const PATIENCE: Duration = Duration::from_secs(30);
const LONGEST: Duration = Duration::from_secs(180);

/// What kubectl, and the programs by which it logs in at a provider, see of our environment.
const ENVIRONMENT: [&str; 25] = [
    "HOME",
    "PATH",
    "USER",
    "XDG_CACHE_HOME",
    "KUBECONFIG",
    "KUBERNETES_SERVICE_HOST",
    "KUBERNETES_SERVICE_PORT",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AZURE_CONFIG_DIR",
    "CLOUDSDK_CONFIG",
    "CLOUDSDK_ACTIVE_CONFIG_NAME",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
];

/// Copy every packet of a cluster's pods into a tunnel, by snifctl on every node
#[derive(Debug, Parser)]
#[command(name = NAME, bin_name = "kubectl snif", version, propagate_version = true, disable_help_subcommand = true,
    after_help = indoc! {"
    Examples:
      kubectl snif tap -n shop -l app=web --tunnel vxlan --id 7 --remote 10.0.0.7
      kubectl snif status
      kubectl snif untap
"})]
pub(crate) struct Plugin {
    /// Print each outer command on stderr as it runs
    #[arg(short, long, global = true, display_order = 900)]
    verbose: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Copy the packets of pods, on whichever node they run
    #[command(after_help = indoc! {"
        Examples:
          kubectl snif tap -n shop -l app=web --remote 10.0.0.7
          kubectl snif tap -n shop -l app=web --remote 10.0.0.7 --tunnel gre --name web
          kubectl snif tap -A -l mirror=yes eth0:ingress --remote 10.0.0.7
    "})]
    Tap(Box<TapArgs>),
    /// Copy no more what a tap has asked for
    #[command(after_help = "Examples:\n  kubectl snif untap\n  kubectl snif untap --name web")]
    Untap {
        /// Name of its session
        #[arg(long, value_name = "NAME", default_value = DEFAULT, value_parser = request::name_option)]
        name: String,
        #[command(flatten)]
        reach: Reach,
        #[command(flatten)]
        which: Installation,
    },
    /// Show what every node copies
    #[command(after_help = "Examples:\n  kubectl snif status\n  kubectl snif status --json")]
    Status {
        /// Print JSON: each node with its `snifctl status --json`
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        reach: Reach,
        #[command(flatten)]
        which: Installation,
    },
    /// Take all mirrors down on every node, before snifctl is uninstalled: until their pods are new, nodes make none
    #[command(after_help = "Examples:\n  kubectl snif down\n  kubectl snif down --system snifctl --release snifctl")]
    Down {
        #[command(flatten)]
        reach: Reach,
        #[command(flatten)]
        which: Installation,
    },
}

/// How kubectl finds the cluster.
#[derive(Clone, Debug, Args)]
struct Reach {
    /// The file that tells kubectl of its cluster [default: kubectl's own]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<String>,
    /// Which context of that file
    #[arg(long, value_name = "CONTEXT")]
    context: Option<String>,
}

/// Which installation of snifctl is meant, where a cluster has several.
#[derive(Clone, Debug, Args)]
struct Installation {
    /// The namespace that snifctl is installed in [default: the one where it is]
    #[arg(long, value_name = "NAMESPACE")]
    system: Option<String>,
    /// The name of helm's release
    #[arg(long, value_name = "NAME")]
    release: Option<String>,
}

#[derive(Debug, Args)]
struct TapArgs {
    /// Interfaces of the pods, or patterns of names, each with a direction if it is not to be both [default: all but lo]
    #[arg(value_name = "IFACE[:DIRECTION]")]
    interfaces: Vec<Named>,
    /// The namespace of the pods [default: the one that kubectl is in]
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// Pods of every namespace
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    all_namespaces: bool,
    /// The labels of the pods: app=web,tier!=test
    #[arg(short = 'l', long, value_name = "SELECTOR")]
    selector: String,
    /// Watch the node's end of each pair instead, where there is one
    #[arg(long)]
    host_side: bool,
    #[command(flatten)]
    options: Options,
    /// Name of the session: 1 to 15 characters of a-z, 0-9 and '-'
    #[arg(long, value_name = "NAME", default_value = DEFAULT, value_parser = request::name_option)]
    name: String,
    /// Which packets to copy of interfaces that name no direction
    #[arg(long, value_enum, default_value_t = Watch::Both)]
    direction: Watch,
    /// Change a tap that is there
    #[arg(long)]
    replace: bool,
    /// Print the file that each node would get, and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    which: Installation,
}

/// The words after our name, if we were called as the plugin.
pub(crate) fn words(all: impl IntoIterator<Item = OsString>) -> Option<Vec<OsString>> {
    let mut words: Vec<OsString> = all.into_iter().collect();
    if Path::new(words.first()?).file_name() == Some(OsStr::new(NAME)) {
        return Some(words);
    }
    (words.get(1)? == NAME).then(|| words.split_off(1))
}

pub(crate) fn parse(words: Vec<OsString>) -> Result<Plugin, ExitCode> {
    let verb = words.get(1).and_then(|word| word.to_str()).filter(|word| !word.starts_with('-')).map(String::from);
    // The tunnel without options of its own.
    let command = Plugin::command()
        .mut_subcommand("tap", |tap| tap.mut_arg("kind", |arg| arg.required(false).default_value("gre")));
    let parsed = command.try_get_matches_from(words).and_then(|matches| Plugin::from_arg_matches(&matches));
    cli::told(parsed, || {
        let known = ["tap", "untap", "status", "down"].into_iter().find(|known| verb.as_deref() == Some(known));
        format!("kubectl snif {}--help", known.map(|known| format!("{known} ")).unwrap_or_default())
    })
}

pub(crate) fn run(plugin: Plugin) -> Result<ExitCode> {
    let runner = Runner { dry_run: false, verbose: plugin.verbose };
    match plugin.verb {
        Verb::Tap(args) => tap(runner, *args),
        Verb::Untap { name, reach, which } => untap(&Cluster { runner, reach, which }, &name),
        Verb::Status { json, reach, which } => status(&Cluster { runner, reach, which }, json),
        Verb::Down { reach, which } => down(&Cluster { runner, reach, which }),
    }
}

// ---- the cluster ----

/// A cluster, asked by kubectl.
struct Cluster {
    runner: Runner,
    reach: Reach,
    which: Installation,
}

/// The ConfigMap that every node follows.
struct Sessions {
    namespace: String,
    name: String,
    files: Map<String, Value>,
}

/// A pod of the DaemonSet.
#[derive(Clone)]
struct Agent {
    node: String,
    namespace: String,
    pod: String,
    phase: String,
}

impl Cluster {
    fn kubectl(&self, words: &[&str]) -> Cmd {
        let flags = [("--kubeconfig", &self.reach.kubeconfig), ("--context", &self.reach.context)];
        let flags = flags.iter().filter_map(|(flag, value)| Some(format!("{flag}={}", value.as_ref()?)));
        let all: Vec<String> = flags.chain(words.iter().map(|word| word.to_string())).collect();
        Cmd::new("kubectl", all).environment(&ENVIRONMENT).patience(PATIENCE)
    }

    fn json(&self, words: &[&str]) -> Result<Value> {
        let text = self.runner.read(&self.kubectl(&[words, &["--output=json"]].concat()))?;
        serde_json::from_str(&text).context("kubectl answered no JSON")
    }

    /// Objects of an installation.
    fn parts(&self, kind: &str, component: &str) -> Result<Vec<Value>> {
        let release = self.which.release.as_ref().map(|name| format!(",app.kubernetes.io/instance={name}"));
        let labels = format!("--selector={LABEL},{component}{}", release.unwrap_or_default());
        let place = self.which.system.as_ref().map(|name| format!("--namespace={name}"));
        let found = self.json(&["get", kind, &labels, place.as_deref().unwrap_or("--all-namespaces")])?;
        Ok(found["items"].as_array().cloned().unwrap_or_default())
    }

    fn sessions(&self) -> Result<Sessions> {
        let found = self.parts("configmaps", SESSIONS)?;
        let places: Vec<String> = found.iter().map(|item| text_of(&item["metadata"]["namespace"])).collect();
        let [item] = &found[..] else {
            ensure!(
                !found.is_empty(),
                "no ConfigMap has the labels {LABEL},{SESSIONS}: snifctl is not installed there; try: helm install snifctl \
                 deploy/helm/snifctl --namespace snifctl --create-namespace"
            );
            bail!("snifctl is installed more than once, in {}; try: --system {}", places.join(", "), places[0]);
        };
        let files = item["data"].as_object().cloned().unwrap_or_default();
        Ok(Sessions { namespace: places[0].clone(), name: text_of(&item["metadata"]["name"]), files })
    }

    /// Puts a file into the ConfigMap, or takes it out; the other files are not touched.
    fn write(&self, sessions: &Sessions, file: &str, text: Option<&str>) -> Result<()> {
        let patch = json!({ "data": { file: text } }).to_string();
        let (name, namespace) = (&sessions.name, format!("--namespace={}", sessions.namespace));
        let words = ["patch", "configmap", name, &namespace, "--type=merge", "--patch", &patch];
        self.runner.read(&self.kubectl(&words)).map(drop)
    }

    fn agents(&self) -> Result<Vec<Agent>> {
        let agent = |item: Value| Agent {
            node: text_of(&item["spec"]["nodeName"]),
            namespace: text_of(&item["metadata"]["namespace"]),
            pod: text_of(&item["metadata"]["name"]),
            phase: text_of(&item["status"]["phase"]),
        };
        let mut found: Vec<Agent> = self.parts("pods", AGENT)?.into_iter().map(agent).collect();
        found.sort_by(|one, other| (&one.node, &one.pod).cmp(&(&other.node, &other.pod)));
        Ok(found)
    }

    /// What a command says in each of these pods.
    fn in_each(&self, agents: &[Agent], words: &[&str], patience: Duration) -> Vec<Result<String>> {
        let ask = |agent: &Agent| {
            ensure!(agent.phase == "Running", "its pod {} is {}", agent.pod, agent.phase);
            let namespace = format!("--namespace={}", agent.namespace);
            let exec = ["exec", &agent.pod, &namespace, "--container", CONTAINER, "--", "snifctl"];
            self.runner.start(&self.kubectl(&[&exec, words].concat()).patience(patience))
        };
        let some = |agents: &[Agent]| {
            let running: Vec<_> = agents.iter().map(ask).collect();
            let end = |at: Result<crate::tools::exec::Running>| {
                at.and_then(|at| at.wait()).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            };
            running.into_iter().map(end).collect::<Vec<_>>()
        };
        agents.chunks(AT_ONCE).flat_map(some).collect()
    }

    /// The namespace that kubectl is in.
    fn own_namespace(&self) -> Result<String> {
        let config = self.json(&["config", "view", "--minify"])?;
        let named = text_of(&config["contexts"][0]["context"]["namespace"]);
        Ok(if named.is_empty() { "default".into() } else { named })
    }
}

fn text_of(value: &Value) -> String {
    value.as_str().unwrap_or_default().into()
}

// ---- what is asked for ----

/// The file of a tap's session.
fn file_of(name: &str) -> String {
    format!("tap-{name}.toml")
}

fn tap(runner: Runner, args: TapArgs) -> Result<ExitCode> {
    let mut options = args.options;
    // They say how we reach the cluster; a node has its own way.
    let ClusterOptions { kubeconfig, context, node } = std::mem::take(&mut options.cluster);
    ensure_usage!(node.is_none(), "--node is not for the plugin: a tap is on every node; leave it out");
    let cluster = Cluster { runner, reach: Reach { kubeconfig, context }, which: args.which };
    let namespace = match (args.namespace, args.all_namespaces) {
        (Some(namespace), _) => namespace,
        (None, true) => "*".into(),
        (None, false) => cluster.own_namespace()?,
    };
    ensure_usage!(!args.selector.is_empty(), "--selector is empty, which would be every pod; try: --selector app=web");
    let pods = ElsewhereArgs::of_pods(namespace, args.selector, args.host_side);
    let request = Request::new(args.name.clone(), pods.named(&args.interfaces)?, args.direction, options)?;
    let text = file::shown(&request);
    if args.dry_run {
        print(&text)?;
        return Ok(ExitCode::SUCCESS);
    }
    let sessions = cluster.sessions()?;
    let file = file_of(&args.name);
    let before = sessions.files.get(&file).map(text_of);
    if before.as_deref() == Some(text.as_str()) {
        eprintln!("snifctl: there is such a tap already; nothing to do");
        return Ok(ExitCode::SUCCESS);
    }
    if before.is_some() && !args.replace {
        refuse!("--name {} is a tap already; try: --name other, or --replace", args.name);
    }
    ensure_fits(&sessions, &file, &text)?;
    cluster.write(&sessions, &file, Some(&text))?;
    told(&sessions);
    Ok(ExitCode::SUCCESS)
}

/// Can nodes read all files together, with this one?
fn ensure_fits(sessions: &Sessions, file: &str, text: &str) -> Result<()> {
    let others = sessions.files.iter().filter(|(name, _)| name.as_str() != file && name.ends_with(".toml"));
    let others = others.map(|(name, text)| Text { name: name.clone(), text: text_of(text) });
    let all: Vec<Text> = others.chain([Text { name: file.into(), text: text.into() }]).collect();
    file::parse(&all).map(drop).map_err(|mistakes| Usage::from(mistakes).into())
}

/// When a change arrives.
fn told(sessions: &Sessions) {
    eprintln!(
        "snifctl: configmap {}/{} is changed; nodes follow as soon as kubelet has brought it to them, mostly within a minute; \
         see: kubectl snif status",
        sessions.namespace, sessions.name
    );
}

fn untap(cluster: &Cluster, name: &str) -> Result<ExitCode> {
    let sessions = cluster.sessions()?;
    let file = file_of(name);
    if !sessions.files.contains_key(&file) {
        let names = |file: &String| Some(file.strip_prefix("tap-")?.strip_suffix(".toml")?.to_string());
        let others: Vec<String> = sessions.files.keys().filter_map(names).collect();
        let others =
            if others.is_empty() { "there is none".into() } else { format!("there are: {}", others.join(", ")) };
        eprintln!("snifctl: no tap is called {name}; {others}");
        return Ok(ExitCode::SUCCESS);
    }
    cluster.write(&sessions, &file, None)?;
    told(&sessions);
    Ok(ExitCode::SUCCESS)
}

fn status(cluster: &Cluster, as_json: bool) -> Result<ExitCode> {
    let agents = cluster.agents()?;
    let answers = cluster.in_each(&agents, &["status", "--json"], PATIENCE);
    let read = |answer: Result<String>| -> Result<Vec<Value>> {
        let value: Value = serde_json::from_str(&answer?).context("its snifctl answered no JSON")?;
        Ok(value["sessions"].as_array().cloned().unwrap_or_default())
    };
    let nodes: Vec<(&Agent, Result<Vec<Value>>)> = agents.iter().zip(answers.into_iter().map(read)).collect();
    let has_failed = nodes.iter().any(|(_, answer)| answer.is_err());
    match as_json {
        true => {
            let node = |(agent, answer): &(&Agent, Result<Vec<Value>>)| {
                let mut node = json!({ "node": agent.node, "pod": agent.pod });
                match answer {
                    Ok(sessions) => node["sessions"] = json!(sessions),
                    Err(err) => node["error"] = format!("{err:#}").into(),
                }
                node
            };
            out::print(&json!({ "nodes": nodes.iter().map(node).collect::<Vec<_>>() }))?;
        }
        false if nodes.is_empty() => print("no node has a pod of snifctl\n")?,
        false => print(&text::table(&rows(&nodes), &[2, 3, 4, 5]))?,
    }
    Ok(if has_failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// A row for each session of each node.
fn rows(nodes: &[(&Agent, Result<Vec<Value>>)]) -> Vec<Vec<String>> {
    let mut rows =
        vec![["node", "session", "taps", "remotes", "copied", "dropped", "state"].map(String::from).to_vec()];
    for (agent, answer) in nodes {
        let node = if agent.node.is_empty() { &agent.pod } else { &agent.node };
        let empty = |state: String| {
            let dash = || "-".to_string();
            vec![node.clone(), dash(), dash(), dash(), dash(), dash(), state]
        };
        match answer {
            Err(err) => rows.push(empty(format!("{err:#}"))),
            Ok(sessions) if sessions.is_empty() => rows.push(empty("no session is up".into())),
            Ok(sessions) => rows.extend(sessions.iter().map(|session| row(node, session))),
        }
    }
    rows
}

fn row(node: &str, session: &Value) -> Vec<String> {
    let list = |key: &str| session[key].as_array().cloned().unwrap_or_default();
    let sum = |key: &str| -> u64 { list(key).iter().filter_map(|one| one["stat"]["pcnt"].as_u64()).sum() };
    let drops = session["drops"].as_object().cloned().unwrap_or_default();
    let dropped: u64 = drops.values().filter_map(Value::as_u64).sum();
    let mut faults: Vec<String> = list("faults").iter().map(text_of).collect();
    let is_down = |remote: &&Value| !matches!(remote["state"].as_str(), Some("ok") | None);
    let remotes = list("remotes");
    faults.extend(
        remotes
            .iter()
            .filter(is_down)
            .map(|at| format!("remote {}: {}", text_of(&at["address"]), text_of(&at["state"]))),
    );
    let state = match &faults[..] {
        [] => "ok".into(),
        [one] => one.clone(),
        [first, others @ ..] => format!("{first}; and {} more", others.len()),
    };
    let copied = sum("remotes") + session["removed"]["pcnt"].as_u64().unwrap_or(0);
    let numbers = [list("taps").len() as u64, remotes.len() as u64, copied, dropped];
    let front = [node.to_string(), text_of(&session["name"])];
    front.into_iter().chain(numbers.map(|n| n.to_string())).chain([state]).collect()
}

/// First every watch rests, so that none makes again what is taken down.
fn down(cluster: &Cluster) -> Result<ExitCode> {
    let agents = cluster.agents()?;
    let mut has_failed = false;
    let held = cluster.in_each(&agents, &["watch", "--hold", HEARTBEAT], LONGEST);
    let mut left = Vec::new();
    let mut fails = |agent: &Agent, err: anyhow::Error| {
        eprintln!("snifctl: {}: {err:#}", agent.node);
        has_failed = true;
    };
    for (agent, answer) in agents.iter().zip(held) {
        match answer {
            Ok(_) => left.push(agent.clone()),
            Err(err) => fails(agent, err),
        }
    }
    let taken = cluster.in_each(&left, &["down", "--all"], LONGEST);
    for (agent, answer) in left.iter().zip(taken) {
        match answer {
            Ok(_) => print(&format!("{}: no mirror is left\n", agent.node))?,
            Err(err) => fails(agent, err),
        }
    }
    ensure!(!has_failed, "nodes are left as they are; once they answer, try: kubectl snif down");
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plugin_is_known_by_its_name_or_first_word() {
        let called = |line: &str| words(line.split(' ').map(OsString::from)).map(|words| words.len());
        assert_eq!(called("/usr/bin/kubectl-snif status"), Some(2));
        assert_eq!(called("/usr/bin/snifctl kubectl-snif status --json"), Some(3));
        assert_eq!(called("snifctl status"), None);
        assert_eq!(called("snifctl"), None);
    }

    #[test]
    fn clap_finds_no_fault_and_every_verb_has_examples() {
        Plugin::command().debug_assert();
        for verb in Plugin::command().get_subcommands() {
            let examples = verb.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(examples.starts_with("Examples:"), "{}", verb.get_name());
        }
    }

    #[test]
    fn a_row_adds_up_a_session() {
        let session = json!({"name": "web", "taps": [{}, {}], "drops": {"rate": 2, "route": 3}, "faults": ["tap a: b"],
            "removed": {"pcnt": 5}, "remotes": [{"address": "10.0.0.7", "state": "down", "stat": {"pcnt": 7}}]});
        let row = row("node-1", &session).join(" ");
        assert_eq!(row, "node-1 web 2 1 12 5 tap a: b; and 1 more");
    }
}
