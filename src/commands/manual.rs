//! `man`: a manual page for each command, from the same types that read the command line. What `--help` does not say
//! stands here: exit codes, files, and where to read on.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Command, CommandFactory};
use clap_mangen::Man;
use clap_mangen::roff::{Inline, Roff, bold, roman};

use crate::cli::Cli;
use crate::tools::clang::CACHE;

/// Where `snifctl.service` reads sessions.
const CONFIG: &str = "/etc/snifctl.d";

pub(super) fn run(dir: &Path) -> Result<ExitCode> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    for page in pages() {
        let file = dir.join(format!("{}.1", page.name));
        fs::write(&file, page.text).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

struct Page {
    name: String,
    text: String,
}

/// The pages of all commands that are listed.
fn pages() -> Vec<Page> {
    fn each(command: &Command, parent: Option<&str>, found: &mut Vec<Page>) {
        let name = name(command);
        found.push(Page { text: text(command, parent), name: name.clone() });
        listed(command).for_each(|next| each(next, Some(&name), found));
    }
    let mut command = Cli::command();
    command.build();
    let mut found = Vec::new();
    each(&command, None, &mut found);
    found
}

/// A page's name: `snifctl-tap-add`.
fn name(command: &Command) -> String {
    command.get_display_name().unwrap_or_else(|| command.get_name()).to_string()
}

fn listed(command: &Command) -> impl Iterator<Item = &Command> {
    command.get_subcommands().filter(|next| !next.is_hide_set())
}

fn text(command: &Command, parent: Option<&str>) -> String {
    let page = Man::new(command.clone());
    let mut out = Vec::new();
    let mut written = page.render_name_section(&mut out);
    written = written.and_then(|()| synopsis(command).to_writer(&mut out));
    written = written.and_then(|()| page.render_description_section(&mut out));
    written = written.and_then(|()| page.render_options_section(&mut out));
    if listed(command).next().is_some() {
        written = written.and_then(|()| commands(command).to_writer(&mut out));
    }
    written = written.and_then(|()| ending(command, parent).to_writer(&mut out));
    written.expect("a vector takes all that is written");
    let body = String::from_utf8_lossy(&out).replace(PREAMBLE, "").replace(GAP, "\n.sp\n");
    let title = name(command).to_uppercase();
    format!("{PREAMBLE}.TH {title} 1 \"\" \"snifctl {}\" \"User Commands\"\n{body}", env!("CARGO_PKG_VERSION"))
}

/// What the crate puts before each part. Once is enough.
const PREAMBLE: &str = ".ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n";
/// What it writes before a list of values; mandoc has it for odd.
const GAP: &str = "\n.br\n\n.br\n";

/// The usage as `--help` has it.
fn synopsis(command: &Command) -> Roff {
    let usage = command.clone().render_usage().to_string();
    let name = command.get_bin_name().unwrap_or_default();
    let rest = usage.trim_start_matches("Usage: ").trim_start_matches(name).to_string();
    let mut roff = Roff::new();
    roff.control("SH", ["SYNOPSIS"]).text([bold(name), roman(rest)]);
    roff
}

fn commands(command: &Command) -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["COMMANDS"]);
    for next in listed(command) {
        let about = next.get_about().map(ToString::to_string).unwrap_or_default();
        roff.control("TP", []).text([bold(name(next)), roman("(1)")]).text([roman(about)]);
    }
    roff
}

/// Examples, exit codes, files, and where to read on.
fn ending(command: &Command, parent: Option<&str>) -> Roff {
    let mut roff = Roff::new();
    let examples = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let lines: Vec<&str> = examples.lines().skip(1).map(str::trim_start).filter(|line| !line.is_empty()).collect();
    if !lines.is_empty() {
        roff.control("SH", ["EXAMPLES"]).control("nf", []);
        for line in lines {
            roff.text([roman(line)]);
        }
        roff.control("fi", []);
    }
    roff.control("SH", ["EXIT STATUS"]);
    entries(&mut roff, &EXIT_CODES);
    let files = files(command, parent);
    if !files.is_empty() {
        roff.control("SH", ["FILES"]);
        entries(&mut roff, &files);
    }
    roff.control("SH", ["SEE ALSO"]).text(see_also(command, parent));
    roff
}

fn entries(roff: &mut Roff, entries: &[(&str, &str)]) {
    for (term, text) in entries {
        roff.control("TP", []).text([bold(*term)]).text([roman(*text)]);
    }
}

const EXIT_CODES: [(&str, &str); 4] = [
    ("0", "Done, or nothing to do."),
    ("1", "Failed; one line on stderr says what, and what to try. Of status --check: something is not as it must be."),
    ("2", "The command line is wrong."),
    ("129, 130, 143", "Ended by SIGHUP, SIGINT or SIGTERM."),
];

type File = (&'static str, &'static str);
const PINS: File = ("/sys/fs/bpf/snifctl", "Sessions: programs and maps, by network namespace. No other state exists.");
const OBJECTS: File = (CACHE, "Compiled programs, by content. They can be removed at any time.");
const SESSIONS: File = (CONFIG, "Files of sessions (*.toml), for snifctl.service.");

/// The files that a command reads or writes.
fn files(command: &Command, parent: Option<&str>) -> Vec<File> {
    match (parent, command.get_name()) {
        (None, _) => vec![PINS, OBJECTS, SESSIONS],
        (_, "watch" | "apply") => vec![SESSIONS, PINS, OBJECTS],
        (_, "demo" | "source" | "completions") => Vec::new(),
        (_, "up" | "sync" | "set" | "add") => vec![PINS, OBJECTS],
        _ => vec![PINS],
    }
}

/// The page above, those beside or below, and those of others.
fn see_also(command: &Command, parent: Option<&str>) -> Vec<Inline> {
    let below = listed(command).map(name);
    let takes_filter = command.get_name() == "filter" || command.get_arguments().any(|arg| arg.get_id() == "filter");
    let takes_expression = command.get_arguments().any(|arg| arg.get_id() == "expression");
    let mut pages: Vec<(String, &str)> =
        parent.map(String::from).into_iter().chain(below).map(|to| (to, "1")).collect();
    if takes_filter || takes_expression {
        pages.push(("pcap-filter".into(), "7"));
    }
    if parent.is_none() {
        pages
            .extend([("tc-bpf", "8"), ("bpftool", "8"), ("pcap-filter", "7")].map(|(name, at)| (name.to_string(), at)));
    }
    let last = pages.len().saturating_sub(1);
    let item = |(at, (name, section)): (usize, (String, &str))| {
        let comma = if at == last { "" } else { ", " };
        [bold(name), roman(format!("({section}){comma}"))]
    };
    pages.into_iter().enumerate().flat_map(item).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_listed_command_has_a_page_with_all_sections_and_its_examples() {
        let pages = pages();
        for name in ["snifctl", "snifctl-up", "snifctl-tap-add", "snifctl-completions"] {
            assert!(pages.iter().any(|page| page.name == name), "{name}");
        }
        assert!(!pages.iter().any(|page| page.name.contains("man") || page.name.contains("inside")));
        for Page { name, text } in &pages {
            for section in ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXAMPLES", "EXIT STATUS", "SEE ALSO"] {
                let heading = [format!(".SH {section}\n"), format!(".SH \"{section}\"\n")];
                assert_eq!(
                    heading.map(|line| text.matches(&line).count()).iter().sum::<usize>(),
                    1,
                    "{name}: {section}"
                );
            }
        }
        let up = pages.iter().find(|page| page.name == "snifctl-up");
        assert!(up.unwrap().text.contains("sudo snifctl up eth0 \\-\\-tunnel gre \\-\\-remote 10.0.0.7\n"));
    }
}
