//! SIGINT, SIGTERM and SIGHUP: what has begun is undone, or ended, before we end.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// The exit code that tells of the first that came, or 0.
static CAME: AtomicU8 = AtomicU8::new(0);
/// How many are at work that must not be broken off.
static HELD: AtomicU32 = AtomicU32::new(0);
static RELOAD: AtomicBool = AtomicBool::new(false);
static HANGUP_ENDS: AtomicBool = AtomicBool::new(false);
static IS_WATCHED: AtomicBool = AtomicBool::new(false);
/// What is done before a second signal ends us.
static LAST: Mutex<Option<Box<dyn Fn() + Send>>> = Mutex::new(None);

/// `timeout` and `systemd` send a signal twice: so much later it is another wish, and ends us at once.
const AGAIN: Duration = Duration::from_secs(1);

/// A signal has ended the work. Where nothing else is said with it, everything is as it was before.
#[derive(Debug)]
pub(crate) struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// What has been done all the same.
#[derive(Debug)]
pub(crate) struct Partly(pub String);

impl fmt::Display for Partly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// From now on a signal does not end us: [`check`] tells of it. One that we were started to ignore, as by `nohup`, is
/// ignored.
pub(crate) fn watch() {
    serve(false, || ());
}

/// The same for who waits for long: each signal calls `wake`. One that tells it to [reload](is_reload) ends nothing.
pub(crate) fn serve(reloads: bool, wake: impl Fn() + Send + 'static) {
    let wanted = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| !is_ignored(*signal));
    let Ok(mut signals) = Signals::new(wanted) else { return };
    IS_WATCHED.store(true, Ordering::SeqCst);
    std::thread::spawn(move || {
        let mut first: Option<Instant> = None;
        for signal in signals.forever() {
            if reloads && signal == SIGHUP && !HANGUP_ENDS.load(Ordering::SeqCst) {
                RELOAD.store(true, Ordering::SeqCst);
                wake();
                continue;
            }
            match first {
                Some(at) if at.elapsed() >= AGAIN => end_at_once(128 + signal),
                Some(_) => {}
                None => {
                    first = Some(Instant::now());
                    CAME.store(128 + signal as u8, Ordering::SeqCst);
                    wake();
                }
            }
        }
    });
}

/// SIGHUP ends us as the others do, whoever [serves](serve).
pub(crate) fn end_on_hangup() {
    HANGUP_ENDS.store(true, Ordering::SeqCst);
}

/// Does this before a second signal ends us, which waits for nothing.
pub(crate) fn at_last(act: impl Fn() + Send + 'static) {
    *LAST.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(act));
}

fn end_at_once(code: i32) -> ! {
    if let Some(act) = &*LAST.lock().unwrap_or_else(PoisonError::into_inner) {
        act();
    }
    std::process::exit(code)
}

/// Has a signal told to reload since this was last asked?
pub(crate) fn is_reload() -> bool {
    RELOAD.swap(false, Ordering::SeqCst)
}

fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

pub(crate) fn is_watched() -> bool {
    IS_WATCHED.load(Ordering::SeqCst)
}

/// The exit code that tells of the signal that came.
pub(crate) fn code() -> Option<u8> {
    Some(CAME.load(Ordering::SeqCst)).filter(|code| *code != 0)
}

/// Ends the work as a signal does: for a thread that has found that it is in vain.
pub(crate) fn end() {
    let _ = CAME.compare_exchange(0, 1, Ordering::SeqCst, Ordering::SeqCst);
}

/// # Errors
/// [`Interrupted`] where a signal came, unless it is [held](hold) off.
pub(crate) fn check() -> Result<()> {
    match code().is_some() && HELD.load(Ordering::SeqCst) == 0 {
        true => Err(Interrupted.into()),
        false => Ok(()),
    }
}

/// Waits so long.
///
/// # Errors
/// As [`check`], a moment after the signal.
pub(crate) fn wait(time: Duration) -> Result<()> {
    let end = Instant::now() + time;
    while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        check()?;
        thread::sleep(left.min(Duration::from_millis(20)));
    }
    Ok(())
}

/// As long as this lives a signal breaks nothing off.
pub(crate) struct Held(());

pub(crate) fn hold() -> Held {
    HELD.fetch_add(1, Ordering::SeqCst);
    Held(())
}

impl Drop for Held {
    fn drop(&mut self) {
        HELD.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Did a signal end the work with this error?
pub(crate) fn is_cause(err: &anyhow::Error) -> bool {
    err.chain().any(|cause| cause.is::<Interrupted>())
}

/// Says with it what has been done before, if anything.
pub(crate) fn partly(err: anyhow::Error, done: Option<String>) -> anyhow::Error {
    match done {
        Some(done) if is_cause(&err) && err.downcast_ref::<Partly>().is_none() => err.context(Partly(done)),
        _ => err,
    }
}

/// The line for an error that a signal is the cause of.
pub(crate) fn line(err: &anyhow::Error) -> String {
    match err.downcast_ref::<Partly>() {
        Some(partly) => format!("interrupted; {partly}"),
        None => "interrupted; nothing was changed".into(),
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn what_was_done_before_is_said_and_nothing_else_is() {
        let interrupted = || anyhow::Error::from(Interrupted).context("`mount` cannot be run");
        assert_eq!(line(&interrupted()), "interrupted; nothing was changed");
        let partly = |err| super::partly(err, Some("a is down".into()));
        assert_eq!(line(&partly(interrupted())), "interrupted; a is down");
        let other = partly(anyhow::anyhow!("no route"));
        assert!(!is_cause(&other) && other.to_string() == "no route");
        let nested: Result<()> = Err(partly(interrupted())).context("more");
        assert!(is_cause(&nested.unwrap_err()));
    }
}
