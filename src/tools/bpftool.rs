//! Programs and maps, through bpftool's JSON. Many questions or writes go through one `bpftool batch`.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::Value;

use crate::session::home::ALL_MAPS;
use crate::tools::clang;
use crate::tools::exec::{Cmd, Failed, Runner};

/// Loads every program of the object once and pins programs and maps under their names. `filtered`: a filter is in it.
pub fn load(runner: &Runner, object: &Path, dir: &Path, filtered: bool) -> Result<()> {
    let maps = dir.join("maps");
    let words = ["prog", "loadall", &text(object), &text(dir), "type", "classifier", "pinmaps", &text(&maps)];
    load_by(runner, &words, filtered)
}

/// Loads every program of the object on the maps that are pinned in `maps`, and pins the programs.
pub fn load_on(runner: &Runner, object: &Path, dir: &Path, maps: &Path) -> Result<()> {
    let pins: Vec<String> = ALL_MAPS.iter().map(|map| text(&maps.join(map))).collect();
    let (object, dir) = (text(object), text(dir));
    let mut words = vec!["prog", "loadall", &object, &dir, "type", "classifier"];
    for (map, pin) in ALL_MAPS.iter().zip(&pins) {
        words.extend(["map", "name", map, "pinned", pin]);
    }
    load_by(runner, &words, true)
}

/// Loads an object with one program and pins it.
pub fn load_one(runner: &Runner, object: &Path, pin: &Path) -> Result<()> {
    load_by(runner, &["prog", "load", &text(object), &text(pin), "type", "classifier"], true)
}

fn load_by(runner: &Runner, words: &[&str], filtered: bool) -> Result<()> {
    match runner.write(&Cmd::new("bpftool", words.iter().copied())) {
        Ok(_) => Ok(()),
        Err(err) => match err.downcast::<Failed>() {
            Ok(failed) if filtered => Err(clang::log_failure(
                "bpftool",
                &failed,
                "the kernel refused the program with this filter; use a shorter --filter or EXPR, or try: snifctl doctor",
            )),
            Ok(failed) => {
                Err(clang::log_failure("bpftool", &failed, "the kernel refused the program; try: snifctl doctor"))
            }
            Err(err) => Err(err),
        },
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The batch line that writes one element of a pinned map. A per-CPU map gets the value on every CPU.
pub fn update(map: &Path, key: &[u8], value: &[u8]) -> String {
    format!("map update pinned {} key hex {} value hex {}", map.display(), hex(key), hex(value))
}

/// The batch line that removes one element of a pinned map.
pub fn delete(map: &Path, key: &[u8]) -> String {
    format!("map delete pinned {} key hex {}", map.display(), hex(key))
}

/// Bytes as bpftool reads them after the word `hex`.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
}

/// Runs many writes in one bpftool; it stops at the first that fails.
pub fn batch(runner: &Runner, lines: &[String]) -> Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    done(runner.write(&Cmd::new("bpftool", ["batch", "file", "-"]).input(lines))).map(drop)
}

/// bpftool takes an `errno` that any library call has left for a failure to read the batch, which it reports after the
/// last line: then every line has been done. (Seen at boot, before the kernel had random numbers.)
fn done(outcome: Result<String>) -> Result<String> {
    outcome.or_else(|err| match err.downcast::<Failed>() {
        Ok(failed) if failed.stderr.contains("reading batch file failed") => Ok(failed.stderr),
        Ok(failed) => Err(failed.into()),
        Err(err) => Err(err),
    })
}

/// What a batch says of one of its lines.
#[derive(Deserialize)]
struct Answer {
    output: Option<Value>,
}

/// Asks many questions in one bpftool. Returns one answer each.
pub fn ask(runner: &Runner, lines: &[String]) -> Result<Vec<Value>> {
    let output = done(runner.read(&Cmd::new("bpftool", ["-j", "batch", "file", "-"]).input(lines)))?;
    let answers: Vec<Answer> =
        serde_json::from_str(&output).context("bpftool gave JSON of another form; try: snifctl doctor")?;
    let answers: Vec<Value> = answers.into_iter().filter_map(|answer| answer.output).collect();
    if answers.len() != lines.len() {
        bail!("bpftool answered {} of {} questions; try: snifctl doctor", answers.len(), lines.len());
    }
    Ok(answers)
}

/// The question for all elements of a pinned map.
pub fn dump_question(map: &Path) -> String {
    format!("map dump pinned {}", map.display())
}

/// One element of a dumped map: its bytes, one value per CPU in a per-CPU map.
#[derive(Clone, Debug)]
pub struct Row {
    pub key: Vec<u8>,
    pub values: Vec<Vec<u8>>,
}

impl Row {
    /// The key of a map that is indexed by a number.
    pub fn index(&self) -> Result<u32> {
        Ok(u32::from_ne_bytes(self.key.as_slice().try_into().context("a map key is not 4 bytes long")?))
    }

    pub fn value(&self) -> Result<&[u8]> {
        Ok(self.values.first().context("a map element has no value")?)
    }
}

/// The elements of a dump.
pub fn rows(dump: &Value) -> Result<Vec<Row>> {
    let elements = dump.as_array().context("bpftool gave a dump of another form")?;
    elements.iter().map(row).collect()
}

fn row(element: &Value) -> Result<Row> {
    let key = bytes(&element["key"])?;
    let values = match element["values"].as_array() {
        Some(cpus) => cpus.iter().map(|cpu| bytes(&cpu["value"])).collect::<Result<_>>()?,
        None => vec![bytes(&element["value"])?],
    };
    Ok(Row { key, values })
}

fn bytes(list: &Value) -> Result<Vec<u8>> {
    let list = list.as_array().context("bpftool gave bytes of another form")?;
    list.iter()
        .map(|byte| {
            let digits = byte.as_str().and_then(|text| text.strip_prefix("0x"));
            digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()).context("bpftool gave a byte of another form")
        })
        .collect()
}

/// A dump by the field names of the BTF, counters of per-CPU maps summed.
pub fn formatted(dump: &Value) -> Value {
    let elements = dump.as_array().map(Vec::as_slice).unwrap_or_default();
    Value::Array(elements.iter().map(|element| sum_cpus(element.get("formatted").unwrap_or(element))).collect())
}

fn sum_cpus(element: &Value) -> Value {
    let Some(cpus) = element["values"].as_array() else {
        return element.clone();
    };
    let values = cpus.iter().map(|cpu| cpu["value"].clone());
    serde_json::json!({ "key": element["key"], "value": values.reduce(|sum, value| add(&sum, &value, false)) })
}

/// Adds what counts. In a value that has a `stat`, its structs do: the rest is the same on every CPU.
fn add(a: &Value, b: &Value, inside: bool) -> Value {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            let structs_only = !inside && a.contains_key("stat");
            let sum = a.iter().map(|(name, value)| match value {
                Value::Number(_) if structs_only => (name.clone(), value.clone()),
                _ => (name.clone(), add(value, &b[name], true)),
            });
            Value::Object(sum.collect())
        }
        (Value::Number(x), Value::Number(y)) => (x.as_u64().unwrap_or(0) + y.as_u64().unwrap_or(0)).into(),
        _ => a.clone(),
    }
}

/// A program at a TC hook of this network namespace.
#[derive(Clone, Debug, Deserialize)]
pub struct Attachment {
    pub ifindex: u32,
    /// `clsact/ingress`, `tcx/ingress` and the like.
    pub kind: String,
    #[serde(default)]
    pub name: String,
    /// Programs at tcx hooks have theirs by another name.
    #[serde(alias = "prog_id")]
    pub id: u32,
}

impl Attachment {
    /// At a hook whose programs run before those of tc, and can hide packets from them (kernel 6.6, bpftool 7.3).
    pub fn is_tcx(&self) -> bool {
        self.kind.starts_with("tcx")
    }
}

#[derive(Deserialize)]
struct NetReply {
    #[serde(default)]
    tc: Vec<Attachment>,
}

/// The question for every TC program of this network namespace.
pub const NET_QUESTION: &str = "net show";

/// The question for those of one interface.
pub fn net_question(dev: &str) -> String {
    format!("net show dev {dev}")
}

pub fn attachments(answer: &Value) -> Result<Vec<Attachment>> {
    let replies: Vec<NetReply> =
        serde_json::from_value(answer.clone()).context("bpftool net gave JSON of another form")?;
    Ok(replies.into_iter().flat_map(|reply| reply.tc).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn counters_are_summed_over_cpus_and_nothing_else_is() {
        let tap = |n: u64| json!({"slot": 3, "stat": {"pcnt": n, "bcnt": 10 * n, "dcnt": 0}});
        let dump = json!([{"key": [], "values": [], "formatted": {
            "key": {"ifindex": 2, "direction": "EGRESS"},
            "values": [{"cpu": 0, "value": tap(1)}, {"cpu": 1, "value": tap(4)}]
        }}]);
        let expected = json!([{"key": {"ifindex": 2, "direction": "EGRESS"}, "value": tap(5)}]);
        assert_eq!(formatted(&dump), expected);
        let drops = json!([{"formatted": {"key": 0, "values": [{"value": {"clone": 1}}, {"value": {"clone": 2}}]}}]);
        assert_eq!(formatted(&drops), json!([{"key": 0, "value": {"clone": 3}}]));
    }

    #[test]
    fn a_batch_that_was_done_is_no_failure() {
        let failed = |stderr: &str| {
            Err(Failed { command: "bpftool".into(), status: "exit status: 255".into(), stderr: stderr.into() }.into())
        };
        let said = "Error: reading batch file failed: Resource temporarily unavailable";
        assert_eq!(done(failed(said)).unwrap(), said);
        assert!(done(failed("Error: can't parse key")).unwrap_err().is::<Failed>());
    }

    #[test]
    fn rows_are_bytes() {
        let dump = json!([{"key": ["0x01", "0x00", "0x00", "0x00"], "values": [{"cpu": 0, "value": ["0xff"]}]}]);
        let rows = rows(&dump).unwrap();
        assert_eq!((rows[0].index().unwrap(), rows[0].value().unwrap()), (1, &[255u8][..]));
        assert!(row(&json!({"key": ["1"], "value": []})).is_err());
    }
}
