//! Signals; they interrupt system calls with EINTR

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::sys;

/// Runs `f` in the calling thread while signals interrupt it a hundred times a second
///
/// Also returns the number of handled signals.
///
/// # Errors
/// The system call's error.
pub fn interrupting<T>(f: impl FnOnce() -> T) -> io::Result<(T, usize)> {
    interrupting_every(Duration::from_millis(10), f)
}

/// Like [`interrupting`], at another interval
///
/// # Errors
/// The system call's error.
pub fn interrupting_every<T>(interval: Duration, f: impl FnOnce() -> T) -> io::Result<(T, usize)> {
    sys::count_signals()?;
    let (done, target) = (AtomicBool::new(false), sys::Thread::current());
    let before = sys::signals();
    let result = thread::scope(|scope| {
        // Sets `done` even if `f` panics, because the scope waits for the thread.
        let _end = SetOnDrop(&done);
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                target.signal();
                thread::sleep(interval);
            }
        });
        f()
    });
    Ok((result, sys::signals() - before))
}

/// Returns the number of signals handled in this process
#[must_use]
pub fn count() -> usize {
    sys::signals()
}

/// Makes the handler of these signals call a function; only the first `call` in a process counts
///
/// The function must be async-signal-safe. The interrupted thread sees its changes to `errno`.
pub fn call(f: fn()) {
    sys::call_on_signal(f);
}

/// A thread held in a signal handler, as if its CPU were busy; dropping this releases the thread
#[derive(Debug)]
pub struct Held(());

impl Held {
    /// Holds a thread of this process, one at a time
    ///
    /// The signal interrupts a waiting system call of the thread.
    ///
    /// # Errors
    /// The system call's error.
    pub fn new(thread: i32) -> io::Result<Self> {
        sys::hold(thread)?;
        Ok(Self(()))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        sys::release();
    }
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
