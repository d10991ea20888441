//! Reads the tools' JSON, also where it is not quite JSON: an older `ip` prints control characters as they are and writes
//! `\'` for a quote.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer};
use serde_json::{Value, json};

/// One list. An empty text is an empty list: `ip` prints nothing where it finds nothing. Of what is no JSON the part
/// before the oddity is read.
///
/// # Errors
/// It is no list at all.
pub(crate) fn list(text: &str, tool: &str) -> Result<Vec<Value>> {
    match lists(text, tool) {
        Ok(lists) => Ok(lists.into_iter().flatten().collect()),
        Err(why) => salvaged(&repaired(text)).ok_or(why),
    }
}

/// The members of a list that are of the wanted form, as [`known`] has it.
///
/// # Errors
/// Not one of them is of that form.
pub(crate) fn members<T: DeserializeOwned>(text: &str, tool: &str) -> Result<Vec<T>> {
    // The short way, where nothing is odd: thousands of links are read so.
    match serde_json::from_str(text) {
        Ok(all) => Ok(all),
        Err(_) => {
            let members = list(text, tool)?;
            let is_empty = members.iter().all(|member| *member == json!({}));
            let known = known(members);
            ensure!(is_empty || !known.is_empty(), unexpected(tool));
            Ok(known)
        }
    }
}

/// The members of a list that are of the wanted form. Others are skipped: newer tools have them, and `ip` has `{}` for
/// what it was not asked for.
pub(crate) fn known<T: DeserializeOwned>(members: Vec<Value>) -> Vec<T> {
    members.into_iter().filter_map(|member| serde_json::from_value(member).ok()).collect()
}

/// Lists that follow one another.
pub(crate) fn lists(text: &str, tool: &str) -> Result<Vec<Vec<Value>>> {
    let read =
        |text: &str| serde_json::Deserializer::from_str(text).into_iter().collect::<serde_json::Result<Vec<_>>>();
    read(text).or_else(|_| read(&repaired(text))).ok().with_context(|| unexpected(tool))
}

/// A list of objects of which some are no JSON, or which ends early: `tc` prints so what it does not know well. Each of
/// them begins with the key of the first; of one that is no JSON the part before the oddity is read.
fn salvaged(text: &str) -> Option<Vec<Value>> {
    let text = text.trim().strip_prefix('[')?;
    let key = &text[..=text.find(':')?];
    if !key.starts_with("{\"") {
        return None;
    }
    let begins = text.match_indices(key).map(|(at, _)| at).collect::<Vec<_>>();
    let ends = begins.iter().copied().skip(1).chain([text.len()]);
    Some(begins.iter().zip(ends).filter_map(|(&begin, end)| first_object(&text[begin..end])).collect())
}

/// The object that the text begins with, or what can be read of it.
fn first_object(text: &str) -> Option<Value> {
    if let Some(Ok(whole)) = serde_json::Deserializer::from_str(text).into_iter().next() {
        return Some(whole);
    }
    let (mut closing, mut in_string, mut escaped, mut read) = (Vec::new(), false, false, None);
    for (at, c) in text.char_indices() {
        let end = match c {
            _ if escaped => {
                escaped = false;
                continue;
            }
            '\\' if in_string => {
                escaped = true;
                continue;
            }
            '"' => {
                in_string = !in_string;
                continue;
            }
            _ if in_string => continue,
            '{' | '[' => {
                closing.push(if c == '{' { '}' } else { ']' });
                at + 1
            }
            '}' | ']' => {
                closing.pop();
                continue;
            }
            ',' => at,
            _ => continue,
        };
        let closed = text[..end].chars().chain(closing.iter().rev().copied()).collect::<String>();
        match serde_json::from_str(&closed) {
            Ok(value) => read = Some(value),
            Err(_) => break,
        }
    }
    read
}

/// A field that is of another type than we know is as one that is missing: it does not spoil the rest.
pub(crate) fn or_unknown<'de, D: Deserializer<'de>, T: DeserializeOwned + Default>(from: D) -> Result<T, D::Error> {
    Ok(serde_json::from_value(Value::deserialize(from)?).unwrap_or_default())
}

/// The same of a list, of which each member that is known is kept.
pub(crate) fn or_unknowns<'de, D: Deserializer<'de>, T: DeserializeOwned>(from: D) -> Result<Vec<T>, D::Error> {
    let Value::Array(members) = Value::deserialize(from)? else { return Ok(Vec::new()) };
    Ok(members.into_iter().filter_map(|member| serde_json::from_value(member).ok()).collect())
}

/// What to say of a tool's answer that cannot be understood.
pub(crate) fn unexpected(tool: &str) -> String {
    format!("{tool} gave unexpected JSON; try: snifctl doctor")
}

/// The same with control characters inside strings escaped, and without escapes that JSON does not have.
fn repaired(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut in_string, mut chars) = (false, text.chars());
    while let Some(c) = chars.next() {
        match c {
            '"' => in_string = !in_string,
            '\\' => {
                let next = chars.next().unwrap_or_default();
                out.extend((next != '\'').then_some('\\'));
                out.push(next);
                continue;
            }
            c if in_string && c.is_ascii_control() => {
                out += &format!("\\u{:04x}", u32::from(c));
                continue;
            }
            _ => {}
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_quite_json_is_read() {
        let text = "[{\"a\":\"o\\'u\"},\t{\"b\":\"c\u{1}d\\\\\"}]\n[]\n";
        let expected = [serde_json::json!({"a": "o'u"}), serde_json::json!({"b": "c\u{1}d\\"})];
        assert_eq!(lists(text, "ip").unwrap(), [expected.to_vec(), vec![]]);
        assert_eq!(list(r#"["q\"'\\"]"#, "ip").unwrap(), ["q\"'\\"]);
        assert_eq!(list(" \n", "ip").unwrap(), [Value::Null; 0]);
    }

    #[test]
    fn what_is_no_json_is_told_in_one_form() {
        for text in ["[", "nonsense", "[1] x", "{}"] {
            assert_eq!(list(text, "ip link").unwrap_err().to_string(), unexpected("ip link"), "{text}");
        }
    }

    /// As tc of iproute2 6.1 prints basic, simple, fw, skbmod and a `route` of which it knows nothing.
    #[test]
    fn what_tc_prints_that_is_no_json_spoils_nothing_else() {
        let head = |pref: u32| json!({"protocol": "all", "pref": pref, "kind": "x", "chain": 0});
        let ours = r#"{"protocol":"all","pref":9,"kind":"bpf","options":{"handle":"0x5","prog":{"id":7}}}"#;
        let odd = [
            ("{\"handle\":\"1\"\n  meta(priority eq 5)\n,\"actions\":[{\"order\":1}]}}", json!({})),
            (
                "{\"fh\":\"800:\",\"actions\":[{\"order\":1Simple <{\"[>\n\t index 1",
                json!({"fh": "800:", "actions": [{}]}),
            ),
            ("{\"actions\":[{\"order\":1skbmod ,\"type\":{\"a\":1}swap mac \n", json!({"actions": [{}]})),
            ("{,\"fh\":0x1}}", json!({})),
        ];
        for (odd, options) in odd {
            let first = r#"{"protocol":"all","pref":3,"kind":"x","chain":0"#;
            let text = format!("[{first}}},{first},\"options\":{odd},{ours}]\n");
            let seen = list(&text, "tc").unwrap();
            let mut stranger = head(3);
            stranger["options"] = options;
            assert_eq!(seen, [head(3), stranger, serde_json::from_str(ours).unwrap()], "{text}");
        }
        assert_eq!(list(&format!("[{ours},{ours}"), "tc").unwrap().len(), 2, "the list ends early");
        for text in ["[}]", "x[1,,2]", "{,}", "[1,,2]"] {
            assert!(list(text, "tc").is_err(), "{text}");
        }
    }

    #[test]
    fn members_of_another_form_are_skipped() {
        let numbers = |text: &str| members::<u32>(text, "ip");
        assert_eq!(numbers(r#"[1, "x", {}, -1, 2]"#).unwrap(), [1, 2]);
        assert_eq!(numbers("[]").unwrap(), [0u32; 0]);
        assert_eq!(numbers("[{}, {}]").unwrap(), [0u32; 0]);
        assert_eq!(numbers(r#"["x", -1]"#).unwrap_err().to_string(), unexpected("ip"));
    }
}
