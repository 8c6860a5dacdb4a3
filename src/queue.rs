//! One bound queue: its settings, and its end

use std::sync::{Arc, Weak};

use nfqnl_proto::{ConfigFlags, CopyMode, QueueConfig};

use crate::bindings::BindingId;
use crate::error::{Error, Operation, Result};
use crate::socket::Shared;

/// A queue that a [`Handle`](crate::Handle) has bound
///
/// Dropping it unbinds the queue without waiting for the kernel, which then **drops every packet that waits in it**;
/// so keep it as long as the queue shall work. [`destroy`](Self::destroy) does the same and reports. When the handle
/// is closed first, its queues end with it.
#[must_use = "dropping a queue unbinds it"]
#[derive(Debug)]
#[doc(alias = "nfq_q_handle")]
pub struct Queue {
    shared: Weak<Shared>,
    binding: BindingId,
}

impl Queue {
    pub(crate) fn new(shared: &Arc<Shared>, binding: BindingId) -> Self {
        Self {
            shared: Arc::downgrade(shared),
            binding,
        }
    }

    /// The queue's number
    #[must_use]
    pub const fn num(&self) -> u16 {
        self.binding.queue
    }

    /// Sets how much of each packet the kernel sends: nothing, its attributes, or also up to `range` bytes of it
    ///
    /// `range` counts bytes from the network header and matters for [`CopyMode::PACKET`] alone. The most that the
    /// kernel copies is 65531 bytes, and 0 and everything above mean that; so a packet of 65535 bytes always comes cut,
    /// with [`Packet::capture_len`](crate::Packet::capture_len) saying so. Until a mode other than
    /// [`CopyMode::NONE`] is set, the kernel drops the queue's packets.
    ///
    /// # Errors
    /// [`Error::UnknownCopyMode`]; [`Error::Refused`]; [`Error::NoAck`];
    /// [`Error::Io`]; [`Error::Ended`].
    #[doc(alias = "nfq_set_mode")]
    pub fn set_mode(&self, mode: CopyMode, range: u32) -> Result<()> {
        self.update(
            Operation::SetMode(self.num()),
            QueueConfig::new().copy_mode(mode, range),
        )
    }

    /// Sets the switches named in `mask` as they stand in `flags`, and leaves the others
    ///
    /// # Errors
    /// [`Error::Refused`] with [`Situation::Unsupported`](crate::Situation::Unsupported) (or
    /// [`Invalid`](crate::Situation::Invalid) from Linux 7.2 on) if the kernel does not know a flag or was built
    /// without what it needs; nothing is changed then. [`Error::NoAck`];
    /// [`Error::Io`]; [`Error::Ended`].
    #[doc(alias = "nfq_set_queue_flags")]
    pub fn set_flags(&self, mask: ConfigFlags, flags: ConfigFlags) -> Result<()> {
        self.update(
            Operation::SetFlags(self.num()),
            QueueConfig::new().flags(mask, flags),
        )
    }

    /// Sets how many packets may wait at once, 1024 if never set; beyond that the kernel drops new ones
    ///
    /// # Errors
    /// [`Error::ZeroMaxlen`]: the kernel would accept 0, and drop everything. [`Error::Refused`]; [`Error::NoAck`];
    /// [`Error::Io`]; [`Error::Ended`].
    #[doc(alias = "nfq_set_queue_maxlen")]
    pub fn set_maxlen(&self, packets: u32) -> Result<()> {
        self.update(
            Operation::SetMaxlen(self.num()),
            QueueConfig::new().maxlen(packets),
        )
    }

    /// Unbinds the queue and waits until the kernel has done so; it drops every packet that waits
    ///
    /// # Errors
    /// [`Error::Refused`], as when the process has dropped `CAP_NET_ADMIN`: the kernel then keeps the queue until the
    /// socket is closed. [`Error::NoAck`]; [`Error::Io`]. The handle gives the queue up in any case.
    #[doc(alias = "nfq_destroy_queue")]
    pub fn destroy(mut self) -> Result<()> {
        match std::mem::take(&mut self.shared).upgrade() {
            Some(shared) => shared.unbind(self.binding),
            None => Ok(()),
        }
    }

    fn update(&self, op: Operation, config: QueueConfig) -> Result<()> {
        let shared = self.shared.upgrade().ok_or(Error::Ended { op })?;
        shared.update(op, self.binding, config)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            shared.post_unbind(self.binding);
        }
    }
}
