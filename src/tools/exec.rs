//! The only place that runs other programs: argument vectors without a shell, absolute paths, a cleared environment.

use std::ffi::OsString;
use std::fmt::{self, Write as _};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// Where tools live besides `PATH`, which lacks the sbin directories for most users.
const SBIN: &str = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin";

/// One call of an outer program. `Display` shows it as a line that can be pasted into a shell.
#[derive(Clone, Debug)]
pub struct Cmd {
    program: String,
    args: Vec<String>,
    stdin: Option<String>,
    patience: Option<Duration>,
}

impl Cmd {
    /// `program` is a bare name, looked up in `PATH` and the sbin directories.
    pub fn new<S: Into<String>>(program: &str, args: impl IntoIterator<Item = S>) -> Cmd {
        Cmd { program: program.into(), args: args.into_iter().map(Into::into).collect(), stdin: None, patience: None }
    }

    /// Lines for the program's standard input.
    pub fn input(mut self, lines: &[String]) -> Cmd {
        self.stdin = Some(lines.iter().fold(String::new(), |text, line| text + line + "\n"));
        self
    }

    /// Ends the program, and fails, when it takes longer.
    pub fn patience(self, patience: Duration) -> Cmd {
        Cmd { patience: Some(patience), ..self }
    }
}

/// Quotes one word for a POSIX shell, and leaves a harmless one as it is.
pub fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "@%_-+=:,./".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_string();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

impl Cmd {
    /// The words of the call, without what it is fed.
    fn words(&self) -> String {
        let words = std::iter::once(&self.program).chain(&self.args);
        words.map(|word| quote(word)).collect::<Vec<_>>().join(" ")
    }
}

impl fmt::Display for Cmd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(text) = &self.stdin {
            let lines: String = text.lines().fold(String::new(), |mut all, line| {
                let _ = write!(all, " {}", quote(line));
                all
            });
            write!(f, "printf '%s\\n'{lines} | ")?;
        }
        f.write_str(&self.words())
    }
}

/// A program that ran and answered with a failure.
#[derive(Debug)]
pub struct Failed {
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
pub fn find(program: &str) -> Option<PathBuf> {
    let mut path: OsString = std::env::var_os("PATH").unwrap_or_default();
    path.push(":");
    path.push(SBIN);
    which::which_in(program, Some(path), "/").ok()
}

/// Writes a result to standard output. Who no longer reads it has seen enough: then there is nothing more to do.
pub fn print(text: &str) {
    let mut stdout = io::stdout();
    if stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).is_err() {
        std::process::exit(0);
    }
}

/// How outer programs are run: for real, or printed (`--dry-run`), or both (`-v`).
#[derive(Clone, Copy, Debug, Default)]
pub struct Runner {
    pub dry_run: bool,
    pub verbose: bool,
}

impl Runner {
    /// Runs a command that changes nothing, also in a dry run. Returns its standard output.
    pub fn read(&self, cmd: &Cmd) -> Result<String> {
        if self.verbose {
            eprintln!("+ {cmd}");
        }
        run(cmd).map(|output| String::from_utf8_lossy(&output).into_owned())
    }

    /// The same of a command whose output is not text.
    pub fn read_bytes(&self, cmd: &Cmd) -> Result<Vec<u8>> {
        if self.verbose {
            eprintln!("+ {cmd}");
        }
        run(cmd)
    }

    /// Starts a command that changes nothing.
    pub fn start(&self, cmd: &Cmd) -> Result<Running> {
        if self.verbose {
            eprintln!("+ {cmd}");
        }
        Running::start(cmd)
    }

    /// Runs a command that changes the machine; a dry run prints it instead.
    pub fn write(&self, cmd: &Cmd) -> Result<String> {
        if self.dry_run {
            print(&format!("{cmd}\n"));
            return Ok(String::new());
        }
        self.read(cmd)
    }

    /// Does what `shown` says, a change that needs no program of its own; a dry run prints the line instead.
    pub fn act(&self, shown: &str, path: &Path, change: impl FnOnce(&Path) -> io::Result<()>) -> Result<()> {
        let line = format!("{shown} {}", quote(&path.to_string_lossy()));
        if self.dry_run {
            print(&format!("{line}\n"));
            return Ok(());
        }
        if self.verbose {
            eprintln!("+ {line}");
        }
        change(path).with_context(|| format!("`{line}` failed"))
    }
}

fn run(cmd: &Cmd) -> Result<Vec<u8>> {
    let running = Running::start(cmd)?;
    if let Some(patience) = cmd.patience
        && running.handle.wait_timeout(patience)?.is_none()
    {
        bail!("{} took longer than {} s", cmd.program, patience.as_secs());
    }
    running.wait()
}

/// A program that runs while we do something else, and is ended when this value goes.
#[derive(Debug)]
pub struct Running {
    handle: duct::Handle,
    words: String,
}

impl Running {
    fn start(cmd: &Cmd) -> Result<Running> {
        let call = expression(cmd)?;
        let call = match &cmd.stdin {
            Some(text) => call.stdin_bytes(text.clone()),
            None => call.stdin_null(),
        };
        let call = call.stdout_capture().stderr_capture().unchecked();
        let handle = call.start().with_context(|| format!("could not start {}", cmd.program))?;
        Ok(Running { handle, words: cmd.words() })
    }

    /// Its standard output, once it has ended well.
    pub fn wait(&self) -> Result<Vec<u8>> {
        let output = self.handle.wait().with_context(|| format!("could not wait for `{}`", self.words))?;
        if output.status.success() {
            return Ok(output.stdout.clone());
        }
        let said = if output.stderr.is_empty() { &output.stdout } else { &output.stderr };
        Err(Failed {
            command: self.words.clone(),
            status: output.status.to_string(),
            stderr: String::from_utf8_lossy(said).into_owned(),
        }
        .into())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.handle.kill();
    }
}

/// The call with an absolute path and nothing of our environment.
fn expression(cmd: &Cmd) -> Result<duct::Expression> {
    let Some(program) = find(&cmd.program) else {
        bail!("{} is not installed; try: snifctl doctor", cmd.program);
    };
    Ok(duct::cmd(program, &cmd.args).full_env([("LC_ALL", "C"), ("PATH", SBIN), ("HOME", "/")]))
}

/// A program that runs beside us and is ended when this value goes.
#[derive(Debug)]
pub struct Background(duct::Handle);

impl Background {
    pub fn start(cmd: &Cmd) -> Result<Background> {
        let call = expression(cmd)?.stdin_null().stdout_null().stderr_null().unchecked();
        Ok(Background(call.start().with_context(|| format!("could not start {}", cmd.program))?))
    }

    pub fn pid(&self) -> u32 {
        self.0.pids().first().copied().unwrap_or_default()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
    }
}

/// Becomes another program; returns only if that fails.
pub fn replace(cmd: &Cmd) -> Result<std::process::ExitCode> {
    let program = find(&cmd.program).with_context(|| format!("{} is not installed", cmd.program))?;
    let err = std::os::unix::process::CommandExt::exec(std::process::Command::new(program).args(&cmd.args));
    Err(err).with_context(|| format!("could not start {}", cmd.program))
}

/// The path of this very binary.
pub fn own_path() -> Result<String> {
    Ok(std::env::current_exe().context("cannot tell our own path")?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_so_that_a_shell_reads_it_back() {
        let cmd = Cmd::new("tc", ["filter", "it's", "a b", ""]);
        assert_eq!(cmd.to_string(), r"tc filter 'it'\''s' 'a b' ''");
        let fed = Cmd::new("tc", ["-batch", "-"]).input(&["qdisc add".into(), "x".into()]);
        assert_eq!(fed.to_string(), r"printf '%s\n' 'qdisc add' x | tc -batch -");
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
