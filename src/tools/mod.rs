//! The outer programs, each by typed verbs. JSON in, typed values out.

pub mod bpftool;
pub mod clang;
pub mod exec;
pub mod ip;
pub mod kernel;
pub mod tc;
