//! The parts of a session in the kernel, each named once: programs and maps. Loading, attaching, checking and showing go by
//! these lists; tests compare them with the object's BTF and with the docs.

use crate::datapath::abi::Direction;

/// A device of the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Device {
    Bridge,
    /// The bridge's port, one end of a veth pair.
    Port,
    /// The other end of it.
    Peer,
}

impl Device {
    pub(crate) const ALL: [Device; 3] = [Device::Bridge, Device::Port, Device::Peer];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Device::Bridge => "bridge",
            Device::Port => "port",
            Device::Peer => "peer",
        }
    }

    /// The program at its egress hook.
    pub(crate) fn program(self) -> Program {
        match self {
            Device::Bridge => Program::Encap,
            Device::Port => Program::Wire,
            Device::Peer => Program::Deliver,
        }
    }
}

/// A program; its name is also that of its pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Program {
    TapIn,
    TapOut,
    Encap,
    Wire,
    Deliver,
}

impl Program {
    pub(crate) const ALL: [Program; 5] =
        [Program::TapIn, Program::TapOut, Program::Encap, Program::Wire, Program::Deliver];
    /// Those at the hooks of watched interfaces.
    pub(crate) const TAPS: [Program; 2] = [Program::TapIn, Program::TapOut];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Program::TapIn => "snif_tap_in",
            Program::TapOut => "snif_tap_out",
            Program::Encap => "snif_encap",
            Program::Wire => "snif_wire",
            Program::Deliver => "snif_deliver",
        }
    }

    pub(crate) fn of(name: &str) -> Option<Program> {
        Program::ALL.into_iter().find(|program| program.name() == name)
    }

    /// The tap of a direction.
    pub(crate) fn tap(direction: Direction) -> Program {
        match direction {
            Direction::Ingress => Program::TapIn,
            Direction::Egress => Program::TapOut,
        }
    }
}

/// A map; its name is also that of its pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Map {
    Bucket,
    Config,
    Drops,
    Forms,
    Outs,
    RemoteState,
    RemoteStats,
    Remotes,
    Request,
    Sizes,
    Slots,
    Spread,
    Taps,
    Times,
    Tunnels,
    Underlay,
    Devices,
    Sequences,
    SequencesFar,
    Rest,
    Scratch,
}

impl Map {
    pub(crate) const ALL: [Map; 21] = [
        Map::Bucket,
        Map::Config,
        Map::Drops,
        Map::Forms,
        Map::Outs,
        Map::RemoteState,
        Map::RemoteStats,
        Map::Remotes,
        Map::Request,
        Map::Sizes,
        Map::Slots,
        Map::Spread,
        Map::Taps,
        Map::Times,
        Map::Tunnels,
        Map::Underlay,
        Map::Devices,
        Map::Sequences,
        Map::SequencesFar,
        Map::Rest,
        Map::Scratch,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Map::Bucket => "bucket",
            Map::Config => "config",
            Map::Drops => "drops",
            Map::Forms => "forms",
            Map::Outs => "outs",
            Map::RemoteState => "remote_state",
            Map::RemoteStats => "remote_stats",
            Map::Remotes => "remotes",
            Map::Request => "request",
            Map::Sizes => "sizes",
            Map::Slots => "slots",
            Map::Spread => "spread",
            Map::Taps => "taps",
            Map::Times => "times",
            Map::Tunnels => "tunnels",
            Map::Underlay => "underlay",
            Map::Devices => "devices",
            Map::Sequences => "sequences",
            Map::SequencesFar => "sequences_far",
            Map::Rest => "rest",
            Map::Scratch => "scratch",
        }
    }

    pub(crate) fn of(name: &str) -> Option<Map> {
        Map::ALL.into_iter().find(|map| map.name() == name)
    }

    /// Does it say something to a person? Not so references to devices, numbers of copies to come, and working memory.
    pub(crate) fn is_shown(self) -> bool {
        !matches!(self, Map::Devices | Map::Sequences | Map::SequencesFar | Map::Rest | Map::Scratch)
    }

    pub(crate) fn shown() -> impl Iterator<Item = Map> {
        Map::ALL.into_iter().filter(|map| map.is_shown())
    }

    /// An array by remote slot, of which only slots in use say something.
    pub(crate) fn is_by_remote(self) -> bool {
        matches!(self, Map::RemoteStats | Map::RemoteState)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCES: [&str; 3] =
        [include_str!("../../bpf/common.h"), include_str!("../../bpf/tap.h"), include_str!("../../bpf/relay.h")];

    fn sorted<'a>(names: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
        let mut names: Vec<&str> = names.into_iter().collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn the_programs_and_maps_are_those_of_the_sources() {
        let lines = || SOURCES.iter().flat_map(|text| text.lines());
        let programs = lines().zip(lines().skip(1)).filter(|(section, _)| *section == "SEC(\"tc\")");
        let programs = programs.filter_map(|(_, line)| line.strip_prefix("int ")?.split('(').next());
        assert_eq!(sorted(Program::ALL.map(Program::name)), sorted(programs));
        let maps = lines().filter_map(|line| line.strip_prefix("} ")?.strip_suffix(" SEC(\".maps\");"));
        assert_eq!(sorted(Map::ALL.map(Map::name)), sorted(maps));
    }
}
