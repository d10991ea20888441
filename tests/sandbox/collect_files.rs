//! The files of `snifctl collect`: their names, sizes and times are tcpdump's, no frame is lost between two of them, and each
//! reads the same in every tool.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::lab::capture::tshark_fields;
use crate::lab::collect::*;
use crate::lab::frames::{self, Ends, GRE};
use crate::lab::judge::Said;
use crate::lab::{COLLECTOR_IP, Lab, Ns, OUT_IP, Options, PATIENCE, poll, signal};

/// Bytes of each frame: 124 fill a file of a million bytes.
const FRAME: usize = 8042;
/// Bytes before each frame, and before all, in a file of the old format.
const RECORD: usize = 16;
const HEADER: usize = 24;

fn lab() -> Lab {
    let lab = Lab::with(Options { out_mtu: 9000, ..Options::default() });
    answering(&lab, &[COLLECTOR_IP.into()]);
    lab
}

fn frame(n: u32) -> Vec<u8> {
    frames::jumbo(&Ends::HOST_TO_PEER, n, FRAME)
}

/// Sends the frames of these numbers.
fn send(lab: &Lab, numbers: Range<u32>) {
    lab.send(Ns::Host, "out0", &numbers.map(|n| numbered(OUT_IP, n, &frame(n))).collect::<Vec<_>>());
}

/// The numbers of the frames in a file; panics unless each is as it was sent.
#[track_caller]
fn numbers(lab: &Lab, file: &Path) -> Vec<u32> {
    let number = |got: Vec<u8>| {
        let n = u32::from_be_bytes(got[46..50].try_into().expect("four bytes"));
        assert!(got == frame(n), "{}: frame {n} differs", file.display());
        n
    };
    frames_in(lab, file, "frame").into_iter().map(number).collect()
}

/// A new directory of the lab's, and what `-w` gets for a name in it.
fn dir_for(lab: &Lab, name: &str) -> (PathBuf, String) {
    let dir = lab.fresh_path("files");
    fs::create_dir(&dir).expect("a directory");
    let path = text(&dir.join(name)).to_string();
    (dir, path)
}

/// Names in a directory, sorted.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("a directory");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8")).collect();
    names.sort_unstable();
    names
}

/// Waits until a file has so many frames in the old format.
#[track_caller]
fn wait_for(file: &Path, frames: usize) {
    let bytes = (HEADER + frames * (RECORD + FRAME)) as u64;
    let there = || fs::metadata(file).map_or(0, |file| file.len());
    let came = poll(PATIENCE, || (there() == bytes).then_some(()));
    assert!(came.is_some(), "{}: {} of {bytes} bytes", file.display(), there());
}

fn tool(name: &str, args: &[&str]) -> String {
    let out = Command::new(name).env("HOME", "/tmp").env("TZ", "UTC").args(args).output().expect("start a tool");
    assert!(out.status.success(), "{name} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("UTF-8")
}

// ---- sizes, times, and both ----

#[test]
fn files_of_a_size_are_those_of_tcpdump_byte_for_byte() {
    let lab = lab();
    let counts: [&[&str]; 5] = [&[], &["-W", "1"], &["-W", "2"], &["-W", "3"], &["-W", "11"]];
    let args = ["--tunnel", "gre", "--pcap", "--count", "611", "-w"];
    let whole = lab.fresh_path("whole.pcap");
    let all = Collector::start(&lab, &[&args[..], &[text(&whole)]].concat());
    let rotating = counts.map(|count| {
        let (dir, path) = dir_for(&lab, "size%s");
        (Collector::start(&lab, &[&args[..], &[&path, "-C", "1"], count].concat()), dir)
    });
    send(&lab, 0..611);
    all.ended().ok();
    for ((collector, ours), count) in rotating.into_iter().zip(counts) {
        collector.ended().ok();
        let (theirs, path) = dir_for(&lab, "size%s");
        let read = ["--time-stamp-precision=nano", "-Z", "root", "-r", text(&whole), "-w", &path, "-C", "1"];
        tool("tcpdump", &[&read[..], count].concat());
        assert_eq!(names(&ours), names(&theirs), "{count:?}");
        for name in names(&ours) {
            let [ours, theirs] = [&ours, &theirs].map(|dir| fs::read(dir.join(&name)).expect("a file"));
            assert!(ours == theirs, "{count:?}: {name} differs, {} and {} bytes", ours.len(), theirs.len());
        }
    }
}

#[test]
fn files_of_a_time_hold_each_frame_once_and_there_are_as_many_as_were_asked_for() {
    let lab = lab();
    let (dir, path) = dir_for(&lab, "%s");
    let mut collector = Collector::start(&lab, &["-w", &path, "-G", "1", "-W", "3", "--json"]);
    let mut sent = 0;
    while collector.goes_on() {
        send(&lab, sent..sent + 3);
        sent += 3;
        assert!(sent < 3000, "it goes on: {}", collector.said());
    }
    let report = collector.ended().ok().json();
    let names = names(&dir);
    assert_eq!(names.len(), 3, "{names:?}");
    let all: Vec<u32> = names.iter().flat_map(|name| numbers(&lab, &dir.join(name))).collect();
    assert_eq!(all, (0..all.len() as u32).collect::<Vec<_>>());
    assert_eq!(report["written"], all.len());

    // A file begins with the frame that comes when the one before has had its time.
    let times = names.iter().map(|name| written(&lab, &dir.join(name)).into_iter().map(|frame| frame.time).collect());
    let times: Vec<Vec<Duration>> = times.collect();
    let second = Duration::from_secs(1);
    for (name, times) in names.iter().zip(&times).skip(1) {
        assert_eq!(*name, times[0].as_secs().to_string());
        assert!(times.iter().all(|time| *time < times[0] + second), "{times:?}");
    }
    assert!(times[2][0] >= times[1][0] + second, "{times:?}");
}

/// Of names that end with -, or with - and a number: by what is before it, the numbers.
fn by_time(dir: &Path) -> BTreeMap<String, Vec<u32>> {
    let mut found: BTreeMap<String, Vec<u32>> = BTreeMap::new();
    for name in names(dir) {
        let (time, number) = name.split_once('-').expect("a -");
        found.entry(time.into()).or_default().push(if number.is_empty() { 0 } else { number.parse().expect(&name) });
    }
    found.values_mut().for_each(|numbers| numbers.sort_unstable());
    found
}

#[test]
fn each_time_begins_with_its_first_file_and_may_be_a_ring() {
    let lab = lab();
    let args = ["--tunnel", "gre", "-C", "1", "-G", "3", "--count", "600", "-w"];
    let [(plain, path), (ring, ring_path)] = [(); 2].map(|()| dir_for(&lab, "%s-"));
    let begun = Instant::now();
    let collectors = [&[path.as_str()][..], &[&ring_path, "-W", "2"]]
        .map(|more| Collector::start(&lab, &[&args[..], more].concat()));
    send(&lab, 0..300);
    assert!(poll(PATIENCE, || (begun.elapsed() > Duration::from_secs(4)).then_some(())).is_some());
    send(&lab, 300..600);
    for collector in collectors {
        collector.ended().ok();
    }

    let times = by_time(&plain);
    assert!(times.len() >= 2, "{times:?}");
    let mut all = Vec::new();
    for (time, files) in times {
        assert_eq!(files, (0..files.len() as u32).collect::<Vec<_>>(), "{time}");
        let name = |n| if n == 0 { format!("{time}-") } else { format!("{time}-{n}") };
        all.extend(files.into_iter().flat_map(|n| numbers(&lab, &plain.join(name(n)))));
    }
    assert_eq!(all, (0..600).collect::<Vec<_>>());

    let (mut next, mut overwritten) = (0, 0);
    for (time, files) in by_time(&ring) {
        assert!(files == [0] || files == [0, 1], "{time}: {files:?}");
        let mut kept: Vec<Vec<u32>> =
            files.into_iter().map(|n| numbers(&lab, &ring.join(format!("{time}-{n}")))).collect();
        kept.sort_unstable();
        let kept = kept.concat();
        overwritten += kept[0] - next;
        next = kept[kept.len() - 1] + 1;
        assert_eq!(kept, (kept[0]..next).collect::<Vec<_>>(), "{time}");
    }
    assert_eq!(next, 600);
    assert!(overwritten >= 124, "{overwritten}");
}

// ---- SIGHUP ----

#[test]
fn a_signal_begins_the_next_file_of_a_ring_and_of_a_time() {
    let lab = lab();
    let args = ["--tunnel", "gre", "--pcap", "-w"];
    let ((dir, path), (timed, timed_path)) = (dir_for(&lab, "ring"), dir_for(&lab, "%s"));
    let ring = Collector::start(&lab, &[&args[..], &[&path, "-C", "1", "-W", "2", "--count", "3"]].concat());
    let other = Collector::start(&lab, &[&args[..], &[&timed_path, "-G", "3600", "--count", "3"]].concat());
    for n in 0..3 {
        let name = ["ring0", "ring1", "ring0"][n as usize];
        wait_for(&dir.join(name), 0);
        send(&lab, n..n + 1);
        if n < 2 {
            wait_for(&dir.join(name), 1);
            signal(ring.id(), "HUP");
        }
        if n == 0 {
            // Within one second the name is the same, and the file stays.
            let rotated = poll(PATIENCE, || {
                signal(other.id(), "HUP");
                (names(&timed).len() > 1).then_some(())
            });
            assert!(rotated.is_some(), "{}", other.said());
        }
    }
    ring.ended().ok();
    other.ended().ok();
    assert_eq!(names(&dir), ["ring0", "ring1"]);
    assert_eq!([2, 1].map(|n| vec![n]), ["ring0", "ring1"].map(|name| numbers(&lab, &dir.join(name))));
    let of_times: Vec<Vec<u32>> = names(&timed).iter().map(|name| numbers(&lab, &timed.join(name))).collect();
    assert!(of_times[0] == [0] && of_times.concat() == [0, 1, 2], "{of_times:?}");
}

#[test]
fn a_file_that_is_still_there_goes_on_after_a_signal() {
    let lab = lab();
    let file = lab.fresh_path("stays.pcapng");
    let collector = Collector::start(&lab, &["-w", text(&file)]);
    send(&lab, 0..3);
    assert!(poll(PATIENCE, || (count(&file) == 3).then_some(())).is_some());
    signal(collector.id(), "HUP");
    let note = format!("-w {} is still there, so it goes on; move it away before SIGHUP", file.display());
    assert!(poll(PATIENCE, || collector.said().contains(&note).then_some(())).is_some(), "{}", collector.said());
    send(&lab, 3..7);
    collector.stop_after(&file, 7).ok();
    assert_eq!(numbers(&lab, &file), [0, 1, 2, 3, 4, 5, 6]);
}

// ---- no room, no right ----

/// Panics unless it ended with 1, and one line that says so.
#[track_caller]
fn failed(said: &Said, names: &str, ends: &str) {
    let lines: Vec<&str> = said.stderr.lines().collect();
    let [receiving, failed] = lines[..] else { panic!("{said:#?}") };
    assert_eq!((said.status.code(), receiving), (Some(1), "snifctl: receiving"), "{said:#?}");
    assert!(failed.starts_with(&format!("snifctl: {names}")) && failed.ends_with(ends), "{failed}");
}

#[test]
fn a_limit_on_files_ends_them_with_a_whole_frame() {
    let lab = lab();
    for more in [&[][..], &["--pcap"]] {
        let file = lab.fresh_path("limited");
        let args = [&["-w", text(&file), "--json"], more].concat();
        let collector = Collector::start_by(&lab, &["prlimit", "--fsize=100000"], &args);
        send(&lab, 0..100);
        let said = collector.ended();
        let names = format!("cannot write -w {}: File too large", file.display());
        failed(&said, &names, "it ends with its last whole frame; bound it, as in: -C 100 -W 10");
        assert_eq!(numbers(&lab, &file), (0..12).collect::<Vec<_>>(), "{more:?}");
        assert_eq!(said.json()["written"], 12, "{more:?}");
        let shown = tool("tcpdump", &["-n", "-r", text(&file)]);
        assert_eq!(shown.lines().count(), 12, "{more:?}: {shown}");
    }
}

#[test]
fn a_disk_without_room_for_the_next_file_leaves_the_others_whole() {
    let lab = lab();
    let dir = lab.fresh_path("disk");
    let script =
        "dir=$1 && shift && mount -t tmpfs -o $DISK tmpfs /mnt && \"$@\"; code=$?; cp -r /mnt \"$dir\"; exit $code";
    for (disk, name, why, ends, second) in [
        ("size=1500k", "full1", "No space left on device", "as in: -C 100 -W 10", Some(65)),
        ("nr_inodes=2", "full1", "No space left on device", "as in: -w /tmp/all.pcapng", None),
    ] {
        let _ = fs::remove_dir_all(&dir);
        let option = format!("DISK={disk}");
        let by = ["env", &option, "unshare", "--mount", "sh", "-c", script, "sh", text(&dir)];
        let collector = Collector::start_by(&lab, &by, &["-w", "/mnt/full", "-C", "1", "--json"]);
        send(&lab, 0..300);
        let said = collector.ended();
        failed(&said, &format!("cannot write -w /mnt/{name}: {why}"), ends);
        let first = numbers(&lab, &dir.join("full"));
        assert_eq!(first, (0..first.len() as u32).collect::<Vec<_>>());
        let kept = second.map_or(Vec::new(), |_| numbers(&lab, &dir.join("full1")));
        let next = first.len() as u32;
        assert_eq!(kept, (next..next + kept.len() as u32).collect::<Vec<_>>());
        assert_eq!(kept.len(), second.unwrap_or(0));
        assert_eq!(said.json()["written"], first.len() + kept.len());
    }
}

#[test]
fn nothing_stays_on_a_disk_that_is_full_from_the_first_byte() {
    let lab = lab();
    let script = "mount -t tmpfs -o size=16k tmpfs /mnt && head -c 16384 /dev/zero > /mnt/fill && \"$@\"; code=$?
        test \"$(ls /mnt)\" = fill && exit $code";
    let by = ["unshare", "--mount", "sh", "-c", script, "sh", env!("CARGO_BIN_EXE_snifctl")];
    let said = lab.command(Ns::Collector, &[&by[..], &["collect", "-w", "/mnt/full"]].concat()).output();
    let names = "cannot write -w /mnt/full: No space left on device";
    Said::from(said.expect("it runs")).refused(1, names, "as in: -w /tmp/all.pcapng");
}

#[test]
fn files_belong_to_the_user_who_goes_on() {
    let lab = lab();
    let id = |option: &str| tool("id", &[option, "nobody"]).trim().parse::<u32>().expect("a number");
    let (user, group) = (id("-u"), id("-g"));
    let (dir, path) = dir_for(&lab, "mine");
    chown(&dir, Some(user), Some(group)).expect("chown");
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).expect("chmod");
    let collector = Collector::start(&lab, &["-w", &path, "-C", "1", "-Z", "nobody"]);
    let status = fs::read_to_string(format!("/proc/{}/status", collector.id())).expect("a process");
    let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).expect(name).trim().to_string();
    assert_eq!(line("Uid:"), [user; 4].map(|id| id.to_string()).join("\t"));
    assert_eq!(line("Gid:"), [group; 4].map(|id| id.to_string()).join("\t"));
    assert_eq!(
        (line("Groups:"), line("CapEff:"), line("CapPrm:")),
        (group.to_string(), "0".repeat(16), "0".repeat(16))
    );
    send(&lab, 0..300);
    let last = dir.join("mine2");
    collector.stop_after(&last, 300 - 2 * 125).ok();
    assert_eq!(names(&dir), ["mine", "mine1", "mine2"]);
    for name in names(&dir) {
        let file = fs::metadata(dir.join(name)).expect("a file");
        assert_eq!((file.uid(), file.gid()), (user, group));
    }

    let refused = |path: &str, user: &str, names: &str, ends: &str| {
        let args = ["collect", "--tunnel", "gre", "-w", path, "-Z", user];
        let mut command = lab.command(Ns::Collector, &[env!("CARGO_BIN_EXE_snifctl")]);
        Said::from(command.args(args).output().expect("run snifctl")).refused(1, names, ends);
    };
    let (roots, theirs) = dir_for(&lab, "theirs");
    fs::set_permissions(&roots, fs::Permissions::from_mode(0o755)).expect("chmod");
    refused(&theirs, "nobody", &format!("cannot write -w {theirs}: Permission denied"), "-w /tmp/all.pcapng");
    refused(&path, "nobody7", "-Z nobody7 is no user of this machine", "see: getent passwd");
}

// ---- what tools see ----

/// A frame that a switch has sent: the source, its number, nanoseconds since 1970, and the direction.
struct Planned {
    from: IpAddr,
    number: u32,
    time: u64,
    is_egress: bool,
    gap: u64,
}

impl Planned {
    /// ERSPAN type III, session 7, port 3, with a platform's seconds.
    fn packet(&self) -> Vec<u8> {
        let (seconds, nanoseconds) = ((self.time / 1_000_000_000) as u32, (self.time % 1_000_000_000) as u32);
        let words = [0x1000_22eb, self.number, 0x2000_0007, nanoseconds];
        let flags = 0x8000_0005 | if self.is_egress { 8 } else { 0 };
        let header = words.into_iter().chain([flags, 0x1400_0007, seconds]).flat_map(u32::to_be_bytes);
        outer(self.from, GRE, &header.chain(frame(self.number)).collect::<Vec<_>>())
    }

    fn interface(&self) -> String {
        format!("erspan3 7 tap 3 {} @ {}", if self.is_egress { "egress" } else { "ingress" }, self.from)
    }

    fn seconds(&self) -> String {
        format!("{}.{:09}", self.time / 1_000_000_000, self.time % 1_000_000_000)
    }
}

/// Of two switches, which both lose some.
fn planned() -> Vec<Planned> {
    let other = Ipv4Addr::new(198, 51, 100, 77);
    let plan = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 4, 2), (1, 1, 0), (1, 9, 7), (0, 5, 0), (0, 7, 1)];
    let one = |(n, (from, number, gap)): (u64, (usize, u32, u64))| Planned {
        from: [OUT_IP, other][from].into(),
        number,
        time: [1_700_000_000_000_000_001, 1_700_000_000_999_999_999, 1_700_000_001_000_000_000][n as usize / 3] + n,
        is_egress: n % 2 == 1,
        gap,
    };
    (0..).zip(plan).map(one).collect()
}

/// Of each interface in the order of the file: frames received and lost by its statistics.
fn statistics(file: &Path) -> Vec<(u64, u64)> {
    let bytes = fs::read(file).expect("a file");
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four")) as usize;
    let (mut at, mut found) = (0, Vec::new());
    while at < bytes.len() {
        if word(at) == 5 {
            // Type, length, interface and time; then options of 8 bytes: begin, end, received, dropped.
            let option = |n: usize, code: usize| {
                let option = at + 20 + 12 * n;
                assert_eq!(word(option), 8 << 16 | code);
                u64::from_le_bytes(bytes[option + 4..option + 12].try_into().expect("eight"))
            };
            assert_eq!(word(at + 8), found.len());
            found.push((option(2, 4), option(3, 5)));
        }
        at += word(at + 4);
    }
    found
}

#[test]
fn every_tool_reads_the_same_frames_times_interfaces_and_losses() {
    let lab = lab();
    let planned = planned();
    let [new, old] = ["new.pcapng", "old.pcap"].map(|name| lab.fresh_path(name));
    let args = ["--tunnel", "erspan3", "--time", "capture", "--count", "8", "-w"];
    let collectors =
        [&[text(&new)][..], &[text(&old), "--pcap"]].map(|more| Collector::start(&lab, &[&args[..], more].concat()));
    lab.send(Ns::Host, "out0", &planned.iter().map(Planned::packet).collect::<Vec<_>>());
    for collector in collectors {
        collector.ended().ok();
    }

    let times: Vec<String> = planned.iter().map(Planned::seconds).collect();
    for file in [&new, &old] {
        assert_eq!(numbers(&lab, file), planned.iter().map(|one| one.number).collect::<Vec<_>>());
        let shown = tool("tcpdump", &["-tt", "-n", "--time-stamp-precision=nano", "-r", text(file)]);
        assert_eq!(shown.lines().filter_map(|line| line.split(' ').next()).collect::<Vec<_>>(), times);
        assert_eq!(tshark_fields(file, "frame", &["frame.time_epoch"]).concat(), times);
        let told = tool("capinfos", &["-A", "-S", "-M", text(file)]);
        for (name, value) in [
            ("Number of packets", "8"),
            ("File timestamp precision", "nanoseconds (9)"),
            ("First packet time", &times[0]),
            ("Last packet time", &times[7]),
        ] {
            let value_of = |line: &str| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim().to_string());
            assert_eq!(told.lines().find_map(value_of).as_deref(), Some(value), "{told}");
        }
    }

    let fields = ["frame.interface_name", "frame.packet_flags_direction", "frame.drop_count"];
    let rows: Vec<[String; 3]> = planned
        .iter()
        .map(|one| {
            let gap = if one.gap == 0 { String::new() } else { one.gap.to_string() };
            [one.interface(), format!("0x0000000{}", 1 + u8::from(one.is_egress)), gap]
        })
        .collect();
    assert_eq!(tshark_fields(&new, "frame", &fields), rows);

    // By interface, in the order in which they came.
    let mut interfaces: Vec<(String, u64, u64)> = Vec::new();
    for one in &planned {
        let name = one.interface();
        if !interfaces.iter().any(|(there, ..)| *there == name) {
            let mine: Vec<&Planned> = planned.iter().filter(|other| other.interface() == name).collect();
            interfaces.push((name, mine.len() as u64, mine.iter().map(|one| one.gap).sum()));
        }
    }
    let told = tool("capinfos", &["-I", text(&new)]);
    let after = |start: &str| {
        told.lines().filter_map(|line| line.trim().strip_prefix(start)).map(str::to_string).collect::<Vec<_>>()
    };
    assert_eq!(after("Name = "), interfaces.iter().map(|(name, ..)| name.clone()).collect::<Vec<_>>(), "{told}");
    assert_eq!(after("Number of packets = "), interfaces.iter().map(|(_, n, _)| n.to_string()).collect::<Vec<_>>());
    assert_eq!(after("Number of stat entries = "), interfaces.iter().map(|_| "1").collect::<Vec<_>>());
    assert_eq!(statistics(&new), interfaces.iter().map(|(_, n, lost)| (n + lost, *lost)).collect::<Vec<_>>());
}
