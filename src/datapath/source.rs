//! The C that is built into this binary, and what of it a session needs.

use std::path::Path;

use anyhow::Result;

use crate::datapath::filter::Filter;
use crate::datapath::objects::{self, Kernel};
use crate::tools::clang::{Compiling, FLAGS, Unit};
use crate::tools::exec::Runner;

/// The sources by file name: the datapath, its taps alone and a filter alone, and what they include.
const FILES: [(&str, &str); 8] = [
    (DATAPATH, include_str!("../../bpf/snifctl.bpf.c")),
    (TAPS, include_str!("../../bpf/taps.bpf.c")),
    (MATCHER, include_str!("../../bpf/match.bpf.c")),
    ("tap.h", include_str!("../../bpf/tap.h")),
    ("relay.h", include_str!("../../bpf/relay.h")),
    ("common.h", include_str!("../../bpf/common.h")),
    ("snifctl.h", include_str!("../../bpf/snifctl.h")),
    ("classic.h", include_str!("../../bpf/classic.h")),
];
const DATAPATH: &str = "snifctl.bpf.c";
const TAPS: &str = "taps.bpf.c";
const MATCHER: &str = "match.bpf.c";
/// Where a translated filter goes; without it every packet is taken.
const FILTER: &str = "expression.h";

/// The parts that can be left out, by their `HAS_` names in `bpf/common.h`.
pub(crate) const FEATURES: [&str; 9] =
    ["UDP", "SEQUENCE", "ERSPAN", "TELL", "CUT", "RATE", "SAMPLE", "SPREAD", "PROFILE"];

/// A program to compile, with its filter if it has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    main: &'static str,
    filter: Option<Filter>,
    /// What is left out.
    without: Vec<&'static str>,
}

impl Source {
    /// A session's programs, with these features.
    pub(crate) fn datapath(filter: Option<Filter>, features: &[String]) -> Source {
        let without = FEATURES.into_iter().filter(|name| !features.iter().any(|feature| feature == name));
        Source { main: DATAPATH, filter, without: without.collect() }
    }

    /// The taps of a running session, whatever it does besides.
    pub(crate) fn taps(filter: Option<Filter>) -> Source {
        Source { main: TAPS, filter, without: Vec::new() }
    }

    /// One program that says whether a packet passes the filter.
    pub(crate) fn matcher(filter: Filter) -> Source {
        Source { main: MATCHER, filter: Some(filter), without: Vec::new() }
    }

    pub(crate) fn has_filter(&self) -> bool {
        self.filter.is_some()
    }

    /// The options of `snifctl source` that write this source.
    pub(crate) fn words(&self) -> Vec<&str> {
        self.filter.iter().flat_map(|filter| ["--filter", &filter.expression]).collect()
    }

    /// Writes the sources into `dir`, so that the commands of a dry run can be followed by hand.
    pub(crate) fn write(&self, dir: &Path) -> Result<()> {
        self.unit(Kernel::here()).write(dir)
    }

    /// Starts clang where the cache has no object.
    pub(crate) fn begin(self, runner: &Runner) -> Result<Compiling> {
        self.unit(Kernel::here()).begin(runner, objects::fitting(&self))
    }

    /// Compiles it for a kind of kernel into a file.
    pub(crate) fn compile_for(&self, kernel: Kernel, runner: &Runner, object: &Path) -> Result<()> {
        self.unit(kernel).compile(runner, object)
    }

    /// What an object of it is called that was compiled before.
    pub(crate) fn object_name(&self, kernel: Kernel) -> String {
        let unit = self.unit(kernel);
        let texts = unit.files.iter().flat_map(|(name, text)| [*name, text.as_str()]);
        let words = texts.chain(unit.defines.iter().map(String::as_str)).chain(FLAGS);
        let mark = fnv(words.flat_map(|word| word.bytes().chain([0])));
        format!("{}-{}-{mark:016x}.o", self.main.trim_end_matches(".bpf.c"), kernel.name())
    }

    fn unit(&self, kernel: Kernel) -> Unit {
        let filter = self.filter.as_ref().map(|filter| (FILTER, filter.code.clone()));
        Unit {
            main: self.main,
            files: FILES.map(|(name, text)| (name, text.to_string())).into_iter().chain(filter).collect(),
            defines: self.defines(kernel),
        }
    }

    /// What this source, and any on an older kernel, has to do without.
    fn defines(&self, kernel: Kernel) -> Vec<String> {
        let features = self.without.iter().map(|what| format!("HAS_{what}=0"));
        features.chain((kernel == Kernel::Old).then(|| "NO_ATOMIC_FETCH".into())).collect()
    }
}

/// A number that stands for the sources of a session's programs, whatever filter they have.
pub(crate) fn mark() -> u64 {
    static MARK: std::sync::LazyLock<u64> = std::sync::LazyLock::new(|| {
        let files = FILES.iter().filter(|(name, _)| *name != MATCHER);
        fnv(files.flat_map(|(name, text)| name.bytes().chain([0]).chain(text.bytes()).chain([0])))
    });
    *MARK
}

/// A hash that stays what it is from one version to the next (FNV-1a).
pub(crate) fn fnv(bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_holds_every_file_that_is_included_and_the_filter() {
        let unit = Source::datapath(Some(Filter { expression: "ip".into(), code: "int f;".into() }), &["UDP".into()])
            .unit(Kernel::here());
        let has = |name: &str| unit.files.iter().any(|(file, _)| *file == name);
        let included = |text: &str| -> Vec<String> {
            let names = text.lines().filter_map(|line| line.strip_prefix("#include \""));
            names.map(|name| name.trim_end_matches('"').to_string()).collect()
        };
        for (_, text) in &unit.files {
            included(text).iter().for_each(|name| assert!(has(name), "{name} is included and not there"));
        }
        assert!(has(FILTER) && has(unit.main));
        assert!(unit.defines.contains(&"HAS_SEQUENCE=0".into()));
        assert!(!Source::taps(None).unit(Kernel::New).files.iter().any(|(name, _)| *name == FILTER));
    }
}
