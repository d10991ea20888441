//! The live view as lines of text, for a window of any size. Pure.

use std::collections::VecDeque;

use super::model::{Live, Model, Series, Sort};
use crate::output::status::shortened;
use crate::output::units::{bit_rate, grouped, rate};
use crate::session::health::Grade;

/// How a piece of text looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tone {
    Plain,
    Bold,
    Dim,
    Good,
    Warn,
    Bad,
}

pub(super) type Line = Vec<(String, Tone)>;

/// What the user has chosen.
#[derive(Debug, Default)]
pub(super) struct Choice {
    /// The session that is shown; the first one where there is none of this name.
    pub session: Option<String>,
    pub sort: Sort,
    pub scroll: usize,
    pub is_paused: bool,
    pub helps: bool,
    /// The filter that is being typed.
    pub prompt: Option<Prompt>,
    /// What came of the last thing that was asked for.
    pub message: Option<(String, Tone)>,
}

/// A filter for the session that was shown when it was begun, whatever comes and goes meanwhile.
#[derive(Debug)]
pub(super) struct Prompt {
    pub session: String,
    pub typed: String,
}

/// Windows below this say so.
const SMALLEST: (usize, usize) = (60, 10);

const HELP: [(&str, &str); 9] = [
    ("q, Esc", "quit; the mirrors run on"),
    ("p, Space", "pause, and go on"),
    ("s", "sort by: the worst first, rate, drops, name"),
    ("f", "type a filter, which is then in force; an empty one takes every packet"),
    ("n, Tab", "the next session"),
    ("↑ ↓ PgUp PgDn", "scroll"),
    ("?", "this help"),
    ("", ""),
    ("", "Rates are of the last interval. COPIES/s counts one for each remote."),
];

/// The window's lines, none longer than `width`, exactly `height` of them.
pub(super) fn draw(model: &Model, choice: &Choice, (width, height): (usize, usize)) -> Vec<Line> {
    if width < SMALLEST.0 || height < SMALLEST.1 {
        let mut lines = vec![plain(format!("{}x{} is needed", SMALLEST.0, SMALLEST.1))];
        lines.resize(height, Vec::new());
        return lines.into_iter().map(|line| cut(line, width)).collect();
    }
    let place = model.place(choice.session.as_deref());
    let mut lines = match model.sessions.get(place) {
        _ if choice.helps => HELP.iter().map(|(key, what)| plain(format!("  {key:<14} {what}"))).collect(),
        Some(live) => body(live, (place, model.sessions.len()), choice, (width, height - 2)),
        None if model.has_looked => vec![plain("no session is up; waiting for one".into())],
        None => vec![plain("looking".into())],
    };
    lines.truncate(height - 2);
    lines.resize(height - 2, Vec::new());
    lines.push(match &choice.message {
        Some((text, tone)) => vec![(text.clone(), *tone)],
        None => Vec::new(),
    });
    lines.push(match &choice.prompt {
        Some(prompt) => typing(prompt, width),
        None => keys(choice),
    });
    lines.into_iter().map(|line| cut(line, width)).collect()
}

fn plain(text: String) -> Line {
    vec![(text, Tone::Plain)]
}

/// What is typed, with its end in sight.
fn typing(prompt: &Prompt, width: usize) -> Line {
    const LABEL: &str = "filter: ";
    let room = width.saturating_sub(LABEL.len() + 1);
    let length = prompt.typed.chars().count();
    let shown = match length > room {
        true => format!("…{}", prompt.typed.chars().skip(length - room.saturating_sub(1)).collect::<String>()),
        false => prompt.typed.clone(),
    };
    vec![(LABEL.into(), Tone::Bold), (format!("{shown}▏"), Tone::Plain)]
}

/// No more of a line than there are columns for, and nothing that a terminal would obey.
fn cut(line: Line, width: usize) -> Line {
    let mut left = width;
    let piece = |(text, tone): (String, Tone)| {
        let piece: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(left).collect();
        left -= piece.chars().count();
        (piece, tone)
    };
    line.into_iter().map(piece).filter(|(text, _)| !text.is_empty()).collect()
}

fn keys(choice: &Choice) -> Line {
    let pause = if choice.is_paused { "go on" } else { "pause" };
    let words =
        [("q", "quit"), ("p", pause), ("s", "sort: "), ("f", "filter"), ("n", "next"), ("↑↓", "scroll"), ("?", "help")];
    let key = |(key, word): (&str, &str)| {
        let word = if key == "s" { format!(" {word}{}  ", choice.sort.word()) } else { format!(" {word}  ") };
        [(key.to_string(), Tone::Bold), (word, Tone::Dim)]
    };
    words.into_iter().flat_map(key).collect()
}

fn body(live: &Live, (place, count): (usize, usize), choice: &Choice, (width, height): (usize, usize)) -> Vec<Line> {
    let mut title = vec![(format!("{}: ", live.name), Tone::Bold), (live.about.clone(), Tone::Plain)];
    if count > 1 {
        title.push((format!("  (session {} of {count})", place + 1), Tone::Dim));
    }
    let mut lines = vec![title];
    if let Some(filter) = &live.filter {
        lines.push(plain(format!("  filter: {}", filter.split_whitespace().collect::<Vec<_>>().join(" "))));
    }
    lines.push(totals(live, choice));
    let mut foot = vec![drops(live)];
    foot.extend(live.faults.iter().take(2).map(|fault| vec![(format!("  fault: {fault}"), Tone::Bad)]));
    // Two headings; what is left is shared by taps and remotes.
    let room = height.saturating_sub(lines.len() + foot.len() + 2).max(2);
    let (taps, remotes) = (choice.sort.sorted(&live.taps), choice.sort.sorted(&live.remotes));
    let for_remotes = remotes.len().min((room / 3).max(room.saturating_sub(taps.len())).max(1));
    let for_taps = room - for_remotes;
    let scrolled = |rows: &[&Series], room: usize| {
        let most = rows.len().saturating_sub(room);
        choice.scroll.min(most)
    };
    for (head, rows, room) in [("TAP", taps, for_taps), ("REMOTE", remotes, for_remotes)] {
        lines.push(heading(head, (scrolled(&rows, room), rows.len(), room), width));
        let from = scrolled(&rows, room);
        lines.extend(rows[from..].iter().take(room).map(|series| row(series, width)));
    }
    lines.extend(foot);
    lines
}

fn totals(live: &Live, choice: &Choice) -> Line {
    let told = match live.total() {
        Some(rise) => format!(
            "  {} seen/s, {} copies/s, {}, ",
            rate(rise.per_second(rise.seen)),
            rate(rise.per_second(rise.copies)),
            bit_rate(rise.per_second(rise.bytes))
        ),
        None => "  the first look; rates follow".into(),
    };
    let mut line = plain(told);
    if let Some(rise) = live.total() {
        let tone = if rise.dropped > 0 { Tone::Bad } else { Tone::Plain };
        line.push((format!("{} drops/s", rate(rise.per_second(rise.dropped))), tone));
    }
    if choice.is_paused {
        line.push(("  paused".into(), Tone::Warn));
    }
    line
}

fn drops(live: &Live) -> Line {
    if live.drops.is_empty() {
        return plain("  drops: none".into());
    }
    let told: Vec<String> = live.drops.iter().map(|(reason, count)| format!("{reason} {}", grouped(*count))).collect();
    vec![("  drops: ".into(), Tone::Plain), (told.join(", "), Tone::Bad)]
}

/// Columns but the first and the last: side, health, copies, bits, drops.
const COLUMNS: [(&str, usize); 5] = [("", 8), ("HEALTH", 10), ("COPIES/s", 8), ("BITS/s", 9), ("DROPS/s", 7)];

/// Columns for the name and for the history.
fn sides(width: usize) -> (usize, usize) {
    let fixed: usize = COLUMNS.iter().map(|(_, width)| width + 1).sum::<usize>() + 2;
    let left = width.saturating_sub(fixed);
    let name = (left * 3 / 5).clamp(6, 32).min(left);
    (name, left.saturating_sub(name + 1))
}

fn heading(name: &str, (from, all, room): (usize, usize, usize), width: usize) -> Line {
    let (first, last) = sides(width);
    let title = if all > room { format!("{name} {}-{}/{all}", from + 1, from + room.min(all)) } else { name.into() };
    let side = if name == "TAP" { "SIDE" } else { "OUT" };
    let [_, health, copies, bits, drops] = COLUMNS;
    let text = format!(
        "  {title:<first$} {side:<8} {:<10} {:>8} {:>9} {:>7} {}",
        health.0,
        copies.0,
        bits.0,
        drops.0,
        if last > 6 { "COPIES" } else { "" }
    );
    vec![(text.trim_end().into(), Tone::Dim)]
}

fn row(series: &Series, width: usize) -> Line {
    let (first, last) = sides(width);
    let (copies, bits, dropped) = match &series.rise {
        Some(rise) => (
            rate(rise.per_second(rise.copies)),
            bit_rate(rise.per_second(rise.bytes)),
            rate(rise.per_second(rise.dropped)),
        ),
        None => ("-".into(), "-".into(), "-".into()),
    };
    let tone = match series.health.grade() {
        Grade::Good => Tone::Good,
        Grade::Doubtful => Tone::Warn,
        Grade::Bad => Tone::Bad,
    };
    let is_losing = series.rise.is_some_and(|rise| rise.dropped > 0);
    vec![
        (format!("  {:<first$} {:<8} ", shortened(&series.name, first), shortened(&series.side, 8)), Tone::Plain),
        (format!("{:<10} ", series.health.word()), tone),
        (format!("{copies:>8} {bits:>9} "), Tone::Plain),
        (format!("{dropped:>7} "), if is_losing { Tone::Bad } else { Tone::Plain }),
        (sparkline(&series.history, last), Tone::Good),
    ]
}

/// The latest rates as bars, the highest of all that are kept as a full one.
pub(super) fn sparkline(history: &VecDeque<f64>, width: usize) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let most = history.iter().copied().fold(0.0, f64::max);
    let bar = |rate: &f64| match rate {
        _ if *rate <= 0.0 || most <= 0.0 => ' ',
        _ => BARS[((rate / most * 8.0).ceil() as usize).clamp(1, 8) - 1],
    };
    history.iter().skip(history.len().saturating_sub(width)).map(bar).collect()
}

/// Text without its tones.
#[cfg(test)]
pub(super) fn text(lines: &[Line]) -> String {
    let line =
        |line: &Line| line.iter().map(|(text, _)| text.as_str()).collect::<String>().trim_end().to_string() + "\n";
    lines.iter().map(line).collect()
}
