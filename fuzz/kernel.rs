//! System calls in a fuzz target (`--cfg nfqnl_fuzzing`): those of the target's kernel if the
//! thread has one, else the real ones
//!
//! `src/sys.rs` includes this file. Everything from the kernel reaches the library through these
//! calls, so a target needs no other way in.

use std::cell::RefCell;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::rc::Rc;
use std::sync::{Condvar, MutexGuard};
use std::time::{Duration, Instant};

use super::linux;

pub(crate) use super::linux::*;

/// A target's kernel, for one socket
///
/// The library may hold its locks during a call, so a call must not use the socket. The exception
/// is [`send`](Self::send) of verdicts: there a target can play other threads.
pub trait Kernel {
    /// `send(2)`
    fn send(&self, messages: &[u8]) -> io::Result<usize>;
    /// `recvmmsg(2)`, or `recv(2)` into one slot: at most one datagram for each slot and length
    ///
    /// A slot has two parts.
    ///
    /// If it may block, it may also return `EAGAIN`, like a non-blocking descriptor.
    fn receive(
        &self,
        may_block: bool,
        slots: &mut dyn Iterator<Item = [&mut [u8]; 2]>,
        lens: &mut [usize],
    ) -> io::Result<usize>;
    /// `poll(2)` for input; a wait without end must end with a datagram or an error
    fn wait_readable(&self, timeout: libc::c_int) -> io::Result<bool>;
    /// `membarrier(2)`
    fn wait_for_rcu(&self) -> io::Result<()>;
    /// The length of the longest datagram from this kernel
    fn longest(&self) -> usize;
    /// The monotonic clock
    fn now(&self) -> Instant;
    /// The number of forks so far
    fn forks(&self) -> u32;
    /// A wait for another thread; there is none, so this time must pass
    fn pass(&self, time: Duration);
}

thread_local! {
    static KERNEL: RefCell<Option<Rc<dyn Kernel>>> = const { RefCell::new(None) };
}

/// Runs a closure with this kernel under every socket of the thread
pub fn with_kernel<T>(kernel: Rc<dyn Kernel>, run: impl FnOnce() -> T) -> T {
    let before = KERNEL.replace(Some(kernel));
    let result = run();
    KERNEL.set(before);
    result
}

fn kernel() -> Option<Rc<dyn Kernel>> {
    KERNEL.with_borrow(Clone::clone)
}

pub(crate) fn send(fd: BorrowedFd<'_>, messages: &[u8]) -> io::Result<usize> {
    match kernel() {
        Some(kernel) => kernel.send(messages),
        None => linux::send(fd, messages),
    }
}

pub(crate) fn send_in_signal_handler(fd: RawFd, message: &[u8]) -> bool {
    match kernel() {
        Some(kernel) => kernel.send(message).is_ok(),
        None => linux::send_in_signal_handler(fd, message),
    }
}

/// Shorter than most packets of the targets
pub(crate) const HEAD_LEN: usize = 68;

pub(crate) fn recv_many<'s>(
    fd: BorrowedFd<'_>,
    block: Block,
    mut slots: impl Iterator<Item = [&'s mut [u8]; 2]>,
    lens: &mut [usize],
) -> io::Result<usize> {
    match kernel() {
        Some(kernel) => kernel.receive(block == Block::ForFirst, &mut slots, lens),
        None => linux::recv_many(fd, block, slots, lens),
    }
}

pub(crate) fn recv_one(fd: BorrowedFd<'_>, block: Block, slot: &mut [u8]) -> io::Result<usize> {
    let Some(kernel) = kernel() else {
        return linux::recv_one(fd, block, slot);
    };
    let mut len = [0];
    kernel.receive(
        block == Block::ForFirst,
        &mut std::iter::once([slot, &mut []]),
        &mut len,
    )?;
    Ok(len[0])
}

pub(crate) fn recv_from(fd: BorrowedFd<'_>, slot: &mut [u8]) -> io::Result<(usize, u32)> {
    match kernel() {
        Some(_) => Ok((recv_one(fd, Block::No, slot)?, 0)),
        None => linux::recv_from(fd, slot),
    }
}

pub(crate) fn wait_readable(fd: BorrowedFd<'_>, timeout: libc::c_int) -> io::Result<bool> {
    match kernel() {
        Some(kernel) => kernel.wait_readable(timeout),
        None => linux::wait_readable(fd, timeout),
    }
}

pub(crate) fn wait_for_rcu() -> io::Result<()> {
    kernel().map_or_else(linux::wait_for_rcu, |kernel| kernel.wait_for_rcu())
}

pub(crate) fn room_for(longest: usize) -> Vec<u8> {
    linux::room_for(kernel().map_or(longest, |kernel| kernel.longest()))
}

pub(crate) fn now() -> Instant {
    kernel().map_or_else(linux::now, |kernel| kernel.now())
}

pub(crate) fn wait_for<'g, T>(
    changed: &Condvar,
    guard: MutexGuard<'g, T>,
    at_most: Duration,
) -> MutexGuard<'g, T> {
    match kernel() {
        Some(kernel) => {
            kernel.pass(at_most);
            guard
        }
        None => linux::wait_for(changed, guard, at_most),
    }
}

pub(crate) fn is_single_cpu() -> bool {
    kernel().is_none() && linux::is_single_cpu()
}

pub(crate) fn forks() -> u32 {
    kernel().map_or_else(linux::forks, |kernel| kernel.forks())
}
