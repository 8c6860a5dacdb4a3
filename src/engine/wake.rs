//! Wakers, and the one outstanding wake message
//!
//! A wake message is a request that does nothing. Its acknowledgement makes the descriptor
//! readable and ends a blocked receive call. At most one wake message is outstanding. The kernel
//! loses its acknowledgement if the receive buffer is full, so three events clear the flag: the
//! acknowledgement, an overrun, and a read that finds the socket empty. Where the kernel may not
//! report the loss, every read clears the flag, and so does a request that waits for a blocked
//! reader. A reader never blocks while the flag is set: it
//! first receives without blocking, which clears the flag in the end.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nfqnl_proto::{RequestHeader, consts::MESSAGE_HEADER_LEN, encode_noop};

use crate::sys;

/// The sequence number of wake messages; requests count from 1
pub(super) const WAKE_SEQ: u32 = 0;

/// Calls of [`Waker::wake_all`] in this process, of all sockets
///
/// A batch has the count at its creation and at its last call, so each loop sees a later call of
/// `wake_all` once, also on its way into a receive call.
static WAKE_ALLS: AtomicU32 = AtomicU32::new(0);

/// Returns the count of [`Waker::wake_all`] for a new batch
pub(crate) fn wake_alls() -> u32 {
    WAKE_ALLS.load(SeqCst)
}

/// State of the engine and its wakers; without locks, because signal handlers use it
#[derive(Debug)]
pub(crate) struct Wake {
    fd: RawFd,
    /// Distinguishes this engine from the engine of an earlier process with the same id
    salt: u32,
    /// [`sys::generation`] when it was made
    process: u32,
    /// The descriptor is about to be closed
    is_closed: AtomicBool,
    /// Threads that may be using the descriptor
    users: AtomicU32,
    /// A wake not yet seen by a receive call
    is_requested: AtomicBool,
    /// The value of [`WAKE_ALLS`] at the last call of [`Waker::wake_all`] for this socket
    all: AtomicU32,
    is_outstanding: AtomicBool,
}

impl Wake {
    pub(super) fn new(fd: RawFd) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            fd,
            salt: now.map_or(0, |now| now.subsec_nanos()),
            process: sys::generation(),
            is_closed: AtomicBool::new(false),
            users: AtomicU32::new(0),
            is_requested: AtomicBool::new(false),
            all: AtomicU32::new(0),
            is_outstanding: AtomicBool::new(false),
        }
    }

    /// Returns the mark of this engine's requests; the kernel copies it to the answers
    ///
    /// A socket that was given away, or inherited by fork, also gets answers to other requests.
    pub(super) fn mark(&self) -> u32 {
        std::process::id() ^ self.salt
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
                pid: self.mark(),
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
        // Each packet may lead here, and a store costs much more than a load.
        if self.is_outstanding() {
            self.is_outstanding.store(false, SeqCst);
        }
    }

    /// Returns the newer one of `seen` and the count at the last [`Waker::wake_all`]
    #[inline]
    pub(super) fn all_since(&self, seen: u32) -> u32 {
        let all = self.all.load(SeqCst);
        match all.wrapping_sub(seen) <= u32::MAX / 2 {
            true => all,
            false => seen,
        }
    }

    /// Returns true if a receive call must end; `seen` is the count of [`Waker::wake_all`] that its
    /// loop knows of
    ///
    /// If there is a wake for one call, this call takes it.
    #[inline]
    pub(super) fn take(&self, seen: u32) -> bool {
        let is_for_one = self.is_requested.load(SeqCst) && self.is_requested.swap(false, SeqCst);
        is_for_one || self.all_since(seen) != seen
    }

    /// Waits until no waker uses the descriptor; later wakes leave it alone
    pub(super) fn close(&self) {
        self.is_closed.store(true, SeqCst);
        // A child has a copy of the number, and not the threads.
        while self.users.load(SeqCst) > 0 && self.process == sys::generation() {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

/// Ends receive calls of a [`Socket`](crate::Socket) from other threads and from signal handlers;
/// made by [`Socket::waker`](crate::Socket::waker)
///
/// The receive call returns without events. [`wake`](Self::wake) ends one call; if none waits, the
/// next one returns at once. [`wake_all`](Self::wake_all) ends one call of each loop, that is of
/// each [`RecvBatch`](crate::RecvBatch), waiting or next; use it to stop. Several wakes before a
/// call count as one. Clones are cheap. A waker does not keep the socket open. It does nothing
/// once the socket is closed.
///
/// [`wake`](Self::wake) and [`wake_all`](Self::wake_all) are async-signal-safe: they take no lock,
/// allocate nothing, and leave `errno` as it was.
///
/// A wake ends a call that waits: `recv`, `recv_timeout`, `run_once` and `run_timeout`. It also
/// makes the descriptor readable, so poll(2) returns too. If two processes receive from the socket
/// after a fork(2), a wake may be lost: use timeouts there. It does not end a future of
/// `AsyncSocket`: drop the future instead.
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
        let count = WAKE_ALLS.fetch_add(1, SeqCst).wrapping_add(1);
        self.wake.all.store(count, SeqCst);
        self.wake();
    }
}
