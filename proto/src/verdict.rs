//! Verdicts (`NFQNL_MSG_VERDICT`, `NFQNL_MSG_VERDICT_BATCH`)

use thiserror::Error;

use crate::consts::{
    ATTR_HEADER_LEN, ATTRS_OFFSET, MAX_PAYLOAD, NF_ACCEPT, NF_DROP, NF_QUEUE, NF_REPEAT, NF_STOLEN,
    NF_STOP, NF_VERDICT_FLAG_QUEUE_BYPASS, NF_VERDICT_QBITS, NFQA_CT, NFQA_EXP, NFQA_L2HDR,
    NFQA_MARK, NFQA_PAYLOAD, NFQA_PRIORITY, NFQA_VLAN, NFQA_VLAN_PROTO, NFQA_VLAN_TCI,
    NFQNL_MSG_VERDICT, NFQNL_MSG_VERDICT_BATCH, VERDICT_HDR_LEN,
};
use crate::error::EncodeError;
use crate::types::Family;
use crate::vlan::Vlan;
use crate::write::{MessageWriter, RequestHeader};

/// What becomes of a packet
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Verdict {
    /// Drop it
    #[doc(alias = "NF_DROP")]
    Drop,
    /// Let it go on at the next rule chain
    #[doc(alias = "NF_ACCEPT")]
    Accept,
    /// Forget it. **The kernel refuses this from user space** (`EINVAL`), and the packet goes on waiting; it is here
    /// because libnetfilter_queue has it.
    #[doc(alias = "NF_STOLEN")]
    Stolen,
    /// Hand it to another queue, or again to this one; it gets a new id there
    #[doc(alias = "NF_QUEUE")]
    Queue {
        /// The queue's number
        num: u16,
        /// If nobody listens to that queue, let the packet go on; without this it is silently dropped. Linux 2.6.39
        #[doc(alias = "NF_VERDICT_FLAG_QUEUE_BYPASS")]
        bypass: bool,
    },
    /// Run it through the same chain again; unless a mark tells the rule to pass it by, it comes back with a new id
    #[doc(alias = "NF_REPEAT")]
    Repeat,
    /// Accept it, and skip the later chains of this hook
    #[doc(alias = "NF_STOP")]
    Stop,
}

impl Verdict {
    /// The number on the wire
    #[must_use]
    #[inline]
    pub const fn to_raw(self) -> u32 {
        match self {
            Self::Drop => NF_DROP,
            Self::Accept => NF_ACCEPT,
            Self::Stolen => NF_STOLEN,
            Self::Queue { num, bypass } => {
                let flag = if bypass {
                    NF_VERDICT_FLAG_QUEUE_BYPASS
                } else {
                    0
                };
                // `num as u32` widens; `u32::from` is not const
                (num as u32) << NF_VERDICT_QBITS | flag | NF_QUEUE
            }
            Self::Repeat => NF_REPEAT,
            Self::Stop => NF_STOP,
        }
    }

    /// The same verdict, and a new packet mark
    pub const fn with_mark(self, mark: u32) -> Decision<'static> {
        Decision::new(self).with_mark(mark)
    }

    /// The same verdict, and a new packet in place of the old
    pub const fn with_payload(self, payload: &[u8]) -> Decision<'_> {
        Decision::new(self).with_payload(payload)
    }
}

impl From<Verdict> for u32 {
    fn from(verdict: Verdict) -> Self {
        verdict.to_raw()
    }
}

/// A number that is no verdict, or has bits that the kernel would take for something else
///
/// `NF_ACCEPT` with any bit above the low eight acts as `NF_STOP`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[error("{0:#010x} is no verdict")]
#[expect(clippy::exhaustive_structs, reason = "the number is all there is")]
pub struct UnknownVerdict(pub u32);

impl TryFrom<u32> for Verdict {
    type Error = UnknownVerdict;

    fn try_from(raw: u32) -> Result<Self, UnknownVerdict> {
        let [high, low, flags, verdict] = raw.to_be_bytes();
        let known = match u32::from(verdict) {
            NF_DROP => Self::Drop,
            NF_ACCEPT => Self::Accept,
            NF_STOLEN => Self::Stolen,
            NF_QUEUE => Self::Queue {
                num: u16::from_be_bytes([high, low]),
                bypass: flags & 0x80 != 0,
            },
            NF_REPEAT => Self::Repeat,
            NF_STOP => Self::Stop,
            _ => return Err(UnknownVerdict(raw)),
        };
        if known.to_raw() == raw {
            Ok(known)
        } else {
            Err(UnknownVerdict(raw))
        }
    }
}

/// A verdict and what is to change about the packet (`NFQNL_MSG_VERDICT`)
#[doc(alias = "NFQNL_MSG_VERDICT")]
#[doc(alias = "nfq_set_verdict")]
#[doc(alias = "nfq_set_verdict2")]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[must_use]
pub struct Decision<'p> {
    common: BatchVerdict,
    vlan: Option<Vlan>,
    l2_header: Option<&'p [u8]>,
    conntrack: Option<&'p [u8]>,
    expectation: Option<&'p [u8]>,
    payload: Option<&'p [u8]>,
}

impl<'p> Decision<'p> {
    /// A verdict that changes nothing
    #[doc(alias = "NFQA_VERDICT_HDR")]
    pub const fn new(verdict: Verdict) -> Self {
        Self {
            common: BatchVerdict::new(verdict),
            vlan: None,
            l2_header: None,
            conntrack: None,
            expectation: None,
            payload: None,
        }
    }

    /// Sets the packet mark (`skb->mark`), which later rules, routing and sockets see
    #[doc(alias = "NFQA_MARK")]
    pub const fn with_mark(mut self, mark: u32) -> Self {
        self.common = self.common.with_mark(mark);
        self
    }

    /// Sets `skb->priority`. Linux 5.18; older kernels ignore it
    #[doc(alias = "NFQA_PRIORITY")]
    pub const fn with_priority(mut self, priority: u32) -> Self {
        self.common = self.common.with_priority(priority);
        self
    }

    /// Replaces the packet, from its network header on, by one that may be longer or shorter
    ///
    /// The lengths and **all checksums** in it are the caller's, IP and transport alike. The kernel drops the packet
    /// without a word if it can't make the change: it is out of memory, or the new packet is shorter than its headers.
    /// From Linux 7.2 on it also drops it if IP version, options, extension headers or fragment bits are changed, if the
    /// length in the IP header is wrong, if the packet is a bridge's, and in a network namespace whose user namespace is
    /// not the initial one; from 7.3 on if the transport header is not whole.
    #[doc(alias = "NFQA_PAYLOAD")]
    pub const fn with_payload(mut self, payload: &'p [u8]) -> Self {
        self.payload = Some(payload);
        self
    }

    /// Sets or changes the VLAN tag, given in host byte order; only in the bridge family. Linux 4.7
    #[doc(alias = "NFQA_VLAN")]
    pub const fn with_vlan(mut self, vlan: Vlan) -> Self {
        self.vlan = Some(vlan);
        self
    }

    /// Replaces the link-layer header by one of the same length; only in the bridge family. Linux 4.7
    #[doc(alias = "NFQA_L2HDR")]
    pub const fn with_l2_header(mut self, header: &'p [u8]) -> Self {
        self.l2_header = Some(header);
        self
    }

    /// Changes the conntrack entry by nested `CTA_*` attributes (mark, labels, timeout, …). Linux 3.6
    #[doc(alias = "NFQA_CT")]
    pub const fn with_conntrack(mut self, nested: &'p [u8]) -> Self {
        self.conntrack = Some(nested);
        self
    }

    /// Adds an expectation by nested `CTA_EXPECT_*` attributes; the kernel looks at it only together with
    /// [`with_conntrack`](Self::with_conntrack). Linux 3.12
    #[doc(alias = "NFQA_EXP")]
    pub const fn with_expectation(mut self, nested: &'p [u8]) -> Self {
        self.expectation = Some(nested);
        self
    }

    /// The verdict
    #[must_use]
    pub const fn verdict(&self) -> Verdict {
        self.common.verdict
    }

    /// The decision as one that many packets can share: verdict, mark and priority, if that is all there is to it
    #[must_use]
    #[inline]
    pub const fn as_batch(&self) -> Option<BatchVerdict> {
        match self {
            Self {
                common,
                vlan: None,
                l2_header: None,
                conntrack: None,
                expectation: None,
                payload: None,
            } => Some(*common),
            _ => None,
        }
    }

    /// The new packet, if there is one
    #[must_use]
    pub const fn payload(&self) -> Option<&'p [u8]> {
        self.payload
    }

    /// Room enough for any decision without payload, header or nested attributes
    pub const SMALL_LEN: usize = 80;

    /// How many bytes [`encode`](Self::encode) needs at most
    #[must_use]
    pub fn max_len(&self) -> usize {
        let raw = [
            self.l2_header,
            self.conntrack,
            self.expectation,
            self.payload,
        ];
        raw.iter().flatten().fold(Self::SMALL_LEN, |len, value| {
            len.saturating_add(crate::consts::align(value.len()))
                .saturating_add(8)
        })
    }

    /// Writes the verdict on packet `id` of `queue` to the front of `buf`, and says how long it is
    ///
    /// Messages that share a send begin at multiples of 4: see [`align`](crate::consts::align).
    ///
    /// # Errors
    /// [`EncodeError::NoSpace`] if `buf` is too small; [`EncodeError::AttributeTooLong`] before anything is written if
    /// the payload or a raw attribute is longer than 65531 bytes.
    #[inline]
    pub fn encode(
        &self,
        buf: &mut [u8],
        queue: u16,
        id: u32,
        header: RequestHeader,
    ) -> Result<usize, EncodeError> {
        if let Some(common) = self.as_batch() {
            return common.encode_single(buf, queue, id, header);
        }
        self.encode_long(buf, queue, id, header)
    }

    fn encode_long(
        &self,
        buf: &mut [u8],
        queue: u16,
        id: u32,
        header: RequestHeader,
    ) -> Result<usize, EncodeError> {
        for (kind, value) in [
            (NFQA_L2HDR, self.l2_header),
            (NFQA_CT, self.conntrack),
            (NFQA_EXP, self.expectation),
            (NFQA_PAYLOAD, self.payload),
        ] {
            match value {
                Some(value) if value.len() > MAX_PAYLOAD => {
                    let had = value.len();
                    return Err(EncodeError::AttributeTooLong {
                        kind,
                        had,
                        max: MAX_PAYLOAD,
                    });
                }
                _ => {}
            }
        }
        let mut message = self.common.begin(NFQNL_MSG_VERDICT, buf, queue, id, header);
        if let Some(Vlan { proto, tci }) = self.vlan {
            message.nested_be16(NFQA_VLAN, [(NFQA_VLAN_PROTO, proto), (NFQA_VLAN_TCI, tci)]);
        }
        for (kind, value) in [
            (NFQA_L2HDR, self.l2_header),
            (NFQA_CT | crate::consts::NLA_F_NESTED, self.conntrack),
            (NFQA_EXP | crate::consts::NLA_F_NESTED, self.expectation),
            (NFQA_PAYLOAD, self.payload),
        ] {
            if let Some(value) = value {
                message.attr(kind, value);
            }
        }
        message.finish()
    }
}

impl From<Verdict> for Decision<'_> {
    fn from(verdict: Verdict) -> Self {
        Self::new(verdict)
    }
}

impl core::fmt::Debug for Decision<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Decision")
            .field("verdict", &self.common.verdict)
            .field("mark", &self.common.mark)
            .field("priority", &self.common.priority)
            .field("vlan", &self.vlan)
            .field("payload_len", &self.payload.map(<[u8]>::len))
            .finish_non_exhaustive()
    }
}

/// One verdict on **every** waiting packet of a queue whose id is not after `last` (`NFQNL_MSG_VERDICT_BATCH`)
///
/// That includes packets which another thread still looks at. Ids compare as a wrapping sequence.
///
/// As a message of its own ([`encode`](Self::encode)) it needs Linux 3.1, on one packet
/// ([`encode_single`](Self::encode_single)) any.
#[doc(alias = "NFQNL_MSG_VERDICT_BATCH")]
#[doc(alias = "nfq_set_verdict_batch")]
#[doc(alias = "nfq_set_verdict_batch2")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use]
pub struct BatchVerdict {
    verdict: Verdict,
    mark: Option<u32>,
    priority: Option<u32>,
}

impl BatchVerdict {
    /// Room enough for any of these, single or batch
    pub const MAX_LEN: usize =
        ATTRS_OFFSET + ATTR_HEADER_LEN + VERDICT_HDR_LEN + 2 * (ATTR_HEADER_LEN + 4);

    /// A verdict that changes nothing
    pub const fn new(verdict: Verdict) -> Self {
        Self {
            verdict,
            mark: None,
            priority: None,
        }
    }

    /// Sets the mark of every packet
    #[doc(alias = "NFQA_MARK")]
    pub const fn with_mark(mut self, mark: u32) -> Self {
        self.mark = Some(mark);
        self
    }

    /// Sets the priority of every packet. Linux 5.18; older kernels ignore it
    #[doc(alias = "NFQA_PRIORITY")]
    pub const fn with_priority(mut self, priority: u32) -> Self {
        self.priority = Some(priority);
        self
    }

    /// The verdict
    #[must_use]
    pub const fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// Writes the message for all packets up to `last` to the front of `buf`, and says how long it is. Linux 3.1
    ///
    /// # Errors
    /// [`EncodeError::NoSpace`] if `buf` is too small.
    #[inline]
    pub fn encode(
        &self,
        buf: &mut [u8],
        queue: u16,
        last: u32,
        header: RequestHeader,
    ) -> Result<usize, EncodeError> {
        self.begin(NFQNL_MSG_VERDICT_BATCH, buf, queue, last, header)
            .finish()
    }

    /// Writes the same verdict on packet `id` alone (`NFQNL_MSG_VERDICT`), and says how long it is
    ///
    /// # Errors
    /// [`EncodeError::NoSpace`] if `buf` is too small.
    #[inline]
    pub fn encode_single(
        &self,
        buf: &mut [u8],
        queue: u16,
        id: u32,
        header: RequestHeader,
    ) -> Result<usize, EncodeError> {
        self.begin(NFQNL_MSG_VERDICT, buf, queue, id, header)
            .finish()
    }

    /// What single and batch verdicts have in common, which is all of a batch verdict
    #[inline]
    fn begin<'b>(
        &self,
        message: u8,
        buf: &'b mut [u8],
        queue: u16,
        id: u32,
        header: RequestHeader,
    ) -> MessageWriter<'b> {
        let mut message = MessageWriter::new(buf, message, Family::UNSPEC.0, queue, header);
        message.verdict_hdr(self.verdict.to_raw(), id);
        if let Some(mark) = self.mark {
            message.be32(NFQA_MARK, mark);
        }
        if let Some(priority) = self.priority {
            message.be32(NFQA_PRIORITY, priority);
        }
        message
    }
}
