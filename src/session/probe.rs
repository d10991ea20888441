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

/// Those that are silent twice in a row: one packet can be lost on the way.
pub(crate) fn silent(runner: &Runner, remotes: &[(IpAddr, IpAddr)], tos: u8) -> Vec<IpAddr> {
    let once = answers(runner, remotes, tos);
    let again: Vec<(IpAddr, IpAddr)> = remotes.iter().copied().filter(|(remote, _)| !once[remote]).collect();
    let twice = answers(runner, &again, tos);
    twice.into_iter().filter(|(_, answers)| !answers).map(|(remote, _)| remote).collect()
}
