//! A caller-owned batch of received datagrams, and the events in it

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use nfqnl_proto::consts::{MAX_PAYLOAD, align};
use nfqnl_proto::{CopyMode, Messages, Packet, PacketIndex, PacketKey};

use crate::bindings::Bindings;
use crate::event::{Event, next_event, next_message};
use crate::sys::{self, RECV_MAX, Sender, Wait};

/// Room for what one receive call takes: slots of equal length, one datagram each
///
/// Make one per loop and reuse it. Its memory is touched only as far as datagrams reach, so a default batch costs
/// what the packets cost.
///
/// What was received and not yet looked at stays: leave a loop over [`Events`] early, and the next receive call goes
/// on with the rest before it asks the kernel. Only [`has_events`](Self::has_events) tells of it, not the descriptor;
/// and packets that a dropped batch has not shown wait unseen until their queue ends.
///
/// ```compile_fail,E0499
/// # fn f(handle: &nfqnl::Handle, batch: &mut nfqnl::RecvBatch) -> nfqnl::Result<()> {
/// let first = handle.recv(batch)?.next();
/// handle.recv(batch)?; // the slots are filled anew,
/// drop(first);         // so an event from before can't be held
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct RecvBatch {
    received: Contents,
    progress: Progress,
}

/// The slots, and what a receive call has put there
#[derive(Debug)]
pub(crate) struct Contents {
    pub(crate) arena: Box<[u8]>,
    pub(crate) slot_len: usize,
    /// How much of each slot is filled
    pub(crate) lens: Box<[usize]>,
    /// The index of the packet in each slot, if the datagram is one of a bound queue and nothing else, as nearly all are
    pub(crate) packets: Box<[PacketIndex]>,
    /// How many slots are filled
    pub(crate) filled: usize,
    /// Overruns that were reported on the way
    pub(crate) overruns: usize,
    /// What a configuration call met before, older than the slots
    pub(crate) stash: VecDeque<Stashed>,
    pub(crate) bindings: Bindings,
    pace: Pace,
}

/// Something that a configuration call received while it waited for its answer
#[derive(Debug)]
pub(crate) enum Stashed {
    /// In the stash one message alone, so that a packet can go with its queue
    Datagram(Box<[u8]>),
    Overrun,
}

impl Stashed {
    /// The events of a datagram, each by itself
    pub(crate) fn each(datagram: &[u8], bindings: &Bindings) -> impl Iterator<Item = Self> {
        let mut messages = Messages::new(datagram);
        std::iter::from_fn(move || next_message(&mut messages))
            .filter(|(bytes, _)| next_event(&mut Messages::new(bytes), bindings).is_some())
            .map(|(bytes, _)| Self::Datagram(bytes.into()))
    }

    /// The same for what is no datagram, too
    pub(crate) fn apart(self, bindings: &Bindings) -> Vec<Self> {
        match self {
            Self::Datagram(bytes) => Self::each(&bytes, bindings).collect(),
            Self::Overrun => vec![self],
        }
    }

    /// The packet, if it begins with one
    pub(crate) fn key(&self) -> Option<PacketKey> {
        match self {
            Self::Datagram(bytes) => PacketKey::peek(bytes),
            Self::Overrun => None,
        }
    }
}

/// How far the events have been looked at
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    overruns: usize,
    datagram: usize,
    offset: usize,
}

impl RecvBatch {
    /// A slot of this length holds every packet that the kernel sends today: 65531 bytes of payload, and attributes
    ///
    /// It is no multiple of a page, so that the slots do not all begin in the same lines of a CPU's cache.
    pub const DEFAULT_SLOT_LEN: usize = 68 * 1024 + 3 * 64;
    /// More slots than this bring nothing measurable
    pub const DEFAULT_SLOTS: usize = 64;

    /// A batch of `slots` datagrams of `slot_len` bytes each
    ///
    /// From 1 to 64 slots, of at least 64 bytes: less or more is taken as that. A datagram that is longer than its slot
    /// comes out as [`Event::Truncated`]; [`for_copy`](Self::for_copy) knows how long they get.
    #[must_use]
    pub fn new(slots: usize, slot_len: usize) -> Self {
        /// Enough for a packet's id, so that it can be answered
        const LEAST: usize = 64;
        let (slots, slot_len) = (slots.clamp(1, RECV_MAX), slot_len.max(LEAST));
        // Zeroed memory that was never used is not there yet.
        let mut arena = vec![0; slots.saturating_mul(slot_len)].into_boxed_slice();
        sys::no_huge_pages(&mut arena);
        Self {
            received: Contents {
                arena,
                slot_len,
                lens: vec![0; slots].into_boxed_slice(),
                packets: vec![PacketIndex::default(); slots].into_boxed_slice(),
                filled: 0,
                overruns: 0,
                stash: VecDeque::new(),
                bindings: Bindings::default(),
                pace: Pace::default(),
            },
            progress: Progress::default(),
        }
    }

    /// A batch of `slots` datagrams of queues with this copy mode and range ([`Queue::set_mode`](crate::Queue::set_mode))
    ///
    /// For routers that look at headers: 16 slots of 128 bytes range take 18 KiB. The attributes beside the payload get
    /// 1 KiB, which is enough with conntrack and security contexts.
    #[must_use]
    pub fn for_copy(slots: usize, mode: CopyMode, range: u32) -> Self {
        const ATTRIBUTES: usize = 1024;
        let payload = match (mode, usize::try_from(range)) {
            (CopyMode::NONE | CopyMode::META, _) => 0,
            (_, Ok(range @ 1..MAX_PAYLOAD)) => range,
            _ => MAX_PAYLOAD,
        };
        Self::new(slots, ATTRIBUTES + align(payload))
    }

    /// What has been received and not been looked at yet
    #[must_use]
    pub fn events(&mut self) -> Events<'_> {
        Events {
            received: &self.received,
            progress: &mut self.progress,
        }
    }

    /// Whether something has been received and not been looked at yet
    ///
    /// The descriptor does not tell of it: a loop that has left [`Events`] early looks here before it waits.
    #[must_use]
    pub fn has_events(&self) -> bool {
        let mut progress = self.progress;
        let mut events = Events {
            received: &self.received,
            progress: &mut progress,
        };
        events.next().is_some()
    }

    /// The events, and the bindings that their packets belong to
    pub(crate) fn parts(&mut self) -> (Events<'_>, &Bindings) {
        let events = Events {
            received: &self.received,
            progress: &mut self.progress,
        };
        (events, &self.received.bindings)
    }

    /// What has been received and not been looked at yet, taken out, and the bindings that it belongs to
    #[cfg(feature = "tokio")]
    pub(crate) fn take_rest(&mut self) -> (VecDeque<Stashed>, &Bindings) {
        let Progress {
            overruns,
            datagram: first,
            mut offset,
        } = self.progress;
        let mut rest = VecDeque::new();
        rest.extend((overruns..self.received.overruns).map(|_| Stashed::Overrun));
        for index in first.. {
            let Some(datagram) = self.received.datagram(index) else {
                break;
            };
            let datagram = datagram.get(std::mem::take(&mut offset)..);
            match (self.received.stash.get(index), datagram) {
                (Some(Stashed::Overrun), _) => rest.push_back(Stashed::Overrun),
                (_, Some(bytes @ [_, ..])) => rest.push_back(Stashed::Datagram(bytes.into())),
                _ => {}
            }
        }
        (rest, &self.clear().bindings)
    }

    /// What a receive call fills, emptied
    pub(crate) fn clear(&mut self) -> &mut Contents {
        self.progress = Progress::default();
        self.received.filled = 0;
        self.received.overruns = 0;
        self.received.stash.clear();
        &mut self.received
    }
}

impl Default for RecvBatch {
    /// 64 datagrams of any length: 4.5 MB of address space, of which only what packets touch becomes memory
    fn default() -> Self {
        Self::new(Self::DEFAULT_SLOTS, Self::DEFAULT_SLOT_LEN)
    }
}

/// The events of a batch, in the order they came
///
/// They borrow the batch alone: several packets can be held at once, and verdicts and settings stay callable.
#[derive(Debug)]
pub struct Events<'b> {
    received: &'b Contents,
    progress: &'b mut Progress,
}

impl<'b> Events<'b> {
    /// The packets alone
    ///
    /// Everything else is passed over, and counted in [`Handle::stats`](crate::Handle::stats): also packets that came
    /// truncated or malformed, which go on waiting. Match the [`Event`]s to answer these.
    #[must_use]
    pub fn packets(self) -> Packets<'b> {
        Packets { events: self }
    }

    /// The packet that is next, if the next datagram is one and nothing else
    #[inline]
    fn next_sole_packet(&mut self) -> Option<Packet<'b>> {
        let (received, progress) = (self.received, &mut *self.progress);
        if progress.overruns < received.overruns || !received.stash.is_empty() {
            return None;
        }
        let place = progress.datagram;
        let index = received.packets.get(..received.filled)?.get(place)?;
        if index.binding() == 0 {
            return None;
        }
        let slot = received.arena.get(place * received.slot_len..)?;
        let bytes = slot.get(..*received.lens.get(place)?)?;
        progress.datagram = place + 1;
        Some(index.over(bytes))
    }

    /// The next event, whatever it is
    fn next_of_any_kind(&mut self) -> Option<Event<'b>> {
        let (received, progress) = (self.received, &mut *self.progress);
        if progress.overruns < received.overruns {
            progress.overruns += 1;
            return Some(Event::Overrun);
        }
        loop {
            let index = progress.datagram;
            let datagram = received.datagram(index)?;
            let mut messages = Messages::new(datagram.get(progress.offset..).unwrap_or_default());
            let event = next_event(&mut messages, &received.bindings);
            if event.is_some() && !messages.rest().is_empty() {
                progress.offset = datagram.len() - messages.rest().len();
                return event;
            }
            progress.datagram += 1;
            progress.offset = 0;
            if event.is_some() {
                return event;
            }
            if matches!(received.stash.get(index), Some(Stashed::Overrun)) {
                return Some(Event::Overrun);
            }
        }
    }
}

impl<'b> Iterator for Events<'b> {
    type Item = Event<'b>;

    #[inline]
    fn next(&mut self) -> Option<Event<'b>> {
        match self.next_sole_packet() {
            Some(packet) => Some(Event::Packet(packet)),
            None => self.next_of_any_kind(),
        }
    }
}

impl std::iter::FusedIterator for Events<'_> {}

/// The packets of a batch, in the order they came; made by [`Events::packets`]
#[derive(Debug)]
pub struct Packets<'b> {
    events: Events<'b>,
}

impl<'b> Iterator for Packets<'b> {
    type Item = Packet<'b>;

    #[inline]
    fn next(&mut self) -> Option<Packet<'b>> {
        loop {
            if let Some(packet) = self.events.next_sole_packet() {
                return Some(packet);
            }
            if let Event::Packet(packet) = self.events.next_of_any_kind()? {
                return Some(packet);
            }
        }
    }
}

impl std::iter::FusedIterator for Packets<'_> {}

/// How the next waiting receive call does best
///
/// Asking for many costs a little where only one comes, and a packet's round trip should not pay for it. So after a call
/// that asked for many and got one, the next few ask for one.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pace {
    /// So many calls ask for one
    singles: u8,
    /// So many more than that, the next time
    step: u8,
}

impl Pace {
    const MOST: u8 = 16;

    /// Whether to ask for one
    fn wants_one(&mut self) -> bool {
        let left = self.singles.checked_sub(1);
        self.singles = left.unwrap_or(0);
        left.is_some()
    }

    /// Notes how many came when many were asked for
    fn note(&mut self, came: usize) {
        self.step = match came {
            1 => (2 * self.step).clamp(1, Self::MOST),
            _ => 0,
        };
        self.singles = self.step;
    }
}

impl Contents {
    /// Receives into the slots what is there, and says how many datagrams other processes have sent, of which nothing is
    pub(crate) fn receive(
        &mut self,
        fd: BorrowedFd<'_>,
        wait: Wait,
        sender: Sender,
    ) -> io::Result<u64> {
        self.filled = 0;
        let mut slots = self.arena.chunks_exact_mut(self.slot_len);
        if wait == Wait::ForFirst && self.pace.wants_one() {
            if let (Some(slot), Some(len)) = (slots.next(), self.lens.first_mut()) {
                let received = sys::recv_one(fd, wait, sender, slot)?;
                *len = received.unwrap_or(0);
                self.filled = 1;
                return Ok(u64::from(received.is_none()));
            }
        }
        let (filled, foreign) = sys::recv_many(fd, wait, sender, slots, &mut self.lens)?;
        self.filled = filled;
        if wait == Wait::ForFirst {
            self.pace.note(filled);
        }
        Ok(foreign)
    }

    /// The datagrams, from the stash and then from the slots
    fn datagram(&self, index: usize) -> Option<&[u8]> {
        if let Some(stashed) = self.stash.get(index) {
            return Some(match stashed {
                Stashed::Datagram(bytes) => bytes,
                Stashed::Overrun => &[],
            });
        }
        let index = index - self.stash.len();
        let len = *self.lens.get(..self.filled)?.get(index)?;
        let slot = self.arena.get(index.checked_mul(self.slot_len)?..)?;
        Some(slot.get(..len).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_as_long_as_the_copy_range_and_no_longer_than_packets_get() {
        let slot_len = |mode, range| RecvBatch::for_copy(1, mode, range).received.slot_len;
        let bare = slot_len(CopyMode::META, u32::MAX);
        assert_eq!(slot_len(CopyMode::PACKET, 126), bare + 128);
        for range in [0, 0xffff, 0x1_0000, 0x1_0001, u32::MAX / 2, u32::MAX] {
            assert_eq!(slot_len(CopyMode::PACKET, range), bare + align(MAX_PAYLOAD));
        }
    }
}
