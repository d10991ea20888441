//! Each rule, and the one line that it refuses with.

use super::*;

fn request() -> Request {
    Request {
        name: "default".into(),
        interfaces: vec!["eth0".into()],
        direction: Watch::Both,
        filter: None,
        sample: None,
        sample_flows: None,
        snaplen: None,
        max_rate: None,
        tunnel: TunnelOptions {
            kind: Tunnel::Gre,
            id: None,
            egress_id: None,
            port: None,
            sequence: false,
            udp_checksum: false,
        },
        remotes: vec!["10.0.0.7".into()],
        spread: Spread::Replicate,
        sources: vec![],
        carriers: vec![],
        oversize: Oversize::Segment,
        outer: OuterOptions { ttl: 64, tos: 0, df: false },
    }
}

/// The one line that the request is refused with.
fn refusal(change: impl FnOnce(&mut Request)) -> String {
    let mut request = request();
    change(&mut request);
    let text = plan(request).unwrap_err().to_string();
    assert!(!text.contains('\n'), "{text}");
    text
}

#[test]
fn a_good_request_is_kept_as_it_is() {
    let plan = plan(request()).unwrap();
    assert_eq!(plan.remotes, [IpAddr::from([10, 0, 0, 7])]);
    let again: Plan = serde_json::from_str(&serde_json::to_string(&plan).unwrap()).unwrap();
    assert_eq!(plan, again);
}

#[test]
fn each_bad_value_is_named_with_what_would_work() {
    for name in ["", "A", "sixteen-letters-", "a_b", "-a", "a/b"] {
        assert!(refusal(|r| r.name = name.into()).contains("--name"), "{name:?}");
    }
    for remote in ["", "collector", "10.0.0", "224.0.0.1", "255.255.255.255", "0.0.0.0", "127.0.0.1"] {
        let text = refusal(|r| r.remotes = vec![remote.into()]);
        assert!(text.contains("--remote") && text.ends_with("10.0.0.7"), "{text}");
    }
    for remote in ["fe80::1", "fe80::1%eth0", "ff02::1", "::1", "::", "::ffff:10.0.0.7"] {
        let text = refusal(|r| r.remotes = vec![remote.into()]);
        assert!(text.contains("--remote") && text.ends_with("2001:db8::7"), "{text}");
    }
    assert!(refusal(|r| r.sources = vec!["x".into()]).contains("--source"));
    assert!(refusal(|r| r.carriers = vec!["x".into()]).contains("--carrier"));
}

#[test]
fn interface_names_cannot_reach_the_tools_as_anything_else() {
    for name in ["", "a b", "a'b", "a\"b", "a#b", "a\nb", "sixteen-letters-", "../x"] {
        assert!(refusal(|r| r.interfaces = vec![name.into()]).starts_with("IFACE"), "{name:?}");
    }
    assert!(refusal(|r| r.interfaces = vec!["eth0".into(), "eth0".into()]).contains("named twice"));
    let many = (0..1025).map(|i| format!("v{i}")).collect();
    assert!(refusal(|r| r.interfaces = many).contains("2050 taps"));
}

#[test]
fn remotes_are_distinct_and_at_most_64() {
    assert!(refusal(|r| r.remotes = vec!["10.0.0.7".into(), "10.0.0.7".into()]).contains("named twice"));
    let many = (1..=65).map(|i| format!("10.0.0.{i}")).collect();
    assert!(refusal(|r| r.remotes = many).contains("65 times"));
    let mixed = vec!["10.0.0.7".into(), "2001:db8::7".into()];
    assert_eq!(plan(Request { remotes: mixed, ..request() }).unwrap().remotes.len(), 2);
}

#[test]
fn one_source_of_each_family_at_most() {
    assert!(refusal(|r| r.sources = vec!["10.0.0.1".into(), "10.0.0.2".into()]).contains("--source"));
    assert!(refusal(|r| r.sources = vec!["2001:db8::1".into()]).contains("another address family"));
    assert!(refusal(|r| r.sources = vec!["127.0.0.1".into()]).contains("--source 127.0.0.1"));
    let both = vec!["10.0.0.1".into(), "2001:db8::1".into()];
    let remotes = vec!["10.0.0.7".into(), "2001:db8::7".into()];
    assert_eq!(plan(Request { sources: both, remotes, ..request() }).unwrap().sources.len(), 2);
}

#[test]
fn an_id_out_of_range_is_refused_with_the_range() {
    for (kind, largest) in
        [(Tunnel::Vxlan, 0xff_ffff), (Tunnel::Geneve, 0xff_ffff), (Tunnel::Erspan2, 1023), (Tunnel::Erspan3, 1023)]
    {
        let with = |id| move |r: &mut Request| (r.tunnel.kind, r.tunnel.id) = (kind, Some(id));
        assert!(refusal(with(largest + 1)).ends_with(&format!("0 to {largest}")));
        let mut good = request();
        with(largest)(&mut good);
        assert!(plan(good).is_ok());
    }
    let text = refusal(|r| (r.tunnel.kind, r.tunnel.egress_id) = (Tunnel::Erspan2, Some(1024)));
    assert!(text.starts_with("--egress-id 1024"), "{text}");
}

#[test]
fn an_option_that_the_type_lacks_is_refused_with_the_types_that_have_it() {
    assert!(refusal(|r| (r.tunnel.kind, r.tunnel.id) = (Tunnel::Erspan1, Some(1))).contains("types that do: gre"));
    assert!(
        refusal(|r| (r.tunnel.kind, r.tunnel.sequence) = (Tunnel::Vxlan, true)).ends_with("--tunnel gre --sequence")
    );
    assert!(refusal(|r| r.tunnel.port = Some(1)).ends_with("vxlan, geneve"));
    assert!(refusal(|r| r.tunnel.udp_checksum = true).ends_with("vxlan, geneve"));
    assert!(refusal(|r| r.tunnel.egress_id = Some(1)).contains("--id 1 --egress-id 2"));
    assert!(refusal(|r| (r.tunnel.kind, r.tunnel.port) = (Tunnel::Vxlan, Some(0))).starts_with("--port 0"));
}

#[test]
fn df_excludes_fragments() {
    let text = refusal(|r| {
        r.outer.df = true;
        r.oversize = Oversize::Fragment;
    });
    assert!(text.contains("--oversize truncate"));
}

#[test]
fn carriers_are_addresses_with_or_without_a_port() {
    let texts = ["203.0.113.5", "203.0.113.5:51820", "[2001:db8::5]:51820"].map(String::from);
    let ports: Vec<u16> = carriers(&texts).unwrap().unwrap().iter().map(|carrier| carrier.port).collect();
    assert_eq!(ports, [0, 51820, 51820]);
    assert_eq!(carriers(&["none".into()]).unwrap(), Some(vec![]));
    assert_eq!(carriers(&[]).unwrap(), None);
}

#[test]
fn what_a_request_never_does_is_left_out_and_nothing_else() {
    let unused = |change: &dyn Fn(&mut Request)| {
        let mut request = request();
        change(&mut request);
        plan(request).unwrap().unused()
    };
    let all = unused(&|_| ());
    let known = include_str!("../bpf/common.h").lines().filter_map(|line| line.strip_prefix("#ifndef HAS_"));
    assert_eq!(all, known.collect::<Vec<_>>());
    type Change = dyn Fn(&mut Request);
    let cases: [(&Change, &[&str]); 13] = [
        (&|request| request.tunnel.kind = Tunnel::Vxlan, &["UDP"]),
        (&|request| request.tunnel.kind = Tunnel::Geneve, &["UDP"]),
        (&|request| request.tunnel.sequence = true, &["SEQUENCE"]),
        (&|request| request.tunnel.kind = Tunnel::Erspan1, &[]),
        (&|request| request.tunnel.kind = Tunnel::Erspan2, &["SEQUENCE", "ERSPAN"]),
        (&|request| request.tunnel.kind = Tunnel::Erspan3, &["SEQUENCE", "ERSPAN"]),
        (&|request| request.snaplen = Some(100), &["CUT"]),
        (&|request| request.oversize = Oversize::Truncate, &["CUT"]),
        (&|request| request.oversize = Oversize::Fragment, &[]),
        (&|request| request.max_rate = Some("1mbit".into()), &["RATE"]),
        (&|request| request.sample = Some("1/2".into()), &["SAMPLE"]),
        (&|request| request.sample_flows = Some("1/2".into()), &["SAMPLE"]),
        (&|request| request.spread = Spread::Flow, &["SPREAD"]),
    ];
    for (change, used) in cases {
        let left: Vec<&str> = all.iter().copied().filter(|name| !used.contains(name)).collect();
        assert_eq!(unused(change), left);
    }
}
