//! The Debian package in a fresh root: what it brings, what it does to mirrors when it is upgraded, removed and purged. Not
//! part of `cargo test`: `make test-package` builds the package first.

mod lab;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use lab::{Lab, Ns};

fn place(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target").join(name)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
fn succeed(command: &mut Command) -> String {
    let out = command.output().unwrap_or_else(|err| panic!("could not start {command:?}: {err}"));
    assert!(out.status.success(), "{command:?}: {}\n{}\n{}", out.status, text(&out.stdout), text(&out.stderr));
    text(&out.stdout)
}

fn deb() -> PathBuf {
    let files = fs::read_dir(place("debian")).expect("target/debian; try: make test-package").flatten();
    let debs = files.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "deb"));
    debs.max_by_key(|path| path.metadata().and_then(|meta| meta.modified()).ok()).expect("a package; try: make deb")
}

/// A copy of a minimal root, gone when it is dropped.
struct Root(tempfile::TempDir);

impl Root {
    fn new() -> Root {
        let base = place("package-root");
        succeed(Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/package/root")).arg(&base));
        let dir = tempfile::Builder::new().prefix("snif").tempdir_in(place("")).expect("a directory");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("root's mode");
        succeed(Command::new("cp").arg("-a").arg(base.join(".")).arg(dir.path()));
        succeed(Command::new("cp").arg("/etc/resolv.conf").arg(dir.path().join("etc/resolv.conf")));
        Root(dir)
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    /// Runs a shell's line in the root, with mounts that go with it; in the lab's host namespace, if one is given.
    fn run(&self, lab: Option<&Lab>, line: &str) -> Output {
        let mut command = Command::new("nsenter");
        command.args(lab.map(|lab| format!("--net={}", lab.ns_path(Ns::Host).display())));
        let mounts =
            "for dir in proc sys dev; do mount --rbind /$dir \"$0/$dir\"; done; exec chroot \"$0\" sh -ec \"$1\"";
        command.args(["--", "unshare", "--mount", "sh", "-ec", mounts]).arg(self.0.path()).arg(line);
        command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C").env_remove("NOTIFY_SOCKET");
        command.output().expect("run in the root")
    }

    #[track_caller]
    fn ok(&self, lab: Option<&Lab>, line: &str) -> String {
        let out = self.run(lab, line);
        assert!(out.status.success(), "{line}: {}\n{}\n{}", out.status, text(&out.stdout), text(&out.stderr));
        text(&out.stdout)
    }
}

/// The same package with a higher version.
fn newer(deb: &Path, root: &Root) {
    let dir = root.path("tmp/newer");
    succeed(Command::new("dpkg-deb").arg("-R").arg(deb).arg(&dir));
    let control = dir.join("DEBIAN/control");
    let changed = fs::read_to_string(&control).unwrap().replace("\nVersion: ", "\nVersion: 9");
    fs::write(&control, changed).unwrap();
    succeed(Command::new("dpkg-deb").args(["-Znone", "-b"]).arg(&dir).arg(root.path("newer.deb")));
}

/// Where Debian's Wireshark looks.
#[cfg(target_arch = "x86_64")]
const EXTCAP: &str = "usr/lib/x86_64-linux-gnu/wireshark/extcap/snifctl-extcap";
#[cfg(target_arch = "aarch64")]
const EXTCAP: &str = "usr/lib/aarch64-linux-gnu/wireshark/extcap/snifctl-extcap";

const UP: &str = "snifctl up eth0 --tunnel gre --remote 198.51.100.2";

#[test]
fn the_package_is_installed_upgraded_removed_and_purged() {
    // To remove the package takes down whatever mirror there is.
    let others: Vec<_> = fs::read_dir("/sys/fs/bpf/snifctl").into_iter().flatten().flatten().collect();
    assert!(others.is_empty(), "{others:?} are not this test's; try: make test-package");
    let (root, lab, deb) = (Root::new(), Lab::new(), deb());
    let before = lab.machine();
    fs::copy(&deb, root.path("snifctl.deb")).unwrap();
    newer(&deb, &root);
    root.ok(None, "apt-get update -q && apt-get install -q -y --no-install-recommends systemd /snifctl.deb");

    for file in [
        "usr/bin/snifctl",
        "usr/bin/kubectl-snif",
        EXTCAP,
        "usr/share/man/man1/snifctl.1.gz",
        "usr/share/man/man1/snifctl-up.1.gz",
        "usr/share/man/man1/snifctl-tap-add.1.gz",
        "usr/share/bash-completion/completions/snifctl",
        "usr/share/zsh/vendor-completions/_snifctl",
        "usr/share/fish/vendor_completions.d/snifctl.fish",
        "usr/lib/systemd/system/snifctl.service",
        "etc/snifctl.d/example.toml.disabled",
    ] {
        assert!(root.path(file).exists(), "{file}");
    }
    assert!(root.ok(None, &format!("/{EXTCAP} --extcap-interfaces")).contains("{value=snifctl-remote}"));
    assert_eq!(root.ok(None, "dpkg-query -W -f '${Conffiles}' snifctl | grep -c example").trim(), "1");
    assert!(!root.path("etc/systemd/system/multi-user.target.wants/snifctl.service").exists(), "not enabled");
    let said = root.run(None, "systemd-analyze verify snifctl.service 2>&1");
    let said = text(&said.stdout);
    let odd: Vec<&str> =
        said.lines().filter(|line| line.contains("snifctl") && !line.contains("man snifctl")).collect();
    assert!(odd.is_empty(), "{odd:?}");

    // A mirror goes on through an upgrade, with the same programs.
    root.ok(Some(&lab), UP);
    let programs = lab.program_ids();
    assert!(!programs.is_empty());
    root.ok(Some(&lab), "dpkg -i /newer.deb");
    assert_eq!(lab.program_ids(), programs);
    assert!(root.ok(Some(&lab), "snifctl status --json").contains("\"eth0\""));
    assert!(root.path("var/cache/snifctl").exists());

    // Removed from this namespace, it takes down its mirror; and from another one, that of one in which a process runs.
    root.ok(Some(&lab), "dpkg -r snifctl");
    lab.assert_as_before(&before);
    root.ok(Some(&lab), "dpkg -i /snifctl.deb");
    root.ok(Some(&lab), UP);
    root.ok(None, "mkdir -p /run/netns");
    let other = Lab::new();
    root.ok(Some(&other), UP);
    let sleeper = lab.command(Ns::Host, &["sleep", "600"]).spawn();
    let mut sleepers = vec![sleeper.expect("a process in the namespace")];
    root.ok(Some(&other), "dpkg -r snifctl");
    sleepers.iter_mut().for_each(|child| drop(child.kill().and_then(|()| child.wait())));
    lab.assert_as_before(&before);
    assert!(other.program_ids().is_empty());

    // What users have put there goes with purge, and only then.
    fs::write(root.path("etc/snifctl.d/web.toml"), "").unwrap();
    root.ok(None, "dpkg -P snifctl");
    for gone in ["etc/snifctl.d", "var/cache/snifctl", "usr/bin/snifctl", EXTCAP, "usr/share/man/man1/snifctl.1.gz"] {
        assert!(!root.path(gone).exists(), "{gone}");
    }
    assert_eq!(root.ok(None, "dpkg -l snifctl 2>/dev/null | grep -c ^[a-z] || true").trim(), "0");
}

#[test]
fn manual_pages_completions_and_the_package_are_in_order() {
    let dir = tempfile::tempdir().unwrap();
    succeed(Command::new("dpkg-deb").arg("-x").arg(deb()).arg(dir.path()));
    let share = dir.path().join("usr/share");
    let pages = fs::read_dir(share.join("man/man1")).unwrap().flatten().map(|entry| entry.path());
    let pages: Vec<PathBuf> = pages.collect();
    assert!(pages.len() >= 25, "{pages:?}");
    for page in pages {
        let out = Command::new("man").args(["--warnings", "-l"]).arg(&page).env("LC_ALL", "C.UTF-8").output().unwrap();
        assert!(out.status.success() && out.stderr.is_empty(), "{}: {}", page.display(), text(&out.stderr));
    }
    let bash = share.join("bash-completion/completions/snifctl");
    succeed(Command::new("bash").arg("-n").arg(&bash));
    succeed(Command::new("zsh").arg("-n").arg(share.join("zsh/vendor-completions/_snifctl")));
    succeed(Command::new("fish").arg("-n").arg(share.join("fish/vendor_completions.d/snifctl.fish")));
    for (word, completed) in [("ta", "tap"), ("ma", "map"), ("--wa", "--wait")] {
        let script = "source \"$0\"; COMP_WORDS=(snifctl \"$1\"); COMP_CWORD=1; _snifctl snifctl \"$1\" snifctl; \
            echo \"${COMPREPLY[@]}\"";
        let said = succeed(Command::new("bash").args(["-c", script]).arg(&bash).arg(word));
        assert_eq!(said.trim(), completed, "{word}");
    }
    // The address stands for whoever packs it; the package closes no report.
    let suppressed = "bogus-mail-host,bogus-mail-host-in-debian-changelog,initial-upload-closes-no-bugs";
    succeed(
        Command::new("lintian")
            .args(["--allow-root", "--fail-on", "error,warning", "--suppress-tags", suppressed])
            .arg(deb()),
    );
}
