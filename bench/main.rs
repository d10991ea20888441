//! `make bench`: what copying costs, beside the kernel's own ways and others. See docs/benchmark.md.

mod chart;
mod collect;
mod commands;
mod cost;
mod modes;
mod report;
mod rig;
mod scale;
mod stats;
mod targets;
mod tcp;

#[path = "../tests/lab/mod.rs"]
mod lab;

use clap::{Parser, ValueEnum};

use report::Report;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Group {
    Cost,
    Tcp,
    Latency,
    Commands,
    Scale,
    Collect,
}

#[derive(Parser)]
struct Args {
    /// What to measure; everything if nothing is named.
    only: Vec<Group>,
    /// Rounds of the cost group; the others make fewer.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Only draw the chart of the last run.
    #[arg(long)]
    chart: bool,
    /// What cargo adds.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let args = Args::parse();
    let file = report::results();
    if args.chart {
        return chart::draw(&Report::read(&file));
    }
    let mut report = Report::new(args.rounds.into());
    println!("Linux {}, {} CPUs, {}, {} rounds", report.kernel, report.cpus, report.cpu, report.rounds);
    println!("medians (quartiles); modes take turns, and each is compared with the others of the same round");
    for group in Group::value_variants() {
        if args.only.is_empty() || args.only.contains(group) {
            run(*group, &mut report);
        }
    }
    report.finish(targets::judge(&report), &file);
    // Not by part of a run: the chart is kept with the sources.
    if args.only.is_empty() {
        chart::draw(&report);
    }
}

fn run(group: Group, report: &mut Report) {
    match group {
        Group::Cost => cost::run(report),
        Group::Tcp => tcp::goodput(report),
        Group::Latency => tcp::latency(report),
        Group::Commands => commands::run(report),
        Group::Scale => scale::run(report),
        Group::Collect => collect::run(report),
    }
}
