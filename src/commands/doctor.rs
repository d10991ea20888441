//! Is everything here that snifctl needs, and what stands in the way? Each answer says what a lack prevents and the
//! command that fixes it.

use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;

use crate::commands::show;
use crate::datapath::abi::Direction;
use crate::datapath::objects;
use crate::output::text;
use crate::request;
use crate::session::ahead;
use crate::session::alive;
use crate::session::engine::{Context, Open};
use crate::session::firewall;
use crate::session::home::{self, Home};
use crate::session::relay;
use crate::session::resolve;
use crate::session::stats::{self, RemoteState};
use crate::session::version;
use crate::tools::bpftool::{self, Attachment};
use crate::tools::exec::{self, Cmd, Runner, quote};
use crate::tools::ip::{self, Link};
use crate::tools::kernel::{self, version};
use crate::tools::ping;
use crate::tools::requirements::{self, Finding, State, TCPDUMP, TOOLS};
use crate::tools::rights::{self, Lack};
use crate::tools::tc::{self, Filter, Hooks};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    Ok,
    Warn,
    Fail,
}

/// One line of the report.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Check {
    pub level: Level,
    pub name: String,
    /// What was found, and what it prevents.
    pub detail: String,
    /// The command that fixes it.
    pub fix: Option<String>,
}

fn ok(name: &str, detail: impl Into<String>) -> Check {
    Check { level: Level::Ok, name: name.into(), detail: detail.into(), fix: None }
}

fn warn(name: &str, detail: impl Into<String>, fix: impl Into<String>) -> Check {
    Check { level: Level::Warn, name: name.into(), detail: detail.into(), fix: Some(fix.into()) }
}

fn fail(name: &str, detail: impl Into<String>, fix: impl Into<String>) -> Check {
    Check { level: Level::Fail, name: name.into(), detail: detail.into(), fix: Some(fix.into()) }
}

fn requirement(found: Finding) -> Check {
    let fix = requirements::install(&[found.package]);
    match found.state {
        State::Met => ok(found.name, found.detail),
        State::Unknown => warn(found.name, found.detail, fix),
        State::Lacking => fail(found.name, found.detail, fix),
    }
}

pub(super) fn run(context: &Context, interface: Option<&str>, remote: Option<&str>, as_json: bool) -> Result<ExitCode> {
    let checks = checks(context, interface, remote)?;
    show(as_json, "checks", &checks, || text::checks(&checks))?;
    Ok(if worst(&checks) == Level::Fail { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Every check, in the order in which a lack would be met.
fn checks(context: &Context, interface: Option<&str>, remote: Option<&str>) -> Result<Vec<Check>> {
    let runner = &context.runner;
    let tools = TOOLS.iter().map(|tool| requirements::check(runner, tool));
    let mut checks: Vec<Check> = tools.chain([requirements::check_headers()]).map(requirement).collect();
    check_objects(&mut checks);
    let tcpdump = requirement(requirements::check(runner, &TCPDUMP));
    checks.push(Check { level: tcpdump.level.min(Level::Warn), ..tcpdump });
    checks.extend([check_kernel(), check_btf(), check_bpffs(), check_privileges()]);
    if exec::find("ip").is_none() || exec::find("tc").is_none() {
        return Ok(checks);
    }
    let links = ip::links(runner)?;
    checks.extend(check_relays(context, &links)?);
    if let Some(name) = interface {
        checks.extend(check_interface(runner, name, &links)?);
    }
    if let Some(address) = remote {
        let watched = interface.and_then(|name| find(&links, name));
        checks.extend(check_remote(runner, address, &links, watched)?);
    }
    Ok(checks)
}

/// Objects that were compiled before. Where they serve, only filters need what compiles.
fn check_objects(checks: &mut Vec<Check>) {
    let (dir, usable) = (objects::DIR, objects::are_usable());
    let clang = if objects::has_clang() { "not used, as clang is there" } else { "used" };
    match usable {
        None => return,
        Some(false) => {
            let detail = format!("those in {dir} are of another snifctl, or not root's alone: they are not used");
            checks.push(warn("objects", detail, format!("snifctl source --compile {dir}")));
        }
        Some(true) => {
            let kernel = objects::Kernel::here().name();
            checks
                .push(ok("objects", format!("{dir} has those for kernels from {kernel} on, with every part: {clang}")));
        }
    }
    if usable == Some(true) && !objects::has_clang() {
        for check in checks.iter_mut().filter(|check| ["clang", "libbpf-dev"].contains(&check.name.as_str())) {
            check.level = Level::Warn.min(check.level);
            check.detail = "missing: filters cannot be compiled".into();
            check.fix = Some(objects::COMPILES.into());
        }
    }
}

fn check_kernel() -> Check {
    let (release, (major, minor)) = (kernel::release(), kernel::OLDEST);
    match version(&release) {
        Some(found) if found >= kernel::OLDEST => ok("kernel", format!("{release} (at least {major}.{minor})")),
        _ => fail(
            "kernel",
            format!("{release} is older than {major}.{minor}: copies cannot be encapsulated"),
            kernel_package(),
        ),
    }
}

/// Debian names architectures in its own way.
fn kernel_package() -> String {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    format!("apt-get install linux-image-{architecture}")
}

fn check_btf() -> Check {
    if Path::new("/sys/kernel/btf/vmlinux").exists() {
        return ok("btf", "the kernel has it");
    }
    fail("btf", "the kernel has none: maps have no field names", kernel_package())
}

fn check_bpffs() -> Check {
    if home::bpffs_is_mounted() {
        return ok("bpffs", "mounted at /sys/fs/bpf");
    }
    warn("bpffs", "not mounted: `snifctl up` will mount it", "mount -t bpf -o mode=0700 bpf /sys/fs/bpf")
}

fn check_privileges() -> Check {
    match rights::summary() {
        Ok(detail) => ok("privileges", detail),
        Err(lack) => {
            let level = if lack.is_fatal { Level::Fail } else { Level::Warn };
            Check { level, name: "privileges".into(), detail: lack.detail, fix: Some(lack.fix) }
        }
    }
}

/// The relay of each session of this namespace, and what the bridge family's rules do to copies that cross it.
fn check_relays(context: &Context, links: &[Link]) -> Result<Vec<Check>> {
    let runner = &context.runner;
    if !rights::may_read() || exec::find("bpftool").is_none() || exec::find("ethtool").is_none() {
        return Ok(Vec::new());
    }
    let open = Open::to_read(context)?;
    let sessions = open.home.sessions();
    let mut checks: Vec<Check> = sessions.iter().flat_map(|name| check_session(&open, name)).collect();
    let dead = alive::dead(runner, &open.home)?.len() + usize::from(open.home.is_void);
    if dead > 0 {
        let detail = format!("{dead} that had sessions are gone, whose programs and maps are still in memory");
        checks.push(warn("namespaces", detail, "snifctl sync --all"));
    }
    let mut owners: Vec<&str> = links.iter().filter_map(relay::session).collect();
    owners.dedup();
    for owner in owners.iter().filter(|owner| !sessions.iter().any(|name| name == *owner)) {
        let detail = format!("a relay of session {owner} is left, whose programs are not pinned");
        checks.push(warn("relay", detail, format!("snifctl down --name {owner}")));
    }
    if !sessions.is_empty() {
        let obstacles = firewall::obstacles(&open.machine);
        let detail = |found| format!("{found} can drop copies that cross the relay");
        checks.extend(obstacles.iter().map(|found| warn("bridge", detail(found), found.fix())));
    }
    Ok(checks)
}

/// Whether a session is whole: how `status` sees it.
fn check_session(open: &Open, name: &str) -> Vec<Check> {
    match stats::session(open, name) {
        Ok(session) => {
            let detail = |fault: &String| match version::is_told_by(fault) {
                true => format!("{name}: {fault}"),
                false => format!("{name}: {fault}: copies are lost or not exact"),
            };
            let fix = session.fix.clone().unwrap_or_else(|| format!("snifctl status --name {name}"));
            let faults = session.faults.iter().map(|fault| warn("session", detail(fault), fix.clone()));
            let ahead = session.ahead.iter().map(|at| warn("session", format!("{name}: {at}"), at.look.clone()));
            let down = session.remotes.iter().filter(|remote| remote.state == RemoteState::Down);
            let down = down.filter_map(|remote| {
                let detail = format!("{name}: remote {}: {}: it is down", remote.address, remote.silence?);
                Some(warn("session", detail, format!("ping -c 1 {}", remote.address)))
            });
            let found: Vec<Check> = faults.chain(ahead).chain(down).collect();
            if found.is_empty() { vec![ok("session", format!("{name}: in order"))] } else { found }
        }
        Err(err) => vec![match err.downcast::<Lack>() {
            Ok(lack) => warn("session", format!("{name}: {}", lack.detail), lack.fix),
            Err(err) => warn("session", format!("{name}: {err:#}"), format!("snifctl down --name {name}")),
        }],
    }
}

fn check_interface(runner: &Runner, name: &str, links: &[Link]) -> Result<Vec<Check>> {
    request::ensure_interface_name(name)?;
    let Some(link) = find(links, name) else {
        return Ok(vec![fail(name, "does not exist: it cannot be watched", "ip link")]);
    };
    let name = link.ifname.as_str();
    let mut checks = vec![check_link(link)];
    let hooks = tc::hooks(runner, &[tc::Dev::ours(name)])?.pop();
    let Some(hooks) = hooks else { return Ok(checks) };
    if hooks.has_qdisc("ingress") {
        let detail = "an `ingress` qdisc sits where clsact must go: no tap can be attached";
        checks.push(fail(name, detail, format!("tc qdisc del dev {} ingress", quote(name))));
    } else {
        let ours = hooks.marked || Home::here()?.clsact_marks().contains(&link.ifindex);
        let found = match (hooks.has_qdisc("clsact"), ours) {
            (true, true) => "clsact is there, added by us: it goes with the last tap",
            (true, false) => "clsact is there and will stay",
            (false, _) => "no clsact: `up` adds it",
        };
        checks.push(ok(name, found));
    }
    for direction in [Direction::Ingress, Direction::Egress] {
        checks.extend(check_foreign(name, direction, &hooks));
    }
    checks.extend(check_tcx(runner, link));
    checks.extend(ahead::xdp(link).into_iter().map(|id| {
        let detail = format!("XDP program {id} runs before our tap and can hide packets from it");
        warn(name, detail, format!("bpftool prog show id {id}"))
    }));
    Ok(checks)
}

fn find<'a>(links: &'a [Link], name: &str) -> Option<&'a Link> {
    links.iter().find(|link| link.ifname == name || link.altnames.iter().any(|other| other == name))
}

fn check_link(link: &Link) -> Check {
    let name = &link.ifname;
    if !link.is_ethernet() {
        let detail = format!("has no Ethernet header (link type {}): it cannot be watched", link.link_type);
        return fail(name, detail, "ip link");
    }
    if !link.is_up() {
        return warn(name, "is down: nothing passes", format!("ip link set dev {} up", quote(name)));
    }
    ok(name, format!("Ethernet, up, MTU {}", link.mtu))
}

/// The filters of others at a hook. They run in the order in which tc lists them.
fn check_foreign(dev: &str, direction: Direction, hooks: &Hooks) -> Vec<Check> {
    let filters: Vec<&Filter> = hooks.filters(direction).iter().filter(|filter| filter.options.is_some()).collect();
    let ours = filters.iter().position(|filter| filter.program() == direction.program());
    let pref = hooks.free_pref(direction);
    let foreign = filters.iter().enumerate().filter(|(_, filter)| !filter.program().starts_with("snif_"));
    let is_before = |at: usize, filter: &Filter| ours.map_or(filter.pref < pref, |ours| at < ours);
    foreign.map(|(at, filter)| foreign_line(dev, direction, filter, is_before(at, filter))).collect()
}

fn foreign_line(dev: &str, direction: Direction, filter: &Filter, before: bool) -> Check {
    let hook = direction.hook();
    let what = format!("a foreign {} filter {:?} at {hook} preference {}", filter.kind, filter.program(), filter.pref);
    if before {
        let fix = format!("tc filter show dev {} {hook}", quote(dev));
        return warn(dev, format!("{what} runs before our tap and can hide packets from it"), fix);
    }
    ok(dev, format!("{what} runs after our tap, which lets every packet through"))
}

/// tcx programs (kernel 6.6) run before clsact. Only a newer bpftool lists them.
fn check_tcx(runner: &Runner, link: &Link) -> Option<Check> {
    if !kernel::has_tcx() || !rights::may_read() {
        return None;
    }
    let name = &link.ifname;
    let answers = bpftool::ask(runner, &[bpftool::net_question(name)]).unwrap_or_default();
    let found: Vec<Attachment> = answers.iter().flat_map(bpftool::attachments).flatten().collect();
    let found: Vec<&Attachment> = found.iter().filter(|at| at.is_tcx()).collect();
    let names: Vec<&str> = found.iter().map(|at| at.name.as_str()).collect();
    if !names.is_empty() {
        let detail = format!("tcx programs run before our tap and can hide packets from it: {}", names.join(", "));
        return Some(warn(name, detail, format!("bpftool net show dev {}", quote(name))));
    }
    let known = runner.read(&Cmd::new("bpftool", ["version"])).ok().as_deref().and_then(version)?;
    if known < (7, 3) {
        let detail =
            format!("bpftool {}.{} cannot list tcx programs, which would run before our tap", known.0, known.1);
        return Some(warn(name, detail, newer_bpftool()));
    }
    Some(ok(name, "no tcx program runs before our tap"))
}

/// The command that installs a bpftool which lists tcx programs.
fn newer_bpftool() -> String {
    let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    let listed = fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten().map(|file| file.path());
    let sources: String = listed.chain(["/etc/apt/sources.list".into()]).map(|path| read(&path)).collect();
    from_backports(&read(Path::new("/etc/os-release")), &sources)
}

/// Debian's backports are named after the release, and are no source of packages until they are written down.
fn from_backports(os_release: &str, sources: &str) -> String {
    let value =
        |key: &str| os_release.lines().find_map(|line| line.strip_prefix(key)).map(|text| text.trim_matches('"'));
    let (Some("debian"), Some(release)) = (value("ID="), value("VERSION_CODENAME=")) else {
        return "apt-get install bpftool".into();
    };
    let suite = format!("{release}-backports");
    let install = format!("apt-get install -t {suite} bpftool");
    if sources.contains(&suite) {
        return install;
    }
    let source = format!("deb http://deb.debian.org/debian {suite} main");
    format!("echo '{source}' >/etc/apt/sources.list.d/backports.list && apt-get update && {install}")
}

fn check_remote(runner: &Runner, text: &str, links: &[Link], watched: Option<&Link>) -> Result<Vec<Check>> {
    let address = match (text.parse::<IpAddr>(), request::remote("--remote", text)) {
        (_, Ok(address)) => address,
        (Ok(_), Err(err)) => return Ok(vec![fail("remote", err.to_string(), "snifctl doctor --remote 10.0.0.7")]),
        (Err(_), Err(err)) => return Err(err.into()),
    };
    let reply = match ip::route_get(runner, ip::Packet::to(address))? {
        Ok(reply) => reply,
        Err(reason) => {
            let fix = format!("ip route add {address} via GATEWAY");
            return Ok(vec![fail("route", format!("none to {address} ({reason}): copies cannot be sent"), fix)]);
        }
    };
    if !matches!(reply.kind.as_str(), "" | "unicast") {
        let kind =
            if reply.kind == "local" { "this machine itself".into() } else { format!("a {} address", reply.kind) };
        return Ok(vec![fail("route", format!("{address} is {kind}: it cannot be a remote"), "ip address")]);
    }
    let via = reply.gateway().map_or_else(String::new, |gateway| format!(" via {gateway}"));
    let mut checks = vec![ok("route", format!("{address}{via} dev {}", reply.dev))];
    if let Some(out) = links.iter().find(|link| link.ifname == reply.dev) {
        let next_hop = reply.next_hop(address);
        if !out.is_l3() {
            checks.push(check_neighbour(runner, next_hop, out)?);
        }
        checks.push(check_mtu(out, watched, address, links));
        let told = reply.metrics.iter().filter_map(|metrics| metrics.mtu).min();
        let most = told.map_or(out.mtu, |mtu| mtu.min(out.mtu));
        let route = format!("{address}{via} dev {}", quote(&out.ifname));
        checks.push(check_path(runner, &route, most, watched, address));
    }
    Ok(checks)
}

fn check_neighbour(runner: &Runner, next_hop: IpAddr, out: &Link) -> Result<Check> {
    let mac = ip::neighbour(runner, next_hop, &out.ifname)?.and_then(|found| found.mac());
    Ok(match mac {
        Some(mac) => ok("neighbour", format!("{next_hop} is at {}", ip::mac_text(&mac))),
        None => {
            warn("neighbour", format!("{next_hop} is not known yet: `up` asks for it"), format!("ping -c 1 {next_hop}"))
        }
    })
}

/// As for plain GRE, the least that a tunnel adds.
fn check_mtu(out: &Link, watched: Option<&Link>, remote: IpAddr, links: &[Link]) -> Check {
    let Some(watched) = watched else {
        return ok("mtu", format!("{} towards {}", out.mtu, out.ifname));
    };
    let needed = needed(watched, remote);
    if out.mtu >= needed {
        return ok("mtu", format!("{} on {}, whole copies of {} need {needed}", out.mtu, out.ifname, watched.ifname));
    }
    let detail = format!(
        "{} on {} is less than the {needed} that whole copies of {} need: see --oversize",
        out.mtu, out.ifname, watched.ifname
    );
    let fix = resolve::room(links, &[watched.ifindex], out, out.mtu, remote, needed);
    warn("mtu", detail, fix.rsplit_once(": ").map_or("snifctl up --help", |(_, fix)| fix))
}

/// What really passes: a router or a switch on the way may take less than the out interface, and tell nobody.
fn check_path(runner: &Runner, route: &str, most: u32, watched: Option<&Link>, remote: IpAddr) -> Check {
    if exec::find("ping").is_none() {
        return warn("path", "ping is missing: what passes cannot be measured", "apt-get install iputils-ping");
    }
    let Some(largest) = ping::largest(runner, remote, most) else {
        let detail = format!("{remote} does not answer ping: what passes on the way cannot be measured");
        return warn("path", detail, format!("ping -c 1 {remote}"));
    };
    let needs = watched.map_or_else(String::new, |watched| {
        format!("; whole copies of {} need {}", watched.ifname, needed(watched, remote))
    });
    if largest >= most {
        return ok("path", format!("packets of {largest} bytes pass, all that the route takes{needs}"));
    }
    let detail = format!(
        "packets of {largest} bytes are the largest that pass, though the route takes {most}: larger outer packets are lost \
         on the way, and not counted{needs}"
    );
    warn("path", detail, format!("ip route replace {route} mtu {largest} && snifctl sync"))
}

/// Bytes of the outer packet of a whole copy, with plain GRE.
fn needed(watched: &Link, remote: IpAddr) -> u32 {
    watched.mtu + if remote.is_ipv6() { 58 } else { 38 }
}

/// The verdict of a report.
fn worst(checks: &[Check]) -> Level {
    checks.iter().map(|check| check.level).max().unwrap_or(Level::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_the_tools_print() {
        for (text, expected) in [
            ("Debian clang version 14.0.6\nTarget: x86_64", Some((14, 0))),
            ("bpftool v7.1.0\nusing libbpf v1.1", Some((7, 1))),
            ("tc utility, iproute2-6.1.0, libbpf 1.1.2", Some((6, 1))),
            ("ethtool version 6.1", Some((6, 1))),
            ("6.18.44-fc-v595", Some((6, 18))),
            ("ip utility, iproute2-ss200127", None),
        ] {
            assert_eq!(version(text), expected, "{text}");
        }
    }

    #[test]
    fn backports_are_those_of_this_release() {
        let debian = "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nVERSION_CODENAME=bookworm\nID=debian\n";
        let install = "apt-get install -t bookworm-backports bpftool";
        assert_eq!(from_backports(debian, "Suites: bookworm bookworm-backports"), install);
        let added = from_backports(debian, "Suites: bookworm");
        assert!(added.contains("debian bookworm-backports main") && added.ends_with(install), "{added}");
        assert_eq!(from_backports("ID=ubuntu\nVERSION_CODENAME=noble\n", ""), "apt-get install bpftool");
    }
}
