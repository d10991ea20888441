//! Pods: found by name and label, by kubectl and their cgroups, and followed by `watch` as they come and go.

use crate::lab;
use crate::lab::cluster::{Cluster, Driver, Process, Told};
use crate::lab::status::{Session, Status};
use crate::lab::watcher::{SOON, Watcher};
use crate::lab::{COLLECTOR_IP, Lab, poll};

/// Says something to snifctl with a home of its own for kubectl.
fn said(lab: &Lab, cluster: &Cluster, words: &[&str]) -> lab::judge::Said {
    lab.said_by(&["env", &cluster.home()], words)
}

#[track_caller]
fn up(lab: &Lab, cluster: &Cluster, words: &[&str]) -> String {
    let flags = cluster.flags();
    let remote = COLLECTOR_IP.to_string();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let words = [&["up", "--tunnel", "gre", "--remote", &remote, "--filter", "icmp"], words, &flags].concat();
    said(lab, cluster, &words).ok().stderr
}

/// The session; a watch may be at work on it, which is waited for.
#[track_caller]
fn session(lab: &Lab) -> Session {
    Status::of(lab.said(&["status", "--json"]).ok().json()).sessions.swap_remove(0)
}

/// The interfaces that are watched, and there.
fn watched(lab: &Lab) -> Vec<String> {
    let taps = session(lab).taps;
    let mut all: Vec<String> = taps.iter().filter(|tap| tap.attached).map(|tap| tap.interface.clone()).collect();
    all.dedup();
    all
}

#[track_caller]
fn wait_watched(lab: &Lab, watch: &Watcher, expected: &[&str]) {
    let is_so = poll(SOON, || (watched(lab) == expected).then_some(()));
    assert!(is_so.is_some(), "{expected:?}, not {:?}:\n{}", watched(lab), watch.log());
}

/// Two pings of the node by the pod: so many copies more.
#[track_caller]
fn assert_copied(lab: &Lab, pod: &Process, interface: &str) {
    let count = || {
        let taps = session(lab).taps;
        taps.iter().filter(|tap| tap.interface == interface).map(|tap| tap.counts.stat.pcnt).sum::<u64>()
    };
    let before = count();
    pod.run(&["ping", "-c", "2", "-i", "0.01", "-W", "5", "10.42.0.1"]);
    let copied = poll(lab::PATIENCE, || (count() == before + 4).then_some(()));
    assert!(copied.is_some(), "{interface}: {before} became {}", count());
}

#[test]
fn pods_containers_and_processes_are_found_and_what_cannot_be_is_refused() {
    let lab = Lab::roomy();
    let cluster = Cluster::start(&lab);
    let (web, cache) =
        (Told::new("web-1", &[("app", "web")]), Told::new("cache", &[("app", "cache"), ("tier", "back")]));
    // What has the pod's cgroup before its first container, in the node's network: a container's monitor, and a runtime that
    // has not joined the pod's yet.
    let node = lab.ns_path(lab::Ns::Host);
    let _monitor = Process::of_pod(&lab, &web, Driver::Monitor, Some(&node));
    let _runtime = Process::of_pod(&lab, &web, Driver::Systemd, Some(&node));
    let web_at = Process::of_pod(&lab, &web, Driver::Systemd, None);
    let cache_at = Process::of_pod(&lab, &cache, Driver::Cgroupfs, None);
    // Another container of the pod, whose namespace is the pod's.
    let _second = Process::of_pod(&lab, &cache, Driver::Cgroupfs, Some(&cache_at.netns()));
    let plain = Process::of_container(&lab);
    web_at.join(&lab, "veth-web", "10.42.0.2");
    cache_at.join(&lab, "veth-cache", "10.42.0.3");
    plain.join(&lab, "veth-plain", "10.42.0.4");
    // Others, which are none of this node's, or of no use here.
    let host = Told { host_network: true, ..Told::new("proxy", &[("app", "web")]) };
    let _host_at = Process::of_pod(&lab, &host, Driver::Systemd, Some(&node));
    let ended = Told { phase: "Succeeded".into(), ..Told::new("job", &[("app", "web")]) };
    let far = Told { node: "node-2".into(), ..Told::new("far", &[("app", "web")]) };
    let other = Told { namespace: "other".into(), ..Told::new("web-9", &[("app", "web")]) };
    [&web, &cache, &host, &ended, &far, &other].into_iter().for_each(|pod| cluster.tell(pod));

    let told = up(&lab, &cluster, &["--pods", "app=web", "--namespace", "shop"]);
    assert!(told.contains("pod shop/proxy is in its node's network: watch an interface of the node"), "{told}");
    assert_eq!(watched(&lab), ["pod:shop/web-1/eth0"]);
    assert_copied(&lab, &web_at, "pod:shop/web-1/eth0");
    let add = |words: &[&str]| said(&lab, &cluster, &[&["tap", "add"], words].concat());
    add(&["--pod", "shop/cache"]).ok();
    add(&["--container", &plain.id[..12]]).ok();
    let mut all = watched(&lab);
    all.sort();
    let container = format!("container:{}/eth0", &plain.id[..12]);
    assert_eq!(all, [container.as_str(), "pod:shop/cache/eth0", "pod:shop/web-1/eth0"]);
    assert_copied(&lab, &cache_at, "pod:shop/cache/eth0");
    assert_copied(&lab, &plain, &container);
    assert_eq!(session(&lab).drops(), 0);

    let node = lab::cluster::NODE;
    add(&["--pod", "shop/no-such"]).refused(1, "IFACE pod:shop/no-such/*", "-o wide");
    add(&["--pod", "shop/far"]).refused(1, &format!("no pod far in shop on node {node}"), "-o wide");
    add(&["--pod", "shop/proxy"]).refused(1, "in its node's network", "--filter 'port 8080'");
    add(&["--pod", "web"]).refused(2, "--pod web", "--pod shop/web-1");
    add(&["--container", "ffffffffffff"]).refused(1, "no process is in a container ffffffffffff", "crictl ps");
    // Where nobody answers, what is watched stays.
    cluster.is_away(true);
    let told = said(&lab, &cluster, &["sync"]).ok();
    assert!(
        told.stderr.contains("pods:shop/app=web: ") && told.stderr.contains("what is watched stays so"),
        "{told:?}"
    );
    assert_eq!(watched(&lab).len(), 3);
    assert_eq!(said(&lab, &cluster, &["status", "--check"]).quietly_ok().stdout, "");
    cluster.is_away(false);
    assert_eq!(said(&lab, &cluster, &["sync"]).ok().stdout, "");
    said(&lab, &cluster, &["down"]).quietly_ok();
    assert!(!web_at.run(&["ip", "-br", "link"]).contains("snif"));
}

#[test]
fn pods_are_followed_as_they_come_change_and_go() {
    let lab = Lab::roomy();
    let cluster = Cluster::start(&lab);
    let old = Told::new("web-1", &[("app", "web")]);
    let mut old_at = Some(Process::of_pod(&lab, &old, Driver::Systemd, None));
    old_at.as_ref().unwrap().join(&lab, "veth-1", "10.42.0.2");
    cluster.tell(&old);
    up(&lab, &cluster, &["--pods", "app=web,tier!=test", "--namespace", "shop", "--max-taps", "3"]);
    let watch = Watcher::start_by(&lab, &["env", &cluster.home()], &["--interval", "600"]);
    wait_watched(&lab, &watch, &["pod:shop/web-1/eth0"]);

    // Told before it has a process, which comes without an event.
    let new = Told { phase: "Pending".into(), ..Told::new("web-2", &[("app", "web")]) };
    cluster.tell(&new);
    let new_at = Process::of_pod(&lab, &new, Driver::Cgroupfs, None);
    new_at.join(&lab, "veth-2", "10.42.0.3");
    wait_watched(&lab, &watch, &["pod:shop/web-1/eth0", "pod:shop/web-2/eth0"]);
    assert_copied(&lab, &new_at, "pod:shop/web-2/eth0");

    // Labels change, twice told the same.
    let out = Told { labels: vec![("app".into(), "web".into()), ("tier".into(), "test".into())], ..new.clone() };
    cluster.tell(&out);
    cluster.tell(&out);
    wait_watched(&lab, &watch, &["pod:shop/web-1/eth0"]);
    cluster.tell(&new);
    wait_watched(&lab, &watch, &["pod:shop/web-1/eth0", "pod:shop/web-2/eth0"]);

    // The same name, another pod: its counters go on.
    let before = session(&lab).taps[0].counts.stat.pcnt;
    old_at = None;
    cluster.forget(&old);
    let again = Told::new("web-1", &[("app", "web")]);
    let again_at = Process::of_pod(&lab, &again, Driver::Systemd, None);
    again_at.join(&lab, "veth-3", "10.42.0.2");
    cluster.tell(&again);
    wait_watched(&lab, &watch, &["pod:shop/web-1/eth0", "pod:shop/web-2/eth0"]);
    assert_copied(&lab, &again_at, "pod:shop/web-1/eth0");
    assert!(old_at.is_none() && session(&lab).taps[0].counts.stat.pcnt >= before);

    // The API server is away: mirrors run on, and a pod that gets another sandbox is followed. kubectl is killed: it is
    // started again.
    let said_before = watch.log().lines().count();
    cluster.is_away(true);
    assert_copied(&lab, &again_at, "pod:shop/web-1/eth0");
    watch.wait_said(said_before, &format!("--field-selector=spec.nodeName={}` has ended", lab::cluster::NODE));
    drop(again_at);
    wait_watched(&lab, &watch, &["pod:shop/web-2/eth0"]);
    let again_at = Process::of_pod(&lab, &again, Driver::Systemd, None);
    again_at.join(&lab, "veth-6", "10.42.0.2");
    wait_watched(&lab, &watch, &["pod:shop/web-1/eth0", "pod:shop/web-2/eth0"]);
    assert_copied(&lab, &again_at, "pod:shop/web-1/eth0");
    cluster.is_away(false);
    let pid = poll(SOON, || kubectl(&lab, &watch)).expect("kubectl runs again");
    lab::signal(pid, "KILL");
    let third = Told::new("web-3", &[("app", "web")]);
    let third_at = Process::of_pod(&lab, &third, Driver::Systemd, None);
    third_at.join(&lab, "veth-4", "10.42.0.4");
    cluster.tell(&third);
    let all = ["pod:shop/web-1/eth0", "pod:shop/web-2/eth0", "pod:shop/web-3/eth0"];
    wait_watched(&lab, &watch, &all);

    // More than are allowed are told, and left alone.
    let fourth = Told::new("web-4", &[("app", "web")]);
    let fourth_at = Process::of_pod(&lab, &fourth, Driver::Cgroupfs, None);
    fourth_at.join(&lab, "veth-5", "10.42.0.5");
    let said_before = watch.log().lines().count();
    cluster.tell(&fourth);
    watch.wait_said(said_before, "they match 1 interfaces more than the 3 of --max-taps");
    assert_eq!(watched(&lab), all);
    drop(third_at);
    cluster.forget(&third);
    wait_watched(&lab, &watch, &["pod:shop/web-1/eth0", "pod:shop/web-2/eth0", "pod:shop/web-4/eth0"]);
    drop(watch);
    said(&lab, &cluster, &["down"]).quietly_ok();
}

/// So many pods, or what SNIFCTL_PODS says: 100 in `make soak`.
const LIVES: usize = 20;

#[test]
fn pods_that_come_together_and_go_together_are_each_watched() {
    const AT_ONCE: usize = 10;
    let lives = std::env::var("SNIFCTL_PODS").map_or(LIVES, |text| text.parse().expect("a number"));
    let lab = Lab::roomy();
    let cluster = Cluster::start(&lab);
    let first = Told::new("lasting", &[("app", "web")]);
    let first_at = Process::of_pod(&lab, &first, Driver::Systemd, None);
    first_at.join(&lab, "veth-lasting", "10.42.0.250");
    cluster.tell(&first);
    up(&lab, &cluster, &["--pods", "app=web", "--namespace", "*"]);
    let watch = Watcher::start_by(&lab, &["env", &cluster.home()], &["--interval", "600"]);
    for batch in 0..lives / AT_ONCE {
        let pod = |n: usize| {
            let pod = Told::new(&format!("web-{batch}-{n}"), &[("app", "web")]);
            let at = Process::of_pod(&lab, &pod, [Driver::Systemd, Driver::Cgroupfs][n % 2], None);
            at.join(&lab, &format!("veth-{n}"), &format!("10.42.0.{}", n + 2));
            cluster.tell(&pod);
            (pod, at)
        };
        let pods: Vec<(Told, Process)> = (0..AT_ONCE).map(pod).collect();
        let names = || pods.iter().map(|(pod, _)| format!("pod:shop/{}/eth0", pod.name));
        let all_watched = || {
            let watched = watched(&lab);
            names().all(|name| watched.contains(&name)).then_some(())
        };
        assert!(poll(SOON, all_watched).is_some(), "not all are watched: {:?}\n{}", watched(&lab), watch.log());
        let copies = || session(&lab).taps.iter().map(|tap| tap.counts.stat.pcnt).sum::<u64>();
        let before = copies();
        for (_, at) in &pods {
            at.run(&["ping", "-c", "1", "-W", "5", "10.42.0.1"]);
        }
        let expected = before + 2 * AT_ONCE as u64;
        let copied = poll(lab::PATIENCE, || (copies() == expected).then_some(()));
        assert!(copied.is_some(), "{expected} copies, not {}", copies());
        pods.iter().for_each(|(pod, _)| cluster.forget(pod));
        drop(pods);
        wait_watched(&lab, &watch, &["pod:shop/lasting/eth0"]);
    }
    assert_copied(&lab, &first_at, "pod:shop/lasting/eth0");
    // Those that have gone go out of the session a little later.
    let check = || said(&lab, &cluster, &["status", "--check"]);
    let is_right = poll(lab::PATIENCE, || check().status.success().then_some(()));
    assert!(is_right.is_some(), "{:#?}\n{}", check(), watch.log());
    said(&lab, &cluster, &["down"]).quietly_ok();
}

/// The kubectl of a watch.
fn kubectl(_lab: &Lab, watch: &Watcher) -> Option<u32> {
    let out = std::process::Command::new("pgrep").args(["-P", &watch.pid(), "-f", "kubectl"]).output().ok()?;
    String::from_utf8_lossy(&out.stdout).lines().next()?.trim().parse().ok()
}
