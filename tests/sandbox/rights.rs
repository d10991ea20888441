//! What each capability is for, measured: what fails without it, and that it is asked for before the first change. The table
//! for people is in docs/rights.md.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};

use crate::lab::judge::{Said, UP};
use crate::lab::nobody::{PublicCopy, bounded};
use crate::lab::remotes::{answering, remote, said_up};
use crate::lab::watcher::Watcher;
use crate::lab::{Lab, Ns, PATIENCE, frames, pcap, poll};

/// What makes, changes and takes down a session.
const THREE: [&str; 3] = ["NET_ADMIN", "BPF", "PERFMON"];

/// snifctl as root with these capabilities.
fn said_with(lab: &Lab, caps: &[&str], args: &[&str]) -> Said {
    lab.said_by(&bounded(caps), args)
}

fn words(line: &str) -> Vec<&str> {
    line.split(' ').collect()
}

fn without<'a>(caps: &[&'a str], cap: &str) -> Vec<&'a str> {
    caps.iter().copied().filter(|other| *other != cap).collect()
}

fn grant(cap: &str) -> String {
    format!("try: docker run --cap-add {cap}")
}

/// What a session is looked at with, and what it prints.
const LOOKS: [(&str, &str); 8] = [
    ("status --check", ""),
    ("status", "default: "),
    ("tap list", "eth0"),
    ("remote list", "198.51.100.2"),
    ("export", "[[session]]"),
    ("filter show", "tcp"),
    ("map list", "remote_stats"),
    ("map dump taps", "\"key\":"),
];

/// What changes it, so that it can be looked at in between, and each undoes another.
const EDITS: [&str; 10] = [
    "up eth0 --tunnel gre --remote 198.51.100.2",
    "filter set udp",
    "filter clear",
    "filter set tcp",
    "tap add out0",
    "tap remove out0",
    "remote add 198.51.100.3",
    "remote remove 198.51.100.3",
    "sync",
    "up eth0 --tunnel gre --remote 198.51.100.2 --filter tcp --oversize fragment --replace",
];

#[test]
fn three_capabilities_do_for_everything_and_each_is_asked_for_first() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let file = lab.dir().join("session.toml");
    for line in EDITS {
        let was = lab.machine();
        for cap in THREE {
            let names = format!("snifctl: CAP_{cap} is missing: ");
            said_with(&lab, &without(&THREE, cap), &words(line)).refused(1, &names, &grant(cap));
        }
        assert_eq!(lab.machine(), was, "{line}");
        said_with(&lab, &THREE, &words(line)).ok();
        if line.ends_with("198.51.100.2") {
            lab.assert_copied(1);
        }
    }
    for (line, text) in LOOKS {
        for caps in [&THREE[..], &[]] {
            let said = said_with(&lab, caps, &words(line)).quietly_ok();
            assert!(said.stdout.contains(text), "{line}: {said:#?}");
        }
    }
    let all = said_with(&lab, &THREE, &["map", "dump"]).ok_noting("left out, as they can be read with CAP_SYS_ADMIN");
    assert!(all.stdout.contains("\"taps\"") && !all.stdout.contains("\"bucket\""), "{}", all.stdout);
    fs::write(&file, said_with(&lab, &THREE, &["export"]).quietly_ok().stdout).expect("write");
    let apply = ["apply", "-f", &file.to_string_lossy()];
    said_with(&lab, &THREE, &apply).ok();
    // What it takes down and finds wrong, it puts right.
    let mut watch = Watcher::start_by(&lab, &bounded(&THREE).iter().map(String::as_str).collect::<Vec<_>>(), &[]);
    lab.host(&["tc", "qdisc", "del", "dev", "eth0", "clsact"]);
    lab.host(&["ip", "link", "set", "eth0", "alias", "changed"]);
    watch.wait_until_calm();
    assert_eq!(said_with(&lab, &THREE, &["status", "--check"]).stdout, "");
    watch.end("TERM");
    lab.host(&["ip", "link", "set", "eth0", "alias", ""]);
    said_with(&lab, &["BPF", "PERFMON", "SYS_ADMIN"], &["down"]).refused(1, "CAP_NET_ADMIN is", &grant("NET_ADMIN"));
    let ids = lab.program_ids();
    said_with(&lab, &["NET_ADMIN"], &["down"]).quietly_ok();
    lab.assert_as_before(&before);
    lab.assert_unloaded(&ids);
    said_with(&lab, &THREE, &apply).ok();
    said_with(&lab, &THREE, &["down", "--all"]).quietly_ok();
    lab.assert_as_before(&before);
}

#[test]
fn what_is_asked_for_is_what_the_kernel_wants() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let unchecked = |caps: &[&str], args: &[&str]| {
        let by = [vec!["env".into(), "SNIFCTL_UNCHECKED=1".into()], bounded(caps)].concat();
        lab.said_by(&by, args)
    };
    for cap in THREE {
        let said = unchecked(&without(&THREE, cap), &UP);
        assert_eq!(said.status.code(), Some(1), "{cap}: {said:#?}");
        lab.assert_as_before(&before);
    }
    unchecked(&["NET_ADMIN", "SYS_ADMIN"], &UP).ok();
    assert_eq!(unchecked(&without(&THREE, "NET_ADMIN"), &["down"]).status.code(), Some(1));
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

#[test]
fn a_session_that_was_made_with_sys_admin_is_read_with_it_and_goes_without() {
    let lab = answering(1);
    let before = lab.machine();
    said_up(&lab, &remote(0).to_string(), &[]).ok();
    assert_eq!(lab.managed_neighbours().len(), 1);
    let up = lab.machine();
    for line in
        ["status", "tap list", "remote list", "export", "map dump taps", "filter set udp", "tap add out0", "sync"]
    {
        said_with(&lab, &THREE, &words(line)).refused(
            1,
            "session default: CAP_SYS_ADMIN is missing: ",
            &grant("SYS_ADMIN"),
        );
    }
    assert_eq!(lab.machine(), up);
    let doctor = said_with(&lab, &THREE, &["doctor"]).stdout;
    let row = |name: &str| doctor.lines().find(|line| line.contains(name)).unwrap_or_default().to_string();
    assert!(row("privileges").contains("root without CAP_SYS_ADMIN and CAP_SYS_PTRACE: no taps in "), "{doctor}");
    assert!(row("session ").ends_with(&grant("SYS_ADMIN")), "{doctor}");
    said_with(&lab, &THREE, &["down"]).quietly_ok();
    lab.assert_as_before(&before);
}

#[test]
fn neighbours_are_noted_as_the_session_has_them() {
    let lab = answering(2);
    let before = lab.machine();
    said_up(&lab, &remote(0).to_string(), &[]).ok();
    let notes = || {
        let names = fs::read_dir(lab.pins().join("default/neighbours")).into_iter().flatten().flatten();
        names.count()
    };
    let (second, first) = (remote(1).to_string(), remote(0).to_string());
    for (args, left) in [(["remote", "add", &second], 2), (["remote", "remove", &first], 1)] {
        lab.said(&args).ok();
        assert_eq!((lab.managed_neighbours().len(), notes()), (left, left), "{args:?}");
    }
    // Nothing but the notes tells of the entry.
    fs::remove_file(lab.pins().join("default/maps/request")).expect("a pin");
    lab.said(&["down"]).ok();
    lab.assert_as_before(&before);
}

#[test]
fn what_only_some_need_is_named_where_it_is_needed() {
    let lab = answering(1);
    let before = lab.machine();
    let probed =
        ["up", "eth0", "--tunnel", "gre", "--probe", "icmp", "--remote", &remote(0).to_string()].map(String::from);
    let probed: Vec<&str> = probed.iter().map(String::as_str).collect();
    said_with(&lab, &THREE, &probed).refused(1, "CAP_NET_RAW is missing: ", &grant("NET_RAW"));
    lab.assert_as_before(&before);
    said_with(&lab, &[&THREE[..], &["NET_RAW"]].concat(), &probed).ok();
    said_with(&lab, &THREE, &["sync"]).refused(1, "CAP_NET_RAW is missing: ", &grant("NET_RAW"));
    assert_eq!(said_with(&lab, &THREE, &["status", "--check"]).quietly_ok().stdout, "");
    said_with(&lab, &THREE, &["down"]).quietly_ok();
    lab.assert_as_before(&before);

    // A ping without capabilities of its own may use a socket that the machine leaves to its group.
    let (bin, real) = (lab.dir().join("bin"), lab.shown(&["sh", "-c", "command -v ping"]));
    fs::create_dir(&bin).and_then(|()| fs::copy(real.trim(), bin.join("ping"))).expect("a copy of ping");
    let path = format!("PATH={}:/usr/sbin:/usr/bin:/sbin:/bin", bin.display());
    let by = [vec!["env".into(), path], bounded(&THREE)].concat();
    lab.said_by(&by, &probed).refused(1, "CAP_NET_RAW is missing: ", &grant("NET_RAW"));
    lab.host(&["sysctl", "-qw", "net.ipv4.ping_group_range=0 0"]);
    lab.said_by(&by, &probed).ok();
    assert_eq!(said_with(&lab, &THREE, &["status", "--check"]).quietly_ok().stdout, "");
    said_with(&lab, &THREE, &["down"]).quietly_ok();

    let file = lab.dir().join("test.pcap");
    pcap::write(&file, &frames::series(&frames::Ends::PEER_TO_HOST, 3));
    let test = ["filter", "test", "-r", &file.to_string_lossy(), "--", "udp"];
    let (both, ends) = ("CAP_SETUID or CAP_SETGID is missing", "--cap-add SETUID --cap-add SETGID");
    said_with(&lab, &THREE, &test).refused(1, both, ends);
    said_with(&lab, &[&THREE[..], &["SETUID", "SETGID"]].concat(), &test).quietly_ok();

    said_with(&lab, &THREE, &["demo"]).refused(1, "the sandbox's namespaces cannot be made", &grant("SYS_ADMIN"));
    let hidden = "umount /sys/fs/bpf && exec \"$@\"";
    let private = ["unshare", "--mount", "sh", "-c", hidden, "sh"].map(String::from).to_vec();
    let unmounted = lab.said_by(&[private, bounded(&THREE)].concat(), &UP);
    unmounted.refused(1, "CAP_SYS_ADMIN is missing: bpffs cannot be mounted", &grant("SYS_ADMIN"));
    lab.assert_as_before(&before);
}

#[test]
fn whoever_is_not_root_may_look_and_take_down_as_far_as_files_allow() {
    let (lab, nobodys) = (Lab::roomy(), PublicCopy::new());
    let before = lab.machine();
    let sudo = |args: &[&str]| format!("try: sudo snifctl {}", args.join(" "));
    let all = [&THREE[..], &["DAC_OVERRIDE"]].concat();
    nobodys.said_with(&lab, &all, &UP).refused(1, "pins must be root's, and what user 65534 makes is not", &sudo(&UP));
    lab.assert_as_before(&before);
    said_with(&lab, &THREE, &UP).ok();
    let up = lab.machine();
    nobodys.said_with(&lab, &all, &["status", "--check"]).quietly_ok();
    nobodys.said_with(&lab, &THREE, &["status"]).refused(1, "CAP_DAC_OVERRIDE is missing: ", &sudo(&["status"]));
    let edit = ["filter", "set", "udp"];
    nobodys.said_with(&lab, &all, &edit).refused(1, "pins must be root's", &sudo(&edit));
    // What a file gives, no tool inherits.
    lab.host(&["setcap", "cap_net_admin,cap_bpf,cap_perfmon,cap_dac_override+ep", &nobodys.path()]);
    nobodys.said(&lab, &["down"]).refused(1, "inherit ambient capabilities, not those of a file", "snifctl down");
    lab.host(&["setcap", "-r", &nobodys.path()]);
    let apart = lab.said_by(&["unshare", "--user", "--map-root-user"], &["down"]);
    apart.refused(1, "the capabilities of a user namespace of its own", &sudo(&["down"]));
    assert_eq!(lab.machine(), up);
    nobodys.said_with(&lab, &all, &["down"]).quietly_ok();
    assert_eq!(lab.machine(), before);
    lab.said(&["down"]).ok();
    lab.assert_as_before(&before);
}

/// A process in a network namespace of its own, as another user, or with other capabilities: ended with its value.
struct Other(Child);

impl Other {
    fn start(by: &[&str]) -> Other {
        let mut command = Command::new("unshare");
        command.args(["--net", "--"]).args(by).args(["sleep", "600"]).stdout(Stdio::null());
        let other = Other(command.spawn().expect("start a process"));
        let is_there =
            || fs::read_to_string(format!("/proc/{}/comm", other.0.id())).is_ok_and(|name| name == "sleep\n");
        assert!(poll(PATIENCE, || is_there().then_some(())).is_some());
        other
    }

    fn net(&self) -> String {
        format!("/proc/{}/ns/net", self.0.id())
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_namespace_is_told_with_sys_ptrace_and_entered_with_sys_admin() {
    let lab = Lab::new();
    let does = |caps: &[&str], command: &[&str]| {
        let by = bounded(caps);
        Command::new(&by[0]).args(&by[1..]).args(command).stderr(Stdio::null()).stdout(Stdio::null()).status().unwrap()
    };
    let users = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--"];
    let fewer = ["setpriv", "--bounding-set=-all,+net_bind_service", "--inh-caps=-all", "--"];
    for other in [Other::start(&users), Other::start(&fewer), Other::start(&[])] {
        let net = other.net();
        let (enter, clsact) = (format!("--net={net}"), ["tc", "qdisc", "add", "dev", "lo", "clsact"]);
        let inode = fs::metadata(&net).expect("a namespace").ino();
        assert_ne!(inode, lab.ns_inode(Ns::Host));
        for (caps, tells, enters, changes) in [
            (&[][..], false, false, false),
            (&["SYS_ADMIN"], false, false, false),
            (&["SYS_PTRACE"], true, false, false),
            (&["SYS_ADMIN", "SYS_PTRACE"], true, true, false),
            (&["SYS_ADMIN", "SYS_PTRACE", "NET_ADMIN"], true, true, true),
        ] {
            let did = |command: &[&str]| does(caps, command).success();
            assert_eq!(did(&["stat", "-L", &net]), tells, "{caps:?}");
            assert_eq!(did(&["nsenter", &enter, "true"]), enters, "{caps:?}");
            assert_eq!(did(&[&["nsenter", &enter][..], &clsact].concat()), changes, "{caps:?}");
            assert!(did(&["cat", &net.replace("ns/net", "cgroup")]), "anyone may read who is in which cgroup");
        }
    }
    // A name in /run/netns needs no leave of anybody.
    let enter = format!("--net={}", lab.ns_path(Ns::Peer).display());
    assert!(!does(&["SYS_PTRACE", "NET_ADMIN"], &["nsenter", &enter, "true"]).success());
    assert!(does(&["SYS_ADMIN"], &["nsenter", &enter, "true"]).success());
}

#[test]
fn the_page_has_a_row_for_each_capability() {
    let page = fs::read_to_string("docs/rights.md").expect("the page");
    let rows = ["SYS_ADMIN", "SYS_PTRACE", "NET_RAW", "SYS_RESOURCE", "SETUID", "DAC_OVERRIDE"];
    for cap in rows.iter().chain(&THREE) {
        assert!(page.contains(&format!("\n| `{cap}`")), "{cap}");
    }
}
