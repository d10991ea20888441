//! What the kernel says of the sessions: decoded from the pinned maps, the hooks and the links, never remembered.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::datapath::abi::{self, Config, Direction, Out, Remote, Stat, Tap, TapCounts, TapKey};
use crate::datapath::template::{self, Outer};
use crate::request::{Oversize, Plan, Spread, Tunnel, Watched};
use crate::session::firewall::{self, Obstacle};
use crate::session::home::{Home, MAPS, PROGRAMS};
use crate::session::outs;
use crate::session::relay;
use crate::tools::bpftool::{self, Attachment, Row};
use crate::tools::exec::{Failed, Runner};
use crate::tools::ip::{self, Link};

/// What a session remembers: the request, and what it has counted of what it no longer has.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Memory {
    pub plan: Plan,
    /// The counters of the remotes, and of the taps, that were removed.
    pub removed: Stat,
    pub removed_taps: TapCounts,
    /// The ifindex of each watched interface, by the name that the request has for it.
    pub ifindexes: BTreeMap<String, u32>,
}

impl Memory {
    /// Does the session watch this interface and direction?
    pub fn watches(&self, key: &TapKey) -> bool {
        let is_it = |watched: &Watched| self.ifindexes.get(&watched.interface) == Some(&key.ifindex);
        self.plan
            .watched
            .iter()
            .any(|watched| is_it(watched) && watched.direction.directions().contains(&key.direction))
    }

    /// Calls interfaces that were renamed since by their new names.
    pub fn follow_names(&mut self, links: &[Link]) {
        for (name, ifindex) in self.ifindexes.clone() {
            let Some(link) = links.iter().find(|link| link.ifindex == ifindex) else { continue };
            if link.ifname == name || link.altnames.contains(&name) {
                continue;
            }
            self.ifindexes.remove(&name);
            self.ifindexes.insert(link.ifname.clone(), ifindex);
            self.plan.watched.iter_mut().filter(|watched| watched.interface == name).for_each(|watched| {
                watched.interface = link.ifname.clone();
            });
        }
    }

    /// The batch lines that write it into a session's maps, ending with the one write that puts it and `config` in
    /// force: before that, the session is as it was.
    pub fn updates(&self, maps: &Path, config: &Config) -> Result<Vec<String>> {
        let chunks = abi::encode_request(&serde_json::to_string(self)?)?;
        let free = if config.request == 0 { abi::REQUEST_CHUNKS as u16 } else { 0 };
        let line = |(at, chunk): (u32, &Vec<u8>)| bpftool::update(&maps.join("request"), &at.to_ne_bytes(), chunk);
        let mut lines: Vec<String> = (u32::from(free)..).zip(&chunks).map(line).collect();
        let config = Config { request: free, ..*config };
        lines.push(bpftool::update(&maps.join("config"), &[0; 4], &config.encode()));
        Ok(lines)
    }
}

#[derive(Debug, Serialize)]
pub struct Status {
    pub sessions: Vec<Session>,
}

/// One session. Counters are of copies of wire frames and their bytes.
#[derive(Debug, Serialize)]
pub struct Session {
    pub name: String,
    pub tunnel: Tunnel,
    pub oversize: Oversize,
    pub spread: Spread,
    pub filter: Option<String>,
    /// One of so many packets, and of so many flows, is copied.
    pub sample: u32,
    pub sample_flows: u32,
    pub snaplen: Option<u32>,
    /// In tc's units.
    pub max_rate: Option<String>,
    pub taps: Vec<TapStatus>,
    pub remotes: Vec<RemoteStatus>,
    /// The counters of remotes that the session no longer has, together.
    pub removed: Stat,
    /// The counters of taps that the session no longer has, together.
    pub removed_taps: TapCounts,
    /// Copies that were not sent, by reason.
    pub drops: BTreeMap<String, u64>,
    /// Packets of any sender that the out interfaces and their queues have dropped while the session used them.
    pub out_dropped: u64,
    /// What is wrong with the relay.
    pub faults: Vec<String>,
    /// Remotes that are written but get no copies: a change ended half-way.
    #[serde(skip)]
    pub leftovers: Vec<RemoteStatus>,
    #[serde(skip)]
    pub memory: Memory,
    #[serde(skip)]
    pub config: Config,
    #[serde(skip)]
    pub outs: Vec<(u32, Out)>,
    /// Chains of the bridge family that can have dropped copies; looked for only where some were lost in the relay.
    #[serde(skip)]
    pub obstacles: Vec<Obstacle>,
    /// Programs at tcx hooks of the watched interfaces: `NAME at INTERFACE DIRECTION`.
    #[serde(skip)]
    pub tcx: Vec<String>,
}

/// `pcnt` frames were to be copied, `dcnt` of them were dropped by our programs. In frames of the interface, `seen` is
/// the sum of `filtered`, `skipped` and those that were to be copied.
#[derive(Debug, Serialize)]
pub struct TapStatus {
    pub interface: String,
    pub direction: &'static str,
    /// What the kernel says: our program is at this hook.
    pub attached: bool,
    #[serde(flatten)]
    pub counts: TapCounts,
    #[serde(skip)]
    pub slot: u32,
    #[serde(skip)]
    pub key: TapKey,
}

/// `pcnt` copies were handed to the out interface, `dcnt` were dropped by our programs before.
#[derive(Debug, Serialize)]
pub struct RemoteStatus {
    pub address: IpAddr,
    /// `null` without a route.
    pub source: Option<IpAddr>,
    pub interface: Option<String>,
    /// Of the next hop; `null` while it does not answer, and where the out interface has no Ethernet.
    pub mac: Option<String>,
    /// Bytes of the largest outer IP packet.
    pub mtu: u32,
    pub stat: Stat,
    /// The out interface is the one that was found at `up`, not another that has its number now.
    #[serde(skip)]
    pub referred: bool,
    #[serde(skip)]
    pub raw: Remote,
    #[serde(skip)]
    pub slot: u32,
}

impl RemoteStatus {
    /// Is the remote written as `outer` wants it?
    pub fn is_as(&self, outer: &Outer) -> bool {
        let wanted = Remote { device: self.raw.device, ..template::remote(outer) };
        self.raw == wanted && (self.referred || outer.path.is_none())
    }
}

impl Session {
    /// Everything that `up` made is in place.
    pub fn is_complete(&self) -> bool {
        self.faults.is_empty() && self.has_all_rows() && self.taps.iter().all(|tap| tap.attached)
    }

    /// The maps have a row for each tap and each remote of the request.
    pub fn has_all_rows(&self) -> bool {
        let taps: usize = self.memory.plan.watched.iter().map(|watched| watched.direction.directions().len()).sum();
        self.taps.len() == taps && self.remotes.len() == self.memory.plan.remotes.len()
    }
}

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
pub fn maps(runner: &Runner, home: &Home, session: &str) -> Result<Vec<Map>> {
    let paths = MAPS.map(|map| map_path(home, session, map));
    let lines: Vec<String> = paths.iter().map(|path| format!("map show pinned {}", path.display())).collect();
    let answers = bpftool::ask(runner, &lines)?;
    let named = answers.into_iter().zip(MAPS).zip(&paths);
    named
        .map(|((answer, name), path)| {
            let map: Map = serde_json::from_value(answer).context("bpftool map gave JSON of another form")?;
            Ok(Map { name: name.into(), pinned: path.display().to_string(), ..map })
        })
        .collect()
}

/// Dumps of these maps, as bpftool gives them. Of the arrays by remote slot only the slots that hold a remote.
pub fn dumps(runner: &Runner, home: &Home, session: &str, names: &[&str]) -> Result<Vec<Value>> {
    let asked = names.iter().chain(&["remotes"]);
    let lines: Vec<String> = asked.map(|map| bpftool::dump_question(&map_path(home, session, map))).collect();
    let mut answers = bpftool::ask(runner, &lines)?;
    let remotes = answers.pop().unwrap_or_default();
    let used: Vec<&Value> = remotes.as_array().into_iter().flatten().map(|row| &row["key"]).collect();
    for (answer, _) in answers.iter_mut().zip(names).filter(|(_, name)| ["remote_stats", "remote_state"].contains(name))
    {
        if let Some(rows) = answer.as_array_mut() {
            rows.retain(|row| used.contains(&&row["key"]));
        }
    }
    Ok(answers)
}

/// Every session of this namespace, or the one called `name`.
pub fn status(runner: &Runner, home: &Home, name: Option<&str>) -> Result<Status> {
    let names = home.sessions();
    if let Some(name) = name.filter(|name| !names.iter().any(|known| known == name)) {
        anyhow::bail!("no session {name} is up; {}", known_sessions(&names));
    }
    let chosen = names.iter().filter(|known| name.is_none_or(|name| name == *known));
    let links = ip::links(runner)?;
    Ok(Status { sessions: chosen.map(|name| session(runner, home, name, &links)).collect::<Result<_>>()? })
}

fn known_sessions(names: &[String]) -> String {
    match names {
        [] => "start one with: snifctl up IFACE --tunnel gre --remote ADDR".into(),
        names => format!("these are: {}", names.join(", ")),
    }
}

/// Puts the request back that `session` had, if a change has got as far as writing another.
pub fn restore_memory(runner: &Runner, home: &Home, session: &Session) -> Result<()> {
    let now = self::session(runner, home, &session.name, &ip::links(runner)?)?;
    if now.config == session.config {
        return Ok(());
    }
    let config = Config { request: now.config.request, ..session.config };
    bpftool::batch(runner, &session.memory.updates(&home.session(&session.name).join("maps"), &config)?)
}

/// The counters of one remote slot.
pub fn remote_stat(runner: &Runner, home: &Home, session: &str, slot: u32) -> Result<Stat> {
    let answers = bpftool::ask(runner, &[bpftool::dump_question(&map_path(home, session, "remote_stats"))])?;
    let rows = bpftool::rows(answers.first().context("bpftool gave no dump")?)?;
    slot_stat(&rows, slot)
}

fn slot_stat(rows: &[Row], slot: u32) -> Result<Stat> {
    let Some(row) = rows.iter().find(|row| row.index().is_ok_and(|index| index == slot)) else {
        return Ok(Stat::default());
    };
    let cpus = row.values.iter().map(|value| Stat::decode(value)).collect::<Result<Vec<_>>>()?;
    Ok(Stat::sum(cpus))
}

/// A session of which a part is gone: `up` makes it anew, `down` cleans it up.
#[derive(Debug)]
pub struct Broken {
    name: String,
    what: String,
}

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Broken { name, what } = self;
        write!(f, "session {name} is not whole: {what}; clean up with: snifctl down --name {name}")
    }
}

impl std::error::Error for Broken {}

fn ensure_pinned(home: &Home, name: &str) -> Result<(), Broken> {
    let dir = home.session(name);
    let programs = PROGRAMS.map(|program| dir.join(program));
    let maps = MAPS.map(|map| dir.join("maps").join(map));
    match programs.iter().chain(&maps).find(|pin| !pin.exists()) {
        Some(pin) => Err(Broken { name: name.into(), what: format!("{} is gone", pin.display()) }),
        None => Ok(()),
    }
}

/// One session, as the kernel has it. Fails with [`Broken`] where parts of it are gone.
pub fn session(runner: &Runner, home: &Home, name: &str, links: &[Link]) -> Result<Session> {
    ensure_pinned(home, name)?;
    let kernel = Kernel::ask(runner, home, name, links)?;
    let plan = &kernel.memory.plan;
    let in_use = |remote: &RemoteStatus| kernel.config.remotes & (1 << remote.slot) != 0;
    let (remotes, leftovers) = kernel.remotes(links)?.into_iter().partition(in_use);
    let (outs, drops) = (kernel.outs()?, kernel.drops()?);
    Ok(Session {
        name: name.to_string(),
        tunnel: plan.tunnel.kind,
        oversize: plan.oversize,
        spread: plan.spread,
        filter: plan.filter.clone(),
        sample: plan.sampling.packets,
        sample_flows: plan.sampling.flows,
        snaplen: plan.snaplen,
        max_rate: plan.max_rate.map(|rate| rate.to_string()),
        tcx: kernel.tcx(links),
        taps: kernel.taps(links)?,
        faults: kernel.relay_faults(runner, links)?,
        out_dropped: outs::dropped(runner, &home.session(name).join("maps"), &outs, links)?,
        outs,
        remotes,
        leftovers,
        removed: kernel.memory.removed,
        removed_taps: kernel.memory.removed_taps,
        obstacles: if drops.get("relay").is_some_and(|lost| *lost > 0) { firewall::obstacles(runner) } else { vec![] },
        drops,
        config: kernel.config,
        memory: kernel.memory,
    })
}

/// So many interfaces are asked for one by one.
const FEW: usize = 16;

/// The answers about one session, taken in one bpftool; in two where the machine has many interfaces.
struct Kernel {
    program_ids: Vec<u32>,
    attachments: Vec<Attachment>,
    memory: Memory,
    config: Config,
    taps: Vec<Row>,
    remotes: Vec<Row>,
    remote_stats: Vec<Row>,
    outs: Vec<Row>,
    devices: Vec<Row>,
    drops: Value,
}

impl Kernel {
    fn ask(runner: &Runner, home: &Home, name: &str, links: &[Link]) -> Result<Kernel> {
        let dir = home.session(name);
        let mut lines: Vec<String> =
            PROGRAMS.map(|prog| format!("prog show pinned {}", dir.join(prog).display())).to_vec();
        let maps = ["request", "config", "taps", "remotes", "remote_stats", "outs", "devices", "drops"];
        lines.extend(maps.map(|map| bpftool::dump_question(&dir.join("maps").join(map))));
        if links.len() <= FEW {
            lines.push(bpftool::NET_QUESTION.into());
        }
        let answers = bpftool::ask(runner, &lines)?;
        let (programs, rest) = answers.split_at(PROGRAMS.len());
        let (rest, all_hooks) = rest.split_at(maps.len());
        let mut dumps = rest.iter();
        let mut next = || bpftool::rows(dumps.next().context("a dump is missing")?);
        let (request, config) = (next()?, next()?);
        let config = Config::decode(config.first().context("the session has no configuration")?.value()?)?;
        let taps = next()?;
        Ok(Kernel {
            program_ids: programs.iter().filter_map(|program| program["id"].as_u64()).map(|id| id as u32).collect(),
            attachments: match all_hooks {
                [answer] => bpftool::attachments(answer)?,
                _ => attachments(runner, links, &config, &taps)?,
            },
            memory: memory(request, config.request)
                .map_err(|err| Broken { name: name.into(), what: format!("its request cannot be read ({err})") })?,
            config,
            taps,
            remotes: next()?,
            remote_stats: next()?,
            outs: next()?,
            devices: next()?,
            drops: bpftool::formatted(rest.last().context("a dump is missing")?),
        })
    }

    /// Is one of this session's programs at this hook?
    fn is_attached(&self, ifindex: u32, hook: &str) -> bool {
        self.attachments
            .iter()
            .any(|at| at.ifindex == ifindex && at.kind.ends_with(hook) && self.program_ids.contains(&at.id))
    }

    /// The programs that run before our taps.
    fn tcx(&self, links: &[Link]) -> Vec<String> {
        let mut found = Vec::new();
        for at in self.attachments.iter().filter(|at| at.is_tcx()) {
            for direction in [Direction::Ingress, Direction::Egress] {
                let key = TapKey { ifindex: at.ifindex, direction };
                if at.kind.ends_with(direction.hook()) && self.memory.watches(&key) {
                    found.push(format!("{} at {} {}", at.name, name_of(links, at.ifindex), direction.hook()));
                }
            }
        }
        found
    }

    fn taps(&self, links: &[Link]) -> Result<Vec<TapStatus>> {
        let mut taps = self
            .taps
            .iter()
            .map(|row| {
                let cpus = row.values.iter().map(|value| Tap::decode(value)).collect::<Result<Vec<_>>>()?;
                let slot = cpus.first().map_or(0, |tap| tap.slot);
                let key = TapKey::decode(&row.key)?;
                Ok(TapStatus {
                    interface: name_of(links, key.ifindex),
                    direction: key.direction.hook(),
                    attached: self.is_attached(key.ifindex, key.direction.hook()),
                    counts: TapCounts::sum(cpus.iter().map(|tap| tap.counts)),
                    slot,
                    key,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        taps.retain(|tap| self.memory.watches(&tap.key));
        taps.sort_by_key(|tap| tap.slot);
        Ok(taps)
    }

    fn remotes(&self, links: &[Link]) -> Result<Vec<RemoteStatus>> {
        let mut remotes = self.remotes.iter().map(|row| Ok((row.index()?, row))).collect::<Result<Vec<_>>>()?;
        remotes.sort_by_key(|(slot, _)| *slot);
        remotes.into_iter().map(|(slot, row)| self.remote(slot, Remote::decode(row.value()?)?, links)).collect()
    }

    fn remote(&self, slot: u32, raw: Remote, links: &[Link]) -> Result<RemoteStatus> {
        let (source, address) = raw.addresses();
        let has_mac = !raw.has(abi::remote_flag::UNRESOLVED) && !raw.has(abi::remote_flag::L3);
        Ok(RemoteStatus {
            address,
            source: (!source.is_unspecified()).then_some(source),
            interface: (raw.ifindex != 0).then(|| name_of(links, raw.ifindex)),
            mac: has_mac.then(|| ip::mac_text(raw.mac())),
            mtu: raw.mtu,
            stat: slot_stat(&self.remote_stats, slot)?,
            referred: self.is_referred(raw.device.into(), raw.ifindex),
            raw,
            slot,
        })
    }

    fn outs(&self) -> Result<Vec<(u32, Out)>> {
        self.outs.iter().map(|row| Ok((row.index()?, Out::decode(row.value()?)?))).collect()
    }

    fn drops(&self) -> Result<BTreeMap<String, u64>> {
        let counters =
            self.drops[0]["value"].as_object().context("the drop counters have no names: is BTF missing?")?;
        Ok(counters.iter().map(|(reason, count)| (reason.clone(), count.as_u64().unwrap_or(0))).collect())
    }

    /// What is wrong with the relay.
    fn relay_faults(&self, runner: &Runner, links: &[Link]) -> Result<Vec<String>> {
        let mut faults = relay::faults(runner, &self.config, links, |ifindex| self.is_attached(ifindex, "egress"))?;
        // An `up` that was killed has made a new relay with the old one's numbers.
        let known = [(abi::device::RELAY, self.config.relay), (abi::device::PEER, self.config.peer)];
        let there = known.iter().filter_map(|(key, at)| Some((key, links.iter().find(|link| link.ifindex == *at)?)));
        let there = there.filter(|(_, link)| relay::is_one(link));
        let unknown = there.filter(|(key, link)| !self.is_referred(**key, link.ifindex));
        faults.extend(unknown.map(|(_, link)| format!("the programs do not know {}", link.ifname)));
        Ok(faults)
    }

    /// Is this device still the one that programs send to by this key?
    fn is_referred(&self, key: u32, ifindex: u32) -> bool {
        let (key, ifindex) = (key.to_ne_bytes(), ifindex.to_ne_bytes());
        self.devices.iter().any(|row| row.key == key && row.value().is_ok_and(|value| value == ifindex))
    }
}

/// The programs at the hooks of a session's interfaces, where the machine has many others: `net show` of all takes a
/// millisecond for each of them.
fn attachments(runner: &Runner, links: &[Link], config: &Config, taps: &[Row]) -> Result<Vec<Attachment>> {
    let taps = taps.iter().map(|row| Ok(TapKey::decode(&row.key)?.ifindex)).collect::<Result<Vec<_>>>()?;
    let ours =
        |link: &&Link| [config.relay, config.port, config.peer].contains(&link.ifindex) || taps.contains(&link.ifindex);
    let mut lines: Vec<String> = links.iter().filter(ours).map(|link| bpftool::net_question(&link.ifname)).collect();
    // Each question lists all interfaces once.
    if lines.len() > FEW {
        lines = vec![bpftool::NET_QUESTION.into()];
    }
    let answers = match bpftool::ask(runner, &lines) {
        // One of them has just gone.
        Err(err) if err.is::<Failed>() => bpftool::ask(runner, &[bpftool::NET_QUESTION.into()])?,
        answers => answers?,
    };
    Ok(answers.iter().map(bpftool::attachments).collect::<Result<Vec<_>>>()?.concat())
}

fn memory(mut rows: Vec<Row>, first: u16) -> Result<Memory> {
    let half = u32::from(first)..u32::from(first) + abi::REQUEST_CHUNKS as u32;
    rows.retain(|row| row.index().is_ok_and(|index| half.contains(&index)));
    rows.sort_by_key(|row| row.index().unwrap_or(u32::MAX));
    let chunks = rows.iter().map(|row| Ok(row.value()?.to_vec())).collect::<Result<Vec<_>>>()?;
    serde_json::from_str(&abi::decode_request(&chunks)?).context("the session's request cannot be read")
}

fn name_of(links: &[Link], ifindex: u32) -> String {
    let link = links.iter().find(|link| link.ifindex == ifindex);
    link.map_or_else(|| format!("(gone: index {ifindex})"), |link| link.ifname.clone())
}
