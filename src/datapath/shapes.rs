//! The forms of a session's maps, by which programs of this build know whether they can run on maps that are there.

use crate::datapath::abi::{self, Config, Forms, Remote, Tap};
use crate::datapath::parts::Map;
use crate::datapath::reason::Reason;

/// A map's type, as bpftool names it, the bytes of its keys and values, and how many there can be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub kind: String,
    pub key: usize,
    pub value: usize,
    pub entries: usize,
}

impl Map {
    pub(crate) fn shape(self) -> Shape {
        let (taps, remotes) = (abi::MAX_TAPS as usize, abi::MAX_REMOTES);
        let (kind, key, value, entries) = match self {
            Map::Bucket => ("array", 4, 24, 1),
            Map::Rest => ("percpu_array", 4, 16384 + 2048, 5),
            Map::Scratch => ("percpu_array", 4, 256, 1),
            Map::Config => ("array", 4, Config::default().encode().len(), 1),
            Map::Drops => ("percpu_array", 4, 8 * Reason::ALL.len(), 1),
            Map::Forms => ("percpu_array", 4, Forms::BYTES, 1),
            Map::Outs => ("hash", 4, 24, 1024),
            Map::RemoteState => ("array", 4, 16, remotes),
            Map::RemoteStats => ("percpu_array", 4, 24, remotes),
            Map::Remotes => ("hash", 4, Remote::default().encode().len(), remotes),
            Map::Request => ("hash", 4, abi::REQUEST_BYTES, 2 * abi::REQUEST_CHUNKS),
            Map::Sequences => ("array", 4, 4 * remotes, 64),
            Map::SequencesFar => ("hash", 4, 4 * remotes, taps),
            Map::Sizes | Map::Times => ("percpu_array", 4, 16, abi::SIZES),
            Map::Slots => ("hash", 4, 8, taps),
            Map::Spread => ("array", 4, abi::SPREAD_BYTES, abi::BUCKETS / abi::SPREAD_BYTES),
            Map::Taps => ("percpu_hash", 8, Tap::default().encode().len(), taps),
            Map::Tunnels => ("hash", 32, 4, remotes),
            Map::Underlay => ("hash", 20, 4, remotes),
            Map::Devices => ("devmap_hash", 4, 4, 256),
        };
        Shape { kind: kind.into(), key, value, entries }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;
    use crate::datapath::source::{FEATURES, Source};
    use crate::session::upgrade;
    use crate::tools::bpftool;
    use crate::tools::exec::Runner;

    struct Pins(PathBuf);

    impl Drop for Pins {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_shapes_are_those_of_the_loaded_maps() {
        let runner = Runner::default();
        let source = Source::datapath(None, &FEATURES.map(String::from));
        let object = source.begin(&runner).unwrap().object(&runner, &[]).unwrap();
        let pins = Pins(PathBuf::from(format!("/sys/fs/bpf/snifctl_shapes_{}", std::process::id())));
        bpftool::load(&runner, &object, &pins.0, &[], false).unwrap();
        let found = upgrade::shapes(&runner, &pins.0.join("maps")).unwrap();
        for map in Map::ALL {
            assert_eq!(found[&map], map.shape(), "{}", map.name());
        }
    }
}
