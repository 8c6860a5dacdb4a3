//! The system calls of another process, without a program such as strace

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::process::parent_id;

use crate::sys::{Stop, Traced};

/// Returns the calling thread's id, for a tracer in another process
///
/// # Errors
/// Without /proc.
pub fn thread_id() -> io::Result<i32> {
    let link = fs::read_link("/proc/thread-self")?;
    let id = link.file_name().and_then(|id| id.to_str()?.parse().ok());
    id.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Makes a rarely used system call as a mark for [`SystemCalls::between_marks`]
pub fn mark() {
    let _ = parent_id();
}

/// The system calls of one thread of another process
///
/// The thread runs only while [`next`](Iterator::next) waits for its next call. It continues
/// freely when this value is dropped. Use this value from one thread, because the kernel accepts
/// requests only from the tracing thread.
#[derive(Debug)]
pub struct SystemCalls(Traced);

impl SystemCalls {
    /// Begins to trace a thread of a child of this process
    ///
    /// # Errors
    /// The kernel's error; EPERM if a security module forbids tracing.
    pub fn of(thread: i32) -> io::Result<Self> {
        Traced::seize(thread).map(Self)
    }

    /// Counts the thread's calls between its next two [`mark`]s, by system call number
    ///
    /// # Errors
    /// The kernel's error; `UnexpectedEof` if the thread ends first.
    pub fn between_marks(&mut self) -> io::Result<BTreeMap<u64, usize>> {
        let mut begun = false;
        let mut counted = BTreeMap::new();
        for call in self {
            let call = call?;
            match (u64::try_from(libc::SYS_getppid) == Ok(call), begun) {
                (true, false) => begun = true,
                (true, true) => return Ok(counted),
                (false, true) => *counted.entry(call).or_default() += 1,
                (false, false) => {}
            }
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

impl Iterator for SystemCalls {
    /// The call's number (`SYS_recvmmsg`, …)
    type Item = io::Result<u64>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.0.go_on() {
                Ok(Stop::Call(number)) => return Some(Ok(number)),
                Ok(Stop::Other) => {}
                Ok(Stop::Ended) => return None,
                Err(error) => return Some(Err(error)),
            }
        }
    }
}
