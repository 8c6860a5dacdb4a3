//! Many packets per receive call, and few messages for their verdicts

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;

use nfqnl::{
    CopyMode, Error, ErrorKind, Event, Operation, PacketKey, QueueConfig, RecvBatch, SendBatch,
    Socket, Verdict,
};
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::process::fork;
use nfqnl_testkit::rules::{Hook, Rule};
use nfqnl_testkit::socket::set_send_buffer;
use nfqnl_testkit::user::without_net_admin;
use nfqnl_testkit::{cpu, kernel, link};

use crate::lab::{
    Lab, PORT, QUEUE, WHOLE_PACKETS, is_readable, is_silent, next_keys, next_packet, number,
    recv_past_the_library, run, steal_past_the_library, take_all, udp_payload, with_udp_payload,
};

/// Makes the kernel drop all waiting packets
fn drop_waiting() {
    link::down("lo").unwrap();
    link::up("lo").unwrap();
}

/// Makes the kernel drop the packets, then sends their verdicts. Returns the operations of the
/// refusals: one per message
fn refusals(socket: &Socket, batch: &mut RecvBatch, verdicts: &mut SendBatch) -> Vec<Operation> {
    drop_waiting();
    socket.send(verdicts).unwrap();
    socket.sync().unwrap();
    let mut refused = Vec::new();
    take_all(socket, batch, |event| match event {
        Event::Refused(refusal) => {
            assert_eq!(refusal.kind(), ErrorKind::NoSuchPacket);
            refused.push(refusal.operation());
        }
        other => panic!("{other:?}"),
    });
    refused
}

/// Pushes the same verdict for all keys
fn push_all(verdicts: &mut SendBatch, keys: &[PacketKey], verdict: Verdict) {
    for &key in keys {
        verdicts.push(key, verdict).unwrap();
    }
}

#[test]
fn held_packets_wait_and_the_others_keep_order() {
    isolated(|| {
        const N: u32 = 40;
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
        lab.send_numbered(0..N);
        let keys = next_keys(&socket, &mut batch, 40);
        let is_held = |i: usize| i % 10 == 5;
        for (i, key) in keys.iter().enumerate().filter(|(i, _)| !is_held(*i)) {
            let verdict = match i % 8 {
                6 => Verdict::Drop.into(),
                7 => Verdict::Accept.with_mark(9),
                _ => Verdict::Accept.into(),
            };
            verdicts.push(*key, verdict).unwrap();
        }
        assert_eq!(verdicts.len(), 36);
        socket.send(&mut verdicts).unwrap();
        assert!(verdicts.is_empty());
        lab.expect_numbered((0..N).filter(|i| i % 10 != 5 && i % 8 != 6));
        assert!(lab.v4.is_silent());
        for (_, key) in keys.iter().enumerate().filter(|(i, _)| is_held(*i)) {
            verdicts.push(*key, Verdict::Accept).unwrap();
        }
        socket.send(&mut verdicts).unwrap();
        lab.expect_numbered((0..N).filter(|i| i % 10 == 5));
        assert!(is_silent(&socket, &mut batch), "nothing was refused");
    });
}

/// A program with one flow in several queues, as CPU fanout makes them, relies on the order
#[test]
fn verdicts_keep_their_order_across_queues() {
    isolated(|| {
        const N: u32 = 30;
        const OTHER: u16 = 2;
        let rule = Rule::new().udp_dport(PORT);
        let lab = Lab::with(Hook::Output, &rule.clone().mark(1, u32::MAX).queue(QUEUE));
        let chain = lab.tables()[0].chain("other", Hook::Output, 1).unwrap();
        chain.add(&rule.mark(2, u32::MAX).queue(OTHER)).unwrap();
        for merge in [true, false] {
            let socket = Socket::builder().merge_verdicts(merge).open().unwrap();
            let _queues = [QUEUE, OTHER].map(|num| socket.bind(num).unwrap());
            let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
            let is_dropped = |number: u32| number % 7 == 3;
            for number in 0..N {
                // Runs of one, two and three packets in the same queue
                lab.v4.set_mark(1 + (number / 2 + number / 3) % 2).unwrap();
                lab.send(&number.to_be_bytes());
            }
            for expected in 0..N {
                let packet = next_packet(&socket, &mut batch);
                assert_eq!(number(&packet), expected);
                let verdict = match is_dropped(expected) {
                    true => Verdict::Drop,
                    false => Verdict::Accept,
                };
                verdicts.push(packet.key(), verdict).unwrap();
            }
            // The kernel delivers in the order of the verdicts only if all are sent from one CPU.
            let cpu = cpu::allowed().unwrap()[0];
            cpu::on(cpu, || socket.send(&mut verdicts).unwrap()).unwrap();
            lab.expect_numbered((0..N).filter(|&number| !is_dropped(number)));
            assert!(lab.v4.is_silent());
            assert!(is_silent(&socket, &mut batch), "nothing was refused");
        }
    });
}

#[test]
fn equal_verdicts_merge_but_not_over_held_packets() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
        lab.send_numbered(0..5);
        let all = next_keys(&socket, &mut batch, 5);
        for &key in &all {
            verdicts.push(key, Verdict::Accept.with_mark(3)).unwrap();
        }
        let refused = refusals(&socket, &mut batch, &mut verdicts);
        assert_eq!(refused, [Operation::BatchVerdict(all[4])]);

        lab.send_numbered(0..5);
        let all = next_keys(&socket, &mut batch, 5);
        for i in [0, 1, 3, 4] {
            verdicts.push(all[i], Verdict::Accept).unwrap();
        }
        let refused = refusals(&socket, &mut batch, &mut verdicts);
        let expected = [
            Operation::BatchVerdict(all[1]),
            Operation::Verdict(all[3]),
            Operation::Verdict(all[4]),
        ];
        assert_eq!(refused, expected, "the third is held");
        socket.set_verdict(all[2], Verdict::Drop).unwrap();
        socket.sync().unwrap();
        let mut refused = 0;
        take_all(&socket, &mut batch, |_| refused += 1);
        assert_eq!(refused, 1);

        lab.send_numbered(0..2);
        let all = next_keys(&socket, &mut batch, 2);
        push_all(&mut verdicts, &all, Verdict::Accept);
        let refused = refusals(&socket, &mut batch, &mut verdicts);
        assert_eq!(refused, [Operation::BatchVerdict(all[1])]);
        assert_eq!(socket.stats().merging_ended, 0);
    });
}

#[test]
fn merging_can_be_turned_off() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::builder().merge_verdicts(false).open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
        lab.send_numbered(0..3);
        let all = next_keys(&socket, &mut batch, 3);
        push_all(&mut verdicts, &all, Verdict::Accept);
        let refused = refusals(&socket, &mut batch, &mut verdicts);
        assert_eq!(refused, [0, 1, 2].map(|i| Operation::Verdict(all[i])));
    });
}

/// Packets lost in an overrun do not wait in the queue
#[test]
fn merging_resumes_after_an_overrun() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::builder().recv_buffer(1 << 14).open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
        for _ in 0..3 {
            lab.send_numbered(0..200);
            take_all(&socket, &mut batch, |event| match event {
                Event::Packet(packet) => verdicts.push(packet.key(), Verdict::Drop).unwrap(),
                Event::Overrun => {}
                other => panic!("{other:?}"),
            });
            socket.send(&mut verdicts).unwrap();
        }
        lab.send_numbered(0..3);
        let all = next_keys(&socket, &mut batch, 3);
        assert!(socket.stats().missing_packets > 0);
        push_all(&mut verdicts, &all, Verdict::Accept);
        let refused = refusals(&socket, &mut batch, &mut verdicts);
        assert_eq!(refused, [Operation::BatchVerdict(all[2])]);
        assert_eq!(socket.stats().merging_ended, 0);
    });
}

/// Another reader's packet still waits, and a batch verdict would hit it
#[test]
fn merging_ends_if_others_read_packets() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
        lab.send(b"the other's");
        assert!(steal_past_the_library(&socket));
        lab.send_numbered(0..3);
        let all = next_keys(&socket, &mut batch, 3);
        push_all(&mut verdicts, &all, Verdict::Accept);
        socket.send(&mut verdicts).unwrap();
        lab.expect_numbered(0..3);
        assert!(lab.v4.is_silent(), "the other's packet waits");
        assert_eq!(socket.stats().merging_ended, 1);
    });
}

/// After fork(2), parent and child receive packets from the same socket in turns
#[test]
fn processes_that_share_a_socket_answer_their_own() {
    isolated(|| {
        const EACH: usize = 4;
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        // With one slot a call reads one packet.
        let (mut batch, mut verdicts) = (RecvBatch::new(1, 4096), SendBatch::new());
        let (mut parent, mut child) = UnixStream::pair().unwrap();
        let forked = fork(|| {
            let mut held = Vec::new();
            let mut order = [0];
            while child.read_exact(&mut order).is_ok() && order != *b"e" {
                match &order {
                    b"r" => held = next_keys(&socket, &mut batch, EACH),
                    b"a" => push_all(&mut verdicts, &held, Verdict::Accept),
                    b"d" => push_all(&mut verdicts, &held, Verdict::Drop),
                    other => panic!("{other:?}"),
                }
                socket.send(&mut verdicts).unwrap();
                child.write_all(&order).unwrap();
            }
        })
        .unwrap();
        let mut child_does = |order: &[u8; 1]| {
            parent.write_all(order).unwrap();
            parent.read_exact(&mut [0]).unwrap();
        };
        for round in 0..4 {
            lab.send_numbered(0..12);
            let mut own = next_keys(&socket, &mut batch, EACH);
            child_does(b"r");
            own.extend(next_keys(&socket, &mut batch, EACH));
            let child_is_first = round % 2 == 1;
            if child_is_first {
                child_does(b"a");
                lab.expect_numbered(4..8);
                assert!(lab.v4.is_silent(), "the parent's packets wait");
            }
            push_all(&mut verdicts, &own, Verdict::Accept);
            socket.send(&mut verdicts).unwrap();
            lab.expect_numbered((0..4).chain(8..12));
            if !child_is_first {
                assert!(lab.v4.is_silent(), "the child's packets wait");
                child_does(b"d");
                assert!(lab.v4.is_silent());
            }
        }
        parent.write_all(b"e").unwrap();
        assert!(forked.wait().unwrap());
        assert!(is_silent(&socket, &mut batch), "nothing was refused");
    });
}

/// The caller is responsible for all answered packets, including packets held by others
#[test]
fn a_verdict_up_to_a_packet_answers_all_before_it() {
    isolated(|| {
        let lab = Lab::new();
        let other = lab.add_queue(2);
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let other_queue = socket.bind(2).unwrap();
        let mut batch = RecvBatch::default();
        lab.send_numbered(0..2);
        assert!(steal_past_the_library(&socket));
        let held = next_packet(&socket, &mut batch).key();
        other.send(b"another queue", other.address()).unwrap();
        lab.send_numbered(2..6);
        let other_key = next_packet(&socket, &mut batch).key();
        let all = next_keys(&socket, &mut batch, 4);
        socket.set_verdict_up_to(all[1], Verdict::Accept).unwrap();
        lab.expect_numbered(0..4);
        assert!(lab.v4.is_silent() && other.is_silent(), "later ones wait");

        socket.sync().unwrap();
        assert!(is_silent(&socket, &mut batch));
        socket.set_verdict(held, Verdict::Drop).unwrap();
        socket.sync().unwrap();
        let mut refused = Vec::new();
        take_all(&socket, &mut batch, |event| match event {
            Event::Refused(refusal) => refused.push(refusal.packet()),
            other => panic!("{other:?}"),
        });
        assert_eq!(refused, [Some(held)], "it was answered before");

        // Again by a sender, with a mark, and with a key from an id
        let sender = socket.verdict_sender();
        let last = queue.key(all[3].id());
        sender
            .set_verdict_up_to(last, nfqnl::proto::PlainVerdict::from(Verdict::Drop))
            .unwrap();
        assert!(lab.v4.is_silent());
        let (up_to, op) = (other_queue.key(other_key.id()), Operation::Verdict(all[3]));
        socket.set_verdict_up_to(up_to, Verdict::Accept).unwrap();
        assert_eq!(other.recv().as_deref(), Some(&b"another queue"[..]));
        socket.set_verdict(all[3], Verdict::Accept).unwrap();
        socket.sync().unwrap();
        let mut refused = Vec::new();
        take_all(&socket, &mut batch, |event| match event {
            Event::Refused(refusal) => refused.push(refusal.operation()),
            other => panic!("{other:?}"),
        });
        assert_eq!(refused, [op], "it was dropped before");
    });
}

/// Later batch verdicts hit no held packet
#[test]
fn merging_goes_on_after_a_verdict_up_to() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
        lab.send_numbered(0..6);
        let all = next_keys(&socket, &mut batch, 6);
        socket.set_verdict_up_to(all[1], Verdict::Accept).unwrap();
        lab.expect_numbered(0..2);
        push_all(&mut verdicts, &all[3..], Verdict::Accept);
        socket.send(&mut verdicts).unwrap();
        lab.expect_numbered(3..6);
        assert!(lab.v4.is_silent(), "the third is held");
        socket.set_verdict(all[2], Verdict::Accept).unwrap();
        lab.expect_numbered(2..3);
        assert!(is_silent(&socket, &mut batch), "nothing was refused");

        lab.send_numbered(0..3);
        let all = next_keys(&socket, &mut batch, 3);
        push_all(&mut verdicts, &all, Verdict::Accept);
        let refused = refusals(&socket, &mut batch, &mut verdicts);
        assert_eq!(refused, [Operation::BatchVerdict(all[2])]);
    });
}

#[test]
fn a_batch_may_need_several_system_calls() {
    isolated(|| {
        const N: u32 = 600;
        // The buffers of an ordinary user have room for this many packets.
        const AT_ONCE: u32 = 100;
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
        for numbers in (0..N / AT_ONCE).map(|i| i * AT_ONCE..(i + 1) * AT_ONCE) {
            for i in numbers.clone() {
                let mut payload = vec![0; 1000];
                payload[..4].copy_from_slice(&i.to_be_bytes());
                lab.send(&payload);
            }
            for i in numbers.clone() {
                let packet = next_packet(&socket, &mut batch);
                assert_eq!(udp_payload(&packet)[..4], i.to_be_bytes());
                let mut payload = vec![1; 900];
                payload[..4].copy_from_slice(&i.to_be_bytes());
                let new = with_udp_payload(packet.payload(), &payload).unwrap();
                verdicts
                    .push(packet.key(), Verdict::Accept.with_payload(&new))
                    .unwrap();
            }
            socket.send(&mut verdicts).unwrap();
            if kernel::refuses_payloads() {
                assert!(lab.v4.is_silent(), "refused, so dropped");
                continue;
            }
            // In any order: each CPU delivers its packets, and this thread may move between sends.
            let mut missing: BTreeSet<u32> = numbers.collect();
            while !missing.is_empty() {
                let payload = lab.recv().unwrap();
                assert_eq!(payload.len(), 900);
                let number = u32::from_be_bytes(payload[..4].try_into().unwrap());
                assert!(missing.remove(&number), "{number}");
            }
        }
        assert!(is_silent(&socket, &mut batch));
    });
}

#[test]
fn verdicts_of_an_unbound_queue_are_counted() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
        lab.send_numbered(0..2);
        let old = next_keys(&socket, &mut batch, 2);
        push_all(&mut verdicts, &old, Verdict::Accept);
        queue.destroy().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        lab.send(b"new");
        let new = next_packet(&socket, &mut batch).key();
        verdicts.push(new, Verdict::Accept).unwrap();
        socket.send(&mut verdicts).unwrap();
        assert!(verdicts.is_empty());
        assert_eq!(socket.stats().late_verdicts, 2);
        assert_eq!(lab.recv().as_deref(), Some(&b"new"[..]));
        assert!(lab.v4.is_silent());
        assert!(is_silent(&socket, &mut batch), "nothing was refused");
    });
}

#[test]
fn a_bad_payload_is_refused_and_nothing_is_added() {
    let key = PacketKey::new(0, 0);
    let mut verdicts = SendBatch::new();
    verdicts.push(key, Verdict::Accept).unwrap();
    for (payload, needed) in [
        (vec![0x45; 19], 20),
        (vec![0x60; 39], 40),
        (vec![0x4f; 59], 60),
    ] {
        let error = verdicts
            .push(key, Verdict::Accept.with_payload(&payload))
            .unwrap_err();
        assert!(
            matches!(error, Error::PayloadTooShort { needed: n, had, .. }
                if (n, had) == (needed, payload.len())),
            "{error:?}"
        );
        assert_eq!(verdicts.len(), 1);
    }
    let too_long = vec![0x45; 65532];
    let error = verdicts
        .push(key, Verdict::Accept.with_payload(&too_long))
        .unwrap_err();
    assert!(matches!(error, Error::Encode { .. }), "{error:?}");
    assert_eq!(verdicts.len(), 1);
    verdicts.clear();
    assert!(verdicts.is_empty());
}

#[test]
fn run_once_sends_the_verdicts_of_a_batch_together() {
    isolated(|| {
        const N: u32 = 30;
        let lab = Lab::new();
        let handle = nfqnl::open().unwrap();
        let mut seen = 0_u32;
        let _queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, move |data| {
                assert!(data.get_payload().ends_with(&seen.to_be_bytes()));
                match seen % 3 {
                    0 => data.set_verdict(Verdict::Drop, None),
                    1 => {}
                    _ => {
                        data.set_verdict(Verdict::Drop, None);
                        data.set_verdict(Verdict::Accept, 5);
                    }
                }
                seen += 1;
            })
            .unwrap();
        lab.send_numbered(0..N);
        let mut batch = RecvBatch::default();
        run(&handle, &mut batch, 30);
        assert_eq!(handle.try_run_once(&mut batch).unwrap(), 0);
        lab.expect_numbered((0..N).filter(|i| i % 3 == 2));
        assert!(lab.v4.is_silent());
        assert_eq!(handle.socket().stats().refused_verdicts, 0);
    });
}

#[test]
fn a_panic_in_a_batch_keeps_the_rest_of_it() {
    isolated(|| {
        let lab = Lab::new();
        let handle = nfqnl::open().unwrap();
        let queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, |data| {
                data.set_verdict(Verdict::Accept, None);
                assert!(
                    !data.get_payload().ends_with(&1_u32.to_be_bytes()),
                    "on purpose"
                );
            })
            .unwrap();
        let mut batch = RecvBatch::default();
        for is_set_aside in [false, true] {
            lab.send_numbered(0..3);
            if is_set_aside {
                queue.set_maxlen(100).unwrap();
            }
            catch_unwind(AssertUnwindSafe(|| run(&handle, &mut batch, 3))).unwrap_err();
            lab.expect_numbered(0..2);
            assert!(lab.v4.is_silent());
            run(&handle, &mut batch, 1);
            lab.expect_numbered(2..3);
        }
    });
}

#[test]
fn run_once_reports_what_has_no_callback() {
    isolated(|| {
        let lab = Lab::new();
        let handle = nfqnl::open().unwrap();
        let (send, events) = mpsc::channel();
        handle.on_event(move |event| send.send(format!("{event:?}")).unwrap());
        let queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, |data| {
                // The kernel refuses this verdict.
                data.set_verdict(Verdict::Stolen, None);
            })
            .unwrap();
        lab.send(b"stolen");
        let mut batch = RecvBatch::new(4, 64);
        let error = loop {
            match handle.run_once(&mut batch) {
                Ok(called) => assert_eq!(called, 0),
                Err(error) => break error,
            }
        };
        match error {
            Error::BufferTooSmall {
                key: Some(key),
                needed,
                had,
                ..
            } => {
                assert_eq!(had, 64);
                assert!(needed > 64);
                handle.socket().set_verdict(key, Verdict::Accept).unwrap();
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(lab.recv().as_deref(), Some(&b"stolen"[..]));
        let mut batch = RecvBatch::for_config(4, &WHOLE_PACKETS);
        lab.send(b"stolen");
        run(&handle, &mut batch, 1);
        while is_readable(&handle) {
            assert_eq!(handle.run_once(&mut batch).unwrap(), 0);
        }
        for what in ["BufferTooSmall", "Refused"] {
            let event = events.try_recv().unwrap();
            assert!(event.contains(what), "{event}");
        }
        queue.destroy().unwrap();
        assert_eq!(handle.try_run_once(&mut batch).unwrap(), 0);
    });
}

/// The slots are as long as required by copy mode and range
#[test]
fn a_batch_for_a_configuration_holds_its_packets() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        for (mode, range, expected) in [
            (CopyMode::Meta, 0, 0),
            (CopyMode::Packet, 128, 128),
            (CopyMode::Packet, 65531, 65531),
            (CopyMode::Packet, 0, 65531),
            (CopyMode::Packet, u32::MAX, 65531),
        ] {
            queue.set_mode(mode, range).unwrap();
            let config = QueueConfig::new().copy_mode(mode, range);
            let mut batch = RecvBatch::for_config(2, &config);
            lab.send(&[7; 65507]);
            let packet = next_packet(&socket, &mut batch);
            assert_eq!(packet.payload().len(), expected, "{mode} {range}");
            socket.set_verdict(packet.key(), Verdict::Drop).unwrap();
        }
    });
}

/// The caller's own loop may pass any packet to other code, so each packet gets its own verdict
#[test]
fn handle_packet_ends_merging() {
    isolated(|| {
        let lab = Lab::new();
        let handle = nfqnl::open().unwrap();
        let (send, keys) = mpsc::channel();
        let _queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, move |data| {
                send.send(data.key()).unwrap();
            })
            .unwrap();
        lab.send_numbered(0..3);
        let held = recv_past_the_library(&handle);
        for _ in 0..2 {
            let packet = recv_past_the_library(&handle);
            assert_eq!(handle.handle_packet(&packet).unwrap(), 1);
        }
        let mut verdicts = SendBatch::new();
        for key in keys.try_iter() {
            verdicts.push(key, Verdict::Accept).unwrap();
        }
        assert_eq!(verdicts.len(), 2);
        handle.socket().send(&mut verdicts).unwrap();
        lab.expect_numbered(1..3);
        assert!(lab.v4.is_silent());
        handle.handle_packet(&held).unwrap();
        let key = keys.recv().unwrap();
        handle.socket().set_verdict(key, Verdict::Accept).unwrap();
        lab.expect_numbered(0..1);
        let stats = handle.socket().stats();
        assert_eq!(stats.missing_packets, 0, "it was late, not lost");
    });
}

/// Packets come one by one when there is little traffic
#[test]
fn merging_begins_after_single_verdicts() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
        for verdict in [Verdict::Accept, Verdict::Drop, Verdict::Accept] {
            lab.send(b"alone");
            let key = next_packet(&socket, &mut batch).key();
            verdicts.push(key, verdict).unwrap();
            socket.send(&mut verdicts).unwrap();
        }
        lab.send_numbered(0..5);
        let all = next_keys(&socket, &mut batch, 5);
        push_all(&mut verdicts, &all, Verdict::Accept);
        let refused = refusals(&socket, &mut batch, &mut verdicts);
        assert_eq!(refused, [Operation::BatchVerdict(all[4])]);
    });
}

#[test]
fn a_refusal_without_the_capability_names_a_packet() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
        lab.send_numbered(0..5);
        let all = next_keys(&socket, &mut batch, 5);
        socket.set_verdict(all[0], Verdict::Accept).unwrap();
        push_all(&mut verdicts, &all[1..], Verdict::Drop);
        without_net_admin(|| socket.send(&mut verdicts)).unwrap();
        socket.sync().unwrap();
        let mut refused = Vec::new();
        take_all(&socket, &mut batch, |event| match event {
            Event::Refused(refusal) => refused.push((refusal.packet(), refusal.errno())),
            other => panic!("{other:?}"),
        });
        assert_eq!(refused, [(Some(all[4]), libc::EPERM)]);
    });
}

/// Without the capability the kernel executes no verdict of a send, and refuses the first for all
/// of them
#[test]
fn a_refusal_without_the_capability_ends_merging() {
    isolated(|| {
        const OTHER: u16 = 2;
        let lab = Lab::at_input();
        let other = lab.add_queue(OTHER);
        let socket = Socket::open().unwrap();
        let _queues = [QUEUE, OTHER].map(|num| socket.bind(num).unwrap());
        let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
        lab.send(b"refused by name");
        let mut all = next_keys(&socket, &mut batch, 1);
        for number in 0..3 {
            other.send(&[number], other.address()).unwrap();
        }
        all.extend(next_keys(&socket, &mut batch, 3));
        push_all(&mut verdicts, &all[..2], Verdict::Drop);
        without_net_admin(|| socket.send(&mut verdicts)).unwrap();
        socket.sync().unwrap();
        let mut refused = 0;
        take_all(&socket, &mut batch, |_| refused += 1);
        assert_eq!(refused, 1);
        push_all(&mut verdicts, &all[2..], Verdict::Accept);
        socket.send(&mut verdicts).unwrap();
        for number in 1..3 {
            assert_eq!(other.recv().as_deref(), Some(&[number][..]));
        }
        assert!(other.is_silent(), "a batch verdict has hit the first");
        assert_eq!(socket.stats().merging_ended, 2);
        socket.set_verdict(all[1], Verdict::Accept).unwrap();
        assert_eq!(other.recv().as_deref(), Some(&[0][..]), "it waited");

        // Permanently, and also for queues bound later
        let _later = socket.bind(3).unwrap();
        let third = lab.add_queue(3);
        for number in 0..3 {
            third.send(&[number], third.address()).unwrap();
        }
        let all = next_keys(&socket, &mut batch, 3);
        push_all(&mut verdicts, &all, Verdict::Accept);
        let refused = refusals(&socket, &mut batch, &mut verdicts);
        assert_eq!(refused, [0, 1, 2].map(|i| Operation::Verdict(all[i])));
    });
}

/// The refusals of verdicts may fill many batches before the next packet
#[test]
fn try_run_once_gets_to_packets_behind_refusals() {
    isolated(|| {
        const REFUSED: usize = 2 * RecvBatch::DEFAULT_SLOTS;
        let lab = Lab::new();
        let handle = nfqnl::open().unwrap();
        let socket = handle.socket();
        let _queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, |data| {
                data.set_verdict(Verdict::Accept, None);
            })
            .unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"gone");
        let gone = next_packet(socket, &mut batch).key();
        drop_waiting();
        for is_set_aside in [true, false] {
            for _ in 0..REFUSED {
                socket.set_verdict(gone, Verdict::Accept).unwrap();
            }
            if is_set_aside {
                socket.sync().unwrap();
            }
            lab.send(b"behind them");
            assert_eq!(handle.try_run_once(&mut batch).unwrap(), 1);
            assert_eq!(handle.try_run_once(&mut batch).unwrap(), 0);
            assert_eq!(lab.recv().as_deref(), Some(&b"behind them"[..]));
        }
    });
}

/// The other verdicts are sent although one verdict is too long for a system call
#[test]
fn a_verdict_longer_than_the_send_buffer_fails_alone() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        set_send_buffer(&socket, 4096).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
        lab.send_numbered(0..200);
        let all = next_keys(&socket, &mut batch, 200);
        let long = vec![0x45; 60_000];
        for (i, &key) in all.iter().enumerate() {
            match i {
                1 => verdicts.push(key, Verdict::Accept.with_payload(&long)),
                // Different verdicts are not merged, and one call cannot send this many messages.
                _ => verdicts.push(key, Verdict::Accept.with_mark(u32::try_from(i).unwrap())),
            }
            .unwrap();
        }
        match socket.send(&mut verdicts).unwrap_err() {
            Error::Io { op, source, .. } => {
                assert_eq!(op, Operation::Verdict(all[1]));
                assert_eq!(source.raw_os_error(), Some(libc::EMSGSIZE));
            }
            other => panic!("{other:?}"),
        }
        assert!(verdicts.is_empty());
        lab.expect_numbered((0..200).filter(|&i| i != 1));
        socket.set_verdict(all[1], Verdict::Accept).unwrap();
        lab.expect_numbered(1..2);
    });
}

#[test]
fn the_callback_of_an_ended_queue_is_dropped() {
    isolated(|| {
        let handle = nfqnl::open().unwrap();
        let (send, hung_up) = mpsc::channel::<()>();
        let queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, move |_| send.send(()).unwrap())
            .unwrap();
        queue.destroy().unwrap();
        handle.try_run_once(&mut RecvBatch::default()).unwrap();
        assert_eq!(hung_up.try_recv(), Err(mpsc::TryRecvError::Disconnected));
    });
}
