//! Verdicts (`NFQNL_MSG_VERDICT`, `NFQNL_MSG_VERDICT_BATCH`)

use thiserror::Error;

use crate::conntrack::{ConntrackUpdate, write_mark};
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

/// A verdict on a packet
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Verdict {
    /// Drop the packet
    #[doc(alias = "NF_DROP")]
    Drop,
    /// Accept the packet
    ///
    /// The rest of this base chain is skipped; the packet goes on with the next base chain.
    #[doc(alias = "NF_ACCEPT")]
    Accept,
    /// Forget the packet
    ///
    /// **The kernel refuses this from user space** (`EINVAL`), and the packet keeps waiting. It is
    /// here because libnetfilter_queue has it.
    #[doc(alias = "NF_STOLEN")]
    Stolen,
    /// Put the packet into another queue, or into the same one again, with a new id
    #[doc(alias = "NF_QUEUE")]
    Queue {
        /// The queue's number
        num: u16,
        /// Let the packet go on if the queue is not bound, instead of dropping it silently. Since
        /// Linux 2.6.39.
        #[doc(alias = "NF_VERDICT_FLAG_QUEUE_BYPASS")]
        bypass: bool,
    },
    /// Run the packet through the same base chain again
    ///
    /// The same rule queues the packet again, with a new id, unless something excludes the packet
    /// there, for example a mark.
    #[doc(alias = "NF_REPEAT")]
    Repeat,
    /// Accept the packet, and skip the later base chains of this hook
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
                // `num as u32` widens; `u32::from` is not const.
                (num as u32) << NF_VERDICT_QBITS | flag | NF_QUEUE
            }
            Self::Repeat => NF_REPEAT,
            Self::Stop => NF_STOP,
        }
    }

    /// The same verdict, with a new packet mark: see [`Decision::with_mark`]
    pub const fn with_mark(self, mark: u32) -> Decision<'static> {
        Decision::new(self).with_mark(mark)
    }

    /// The same verdict, with a new priority: see [`Decision::with_priority`]
    pub const fn with_priority(self, priority: u32) -> Decision<'static> {
        Decision::new(self).with_priority(priority)
    }

    /// The same verdict, with a new mark of the connection: see [`Decision::with_ct_mark`]
    pub const fn with_ct_mark(self, value: u32, mask: u32) -> Decision<'static> {
        Decision::new(self).with_ct_mark(value, mask)
    }

    /// The same verdict, with changes to the conntrack entry: see [`Decision::with_conntrack`]
    pub const fn with_conntrack(self, update: &ConntrackUpdate) -> Decision<'_> {
        Decision::new(self).with_conntrack(update)
    }

    /// The same verdict, with a new packet: see [`Decision::with_payload`]
    pub const fn with_payload(self, payload: &[u8]) -> Decision<'_> {
        Decision::new(self).with_payload(payload)
    }
}

impl core::fmt::Display for Verdict {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Drop => f.pad("drop"),
            Self::Accept => f.pad("accept"),
            Self::Stolen => f.pad("stolen"),
            Self::Queue { num, bypass: false } => write!(f, "queue {num}"),
            Self::Queue { num, bypass: true } => write!(f, "queue {num} or bypass"),
            Self::Repeat => f.pad("repeat"),
            Self::Stop => f.pad("stop"),
        }
    }
}

impl From<Verdict> for u32 {
    fn from(verdict: Verdict) -> Self {
        verdict.to_raw()
    }
}

/// A number without a [`Verdict`], or with stray bits
///
/// The kernel interprets stray bits: `NF_ACCEPT` with any bit above the low eight acts as
/// `NF_STOP`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[error("{0:#010x} is not a verdict")]
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

/// A verdict on one packet, with changes to the packet (`NFQNL_MSG_VERDICT`)
#[doc(alias = "NFQNL_MSG_VERDICT")]
#[doc(alias = "nfq_set_verdict")]
#[doc(alias = "nfq_set_verdict2")]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[must_use]
pub struct Decision<'p> {
    plain: PlainVerdict,
    vlan: Option<Vlan>,
    l2_header: Option<&'p [u8]>,
    conntrack: Option<CtChange<'p>>,
    expectation: Option<&'p [u8]>,
    payload: Option<&'p [u8]>,
}

/// A change of a conntrack entry
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum CtChange<'p> {
    Mark { value: u32, mask: u32 },
    Update(&'p ConntrackUpdate),
    Raw(&'p [u8]),
}

impl<'p> Decision<'p> {
    /// A verdict without changes to the packet
    #[doc(alias = "NFQA_VERDICT_HDR")]
    pub const fn new(verdict: Verdict) -> Self {
        Self {
            plain: PlainVerdict::new(verdict),
            vlan: None,
            l2_header: None,
            conntrack: None,
            expectation: None,
            payload: None,
        }
    }

    /// Sets the packet mark (`skb->mark`), for later rules, routing and sockets
    ///
    /// It replaces all 32 bits. To keep bits of other programs, use those of `Packet::mark`:
    /// `packet.mark() & !mask | value`.
    #[doc(alias = "NFQA_MARK")]
    pub const fn with_mark(mut self, mark: u32) -> Self {
        self.plain = self.plain.with_mark(mark);
        self
    }

    /// Sets `skb->priority`
    ///
    /// Since Linux 5.18; older kernels ignore it.
    #[doc(alias = "NFQA_PRIORITY")]
    pub const fn with_priority(mut self, priority: u32) -> Self {
        self.plain = self.plain.with_priority(priority);
        self
    }

    /// Replaces the packet, from its network header on; the new packet may be longer or shorter
    ///
    /// The caller must set the lengths and **all checksums** in it, both IP and transport.
    /// [`Rewrite`](crate::rewrite::Rewrite) does this, and refuses packets that cannot be sent
    /// back. So prefer it to bytes of your own.
    ///
    /// If the kernel cannot make the change, it silently drops the packet:
    /// * if it is out of memory, or the new packet is shorter than its headers;
    /// * since Linux 7.1 also in a network namespace of a user namespace other than the initial
    ///   one;
    /// * since Linux 7.2 also if the IP version, options, extension headers or fragment bits
    ///   change, if the length in the IP header is wrong, or if the packet is bridged;
    /// * since Linux 7.3 also if the transport header is incomplete, or the packet is a fragment
    ///   of a tracked connection.
    #[doc(alias = "NFQA_PAYLOAD")]
    pub const fn with_payload(mut self, payload: &'p [u8]) -> Self {
        self.payload = Some(payload);
        self
    }

    /// Sets or changes the VLAN tag, given in host byte order; only in the bridge family
    ///
    /// Since Linux 4.7.
    #[doc(alias = "NFQA_VLAN")]
    pub const fn with_vlan(mut self, vlan: Vlan) -> Self {
        self.vlan = Some(vlan);
        self
    }

    /// Replaces the link-layer header by one of the same length; only in the bridge family
    ///
    /// Since Linux 4.7.
    #[doc(alias = "NFQA_L2HDR")]
    pub const fn with_l2_header(mut self, header: &'p [u8]) -> Self {
        self.l2_header = Some(header);
        self
    }

    /// Sets the bits in `mask` of the connection's mark to those of `value`, and keeps the others
    ///
    /// Rules see the mark of every later packet of the connection (`ct mark`, `-m connmark`), so
    /// they can keep these packets out of the queue. It works for the first packet of a connection
    /// too, and without [`ConfigFlags::CONNTRACK`](crate::ConfigFlags::CONNTRACK).
    ///
    /// **The kernel silently ignores it** in two cases:
    ///
    /// * The packet is untracked. Since Linux 4.10 the kernel tracks connections only in a network
    ///   namespace with a rule that needs tracking: `ct` in nftables, `conntrack` or `connmark` in
    ///   iptables, or NAT.
    /// * The kernel lacks `CONFIG_NETFILTER_NETLINK_GLUE_CT` or the module `nf_conntrack_netlink`:
    ///   `Socket::takes_conntrack` of `nfqnl` tells. Then set the packet's mark
    ///   ([`with_mark`](Self::with_mark)), and save it by a rule in a later chain
    ///   (`ct mark set mark`, `-j CONNMARK --save-mark`).
    ///
    /// A decision has one change of the entry: the last of this method,
    /// [`with_conntrack`](Self::with_conntrack) and
    /// [`with_raw_conntrack`](Self::with_raw_conntrack). Do not change the entry and the length of
    /// a TCP packet in one decision: if the connection has NAT, the kernel then tries to adjust
    /// sequence numbers, and warns in its log.
    ///
    /// Since Linux 3.9; since 3.6 without the mask.
    #[doc(alias = "CTA_MARK")]
    #[doc(alias = "CTA_MARK_MASK")]
    pub const fn with_ct_mark(mut self, value: u32, mask: u32) -> Self {
        self.conntrack = Some(CtChange::Mark { value, mask });
        self
    }

    /// Changes the conntrack entry: timeout, status, helper, labels, mark
    ///
    /// The conditions of [`with_ct_mark`](Self::with_ct_mark) apply. Since Linux 3.6.
    #[doc(alias = "NFQA_CT")]
    pub const fn with_conntrack(mut self, update: &'p ConntrackUpdate) -> Self {
        self.conntrack = Some(CtChange::Update(update));
        self
    }

    /// Changes the conntrack entry by nested `CTA_*` attributes in wire format
    ///
    /// Use it for attributes that [`ConntrackUpdate`] lacks. The conditions of
    /// [`with_ct_mark`](Self::with_ct_mark) apply. Since Linux 3.6.
    #[doc(alias = "NFQA_CT")]
    pub const fn with_raw_conntrack(mut self, nested: &'p [u8]) -> Self {
        self.conntrack = Some(CtChange::Raw(nested));
        self
    }

    /// Adds an expectation by nested `CTA_EXPECT_*` attributes
    ///
    /// The kernel ignores it unless the decision changes the conntrack entry. Since Linux 3.12.
    #[doc(alias = "NFQA_EXP")]
    pub const fn with_expectation(mut self, nested: &'p [u8]) -> Self {
        self.expectation = Some(nested);
        self
    }

    /// The verdict
    #[must_use]
    pub const fn verdict(&self) -> Verdict {
        self.plain.verdict
    }

    /// The new packet mark, if set
    #[must_use]
    pub const fn mark(&self) -> Option<u32> {
        self.plain.mark
    }

    /// The new priority, if set
    #[must_use]
    pub const fn priority(&self) -> Option<u32> {
        self.plain.priority
    }

    /// The new VLAN tag, if set
    #[must_use]
    pub const fn vlan(&self) -> Option<Vlan> {
        self.vlan
    }

    /// The new link-layer header, if set
    #[must_use]
    pub const fn l2_header(&self) -> Option<&'p [u8]> {
        self.l2_header
    }

    /// The value and the mask of [`with_ct_mark`](Self::with_ct_mark), if set
    #[must_use]
    pub const fn ct_mark(&self) -> Option<(u32, u32)> {
        match self.conntrack {
            Some(CtChange::Mark { value, mask }) => Some((value, mask)),
            _ => None,
        }
    }

    /// The changes of [`with_conntrack`](Self::with_conntrack), if set
    #[must_use]
    pub const fn conntrack(&self) -> Option<&'p ConntrackUpdate> {
        match self.conntrack {
            Some(CtChange::Update(update)) => Some(update),
            _ => None,
        }
    }

    /// The nested attributes of [`with_raw_conntrack`](Self::with_raw_conntrack), if set
    #[must_use]
    pub const fn raw_conntrack(&self) -> Option<&'p [u8]> {
        match self.conntrack {
            Some(CtChange::Raw(nested)) => Some(nested),
            _ => None,
        }
    }

    /// The nested attributes of the new expectation, if set
    #[must_use]
    pub const fn expectation(&self) -> Option<&'p [u8]> {
        self.expectation
    }

    /// The decision as a [`PlainVerdict`], if it has only a verdict, a mark and a priority
    #[must_use]
    #[inline]
    pub const fn as_plain(&self) -> Option<PlainVerdict> {
        match self {
            Self {
                plain,
                vlan: None,
                l2_header: None,
                conntrack: None,
                expectation: None,
                payload: None,
            } => Some(*plain),
            _ => None,
        }
    }

    /// The new packet, if set
    #[must_use]
    pub const fn payload(&self) -> Option<&'p [u8]> {
        self.payload
    }

    /// A buffer of this size has room for any decision with only a verdict, a mark, a priority and
    /// a VLAN tag
    pub const SMALL_LEN: usize = 80;

    /// Returns a buffer size with room for this decision
    #[must_use]
    pub fn max_len(&self) -> usize {
        let small = match self.conntrack {
            Some(CtChange::Mark { .. } | CtChange::Update(_)) => {
                Self::SMALL_LEN + 4 + ConntrackUpdate::MAX_LEN
            }
            Some(CtChange::Raw(_)) | None => Self::SMALL_LEN,
        };
        let raw = [
            self.l2_header,
            self.raw_conntrack(),
            self.expectation,
            self.payload,
        ];
        raw.iter().flatten().fold(small, |len, value| {
            len.saturating_add(crate::consts::align(value.len()))
                .saturating_add(8)
        })
    }

    /// Writes the verdict on packet `id` of `queue` to the front of `buf`, and returns its length
    ///
    /// If one send has several messages, each must begin at a multiple of 4: see
    /// [`align`](crate::consts::align).
    ///
    /// # Errors
    /// [`EncodeError::NoSpace`] if `buf` is too small. [`EncodeError::AttributeTooLong`], with
    /// nothing written, if the payload or a raw attribute is longer than 65531 bytes.
    #[inline]
    pub fn encode(
        &self,
        buf: &mut [u8],
        queue: u16,
        id: u32,
        header: RequestHeader,
    ) -> Result<usize, EncodeError> {
        if let Some(plain) = self.as_plain() {
            return plain.encode(buf, queue, id, header);
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
            (NFQA_CT, self.raw_conntrack()),
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
        let mut message = self.plain.begin(NFQNL_MSG_VERDICT, buf, queue, id, header);
        if let Some(Vlan { proto, tci }) = self.vlan {
            message.nested(NFQA_VLAN, |message| {
                message.attr(NFQA_VLAN_PROTO, &proto.to_be_bytes());
                message.attr(NFQA_VLAN_TCI, &tci.to_be_bytes());
            });
        }
        match self.conntrack {
            Some(CtChange::Mark { value, mask }) => {
                message.nested(NFQA_CT, |message| write_mark(message, value, mask));
            }
            Some(CtChange::Update(update)) => {
                message.nested(NFQA_CT, |message| update.write(message))
            }
            Some(CtChange::Raw(_)) | None => {}
        }
        for (kind, value) in [
            (NFQA_L2HDR, self.l2_header),
            (NFQA_CT | crate::consts::NLA_F_NESTED, self.raw_conntrack()),
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

impl From<PlainVerdict> for Decision<'_> {
    fn from(plain: PlainVerdict) -> Self {
        let mut decision = Self::new(plain.verdict);
        decision.plain = plain;
        decision
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
            .field("verdict", &self.plain.verdict)
            .field("mark", &self.plain.mark)
            .field("priority", &self.plain.priority)
            .field("vlan", &self.vlan)
            .field("conntrack", &self.conntrack)
            .field("payload_len", &self.payload.map(<[u8]>::len))
            .finish_non_exhaustive()
    }
}

/// A verdict with at most a mark and a priority: everything in a batch message
///
/// [`encode`](Self::encode) writes a verdict on one packet, and
/// [`encode_batch`](Self::encode_batch) a verdict on many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use]
pub struct PlainVerdict {
    verdict: Verdict,
    mark: Option<u32>,
    priority: Option<u32>,
}

impl PlainVerdict {
    /// A buffer of this size has room for any message of this type
    pub const MAX_LEN: usize =
        ATTRS_OFFSET + ATTR_HEADER_LEN + VERDICT_HDR_LEN + 2 * (ATTR_HEADER_LEN + 4);

    /// A verdict without changes to the packet
    pub const fn new(verdict: Verdict) -> Self {
        Self {
            verdict,
            mark: None,
            priority: None,
        }
    }

    /// Sets the packet mark (`skb->mark`)
    #[doc(alias = "NFQA_MARK")]
    pub const fn with_mark(mut self, mark: u32) -> Self {
        self.mark = Some(mark);
        self
    }

    /// Sets `skb->priority`
    ///
    /// Since Linux 5.18; older kernels ignore it.
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

    /// Writes the verdict on packet `id` of `queue` to the front of `buf`, and returns its length
    ///
    /// The message is `NFQNL_MSG_VERDICT`.
    ///
    /// # Errors
    /// [`EncodeError::NoSpace`] if `buf` is too small.
    #[doc(alias = "NFQNL_MSG_VERDICT")]
    #[doc(alias = "nfq_set_verdict")]
    #[doc(alias = "nfq_set_verdict2")]
    #[inline]
    pub fn encode(
        &self,
        buf: &mut [u8],
        queue: u16,
        id: u32,
        header: RequestHeader,
    ) -> Result<usize, EncodeError> {
        self.begin(NFQNL_MSG_VERDICT, buf, queue, id, header)
            .finish()
    }

    /// Writes one verdict on **every** waiting packet of `queue` up to id `last`, and returns its
    /// length
    ///
    /// The message is `NFQNL_MSG_VERDICT_BATCH`. The kernel applies it to all packets with ids up
    /// to `last`, even to packets held by other threads. It compares ids as a wrapping sequence of
    /// 32 bits. Since Linux 3.1.
    ///
    /// # Errors
    /// [`EncodeError::NoSpace`] if `buf` is too small.
    #[doc(alias = "NFQNL_MSG_VERDICT_BATCH")]
    #[doc(alias = "nfq_set_verdict_batch")]
    #[doc(alias = "nfq_set_verdict_batch2")]
    #[inline]
    pub fn encode_batch(
        &self,
        buf: &mut [u8],
        queue: u16,
        last: u32,
        header: RequestHeader,
    ) -> Result<usize, EncodeError> {
        self.begin(NFQNL_MSG_VERDICT_BATCH, buf, queue, last, header)
            .finish()
    }

    /// Writes the common part of both messages, which is the whole batch message
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

impl From<Verdict> for PlainVerdict {
    fn from(verdict: Verdict) -> Self {
        Self::new(verdict)
    }
}
