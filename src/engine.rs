//! The engine: one netlink socket, its queues, and the rules for the threads that share it
//!
//! The kernel ties a queue to the socket that bound it, so answers to requests and packets arrive
//! in one stream. These rules keep them apart without losing any:
//!
//! * **One reader.** A thread reads under the lock on [`State`], and records each datagram before
//!   it releases the lock. A thread that waits for the socket releases the lock and sets
//!   `State::reader`. Other threads then wait for `reader_left`, which wakes one of them.
//! * **One exception.** A thread that is alone blocks in the receive call without the lock. If
//!   another thread's request finds it there, and it does not come back in 5 ms, the request reads
//!   too, unless orphans of an adoption wait for their first packet. Packets may then be recorded
//!   out of order, and an id gap ends merging.
//! * **Requests read too.** A request reads until its answer is there. If another thread is
//!   blocked in the receive call, the answer wakes the blocked thread, which records it. Packets
//!   read by a request go to the stash. The stash is served before the socket.
//! * **The descriptor is readable whenever a receive call would return something.** While the
//!   stash has entries, a wake message makes it readable (`wake.rs`).
//!
//! A thread takes locks in this order: [`State`], then [`Engine::bindings`], then one binding's
//! `outstanding`. Senders hold `bindings` shared across their system call, so no binding ends
//! during a send; a bind and an unbind wait for the sends under way. No thread holds these locks
//! while it waits for a message, or while it runs a callback.
//!
//! `docs/architecture.md` has the picture.

mod adopt;
mod bind;
mod bindings;
mod receive;
mod requests;
mod send;
mod wake;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{
    AtomicBool, AtomicU32, AtomicUsize,
    Ordering::{Acquire, Relaxed},
};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use netlink_sys::Socket as Netlink;
use nfqnl_proto::PacketKey;

use crate::recv_batch::Stashed;
use crate::stats::Stats;
use crate::sys;
use crate::verdict::{Seen, SendBatch};

pub(crate) use self::bindings::{Binding, BindingId, Bindings};
use self::receive::Reader;
pub(crate) use self::receive::{Kind, Wait};
use self::requests::Request;
pub(crate) use self::requests::retry_lost_ack;
pub use self::wake::Waker;
pub(crate) use self::wake::{Wake, wake_alls};

/// One socket, and everything shared by its users
#[derive(Debug)]
pub(crate) struct Engine {
    socket: Netlink,
    /// Unique among the engines of the process
    pub(crate) id: usize,
    /// The maximum number of bytes in one send
    max_send: usize,
    /// The maximum number of unread answers to sends; above it, a send reads the socket
    max_unread: u32,
    reports_overruns: bool,
    /// The time of receiving without blocking before a wait
    pub(crate) busy_poll: Duration,
    /// Dropped queues are unbound
    pub(crate) unbinds_on_drop: bool,
    /// Equal verdicts are merged
    merges: AtomicBool,
    /// The program may receive on the descriptor itself and pass datagrams on
    pub(crate) may_be_read_outside: AtomicBool,
    /// [`sys::forks`] when the engine was made
    forks: u32,
    /// The program has passed a datagram on
    is_read_outside: AtomicBool,
    /// Overruns reported so far
    overruns: AtomicU32,
    /// The number of messages that the kernel may have refused, minus the datagrams read since
    unread: AtomicU32,
    /// Queues unbound so far
    endings: AtomicUsize,
    state: Mutex<State>,
    /// Signalled when the reader has left; wakes one thread that wants to read
    reader_left: Condvar,
    /// Signalled when a request may have its answer
    answered: Condvar,
    /// Held shared by senders across their send, so a writer waits for all sends of verdicts on
    /// the old bindings
    bindings: RwLock<Bindings>,
    pub(crate) wake: Arc<Wake>,
    /// Batches for verdicts without a caller's batch, kept for their memory
    #[expect(clippy::vec_box, reason = "each `handle_packet` moves one out and in")]
    spare: Mutex<Vec<Box<SendBatch>>>,
}

#[derive(Debug, Default)]
struct State {
    /// The same table as [`Engine::bindings`], for threads with this lock
    bindings: Bindings,
    /// Binding numbers that this socket has used, sorted
    issued: Vec<u16>,
    /// Unbound queues with packets that may still come; each has its place among all endings
    ended: Vec<(u16, usize)>,
    stash: VecDeque<Stashed>,
    /// The thread that waits for the socket
    reader: Option<Reader>,
    /// Threads waiting for `reader_left`
    waiting_readers: usize,
    /// Threads waiting for `answered`
    waiting_requests: usize,
    /// The count of [`Waker::wake_all`] already signalled to all waiting threads
    all_woken: u32,
    /// The thread of the last call, as [`sys::thread_mark`]
    thread: usize,
    /// Calls in a row by that thread
    ///
    /// A thread that is alone blocks in the receive call, which saves a system call. Where several
    /// threads receive or configure, the thread that waits polls, and receives under the lock. So
    /// no call waits for another thread to run.
    calls_alone: u8,
    /// Two threads have received or configured; one of them may be in poll(2)
    has_met_others: bool,
    /// A request has read while a thread was blocked in the receive call
    is_out_of_order: bool,
    requests: Vec<Request>,
    last_seq: u32,
    /// Bytes of all datagrams read so far
    bytes_read: u64,
    /// The socket belongs to another process: see [`Engine::give_away`]
    is_given_away: bool,
    /// An overrun was reported, and the socket was not seen empty since
    is_in_overrun: bool,
    stats: Stats,
}

/// The space needed by the kernel in the send buffer beside the message (`netlink_sendmsg` in
/// `net/netlink/af_netlink.c`)
const SEND_OVERHEAD: usize = 32;

/// More bytes in one send gain nothing measurable
const MAX_SEND: usize = 1 << 15;

/// The kernel's charge for a small message in the receive buffer
const SMALL_MESSAGE: u64 = 832;

impl Engine {
    pub(crate) fn new(socket: Netlink, merges: bool, reports_overruns: bool) -> io::Result<Self> {
        static NEXT: AtomicUsize = AtomicUsize::new(1);
        let send_buffer = sys::send_buffer(socket.as_fd())?;
        let recv_buffer = u64::try_from(sys::recv_buffer(socket.as_fd())?).unwrap_or(0);
        let max_unread = recv_buffer / 4 / SMALL_MESSAGE;
        Ok(Self {
            id: NEXT.fetch_add(1, Relaxed),
            max_send: send_buffer.saturating_sub(SEND_OVERHEAD).min(MAX_SEND),
            max_unread: u32::try_from(max_unread).unwrap_or(u32::MAX),
            reports_overruns,
            busy_poll: Duration::ZERO,
            unbinds_on_drop: true,
            merges: AtomicBool::new(merges),
            may_be_read_outside: AtomicBool::new(false),
            forks: sys::forks(),
            is_read_outside: AtomicBool::new(false),
            overruns: AtomicU32::new(0),
            unread: AtomicU32::new(0),
            endings: AtomicUsize::new(0),
            state: Mutex::default(),
            reader_left: Condvar::new(),
            answered: Condvar::new(),
            bindings: RwLock::default(),
            wake: Arc::new(Wake::new(socket.as_raw_fd())),
            spare: Mutex::default(),
            socket,
        })
    }

    /// Locks the state; it is consistent between any two statements, so a panic elsewhere does no
    /// harm
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the current bindings; none of them ends while they are held across a send
    fn bindings(&self) -> RwLockReadGuard<'_, Bindings> {
        self.bindings.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change_bindings(&self, state: &mut State, change: impl FnOnce(&mut Bindings)) {
        change(&mut state.bindings);
        let bindings = self.bindings.write();
        bindings
            .unwrap_or_else(PoisonError::into_inner)
            .clone_from(&state.bindings);
    }

    /// Returns all current bindings
    pub(crate) fn present_bindings(&self) -> Bindings {
        self.state().bindings.clone()
    }

    /// Returns true if equal verdicts are merged and outstanding packets recorded for it
    #[inline]
    fn merges(&self) -> bool {
        self.merges.load(Relaxed)
    }

    /// Returns true if code outside this engine may receive from the socket: the program itself,
    /// or a forked process
    fn may_be_read_elsewhere(&self) -> bool {
        self.may_be_read_outside.load(Relaxed) || self.forks != sys::forks()
    }

    fn seen(&self, state: &State) -> Seen {
        Seen {
            overruns: self.overruns.load(Relaxed),
            is_drained: !state.is_in_overrun,
            reports_overruns: self.reports_overruns,
            in_order: !state.is_out_of_order && !self.is_read_outside.load(Relaxed),
            is_shared: self.forks != sys::forks(),
        }
    }

    /// Returns the number of queues unbound so far; a change means that callbacks may have ended
    #[inline]
    pub(crate) fn endings(&self) -> usize {
        self.endings.load(Acquire)
    }

    /// Returns true if the binding of this key is current
    pub(crate) fn is_bound(&self, key: PacketKey) -> bool {
        self.state().bindings.current(key.into()).is_some()
    }

    pub(crate) fn stats(&self) -> Stats {
        let state = self.state();
        let waiting = state
            .bindings
            .iter()
            .map(|binding| binding.outstanding().waiting());
        Stats {
            waiting: waiting.sum(),
            ..state.stats
        }
    }

    pub(crate) fn count(&self, count: impl FnOnce(&mut Stats)) {
        count(&mut self.state().stats);
    }

    /// Returns a batch with memory from earlier use; it may hold unsent verdicts
    pub(crate) fn take_spare(&self) -> Box<SendBatch> {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        spare.pop().unwrap_or_default()
    }

    pub(crate) fn put_spare(&self, batch: Box<SendBatch>) {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        spare.push(batch);
    }
}

impl AsFd for Engine {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.wake.close();
    }
}
