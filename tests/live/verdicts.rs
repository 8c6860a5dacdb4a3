//! The fate of packets: every verdict, mark, priority, and new payloads; and late verdicts

use std::sync::mpsc;

use etherparse::{Ipv4Header, Ipv4Options, NetHeaders, PacketHeaders, UdpHeader, ip_number};
use nfqnl::consts::{NFQA_PACKET_HDR, NFQA_PAYLOAD};
use nfqnl::proto::ConfigRequest;
use nfqnl::{
    CopyMode, Decision, Error, ErrorKind, Event, Operation, Packet, PacketKey, QueueConfig,
    RecvBatch, SendBatch, Socket, Verdict,
};
use nfqnl_testkit::cpu;
use nfqnl_testkit::hosts::Router;
use nfqnl_testkit::kernel;
use nfqnl_testkit::link;
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::rules::{Family, Hook, Rule, Table};
use nfqnl_testkit::traffic::{Udp, V4};
use nfqnl_testkit::user;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};

use crate::common::{MessageBuilder, wire};
use crate::lab::{
    Lab, PORT, QUEUE, WHOLE_PACKETS, configure_past_the_library, expect_rewritten, is_silent,
    next_event, next_keys, next_packet, number, priority, recv_past_the_library, take_all,
    udp_payload, with_udp_payload,
};

#[test]
fn accept_delivers_and_drop_does_not() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        for udp in lab.sockets() {
            for (payload, verdict) in [
                (&b"dropped"[..], Verdict::Drop),
                (b"accepted", Verdict::Accept),
            ] {
                udp.send(payload, udp.address()).unwrap();
                let packet = next_packet(&socket, &mut batch);
                assert_eq!(udp_payload(&packet), payload);
                socket.set_verdict(packet.key(), verdict).unwrap();
            }
            assert_eq!(udp.recv().as_deref(), Some(&b"accepted"[..]));
            assert!(udp.is_silent(), "the first was dropped");
        }
    });
}

#[test]
fn stop_skips_the_chains_that_accept_goes_on_to() {
    isolated(|| {
        let lab = Lab::at_input();
        let later = lab.tables()[0].chain("later", Hook::Input, 10).unwrap();
        later
            .add(&Rule::new().udp_dport(PORT).counter("seen"))
            .unwrap();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        for (verdict, seen) in [(Verdict::Accept, 1), (Verdict::Stop, 1)] {
            lab.send(b"on its way");
            socket
                .set_verdict(next_packet(&socket, &mut batch).key(), verdict)
                .unwrap();
            assert_eq!(lab.recv().as_deref(), Some(&b"on its way"[..]));
            assert_eq!(later.count("seen").unwrap(), seen, "after {verdict:?}");
        }
    });
}

#[test]
fn repeat_runs_the_chain_again_with_a_new_id() {
    isolated(|| {
        const DONE: u32 = 9;
        let rule = Rule::new()
            .udp_dport(PORT)
            .mark_not(DONE, u32::MAX)
            .queue(QUEUE);
        let lab = Lab::with(Hook::Input, &rule);
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"again");
        let mut ids = Vec::new();
        for round in 1..=3 {
            let packet = next_packet(&socket, &mut batch);
            assert_eq!(packet.mark(), round - 1, "the mark of the round before");
            ids.push(packet.id());
            let mark = if round == 3 { DONE } else { round };
            socket
                .set_verdict(packet.key(), Verdict::Repeat.with_mark(mark))
                .unwrap();
        }
        assert_eq!(ids, [1, 2, 3]);
        assert_eq!(lab.recv().as_deref(), Some(&b"again"[..]));
        assert!(is_silent(&socket, &mut batch));
    });
}

#[test]
fn queue_hands_on_or_bypasses_an_unbound_queue() {
    isolated(|| {
        const SECOND: u16 = 40_000;
        const UNBOUND: u16 = 3;
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _first = socket.bind(QUEUE).unwrap();
        let _second = socket.bind(SECOND).unwrap();
        let mut batch = RecvBatch::default();
        let to = |num, bypass| Verdict::Queue { num, bypass };

        lab.send(b"handed on");
        let packet = next_packet(&socket, &mut batch);
        assert_eq!(packet.queue(), QUEUE);
        socket.set_verdict(packet.key(), to(SECOND, false)).unwrap();
        let packet = next_packet(&socket, &mut batch);
        assert_eq!((packet.queue(), packet.id()), (SECOND, 1));
        assert_eq!(udp_payload(&packet), b"handed on");
        socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"handed on"[..]));

        lab.send(b"dropped");
        let key = next_packet(&socket, &mut batch).key();
        socket.set_verdict(key, to(UNBOUND, false)).unwrap();
        lab.send(b"bypassed");
        let key = next_packet(&socket, &mut batch).key();
        socket.set_verdict(key, to(UNBOUND, true)).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"bypassed"[..]));
        assert!(lab.v4.is_silent());
    });
}

/// EINVAL
#[test]
fn stolen_is_refused_and_the_packet_still_waits() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"not stolen");
        let key = next_packet(&socket, &mut batch).key();
        socket.set_verdict(key, Verdict::Stolen).unwrap();
        match next_event(&socket, &mut batch) {
            Event::Refused(refusal) => {
                assert_eq!(refusal.packet(), Some(key));
                assert_eq!(refusal.errno(), libc::EINVAL);
                assert_eq!(refusal.kind(), ErrorKind::Invalid);
            }
            other => panic!("not a refusal: {other:?}"),
        }
        assert!(lab.v4.is_silent(), "it waits");
        socket.set_verdict(key, Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"not stolen"[..]));
    });
}

#[test]
fn later_hooks_see_mark_and_priority_of_a_verdict() {
    isolated(|| {
        const MARK: u32 = 0xdead_beef;
        const PRIORITY: u32 = 6;
        const LATER: u16 = 2;
        let lab = Lab::with(Hook::Output, &Rule::new().udp_dport(PORT).queue(QUEUE));
        for table in lab.tables() {
            let chain = table.chain("later", Hook::Postrouting, 0).unwrap();
            let marked = Rule::new().udp_dport(PORT).mark(MARK, u32::MAX);
            chain.add(&marked.queue(LATER)).unwrap();
        }
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let _later = socket.bind(LATER).unwrap();
        let mut batch = RecvBatch::default();
        for udp in lab.sockets() {
            udp.send(b"marked", udp.address()).unwrap();
            let packet = next_packet(&socket, &mut batch);
            assert_eq!((packet.mark(), packet.priority()), (0, 0));
            let decision = Verdict::Accept.with_mark(MARK).with_priority(PRIORITY);
            socket.set_verdict(packet.key(), decision).unwrap();
            let packet = next_packet(&socket, &mut batch);
            assert_eq!((packet.queue(), packet.mark()), (LATER, MARK));
            assert_eq!(packet.priority(), priority(PRIORITY));
            // A verdict without a mark leaves the mark as it is.
            socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
            assert_eq!(udp.recv().as_deref(), Some(&b"marked"[..]));
        }
    });
}

#[test]
fn a_new_payload_of_any_length_replaces_the_packet() {
    isolated(|| {
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        let lens = [0, 1, 2, 3, 4, 5, 19, 20, 21, 1471, 1472, 9000, 65_000];
        for lab in [Lab::new, Lab::at_input] {
            let lab = lab();
            for (udp, len) in lab
                .sockets()
                .into_iter()
                .flat_map(|s| lens.map(|len| (s, len)))
            {
                let new: Vec<u8> = (0..len).map(|i: usize| i.to_le_bytes()[0]).collect();
                udp.send(b"twenty bytes of data", udp.address()).unwrap();
                let packet = next_packet(&socket, &mut batch);
                let replaced = with_udp_payload(packet.payload(), &new).unwrap();
                let decision = Verdict::Accept.with_payload(&replaced);
                socket.set_verdict(packet.key(), decision).unwrap();
                expect_rewritten(udp, &new);
            }
            lab.delete_rules();
        }
        assert!(is_silent(&socket, &mut batch), "nothing was refused");
    });
}

/// A packet rewritten in POSTROUTING arrives at another host
#[test]
fn a_rewritten_packet_leaves_by_a_real_link() {
    isolated(|| {
        let router = Router::new().unwrap();
        let server = &router.server;
        let rule = Rule::new().udp_dport(PORT).queue(QUEUE);
        for family in Family::ALL {
            let table = Table::new(family, "t").unwrap();
            let chain = table.chain("c", Hook::Postrouting, 0).unwrap();
            chain.add(&rule).unwrap();
        }
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        for (any, to) in [("0.0.0.0", server.v4), ("::", server.v6)] {
            let receiver = server.namespace.run(|| Udp::bind(to, PORT).unwrap());
            let sender = Udp::bind(any.parse().unwrap(), 0).unwrap();
            sender.send(b"original", receiver.address()).unwrap();
            let packet = next_packet(&socket, &mut batch);
            let replaced = with_udp_payload(packet.payload(), b"rewritten, and longer").unwrap();
            let decision = Verdict::Accept.with_payload(&replaced);
            socket.set_verdict(packet.key(), decision).unwrap();
            expect_rewritten(&receiver, b"rewritten, and longer");
        }
    });
}

/// Since Linux 7.2 the kernel drops a packet whose new header has a wrong length or changed
/// fragment bits
#[test]
fn kernels_since_7_2_check_a_new_header() {
    isolated(|| {
        let lab = Lab::at_input();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        let [len_low, fragment_high] = [3, 6];
        for (byte, change) in [(len_low, 1), (fragment_high, 0x20)] {
            lab.send(b"the same payload");
            let packet = next_packet(&socket, &mut batch);
            let mut new = packet.payload().to_vec();
            new[byte] ^= change;
            socket
                .set_verdict(packet.key(), Verdict::Accept.with_payload(&new))
                .unwrap();
            if kernel::is_at_least(7, 2) {
                assert!(lab.v4.is_silent(), "byte {byte}");
            } else {
                // At INPUT the kernel no longer needs the header.
                assert_eq!(lab.recv().as_deref(), Some(&b"the same payload"[..]));
            }
        }
        socket.sync().unwrap();
        assert!(is_silent(&socket, &mut batch), "nothing was refused");
    });
}

#[test]
fn bad_payloads_are_refused_before_they_are_sent() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"waits");
        let key = next_packet(&socket, &mut batch).key();
        let too_long = vec![0x45; usize::from(u16::MAX) - 3];
        for payload in [&too_long[..], &[], &[0x45; 19], &[0x4f; 59], &[0x60; 39]] {
            let error = socket
                .set_verdict(key, Verdict::Accept.with_payload(payload))
                .unwrap_err();
            let named = match payload.len() {
                len if len == too_long.len() => matches!(error, Error::Encode { .. }),
                _ => matches!(error, Error::PayloadTooShort { .. }),
            };
            assert!(named, "{error:?} for {} bytes", payload.len());
        }
        socket.set_verdict(key, Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"waits"[..]), "still whole");
    });
}

#[test]
fn verdicts_come_late_and_in_any_order() {
    isolated(|| {
        const N: u32 = 100;
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send_numbered(0..N);
        let mut keys = next_keys(&socket, &mut batch, N.try_into().unwrap());
        assert!(lab.v4.is_silent());
        // Every third packet first, from the back.
        keys.sort_by_key(|key| (key.id() % 3, std::cmp::Reverse(key.id())));
        // On one CPU: two could deliver packets in another order than they were accepted.
        let cpu = cpu::allowed().unwrap()[0];
        let verdicts = || {
            for key in &keys {
                socket.set_verdict(*key, Verdict::Accept).unwrap();
            }
        };
        cpu::on(cpu, verdicts).unwrap();
        for key in &keys {
            let payload = lab
                .recv()
                .expect("each is delivered, in the order of verdicts");
            assert_eq!(payload, (key.id() - 1).to_be_bytes());
        }
        socket.sync().unwrap();
        assert!(is_silent(&socket, &mut batch), "nothing was refused");
    });
}

/// ENOENT
#[test]
fn a_second_verdict_is_refused_and_packets_flow_on() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send_numbered(0..3);
        let keys = [(); 3].map(|()| next_packet(&socket, &mut batch).key());
        socket.set_verdict(keys[1], Verdict::Accept).unwrap();
        socket.set_verdict(keys[1], Verdict::Drop).unwrap();
        lab.send(b"after");
        match next_event(&socket, &mut batch) {
            Event::Refused(refusal) => {
                assert_eq!(refusal.packet(), Some(keys[1]));
                assert_eq!(refusal.errno(), libc::ENOENT);
                assert_eq!(refusal.kind(), ErrorKind::NoSuchPacket);
            }
            other => panic!("not a refusal: {other:?}"),
        }
        assert_eq!(udp_payload(&next_packet(&socket, &mut batch)), b"after");
        assert_eq!(socket.stats().refused_verdicts, 1);
        assert_eq!(lab.recv().as_deref(), Some(&1_u32.to_be_bytes()[..]));
    });
}

#[test]
fn a_packet_whose_chain_is_deleted_is_gone() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"gone");
        let key = next_packet(&socket, &mut batch).key();
        lab.delete_rules();
        socket.set_verdict(key, Verdict::Accept).unwrap();
        socket.sync().unwrap();
        match next_event(&socket, &mut batch) {
            Event::Refused(refusal) => {
                assert_eq!(
                    (refusal.packet(), refusal.errno()),
                    (Some(key), libc::ENOENT)
                );
            }
            other => panic!("not a refusal: {other:?}"),
        }
    });
}

/// Only the beginning of the packet was copied
#[test]
fn a_truncated_packet_is_delivered_whole() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let config = QueueConfig::new().copy_mode(CopyMode::Packet, 30);
        let _queue = socket.bind_with(QUEUE, &config).unwrap();
        let mut batch = RecvBatch::default();
        let payload = [7; 500];
        lab.send(&payload);
        let packet = next_packet(&socket, &mut batch);
        assert_eq!(packet.payload().len(), 30);
        assert_eq!(packet.len(), Some(20 + 8 + 500));
        socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&payload[..]));
    });
}

#[test]
fn other_threads_can_send_verdicts() {
    isolated(|| {
        const N: u32 = 200;
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let (send, keys) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for key in keys {
                    socket.set_verdict(key, Verdict::Accept).unwrap();
                }
            });
            scope.spawn(|| {
                let mut batch = RecvBatch::default();
                for _ in 0..N {
                    send.send(next_packet(&socket, &mut batch).key()).unwrap();
                }
                drop(send);
            });
            for number in 0..N {
                lab.send(&number.to_be_bytes());
                assert_eq!(lab.recv().as_deref(), Some(&number.to_be_bytes()[..]));
            }
        });
        socket.sync().unwrap();
        assert_eq!(socket.stats().refused_verdicts, 0);
    });
}

/// The caller encodes the conntrack and link-layer parts. The kernel ignores unneeded parts
#[test]
fn a_decision_with_every_part_is_accepted() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"laden");
        let packet = next_packet(&socket, &mut batch);
        let replaced = with_udp_payload(packet.payload(), b"unladen").unwrap();
        let decision: Decision<'_> = Verdict::Accept
            .with_payload(&replaced)
            .with_mark(1)
            .with_priority(2)
            .with_vlan(nfqnl::Vlan {
                proto: 0x8100,
                tci: 5,
            })
            .with_l2_header(&[0; 14])
            .with_raw_conntrack(&[])
            .with_expectation(&[]);
        socket.set_verdict(packet.key(), decision).unwrap();
        socket.sync().unwrap();
        assert!(is_silent(&socket, &mut batch), "not refused");
        expect_rewritten(&lab.v4, b"unladen");
    });
}

/// The number has all bits set: no arithmetic on it may change another number
#[test]
fn the_last_queue_number_works_like_any_other() {
    isolated(|| {
        const LAST: u16 = u16::MAX;
        let lab = Lab::with(Hook::Input, &Rule::new().udp_dport(PORT).queue(0));
        let socket = Socket::open().unwrap();
        let _queues = [0, LAST].map(|queue| socket.bind(queue).unwrap());
        let mut batch = RecvBatch::default();
        let mut verdicts = SendBatch::new();
        let moved = Verdict::Queue {
            num: LAST,
            bypass: false,
        };
        (0..3).for_each(|number| lab.send(&[number]));
        for _ in 0..3 {
            let first = next_packet(&socket, &mut batch);
            assert_eq!(first.queue(), 0);
            socket.set_verdict(first.key(), moved).unwrap();
        }
        for number in 0..3 {
            let packet = next_packet(&socket, &mut batch);
            assert_eq!(packet.queue(), LAST);
            assert_eq!(udp_payload(&packet), [number]);
            verdicts.push(packet.key(), Verdict::Accept).unwrap();
            let last = packet.key();
            if number == 2 {
                socket.send(&mut verdicts).unwrap();
                socket.set_verdict(last, Verdict::Accept).unwrap();
                match next_event(&socket, &mut batch) {
                    Event::Refused(refusal) => assert_eq!(refusal.packet(), Some(last)),
                    other => panic!("{other:?}"),
                }
            }
        }
        for number in 0..3 {
            assert_eq!(lab.recv().as_deref(), Some(&[number][..]));
        }
    });
}

/// Makes the kernel drop the packets and sends their verdicts; returns the refused operations, one
/// per message
fn refused_when_gone(socket: &Socket, batch: &mut RecvBatch, keys: &[PacketKey]) -> Vec<Operation> {
    link::down("lo").unwrap();
    link::up("lo").unwrap();
    let mut verdicts = SendBatch::new();
    for &key in keys {
        verdicts.push(key, Verdict::Accept).unwrap();
    }
    socket.send(&mut verdicts).unwrap();
    socket.sync().unwrap();
    let mut refused = Vec::new();
    take_all(socket, batch, |event| match event {
        Event::Refused(refusal) => {
            assert_eq!(refusal.kind(), ErrorKind::NoSuchPacket);
            refused.push(refusal.operation());
        }
        other => panic!("not a refusal: {other:?}"),
    });
    refused
}

/// The packets of a send refused by EPERM still wait, and no later message may cover them
#[test]
fn eperm_ends_merging_for_good() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send_numbered(0..5);
        let keys = next_keys(&socket, &mut batch, 5);
        let refused = refused_when_gone(&socket, &mut batch, &keys);
        assert_eq!(refused, [Operation::BatchVerdict(keys[4])], "merged");
        assert_eq!(socket.stats().merging_ended, 0);

        lab.send(b"waits");
        let key = next_packet(&socket, &mut batch).key();
        user::without_net_admin(|| socket.set_verdict(key, Verdict::Drop).unwrap());
        match next_event(&socket, &mut batch) {
            Event::Refused(refusal) => {
                assert_eq!(refusal.packet(), Some(key));
                assert_eq!(refusal.kind(), ErrorKind::NoCapability);
            }
            other => panic!("not a refusal: {other:?}"),
        }
        assert_eq!(socket.stats().merging_ended, 1);
        lab.send_numbered(0..5);
        let keys = next_keys(&socket, &mut batch, 5);
        let mut verdicts = SendBatch::new();
        for &key in &keys {
            verdicts.push(key, Verdict::Accept).unwrap();
        }
        socket.send(&mut verdicts).unwrap();
        lab.expect_numbered(0..5);
        assert!(lab.v4.is_silent(), "the packet before them still waits");
        socket.set_verdict(key, Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"waits"[..]));

        queue.destroy().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        lab.send_numbered(0..5);
        let keys = next_keys(&socket, &mut batch, 5);
        let refused = refused_when_gone(&socket, &mut batch, &keys);
        let single = keys.into_iter().map(Operation::Verdict);
        assert_eq!(refused, Vec::from_iter(single), "also after a new bind");
    });
}

/// ENOENT, EINVAL and ENODEV: such packets are gone, or wait as before
#[test]
fn other_refusals_do_not_end_merging() {
    isolated(|| {
        const OTHER: u16 = QUEUE + 1;
        let lab = Lab::new();
        let other = lab.add_queue(OTHER);
        let socket = Socket::open().unwrap();
        let _queues = [QUEUE, OTHER].map(|num| socket.bind(num).unwrap());
        let mut batch = RecvBatch::default();
        lab.send(b"first");
        let first = next_packet(&socket, &mut batch).key();
        socket.set_verdict(first, Verdict::Stolen).unwrap();
        for _ in 0..2 {
            socket.set_verdict(first, Verdict::Accept).unwrap();
        }
        other.send(b"other", other.address()).unwrap();
        let lost = next_packet_of(&socket, &mut batch, OTHER);
        configure_past_the_library(&socket, &ConfigRequest::unbind(OTHER));
        socket.set_verdict(lost, Verdict::Accept).unwrap();
        socket.sync().unwrap();
        let mut kinds = Vec::new();
        take_all(&socket, &mut batch, |event| match event {
            Event::Refused(refusal) => kinds.push(refusal.kind()),
            other => panic!("not a refusal: {other:?}"),
        });
        assert_eq!(kinds, [ErrorKind::NotBound]);
        let stats = socket.stats();
        assert_eq!((stats.refused_verdicts, stats.merging_ended), (3, 0));

        lab.send_numbered(0..5);
        let keys = next_keys(&socket, &mut batch, 5);
        let refused = refused_when_gone(&socket, &mut batch, &keys);
        assert_eq!(refused, [Operation::BatchVerdict(keys[4])], "merged");
    });
}

/// Returns the key of the next packet of a queue; skips refusals before it
fn next_packet_of(socket: &Socket, batch: &mut RecvBatch, queue: u16) -> PacketKey {
    loop {
        match next_event(socket, batch) {
            Event::Packet(packet) => {
                assert_eq!(packet.queue(), queue);
                return packet.key();
            }
            Event::Refused(_) => {}
            other => panic!("not a packet: {other:?}"),
        }
    }
}

#[test]
fn one_send_batch_with_two_sockets_is_refused() {
    isolated(|| {
        const OTHER: u16 = QUEUE + 1;
        let lab = Lab::new();
        let there = lab.add_queue(OTHER);
        let [one, other] = [(); 2].map(|()| Socket::open().unwrap());
        let _queues = (one.bind(QUEUE).unwrap(), other.bind(OTHER).unwrap());
        let mut verdicts = SendBatch::new();
        lab.send(b"one");
        there.send(b"other", there.address()).unwrap();
        let one_key = next_packet(&one, &mut RecvBatch::default()).key();
        let other_key = next_packet(&other, &mut RecvBatch::default()).key();
        verdicts.push(one_key, Verdict::Accept).unwrap();
        verdicts.push(other_key, Verdict::Accept).unwrap();
        let error = one.send(&mut verdicts).unwrap_err();
        let op = Operation::Verdict(other_key);
        assert!(
            matches!(error, Error::WrongSocket { op: of, .. } if of == op),
            "{error}"
        );
        // The socket's own verdicts were sent, and the other socket's verdict stays in the batch.
        assert_eq!(verdicts.len(), 1);
        assert!(one.send(&mut verdicts).is_err());
        assert_eq!(verdicts.len(), 1);
        assert_eq!(lab.recv().as_deref(), Some(&b"one"[..]));
        assert!(there.is_silent());
        other.send(&mut verdicts).unwrap();
        assert!(verdicts.is_empty());
        assert_eq!(there.recv().as_deref(), Some(&b"other"[..]));
        let stats = other.stats();
        assert_eq!((stats.refused_verdicts, stats.late_verdicts), (0, 0));
    });
}

#[test]
fn a_queue_that_ends_under_a_batch_fails_no_send() {
    isolated(|| {
        const OTHER: u16 = QUEUE + 1;
        let lab = Lab::new();
        let there = lab.add_queue(OTHER);
        let socket = Socket::open().unwrap();
        for is_bound_again in [false, true] {
            let ends = socket.bind(QUEUE).unwrap();
            let _stays = socket.bind(OTHER).unwrap();
            let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
            let late = socket.stats().late_verdicts;
            lab.send_numbered(0..3);
            for key in next_keys(&socket, &mut batch, 3) {
                verdicts.push(key, Verdict::Accept).unwrap();
            }
            there.send(b"stays", there.address()).unwrap();
            let stays = next_packet(&socket, &mut batch).key();
            verdicts.push(stays, Verdict::Accept).unwrap();
            drop(ends);
            let _again = is_bound_again.then(|| socket.bind(QUEUE).unwrap());
            if is_bound_again {
                lab.send(b"of the new binding");
            }
            socket.send(&mut verdicts).unwrap();
            assert!(verdicts.is_empty());
            assert_eq!(there.recv().as_deref(), Some(&b"stays"[..]));
            assert_eq!(socket.stats().late_verdicts - late, 3);
            assert!(lab.v4.is_silent());
        }
        assert_eq!(socket.stats().refused_verdicts, 0);
    });
}

/// The kernel would drop a packet with a bad payload, so the library refuses the payload; the
/// caller can choose another verdict
#[test]
fn a_refused_payload_leaves_the_packet_waiting() {
    isolated(|| {
        let lab = Lab::new();
        let handle = nfqnl::open().unwrap();
        let (send, keys) = mpsc::channel();
        let too_long = vec![0x45; usize::from(u16::MAX)];
        let _queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, move |data| {
                for payload in [b"x".as_slice(), &too_long] {
                    data.set_verdict_with_payload(Verdict::Accept, None, payload)
                        .unwrap_err();
                }
                match number(data.packet()) {
                    0 => {}
                    1 => data.set_verdict(Verdict::Accept, None),
                    _ => data.set_verdict(Verdict::Drop, None),
                }
                send.send(data.key()).unwrap();
            })
            .unwrap();
        lab.send_numbered(0..3);
        let (mut batch, mut packets) = (RecvBatch::default(), 0);
        while packets < 3 {
            packets += handle.run_once(&mut batch).unwrap();
        }
        lab.expect_numbered([1]);
        assert!(lab.v4.is_silent());
        let key = keys.recv().unwrap();
        let socket = handle.socket();
        let mut verdicts = SendBatch::new();
        for decision in [Verdict::Accept.with_payload(b"x"), Verdict::Accept.into()] {
            let pushed = verdicts.push(key, decision);
            let is_short = matches!(pushed, Err(Error::PayloadTooShort { .. }));
            assert_eq!(is_short, decision.payload().is_some(), "{pushed:?}");
        }
        assert_eq!(verdicts.len(), 1);
        socket.send(&mut verdicts).unwrap();
        lab.expect_numbered([0]);
        assert_eq!(socket.stats().refused_verdicts, 0);
    });
}

#[test]
fn a_key_made_from_an_id_can_be_answered() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"received");
        let packet = next_packet(&socket, &mut batch);
        assert_eq!(queue.key(packet.id()), packet.key());
        let key = queue.key(packet.id());
        assert_eq!((key.queue(), key.id()), (QUEUE, 1));
        socket.set_verdict(key, Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"received"[..]));

        // A caller with its own reads and parser knows only queue and id.
        lab.send(b"parsed");
        let datagram = recv_past_the_library(&socket);
        let parsed = Packet::parse(&datagram).unwrap();
        let unknown = socket.set_verdict(parsed.key(), Verdict::Accept);
        assert!(unknown.is_err(), "the key has no binding");
        let mut verdicts = SendBatch::new();
        verdicts
            .push(queue.key(parsed.id()), Verdict::Accept)
            .unwrap();
        socket.send(&mut verdicts).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"parsed"[..]));

        drop(queue);
        let queue = socket.bind(QUEUE).unwrap();
        assert_ne!(queue.key(1), key, "it belongs to the new binding");
    });
}

/// Sends UDP to the lab with 40 bytes of IP options
fn send_with_options(payload: &[u8]) {
    let localhost = [127, 0, 0, 1];
    let len = u16::try_from(UdpHeader::LEN + payload.len()).unwrap();
    let mut ip = Ipv4Header::new(len, 64, ip_number::UDP, localhost, localhost).unwrap();
    const NO_OPERATION: u8 = 1;
    ip.options = Ipv4Options::from([NO_OPERATION; 40]);
    ip.header_checksum = ip.calc_header_checksum();
    let udp = UdpHeader::with_ipv4_checksum(4000, PORT, &ip, payload).unwrap();
    let mut packet = Vec::new();
    ip.write(&mut packet).unwrap();
    udp.write(&mut packet).unwrap();
    packet.extend(payload);
    let (domain, kind) = (AddressFamily::INET, SocketType::RAW);
    let raw = socket_with(domain, kind, SocketFlags::CLOEXEC, Some(ipproto::RAW)).unwrap();
    // `UdpSocket` also makes the right system calls for a raw socket.
    let raw = std::net::UdpSocket::from(raw);
    raw.send_to(&packet, (V4, 0)).unwrap();
}

/// Copies a UDP packet without its IP options
fn without_options(packet: &[u8]) -> Vec<u8> {
    let headers = PacketHeaders::from_ip_slice(packet).unwrap();
    let Some(NetHeaders::Ipv4(mut ip, _)) = headers.net else {
        panic!("not IPv4");
    };
    ip.options = Ipv4Options::new();
    let payload = headers.payload.slice();
    ip.set_payload_len(UdpHeader::LEN + payload.len()).unwrap();
    ip.header_checksum = ip.calc_header_checksum();
    let mut new = Vec::new();
    ip.write(&mut new).unwrap();
    headers.transport.unwrap().write(&mut new).unwrap();
    new.extend(payload);
    new
}

/// Kernels before 5.10.135 and 5.18.16 crash on such a payload (CVE-2022-36946), and later ones
/// drop the packet silently
#[test]
fn a_payload_below_the_old_header_is_refused() {
    isolated(|| {
        let lab = Lab::new();
        let handle = nfqnl::open().unwrap();
        let (send, results) = mpsc::channel();
        let _queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, move |data| {
                let new = without_options(data.get_payload());
                let result = data.set_verdict_with_payload(Verdict::Accept, None, &new);
                send.send((data.key(), result)).unwrap();
            })
            .unwrap();
        let mut batch = RecvBatch::default();
        let mut run = || while handle.run_once(&mut batch).unwrap() == 0 {};
        send_with_options(b"four");
        run();
        let (key, result) = results.recv().unwrap();
        match result.unwrap_err() {
            Error::PayloadTooShort {
                key: of,
                needed,
                had,
                ..
            } => assert_eq!((of, needed, had), (key, 60, 20 + 8 + 4)),
            other => panic!("{other:?}"),
        }
        assert!(lab.v4.is_silent(), "the packet waits");
        handle.socket().set_verdict(key, Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"four"[..]));

        // 20 + 8 + 32 bytes are as long as the old header.
        let payload = [b'x'; 32];
        send_with_options(&payload);
        run();
        results.recv().unwrap().1.unwrap();
        if kernel::is_at_least(7, 2) {
            assert!(lab.v4.is_silent(), "options may not change");
        } else {
            assert_eq!(lab.recv().as_deref(), Some(&payload[..]));
        }
        assert_eq!(handle.socket().stats().refused_verdicts, 0);
    });
}

/// An extension header of IPv6 counts as well
#[test]
fn extension_headers_count_as_old_header() {
    isolated(|| {
        const HOP_BY_HOP: [u8; 8] = [17, 0, 1, 4, 0, 0, 0, 0];
        let handle = nfqnl::open().unwrap();
        let (send, results) = mpsc::channel();
        let _queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, move |data| {
                for len in [40, 47, 48] {
                    let new = &data.get_payload()[..len];
                    let result = data.set_verdict_with_payload(Verdict::Drop, None, new);
                    send.send(result.is_ok()).unwrap();
                }
            })
            .unwrap();
        let localhost = std::net::Ipv6Addr::LOCALHOST.octets();
        let ip = wire![[0x60, 0, 0, 0, 0, 20, 0, 64], localhost, localhost];
        let udp = wire![PORT.to_be_bytes(), PORT.to_be_bytes(), [0, 12, 0, 0]];
        let header = wire![1_u32.to_be_bytes(), [0x86, 0xdd, 3]];
        let packet = MessageBuilder::packet(nfqnl::Family::INET6, QUEUE)
            .attr(NFQA_PACKET_HDR, header)
            .attr(NFQA_PAYLOAD, wire![ip, HOP_BY_HOP, udp, b"four"])
            .build();
        assert_eq!(handle.handle_packet(&packet).unwrap(), 1);
        assert_eq!(results.try_iter().collect::<Vec<_>>(), [false, false, true]);
    });
}

/// Also behind packets set aside by a setting
#[test]
fn handle_packet_executes_each_verdict_at_once() {
    isolated(|| {
        let lab = Lab::new();
        let handle = nfqnl::open().unwrap();
        let queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, |data| {
                let number = number(data.packet());
                // The previous packet was delivered when its callback returned.
                lab.expect_numbered(number.checked_sub(1));
                data.set_verdict(Verdict::Accept, None);
            })
            .unwrap();
        lab.send_numbered(0..5);
        queue.set_maxlen(100).unwrap();
        lab.send_numbered(5..6);
        let mut packets = 0;
        while packets < 6 {
            let datagram = recv_past_the_library(&handle);
            packets += handle.handle_packet(&datagram).unwrap();
        }
        lab.expect_numbered([5]);
    });
}
