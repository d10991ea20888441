//! Round trips, and the layouts against the BTF of the compiled object.

use std::collections::HashMap;
use std::process::Command;

use serde_json::Value;

use super::*;
use crate::datapath::source::{FEATURES, Source};
use crate::tools::exec::Runner;

#[test]
fn what_is_encoded_is_decoded() {
    let config = Config {
        remotes: 5,
        clock: 6,
        rate: 25_000_000,
        relay: 7,
        port: 12,
        peer: 8,
        sample: 9,
        sample_flows: 10,
        snaplen: 11,
        oversize: 2,
        protocol: 47,
        udp_port: 4789,
        spread: 1,
        underlay: true,
        request: 512,
        rate_packets: true,
        gre: 0x6558,
        keys: Some([13, 14]),
        profile: true,
        down: 4,
    };
    assert_eq!(Config::decode(&config.encode()).unwrap(), config);
    let key = TapKey { ifindex: 3, direction: Direction::Egress };
    assert_eq!(TapKey::decode(&key.encode()).unwrap(), key);
    let counts = TapCounts {
        stat: Stat { pcnt: 1, bcnt: 2, dcnt: 3 },
        choice: Choice { seen: 4, filtered: 5, skipped: 6, own: 7 },
    };
    let tap = Tap { slot: 9, relay: 7, counts };
    assert_eq!(Tap::decode(&tap.encode()).unwrap(), tap);
    let remote = Remote {
        room_flags: 0x0e00_0000_0000_000a,
        ifindex: 4,
        mtu: 1500,
        sum: 0x12345,
        udp_sum: [9, 10],
        flags: remote_flag::DF,
        outer_len: 38,
        ip_len: 20,
        at: Positions { udp: 1, sequence: 2, vlan: 3, port: 4, time: 5, seconds: 6 },
        tagged: 3,
        device: 129,
        headers: [0u8, 100].map(|first| Template(std::array::from_fn(|i| first + i as u8))),
    };
    assert_eq!(Remote::decode(&remote.encode()).unwrap(), remote);
    assert_eq!(remote.outer(Direction::Ingress).len(), 38);
    assert_eq!(remote.outer(Direction::Egress)[0], 102);
}

#[test]
fn a_request_survives_its_chunks() {
    for len in [0, 1, REQUEST_BYTES - 1, REQUEST_BYTES, REQUEST_BYTES + 1, 5 * REQUEST_BYTES] {
        let text = "x".repeat(len);
        assert_eq!(decode_request(&encode_request(&text).unwrap()).unwrap(), text);
    }
    assert!(encode_request(&"x".repeat(REQUEST_BYTES * REQUEST_CHUNKS)).is_err());
}

#[test]
fn a_value_that_is_too_short_is_refused_and_a_longer_one_read() {
    assert!(Config::decode(&[0; 11]).unwrap_err().to_string().contains("an older snifctl"));
    let config = Config { remotes: 3, keys: Some([1, 2]), ..Config::default() };
    let grown = [config.encode(), vec![7; 9]].concat();
    assert_eq!(Config::decode(&grown).unwrap(), config, "what a newer version has more is passed over");
    assert!(Stat::decode(&[0; 23]).is_err() && Stat::decode(&[0; 25]).is_ok());
}

/// Field offsets in bytes, and the size under the name "", of every struct in the object's BTF.
fn btf_structs(object: &std::path::Path) -> HashMap<String, HashMap<String, u64>> {
    let bpftool = crate::tools::exec::find("bpftool").expect("bpftool");
    let output = Command::new(bpftool).args(["-j", "btf", "dump", "file"]).arg(object).output().unwrap();
    let dump: Value = serde_json::from_slice(&output.stdout).unwrap();
    let structs = dump["types"].as_array().unwrap().iter().filter(|kind| kind["kind"] == "STRUCT");
    structs
        .map(|kind| {
            let members = kind["members"].as_array().unwrap().iter();
            let mut fields: HashMap<String, u64> = members
                .map(|m| (m["name"].as_str().unwrap().to_string(), m["bits_offset"].as_u64().unwrap() / 8))
                .collect();
            fields.insert(String::new(), kind["size"].as_u64().unwrap());
            (kind["name"].as_str().unwrap().to_string(), fields)
        })
        .collect()
}

#[test]
fn the_layouts_are_those_of_the_compiled_object() {
    let runner = Runner::default();
    let object =
        Source::datapath(None, &FEATURES.map(String::from)).begin(&runner).unwrap().object(&runner, &[]).unwrap();
    let structs = btf_structs(&object);
    let expect = |name: &str, fields: &[(&str, u64)]| {
        let expected: HashMap<String, u64> = fields.iter().map(|(name, at)| (name.to_string(), *at)).collect();
        assert_eq!(structs[name], expected, "struct {name}");
    };
    let config = [
        ("remotes", 0),
        ("clock", 8),
        ("rate", 16),
        ("relay", 24),
        ("port", 28),
        ("peer", 32),
        ("sample", 36),
        ("sample_flows", 40),
        ("snaplen", 44),
        ("oversize", 48),
        ("protocol", 49),
        ("udp_port", 50),
        ("spread", 52),
        ("underlay", 53),
        ("request", 54),
        ("rate_packets", 56),
        ("keyed", 57),
        ("gre", 58),
        ("key", 60),
        ("profile", 68),
        ("down", 72),
        ("", 80),
    ];
    expect("config", &config);
    expect("request", &[("json", 0), ("", REQUEST_BYTES as u64)]);
    expect("tap_key", &[("ifindex", 0), ("direction", 4), ("", 8)]);
    expect("stat", &[("pcnt", 0), ("bcnt", 8), ("dcnt", 16), ("", 24)]);
    expect("choice", &[("seen", 0), ("filtered", 8), ("skipped", 16), ("own", 24), ("", 32)]);
    expect("size", &[("frames", 0), ("bytes", 8), ("", 16)]);
    expect("time", &[("calls", 0), ("ns", 8), ("", 16)]);
    let forms = [
        ("supers", 0),
        ("segments", 8),
        ("vlan", 16),
        ("truncated", 24),
        ("fragmented", 32),
        ("fragments", 40),
        ("", Forms::BYTES as u64),
    ];
    expect("forms", &forms);
    expect("tap", &[("slot", 0), ("relay", 4), ("stat", 8), ("choice", 32), ("", 64)]);
    let remote = [
        ("room_flags", 0),
        ("ifindex", 8),
        ("mtu", 12),
        ("sum", 16),
        ("udp_sum", 20),
        ("flags", 28),
        ("outer_len", 30),
        ("ip_len", 31),
        ("udp_at", 32),
        ("sequence_at", 33),
        ("vlan_at", 34),
        ("port_at", 35),
        ("time_at", 36),
        ("seconds_at", 37),
        ("tagged", 38),
        ("device", 39),
        ("header", 40),
        ("", 40 + 2 * HEADER_BYTES as u64),
    ];
    expect("remote", &remote);
    expect("out", &[("device", 0), ("queue", 8), ("dropped", 16), ("", 24)]);
    expect("remote_state", &[("ip_id", 0), ("sequence", 4), ("lock", 8), ("unused", 12), ("", 16)]);
    expect("sequences", &[("next", 0), ("", 4 * MAX_REMOTES as u64)]);
    expect("underlay_key", &[("address", 0), ("port", 16), ("unused", 18), ("", 20)]);
    expect("spread_chunk", &[("slot", 0), ("", SPREAD_BYTES as u64)]);
    expect("tunnel_key", &[("source", 0), ("remote", 16), ("", 32)]);
}
