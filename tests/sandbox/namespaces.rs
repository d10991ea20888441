//! Network namespaces that come and go with a session in each leave nothing in the kernel. It looks at the whole machine, so
//! it is a test binary of its own: `cargo test` runs one at a time.

use std::fs;
use std::process::Command;

use crate::lab::{PATIENCE, bare, poll};

/// How many programs, maps and links the kernel holds.
fn held() -> [usize; 3] {
    ["prog", "map", "link"].map(|kind| {
        let out = Command::new("bpftool").args(["-j", kind, "show"]).output().expect("run bpftool");
        let all: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON of bpftool");
        all.as_array().expect("a list").len()
    })
}

/// KiB of kernel memory, by the name of a line of /proc/meminfo.
fn memory(name: &str) -> i64 {
    let text = fs::read_to_string("/proc/meminfo").expect("read /proc/meminfo");
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).expect("a line");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// SNIFCTL_NAMESPACES has more of them; each takes a sixth of a second. `make soak` has a thousand, and ten thousand pods.
#[test]
fn namespaces_come_and_go_and_leave_no_program_map_link_or_memory() {
    let count = std::env::var("SNIFCTL_NAMESPACES").ok().and_then(|text| text.parse().ok()).unwrap_or(200);
    // With the thousand of `make soak`, ten thousand.
    let pods = if count < 1000 { count } else { 10 * count };
    // The first ones fill caches that stay.
    bare::come_and_go(20);
    bare::pods_come_and_go(10, 10);
    let before = (held(), ["Slab", "Percpu"].map(memory));
    bare::come_and_go(count);
    bare::pods_come_and_go(pods, 10);
    let is_less = || held().iter().zip(before.0).all(|(after, before)| *after <= before);
    let after = poll(PATIENCE, || is_less().then_some(()));
    assert!(after.is_some(), "programs, maps and links: {:?} became {:?}", before.0, held());
    const MOST: i64 = 10 * 1024;
    let grown = || ["Slab", "Percpu"].map(memory).iter().zip(before.1).map(|(after, before)| after - before).max();
    let is_back = poll(PATIENCE * 3, || grown().filter(|grown| *grown < MOST));
    assert!(is_back.is_some(), "Slab, Percpu in KiB: {:?} became {:?}", before.1, ["Slab", "Percpu"].map(memory));
}
