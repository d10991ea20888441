//! Files of sessions: TOML, one table a session, one key for each option of `up`, under its long name. Each table becomes
//! the words of an `up`, so that rules and messages are those of the command line. Pure: no look at the machine.

use std::any::TypeId;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::LazyLock;

use clap::builder::PossibleValue;
use clap::error::{ContextKind, ContextValue};
use clap::{Arg, ArgAction, CommandFactory, Parser};
use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

use crate::cli::{Cli, Command};
use crate::request::{DEFAULT, Request, Said, Values, Watched};
use crate::usage::Usage;

/// The key of the interfaces, which have no flag on the command line.
const INTERFACES: &str = "interfaces";

/// The words of `up` that are not about what the session is to be.
const NOT_KEYS: [&str; 5] = ["replace", "wait-for-interface", "dry-run", "json", "while-stdin"];

/// Flags that stand for interfaces elsewhere, which a file names among the others: `netns:blue/eth0`.
const NOT_IN_FILES: [&str; 6] = ["netns", "pid", "container", "pod", "namespace", "host-side"];

/// The key of tables that say which pods: `[[session.pods]]`.
const PODS: &str = "pods";

/// A text of sessions, with the name that messages have for it.
#[derive(Clone, Debug)]
pub(crate) struct Text {
    pub name: String,
    pub text: String,
}

/// What is wrong with files, a line for each mistake: `web.toml:4: filter: ...`.
#[derive(Debug)]
pub(crate) struct Mistakes(pub Vec<String>);

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\nsnifctl: "))
    }
}

impl std::error::Error for Mistakes {}

impl From<Mistakes> for Usage {
    fn from(mistakes: Mistakes) -> Usage {
        Usage(mistakes.to_string())
    }
}

/// A session of a file.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub request: Request,
    pub keeps_clsact: bool,
    place: Place,
}

impl Entry {
    /// What is said of an argument of `up`, said of the key in the file. `None` where it is about no argument.
    pub(crate) fn mistake(&self, said: &str) -> Option<String> {
        (said.starts_with("--") || said.starts_with("IFACE")).then(|| self.place.said(said))
    }
}

/// Where a session stands in a file.
#[derive(Clone, Debug)]
struct Place {
    file: String,
    line: usize,
    keys: Vec<Key>,
}

/// A key of a session, the words of `up` that it stands for, and where each of its values is.
#[derive(Clone, Debug)]
struct Key {
    name: String,
    line: usize,
    values: Vec<(String, usize)>,
    is_switch: bool,
}

impl Key {
    fn flags(&self) -> Vec<String> {
        match self.is_switch {
            true => vec![format!("--{}", self.name)],
            false => self.values.iter().map(|(value, _)| format!("--{}={value}", self.name)).collect(),
        }
    }

    fn is_said(&self) -> bool {
        self.is_switch || !self.values.is_empty()
    }
}

/// The sessions of all texts, or every mistake in them.
pub(crate) fn parse(texts: &[Text]) -> Result<Vec<Entry>, Mistakes> {
    let (mut entries, mut mistakes) = (Vec::new(), Vec::new());
    for text in texts {
        let (found, wrong) = sessions(text);
        entries.extend(found);
        mistakes.extend(wrong);
    }
    let mut seen: BTreeMap<&str, String> = BTreeMap::new();
    for Entry { request, place, .. } in &entries {
        if let Some(other) = seen.get(request.name.as_str()) {
            let name = &request.name;
            mistakes.push(place.said(&format!("--name {name} is also the session at {other}; try: --name other")));
        }
        seen.entry(&request.name).or_insert_with(|| format!("{}:{}", place.file, place.line));
    }
    if mistakes.is_empty() { Ok(entries) } else { Err(Mistakes(mistakes)) }
}

fn sessions(text: &Text) -> (Vec<Entry>, Vec<String>) {
    let at =
        |place: usize| 1 + text.text.as_bytes()[..place.min(text.text.len())].iter().filter(|b| **b == b'\n').count();
    let told = |line: usize, said: String| format!("{}:{line}: {said}", text.name);
    let (table, errors) = DeTable::parse_recoverable(&text.text);
    if !errors.is_empty() {
        let line = |err: &toml::de::Error| err.span().map_or(1, |span| at(span.start));
        let said = |err: &toml::de::Error| told(line(err), format!("{}; {SYNTAX}", err.message().replace('\n', ", ")));
        // What follows the first on a line is mostly of its making.
        let mut said: Vec<(usize, String)> = errors.iter().map(|err| (line(err), said(err))).collect();
        said.dedup_by_key(|(line, _)| *line);
        return (Vec::new(), said.into_iter().map(|(_, said)| said).collect());
    }
    let (mut entries, mut mistakes) = (Vec::new(), Vec::new());
    let arguments = Arguments::known();
    for (key, value) in in_order(table.get_ref()) {
        let line = at(key.span().start);
        match (key.get_ref().as_ref(), value.get_ref()) {
            ("session", DeValue::Array(all)) if all.iter().all(|one| one.get_ref().is_table()) => {
                for (table, span) in all.iter().filter_map(|one| Some((one.get_ref().as_table()?, one.span()))) {
                    match arguments.session(&text.name, table, at(span.start), &at) {
                        Ok(entry) => entries.push(entry),
                        Err(wrong) => mistakes.extend(wrong),
                    }
                }
            }
            ("session", _) => mistakes.push(told(line, "session: is no list of tables; try: [[session]]".into())),
            (name, _) if arguments.named(name).is_some() => {
                mistakes.push(told(line, format!("{name}: is in no session; put it below a line: [[session]]")));
            }
            (name, _) => {
                mistakes.push(told(line, format!("{name}: is not a key here; a session begins with: [[session]]")));
            }
        }
    }
    (entries, mistakes)
}

/// What most mistakes in the form lack.
const SYNTAX: &str = "text stands in quotes, and lists in brackets, as in: remote = [\"10.0.0.7\"]";

/// A table in the order of the file.
fn in_order<'a, 'i>(table: &'a DeTable<'i>) -> Vec<(&'a Spanned<toml::de::DeString<'i>>, &'a Spanned<DeValue<'i>>)> {
    let mut all: Vec<_> = table.iter().collect();
    all.sort_by_key(|(key, _)| key.span().start);
    all
}

/// The arguments of `up` that are keys.
struct Arguments(Vec<Arg>);

impl Arguments {
    fn known() -> &'static Arguments {
        static KNOWN: LazyLock<Arguments> = LazyLock::new(|| {
            let cli = Cli::command();
            let up = cli.find_subcommand("up").expect("a command of ours");
            let is_key = |arg: &&Arg| !NOT_KEYS.contains(&key_of(arg)) && !NOT_IN_FILES.contains(&key_of(arg));
            Arguments(up.get_arguments().filter(is_key).cloned().collect())
        });
        &KNOWN
    }

    fn named(&self, key: &str) -> Option<&Arg> {
        self.0.iter().find(|arg| key_of(arg) == key)
    }

    fn session(
        &self,
        file: &str,
        table: &DeTable,
        line: usize,
        at: &dyn Fn(usize) -> usize,
    ) -> Result<Entry, Vec<String>> {
        let mut place = Place { file: file.into(), line, keys: Vec::new() };
        let mut mistakes = Vec::new();
        for (key, value) in in_order(table) {
            let (name, line) = (key.get_ref().as_ref(), at(key.span().start));
            match self.key(name, line, value, at) {
                Ok(key) => place.keys.push(key),
                Err(said) => mistakes.push((line, format!("{file}:{line}: {name}: {said}"))),
            }
        }
        // A key that is wrong is not missing besides.
        let has = |key: &str| table.iter().any(|(name, value)| name.get_ref() == key && !is_empty(value.get_ref()));
        let needed = [INTERFACES, "tunnel", "remote"].into_iter();
        for key in needed.filter(|key| !has(key) && (*key != INTERFACES || !has(PODS))) {
            let example = self.named(key).map(example).unwrap_or_default();
            mistakes.push((line, format!("{file}:{line}: {key}: is missing in this session; try: {key} = {example}")));
        }
        let mut made = Err(String::new());
        if mistakes.is_empty() {
            made = place.request();
        }
        match made {
            Ok((request, keeps_clsact)) => Ok(Entry { request, keeps_clsact, place }),
            Err(said) => {
                let wrong = |key: &Key| Some(place.at(&tried(key).err()?));
                let wrong: Vec<(usize, String)> = place.keys.iter().filter_map(wrong).collect();
                // What does not go together, where each is right by itself.
                let rule = (wrong.is_empty() && mistakes.is_empty()).then(|| place.at(&said));
                mistakes.extend(wrong.into_iter().chain(rule));
                mistakes.sort_by_key(|(line, _)| *line);
                Err(mistakes.into_iter().map(|(_, said)| said).collect())
            }
        }
    }

    /// A key with its values as the words that the command line would have.
    fn key(
        &self,
        name: &str,
        line: usize,
        value: &Spanned<DeValue>,
        at: &dyn Fn(usize) -> usize,
    ) -> Result<Key, String> {
        if name == PODS {
            return pods(value, at).map(|values| Key { name: name.into(), line, values, is_switch: false });
        }
        let Some(arg) = self.named(name) else { return Err(self.unknown(name)) };
        let is_switch = matches!(arg.get_action(), ArgAction::SetTrue);
        let is_list = matches!(arg.get_action(), ArgAction::Append);
        let refused = |wants: &str, value: &DeValue| {
            Err(format!("takes {wants}, not a value of type {}; try: {name} = {}", value.type_str(), example(arg)))
        };
        let here = at(value.span().start);
        let key = |is_switch, values| Ok(Key { name: name.into(), line, values, is_switch });
        match value.get_ref() {
            DeValue::Boolean(on) if is_switch => key(*on, Vec::new()),
            other if is_switch => refused("true or false", other),
            DeValue::String(text) => key(false, vec![(text.to_string(), here)]),
            DeValue::Integer(number) if !is_list => {
                let text = i128::from_str_radix(number.as_str(), number.radix()).map(|number| number.to_string());
                key(false, vec![(text.unwrap_or_else(|_| number.to_string()), here)])
            }
            DeValue::Array(list) if is_list => match strings(list) {
                Ok(values) => key(false, values.into_iter().map(|(text, span)| (text, at(span))).collect()),
                Err(other) => refused("texts in its list", other),
            },
            other if is_list => refused("text or a list of texts", other),
            other if is_number(arg) => refused("a number", other),
            other => refused("text", other),
        }
    }

    /// What is said of a key that nobody knows, with the nearest that is known.
    fn unknown(&self, name: &str) -> String {
        let nearest = self.0.iter().map(|arg| (distance(name, key_of(arg)), arg)).min_by_key(|(far, _)| *far);
        match nearest.filter(|(far, _)| *far <= 3 && *far * 2 <= name.chars().count()) {
            Some((_, arg)) => format!("is not a key of a session; try: {} = {}", key_of(arg), example(arg)),
            None => {
                let known: Vec<&str> = self.0.iter().map(key_of).collect();
                format!("is not a key of a session; these are: {}", known.join(", "))
            }
        }
    }
}

/// The interfaces that the tables of pods stand for, each as text with its place.
fn pods(value: &Spanned<DeValue>, at: &dyn Fn(usize) -> usize) -> Result<Vec<(String, usize)>, String> {
    const EXAMPLE: &str = "[[session.pods]] with namespace = \"shop\" and selector = \"app=web\"";
    let tables = value.get_ref().as_array().filter(|list| list.iter().all(|one| one.get_ref().is_table()));
    let Some(tables) = tables else { return Err(format!("is no list of tables; try: {EXAMPLE}")) };
    let mut found = Vec::new();
    for table in tables {
        let here = at(table.span().start);
        let (mut namespace, mut selector, mut annotations) = ("default".to_string(), String::new(), Vec::new());
        let (mut interfaces, mut side) = (vec!["*".to_string()], "");
        for (key, value) in in_order(table.get_ref().as_table().expect("a table")) {
            match (key.get_ref().as_ref(), value.get_ref()) {
                ("namespace", DeValue::String(text)) => namespace = text.to_string(),
                ("selector", DeValue::String(text)) => selector = text.to_string(),
                ("annotations", DeValue::Table(all)) => {
                    for (name, value) in in_order(all) {
                        let Some(value) = value.get_ref().as_str() else {
                            return Err(format!("{}: takes text; try: \"yes\"", name.get_ref()));
                        };
                        annotations.push(format!("{}={value}", name.get_ref()));
                    }
                }
                (INTERFACES, DeValue::Array(list)) if strings(list).is_ok() => {
                    interfaces = strings(list).unwrap_or_default().into_iter().map(|(text, _)| text).collect();
                }
                ("host-side", DeValue::Boolean(on)) => side = if *on { "host:" } else { "" },
                (name, _) => {
                    return Err(format!(
                        "{name}: is no key of it, or of another type (namespace, selector: text; annotations: a table of texts; \
                         interfaces: a list of texts; host-side: true or false); try: {EXAMPLE}"
                    ));
                }
            }
        }
        let annotations = if annotations.is_empty() { String::new() } else { format!(";{}", annotations.join(",")) };
        let text = |name: &String| (format!("{side}pods:{namespace}/{selector}{annotations}/{name}"), here);
        found.extend(interfaces.iter().map(text));
    }
    Ok(found)
}

/// The name of the key for an argument.
fn key_of(arg: &Arg) -> &str {
    arg.get_long().unwrap_or(arg.get_id().as_str())
}

fn is_number(arg: &Arg) -> bool {
    let kind = arg.get_value_parser().type_id();
    [TypeId::of::<u8>(), TypeId::of::<u16>(), TypeId::of::<u32>()].iter().any(|number| kind == *number)
}

fn is_empty(value: &DeValue) -> bool {
    value.as_array().is_some_and(|list| list.is_empty())
}

/// The texts of a list with their places, or the first that is none.
fn strings<'a, 'i>(list: &'a DeArray<'i>) -> Result<Vec<(String, usize)>, &'a DeValue<'i>> {
    let text = |one: &'a Spanned<DeValue<'i>>| match one.get_ref() {
        DeValue::String(text) => Ok((text.to_string(), one.span().start)),
        other => Err(other),
    };
    list.iter().map(text).collect()
}

/// A value that an argument takes, as TOML.
fn example(arg: &Arg) -> String {
    if matches!(arg.get_action(), ArgAction::SetTrue) {
        return "true".into();
    }
    if let Some(first) = arg.get_possible_values().first().map(PossibleValue::get_name) {
        return quoted(first);
    }
    match key_of(arg) {
        INTERFACES => "[\"eth0:ingress\", \"eth1\"]",
        "kubeconfig" => "\"/etc/kubernetes/admin.conf\"",
        "context" => "\"kind-kind\"",
        "node" => "\"worker-1\"",
        "remote" => "[\"10.0.0.7\"]",
        "name" => "\"mirror-1\"",
        "filter" => "\"tcp port 443\"",
        "sample" | "sample-flows" => "\"1/100\"",
        "max-rate" => "\"200mbit\"",
        "source" => "[\"10.0.0.1\"]",
        "underlay" => "[\"203.0.113.5:51820\"]",
        "port" => "4789",
        "snaplen" => "128",
        "ttl" => "64",
        _ if is_number(arg) => "7",
        _ => "\"...\"",
    }
    .into()
}

/// How many letters have to change to make one word of the other (Levenshtein).
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (at, letter) in one.chars().enumerate() {
        let mut corner = row[0];
        row[0] = at + 1;
        for (i, same) in other.iter().map(|c| *c == letter).enumerate() {
            let replaced = corner + usize::from(!same);
            corner = row[i + 1];
            row[i + 1] = replaced.min(row[i] + 1).min(corner + 1);
        }
    }
    row[other.len()]
}

/// Is a key right by itself?
fn tried(key: &Key) -> Result<(), String> {
    let (names, flags) = match key.name.as_str() {
        INTERFACES | PODS => (key.values.iter().map(|(name, _)| name.clone()).collect(), Vec::new()),
        _ => (vec!["eth0".into()], key.flags()),
    };
    let needed = [("tunnel", "gre"), ("remote", "10.0.0.7")].into_iter();
    let others = needed.filter(|(name, _)| *name != key.name || !key.is_said());
    let words = others.map(|(name, value)| format!("--{name}={value}")).chain(flags).collect();
    // Without any, another line says that they are missing.
    words_of_up(words, if names.is_empty() { vec!["eth0".into()] } else { names }).map(|_| ())
}

/// What an `up` with these words asks for, or what it says of them.
fn words_of_up(flags: Vec<String>, interfaces: Vec<String>) -> Result<crate::cli::UpArgs, String> {
    let words = ["snifctl", "up"].into_iter().map(String::from).chain(flags).chain(["--".into()]).chain(interfaces);
    match Cli::try_parse_from(words).map_err(|err| said(&err))?.command {
        Command::Up(args) => Ok(*args),
        _ => unreachable!("the first word is `up`"),
    }
}

/// What clap says, in a line that begins with the flag.
fn said(err: &clap::Error) -> String {
    let own = std::error::Error::source(err).and_then(|source| source.downcast_ref::<Usage>());
    if let Some(Usage(said)) = own {
        return said.clone();
    }
    let text = |kind| match err.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    };
    let flag = text(ContextKind::InvalidArg).and_then(|shown| shown.split(' ').next().map(String::from));
    match (flag, text(ContextKind::InvalidValue), err.get(ContextKind::ValidValue)) {
        (Some(flag), Some(value), Some(ContextValue::Strings(known))) if !known.is_empty() => {
            let nearest = known.iter().min_by_key(|known| distance(&value, known)).expect("there is one");
            format!("{flag} {value:?} is not one of {}; try: {flag} {nearest}", known.join(", "))
        }
        _ => err.to_string().lines().next().unwrap_or_default().trim_start_matches("error: ").into(),
    }
}

impl Place {
    /// What the keys ask for together, and whether clsact is kept; or what `up` says of them.
    fn request(&self) -> Result<(Request, bool), String> {
        let is_interfaces = |key: &&Key| key.name == INTERFACES || key.name == PODS;
        let (interfaces, others): (Vec<&Key>, Vec<&Key>) = self.keys.iter().partition(is_interfaces);
        let names = interfaces.iter().flat_map(|key| key.values.iter().map(|(name, _)| name.clone())).collect();
        let args = words_of_up(others.iter().flat_map(|key| key.flags()).collect(), names)?;
        let request = args.request().map_err(|Usage(said)| said)?;
        Ok((request, args.clsact.keep_clsact))
    }

    /// A line about an argument of `up` as one about a key of this session.
    fn said(&self, said: &str) -> String {
        self.at(said).1
    }

    /// The same with its line.
    fn at(&self, said: &str) -> (usize, String) {
        let (body, example) = match said.rfind(": --") {
            Some(at) => (&said[..at], in_toml(&said[at + 2..]).unwrap_or_else(|| said[at + 2..].into())),
            None => (said, String::new()),
        };
        let words: Vec<&str> = body.split(' ').collect();
        let name = |word: &str| word.strip_prefix("--").map(|name| name.trim_end_matches([',', ';', ':']).to_string());
        let mentioned = words.iter().find_map(|word| match name(word) {
            Some(name) => self.keys.iter().find(|key| key.name == name),
            None if *word == "IFACE" || *word == INTERFACES => {
                let is_of_pods = body.contains("pods:");
                let key = |name: &str| self.keys.iter().find(|key| key.name == name);
                key(if is_of_pods { PODS } else { INTERFACES }).or_else(|| key(INTERFACES))
            }
            None => None,
        });
        let first = name(words[0]).or((words[0] == "IFACE").then(|| INTERFACES.into()));
        let key = mentioned.map(|key| key.name.clone()).or_else(|| first.clone());
        let body = match first {
            Some(first) if Some(&first) == key.as_ref() => &words[1..],
            _ => &words[..],
        };
        let body: Vec<&str> = body.iter().map(|word| name(word).map_or(*word, |_| &word[2..])).collect();
        let value = mentioned.and_then(|key| {
            let is_named = |value: &str| body.iter().any(|word| word.trim_matches(['"', ',', ';', ':']) == value);
            key.values.iter().find(|(value, _)| is_named(value)).map(|(_, line)| *line)
        });
        let line = value.or(mentioned.map(|key| key.line)).unwrap_or(self.line);
        let (key, end) = (key.unwrap_or_else(|| "session".into()), if example.is_empty() { "" } else { ": " });
        (line, format!("{}:{line}: {key}: {}{end}{example}", self.file, body.join(" ")))
    }
}

/// `--id 1 --df` as `id = 1, df = true`.
fn in_toml(flags: &str) -> Option<String> {
    let mut shown = Vec::new();
    for one in flags.strip_prefix("--")?.split(" --") {
        let (name, value) = one.split_once(' ').unwrap_or((one, ""));
        let value = value.trim_matches('\'');
        let is_bare = value.parse::<u64>().is_ok() || value.starts_with("0x");
        shown.push(match value {
            "" => format!("{name} = true"),
            value if is_bare => format!("{name} = {value}"),
            value => format!("{name} = {}", quoted(value)),
        });
    }
    Some(shown.join(", "))
}

/// A request as a session of a file: what nobody has to say is left out.
pub(crate) fn shown(request: &Request) -> String {
    let arguments = Arguments::known();
    let names: Vec<String> = request.interfaces.iter().map(Watched::to_string).collect();
    let mut text = format!("[[session]]\nname = {}\ninterfaces = {}\n", quoted(&request.name), list(&names));
    for (flag, values) in request.flags() {
        let key = flag.trim_start_matches('-');
        let Some(arg) = arguments.named(key).filter(|_| key != "name") else { continue };
        let value = match values {
            Values::Switch(true) => "true".into(),
            Values::Some(values, Said::Needed) if !values.is_empty() => match arg.get_action() {
                ArgAction::Append => list(&values),
                _ if is_number(arg) => values[0].clone(),
                _ => quoted(&values[0]),
            },
            _ => continue,
        };
        text += &format!("{key} = {value}\n");
    }
    text
}

fn list(values: &[String]) -> String {
    let values: Vec<String> = values.iter().map(|value| quoted(value)).collect();
    format!("[{}]", values.join(", "))
}

/// A text as TOML.
fn quoted(text: &str) -> String {
    let mut shown = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => shown.extend(['\\', c]),
            c if c.is_control() => shown += &format!("\\u{:04X}", c as u32),
            c => shown.push(c),
        }
    }
    shown + "\""
}

/// What differs, a line for each tap, remote and option: `filter 'tcp' → 'udp'`, `+ tap eth2 ingress`, `- remote 10.0.0.8`.
pub(crate) fn difference(before: &Request, wanted: &Request) -> Vec<String> {
    let taps = |request: &Request| {
        let of = |watched: &Watched| {
            let tap = |at: &crate::datapath::abi::Direction| format!("tap {} {}", watched.interface, at.hook());
            watched.direction.directions().iter().map(tap).collect::<Vec<_>>()
        };
        request.interfaces.iter().flat_map(of).collect::<Vec<String>>()
    };
    let remotes = |request: &Request| {
        let remotes = request.options.remotes.iter();
        remotes.map(|remote| format!("remote {remote}")).collect::<Vec<String>>()
    };
    let mut lines = Vec::new();
    for ((flag, own), (_, other)) in before.sorted().flags().into_iter().zip(wanted.sorted().flags()) {
        let key = flag.trim_start_matches('-');
        if own == other || key == "remote" || key == "name" {
            continue;
        }
        let quote = |values: &Values| match values.shown() {
            // Always in quotes, as an expression of one word is one too.
            text if key == "filter" && text != "none" && !text.starts_with('\'') => format!("'{text}'"),
            text => text,
        };
        lines.push(format!("{key} {} → {}", quote(&own), quote(&other)));
    }
    for (own, other) in [(taps(before), taps(wanted)), (remotes(before), remotes(wanted))] {
        lines.extend(other.iter().filter(|one| !own.contains(one)).map(|one| format!("+ {one}")));
        lines.extend(own.iter().filter(|one| !other.contains(one)).map(|one| format!("- {one}")));
    }
    lines
}

/// A session in the words of the command line, without its name.
pub(crate) fn words(request: &Request) -> String {
    let unnamed = Request { name: DEFAULT.into(), ..request.clone() };
    unnamed.command().trim_start_matches("snifctl up ").into()
}

#[cfg(test)]
#[path = "file_test.rs"]
mod tests;
