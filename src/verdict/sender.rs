//! Verdicts from other threads

use std::sync::{Arc, Weak};

use nfqnl_proto::{Decision, PacketKey, PlainVerdict};

use super::SendBatch;
use crate::engine::Engine;
use crate::error::{Error, Operation, Result};

/// Answers packets of a [`Socket`](crate::Socket) from any thread; made by
/// [`Socket::verdict_sender`](crate::Socket::verdict_sender)
///
/// The kernel accepts verdicts only from the socket that bound the queue. A sender uses this
/// socket, even while another thread receives or waits. Clones are cheap. A sender does not keep
/// the socket open.
///
/// ```
/// # fn f(socket: nfqnl::Socket, batch: &mut nfqnl::RecvBatch) -> nfqnl::Result<()> {
/// use nfqnl::{Event, OwnedPacket, Verdict};
///
/// let (work, packets) = std::sync::mpsc::channel::<OwnedPacket>();
/// let sender = socket.verdict_sender();
/// std::thread::spawn(move || {
///     for packet in packets {
///         let packet = packet.packet();
///         let verdict = if packet.payload().len() > 1000 { Verdict::Drop } else { Verdict::Accept };
///         if let Err(error) = sender.set_verdict(packet.key(), verdict) {
///             eprintln!("{error}");
///         }
///     }
/// });
/// for event in socket.recv(batch)? {
///     match event {
///         Event::Packet(packet) => drop(work.send(packet.into())),
///         other => eprintln!("{other}"),
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct VerdictSender {
    engine: Weak<Engine>,
}

impl VerdictSender {
    pub(crate) fn new(engine: &Arc<Engine>) -> Self {
        Self {
            engine: Arc::downgrade(engine),
        }
    }

    /// Same as [`Socket::set_verdict`](crate::Socket::set_verdict)
    ///
    /// # Errors
    /// The same; [`Error::Unbound`] also when the socket is closed.
    pub fn set_verdict<'p>(&self, key: PacketKey, decision: impl Into<Decision<'p>>) -> Result<()> {
        let op = Operation::Verdict(key);
        let engine = self.engine.upgrade().ok_or(Error::Unbound { op })?;
        engine.set_verdict(key, &decision.into())
    }

    /// Same as [`Socket::set_verdict_up_to`](crate::Socket::set_verdict_up_to)
    ///
    /// # Errors
    /// The same; [`Error::Unbound`] also when the socket is closed.
    pub fn set_verdict_up_to(
        &self,
        last: PacketKey,
        verdict: impl Into<PlainVerdict>,
    ) -> Result<()> {
        let op = Operation::BatchVerdict(last);
        let engine = self.engine.upgrade().ok_or(Error::Unbound { op })?;
        engine.set_plain(last, verdict.into(), true)
    }

    /// Returns a guard for a packet: if it is dropped without a verdict, the packet gets `default`
    ///
    /// For a worker thread that may panic or forget a packet.
    pub fn guard(&self, key: PacketKey, default: impl Into<PlainVerdict>) -> VerdictGuard {
        VerdictGuard {
            sender: self.clone(),
            key,
            default: Some(default.into()),
        }
    }

    /// Same as [`Socket::send`](crate::Socket::send)
    ///
    /// # Errors
    /// The same. If the socket is closed, the verdicts are dropped without an error: the kernel
    /// has dropped their packets.
    pub fn send(&self, verdicts: &mut SendBatch) -> Result<()> {
        match self.engine.upgrade() {
            Some(engine) => engine.send_batch(verdicts),
            None => {
                verdicts.clear();
                Ok(())
            }
        }
    }
}

/// A packet in the hand of a worker thread, made by [`VerdictSender::guard`]
///
/// If it is dropped without a verdict, also by a panic, the packet gets its default verdict.
#[derive(Debug)]
#[must_use = "dropping it answers the packet"]
pub struct VerdictGuard {
    sender: VerdictSender,
    key: PacketKey,
    /// `None` once the packet is answered
    default: Option<PlainVerdict>,
}

impl VerdictGuard {
    /// Returns the packet's key
    #[must_use]
    pub const fn key(&self) -> PacketKey {
        self.key
    }

    /// Answers the packet
    ///
    /// # Errors
    /// As [`VerdictSender::set_verdict`]. The packet then gets its default verdict, unless its
    /// binding has ended.
    pub fn set_verdict<'p>(mut self, decision: impl Into<Decision<'p>>) -> Result<()> {
        self.sender.set_verdict(self.key, decision)?;
        self.default = None;
        Ok(())
    }

    /// Lets go of the packet without a verdict: another part of the program answers it
    pub fn release(mut self) -> PacketKey {
        self.default = None;
        self.key
    }
}

impl Drop for VerdictGuard {
    fn drop(&mut self) {
        if let Some(default) = self.default {
            // This fails if the binding has ended, and the packet is gone; or if the kernel is out
            // of memory, and a drop cannot try again.
            let _ = self.sender.set_verdict(self.key, default);
        }
    }
}
