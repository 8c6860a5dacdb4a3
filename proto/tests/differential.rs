//! Comparison with other crates
//!
//! netlink-packet-core ("the oracle" below) reads and writes the same headers and attributes, and
//! libc has the same numbers.

mod common;

use common::{attr, config, datagram, pad, padded, wire};
use netlink_packet_core::{
    DefaultNla, Emitable, ErrorMessage, NetlinkBuffer, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable, NlasIterator,
};
use nfqnl_proto::consts::*;
use nfqnl_proto::{
    Attrs, ConfigRequest, CopyMode, DecodeError, EncodeError, Message, Messages, Packet,
    PlainVerdict, QueueConfig, RequestHeader, Verdict, Vlan, encode_noop,
};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::Index;
use std::convert::Infallible;
use std::num::NonZeroI32;

/// An inner message for the oracle: any bytes
#[derive(Clone, Debug, PartialEq)]
struct Raw {
    kind: u16,
    body: Vec<u8>,
}

impl NetlinkSerializable for Raw {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.body.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.body);
    }
}

impl NetlinkDeserializable for Raw {
    type Error = Infallible;

    fn deserialize(header: &NetlinkHeader, body: &[u8]) -> Result<Self, Infallible> {
        Ok(Self {
            kind: header.message_type,
            body: body.to_vec(),
        })
    }
}

/// Encodes a message with the oracle
fn emit<M: NetlinkSerializable>(
    payload: NetlinkPayload<M>,
    flags: u16,
    seq: u32,
    pid: u32,
) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = seq;
    header.port_number = pid;
    let mut message = NetlinkMessage::new(header, payload);
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// Encodes attributes with the oracle, which pads every one
fn emit_attrs(attrs: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let attrs = attrs
        .iter()
        .map(|(kind, value)| DefaultNla::new(*kind, value.clone()));
    let attrs: Vec<_> = attrs.collect();
    let mut bytes = vec![0; attrs.as_slice().buffer_len()];
    attrs.as_slice().emit(&mut bytes);
    bytes
}

/// The number and value of each attribute; `None` for a broken one
type Walked = Vec<Option<(u16, Vec<u8>)>>;

fn ours(bytes: &[u8]) -> Walked {
    Attrs::new(bytes)
        .map(|attr| attr.ok().map(|attr| (attr.kind, attr.value.to_vec())))
        .collect()
}

fn theirs(bytes: &[u8]) -> Walked {
    let mut end = 0;
    let mut walked = Walked::new();
    for nla in NlasIterator::new(bytes) {
        // The oracle reports up to three stray bytes at the end; the kernel and this crate do not.
        if bytes.len() - end < ATTR_HEADER_LEN {
            assert!(nla.is_err());
            break;
        }
        walked.push(nla.ok().map(|nla| {
            end = (end + padded(usize::from(nla.length()))).min(bytes.len());
            (nla.kind(), nla.value().to_vec())
        }));
    }
    walked
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..24)
}

fn attrs() -> impl Strategy<Value = Vec<(u16, Vec<u8>)>> {
    vec((any::<u16>(), bytes()), 0..8)
}

/// Attributes, some with a damaged length, some truncated
fn attr_bytes() -> impl Strategy<Value = Vec<u8>> {
    let damage = option::weighted(0.3, (0..64u16, any::<Index>()));
    (attrs(), damage, option::weighted(0.3, any::<Index>())).prop_map(|(attrs, damage, cut)| {
        let mut attrs: Vec<_> = attrs
            .iter()
            .map(|(kind, value)| attr(*kind, value))
            .collect();
        if let Some((len, at)) = damage.filter(|_| !attrs.is_empty()) {
            at.get_mut(&mut attrs)[..size_of_val(&len)].copy_from_slice(&len.to_ne_bytes());
        }
        let mut bytes = datagram(attrs);
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len() + 1));
        }
        bytes
    })
}

/// The types known to the crate, and any other type
fn message_types() -> impl Strategy<Value = u16> {
    let known = [
        NLMSG_NOOP,
        NLMSG_ERROR,
        NLMSG_DONE,
        NLMSG_OVERRUN,
        message_type(NFQNL_MSG_PACKET),
        message_type(NFQNL_MSG_VERDICT),
    ];
    prop_oneof![3 => prop::sample::select(known.to_vec()), 1 => any::<u16>()]
}

/// Messages with any body, some with a damaged length, some truncated
fn datagrams() -> impl Strategy<Value = Vec<u8>> {
    let body = prop_oneof![bytes(), attr_bytes().prop_map(|attrs| wire![[0; 4], attrs])];
    let message = (message_types(), any::<(u16, u32, u32)>(), body).prop_map(
        |(kind, (flags, seq, pid), body)| {
            let len = u32::try_from(MESSAGE_HEADER_LEN + body.len()).expect("short");
            wire![len, kind, flags, seq, pid, body]
        },
    );
    let damage = option::weighted(0.2, (0..128u32, any::<Index>()));
    let cut = option::weighted(0.3, any::<Index>());
    (vec(message, 0..6), damage, cut).prop_map(|(mut messages, damage, cut)| {
        if let Some((len, at)) = damage.filter(|_| !messages.is_empty()) {
            at.get_mut(&mut messages)[..size_of_val(&len)].copy_from_slice(&len.to_ne_bytes());
        }
        let mut bytes = datagram(messages);
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len() + 1));
        }
        bytes
    })
}

/// Returns true if the error is about the bounds of the message at `offset`, not about its body
fn is_framing(error: &DecodeError, offset: usize) -> bool {
    match *error {
        DecodeError::Short {
            what, offset: at, ..
        } => what == nfqnl_proto::Header::Message && at == offset,
        DecodeError::Truncated { offset: at, .. }
        | DecodeError::MessageLength { offset: at, .. } => at == offset,
        _ => false,
    }
}

/// Compares one message with the oracle's result
fn assert_same(message: Result<Message<'_>, DecodeError>, oracle: &NetlinkBuffer<&[u8]>) {
    let kind = oracle.message_type();
    match message {
        Ok(Message::Packet(packet)) => {
            assert_eq!(kind, message_type(NFQNL_MSG_PACKET));
            assert_eq!(packet.as_bytes()[MESSAGE_HEADER_LEN..], *oracle.payload());
            let attrs = &oracle.payload()[FAMILY_HEADER_LEN..];
            assert_eq!(ours(attrs), theirs(attrs));
            for (kind, _) in theirs(attrs).into_iter().flatten() {
                let last = NlasIterator::new(attrs).filter_map(Result::ok);
                let last = last.filter(|nla| nla.kind() == kind).last().expect("seen");
                assert_eq!(packet.attr(kind), Some(last.value()));
            }
        }
        Ok(Message::Reply(reply)) => {
            assert_eq!(kind, NLMSG_ERROR);
            let parsed = NetlinkMessage::<Raw>::deserialize(oracle.clone().into_inner());
            let NetlinkPayload::Error(error) = parsed.expect("ours parses").payload else {
                panic!("the oracle found no error");
            };
            assert_eq!(reply.errno, error.raw_code().saturating_neg());
            let request = NetlinkBuffer::new(&error.header[..]);
            assert_eq!(reply.request_type, request.message_type());
            assert_eq!(
                (reply.seq, reply.pid),
                (request.sequence_number(), request.port_number())
            );
        }
        Ok(Message::Overrun) => assert_eq!(kind, NLMSG_OVERRUN),
        Ok(Message::Done) => assert_eq!(kind, NLMSG_DONE),
        Ok(Message::Noop) => assert_eq!(kind, NLMSG_NOOP),
        Ok(Message::Other(other)) => {
            assert_eq!((other.message_type, other.flags), (kind, oracle.flags()));
            assert_eq!(other.body, oracle.payload());
            let known = [NLMSG_NOOP, NLMSG_ERROR, NLMSG_DONE, NLMSG_OVERRUN];
            assert!(!known.contains(&kind) && kind != message_type(NFQNL_MSG_PACKET));
        }
        Ok(new) => panic!("a new kind of message: {new:?}"),
        Err(_) => assert!([NLMSG_ERROR, message_type(NFQNL_MSG_PACKET)].contains(&kind)),
    }
}

/// Decodes a request with the oracle, and checks its header and its attributes
fn assert_request(
    encode: impl Fn(&mut [u8]) -> Result<usize, EncodeError>,
    kind: u16,
    header: RequestHeader,
    expected: Option<Walked>,
) {
    let mut bytes = [0; 256];
    let len = encode(&mut bytes).expect("short");
    let oracle = NetlinkBuffer::new_checked(&bytes[..len]).expect("ours is whole");
    assert_eq!(oracle.length() as usize, len);
    assert_eq!(oracle.message_type(), kind);
    let ack = if header.ack { NLM_F_ACK } else { 0 };
    assert_eq!(oracle.flags(), NLM_F_REQUEST | ack);
    assert_eq!(
        (oracle.sequence_number(), oracle.port_number()),
        (header.seq, header.pid)
    );
    match expected {
        Some(attrs) => assert_eq!(theirs(&oracle.payload()[FAMILY_HEADER_LEN..]), attrs),
        None => assert!(oracle.payload().is_empty()),
    }
}

fn request_headers() -> impl Strategy<Value = RequestHeader> {
    any::<(bool, u32, u32)>().prop_map(|(ack, seq, pid)| RequestHeader { ack, seq, pid })
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn datagrams_split_into_the_same_messages(bytes in datagrams()) {
        let mut messages = Messages::new(&bytes);
        let mut offset = 0;
        while offset < bytes.len() {
            let message = messages.next().expect("bytes are left");
            match NetlinkBuffer::new_checked(&bytes[offset..]) {
                Ok(oracle) => {
                    let end = offset + padded(oracle.length() as usize);
                    prop_assert!(message.as_ref().err().is_none_or(|e| !is_framing(e, offset)));
                    offset = end.min(bytes.len());
                    prop_assert_eq!(messages.rest(), &bytes[offset..]);
                    assert_same(message, &oracle);
                }
                Err(_) => {
                    prop_assert!(is_framing(&message.unwrap_err(), offset));
                    break;
                }
            }
        }
        prop_assert!(messages.next().is_none());
    }

    #[test]
    fn attributes_are_the_same(bytes in prop_oneof![attr_bytes(), vec(any::<u8>(), 0..64)]) {
        prop_assert_eq!(ours(&bytes), theirs(&bytes));
    }

    #[test]
    fn attributes_of_the_oracle_are_read(attrs in attrs()) {
        let bytes = emit_attrs(&attrs);
        let without_flags = |(kind, value)| Some((kind & NLA_TYPE_MASK, value));
        let expected: Walked = attrs.into_iter().map(without_flags).collect();
        prop_assert_eq!(ours(&bytes), expected);
    }

    #[test]
    fn packets_of_the_oracle_are_read(
        queue: u16, id: u32, mark: u32, payload in bytes(), seq: u32, pid: u32,
    ) {
        let body = wire![[2, 0], queue.to_be_bytes(), emit_attrs(&[
            (NFQA_PACKET_HDR, wire![id.to_be_bytes(), [8, 0, 1]]),
            (NFQA_MARK | NLA_F_NET_BYTEORDER, mark.to_be_bytes().to_vec()),
            (NFQA_PAYLOAD, payload.clone()),
        ])];
        let kind = message_type(NFQNL_MSG_PACKET);
        let bytes = emit(NetlinkPayload::InnerMessage(Raw { kind, body }), 0, seq, pid);
        let packet = Packet::parse(&bytes).unwrap();
        prop_assert_eq!((packet.queue(), packet.id(), packet.mark()), (queue, id, mark));
        prop_assert_eq!(packet.payload(), payload);
    }

    /// Acknowledgements (code 0) and errors, some with extended-ack attributes
    #[test]
    fn replies_of_the_oracle_are_read(
        code in prop_oneof![Just(0), any::<i32>()],
        tlvs: bool,
        capped: bool,
        request in (message_types(), any::<(u16, u32, u32)>(), bytes()),
        text in option::of("[a-z ]{1,20}"),
        at: Option<u32>,
    ) {
        let (kind, (flags, seq, pid), body) = request;
        let request = emit(NetlinkPayload::InnerMessage(Raw { kind, body }), flags, seq, pid);
        let mut attrs = Vec::new();
        attrs.extend(text.iter().map(|text| (NLMSGERR_ATTR_MSG, wire![text.as_bytes(), [0]])));
        attrs.extend(at.iter().map(|at| (NLMSGERR_ATTR_OFFS, at.to_ne_bytes().to_vec())));
        let mut echo = if capped { common::echo(&request).to_vec() } else { request };
        pad(&mut echo);
        echo.extend(emit_attrs(&attrs));
        let mut error = ErrorMessage::default();
        error.code = NonZeroI32::new(code);
        error.header = echo;
        let flags = [(tlvs, NLM_F_ACK_TLVS), (capped, NLM_F_CAPPED)];
        let flags = flags.into_iter().filter(|flag| flag.0).fold(0, |all, flag| all | flag.1);
        let bytes = emit::<Raw>(NetlinkPayload::Error(error), flags, 0, 0);

        let Some(Ok(Message::Reply(reply))) = Messages::new(&bytes).next() else {
            panic!("no reply");
        };
        prop_assert_eq!(reply.errno, code.saturating_neg());
        prop_assert_eq!(reply.is_ack(), code == 0);
        prop_assert_eq!((reply.request_type, reply.seq, reply.pid), (kind, seq, pid));
        prop_assert_eq!(reply.text, text.as_deref().filter(|_| tlvs).map(str::as_bytes));
        prop_assert_eq!(reply.offset, at.filter(|_| tlvs));
    }

    #[test]
    fn requests_are_read_by_the_oracle(
        header in request_headers(), id: u32, mark: u32, vlan: (u16, u16), payload in bytes(),
    ) {
        let be32 = |kind, value: u32| Some((kind, value.to_be_bytes().to_vec()));
        let verdict_hdr = (
            NFQA_VERDICT_HDR,
            [NF_ACCEPT, id].map(u32::to_be_bytes).concat(),
        );
        let (proto, tci) = vlan;
        let members = [(NFQA_VLAN_PROTO, proto), (NFQA_VLAN_TCI, tci)];
        let members = members.map(|(kind, value)| (kind, value.to_be_bytes().to_vec()));

        assert_request(|buf| encode_noop(buf, header), NLMSG_NOOP, header, None);

        let decision =
            Verdict::Accept.with_mark(mark).with_vlan(Vlan { proto, tci }).with_payload(&payload);
        assert_request(
            |buf| decision.encode(buf, 1, id, header),
            message_type(NFQNL_MSG_VERDICT),
            header,
            Some(vec![
                Some(verdict_hdr.clone()),
                be32(NFQA_MARK, mark),
                Some((NFQA_VLAN, emit_attrs(&members))),
                Some((NFQA_PAYLOAD, payload.clone())),
            ]),
        );

        let plain = PlainVerdict::new(Verdict::Accept).with_mark(mark);
        let attrs = vec![Some(verdict_hdr), be32(NFQA_MARK, mark)];
        assert_request(
            |buf| plain.encode(buf, 1, id, header),
            message_type(NFQNL_MSG_VERDICT),
            header,
            Some(attrs.clone()),
        );
        assert_request(
            |buf| plain.encode_batch(buf, 1, id, header),
            message_type(NFQNL_MSG_VERDICT_BATCH),
            header,
            Some(attrs),
        );

        let settings = QueueConfig::new().copy_mode(CopyMode::Packet, id).maxlen(mark);
        assert_request(
            |buf| ConfigRequest::bind(1, settings).encode(buf, header),
            message_type(NFQNL_MSG_CONFIG),
            header,
            Some(vec![
                Some((NFQA_CFG_CMD, vec![NFQNL_CFG_CMD_BIND, 0, 0, 0])),
                Some((NFQA_CFG_PARAMS, wire![id.to_be_bytes(), [NFQNL_COPY_PACKET]])),
                be32(NFQA_CFG_QUEUE_MAXLEN, mark),
            ]),
        );
    }
}

/// Comparison with the numbers and sizes in libc, which lacks `NFQA_CGROUP_CLASSID`,
/// `NLMSGERR_ATTR_*` and the structs of netfilter
#[cfg(target_os = "linux")]
mod numbers {
    use nfqnl_proto::consts::*;
    use nfqnl_proto::{ConfigFlags, Family, Hook, SkbInfo};

    macro_rules! assert_equal {
        ($($ours:expr, $name:ident;)*) => {
            $(assert_eq!(i64::from($ours), i64::from(libc::$name), stringify!($name));)*
        };
    }

    macro_rules! assert_same_name {
        ($($name:ident)*) => { assert_equal!($($name, $name;)*) };
    }

    #[test]
    fn constants() {
        assert_same_name! {
            NETLINK_NETFILTER NFNL_SUBSYS_QUEUE
            NLMSG_NOOP NLMSG_ERROR NLMSG_DONE NLMSG_OVERRUN NLMSG_MIN_TYPE
            NLM_F_REQUEST NLM_F_ACK NLM_F_ECHO NLM_F_CAPPED NLM_F_ACK_TLVS
            NLA_F_NESTED NLA_F_NET_BYTEORDER
            NFQNL_MSG_PACKET NFQNL_MSG_VERDICT NFQNL_MSG_CONFIG NFQNL_MSG_VERDICT_BATCH
            NFQA_PACKET_HDR NFQA_VERDICT_HDR NFQA_MARK NFQA_TIMESTAMP NFQA_IFINDEX_INDEV
            NFQA_IFINDEX_OUTDEV NFQA_IFINDEX_PHYSINDEV NFQA_IFINDEX_PHYSOUTDEV NFQA_HWADDR
            NFQA_PAYLOAD NFQA_CT NFQA_CT_INFO NFQA_CAP_LEN NFQA_SKB_INFO NFQA_EXP NFQA_UID NFQA_GID
            NFQA_SECCTX NFQA_VLAN NFQA_L2HDR NFQA_PRIORITY
            NFQA_VLAN_PROTO NFQA_VLAN_TCI
            NFQNL_CFG_CMD_BIND NFQNL_CFG_CMD_UNBIND NFQNL_CFG_CMD_PF_BIND NFQNL_CFG_CMD_PF_UNBIND
            NFQNL_COPY_NONE NFQNL_COPY_META NFQNL_COPY_PACKET
            NFQA_CFG_CMD NFQA_CFG_PARAMS NFQA_CFG_QUEUE_MAXLEN NFQA_CFG_MASK NFQA_CFG_FLAGS
            NFQA_CFG_F_FAIL_OPEN NFQA_CFG_F_CONNTRACK NFQA_CFG_F_GSO NFQA_CFG_F_UID_GID
            NFQA_CFG_F_SECCTX
            NFQA_SKB_CSUMNOTREADY NFQA_SKB_GSO NFQA_SKB_CSUM_NOTVERIFIED
            NF_DROP NF_ACCEPT NF_STOLEN NF_QUEUE NF_REPEAT NF_STOP
            NF_VERDICT_MASK NF_VERDICT_FLAG_QUEUE_BYPASS NF_VERDICT_QBITS
            NF_INET_PRE_ROUTING NF_INET_LOCAL_IN NF_INET_FORWARD NF_INET_LOCAL_OUT
            NF_INET_POST_ROUTING
            NFPROTO_UNSPEC NFPROTO_IPV4 NFPROTO_ARP NFPROTO_BRIDGE NFPROTO_IPV6
        }
        assert_eq!(NFQA_CGROUP_CLASSID, 22);
        assert_eq!([NLMSGERR_ATTR_MSG, NLMSGERR_ATTR_OFFS], [1, 2]);
    }

    #[test]
    fn sizes() {
        assert_eq!(MESSAGE_HEADER_LEN, size_of::<libc::nlmsghdr>());
        assert_eq!(ERROR_LEN, size_of::<libc::nlmsgerr>());
        assert_eq!(ATTR_HEADER_LEN, size_of::<libc::nlattr>());
        let step = usize::try_from(libc::NLA_ALIGNTO).unwrap();
        for len in 0..=2 * step {
            assert_eq!(align(len), len.next_multiple_of(step));
        }
    }

    #[test]
    fn types() {
        assert_equal! {
            Family::UNSPEC.0, NFPROTO_UNSPEC;
            Family::INET.0, NFPROTO_IPV4;
            Family::ARP.0, NFPROTO_ARP;
            Family::BRIDGE.0, NFPROTO_BRIDGE;
            Family::INET6.0, NFPROTO_IPV6;
            Family::INET.0, AF_INET;
            Family::INET6.0, AF_INET6;
            Family::BRIDGE.0, AF_BRIDGE;
            Hook::PREROUTING.0, NF_INET_PRE_ROUTING;
            Hook::INPUT.0, NF_INET_LOCAL_IN;
            Hook::FORWARD.0, NF_INET_FORWARD;
            Hook::OUTPUT.0, NF_INET_LOCAL_OUT;
            Hook::POSTROUTING.0, NF_INET_POST_ROUTING;
            Hook::POSTROUTING.0, NF_BR_POST_ROUTING;
            ConfigFlags::FAIL_OPEN.bits(), NFQA_CFG_F_FAIL_OPEN;
            ConfigFlags::CONNTRACK.bits(), NFQA_CFG_F_CONNTRACK;
            ConfigFlags::GSO.bits(), NFQA_CFG_F_GSO;
            ConfigFlags::UID_GID.bits(), NFQA_CFG_F_UID_GID;
            ConfigFlags::SECCTX.bits(), NFQA_CFG_F_SECCTX;
            SkbInfo::CSUM_NOT_READY.bits(), NFQA_SKB_CSUMNOTREADY;
            SkbInfo::GSO.bits(), NFQA_SKB_GSO;
            SkbInfo::CSUM_NOT_VERIFIED.bits(), NFQA_SKB_CSUM_NOTVERIFIED;
        }
    }
}

/// Owned messages, encoded and decoded by the oracle
#[cfg(feature = "netlink-packet-core")]
mod interop {
    use super::*;
    use common::{MessageBuilder, full_packet};
    use nfqnl_proto::interop::QueueMessage;
    use nfqnl_proto::{Decision, Family, PacketKey};

    const KEY: PacketKey = PacketKey::new(0x1122, 0x3344_5566);
    const HEADER: RequestHeader = RequestHeader {
        ack: true,
        seq: 5,
        pid: 6,
    };

    /// Checks that the oracle writes the same bytes as our encoder, and decodes the same message
    #[track_caller]
    fn assert_travels(
        message: QueueMessage,
        encode: impl Fn(&mut [u8], RequestHeader) -> Result<usize, EncodeError>,
    ) {
        let mut direct = vec![0; MESSAGE_HEADER_LEN + message.buffer_len()];
        assert_eq!(encode(&mut direct, HEADER), Ok(direct.len()));
        let payload = NetlinkPayload::InnerMessage(message.clone());
        let flags = NLM_F_REQUEST | NLM_F_ACK;
        assert_eq!(emit(payload, flags, HEADER.seq, HEADER.pid), direct);

        let read = NetlinkMessage::<QueueMessage>::deserialize(&direct).expect("it is whole");
        assert_eq!(read.header.sequence_number, HEADER.seq);
        assert_eq!(read.payload, NetlinkPayload::InnerMessage(message));
    }

    #[test]
    fn verdict() {
        let payload = [7; 33];
        let decision = Verdict::Accept.with_mark(7).with_payload(&payload);
        assert_travels(
            QueueMessage::verdict(KEY, &decision).unwrap(),
            |buf, header| decision.encode(buf, KEY.queue(), KEY.id(), header),
        );
    }

    #[test]
    fn batch_verdict() {
        let verdict = PlainVerdict::new(Verdict::Drop)
            .with_mark(7)
            .with_priority(8);
        assert_travels(
            QueueMessage::batch_verdict(KEY, &verdict).unwrap(),
            |buf, header| verdict.encode_batch(buf, KEY.queue(), KEY.id(), header),
        );
    }

    #[test]
    fn config_request() {
        let settings = QueueConfig::new().copy_mode(CopyMode::Packet, 0).maxlen(1);
        let request = ConfigRequest::bind(KEY.queue(), settings);
        assert_travels(QueueMessage::config(&request).unwrap(), |buf, header| {
            request.encode(buf, header)
        });
    }

    #[test]
    fn packet() {
        let body = full_packet().split_off(MESSAGE_HEADER_LEN);
        let kind = message_type(NFQNL_MSG_PACKET);
        let raw = NetlinkPayload::InnerMessage(Raw { kind, body });
        let bytes = emit(raw, NLM_F_ACK, HEADER.seq, HEADER.pid);
        let read = NetlinkMessage::<QueueMessage>::deserialize(&bytes).unwrap();
        let NetlinkPayload::InnerMessage(ref message) = read.payload else {
            panic!("{read:?}");
        };
        assert_eq!(message.packet().unwrap().as_bytes(), bytes);
        assert_eq!(message.body(), &bytes[MESSAGE_HEADER_LEN..]);
        assert_eq!(emit(read.payload, NLM_F_ACK, HEADER.seq, HEADER.pid), bytes);
    }

    #[test]
    fn only_packets_are_packets() {
        let message = QueueMessage::verdict(KEY, &Verdict::Drop.into()).unwrap();
        assert!(message.packet().is_none());
    }

    #[test]
    fn broken_packet_is_refused() {
        let bytes = MessageBuilder::packet(Family::INET, 1).build();
        let error = NetlinkMessage::<QueueMessage>::deserialize(&bytes).unwrap_err();
        let expected = DecodeError::MissingAttribute {
            kind: NFQA_PACKET_HDR,
            within: None,
            offset: 0,
        };
        assert!(error.to_string().contains(&expected.to_string()), "{error}");
    }

    #[test]
    fn payload_over_the_limit_is_refused() {
        let payload = vec![0; MAX_PAYLOAD + 1];
        let error =
            QueueMessage::verdict(KEY, &Verdict::Accept.with_payload(&payload)).unwrap_err();
        let (kind, had, max) = (NFQA_PAYLOAD, payload.len(), MAX_PAYLOAD);
        assert_eq!(error, EncodeError::AttributeTooLong { kind, had, max });
    }

    /// Sequence number and port id belong to the header, which the oracle keeps
    #[test]
    fn equality_ignores_the_header() {
        let verdict = |id| QueueMessage::verdict(KEY.with_id(id), &Decision::new(Verdict::Drop));
        let (one, other) = (verdict(1).unwrap(), verdict(2).unwrap());
        let arrived = |seq| {
            let bytes = emit(
                NetlinkPayload::InnerMessage(one.clone()),
                NLM_F_REQUEST,
                seq,
                0,
            );
            NetlinkMessage::<QueueMessage>::deserialize(&bytes)
                .unwrap()
                .payload
        };
        assert_eq!(arrived(1), arrived(2));
        assert_ne!(arrived(1), NetlinkPayload::InnerMessage(other));

        // A batch verdict has the body of a verdict, and differs only in the type.
        let key = KEY.with_id(1);
        let batch = QueueMessage::batch_verdict(key, &PlainVerdict::new(Verdict::Drop)).unwrap();
        assert_eq!(batch.body(), one.body());
        assert_ne!(batch, one);
    }
}
