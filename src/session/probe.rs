//! `--probe icmp`: are the remotes there? Asked from the outer source, as copies are sent.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::tools::exec::Runner;
use crate::tools::ping;

/// Which of these remotes answer, each with the source of its copies: one ping each, all at the same time.
pub(crate) fn answers(runner: &Runner, remotes: &[(IpAddr, IpAddr)], tos: u8) -> BTreeMap<IpAddr, bool> {
    std::thread::scope(|scope| {
        let ask = |(remote, source): (IpAddr, IpAddr)| {
            (remote, scope.spawn(move || ping::answers(runner, remote, source, tos)))
        };
        let asked: Vec<_> = remotes.iter().copied().map(ask).collect();
        asked.into_iter().map(|(remote, answer)| (remote, answer.join().unwrap_or(false))).collect()
    })
}

/// Those that are silent twice in a row, as one packet can be lost on the way. Once is enough for those that `were_silent`.
pub(crate) fn silent(
    runner: &Runner,
    remotes: &[(IpAddr, IpAddr)],
    tos: u8,
    were_silent: impl Fn(&IpAddr) -> bool,
) -> Vec<IpAddr> {
    let mut answers = self::answers(runner, remotes, tos);
    let again = remotes.iter().copied().filter(|(remote, _)| !answers[remote] && !were_silent(remote));
    let again: Vec<(IpAddr, IpAddr)> = again.collect();
    answers.extend(self::answers(runner, &again, tos));
    answers.into_iter().filter(|(_, answers)| !answers).map(|(remote, _)| remote).collect()
}
