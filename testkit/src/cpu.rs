//! Which CPU something happens on (a local packet goes through its hooks on that of its sender), and how long it takes

use std::io;
use std::thread;
use std::time::Duration;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

/// How long the calling thread has run, which does not grow while others have the CPU
#[must_use]
pub fn time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.try_into().expect("it is not negative")
}

/// How long all threads of this process have run, those that have ended included
#[must_use]
pub fn process_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.try_into().expect("it is not negative")
}

/// The CPUs that the calling thread may run on
///
/// # Errors
/// What the system says; EINVAL on a machine with more than 1024.
pub fn allowed() -> io::Result<Vec<usize>> {
    let set = sched_getaffinity(None)?;
    Ok((0..CpuSet::MAX_CPU)
        .filter(|&cpu| set.is_set(cpu))
        .collect())
}

/// Runs something in a thread that stays on one CPU
///
/// # Errors
/// What the system says; EINVAL if the thread may not run there.
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
