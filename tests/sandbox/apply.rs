//! Sessions in files: `apply` makes the smallest change that the files ask for, and `export` prints what it takes.

use std::fs;

use crate::lab;
use crate::lab::Lab;
use crate::lab::judge::Said;
use crate::lab::links::{ETH0, ETH1, add_link, assert_copied_on, hooks};
use crate::lab::remotes::lab_of;
use serde_json::Value;

/// A file in the lab's own directory.
fn file(lab: &Lab, name: &str, text: &str) -> String {
    let path = lab.dir().join(name);
    fs::create_dir_all(path.parent().expect("a directory")).unwrap();
    fs::write(&path, text).unwrap();
    path.to_string_lossy().into_owned()
}

fn apply(lab: &Lab, file: &str, more: &[&str]) -> Said {
    lab.said(&[&["apply", "-f", file], more].concat())
}

/// The same with the text on standard input.
fn applied_from_stdin(lab: &Lab, text: &str, more: &[&str]) -> Said {
    let path = file(lab, "stdin", text);
    let script = format!("exec \"$@\" < {path}");
    lab.said_by(&["sh", "-c", &script, "sh"], &[&["apply", "-f", "-"], more].concat())
}

/// Everything that the sessions remember and that is at the hooks: what no `apply` may touch that has nothing to do.
fn state(lab: &Lab) -> (Vec<u64>, String, Vec<Value>) {
    let memory = |session: &lab::status::Session| {
        lab.said(&["map", "dump", "request", "--name", &session.name]).quietly_ok().json()
    };
    (lab.program_ids(), hooks(lab), lab.status().sessions.iter().map(memory).collect())
}

fn names(lab: &Lab) -> Vec<String> {
    lab.status().sessions.into_iter().map(|session| session.name).collect()
}

const WEB: &str =
    "[[session]]\nname = \"web\"\ninterfaces = [\"eth0:ingress\"]\ntunnel = \"gre\"\nremote = [\"198.51.100.10\"]\n";

const DB: &str =
    "[[session]]\nname = \"db\"\ninterfaces = [\"eth1\"]\ntunnel = \"gre\"\nremote = \"198.51.100.11\"\nttl = 9\n";

#[test]
fn a_file_is_applied_by_the_smallest_change() {
    let lab = lab_of(3);
    add_link(&lab, 1);
    let before = lab.machine();
    // Of every kind of option one.
    let hand = "up eth1:ingress --name hand --tunnel vxlan --remote 198.51.100.12,2001:db8:1::2 --id 7 --egress-id 8 --port 4790 \
                --udp-checksum --filter ip6 --spread flow --sample 1/2 --sample-flows 1/3 --snaplen 100 --max-rate 200mbit \
                --oversize truncate --source 198.51.100.1 --underlay none --ttl 9 --tos 0x10 --df";
    lab.said(&hand.split_whitespace().collect::<Vec<_>>()).ok();
    let all = file(&lab, "all.toml", &format!("{WEB}{DB}"));
    let said = apply(&lab, &all, &[]).quietly_ok();
    let made = "+ session web: eth0:ingress --tunnel gre --remote 198.51.100.10\n\
                + session db: eth1 --tunnel gre --remote 198.51.100.11 --ttl 9\n";
    assert_eq!(said.stdout, made);
    assert_copied_on(&lab, ETH0, "ingress");
    assert_copied_on(&lab, ETH1, "both");
    let was = state(&lab);
    assert_eq!(apply(&lab, &all, &[]).quietly_ok().stdout, "");
    // What is exported is what is there.
    let exported = lab.said(&["export"]).quietly_ok().stdout;
    assert_eq!(applied_from_stdin(&lab, &exported, &["--prune"]).quietly_ok().stdout, "");
    assert_eq!(state(&lab), was, "nothing was to be done");
    let part = lab.said(&["export", "--name", "db"]).quietly_ok().stdout;
    let db = DB.replace("\"198.51.100.11\"", "[\"198.51.100.11\"]");
    assert_eq!(part, db);
    assert!(exported.contains(&format!("\n{part}\n")) || exported.starts_with(&part), "{exported}");
    // One session changes, and the other notices nothing.
    let counted = lab.session_called("web");
    let more = "filter = \"udp\"\n";
    let web = WEB.replace("eth0:ingress", "eth0").replace("100.10", "100.12");
    let changed = file(&lab, "changed.toml", &format!("{web}{more}{DB}"));
    let lines = "~ session web: filter none → 'udp'\n\
                 ~ session web: + tap eth0 egress\n\
                 ~ session web: + remote 198.51.100.12\n\
                 ~ session web: - remote 198.51.100.10\n";
    let up = lab.machine();
    let dry = apply(&lab, &changed, &["--dry-run"]).ok();
    assert_eq!(dry.stderr.replace("snifctl: ", ""), lines);
    assert!(dry.stdout.starts_with("# session web\n") && dry.stdout.contains("\nbpftool "), "{dry:#?}");
    assert!(!dry.stdout.contains("# session db"), "{dry:#?}");
    assert_eq!(lab.machine(), up);
    assert_eq!(apply(&lab, &changed, &[]).quietly_ok().stdout, lines);
    let now = lab.session_called("web");
    assert_eq!(now.removed.pcnt, counted.remotes_total().pcnt);
    assert_eq!(now.tap("eth0", "ingress").counts.stat, counted.tap("eth0", "ingress").counts.stat);
    assert_eq!(now.faults, [""; 0]);
    assert_eq!(dump_of(&lab, "db"), was.2[0]);
    // Back again, as JSON; then what is damaged is put right.
    let said = apply(&lab, &all, &["--json"]).quietly_ok().json();
    assert_eq!(said["sessions"][0]["result"], "changed", "{said:#}");
    assert_eq!(said["sessions"][0]["differences"][0], "filter 'udp' → none");
    assert_eq!(
        (&said["sessions"][1]["result"], &said["sessions"][1]["changes"]),
        (&"same".into(), &Value::Array(vec![]))
    );
    lab.host(&["tc", "qdisc", "del", "dev", "eth0", "clsact"]);
    let said = apply(&lab, &all, &[]).quietly_ok();
    assert_eq!(said.stdout, "web: tap eth0 ingress: its clsact qdisc is gone; attached\n");
    // What no file has any more is pruned; what was made by hand is not.
    let one = file(&lab, "one.toml", DB);
    assert_eq!(apply(&lab, &one, &[]).quietly_ok().stdout, "");
    let dry = apply(&lab, &one, &["--prune", "--dry-run"]).ok();
    assert!(dry.stderr == "snifctl: - session web\n" && dry.stdout.starts_with("# session web\n"), "{dry:#?}");
    assert_eq!(names(&lab), ["db", "hand", "web"]);
    assert_eq!(apply(&lab, &one, &["--prune"]).quietly_ok().stdout, "- session web\n");
    assert_eq!(names(&lab), ["db", "hand"]);
    assert_eq!(applied_from_stdin(&lab, "", &["--prune"]).quietly_ok().stdout, "- session db\n");
    lab.said(&["down", "--name", "hand"]).quietly_ok();
    lab.assert_as_before(&before);
    let said = lab.said(&["export"]).ok_noting("no session is up; nothing to export");
    assert_eq!(said.stdout, "");
}

fn dump_of(lab: &Lab, name: &str) -> Value {
    lab.said(&["map", "dump", "request", "--name", name]).quietly_ok().json()
}

/// Panics unless the file is refused with exactly these lines, and nothing is changed.
#[track_caller]
fn assert_refused(lab: &Lab, before: &str, file: &str, lines: &[String]) {
    let said = apply(lab, file, &["--prune"]);
    assert_eq!((said.status.code(), said.stdout.as_str()), (Some(2), ""), "{said:#?}");
    let told: Vec<&str> = said.stderr.lines().map(|line| line.trim_start_matches("snifctl: ")).collect();
    assert_eq!(told, lines);
    assert_eq!(lab.machine(), before);
}

#[test]
fn a_mistake_in_any_file_leaves_everything_as_it_is() {
    let lab = lab_of(2);
    applied_from_stdin(&lab, WEB, &[]).quietly_ok();
    let up = lab.machine();
    let dir = lab.dir().join("d").to_string_lossy().into_owned();
    let good = file(&lab, "d/b.toml", DB.replace("eth1", "eth0").as_str());
    file(&lab, "d/.hidden.toml", "nonsense");
    file(&lab, "d/notes.txt", "nonsense");
    for (text, line) in [
        ("ttl = 0", "c.toml:6: ttl: 0 is out of range; it takes 1 to 255, as in: ttl = 64"),
        (
            "filter = \"tcp prt 443\"",
            "c.toml:6: filter: \"tcp prt 443\" is not a filter: syntax error; see pcap-filter(7), as in: filter = \"tcp port \
             443 and not net 10.0.0.0/8\"",
        ),
        ("colour = 1", "c.toml:6: colour: is not a key of a session; these are: "),
    ] {
        let bad = WEB.replace("web", "other");
        file(&lab, "d/c.toml", &format!("{bad}{text}\n"));
        let said = apply(&lab, &dir, &["--prune"]);
        assert_eq!(said.status.code(), Some(2), "{said:#?}");
        assert!(said.stderr.contains(line) || said.stderr.contains("can't parse filter expression"), "{said:#?}");
        assert!(said.stderr.starts_with(&format!("snifctl: {dir}/c.toml:6: ")), "{said:#?}");
        assert_eq!((names(&lab), lab.machine()), (vec!["web".to_string()], up.clone()));
    }
    file(&lab, "d/c.toml", &format!("\n{WEB}{DB}"));
    let line = format!("{dir}/c.toml:8: name: db is also the session at {good}:1; try: name = \"other\"");
    assert_refused(&lab, &up, &dir, &[line]);
    // What only the machine can tell.
    let relay = lab.interfaces().into_iter().find(|name| name.starts_with("snif")).expect("a relay");
    let two = WEB.replace("\"eth0:ingress\"", &format!("\"eth0\",\n\"{relay}\"")).replace("web", "x");
    let own = DB.replace("\"198.51.100.11\"", "[\n\"198.51.100.11\",\n\"198.51.100.1\"]").replace("eth1", "eth0");
    let path = file(&lab, "d/c.toml", &format!("{two}{}", own.replace("db", "y")));
    let said = apply(&lab, &dir, &[]);
    assert_eq!(said.status.code(), Some(2), "{said:#?}");
    let told: Vec<&str> = said.stderr.lines().collect();
    assert!(told[0].starts_with(&format!("snifctl: {path}:4: interfaces: {relay} is a relay of snifctl")), "{told:#?}");
    assert!(told[1].starts_with(&format!("snifctl: {path}:13: remote: 198.51.100.1 is ")), "{told:#?}");
    assert_eq!((told.len(), lab.machine()), (2, up.clone()), "{told:#?}");
    let nowhere = lab.dir().join("nowhere").to_string_lossy().into_owned();
    apply(&lab, &nowhere, &[]).refused(1, "nowhere cannot be read (No such file", "or - for standard input");
    lab.said(&["down", "--all"]).quietly_ok();
}

#[test]
fn an_interface_may_come_later_and_one_session_that_fails_stops_no_other() {
    let lab = lab_of(2);
    add_link(&lab, 2);
    let bare = lab.machine();
    lab.host(&["tc", "qdisc", "add", "dev", "eth2", "ingress"]);
    // An `ingress` qdisc is in the way of one; the interface of another is not there yet.
    let blocked = WEB.replace("eth0:ingress", "eth2");
    let both = file(&lab, "both.toml", &format!("{blocked}{DB}"));
    let said = apply(&lab, &both, &["--prune"]);
    assert_eq!(said.status.code(), Some(1), "{said:#?}");
    assert!(said.stderr.contains("snifctl: session web: IFACE eth2 has an `ingress` qdisc"), "{said:#?}");
    assert!(said.stderr.contains("snifctl: db: IFACE eth1 does not exist here yet; "), "{said:#?}");
    assert_eq!(names(&lab), ["db"]);
    assert_eq!(apply(&lab, &file(&lab, "db.toml", DB), &[]).quietly_ok().stdout, "");
    add_link(&lab, 1);
    let said = apply(&lab, &file(&lab, "db.toml", DB), &[]).quietly_ok();
    assert!(said.stdout.contains("db: tap eth1 ingress: "), "{said:#?}");
    assert_copied_on(&lab, ETH1, "both");
    // One that was renamed is exported by the name that it has.
    for line in ["down", "name lan1", "up"] {
        lab.host(
            &[
                &["ip", "link", "set", "dev", if line == "up" { "lan1" } else { "eth1" }],
                &line.split(' ').collect::<Vec<_>>()[..],
            ]
            .concat(),
        );
    }
    let exported = lab.said(&["export", "--name", "db"]).quietly_ok().stdout;
    assert!(exported.contains("\ninterfaces = [\"lan1\"]\n"), "{exported}");
    applied_from_stdin(&lab, &exported, &[]).ok();
    assert_eq!(applied_from_stdin(&lab, &exported, &[]).quietly_ok().stdout, "");
    // A session that failed keeps from being pruned what it may be to take the place of.
    let other = file(&lab, "other.toml", &blocked);
    let said = apply(&lab, &other, &["--prune"]);
    assert_eq!(said.status.code(), Some(1), "{said:#?}");
    assert!(said.stderr.contains("not pruned, as not all could be applied: db"), "{said:#?}");
    assert_eq!(names(&lab), ["db"]);
    lab.host(&["tc", "qdisc", "del", "dev", "eth2", "ingress"]);
    let said = apply(&lab, &other, &["--prune", "--json"]).quietly_ok().json();
    let results: Vec<&str> =
        said["sessions"].as_array().unwrap().iter().filter_map(|one| one["result"].as_str()).collect();
    assert_eq!(results, ["added", "removed"], "{said:#}");
    lab.said(&["down", "--all"]).quietly_ok();
    lab.host(&["ip", "link", "del", "dev", "lan1"]);
    lab.assert_as_before(&bare);
}
