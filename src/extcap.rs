//! Wireshark's extcap: the same binary under the name `snifctl-extcap`, in its directory of such programs, is an interface
//! to capture on, which is `collect`.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};

use crate::cli::{self, Cli};
use crate::collect::decode::Kind;
use crate::commands;
use crate::tools::exec::print;
use crate::usage::{refuse, spelled};

const NAME: &str = "snifctl-extcap";
const INTERFACE: &str = "snifctl";
/// The tunnel that stands for all.
const EVERY: &str = "every";

/// An interface of Wireshark: the copies that arrive here
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
    #[arg(long, value_name = "TYPE")]
    tunnel: Option<String>,
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    #[arg(long, value_name = "N")]
    egress_id: Option<String>,
    #[arg(long, value_name = "MS")]
    reorder: Option<String>,
    #[arg(long, value_name = "MS")]
    dedup: Option<String>,
    #[arg(long, value_name = "arrival|capture")]
    time: Option<String>,
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
    if let Some(name) = &extcap.extcap_interface
        && name != INTERFACE
    {
        refuse!("--extcap-interface {name:?} is not there; try: --extcap-interface {INTERFACE}");
    }
    if extcap.extcap_interfaces {
        let version = env!("CARGO_PKG_VERSION");
        print(&format!(
            "extcap {{version={version}}}\ninterface {{value={INTERFACE}}}{{display=snifctl collector}}\n"
        ))?;
    } else if extcap.extcap_dlts {
        print("dlt {number=1}{name=EN10MB}{display=Ethernet}\n")?;
    } else if extcap.extcap_config {
        print(&config())?;
    } else if extcap.capture {
        return match Cli::try_parse_from(extcap.collect()) {
            Ok(cli) => commands::run(cli),
            Err(err) => cli::told(Err(err), || format!("{NAME} --help")).or_else(Ok),
        };
    } else {
        refuse!("nothing says what to do; try: {NAME} --extcap-interfaces");
    }
    Ok(ExitCode::SUCCESS)
}

impl Extcap {
    /// The call of `collect` that captures.
    fn collect(&self) -> Vec<String> {
        let tunnel = self.tunnel.clone().filter(|tunnel| tunnel != EVERY);
        let options = [
            ("-w", &self.fifo),
            ("--tunnel", &tunnel),
            ("--listen", &self.listen),
            ("--egress-id", &self.egress_id),
            ("--reorder", &self.reorder),
            ("--dedup", &self.dedup),
            ("--time", &self.time),
            ("--filter", &self.extcap_capture_filter),
        ];
        let given = options.into_iter().filter_map(|(flag, value)| Some((flag, value.as_ref()?)));
        let given = given.filter(|(_, value)| !value.is_empty());
        let words = given.flat_map(|(flag, value)| [flag.to_string(), value.clone()]);
        ["snifctl".to_string(), "collect".to_string()].into_iter().chain(words).collect()
    }
}

/// What Wireshark asks the user.
fn config() -> String {
    let arguments = [
        ("tunnel", "Tunnel", "selector", "Which copies are received"),
        ("listen", "Address", "string", "One of this machine, where they arrive; all if empty"),
        ("egress-id", "Id of egress", "string", "The id of outgoing packets' copies, as the sender has it"),
        ("reorder", "Wait for late frames", "unsigned", "Milliseconds"),
        ("dedup", "Leave out duplicates", "unsigned", "Those of several taps, within so many milliseconds"),
        ("time", "Time", "selector", "Of arrival here, or of capture where the tunnel tells it"),
    ];
    let lines = (0..).zip(arguments).map(|(n, (call, display, kind, tip)): (usize, _)| {
        format!("arg {{number={n}}}{{call=--{call}}}{{display={display}}}{{type={kind}}}{{tooltip={tip}}}\n")
    });
    let value = |n: usize, value: &str, default: bool| {
        format!("value {{arg={n}}}{{value={value}}}{{display={value}}}{{default={default}}}\n")
    };
    let kinds = Kind::value_variants().iter().map(|kind| value(0, &spelled(*kind), false));
    let tunnels = [value(0, EVERY, true)].into_iter().chain(kinds);
    let times = [value(5, "arrival", true), value(5, "capture", false)];
    lines.chain(tunnels).chain(times).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_option_that_is_offered_is_taken() {
        let offered: Vec<String> = config()
            .lines()
            .filter_map(|line| Some(line.split_once("{call=")?.1.split_once('}')?.0.to_string()))
            .collect();
        assert_eq!(offered.len(), 6);
        let start = [NAME, "--extcap-interface", INTERFACE, "--capture", "--fifo", "/tmp/x"].map(String::from);
        let values = ["vxlan", "10.0.0.7", "8", "50", "60", "capture"].map(String::from);
        let given = offered.iter().cloned().zip(values).flat_map(|(flag, value)| [flag, value]);
        let extcap = Extcap::try_parse_from(start.into_iter().chain(given)).unwrap();
        let words = extcap.collect().join(" ");
        let expected =
            "-w /tmp/x --tunnel vxlan --listen 10.0.0.7 --egress-id 8 --reorder 50 --dedup 60 --time capture";
        assert_eq!(words, format!("snifctl collect {expected}"));
        assert!(Cli::try_parse_from(extcap.collect()).is_ok());
    }
}
