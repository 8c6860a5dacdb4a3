//! A view over the message of a packet that waits for a verdict
//!
//! [`Packet::parse`] checks the message once and records the offset of each attribute. After that
//! no getter can fail.
//!
//! # Adding an attribute
//! 1. Add its number to [`consts`](crate::consts), and raise [`NFQA_MAX`] to it.
//! 2. Add its minimum size to [`min_len`].
//! 3. Add a getter to [`Packet`], and raise the size that is asserted there.
//! 4. Add it to the tests, in `proto/tests/common/mod.rs`.
//!
//! Until then [`Packet::attr`] finds it by number.

use core::time::Duration;

use bitflags::bitflags;
use byteorder::{BigEndian, ByteOrder, NativeEndian};

use crate::attr::{Attr, Attrs};
use crate::conntrack::{Conntrack, CtState};
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
use crate::flow::FlowKey;
use crate::types::{EtherType, Family, Hook};
use crate::vlan::Vlan;

/// The longest message in which 16 bits can hold every offset, counted in 4-byte words
const MAX_MESSAGE_LEN: usize = (u16::MAX as usize + 1) * 4;

/// The place of the only mandatory attribute in [`Packet::at`]
const PACKET_HDR: usize = NFQA_PACKET_HDR as usize;

/// The address of a verdict: names a waiting packet, at any later time and from any thread
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PacketKey {
    queue: u16,
    // Not on the wire. Packet ids restart at 1 when a queue is bound again, so a receiver that
    // counts bindings stores the number of the binding here.
    binding: u16,
    id: u32,
}

const _: () = assert!(size_of::<PacketKey>() == 8, "passed in one register");

impl PacketKey {
    /// The key of packet `id` in `queue`, for requests that are encoded by hand
    ///
    /// A `Socket` of `nfqnl` refuses it: `Queue::key` makes keys for a socket.
    #[must_use]
    #[inline]
    pub const fn new(queue: u16, id: u32) -> Self {
        Self {
            queue,
            binding: 0,
            id,
        }
    }

    /// The number of the queue
    #[must_use]
    #[inline]
    pub const fn queue(self) -> u16 {
        self.queue
    }

    /// The packet's id
    ///
    /// The kernel counts from 1 for each binding of a queue, and wraps at 32 bits.
    #[must_use]
    #[inline]
    pub const fn id(self) -> u32 {
        self.id
    }

    /// The number of the queue's binding, or 0
    #[doc(hidden)]
    #[must_use]
    #[inline]
    pub const fn binding(self) -> u16 {
        self.binding
    }

    /// The same key for another binding of the queue
    #[doc(hidden)]
    #[must_use]
    #[inline]
    pub const fn with_binding(mut self, binding: u16) -> Self {
        self.binding = binding;
        self
    }

    /// The key of another packet of the same binding
    #[doc(hidden)]
    #[must_use]
    #[inline]
    pub const fn with_id(mut self, id: u32) -> Self {
        self.id = id;
        self
    }

    /// Finds the key in the first bytes of a packet message, even of a truncated one
    ///
    /// If a message did not fit the receive buffer, the packet still waits in the kernel; use this
    /// key to answer it. `None` if `message` is not a packet message, or if it ends before its
    /// packet header.
    #[must_use]
    #[inline]
    pub fn peek(message: &[u8]) -> Option<Self> {
        const ID_END: usize = ATTRS_OFFSET + ATTR_HEADER_LEN + 4;
        let start = message.first_chunk::<ID_END>()?;
        if NativeEndian::read_u16(&start[4..]) != message_type(NFQNL_MSG_PACKET) {
            return None;
        }
        // The kernel writes the packet header first.
        let len = usize::from(NativeEndian::read_u16(&start[ATTRS_OFFSET..]));
        let is_first = NativeEndian::read_u16(&start[ATTRS_OFFSET + 2..]) == NFQA_PACKET_HDR;
        let id = match is_first && len >= 8 && len <= message.len() - ATTRS_OFFSET {
            true => BigEndian::read_u32(&start[ID_END - 4..]),
            false => find_id(message)?,
        };
        Some(Self::new(BigEndian::read_u16(&start[18..]), id))
    }
}

/// Finds the packet's id anywhere in the attributes
#[cold]
fn find_id(message: &[u8]) -> Option<u32> {
    let header = Attrs::new(message.get(ATTRS_OFFSET..)?)
        .map_while(Result::ok)
        .find(|a| a.kind == NFQA_PACKET_HDR)?;
    let id = header.value.first_chunk::<4>();
    id.map(|id| BigEndian::read_u32(id))
}

/// A packet that the kernel holds until it receives a verdict (`NFQNL_MSG_PACKET`)
///
/// The view is small and `Copy`. Its slices borrow the buffer, not the view.
#[derive(Clone, Copy)]
pub struct Packet<'a> {
    /// The whole message, netlink header included
    message: &'a [u8],
    /// The offset of each attribute's header in the message, in 4-byte words; 0 if absent
    at: [u16; NFQA_MAX as usize + 1],
    /// The number of the queue's binding, or 0
    binding: u16,
}

const _: () = assert!(
    size_of::<Packet<'static>>() <= 64,
    "one cache line, which is full: a new attribute makes it 72 bytes"
);

impl<'a> Packet<'a> {
    /// Checks a whole message, netlink header included
    ///
    /// If an attribute comes twice, the last one counts, as in the kernel. [`attr`](Self::attr)
    /// finds attributes of unknown number.
    ///
    /// # Errors
    /// The message is not a packet message, a length is broken, an attribute is shorter than its
    /// type, or the packet header is missing.
    #[inline]
    pub fn parse(message: &'a [u8]) -> Result<Self, DecodeError> {
        // `index` writes into the returned value. A copy of the index, right after these 16-bit
        // stores, would have to wait for them (a store forwarding stall).
        let mut parsed = Ok(Self::unindexed(message));
        if let Ok(packet) = &mut parsed {
            if packet.index() {
                return parsed;
            }
        }
        Self::parse_carefully(message)
    }

    /// A view without attributes, which [`index`](Self::index) completes
    #[doc(hidden)]
    #[inline]
    pub const fn unindexed(message: &'a [u8]) -> Self {
        Self {
            message,
            at: [0; NFQA_MAX as usize + 1],
            binding: 0,
        }
    }

    /// Records the offsets of the attributes; returns false if the message is broken or has a VLAN
    /// tag
    ///
    /// The caller must then use [`parse_carefully`](Self::parse_carefully) instead.
    #[doc(hidden)]
    #[inline]
    pub fn index(&mut self) -> bool {
        let Some(header) = self.message.first_chunk::<ATTRS_OFFSET>() else {
            return false;
        };
        let is_packet = NativeEndian::read_u16(&header[4..]) == message_type(NFQNL_MSG_PACKET);
        if !is_packet || self.message.len() > MAX_MESSAGE_LEN {
            return false;
        }
        let mut offset = ATTRS_OFFSET;
        while let Some(rest) = self.message.get(offset..) {
            let Some(header) = rest.first_chunk::<ATTR_HEADER_LEN>() else {
                break;
            };
            let len = usize::from(NativeEndian::read_u16(header));
            let kind = usize::from(NativeEndian::read_u16(&header[2..]) & NLA_TYPE_MASK);
            let too_short = match (
                self.at.get_mut(kind),
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
        self.at[PACKET_HDR] != 0
    }

    /// Does the same as [`parse`](Self::parse) for any message, and finds the error
    #[doc(hidden)]
    #[cold]
    pub fn parse_carefully(message: &'a [u8]) -> Result<Self, DecodeError> {
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

        let mut packet = Self::unindexed(message);
        for attr in Attrs::new(attrs) {
            let attr = match attr {
                Ok(attr) => attr,
                Err(error) => return Err(error.at(ATTRS_OFFSET)),
            };
            let kind = usize::from(attr.kind);
            if let Some(place) = packet.at.get_mut(kind) {
                check(attr)?;
                *place = u16::try_from((attr.offset + ATTRS_OFFSET) / 4).unwrap_or_default();
            }
        }
        if packet.at[PACKET_HDR] == 0 {
            return Err(DecodeError::MissingAttribute {
                kind: NFQA_PACKET_HDR,
                within: None,
                offset: 0,
            });
        }
        Ok(packet)
    }

    /// The same packet with the number of the queue's binding in its key
    #[doc(hidden)]
    #[must_use]
    #[inline]
    pub const fn with_binding(mut self, binding: u16) -> Self {
        self.binding = binding;
        self
    }

    /// The address of a verdict on this packet
    #[must_use]
    #[inline]
    pub fn key(&self) -> PacketKey {
        PacketKey {
            queue: self.queue(),
            binding: self.binding,
            id: self.id(),
        }
    }

    /// The same packet over a copy of its bytes ([`as_bytes`](Self::as_bytes))
    ///
    /// Over other bytes the getters return what they find there; they do not fail.
    #[doc(hidden)]
    #[must_use]
    #[inline]
    pub const fn over(self, message: &[u8]) -> Packet<'_> {
        Packet {
            message,
            at: self.at,
            binding: self.binding,
        }
    }

    /// The whole message as received, netlink header included
    #[must_use]
    pub const fn as_bytes(&self) -> &'a [u8] {
        self.message
    }

    /// The protocol family of the hook that queued the packet: IPv4, IPv6, bridge, or any number
    ///
    /// Always present (`nfgen_family` of `struct nfgenmsg`).
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
    /// Always present (`res_id` of `struct nfgenmsg`).
    #[must_use]
    #[doc(alias = "res_id")]
    #[inline]
    pub fn queue(&self) -> u16 {
        self.message
            .get(MESSAGE_HEADER_LEN + 2..)
            .and_then(<[u8]>::first_chunk::<2>)
            .map_or(0, |b| BigEndian::read_u16(b))
    }

    /// The packet's id
    ///
    /// The kernel counts from 1 for each binding of a queue, and wraps at 32 bits. Always present
    /// (`packet_id` of `struct nfqnl_msg_packet_hdr`).
    #[must_use]
    #[doc(alias = "NFQA_PACKET_HDR")]
    #[doc(alias = "packet_id")]
    #[doc(alias = "nfq_get_msg_packet_hdr")]
    #[inline]
    pub fn id(&self) -> u32 {
        BigEndian::read_u32(&self.header()[..4])
    }

    /// The EtherType of the packet: IPv4, IPv6, or ARP on a bridge
    ///
    /// Its number is in host byte order, while a C program must convert the field (`hw_protocol`
    /// of `struct nfqnl_msg_packet_hdr`). Always present.
    #[must_use]
    #[doc(alias = "NFQA_PACKET_HDR")]
    #[doc(alias = "nfq_get_msg_packet_hdr")]
    #[inline]
    pub fn hw_protocol(&self) -> EtherType {
        EtherType(BigEndian::read_u16(&self.header()[4..6]))
    }

    /// The netfilter hook that queued the packet
    ///
    /// Always present (`hook` of `struct nfqnl_msg_packet_hdr`).
    #[must_use]
    #[doc(alias = "NFQA_PACKET_HDR")]
    #[doc(alias = "nfq_get_msg_packet_hdr")]
    #[inline]
    pub fn hook(&self) -> Hook {
        Hook(self.header()[6])
    }

    /// `struct nfqnl_msg_packet_hdr`, which `parse` has checked
    #[inline]
    fn header(&self) -> [u8; PACKET_HDR_LEN] {
        let word = self.at[PACKET_HDR];
        self.value_at(word).unwrap_or_default()
    }

    /// The packet mark (`skb->mark`); 0 if the packet has none
    #[must_use]
    #[doc(alias = "NFQA_MARK")]
    #[doc(alias = "nfmark")]
    #[doc(alias = "nfq_get_nfmark")]
    #[inline]
    pub fn mark(&self) -> u32 {
        self.be32(NFQA_MARK).unwrap_or(0)
    }

    /// The packet's priority (`skb->priority`); 0 if the packet has none
    ///
    /// Since Linux 5.18.
    #[must_use]
    #[doc(alias = "NFQA_PRIORITY")]
    pub fn priority(&self) -> u32 {
        self.be32(NFQA_PRIORITY).unwrap_or(0)
    }

    /// The time of reception since the Unix epoch, in microseconds
    ///
    /// `None` unless a socket on the machine had asked for timestamps when the packet was received
    /// (`SO_TIMESTAMP`, a running capture). `None` at OUTPUT and POSTROUTING.
    #[must_use]
    #[doc(alias = "NFQA_TIMESTAMP")]
    #[doc(alias = "nfq_get_timestamp")]
    pub fn timestamp(&self) -> Option<Duration> {
        let value: [u8; TIMESTAMP_LEN] = self.fixed(NFQA_TIMESTAMP)?;
        let seconds = Duration::from_secs(BigEndian::read_u64(&value[..8]));
        Some(seconds.saturating_add(Duration::from_micros(BigEndian::read_u64(&value[8..]))))
    }

    /// The time of reception
    ///
    /// The same as [`timestamp`](Self::timestamp), for comparison with
    /// [`SystemTime::now`](std::time::SystemTime::now).
    #[cfg(feature = "std")]
    #[must_use]
    #[doc(alias = "NFQA_TIMESTAMP")]
    pub fn time(&self) -> Option<std::time::SystemTime> {
        std::time::UNIX_EPOCH.checked_add(self.timestamp()?)
    }

    /// The index of the input device; for a bridged packet, of the bridge
    ///
    /// `None` for packets of local origin, and at POSTROUTING before Linux 5.7.
    #[must_use]
    #[doc(alias = "NFQA_IFINDEX_INDEV")]
    #[doc(alias = "nfq_get_indev")]
    #[inline]
    pub fn indev(&self) -> Option<u32> {
        self.be32(NFQA_IFINDEX_INDEV)
    }

    /// The index of the output device; for a bridged packet, of the bridge
    ///
    /// `None` at PREROUTING and INPUT.
    #[must_use]
    #[doc(alias = "NFQA_IFINDEX_OUTDEV")]
    #[doc(alias = "nfq_get_outdev")]
    #[inline]
    pub fn outdev(&self) -> Option<u32> {
        self.be32(NFQA_IFINDEX_OUTDEV)
    }

    /// The index of the bridge port on which the packet arrived
    ///
    /// `None` if the packet did not arrive over a bridge, or if the kernel lacks
    /// `CONFIG_BRIDGE_NETFILTER`.
    #[must_use]
    #[doc(alias = "NFQA_IFINDEX_PHYSINDEV")]
    #[doc(alias = "nfq_get_physindev")]
    pub fn physindev(&self) -> Option<u32> {
        self.be32(NFQA_IFINDEX_PHYSINDEV)
    }

    /// The index of the bridge port on which the packet will leave
    ///
    /// `None` until the port is known, and where [`physindev`](Self::physindev) is `None`.
    #[must_use]
    #[doc(alias = "NFQA_IFINDEX_PHYSOUTDEV")]
    #[doc(alias = "nfq_get_physoutdev")]
    pub fn physoutdev(&self) -> Option<u32> {
        self.be32(NFQA_IFINDEX_PHYSOUTDEV)
    }

    /// The link-layer address of the packet's *source*
    ///
    /// `None` for packets of local origin, and if the link layer has no addresses.
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

    /// The user id of the owner of the packet's socket, as the initial user namespace numbers it
    ///
    /// At OUTPUT and POSTROUTING the packet's socket is the sender's. At INPUT it is the connected
    /// socket that will receive the packet, if the kernel has looked it up early
    /// (`net.ipv4.ip_early_demux`); not for packets over loopback. At PREROUTING and FORWARD
    /// packets have no socket. The owner is the process that opened the socket, even if another
    /// process uses it now. (Seen on Linux 6.18 with UDP.)
    ///
    /// `None` for packets without a socket, for packets made by the kernel itself, and without
    /// [`ConfigFlags::UID_GID`](crate::ConfigFlags::UID_GID). Since Linux 3.14.
    #[must_use]
    #[doc(alias = "NFQA_UID")]
    #[doc(alias = "nfq_get_uid")]
    pub fn uid(&self) -> Option<u32> {
        self.be32(NFQA_UID)
    }

    /// The group id of the owner of the packet's socket
    ///
    /// The documentation of [`uid`](Self::uid) applies. Since Linux 3.14.
    #[must_use]
    #[doc(alias = "NFQA_GID")]
    #[doc(alias = "nfq_get_gid")]
    pub fn gid(&self) -> Option<u32> {
        self.be32(NFQA_GID)
    }

    /// The security context of the packet, as bytes; a NUL at the end is common but not guaranteed
    ///
    /// `None` for packets without a security mark (`skb->secmark`), and without
    /// [`ConfigFlags::SECCTX`](crate::ConfigFlags::SECCTX). Since Linux 4.3.
    #[must_use]
    #[doc(alias = "NFQA_SECCTX")]
    #[doc(alias = "nfq_get_secctx")]
    pub fn security_context(&self) -> Option<&'a [u8]> {
        self.attr(NFQA_SECCTX)
    }

    /// The VLAN tag, with both halves in host byte order
    ///
    /// `None` outside the bridge family, and for untagged frames. Since Linux 4.7.
    #[must_use]
    #[doc(alias = "NFQA_VLAN")]
    pub fn vlan(&self) -> Option<Vlan> {
        self.attr(NFQA_VLAN)
            .and_then(|nested| Vlan::parse(nested).ok())
    }

    /// The link-layer header in wire format, without a VLAN tag
    ///
    /// `None` outside the bridge family. Since Linux 4.7.
    #[must_use]
    #[doc(alias = "NFQA_L2HDR")]
    pub fn l2_header(&self) -> Option<&'a [u8]> {
        self.attr(NFQA_L2HDR)
    }

    /// The conntrack entry of the packet's connection
    ///
    /// `None` for untracked packets, and without
    /// [`ConfigFlags::CONNTRACK`](crate::ConfigFlags::CONNTRACK). The kernel tracks connections
    /// only if a rule needs it: see
    /// [`Decision::with_ct_mark`](crate::Decision::with_ct_mark). Since Linux 3.6.
    #[must_use]
    #[doc(alias = "NFQA_CT")]
    #[inline]
    pub fn conntrack(&self) -> Option<Conntrack<'a>> {
        self.attr(NFQA_CT).map(Conntrack::new)
    }

    /// The packet's relation to its conntrack entry: new, established, related; its direction
    ///
    /// `None` where [`conntrack`](Self::conntrack) is `None`. Since Linux 3.6.
    #[must_use]
    #[doc(alias = "NFQA_CT_INFO")]
    #[doc(alias = "ip_conntrack_info")]
    #[inline]
    pub fn ct_state(&self) -> Option<CtState> {
        self.be32(NFQA_CT_INFO).map(CtState)
    }

    /// The packet's addresses, protocol and ports, read from its payload
    ///
    /// `None` if the payload is not IPv4 or IPv6, or ends before the ports. A copy range of 128
    /// bytes has them for packets without long extension headers.
    #[must_use]
    #[inline]
    pub fn flow(&self) -> Option<FlowKey> {
        let is_ip = self.family() != Family::BRIDGE
            || matches!(self.hw_protocol(), EtherType::IPV4 | EtherType::IPV6);
        is_ip.then(|| FlowKey::parse(self.payload()))?
    }

    /// A conntrack expectation: nested `CTA_EXPECT_*` attributes
    ///
    /// Verdicts may have this attribute since Linux 3.12. Linux 6.18 does not send it with
    /// packets, so this is `None`.
    #[must_use]
    #[doc(alias = "NFQA_EXP")]
    pub fn expectation(&self) -> Option<&'a [u8]> {
        self.attr(NFQA_EXP)
    }

    /// The net_cls class id of the cgroup (version 1) of the packet's socket
    ///
    /// `None` if it is 0. Since Linux 6.4.
    #[must_use]
    #[doc(alias = "NFQA_CGROUP_CLASSID")]
    pub fn cgroup_classid(&self) -> Option<u32> {
        self.be32(NFQA_CGROUP_CLASSID)
    }

    /// The packet's original length in bytes, counted from its network header
    ///
    /// `None` if the kernel copied only attributes. Kernels before Linux 3.7 do not report
    /// truncation, so there this is the length of the payload.
    #[must_use]
    #[doc(alias = "NFQA_CAP_LEN")]
    #[doc(alias = "cap_len")]
    #[inline]
    #[expect(clippy::len_without_is_empty, reason = "a packet is never empty")]
    pub fn len(&self) -> Option<usize> {
        match self.be32(NFQA_CAP_LEN) {
            Some(len) => Some(usize::try_from(len).unwrap_or(usize::MAX)),
            None => self.attr(NFQA_PAYLOAD).map(<[u8]>::len),
        }
    }

    /// Returns true if the payload is only the beginning of the packet
    ///
    /// To send such a payload back would shorten the packet. Kernels before Linux 3.7 do not
    /// report truncation.
    #[must_use]
    #[doc(alias = "NFQA_CAP_LEN")]
    #[inline]
    pub fn is_truncated(&self) -> bool {
        self.be32(NFQA_CAP_LEN).is_some()
    }

    /// The state of checksums and segmentation; empty if the kernel sent none
    ///
    /// Since Linux 3.10.
    #[must_use]
    #[doc(alias = "NFQA_SKB_INFO")]
    #[doc(alias = "nfq_get_skbinfo")]
    #[doc(alias = "skbinfo")]
    #[inline]
    pub fn skb_info(&self) -> SkbInfo {
        SkbInfo::from_bits_retain(self.be32(NFQA_SKB_INFO).unwrap_or(0))
    }

    /// The bytes of the packet, from its network header on
    ///
    /// Its length is at most the queue's copy range, and at most
    /// [`MAX_PAYLOAD`](crate::consts::MAX_PAYLOAD). Empty if the copy mode is not
    /// [`CopyMode::Packet`](crate::CopyMode::Packet).
    #[must_use]
    #[doc(alias = "NFQA_PAYLOAD")]
    #[doc(alias = "nfq_get_payload")]
    #[inline]
    pub fn payload(&self) -> &'a [u8] {
        self.attr(NFQA_PAYLOAD).unwrap_or_default()
    }

    /// The value of any attribute by number, without padding
    ///
    /// `None` if the kernel did not send the attribute.
    #[must_use]
    #[inline]
    pub fn attr(&self, kind: u16) -> Option<&'a [u8]> {
        let Some(&word) = self.at.get(usize::from(kind)) else {
            return self.attrs().last(kind).map(|attr| attr.value);
        };
        if word == 0 {
            return None;
        }
        let attr = self.message.get(usize::from(word) * 4..)?;
        let len = NativeEndian::read_u16(attr.first_chunk::<2>()?);
        attr.get(ATTR_HEADER_LEN..usize::from(len))
    }

    /// All attributes in wire order, including unknown ones; every item is `Ok`
    #[must_use]
    pub fn attrs(&self) -> Attrs<'a> {
        Attrs::new(self.message.get(ATTRS_OFFSET..).unwrap_or_default())
    }

    #[inline]
    fn fixed<const N: usize>(&self, kind: u16) -> Option<[u8; N]> {
        let word = *self.at.get(usize::from(kind)).filter(|&&word| word != 0)?;
        self.value_at(word)
    }

    #[inline]
    fn value_at<const N: usize>(&self, word: u16) -> Option<[u8; N]> {
        // `parse` has checked the length.
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

/// The largest `nla_len` that is still too short, for each attribute that has a getter
///
/// A VLAN tag is nested, so `usize::MAX` leaves it to [`Packet::parse_carefully`].
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

/// The same for an attribute of unknown number
const UNKNOWN_TOO_SHORT: usize = ATTR_HEADER_LEN - 1;

/// Checks the value of an attribute that has a getter
fn check(attr: Attr<'_>) -> Result<(), DecodeError> {
    let (had, needed) = (attr.value.len(), min_len(attr.kind));
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

/// The minimum size of an attribute's value; a later kernel may send a longer one
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
    /// The size of the kernel's field
    pub const MAX_LEN: usize = 8;

    /// The address: as many bytes as the kernel reports, at most [`MAX_LEN`](Self::MAX_LEN)
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
    /// The state of a packet's checksums and segmentation; unknown bits are kept
    ///
    /// The bits of `NFQA_SKB_INFO`: `NFQA_SKB_*` in `linux/netfilter/nfnetlink_queue.h`. Since
    /// Linux 3.10.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct SkbInfo: u32 {
        /// The checksums in the payload are incomplete: complete them before you send it back
        #[doc(alias = "NFQA_SKB_CSUMNOTREADY")]
        const CSUM_NOT_READY = NFQA_SKB_CSUMNOTREADY;
        /// A large packet, to be segmented later; only with
        /// [`ConfigFlags::GSO`](crate::ConfigFlags::GSO)
        #[doc(alias = "NFQA_SKB_GSO")]
        const GSO = NFQA_SKB_GSO;
        /// The checksums have not been verified yet. Since Linux 3.11.
        #[doc(alias = "NFQA_SKB_CSUM_NOTVERIFIED")]
        const CSUM_NOT_VERIFIED = NFQA_SKB_CSUM_NOTVERIFIED;
        const _ = !0;
    }
}
