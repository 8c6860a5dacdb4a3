//! System calls: the real ones, or those of a fuzz target's kernel

#[cfg(fuzzing)]
mod fuzz;
mod linux;

#[cfg(fuzzing)]
pub(crate) use fuzz::*;
#[cfg(fuzzing)]
pub use fuzz::{Kernel, with_kernel};
#[cfg(not(fuzzing))]
pub(crate) use linux::*;
