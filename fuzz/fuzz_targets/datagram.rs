//! Any bytes as a datagram: compares every parser with a plain reading of the same bytes
//!
//! The plain reading below uses only the types of the crate. Its numbers and sizes are copied from
//! the kernel's headers.
#![no_main]

use std::fmt::{self, Write};
use std::ops::Range;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use nfqnl_proto::{
    Attr, Attrs, DecodeError, Header, Message, Messages, Packet, PacketKey, Reply, Vlan,
};

const PACKET: u16 = 0x0300;
const PACKET_HDR: u16 = 1;
const VLAN: u16 = 19;
/// `NFQA_CGROUP_CLASSID`
const LAST_KNOWN: u16 = 22;

fuzz_target!(|datagram: &[u8]| {
    // A copy of exactly this size: the sanitizer then finds reads behind the end.
    let datagram = Box::<[u8]>::from(datagram);
    check_datagram(&datagram);
    // The same bytes as a message of each kind with a body, even if the header has another type.
    check_parse(&datagram);
    check_attrs(&datagram, 6);
    check_vlan(&datagram);
    // Only for a few inputs, because it is slow.
    if let [attrs @ .., around, 0xa5] = &*datagram {
        check_long(attrs, *around);
    }
});

/// Checks these attributes at the end of a message of about the maximum length
fn check_long(attrs: &[u8], around: u8) {
    const MAX: usize = 256 << 10;
    let header = [&PACKET.to_ne_bytes()[..], &[0; 10], &[2, 0, 0, 7]].concat();
    let packet_hdr = [
        &11_u16.to_ne_bytes()[..],
        &PACKET_HDR.to_ne_bytes(),
        &[0; 8],
    ]
    .concat();
    let mut message = [&[0; 4][..], &header, &packet_hdr].concat();
    let len = (MAX + usize::from(around % 32)).saturating_sub(16 + attrs.len());
    while message.len() + 4 <= len {
        let filler = (len - message.len()).min(0xfffc) / 4 * 4;
        let filler_len = u16::try_from(filler).expect("at most that");
        let (begin, kind) = (message.len(), LAST_KNOWN + 1);
        message.resize(begin + filler, 0);
        message[begin..begin + 2].copy_from_slice(&filler_len.to_ne_bytes());
        message[begin + 2..begin + 4].copy_from_slice(&kind.to_ne_bytes());
    }
    message.extend(attrs);
    check_parse(&message);
}

/// Discards text
struct Nowhere;

impl Write for Nowhere {
    fn write_str(&mut self, _: &str) -> fmt::Result {
        Ok(())
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn be(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |n, &byte| n << 8 | u64::from(byte))
}

fn be32(bytes: &[u8]) -> u32 {
    be(&bytes[..4]) as u32
}

fn padded(len: usize) -> usize {
    len.div_ceil(4) * 4
}

/// Fails unless a slice is this part of the bytes, not a copy
#[track_caller]
fn assert_is(slice: &[u8], whole: &[u8], part: Range<usize>) {
    let expected = &whole[part];
    assert_eq!(slice.len(), expected.len());
    assert!(slice.is_empty() || std::ptr::eq(slice, expected));
}

/// The attributes in some bytes
struct Walk {
    /// Number, offset of the header, and value
    attrs: Vec<(u16, usize, Range<usize>)>,
    /// The broken attribute at the end: number, offset, `nla_len`, and the number of bytes left
    broken: Option<(u16, usize, usize, usize)>,
}

fn walk(bytes: &[u8]) -> Walk {
    let mut walk = Walk {
        attrs: Vec::new(),
        broken: None,
    };
    let mut at = 0;
    while at + 4 <= bytes.len() {
        let len = usize::from(u16_at(bytes, at));
        let kind = u16_at(bytes, at + 2) & 0x3fff;
        if len < 4 || at + len > bytes.len() {
            walk.broken = Some((kind, at, len, bytes.len() - at));
            break;
        }
        walk.attrs.push((kind, at, at + 4..at + len));
        at += padded(len);
    }
    walk
}

impl Walk {
    fn last(&self, kind: u16) -> Option<Range<usize>> {
        let attr = self.attrs.iter().rev().find(|attr| attr.0 == kind);
        attr.map(|attr| attr.2.clone())
    }
}

/// Checks [`Attrs`], and in each value again down to `depth`
fn check_attrs(bytes: &[u8], depth: u32) {
    let walked = walk(bytes);
    let mut attrs = Attrs::new(bytes);
    for (kind, offset, value) in &walked.attrs {
        let attr = attrs.next().expect("an attribute").expect("a whole one");
        assert_eq!((attr.kind, attr.offset), (*kind, *offset));
        assert_is(attr.value, bytes, value.clone());
        write!(Nowhere, "{attr:?}").expect("it has an end");
        if depth > 0 {
            check_attrs(attr.value, depth - 1);
        }
    }
    if let Some((kind, offset, len, had)) = walked.broken {
        let error = DecodeError::AttributeLength {
            kind,
            within: None,
            offset,
            len,
            had,
        };
        assert_eq!(attrs.next(), Some(Err(error)));
    }
    assert_eq!(attrs.next(), None);
    assert_eq!(attrs.next(), None, "the end is the end");
    let mut kinds: Vec<u16> = walked.attrs.iter().map(|attr| attr.0).collect();
    kinds.extend([0, VLAN, 0x3fff]);
    kinds.sort_unstable();
    kinds.dedup();
    for kind in kinds {
        let last: Option<Attr<'_>> = Attrs::new(bytes).last(kind);
        assert_eq!(last.is_some(), walked.last(kind).is_some());
        if let (Some(last), Some(value)) = (last, walked.last(kind)) {
            assert_is(last.value, bytes, value);
        }
    }
}

/// Decodes both halves of a VLAN tag, each of 16 bits (`nfqa_vlan_policy`)
fn plain_vlan(nested: &[u8]) -> Result<Vlan, DecodeError> {
    const WITHIN: Option<u16> = Some(VLAN);
    let walked = walk(nested);
    let (mut proto, mut tci) = (None, None);
    for (kind, offset, value) in walked.attrs {
        let half = match kind {
            1 => &mut proto,
            2 => &mut tci,
            _ => continue,
        };
        if value.len() < 2 {
            return Err(DecodeError::AttributeShort {
                kind,
                within: WITHIN,
                offset,
                needed: 2,
                had: value.len(),
            });
        }
        *half = Some(be(&nested[value.start..][..2]) as u16);
    }
    if let Some((kind, offset, len, had)) = walked.broken {
        return Err(DecodeError::AttributeLength {
            kind,
            within: WITHIN,
            offset,
            len,
            had,
        });
    }
    let missing = |kind| DecodeError::MissingAttribute {
        kind,
        within: WITHIN,
        offset: 0,
    };
    Ok(Vlan {
        proto: proto.ok_or(missing(1))?,
        tci: tci.ok_or(missing(2))?,
    })
}

fn check_vlan(nested: &[u8]) {
    let vlan = Vlan::parse(nested);
    assert_eq!(vlan, plain_vlan(nested));
    if let Ok(vlan) = vlan {
        assert_eq!(vlan.id(), vlan.tci % 4096);
    }
}

/// The minimum size of each attribute with a getter
fn least(kind: u16) -> usize {
    match kind {
        1 => 7,
        4 => 16,
        9 => 12,
        3 | 5..=8 | 12..=14 | 16 | 17 | 21 | 22 => 4,
        _ => 0,
    }
}

/// The same error with `base` added to its offset
fn moved(mut error: DecodeError, base: usize) -> DecodeError {
    match &mut error {
        DecodeError::Short { offset, .. }
        | DecodeError::MessageLength { offset, .. }
        | DecodeError::Truncated { offset, .. }
        | DecodeError::AttributeLength { offset, .. }
        | DecodeError::AttributeShort { offset, .. }
        | DecodeError::MissingAttribute { offset, .. } => *offset += base,
        _ => {}
    }
    error
}

/// Finds the error in a packet message
fn plain_packet_error(message: &[u8]) -> Option<DecodeError> {
    let short = |what, offset, needed| {
        Some(DecodeError::Short {
            what,
            offset,
            needed,
            had: message.len() - offset,
        })
    };
    if message.len() < 16 {
        return short(Header::Message, 0, 16);
    }
    let message_type = u16_at(message, 4);
    if message_type != PACKET {
        return Some(DecodeError::NotAPacket { message_type });
    }
    if message.len() < 20 {
        return short(Header::Family, 16, 4);
    }
    let max = 256 << 10;
    if message.len() > max {
        let had = message.len();
        return Some(DecodeError::TooLong { had, max });
    }
    let attrs = &message[20..];
    let walked = walk(attrs);
    for (kind, offset, value) in &walked.attrs {
        let (kind, offset, had) = (*kind, 20 + offset, value.len());
        if kind <= LAST_KNOWN && had < least(kind) {
            return Some(DecodeError::AttributeShort {
                kind,
                within: None,
                offset,
                needed: least(kind),
                had,
            });
        }
        if kind == VLAN
            && let Err(error) = plain_vlan(&attrs[value.clone()])
        {
            return Some(moved(error, offset + 4));
        }
    }
    if let Some((kind, offset, len, had)) = walked.broken {
        return Some(DecodeError::AttributeLength {
            kind,
            within: None,
            offset: 20 + offset,
            len,
            had,
        });
    }
    if walked.last(PACKET_HDR).is_none() {
        return Some(DecodeError::MissingAttribute {
            kind: PACKET_HDR,
            within: None,
            offset: 0,
        });
    }
    None
}

/// Finds the key in a message, even in a truncated one
fn plain_key(message: &[u8]) -> Option<PacketKey> {
    if message.len() < 20 || u16_at(message, 4) != PACKET {
        return None;
    }
    let attrs = &message[20..];
    let walked = walk(attrs);
    let header = walked.attrs.iter().find(|attr| attr.0 == PACKET_HDR);
    let value = &attrs[header?.2.clone()];
    (value.len() >= 4).then(|| PacketKey::new(be(&message[18..20]) as u16, be32(value)))
}

/// Parses these bytes as one packet message
fn check_parse(message: &[u8]) {
    let parsed = Packet::parse(message);
    assert_eq!(parsed.err(), plain_packet_error(message));
    assert_eq!(PacketKey::peek(message), plain_key(message));
    match parsed {
        Ok(packet) => {
            check_packet(packet, message);
            check_packet(packet.over(message), message);
            // Over other bytes the getters may return anything, but must not fail.
            let half = &message[..message.len() / 2];
            visit(&packet.over(half), half);
            visit(&packet.over(&[]), &[]);
        }
        Err(error) => write!(Nowhere, "{error}").expect("it has an end"),
    }
}

/// Calls every getter, and fails if a slice is outside the message
fn visit(packet: &Packet<'_>, message: &[u8]) {
    let _ = (
        packet.key(),
        packet.family(),
        packet.hook(),
        packet.hw_protocol().0,
    );
    let _ = (
        packet.mark(),
        packet.priority(),
        packet.timestamp(),
        packet.hw_addr(),
    );
    let _ = (
        packet.indev(),
        packet.outdev(),
        packet.physindev(),
        packet.physoutdev(),
    );
    let _ = (
        packet.uid(),
        packet.gid(),
        packet.vlan(),
        packet.ct_state().map(|state| state.0),
    );
    let _ = (
        packet.cgroup_classid(),
        packet.len(),
        packet.is_truncated(),
        packet.skb_info(),
    );
    write!(Nowhere, "{packet:?}").expect("it has an end");
    let inside = message.as_ptr_range();
    let known = (0..=LAST_KNOWN + 2).chain([0x3fff, 0x4000, 0xffff]);
    let values = known.filter_map(|kind| packet.attr(kind));
    for value in values.chain(packet.attrs().flatten().map(|attr| attr.value)) {
        let value = value.as_ptr_range();
        assert!(value.is_empty() || inside.start <= value.start && value.end <= inside.end);
    }
}

/// Compares every getter with the plain reading
fn check_packet(packet: Packet<'_>, message: &[u8]) {
    visit(&packet, message);
    assert_is(packet.as_bytes(), message, 0..message.len());
    let attrs = &message[20..];
    let walked = walk(attrs);
    assert!(walked.broken.is_none());

    let mut seen = packet.attrs();
    for (kind, offset, value) in &walked.attrs {
        let attr = seen.next().expect("an attribute").expect("parse saw it");
        assert_eq!((attr.kind, attr.offset), (*kind, *offset));
        assert_is(attr.value, attrs, value.clone());
        let value = packet.attr(*kind).expect("it is there");
        assert_is(value, attrs, walked.last(*kind).expect("it is there"));
    }
    assert!(seen.next().is_none());
    for kind in 0..=LAST_KNOWN + 8 {
        assert_eq!(packet.attr(kind).is_some(), walked.last(kind).is_some());
    }

    let last = |kind| walked.last(kind).map(|value| &attrs[value]);
    let number = |kind| last(kind).map(be32);
    let header = last(PACKET_HDR).expect("parse saw it");
    let key = PacketKey::new(be(&message[18..20]) as u16, be32(header));
    assert_eq!(packet.key(), key);
    assert_eq!((packet.queue(), packet.id()), (key.queue(), key.id()));
    assert_eq!(packet.with_binding(7).key(), key.with_binding(7));
    assert_eq!(packet.family().0, message[16]);
    assert_eq!(u64::from(packet.hw_protocol().0), be(&header[4..6]));
    assert_eq!(packet.hook().0, header[6]);
    assert_eq!(packet.mark(), number(3).unwrap_or(0));
    assert_eq!(packet.priority(), number(21).unwrap_or(0));
    assert_eq!(packet.indev(), number(5));
    assert_eq!(packet.outdev(), number(6));
    assert_eq!(packet.physindev(), number(7));
    assert_eq!(packet.physoutdev(), number(8));
    assert_eq!(packet.ct_state().map(|state| state.0), number(12));
    let payload_len = last(10).map(<[u8]>::len);
    let len = number(13).map(|len| len as usize).or(payload_len);
    assert_eq!(packet.len(), len);
    assert_eq!(packet.is_truncated(), number(13).is_some());
    assert_eq!(packet.skb_info().bits(), number(14).unwrap_or(0));
    assert_eq!(packet.uid(), number(16));
    assert_eq!(packet.gid(), number(17));
    assert_eq!(packet.cgroup_classid(), number(22));
    assert_eq!(packet.payload(), last(10).unwrap_or(&[]));
    assert_eq!(packet.conntrack().map(|entry| entry.as_bytes()), last(11));
    assert_eq!(packet.expectation(), last(15));
    assert_eq!(packet.security_context(), last(18));
    assert_eq!(packet.l2_header(), last(20));
    assert_eq!(
        packet.vlan(),
        last(VLAN).and_then(|nested| plain_vlan(nested).ok())
    );
    let time = last(4).map(|value| {
        let micros = Duration::from_micros(be(&value[8..16]));
        Duration::from_secs(be(&value[..8])).saturating_add(micros)
    });
    assert_eq!(packet.timestamp(), time);
    let address = last(9).map(|value| value[4..12][..be(&value[..2]).min(8) as usize].to_vec());
    assert_eq!(
        packet.hw_addr().map(|addr| addr.as_bytes().to_vec()),
        address
    );
    if let Some(addr) = packet.hw_addr() {
        write!(Nowhere, "{addr} {addr:?}").expect("it has an end");
    }
    for nested in [
        packet.conntrack().map(|entry| entry.as_bytes()),
        packet.expectation(),
    ]
    .into_iter()
    .flatten()
    {
        check_attrs(nested, 4);
    }
}

/// Compares a reply with a plain reading of `struct nlmsgerr`
fn check_reply(reply: &Reply<'_>, message: &[u8]) {
    write!(Nowhere, "{reply:?}").expect("it has an end");
    let (flags, body) = (u16_at(message, 6), &message[16..]);
    let code = i64::from(u32_at(body, 0).cast_signed());
    assert_eq!(i64::from(reply.errno), (-code).min(i32::MAX.into()));
    assert_eq!(reply.is_ack(), code == 0);
    assert_eq!(reply.request_type, u16_at(body, 8));
    assert_eq!(reply.request_flags, u16_at(body, 10));
    assert_eq!(reply.seq, u32_at(body, 12));
    assert_eq!(reply.pid, u32_at(body, 16));

    let (mut text, mut offset) = (None, None);
    if flags & 0x200 != 0 {
        let echoed = match flags & 0x100 {
            0 => padded((u32_at(body, 4) as usize).saturating_sub(16)),
            _ => 0,
        };
        let attrs = body.get(20 + echoed..).unwrap_or(&[]);
        for (kind, _, value) in walk(attrs).attrs {
            let value = &attrs[value];
            match kind {
                1 => {
                    let end = value.iter().position(|&byte| byte == 0);
                    text = Some(&value[..end.unwrap_or(value.len())]);
                    text.take_if(|text| text.is_empty());
                }
                2 => offset = (value.len() >= 4).then(|| u32_at(value, 0)),
                _ => {}
            }
        }
    }
    assert_eq!((reply.text, reply.offset), (text, offset));
    if let (Some(text), Some(expected)) = (reply.text, text) {
        assert!(std::ptr::eq(text, expected));
    }
}

/// Checks [`Messages`], and the contents of each message
fn check_datagram(datagram: &[u8]) {
    let mut messages = Messages::new(datagram);
    let mut at = 0;
    while at < datagram.len() {
        assert_is(messages.rest(), datagram, at..datagram.len());
        let had = datagram.len() - at;
        let item = messages.next().expect("a message or an error");
        let broken = if had < 16 {
            Some(DecodeError::Short {
                what: Header::Message,
                offset: at,
                needed: 16,
                had,
            })
        } else {
            match u32_at(datagram, at) as usize {
                len @ ..16 => Some(DecodeError::MessageLength {
                    offset: at,
                    len,
                    needed: 16,
                }),
                len if len > had => Some(DecodeError::Truncated {
                    offset: at,
                    needed: len,
                    had,
                }),
                _ => None,
            }
        };
        if let Some(broken) = broken {
            assert_eq!(item.err(), Some(broken));
            write!(Nowhere, "{broken}").expect("it has an end");
            assert_eq!(PacketKey::peek(&datagram[at..]), plain_key(&datagram[at..]));
            break;
        }
        let len = u32_at(datagram, at) as usize;
        check_message(item, &datagram[at..at + len], at);
        // The next message follows, even if this one is broken.
        at += padded(len);
    }
    assert!(messages.next().is_none() && messages.next().is_none());
    assert!(messages.rest().is_empty());
}

fn check_message(item: Result<Message<'_>, DecodeError>, message: &[u8], at: usize) {
    let kind = u16_at(message, 4);
    match kind {
        PACKET => {
            let error = plain_packet_error(message).map(|error| moved(error, at));
            match item {
                Ok(Message::Packet(packet)) => {
                    assert_eq!(error, None);
                    check_packet(packet, message);
                }
                other => assert_eq!(other.err(), error),
            }
            check_parse(message);
        }
        2 if message.len() < 36 => {
            let error = DecodeError::Short {
                what: Header::Error,
                offset: at + 16,
                needed: 20,
                had: message.len() - 16,
            };
            assert_eq!(item.err(), Some(error));
        }
        2 => match item {
            Ok(Message::Reply(reply)) => check_reply(&reply, message),
            other => panic!("{other:?}"),
        },
        1 => assert!(matches!(item, Ok(Message::Noop))),
        3 => assert!(matches!(item, Ok(Message::Done))),
        4 => assert!(matches!(item, Ok(Message::Overrun))),
        _ => match item {
            Ok(Message::Other(other)) => {
                assert_eq!(
                    (other.message_type, other.flags),
                    (kind, u16_at(message, 6))
                );
                assert_is(other.body, message, 16..message.len());
            }
            other => panic!("{other:?}"),
        },
    }
}
