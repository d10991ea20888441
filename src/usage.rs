//! Values of the command line, and mistakes in it: exit code 2, wherever they are found.

use std::fmt;

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

/// A number of a flag, decimal or 0x hex.
pub(crate) fn number<T: TryFrom<u64>>(flag: &str, text: &str, example: &str) -> Result<T, Usage> {
    let parsed = match text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    let largest = (1u128 << (8 * size_of::<T>())) - 1;
    match parsed.ok().filter(|_| !text.starts_with('+')).and_then(|n| T::try_from(n).ok()) {
        Some(n) => Ok(n),
        None => refuse!("{flag} {text:?} is not a number from 0 to {largest}; try: {example}"),
    }
}

/// The name of a unit enum's value on the command line.
pub(crate) fn spelled(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_string()).unwrap_or_default()
}
