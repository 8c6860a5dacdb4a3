//! Memory use: a counting global allocator, and the memory of this process
//!
//! ```
//! use nfqnl_testkit::alloc::CountingAllocator;
//!
//! #[global_allocator]
//! static ALLOCATOR: CountingAllocator = CountingAllocator::new();
//!
//! let before = ALLOCATOR.allocations();
//! let kept = std::hint::black_box(vec![1_u8; 100]);
//! assert_eq!(ALLOCATOR.allocations() - before, 1);
//! # drop(kept);
//! ```

use std::fs;
use std::io;

pub use crate::sys::CountingAllocator;

/// Returns the resident memory of this process in bytes, including its program and libraries
///
/// # Errors
/// Without /proc, and before Linux 4.14.
pub fn resident() -> io::Result<usize> {
    in_memory("Rss:")
}

/// Returns the resident memory of heap and stack in bytes, without program and libraries
///
/// # Errors
/// As [`resident`].
pub fn touched() -> io::Result<usize> {
    in_memory("Anonymous:")
}

fn in_memory(kind: &str) -> io::Result<usize> {
    const KIB: usize = 1024;
    let rollup = fs::read_to_string("/proc/self/smaps_rollup")?;
    rollup
        .lines()
        .find_map(|line| line.strip_prefix(kind)?.strip_suffix("kB"))
        .and_then(|number| number.trim().parse::<usize>().ok())
        .map(|kib| kib * KIB)
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}
