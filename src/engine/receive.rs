//! Receiving, and recording each datagram once

use std::io;
use std::os::fd::AsFd;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use nfqnl_proto::{Message, Messages, PacketKey};

use super::{Engine, State};
use crate::error::{Error, Operation, Result};
use crate::event::refusal;
use crate::recv_batch::{Slots, Stashed};
use crate::sys::{self, Block};
use crate::verdict::Recorded;

/// The time that a receive call waits if nothing is there
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Wait {
    No,
    Until(Instant),
    Forever,
}

impl Wait {
    /// Returns the time left; `None` once it is over
    fn left(self) -> Option<Duration> {
        match self {
            Self::No => None,
            Self::Forever => Some(Duration::MAX),
            Self::Until(deadline) => deadline
                .checked_duration_since(sys::now())
                .filter(|left| !left.is_zero()),
        }
    }
}

/// The meaning of a datagram, found when it is recorded
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Not an event: an answer to a request, or a packet of an unbound queue
    #[default]
    Nothing,
    /// A packet of the binding with this number
    Packet(u16),
    /// Another event
    Other,
}

impl Engine {
    /// Receives what is there, waits if there is nothing, and returns true if something was read
    ///
    /// A call that does not wait reads until there is an event or the socket is empty, and returns
    /// false in the second case. A call that waits returns once it has read anything, and returns
    /// false at its deadline and when a waker ends it.
    pub(crate) fn receive(&self, slots: &mut Slots, wait: Wait) -> Result<bool> {
        let mut state = self.state();
        state.note_thread();
        let (mut state, received) = self.receive_locked(state, slots, wait);
        // An overrun, and what requests of other threads have read
        slots.stash.append(&mut state.stash);
        if wait != Wait::No {
            // Whatever ended this call, its thread goes on now: wakes so far have done their work.
            slots.all_seen = self.wake.all_since(slots.all_seen);
            self.wake.take(slots.all_seen);
        }
        self.pass_on(&mut state);
        received
    }

    fn receive_locked<'s>(
        &'s self,
        mut state: MutexGuard<'s, State>,
        slots: &mut Slots,
        wait: Wait,
    ) -> (MutexGuard<'s, State>, Result<bool>) {
        let all = slots.all_seen;
        // If the program made the descriptor non-blocking, the receive call does not block.
        let mut can_block = wait == Wait::Forever;
        let mut has_polled = self.busy_poll.is_zero();
        loop {
            let has_stash = !state.stash.is_empty();
            slots.stash.append(&mut state.stash);
            let is_over =
                has_stash || wait.left().is_none() || (wait != Wait::No && self.wake.take(all));
            // A call for one datagram is never short: only a look at the empty socket ends an
            // overrun.
            let must_look = is_over
                || state.has_several_threads()
                || state.is_in_overrun
                || self.wake.is_outstanding();
            if must_look && !state.is_read_unlocked() {
                match self.receive_now(&mut state, slots) {
                    Ok(true)
                        if wait == Wait::No && !slots.has_events(0) && state.stash.is_empty() =>
                    {
                        continue;
                    }
                    Ok(false) => {}
                    received => return (state, received),
                }
            }
            // A wake that came before the look cleared the flag sent no message.
            if is_over || (wait != Wait::No && self.wake.take(all)) {
                return (state, Ok(has_stash));
            }
            if !has_polled {
                has_polled = true;
                let received;
                (state, received) = self.poll_busily(state, slots, wait);
                match received {
                    Ok(false) => continue,
                    received => return (state, received),
                }
            }
            if state.reader().is_some() {
                state.waiting_readers += 1;
                state = sys::wait_for(&self.reader_left, state, wait.left().unwrap_or_default());
                state.waiting_readers -= 1;
                continue;
            }
            let is_unlocked = can_block && !state.has_several_threads();
            state.reader = Some(Reader {
                process: sys::generation(),
                unlocked_room: is_unlocked.then(|| slots.room()),
                all,
            });
            drop(state);
            let (received, readable) = match is_unlocked {
                true => (Some(slots.receive(self.as_fd(), Block::ForFirst)), Ok(())),
                false => (None, self.wait_readable(wait)),
            };
            state = self.state();
            state.reader = None;
            let received = match received {
                Some(received) => {
                    can_block = !is_would_block(&received);
                    let received = self.record(&mut state, slots, received);
                    state.is_out_of_order = false;
                    received
                }
                None => readable.and_then(|()| self.receive_now(&mut state, slots)),
            };
            match received {
                Ok(false) => {}
                received => return (state, received),
            }
        }
    }

    /// Receives without blocking for a time; returns true if something was read
    ///
    /// Other threads may take the lock between two tries. This ends early at a wake, and when
    /// another thread receives, or waits for an answer.
    fn poll_busily<'s>(
        &'s self,
        mut state: MutexGuard<'s, State>,
        slots: &mut Slots,
        wait: Wait,
    ) -> (MutexGuard<'s, State>, Result<bool>) {
        let begin = sys::now();
        let all = slots.all_seen;
        loop {
            let is_woken = self.wake.is_requested() || self.wake.all_since(all) != all;
            let are_others = state.reader().is_some()
                || state.waiting_readers + state.waiting_requests > 0
                || !state.stash.is_empty();
            if is_woken || are_others || wait.left().is_none() || begin.elapsed() > self.busy_poll {
                return (state, Ok(false));
            }
            match self.receive_now(&mut state, slots) {
                Ok(false) => {}
                received => return (state, received),
            }
            drop(state);
            std::thread::yield_now(); // the sender may need this CPU
            state = self.state();
        }
    }

    /// Receives what is there without blocking; returns true if something was read
    fn receive_now(&self, state: &mut State, slots: &mut Slots) -> Result<bool> {
        let received = slots.receive(self.as_fd(), Block::No);
        self.record(state, slots, received)
    }

    fn wait_readable(&self, wait: Wait) -> Result<()> {
        let timeout = match wait.left() {
            None => 0,
            Some(Duration::MAX) => -1,
            Some(left) => poll_timeout(left),
        };
        match sys::wait_readable(self.as_fd(), timeout) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                Err(Error::io(Operation::Receive)(error))
            }
            _ => Ok(()),
        }
    }

    /// Wakes the threads that may go on now: all that wait for an answer, and one that wants to
    /// read
    ///
    /// Each leaving thread calls this: it may have taken a signal meant for one thread, or read a
    /// wake message for which another thread polls.
    pub(super) fn pass_on(&self, state: &mut State) {
        if state.waiting_requests > 0 {
            self.answered.notify_all();
        }
        let all = self.wake.all_since(state.all_woken);
        match state.reader() {
            Some(reader)
                if self.wake.all_since(reader.all) != reader.all || self.wake.is_requested() =>
            {
                self.wake.make_readable();
            }
            None if state.waiting_readers > 0 => match std::mem::replace(&mut state.all_woken, all)
            {
                woken if woken == all => self.reader_left.notify_one(),
                _ => self.reader_left.notify_all(),
            },
            _ => {}
        }
    }

    /// Does the same, and makes the descriptor readable if the stash has entries
    pub(super) fn leave(&self, state: &mut State) {
        if !state.stash.is_empty() {
            self.wake.make_readable();
        }
        self.pass_on(state);
    }

    /// Records the result of a receive call; returns true if something was read
    fn record(
        &self,
        state: &mut State,
        slots: &mut Slots,
        received: io::Result<usize>,
    ) -> Result<bool> {
        if let Err(error) = received {
            return self.record_error(state, error);
        }
        self.record_slots(state, slots);
        let count = u32::try_from(slots.filled).unwrap_or(u32::MAX);
        self.note_read(slots.filled_len(), count, state);
        if slots.is_short() {
            self.found_empty(state);
        }
        Ok(true)
    }

    /// Records a failed receive call; returns true if it was an overrun
    fn record_error(&self, state: &mut State, error: io::Error) -> Result<bool> {
        match error.raw_os_error() {
            Some(libc::ENOBUFS) => {
                self.overruns.fetch_add(1, Relaxed);
                state.is_in_overrun = true;
                state.stats.overruns += 1;
                state.stash.push_back(Stashed::Overrun);
                self.wake.clear_outstanding();
                Ok(true)
            }
            Some(libc::EAGAIN) => {
                self.found_empty(state);
                Ok(false)
            }
            Some(libc::EINTR) => Ok(false),
            _ => Err(Error::io(Operation::Receive)(error)),
        }
    }

    pub(super) fn found_empty(&self, state: &mut State) {
        state.is_in_overrun = false;
        self.unread.store(0, Relaxed);
        self.wake.clear_outstanding();
    }

    fn note_read(&self, bytes: usize, datagrams: u32, state: &mut State) {
        // Here the answer to a wake message may be lost without a report: the kernel reports one
        // overrun until the socket is empty, and other code may have received the report.
        if state.is_in_overrun || !self.reports_overruns || self.may_be_read_elsewhere() {
            self.wake.clear_outstanding();
        }
        state.bytes_read += u64::try_from(bytes).unwrap_or(0);
        if self.unread.load(Relaxed) > 0 {
            let less = |unread: u32| Some(unread.saturating_sub(datagrams));
            let _ = self.unread.fetch_update(Relaxed, Relaxed, less);
        }
    }

    /// Records the datagrams in the slots; consecutive packets of one queue together
    fn record_slots(&self, state: &mut State, slots: &mut Slots) {
        let mut stretch: Option<Stretch> = None;
        for (datagram, kind) in slots.received() {
            let key = PacketKey::peek(datagram);
            if let (Some(key), Some(stretch)) = (key, &mut stretch) {
                if stretch.extend(key) {
                    *kind = stretch.kind;
                    continue;
                }
            }
            if let Some(stretch) = stretch.take() {
                self.record_packets(state, stretch);
            }
            *kind = match key {
                Some(key) => stretch.insert(Stretch::new(key, state)).kind,
                None => self.record_message(state, datagram),
            };
        }
        if let Some(stretch) = stretch {
            self.record_packets(state, stretch);
        }
    }

    /// Records one datagram, or one message of a buffer passed on by the program
    pub(super) fn record_datagram(&self, state: &mut State, datagram: &[u8]) -> Kind {
        self.note_read(datagram.len(), 1, state);
        let Some(key) = PacketKey::peek(datagram) else {
            return self.record_message(state, datagram);
        };
        let stretch = Stretch::new(key, state);
        self.record_packets(state, stretch);
        stretch.kind
    }

    #[inline]
    fn record_packets(&self, state: &mut State, stretch: Stretch) {
        let n = u64::from(stretch.last.wrapping_sub(stretch.first.id())) + 1;
        state.stats.packets += n;
        let seen = self.seen(state);
        let Some(binding) = state.bindings.get(stretch.first.queue()) else {
            state.stats.after_unbind += n;
            return;
        };
        let mut outstanding = binding.outstanding();
        if outstanding.has_orphans() {
            drop(outstanding);
            // After a failure the next packets try again.
            let _ = self.answer_before(binding, stretch.first.id());
            outstanding = binding.outstanding();
        }
        let did_merge = outstanding.merges();
        let recorded = outstanding.record(stretch.first.id(), stretch.last, seen);
        state.stats.merging_ended += u64::from(did_merge && !outstanding.merges());
        drop(outstanding);
        match recorded {
            Recorded::After(missing) => state.stats.missing_packets += u64::from(missing),
            Recorded::Late => {
                state.stats.missing_packets = state.stats.missing_packets.saturating_sub(n);
            }
        }
    }

    /// Records a message other than a packet
    fn record_message(&self, state: &mut State, datagram: &[u8]) -> Kind {
        match Messages::new(datagram).next() {
            Some(Ok(Message::Reply(reply))) => match refusal(&reply) {
                Some(refusal) if refusal.is_of_orphans() => Kind::Nothing,
                Some(refusal) => {
                    state.stats.refused_verdicts += 1;
                    // After these errors no packet recorded as answered still waits.
                    if !matches!(refusal.errno(), libc::ENOENT | libc::EINVAL | libc::ENODEV) {
                        self.end_merging(state);
                    }
                    Kind::Other
                }
                None => {
                    self.record_answer(state, &reply);
                    Kind::Nothing
                }
            },
            Some(Ok(Message::Overrun) | Err(_)) => Kind::Other,
            Some(Ok(_)) | None => Kind::Nothing,
        }
    }

    /// Sends verdicts of all bindings singly from here on
    fn end_merging(&self, state: &mut State) {
        if self.merges() && self.merges.swap(false, Relaxed) {
            for binding in state.bindings.iter() {
                let mut outstanding = binding.outstanding();
                state.stats.merging_ended += u64::from(outstanding.merges());
                outstanding.end_merging();
            }
        }
    }

    /// Takes in a message received by the program itself
    ///
    /// Returns its kind, or `None` if the message went to the stash, behind older entries.
    pub(crate) fn take_in(&self, message: &[u8], is_alone: bool) -> Option<Kind> {
        // The program may pass messages on in another order, so the outstanding packets are
        // unknown.
        self.is_read_outside.store(true, Relaxed);
        let mut state = self.state();
        self.end_merging(&mut state);
        let kind = self.record_datagram(&mut state, message);
        self.pass_on(&mut state);
        if is_alone && state.stash.is_empty() {
            return Some(kind);
        }
        if kind != Kind::Nothing {
            state.stash.push_back(Stashed::new(message, kind));
        }
        None
    }

    /// Takes the oldest entry of the stash
    pub(crate) fn pop_stash(&self) -> Option<Stashed> {
        self.state().stash.pop_front()
    }

    /// Makes the descriptor readable if packets wait in the stash
    pub(crate) fn announce_stash(&self) {
        self.leave(&mut self.state());
    }

    /// Receives at most one event without blocking, copied to its own memory
    ///
    /// `None` if the socket is empty, or if another thread is about to empty it.
    #[cfg(feature = "tokio")]
    pub(crate) fn receive_owned(&self, buf: &mut [u8]) -> Result<Option<Stashed>> {
        let mut state = self.state();
        state.note_thread();
        loop {
            if let Some(stashed) = state.stash.pop_front() {
                self.leave(&mut state);
                return Ok(Some(stashed));
            }
            if state.is_read_unlocked() || !self.read_to_stash(&mut state, buf)? {
                self.leave(&mut state);
                return Ok(None);
            }
        }
    }

    /// Reads one datagram to the stash; returns true if something was read
    pub(super) fn read_to_stash(&self, state: &mut State, buf: &mut [u8]) -> Result<bool> {
        if state.is_given_away {
            return Ok(false);
        }
        let read = sys::recv_one(self.as_fd(), Block::No, buf);
        self.stash(state, read.map(|len| buf.get(..len).unwrap_or_default()))
    }

    pub(super) fn stash(&self, state: &mut State, read: io::Result<&[u8]>) -> Result<bool> {
        match read {
            Ok(datagram) => {
                let kind = self.record_datagram(state, datagram);
                if kind != Kind::Nothing {
                    state.stash.push_back(Stashed::new(datagram, kind));
                }
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(error) => self.record_error(state, error),
        }
    }
}

fn is_would_block(received: &io::Result<usize>) -> bool {
    matches!(received, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

/// Rounds up to milliseconds, so the last wait does not spin; limited to the maximum of poll
fn poll_timeout(left: Duration) -> libc::c_int {
    let left = left.as_micros().div_ceil(1000);
    left.try_into().unwrap_or(libc::c_int::MAX)
}

/// Packets of one queue with consecutive ids
#[derive(Clone, Copy)]
struct Stretch {
    first: PacketKey,
    last: u32,
    kind: Kind,
}

impl Stretch {
    fn new(key: PacketKey, state: &State) -> Self {
        let binding = state.bindings.get(key.queue());
        Self {
            first: key,
            last: key.id(),
            kind: binding.map_or(Kind::Nothing, |binding| Kind::Packet(binding.id.number)),
        }
    }

    /// Adds a packet if it is the next one; returns true if it was
    #[inline]
    fn extend(&mut self, key: PacketKey) -> bool {
        let is_next = key.queue() == self.first.queue() && key.id() == self.last.wrapping_add(1);
        if is_next {
            self.last = key.id();
        }
        is_next
    }
}

/// A thread that waits for the socket, for all threads of its process
#[derive(Clone, Copy, Debug)]
pub(super) struct Reader {
    /// [`sys::generation`]: after a fork the child has a copy of this, but not the thread
    pub(super) process: u32,
    /// The room for datagrams, if the thread receives without the lock; otherwise it polls
    pub(super) unlocked_room: Option<usize>,
    /// The count of [`Waker::wake_all`](super::Waker::wake_all) when its call began
    pub(super) all: u32,
}

impl State {
    fn reader(&self) -> Option<Reader> {
        self.reader
            .filter(|reader| reader.process == sys::generation())
    }

    /// Returns true while a thread may have received datagrams and not recorded them yet
    #[inline]
    pub(super) fn is_read_unlocked(&self) -> bool {
        self.unlocked_room().is_some()
    }

    /// Returns the room of this thread for datagrams, in bytes
    #[inline]
    pub(super) fn unlocked_room(&self) -> Option<u64> {
        let room = self.reader()?.unlocked_room?;
        Some(u64::try_from(room).unwrap_or(u64::MAX))
    }

    /// Records the calling thread
    #[inline]
    pub(super) fn note_thread(&mut self) {
        let thread = sys::thread_mark();
        self.calls_alone = match self.thread {
            0 => u8::MAX, // the first thread is alone
            last if last == thread => self.calls_alone.saturating_add(1),
            _ => {
                self.has_met_others = true;
                0
            }
        };
        self.thread = thread;
    }

    /// Returns true if several threads receive or configure; see [`State::calls_alone`]
    #[inline]
    pub(super) fn has_several_threads(&self) -> bool {
        /// A thread counts as alone after this number of calls in a row
        const ALONE: u8 = 64;
        // A waiting request would wake a blocked reader again and again.
        self.waiting_readers + self.waiting_requests > 0 || self.calls_alone < ALONE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_rounded_up_to_milliseconds() {
        let of = poll_timeout;
        assert_eq!(of(Duration::ZERO), 0);
        assert_eq!(of(Duration::from_micros(1)), 1);
        assert_eq!(of(Duration::from_micros(1001)), 2);
        let most = Duration::from_millis(0x7fff_ffff);
        assert_eq!(of(most), libc::c_int::MAX);
        assert_eq!(of(most + Duration::from_micros(1)), libc::c_int::MAX);
        // As 32-bit numbers these would be short timeouts, or none at all.
        assert_eq!(of(Duration::from_millis((1 << 32) | 5)), libc::c_int::MAX);
        assert_eq!(of(Duration::from_millis((1 << 32) - 1)), libc::c_int::MAX);
        assert_eq!(of(Duration::MAX), libc::c_int::MAX);
    }
}
