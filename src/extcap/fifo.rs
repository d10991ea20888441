//! The pipe by which Wireshark gets the capture. It is watched as long as nothing is written into it, too.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::tools::interrupt;

/// How often it is looked whether its reader has come, and how long.
const STEP: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_secs(2);

pub(super) struct Watch(Receiver<()>);

impl Watch {
    /// From now on our work ends when the reader goes.
    pub(super) fn start(path: &str) -> Watch {
        let (came, coming) = mpsc::channel();
        let path = PathBuf::from(path);
        std::thread::spawn(move || {
            let Some(pipe) = opened(&path) else { return };
            let _ = came.send(());
            wait_for_end(&pipe);
            interrupt::end();
        });
        Watch(coming)
    }

    /// Waits for the reader, who then learns of our end.
    pub(super) fn await_reader(&self) {
        let _ = self.0.recv_timeout(PATIENCE);
    }
}

/// The pipe, once somebody reads it.
fn opened(path: &Path) -> Option<File> {
    loop {
        let nonblocking = OFlags::NONBLOCK.bits() as i32;
        match OpenOptions::new().write(true).custom_flags(nonblocking).open(path) {
            Ok(pipe) => return Some(pipe),
            Err(err) if Errno::from_io_error(&err) == Some(Errno::NXIO) => std::thread::sleep(STEP),
            Err(_) => return None,
        }
    }
}

fn wait_for_end(pipe: &File) {
    // The kernel tells of an error without being asked.
    let mut end = [PollFd::new(pipe.as_fd(), PollFlags::empty())];
    while !matches!(poll(&mut end, PollTimeout::NONE), Ok(1..)) {}
}
