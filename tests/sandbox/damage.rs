//! Whatever is damaged of a session, one thing at a time and under traffic: `sync` names it, puts it right, and loses no
//! count.

use std::cell::Cell;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use crate::lab::capture::Capture;
use crate::lab::check::assert_same_frames;
use crate::lab::decode::{decap_gre, inner_frames};
use crate::lab::frames::{self, Ends};
use crate::lab::judge::Said;
use crate::lab::kills::words;
use crate::lab::links::add_link;
use crate::lab::remotes::collector;
use crate::lab::sessions::lab_of;
use crate::lab::status::{Session, TapCounts};
use crate::lab::traffic::Stream;
use crate::lab::{Lab, Ns, PATIENCE, poll};
use serde_json::Value;

/// What is done to a session.
#[derive(Clone, Copy)]
enum Damage {
    /// A shell command; $1 is the directory of its pins, $2 the foreign program's.
    Sh(&'static str),
    /// A row of a map is deleted: the first, or the one whose key is this number.
    Delete(&'static str, Option<u32>),
    /// Bytes of a row's value are replaced from an offset on.
    Write(&'static str, Option<u32>, usize, &'static [u8]),
    /// A row is copied to another key.
    Copy(&'static str, &'static [u8]),
    By(fn(&Lab)),
}

/// Which counters still have the name that they had.
#[derive(Clone, Copy, PartialEq)]
enum Counters {
    All,
    /// Only their sums: an interface has another name.
    Sums,
    /// Those of a tap are lost by the damage.
    Remotes,
}

#[derive(Clone, Copy)]
struct Row {
    damage: Damage,
    /// What `sync` says.
    says: &'static str,
    /// Copies of each frame that col0 gets then.
    copies: usize,
    counters: Counters,
    /// What ends the damage, where `sync` cannot; after it `sync` again.
    undo: Damage,
}

const NOTHING: Damage = Damage::Sh("");

const fn row(damage: Damage, says: &'static str) -> Row {
    Row { damage, says, copies: 2, counters: Counters::All, undo: NOTHING }
}

const fn sh(damage: &'static str, says: &'static str) -> Row {
    row(Damage::Sh(damage), says)
}

/// Of the machine, which has to be put back.
const fn machine(damage: &'static str, says: &'static str, copies: usize, undo: &'static str) -> Row {
    Row { damage: Damage::Sh(damage), says, copies, counters: Counters::All, undo: Damage::Sh(undo) }
}

const UP: &str = "up eth0 eth1 eth2 --tunnel gre --remote 198.51.100.10,198.51.100.11 --underlay 203.0.113.5:51820";

/// A session that is damaged again and again.
struct Bench {
    lab: Lab,
    copies: Capture,
    /// Frames whose copies have to be in the capture at the end.
    expected: Vec<Vec<u8>>,
    serial: Cell<u32>,
    foreign: PathBuf,
}

/// A program that is not ours.
const FOREIGN: &str = r#"
    __attribute__((section("tc"), used)) int foreign(void *skb) { return -1; }
    __attribute__((section("license"), used)) char _license[] = "GPL";
"#;

impl Bench {
    fn new() -> Bench {
        let lab = lab_of(3);
        (1..=2).for_each(|n| add_link(&lab, n));
        let foreign = PathBuf::from("/sys/fs/bpf").join(lab.ns_name(Ns::Host));
        let (source, object) = (lab.dir().join("foreign.c"), lab.dir().join("foreign.o"));
        fs::write(&source, FOREIGN).expect("write the foreign program");
        lab.host(&["clang", "-O2", "-target", "bpf", "-c", source.to_str().unwrap(), "-o", object.to_str().unwrap()]);
        lab.host(&["mkdir", foreign.to_str().unwrap()]);
        let pin = foreign.join("program");
        lab.host(&["bpftool", "prog", "load", object.to_str().unwrap(), pin.to_str().unwrap(), "type", "classifier"]);
        lab.said(&words(UP)).ok();
        let copies = collector(&lab);
        Bench { lab, copies, expected: Vec::new(), serial: Cell::new(0), foreign }
    }

    fn sync(&self) -> Said {
        self.lab.said(&["sync"])
    }

    #[track_caller]
    fn assert_in_order(&self, what: &str) {
        let said = self.sync();
        let quiet = said.status.success() && said.stdout.is_empty() && said.stderr.is_empty();
        assert!(quiet, "{what}: the second sync: {said:#?}");
    }

    fn do_damage(&self, damage: Damage) {
        let lab = &self.lab;
        match damage {
            Damage::Sh(script) => {
                let pins = lab.pins().join("default");
                lab.host(&["sh", "-euc", script, "sh", pins.to_str().unwrap(), self.foreign.to_str().unwrap()]);
            }
            Damage::By(act) => act(lab),
            Damage::Delete(map, key) => {
                let (key, _) = self.map_row(map, key);
                self.map(&["delete"], map, &[&["key", "hex"], &strs(&key)[..]].concat());
            }
            Damage::Write(map, key, at, bytes) => {
                let (key, mut value) = self.map_row(map, key);
                for (to, byte) in value[at..].iter_mut().zip(bytes) {
                    *to = format!("{byte:02x}");
                }
                self.update(map, &key, &value);
            }
            Damage::Copy(map, bytes) => {
                let (mut key, value) = self.map_row(map, None);
                for (to, byte) in key.iter_mut().zip(bytes) {
                    *to = format!("{byte:02x}");
                }
                self.update(map, &key, &value);
            }
        }
    }

    fn update(&self, map: &str, key: &[String], value: &[String]) {
        let key = [&["key", "hex"], &strs(key)[..]].concat();
        self.map(&["update"], map, &[&key[..], &["value", "hex"], &strs(value)].concat());
    }

    fn map(&self, verb: &[&str], map: &str, rest: &[&str]) -> String {
        let pin = self.lab.pins().join("default/maps").join(map);
        self.lab.shown(&[&["bpftool", "-j", "map"], verb, &["pinned", pin.to_str().unwrap()], rest].concat())
    }

    /// Key and value of a row, in hex.
    fn map_row(&self, map: &str, key: Option<u32>) -> (Vec<String>, Vec<String>) {
        let dump: Value = serde_json::from_str(&self.map(&["dump"], map, &[])).expect("JSON of bpftool");
        let hex = |bytes: &Value| -> Vec<String> {
            let bytes = bytes.as_array().expect("bytes").iter();
            bytes.map(|byte| byte.as_str().expect("hex").trim_start_matches("0x").to_string()).collect()
        };
        let number = key.map(|key| key.to_ne_bytes().map(|byte| format!("{byte:02x}")).to_vec());
        let mut rows = dump.as_array().expect("rows").iter();
        let found = rows.find(|row| number.as_ref().is_none_or(|number| *number == hex(&row["key"])));
        let found = found.unwrap_or_else(|| panic!("no row {key:?} in {map}: {dump}"));
        let value = if found["value"].is_array() { &found["value"] } else { &found["values"][0]["value"] };
        (hex(&found["key"]), hex(value))
    }

    /// Frames both ways over eth0 and eth1: each is copied so often.
    #[track_caller]
    fn assert_copied(&mut self, what: &str, copies: usize) {
        self.lab.wait_until_received();
        self.copies.settle();
        let already = self.copies.count();
        let mut sent = Vec::new();
        for (ns, dev, ends) in [
            (Ns::Peer, "peer0", Ends::PEER_TO_HOST),
            (Ns::Host, "eth0", Ends::HOST_TO_PEER),
            (Ns::Peer, "peer1", Ends::PEER_TO_HOST),
        ] {
            let first = self.serial.replace(self.serial.get() + 3);
            let frames: Vec<Vec<u8>> = (1..=3).map(|n| frames::ipv4_udp(&ends, first + n, 200 + n as usize)).collect();
            self.lab.send(ns, dev, &frames);
            sent.extend(frames);
        }
        let all = already + sent.len() * copies;
        let came = poll(PATIENCE, || (self.copies.count() >= all).then_some(()));
        self.copies.settle();
        let got = self.copies.count() - already;
        assert!(came.is_some() && got == all - already, "{what}: {got} copies of {} frames, {copies} each", sent.len());
        (0..copies).for_each(|_| self.expected.extend(sent.iter().cloned()));
    }

    /// Damages one thing while frames pass.
    #[track_caller]
    fn damage(&mut self, row: Row) {
        let what = match row.damage {
            Damage::Sh(script) => script.to_string(),
            Damage::Delete(map, key) => format!("a row of {map} deleted ({key:?})"),
            Damage::Write(map, key, at, _) => format!("a row of {map} overwritten ({key:?}) at {at}"),
            Damage::Copy(map, _) => format!("a row too many in {map}"),
            Damage::By(_) => row.says.to_string(),
        };
        let before = self.lab.session();
        let passing: Vec<Vec<u8>> = (0..7).map(|n| frames::ipv6_udp(&Ends::PEER_TO_HOST, n, 300)).collect();
        let stream = Stream::start(&self.lab, (Ns::Peer, "peer0"), &passing, 2000, "--pps=500");
        self.do_damage(row.damage);
        let said = self.sync();
        assert!(said.status.success(), "{what}: {said:#?}");
        assert!(said.stdout.contains(row.says), "{what}: {:?} in {said:#?}", row.says);
        assert!(said.stdout.lines().count() <= 7, "{what}: {said:#?}");
        assert_forward(&what, row.counters, &before, &self.lab.session());
        drop(stream);
        self.assert_in_order(&what);
        self.assert_copied(&what, row.copies);
        if let Damage::Sh("") = row.undo {
            return;
        }
        let damaged = self.lab.session();
        self.do_damage(row.undo);
        let said = self.sync();
        assert!(said.status.success(), "{what}, and back: {said:#?}");
        assert_forward(&format!("{what}, and back"), row.counters, &damaged, &self.lab.session());
        self.assert_in_order(&format!("{what}, and back"));
    }

    /// All of them, one after the other; then nothing is left.
    fn run(mut self, rows: &[Row]) {
        self.assert_copied("undamaged", 2);
        let damage = |row: &&Row| catch_unwind(AssertUnwindSafe(|| self.damage(**row))).is_err();
        let failed: Vec<&str> = rows.iter().filter(damage).map(|row| row.says).collect();
        assert!(failed.is_empty(), "{} of {} failed: {failed:#?}", failed.len(), rows.len());
        self.assert_copied("at the end", 2);
        // Where a template was damaged, copies have left as something else.
        let copies = self.copies.stop().into_iter().filter(|frame| frame[12..14] == [8, 0] && frame[23] == 47);
        let got = inner_frames(&decap_gre(&copies.collect::<Vec<_>>()));
        let ours: Vec<Vec<u8>> = got.into_iter().filter(|frame| frame[12..14] == [8, 0]).collect();
        assert_same_frames(&self.expected, &ours);
        self.lab.said(&["down"]).quietly_ok();
        self.lab.assert_no_pins();
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.foreign);
    }
}

fn strs(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

/// No counter is smaller than before.
#[track_caller]
fn assert_forward(what: &str, counters: Counters, before: &Session, after: &Session) {
    let counts = |name: String, counts: &TapCounts| {
        [
            (format!("{name} pcnt"), counts.stat.pcnt),
            (format!("{name} bcnt"), counts.stat.bcnt),
            (format!("{name} seen"), counts.seen),
        ]
    };
    let all = |session: &Session| -> Vec<(String, u64)> {
        let mut found = Vec::new();
        for remote in &session.remotes {
            found.push((format!("{} pcnt", remote.address), remote.stat.pcnt));
            found.push((format!("{} dcnt", remote.address), remote.stat.dcnt));
        }
        found.push(("sent".into(), session.remotes_total().pcnt + session.removed.pcnt));
        found.extend(session.drops.iter().map(|(reason, count)| (format!("drops {reason}"), *count)));
        if counters == Counters::All {
            found.extend(
                session.taps.iter().flat_map(|tap| counts(format!("{} {}", tap.interface, tap.direction), &tap.counts)),
            );
        }
        if counters != Counters::Remotes {
            found.push(("asked".into(), session.taps_total().pcnt + session.removed_taps.stat.pcnt));
            let seen = session.taps.iter().map(|tap| tap.counts.seen).sum::<u64>();
            found.push(("seen".into(), seen + session.removed_taps.seen));
        }
        found
    };
    let now: std::collections::BTreeMap<String, u64> = all(after).into_iter().collect();
    for (name, was) in all(before) {
        let is = now.get(&name).unwrap_or_else(|| panic!("{what}: {name} is gone: {after:#}"));
        assert!(*is >= was, "{what}: {name} went from {was} back to {is}: {after:#}");
    }
}

// ---- the rows ----

#[test]
fn damage_at_hooks_and_relay_is_repaired() {
    Bench::new().run(&[
        sh("tc filter del dev eth0 ingress", "tap eth0 ingress: its filter is gone"),
        sh("tc filter del dev eth1 egress", "tap eth1 egress: its filter is gone"),
        sh("tc qdisc del dev eth0 clsact", "tap eth0 ingress: its clsact qdisc is gone"),
        sh(
            "set -- $1 $(tc -j filter show dev eth0 ingress | grep -o '\"handle\":\"0x[0-9a-f]*\"' | cut -d '\"' -f 4 | head -1)
            tc filter add dev eth0 ingress pref 7 handle $2 bpf direct-action object-pinned $1/snif_tap_in",
            "tap eth0 ingress: it is there twice",
        ),
        machine(
            "pin=$2/program
            handle=$(tc -j filter show dev eth0 ingress | grep -o '\"handle\":\"0x[0-9a-f]*\"' | cut -d '\"' -f 4 | head -1)
            tc filter del dev eth0 ingress
            tc filter add dev eth0 ingress pref 1 handle $handle bpf direct-action object-pinned $pin",
            "tap eth0 ingress: its filter is gone",
            2,
            "tc filter del dev eth0 ingress pref 1",
        ),
        sh("ip link del snif0", "relay: its bridge is gone"),
        sh("ip link del snif0p", "relay: its port is gone"),
        sh("tc filter del dev snif0 egress", "snif_encap is not at the egress hook of snif0"),
        sh("tc filter del dev snif0l egress", "snif_wire is not at the egress hook of snif0l"),
        sh("tc filter del dev snif0p egress", "snif_deliver is not at the egress hook of snif0p"),
        sh("tc qdisc del dev snif0 clsact", "snif_encap is not at the egress hook of snif0"),
        sh("ip link set snif0 down", "snif0 is down"),
        sh("ip link set snif0l down", "snif0l is down"),
        sh("ip link set snif0p down", "snif0p is down"),
        sh("ip link set snif0l mtu 600", "the MTU of snif0l is 600"),
        sh("ip link set snif0p mtu 600", "the MTU of snif0p is 600"),
        sh("ethtool -K snif0 tx on", "tx-checksumming of snif0 is on"),
        sh("ip link set snif0l nomaster", "snif0 has lost its port"),
        sh("ip link set snif0 alias mine", "snif0 does not say whose it is"),
        sh("ip link set snif0p arp on", "ARP of snif0p is on"),
    ]);
}

#[test]
fn pins_that_are_gone_are_made_again() {
    const PROGRAMS: [(&str, &str); 5] = [
        ("rm $1/snif_tap_in", "program snif_tap_in: its pin is gone"),
        ("rm $1/snif_tap_out", "program snif_tap_out: its pin is gone"),
        ("rm $1/snif_encap", "program snif_encap: its pin is gone"),
        ("rm $1/snif_wire", "program snif_wire: its pin is gone"),
        ("rm $1/snif_deliver", "program snif_deliver: its pin is gone"),
    ];
    const MAPS: [(&str, &str); 17] = [
        ("rm $1/maps/bucket", "map bucket: its pin is gone"),
        ("rm $1/maps/config", "map config: its pin is gone"),
        ("rm $1/maps/drops", "map drops: its pin is gone"),
        ("rm $1/maps/outs", "map outs: its pin is gone"),
        ("rm $1/maps/remote_state", "map remote_state: its pin is gone"),
        ("rm $1/maps/remote_stats", "map remote_stats: its pin is gone"),
        ("rm $1/maps/remotes", "map remotes: its pin is gone"),
        ("rm $1/maps/request", "map request: its pin is gone"),
        ("rm $1/maps/sizes", "map sizes: its pin is gone"),
        ("rm $1/maps/slots", "map slots: its pin is gone"),
        ("rm $1/maps/spread", "map spread: its pin is gone"),
        ("rm $1/maps/taps", "map taps: its pin is gone"),
        ("rm $1/maps/tunnels", "map tunnels: its pin is gone"),
        ("rm $1/maps/underlay", "map underlay: its pin is gone"),
        ("rm $1/maps/devices", "map devices: its pin is gone"),
        ("rm $1/maps/rest", "map rest: its pin is gone"),
        ("rm $1/maps/scratch", "map scratch: its pin is gone"),
    ];
    let mut rows: Vec<Row> = PROGRAMS.iter().chain(&MAPS).map(|(damage, says)| sh(damage, says)).collect();
    rows.push(sh("rm $1/snif_tap_in $1/snif_tap_out", "program snif_tap_out: its pin is gone"));
    rows.push(sh("rm $1/snif_*", "program snif_deliver: its pin is gone"));
    rows.push(sh("rm $1/snif_tap_in; tc filter del dev eth0 ingress", "program snif_tap_in: its pin is gone"));
    rows.push(sh(
        "rm $1/snif_tap_in; for dev in eth0 eth1 eth2; do tc filter del dev $dev ingress; done",
        "programs: some are gone",
    ));
    Bench::new().run(&rows);
}

#[test]
fn rows_of_maps_that_are_gone_or_damaged_are_written_again() {
    use Damage::{Copy, Delete, Write};
    let lost = |damage, says| Row { counters: Counters::Remotes, ..row(damage, says) };
    Bench::new().run(&[
        lost(Delete("taps", None), "its row in taps is missing"),
        lost(Write("taps", None, 0, &[9]), "its row in taps is damaged"),
        row(Delete("slots", None), "its row in slots is missing"),
        row(Write("slots", None, 0, &[0xee]), "its row in slots is damaged"),
        row(Delete("remotes", Some(0)), "remote 198.51.100.10: it has no row"),
        row(Write("remotes", Some(1), 12, &[0, 1, 0, 0]), "remote 198.51.100.11: MTU 256"),
        row(Write("remotes", Some(1), 50, &[0xee; 40]), "remote 198.51.100.11: "),
        row(Delete("tunnels", None), "map tunnels: a row is missing or damaged"),
        row(Write("tunnels", None, 0, &[9]), "map tunnels: a row is missing or damaged"),
        row(Delete("underlay", None), "map underlay: a row is missing or damaged"),
        row(Write("underlay", None, 0, &[0xee]), "map underlay: a row is missing or damaged"),
        row(Delete("outs", None), "map outs: a row is missing"),
        row(Delete("devices", Some(0)), "the programs do not know snif0"),
        row(Delete("devices", Some(1)), "the programs do not know snif0"),
        row(Delete("devices", Some(2)), "remote 198.51.100.10: the programs do not know its out interface"),
        row(Write("devices", Some(0), 0, &[1, 0, 0, 0]), "the programs do not know snif0"),
        row(
            Write("devices", Some(2), 0, &[1, 0, 0, 0]),
            "remote 198.51.100.10: the programs do not know its out interface",
        ),
        row(Write("spread", Some(3), 0, &[9; 64]), "flow table"),
        row(Write("config", None, 48, &[3]), "config: it has another value of oversize"),
        row(Write("config", None, 0, &[0; 8]), "config: it has another value of remotes"),
        row(Write("config", None, 0, &[0xff; 8]), "config: it has another value of remotes"),
        row(Write("config", None, 49, &[17]), "config: it has another value of tunnel"),
        row(Write("config", None, 24, &[0; 4]), "relay"),
        row(Copy("remotes", &[7]), "maps: rows are left that stand for nothing"),
        row(Copy("slots", &[70]), "maps: rows are left that stand for nothing"),
        row(Copy("tunnels", &[1]), "maps: rows are left that stand for nothing"),
        row(Copy("underlay", &[1]), "maps: rows are left that stand for nothing"),
        Row { counters: Counters::Remotes, ..row(Copy("taps", &[0xee]), "maps: rows are left that stand for nothing") },
    ]);
}

fn remake_watched(lab: &Lab) {
    lab.host(&["ip", "link", "del", "eth1"]);
    add_link(lab, 1);
}

/// A second way out, to the collector too.
fn second_out(lab: &Lab) {
    let collector = lab.ns_name(Ns::Collector);
    let make = format!(
        "link add out1 mtu 1700 type veth peer name col1 mtu 1700 netns {collector}\nlink set out1 addrgenmode none\n\
         address add 203.0.113.1/32 dev out1\nlink set out1 up"
    );
    lab.ip_batch(Ns::Host, &make);
    lab.ip_batch(Ns::Collector, "link set col1 addrgenmode none\nlink set col1 up");
    lab.ip_batch(
        Ns::Host,
        "neigh replace 198.51.100.11 lladdr 02:00:00:00:02:03 nud permanent dev out1\n\
         route replace 198.51.100.11/32 dev out1",
    );
}

fn remake_out(lab: &Lab) {
    lab.host(&["ip", "link", "del", "out1"]);
    second_out(lab);
}

#[test]
fn a_machine_that_has_changed_is_followed() {
    let sums = |row: Row| Row { counters: Counters::Sums, ..row };
    Bench::new().run(&[
        sums(machine(
            "ip link set eth1 down; ip link set eth1 name ethx; ip link set ethx up; sleep 0.1",
            "ethx: it was called eth1",
            2,
            "ip link set ethx down; ip link set ethx name eth1; ip link set eth1 up; sleep 0.1",
        )),
        row(Damage::By(remake_watched), "eth1: it was made again"),
        sums(machine(
            "ip link set eth1 down; ip link set eth2 down; ip link set eth1 name ethx; ip link set eth2 name eth1
            ip link set ethx name eth2; ip link set eth1 up; ip link set eth2 up; sleep 0.1",
            "it was called eth",
            2,
            "ip link set eth1 down; ip link set eth2 down; ip link set eth1 name ethx; ip link set eth2 name eth1
            ip link set ethx name eth2; ip link set eth1 up; ip link set eth2 up; sleep 0.1",
        )),
        machine("ip link set eth1 mtu 1400", "eth1: its MTU was 1500", 2, "ip link set eth1 mtu 1500"),
        Row {
            undo: Damage::Sh("ip route del 198.51.100.11/32 dev out1"),
            copies: 1,
            ..row(Damage::By(second_out), "remote 198.51.100.11: out interface out0 → out1")
        },
        machine("ip route add 198.51.100.11/32 dev out1", "out interface out0 → out1", 1, ""),
        Row {
            undo: Damage::Sh("ip route del 198.51.100.11/32 dev out1"),
            copies: 1,
            ..row(Damage::By(remake_out), "an interface that is gone → out1")
        },
        machine(
            "ip neigh replace 198.51.100.11 lladdr 02:00:00:00:02:09 nud permanent dev out0",
            "remote 198.51.100.11: next hop 02:00:00:00:02:02 → 02:00:00:00:02:09",
            2,
            "ip neigh replace 198.51.100.11 lladdr 02:00:00:00:02:02 nud permanent dev out0",
        ),
        machine(
            "ip addr add 198.51.100.77/32 dev out0; ip route add 198.51.100.11/32 dev out0 src 198.51.100.77",
            "remote 198.51.100.11: source 198.51.100.1 → 198.51.100.77",
            2,
            "ip route del 198.51.100.11/32; ip addr del 198.51.100.77/32 dev out0",
        ),
        machine("ip link set out0 mtu 1650", "MTU 1700 → 1650", 2, "ip link set out0 mtu 1700"),
        machine(
            "ip addr add 198.51.100.11/32 dev lo",
            "remote 198.51.100.11: it was reached through out0, and cannot be any more",
            1,
            "ip addr del 198.51.100.11/32 dev lo",
        ),
        machine(
            "ip route add unreachable 198.51.100.11/32",
            "remote 198.51.100.11: it was reached through out0, and cannot be any more",
            1,
            "ip route del unreachable 198.51.100.11/32",
        ),
    ]);
}
