//! The one socket that configuration, packets and verdicts share
//!
//! The kernel ties a queue to the socket that bound it, so acknowledgements and packets arrive in one stream, in any
//! order. The rules that keep them apart without losing any:
//!
//! * Whoever reads a datagram does so under the lock on [`State`], and has dealt with every answer to a request in it
//!   before the lock is given back. So a request that finds the socket empty, and no answer, knows that there is none.
//! * A request that reads packets on its way puts them in the stash. The stash is served before the socket.
//! * Verdicts share the socket, and no lock with those who receive but one on a binding's list of waiting packets, which
//!   nobody holds over a system call.
//! * A call that leaves the stash non-empty sends a message that the kernel answers at once ([`Shared::wake`]), so the
//!   descriptor is readable, and no loop sleeps on it while packets wait in here.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use netlink_sys::Socket;
use nfqnl_proto::consts::{MESSAGE_HEADER_LEN, NFQNL_MSG_CONFIG, NLMSG_NOOP, message_type};
use nfqnl_proto::{
    BatchVerdict, ConfigRequest, Decision, Message, Messages, PacketKey, QueueConfig,
    RequestHeader, Verdict, encode_noop,
};

use crate::batch::{Contents, RecvBatch, Stashed};
use crate::bindings::{Binding, BindingId, Bindings, Noted};
use crate::error::{Error, Operation, Refusal, Result};
use crate::event::{Event, next_event, verdict_header};
use crate::stats::Stats;
use crate::sys::{self, Received};
use crate::verdicts::VerdictBatch;

/// The socket, and everything that its users share
#[derive(Debug)]
pub(crate) struct Shared {
    socket: Socket,
    ack_timeout: Duration,
    /// How many bytes one send may take
    max_send: usize,
    /// Whether batch verdicts are wanted
    coalesce: bool,
    /// Whether somebody receives on the descriptor and passes on what came
    is_read_outside: AtomicBool,
    state: Mutex<State>,
    /// Signalled when an answer to a request has come
    answered: Condvar,
    /// Read by verdicts, across their send: once a writer has changed it, no verdict on an older binding is on its way
    bindings: RwLock<Bindings>,
    long_verdict: Mutex<VerdictBatch>,
}

#[derive(Debug, Default)]
struct State {
    /// The same as in `Shared`, for those who have this lock
    bindings: Bindings,
    stash: VecDeque<Stashed>,
    requests: Vec<Request>,
    last_seq: u32,
    /// Queues that were unbound, of which packets may still come, each with its place among all that ever were
    ended: Vec<(u16, u64)>,
    /// How many queues were unbound
    endings: u64,
    drops: Drops,
    stats: Stats,
}

/// The kernel's count of messages that it could not put in the receive buffer, set against gaps in the ids
#[derive(Debug, Default)]
struct Drops {
    seen: u32,
    /// Those that no gap has shown yet; answers are lost too, so not all will
    unexplained: u64,
}

impl Drops {
    /// Whether `gap` packets were lost, given the kernel's count of lost messages
    fn explain(&mut self, gap: u32, count: u32) -> bool {
        self.unexplained += u64::from(count.wrapping_sub(self.seen));
        self.seen = count;
        match self.unexplained.checked_sub(gap.into()) {
            Some(left) => {
                self.unexplained = left;
                true
            }
            None => false,
        }
    }
}

/// A request that was sent, and its answer when that has come
#[derive(Debug)]
struct Request {
    seq: u32,
    op: Operation,
    answer: Option<Result<(), Refusal>>,
}

/// A request that was sent, in the hands of who waits for the answer
struct Pending {
    op: Operation,
    seq: u32,
    /// The kernel's count of lost messages before it was sent
    drops: Option<u32>,
}

impl Shared {
    pub(crate) fn new(socket: Socket, ack_timeout: Duration, coalesce: bool) -> io::Result<Self> {
        let send_buffer = sys::send_buffer(socket.as_fd())?;
        let mut state = State::default();
        state.drops.seen = sys::drops(socket.as_fd()).unwrap_or(0);
        Ok(Self {
            socket,
            ack_timeout,
            max_send: send_buffer.saturating_sub(SEND_OVERHEAD).min(MAX_SEND),
            coalesce,
            is_read_outside: AtomicBool::new(false),
            state: Mutex::new(state),
            answered: Condvar::new(),
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

// Requests: configuration and sync.

/// A request reads whatever comes on the way, so it needs room for any message
const REQUEST_BUFFER_LEN: usize = RecvBatch::DEFAULT_SLOT_LEN;

/// What the kernel wants of the send buffer beside the message (`netlink_sendmsg` in `net/netlink/af_netlink.c`)
const SEND_OVERHEAD: usize = 32;

/// More verdicts than this in one send bring nothing measurable
const MAX_SEND: usize = 1 << 15;

/// How long a request that found the socket empty waits before it looks again
const RECHECK: Duration = Duration::from_millis(5);

impl Shared {
    /// Sends a configuration request and waits for the answer
    pub(crate) fn configure(&self, op: Operation, request: &ConfigRequest) -> Result<()> {
        let pending = self.begin(&mut self.state(), op, Some(request))?;
        self.finish(pending)
    }

    /// Waits until the kernel has processed everything that was sent before, and every refusal has arrived
    pub(crate) fn sync(&self, op: Operation) -> Result<()> {
        let pending = self.begin(&mut self.state(), op, None)?;
        self.finish(pending)
    }

    /// Sends a request, or a message that does nothing but be acknowledged
    fn begin(
        &self,
        state: &mut State,
        op: Operation,
        request: Option<&ConfigRequest>,
    ) -> Result<Pending> {
        state.last_seq = state.last_seq.wrapping_add(1).max(1);
        let seq = state.last_seq;
        let header = RequestHeader {
            ack: true,
            seq,
            pid: 0,
        };
        let mut buf = [0; ConfigRequest::MAX_LEN];
        let len = match request {
            Some(request) => request.encode(&mut buf, header)?,
            None => encode_noop(&mut buf, header)?,
        };
        let drops = sys::drops(self.as_fd()).ok();
        state.requests.push(Request {
            seq,
            op,
            answer: None,
        });
        let sent = self.send(op, buf.get(..len).unwrap_or_default());
        if sent.is_err() {
            state.requests.retain(|request| request.seq != seq);
        }
        sent.map(|()| Pending { op, seq, drops })
    }

    /// Waits for the answer to a request
    fn finish(&self, pending: Pending) -> Result<()> {
        let seq = pending.seq;
        let answer = self.wait_for_answer(pending);
        let mut state = self.state();
        state.requests.retain(|request| request.seq != seq);
        let stashed = !state.stash.is_empty();
        drop(state);
        if stashed {
            self.wake();
        }
        answer
    }

    /// Reads until the answer is there; the kernel has sent it before our send returned, unless its buffer was full
    fn wait_for_answer(&self, Pending { op, seq, drops }: Pending) -> Result<()> {
        let begin = Instant::now();
        let mut buf = vec![0; REQUEST_BUFFER_LEN];
        let mut state = self.state();
        loop {
            // What another thread has read may hold our answer, so look before every read.
            if let Some(answer) = state.take_answer(seq) {
                return Ok(answer?);
            }
            let waited = begin.elapsed();
            let is_empty = self.read_to_stash(&mut state, &mut buf)?;
            // Nobody else has it, and it is not there: the kernel had no room for it.
            let is_lost = is_empty
                && drops != sys::drops(self.as_fd()).ok()
                && !self.is_read_outside.load(Ordering::Relaxed)
                && !state.bindings.have_callbacks();
            if is_lost || waited >= self.ack_timeout {
                let answer = state.take_answer(seq);
                return Ok(answer.ok_or(Error::NoAck { op, waited })??);
            }
            if is_empty {
                let left = self.ack_timeout.saturating_sub(waited);
                let wait = self.answered.wait_timeout(state, left.min(RECHECK));
                state = wait.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    /// Reads one datagram, and says whether there was none
    fn read_to_stash(&self, state: &mut State, buf: &mut [u8]) -> Result<bool> {
        let mut received = [Received::default()];
        match sys::recv_many(self.as_fd(), std::iter::once(&mut *buf), &mut received) {
            Ok(_) => {
                let [Received { len, from_kernel }] = received;
                let datagram = buf.get(..len).unwrap_or_default();
                if !from_kernel {
                    state.stats.foreign += 1;
                } else if self.note(state, datagram) {
                    state.stash.push_back(Stashed::Datagram(datagram.into()));
                }
                Ok(false)
            }
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOBUFS) => {
                    state.stats.overruns += 1;
                    state.stash.push_back(Stashed::Overrun);
                    Ok(false)
                }
                Some(libc::EINTR) => Ok(false),
                Some(libc::EAGAIN) => Ok(true),
                _ => Err(Error::Io {
                    op: Operation::Receive,
                    source: error,
                }),
            },
        }
    }

    /// Makes the descriptor readable: the kernel answers this message at once
    ///
    /// If the answer finds no room, the receive buffer is full, and the descriptor readable without it.
    pub(crate) fn wake(&self) {
        let mut buf = [0; MESSAGE_HEADER_LEN];
        let header = RequestHeader {
            ack: true,
            seq: 0,
            pid: 0,
        };
        if encode_noop(&mut buf, header).is_ok() {
            let _ = self.send(Operation::Sync, &buf);
        }
    }

    fn send(&self, op: Operation, message: &[u8]) -> Result<()> {
        loop {
            match self.socket.send(message, 0) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(Error::Io { op, source }),
            }
        }
    }
}

impl State {
    fn take_answer(&mut self, seq: u32) -> Option<Result<(), Refusal>> {
        self.requests
            .iter_mut()
            .find(|request| request.seq == seq)?
            .answer
            .take()
    }
}

// Queues.

impl Shared {
    /// Binds a queue with its settings, in one message
    pub(crate) fn bind(
        &self,
        queue: u16,
        config: QueueConfig,
        has_callback: bool,
    ) -> Result<BindingId> {
        check_config(queue, &config)?;
        let op = Operation::Bind(queue);
        let mut state = loop {
            let mut state = self.state();
            if state.ended.iter().any(|&(ended, _)| ended == queue) {
                drop(state);
                self.outwait_endings(op)?;
            } else if let Some(present) = state.bindings.get(queue).map(|binding| binding.id) {
                // Ours already: let the kernel say so. If it says otherwise, the queue was unbound through another
                // descriptor of this socket, and the present binding is at its end.
                let bare = ConfigRequest::bind(queue, QueueConfig::new());
                let endings = state.endings;
                let pending = self.begin(&mut state, op, Some(&bare))?;
                drop(state);
                self.finish(pending)?;
                self.unbind_bare(present, endings)?;
            } else {
                break state;
            }
        };
        // The binding is there before the kernel knows: its first packet may come before the acknowledgement.
        let binding = Binding::new(queue, has_callback);
        let id = binding.id;
        self.change_bindings(&mut state, |bindings| bindings.insert(binding));
        let pending = self.begin(&mut state, op, Some(&ConfigRequest::bind(queue, config)));
        drop(state);
        let result = pending.and_then(|pending| self.finish(pending));
        match &result {
            Ok(()) => {}
            Err(Error::Refused(_)) => {
                self.forget(&mut self.state(), id);
                id.give_back();
            }
            // The kernel may have bound it.
            Err(_) => self.post_unbind(id),
        }
        result.map(|()| id)
    }

    /// Waits until no packet can come any more of any queue that was unbound, so that none is taken for one of a later
    /// binding
    ///
    /// The kernel looks a packet's queue up, and sends the packet some time later, under no lock but an RCU read lock
    /// (`nfqnl_enqueue_packet` in `net/netfilter/nfnetlink_queue.c`). So it may come after the unbinding is
    /// acknowledged, and after the next binding is.
    fn outwait_endings(&self, op: Operation) -> Result<()> {
        /// Much longer than the kernel takes to queue a packet, where there is no better way
        const LONG: Duration = Duration::from_millis(100);
        let endings = self.state().endings;
        if sys::wait_for_rcu().is_err() {
            std::thread::sleep(LONG);
        }
        self.sync(op)?; // reads them all, and sees that they belong to no queue
        self.state().ended.retain(|&(_, place)| place > endings);
        Ok(())
    }

    /// Changes a queue's settings
    pub(crate) fn update(&self, op: Operation, id: BindingId, config: QueueConfig) -> Result<()> {
        check_config(id.queue, &config)?;
        let mut state = self.state();
        if !state.bindings.is_current(id) {
            return Err(Error::Ended { op });
        }
        let request = ConfigRequest::update(id.queue, config);
        let pending = self.begin(&mut state, op, Some(&request))?;
        drop(state);
        self.finish(pending)
    }

    /// Unbinds a queue and waits for the acknowledgement; does nothing if this binding has ended
    pub(crate) fn unbind(&self, id: BindingId) -> Result<()> {
        self.end(id).map_or(Ok(()), |pending| self.finish(pending?))
    }

    /// Unbinds a queue that was just bound though there was a binding; does nothing if the queue was unbound since the
    /// count of endings stood so
    fn unbind_bare(&self, present: BindingId, endings: u64) -> Result<()> {
        let mut state = self.state();
        let is_unbound = |&(queue, place)| queue == present.queue && place > endings;
        if !self.forget(&mut state, present) && state.ended.iter().any(is_unbound) {
            return Ok(());
        }
        let pending = self.begin_unbind(&mut state, present.queue)?;
        drop(state);
        self.finish(pending)
    }

    /// Unbinds a queue without waiting; does nothing if this binding has ended
    pub(crate) fn post_unbind(&self, id: BindingId) {
        if let Some(Ok(pending)) = self.end(id) {
            // Nobody waits, so the answer is nobody's.
            let mut state = self.state();
            state.requests.retain(|request| request.seq != pending.seq);
        }
    }

    /// Ends a binding, if it has not ended: for this handle and for the kernel in one step, so that nothing comes between
    fn end(&self, id: BindingId) -> Option<Result<Pending>> {
        let mut state = self.state();
        self.forget(&mut state, id)
            .then(|| self.begin_unbind(&mut state, id.queue))
    }

    fn begin_unbind(&self, state: &mut State, queue: u16) -> Result<Pending> {
        state.endings += 1;
        state.ended.push((queue, state.endings));
        let request = ConfigRequest::unbind(queue);
        self.begin(state, Operation::Unbind(queue), Some(&request))
    }

    /// Ends a binding for this handle: its keys are stale from here on, and what waits of it in the stash is gone in the
    /// kernel too, or will be
    ///
    /// Says whether it had not ended before.
    fn forget(&self, state: &mut State, id: BindingId) -> bool {
        let Some(binding) = state.bindings.current(id) else {
            return false;
        };
        binding.end();
        self.change_bindings(state, |bindings| bindings.remove(id));
        let before = state.stash.len();
        state
            .stash
            .retain(|stashed| stashed.key().is_none_or(|key| key.queue != id.queue));
        state.stats.discard(before - state.stash.len());
        true
    }

    /// The bindings that stand now
    pub(crate) fn present_bindings(&self) -> Bindings {
        self.state().bindings.clone()
    }
}

/// Refuses settings that the kernel would take in a way that nobody wants
fn check_config(queue: u16, config: &QueueConfig) -> Result<()> {
    if config.get_maxlen() == Some(0) {
        return Err(Error::ZeroMaxlen { queue });
    }
    match config.get_copy_mode() {
        Some((mode, _)) if mode.0 > nfqnl_proto::CopyMode::PACKET.0 => {
            Err(Error::UnknownCopyMode { queue, mode })
        }
        _ => Ok(()),
    }
}

// Receiving.

impl Shared {
    /// Fills the batch with what is there, without waiting; says whether it has any events
    ///
    /// Returns `false` only when the socket is empty.
    pub(crate) fn fill(&self, batch: &mut RecvBatch) -> Result<bool> {
        if batch.has_events() {
            return Ok(true);
        }
        let contents = batch.clear();
        let mut state = self.state();
        state.refresh(&mut contents.bindings);
        if !state.stash.is_empty() {
            std::mem::swap(&mut contents.stash, &mut state.stash);
            return Ok(true);
        }
        loop {
            let slots = contents.arena.chunks_exact_mut(contents.slot_len);
            match sys::recv_many(self.as_fd(), slots, &mut contents.slots) {
                Ok(n) => {
                    contents.filled = n;
                    if self.note_slots(&mut state, contents) {
                        return Ok(true);
                    }
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::ENOBUFS) => {
                        state.stats.overruns += 1;
                        contents.overruns += 1;
                    }
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN) => {
                        contents.filled = 0;
                        return Ok(contents.overruns > 0);
                    }
                    _ => {
                        return Err(Error::Io {
                            op: Operation::Receive,
                            source: error,
                        });
                    }
                },
            }
        }
    }

    fn note_slots(&self, state: &mut State, contents: &mut Contents) -> bool {
        let mut any = contents.overruns > 0;
        let datagrams = contents.arena.chunks_exact(contents.slot_len);
        let received = contents.slots.iter_mut().take(contents.filled);
        for (received, slot) in received.zip(datagrams) {
            if !received.from_kernel {
                state.stats.foreign += 1;
                received.len = 0;
            }
            let datagram = slot.get(..received.len).unwrap_or_default();
            any |= self.note(state, datagram);
        }
        any
    }

    /// Waits for something to receive, until the deadline if there is one; `false` when it has passed
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Result<bool> {
        loop {
            let timeout = match deadline {
                None => -1,
                Some(deadline) => {
                    // Rounded up, so that the last wait is not a spin.
                    let left = deadline
                        .saturating_duration_since(Instant::now())
                        .as_micros();
                    left.div_ceil(1000).try_into().unwrap_or(libc::c_int::MAX)
                }
            };
            match sys::wait_readable(self.as_fd(), timeout) {
                Ok(true) => return Ok(true),
                Ok(false) if deadline.is_some_and(|deadline| Instant::now() >= deadline) => {
                    return Ok(false);
                }
                Ok(false) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(Error::Io {
                        op: Operation::Receive,
                        source,
                    });
                }
            }
        }
    }

    /// Takes in a datagram that the caller has received: behind what is stashed, if anything is
    ///
    /// Returns what is to be looked at now if that is not the datagram alone. Brings the copy of the bindings up to date,
    /// and says whether it was not.
    pub(crate) fn take_in(
        &self,
        datagram: &[u8],
        bindings: &mut Bindings,
    ) -> (bool, Option<VecDeque<Stashed>>) {
        // Datagrams may be passed on in another order than they came in, so what waits is not known any more.
        self.is_read_outside.store(true, Ordering::Relaxed);
        let mut state = self.state();
        let was_old = state.refresh(bindings);
        let has_events = self.note(&mut state, datagram);
        if state.stash.is_empty() {
            return (was_old, None);
        }
        let mut all = std::mem::take(&mut state.stash);
        if has_events {
            all.push_back(Stashed::Datagram(datagram.into()));
        }
        (was_old, Some(all))
    }

    /// Puts back what was taken in and could not be looked at, in front of what has come since
    pub(crate) fn put_back(&self, mut rest: VecDeque<Stashed>, bindings: &Bindings) {
        if rest.is_empty() {
            return;
        }
        let mut state = self.state();
        // What was bound then and is not now is gone; a later binding's it must not become.
        let before = rest.len();
        rest.retain(|stashed| {
            let binding = stashed.key().and_then(|key| bindings.get(key.queue));
            binding.is_none_or(|binding| state.bindings.is_current(binding.id))
        });
        state.stats.discard(before - rest.len());
        rest.append(&mut state.stash);
        state.stash = rest;
        drop(state);
        self.wake();
    }

    /// Counts a packet whose binding ended before it could be handed on
    pub(crate) fn note_discarded(&self) {
        self.state().stats.discard(1);
    }

    /// Sees a datagram for the first time: hands answers to the requests that wait for them, and counts
    ///
    /// Says whether there is an event in it.
    #[inline]
    fn note(&self, state: &mut State, datagram: &[u8]) -> bool {
        match single_packet(datagram) {
            Some(key) => self.note_packet(state, key),
            None => self.note_messages(state, datagram),
        }
    }

    fn note_messages(&self, state: &mut State, datagram: &[u8]) -> bool {
        let mut answered = false;
        for message in Messages::new(datagram) {
            answered |= matches!(message, Ok(Message::Reply(reply)) if state.note_answer(&reply));
        }
        if answered {
            self.answered.notify_all();
        }
        let bindings = state.bindings.clone();
        let mut messages = Messages::new(datagram);
        let mut any = false;
        while let Some(event) = next_event(&mut messages, &bindings) {
            any = true;
            match event {
                Event::Packet(packet) => {
                    self.note_packet(state, packet.key());
                }
                Event::Refused(refusal) => {
                    state.stats.refused_verdicts += 1;
                    note_refusal(&refusal, &bindings);
                }
                Event::Overrun => state.stats.overruns += 1,
                Event::Malformed { key, .. } => {
                    state.stats.malformed += 1;
                    if let Some(key) = key {
                        self.note_packet(state, key);
                    }
                }
                Event::Truncated { key, .. } => {
                    state.stats.truncated += 1;
                    if let Some(key) = key {
                        self.note_packet(state, key);
                    }
                }
            }
        }
        any
    }

    #[inline]
    fn note_packet(&self, state: &mut State, key: PacketKey) -> bool {
        state.stats.packets += 1;
        let Some(binding) = state.bindings.get(key.queue) else {
            state.stats.discarded += 1;
            return false;
        };
        let gap = match binding.note(key.id) {
            Noted::Next => 0,
            Noted::After { gap } => gap,
            Noted::Late => {
                state.stats.lost_packets = state.stats.lost_packets.saturating_sub(1);
                0
            }
        };
        if gap > 0 {
            state.stats.lost_packets += u64::from(gap);
            // Older kernels don't say; then it may as well be somebody else who has received what is missing.
            let drops = &mut state.drops;
            if !sys::drops(self.as_fd()).is_ok_and(|count| drops.explain(gap, count)) {
                binding.waiting().go_blind();
            }
        }
        if self.coalesces() {
            binding.waiting().receive(key.id);
        }
        true
    }
}

/// A packet waits on that was thought to be answered, unless the kernel says that there is none, or has dropped it
/// because it can't do what the verdict says
fn note_refusal(refusal: &Refusal, bindings: &Bindings) {
    if !matches!(refusal.errno(), libc::ENOENT | libc::EINVAL)
        && let Some(key) = refusal.packet()
        && let Some(binding) = bindings.current(key.into())
    {
        binding.waiting().go_blind();
    }
}

impl State {
    /// Brings a copy of the bindings up to date, and says whether it was not
    fn refresh(&self, bindings: &mut Bindings) -> bool {
        let is_old = !bindings.is(&self.bindings);
        if is_old {
            bindings.clone_from(&self.bindings);
        }
        is_old
    }

    fn note_answer(&mut self, reply: &nfqnl_proto::Reply<'_>) -> bool {
        if ![message_type(NFQNL_MSG_CONFIG), NLMSG_NOOP].contains(&reply.request_type) {
            return false;
        }
        let Some(request) = self
            .requests
            .iter_mut()
            .find(|request| request.seq == reply.seq)
        else {
            return false; // a wake, or a request that has given up
        };
        let answer = if reply.is_ack() {
            Ok(())
        } else {
            Err(Refusal::new(request.op, reply))
        };
        request.answer = Some(answer);
        true
    }
}

/// The key of a datagram that is one whole packet message, as nearly all are
#[inline]
fn single_packet(datagram: &[u8]) -> Option<PacketKey> {
    let len = u32::from_ne_bytes(*datagram.first_chunk()?);
    if usize::try_from(len) == Ok(datagram.len()) {
        PacketKey::peek(datagram)
    } else {
        None
    }
}

// Verdicts.

impl Shared {
    /// Sends one verdict
    pub(crate) fn verdict(&self, key: PacketKey, decision: &Decision<'_>) -> Result<()> {
        match decision.as_batch() {
            Some(common) => self.common_verdict(key, common),
            None => self.long_verdict(key, decision),
        }
    }

    /// Sends one verdict that is no more than verdict, mark and priority
    fn common_verdict(&self, key: PacketKey, common: BatchVerdict) -> Result<()> {
        let mut out = [0; BatchVerdict::MAX_LEN];
        let len = common.encode_single(&mut out, key.queue, key.id, verdict_header(key))?;
        let bindings = self.bindings();
        let binding = bindings.current(key.into()).ok_or(Error::Stale { key })?;
        self.send(Operation::Verdict(key), out.get(..len).unwrap_or_default())?;
        if self.coalesces() && common.verdict() != Verdict::Stolen {
            binding.waiting().answer(key.id);
        }
        Ok(())
    }

    /// Sends one verdict of any length, by memory that is kept for it unless another thread has that now
    fn long_verdict(&self, key: PacketKey, decision: &Decision<'_>) -> Result<()> {
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
            Some((key, common)) => match self.common_verdict(key, common) {
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
        batch.send(
            self.max_send,
            self.coalesces(),
            || self.bindings(),
            |first, messages| self.send(Operation::Verdict(first), messages),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_set_against_the_kernels_count_of_drops() {
        let mut drops = Drops {
            seen: u32::MAX - 1,
            unexplained: 0,
        };
        assert!(drops.explain(3, 1), "across the wrap");
        assert!(!drops.explain(1, 1), "nothing was dropped since");
        assert!(drops.explain(1, 4), "two were not seen to be missing yet");
        assert!(drops.explain(2, 4));
        assert!(!drops.explain(1, 4));
    }
}
