//! Programs and maps, through bpftool's JSON. Many questions or writes go through one `bpftool batch`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Deserializer, de};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::tools::exec::{Cmd, Failed, Runner};
use crate::tools::{batch, json, log, rights};

/// Loads every program of the object once and pins programs and maps under their names, in a directory and its `maps`. Maps
/// that are there already, by name and pin, are used. `filtered`: a filter is in it.
pub(crate) fn load(
    runner: &Runner,
    object: &Path,
    dir: &Path,
    there: &[(&str, PathBuf)],
    filtered: bool,
) -> Result<()> {
    let (object, maps, dir) = (text(object), text(&dir.join("maps")), text(dir));
    let pins: Vec<(&str, String)> = there.iter().map(|(map, pin)| (*map, text(pin))).collect();
    let mut words = vec!["prog", "loadall", &object, &dir, "type", "classifier"];
    words.extend(pins.iter().flat_map(|(map, pin)| ["map", "name", map, "pinned", pin]));
    words.extend(["pinmaps", &maps]);
    load_by(runner, &words, filtered)
}

/// Loads every program of the object on the maps of these names that are pinned in `maps`, and pins the programs.
pub(crate) fn load_on(runner: &Runner, object: &Path, dir: &Path, maps: &Path, names: &[&str]) -> Result<()> {
    let pins: Vec<String> = names.iter().map(|map| text(&maps.join(map))).collect();
    let (object, dir) = (text(object), text(dir));
    let mut words = vec!["prog", "loadall", &object, &dir, "type", "classifier"];
    for (map, pin) in names.iter().zip(&pins) {
        words.extend(["map", "name", map, "pinned", pin]);
    }
    load_by(runner, &words, true)
}

/// Loads an object with one program and pins it.
pub(crate) fn load_one(runner: &Runner, object: &Path, pin: &Path) -> Result<()> {
    load_by(runner, &["prog", "load", &text(object), &text(pin), "type", "classifier"], true)
}

fn load_by(runner: &Runner, words: &[&str], filtered: bool) -> Result<()> {
    let loaded = runner.write(&Cmd::new("bpftool", words.iter().copied()));
    let hint = match filtered {
        true => {
            "the kernel refused the program with this filter; use a shorter --filter or EXPR, or try: snifctl doctor"
        }
        false => "the kernel refused the program; try: snifctl doctor",
    };
    loaded.map(drop).map_err(|err| match err.downcast::<Failed>() {
        Ok(failed) => log::failure("bpftool", &failed, hint),
        Err(err) => err,
    })
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Pins a program (`prog`) or map (`map`) that the kernel has.
pub(crate) fn pin(runner: &Runner, kind: &str, id: u32, pin: &Path) -> Result<()> {
    runner.write(&Cmd::new("bpftool", [kind, "pin", "id", &id.to_string(), &text(pin)])).map(drop)
}

/// The batch line that writes one element of a pinned map. A per-CPU map gets the value on every CPU.
pub(crate) fn update(map: &Path, key: &[u8], value: &[u8]) -> String {
    format!("map update pinned {} key hex {} value hex {}", map.display(), hex(key), hex(value))
}

/// The batch line that removes one element of a pinned map.
pub(crate) fn delete(map: &Path, key: &[u8]) -> String {
    format!("map delete pinned {} key hex {}", map.display(), hex(key))
}

/// Bytes as bpftool reads them after the word `hex`.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
}

/// Runs many writes in one bpftool; it stops at the first that fails.
pub(crate) fn batch(runner: &Runner, lines: &[String]) -> Result<()> {
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
    output: Option<Box<RawValue>>,
}

/// Asks many questions in one bpftool. Returns one answer each.
pub(crate) fn ask(runner: &Runner, lines: &[String]) -> Result<Vec<Value>> {
    ask_in(runner, None, lines)
}

/// The same in another network namespace, if there is one.
pub(crate) fn ask_in(runner: &Runner, netns: Option<&Path>, lines: &[String]) -> Result<Vec<Value>> {
    match lines {
        [] => Ok(Vec::new()),
        _ => ask_raw_in(runner, netns, lines)?.iter().map(|answer| value(answer)).collect(),
    }
}

/// An answer as any JSON.
pub(crate) fn value(answer: &RawValue) -> Result<Value> {
    Value::deserialize(answer).with_context(|| json::unexpected("bpftool"))
}

/// The same with the answers unread: the dump of a large map has a word for each byte.
pub(crate) fn ask_raw(runner: &Runner, lines: &[String]) -> Result<Vec<Box<RawValue>>> {
    ask_raw_in(runner, None, lines)
}

fn ask_raw_in(runner: &Runner, netns: Option<&Path>, lines: &[String]) -> Result<Vec<Box<RawValue>>> {
    let read = runner.read(&Cmd::new("bpftool", ["-j", "batch", "file", "-"]).input(lines).within(netns));
    let output = done(read).map_err(rights::explained)?;
    let answers = outputs(&output)?;
    if answers.len() != lines.len() {
        bail!("bpftool answered {} of {} questions; try: snifctl doctor", answers.len(), lines.len());
    }
    Ok(answers)
}

fn outputs(text: &str) -> Result<Vec<Box<RawValue>>> {
    let answers: Vec<Answer> = json::members(text, "bpftool")?;
    Ok(answers.into_iter().filter_map(|answer| answer.output).collect())
}

/// The question for all elements of a pinned map.
pub(crate) fn dump_question(map: &Path) -> String {
    format!("map dump pinned {}", map.display())
}

/// One element of a dumped map: its bytes, one value per CPU in a per-CPU map.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "Element")]
pub(crate) struct Row {
    pub key: Vec<u8>,
    pub values: Vec<Vec<u8>>,
}

/// An element as bpftool tells it.
#[derive(Deserialize)]
struct Element {
    key: Vec<Byte>,
    value: Option<Vec<Byte>>,
    values: Option<Vec<OfCpu>>,
}

#[derive(Deserialize)]
struct OfCpu {
    value: Vec<Byte>,
}

/// A byte that is told as `0x2a`.
struct Byte(u8);

impl<'de> Deserialize<'de> for Byte {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Byte, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Byte;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a byte as 0x2a")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Byte, E> {
                let byte = text.strip_prefix("0x").and_then(|digits| u8::from_str_radix(digits, 16).ok());
                byte.map(Byte).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        from.deserialize_str(Visitor)
    }
}

fn bytes(list: Vec<Byte>) -> Vec<u8> {
    list.into_iter().map(|byte| byte.0).collect()
}

impl TryFrom<Element> for Row {
    type Error = &'static str;

    fn try_from(element: Element) -> Result<Row, &'static str> {
        let values = match (element.values, element.value) {
            (Some(cpus), _) => cpus.into_iter().map(|cpu| bytes(cpu.value)).collect(),
            (None, Some(value)) => vec![bytes(value)],
            (None, None) => return Err("an element without a value"),
        };
        Ok(Row { key: bytes(element.key), values })
    }
}

/// The elements of a dump.
pub(crate) fn rows<'de>(dump: impl Deserializer<'de>) -> Result<Vec<Row>> {
    Vec::deserialize(dump).ok().with_context(|| json::unexpected("bpftool map dump"))
}

/// The bytes of an element's key.
pub(crate) fn key_of(element: &Value) -> Option<Vec<u8>> {
    Vec::deserialize(&element["key"]).ok().map(bytes)
}

/// A dump by the field names of the BTF, counters of per-CPU maps summed; of a map without names, its bytes.
pub(crate) fn formatted(dump: &Value) -> Value {
    let elements = dump.as_array().map(Vec::as_slice).unwrap_or_default();
    let told = |element: &Value| element.get("formatted").map_or_else(|| element.clone(), sum_cpus);
    Value::Array(elements.iter().map(told).collect())
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
pub(crate) struct Attachment {
    pub ifindex: u32,
    /// `clsact/ingress`, `tcx/ingress` and the like.
    #[serde(default, deserialize_with = "json::or_unknown")]
    pub kind: String,
    #[serde(default, deserialize_with = "json::or_unknown")]
    pub name: String,
}

impl Attachment {
    /// At a hook whose programs run before those of tc, and can hide packets from them (kernel 6.6, bpftool 7.3).
    pub(crate) fn is_tcx(&self) -> bool {
        self.kind.starts_with("tcx")
    }
}

#[derive(Deserialize)]
struct NetReply {
    #[serde(default, deserialize_with = "json::or_unknowns")]
    tc: Vec<Value>,
}

/// The question for the TC programs of one interface.
pub(crate) fn net_question(dev: &str) -> String {
    format!("net show dev {}", batch::word(dev))
}

pub(crate) fn attachments(answer: &Value) -> Result<Vec<Attachment>> {
    let replies = answer.as_array().with_context(|| json::unexpected("bpftool net"))?;
    let replies: Vec<NetReply> = json::known(replies.clone());
    Ok(json::known(replies.into_iter().flat_map(|reply| reply.tc).collect()))
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
        let bytes =
            json!([{"key": ["0x00"], "values": [{"cpu": 0, "value": ["0x01"]}, {"cpu": 1, "value": ["0x02"]}]}]);
        assert_eq!(formatted(&bytes), bytes, "there are no names");
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

    /// The answers of a batch, as a version of bpftool gave them.
    macro_rules! fixture {
        ($version:literal, $name:literal) => {
            outputs(include_str!(concat!("../../tests/fixtures/bpftool-", $version, "/", $name, ".json")))
                .unwrap()
                .iter()
                .map(|answer| value(answer).unwrap())
                .collect::<Vec<_>>()
        };
    }

    #[test]
    fn every_version_tells_programs_and_maps_in_a_form_that_is_read() {
        for (version, answers) in
            [("7.1", fixture!("7.1", "batch")), ("7.5", fixture!("7.5", "batch")), ("7.8", fixture!("7.8", "batch"))]
        {
            assert_eq!(answers.len(), 4, "{version}");
            for answer in &answers[..2] {
                let found = attachments(answer).unwrap();
                assert_eq!(found.len(), 1, "{version}");
                assert_eq!((found[0].ifindex, found[0].kind.as_str()), (3, "clsact/ingress"), "{version}");
                assert!(!found[0].is_tcx(), "{version}");
            }
            let counts = rows(&answers[2]).unwrap();
            assert_eq!((counts[0].key[0], counts[0].values[1][8]), (1, 3), "{version}");
            assert_eq!(formatted(&answers[2]), json!([{"key": 1, "value": {"pcnt": 4, "bcnt": 6}}]), "{version}");
            assert_eq!(rows(&answers[3]).unwrap().len(), 2, "{version}");
        }
    }

    #[test]
    fn newer_versions_tell_of_tcx() {
        for (version, answers) in [("7.5", fixture!("7.5", "tcx")), ("7.8", fixture!("7.8", "tcx"))] {
            let found = attachments(&answers[0]).unwrap();
            assert_eq!((found.len(), found[0].name.as_str()), (2, "pass_all"), "{version}");
            assert!(found[0].is_tcx(), "{version}");
        }
        let found = attachments(&fixture!("7.1", "tcx")[0]).unwrap();
        assert_eq!((found.len(), found[0].is_tcx()), (1, false), "an older one is silent about it");
    }

    #[test]
    fn rows_are_bytes() {
        let dump = json!([{"key": ["0x01", "0x00", "0x00", "0x00"], "values": [{"cpu": 0, "value": ["0xff"]}]}]);
        let rows = rows(&dump).unwrap();
        assert_eq!((rows[0].key[0], rows[0].values[0].as_slice()), (1, &[255u8][..]));
        for odd in [json!({"key": ["1"], "value": []}), json!({"key": ["0x01"]}), json!({"error": "gone"})] {
            assert!(super::rows(json!([odd])).is_err(), "{odd}");
        }
    }
}
