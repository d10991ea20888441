//! Wireshark's extcap: the same binary under the name `snifctl-extcap`, in its directory of such programs, offers interfaces to
//! capture on: what arrives here, which is `collect`, and an interface of another machine, which [`remote`] watches.

mod far;
mod remote;
mod sentence;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};

use crate::cli::{self, Cli};
use crate::collect::decode::Kind;
use crate::commands;
use crate::tools::exec::print;
use crate::tools::{fifo, interrupt, notes};
use crate::usage::{Usage, refuse, spelled};
use sentence::{Argument, sentences};

const NAME: &str = "snifctl-extcap";
/// So long the reader of the pipe is waited for at the end.
const PATIENCE: Duration = Duration::from_secs(2);
/// The tunnel that stands for all.
const EVERY: &str = "every";

/// What can be captured on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Interface {
    /// Copies that arrive here
    #[default]
    #[value(name = "snifctl")]
    Collector,
    /// An interface of another machine
    #[value(name = "snifctl-remote")]
    Remote,
}

impl Interface {
    fn of(name: Option<&str>) -> Result<Interface, Usage> {
        match name.map(|name| Interface::from_str(name, false)) {
            None => Ok(Interface::Collector),
            Some(Ok(interface)) => Ok(interface),
            Some(Err(_)) => {
                let [one, other] = [Interface::Collector, Interface::Remote].map(spelled);
                refuse!(
                    "--extcap-interface {:?} is not there; try: --extcap-interface {one}, or {other}",
                    name.unwrap_or_default()
                )
            }
        }
    }

    fn title(self) -> &'static str {
        match self {
            Interface::Collector => "snifctl collector",
            Interface::Remote => "snifctl on a remote machine",
        }
    }
}

/// Interfaces of Wireshark: the copies that arrive here, and those of a remote machine
#[derive(Debug, Parser)]
#[command(name = NAME, version, disable_help_subcommand = true)]
pub(crate) struct Extcap {
    /// List the interfaces
    #[arg(long)]
    extcap_interfaces: bool,
    /// Which Wireshark asks
    #[arg(long, value_name = "VERSION")]
    extcap_version: Option<String>,
    /// The interface that is meant
    #[arg(long, value_name = "NAME")]
    extcap_interface: Option<String>,
    /// List its link types
    #[arg(long)]
    extcap_dlts: bool,
    /// List its options
    #[arg(long)]
    extcap_config: bool,
    /// Capture
    #[arg(long, requires = "fifo")]
    capture: bool,
    /// Where to
    #[arg(long, value_name = "PATH")]
    fifo: Option<String>,
    /// A filter on the frames
    #[arg(long, value_name = "EXPR", allow_hyphen_values = true)]
    extcap_capture_filter: Option<String>,
    /// The tunnel in which copies come
    #[arg(long, value_name = "TYPE")]
    tunnel: Option<String>,
    /// Our address, where they arrive
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// As of snifctl collect
    #[arg(long, value_name = "N")]
    egress_id: Option<String>,
    /// As of snifctl collect
    #[arg(long, value_name = "MS")]
    reorder: Option<String>,
    /// As of snifctl collect
    #[arg(long, value_name = "MS")]
    dedup: Option<String>,
    /// Which time frames get
    #[arg(long, value_name = "arrival|capture")]
    time: Option<String>,
    #[command(flatten)]
    remote: remote::Wanted,
}

/// The words, where we are called so.
pub(crate) fn words(all: impl IntoIterator<Item = OsString>) -> Option<Vec<OsString>> {
    let words: Vec<OsString> = all.into_iter().collect();
    let name = Path::new(words.first()?).file_name();
    (name == Some(OsStr::new(NAME))).then_some(words)
}

pub(crate) fn parse(words: Vec<OsString>) -> Result<Extcap, ExitCode> {
    cli::told(Extcap::try_parse_from(words), || format!("{NAME} --help"))
}

pub(crate) fn run(extcap: Extcap) -> Result<ExitCode> {
    let interface = Interface::of(extcap.extcap_interface.as_deref())?;
    if extcap.extcap_interfaces {
        print(&interfaces())?;
    } else if extcap.extcap_dlts {
        print("dlt {number=1}{name=EN10MB}{display=Ethernet}\n")?;
    } else if extcap.extcap_config {
        print(&config(interface))?;
    } else if extcap.capture {
        return extcap.capture(interface);
    } else {
        refuse!("nothing says what to do; try: {NAME} --extcap-interfaces");
    }
    Ok(ExitCode::SUCCESS)
}

fn interfaces() -> String {
    let line = |at: &Interface| format!("interface {{value={}}}{{display={}}}\n", spelled(*at), at.title());
    let lines: String = Interface::value_variants().iter().map(line).collect();
    format!("extcap {{version={}}}\n{lines}", env!("CARGO_PKG_VERSION"))
}

/// What Wireshark asks the user.
fn config(interface: Interface) -> String {
    match interface {
        Interface::Collector => collector(),
        Interface::Remote => remote::config(),
    }
}

fn collector() -> String {
    let kinds = Kind::value_variants().iter().map(|kind| spelled(*kind));
    let tunnels = [EVERY.to_string()].into_iter().chain(kinds).collect();
    let times = ["arrival", "capture"].map(String::from).to_vec();
    let argument = |call, display, kind, tip, values| Argument { call, display, kind, tip, more: "", values };
    let plain = |call, display, kind, tip| argument(call, display, kind, tip, Vec::new());
    sentences(&[
        argument("tunnel", "Tunnel", "selector", "Which copies are received", tunnels),
        plain("listen", "Address", "string", "One of this machine, where they arrive; all if empty"),
        plain("egress-id", "Id of egress", "string", "The id of outgoing packets' copies, as the sender has it"),
        plain("reorder", "Wait for late frames", "unsigned", "Milliseconds"),
        plain("dedup", "Leave out duplicates", "unsigned", "Those of several taps, within so many milliseconds"),
        argument("time", "Time", "selector", "Of arrival here, or of capture where the tunnel tells it", times),
    ])
}

impl Extcap {
    fn capture(&self, interface: Interface) -> Result<ExitCode> {
        // Wireshark shows whatever is said as an error.
        notes::hush();
        // Of its pipe there is no second one: who hangs up has gone.
        interrupt::end_on_hangup();
        let done = match interface {
            Interface::Collector => {
                self.ensure_own(interface).map_err(Into::into).and_then(|()| collect(&self.collect()))
            }
            Interface::Remote => remote::capture(self),
        };
        if done.is_err() {
            tell_end(self.fifo.as_deref().unwrap_or_default());
        }
        done
    }

    /// Refuses what the interface would not heed.
    fn ensure_own(&self, interface: Interface) -> Result<(), Usage> {
        let of_collector = [("--egress-id", &self.egress_id), ("--reorder", &self.reorder), ("--dedup", &self.dedup)];
        let (foreign, other) = match interface {
            Interface::Collector => (self.remote.own(), Interface::Remote),
            Interface::Remote => {
                let found = of_collector.into_iter().find(|(_, value)| given(value).is_some());
                (found.map(|(flag, _)| flag), Interface::Collector)
            }
        };
        match foreign {
            Some(flag) => {
                refuse!("{flag} is of another interface; leave it out, or try: --extcap-interface {}", spelled(other))
            }
            None => Ok(()),
        }
    }

    /// The call of `collect` that captures.
    fn collect(&self) -> Vec<String> {
        let tunnel = self.tunnel.clone().filter(|tunnel| tunnel != EVERY);
        words_of([
            ("-w", &self.fifo),
            ("--tunnel", &tunnel),
            ("--listen", &self.listen),
            ("--egress-id", &self.egress_id),
            ("--reorder", &self.reorder),
            ("--dedup", &self.dedup),
            ("--time", &self.time),
            ("--filter", &self.extcap_capture_filter),
        ])
    }
}

/// Opens the pipe, perhaps once more, and closes it: tshark goes on for ever where nobody has.
fn tell_end(path: &str) {
    let begin = Instant::now();
    let goes_on = || {
        ensure!(begin.elapsed() < PATIENCE, "nobody reads");
        Ok(())
    };
    let _ = fifo::opened(Path::new(path), goes_on);
}

/// The options that are given, as words.
fn words_of<const N: usize>(options: [(&str, &Option<String>); N]) -> Vec<String> {
    let given = options.into_iter().filter_map(|(flag, value)| Some((flag, given(value)?)));
    given.flat_map(|(flag, value)| [flag.to_string(), value.to_string()]).collect()
}

/// An empty field of the dialog is none.
fn given(value: &Option<String>) -> Option<&str> {
    value.as_deref().filter(|value| !value.is_empty())
}

/// Receives copies, until a signal comes or the reader goes.
fn collect(words: &[String]) -> Result<ExitCode> {
    let call = ["snifctl", "collect"].into_iter().chain(words.iter().map(String::as_str));
    match Cli::try_parse_from(call) {
        Ok(cli) => commands::run(cli),
        Err(err) => cli::told(Err(err), || format!("{NAME} --help")).or_else(Ok),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_option_that_is_offered_is_taken() {
        let offered = sentence::offered(&collector());
        assert_eq!(offered.len(), 6);
        let start = [NAME, "--extcap-interface", "snifctl", "--capture", "--fifo", "/tmp/x"].map(String::from);
        let values = ["vxlan", "10.0.0.7", "8", "50", "60", "capture"].map(String::from);
        let given = offered.iter().cloned().zip(values).flat_map(|(flag, value)| [flag, value]);
        let extcap = Extcap::try_parse_from(start.into_iter().chain(given)).unwrap();
        let words = extcap.collect();
        let expected =
            "-w /tmp/x --tunnel vxlan --listen 10.0.0.7 --egress-id 8 --reorder 50 --dedup 60 --time capture";
        assert_eq!(words.join(" "), expected);
        let call = ["snifctl", "collect"].into_iter().chain(words.iter().map(String::as_str));
        assert!(Cli::try_parse_from(call).is_ok());
    }

    #[test]
    fn what_is_of_the_other_interface_is_refused() {
        for words in [&["--port", "5"][..], &["--remote-host", "h"], &["--remote-sudo"], &["--leave-out-ssh", "false"]]
        {
            let said = Extcap::try_parse_from([&[NAME], words].concat()).unwrap();
            let said = said.ensure_own(Interface::Collector).unwrap_err().to_string();
            let ends = "is of another interface; leave it out, or try: --extcap-interface snifctl-remote";
            assert_eq!(said, format!("{} {ends}", words[0]));
        }
        let empty = Extcap::try_parse_from([NAME, "--port", "", "--dedup", "5"]).unwrap();
        assert!(empty.ensure_own(Interface::Collector).is_ok());
        assert!(empty.ensure_own(Interface::Remote).is_err());
    }

    #[test]
    fn an_interface_that_is_not_there_is_refused_with_those_that_are() {
        assert_eq!(Interface::of(Some("snifctl-remote")).unwrap(), Interface::Remote);
        let said = Interface::of(Some("eth0")).unwrap_err().to_string();
        assert!(said.ends_with("try: --extcap-interface snifctl, or snifctl-remote"), "{said}");
    }
}
