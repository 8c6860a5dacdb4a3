//! A caller-owned batch of received datagrams, and the events in it

use std::collections::VecDeque;

use nfqnl_proto::{Messages, Packet};

use crate::bindings::Bindings;
use crate::event::{Event, next_event};
use crate::sys::Received;

/// Room for what one receive call takes: slots of equal length, one datagram each
///
/// Make one per loop and reuse it. Its memory is touched only as far as datagrams reach, so a default batch costs
/// what the packets cost.
///
/// What was received and not yet looked at stays: leave a loop over [`Events`] early, and the next receive call goes
/// on with the rest before it asks the kernel.
///
/// ```compile_fail
/// # fn f(handle: &nfqnl::Handle, batch: &mut nfqnl::RecvBatch) -> nfqnl::Result<()> {
/// let first = handle.recv(batch)?.next();
/// handle.recv(batch)?; // the slots are filled anew,
/// drop(first);         // so an event from before can't be held
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct RecvBatch {
    pub(crate) arena: Box<[u8]>,
    pub(crate) slot_len: usize,
    pub(crate) slots: Box<[Received]>,
    pub(crate) content: Content,
    progress: Progress,
}

/// What a receive call has put there
#[derive(Debug, Default)]
pub(crate) struct Content {
    /// How many slots are filled
    pub(crate) filled: usize,
    /// Overruns that were reported on the way
    pub(crate) overruns: usize,
    /// What a configuration call met before, older than the slots
    pub(crate) stash: VecDeque<Stashed>,
    pub(crate) bindings: Bindings,
}

/// Something that a configuration call received while it waited for its answer
#[derive(Debug)]
pub(crate) enum Stashed {
    Datagram(Box<[u8]>),
    Overrun,
}

/// How far the events have been looked at
#[derive(Debug, Default)]
struct Progress {
    overruns: usize,
    datagram: usize,
    offset: usize,
}

impl RecvBatch {
    /// A slot of this length holds every packet that the kernel sends today: 65531 bytes of payload, and attributes
    pub const DEFAULT_SLOT_LEN: usize = 68 * 1024;
    /// More slots than this bring nothing measurable
    pub const DEFAULT_SLOTS: usize = 32;

    /// A batch of `slots` datagrams of `slot_len` bytes each; both at least 1
    ///
    /// With a small copy range, or none, a slot of range + 256 bytes is enough (more with conntrack or security
    /// contexts). A datagram that is longer than its slot comes out as [`Event::Truncated`].
    #[must_use]
    pub fn new(slots: usize, slot_len: usize) -> Self {
        let (slots, slot_len) = (slots.max(1), slot_len.max(1));
        Self {
            arena: vec![0; slots.saturating_mul(slot_len)].into_boxed_slice(),
            slot_len,
            slots: vec![Received::default(); slots].into_boxed_slice(),
            content: Content::default(),
            progress: Progress::default(),
        }
    }

    /// What has been received and not been looked at yet
    #[must_use]
    pub fn events(&mut self) -> Events<'_> {
        Events {
            arena: &self.arena,
            slot_len: self.slot_len,
            slots: self.slots.get(..self.content.filled).unwrap_or_default(),
            content: &self.content,
            progress: &mut self.progress,
        }
    }

    pub(crate) fn has_events(&mut self) -> bool {
        let Progress {
            overruns,
            datagram,
            offset,
        } = self.progress;
        let has = self.events().next().is_some();
        self.progress = Progress {
            overruns,
            datagram,
            offset,
        };
        has
    }

    pub(crate) fn clear(&mut self) {
        self.content.filled = 0;
        self.content.overruns = 0;
        self.content.stash.clear();
        self.progress = Progress::default();
    }
}

impl Default for RecvBatch {
    /// 32 datagrams of any length: 2.1 MiB of address space, of which only what packets touch becomes memory
    fn default() -> Self {
        Self::new(Self::DEFAULT_SLOTS, Self::DEFAULT_SLOT_LEN)
    }
}

/// The events of a batch, in the order they came
///
/// They borrow the batch alone: several packets can be held at once, and verdicts and settings stay callable.
#[derive(Debug)]
pub struct Events<'b> {
    arena: &'b [u8],
    slot_len: usize,
    slots: &'b [Received],
    content: &'b Content,
    progress: &'b mut Progress,
}

impl<'b> Events<'b> {
    /// The packets alone; everything else is passed over, and counted in [`Handle::stats`](crate::Handle::stats)
    pub fn packets(self) -> impl Iterator<Item = Packet<'b>> {
        self.filter_map(Event::packet)
    }

    fn datagram(&self, index: usize) -> Option<&'b [u8]> {
        let stash = &self.content.stash;
        if let Some(stashed) = stash.get(index) {
            return Some(match stashed {
                Stashed::Datagram(bytes) => bytes,
                Stashed::Overrun => &[],
            });
        }
        let index = index - stash.len();
        let received = self.slots.get(index)?;
        let start = index.checked_mul(self.slot_len)?;
        Some(
            self.arena
                .get(start..start + received.len)
                .unwrap_or_default(),
        )
    }
}

impl<'b> Iterator for Events<'b> {
    type Item = Event<'b>;

    fn next(&mut self) -> Option<Event<'b>> {
        if self.progress.overruns < self.content.overruns {
            self.progress.overruns += 1;
            return Some(Event::Overrun);
        }
        loop {
            let index = self.progress.datagram;
            let datagram = self.datagram(index)?;
            let mut messages =
                Messages::new(datagram.get(self.progress.offset..).unwrap_or_default());
            if let Some(event) = next_event(&mut messages, &self.content.bindings) {
                self.progress.offset = datagram.len() - messages.rest().len();
                return Some(event);
            }
            self.progress.datagram += 1;
            self.progress.offset = 0;
            if matches!(self.content.stash.get(index), Some(Stashed::Overrun)) {
                return Some(Event::Overrun);
            }
        }
    }
}

impl std::iter::FusedIterator for Events<'_> {}
