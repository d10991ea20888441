//! The container images, run by runc as Kubernetes would run a DaemonSet's pod: in the host's network (here the lab's), with
//! a root that cannot be written, few rights, and the host's bpffs. Not part of `cargo test`: `make test-images` builds the
//! images first.

mod lab;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

use lab::capture::Direction;
use lab::check::assert_same_frames;
use lab::decode::{decap_gre, inner_frames};
use lab::frames::{self, Ends};
use lab::{Lab, Ns};

const MIB: u64 = 1 << 20;
/// What the DaemonSet holds.
const RIGHTS: [&str; 5] = ["CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON", "CAP_SYS_ADMIN", "CAP_SYS_PTRACE"];
const UP: &str = "up eth0 --tunnel gre --remote 198.51.100.2";

fn place(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/images").join(name)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_string()
}

fn buildah(args: &[&str]) -> String {
    let mut command = Command::new("buildah");
    command.arg("--root").arg(place("storage")).arg("--runroot").arg(place("run")).args(["--storage-driver", "vfs"]);
    let out = command.args(args).output().expect("run buildah");
    assert!(out.status.success(), "buildah {args:?}: {}", text(&out.stderr));
    text(&out.stdout)
}

/// A container's root of an image, gone when it is dropped.
struct Image {
    container: String,
    root: PathBuf,
}

impl Image {
    fn new(tag: &str) -> Image {
        let container = buildah(&["from", "--pull-never", &format!("localhost/snifctl:{tag}")]);
        let root = PathBuf::from(buildah(&["mount", &container]));
        Image { container, root }
    }

    fn size(&self) -> u64 {
        let out = Command::new("du").args(["-s", "--block-size=1"]).arg(&self.root).output().expect("run du");
        text(&out.stdout).split_whitespace().next().and_then(|size| size.parse().ok()).expect("a size")
    }

    fn has(&self, path: &str) -> bool {
        self.root.join(path).exists()
    }

    /// Runs snifctl in a new container, as one of this lab's host.
    fn try_run(&self, lab: &Lab, line: &str) -> Output {
        let bundle = tempfile::tempdir_in(lab.dir()).expect("a bundle");
        let words: Vec<&str> = line.split(' ').collect();
        let config = config(&self.root, &lab.ns_path(Ns::Host), &[&["/usr/bin/snifctl"], &words[..]].concat());
        fs::write(bundle.path().join("config.json"), config.to_string()).unwrap();
        let id = format!("{}-{}", lab.ns_name(Ns::Host), bundle.path().file_name().unwrap().to_string_lossy());
        let mut runc = Command::new("runc");
        runc.arg("--root").arg(lab.dir().join("runc")).args(["run", "--no-new-keyring", "--bundle"]);
        runc.arg(bundle.path()).arg(id).output().expect("run runc")
    }

    #[track_caller]
    fn run(&self, lab: &Lab, line: &str) -> String {
        let out = self.try_run(lab, line);
        assert!(out.status.success(), "{line}: {}\n{}\n{}", out.status, text(&out.stdout), text(&out.stderr));
        text(&out.stdout)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let storage = [("--root", place("storage")), ("--runroot", place("run"))];
        let mut command = Command::new("buildah");
        for (option, at) in storage {
            command.arg(option).arg(at);
        }
        let _ = command.args(["--storage-driver", "vfs", "rm", &self.container]).output();
    }
}

/// What kubelet asks a runtime for: hostNetwork, hostPID, readOnlyRootFilesystem, bpffs by hostPath.
fn config(root: &Path, network: &Path, args: &[&str]) -> Value {
    let mount = |to: &str, kind: &str, from: &str, options: &[&str]| json!({ "destination": to, "type": kind, "source": from, "options": options });
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": args,
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "capabilities": { "bounding": RIGHTS, "effective": RIGHTS, "permitted": RIGHTS },
            "noNewPrivileges": true,
        },
        "root": { "path": root, "readonly": true },
        "mounts": [
            mount("/proc", "proc", "proc", &[]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "mode=755", "size=64k"]),
            mount("/sys", "none", "/sys", &["rbind", "ro"]),
            mount("/sys/fs/bpf", "none", "/sys/fs/bpf", &["rbind", "rw"]),
            mount("/tmp", "tmpfs", "tmpfs", &["nosuid", "nodev", "mode=1777"]),
        ],
        "linux": {
            "namespaces": [{ "type": "mount" }, { "type": "ipc" }, { "type": "uts" }, { "type": "network", "path": network }],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}

#[test]
fn the_slim_image_mirrors_without_clang_as_a_daemonset() {
    let (image, lab) = (Image::new("latest"), Lab::new());
    let before = lab.machine();
    assert!(!image.has("usr/bin/clang") && image.has("usr/lib/snifctl/objects"));
    image.run(&lab, UP);
    let sent = frames::series(&Ends::PEER_TO_HOST, 97);
    let mut collector = lab.capture(Ns::Collector, "col0", Direction::In);
    lab.send(Ns::Peer, "peer0", &sent);
    let copies = inner_frames(&decap_gre(&collector.take(sent.len())));
    assert_same_frames(&sent, &copies);
    let status: Value = serde_json::from_str(&image.run(&lab, "status --json")).expect("JSON");
    assert_eq!(status["sessions"].as_array().map(Vec::len), Some(1), "{status:#}");
    assert_eq!(lab.session().remotes_total().pcnt, 97);
    image.run(&lab, "status --check");

    // All parts are in the programs: other options replace none of them.
    let programs = lab.program_ids();
    image.run(&lab, &format!("{UP} --snaplen 100 --sample 1/2 --max-rate 10mbit --replace"));
    assert_eq!(lab.program_ids(), programs, "the session knew what its programs can do");

    // Only a filter needs clang, and a lack is told before anything changes.
    for line in ["filter set udp", &format!("{UP} --filter udp --name other")] {
        let refused = image.try_run(&lab, line);
        let said = text(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{line}: {said}");
        assert!(said.contains("clang: missing") && said.ends_with("or the image snifctl:clang"), "{line}: {said}");
    }
    assert_eq!(lab.program_ids(), programs);
    let doctor = image.run(&lab, "doctor");
    assert!(
        doctor.contains("/usr/lib/snifctl/objects has those for kernels from") && doctor.contains(": used"),
        "{doctor}"
    );
    image.run(&lab, "down");
    lab.assert_as_before(&before);
}

#[test]
fn the_image_with_clang_filters_and_goes_on_with_the_others_session() {
    let (slim, clang, lab) = (Image::new("latest"), Image::new("clang"), Lab::new());
    let before = lab.machine();
    slim.run(&lab, UP);
    clang.run(&lab, "filter set udp");
    // Whoever has no clang can take the filter away again.
    slim.run(&lab, "filter clear");
    slim.run(&lab, "status --check");
    slim.run(&lab, "down");
    clang.run(&lab, &format!("{UP} --filter udp"));
    clang.run(&lab, "down");
    lab.assert_as_before(&before);
}

#[test]
fn the_images_are_as_small_as_they_should_be() {
    let base = Command::new("du").args(["-s", "--block-size=1"]).arg(place("base")).output().expect("run du");
    let base: u64 = text(&base.stdout).split_whitespace().next().and_then(|size| size.parse().ok()).expect("a size");
    println!("base: {} MiB", base / MIB);
    for (tag, most) in [("latest", 60), ("k8s", 200), ("clang", 700)] {
        if tag == "k8s" && !place("kubectl").exists() {
            println!("snifctl:k8s: not built, as no kubectl is here");
            continue;
        }
        let image = Image::new(tag);
        assert_eq!(image.has("usr/bin/kubectl"), tag == "k8s");
        let more = image.size().saturating_sub(base) / MIB;
        println!("snifctl:{tag}: {} MiB, {more} MiB of them beside the base", image.size() / MIB);
        assert!(more < most, "snifctl:{tag}: Expected less than {most} MiB beside the base, got {more}");
    }
}
