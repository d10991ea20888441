use super::*;

const FRAME: [u8; 20] = [7; 20];

fn packet(parts: &[&[u8]]) -> Vec<u8> {
    [&parts.concat()[..], &FRAME].concat()
}

/// A small generator of numbers (xorshift64*), so that a run can be repeated.
pub(in crate::collect) struct Random(pub u64);

impl Random {
    pub(in crate::collect) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(in crate::collect) fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }
}

fn gre_with_checksum() -> Vec<u8> {
    let mut bytes = packet(&[&[0x80, 0, 0x65, 0x58, 0, 0, 0, 0]]);
    let sum = checksum(&bytes);
    bytes[4..6].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// One packet of each form: GRE first, then VXLAN, then Geneve.
fn samples() -> Vec<(&'static str, Vec<u8>)> {
    let option = [0xff, 0x5a, 1, 5, 0, 7, 0, 1, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 9, 0, 0, 5, 0xdc];
    vec![
        ("gre", packet(&[&[0, 0, 0x65, 0x58]])),
        ("gre", gre_with_checksum()),
        ("gre", packet(&[&[0x30, 0, 0x65, 0x58, 0, 0, 0, 7, 0, 0, 0, 9]])),
        ("gre", packet(&[&[0, 0, 0x88, 0xbe]])),
        ("gre", packet(&[&[0x10, 0, 0x88, 0xbe, 0, 0, 0, 9, 0x10, 0, 0x04, 7, 0, 0, 0, 5]])),
        ("gre", packet(&[&[0x10, 0, 0x22, 0xeb, 0, 0, 0, 9, 0x20, 0, 0, 7, 0, 0, 0, 1, 0x80, 0, 0, 0x0c]])),
        (
            "gre",
            packet(&[
                &[0x10, 0, 0x22, 0xeb, 0, 0, 0, 9, 0x20, 0, 0, 7, 0, 0, 0, 1, 0x80, 0, 0, 0x0d],
                &[0x14, 0, 0, 7, 0, 0, 0, 3],
            ]),
        ),
        ("vxlan", packet(&[&[8, 0, 0, 0, 0, 0, 7, 0]])),
        ("gpe", packet(&[&[0x0c, 0, 0, 3, 0, 0, 7, 0]])),
        ("geneve", packet(&[&[0, 0, 0x65, 0x58, 0, 0, 7, 0]])),
        ("geneve", packet(&[&[2, 0x40, 0x65, 0x58, 0, 0, 7, 0, 1, 2, 3, 0, 1, 2, 3, 0]])),
        ("geneve", packet(&[&[6, 0, 0x65, 0x58, 0, 0, 7, 0], &option])),
    ]
}

fn read<'a>(how: &str, bytes: &'a [u8]) -> Result<Copy<'a>> {
    match how {
        "gre" => gre(bytes),
        "vxlan" => vxlan(bytes, Kind::Vxlan),
        "gpe" => vxlan(bytes, Kind::VxlanGpe),
        _ => geneve(bytes),
    }
}

#[test]
fn every_form_is_read() {
    let samples = samples();
    let copies: Vec<Copy> = samples.iter().map(|(how, bytes)| read(how, bytes).unwrap()).collect();
    assert!(copies.iter().all(|copy| copy.frame == FRAME), "{copies:#?}");
    let kinds: Vec<&str> = copies.iter().map(|copy| copy.kind.name()).collect();
    let expected = "gre gre gre erspan1 erspan2 erspan3 erspan3 vxlan vxlan-gpe geneve geneve geneve";
    assert_eq!(kinds.join(" "), expected);
    let ids: Vec<Option<u32>> = copies.iter().map(|copy| copy.id).collect();
    let seven = Some(7);
    assert_eq!(ids, [None, None, seven, None, seven, seven, seven, seven, seven, seven, seven, seven]);
    assert_eq!((copies[4].tap, copies[4].cut, copies[4].sequence), (Some(Tap::Port(5)), true, Some(9)));
    assert_eq!((copies[5].direction, copies[5].time), (Some(Direction::Egress), None));
    assert_eq!((copies[6].tap, copies[6].time), (Some(Tap::Interface(3)), Some(3_000_000_001)));
    let told = &copies[11];
    assert_eq!((told.tap, told.direction), (Some(Tap::Interface(3)), Some(Direction::Egress)));
    assert_eq!((told.time, told.sequence), (Some((1 << 32) + 2), Some(9)));
    assert_eq!((told.wire, told.cut, told.counts_tap), (Some(1500), true, true));
}

#[test]
fn each_fault_has_its_reason() {
    let faulty: [(&str, &[u8], Fault); 14] = [
        ("gre", &[0, 0, 0x65], Fault::Short),
        ("gre", &[0x40, 0, 0x65, 0x58], Fault::Gre),
        ("gre", &[0, 1, 0x65, 0x58], Fault::Gre),
        ("gre", &[0x80, 0, 0x65, 0x58, 1, 2, 0, 0, 1], Fault::Checksum),
        ("gre", &[0, 0, 8, 0], Fault::Protocol),
        ("gre", &[0x20, 0, 0x65, 0x58, 0], Fault::Short),
        ("gre", &[0x10, 0, 0x88, 0xbe, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0], Fault::Erspan),
        ("gre", &[0, 0, 0x65, 0x58, 1, 2, 3], Fault::Frame),
        ("vxlan", &[0, 0, 0, 0, 0, 0, 7, 0], Fault::Vxlan),
        ("gpe", &[0x0c, 0, 0, 1, 0, 0, 7, 0], Fault::Protocol),
        ("geneve", &[0x40, 0, 0x65, 0x58, 0, 0, 7, 0], Fault::Geneve),
        ("geneve", &[1, 0, 0x65, 0x58, 0, 0, 7, 0], Fault::Geneve),
        ("geneve", &[1, 0x40, 0x65, 0x58, 0, 0, 7, 0, 1, 2, 0x80, 0], Fault::Critical),
        ("geneve", &[0, 0, 8, 0, 0, 0, 7, 0], Fault::Protocol),
    ];
    for (how, bytes, fault) in faulty {
        assert_eq!(read(how, bytes), Err(fault), "{how} {bytes:02x?}");
    }
    assert_eq!(behind_ipv4(&[0x46; 20]), Err(Fault::Ip));
    assert_eq!(behind_ipv4(&[0x45; 24]), Ok(&[0x45; 4][..]));
    assert_eq!(behind_udp(&[0, 1, 0, 2, 0, 9, 0, 0, 5, 6]), Ok(&[5][..]));
    assert_eq!(behind_udp(&[0, 1, 0, 2, 0, 11, 0, 0, 5, 6]), Err(Fault::Short));
}

/// `SNIFCTL_FUZZ` says how many; `make soak` takes ten million.
#[test]
fn no_bytes_whatever_are_fatal() {
    let count: u64 = std::env::var("SNIFCTL_FUZZ").map_or(500_000, |count| count.parse().unwrap());
    let seed = std::env::var("SNIFCTL_FUZZ_SEED").map_or(1, |seed| seed.parse().unwrap());
    let (mut random, samples) = (Random(seed), samples());
    let (mut read_well, mut faults) = (0, [0_u64; Fault::Frame as usize + 1]);
    let mut bytes = Vec::new();
    for _ in 0..count {
        let (how, sample) = &samples[random.below(samples.len())];
        bytes.clear();
        bytes.extend(sample);
        for _ in 0..random.below(4) {
            let (at, value) = (random.below(bytes.len()), random.next() as u8);
            bytes[at] = value;
        }
        bytes.truncate(random.below(2 * bytes.len()));
        let [in_ip, in_udp] = [behind_ipv4(&bytes), behind_udp(&bytes)];
        let whole = bytes.as_slice();
        for (packet, result) in [
            (whole, read(how, whole)),
            (whole, in_ip.and_then(gre)),
            (in_udp.unwrap_or_default(), in_udp.and_then(geneve)),
        ] {
            match result {
                Ok(copy) => {
                    assert!(copy.frame.len() >= 14 && packet.ends_with(copy.frame), "{how} {bytes:02x?}: {copy:02x?}");
                    read_well += 1;
                }
                Err(fault) => faults[fault as usize] += 1,
            }
        }
    }
    assert!(read_well > count / 100, "{read_well}");
    assert!(faults.iter().all(|n| *n > 0), "{faults:?}");
}
