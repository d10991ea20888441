//! The only writer: makes a session, heals it and takes it down.
//!
//! Order of making: load, write maps, relay, publish, and the taps last, so that no packet meets half a session. A
//! failure anywhere runs the same code as `down`, which also cleans up after a process that was killed half-way.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::abi::{self, Config, Direction, Tap, TapKey};
use crate::exec::{Cmd, Shell};
use crate::header;
use crate::ip::{self, Link};
use crate::plan::{Plan, Watch};
use crate::route::{self, Resolved};
use crate::state::{self, Home};
use crate::status::{self, Memory, Session};
use crate::tc::{self, Hooks};
use crate::{bpftool, clang, doctor};

/// Beginning of the relay's link alias; the session's name follows.
pub const ALIAS: &str = "snifctl:";

/// The pinned programs of a session.
pub const PROGRAMS: [&str; 5] = [
    "snif_tap_in",
    "snif_tap_out",
    "snif_encap",
    "snif_wire",
    "snif_fragment",
];

/// A relay must take any super-packet and any frame.
const RELAY_MTU: u32 = 65535;

/// How `up` ended.
pub enum Outcome {
    Made,
    /// It was up with the same request; whether a route or neighbour had changed.
    Same {
        refreshed: bool,
    },
    /// A dry run has printed what would be done; the outer header's bytes.
    Shown(Vec<u8>),
}

/// Makes the session, or finds it made. Returns what the user should know besides.
pub fn up(shell: &Shell, plan: &Plan) -> Result<(Outcome, Vec<String>)> {
    if !shell.dry_run {
        state::ensure_root()?;
    }
    doctor::ensure_tools(shell)?;
    let home = Home::here()?;
    let resolved = route::resolve(shell, plan, &ip::links(shell)?)?;
    let object = clang::object(shell)?;
    if shell.dry_run {
        if existing(shell, plan, &home)?.is_some() {
            return Ok((Outcome::Same { refreshed: false }, resolved.warnings));
        }
        home.create(shell)?;
        Making::new(shell, plan, &resolved, &home)?.make(shell, &object)?;
        return Ok((
            Outcome::Shown(header::remote(&resolved.outer).outer().to_vec()),
            resolved.warnings,
        ));
    }
    let _lock = home.lock_to_write(shell)?;
    let outcome = up_locked(shell, plan, &resolved, &home, &object);
    home.remove_if_empty();
    Ok((outcome?, resolved.warnings))
}

fn up_locked(shell: &Shell, plan: &Plan, resolved: &Resolved, home: &Home, object: &Path) -> Result<Outcome> {
    if let Some(session) = existing(shell, plan, home)? {
        return Ok(Outcome::Same {
            refreshed: refresh(shell, home, &session, resolved)?,
        });
    }
    teardown(shell, home, &Target::One(&plan.name))?;
    let made = Making::new(shell, plan, resolved, home).and_then(|making| making.make(shell, object));
    if let Err(err) = made {
        if let Err(undo) = teardown(shell, home, &Target::One(&plan.name)) {
            return Err(err.context(format!(
                "cleaning up failed too ({undo:#}); try: snifctl down --name {}",
                plan.name
            )));
        }
        return Err(err);
    }
    Ok(Outcome::Made)
}

/// The session of that name, if it is whole and was asked for in the same words.
fn existing(shell: &Shell, plan: &Plan, home: &Home) -> Result<Option<Session>> {
    if !home.session(&plan.name).is_dir() {
        return Ok(None);
    }
    let Ok(session) = status::session(shell, home, &plan.name, &ip::links(shell)?) else {
        eprintln!("snifctl: session {} was only half there; making it anew", plan.name);
        return Ok(None);
    };
    ensure!(
        session.plan == *plan,
        "--name {0} is taken by a session with another request ({1}); use another --name, or first: snifctl down --name {0}",
        plan.name,
        words(&session.plan)
    );
    if !session.is_complete() {
        eprintln!("snifctl: session {} had lost a part; making it anew", plan.name);
        return Ok(None);
    }
    Ok(Some(session))
}

/// The command line of a request.
fn words(plan: &Plan) -> String {
    let mut words = vec!["up".to_string()];
    words.extend(plan.interfaces.clone());
    words.push(format!("--tunnel {} --remote {}", lower(&plan.tunnel), plan.remote));
    if plan.direction != Watch::Both {
        words.push(format!("--direction {}", lower(&plan.direction)));
    }
    words.push(format!(
        "--oversize {} --ttl {} --tos {}",
        lower(&plan.oversize),
        plan.outer.ttl,
        plan.outer.tos
    ));
    if let Some(source) = plan.source {
        words.push(format!("--source {source}"));
    }
    if plan.outer.df {
        words.push("--df".into());
    }
    words.join(" ")
}

/// A unit enum as the command line spells it.
pub fn lower(value: &impl std::fmt::Debug) -> String {
    format!("{value:?}").to_lowercase()
}

/// Writes the remote anew where its route or neighbour has changed: one atomic map update.
fn refresh(shell: &Shell, home: &Home, session: &Session, resolved: &Resolved) -> Result<bool> {
    let remote = header::remote(&resolved.outer);
    if session.remotes.first().is_some_and(|known| known.raw == remote) {
        return Ok(false);
    }
    let maps = home.session(&session.name).join("maps");
    bpftool::batch(shell, &remote_updates(&maps, resolved))?;
    Ok(true)
}

fn remote_updates(maps: &Path, resolved: &Resolved) -> Vec<String> {
    let slot = 0u32.to_ne_bytes();
    let tunnel = abi::tunnel_key(resolved.outer.source, resolved.outer.remote);
    vec![
        bpftool::update(&maps.join("tunnels"), &tunnel, &slot),
        bpftool::update(&maps.join("remotes"), &slot, &header::remote(&resolved.outer).encode()),
    ]
}

/// A session on its way into the kernel.
struct Making<'a> {
    plan: &'a Plan,
    resolved: &'a Resolved,
    home: &'a Home,
    relay: String,
    config: Config,
    /// What is at the hooks of the watched interfaces.
    hooks: Vec<Hooks>,
    memory: Memory,
}

impl<'a> Making<'a> {
    fn new(shell: &Shell, plan: &'a Plan, resolved: &'a Resolved, home: &'a Home) -> Result<Making<'a>> {
        let links = ip::links(shell)?;
        let names: Vec<&str> = resolved.watched.iter().map(|link| link.ifname.as_str()).collect();
        let hooks = tc::hooks(shell, &names)?;
        for (name, hooks) in names.iter().zip(&hooks) {
            ensure!(
                !hooks.has_qdisc("ingress"),
                "IFACE {name} has an `ingress` qdisc where clsact must go; if nothing needs it, remove it with: tc qdisc del \
                 dev {name} ingress"
            );
        }
        let before = status::dropped_by(shell, &resolved.out)?;
        Ok(Making {
            plan,
            resolved,
            home,
            relay: free_relay(&links)?,
            config: config(plan, &links),
            hooks,
            memory: Memory {
                plan: plan.clone(),
                dropped_before: BTreeMap::from([(resolved.out.ifname.clone(), before)]),
            },
        })
    }

    fn make(&self, shell: &Shell, object: &Path) -> Result<()> {
        let building = self.home.building(&self.plan.name);
        shell.act("mkdir -m 0700", &building, |dir| {
            DirBuilder::new().mode(0o700).create(dir)
        })?;
        bpftool::load(shell, object, &building)?;
        bpftool::batch(shell, &self.map_updates(&building.join("maps"))?)?;
        self.make_relay(shell, &building)?;
        self.publish(shell, &building)?;
        self.attach(shell)
    }

    fn map_updates(&self, maps: &Path) -> Result<Vec<String>> {
        let mut lines = vec![bpftool::update(&maps.join("config"), &[0; 4], &self.config.encode())];
        for (at, chunk) in abi::encode_request(&serde_json::to_string(&self.memory)?)?
            .iter()
            .enumerate()
        {
            lines.push(bpftool::update(
                &maps.join("request"),
                &(at as u32).to_ne_bytes(),
                chunk,
            ));
        }
        lines.extend(remote_updates(maps, self.resolved));
        for (slot, key) in self.taps().enumerate() {
            let slot = slot as u32;
            lines.push(bpftool::update(&maps.join("slots"), &slot.to_ne_bytes(), &key.encode()));
            let tap = Tap { slot, ..Tap::default() };
            lines.push(bpftool::update(&maps.join("taps"), &key.encode(), &tap.encode()));
        }
        Ok(lines)
    }

    fn taps(&self) -> impl Iterator<Item = TapKey> {
        let directions = self.plan.direction.directions();
        let watched = self.resolved.watched.iter();
        watched.flat_map(move |link| {
            directions.iter().map(move |direction| TapKey {
                ifindex: link.ifindex,
                direction: *direction,
            })
        })
    }

    /// The pair that makes real wire frames of a copy: no segmentation, no checksums left open, any length. Its first
    /// end's egress hook is also where every other copy gets its header, without crossing.
    fn make_relay(&self, shell: &Shell, pins: &Path) -> Result<()> {
        let (relay, peer) = (&self.relay, format!("{}p", self.relay));
        let mut lines = vec![format!(
            "link add {relay} index {} mtu {RELAY_MTU} type veth peer name {peer} index {} mtu {RELAY_MTU}",
            self.config.relay, self.config.peer
        )];
        for end in [relay, &peer] {
            lines.push(format!("link set dev {end} alias {ALIAS}{}", self.plan.name));
            if Path::new("/proc/sys/net/ipv6").exists() {
                lines.push(format!("link set dev {end} addrgenmode none"));
            }
            lines.push(format!("link set dev {end} arp off gso_max_segs 1"));
        }
        ip_batch(shell, &lines)?;
        shell.write(&Cmd::new(
            "ethtool",
            ["-K", relay, "tx", "off", "tso", "off", "gso", "off"],
        ))?;
        let handle = handle(&self.plan.name);
        let filter = |dev: &str, direction, program: &str| {
            tc::add_filter(
                dev,
                direction,
                tc::FIRST_PREF,
                handle,
                &pins.join(program).to_string_lossy(),
            )
        };
        let hooks = [
            tc::add_clsact(relay),
            tc::add_clsact(&peer),
            filter(relay, Direction::Egress, "snif_encap"),
            filter(&peer, Direction::Ingress, "snif_wire"),
            filter(&peer, Direction::Egress, "snif_fragment"),
        ];
        tc::batch(shell, &hooks)?;
        ip_batch(
            shell,
            &[format!("link set dev {peer} up"), format!("link set dev {relay} up")],
        )
    }

    fn publish(&self, shell: &Shell, building: &Path) -> Result<()> {
        let session = self.home.session(&self.plan.name);
        let shown = format!("mv -T {}", building.display());
        shell.act(&shown, &session, |session| fs::rename(building, session))
    }

    fn attach(&self, shell: &Shell) -> Result<()> {
        let pins = self.home.session(&self.plan.name);
        let mut lines = Vec::new();
        for (link, hooks) in self.resolved.watched.iter().zip(&self.hooks) {
            if !hooks.has_qdisc("clsact") {
                let mark = self.home.clsact_mark(link.ifindex);
                shell.act("mkdir -p -m 0700", &mark, |dir| {
                    DirBuilder::new().recursive(true).mode(0o700).create(dir)
                })?;
                lines.push(tc::add_clsact(&link.ifname));
            }
            for direction in self.plan.direction.directions() {
                let pin = pins.join(direction.program());
                let pref = hooks.free_pref(*direction);
                let handle = handle(&self.plan.name);
                lines.push(tc::add_filter(
                    &link.ifname,
                    *direction,
                    pref,
                    handle,
                    &pin.to_string_lossy(),
                ));
            }
        }
        tc::batch(shell, &lines)
    }
}

fn ip_batch(shell: &Shell, lines: &[String]) -> Result<()> {
    shell.write(&Cmd::new("ip", ["-batch", "-"]).input(lines)).map(drop)
}

/// The key of a session's filters, from its name (FNV-1a): `down` finds them even where the pins are gone.
fn handle(name: &str) -> u32 {
    let hash = name.bytes().fold(0x811c_9dc5u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    hash.max(1)
}

/// The first pair of relay names that is not taken.
fn free_relay(links: &[Link]) -> Result<String> {
    let taken = |name: &str| {
        links
            .iter()
            .any(|link| link.ifname == name || link.altnames.iter().any(|alt| alt == name))
    };
    let free = (0..1000)
        .map(|n| format!("snif{n}"))
        .find(|name| !taken(name) && !taken(&format!("{name}p")));
    free.context("no relay name from snif0 to snif999 is free; remove sessions with: snifctl down --all")
}

/// The relay's ifindexes are chosen here, so that the programs can be told them before the relay is made.
fn config(plan: &Plan, links: &[Link]) -> Config {
    let last = links.iter().map(|link| link.ifindex).max().unwrap_or(0);
    Config {
        relay: last + 1,
        peer: last + 2,
        oversize: plan.oversize as u8,
        protocol: plan.tunnel.protocol(),
        port: plan.tunnel.port(),
    }
}

/// What to take down.
pub enum Target<'a> {
    One(&'a str),
    All,
}

/// Takes sessions down. Returns whether there was anything to remove; nothing to remove is no error.
pub fn down(shell: &Shell, target: &Target) -> Result<bool> {
    state::ensure_root()?;
    doctor::ensure_present(&["bpftool", "tc", "ip"])?;
    let home = Home::here()?;
    let _lock = home.lock_to_write(shell)?;
    let removed = teardown(shell, &home, target);
    home.remove_if_empty();
    removed
}

/// Taps first, then the relay, then the pins. Goes by what the kernel has, so it also cleans up half a session.
fn teardown(shell: &Shell, home: &Home, target: &Target) -> Result<bool> {
    let mut removed = detach(shell, home, target)?;
    // Removing one end removes the other, so look again after each.
    while let Some(relay) = ip::links(shell)?.iter().find(|link| is_relay_of(link, target)) {
        shell.write(&Cmd::new("ip", ["link", "delete", "dev", &relay.ifname]))?;
        removed = true;
    }
    for dir in pins(home, target) {
        shell.act("rm -r", &dir, |dir| fs::remove_dir_all(dir))?;
        removed = true;
    }
    Ok(removed)
}

/// A relay without an alias was made by a run that ended before it could say whose it is.
fn is_relay_of(link: &Link, target: &Target) -> bool {
    let number = link.ifname.strip_prefix("snif").map(|rest| rest.trim_end_matches('p'));
    let named = number.is_some_and(|number| number.parse::<u32>().is_ok());
    if link.ifalias.is_empty() {
        return named && link.linkinfo.info_kind == "veth";
    }
    link.ifalias.strip_prefix(ALIAS).is_some_and(|owner| match target {
        Target::One(name) => owner == *name,
        Target::All => true,
    })
}

fn pins(home: &Home, target: &Target) -> Vec<PathBuf> {
    let dirs: Vec<PathBuf> = match target {
        Target::One(name) => vec![home.session(name), home.building(name)],
        Target::All => {
            let made = home.sessions().into_iter().map(|name| home.session(&name));
            made.chain(home.half_made().into_iter().map(|name| home.building(&name)))
                .collect()
        }
    };
    dirs.into_iter().filter(|dir| dir.exists()).collect()
}

/// Removes our filters from the watched interfaces, and a clsact qdisc that we added and nothing uses any more.
fn detach(shell: &Shell, home: &Home, target: &Target) -> Result<bool> {
    let links = ip::links(shell)?;
    let marks = home.clsact_marks();
    let tapped = tapped(shell)?;
    let ours = |link: &&Link| {
        (tapped.contains(&link.ifindex) || marks.contains(&link.ifindex)) && !link.ifalias.starts_with(ALIAS)
    };
    let devices: Vec<&Link> = links.iter().filter(ours).collect();
    let names: Vec<&str> = devices.iter().map(|link| link.ifname.as_str()).collect();
    let lines: Vec<String> = names
        .iter()
        .zip(tc::hooks(shell, &names)?)
        .flat_map(|(dev, hooks)| filters_of(dev, &hooks, target))
        .collect();
    tc::batch(shell, &lines)?;
    remove_clsact(shell, home, &devices, &marks)?;
    for gone in marks
        .iter()
        .filter(|mark| !links.iter().any(|link| link.ifindex == **mark))
    {
        remove_mark(shell, home, *gone)?;
    }
    Ok(!lines.is_empty())
}

/// ifindexes of the interfaces that run a tap of any session.
fn tapped(shell: &Shell) -> Result<Vec<u32>> {
    let answers = bpftool::ask(shell, &[bpftool::NET_QUESTION.to_string()])?;
    let attachments = bpftool::attachments(&answers[0])?;
    Ok(attachments
        .into_iter()
        .filter(|at| at.name.starts_with("snif_tap_"))
        .map(|at| at.ifindex)
        .collect())
}

fn filters_of(dev: &str, hooks: &Hooks, target: &Target) -> Vec<String> {
    let mut lines = Vec::new();
    for direction in [Direction::Ingress, Direction::Egress] {
        let taps = hooks
            .filters(direction)
            .iter()
            .filter(|filter| filter.program() == direction.program());
        for filter in taps {
            let Some(at) = filter.handle() else { continue };
            if matches!(target, Target::One(name) if handle(name) != at) {
                continue;
            }
            lines.push(tc::del_filter(dev, direction, filter.pref, at));
        }
    }
    lines
}

fn remove_clsact(shell: &Shell, home: &Home, devices: &[&Link], marks: &[u32]) -> Result<()> {
    let marked: Vec<&&Link> = devices.iter().filter(|link| marks.contains(&link.ifindex)).collect();
    let names: Vec<&str> = marked.iter().map(|link| link.ifname.as_str()).collect();
    let unused = marked
        .iter()
        .zip(tc::hooks(shell, &names)?)
        .filter(|(_, hooks)| hooks.is_unused());
    let (mut lines, mut done) = (Vec::new(), Vec::new());
    for (link, hooks) in unused {
        if hooks.has_qdisc("clsact") {
            lines.push(tc::del_clsact(&link.ifname));
        }
        done.push(link.ifindex);
    }
    tc::batch(shell, &lines)?;
    done.into_iter()
        .try_for_each(|ifindex| remove_mark(shell, home, ifindex))
}

fn remove_mark(shell: &Shell, home: &Home, ifindex: u32) -> Result<()> {
    shell.act("rmdir", &home.clsact_mark(ifindex), |dir| fs::remove_dir(dir))
}

/// The session that a command without `--name` means: the only one, or the one called `default`.
pub fn chosen(home: &Home, name: Option<&str>) -> Result<String> {
    let names = home.sessions();
    let name = name.unwrap_or("default");
    match names.as_slice() {
        names if names.iter().any(|known| known == name) => Ok(name.to_string()),
        [] => bail!("no session is up; start one with: snifctl up IFACE --tunnel gre --remote ADDR"),
        names => bail!(
            "no session {name} is up; choose one with: --name {}",
            names.join(" or --name ")
        ),
    }
}
