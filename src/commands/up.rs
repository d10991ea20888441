//! `up`: make a session, or find it made; or change it.

use std::process::ExitCode;

use anyhow::{Result, bail, ensure};

use crate::cli::UpArgs;
use crate::commands::stay::{self, Guest, Over};
use crate::commands::{news, warn};
use crate::datapath::abi::{Direction, Remote};
use crate::datapath::filter;
use crate::datapath::objects;
use crate::datapath::source::Source;
use crate::output::{json, text};
use crate::request::{Request, Watched};
use crate::session::change::Change;
use crate::session::difference::Clsact;
use crate::session::engine::{self, Context, Done, Edit, Open, Scope, Started};
use crate::session::firewall::{self, Obstacle};
use crate::session::home::Home;
use crate::session::machine::Machine;
use crate::session::resolve;
use crate::session::stats::{self, Status};
use crate::session::stored::{Stored, Unreadable};
use crate::session::there::There;
use crate::session::upgrade;
use crate::tools::bpftool;
use crate::tools::exec::print;
use crate::tools::interrupt;
use crate::tools::ip::Link;
use crate::tools::rights;

pub(super) fn run(context: &Context, args: &UpArgs) -> Result<ExitCode> {
    let Some(silence) = args.while_stdin else { return made(context, args)? };
    let guest = Guest::new(silence)?;
    let told = made(context, args)?;
    let home = Home::here()?;
    let begin = stay::begin(&home, &args.name);
    // Who cannot be told is gone.
    let is_there = || stay::begin(&home, &args.name) == begin;
    let why = if told.is_ok() { guest.stay(&args.name, is_there)? } else { Over::Reader };
    guest.leave(context, (&args.name, begin), args.clsact.keep_clsact, why)?;
    told.or_else(|err| if interrupt::is_cause(&err) { Ok(ExitCode::SUCCESS) } else { Err(err) })
}

/// Makes the session. The inner result is that of telling so.
fn made(context: &Context, args: &UpArgs) -> Result<Result<ExitCode>> {
    let request = args.request()?;
    let context = &context.dry(&args.dry_run);
    let runner = &context.runner;
    if !runner.dry_run {
        rights::to_write()?;
    }
    let expression = request.options.filter.as_deref();
    let filter = expression.map(|expression| filter::compile(runner, "--filter", expression)).transpose()?;
    let source = Source::datapath(filter.clone(), &objects::parts(request.features(), filter.is_some()));
    // clang may run while routes and links are looked up.
    let compiling = source.clone().begin(runner)?;
    let open = Open::to_write(context)?;
    let (there, open) = open.read_around(&request.name, Some(&request))?;
    let open = &*open;
    if args.while_stdin.is_some() {
        ensure_free(&there)?;
    }
    let found = Found::of(there, open, &request, args.replace)?;
    let (found, moved) = found.moved(open)?;
    moved.iter().for_each(|change| eprintln!("snifctl: {}: {}", request.name, change.line()));
    let (request, known) = (found.request.clone(), found.known.clone());
    let is_replaced = known.as_ref().is_some_and(|stored| !stored.request.differences(&request).is_empty());
    let scope = found.scope(&open.machine, args.absent.wait_for_interface)?;
    let clsact = if args.clsact.keep_clsact { Clsact::Leave } else { Clsact::Remove };
    if let Some(broken) = found.broken().filter(|_| !runner.dry_run) {
        eprintln!("snifctl: {broken}; making it anew");
    }
    let compiling = Started(Some((source, compiling)));
    let edit = Edit { clsact, filter, compiling, ..Edit::new(request.clone(), scope) };
    let done = engine::carry_out(open, found.there, edit)?;
    if runner.dry_run {
        open.sweep_dead();
        return Ok(shown(&request.name, &done, known.is_some()));
    }
    match known {
        None => {
            warn(&done.warnings);
            let notes = done.told().filter(|change| change.acts.is_empty());
            notes.for_each(|note| eprintln!("snifctl: {}: {}", request.name, note.line()));
        }
        Some(_) => tell(&request.name, &done, is_replaced),
    }
    let told = finish(open, &request, &done, args.json);
    open.sweep_dead();
    Ok(told)
}

/// What others have made is not for us to take down.
fn ensure_free(there: &There) -> Result<()> {
    ensure!(
        there.stored.is_err(),
        "--name {0} is taken by a session that is up, and --while-stdin makes one of its own; use another --name, or \
         first: snifctl down --name {0}",
        there.name
    );
    Ok(())
}

/// A session as it is found, and the request that is to be in force.
pub(super) struct Found {
    pub there: There,
    pub request: Request,
    /// What it remembers, if it is there.
    pub known: Option<Stored>,
}

impl Found {
    /// `replaces`: it may have another request.
    pub(super) fn of(there: There, open: &Open, asked: &Request, replaces: bool) -> Result<Found> {
        let (request, known) = match &there.stored {
            Ok(stored) => {
                upgrade::ensure_known(&there)?;
                (agreed(stored, asked, &open.machine, replaces)?, Some(stored.clone()))
            }
            // Its counters are not ours to throw away.
            Err(why @ Unreadable::OtherVersion(_)) => {
                bail!("session {}: {why}; {}", asked.name, why.help(&asked.name))
            }
            Err(_) => (asked.clone(), None),
        };
        Ok(Found { there, request, known })
    }

    /// The same with the programs of this build, and what was changed for that.
    pub(super) fn moved(self, open: &Open) -> Result<(Found, Option<Change>)> {
        let (there, moved) = upgrade::moved(open, self.there)?;
        let known = self.known.map(|known| there.stored.clone().unwrap_or(known));
        Ok((Found { there, known, ..self }, moved))
    }

    /// Everything is asked; what is new in the request is told apart. `waits`: an interface may be absent.
    pub(super) fn scope(&self, machine: &Machine, waits: bool) -> Result<Scope> {
        scope(&self.request, self.known.as_ref(), machine, waits)
    }

    /// Why what is there of it is not taken for a session.
    pub(super) fn broken(&self) -> Option<String> {
        let there = &self.there;
        let is_anew = self.known.is_none() && (there.is_published || !there.halves.is_empty());
        is_anew.then(|| match &there.stored {
            Err(why) if there.is_published => format!("session {}: {why}", there.name),
            _ => format!("session {} was only half there", there.name),
        })
    }
}

/// The request that is to be in force: the one that is, if it is the same, with the names of today.
fn agreed(stored: &Stored, asked: &Request, machine: &Machine, replaces: bool) -> Result<Request> {
    let known = resolve::follow(stored, machine);
    let mut asked = asked.clone();
    for watched in &mut asked.interfaces {
        let place = machine.named(&watched.interface).and_then(|link| stored.place(link.ifindex));
        // What came by a pattern goes by the name that is asked for now.
        let place = place.filter(|(_, place)| place.pattern.is_none());
        let name = place.and_then(|(name, place)| {
            let at = known.interfaces.iter().find(|at| at.interface == *name);
            at.map(|at| at.interface.clone()).or_else(|| machine.indexed(place.ifindex).map(|link| link.ifname.clone()))
        });
        watched.interface = name.unwrap_or_else(|| watched.interface.clone());
    }
    let differences = known.differences(&asked);
    if differences.is_empty() {
        return Ok(known);
    }
    if !replaces {
        bail!(
            "--name {0} is taken by a session with another request ({1}); change it by the same command with --replace, use \
             another --name, or first: snifctl down --name {0}",
            asked.name,
            differences.join(", ")
        );
    }
    Ok(asked)
}

/// Everything is asked; what is new in the request is told apart. `waits`: interfaces may be absent.
fn scope(request: &Request, known: Option<&Stored>, machine: &Machine, waits: bool) -> Result<Scope> {
    let mut scope = Scope::all(request);
    let has = |watched: &Watched| {
        let by_name = |stored: &Stored| stored.request.interfaces.iter().any(|at| at.interface == watched.interface);
        let renamed = || known.zip(machine.named(&watched.interface)).and_then(|(known, at)| known.place(at.ifindex));
        known.is_some_and(by_name) || renamed().is_some()
    };
    for watched in request.interfaces.iter().filter(|watched| !has(watched)) {
        resolve::ensure_there(&watched.interface, known, machine, waits)?;
    }
    let is_known = |link: &Link| known.is_some_and(|stored| stored.place(link.ifindex).is_some());
    let new = resolve::interfaces(request, known, machine).into_iter();
    let new = new.filter(|(watched, link)| match link {
        Some(link) => !is_known(link) && known.is_none_or(|stored| !stored.interfaces.contains_key(&watched.interface)),
        None => false,
    });
    scope.asked.interfaces = new.map(|(watched, _)| watched.interface).collect();
    let is_known = |remote| known.is_some_and(|stored| stored.request.options.remotes.contains(remote));
    // With another source each remote has another way.
    let is_same = known.is_some_and(|stored| stored.request.options.sources == request.options.sources);
    scope.asked.new = request.options.remotes.iter().filter(|at| !is_same || !is_known(at)).copied().collect();
    Ok(scope)
}

/// What `up` says of a session that was there.
fn tell(name: &str, done: &Done, is_replaced: bool) {
    done.told().for_each(|change| eprintln!("snifctl: {name}: {}", change.line()));
    warn(news(done));
    let is_whole = done.told().all(|change| !change.acts.is_empty());
    match (is_replaced, done.told().next()) {
        (true, _) => {}
        (false, None) => eprintln!("snifctl: session {name} is already up with this request"),
        (false, Some(_)) if is_whole => {
            eprintln!("snifctl: session {name} is up with this request, and in order again")
        }
        (false, Some(_)) => eprintln!("snifctl: session {name} is up with this request, as far as it can be"),
    }
}

/// What a dry run adds to the lines that it has printed.
fn shown(name: &str, done: &Done, is_known: bool) -> Result<ExitCode> {
    warn(&done.warnings);
    if is_known && done.is_nothing() {
        eprintln!("snifctl: session {name} is already up with this request");
        return Ok(ExitCode::SUCCESS);
    }
    for (address, remote) in &done.headers {
        show_headers(&address.to_string(), remote)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The outer headers of a remote, as comment lines: one, or one a direction where they differ.
fn show_headers(address: &str, remote: &Remote) -> Result<()> {
    let [ingress, egress] = [Direction::Ingress, Direction::Egress].map(|direction| remote.outer(direction));
    print(&format!("# the outer header to {address}, before lengths, ids and checksums are patched:\n"))?;
    print(&format!("# {}\n", bpftool::hex(ingress)))?;
    if egress != ingress {
        print("# and of copies of outgoing packets:\n")?;
        print(&format!("# {}\n", bpftool::hex(egress)))?;
    }
    Ok(())
}

fn finish(open: &Open, request: &Request, done: &Done, as_json: bool) -> Result<ExitCode> {
    firewall::obstacles(&open.machine).iter().for_each(|found: &Obstacle| eprintln!("snifctl: {}", found.warning()));
    if !as_json {
        print(&text::session_line(request, &done.headers, &open.machine.links))?;
        return Ok(ExitCode::SUCCESS);
    }
    // With the links of now: the relay is new.
    match open.again(open.runner).and_then(|open| stats::session(&open, &request.name)) {
        Ok(session) => json::print(&serde_json::to_value(Status { sessions: vec![session.brief()], machine: None })?)?,
        Err(err) => {
            let name = &request.name;
            eprintln!("snifctl: session {name} is up, but its status could not be read ({err:#}); try: snifctl status");
        }
    }
    Ok(ExitCode::SUCCESS)
}
