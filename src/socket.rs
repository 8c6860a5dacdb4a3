//! The one socket that configuration, packets and verdicts share
//!
//! The kernel ties a queue to the socket that bound it, so acknowledgements and packets arrive in one stream, in any
//! order. The rules that keep them apart without losing any:
//!
//! * One thread reads at a time, and what it has read is seen by [`Shared::note`] before the next may read: so datagrams
//!   are seen in the order they came, and a request that finds the socket empty, and no answer, knows that there is
//!   none, unless callers receive on the descriptor themselves and have it in their hands. Reading is done under the lock
//!   on [`State`], but for a wait: then `has_reader` stands for the lock.
//! * A request that reads packets on its way puts them in the stash. The stash is served before the socket.
//! * Verdicts share the socket, and two locks with those who receive (and that on [`State`] before a send after losses, where
//!   overruns are not reported). That on a binding's list of waiting packets nobody holds over a system call. That on
//!   [`Shared::bindings`] is held over a send, and whoever receives takes it alone, and so waits for sends, when a binding
//!   comes or goes, when the kernel has refused a thread's verdicts as such, and when very many messages were lost.
//! * A call that leaves the stash non-empty sends a message that the kernel answers at once ([`Shared::wake`]), so the
//!   descriptor is readable, and no loop sleeps on it while packets wait in here.

mod losses;
mod queues;
mod receive;
mod requests;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use netlink_sys::Socket;
use nfqnl_proto::{BatchVerdict, Decision, PacketKey, Verdict};

use crate::batch::Stashed;
use crate::bindings::Bindings;
use crate::error::{Error, Operation, Result};
use crate::event::verdict_header;
use crate::stats::Stats;
use crate::sys;
use crate::verdicts::VerdictBatch;

pub(crate) use self::losses::Losses;
use self::requests::Request;

/// The socket, and everything that its users share
#[derive(Debug)]
pub(crate) struct Shared {
    socket: Socket,
    ack_timeout: Duration,
    /// How many bytes one send may take
    max_send: usize,
    /// Whether batch verdicts are wanted, and can be made safe
    coalesce: bool,
    /// Whether the first receive call after an overrun tells of it
    reports_overruns: bool,
    /// The count of losses that was last looked at
    losses_seen: AtomicU32,
    /// Whether somebody receives on the descriptor and passes on what came
    is_read_outside: AtomicBool,
    state: Mutex<State>,
    /// Signalled when an answer to a request has come, and when a reader is back
    changed: Condvar,
    /// Read by verdicts, across their send: once a writer has changed it, no verdict on an older binding is on its way
    bindings: RwLock<Bindings>,
    long_verdict: Mutex<VerdictBatch>,
}

#[derive(Debug, Default)]
struct State {
    /// The same as in `Shared`, for those who have this lock
    bindings: Bindings,
    stash: VecDeque<Stashed>,
    /// Whether a thread waits in the kernel to receive: until it is back nobody else reads
    has_reader: bool,
    /// How many threads wait for `changed`
    sleepers: usize,
    requests: Vec<Request>,
    last_seq: u32,
    /// Queues that were unbound, of which packets may still come, each with its place among all that ever were
    ended: Vec<(u16, u64)>,
    /// How many queues were unbound
    endings: u64,
    origin: Origin,
    /// Until then what other processes were sending when the socket was connected may still come
    strays_end: Option<Instant>,
    losses: Losses,
    stats: Stats,
}

/// Whose the socket was before
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Nobody's
    #[default]
    New,
    /// Somebody's, who may have bound any queue, and may still
    TakenOver,
}

/// What the kernel wants of the send buffer beside the message (`netlink_sendmsg` in `net/netlink/af_netlink.c`)
const SEND_OVERHEAD: usize = 32;

/// Longer than a system call takes that has begun to send to this socket
const STRAYS: Duration = Duration::from_secs(2);

/// More verdicts than this in one send bring nothing measurable
const MAX_SEND: usize = 1 << 15;

impl Shared {
    pub(crate) fn new(
        socket: Socket,
        origin: Origin,
        ack_timeout: Duration,
        coalesce: bool,
        reports_overruns: bool,
    ) -> io::Result<Self> {
        let send_buffer = sys::send_buffer(socket.as_fd())?;
        let mut state = State {
            origin,
            strays_end: Some(sys::now() + STRAYS),
            ..State::default()
        };
        let drops = sys::drops(socket.as_fd()).ok();
        state.losses = Losses::new(drops.unwrap_or(0));
        Ok(Self {
            socket,
            ack_timeout,
            max_send: send_buffer.saturating_sub(SEND_OVERHEAD).min(MAX_SEND),
            coalesce: coalesce && drops.is_some(),
            reports_overruns,
            losses_seen: AtomicU32::new(drops.unwrap_or(0)),
            is_read_outside: AtomicBool::new(false),
            state: Mutex::new(state),
            changed: Condvar::new(),
            bindings: RwLock::default(),
            long_verdict: Mutex::default(),
        })
    }

    /// State is consistent between any two statements, so a panic elsewhere poisons nothing
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bindings that stand; held over a send, so that none ends under it
    fn bindings(&self) -> RwLockReadGuard<'_, Bindings> {
        self.bindings.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change_bindings(&self, state: &mut State, change: impl FnOnce(&mut Bindings)) {
        change(&mut state.bindings);
        let mut bindings = self
            .bindings
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        bindings.clone_from(&state.bindings);
    }

    /// Whether batch verdicts are sent, and waiting packets noted for it
    #[inline]
    fn coalesces(&self) -> bool {
        self.coalesce && !self.is_read_outside.load(Ordering::Relaxed)
    }

    pub(crate) fn stats(&self) -> Stats {
        self.state().stats
    }

    pub(crate) fn note_unclaimed(&self) {
        self.state().stats.unclaimed += 1;
    }

    pub(crate) fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        self.socket.set_non_blocking(nonblocking)
    }
}

impl AsFd for Shared {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Whether a verdict is one that never shares a send, or happens to be the only one in a batch
#[derive(Clone, Copy)]
enum Sent {
    ByItself,
    AsBatch,
}

/// Verdicts
impl Shared {
    /// Sends one verdict
    pub(crate) fn verdict(&self, key: PacketKey, decision: &Decision<'_>) -> Result<()> {
        match decision.as_batch() {
            Some(common) => self.common_verdict(key, common, Sent::ByItself),
            None => self.long_verdict(key, decision),
        }
    }

    /// Sends one verdict that is no more than verdict, mark and priority
    fn common_verdict(&self, key: PacketKey, common: BatchVerdict, sent: Sent) -> Result<()> {
        let mut out = [0; BatchVerdict::MAX_LEN];
        let op = Operation::Verdict(key);
        let len = common
            .encode_single(&mut out, key.queue, key.id, verdict_header(key))
            .map_err(|source| Error::Encode { op, source })?;
        let message = out.get(..len).unwrap_or_default();
        let bindings = self.bindings();
        let binding = bindings.current(key.into()).ok_or(Error::Stale { key })?;
        if !self.coalesces() || common.verdict() == Verdict::Stolen {
            return self.send(op, message);
        }
        let verdict = Some(common);
        let needs_proof = match sent {
            Sent::ByItself => binding.waiting().needs_proof_alone(verdict),
            Sent::AsBatch => binding.waiting().needs_proof([verdict]),
        };
        let is_proven = self.send_and_prove(key, message, needs_proof)?;
        binding
            .waiting()
            .note_sent(key.id, key.id, verdict, is_proven);
        Ok(())
    }

    /// Sends one verdict of any length, by memory that is kept for it unless another thread has that now
    fn long_verdict(&self, key: PacketKey, decision: &Decision<'_>) -> Result<()> {
        if let (Some(binding), true) = (self.bindings().current(key.into()), self.coalesces()) {
            binding.waiting().needs_proof_alone(None);
        }
        let mut own = VerdictBatch::new();
        let mut kept = self.long_verdict.try_lock();
        let batch = kept.as_deref_mut().unwrap_or(&mut own);
        batch.clear(); // of what could not be sent, and was reported so
        batch.push(key, *decision)?;
        self.send_verdicts(batch)
    }

    /// Sends collected verdicts
    #[inline]
    pub(crate) fn send_verdicts(&self, batch: &mut VerdictBatch) -> Result<()> {
        match batch.single() {
            Some((key, common)) => match self.common_verdict(key, common, Sent::AsBatch) {
                Err(error @ Error::Io { .. }) => Err(error),
                sent => {
                    batch.clear();
                    sent
                }
            },
            None if batch.is_empty() => Ok(()),
            None => self.send_several(batch),
        }
    }

    fn send_several(&self, batch: &mut VerdictBatch) -> Result<()> {
        let bindings = || {
            self.look_before_sending();
            self.bindings()
        };
        batch.send(
            self.max_send,
            self.coalesces(),
            bindings,
            |first, messages, needs_proof| self.send_and_prove(first, messages, needs_proof),
        )
    }

    /// Sends verdicts; if `needs_proof`, says whether it is certain that the kernel has not refused them all
    ///
    /// It refuses all of a thread without `CAP_NET_ADMIN`. That is looked at before and after: privileges that one thread
    /// drops or regains by `setuid`, libc changes in all of them, by a signal. A process in a user namespace of its own may
    /// seem to have it, and has it not; then it was refused all verdicts ever since, and will be.
    fn send_and_prove(&self, first: PacketKey, messages: &[u8], needs_proof: bool) -> Result<bool> {
        let was_capable = needs_proof && sys::has_net_admin();
        self.send(Operation::Verdict(first), messages)?;
        Ok(was_capable && sys::has_net_admin())
    }

    fn send(&self, op: Operation, message: &[u8]) -> Result<()> {
        loop {
            match sys::send(&self.socket, message) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(Error::Io { op, source }),
            }
        }
    }
}
