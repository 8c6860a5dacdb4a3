//! Messages sent on a copy of the descriptor, and how the kernel answers them

use std::io;

use nfqnl::consts::{
    NFQA_CFG_CMD, NFQA_CFG_QUEUE_MAXLEN, NFQA_MARK, NFQA_VERDICT_HDR, NFQNL_MSG_CONFIG,
    NFQNL_MSG_PACKET, NFQNL_MSG_VERDICT, message_type,
};
use nfqnl::proto::{Message, Messages, PlainVerdict, Reply, RequestHeader};
use nfqnl::{ErrorKind, Event, Operation, PacketKey, RecvBatch, Socket, Verdict};
use nfqnl_testkit::kernel;
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::rules::{Hook, Rule};

use crate::lab::{
    Lab, PORT, QUEUE, is_silent, next_event, next_keys, next_packet, recv_past_the_library,
    send_past_the_library,
};

/// The kernel's text for a short attribute (`lib/nlattr.c`)
const POLICY: &str = "Attribute failed policy validation";

/// Encodes a request about [`QUEUE`] with any attributes, unlike the library's encoders
fn request(message: u8, header: RequestHeader, attrs: &[(u16, &[u8])]) -> Vec<u8> {
    const REQUEST: u16 = 1;
    let mut bytes = vec![0; 4];
    bytes.extend(message_type(message).to_ne_bytes());
    bytes.extend(REQUEST.to_ne_bytes());
    bytes.extend(header.seq.to_ne_bytes());
    bytes.extend(header.pid.to_ne_bytes());
    bytes.extend([0, 0]);
    bytes.extend(QUEUE.to_be_bytes());
    for (kind, value) in attrs {
        let len = u16::try_from(4 + value.len()).unwrap();
        bytes.extend(len.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(*value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    let len = u32::try_from(bytes.len()).unwrap();
    bytes[..4].copy_from_slice(&len.to_ne_bytes());
    bytes
}

/// The header of the library's own verdicts on this packet: it finds the packet of a refusal by it
fn verdict_header(key: PacketKey) -> RequestHeader {
    RequestHeader {
        ack: false,
        seq: key.id(),
        pid: u32::from(key.binding()) << 16 | u32::from(key.queue()),
    }
}

/// Returns the answer in a datagram with one message
#[track_caller]
fn reply(datagram: &[u8]) -> Reply<'_> {
    let mut messages = Messages::new(datagram);
    let first = messages.next().unwrap().unwrap();
    assert!(messages.next().is_none());
    match first {
        Message::Reply(reply) => reply,
        other => panic!("not an answer: {other:?}"),
    }
}

/// The kernel's own `ENOTSUPP`: C has no name for it
#[test]
fn a_packet_message_to_the_kernel_is_refused_by_524() {
    isolated(|| {
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let header = RequestHeader {
            seq: 99,
            ..RequestHeader::default()
        };
        send_past_the_library(&socket, &request(NFQNL_MSG_PACKET, header, &[]));
        let datagram = recv_past_the_library(&socket);
        let reply = reply(&datagram);
        assert_eq!((reply.errno, reply.seq), (524, header.seq));
        assert_eq!(reply.request_type, message_type(NFQNL_MSG_PACKET));
        let error = io::Error::from_raw_os_error(reply.errno);
        assert_eq!(ErrorKind::of(&error), ErrorKind::Unsupported);
    });
}

/// Kernels answer with `EOPNOTSUPP` or with their own `ENOTSUPP`, by version; both mean the same
#[test]
fn an_unknown_command_is_unsupported() {
    isolated(|| {
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let command: [(u16, &[u8]); 1] = [(NFQA_CFG_CMD, &[99, 0, 0, 0])];
        let header = RequestHeader::default();
        send_past_the_library(&socket, &request(NFQNL_MSG_CONFIG, header, &command));
        let datagram = recv_past_the_library(&socket);
        let errno = reply(&datagram).errno;
        assert!([524, libc::EOPNOTSUPP].contains(&errno), "{errno}");
        // No 5.10 has the change, and every 7.2 has it.
        if !kernel::is_at_least(5, 11) || kernel::is_at_least(7, 2) {
            assert_eq!(errno == 524, !kernel::is_at_least(7, 2));
        }
        let error = io::Error::from_raw_os_error(errno);
        assert_eq!(ErrorKind::of(&error), ErrorKind::Unsupported);
    });
}

/// `NETLINK_CAP_ACK`: without it, a refusal would bring the new payload back, and fill the receive
/// buffer
#[test]
fn a_refusal_does_not_repeat_the_payload() {
    isolated(|| {
        const NETLINK_HEADER: usize = 16;
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let header = RequestHeader {
            seq: 98,
            ..RequestHeader::default()
        };
        let payload = [0x45; 10_000];
        let decision = Verdict::Accept.with_payload(&payload);
        let mut buf = vec![0; decision.max_len()];
        let len = decision.encode(&mut buf, QUEUE, 77, header).unwrap();
        assert!(len > payload.len());
        send_past_the_library(&socket, &buf[..len]);
        let datagram = recv_past_the_library(&socket);
        assert_eq!(datagram.len(), NETLINK_HEADER + 4 + NETLINK_HEADER);
        let reply = reply(&datagram);
        assert_eq!((reply.errno, reply.seq), (libc::ENOENT, header.seq));
    });
}

/// `NETLINK_EXT_ACK`
#[test]
fn a_refusal_carries_the_text_of_the_kernel() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let header = RequestHeader::default();
        let short = request(
            NFQNL_MSG_CONFIG,
            header,
            &[(NFQA_CFG_QUEUE_MAXLEN, &[0; 2])],
        );
        send_past_the_library(&socket, &short);
        let datagram = recv_past_the_library(&socket);
        let reply = reply(&datagram);
        assert_eq!(reply.errno, libc::ERANGE);
        assert_eq!(reply.text, Some(POLICY.as_bytes()));
        assert_eq!(reply.offset, Some(20), "the attribute behind both headers");

        // The same for a verdict: the library reports it.
        let mut batch = RecvBatch::default();
        lab.send(b"waits");
        let key = next_packet(&socket, &mut batch).key();
        let accept = [[0, 0, 0, 1], key.id().to_be_bytes()].concat();
        let attrs: [(u16, &[u8]); 2] = [(NFQA_VERDICT_HDR, &accept), (NFQA_MARK, &[0; 2])];
        let short = request(NFQNL_MSG_VERDICT, verdict_header(key), &attrs);
        send_past_the_library(&socket, &short);
        match next_event(&socket, &mut batch) {
            Event::Refused(refusal) => {
                assert_eq!(refusal.packet(), Some(key));
                assert_eq!(refusal.errno(), libc::ERANGE);
                assert_eq!(refusal.kernel_text(), Some(POLICY));
                assert!(refusal.to_string().contains(POLICY), "{refusal}");
            }
            other => panic!("not a refusal: {other:?}"),
        }
        socket.set_verdict(key, Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"waits"[..]));
    });
}

/// For callers with their own order: the verdict covers every waiting packet of every holder
#[test]
fn a_batch_verdict_releases_all_up_to_its_packet() {
    isolated(|| {
        const MARK: u32 = 5;
        let lab = Lab::new();
        let later = lab.tables()[0].chain("later", Hook::Input, 10).unwrap();
        let marked = Rule::new().udp_dport(PORT).mark(MARK, u32::MAX);
        later.add(&marked.counter("marked")).unwrap();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let sender = socket.verdict_sender();
        let mut batch = RecvBatch::default();
        let verdict = PlainVerdict::new(Verdict::Accept).with_mark(MARK);
        let past_the_library = |last: PacketKey| {
            let mut buf = [0; PlainVerdict::MAX_LEN];
            let header = verdict_header(last);
            let len = verdict
                .encode_batch(&mut buf, last.queue(), last.id(), header)
                .unwrap();
            send_past_the_library(&socket, &buf[..len]);
        };
        let by_the_library = |last| socket.set_verdict_up_to(last, verdict).unwrap();
        let by_a_sender = |last| sender.set_verdict_up_to(last, verdict).unwrap();
        let ways: [&dyn Fn(PacketKey); 3] = [&past_the_library, &by_the_library, &by_a_sender];
        for (round, release_up_to) in (1..).zip(ways) {
            lab.send_numbered(0..3);
            let keys = next_keys(&socket, &mut batch, 3);
            release_up_to(keys[1]);
            lab.expect_numbered(0..2);
            assert!(lab.v4.is_silent(), "the third waits");
            assert_eq!(later.count("marked").unwrap(), 2 * round);
            assert!(is_silent(&socket, &mut batch), "nothing was refused");

            release_up_to(keys[1]);
            match next_event(&socket, &mut batch) {
                Event::Refused(refusal) => {
                    assert_eq!(refusal.operation(), Operation::BatchVerdict(keys[1]));
                    assert_eq!(refusal.packet(), Some(keys[1]));
                    assert_eq!(refusal.errno(), libc::ENOENT);
                    assert_eq!(refusal.kind(), ErrorKind::NoSuchPacket);
                }
                other => panic!("not a refusal: {other:?}"),
            }
            assert_eq!(socket.stats().refused_verdicts, round);
            socket.set_verdict(keys[2], Verdict::Accept).unwrap();
            lab.expect_numbered([2]);
        }
        // The kernel accepts any id as the upper end, even without a packet.
        lab.send_numbered(0..3);
        assert_eq!(next_keys(&socket, &mut batch, 3).len(), 3);
        by_the_library(queue.key(1000));
        lab.expect_numbered(0..3);
    });
}
