//! `verify`: the law over both machines: what is copied is sent or dropped here, and what is sent has arrived or is lost.

use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};
use std::io::{ErrorKind, Read as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use serde_json::json;

use crate::cli::VerifyArgs;
use crate::collect::control;
use crate::datapath::parts::Map;
use crate::output::units::{duration, grouped};
use crate::output::{json, text};
use crate::session::ages::Times;
use crate::session::counted::{self, Counted, Known};
use crate::session::delivered::{self, Arrived, Both, Delivered, Numbers, Sender, Sent, Unclear};
use crate::session::engine::{Context, Open};
use crate::session::law::{self, Look};
use crate::session::rivals::{self, Copies};
use crate::session::there::{self, Rows};
use crate::tools::exec::print;
use crate::tools::interrupt;
use crate::usage::spelled;

/// So long copies may be on their way.
const SETTLE: Duration = Duration::from_secs(2);
/// So often the collector is asked meanwhile.
const AGAIN: Duration = Duration::from_millis(50);
/// So long its whole answer may take, and so often signals are looked for.
const ANSWER_TIME: Duration = Duration::from_secs(5);
const STEP: Duration = Duration::from_millis(200);
/// An answer of 16,384 streams is shorter.
const MOST_BYTES: u64 = 32 << 20;
/// Two clocks that measure the same time may differ by so many seconds.
const CLOCKS: f64 = 0.05;

pub(super) fn run(context: &Context, args: &VerifyArgs) -> Result<ExitCode> {
    let end = End::find(context, args)?;
    let first = args.interval.map(|interval| {
        let first = end.look(context, None)?;
        interrupt::wait(interval)?;
        Ok::<_, anyhow::Error>(first)
    });
    let first = first.transpose()?;
    let second = end.look(context, first.as_ref().map(|first| &first.both))?;
    // Before a pin's time and its session there may be some milliseconds.
    let arrived = &second.both.arrived;
    let age = end.age.as_secs_f64() + second.took.as_secs_f64();
    let heard_all = arrived.seconds + CLOCKS > age;
    let both = first.as_ref().map(|first| &first.both);
    let delivered = match end.is_single && arrived.goes_on(&end.sender, age + CLOCKS) {
        true => Err(Unclear::GoesOn),
        false => delivered::delivered(&end.sender, both, &second.both, heard_all),
    };
    let delivered = delivered.map_err(|why| end.unclear(why, arrived))?;
    let report = Report { end: &end, first: first.as_ref(), second: &second, delivered: &delivered };
    match args.json.json {
        true => json::print(&report.value())?,
        false => print(&report.text())?,
    }
    let is_whole = delivered.lost == 0 && delivered.dropped == 0 && second.faults.is_empty();
    Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What is asked about.
struct End {
    name: String,
    remote: IpAddr,
    slot: u32,
    control: SocketAddr,
    sender: Sender,
    /// Are numbers those of each tap, or of all together?
    by_taps: bool,
    is_numbered: bool,
    /// Is there one look only?
    is_single: bool,
    /// Interface and direction, by tap slot.
    taps: BTreeMap<u32, (String, &'static str)>,
    /// Since the session was made, when it was looked up.
    age: Duration,
    found: Instant,
}

/// A look at both ends.
struct Looked {
    both: Both,
    /// What does not add up in the session's counters before and after.
    faults: Vec<String>,
    counted: Counted,
    /// Since the session was looked up.
    took: Duration,
}

impl End {
    fn find(context: &Context, args: &VerifyArgs) -> Result<End> {
        let open = Open::to_read(context)?;
        let name = open.chosen(args.name.as_deref())?;
        let there = open.read_counters(&name)?;
        let Ok(stored) = &there.stored else {
            bail!("session {name} cannot be read; see: snifctl status --name {name}");
        };
        let Some(slot) = stored.remotes.get(&args.remote).copied() else {
            let all: Vec<String> = stored.remotes.keys().map(ToString::to_string).collect();
            bail!("--remote {} is no remote of session {name}; try: --remote {}", args.remote, all.join(" or "));
        };
        let source = there.remote_row(slot).map(|row| row.addresses().0).filter(|source| !source.is_unspecified());
        let Some(source) = source else {
            bail!("--remote {} has no route, so nothing is sent there; see: snifctl status --name {name}", args.remote);
        };
        let tunnel = &stored.request.options.tunnel;
        ensure_alone(&open, &name, &Copies { tunnel: *tunnel, source, remote: args.remote })?;
        let slots = stored.interfaces.iter().flat_map(|(interface, place)| {
            let shown = there.link(place.ifindex).map_or(interface, |link| &link.ifname).clone();
            place.watch.directions().iter().map(move |at| (place.slot(*at), (shown.clone(), at.hook())))
        });
        let sender = Sender { source, tunnel: spelled(tunnel.kind), ids: tunnel.known_by().into() };
        Ok(End {
            remote: args.remote,
            slot,
            control: args.control.map_or_else(|| SocketAddr::new(args.remote, control::PORT), |place| place.0),
            sender,
            by_taps: tunnel.tell,
            is_numbered: tunnel.is_numbered(),
            is_single: args.interval.is_none(),
            taps: slots.collect(),
            age: Times::of(&there.dir).map(|times| Times::age(times.made)).unwrap_or_default(),
            found: Instant::now(),
            name,
        })
    }

    /// Looks here, there and here again; there until all that was sent before has come, or time is up.
    fn look(&self, context: &Context, first: Option<&Both>) -> Result<Looked> {
        let open = Open::to_read(context)?;
        let (before, counted) = self.sent(&open)?;
        let begin = Instant::now();
        let arrived = loop {
            let arrived = self.ask()?;
            if delivered::is_settled(&self.sender, first, &before, &arrived) || begin.elapsed() > SETTLE {
                break arrived;
            }
            interrupt::wait(AGAIN)?;
        };
        let took = self.found.elapsed();
        let (after, later) = self.sent(&open)?;
        let again = || Ok(Look::from(&counted::counted(&open, &self.name, &mut Known::default())?));
        let faults = law::lasting_faults(&Look::from(&counted), &Look::from(&later), again)?;
        Ok(Looked { both: Both { before, arrived, after }, faults, counted: later, took })
    }

    fn sent(&self, open: &Open) -> Result<(Sent, Counted)> {
        let counted = counted::counted(open, &self.name, &mut Known::default())?;
        let Some(remote) = counted.remotes.iter().find(|remote| remote.address == self.remote) else {
            bail!("--remote {} has been removed meanwhile", self.remote);
        };
        let stat = remote.stat;
        let dir = open.home.session(&self.name);
        let numbers = match (self.by_taps, self.is_numbered) {
            (true, _) => {
                let rows = there::own_rows(open.runner, &dir, &[Map::Sequences, Map::SequencesFar])?;
                Numbers::OfTaps(self.of_taps(rows.values()))
            }
            (false, true) => {
                let rows = there::own_rows(open.runner, &dir, &[Map::RemoteState])?;
                let value = rows.values().find_map(|rows| rows.get(&self.slot.to_ne_bytes()[..])?.first());
                Numbers::OfRemote(value.and_then(|value| word(value, 1)).unwrap_or(0))
            }
            (false, false) => Numbers::None,
        };
        Ok((Sent { stat, numbers }, counted))
    }

    /// Of taps that have sent something, and of those that there are.
    fn of_taps<'a>(&self, rows: impl Iterator<Item = &'a Rows>) -> BTreeMap<u32, u32> {
        let next = rows
            .flatten()
            .filter_map(|(key, values)| Some((word(key, 0)?, word(values.first()?, self.slot as usize)?)));
        next.filter(|(slot, next)| *next > 0 || self.taps.contains_key(slot)).collect()
    }

    fn ask(&self) -> Result<Arrived> {
        let at = self.control;
        let (until, start) =
            (Instant::now() + ANSWER_TIME, format!("snifctl collect --control {} -w day.pcapng", at.ip()));
        let nobody = |err: &dyn Display| anyhow!("no collector answers at {at} ({err}); start one there: {start}");
        let stream = TcpStream::connect_timeout(&at, ANSWER_TIME).map_err(|err| nobody(&err))?;
        let text = read(stream, until).map_err(|err| if interrupt::is_cause(&err) { err } else { nobody(&err) })?;
        let Some(text) = text else {
            bail!(
                "--control {at} accepted and did not answer within {} s, so it is no collector, or one that stands still; \
                 start one there: {start}",
                ANSWER_TIME.as_secs()
            );
        };
        let arrived: Arrived = serde_json::from_str(&text).map_err(|_| {
            anyhow!("--control {at} does not answer as a collector of snifctl does; see there: snifctl collect --help")
        })?;
        // What it has heard of sessions before this one says nothing. Between two looks it counts in both.
        let age = (self.age + self.found.elapsed()).as_secs_f64();
        Ok(if self.is_single { arrived.without_ended(age + CLOCKS) } else { arrived })
    }

    fn unclear(&self, why: Unclear, arrived: &Arrived) -> anyhow::Error {
        let End { name, remote, .. } = self;
        let again = format!("try: snifctl verify --name {name} --remote {remote} --interval 10s");
        match why {
            Unclear::BegunLater => anyhow!(
                "the collector has been receiving for {}, less than the session sends, and copies have no numbers to tell \
                 what came before; {again}",
                duration(arrived.seconds as u64)
            ),
            Unclear::Silent => anyhow!(
                "the collector has heard nothing of the session in the {} since it began to receive; {again}",
                duration(arrived.seconds as u64)
            ),
            Unclear::GoesOn => anyhow!(
                "the collector counts on from a session before this one, whose copies it cannot tell apart; {again}"
            ),
            Unclear::More => anyhow!(
                "the collector has more copies than this session has sent: another one sent to it before; {again}"
            ),
            Unclear::Apart => anyhow!(
                "the collector takes the two ids of the session for two senders; start it with: --egress-id {}",
                self.sender.ids.last().copied().flatten().unwrap_or_default()
            ),
        }
    }
}

/// No other session's copies are taken for these. Those that tell their taps are told from those that do not.
fn ensure_alone(open: &Open, name: &str, copies: &Copies) -> Result<()> {
    let rivals = rivals::of(open, name, std::slice::from_ref(copies))?;
    let in_the_way = rivals.iter().find(|rival| rival.is_numbered || !copies.tunnel.tell);
    in_the_way.map_or(Ok(()), |rival| bail!(rival.refusal(name)))
}

/// What somebody says until they hang up; `None` where time is up before.
fn read(stream: TcpStream, until: Instant) -> Result<Option<String>> {
    let (mut stream, mut text, mut piece) = (stream.take(MOST_BYTES), Vec::new(), vec![0; 1 << 16]);
    loop {
        interrupt::check()?;
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        stream.get_ref().set_read_timeout(Some(left.min(STEP)))?;
        match stream.read(&mut piece) {
            Ok(0) => return Ok(Some(String::from_utf8_lossy(&text).into_owned())),
            Ok(n) => text.extend_from_slice(&piece[..n]),
            Err(err) if matches!(err.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {}
            Err(err) => return Err(err.into()),
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(4 * at..4 * at + 4)?;
    bytes.try_into().ok().map(u32::from_ne_bytes)
}

/// What is told.
struct Report<'a> {
    end: &'a End,
    first: Option<&'a Looked>,
    second: &'a Looked,
    delivered: &'a Delivered,
}

impl Report<'_> {
    /// Of a counter, since the first look.
    fn risen(&self, of: fn(&Looked) -> u64) -> u64 {
        of(self.second).saturating_sub(self.first.map_or(0, of))
    }

    /// Why copies were dropped, of the whole session.
    fn reasons(&self) -> BTreeMap<&str, u64> {
        let before = |reason: &str| self.first.and_then(|first| first.counted.drops.get(reason)).copied().unwrap_or(0);
        let drops = self.second.counted.drops.iter();
        drops.map(|(reason, n)| (reason.as_str(), n.saturating_sub(before(reason)))).filter(|(_, n)| *n > 0).collect()
    }

    fn value(&self) -> serde_json::Value {
        let Delivered { is_numbered, tallies, dropped, sent, received, lost, open } = self.delivered;
        let taps = tallies.iter().filter_map(|tally| {
            let (interface, direction) = self.tap(tally.slot?);
            let (sent, received, lost) = (tally.sent, tally.received, tally.lost);
            Some(json!({ "interface": interface, "direction": direction, "sent": sent, "received": received, "lost": lost }))
        });
        json!({
            "session": self.end.name,
            "remote": self.end.remote,
            "source": self.end.sender.source,
            "tunnel": self.end.sender.tunnel,
            "numbered": is_numbered,
            "taps": taps.collect::<Vec<_>>(),
            "copied": sent + dropped,
            "sent": sent,
            "dropped": dropped,
            "drops": self.reasons(),
            "received": received,
            "lost": lost,
            "open": open,
            "out_dropped": self.risen(|look| look.counted.out_dropped),
            "collector_dropped": self.risen(|look| look.both.arrived.dropped),
            "faults": self.second.faults,
        })
    }

    fn tap(&self, slot: u32) -> (&str, &'static str) {
        match self.end.taps.get(&slot) {
            Some((interface, direction)) => (interface, direction),
            None => ("-", if slot.is_multiple_of(2) { "ingress" } else { "egress" }),
        }
    }

    fn text(&self) -> String {
        let End { name, remote, sender, .. } = self.end;
        let mut text = format!("{name} to {remote}: {} from {}\n", sender.tunnel, sender.source);
        if self.delivered.tallies.iter().any(|tally| tally.slot.is_some()) {
            text += &self.table();
        }
        text += &self.law();
        self.second.faults.iter().for_each(|fault| text += &format!("  {fault}\n"));
        text
    }

    fn table(&self) -> String {
        let head = ["tap", "direction", "numbered", "received", "missing"].map(String::from).to_vec();
        let row = |tally: &delivered::Tally| {
            let (interface, direction) = self.tap(tally.slot?);
            let counts = [tally.sent, tally.received, tally.lost].map(grouped);
            Some([interface.to_string(), direction.into()].into_iter().chain(counts).collect::<Vec<String>>())
        };
        let rows: Vec<Vec<String>> = [head].into_iter().chain(self.delivered.tallies.iter().filter_map(row)).collect();
        text::table(&rows, &[2, 3, 4])
    }

    /// copied = sent + dropped, sent = received + lost, and where.
    fn law(&self) -> String {
        let Delivered { dropped, sent, received, lost, open, .. } = *self.delivered;
        let [copied, shown, arrived] = [sent + dropped, sent, received].map(grouped);
        let mut text = format!("  {copied} copied = {shown} sent + {} dropped here", grouped(dropped));
        let reasons = self.reasons();
        if dropped > 0 && !reasons.is_empty() {
            let all: Vec<String> = reasons.iter().map(|(reason, n)| format!("{reason} {}", grouped(*n))).collect();
            let _ = write!(text, " (of the whole session: {})", all.join(", "));
        }
        let _ = write!(text, "\n  {shown} sent = {arrived} received + {} lost", grouped(lost));
        if open > 0 {
            let _ = write!(text, " + {} on their way or lost: copies have no numbers", grouped(open));
        }
        text.push('\n');
        if received == 0 && lost + open > 0 {
            let (tunnel, remote) = (&self.end.sender.tunnel, self.end.remote);
            let _ = writeln!(
                text,
                "  none has come: collect there must have --tunnel {tunnel} and --listen {remote}, or neither"
            );
        }
        let out = self.risen(|look| look.counted.out_dropped);
        let queue = self.risen(|look| look.both.arrived.dropped);
        if lost + open > 0 || out + queue > 0 {
            let [out, queue] = [out, queue].map(grouped);
            let _ = writeln!(
                text,
                "  of all senders: {out} dropped by out interfaces here, {queue} by the collector's queue"
            );
        }
        text
    }
}
