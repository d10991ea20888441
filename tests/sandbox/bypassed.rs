//! What would hold or encrypt the host's own packets to a collector does not see copies: `up` says so.

use crate::lab::{Lab, Ns};

const UP: [&str; 6] = ["up", "eth0", "--tunnel", "gre", "--remote", "198.51.100.2"];
const ENDS: &str = "end it with: snifctl remote remove 198.51.100.2\n";

#[track_caller]
fn assert_told(lab: &Lab, args: &[&str], what: Option<&str>) {
    let said = lab.said(args).ok();
    match what {
        Some(what) => assert!(said.stderr.contains(what) && said.stderr.ends_with(ENDS), "{said:#?}"),
        None => assert_eq!(said.stderr, ""),
    }
    lab.said(&["down"]).quietly_ok();
}

#[test]
fn an_ipsec_policy_that_selects_the_outer_packets_is_told() {
    let lab = Lab::roomy();
    let add = |selector: &str| {
        let line = format!(
            "ip xfrm policy add {selector} dir out tmpl src 198.51.100.1 dst 198.51.100.2 proto esp mode transport"
        );
        lab.try_host(&line.split(' ').collect::<Vec<_>>())
    };
    let added = add("src 198.51.100.1/32 dst 198.51.100.2/32 proto gre");
    assert!(added.status.success(), "this kernel has IPsec's policies: {added:?}");
    let policy = "the IPsec policy `src 198.51.100.1/32 dst 198.51.100.2/32 proto gre` would encrypt the host's own packets to \
                  198.51.100.2, but copies leave below it, as they are";
    assert_told(&lab, &UP, Some(policy));
    let vxlan = ["up", "eth0", "--tunnel", "vxlan", "--remote", "198.51.100.2"];
    assert_told(&lab, &vxlan, None);
    lab.said(&["up", "eth0", "--tunnel", "gre", "--remote", "2001:db8:1::2"]).quietly_ok();
    let said = lab.said(&["remote", "add", "198.51.100.2"]).ok_noting(policy);
    assert!(said.stderr.ends_with(ENDS), "{said:#?}");
    lab.said(&["down"]).quietly_ok();
}

#[test]
fn a_firewall_rule_that_would_hold_the_outer_packets_is_told() {
    let lab = Lab::roomy();
    let nft = |line: &str| lab.run(Ns::Host, &["nft", line]);
    nft("add table inet f");
    nft("add chain inet f out { type filter hook output priority 0; policy accept; }");
    nft("add rule inet f out ip daddr 203.0.113.0/24 drop");
    assert_told(&lab, &UP, None);
    nft("add rule inet f out ip daddr 198.51.100.0/24 meta l4proto gre counter reject");
    let chain = "chain out of nft's table inet f would hold the host's own packets to 198.51.100.2";
    assert_told(&lab, &UP, Some(chain));
    assert_told(&lab, &["up", "eth0", "--tunnel", "vxlan", "--remote", "198.51.100.2"], None);
    nft("flush chain inet f out");
    nft("add chain inet f out { policy drop; }");
    assert_told(&lab, &UP, Some(chain));
    nft("add rule inet f out oifname out0 accept");
    assert_told(&lab, &UP, None);
}
