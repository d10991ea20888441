//! The session's entries of the neighbour table, noted beside its pins: a directory for each, whose name says it all. So
//! `down` finds them where the session's memory is gone, or is not to be read without more rights.

use std::fs::{self, DirBuilder};
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::session::stored::Hop;
use crate::tools::exec::Runner;

/// In a session's directory.
const NOTES: &str = "neighbours";

/// `4_c6336402_made`: bpffs takes no dots in names.
fn name(hop: &Hop) -> String {
    let bytes = match hop.address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}_{hex}_{}", hop.ifindex, if hop.made { "made" } else { "kept" })
}

fn hop(name: &str) -> Option<Hop> {
    let (ifindex, rest) = name.split_once('_')?;
    let (hex, made) = rest.split_once('_')?;
    let address = match hex.len() {
        8 => IpAddr::from(u32::from_str_radix(hex, 16).ok()?.to_be_bytes()),
        32 => IpAddr::from(u128::from_str_radix(hex, 16).ok()?.to_be_bytes()),
        _ => return None,
    };
    Some(Hop { address, ifindex: ifindex.parse().ok()?, made: made == "made" })
}

/// What is noted of the session with these pins.
pub(crate) fn noted(dir: &Path) -> Vec<Hop> {
    let names = fs::read_dir(dir.join(NOTES)).into_iter().flatten().flatten();
    names.filter_map(|entry| hop(entry.file_name().to_str()?)).collect()
}

/// Notes these, before they are remembered.
pub(crate) fn note(runner: &Runner, dir: &Path, hops: &[Hop]) -> Result<()> {
    let known = noted(dir);
    let new = hops.iter().filter(|hop| !known.contains(hop)).map(|hop| path(dir, hop));
    let make = |path: &Path| DirBuilder::new().recursive(true).mode(0o700).create(path);
    new.into_iter().try_for_each(|path| runner.act("mkdir -p -m 0700", &path, make))
}

/// Forgets all but these, once they are not remembered.
pub(crate) fn forget_others(runner: &Runner, dir: &Path, hops: &[Hop]) -> Result<()> {
    let gone = noted(dir).into_iter().filter(|hop| !hops.contains(hop)).map(|hop| path(dir, &hop));
    gone.into_iter().try_for_each(|path| {
        runner.act("rm -rf", &path, |path| match fs::remove_dir(path) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
            _ => Ok(()),
        })
    })
}

fn path(dir: &Path, hop: &Hop) -> PathBuf {
    dir.join(NOTES).join(name(hop))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_all_of_an_entry_and_bpffs_takes_it() {
        for (address, made) in [("198.51.100.2", true), ("2001:db8::7", false)] {
            let entry = Hop { address: address.parse().unwrap(), ifindex: 40, made };
            assert_eq!(hop(&name(&entry)), Some(entry));
            assert!(!name(&entry).contains('.'));
        }
        assert_eq!(name(&hop("4_c6336402_made").unwrap()), "4_c6336402_made");
        assert!(["", "4_c633_made", "x_c6336402_made"].iter().all(|odd| hop(odd).is_none()));
    }
}
