//! The only place that runs other programs: argument vectors without a shell, absolute paths, a cleared environment.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::io::{self, BufRead, BufReader, PipeReader, PipeWriter};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::tools::interrupt::{self, Interrupted};

/// Where tools live besides `PATH`, which lacks the sbin directories for most users.
const SBIN: &str = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin";

/// One call of an outer program. `Display` shows it as a line that can be pasted into a shell.
#[derive(Clone, Debug)]
pub(crate) struct Cmd {
    program: String,
    args: Vec<String>,
    stdin: Stdin,
    patience: Option<Duration>,
    is_mortal: bool,
    /// The network namespace that it runs in, if that is not ours.
    netns: Option<PathBuf>,
    /// The variables of our environment that it sees.
    environment: &'static [&'static str],
}

/// What a program reads from its standard input.
#[derive(Clone, Debug)]
enum Stdin {
    Nothing,
    Text(String),
    /// What we would read from ours.
    Ours,
    /// What we write while it runs.
    Held,
}

impl Cmd {
    /// `program` is a bare name, looked up in `PATH` and the sbin directories.
    pub(crate) fn new<S: Into<String>>(program: &str, args: impl IntoIterator<Item = S>) -> Cmd {
        let args = args.into_iter().map(Into::into).collect();
        let (stdin, environment) = (Stdin::Nothing, &[][..]);
        Cmd { program: program.into(), args, stdin, patience: None, is_mortal: false, netns: None, environment }
    }

    /// Lines for the program's standard input.
    pub(crate) fn input(mut self, lines: &[String]) -> Cmd {
        self.stdin = Stdin::Text(lines.iter().fold(String::new(), |text, line| text + line + "\n"));
        self
    }

    /// The program reads our standard input.
    pub(crate) fn our_input(self) -> Cmd {
        Cmd { stdin: Stdin::Ours, ..self }
    }

    /// The kernel ends the program when the thread of ours that has started it ends, however it does.
    pub(crate) fn mortal(self) -> Cmd {
        Cmd { is_mortal: true, ..self }
    }

    /// The program runs in this network namespace; all else stays ours, so it sees our bpffs.
    pub(crate) fn within(self, netns: Option<&Path>) -> Cmd {
        Cmd { netns: netns.map(Path::to_path_buf), ..self }
    }

    /// The program sees these variables of our environment, where they are set; others are hidden from it.
    pub(crate) fn environment(self, names: &'static [&'static str]) -> Cmd {
        Cmd { environment: names, ..self }
    }

    /// Ends the program, and fails, when it takes longer.
    pub(crate) fn patience(self, patience: Duration) -> Cmd {
        Cmd { patience: Some(patience), ..self }
    }
}

/// Quotes one word for a POSIX shell, and leaves a harmless one as it is.
pub(crate) fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "@%_-+=:,./".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_string();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

impl Cmd {
    /// The words of the call, without what it is fed.
    fn words(&self) -> String {
        let enter = self.netns.as_ref().map(|netns| enter(netns)).into_iter().flatten();
        let words = enter.chain(std::iter::once(&self.program).chain(&self.args).cloned());
        words.map(|word| quote(&word)).collect::<Vec<_>>().join(" ")
    }
}

/// The words before a command that runs in another network namespace.
pub(crate) fn enter(netns: &Path) -> [String; 2] {
    ["nsenter".into(), format!("--net={}", netns.display())]
}

/// What the program is fed follows as a here-document.
impl fmt::Display for Cmd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.words())?;
        let Stdin::Text(text) = &self.stdin else { return Ok(()) };
        let end = delimiter(text);
        write!(f, " <<'{end}'\n{text}{end}")
    }
}

/// A word that ends a here-document and is no line of it.
fn delimiter(text: &str) -> String {
    let mut end = "END".to_string();
    while text.lines().any(|line| line == end) {
        end.push('_');
    }
    end
}

/// A program that ran and answered with a failure.
#[derive(Debug)]
pub(crate) struct Failed {
    pub command: String,
    pub status: String,
    pub stderr: String,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let said = self.stderr.split_whitespace().collect::<Vec<_>>().join(" ");
        let command = &self.command;
        write!(f, "`{command}` failed ({}): {}", self.status, if said.is_empty() { "it gave no reason" } else { &said })
    }
}

impl std::error::Error for Failed {}

/// The absolute path of a tool, or `None` where the machine lacks it.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let mut path: OsString = std::env::var_os("PATH").unwrap_or_default();
    path.push(":");
    path.push(SBIN);
    which::which_in(program, Some(path), "/").ok()
}

/// Nobody reads our standard output any more. Who reads no further has seen enough: that is no failure.
#[derive(Debug)]
pub(crate) struct ReaderGone;

impl fmt::Display for ReaderGone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nobody reads standard output any more")
    }
}

impl std::error::Error for ReaderGone {}

/// Writes a result to standard output.
///
/// # Errors
/// [`ReaderGone`] where its reader has closed it.
pub(crate) fn print(text: &str) -> Result<()> {
    write_to(&mut io::stdout(), text)
}

fn write_to(out: &mut impl io::Write, text: &str) -> Result<()> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(err) if err.kind() == io::ErrorKind::BrokenPipe => Err(ReaderGone.into()),
        Err(err) => bail!("cannot write to standard output: {err}"),
        Ok(()) => Ok(()),
    }
}

/// How outer programs are run: for real, or printed (`--dry-run`), or both (`-v`).
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Runner {
    pub dry_run: bool,
    pub verbose: bool,
}

impl Runner {
    /// Runs a command that changes nothing, also in a dry run. Returns its standard output.
    pub(crate) fn read(&self, cmd: &Cmd) -> Result<String> {
        self.read_bytes(cmd).map(text)
    }

    /// The same of a command whose output is not text.
    pub(crate) fn read_bytes(&self, cmd: &Cmd) -> Result<Vec<u8>> {
        self.show(cmd);
        run(cmd)
    }

    /// The same of a command that goes on after a failure: what it said, however it ended.
    pub(crate) fn answer(&self, cmd: &Cmd) -> Result<Answer> {
        self.start(cmd)?.answer()
    }

    /// Starts a command that changes nothing.
    pub(crate) fn start(&self, cmd: &Cmd) -> Result<Running> {
        self.show(cmd);
        Running::start(cmd)
    }

    /// Starts a command that changes nothing, and gives its lines as they come.
    pub(crate) fn lines(&self, cmd: &Cmd) -> Result<Lines> {
        self.show(cmd);
        Lines::start(cmd)
    }

    /// The same of a command that runs for as long as we hold its standard input, or until it has enough.
    pub(crate) fn talk(&self, cmd: &Cmd) -> Result<(Lines, PipeWriter)> {
        self.show(cmd);
        let (reader, writer) = io::pipe()?;
        let held = Cmd { stdin: Stdin::Held, ..cmd.clone() };
        Ok((Lines::of(expression(&held)?.stdin_file(reader), cmd)?, writer))
    }

    fn show(&self, cmd: &Cmd) {
        if self.verbose {
            cmd.to_string().lines().for_each(tell);
        }
    }

    /// Runs a command that changes the machine; a dry run prints it instead.
    pub(crate) fn write(&self, cmd: &Cmd) -> Result<String> {
        if self.dry_run {
            print(&format!("{cmd}\n"))?;
            return Ok(String::new());
        }
        self.read(cmd)
    }

    /// Does what `shown` says, a change that needs no program of its own; a dry run prints the line instead.
    pub(crate) fn act(&self, shown: &str, path: &Path, change: impl FnOnce(&Path) -> io::Result<()>) -> Result<()> {
        let line = format!("{shown} {}", quote(&path.to_string_lossy()));
        if self.dry_run {
            print(&format!("{line}\n"))?;
            return Ok(());
        }
        if self.verbose {
            tell(&line);
        }
        interrupt::check()?;
        change(path).with_context(|| format!("`{line}` failed"))
    }
}

/// A terminal that is gone is no reason to end in the middle of something.
fn tell(line: &str) {
    let _ = io::Write::write_fmt(&mut io::stderr(), format_args!("+ {line}\n"));
}

fn run(cmd: &Cmd) -> Result<Vec<u8>> {
    Running::start(cmd)?.wait()
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What a program said, and how it ended.
#[derive(Debug)]
pub(crate) struct Answer {
    command: String,
    status: std::process::ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Answer {
    /// Its standard output, if it has ended well.
    pub(crate) fn done(self) -> Result<Vec<u8>> {
        match self.status.success() {
            true => Ok(self.stdout),
            false => Err(self.failed().into()),
        }
    }

    pub(crate) fn has_failed(&self) -> bool {
        !self.status.success()
    }

    /// The failure that this answer is.
    pub(crate) fn failed(self) -> Failed {
        let stderr = if self.stderr.is_empty() { text(self.stdout) } else { self.stderr };
        Failed { command: self.command, status: self.status.to_string(), stderr }
    }
}

/// A program that runs while we do something else, and is ended when this value goes.
#[derive(Debug)]
pub(crate) struct Running {
    handle: duct::Handle,
    words: String,
    patience: Option<Duration>,
}

/// So often a running program is looked after.
const STEP: Duration = Duration::from_millis(50);
/// So long a program may go on after a signal.
const GRACE: Duration = Duration::from_secs(2);

impl Running {
    fn start(cmd: &Cmd) -> Result<Running> {
        interrupt::check()?;
        let call = expression(cmd)?.stdout_capture().stderr_capture();
        let handle = call.start().with_context(|| format!("could not start {}", cmd.program))?;
        Ok(Running { handle, words: cmd.words(), patience: cmd.patience })
    }

    /// Its standard output, once it has ended well.
    pub(crate) fn wait(&self) -> Result<Vec<u8>> {
        self.answer()?.done()
    }

    /// What it said, once it has ended.
    fn answer(&self) -> Result<Answer> {
        let output = self.output()?;
        Ok(Answer {
            command: self.words.clone(),
            status: output.status,
            stdout: output.stdout.clone(),
            stderr: text(output.stderr.clone()),
        })
    }
}

impl Running {
    /// Waits for its end. After a signal it may go on for a while, so that what it does is whole.
    fn output(&self) -> Result<&std::process::Output> {
        let (start, mut signalled) = (Instant::now(), None);
        loop {
            let output = self.handle.wait_timeout(STEP);
            if let Some(output) = output.with_context(|| format!("could not wait for `{}`", self.words))? {
                return Ok(output);
            }
            if interrupt::check().is_err() && signalled.get_or_insert_with(Instant::now).elapsed() >= GRACE {
                self.end();
                return Err(Interrupted.into());
            }
            if let Some(patience) = self.patience.filter(|patience| start.elapsed() >= *patience) {
                let program = self.words.split(' ').next().unwrap_or_default();
                bail!("{program} took longer than {} s", patience.as_secs());
            }
        }
    }

    /// Ends it, with all that it has started, and waits until it writes no more.
    fn end(&self) {
        if !matches!(self.handle.try_wait(), Ok(None)) {
            return;
        }
        let group = self.handle.pids().first().and_then(|pid| Pid::from_raw(*pid as i32));
        // Only where it leads a group of its own is there one of this number.
        if let Some(group) = group {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.handle.kill();
        let _ = self.handle.wait_timeout(GRACE);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

/// One line of a program that still runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    Out(String),
    /// From its standard error.
    Err(String),
}

/// A running program's lines as they come, until it ends. It is ended when this value goes.
#[derive(Debug)]
pub(crate) struct Lines {
    program: Shared,
    lines: Receiver<Line>,
}

/// A program that one thread listens to, and another can end.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    handle: Arc<duct::Handle>,
    /// Its output has ended, so that it is waited for, and its number may become another's.
    is_over: Arc<AtomicBool>,
}

impl Shared {
    fn pid(&self) -> u32 {
        self.handle.pids().first().copied().unwrap_or_default()
    }

    /// Ends it, and, where it leads a group of its own, all that it has started.
    pub(crate) fn end(&self) {
        if let Some(group) = Pid::from_raw(self.pid() as i32).filter(|_| !self.is_over.load(Ordering::SeqCst)) {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.handle.kill();
    }
}

impl Lines {
    fn start(cmd: &Cmd) -> Result<Lines> {
        Lines::of(expression(cmd)?, cmd)
    }

    fn of(call: duct::Expression, cmd: &Cmd) -> Result<Lines> {
        let ((out, out_writer), (err, err_writer)) = (io::pipe()?, io::pipe()?);
        let call = call.stdout_file(out_writer).stderr_file(err_writer);
        let handle = call.start().with_context(|| format!("could not start {}", cmd.program))?;
        let (sender, lines) = mpsc::channel();
        forward(out, Line::Out, sender.clone());
        forward(err, Line::Err, sender);
        Ok(Lines { program: Shared { handle: Arc::new(handle), is_over: Arc::default() }, lines })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.program.pid()
    }

    pub(crate) fn program(&self) -> Shared {
        self.program.clone()
    }

    /// How it has ended, once it has; none where a signal did that.
    pub(crate) fn code(&self) -> Result<Option<i32>> {
        self.program.is_over.store(true, Ordering::SeqCst);
        Ok(self.program.handle.wait()?.status.code())
    }
}

/// Sends what comes out of a pipe, line by line, until it is closed or nobody listens.
fn forward(pipe: PipeReader, kind: fn(String) -> Line, sender: Sender<Line>) {
    std::thread::spawn(move || {
        let lines = BufReader::new(pipe).split(b'\n').map_while(Result::ok);
        lines.map(text).map(kind).try_for_each(|line| sender.send(line))
    });
}

impl Iterator for Lines {
    type Item = Line;

    fn next(&mut self) -> Option<Line> {
        self.lines.recv().ok()
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        self.program.is_over.store(true, Ordering::SeqCst);
        let handle = &self.program.handle;
        let _ = handle.kill().and_then(|()| handle.wait().map(drop));
    }
}

/// The call with an absolute path and nothing of our environment. How it ends is for the caller to judge.
fn expression(cmd: &Cmd) -> Result<duct::Expression> {
    let found =
        |program: &str| find(program).with_context(|| format!("{program} is not installed; try: snifctl doctor"));
    let mut words: Vec<OsString> = vec![found(&cmd.program)?.into()];
    words.extend(cmd.args.iter().map(OsString::from));
    let mut before = |program: &str, args: &[String]| {
        let args = args.iter().map(OsString::from).chain(["--".into()]);
        words.splice(0..0, [found(program)?.into()].into_iter().chain(args));
        Ok::<(), anyhow::Error>(())
    };
    if let Some(netns) = &cmd.netns {
        let [program, which] = enter(netns);
        before(&program, &[which])?;
    }
    if cmd.is_mortal {
        before("setpriv", &["--pdeathsig".into(), "KILL".into()])?;
    }
    let program = words.remove(0);
    let call = duct::cmd(program, words);
    let mut environment: BTreeMap<&str, OsString> =
        BTreeMap::from([("LC_ALL", "C"), ("PATH", SBIN), ("HOME", "/")].map(|(name, value)| (name, value.into())));
    environment.extend(cmd.environment.iter().filter_map(|name| Some((*name, std::env::var_os(name)?))));
    let call = call.full_env(environment).unchecked();
    // A terminal sends its ^C to its whole group: a tool that it hit would leave its work half done. One that reads the
    // terminal must stay in that group.
    let is_apart = match cmd.stdin {
        Stdin::Ours => false,
        Stdin::Held => true,
        Stdin::Nothing | Stdin::Text(_) => interrupt::is_watched(),
    };
    let call = match is_apart {
        true => call.before_spawn(|command| {
            command.process_group(0);
            Ok(())
        }),
        false => call,
    };
    Ok(match &cmd.stdin {
        Stdin::Nothing => call.stdin_null(),
        Stdin::Text(text) => call.stdin_bytes(text.clone()),
        Stdin::Ours | Stdin::Held => call,
    })
}

/// A program that runs beside us. It is ended when this value goes, and by the kernel when we end in any other way.
#[derive(Debug)]
pub(crate) struct Background(duct::Handle);

impl Background {
    pub(crate) fn start(cmd: &Cmd) -> Result<Background> {
        let call = expression(&cmd.clone().mortal())?.stdout_null().stderr_null();
        Ok(Background(call.start().with_context(|| format!("could not start {}", cmd.program))?))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.pids().first().copied().unwrap_or_default()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
    }
}

/// Becomes another program; returns only if that fails.
pub(crate) fn replace(cmd: &Cmd) -> Result<std::process::ExitCode> {
    replace_by(&cmd.program, cmd.args.iter().map(OsString::from))
}

/// The same with words that need not be text.
pub(crate) fn replace_by(name: &str, words: impl Iterator<Item = OsString>) -> Result<std::process::ExitCode> {
    let program = find(name).with_context(|| format!("{name} is not installed"))?;
    let err = std::os::unix::process::CommandExt::exec(std::process::Command::new(program).args(words));
    Err(err).with_context(|| format!("could not start {name}"))
}

/// The path of this very binary.
pub(crate) fn own_path() -> Result<String> {
    Ok(std::env::current_exe().context("cannot tell our own path")?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_so_that_a_shell_reads_it_back() {
        let cmd = Cmd::new("tc", ["filter", "it's", "a b", ""]);
        assert_eq!(cmd.to_string(), r"tc filter 'it'\''s' 'a b' ''");
    }

    #[test]
    fn what_a_command_is_fed_is_shown_as_a_here_document() {
        let fed =
            |lines: &[&str]| Cmd::new("cat", ["-"]).input(&lines.iter().map(|l| l.to_string()).collect::<Vec<_>>());
        assert_eq!(fed(&["qdisc add", "x"]).to_string(), "cat - <<'END'\nqdisc add\nx\nEND");
        assert_eq!(fed(&["END"]).to_string(), "cat - <<'END_'\nEND\nEND_");
        let lines = ["$HOME `id`", "it's \"q\" \\", "", "END", "END_", "  ünï\t\\"];
        for shell in ["sh", "bash"] {
            let echoed = run(&Cmd::new(shell, ["-c", &fed(&lines).to_string()])).unwrap();
            assert_eq!(text(echoed), lines.join("\n") + "\n", "{shell}");
        }
    }

    #[test]
    fn only_a_closed_pipe_means_that_nobody_reads() {
        struct Full(io::ErrorKind);
        impl io::Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(self.0.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        assert!(write_to(&mut Full(io::ErrorKind::BrokenPipe), "x").unwrap_err().is::<ReaderGone>());
        let full = write_to(&mut Full(io::ErrorKind::StorageFull), "x").unwrap_err();
        assert_eq!(full.to_string(), "cannot write to standard output: no storage space");
    }

    #[test]
    fn lines_come_while_the_program_runs_and_dropping_them_ends_it() {
        let script = "echo $$; echo odd >&2; echo; exec sleep 600";
        let mut lines = Runner::default().lines(&Cmd::new("sh", ["-c", script])).unwrap();
        let first: Vec<Line> = lines.by_ref().take(3).collect();
        assert!(first.contains(&Line::Err("odd".into())) && first.contains(&Line::Out(String::new())), "{first:?}");
        let pid = first.iter().find_map(|line| match line {
            Line::Out(pid) if !pid.is_empty() => Some(pid.clone()),
            _ => None,
        });
        drop(lines);
        assert!(!Path::new("/proc").join(pid.unwrap()).exists());
        let all: Vec<Line> = Runner::default().lines(&Cmd::new("printf", ["a\\nb"])).unwrap().collect();
        assert_eq!(all, [Line::Out("a".into()), Line::Out("b".into())]);
    }

    #[test]
    fn a_failure_names_command_status_and_reason() {
        let err = run(&Cmd::new("ls", ["/nonexistent"])).unwrap_err();
        let text = err.to_string();
        assert!(text.starts_with("`ls /nonexistent` failed (exit"), "{text}");
        assert!(text.contains("No such file"), "{text}");
    }

    #[test]
    fn a_missing_program_is_not_a_failed_one() {
        let err = run(&Cmd::new("no-such-tool", [""; 0])).unwrap_err();
        assert!(err.downcast_ref::<Failed>().is_none());
    }
}
