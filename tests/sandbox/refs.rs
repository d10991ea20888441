//! `refs`: who holds a program or map that hangs.

use std::fs;
use std::process::{Child, Command, Stdio};

use crate::lab::remotes::lab_up;
use crate::lab::{Lab, Ns, PATIENCE, poll};
use serde_json::Value;

/// Ended with its value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Removed with its value.
struct Pin(String);

impl Drop for Pin {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn refs(lab: &Lab, more: &[&str]) -> Vec<Value> {
    let json = lab.said(&[&["refs", "--json"], more].concat()).quietly_ok().json();
    json["refs"].as_array().expect("refs").clone()
}

/// The program or map of this number.
fn of(refs: &[Value], kind: &str, id: u64) -> Option<Value> {
    refs.iter().find(|one| one["kind"] == kind && one["id"] == id).cloned()
}

fn holders<'a>(one: &'a Value, by: &str) -> Vec<&'a Value> {
    one["holders"].as_array().unwrap().iter().filter(|holder| holder["by"] == by).collect()
}

#[test]
fn a_held_program_is_told_with_its_pins_hooks_processes_and_maps_also_after_its_session() {
    let lab = lab_up(1, &[]);
    let all = refs(&lab, &["--name", "default"]);
    let names: Vec<&str> =
        all.iter().filter(|one| one["kind"] == "program").map(|one| one["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["snif_deliver", "snif_encap", "snif_tap_in", "snif_tap_out", "snif_wire"]);
    assert_eq!(all.iter().filter(|one| one["kind"] == "map").count(), 21);
    let tap = all.iter().find(|one| one["name"] == "snif_tap_in").unwrap().clone();
    let id = tap["id"].as_u64().unwrap();
    assert_eq!(
        tap["session"],
        serde_json::json!({ "name": "default", "netns": lab.ns_inode(Ns::Host), "life": "here" })
    );
    assert_eq!(holders(&tap, "pin")[0]["path"], format!("{}/default/snif_tap_in", lab.pins().display()));
    let hook = holders(&tap, "hook")[0].clone();
    assert_eq!(
        (&hook["interface"], &hook["hook"], &hook["pref"]),
        (&"eth0".into(), &"clsact/ingress".into(), &1.into())
    );
    let taps = all.iter().find(|one| one["name"] == "taps").unwrap().clone();
    let users = holders(&taps, "program");
    assert!(users.iter().any(|user| user["id"] == id) && users.len() == 4, "{taps:#}");

    // Held by a pin elsewhere, by a filter in another namespace, and its map by a process.
    let pin = Pin(format!("/sys/fs/bpf/held_{id}"));
    lab.host(&["bpftool", "prog", "pin", "id", &id.to_string(), &pin.0]);
    lab.peer(&["tc", "qdisc", "add", "dev", "peer0", "clsact"]);
    lab.peer(&["tc", "filter", "add", "dev", "peer0", "egress", "pref", "7", "bpf", "da", "object-pinned", &pin.0]);
    // A loop of bpftool that reads has it open; it waits for its output to be read.
    let map = taps["id"].as_u64().unwrap();
    let line = format!("map dump id {map}\n").repeat(3000);
    let batch = lab.dir().join("batch");
    fs::write(&batch, line).unwrap();
    let mut reader = Command::new("bpftool");
    reader.args(["batch", "file", batch.to_str().unwrap()]).stdout(Stdio::piped()).stderr(Stdio::null());
    let reader = Running(reader.spawn().unwrap());
    let pid = reader.0.id();
    lab.said(&["down"]).ok();
    let found = poll(PATIENCE, || {
        let all = refs(&lab, &[]);
        let map = of(&all, "map", map)?;
        let has = holders(&map, "process").iter().any(|holder| holder["pid"] == pid && holder["comm"] == "bpftool");
        has.then_some(all)
    });
    let all = found.unwrap_or_else(|| panic!("no process {pid} in {:#?}", of(&refs(&lab, &[]), "map", map)));
    let tap = of(&all, "program", id).expect("it hangs");
    assert_eq!(tap["session"], Value::Null);
    assert_eq!(holders(&tap, "pin")[0]["path"], pin.0.as_str());
    let hooks = holders(&tap, "hook");
    assert_eq!(hooks.len(), 1, "{tap:#}");
    assert_eq!(
        (&hooks[0]["interface"], &hooks[0]["hook"], &hooks[0]["pref"]),
        (&"peer0".into(), &"clsact/egress".into(), &7.into())
    );
    assert_eq!(hooks[0]["netns"], lab.ns_inode(Ns::Peer));
    let text = lab.said(&["refs", "--all"]).quietly_ok().stdout;
    for part in [
        "of no session\n",
        &format!("  program {id} snif_tap_in\n"),
        &format!("    pin      {}\n", pin.0),
        "    hook     peer0 clsact/egress pref 7, in netns ",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    lab.said(&["refs", "--name", "default"]).refused(1, "no session default is up", "ADDR");
    drop(reader);
    lab.peer(&["tc", "qdisc", "del", "dev", "peer0", "clsact"]);
    drop(pin);
    let gone = poll(PATIENCE, || of(&refs(&lab, &[]), "program", id).is_none().then_some(()));
    assert!(gone.is_some(), "{:#?}", of(&refs(&lab, &[]), "program", id));
}

#[test]
fn what_a_dead_namespace_has_left_is_told_as_such() {
    let observer = Lab::roomy();
    let dead = lab_up(1, &[]);
    let (inode, ids) = (dead.ns_inode(Ns::Host), dead.program_ids());
    // The namespace alone goes. The lock keeps others from tidying up.
    let dir = format!("/sys/fs/bpf/snifctl/{inode}");
    let lock = fs::File::open(&dir).unwrap();
    lock.lock_shared().unwrap();
    observer.host(&["ip", "netns", "del", &dead.ns_name(Ns::Host)]);
    let told = poll(PATIENCE, || {
        let all = refs(&observer, &[]);
        let tap = ids.iter().find_map(|id| of(&all, "program", *id))?;
        (tap["session"]["life"] == "dead").then_some(tap)
    });
    let told = told.unwrap_or_else(|| panic!("nothing of it in {:#?}", refs(&observer, &[])));
    assert_eq!((&told["session"]["netns"], &told["session"]["name"]), (&inode.into(), &"default".into()));
    // By then the number may be another namespace's, so the directory is not removed by its name.
    drop(lock);
    observer.said(&["sync", "--all"]).ok();
}
