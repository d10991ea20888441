//! The remotes of a session: their slots, the flow table, and changes while it runs. Every change is one atomic map
//! write after another, in an order in which no copy for another remote is lost or sent twice.

use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::datapath::abi::{self, BUCKETS, Config, MAX_REMOTES, Remote, SPREAD_BYTES, Stat};
use crate::datapath::template::{self, Outer};
use crate::request::{self, Plan};
use crate::session::home::{self, Home};
use crate::session::make;
use crate::session::read::{self, Memory, RemoteStatus, Session};
use crate::session::resolve;
use crate::tools::bpftool;
use crate::tools::exec::Runner;
use crate::tools::ip;

/// The batch lines that write a remote: first how to know its packets, then its out interface, then the remote itself,
/// which names the interface by the one of its two keys that the row `before` does not use.
pub fn updates(maps: &Path, slot: u32, outer: &Outer, before: Option<&RemoteStatus>) -> Vec<String> {
    let key = slot.to_ne_bytes();
    let mut lines = Vec::new();
    if !outer.source.is_unspecified() {
        let tunnel = abi::tunnel_key(outer.source, outer.remote);
        lines.push(bpftool::update(&maps.join("tunnels"), &tunnel, &key));
    }
    let [first, second] = abi::device::of_remote(slot);
    let device = if before.is_some_and(|before| before.raw.device == first) { second } else { first };
    if let Some(path) = &outer.path {
        let row = u32::from(device).to_ne_bytes();
        lines.push(bpftool::update(&maps.join("devices"), &row, &path.ifindex.to_ne_bytes()));
    }
    let remote = Remote { device, ..template::remote(outer) };
    lines.push(bpftool::update(&maps.join("remotes"), &key, &remote.encode()));
    lines
}

/// The batch line after which packets between the remote and its source are no longer known as ours.
pub fn forget_tunnel(maps: &Path, remote: &RemoteStatus) -> Option<String> {
    let key = abi::tunnel_key(remote.source?, remote.address);
    Some(bpftool::delete(&maps.join("tunnels"), &key))
}

/// The remote slot of each bucket: the remote that scores highest for it. So a remote that goes takes only its own
/// buckets with it, and a new one takes an equal share from each (rendezvous hashing, Thaler and Ravishankar 1998).
pub fn spread(remotes: &[(u32, IpAddr)]) -> Vec<u8> {
    let winner = |bucket: usize| {
        let best = remotes.iter().max_by_key(|(_, address)| score(bucket as u64, *address));
        best.map_or(0, |(slot, _)| *slot as u8)
    };
    (0..BUCKETS).map(winner).collect()
}

/// A well-mixed number from a bucket and an address (FNV-1a over the address, finished by splitmix64).
fn score(bucket: u64, address: IpAddr) -> u64 {
    let text = abi::tunnel_key(address, address);
    let seed = text[..16]
        .iter()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
    let mut mixed = seed ^ bucket.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// The batch lines that write a flow table, only where it differs from the one `before`.
pub fn spread_updates(maps: &Path, table: &[u8], before: Option<&[u8]>) -> Vec<String> {
    let changed = |(at, chunk): &(u32, &[u8])| {
        before.is_none_or(|before| &before[*at as usize * SPREAD_BYTES..][..SPREAD_BYTES] != *chunk)
    };
    let chunks = (0..).zip(table.chunks(SPREAD_BYTES)).filter(changed);
    chunks.map(|(at, chunk)| bpftool::update(&maps.join("spread"), &at.to_ne_bytes(), chunk)).collect()
}

/// A running session, open for a change. The caller holds the lock.
struct Running {
    session: Session,
    home: Home,
}

impl Running {
    fn open(runner: &Runner, home: Home, name: Option<&str>) -> Result<Running> {
        let name = home::chosen(&home, name)?;
        let session = read::session(runner, &home, &name, &ip::links(runner)?)?;
        Ok(Running { session, home })
    }

    fn slots(&self) -> Vec<(u32, IpAddr)> {
        self.session.remotes.iter().map(|remote| (remote.slot, remote.address)).collect()
    }

    fn find(&self, address: IpAddr) -> Option<&RemoteStatus> {
        self.session.remotes.iter().find(|remote| remote.address == address)
    }

    /// The lines after which exactly these slots get copies and the session remembers so. The last one decides; a flow
    /// table that is ahead of it names only slots that are written.
    fn switch(&self, maps: &Path, slots: &[(u32, IpAddr)], memory: &Memory, config: &Config) -> Result<Vec<String>> {
        let mut lines = spread_updates(maps, &spread(slots), Some(&spread(&self.slots())));
        let set = slots.iter().fold(0, |set, (slot, _)| set | 1 << slot);
        lines.extend(memory.updates(maps, &Config { remotes: set, ..*config })?);
        Ok(lines)
    }

    fn memory(&self, change: impl FnOnce(&mut Plan)) -> Memory {
        let mut memory = self.session.memory.clone();
        change(&mut memory.plan);
        memory
    }

    fn maps(&self) -> std::path::PathBuf {
        self.home.session(&self.session.name).join("maps")
    }
}

/// Adds a remote to a running session: written whole before the first copy can name it. Returns warnings.
pub fn add(runner: &Runner, text: &str, name: Option<&str>) -> Result<Vec<String>> {
    let address = request::remote(text)?;
    let (home, _lock) = make::lock_to_change(runner)?;
    let added = add_locked(runner, home.clone(), address, name);
    home.remove_if_empty();
    added
}

fn add_locked(runner: &Runner, home: Home, address: IpAddr, name: Option<&str>) -> Result<Vec<String>> {
    let running = Running::open(runner, home, name)?;
    let (session, maps) = (&running.session, running.maps());
    ensure!(
        running.find(address).is_none(),
        "remote {address} is already one of session {}; see: snifctl remote list --name {0}",
        session.name
    );
    let mut slots = running.slots();
    let free = (0..MAX_REMOTES as u32).find(|slot| slots.iter().all(|(taken, _)| taken != slot));
    let slot = free.with_context(|| {
        format!(
            "session {} has {MAX_REMOTES} remotes, which is all it can; start another with: snifctl up --name OTHER",
            session.name
        )
    })?;
    let only = Plan { remotes: vec![address], ..session.memory.plan.clone() };
    let links = ip::links(runner)?;
    let resolved = resolve::resolve(runner, &only, &links)?;
    let memory = running.memory(|plan| {
        plan.remotes.retain(|known| *known != address);
        plan.remotes.push(address);
    });
    slots.push((slot, address));
    let mut lines = vec![
        bpftool::update(&maps.join("remote_stats"), &slot.to_ne_bytes(), &[0; 24]),
        bpftool::update(&maps.join("remote_state"), &slot.to_ne_bytes(), &[0; 16]),
    ];
    lines.extend(make::implied(runner, &maps, &resolved, &session.outs)?);
    lines.extend(updates(&maps, slot, &resolved.remotes[0].outer, None));
    let config = Config { carriers: session.config.carriers || !resolved.carriers.is_empty(), ..session.config };
    lines.extend(running.switch(&maps, &slots, &memory, &config)?);
    bpftool::batch(runner, &lines)?;
    Ok(resolved.warnings)
}

/// Removes a remote from a running session: its flows go elsewhere first.
pub fn remove(runner: &Runner, text: &str, name: Option<&str>) -> Result<()> {
    let address: IpAddr = request::remote(text)?;
    let (home, _lock) = make::lock_to_change(runner)?;
    let removed = remove_locked(runner, home.clone(), address, name);
    home.remove_if_empty();
    removed
}

fn remove_locked(runner: &Runner, home: Home, address: IpAddr, name: Option<&str>) -> Result<()> {
    let running = Running::open(runner, home, name)?;
    let (session, maps) = (&running.session, running.maps());
    let gone = session.remotes.iter().chain(&session.leftovers).find(|remote| remote.address == address);
    if gone.is_none() && !session.memory.plan.remotes.contains(&address) {
        let known: Vec<String> = running.slots().iter().map(|(_, address)| address.to_string()).collect();
        bail!("remote {address} is not one of session {}, which has: {}", session.name, known.join(", "));
    }
    let mut slots = running.slots();
    slots.retain(|(_, known)| *known != address);
    ensure!(
        !slots.is_empty(),
        "remote {address} is the only one of session {0}; add another first, or end the session with: snifctl down --name {0}",
        session.name
    );
    let mut memory = running.memory(|plan| plan.remotes.retain(|remote| *remote != address));
    bpftool::batch(runner, &running.switch(&maps, &slots, &memory, &session.config)?)?;
    let Some(gone) = gone else { return Ok(()) };
    // Now that nothing counts for it any more, what it has counted goes into the session's memory.
    let counted = read::remote_stat(runner, &running.home, &session.name, gone.slot)?;
    memory.removed = Stat::sum([memory.removed, counted]);
    let running = Running::open(runner, running.home, Some(&session.name))?;
    bpftool::batch(runner, &forget(&maps, &running.session.config, &memory, gone)?)
}

/// The lines that take a remote without copies out of the maps. Its row goes last: as long as it is there, a removal that
/// failed half-way can be made again.
fn forget(maps: &Path, config: &Config, memory: &Memory, gone: &RemoteStatus) -> Result<Vec<String>> {
    let slot = gone.slot.to_ne_bytes();
    let mut lines = Vec::new();
    if let Some(source) = gone.source {
        // Written once more, so that deleting it cannot fail where an earlier try has done so.
        let key = abi::tunnel_key(source, gone.address);
        lines.push(bpftool::update(&maps.join("tunnels"), &key, &slot));
        lines.push(bpftool::delete(&maps.join("tunnels"), &key));
    }
    lines.extend(memory.updates(maps, config)?);
    lines.push(bpftool::update(&maps.join("remote_stats"), &slot, &[0; 24]));
    lines.push(bpftool::delete(&maps.join("remotes"), &slot));
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remotes(n: u8) -> Vec<(u32, IpAddr)> {
        (0..n).map(|i| (u32::from(i), IpAddr::from([10, 0, 0, i + 1]))).collect()
    }

    fn moved(a: &[u8], b: &[u8]) -> usize {
        a.iter().zip(b).filter(|(a, b)| a != b).count()
    }

    #[test]
    fn buckets_are_shared_evenly() {
        for n in [2u8, 5, 16, 64] {
            let table = spread(&remotes(n));
            let fair = BUCKETS / usize::from(n);
            for slot in 0..n {
                let share = table.iter().filter(|at| **at == slot).count();
                // Four standard deviations of a fair draw.
                let slack = 4.0 * (fair as f64).sqrt();
                assert!((share as f64 - fair as f64).abs() < slack, "{n} remotes, slot {slot}: {share}");
            }
        }
    }

    #[test]
    fn a_remote_that_goes_moves_only_its_own_buckets() {
        let all = remotes(5);
        let before = spread(&all);
        let after = spread(&[all[0], all[1], all[3], all[4]]);
        let own = before.iter().filter(|slot| **slot == 2).count();
        assert_eq!(moved(&before, &after), own);
    }

    #[test]
    fn a_new_remote_takes_about_its_share_and_nothing_else_moves() {
        let before = spread(&remotes(4));
        let after = spread(&remotes(5));
        let taken = after.iter().filter(|slot| **slot == 4).count();
        assert_eq!(moved(&before, &after), taken);
        assert!(taken.abs_diff(BUCKETS / 5) < BUCKETS / 25, "{taken}");
    }
}
