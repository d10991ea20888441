//! What is written into the kernel: layouts, outer headers, filters as C.

pub(crate) mod abi;
pub(crate) mod filter;
pub(crate) mod objects;
pub(crate) mod parts;
pub(crate) mod reason;
pub(crate) mod shapes;
pub(crate) mod source;
pub(crate) mod spread;
pub(crate) mod template;
