//! JSON on standard output.

use anyhow::Result;
use serde_json::Value;

use crate::tools::exec;

pub(crate) fn print(value: &Value) -> Result<()> {
    exec::print(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// A map's elements, one a line.
pub(crate) fn elements(dump: &Value) -> Result<String> {
    let Some(elements) = dump.as_array() else { return Ok(serde_json::to_string(dump)?) };
    let lines = elements.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>()?;
    Ok(if lines.is_empty() { "[]".into() } else { format!("[\n  {}\n]", lines.join(",\n  ")) })
}
