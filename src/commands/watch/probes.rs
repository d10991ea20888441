//! `--probe icmp`: the remotes are asked beside the looks, and a look is due where an answer is another than before.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use crate::session::probe;
use crate::session::there::There;
use crate::tools::exec::Runner;

use super::monitor::Event;

/// From one round to the next.
const EVERY: Duration = Duration::from_secs(2);
/// A remote is down after so many silent rounds in a row: one packet can be lost on the way.
const SILENT: u32 = 2;

/// Who answers, by session and remote.
pub(super) type Answers = BTreeMap<(String, IpAddr), bool>;

/// The remotes that are asked, and how they have answered.
#[derive(Debug, Default)]
pub(super) struct Probes {
    /// By session: its remotes with the sources of their copies, and the type of service.
    asked: BTreeMap<String, (Vec<(IpAddr, IpAddr)>, u8)>,
    /// Silent rounds in a row.
    silent: BTreeMap<(String, IpAddr), u32>,
    round: Option<(Instant, bool)>,
}

impl Probes {
    /// From now on these remotes of a session are asked.
    pub(super) fn ask(&mut self, name: &str, there: &There) {
        let remotes = there.probed();
        let tos = there.stored.as_ref().map_or(0, |stored| stored.request.options.outer.tos);
        self.silent.retain(|(of, remote), _| of != name || remotes.iter().any(|(asked, _)| asked == remote));
        match remotes.is_empty() {
            true => self.asked.remove(name),
            false => self.asked.insert(name.into(), (remotes, tos)),
        };
    }

    /// Only these sessions are there.
    pub(super) fn keep_only(&mut self, is_there: impl Fn(&String) -> bool) {
        self.asked.retain(|name, _| is_there(name));
        self.silent.retain(|(name, _), _| is_there(name));
    }

    /// What is known of a session's remotes; `None` where nothing is yet.
    pub(super) fn of(&self, name: &str) -> Option<BTreeMap<IpAddr, bool>> {
        let own = self.silent.iter().filter(|((of, _), _)| of == name);
        let known: BTreeMap<IpAddr, bool> = own.map(|((_, remote), silent)| (*remote, *silent < SILENT)).collect();
        (!known.is_empty()).then_some(known)
    }

    /// Begins a round where one is due; answers when the next is.
    pub(super) fn go_on(&mut self, runner: &Runner, now: Instant, events: &Sender<Event>) -> Option<Instant> {
        if self.asked.is_empty() {
            return None;
        }
        match self.round {
            Some((_, true)) => return None,
            Some((begun, false)) if now < begun + EVERY => return Some(begun + EVERY),
            _ => self.round = Some((now, true)),
        }
        let (asked, runner, events) = (self.asked.clone(), *runner, events.clone());
        std::thread::spawn(move || {
            let of = |(name, (remotes, tos)): (String, (Vec<(IpAddr, IpAddr)>, u8))| {
                let answers = probe::answers(&runner, &remotes, tos);
                answers.into_iter().map(move |(remote, answers)| ((name.clone(), remote), answers))
            };
            let _ = events.send(Event::Answered(asked.into_iter().flat_map(of).collect()));
        });
        None
    }

    /// A round has ended. Is a remote down now that was not, or the other way round?
    pub(super) fn answered(&mut self, answers: Answers) -> bool {
        self.round = self.round.map(|(begun, _)| (begun, false));
        let mut is_news = false;
        for (key, answers) in answers {
            let before = self.silent.get(&key).copied();
            let now = if answers { 0 } else { before.unwrap_or(0).saturating_add(1) };
            is_news |= before.is_some_and(|before| (before >= SILENT) != (now >= SILENT)) || before.is_none();
            self.silent.insert(key, now);
        }
        is_news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remote_is_down_after_two_silent_rounds_and_up_after_one_answer() {
        let mut probes = Probes::default();
        let key = ("a".to_string(), IpAddr::from([10, 0, 0, 7]));
        let mut round = |answers| (probes.answered([(key.clone(), answers)].into()), probes.of("a").unwrap()[&key.1]);
        let rounds = [true, false, true, false, false, false, true].map(&mut round);
        let seen =
            [(true, true), (false, true), (false, true), (false, true), (true, false), (false, false), (true, true)];
        assert_eq!(rounds, seen);
        assert_eq!(probes.of("b"), None);
    }
}
