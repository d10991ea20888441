//! How old a session is, and its last change. The pins' own times tell, so that nothing has to be remembered.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW, utimensat};

use crate::datapath::parts::Map;

/// When a session was made, and when it was last changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Times {
    pub made: SystemTime,
    pub changed: SystemTime,
}

impl Times {
    /// Of the session with these pins; none where it has none. A map that came later has a later time.
    pub(crate) fn of(dir: &Path) -> Option<Times> {
        let times = |dir: &Path| {
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            entries.filter_map(|entry| entry.metadata().ok()?.modified().ok()).collect::<Vec<_>>()
        };
        let maps = times(&dir.join("maps"));
        let made = *maps.iter().min()?;
        let programs = times(dir).into_iter();
        Some(Times { made, changed: maps.iter().copied().chain(programs).max()? })
    }

    pub(crate) fn age(at: SystemTime) -> Duration {
        SystemTime::now().duration_since(at).unwrap_or_default()
    }
}

/// The session with these pins is changed now. Where the file system keeps no times, none is shown.
pub(crate) fn touch(dir: &Path) {
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    let times = Timestamps { last_access: now, last_modification: now };
    let _ = utimensat(CWD, dir.join("maps").join(Map::Request.name()), &times, AtFlags::empty());
}
