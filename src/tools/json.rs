//! Reads the tools' JSON, also where it is not quite JSON: an older `ip` prints control characters as they are and writes
//! `\'` for a quote.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer};
use serde_json::{Value, json};

/// A list. An empty text is an empty list: `ip` prints nothing where it finds nothing.
fn list(text: &str, tool: &str) -> Result<Vec<Value>> {
    Ok(lists(text, tool)?.into_iter().flatten().collect())
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
    if let Ok(lists) = read(text) {
        return Ok(lists);
    }
    let text = repaired(text);
    read(&text).ok().or_else(|| salvaged(&text)).with_context(|| unexpected(tool))
}

/// Lists of which a member is no JSON, as `tc` prints some filters: such a member is null, the others are read.
fn salvaged(text: &str) -> Option<Vec<Vec<Value>>> {
    let (mut lists, mut members, mut depth) = (Vec::new(), Vec::new(), 0);
    let (mut in_string, mut escaped, mut start) = (false, false, 0);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if in_string => escaped = true,
            '"' => in_string = !in_string,
            _ if in_string => {}
            '[' | '{' => {
                depth += 1;
                if depth == 1 {
                    (members, start) = (Vec::new(), at + 1);
                }
                if depth == 1 && c == '{' {
                    return None;
                }
            }
            ',' | ']' if depth == 1 => {
                let member = text[start..at].trim();
                if !member.is_empty() {
                    members.push(serde_json::from_str(member).unwrap_or_default());
                }
                start = at + 1;
                if c == ']' {
                    depth = 0;
                    lists.push(std::mem::take(&mut members));
                }
            }
            ']' | '}' => depth -= 1,
            _ if depth == 0 && !c.is_whitespace() => return None,
            _ => {}
        }
        if depth < 0 {
            return None;
        }
    }
    (depth == 0 && !in_string).then_some(lists)
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

    #[test]
    fn a_member_that_is_no_json_does_not_spoil_the_others() {
        let text = "[{\"a\":1},{\"a\":2,match 0/0 at 0},{\"b\":\"]}\"}]\n[]\n[1,,2]";
        let expected = [vec![json!({"a": 1}), Value::Null, json!({"b": "]}"})], vec![], vec![1.into(), 2.into()]];
        assert_eq!(lists(text, "tc").unwrap(), expected);
        for text in ["[{\"a\":1}", "[}]", "x[1,,2]", "{,}", "[\"a]"] {
            assert!(lists(text, "tc").is_err(), "{text}");
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
