//! The session on the other machine: one ssh, one snifctl behind it that lives as long as its standard input, which we hold.
//! So the session goes with ssh, with the network, and with us, however each ends.

use std::io::{PipeWriter, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use anyhow::{Result, anyhow, bail};

use crate::tools::exec::{Cmd, Line, Lines, Runner, Shared, quote};
use crate::tools::interrupt;

/// So often we give a sign of life, and so long the other side waits for one.
const BEAT: Duration = Duration::from_secs(5);
pub(super) const SILENCE: Duration = Duration::from_secs(30);
/// So long it may take the session down.
const GRACE: Duration = Duration::from_secs(10);
/// So long ssh may take to end that is killed.
const LAST: Duration = Duration::from_secs(1);
/// What ssh and its helpers see of our environment.
const ENVIRONMENT: [&str; 7] = ["HOME", "USER", "LOGNAME", "PATH", "SSH_AUTH_SOCK", "KRB5CCNAME", "XDG_RUNTIME_DIR"];
/// Nothing is asked, as nobody could answer; nothing but our command runs; and a dead connection is told from a quiet one.
const OPTIONS: [&str; 8] = [
    "BatchMode=yes",
    "LogLevel=ERROR",
    "ServerAliveInterval=10",
    "ServerAliveCountMax=3",
    "ClearAllForwardings=yes",
    "RemoteCommand=none",
    "PermitLocalCommand=no",
    // One that stays behind would hold our pipes.
    "ControlMaster=no",
];
/// How ssh ends where it is to blame itself, and a shell where it does not find the program.
const BY_SSH: i32 = 255;
const NOT_FOUND: i32 = 127;

/// How another machine is reached.
#[derive(Clone, Debug)]
pub(super) struct Host {
    /// `[user@]host`, or a name of ssh's configuration.
    pub destination: String,
    /// Of ssh, besides ours.
    pub options: Vec<String>,
}

impl Host {
    fn ssh(&self, more: &[String]) -> Cmd {
        let ours = OPTIONS.iter().flat_map(|option| ["-o".to_string(), option.to_string()]);
        let words = ours.chain(["-T".into()]).chain(self.options.iter().cloned()).chain(more.iter().cloned());
        Cmd::new("ssh", words).environment(&ENVIRONMENT)
    }

    /// Where ssh would connect to: host and port.
    pub(super) fn place(&self) -> Result<(String, u16)> {
        let call = self.ssh(&["-G".into(), "--".into(), self.destination.clone()]);
        let said = Runner::default().answer(&call)?;
        if said.has_failed() {
            bail!("ssh does not take --remote-host {}: {}; try: user@10.0.0.5", self.destination, joined(&said.stderr));
        }
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        let value = |key: &str| said.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        let host = value("hostname").unwrap_or(&self.destination);
        Ok((host.to_string(), value("port").and_then(|port| port.parse().ok()).unwrap_or(22)))
    }
}

fn joined(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What is run there: words of shell lines.
#[derive(Clone, Debug)]
pub(super) struct Words {
    pub program: String,
    /// Of the session.
    pub name: String,
    pub up: Vec<String>,
    pub down: Vec<String>,
}

impl Words {
    fn has_sudo(&self) -> bool {
        self.up.first().is_some_and(|first| first == "sudo")
    }
}

/// How it ended.
#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    /// It had said that the session is up.
    was_up: bool,
    /// What came on standard error, by lines.
    said: Vec<String>,
}

pub(super) struct Far {
    host: Host,
    words: Words,
    /// As long as it is there, so is the session.
    life: Option<Sender<()>>,
    ended: Receiver<Ended>,
    ssh: Shared,
    has_begun: Arc<AtomicBool>,
}

impl Far {
    /// Starts `up` there. If it ends by itself, so does our work.
    pub(super) fn start(host: &Host, words: &Words) -> Result<Far> {
        // There it is read by a shell.
        let line = line(&words.up);
        // However we end, ssh does not stay.
        let call = host.ssh(&["--".into(), host.destination.clone(), line]).mortal();
        let (lines, input) = Runner::default().talk(&call)?;
        let (ssh, has_begun) = (lines.program(), Arc::new(AtomicBool::new(false)));
        let (at_last, begun) = (ssh.clone(), has_begun.clone());
        interrupt::at_last(move || at_last.end());
        let ((life, living), (sender, ended)) = (mpsc::channel(), mpsc::channel());
        std::thread::spawn(move || beat(input, &living));
        std::thread::spawn(move || {
            let _ = sender.send(listen(lines, &begun));
            interrupt::end();
        });
        Ok(Far { host: host.clone(), words: words.clone(), life: Some(life), ended, ssh, has_begun })
    }

    /// Takes the session down.
    ///
    /// # Errors
    /// Where it had ended before, or does not end well.
    pub(super) fn end(mut self) -> Result<()> {
        if let Ok(ended) = self.ended.try_recv() {
            return Err(self.host.reason(&self.words, ended));
        }
        drop(self.life.take());
        match self.ended.recv_timeout(GRACE) {
            Ok(Ended { code: Some(0), .. }) => Ok(()),
            Ok(ended) => Err(self.host.reason(&self.words, ended)),
            Err(_) => Err(self.given_up()),
        }
    }

    /// Ends ssh, which does not end by itself.
    fn given_up(&self) -> anyhow::Error {
        self.ssh.end();
        let _ = self.ended.recv_timeout(LAST);
        let host = &self.host.destination;
        match self.has_begun.load(Ordering::SeqCst) {
            true => anyhow!("{host} does not answer; the session there ends after {} s", SILENCE.as_secs()),
            false => anyhow!("ssh to {host} did not get through; {}", self.host.by_hand(&self.words.program)),
        }
    }
}

/// Holds the input, and gives signs of life, until nobody wants that any more.
fn beat(mut input: PipeWriter, living: &Receiver<()>) {
    while living.recv_timeout(BEAT) == Err(RecvTimeoutError::Timeout) {
        if input.write_all(b"\n").is_err() {
            return;
        }
    }
}

/// The lines of standard error, until the end. `has_begun`: the program there has said something.
fn listen(mut lines: Lines, has_begun: &AtomicBool) -> Ended {
    let (mut said, mut was_up) = (Vec::new(), false);
    for line in lines.by_ref() {
        was_up |= matches!(line, Line::Out(_));
        let text = match line {
            Line::Out(_) => None,
            Line::Err(text) => Some(text.trim().to_string()),
        };
        if text.as_deref().is_none_or(is_from_there) {
            has_begun.store(true, Ordering::SeqCst);
        }
        said.extend(text.filter(|text| !text.is_empty()));
    }
    Ended { code: lines.code().unwrap_or_default(), was_up, said }
}

fn line(words: &[String]) -> String {
    words.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" ")
}

/// Is a line the program's there, and not ssh's?
fn is_from_there(line: &str) -> bool {
    line.starts_with("snifctl: ")
}

impl Host {
    /// One line for it.
    fn reason(&self, words: &Words, ended: Ended) -> anyhow::Error {
        let Ended { code, was_up, said } = ended;
        let (host, program) = (&self.destination, &words.program);
        let by_hand = if was_up { self.down_by_hand(words) } else { self.by_hand(program) };
        let last = said.last().map(String::as_str).unwrap_or("it says no reason");
        match code {
            None => anyhow!("ssh to {host} was ended by a signal"),
            Some(BY_SSH) => match by_ssh(&said) {
                Some(why) => anyhow!("ssh to {host} failed: {why}; {by_hand}"),
                None => anyhow!("ssh to {host} failed; {by_hand}"),
            },
            Some(NOT_FOUND) if last.contains("sudo:") && words.has_sudo() => {
                anyhow!("{host}: {last}; log in as root there, and leave out --remote-sudo")
            }
            Some(NOT_FOUND) => anyhow!("{host} does not find it: {last}; try: --remote-snifctl /usr/local/bin/snifctl"),
            // By a signal, as the shell there tells it.
            Some(code) if was_up && code > 128 => anyhow!("{host}: {program} ended with {code}; {by_hand}"),
            Some(_) => anyhow!("{host}: {}", last.strip_prefix("snifctl: ").unwrap_or(last)),
        }
    }

    /// The same connection by hand.
    fn shell(&self) -> String {
        let ssh = ["ssh".to_string()].into_iter().chain(self.options.iter().cloned());
        line(&ssh.chain([self.destination.clone()]).collect::<Vec<_>>())
    }

    /// Who is killed there takes nothing down.
    fn down_by_hand(&self, words: &Words) -> String {
        format!("session {} may still be up there; try: {} {}", words.name, self.shell(), line(&words.down))
    }

    fn by_hand(&self, program: &str) -> String {
        format!("try: {} {} --version", self.shell(), quote(program))
    }
}

/// Why ssh failed, without what the program there had to tell before.
fn by_ssh(said: &[String]) -> Option<String> {
    let all: Vec<&str> = said.iter().map(String::as_str).filter(|line| !is_from_there(line)).collect();
    let all = all.join("; ");
    Some(all.trim_end_matches('.').to_string()).filter(|all| !all.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_went_wrong_there_is_one_line() {
        let host = Host { destination: "me@web1".into(), options: Vec::new() };
        let words = words();
        let reason = |code, said: &[&str]| {
            let said = said.iter().map(|line| line.to_string()).collect();
            host.reason(&words, Ended { code, was_up: false, said }).to_string()
        };
        let by_hand = "try: ssh me@web1 snifctl --version";
        let refused = "ssh: connect to host web1 port 22: Connection refused";
        assert_eq!(reason(Some(255), &[refused]), format!("ssh to me@web1 failed: {refused}; {by_hand}"));
        assert_eq!(reason(Some(255), &[]), format!("ssh to me@web1 failed; {by_hand}"));
        let note = "snifctl: MTU 1500 towards 10.0.0.7 is too small";
        assert_eq!(reason(Some(255), &[note]), format!("ssh to me@web1 failed; {by_hand}"));
        let closed = "Connection to web1 closed by remote host.";
        let expected = format!("ssh to me@web1 failed: {}; {by_hand}", closed.trim_end_matches('.'));
        assert_eq!(reason(Some(255), &[note, closed]), expected);
        let missing = "sh: 1: snifctl: not found";
        let elsewhere = "try: --remote-snifctl /usr/local/bin/snifctl";
        assert_eq!(reason(Some(127), &[missing]), format!("me@web1 does not find it: {missing}; {elsewhere}"));
        let said = ["snifctl: a warning", "snifctl: interface \"eth7\" does not exist; see: ip -br link"];
        assert_eq!(reason(Some(1), &said), "me@web1: interface \"eth7\" does not exist; see: ip -br link");
        assert_eq!(reason(Some(1), &["sudo: a password is required"]), "me@web1: sudo: a password is required");
        let missing = "sh: 1: sudo: not found";
        assert!(reason(Some(127), &[missing]).ends_with(elsewhere), "it was not asked for");
        assert_eq!(reason(None, &[]), "ssh to me@web1 was ended by a signal");
    }

    fn words() -> Words {
        let words = |line: &str| line.split(' ').map(String::from).collect();
        let [up, down] = ["up eth0", "sudo -n snifctl down --name extcap-7"].map(words);
        Words { program: "snifctl".into(), name: "extcap-7".into(), up, down }
    }

    #[test]
    fn once_a_session_was_up_it_is_said_how_it_goes_down() {
        let options = ["-p", "2222", "-o", "ProxyCommand=nc %h %p"].map(String::from).to_vec();
        let host = Host { destination: "me@web1".into(), options };
        let down = "ssh -p 2222 -o 'ProxyCommand=nc %h %p' me@web1 sudo -n snifctl down --name extcap-7";
        let hint = format!("session extcap-7 may still be up there; try: {down}");
        for (code, begin) in [(255, "ssh to me@web1 failed"), (137, "me@web1: snifctl ended with 137")] {
            let ended = Ended { code: Some(code), was_up: true, said: Vec::new() };
            assert_eq!(host.reason(&words(), ended).to_string(), format!("{begin}; {hint}"));
        }
        let by_hand = "try: ssh -p 2222 -o 'ProxyCommand=nc %h %p' me@web1 snifctl --version";
        assert_eq!(host.by_hand("snifctl"), by_hand);
        let with_sudo = Words { up: ["sudo", "-n", "snifctl", "up"].map(String::from).to_vec(), ..words() };
        let ended = Ended { code: Some(127), was_up: false, said: vec!["bash: sudo: command not found".into()] };
        let said = host.reason(&with_sudo, ended).to_string();
        assert_eq!(said, "me@web1: bash: sudo: command not found; log in as root there, and leave out --remote-sudo");
    }
}
