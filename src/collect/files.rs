//! Where captures go: a file, several by size and time as tcpdump has them, or a pipe. What is in a file is whole up to its
//! last frame, also when the disk is full.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use chrono::format::{Fixed, Item, StrftimeItems};
use chrono::{DateTime, Local};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use signal_hook::consts::SIGXFSZ;

use crate::collect::pcapng::{self, Frame, Statistics};
use crate::output::text::were;
use crate::tools::exec::ReaderGone;
use crate::tools::{fifo, interrupt};
use crate::usage::{Usage, ensure_usage, refuse};

/// So many bytes are written at once.
const BUFFER: usize = 1 << 20;
const SECOND: u64 = 1_000_000_000;
/// What a pipe takes at once (pipe(7)), and so long, in milliseconds, room is waited for before signals are looked for.
const PIPE_BUF: usize = 4096;
const WHILE: u8 = 100;
/// After a signal a pipe's reader is waited for while he takes something within the first time; but not beyond the second,
/// as who has sent the signal waits, too.
const STILL: Duration = Duration::from_secs(2);
pub(crate) const AT_MOST: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Pcapng,
    Pcap,
}

/// What `-w`, `-C`, `-G` and `-W` ask for.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub path: String,
    pub format: Format,
    /// Bytes after which the next file begins.
    pub size: Option<u64>,
    pub seconds: Option<u64>,
    pub count: Option<u64>,
}

impl Plan {
    pub(crate) fn check(&self) -> Result<(), Usage> {
        let rotates = self.size.is_some() || self.seconds.is_some();
        ensure_usage!(
            !rotates || !self.is_pipe(),
            "-C and -G do not go with -w -, which is one stream; try: -w day.pcapng -C 100"
        );
        ensure_usage!(self.count.is_none() || rotates, "-W goes with -C or -G; try: -C 100 -W 10");
        if self.seconds.is_some() && StrftimeItems::new(&self.path).any(|item| is_unknown(&item)) {
            refuse!("-w {:?} has a time that is not known here; try: -w day-%Y%m%d-%H%M%S%z.pcapng", self.path);
        }
        Ok(())
    }

    pub(crate) fn is_pipe(&self) -> bool {
        self.path == "-"
    }

    /// The name of a file: the `number`th of its time.
    fn name(&self, number: u64, time: u64) -> PathBuf {
        let stem = match self.seconds {
            None => self.path.clone(),
            Some(_) => {
                let time = DateTime::from_timestamp((time / SECOND) as i64, 0).unwrap_or_default();
                time.with_timezone(&Local).format(&self.path).to_string()
            }
        };
        let digits = self.count.filter(|count| *count > 1).map_or(0, |count| (count - 1).to_string().len());
        match self.size {
            Some(_) if number > 0 || digits > 0 => format!("{stem}{number:0digits$}").into(),
            _ => stem.into(),
        }
    }
}

/// Nothing says how a zone is called, only how far it is off.
fn is_unknown(item: &Item) -> bool {
    matches!(item, Item::Error | Item::Fixed(Fixed::TimezoneName))
}

enum Target {
    /// Standard output, without the buffer that lines have.
    Pipe(File),
    File(File, PathBuf),
}

/// An interface of the file that is written.
#[derive(Debug)]
struct Interface {
    number: u32,
    statistics: Statistics,
}

/// Is there room for more?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    Goes,
    /// `-G` with `-W`: there are as many files as were asked for.
    Done,
}

pub(crate) struct Output {
    plan: Plan,
    target: Target,
    reader: Reader,
    /// Frames that the pipe's reader has not taken, and why, once he is not waited for any more.
    untaken: Option<(u64, &'static str)>,
    buffer: Vec<u8>,
    /// Bytes that the file has.
    written: u64,
    interfaces: HashMap<usize, Interface>,
    /// The number of the file among those of its time, the time in its name, when that began, and files by time.
    number: u64,
    named: u64,
    begun: u64,
    periods: u64,
    /// Frames of all files.
    pub frames: u64,
}

impl Output {
    pub(crate) fn open(plan: Plan, now: u64) -> Result<Output> {
        // A limit on a file's size ends us within a frame by its signal; where that is caught, write(2) fails instead.
        signal_hook::flag::register(SIGXFSZ, Arc::default()).context("SIGXFSZ")?;
        let target = open(&plan, 0, now)?;
        let (buffer, interfaces) = (Vec::with_capacity(2 * BUFFER), HashMap::new());
        let (written, number, named, begun, periods, frames) = (0, 0, now, now, 0, 0);
        let (reader, untaken) = (Reader::new(), None);
        let mut output = Output {
            plan,
            target,
            reader,
            untaken,
            buffer,
            written,
            interfaces,
            number,
            named,
            begun,
            periods,
            frames,
        };
        output.begin();
        output.flush()?;
        Ok(output)
    }

    /// Does somebody read along?
    pub(crate) fn is_live(&self) -> bool {
        matches!(&self.target, Target::Pipe(_)) || self.is_pipe()
    }

    /// Can it be full until somebody reads?
    fn is_pipe(&self) -> bool {
        let (Target::Pipe(out) | Target::File(out, _)) = &self.target;
        out.metadata().is_ok_and(|file| file.file_type().is_fifo() || file.file_type().is_socket())
    }

    fn begin(&mut self) {
        match self.plan.format {
            Format::Pcapng => pcapng::section(&mut self.buffer),
            Format::Pcap => pcapng::pcap_header(&mut self.buffer),
        }
    }

    /// Writes a frame of a stream, `name` of which says how its interface is called.
    pub(crate) fn write(
        &mut self,
        stream: usize,
        name: impl FnOnce() -> String,
        frame: &Frame,
        now: u64,
    ) -> Result<Next> {
        if self.untaken.is_none() && self.rotate_if_due(now)? == Next::Done {
            return Ok(Next::Done);
        }
        if let Some((untaken, _)) = &mut self.untaken {
            *untaken += 1;
            return Ok(Next::Goes);
        }
        self.frames += 1;
        match self.plan.format {
            Format::Pcap => pcapng::pcap_packet(&mut self.buffer, frame),
            Format::Pcapng => {
                let count = self.interfaces.len() as u32;
                let buffer = &mut self.buffer;
                let interface = self.interfaces.entry(stream).or_insert_with(|| {
                    pcapng::interface(buffer, &name());
                    Interface { number: count, statistics: Statistics { begin: frame.time, ..Statistics::default() } }
                });
                let statistics = &mut interface.statistics;
                statistics.begin = statistics.begin.min(frame.time);
                statistics.end = statistics.end.max(frame.time);
                statistics.received += 1;
                statistics.lost += frame.gap;
                pcapng::packet(buffer, interface.number, frame);
            }
        }
        if self.buffer.len() >= BUFFER {
            self.flush()?;
        }
        Ok(Next::Goes)
    }

    fn rotate_if_due(&mut self, now: u64) -> Result<Next> {
        // Where the clock was set back, the time counts from there.
        self.begun = self.begun.min(now);
        if self.plan.seconds.is_some_and(|seconds| now - self.begun >= seconds * SECOND) {
            self.periods += 1;
            if self.plan.size.is_none() && self.plan.count.is_some_and(|count| self.periods >= count) {
                return Ok(Next::Done);
            }
            self.next_time(now)?;
        } else if self.plan.size.is_some_and(|size| self.written + self.buffer.len() as u64 > size) {
            self.next_number()?;
        }
        Ok(Next::Goes)
    }

    /// SIGHUP: another file, of the same name where the old one has been moved away. A pipe goes on.
    pub(crate) fn rotate(&mut self, now: u64) -> Result<()> {
        if self.is_pipe() {
            return Ok(());
        }
        let Target::File(file, path) = &self.target else { return Ok(()) };
        let same = |there: fs::Metadata| {
            file.metadata().is_ok_and(|ours| (ours.dev(), ours.ino()) == (there.dev(), there.ino()))
        };
        if self.plan.size.is_some() {
            return self.next_number();
        }
        if self.plan.name(0, now) == *path && fs::metadata(path).is_ok_and(same) {
            eprintln!("snifctl: -w {} is still there, so it goes on; move it away before SIGHUP", path.display());
            return self.flush();
        }
        self.next_time(now)
    }

    /// The first file of a time.
    fn next_time(&mut self, now: u64) -> Result<()> {
        (self.begun, self.named, self.number) = (now, now, 0);
        self.next()
    }

    /// The next file of this time, or the first one again.
    fn next_number(&mut self) -> Result<()> {
        self.number = (self.number + 1) % self.plan.count.unwrap_or(u64::MAX);
        self.next()
    }

    fn next(&mut self) -> Result<()> {
        self.end()?;
        if self.untaken.is_some() {
            return Ok(());
        }
        self.target = open(&self.plan, self.number, self.named)?;
        self.written = 0;
        self.begin();
        Ok(())
    }

    /// The end of all.
    ///
    /// # Errors
    /// The pipe's reader has not taken everything.
    pub(crate) fn finish(&mut self) -> Result<()> {
        self.end()?;
        let Some((untaken, why)) = self.untaken else { return Ok(()) };
        let what = match untaken {
            0 => "the statistics behind the frames were".into(),
            _ => were(untaken, "frame"),
        };
        bail!("the reader of -w {} {why}: {what} not written", self.plan.path)
    }

    /// What ends a file: statistics of its interfaces.
    fn end(&mut self) -> Result<()> {
        let mut interfaces: Vec<Interface> = self.interfaces.drain().map(|(_, interface)| interface).collect();
        interfaces.sort_by_key(|interface| interface.number);
        for Interface { number, statistics } in interfaces {
            pcapng::statistics(&mut self.buffer, number, &statistics);
        }
        self.flush()
    }

    /// # Errors
    /// [`ReaderGone`] where the pipe's reader has closed it. Where a disk is full, the file ends with its last whole frame,
    /// and an empty one goes.
    pub(crate) fn flush(&mut self) -> Result<()> {
        if self.untaken.is_some() {
            self.buffer.clear();
            return Ok(());
        }
        if self.buffer.is_empty() {
            return self.ensure_read();
        }
        let (mut done, mut failed) = (0, None);
        let is_pipe = self.is_pipe();
        while done < self.buffer.len() && failed.is_none() {
            let (Target::Pipe(out) | Target::File(out, _)) = &mut self.target;
            let rest = &self.buffer[done..];
            let written = if is_pipe { self.reader.give(out, rest) } else { out.write(rest) };
            match written {
                Ok(0) => failed = Some(io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => failed = Some(err),
            }
        }
        let Some(err) = failed else {
            self.written += self.buffer.len() as u64;
            self.buffer.clear();
            return Ok(());
        };
        let (whole, cut) = self.whole(done);
        self.frames -= cut;
        self.buffer.clear();
        self.interfaces.clear();
        match &self.target {
            _ if err.kind() == io::ErrorKind::BrokenPipe => Err(ReaderGone.into()),
            _ if is_pipe && err.kind() == io::ErrorKind::TimedOut => {
                // What comes is counted from now on.
                self.untaken = Some((cut, if self.reader.is_still() { "takes no more" } else { "is too slow" }));
                Ok(())
            }
            Target::Pipe(_) => bail!("cannot write to standard output: {err}"),
            Target::File(file, path) => {
                let (kept, shown) = (self.written + whole as u64, path.display());
                if file.metadata().is_ok_and(|file| file.is_file()) {
                    file.set_len(kept).with_context(|| format!("{shown} ends within a frame"))?;
                    if kept == 0 {
                        // A directory of another user keeps an empty one.
                        let _ = fs::remove_file(path);
                        bail!("cannot write -w {shown}: {err}; write elsewhere, as in: -w /tmp/all.pcapng");
                    }
                }
                bail!(
                    "cannot write -w {shown}: {err}; it ends with its last whole frame; bound it, as in: -C 100 -W 10"
                )
            }
        }
    }

    /// A pipe tells that its reader has gone also where nothing is written.
    fn ensure_read(&self) -> Result<()> {
        let (Target::Pipe(out) | Target::File(out, _)) = &self.target;
        let mut look = [PollFd::new(out.as_fd(), PollFlags::empty())];
        let is_gone = poll(&mut look, PollTimeout::ZERO).is_ok_and(|n| n > 0)
            && look[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR));
        if is_gone { Err(ReaderGone.into()) } else { Ok(()) }
    }

    /// Of the buffer's first bytes, those that are whole blocks; and the frames behind them.
    fn whole(&self, done: usize) -> (usize, u64) {
        let word = |at: usize| {
            let bytes = self.buffer.get(at..at + 4).map_or([0; 4], |bytes| bytes.try_into().unwrap_or_default());
            u32::from_le_bytes(bytes) as usize
        };
        let (mut at, mut whole, mut behind) = (0, 0, 0);
        while at < self.buffer.len() {
            let (length, is_frame) = match self.plan.format {
                Format::Pcapng => (word(at + 4), word(at) == 6),
                Format::Pcap if self.written == 0 && at == 0 => (24, false),
                Format::Pcap => (16 + word(at + 8), true),
            };
            at += length.max(4);
            if at <= done {
                whole = at;
            } else {
                behind += u64::from(is_frame);
            }
        }
        (whole, behind)
    }
}

/// Who reads a pipe.
struct Reader {
    /// When he has taken something last, and since when we know of a signal.
    took: Instant,
    signalled: Option<Instant>,
}

impl Reader {
    fn new() -> Reader {
        Reader { took: Instant::now(), signalled: None }
    }

    /// Writes some bytes once there is room for them; a pipe that says so takes PIPE_BUF of them at once.
    ///
    /// # Errors
    /// `TimedOut` where a signal has come, and he is not waited for any longer.
    fn give(&mut self, out: &mut File, bytes: &[u8]) -> io::Result<usize> {
        while !self.is_over() {
            let mut room = [PollFd::new(out.as_fd(), PollFlags::POLLOUT)];
            match poll(&mut room, PollTimeout::from(WHILE)) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => {
                    let written = out.write(&bytes[..bytes.len().min(PIPE_BUF)])?;
                    self.took = Instant::now();
                    return Ok(written);
                }
                Err(err) => return Err(err.into()),
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    fn is_over(&mut self) -> bool {
        if self.signalled.is_none() && interrupt::code().is_some() {
            self.signalled = Some(Instant::now());
        }
        self.signalled.is_some_and(|since| since.elapsed() >= AT_MOST) || self.is_still()
    }

    /// Has he taken nothing for a while since the signal?
    fn is_still(&self) -> bool {
        self.signalled.is_some_and(|since| since.max(self.took).elapsed() >= STILL)
    }
}

/// A named pipe once somebody reads it, or not at all where a signal comes first.
fn create(path: &Path) -> Result<File> {
    match fs::metadata(path).is_ok_and(|there| there.file_type().is_fifo()) {
        true => fifo::opened(path, interrupt::check),
        false => Ok(File::create(path)?),
    }
}

fn open(plan: &Plan, number: u64, time: u64) -> Result<Target> {
    if plan.is_pipe() {
        let out = io::stdout().as_fd().try_clone_to_owned().context("standard output")?;
        return Ok(Target::Pipe(out.into()));
    }
    let path = plan.name(number, time);
    match create(&path) {
        Ok(file) => Ok(Target::File(file, path)),
        Err(err) if interrupt::is_cause(&err) => Err(err),
        Err(err) => {
            let path = path.display();
            bail!("cannot write -w {path}: {err}; name a file that may be written, as in: -w /tmp/all.pcapng")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(plan: Plan) -> Vec<String> {
        (0..3).map(|n| plan.name(n, 1_000_000_000_000_000_000).display().to_string()).collect()
    }

    #[test]
    fn files_are_named_as_tcpdump_names_them() {
        let plan = Plan { path: "a%s".into(), format: Format::Pcapng, size: Some(1), seconds: None, count: None };
        assert_eq!(names(plan.clone()), ["a%s", "a%s1", "a%s2"]);
        assert_eq!(names(Plan { count: Some(10), ..plan.clone() }), ["a%s0", "a%s1", "a%s2"]);
        assert_eq!(names(Plan { count: Some(11), ..plan.clone() }), ["a%s00", "a%s01", "a%s02"]);
        let timed = Plan { seconds: Some(60), ..plan };
        assert_eq!(names(timed.clone()), ["a1000000000", "a10000000001", "a10000000002"]);
        assert_eq!(names(Plan { size: None, ..timed.clone() })[2], "a1000000000");
        assert!(timed.check().is_ok());
        for unknown in ["a%!", "a%Ey", "a%Z"] {
            assert!(Plan { path: unknown.into(), ..timed.clone() }.check().is_err(), "{unknown}");
        }
        assert!(Plan { path: "-".into(), ..timed.clone() }.check().is_err());
        assert!(Plan { seconds: None, size: None, count: Some(2), ..timed }.check().is_err());
    }

    #[test]
    fn times_in_names_are_those_of_strftime() {
        let all = "%% %a %A %b %B %c %C %d %D %e %F %g %G %h %H %I %j %m %M %n %p %r %R %s %S %t %T %u %U %V %w %W %x %X %y %Y %z";
        let plan = Plan { path: all.into(), format: Format::Pcapng, size: None, seconds: Some(1), count: None };
        for seconds in [0, 951_782_400, 1_000_000_000, 1_230_768_000, 1_798_761_599] {
            let mut date = std::process::Command::new("date");
            let date = date.env("LC_ALL", "C").arg(format!("-d@{seconds}")).arg(format!("+{all}")).output().unwrap();
            assert_eq!(
                plan.name(0, seconds * SECOND).display().to_string() + "\n",
                String::from_utf8(date.stdout).unwrap()
            );
        }
    }
}
