//! Features of devices, through ethtool's JSON.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::tools::exec::{Cmd, Runner};
use crate::tools::json;

/// Which features of a device are on, by ethtool's names.
pub(crate) fn features(runner: &Runner, dev: &str) -> Result<BTreeMap<String, bool>> {
    parse(&runner.read(&Cmd::new("ethtool", ["--json", "-k", dev]))?)
}

#[derive(Deserialize)]
struct Feature {
    active: bool,
}

/// What is no feature in the answer, as the interface's name, is left out.
fn parse(text: &str) -> Result<BTreeMap<String, bool>> {
    let devices: Vec<Map<String, Value>> = json::members(text, "ethtool")?;
    let is_on = |value| serde_json::from_value(value).map(|feature: Feature| feature.active).ok();
    let features: BTreeMap<String, bool> =
        devices.into_iter().flatten().filter_map(|(name, value)| Some((name, is_on(value)?))).collect();
    ensure!(!features.is_empty(), json::unexpected("ethtool"));
    Ok(features)
}

#[cfg(test)]
mod tests {
    use super::*;

    macro_rules! fixture {
        ($path:literal) => {
            include_str!(concat!("../../tests/fixtures/ethtool-", $path))
        };
    }

    #[test]
    fn every_version_with_json_tells_what_is_on() {
        for (version, text) in [
            ("6.1", fixture!("6.1/quote.json")),
            ("6.14", fixture!("6.14/quote.json")),
            ("7.2", fixture!("7.2/quote.json")),
            ("7.2", fixture!("7.2/features.json")),
        ] {
            let features = parse(text).unwrap();
            assert_eq!(features.get("tx-checksumming"), Some(&true), "{version}");
            assert!(features.contains_key("rx-checksumming"), "{version}");
            assert_eq!(features.get("ifname"), None, "{version}");
        }
    }

    #[test]
    fn a_version_without_json_is_told() {
        let err = parse(fixture!("5.9/features.txt")).unwrap_err();
        assert_eq!(err.to_string(), json::unexpected("ethtool"));
    }
}
