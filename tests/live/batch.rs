//! Many packets in, few messages out

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;

use nfqnl::{
    CopyMode, Error, Event, Handle, Operation, PacketKey, QueueConfig, RecvBatch, Situation,
    Verdict, VerdictBatch,
};
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::rules::{Family, Hook, Rule, Table};
use nfqnl_testkit::socket::set_send_buffer;
use nfqnl_testkit::traffic::{Udp, V4};
use nfqnl_testkit::user::without_net_admin;
use nfqnl_testkit::{kernel, link};

use crate::examples::with_udp_payload;
use crate::lab::{
    Lab, PORT, QUEUE, is_silent, next_packet, recv_past_the_library, steal_past_the_library,
    udp_payload,
};

const WHOLE_PACKETS: QueueConfig = QueueConfig::new().copy_mode(CopyMode::PACKET, 0);

/// The keys of the next `n` packets
fn keys(handle: &Handle, batch: &mut RecvBatch, n: usize) -> Vec<PacketKey> {
    Vec::from_iter((0..n).map(|_| next_packet(handle, batch).key()))
}

/// Sends `verdicts` on packets that the kernel has dropped meanwhile, and returns what it refuses: one answer for each
/// message
fn refusals(handle: &Handle, batch: &mut RecvBatch, verdicts: &mut VerdictBatch) -> Vec<Operation> {
    link::down("lo").unwrap();
    link::up("lo").unwrap();
    handle.send(verdicts).unwrap();
    handle.sync().unwrap();
    let events = handle.try_recv(batch).unwrap();
    events
        .map(|event| match event {
            Event::Refused(refusal) => {
                assert_eq!(refusal.situation(), Situation::NoSuchPacket);
                refusal.operation()
            }
            other => panic!("{other:?}"),
        })
        .collect()
}

#[test]
fn packets_are_released_in_order_and_those_held_back_wait() {
    isolated(|| {
        const N: u32 = 40;
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
        lab.send_numbered(0..N);
        let keys = keys(&handle, &mut batch, 40);
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
        handle.send(&mut verdicts).unwrap();
        assert!(verdicts.is_empty());
        for i in (0..N).filter(|&i| i % 10 != 5 && i % 8 != 6) {
            assert_eq!(lab.recv().as_deref(), Some(&i.to_be_bytes()[..]));
        }
        assert!(lab.v4.is_silent());
        for (_, key) in keys.iter().enumerate().filter(|(i, _)| is_held(*i)) {
            verdicts.push(*key, Verdict::Accept).unwrap();
        }
        handle.send(&mut verdicts).unwrap();
        for i in (0..N).filter(|&i| i % 10 == 5) {
            assert_eq!(lab.recv().as_deref(), Some(&i.to_be_bytes()[..]));
        }
        assert!(is_silent(&handle, &mut batch), "nothing was refused");
    });
}

#[test]
fn equal_verdicts_are_one_message_that_no_held_packet_is_caught_by() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
        lab.send_numbered(0..5);
        let all = keys(&handle, &mut batch, 5);
        for &key in &all {
            verdicts.push(key, Verdict::Accept.with_mark(3)).unwrap();
        }
        let refused = refusals(&handle, &mut batch, &mut verdicts);
        assert_eq!(refused, [Operation::BatchVerdict(all[4])]);

        lab.send_numbered(0..5);
        let all = keys(&handle, &mut batch, 5);
        for i in [0, 1, 3, 4] {
            verdicts.push(all[i], Verdict::Accept).unwrap();
        }
        let refused = refusals(&handle, &mut batch, &mut verdicts);
        let expected = [
            Operation::BatchVerdict(all[1]),
            Operation::Verdict(all[3]),
            Operation::Verdict(all[4]),
        ];
        assert_eq!(refused, expected, "the third is held");
        handle.verdict(all[2], Verdict::Drop).unwrap();
        handle.sync().unwrap();
        assert!(!is_silent(&handle, &mut batch), "refused too");

        lab.send_numbered(0..2);
        for key in keys(&handle, &mut batch, 2) {
            verdicts.push(key, Verdict::Accept).unwrap();
        }
        assert_eq!(
            refusals(&handle, &mut batch, &mut verdicts).len(),
            1,
            "and on"
        );
    });
}

#[test]
fn runs_can_be_turned_off() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::builder().coalesce(false).open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
        lab.send_numbered(0..3);
        let all = keys(&handle, &mut batch, 3);
        for &key in &all {
            verdicts.push(key, Verdict::Accept).unwrap();
        }
        let refused = refusals(&handle, &mut batch, &mut verdicts);
        assert_eq!(refused, [0, 1, 2].map(|i| Operation::Verdict(all[i])));
    });
}

/// Packets that were lost in an overrun do not wait, so they are in nobody's way
#[test]
fn runs_go_on_after_an_overrun() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::builder().recv_buffer(1 << 14).open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
        for _ in 0..3 {
            lab.send_numbered(0..200);
            loop {
                let events = handle.try_recv(&mut batch).unwrap();
                let keys = Vec::from_iter(events.packets().map(|packet| packet.key()));
                if keys.is_empty() && is_silent(&handle, &mut batch) {
                    break;
                }
                for key in keys {
                    verdicts.push(key, Verdict::Drop).unwrap();
                }
                handle.send(&mut verdicts).unwrap();
            }
        }
        lab.send_numbered(0..3);
        let all = keys(&handle, &mut batch, 3);
        assert!(handle.stats().lost_packets > 0);
        for &key in &all {
            verdicts.push(key, Verdict::Accept).unwrap();
        }
        let refused = refusals(&handle, &mut batch, &mut verdicts);
        assert_eq!(refused, [Operation::BatchVerdict(all[2])]);
    });
}

/// A packet that somebody else has read is not lost, and not to be caught
#[test]
fn no_run_goes_over_a_packet_that_others_have_read() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
        lab.send(b"the other's");
        assert!(steal_past_the_library(&handle));
        lab.send_numbered(0..3);
        for key in keys(&handle, &mut batch, 3) {
            verdicts.push(key, Verdict::Accept).unwrap();
        }
        handle.send(&mut verdicts).unwrap();
        for i in 0..3_u32 {
            assert_eq!(lab.recv().as_deref(), Some(&i.to_be_bytes()[..]));
        }
        assert!(lab.v4.is_silent(), "the other's packet waits");
    });
}

#[test]
fn more_verdicts_than_one_system_call_takes() {
    isolated(|| {
        const N: u32 = 600;
        // So many fit the buffers of an ordinary user.
        const AT_ONCE: u32 = 100;
        let lab = Lab::new();
        let handle = Handle::builder().recv_buffer(4 << 20).open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
        for numbers in (0..N / AT_ONCE).map(|i| i * AT_ONCE..(i + 1) * AT_ONCE) {
            for i in numbers.clone() {
                let mut payload = vec![0; 1000];
                payload[..4].copy_from_slice(&i.to_be_bytes());
                lab.send(&payload);
            }
            for i in numbers.clone() {
                let packet = next_packet(&handle, &mut batch);
                assert_eq!(udp_payload(&packet)[..4], i.to_be_bytes());
                let mut payload = vec![1; 900];
                payload[..4].copy_from_slice(&i.to_be_bytes());
                let new = with_udp_payload(packet.payload(), &payload).unwrap();
                verdicts
                    .push(packet.key(), Verdict::Accept.with_payload(&new))
                    .unwrap();
            }
            handle.send(&mut verdicts).unwrap();
            if kernel::refuses_payloads() {
                assert!(lab.v4.is_silent(), "refused, so dropped");
                continue;
            }
            for i in numbers {
                let payload = lab.recv().unwrap();
                assert_eq!((payload.len(), &payload[..4]), (900, &i.to_be_bytes()[..]));
            }
        }
        assert!(is_silent(&handle, &mut batch));
    });
}

#[test]
fn verdicts_of_an_ended_binding_are_given_up_and_the_others_sent() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let queue = handle.bind_queue(QUEUE).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
        lab.send(b"old");
        let old = next_packet(&handle, &mut batch).key();
        verdicts.push(old, Verdict::Accept).unwrap();
        queue.destroy().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        lab.send(b"new");
        let new = next_packet(&handle, &mut batch).key();
        verdicts.push(new, Verdict::Accept).unwrap();
        match handle.send(&mut verdicts).unwrap_err() {
            Error::Stale { key, .. } => assert_eq!(key, old),
            other => panic!("{other:?}"),
        }
        assert!(verdicts.is_empty());
        assert_eq!(lab.recv().as_deref(), Some(&b"new"[..]));
    });
}

#[test]
fn a_payload_that_cannot_be_is_refused_and_nothing_added() {
    let key = PacketKey {
        queue: 0,
        binding: 0,
        id: 0,
    };
    let mut verdicts = VerdictBatch::new();
    verdicts.push(key, Verdict::Accept).unwrap();
    for (payload, text) in [
        (vec![0x45; 19], "19 bytes"),
        (vec![0x60; 39], "39 bytes"),
        (vec![0x4f; 59], "59 bytes"),
        (vec![0x45; 65532], "65532 bytes"),
    ] {
        let error = verdicts
            .push(key, Verdict::Accept.with_payload(&payload))
            .unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!(verdicts.len(), 1);
    }
    verdicts.clear();
    assert!(verdicts.is_empty());
}

#[test]
fn callbacks_are_called_for_a_whole_batch_and_their_verdicts_sent_together() {
    isolated(|| {
        const N: u32 = 30;
        let lab = Lab::new();
        let mut handle = Handle::open().unwrap();
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
        assert_eq!(handle.run_once(&mut batch).unwrap(), 30);
        assert_eq!(handle.try_run_once(&mut batch).unwrap(), 0);
        for i in (0..N).filter(|i| i % 3 == 2) {
            assert_eq!(lab.recv().as_deref(), Some(&i.to_be_bytes()[..]));
        }
        assert!(lab.v4.is_silent());
        assert_eq!(handle.stats().refused_verdicts, 0);
    });
}

#[test]
fn a_panic_amid_a_batch_sends_what_was_set_and_keeps_the_rest() {
    isolated(|| {
        let lab = Lab::new();
        let mut handle = Handle::open().unwrap();
        let _queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, |data| {
                data.set_verdict(Verdict::Accept, None);
                assert!(
                    !data.get_payload().ends_with(&1_u32.to_be_bytes()),
                    "on purpose"
                );
            })
            .unwrap();
        lab.send_numbered(0..3);
        let mut batch = RecvBatch::default();
        catch_unwind(AssertUnwindSafe(|| handle.run_once(&mut batch))).unwrap_err();
        for i in 0..2_u32 {
            assert_eq!(lab.recv().as_deref(), Some(&i.to_be_bytes()[..]));
        }
        assert!(lab.v4.is_silent() && batch.has_events());
        assert_eq!(handle.run_once(&mut batch).unwrap(), 1);
        assert_eq!(lab.recv().as_deref(), Some(&2_u32.to_be_bytes()[..]));
    });
}

#[test]
fn run_once_tells_of_what_no_callback_takes() {
    isolated(|| {
        let lab = Lab::new();
        let mut handle = Handle::open().unwrap();
        let (send, events) = mpsc::channel();
        handle.on_event(move |event| send.send(format!("{event:?}")).unwrap());
        let queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, |data| {
                data.set_verdict(Verdict::Stolen, None);
            })
            .unwrap();
        lab.send(b"stolen");
        let mut batch = RecvBatch::new(4, 64);
        match handle.run_once(&mut batch).unwrap_err() {
            Error::Truncated {
                key: Some(key),
                needed,
                had,
                ..
            } => {
                assert_eq!(had, 64);
                assert!(needed > 64);
                handle.verdict(key, Verdict::Accept).unwrap();
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(lab.recv().as_deref(), Some(&b"stolen"[..]));
        let mut batch = RecvBatch::for_copy(4, CopyMode::PACKET, 0);
        lab.send(b"stolen");
        assert_eq!(handle.run_once(&mut batch).unwrap(), 1);
        assert_eq!(handle.run_once(&mut batch).unwrap(), 0);
        let event = events.try_recv().unwrap();
        assert!(event.contains("Refused"), "{event}");
        queue.destroy().unwrap();
        assert_eq!(handle.try_run_once(&mut batch).unwrap(), 0);
    });
}

/// Slots as long as the copy mode and range ask for, and no longer
#[test]
fn a_batch_for_a_copy_mode_holds_its_packets() {
    isolated(|| {
        let lab = Lab::with(Hook::Output, &Rule::new().udp().dport(PORT).queue(QUEUE));
        let handle = Handle::open().unwrap();
        let queue = handle.bind_queue(QUEUE).unwrap();
        for (mode, range, expected) in [
            (CopyMode::META, 0, 0),
            (CopyMode::PACKET, 128, 128),
            (CopyMode::PACKET, 65531, 65531),
            (CopyMode::PACKET, 0, 65531),
            (CopyMode::PACKET, u32::MAX, 65531),
        ] {
            queue.set_mode(mode, range).unwrap();
            let mut batch = RecvBatch::for_copy(2, mode, range);
            lab.send(&[7; 65507]);
            let packet = next_packet(&handle, &mut batch);
            assert_eq!(packet.payload().len(), expected, "{mode} {range}");
            handle.verdict(packet.key(), Verdict::Drop).unwrap();
        }
    });
}

/// In the caller's own loop packets may be in anybody's hands, so each has its own verdict
#[test]
fn packets_of_the_callers_own_loop_are_never_answered_in_runs() {
    isolated(|| {
        let lab = Lab::new();
        let mut handle = Handle::open().unwrap();
        let (send, keys) = mpsc::channel();
        let _queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, move |data| {
                send.send(data.key()).unwrap()
            })
            .unwrap();
        lab.send_numbered(0..3);
        let held = recv_past_the_library(&handle);
        for _ in 0..2 {
            while handle
                .handle_packet(&recv_past_the_library(&handle))
                .unwrap()
                == 0
            {}
        }
        let mut verdicts = VerdictBatch::new();
        for key in keys.try_iter() {
            verdicts.push(key, Verdict::Accept).unwrap();
        }
        assert_eq!(verdicts.len(), 2);
        handle.send(&mut verdicts).unwrap();
        for i in 1..3_u32 {
            assert_eq!(lab.recv().as_deref(), Some(&i.to_be_bytes()[..]));
        }
        assert!(lab.v4.is_silent());
        handle.handle_packet(&held).unwrap();
        handle
            .verdict(keys.recv().unwrap(), Verdict::Accept)
            .unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&0_u32.to_be_bytes()[..]));
        assert_eq!(handle.stats().lost_packets, 0, "it came late");
    });
}

/// A refusal that nobody has received yet, or ever will, lets no run over its packets
#[test]
fn no_run_goes_over_packets_whose_verdicts_were_sent_without_the_capability() {
    isolated(|| {
        let lab = Lab::new();
        for is_batch in [true, false] {
            let handle = Handle::open().unwrap();
            let _queue = handle.bind_queue(QUEUE).unwrap();
            let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
            let mut send = |keys: &[PacketKey], verdict| {
                for &key in keys {
                    verdicts.push(key, verdict).unwrap();
                }
                handle.send(&mut verdicts).unwrap();
            };
            lab.send_numbered(0..8);
            let all = keys(&handle, &mut batch, 8);
            send(&all[..2], Verdict::Accept);
            without_net_admin(|| match is_batch {
                true => send(&all[2..4], Verdict::Drop),
                false => handle.verdict(all[2], Verdict::Drop).unwrap(),
            });
            let next = if is_batch { 4 } else { 3 };
            send(&all[next..], Verdict::Accept);
            for number in (0..2).chain(next..8) {
                let number = u32::try_from(number).unwrap().to_be_bytes();
                assert_eq!(lab.recv().as_deref(), Some(&number[..]));
            }
            assert!(lab.v4.is_silent(), "what was to be dropped waits");
            assert_eq!(handle.stats().refused_verdicts, 0, "or is not known of");
        }
    });
}

/// One packet at a time, as in quiet times, is no reason never to have runs
#[test]
fn runs_come_after_single_verdicts() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
        for verdict in [Verdict::Accept, Verdict::Drop, Verdict::Accept] {
            lab.send(b"alone");
            let key = next_packet(&handle, &mut batch).key();
            verdicts.push(key, verdict).unwrap();
            handle.send(&mut verdicts).unwrap();
        }
        lab.send_numbered(0..5);
        let all = keys(&handle, &mut batch, 5);
        for &key in &all {
            verdicts.push(key, Verdict::Accept).unwrap();
        }
        let refused = refusals(&handle, &mut batch, &mut verdicts);
        assert_eq!(refused, [Operation::BatchVerdict(all[4])]);
    });
}

/// Also if what is said again comes first in the send
#[test]
fn a_refusal_for_want_of_the_capability_names_a_packet_of_the_send() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
        lab.send_numbered(0..5);
        let all = keys(&handle, &mut batch, 5);
        handle.verdict(all[0], Verdict::Accept).unwrap();
        for &key in &all[1..] {
            verdicts.push(key, Verdict::Drop).unwrap();
        }
        without_net_admin(|| handle.send(&mut verdicts)).unwrap();
        handle.sync().unwrap();
        let events = Vec::from_iter(handle.try_recv(&mut batch).unwrap());
        assert!(
            matches!(&events[..], [Event::Refused(refusal)]
                if refusal.packet() == Some(all[4])
                    && refusal.situation() == Situation::NotPermitted),
            "{events:?}"
        );
    });
}

/// Without its refusal being known, what was accepted once more is accepted before the run of another verdict
#[test]
fn the_usual_verdict_is_said_again_before_a_run_of_another() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
        let mut send = |keys: &[PacketKey], verdict| {
            for &key in keys {
                verdicts.push(key, verdict).unwrap();
            }
            handle.send(&mut verdicts).unwrap();
        };
        lab.send_numbered(0..8);
        let all = keys(&handle, &mut batch, 8);
        send(&all[..2], Verdict::Accept);
        without_net_admin(|| send(&all[2..4], Verdict::Accept));
        send(&all[4..6], Verdict::Drop);
        for number in 0..4_u32 {
            assert_eq!(lab.recv().as_deref(), Some(&number.to_be_bytes()[..]));
        }
        send(&all[6..], Verdict::Drop);
        assert!(lab.v4.is_silent());

        handle.sync().unwrap();
        let refused = Vec::from_iter(handle.try_recv(&mut batch).unwrap());
        assert!(
            matches!(&refused[..], [Event::Refused(refusal)]
                if refusal.operation() == Operation::BatchVerdict(all[3])),
            "{refused:?}: of what was said again nothing is told"
        );
    });
}

/// Without the capability the kernel looks at no verdict of a send, and refuses the first in the name of all
#[test]
fn after_a_send_without_the_capability_no_queue_has_runs() {
    isolated(|| {
        const OTHER: u16 = 2;
        let lab = Lab::new();
        let table = Table::new(Family::Ip, "other").unwrap();
        let chain = table.chain("queue", Hook::Input, 0).unwrap();
        chain
            .add(&Rule::new().udp().dport(PORT + 1).queue(OTHER))
            .unwrap();
        let other = Udp::bind(V4, PORT + 1).unwrap();
        let handle = Handle::open().unwrap();
        let _queues = [QUEUE, OTHER].map(|num| handle.bind_queue(num).unwrap());
        let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
        lab.send(b"refused by name");
        for number in 0..3 {
            other.send(&[number], other.address()).unwrap();
        }
        let all = keys(&handle, &mut batch, 4);
        for &key in &all[..2] {
            verdicts.push(key, Verdict::Drop).unwrap();
        }
        without_net_admin(|| handle.send(&mut verdicts)).unwrap();
        handle.sync().unwrap();
        assert!(!is_silent(&handle, &mut batch), "refused");
        for &key in &all[2..] {
            verdicts.push(key, Verdict::Accept).unwrap();
        }
        handle.send(&mut verdicts).unwrap();
        for number in 1..3 {
            assert_eq!(other.recv().as_deref(), Some(&[number][..]));
        }
        assert!(other.is_silent(), "no run has found the first");
        handle.verdict(all[1], Verdict::Accept).unwrap();
        assert_eq!(other.recv().as_deref(), Some(&[0][..]), "it still waits");
    });
}

#[test]
fn try_run_once_returns_0_only_when_nothing_is_left() {
    isolated(|| {
        const REFUSED: usize = 2 * RecvBatch::DEFAULT_SLOTS;
        let lab = Lab::new();
        let mut handle = Handle::open().unwrap();
        let _queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, |data| {
                data.set_verdict(Verdict::Accept, None);
            })
            .unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"gone");
        let gone = next_packet(&handle, &mut batch).key();
        link::down("lo").unwrap();
        link::up("lo").unwrap();
        for is_stashed in [true, false] {
            for _ in 0..REFUSED {
                handle.verdict(gone, Verdict::Accept).unwrap();
            }
            if is_stashed {
                handle.sync().unwrap();
            }
            lab.send(b"behind them");
            assert_eq!(handle.try_run_once(&mut batch).unwrap(), 1);
            assert_eq!(handle.try_run_once(&mut batch).unwrap(), 0);
            assert_eq!(lab.recv().as_deref(), Some(&b"behind them"[..]));
        }
    });
}

/// A verdict that no system call takes must not be in the way of the others
#[test]
fn a_verdict_longer_than_the_send_buffer_is_given_up_and_the_others_sent() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::builder().recv_buffer(1 << 20).open().unwrap(); // for s390x
        let _queue = handle.bind_queue(QUEUE).unwrap();
        set_send_buffer(&handle, 4096).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
        lab.send_numbered(0..200);
        let all = keys(&handle, &mut batch, 200);
        let long = vec![0x45; 60_000];
        for (i, &key) in all.iter().enumerate() {
            match i {
                1 => verdicts.push(key, Verdict::Accept.with_payload(&long)),
                // Different each time, so that they are too many messages for one call
                _ => verdicts.push(key, Verdict::Accept.with_mark(u32::try_from(i).unwrap())),
            }
            .unwrap();
        }
        match handle.send(&mut verdicts).unwrap_err() {
            Error::Io { op, source, .. } => {
                assert_eq!(op, Operation::Verdict(all[1]));
                assert_eq!(source.raw_os_error(), Some(libc::EMSGSIZE));
            }
            other => panic!("{other:?}"),
        }
        assert!(verdicts.is_empty());
        for i in (0..200_u32).filter(|&i| i != 1) {
            assert_eq!(lab.recv().as_deref(), Some(&i.to_be_bytes()[..]));
        }
        handle.verdict(all[1], Verdict::Accept).unwrap();
        assert_eq!(
            lab.recv().as_deref(),
            Some(&1_u32.to_be_bytes()[..]),
            "it waited"
        );
    });
}

#[test]
fn the_callback_of_a_queue_that_has_ended_is_dropped_by_the_next_turn() {
    isolated(|| {
        let mut handle = Handle::open().unwrap();
        let (send, hung_up) = mpsc::channel::<()>();
        let queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, move |_| send.send(()).unwrap())
            .unwrap();
        queue.destroy().unwrap();
        handle.try_run_once(&mut RecvBatch::default()).unwrap();
        assert_eq!(hung_up.try_recv(), Err(mpsc::TryRecvError::Disconnected));
    });
}
