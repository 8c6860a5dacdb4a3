//! Which queues the handle has bound, and the number that tells one binding of a queue from the next

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nfqnl_proto::PacketKey;

use crate::waiting::Waiting;

/// Names one binding of one queue
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BindingId {
    pub(crate) queue: u16,
    /// The number in the keys of its packets; unique in the process until 65535 attempts to bind later
    pub(crate) number: u16,
}

impl From<PacketKey> for BindingId {
    #[inline]
    fn from(key: PacketKey) -> Self {
        Self {
            queue: key.queue,
            number: key.binding,
        }
    }
}

/// One binding of a queue
#[derive(Debug)]
pub(crate) struct Binding {
    pub(crate) id: BindingId,
    pub(crate) last_id: AtomicU32,
    /// Locked for moments only, under no other lock but those on the socket's state and on the bindings
    waiting: Mutex<Waiting>,
    /// Whether the handle has a callback for its packets
    has_callback: bool,
    has_ended: AtomicBool,
}

static NEXT: AtomicU16 = AtomicU16::new(1);

impl Binding {
    pub(crate) fn new(queue: u16, has_callback: bool) -> Self {
        let number = match NEXT.fetch_add(1, Ordering::Relaxed) {
            0 => NEXT.fetch_add(1, Ordering::Relaxed), // 0 is for keys that no handle has made
            number => number,
        };
        Self {
            id: BindingId { queue, number },
            last_id: AtomicU32::new(0),
            waiting: Mutex::default(),
            has_callback,
            has_ended: AtomicBool::new(false),
        }
    }

    pub(crate) const fn key(&self, id: u32) -> PacketKey {
        PacketKey {
            queue: self.id.queue,
            binding: self.id.number,
            id,
        }
    }

    /// A panic elsewhere leaves the list as it was
    #[inline]
    pub(crate) fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether packets of it can't be answered any more
    #[inline]
    pub(crate) fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::Relaxed)
    }

    pub(crate) fn end(&self) {
        self.has_ended.store(true, Ordering::Relaxed);
    }

    /// Notes packets that have come and were numbered one after the other
    ///
    /// `are_in_order` unless others receive them too. `tracks` if it matters which ones wait; then `is_lost` says whether so
    /// many that were left out before them are lost, and nobody else has them; it is told whether the list is blind already.
    #[inline]
    pub(crate) fn note_received(
        &self,
        first: u32,
        last: u32,
        are_in_order: bool,
        tracks: bool,
        is_lost: impl FnOnce(u32, bool) -> bool,
    ) -> Noted {
        let is_lost = |gap| {
            let is_blind = self.waiting().is_blind();
            is_lost(gap, is_blind)
        };
        let (noted, is_lost) = match self.note(first, last) {
            Noted::Late { gap } if are_in_order => {
                self.last_id.store(last, Ordering::Relaxed);
                // Or the queue was bound anew by somebody else who has the socket, and its numbers begin again.
                match is_lost(gap) {
                    true => (Noted::After { gap }, true),
                    false => (Noted::Next, false),
                }
            }
            noted @ Noted::After { gap } if tracks => (noted, is_lost(gap)),
            noted => (noted, true),
        };
        match (tracks, is_lost) {
            (true, true) => self.waiting().receive(first, last),
            (true, false) => self.waiting().go_blind(),
            (false, _) => {}
        }
        noted
    }

    /// The kernel numbers packets without gaps; a message that did not fit the receive buffer has used its number up.
    #[inline]
    fn note(&self, first: u32, last: u32) -> Noted {
        let noted = match first.wrapping_sub(self.last_id.load(Ordering::Relaxed)) {
            0 | 1 => Noted::Next, // 0: once more
            step if step <= u32::MAX / 2 => Noted::After { gap: step - 1 },
            step => return Noted::Late { gap: step - 1 },
        };
        self.last_id.store(last, Ordering::Relaxed);
        noted
    }
}

/// Packets of one queue that the kernel has numbered one after the other
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stretch {
    pub(crate) first: PacketKey,
    pub(crate) last: u32,
}

impl Stretch {
    pub(crate) const fn new(key: PacketKey) -> Self {
        Self {
            first: key,
            last: key.id,
        }
    }

    /// Takes one more packet in, if it is the next one; says whether it is
    #[inline]
    pub(crate) fn extend(&mut self, key: PacketKey) -> bool {
        let is_next = key.queue == self.first.queue && key.id == self.last.wrapping_add(1);
        if is_next {
            self.last = key.id;
        }
        is_next
    }
}

/// Where packets stand among those that came before
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Noted {
    /// They are the next ones
    Next,
    /// Some were left out before them
    After { gap: u32 },
    /// They had been left out, since the program receives by itself, and passes them on in another order; if not, so many
    /// were left out before them
    Late { gap: u32 },
}

/// All bindings of a handle, by queue number; replaced as a whole when one comes or goes
#[derive(Clone, Debug, Default)]
pub(crate) struct Bindings(Arc<Vec<Arc<Binding>>>);

impl Bindings {
    #[inline]
    pub(crate) fn get(&self, queue: u16) -> Option<&Binding> {
        let index = self
            .0
            .binary_search_by_key(&queue, |binding| binding.id.queue)
            .ok()?;
        self.0.get(index).map(|binding| &**binding)
    }

    /// The binding, if it is its queue's present one
    #[inline]
    pub(crate) fn current(&self, id: BindingId) -> Option<&Binding> {
        self.get(id.queue).filter(|binding| binding.id == id)
    }

    /// Whether the binding is its queue's present one
    #[inline]
    pub(crate) fn is_current(&self, id: BindingId) -> bool {
        self.current(id).is_some()
    }

    /// Whether these are the same as `other`, and not just alike
    #[inline]
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub(crate) fn insert(&mut self, binding: Binding) {
        let all = Arc::make_mut(&mut self.0);
        match all.binary_search_by_key(&binding.id.queue, |b| b.id.queue) {
            Ok(index) | Err(index) => all.insert(index, Arc::new(binding)),
        }
    }

    /// Removes a binding; a later binding of the same queue stays
    pub(crate) fn remove(&mut self, id: BindingId) {
        Arc::make_mut(&mut self.0).retain(|binding| binding.id != id);
    }

    /// Whether any of them has a callback
    pub(crate) fn have_callbacks(&self) -> bool {
        self.0.iter().any(|binding| binding.has_callback)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Binding> {
        self.0.iter().map(|binding| &**binding)
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = BindingId> + '_ {
        self.0.iter().map(|binding| binding.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_counted_across_the_wrap_and_never_backwards() {
        let binding = Binding::new(0, false);
        assert_eq!(
            [1, 2, 5, 4, 5, 6].map(|id| binding.note(id, id)),
            [
                Noted::Next,
                Noted::Next,
                Noted::After { gap: 2 },
                Noted::Late { gap: u32::MAX - 1 },
                Noted::Next,
                Noted::Next
            ]
        );
        let binding = Binding::new(0, false);
        binding.last_id.store(u32::MAX - 1, Ordering::Relaxed);
        assert_eq!(
            [u32::MAX, 1, 2].map(|id| binding.note(id, id)),
            [Noted::Next, Noted::After { gap: 1 }, Noted::Next]
        );
    }

    #[test]
    fn more_than_half_of_all_numbers_left_out_are_lost_or_begin_anew() {
        let far = (1 << 31) + 10;
        let note = |binding: &Binding, id, is_lost| {
            binding.note_received(id, id, true, true, |_, _| is_lost)
        };
        let binding = Binding::new(0, false);
        assert_eq!(note(&binding, 1, false), Noted::Next);
        assert_eq!(note(&binding, far, true), Noted::After { gap: far - 2 });
        assert_eq!(note(&binding, far + 1, false), Noted::Next);
        let binding = Binding::new(0, false);
        assert_eq!(note(&binding, 5000, true), Noted::After { gap: 4999 });
        assert_eq!(note(&binding, 1, false), Noted::Next);
        assert_eq!(note(&binding, 2, false), Noted::Next);
        assert!(binding.waiting().is_blind());
    }

    #[test]
    fn every_binding_has_another_number() {
        let mut bindings = Bindings::default();
        let (first, second) = (Binding::new(7, false), Binding::new(7, false));
        let (old, new) = (first.id, second.id);
        assert_ne!(old, new);
        bindings.insert(first);
        assert!(bindings.is_current(old));
        bindings.remove(old);
        bindings.insert(second);
        assert!(!bindings.is_current(old) && bindings.is_current(new));
        bindings.remove(old);
        assert!(
            bindings.is_current(new),
            "removing the old binding leaves the new one"
        );
    }
}
