//! `metrics`: the numbers are those of `status` and `map dump`, never go back, and reach Prometheus; what is deployed with it
//! asks for metrics that there are.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use crate::lab;
use crate::lab::frames::{self, Ends};

use crate::lab::remotes::{dump, know, lab_of, lab_up, listed, remote, remotes, said_up};
use crate::lab::status::Session;
use crate::lab::watcher::Watcher;
use crate::lab::{Lab, Ns, PATIENCE, poll};
use serde_json::Value;

/// Each metric with its labels, as printed.
type Metrics = BTreeMap<String, u64>;

fn parsed(text: &str) -> Metrics {
    let rows = text.lines().filter(|line| !line.starts_with('#'));
    let row = |line: &str| {
        let (name, value) = line.rsplit_once(' ').expect("a value");
        (name.to_string(), value.parse().unwrap_or_else(|_| panic!("{line}")))
    };
    let (count, found) = (rows.clone().count(), rows.map(row).collect::<Metrics>());
    assert_eq!(count, found.len(), "a metric twice:\n{text}");
    found
}

#[track_caller]
fn metrics(lab: &Lab) -> Metrics {
    parsed(&lab.said(&["metrics"]).quietly_ok().stdout)
}

/// The sum of a metric's rows.
fn sum(metrics: &Metrics, name: &str) -> u64 {
    metrics.iter().filter(|(row, _)| row.split('{').next() == Some(name)).map(|(_, value)| value).sum()
}

/// Panics unless all ways to read say the same of a session at rest.
#[track_caller]
fn agreed(lab: &Lab) -> Metrics {
    let (session, metrics) = (lab.settled(), metrics(lab));
    let at = |name: &str, labels: &str| {
        let row = format!("{name}{{session=\"default\"{labels}}}");
        *metrics.get(&row).unwrap_or_else(|| panic!("no {row} in {metrics:#?}"))
    };
    let removed = ("removed".to_string(), "both".to_string(), session.removed_taps);
    let taps = session.taps.iter().map(|tap| (tap.interface.clone(), tap.direction.clone(), tap.counts));
    for (device, direction, counts) in taps.chain([removed]) {
        let labels = format!(",device=\"{device}\",direction=\"{direction}\"");
        for (name, count) in [
            ("seen_packets", counts.seen),
            ("filtered_packets", counts.filtered),
            ("skipped_packets", counts.skipped),
            ("copies_packets", counts.stat.pcnt),
            ("copies_bytes", counts.stat.bcnt),
            ("drops_packets", counts.stat.dcnt),
        ] {
            assert_eq!(at(&format!("snifctl_tap_{name}_total"), &labels), count, "{name} {labels}");
        }
    }
    let stats = session.remotes.iter().map(|remote| (remote.address.clone(), remote.stat));
    for (address, stat) in stats.chain([("removed".into(), session.removed)]) {
        let labels = format!(",remote=\"{address}\"");
        for (name, count) in [("sent_packets", stat.pcnt), ("sent_bytes", stat.bcnt), ("drops_packets", stat.dcnt)] {
            assert_eq!(at(&format!("snifctl_remote_{name}_total"), &labels), count, "{name} {labels}");
        }
    }
    for (reason, count) in &session.drops {
        assert_eq!(at("snifctl_drops_packets_total", &format!(",reason=\"{reason}\"")), *count, "{reason}");
    }
    assert_dumped(lab, &session);
    let dropped = sum(&metrics, "snifctl_drops_packets_total");
    assert_eq!(sum(&metrics, "snifctl_tap_drops_packets_total"), dropped);
    assert_eq!(sum(&metrics, "snifctl_remote_drops_packets_total"), dropped);
    let asked = sum(&metrics, "snifctl_tap_copies_packets_total");
    assert_eq!(asked, sum(&metrics, "snifctl_remote_sent_packets_total") + dropped, "asked = sent + dropped");
    assert_eq!(sum(&metrics, "snifctl_copy_size_bytes_count"), asked);
    assert_eq!(sum(&metrics, "snifctl_copy_size_bytes_sum"), sum(&metrics, "snifctl_tap_copies_bytes_total"));
    metrics
}

/// The maps have what status says of what is in the session now and was never taken out of it.
#[track_caller]
fn assert_dumped(lab: &Lab, session: &Session) {
    let number = |value: &Value| value.as_u64().expect("a number");
    let of = |map: &str, field: &str| dump(lab, map).iter().map(|row| number(&row["value"][field])).sum::<u64>();
    if session.removed.pcnt == 0 {
        assert_eq!(of("remote_stats", "pcnt"), session.remotes_total().pcnt);
        assert_eq!(of("remote_stats", "bcnt"), session.remotes_total().bcnt);
    }
    let drops = dump(lab, "drops");
    let dumped = drops[0]["value"].as_object().expect("reasons");
    let dumped: BTreeMap<String, u64> = dumped.iter().map(|(name, count)| (name.clone(), number(count))).collect();
    assert_eq!(dumped, session.drops);
    if session.removed_taps.seen == 0 {
        let taps = dump(lab, "taps");
        let stat = taps.iter().map(|row| number(&row["value"]["stat"]["pcnt"])).sum::<u64>();
        let seen = taps.iter().map(|row| number(&row["value"]["choice"]["seen"])).sum::<u64>();
        assert_eq!((stat, seen), (session.taps_total().pcnt, session.taps.iter().map(|tap| tap.counts.seen).sum()));
    }
    let sizes = dump(lab, "sizes").iter().map(|row| number(&row["value"]["frames"])).sum::<u64>();
    assert_eq!(sizes, session.taps_total().pcnt + session.removed_taps.stat.pcnt);
}

const SUMS: [&str; 12] = [
    "snifctl_tap_seen_packets_total",
    "snifctl_tap_filtered_packets_total",
    "snifctl_tap_skipped_packets_total",
    "snifctl_tap_copies_packets_total",
    "snifctl_tap_copies_bytes_total",
    "snifctl_tap_drops_packets_total",
    "snifctl_remote_sent_packets_total",
    "snifctl_remote_sent_bytes_total",
    "snifctl_remote_drops_packets_total",
    "snifctl_drops_packets_total",
    "snifctl_copy_size_bytes_count",
    "snifctl_out_interface_drops_packets_total",
];

#[test]
fn status_map_dump_and_metrics_agree_to_the_packet_through_every_change_and_never_go_back() {
    let lab = lab_of(3);
    lab::links::add_link(&lab, 1);
    said_up(&lab, &listed(&remotes(2)), &[]).ok();
    let sent = [frames::series(&Ends::PEER_TO_HOST, 41), vec![frames::raw(&Ends::PEER_TO_HOST, 1, 64)]].concat();
    let send = || {
        lab.send(Ns::Peer, "peer0", &sent);
        lab.send(Ns::Host, "eth0", &frames::series(&Ends::HOST_TO_PEER, 23));
    };
    agreed(&lab);
    send();
    let now = agreed(&lab);
    let all = [sent.clone(), frames::series(&Ends::HOST_TO_PEER, 23)].concat();
    for power in 6..=16 {
        let fit = all.iter().filter(|frame| frame.len() <= 1 << power).count() as u64;
        let row = format!("snifctl_copy_size_bytes_bucket{{session=\"default\",le=\"{}\"}}", 1 << power);
        assert_eq!(now[&row], 2 * fit, "{row}");
    }
    let mut before = now;
    let changes: [&[&str]; 10] = [
        &["filter", "set", "udp and dst port 7"],
        &["filter", "clear"],
        &["sync"],
        &["tap", "add", "eth1"],
        &["remote", "add", "198.51.100.12"],
        &["remote", "remove", "198.51.100.10"],
        &["tap", "remove", "eth0:egress"],
        &["tap", "add", "eth0:egress"],
        &["remote", "add", "198.51.100.10"],
        &["tap", "remove", "eth1"],
    ];
    for change in changes {
        lab.said(change).ok();
        for traffic in [false, true] {
            if traffic {
                send();
            }
            let now = agreed(&lab);
            for name in SUMS {
                let (was, is) = (sum(&before, name), sum(&now, name));
                assert!(is >= was, "{change:?}: {name} goes back from {was} to {is}");
                assert!(traffic || is == was, "{change:?}: {name} goes from {was} to {is} without traffic");
            }
            before = now;
        }
    }
    // What cannot be sent is told by its reason, and a remote that is not reached as such.
    lab.said(&["remote", "add", "203.0.113.9"]).ok();
    send();
    let now = agreed(&lab);
    assert!(now["snifctl_drops_packets_total{session=\"default\",reason=\"unresolved\"}"] > 0, "{now:#?}");
    assert_eq!(now["snifctl_remote_up{session=\"default\",remote=\"203.0.113.9\"}"], 0);
    assert_eq!(now["snifctl_remote_up{session=\"default\",remote=\"198.51.100.10\"}"], 1);
    lab.host(&["tc", "filter", "del", "dev", "eth0", "ingress"]);
    let now = metrics(&lab);
    assert_eq!(now["snifctl_tap_attached{session=\"default\",device=\"eth0\",direction=\"ingress\"}"], 0);
    assert_eq!(now["snifctl_tap_attached{session=\"default\",device=\"eth0\",direction=\"egress\"}"], 1);
}

/// What a scrape takes is mostly the tools that it starts: one of each, however many taps and remotes there are.
#[test]
fn a_scrape_starts_three_tools_however_many_taps_and_remotes_there_are() {
    let started = |lab: &Lab| {
        let fakes = lab.counting_fakes();
        lab.said_by(&fakes.first_in_path(), &["metrics"]).quietly_ok();
        fakes.calls().iter().filter_map(|call| call.split(' ').next().map(String::from)).collect::<Vec<_>>()
    };
    let lab = lab_up(1, &[]);
    assert_eq!(started(&lab), ["ip", "bpftool", "tc"]);
    for n in 0..20 {
        lab.ip_batch(Ns::Host, &format!("link add many{n} type veth peer name ynam{n}"));
        lab.said(&["tap", "add", &format!("many{n}")]).ok();
    }
    for address in remotes(8).into_iter().skip(1) {
        know(&lab, address);
        lab.said(&["remote", "add", &address.to_string()]).ok();
    }
    let rows = metrics(&lab);
    let count = |name: &str| rows.keys().filter(|row| row.split('{').next() == Some(name)).count();
    assert_eq!((count("snifctl_tap_attached"), count("snifctl_remote_up")), (42, 8));
    assert_eq!(started(&lab), ["ip", "bpftool", "tc"]);
}

#[test]
fn a_textfile_is_written_whole_or_not_at_all_and_refusals_name_what_is_wrong() {
    let lab = lab_up(1, &[]);
    let dir = lab.dir().join("textfile");
    fs::create_dir(&dir).unwrap();
    let file = dir.join("snifctl.prom");
    let path = file.to_str().unwrap();
    lab.said_by(&["sh", "-c", "umask 077; exec \"$@\"", "sh"], &["metrics", "--textfile", path]).quietly_ok();
    let (text, inode) = (fs::read_to_string(&file).unwrap(), fs::metadata(&file).unwrap().ino());
    assert_eq!(text, lab.said(&["metrics", "--all"]).quietly_ok().stdout);
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o644);
    lab.said(&["metrics", "--textfile", path, "--name", "default"]).quietly_ok();
    assert_ne!(fs::metadata(&file).unwrap().ino(), inode, "it is written in place");
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "something is left beside it");
    lab.said(&["metrics", "--textfile", "/nowhere/a.prom"]).refused(1, "--textfile", "mkdir -p /nowhere");
    lab.said(&["metrics", "--name", "other"]).refused(1, "other", "--name default");
    lab.said(&["metrics", "--listen", "localhost:99"]).refused(2, "ADDR:PORT", "or 9810");
    lab.said(&["metrics", "--listen", "203.0.113.1:99"]).refused(1, "203.0.113.1:99", "127.0.0.1:9810");
    lab.said(&["explain", "bad-luck"]).refused(2, "bad-luck", "down");
    // Nothing is up: nothing is an error.
    lab.said(&["down"]).ok();
    assert_eq!(metrics(&lab), Metrics::from([("snifctl_collection_errors_total".into(), 0)]));
}

/// Ended with its value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(lab: &Lab, argv: &[&str]) -> Running {
    let mut command = lab.command(Ns::Host, argv);
    Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("start it"))
}

/// What an address answers to these bytes.
fn answer(lab: &Lab, port: u16, request: &str) -> String {
    let script = format!("exec 3<>/dev/tcp/127.0.0.1/{port} && printf '%b' \"$1\" >&3 && timeout 20 cat <&3");
    String::from_utf8_lossy(&lab.try_host(&["bash", "-c", &script, "bash", request]).stdout).into_owned()
}

#[track_caller]
fn wait_for(lab: &Lab, port: u16) -> String {
    let get = || Some(answer(lab, port, GET)).filter(|text| text.starts_with("HTTP/1.1 200 OK\r\n"));
    poll(PATIENCE, get).unwrap_or_else(|| panic!("nobody answers: {:?}", answer(lab, port, GET)))
}

const GET: &str = r"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n";
const SNIFCTL: &str = env!("CARGO_BIN_EXE_snifctl");

#[test]
fn it_is_served_until_a_signal_and_odd_clients_neither_get_in_the_way_nor_stay() {
    let lab = lab_up(1, &[]);
    let mut server = start(&lab, &[SNIFCTL, "metrics", "--listen", "9810"]);
    let text = wait_for(&lab, 9810);
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head}");
    assert_eq!(parsed(body), metrics(&lab));
    for (request, status) in [
        (r"GET /other HTTP/1.1\r\nHost: a\r\n\r\n".to_string(), "404"),
        (r"GET / HTTP/1.0\r\n\r\n".to_string(), "404"),
        (r"POST /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n".to_string(), "405"),
        (r"DELETE /metrics HTTP/1.1\r\nHost: a\r\n\r\n".to_string(), "405"),
        (r"GET /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc".to_string(), "413"),
        (format!(r"GET /metrics HTTP/1.1\r\nHost: {}\r\n\r\n", "a".repeat(20_000)), "431"),
        (format!(r"GET /metrics HTTP/1.1\r\nHost: a\r\n{}\r\n", r"a: b\r\n".repeat(100)), "431"),
        (r"HEAD /metrics HTTP/1.1\r\nHost: a\r\n\r\n".to_string(), "200"),
        (r"nonsense\r\n\r\n".to_string(), "400"),
    ] {
        // What is refused unread is reset, and a reset can overtake the answer.
        let fits = |said: &String| said.starts_with("HTTP/1.") && said[8..].starts_with(&format!(" {status} "));
        let said = poll(PATIENCE, || Some(answer(&lab, 9810, &request)).filter(fits));
        let said = said.unwrap_or_else(|| panic!("{} is not answered {status}", &request[..30.min(request.len())]));
        assert!(status != "200" || said.ends_with("\r\n\r\n"), "HEAD has a body");
    }
    // 200 half requests are held open; a whole one is answered meanwhile, and they are ended before long.
    let half =
        "for n in $(seq 200); do exec {fd}<>/dev/tcp/127.0.0.1/9810; printf 'GET /me' >&$fd; done; echo; cat <&$fd";
    let mut command = lab.command(Ns::Host, &["bash", "-c", half]);
    let mut slow = Running(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap());
    let open = || lab.shown(&["ss", "-Htn", "state", "established", "sport = :9810"]).lines().count();
    assert!(poll(PATIENCE, || (open() >= 200).then_some(())).is_some(), "{} are open", open());
    let begun = Instant::now();
    wait_for(&lab, 9810);
    assert!(begun.elapsed().as_secs() < 3, "half requests hold up whole ones");
    assert!(poll(PATIENCE, || (open() == 0).then_some(())).is_some(), "{} slow requests stay", open());
    slow.0.wait().unwrap();
    // A session that cannot be read is counted; the others are told.
    lab.host(&["rm", &format!("{}/maps/request", lab.pins().join("default").display())]);
    wait_for(&lab, 9810);
    lab::signal(server.0.id(), "TERM");
    let ended = poll(PATIENCE, || server.0.try_wait().unwrap()).expect("SIGTERM ends it");
    assert!(ended.success(), "{ended}");
}

#[test]
fn a_socket_of_systemd_is_taken_and_watch_serves_too() {
    let lab = lab_up(1, &[]);
    let activate = ["systemd-socket-activate", "-l", "127.0.0.1:9811"];
    if Command::new(activate[0]).arg("--version").output().is_ok() {
        let _server = start(&lab, &[&activate[..], &[SNIFCTL, "metrics", "--listen", "203.0.113.1:1"]].concat());
        assert!(wait_for(&lab, 9811).contains("snifctl_session_info{session=\"default\""));
    }
    let watch = Watcher::start(&lab, &["--metrics", "127.0.0.1:9812"]);
    assert!(wait_for(&lab, 9812).contains("snifctl_session_info{session=\"default\""));
    let (status, log) = watch.end("TERM");
    assert!(status.success(), "{log}");
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The names of our metrics in an expression.
fn names(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("snifctl_")).map(String::from).collect()
}

/// The names of all metrics that there are.
fn existing() -> BTreeSet<String> {
    let lab = Lab::roomy();
    let text = lab.said(&["metrics"]).quietly_ok().stdout;
    let families = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    families
        .flat_map(|family| match family.split_once(' ').unwrap() {
            (name, "histogram") => ["bucket", "sum", "count"].map(|end| format!("{name}_{end}")).to_vec(),
            (name, _) => vec![name.to_string()],
        })
        .collect()
}

fn promtool(argv: &[&str], input: Option<&str>) {
    let mut command = Command::new("promtool");
    command.args(argv).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("promtool, of the package prometheus");
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), input.unwrap_or_default().as_bytes()).unwrap();
    let said = child.wait_with_output().unwrap();
    assert!(
        said.status.success(),
        "{argv:?}: {}{}",
        String::from_utf8_lossy(&said.stdout),
        String::from_utf8_lossy(&said.stderr)
    );
}

#[test]
fn the_dashboard_and_the_rules_ask_for_metrics_that_there_are_in_forms_that_are_understood() {
    let existing = existing();
    assert_eq!(existing.len(), 30, "{existing:?}");
    let rules = root().join("deploy/prometheus/snifctl.rules.yml");
    promtool(&["check", "rules", rules.to_str().unwrap()], None);
    promtool(&["check", "config", root().join("deploy/prometheus/prometheus.yml").to_str().unwrap()], None);
    let text = fs::read_to_string(&rules).unwrap();
    assert!(names(&text).is_subset(&existing), "{:?}", names(&text));

    let text = fs::read_to_string(root().join("deploy/grafana/snifctl.json")).unwrap();
    let board: Value = serde_json::from_str(&text).unwrap();
    let variables = board["templating"]["list"].as_array().unwrap();
    let named: Vec<&str> = variables.iter().map(|variable| variable["name"].as_str().unwrap()).collect();
    assert_eq!(named, ["datasource", "instance", "session"]);
    let source = serde_json::json!({ "type": "prometheus", "uid": "${datasource}" });
    assert!(variables[1..].iter().all(|variable| variable["datasource"] == source));
    let panels = board["panels"].as_array().unwrap();
    let (rows, panels): (Vec<&Value>, Vec<&Value>) = panels.iter().partition(|panel| panel["type"] == "row");
    let titles: Vec<&str> = rows.iter().map(|row| row["title"].as_str().unwrap()).collect();
    assert_eq!(titles, ["Taps", "Remotes", "Drops by reason", "Sizes"]);
    let ids: BTreeSet<u64> = rows.iter().chain(&panels).map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), rows.len() + panels.len(), "a panel's id twice");
    let mut asked = BTreeSet::new();
    let mut expressions = String::from("groups:\n- name: dashboard\n  rules:\n");
    for panel in panels {
        let title = panel["title"].as_str().unwrap();
        assert_eq!(panel["datasource"], source, "{title}");
        assert!(panel["fieldConfig"]["defaults"]["unit"].as_str().is_some_and(|unit| !unit.is_empty()), "{title}");
        assert!(panel["description"].as_str().is_some_and(|text| text.ends_with('.')), "{title}");
        let place = &panel["gridPos"];
        assert!(place["x"].as_u64().unwrap() + place["w"].as_u64().unwrap() <= 24, "{title}");
        for target in panel["targets"].as_array().unwrap() {
            assert_eq!(target["datasource"], source, "{title}");
            let expression = target["expr"].as_str().unwrap();
            let of_all = expression.contains("snifctl_collection_errors_total");
            assert!(expression.contains("instance=~\"$instance\""), "{title}: {expression}");
            assert!(of_all || expression.contains("session=~\"$session\""), "{title}: {expression}");
            asked.extend(names(expression));
            let plain =
                expression.replace("$__rate_interval", "1m").replace("$instance", ".*").replace("$session", ".*");
            assert!(!plain.contains('$'), "{title}: {expression}");
            let quoted = serde_json::to_string(&plain).unwrap();
            expressions +=
                &format!("  - record: panel:{}\n    expr: {quoted}\n", asked.len() * 100 + expressions.len());
        }
    }
    let of_info: BTreeSet<String> = existing.difference(&asked).cloned().collect();
    assert!(asked.is_subset(&existing) && of_info.is_empty(), "{asked:?}, not shown: {of_info:?}");
    let variables = variables.iter().filter_map(|variable| variable["definition"].as_str());
    assert!(variables.flat_map(names).all(|name| existing.contains(&name)));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dashboard.yml");
    fs::write(&file, expressions).unwrap();
    promtool(&["check", "rules", file.to_str().unwrap()], None);
}

#[test]
fn prometheus_takes_the_metrics_and_its_alerts_come() {
    let lab = lab_of(1);
    know(&lab, remote(0));
    said_up(&lab, &listed(&remotes(1)), &[]).ok();
    promtool(&["check", "metrics"], Some(&lab.said(&["metrics"]).quietly_ok().stdout));
    let _server = start(&lab, &[SNIFCTL, "metrics", "--listen", "9810"]);
    wait_for(&lab, 9810);
    let shipped = fs::read_to_string(root().join("deploy/prometheus/prometheus.yml")).unwrap();
    let config = lab.dir().join("prometheus.yml");
    fs::write(&config, shipped.replace("_interval: 15s", "_interval: 200ms")).unwrap();
    fs::copy(root().join("deploy/prometheus/snifctl.rules.yml"), lab.dir().join("snifctl.rules.yml")).unwrap();
    let (config, data) = (
        format!("--config.file={}", config.display()),
        format!("--storage.tsdb.path={}", lab.dir().join("tsdb").display()),
    );
    let _prometheus = start(&lab, &["prometheus", &config, &data, "--web.listen-address=127.0.0.1:9090"]);
    let query = |expression: &str| {
        let said = lab.try_host(&["promtool", "query", "instant", "http://127.0.0.1:9090", expression]);
        String::from_utf8_lossy(&said.stdout).into_owned()
    };
    let wait = |expression: &str, part: &str| {
        let found = poll(3 * PATIENCE, || Some(query(expression)).filter(|text| text.contains(part)));
        found.unwrap_or_else(|| panic!("{expression} never has {part:?}: {:?}", query(expression)))
    };
    wait("snifctl_session_info", "tunnel=\"gre\"");
    lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, 17));
    wait("sum(snifctl_tap_copies_packets_total) == 17", "=> 17");
    wait("sum(snifctl_remote_sent_packets_total) == 17", "=> 17");
    wait("histogram_quantile(1, snifctl_copy_size_bytes_bucket)", "=> ");
    assert_eq!(query("ALERTS").trim(), "", "an alert without a cause");

    lab.host(&["tc", "filter", "del", "dev", "eth0", "egress"]);
    lab.said(&["remote", "add", "203.0.113.9"]).ok();
    let pending = wait("ALERTS{alertname=\"SnifctlTapDetached\"}", "device=\"eth0\"");
    assert!(pending.contains("direction=\"egress\"") && pending.contains("alertstate=\"pending\""), "{pending}");
    wait("ALERTS{alertname=\"SnifctlRemoteDown\"}", "remote=\"203.0.113.9\"");
    lab.send(Ns::Peer, "peer0", &frames::series(&Ends::PEER_TO_HOST, 17));
    wait("ALERTS{alertname=\"SnifctlDrops\"}", "session=\"default\"");
    lab.said(&["down"]).ok();
    wait("ALERTS{alertname=\"SnifctlNoSession\"}", "instance=\"127.0.0.1:9810\"");
    let rules = answer(&lab, 9090, r"GET /api/v1/rules HTTP/1.0\r\n\r\n");
    assert_eq!(rules.matches("\"health\":\"ok\"").count(), 5, "{rules}");
}
