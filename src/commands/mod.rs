//! One file a verb or noun of the command line: each runs what was asked and prints the result.

pub mod capture;
pub mod demo;
pub mod doctor;
