//! What a callback gets: the packet under the names of libnetfilter_queue and its wrappers, and the way to answer it
//!
//! This one type mirrors a published API, `get_` and all, so that code can be ported line by line. Each getter forwards
//! to [`Packet`], which has the Rust names and says what every value means.

use std::fmt;
use std::time::Duration;

use nfqnl_proto::{Decision, HwAddr, Packet, PacketKey, SkbInfo, Verdict};

use crate::error::{Error, Result};
use crate::verdicts::VerdictBatch;

/// A packet in the hands of a callback
///
/// **The verdict is executed once the callback exits**, also by a panic; in [`Handle::run_once`](crate::Handle::run_once)
/// once the callbacks of its whole batch have. The last one set counts. **If none is set,
/// nothing is sent**, and the packet waits until it is answered by its [`key`](Self::key) with
/// [`Handle::verdict`](crate::Handle::verdict), or in other threads and callbacks with a
/// [`VerdictSender`](crate::VerdictSender).
#[doc(alias = "nfq_data")]
pub struct QueueData<'a> {
    packet: Packet<'a>,
    verdicts: &'a mut VerdictBatch,
    /// How many verdicts on other packets stand in front of this one's
    before: usize,
}

impl<'a> QueueData<'a> {
    /// The verdict, if one is set, is added to `verdicts`
    #[inline]
    pub(crate) fn new(packet: Packet<'a>, verdicts: &'a mut VerdictBatch) -> Self {
        Self {
            packet,
            before: verdicts.len(),
            verdicts,
        }
    }

    /// The packet with all its attributes
    #[must_use]
    pub const fn packet(&self) -> &Packet<'a> {
        &self.packet
    }

    /// What the packet can be answered by later, from any thread
    #[must_use]
    pub fn key(&self) -> PacketKey {
        self.packet.key()
    }

    /// Decides what becomes of the packet, and gives it a new mark if there is one: a number, or `None`
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

    /// The same, and puts another packet in place of this one
    ///
    /// `payload` begins with the network header; lengths and **all checksums** in it are the caller's. See
    /// [`Decision::with_payload`] for what kernels refuse.
    ///
    /// # Errors
    /// A payload of more than 65531 bytes or shorter than its own network header, or a packet of which only the
    /// beginning was copied. What was set before stays then.
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

    /// Answers the packet with everything that a verdict can carry
    ///
    /// # Errors
    /// As [`set_verdict_with_payload`](Self::set_verdict_with_payload), for any of the decision's parts.
    pub fn set_decision(&mut self, decision: &Decision<'_>) -> Result<()> {
        match (decision.payload(), self.packet.capture_len()) {
            (Some(_), Some(len)) => Err(Error::CutPacket {
                key: self.packet.key(),
                needed: usize::try_from(len).unwrap_or(usize::MAX),
                had: self.packet.payload().len(),
            }),
            _ => self.verdicts.set(self.before, self.packet.key(), *decision),
        }
    }
}

/// The getters of the published API; 0 stands for "none" where C has 0
impl<'a> QueueData<'a> {
    /// The packet's id in its queue
    #[must_use]
    #[doc(alias = "nfq_get_msg_packet_hdr")]
    pub fn get_packet_id(&self) -> u32 {
        self.packet.id()
    }

    /// EtherType
    #[must_use]
    #[doc(alias = "nfq_get_msg_packet_hdr")]
    pub fn get_hw_protocol(&self) -> u16 {
        self.packet.hw_protocol()
    }

    /// Number of the netfilter hook
    #[must_use]
    #[doc(alias = "nfq_get_msg_packet_hdr")]
    pub fn get_hook(&self) -> u8 {
        self.packet.hook().0
    }

    /// Link-layer address of the source
    #[must_use]
    #[doc(alias = "nfq_get_packet_hw")]
    pub fn get_packet_hw(&self) -> Option<HwAddr> {
        self.packet.hw_addr()
    }

    /// Packet mark, 0 if none
    #[must_use]
    #[doc(alias = "nfq_get_nfmark")]
    pub fn get_nfmark(&self) -> u32 {
        self.packet.mark()
    }

    /// Time of receipt since the Unix epoch
    #[must_use]
    #[doc(alias = "nfq_get_timestamp")]
    pub fn get_timestamp(&self) -> Option<Duration> {
        self.packet.timestamp()
    }

    /// Index of the input device, 0 if none
    #[must_use]
    #[doc(alias = "nfq_get_indev")]
    pub fn get_indev(&self) -> u32 {
        self.packet.indev().unwrap_or(0)
    }

    /// Index of the input bridge port, 0 if none
    #[must_use]
    #[doc(alias = "nfq_get_physindev")]
    pub fn get_physindev(&self) -> u32 {
        self.packet.physindev().unwrap_or(0)
    }

    /// Index of the output device, 0 if none
    #[must_use]
    #[doc(alias = "nfq_get_outdev")]
    pub fn get_outdev(&self) -> u32 {
        self.packet.outdev().unwrap_or(0)
    }

    /// Index of the output bridge port, 0 if none
    #[must_use]
    #[doc(alias = "nfq_get_physoutdev")]
    pub fn get_physoutdev(&self) -> u32 {
        self.packet.physoutdev().unwrap_or(0)
    }

    /// The packet from its network header on, as much as was copied
    #[must_use]
    #[doc(alias = "nfq_get_payload")]
    pub fn get_payload(&self) -> &'a [u8] {
        self.packet.payload()
    }

    /// User id of the sending socket
    #[must_use]
    #[doc(alias = "nfq_get_uid")]
    pub fn get_uid(&self) -> Option<u32> {
        self.packet.uid()
    }

    /// Group id of the sending socket
    #[must_use]
    #[doc(alias = "nfq_get_gid")]
    pub fn get_gid(&self) -> Option<u32> {
        self.packet.gid()
    }

    /// Security context
    #[must_use]
    #[doc(alias = "nfq_get_secctx")]
    pub fn get_secctx(&self) -> Option<&'a [u8]> {
        self.packet.security_context()
    }

    /// State of checksums and segmentation
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
