//! `collect`: the receiver of copies.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use crate::collect::classic::Program;
use crate::collect::control::{Control, Place};
use crate::collect::decode::Kind;
use crate::collect::dedup::Recent;
use crate::collect::files::{AT_MOST, Format, Output, Plan};
use crate::collect::receive::{Ears, Receiver, become_user, port_of};
use crate::collect::source::{Row, Sources};
use crate::collect::tap::{self, Tap};
use crate::collect::{Flow, now};
use crate::output::json as out;
use crate::output::text::{self, were};
use crate::tools::exec::{ReaderGone, Runner, print};
use crate::tools::interrupt;
use crate::usage::{Usage, ensure_usage, number, refuse};

/// So long a frame may wait in our buffer while others come, and a signal for us.
const TICK: Duration = Duration::from_millis(100);
/// So long packets may wait in the kernel where only a file is written.
const NAP: Duration = Duration::from_millis(1);
/// So long what has come is still taken in at the end, besides what a slow reader takes.
const DRAIN: Duration = Duration::from_secs(3);
const MILLISECOND: u64 = 1_000_000;
const MEGABYTE: u64 = 1_000_000;

/// Which time a frame gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Time {
    /// That of its arrival here
    Arrival,
    /// That of its capture, where the tunnel tells it: erspan3, snifctl's option of geneve
    Capture,
}

#[derive(Debug, Args)]
pub(crate) struct CollectArgs {
    /// Write a capture: a file, or - for standard output
    #[arg(short, long = "write", value_name = "FILE|-")]
    write: Option<String>,
    /// Begin another file after so many millions of bytes: FILE1, FILE2, ...
    #[arg(short = 'C', long, value_name = "MB", allow_negative_numbers = true, value_parser = |text: &str| number::<u64>("-C", text, 1..=1_000_000_000, "-C 100"))]
    file_size: Option<u64>,
    /// Begin another file after so many seconds; FILE can hold a time, as in day-%H.pcapng
    #[arg(short = 'G', long, value_name = "SECONDS", allow_negative_numbers = true, value_parser = |text: &str| number::<u64>("-G", text, 1..=1_000_000_000, "-G 3600"))]
    rotate_seconds: Option<u64>,
    /// So many files: with -C the first is written again then, with -G alone it ends
    #[arg(short = 'W', long, value_name = "COUNT", allow_negative_numbers = true, value_parser = |text: &str| number::<u64>("-W", text, 1..=1_000_000_000, "-W 24"))]
    file_count: Option<u64>,
    /// Write pcap with nanoseconds instead of pcapng
    #[arg(long, requires = "write")]
    pcap: bool,
    /// Put the frames on this tap device, which is made where it is not there, and ends with the process
    #[arg(long, value_name = "IFACE")]
    to: Option<String>,
    /// Print a table of sources so often
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true, value_parser = |text: &str| number::<u64>("--stats", text, 1..=86400, "--stats 10"))]
    stats: Option<u64>,
    /// Tell the counters to `snifctl verify`, which connects there [default port: 9811]
    #[arg(long, value_name = "ADDR[:PORT]")]
    control: Option<Place>,
    /// Receive this type of tunnel; may be repeated [default: every one]
    #[arg(long = "tunnel", value_name = "TYPE", value_enum)]
    tunnels: Vec<Kind>,
    /// Receive at this address of ours; may be repeated [default: all]
    #[arg(long, value_name = "ADDR")]
    listen: Vec<IpAddr>,
    /// UDP port [default: vxlan 4789, vxlan-gpe 4790, geneve 6081]
    #[arg(long, value_name = "PORT", allow_negative_numbers = true, value_parser = |text: &str| number::<u16>("--port", text, 1..=65535, "--tunnel vxlan --port 8472"))]
    port: Option<u16>,
    /// The id of outgoing packets' copies, as it was given to `up`
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = |text: &str| number::<u32>("--egress-id", text, 0..=u64::from(u32::MAX), "--egress-id 8"))]
    egress_id: Option<u32>,
    /// Only frames that this pcap-filter(7) expression takes
    #[arg(long, value_name = "EXPR", allow_hyphen_values = true)]
    filter: Option<String>,
    /// Keep one of the same frames that several taps have copied within so many milliseconds
    #[arg(long, value_name = "MS", allow_negative_numbers = true, value_parser = |text: &str| number::<u64>("--dedup", text, 1..=60_000, "--dedup 50"))]
    dedup: Option<u64>,
    /// Let frames wait so many milliseconds for those that are late
    #[arg(long, value_name = "MS", allow_negative_numbers = true, value_parser = |text: &str| number::<u64>("--reorder", text, 1..=60_000, "--reorder 50"))]
    reorder: Option<u64>,
    /// Which time frames get
    #[arg(long, value_enum, default_value_t = Time::Arrival)]
    time: Time,
    /// End after so many frames
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = |text: &str| number::<u64>("--count", text, 1..=u64::MAX, "--count 1000"))]
    count: Option<u64>,
    /// Go on as this user once sockets and devices are open
    #[arg(short = 'Z', long, value_name = "USER")]
    relinquish_privileges: Option<String>,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
}

impl CollectArgs {
    fn plan(&self) -> Option<Plan> {
        let path = self.write.clone()?;
        let format = if self.pcap { Format::Pcap } else { Format::Pcapng };
        let (size, seconds, count) = (self.file_size.map(|n| n * MEGABYTE), self.rotate_seconds, self.file_count);
        Some(Plan { path, format, size, seconds, count })
    }

    fn check(&self) -> Result<(), Usage> {
        ensure_usage!(
            self.write.is_some() || self.to.is_some() || self.stats.is_some(),
            "nothing says what to do with the frames; try: snifctl collect -w -, --to tap0 or --stats 10"
        );
        ensure_usage!(self.write.as_deref() != Some(""), "-w is empty; try: -w day.pcapng");
        ensure_usage!(
            self.filter.as_ref().is_none_or(|expression| !expression.trim().is_empty()),
            "--filter is empty; leave it out for every frame, or try: --filter 'tcp port 443'"
        );
        ensure_usage!(
            self.write.is_some() || (self.file_size, self.rotate_seconds, self.file_count) == (None, None, None),
            "-C, -G and -W are about the files of -w; try: -w day.pcapng -C 100"
        );
        if let Some(name) = self.to.as_ref().filter(|name| !tap::is_name(name)) {
            refuse!("--to {name:?} is no name of an interface; try: --to tap7");
        }
        let is_near = |address: &&IpAddr| matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
        if let Some(address) = self.listen.iter().find(is_near) {
            refuse!(
                "--listen {address} is an address of one link alone; try another one of the machine, or --listen ::"
            );
        }
        let udp = self.tunnels.iter().filter(|kind| port_of(**kind).is_some()).count();
        ensure_usage!(
            self.port.is_none() || udp == 1,
            "--port is that of one type of tunnel over UDP; try: --tunnel vxlan --port 8472"
        );
        ensure_usage!(
            !is_terminal(self.write.as_deref()),
            "-w - would write a capture to a terminal; try: snifctl collect -w - | tcpdump -n -r -"
        );
        self.plan().map_or(Ok(()), |plan| plan.check())
    }

    /// Is standard output for the capture?
    fn is_piped(&self) -> bool {
        self.write.as_deref() == Some("-")
    }
}

fn is_terminal(path: Option<&str>) -> bool {
    path == Some("-") && std::io::IsTerminal::is_terminal(&std::io::stdout())
}

pub(super) fn run(runner: &Runner, args: &CollectArgs) -> Result<ExitCode> {
    args.check()?;
    interrupt::serve(true, || ());
    let filter = args.filter.as_ref().map(|expression| Program::compile(runner, expression)).transpose()?;
    let ears = Ears { addresses: args.listen.clone(), kinds: args.tunnels.clone(), port: args.port };
    let tap = args.to.as_ref().map(|name| Tap::open(runner, name)).transpose()?;
    let mut receiver = Receiver::open(runner, &ears)?;
    let control = args.control.map(Control::open).transpose()?;
    if let Some(user) = &args.relinquish_privileges {
        become_user(user)?;
    }
    let mut flow = Flow::new(Sources::new(args.egress_id));
    flow.output = args.plan().map(|plan| Output::open(plan, now())).transpose()?;
    (flow.kinds, flow.filter, flow.tap, flow.left) = (args.tunnels.clone(), filter, tap, args.count);
    flow.dedup = args.dedup.map(|ms| Recent::new(ms * MILLISECOND));
    flow.by_capture = args.time == Time::Capture;
    if let Some(ms) = args.reorder {
        flow.reorder(ms * MILLISECOND);
    }
    eprintln!("snifctl: receiving");
    let done = serve(&mut receiver, &mut flow, args, control.as_ref());
    let done = drained(&mut receiver, &mut flow, done);
    let ended = match done {
        Ok(()) => flow.release(now(), true).and_then(|_| flow.output.as_mut().map_or(Ok(()), Output::finish)),
        Err(err) => Err(err),
    };
    flow.sources.dropped = receiver.dropped();
    summary(&flow, args)?;
    match ended {
        Err(err) if !err.is::<ReaderGone>() => Err(err),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// What had come when a signal did is still taken in, and is counted though it can no more be written.
fn drained(receiver: &mut Receiver, flow: &mut Flow, done: Result<()>) -> Result<()> {
    let Err(err) = done else { return drain(receiver, flow) };
    let output = flow.output.take();
    drain(receiver, flow)?;
    flow.output = output;
    Err(err)
}

fn drain(receiver: &mut Receiver, flow: &mut Flow) -> Result<()> {
    let (end, begin) = (now(), Instant::now());
    let mut has_more = interrupt::code().is_some();
    while has_more && begin.elapsed() < AT_MOST + DRAIN {
        has_more = false;
        receiver.receive(Duration::ZERO, |received| {
            let is_in_time = received.time <= end;
            has_more |= is_in_time;
            if is_in_time { flow.take(received) } else { Ok(true) }
        })?;
    }
    Ok(())
}

/// Until a signal comes, the reader goes, or there is enough.
fn serve(receiver: &mut Receiver, flow: &mut Flow, args: &CollectArgs, control: Option<&Control>) -> Result<()> {
    let every = args.stats.map(Duration::from_secs);
    let (mut flushed, mut shown) = (Instant::now(), Instant::now());
    // While frames wait for late ones, they are looked at more often.
    let patience = args.reorder.map_or(TICK, |ms| Duration::from_millis(ms.div_ceil(4)).min(TICK));
    let is_live = flow.tap.is_some() || flow.output.as_ref().is_some_and(Output::is_live);
    while interrupt::code().is_none() {
        if interrupt::is_reload()
            && let Some(output) = &mut flow.output
        {
            output.rotate(now())?;
        }
        let mut goes_on = true;
        let count = receiver.receive(patience, |received| {
            goes_on = flow.take(received)?;
            Ok(goes_on)
        })?;
        goes_on = goes_on && flow.release(now(), false)?;
        if count == 0 || flushed.elapsed() >= TICK || (is_live && !receiver.is_full()) {
            flow.flush()?;
            flushed = Instant::now();
            if let Some(control) = control {
                control.answer(|| {
                    flow.sources.dropped = receiver.dropped();
                    value(flow)
                });
            }
        } else if !is_live && !receiver.is_full() {
            // Nobody waits for these frames: fewer calls take more of them.
            std::thread::sleep(NAP);
        }
        if !goes_on {
            break;
        }
        if let Some(every) = every
            && shown.elapsed() >= every
        {
            shown += every;
            flow.sources.dropped = receiver.dropped();
            summary(flow, args)?;
        }
    }
    Ok(())
}

fn tell(text: &str, is_piped: bool) -> Result<()> {
    match is_piped {
        true => eprint!("{text}"),
        false => print(text)?,
    }
    Ok(())
}

fn summary(flow: &Flow, args: &CollectArgs) -> Result<()> {
    match args.json {
        true if args.is_piped() => eprintln!("{}", value(flow)),
        true => out::print(&value(flow))?,
        false => tell(&table(flow), args.is_piped())?,
    }
    Ok(())
}

fn value(flow: &Flow) -> Value {
    let mut malformed: BTreeMap<IpAddr, BTreeMap<&str, u64>> = BTreeMap::new();
    for (source, fault, count) in flow.sources.faults() {
        malformed.entry(source).or_default().insert(fault.name(), count);
    }
    let malformed: Vec<Value> =
        malformed.into_iter().map(|(source, faults)| json!({ "source": source, "faults": faults })).collect();
    json!({
        "streams": flow.sources.rows(),
        "malformed": malformed,
        "received": flow.sources.received(),
        "lost": flow.sources.lost(),
        "dropped": flow.sources.dropped,
        "unkept": flow.sources.unkept,
        "written": flow.output.as_ref().map(|output| output.frames),
        "sent": flow.tap.as_ref().map(|tap| tap.frames),
        "refused": flow.tap.as_ref().map(|tap| tap.refused),
    })
}

/// A row for each stream, then what else is to be known.
fn table(flow: &Flow) -> String {
    let head = ["source", "tunnel", "id", "tap", "direction", "received", "lost", "reordered", "doubled", "left out"];
    let rows = flow.sources.rows();
    let body = rows.iter().map(row);
    let all: Vec<Vec<String>> = [head.map(String::from).to_vec()].into_iter().chain(body).collect();
    let mut text = text::table(&all, &[2, 3, 5, 6, 7, 8, 9]);
    for (source, fault, count) in flow.sources.faults() {
        let what = if count == 1 { "packet that is no copy" } else { "packets that are no copies" };
        let _ = writeln!(text, "  {source} sent {count} {what}: {}", fault.meaning());
    }
    if flow.sources.dropped > 0 {
        let dropped = flow.sources.dropped;
        let _ = writeln!(text, "  {} dropped here: the socket's queue was full", were(dropped, "packet"));
    }
    if flow.sources.unkept > 0 {
        let unkept = were(flow.sources.unkept, "packet");
        let _ = writeln!(text, "  {unkept} left out, as there are too many sources");
    }
    if let Some(tap) = flow.tap.as_ref().filter(|tap| tap.refused > 0) {
        let _ = writeln!(text, "  {} refused by the tap device: is it up?", were(tap.refused, "frame"));
    }
    text
}

fn row(row: &Row) -> Vec<String> {
    let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".into());
    let number = |of: fn(&crate::collect::source::Numbers) -> u64| or_dash(row.numbers.map(|all| of(&all).to_string()));
    vec![
        row.source.to_string(),
        row.tunnel.into(),
        or_dash(row.id.map(|id| id.to_string())),
        or_dash(row.tap.map(|tap| tap.to_string())),
        row.direction.unwrap_or("-").into(),
        row.received.to_string(),
        number(|all| all.lost),
        number(|all| all.reordered),
        number(|all| all.doubled),
        (row.filtered + row.duplicates).to_string(),
    ]
}
