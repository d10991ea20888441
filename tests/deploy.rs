//! What deploy/ gives to a cluster: chart and kustomization, valid and no more privileged than they must be; and `kubectl
//! snif` against an API server and a node in small. Not part of `cargo test`: `make test-deploy` brings helm and more first.
//! No kubelet is to be had: `kubectl exec` runs in the lab, by a stand-in before the real kubectl, and the test itself writes
//! the ConfigMap's files, as kubelet does.

mod lab;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use lab::cluster::{Cluster, Driver, Process, Told};
use lab::judge::Said;
use lab::watcher::{SOON, Watcher};
use lab::{Lab, poll};
use serde_json::{Value, json};

const SNIFCTL: &str = env!("CARGO_BIN_EXE_snifctl");

fn place(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn tool(name: &str) -> PathBuf {
    let path = place("target/deploy").join(name);
    assert!(path.exists(), "{} is not there; try: make test-deploy", path.display());
    path
}

/// Runs a program with something on its standard input.
fn fed(command: &mut Command, input: &str) -> Output {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    let (mut stdin, input) = (child.stdin.take().expect("a pipe"), input.to_string());
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().expect("ends");
    writer.join().expect("written").expect("written");
    output
}

#[track_caller]
fn succeed(command: &mut Command, input: &str) -> String {
    let out = fed(command, input);
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{command:?}: {}\n{stdout}\n{stderr}", out.status);
    stdout.into_owned()
}

fn helm(args: &[&str], values: &Value) -> Command {
    let mut command = Command::new(tool("bin/helm"));
    // Values are YAML, of which JSON is a part.
    let file = tempfile::Builder::new().suffix(".json").tempfile().expect("a file");
    fs::write(file.path(), values.to_string()).expect("write values");
    let (_, path) = file.keep().expect("keep it");
    command.args(args).arg("--values").arg(path).env("HOME", "/nonexistent").env_remove("KUBECONFIG");
    command
}

fn template(values: &Value, version: &str) -> Command {
    let chart = place("deploy/helm/snifctl").display().to_string();
    helm(&["template", "snifctl", &chart, "--namespace", "snifctl", "--kube-version", &format!("{version}.0")], values)
}

/// The objects of a YAML stream.
#[track_caller]
fn objects(yaml: &str) -> Vec<Value> {
    let script = "import json, sys, yaml; json.dump([one for one in yaml.safe_load_all(sys.stdin) if one], sys.stdout)";
    let text = succeed(Command::new(tool("venv/bin/python")).args(["-c", script]), yaml);
    serde_json::from_str(&text).expect("JSON")
}

/// Objects of the Prometheus operator by its schemas, all others by Kubernetes' own.
#[track_caller]
fn assert_valid(yaml: &str, version: &str) {
    let (theirs, ours): (Vec<Value>, Vec<Value>) =
        objects(yaml).into_iter().partition(|at| at["apiVersion"] == "monitoring.coreos.com/v1");
    for at in &theirs {
        let out = by_schema(at);
        assert!(out.status.success(), "{at:#}\n{}", String::from_utf8_lossy(&out.stderr));
    }
    let yaml = ours.iter().map(|at| format!("---\n{at}\n")).collect::<String>();
    let yaml = yaml.as_str();
    let mut validate = Command::new(tool("venv/bin/kubernetes-validate"));
    succeed(validate.args(["--strict", "--quiet", "-k", version, "/dev/stdin"]), yaml);
}

/// Looks at a custom resource with its CRD's schema: tests/deploy/crds.
fn by_schema(at: &Value) -> Output {
    let script =
        "import json, sys, jsonschema; jsonschema.validate(json.load(sys.stdin), json.load(open(sys.argv[1])))";
    let schema = place("tests/deploy/crds").join(format!("{}.json", at["kind"].as_str().expect("a kind")));
    fed(Command::new(tool("venv/bin/python")).args(["-c", script]).arg(schema), &at.to_string())
}

#[track_caller]
fn rendered(values: &Value) -> Vec<Value> {
    objects(&succeed(&mut template(values, "1.35"), ""))
}

#[track_caller]
fn one<'a>(all: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let found: Vec<&Value> = all.iter().filter(|at| at["kind"] == kind && at["metadata"]["name"] == name).collect();
    assert_eq!(found.len(), 1, "{kind} {name}");
    found[0]
}

const SESSIONS: &str = r#"
[[session]]
name = "web"
tunnel = "vxlan"
id = 7
remote = "198.51.100.2"

[[session.pods]]
namespace = "shop"
selector = "app=web,tier!=test"
annotations = { mirror = "yes" }

[[session]]
name = "node"
interfaces = ["eth0:ingress"]
tunnel = "gre"
remote = ["198.51.100.2"]
"#;

/// Values as users set them.
fn values() -> Vec<Value> {
    let all = json!({
        "sessions": SESSIONS, "priorityClassName": "system-node-critical", "interval": 5,
        "image": {"repository": "registry.example/snifctl", "tag": "1.2-k8s", "pullPolicy": "Always"},
        "imagePullSecrets": [{"name": "registry"}], "nodeSelector": {"pool": "web"}, "podLabels": {"team": "net"},
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
            {"matchExpressions": [{"key": "eks.amazonaws.com/compute-type", "operator": "NotIn", "values": ["fargate"]}]}]}}},
        "extraCapabilities": ["NET_RAW"], "updateStrategy": {"type": "OnDelete", "rollingUpdate": null},
        "podAnnotations": {"note": "1"}, "serviceAccount": {"annotations": {"a": "b"}}, "tolerations": [],
    });
    let least = json!({
        "rbac": {"create": false}, "serviceAccount": {"create": false, "name": "other"}, "uninstall": {"enabled": false},
        "appArmorProfile": "", "seccompProfile": "", "resources": {}, "nodeSelector": null, "fullnameOverride": "tap",
    });
    let metrics = json!({
        "metrics": {
            "enabled": true, "annotations": true, "podMonitor": {"enabled": true, "labels": {"release": "p"}},
            "rules": {"enabled": true, "labels": {"release": "p"}}, "dashboard": {"enabled": true, "annotations": {"a": "b"}},
        },
    });
    vec![json!({}), all, least, metrics]
}

#[test]
fn the_chart_is_valid_with_every_set_of_values_and_refuses_wrong_ones() {
    for values in values() {
        let chart = place("deploy/helm/snifctl").display().to_string();
        succeed(&mut helm(&["lint", "--strict", &chart], &values), "");
        for version in ["1.27", "1.30", "1.35"] {
            assert_valid(&succeed(&mut template(&values, version), ""), version);
        }
    }
    for (wrong, names) in [
        (json!({"session": ""}), "session"),
        (json!({"extraCapabilities": ["SYS_MODULE"]}), "extraCapabilities"),
        (json!({"interval": 0}), "interval"),
        (json!({"metrics": {"port": 0}}), "port"),
        (json!({"metrics": {"podMonitor": {"interval": "30"}}}), "interval"),
        (json!({"image": {"repository": ""}}), "repository"),
    ] {
        let out = fed(&mut template(&wrong, "1.35"), "");
        assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains(names), "{wrong}: {out:?}");
    }
}

#[test]
fn the_daemon_set_has_no_more_rights_than_it_needs() {
    let all = rendered(&json!({}));
    let pod = &one(&all, "DaemonSet", "snifctl")["spec"]["template"]["spec"];
    assert_eq!((&pod["hostNetwork"], &pod["hostPID"], &pod["hostIPC"]), (&json!(true), &json!(true), &Value::Null));
    let containers = pod["containers"].as_array().expect("containers");
    assert_eq!(containers.len(), 1);
    assert_eq!(pod["initContainers"], Value::Null);
    let container = &containers[0];
    assert_eq!(
        container["securityContext"],
        json!({
            "runAsUser": 0, "runAsGroup": 0, "privileged": false, "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN", "BPF", "PERFMON", "SYS_ADMIN", "SYS_PTRACE"]},
            "seccompProfile": {"type": "RuntimeDefault"}, "appArmorProfile": {"type": "Unconfined"},
        })
    );
    // An update, a restart or a lost collector takes nothing down and restarts nothing.
    assert_eq!(container["lifecycle"], Value::Null);
    let command = |at: &Value| at.as_array().unwrap().iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" ");
    assert!(!command(&container["command"]).contains("down-on-exit"));
    assert_eq!(command(&container["livenessProbe"]["exec"]["command"]), "snifctl watch --check /run/snifctl/heartbeat");
    assert_eq!(command(&container["readinessProbe"]["exec"]["command"]), "snifctl status --check");
    assert_eq!(container["env"][0]["valueFrom"]["fieldRef"]["fieldPath"], "spec.nodeName");
    let volumes = pod["volumes"].as_array().expect("volumes");
    let of_host: Vec<&Value> =
        volumes.iter().map(|at| &at["hostPath"]["path"]).filter(|path| !path.is_null()).collect();
    assert_eq!(of_host, ["/sys/fs/bpf"]);

    let rules = |kind: &str, name: &str| one(&all, kind, name)["rules"].clone();
    let pods = |verbs: Value| json!({"apiGroups": [""], "resources": ["pods"], "verbs": verbs});
    assert_eq!(rules("ClusterRole", "snifctl"), json!([pods(json!(["get", "list", "watch"]))]));
    let exec = json!({"apiGroups": [""], "resources": ["pods/exec"], "verbs": ["create"]});
    assert_eq!(rules("Role", "snifctl-uninstall"), json!([pods(json!(["get", "list"])), exec]));
    let roles: BTreeSet<&str> =
        all.iter().filter_map(|at| at["kind"].as_str()).filter(|kind| kind.contains("Role")).collect();
    assert_eq!(roles, BTreeSet::from(["ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"]));

    // What the job does happens before an uninstall, and at no other time.
    for at in all.iter().filter(|at| at["metadata"]["name"] == "snifctl-uninstall") {
        assert_eq!(at["metadata"]["annotations"]["helm.sh/hook"], "pre-delete", "{}", at["kind"]);
    }
    let job = &one(&all, "Job", "snifctl-uninstall")["spec"]["template"]["spec"];
    assert_eq!((&job["serviceAccountName"], &job["hostNetwork"]), (&json!("snifctl-uninstall"), &Value::Null));
    let security = &job["containers"][0]["securityContext"];
    assert_eq!((&security["runAsNonRoot"], &security["capabilities"]), (&json!(true), &json!({"drop": ["ALL"]})));
    // Its command is one of ours.
    let words = command(&job["containers"][0]["command"]);
    let help = succeed(Command::new(SNIFCTL).args(words.split(' ').skip(1)).arg("--help"), "");
    assert!(help.starts_with("Take all mirrors down on every node"), "{help}");

    // Before 1.30 AppArmor is told by an annotation.
    let old = objects(&succeed(&mut template(&json!({}), "1.29"), ""));
    let template = &one(&old, "DaemonSet", "snifctl")["spec"]["template"];
    let annotation = &template["metadata"]["annotations"]["container.apparmor.security.beta.kubernetes.io/snifctl"];
    assert_eq!(annotation, "unconfined");
    assert_eq!(template["spec"]["containers"][0]["securityContext"]["appArmorProfile"], Value::Null);
}

#[test]
fn metrics_are_served_scraped_and_shown_by_choice() {
    // By default nothing listens, also where a part is chosen without the whole.
    let parts = json!({"podMonitor": {"enabled": true}, "rules": {"enabled": true}, "dashboard": {"enabled": true}});
    let plain = rendered(&json!({"metrics": parts}));
    assert_eq!(plain, rendered(&json!({})));
    assert!(!serde_json::to_string(&plain).unwrap().contains("--metrics"));

    let all = rendered(&values()[3]);
    let template = &one(&all, "DaemonSet", "snifctl")["spec"]["template"];
    let container = &template["spec"]["containers"][0];
    let words: Vec<&str> = container["command"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert_eq!(words[words.len() - 2..], ["--metrics", "$(HOST_IP):9810"]);
    let env = container["env"].as_array().unwrap().iter().find(|at| at["name"] == "HOST_IP").expect("HOST_IP");
    assert_eq!(env["valueFrom"]["fieldRef"]["fieldPath"], "status.hostIP");
    let port = &container["ports"][0];
    assert_eq!(
        (&port["name"], &port["containerPort"], &port["hostPort"]),
        (&json!("metrics"), &json!(9810), &json!(9810))
    );
    let annotations = &template["metadata"]["annotations"];
    for (name, value) in [("scrape", "true"), ("port", "9810"), ("path", "/metrics")] {
        assert_eq!(annotations[format!("prometheus.io/{name}")], value);
    }

    // The monitor finds the pods and the port.
    let monitor = one(&all, "PodMonitor", "snifctl");
    let labels = &template["metadata"]["labels"];
    let wanted = monitor["spec"]["selector"]["matchLabels"].as_object().expect("labels");
    assert!(wanted.len() == 3 && wanted.iter().all(|(name, value)| labels[name] == *value), "{wanted:?} {labels}");
    assert_eq!(monitor["spec"]["podMetricsEndpoints"][0]["port"], port["name"]);
    assert_eq!(monitor["metadata"]["labels"]["release"], "p");

    // Rules and dashboard are the files that Prometheus and Grafana take.
    let file = |name: &str| fs::read_to_string(place("deploy").join(name)).expect("a file");
    let shipped = objects(&file("prometheus/snifctl.rules.yml")).remove(0);
    let rules = one(&all, "PrometheusRule", "snifctl");
    assert_eq!(rules["spec"]["groups"], shipped["groups"]);
    let map = one(&all, "ConfigMap", "snifctl-dashboard");
    assert_eq!(map["metadata"]["labels"]["grafana_dashboard"], "1");
    assert_eq!(map["data"]["snifctl.json"].as_str().map(str::trim_end), Some(file("grafana/snifctl.json").trim_end()));
    let mut values = values().remove(3);
    values["metrics"]["rules"]["except"] = json!(["SnifctlNoSession"]);
    let fewer = rendered(&values);
    let mut left = shipped["groups"][0]["rules"].as_array().expect("rules").clone();
    left.retain(|rule| rule["alert"] != "SnifctlNoSession");
    assert_eq!(one(&fewer, "PrometheusRule", "snifctl")["spec"]["groups"][0]["rules"], json!(left));

    // The schemas refuse what the operator would.
    for (at, path, value) in [
        (monitor, "/spec/podMetricsEndpoints/0/interval", json!("30")),
        (monitor, "/spec/podMetricsEndpoints/0/relabelings/0/action", json!("move")),
        (monitor, "/spec/selector", json!({"labels": {}})),
        (rules, "/spec/groups/0/rules/0/for", json!("soon")),
        (rules, "/spec/groups/0/rules/0", json!({"alert": "A"})),
        (rules, "/spec/groups/0", json!({"name": "a", "rule": []})),
    ] {
        let mut wrong = at.clone();
        *wrong.pointer_mut(path).unwrap_or(&mut Value::Null) = value.clone();
        if wrong.pointer(path).is_none() {
            let (parent, key) = path.rsplit_once('/').expect("a path");
            wrong.pointer_mut(parent).expect("a parent")[key] = value;
        }
        assert!(by_schema(at).status.success() && !by_schema(&wrong).status.success(), "{path}");
    }
}

#[test]
fn the_kustomization_is_the_chart_and_current() {
    for (component, kept) in [
        ("", "snifctl.yaml"),
        ("operator", "components/operator/operator.yaml"),
        ("dashboard", "components/dashboard/dashboard.yaml"),
    ] {
        let mut generate = Command::new(place("deploy/kustomize/generate"));
        let words = Some(component).filter(|word| !word.is_empty());
        let text = succeed(generate.args(words).env("HELM", tool("bin/helm")), "");
        let kept = fs::read_to_string(place("deploy/kustomize").join(kept)).expect("a generated file");
        assert_eq!(kept, text, "try: make kustomize");
    }
    let base = json!({"uninstall": {"enabled": false}});
    assert_same(&place("deploy/kustomize"), &base);

    // kustomize takes no absolute paths.
    let overlay = tempfile::Builder::new().prefix("overlay").tempdir_in(place("target")).expect("a directory");
    let names = ["metrics", "annotations", "operator", "dashboard"];
    let components: Vec<String> =
        names.iter().map(|name| format!("../../deploy/kustomize/components/{name}")).collect();
    let file = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
        "resources": ["../../deploy/kustomize"], "components": components,
    });
    fs::write(overlay.path().join("kustomization.yaml"), file.to_string()).expect("write an overlay");
    let mut all = base;
    let on = json!({"enabled": true});
    all["metrics"] = json!({"enabled": true, "annotations": true, "podMonitor": on, "rules": on, "dashboard": on});
    assert_same(overlay.path(), &all);
}

/// A kustomization makes what the chart does, apart from the namespace.
#[track_caller]
fn assert_same(kustomization: &Path, values: &Value) {
    let yaml = succeed(Command::new(tool("bin/kubectl")).arg("kustomize").arg(kustomization), "");
    assert_valid(&yaml, "1.30");
    let key = |at: &Value| (at["kind"].to_string(), at["metadata"]["name"].to_string());
    let mut ours: Vec<Value> = objects(&yaml).into_iter().filter(|at| at["kind"] != "Namespace").collect();
    let mut charts = rendered(values);
    charts.iter_mut().for_each(forget);
    ours.sort_by_key(key);
    charts.sort_by_key(key);
    assert_eq!(ours, charts);
}

/// Takes out the labels that helm alone has.
fn forget(value: &mut Value) {
    match value {
        Value::Object(all) => {
            all.retain(|key, _| key != "helm.sh/chart" && key != "app.kubernetes.io/managed-by");
            all.values_mut().for_each(forget);
        }
        Value::Array(all) => all.iter_mut().for_each(forget),
        _ => {}
    }
}

/// Pods that `kubectl get` finds, and that `kubectl exec` cannot reach.
const UNREACHABLE: &str = "snifctl-b";

/// Passes everything but `exec` on to the real kubectl; in a pod is where we are.
const KUBECTL: &str = r#"#!/bin/sh
for word in "$@"; do
    [ "$word" = exec ] || continue
    case " $* " in *" @UNREACHABLE@ "*) echo "error: dial tcp: i/o timeout" >&2; exit 1 ;; esac
    while [ "$1" != -- ]; do shift; done
    shift 2
    [ "$1 $2" != "watch --hold" ] || set -- watch --hold @HEARTBEAT@
    exec @SNIFCTL@ "$@"
done
exec @REAL@ "$@"
"#;

/// A cluster with snifctl on the lab's host, and a user of it.
struct Installed<'a> {
    lab: &'a Lab,
    cluster: Cluster,
    dir: PathBuf,
    by: Vec<String>,
    swaps: usize,
}

impl<'a> Installed<'a> {
    fn new(lab: &'a Lab, values: &Value) -> Installed<'a> {
        let cluster = Cluster::start(lab);
        let map = one(&rendered(values), "ConfigMap", "snifctl").clone();
        cluster.put("configmaps", "snifctl", "snifctl", &map);
        let fakes = lab.fakes();
        let heartbeat = lab.dir().join("heartbeat");
        let script = KUBECTL.replace("@UNREACHABLE@", UNREACHABLE).replace("@SNIFCTL@", SNIFCTL);
        let script = script.replace("@HEARTBEAT@", &heartbeat.to_string_lossy());
        fakes.add("kubectl", &script.replace("@REAL@", &tool("bin/kubectl").to_string_lossy()));
        let mut by = fakes.first_in_path().to_vec();
        by.extend([
            cluster.home(),
            format!("KUBECONFIG={}", cluster.kubeconfig()),
            format!("NODE_NAME={}", lab::cluster::NODE),
        ]);
        let dir = lab.dir().join("snifctl.d");
        let mut installed = Installed { lab, cluster, dir, by, swaps: 0 };
        installed.kubelet();
        installed.agent("snifctl-a", lab::cluster::NODE);
        installed
    }

    fn agent(&self, name: &str, node: &str) {
        let labels = [
            ("app.kubernetes.io/name", "snifctl"),
            ("app.kubernetes.io/instance", "snifctl"),
            ("app.kubernetes.io/component", "agent"),
        ];
        let pod = Told::new(name, &labels);
        self.cluster.tell(&Told { namespace: "snifctl".into(), node: node.into(), host_network: true, ..pod });
    }

    fn map(&self) -> Value {
        self.cluster.object("configmaps", "snifctl", "snifctl")["data"].clone()
    }

    /// Writes the ConfigMap's files.
    fn kubelet(&mut self) {
        let (map, before) = (self.map(), format!("..{}", self.swaps));
        self.swaps += 1;
        let now = format!("..{}", self.swaps);
        fs::create_dir_all(self.dir.join(&now)).expect("a directory");
        for (name, text) in map.as_object().expect("data") {
            fs::write(self.dir.join(&now).join(name), text.as_str().expect("text")).expect("write a file");
            let _ = std::os::unix::fs::symlink(format!("..data/{name}"), self.dir.join(name));
        }
        std::os::unix::fs::symlink(&now, self.dir.join("..data_tmp")).expect("a link");
        fs::rename(self.dir.join("..data_tmp"), self.dir.join("..data")).expect("swap");
        for entry in fs::read_dir(&self.dir).expect("a directory").flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !name.starts_with("..") && map[&name].is_null() {
                fs::remove_file(entry.path()).expect("remove a link");
            }
        }
        let _ = fs::remove_dir_all(self.dir.join(before));
    }

    fn watch(&self) -> Watcher {
        let (dir, heartbeat) = (self.dir.to_string_lossy(), self.lab.dir().join("heartbeat"));
        let by: Vec<&str> = self.by.iter().map(String::as_str).collect();
        Watcher::start_by(self.lab, &by, &["--apply", &dir, "--heartbeat", &heartbeat.to_string_lossy()])
    }

    /// `kubectl snif ...`
    fn snif(&self, words: &[&str]) -> Said {
        self.lab.said_by(&self.by, &[&["kubectl-snif"], words].concat())
    }

    #[track_caller]
    fn wait_up(&self, watch: &Watcher, names: &[&str]) {
        let up =
            || sessions(self.lab).iter().filter_map(|at| Some(at["name"].as_str()?.to_string())).collect::<Vec<_>>();
        assert!(poll(SOON, || (up() == names).then_some(())).is_some(), "{names:?}, not {:?}:\n{}", up(), watch.log());
    }
}

/// What is up; the watch may be at work meanwhile, and we say that we wait.
fn sessions(lab: &Lab) -> Vec<Value> {
    lab.said(&["status", "--json"]).json()["sessions"].as_array().cloned().unwrap_or_default()
}

#[test]
fn the_plugin_taps_pods_on_every_node_and_takes_all_down() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let mut cluster = Installed::new(
        &lab,
        &json!({"sessions": SESSIONS.split("\n\n[[session]]\n").last().map(|text| format!("[[session]]\n{text}"))}),
    );
    let pod = Told::new("web-1", &[("app", "web")]);
    let process = Process::of_pod(&lab, &pod, Driver::Systemd, None);
    process.join(&lab, "veth-web", "10.42.0.11");
    cluster.cluster.tell(&pod);
    let watch = cluster.watch();
    cluster.wait_up(&watch, &["node"]);

    let tap = ["tap", "-n", "shop", "-l", "app=web", "--remote", "198.51.100.2"];
    let shown = cluster.snif(&[&tap[..], &["--dry-run"]].concat()).quietly_ok().stdout;
    assert!(shown.contains("\"pods:shop/app=web/*\"") && shown.contains("tunnel = \"gre\""), "{shown}");
    assert_eq!(cluster.map().as_object().expect("data").len(), 1, "a dry run writes nothing");
    let told = cluster.snif(&tap).ok().stderr;
    assert!(told.contains("configmap snifctl/snifctl is changed") && told.contains("within a minute"), "{told}");
    assert_eq!(cluster.map()["tap-default.toml"], shown);
    assert!(cluster.map()["sessions.toml"].as_str().is_some_and(|text| text.contains("\"node\"")), "the others stay");
    assert!(cluster.snif(&tap).ok().stderr.contains("nothing to do"));
    let other = [&tap[..], &["--filter", "icmp"]].concat();
    cluster.snif(&other).refused(2, "--name default", "--replace");
    cluster.snif(&[&other[..], &["--replace"]].concat()).ok();
    // What nodes could not read is not written: a name of the chart's, an option that is none.
    cluster.snif(&[&tap[..], &["--name", "node"]].concat()).refused(
        2,
        "node is also the session at sessions.toml:2",
        "name = \"other\"",
    );
    cluster.snif(&["tap", "-l", "app=web", "--remote", "198.51.100"]).refused(2, "--remote", "--remote 10.0.0.7");
    cluster.snif(&["tap", "--remote", "198.51.100.2"]).refused(2, "--selector", "kubectl snif tap --help");

    cluster.kubelet();
    cluster.wait_up(&watch, &["default", "node"]);
    let sees_pod = || {
        let taps = sessions(&lab)[0]["taps"].as_array().cloned().unwrap_or_default();
        taps.iter().any(|tap| tap["interface"] == "pod:shop/web-1/eth0" && tap["attached"] == true)
    };
    assert!(poll(SOON, || sees_pod().then_some(())).is_some(), "{}", watch.log());
    process.run(&["ping", "-c", "3", "-i", "0.01", "-W", "5", "10.42.0.1"]);
    let is_counted = || {
        let table = cluster.snif(&["status"]).quietly_ok().stdout;
        let words = |line: &str| line.split_whitespace().map(String::from).collect::<Vec<_>>().join(" ");
        let rows: Vec<String> = table.lines().map(words).collect();
        let expected =
            ["node session taps remotes copied dropped state", "node-1 default 2 1 6 0 ok", "node-1 node 1 1"];
        let is_so = rows.len() == 3 && rows.iter().zip(expected).all(|(row, wanted)| row.starts_with(wanted));
        if is_so { Ok(()) } else { Err(table) }
    };
    assert!(poll(SOON, || is_counted().ok()).is_some(), "{}", is_counted().unwrap_err());

    // A node that does not answer is a row, and a failure.
    cluster.agent(UNREACHABLE, "node-2");
    let said = cluster.snif(&["status", "--json"]);
    let nodes = said.json()["nodes"].clone();
    assert_eq!(said.status.code(), Some(1));
    assert_eq!((&nodes[0]["node"], &nodes[0]["sessions"][0]["name"]), (&json!("node-1"), &json!("default")));
    assert!(nodes[1]["error"].as_str().is_some_and(|text| text.contains("i/o timeout")), "{nodes:#}");

    cluster.snif(&["untap"]).ok();
    assert_eq!(cluster.map().as_object().expect("data").len(), 1);
    assert!(cluster.snif(&["untap"]).ok().stderr.contains("no tap is called default; there is none"));
    cluster.kubelet();
    cluster.wait_up(&watch, &["node"]);

    // An uninstall: what can be reached is taken down and stays down, the rest is named.
    let said = cluster.snif(&["down", "--system", "snifctl", "--release", "snifctl"]);
    assert_eq!((said.status.code(), said.stdout.as_str()), (Some(1), "node-1: no mirror is left\n"), "{said:#?}");
    assert!(
        said.stderr.contains("node-2: ") && said.stderr.trim_end().ends_with("try: kubectl snif down"),
        "{said:#?}"
    );
    cluster.snif(&tap).ok();
    cluster.kubelet();
    lab.host(&["ip", "route", "add", "203.0.113.0/24", "dev", "out0"]);
    lab.host(&["ip", "route", "del", "203.0.113.0/24", "dev", "out0"]);
    assert!(poll(std::time::Duration::from_secs(3), || (!sessions(&lab).is_empty()).then_some(())).is_none());
    assert!(watch.end("TERM").0.success());
    drop(process);
    // The kernel takes the pair away with the pod's namespace, some time later.
    let is_gone = || !lab.try_host(&["ip", "link", "show", "dev", "veth-web"]).status.success();
    assert!(poll(SOON, || is_gone().then_some(())).is_some(), "the pod's pair is gone");
    lab.assert_as_before(&before);
}

#[test]
fn the_sessions_of_the_chart_are_read() {
    let lab = Lab::roomy();
    let cluster = Installed::new(&lab, &json!({"sessions": SESSIONS}));
    let dir = cluster.dir.to_string_lossy().into_owned();
    let said = lab.said_by(&cluster.by, &["apply", "-f", &dir, "--dry-run"]).ok();
    assert!(said.stderr.contains("+ session web") && said.stderr.contains("+ session node"), "{said:#?}");
    drop(cluster);
    let empty = Installed::new(&lab, &json!({}));
    let said = lab.said_by(&empty.by, &["apply", "-f", &empty.dir.to_string_lossy(), "--dry-run"]);
    assert_eq!(said.status.code(), Some(0), "{said:#?}");
}
