//! The running kernel's version, and what older ones lack.

/// The oldest kernel with all helpers that the datapath cannot do without.
pub(crate) const OLDEST: (u32, u32) = (5, 10);

/// As `uname -r` says it.
pub(crate) fn release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_string()
}

/// The first `major.minor` in a version text: `iproute2-6.1.0` is (6, 1).
pub(crate) fn version(text: &str) -> Option<(u32, u32)> {
    let dotted = |c: char| !(c.is_ascii_digit() || c == '.');
    let number =
        text.split(dotted).find(|word| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit()))?;
    let mut parts = number.split('.').map(|part| part.parse().ok());
    Some((parts.next()??, parts.next().flatten().unwrap_or(0)))
}

fn is_at_least(wanted: (u32, u32)) -> bool {
    version(&release()).is_some_and(|found| found >= wanted)
}

/// Atomic additions that tell what was there before.
pub(crate) fn has_atomic_fetch() -> bool {
    is_at_least((5, 12))
}

/// `BPF_F_ADJ_ROOM_ENCAP_L2_ETH`: super-packets are encapsulated whole. Older ones answer EINVAL when it is used.
pub(crate) fn encapsulates_frames() -> bool {
    is_at_least((5, 13))
}

/// A neighbour entry can be `managed`: the kernel asks for it again and again by itself.
pub(crate) fn keeps_neighbours() -> bool {
    is_at_least((5, 16))
}

/// What maps take is locked memory, of which there is a limit; later it is the control group's.
pub(crate) fn locks_maps() -> bool {
    !is_at_least((5, 11))
}

/// Where `kernel.unprivileged_bpf_disabled` is set, pins are not opened without CAP_BPF; later, only nothing is made.
pub(crate) fn keeps_pins_from_others() -> bool {
    !is_at_least((5, 19))
}

/// tcx hooks, whose programs run before those of tc.
pub(crate) fn has_tcx() -> bool {
    is_at_least((6, 6))
}

/// A packet is dropped where its way through a tunnel is one of too many transmissions within one another.
pub(crate) fn limits_nesting() -> bool {
    is_at_least((6, 12))
}

/// Packets that the machine has dropped since it booted because a CPU's backlog was full: before any tap.
pub(crate) fn softnet_dropped() -> u64 {
    let text = std::fs::read_to_string("/proc/net/softnet_stat").unwrap_or_default();
    let dropped = |line: &str| u64::from_str_radix(line.split_whitespace().nth(1)?, 16).ok();
    text.lines().filter_map(dropped).sum()
}
