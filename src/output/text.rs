//! From typed answers to text for a person. JSON is the types' own.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;

use crate::commands::{Check, Level, Verdict};
use crate::datapath::abi::{Remote, Stat};
use crate::output::units::{bytes, grouped};
use crate::request::{Request, Watched, listed};
use crate::session::pattern;
use crate::session::stats::{RemoteState, RemoteStatus, Session, ShownMap, TapStatus};
use crate::tools::ip::Link;
use crate::usage::spelled;

/// Rows of cells as aligned columns, two spaces apart; cells of columns named in `right` end flush.
pub(crate) fn table(rows: &[Vec<String>], right: &[usize]) -> String {
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

/// So many were: what is said of them follows.
pub(crate) fn were(count: u64, what: &str) -> String {
    if count == 1 { format!("1 {what} was") } else { format!("{count} {what}s were") }
}

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(String::from).to_vec()
}

/// The table of a session's taps. What was left out is shown where anything can be.
pub(crate) fn taps(session: &Session) -> String {
    let chooses = session.filter.is_some() || session.sample > Some(1) || session.sample_flows > Some(1);
    let left_out = |tap: &TapStatus| tap.counts.choice.filtered + tap.counts.choice.skipped > 0;
    if !chooses && !session.taps.iter().any(left_out) {
        let mut rows = vec![row(["TAP", "DIRECTION", "ATTACHED", "COPIES", "BYTES", "DROPPED"])];
        rows.extend(session.taps.iter().map(|tap| [place(tap), stat(&tap.counts.stat)].concat()));
        rows.extend(waiting(session, 3));
        return table(&rows, &[3, 4, 5]);
    }
    let mut rows =
        vec![row(["TAP", "DIRECTION", "ATTACHED", "SEEN", "FILTERED", "SKIPPED", "COPIES", "BYTES", "DROPPED"])];
    for tap in &session.taps {
        let choice = &tap.counts.choice;
        let choice = [choice.seen, choice.filtered, choice.skipped].map(grouped).to_vec();
        rows.push([place(tap), choice, stat(&tap.counts.stat)].concat());
    }
    rows.extend(waiting(session, 6));
    table(&rows, &[3, 4, 5, 6, 7, 8])
}

/// A row for each name and pattern for which there is no interface yet.
fn waiting(session: &Session, numbers: usize) -> impl Iterator<Item = Vec<String>> {
    let row = move |at: &Watched| {
        let place = [at.interface.clone(), spelled(at.direction), "waiting".into()];
        place.into_iter().chain(std::iter::repeat_n("-".into(), numbers)).collect()
    };
    session.waiting.iter().map(row)
}

fn place(tap: &TapStatus) -> Vec<String> {
    let mut name = tap.interface.clone();
    for more in tap.pattern.iter().map(String::as_str).chain((!tap.exists).then_some("gone")) {
        let _ = write!(name, " ({more})");
    }
    row([
        &name,
        tap.direction,
        if tap.unseen.is_some() {
            "blind?"
        } else if tap.attached {
            "yes"
        } else {
            "NO"
        },
    ])
}

fn stat(stat: &Stat) -> Vec<String> {
    vec![grouped(stat.pcnt), bytes(stat.bcnt), grouped(stat.dcnt)]
}

/// The table of a session's remotes.
pub(crate) fn remotes(remotes: &[RemoteStatus]) -> String {
    let mut rows = vec![row(["REMOTE", "SOURCE", "OUT", "MAC", "MTU", "SENT", "BYTES", "DROPPED"])];
    for remote in remotes {
        let source = remote.source.map_or_else(|| "-".into(), |source| source.to_string());
        let out = match (&remote.interface, remote.state) {
            (Some(out), RemoteState::Outdated) => format!("{out} (outdated)"),
            (Some(out), RemoteState::Down) => format!("{out} (down)"),
            (Some(out), _) => out.clone(),
            (None, RemoteState::Gone) => "(gone)".into(),
            (None, _) => "(no route)".into(),
        };
        let no_mac = if remote.state == RemoteState::Unresolved { "(no answer)" } else { "-" };
        let mac = remote.mac.as_deref().unwrap_or(no_mac);
        let place = row([&remote.address.to_string(), &source, &out, mac, &remote.mtu.to_string()]);
        rows.push([place, stat(&remote.stat)].concat());
    }
    table(&rows, &[4, 5, 6, 7])
}

/// What `up` says of a session that is up.
pub(crate) fn session_line(request: &Request, headers: &BTreeMap<IpAddr, Remote>, links: &[Link]) -> String {
    let through = |address: &IpAddr| {
        let header = headers.get(address);
        let link = header.and_then(|header| links.iter().find(|link| link.ifindex == header.ifindex));
        match header.zip(link) {
            Some((header, link)) => format!("{address} through {} (MTU {})", link.ifname, header.mtu),
            None => format!("{address} (no route)"),
        }
    };
    let known = pattern::expand(request, None, links).interfaces;
    let shown = |(watched, link): &(Watched, Option<Link>)| {
        let by = link.as_ref().and_then(|link| pattern::of(request, &watched.interface, link));
        let by = by.map(|by| format!(" ({by})")).or_else(|| link.is_none().then(|| " (waiting)".into()));
        format!("{watched}{}", by.unwrap_or_default())
    };
    let interfaces = listed(known.iter().map(shown));
    let remotes = listed(request.options.remotes.iter().map(through));
    format!("{}: {interfaces} -> {} -> {remotes}\n", request.name, spelled(request.options.tunnel.kind))
}

/// The table of `snifctl map list`.
pub(crate) fn maps(maps: &[ShownMap]) -> String {
    let mut rows = vec![row(["MAP", "TYPE", "ID", "KEY", "VALUE", "ENTRIES", "PINNED"])];
    for map in maps {
        let numbers = [map.id, map.bytes_key, map.bytes_value, map.max_entries].map(|n| n.to_string());
        let [id, key, value, entries] = numbers.each_ref().map(String::as_str);
        rows.push(row([&map.name, &map.kind, id, &format!("{key} B"), &format!("{value} B"), entries, &map.pinned]));
    }
    table(&rows, &[2, 3, 4, 5])
}

/// `3 of 9 packets match: 1-2, 7`
pub(crate) fn verdict(verdict: &Verdict) -> String {
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
pub(crate) fn checks(checks: &[Check]) -> String {
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
    fn columns_line_up() {
        let rows = [row(["A", "NUM"]), row(["long", "7"])];
        assert_eq!(table(&rows, &[1]), "  A     NUM\n  long    7\n");
    }
}
