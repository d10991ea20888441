use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::*;

/// A machine that is only what the test says.
#[derive(Default)]
struct Machine {
    links: Vec<Link>,
    /// Devices without offloads.
    bare: Vec<&'static str>,
    routes: BTreeMap<IpAddr, &'static str>,
}

impl Facts for Machine {
    fn gets_finished(&self, link: &Link) -> Result<bool> {
        Ok(self.bare.contains(&link.ifname.as_str()))
    }

    fn bus(&self, link: &Link) -> Option<String> {
        link.parentbus.clone()
    }

    fn way(&self, address: IpAddr) -> Result<Option<String>> {
        Ok(self.routes.get(&address).map(|dev| dev.to_string()))
    }
}

impl Machine {
    /// Links as `ip -j -d link` shows them, less what everyone has.
    fn with(links: Value) -> Machine {
        let mut links = links;
        for (number, link) in links.as_array_mut().unwrap().iter_mut().enumerate() {
            let link = link.as_object_mut().unwrap();
            for (key, value) in [("ifindex", json!(number + 1)), ("mtu", json!(1500)), ("link_type", json!("ether"))] {
                link.entry(key).or_insert(value);
            }
        }
        Machine { links: serde_json::from_value(links).unwrap(), ..Machine::default() }
    }

    fn bare(self, bare: &[&'static str]) -> Machine {
        Machine { bare: bare.to_vec(), ..self }
    }

    fn route(mut self, to: &str, dev: &'static str) -> Machine {
        self.routes.insert(to.parse().unwrap(), dev);
        self
    }

    fn link(&self, name: &str) -> &Link {
        named(&self.links, Some(name)).unwrap()
    }

    fn finishes(&self, out: &str) -> bool {
        leaves_unfinished(&self.links, self.link(out), self).unwrap()
    }

    fn depth(&self, out: &str) -> usize {
        tunnel_depth(&self.links, self.link(out), self).unwrap()
    }

    fn asks_for(&self, out: &str) -> Vec<&str> {
        let mut names: Vec<&str> =
            mark_losers(&self.links, self.link(out), self).unwrap().iter().map(|link| link.ifname.as_str()).collect();
        names.sort_unstable();
        names
    }
}

fn nic(name: &str, bus: &str) -> Value {
    json!({"ifname": name, "parentbus": bus, "parentdev": "x"})
}

fn virt(name: &str, kind: &str) -> Value {
    json!({"ifname": name, "linkinfo": {"info_kind": kind}})
}

fn over(name: &str, kind: &str, lower: &str) -> Value {
    json!({"ifname": name, "link": lower, "linkinfo": {"info_kind": kind}})
}

fn port(mut link: Value, master: &str) -> Value {
    link["master"] = json!(master);
    link
}

fn data(mut link: Value, data: Value) -> Value {
    link["linkinfo"]["info_data"] = data;
    link
}

#[test]
fn a_nic_finishes_unless_it_hands_on_to_a_host() {
    for (bus, finish) in
        [("pci", false), ("usb", false), ("platform", false), ("virtio", true), ("xen", true), ("vmbus", true)]
    {
        assert_eq!(Machine::with(json!([nic("eth0", bus)])).finishes("eth0"), finish, "{bus}");
    }
}

#[test]
fn what_is_not_known_is_finished() {
    let machine = Machine::with(json!([
        virt("veth0", "veth"),
        virt("new0", "of-the-future"),
        virt("br0", "bridge"),
        json!({"ifname": "plain0"}),
        data(over("vx0", "vxlan", "eth0"), json!({"remote": "192.0.2.9"})),
        nic("eth0", "pci"),
        over("gone0", "vlan", "if77"),
        json!({"ifname": "far0", "link_index": 1, "link_netnsid": 0, "linkinfo": {"info_kind": "macvlan"}}),
    ]));
    for out in ["veth0", "new0", "br0", "plain0", "vx0", "gone0", "far0"] {
        assert!(machine.finishes(out), "{out}");
    }
}

#[test]
fn the_lowest_device_decides() {
    let all = json!([
        nic("eth0", "pci"),
        nic("virt0", "virtio"),
        over("vlan0", "vlan", "eth0"),
        over("vlan1", "vlan", "vlan0"),
        over("vlan2", "vlan", "virt0"),
        // A veth's link is its other end, which is no NIC's business.
        over("veth0", "veth", "eth0"),
        over("vlan3", "vlan", "veth0"),
        data(over("private0", "macvlan", "eth0"), json!({"mode": "private"})),
        data(over("bridged0", "macvlan", "eth0"), json!({"mode": "bridge"})),
        data(over("ip0", "ipvlan", "eth0"), json!({"mode": "l2", "mode_flag": "vepa"})),
        data(over("ip1", "ipvlan", "eth0"), json!({"mode": "l3", "mode_flag": "bridge"})),
        data(over("ip2", "ipvlan", "eth0"), json!(7)),
    ]);
    let machine = Machine::with(all.clone());
    for out in ["vlan0", "vlan1", "private0", "ip0"] {
        assert!(!machine.finishes(out), "{out}");
    }
    for out in ["vlan2", "veth0", "vlan3", "bridged0", "ip1", "ip2"] {
        assert!(machine.finishes(out), "{out}");
    }
    let bare = Machine::with(all).bare(&["veth0", "bridged0"]);
    for out in ["veth0", "vlan3", "bridged0"] {
        assert!(!bare.finishes(out), "{out}");
    }
}

#[test]
fn of_a_bridge_or_bond_every_port_counts() {
    let machine = Machine::with(json!([
        virt("br0", "bridge"),
        virt("bond0", "bond"),
        port(nic("eth0", "pci"), "bond0"),
        port(nic("eth1", "pci"), "bond0"),
        port(over("bond0.5", "vlan", "bond0"), "br0"),
        virt("br1", "bridge"),
        port(nic("eth2", "pci"), "br1"),
        port(virt("veth0", "veth"), "br1"),
    ]));
    assert!(!machine.finishes("bond0") && !machine.finishes("br0"));
    assert!(machine.finishes("br1"));
}

#[test]
fn links_that_lead_in_a_circle_end() {
    let machine = Machine::with(json!([
        over("a", "vlan", "b"),
        over("b", "vlan", "a"),
        over("self", "macvlan", "self"),
        port(virt("br0", "bridge"), "br1"),
        port(virt("br1", "bridge"), "br0"),
    ]));
    for out in ["a", "self", "br0"] {
        assert!(machine.finishes(out), "{out}");
        assert!(machine.asks_for(out).is_empty(), "{out}");
    }
}

#[test]
fn user_space_tunnels_and_strangers_are_asked_for() {
    let machine = Machine::with(json!([
        data(virt("tap0", "tun"), json!({"type": "tap"})),
        data(virt("tun0", "tun"), json!({"type": "tun"})),
        virt("wg0", "wireguard"),
        virt("ppp0", "ppp"),
        virt("xfrm0", "xfrm"),
        virt("new0", "of-the-future"),
        json!({"ifname": "plain0"}),
    ]));
    for out in ["tap0", "tun0", "wg0", "ppp0", "xfrm0", "new0", "plain0"] {
        assert_eq!(machine.asks_for(out), [out]);
    }
}

#[test]
fn devices_that_keep_the_mark_are_not_asked_for() {
    let kinds = ["veth", "bridge", "bond", "team", "vrf", "dummy", "ifb", "netkit", "hsr", "openvswitch"];
    for kind in kinds {
        assert!(Machine::with(json!([virt("out0", kind)])).asks_for("out0").is_empty(), "{kind}");
    }
    let upper = ["vlan", "macvlan", "macvtap", "ipvlan", "macsec", "vxlan", "geneve", "gretap", "ip6gretap", "erspan"];
    for kind in upper {
        let machine = Machine::with(json!([nic("eth0", "pci"), over("out0", kind, "eth0")]));
        assert!(machine.asks_for("out0").is_empty(), "{kind}");
    }
}

#[test]
fn what_stands_on_a_tunnel_is_asked_for_too() {
    let machine = Machine::with(json!([
        port(virt("tap0", "tun"), "br0"),
        port(nic("eth0", "pci"), "br0"),
        virt("br0", "bridge"),
        over("vlan0", "vlan", "br0"),
        over("mac0", "macvlan", "tap1"),
        virt("tap1", "tun"),
        virt("wg0", "wireguard"),
        data(virt("vx0", "vxlan"), json!({"id": 5, "remote": "192.0.2.9"})),
        data(virt("vx1", "vxlan"), json!({"id": 5, "remote6": "2001:db8::9"})),
        data(virt("gre0", "gre"), json!({"remote": "192.0.2.8", "local": "any"})),
    ]));
    let machine = machine.route("192.0.2.9", "wg0").route("2001:db8::9", "wg0").route("192.0.2.8", "eth0");
    assert_eq!(machine.asks_for("br0"), ["tap0"]);
    assert_eq!(machine.asks_for("vlan0"), ["tap0"]);
    assert_eq!(machine.asks_for("mac0"), ["tap1"]);
    assert_eq!(machine.asks_for("vx0"), ["wg0"]);
    assert_eq!(machine.asks_for("vx1"), ["wg0"]);
    assert!(machine.asks_for("gre0").is_empty());
}

/// Without a fixed other end, or with one that nobody can read.
#[test]
fn a_tunnel_to_nobody_knows_where_is_asked_for() {
    let ends = [
        json!(null),
        json!([1]),
        json!({}),
        json!({"remote": "any"}),
        json!({"remote": 7}),
        json!({"remote": "0.0.0.0"}),
    ];
    for end in ends {
        let machine = Machine::with(json!([data(virt("vx0", "vxlan"), end.clone())]));
        assert_eq!(machine.asks_for("vx0"), ["vx0"], "{end}");
    }
}

#[test]
fn a_tunnel_is_as_deep_as_what_stands_on_it() {
    let machine = Machine::with(json!([
        nic("eth0", "pci"),
        over("vlan0", "vlan", "eth0"),
        data(virt("vx0", "vxlan"), json!({"id": 7, "link": "vlan0"})),
        port(over("mac0", "macvlan", "vx0"), "br0"),
        virt("br0", "bridge"),
        over("vx1", "vxlan", "vx0"),
        over("self", "gretap", "self"),
    ]));
    for (out, depth) in [("eth0", 0), ("vlan0", 0), ("vx0", 1), ("mac0", 2), ("br0", 3), ("vx1", 2), ("self", 1)] {
        assert_eq!(machine.depth(out), depth, "{out}");
    }
}

#[test]
fn what_stands_on_an_interface_is_found() {
    let machine = Machine::with(json!([
        port(nic("eth0", "pci"), "br0"),
        virt("br0", "bridge"),
        nic("eth1", "pci"),
        over("vlan0", "vlan", "eth1"),
        over("veth0", "veth", "veth1"),
        over("veth1", "veth", "veth0"),
    ]));
    let upper = |base| stands_on(&machine.links, machine.link(base)).map(|link| link.ifname.as_str());
    for (base, found) in
        [("eth0", Some("br0")), ("eth1", Some("vlan0")), ("br0", None), ("vlan0", None), ("veth0", None)]
    {
        assert_eq!(upper(base), found, "{base}");
    }
}
