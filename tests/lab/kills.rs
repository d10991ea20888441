//! snifctl killed before and after each of its acts: what `sync` makes of what is left.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;

use serde_json::{Value, json};

use super::capture::{Capture, Direction};
use super::check::assert_same_frames;
use super::frames::{self, Ends};
use super::judge::Said;
use super::links::add_link;
use super::sessions::lab_of;
use super::{Lab, Ns, PATIENCE, poll};

/// A command that changes something.
#[derive(Clone, Copy)]
pub(crate) struct Verb {
    /// The commands that make the state in which it starts.
    pub start: &'static [&'static str],
    /// A shell command after them.
    pub damage: &'static str,
    pub command: &'static str,
    /// eth0 is watched all the time, and eth1 in the beginning or not at all: what was seen can be told exactly.
    pub is_counted: bool,
}

pub(crate) const BASE: &str = "up eth0 --tunnel gre --remote 198.51.100.10";
pub(crate) const BOTH: &str = "up eth0 eth1 --tunnel gre --remote 198.51.100.10,198.51.100.11";
const FILTERED: &str = "up eth0 --tunnel gre --remote 198.51.100.10 --filter udp";

const fn verb(start: &'static [&'static str], damage: &'static str, command: &'static str) -> Verb {
    Verb { start, damage, command, is_counted: true }
}

const fn uncounted(start: &'static [&'static str], damage: &'static str, command: &'static str) -> Verb {
    Verb { start, damage, command, is_counted: false }
}

pub(crate) const UP: Verb =
    uncounted(&[], "", "up eth0 eth1:ingress --tunnel gre --remote 198.51.100.10,2001:db8:1::10");
pub(crate) const UP_FILTERED: Verb =
    uncounted(&[], "", "up eth0 --tunnel vxlan --remote 198.51.100.10 --filter udp --underlay 203.0.113.5:51820");
pub(crate) const REPLACE: Verb = verb(
    &[FILTERED],
    "",
    "up eth0 eth1 --tunnel gre --id 7 --remote 198.51.100.10,198.51.100.11 --filter ip --replace",
);
pub(crate) const TAP_ADD: Verb = verb(&[BASE], "", "tap add eth1");
pub(crate) const TAP_REMOVE: Verb = verb(&[BOTH], "", "tap remove eth1");
pub(crate) const REMOTE_ADD: Verb = verb(&[BASE], "", "remote add 198.51.100.11");
pub(crate) const REMOTE_REMOVE: Verb = verb(&[BOTH], "", "remote remove 198.51.100.11");
pub(crate) const FILTER_SET: Verb = verb(&[FILTERED], "", "filter set icmp");
pub(crate) const FILTER_CLEAR: Verb = verb(&[FILTERED], "", "filter clear");
pub(crate) const SYNC_RELAY: Verb = verb(&[BOTH], "ip link del snif0", "sync");
pub(crate) const SYNC_TAP: Verb =
    uncounted(&[BOTH], "tc filter del dev eth0 ingress; tc qdisc del dev eth1 clsact", "sync");
pub(crate) const DOWN: Verb = uncounted(&[BOTH], "", "down");

pub(crate) fn words(command: &str) -> Vec<&str> {
    command.split(' ').collect()
}

/// What passes the watched link, all of it captured where it arrives.
struct Wire {
    capture: Capture,
    sent: Vec<Vec<u8>>,
    /// Echo replies among what is captured.
    replies: usize,
}

const EACH: u32 = 3;

impl Wire {
    fn new(lab: &Lab) -> Wire {
        Wire { capture: lab.capture(Ns::Peer, "peer0", Direction::In), sent: Vec::new(), replies: 0 }
    }

    /// Sends echo requests, which pass the hooks both ways, and frames one way; panics unless all arrive. How many passed.
    #[track_caller]
    fn pass(&mut self, lab: &Lab) -> u64 {
        let count = EACH.to_string();
        lab.peer(&["ping", "-n", "-q", "-c", &count, "-i", "0.002", "-W", "5", "-s", "200", "192.0.2.1"]);
        let first = self.sent.len() as u32;
        let more: Vec<Vec<u8>> =
            (1..=EACH).map(|n| frames::ipv4_udp(&Ends::HOST_TO_PEER, first + n, 100 + n as usize)).collect();
        lab.send(Ns::Host, "eth0", &more);
        self.sent.extend(more);
        self.replies += EACH as usize;
        self.capture.wait_for(self.sent.len() + self.replies);
        u64::from(3 * EACH)
    }

    /// Panics unless each frame has arrived as it was.
    #[track_caller]
    fn end(mut self) {
        let got = self.capture.take(self.sent.len() + self.replies);
        let udp: Vec<Vec<u8>> = got.into_iter().filter(|frame| frame[23] == 17).collect();
        assert_same_frames(&self.sent, &udp);
    }
}

/// Kills the verb before its acts with these numbers, or after them, until it ends by itself.
pub(crate) fn kill_at(verb: Verb, numbers: impl Iterator<Item = u32>, whens: impl Fn(u32) -> Vec<&'static str>) {
    let lab = lab_of(3);
    add_link(&lab, 1);
    let machine = lab.machine();
    let mut wire = Wire::new(&lab);
    start(&lab, &verb);
    let before = State::of(&lab);
    lab.said(&words(verb.command)).ok();
    let after = State::of(&lab);
    assert_quiet(&lab.said(&["sync", "--all"]), "undisturbed");
    end(&lab, &machine, &after);
    let mut kills = 0;
    for n in numbers {
        for when in whens(n) {
            let point = format!("{:?} killed {when} act {n}", verb.command);
            start(&lab, &verb);
            let mut seen = sent_before(&lab, &mut wire, &verb);
            let interrupt = format!("SNIFCTL_INTERRUPT={n} {when}");
            let killed = lab.said_by(&["env", &interrupt], &words(verb.command));
            if killed.status.signal() != Some(6) {
                killed.ok();
                assert!(State::of(&lab) == after, "{point}: it ended by itself, in another state");
                lab.said(&["down", "--all"]);
                assert!(kills > 0, "no kill at all");
                wire.end();
                eprintln!("{}: killed {kills} times, {n} acts or less", verb.command);
                return;
            }
            kills += 1;
            let expected = if request(&lab) == after.request { &after } else { &before };
            seen += wire.pass(&lab);
            let healed = lab.said(&["sync", "--all"]);
            assert!(healed.status.success(), "{point}: {healed:#?}");
            let state = State::of(&lab);
            assert!(state == *expected, "{point}: {healed:#?}\n{}", expected.apart(&state));
            assert_quiet(&lab.said(&["sync", "--all"]), &point);
            assert_counted(&lab, expected, verb.is_counted.then_some(seen), &point);
            end(&lab, &machine, expected);
        }
    }
}

#[track_caller]
fn assert_quiet(said: &Said, point: &str) {
    let quiet = said.status.success() && said.stdout.is_empty() && said.stderr.is_empty();
    assert!(quiet, "{point}: the second sync: {said:#?}");
}

fn start(lab: &Lab, verb: &Verb) {
    verb.start.iter().for_each(|command| drop(lab.said(&words(command)).ok()));
    if !verb.damage.is_empty() {
        lab.host(&["sh", "-euc", verb.damage]);
    }
}

/// Traffic before the kill, so that there is something to lose; how much the session has seen.
fn sent_before(lab: &Lab, wire: &mut Wire, verb: &Verb) -> u64 {
    if !verb.is_counted {
        return 0;
    }
    if verb.start == [BOTH] {
        lab.send(Ns::Peer, "peer1", &frames::series(&Ends::PEER_TO_HOST, 2));
        return 2 + wire.pass(lab);
    }
    wire.pass(lab)
}

/// Nothing that was counted is lost, or counted twice.
#[track_caller]
fn assert_counted(lab: &Lab, expected: &State, seen: Option<u64>, point: &str) {
    if expected.request == Value::Null {
        return;
    }
    let session = lab.session();
    let sum = |of: fn(&super::status::TapCounts) -> u64| {
        session.taps.iter().map(|tap| of(&tap.counts)).sum::<u64>() + of(&session.removed_taps)
    };
    let sent = session.remotes_total().pcnt + session.removed.pcnt;
    assert_eq!(sum(|tap| tap.stat.pcnt), sent + session.drops(), "{point}: asked = sent + drops in {session:#}");
    if let Some(seen) = seen {
        assert_eq!(sum(|tap| tap.seen), seen, "{point}: seen in {session:#}");
    }
}

/// Takes it down: the machine is as before.
#[track_caller]
fn end(lab: &Lab, machine: &str, state: &State) {
    if state.request != Value::Null {
        lab.said(&["down", "--all"]).quietly_ok();
    }
    lab.assert_as_before(machine);
}

// ---- state ----

/// How a session is, without its counters and without numbers that are another one each time.
#[derive(PartialEq)]
pub(crate) struct State {
    /// `null` where no session is up.
    request: Value,
    /// Of its parts, by what they are.
    parts: BTreeMap<String, Value>,
}

/// Members that count, and numbers of devices of the relay and of halves of the request's map.
const MOVES: [&str; 19] = [
    "stat",
    "seen",
    "filtered",
    "skipped",
    "own",
    "drops",
    "out_dropped",
    "removed",
    "removed_taps",
    "before",
    "clock",
    "relay",
    "peer",
    "device",
    "formatted",
    "last",
    "dropped",
    "ifindex",
    "passed",
];

/// The request of the stored memory, or null.
fn request(lab: &Lab) -> Value {
    let said = lab.said(&["map", "dump", "request"]);
    if !said.status.success() {
        return Value::Null;
    }
    let stored: Value = said.json();
    let stored = stored.as_array().map_or(stored.clone(), |all| all.first().cloned().unwrap_or_default());
    stored["request"].clone()
}

impl State {
    pub(crate) fn of(lab: &Lab) -> State {
        let request = request(lab);
        let mut parts = BTreeMap::new();
        parts.insert("pins".into(), json!(pins(lab)));
        if request == Value::Null {
            return State { request, parts };
        }
        for (name, value) in still(lab.status_json()["sessions"][0].clone()).as_object().expect("a session") {
            parts.insert(format!("status {name}"), value.clone());
        }
        let maps = lab.said(&["map", "dump"]).ok().json();
        for map in ["config", "slots", "remotes", "tunnels", "underlay", "request", "spread"] {
            parts.insert(format!("map {map}"), still(without_config(map, &maps[map])));
        }
        for map in ["taps", "outs"] {
            parts.insert(format!("map {map}"), json!(keys(&maps[map])));
        }
        parts.insert("devices".into(), devices(lab, &maps["remotes"]));
        parts.insert("relay".into(), relay(lab));
        parts.insert("filters".into(), filters(lab));
        State { request, parts }
    }

    /// The parts in which another one differs.
    fn apart(&self, other: &State) -> String {
        let mut text = String::new();
        for name in self.parts.keys().chain(other.parts.keys().filter(|name| !self.parts.contains_key(*name))) {
            let (expected, got) = (self.parts.get(name), other.parts.get(name));
            if expected != got {
                text += &format!("{name}:\n  expected {expected:?}\n  got      {got:?}\n");
            }
        }
        if self.request != other.request {
            text += &format!("request:\n  expected {}\n  got      {}", self.request, other.request);
        }
        text
    }
}

/// The number of the relay's port, and which half of the map the request is in.
fn without_config(map: &str, rows: &Value) -> Value {
    let mut rows = rows.clone();
    if map == "config" {
        let Some(row) = rows.get_mut(0) else { return rows };
        let value = if row["value"].is_object() { &mut row["value"] } else { row };
        let config = value.as_object_mut().expect("a config");
        config.remove("port");
        config.remove("request");
    }
    rows
}

/// Without what moves.
fn still(value: Value) -> Value {
    match value {
        Value::Object(members) => {
            let kept = members.into_iter().filter(|(name, _)| !MOVES.contains(&name.as_str()));
            Value::Object(kept.map(|(name, value)| (name, still(value))).collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(still).collect()),
        other => other,
    }
}

fn keys(rows: &Value) -> Vec<String> {
    rows.as_array().into_iter().flatten().map(|row| row["key"].to_string()).collect()
}

fn pins(lab: &Lab) -> Vec<String> {
    let root = lab.pins();
    let mut found = Vec::new();
    let mut dirs = vec![root.clone()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            found.push(path.strip_prefix(&root).expect("beneath it").to_string_lossy().into_owned());
            if path.is_dir() {
                dirs.push(path);
            }
        }
    }
    found.sort();
    found
}

fn links(lab: &Lab) -> Vec<Value> {
    serde_json::from_str(&lab.shown(&["ip", "-j", "-d", "link"])).expect("JSON of ip")
}

/// Where programs send to: the relay's devices, and the out interface of each remote, by name.
fn devices(lab: &Lab, remotes: &Value) -> Value {
    let pin = lab.pins().join("default/maps/devices");
    let dump = lab.shown(&["bpftool", "-j", "map", "dump", "pinned", &pin.to_string_lossy()]);
    let dump: Value = serde_json::from_str(&dump).expect("JSON of bpftool");
    let number = |bytes: &Value| {
        let byte = |hex: &Value| u8::from_str_radix(hex.as_str()?.strip_prefix("0x")?, 16).ok();
        let bytes: Vec<u8> = bytes.as_array()?.iter().map(byte).collect::<Option<_>>()?;
        Some(u64::from(u32::from_ne_bytes(bytes.try_into().ok()?)))
    };
    let rows = dump.as_array().expect("elements").iter();
    let rows: BTreeMap<u64, u64> =
        rows.filter_map(|row| Some((number(&row["key"])?, number(&row["value"])?))).collect();
    let links = links(lab);
    let name = |key: u64| {
        let link = links.iter().find(|link| link["ifindex"].as_u64() == rows.get(&key).copied());
        link.map_or(Value::Null, |link| link["ifname"].clone())
    };
    let of_remotes = remotes.as_array().into_iter().flatten();
    let of_remotes = of_remotes.map(|row| name(row["value"]["device"].as_u64().expect("a key of a device")));
    json!([name(0), name(1), of_remotes.collect::<Vec<_>>()])
}

fn relay(lab: &Lab) -> Value {
    let links = links(lab);
    let ours = links.iter().filter(|link| link["ifname"].as_str().is_some_and(|name| name.starts_with("snif")));
    let shown = ours.map(|link| {
        let has = |name: &str| link["flags"].as_array().is_some_and(|flags| flags.iter().any(|flag| flag == name));
        let names = ["ifname", "mtu", "master", "ifalias"].map(|name| link[name].clone());
        json!([names, link["linkinfo"]["info_kind"], link["inet6_addr_gen_mode"], has("UP"), has("NOARP")])
    });
    let mut all: Vec<Value> = shown.collect();
    all.sort_by_key(Value::to_string);
    json!(all)
}

/// What is at all hooks: device, hook, preference, handle and program.
fn filters(lab: &Lab) -> Value {
    let names = lab.interfaces();
    let script = "tc -j qdisc show; for dev; do for hook in ingress egress; do
        echo \"\\\"$dev $hook\\\"\"; tc -j filter show dev $dev $hook; done; done";
    let argv: Vec<&str> = ["sh", "-c", script, "sh"].into_iter().chain(names.iter().map(String::as_str)).collect();
    let shown = lab.shown(&argv);
    let (mut found, mut place) = (Vec::new(), String::new());
    for part in serde_json::Deserializer::from_str(&shown).into_iter::<Value>() {
        let part = part.expect("JSON of tc");
        place = part.as_str().map_or(place, String::from);
        for row in part.as_array().into_iter().flatten() {
            let filter = &row["options"];
            if row["kind"] == "clsact" {
                found.push(format!("{} clsact", row["dev"]));
            } else if filter.is_object() && !row["pref"].is_null() {
                found.push(format!("{place} {} {} {}", row["pref"], filter["handle"], filter["prog"]["name"]));
            }
        }
    }
    found.sort();
    json!(found)
}

/// Waits until `ip` says so of a device.
#[track_caller]
pub(crate) fn wait_for_link(lab: &Lab, dev: &str, says: &str) {
    let shown = || String::from_utf8_lossy(&lab.try_host(&["ip", "link", "show", "dev", dev]).stdout).into_owned();
    let ready = poll(PATIENCE, || shown().contains(says).then_some(()));
    assert!(ready.is_some(), "{}", shown());
}
