//! The batch language that `ip`, `tc` and `bpftool` share: one command a line, split at white space. A word that begins
//! with a quote lasts until the same quote; there is no escape. `#` begins a comment anywhere, also inside quotes. A
//! backslash at the end joins two lines. (iproute2, lib/utils.c; bpftool, main.c.)

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::tools::exec::{Cmd, Runner};
use crate::tools::json;

/// What a tool answers to one question: a list, or why it failed.
pub(crate) type Reply = Result<Vec<Value>, String>;

/// A word as a batch line has it. Only of words that can be [said](can_say).
pub(crate) fn word(word: &str) -> String {
    match word.chars().next() {
        Some('"') => format!("'{word}'"),
        Some('\'') => format!("\"{word}\""),
        _ if word.ends_with('\\') => format!("\"{word}\""),
        _ => word.into(),
    }
}

/// Can a batch line hold this word?
pub(crate) fn can_say(text: &str) -> bool {
    let said = word(text);
    let inner = said.strip_prefix(['"', '\'']).map_or("", |rest| &rest[..rest.len().saturating_sub(1)]);
    let cut = said.starts_with(['"', '\'']) && inner.contains(&said[..1]);
    !text.is_empty() && !cut && !text.contains(|c: char| c == '#' || c.is_ascii_whitespace())
}

/// Asks many questions in one process. A question that fails is answered by the reason, and the others are still asked.
///
/// `-force` lets the tool go on: it says `Command failed -:N` on stderr for line N and prints nothing on stdout for it.
pub(crate) fn ask(runner: &Runner, program: &str, options: &[&str], lines: &[String]) -> Result<Vec<Reply>> {
    ask_in(runner, None, program, options, lines)
}

/// The same in another network namespace, if there is one.
pub(crate) fn ask_in(
    runner: &Runner,
    netns: Option<&Path>,
    program: &str,
    options: &[&str],
    lines: &[String],
) -> Result<Vec<Reply>> {
    if lines.is_empty() {
        return Ok(Vec::new());
    }
    let words = options.iter().copied().chain(["-force", "-batch", "-"]);
    let answer = runner.answer(&Cmd::new(program, words).input(lines).within(netns))?;
    let mut reasons = failures(&answer.stderr);
    if answer.has_failed() && reasons.is_empty() {
        return Err(answer.failed().into());
    }
    let said = String::from_utf8_lossy(&answer.stdout);
    match replies(program, lines.len(), &said, &answer.stderr) {
        Err(_) if lines.len() > 1 => {
            // Somewhere in it is what is no JSON, or ends early: halves tell where.
            let (first, second) = lines.split_at(lines.len() / 2);
            let mut replies = ask_in(runner, netns, program, options, first)?;
            replies.extend(ask_in(runner, netns, program, options, second)?);
            Ok(replies)
        }
        Err(why) => match (json::list(&said, program), reasons.pop()) {
            (Ok(members), _) if !members.is_empty() => Ok(vec![Ok(members)]),
            (_, Some((_, reason))) => Ok(vec![Err(reason)]),
            _ => Err(why),
        },
        replies => replies,
    }
}

/// One reply for each of `count` lines.
///
/// # Errors
/// The replies cannot be told from one another.
pub(crate) fn replies(program: &str, count: usize, stdout: &str, stderr: &str) -> Result<Vec<Reply>> {
    let mut reasons = failures(stderr);
    let mut lists = json::lists(stdout, program)?.into_iter();
    let mut reply = |line| match reasons.iter().position(|(at, _)| *at == line) {
        Some(at) => Ok(Err(reasons.swap_remove(at).1)),
        None => lists
            .next()
            .map(Ok)
            .with_context(|| format!("{program} answered less than it was asked; try: snifctl doctor")),
    };
    let replies = (1..=count).map(&mut reply).collect::<Result<Vec<_>>>()?;
    ensure!(lists.next().is_none(), "{program} answered more than it was asked; try: snifctl doctor");
    Ok(replies)
}

/// The lines that failed, from 1, and why.
fn failures(stderr: &str) -> Vec<(usize, String)> {
    let mut failures = Vec::new();
    let mut said = Vec::new();
    for line in stderr.lines() {
        match line.strip_prefix("Command failed -:").map(str::parse) {
            Some(Ok(at)) => failures.push((at, std::mem::take(&mut said).join(" "))),
            _ => said.push(line.trim().trim_start_matches("RTNETLINK answers: ")),
        }
    }
    failures
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_only_where_the_batch_language_needs_it() {
        for plain in ["eth0", "o'u", "a\"b", "a\\b", "-x", "日本語", "$(id)"] {
            assert_eq!(word(plain), plain);
            assert!(can_say(plain));
        }
        assert_eq!(word("'a"), "\"'a\"");
        assert_eq!(word("\"a"), "'\"a'");
        assert_eq!(word("a\\"), "\"a\\\"");
        for sayable in ["'a", "\"a", "a\\", "\\", "'", "\""] {
            assert!(can_say(sayable), "{sayable}");
        }
        for unsayable in ["", "a#b", "a b", "a\nb", "'\"", "\"'", "\"\\'", "a\"\\", "'#"] {
            assert!(!can_say(unsayable), "{unsayable}");
        }
    }

    #[test]
    fn tc_reads_the_words_that_can_be_said() {
        for name in ["o'u", "'a", "\"a", "a\\", "\\", "ünï"] {
            let line = format!("qdisc show dev {}", word(name));
            let replies = ask(&Runner::default(), "tc", &["-j"], &[line]).unwrap();
            assert_eq!(replies[0].as_ref().unwrap_err(), &format!("Cannot find device \"{name}\""));
        }
    }

    #[test]
    fn a_line_that_fails_has_its_reason_and_the_others_their_replies() {
        let stderr = "Warning: odd\nCannot find device \"x\"\nCommand failed -:2\nRTNETLINK answers: No route\nCommand failed -:3\n";
        let replies = replies("ip", 4, "[1]\n[]\n", stderr).unwrap();
        assert_eq!(replies[0], Ok(vec![1.into()]));
        assert_eq!(replies[1], Err("Warning: odd Cannot find device \"x\"".into()));
        assert_eq!(replies[2..], [Err("No route".into()), Ok(vec![])]);
        assert!(super::replies("ip", 2, "[]", "").unwrap_err().to_string().contains("less"));
        assert!(super::replies("ip", 1, "[][]", "").unwrap_err().to_string().contains("more"));
    }
}
