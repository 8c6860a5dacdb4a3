//! Verdicts from other threads

use std::sync::{Arc, Weak};

use nfqnl_proto::{Decision, PacketKey};

use crate::error::{Error, Result};
use crate::socket::Shared;
use crate::verdicts::VerdictBatch;

/// Answers packets of a [`Handle`](crate::Handle) from any thread; made by
/// [`Handle::verdict_sender`](crate::Handle::verdict_sender)
///
/// The kernel takes verdicts only from the socket that bound the queue. This sends on it, also while another thread
/// receives or waits, and also in the callback style, where the handle itself is lent to
/// [`handle_packet`](crate::Handle::handle_packet). Clones are cheap. It does not keep the handle open.
///
/// ```
/// # fn f(handle: nfqnl::Handle, batch: &mut nfqnl::RecvBatch) -> nfqnl::Result<()> {
/// use nfqnl::{OwnedPacket, Verdict};
///
/// let (work, packets) = std::sync::mpsc::channel::<OwnedPacket>();
/// let sender = handle.verdict_sender();
/// std::thread::spawn(move || {
///     for packet in packets {
///         let packet = packet.packet();
///         let verdict = if packet.payload().len() > 1000 { Verdict::Drop } else { Verdict::Accept };
///         if let Err(error) = sender.verdict(packet.key(), verdict) {
///             eprintln!("{error}");
///         }
///     }
/// });
/// for packet in handle.recv(batch)?.packets() {
///     let _ = work.send(packet.into());
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct VerdictSender {
    shared: Weak<Shared>,
}

impl VerdictSender {
    pub(crate) fn new(shared: &Arc<Shared>) -> Self {
        Self {
            shared: Arc::downgrade(shared),
        }
    }

    /// As [`Handle::verdict`](crate::Handle::verdict)
    ///
    /// # Errors
    /// The same; [`Error::Stale`] also when the handle is closed.
    pub fn verdict<'p>(&self, key: PacketKey, decision: impl Into<Decision<'p>>) -> Result<()> {
        let shared = self.shared.upgrade().ok_or(Error::Stale { key })?;
        shared.verdict(key, &decision.into())
    }

    /// As [`Handle::send`](crate::Handle::send)
    ///
    /// # Errors
    /// The same; [`Error::Stale`] also when the handle is closed.
    pub fn send(&self, verdicts: &mut VerdictBatch) -> Result<()> {
        match self.shared.upgrade() {
            Some(shared) => shared.send_verdicts(verdicts),
            None => verdicts.give_up(),
        }
    }
}
