//! What the README shows is run as it stands there, and what `demo` promises is held.

mod lab;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use lab::{COLLECTOR_IP, Lab, Ns, Options, poll};

const README: &str = include_str!("../README.md");
const SNIFCTL: &str = env!("CARGO_BIN_EXE_snifctl");

/// The `sudo snifctl` lines of the README's code blocks, without their comments, for the lab's collector.
fn commands() -> Vec<Vec<String>> {
    let lines = README.lines().filter_map(|line| line.strip_prefix("    sudo snifctl "));
    let words = |line: &str| {
        let line = line.split('#').next().unwrap_or_default().replace("10.0.0.7", &COLLECTOR_IP.to_string());
        line.split_whitespace().map(String::from).collect()
    };
    lines.map(words).collect()
}

#[test]
fn every_snifctl_command_of_the_readme_works_in_its_order() {
    let lab = Lab::with(Options { out_mtu: 1600, ..Options::default() });
    let commands = commands();
    assert!(commands.len() >= 7, "{commands:?}");
    let verbs: Vec<&str> = commands.iter().map(|words| words[0].as_str()).collect();
    for verb in ["up", "map", "down", "doctor", "status"] {
        assert!(verbs.contains(&verb), "the README shows no {verb}");
    }
    for words in &commands {
        lab.snifctl(words).assert().success();
    }
    assert!(!fs::exists(format!("/sys/fs/bpf/snifctl/{}", lab.ns_inode(Ns::Host))).unwrap());
}

#[test]
fn every_command_and_option_of_the_readme_exists_and_none_is_missing() {
    let help = |args: &[&str]| String::from_utf8(Command::new(SNIFCTL).args(args).output().unwrap().stdout).unwrap();
    let up = help(&["up", "--help"]);
    let options =
        up.split_whitespace().filter(|word| word.starts_with("--")).map(|word| word.trim_end_matches([',', ':']));
    let ours = ["--help", "--version", "--verbose"];
    for option in options.filter(|option| option.chars().all(|c| c.is_ascii_lowercase() || c == '-')) {
        assert!(README.contains(option) || ours.contains(&option), "the README does not tell of {option}");
    }
    for command in [
        "up",
        "down",
        "status",
        "filter show",
        "filter set",
        "filter clear",
        "filter test",
        "tap list",
        "tap add",
        "tap remove",
        "remote list",
        "remote add",
        "remote remove",
        "map list",
        "map dump",
        "doctor",
        "demo",
    ] {
        assert!(README.contains(&format!("`{command}")), "the README does not tell of {command}");
        let args: Vec<&str> = command.split(' ').chain(["--help"]).collect();
        assert!(help(&args).contains("Examples:"), "{command}");
    }
}

#[test]
fn the_two_commands_of_the_readme_are_targets_that_install_what_they_need() {
    for target in ["demo", "test"] {
        assert!(README.contains(&format!("    sudo make {target} ")), "{target}");
        let dir = env!("CARGO_MANIFEST_DIR");
        let plan = Command::new("make").args(["-n", "-C", dir, target]).output().unwrap();
        assert!(plan.status.success(), "{plan:?}");
        assert!(String::from_utf8(plan.stdout).unwrap().contains("apt-get install"), "{target}");
    }
}

#[test]
fn the_demo_shows_each_kind_of_traffic_at_the_collector() {
    let output = Command::new(SNIFCTL).arg("demo").output().unwrap();
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{shown}\n{}", String::from_utf8_lossy(&output.stderr));
    for sign in ["ARP", "TCP", "UDP", "ICMP", "ingress    yes", "\"pcnt\":", "drops: none", "Nothing is left"] {
        assert!(shown.contains(sign), "no {sign} in:\n{shown}");
    }
}

/// A demo in a process group of its own, as under a shell.
fn start_demo() -> Child {
    let mut command = Command::new(SNIFCTL);
    command.args(["demo"]).process_group(0).stdout(Stdio::piped()).stderr(Stdio::null());
    command.spawn().unwrap()
}

fn namespace(pid: u32) -> Option<u64> {
    fs::metadata(format!("/proc/{pid}/ns/net")).ok().map(|namespace| namespace.ino())
}

fn lives(namespace_inode: u64) -> bool {
    let pids = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.into_iter().any(|pid: u32| namespace(pid) == Some(namespace_inode))
}

/// Interfaces, programs and pins of the demo live in namespaces that end with its processes.
#[test]
fn a_demo_that_is_interrupted_leaves_no_process_and_no_namespace() {
    let ours = namespace(std::process::id()).unwrap();
    let files = || fs::read_dir("/mnt").unwrap().count();
    let before = files();
    for wait_for_relay in [false, true] {
        let mut demo = start_demo();
        let sandbox = poll(lab::PATIENCE, || namespace(demo.id()).filter(|inode| *inode != ours)).expect("a sandbox");
        if wait_for_relay {
            let shows_relay = || {
                let pid = demo.id().to_string();
                let links = Command::new("nsenter").args(["-t", &pid, "-n", "ip", "-br", "link"]).output().unwrap();
                String::from_utf8_lossy(&links.stdout).contains("snif0p").then_some(())
            };
            poll(lab::PATIENCE, shows_relay).expect("the relay is up");
        }
        let group = format!("-{}", demo.id());
        assert!(Command::new("kill").args(["-INT", "--", &group]).status().unwrap().success());
        assert!(!demo.wait().unwrap().success());
        poll(lab::PATIENCE, || (!lives(sandbox)).then_some(())).expect("the sandbox ends with the demo");
        assert_eq!(files(), before);
    }
}
