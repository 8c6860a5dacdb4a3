//! The beginning and end of queues, sockets and descriptors, and keys from before

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nfqnl::proto::ConfigRequest;
use nfqnl::{
    ConfigFlags, Error, ErrorKind, Event, Handle, Operation, PacketKey, Queue, QueueConfig,
    RecvBatch, Socket, Verdict,
};
use nfqnl_testkit::netns::{idle, isolated};
use nfqnl_testkit::{link, process};

use crate::lab::{
    Lab, QUEUE, WHOLE_PACKETS, configure_past_the_library, is_free, is_silent, next_event,
    next_keys, next_packet, number, refusal, take_all, udp_payload,
};

/// Fails unless the verdict was not sent because its queue has been unbound
#[track_caller]
fn expect_unbound(result: nfqnl::Result<()>, key: PacketKey) {
    match result {
        Err(Error::Unbound { op, .. }) => assert_eq!(op, Operation::Verdict(key)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_key_of_an_earlier_binding_is_refused() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let mut batch = RecvBatch::default();
        let queue = socket.bind(QUEUE).unwrap();
        lab.send(b"before");
        let old = next_packet(&socket, &mut batch).key();
        queue.destroy().unwrap();
        expect_unbound(socket.set_verdict(old, Verdict::Accept), old);

        let _queue = socket.bind(QUEUE).unwrap();
        lab.send(b"after");
        let new = next_packet(&socket, &mut batch).key();
        assert_eq!((old.id(), new.id()), (1, 1), "the ids start again");
        assert_ne!(old, new);
        expect_unbound(socket.set_verdict(old, Verdict::Drop), old);
        socket.set_verdict(new, Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"after"[..]));
        assert!(lab.v4.is_silent(), "the first was dropped with its queue");
    });
}

#[test]
fn a_key_of_another_socket_is_refused() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        lab.send(b"held");
        let key = next_packet(&socket, &mut RecvBatch::default()).key();
        let other = Socket::open().unwrap();
        let _other = other.bind(QUEUE + 1).unwrap();
        let error = other.set_verdict(key, Verdict::Drop).unwrap_err();
        let op = Operation::Verdict(key);
        assert!(
            matches!(error, Error::WrongSocket { op: of, .. } if of == op),
            "{error}"
        );
        socket.set_verdict(key, Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"held"[..]));
    });
}

/// Returns the next packet of this binding, and the number of older packets before it
///
/// A packet received before the end of its queue may still be an event. Its key belongs to the
/// old binding, and its verdict is late.
#[track_caller]
fn next_of_binding(
    socket: &Socket,
    batch: &mut RecvBatch,
    queue: &Queue,
) -> (PacketKey, Vec<u8>, u64) {
    let mut old = 0;
    loop {
        let packet = next_packet(socket, batch);
        let key = packet.key();
        if key == queue.key(key.id()) {
            return (key, udp_payload(&packet).to_vec(), old);
        }
        expect_unbound(socket.set_verdict(key, Verdict::Accept), key);
        old += 1;
    }
}

/// Packets of the earlier binding are still in the socket
#[test]
fn old_packets_do_not_come_out_of_a_new_binding() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let mut batch = RecvBatch::default();
        for waits in [false, true] {
            let before = socket.stats().after_unbind;
            let queue = socket.bind(QUEUE).unwrap();
            lab.send_numbered(0..5);
            if waits {
                queue.destroy().unwrap();
            } else {
                drop(queue);
            }
            let queue = socket.bind(QUEUE).unwrap();
            lab.send(b"new");
            let (key, payload, old) = next_of_binding(&socket, &mut batch, &queue);
            assert_eq!((key.id(), payload.as_slice()), (1, &b"new"[..]));
            socket.set_verdict(key, Verdict::Accept).unwrap();
            assert_eq!(lab.recv().as_deref(), Some(&b"new"[..]));
            assert!(is_silent(&socket, &mut batch));
            queue.destroy().unwrap();
            assert_eq!(socket.stats().after_unbind - before + old, 5);
        }
        assert!(lab.v4.is_silent());
        assert_eq!(socket.stats().missing_packets, 0);
    });
}

#[test]
fn waiting_packets_are_dropped_with_their_queue() {
    isolated(|| {
        let lab = Lab::new();
        for end in ["destroy", "drop queue", "close", "drop socket"] {
            let socket = Socket::open().unwrap();
            let queue = socket.bind(QUEUE).unwrap();
            assert!(!is_free(QUEUE));
            lab.send(b"dropped");
            match end {
                "destroy" => queue.destroy().unwrap(),
                "drop queue" => drop(queue),
                "close" => {
                    socket.close().unwrap();
                    let error = queue.set_maxlen(5).unwrap_err();
                    let op = Operation::SetMaxlen(QUEUE);
                    assert!(
                        matches!(error, Error::Unbound { op: of, .. } if of == op),
                        "{error}"
                    );
                    queue.destroy().unwrap();
                }
                _ => {
                    drop(socket);
                    drop(queue);
                }
            }
            assert!(is_free(QUEUE), "after {end}");
            assert!(lab.v4.is_silent(), "after {end}");
        }
    });
}

#[test]
fn queues_of_a_dropped_socket_end_despite_a_copy() {
    isolated(|| {
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let copy = socket.as_fd().try_clone_to_owned().unwrap();
        drop(socket);
        assert!(is_free(QUEUE));
        drop(queue);
        drop(copy);
    });
}

/// `open_fd` is for sockets without queues
#[test]
fn packets_of_a_queue_bound_before_are_not_events() {
    isolated(|| {
        let socket = Socket::open().unwrap();
        configure_past_the_library(&socket, &ConfigRequest::bind(QUEUE, WHOLE_PACKETS));
        let copy = socket.as_fd().try_clone_to_owned().unwrap();
        drop(socket);
        assert!(!is_free(QUEUE), "the copy is open");
        let lab = Lab::new();
        lab.send(b"before");
        let socket = Socket::builder().open_fd(copy).unwrap();
        lab.send(b"after");
        assert!(is_silent(&socket, &mut RecvBatch::default()));
        assert_eq!(socket.stats().after_unbind, 2);
        let refused = refusal(socket.bind(QUEUE));
        assert_eq!(refused.kind(), ErrorKind::AlreadyBound);
        let unknown = ConfigFlags::from_bits_retain(1 << 30);
        let config = QueueConfig::new().enable(unknown);
        let refused = refusal(socket.bind_with(QUEUE, &config));
        assert_eq!(refused.kind(), ErrorKind::UnsupportedFlags(unknown));
        assert!(!is_free(QUEUE), "a refused bind ends nothing");
        drop(socket);
        assert!(is_free(QUEUE));
    });
}

#[test]
fn an_inherited_descriptor_keeps_the_queue() {
    isolated(|| {
        let socket = Socket::open().unwrap();
        configure_past_the_library(&socket, &ConfigRequest::bind(QUEUE, WHOLE_PACKETS));
        let mut without = idle(Stdio::null()).unwrap();
        let copy = socket.as_fd().try_clone_to_owned().unwrap();
        let mut with = idle(copy).unwrap();
        drop(socket);
        assert!(!is_free(QUEUE), "the child has the socket");
        with.kill().unwrap();
        with.wait().unwrap();
        assert!(is_free(QUEUE), "the other child does not have it");
        assert_eq!(without.try_wait().unwrap(), None, "it still runs");
        without.kill().unwrap();
        without.wait().unwrap();
    });
}

#[test]
fn a_packet_is_gone_when_its_device_goes_down() {
    isolated(|| {
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        for lab in [Lab::new, Lab::at_input] {
            let lab = lab();
            lab.send(b"gone");
            let key = next_packet(&socket, &mut batch).key();
            link::down("lo").unwrap();
            link::up("lo").unwrap();
            socket.set_verdict(key, Verdict::Accept).unwrap();
            match next_event(&socket, &mut batch) {
                Event::Refused(refusal) => {
                    assert_eq!(refusal.packet(), Some(key));
                    assert_eq!(refusal.kind(), ErrorKind::NoSuchPacket);
                }
                other => panic!("{other:?}"),
            }
            lab.send(b"after");
            assert_eq!(udp_payload(&next_packet(&socket, &mut batch)), b"after");
            lab.delete_rules();
        }
    });
}

/// One thread ends the queue while another answers its packets: each verdict reaches its packet or
/// comes too late
#[test]
fn verdicts_race_with_the_end_of_their_queue() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let mut batch = RecvBatch::default();
        for _ in 0..30 {
            let queue = socket.bind(QUEUE).unwrap();
            lab.send_numbered(0..20);
            let keys = [(); 20].map(|()| next_packet(&socket, &mut batch).key());
            thread::scope(|scope| {
                scope.spawn(|| {
                    for key in keys {
                        match socket.set_verdict(key, Verdict::Drop) {
                            Ok(()) => {}
                            late => expect_unbound(late, key),
                        }
                    }
                });
                queue.destroy().unwrap();
                let queue = socket.bind(QUEUE).unwrap();
                lab.send(b"must not be hit");
                queue
            })
            .destroy()
            .unwrap();
            socket.sync().unwrap();
            take_all(&socket, &mut batch, |event| match event {
                // The verdict was on its way at the end of the queue.
                Event::Refused(refusal) => assert_eq!(refusal.kind(), ErrorKind::NotBound),
                // The second binding has ended as well.
                Event::Packet(packet) => assert_eq!(udp_payload(&packet), b"must not be hit"),
                other => panic!("{other:?}"),
            });
        }
    });
}

/// The bindings of another thread must not disturb what keeps old packets out
#[test]
fn old_packets_stay_out_while_other_threads_bind() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let mut batch = RecvBatch::default();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    drop(socket.bind(QUEUE + 1).unwrap());
                }
            });
            for _ in 0..100 {
                let queue = socket.bind(QUEUE).unwrap();
                lab.send(b"old");
                drop(queue);
                let queue = socket.bind(QUEUE).unwrap();
                lab.send(b"new");
                let (_, seen, _) = next_of_binding(&socket, &mut batch, &queue);
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

/// The kernel may be sending a packet while its queue is unbound: it arrives later, perhaps after
/// the next bind
#[test]
fn packets_in_flight_stay_out_of_the_next_binding() {
    isolated(|| {
        let lab = Lab::new();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        // A send fails while the send buffer is full.
                        let _ = lab.v4.send(b"flood", lab.v4.address());
                    }
                });
            }
            let socket = Socket::builder().recv_buffer(8 << 20).open().unwrap();
            // The packets of two bindings fit the receive buffer of an ordinary user.
            let few = WHOLE_PACKETS.maxlen(200);
            let mut first = Vec::new();
            for round in 0..100 {
                let mut batch = RecvBatch::default(); // leftovers would be of the last binding
                let queue = socket.bind_with(QUEUE, &few).unwrap();
                first.push(next_of_binding(&socket, &mut batch, &queue).0.id());
                if round % 2 == 0 {
                    take_all(&socket, &mut batch, |event| drop(event));
                }
                queue.destroy().unwrap();
            }
            done.store(true, Ordering::Relaxed);
            assert_eq!(first, [1; 100]);
            assert_eq!(socket.stats().missing_packets, 0);
        });
    });
}

/// The number can be bound afterwards, whichever thread was first
#[test]
fn threads_race_to_bind_and_end_a_queue() {
    isolated(|| {
        const ROUNDS: u16 = 300;
        for round in 0..ROUNDS {
            // Binding a number again on the same socket takes longer.
            let socket = Socket::open().unwrap();
            let present = socket.bind(QUEUE).unwrap();
            let start = Barrier::new(3);
            thread::scope(|scope| {
                let (socket, start) = (&socket, &start);
                let bound = [(); 2].map(|()| {
                    scope.spawn(move || {
                        start.wait();
                        match socket.bind(QUEUE) {
                            Err(Error::Refused(refusal)) => {
                                assert_eq!(refusal.kind(), ErrorKind::AlreadyBound);
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
            let _again = socket.bind(QUEUE).expect("it is free");
        }
    });
}

#[test]
fn a_batch_with_events_of_another_socket_is_refused() {
    isolated(|| {
        const OTHER: u16 = QUEUE + 1;
        let lab = Lab::new();
        let there = lab.add_queue(OTHER);
        let [one, other] = [(); 2].map(|()| Socket::open().unwrap());
        let _one_queue = one.bind(QUEUE).unwrap();
        let other = Handle::new(other);
        let accept = |data: &mut nfqnl::QueueData<'_>| data.set_verdict(Verdict::Accept, None);
        let _other_queue = other
            .create_queue_with(OTHER, &WHOLE_PACKETS, accept)
            .unwrap();
        let mut batch = RecvBatch::default();
        lab.send_numbered(0..10);
        let mut taken = 0;
        while !batch.has_events() {
            let key = next_packet(&one, &mut batch).key();
            one.set_verdict(key, Verdict::Accept).unwrap();
            taken += 1;
        }
        let soon = Duration::from_millis(1);
        for result in [
            other.socket().try_recv(&mut batch).map(drop),
            other.socket().recv_timeout(&mut batch, soon).map(drop),
            other.socket().recv(&mut batch).map(drop),
            other.try_run_once(&mut batch).map(drop),
            other.run_timeout(&mut batch, soon).map(drop),
            other.run_once(&mut batch).map(drop),
        ] {
            let error = result.unwrap_err();
            assert!(matches!(error, Error::WrongSocket { .. }), "{error}");
        }
        for left in taken..10 {
            let packet = next_packet(&one, &mut batch);
            assert_eq!(number(&packet), left);
            one.set_verdict(packet.key(), Verdict::Accept).unwrap();
        }
        lab.expect_numbered(0..10);
        // An empty batch may go from one socket to another.
        there.send(b"other", there.address()).unwrap();
        while other.run_once(&mut batch).unwrap() == 0 {}
        assert_eq!(there.recv().as_deref(), Some(&b"other"[..]));
    });
}

/// Reads a word from the other process
fn word(stream: &mut UnixStream) -> [u8; 4] {
    let mut word = [0; 4];
    stream.read_exact(&mut word).unwrap();
    word
}

/// Receives and accepts packets, and fails unless they are delivered
#[track_caller]
fn expect_service(lab: &Lab, socket: &Socket) {
    let mut batch = RecvBatch::default();
    lab.send_numbered(0..3);
    for key in next_keys(socket, &mut batch, 3) {
        socket.set_verdict(key, Verdict::Accept).unwrap();
    }
    lab.expect_numbered(0..3);
}

/// Like a daemon: the program forks, and the parent returns and drops its values
#[test]
fn a_childs_queue_survives_the_drops_of_its_parent() {
    isolated(|| {
        let lab = Lab::new();
        for order in ["queue first", "socket first", "handle"] {
            let (mut here, mut there) = UnixStream::pair().unwrap();
            let socket = Socket::open().unwrap();
            let queue = socket.bind(QUEUE).unwrap();
            let child = process::fork(|| {
                assert_eq!(&word(&mut there), b"drop");
                expect_service(&lab, &socket);
                queue.set_maxlen(100).unwrap();
                expect_service(&lab, &socket);
                there.write_all(b"done").unwrap();
                assert_eq!(&word(&mut there), b"quit");
            });
            let child = child.unwrap();
            drop(there); // If the child dies, the reads below fail.
            match order {
                "queue first" => drop((queue, socket)),
                "socket first" => {
                    drop(socket);
                    drop(queue);
                }
                _ => {
                    drop(Handle::new(socket));
                    drop(queue);
                }
            }
            here.write_all(b"drop").unwrap();
            assert_eq!(&word(&mut here), b"done", "{order}");
            assert!(!is_free(QUEUE), "the child has the socket");
            here.write_all(b"quit").unwrap();
            assert!(child.wait().unwrap());
            assert!(is_free(QUEUE), "its last descriptor is closed");
        }
    });
}

#[test]
fn a_parents_queue_survives_the_drops_of_its_child() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let mut both = Some((queue, socket));
        for _ in 0..2 {
            let child = process::fork(|| drop(both.take()));
            assert!(child.unwrap().wait().unwrap());
            let (queue, socket) = both.as_ref().unwrap();
            expect_service(&lab, socket);
            queue.set_maxlen(100).unwrap();
        }
        drop(both);
        assert!(is_free(QUEUE), "its last descriptor is closed");
    });
}

/// In parent and child alike, and nothing else ends in the other process
#[test]
fn destroy_unbinds_after_a_fork_too() {
    isolated(|| {
        const OTHER: u16 = QUEUE + 1;
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _stays = socket.bind(QUEUE).unwrap();
        let bind = || Some(socket.bind(OTHER).unwrap());
        let destroy = |queue: &mut Option<Queue>| queue.take().unwrap().destroy().unwrap();

        let mut queue = bind();
        let child = process::fork(|| destroy(&mut queue));
        assert!(child.unwrap().wait().unwrap());
        assert!(is_free(OTHER), "the child has unbound it");
        drop(queue);

        let mut queue = bind();
        let child = process::fork(|| {
            loop {
                thread::park();
            }
        });
        destroy(&mut queue);
        assert!(is_free(OTHER), "the parent has unbound it");
        child.unwrap().kill();

        // The child's own queue ends with the drop in the child.
        let child = process::fork(|| drop(bind()));
        assert!(child.unwrap().wait().unwrap());
        assert!(is_free(OTHER), "the child has dropped it");
        expect_service(&lab, &socket);
    });
}
