//! Headers byte by byte, as the RFCs draw them.

use super::*;
use crate::datapath::abi::HEADER_BYTES;
use crate::tunnel::Kind;

fn options(kind: Kind) -> Tunnel {
    Tunnel { kind, id: None, egress_id: None, port: None, sequence: false, udp_checksum: false, tell: false }
}

fn outer(tunnel: Tunnel, remote: &str) -> Outer {
    let remote: IpAddr = remote.parse().unwrap();
    let source = if remote.is_ipv4() { "192.0.2.1" } else { "2001:db8::1" };
    let path = Path {
        ifindex: 5,
        mtu: 1500,
        source_mac: [2, 0, 0, 0, 0, 1],
        next_hop_mac: Some([2, 0, 0, 0, 0, 2]),
        finish: false,
        per_frame: false,
        l3: false,
        queued: false,
    };
    let options = OuterOptions { ttl: 64, tos: 0, df: false };
    Outer { tunnel, source: source.parse().unwrap(), remote, options, path: Some(path) }
}

/// The bytes behind the outer IPv4 header.
fn tunnel_bytes(tunnel: Tunnel, direction: Direction) -> Vec<u8> {
    remote(&outer(tunnel, "198.51.100.7")).outer(direction)[ETHERNET + IPV4..].to_vec()
}

#[test]
fn the_gre_header_is_the_one_of_the_rfcs() {
    let remote = remote(&outer(options(Kind::Gre), "198.51.100.7"));
    let expected = [
        &[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0][..],
        &[0x45, 0, 0, 0, 0, 0, 0, 0, 64, 47, 0, 0, 192, 0, 2, 1, 198, 51, 100, 7],
        &[0, 0, 0x65, 0x58],
    ]
    .concat();
    assert_eq!(remote.outer(Direction::Ingress), expected);
    assert_eq!(remote.outer(Direction::Egress), expected);
    assert_eq!(remote.flags, 0);
}

#[test]
fn key_and_sequence_follow_the_gre_header_in_that_order() {
    let mut tunnel = Tunnel { id: Some(7), egress_id: Some(8), ..options(Kind::Gre) };
    assert_eq!(tunnel_bytes(tunnel, Direction::Ingress), [0x20, 0, 0x65, 0x58, 0, 0, 0, 7]);
    assert_eq!(tunnel_bytes(tunnel, Direction::Egress), [0x20, 0, 0x65, 0x58, 0, 0, 0, 8]);
    tunnel.sequence = true;
    assert_eq!(tunnel_bytes(tunnel, Direction::Ingress), [0x30, 0, 0x65, 0x58, 0, 0, 0, 7, 0, 0, 0, 0]);
    let remote = remote(&outer(tunnel, "198.51.100.7"));
    assert_eq!(usize::from(remote.at.sequence), HEADER_L3 + IPV4 + 8);
    assert_eq!(remote.flags, remote_flag::PER_FRAME);
}

#[test]
fn vxlan_and_geneve_headers_are_the_ones_of_their_rfcs() {
    let vxlan = Tunnel { id: Some(0x123456), ..options(Kind::Vxlan) };
    let expected = [0, 0, 0x12, 0xb5, 0, 0, 0, 0, 8, 0, 0, 0, 0x12, 0x34, 0x56, 0];
    assert_eq!(tunnel_bytes(vxlan, Direction::Ingress), expected);
    let geneve = Tunnel { port: Some(1000), ..options(Kind::Geneve) };
    let expected = [0, 0, 3, 0xe8, 0, 0, 0, 0, 0, 0, 0x65, 0x58, 0, 0, 1, 0];
    assert_eq!(tunnel_bytes(geneve, Direction::Egress), expected);
    assert_eq!(remote(&outer(vxlan, "198.51.100.7")).flags, remote_flag::FLOW);
}

#[test]
fn geneve_that_tells_has_one_option_and_just_fits_a_template_over_ipv6() {
    let tell = Tunnel { tell: true, ..options(Kind::Geneve) };
    let expected =
        [&[0, 0, 0x17, 0xc1, 0, 0, 0, 0][..], &[6, 0, 0x65, 0x58, 0, 0, 1, 0], &[0xff, 0x5a, 0x01, 5], &[0; 20]]
            .concat();
    assert_eq!(tunnel_bytes(tell, Direction::Egress), expected);
    let flags = remote_flag::FLOW | remote_flag::TELL | remote_flag::PER_FRAME;
    assert_eq!(remote(&outer(tell, "198.51.100.7")).flags, flags);
    let over_ipv6 = remote(&outer(tell, "2001:db8::7"));
    assert_eq!(usize::from(over_ipv6.outer_len), HEADER_BYTES - (HEADER_L3 - ETHERNET));
    let data = usize::from(over_ipv6.at.udp) + 20;
    assert_eq!(over_ipv6.headers[0].0[data - 4..data], [0xff, 0x5a, 0x01, 5]);
    assert_eq!(data + 20, HEADER_BYTES);
}

#[test]
fn erspan_headers_are_the_ones_of_the_draft() {
    assert_eq!(tunnel_bytes(options(Kind::Erspan1), Direction::Ingress), [0, 0, 0x88, 0xbe]);
    let two = Tunnel { id: Some(1023), ..options(Kind::Erspan2) };
    let expected = [0x10, 0, 0x88, 0xbe, 0, 0, 0, 0, 0x10, 0, 0x03, 0xff, 0, 0, 0, 0];
    assert_eq!(tunnel_bytes(two, Direction::Ingress), expected);
    let three = tunnel_bytes(options(Kind::Erspan3), Direction::Egress);
    let expected = [
        &[0x10, 0, 0x22, 0xeb, 0, 0, 0, 0][..],
        &[0x20, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x80, 0x0d],
        &[0x14, 0, 0, 0, 0, 0, 0, 0],
    ]
    .concat();
    assert_eq!(three, expected);
    assert_eq!(tunnel_bytes(options(Kind::Erspan3), Direction::Ingress)[19], 0x05);
}

#[test]
fn the_overhead_is_exact_for_each_type_and_family() {
    let (v4, v6) = ("198.51.100.7".parse().unwrap(), "2001:db8::7".parse().unwrap());
    let with_id = |kind| Tunnel { id: Some(5), ..options(kind) };
    for (tunnel, bytes) in [
        (options(Kind::Gre), 24),
        (with_id(Kind::Gre), 28),
        (Tunnel { sequence: true, ..with_id(Kind::Gre) }, 32),
        (with_id(Kind::Vxlan), 36),
        (options(Kind::Geneve), 36),
        (Tunnel { tell: true, ..options(Kind::Geneve) }, 60),
        (options(Kind::Erspan1), 24),
        (options(Kind::Erspan2), 36),
        (options(Kind::Erspan3), 48),
    ] {
        assert_eq!(overhead(&tunnel, v4), bytes, "{tunnel:?}");
        assert_eq!(overhead(&tunnel, v6), bytes + 20, "{tunnel:?}");
        assert!(remote(&outer(tunnel, "2001:db8::7")).outer(Direction::Ingress).len() <= 96 - 2);
    }
}

#[test]
fn the_ipv6_header_is_the_one_of_the_rfc() {
    let mut odd = outer(options(Kind::Gre), "2001:db8::7");
    odd.options.tos = 0xb8;
    let remote = remote(&odd);
    let bytes = remote.outer(Direction::Ingress);
    assert_eq!(bytes[12..22], [0x86, 0xdd, 0x6b, 0x80, 0, 0, 0, 0, 47, 64]);
    assert_eq!(remote.addresses(), ("2001:db8::1".parse().unwrap(), "2001:db8::7".parse().unwrap()));
    assert_eq!(remote.flags, remote_flag::IPV6 | remote_flag::FLOW);
}

#[test]
fn what_cannot_be_sent_is_marked() {
    let mut odd = outer(options(Kind::Gre), "198.51.100.7");
    odd.options.df = true;
    odd.path.as_mut().unwrap().next_hop_mac = None;
    assert_eq!(remote(&odd).flags, remote_flag::DF | remote_flag::UNRESOLVED);
    odd.path = None;
    assert_eq!(remote(&odd).flags, remote_flag::DF | remote_flag::UNRESOLVED);
}

#[test]
fn the_sum_completes_to_a_right_checksum() {
    let remote = remote(&outer(options(Kind::Gre), "198.51.100.7"));
    let patched = sum(&84u16.to_be_bytes()) + sum(&7u16.to_be_bytes());
    let mut total = patched + remote.sum;
    total = (total & 0xffff) + (total >> 16);
    total = (total & 0xffff) + (total >> 16);
    let mut ip = remote.outer(Direction::Ingress)[ETHERNET..ETHERNET + IPV4].to_vec();
    ip[2..4].copy_from_slice(&84u16.to_be_bytes());
    ip[4..6].copy_from_slice(&7u16.to_be_bytes());
    ip[10..12].copy_from_slice(&(!(total as u16)).to_ne_bytes());
    let whole: u32 = ip.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    assert_eq!((whole & 0xffff) + (whole >> 16), 0xffff);
}
