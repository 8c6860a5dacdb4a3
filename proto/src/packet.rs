//! The packet that waits for a verdict: a view over the message's bytes
//!
//! [`Packet::parse`] checks the message once and remembers where each attribute stands; after that no getter can fail.
//!
//! # A new attribute
//! Give it a number in [`consts`](crate::consts) (and raise [`NFQA_MAX`] to it), its least size in [`min_len`], a getter
//! below, and the size of [`Packet`] that is asserted there; the tests have it in `proto/tests/common/mod.rs`. Until then
//! [`Packet::attr`] finds it by number.

use core::time::Duration;

use bitflags::bitflags;
use byteorder::{BigEndian, ByteOrder, NativeEndian};

use crate::attr::{Attr, Attrs};
use crate::consts::{
    ATTR_HEADER_LEN, ATTRS_OFFSET, MESSAGE_HEADER_LEN, NFQA_CAP_LEN, NFQA_CGROUP_CLASSID, NFQA_CT,
    NFQA_CT_INFO, NFQA_EXP, NFQA_GID, NFQA_HWADDR, NFQA_IFINDEX_INDEV, NFQA_IFINDEX_OUTDEV,
    NFQA_IFINDEX_PHYSINDEV, NFQA_IFINDEX_PHYSOUTDEV, NFQA_L2HDR, NFQA_MARK, NFQA_MAX,
    NFQA_PACKET_HDR, NFQA_PAYLOAD, NFQA_PRIORITY, NFQA_SECCTX, NFQA_SKB_CSUM_NOTVERIFIED,
    NFQA_SKB_CSUMNOTREADY, NFQA_SKB_GSO, NFQA_SKB_INFO, NFQA_TIMESTAMP, NFQA_UID, NFQA_VLAN,
    NFQNL_MSG_PACKET, NLA_TYPE_MASK, PACKET_HDR_LEN, PACKET_HW_LEN, TIMESTAMP_LEN, align,
    message_type,
};
use crate::error::{DecodeError, Header};
use crate::types::{Family, Hook};
use crate::vlan::Vlan;

/// Offsets are kept in 4-byte words, so that 16 bits reach this far
const MAX_MESSAGE_LEN: usize = (u16::MAX as usize + 1) * 4;

/// Where an index has the attribute that is always there
const PACKET_HDR: usize = NFQA_PACKET_HDR as usize;

/// Names a waiting packet: what a verdict is addressed to, at any later time and from any thread
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(
    clippy::exhaustive_structs,
    reason = "eight bytes, made and read by both crates"
)]
pub struct PacketKey {
    /// The queue
    pub queue: u16,
    /// Which binding of the queue the id belongs to: ids restart at 1 when a queue is unbound and bound again.
    /// Not on the wire; 0 until a receiver that counts bindings sets it ([`Packet::with_binding`]).
    pub binding: u16,
    /// The packet's id: the kernel counts from 1 for each binding and wraps at 32 bits
    pub id: u32,
}

impl PacketKey {
    /// Finds the key in the first bytes of a packet message, even one that was cut short
    ///
    /// `None` if `message` is no packet message or ends before its packet header. A packet whose message did not fit
    /// the receive buffer still waits in the kernel: this is how to answer it.
    #[must_use]
    #[inline]
    pub fn peek(message: &[u8]) -> Option<Self> {
        let (header, attrs) = message.split_first_chunk::<ATTRS_OFFSET>()?;
        if NativeEndian::read_u16(&header[4..]) != message_type(NFQNL_MSG_PACKET) {
            return None;
        }
        Some(Self {
            queue: BigEndian::read_u16(&header[18..]),
            binding: 0,
            id: peek_id(attrs)?,
        })
    }
}

/// The packet's id, from the beginning of the attributes
#[inline]
fn peek_id(attrs: &[u8]) -> Option<u32> {
    // The kernel puts the packet header first.
    let first = attrs.first_chunk::<8>()?;
    let (len, kind) = (
        NativeEndian::read_u16(first),
        NativeEndian::read_u16(&first[2..]),
    );
    if len >= 8 && usize::from(len) <= attrs.len() && kind == NFQA_PACKET_HDR {
        return Some(BigEndian::read_u32(&first[4..]));
    }
    let header = Attrs::new(attrs)
        .map_while(Result::ok)
        .find(|a| a.kind == NFQA_PACKET_HDR)?;
    header
        .value
        .first_chunk::<4>()
        .map(|id| BigEndian::read_u32(id))
}

/// A packet that the kernel holds until it gets a verdict (`NFQNL_MSG_PACKET`)
///
/// Small and `Copy`; slices that it hands out live as long as the buffer, not as the view.
#[derive(Clone, Copy)]
pub struct Packet<'a> {
    /// The whole message, from its netlink header on
    message: &'a [u8],
    index: PacketIndex,
}

const _: () = assert!(
    size_of::<Packet<'static>>() <= 64,
    "one cache line, which is full: a new attribute makes it 72 bytes, so raise this with it"
);

/// Where the attributes of a packet stand in its message: a [`Packet`] without its bytes, for whoever keeps those elsewhere
#[derive(Clone, Copy)]
pub struct PacketIndex {
    /// In words from the start of the message; 0 if it is absent
    at: [u16; NFQA_MAX as usize + 1],
    binding: u16,
}

impl PacketIndex {
    /// The packet over these bytes: those that the index was made of, or a copy
    ///
    /// Over any other bytes the getters return whatever stands there; they don't fail.
    #[must_use]
    #[inline]
    pub const fn over(self, message: &[u8]) -> Packet<'_> {
        Packet {
            message,
            index: self,
        }
    }

    /// Makes this the index of another packet, as [`Packet::parse`] makes a view: in place, for whoever keeps many
    ///
    /// The number of the binding is 0 then; if there is an error, the index is of no packet.
    ///
    /// # Errors
    /// Those of [`Packet::parse`].
    #[inline]
    pub fn parse(&mut self, message: &[u8]) -> Result<(), DecodeError> {
        self.binding = 0;
        if index(message, &mut self.at) {
            return Ok(());
        }
        *self = Self::default();
        *self = Packet::parse_carefully(message)?.index;
        Ok(())
    }

    /// The number of the queue's binding that the packet is stamped with, or 0
    #[must_use]
    #[inline]
    pub const fn binding(&self) -> u16 {
        self.binding
    }

    /// Stamps the packet with the number of the queue's binding, as [`Packet::with_binding`] does
    #[inline]
    pub const fn set_binding(&mut self, binding: u16) {
        self.binding = binding;
    }
}

impl Default for PacketIndex {
    /// Of a packet without attributes, which there is none of
    #[inline]
    fn default() -> Self {
        Self {
            at: [0; NFQA_MAX as usize + 1],
            binding: 0,
        }
    }
}

impl core::fmt::Debug for PacketIndex {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let kinds = (0_u16..).zip(self.at).filter(|&(_, word)| word != 0);
        let offsets = kinds.map(|(kind, word)| (kind, usize::from(word) * 4));
        f.debug_map().entries(offsets).finish()
    }
}

impl<'a> Packet<'a> {
    /// Checks a whole message, netlink header included
    ///
    /// Where an attribute comes twice, the last one counts, as in the kernel. Attributes of unknown number are kept
    /// for [`attr`](Self::attr).
    ///
    /// # Errors
    /// Not a packet message, broken lengths, an attribute shorter than its type, or no packet header.
    #[inline]
    pub fn parse(message: &'a [u8]) -> Result<Self, DecodeError> {
        let mut index = PacketIndex::default();
        index.parse(message)?;
        Ok(index.over(message))
    }

    /// Does all that [`parse`](Self::parse) says, and knows what is wrong
    #[cold]
    fn parse_carefully(message: &'a [u8]) -> Result<Self, DecodeError> {
        let short = |what, offset, needed| DecodeError::Short {
            what,
            offset,
            needed,
            had: message.len() - offset,
        };
        let Some((header, _)) = message.split_first_chunk::<MESSAGE_HEADER_LEN>() else {
            return Err(short(Header::Message, 0, MESSAGE_HEADER_LEN));
        };
        let kind = NativeEndian::read_u16(&header[4..]);
        if kind != message_type(NFQNL_MSG_PACKET) {
            return Err(DecodeError::NotAPacket { message_type: kind });
        }
        let Some((_, attrs)) = message.split_first_chunk::<ATTRS_OFFSET>() else {
            return Err(short(
                Header::Family,
                MESSAGE_HEADER_LEN,
                ATTRS_OFFSET - MESSAGE_HEADER_LEN,
            ));
        };
        if message.len() > MAX_MESSAGE_LEN {
            return Err(DecodeError::TooLong {
                had: message.len(),
                max: MAX_MESSAGE_LEN,
            });
        }

        let mut at = [0; NFQA_MAX as usize + 1];
        for attr in Attrs::new(attrs) {
            let attr = match attr {
                Ok(attr) => attr,
                Err(error) => return Err(error.at(ATTRS_OFFSET)),
            };
            let kind = usize::from(attr.kind);
            if let (Some(slot), Some(&needed)) = (at.get_mut(kind), MIN_LEN.get(kind)) {
                check(attr, needed)?;
                *slot = u16::try_from((attr.offset + ATTRS_OFFSET) / 4).unwrap_or_default();
            }
        }
        if at[PACKET_HDR] == 0 {
            return Err(DecodeError::MissingAttribute {
                kind: NFQA_PACKET_HDR,
                within: None,
                offset: 0,
            });
        }
        Ok(PacketIndex { at, binding: 0 }.over(message))
    }

    /// The same packet, its key stamped with the number of the queue's binding
    #[must_use]
    #[inline]
    pub const fn with_binding(mut self, binding: u16) -> Self {
        self.index.binding = binding;
        self
    }

    /// Where its attributes stand, to be kept beside a copy of its bytes ([`as_bytes`](Self::as_bytes))
    #[must_use]
    #[inline]
    pub const fn index(&self) -> PacketIndex {
        self.index
    }

    /// What a verdict on this packet is addressed to
    #[must_use]
    #[inline]
    pub fn key(&self) -> PacketKey {
        PacketKey {
            queue: self.queue(),
            binding: self.index.binding,
            id: self.id(),
        }
    }

    /// The whole message as it was received, netlink header included
    #[must_use]
    pub const fn as_bytes(&self) -> &'a [u8] {
        self.message
    }

    /// The protocol family of the hook that queued the packet: IPv4, IPv6, bridge, or any number
    ///
    /// Always there (`nfgen_family` of `struct nfgenmsg`).
    #[must_use]
    #[doc(alias = "nfgen_family")]
    #[inline]
    pub fn family(&self) -> Family {
        Family(
            self.message
                .get(MESSAGE_HEADER_LEN)
                .copied()
                .unwrap_or_default(),
        )
    }

    /// The number of the queue
    ///
    /// Always there (`res_id` of `struct nfgenmsg`).
    #[must_use]
    #[doc(alias = "res_id")]
    #[inline]
    pub fn queue(&self) -> u16 {
        self.message
            .get(MESSAGE_HEADER_LEN + 2..)
            .and_then(<[u8]>::first_chunk::<2>)
            .map_or(0, |b| BigEndian::read_u16(b))
    }

    /// The packet's id: the kernel counts from 1 for each binding of a queue, and wraps at 32 bits
    ///
    /// Always there (`packet_id` of `struct nfqnl_msg_packet_hdr`).
    #[must_use]
    #[doc(alias = "NFQA_PACKET_HDR")]
    #[doc(alias = "packet_id")]
    #[doc(alias = "nfq_get_msg_packet_hdr")]
    #[inline]
    pub fn id(&self) -> u32 {
        BigEndian::read_u32(&self.header()[..4])
    }

    /// The EtherType of the packet in host byte order: `0x0800` IPv4, `0x86dd` IPv6, `0x0806` ARP on a bridge
    ///
    /// Always there (`hw_protocol` of `struct nfqnl_msg_packet_hdr`, which C programs have to convert).
    #[must_use]
    #[doc(alias = "NFQA_PACKET_HDR")]
    #[doc(alias = "nfq_get_msg_packet_hdr")]
    #[inline]
    pub fn hw_protocol(&self) -> u16 {
        BigEndian::read_u16(&self.header()[4..6])
    }

    /// The netfilter hook that queued the packet
    ///
    /// Always there (`hook` of `struct nfqnl_msg_packet_hdr`).
    #[must_use]
    #[doc(alias = "NFQA_PACKET_HDR")]
    #[doc(alias = "nfq_get_msg_packet_hdr")]
    #[inline]
    pub fn hook(&self) -> Hook {
        Hook(self.header()[6])
    }

    /// `struct nfqnl_msg_packet_hdr`; `parse` saw that it is there
    #[inline]
    fn header(&self) -> [u8; PACKET_HDR_LEN] {
        let word = self.index.at[PACKET_HDR];
        self.value_at(word).unwrap_or_default()
    }

    /// The packet mark (`skb->mark`); 0 if none, which the kernel does not tell from a mark of 0
    #[must_use]
    #[doc(alias = "NFQA_MARK")]
    #[doc(alias = "nfmark")]
    #[doc(alias = "nfq_get_nfmark")]
    #[inline]
    pub fn mark(&self) -> u32 {
        self.be32(NFQA_MARK).unwrap_or(0)
    }

    /// The packet's priority (`skb->priority`); 0 if none, which the kernel does not tell from a priority of 0.
    /// Linux 5.18
    #[must_use]
    #[doc(alias = "NFQA_PRIORITY")]
    pub fn priority(&self) -> u32 {
        self.be32(NFQA_PRIORITY).unwrap_or(0)
    }

    /// When the packet was received, since the Unix epoch, in steps of a microsecond
    ///
    /// Only for packets that came in (up to the FORWARD hook) while some socket on the machine asked for timestamps
    /// (`SO_TIMESTAMP`, a running capture); `None` otherwise.
    #[must_use]
    #[doc(alias = "NFQA_TIMESTAMP")]
    #[doc(alias = "nfq_get_timestamp")]
    pub fn timestamp(&self) -> Option<Duration> {
        let value: [u8; TIMESTAMP_LEN] = self.fixed(NFQA_TIMESTAMP)?;
        let seconds = Duration::from_secs(BigEndian::read_u64(&value[..8]));
        Some(seconds.saturating_add(Duration::from_micros(BigEndian::read_u64(&value[8..]))))
    }

    /// Index of the device that the packet came in by; absent for packets made here, and at POSTROUTING before
    /// Linux 5.7. For bridged packets, the bridge
    #[must_use]
    #[doc(alias = "NFQA_IFINDEX_INDEV")]
    #[doc(alias = "nfq_get_indev")]
    #[inline]
    pub fn indev(&self) -> Option<u32> {
        self.be32(NFQA_IFINDEX_INDEV)
    }

    /// Index of the device that the packet will leave by; absent at PREROUTING and INPUT. For bridged packets, the
    /// bridge
    #[must_use]
    #[doc(alias = "NFQA_IFINDEX_OUTDEV")]
    #[doc(alias = "nfq_get_outdev")]
    #[inline]
    pub fn outdev(&self) -> Option<u32> {
        self.be32(NFQA_IFINDEX_OUTDEV)
    }

    /// Index of the bridge port that the packet came in by; absent for packets that came by no bridge, and from kernels
    /// without `CONFIG_BRIDGE_NETFILTER`
    #[must_use]
    #[doc(alias = "NFQA_IFINDEX_PHYSINDEV")]
    #[doc(alias = "nfq_get_physindev")]
    pub fn physindev(&self) -> Option<u32> {
        self.be32(NFQA_IFINDEX_PHYSINDEV)
    }

    /// Index of the bridge port that the packet will leave by; absent as [`physindev`](Self::physindev) is, and until
    /// the port is known
    #[must_use]
    #[doc(alias = "NFQA_IFINDEX_PHYSOUTDEV")]
    #[doc(alias = "nfq_get_physoutdev")]
    pub fn physoutdev(&self) -> Option<u32> {
        self.be32(NFQA_IFINDEX_PHYSOUTDEV)
    }

    /// The link-layer address of the packet's *source*; absent for packets made here, and where the link layer has no
    /// addresses
    #[must_use]
    #[doc(alias = "NFQA_HWADDR")]
    #[doc(alias = "nfq_get_packet_hw")]
    #[doc(alias = "hwaddr")]
    pub fn hw_addr(&self) -> Option<HwAddr> {
        let value: [u8; PACKET_HW_LEN] = self.fixed(NFQA_HWADDR)?;
        let (len, bytes) = (BigEndian::read_u16(&value[..2]), &value[4..]);
        let mut addr = HwAddr {
            bytes: [0; HwAddr::MAX_LEN],
            len: len.min(8).to_be_bytes()[1],
        };
        addr.bytes.copy_from_slice(bytes);
        Some(addr)
    }

    /// User id of the socket that sent the packet, as the initial user namespace numbers it
    ///
    /// Only with [`ConfigFlags::UID_GID`](crate::ConfigFlags::UID_GID), and only for packets of a local socket; `None`
    /// otherwise. Linux 3.14
    #[must_use]
    #[doc(alias = "NFQA_UID")]
    #[doc(alias = "nfq_get_uid")]
    pub fn uid(&self) -> Option<u32> {
        self.be32(NFQA_UID)
    }

    /// Group id of the socket that sent the packet, numbered and absent as [`uid`](Self::uid) is. Linux 3.14
    #[must_use]
    #[doc(alias = "NFQA_GID")]
    #[doc(alias = "nfq_get_gid")]
    pub fn gid(&self) -> Option<u32> {
        self.be32(NFQA_GID)
    }

    /// Security context of the packet, as bytes: nothing promises a NUL at its end, and often there is one
    ///
    /// Only with [`ConfigFlags::SECCTX`](crate::ConfigFlags::SECCTX), and only for packets with a security mark
    /// (`skb->secmark`); `None` otherwise. Linux 4.3
    #[must_use]
    #[doc(alias = "NFQA_SECCTX")]
    #[doc(alias = "nfq_get_secctx")]
    pub fn security_context(&self) -> Option<&'a [u8]> {
        self.attr(NFQA_SECCTX)
    }

    /// The VLAN tag, its halves in host byte order; only in the bridge family, and only for tagged frames. Linux 4.7
    #[must_use]
    #[doc(alias = "NFQA_VLAN")]
    pub fn vlan(&self) -> Option<Vlan> {
        self.attr(NFQA_VLAN)
            .and_then(|nested| Vlan::parse(nested).ok())
    }

    /// The link-layer header as it is on the wire, without a VLAN tag; only in the bridge family. Linux 4.7
    #[must_use]
    #[doc(alias = "NFQA_L2HDR")]
    pub fn l2_header(&self) -> Option<&'a [u8]> {
        self.attr(NFQA_L2HDR)
    }

    /// The conntrack entry: nested `CTA_*` attributes, for [`Attrs`]
    ///
    /// Only with [`ConfigFlags::CONNTRACK`](crate::ConfigFlags::CONNTRACK), and only for tracked packets; `None`
    /// otherwise. Numbers in it are big-endian. Linux 3.6
    #[must_use]
    #[doc(alias = "NFQA_CT")]
    pub fn conntrack(&self) -> Option<&'a [u8]> {
        self.attr(NFQA_CT)
    }

    /// How the packet relates to its conntrack entry: a number of `enum ip_conntrack_info` in
    /// `linux/netfilter/nf_conntrack_common.h`; absent where [`conntrack`](Self::conntrack) is. Linux 3.6
    #[must_use]
    #[doc(alias = "NFQA_CT_INFO")]
    #[doc(alias = "ip_conntrack_info")]
    pub fn conntrack_info(&self) -> Option<u32> {
        self.be32(NFQA_CT_INFO)
    }

    /// A conntrack expectation: nested `CTA_EXPECT_*` attributes
    ///
    /// The number exists since Linux 3.12 for verdicts; no kernel sends one as of Linux 6.18, so this is `None`.
    #[must_use]
    #[doc(alias = "NFQA_EXP")]
    pub fn expectation(&self) -> Option<&'a [u8]> {
        self.attr(NFQA_EXP)
    }

    /// net_cls class id of the sending socket's cgroup (version 1); absent if 0. Linux 6.4
    #[must_use]
    #[doc(alias = "NFQA_CGROUP_CLASSID")]
    pub fn cgroup_classid(&self) -> Option<u32> {
        self.be32(NFQA_CGROUP_CLASSID)
    }

    /// Length of the whole packet in bytes, from its network header on, if the kernel sent only its beginning; `None`
    /// if it sent all of it, or no payload at all. Linux 3.7; older kernels cut without saying so
    #[must_use]
    #[doc(alias = "NFQA_CAP_LEN")]
    #[doc(alias = "cap_len")]
    #[inline]
    pub fn capture_len(&self) -> Option<u32> {
        self.be32(NFQA_CAP_LEN)
    }

    /// Whether the payload is only the packet's beginning, as far as the kernel says it:
    /// [`capture_len`](Self::capture_len). Replacing it would shorten the packet.
    #[must_use]
    #[doc(alias = "NFQA_CAP_LEN")]
    #[inline]
    pub fn is_cut(&self) -> bool {
        self.capture_len().is_some()
    }

    /// State of checksums and segmentation; empty if the kernel sent none. Linux 3.10
    #[must_use]
    #[doc(alias = "NFQA_SKB_INFO")]
    #[doc(alias = "nfq_get_skbinfo")]
    #[doc(alias = "skbinfo")]
    #[inline]
    pub fn skb_info(&self) -> SkbInfo {
        SkbInfo::from_bits_retain(self.be32(NFQA_SKB_INFO).unwrap_or(0))
    }

    /// The packet from its network header on; empty in copy modes other than
    /// [`CopyMode::PACKET`](crate::CopyMode::PACKET)
    ///
    /// At most [`MAX_PAYLOAD`](crate::consts::MAX_PAYLOAD) bytes, and no more than the queue's copy range.
    #[must_use]
    #[doc(alias = "NFQA_PAYLOAD")]
    #[doc(alias = "nfq_get_payload")]
    #[inline]
    pub fn payload(&self) -> &'a [u8] {
        self.attr(NFQA_PAYLOAD).unwrap_or_default()
    }

    /// The value of any attribute by number, without padding; `None` if the kernel did not send it
    #[must_use]
    #[inline]
    pub fn attr(&self, kind: u16) -> Option<&'a [u8]> {
        let Some(&word) = self.index.at.get(usize::from(kind)) else {
            return self.attrs().last(kind).map(|attr| attr.value);
        };
        if word == 0 {
            return None;
        }
        let attr = self.message.get(usize::from(word) * 4..)?;
        let len = NativeEndian::read_u16(attr.first_chunk::<2>()?);
        attr.get(ATTR_HEADER_LEN..usize::from(len))
    }

    /// All attributes in the order of the wire, unknown ones included; no item is an `Err`
    #[must_use]
    pub fn attrs(&self) -> Attrs<'a> {
        Attrs::new(self.message.get(ATTRS_OFFSET..).unwrap_or_default())
    }

    #[inline]
    fn fixed<const N: usize>(&self, kind: u16) -> Option<[u8; N]> {
        let word = *self
            .index
            .at
            .get(usize::from(kind))
            .filter(|&&word| word != 0)?;
        self.value_at(word)
    }

    #[inline]
    fn value_at<const N: usize>(&self, word: u16) -> Option<[u8; N]> {
        // As long as it has to be: `parse` has seen it.
        let value = self
            .message
            .get(usize::from(word) * 4 + ATTR_HEADER_LEN..)?;
        value.first_chunk().copied()
    }

    #[inline]
    fn be32(&self, kind: u16) -> Option<u32> {
        self.fixed::<4>(kind)
            .map(|value| BigEndian::read_u32(&value))
    }
}

impl core::fmt::Debug for Packet<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Packet")
            .field("key", &self.key())
            .field("family", &self.family())
            .field("hook", &self.hook())
            .field("mark", &self.mark())
            .field("payload_len", &self.payload().len())
            .finish_non_exhaustive()
    }
}

/// Finds the attributes of a packet message that is as nearly all are: whole, with a packet header and without a VLAN tag
///
/// Says whether it is; if not, what it has found is worth nothing.
#[inline]
fn index(message: &[u8], at: &mut [u16; NFQA_MAX as usize + 1]) -> bool {
    *at = [0; NFQA_MAX as usize + 1];
    let Some(header) = message.first_chunk::<ATTRS_OFFSET>() else {
        return false;
    };
    let is_packet = NativeEndian::read_u16(&header[4..]) == message_type(NFQNL_MSG_PACKET);
    if !is_packet || message.len() > MAX_MESSAGE_LEN {
        return false;
    }
    let mut offset = ATTRS_OFFSET;
    while let Some(rest) = message.get(offset..) {
        let Some(header) = rest.first_chunk::<ATTR_HEADER_LEN>() else {
            break;
        };
        let len = usize::from(NativeEndian::read_u16(header));
        let kind = usize::from(NativeEndian::read_u16(&header[2..]) & NLA_TYPE_MASK);
        let too_short = match (
            at.get_mut(kind),
            TOO_SHORT.get(kind),
            u16::try_from(offset / 4),
        ) {
            (Some(place), Some(too_short), Ok(word)) => {
                *place = word;
                *too_short
            }
            (None, None, _) => UNKNOWN_TOO_SHORT,
            _ => return false,
        };
        if len <= too_short || len > rest.len() {
            return false;
        }
        offset += align(len);
    }
    at[PACKET_HDR] != 0
}

/// The greatest `nla_len` that is too short for each attribute that has a getter; what has to be looked into is never long
/// enough
#[expect(clippy::indexing_slicing, reason = "by the compiler")]
const TOO_SHORT: [usize; NFQA_MAX as usize + 1] = {
    let mut table = [0; NFQA_MAX as usize + 1];
    let mut kind = 0;
    while kind <= NFQA_MAX {
        table[kind as usize] = match kind {
            NFQA_VLAN => usize::MAX,
            _ => UNKNOWN_TOO_SHORT + min_len(kind),
        };
        kind += 1;
    }
    table
};
const UNKNOWN_TOO_SHORT: usize = ATTR_HEADER_LEN - 1;

/// Checks the value of an attribute that has a getter
fn check(attr: Attr<'_>, needed: usize) -> Result<(), DecodeError> {
    let had = attr.value.len();
    let offset = attr.offset + ATTRS_OFFSET;
    if had < needed {
        return Err(DecodeError::AttributeShort {
            kind: attr.kind,
            within: None,
            offset,
            needed,
            had,
        });
    }
    if attr.kind == NFQA_VLAN {
        Vlan::parse(attr.value).map_err(|error| error.at(offset + ATTR_HEADER_LEN))?;
    }
    Ok(())
}

/// [`min_len`] of every attribute that has a getter
#[expect(clippy::indexing_slicing, reason = "by the compiler")]
const MIN_LEN: [usize; NFQA_MAX as usize + 1] = {
    let mut table = [0; NFQA_MAX as usize + 1];
    let mut kind = 0;
    while kind <= NFQA_MAX {
        table[kind as usize] = min_len(kind);
        kind += 1;
    }
    table
};

/// The least size of an attribute's value; more is allowed, as later kernels may add to it
const fn min_len(kind: u16) -> usize {
    match kind {
        NFQA_PACKET_HDR => PACKET_HDR_LEN,
        NFQA_TIMESTAMP => TIMESTAMP_LEN,
        NFQA_HWADDR => PACKET_HW_LEN,
        NFQA_MARK
        | NFQA_IFINDEX_INDEV
        | NFQA_IFINDEX_OUTDEV
        | NFQA_IFINDEX_PHYSINDEV
        | NFQA_IFINDEX_PHYSOUTDEV
        | NFQA_CT_INFO
        | NFQA_CAP_LEN
        | NFQA_SKB_INFO
        | NFQA_UID
        | NFQA_GID
        | NFQA_PRIORITY
        | NFQA_CGROUP_CLASSID => 4,
        _ => 0,
    }
}

/// A link-layer address: up to 8 bytes, 6 on Ethernet
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct HwAddr {
    bytes: [u8; Self::MAX_LEN],
    len: u8,
}

impl HwAddr {
    /// The room that the kernel has for an address
    pub const MAX_LEN: usize = 8;

    /// The address, as long as the kernel says it is, and never more than [`MAX_LEN`](Self::MAX_LEN)
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes
            .get(..usize::from(self.len))
            .unwrap_or(&self.bytes)
    }
}

impl core::fmt::Display for HwAddr {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        for (i, byte) in self.as_bytes().iter().enumerate() {
            let colon = if i == 0 { "" } else { ":" };
            write!(f, "{colon}{byte:02x}")?;
        }
        Ok(())
    }
}

impl core::fmt::Debug for HwAddr {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "HwAddr({self})")
    }
}

bitflags! {
    /// What the kernel says of a packet's checksums and segmentation; unknown bits are kept
    ///
    /// The bits of `NFQA_SKB_INFO`, `NFQA_SKB_*` in `linux/netfilter/nfnetlink_queue.h`. Linux 3.10.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct SkbInfo: u32 {
        /// The checksums in the payload are unfinished: complete them before sending the payload back
        #[doc(alias = "NFQA_SKB_CSUMNOTREADY")]
        const CSUM_NOT_READY = NFQA_SKB_CSUMNOTREADY;
        /// A large packet that will be segmented later; only with [`ConfigFlags::GSO`](crate::ConfigFlags::GSO)
        #[doc(alias = "NFQA_SKB_GSO")]
        const GSO = NFQA_SKB_GSO;
        /// Nobody has verified the checksums yet. Linux 3.11
        #[doc(alias = "NFQA_SKB_CSUM_NOTVERIFIED")]
        const CSUM_NOT_VERIFIED = NFQA_SKB_CSUM_NOTVERIFIED;
        const _ = !0;
    }
}
