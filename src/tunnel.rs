//! The kinds of tunnels. One row of [`KINDS`] is all that snifctl knows of a kind: a new one touches this file alone.

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::datapath::abi::{Direction, Positions};
use crate::usage::{Usage, ensure_usage, number, refuse, spelled};

pub(crate) const PROTO_UDP: u8 = 17;
const PROTO_GRE: u8 = 47;

/// RFC 2784 and 2890: flags of the first word, and protocol types of the payload.
const GRE_KEY: u16 = 0x2000;
const GRE_SEQUENCE: u16 = 0x1000;
const ETH_P_TEB: u16 = 0x6558;
/// draft-foschiano-erspan-03: types I and II, and type III.
const ETH_P_ERSPAN: u16 = 0x88be;
const ETH_P_ERSPAN3: u16 = 0x22eb;
/// "VLAN tag preserved in the frame", the encapsulation field of type II.
const ERSPAN_TAG_INSIDE: u8 = 3;
/// Type III: an Ethernet frame (P), timestamps in IEEE 1588 form (Gra 2), a platform subheader (O), of platform 5: port and
/// the seconds that belong to the nanoseconds in the header.
const ERSPAN3_FLAGS: u16 = 1 << 15 | 2 << 1 | 1;
const ERSPAN3_PLATFORM: u32 = 5 << 26;
/// RFC 8926: the length of the options, in words, in the first byte of Geneve's header; and our one option. Its class is one
/// of those for experiments, its type is not critical, and five words of data are the kernel's to write.
const GENEVE_OPTIONS: u32 = 6 << 24;
const TELL_CLASS: u16 = 0xff5a;
const TELL_TYPE: u8 = 1;
const TELL_WORDS: u8 = 5;

/// The encapsulation of the copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// GRE with transparent Ethernet bridging (RFC 2784, protocol 0x6558)
    Gre,
    /// VXLAN (RFC 7348)
    Vxlan,
    /// Geneve (RFC 8926)
    Geneve,
    /// ERSPAN type I: GRE with protocol 0x88be and nothing more
    Erspan1,
    /// ERSPAN type II: sequence, session id, inner VLAN
    Erspan2,
    /// ERSPAN type III: also direction and a timestamp of 64 bits
    Erspan3,
}

/// What is particular to a kind.
struct Facts {
    kind: Kind,
    /// IP protocol number.
    protocol: u8,
    /// Destination port by default (RFC 7348, RFC 8926), 0 without UDP.
    port: u16,
    /// GRE protocol type, 0 over UDP.
    gre: u16,
    /// The largest id that it can carry, if it carries one.
    largest_id: Option<u32>,
    /// ERSPAN's encapsulation field for a frame that has its tag inside.
    tagged: u8,
    header: fn(&Tunnel, Direction) -> Header,
}

const KINDS: [Facts; 6] = [
    Facts {
        kind: Kind::Gre,
        protocol: PROTO_GRE,
        port: 0,
        gre: ETH_P_TEB,
        largest_id: Some(u32::MAX),
        tagged: 0,
        header: |tunnel, direction| gre(tunnel.id_of(direction), tunnel.sequence),
    },
    Facts {
        kind: Kind::Vxlan,
        protocol: PROTO_UDP,
        port: 4789,
        gre: 0,
        largest_id: Some((1 << 24) - 1),
        tagged: 0,
        header: |tunnel, direction| udp(tunnel.udp_port(), [0x0800_0000, tunnel.id_or_one(direction) << 8]),
    },
    Facts {
        kind: Kind::Geneve,
        protocol: PROTO_UDP,
        port: 6081,
        gre: 0,
        largest_id: Some((1 << 24) - 1),
        tagged: 0,
        header: |tunnel, direction| geneve(tunnel.udp_port(), tunnel.id_or_one(direction), tunnel.tell),
    },
    Facts {
        kind: Kind::Erspan1,
        protocol: PROTO_GRE,
        port: 0,
        gre: ETH_P_ERSPAN,
        largest_id: None,
        tagged: 0,
        header: |_, _| Header { bytes: words16([0, ETH_P_ERSPAN]), at: Positions::default() },
    },
    Facts {
        kind: Kind::Erspan2,
        protocol: PROTO_GRE,
        port: 0,
        gre: ETH_P_ERSPAN,
        largest_id: Some((1 << 10) - 1),
        tagged: ERSPAN_TAG_INSIDE,
        header: |tunnel, direction| erspan2(tunnel.id_or_one(direction)),
    },
    Facts {
        kind: Kind::Erspan3,
        protocol: PROTO_GRE,
        port: 0,
        gre: ETH_P_ERSPAN3,
        largest_id: Some((1 << 10) - 1),
        tagged: 0,
        header: |tunnel, direction| erspan3(tunnel.id_or_one(direction), direction),
    },
];

/// The bytes between the outer IP header and the inner frame, and positions in them (from their start, plus one).
pub(crate) struct Header {
    pub bytes: Vec<u8>,
    pub at: Positions,
}

/// The tunnel and what its header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Args)]
pub(crate) struct Tunnel {
    /// Encapsulation of the copies
    #[arg(long = "tunnel", value_enum)]
    #[serde(rename = "tunnel")]
    pub kind: Kind,
    /// GRE key, VXLAN or Geneve VNI [default: 1], ERSPAN session id [default: 1]; decimal or 0x hex
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = |text: &str| number::<u32>("--id", text, 0..=u64::from(u32::MAX), "--id 7"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u32>,
    /// The id of copies of outgoing packets [default: that of --id]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = |text: &str| number::<u32>("--egress-id", text, 0..=u64::from(u32::MAX), "--id 7 --egress-id 8"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress_id: Option<u32>,
    /// UDP destination port [default: vxlan 4789, geneve 6081]
    #[arg(long, value_name = "PORT", allow_negative_numbers = true, value_parser = |text: &str| number::<u16>("--port", text, 1..=65535, "--port 4789"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Add GRE sequence numbers
    #[arg(long)]
    #[serde(default)]
    pub sequence: bool,
    /// Compute the outer UDP checksum instead of leaving it zero
    #[arg(long)]
    #[serde(default)]
    pub udp_checksum: bool,
    /// Add a Geneve option: tap, direction, time, number of the copy, length of the frame
    #[arg(long)]
    #[serde(default)]
    pub tell: bool,
}

impl Tunnel {
    fn facts(&self) -> &'static Facts {
        let found = KINDS.iter().find(|facts| facts.kind == self.kind);
        found.expect("a test sees that each kind has a row")
    }

    pub(crate) fn header(&self, direction: Direction) -> Header {
        (self.facts().header)(self, direction)
    }

    /// Where the kernel patches the tunnel header: not 0 for what it patches at all.
    pub(crate) fn patched(&self) -> Positions {
        self.header(Direction::Ingress).at
    }

    /// Does the header differ with every frame?
    pub(crate) fn is_per_frame(&self) -> bool {
        self.patched().sequence != 0 || self.udp_checksum || self.tell
    }

    /// Does the header say when a frame was copied?
    pub(crate) fn tells_time(&self) -> bool {
        self.patched().time != 0 || self.tell
    }

    /// The IP protocol number of the tunnel's packets.
    pub(crate) fn protocol(&self) -> u8 {
        self.facts().protocol
    }

    pub(crate) fn is_udp(&self) -> bool {
        self.facts().port != 0
    }

    /// UDP destination port, 0 without UDP.
    pub(crate) fn udp_port(&self) -> u16 {
        if self.is_udp() { self.port.unwrap_or(self.facts().port) } else { 0 }
    }

    /// The GRE protocol type, 0 over UDP.
    pub(crate) fn gre(&self) -> u16 {
        self.facts().gre
    }

    /// The GRE keys, by direction.
    pub(crate) fn keys(&self) -> Option<[u32; 2]> {
        let id = self.id.filter(|_| self.kind == Kind::Gre)?;
        Some([id, self.egress_id.unwrap_or(id)])
    }

    /// ERSPAN's encapsulation field for a frame that has its tag inside.
    pub(crate) fn tagged(&self) -> u8 {
        self.facts().tagged
    }

    /// Bytes of the header.
    pub(crate) fn overhead(&self) -> usize {
        self.header(Direction::Ingress).bytes.len()
    }

    fn id_of(&self, direction: Direction) -> Option<u32> {
        match direction {
            Direction::Ingress => self.id,
            Direction::Egress => self.egress_id.or(self.id),
        }
    }

    /// What a collector knows copies by, by direction; none where the header has no id.
    pub(crate) fn known_by(&self) -> [Option<u32>; 2] {
        let is_always = self.kind != Kind::Gre && self.facts().largest_id.is_some();
        [Direction::Ingress, Direction::Egress].map(|direction| match is_always {
            true => Some(self.id_or_one(direction)),
            false => self.id_of(direction),
        })
    }

    /// Does a collector take the copies of both, from one address, for those of one sender?
    pub(crate) fn is_one_with(&self, other: &Tunnel) -> bool {
        let theirs = other.known_by();
        let is_same = (self.kind, self.udp_port()) == (other.kind, other.udp_port());
        is_same && self.known_by().iter().any(|id| theirs.contains(id))
    }

    /// What makes it another one than these to a collector.
    pub(crate) fn apart_from(&self, others: &[&Tunnel]) -> String {
        let is_free = |id: &u32| others.iter().all(|other| !other.known_by().contains(&Some(*id)));
        let id = (9..).find(is_free).unwrap_or_default();
        match self.facts().largest_id {
            Some(_) => format!("--id {id}"),
            None => format!("--tunnel {} --id {id}", spelled(Kind::Erspan2)),
        }
    }

    /// Does each copy have a number?
    pub(crate) fn has_numbers(&self) -> bool {
        self.tell || self.is_numbered()
    }

    /// Are all copies to a remote numbered together?
    pub(crate) fn is_numbered(&self) -> bool {
        self.patched().sequence != 0
    }

    fn id_or_one(&self, direction: Direction) -> u32 {
        self.id_of(direction).unwrap_or(1)
    }

    /// Every option fits the kind.
    pub(crate) fn check(&self) -> Result<(), Usage> {
        let kind = spelled(self.kind);
        for (flag, id) in [("--id", self.id), ("--egress-id", self.egress_id)] {
            let Some(id) = id else { continue };
            let Some(largest) = self.facts().largest_id else {
                let others = kinds_that(|facts| facts.largest_id.is_some());
                refuse!("{flag} does not go with --tunnel {kind}, which carries no id; types that do: {others}")
            };
            ensure_usage!(id <= largest, "{flag} {id} is out of range for --tunnel {kind}; it takes 0 to {largest}");
        }
        ensure_usage!(
            self.kind != Kind::Gre || self.egress_id.is_none() || self.id.is_some(),
            "--egress-id needs a key for the other direction too with --tunnel gre; try: --id 1 --egress-id 2"
        );
        ensure_usage!(
            !self.sequence || self.kind == Kind::Gre,
            "--sequence is an option of gre (erspan2 and erspan3 always count); try: --tunnel gre --sequence"
        );
        ensure_usage!(
            !self.tell || self.kind == Kind::Geneve,
            "--tell does not go with --tunnel {kind}, whose header has no options; try: --tunnel geneve --tell"
        );
        for (flag, used) in [("--port", self.port.is_some()), ("--udp-checksum", self.udp_checksum)] {
            let others = kinds_that(|facts| facts.port != 0);
            ensure_usage!(
                !used || self.is_udp(),
                "{flag} does not go with --tunnel {kind}, which has no UDP header; types that do: {others}"
            );
        }
        Ok(())
    }
}

fn kinds_that(have: impl Fn(&Facts) -> bool) -> String {
    let names = KINDS.iter().filter(|facts| have(facts)).map(|facts| spelled(facts.kind));
    names.collect::<Vec<_>>().join(", ")
}

fn words16<const N: usize>(words: [u16; N]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

fn words32<const N: usize>(words: [u32; N]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

fn gre(key: Option<u32>, sequence: bool) -> Header {
    let flags = if key.is_some() { GRE_KEY } else { 0 } | if sequence { GRE_SEQUENCE } else { 0 };
    let mut bytes = words16([flags, ETH_P_TEB]);
    bytes.extend(key.map(u32::to_be_bytes).into_iter().flatten());
    let at = Positions { sequence: if sequence { bytes.len() as u8 + 1 } else { 0 }, ..Positions::default() };
    bytes.extend(if sequence { &[0; 4][..] } else { &[] });
    Header { bytes, at }
}

/// A UDP header whose source port, length and checksum the kernel writes, and eight bytes of VXLAN or Geneve.
fn udp(port: u16, header: [u32; 2]) -> Header {
    let bytes = [words16([0, port, 0, 0]), words32(header)].concat();
    Header { bytes, at: Positions { udp: 1, ..Positions::default() } }
}

fn geneve(port: u16, id: u32, tell: bool) -> Header {
    let Header { mut bytes, at } = udp(port, [ETH_P_TEB.into(), id << 8]);
    if tell {
        bytes[8..12].copy_from_slice(&(GENEVE_OPTIONS | u32::from(ETH_P_TEB)).to_be_bytes());
        bytes.extend(words16([TELL_CLASS, u16::from_be_bytes([TELL_TYPE, TELL_WORDS])]));
        bytes.extend([0; 4 * TELL_WORDS as usize]);
    }
    Header { bytes, at }
}

/// GRE with a sequence number; version 1 and session id; index, which carries the tap.
fn erspan2(session: u32) -> Header {
    let bytes = [words16([GRE_SEQUENCE, ETH_P_ERSPAN]), words32([0, 1 << 28 | session, 0])].concat();
    Header { bytes, at: Positions { sequence: 5, vlan: 9, port: 15, ..Positions::default() } }
}

/// GRE with a sequence number; version 2 and session id; nanoseconds; flags; platform and port; seconds.
fn erspan3(session: u32, direction: Direction) -> Header {
    let flags = u32::from(ERSPAN3_FLAGS) | (direction as u32) << 3;
    let head = words16([GRE_SEQUENCE, ETH_P_ERSPAN3]);
    let bytes = [head, words32([0, 2 << 28 | session, 0, flags, ERSPAN3_PLATFORM, 0])].concat();
    Header { bytes, at: Positions { udp: 0, sequence: 5, vlan: 9, time: 13, port: 23, seconds: 25 } }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_one_row() {
        for kind in Kind::value_variants() {
            assert_eq!(KINDS.iter().filter(|facts| facts.kind == *kind).count(), 1, "{kind:?}");
        }
    }
}
