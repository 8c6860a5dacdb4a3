//! Another process, and a process to which the system says no

use std::io;
use std::thread;

use crate::sys;

/// A copy of this process, with its memory and descriptors and one thread; killed when this is dropped
#[derive(Debug)]
pub struct Forked(Option<libc::pid_t>);

/// Forks; the copy does this alone, and drops nothing that it has from here
///
/// # Errors
/// What the system says.
pub fn fork(f: impl FnOnce()) -> io::Result<Forked> {
    sys::fork(f).map(|child| Forked(Some(child)))
}

impl Forked {
    /// Kills it (`SIGKILL`), and returns when it has ended
    pub fn kill(self) {}

    /// Waits for its end, and says whether it did what it should without a panic
    ///
    /// # Errors
    /// What the system says.
    pub fn wait(mut self) -> io::Result<bool> {
        self.0.take().map_or(Ok(false), sys::wait_for)
    }
}

impl Drop for Forked {
    fn drop(&mut self) {
        if let Some(child) = self.0 {
            sys::kill(child);
            let _ = sys::wait_for(child);
        }
    }
}

/// Runs something while this process can't have another descriptor (`RLIMIT_NOFILE`)
///
/// # Errors
/// What the system says.
pub fn without_descriptors<T>(f: impl FnOnce() -> T) -> io::Result<T> {
    let next = sys::next_descriptor()?;
    let before = sys::limit_descriptors(next)?;
    let result = f();
    sys::limit_descriptors(before)?;
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
