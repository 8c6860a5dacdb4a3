//! Another process, and a process to which the system says no

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use rustix::process::{
    Pid, Resource, Rlimit, Signal, WaitOptions, getrlimit, kill_process, setrlimit, waitpid,
};

use crate::sys;

/// A copy of this process, with its memory and descriptors and one thread; killed when this is dropped
#[derive(Debug)]
pub struct Forked(Option<Pid>);

/// Forks; the copy does this alone, and drops nothing that it has from here
///
/// # Errors
/// What the system says.
pub fn fork(f: impl FnOnce()) -> io::Result<Forked> {
    sys::fork(f).map(Forked)
}

impl Forked {
    /// Kills it (`SIGKILL`), and returns when it has ended
    pub fn kill(self) {}

    /// Waits for its end as [`wait`](Self::wait) does, and stops it again and again meanwhile, as a debugger does, a cgroup's
    /// freezer or a hypervisor: each time for `pause`, after it has had `interval`
    ///
    /// # Errors
    /// What the system says.
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

    /// Waits for its end, and says whether it did what it should without a panic
    ///
    /// # Errors
    /// What the system says.
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

/// Runs something while this process can't have another descriptor (`RLIMIT_NOFILE`)
///
/// # Errors
/// What the system says.
pub fn without_descriptors<T>(f: impl FnOnce() -> T) -> io::Result<T> {
    // The number that the next one would get
    let next = File::open("/dev/null")?.as_raw_fd();
    with_descriptor_limit(next.try_into().map_err(io::Error::other)?, f)
}

/// Runs something while `RLIMIT_NOFILE` is this low; descriptors that are open stay open
///
/// # Errors
/// What the system says.
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

/// Runs something in a thread whose sends all fail with this error, by a seccomp filter
///
/// # Panics
/// When `f` panics, or where there is no seccomp.
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
