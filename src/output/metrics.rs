//! Counters as Prometheus reads them: its text format, version 0.0.4.

use std::fmt::{Display, Write as _};

use serde_json::Value;

use crate::datapath::abi::{Bin, Forms, Stat, TapCounts};
use crate::datapath::reason::Reason;
use crate::session::counted::Counted;
use crate::session::stats::{RemoteState, RemoteStatus, TapStatus};
use crate::usage::spelled;

/// Powers of two that are told as bounds of sizes: a frame is no shorter than 60 bytes, and no longer than 65,549.
const BOUNDS: std::ops::RangeInclusive<usize> = 6..=16;

/// One family after another, each with its help and its type.
struct Page(String);

/// A metric's labels, as names with values.
type Labels<'a> = &'a [(&'a str, &'a str)];

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn row(&mut self, name: &str, labels: Labels, value: impl Display) {
        let labels: Vec<String> = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.0, "{name}{labels} {value}");
    }
}

fn escaped(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

/// Where what the session no longer has is counted, so that sums hold.
const REMOVED: &str = "removed";

/// All sessions, and how often one could not be read.
pub(crate) fn metrics(sessions: &[Counted], errors: u64) -> String {
    let mut page = Page(String::new());
    page.family("snifctl_session_info", "gauge", "A session that is up.");
    for session in sessions {
        let options = &session.options;
        let tunnel = serde_json::to_value(options.tunnel.kind);
        let tunnel = tunnel.ok().as_ref().and_then(Value::as_str).unwrap_or_default().to_string();
        let (oversize, spread) = (spelled(options.oversize), spelled(options.spread));
        let labels = [("session", session.name.as_str()), ("tunnel", &tunnel), ("oversize", &oversize)];
        page.row(
            "snifctl_session_info",
            &[&labels[..], &[("spread", &spread), ("version", &session.version)]].concat(),
            1,
        );
    }
    taps(&mut page, sessions);
    sizes(&mut page, sessions);
    forms(&mut page, sessions);
    remotes(&mut page, sessions);
    let name = "snifctl_drops_packets_total";
    page.family(name, "counter", "Copies that were not sent, by reason; snifctl explain REASON says what to do.");
    for session in sessions {
        for reason in Reason::ALL {
            let count = session.drops.get(reason.name()).copied().unwrap_or_default();
            page.row(name, &[("session", &session.name), ("reason", reason.name())], count);
        }
    }
    let name = "snifctl_out_interface_drops_packets_total";
    page.family(name, "counter", "Packets of any sender that out interfaces and their queues have dropped behind us.");
    for session in sessions {
        page.row(name, &[("session", &session.name)], session.out_dropped);
    }
    let name = "snifctl_collection_errors_total";
    page.family(name, "counter", "Sessions that could not be read, since this process began.");
    page.row(name, &[], errors);
    page.0
}

/// A counter of taps: its name, its help, and where it stands.
type OfTap = (&'static str, &'static str, fn(&TapCounts) -> u64);

const OF_TAPS: [OfTap; 6] = [
    ("snifctl_tap_seen_packets_total", "Packets that the tap has met.", |at| at.choice.seen),
    ("snifctl_tap_filtered_packets_total", "Packets that the filter did not take.", |at| at.choice.filtered),
    ("snifctl_tap_skipped_packets_total", "Packets that sampling left out.", |at| at.choice.skipped),
    ("snifctl_tap_copies_packets_total", "Copies that were to be sent, one for each remote.", |at| at.stat.pcnt),
    ("snifctl_tap_copies_bytes_total", "Bytes of copies that were to be sent.", |at| at.stat.bcnt),
    ("snifctl_tap_drops_packets_total", "Copies of the tap that were not sent.", |at| at.stat.dcnt),
];

fn taps(page: &mut Page, sessions: &[Counted]) {
    for (name, help, of) in OF_TAPS {
        page.family(name, "counter", help);
        for session in sessions {
            let labels =
                |device, direction| [("session", session.name.as_str()), ("device", device), ("direction", direction)];
            for tap in &session.taps {
                page.row(name, &labels(&tap.interface, tap.direction), of(&tap.counts));
            }
            page.row(name, &labels(REMOVED, "both"), of(&session.removed_taps));
        }
    }
    type Of = fn(&TapStatus) -> bool;
    let states: [(&str, &str, Of); 2] = [
        ("snifctl_tap_attached", "Whether the program is at the hook.", |tap| tap.attached),
        ("snifctl_tap_blind", "Whether packets pass that the tap does not see.", |tap| tap.unseen.is_some()),
    ];
    for (name, help, of) in states {
        page.family(name, "gauge", help);
        for session in sessions {
            for tap in &session.taps {
                let labels =
                    [("session", session.name.as_str()), ("device", &tap.interface), ("direction", tap.direction)];
                page.row(name, &labels, u8::from(of(tap)));
            }
        }
    }
}

/// Nanoseconds that are told as bounds of times: a tap that copies nothing takes some 50.
const NS_BOUNDS: std::ops::RangeInclusive<usize> = 5..=20;

fn sizes(page: &mut Page, sessions: &[Counted]) {
    let name = "snifctl_copy_size_bytes";
    page.family(name, "histogram", "Sizes of copies that were to be sent, without outer headers.");
    for session in sessions {
        histogram(page, name, &session.name, &session.sizes, BOUNDS, |bytes| bytes.to_string());
    }
    let name = "snifctl_tap_time_seconds";
    page.family(name, "histogram", "Time that one packet spends in a tap, its copies included; with --profile.");
    for session in sessions {
        let Some(times) = &session.times else { continue };
        histogram(page, name, &session.name, times, NS_BOUNDS, |ns| format!("{}", ns as f64 / 1e9));
    }
}

fn histogram(
    page: &mut Page,
    name: &str,
    session: &str,
    bins: &[Bin],
    bounds: std::ops::RangeInclusive<usize>,
    shown: fn(u64) -> String,
) {
    let count = |bins: &[Bin]| bins.iter().map(|bin| bin.count).sum::<u64>();
    let (bucket, session) = (format!("{name}_bucket"), ("session", session));
    for power in bounds {
        page.row(&bucket, &[session, ("le", &shown(1 << power))], count(&bins[..=power]));
    }
    page.row(&bucket, &[session, ("le", "+Inf")], count(bins));
    page.row(&format!("{name}_sum"), &[session], shown(bins.iter().map(|bin| bin.sum).sum()));
    page.row(&format!("{name}_count"), &[session], count(bins));
}

/// A counter of what copies were like: its name, its help, and where it stands.
type OfForms = (&'static str, &'static str, fn(&Forms) -> u64);

const OF_FORMS: [OfForms; 6] = [
    ("snifctl_super_packets_total", "Super-packets that were to be copied, one for each remote.", |at| {
        at.super_packets
    }),
    ("snifctl_super_packet_segments_total", "Wire frames in them.", |at| at.segments),
    ("snifctl_copies_vlan_packets_total", "Copies with a VLAN tag.", |at| at.vlan),
    ("snifctl_copies_truncated_packets_total", "Copies that were cut, and sent.", |at| at.truncated),
    ("snifctl_copies_fragmented_packets_total", "Copies that were sent in outer fragments.", |at| at.fragmented),
    ("snifctl_fragments_total", "Outer packets that these took.", |at| at.fragments),
];

fn forms(page: &mut Page, sessions: &[Counted]) {
    for (name, help, of) in OF_FORMS {
        page.family(name, "counter", help);
        for session in sessions {
            page.row(name, &[("session", &session.name)], of(&session.forms));
        }
    }
}

fn remotes(page: &mut Page, sessions: &[Counted]) {
    type Of = fn(&Stat) -> u64;
    let counters: [(&str, &str, Of); 3] = [
        ("snifctl_remote_sent_packets_total", "Copies handed to the out interface.", |stat| stat.pcnt),
        ("snifctl_remote_sent_bytes_total", "Bytes of copies handed to the out interface, inner frames.", |stat| {
            stat.bcnt
        }),
        ("snifctl_remote_drops_packets_total", "Copies for the remote that were not sent.", |stat| stat.dcnt),
    ];
    for (name, help, of) in counters {
        page.family(name, "counter", help);
        for session in sessions {
            for remote in &session.remotes {
                page.row(
                    name,
                    &[("session", &session.name), ("remote", &remote.address.to_string())],
                    of(&remote.stat),
                );
            }
            page.row(name, &[("session", &session.name), ("remote", REMOVED)], of(&session.removed));
        }
    }
    let is_up = |remote: &RemoteStatus| matches!(remote.state, RemoteState::Ok | RemoteState::Outdated);
    page.family("snifctl_remote_up", "gauge", "Whether copies are made for the remote: it has a route and answers.");
    let all = || sessions.iter().flat_map(|session| session.remotes.iter().map(move |remote| (&session.name, remote)));
    for (session, remote) in all() {
        let labels = [("session", session.as_str()), ("remote", &remote.address.to_string())];
        page.row("snifctl_remote_up", &labels, u8::from(is_up(remote)));
    }
    page.family("snifctl_remote_mtu_bytes", "gauge", "The largest outer IP packet on the way to the remote.");
    for (session, remote) in all() {
        let labels = [("session", session.as_str()), ("remote", &remote.address.to_string())];
        page.row("snifctl_remote_mtu_bytes", &labels, remote.mtu);
    }
    page.family("snifctl_remote_info", "gauge", "The way that copies take now.");
    for (session, remote) in all() {
        let device = remote.interface.clone().unwrap_or_default();
        let source = remote.source.map_or_else(String::new, |source| source.to_string());
        let remote = remote.address.to_string();
        let labels = [("session", session.as_str()), ("remote", &remote), ("device", &device), ("source", &source)];
        page.row("snifctl_remote_info", &labels, 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped_and_an_empty_machine_has_every_family() {
        let mut page = Page(String::new());
        page.row("a", &[("b", "\\ \" \n")], 7);
        assert_eq!(page.0, "a{b=\"\\\\ \\\" \\n\"} 7\n");
        let text = metrics(&[], 3);
        let (helps, types) = (text.matches("# HELP ").count(), text.matches("# TYPE ").count());
        assert_eq!((helps, types), (26, 26), "{text}");
        assert!(text.ends_with("\nsnifctl_collection_errors_total 3\n"), "{text}");
    }
}
