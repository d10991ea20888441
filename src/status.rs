//! What the kernel says of the sessions: decoded from the pinned maps, the hooks and the links, never remembered.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::abi::{self, Config, Remote, Stat, Tap, TapKey};
use crate::bpftool::{self, Attachment, Row};
use crate::exec::Shell;
use crate::ip::{self, Link};
use crate::plan::{Oversize, Plan, Tunnel};
use crate::state::Home;
use crate::tc;

/// What a session remembers of its making: the request, and what the out interface had dropped before.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Memory {
    pub plan: Plan,
    /// Packets dropped by the out interface and its qdiscs before the session, by interface name.
    pub dropped_before: BTreeMap<String, u64>,
}

#[derive(Debug, Serialize)]
pub struct Status {
    pub sessions: Vec<Session>,
}

/// One session. Counters are of wire frames and their bytes.
#[derive(Debug, Serialize)]
pub struct Session {
    pub name: String,
    pub tunnel: Tunnel,
    pub oversize: Oversize,
    pub taps: Vec<TapStatus>,
    pub remotes: Vec<RemoteStatus>,
    /// Copies that did not arrive, by reason. `out` is all that the out interfaces dropped since `up`, whoever sent it.
    pub drops: BTreeMap<String, u64>,
    #[serde(skip)]
    pub plan: Plan,
    /// The relay and its programs are there.
    #[serde(skip)]
    pub relayed: bool,
}

/// `pcnt` frames were to be copied, `dcnt` of them were dropped by our programs.
#[derive(Debug, Serialize)]
pub struct TapStatus {
    pub interface: String,
    pub direction: &'static str,
    /// What the kernel says: our program is at this hook.
    pub attached: bool,
    pub stat: Stat,
}

/// `pcnt` copies were handed to the out interface, `dcnt` were dropped by our programs before.
#[derive(Debug, Serialize)]
pub struct RemoteStatus {
    pub address: Ipv4Addr,
    pub source: Ipv4Addr,
    pub interface: String,
    /// Of the next hop; `null` while it does not answer.
    pub mac: Option<String>,
    /// Bytes of the largest outer IP packet.
    pub mtu: u32,
    pub stat: Stat,
    #[serde(skip)]
    pub raw: Remote,
}

impl Session {
    /// Everything that `up` made is in place.
    pub fn is_complete(&self) -> bool {
        self.relayed && !self.remotes.is_empty() && self.taps.iter().all(|tap| tap.attached)
    }
}

/// The maps of a session that say something, by name, as they are pinned. `scratch`, working memory, is not one.
pub const MAPS: [&str; 9] = [
    "config",
    "drops",
    "remote_state",
    "remote_stats",
    "remotes",
    "request",
    "slots",
    "taps",
    "tunnels",
];

/// A pinned map, from `bpftool map show`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Map {
    #[serde(default)]
    pub name: String,
    pub id: u32,
    #[serde(rename = "type")]
    pub kind: String,
    pub bytes_key: u32,
    pub bytes_value: u32,
    pub max_entries: u32,
    /// Where it is pinned.
    #[serde(default)]
    pub pinned: String,
}

fn map_path(home: &Home, session: &str, map: &str) -> PathBuf {
    home.session(session).join("maps").join(map)
}

/// The maps of a session.
pub fn maps(shell: &Shell, home: &Home, session: &str) -> Result<Vec<Map>> {
    let paths = MAPS.map(|map| map_path(home, session, map));
    let lines: Vec<String> = paths
        .iter()
        .map(|path| format!("map show pinned {}", path.display()))
        .collect();
    let answers = bpftool::ask(shell, &lines)?;
    let named = answers.into_iter().zip(MAPS).zip(&paths);
    named
        .map(|((answer, name), path)| {
            let map: Map = serde_json::from_value(answer).context("bpftool map gave JSON of another form")?;
            Ok(Map {
                name: name.into(),
                pinned: path.display().to_string(),
                ..map
            })
        })
        .collect()
}

/// Dumps of these maps, as bpftool gives them. Of the arrays by remote slot only the slots that hold a remote.
pub fn dumps(shell: &Shell, home: &Home, session: &str, names: &[&str]) -> Result<Vec<Value>> {
    let asked = names.iter().chain(&["remotes"]);
    let lines: Vec<String> = asked
        .map(|map| bpftool::dump_question(&map_path(home, session, map)))
        .collect();
    let mut answers = bpftool::ask(shell, &lines)?;
    let remotes = answers.pop().unwrap_or_default();
    let used: Vec<&Value> = remotes
        .as_array()
        .into_iter()
        .flatten()
        .map(|row| &row["key"])
        .collect();
    for (answer, _) in answers
        .iter_mut()
        .zip(names)
        .filter(|(_, name)| ["remote_stats", "remote_state"].contains(name))
    {
        if let Some(rows) = answer.as_array_mut() {
            rows.retain(|row| used.contains(&&row["key"]));
        }
    }
    Ok(answers)
}

/// Every session of this namespace, or the one called `name`.
pub fn status(shell: &Shell, home: &Home, name: Option<&str>) -> Result<Status> {
    let names = home.sessions();
    if let Some(name) = name.filter(|name| !names.iter().any(|known| known == name)) {
        anyhow::bail!("no session {name} is up; {}", known_sessions(&names));
    }
    let chosen = names.iter().filter(|known| name.is_none_or(|name| name == *known));
    let links = ip::links(shell)?;
    Ok(Status {
        sessions: chosen
            .map(|name| session(shell, home, name, &links))
            .collect::<Result<_>>()?,
    })
}

fn known_sessions(names: &[String]) -> String {
    match names {
        [] => "start one with: snifctl up IFACE --tunnel gre --remote ADDR".into(),
        names => format!("these are: {}", names.join(", ")),
    }
}

/// One session, as the kernel has it.
pub fn session(shell: &Shell, home: &Home, name: &str, links: &[Link]) -> Result<Session> {
    let kernel = Kernel::ask(shell, home, name)?;
    let plan = kernel.memory.plan.clone();
    let remotes = kernel.remotes(links)?;
    let mut drops = kernel.drops()?;
    drops.insert("relay".into(), kernel.relay_drops(links));
    drops.insert("out".into(), out_drops(shell, &remotes, links, &kernel.memory)?);
    Ok(Session {
        name: name.to_string(),
        tunnel: plan.tunnel,
        oversize: plan.oversize,
        taps: kernel.taps(links)?,
        relayed: kernel.is_relayed(links),
        remotes,
        drops,
        plan,
    })
}

/// The answers about one session, taken in one bpftool.
struct Kernel {
    program_ids: Vec<u32>,
    attachments: Vec<Attachment>,
    memory: Memory,
    config: Config,
    taps: Vec<Row>,
    remotes: Vec<Row>,
    remote_stats: Vec<Row>,
    drops: Value,
}

impl Kernel {
    fn ask(shell: &Shell, home: &Home, name: &str) -> Result<Kernel> {
        let dir = home.session(name);
        let mut lines: Vec<String> = crate::session::PROGRAMS
            .map(|prog| format!("prog show pinned {}", dir.join(prog).display()))
            .to_vec();
        lines.push(bpftool::NET_QUESTION.into());
        let maps = ["request", "config", "taps", "remotes", "remote_stats", "drops"];
        lines.extend(maps.map(|map| bpftool::dump_question(&dir.join("maps").join(map))));
        let answers = bpftool::ask(shell, &lines).with_context(|| {
            format!("session {name} is not whole, some of its pins are gone; clean up with: snifctl down --name {name}")
        })?;
        let (programs, rest) = answers.split_at(crate::session::PROGRAMS.len());
        let mut dumps = rest[1..].iter();
        let mut next = || bpftool::rows(dumps.next().context("a dump is missing")?);
        let (request, config) = (next()?, next()?);
        let config = config.first().context("the session has no configuration")?;
        Ok(Kernel {
            program_ids: programs
                .iter()
                .filter_map(|program| program["id"].as_u64())
                .map(|id| id as u32)
                .collect(),
            attachments: bpftool::attachments(&rest[0])?,
            memory: memory(request)?,
            config: Config::decode(config.value()?)?,
            taps: next()?,
            remotes: next()?,
            remote_stats: next()?,
            drops: bpftool::formatted(&rest[6]),
        })
    }

    /// Is one of this session's programs at this hook?
    fn is_attached(&self, ifindex: u32, hook: &str) -> bool {
        self.attachments
            .iter()
            .any(|at| at.ifindex == ifindex && at.kind.ends_with(hook) && self.program_ids.contains(&at.id))
    }

    fn taps(&self, links: &[Link]) -> Result<Vec<TapStatus>> {
        let mut taps = self
            .taps
            .iter()
            .map(|row| {
                let cpus = row
                    .values
                    .iter()
                    .map(|value| Tap::decode(value))
                    .collect::<Result<Vec<_>>>()?;
                let slot = cpus.first().map_or(0, |tap| tap.slot);
                Ok((
                    slot,
                    TapKey::decode(&row.key)?,
                    Stat::sum(cpus.iter().map(|tap| tap.stat)),
                ))
            })
            .collect::<Result<Vec<_>>>()?;
        taps.sort_by_key(|(slot, ..)| *slot);
        let describe = |(_, key, stat): (u32, TapKey, Stat)| TapStatus {
            interface: name_of(links, key.ifindex),
            direction: key.direction.hook(),
            attached: self.is_attached(key.ifindex, key.direction.hook()),
            stat,
        };
        Ok(taps.into_iter().map(describe).collect())
    }

    fn remotes(&self, links: &[Link]) -> Result<Vec<RemoteStatus>> {
        let mut remotes = self
            .remotes
            .iter()
            .map(|row| Ok((row.index()?, row)))
            .collect::<Result<Vec<_>>>()?;
        remotes.sort_by_key(|(slot, _)| *slot);
        remotes
            .into_iter()
            .map(|(slot, row)| self.remote(slot, Remote::decode(row.value()?)?, links))
            .collect()
    }

    fn remote(&self, slot: u32, raw: Remote, links: &[Link]) -> Result<RemoteStatus> {
        let ip: [u8; 20] = raw.outer_ip()[..20].try_into()?;
        let row = self
            .remote_stats
            .iter()
            .find(|row| row.index().is_ok_and(|index| index == slot));
        let stats = row.map(|row| {
            row.values
                .iter()
                .map(|value| Stat::decode(value))
                .collect::<Result<Vec<_>>>()
        });
        let resolved = raw.flags & abi::remote_flag::UNRESOLVED == 0;
        Ok(RemoteStatus {
            address: Ipv4Addr::new(ip[16], ip[17], ip[18], ip[19]),
            source: Ipv4Addr::new(ip[12], ip[13], ip[14], ip[15]),
            interface: name_of(links, raw.ifindex),
            mac: resolved.then(|| mac_text(&raw.outer()[..6])),
            mtu: raw.mtu,
            stat: Stat::sum(stats.transpose()?.unwrap_or_default()),
            raw,
        })
    }

    fn drops(&self) -> Result<BTreeMap<String, u64>> {
        let counters = self.drops[0]["value"]
            .as_object()
            .context("the drop counters have no names: is BTF missing?")?;
        Ok(counters
            .iter()
            .map(|(reason, count)| (reason.clone(), count.as_u64().unwrap_or(0)))
            .collect())
    }

    /// The relay belongs to the session, so what its two ends lost are copies.
    fn relay_drops(&self, links: &[Link]) -> u64 {
        let find = |ifindex| {
            links
                .iter()
                .find(|link| link.ifindex == ifindex)
                .map(|link| link.stats64)
        };
        find(self.config.relay).map_or(0, |stats| stats.tx.dropped) + find(self.config.peer).map_or(0, |s| s.tx.dropped)
    }

    fn is_relayed(&self, links: &[Link]) -> bool {
        let hooks = [
            (self.config.relay, "egress"),
            (self.config.peer, "ingress"),
            (self.config.peer, "egress"),
        ];
        let up = |ifindex| links.iter().any(|link| link.ifindex == ifindex && link.is_up());
        hooks
            .iter()
            .all(|(ifindex, hook)| up(*ifindex) && self.is_attached(*ifindex, hook))
    }
}

fn memory(mut rows: Vec<Row>) -> Result<Memory> {
    rows.sort_by_key(|row| row.index().unwrap_or(u32::MAX));
    let chunks = rows
        .iter()
        .map(|row| Ok(row.value()?.to_vec()))
        .collect::<Result<Vec<_>>>()?;
    serde_json::from_str(&abi::decode_request(&chunks)?).context("the session's request cannot be read")
}

fn name_of(links: &[Link], ifindex: u32) -> String {
    let link = links.iter().find(|link| link.ifindex == ifindex);
    link.map_or_else(|| format!("(gone: index {ifindex})"), |link| link.ifname.clone())
}

/// `02:00:00:00:00:01`.
pub fn mac_text(bytes: &[u8]) -> String {
    bytes
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<Vec<_>>()
        .join(":")
}

/// What an interface and its qdiscs have dropped on the way out since it exists.
pub fn dropped_by(shell: &Shell, link: &Link) -> Result<u64> {
    let hooks = tc::hooks(shell, &[&link.ifname])?;
    Ok(link.stats64.tx.dropped + hooks.first().map_or(0, tc::qdisc_drops))
}

fn out_drops(shell: &Shell, remotes: &[RemoteStatus], links: &[Link], memory: &Memory) -> Result<u64> {
    let mut total = 0;
    let mut seen = Vec::new();
    for link in links
        .iter()
        .filter(|link| remotes.iter().any(|remote| remote.raw.ifindex == link.ifindex))
    {
        if !seen.contains(&link.ifindex) {
            seen.push(link.ifindex);
            let before = memory.dropped_before.get(&link.ifname).copied().unwrap_or(0);
            total += dropped_by(shell, link)?.saturating_sub(before);
        }
    }
    Ok(total)
}
