//! What out interfaces and their queues drop behind us. A program that ends in a redirect never learns of it, so this is
//! what the kernel counts of all their traffic, a super-packet once: a lower bound for copies where nobody else sends. It is
//! kept by ifindex in the session's maps, and never falls.

use std::path::Path;

use anyhow::Result;

use crate::datapath::abi::Out;
use crate::tools::bpftool;
use crate::tools::exec::Runner;
use crate::tools::ip::Link;
use crate::tools::tc;

/// What each of these interfaces says now: its own count, and that of its qdiscs.
fn counters(runner: &Runner, links: &[&Link]) -> Result<Vec<(u64, u64)>> {
    let names: Vec<&str> = links.iter().map(|link| link.ifname.as_str()).collect();
    let hooks = tc::hooks(runner, &names)?;
    let lost = |link: &Link| link.stats64.tx.dropped + link.stats64.tx.errors;
    Ok(links.iter().zip(&hooks).map(|(link, hooks)| (lost(link), tc::qdisc_drops(hooks))).collect())
}

fn update(maps: &Path, ifindex: u32, out: &Out) -> String {
    bpftool::update(&maps.join("outs"), &ifindex.to_ne_bytes(), &out.encode())
}

/// The batch lines that begin to count for interfaces which the session has not used yet.
pub fn meet<'a>(
    runner: &Runner,
    maps: &Path,
    known: &[(u32, Out)],
    outs: impl Iterator<Item = &'a Link>,
) -> Result<Vec<String>> {
    let mut new: Vec<&Link> = outs.filter(|out| known.iter().all(|(ifindex, _)| *ifindex != out.ifindex)).collect();
    new.sort_by_key(|link| link.ifindex);
    new.dedup_by_key(|link| link.ifindex);
    let begun = new.iter().zip(counters(runner, &new)?);
    Ok(begun.map(|(link, (device, queue))| update(maps, link.ifindex, &Out { device, queue, dropped: 0 })).collect())
}

/// Packets dropped since the session uses these interfaces. What has changed is written back, so that a count survives its
/// interface and its qdisc.
pub fn dropped(runner: &Runner, maps: &Path, known: &[(u32, Out)], links: &[Link]) -> Result<u64> {
    let there = known.iter().filter_map(|(at, out)| Some((links.iter().find(|link| link.ifindex == *at)?, *out)));
    let (there, before): (Vec<&Link>, Vec<Out>) = there.unzip();
    let mut lines = Vec::new();
    let mut sum: u64 = known.iter().map(|(_, out)| out.dropped).sum();
    for ((link, before), (device, queue)) in there.iter().zip(&before).zip(counters(runner, &there)?) {
        let now = before.now(device, queue);
        sum += now.dropped - before.dropped;
        if now != *before {
            lines.push(update(maps, link.ifindex, &now));
        }
    }
    if !lines.is_empty() {
        bpftool::batch(&Runner { dry_run: false, ..*runner }, &lines)?;
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_that_begins_again_takes_nothing_away() {
        let out = Out { device: 5, queue: 7, dropped: 0 };
        let out = out.now(6, 10);
        assert_eq!(out, Out { device: 6, queue: 10, dropped: 4 });
        assert_eq!(out.now(6, 2), Out { device: 6, queue: 2, dropped: 6 });
    }
}
