//! What stands in for `sys` where a fuzz target is built (`--cfg fuzzing`): the same calls, answered by the target's own
//! kernel if the thread runs under one, and by the real one otherwise
//!
//! Everything that the library hears from the kernel it hears through these calls, so a target needs no other way in: the
//! code above them is the code that runs everywhere. A program that uses this crate and is fuzzed itself sets no kernel,
//! and has the real one.

use std::cell::RefCell;
use std::io;
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::sync::{Condvar, MutexGuard};
use std::time::{Duration, Instant};

use netlink_sys::Socket;

#[path = "sys.rs"]
mod real;

pub(crate) use self::real::*;

/// A target's kernel: what it does with one socket
///
/// The library may hold its locks during a call, so none may call back into a handle, but from [`send`](Self::send) of
/// verdicts: there other threads can be played that receive and send.
pub trait Kernel {
    /// `send(2)`
    fn send(&self, messages: &[u8]) -> io::Result<usize>;
    /// `recvmmsg(2)`, or `recvfrom(2)` into one slot: at most one datagram for each slot and length; where it may wait, it can
    /// also say `EAGAIN`, as a non-blocking descriptor does
    fn receive(
        &self,
        may_wait: bool,
        slots: &mut dyn Iterator<Item = &mut [u8]>,
        lens: &mut [usize],
    ) -> io::Result<usize>;
    /// `poll(2)` for input; a wait without end has to end by something to receive, or in an error
    fn wait_readable(&self, timeout: libc::c_int) -> io::Result<bool>;
    /// How many messages the socket had no room for
    fn drops(&self) -> io::Result<u32>;
    /// `capget(2)`
    fn has_net_admin(&self) -> bool;
    /// `membarrier(2)`
    fn wait_for_rcu(&self) -> io::Result<()>;
    /// The longest datagram that it sends, if whoever receives has the room
    fn longest(&self) -> usize;
    /// The monotonic clock
    fn now(&self) -> Instant;
    /// A wait for another thread, of which there is none: this time has to pass
    fn pass(&self, time: Duration);
}

thread_local! {
    static KERNEL: RefCell<Option<Rc<dyn Kernel>>> = const { RefCell::new(None) };
}

/// Runs something with this kernel under every handle of the thread
pub fn with_kernel<T>(kernel: Rc<dyn Kernel>, run: impl FnOnce() -> T) -> T {
    let before = KERNEL.replace(Some(kernel));
    let result = run();
    KERNEL.set(before);
    result
}

fn kernel() -> Option<Rc<dyn Kernel>> {
    KERNEL.with_borrow(Clone::clone)
}

pub(crate) fn send(socket: &Socket, messages: &[u8]) -> io::Result<usize> {
    match kernel() {
        Some(kernel) => kernel.send(messages),
        None => real::send(socket, messages),
    }
}

pub(crate) fn recv_many<'s>(
    fd: BorrowedFd<'_>,
    wait: Wait,
    sender: Sender,
    mut slots: impl Iterator<Item = &'s mut [u8]>,
    lens: &mut [usize],
) -> io::Result<(usize, u64)> {
    match kernel() {
        Some(kernel) => {
            let n = kernel.receive(wait == Wait::ForFirst, &mut slots, lens)?;
            Ok((n, 0))
        }
        None => real::recv_many(fd, wait, sender, slots, lens),
    }
}

pub(crate) fn recv_one(
    fd: BorrowedFd<'_>,
    wait: Wait,
    sender: Sender,
    slot: &mut [u8],
) -> io::Result<Option<usize>> {
    let Some(kernel) = kernel() else {
        return real::recv_one(fd, wait, sender, slot);
    };
    let mut len = [0];
    kernel.receive(wait == Wait::ForFirst, &mut std::iter::once(slot), &mut len)?;
    Ok(Some(len[0]))
}

pub(crate) fn wait_readable(fd: BorrowedFd<'_>, timeout: libc::c_int) -> io::Result<bool> {
    match kernel() {
        Some(kernel) => kernel.wait_readable(timeout),
        None => real::wait_readable(fd, timeout),
    }
}

pub(crate) fn drops(fd: BorrowedFd<'_>) -> io::Result<u32> {
    match kernel() {
        Some(kernel) => kernel.drops(),
        None => real::drops(fd),
    }
}

pub(crate) fn has_net_admin() -> bool {
    kernel().map_or_else(real::has_net_admin, |kernel| kernel.has_net_admin())
}

pub(crate) fn wait_for_rcu() -> io::Result<()> {
    kernel().map_or_else(real::wait_for_rcu, |kernel| kernel.wait_for_rcu())
}

pub(crate) fn room_for(longest: usize) -> Vec<u8> {
    real::room_for(kernel().map_or(longest, |kernel| kernel.longest()))
}

pub(crate) fn now() -> Instant {
    kernel().map_or_else(real::now, |kernel| kernel.now())
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
        None => real::wait_for(changed, guard, at_most),
    }
}

pub(crate) fn is_single_cpu() -> bool {
    kernel().is_none() && real::is_single_cpu()
}
