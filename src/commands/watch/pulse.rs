//! What a container's probes and hooks ask of the watch: is it at work, and let it rest. And whether the directory of files
//! is another by now, where it is a mounted ConfigMap. There is no shell in an image, and no supervisor beside us: files tell.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::time::{ClockId, clock_gettime};

use crate::tools::interrupt;
use crate::usage::refuse;

/// From one beat to the next.
const BEAT: Duration = Duration::from_secs(1);
/// A watch that has not beaten for so long hangs: no look takes as long.
const LIMIT: u64 = 120;
/// What kubelet swaps when a ConfigMap has changed, all files at once.
const DATA: &str = "..data";

/// Seconds of a clock that nobody sets.
fn seconds() -> u64 {
    u64::try_from(clock_gettime(ClockId::Monotonic).tv_sec).unwrap_or_default()
}

/// While this file is there the watch rests.
fn hold_of(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".hold");
    name.into()
}

/// Beats once a second.
#[derive(Debug)]
pub(super) struct Pulse {
    file: Option<PathBuf>,
    /// `..data` of the directory, and where it leads.
    data: Option<(PathBuf, PathBuf)>,
    last: Option<Instant>,
    is_held: bool,
}

/// What a beat has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Beat {
    /// When the next is due.
    pub next: Option<Instant>,
    /// The ConfigMap has changed.
    pub is_changed: bool,
    /// The rest has begun or ended.
    pub is_turn: bool,
}

impl Pulse {
    /// To be called before the directory is read: what changes meanwhile is found by the next beat.
    pub(super) fn new(file: Option<&Path>, dir: Option<&Path>) -> Result<Pulse> {
        let data = dir.map(|dir| dir.join(DATA)).and_then(|link| Some((link.clone(), fs::read_link(link).ok()?)));
        let pulse = Pulse { file: file.map(Path::to_path_buf), data, last: None, is_held: false };
        if let Err((file, err)) =
            pulse.file.as_deref().map_or(Ok(()), |file| pulse.write(file).map_err(|err| (file, err)))
        {
            refuse!(
                "--heartbeat {} cannot be written ({err}); try: --heartbeat /run/snifctl/heartbeat",
                file.display()
            );
        }
        Ok(pulse)
    }

    /// The watch rests: it looks at nothing and changes nothing.
    pub(super) fn is_held(&self) -> bool {
        self.is_held
    }

    /// Beats, if it is time to.
    pub(super) fn beat(&mut self, now: Instant) -> Beat {
        if self.file.is_none() && self.data.is_none() {
            return Beat::default();
        }
        if let Some(next) = self.last.map(|last| last + BEAT).filter(|next| *next > now) {
            return Beat { next: Some(next), ..Beat::default() };
        }
        self.last = Some(now);
        let was_held = self.is_held;
        if let Some(file) = &self.file {
            self.is_held = hold_of(file).exists();
            // Where it fails the probe finds out.
            let _ = self.write(file);
        }
        Beat { next: Some(now + BEAT), is_changed: self.has_changed(), is_turn: self.is_held != was_held }
    }

    fn write(&self, file: &Path) -> io::Result<()> {
        let mut new = file.as_os_str().to_owned();
        new.push(".new");
        fs::write(&new, format!("{} {}\n", seconds(), if self.is_held { "held" } else { "at work" }))?;
        fs::rename(&new, file)
    }

    fn has_changed(&mut self) -> bool {
        let Some((link, before)) = &mut self.data else { return false };
        match fs::read_link(link) {
            Ok(now) if now != *before => {
                *before = now;
                true
            }
            _ => false,
        }
    }
}

/// What the watch has last written: seconds since then, and whether it rests.
fn read(file: &Path) -> Option<(u64, bool)> {
    let text = fs::read_to_string(file).ok()?;
    let (at, state) = text.trim_end().split_once(' ')?;
    Some((seconds().saturating_sub(at.parse().ok()?), state == "held"))
}

/// `--check`: is the watch at work?
pub(super) fn check(file: &Path) -> Result<ExitCode> {
    let shown = file.display();
    match read(file) {
        Some((age, _)) if age < LIMIT => Ok(ExitCode::SUCCESS),
        Some((age, _)) => bail!("the watch of {shown} has not been at work for {age} s; start it again"),
        None => bail!("{shown} is no heartbeat of a watch; try: snifctl watch --heartbeat {shown}"),
    }
}

/// `--hold`: lets the watch rest, and returns once it does. One that is not at work needs no telling.
pub(super) fn hold(file: &Path) -> Result<ExitCode> {
    let hold = hold_of(file);
    fs::write(&hold, "").with_context(|| format!("cannot write {}", hold.display()))?;
    loop {
        interrupt::check()?;
        match read(file) {
            Some((age, false)) if age < LIMIT => std::thread::sleep(BEAT / 10),
            _ => return Ok(ExitCode::SUCCESS),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_beat_is_written_and_asked_for_and_a_hold_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("heartbeat");
        assert!(check(&file).unwrap_err().to_string().contains("is no heartbeat of a watch; try: "));
        let mut pulse = Pulse::new(Some(&file), None).unwrap();
        check(&file).unwrap();
        let start = Instant::now();
        assert_eq!(pulse.beat(start).next, Some(start + BEAT));
        fs::write(hold_of(&file), "").unwrap();
        assert_eq!(pulse.beat(start + BEAT / 2), Beat { next: Some(start + BEAT), ..Beat::default() }, "not yet");
        assert!(pulse.beat(start + BEAT).is_turn && pulse.is_held());
        assert_eq!(read(&file).map(|(_, is_held)| is_held), Some(true));
        hold(&file).unwrap();
        fs::write(&file, "0 at work\n").unwrap();
        let stale = seconds() >= LIMIT;
        assert_eq!(check(&file).is_err(), stale, "one that hangs");
        fs::remove_file(hold_of(&file)).unwrap();
        assert!(pulse.beat(start + 2 * BEAT).is_turn && !pulse.is_held());
        let nowhere = Pulse::new(Some(&dir.path().join("no/heartbeat")), None).unwrap_err().to_string();
        assert!(nowhere.contains("--heartbeat ") && nowhere.contains("try: "), "{nowhere}");
    }

    #[test]
    fn a_config_map_has_changed_when_its_link_leads_elsewhere_and_a_plain_directory_never() {
        let dir = tempfile::tempdir().unwrap();
        let swap = |to: &str| {
            std::os::unix::fs::symlink(to, dir.path().join("..data_tmp")).unwrap();
            fs::rename(dir.path().join("..data_tmp"), dir.path().join(DATA)).unwrap();
        };
        let mut plain = Pulse::new(None, Some(dir.path())).unwrap();
        assert_eq!(plain.beat(Instant::now()), Beat::default());
        swap("..1");
        let mut pulse = Pulse::new(None, Some(dir.path())).unwrap();
        let start = Instant::now();
        let mut is_changed = |seconds: u32| pulse.beat(start + seconds * BEAT).is_changed;
        assert!(!is_changed(0));
        swap("..2");
        assert!(is_changed(1) && !is_changed(2));
    }
}
