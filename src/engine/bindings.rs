//! The table of bound queues, and a number for each binding of a queue

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nfqnl_proto::{ConfigFlags, PacketKey};

use crate::sys;
use crate::verdict::Outstanding;

/// Names one binding of one queue
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BindingId {
    pub(crate) queue: u16,
    /// The number in the keys of its packets; this process uses it again only after 65,535 more
    /// bindings
    pub(crate) number: u16,
}

impl From<PacketKey> for BindingId {
    #[inline]
    fn from(key: PacketKey) -> Self {
        Self {
            queue: key.queue(),
            number: key.binding(),
        }
    }
}

/// One binding of a queue
#[derive(Debug)]
pub(crate) struct Binding {
    pub(crate) id: BindingId,
    outstanding: Mutex<Outstanding>,
    has_ended: AtomicBool,
    flags: AtomicU32,
    /// [`sys::forks`] when the binding was made
    forks: u32,
}

/// The next number; 0 is for keys not made by a socket
static NEXT: AtomicU16 = AtomicU16::new(1);

impl Binding {
    pub(crate) fn new(queue: u16, outstanding: Outstanding) -> Self {
        let number = match NEXT.fetch_add(1, Relaxed) {
            0 => NEXT.fetch_add(1, Relaxed),
            number => number,
        };
        Self {
            id: BindingId { queue, number },
            outstanding: Mutex::new(outstanding),
            has_ended: AtomicBool::new(false),
            flags: AtomicU32::new(0),
            forks: sys::forks(),
        }
    }

    pub(crate) const fn key(&self, id: u32) -> PacketKey {
        PacketKey::new(self.id.queue, id).with_binding(self.id.number)
    }

    /// Locks the outstanding packets; a panic elsewhere leaves them unchanged
    #[inline]
    pub(crate) fn outstanding(&self) -> MutexGuard<'_, Outstanding> {
        self.outstanding
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns true if its packets can no longer be answered
    #[inline]
    pub(crate) fn has_ended(&self) -> bool {
        self.has_ended.load(Relaxed)
    }

    pub(super) fn end(&self) {
        self.has_ended.store(true, Relaxed);
    }

    /// Returns true if another process may use the queue by a copy of the socket
    pub(crate) fn is_shared(&self) -> bool {
        self.forks != sys::forks()
    }

    /// Returns the flags that are on
    pub(crate) fn flags(&self) -> ConfigFlags {
        ConfigFlags::from_bits_retain(self.flags.load(Relaxed))
    }

    pub(super) fn set_flags(&self, mask: ConfigFlags, flags: ConfigFlags) {
        let (mask, flags) = (mask.bits(), flags.bits());
        let change = |now: u32| Some((now & !mask) | (flags & mask));
        let _ = self.flags.fetch_update(Relaxed, Relaxed, change);
    }
}

/// All bindings of a socket, by queue number; each change replaces the whole table
#[derive(Clone, Debug, Default)]
pub(crate) struct Bindings(Arc<Vec<Arc<Binding>>>);

impl Bindings {
    #[inline]
    pub(crate) fn get(&self, queue: u16) -> Option<&Arc<Binding>> {
        let index = self
            .0
            .binary_search_by_key(&queue, |binding| binding.id.queue);
        self.0.get(index.ok()?)
    }

    /// Returns the binding, if it is the current one of its queue
    #[inline]
    pub(crate) fn current(&self, id: BindingId) -> Option<&Arc<Binding>> {
        self.get(id.queue).filter(|binding| binding.id == id)
    }

    pub(super) fn insert(&mut self, binding: Arc<Binding>) {
        let all = Arc::make_mut(&mut self.0);
        match all.binary_search_by_key(&binding.id.queue, |b| b.id.queue) {
            Ok(index) | Err(index) => all.insert(index, binding),
        }
    }

    /// Removes a binding; a later binding of the same queue stays
    pub(super) fn remove(&mut self, id: BindingId) {
        Arc::make_mut(&mut self.0).retain(|binding| binding.id != id);
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Binding>> {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_binding_has_another_number() {
        let mut bindings = Bindings::default();
        let [first, second] =
            [(); 2].map(|()| Arc::new(Binding::new(7, Outstanding::new(0, true))));
        let (old, new) = (first.id, second.id);
        assert_ne!(old, new);
        bindings.insert(first);
        assert!(bindings.current(old).is_some());
        bindings.remove(old);
        bindings.insert(second);
        assert!(bindings.current(old).is_none() && bindings.current(new).is_some());
        bindings.remove(old);
        assert!(bindings.current(new).is_some(), "the new one stays");
    }

    #[test]
    fn flags_change_within_their_mask() {
        let binding = Binding::new(7, Outstanding::new(0, true));
        let (gso, open) = (ConfigFlags::GSO, ConfigFlags::FAIL_OPEN);
        binding.set_flags(gso | open, gso);
        binding.set_flags(open, gso | open);
        assert_eq!(binding.flags(), gso | open);
        binding.set_flags(gso, ConfigFlags::empty());
        assert_eq!(binding.flags(), open);
    }
}
