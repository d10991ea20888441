//! From typed answers to what is printed.

pub(crate) mod json;
pub(crate) mod text;
