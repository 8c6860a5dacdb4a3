//! One bound queue: its settings and its end

use std::os::fd::AsFd;
use std::sync::{Arc, Weak};

use nfqnl_proto::{ConfigFlags, CopyMode, PacketKey, PlainVerdict, QueueConfig};

use crate::engine::{Binding, Engine, retry_lost_ack};
use crate::error::{Error, Operation, Result};
#[cfg(doc)]
use crate::socket::Socket;
use crate::stats::QueueStats;

/// A bound queue of a [`Socket`](crate::Socket)
///
/// Dropping it unbinds the queue, and the kernel **drops every packet that waits in it**. Keep it
/// as long as the queue should work. The drop does not wait for the kernel;
/// [`destroy`](Self::destroy) waits, and reports errors. When the socket is closed first, its
/// queues end with it.
///
/// After a fork(2) a drop unbinds nothing, in parent and child: the other process may serve the
/// queue with its copy of the socket. [`destroy`](Self::destroy) unbinds it in either process.
/// `std::process::Command` forks if it sets a user, a group or `pre_exec`.
///
/// With [`SocketBuilder::unbind_on_drop`](crate::SocketBuilder::unbind_on_drop) set to `false` a
/// drop unbinds nothing either.
#[must_use = "dropping a queue unbinds it"]
#[doc(alias = "nfq_q_handle")]
pub struct Queue {
    engine: Weak<Engine>,
    binding: Arc<Binding>,
}

impl Queue {
    pub(crate) fn new(engine: &Arc<Engine>, binding: Arc<Binding>) -> Self {
        Self {
            engine: Arc::downgrade(engine),
            binding,
        }
    }

    /// Returns another value for the same binding; the first drop or destroy of one unbinds it
    pub(crate) fn share(&self) -> Self {
        Self {
            engine: Weak::clone(&self.engine),
            binding: Arc::clone(&self.binding),
        }
    }

    pub(crate) fn belongs_to(&self, engine: &Arc<Engine>) -> bool {
        std::ptr::eq(self.engine.as_ptr(), Arc::as_ptr(engine))
    }

    pub(crate) const fn binding(&self) -> &Arc<Binding> {
        &self.binding
    }

    /// Returns the queue's number
    #[must_use]
    pub fn num(&self) -> u16 {
        self.binding.id.queue
    }

    /// Returns the key of the packet with this id, for programs that keep ids
    ///
    /// The key belongs to this binding. An id from an earlier binding of the queue names another
    /// packet. Use ids of received packets only. If you answer an id before its packet arrives, the
    /// kernel refuses the verdict, and a later merged verdict can then answer the packet.
    #[must_use]
    pub fn key(&self, id: u32) -> PacketKey {
        self.binding.key(id)
    }

    /// Returns the flags that this library has switched on for the queue
    #[must_use]
    pub fn flags(&self) -> ConfigFlags {
        self.binding.flags()
    }

    /// Returns the number of packets that this process has received and not answered
    ///
    /// It counts packets in hand, in a batch, and read by earlier requests; packets in the socket
    /// are not received yet. A packet that the kernel drops while it waits counts until it is
    /// answered. If packets are passed on out of order ([`Handle::handle_packet`]), or more than
    /// 65,536 separate ones wait, a second verdict on a packet makes the number too small.
    ///
    /// [`Handle::handle_packet`]: crate::Handle::handle_packet
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.binding.outstanding().waiting()
    }

    /// Lets new packets pass by: the kernel accepts them, and they do not enter the queue
    ///
    /// The waiting packets stay. Stop threads that receive on the descriptor themselves before this
    /// call. When it returns, the library has received all packets of the queue: receive and answer
    /// them until [`waiting`](Self::waiting) is 0, and unbind.
    /// [`Socket::drain`] does all this. New packets overtake the waiting ones. To undo it, set a
    /// maximum length ([`set_maxlen`](Self::set_maxlen)), and clear
    /// [`FAIL_OPEN`](ConfigFlags::FAIL_OPEN).
    ///
    /// In an adopted queue, orphans that still wait for the next packet get their verdict now; with
    /// [`Orphans::Again`](crate::Orphans::Again) they pass by.
    ///
    /// Since Linux 3.6.
    ///
    /// # Errors
    /// As [`set_flags`](Self::set_flags). After a lost acknowledgement the call repeats the
    /// request.
    pub fn pass_by(&self) -> Result<()> {
        let op = Operation::PassBy(self.num());
        let engine = self.engine.upgrade().ok_or(Error::Unbound { op })?;
        // In one message the kernel would set the length first, and drop packets before the flag.
        for config in [
            QueueConfig::new().enable(ConfigFlags::FAIL_OPEN),
            QueueConfig::new().maxlen(0),
        ] {
            retry_lost_ack(|| engine.update(op, &self.binding, config))?;
        }
        engine.wait_for_reader();
        engine.answer_all_orphans(&self.binding)
    }

    /// Receives all packets of the queue, and gives all waiting ones this verdict
    pub(crate) fn answer_all(&self, verdict: PlainVerdict) -> Result<()> {
        let op = Operation::Sync;
        let engine = self.engine.upgrade().ok_or(Error::Unbound { op })?;
        // Receives the packets in the socket; a lost acknowledgement does not stop the verdict.
        match retry_lost_ack(|| engine.sync(op)) {
            Err(Error::NoAck { .. }) => {}
            synced => synced?,
        }
        engine.wait_for_reader();
        if self.waiting() == 0 {
            return Ok(());
        }
        let newest = self.binding.outstanding().newest();
        engine.set_plain(self.key(newest), verdict, true)
    }

    /// Reads the kernel's counters of this queue, in the socket's network namespace
    ///
    /// `None` if the queue is not bound. A thread for the length of the call enters the namespace,
    /// if this is not the caller's own one. Since Linux 4.9.
    ///
    /// # Errors
    /// [`Error::Io`]: only root of the initial user namespace may read the counters.
    /// [`Error::Unbound`] if the socket is closed.
    pub fn stats(&self) -> Result<Option<QueueStats>> {
        let op = Operation::ReadStats;
        let engine = self.engine.upgrade().ok_or(Error::Unbound { op })?;
        QueueStats::read_of(engine.as_fd(), self.num())
    }

    /// Sets the part of each packet that the kernel copies: nothing, the attributes, or the
    /// attributes and up to `range` bytes of the packet
    ///
    /// `range` counts bytes from the network header, and only [`CopyMode::Packet`] uses it. The
    /// kernel copies at most 65531 bytes; 0 and every larger range mean 65531. It therefore
    /// truncates a packet of 65535 bytes ([`Packet::is_truncated`](crate::Packet::is_truncated)).
    /// With [`CopyMode::None`] the kernel drops the queue's packets.
    ///
    /// # Errors
    /// [`Error::Refused`]; [`Error::NoAck`]; [`Error::Io`]; [`Error::Unbound`].
    #[doc(alias = "nfq_set_mode")]
    pub fn set_mode(&self, mode: CopyMode, range: u32) -> Result<()> {
        let config = QueueConfig::new().copy_mode(mode, range);
        self.update(Operation::SetMode(self.num()), config)
    }

    /// Sets each flag in `mask` as in `flags`, and leaves the others; since Linux 3.6
    ///
    /// # Errors
    /// [`Error::Refused`] with [`UnsupportedFlags`](crate::ErrorKind::UnsupportedFlags) if the
    /// kernel does not support a flag; nothing is changed then. [`Error::NoAck`]; [`Error::Io`];
    /// [`Error::Unbound`].
    #[doc(alias = "nfq_set_queue_flags")]
    pub fn set_flags(&self, mask: ConfigFlags, flags: ConfigFlags) -> Result<()> {
        let config = QueueConfig::new().flags(mask, flags);
        self.update(Operation::SetFlags(self.num()), config)
    }

    /// Sets the maximum number of waiting packets; the default is 1024
    ///
    /// The kernel drops further packets, or accepts them with [`ConfigFlags::FAIL_OPEN`]. So 0
    /// drops or accepts every packet. The kernel counts its drops in
    /// [`QueueStats::queue_dropped`](crate::QueueStats::queue_dropped); the library does not see
    /// them.
    ///
    /// Recent kernels (6.12.83, 6.18.24, 7.0) keep at most 65,536 packets in a queue, even if the
    /// maximum is higher. The packets above 65,536 use up ids, so
    /// [`Stats::missing_packets`](crate::Stats::missing_packets) counts them, and merging of
    /// verdicts ends.
    ///
    /// # Errors
    /// [`Error::Refused`]; [`Error::NoAck`]; [`Error::Io`]; [`Error::Unbound`].
    #[doc(alias = "nfq_set_queue_maxlen")]
    pub fn set_maxlen(&self, packets: u32) -> Result<()> {
        let config = QueueConfig::new().maxlen(packets);
        self.update(Operation::SetMaxlen(self.num()), config)
    }

    /// Unbinds the queue and waits until the kernel has done so; the kernel drops every waiting
    /// packet
    ///
    /// # Errors
    /// [`Error::Refused`] if the process has dropped `CAP_NET_ADMIN`: the kernel then keeps the
    /// queue until the socket is closed. [`Error::NoAck`]; [`Error::Io`]. The socket treats the
    /// queue as unbound in any case.
    #[doc(alias = "nfq_destroy_queue")]
    pub fn destroy(mut self) -> Result<()> {
        match std::mem::take(&mut self.engine).upgrade() {
            Some(engine) => engine.unbind(self.binding.id),
            None => Ok(()),
        }
    }

    fn update(&self, op: Operation, config: QueueConfig) -> Result<()> {
        let engine = self.engine.upgrade().ok_or(Error::Unbound { op })?;
        engine.update(op, &self.binding, config)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if let Some(engine) = self.engine.upgrade() {
            match self.binding.is_shared() || !engine.unbinds_on_drop {
                true => engine.end_here(self.binding.id),
                false => engine.post_unbind(self.binding.id),
            }
        }
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue")
            .field("num", &self.num())
            .field("flags", &self.flags())
            .field("has_ended", &self.binding.has_ended())
            .finish()
    }
}
