//! A socket with its queues goes to another process, and no packet is lost

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use nfqnl::proto::{ConfigRequest, RequestHeader};
use nfqnl::{
    ConfigFlags, Error, ErrorKind, Event, Handle, Handover, Orphans, Queue, QueueConfig, RecvBatch,
    SendBatch, Socket, Verdict,
};
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::process::fork;
use nfqnl_testkit::traffic::TIMEOUT;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::lab::{
    Lab, QUEUE, WHOLE_PACKETS, is_free, is_silent, next_events, next_keys, next_packet, number,
    refusal, send_past_the_library,
};

/// The same socket in another process
fn adopted(fd: OwnedFd, handover: Option<&Handover>, orphans: Orphans) -> (Socket, Queue) {
    let (socket, mut queues) = Socket::adopt(fd, handover, &[(QUEUE, orphans)]).unwrap();
    (socket, queues.pop().unwrap())
}

/// Accepts this number of packets, and returns their numbers
fn accept(socket: &Socket, n: usize) -> Vec<u32> {
    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
    let mut seen = Vec::new();
    while seen.len() < n {
        for event in next_events(socket, &mut batch) {
            let packet = event.packet().expect("only packets");
            seen.push(number(&packet));
            verdicts.push(packet.key(), Verdict::Accept).unwrap();
        }
        socket.send(&mut verdicts).unwrap();
    }
    seen
}

#[test]
fn packets_in_hand_and_in_the_socket_go_over() {
    isolated(|| {
        for orphans in [Orphans::Again, Orphans::Accept] {
            let lab = Lab::new();
            let socket = Socket::open().unwrap();
            let config = QueueConfig::new().enable(ConfigFlags::FAIL_OPEN);
            let queue = socket.bind_with(QUEUE, &config).unwrap();
            let sender = socket.verdict_sender();
            let waker = socket.waker();
            lab.send_numbered(0..10);
            let mut batch = RecvBatch::new(5, 4096);
            let keys = next_keys(&socket, &mut batch, 5);
            socket.set_verdict(keys[0], Verdict::Accept).unwrap();
            let (fd, handover) = socket.into_fd().unwrap();
            // Nothing of the old process does anything any more.
            let late = sender.set_verdict(keys[1], Verdict::Drop);
            assert!(matches!(late, Err(Error::Unbound { .. })), "{late:?}");
            waker.wake_all();
            drop(queue);
            let text = handover.to_string();
            assert_eq!(text, format!("nfqnl1 {QUEUE}/5/1"));
            let handover: Handover = text.parse().unwrap();
            assert!(handover.queues().eq([QUEUE]));

            let (socket, queue) = adopted(fd, Some(&handover), orphans);
            assert_eq!(queue.flags(), ConfigFlags::FAIL_OPEN);
            lab.send_numbered(10..12);
            let expected: Vec<u32> = match orphans {
                Orphans::Again => (5..10).chain(1..5).chain(10..12).collect(),
                _ => (5..12).collect(),
            };
            assert_eq!(accept(&socket, expected.len()), expected);
            assert_eq!(socket.stats().missing_packets, 0);
            assert_eq!(socket.stats().merging_ended, 0);
            let mut received: Vec<u32> = (0..12)
                .map(|_| u32::from_be_bytes(lab.recv().unwrap().try_into().unwrap()))
                .collect();
            received.sort_unstable();
            assert!(received.into_iter().eq(0..12));
            assert!(lab.v4.is_silent());
            queue.destroy().unwrap();
            lab.delete_rules();
        }
    });
}

#[test]
fn without_waiting_packets_nothing_is_refused() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        lab.send_numbered(0..3);
        accept(&socket, 3);
        let (fd, handover) = socket.into_fd().unwrap();
        let (socket, _queue) = adopted(fd, Some(&handover), Orphans::Again);
        let (fd, handover) = socket.into_fd().unwrap();
        let (socket, _queue) = adopted(fd, Some(&handover), Orphans::Again);
        let mut batch = RecvBatch::default();
        assert!(is_silent(&socket, &mut batch), "no event of the orphans");
        assert_eq!(socket.stats().refused_verdicts, 0);
        lab.send_numbered(3..4);
        accept(&socket, 1);
        lab.expect_numbered(0..4);
    });
}

/// The process before was killed in a drain
#[test]
fn packets_pass_by_until_the_settings_are_made() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        queue.pass_by().unwrap();
        let (fd, _) = socket.into_fd().unwrap();
        let (socket, queue) = adopted(fd, None, Orphans::Again);
        lab.send_numbered(0..1);
        lab.expect_numbered(0..1);
        queue.set_maxlen(1024).unwrap();
        queue
            .set_flags(ConfigFlags::FAIL_OPEN, ConfigFlags::empty())
            .unwrap();
        lab.send_numbered(1..3);
        assert_eq!(accept(&socket, 2), [1, 2]);
    });
}

/// Datagrams every millisecond, and ten upgrades
#[test]
fn ten_upgrades_deliver_every_datagram_once() {
    isolated(|| {
        const EACH: u32 = 60;
        let lab = Lab::new();
        let mut socket = Socket::open().unwrap();
        let mut queue = socket.bind(QUEUE).unwrap();
        let mut received: Vec<u32> = thread::scope(|scope| {
            let receiver = scope.spawn(|| {
                let numbers = (0..10 * EACH).map(|_| lab.recv().unwrap());
                let numbers =
                    numbers.map(|payload| u32::from_be_bytes(payload.try_into().unwrap()));
                numbers.collect()
            });
            scope.spawn(|| {
                for number in 0..10 * EACH {
                    lab.send(&number.to_be_bytes());
                    thread::sleep(Duration::from_millis(1));
                }
            });
            let (mut batch, mut verdicts) = (RecvBatch::new(8, 4096), SendBatch::new());
            let mut accepted = 0;
            for upgrade in 1..=10 {
                let mut held = Vec::new();
                while accepted < upgrade * EACH - 20 {
                    for event in next_events(&socket, &mut batch) {
                        let packet = event.packet().expect("only packets");
                        // Each seventh waits until the upgrade.
                        if number(&packet) % 7 == upgrade % 7 && held.len() < 8 {
                            held.push(packet.key());
                            continue;
                        }
                        accepted += 1;
                        verdicts.push(packet.key(), Verdict::Accept).unwrap();
                    }
                    socket.send(&mut verdicts).unwrap();
                }
                let (fd, handover) = socket.into_fd().unwrap();
                drop(queue);
                batch = RecvBatch::new(8, 4096);
                thread::sleep(Duration::from_millis(5));
                (socket, queue) = adopted(fd, Some(&handover), Orphans::Again);
            }
            accept(&socket, usize::try_from(10 * EACH - accepted).unwrap());
            receiver.join().unwrap()
        });
        received.sort_unstable();
        assert!(received.into_iter().eq(0..10 * EACH));
        assert!(lab.v4.is_silent());
    });
}

/// A supervisor keeps the descriptor of a process that is killed
#[test]
fn after_a_crash_the_first_packet_shows_the_orphans() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let fd = socket.as_fd().try_clone_to_owned().unwrap();
        lab.send_numbered(0..10);
        let child = fork(|| {
            let mut batch = RecvBatch::new(4, 4096);
            let _received = next_keys(&socket, &mut batch, 4);
            std::process::abort();
        })
        .unwrap();
        let _ = child.wait();
        // This process has received nothing; its own drop leaves the queue alone after the fork.
        drop(queue);
        drop(socket);
        let (socket, _queue) = adopted(fd, None, Orphans::Again);
        assert_eq!(accept(&socket, 10), [4, 5, 6, 7, 8, 9, 0, 1, 2, 3]);
        assert_eq!(socket.stats().missing_packets, 0);
        lab.expect_numbered([4, 5, 6, 7, 8, 9, 0, 1, 2, 3]);
        // Verdicts are merged again.
        lab.send_numbered(10..13);
        accept(&socket, 3);
        assert_eq!(socket.stats().merging_ended, 0);
        lab.expect_numbered(10..13);
    });
}

#[test]
fn a_handle_takes_over_and_gives_away() {
    isolated(|| {
        let lab = Lab::new();
        let handle = nfqnl::open().unwrap();
        let queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, |_| {})
            .unwrap();
        lab.send_numbered(0..2);
        let mut batch = RecvBatch::default();
        assert_eq!(handle.run_once(&mut batch).unwrap(), 2);
        let (fd, handover) = handle.into_socket().into_fd().unwrap();
        drop(queue);
        let (socket, queue) = adopted(fd, Some(&handover), Orphans::Again);
        let handle = Handle::new(socket);
        handle.set_callback(&queue, |data| data.set_verdict(Verdict::Accept, None));
        assert_eq!(handle.drain(queue, &mut batch, TIMEOUT).unwrap(), 0);
        lab.expect_numbered(0..2);
    });
}

/// A crash, and an upgrade before the next packet comes
#[test]
fn orphans_of_a_crash_go_over_with_a_handover() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let fd = socket.as_fd().try_clone_to_owned().unwrap();
        lab.send_numbered(0..3);
        let child = fork(|| {
            let _received = next_keys(&socket, &mut RecvBatch::default(), 3);
            std::process::abort();
        })
        .unwrap();
        let _ = child.wait();
        drop(queue);
        drop(socket);
        let (socket, queue) = adopted(fd, None, Orphans::Again);
        let (fd, handover) = socket.into_fd().unwrap();
        drop(queue);
        assert_eq!(handover.to_string(), format!("nfqnl1 {QUEUE}/-/0"));
        let (socket, _queue) = adopted(fd, Some(&handover), Orphans::Again);
        lab.send_numbered(3..4);
        assert_eq!(accept(&socket, 4), [3, 0, 1, 2]);
    });
}

#[test]
fn queues_not_adopted_are_unbound() {
    isolated(|| {
        let socket = Socket::open().unwrap();
        let _queues = [7, 8].map(|num| socket.bind(num).unwrap());
        let (fd, handover) = socket.into_fd().unwrap();
        let (socket, queues) = Socket::adopt(fd, Some(&handover), &[(8, Orphans::Again)]).unwrap();
        assert!(is_free(7) && !is_free(8));
        drop(queues);
        drop(socket);
        assert!(is_free(8));

        // A full receive buffer loses the acknowledgement.
        let lab = Lab::new();
        let socket = Socket::builder().recv_buffer(1 << 14).open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        lab.send_numbered(0..200);
        let (fd, handover) = socket.into_fd().unwrap();
        let _adopted = Socket::adopt(fd, Some(&handover), &[]).unwrap();
        assert!(is_free(QUEUE));
    });
}

/// After exec, and in a container after a restart, the new process has the id of the old one
#[test]
fn answers_to_the_process_before_do_not_count() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        for seq in 0..20 {
            let header = RequestHeader {
                ack: true,
                seq,
                pid: std::process::id(),
            };
            let mut buf = [0; ConfigRequest::MAX_LEN];
            let request = ConfigRequest::update(QUEUE, QueueConfig::new().maxlen(1000));
            let len = request.encode(&mut buf, header).unwrap();
            send_past_the_library(&socket, &buf[..len]);
        }
        let (fd, handover) = socket.into_fd().unwrap();
        lab.send_numbered(0..10);
        let (socket, queue) = adopted(fd, Some(&handover), Orphans::Again);
        queue.pass_by().unwrap(); // receives all packets
        assert_eq!(queue.waiting(), 10);
        assert_eq!(accept(&socket, 10), Vec::from_iter(0..10));
    });
}

#[test]
fn a_queue_that_is_not_the_sockets_is_refused() {
    isolated(|| {
        let other = Socket::open().unwrap();
        let _in_use = other.bind(9).unwrap();
        for (num, kind) in [(3, ErrorKind::NotBound), (9, ErrorKind::NoCapability)] {
            let socket = Socket::open().unwrap();
            let (fd, _handover) = socket.into_fd().unwrap();
            let adopted = Socket::adopt(fd, None, &[(num, Orphans::Again)]);
            assert_eq!(refusal(adopted).kind(), kind);
        }
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let (fd, _handover) = socket.into_fd().unwrap();
        let twice = [(QUEUE, Orphans::Again); 2];
        let adopted = Socket::adopt(fd, None, &twice);
        assert_eq!(refusal(adopted).kind(), ErrorKind::AlreadyBound);
        let (here, _there) = std::os::unix::net::UnixStream::pair().unwrap();
        let adopted = Socket::adopt(here.into(), None, &[]);
        assert!(matches!(adopted, Err(Error::NotNetfilter { .. })));
    });
}

#[test]
fn a_broken_handover_is_refused() {
    for text in [
        "",
        "nfqnl2",
        "nfqnl1 1",
        "nfqnl1 1/2",
        "nfqnl1 1/2/3/4",
        "nfqnl1 70000/1/1",
        "nfqnl1 ",
    ] {
        assert!(text.parse::<Handover>().is_err(), "{text:?}");
    }
    let text = "nfqnl1 1/4294967295/31 65535/0/0 7/-/1";
    assert_eq!(text.parse::<Handover>().unwrap().to_string(), text);
    assert_eq!("nfqnl1".parse::<Handover>().unwrap().queues().count(), 0);
}

/// A packet received by the old process, and one that waits in the socket
#[test]
fn orphans_can_be_dropped() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        lab.send_numbered(0..1);
        let mut batch = RecvBatch::default();
        let _orphan = next_packet(&socket, &mut batch).key();
        lab.send_numbered(1..2);
        let (fd, handover) = socket.into_fd().unwrap();
        let (socket, queue) = adopted(fd, Some(&handover), Orphans::Drop);
        assert_eq!(accept(&socket, 1), [1]);
        lab.expect_numbered(1..2);
        assert!(lab.v4.is_silent());
        assert_eq!(
            socket
                .drain(queue, &mut RecvBatch::default(), TIMEOUT, |_, _| Ok(()))
                .unwrap(),
            0
        );
    });
}

/// Over a Unix socket, from a process that ends
#[test]
fn a_socket_goes_over_by_scm_rights() {
    isolated(|| {
        let lab = Lab::new();
        let (there, here) = UnixStream::pair().unwrap();
        let old = fork(|| {
            let socket = Socket::open().unwrap();
            let _queue = socket.bind(QUEUE).unwrap();
            lab.send_numbered(0..10);
            let _in_hand = next_keys(&socket, &mut RecvBatch::new(4, 4096), 4);
            let (fd, handover) = socket.into_fd().unwrap();
            let (text, fds) = (handover.to_string(), [fd.as_fd()]);
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
            let flags = SendFlags::empty();
            sendmsg(
                &there,
                &[IoSlice::new(text.as_bytes())],
                &mut control,
                flags,
            )
            .unwrap();
        })
        .unwrap();
        let mut text = [0; 100];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let buffers = &mut [IoSliceMut::new(&mut text)];
        let received = recvmsg(&here, buffers, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
        let mut fds = control.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds,
            _ => panic!("only descriptors"),
        });
        let text = std::str::from_utf8(&text[..received.bytes]).unwrap();
        let handover = text.parse().unwrap();
        assert!(old.wait().unwrap());

        let (socket, _queue) = adopted(fds.next().unwrap(), Some(&handover), Orphans::Again);
        assert_eq!(accept(&socket, 10), [4, 5, 6, 7, 8, 9, 0, 1, 2, 3]);
        lab.expect_numbered([4, 5, 6, 7, 8, 9, 0, 1, 2, 3]);
    });
}

/// The kernel drops the answer to a request too
#[test]
fn adoption_survives_a_full_receive_buffer() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::builder().recv_buffer(1 << 16).open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let (fd, handover) = socket.into_fd().unwrap();
        lab.send_numbered(0..400);
        let (socket, queue) = adopted(fd, Some(&handover), Orphans::Again);
        let waiting = usize::try_from(queue.waiting()).unwrap();
        assert!((1..400).contains(&waiting), "{waiting}");
        let mut overruns = 0;
        let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
        while queue.waiting() > 0 {
            for event in next_events(&socket, &mut batch) {
                match event {
                    Event::Packet(packet) => {
                        verdicts.push(packet.key(), Verdict::Accept).unwrap();
                    }
                    _ => overruns += 1,
                }
            }
            socket.send(&mut verdicts).unwrap();
        }
        assert_eq!((overruns, lab.v4.drain()), (1, waiting));
    });
}

#[test]
fn a_failed_adoption_keeps_the_queues() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let (fd, handover) = socket.into_fd().unwrap();
        lab.send_numbered(0..3);
        let both = [(QUEUE, Orphans::Again), (QUEUE + 1, Orphans::Again)];
        let failed = Socket::adopt(fd.try_clone().unwrap(), Some(&handover), &both);
        assert_eq!(refusal(failed).kind(), ErrorKind::NotBound);
        assert!(!is_free(QUEUE));
        let (socket, _queue) = adopted(fd, None, Orphans::Again);
        lab.send_numbered(3..4); // shows that the failed call has received the others
        assert_eq!(accept(&socket, 4), [3, 0, 1, 2]);
    });
}

/// A supervisor keeps the descriptor of a process that panics
#[test]
fn a_panic_leaves_the_queues_to_a_supervisor() {
    isolated(|| {
        for unbinds in [true, false] {
            let socket = Socket::builder().unbind_on_drop(unbinds).open().unwrap();
            let supervisor = socket.as_fd().try_clone_to_owned().unwrap();
            let queue = socket.bind(QUEUE).unwrap();
            let program = thread::spawn(move || {
                let (_socket, _queue) = (socket, queue);
                panic!("as intended");
            });
            assert!(program.join().is_err());
            assert_eq!(is_free(QUEUE), unbinds);
            if !unbinds {
                let (_socket, queue) = adopted(supervisor, None, Orphans::Again);
                queue.destroy().unwrap();
            }
        }
    });
}

/// The process after the handover is killed, and its successor gets the same handover
#[test]
fn a_handover_used_twice_loses_no_orphans() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let _in_hand = {
            lab.send_numbered(0..2);
            next_keys(&socket, &mut RecvBatch::default(), 2)
        };
        let (fd, handover) = socket.into_fd().unwrap();
        drop(queue);
        let copy = fd.try_clone().unwrap();
        let child = fork(|| {
            let (socket, _queue) = adopted(copy, Some(&handover), Orphans::Again);
            lab.send_numbered(2..4);
            let _in_hand = next_keys(&socket, &mut RecvBatch::default(), 4);
            std::process::abort();
        })
        .unwrap();
        let _ = child.wait();
        let (socket, _queue) = adopted(fd, Some(&handover), Orphans::Again);
        lab.send_numbered(4..5);
        let mut numbers = accept(&socket, 5);
        numbers.sort_unstable();
        assert_eq!(numbers, [0, 1, 2, 3, 4]);
    });
}

/// Their calls may read the socket
#[test]
fn other_threads_read_nothing_after_a_handover() {
    isolated(|| {
        let lab = Lab::new();
        let mut batch = RecvBatch::default();
        for round in 0..100 {
            let is_small = round % 2 == 0;
            // Few unread answers fit a small buffer, so the sends read the socket.
            let buffer = if is_small { 6000 } else { 1 << 20 };
            let socket = Socket::builder().recv_buffer(buffer).open().unwrap();
            let queue = socket.bind(QUEUE).unwrap();
            let mut keys = Vec::new();
            let base = 200 * round;
            for n in base..base + 60 {
                lab.send_numbered(n..n + 1);
                keys.extend(next_keys(&socket, &mut batch, 1));
            }
            let sender = socket.verdict_sender();
            let has_begun = AtomicBool::new(false);
            let (fd, handover) = thread::scope(|scope| {
                scope.spawn(|| {
                    has_begun.store(true, SeqCst);
                    let send = |key| sender.set_verdict(key, Verdict::Accept);
                    let _ = keys.iter().try_for_each(|key| send(*key));
                });
                scope.spawn(|| while !is_small && queue.set_maxlen(1024).is_ok() {});
                while !has_begun.load(SeqCst) {
                    std::hint::spin_loop()
                }
                lab.send_numbered(base + 100..base + 104);
                thread::sleep(Duration::from_micros((round % 60).into()));
                socket.into_fd().unwrap()
            });
            drop(queue);
            let (socket, queue) = adopted(fd, Some(&handover), Orphans::Again);
            queue.pass_by().unwrap(); // no packet comes any more
            let mut verdicts = SendBatch::new();
            while queue.waiting() > 0 {
                for event in next_events(&socket, &mut batch) {
                    // A small buffer may have been full.
                    if let Event::Packet(packet) = event {
                        verdicts.push(packet.key(), Verdict::Accept).unwrap();
                    }
                }
                socket.send(&mut verdicts).unwrap();
            }
            // Only root may read the counters.
            if let Ok(stats) = queue.stats() {
                assert_eq!(stats.unwrap().waiting, 0, "round {round}");
            }
            queue.destroy().unwrap();
            batch = RecvBatch::default();
            if is_small {
                lab.v4.drain_now().unwrap();
                continue;
            }
            // The kernel may deliver some after the verdicts' send, also those of the round before.
            let mut arrived: Vec<u32> = Vec::new();
            while arrived.len() < 64 {
                let payload = lab.recv().expect("all arrive").try_into().unwrap();
                arrived.extend(Some(u32::from_be_bytes(payload)).filter(|&n| n >= base));
            }
            arrived.sort_unstable();
            let expected = (base..base + 60).chain(base + 100..base + 104);
            assert!(arrived.into_iter().eq(expected), "round {round}");
        }
    });
}

/// No packet comes any more that would show which packets are older
#[test]
fn orphans_of_a_crash_pass_by_in_a_drain() {
    isolated(|| {
        for orphans in [Orphans::Again, Orphans::Accept] {
            let lab = Lab::new();
            let socket = Socket::open().unwrap();
            let _queue = socket.bind(QUEUE).unwrap();
            lab.send_numbered(0..10);
            let _in_hand = next_keys(&socket, &mut RecvBatch::new(4, 4096), 10);
            let (fd, _lost) = socket.into_fd().unwrap();
            let (socket, queue) = adopted(fd, None, orphans);
            let mut batch = RecvBatch::default();
            let decide = |event: Event<'_>, _: &mut SendBatch| panic!("{event}");
            let lost = socket.drain(queue, &mut batch, TIMEOUT, decide).unwrap();
            assert_eq!(lost, 0);
            lab.expect_numbered(0..10);
            lab.delete_rules();
        }
    });
}

/// The request for one queue reads packets of another
#[test]
fn orphans_of_two_queues_are_answered() {
    isolated(|| {
        let lab = Lab::new();
        let other = lab.add_queue(2);
        let socket = Socket::open().unwrap();
        let queues = [QUEUE, 2].map(|num| socket.bind(num).unwrap());
        let mut batch = RecvBatch::default();
        let send_both = |number: u32| {
            lab.send_numbered(number..number + 1);
            other.send(&number.to_be_bytes(), other.address()).unwrap();
        };
        send_both(0);
        let _in_hand = next_keys(&socket, &mut batch, 2);
        send_both(1);
        let (fd, handover) = socket.into_fd().unwrap();
        drop(queues);
        let both = [(QUEUE, Orphans::Again), (2, Orphans::Again)];
        let (socket, _queues) = Socket::adopt(fd, Some(&handover), &both).unwrap();
        let mut numbers = accept(&socket, 4);
        numbers.sort_unstable();
        assert_eq!(numbers, [0, 0, 1, 1]);
        assert_eq!((lab.v4.drain(), other.drain()), (2, 2));
    });
}
