//! What others have made is no business of ours: it stops no command, and is left as it is.

use std::fs;

use crate::lab::faults::{hide, in_mounts, real};
use crate::lab::judge::UP;
use crate::lab::{Lab, strangers};

#[test]
fn strangers_that_were_there_before_stop_nothing() {
    strangers::there_before();
}

#[test]
fn strangers_that_came_between_stop_nothing_and_keep_their_clsact() {
    strangers::come_between();
}

#[test]
fn down_needs_no_compiler_no_capture_no_types_and_no_maps() {
    let lab = Lab::roomy();
    let before = lab.machine();
    let script = "#!/bin/sh\ncat >@IN@\nif grep -q 'map dump' @IN@; then echo 'Error: no' >&2; exit 255; fi\n\
                  exec @REAL@ \"$@\" <@IN@\n";
    let fakes = lab.fakes();
    let input = lab.dir().join("input").to_string_lossy().into_owned();
    fakes.add("bpftool", &script.replace("@REAL@", &real("bpftool").to_string_lossy()).replace("@IN@", &input));
    let lacking = hide(&["clang", "tcpdump", "ethtool", "tshark"]) + "\nmount -t tmpfs tmpfs /sys/kernel/btf";
    for by in [in_mounts(&lacking), fakes.first_in_path().to_vec()] {
        lab.said(&UP).ok();
        lab.said_by(&by, &["down"]).quietly_ok();
        lab.assert_as_before(&before);
    }
    // Maps that hold nothing that can be read.
    lab.said(&UP).ok();
    for map in ["request", "config"] {
        fs::remove_file(lab.pins().join("default/maps").join(map)).expect("a pin");
    }
    lab.said(&["down"]).quietly_ok();
    lab.assert_as_before(&before);
}
