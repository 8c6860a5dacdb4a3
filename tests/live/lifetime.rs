//! Beginnings and ends: of queues, handles, descriptors, and the keys from before

use std::os::fd::AsFd;
use std::process::Stdio;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nfqnl::proto::ConfigRequest;
use nfqnl::{CopyMode, Error, Handle, Operation, QueueConfig, RecvBatch, Situation, Verdict};
use nfqnl_testkit::link;
use nfqnl_testkit::netns::{idle, isolated};

use crate::lab::{
    Lab, QUEUE, configure_past_the_library, is_free, is_silent, next_event, next_packet,
    udp_payload,
};

const WHOLE_PACKETS: QueueConfig = QueueConfig::new().copy_mode(CopyMode::PACKET, 0);

#[test]
fn a_key_from_before_the_queue_was_bound_again_is_refused() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let mut batch = RecvBatch::default();
        let queue = handle.bind_queue(QUEUE).unwrap();
        lab.send(b"before");
        let old = next_packet(&handle, &mut batch).key();
        queue.destroy().unwrap();
        let error = handle.verdict(old, Verdict::Accept).unwrap_err();
        assert!(
            matches!(error, Error::Stale { key, .. } if key == old),
            "{error}"
        );

        let _queue = handle.bind_queue(QUEUE).unwrap();
        lab.send(b"after");
        let new = next_packet(&handle, &mut batch).key();
        assert_eq!((old.id, new.id), (1, 1), "the kernel begins anew");
        assert_ne!(old, new);
        let error = handle.verdict(old, Verdict::Drop).unwrap_err();
        assert!(matches!(error, Error::Stale { .. }), "{error}");
        handle.verdict(new, Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"after"[..]));
        assert!(lab.v4.is_silent(), "the first was dropped with its queue");
    });
}

#[test]
fn a_key_of_another_handle_is_refused() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        lab.send(b"held");
        let key = next_packet(&handle, &mut RecvBatch::default()).key();
        let other = Handle::open().unwrap();
        let _other = other.bind_queue(QUEUE + 1).unwrap();
        let error = other.verdict(key, Verdict::Drop).unwrap_err();
        assert!(matches!(error, Error::Stale { .. }), "{error}");
        handle.verdict(key, Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"held"[..]));
    });
}

/// Packets of a queue that has ended are in the socket still, and must not look like the next binding's
#[test]
fn packets_from_before_do_not_come_out_of_a_new_binding() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let mut batch = RecvBatch::default();
        for waiting in [false, true] {
            let queue = handle.bind_queue(QUEUE).unwrap();
            lab.send_numbered(0..5);
            if waiting {
                queue.destroy().unwrap();
            } else {
                drop(queue);
            }
            let queue = handle.bind_queue(QUEUE).unwrap();
            lab.send(b"new");
            let packet = next_packet(&handle, &mut batch);
            assert_eq!((packet.id(), udp_payload(&packet)), (1, &b"new"[..]));
            handle.verdict(packet.key(), Verdict::Accept).unwrap();
            assert_eq!(lab.recv().as_deref(), Some(&b"new"[..]));
            assert!(is_silent(&handle, &mut batch));
            queue.destroy().unwrap();
        }
        assert_eq!(handle.stats().discarded, 10);
        assert_eq!(
            (handle.stats().packets, handle.stats().lost_packets),
            (10 + 2, 0)
        );
    });
}

#[test]
fn what_waits_is_dropped_when_its_queue_or_handle_ends() {
    isolated(|| {
        let lab = Lab::new();
        for end in ["destroy", "drop queue", "close", "drop handle"] {
            let handle = Handle::open().unwrap();
            let queue = handle.bind_queue(QUEUE).unwrap();
            assert!(!is_free(QUEUE));
            lab.send(b"dropped");
            match end {
                "destroy" => queue.destroy().unwrap(),
                "drop queue" => drop(queue),
                "close" => {
                    handle.close().unwrap();
                    let error = queue.set_maxlen(5).unwrap_err();
                    let op = Operation::SetMaxlen(QUEUE);
                    assert!(
                        matches!(error, Error::Ended { op: of, .. } if of == op),
                        "{error}"
                    );
                    queue.destroy().unwrap();
                }
                _ => {
                    drop(handle);
                    drop(queue);
                }
            }
            assert!(is_free(QUEUE), "after {end}");
            assert!(lab.v4.is_silent(), "after {end}");
        }
    });
}

#[test]
fn the_queues_of_a_dropped_handle_end_though_its_socket_lives_on() {
    isolated(|| {
        let handle = Handle::open().unwrap();
        let queue = handle.bind_queue(QUEUE).unwrap();
        let copy = handle.as_fd().try_clone_to_owned().unwrap();
        drop(handle);
        assert!(is_free(QUEUE));
        drop(queue);
        drop(copy);
    });
}

#[test]
fn a_socket_that_has_a_queue_already_can_be_taken_over_but_its_packets_are_nobodys() {
    isolated(|| {
        let handle = Handle::open().unwrap();
        configure_past_the_library(&handle, &ConfigRequest::bind(QUEUE, WHOLE_PACKETS));
        let copy = handle.as_fd().try_clone_to_owned().unwrap();
        drop(handle);
        assert!(!is_free(QUEUE), "the socket is open");
        let lab = Lab::new();
        lab.send(b"held meanwhile");
        let handle = Handle::builder().open_fd(copy).unwrap();
        assert!(is_silent(&handle, &mut RecvBatch::default()));
        assert_eq!(
            handle.stats().discarded,
            1,
            "it is of no queue of this handle"
        );
        drop(handle);
        assert!(is_free(QUEUE));
    });
}

#[test]
fn a_child_process_that_inherits_the_descriptor_keeps_the_queue_and_only_then() {
    isolated(|| {
        let handle = Handle::open().unwrap();
        configure_past_the_library(&handle, &ConfigRequest::bind(QUEUE, WHOLE_PACKETS));
        let mut without = idle(Stdio::null()).unwrap();
        let copy = handle.as_fd().try_clone_to_owned().unwrap();
        let mut with = idle(copy).unwrap();
        drop(handle);
        assert!(!is_free(QUEUE), "the child has the socket");
        with.kill().unwrap();
        with.wait().unwrap();
        assert!(is_free(QUEUE), "the other child has not");
        assert_eq!(without.try_wait().unwrap(), None, "and it lives");
        without.kill().unwrap();
        without.wait().unwrap();
    });
}

#[test]
fn a_packet_whose_device_goes_down_is_gone_and_its_verdict_refused() {
    isolated(|| {
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        for lab in [Lab::new, Lab::at_input] {
            let lab = lab();
            lab.send(b"gone");
            let key = next_packet(&handle, &mut batch).key();
            link::down("lo").unwrap();
            link::up("lo").unwrap();
            handle.verdict(key, Verdict::Accept).unwrap();
            match next_event(&handle, &mut batch) {
                nfqnl::Event::Refused(refusal) => {
                    assert_eq!(refusal.packet(), Some(key));
                    assert_eq!(refusal.situation(), Situation::NoSuchPacket);
                    assert!(
                        refusal.to_string().contains("device went down"),
                        "{refusal}"
                    );
                }
                other => panic!("{other:?}"),
            }
            lab.send(b"after");
            assert_eq!(udp_payload(&next_packet(&handle, &mut batch)), b"after");
            lab.delete_rules();
        }
    });
}

/// The queue ends in one thread while another answers its packets: every verdict hits its packet, or is stale
#[test]
fn verdicts_race_with_the_end_of_their_queue() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let mut batch = RecvBatch::default();
        for _ in 0..30 {
            let queue = handle.bind_queue(QUEUE).unwrap();
            lab.send_numbered(0..20);
            let keys = [(); 20].map(|()| next_packet(&handle, &mut batch).key());
            thread::scope(|scope| {
                scope.spawn(|| {
                    for key in keys {
                        match handle.verdict(key, Verdict::Drop) {
                            Ok(()) => {}
                            Err(Error::Stale { key: stale, .. }) => assert_eq!(stale, key),
                            Err(other) => panic!("{other:?}"),
                        }
                    }
                });
                queue.destroy().unwrap();
                let queue = handle.bind_queue(QUEUE).unwrap();
                lab.send(b"must not be hit");
                queue
            })
            .destroy()
            .unwrap();
            handle.sync().unwrap();
            for event in handle.try_recv(&mut batch).unwrap() {
                // The verdicts on the way when the queue ended: too late, and harmless.
                let nfqnl::Event::Refused(refusal) = event else {
                    panic!("{event:?}");
                };
                assert_eq!(refusal.situation(), Situation::NotBound);
            }
        }
    });
}

/// Another thread's bindings come and go meanwhile, each of which must leave this one's fence alone
#[test]
fn packets_from_before_stay_out_whatever_other_threads_bind() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let mut batch = RecvBatch::default();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    drop(handle.bind_queue(QUEUE + 1).unwrap());
                }
            });
            for _ in 0..100 {
                let queue = handle.bind_queue(QUEUE).unwrap();
                lab.send(b"old");
                drop(queue);
                let queue = handle.bind_queue(QUEUE).unwrap();
                lab.send(b"new");
                let packet = next_packet(&handle, &mut batch);
                let seen = udp_payload(&packet).to_vec();
                if seen != b"new" {
                    done.store(true, Ordering::Relaxed);
                    panic!("{} came out of a new binding", seen.escape_ascii());
                }
                queue.destroy().unwrap();
            }
            done.store(true, Ordering::Relaxed);
        });
    });
}

/// The kernel may be about to send packets of a queue when that is unbound: they come later, even after the next binding
#[test]
fn packets_that_were_on_their_way_stay_out_of_the_next_binding() {
    isolated(|| {
        let lab = Lab::new();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        let _ = lab.v4.send(b"flood", lab.v4.address()); // fails when its buffer is full of packets
                    }
                });
            }
            let handle = Handle::builder().recv_buffer(8 << 20).open().unwrap();
            // What fits an ordinary user's buffer, from two bindings
            let few = WHOLE_PACKETS.maxlen(200);
            let mut first = Vec::new();
            for round in 0..100 {
                let mut batch = RecvBatch::default(); // the last one's rest is of the last binding
                let queue = handle.bind_queue_with(QUEUE, &few).unwrap();
                first.push(next_packet(&handle, &mut batch).id());
                while !is_silent(&handle, &mut batch) && round % 2 == 0 {}
                queue.destroy().unwrap();
            }
            done.store(true, Ordering::Relaxed);
            assert_eq!(first, [1; 100]);
            assert_eq!(handle.stats().lost_packets, 0);
        });
    });
}

/// Whoever wins, the number can be bound afterwards
#[test]
fn threads_race_to_bind_and_end_a_queue() {
    isolated(|| {
        const ROUNDS: u16 = 300;
        for round in 0..ROUNDS {
            // Numbers that this handle has had before take long to bind.
            let handle = Handle::open().unwrap();
            let present = handle.bind_queue(QUEUE).unwrap();
            let start = Barrier::new(3);
            thread::scope(|scope| {
                let (handle, start) = (&handle, &start);
                let bound = [(); 2].map(|()| {
                    scope.spawn(move || {
                        start.wait();
                        match handle.bind_queue(QUEUE) {
                            Err(Error::Refused(refusal)) => {
                                assert_eq!(refusal.situation(), Situation::AlreadyBound);
                                None
                            }
                            bound => Some(bound.unwrap()),
                        }
                    })
                });
                start.wait();
                match round % 2 {
                    0 => drop(present),
                    _ => present.destroy().unwrap(),
                }
                let bound = bound.map(|bound| bound.join().unwrap());
                assert!(bound.iter().flatten().count() < 2, "both have it");
            });
            let _again = handle.bind_queue(QUEUE).expect("nobody has it");
        }
    });
}
