//! `up --while-stdin`: a session that ends with whoever has started it, in whichever way that ends.

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, PipeReader, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::session::ages::Times;
use crate::session::difference::Clsact;
use crate::session::engine::{self, Context, Open};
use crate::session::home::Home;
use crate::tools::interrupt;

/// Why the session ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum Over {
    Signal,
    Input,
    Silence(Duration),
    /// Of standard output.
    Reader,
}

impl fmt::Display for Over {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Over::Signal => f.write_str("a signal came"),
            Over::Input => f.write_str("standard input has ended"),
            Over::Silence(time) => write!(f, "nothing came on standard input for {} s", time.as_secs()),
            Over::Reader => f.write_str("nobody could be told that it is up"),
        }
    }
}

/// So often it is looked whether the session is still there.
const LOOK: Duration = Duration::from_secs(2);

/// What is waited for.
pub(super) struct Guest {
    input: File,
    silence: Option<Duration>,
    /// A byte comes with the first signal.
    signal: PipeReader,
}

impl Guest {
    /// From now on a signal is ours.
    pub(super) fn new(silence: Option<Duration>) -> Result<Guest> {
        let (signal, waker) = io::pipe().context("no pipe can be made")?;
        interrupt::serve(false, move || {
            let _ = (&waker).write_all(b"!");
        });
        let input = io::stdin().as_fd().try_clone_to_owned().context("standard input cannot be read")?;
        Ok(Guest { input: input.into(), silence, signal })
    }

    /// Waits, and says for what it need not wait any longer.
    ///
    /// # Errors
    /// Others have taken the session down.
    pub(super) fn stay(&self, name: &str, is_there: impl Fn() -> bool) -> Result<Over> {
        let (mut heard, mut looked, mut looks) = (Instant::now(), Instant::now(), [true; 2]);
        loop {
            let left = self.silence.map_or(LOOK, |silence| silence.saturating_sub(heard.elapsed()).min(LOOK));
            let mut both = [self.signal.as_fd(), self.input.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            match poll(&mut both, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
                Err(Errno::EINTR) => continue,
                Err(_) => return Ok(Over::Input),
                Ok(_) => {}
            }
            let [signal, input] = both.map(|at| at.any().unwrap_or(true));
            if signal {
                return Ok(Over::Signal);
            }
            if input {
                if self.has_ended() {
                    return Ok(Over::Input);
                }
                heard = Instant::now();
            }
            if let Some(silence) = self.silence.filter(|silence| heard.elapsed() >= *silence) {
                return Ok(Over::Silence(silence));
            }
            // Who changes it may have it in hand at one look.
            if looked.elapsed() >= LOOK {
                (looked, looks) = (Instant::now(), [looks[1], is_there()]);
            }
            if looks == [false; 2] {
                bail!("session {name} has been taken down by others; to have it again: snifctl up");
            }
        }
    }

    /// What comes is a sign of life, and says nothing else.
    fn has_ended(&self) -> bool {
        match (&self.input).read(&mut [0; 4096]) {
            Ok(count) => count == 0,
            Err(err) => !matches!(err.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock),
        }
    }

    /// Takes the session down that was made then; no signal breaks that off.
    pub(super) fn leave(
        self,
        context: &Context,
        (name, made): (&str, Option<SystemTime>),
        keep_clsact: bool,
        why: Over,
    ) -> Result<()> {
        let _held = interrupt::hold();
        let open = Open::to_remove(context)?;
        if begin(&open.home, name).is_some_and(|now| made.is_some_and(|made| now != made)) {
            eprintln!("snifctl: session {name} is another one by now, and stays: {why}");
            return Ok(());
        }
        let clsact = if keep_clsact { Clsact::Leave } else { Clsact::Remove };
        engine::take_down(&open, name, clsact)?;
        eprintln!("snifctl: session {name} is down: {why}");
        Ok(())
    }
}

/// When the session of this name was made.
pub(super) fn begin(home: &Home, name: &str) -> Option<SystemTime> {
    Times::of(&home.session(name)).map(|times| times.made)
}
