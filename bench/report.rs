//! The figures: collected, printed as tables, written as JSON.

use std::fmt::{self, Display, Write};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::stats::Spread;

/// One quantity of one mode.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Figure {
    pub name: String,
    #[serde(flatten)]
    pub spread: Spread,
}

/// What was measured of one mode in one case.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Row {
    pub group: String,
    pub case: String,
    pub mode: String,
    pub figures: Vec<Figure>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub note: Option<String>,
}

/// A target, and what was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Verdict {
    pub target: String,
    pub limit: f64,
    pub measured: Option<f64>,
    /// None where it was not measured in this run.
    pub met: Option<bool>,
}

impl Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (word, measured) = match (self.met, self.measured) {
            (Some(true), Some(measured)) => ("met", format!("{measured:.3}")),
            (Some(false), Some(measured)) => ("missed", format!("{measured:.3}")),
            _ => ("-", "not measured".into()),
        };
        write!(f, "{word:<6}  {:<72}  {measured}", self.target)
    }
}

/// A whole run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Report {
    pub kernel: String,
    pub cpu: String,
    pub cpus: usize,
    pub rounds: usize,
    pub rows: Vec<Row>,
    pub targets: Vec<Verdict>,
}

impl Row {
    pub(crate) fn new(group: &str, case: &str, mode: &str) -> Row {
        Row { group: group.into(), case: case.into(), mode: mode.into(), figures: Vec::new(), note: None }
    }

    /// Adds a figure, unless there is no value.
    pub(crate) fn with(mut self, name: &str, values: impl IntoIterator<Item = f64>) -> Row {
        let figure = Spread::of(values).map(|spread| Figure { name: name.into(), spread });
        self.figures.extend(figure);
        self
    }

    pub(crate) fn noted(mut self, note: impl Into<String>) -> Row {
        self.note = Some(note.into());
        self
    }

    pub(crate) fn figure(&self, name: &str) -> Option<Spread> {
        self.figures.iter().find(|figure| figure.name == name).map(|figure| figure.spread)
    }
}

impl Report {
    pub(crate) fn new(rounds: usize) -> Report {
        let cpus = std::thread::available_parallelism().expect("the number of CPUs").get();
        Report { kernel: kernel(), cpu: cpu(), cpus, rounds, ..Report::default() }
    }

    pub(crate) fn find(&self, group: &str, case: &str, mode: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.group == group && row.case == case && row.mode == mode)
    }

    /// Prints the rows from this one on, a table for each case.
    pub(crate) fn print_from(&self, from: usize) {
        let mut rows = &self.rows[from..];
        while let Some(first) = rows.first() {
            let same = |row: &&Row| row.group == first.group && row.case == first.case;
            let (table, rest) = rows.split_at(rows.iter().take_while(same).count());
            print!("{}", shown(table));
            rows = rest;
        }
    }

    /// Prints how the targets were met, and writes everything.
    pub(crate) fn finish(&mut self, targets: Vec<Verdict>, file: &Path) {
        self.targets = targets;
        println!("\ntargets");
        for verdict in self.targets.iter().filter(|verdict| verdict.met.is_some()) {
            println!("  {verdict}");
        }
        fs::create_dir_all(file.parent().expect("a directory")).expect("make the directory of the results");
        let text = serde_json::to_string_pretty(self).expect("JSON");
        fs::write(file, text + "\n").expect("write the results");
    }

    pub(crate) fn read(file: &Path) -> Report {
        let text = fs::read_to_string(file).unwrap_or_else(|err| panic!("cannot read {}: {err}", file.display()));
        serde_json::from_str(&text).expect("results of this benchmark")
    }
}

/// Where the results go.
pub(crate) fn results() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench/results.json")
}

/// One case as a table: medians, and the quartiles in brackets.
fn shown(rows: &[Row]) -> String {
    let names = columns(rows);
    let head = std::iter::once(rows[0].case.clone()).chain(names.iter().map(|name| name.to_string()));
    let mut lines: Vec<Vec<String>> = vec![head.collect()];
    for row in rows {
        let cells = names.iter().map(|name| row.figure(name).map_or(String::new(), |spread| cell(name, &spread)));
        lines.push(std::iter::once(row.mode.clone()).chain(cells).collect());
    }
    let mut text = format!("\n{}\n", rows[0].group);
    for (n, line) in lines.iter().enumerate() {
        let cells = line.iter().enumerate().map(|(at, cell)| {
            let width = lines.iter().map(|line| line[at].chars().count()).max().unwrap_or(0);
            if at == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        let note = n.checked_sub(1).and_then(|n| rows[n].note.as_deref()).unwrap_or_default();
        let line = format!("  {}  {note}", cells.collect::<Vec<_>>().join("  "));
        writeln!(text, "{}", line.trim_end()).expect("a string takes all");
    }
    text
}

/// The names of all figures, in the order of the row that has most.
fn columns(rows: &[Row]) -> Vec<&str> {
    let fullest = rows.iter().max_by_key(|row| row.figures.len());
    let mut names: Vec<&str> = Vec::new();
    for figure in fullest.into_iter().chain(rows).flat_map(|row| &row.figures) {
        if !names.contains(&figure.name.as_str()) {
            names.push(&figure.name);
        }
    }
    names
}

fn cell(name: &str, spread: &Spread) -> String {
    let places = match name {
        _ if name.ends_with(" ns") => 0,
        _ if name.ends_with("/frame") => 3,
        _ if spread.median.abs() >= 100.0 => 0,
        _ => 2,
    };
    let Spread { median, q1, q3, .. } = spread;
    match name.ends_with("/frame") && q1 == q3 {
        true => format!("{median:.places$}"),
        false => format!("{median:.places$} ({q1:.places$} to {q3:.places$})"),
    }
}

fn kernel() -> String {
    let out = Command::new("uname").arg("-r").output().expect("run uname");
    String::from_utf8_lossy(&out.stdout).trim().to_string()
}

fn cpu() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find(|line| line.starts_with("model name"));
    line.and_then(|line| line.split_once(": ")).map_or("unknown".into(), |(_, model)| model.to_string())
}
