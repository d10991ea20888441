//! The outer programs, each by typed verbs. JSON in, typed values out. Nothing here knows what a session is.

pub(crate) mod batch;
pub(crate) mod bpftool;
pub(crate) mod clang;
pub(crate) mod ethtool;
pub(crate) mod exec;
pub(crate) mod fifo;
pub(crate) mod interrupt;
pub(crate) mod ip;
pub(crate) mod json;
pub(crate) mod kernel;
pub(crate) mod log;
pub(crate) mod notes;
pub(crate) mod ping;
pub(crate) mod requirements;
pub(crate) mod rights;
pub(crate) mod tc;

#[cfg(test)]
mod odd_test;
