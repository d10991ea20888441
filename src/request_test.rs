//! Each rule, the one line that it refuses with, and the way from the command line to a request and back.

use clap::Parser;

use super::*;
use crate::cli::{Cli, Command};
use crate::datapath::source::FEATURES;
use crate::tunnel::Kind;

/// The request of `snifctl up` with these words, or the line that it is refused with.
pub(crate) fn parsed(words: &[&str]) -> Result<Request, String> {
    let all = ["snifctl", "up"].iter().chain(words);
    let cli = Cli::try_parse_from(all).map_err(|err| {
        let own = std::error::Error::source(&err).and_then(|source| source.downcast_ref::<Usage>());
        own.map_or_else(|| err.to_string(), ToString::to_string)
    })?;
    let Command::Up(args) = cli.command else { panic!("not up") };
    args.request().map_err(|err| err.to_string())
}

/// The same with a tunnel and a remote, where the words have none.
fn completed(words: &[&str]) -> Result<Request, String> {
    let mut all = words.to_vec();
    if !words.contains(&"--tunnel") {
        all.extend(["--tunnel", "gre"]);
    }
    if !words.contains(&"--remote") {
        all.extend(["--remote", "10.0.0.7"]);
    }
    parsed(&all)
}

pub(crate) fn request(words: &[&str]) -> Request {
    completed(words).unwrap_or_else(|err| panic!("{words:?}: {err}"))
}

/// The one line that these words are refused with.
fn refusal(words: &[&str]) -> String {
    let text = completed(words).expect_err("refused");
    assert!(!text.contains('\n'), "{text}");
    text
}

#[test]
fn each_bad_value_is_named_with_what_would_work() {
    for name in ["", "A", "sixteen-letters-", "a_b", "-a", "a/b"] {
        let text = refusal(&["eth0", &format!("--name={name}")]);
        assert!(text.contains("--name") && text.ends_with("try: --name mirror-1"), "{text}");
    }
    for remote in ["", "collector", "10.0.0", "224.0.0.1", "255.255.255.255", "0.0.0.0", "127.0.0.1"] {
        let text = refusal(&["eth0", "--remote", remote]);
        assert!(text.starts_with("--remote") && text.ends_with("--remote 10.0.0.7"), "{text}");
    }
    for remote in ["fe80::1", "fe80::1%eth0", "ff02::1", "::1", "::", "::ffff:10.0.0.7"] {
        let text = refusal(&["eth0", "--remote", remote]);
        assert!(text.starts_with("--remote") && text.ends_with("--remote 2001:db8::7"), "{text}");
    }
    for (words, ends) in [
        (["--source", "x"], "--source 10.0.0.7"),
        (["--underlay", "x"], "--underlay 203.0.113.5:51820"),
        (["--carrier", "x"], "--underlay 203.0.113.5:51820"),
        (["--max-rate", "-1"], "--max-rate 200mbit"),
        (["--max-rate", "1pub"], "--max-rate 200mbit"),
        (["--max-rate", "1000tbit"], "--max-rate 200mbit"),
        (["--sample", "2"], "--sample 1/100"),
        (["--sample-flows", "1/0"], "--sample-flows 1/100"),
        (["--snaplen", "59"], "--snaplen 128"),
        (["--snaplen", "many"], "--snaplen 128"),
        (["--port", "x"], "--port 4789"),
        (["--port", "65536"], "--port 4789"),
        (["--id", "0xg"], "--id 7"),
        (["--id", "+7"], "--id 7"),
        (["--ttl", "0"], "--ttl 64"),
        (["--tos", "256"], "--tos 0x10"),
        (["--filter", " "], "snifctl filter clear"),
    ] {
        let text = refusal(&["eth0", words[0], words[1]]);
        let flag = if words[0] == "--carrier" { "--underlay" } else { words[0] };
        assert!(text.starts_with(flag) && text.ends_with(ends), "{text}");
    }
}

#[test]
fn interface_names_cannot_reach_the_tools_as_anything_else() {
    for name in ["", "a b", "a#b", "a\nb", "sixteen-letters-", "../x", "."] {
        assert!(refusal(&[name]).starts_with("IFACE"), "{name:?}");
    }
    for pattern in ["eth *", "*#", &"*".repeat(64)] {
        assert!(refusal(&[pattern]).ends_with("try: 'eth*'"), "{pattern:?}");
    }
    assert!(refusal(&["eth0", "eth0"]).contains("named twice"));
    assert!(refusal(&["eth*:ingress", "eth*"]).contains("IFACE eth* is named twice"));
    assert!(refusal(&["eth*:up"]).ends_with("try: 'eth*:ingress' or 'eth*:egress'"));
    assert!(refusal(&["eth0:sideways"]).ends_with("eth0:ingress or eth0:egress"));
    let many: Vec<String> = (0..1025).map(|i| format!("v{i}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert!(refusal(&many).contains("1025 interfaces"));
}

#[test]
fn a_direction_beside_a_name_goes_before_the_common_one() {
    let found = request(&["eth0:egress", "eth1", "eth2:both", "--direction", "ingress"]);
    let shown: Vec<String> = found.interfaces.iter().map(Watched::to_string).collect();
    assert_eq!(shown, ["eth0:egress", "eth1:ingress", "eth2"]);
}

#[test]
fn remotes_are_distinct_and_at_most_64() {
    assert!(refusal(&["eth0", "--remote", "10.0.0.7,10.0.0.7"]).contains("named twice"));
    let many = (1..=65).map(|i| format!("10.0.0.{i}")).collect::<Vec<_>>().join(",");
    assert!(refusal(&["eth0", "--remote", &many]).contains("65 times"));
    assert_eq!(request(&["eth0", "--remote", "10.0.0.7,2001:db8::7"]).options.remotes.len(), 2);
}

#[test]
fn one_source_of_each_family_at_most() {
    assert!(refusal(&["eth0", "--source", "10.0.0.1,10.0.0.2"]).contains("--source"));
    let text = refusal(&["eth0", "--source", "2001:db8::1"]);
    assert!(text.contains("IPv6") && text.ends_with("ip address"), "{text}");
    assert!(refusal(&["eth0", "--source", "127.0.0.1"]).contains("--source 127.0.0.1"));
    let both = request(&["eth0", "--source", "10.0.0.1,2001:db8::1", "--remote", "10.0.0.7,2001:db8::7"]);
    assert_eq!(both.options.sources.len(), 2);
}

#[test]
fn an_id_out_of_range_is_refused_with_the_range() {
    for (kind, largest) in [("vxlan", 0xff_ffffu32), ("geneve", 0xff_ffff), ("erspan2", 1023), ("erspan3", 1023)] {
        let with = |id: u32| vec!["eth0".to_string(), "--tunnel".into(), kind.into(), "--id".into(), id.to_string()];
        let words = |all: &[String]| all.iter().map(|word| word.as_str().to_owned()).collect::<Vec<_>>();
        let too_large = words(&with(largest + 1));
        let too_large: Vec<&str> = too_large.iter().map(String::as_str).collect();
        assert!(refusal(&too_large).ends_with(&format!("0 to {largest}")));
        let fits = with(largest);
        request(&fits.iter().map(String::as_str).collect::<Vec<_>>());
    }
    let text = refusal(&["eth0", "--tunnel", "erspan2", "--egress-id", "1024"]);
    assert!(text.starts_with("--egress-id 1024"), "{text}");
    assert_eq!(request(&["eth0", "--id", "0x10", "--tos", "0X1f"]).options.tunnel.id, Some(16));
}

#[test]
fn an_option_that_the_type_lacks_is_refused_with_the_types_that_have_it() {
    assert!(refusal(&["eth0", "--tunnel", "erspan1", "--id", "1"]).contains("types that do: gre"));
    assert!(refusal(&["eth0", "--tunnel", "vxlan", "--sequence"]).ends_with("--tunnel gre --sequence"));
    assert!(refusal(&["eth0", "--port", "1"]).ends_with("vxlan, geneve"));
    assert!(refusal(&["eth0", "--udp-checksum"]).ends_with("vxlan, geneve"));
    assert_eq!(
        refusal(&["eth0", "--tunnel", "vxlan", "--tell"]),
        "--tell does not go with --tunnel vxlan, whose header has no options; try: --tunnel geneve --tell"
    );
    assert!(refusal(&["eth0", "--egress-id", "1"]).contains("--id 1 --egress-id 2"));
    assert!(refusal(&["eth0", "--tunnel", "vxlan", "--port", "0"]).starts_with("--port 0"));
}

#[test]
fn df_excludes_fragments() {
    assert!(refusal(&["eth0", "--df", "--oversize", "fragment"]).contains("--oversize truncate"));
}

#[test]
fn what_a_request_needs_of_the_programs_is_asked_for_and_nothing_else() {
    assert_eq!(request(&["eth0"]).features(), [""; 0]);
    let known = include_str!("../bpf/common.h").lines().filter_map(|line| line.strip_prefix("#ifndef HAS_"));
    assert_eq!(FEATURES.to_vec(), known.collect::<Vec<_>>());
    let cases: [(&[&str], &[&str]); 14] = [
        (&["--tunnel", "vxlan"], &["UDP"]),
        (&["--tunnel", "geneve"], &["UDP"]),
        (&["--tunnel", "geneve", "--tell"], &["UDP", "TELL"]),
        (&["--sequence"], &["SEQUENCE"]),
        (&["--tunnel", "erspan1"], &[]),
        (&["--tunnel", "erspan2"], &["SEQUENCE", "ERSPAN"]),
        (&["--tunnel", "erspan3"], &["SEQUENCE", "ERSPAN"]),
        (&["--snaplen", "100"], &["CUT"]),
        (&["--oversize", "truncate"], &["CUT"]),
        (&["--oversize", "fragment"], &[]),
        (&["--max-rate", "1mbit"], &["RATE"]),
        (&["--sample", "1/2"], &["SAMPLE"]),
        (&["--sample-flows", "1/2"], &["SAMPLE"]),
        (&["--spread", "flow"], &["SPREAD"]),
    ];
    for (words, needed) in cases {
        assert_eq!(request(&[&["eth0"], words].concat()).features(), needed, "{words:?}");
    }
}

#[test]
fn the_order_of_interfaces_and_remotes_says_nothing() {
    let one = request(&["eth0:ingress", "eth1", "--remote", "10.0.0.7,10.0.0.8"]);
    let other = request(&["eth1", "eth0:ingress", "--remote", "10.0.0.8", "--remote", "10.0.0.7"]);
    assert_eq!(one.differences(&other), [""; 0]);
    assert_eq!(one.differences(&request(&["eth0", "eth1", "--remote", "10.0.0.7,10.0.0.8"])).len(), 1);
}

#[test]
fn a_difference_is_told_in_flags() {
    let (plain, other) = (request(&["eth0"]), request(&["eth0", "--filter", "udp port 53", "--df", "--ttl", "3"]));
    assert_eq!(plain.differences(&other), ["--filter none → 'udp port 53'", "--ttl 64 → 3", "--df off → on"]);
    assert_eq!(other.differences(&plain)[0], "--filter 'udp port 53' → none");
    assert_eq!(plain.differences(&request(&["eth*:ingress"])), ["IFACE eth0 → 'eth*:ingress'"]);
    assert_eq!(request(&["eth*"]).command(), "snifctl up 'eth*' --tunnel gre --remote 10.0.0.7");
}

#[test]
fn a_line_stays_a_line_however_much_there_is() {
    assert_eq!(listed((1..=8).map(|n| n.to_string())), "1, 2, 3, 4, 5, 6, 7, 8");
    assert_eq!(listed((1..=200).map(|n| n.to_string())), "1, 2, 3, 4, 5, 6, 7 and 193 more");
}

/// Numbers that look random and are the same each time (xorshift, Marsaglia 2003).
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }

    fn one<'a, T: ?Sized>(&mut self, of: &[&'a T]) -> &'a T {
        of[self.roll(of.len() as u64) as usize]
    }
}

/// A command line of random options that go together.
pub(crate) fn random_words(dice: &mut Dice) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    for at in 0..=dice.roll(3) {
        let name =
            dice.one(&["if", "if", "if*", "cali[!a-c]?", "a name as long as no interface has one *"]).replace(' ', "_");
        words.push(format!("{name}{at}{}", dice.one(&["", ":ingress", ":egress", ":both"])));
    }
    let kind = *dice.one(&[&Kind::Gre, &Kind::Vxlan, &Kind::Geneve, &Kind::Erspan1, &Kind::Erspan2, &Kind::Erspan3]);
    let mut add = |flag: &str, value: String| words.extend([flag.to_string(), value]);
    add("--tunnel", spelled(kind));
    let remotes: Vec<String> = (0..=dice.roll(4)).map(|n| format!("10.0.{}.{}", dice.roll(256), n + 1)).collect();
    add("--remote", remotes.join(","));
    let has_id = kind != Kind::Erspan1 && dice.roll(2) == 0;
    if has_id {
        add("--id", dice.roll(1024).to_string());
        add("--egress-id", format!("{:#x}", dice.roll(1024)));
    }
    if matches!(kind, Kind::Vxlan | Kind::Geneve) {
        add("--port", (1 + dice.roll(65535)).to_string());
    }
    if kind == Kind::Geneve && dice.roll(2) == 0 {
        words.push("--tell".into());
    }
    let mut add = |flag: &str, value: String| words.extend([flag.to_string(), value]);
    add("--filter", dice.one(&["udp", "tcp port 443", "it's", "-x", "host 10.0.0.1 or 'y'"]).to_string());
    add("--sample", format!("1/{}", 1 + dice.roll(9)));
    add("--sample-flows", format!("1/{}", 1 + dice.roll(9)));
    add("--snaplen", (60 + dice.roll(1000)).to_string());
    let unit = dice.one(&["bit", "kbit", "mbit", "bps", "kibit", "pps", "kpps"]);
    add("--max-rate", format!("{}{unit}", 8000 + dice.roll(900_000)));
    add("--underlay", dice.one(&["none", "203.0.113.5", "203.0.113.5:51820", "[2001:db8::5]:4"]).to_string());
    add("--ttl", (1 + dice.roll(255)).to_string());
    add("--tos", dice.roll(256).to_string());
    add("--oversize", dice.one(&["segment", "truncate", "drop"]).to_string());
    add("--spread", dice.one(&["replicate", "flow"]).to_string());
    add("--name", dice.one(&["default", "a", "b-2"]).to_string());
    if dice.roll(2) == 0 {
        words.push("--df".into());
    }
    words
}

#[test]
fn a_request_comes_back_from_its_command_line_and_from_json() {
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    for _ in 0..500 {
        let words = random_words(&mut dice);
        let wanted = parsed(&words.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
        let args = wanted.args();
        let again = parsed(&args[1..].iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
        assert_eq!(wanted, again, "{}", wanted.command());
        let json = serde_json::to_string(&wanted).unwrap();
        assert_eq!(wanted, serde_json::from_str(&json).unwrap(), "{json}");
    }
}

#[test]
fn a_rate_comes_back_from_what_is_shown_of_it() {
    let mut dice = Dice(0x2545_f491_4f6c_dd1d);
    for _ in 0..2000 {
        let digits = 1 + dice.roll(10) as u32;
        let amount = 1000 + dice.roll(10u64.pow(digits));
        for rate in [Rate::Bytes(amount), Rate::Packets(amount)] {
            assert_eq!(rate.to_string().parse::<Rate>().unwrap(), rate, "{rate}");
        }
    }
    for (text, rate) in [
        ("200mbit", Rate::Bytes(25_000_000)),
        ("1kibit", Rate::Bytes(128)),
        ("2.5gbit", Rate::Bytes(312_500_000)),
        ("1MBPS", Rate::Bytes(1_000_000)),
        ("50kpps", Rate::Packets(50_000)),
        ("8000", Rate::Bytes(1000)),
    ] {
        let parsed = parse_rate(&text.to_ascii_lowercase());
        assert_eq!(parsed, Some(rate), "{text}");
    }
}
