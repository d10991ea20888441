//! What passes on the way to a collector is measured, and advice about MTUs names the way, never the watched interface.

use crate::lab::{Lab, Ns, OUT_MAC, Options, mac_text};

const UP: [&str; 6] = ["up", "eth0", "--tunnel", "gre", "--remote", "198.51.100.2"];

#[track_caller]
fn line(lab: &Lab, remote: &str, name: &str) -> String {
    let said = lab.said(&["doctor", "eth0", "--remote", remote]).stdout;
    let found = said.lines().find(|line| line.split_whitespace().nth(1) == Some(name));
    found.unwrap_or_else(|| panic!("no {name} in {said}")).to_string()
}

/// A lab whose collector has its address, and answers.
fn answering(out_mtu: u32) -> Lab {
    let lab = Lab::with(Options { out_mtu, ..Options::default() });
    lab.collector(&["ip", "address", "add", "198.51.100.2/24", "dev", "col0"]);
    let host = format!("ip neigh replace 198.51.100.1 lladdr {} dev col0 nud permanent", mac_text(OUT_MAC));
    lab.collector(&host.split(' ').collect::<Vec<_>>());
    lab
}

#[test]
fn the_largest_packet_that_passes_is_measured() {
    let lab = answering(1600);
    let all = line(&lab, "198.51.100.2", "path");
    assert!(all.starts_with("ok ") && all.contains("packets of 1600 bytes pass, all that the route takes"), "{all}");
    // A switch on the way drops what it does not take, and tells nobody.
    lab.collector(&["ip", "link", "set", "dev", "col0", "mtu", "1433"]); // and veth takes a tag more
    let less = line(&lab, "198.51.100.2", "path");
    assert!(less.starts_with("warn") && less.contains("packets of 1437 bytes are the largest that pass"), "{less}");
    assert!(less.contains("whole copies of eth0 need 1538"), "{less}");
    let (_, fix) = less.split_once("; try: ").expect("a fix");
    assert_eq!(fix, "ip route replace 198.51.100.2 dev out0 mtu 1437 && snifctl sync");
    lab.said(&UP).ok();
    lab.host(&fix.split(" && ").next().unwrap().split(' ').collect::<Vec<_>>());
    let synced = lab.said(&["sync"]).ok_noting("the route itself says 1437");
    assert_eq!(synced.stdout, "default: remote 198.51.100.2: MTU 1600 → 1437; written\n");
    let told = line(&lab, "198.51.100.2", "path");
    assert!(told.starts_with("ok ") && told.contains("packets of 1437 bytes pass"), "{told}");
    lab.said(&["down"]).quietly_ok();
}

#[test]
fn who_does_not_answer_ping_cannot_be_measured() {
    let lab = Lab::roomy();
    let silent = line(&lab, "198.51.100.2", "path");
    assert!(
        silent.contains("198.51.100.2 does not answer ping") && silent.ends_with("ping -c 1 198.51.100.2"),
        "{silent}"
    );
}

#[test]
fn a_larger_mtu_is_advised_for_the_way_and_never_for_the_watched_interface() {
    let lab = Lab::new();
    let need = "MTU 1500 towards 198.51.100.2 is too small";
    let up = |line: &str, note: &str, ends: &str| {
        let said = lab.said(&line.split(' ').collect::<Vec<_>>()).ok();
        let told = said.stderr.lines().find(|line| line.contains(note)).unwrap_or_else(|| panic!("{said:#?}"));
        assert!(told.ends_with(ends), "{told}\nends with {ends}");
        lab.said(&["down"]).quietly_ok();
    };
    let tunnel = "--tunnel gre --remote 198.51.100.2 --max-rate 1gbit";
    let room =
        "if all of the way to 198.51.100.2 takes 1538, make room with: ip link set dev out0 mtu 1538 && snifctl sync";
    up(&format!("up eth0 {tunnel}"), need, room);
    let other = "send them another way, as in: ip route add 198.51.100.2 dev OTHER && snifctl sync";
    up(&format!("up eth0 out0 {tunnel}"), need, other);
    // A macvlan is no larger than what it stands on.
    lab.host(&["ip", "link", "add", "mv0", "link", "out0", "type", "macvlan"]);
    lab.host(&["ip", "link", "set", "dev", "mv0", "up"]);
    lab.host(&["ip", "route", "add", "198.51.100.2", "dev", "mv0", "src", "198.51.100.1"]);
    lab.run(
        Ns::Host,
        &["ip", "neigh", "add", "198.51.100.2", "dev", "mv0", "lladdr", "02:00:00:00:02:02", "nud", "permanent"],
    );
    up(&format!("up out0 {tunnel}"), need, other);
    let both = "ip link set dev out0 mtu 1538 && ip link set dev mv0 mtu 1538 && snifctl sync";
    up(&format!("up eth0 {tunnel}"), need, both);
    lab.host(&["ip", "link", "set", "dev", "out0", "mtu", "1600"]);
    lab.host(&["ip", "link", "set", "dev", "mv0", "mtu", "1600"]);
    lab.host(&["ip", "route", "replace", "198.51.100.2", "dev", "mv0", "src", "198.51.100.1", "mtu", "1500"]);
    let told = "the route itself says 1500: if all of the way takes 1538, take that out of it (ip route get 198.51.100.2 shows \
                it), and then: snifctl sync";
    up(&format!("up eth0 {tunnel}"), need, told);
}
