//! The chart of a run, drawn by gnuplot from the results alone.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::report::{Report, Row};

/// A panel: its title, the rows it shows (group and case), and their figure.
const PANELS: [(&str, [&str; 3]); 4] = [
    ("ns added to a 64-byte frame that comes in", ["cost", "64 B ingress", "added ns"]),
    ("ns added to a 1500-byte frame that comes in", ["cost", "1500 B ingress", "added ns"]),
    ("Gbit/s of a TCP connection while it is copied", ["tcp", "goodput of the watched flow", "Gbit/s"]),
    (
        "ns of each copy, by the number of remotes that get one",
        ["scale", "remotes, each gets every copy", "per copy ns"],
    ),
];

/// Pixels: of a bar, of what is above and below a panel's bars, and of the part above.
const BAR: usize = 22;
const MARGINS: usize = 80;
const TITLE: usize = 40;

/// Writes bench/results.svg.
pub(crate) fn draw(report: &Report) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/results.svg");
    let mut gnuplot = Command::new("gnuplot").stdin(Stdio::piped()).spawn().expect("start gnuplot");
    let script = script(report, &file);
    gnuplot.stdin.take().expect("a pipe").write_all(script.as_bytes()).expect("tell gnuplot");
    assert!(gnuplot.wait().expect("wait for gnuplot").success(), "gnuplot failed on:\n{script}");
}

fn script(report: &Report, file: &Path) -> String {
    let panels: Vec<(&str, String, usize)> = PANELS
        .into_iter()
        .map(|(title, place)| (title, bars(report, place)))
        .filter(|(_, bars)| !bars.is_empty())
        .map(|(title, bars)| (title, bars.clone(), bars.lines().count()))
        .collect();
    // Each bar as high as any other, whatever panel it is in.
    let height = |count: usize| MARGINS + BAR * count;
    let total: usize = panels.iter().map(|(_, _, count)| height(*count)).sum();
    let mut text = format!(
        "set terminal svg size 900,{total} dynamic background rgb 'white' font 'sans-serif,13'\n\
         set output '{}'\nset multiplot\nset style fill solid 0.6 noborder\nset boxwidth 0.7\nunset key\n\
         set border 1\nset xtics nomirror out\nset ytics nomirror scale 0\nset grid xtics lt 1 lc rgb '#dddddd'\n\
         set xrange [0:*]\n",
        file.display()
    );
    let mut top = total;
    for (n, (title, bars, count)) in panels.iter().enumerate() {
        let (above, below) = (top - TITLE, top + MARGINS - TITLE - height(*count));
        let [above, below] = [above, below].map(|at| at as f64 / total as f64);
        top -= height(*count);
        writeln!(
            text,
            "set margins screen 0.32, screen 0.96, screen {below:.5}, screen {above:.5}\n\
             set title \"{title}\" offset 0,-0.5\nset yrange [{count}-0.5:-0.5]\n\
             $panel{n} << END\n{bars}END\n\
             plot $panel{n} using (0):0:(0):2:($0-0.35):($0+0.35):ytic(1) with boxxyerror lc rgb '#3b7dd8', \
             '' using 2:0:3:4 with xerrorbars pt 0 lw 1.5 lc rgb '#222222'"
        )
        .expect("a string takes all");
    }
    text + "unset multiplot\n"
}

/// A line a bar: its name, the median and the quartiles.
fn bars(report: &Report, [group, case, figure]: [&str; 3]) -> String {
    let rows = report.rows.iter().filter(|row| row.group == group && row.case == case);
    rows.filter_map(|row| bar(row, figure)).collect()
}

fn bar(row: &Row, figure: &str) -> Option<String> {
    let spread = row.figure(figure)?;
    Some(format!("\"{}\" {:.4} {:.4} {:.4}\n", row.mode, spread.median, spread.q1, spread.q3))
}
