//! The callbacks of a handle's queues

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::bindings::BindingId;
use crate::data::QueueData;

pub(crate) type Callback = Box<dyn FnMut(&mut QueueData<'_>) + Send>;

/// Callbacks by queue
///
/// A callback is taken out while it runs, so no lock is held then, and it may destroy its own queue.
#[derive(Default)]
pub(crate) struct Callbacks(Mutex<Vec<Entry>>);

struct Entry {
    id: BindingId,
    /// `None` while it runs
    callback: Option<Callback>,
}

impl Callbacks {
    fn entries(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn insert(&self, id: BindingId, callback: Callback) {
        self.entries().push(Entry {
            id,
            callback: Some(callback),
        });
    }

    pub(crate) fn remove(&self, id: BindingId) {
        let mut entries = self.entries();
        let index = entries.iter().position(|entry| entry.id == id);
        let removed = index.map(|index| entries.swap_remove(index));
        drop(entries);
        drop(removed); // what the callback owns may come back here when it is dropped
    }

    pub(crate) fn take(&self, id: BindingId) -> Option<Callback> {
        let mut entries = self.entries();
        let entry = entries.iter_mut().find(|entry| entry.id == id)?;
        entry.callback.take()
    }

    /// Returns a callback that has run; it is dropped if its queue has gone meanwhile
    pub(crate) fn put_back(&self, id: BindingId, callback: Callback) {
        let mut entries = self.entries();
        match entries.iter_mut().find(|entry| entry.id == id) {
            Some(entry) => entry.callback = Some(callback),
            None => {
                drop(entries);
                drop(callback);
            }
        }
    }
}

impl fmt::Debug for Callbacks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.entries().iter().map(|entry| entry.id.queue))
            .finish()
    }
}
