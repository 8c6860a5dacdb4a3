//! What becomes of a packet: every verdict, mark, priority, and new payloads

use nfqnl::{Decision, Event, Handle, QueueConfig, RecvBatch, Situation, Verdict, VerdictBatch};
use nfqnl_testkit::cpu;
use nfqnl_testkit::hosts::Router;
use nfqnl_testkit::kernel;
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::rules::{Family, Hook, Rule, Table};
use nfqnl_testkit::traffic::Udp;

use crate::examples::with_udp_payload;
use crate::lab::{
    Lab, PORT, QUEUE, expect_rewritten, is_silent, next_event, next_packet, priority, udp_payload,
};

#[test]
fn accept_delivers_and_drop_does_not() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        for socket in lab.sockets() {
            for (payload, verdict) in [
                (&b"dropped"[..], Verdict::Drop),
                (b"accepted", Verdict::Accept),
            ] {
                socket.send(payload, socket.address()).unwrap();
                let packet = next_packet(&handle, &mut batch);
                assert_eq!(udp_payload(&packet), payload);
                handle.verdict(packet.key(), verdict).unwrap();
            }
            assert_eq!(socket.recv().as_deref(), Some(&b"accepted"[..]));
            assert!(socket.is_silent(), "the first was dropped");
        }
    });
}

#[test]
fn stop_skips_the_chains_that_accept_goes_on_to() {
    isolated(|| {
        let lab = Lab::at_input();
        let later = lab.tables()[0].chain("later", Hook::Input, 10).unwrap();
        later
            .add(&Rule::new().udp().dport(PORT).counted("seen"))
            .unwrap();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        for (verdict, seen) in [(Verdict::Accept, 1), (Verdict::Stop, 1)] {
            lab.send(b"on its way");
            handle
                .verdict(next_packet(&handle, &mut batch).key(), verdict)
                .unwrap();
            assert_eq!(lab.recv().as_deref(), Some(&b"on its way"[..]));
            assert_eq!(later.count("seen").unwrap(), seen, "after {verdict:?}");
        }
    });
}

#[test]
fn repeat_goes_through_the_chain_again_under_a_new_id() {
    isolated(|| {
        const DONE: u32 = 9;
        let rule = Rule::new().udp().dport(PORT).mark_not(DONE).queue(QUEUE);
        let lab = Lab::with(Hook::Input, &rule);
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"again");
        let mut ids = Vec::new();
        for round in 1..=3 {
            let packet = next_packet(&handle, &mut batch);
            assert_eq!(packet.mark(), round - 1, "the mark of the round before");
            ids.push(packet.id());
            let mark = if round == 3 { DONE } else { round };
            handle
                .verdict(packet.key(), Verdict::Repeat.with_mark(mark))
                .unwrap();
        }
        assert_eq!(ids, [1, 2, 3]);
        assert_eq!(lab.recv().as_deref(), Some(&b"again"[..]));
        assert!(is_silent(&handle, &mut batch));
    });
}

#[test]
fn queue_hands_on_to_another_queue_of_the_same_handle_or_past_nobody() {
    isolated(|| {
        const SECOND: u16 = 40_000;
        const NOBODYS: u16 = 3;
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _first = handle.bind_queue(QUEUE).unwrap();
        let _second = handle.bind_queue(SECOND).unwrap();
        let mut batch = RecvBatch::default();
        let to = |num, bypass| Verdict::Queue { num, bypass };

        lab.send(b"handed on");
        let packet = next_packet(&handle, &mut batch);
        assert_eq!(packet.queue(), QUEUE);
        handle.verdict(packet.key(), to(SECOND, false)).unwrap();
        let packet = next_packet(&handle, &mut batch);
        assert_eq!((packet.queue(), packet.id()), (SECOND, 1));
        assert_eq!(udp_payload(&packet), b"handed on");
        handle.verdict(packet.key(), Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"handed on"[..]));

        lab.send(b"dropped");
        let key = next_packet(&handle, &mut batch).key();
        handle.verdict(key, to(NOBODYS, false)).unwrap();
        lab.send(b"bypassed");
        let key = next_packet(&handle, &mut batch).key();
        handle.verdict(key, to(NOBODYS, true)).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"bypassed"[..]));
        assert!(lab.v4.is_silent());
    });
}

/// Also the test of EINVAL
#[test]
fn stolen_is_refused_and_the_packet_goes_on_waiting() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"not stolen");
        let key = next_packet(&handle, &mut batch).key();
        handle.verdict(key, Verdict::Stolen).unwrap();
        match next_event(&handle, &mut batch) {
            Event::Refused(refusal) => {
                assert_eq!(refusal.packet(), Some(key));
                assert_eq!(refusal.errno(), libc::EINVAL);
                assert_eq!(refusal.situation(), Situation::Invalid);
                assert!(refusal.to_string().contains("STOLEN"), "{refusal}");
            }
            other => panic!("no refusal, but {other:?}"),
        }
        assert!(lab.v4.is_silent(), "it waits");
        handle.verdict(key, Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"not stolen"[..]));
    });
}

#[test]
fn the_mark_and_priority_of_a_verdict_are_seen_by_later_hooks() {
    isolated(|| {
        const MARK: u32 = 0xdead_beef;
        const PRIORITY: u32 = 6;
        const LATER: u16 = 2;
        let lab = Lab::with(Hook::Output, &Rule::new().udp().dport(PORT).queue(QUEUE));
        for table in lab.tables() {
            let chain = table.chain("later", Hook::Postrouting, 0).unwrap();
            let marked = Rule::new().udp().dport(PORT).mark(MARK);
            chain.add(&marked.queue(LATER)).unwrap();
        }
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let _later = handle.bind_queue(LATER).unwrap();
        let mut batch = RecvBatch::default();
        for socket in lab.sockets() {
            socket.send(b"marked", socket.address()).unwrap();
            let packet = next_packet(&handle, &mut batch);
            assert_eq!((packet.mark(), packet.priority()), (0, 0));
            let decision = Verdict::Accept.with_mark(MARK).with_priority(PRIORITY);
            handle.verdict(packet.key(), decision).unwrap();
            let packet = next_packet(&handle, &mut batch);
            assert_eq!((packet.queue(), packet.mark()), (LATER, MARK));
            assert_eq!(packet.priority(), priority(PRIORITY));
            // Without a mark in the verdict, the packet keeps what it has.
            handle.verdict(packet.key(), Verdict::Accept).unwrap();
            assert_eq!(socket.recv().as_deref(), Some(&b"marked"[..]));
        }
    });
}

#[test]
fn a_new_payload_of_any_length_replaces_the_packet() {
    isolated(|| {
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        let lens = [0, 1, 2, 3, 4, 5, 19, 20, 21, 1471, 1472, 9000, 65_000];
        for lab in [Lab::new, Lab::at_input] {
            let lab = lab();
            for (socket, len) in lab
                .sockets()
                .into_iter()
                .flat_map(|s| lens.map(|len| (s, len)))
            {
                let new: Vec<u8> = (0..len).map(|i: usize| i.to_le_bytes()[0]).collect();
                socket
                    .send(b"twenty bytes of data", socket.address())
                    .unwrap();
                let packet = next_packet(&handle, &mut batch);
                let replaced = with_udp_payload(packet.payload(), &new).unwrap();
                let decision = Verdict::Accept.with_payload(&replaced);
                handle.verdict(packet.key(), decision).unwrap();
                expect_rewritten(socket, &new);
            }
            lab.delete_rules();
        }
        assert!(is_silent(&handle, &mut batch), "nothing was refused");
    });
}

/// Rewriting before the packet leaves, seen by a receiver on another host
#[test]
fn a_rewritten_packet_leaves_by_a_real_link() {
    isolated(|| {
        let router = Router::new().unwrap();
        let server = &router.server;
        let rule = Rule::new().udp().dport(PORT).queue(QUEUE);
        for family in Family::ALL {
            let table = Table::new(family, "t").unwrap();
            let chain = table.chain("c", Hook::Postrouting, 0).unwrap();
            chain.add(&rule).unwrap();
        }
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        for (any, to) in [("0.0.0.0", server.v4), ("::", server.v6)] {
            let receiver = server.namespace.run(|| Udp::bind(to, PORT).unwrap());
            let sender = Udp::bind(any.parse().unwrap(), 0).unwrap();
            sender.send(b"original", receiver.address()).unwrap();
            let packet = next_packet(&handle, &mut batch);
            let replaced = with_udp_payload(packet.payload(), b"rewritten, and longer").unwrap();
            let decision = Verdict::Accept.with_payload(&replaced);
            handle.verdict(packet.key(), decision).unwrap();
            expect_rewritten(&receiver, b"rewritten, and longer");
        }
    });
}

/// Since Linux 7.2 the kernel drops a packet whose new header has a wrong length, or other fragment bits
#[test]
fn a_new_header_is_looked_at_by_new_kernels() {
    isolated(|| {
        let lab = Lab::at_input();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        let [len_low, fragment_high] = [3, 6];
        for (byte, change) in [(len_low, 1), (fragment_high, 0x20)] {
            lab.send(b"changed at its head alone");
            let packet = next_packet(&handle, &mut batch);
            let mut new = packet.payload().to_vec();
            new[byte] ^= change;
            handle
                .verdict(packet.key(), Verdict::Accept.with_payload(&new))
                .unwrap();
            if kernel::is_at_least(7, 2) {
                assert!(lab.v4.is_silent(), "byte {byte}");
            } else {
                // Where packets come in, what has become of the header is of no interest any more.
                assert_eq!(
                    lab.recv().as_deref(),
                    Some(&b"changed at its head alone"[..])
                );
            }
        }
        handle.sync().unwrap();
        assert!(is_silent(&handle, &mut batch), "nothing was refused");
    });
}

#[test]
fn payloads_that_would_crash_or_be_cut_are_refused_before_they_are_sent() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"waits");
        let key = next_packet(&handle, &mut batch).key();
        let too_long = vec![0x45; usize::from(u16::MAX) - 3];
        for payload in [&too_long[..], &[], &[0x45; 19], &[0x4f; 59], &[0x60; 39]] {
            let error = handle
                .verdict(key, Verdict::Accept.with_payload(payload))
                .unwrap_err();
            let named = match payload.len() {
                len if len == too_long.len() => matches!(error, nfqnl::Error::Encode { .. }),
                _ => matches!(error, nfqnl::Error::PayloadTooShort { .. }),
            };
            assert!(named, "{error:?} for {} bytes", payload.len());
        }
        handle.verdict(key, Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"waits"[..]), "still whole");
    });
}

#[test]
fn verdicts_come_late_and_in_any_order() {
    isolated(|| {
        const N: u32 = 100;
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send_numbered(0..N);
        let mut keys: Vec<_> = (0..N)
            .map(|_| next_packet(&handle, &mut batch).key())
            .collect();
        assert!(lab.v4.is_silent());
        // Every third one first, from the back.
        keys.sort_by_key(|key| (key.id % 3, std::cmp::Reverse(key.id)));
        // On one CPU, or what is accepted could be delivered in another order
        let cpu = cpu::allowed().unwrap()[0];
        let verdicts = || {
            for key in &keys {
                handle.verdict(*key, Verdict::Accept).unwrap();
            }
        };
        cpu::on(cpu, verdicts).unwrap();
        for key in &keys {
            let payload = lab
                .recv()
                .expect("each is delivered, in the order of verdicts");
            assert_eq!(payload, (key.id - 1).to_be_bytes());
        }
        handle.sync().unwrap();
        assert!(is_silent(&handle, &mut batch), "nothing was refused");
    });
}

/// Also the test of ENOENT
#[test]
fn a_second_verdict_is_refused_and_packets_go_on_flowing() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send_numbered(0..3);
        let keys = [(); 3].map(|()| next_packet(&handle, &mut batch).key());
        handle.verdict(keys[1], Verdict::Accept).unwrap();
        handle.verdict(keys[1], Verdict::Drop).unwrap();
        lab.send(b"after");
        match next_event(&handle, &mut batch) {
            Event::Refused(refusal) => {
                assert_eq!(refusal.packet(), Some(keys[1]));
                assert_eq!(refusal.errno(), libc::ENOENT);
                assert_eq!(refusal.situation(), Situation::NoSuchPacket);
            }
            other => panic!("no refusal, but {other:?}"),
        }
        assert_eq!(udp_payload(&next_packet(&handle, &mut batch)), b"after");
        assert_eq!(handle.stats().refused_verdicts, 1);
        assert_eq!(lab.recv().as_deref(), Some(&1_u32.to_be_bytes()[..]));
    });
}

#[test]
fn a_packet_whose_chain_is_deleted_is_gone() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"gone");
        let key = next_packet(&handle, &mut batch).key();
        lab.delete_rules();
        handle.verdict(key, Verdict::Accept).unwrap();
        handle.sync().unwrap();
        match next_event(&handle, &mut batch) {
            Event::Refused(refusal) => {
                assert_eq!(
                    (refusal.packet(), refusal.errno()),
                    (Some(key), libc::ENOENT)
                );
            }
            other => panic!("no refusal, but {other:?}"),
        }
    });
}

/// A cut packet can be decided on, and is delivered whole
#[test]
fn accepting_a_packet_of_which_only_the_beginning_was_copied_delivers_it_whole() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let config = QueueConfig::new().copy_mode(nfqnl::CopyMode::PACKET, 30);
        let _queue = handle.bind_queue_with(QUEUE, &config).unwrap();
        let mut batch = RecvBatch::default();
        let payload = [7; 500];
        lab.send(&payload);
        let packet = next_packet(&handle, &mut batch);
        assert_eq!(packet.payload().len(), 30);
        assert_eq!(packet.capture_len(), Some(20 + 8 + 500));
        handle.verdict(packet.key(), Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&payload[..]));
    });
}

#[test]
fn verdicts_are_given_by_other_threads() {
    isolated(|| {
        const N: u32 = 200;
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let (send, keys) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for key in keys {
                    handle.verdict(key, Verdict::Accept).unwrap();
                }
            });
            scope.spawn(|| {
                let mut batch = RecvBatch::default();
                for _ in 0..N {
                    send.send(next_packet(&handle, &mut batch).key()).unwrap();
                }
                drop(send);
            });
            for number in 0..N {
                lab.send(&number.to_be_bytes());
                assert_eq!(lab.recv().as_deref(), Some(&number.to_be_bytes()[..]));
            }
        });
        handle.sync().unwrap();
        assert_eq!(handle.stats().refused_verdicts, 0);
    });
}

/// Conntrack and link-layer parts are built by the caller; a kernel without use for them ignores them
#[test]
fn a_decision_with_everything_in_it_is_taken() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"laden");
        let packet = next_packet(&handle, &mut batch);
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
            .with_conntrack(&[])
            .with_expectation(&[]);
        handle.verdict(packet.key(), decision).unwrap();
        handle.sync().unwrap();
        assert!(is_silent(&handle, &mut batch), "not refused");
        expect_rewritten(&lab.v4, b"unladen");
    });
}

/// Its number is all ones: nothing that is added to it, shifted or sent back may run over into another's
#[test]
fn the_last_queue_is_a_queue_like_any_other_and_none_beside_it() {
    isolated(|| {
        const LAST: u16 = u16::MAX;
        let lab = Lab::with(Hook::Input, &Rule::new().udp().dport(PORT).queue(0));
        let handle = Handle::open().unwrap();
        let _queues = [0, LAST].map(|queue| handle.bind_queue(queue).unwrap());
        let mut batch = RecvBatch::default();
        let mut verdicts = VerdictBatch::new();
        let moved = Verdict::Queue {
            num: LAST,
            bypass: false,
        };
        (0..3).for_each(|number| lab.send(&[number]));
        for _ in 0..3 {
            let first = next_packet(&handle, &mut batch);
            assert_eq!(first.queue(), 0);
            handle.verdict(first.key(), moved).unwrap();
        }
        for number in 0..3 {
            let packet = next_packet(&handle, &mut batch);
            assert_eq!(packet.queue(), LAST);
            assert_eq!(udp_payload(&packet), [number]);
            verdicts.push(packet.key(), Verdict::Accept).unwrap();
            let last = packet.key();
            if number == 2 {
                handle.send(&mut verdicts).unwrap();
                handle.verdict(last, Verdict::Accept).unwrap();
                match next_event(&handle, &mut batch) {
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
