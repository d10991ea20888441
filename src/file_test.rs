//! From files to requests and back, and each mistake with its file, line and key.

use super::*;
use crate::request::tests::{Dice, parsed, random_words};

fn text(name: &str, text: &str) -> Text {
    Text { name: name.into(), text: text.into() }
}

fn requests(toml: &str) -> Vec<Request> {
    let entries = parse(&[text("a.toml", toml)]).unwrap_or_else(|err| panic!("{err}\n{toml}"));
    entries.into_iter().map(|entry| entry.request).collect()
}

/// The lines that a file is refused with.
fn mistakes(toml: &str) -> Vec<String> {
    let Err(Mistakes(lines)) = parse(&[text("a.toml", toml)]) else { panic!("accepted:\n{toml}") };
    assert!(lines.iter().all(|line| !line.contains('\n')), "{lines:#?}");
    lines
}

const WEB: &str = "[[session]]\nname = \"web\"\ninterfaces = [\"eth0\"]\ntunnel = \"gre\"\nremote = \"10.0.0.7\"\n";

/// Panics unless the session with these lines more is refused with exactly these lines.
#[track_caller]
fn assert_mistakes(more: &str, lines: &[&str]) {
    assert_eq!(mistakes(&format!("{WEB}{more}")), lines, "{more}");
}

#[test]
fn a_file_says_all_that_the_command_line_does() {
    let found = requests(
        "# two sessions\n[[session]]\nname = \"web\"\ninterfaces = [\"eth0:ingress\", \"eth1\"]\ndirection = \"egress\"\n\
         tunnel = \"vxlan\"\nremote = [\"10.0.0.7\", \"2001:db8::7\"]\nid = 0x10\negress-id = \"0x11\"\nport = 4_790\n\
         udp-checksum = true\ndf = false\nfilter = '''tcp port 443\n and not host 10.0.0.1'''\nmax-rate = \"200mbit\"\n\
         sample = \"1/2\"\nsource = [\"10.0.0.1\", \"2001:db8::1\"]\nunderlay = \"none\"\nttl = 3\n\n\
         [[session]]\ninterfaces = \"eth2\"\ntunnel = \"gre\"\nremote = \"10.0.0.7\"\nsequence = true\n\
         [[session]]\nname = \"tells\"\ninterfaces = \"eth2\"\ntunnel = \"geneve\"\nremote = \"10.0.0.7\"\ntell = true\n",
    );
    let words = "eth0:ingress eth1:egress --tunnel vxlan --remote 10.0.0.7,2001:db8::7 --id 16 --egress-id 17 --port 4790 \
                 --udp-checksum --max-rate 200mbit --sample 1/2 --source 10.0.0.1,2001:db8::1 --underlay none --ttl 3 --name \
                 web --filter";
    let words: Vec<&str> = words.split_whitespace().chain(["tcp port 443\n and not host 10.0.0.1"]).collect();
    let other = "eth2 --tunnel gre --remote 10.0.0.7 --sequence".split(' ').collect::<Vec<_>>();
    let tells = "eth2 --tunnel geneve --remote 10.0.0.7 --tell --name tells".split(' ').collect::<Vec<_>>();
    assert_eq!(found, [words, other, tells].map(|words| parsed(&words).unwrap()));
    let kept = parse(&[text("a.toml", &format!("{WEB}keep-clsact = true"))]).unwrap();
    assert!(kept[0].keeps_clsact);
    assert!(requests("").is_empty() && requests("# nothing\n").is_empty());
}

#[test]
fn each_mistake_is_told_with_file_line_key_and_what_would_work() {
    for (more, line) in [
        ("ttl = 0", "a.toml:6: ttl: 0 is out of range; it takes 1 to 255, as in: ttl = 64"),
        ("tos = 'x'", "a.toml:6: tos: \"x\" is not a number from 0 to 255; try: tos = 0x10"),
        ("snaplen = -1", "a.toml:6: snaplen: \"-1\" is not a number from 60 to 15000; try: snaplen = 128"),
        (
            "max-rate = 'fast'",
            "a.toml:6: max-rate: \"fast\" is not a rate in tc's units (bit, kbit, mbit, gbit, bps, kbps, \
             ... or pps, kpps, mpps); try: max-rate = \"200mbit\"",
        ),
        ("sample = '2'", "a.toml:6: sample: \"2\" is not 1/N with N from 1 to 4294967295; try: sample = \"1/100\""),
        ("spread = 'flaw'", "a.toml:6: spread: \"flaw\" is not one of replicate, flow; try: spread = \"flow\""),
        (
            "sequence = 'yes'",
            "a.toml:6: sequence: takes true or false, not a value of type string; try: sequence = true",
        ),
        ("ttl = [1]", "a.toml:6: ttl: takes a number, not a value of type array; try: ttl = 64"),
        ("filter = true", "a.toml:6: filter: takes text, not a value of type boolean; try: filter = \"tcp port 443\""),
        (
            "source = [\n1]",
            "a.toml:6: source: takes texts in its list, not a value of type integer; try: source = \
             [\"10.0.0.1\"]",
        ),
        ("source = [\n '10.0.0.1',\n 'x']", "a.toml:8: source: \"x\" is not an IP address; try: source = \"10.0.0.7\""),
        (
            "df = true\noversize = 'fragment'",
            "a.toml:6: df: forbids the outer fragments that oversize fragment makes; try: df \
             = true, oversize = \"truncate\"",
        ),
        (
            "egress-id = 2",
            "a.toml:6: egress-id: needs a key for the other direction too with tunnel gre; try: id = 1, \
             egress-id = 2",
        ),
        (
            "port = 1",
            "a.toml:6: port: does not go with tunnel gre, which has no UDP header; types that do: vxlan, geneve",
        ),
        (
            "source = '2001:db8::1'",
            "a.toml:6: source: 2001:db8::1 is an IPv6 address and no remote is one; leave it out, or \
             name an address of this machine of the remotes' family: ip address",
        ),
        ("filtr = 'tcp'", "a.toml:6: filtr: is not a key of a session; try: filter = \"tcp port 443\""),
        ("max_rate = 1", "a.toml:6: max_rate: is not a key of a session; try: max-rate = \"200mbit\""),
        ("remotes = []", "a.toml:6: remotes: is not a key of a session; try: remote = [\"10.0.0.7\"]"),
        (
            "replace = true",
            "a.toml:6: replace: is not a key of a session; these are: interfaces, pods, tunnel, id, egress-id, port, \
             sequence, udp-checksum, tell, remote, spread, probe, filter, sample, sample-flows, snaplen, max-rate, oversize, \
             source, underlay, ttl, tos, df, profile, kubeconfig, context, node, max-taps, name, direction, keep-clsact",
        ),
        (
            "pods = 7",
            "a.toml:6: pods: is no list of tables; try: [[session.pods]] with namespace = \"shop\" and selector = \
             \"app=web\"",
        ),
    ] {
        assert_mistakes(more, &[line]);
    }
    let web = |from: &str, to: &str| mistakes(&WEB.replace(from, to));
    assert_eq!(
        web("\"eth0\"", "\"eth0\",\n\"eth0\""),
        ["a.toml:3: interfaces: eth0 is named twice; name each interface once"]
    );
    assert_eq!(
        web("\"eth0\"", "\"eth0\",\n\"eth1:up\""),
        ["a.toml:4: interfaces: \"eth1:up\": \"up\" is no direction; try: eth1:ingress or eth1:egress"]
    );
    assert_eq!(
        web("[\"eth0\"]", "[]"),
        ["a.toml:1: interfaces: is missing in this session; try: interfaces = [\"eth0:ingress\", \"eth1\"]"]
    );
    assert_eq!(
        web("\"web\"", "\"Web\""),
        [
            "a.toml:2: name: \"Web\" is not 1 to 15 characters of a-z, 0-9 and '-' with no '-' first; try: name = \"mirror-1\""
        ]
    );
    assert_eq!(
        web("\"10.0.0.7\"", "['10.0.0.7', '127.0.0.1']"),
        [
            "a.toml:5: remote: 127.0.0.1 is this machine itself; name the collector's own address, as in: remote = \"10.0.0.7\""
        ]
    );
}

#[test]
fn all_mistakes_of_all_files_are_told_at_once() {
    assert_mistakes(
        "ttl = 0\nsnaplen = 1\ndirektion = 1\n[[session]]\ntunnel = 'grey'\n",
        &[
            "a.toml:6: ttl: 0 is out of range; it takes 1 to 255, as in: ttl = 64",
            "a.toml:7: snaplen: 1 is out of range; it takes 60 to 15000, as in: snaplen = 128",
            "a.toml:8: direktion: is not a key of a session; try: direction = \"both\"",
            "a.toml:9: interfaces: is missing in this session; try: interfaces = [\"eth0:ingress\", \"eth1\"]",
            "a.toml:9: remote: is missing in this session; try: remote = [\"10.0.0.7\"]",
            "a.toml:10: tunnel: \"grey\" is not one of gre, vxlan, geneve, erspan1, erspan2, erspan3; try: tunnel = \"gre\"",
        ],
    );
    let twice = parse(&[text("a.toml", WEB), text("b.toml", &format!("\n{WEB}{WEB}"))]).expect_err("refused");
    assert_eq!(
        twice.0,
        [
            "b.toml:3: name: web is also the session at a.toml:1; try: name = \"other\"",
            "b.toml:8: name: web is also the session at a.toml:1; try: name = \"other\"",
        ]
    );
    assert_eq!(
        mistakes("x = 1\nttl = 3\n[session]\n"),
        [
            "a.toml:1: x: is not a key here; a session begins with: [[session]]",
            "a.toml:2: ttl: is in no session; put it below a line: [[session]]",
            "a.toml:3: session: is no list of tables; try: [[session]]",
        ]
    );
    for form in ["filter = tcp", "name = \"other\"", "remote = [\"10.0.0.7\"", "filter = \"x", "= 1"] {
        let lines = mistakes(&format!("{WEB}{form}\n"));
        assert!(lines[0].starts_with("a.toml:6: ") && lines[0].ends_with(SYNTAX), "{form}: {lines:?}");
    }
}

#[test]
fn a_request_comes_back_from_the_file_that_shows_it() {
    let mut dice = Dice(0x1234_5678_9abc_def1);
    for _ in 0..500 {
        let words = random_words(&mut dice);
        let wanted = parsed(&words.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
        let shown = shown(&wanted);
        let found = requests(&shown);
        assert_eq!((found.len(), &found[0]), (1, &wanted), "{shown}");
        assert_eq!(difference(&wanted, &found[0]), [""; 0]);
    }
    let odd = "host 10.0.0.1 or \"a\\b\" \t\u{7f}é";
    let wanted = parsed(&["eth0", "--tunnel", "gre", "--remote", "10.0.0.7", "--filter", odd]).unwrap();
    assert_eq!(requests(&shown(&wanted)), [wanted]);
    let plain =
        parsed(&["eth0:ingress", "--tunnel", "gre", "--remote", "10.0.0.7", "--ttl", "64", "--id", "7"]).unwrap();
    assert_eq!(
        shown(&plain),
        "[[session]]\nname = \"default\"\ninterfaces = [\"eth0:ingress\"]\ntunnel = \"gre\"\nremote = [\"10.0.0.7\"]\nid = 7\n"
    );
}

#[test]
fn a_difference_is_told_by_taps_remotes_and_keys() {
    let of = |words: &str| parsed(&words.split('|').collect::<Vec<_>>()).unwrap();
    let own = of("eth0|eth1:ingress|--tunnel|gre|--remote|10.0.0.7,10.0.0.8|--filter|tcp");
    let other =
        of("eth1|eth2:ingress|eth0:egress|--tunnel|gre|--remote|10.0.0.9,10.0.0.7|--filter|tcp port 443|--ttl|3");
    assert_eq!(
        difference(&own, &other),
        [
            "filter 'tcp' → 'tcp port 443'",
            "ttl 64 → 3",
            "+ tap eth1 egress",
            "+ tap eth2 ingress",
            "- tap eth0 ingress",
            "+ remote 10.0.0.9",
            "- remote 10.0.0.8",
        ]
    );
    assert_eq!(words(&own), "eth0 eth1:ingress --tunnel gre --remote 10.0.0.7 --remote 10.0.0.8 --filter tcp");
}

#[test]
fn the_file_of_the_manual_is_taken() {
    let page = include_str!("../docs/apply.md").lines();
    let block = page
        .skip_while(|line| !line.starts_with("    [[session]]"))
        .take_while(|line| line.is_empty() || line.starts_with("    "));
    let found = requests(&block.map(|line| format!("{}\n", line.trim_start())).collect::<String>());
    assert_eq!(found.iter().map(|request| request.name.as_str()).collect::<Vec<_>>(), ["web", "db"]);
}

#[test]
fn pods_are_interfaces_of_their_own() {
    let text = "[[session]]\ntunnel = 'gre'\nremote = '10.0.0.7'\n[[session.pods]]\nnamespace = 'shop'\nselector = 'app=web'\n\
         [[session.pods]]\nnamespace = '*'\ninterfaces = ['eth0:egress']\nannotations = { mirror = 'yes', 'x.io/y' = '1' }\n";
    let entries = parse(&[Text { name: "a.toml".into(), text: text.into() }]).unwrap();
    let names: Vec<String> = entries[0].request.interfaces.iter().map(Watched::to_string).collect();
    assert_eq!(names, ["pods:shop/app=web/*", "pods:*/;mirror=yes,x.io/y=1/eth0:egress"]);
    let wrong = |from: &str, to: &str| {
        let text = Text { name: "a.toml".into(), text: text.replace(from, to) };
        parse(&[text]).unwrap_err().0
    };
    assert!(wrong("'shop'", "'Shop'")[0].starts_with("a.toml:4: pods: "), "{:?}", wrong("'shop'", "'Shop'"));
    assert!(wrong("selector = 'app=web'", "select = 'x'")[0].starts_with("a.toml:4: pods: select: is no key of it"));
}
