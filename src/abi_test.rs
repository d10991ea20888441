//! Round trips, and the layouts against the BTF of the compiled object.

use std::collections::HashMap;
use std::process::Command;

use serde_json::Value;

use super::*;

#[test]
fn what_is_encoded_is_decoded() {
    let config = Config {
        relay: 7,
        peer: 8,
        oversize: 2,
        protocol: 47,
        port: 4789,
    };
    assert_eq!(Config::decode(&config.encode()).unwrap(), config);
    let key = TapKey {
        ifindex: 3,
        direction: Direction::Egress,
    };
    assert_eq!(TapKey::decode(&key.encode()).unwrap(), key);
    let tap = Tap {
        slot: 9,
        stat: Stat {
            pcnt: 1,
            bcnt: 2,
            dcnt: 3,
        },
    };
    assert_eq!(Tap::decode(&tap.encode()).unwrap(), tap);
    let remote = Remote {
        room_flags: 0x0e00_0000_0000_000a,
        ifindex: 4,
        mtu: 1500,
        sum: 0x12345,
        flags: remote_flag::DF,
        link_len: 14,
        outer_len: 38,
        header: std::array::from_fn(|i| i as u8),
    };
    assert_eq!(Remote::decode(&remote.encode()).unwrap(), remote);
    assert_eq!(remote.outer().len(), 38);
    assert_eq!(remote.outer()[0], 2);
}

#[test]
fn a_request_survives_its_chunks() {
    for len in [
        0,
        1,
        REQUEST_BYTES - 1,
        REQUEST_BYTES,
        REQUEST_BYTES + 1,
        5 * REQUEST_BYTES,
    ] {
        let text = "x".repeat(len);
        assert_eq!(decode_request(&encode_request(&text).unwrap()).unwrap(), text);
    }
    assert!(encode_request(&"x".repeat(REQUEST_BYTES * REQUEST_CHUNKS + 1)).is_err());
}

#[test]
fn a_value_of_another_length_is_refused() {
    assert!(
        Config::decode(&[0; 11])
            .unwrap_err()
            .to_string()
            .contains("another version")
    );
    assert!(Stat::decode(&[0; 25]).is_err());
}

/// Field offsets in bytes, and the size under the name "", of every struct in the object's BTF.
fn btf_structs(object: &std::path::Path) -> HashMap<String, HashMap<String, u64>> {
    let bpftool = crate::exec::find("bpftool").expect("bpftool");
    let output = Command::new(bpftool)
        .args(["-j", "btf", "dump", "file"])
        .arg(object)
        .output()
        .unwrap();
    let dump: Value = serde_json::from_slice(&output.stdout).unwrap();
    let structs = dump["types"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|kind| kind["kind"] == "STRUCT");
    structs
        .map(|kind| {
            let members = kind["members"].as_array().unwrap().iter();
            let mut fields: HashMap<String, u64> = members
                .map(|m| {
                    (
                        m["name"].as_str().unwrap().to_string(),
                        m["bits_offset"].as_u64().unwrap() / 8,
                    )
                })
                .collect();
            fields.insert(String::new(), kind["size"].as_u64().unwrap());
            (kind["name"].as_str().unwrap().to_string(), fields)
        })
        .collect()
}

#[test]
fn the_layouts_are_those_of_the_compiled_object() {
    let object = crate::clang::object(&crate::exec::Shell::default()).unwrap();
    let structs = btf_structs(&object);
    let expect = |name: &str, fields: &[(&str, u64)]| {
        let expected: HashMap<String, u64> = fields.iter().map(|(name, at)| (name.to_string(), *at)).collect();
        assert_eq!(structs[name], expected, "struct {name}");
    };
    let config = [
        ("relay", 0),
        ("peer", 4),
        ("oversize", 8),
        ("protocol", 9),
        ("port", 10),
        ("", 12),
    ];
    expect("config", &config);
    expect("request", &[("json", 0), ("", REQUEST_BYTES as u64)]);
    expect("tap_key", &[("ifindex", 0), ("direction", 4), ("", 8)]);
    expect("stat", &[("pcnt", 0), ("bcnt", 8), ("dcnt", 16), ("", 24)]);
    expect("tap", &[("slot", 0), ("unused", 4), ("stat", 8), ("", 32)]);
    let remote = [
        ("room_flags", 0),
        ("ifindex", 8),
        ("mtu", 12),
        ("sum", 16),
        ("flags", 20),
        ("link_len", 22),
        ("outer_len", 23),
        ("header", 24),
        ("", 24 + HEADER_BYTES as u64),
    ];
    expect("remote", &remote);
    expect("tunnel_key", &[("source", 0), ("remote", 16), ("", 32)]);
}
