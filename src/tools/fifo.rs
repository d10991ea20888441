//! Named pipes: one is opened for writing once somebody reads it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use nix::errno::Errno;
use rustix::fs::OFlags;

/// How often it is looked whether its reader has come.
const STEP: Duration = Duration::from_millis(50);

/// The pipe, once somebody reads it; writing into it waits for nothing.
///
/// # Errors
/// It cannot be opened, or `goes_on`, which is asked between two looks, says that nobody waits any more.
pub(crate) fn opened(path: &Path, goes_on: impl Fn() -> Result<()>) -> Result<File> {
    loop {
        let nonblocking = OFlags::NONBLOCK.bits() as i32;
        match OpenOptions::new().write(true).custom_flags(nonblocking).open(path) {
            Err(err) if err.raw_os_error() == Some(Errno::ENXIO as i32) => {
                goes_on()?;
                thread::sleep(STEP);
            }
            opened => return Ok(opened?),
        }
    }
}
