//! The one stream of packets, answers and errors: nothing in it is lost, and no caller waits for
//! what is there

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nfqnl::proto::{Message, Messages};
use nfqnl::{
    CopyMode, Error, ErrorKind, Event, Operation, QueueConfig, RecvBatch, SendBatch, Socket,
    Verdict,
};
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::signal;
use nfqnl_testkit::trace::thread_id;
use nfqnl_testkit::traffic::TIMEOUT;
use rustix::event::{PollFd, PollFlags, poll};

use crate::lab::{
    Dice, Lab, QUEUE, WHOLE_PACKETS, Watchdog, is_readable, is_silent, next_event, next_events,
    next_packet, number, recv_events, steal_past_the_library, take_all, udp_payload,
    wait_until_asleep,
};

/// Far longer than any wait in these tests
const LONG: Duration = Duration::from_secs(3600);

#[test]
fn settings_during_traffic_lose_no_packet() {
    isolated(|| {
        const N: u32 = 50;
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        for round in 0..N {
            lab.send(&round.to_be_bytes());
            match round % 4 {
                0 => queue.set_maxlen(1000 + round).unwrap(),
                1 => queue.set_mode(CopyMode::Packet, 0xffff).unwrap(),
                2 => socket.sync().unwrap(),
                _ => {
                    let other = socket.bind(QUEUE + 1).unwrap();
                    other.destroy().unwrap();
                }
            }
        }
        for expected in 0..N {
            let packet = next_packet(&socket, &mut batch);
            assert_eq!(number(&packet), expected);
            socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
            lab.expect_numbered([expected]);
        }
        assert!(is_silent(&socket, &mut batch));
        assert_eq!(socket.stats().packets, N.into());
        assert_eq!(socket.stats().missing_packets, 0);
    });
}

/// As in a program with poll(2) for the descriptor and for something else
#[test]
fn recv_never_blocks_when_poll_reports_readable() {
    isolated(|| {
        let _watchdog = Watchdog::new(Duration::from_secs(30));
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        let mut next = 0;
        for round in 0..20_u32 {
            let packets = round % 4;
            lab.send_numbered(0..packets);
            // The setting sets the packets aside and wakes the program.
            queue.set_maxlen(1000 + round).unwrap();
            if round % 3 == 0 {
                drop(socket.bind(QUEUE + 1).unwrap());
            }
            let mut seen = 0;
            while is_readable(&socket) {
                for event in socket.recv(&mut batch).unwrap() {
                    let packet = event.packet().expect("only packets were sent");
                    assert_eq!(number(&packet), seen);
                    socket.set_verdict(packet.key(), Verdict::Drop).unwrap();
                    seen += 1;
                }
            }
            assert_eq!(seen, packets, "the descriptor is not readable any more");
            next += packets;
        }
        assert_eq!(socket.stats().packets, u64::from(next));
    });
}

/// The same while another thread changes settings, and then ends the loop by a pipe
#[test]
fn a_poll_loop_sees_its_stop_pipe() {
    isolated(|| {
        const N: u32 = 300;
        let _watchdog = Watchdog::new(Duration::from_secs(60));
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        for packets in [true, false] {
            let (mut stop, stopped) = UnixStream::pair().unwrap();
            thread::scope(|scope| {
                scope.spawn(|| {
                    for round in 0..N {
                        if packets {
                            lab.send(&round.to_be_bytes());
                        }
                        queue.set_maxlen(1000 + round).unwrap();
                    }
                    stop.write_all(b"stop").unwrap();
                });
                let (mut batch, mut seen) = (RecvBatch::default(), 0);
                loop {
                    let mut fds = [
                        PollFd::new(&socket, PollFlags::IN),
                        PollFd::new(&stopped, PollFlags::IN),
                    ];
                    poll(&mut fds, None).unwrap();
                    let [readable, stop] = fds.map(|fd| !fd.revents().is_empty());
                    if readable {
                        for event in socket.recv(&mut batch).unwrap() {
                            let packet = event.packet().expect("only packets were sent");
                            assert_eq!(number(&packet), seen);
                            socket.set_verdict(packet.key(), Verdict::Drop).unwrap();
                            seen += 1;
                        }
                    } else if stop {
                        break;
                    }
                }
                assert_eq!(seen, if packets { N } else { 0 });
            });
        }
    });
}

/// A setting receives packets, and a blocking read(2) of the caller's own loop ends
#[test]
fn a_setting_wakes_a_blocking_read() {
    isolated(|| {
        let _watchdog = Watchdog::new(Duration::from_secs(30));
        let lab = Lab::new();
        let handle = nfqnl::open().unwrap();
        let (send, seen) = mpsc::channel();
        let queue = handle
            .create_queue(QUEUE, move |data| {
                send.send(data.get_payload().len()).unwrap();
                data.set_verdict(Verdict::Accept, None);
            })
            .unwrap();
        queue.set_mode(CopyMode::Packet, 0).unwrap();
        lab.send_numbered(0..3);
        queue.set_maxlen(10).unwrap();
        let mut copy = File::from(handle.as_fd().try_clone_to_owned().unwrap());
        let mut buf = vec![0; RecvBatch::DEFAULT_SLOT_LEN];
        let len = copy.read(&mut buf).unwrap();
        assert_eq!(handle.handle_packet(&buf[..len]).unwrap(), 3);
        assert_eq!(seen.try_iter().count(), 3);
        lab.expect_numbered(0..3);
    });
}

/// A thread is asleep in a receive call, and a setting of another thread receives the packets
#[test]
fn a_setting_wakes_a_thread_in_recv() {
    isolated(|| {
        const N: u32 = 300;
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        for has_timeout in [true, false] {
            thread::scope(|scope| {
                let receiver = scope.spawn(|| {
                    let (mut batch, mut next) = (RecvBatch::default(), 0);
                    while next < N {
                        let events = match has_timeout {
                            true => next_events(&socket, &mut batch),
                            false => recv_events(&socket, &mut batch),
                        };
                        for packet in events.filter_map(Event::packet) {
                            assert_eq!(number(&packet), next);
                            socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
                            next += 1;
                        }
                    }
                });
                for number in 0..N {
                    lab.send(&number.to_be_bytes());
                    queue.set_maxlen(1000 + number).unwrap();
                    lab.expect_numbered([number]);
                }
                receiver.join().unwrap();
            });
        }
    });
}

/// The thread in `recv` may read the answers to requests of other threads
#[test]
fn settings_are_answered_during_recv() {
    isolated(|| {
        const N: u32 = 100;
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        thread::scope(|scope| {
            let receiver = scope.spawn(|| {
                let (mut batch, mut next) = (RecvBatch::default(), 0);
                while next < N {
                    for event in socket.recv(&mut batch).unwrap() {
                        let packet = event.packet().expect("only packets were sent");
                        assert_eq!(number(&packet), next);
                        socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
                        next += 1;
                    }
                }
            });
            let begin = Instant::now();
            for number in 0..N {
                queue.set_maxlen(1000 + number).unwrap();
                socket.sync().unwrap();
                lab.send(&number.to_be_bytes());
                queue.set_maxlen(1000).unwrap();
                lab.expect_numbered([number]);
            }
            let took = begin.elapsed();
            assert!(
                took < TIMEOUT / 3,
                "{took:?}: some call waited for an answer"
            );
            receiver.join().unwrap();
        });
    });
}

#[test]
fn threads_in_recv_share_the_packets() {
    isolated(|| {
        const N: u32 = 2000;
        const THREADS: usize = 3;
        let _watchdog = Watchdog::new(Duration::from_secs(60));
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let waker = socket.waker();
        let is_over = AtomicBool::new(false);
        let seen = thread::scope(|scope| {
            let threads = [(); THREADS].map(|()| {
                scope.spawn(|| {
                    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
                    let mut seen = Vec::new();
                    while !is_over.load(Ordering::SeqCst) {
                        let events = socket.recv(&mut batch).unwrap();
                        for packet in events.filter_map(Event::packet) {
                            verdicts.push(packet.key(), Verdict::Accept).unwrap();
                            seen.push(number(&packet));
                        }
                        socket.send(&mut verdicts).unwrap();
                    }
                    seen
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
            is_over.store(true, Ordering::SeqCst);
            // A thread on its way into `recv` needs another wake.
            while threads.iter().any(|thread| !thread.is_finished()) {
                waker.wake_all();
                thread::sleep(Duration::from_millis(1));
            }
            threads.map(|thread| thread.join().unwrap())
        });
        for seen in &seen {
            assert!(seen.is_sorted(), "each gets its packets in their order");
        }
        let mut all = seen.concat();
        all.sort_unstable();
        assert_eq!(all, Vec::from_iter(0..N));
        let stats = socket.stats();
        assert_eq!((stats.missing_packets, stats.refused_verdicts), (0, 0));
    });
}

#[test]
fn try_recv_does_not_wait_for_a_thread_in_recv() {
    isolated(|| {
        let _watchdog = Watchdog::new(Duration::from_secs(30));
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let (send, thread) = mpsc::channel();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                send.send(thread_id().unwrap()).unwrap();
                let mut batch = RecvBatch::default();
                let packet = recv_events(&socket, &mut batch).find_map(Event::packet);
                udp_payload(&packet.unwrap()).to_vec()
            });
            wait_until_asleep(thread.recv().unwrap());
            let mut batch = RecvBatch::default();
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_millis(100) {
                assert!(socket.try_recv(&mut batch).unwrap().next().is_none());
            }
            let timeout = Duration::from_millis(100);
            let mut events = socket.recv_timeout(&mut batch, timeout).unwrap();
            assert!(events.next().is_none());
            let took = begin.elapsed();
            assert!((2 * timeout..TIMEOUT).contains(&took), "{took:?}");
            assert!(!waiting.is_finished(), "its wait goes on");
            lab.send(b"for the other");
            assert_eq!(waiting.join().unwrap(), b"for the other");
        });
    });
}

#[test]
fn recv_waits_on_a_nonblocking_descriptor() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        nfqnl_testkit::socket::set_nonblocking(&socket).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(100));
                lab.send(b"late");
            });
            let mut batch = RecvBatch::default();
            drop(socket.recv(&mut batch).unwrap());
            assert!(batch.has_events(), "it returned without reading anything");
            assert_eq!(batch.events().filter_map(Event::packet).count(), 1);
        });
    });
}

#[test]
fn each_thread_gets_its_own_answers() {
    isolated(|| {
        const EACH: u32 = 100;
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        thread::scope(|scope| {
            for num in 10..14 {
                let socket = &socket;
                scope.spawn(move || {
                    for round in 0..EACH {
                        let queue = socket.bind(num).unwrap();
                        queue.set_maxlen(1 + round).unwrap();
                        match socket.bind(num).unwrap_err() {
                            Error::Refused(refusal) => {
                                assert_eq!(refusal.operation(), Operation::Bind(num));
                                assert_eq!(refusal.kind(), ErrorKind::AlreadyBound);
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
        for expected in 0..EACH {
            assert_eq!(number(&next_packet(&socket, &mut batch)), expected);
        }
    });
}

/// Binding a number again waits until the kernel has finished with the earlier binding, some
/// 10 ms. One wait is enough for all numbers
#[test]
fn many_rebinds_take_one_wait() {
    isolated(|| {
        const QUEUES: u16 = 300;
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        let bind_all = || Vec::from_iter((100..100 + QUEUES).map(|num| socket.bind(num).unwrap()));
        for destroy in [true, false] {
            let queues = bind_all();
            if destroy {
                for queue in queues {
                    queue.destroy().unwrap();
                }
            } else {
                drop(queues);
            }
            lab.send_numbered(0..100);
            let begin = Instant::now();
            let queues = bind_all();
            let took = begin.elapsed();
            assert!(took < Duration::from_secs(1), "{took:?}");
            for queue in &queues {
                queue.set_maxlen(100).expect("it is bound");
            }
            for expected in 0..100 {
                let packet = next_packet(&socket, &mut batch);
                assert_eq!(number(&packet), expected);
                socket.set_verdict(packet.key(), Verdict::Drop).unwrap();
            }
            for queue in queues {
                queue.destroy().unwrap();
            }
        }
    });
}

#[test]
fn sync_returns_after_every_refusal() {
    isolated(|| {
        const N: u32 = 100;
        let lab = Lab::at_input();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"one real packet");
        let real = next_packet(&socket, &mut batch).key();
        assert_eq!(queue.key(real.id()), real);
        for id in 1000..1000 + N {
            socket.set_verdict(queue.key(id), Verdict::Accept).unwrap();
        }
        socket.set_verdict(real, Verdict::Accept).unwrap();
        socket.sync().unwrap();
        assert!(
            lab.v4.recv_within(Duration::from_millis(1)).is_some(),
            "not delivered yet"
        );
        let mut ids = Vec::new();
        take_all(&socket, &mut batch, |event| match event {
            Event::Refused(refusal) => ids.push(refusal.packet().unwrap().id()),
            other => panic!("{other:?}"),
        });
        assert_eq!(ids, Vec::from_iter(1000..1000 + N));
        assert_eq!(socket.stats().refused_verdicts, N.into());
    });
}

#[test]
fn an_overrun_is_an_event_and_counted() {
    isolated(|| {
        const N: u32 = 200;
        let lab = Lab::new();
        let socket = Socket::builder().recv_buffer(1 << 14).open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send_numbered(0..N);
        let (mut packets, mut overruns) = (0_u32, 0);
        while !is_silent(&socket, &mut batch) {
            let events = Vec::from_iter(batch.events());
            if matches!(events[..], [Event::Overrun]) {
                overruns += 1;
                continue;
            }
            for event in events {
                let packet = event.packet().expect("an overrun comes alone");
                socket.set_verdict(packet.key(), Verdict::Drop).unwrap();
                packets += 1;
            }
        }
        assert!(
            overruns > 0 && packets < N,
            "{overruns} overruns, {packets} packets"
        );
        lab.send(b"after");
        assert_eq!(udp_payload(&next_packet(&socket, &mut batch)), b"after");
        let stats = socket.stats();
        assert_eq!(stats.packets, u64::from(packets) + 1);
        assert_eq!(stats.missing_packets, u64::from(N - packets));
        assert_eq!(stats.overruns, overruns);
    });
}

/// A setting has received packets before it
#[test]
fn an_overrun_comes_behind_earlier_packets() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::builder().recv_buffer(1 << 14).open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        for sets_again in [false, true] {
            lab.send_numbered(0..3);
            queue.set_maxlen(500).unwrap(); // sets the three aside
            lab.send_numbered(3..200);
            if sets_again {
                queue.set_maxlen(500).expect_err("its answer is lost");
            }
            let mut batch = RecvBatch::default();
            let mut events = Vec::new();
            take_all(&socket, &mut batch, |event| {
                events.push(match event {
                    Event::Packet(packet) => {
                        socket.set_verdict(packet.key(), Verdict::Drop).unwrap();
                        Some(number(&packet))
                    }
                    Event::Overrun => None,
                    other => panic!("{other:?}"),
                });
            });
            assert_eq!(events[..4], [Some(0), Some(1), Some(2), None]);
            assert_eq!(events[4], Some(3));
        }
    });
}

#[test]
fn an_unreported_overrun_is_counted() {
    isolated(|| {
        const N: u32 = 200;
        let lab = Lab::new();
        let builder = Socket::builder().recv_buffer(1 << 14);
        let socket = builder.report_overruns(false).open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send_numbered(0..N);
        let mut packets = 0_u32;
        take_all(&socket, &mut batch, |event| {
            assert!(matches!(event, Event::Packet(_)), "{event:?}");
            packets += 1;
        });
        lab.send(b"after");
        assert_eq!(udp_payload(&next_packet(&socket, &mut batch)), b"after");
        let stats = socket.stats();
        assert!(packets < N);
        assert_eq!(stats.missing_packets, u64::from(N - packets));
        assert_eq!(stats.overruns, 0);
    });
}

/// The library relies on this: the call after the first loss fails, and the kernel drops everything
/// until the buffer is empty
#[test]
fn an_overrun_lasts_until_the_buffer_is_empty() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::builder().recv_buffer(1 << 14).open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        nfqnl_testkit::socket::set_nonblocking(&socket).unwrap();
        let mut copy = File::from(socket.as_fd().try_clone_to_owned().unwrap());
        let mut buf = vec![0; RecvBatch::DEFAULT_SLOT_LEN];
        let mut recv = || {
            let len = copy.read(&mut buf).map_err(|error| error.raw_os_error())?;
            match Messages::new(&buf[..len]).next() {
                Some(Ok(Message::Packet(packet))) => Ok(packet.id()),
                other => panic!("not a packet: {other:?}"),
            }
        };

        lab.send_numbered(0..200);
        assert_eq!(recv(), Err(Some(libc::ENOBUFS)));
        assert_eq!(recv(), Ok(1));
        // Number 201: there is room for it now.
        lab.send_numbered(0..1);
        let left: Vec<u32> = std::iter::from_fn(|| recv().ok()).collect();
        let are_next = (2..).zip(&left).all(|(number, id)| number == *id);
        assert!(are_next && (1..150).contains(&left.len()), "{left:?}");
        lab.send_numbered(0..1);
        assert_eq!(recv(), Ok(202));
    });
}

#[test]
fn enobufs_does_not_end_the_callers_own_loop() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::builder().recv_buffer(1 << 14).open().unwrap();
        let handle = nfqnl::Handle::new(socket);
        let _queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, |data| {
                data.set_verdict(Verdict::Accept, None);
            })
            .unwrap();
        nfqnl_testkit::socket::set_nonblocking(&handle).unwrap();
        lab.send_numbered(0..200);
        let mut copy = File::from(handle.as_fd().try_clone_to_owned().unwrap());
        let mut buf = vec![0; RecvBatch::DEFAULT_SLOT_LEN];
        let (mut handled, mut losses) = (0, 0);
        loop {
            match copy.read(&mut buf) {
                Ok(len) => handled += handle.handle_packet(&buf[..len]).unwrap(),
                Err(error) if ErrorKind::of(&error) == ErrorKind::NoBuffers => {
                    assert_eq!(error.raw_os_error(), Some(libc::ENOBUFS));
                    losses += 1;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
        assert!(losses > 0);
        assert_eq!(
            lab.v4.drain(),
            handled,
            "every packet that came was accepted"
        );
    });
}

#[test]
fn a_lost_answer_is_an_error_in_time() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::builder().recv_buffer(1 << 14).open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        lab.send_numbered(0..200);
        let begin = Instant::now();
        let error = queue.set_maxlen(500).unwrap_err();
        assert!(
            matches!(
                error,
                Error::NoAck {
                    op: Operation::SetMaxlen(QUEUE),
                    ..
                }
            ),
            "{error:?}"
        );
        assert!(begin.elapsed() < TIMEOUT, "{:?}", begin.elapsed());

        let mut batch = RecvBatch::default();
        let (mut next, mut overruns) = (0_u32, 0);
        take_all(&socket, &mut batch, |event| match event {
            Event::Packet(packet) => {
                assert_eq!(number(&packet), next);
                next += 1;
            }
            Event::Overrun => overruns += 1,
            other => panic!("{other:?}"),
        });
        assert!(
            next > 0 && overruns > 0,
            "{next} packets, {overruns} overruns"
        );
        queue.set_maxlen(500).expect("there is room for the answer");
    });
}

/// Reading the packets before the answer may take long
#[test]
fn an_answer_behind_many_packets_is_not_lost() {
    isolated(|| {
        // An ordinary user's buffer holds fewer.
        let n = if nfqnl_testkit::netns::is_rootless() {
            200
        } else {
            20_000
        };
        let lab = Lab::new();
        let socket = Socket::builder().recv_buffer(64 << 20).open().unwrap();
        let config = WHOLE_PACKETS.maxlen(n);
        let queue = socket.bind_with(QUEUE, &config).unwrap();
        lab.send_numbered(0..n);
        queue.set_maxlen(n + 1).unwrap();
        let _other = socket.bind(QUEUE + 1).unwrap();
        let mut batch = RecvBatch::default();
        let mut next = 0;
        take_all(&socket, &mut batch, |event| {
            let packet = event.packet().expect("only packets were sent");
            assert_eq!(number(&packet), next);
            next += 1;
        });
        assert_eq!(next, n);
    });
}

/// The caller's own loop and a thread with settings may each read the messages for the other
#[test]
fn answers_read_by_the_callers_own_loop_arrive() {
    isolated(|| {
        const N: u32 = 300;
        let lab = Lab::new();
        let handle = nfqnl::open().unwrap();
        let queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, |data| {
                data.set_verdict(Verdict::Accept, None);
            })
            .unwrap();
        let mut copy = File::from(handle.as_fd().try_clone_to_owned().unwrap());
        thread::scope(|scope| {
            let driver = scope.spawn(|| {
                let mut buf = vec![0; RecvBatch::DEFAULT_SLOT_LEN];
                let mut handled = 0;
                while handled < N.try_into().unwrap() {
                    let len = copy.read(&mut buf).unwrap();
                    handled += handle.handle_packet(&buf[..len]).unwrap();
                }
            });
            for number in 0..N {
                lab.send(&number.to_be_bytes());
                queue.set_maxlen(1000 + number).unwrap();
                lab.expect_numbered([number]);
            }
            driver.join().unwrap();
        });
    });
}

#[test]
fn a_packet_longer_than_its_slot_is_reported() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let slot_len = 256;
        let mut small = RecvBatch::new(4, slot_len);
        let payload = [8; 1000];
        let mut lens = Vec::new();
        for _ in 0..2 {
            lab.send(&payload);
            lab.send(b"short");
            let (key, needed) = match next_event(&socket, &mut small) {
                Event::BufferTooSmall {
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
            // The next packet is whole.
            let short = next_packet(&socket, &mut small);
            assert_eq!(udp_payload(&short), b"short");
            for key in [key, short.key()] {
                socket.set_verdict(key, Verdict::Accept).unwrap();
            }
            assert_eq!(lab.recv().as_deref(), Some(&payload[..]));
            assert_eq!(lab.recv().as_deref(), Some(&b"short"[..]));
        }
        assert_eq!(socket.stats().missing_packets, 0);

        let mut enough = RecvBatch::new(4, lens[0]);
        lab.send(&payload);
        assert_eq!(udp_payload(&next_packet(&socket, &mut enough)), payload);
    });
}

#[test]
fn unread_events_come_with_the_next_call() {
    isolated(|| {
        const N: u32 = 10;
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send_numbered(0..N);
        for expected in 0..N {
            // This takes one event per call, although the batch may have all.
            assert_eq!(number(&next_packet(&socket, &mut batch)), expected);
        }
        assert!(is_silent(&socket, &mut batch));
    });
}

#[test]
fn a_timeout_or_a_packet_ends_a_wait() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        let (begin, wait) = (Instant::now(), Duration::from_millis(30));
        let mut events = socket.recv_timeout(&mut batch, wait).unwrap();
        assert!(events.next().is_none());
        let took = begin.elapsed();
        assert!((wait..TIMEOUT).contains(&took), "{took:?}");
        for timeout in [Some(LONG), Some(Duration::MAX), None] {
            thread::scope(|scope| {
                scope.spawn(|| {
                    thread::sleep(wait);
                    lab.send(b"ends the wait");
                });
                let mut events = match timeout {
                    Some(timeout) => socket.recv_timeout(&mut batch, timeout).unwrap(),
                    None => socket.recv(&mut batch).unwrap(),
                };
                assert!(matches!(events.next(), Some(Event::Packet(_))));
            });
        }
        let mut events = socket.recv_timeout(&mut batch, Duration::ZERO).unwrap();
        assert!(events.next().is_none());
    });
}

/// The signals of a timer, for instance, neither end a wait (EINTR) nor make it longer
#[test]
fn signals_do_not_end_a_wait() {
    isolated(|| {
        const WAIT: Duration = Duration::from_millis(200);
        const ENOUGH: usize = 3;
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        // On a busy machine few signals arrive in time, so it may take several waits.
        loop {
            let begin = Instant::now();
            let (events, signals) = signal::interrupting(|| {
                let events = socket.recv_timeout(&mut batch, WAIT).unwrap();
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

        for has_timeout in [true, false] {
            let send_after_signals = || {
                let (before, end) = (signal::count(), Instant::now() + TIMEOUT);
                while signal::count() < before + ENOUGH && Instant::now() < end {
                    thread::sleep(Duration::from_millis(1));
                }
                lab.send(b"ends the wait");
            };
            thread::scope(|scope| {
                scope.spawn(send_after_signals);
                let (payload, signals) = signal::interrupting(|| {
                    let mut events = match has_timeout {
                        true => socket.recv_timeout(&mut batch, LONG).unwrap(),
                        false => socket.recv(&mut batch).unwrap(),
                    };
                    let packet = events.next().and_then(Event::packet);
                    packet.map(|packet| udp_payload(&packet).to_vec())
                })
                .unwrap();
                assert_eq!(payload.as_deref(), Some(&b"ends the wait"[..]));
                assert!(signals >= ENOUGH, "{signals} signals");
            });
        }
    });
}

/// A binding begins with its settings: at no moment does the queue drop packets
#[test]
fn one_message_binds_without_a_gap() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let config = QueueConfig::new()
            .copy_mode(CopyMode::Packet, 0)
            .maxlen(u32::MAX);
        let mut batch = RecvBatch::default();
        for _ in 0..20 {
            let (bound, sent) = (AtomicBool::new(false), AtomicU32::new(0));
            let queue = thread::scope(|scope| {
                scope.spawn(|| {
                    while !bound.load(Ordering::SeqCst) {
                        // At most as many as fit an ordinary user's receive buffer
                        if sent.load(Ordering::SeqCst) < 200 {
                            lab.send(&sent.load(Ordering::SeqCst).to_be_bytes());
                            sent.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                    lab.send(&sent.load(Ordering::SeqCst).to_be_bytes());
                });
                while sent.load(Ordering::SeqCst) == 0 {
                    thread::yield_now();
                }
                let queue = socket.bind_with(QUEUE, &config).unwrap();
                bound.store(true, Ordering::SeqCst);
                queue
            });
            // The kernel dropped those before the bind. None is missing after the first one
            // received.
            let first = next_packet(&socket, &mut batch);
            assert_eq!(first.id(), 1);
            for expected in number(&first) + 1..=sent.into_inner() {
                assert_eq!(number(&next_packet(&socket, &mut batch)), expected);
            }
            assert!(is_silent(&socket, &mut batch));
            queue.destroy().unwrap();
        }
    });
}

/// Other code has read the answer from a copy of the descriptor, and does not pass it on
#[test]
fn a_stolen_answer_is_an_error_in_time() {
    isolated(|| {
        let _watchdog = Watchdog::new(Duration::from_secs(60));
        let _lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let thief = scope.spawn(|| {
                let mut stolen = 0;
                while !done.load(Ordering::Relaxed) {
                    stolen += u32::from(steal_past_the_library(&socket));
                }
                stolen
            });
            let error = loop {
                let begin = Instant::now();
                let result = queue.set_maxlen(500);
                assert!(begin.elapsed() < TIMEOUT, "{:?}", begin.elapsed());
                if let Err(error) = result {
                    break error;
                }
            };
            done.store(true, Ordering::Relaxed);
            assert!(thief.join().unwrap() > 0);
            assert!(
                matches!(
                    error,
                    Error::NoAck {
                        op: Operation::SetMaxlen(QUEUE),
                        ..
                    }
                ),
                "{error:?}"
            );
        });
    });
}

/// A loop may end early and continue there
#[test]
fn unread_events_stay_in_the_batch() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        assert!(!batch.has_events());
        for is_set_aside in [false, true] {
            lab.send_numbered(0..3);
            if is_set_aside {
                queue.set_maxlen(100).unwrap();
            }
            drop(next_events(&socket, &mut batch));
            let mut next = 0;
            while next < 3 {
                let packet = next_packet(&socket, &mut batch);
                assert_eq!(number(&packet), next);
                next += 1;
            }
            assert!(!batch.has_events());
            assert!(is_silent(&socket, &mut batch));
        }
    });
}

/// However many settings meet packets, at most one message wakes the program
#[test]
fn wakes_of_settings_do_not_pile_up() {
    isolated(|| {
        const N: u32 = 50;
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        for _ in 0..3 {
            for number in 0..N {
                lab.send(&number.to_be_bytes());
                queue.set_maxlen(1000 + number).unwrap();
            }
            assert!(is_readable(&socket), "poll(2) has to report the packets");
            let datagrams = std::iter::from_fn(|| steal_past_the_library(&socket).then_some(()));
            assert_eq!(datagrams.count(), 1);
            for expected in 0..N {
                let packet = next_packet(&socket, &mut batch);
                assert_eq!(number(&packet), expected);
                socket.set_verdict(packet.key(), Verdict::Drop).unwrap();
            }
            assert!(is_silent(&socket, &mut batch));
        }
    });
}
