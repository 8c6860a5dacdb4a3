//! One stream of packets, answers and errors: nothing in it is lost, and nothing waits unseen

use std::io::Read;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nfqnl::proto::{Message, Messages};
use nfqnl::{
    CopyMode, Error, Event, Handle, Operation, PacketKey, QueueConfig, RecvBatch, Situation,
    Verdict, VerdictBatch,
};
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::signal;
use nfqnl_testkit::traffic::TIMEOUT;

use crate::lab::{
    Dice, Lab, QUEUE, is_silent, next_event, next_packet, steal_past_the_library, udp_payload,
};

/// More than enough for any wait that is not meant to end
const LONG: Duration = Duration::from_secs(3600);

#[test]
fn settings_change_while_packets_wait_and_none_is_lost() {
    isolated(|| {
        const N: u32 = 50;
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        for round in 0..N {
            lab.send(&round.to_be_bytes());
            match round % 4 {
                0 => queue.set_maxlen(1000 + round).unwrap(),
                1 => queue.set_mode(CopyMode::PACKET, 0xffff).unwrap(),
                2 => handle.sync().unwrap(),
                _ => {
                    let other = handle.bind_queue(QUEUE + 1).unwrap();
                    other.destroy().unwrap();
                }
            }
        }
        for number in 0..N {
            let packet = next_packet(&handle, &mut batch);
            assert_eq!(udp_payload(&packet), number.to_be_bytes());
            handle.verdict(packet.key(), Verdict::Accept).unwrap();
            assert_eq!(lab.recv().as_deref(), Some(&number.to_be_bytes()[..]));
        }
        assert!(is_silent(&handle, &mut batch));
        assert_eq!(handle.stats().packets, N.into());
        assert_eq!(handle.stats().lost_packets, 0);
    });
}

/// What a configuration call has read ends a blocking `read`, for `handle_packet`; see `runtimes` for event loops
#[test]
fn a_blocking_read_returns_for_packets_that_a_setting_met() {
    isolated(|| {
        let lab = Lab::new();
        let mut handle = Handle::open().unwrap();
        let (send, seen) = mpsc::channel();
        let queue = handle
            .create_queue(QUEUE, move |data| {
                send.send(data.get_payload().len()).unwrap();
                data.set_verdict(Verdict::Accept, None);
            })
            .unwrap();
        queue.set_mode(CopyMode::PACKET, 0).unwrap();
        lab.send_numbered(0..3);
        queue.set_maxlen(10).unwrap();
        let mut socket = std::fs::File::from(handle.as_fd().try_clone_to_owned().unwrap());
        // Without something to read this would never return, and the test run into its timeout.
        let mut buf = vec![0; RecvBatch::DEFAULT_SLOT_LEN];
        let len = socket.read(&mut buf).unwrap();
        assert_eq!(handle.handle_packet(&buf[..len]).unwrap(), 3);
        assert_eq!(seen.try_iter().count(), 3);
        assert_eq!(lab.recv().as_deref(), Some(&0_u32.to_be_bytes()[..]));
    });
}

/// And for a thread that is already asleep in `recv` while another makes the setting
#[test]
fn a_thread_asleep_in_recv_gets_packets_that_a_setting_of_another_met() {
    isolated(|| {
        const N: u32 = 300;
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let queue = handle.bind_queue(QUEUE).unwrap();
        thread::scope(|scope| {
            let receiver = scope.spawn(|| {
                let mut batch = RecvBatch::default();
                for number in 0..N {
                    let packet = next_packet(&handle, &mut batch);
                    assert_eq!(udp_payload(&packet), number.to_be_bytes());
                    handle.verdict(packet.key(), Verdict::Accept).unwrap();
                }
            });
            for number in 0..N {
                lab.send(&number.to_be_bytes());
                queue.set_maxlen(1000 + number).unwrap();
                assert_eq!(lab.recv().as_deref(), Some(&number.to_be_bytes()[..]));
            }
            receiver.join().unwrap();
        });
    });
}

/// A thread that waits in the kernel receives answers to the requests of others, too
#[test]
fn settings_are_answered_while_another_thread_is_blocked_in_recv() {
    isolated(|| {
        const N: u32 = 300;
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let queue = handle.bind_queue(QUEUE).unwrap();
        thread::scope(|scope| {
            let receiver = scope.spawn(|| {
                let (mut batch, mut number) = (RecvBatch::default(), 0);
                while number < N {
                    for event in handle.recv(&mut batch).unwrap() {
                        let Event::Packet(packet) = event else {
                            panic!("no packet, but {event:?}");
                        };
                        assert_eq!(udp_payload(&packet), number.to_be_bytes());
                        handle.verdict(packet.key(), Verdict::Accept).unwrap();
                        number += 1;
                    }
                }
            });
            let begin = Instant::now();
            for number in 0..N {
                queue.set_maxlen(1000 + number).unwrap();
                handle.sync().unwrap();
                lab.send(&number.to_be_bytes());
                queue.set_maxlen(1000).unwrap();
                assert_eq!(lab.recv().as_deref(), Some(&number.to_be_bytes()[..]));
            }
            let took = begin.elapsed();
            assert!(took < TIMEOUT, "{took:?}: an answer was waited for");
            receiver.join().unwrap();
        });
    });
}

#[test]
fn threads_that_block_in_recv_on_one_handle_share_its_packets() {
    isolated(|| {
        const N: u32 = 2000;
        const THREADS: usize = 3;
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let seen = thread::scope(|scope| {
            let threads = [(); THREADS].map(|()| {
                scope.spawn(|| {
                    let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
                    let mut seen = Vec::new();
                    loop {
                        let mut is_over = false;
                        for packet in handle.recv(&mut batch).unwrap().packets() {
                            verdicts.push(packet.key(), Verdict::Accept).unwrap();
                            match *udp_payload(&packet) {
                                [a, b, c, d] => seen.push(u32::from_be_bytes([a, b, c, d])),
                                _ => is_over = true,
                            }
                        }
                        handle.send(&mut verdicts).unwrap();
                        if is_over {
                            return seen;
                        }
                    }
                })
            });
            let mut dice = Dice(7);
            let mut sent = 0;
            while sent < N {
                let burst = (1 + dice.roll(20)).min(N - sent);
                lab.send_numbered(sent..sent + burst);
                for _ in 0..burst {
                    lab.recv().expect("every packet is accepted");
                }
                sent += burst;
            }
            // One at a time, since a thread may take what is for two; and maybe one that nobody is there for any more.
            while threads.iter().any(|thread| !thread.is_finished()) {
                lab.send(b"the end");
                thread::sleep(Duration::from_millis(10));
            }
            threads.map(|thread| thread.join().unwrap())
        });
        for seen in &seen {
            assert!(seen.is_sorted(), "each gets its packets in their order");
        }
        let mut all = seen.concat();
        all.sort_unstable();
        assert_eq!(all, Vec::from_iter(0..N));
        let stats = handle.stats();
        assert_eq!((stats.lost_packets, stats.refused_verdicts), (0, 0));
    });
}

#[test]
fn a_call_that_does_not_wait_does_not_wait_for_another_thread() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let mut batch = RecvBatch::default();
                let mut packets = handle.recv(&mut batch).unwrap().packets();
                packets.next().map(|packet| udp_payload(&packet).to_vec())
            });
            let mut batch = RecvBatch::default();
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_millis(100) {
                assert!(is_silent(&handle, &mut batch));
            }
            let deadline = begin + Duration::from_millis(200);
            assert_eq!(
                handle.recv_deadline(&mut batch, deadline).unwrap().count(),
                0
            );
            assert!(begin.elapsed() < TIMEOUT);
            assert!(!waiting.is_finished(), "and does not end its wait");
            lab.send(b"for the other");
            assert_eq!(
                waiting.join().unwrap().as_deref(),
                Some(&b"for the other"[..])
            );
        });
    });
}

#[test]
fn recv_waits_though_the_descriptor_is_non_blocking() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        handle.set_nonblocking(true).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(100));
                lab.send(b"late");
            });
            let mut batch = RecvBatch::default();
            assert_eq!(handle.recv(&mut batch).unwrap().packets().count(), 1);
        });
    });
}

#[test]
fn requests_of_many_threads_get_their_own_answers() {
    isolated(|| {
        const EACH: u32 = 100;
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        thread::scope(|scope| {
            for num in 10..14 {
                let handle = &handle;
                scope.spawn(move || {
                    for round in 0..EACH {
                        let queue = handle.bind_queue(num).unwrap();
                        queue.set_maxlen(1 + round).unwrap();
                        match handle.bind_queue(num).unwrap_err() {
                            Error::Refused(refusal) => {
                                assert_eq!(refusal.operation(), Operation::Bind(num));
                                assert_eq!(refusal.situation(), Situation::AlreadyBound);
                            }
                            other => panic!("{other:?}"),
                        }
                        if round % 2 == 0 {
                            queue.destroy().unwrap();
                        }
                    }
                });
            }
            lab.send_numbered(0..EACH);
        });
        let mut batch = RecvBatch::default();
        for number in 0..EACH {
            let packet = next_packet(&handle, &mut batch);
            assert_eq!(udp_payload(&packet), number.to_be_bytes());
        }
    });
}

#[test]
fn sync_says_that_every_refusal_has_arrived() {
    isolated(|| {
        const N: u32 = 100;
        let lab = Lab::at_input();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"the key of a binding");
        let real = next_packet(&handle, &mut batch).key();
        for id in 0..N {
            let key = PacketKey {
                id: 1000 + id,
                ..real
            };
            handle.verdict(key, Verdict::Accept).unwrap();
        }
        handle.verdict(real, Verdict::Accept).unwrap();
        handle.sync().unwrap();
        assert!(
            lab.v4.recv_within(Duration::from_millis(1)).is_some(),
            "delivered by now"
        );
        let mut ids = Vec::new();
        for event in handle.try_recv(&mut batch).unwrap() {
            match event {
                Event::Refused(refusal) => ids.push(refusal.packet().unwrap().id),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(ids, Vec::from_iter(1000..1000 + N));
        assert_eq!(handle.stats().refused_verdicts, N.into());
    });
}

#[test]
fn an_overrun_is_an_event_its_losses_are_counted_and_packets_flow_on() {
    isolated(|| {
        const N: u32 = 200;
        let lab = Lab::new();
        let handle = Handle::builder().recv_buffer(1 << 14).open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send_numbered(0..N);
        let (mut packets, mut overruns) = (0_u32, 0);
        loop {
            let events = handle.try_recv(&mut batch).unwrap();
            let mut any = false;
            for event in events {
                any = true;
                match event {
                    Event::Packet(packet) => {
                        packets += 1;
                        handle.verdict(packet.key(), Verdict::Drop).unwrap();
                    }
                    Event::Overrun => overruns += 1,
                    other => panic!("{other:?}"),
                }
            }
            if !any {
                break;
            }
        }
        assert!(
            overruns > 0 && packets < N,
            "{overruns} overruns, {packets} packets"
        );
        lab.send(b"after");
        assert_eq!(udp_payload(&next_packet(&handle, &mut batch)), b"after");
        let stats = handle.stats();
        assert_eq!(stats.packets, u64::from(packets) + 1);
        assert_eq!(
            stats.lost_packets,
            u64::from(N - packets),
            "each is counted"
        );
        assert_eq!(stats.overruns, overruns);
    });
}

#[test]
fn an_overrun_that_is_not_reported_is_counted_all_the_same() {
    isolated(|| {
        const N: u32 = 200;
        let lab = Lab::new();
        let builder = Handle::builder().recv_buffer(1 << 14);
        let handle = builder.report_overruns(false).open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send_numbered(0..N);
        let mut packets = 0_u32;
        while !is_silent_but_packets(&handle, &mut batch, &mut packets) {}
        lab.send(b"after");
        assert_eq!(udp_payload(&next_packet(&handle, &mut batch)), b"after");
        let stats = handle.stats();
        assert!(packets < N);
        assert_eq!(stats.lost_packets, u64::from(N - packets));
        assert_eq!(stats.overruns, 0);
    });
}

fn is_silent_but_packets(handle: &Handle, batch: &mut RecvBatch, packets: &mut u32) -> bool {
    let before = *packets;
    for event in handle.try_recv(batch).unwrap() {
        assert!(matches!(event, Event::Packet(_)), "{event:?}");
        *packets += 1;
    }
    before == *packets
}

/// What `src/socket/losses.rs` rests on: the call after the first loss tells of it, and until the buffer is empty everything
/// is dropped
#[test]
fn until_the_buffer_is_empty_an_overrun_goes_on() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::builder().recv_buffer(1 << 14).open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        handle.set_nonblocking(true).unwrap();
        let mut socket = std::fs::File::from(handle.as_fd().try_clone_to_owned().unwrap());
        let mut buf = vec![0; RecvBatch::DEFAULT_SLOT_LEN];
        let mut recv = || {
            let len = socket
                .read(&mut buf)
                .map_err(|error| error.raw_os_error())?;
            match Messages::new(&buf[..len]).next() {
                Some(Ok(Message::Packet(packet))) => Ok(packet.id()),
                other => panic!("no packet, but {other:?}"),
            }
        };

        lab.send_numbered(0..200);
        assert_eq!(recv(), Err(Some(libc::ENOBUFS)));
        assert_eq!(recv(), Ok(1));
        // Number 201, for which there is room now
        lab.send_numbered(0..1);
        let left: Vec<u32> = std::iter::from_fn(|| recv().ok()).collect();
        let are_next = (2..).zip(&left).all(|(number, id)| number == *id);
        assert!(are_next && (1..150).contains(&left.len()), "{left:?}");
        lab.send_numbered(0..1);
        assert_eq!(recv(), Ok(202));
    });
}

/// ENOBUFS from the caller's own receive call
#[test]
fn a_callers_own_receive_call_fails_with_enobufs_and_goes_on() {
    isolated(|| {
        let lab = Lab::new();
        let mut handle = Handle::builder().recv_buffer(1 << 14).open().unwrap();
        let config = QueueConfig::new().copy_mode(CopyMode::PACKET, 0);
        let _queue = handle
            .create_queue_with(QUEUE, &config, |data| {
                data.set_verdict(Verdict::Accept, None);
            })
            .unwrap();
        handle.set_nonblocking(true).unwrap();
        lab.send_numbered(0..200);
        let mut socket = std::fs::File::from(handle.as_fd().try_clone_to_owned().unwrap());
        let mut buf = vec![0; RecvBatch::DEFAULT_SLOT_LEN];
        let (mut handled, mut losses) = (0, 0);
        loop {
            match socket.read(&mut buf) {
                Ok(len) => handled += handle.handle_packet(&buf[..len]).unwrap(),
                Err(error) if Situation::of(&error) == Situation::NoBuffers => {
                    assert_eq!(error.raw_os_error(), Some(libc::ENOBUFS));
                    losses += 1;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
        assert!(losses > 0);
        assert_eq!(lab.v4.drain(), handled, "all that came were accepted");
    });
}

#[test]
fn a_lost_acknowledgement_is_an_error_in_time_and_no_packet_is_lost() {
    isolated(|| {
        let lab = Lab::new();
        let builder = Handle::builder().recv_buffer(1 << 14);
        let handle = builder.ack_timeout(Duration::MAX).open().unwrap();
        let queue = handle.bind_queue(QUEUE).unwrap();
        lab.send_numbered(0..200);
        let error = queue.set_maxlen(500).unwrap_err();
        assert!(
            matches!(error, Error::NoAck { op: Operation::SetMaxlen(QUEUE), waited, .. } if waited < TIMEOUT),
            "{error:?}"
        );

        let mut batch = RecvBatch::default();
        let mut next = 0_u32;
        let mut overruns = 0;
        for event in handle.try_recv(&mut batch).unwrap() {
            match event {
                Event::Packet(packet) => {
                    assert_eq!(udp_payload(&packet), next.to_be_bytes());
                    next += 1;
                }
                Event::Overrun => overruns += 1,
                other => panic!("{other:?}"),
            }
        }
        assert!(
            next > 0 && overruns > 0,
            "{next} packets, {overruns} overruns"
        );
        queue.set_maxlen(500).expect("with room for the answer");
    });
}

/// The caller's own loop reads the descriptor while another thread makes settings: either may get the other's messages
#[test]
fn answers_that_the_callers_loop_reads_reach_the_request() {
    isolated(|| {
        const N: u32 = 300;
        let lab = Lab::new();
        let mut handle = Handle::open().unwrap();
        let config = QueueConfig::new().copy_mode(CopyMode::PACKET, 0);
        let queue = handle
            .create_queue_with(QUEUE, &config, |data| {
                data.set_verdict(Verdict::Accept, None);
            })
            .unwrap();
        let mut socket = std::fs::File::from(handle.as_fd().try_clone_to_owned().unwrap());
        thread::scope(|scope| {
            let driver = scope.spawn(move || {
                let mut buf = vec![0; RecvBatch::DEFAULT_SLOT_LEN];
                let mut handled = 0;
                while handled < N.try_into().unwrap() {
                    let len = socket.read(&mut buf).unwrap();
                    handled += handle.handle_packet(&buf[..len]).unwrap();
                }
                handle // the queue ends with it
            });
            for number in 0..N {
                lab.send(&number.to_be_bytes());
                queue.set_maxlen(1000 + number).unwrap();
                assert_eq!(lab.recv().as_deref(), Some(&number.to_be_bytes()[..]));
            }
            drop(driver.join().unwrap());
        });
    });
}

#[test]
fn a_packet_longer_than_its_slot_is_reported_with_the_length_it_needs_and_can_be_answered() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let slot_len = 256;
        let mut small = RecvBatch::new(4, slot_len);
        let payload = [8; 1000];
        let mut lens = Vec::new();
        for _ in 0..2 {
            lab.send(&payload);
            lab.send(b"short");
            let (key, needed) = match next_event(&handle, &mut small) {
                Event::Truncated {
                    key: Some(key),
                    needed,
                    had,
                    ..
                } => {
                    assert_eq!(had, slot_len);
                    (key, needed)
                }
                other => panic!("{other:?}"),
            };
            lens.push(needed);
            // What follows is whole.
            let short = next_packet(&handle, &mut small);
            assert_eq!(udp_payload(&short), b"short");
            for key in [key, short.key()] {
                handle.verdict(key, Verdict::Accept).unwrap();
            }
            assert_eq!(lab.recv().as_deref(), Some(&payload[..]));
            assert_eq!(lab.recv().as_deref(), Some(&b"short"[..]));
        }
        assert_eq!(handle.stats().truncated, 2);
        assert_eq!(handle.stats().lost_packets, 0);

        let mut enough = RecvBatch::new(4, lens[0]);
        lab.send(&payload);
        assert_eq!(udp_payload(&next_packet(&handle, &mut enough)), payload);
    });
}

#[test]
fn what_a_loop_leaves_comes_with_the_next_call() {
    isolated(|| {
        const N: u32 = 10;
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send_numbered(0..N);
        for number in 0..N {
            // One per call, although the batch has all.
            let packet = next_packet(&handle, &mut batch);
            assert_eq!(udp_payload(&packet), number.to_be_bytes());
        }
        assert!(is_silent(&handle, &mut batch));
    });
}

#[test]
fn a_deadline_ends_a_wait_and_a_packet_ends_it_earlier() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        let (begin, wait) = (Instant::now(), Duration::from_millis(30));
        let mut events = handle.recv_deadline(&mut batch, begin + wait).unwrap();
        assert!(events.next().is_none());
        assert!(
            (wait..TIMEOUT).contains(&begin.elapsed()),
            "{:?}",
            begin.elapsed()
        );
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(wait);
                lab.send(b"ends the waits");
            });
            let mut events = handle.recv_deadline(&mut batch, begin + LONG).unwrap();
            assert!(matches!(events.next(), Some(Event::Packet(_))));
        });
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(wait);
                lab.send(b"ends a wait without a deadline");
            });
            let mut events = handle.recv(&mut batch).unwrap();
            assert!(matches!(events.next(), Some(Event::Packet(_))));
        });
    });
}

/// EINTR: a timer's signals, for instance, neither end a wait nor make it longer
#[test]
fn signals_do_not_end_a_wait() {
    isolated(|| {
        const WAIT: Duration = Duration::from_millis(200);
        const ENOUGH: usize = 3;
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        // On a busy machine it may take another wait.
        loop {
            let begin = Instant::now();
            let (events, signals) = signal::interrupting(|| {
                let events = handle.recv_deadline(&mut batch, begin + WAIT).unwrap();
                events.count()
            })
            .unwrap();
            let took = begin.elapsed();
            assert!((WAIT..TIMEOUT).contains(&took), "{took:?}");
            assert_eq!(events, 0);
            if signals >= ENOUGH {
                break;
            }
        }

        let send_after_signals = |payload| {
            let (before, end) = (signal::count(), Instant::now() + TIMEOUT);
            while signal::count() < before + ENOUGH && Instant::now() < end {
                thread::sleep(Duration::from_millis(1));
            }
            lab.send(payload);
        };
        thread::scope(|scope| {
            scope.spawn(|| send_after_signals(b"ends a wait with a deadline"));
            let (payload, signals) = signal::interrupting(|| {
                let packet = next_packet(&handle, &mut batch);
                udp_payload(&packet).to_vec()
            })
            .unwrap();
            assert_eq!(payload, b"ends a wait with a deadline");
            assert!(signals >= ENOUGH, "{signals} signals");
        });
        thread::scope(|scope| {
            scope.spawn(|| send_after_signals(b"ends one without"));
            let (payload, signals) = signal::interrupting(|| {
                let mut packets = handle.recv(&mut batch).unwrap().packets();
                packets.next().map(|packet| udp_payload(&packet).to_vec())
            })
            .unwrap();
            assert_eq!(payload.as_deref(), Some(&b"ends one without"[..]));
            assert!(signals >= ENOUGH, "{signals} signals");
        });
    });
}

/// A binding begins with its settings, so a flood finds no moment in which packets are dropped
#[test]
fn one_message_binds_without_a_gap() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::builder().recv_buffer(1 << 22).open().unwrap();
        let config = QueueConfig::new()
            .copy_mode(CopyMode::PACKET, 0)
            .maxlen(u32::MAX);
        let mut batch = RecvBatch::default();
        for _ in 0..20 {
            let (bound, sent) = (AtomicBool::new(false), AtomicU32::new(0));
            let queue = thread::scope(|scope| {
                scope.spawn(|| {
                    while !bound.load(Ordering::SeqCst) {
                        // No more than fit an ordinary user's receive buffer
                        if sent.load(Ordering::SeqCst) < 300 {
                            lab.send(&sent.load(Ordering::SeqCst).to_be_bytes());
                            sent.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                    lab.send(&sent.load(Ordering::SeqCst).to_be_bytes());
                });
                while sent.load(Ordering::SeqCst) == 0 {
                    thread::yield_now();
                }
                let queue = handle.bind_queue_with(QUEUE, &config).unwrap();
                bound.store(true, Ordering::SeqCst);
                queue
            });
            // Those before it was bound were dropped. From the first one that was held to the last, none is missing.
            let first = next_packet(&handle, &mut batch);
            assert_eq!(first.id(), 1);
            let first = u32::from_be_bytes(udp_payload(&first).try_into().unwrap());
            for number in first + 1..=sent.into_inner() {
                let packet = next_packet(&handle, &mut batch);
                assert_eq!(udp_payload(&packet), number.to_be_bytes());
            }
            assert!(is_silent(&handle, &mut batch));
            queue.destroy().unwrap();
        }
    });
}

/// Where others read the descriptor too, the answer may be in their hands
#[test]
fn an_acknowledgement_that_others_have_read_is_waited_for() {
    isolated(|| {
        let ack_timeout = Duration::from_millis(100);
        let _lab = Lab::new();
        let builder = Handle::builder().ack_timeout(ack_timeout);
        let handle = builder.open().unwrap();
        let queue = handle.bind_queue(QUEUE).unwrap();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let thief = scope.spawn(|| {
                let mut stolen = 0;
                while !done.load(Ordering::Relaxed) {
                    stolen += u32::from(steal_past_the_library(&handle));
                }
                stolen
            });
            let error = loop {
                if let Err(error) = queue.set_maxlen(500) {
                    break error;
                }
            };
            done.store(true, Ordering::Relaxed);
            assert_eq!(thief.join().unwrap(), 1);
            assert!(
                matches!(error, Error::NoAck { op: Operation::SetMaxlen(QUEUE), waited, .. } if waited >= ack_timeout),
                "{error:?}"
            );
        });
    });
}

/// A loop that is left early goes on where it was
#[test]
fn events_that_were_not_looked_at_stay_in_the_batch() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        assert!(!batch.has_events());
        for stashed in [false, true] {
            lab.send_numbered(0..3);
            if stashed {
                queue.set_maxlen(100).unwrap();
            }
            for number in 0..3_u32 {
                let packet = next_packet(&handle, &mut batch);
                assert_eq!(udp_payload(&packet), number.to_be_bytes());
                assert_eq!(batch.has_events(), number < 2);
            }
            assert!(is_silent(&handle, &mut batch));
        }
    });
}
