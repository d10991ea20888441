//! Standard error: what is said beside results.

use std::io::{Write, stderr};
use std::sync::atomic::{AtomicBool, Ordering};

/// What only tells that all goes well.
const PROGRESS: &str = "snifctl: receiving";

static HUSHED: AtomicBool = AtomicBool::new(false);

/// Says a line. The standard macro panics where nobody reads, as after the end of a terminal or of ssh: that would be in
/// the middle of something.
pub(crate) fn say(line: &str) {
    if line != PROGRESS || !HUSHED.load(Ordering::Relaxed) {
        let _ = stderr().write_all(format!("{line}\n").as_bytes());
    }
}

/// From now on only what is wrong is said.
pub(crate) fn hush() {
    HUSHED.store(true, Ordering::Relaxed);
}
