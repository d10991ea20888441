//! What the README and docs/ say is true: commands are run as they stand there, names are those of the program and of the
//! kernel's maps, links lead somewhere. And what `demo` promises is held.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::lab;
use crate::lab::{COLLECTOR_MAC, Lab, Ns, mac_text, poll};

const README: &str = include_str!("../../README.md");
const SNIFCTL: &str = env!("CARGO_BIN_EXE_snifctl");

/// The README's collectors, and addresses of the lab's out link.
const COLLECTORS: [(&str, &str); 3] =
    [("10.0.0.7", "198.51.100.7"), ("10.0.0.8", "198.51.100.8"), ("10.0.0.9", "198.51.100.9")];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|err| panic!("{}: {err}", path.display()))
}

/// The Markdown files of a directory.
fn pages(dir: &str) -> Vec<PathBuf> {
    let files = fs::read_dir(root().join(dir)).unwrap().map(|entry| entry.unwrap().path());
    let mut pages: Vec<PathBuf> = files.filter(|path| path.extension().is_some_and(|end| end == "md")).collect();
    pages.sort();
    pages
}

/// README.md and docs/*.md, together.
fn manual() -> String {
    let docs = pages("docs").iter().map(|page| read(page)).collect::<Vec<_>>();
    [README.to_string(), docs.join("\n")].join("\n")
}

/// The lines of the README's code blocks that call snifctl or ip, for the lab.
fn commands() -> Vec<String> {
    let lines = README.lines().filter_map(|line| line.strip_prefix("    sudo "));
    let ours = lines.filter(|line| line.starts_with("snifctl ") || line.starts_with("ip "));
    let for_the_lab = |line: &str| {
        let line = COLLECTORS.iter().fold(line.to_string(), |line, (there, here)| line.replace(there, here));
        line.replacen("snifctl ", &format!("{SNIFCTL} "), 1)
    };
    ours.map(for_the_lab).collect()
}

#[test]
fn every_command_of_the_readme_works_in_its_order() {
    let lab = Lab::new();
    for (_, collector) in COLLECTORS {
        let neighbour = ["ip", "neighbour", "replace", collector, "lladdr", &mac_text(COLLECTOR_MAC), "dev", "out0"];
        lab.host(&neighbour);
    }
    let commands = commands();
    for verb in ["up", "sync", "filter", "remote", "down", "doctor", "status"] {
        let call = format!("{SNIFCTL} {verb}");
        assert!(commands.iter().any(|line| line.starts_with(&call)), "the README shows no {verb}");
    }
    for line in &commands {
        let output = lab.try_host(&["timeout", "60", "sh", "-c", line]);
        assert!(output.status.success(), "{line}\n{}", String::from_utf8_lossy(&output.stderr));
    }
    assert!(!fs::exists(format!("/sys/fs/bpf/snifctl/{}", lab.ns_inode(Ns::Host))).unwrap());
}

fn help(command: &str) -> String {
    let args = command.split_whitespace().chain(["--help"]);
    String::from_utf8(Command::new(SNIFCTL).args(args).output().unwrap().stdout).unwrap()
}

/// The commands that a help text lists.
fn listed(help: &str) -> Vec<String> {
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let names = lines.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    names.filter_map(|line| line.split_whitespace().next()).map(String::from).collect()
}

/// Every command that does something, such as `up` and `filter set`.
fn every_command() -> Vec<String> {
    let nested = |noun: String| {
        let verbs = listed(&help(&noun));
        match verbs.is_empty() {
            true => vec![noun],
            false => verbs.iter().map(|verb| format!("{noun} {verb}")).collect(),
        }
    };
    listed(&help("")).into_iter().flat_map(nested).collect()
}

/// The long options in a text.
fn options(text: &str) -> BTreeSet<String> {
    let is_name = |c: char| c.is_ascii_lowercase() || c == '-';
    let words = text.split(|c: char| !is_name(c) && !c.is_ascii_alphanumeric());
    let long = words.filter(|word| word.starts_with("--") && word.len() > 3 && word.chars().all(is_name));
    long.map(String::from).collect()
}

#[test]
fn the_manual_tells_every_command_and_option_and_no_other() {
    let manual = manual();
    let commands = every_command();
    assert!(commands.len() >= 18, "{commands:?}");
    let mut existing = options(&help(""));
    for command in &commands {
        let help = help(command);
        assert!(help.contains("Examples:"), "{command}");
        assert!(manual.contains(&format!("`{command}")), "the manual does not tell of {command}");
        let usage = help.split("Examples:").next().unwrap_or_default();
        existing.extend(options(usage));
    }
    for option in existing.iter().filter(|option| !["--help", "--version"].contains(&option.as_str())) {
        assert!(manual.contains(option.as_str()), "the manual does not tell of {option}");
    }
    let page = read(&root().join("docs/commands.md"));
    let tables: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("| `")).collect();
    let first_cells = tables.iter().map(|line| line.split(" | ").next().unwrap_or_default());
    for told in first_cells.flat_map(options) {
        assert!(existing.contains(&told), "docs/commands.md tells of {told}, which no command has");
    }
}

/// The lines of a page from one heading to the next of the same level or a higher one.
fn section<'a>(page: &'a str, heading: &str) -> Vec<&'a str> {
    let level = heading.chars().take_while(|c| *c == '#').count();
    let ends = |line: &&str| (1..=level).any(|n| line.starts_with(&format!("{} ", "#".repeat(n))));
    let lines = page.lines().skip_while(|line| *line != heading).skip(1);
    lines.take_while(|line| !ends(line)).collect()
}

/// The names between backticks in a column of the tables among these lines.
fn column(lines: &[&str], column: usize) -> Vec<String> {
    let cells = lines.iter().filter(|line| line.starts_with("| ")).filter_map(|line| line.split(" | ").nth(column));
    let name = |cell: &str| cell.split('`').nth(1).map(String::from);
    cells.filter_map(name).collect()
}

/// The fields of a struct of the C sources, in order.
fn fields(source: &str, name: &str) -> Vec<String> {
    let lines = source.lines().skip_while(|line| *line != format!("struct {name} {{")).skip(1);
    let declared = lines.take_while(|line| *line != "};").filter_map(|line| line.split(';').next());
    let last_word = |line: &str| line.split_whitespace().last().unwrap_or_default().to_string();
    let declared = declared.filter(|line| !line.trim_start().starts_with("/*"));
    declared.map(|line| last_word(line.split('[').next().unwrap_or_default())).collect()
}

#[test]
fn the_page_of_the_maps_has_the_names_of_the_sources() {
    let [snifctl, common] = ["bpf/snifctl.h", "bpf/common.h"].map(|file| read(&root().join(file)));
    let page = read(&root().join("docs/maps.md"));
    let declared = common.lines().filter_map(|line| line.strip_prefix("} ")?.strip_suffix(" SEC(\".maps\");"));
    let declared: BTreeSet<String> = declared.map(String::from).collect();
    assert!(declared.len() >= 16, "{declared:?}");
    let headings = page.lines().filter_map(|line| line.strip_prefix("### "));
    let told: BTreeSet<String> = headings.flat_map(|names| names.split(" and ")).map(String::from).collect();
    assert_eq!(told, declared);
    let overview: BTreeSet<String> = column(&section(&page, "# The kernel's maps"), 0).into_iter().collect();
    assert!(declared.is_subset(&overview), "{overview:?}");

    let reasons = column(&section(&page, "## Reasons of drops"), 0);
    assert_eq!(reasons, fields(&snifctl, "drops"));
    for (map, value, source) in [
        ("config", "config", &snifctl),
        ("taps", "tap", &snifctl),
        ("remotes", "remote", &snifctl),
        ("remote_state", "remote_state", &snifctl),
        ("outs", "out", &snifctl),
        ("bucket", "bucket", &common),
    ] {
        let told = column(&section(&page, &format!("### {map}")), 1);
        assert!(!told.is_empty(), "{map}");
        assert_eq!(told, fields(source, value), "{map}");
    }
}

/// What GitHub makes of a heading.
fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = text.chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_link_of_the_manual_leads_somewhere() {
    for page in [pages(""), pages("docs"), pages("vendor-notes")].concat() {
        let text = read(&page);
        let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for target in targets.filter(|target| !target.contains("://")) {
            let (file, heading) = target.split_once('#').unwrap_or((target, ""));
            let file = if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            assert!(file.exists(), "{}: {target}", page.display());
            let has = |heading| read(&file).lines().any(|line| line.starts_with('#') && anchor(line) == heading);
            assert!(heading.is_empty() || has(heading), "{}: {target}", page.display());
        }
    }
}

#[test]
fn every_file_that_the_manual_names_exists() {
    let places = ["src/", "bpf/", "tests/", "bench/", "docs/", "vendor-notes/"];
    for page in [pages(""), pages("docs"), pages("vendor-notes")].concat() {
        let text = read(&page);
        for name in text.split('`').skip(1).step_by(2).filter(|name| places.iter().any(|dir| name.starts_with(dir))) {
            let is_path = !name.contains(['*', ' ', '<']) && !name.starts_with("bpf/bpf_"); // libbpf's own
            assert!(!is_path || root().join(name).exists(), "{} names {name}", page.display());
        }
    }
}

#[test]
fn every_crate_and_package_has_a_note_and_every_note_is_listed() {
    let manifest = read(&root().join("Cargo.toml"));
    let notes = read(&root().join("vendor-notes/README.md"));
    let in_table = |name: &str| {
        let lines = manifest.lines().skip_while(move |line| *line != name).skip(1);
        lines.take_while(|line| !line.starts_with('[')).filter_map(|line| line.split_once(" = ")).collect::<Vec<_>>()
    };
    for (name, _) in [in_table("[dependencies]"), in_table("[dev-dependencies]")].concat() {
        assert!(root().join(format!("vendor-notes/{name}.md")).exists(), "no note for {name}");
    }
    let makefile = read(&root().join("Makefile"));
    let packages =
        makefile.lines().filter(|line| !line.starts_with('\t')).filter_map(|line| line.split_once("PACKAGES := "));
    let all_notes = pages("vendor-notes").iter().map(|page| read(page)).collect::<String>();
    for package in packages.flat_map(|(_, names)| names.split_whitespace()) {
        assert!(all_notes.contains(package), "no note for {package}");
    }
    for page in pages("vendor-notes").iter().filter(|page| !page.ends_with("README.md")) {
        let name = page.file_name().unwrap().to_str().unwrap();
        assert!(notes.contains(&format!("({name})")), "vendor-notes/README.md does not list {name}");
    }
}

#[test]
fn the_pages_are_easy_on_the_eye() {
    assert!((6 << 10..=10 << 10).contains(&README.len()), "README.md has {} bytes", README.len());
    for page in [pages(""), pages("docs")].concat() {
        for (n, line) in read(&page).lines().enumerate() {
            assert!(line.chars().count() <= 120, "{}:{}: {line}", page.display(), n + 1);
        }
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
    for sign in ["ARP", "TCP", "UDP", "ICMP", "ingress    ok", "\"pcnt\":", "drops: none", "Nothing is left"] {
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

/// The processes of a group, by what they run.
fn group(pgid: u32) -> Vec<String> {
    let member = |pid: std::ffi::OsString| -> Option<String> {
        let stat = fs::read_to_string(std::path::Path::new("/proc").join(pid).join("stat")).ok()?;
        let (name, rest) = stat.rsplit_once(')')?;
        let words: Vec<&str> = rest.split_whitespace().collect();
        (words[2] == pgid.to_string() && words[0] != "Z").then(|| name.split_once('(').unwrap().1.to_string())
    };
    fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| member(entry.file_name())).collect()
}

fn assert_ends(pgid: u32) {
    let ended = poll(lab::PATIENCE, || group(pgid).is_empty().then_some(()));
    ended.unwrap_or_else(|| panic!("these are left: {:?}", group(pgid)));
}

/// The helpers have namespaces of their own, which live as long as they do.
#[test]
fn a_demo_that_is_killed_alone_leaves_no_helper() {
    for signal in ["-INT", "-KILL"] {
        let mut demo = start_demo();
        let helpers = || group(demo.id()).contains(&"tcpdump".into()).then_some(());
        poll(lab::PATIENCE, helpers).expect("the capture runs");
        assert!(Command::new("kill").args([signal, &demo.id().to_string()]).status().unwrap().success());
        assert!(!demo.wait().unwrap().success());
        assert_ends(demo.id());
    }
}

#[test]
fn a_demo_whose_reader_goes_leaves_no_helper_and_is_no_failure() {
    let script = r#""$0" demo | head -3; exit "${PIPESTATUS[0]}""#;
    let mut command = Command::new("bash");
    command.args(["-c", script, SNIFCTL]).process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped());
    let shell = command.spawn().unwrap();
    let pgid = shell.id();
    let output = shell.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), 3);
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_ends(pgid);
}
