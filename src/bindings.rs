//! Which queues the handle has bound, and the number that tells one binding of a queue from the next

use std::fmt;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use nfqnl_proto::PacketKey;

use crate::data::QueueData;

/// Names one binding of one queue
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BindingId {
    pub(crate) queue: u16,
    /// The number in the keys of its packets; unique in the process until 65535 bindings later
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

pub(crate) type Callback = Box<dyn FnMut(&mut QueueData<'_>) + Send>;

/// One binding of a queue
pub(crate) struct Binding {
    pub(crate) id: BindingId,
    last_id: AtomicU32,
    /// Locked while it runs; it may end its own binding, and is dropped when nothing refers to that any more
    pub(crate) callback: Option<Mutex<Callback>>,
}

impl fmt::Debug for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Binding")
            .field("id", &self.id)
            .field("last_id", &self.last_id)
            .field("callback", &self.callback.is_some())
            .finish()
    }
}

static NEXT: AtomicU16 = AtomicU16::new(1);

impl Binding {
    pub(crate) fn new(queue: u16, callback: Option<Callback>) -> Self {
        let number = match NEXT.fetch_add(1, Ordering::Relaxed) {
            0 => NEXT.fetch_add(1, Ordering::Relaxed), // 0 is for keys that no handle has made
            number => number,
        };
        Self {
            id: BindingId { queue, number },
            last_id: AtomicU32::new(0),
            callback: callback.map(Mutex::new),
        }
    }

    pub(crate) const fn key(&self, id: u32) -> PacketKey {
        PacketKey {
            queue: self.id.queue,
            binding: self.id.number,
            id,
        }
    }

    /// Notes that packet `id` has come, and returns how many ids were left out before it
    ///
    /// The kernel numbers packets without gaps; a message that did not fit the receive buffer has used its number up.
    /// An id that is not after the last one (several threads read the descriptor) closes no gap.
    pub(crate) fn note(&self, id: u32) -> u32 {
        let step = id.wrapping_sub(self.last_id.load(Ordering::Relaxed));
        if step == 0 || step > u32::MAX / 2 {
            return 0;
        }
        self.last_id.store(id, Ordering::Relaxed);
        step - 1
    }
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

    /// Whether the binding is its queue's present one
    #[inline]
    pub(crate) fn is_current(&self, id: BindingId) -> bool {
        self.get(id.queue).is_some_and(|binding| binding.id == id)
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

    pub(crate) fn ids(&self) -> impl Iterator<Item = BindingId> + '_ {
        self.0.iter().map(|binding| binding.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_counted_across_the_wrap_and_never_backwards() {
        let binding = Binding::new(0, None);
        assert_eq!(
            [1, 2, 5, 4, 5, 6].map(|id| binding.note(id)),
            [0, 0, 2, 0, 0, 0]
        );
        let binding = Binding::new(0, None);
        binding.last_id.store(u32::MAX - 1, Ordering::Relaxed);
        assert_eq!([u32::MAX, 1, 2].map(|id| binding.note(id)), [0, 1, 0]);
    }

    #[test]
    fn every_binding_has_another_number() {
        let mut bindings = Bindings::default();
        let (first, second) = (Binding::new(7, None), Binding::new(7, None));
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
