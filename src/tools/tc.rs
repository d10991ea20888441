//! What sits at an interface's TC hooks, and how ours gets there and leaves. One `tc -batch` for many interfaces.

use anyhow::{Context, Result};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::datapath::abi::Direction;
use crate::tools::exec::{Cmd, Runner};

/// Our filters go first: a filter before us that answers OK would hide the packet.
pub const FIRST_PREF: u32 = 1;

#[derive(Debug, Deserialize)]
pub struct Qdisc {
    pub kind: String,
    #[serde(default)]
    pub root: bool,
    #[serde(default)]
    pub drops: u64,
    /// Packets that stand in it now.
    #[serde(default)]
    pub qlen: u64,
}

/// One filter of `tc -j filter show`; the rows without options are headers of a preference, not filters.
#[derive(Clone, Debug, Deserialize)]
pub struct Filter {
    pub pref: u32,
    pub kind: String,
    pub options: Option<FilterOptions>,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct FilterOptions {
    #[serde(default)]
    pub handle: serde_json::Value,
    pub prog: Option<Program>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Program {
    #[serde(default)]
    pub name: String,
}

impl Filter {
    /// The number that tells filters of one preference apart.
    pub fn handle(&self) -> Option<u32> {
        let shown = self.options.as_ref()?.handle.as_str()?;
        u32::from_str_radix(shown.strip_prefix("0x")?, 16).ok()
    }

    /// The name of the program that this filter runs.
    pub fn program(&self) -> &str {
        let options = self.options.as_ref();
        options.and_then(|options| options.prog.as_ref()).map_or("", |prog| prog.name.as_str())
    }
}

/// Everything at one interface's hooks.
#[derive(Debug)]
pub struct Hooks {
    pub qdiscs: Vec<Qdisc>,
    pub ingress: Vec<Filter>,
    pub egress: Vec<Filter>,
}

impl Hooks {
    pub fn has_qdisc(&self, kind: &str) -> bool {
        self.qdiscs.iter().any(|qdisc| qdisc.kind == kind)
    }

    pub fn filters(&self, direction: Direction) -> &[Filter] {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }

    pub fn is_unused(&self) -> bool {
        self.ingress.is_empty() && self.egress.is_empty()
    }

    /// The lowest preference that a bpf filter can take: before all others, unless another kind sits there.
    pub fn free_pref(&self, direction: Direction) -> u32 {
        let taken = |pref| self.filters(direction).iter().any(|filter| filter.pref == pref && filter.kind != "bpf");
        (FIRST_PREF..).find(|pref| !taken(*pref)).unwrap_or(FIRST_PREF)
    }
}

/// What sits at the hooks of each of these interfaces, in their order.
pub fn hooks(runner: &Runner, interfaces: &[&str]) -> Result<Vec<Hooks>> {
    if interfaces.is_empty() {
        return Ok(Vec::new());
    }
    let hooks = |dev: &&str| [format!("qdisc show dev {dev}"), filters(dev, "ingress"), filters(dev, "egress")];
    let lines: Vec<String> = interfaces.iter().flat_map(hooks).collect();
    let text = runner.read(&Cmd::new("tc", ["-j", "-s", "-batch", "-"]).input(&lines))?;
    let mut replies = serde_json::Deserializer::from_str(&text).into_iter::<serde_json::Value>();
    interfaces
        .iter()
        .map(|_| Ok(Hooks { qdiscs: next(&mut replies)?, ingress: next(&mut replies)?, egress: next(&mut replies)? }))
        .collect()
}

fn filters(dev: &str, hook: &str) -> String {
    format!("filter show dev {dev} {hook}")
}

fn next<T: DeserializeOwned>(
    replies: &mut impl Iterator<Item = serde_json::Result<serde_json::Value>>,
) -> Result<Vec<T>> {
    let form = "tc gave JSON of another form; try: snifctl doctor";
    let reply = replies.next().context("tc answered less than it was asked; try: snifctl doctor")?;
    serde_json::from_value(reply.context(form)?).context(form)
}

/// Packets that the interface's qdiscs have dropped since it exists.
pub fn qdisc_drops(hooks: &Hooks) -> u64 {
    hooks.qdiscs.iter().filter(|qdisc| qdisc.root).map(|qdisc| qdisc.drops).sum()
}

/// Packets that stand in the interface's queues now.
pub fn standing(hooks: &Hooks) -> u64 {
    hooks.qdiscs.iter().filter(|qdisc| qdisc.root).map(|qdisc| qdisc.qlen).sum()
}

/// The batch line that adds the qdisc with the two hooks.
pub fn add_clsact(dev: &str) -> String {
    format!("qdisc add dev {dev} clsact")
}

pub fn del_clsact(dev: &str) -> String {
    format!("qdisc del dev {dev} clsact")
}

/// The batch line that attaches a pinned program.
pub fn add_filter(dev: &str, direction: Direction, pref: u32, handle: u32, pin: &str) -> String {
    format!("filter add dev {dev} {} pref {pref} handle {handle:#x} bpf da object-pinned {pin}", direction.hook())
}

/// The batch line that puts another pinned program in the place of one: no packet passes between them.
pub fn replace_filter(dev: &str, direction: Direction, pref: u32, handle: u32, pin: &str) -> String {
    format!("filter replace dev {dev} {} pref {pref} handle {handle:#x} bpf da object-pinned {pin}", direction.hook())
}

pub fn del_filter(dev: &str, direction: Direction, pref: u32, handle: u32) -> String {
    format!("filter del dev {dev} {} pref {pref} handle {handle:#x} bpf", direction.hook())
}

/// Runs many changes in one `tc`; it stops at the first that fails.
pub fn batch(runner: &Runner, lines: &[String]) -> Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    runner.write(&Cmd::new("tc", ["-batch", "-"]).input(lines)).map(drop)
}
