//! What is written into the kernel: layouts, outer headers, filters as C.

pub mod abi;
pub mod filter;
pub mod template;
