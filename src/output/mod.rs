//! From typed answers to what is printed.

pub(crate) mod json;
pub(crate) mod metrics;
pub(crate) mod text;
pub(crate) mod units;
