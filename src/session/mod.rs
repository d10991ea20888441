//! A session: what is wanted, what is there, and how the one becomes the other.

pub mod firewall;
pub mod home;
pub mod make;
pub mod outs;
pub mod read;
pub mod relay;
pub mod remotes;
pub mod repair;
pub mod resolve;
pub mod stack;
pub mod swap;
pub mod taps;
pub mod teardown;
