//! The packet as a callback sees it, with the names of libnetfilter_queue and its wrappers
//!
//! This type mirrors a published API, including `get_`, so code can be ported line by line. Each
//! getter forwards to [`Packet`]; the documentation there has the meaning of every value.

use std::fmt;
use std::time::Duration;

use nfqnl_proto::{Decision, HwAddr, Packet, PacketKey, SkbInfo, Verdict};

#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::handle::{Callable, HandleRef};
use crate::verdict::{SendBatch, check_decision};

/// The packet in a callback
///
/// **The verdict is executed after the callback exits**, also by a panic:
/// [`Handle::handle_packet`](crate::Handle::handle_packet) sends it at once,
/// [`Handle::run_once`](crate::Handle::run_once) together with the verdicts on other packets. A
/// callback calls [`send_now`](Self::send_now) before it waits. The last verdict counts. **Without
/// a verdict nothing is sent**, and the packet waits for an answer by its [`key`](Self::key), from
/// [`Socket::set_verdict`](crate::Socket::set_verdict) or a
/// [`VerdictSender`](crate::VerdictSender).
#[doc(alias = "nfq_data")]
pub struct QueueData<'a> {
    packet: &'a Packet<'a>,
    verdicts: &'a mut SendBatch,
    /// The index of this packet's verdict
    before: usize,
    handle: &'a (dyn Callable + 'a),
}

impl<'a> QueueData<'a> {
    /// Wraps a packet; its verdict, if there is one, is added to `verdicts`
    #[inline]
    pub(crate) fn new(
        packet: &'a Packet<'a>,
        verdicts: &'a mut SendBatch,
        handle: &'a (dyn Callable + 'a),
    ) -> Self {
        Self {
            packet,
            before: verdicts.len(),
            verdicts,
            handle,
        }
    }

    /// Returns the packet with all its attributes; [`OwnedPacket`](crate::OwnedPacket) keeps a copy
    #[must_use]
    pub const fn packet(&self) -> &'a Packet<'a> {
        self.packet
    }

    /// Returns the key to answer the packet later, from any thread
    #[must_use]
    pub fn key(&self) -> PacketKey {
        self.packet.key()
    }

    /// Returns the handle, to bind, set and unbind queues from the callback
    #[must_use]
    pub const fn handle(&self) -> HandleRef<'a> {
        HandleRef::new(self.handle)
    }

    /// Sets the verdict, and a new mark unless `mark` is `None`
    ///
    /// A `mark` of 0 sets the mark to 0. `None` keeps it, as `nfq_set_verdict` does.
    #[doc(alias = "nfq_set_verdict")]
    #[doc(alias = "nfq_set_verdict2")]
    #[doc(alias = "nfq_set_verdict_mark")]
    pub fn set_verdict(&mut self, verdict: Verdict, mark: impl Into<Option<u32>>) {
        let decision = match mark.into() {
            Some(mark) => verdict.with_mark(mark),
            None => Decision::new(verdict),
        };
        let set = self.verdicts.set(self.before, self.packet.key(), decision);
        debug_assert!(set.is_ok(), "a verdict and a mark can always be sent");
    }

    /// Sets the verdict and the mark, and replaces the packet
    ///
    /// `payload` begins with the network header. The caller sets the lengths and **all checksums**
    /// in it; [`Rewrite`](crate::rewrite::Rewrite) does so. See [`Decision::with_payload`] for the
    /// changes refused by kernels. Where libnetfilter_queue lets the kernel drop a packet with a
    /// bad payload, this call fails, and the verdict that was set before stays. A ported program
    /// sets [`Verdict::Drop`] first.
    ///
    /// # Errors
    /// As [`set_decision`](Self::set_decision).
    #[doc(alias = "nfq_set_verdict")]
    pub fn set_verdict_with_payload(
        &mut self,
        verdict: Verdict,
        mark: impl Into<Option<u32>>,
        payload: &[u8],
    ) -> Result<()> {
        let decision = verdict.with_payload(payload);
        self.set_decision(&match mark.into() {
            Some(mark) => decision.with_mark(mark),
            None => decision,
        })
    }

    /// Sets a verdict with all its attributes
    ///
    /// # Errors
    /// [`Error::TruncatedPacket`] for a new payload of a truncated packet.
    /// [`Error::ConntrackAndLength`] for a payload of another length beside a change of the
    /// conntrack entry, except in UDP, and except a raw change. [`Error::PayloadTooShort`] for a
    /// payload shorter than its own network header or the old packet's (the kernel would drop the
    /// packet). [`Error::Encode`] for more than 65531 bytes. The earlier verdict stays then.
    pub fn set_decision(&mut self, decision: &Decision<'_>) -> Result<()> {
        check_decision(self.packet, decision)?;
        self.verdicts.set(self.before, self.packet.key(), *decision)
    }

    /// Sends the verdicts set so far, on earlier packets and on this one
    ///
    /// Call it before the callback waits, so that these packets do not wait too. A verdict on this
    /// packet is final once it is sent.
    ///
    /// # Errors
    /// As [`Socket::send`](crate::Socket::send).
    pub fn send_now(&mut self) -> Result<()> {
        let sent = self.handle.socket().send(self.verdicts);
        self.before = self.verdicts.len();
        sent
    }
}

/// The getters of the published API; 0 stands for "none" where C returns 0
impl<'a> QueueData<'a> {
    /// Returns the packet's id in its queue
    #[must_use]
    #[doc(alias = "nfq_get_msg_packet_hdr")]
    pub fn get_packet_id(&self) -> u32 {
        self.packet.id()
    }

    /// Returns the EtherType
    #[must_use]
    #[doc(alias = "nfq_get_msg_packet_hdr")]
    pub fn get_hw_protocol(&self) -> u16 {
        self.packet.hw_protocol().0
    }

    /// Returns the number of the netfilter hook
    #[must_use]
    #[doc(alias = "nfq_get_msg_packet_hdr")]
    pub fn get_hook(&self) -> u8 {
        self.packet.hook().0
    }

    /// Returns the link-layer address of the source
    #[must_use]
    #[doc(alias = "nfq_get_packet_hw")]
    pub fn get_packet_hw(&self) -> Option<HwAddr> {
        self.packet.hw_addr()
    }

    /// Returns the packet mark, 0 if none
    #[must_use]
    #[doc(alias = "nfq_get_nfmark")]
    pub fn get_nfmark(&self) -> u32 {
        self.packet.mark()
    }

    /// Returns the time of receipt since the Unix epoch
    #[must_use]
    #[doc(alias = "nfq_get_timestamp")]
    pub fn get_timestamp(&self) -> Option<Duration> {
        self.packet.timestamp()
    }

    /// Returns the index of the input device, 0 if none
    #[must_use]
    #[doc(alias = "nfq_get_indev")]
    pub fn get_indev(&self) -> u32 {
        self.packet.indev().unwrap_or(0)
    }

    /// Returns the index of the input bridge port, 0 if none
    #[must_use]
    #[doc(alias = "nfq_get_physindev")]
    pub fn get_physindev(&self) -> u32 {
        self.packet.physindev().unwrap_or(0)
    }

    /// Returns the index of the output device, 0 if none
    #[must_use]
    #[doc(alias = "nfq_get_outdev")]
    pub fn get_outdev(&self) -> u32 {
        self.packet.outdev().unwrap_or(0)
    }

    /// Returns the index of the output bridge port, 0 if none
    #[must_use]
    #[doc(alias = "nfq_get_physoutdev")]
    pub fn get_physoutdev(&self) -> u32 {
        self.packet.physoutdev().unwrap_or(0)
    }

    /// Returns the copied part of the packet, from its network header on
    #[must_use]
    #[doc(alias = "nfq_get_payload")]
    pub fn get_payload(&self) -> &'a [u8] {
        self.packet.payload()
    }

    /// Returns the user id of the owner of the packet's socket: see [`Packet::uid`]
    #[must_use]
    #[doc(alias = "nfq_get_uid")]
    pub fn get_uid(&self) -> Option<u32> {
        self.packet.uid()
    }

    /// Returns the group id of the owner of the packet's socket
    #[must_use]
    #[doc(alias = "nfq_get_gid")]
    pub fn get_gid(&self) -> Option<u32> {
        self.packet.gid()
    }

    /// Returns the security context
    #[must_use]
    #[doc(alias = "nfq_get_secctx")]
    pub fn get_secctx(&self) -> Option<&'a [u8]> {
        self.packet.security_context()
    }

    /// Returns the state of checksums and segmentation
    #[must_use]
    #[doc(alias = "nfq_get_skbinfo")]
    pub fn get_skbinfo(&self) -> SkbInfo {
        self.packet.skb_info()
    }
}

impl fmt::Debug for QueueData<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueData")
            .field("packet", &self.packet)
            .field("answered", &(self.verdicts.len() > self.before))
            .finish()
    }
}
