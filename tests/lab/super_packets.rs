//! Super-packets that are not plain TCP: of UDP, and inside a tunnel of the kernel.

use super::{HOST_IP, Lab, Ns, PATIENCE, PEER_IP, frames, poll};

/// UDP_SEGMENT (setsockopt 17, 103): one write leaves as datagrams of `size` bytes.
pub(crate) fn send_udp_super_packet(lab: &Lab, bytes: usize, size: usize) {
    let data = lab.dir().join("datagrams");
    std::fs::write(&data, frames::payload(1, bytes)).expect("write what will be sent");
    let (open, block) = (format!("OPEN:{},rdonly", data.display()), bytes.to_string());
    let target = format!("UDP4-SENDTO:192.0.2.2:9,setsockopt-int=17:103:{size}");
    lab.host(&["socat", "-b", &block, "-u", &open, &target]);
}

/// A VXLAN tunnel of the kernel over the watched link: super-packets stay whole in it, and the kernel calls them
/// encapsulated.
pub(crate) fn add_vxlan(lab: &Lab) {
    for (ns, dev, local, remote, address) in
        [(Ns::Host, "eth0", HOST_IP, PEER_IP, "203.0.113.1"), (Ns::Peer, "peer0", PEER_IP, HOST_IP, "203.0.113.2")]
    {
        let add = format!("link add vx0 mtu 1500 type vxlan id 5 local {local} remote {remote} dstport 4789 dev {dev}");
        lab.ip_batch(
            ns,
            &format!("{add}\nlink set vx0 addrgenmode none\naddress add {address}/24 dev vx0\nlink set vx0 up"),
        );
    }
}

/// Moves bytes from host to peer through that tunnel.
pub(crate) fn transfer_inside_vxlan(lab: &Lab, data: &[u8]) {
    let (source, sink) = (lab.dir().join("inside"), lab.dir().join("inside.received"));
    std::fs::write(&source, data).expect("write what will be sent");
    let open = [format!("OPEN:{},creat,trunc", sink.display()), format!("OPEN:{},rdonly", source.display())];
    let mut listener = lab.command(Ns::Peer, &["socat", "-u", "TCP4-LISTEN:7777,bind=203.0.113.2", &open[0]]);
    let mut listener = listener.spawn().expect("start socat");
    let listens = || String::from_utf8_lossy(&lab.peer(&["ss", "-Hltn"]).stdout).contains(":7777").then_some(());
    poll(PATIENCE, listens).expect("the listener is up");
    lab.host(&["socat", "-b", "65536", "-u", &open[1], "TCP4:203.0.113.2:7777"]);
    assert!(listener.wait().expect("wait for socat").success());
    assert!(std::fs::read(&sink).expect("read the bytes received") == data, "the watched stream differs");
}
