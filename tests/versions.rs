//! Sessions of other versions: one that this release's first build has made, recorded, is told, edited by nobody, moved to
//! the programs of today with all its counters, and taken down; newer ones are told and taken down whole.
//!
//! A recorded session is a directory `tests/fixtures/session-N`: the object, and the commands that made the session, as
//! `up --dry-run` prints them. How to record another: docs/development.md.

mod lab;

use std::fs;
use std::path::{Path, PathBuf};

use lab::capture::Direction;
use lab::check::assert_same_frames;
use lab::frames::{self, Ends};
use lab::status::Session;
use lab::tunnels::{Kind, decap, inner};
use lab::{Lab, Ns, PATIENCE, poll};
use serde_json::Value;

/// The session that is recorded: with a filter, two remotes, and maps that hold rows of every kind that counts.
const UP: [&str; 13] = [
    "up",
    "eth0",
    "--tunnel",
    "gre",
    "--id",
    "7",
    "--remote",
    "198.51.100.2,198.51.100.3",
    "--filter",
    "udp or icmp",
    "--oversize",
    "drop",
    "--keep-clsact",
];
const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/session-1");
const OBJECT: &str = "@OBJECT@";
const NETNS: &str = "@NETNS@";

/// A sandbox in which the numbers of interfaces, and the ways to the remotes, are those of the record.
fn sandbox() -> Lab {
    let lab = Lab::roomy();
    lab.host(&["ip", "neigh", "add", "198.51.100.3", "lladdr", "02:00:00:00:02:02", "dev", "out0", "nud", "permanent"]);
    lab
}

/// Makes the recorded session, by the tools alone.
fn recorded() -> Lab {
    let lab = sandbox();
    let commands = fs::read_to_string(Path::new(FIXTURE).join("commands")).expect("the record");
    let netns = lab.ns_inode(Ns::Host).to_string();
    let object = format!("{FIXTURE}/programs.o");
    let script = commands.replace(NETNS, &netns).replace(OBJECT, &object);
    lab.host(&["sh", "-euc", &script]);
    lab
}

#[test]
#[ignore = "writes into the sources: SNIFCTL_RECORD=FILE has it record what that snifctl makes"]
fn record() {
    let snifctl = std::env::var("SNIFCTL_RECORD").expect("SNIFCTL_RECORD: the path of a snifctl");
    let lab = sandbox();
    // Once, so that the object is there.
    lab.host(&[&[snifctl.as_str()], &UP[..]].concat());
    lab.host(&[&snifctl, "down"]);
    let said = lab.host(&[&[snifctl.as_str()], &UP[..], &["--dry-run"]].concat());
    let text = String::from_utf8(said.stdout).expect("UTF-8");
    let object = text.split(' ').find(|word| word.ends_with(".o")).expect("an object");
    fs::create_dir_all(FIXTURE).expect("the directory");
    fs::copy(object, format!("{FIXTURE}/programs.o")).expect("the object");
    lab.host(&["llvm-strip", "-g", &format!("{FIXTURE}/programs.o")]);
    let netns = lab.ns_inode(Ns::Host).to_string();
    let text = text.replace(object, OBJECT).replace(&format!("/{netns}"), &format!("/{NETNS}"));
    fs::write(format!("{FIXTURE}/commands"), text).expect("the commands");
}
