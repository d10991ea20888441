//! The log: one line, or one JSON object, for each thing that begins, changes or ends.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::time::SystemTime;

use serde_json::{Value, json};

/// Priorities of syslog(3), by which the journal sorts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    Error = 3,
    Warning = 4,
    Notice = 5,
    Info = 6,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Level::Error => "error",
            Level::Warning => "warning",
            Level::Notice => "notice",
            Level::Info => "info",
        }
    }
}

/// Where the log goes, and what it has said that still holds.
#[derive(Debug)]
pub(super) struct Log {
    is_json: bool,
    is_journal: bool,
    /// What is not as it must be, by session (empty for all), without the numbers in it, and as it was said.
    standing: BTreeMap<String, BTreeMap<String, String>>,
}

impl Log {
    pub(super) fn new(is_json: bool) -> Log {
        Log { is_json, is_journal: is_journal(), standing: BTreeMap::new() }
    }

    /// A line of one session, or of none.
    pub(super) fn say(&self, level: Level, session: &str, event: &str, text: &str) {
        let line = match self.is_json {
            true => {
                let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                let mut line =
                    json!({ "time": since.as_millis() as f64 / 1000.0, "level": level.name(), "event": event });
                if !session.is_empty() {
                    line["session"] = session.into();
                }
                line["message"] = Value::from(text);
                line.to_string()
            }
            false => {
                let priority = if self.is_journal { format!("<{}>", level as u8) } else { "snifctl: ".into() };
                let session = if session.is_empty() { String::new() } else { format!("{session}: ") };
                format!("{priority}{session}{}", text.replace('\n', " "))
            }
        };
        // Who no longer reads it does not end the watch.
        let _ = writeln!(std::io::stderr(), "{line}");
    }

    /// What is not as it must be now with a session: what is new of it is said, and what is over.
    pub(super) fn standing(&mut self, session: &str, now: &[(Level, String)]) {
        let before = self.standing.remove(session).unwrap_or_default();
        let now: BTreeMap<String, &(Level, String)> = now.iter().map(|told| (numberless(&told.1), told)).collect();
        for (_, (level, text)) in now.iter().filter(|(key, _)| !before.contains_key(*key)) {
            self.say(*level, session, "problem", text);
        }
        for (_, text) in before.iter().filter(|(key, _)| !now.contains_key(*key)) {
            self.say(Level::Notice, session, "over", &format!("over: {text}"));
        }
        if !now.is_empty() {
            let now = now.into_iter().map(|(key, (_, text))| (key, text.clone()));
            self.standing.insert(session.into(), now.collect());
        }
    }

    /// Sessions that are no longer there have no problem any more.
    pub(super) fn keep_only(&mut self, is_there: impl Fn(&str) -> bool) {
        self.standing.retain(|name, _| name.is_empty() || is_there(name));
    }

    /// How many things are not as they must be.
    pub(super) fn problems(&self) -> usize {
        self.standing.values().map(BTreeMap::len).sum()
    }
}

/// The same line with other numbers in it tells the same.
pub(super) fn numberless(text: &str) -> String {
    let is_number =
        |word: &str| word.trim_matches(|c: char| c.is_ascii_punctuation()).bytes().all(|b| b.is_ascii_digit());
    text.split_whitespace().map(|word| if is_number(word) { "#" } else { word }).collect::<Vec<_>>().join(" ")
}

/// Does standard error end in the journal? JOURNAL_STREAM has its device and inode, as systemd.exec(5) says.
fn is_journal() -> bool {
    let stream = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    std::fs::metadata("/proc/self/fd/2").is_ok_and(|at| stream == format!("{}:{}", at.dev(), at.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_trouble_with_other_numbers_is_the_same() {
        assert_eq!(numberless("tap eth0 ingress: 12 packets, 7 seen"), "tap eth0 ingress: # packets, # seen");
        assert_ne!(numberless("remote 10.0.0.7: gone"), numberless("remote 10.0.0.8: gone"));
        assert_ne!(numberless("tap eth0: x"), numberless("tap eth1: x"));
    }
}
