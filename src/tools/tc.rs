//! What sits at an interface's TC hooks, and how ours gets there and leaves. One `tc -batch` for many interfaces.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Result, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::tools::batch::{self, Reply, word};
use crate::tools::exec::{Cmd, Runner};
use crate::tools::json;

/// Our filters go first: a filter before us that answers OK would hide the packet.
pub(crate) const FIRST_PREF: u32 = 1;

/// A chain without filters that marks a clsact qdisc as ours, and goes with it. tc shows it to who asks for chains.
pub(crate) const MARK: u32 = 0x534e49;

/// An interface as tools are told it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Dev {
    pub name: String,
    /// The network namespace that it is in, if that is not ours.
    pub netns: Option<PathBuf>,
}

impl Dev {
    /// One of our own network namespace.
    pub(crate) fn ours(name: &str) -> Dev {
        Dev { name: name.into(), netns: None }
    }
}

/// The two hooks of clsact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hook {
    Ingress,
    Egress,
}

impl Hook {
    fn name(self) -> &'static str {
        match self {
            Hook::Ingress => "ingress",
            Hook::Egress => "egress",
        }
    }
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Qdisc {
    pub kind: String,
    #[serde(default, deserialize_with = "json::or_unknown")]
    pub dev: String,
    #[serde(default, deserialize_with = "json::or_unknown")]
    pub root: bool,
    #[serde(default, deserialize_with = "json::or_unknown")]
    pub drops: u64,
    /// Packets that stand in it now.
    #[serde(default, deserialize_with = "json::or_unknown")]
    pub qlen: u64,
}

/// One filter of `tc -j filter show`; the rows without options are headers of a preference, not filters.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Filter {
    #[serde(default, deserialize_with = "json::or_unknown")]
    pub pref: u32,
    #[serde(default, deserialize_with = "json::or_unknown")]
    pub kind: String,
    #[serde(default, deserialize_with = "json::or_unknown")]
    pub chain: u32,
    #[serde(default, deserialize_with = "json::or_unknown")]
    pub options: Option<FilterOptions>,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct FilterOptions {
    #[serde(default, deserialize_with = "json::or_unknown")]
    pub handle: serde_json::Value,
    #[serde(default, deserialize_with = "json::or_unknown")]
    pub prog: Option<Program>,
    /// The hardware does what the filter says.
    #[serde(default, deserialize_with = "json::or_unknown")]
    pub in_hw: bool,
}

/// A loaded program. Its name is missing where tc is older than 6.0.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Program {
    #[serde(default, deserialize_with = "json::or_unknown")]
    pub id: Option<u32>,
    #[serde(default, deserialize_with = "json::or_unknown")]
    pub name: String,
}

impl Filter {
    /// The number that tells filters of one preference apart.
    pub(crate) fn handle(&self) -> Option<u32> {
        let shown = self.options.as_ref()?.handle.as_str()?;
        u32::from_str_radix(shown.strip_prefix("0x")?, 16).ok()
    }

    pub(crate) fn is_in_hardware(&self) -> bool {
        self.options.as_ref().is_some_and(|options| options.in_hw)
    }

    /// The kernel's number of the program that this filter runs.
    pub(crate) fn id(&self) -> Option<u32> {
        self.options.as_ref()?.prog.as_ref()?.id
    }

    /// The name of the program that this filter runs.
    pub(crate) fn program(&self) -> &str {
        let options = self.options.as_ref();
        options.and_then(|options| options.prog.as_ref()).map_or("", |prog| prog.name.as_str())
    }
}

/// Everything at one interface's hooks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Hooks {
    /// The interface was not there when it was asked for.
    pub gone: bool,
    pub qdiscs: Vec<Qdisc>,
    pub ingress: Vec<Filter>,
    pub egress: Vec<Filter>,
    /// Its clsact qdisc is one that we have added.
    pub marked: bool,
}

impl Hooks {
    pub(crate) fn has_qdisc(&self, kind: &str) -> bool {
        self.qdiscs.iter().any(|qdisc| qdisc.kind == kind)
    }

    pub(crate) fn filters(&self, hook: impl Into<Hook>) -> &[Filter] {
        match hook.into() {
            Hook::Ingress => &self.ingress,
            Hook::Egress => &self.egress,
        }
    }

    /// Takes the filters with one handle for ones with another, and those that have that one for strangers.
    pub(crate) fn rename(&mut self, own: u32, known: u32) {
        for options in self.ingress.iter_mut().chain(&mut self.egress).filter_map(|filter| filter.options.as_mut()) {
            let handle =
                options.handle.as_str().and_then(|text| u32::from_str_radix(text.strip_prefix("0x")?, 16).ok());
            match handle {
                Some(handle) if handle == own => options.handle = format!("{known:#x}").into(),
                Some(handle) if handle == known => options.handle = Value::Null,
                _ => {}
            }
        }
    }

    /// Forgets the filters of one preference.
    pub(crate) fn remove(&mut self, hook: impl Into<Hook>, pref: u32) {
        match hook.into() {
            Hook::Ingress => self.ingress.retain(|filter| filter.pref != pref),
            Hook::Egress => self.egress.retain(|filter| filter.pref != pref),
        }
    }

    /// The lowest preference that a bpf filter can take: before all others, unless another kind sits there.
    pub(crate) fn free_pref(&self, hook: impl Into<Hook>) -> u32 {
        let filters = self.filters(hook);
        let taken = |pref| filters.iter().any(|filter| filter.pref == pref && filter.kind != "bpf");
        (FIRST_PREF..).find(|pref| !taken(*pref)).unwrap_or(FIRST_PREF)
    }
}

/// So many network namespaces are asked at a time.
const AT_A_TIME: usize = 8;

/// What sits at the hooks of each of these interfaces, in their order. The qdiscs are asked for once: of one interface the
/// kernel tells all, and `tc` leaves out the others.
pub(crate) fn hooks(runner: &Runner, interfaces: &[Dev]) -> Result<Vec<Hooks>> {
    let mut names: BTreeMap<Option<&Path>, Vec<&str>> = BTreeMap::new();
    for dev in interfaces {
        names.entry(dev.netns.as_deref()).or_default().push(&dev.name);
    }
    let all: Vec<(Option<&Path>, Vec<&str>)> = names.into_iter().collect();
    let mut found = BTreeMap::new();
    for some in all.chunks(AT_A_TIME) {
        let answers = thread::scope(|scope| {
            let ask = |(netns, names): &(Option<&Path>, Vec<&str>)| hooks_in(runner, *netns, names);
            let asked: Vec<_> = some.iter().map(|at| scope.spawn(move || ask(at))).collect();
            asked.into_iter().map(|answer| answer.join().expect("no panic")).collect::<Result<Vec<_>>>()
        })?;
        found.extend(some.iter().map(|(netns, _)| *netns).zip(answers.into_iter().map(Vec::into_iter)));
    }
    let mut hooks = Vec::new();
    for dev in interfaces {
        hooks.push(found.get_mut(&dev.netns.as_deref()).and_then(Iterator::next).unwrap_or_default());
    }
    Ok(hooks)
}

/// Those of interfaces of one network namespace. One that ends meanwhile has none.
fn hooks_in(runner: &Runner, netns: Option<&Path>, interfaces: &[&str]) -> Result<Vec<Hooks>> {
    let gone = || interfaces.iter().map(|_| Hooks { gone: true, ..Hooks::default() }).collect();
    match ask_hooks(runner, netns, interfaces) {
        Err(_) if netns.is_some_and(|netns| !netns.exists()) => Ok(gone()),
        answer => answer,
    }
}

fn ask_hooks(runner: &Runner, netns: Option<&Path>, interfaces: &[&str]) -> Result<Vec<Hooks>> {
    let lines: Vec<String> =
        ["qdisc show".to_string()].into_iter().chain(interfaces.iter().flat_map(|dev| questions(dev))).collect();
    let mut replies = batch::ask_in(runner, netns, "tc", &["-j", "-s"], &lines)?.into_iter();
    let Some(qdiscs) = replies.next() else { return Ok(Vec::new()) };
    let mut qdiscs_of: HashMap<String, Vec<Qdisc>> = HashMap::new();
    for qdisc in json::known::<Qdisc>(qdiscs.unwrap_or_default()) {
        qdiscs_of.entry(qdisc.dev.clone()).or_default().push(qdisc);
    }
    let hooks = |dev: &&str| {
        let no_reply = || Err("it gave no reply".into());
        let [ingress, egress, chains] = [(); 3].map(|()| replies.next().unwrap_or_else(no_reply));
        let hooks = hooks_of(qdiscs_of.get(*dev).cloned().unwrap_or_default(), ingress, egress)?;
        let marked = hooks.has_qdisc("clsact") && has_mark(&chains.unwrap_or_default());
        Ok(Hooks { marked, ..hooks })
    };
    interfaces.iter().map(hooks).collect()
}

/// The batch lines that ask for an interface's filters, and for the mark.
fn questions(dev: &str) -> [String; 3] {
    let dev = word(dev);
    let filters = |hook: &str| format!("filter show dev {dev} {hook}");
    [filters("ingress"), filters("egress"), format!("chain show dev {dev} ingress")]
}

fn has_mark(chains: &[serde_json::Value]) -> bool {
    chains.iter().any(|chain| chain["chain"].as_u64() == Some(MARK.into()))
}

/// The interfaces that have a clsact qdisc.
pub(crate) fn with_clsact(runner: &Runner) -> Result<Vec<String>> {
    let qdiscs = batch::ask(runner, "tc", &["-j"], &["qdisc show".to_string()])?.pop();
    let qdiscs = json::known::<Qdisc>(qdiscs.and_then(Result::ok).unwrap_or_default());
    Ok(qdiscs.into_iter().filter(|qdisc| qdisc.kind == "clsact").map(|qdisc| qdisc.dev).collect())
}

/// The hooks of one interface, from its two replies. One that has vanished meanwhile has none.
fn hooks_of(qdiscs: Vec<Qdisc>, ingress: Reply, egress: Reply) -> Result<Hooks> {
    match (ingress, egress) {
        (Ok(ingress), Ok(egress)) => {
            Ok(Hooks { gone: false, qdiscs, ingress: filters(ingress), egress: filters(egress), marked: false })
        }
        (Err(reason), _) | (_, Err(reason)) => {
            ensure!(says_gone(&reason), "tc cannot tell what is at the hooks: {reason}; try: snifctl doctor");
            Ok(Hooks { gone: true, ..Hooks::default() })
        }
    }
}

/// The filters of a list. One that cannot be read is there all the same: a stranger.
pub(super) fn filters(members: Vec<Value>) -> Vec<Filter> {
    let filter = |member: Value| match serde_json::from_value::<Filter>(member) {
        Ok(filter) => filter,
        Err(_) => Filter { pref: 0, kind: String::new(), chain: 0, options: Some(FilterOptions::default()) },
    };
    members.into_iter().filter(|member| *member != json!({})).map(filter).collect()
}

/// tc's words where the name is unknown, and the kernel's where the index is.
fn says_gone(reason: &str) -> bool {
    reason.contains("Cannot find device") || reason.contains("No such device")
}

/// Packets that the interface's qdiscs have dropped since it exists.
pub(crate) fn qdisc_drops(hooks: &Hooks) -> u64 {
    hooks.qdiscs.iter().filter(|qdisc| qdisc.root).map(|qdisc| qdisc.drops).sum()
}

/// Packets that stand in the interface's queues now.
pub(crate) fn standing(hooks: &Hooks) -> u64 {
    hooks.qdiscs.iter().filter(|qdisc| qdisc.root).map(|qdisc| qdisc.qlen).sum()
}

/// The batch line that adds the qdisc with the two hooks.
pub(crate) fn add_clsact(dev: &str) -> String {
    format!("qdisc add dev {} clsact", word(dev))
}

pub(crate) fn del_clsact(dev: &str) -> String {
    format!("qdisc del dev {} clsact", word(dev))
}

/// The batch line that marks a clsact qdisc as ours.
pub(crate) fn add_mark(dev: &str) -> String {
    format!("chain add dev {} ingress chain {MARK}", word(dev))
}

pub(crate) fn del_mark(dev: &str) -> String {
    format!("chain del dev {} ingress chain {MARK}", word(dev))
}

/// The batch line that attaches a pinned program.
pub(crate) fn add_filter(at: &Place, pin: &str) -> String {
    format!("filter add {} bpf da object-pinned {pin}{}", at.words(), at.classid())
}

/// The batch line that puts another pinned program in the place of one: no packet passes between them.
pub(crate) fn replace_filter(at: &Place, pin: &str) -> String {
    format!("filter replace {} bpf da object-pinned {pin}{}", at.words(), at.classid())
}

pub(crate) fn del_filter(at: &Place) -> String {
    format!("filter del {} bpf", at.words())
}

/// Where a filter of ours is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    pub dev: &'a str,
    pub hook: Hook,
    pub pref: u32,
    pub handle: u32,
    /// What the program can read of its filter; 0 for nothing.
    pub classid: u16,
}

impl Place<'_> {
    fn words(&self) -> String {
        format!("dev {} {} pref {} handle {:#x}", word(self.dev), self.hook.name(), self.pref, self.handle)
    }

    fn classid(&self) -> String {
        if self.classid == 0 { String::new() } else { format!(" classid :{:x}", self.classid) }
    }
}

/// Runs many changes in one `tc`; it stops at the first that fails.
pub(crate) fn batch(runner: &Runner, netns: Option<&Path>, lines: &[String]) -> Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    runner.write(&Cmd::new("tc", ["-batch", "-"]).input(lines).within(netns)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    macro_rules! fixtures {
        ($($version:literal),*) => {
            [$((
                $version,
                include_str!(concat!("../../tests/fixtures/iproute2-", $version, "/tc-hooks.json")),
                include_str!(concat!("../../tests/fixtures/iproute2-", $version, "/tc-hooks.stderr")),
            )),*]
        };
    }

    #[test]
    fn every_version_tells_what_sits_at_the_hooks_also_beside_a_device_that_is_gone() {
        for (version, text, stderr) in fixtures!("5.10", "6.1", "6.15", "7.3") {
            let replies = batch::replies("tc", 12, text, stderr).unwrap();
            // In the fixtures each interface was asked for its qdiscs.
            let of = |replies: &[Reply]| {
                let qdiscs = replies[0].clone().unwrap_or_default();
                let qdiscs = json::known(qdiscs);
                hooks_of(qdiscs, replies[1].clone(), replies[2].clone()).unwrap()
            };
            let [w0, gone, w1, odd] = &replies.chunks_exact(3).map(of).collect::<Vec<_>>()[..] else {
                panic!("{version}: not four interfaces")
            };
            assert_eq!([w0.gone, gone.gone, w1.gone, odd.gone], [false, true, false, false], "{version}");
            assert!(w0.has_qdisc("clsact") && !w0.ingress.is_empty() && w0.egress.is_empty(), "{version}");
            assert!(gone.ingress.is_empty() && gone.qdiscs.is_empty() && w1.ingress.is_empty(), "{version}");
            let filter = w0.ingress.iter().find(|filter| filter.options.is_some()).unwrap();
            assert_eq!((filter.pref, filter.kind.as_str(), filter.handle()), (1, "bpf", Some(0x5a01)), "{version}");
            assert_eq!(filter.program(), if version == "5.10" { "" } else { "pass_all" }, "{version}");
            let program = filter.options.as_ref().unwrap().prog.as_ref().unwrap();
            assert!(program.id.is_some_and(|id| id > 0), "{version}");
            assert_eq!(w0.free_pref(Hook::Ingress), 1, "{version}");
        }
    }

    #[test]
    fn a_device_that_is_not_there_has_no_hooks_and_is_no_failure() {
        let hooks = hooks(&Runner::default(), &["lo", "no-such-device", "lo"].map(Dev::ours)).unwrap();
        assert_eq!(hooks.iter().map(|hooks| hooks.gone).collect::<Vec<_>>(), [false, true, false]);
        assert!(!hooks[2].qdiscs.is_empty());
    }

    #[test]
    fn a_mark_is_told_by_its_number_and_nothing_else() {
        let chains = |text: &str| has_mark(&serde_json::from_str::<Vec<serde_json::Value>>(text).unwrap());
        assert!(chains(r#"[{"parent":"ffff:","chain":0},{"parent":"ffff:","chain":5459529}]"#));
        for other in ["[]", "[{}]", r#"[{"chain":6}]"#, r#"[{"chain":null}]"#, "[7]"] {
            assert!(!chains(other), "{other}");
        }
    }

    #[test]
    fn another_failure_is_not_taken_for_a_device_that_is_gone() {
        let err = hooks_of(Vec::new(), Err("Operation not permitted".into()), Ok(vec![])).unwrap_err();
        assert!(err.to_string().contains("not permitted"), "{err}");
    }

    #[test]
    fn lines_name_a_device_as_the_batch_language_has_it() {
        assert_eq!(del_clsact("'a"), "qdisc del dev \"'a\" clsact");
        let at = Place { dev: "a\\", hook: Hook::Egress, pref: 1, handle: 0x10, classid: 0 };
        let line = "filter add dev \"a\\\" egress pref 1 handle 0x10 bpf da object-pinned /p";
        assert_eq!(add_filter(&at, "/p"), line);
        assert_eq!(add_filter(&Place { classid: 0x1f, ..at }, "/p"), format!("{line} classid :1f"));
    }
}
