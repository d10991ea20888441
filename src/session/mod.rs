//! A session: what is wanted, what is there, and how the one becomes the other.
//!
//! ```text
//!     request ─ resolve ─▶ Wanted ──┐
//!                                   ├─ difference ─▶ [Change] ─ Executor ─▶ kernel
//!     kernel ── read ────▶ There ───┘
//! ```

pub(crate) mod ages;
pub(crate) mod ahead;
pub(crate) mod alive;
pub(crate) mod away;
pub(crate) mod bypassed;
pub(crate) mod change;
pub(crate) mod clock;
pub(crate) mod counted;
pub(crate) mod delivered;
pub(crate) mod difference;
pub(crate) mod engine;
pub(crate) mod firewall;
pub(crate) mod health;
pub(crate) mod home;
pub(crate) mod hops;
pub(crate) mod law;
pub(crate) mod machine;
pub(crate) mod outside;
pub(crate) mod pattern;
pub(crate) mod plain;
pub(crate) mod probe;
pub(crate) mod refs;
pub(crate) mod relay;
pub(crate) mod resolve;
pub(crate) mod rivals;
pub(crate) mod stack;
pub(crate) mod stats;
pub(crate) mod stored;
pub(crate) mod there;
pub(crate) mod upgrade;
pub(crate) mod version;
