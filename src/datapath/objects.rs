//! Objects that were compiled before, for machines without clang: with every part and no filter, one for each kind of kernel.
//! Their names tell of what they are made, so that those of another version are not found.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow};

use crate::datapath::source::{FEATURES, Source};
use crate::tools::clang;
use crate::tools::exec::{self, Runner};
use crate::tools::kernel;

/// Where an image or a package brings them. Root's alone: what lies here is loaded into the kernel.
pub(crate) const DIR: &str = "/usr/lib/snifctl/objects";
/// The image and the packages that compile.
pub(crate) const COMPILES: &str = "apt-get install clang libbpf-dev, or the image snifctl:clang";

/// What differs from kernel to kernel in the objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// Without atomic additions that tell what was there before: up to 5.11.
    Old,
    New,
}

impl Kernel {
    const ALL: [Kernel; 2] = [Kernel::Old, Kernel::New];

    /// The kind that runs here.
    pub(crate) fn here() -> Kernel {
        if kernel::has_atomic_fetch() { Kernel::New } else { Kernel::Old }
    }

    /// The oldest of its kind.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kernel::Old => "5.10",
            Kernel::New => "5.12",
        }
    }
}

/// What is compiled before: a session's programs, and its taps alone, from which a filter was taken.
fn sources() -> [Source; 2] {
    [Source::datapath(None, &FEATURES.map(String::from)), Source::taps(None)]
}

/// The object for a source where clang is missing, if one fits.
pub(crate) fn fitting(source: &Source) -> Option<PathBuf> {
    let path = Path::new(DIR).join(source.object_name(Kernel::here()));
    (!has_clang() && clang::is_trusted(&path)).then_some(path)
}

/// The parts that a session's programs get which need these: all of them where they were compiled before.
pub(crate) fn parts(needed: Vec<String>, has_filter: bool) -> Vec<String> {
    let all = FEATURES.map(String::from);
    let is_before = !has_filter && fitting(&Source::datapath(None, &all)).is_some();
    if is_before { sorted(all.to_vec()) } else { needed }
}

fn sorted(mut names: Vec<String>) -> Vec<String> {
    names.sort();
    names
}

pub(crate) fn has_clang() -> bool {
    exec::find("clang").is_some()
}

/// What there is for this kernel: `None` without any objects, else whether they are of this snifctl and root's alone.
pub(crate) fn are_usable() -> Option<bool> {
    let has_some = fs::read_dir(DIR).is_ok_and(|mut files| files.next().is_some());
    let is_there = |source: &Source| clang::is_trusted(&Path::new(DIR).join(source.object_name(Kernel::here())));
    has_some.then(|| sources().iter().all(is_there))
}

/// Compiles all of them into a directory, for every kind of kernel.
pub(crate) fn write(runner: &Runner, dir: &Path) -> Result<()> {
    let unwritable = |err: std::io::Error| {
        anyhow!(
            "DIR {} cannot be written ({err}); name another, as in: snifctl source --compile ./objects",
            dir.display()
        )
    };
    fs::create_dir_all(dir).map_err(unwritable)?;
    for kernel in Kernel::ALL {
        for source in sources() {
            source.compile_for(kernel, runner, &dir.join(source.object_name(kernel)))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_is_named_by_what_it_is_made_of() {
        let [datapath, taps] = sources();
        let names = [
            datapath.object_name(Kernel::New),
            datapath.object_name(Kernel::Old),
            taps.object_name(Kernel::New),
            Source::datapath(None, &["UDP".into()]).object_name(Kernel::New),
        ];
        assert!(names[0].starts_with("snifctl-5.12-") && names[1].starts_with("snifctl-5.10-"), "{names:?}");
        assert!((1..names.len()).all(|at| !names[..at].contains(&names[at])), "{names:?}");
    }

    #[test]
    fn with_clang_a_session_has_what_it_needs_and_no_more() {
        assert!(has_clang());
        assert_eq!(parts(vec!["UDP".into()], false), ["UDP"]);
    }
}
