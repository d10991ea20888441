//! What a session remembers of itself, as JSON in its `request` map: the request, and what the rows of its maps stand for.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::datapath::abi::{Direction, Stat, TapCounts};
use crate::datapath::objects;
use crate::datapath::source;
use crate::request::{Request, Watch};
use crate::session::version::{self, Foreign};
use crate::tools::ip::Link;

/// Of the form of what is stored. Another one is not read; `down` takes such a session away all the same.
pub(crate) const VERSION: u32 = 1;

/// A session's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stored {
    pub version: u32,
    /// The version of snifctl that wrote it; empty before they did so.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub snifctl: String,
    pub request: Request,
    /// `apply` has made it: so `apply --prune` takes it away once no file has it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub applied: bool,
    /// The watched interfaces whose rows the maps have, by the name that the request has for them.
    pub interfaces: BTreeMap<String, Place>,
    /// The slot of each remote that has a row.
    pub remotes: BTreeMap<IpAddr, u32>,
    pub compiled: Compiled,
    /// The next hops that the kernel keeps fresh for us, by remote.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub neighbours: BTreeMap<IpAddr, Hop>,
    /// The remotes that are down: they get no copies until they answer.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub down: BTreeMap<IpAddr, Silence>,
    /// The counters of the remotes, and of the taps, that were removed.
    #[serde(default)]
    pub removed: Stat,
    #[serde(default)]
    pub removed_taps: TapCounts,
}

/// Why a remote is down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Silence {
    /// Its next hop was asked twice, and has not answered.
    Neighbour,
    /// The same of the remote itself, and ping.
    Ping,
}

impl fmt::Display for Silence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Silence::Neighbour => "its next hop does not answer",
            Silence::Ping => "it does not answer ping",
        })
    }
}

/// An entry of the neighbour table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hop {
    pub address: IpAddr,
    pub ifindex: u32,
    /// There was none before us.
    pub made: bool,
}

impl Hop {
    pub(crate) fn is_of(&self, other: &Hop) -> bool {
        (self.address, self.ifindex) == (other.address, other.ifindex)
    }
}

/// A watched interface in the maps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Place {
    pub ifindex: u32,
    /// Its taps have twice this number as slot, plus one for egress.
    pub number: u32,
    /// What was last said about, in bytes.
    pub mtu: u32,
    /// The directions whose rows count.
    pub watch: Watch,
    /// What the taps of an interface that had this name before have counted, by direction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<[TapCounts; 2]>,
    /// Packets that the interface had received and sent when its taps were attached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passed: Option<[u64; 2]>,
    /// The pattern of the request by which it is watched; none where it is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pattern: Option<String>,
    /// Where it is, if that is another network namespace: then its number is one of ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<Guest>,
}

/// An interface in another network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Guest {
    /// Of the namespace.
    pub inode: u64,
    pub ifindex: u32,
    /// The number of the device there that takes copies home.
    pub relay: u32,
}

impl Guest {
    pub(crate) fn of(link: &Link) -> Option<Guest> {
        let away = link.away.as_ref()?;
        Some(Guest { inode: away.inode, ifindex: away.ifindex, relay: away.relay })
    }
}

impl Place {
    pub(crate) fn slot(&self, direction: Direction) -> u32 {
        2 * self.number + direction as u32
    }

    pub(crate) fn before(&self, direction: Direction) -> TapCounts {
        self.before.map_or_else(TapCounts::default, |before| before[direction as usize])
    }
}

/// What the running programs were compiled with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Compiled {
    /// Of the filter's expression, 0 for none.
    pub filter: u64,
    /// `HAS_` names of `bpf/common.h`.
    pub features: Vec<String>,
    /// Stands for the C sources; 0 before it was noted.
    #[serde(default)]
    pub sources: u64,
}

impl Compiled {
    pub(crate) fn of(request: &Request) -> Compiled {
        let filter = mark(request.options.filter.as_deref());
        let features = objects::parts(request.features(), filter != 0);
        Compiled { filter, features, sources: source::mark() }
    }

    /// Are they made of the sources of this snifctl?
    pub(crate) fn is_ours(&self) -> bool {
        self.sources == source::mark()
    }

    /// Do the taps have this filter?
    pub(crate) fn has_filter(&self, expression: Option<&str>) -> bool {
        self.filter == mark(expression)
    }

    /// Can the programs do all that the request needs?
    pub(crate) fn can(&self, request: &Request) -> bool {
        request.features().iter().all(|feature| self.features.contains(feature))
    }
}

/// A number that stands for an expression.
fn mark(expression: Option<&str>) -> u64 {
    expression.map_or(0, |text| source::fnv(text.bytes()))
}

/// Why a session's memory cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Unreadable {
    Gone,
    OtherVersion(Foreign),
    Damaged(String),
}

impl Unreadable {
    /// What helps, as the end of a sentence about the session.
    pub(crate) fn help(&self, name: &str) -> String {
        match self {
            Unreadable::OtherVersion(foreign) => foreign.help(name),
            _ => format!("take it down, and start it again: snifctl down --name {name}"),
        }
    }
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unreadable::Gone => f.write_str("its request is gone"),
            Unreadable::OtherVersion(foreign) => foreign.fmt(f),
            Unreadable::Damaged(why) => write!(f, "its request cannot be read ({why})"),
        }
    }
}

impl Stored {
    pub(crate) fn new(request: Request) -> Stored {
        Stored {
            version: VERSION,
            snifctl: version::OURS.into(),
            compiled: Compiled::of(&request),
            request,
            applied: false,
            interfaces: BTreeMap::new(),
            remotes: BTreeMap::new(),
            neighbours: BTreeMap::new(),
            down: BTreeMap::new(),
            removed: Stat::default(),
            removed_taps: TapCounts::default(),
        }
    }

    /// Who writes it says who he is: a later version may have written what an older one does not know.
    pub(crate) fn encode(&self) -> String {
        let written = Stored { snifctl: version::OURS.into(), ..self.clone() };
        serde_json::to_string(&written).expect("a request is always JSON")
    }

    pub(crate) fn decode(json: &str) -> Result<Stored, Unreadable> {
        let damaged = |err: serde_json::Error| Unreadable::Damaged(err.to_string());
        let value: Value = serde_json::from_str(json).map_err(damaged)?;
        let foreign = Foreign::of(&value);
        if value["version"].as_u64() != Some(u64::from(VERSION)) {
            return Err(Unreadable::OtherVersion(foreign));
        }
        match serde_json::from_value(value) {
            // A value that only a newer one knows is no damage.
            Err(_) if foreign.is_newer() => Err(Unreadable::OtherVersion(foreign)),
            read => read.map_err(damaged),
        }
    }

    /// The newer version that has written it, which may have meant more than is read.
    pub(crate) fn newer(&self) -> Option<Foreign> {
        Some(Foreign::by(&self.snifctl)).filter(Foreign::is_newer)
    }

    /// The watched interface that has this number in the kernel.
    pub(crate) fn place(&self, ifindex: u32) -> Option<(&String, &Place)> {
        self.interfaces.iter().find(|(_, place)| place.ifindex == ifindex)
    }

    /// The entries of the neighbour table that are kept fresh for it, each once.
    pub(crate) fn hops(&self) -> Vec<Hop> {
        let mut hops: Vec<Hop> = Vec::new();
        for hop in self.neighbours.values() {
            if !hops.iter().any(|other| other.is_of(hop)) {
                hops.push(*hop);
            }
        }
        hops
    }

    /// The numbers that no interface has.
    pub(crate) fn free_numbers(&self) -> impl Iterator<Item = u32> + use<> {
        let taken: BTreeSet<u32> = self.interfaces.values().map(|place| place.number).collect();
        (0..).filter(move |number| !taken.contains(number))
    }

    /// The first slot that no remote has.
    pub(crate) fn free_slot(&self) -> u32 {
        (0..).find(|slot| self.remotes.values().all(|taken| taken != slot)).expect("numbers do not end")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::tests::request;

    #[test]
    fn what_is_stored_is_read_back() {
        let mut stored = Stored::new(request(&["eth0:ingress", "--filter", "udp", "--id", "7"]));
        stored.interfaces.insert(
            "eth0".into(),
            Place {
                ifindex: 2,
                number: 0,
                mtu: 1500,
                watch: Watch::Ingress,
                before: Some([TapCounts::default(); 2]),
                passed: Some([1, 2]),
                pattern: Some("eth*".into()),
                guest: Some(Guest { inode: 7, ifindex: 2, relay: 9 }),
            },
        );
        stored.remotes.insert([10, 0, 0, 7].into(), 3);
        let hop = Hop { address: [10, 0, 0, 1].into(), ifindex: 2, made: true };
        stored.neighbours.insert([10, 0, 0, 7].into(), hop);
        stored.down.insert([10, 0, 0, 7].into(), Silence::Ping);
        assert_eq!(Stored::decode(&stored.encode()), Ok(stored.clone()));
        // As it was before it said who wrote it, and what was compiled.
        let older = serde_json::json!({ "version": 1, "request": stored.request, "interfaces": {}, "remotes": {},
            "compiled": { "filter": stored.compiled.filter, "features": stored.compiled.features } });
        let read = Stored::decode(&older.to_string()).unwrap();
        assert_eq!((read.snifctl.as_str(), read.newer(), read.compiled.is_ours()), ("", None, false));
    }

    #[test]
    fn another_version_is_told_apart_from_damage() {
        let stored = Stored::new(request(&["eth0"])).encode();
        let told = |from: &str, to: &str| match Stored::decode(&stored.replacen(from, to, 1)) {
            Err(Unreadable::OtherVersion(foreign)) => foreign.to_string(),
            other => panic!("{to}: {other:?}"),
        };
        let (version, ours) = ("\"version\":1", version::OURS);
        let newer =
            format!("made by a newer snifctl ({ours}; this is {ours}, and does not know form 2 of what it stores)");
        assert_eq!(told(version, "\"version\":2"), newer);
        for none in ["\"version\":0", "\"version\":null", "\"plan\":1"] {
            assert_eq!(
                told(version, none),
                format!("made by an older snifctl, in a form that this one ({ours}) cannot read")
            );
        }
        let unknown = stored.replacen(&format!("\"snifctl\":\"{ours}\""), "\"snifctl\":\"99.1.0\"", 1);
        assert!(Stored::decode(&unknown).is_ok_and(|stored| stored.newer().is_some()));
        let unknown = unknown.replace("\"gre\"", "\"later\"");
        assert!(matches!(Stored::decode(&unknown), Err(Unreadable::OtherVersion(_))), "{unknown}");
        assert!(matches!(Stored::decode(&stored.replace("\"gre\"", "\"later\"")), Err(Unreadable::Damaged(_))));
        assert!(matches!(Stored::decode(&stored[..40]), Err(Unreadable::Damaged(_))));
        let more = stored.replace("\"version\":1", "\"version\":1,\"later\":true");
        assert!(Stored::decode(&more).is_ok(), "a field that is not known is passed over");
    }
}
