//! Values of the command line, and mistakes in it: exit code 2, wherever they are found.

use std::fmt;
use std::ops::RangeInclusive;

use clap::ValueEnum;

/// One line that names the argument and ends with what would work.
#[derive(Debug)]
pub struct Usage(pub String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Ends the function with a [`Usage`] error.
macro_rules! refuse {
    ($($text:tt)*) => {
        return Err($crate::usage::Usage(format!($($text)*)).into())
    };
}

/// Ends the function with a [`Usage`] error unless the condition holds.
macro_rules! ensure_usage {
    ($condition:expr, $($text:tt)*) => {
        if !$condition {
            $crate::usage::refuse!($($text)*);
        }
    };
}

pub(crate) use {ensure_usage, refuse};

/// A number of a flag, decimal or 0x hex, in its range.
pub(crate) fn number<T: TryFrom<u64>>(
    flag: &str,
    text: &str,
    range: RangeInclusive<u64>,
    example: &str,
) -> Result<T, Usage> {
    let parsed = match text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    let (least, most) = (range.start(), range.end());
    let parsed = parsed.ok().filter(|_| !text.starts_with('+'));
    match parsed.and_then(|n| Some((n, T::try_from(n).ok()?))) {
        None => refuse!("{flag} {text:?} is not a number from {least} to {most}; try: {example}"),
        Some((n, _)) if !range.contains(&n) => {
            refuse!("{flag} {text} is out of range; it takes {least} to {most}, as in: {example}")
        }
        Some((_, n)) => Ok(n),
    }
}

/// The name of a unit enum's value on the command line.
pub(crate) fn spelled(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_string()).unwrap_or_default()
}
