//! The text of `snifctl status`.

use std::cmp::Reverse;
use std::fmt::Write as _;
use std::time::Duration;

use crate::datapath::reason::Reason;
use crate::output::units::{bit_rate, bytes, duration, grouped, nanoseconds, packets, rate};
use crate::request::{Options, Said, Values};
use crate::session::ages::Times;
use crate::session::health::{Grade, Health};
use crate::session::stats::{Class, Rise, Session, Status, TapStatus};
use crate::usage::spelled;

/// How it is to look.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct View {
    /// Every option, what reasons mean, and the histograms.
    pub verbose: bool,
    /// Every tap and remote, however many there are.
    pub all: bool,
    pub color: bool,
    /// Columns that there are; `None`: any number.
    pub width: Option<usize>,
}

/// So many taps, or remotes, are shown; of more the worst.
const MANY: usize = 20;
/// How many faults are shown one by one.
const FAULTS: usize = 8;
/// A name is not made shorter than that.
const SHORTEST: usize = 12;

/// A column of a table.
#[derive(Clone, Copy)]
struct Column {
    head: &'static str,
    is_right: bool,
    /// Where there is no room for all, those with the largest go first; 0 stays.
    rank: u8,
}

const fn left(head: &'static str) -> Column {
    Column { head, is_right: false, rank: 0 }
}

const fn right(head: &'static str, rank: u8) -> Column {
    Column { head, is_right: true, rank }
}

/// A line of a table, and what is wrong with it.
struct Row {
    cells: Vec<String>,
    health: Health,
    why: Option<String>,
    dropped: u64,
}

/// As an ANSI colour.
fn color(health: Health) -> u8 {
    match health.grade() {
        Grade::Good => 32,
        Grade::Doubtful => 33,
        Grade::Bad => 31,
    }
}

fn painted(text: &str, color: u8) -> String {
    format!("\u{1b}[{color}m{text}\u{1b}[0m")
}

/// A name in so many columns: its end tells more than its middle.
pub(crate) fn shortened(name: &str, columns: usize) -> String {
    let length = name.chars().count();
    if length <= columns {
        return name.into();
    }
    let (first, last) = (columns / 2, columns.saturating_sub(columns / 2 + 1));
    if columns == 0 {
        return String::new();
    }
    let head: String = name.chars().take(first).collect();
    let tail: String = name.chars().skip(length - last).collect();
    format!("{head}…{tail}")
}

/// Which columns there is room for, and how wide the first may be.
fn fitting(columns: &[Column], rows: &[Row], width: Option<usize>) -> (Vec<usize>, Vec<usize>) {
    let widest = |at: usize| {
        let cells = rows.iter().map(|row| row.cells[at].chars().count());
        cells.max().unwrap_or(0).max(columns[at].head.chars().count())
    };
    let mut kept: Vec<usize> = (0..columns.len()).collect();
    let mut widths: Vec<usize> = kept.iter().map(|at| widest(*at)).collect();
    let Some(room) = width else { return (kept, widths) };
    let taken = |kept: &[usize], widths: &[usize]| kept.iter().map(|at| widths[*at] + 2).sum::<usize>();
    while taken(&kept, &widths) > room {
        let Some(place) =
            (0..kept.len()).filter(|at| columns[kept[*at]].rank > 0).max_by_key(|at| columns[kept[*at]].rank)
        else {
            break;
        };
        kept.remove(place);
    }
    let over = taken(&kept, &widths).saturating_sub(room);
    widths[0] = widths[0].saturating_sub(over).max(SHORTEST.min(widths[0]));
    (kept, widths)
}

fn table(columns: &[Column], health: usize, rows: &[Row], view: View) -> String {
    let (kept, widths) = fitting(columns, rows, view.width);
    let mut text = String::new();
    let mut line = |cells: &dyn Fn(usize) -> String, paint: &dyn Fn(usize) -> Option<u8>| {
        let mut out = String::new();
        for at in &kept {
            let (width, cell) = (widths[*at], cells(*at));
            let cell = if *at == 0 { shortened(&cell, width) } else { cell };
            let cell = if columns[*at].is_right { format!("{cell:>width$}") } else { format!("{cell:<width$}") };
            let trimmed = cell.trim_end().len();
            let cell = match paint(*at).filter(|_| view.color) {
                Some(color) => painted(&cell[..trimmed], color) + &cell[trimmed..],
                None => cell,
            };
            let _ = write!(out, "  {cell}");
        }
        let _ = writeln!(text, "{}", out.trim_end());
        text.len()
    };
    line(&|at| columns[at].head.into(), &|_| None);
    let last = columns.len() - 1;
    let mut shown = Vec::new();
    for row in rows {
        let paint = |at: usize| match at {
            _ if at == health => Some(color(row.health)),
            _ if at == last && row.dropped > 0 => Some(31),
            _ => None,
        };
        shown.push((line(&|at| row.cells[at].clone(), &paint), row.why.as_ref()));
    }
    // From the end, so that places stay what they are.
    for (place, why) in shown.into_iter().rev() {
        if let Some(why) = why {
            text.insert_str(place, &format!("      {why}\n"));
        }
    }
    text
}

/// The worst first where some are not well; of many, so many.
fn worst(rows: &mut Vec<Row>, all: bool) -> Vec<Row> {
    rows.sort_by_key(|row| Reverse((row.health, row.health != Health::Ok && row.dropped > 0)));
    if all || rows.len() <= MANY {
        return Vec::new();
    }
    let well = rows.partition_point(|row| row.health != Health::Ok);
    rows[well..].sort_by_key(|row| Reverse(row.dropped));
    rows.split_off(MANY)
}

/// `and 180 more: 178 ok, 2 gone`.
fn more(rest: &[Row]) -> String {
    if rest.is_empty() {
        return String::new();
    }
    let mut kinds: Vec<Health> = rest.iter().map(|row| row.health).collect();
    kinds.dedup();
    let count = |kind: &Health| format!("{} {}", rest.iter().filter(|row| row.health == *kind).count(), kind.word());
    let kinds: Vec<String> = kinds.iter().map(count).collect();
    format!("  and {} more: {}; all of them with: snifctl status --all\n", grouped(rest.len() as u64), kinds.join(", "))
}

/// The tables of `snifctl status`.
pub(crate) fn status(status: &Status, view: View) -> String {
    if status.sessions.is_empty() {
        return "no session is up; start one with: snifctl up IFACE --tunnel gre --remote ADDR\n".into();
    }
    let mut text = status.sessions.iter().map(|at| session(at, view)).collect::<Vec<_>>().join("\n");
    if let Some(machine) = status.machine.filter(|at| at.dropped > 0) {
        let _ = writeln!(
            text,
            "\nmachine: softnet has dropped {} packets meanwhile, {} since boot, before any tap",
            grouped(machine.dropped),
            grouped(machine.since_boot)
        );
    }
    text
}

fn session(session: &Session, view: View) -> String {
    let mut text = format!("{}: {}\n{}", session.name, headline(session), ages(session));
    if let Some(filter) = &session.filter {
        let _ = writeln!(text, "  filter: {}", filter.split_whitespace().collect::<Vec<_>>().join(" "));
    }
    let options = options(session);
    if !options.is_empty() {
        let _ = writeln!(text, "  options: {options}");
    }
    if view.verbose {
        text += &whole_request(session);
    }
    if session.request.is_some() {
        text += &taps(session, view);
        text += &remotes(session, view);
    }
    if !session.found.is_empty() {
        let _ = writeln!(text, "  there is: {}", session.found.join(", "));
    }
    text += &drops(session, view);
    text += &forms(session);
    if view.verbose {
        text += &histogram("sizes of copies", session.sizes.as_deref().unwrap_or_default(), bytes);
    }
    text += &times(session, view);
    if session.out_dropped > 0 {
        let _ = writeln!(
            text,
            "  behind us: {} packets dropped by out interfaces, of all that they send",
            grouped(session.out_dropped)
        );
    }
    for fault in session.faults.iter().take(FAULTS) {
        let _ = writeln!(text, "  fault: {fault}");
    }
    let more = session.faults.len().saturating_sub(FAULTS);
    if more > 0 {
        let _ = writeln!(text, "  fault: {more} more");
    }
    if let Some(fix) = session.fix.as_ref().filter(|_| !session.faults.is_empty()) {
        let _ = writeln!(text, "  put it right with: {fix}");
    }
    for ahead in session.ahead.iter().take(FAULTS) {
        let _ = writeln!(text, "  before us: {}", ahead.warning());
    }
    for obstacle in &session.obstacles {
        let _ = writeln!(text, "  relay: {obstacle} can drop copies; let them pass with:\n    {}", obstacle.fix());
    }
    text
}

/// What tells sessions apart.
fn headline(session: &Session) -> String {
    session.request.as_ref().map_or_else(|| "cannot be read".into(), |request| tunnel(&request.options))
}

/// The same with all options that were given.
pub(crate) fn about(session: &Session) -> String {
    let given = options(session);
    format!("{}{}{given}", headline(session), if given.is_empty() { "" } else { ", " })
}

/// The tunnel of a session, and what becomes of its copies.
pub(crate) fn tunnel(options: &Options) -> String {
    let tunnel = &options.tunnel;
    let mut text = spelled(tunnel.kind);
    let mut add = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            let _ = write!(text, " {name} {value}");
        }
    };
    add("id", tunnel.id.map(|id| id.to_string()));
    add("egress-id", tunnel.egress_id.map(|id| id.to_string()));
    add("port", tunnel.port.map(|port| port.to_string()));
    let _ = write!(text, ", oversize {}", spelled(options.oversize));
    if options.remotes.len() > 1 {
        let _ = write!(text, ", spread {}", spelled(options.spread));
    }
    let one_of = |flag: &str, n: u32| (n > 1).then(|| format!(", {flag} 1/{n}"));
    let choices = [
        one_of("sample", options.sample.0),
        one_of("sample-flows", options.sample_flows.0),
        options.snaplen.map(|bytes| format!(", snaplen {bytes}")),
        options.max_rate.as_ref().map(|rate| format!(", max-rate {rate}")),
    ];
    text + &choices.into_iter().flatten().collect::<String>()
}

/// How long it is up, and what was last changed of it.
fn ages(session: &Session) -> String {
    let Some(times) = session.times_of else { return String::new() };
    let age = |at| duration(Times::age(at).as_secs());
    // Its making takes a moment.
    let is_later = times.changed.duration_since(times.made).is_ok_and(|time| time > BEGINNING);
    let changed = if is_later { format!(", changed {} ago", age(times.changed)) } else { String::new() };
    format!("  up {}{changed}\n", age(times.made))
}

/// What is written so soon belongs to the making of a session.
const BEGINNING: Duration = Duration::from_secs(2);

/// Options that the headline does not have, where they were given.
fn options(session: &Session) -> String {
    const ELSEWHERE: [&str; 13] = [
        "--tunnel",
        "--remote",
        "--name",
        "--id",
        "--egress-id",
        "--port",
        "--oversize",
        "--spread",
        "--filter",
        "--sample",
        "--sample-flows",
        "--snaplen",
        "--max-rate",
    ];
    let flags = session.request.iter().flat_map(|request| request.flags());
    let given = flags.filter(|(flag, _)| !ELSEWHERE.contains(flag)).filter_map(|(flag, values)| {
        let name = flag.trim_start_matches('-');
        match values {
            Values::Switch(true) => Some(name.to_string()),
            Values::Some(values, Said::Needed) if !values.is_empty() => Some(format!("{name} {}", values.join(","))),
            _ => None,
        }
    });
    given.collect::<Vec<_>>().join(", ")
}

/// The request, one option a line, and the command that makes it.
fn whole_request(session: &Session) -> String {
    let (Some(request), Some(command)) = (&session.request, &session.command) else { return String::new() };
    let rows: Vec<Vec<String>> = request.told().into_iter().map(|(name, value)| vec![name, value]).collect();
    format!("  command: {command}\n{}", super::text::table(&rows, &[]))
}

/// A tap's name, and the pattern that it is watched by.
fn named(tap: &TapStatus) -> String {
    let by = tap.pattern.as_ref().map_or_else(String::new, |pattern| format!(" ({pattern})"));
    format!("{}{by}", tap.interface)
}

fn taps(session: &Session, view: View) -> String {
    let has_rates = session.taps.iter().any(|tap| tap.rise.is_some());
    let left_out = |tap: &TapStatus| tap.counts.choice.filtered + tap.counts.choice.skipped;
    let chooses = session.filter.is_some() || session.sample > Some(1) || session.sample_flows > Some(1);
    let chooses = !has_rates && (chooses || session.taps.iter().any(|tap| left_out(tap) > 0));
    let mut columns = vec![left("TAP"), left("DIRECTION"), left("HEALTH")];
    columns.extend(match has_rates {
        true => [right("SEEN/s", 1), right("COPIES/s", 0), right("BITS/s", 2), right("DROPS/s", 0)],
        false => [right("SEEN", 1), right("COPIES", 0), right("BYTES", 3), right("DROPS", 0)],
    });
    if chooses {
        columns.insert(4, right("LEFT OUT", 2));
    }
    let mut rows: Vec<Row> = Vec::new();
    for tap in &session.taps {
        let mut cells = vec![named(tap), tap.direction.into(), tap.health.word().into()];
        match &tap.rise {
            Some(rise) => cells.extend(rates(rise, true)),
            None => {
                let (choice, stat) = (&tap.counts.choice, &tap.counts.stat);
                cells.push(packets(choice.seen));
                cells.extend(chooses.then(|| packets(left_out(tap))));
                cells.extend([packets(stat.pcnt), bytes(stat.bcnt), packets(stat.dcnt)]);
            }
        }
        rows.push(row(cells, tap.health, tap.why.clone(), tap.rise.as_ref(), tap.counts.stat.dcnt));
    }
    for at in &session.waiting {
        let mut cells = vec![at.interface.clone(), spelled(at.direction), Health::Waiting.word().into()];
        cells.resize(columns.len(), "-".into());
        rows.push(row(cells, Health::Waiting, None, None, 0));
    }
    let rest = worst(&mut rows, view.all);
    table(&columns, 2, &rows, view) + &more(&rest)
}

fn row(cells: Vec<String>, health: Health, why: Option<String>, rise: Option<&Rise>, dropped: u64) -> Row {
    Row { cells, health, why, dropped: rise.map_or(dropped, |rise| rise.dropped) }
}

/// Of a tap with what it sees.
fn rates(rise: &Rise, sees: bool) -> Vec<String> {
    let seen = sees.then(|| rate(rise.per_second(rise.seen)));
    let [copies, dropped] = [rise.copies, rise.dropped].map(|count| rate(rise.per_second(count)));
    seen.into_iter().chain([copies, bit_rate(rise.per_second(rise.bytes)), dropped]).collect()
}

fn remotes(session: &Session, view: View) -> String {
    let has_rates = session.remotes.iter().any(|remote| remote.rise.is_some());
    let mut columns = vec![left("REMOTE"), left("OUT"), right("MTU", 3), left("HEALTH")];
    columns.extend(match has_rates {
        true => [right("SENT/s", 0), right("BITS/s", 2), right("DROPS/s", 0)],
        false => [right("SENT", 0), right("BYTES", 2), right("DROPS", 0)],
    });
    let mut rows: Vec<Row> = Vec::new();
    for remote in &session.remotes {
        let out = remote.interface.clone().unwrap_or_else(|| "-".into());
        let mut cells = vec![remote.address.to_string(), out, remote.mtu.to_string(), remote.health.word().into()];
        match &remote.rise {
            Some(rise) => cells.extend(rates(rise, false)),
            None => {
                let stat = &remote.stat;
                cells.extend([packets(stat.pcnt), bytes(stat.bcnt), packets(stat.dcnt)]);
            }
        }
        rows.push(row(cells, remote.health, remote.why.clone(), remote.rise.as_ref(), remote.stat.dcnt));
    }
    let rest = worst(&mut rows, view.all);
    table(&columns, 3, &rows, view) + &more(&rest)
}

fn drops(session: &Session, view: View) -> String {
    let count = |reason: Reason| session.drops.get(reason.name()).copied().unwrap_or_default();
    let lost: Vec<Reason> = Reason::ALL.into_iter().filter(|reason| count(*reason) > 0).collect();
    let told: Vec<String> =
        lost.iter().map(|reason| format!("{} {}", reason.name(), grouped(count(*reason)))).collect();
    let told = if told.is_empty() { "none".into() } else { told.join(", ") };
    let told = if view.color && !lost.is_empty() { painted(&told, 31) } else { told };
    let mut text = format!("  drops: {told}\n");
    for reason in lost.into_iter().filter(|_| view.verbose) {
        let _ = writeln!(text, "    {}: {}; {}", reason.name(), reason.happened(), reason.remedy());
    }
    text
}

/// What copies were like, if there is anything to say of it.
fn forms(session: &Session) -> String {
    let at = &session.forms;
    let parts = [
        (at.vlan, format!("{} with a VLAN tag", packets(at.vlan))),
        (at.super_packets, format!("{} super-packets of {} frames", packets(at.super_packets), packets(at.segments))),
        (at.truncated, format!("{} truncated", packets(at.truncated))),
        (at.fragmented, format!("{} in {} fragments", packets(at.fragmented), packets(at.fragments))),
    ];
    let told: Vec<String> = parts.into_iter().filter(|(count, _)| *count > 0).map(|(_, told)| told).collect();
    if told.is_empty() { String::new() } else { format!("  of the copies: {}\n", told.join(", ")) }
}

/// The longest bar.
const BAR: u64 = 30;

fn histogram(title: &str, classes: &[Class], shown: fn(u64) -> String) -> String {
    let most = classes.iter().map(|class| class.count).max().unwrap_or(0);
    if most == 0 {
        return String::new();
    }
    let bar = |count: u64| "█".repeat((count * BAR).div_ceil(most) as usize);
    let line = |class: &Class| {
        format!("    up to {:>8}  {:>9}  {}\n", shown(class.up_to), packets(class.count), bar(class.count))
    };
    format!("  {title}:\n{}", classes.iter().map(line).collect::<String>())
}

fn times(session: &Session, view: View) -> String {
    let Some(classes) = session.times.as_deref().filter(|classes| !classes.is_empty()) else { return String::new() };
    let (calls, sum) = classes.iter().fold((0, 0), |(calls, sum), class| (calls + class.count, sum + class.sum));
    let within = |percent: u64| {
        let mut left = (calls * percent).div_ceil(100);
        let found = classes.iter().find(|class| {
            let is_it = class.count >= left;
            left = left.saturating_sub(class.count);
            is_it
        });
        nanoseconds(found.map_or(0, |class| class.up_to))
    };
    let mean = nanoseconds(sum / calls.max(1));
    let line = format!("  time in taps: {mean} a packet; 50 % within {}, 99 % within {}\n", within(50), within(99));
    line + &if view.verbose { histogram("of these", classes, nanoseconds) } else { String::new() }
}
