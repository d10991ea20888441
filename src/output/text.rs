//! From typed answers to text for a person. JSON is the types' own.

use std::fmt::Write as _;

use crate::commands::capture::Verdict;
use crate::commands::doctor::{Check, Level};
use crate::datapath::abi::{Stat, remote_flag};
use crate::request::spelled;
use crate::session::make;
use crate::session::read::{Map, RemoteStatus, Session, Status, TapStatus};

/// Rows of cells as aligned columns, two spaces apart; cells of columns named in `right` end flush.
fn table(rows: &[Vec<String>], right: &[usize]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().enumerate().map(|(at, cell)| match right.contains(&at) {
            true => format!("{cell:>width$}", width = widths[at]),
            false => format!("{cell:<width$}", width = widths[at]),
        });
        let _ = writeln!(text, "  {}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    text
}

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(String::from).to_vec()
}

/// 1234567 as `1,234,567`.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes with a binary unit and three figures.
fn bytes(n: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let (mut value, mut unit) = (n as f64, 0);
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{n} B"),
        _ if value < 9.995 => format!("{value:.2} {}", units[unit]),
        _ if value < 99.95 => format!("{value:.1} {}", units[unit]),
        _ => format!("{value:.0} {}", units[unit]),
    }
}

/// The tables of `snifctl status`.
pub fn status(status: &Status) -> String {
    if status.sessions.is_empty() {
        return "no session is up; start one with: snifctl up IFACE --tunnel gre --remote ADDR\n".into();
    }
    status.sessions.iter().map(session).collect::<Vec<_>>().join("\n")
}

fn session(session: &Session) -> String {
    let mut text = format!("{}: {}, oversize {}", session.name, spelled(session.tunnel), spelled(session.oversize));
    if session.remotes.len() > 1 {
        let _ = write!(text, ", spread {}", spelled(session.spread));
    }
    text += &choices(session);
    text.push('\n');
    if let Some(filter) = &session.filter {
        let _ = writeln!(text, "  filter: {}", filter.split_whitespace().collect::<Vec<_>>().join(" "));
    }
    text += &taps(session);
    text += &remotes(&session.remotes);
    let lost = session.drops.iter().filter(|(_, count)| **count > 0);
    let lost: Vec<String> = lost.map(|(reason, count)| format!("{reason} {}", grouped(*count))).collect();
    text += &format!("  drops: {}\n", if lost.is_empty() { "none".into() } else { lost.join(", ") });
    if session.out_dropped > 0 {
        let _ = writeln!(
            text,
            "  behind us: {} packets dropped by out interfaces, of all that they send",
            grouped(session.out_dropped)
        );
    }
    if !session.faults.is_empty() {
        let fix = make::command(&session.memory.plan);
        let _ = writeln!(text, "  relay: {}; put it right with:\n    {fix}", session.faults.join(", "));
    }
    session.obstacles.iter().for_each(|obstacle| {
        let _ = writeln!(text, "  relay: {obstacle} can drop copies; let them pass with:\n    {}", obstacle.fix());
    });
    text
}

/// The options that leave packets, or parts of them, out.
fn choices(session: &Session) -> String {
    let one_of = |flag: &str, n: u32| (n > 1).then(|| format!(", {flag} 1/{n}"));
    let parts = [
        one_of("sample", session.sample),
        one_of("sample-flows", session.sample_flows),
        session.snaplen.map(|bytes| format!(", snaplen {bytes}")),
        session.max_rate.as_ref().map(|rate| format!(", max-rate {rate}")),
    ];
    parts.into_iter().flatten().collect()
}

/// The table of a session's taps. What was left out is shown where anything can be.
pub fn taps(session: &Session) -> String {
    let chooses = session.filter.is_some() || session.sample > 1 || session.sample_flows > 1;
    let left_out = |tap: &TapStatus| tap.counts.choice.filtered + tap.counts.choice.skipped > 0;
    if !chooses && !session.taps.iter().any(left_out) {
        let mut rows = vec![row(["TAP", "DIRECTION", "ATTACHED", "COPIES", "BYTES", "DROPPED"])];
        rows.extend(session.taps.iter().map(|tap| [place(tap), stat(&tap.counts.stat)].concat()));
        return table(&rows, &[3, 4, 5]);
    }
    let mut rows =
        vec![row(["TAP", "DIRECTION", "ATTACHED", "SEEN", "FILTERED", "SKIPPED", "COPIES", "BYTES", "DROPPED"])];
    for tap in &session.taps {
        let choice = &tap.counts.choice;
        let choice = [choice.seen, choice.filtered, choice.skipped].map(grouped).to_vec();
        rows.push([place(tap), choice, stat(&tap.counts.stat)].concat());
    }
    table(&rows, &[3, 4, 5, 6, 7, 8])
}

fn place(tap: &TapStatus) -> Vec<String> {
    row([&tap.interface, tap.direction, if tap.attached { "yes" } else { "NO" }])
}

fn stat(stat: &Stat) -> Vec<String> {
    vec![grouped(stat.pcnt), bytes(stat.bcnt), grouped(stat.dcnt)]
}

/// The table of a session's remotes.
pub fn remotes(remotes: &[RemoteStatus]) -> String {
    let mut rows = vec![row(["REMOTE", "SOURCE", "OUT", "MAC", "MTU", "SENT", "BYTES", "DROPPED"])];
    for remote in remotes {
        let source = remote.source.map_or_else(|| "-".into(), |source| source.to_string());
        let out = remote.interface.as_deref().unwrap_or("(no route)");
        let no_mac = if remote.raw.has(remote_flag::UNRESOLVED) { "(no answer)" } else { "-" };
        let mac = remote.mac.as_deref().unwrap_or(no_mac);
        let place = row([&remote.address.to_string(), &source, out, mac, &remote.mtu.to_string()]);
        rows.push([place, stat(&remote.stat)].concat());
    }
    table(&rows, &[4, 5, 6, 7])
}

/// What `up` says of a session that is up.
pub fn session_line(session: &Session) -> String {
    let taps: Vec<String> = session.taps.iter().map(|tap| format!("{} {}", tap.interface, tap.direction)).collect();
    let through = |to: &RemoteStatus| match &to.interface {
        Some(out) => format!("{} through {out} (MTU {})", to.address, to.mtu),
        None => format!("{} (no route)", to.address),
    };
    let remotes: Vec<String> = session.remotes.iter().map(through).collect();
    format!("{}: {} -> {} -> {}\n", session.name, taps.join(", "), spelled(session.tunnel), remotes.join(", "))
}

/// The table of `snifctl map list`.
pub fn maps(maps: &[Map]) -> String {
    let mut rows = vec![row(["MAP", "TYPE", "ID", "KEY", "VALUE", "ENTRIES", "PINNED"])];
    for map in maps {
        let numbers = [map.id, map.bytes_key, map.bytes_value, map.max_entries].map(|n| n.to_string());
        let [id, key, value, entries] = numbers.each_ref().map(String::as_str);
        rows.push(row([&map.name, &map.kind, id, &format!("{key} B"), &format!("{value} B"), entries, &map.pinned]));
    }
    table(&rows, &[2, 3, 4, 5])
}

/// `3 of 9 packets match: 1-2, 7`
pub fn verdict(verdict: &Verdict) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for n in &verdict.matched {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == *n => *last = *n,
            _ => ranges.push((*n, *n)),
        }
    }
    let shown = |(first, last): &(usize, usize)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    let ranges: Vec<String> = ranges.iter().map(shown).collect();
    let colon = if ranges.is_empty() { "" } else { ": " };
    format!("{} of {} packets match{colon}{}\n", verdict.matched.len(), verdict.packets, ranges.join(", "))
}

/// The lines of `snifctl doctor`.
pub fn checks(checks: &[Check]) -> String {
    let mut text = String::new();
    let width = checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    for check in checks {
        let level = match check.level {
            Level::Ok => "ok  ",
            Level::Warn => "warn",
            Level::Fail => "fail",
        };
        let fix = check.fix.as_ref().map_or_else(String::new, |fix| format!("; try: {fix}"));
        let _ = writeln!(text, "{level}  {:<width$}  {}{fix}", check.name, check.detail);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_for_a_person() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1000), "0.98 KiB");
        assert_eq!(bytes(1_536_000), "1.46 MiB");
        assert_eq!(bytes(u64::MAX), "16.0 EiB");
    }

    #[test]
    fn columns_line_up() {
        let rows = [row(["A", "NUM"]), row(["long", "7"])];
        assert_eq!(table(&rows, &[1]), "  A     NUM\n  long    7\n");
    }
}
