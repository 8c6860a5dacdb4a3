//! System calls: the real ones, or those of a fuzz target's kernel

#[cfg(nfqnl_fuzzing)]
#[path = "../fuzz/kernel.rs"]
mod fuzz;
mod linux;

#[cfg(nfqnl_fuzzing)]
pub(crate) use fuzz::*;
#[cfg(nfqnl_fuzzing)]
pub use fuzz::{Kernel, with_kernel};
#[cfg(not(nfqnl_fuzzing))]
pub(crate) use linux::*;
