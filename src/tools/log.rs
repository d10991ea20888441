//! What clang and the kernel's verifier say is long: the end of it in a message, all of it in a file.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;

use crate::tools::exec::Failed;

/// What bpftool says after the verifier's reason, always.
const NOISE: [&str; 8] = [
    "Error: failed to load object file",
    "Warning: bpftool is now running",
    "If it used to work",
    "libbpf: failed to load",
    "libbpf: prog",
    "-- END PROG",
    "processed",
    "verification time",
];

/// The error for a failure with a long log. It names the file that the log is in.
pub(crate) fn failure(tool: &str, failed: &Failed, hint: &str) -> anyhow::Error {
    let last = last_lines(&failed.stderr);
    match keep(tool, &failed.stderr) {
        Ok(path) => anyhow::anyhow!("{tool} failed: {last}; the whole log is in {}; {hint}", path.display()),
        Err(_) => anyhow::anyhow!("{tool} failed: {last}; {hint}"),
    }
}

/// The last three lines that say something.
fn last_lines(log: &str) -> String {
    let says = |line: &&str| !line.is_empty() && !NOISE.iter().any(|noise| line.starts_with(noise));
    let lines: Vec<&str> = log.lines().map(str::trim).filter(says).collect();
    lines[lines.len().saturating_sub(3)..].join(" | ")
}

fn keep(tool: &str, text: &str) -> Result<PathBuf> {
    let file = tempfile::Builder::new().prefix(&format!("snifctl-{tool}-")).suffix(".log").tempfile()?;
    fs::write(file.path(), text)?;
    Ok(file.keep()?.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_leave_out_what_is_always_said() {
        let log = "a\nb\n\nR1 invalid mem access\nprocessed 9 insns\nlibbpf: failed to load object\nc\n";
        assert_eq!(last_lines(log), "b | R1 invalid mem access | c");
        assert_eq!(last_lines(""), "");
    }
}
