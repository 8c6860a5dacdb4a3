//! Decoding of received datagrams, built by hand

mod common;

use common::{
    BE32, Be32, ID, MessageBuilder, PACKET_HDR, QUEUE, attr, datagram, echo, fixed_sizes,
    full_packet, packet, padded, wire,
};
use nfqnl_proto::consts::*;
use nfqnl_proto::{
    Attrs, DecodeError, EncodeError, Family, Header, Hook, HwAddr, Message, Messages, Packet,
    PacketKey, Reply, RequestHeader, SkbInfo, Verdict, Vlan,
};
use std::time::Duration;

/// A verdict, encoded by the crate, as the request of a reply
fn request(header: RequestHeader) -> Vec<u8> {
    let decision = Verdict::Accept.with_payload(b"odd");
    let mut bytes = vec![0; decision.max_len()];
    let len = decision
        .encode(&mut bytes, QUEUE, ID, header)
        .expect("max_len is enough");
    bytes.truncate(len);
    bytes
}

const REQUEST: RequestHeader = RequestHeader {
    ack: true,
    seq: 0xfeed_0001,
    pid: 0xee00_0002,
};

/// Decodes the only message of a datagram, which must be a reply
#[track_caller]
fn reply(datagram: &[u8]) -> Reply<'_> {
    let mut messages = Messages::new(datagram);
    let Some(Ok(Message::Reply(reply))) = messages.next() else {
        panic!("no reply in {datagram:02x?}");
    };
    assert!(messages.next().is_none());
    reply
}

#[track_caller]
fn assert_answers_request(reply: &Reply<'_>) {
    assert_eq!(reply.request_type, message_type(NFQNL_MSG_VERDICT));
    assert_eq!((reply.seq, reply.pid), (REQUEST.seq, REQUEST.pid));
}

/// A short form of a decoded message
#[derive(Debug, PartialEq)]
enum Seen {
    Packet(u32),
    Error(i32),
    Overrun,
    Done,
    Noop,
    Other(u16),
    Broken(DecodeError),
}

fn see(datagram: &[u8]) -> Vec<Seen> {
    Messages::new(datagram)
        .map(|message| match message {
            Ok(Message::Packet(packet)) => Seen::Packet(packet.id()),
            Ok(Message::Reply(reply)) => Seen::Error(reply.errno),
            Ok(Message::Overrun) => Seen::Overrun,
            Ok(Message::Done) => Seen::Done,
            Ok(Message::Noop) => Seen::Noop,
            Ok(Message::Other(other)) => Seen::Other(other.message_type),
            Ok(unknown) => panic!("a new kind of message: {unknown:?}"),
            Err(error) => Seen::Broken(error),
        })
        .collect()
}

#[test]
fn nothing_in_nothing() {
    assert_eq!(see(&[]), []);
}

#[test]
fn packet_message() {
    let bytes = packet().attr(NFQA_PAYLOAD, b"payload").build();
    let mut messages = Messages::new(&bytes);
    let Some(Ok(Message::Packet(packet))) = messages.next() else {
        panic!("no packet");
    };
    assert!(messages.next().is_none());
    assert_eq!(packet.as_bytes(), bytes);
    assert_eq!(packet.family(), Family::INET);
    assert_eq!(packet.queue(), QUEUE);
    assert_eq!(packet.id(), ID);
    assert_eq!(packet.hw_protocol().0, 0x0800);
    assert_eq!(packet.hook(), Hook::OUTPUT);
    assert_eq!(packet.payload(), b"payload");

    let key = PacketKey::new(QUEUE, ID);
    assert_eq!(packet.key(), key);
    assert_eq!(PacketKey::peek(&bytes), Some(key));
    assert_eq!(packet.with_binding(9).key(), key.with_binding(9));
}

#[test]
fn packet_keys() {
    let key = PacketKey::new(QUEUE, ID);
    assert_eq!((key.queue(), key.id(), key.binding()), (QUEUE, ID, 0));
    let bound = key.with_binding(9);
    assert_eq!((bound.queue(), bound.id(), bound.binding()), (QUEUE, ID, 9));
    assert_ne!(bound, key);
    let next = bound.with_id(ID + 1);
    assert_eq!(
        (next.queue(), next.id(), next.binding()),
        (QUEUE, ID + 1, 9)
    );
    assert!(key < bound && bound < next && next < PacketKey::new(QUEUE + 1, 0));
}

/// The kernel caps an acknowledgement even without `NETLINK_CAP_ACK`
#[test]
fn acknowledgement() {
    for flags in [NLM_F_CAPPED, 0] {
        let bytes = MessageBuilder::error(flags, 0, echo(&request(REQUEST))).build();
        let reply = reply(&bytes);
        assert!(reply.is_ack());
        assert_eq!((reply.errno, reply.text, reply.offset), (0, None, None));
        assert_answers_request(&reply);
    }
}

/// 1 is `EPERM`, and 524 is `ENOTSUPP`, a number without a name in user space
#[test]
fn error_numbers() {
    for (code, errno) in [(-1, 1), (-524, 524), (i32::MIN, i32::MAX)] {
        let request = request(REQUEST);
        for body in [echo(&request), &request] {
            let bytes = MessageBuilder::error(0, code, body).build();
            let reply = reply(&bytes);
            assert!(!reply.is_ack());
            assert_eq!(reply.errno, errno);
            assert_eq!((reply.text, reply.offset), (None, None));
            assert_answers_request(&reply);
        }
    }
}

/// Extended-ack attributes follow the request's header if capped, or the whole padded request
#[test]
fn extended_ack() {
    const TEXT: &[u8] = b"Attribute failed policy validation";
    const OFFSET: u32 = 20;
    let with_nul = wire![TEXT, [0]];
    let request = request(REQUEST);
    assert_ne!(
        request.len(),
        padded(request.len()),
        "the request needs padding"
    );
    for (flags, body) in [(NLM_F_CAPPED, echo(&request)), (0, &request)] {
        let text_first = MessageBuilder::error(flags | NLM_F_ACK_TLVS, -34, body)
            .attr(NLMSGERR_ATTR_MSG, &with_nul)
            .attr(NLMSGERR_ATTR_OFFS, OFFSET.to_ne_bytes())
            .build();
        let offset_first = MessageBuilder::error(flags | NLM_F_ACK_TLVS, -34, body)
            .attr(NLMSGERR_ATTR_OFFS, OFFSET.to_ne_bytes())
            .attr(NLMSGERR_ATTR_MSG, TEXT)
            .build();
        for bytes in [text_first, offset_first] {
            let reply = reply(&bytes);
            assert_eq!(reply.errno, 34);
            assert_eq!((reply.text, reply.offset), (Some(TEXT), Some(OFFSET)));
            assert_answers_request(&reply);
            let debug = format!("{reply:?}");
            assert!(
                debug.contains(std::str::from_utf8(TEXT).unwrap()),
                "{debug}"
            );
        }
    }
}

/// An acknowledgement may carry a warning
#[test]
fn acknowledgement_with_text() {
    let bytes = MessageBuilder::error(NLM_F_CAPPED | NLM_F_ACK_TLVS, 0, echo(&request(REQUEST)))
        .attr(NLMSGERR_ATTR_MSG, b"warning\0")
        .build();
    let reply = reply(&bytes);
    assert!(reply.is_ack());
    assert_eq!(reply.text, Some(&b"warning"[..]));
}

/// The error number is reported even if its text is broken
#[test]
fn broken_extended_ack_leaves_the_error() {
    let flags = NLM_F_CAPPED | NLM_F_ACK_TLVS;
    let error = || MessageBuilder::error(flags, -22, echo(&request(REQUEST)).to_vec().as_slice());
    let cases = [
        ("none", error()),
        ("empty text", error().attr(NLMSGERR_ATTR_MSG, b"\0")),
        ("short offset", error().attr(NLMSGERR_ATTR_OFFS, [1, 2, 3])),
        (
            "unknown attribute",
            error().attr(NLMSGERR_ATTR_OFFS + 1, [1, 2, 3, 4]),
        ),
        (
            "length below the header",
            error().field([0; ATTR_HEADER_LEN]),
        ),
        (
            "length beyond the end",
            error().field([0xff; ATTR_HEADER_LEN]),
        ),
    ];
    for (what, message) in cases {
        let bytes = message.build();
        let reply = reply(&bytes);
        assert_eq!(
            (reply.errno, reply.text, reply.offset),
            (22, None, None),
            "{what}"
        );
        assert_answers_request(&reply);
    }
}

/// Without the flag, the bytes behind the request's header are ignored
#[test]
fn extended_ack_needs_its_flag() {
    let bytes = MessageBuilder::error(NLM_F_CAPPED, -22, echo(&request(REQUEST)))
        .attr(NLMSGERR_ATTR_MSG, b"text\0")
        .build();
    assert_eq!(reply(&bytes).text, None);
}

#[test]
fn short_error_message() {
    let whole = MessageBuilder::error(0, -1, echo(&request(REQUEST))).build();
    let body = &whole[MESSAGE_HEADER_LEN..];
    for had in 0..body.len() {
        let bytes = MessageBuilder::new(NLMSG_ERROR, 0)
            .field(&body[..had])
            .build();
        let error = DecodeError::Short {
            what: Header::Error,
            offset: MESSAGE_HEADER_LEN,
            needed: body.len(),
            had,
        };
        assert_eq!(see(&bytes), [Seen::Broken(error)]);
    }
}

#[test]
fn control_messages() {
    for body in [&[][..], &[0; 4]] {
        let message = |kind| MessageBuilder::new(kind, 0).field(body).build();
        assert_eq!(see(&message(NLMSG_NOOP)), [Seen::Noop]);
        assert_eq!(see(&message(NLMSG_DONE)), [Seen::Done]);
        assert_eq!(see(&message(NLMSG_OVERRUN)), [Seen::Overrun]);
    }
}

#[test]
fn other_messages_are_passed_on_unchanged() {
    const FLAGS: u16 = 0x0a0b;
    let types = [
        0,
        NLMSG_OVERRUN + 1,
        NLMSG_MIN_TYPE,
        message_type(NFQNL_MSG_CONFIG),
        u16::MAX,
    ];
    for kind in types {
        let bytes = MessageBuilder::new(kind, FLAGS).field(b"body").build();
        let Some(Ok(Message::Other(other))) = Messages::new(&bytes).next() else {
            panic!("type {kind:#06x}");
        };
        assert_eq!(
            (other.message_type, other.flags, other.body),
            (kind, FLAGS, &b"body"[..])
        );
    }
}

#[test]
fn several_messages_in_one_datagram() {
    let bytes = datagram([
        packet().attr(NFQA_PAYLOAD, b"1").build(), // an odd length, so padding follows
        MessageBuilder::error(NLM_F_CAPPED, -2, echo(&request(REQUEST))).build(),
        MessageBuilder::new(NLMSG_OVERRUN, 0).build(),
        MessageBuilder::new(NLMSG_NOOP, 0).build(),
        MessageBuilder::new(NLMSG_MIN_TYPE, 0)
            .field(b"12345")
            .build(),
        MessageBuilder::new(NLMSG_DONE, 0).build(),
        packet().attr(NFQA_PAYLOAD, b"12345").build(),
    ]);
    let expected = [
        Seen::Packet(ID),
        Seen::Error(2),
        Seen::Overrun,
        Seen::Noop,
        Seen::Other(NLMSG_MIN_TYPE),
        Seen::Done,
        Seen::Packet(ID),
    ];
    assert_eq!(see(&bytes), expected);
}

/// Padding behind the last message is ignored
#[test]
fn last_message_may_be_padded() {
    let bytes = packet().attr(NFQA_PAYLOAD, b"1").build();
    let missing = padded(bytes.len()) - bytes.len();
    for extra in 0..=missing {
        assert_eq!(see(&wire![bytes, vec![0; extra]]), [Seen::Packet(ID)]);
    }
}

#[test]
fn rest_has_the_unread_messages() {
    let first = packet().attr(NFQA_PAYLOAD, b"1").build();
    let second = MessageBuilder::new(NLMSG_NOOP, 0).build();
    let bytes = datagram([&first, &second]);
    let mut messages = Messages::new(&bytes);
    assert_eq!(messages.rest(), bytes);
    assert!(messages.next().is_some_and(|message| message.is_ok()));
    assert_eq!(messages.rest(), second);
    assert!(messages.next().is_some_and(|message| message.is_ok()));
    assert!(messages.rest().is_empty());
    assert!(messages.next().is_none());
}

/// Messages with a broken body, each with the error reported for a message at offset `base`
fn broken_messages(base: usize) -> Vec<(Vec<u8>, DecodeError)> {
    let header_only = || MessageBuilder::packet(Family::INET, QUEUE);
    let behind_header = packet().offset();
    let short = |what, offset, needed, had| DecodeError::Short {
        what,
        offset: base + offset,
        needed,
        had,
    };
    let attr_length = |within, offset, len, had| DecodeError::AttributeLength {
        kind: NFQA_MARK,
        within,
        offset: base + offset,
        len,
        had,
    };
    let attr_short = |kind, within, offset, needed, had| DecodeError::AttributeShort {
        kind,
        within,
        offset: base + offset,
        needed,
        had,
    };
    let missing = |kind, within, offset| DecodeError::MissingAttribute {
        kind,
        within,
        offset: base + offset,
    };
    let in_vlan = behind_header + ATTR_HEADER_LEN;
    let packet_type = message_type(NFQNL_MSG_PACKET);
    let error_len = size_of::<i32>() + MESSAGE_HEADER_LEN;
    let too_short_to_be_one = (0..4_u16).flat_map(|len| {
        let bytes = wire![len, NFQA_MARK, [0; 4]];
        let first = header_only().field(&bytes).build();
        let behind = packet().field([0]).field(&bytes).build();
        [
            (first, attr_length(None, ATTRS_OFFSET, len.into(), 8)),
            (behind, attr_length(None, behind_header, len.into(), 8)),
        ]
    });
    let others = vec![
        (
            MessageBuilder::new(packet_type, 0).build(),
            short(Header::Family, MESSAGE_HEADER_LEN, FAMILY_HEADER_LEN, 0),
        ),
        (
            MessageBuilder::new(packet_type, 0)
                .field([Family::INET.0, 0, 0])
                .build(),
            short(Header::Family, MESSAGE_HEADER_LEN, FAMILY_HEADER_LEN, 3),
        ),
        (
            MessageBuilder::new(NLMSG_ERROR, 0).build(),
            short(Header::Error, MESSAGE_HEADER_LEN, error_len, 0),
        ),
        (header_only().build(), missing(NFQA_PACKET_HDR, None, 0)),
        (
            header_only().attr(NFQA_MARK, [0; 4]).build(),
            missing(NFQA_PACKET_HDR, None, 0),
        ),
        (
            header_only()
                .attr(NFQA_PACKET_HDR, &PACKET_HDR[1..])
                .build(),
            attr_short(
                NFQA_PACKET_HDR,
                None,
                ATTRS_OFFSET,
                PACKET_HDR_LEN,
                PACKET_HDR_LEN - 1,
            ),
        ),
        (
            packet()
                .field([0])
                .field(wire![u16::MAX, NFQA_MARK, [0; 4]])
                .build(),
            attr_length(None, behind_header, u16::MAX.into(), 8),
        ),
        (
            packet()
                .field([0])
                .field(wire![9u16, NFQA_MARK, [0; 4]])
                .build(),
            attr_length(None, behind_header, 9, 8),
        ),
        (
            packet()
                .attr(NFQA_VLAN, attr(NFQA_VLAN_TCI, &[1, 2]))
                .build(),
            missing(NFQA_VLAN_PROTO, Some(NFQA_VLAN), in_vlan),
        ),
        (
            packet()
                .attr(NFQA_VLAN, attr(NFQA_VLAN_PROTO, &[0x81, 0]))
                .build(),
            missing(NFQA_VLAN_TCI, Some(NFQA_VLAN), in_vlan),
        ),
        (
            packet().attr(NFQA_VLAN, attr(NFQA_VLAN_TCI, &[1])).build(),
            attr_short(NFQA_VLAN_TCI, Some(NFQA_VLAN), in_vlan, 2, 1),
        ),
        (
            packet()
                .attr(NFQA_VLAN, wire![7u16, NFQA_MARK, [1, 2]])
                .build(),
            attr_length(Some(NFQA_VLAN), in_vlan, 7, 6),
        ),
        (
            packet()
                .attr(NFQA_VLAN, wire![0u16, NFQA_MARK, [1, 2]])
                .build(),
            attr_length(Some(NFQA_VLAN), in_vlan, 0, 6),
        ),
    ];
    too_short_to_be_one.chain(others).collect()
}

/// Number 1 is `NFQA_PACKET_HDR` in a message and `NFQA_VLAN_PROTO` in a VLAN tag, so the text of
/// an error must name the outer attribute
#[test]
fn texts_of_attribute_errors() {
    let texts = broken_messages(100)
        .into_iter()
        .filter_map(|(_, error)| match error {
            DecodeError::Short { .. } => None,
            error => Some(error.to_string()),
        });
    assert_eq!(
        texts.collect::<Vec<_>>(),
        [
            "attribute 3 at byte 120 says it is 0 bytes long, 8 are left",
            "attribute 3 at byte 132 says it is 0 bytes long, 8 are left",
            "attribute 3 at byte 120 says it is 1 bytes long, 8 are left",
            "attribute 3 at byte 132 says it is 1 bytes long, 8 are left",
            "attribute 3 at byte 120 says it is 2 bytes long, 8 are left",
            "attribute 3 at byte 132 says it is 2 bytes long, 8 are left",
            "attribute 3 at byte 120 says it is 3 bytes long, 8 are left",
            "attribute 3 at byte 132 says it is 3 bytes long, 8 are left",
            "attribute 1 is missing from the message at byte 100",
            "attribute 1 is missing from the message at byte 100",
            "attribute 1 at byte 120 needs 7 bytes of value, has 6",
            "attribute 3 at byte 132 says it is 65535 bytes long, 8 are left",
            "attribute 3 at byte 132 says it is 9 bytes long, 8 are left",
            "attribute 1 is missing from the value of attribute 19 at byte 136",
            "attribute 2 is missing from the value of attribute 19 at byte 136",
            "attribute 2 within attribute 19 at byte 136 needs 2 bytes of value, has 1",
            "attribute 3 within attribute 19 at byte 136 says it is 7 bytes long, 6 are left",
            "attribute 3 within attribute 19 at byte 136 says it is 0 bytes long, 6 are left",
        ]
    );
}

/// The texts of all other errors
#[test]
fn texts_of_other_errors() {
    let short = |what| DecodeError::Short {
        what,
        offset: 20,
        needed: 16,
        had: 3,
    };
    let texts = [
        short(Header::Message).to_string(),
        short(Header::Family).to_string(),
        short(Header::Error).to_string(),
        DecodeError::MessageLength {
            offset: 20,
            len: 15,
            needed: 16,
        }
        .to_string(),
        DecodeError::Truncated {
            offset: 20,
            needed: 600,
            had: 200,
        }
        .to_string(),
        DecodeError::NotAPacket {
            message_type: 0x0301,
        }
        .to_string(),
        DecodeError::TooLong {
            had: 262_145,
            max: 262_144,
        }
        .to_string(),
        EncodeError::NoSpace {
            needed: 32,
            had: 31,
        }
        .to_string(),
        EncodeError::AttributeTooLong {
            kind: NFQA_PAYLOAD,
            had: 65532,
            max: 65531,
        }
        .to_string(),
    ];
    assert_eq!(
        texts,
        [
            "netlink header at byte 20 needs 16 bytes, 3 left",
            "netfilter header at byte 20 needs 16 bytes, 3 left",
            "error message at byte 20 needs 16 bytes, 3 left",
            "netlink message at byte 20 says it is 15 bytes long, its header alone takes 16",
            "netlink message at byte 20 is 600 bytes long, the buffer holds 200 of them",
            "message type 0x0301 is not NFQNL_MSG_PACKET",
            "message of 262145 bytes, at most 262144 can be indexed",
            "the message needs 32 bytes, the buffer has 31",
            "attribute 10 has 65532 bytes of value, at most 65531 fit",
        ]
    );
}

#[test]
fn broken_message_is_skipped() {
    let before = packet().attr(NFQA_PAYLOAD, b"1").build();
    let behind = packet().attr(NFQA_PAYLOAD, b"123").build();
    for (at, (broken, error)) in broken_messages(0).into_iter().enumerate() {
        let error_at = |base| Seen::Broken(broken_messages(base)[at].1);
        assert_eq!(see(&broken), [Seen::Broken(error)]);

        let bytes = datagram([&before, &broken, &behind, &broken]);
        let first = padded(before.len());
        let second = first + padded(broken.len()) + padded(behind.len());
        let expected = [
            Seen::Packet(ID),
            error_at(first),
            Seen::Packet(ID),
            error_at(second),
        ];
        assert_eq!(see(&bytes), expected);

        let mut messages = Messages::new(&bytes);
        assert!(messages.nth(1).is_some_and(|message| message.is_err()));
        assert_eq!(messages.rest(), datagram([&behind, &broken]));
    }
}

/// Behind a broken length no message can be found, so there is one error and the end
#[test]
fn broken_message_length_is_the_end() {
    let good = packet().build();
    let offset = padded(good.len());
    let noop = MessageBuilder::new(NLMSG_NOOP, 0).build();
    let with_len = |len: u32| wire![len, noop[size_of_val(&len)..]];
    let (size, size_u32) = (
        MESSAGE_HEADER_LEN,
        u32::try_from(MESSAGE_HEADER_LEN).unwrap(),
    );
    let had = 2 * size;
    let too_short = (0..size_u32).map(|len| {
        let error = DecodeError::MessageLength {
            offset,
            len: usize::try_from(len).unwrap(),
            needed: size,
        };
        (with_len(len), error)
    });
    let too_long = [
        (
            with_len(2 * size_u32 + 1),
            DecodeError::Truncated {
                offset,
                needed: had + 1,
                had,
            },
        ),
        (
            with_len(u32::MAX),
            DecodeError::Truncated {
                offset,
                needed: u32::MAX as usize,
                had,
            },
        ),
    ];
    for (broken, error) in too_short.chain(too_long) {
        let bytes = datagram([&good, &broken, &noop]);
        assert_eq!(see(&bytes), [Seen::Packet(ID), Seen::Broken(error)]);

        let mut messages = Messages::new(&bytes);
        assert!(messages.nth(1).is_some_and(|message| message.is_err()));
        assert!(messages.rest().is_empty());
    }
    for had in 1..size {
        let what = Header::Message;
        let error = DecodeError::Short {
            what,
            offset,
            needed: size,
            had,
        };
        let bytes = datagram([&good[..], &noop[..had]]);
        assert_eq!(see(&bytes), [Seen::Packet(ID), Seen::Broken(error)]);
    }
}

/// Unusual messages, which no kernel sends, are read as the kernel would read them
#[test]
fn unusual_messages() {
    let other_id = wire![[9, 9, 9, 9], PACKET_HDR[4..]];
    let mut nested = Vec::new();
    for _ in 0..1000 {
        nested = attr(NFQA_CT | NLA_F_NESTED, &nested);
    }
    // The message ends in the middle of its last attribute, and the next message begins there.
    let inner = MessageBuilder::new(NLMSG_NOOP, 0).build();
    let mut overlapping = packet().attr(NFQA_SECCTX, &inner).build();
    let end = u32::try_from(overlapping.len() - inner.len()).unwrap();
    overlapping[..4].copy_from_slice(&end.to_ne_bytes());
    let cut_attribute = DecodeError::AttributeLength {
        kind: NFQA_SECCTX,
        within: None,
        offset: packet().offset(),
        len: ATTR_HEADER_LEN + inner.len(),
        had: ATTR_HEADER_LEN,
    };
    let cases = [
        // An attribute with a length that covers the header of the next one
        (
            packet()
                .field([0])
                .field(wire![12_u16, NFQA_MARK, [0; 4], 0_u16, NFQA_MARK])
                .build(),
            vec![Seen::Packet(ID)],
        ),
        (
            packet().attr(NFQA_PACKET_HDR, &other_id).build(),
            vec![Seen::Packet(0x0909_0909)],
        ),
        (
            packet().attr(NFQA_CT | NLA_F_NESTED, &nested).build(),
            vec![Seen::Packet(ID)],
        ),
        (
            datagram([packet().build(), packet().build()]),
            vec![Seen::Packet(ID), Seen::Packet(ID)],
        ),
        (overlapping, vec![Seen::Broken(cut_attribute), Seen::Noop]),
        // Requests, and messages of other subsystems
        (
            request(REQUEST),
            vec![Seen::Other(message_type(NFQNL_MSG_VERDICT))],
        ),
        (
            MessageBuilder::new(0x0100, 0).field([0; 4]).build(),
            vec![Seen::Other(0x0100)],
        ),
        (
            MessageBuilder::new(u16::MAX, u16::MAX).build(),
            vec![Seen::Other(u16::MAX)],
        ),
    ];
    for (odd, mut expected) in cases {
        expected.push(Seen::Packet(ID));
        assert_eq!(see(&datagram([odd, packet().build()])), expected);
    }
    let levels = std::iter::successors(Some(&nested[..]), |inner| {
        let attr = Attrs::new(inner).next()?.unwrap();
        Some(attr.value)
    });
    assert_eq!(levels.count(), 1001, "each level takes one call");
}

#[test]
fn packet_parse_refuses_other_messages() {
    for kind in [NLMSG_ERROR, message_type(NFQNL_MSG_VERDICT)] {
        let bytes = MessageBuilder::new(kind, 0)
            .field([0; FAMILY_HEADER_LEN])
            .build();
        let error = Packet::parse(&bytes).unwrap_err();
        assert_eq!(error, DecodeError::NotAPacket { message_type: kind });
        assert_eq!(PacketKey::peek(&bytes), None);
    }
}

/// Up to three bytes behind the last attribute are ignored
#[test]
fn stray_bytes_behind_the_last_attribute() {
    for stray in 0..ATTR_HEADER_LEN {
        let bytes = packet()
            .attr(NFQA_MARK, [0, 0, 0, 5])
            .field(vec![0xff; stray])
            .build();
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!(packet.mark(), 5);
        assert_eq!(packet.attrs().count(), 2);
    }
}

#[test]
fn last_attribute_is_not_padded() {
    for len in 0..=5 {
        let payload = &b"12345"[..len];
        let bytes = packet().attr(NFQA_PAYLOAD, payload).build();
        assert_eq!(bytes.len(), packet().offset() + ATTR_HEADER_LEN + len);
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!(packet.payload(), payload);
        assert_eq!(packet.attr(NFQA_PAYLOAD), Some(payload));
    }
}

#[test]
fn type_flags_are_not_part_of_the_number() {
    for flags in [
        NLA_F_NESTED,
        NLA_F_NET_BYTEORDER,
        NLA_F_NESTED | NLA_F_NET_BYTEORDER,
    ] {
        let bytes = MessageBuilder::packet(Family::INET, QUEUE)
            .attr(NFQA_PACKET_HDR | flags, PACKET_HDR)
            .attr(NFQA_MARK | flags, [0, 0, 0, 5])
            .attr(100 | flags, b"unknown")
            .build();
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!((packet.id(), packet.mark()), (ID, 5));
        assert_eq!(packet.attr(100), Some(&b"unknown"[..]));
        let kinds: Vec<u16> = packet.attrs().map(|attr| attr.unwrap().kind).collect();
        assert_eq!(kinds, [NFQA_PACKET_HDR, NFQA_MARK, 100]);
        assert_eq!(PacketKey::peek(&bytes), Some(packet.key()));
    }
}

#[test]
fn last_of_equal_attributes_counts() {
    let bytes = packet()
        .attr(NFQA_MARK, [0, 0, 0, 1])
        .attr(100, b"first")
        .attr(NFQA_PAYLOAD, b"first")
        .attr(NFQA_MARK, [0, 0, 0, 2])
        .attr(100, b"last")
        .attr(NFQA_PAYLOAD, b"last")
        .build();
    let packet = Packet::parse(&bytes).unwrap();
    assert_eq!(packet.mark(), 2);
    assert_eq!(packet.payload(), b"last");
    assert_eq!(packet.attr(100), Some(&b"last"[..]));
    let marks = packet
        .attrs()
        .filter(|attr| attr.is_ok_and(|attr| attr.kind == NFQA_MARK));
    assert_eq!(marks.count(), 2);
}

/// An error in the earlier one counts too, as in the kernel
#[test]
fn every_one_of_equal_attributes_is_checked() {
    let message = packet();
    let offset = message.offset();
    let bytes = message
        .attr(NFQA_MARK, [1])
        .attr(NFQA_MARK, [0, 0, 0, 2])
        .build();
    let error = DecodeError::AttributeShort {
        kind: NFQA_MARK,
        within: None,
        offset,
        needed: 4,
        had: 1,
    };
    assert_eq!(Packet::parse(&bytes).unwrap_err(), error);
}

#[test]
fn unknown_attributes_are_reachable_by_number() {
    let unknown = [0, NFQA_MAX + 1, NLA_TYPE_MASK];
    let values: [&[u8]; 3] = [b"zero", b"", b"far"];
    let bytes = packet().attrs(unknown.into_iter().zip(values)).build();
    let packet = Packet::parse(&bytes).unwrap();
    for (kind, value) in unknown.into_iter().zip(values) {
        assert_eq!(packet.attr(kind), Some(value));
        let attr = packet.attrs().last(kind).unwrap();
        assert_eq!((attr.kind, attr.value), (kind, value));
        assert_eq!(
            bytes[ATTRS_OFFSET + attr.offset..][ATTR_HEADER_LEN..][..value.len()],
            *value
        );
    }
    assert_eq!(packet.attr(NFQA_MAX + 2), None);
    assert_eq!(packet.attr(u16::MAX), None);
}

#[test]
fn vlan_in_either_order() {
    let (proto, tci) = (
        attr(NFQA_VLAN_PROTO, &[0x81, 0]),
        attr(NFQA_VLAN_TCI, &[0xa1, 0x23]),
    );
    let unknown = attr(NFQA_VLAN_TCI + 1, &[0; 4]);
    let expected = Vlan {
        proto: 0x8100,
        tci: 0xa123,
    };
    assert_eq!(expected.id(), 0x0123);
    for members in [[&tci, &proto, &unknown], [&unknown, &proto, &tci]] {
        let nested = datagram(members);
        assert_eq!(Vlan::parse(&nested), Ok(expected));
        let bytes = packet().attr(NFQA_VLAN | NLA_F_NESTED, &nested).build();
        assert_eq!(Packet::parse(&bytes).unwrap().vlan(), Some(expected));
    }
}

#[test]
fn length_of_a_hardware_address() {
    const ADDR: [u8; HwAddr::MAX_LEN] = [2, 0, 0xa, 0xff, 5, 6, 7, 8];
    for len in [0, 1, 6, 8, 9, 0x0100, u16::MAX] {
        let hw = wire![len.to_be_bytes(), [0; 2], ADDR];
        assert_eq!(hw.len(), PACKET_HW_LEN);
        let bytes = packet().attr(NFQA_HWADDR, hw).build();
        let addr = Packet::parse(&bytes).unwrap().hw_addr().unwrap();
        assert_eq!(addr.as_bytes(), &ADDR[..ADDR.len().min(usize::from(len))]);
    }
    let bytes = packet()
        .attr(NFQA_HWADDR, wire![6u16.to_be_bytes(), [0; 2], ADDR])
        .build();
    let addr = Packet::parse(&bytes).unwrap().hw_addr().unwrap();
    assert_eq!(addr.to_string(), "02:00:0a:ff:05:06");
}

#[test]
fn every_attribute() {
    let bytes = full_packet();
    let packet = Packet::parse(&bytes).unwrap();
    let mut kinds: Vec<u16> = packet.attrs().map(|attr| attr.unwrap().kind).collect();
    kinds.sort_unstable();
    assert_eq!(
        kinds,
        Vec::from_iter(1..=NFQA_MAX),
        "this test lacks an attribute"
    );

    assert_eq!(packet.family(), Family::BRIDGE);
    assert_eq!(
        (packet.id(), packet.hw_protocol().0, packet.hook()),
        (ID, 0x0800, Hook::OUTPUT)
    );
    assert_eq!(packet.attr(NFQA_VERDICT_HDR), Some(&b"verdict header"[..]));
    assert_eq!(packet.mark(), 0xf000_0003);
    let timestamp = Duration::from_secs(1 << 32 | 2) + Duration::from_micros(3);
    assert_eq!(packet.timestamp(), Some(timestamp));
    assert_eq!(packet.indev(), Some(5));
    assert_eq!(packet.outdev(), Some(6));
    assert_eq!(packet.physindev(), Some(7));
    assert_eq!(packet.physoutdev(), Some(8));
    assert_eq!(packet.hw_addr().unwrap().as_bytes(), [1, 2, 3, 4, 5, 6]);
    assert_eq!(packet.payload(), b"payload");
    assert_eq!(
        packet.conntrack().map(|entry| entry.as_bytes()),
        Some(&b"conntrack"[..])
    );
    assert_eq!(packet.ct_state().map(|state| state.0), Some(2));
    assert_eq!(packet.len(), Some(0xffff));
    assert!(packet.is_truncated());
    let unknown = SkbInfo::from_bits_retain(0x80);
    assert_eq!(
        packet.skb_info(),
        SkbInfo::CSUM_NOT_READY | SkbInfo::GSO | unknown
    );
    assert_eq!(packet.expectation(), Some(&b"expectation"[..]));
    assert_eq!(packet.uid(), Some(1000));
    assert_eq!(packet.gid(), Some(1001));
    assert_eq!(packet.security_context(), Some(&b"context\0"[..]));
    assert_eq!(
        packet.vlan(),
        Some(Vlan {
            proto: 0x8100,
            tci: 0xa123
        })
    );
    assert_eq!(packet.l2_header(), Some(&b"l2 header"[..]));
    assert_eq!(packet.priority(), 21);
    assert_eq!(packet.cgroup_classid(), Some(0x0010_0001));
}

#[test]
fn absent_attributes() {
    let bytes = packet().build();
    let packet = Packet::parse(&bytes).unwrap();
    for Be32 { kind, get, absent } in BE32 {
        assert_eq!(get(&packet), absent, "attribute {kind}");
    }
    assert_eq!(packet.timestamp(), None);
    assert_eq!(packet.hw_addr(), None);
    assert_eq!(packet.payload(), b"");
    assert_eq!(packet.conntrack().map(|entry| entry.as_bytes()), None);
    assert_eq!((packet.len(), packet.is_truncated()), (None, false));
    assert_eq!(packet.expectation(), None);
    assert_eq!(packet.security_context(), None);
    assert_eq!(packet.vlan(), None);
    assert_eq!(packet.l2_header(), None);
    for kind in (0..=NFQA_MAX + 1).filter(|&kind| kind != NFQA_PACKET_HDR) {
        assert_eq!(packet.attr(kind), None, "attribute {kind}");
    }
}

/// One byte less is an error; a later kernel may send more
#[test]
fn attributes_of_fixed_size() {
    for (kind, needed) in fixed_sizes() {
        let message = |had| packet().attr(kind, vec![0; had]).build();
        for had in 0..needed {
            let offset = packet().offset();
            let error = DecodeError::AttributeShort {
                kind,
                within: None,
                offset,
                needed,
                had,
            };
            assert_eq!(Packet::parse(&message(had)).unwrap_err(), error);
        }
        for had in [needed, needed + 1] {
            let bytes = message(had);
            assert_eq!(
                Packet::parse(&bytes).unwrap().attr(kind),
                Some(&vec![0; had][..])
            );
        }
    }
}

/// The slices outlive the view, and the view is `Copy`
#[test]
fn slices_borrow_the_buffer() {
    fn slices(bytes: &[u8]) -> [&[u8]; 6] {
        let packet = Packet::parse(bytes).expect("full_packet is one");
        let copy = packet;
        let unwrap = |slice: Option<_>| slice.expect("full_packet has it");
        [
            packet.as_bytes(),
            copy.payload(),
            unwrap(packet.conntrack().map(|entry| entry.as_bytes())),
            unwrap(packet.l2_header()),
            unwrap(packet.security_context()),
            unwrap(packet.attrs().last(NFQA_EXP).map(|attr| attr.value)),
        ]
    }
    let bytes = full_packet();
    let room = bytes.as_ptr_range();
    for slice in slices(&bytes) {
        assert!(!slice.is_empty());
        assert!(slice.as_ptr() >= room.start && slice.as_ptr_range().end <= room.end);
    }
}

/// A truncated message names its packet if it includes the whole packet header
#[test]
fn peek_into_a_truncated_message() {
    let bytes = full_packet();
    let key = Packet::parse(&bytes).unwrap().key();
    let enough = packet().build().len();
    for len in 0..=bytes.len() {
        assert_eq!(
            PacketKey::peek(&bytes[..len]),
            (len >= enough).then_some(key),
            "{len} bytes"
        );
    }
}

/// The view keeps offsets in 16 bits, and must find even the last attribute of the longest message
#[test]
fn longest_message() {
    const MAX: usize = (u16::MAX as usize + 1) * 4;
    let marker = NFQA_SECCTX;
    let mut bytes = packet().build();
    common::pad(&mut bytes);
    while bytes.len() + ATTR_HEADER_LEN < MAX {
        let value_len = (MAX - bytes.len() - 2 * ATTR_HEADER_LEN).min(MAX_PAYLOAD / 4 * 4);
        bytes.extend(attr(NFQA_MAX + 1, &vec![0; value_len]));
    }
    bytes.extend(attr(marker, b""));
    assert_eq!(bytes.len(), MAX);
    let packet = Packet::parse(&bytes).unwrap();
    assert_eq!(packet.security_context(), Some(&b""[..]));
    assert_eq!(
        packet.security_context().unwrap().as_ptr(),
        bytes.as_ptr_range().end
    );

    bytes.push(0);
    let error = DecodeError::TooLong {
        had: MAX + 1,
        max: MAX,
    };
    assert_eq!(Packet::parse(&bytes).unwrap_err(), error);
}

#[test]
fn length_of_a_packet() {
    let payload = b"payload";
    for (message, len, is_truncated) in [
        (packet(), None, false),
        (packet().attr(NFQA_PAYLOAD, b""), Some(0), false),
        (packet().attr(NFQA_PAYLOAD, payload), Some(7), false),
        (
            packet()
                .attr(NFQA_CAP_LEN, [0, 0, 1, 0])
                .attr(NFQA_PAYLOAD, payload),
            Some(256),
            true,
        ),
        (
            packet()
                .attr(NFQA_CAP_LEN, [0xff; 4])
                .attr(NFQA_PAYLOAD, payload),
            usize::try_from(u32::MAX).ok(),
            true,
        ),
    ] {
        let bytes = message.build();
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!((packet.len(), packet.is_truncated()), (len, is_truncated));
    }
}
