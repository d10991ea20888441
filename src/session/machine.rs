//! What the machine says besides the session: asked once, and remembered for as long as a command runs.

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use anyhow::Result;
use serde_json::Value;

use crate::request::Underlay;
use crate::session::away::Elsewhere;
use crate::session::firewall;
use crate::session::pattern;
use crate::session::stack::Facts;
use crate::tools::bpftool::{self, Attachment};
use crate::tools::ethtool;
use crate::tools::exec::{Cmd, Runner};
use crate::tools::ip::{self, Link, Packet, RouteReply};
use crate::tools::kernel;

/// The answers of the machine.
pub(crate) struct Machine<'a> {
    pub runner: &'a Runner,
    /// Of our network namespace, and those elsewhere that a session watches, or is to.
    pub links: Vec<Link>,
    pub elsewhere: Elsewhere,
    features: RefCell<BTreeMap<u32, BTreeMap<String, bool>>>,
    routes: RefCell<BTreeMap<Packet, Result<RouteReply, String>>>,
    addresses: OnceCell<Vec<IpAddr>>,
    tcx: RefCell<BTreeMap<u32, Vec<Attachment>>>,
    endpoints: RefCell<BTreeMap<u32, Option<Vec<Underlay>>>>,
    chains: OnceCell<Vec<Value>>,
}

/// So many interfaces may be asked about.
const FEW: usize = 16;

impl<'a> Machine<'a> {
    pub(crate) fn ask(runner: &'a Runner) -> Result<Machine<'a>> {
        Ok(Machine::of(runner, ip::links(runner)?, Elsewhere::default()))
    }

    fn of(runner: &'a Runner, links: Vec<Link>, elsewhere: Elsewhere) -> Machine<'a> {
        Machine {
            runner,
            links,
            elsewhere,
            features: RefCell::default(),
            routes: RefCell::default(),
            addresses: OnceCell::new(),
            tcx: RefCell::default(),
            endpoints: RefCell::default(),
            chains: OnceCell::new(),
        }
    }

    /// The same beside what a session has elsewhere.
    pub(crate) fn beside(&self, elsewhere: Elsewhere) -> Machine<'a> {
        let home: Vec<Link> = self.links.iter().filter(|link| link.away.is_none()).cloned().collect();
        Machine::of(self.runner, elsewhere.beside(&home), elsewhere)
    }

    /// The interface of that name, which may be one of its other names.
    pub(crate) fn named(&self, name: &str) -> Option<&Link> {
        pattern::named(&self.links, name)
    }

    pub(crate) fn indexed(&self, ifindex: u32) -> Option<&Link> {
        ip::find(&self.links, ifindex)
    }

    /// Looks up the routes of these packets, all in one question.
    pub(crate) fn routes(&self, packets: &[Packet]) -> Result<()> {
        let new = packets.iter().filter(|packet| !self.routes.borrow().contains_key(packet));
        let new: Vec<Packet> = new.copied().collect();
        if new.is_empty() {
            return Ok(());
        }
        for (packet, reply) in new.iter().zip(ip::routes(self.runner, &new)?) {
            self.routes.borrow_mut().insert(*packet, reply);
        }
        Ok(())
    }

    /// The route of a packet, or the kernel's reason why there is none.
    pub(crate) fn route(&self, packet: Packet) -> Result<Result<RouteReply, String>> {
        self.routes(&[packet])?;
        Ok(self.routes.borrow().get(&packet).cloned().unwrap_or_else(|| Err("no route".into())))
    }

    /// Every address that this network namespace owns.
    pub(crate) fn addresses(&self) -> Result<&[IpAddr]> {
        if let Some(known) = self.addresses.get() {
            return Ok(known);
        }
        let addresses = ip::addresses(self.runner)?;
        Ok(self.addresses.get_or_init(|| addresses))
    }

    /// Asks for the tcx programs of these interfaces, all in one question; of many interfaces none, as bpftool is slow.
    pub(crate) fn ask_tcx(&self, links: &[&Link]) {
        if !kernel::has_tcx() || links.len() > FEW {
            return;
        }
        let netns = |link: &Link| link.away.as_ref().map(|away| away.netns.clone());
        for links in links.chunk_by(|a, b| netns(a) == netns(b)) {
            let lines: Vec<String> = links.iter().map(|link| bpftool::net_question(&link.dev().name)).collect();
            let answers = bpftool::ask_in(self.runner, netns(links[0]).as_deref(), &lines).unwrap_or_default();
            for (link, answer) in links.iter().zip(answers) {
                let ifindex = link.away.as_ref().map_or(link.ifindex, |away| away.ifindex);
                let found = bpftool::attachments(&answer).unwrap_or_default();
                let tcx = found.into_iter().filter(|at| at.is_tcx() && at.ifindex == ifindex).collect();
                self.tcx.borrow_mut().insert(link.ifindex, tcx);
            }
        }
    }

    /// The tcx programs of an interface that was asked about, which run before its tc filters.
    pub(crate) fn tcx(&self, link: &Link) -> Vec<Attachment> {
        self.tcx.borrow().get(&link.ifindex).cloned().unwrap_or_default()
    }

    /// The objects of `nft list chains`; none where nft is not there or says nothing.
    pub(crate) fn chains(&self) -> &[Value] {
        self.chains.get_or_init(|| firewall::chains(self.runner))
    }

    /// The endpoints of a WireGuard interface, by `wg`, if that is what it is and the tool is there.
    pub(crate) fn endpoints(&self, link: &Link) -> Option<Vec<Underlay>> {
        self.endpoints.borrow_mut().entry(link.ifindex).or_insert_with(|| endpoints(self.runner, link)).clone()
    }
}

fn endpoints(runner: &Runner, link: &Link) -> Option<Vec<Underlay>> {
    if link.kind() != "wireguard" {
        return None;
    }
    let text = runner.read(&Cmd::new("wg", ["show", &link.ifname, "endpoints"])).ok()?;
    let endpoints = text.lines().filter_map(|line| line.split('\t').nth(1)?.parse::<std::net::SocketAddr>().ok());
    Some(endpoints.map(|at| Underlay::At(at.ip(), at.port())).collect())
}

impl Facts for Machine<'_> {
    fn gets_finished(&self, link: &Link) -> Result<bool> {
        if !self.features.borrow().contains_key(&link.ifindex) {
            let features = ethtool::features(self.runner, &link.ifname)?;
            self.features.borrow_mut().insert(link.ifindex, features);
        }
        let all = self.features.borrow();
        let is_off = |name| all.get(&link.ifindex).and_then(|features| features.get(name)) == Some(&false);
        Ok(is_off("tx-checksumming") && is_off("tcp-segmentation-offload"))
    }

    /// `ip` tells it from Linux 5.14 on; a virtual device of before is known by its kind. What /sys shows may belong to
    /// another network namespace, hence the look at the number.
    fn bus(&self, link: &Link) -> Option<String> {
        if link.parentbus.is_some() || !link.kind().is_empty() {
            return link.parentbus.clone();
        }
        let device = Path::new("/sys/class/net").join(&link.ifname);
        let number = std::fs::read_to_string(device.join("ifindex")).ok()?;
        if number.trim() != link.ifindex.to_string() {
            return None;
        }
        let bus = std::fs::read_link(device.join("device/subsystem")).ok()?;
        Some(bus.file_name()?.to_string_lossy().into_owned())
    }

    fn way(&self, address: IpAddr) -> Result<Option<String>> {
        Ok(self.route(Packet::to(address))?.ok().map(|reply| reply.dev))
    }
}
