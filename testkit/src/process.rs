//! Child processes, and processes whose system calls fail

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use rustix::process::{
    Pid, Resource, Rlimit, Signal, WaitOptions, getrlimit, kill_process, setrlimit, waitpid,
};

use crate::sys;

/// A forked copy of this process, with one thread; dropping this kills it
#[derive(Debug)]
pub struct Forked(Option<Pid>);

/// Forks; the copy only runs `f`, and drops none of the values it inherits
///
/// # Errors
/// The system call's error.
pub fn fork(f: impl FnOnce()) -> io::Result<Forked> {
    sys::fork(f).map(Forked)
}

impl Forked {
    /// Kills the process (`SIGKILL`), and returns after its end
    pub fn kill(self) {}

    /// Waits like [`wait`](Self::wait), and repeatedly stops the process meanwhile
    ///
    /// The process runs for `interval` and is then stopped for `pause`, as by a debugger, a
    /// cgroup's freezer or a hypervisor.
    ///
    /// # Errors
    /// The system call's error.
    pub fn wait_while_stopping(mut self, pause: Duration, interval: Duration) -> io::Result<bool> {
        while let Some(child) = self.0 {
            thread::sleep(interval);
            if let Some((_, status)) = waitpid(Some(child), WaitOptions::NOHANG)? {
                self.0 = None;
                return Ok(status.exit_status() == Some(0));
            }
            kill_process(child, Signal::STOP)?;
            thread::sleep(pause);
            kill_process(child, Signal::CONT)?;
        }
        Ok(false)
    }

    /// Waits for the end of the process, and returns whether it ended without a panic
    ///
    /// # Errors
    /// The system call's error.
    pub fn wait(mut self) -> io::Result<bool> {
        let Some(child) = self.0.take() else {
            return Ok(false);
        };
        let ended = waitpid(Some(child), WaitOptions::empty())?;
        Ok(ended.is_some_and(|(_, status)| status.exit_status() == Some(0)))
    }
}

impl Drop for Forked {
    fn drop(&mut self) {
        if let Some(child) = self.0 {
            let _ = kill_process(child, Signal::KILL);
            let _ = waitpid(Some(child), WaitOptions::empty());
        }
    }
}

/// Runs `f` while this process cannot open another descriptor (`RLIMIT_NOFILE`)
///
/// # Errors
/// The system call's error.
pub fn without_descriptors<T>(f: impl FnOnce() -> T) -> io::Result<T> {
    // The number of the next descriptor
    let next = File::open("/dev/null")?.as_raw_fd();
    with_descriptor_limit(next.try_into().map_err(io::Error::other)?, f)
}

/// Runs `f` with this value of `RLIMIT_NOFILE`; open descriptors stay open
///
/// # Errors
/// The system call's error.
pub fn with_descriptor_limit<T>(limit: u64, f: impl FnOnce() -> T) -> io::Result<T> {
    let before = getrlimit(Resource::Nofile);
    let low = Rlimit {
        current: Some(limit),
        maximum: before.maximum,
    };
    setrlimit(Resource::Nofile, low)?;
    let result = f();
    setrlimit(Resource::Nofile, before)?;
    Ok(result)
}

/// Runs `f` in a thread with a seccomp filter: all its sends fail with this error
///
/// # Panics
/// When `f` panics, or on a kernel without seccomp.
pub fn without_sending<T: Send>(errno: u16, f: impl FnOnce() -> T + Send) -> T {
    let result = thread::scope(|scope| {
        let thread = scope.spawn(|| {
            sys::fail_sends(errno).expect("a kernel with seccomp filters");
            f()
        });
        thread.join()
    });
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Allows the calling thread, and threads that it starts, only these system calls (`SYS_poll`, …),
/// by a seccomp filter
///
/// Any other call ends the process with status 1, after a line with the call's number.
///
/// # Errors
/// The system's error.
#[cfg(target_arch = "x86_64")]
pub fn allow_only(calls: &[i64]) -> io::Result<()> {
    sys::allow_only(calls)
}
