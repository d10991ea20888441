//! Copies leave in the order of the wire, both directions as one sequence. `make soak` has the whole matrix.

use crate::lab::order_case::{Case, Out, PLAIN, Rate, TUNNELS};

/// Bodies of HTTP responses: 40 of 4 to 20 KB.
fn forty() -> Vec<usize> {
    (0..40).map(|n| 4096 + n * 420).collect()
}

/// The watched host downloads, with both CPUs at work.
#[track_caller]
fn downloads_read_as_on_the_wire(case: Case) {
    let lab = case.lab();
    case.up(&lab);
    case.download(&lab, &forty());
}

#[test]
fn downloads_read_as_on_the_wire_with_the_collector_behind_the_watched_interface() {
    downloads_read_as_on_the_wire(Case { out: Out::Watched, ..PLAIN });
}

#[test]
fn downloads_read_as_on_the_wire_with_the_collector_behind_a_bridge() {
    downloads_read_as_on_the_wire(Case { out: Out::Bridge, ..PLAIN });
}

#[test]
fn downloads_read_as_on_the_wire_with_the_collector_behind_a_nic() {
    downloads_read_as_on_the_wire(PLAIN);
}

#[test]
fn downloads_read_as_on_the_wire_where_stacks_send_super_packets() {
    for oversize in ["segment", "fragment"] {
        downloads_read_as_on_the_wire(Case { host_gso: true, peer_gso: true, out_gso: true, oversize, ..PLAIN });
    }
}

#[test]
fn requests_and_answers_of_every_size_leave_in_order() {
    for (watched_mtu, out_mtu) in [(1500, 1500), (9000, 1500), (9000, 9000)] {
        for oversize in ["segment", "truncate"] {
            let case = Case { watched_mtu, out_mtu, oversize, ..PLAIN };
            let lab = case.lab();
            case.up(&lab);
            case.request_and_answer(&lab);
        }
    }
}

/// On one CPU there is one order of all packets, a TCP connection's, too.
#[test]
fn downloads_on_one_cpu_leave_packet_by_packet_in_order() {
    for (out, oversize) in [(Out::Watched, "fragment"), (Out::Veth, "segment")] {
        let case = Case { out, oversize, ..PLAIN };
        let lab = case.lab();
        case.up(&lab);
        case.download_on_one_cpu(&lab, &[4096, 20480, 1024]);
    }
}

/// Cases that together have each tunnel, oversize mode, out interface, MTU and way to lose copies.
#[test]
fn each_value_of_each_factor_keeps_order() {
    let cases = [
        Case { tunnel: TUNNELS[1], snaplen: Some(100), remotes: 3, peer_gso: true, ..PLAIN },
        Case { tunnel: TUNNELS[2], oversize: "truncate", out: Out::Macvlan, host_gso: true, swaps: true, ..PLAIN },
        Case { tunnel: TUNNELS[3], oversize: "drop", out_gso: true, watched_mtu: 9000, out_mtu: 1600, ..PLAIN },
        Case { tunnel: TUNNELS[4], oversize: "fragment", out: Out::Vxlan, out_mtu: 1600, remotes: 3, ..PLAIN },
        Case { tunnel: TUNNELS[5], rate: Rate::Tight, out: Out::Watched, watched_mtu: 1600, out_mtu: 1600, ..PLAIN },
        Case { rate: Rate::Loose, out: Out::Bridge, watched_mtu: 9000, out_mtu: 9000, out_gso: true, ..PLAIN },
    ];
    cases.iter().for_each(Case::run);
}
