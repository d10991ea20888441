//! Reads the tools' JSON, also where it is not quite JSON: an older `ip` prints control characters as they are and writes
//! `\'` for a quote.

use std::borrow::Cow;

use anyhow::{Context, Result, ensure};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// A list. An empty text is an empty list: `ip` prints nothing where it finds nothing.
fn list(text: &str, tool: &str) -> Result<Vec<Value>> {
    Ok(lists(text, tool)?.into_iter().flatten().collect())
}

/// The members of a list that are of the wanted form, as [`known`] has it.
pub(crate) fn members<T: DeserializeOwned>(text: &str, tool: &str) -> Result<Vec<T>> {
    // The short way, where nothing is odd: thousands of links are read so.
    match serde_json::from_str(text) {
        Ok(all) => Ok(all),
        Err(_) => known(list(text, tool)?, tool),
    }
}

/// The members of a list that are of the wanted form. Others are skipped: newer tools have them, and `ip` has `{}` for
/// what it was not asked for.
///
/// # Errors
/// Not one of them is of that form.
pub(crate) fn known<T: DeserializeOwned>(members: Vec<Value>, tool: &str) -> Result<Vec<T>> {
    let members: Vec<Value> = members.into_iter().filter(|member| *member != json!({})).collect();
    let is_empty = members.is_empty();
    let known: Vec<T> = members.into_iter().filter_map(|member| serde_json::from_value(member).ok()).collect();
    ensure!(is_empty || !known.is_empty(), unexpected(tool));
    Ok(known)
}

/// Lists that follow one another.
pub(crate) fn lists(text: &str, tool: &str) -> Result<Vec<Vec<Value>>> {
    let text = repaired(text);
    let lists = serde_json::Deserializer::from_str(&text).into_iter().collect::<serde_json::Result<Vec<_>>>();
    lists.with_context(|| unexpected(tool))
}

/// What to say of a tool's answer that cannot be understood.
pub(crate) fn unexpected(tool: &str) -> String {
    format!("{tool} gave unexpected JSON; try: snifctl doctor")
}

/// The same with control characters inside strings escaped, and without escapes that JSON does not have.
fn repaired(text: &str) -> Cow<'_, str> {
    if !text.contains("\\'") && !text.contains(|c: char| c.is_ascii_control() && c != '\n') {
        return Cow::Borrowed(text);
    }
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
    Cow::Owned(out)
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
    fn members_of_another_form_are_skipped() {
        let numbers = |text: &str| members::<u32>(text, "ip");
        assert_eq!(numbers(r#"[1, "x", {}, -1, 2]"#).unwrap(), [1, 2]);
        assert_eq!(numbers("[]").unwrap(), [0u32; 0]);
        assert_eq!(numbers("[{}, {}]").unwrap(), [0u32; 0]);
        assert_eq!(numbers(r#"["x", -1]"#).unwrap_err().to_string(), unexpected("ip"));
    }
}
