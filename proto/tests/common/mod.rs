//! Builders of messages, independent of the crate's encoders

#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(unused_macros, unused_imports, reason = "as above")]

use nfqnl_proto::consts::*;
use nfqnl_proto::{Family, Packet};
use proptest::test_runner::{Config, FileFailurePersistence};

/// A field of a message: integers in host byte order, as in netlink's own headers, or bytes
pub(crate) trait Field {
    fn put(&self, out: &mut Vec<u8>);
}

impl Field for u16 {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend(self.to_ne_bytes());
    }
}

impl Field for u32 {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend(self.to_ne_bytes());
    }
}

impl Field for i32 {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend(self.to_ne_bytes());
    }
}

impl<const N: usize> Field for [u8; N] {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend(self);
    }
}

impl Field for [u8] {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend(self);
    }
}

impl Field for Vec<u8> {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend(self);
    }
}

impl<F: Field + ?Sized> Field for &F {
    fn put(&self, out: &mut Vec<u8>) {
        (*self).put(out);
    }
}

/// Concatenates fields: `wire![20u32, 0x0302u16, [0, 0, 0, 7]]`
macro_rules! wire {
    ($($field:expr),* $(,)?) => {{
        let mut out = Vec::new();
        $($crate::common::Field::put(&$field, &mut out);)*
        out
    }};
}
pub(crate) use wire;

/// Appends fields to a message; `build` writes its length
pub(crate) struct MessageBuilder(Vec<u8>);

impl MessageBuilder {
    /// A netlink header as in the kernel's packet messages, with sequence number and port id 0
    pub(crate) fn new(kind: u16, flags: u16) -> Self {
        Self(wire![0u32, kind, flags, 0u32, 0u32])
    }

    /// A packet message without attributes
    pub(crate) fn packet(family: Family, queue: u16) -> Self {
        Self::new(message_type(NFQNL_MSG_PACKET), 0)
            .field([family.0, 0])
            .field(queue.to_be_bytes())
    }

    /// `NLMSG_ERROR` with the repeated request, or its header, in `echo`
    pub(crate) fn error(flags: u16, code: i32, echo: &[u8]) -> Self {
        Self::new(NLMSG_ERROR, flags).field(code).field(echo)
    }

    pub(crate) fn field(mut self, field: impl Field) -> Self {
        field.put(&mut self.0);
        self
    }

    /// Appends padding for the previous attribute, and an attribute
    pub(crate) fn attr(mut self, kind: u16, value: impl AsRef<[u8]>) -> Self {
        pad(&mut self.0);
        self.field(attr(kind, value.as_ref()))
    }

    pub(crate) fn attrs<V: AsRef<[u8]>>(self, attrs: impl IntoIterator<Item = (u16, V)>) -> Self {
        attrs
            .into_iter()
            .fold(self, |message, (kind, value)| message.attr(kind, value))
    }

    /// The offset of the next attribute
    pub(crate) fn offset(&self) -> usize {
        padded(self.0.len())
    }

    pub(crate) fn build(mut self) -> Vec<u8> {
        let len = u32::try_from(self.0.len()).expect("a test's message is short");
        self.0.splice(..size_of_val(&len), len.to_ne_bytes());
        self.0
    }
}

/// An attribute without padding
pub(crate) fn attr(kind: u16, value: &[u8]) -> Vec<u8> {
    let header = size_of_val(&kind) * 2;
    let len = u16::try_from(header + value.len()).expect("a test's attribute is short");
    wire![len, kind, value]
}

/// Puts messages into one datagram, with padding between them
pub(crate) fn datagram<M: AsRef<[u8]>>(messages: impl IntoIterator<Item = M>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for message in messages {
        pad(&mut bytes);
        bytes.extend(message.as_ref());
    }
    bytes
}

pub(crate) fn padded(len: usize) -> usize {
    len.next_multiple_of(4)
}

pub(crate) fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(padded(bytes.len()), 0);
}

/// The header of `request`, which every error and acknowledgement repeats
pub(crate) fn echo(request: &[u8]) -> &[u8] {
    &request[..MESSAGE_HEADER_LEN]
}

/// A be32 attribute: its number, its getter, and the value returned if it is absent
pub(crate) struct Be32 {
    pub(crate) kind: u16,
    pub(crate) get: fn(&Packet<'_>) -> Option<u32>,
    pub(crate) absent: Option<u32>,
}

/// Every be32 attribute of a packet
pub(crate) const BE32: [Be32; 12] = {
    const fn optional(kind: u16, get: fn(&Packet<'_>) -> Option<u32>) -> Be32 {
        Be32 {
            kind,
            get,
            absent: None,
        }
    }
    const fn zero(kind: u16, get: fn(&Packet<'_>) -> Option<u32>) -> Be32 {
        Be32 {
            kind,
            get,
            absent: Some(0),
        }
    }
    [
        zero(NFQA_MARK, |p| Some(p.mark())),
        zero(NFQA_PRIORITY, |p| Some(p.priority())),
        zero(NFQA_SKB_INFO, |p| Some(p.skb_info().bits())),
        optional(NFQA_IFINDEX_INDEV, |p| p.indev()),
        optional(NFQA_IFINDEX_OUTDEV, |p| p.outdev()),
        optional(NFQA_IFINDEX_PHYSINDEV, |p| p.physindev()),
        optional(NFQA_IFINDEX_PHYSOUTDEV, |p| p.physoutdev()),
        optional(NFQA_CT_INFO, |p| p.ct_state().map(|state| state.0)),
        optional(NFQA_CAP_LEN, |p| {
            let len = p.is_truncated().then(|| p.len()).flatten()?;
            u32::try_from(len).ok()
        }),
        optional(NFQA_UID, |p| p.uid()),
        optional(NFQA_GID, |p| p.gid()),
        optional(NFQA_CGROUP_CLASSID, |p| p.cgroup_classid()),
    ]
};

/// Every attribute of fixed size, and that size
pub(crate) fn fixed_sizes() -> impl Iterator<Item = (u16, usize)> {
    let structs = [
        (NFQA_PACKET_HDR, PACKET_HDR_LEN),
        (NFQA_TIMESTAMP, TIMESTAMP_LEN),
        (NFQA_HWADDR, PACKET_HW_LEN),
    ];
    BE32.map(|be32| (be32.kind, size_of::<u32>()))
        .into_iter()
        .chain(structs)
}

pub(crate) const QUEUE: u16 = 7;
pub(crate) const ID: u32 = 0x0102_0304;
/// `struct nfqnl_msg_packet_hdr` of packet [`ID`]: IPv4, at the OUTPUT hook
pub(crate) const PACKET_HDR: [u8; PACKET_HDR_LEN] = [1, 2, 3, 4, 8, 0, 3];

/// A packet message with its header attribute and no other
pub(crate) fn packet() -> MessageBuilder {
    MessageBuilder::packet(Family::INET, QUEUE).attr(NFQA_PACKET_HDR, PACKET_HDR)
}

/// A packet message with all attributes, most of them in the kernel's order
pub(crate) fn full_packet() -> Vec<u8> {
    let vlan = datagram([
        attr(NFQA_VLAN_TCI, &[0xa1, 0x23]),
        wire![attr(NFQA_VLAN_PROTO, &[0x81, 0]), [0; 2]],
    ]);
    MessageBuilder::packet(Family::BRIDGE, QUEUE)
        .attr(NFQA_PACKET_HDR, PACKET_HDR)
        .attr(NFQA_IFINDEX_INDEV, [0, 0, 0, 5])
        .attr(NFQA_IFINDEX_PHYSINDEV, [0, 0, 0, 7])
        .attr(NFQA_IFINDEX_OUTDEV, [0, 0, 0, 6])
        .attr(NFQA_IFINDEX_PHYSOUTDEV, [0, 0, 0, 8])
        .attr(NFQA_MARK, [0xf0, 0, 0, 3])
        .attr(NFQA_PRIORITY, [0, 0, 0, 21])
        .attr(NFQA_HWADDR, [0, 6, 0, 0, 1, 2, 3, 4, 5, 6, 0, 0])
        .attr(NFQA_VLAN | NLA_F_NESTED, vlan)
        .attr(NFQA_L2HDR, b"l2 header")
        .attr(
            NFQA_TIMESTAMP,
            [0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3],
        )
        .attr(NFQA_UID, [0, 0, 3, 0xe8])
        .attr(NFQA_GID, [0, 0, 3, 0xe9])
        .attr(NFQA_CGROUP_CLASSID, [0, 0x10, 0, 1])
        .attr(NFQA_SECCTX, b"context\0")
        .attr(NFQA_CT | NLA_F_NESTED, b"conntrack")
        .attr(NFQA_CT_INFO, [0, 0, 0, 2])
        .attr(NFQA_CAP_LEN, [0, 0, 0xff, 0xff])
        .attr(NFQA_SKB_INFO, [0, 0, 0, 0x83])
        .attr(NFQA_EXP | NLA_F_NESTED, b"expectation")
        .attr(NFQA_VERDICT_HDR, b"verdict header") // never sent with a packet
        .attr(NFQA_PAYLOAD, b"payload")
        .build()
}

/// Splits valid `bytes` into attributes: type with flags, and value
pub(crate) fn walk(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut attrs = Vec::new();
    while let [len0, len1, kind0, kind1, rest @ ..] = bytes {
        let len = usize::from(u16::from_ne_bytes([*len0, *len1])) - ATTR_HEADER_LEN;
        attrs.push((u16::from_ne_bytes([*kind0, *kind1]), &rest[..len]));
        bytes = rest.get(padded(len)..).unwrap_or_default();
    }
    attrs
}

/// The configuration of property tests, which saves failed cases beside the test
pub(crate) fn config() -> Config {
    Config {
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..Config::default()
    }
}
