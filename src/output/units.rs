//! Numbers for a person: few figures and a unit. JSON and metrics have them exact.

/// 1234567 as `1,234,567`.
pub(crate) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// The largest unit of which there is one at least, and three figures.
fn scaled(n: f64, base: f64, units: &[&str]) -> String {
    let (mut value, mut unit) = (n, 0);
    while value >= 999.5 && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    let digits = match value {
        _ if value < 9.995 => 2,
        _ if value < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {}", units[unit])
}

/// Bytes with a binary unit.
pub(crate) fn bytes(n: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if n < 1000 { format!("{n} B") } else { scaled(n as f64, 1024.0, &units) }
}

/// Packets: exact up to 999,999.
pub(crate) fn packets(n: u64) -> String {
    if n < 1_000_000 { grouped(n) } else { scaled(n as f64, 1000.0, &["", "k", "M", "G", "T", "P", "E"]) }
}

/// Packets a second.
pub(crate) fn rate(per_second: f64) -> String {
    match per_second {
        _ if per_second <= 0.0 => "0".into(),
        _ if per_second < 9.95 => format!("{per_second:.1}"),
        _ if per_second < 99_999.5 => grouped(per_second.round() as u64),
        _ => scaled(per_second, 1000.0, &["", "k", "M", "G", "T"]),
    }
}

/// Bits a second, as tc writes them.
pub(crate) fn bit_rate(bytes_per_second: f64) -> String {
    let bits = (bytes_per_second * 8.0).max(0.0);
    if bits < 999.5 {
        return format!("{bits:.0}bit");
    }
    scaled(bits, 1000.0, &["bit", "kbit", "Mbit", "Gbit", "Tbit"]).replace(' ', "")
}

/// Nanoseconds.
pub(crate) fn nanoseconds(n: u64) -> String {
    if n < 1000 { format!("{n} ns") } else { scaled(n as f64, 1000.0, &["ns", "µs", "ms", "s"]) }
}

/// A time in its two largest units: `3d 4h`, `12m 5s`.
pub(crate) fn duration(seconds: u64) -> String {
    let parts = [(seconds / 86400, "d"), (seconds / 3600 % 24, "h"), (seconds / 60 % 60, "m"), (seconds % 60, "s")];
    let first = parts.iter().position(|(n, _)| *n > 0).unwrap_or(3);
    let shown = parts[first..].iter().take(2).filter(|(n, _)| *n > 0).map(|(n, unit)| format!("{n}{unit}"));
    let shown = shown.collect::<Vec<_>>().join(" ");
    if shown.is_empty() { "0s".into() } else { shown }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_for_a_person() {
        assert_eq!([0, 999, 1_234_567].map(grouped), ["0", "999", "1,234,567"]);
        assert_eq!([0, 999, 1000, 1_536_000].map(bytes), ["0 B", "999 B", "0.98 KiB", "1.46 MiB"]);
        assert_eq!(bytes(u64::MAX), "16.0 EiB");
        assert_eq!([999_999, 1_000_000, 123_456_789].map(packets), ["999,999", "1.00 M", "123 M"]);
        assert_eq!([0.0, 0.5, 12.4, 12_345.0, 1e6].map(rate), ["0", "0.5", "12", "12,345", "1.00 M"]);
        assert_eq!([0.0, 12.5, 125_000.0, 1.25e9].map(bit_rate), ["0bit", "100bit", "1.00Mbit", "10.0Gbit"]);
        assert_eq!([0, 999, 1500, 2_500_000].map(nanoseconds), ["0 ns", "999 ns", "1.50 µs", "2.50 ms"]);
        assert_eq!([0, 59, 60, 725, 3600, 273_600].map(duration), ["0s", "59s", "1m", "12m 5s", "1h", "3d 4h"]);
    }
}
