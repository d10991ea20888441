//! Suricata's af-packet on the tap device of `collect --to`: it knows no tunnels there, and sees what the wire had.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Child;

use super::lab::collect::{Collector, answering};
use super::lab::{PATIENCE, poll, signal};
use super::*;

const TAP: &str = "tap0";

/// Also ERSPAN type III, which Suricata does not decode by itself.
const TUNNELS: [&str; 7] = ["gre", "erspan1", "erspan2", "erspan3", "vxlan", "geneve", "geneve --tell"];

/// Suricata on an interface of the collector's.
struct Sensor {
    child: Child,
    dir: tempfile::TempDir,
    said: PathBuf,
}

impl Sensor {
    /// Starts it, and waits until it listens.
    fn start(lab: &Lab) -> Sensor {
        let (dir, _, argv) = suricata_in_its_root(Checksums::Validated);
        let said = lab.fresh_path("suricata.out");
        let out = File::create(&said).expect("make the file for Suricata's messages");
        let blind = ["--set", "decoder.vxlan.enabled=false", "--set", "decoder.geneve.enabled=false"];
        let mut command = lab.command(Ns::Collector, &argv.iter().map(String::as_str).collect::<Vec<_>>());
        command.args(["--runmode", "workers", &format!("--af-packet={TAP}")]).args(blind);
        let err = out.try_clone().expect("the same file");
        let child = command.stdout(out).stderr(err).spawn().expect("start Suricata");
        let sensor = Sensor { child, dir, said };
        let listens = poll(PATIENCE, || sensor.said().contains("Engine started").then_some(()));
        assert!(listens.is_some(), "{}", sensor.said());
        sensor
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.said).unwrap_or_default()
    }

    /// Ends it once it has told of so many transactions and files, or of no more in time; what it saw.
    fn stop_after(mut self, events: usize) -> Reading {
        let lines = || fs::read_to_string(self.dir.path().join("eve.json")).unwrap_or_default().lines().count();
        poll(PATIENCE, || (lines() >= events).then_some(()));
        signal(self.child.id(), "INT");
        let status = poll(PATIENCE, || self.child.try_wait().expect("wait for Suricata"));
        assert!(status.is_some_and(|status| status.success()), "{status:?}: {}", self.said());
        read_eve(&eve_of(self.dir.path()))
    }
}

impl Drop for Sensor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Each tunnel with each family; oversize modes and kinds of watched link in turn.
fn cases() -> Vec<Case> {
    let case = |(n, tunnel): (usize, &'static str), v6: bool| {
        let oversize = if n.is_multiple_of(2) == v6 { "fragment" } else { "segment" };
        Case { tunnel, v6, oversize, offloads: n % 4 < 2, out: Out::Nic }
    };
    TUNNELS.into_iter().enumerate().flat_map(|each| [false, true].map(|v6| case(each, v6))).collect()
}

/// What the sensor saw of the downloads, what was sent, and what `collect` with more arguments counted.
fn watched(case: Case, more: &[&str]) -> (Reading, Reading, Value) {
    let lab = lab_for(case);
    answering(&lab, &[COLLECTOR_IP.into(), COLLECTOR_IP6.into()]);
    up(&lab, case);
    let site = site(&lab);
    let collector = Collector::start(&lab, &[&["--to", TAP, "--json"], more].concat());
    let sensor = Sensor::start(&lab);
    lab.download(&site);
    let sent = Reading::of_pages(&site.pages);
    let seen = sensor.stop_after(sent.transactions.len() + sent.files.len());
    signal(collector.id(), "TERM");
    (seen, sent, collector.ended().ok().json())
}

#[test]
fn every_transaction_and_every_file_is_whole_on_the_tap_device_of_collect() {
    println!("{HEADING}");
    let mut failed = Vec::new();
    for case in cases() {
        let (seen, sent, report) = watched(case, &[]);
        let row = Row::of("suricata on a tap device", case, &seen, &sent);
        println!("{row}");
        let unwanted = ["lost", "dropped", "refused"].map(|key| report[key].as_u64());
        assert_eq!(unwanted, [Some(0); 3], "{case:?}: {report:#}");
        assert_eq!(report["sent"], report["received"], "{case:?}: {report:#}");
        if !row.same {
            failed.push((case, first_difference(&seen, &sent)));
        }
    }
    assert!(failed.is_empty(), "{} of {} cases are not as on the wire: {failed:#?}", failed.len(), cases().len());
}

/// Else the table would say nothing: the sensor has its frames from the device alone.
#[test]
fn files_whose_full_segments_are_not_on_the_tap_device_are_not_seen_whole() {
    let case = Case { tunnel: "gre", v6: false, oversize: "fragment", offloads: false, out: Out::Nic };
    let (seen, sent, report) = watched(case, &["--filter", "not greater 1514"]);
    assert_eq!((seen.files.len(), sent.files.len()), (0, DOWNLOADS), "{seen:?}");
    assert!(report["sent"].as_u64() < report["received"].as_u64(), "{report:#}");
}
