//! Properties for any input: all messages can be read back, and no bytes cause a panic or a loop

mod common;

use common::{
    BE32, Be32, MessageBuilder, attr, config, datagram, echo, fixed_sizes, full_packet, packet,
    pad, padded, walk, wire,
};
use nfqnl_proto::consts::*;
use nfqnl_proto::{
    Attrs, ConfigFlags, ConfigRequest, CopyMode, Decision, DecodeError, EncodeError, Family,
    Header, HwAddr, Message, Messages, Packet, PacketKey, PlainVerdict, QueueConfig, RequestHeader,
    UnknownVerdict, Verdict, Vlan,
};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::Index;
use std::time::Duration;

/// Attributes: type with flags, and value
type AttrList = Vec<(u16, Vec<u8>)>;

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..24)
}

fn type_flags() -> impl Strategy<Value = u16> {
    prop::sample::select(vec![
        0,
        NLA_F_NESTED,
        NLA_F_NET_BYTEORDER,
        NLA_F_NESTED | NLA_F_NET_BYTEORDER,
    ])
}

/// A valid value for an attribute with this number
fn value(kind: u16) -> BoxedStrategy<Vec<u8>> {
    if kind == NFQA_VLAN {
        let member = |kind| bytes().prop_map(move |more| attr(kind, &wire![[0x81, 0x23], more]));
        let members = (
            member(NFQA_VLAN_PROTO),
            member(NFQA_VLAN_TCI),
            member(NFQA_VLAN_TCI + 1),
        );
        return members
            .prop_map(|(proto, tci, unknown)| vec![proto, tci, unknown])
            .prop_shuffle()
            .prop_map(datagram)
            .boxed();
    }
    let least = fixed_sizes()
        .find(|size| size.0 == kind)
        .map_or(0, |(_, size)| size);
    vec(any::<u8>(), least..least + 24).boxed()
}

/// Valid attributes in any order: repeated, unknown, with flags, longer than needed
fn attrs() -> impl Strategy<Value = AttrList> {
    let kind = prop_oneof![4 => 0..=NFQA_MAX + 2, 1 => 0..=NLA_TYPE_MASK];
    let attr = kind.prop_flat_map(|kind| (Just(kind), type_flags(), value(kind)));
    vec(
        attr.prop_map(|(kind, flags, value)| (kind | flags, value)),
        0..16,
    )
}

/// A valid packet message, and its attributes
fn packets() -> impl Strategy<Value = (Vec<u8>, AttrList)> {
    let header = (
        any::<u8>(),
        any::<u16>(),
        value(NFQA_PACKET_HDR),
        any::<Index>(),
    );
    (header, attrs()).prop_map(|((family, queue, header, at), mut attrs)| {
        attrs.insert(at.index(attrs.len() + 1), (NFQA_PACKET_HDR, header));
        let message = MessageBuilder::packet(Family(family), queue);
        (message.attrs(attrs.clone()).build(), attrs)
    })
}

/// A message with a valid length
fn messages() -> impl Strategy<Value = Vec<u8>> {
    let error = (
        any::<u16>(),
        any::<i32>(),
        vec(any::<u8>(), MESSAGE_HEADER_LEN),
        attrs(),
    );
    let other = (any::<u16>(), any::<u16>(), bytes());
    prop_oneof![
        packets().prop_map(|(message, _)| message),
        error.prop_map(|(flags, code, request, attrs)| {
            MessageBuilder::error(flags, code, &request)
                .attrs(attrs)
                .build()
        }),
        other.prop_map(|(kind, flags, body)| MessageBuilder::new(kind, flags).field(body).build()),
    ]
}

/// Compares every getter with an independent reading of the packet's bytes
#[track_caller]
fn assert_getters_agree(packet: &Packet<'_>) {
    let message = packet.as_bytes();
    assert_eq!(packet.family().0, message[MESSAGE_HEADER_LEN]);
    assert_eq!(
        packet.queue().to_be_bytes(),
        message[MESSAGE_HEADER_LEN + 2..][..2]
    );

    let walked = walk(&message[ATTRS_OFFSET..]);
    let last = |kind| {
        walked
            .iter()
            .rfind(|attr| attr.0 & NLA_TYPE_MASK == kind)
            .map(|attr| attr.1)
    };
    let present = walked.iter().map(|attr| attr.0 & NLA_TYPE_MASK);
    for kind in present.clone().chain(0..=NFQA_MAX + 1) {
        assert_eq!(packet.attr(kind), last(kind), "attribute {kind}");
    }
    let seen = packet
        .attrs()
        .map(|attr| attr.expect("parse saw all of them"));
    assert!(seen.clone().map(|attr| attr.kind).eq(present));
    for attr in seen {
        assert_eq!(
            message[ATTRS_OFFSET + attr.offset..][ATTR_HEADER_LEN..].as_ptr(),
            attr.value.as_ptr()
        );
    }

    let header = last(NFQA_PACKET_HDR).expect("parse saw it");
    assert_eq!(packet.id().to_be_bytes(), header[..4]);
    assert_eq!(packet.hw_protocol().0.to_be_bytes(), header[4..6]);
    assert_eq!(packet.hook().0, header[6]);
    let key = PacketKey::new(packet.queue(), packet.id());
    assert_eq!(packet.key(), key);
    assert_eq!(packet.with_binding(3).key(), key.with_binding(3));

    for Be32 { kind, get, absent } in BE32 {
        let value = last(kind).map(|value| u32::from_be_bytes(*value.first_chunk().expect("4")));
        assert_eq!(get(packet), value.or(absent), "attribute {kind}");
    }
    let payload_len = last(NFQA_PAYLOAD).map(<[u8]>::len);
    let original_len = last(NFQA_CAP_LEN)
        .map(|value| u32::from_be_bytes(*value.first_chunk().expect("4")) as usize);
    assert_eq!(packet.len(), original_len.or(payload_len));
    assert_eq!(packet.is_truncated(), original_len.is_some());
    let timestamp = last(NFQA_TIMESTAMP).map(|value| {
        let [seconds, micros] = [0, 8].map(|at| *value[at..].first_chunk().expect("8"));
        let seconds = Duration::from_secs(u64::from_be_bytes(seconds));
        seconds.saturating_add(Duration::from_micros(u64::from_be_bytes(micros)))
    });
    assert_eq!(packet.timestamp(), timestamp);
    let addr = last(NFQA_HWADDR).map(|value| {
        let len = u16::from_be_bytes([value[0], value[1]]);
        &value[4..][..usize::from(len).min(HwAddr::MAX_LEN)]
    });
    assert_eq!(packet.hw_addr().as_ref().map(HwAddr::as_bytes), addr);
    let vlan = last(NFQA_VLAN).map(|nested| {
        let members = walk(nested);
        let member = |kind| {
            let attr = members
                .iter()
                .rfind(|attr| attr.0 & NLA_TYPE_MASK == kind)
                .expect("both");
            u16::from_be_bytes(*attr.1.first_chunk().expect("2"))
        };
        Vlan {
            proto: member(NFQA_VLAN_PROTO),
            tci: member(NFQA_VLAN_TCI),
        }
    });
    assert_eq!(packet.vlan(), vlan);
    assert_eq!(packet.payload(), last(NFQA_PAYLOAD).unwrap_or_default());
    assert_eq!(
        packet.conntrack().map(|entry| entry.as_bytes()),
        last(NFQA_CT)
    );
    assert_eq!(packet.expectation(), last(NFQA_EXP));
    assert_eq!(packet.security_context(), last(NFQA_SECCTX));
    assert_eq!(packet.l2_header(), last(NFQA_L2HDR));

    let debug = format!("{packet:?} {:?} {:?}", packet.hw_addr(), packet.attrs());
    assert!(
        debug.contains(&format!("payload_len: {}", packet.payload().len())),
        "{debug}"
    );
}

/// Reads any bytes with every parser of the crate
#[track_caller]
fn assert_reads(bytes: &[u8]) {
    let most = bytes.len() / MESSAGE_HEADER_LEN + 1;
    let messages: Vec<_> = Messages::new(bytes).take(most + 1).collect();
    assert!(messages.len() <= most, "no end");
    assert_eq!(messages.is_empty(), bytes.is_empty());
    for message in messages {
        match message {
            Ok(Message::Packet(packet)) => assert_getters_agree(&packet),
            Ok(Message::Reply(reply)) => {
                assert_eq!(reply.is_ack(), reply.errno == 0);
                assert!(
                    reply
                        .text
                        .is_none_or(|text| !text.is_empty() && !text.contains(&0))
                );
                assert!(format!("{reply:?}").contains("errno"));
            }
            Ok(other) => assert!(!format!("{other:?}").is_empty()),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }

    let most = bytes.len() / ATTR_HEADER_LEN + 1;
    let attrs: Vec<_> = Attrs::new(bytes).take(most + 1).collect();
    assert!(attrs.len() <= most, "no end");
    let broken = attrs.iter().position(Result::is_err);
    assert!(
        broken.is_none_or(|at| at + 1 == attrs.len()),
        "nothing behind a broken attribute"
    );

    if let Ok(packet) = Packet::parse(bytes) {
        assert_getters_agree(&packet);
        let headers = packet
            .attrs()
            .filter(|a| a.is_ok_and(|a| a.kind == NFQA_PACKET_HDR));
        if headers.count() == 1 {
            assert_eq!(PacketKey::peek(bytes), Some(packet.key()));
        }
    } else if let Some(key) = PacketKey::peek(bytes) {
        assert_eq!(
            key.queue().to_be_bytes(),
            bytes[MESSAGE_HEADER_LEN + 2..][..2]
        );
    }
    if let Ok(Vlan { proto, tci }) = Vlan::parse(bytes) {
        let last = |kind| {
            Attrs::new(bytes)
                .last(kind)
                .map(|attr| attr.value[..2].to_vec())
        };
        assert_eq!(last(NFQA_VLAN_PROTO), Some(proto.to_be_bytes().to_vec()));
        assert_eq!(last(NFQA_VLAN_TCI), Some(tci.to_be_bytes().to_vec()));
    }
}

/// Truncates a valid packet message to every length, and checks the result
#[track_caller]
fn assert_every_truncation(message: &[u8]) {
    let whole = walk(&message[ATTRS_OFFSET..]);
    for had in 0..message.len() {
        let cut = &message[..had];
        let offset = 0;
        let as_received = match had {
            0 => None,
            1..MESSAGE_HEADER_LEN => Some(DecodeError::Short {
                what: Header::Message,
                offset,
                needed: MESSAGE_HEADER_LEN,
                had,
            }),
            _ => Some(DecodeError::Truncated {
                offset,
                needed: message.len(),
                had,
            }),
        };
        let mut messages = Messages::new(cut);
        assert_eq!(messages.next().map(Result::unwrap_err), as_received);
        assert!(messages.next().is_none());

        match (Packet::parse(cut), expected_of_cut(&whole, had)) {
            (Ok(packet), Ok(count)) => {
                assert_getters_agree(&packet);
                assert_eq!(packet.attrs().count(), count);
            }
            (Err(error), Err(expected)) => assert_eq!(error, expected),
            (parsed, expected) => panic!("{had} bytes: {parsed:?}, expected {expected:?}"),
        }

        // The same bytes with a matching `nlmsg_len`
        let len = u32::try_from(had).expect("short");
        if had >= MESSAGE_HEADER_LEN {
            let relabelled = wire![len, cut[size_of_val(&len)..]];
            let message = Messages::new(&relabelled).next().expect("one message");
            assert_eq!(message.is_ok(), Packet::parse(cut).is_ok());
            assert_reads(&relabelled);
        }
    }
}

/// The number of attributes in the first `had` bytes of a message, or the error
fn expected_of_cut(whole: &[(u16, &[u8])], had: usize) -> Result<usize, DecodeError> {
    if had < ATTRS_OFFSET {
        let (what, offset, needed) = if had < MESSAGE_HEADER_LEN {
            (Header::Message, 0, MESSAGE_HEADER_LEN)
        } else {
            (Header::Family, MESSAGE_HEADER_LEN, FAMILY_HEADER_LEN)
        };
        return Err(DecodeError::Short {
            what,
            offset,
            needed,
            had: had - offset,
        });
    }
    let mut offset = ATTRS_OFFSET;
    let mut header_seen = false;
    let mut count = 0;
    for (kind, value) in whole {
        let (len, left) = (ATTR_HEADER_LEN + value.len(), had.saturating_sub(offset));
        let kind = kind & NLA_TYPE_MASK;
        if left < ATTR_HEADER_LEN {
            break;
        }
        if left < len {
            return Err(DecodeError::AttributeLength {
                kind,
                within: None,
                offset,
                len,
                had: left,
            });
        }
        header_seen |= kind == NFQA_PACKET_HDR;
        count += 1;
        offset += padded(len);
    }
    if header_seen {
        Ok(count)
    } else {
        Err(DecodeError::MissingAttribute {
            kind: NFQA_PACKET_HDR,
            within: None,
            offset: 0,
        })
    }
}

#[test]
fn every_truncation_of_a_full_packet() {
    assert_every_truncation(&full_packet());
}

/// A truncated error message has fewer attributes, or is too short
#[test]
fn every_truncation_of_an_error() {
    let request = packet().build();
    let message = MessageBuilder::error(NLM_F_CAPPED | NLM_F_ACK_TLVS, -22, echo(&request))
        .attr(NLMSGERR_ATTR_MSG, b"text\0")
        .attr(NLMSGERR_ATTR_OFFS, 20u32.to_ne_bytes())
        .build();
    let fixed = MESSAGE_HEADER_LEN + size_of::<i32>() + MESSAGE_HEADER_LEN;
    let with_text = fixed + ATTR_HEADER_LEN + b"text\0".len();
    for had in MESSAGE_HEADER_LEN..=message.len() {
        let len = u32::try_from(had).unwrap();
        let cut = wire![len, message[size_of_val(&len)..had]];
        match Messages::new(&cut).next() {
            Some(Ok(Message::Reply(reply))) => {
                assert!(had >= fixed);
                assert_eq!(reply.errno, 22);
                assert_eq!(reply.text, (had >= with_text).then_some(&b"text"[..]));
                assert_eq!(reply.offset, (had == message.len()).then_some(20));
            }
            other => assert!(
                had < fixed && matches!(other, Some(Err(_))),
                "{had}: {other:?}"
            ),
        }
        assert_reads(&cut);
    }
}

/// The parts of a decision, owned
#[derive(Clone, Debug)]
struct Parts {
    verdict: Verdict,
    mark: Option<u32>,
    priority: Option<u32>,
    vlan: Option<Vlan>,
    raw: [Option<Vec<u8>>; 4],
}

fn verdicts() -> impl Strategy<Value = Verdict> {
    prop_oneof![
        prop::sample::select(vec![
            Verdict::Drop,
            Verdict::Accept,
            Verdict::Stolen,
            Verdict::Repeat,
            Verdict::Stop,
        ]),
        any::<(u16, bool)>().prop_map(|(num, bypass)| Verdict::Queue { num, bypass }),
    ]
}

fn copy_modes() -> impl Strategy<Value = CopyMode> {
    prop::sample::select(vec![CopyMode::None, CopyMode::Meta, CopyMode::Packet])
}

/// A call that names flags
#[derive(Clone, Copy, Debug, PartialEq)]
enum FlagCall {
    Flags,
    Enable,
    EnableIfSupported,
}

fn flag_calls() -> impl Strategy<Value = FlagCall> {
    let calls = [
        FlagCall::Flags,
        FlagCall::Enable,
        FlagCall::EnableIfSupported,
    ];
    prop::sample::select(calls.to_vec())
}

fn request_headers() -> impl Strategy<Value = RequestHeader> {
    any::<(bool, u32, u32)>().prop_map(|(ack, seq, pid)| RequestHeader { ack, seq, pid })
}

prop_compose! {
    fn parts()(
        verdict in verdicts(),
        mark: Option<u32>,
        priority: Option<u32>,
        vlan: Option<(u16, u16)>,
        raw in prop::array::uniform4(option::of(bytes())),
    ) -> Parts {
        let vlan = vlan.map(|(proto, tci)| Vlan { proto, tci });
        Parts { verdict, mark, priority, vlan, raw }
    }
}

impl Parts {
    const RAW: [u16; 4] = [NFQA_L2HDR, NFQA_CT, NFQA_EXP, NFQA_PAYLOAD];

    fn decision(&self) -> Decision<'_> {
        let mut decision = Decision::new(self.verdict);
        if let Some(mark) = self.mark {
            decision = decision.with_mark(mark);
        }
        if let Some(priority) = self.priority {
            decision = decision.with_priority(priority);
        }
        if let Some(vlan) = self.vlan {
            decision = decision.with_vlan(vlan);
        }
        for (kind, value) in Self::RAW.into_iter().zip(&self.raw) {
            decision = match (kind, value) {
                (NFQA_L2HDR, Some(value)) => decision.with_l2_header(value),
                (NFQA_CT, Some(value)) => decision.with_raw_conntrack(value),
                (NFQA_EXP, Some(value)) => decision.with_expectation(value),
                (_, Some(value)) => decision.with_payload(value),
                (_, None) => decision,
            };
        }
        decision
    }

    fn plain_verdict(&self) -> PlainVerdict {
        let mut verdict = PlainVerdict::new(self.verdict);
        if let Some(mark) = self.mark {
            verdict = verdict.with_mark(mark);
        }
        if let Some(priority) = self.priority {
            verdict = verdict.with_priority(priority);
        }
        verdict
    }

    /// The attributes of the plain verdict
    fn plain_attrs(&self, id: u32) -> AttrList {
        let header = [self.verdict.to_raw(), id].map(u32::to_be_bytes).concat();
        let be32 = |kind, value: Option<u32>| value.map(|v| (kind, v.to_be_bytes().to_vec()));
        let numbers = [
            be32(NFQA_MARK, self.mark),
            be32(NFQA_PRIORITY, self.priority),
        ];
        [(NFQA_VERDICT_HDR, header)]
            .into_iter()
            .chain(numbers.into_iter().flatten())
            .collect()
    }

    fn attrs(&self, id: u32) -> AttrList {
        let mut attrs = self.plain_attrs(id);
        attrs.extend(self.vlan.map(|vlan| {
            let member = |kind, value: u16| {
                let mut member = attr(kind, &value.to_be_bytes());
                pad(&mut member);
                member
            };
            (
                NFQA_VLAN,
                wire![
                    member(NFQA_VLAN_PROTO, vlan.proto),
                    member(NFQA_VLAN_TCI, vlan.tci)
                ],
            )
        }));
        let raw = Self::RAW.into_iter().zip(&self.raw);
        attrs.extend(raw.filter_map(|(kind, value)| Some((kind, value.clone()?))));
        attrs
    }
}

/// Runs an encoder, checks the size needed and the headers, and returns the attributes
fn encoded(
    message: u8,
    queue: u16,
    header: RequestHeader,
    encode: impl Fn(&mut [u8]) -> Result<usize, EncodeError>,
) -> AttrList {
    let Err(EncodeError::NoSpace { needed, had: 0 }) = encode(&mut []) else {
        panic!("no message fits in nothing");
    };
    let mut bytes = vec![0xa5; needed];
    assert_eq!(encode(&mut bytes), Ok(needed));
    let ack = if header.ack { NLM_F_ACK } else { 0 };
    let flags = NLM_F_REQUEST | ack;
    let expected = wire![
        u32::try_from(needed).expect("short"),
        message_type(message),
        flags,
        header.seq,
        header.pid,
        [0, 0],
        queue.to_be_bytes(),
    ];
    let (headers, attrs) = bytes.split_at(ATTRS_OFFSET);
    assert_eq!(headers, expected);
    let attrs = walk(attrs).into_iter();
    attrs
        .map(|(kind, value)| (kind & NLA_TYPE_MASK, value.to_vec()))
        .collect()
}

/// Sorts attributes, because their order does not matter to the kernel
fn sorted(mut attrs: AttrList) -> AttrList {
    attrs.sort();
    attrs
}

/// The decoded message as text, except for the offset of an error
fn apart_from_offset(read: &Result<Message<'_>, DecodeError>) -> String {
    let text = format!("{read:?}");
    match text.split_once("offset: ") {
        Some((before, after)) if read.is_err() => {
            format!("{before}{}", after.trim_start_matches(char::is_numeric))
        }
        _ => text,
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn packets_are_read_as_built((message, attrs) in packets()) {
        let packet = Packet::parse(&message).unwrap();
        prop_assert_eq!(packet.as_bytes(), &message);
        let walked = walk(&message[ATTRS_OFFSET..]).into_iter();
        let walked: AttrList = walked.map(|(kind, value)| (kind, value.to_vec())).collect();
        prop_assert_eq!(walked, attrs);
        assert_getters_agree(&packet);
    }

    #[test]
    fn every_truncation_of_any_packet((message, _) in packets()) {
        assert_every_truncation(&message);
    }

    #[test]
    fn any_bytes_are_read(bytes in vec(any::<u8>(), 0..256)) {
        assert_reads(&bytes);
    }

    /// Any attributes behind a valid header
    #[test]
    fn any_body_is_read(
        kind in prop::sample::select(vec![message_type(NFQNL_MSG_PACKET), NLMSG_ERROR]),
        flags: u16,
        body in vec(prop_oneof![any::<u8>(), 0..32u8], 0..256),
    ) {
        assert_reads(&MessageBuilder::new(kind, flags).field(body).build());
    }

    #[test]
    fn mutated_datagrams_are_read(
        messages in vec(messages(), 1..4),
        changes in vec(any::<(Index, u8)>(), 1..8),
        cut in option::weighted(0.3, any::<Index>()),
    ) {
        let mut bytes = datagram(messages);
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        assert_reads(&bytes);
    }

    /// A broken body does not affect the other messages
    #[test]
    fn damage_inside_a_message_stays_there(
        mut messages in vec(messages(), 1..6),
        damaged: Index,
        changes in vec(any::<(Index, u8)>(), 1..8),
    ) {
        let body = &mut damaged.get_mut(&mut messages)[MESSAGE_HEADER_LEN..];
        for (at, byte) in changes.into_iter().take(body.len()) {
            body[at.index(body.len())] = byte;
        }
        let bytes = datagram(&messages);
        let damaged = damaged.index(messages.len());
        let together: Vec<_> = Messages::new(&bytes).collect();
        prop_assert_eq!(together.len(), messages.len());
        for (at, (message, together)) in messages.iter().zip(together).enumerate() {
            if at != damaged {
                let alone = Messages::new(message).next().unwrap();
                prop_assert_eq!(apart_from_offset(&together), apart_from_offset(&alone));
            }
        }
    }

    #[test]
    fn verdicts_are_written_as_asked(
        parts in parts(), queue: u16, id: u32, header in request_headers(),
    ) {
        let decision = parts.decision();
        let encode = |buf: &mut [u8]| decision.encode(buf, queue, id, header);
        let attrs = encoded(NFQNL_MSG_VERDICT, queue, header, encode);
        prop_assert_eq!(sorted(attrs), sorted(parts.attrs(id)));
        prop_assert!(encode(&mut vec![0; decision.max_len()]).is_ok());
        prop_assert_eq!(decision.verdict(), parts.verdict);
        prop_assert_eq!((decision.mark(), decision.priority()), (parts.mark, parts.priority));
        prop_assert_eq!(decision.vlan(), parts.vlan);
        let raw = [
            decision.l2_header(),
            decision.raw_conntrack(),
            decision.expectation(),
            decision.payload(),
        ];
        prop_assert_eq!(raw, parts.raw.each_ref().map(Option::as_deref));

        let is_plain = parts.vlan.is_none() && parts.raw.iter().all(Option::is_none);
        prop_assert_eq!(decision.as_plain(), is_plain.then(|| parts.plain_verdict()));
    }

    #[test]
    fn plain_verdicts_are_written_as_asked(
        parts in parts(), queue: u16, id: u32, header in request_headers(),
    ) {
        let verdict = parts.plain_verdict();
        let encode = |buf: &mut [u8]| verdict.encode(buf, queue, id, header);
        let attrs = encoded(NFQNL_MSG_VERDICT, queue, header, encode);
        prop_assert_eq!(sorted(attrs), sorted(parts.plain_attrs(id)));
        prop_assert!(encode(&mut [0; PlainVerdict::MAX_LEN]).is_ok());
        prop_assert_eq!(verdict.verdict(), parts.verdict);
    }

    #[test]
    fn batch_verdicts_are_written_as_asked(
        parts in parts(), queue: u16, last: u32, header in request_headers(),
    ) {
        let verdict = parts.plain_verdict();
        let encode = |buf: &mut [u8]| verdict.encode_batch(buf, queue, last, header);
        let attrs = encoded(NFQNL_MSG_VERDICT_BATCH, queue, header, encode);
        prop_assert_eq!(sorted(attrs), sorted(parts.plain_attrs(last)));
        prop_assert!(encode(&mut [0; PlainVerdict::MAX_LEN]).is_ok());
    }

    #[test]
    fn settings_are_written_as_asked(
        bind: bool,
        queue: u16,
        copy in option::of((copy_modes(), any::<u32>())),
        maxlen: Option<u32>,
        flags: Option<(u32, u32)>,
        header in request_headers(),
    ) {
        let mut settings = QueueConfig::new();
        let mut expected = AttrList::new();
        if bind {
            expected.push((NFQA_CFG_CMD, vec![NFQNL_CFG_CMD_BIND, 0, 0, 0]));
        }
        if let Some((mode, range)) = copy {
            settings = settings.copy_mode(mode, range);
            expected.push((NFQA_CFG_PARAMS, wire![range.to_be_bytes(), [mode.to_raw()]]));
        }
        if let Some(maxlen) = maxlen {
            settings = settings.maxlen(maxlen);
            expected.push((NFQA_CFG_QUEUE_MAXLEN, maxlen.to_be_bytes().to_vec()));
        }
        if let Some((mask, flags)) = flags {
            let [mask_bits, flag_bits] = [mask, flags].map(ConfigFlags::from_bits_retain);
            settings = settings.flags(mask_bits, flag_bits);
            expected.push((NFQA_CFG_MASK, mask.to_be_bytes().to_vec()));
            expected.push((NFQA_CFG_FLAGS, (flags & mask).to_be_bytes().to_vec()));
        }
        let request = if bind {
            ConfigRequest::bind(queue, settings)
        } else {
            ConfigRequest::update(queue, settings)
        };
        let encode = |buf: &mut [u8]| request.encode(buf, header);
        prop_assert_eq!(encoded(NFQNL_MSG_CONFIG, queue, header, encode), expected);
        prop_assert!(encode(&mut [0; ConfigRequest::MAX_LEN]).is_ok());
    }

    /// Each bit has the setting of the last call that named it
    #[test]
    fn flags_of_many_calls_add_up(calls in vec((flag_calls(), any::<u32>(), any::<u32>()), 0..6)) {
        let mut settings = QueueConfig::new();
        let mut bits = [None; 32];
        for (call, mask, flags) in calls {
            let [named, on] = [mask, flags].map(ConfigFlags::from_bits_retain);
            settings = match call {
                FlagCall::Flags => settings.flags(named, on),
                FlagCall::Enable => settings.enable(named),
                FlagCall::EnableIfSupported => settings.enable_if_supported(named),
            };
            for (bit, setting) in bits.iter_mut().enumerate() {
                if mask >> bit & 1 == 1 {
                    *setting = Some((call, flags >> bit & 1 == 1));
                }
            }
        }
        let bits_with = |wanted: fn(FlagCall, bool) -> bool| {
            (0..).zip(bits).fold(0, |all, (bit, setting): (u32, _)| {
                all | u32::from(setting.is_some_and(|(call, on)| wanted(call, on))) << bit
            })
        };
        let mask = bits_with(|call, _| call != FlagCall::EnableIfSupported);
        let on = bits_with(|call, on| call == FlagCall::Enable || call == FlagCall::Flags && on);
        let optional = bits_with(|call, _| call == FlagCall::EnableIfSupported);
        let (named, flags) = settings.get_flags().unwrap_or_default();
        prop_assert_eq!((named.bits(), flags.bits()), (mask, on));
        prop_assert_eq!(settings.get_optional_flags().bits(), optional);
    }

    /// A number with a verdict converts back to itself, and any other number is refused
    #[test]
    fn verdict_numbers(
        raw in prop_oneof![
            any::<u32>(),
            0..16u32,
            any::<u16>().prop_map(|n| u32::from(n) << 16 | 3),
        ],
    ) {
        let [_, _, flags, verdict] = raw.to_be_bytes();
        let plain = raw <= NF_STOP && raw != NF_QUEUE;
        let queue = u32::from(verdict) == NF_QUEUE && flags & 0x7f == 0;
        match Verdict::try_from(raw) {
            Ok(verdict) => {
                prop_assert!(plain || queue);
                prop_assert_eq!(verdict.to_raw(), raw);
            }
            Err(error) => {
                prop_assert!(!plain && !queue);
                prop_assert_eq!(error, UnknownVerdict(raw));
            }
        }
    }
}
