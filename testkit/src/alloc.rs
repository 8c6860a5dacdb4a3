//! Memory that is taken: a global allocator that counts
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

/// How many bytes of this process are in memory now, whatever they are for (`Rss` of `/proc/self/smaps_rollup`)
///
/// # Errors
/// Without /proc, and before Linux 4.14.
pub fn resident() -> io::Result<usize> {
    const KIB: usize = 1024;
    let rollup = fs::read_to_string("/proc/self/smaps_rollup")?;
    rollup
        .lines()
        .find_map(|line| line.strip_prefix("Rss:")?.strip_suffix("kB"))
        .and_then(|number| number.trim().parse::<usize>().ok())
        .map(|kib| kib * KIB)
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}
