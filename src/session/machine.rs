//! What the machine says besides the session: asked once, and remembered for as long as a command runs.

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use anyhow::Result;

use crate::request::Underlay;
use crate::session::stack::Facts;
use crate::tools::bpftool::{self, Attachment};
use crate::tools::ethtool;
use crate::tools::exec::{Cmd, Runner};
use crate::tools::ip::{self, Link, RouteReply};

/// The answers of the machine.
pub(crate) struct Machine<'a> {
    pub runner: &'a Runner,
    pub links: Vec<Link>,
    features: RefCell<BTreeMap<u32, BTreeMap<String, bool>>>,
    routes: RefCell<BTreeMap<IpAddr, Result<RouteReply, String>>>,
    addresses: OnceCell<Vec<IpAddr>>,
    attachments: OnceCell<Vec<Attachment>>,
    endpoints: RefCell<BTreeMap<u32, Option<Vec<Underlay>>>>,
}

/// bpftool asks for each interface's programs one by one: so many may there be.
const FEW: usize = 16;

impl<'a> Machine<'a> {
    pub(crate) fn ask(runner: &'a Runner) -> Result<Machine<'a>> {
        Ok(Machine {
            runner,
            links: ip::links(runner)?,
            features: RefCell::default(),
            routes: RefCell::default(),
            addresses: OnceCell::new(),
            attachments: OnceCell::new(),
            endpoints: RefCell::default(),
        })
    }

    /// The interface of that name, which may be one of its other names.
    pub(crate) fn named(&self, name: &str) -> Option<&Link> {
        let links = || self.links.iter();
        links()
            .find(|link| link.ifname == name)
            .or_else(|| links().find(|link| link.altnames.iter().any(|alt| alt == name)))
    }

    pub(crate) fn indexed(&self, ifindex: u32) -> Option<&Link> {
        ip::find(&self.links, ifindex)
    }

    /// Looks up the routes to these addresses, all in one question.
    pub(crate) fn routes(&self, addresses: &[IpAddr]) -> Result<()> {
        let new: Vec<_> = addresses.iter().filter(|address| !self.routes.borrow().contains_key(address)).collect();
        if new.is_empty() {
            return Ok(());
        }
        let questions: Vec<_> = new.iter().map(|address| (**address, None)).collect();
        for (address, reply) in new.into_iter().zip(ip::routes(self.runner, &questions)?) {
            self.routes.borrow_mut().insert(*address, reply);
        }
        Ok(())
    }

    /// The route to an address, or the kernel's reason why there is none.
    pub(crate) fn route(&self, address: IpAddr) -> Result<Result<RouteReply, String>> {
        self.routes(&[address])?;
        Ok(self.routes.borrow().get(&address).cloned().unwrap_or_else(|| Err("no route".into())))
    }

    /// Every address that this network namespace owns.
    pub(crate) fn addresses(&self) -> Result<&[IpAddr]> {
        if let Some(known) = self.addresses.get() {
            return Ok(known);
        }
        let addresses = ip::addresses(self.runner)?;
        Ok(self.addresses.get_or_init(|| addresses))
    }

    /// All programs at hooks; none where there are many interfaces.
    pub(crate) fn attachments(&self) -> Result<&[Attachment]> {
        if let Some(known) = self.attachments.get() {
            return Ok(known);
        }
        let attachments = match self.links.len() {
            ..=FEW => bpftool::attachments(&bpftool::ask(self.runner, &[bpftool::NET_QUESTION.into()])?[0])?,
            _ => Vec::new(),
        };
        Ok(self.attachments.get_or_init(|| attachments))
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
        Ok(self.route(address)?.ok().map(|reply| reply.dev))
    }
}
