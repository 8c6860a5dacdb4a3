//! Wakers, and the one outstanding wake message
//!
//! A wake message is a request that does nothing. Its acknowledgement makes the descriptor
//! readable and ends a blocked receive call. At most one wake message is outstanding. The kernel
//! loses its acknowledgement if the receive buffer is full, so three events clear the flag: the
//! acknowledgement, an overrun, and a read that finds the socket empty. Where the kernel may not
//! report the loss, every read clears the flag. A reader never blocks while the flag is set: it
//! first receives without blocking, which clears the flag in the end.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};

use nfqnl_proto::{RequestHeader, consts::MESSAGE_HEADER_LEN, encode_noop};

use crate::sys;

/// The sequence number of wake messages; requests count from 1
pub(super) const WAKE_SEQ: u32 = 0;

/// State of the engine and its wakers; without locks, because signal handlers use it
#[derive(Debug)]
pub(crate) struct Wake {
    fd: RawFd,
    /// The descriptor is about to be closed
    is_closed: AtomicBool,
    /// Threads that may be using the descriptor
    users: AtomicU32,
    /// A wake not yet seen by a receive call
    is_requested: AtomicBool,
    /// The number of calls of [`Waker::wake_all`]
    all: AtomicU32,
    is_outstanding: AtomicBool,
}

impl Wake {
    pub(super) const fn new(fd: RawFd) -> Self {
        Self {
            fd,
            is_closed: AtomicBool::new(false),
            users: AtomicU32::new(0),
            is_requested: AtomicBool::new(false),
            all: AtomicU32::new(0),
            is_outstanding: AtomicBool::new(false),
        }
    }

    /// Makes the descriptor readable
    pub(super) fn make_readable(&self) {
        if self.is_outstanding.swap(true, SeqCst) {
            return;
        }
        self.users.fetch_add(1, SeqCst);
        if !self.is_closed.load(SeqCst) {
            let mut message = [0; MESSAGE_HEADER_LEN];
            let header = RequestHeader {
                ack: true,
                seq: WAKE_SEQ,
                ..RequestHeader::default()
            };
            let is_sent = encode_noop(&mut message, header).is_ok()
                && sys::send_in_signal_handler(self.fd, &message);
            if !is_sent {
                self.clear_outstanding();
            }
        }
        self.users.fetch_sub(1, SeqCst);
    }

    /// Returns true if an acknowledgement may still come
    #[inline]
    pub(super) fn is_outstanding(&self) -> bool {
        self.is_outstanding.load(SeqCst)
    }

    /// Returns true if a wake has ended no receive call yet
    pub(super) fn is_requested(&self) -> bool {
        self.is_requested.load(SeqCst)
    }

    /// Records that no acknowledgement will come
    #[inline]
    pub(super) fn clear_outstanding(&self) {
        self.is_outstanding.store(false, SeqCst);
    }

    /// Returns the number of calls of [`Waker::wake_all`]
    #[inline]
    pub(super) fn all(&self) -> u32 {
        self.all.load(SeqCst)
    }

    /// Returns true if a receive call must end; `began` is [`all`](Self::all) when the call began
    ///
    /// If there is a wake for one call, this call takes it.
    #[inline]
    pub(super) fn take(&self, began: u32) -> bool {
        let is_for_one = self.is_requested.load(SeqCst) && self.is_requested.swap(false, SeqCst);
        is_for_one || self.all() != began
    }

    /// Waits until no waker uses the descriptor; later wakes leave it alone
    pub(super) fn close(&self) {
        self.is_closed.store(true, SeqCst);
        while self.users.load(SeqCst) > 0 {
            std::thread::yield_now();
        }
    }
}

/// Ends receive calls of a [`Socket`](crate::Socket) from other threads and from signal handlers;
/// made by [`Socket::waker`](crate::Socket::waker)
///
/// The receive call returns without events. If no call waits, the next one returns at once.
/// Several wakes before it count as one. Clones are cheap. A waker does not keep the socket open,
/// and does nothing once the socket is closed.
///
/// [`wake`](Self::wake) and [`wake_all`](Self::wake_all) are async-signal-safe: they take no lock,
/// allocate nothing, and leave `errno` as it was.
///
/// A wake ends a call that waits: `recv`, `recv_timeout`, `run_once` and `run_timeout`. It also
/// makes the descriptor readable, so poll(2) returns too.
///
/// ```
/// # fn f(socket: nfqnl::Socket) -> nfqnl::Result<()> {
/// use std::sync::atomic::{AtomicBool, Ordering};
///
/// static STOP: AtomicBool = AtomicBool::new(false);
/// let waker = socket.waker();
/// std::thread::spawn(move || {
///     std::thread::sleep(std::time::Duration::from_secs(60));
///     STOP.store(true, Ordering::Release);
///     waker.wake_all();
/// });
/// let mut batch = nfqnl::RecvBatch::default();
/// while !STOP.load(Ordering::Acquire) {
///     for event in socket.recv(&mut batch)? {
///         println!("{event}");
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Waker {
    wake: Arc<Wake>,
}

impl Waker {
    pub(crate) const fn new(wake: Arc<Wake>) -> Self {
        Self { wake }
    }

    /// Ends one receive call
    pub fn wake(&self) {
        self.wake.is_requested.store(true, SeqCst);
        self.wake.make_readable();
    }

    /// Ends all receive calls
    pub fn wake_all(&self) {
        self.wake.all.fetch_add(1, SeqCst);
        self.wake();
    }
}
