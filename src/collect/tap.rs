//! `--to`: frames as the received traffic of a tap device, for sensors that know no tunnels.

use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Result, anyhow, bail};
use tun_rs::{DeviceBuilder, Layer, SyncDevice};

use crate::tools::exec::{Cmd, Runner};
use crate::tools::ip::{self, Link};

/// The largest that a tap device takes.
const MTU: u16 = 65521;

/// A tap device. One that we have made ends with us.
pub(crate) struct Tap {
    device: SyncDevice,
    name: String,
    pub frames: u64,
    /// Frames that the device did not take, as it was down or its queue full.
    pub refused: u64,
}

impl Tap {
    pub(crate) fn open(runner: &Runner, name: &str) -> Result<Tap> {
        let there = ip::links(runner)?.into_iter().find(|link| link.ifname == name);
        if there.as_ref().is_some_and(|link| !is_tap(link)) {
            bail!("--to {name} is an interface, and no tap device of one queue; name another one, as in: --to tap7");
        }
        let device = DeviceBuilder::new().name(name).layer(Layer::L2).inherit_enable_state().build_sync();
        let device = device.map_err(|err| {
            anyhow!(
                "--to {name} cannot be had: {err}; it needs root, /dev/net/tun, and a device that nobody else has open"
            )
        })?;
        if there.is_none() {
            quiet(runner, name)?;
        }
        Ok(Tap { device, name: name.into(), frames: 0, refused: 0 })
    }

    pub(crate) fn send(&mut self, frame: &[u8]) -> Result<()> {
        match self.device.send(frame) {
            Ok(_) => self.frames += 1,
            Err(err) if is_gone(&err) => bail!("--to {} was deleted; start it again, and it is made anew", self.name),
            Err(_) => self.refused += 1,
        }
        Ok(())
    }
}

/// Brings it up to be read: it has no addresses, answers nobody, and says nothing itself. So no frame, as a mirrored
/// router advertisement, is one for this machine.
fn quiet(runner: &Runner, name: &str) -> Result<()> {
    let (mtu, dir) = (MTU.to_string(), Path::new("/proc/sys/net/ipv6/conf").join(name));
    let mut words = vec!["link", "set", "dev", name, "mtu", &mtu, "arp", "off", "multicast", "off"];
    if dir.exists() {
        without_ipv6(name, &dir.join("disable_ipv6"));
        words.extend(["addrgenmode", "none"]);
    }
    runner.write(&Cmd::new("ip", words))?;
    // By itself: one message with both would bring it up first.
    runner.write(&Cmd::new("ip", ["link", "set", "dev", name, "up"]))?;
    Ok(())
}

/// In a container /proc/sys may be read-only.
fn without_ipv6(name: &str, switch: &Path) {
    let is_off = || fs::read_to_string(switch).is_ok_and(|text| text.trim() == "1");
    if let Err(err) = fs::write(switch, "1")
        && !is_off()
    {
        eprintln!(
            "snifctl: --to {name} has IPv6, as {} cannot be written ({err}), so a mirrored router advertisement may give \
             this machine a route; try: docker run --sysctl net.ipv6.conf.default.disable_ipv6=1",
            switch.display()
        );
    }
}

/// A tun device has another layer.
fn is_tap(link: &Link) -> bool {
    link.kind() == "tun" && link.detail("type") == Some("tap") && link.linkinfo.info_data["multi_queue"] != true
}

/// The kernel takes such a name, and as it is: it would put a number in the place of %d.
pub(crate) fn is_name(text: &str) -> bool {
    let fits = (1..=15).contains(&text.len()) && ![".", ".."].contains(&text);
    fits && !text.contains(|c: char| "/:%".contains(c) || c.is_whitespace())
}

/// EBADFD: the device was deleted.
fn is_gone(err: &io::Error) -> bool {
    err.raw_os_error() == Some(nix::errno::Errno::EBADFD as i32)
}
