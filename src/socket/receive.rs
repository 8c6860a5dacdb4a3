//! Receiving, and what is noted of everything that is seen for the first time

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nfqnl_proto::{Message, Messages, Packet, PacketKey};

use super::{Shared, State};
use crate::batch::{Contents, RecvBatch, Stashed};
use crate::bindings::{Bindings, Noted, Stretch};
use crate::error::{Error, Operation, Refusal, Result};
use crate::event::{Event, index_sole_packet, next_event, next_message};
use crate::sys::{self, Sender, Wait};

/// How long a call waits for another thread before it looks again
pub(super) const RECHECK: Duration = Duration::from_millis(5);

impl Shared {
    /// Fills the batch with what is there; says whether it has any events
    ///
    /// Returns `false` only when the socket is empty, and then only if it shall not wait, or the descriptor is
    /// non-blocking.
    pub(crate) fn fill(&self, batch: &mut RecvBatch, wait: Wait) -> Result<bool> {
        if batch.has_events() {
            return Ok(true);
        }
        let contents = batch.clear();
        loop {
            let mut state = self.state();
            // No event was in what came before, and later bindings must find none in it.
            contents.filled = 0;
            if !state.stash.is_empty() {
                state.refresh(&mut contents.bindings);
                std::mem::swap(&mut contents.stash, &mut state.stash);
                return Ok(true);
            }
            let received = if state.has_reader {
                // Another thread waits in the kernel. What is there now, it is about to take.
                let at_most = match wait {
                    _ if contents.overruns > 0 => return Ok(true),
                    Wait::ForFirst => Duration::MAX,
                    Wait::No if self.is_readable()? => RECHECK,
                    Wait::No => return Ok(false),
                };
                drop(self.wait_for_others(state, at_most));
                continue;
            } else if wait == Wait::No || contents.overruns > 0 || state.is_in_overrun() {
                self.look_before_receiving(&mut state);
                contents.receive(self.as_fd(), Wait::No, state.sender())
            } else {
                state.has_reader = true;
                let sender = state.sender();
                drop(state);
                let received = contents.receive(self.as_fd(), wait, sender);
                state = self.state();
                state.has_reader = false;
                self.tell_others(&state);
                received
            };
            state.refresh(&mut contents.bindings);
            match received {
                Ok(foreign) => {
                    state.stats.foreign += foreign;
                    let any = self.note_slots(&mut state, contents);
                    self.look_after_receiving(&mut state, contents.filled < contents.lens.len());
                    if any {
                        // What was put back meanwhile goes along: what made the descriptor readable for it was read too.
                        std::mem::swap(&mut contents.stash, &mut state.stash);
                        return Ok(true);
                    }
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::ENOBUFS) => {
                        state.note_overrun();
                        contents.overruns += 1;
                    }
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN) => {
                        let was_to_wait = state.is_in_overrun() && wait == Wait::ForFirst;
                        self.look_after_receiving(&mut state, true);
                        if contents.overruns > 0 || !was_to_wait {
                            return Ok(contents.overruns > 0);
                        }
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

    /// Sees the datagrams in the slots for the first time; says whether there is an event in them
    ///
    /// Most are the next packet of the same queue, so that is noted once for all that follow each other.
    fn note_slots(&self, state: &mut State, contents: &mut Contents) -> bool {
        let mut any = contents.overruns > 0;
        // What comes one after the other, and the number of its binding; 0 if its queue is not bound
        let mut run: Option<(Stretch, u16)> = None;
        let slots = contents.arena.chunks_exact(contents.slot_len);
        let parts = slots.zip(&contents.lens).zip(&mut contents.packets);
        for ((slot, &len), index) in parts.take(contents.filled) {
            let datagram = slot.get(..len).unwrap_or_default();
            let key = index_sole_packet(datagram, index).then(|| index.over(datagram).key());
            let goes_on = match (&mut run, key) {
                (Some((stretch, _)), Some(key)) => stretch.extend(key),
                _ => false,
            };
            if !goes_on {
                if let Some((stretch, _)) = run.take() {
                    any |= self.note_packets(state, stretch);
                }
                match key {
                    Some(key) => {
                        let binding = state.bindings.get(key.queue);
                        let number = binding.map_or(0, |binding| binding.id.number);
                        run = Some((Stretch::new(key), number));
                    }
                    None => any |= self.note_messages(state, datagram),
                }
            }
            index.set_binding(run.map_or(0, |(_, number)| number));
        }
        if let Some((stretch, _)) = run {
            any |= self.note_packets(state, stretch);
        }
        any
    }

    /// Waits, as long as `at_most`, for another thread to come back from the kernel or to see an answer
    pub(super) fn wait_for_others<'s>(
        &self,
        mut state: MutexGuard<'s, State>,
        at_most: Duration,
    ) -> MutexGuard<'s, State> {
        state.sleepers += 1;
        state = sys::wait_for(&self.changed, state, at_most);
        state.sleepers -= 1;
        state
    }

    /// Wakes those who [wait](Self::wait_for_others)
    fn tell_others(&self, state: &State) {
        if state.sleepers > 0 {
            self.changed.notify_all();
        }
    }

    fn is_readable(&self) -> Result<bool> {
        match sys::wait_readable(self.as_fd(), 0) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true), // to look again
            looked => looked.map_err(|source| Error::Io {
                op: Operation::Receive,
                source,
            }),
        }
    }

    /// Waits for something to receive, until the deadline if there is one; `false` when it has passed
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Result<bool> {
        loop {
            let timeout = deadline.map_or(-1, |deadline| {
                poll_timeout(deadline.saturating_duration_since(sys::now()))
            });
            match sys::wait_readable(self.as_fd(), timeout) {
                Ok(true) => return Ok(true),
                Ok(false) if deadline.is_some_and(|deadline| sys::now() >= deadline) => {
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

    /// Takes in a datagram that the caller has received, which is this packet and nothing else, if one is given: behind what is stashed, if anything is
    ///
    /// Returns what is to be looked at now if that is not the datagram alone. Brings the copy of the bindings up to date,
    /// and says whether it was not.
    pub(crate) fn take_in(
        &self,
        datagram: &[u8],
        packet: Option<&Packet<'_>>,
        bindings: &mut Bindings,
    ) -> (bool, Option<VecDeque<Stashed>>) {
        // Datagrams may be passed on in another order than they came in, so what waits is not known any more.
        self.is_read_outside.store(true, Ordering::Relaxed);
        let mut state = self.state();
        let was_old = state.refresh(bindings);
        let has_events = self.note(&mut state, datagram, packet);
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
    pub(crate) fn put_back(&self, rest: VecDeque<Stashed>, bindings: &Bindings) {
        let apart = rest.into_iter().flat_map(|all| all.apart(bindings));
        let mut rest: VecDeque<_> = apart.collect();
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
    /// `packet` is what [`sole_packet`](crate::event::sole_packet) finds in it. Says whether there is an event in it.
    #[inline]
    pub(super) fn note(
        &self,
        state: &mut State,
        datagram: &[u8],
        packet: Option<&Packet<'_>>,
    ) -> bool {
        match packet {
            Some(packet) => self.note_packets(state, Stretch::new(packet.key())),
            None => self.note_messages(state, datagram),
        }
    }

    fn note_messages(&self, state: &mut State, datagram: &[u8]) -> bool {
        let mut answered = false;
        let mut messages = Messages::new(datagram);
        while let Some((bytes, message)) = next_message(&mut messages) {
            let key = match message {
                Ok(Message::Reply(reply)) => {
                    answered |= state.note_answer(&reply);
                    None
                }
                Ok(Message::Packet(packet)) => Some(packet.key()),
                Ok(_) => None,
                Err(_) => PacketKey::peek(bytes),
            };
            match key {
                // No event tells of it.
                Some(key) if state.bindings.get(key.queue).is_none() => {
                    self.note_packets(state, Stretch::new(key));
                }
                _ => {}
            }
        }
        if answered {
            self.tell_others(state);
        }
        let bindings = state.bindings.clone();
        let mut messages = Messages::new(datagram);
        let mut any = false;
        while let Some(event) = next_event(&mut messages, &bindings) {
            any = true;
            match event {
                Event::Packet(packet) => {
                    self.note_packets(state, Stretch::new(packet.key()));
                }
                Event::Refused(refusal) => {
                    state.stats.refused_verdicts += 1;
                    self.note_refusal(&refusal, &bindings);
                }
                Event::Overrun => state.stats.overruns += 1,
                Event::Malformed { key, .. } => {
                    state.stats.malformed += 1;
                    if let Some(key) = key {
                        self.note_packets(state, Stretch::new(key));
                    }
                }
                Event::Truncated { key, .. } => {
                    state.stats.truncated += 1;
                    if let Some(key) = key {
                        self.note_packets(state, Stretch::new(key));
                    }
                }
            }
        }
        any
    }

    /// Packets wait on that were thought to be answered, unless the kernel says that there is none, or has dropped it
    /// because it can't do what the verdict says
    ///
    /// Which ones is not known: without `CAP_NET_ADMIN` the kernel looks at no verdict of a send, whatever queues they are
    /// for, and refuses the first in the name of all.
    fn note_refusal(&self, refusal: &Refusal, bindings: &Bindings) {
        if matches!(refusal.errno(), libc::ENOENT | libc::EINVAL) {
            return;
        }
        self.end_runs(bindings);
    }

    /// Ends the runs of these bindings; no send is on its way then that does not know it yet
    pub(super) fn end_runs(&self, bindings: &Bindings) {
        let _all_sends_are_through = self.bindings.write();
        for binding in bindings.iter() {
            binding.waiting().go_blind();
        }
    }

    /// Notes packets, and says whether their queue is bound
    fn note_packets(&self, state: &mut State, Stretch { first, last }: Stretch) -> bool {
        let n = u64::from(last.wrapping_sub(first.id)) + 1;
        state.stats.packets += n;
        let Some(binding) = state.bindings.get(first.queue) else {
            state.stats.discarded += n;
            return false;
        };
        let losses = &mut state.losses;
        let is_lost = |gap, is_blind| {
            let count = sys::drops(self.as_fd());
            count.is_ok_and(|count| losses.explain(gap, is_blind, count))
        };
        let are_in_order = !self.is_read_outside.load(Ordering::Relaxed);
        match binding.note_received(first.id, last, are_in_order, self.coalesces(), is_lost) {
            Noted::Next => {}
            Noted::Late { .. } => {
                state.stats.lost_packets = state.stats.lost_packets.saturating_sub(n);
            }
            Noted::After { gap } => state.stats.lost_packets += u64::from(gap),
        }
        true
    }
}

/// As `poll` counts: milliseconds, rounded up so that the last wait is not a spin, and no more than it can
fn poll_timeout(left: Duration) -> libc::c_int {
    let left = left.as_micros().div_ceil(1000);
    left.try_into().unwrap_or(libc::c_int::MAX)
}

impl State {
    /// Whether another process may have sent what is received now
    pub(super) fn sender(&mut self) -> Sender {
        self.strays_end.take_if(|end| sys::now() >= *end);
        match self.strays_end {
            Some(_) => Sender::IsAsked,
            None => Sender::IsKernel,
        }
    }

    /// Brings a copy of the bindings up to date, and says whether it was not
    fn refresh(&self, bindings: &mut Bindings) -> bool {
        let is_old = !bindings.is(&self.bindings);
        if is_old {
            bindings.clone_from(&self.bindings);
        }
        is_old
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_rounded_up_and_longer_than_poll_can_only_in_parts() {
        let of = poll_timeout;
        assert_eq!(of(Duration::ZERO), 0);
        assert_eq!(of(Duration::from_micros(1)), 1);
        assert_eq!(of(Duration::from_micros(1001)), 2);
        let most = Duration::from_millis(0x7fff_ffff);
        assert_eq!(of(most), libc::c_int::MAX);
        assert_eq!(of(most + Duration::from_micros(1)), libc::c_int::MAX);
        // What would be short, or no timeout at all, in 32 bits
        assert_eq!(of(Duration::from_millis((1 << 32) | 5)), libc::c_int::MAX);
        assert_eq!(of(Duration::from_millis((1 << 32) - 1)), libc::c_int::MAX);
        assert_eq!(of(Duration::MAX), libc::c_int::MAX);
    }
}
