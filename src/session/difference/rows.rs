//! The rows that must be in the maps.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::datapath::abi::{self, BUCKETS, Config, Remote, SPREAD_BYTES, Tap, device};
use crate::datapath::parts::Map;
use crate::datapath::spread::spread;
use crate::datapath::template::{self, Outer};
use crate::request::{Rate, Request, Underlay};
use crate::session::change::Act;
use crate::session::clock;
use crate::session::difference::Wanted;
use crate::session::stored::{Silence, Stored};
use crate::session::there::{Rows, There, key};

/// The maps whose rows follow from the request and the machine, in the order in which they are written: a row is there
/// before what names it.
pub(super) const ORDER: [Map; 7] =
    [Map::Slots, Map::Taps, Map::Outs, Map::Underlay, Map::Tunnels, Map::Devices, Map::Remotes];

/// The rows that must be in the maps.
#[derive(Default)]
pub(super) struct Expected {
    rows: BTreeMap<Map, BTreeMap<Vec<u8>, Vec<u8>>>,
}

impl Expected {
    pub(super) fn of(wanted: &Wanted, stored: &Stored, there: &There, fresh: bool) -> Expected {
        let mut expected = Expected::default();
        let taps = if fresh { BTreeMap::new() } else { there.tap_rows() };
        for place in stored.interfaces.values() {
            for direction in place.watch.directions() {
                let (key, slot) = (key(place.ifindex, *direction), place.slot(*direction));
                expected.put(Map::Slots, slot.to_ne_bytes().to_vec(), key.encode());
                // The rows of a tap count: one with the right slot is left alone.
                let relay = place.guest.map_or(0, |guest| guest.relay);
                let is_right = |tap: &Tap| (tap.slot, tap.relay) == (slot, relay);
                if !taps.get(&(place.ifindex, *direction as u32)).is_some_and(is_right) {
                    expected.put(Map::Taps, key.encode(), Tap { slot, relay, ..Tap::default() }.encode());
                }
            }
        }
        for (ifindex, out) in &wanted.outs {
            let key = ifindex.to_ne_bytes();
            if fresh || there.value(Map::Outs, &key).is_none() {
                expected.put(Map::Outs, key.to_vec(), out.encode());
            }
        }
        for underlay in &wanted.underlay {
            expected.underlay(underlay);
        }
        for (address, outer) in &wanted.remotes {
            let Some(slot) = stored.remotes.get(address) else { continue };
            expected.remote(*slot, outer, if fresh { None } else { Some(there) });
        }
        expected
    }

    fn put(&mut self, map: Map, key: Vec<u8>, value: Vec<u8>) {
        self.rows.entry(map).or_default().insert(key, value);
    }

    pub(super) fn rows(&self, map: Map) -> BTreeMap<Vec<u8>, Vec<u8>> {
        self.rows.get(&map).cloned().unwrap_or_default()
    }

    /// One with a port is known in fragments, too, which have none.
    fn underlay(&mut self, underlay: &Underlay) {
        let Underlay::At(address, port) = underlay else { return };
        let mut put = |port, what: u32| {
            self.put(Map::Underlay, abi::underlay_key(*address, port), what.to_ne_bytes().to_vec());
        };
        match port {
            0 => put(0, abi::underlay::ANY),
            port => {
                put(*port, abi::underlay::ANY);
                put(0, abi::underlay::FRAGMENTS);
            }
        }
    }

    /// How to know a remote's packets, its out interface, and the remote itself, which names the interface by one of two
    /// keys in turn: so one write moves it to another.
    fn remote(&mut self, slot: u32, outer: &Outer, there: Option<&There>) {
        if !outer.source.is_unspecified() {
            let tunnel = abi::tunnel_key(outer.source, outer.remote);
            self.put(Map::Tunnels, tunnel, slot.to_ne_bytes().to_vec());
        }
        let [first, second] = device::of_remote(slot);
        let before = there.and_then(|there| there.remote_row(slot));
        let mut device = before.as_ref().map_or(first, |before| before.device);
        if ![first, second].contains(&device) {
            device = first;
        }
        if let Some(path) = &outer.path {
            let referred = there.and_then(|there| there.referred(device.into()));
            let moves = before.as_ref().is_some_and(|before| before.ifindex != path.ifindex && before.ifindex != 0);
            if moves && referred != Some(path.ifindex) {
                device = if device == first { second } else { first };
            }
            self.put(Map::Devices, u32::from(device).to_ne_bytes().to_vec(), path.ifindex.to_ne_bytes().to_vec());
        }
        let remote = Remote { device, ..template::remote(outer) };
        self.put(Map::Remotes, slot.to_ne_bytes().to_vec(), remote.encode());
    }
}

/// The writes after which these rows are in a map.
pub(super) fn writes(map: Map, there: &Rows, expected: &BTreeMap<Vec<u8>, Vec<u8>>) -> Vec<Act> {
    let differs = |(key, value): &(&Vec<u8>, &Vec<u8>)| there.get(*key).and_then(|cpus| cpus.first()) != Some(value);
    expected.iter().filter(differs).map(|(key, value)| Act::Write(map, key.clone(), value.clone())).collect()
}

/// The slots whose remotes get copies.
pub(super) fn slots(stored: &Stored, request: &Request) -> Vec<(u32, IpAddr)> {
    let remotes = request.options.remotes.iter();
    remotes.filter_map(|address| Some((*stored.remotes.get(address)?, *address))).collect()
}

/// The remotes that are down; of those that were not looked up, the ones that were.
pub(super) fn down(wanted: &Wanted, before: Option<&Stored>) -> BTreeMap<IpAddr, Silence> {
    let silence = |remote: &IpAddr| match wanted.remotes.contains_key(remote) {
        true => wanted.down.get(remote).copied(),
        false => before?.down.get(remote).copied(),
    };
    let remotes = wanted.request.options.remotes.iter();
    remotes.filter_map(|remote| Some((*remote, silence(remote)?))).collect()
}

/// The slots in use that get no copies, as their remotes are down or cannot be reached.
fn resting(wanted: &Wanted, stored: &Stored, before: &Config) -> u64 {
    let rests = |(slot, address): &(u32, IpAddr)| match wanted.remotes.get(address) {
        Some(outer) => wanted.down.contains_key(address) || template::remote(outer).has(abi::remote_flag::UNRESOLVED),
        None => before.down & 1 << slot != 0,
    };
    slots(stored, &wanted.request).iter().filter(|at| rests(at)).fold(0, |set, (slot, _)| set | 1 << slot)
}

/// The writes of the flow table's chunks that differ. A new table is all zeros. Flows go to the remotes that get copies;
/// where none does, each to the one that it would go to.
pub(super) fn spread_writes(stored: &Stored, request: &Request, down: u64, there: Option<&There>) -> Vec<Act> {
    let all = slots(stored, request);
    let up: Vec<(u32, IpAddr)> = all.iter().filter(|(slot, _)| down & 1 << slot == 0).copied().collect();
    let table = spread(if up.is_empty() { &all } else { &up });
    debug_assert_eq!(table.len(), BUCKETS);
    let differs = |at: u32, chunk: &[u8]| {
        let before = there.and_then(|there| there.value(Map::Spread, &at.to_ne_bytes()));
        before.unwrap_or(&[0; SPREAD_BYTES]) != chunk
    };
    let chunks = (0..).zip(table.chunks(SPREAD_BYTES)).filter(|(at, chunk)| differs(*at, chunk));
    chunks.map(|(at, chunk): (u32, &[u8])| Act::Write(Map::Spread, at.to_ne_bytes().to_vec(), chunk.to_vec())).collect()
}

/// The configuration, all but the numbers of the relay's devices, which are those of `before`.
pub(super) fn config(wanted: &Wanted, stored: &Stored, before: Option<&Config>) -> Config {
    let (request, options) = (&wanted.request, &wanted.request.options);
    let before = before.copied().unwrap_or(Config {
        clock: wanted.clock,
        // Which the first write turns to the first half.
        request: abi::REQUEST_CHUNKS as u16,
        ..Config::default()
    });
    let has_underlay = wanted.underlay.iter().any(|underlay| matches!(underlay, Underlay::At(..)));
    let clock = if options.tunnel.tells_time() { clock::kept(before.clock, wanted.clock) } else { before.clock };
    Config {
        clock,
        remotes: slots(stored, request).iter().fold(0, |set, (slot, _)| set | 1 << slot),
        rate: match options.max_rate {
            None => 0,
            Some(Rate::Bytes(amount) | Rate::Packets(amount)) => amount,
        },
        sample: options.sample.0,
        sample_flows: options.sample_flows.0,
        snaplen: options.snaplen.unwrap_or(0),
        oversize: options.oversize as u8,
        protocol: options.tunnel.protocol(),
        udp_port: options.tunnel.udp_port(),
        spread: options.spread as u8,
        underlay: has_underlay || (before.underlay && !wanted.is_whole_underlay),
        rate_packets: matches!(options.max_rate, Some(Rate::Packets(_))),
        gre: options.tunnel.gre(),
        keys: options.tunnel.keys(),
        profile: options.profile,
        down: resting(wanted, stored, &before),
        ..before
    }
}

/// The writes after which a remote slot has counted nothing.
pub(super) fn zeros(slot: u32) -> [Act; 2] {
    let key = slot.to_ne_bytes().to_vec();
    [Act::Write(Map::RemoteStats, key.clone(), vec![0; 24]), Act::Write(Map::RemoteState, key, vec![0; 16])]
}
