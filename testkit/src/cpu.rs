//! Choice of a CPU, and CPU time
//!
//! A local packet passes its hooks on the CPU of its sender.

use std::io;
use std::thread;
use std::time::Duration;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

/// Returns the CPU time of the calling thread; it does not grow while other threads have the CPU
#[must_use]
pub fn time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.try_into().expect("it is not negative")
}

/// Returns the CPU time of all threads of this process, including ended ones
#[must_use]
pub fn process_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.try_into().expect("it is not negative")
}

/// Returns the CPUs on which the calling thread may run
///
/// # Errors
/// The system call's error; EINVAL on a machine with more than 1024 CPUs.
pub fn allowed() -> io::Result<Vec<usize>> {
    let set = sched_getaffinity(None)?;
    Ok((0..CpuSet::MAX_CPU)
        .filter(|&cpu| set.is_set(cpu))
        .collect())
}

/// Runs `f` in a thread bound to one CPU
///
/// # Errors
/// The system call's error; EINVAL if the thread may not run there.
///
/// # Panics
/// When `f` panics.
pub fn on<T: Send>(cpu: usize, f: impl FnOnce() -> T + Send) -> io::Result<T> {
    let result = thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if cpu >= CpuSet::MAX_CPU {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let mut set = CpuSet::new();
            set.set(cpu);
            sched_setaffinity(None, &set)?;
            Ok(f())
        });
        thread.join()
    });
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
