//! `status --watch`: the counters as they rise, until somebody has seen enough.

mod model;
mod terminal;
mod view;

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use crate::cli::StatusArgs;
use crate::output::units::{bit_rate, rate};
use crate::session::counted::{self, Counted, Known};
use crate::session::engine::{Context, Open};
use crate::session::home::Wait;
use crate::session::stats;
use crate::tools::exec::print;
use crate::tools::interrupt;
use model::{Model, Whole};
use terminal::Terminal;
use view::{Choice, Prompt, Tone};

/// Between two looks at the counters.
const INTERVAL: Duration = Duration::from_secs(1);
/// Between two whole looks, which cost more.
const WHOLE: Duration = Duration::from_secs(5);
/// A key is seen so soon, and a signal.
const TICK: Duration = Duration::from_millis(50);
/// How long a look waits for another snifctl at work.
const PATIENCE: Duration = Duration::from_secs(10);

/// A filter to put in force: the session, and the expression.
type Filter = (String, String);

/// The ways to those who look. They end when these go.
struct Asks {
    /// For another look at once.
    look: Sender<()>,
    filter: Sender<Filter>,
}

/// What comes from who looks.
enum Told {
    Counted(Vec<Counted>),
    Whole(BTreeMap<String, Whole>),
    /// What could not be done, or was.
    Message(String, Tone),
}

pub(super) fn run(context: &Context, args: &StatusArgs) -> Result<ExitCode> {
    // Not only later: without rights, or with a name that there is not, there is nothing to show.
    let open = Open::to_read(context)?;
    if let Some(name) = &args.name {
        open.chosen(Some(name))?;
    }
    drop(open);
    let (asks, told) = looking(context, args);
    if io::stdout().is_terminal() && io::stdin().is_terminal() && !args.json.json {
        screen(args, &asks, &told)
    } else {
        lines(args, &told)
    }
}

/// Starts to look, in threads of their own: the view never waits for the kernel, nor the counters for a whole look.
fn looking(context: &Context, args: &StatusArgs) -> (Asks, Receiver<Told>) {
    let wait = Wait(context.wait.0.or(Some(PATIENCE)));
    let context = Context { wait, ..*context };
    let (name, interval) = (args.name.clone(), args.interval.unwrap_or(INTERVAL));
    let (tell, told) = mpsc::channel();
    let ((look, looks), (filter, filters)) = (mpsc::channel(), mpsc::channel());
    let (tell_whole, name_whole) = (tell.clone(), name.clone());
    thread::spawn(move || count(&context, name.as_deref(), interval, &looks, &tell));
    thread::spawn(move || examine(&context, name_whole.as_deref(), &filters, &tell_whole));
    (Asks { look, filter }, told)
}

/// Looks at the counters, again and again.
fn count(context: &Context, name: Option<&str>, interval: Duration, asked: &Receiver<()>, tell: &Sender<Told>) {
    let mut known = Known::default();
    loop {
        let start = Instant::now();
        if !goes_on(look(context, name, &mut known, tell), tell) {
            return;
        }
        if asked.recv_timeout(interval.saturating_sub(start.elapsed())) == Err(RecvTimeoutError::Disconnected) {
            return;
        }
    }
}

/// Looks at all else, and puts filters in force.
fn examine(context: &Context, name: Option<&str>, asked: &Receiver<Filter>, tell: &Sender<Told>) {
    loop {
        let start = Instant::now();
        if !goes_on(look_whole(context, name, tell), tell) {
            return;
        }
        match asked.recv_timeout(WHOLE.saturating_sub(start.elapsed())) {
            Ok((session, expression)) => {
                let (text, tone) = set_filter(&session, &expression);
                let _ = tell.send(Told::Message(text, tone));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// Tells of what failed; false where nobody wants another look.
fn goes_on(looked: Result<()>, tell: &Sender<Told>) -> bool {
    match looked {
        Ok(()) => true,
        Err(err) => !interrupt::is_cause(&err) && tell.send(Told::Message(format!("{err:#}"), Tone::Bad)).is_ok(),
    }
}

fn look(context: &Context, name: Option<&str>, known: &mut Known, tell: &Sender<Told>) -> Result<()> {
    let open = Open::to_read(context)?;
    let failed = |err| drop(tell.send(Told::Message(format!("{err:#}"), Tone::Bad)));
    let all = counted::all(&open, name, known, failed)?;
    let _ = tell.send(Told::Counted(all));
    Ok(())
}

fn look_whole(context: &Context, name: Option<&str>, tell: &Sender<Told>) -> Result<()> {
    let open = Open::to_read(context)?;
    let names: Vec<String> = open.home.sessions().into_iter().filter(|at| name.is_none_or(|name| name == at)).collect();
    let sessions = stats::status(&open, &names)?.sessions;
    let told = sessions.iter().map(|session| (session.name.clone(), Whole::from(session))).collect();
    let _ = tell.send(Told::Whole(told));
    Ok(())
}

/// As `snifctl filter set` does, in a process of its own: what it says goes nowhere else.
fn set_filter(session: &str, expression: &str) -> (String, Tone) {
    let words: Vec<&str> = match expression.trim() {
        "" => vec!["filter", "clear", "--name", session],
        expression => vec!["filter", "set", "--name", session, "--", expression],
    };
    let run = || Command::new(std::env::current_exe()?).args(words).stdin(Stdio::null()).output();
    match run() {
        Ok(out) if out.status.success() => ("the filter is in force".into(), Tone::Good),
        Ok(out) => {
            let said = String::from_utf8_lossy(&out.stderr);
            (said.lines().next().unwrap_or("it failed").trim_start_matches("snifctl: ").into(), Tone::Bad)
        }
        Err(err) => (format!("snifctl cannot be started again: {err}"), Tone::Bad),
    }
}

// ---- on a terminal ----

fn screen(args: &StatusArgs, asks: &Asks, told: &Receiver<Told>) -> Result<ExitCode> {
    let mut terminal =
        Terminal::take(args.color.is_on()).context("the terminal cannot be used; try: snifctl status")?;
    let (mut model, mut choice) = (Model::default(), Choice::default());
    // A signal ends it as `q` does.
    while interrupt::code().is_none() {
        while let Ok(news) = told.try_recv() {
            match news {
                Told::Message(text, tone) => choice.message = Some((text, tone)),
                _ if choice.is_paused => {}
                Told::Counted(all) => model.sample(all),
                Told::Whole(all) => model.look(all),
            }
        }
        let size = Terminal::size();
        terminal.show(view::draw(&model, &choice, size), size)?;
        if event::poll(TICK)? {
            match event::read()? {
                Event::Key(key) if key.kind != KeyEventKind::Release && !pressed(key, &model, &mut choice, asks) => {
                    return Ok(ExitCode::SUCCESS);
                }
                _ => {}
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Does what a key stands for; false where that is to quit.
fn pressed(key: KeyEvent, model: &Model, choice: &mut Choice, asks: &Asks) -> bool {
    let has_control = key.modifiers.contains(KeyModifiers::CONTROL);
    if has_control && key.code == KeyCode::Char('c') {
        return false;
    }
    if let Some(mut prompt) = choice.prompt.take() {
        match key.code {
            KeyCode::Esc => return true,
            KeyCode::Enter => {
                choice.message = Some(("setting the filter".into(), Tone::Dim));
                let _ = asks.filter.send((prompt.session, prompt.typed));
                return true;
            }
            KeyCode::Backspace => drop(prompt.typed.pop()),
            KeyCode::Char('u') if has_control => prompt.typed.clear(),
            KeyCode::Char(c) if !has_control => prompt.typed.push(c),
            _ => {}
        }
        choice.prompt = Some(prompt);
        return true;
    }
    if choice.helps {
        choice.helps = false;
        return key.code != KeyCode::Char('q');
    }
    choice.message = None;
    match key.code {
        KeyCode::Char('q') | KeyCode::Esc => return false,
        KeyCode::Char('p' | ' ') => {
            choice.is_paused = !choice.is_paused;
            let _ = asks.look.send(());
        }
        KeyCode::Char('s') => choice.sort = choice.sort.next(),
        KeyCode::Char('f') => {
            let shown = model.sessions.get(model.place(choice.session.as_deref()));
            choice.prompt =
                shown.map(|live| Prompt { session: live.name.clone(), typed: live.filter.clone().unwrap_or_default() });
        }
        KeyCode::Char('n') | KeyCode::Tab => {
            let next = (model.place(choice.session.as_deref()) + 1) % model.sessions.len().max(1);
            choice.session = model.sessions.get(next).map(|live| live.name.clone());
            choice.scroll = 0;
        }
        KeyCode::Char('?' | 'h') => choice.helps = true,
        KeyCode::Down => choice.scroll = (choice.scroll + 1).min(longest(model)),
        KeyCode::PageDown => choice.scroll = (choice.scroll + 10).min(longest(model)),
        KeyCode::Up => choice.scroll = choice.scroll.saturating_sub(1),
        KeyCode::PageUp => choice.scroll = choice.scroll.saturating_sub(10),
        _ => {}
    }
    true
}

/// No table can be scrolled further.
fn longest(model: &Model) -> usize {
    model.sessions.iter().map(|live| live.taps.len().max(live.remotes.len())).max().unwrap_or(0)
}

// ---- elsewhere ----

/// A line for each session and look, until the reader or a signal ends it.
fn lines(args: &StatusArgs, told: &Receiver<Told>) -> Result<ExitCode> {
    let mut model = Model::default();
    while interrupt::code().is_none() {
        match told.recv_timeout(TICK) {
            Ok(Told::Counted(all)) => {
                model.sample(all);
                for live in &model.sessions {
                    let Some(rise) = live.total() else { continue };
                    let line = match args.json.json {
                        true => {
                            let unwell = live.unwell();
                            serde_json::json!({ "session": live.name, "rise": rise, "unwell": unwell }).to_string()
                        }
                        false => {
                            let [seen, copies, dropped] =
                                [rise.seen, rise.copies, rise.dropped].map(|count| rate(rise.per_second(count)));
                            let bits = bit_rate(rise.per_second(rise.bytes));
                            let unwell = live.unwell().iter().map(|at| format!("; {at}")).collect::<String>();
                            format!(
                                "{}: {seen} seen/s, {copies} copies/s, {bits}, {dropped} drops/s{unwell}",
                                live.name
                            )
                        }
                    };
                    print(&format!("{line}\n"))?;
                }
            }
            Ok(Told::Whole(all)) => model.look(all),
            Ok(Told::Message(text, _)) => eprintln!("snifctl: {text}"),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests;
