//! Signals, which end many a system call with EINTR

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::sys;

/// Runs something in the calling thread while signals interrupt its waits, a hundred times a second
///
/// Returns how many have been handled, too.
///
/// # Errors
/// What the system says.
pub fn interrupting<T>(f: impl FnOnce() -> T) -> io::Result<(T, usize)> {
    interrupting_every(Duration::from_millis(10), f)
}

/// The same at another pace, as fast as the system goes along
///
/// # Errors
/// What the system says.
pub fn interrupting_every<T>(interval: Duration, f: impl FnOnce() -> T) -> io::Result<(T, usize)> {
    sys::count_signals()?;
    let (done, target) = (AtomicBool::new(false), sys::Thread::current());
    let before = sys::signals();
    let result = thread::scope(|scope| {
        // Also when `f` panics, for the scope waits for the thread.
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

/// How many have been handled in this process
#[must_use]
pub fn count() -> usize {
    sys::signals()
}

/// Has the handler of these signals call a function; only the first call in a process counts
///
/// The function must be async-signal-safe. What it does to `errno` is seen by the interrupted thread.
pub fn call(f: fn()) {
    sys::call_on_signal(f);
}

/// A thread that stays in a signal handler, as if its CPU were busy with something more urgent; it goes on when this is
/// dropped
#[derive(Debug)]
pub struct Held(());

impl Held {
    /// Holds a thread of this process wherever it is, one at a time; a system call that it waits in has ended for it
    ///
    /// # Errors
    /// What the system says.
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
