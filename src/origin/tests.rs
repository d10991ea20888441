use std::fs;
use std::path::Path;

use serde_json::json;

use super::cgroup::{Place, Processes};
use super::*;

const UID: &str = "2b5f8a3e-1111-2222-3333-abcdef012345";

#[test]
fn origins_are_what_they_were_said_to_be() {
    let id = "3f2a91c0ffee".to_string() + &"0".repeat(52);
    for text in [
        "netns:blue",
        "netns:/run/netns/blue",
        "pid:4711",
        "container:3f2a91c0ffee",
        &format!("container:{id}"),
        "pod:shop/web-1",
        "pods:shop/app=web",
        "pods:*/app.kubernetes.io/name=web,tier in (a,b)",
        "pods:shop/",
        "pods:shop/app=web;mirror=yes,x.io/y=",
    ] {
        assert_eq!(text.parse::<Origin>().unwrap().to_string(), text);
    }
    let of_runtime = format!("container:containerd://{id}").parse::<Origin>().unwrap();
    assert_eq!(of_runtime, Origin::Container(id));
    for (text, ends) in [
        ("blue", "pod:shop/web-1/eth0"),
        ("box:blue", "netns:blue/eth0"),
        ("netns:", "/run/netns/blue"),
        ("netns:../x", "/run/netns/blue"),
        ("pid:0", "--pid 4711"),
        ("pid:+7", "--pid 4711"),
        ("container:web", "--container 3f2a91c0ffee"),
        ("pod:web-1", "--pod shop/web-1"),
        ("pod:shop/-x", "--pod shop/web-1"),
        ("pods:app=web", "pods:shop/app=web/eth0"),
        ("pods:shop/-l", "app=web,tier!=test"),
        ("pods:shop/a=b;c", "mirror=yes"),
    ] {
        let said = text.parse::<Origin>().unwrap_err().0;
        assert!(said.ends_with(ends), "{text}: {said}");
    }
}

#[test]
fn cgroups_of_every_runtime_name_their_pod_and_container() {
    let id = "3f2a91c0ffee".to_string() + &"0".repeat(52);
    let systemd = UID.replace('-', "_");
    let of = |text: &str| {
        let Place { pod, mut containers, .. } = Place::of(text);
        assert!(containers.len() < 2, "{text}");
        (pod, containers.pop())
    };
    let (pod, container) = (Some(UID.to_string()), Some(id.clone()));
    for path in [
        format!(
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{systemd}.slice/cri-containerd-{id}.scope"
        ),
        format!("/kubepods.slice/kubepods-pod{systemd}.slice/crio-{id}.scope"),
        format!("/kubepods/besteffort/pod{UID}/{id}"),
        format!("/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{systemd}.slice/docker-{id}.scope/init"),
        format!("/system.slice/containerd.service/kubepods-besteffort-pod{systemd}.slice:cri-containerd:{id}"),
        // As a pod with a cgroup namespace of its own sees its neighbours.
        format!("/../../kubepods-besteffort-pod{systemd}.slice/cri-containerd-{id}.scope"),
        format!("/../../pod{UID}/{id}"),
    ] {
        let expected = (pod.clone(), container.clone());
        assert_eq!(of(&format!("0::{path}\n")), expected, "{path}");
        let hybrid = format!("12:pids:{path}\n1:name=systemd:{path}\n0::/\n");
        assert_eq!(of(&hybrid), expected, "{path}");
    }
    for path in [
        format!("/system.slice/docker-{id}.scope"),
        format!("/docker/{id}"),
        format!("/machine.slice/libpod-{id}.scope/container"),
    ] {
        assert_eq!(of(&format!("0::{path}\n")), (None, container.clone()), "{path}");
    }
    let monitor = format!("0::/kubepods.slice/kubepods-pod{systemd}.slice/crio-conmon-{id}.scope");
    assert_eq!(of(&monitor), (None, None), "the monitor is none of the container's, nor the pod's");
    let (outer, inner) = (id.clone(), "ab".repeat(32));
    let nested = Place::of(&format!("0::/docker/{outer}/kubepods/pod{UID}/{inner}"));
    assert_eq!((nested.pod, nested.containers, nested.depth), (pod, vec![outer, inner], 5));
    // What users name is none of a runtime's; what they run inside a container is the container's.
    for path in
        [format!("kubepods/pod{UID}/{id}"), format!("kubepods-pod{systemd}.slice"), format!("docker-{id}.scope")]
    {
        let users = format!("0::/user.slice/user-1000.slice/user@1000.service/{path}");
        assert_eq!(of(&users), (None, None), "{users}");
        assert_eq!(of(&users.replace("::/", "::/../../")), (None, None), "{users}");
        let inside = users.replace("::/", &format!("::/machine.slice/libpod-{id}.scope/"));
        assert_eq!(of(&inside), (None, container.clone()), "{inside}");
    }
    for none in ["", "0::/", "0::/user.slice/user-0.slice", "garbage", "0::/podman", "0::/x/pod12345678-1234"] {
        assert_eq!(of(none), (None, None), "{none}");
    }
}

/// A process in a directory that stands for /proc.
fn process(proc: &Path, pid: u32, begun: u64, cgroup: &str, lives: bool) {
    let dir = proc.join(pid.to_string());
    fs::create_dir_all(dir.join("ns")).unwrap();
    fs::write(dir.join("cgroup"), cgroup).unwrap();
    let before = (3..22).map(|n| format!("{n} ")).collect::<String>();
    fs::write(dir.join("stat"), format!("{pid} (a) b) {before}{begun} 23\n")).unwrap();
    if lives {
        fs::write(dir.join("ns/net"), "").unwrap();
        // One of our own network namespace.
        if cgroup.contains("ours") {
            fs::remove_file(dir.join("ns/net")).unwrap();
            fs::hard_link(proc.join("self-net"), dir.join("ns/net")).unwrap();
        }
    }
}

#[test]
fn of_a_pod_the_first_process_counts_and_none_that_has_ended() {
    let proc = tempfile::tempdir().unwrap();
    let id = |n: u8| format!("{n:02x}").repeat(32);
    let of = |n| format!("0::/kubepods/pod{UID}/{}\n", id(n));
    process(proc.path(), 900, 50, &of(1), true);
    process(proc.path(), 70, 80, &of(2), true);
    process(proc.path(), 60, 10, &of(1), false);
    process(proc.path(), 5, 5, "0::/init.scope\n", true);
    // A container inside, and one that has not joined its namespace yet.
    process(proc.path(), 8, 8, &format!("0::/kubepods/pod{UID}/{}/{}\n", id(1), id(3)), true);
    fs::write(proc.path().join("self-net"), "").unwrap();
    let own = fs::metadata(proc.path().join("self-net")).unwrap().ino();
    process(proc.path(), 7, 7, &format!("1:name=ours:/\n{}", of(2)), true);
    process(proc.path(), 6, 6, &format!("1:name=ours:/\n0::/kubepods/podaaaaaaaa/{}\n", id(4)), true);
    fs::create_dir(proc.path().join("999")).unwrap();
    fs::write(proc.path().join("uptime"), "").unwrap();
    let processes = Processes::read(proc.path(), own);
    assert_eq!(processes.of_pod(UID), Some(900));
    assert_eq!(processes.of_pod("other"), None);
    assert_eq!(processes.of_pod("aaaaaaaa"), None, "it is still where it was started");
    assert_eq!(processes.of_container(&id(3)), [(id(3).as_str(), 8)]);
    assert_eq!(processes.of_container(&id(1)[..12]), [(id(1).as_str(), 900)]);
    assert_eq!(processes.of_container(&id(2)), [(id(2).as_str(), 70)]);
    assert_eq!(processes.of_container("0").len(), 4, "what several begin with");
    assert!(processes.of_container("ff").is_empty());
}

#[test]
fn pods_are_read_leniently() {
    let pod = |item: serde_json::Value| kube::pod(&item);
    let whole = pod(json!({"metadata": {"name": "web-1", "namespace": "shop", "uid": UID,
        "annotations": {"kubernetes.io/config.hash": "0123456789abcdef", "odd": 7}},
        "spec": {"hostNetwork": true, "new": []}, "status": {"phase": "Running"}}))
    .unwrap();
    assert_eq!(whole.uids, [UID, "0123456789abcdef"]);
    assert!(whole.host_network && whole.runs && whole.annotations.len() == 1);
    let least = pod(json!({"metadata": {"name": "a", "namespace": "b"}, "status": {"phase": "Succeeded"}})).unwrap();
    assert!(!least.runs && !least.host_network && least.uids.is_empty());
    for odd in [json!({}), json!(null), json!({"metadata": {"name": 7, "namespace": "b"}})] {
        assert_eq!(pod(odd), None);
    }
}
