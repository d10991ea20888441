//! `apply`: make sessions as files have them. Every file is read, and all that they ask for is checked, before anything is
//! changed.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, anyhow};
use serde_json::{Value, json};

use crate::commands::up::Found;
use crate::commands::{news, sync};
use crate::datapath::filter::{self, Filter};
use crate::file::{self, Entry, Mistakes, Text};
use crate::output::json;
use crate::request::{Request, Watched};
use crate::session::change::Change;
use crate::session::difference::Clsact;
use crate::session::engine::{self, Context, Edit, Open};
use crate::session::firewall;
use crate::session::resolve::{self, Asked};
use crate::tools::exec::{print, quote};
use crate::tools::interrupt;
use crate::tools::ip::Link;
use crate::usage::Usage;

/// An interface of a file may be absent: the session waits for it.
const WAITS_FOR_INTERFACES: bool = true;

/// What becomes of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Added,
    Changed,
    /// The request is the one that is in force; what the machine had of it was not.
    Repaired,
    Removed,
    Same,
}

impl What {
    fn name(self) -> &'static str {
        match self {
            What::Added => "added",
            What::Changed => "changed",
            What::Repaired => "repaired",
            What::Removed => "removed",
            What::Same => "same",
        }
    }
}

/// A session that was applied, or was to be.
#[derive(Debug)]
pub(crate) struct Applied {
    pub name: String,
    pub what: What,
    /// How the request differs from the one before: `filter 'tcp' → 'udp'`, `+ tap eth2 ingress`; of a new one all of it.
    pub differences: Vec<String>,
    /// What was done.
    pub changes: Vec<Change>,
    /// What the user should know.
    pub notes: Vec<String>,
    /// Why it could not be done.
    pub error: Option<anyhow::Error>,
}

impl Applied {
    fn new(name: &str, what: What, differences: Vec<String>) -> Applied {
        Applied { name: name.into(), what, differences, changes: Vec::new(), notes: Vec::new(), error: None }
    }

    /// What differs, a line each: `~ session web: + tap eth2 ingress`.
    pub(crate) fn lines(&self) -> Vec<String> {
        let name = &self.name;
        match self.what {
            What::Added => vec![format!("+ session {name}: {}", self.differences.join(", "))],
            What::Removed => vec![format!("- session {name}")],
            _ => self.differences.iter().map(|line| format!("~ session {name}: {line}")).collect(),
        }
    }

    /// What had to be put right besides, a line each: `web: tap eth0 ingress: its filter is gone; attached`.
    pub(crate) fn repairs(&self) -> Vec<String> {
        let changes = self.changes.iter().filter(|_| self.what == What::Repaired);
        changes.map(|change| format!("{}: {}", self.name, change.line())).collect()
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "result": if self.error.is_some() { "failed" } else { self.what.name() },
            "differences": self.differences,
            "changes": self.changes.iter().map(sync::shown).collect::<Vec<Value>>(),
            "error": self.error.as_ref().map(|err| format!("{err:#}")),
        })
    }
}

/// What came of it, a session after the other.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub sessions: Vec<Applied>,
    /// What the user should know besides.
    pub notes: Vec<String>,
}

impl Outcome {
    pub(crate) fn has_failed(&self) -> bool {
        self.sessions.iter().any(|session| session.error.is_some())
    }
}

pub(super) fn run(context: &Context, sources: &[PathBuf], prune: bool, as_json: bool) -> Result<ExitCode> {
    let entries = read(sources).map_err(usage)?;
    let dry_run = context.runner.dry_run;
    let filters = filters(context, &entries)?;
    let prepared = Prepared::new(context, entries, filters, prune)?;
    for line in prepared.lines() {
        match (dry_run, as_json) {
            (true, _) => eprintln!("snifctl: {line}"),
            (false, true) => {}
            (false, false) => print(&format!("{line}\n"))?,
        }
    }
    let outcome = prepared.carry_out()?;
    for session in &outcome.sessions {
        if !as_json && !dry_run {
            session.repairs().iter().try_for_each(|line| print(&format!("{line}\n")))?;
        }
        session.notes.iter().for_each(|note| eprintln!("snifctl: {note}"));
        if let Some(err) = &session.error {
            eprintln!("snifctl: session {}: {err:#}", session.name);
        }
    }
    outcome.notes.iter().for_each(|note| eprintln!("snifctl: {note}"));
    if as_json && !dry_run {
        json::print(&json!({ "sessions": outcome.sessions.iter().map(Applied::json).collect::<Vec<Value>>() }))?;
    }
    Ok(if outcome.has_failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Mistakes in files are of the user's making.
pub(crate) fn usage(err: anyhow::Error) -> anyhow::Error {
    match err.downcast::<Mistakes>() {
        Ok(mistakes) => Usage::from(mistakes).into(),
        Err(err) => err,
    }
}

/// Makes the sessions as the files have them, and says what has become of each. It prints nothing but the commands of a dry
/// run, and can be called again and again: what is as it is to be is left alone.
///
/// # Errors
/// A [`Usage`] with all mistakes that only show on the machine; a signal. Then no session was changed, but by a signal those
/// before. What a single session meets is in the [`Outcome`].
pub(crate) fn apply(context: &Context, entries: Vec<Entry>, prune: bool) -> Result<Outcome> {
    let filters = filters(context, &entries)?;
    Prepared::new(context, entries, filters, prune)?.carry_out()
}

/// The sessions of the files, directories (all their `*.toml`, by name) and `-` for standard input; nothing else is looked
/// at.
pub(crate) fn read(sources: &[PathBuf]) -> Result<Vec<Entry>> {
    let mut texts = Vec::new();
    for source in sources {
        if source == Path::new("-") {
            let mut bytes = Vec::new();
            std::io::stdin().read_to_end(&mut bytes).map_err(|err| unreadable(source, &err))?;
            texts.push(text("stdin".into(), bytes)?);
            continue;
        }
        let paths = match source.is_dir() {
            true => files(source).map_err(|err| unreadable(source, &err))?,
            false => vec![source.clone()],
        };
        for path in paths {
            let bytes = fs::read(&path).map_err(|err| unreadable(&path, &err))?;
            texts.push(text(path.display().to_string(), bytes)?);
        }
    }
    Ok(file::parse(&texts)?)
}

fn unreadable(path: &Path, err: &std::io::Error) -> anyhow::Error {
    let path = path.display();
    anyhow!("-f {path} cannot be read ({err}); name a file, a directory of *.toml files, or - for standard input")
}

fn text(name: String, bytes: Vec<u8>) -> Result<Text> {
    let text = String::from_utf8(bytes).map_err(|err| {
        let line = 1 + err.as_bytes()[..err.utf8_error().valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
        Mistakes(vec![format!("{name}:{line}: is not UTF-8 text; save it as UTF-8")])
    })?;
    Ok(Text { name, text })
}

/// The files of a directory, in the order of their names; hidden ones are an editor's.
fn files(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !is_hidden && path.extension().is_some_and(|end| end == "toml") && !path.is_dir() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// The filters of the sessions, compiled.
fn filters(context: &Context, entries: &[Entry]) -> Result<Vec<Option<Filter>>> {
    let (mut filters, mut mistakes) = (Vec::new(), Vec::new());
    for entry in entries {
        let expression = entry.request.options.filter.as_deref();
        match expression.map(|expression| filter::compile(&context.runner, "--filter", expression)).transpose() {
            Ok(filter) => filters.push(filter),
            Err(err) => mistakes.push(mistake(entry, err)?),
        }
    }
    refuse(mistakes)?;
    Ok(filters)
}

/// An error as a mistake in the file, if it is about what stands there.
fn mistake(entry: &Entry, err: anyhow::Error) -> Result<String> {
    if interrupt::is_cause(&err) {
        return Err(err);
    }
    entry.mistake(&format!("{err:#}")).ok_or(err)
}

fn refuse(mistakes: Vec<String>) -> Result<()> {
    if mistakes.is_empty() { Ok(()) } else { Err(Usage::from(Mistakes(mistakes)).into()) }
}

/// All that is to be done, checked.
struct Prepared<'a> {
    context: &'a Context,
    open: Open<'a>,
    works: Vec<Work>,
    /// Sessions that `apply` has made, and that no file has.
    pruned: Vec<String>,
}

/// A session of a file, and what there is of it.
struct Work {
    entry: Entry,
    filter: Option<Filter>,
    /// Until something is changed: then it is looked at again.
    found: Option<Found>,
    applied: Applied,
}

impl Work {
    fn clsact(&self) -> Clsact {
        if self.entry.keeps_clsact { Clsact::Leave } else { Clsact::Remove }
    }
}

impl<'a> Prepared<'a> {
    fn new(context: &'a Context, entries: Vec<Entry>, filters: Vec<Option<Filter>>, prune: bool) -> Result<Self> {
        let open = Open::to_write(context)?;
        let (mut works, mut mistakes) = (Vec::new(), Vec::new());
        for (entry, filter) in entries.into_iter().zip(filters) {
            let name = entry.request.name.clone();
            let (found, applied) = match looked_up(&open, &entry.request) {
                Ok(found) => {
                    let (what, differences) = difference(&open, &found);
                    (Some(found), Applied::new(&name, what, differences))
                }
                Err(err) => match mistake(&entry, err) {
                    Ok(said) => {
                        mistakes.push(said);
                        continue;
                    }
                    Err(err) if interrupt::is_cause(&err) => return Err(err),
                    Err(err) => (None, Applied { error: Some(err), ..Applied::new(&name, What::Same, Vec::new()) }),
                },
            };
            works.push(Work { entry, filter, found, applied });
        }
        refuse(mistakes)?;
        let named: BTreeSet<&str> = works.iter().map(|work| work.applied.name.as_str()).collect();
        let pruned = if prune { surplus(&open, &named)? } else { Vec::new() };
        Ok(Prepared { context, open, works, pruned })
    }

    /// What differs, before it is made.
    fn lines(&self) -> Vec<String> {
        let removed = self.pruned.iter().flat_map(|name| Applied::new(name, What::Removed, Vec::new()).lines());
        self.works.iter().flat_map(|work| work.applied.lines()).chain(removed).collect()
    }

    fn carry_out(self) -> Result<Outcome> {
        let Prepared { context, open, works, pruned } = self;
        let (mut sessions, mut is_changed) = (Vec::new(), false);
        for mut work in works {
            if work.applied.error.is_none() {
                // What was looked up is no more of use once another session was changed.
                let found = work.found.take().filter(|_| !is_changed);
                match made(context, &open, &mut work, found).map_err(|err| so_far(err, &sessions)) {
                    Ok(is_nothing) => is_changed |= !is_nothing,
                    Err(err) if interrupt::is_cause(&err) => return Err(err),
                    Err(err) => {
                        work.applied.error = Some(err);
                        is_changed = true;
                    }
                }
            }
            sessions.push(work.applied);
        }
        let mut outcome = Outcome { sessions, notes: Vec::new() };
        if outcome.has_failed() && !pruned.is_empty() {
            // One of them may be what the one that failed was to take the place of.
            let names = pruned.join(", ");
            outcome.notes.push(format!("not pruned, as not all could be applied: {names}; apply again when it can"));
            return Ok(outcome);
        }
        for name in pruned {
            let mut applied = Applied::new(&name, What::Removed, Vec::new());
            match removed(context, &open, &name).map_err(|err| so_far(err, &outcome.sessions)) {
                Ok(changes) => applied.changes = changes,
                Err(err) if interrupt::is_cause(&err) => return Err(err),
                Err(err) => applied.error = Some(err),
            }
            outcome.sessions.push(applied);
        }
        if is_changed && !context.runner.dry_run {
            outcome.notes.extend(firewall::obstacles(&open.machine).iter().map(|found| found.warning()));
        }
        open.sweep_dead();
        Ok(outcome)
    }
}

/// With an interrupt it is said what was done before.
fn so_far(err: anyhow::Error, sessions: &[Applied]) -> anyhow::Error {
    let done = sessions.iter().filter(|session| !session.changes.is_empty());
    let names: Vec<&str> = done.map(|session| session.name.as_str()).collect();
    let before =
        (!names.is_empty()).then(|| format!("applied before: {}; apply again for the others", names.join(", ")));
    interrupt::partly(err, before)
}

/// What there is of a session that is asked for, if the machine can have it.
fn looked_up(open: &Open, request: &Request) -> Result<Found> {
    let (there, open) = open.read_around(&request.name, Some(request))?;
    let open = &*open;
    let found = Found::of(there, open, request, true)?;
    let scope = found.scope(&open.machine, WAITS_FOR_INTERFACES)?;
    let interfaces = resolve::interfaces(&found.request, found.known.as_ref(), &open.machine);
    resolve::ensure_distinct(&interfaces)?;
    // Nobody is asked and nothing waited for: that is for when it is made.
    let asked = Asked { passive: true, known: found.there.next_hops(), ..scope.asked };
    resolve::resolve(&open.machine, &found.request, &interfaces, &asked, &[])?;
    Ok(found)
}

/// How the request that is to be in force differs from the one that is.
fn difference(open: &Open, found: &Found) -> (What, Vec<String>) {
    let Some(stored) = &found.known else { return (What::Added, vec![file::words(&found.request)]) };
    let differences = file::difference(&resolve::follow(stored, &open.machine), &found.request);
    (if differences.is_empty() { What::Same } else { What::Changed }, differences)
}

/// The sessions that `apply` has made, besides those that are named.
fn surplus(open: &Open, named: &BTreeSet<&str>) -> Result<Vec<String>> {
    let mut surplus = Vec::new();
    for name in open.home.sessions().into_iter().filter(|name| !named.contains(name.as_str())) {
        if open.read(&name)?.stored.is_ok_and(|stored| stored.applied) {
            surplus.push(name);
        }
    }
    Ok(surplus)
}

/// Makes one session, or changes it; answers whether there was nothing to do.
fn made(context: &Context, open: &Open, work: &mut Work, found: Option<Found>) -> Result<bool> {
    let (now, around);
    let request = &work.entry.request;
    let (open, found) = match found {
        Some(found) => {
            around = open.seen_by(&request.name, found.known.as_ref(), Some(request))?;
            (&*around, found)
        }
        None => {
            now = open.again(&context.runner)?;
            let (there, own) = now.read_around(&request.name, Some(request))?;
            around = own;
            (&*around, Found::of(there, &around, request, true)?)
        }
    };
    let (found, moved) = found.moved(open)?;
    let applied = &mut work.applied;
    if let Some(broken) = found.broken().filter(|_| !context.runner.dry_run) {
        applied.notes.push(format!("{broken}; making it anew"));
    }
    if context.runner.dry_run && !applied.differences.is_empty() {
        print(&format!("# session {}\n", applied.name))?;
    }
    let scope = found.scope(&open.machine, WAITS_FOR_INTERFACES)?;
    let is_new = found.known.is_none();
    if !applied.differences.is_empty() {
        applied.notes.extend(absent(open, &found));
    }
    let clsact = work.clsact();
    let filter = work.filter.take();
    let edit = Edit { applied: true, clsact, filter, ..Edit::new(found.request, scope) };
    let done = engine::carry_out(open, found.there, edit)?;
    let applied = &mut work.applied;
    let warnings = if is_new { done.warnings.iter().collect() } else { news(&done) };
    let notes = warnings.into_iter().map(|warning| format!("{}: {}", applied.name, warning.text));
    applied.notes.extend(notes.collect::<Vec<_>>());
    // What cannot be done from here is said, and is no change.
    let (changes, left): (Vec<Change>, Vec<Change>) = done.told().cloned().partition(|change| !change.acts.is_empty());
    applied.notes.extend(left.iter().map(|change| format!("{}: {}", applied.name, change.line())));
    let changes: Vec<Change> = moved.into_iter().chain(changes).collect();
    if applied.what == What::Same && !changes.is_empty() {
        applied.what = What::Repaired;
    }
    applied.changes = changes;
    Ok(done.is_nothing())
}

/// The interfaces that the session has to wait for.
fn absent(open: &Open, found: &Found) -> Vec<String> {
    let is_known = |name: &String| found.known.as_ref().is_some_and(|stored| stored.interfaces.contains_key(name));
    let now = resolve::interfaces(&found.request, found.known.as_ref(), &open.machine).into_iter();
    let absent = now.filter(|(watched, link)| link.is_none() && !is_known(&watched.interface));
    let name = &found.request.name;
    let note = |(absent, _): (Watched, Option<Link>)| {
        let absent = quote(&absent.interface);
        format!(
            "{name}: IFACE {absent} does not exist here yet; once it does, have it watched with: snifctl sync --name {name}"
        )
    };
    absent.map(note).collect()
}

fn removed(context: &Context, open: &Open, name: &str) -> Result<Vec<Change>> {
    let now = open.again(&context.runner)?;
    if context.runner.dry_run {
        print(&format!("# session {name}\n"))?;
    }
    let changes = engine::take_down(&now, name, Clsact::Remove)?;
    Ok(changes.into_iter().filter(|change| !change.is_silent() && !change.acts.is_empty()).collect())
}
