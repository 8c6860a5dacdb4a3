//! What other code can send on a copy of the handle's descriptor, and what the kernel answers

use std::io;

use nfqnl::consts::{
    NFQA_CFG_CMD, NFQA_CFG_QUEUE_MAXLEN, NFQA_MARK, NFQA_VERDICT_HDR, NFQNL_MSG_CONFIG,
    NFQNL_MSG_PACKET, NFQNL_MSG_VERDICT, message_type,
};
use nfqnl::proto::{BatchVerdict, Message, Messages, Reply, RequestHeader};
use nfqnl::{Event, Handle, Operation, PacketKey, RecvBatch, Situation, Verdict};
use nfqnl_testkit::kernel;
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::rules::{Hook, Rule};

use crate::lab::{
    Lab, PORT, QUEUE, is_silent, next_event, next_packet, recv_past_the_library,
    send_past_the_library,
};

/// What a short attribute is answered with (`lib/nlattr.c`)
const POLICY: &str = "Attribute failed policy validation";

/// A request about [`QUEUE`] that no encoder makes
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

/// The header that the library gives a verdict on this packet, so that it knows a refusal again
fn verdict_header(key: PacketKey) -> RequestHeader {
    RequestHeader {
        ack: false,
        echo: false,
        seq: key.id,
        pid: u32::from(key.binding) << 16 | u32::from(key.queue),
    }
}

/// The one message of a datagram, which is an answer
#[track_caller]
fn reply(datagram: &[u8]) -> Reply<'_> {
    let mut messages = Messages::new(datagram);
    let first = messages.next().unwrap().unwrap();
    assert!(messages.next().is_none());
    match first {
        Message::Reply(reply) => reply,
        other => panic!("no answer, but {other:?}"),
    }
}

/// The kernel's own `ENOTSUPP`, which C has no name for
#[test]
fn a_message_that_is_the_kernels_to_send_is_answered_with_524() {
    isolated(|| {
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let header = RequestHeader {
            seq: 99,
            ..RequestHeader::default()
        };
        send_past_the_library(&handle, &request(NFQNL_MSG_PACKET, header, &[]));
        let datagram = recv_past_the_library(&handle);
        let reply = reply(&datagram);
        assert_eq!((reply.errno, reply.seq), (524, header.seq));
        assert_eq!(reply.request_type, message_type(NFQNL_MSG_PACKET));
        let error = io::Error::from_raw_os_error(reply.errno);
        assert_eq!(Situation::of(&error), Situation::Unsupported);
    });
}

/// As it is named in C or not, which goes by the kernel's last number: both say the same
#[test]
fn a_command_that_the_kernel_does_not_know_is_unsupported() {
    isolated(|| {
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let command: [(u16, &[u8]); 1] = [(NFQA_CFG_CMD, &[99, 0, 0, 0])];
        let header = RequestHeader::default();
        send_past_the_library(&handle, &request(NFQNL_MSG_CONFIG, header, &command));
        let datagram = recv_past_the_library(&handle);
        let errno = reply(&datagram).errno;
        assert!([524, libc::EOPNOTSUPP].contains(&errno), "{errno}");
        // 5.10 ends without the change, and 7.2 begins with it.
        if !kernel::is_at_least(5, 11) || kernel::is_at_least(7, 2) {
            assert_eq!(errno == 524, !kernel::is_at_least(7, 2));
        }
        let error = io::Error::from_raw_os_error(errno);
        assert_eq!(Situation::of(&error), Situation::Unsupported);
    });
}

/// `NETLINK_CAP_ACK`: without it, a refused verdict would come back with its packet, and fill the receive buffer
#[test]
fn a_refusal_does_not_repeat_the_verdicts_payload() {
    isolated(|| {
        const NETLINK_HEADER: usize = 16;
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let header = RequestHeader {
            seq: 98,
            ..RequestHeader::default()
        };
        let payload = [0x45; 10_000];
        let decision = Verdict::Accept.with_payload(&payload);
        let mut buf = vec![0; decision.max_len()];
        let len = decision.encode(&mut buf, QUEUE, 77, header).unwrap();
        assert!(len > payload.len());
        send_past_the_library(&handle, &buf[..len]);
        let datagram = recv_past_the_library(&handle);
        assert_eq!(datagram.len(), NETLINK_HEADER + 4 + NETLINK_HEADER);
        let reply = reply(&datagram);
        assert_eq!((reply.errno, reply.seq), (libc::ENOENT, header.seq));
    });
}

/// `NETLINK_EXT_ACK`
#[test]
fn a_refusal_carries_the_kernels_words() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let header = RequestHeader::default();
        let short = request(
            NFQNL_MSG_CONFIG,
            header,
            &[(NFQA_CFG_QUEUE_MAXLEN, &[0; 2])],
        );
        send_past_the_library(&handle, &short);
        let datagram = recv_past_the_library(&handle);
        let reply = reply(&datagram);
        assert_eq!(reply.errno, libc::ERANGE);
        assert_eq!(reply.text, Some(POLICY.as_bytes()));
        assert_eq!(reply.offset, Some(20), "the attribute behind both headers");

        // The same for a verdict, of which the library tells.
        let mut batch = RecvBatch::default();
        lab.send(b"waits");
        let key = next_packet(&handle, &mut batch).key();
        let accept = [[0, 0, 0, 1], key.id.to_be_bytes()].concat();
        let attrs: [(u16, &[u8]); 2] = [(NFQA_VERDICT_HDR, &accept), (NFQA_MARK, &[0; 2])];
        let short = request(NFQNL_MSG_VERDICT, verdict_header(key), &attrs);
        send_past_the_library(&handle, &short);
        match next_event(&handle, &mut batch) {
            Event::Refused(refusal) => {
                assert_eq!(refusal.packet(), Some(key));
                assert_eq!(refusal.errno(), libc::ERANGE);
                assert_eq!(refusal.kernel_text(), Some(POLICY));
                assert!(refusal.to_string().ends_with(POLICY), "{refusal}");
            }
            other => panic!("no refusal, but {other:?}"),
        }
        handle.verdict(key, Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"waits"[..]));
    });
}

/// The library sends none itself, and yet tells what became of one
#[test]
fn a_batch_verdict_releases_all_up_to_a_packet_and_is_refused_where_none_waits() {
    isolated(|| {
        const MARK: u32 = 5;
        let lab = Lab::new();
        let later = lab.tables()[0].chain("later", Hook::Input, 10).unwrap();
        let marked = Rule::new().udp().dport(PORT).mark(MARK);
        later.add(&marked.counted("marked")).unwrap();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        let release_up_to = |key: PacketKey| {
            let mut buf = [0; 64];
            let verdict = BatchVerdict::new(Verdict::Accept).with_mark(MARK);
            let len = verdict
                .encode(&mut buf, key.queue, key.id, verdict_header(key))
                .unwrap();
            send_past_the_library(&handle, &buf[..len]);
        };
        lab.send_numbered(0..3);
        let keys = [(); 3].map(|()| next_packet(&handle, &mut batch).key());
        release_up_to(keys[1]);
        for number in 0..2_u32 {
            assert_eq!(lab.recv().as_deref(), Some(&number.to_be_bytes()[..]));
        }
        assert!(lab.v4.is_silent(), "the third waits");
        assert_eq!(later.count("marked").unwrap(), 2);
        assert!(is_silent(&handle, &mut batch), "nothing was refused");

        release_up_to(keys[1]);
        match next_event(&handle, &mut batch) {
            Event::Refused(refusal) => {
                assert_eq!(refusal.operation(), Operation::BatchVerdict(keys[1]));
                assert_eq!(refusal.packet(), Some(keys[1]));
                assert_eq!(refusal.errno(), libc::ENOENT);
                assert_eq!(refusal.situation(), Situation::NoSuchPacket);
            }
            other => panic!("no refusal, but {other:?}"),
        }
        assert_eq!(handle.stats().refused_verdicts, 1);
        handle.verdict(keys[2], Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&2_u32.to_be_bytes()[..]));
    });
}
