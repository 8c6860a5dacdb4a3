//! A batch of received datagrams, and the events in it

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

use nfqnl_proto::consts::{MAX_PAYLOAD, align};
use nfqnl_proto::{CopyMode, QueueConfig};

use crate::engine::{Kind, wake_alls};
use crate::event::{Event, decode};
use crate::sys::{self, Arena, Block, RECV_MAX};
use crate::verdict::SendBatch;

/// Room for one receive call: slots of equal length, one datagram each
///
/// Make one batch per loop and reuse it. A default batch takes 4.6 MB of address space, but memory
/// only for the pages that datagrams have reached.
///
/// If you leave a loop over [`Events`] early, the rest stays in the batch: the next receive call
/// returns it before it asks the kernel. The descriptor does not report these events;
/// [`has_events`](Self::has_events) does. The packets in a dropped batch wait until their queue
/// ends.
///
/// ```compile_fail,E0499
/// # fn f(socket: &nfqnl::Socket, batch: &mut nfqnl::RecvBatch) -> nfqnl::Result<()> {
/// let first = socket.recv(batch)?.next();
/// socket.recv(batch)?; // this fills the slots again,
/// drop(first);         // so an earlier event cannot be kept
/// # Ok(())
/// # }
/// ```
#[must_use = "packets in a batch wait until they are answered"]
pub struct RecvBatch {
    slots: Slots,
    /// The number of events already returned
    seen: usize,
    /// Unsent verdicts of callbacks
    pub(crate) verdicts: SendBatch,
}

/// The slots, and the results of a receive call
pub(crate) struct Slots {
    arena: Arena,
    layout: Layout,
    /// The last call received a datagram longer than a head
    was_long: bool,
    /// The start of the datagram in each slot
    starts: Box<[usize]>,
    /// The length of the datagram in each slot
    lens: Box<[usize]>,
    kinds: Box<[Kind]>,
    /// The number of filled slots
    pub(crate) filled: usize,
    /// The number of datagrams requested by the last receive call
    asked: usize,
    /// Events read by requests; older than the slots
    pub(crate) stash: VecDeque<Stashed>,
    /// [`Engine::id`](crate::engine::Engine::id) of the socket that filled it
    owner: usize,
    /// The count of [`Waker::wake_all`](crate::Waker::wake_all) that its loop knows of
    pub(crate) all_seen: u32,
    pace: Pace,
}

/// The places of the slots in the arena: all heads first, then the whole slots
///
/// A receive call for many datagrams writes the first part of each to a head, and the rest to its
/// place in the whole slot. Small datagrams stay in their heads, which are on few pages: this saves
/// memory and time (docs/performance.md). The head of a longer datagram is copied to the start of
/// its slot. The call after such a datagram writes to the whole slots only, which saves the copies
/// if more long datagrams follow.
#[derive(Clone, Copy)]
struct Layout {
    slots: usize,
    /// 0 if the slots are not longer than a head
    head_len: usize,
    slot_len: usize,
}

/// An event read by a request while it waited for its answer
#[derive(Debug)]
pub(crate) enum Stashed {
    Datagram(Box<[u8]>, Kind),
    Overrun,
}

impl Stashed {
    pub(crate) fn new(datagram: &[u8], kind: Kind) -> Self {
        Self::Datagram(datagram.into(), kind)
    }

    pub(crate) fn event(&self) -> Option<Event<'_>> {
        match self {
            Self::Datagram(bytes, kind) => decode(bytes, *kind),
            Self::Overrun => Some(Event::Overrun),
        }
    }
}

impl RecvBatch {
    /// The slot length for any packet from today's kernels: 65531 bytes of payload, and attributes
    ///
    /// It is not a multiple of a page, so the slots do not all begin in the same lines of a CPU's
    /// cache.
    pub const DEFAULT_SLOT_LEN: usize = 68 * 1024 + 3 * 64;
    /// The default number of slots; more of them gain nothing measurable
    pub const DEFAULT_SLOTS: usize = RECV_MAX;

    /// Returns a batch of `slots` datagrams of `slot_len` bytes each
    ///
    /// `slots` is clamped to 1 to 64, `slot_len` to 64 bytes to 256 KiB. A datagram longer than
    /// its slot becomes [`Event::BufferTooSmall`].
    pub fn new(slots: usize, slot_len: usize) -> Self {
        /// Enough for a packet's id, which is needed to answer the packet
        const MIN_LEN: usize = 64;
        /// No message is longer
        const MAX_LEN: usize = 256 * 1024;
        let slots = slots.clamp(1, RECV_MAX);
        let slot_len = slot_len.clamp(MIN_LEN, MAX_LEN);
        let layout = Layout {
            slots,
            head_len: if slot_len > sys::HEAD_LEN {
                sys::HEAD_LEN
            } else {
                0
            },
            slot_len,
        };
        Self {
            slots: Slots {
                arena: Arena::new(layout.len()),
                layout,
                was_long: false,
                starts: vec![0; slots].into_boxed_slice(),
                lens: vec![0; slots].into_boxed_slice(),
                kinds: vec![Kind::Nothing; slots].into_boxed_slice(),
                filled: 0,
                asked: 0,
                stash: VecDeque::new(),
                owner: 0,
                all_seen: wake_alls(),
                pace: Pace::default(),
            },
            seen: 0,
            verdicts: SendBatch::new(),
        }
    }

    /// Returns a batch of `slots` datagrams for queues with these settings
    ///
    /// A small router with a copy range of 128 bytes needs 18 KiB for 16 slots. Each slot has 1
    /// KiB for attributes, enough with conntrack and security contexts.
    pub fn for_config(slots: usize, config: &QueueConfig) -> Self {
        const ATTRIBUTES: usize = 1024;
        let payload = match config.get_copy_mode() {
            Some((CopyMode::None | CopyMode::Meta, _)) => 0,
            Some((CopyMode::Packet, range)) => match usize::try_from(range) {
                Ok(range @ 1..MAX_PAYLOAD) => range,
                _ => MAX_PAYLOAD,
            },
            None => MAX_PAYLOAD,
        };
        Self::new(slots, ATTRIBUTES + align(payload))
    }

    /// Returns the events left in the batch
    pub fn events(&mut self) -> Events<'_> {
        self.parts().0
    }

    /// Returns true if events are left in the batch
    ///
    /// The descriptor does not report them: after leaving a loop over [`Events`] early, check this
    /// before you wait.
    #[must_use]
    pub fn has_events(&self) -> bool {
        self.slots.has_events(self.seen)
    }

    /// Returns the events, and the batch for their verdicts
    pub(crate) fn parts(&mut self) -> (Events<'_>, &mut SendBatch) {
        let events = Events {
            slots: &self.slots,
            seen: &mut self.seen,
        };
        (events, &mut self.verdicts)
    }

    /// Returns the id of the socket that filled the batch, while it has events or verdicts
    pub(crate) fn owner(&self) -> Option<usize> {
        (self.has_events() || !self.verdicts.is_empty()).then_some(self.slots.owner)
    }

    /// Empties the slots for a receive call of this socket
    pub(crate) fn begin(&mut self, owner: usize) -> &mut Slots {
        self.seen = 0;
        self.slots.filled = 0;
        self.slots.stash.clear();
        self.slots.owner = owner;
        &mut self.slots
    }
}

impl Default for RecvBatch {
    /// Returns a batch of 64 datagrams of any length
    fn default() -> Self {
        Self::new(Self::DEFAULT_SLOTS, Self::DEFAULT_SLOT_LEN)
    }
}

impl fmt::Debug for RecvBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecvBatch")
            .field("slots", &self.slots.lens.len())
            .field("slot_len", &self.slots.layout.slot_len)
            .field("has_events", &self.has_events())
            .finish()
    }
}

/// The events of a batch, in the order in which they came
///
/// They borrow only the batch: you can hold several packets at once, and send verdicts and
/// requests at the same time.
#[must_use = "packets that are not answered wait until their queue ends"]
pub struct Events<'b> {
    slots: &'b Slots,
    seen: &'b mut usize,
}

impl<'b> Iterator for Events<'b> {
    type Item = Event<'b>;

    #[inline]
    fn next(&mut self) -> Option<Event<'b>> {
        let slots = self.slots;
        loop {
            let index = *self.seen;
            let event = match index.checked_sub(slots.stash.len()) {
                Some(slot) if slot < slots.filled => slots.event(slot),
                Some(_) => return None,
                None => slots.stash.get(index).and_then(Stashed::event),
            };
            *self.seen = index + 1;
            if event.is_some() {
                return event;
            }
        }
    }
}

impl std::iter::FusedIterator for Events<'_> {}

impl fmt::Debug for Events<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slots = self.slots;
        let all = slots.stash.len() + slots.filled;
        f.debug_struct("Events")
            .field("left", &(all - *self.seen))
            .finish()
    }
}

impl Slots {
    /// Receives into the slots
    pub(crate) fn receive(&mut self, fd: BorrowedFd<'_>, block: Block) -> io::Result<usize> {
        self.filled = 0;
        let layout = self.layout;
        if block == Block::ForFirst && self.pace.wants_one() {
            let slot = layout.wholes(&mut self.arena).next();
            if let (Some(slot), [start, ..], [len, ..]) = (slot, &mut *self.starts, &mut *self.lens)
            {
                self.asked = 1;
                *len = sys::recv_one(fd, block, slot)?;
                *start = layout.whole(0);
                self.filled = 1;
                return Ok(1);
            }
        }
        self.asked = layout.slots;
        let (arena, lens) = (&mut self.arena, &mut self.lens);
        if layout.head_len == 0 || self.was_long {
            let slots = layout.wholes(arena).map(|slot| [slot, &mut []]);
            self.filled = sys::recv_many(fd, block, slots, lens)?;
            for (index, start) in self.starts.iter_mut().enumerate().take(self.filled) {
                *start = layout.whole(index);
            }
            let mut lens = lens.iter().take(self.filled);
            self.was_long = lens.any(|&len| len > layout.head_len);
        } else {
            self.filled = sys::recv_many(fd, block, layout.parts(arena), lens)?;
            let filled = self.starts.iter_mut().zip(lens).take(self.filled);
            for (index, (start, len)) in filled.enumerate() {
                let head = index * layout.head_len;
                *start = head;
                if *len > layout.head_len {
                    *start = layout.whole(index);
                    arena.copy_within(head..head + layout.head_len, *start);
                    self.was_long = true;
                }
            }
        }
        if block == Block::ForFirst {
            self.pace.note(self.filled);
        }
        Ok(self.filled)
    }

    /// Returns the datagrams of the last receive call, each with the place for its kind
    pub(crate) fn received(&mut self) -> impl Iterator<Item = (&[u8], &mut Kind)> {
        let arena = &self.arena;
        let places = self.starts.iter().zip(&self.lens).take(self.filled);
        places.zip(&mut self.kinds).map(|((&start, &len), kind)| {
            let datagram = arena.get(start..start + len).unwrap_or_default();
            (datagram, kind)
        })
    }

    /// Returns the total length of all slots
    pub(crate) fn room(&self) -> usize {
        self.layout.slots * self.layout.slot_len
    }

    /// Returns the total length of the datagrams in the slots
    pub(crate) fn filled_len(&self) -> usize {
        self.lens.iter().take(self.filled).sum()
    }

    /// Returns true if the receive call has emptied the socket
    pub(crate) fn is_short(&self) -> bool {
        self.filled < self.asked
    }

    /// Returns true if there is an event behind the first `seen`
    pub(crate) fn has_events(&self, seen: usize) -> bool {
        let before = self.stash.len();
        let kinds = self.kinds.iter().take(self.filled);
        let mut left = kinds.skip(seen.saturating_sub(before));
        seen < before || left.any(|kind| *kind != Kind::Nothing)
    }

    #[inline]
    fn event(&self, index: usize) -> Option<Event<'_>> {
        let kind = *self.kinds.get(index)?;
        let (start, len) = (*self.starts.get(index)?, *self.lens.get(index)?);
        decode(self.arena.get(start..start + len)?, kind)
    }
}

impl Layout {
    /// Returns the length of the arena
    const fn len(self) -> usize {
        self.slots * (self.head_len + self.slot_len)
    }

    /// Returns the start of a whole slot
    const fn whole(self, index: usize) -> usize {
        self.slots * self.head_len + index * self.slot_len
    }

    fn wholes(self, arena: &mut [u8]) -> impl Iterator<Item = &mut [u8]> {
        let wholes = arena.get_mut(self.whole(0)..).unwrap_or_default();
        wholes.chunks_exact_mut(self.slot_len)
    }

    /// Returns both parts of each slot
    fn parts(self, arena: &mut [u8]) -> impl Iterator<Item = [&mut [u8]; 2]> {
        let (heads, wholes) = arena.split_at_mut(self.whole(0));
        let heads = heads.chunks_exact_mut(self.head_len);
        let wholes = wholes.chunks_exact_mut(self.slot_len);
        heads
            .zip(wholes)
            .map(move |(head, whole)| [head, whole.get_mut(self.head_len..).unwrap_or_default()])
    }
}

/// The number of datagrams to request in the next blocking receive call
///
/// A request for many costs a little more, and the round trip of a single packet should not pay
/// for it. So after a call that asked for many and got one, the next few calls ask for one.
#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    /// Remaining calls that ask for one
    singles: u8,
    /// The last number of such calls; it doubles with each single datagram
    step: u8,
}

impl Pace {
    const MAX: u8 = 16;

    fn wants_one(&mut self) -> bool {
        let left = self.singles.checked_sub(1);
        self.singles = left.unwrap_or(0);
        left.is_some()
    }

    /// Records the result of a call that asked for many
    fn note(&mut self, came: usize) {
        self.step = match came {
            1 => (2 * self.step).clamp(1, Self::MAX),
            _ => 0,
        };
        self.singles = self.step;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn a_slot_is_as_long_as_the_copy_range() {
        let slot_len = |mode, range| {
            RecvBatch::for_config(1, &QueueConfig::new().copy_mode(mode, range))
                .slots
                .layout
                .slot_len
        };
        let bare = slot_len(CopyMode::Meta, u32::MAX);
        assert_eq!(slot_len(CopyMode::Packet, 126), bare + 128);
        for range in [0, 0xffff, 0x1_0000, 0x1_0001, u32::MAX / 2, u32::MAX] {
            assert_eq!(slot_len(CopyMode::Packet, range), bare + align(MAX_PAYLOAD));
        }
        let unnamed = RecvBatch::for_config(1, &QueueConfig::new());
        assert_eq!(unnamed.slots.layout.slot_len, bare + align(MAX_PAYLOAD));
    }

    #[test]
    fn sizes_are_clamped() {
        let room = |slots, slot_len| RecvBatch::new(slots, slot_len).slots.room();
        assert_eq!(room(usize::MAX, usize::MAX), 64 * 256 * 1024);
        assert_eq!(room(0, 0), 64);
    }

    /// A datagram's bytes, different in each datagram
    fn datagram(number: usize, len: usize) -> Vec<u8> {
        let byte = |at: usize| (at / 7 + at % 251 + 31 * number).to_le_bytes()[0];
        (0..len).map(byte).collect()
    }

    #[test]
    fn datagrams_of_all_lengths_are_whole() {
        let (here, there) = UnixDatagram::pair().unwrap();
        let mut batch = RecvBatch::new(16, 8000);
        let slots = &mut batch.slots;
        let head = sys::HEAD_LEN;
        let lens = [1, head, head + 1, 8000, 30, head - 1, 7999, 5, 4000];
        let sent: Vec<_> = (0..).zip(lens).map(|(i, len)| datagram(i, len)).collect();
        let mut receive = |sent: &[Vec<u8>]| {
            for bytes in sent {
                there.send(bytes).unwrap();
            }
            slots.receive(here.as_fd(), Block::ForFirst).unwrap();
            let received: Vec<_> = slots.received().map(|(bytes, _)| bytes).collect();
            assert_eq!(received, sent);
        };
        receive(&sent);
        receive(&sent[2..]);
        // After a call that asked for many and got one, the next ones ask for one.
        for bytes in sent.chunks(1).cycle().take(4 * sent.len()) {
            receive(bytes);
        }
    }

    #[test]
    fn a_datagram_longer_than_its_slot_is_cut() {
        let (here, there) = UnixDatagram::pair().unwrap();
        for slot_len in [64, 2000, 2112, 2113, 3000] {
            let mut batch = RecvBatch::new(3, slot_len);
            let sent = [1, 2, 3].map(|number| datagram(number, slot_len + number));
            sent.iter().for_each(|bytes| {
                there.send(bytes).unwrap();
            });
            batch.slots.receive(here.as_fd(), Block::No).unwrap();
            let received: Vec<_> = batch.slots.received().map(|(bytes, _)| bytes).collect();
            assert_eq!(received, sent.each_ref().map(|bytes| &bytes[..slot_len]));
        }
    }
}
