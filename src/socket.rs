//! The one socket that configuration, packets and verdicts share
//!
//! The kernel ties a queue to the socket that bound it, so acknowledgements and packets arrive in one stream, in any
//! order. The rules that keep them apart without losing any:
//!
//! * Whoever reads a datagram does so under the lock on [`State`], and has dealt with every answer to a request in it
//!   before the lock is given back. So a request that finds the socket empty, and no answer, knows that there is none.
//! * A request that reads packets on its way puts them in the stash. The stash is served before the socket.
//! * A call that leaves the stash non-empty sends a message that the kernel answers at once ([`Shared::wake`]), so the
//!   descriptor is readable, and no loop sleeps on it while packets wait in here.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use netlink_sys::Socket;
use nfqnl_proto::consts::{MESSAGE_HEADER_LEN, NFQNL_MSG_CONFIG, NLMSG_NOOP, message_type};
use nfqnl_proto::{
    ConfigRequest, Decision, Message, Messages, PacketKey, QueueConfig, RequestHeader, encode_noop,
};

use crate::batch::{RecvBatch, Stashed};
use crate::bindings::{Binding, BindingId, Bindings, Callback};
use crate::error::{Error, Operation, Refusal, Result};
use crate::event::{Event, next_event, verdict_header};
use crate::stats::Stats;
use crate::sys::{self, Received};

/// The socket, and everything that its users share
#[derive(Debug)]
pub(crate) struct Shared {
    socket: Socket,
    ack_timeout: Duration,
    state: Mutex<State>,
    /// Signalled when an answer to a request has come
    answered: Condvar,
    /// Read by verdicts, across their send: once a writer has changed it, no verdict on an older binding is on its way
    bindings: RwLock<Bindings>,
}

#[derive(Debug, Default)]
struct State {
    stash: VecDeque<Stashed>,
    requests: Vec<Request>,
    last_seq: u32,
    /// How many queues were unbound without waiting: packets from before may still come
    posted: u64,
    /// How many of these are known to be processed, and their packets read
    fenced: u64,
    stats: Stats,
}

/// A request whose sender waits for the answer
#[derive(Debug)]
struct Request {
    seq: u32,
    op: Operation,
    answer: Option<Result<(), Refusal>>,
}

impl Shared {
    pub(crate) fn new(socket: Socket, ack_timeout: Duration) -> Self {
        Self {
            socket,
            ack_timeout,
            state: Mutex::default(),
            answered: Condvar::new(),
            bindings: RwLock::default(),
        }
    }

    /// State is consistent between any two statements, so a panic elsewhere poisons nothing
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bindings(&self) -> Bindings {
        self.bindings
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Called under the lock on the state
    fn change_bindings(&self, change: impl FnOnce(&mut Bindings)) {
        change(
            &mut self
                .bindings
                .write()
                .unwrap_or_else(PoisonError::into_inner),
        );
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

/// How long a request that found the socket empty waits before it looks again
const RECHECK: Duration = Duration::from_millis(5);

impl Shared {
    /// Sends a configuration request and waits for the answer
    pub(crate) fn configure(&self, op: Operation, request: &ConfigRequest) -> Result<()> {
        let mut buf = [0; ConfigRequest::MAX_LEN];
        self.request(op, |header| {
            let len = request.encode(&mut buf, header)?;
            Ok((buf, len))
        })
    }

    /// Waits until the kernel has processed everything that was sent before, and every refusal has arrived
    pub(crate) fn sync(&self) -> Result<()> {
        let mut buf = [0; MESSAGE_HEADER_LEN];
        self.request(Operation::Sync, |header| {
            let len = encode_noop(&mut buf, header)?;
            Ok((buf, len))
        })
    }

    fn request<const N: usize>(
        &self,
        op: Operation,
        encode: impl FnOnce(RequestHeader) -> Result<([u8; N], usize)>,
    ) -> Result<()> {
        let mut state = self.state();
        state.last_seq = state.last_seq.wrapping_add(1).max(1);
        let seq = state.last_seq;
        state.requests.push(Request {
            seq,
            op,
            answer: None,
        });
        drop(state);

        let sent = encode(RequestHeader {
            ack: true,
            seq,
            pid: 0,
        })
        .and_then(|(buf, len)| self.send(op, buf.get(..len).unwrap_or_default()));
        let answer = match sent {
            Ok(()) => self.wait_for_answer(op, seq),
            Err(error) => Err(error),
        };

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
    fn wait_for_answer(&self, op: Operation, seq: u32) -> Result<()> {
        let deadline = Instant::now() + self.ack_timeout;
        let mut buf = vec![0; REQUEST_BUFFER_LEN];
        let mut state = self.state();
        loop {
            // What another thread has read may hold our answer, so look before every read.
            if let Some(answer) = state.take_answer(seq) {
                return Ok(answer?);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let empty = self.read_to_stash(&mut state, &mut buf)?;
            if left.is_zero() {
                let waited = self.ack_timeout;
                let answer = state.take_answer(seq);
                return Ok(answer.ok_or(Error::NoAck { op, waited })??);
            }
            if empty {
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
                } else if self.note(state, datagram, &self.bindings()) {
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
        callback: Option<Callback>,
    ) -> Result<BindingId> {
        check_config(queue, &config)?;
        self.fence()?;
        let op = Operation::Bind(queue);
        let mut binding = Binding::new(queue, callback);
        let id = binding.id;
        while let Err((rejected, present)) = self.insert_binding(binding) {
            // Ours already: let the kernel say so. If it says otherwise, the queue was unbound through another
            // descriptor of this socket, and the present binding is at its end.
            self.configure(op, &ConfigRequest::bind(queue, QueueConfig::new()))?;
            self.unbind(present)?;
            binding = rejected;
        }
        match self.configure(op, &ConfigRequest::bind(queue, config)) {
            Ok(()) => Ok(id),
            Err(error) => {
                if matches!(error, Error::NoAck { .. }) {
                    self.post_unbind(id);
                } else {
                    self.forget(id);
                }
                Err(error)
            }
        }
    }

    /// Reads what may still come of queues that were unbound without waiting, and is seen to belong to no queue
    fn fence(&self) -> Result<()> {
        let State { posted, fenced, .. } = *self.state();
        if fenced < posted {
            self.sync()?;
            let mut state = self.state();
            state.fenced = state.fenced.max(posted);
        }
        Ok(())
    }

    /// Begins a binding before the kernel knows: its first packet may come before the acknowledgement
    ///
    /// Returns it if its queue has a binding, with that.
    fn insert_binding(&self, binding: Binding) -> Result<(), (Binding, BindingId)> {
        let _state = self.state(); // whoever receives sees all bindings or has nothing of this one yet
        if let Some(present) = self.bindings().get(binding.id.queue) {
            return Err((binding, present.id));
        }
        self.change_bindings(|bindings| bindings.insert(binding));
        Ok(())
    }

    /// Changes a queue's settings
    pub(crate) fn update(&self, op: Operation, id: BindingId, config: QueueConfig) -> Result<()> {
        check_config(id.queue, &config)?;
        if !self.bindings().is_current(id) {
            return Err(Error::Ended { op });
        }
        self.configure(op, &ConfigRequest::update(id.queue, config))
    }

    /// Unbinds a queue and waits for the acknowledgement; does nothing if this binding has ended
    pub(crate) fn unbind(&self, id: BindingId) -> Result<()> {
        if !self.bindings().is_current(id) {
            return Ok(());
        }
        let op = Operation::Unbind(id.queue);
        let result = self.configure(op, &ConfigRequest::unbind(id.queue));
        if matches!(result, Err(Error::NoAck { .. })) {
            self.state().posted += 1;
        }
        self.forget(id);
        result
    }

    /// Unbinds a queue without waiting; does nothing if this binding has ended
    pub(crate) fn post_unbind(&self, id: BindingId) {
        let bindings = self.bindings.read().unwrap_or_else(PoisonError::into_inner);
        if !bindings.is_current(id) {
            return;
        }
        let mut buf = [0; ConfigRequest::MAX_LEN];
        let request = ConfigRequest::unbind(id.queue);
        if let Ok(len) = request.encode(&mut buf, RequestHeader::default()) {
            let message = buf.get(..len).unwrap_or_default();
            let _ = self.send(Operation::Unbind(id.queue), message);
        }
        drop(bindings); // held until here, so that no later binding can be hit
        self.state().posted += 1;
        self.forget(id);
    }

    /// Ends a binding: its keys are stale from here on, and what waits of it in the stash is gone in the kernel too
    fn forget(&self, id: BindingId) {
        // Its callback may own anything, other queues too, so it is dropped after the lock is given back.
        let _keep = self.bindings();
        let mut state = self.state();
        if !self.bindings().is_current(id) {
            return;
        }
        self.change_bindings(|bindings| bindings.remove(id));
        let before = state.stash.len();
        state.stash.retain(|stashed| match stashed {
            Stashed::Datagram(bytes) => {
                PacketKey::peek(bytes).is_none_or(|key| key.queue != id.queue)
            }
            Stashed::Overrun => true,
        });
        let discarded = before - state.stash.len();
        state.stats.discarded += u64::try_from(discarded).unwrap_or(u64::MAX);
    }

    /// Every binding
    pub(crate) fn bound(&self) -> Vec<BindingId> {
        self.bindings().ids().collect()
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
        batch.clear();
        let mut state = self.state();
        let previous = std::mem::replace(&mut batch.content.bindings, self.bindings());
        let filled = self.fill_locked(&mut state, batch);
        drop(state);
        drop(previous); // perhaps the last to know of a callback, as in `forget`
        filled
    }

    fn fill_locked(&self, state: &mut State, batch: &mut RecvBatch) -> Result<bool> {
        if !state.stash.is_empty() {
            std::mem::swap(&mut batch.content.stash, &mut state.stash);
            return Ok(true);
        }
        loop {
            let slots = batch.arena.chunks_exact_mut(batch.slot_len);
            match sys::recv_many(self.as_fd(), slots, &mut batch.slots) {
                Ok(n) => {
                    batch.content.filled = n;
                    if self.note_slots(state, batch) {
                        return Ok(true);
                    }
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::ENOBUFS) => {
                        state.stats.overruns += 1;
                        batch.content.overruns += 1;
                    }
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN) => {
                        batch.content.filled = 0;
                        return Ok(batch.content.overruns > 0);
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

    fn note_slots(&self, state: &mut State, batch: &mut RecvBatch) -> bool {
        let mut any = batch.content.overruns > 0;
        let datagrams = batch.arena.chunks_exact(batch.slot_len);
        let received = batch.slots.iter_mut().take(batch.content.filled);
        for (received, slot) in received.zip(datagrams) {
            if !received.from_kernel {
                state.stats.foreign += 1;
                received.len = 0;
            }
            let datagram = slot.get(..received.len).unwrap_or_default();
            any |= self.note(state, datagram, &batch.content.bindings);
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
    /// Returns what is to be looked at now if that is not the datagram alone.
    pub(crate) fn take_in(&self, datagram: &[u8]) -> (Bindings, Option<VecDeque<Stashed>>) {
        let mut state = self.state();
        let bindings = self.bindings();
        let has_events = self.note(&mut state, datagram, &bindings);
        if state.stash.is_empty() {
            return (bindings, None);
        }
        let mut all = std::mem::take(&mut state.stash);
        if has_events {
            all.push_back(Stashed::Datagram(datagram.into()));
        }
        (bindings, Some(all))
    }

    /// Puts back what was taken in and could not be looked at, in front of what has come since
    pub(crate) fn put_back(&self, mut rest: VecDeque<Stashed>) {
        if rest.is_empty() {
            return;
        }
        let mut state = self.state();
        rest.append(&mut state.stash);
        state.stash = rest;
        drop(state);
        self.wake();
    }

    /// Sees a datagram for the first time: hands answers to the requests that wait for them, and counts
    ///
    /// Says whether there is an event in it.
    fn note(&self, state: &mut State, datagram: &[u8], bindings: &Bindings) -> bool {
        if let Some(key) = single_packet(datagram) {
            return state.note_packet(key, bindings);
        }
        let mut answered = false;
        for message in Messages::new(datagram) {
            answered |= matches!(message, Ok(Message::Reply(reply)) if state.note_answer(&reply));
        }
        if answered {
            self.answered.notify_all();
        }
        let mut messages = Messages::new(datagram);
        let mut any = false;
        while let Some(event) = next_event(&mut messages, bindings) {
            any = true;
            match event {
                Event::Packet(packet) => {
                    state.note_packet(packet.key(), bindings);
                }
                Event::Refused(_) => state.stats.refused_verdicts += 1,
                Event::Overrun => state.stats.overruns += 1,
                Event::Malformed(_) => state.stats.malformed += 1,
                Event::Truncated { key, .. } => {
                    state.stats.truncated += 1;
                    if let Some(key) = key {
                        state.note_packet(key, bindings);
                    }
                }
            }
        }
        any
    }
}

impl State {
    #[inline]
    fn note_packet(&mut self, key: PacketKey, bindings: &Bindings) -> bool {
        self.stats.packets += 1;
        let Some(binding) = bindings.get(key.queue) else {
            self.stats.discarded += 1;
            return false;
        };
        self.stats.lost_packets += u64::from(binding.note(key.id));
        true
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

/// The least that a replaced payload must have: its network header
fn check_payload(payload: &[u8]) -> Result<()> {
    const IPV4_HEADER_LEN: usize = 20;
    const IPV6_HEADER_LEN: usize = 40;
    let first = payload.first().copied().unwrap_or(0);
    let needed = match first >> 4 {
        4 => IPV4_HEADER_LEN.max(usize::from(first & 0xf) * 4),
        6 => IPV6_HEADER_LEN,
        _ => IPV4_HEADER_LEN,
    };
    if payload.len() < needed {
        return Err(Error::PayloadTooShort {
            needed,
            had: payload.len(),
        });
    }
    Ok(())
}

/// Encodes a verdict into `out`, in place of what was there
pub(crate) fn encode_verdict(
    out: &mut Vec<u8>,
    key: PacketKey,
    decision: &Decision<'_>,
) -> Result<()> {
    out.clear();
    if let Some(payload) = decision.payload() {
        check_payload(payload)?;
    }
    out.resize(decision.max_len(), 0);
    let encoded = decision.encode(out, key.queue, key.id, verdict_header(key));
    out.truncate(*encoded.as_ref().unwrap_or(&0));
    encoded?;
    Ok(())
}

impl Shared {
    pub(crate) fn verdict(&self, key: PacketKey, decision: &Decision<'_>) -> Result<()> {
        if decision.max_len() > Decision::SMALL_LEN {
            let mut out = Vec::new();
            encode_verdict(&mut out, key, decision)?;
            return self.send_verdict(key, &out);
        }
        let mut out = [0; Decision::SMALL_LEN];
        let len = decision.encode(&mut out, key.queue, key.id, verdict_header(key))?;
        self.send_verdict(key, out.get(..len).unwrap_or_default())
    }

    /// Sends an encoded verdict if its packet's binding still stands
    pub(crate) fn send_verdict(&self, key: PacketKey, message: &[u8]) -> Result<()> {
        let bindings = self.bindings.read().unwrap_or_else(PoisonError::into_inner);
        if !bindings.is_current(key.into()) {
            return Err(Error::Stale { key });
        }
        self.send(Operation::Verdict(key), message)
    }
}
