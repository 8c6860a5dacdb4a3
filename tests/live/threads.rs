//! Several threads with one socket: receiving, answering, or not scheduled

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nfqnl::{
    Error, Event, OwnedPacket, Pending, QueueStats, RecvBatch, SendBatch, Socket, Verdict,
};
use nfqnl_testkit::cpu;
use nfqnl_testkit::netns::{is_rootless, isolated};
use nfqnl_testkit::process::fork;
use nfqnl_testkit::signal::Held;
use nfqnl_testkit::trace::thread_id;
use nfqnl_testkit::traffic::TIMEOUT;

use crate::lab::{
    Lab, QUEUE, Watchdog, is_silent, next_events, next_keys, next_packet, udp_payload,
    wait_until_asleep,
};

/// Two threads send each verdict by itself, two send batches
#[test]
fn verdicts_of_four_threads_are_all_executed() {
    isolated(|| {
        const N: u32 = 2000;
        const WORKERS: usize = 4;
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let (received, accepted) = (AtomicU32::new(0), AtomicU32::new(0));
        thread::scope(|scope| {
            let workers: Vec<_> = (0..WORKERS)
                .map(|worker| {
                    let (give, work) = mpsc::channel::<OwnedPacket>();
                    let (sender, accepted) = (socket.verdict_sender(), &accepted);
                    scope.spawn(move || {
                        let mut verdicts = SendBatch::new();
                        while let Ok(first) = work.recv() {
                            for packet in std::iter::once(first).chain(work.try_iter()) {
                                let number = udp_payload(&packet.packet());
                                let verdict = match number.last() {
                                    Some(last) if last % 3 == 0 => Verdict::Drop,
                                    _ => Verdict::Accept,
                                };
                                let is_accepted = verdict == Verdict::Accept;
                                accepted.fetch_add(is_accepted.into(), Ordering::SeqCst);
                                if worker % 2 == 0 {
                                    sender.set_verdict(packet.key(), verdict).unwrap();
                                } else {
                                    verdicts.push(packet.key(), verdict).unwrap();
                                }
                            }
                            sender.send(&mut verdicts).unwrap();
                        }
                    });
                    give
                })
                .collect();
            scope.spawn(|| lab.send_in_bursts(0..N, &received));

            let mut batch = RecvBatch::default();
            let mut count = 0;
            while count < N {
                for packet in next_events(&socket, &mut batch).filter_map(Event::packet) {
                    let worker = usize::try_from(count).unwrap() % WORKERS;
                    workers[worker].send(packet.into()).unwrap();
                    count += 1;
                }
                received.store(count, Ordering::SeqCst);
            }
        });
        socket.sync().unwrap();
        assert!(
            is_silent(&socket, &mut RecvBatch::default()),
            "a verdict was refused"
        );
        let stats = socket.stats();
        assert_eq!((stats.packets, stats.missing_packets), (N.into(), 0));
        if !is_rootless() {
            let queue = QueueStats::read(QUEUE).unwrap().unwrap();
            assert_eq!(queue.waiting, 0);
        }
        let accepted = usize::try_from(accepted.into_inner()).unwrap();
        assert_eq!(lab.drain(), accepted);
    });
}

#[test]
fn a_sender_of_a_closed_socket_is_unbound() {
    isolated(|| {
        let lab = Lab::new();
        for close in [true, false] {
            let socket = Socket::open().unwrap();
            let queue = socket.bind(QUEUE).unwrap();
            lab.send(b"dropped with its queue");
            let key = next_packet(&socket, &mut RecvBatch::default()).key();
            let sender = socket.verdict_sender();
            let mut verdicts = SendBatch::new();
            verdicts.push(key, Verdict::Accept).unwrap();
            if close {
                socket.close().unwrap();
            } else {
                drop(socket);
            }
            let is_unbound =
                |result: nfqnl::Result<()>| matches!(result, Err(Error::Unbound { .. }));
            assert!(is_unbound(sender.set_verdict(key, Verdict::Accept)));
            assert!(is_unbound(sender.set_verdict_up_to(key, Verdict::Accept)));
            sender.clone().send(&mut verdicts).unwrap();
            assert!(verdicts.is_empty(), "late verdicts are dropped");
            sender.send(&mut verdicts).expect("nothing to send");
            drop(queue);
            assert!(lab.v4.is_silent());
        }
    });
}

/// If the CPU is busy with something urgent, a thread in `recv` leaves packets in the socket
#[test]
fn a_thread_that_is_not_scheduled_delays_no_call() {
    isolated(|| {
        let _watchdog = Watchdog::new(Duration::from_secs(60));
        let lab = Lab::new();
        call_while_a_thread_is_held(&lab, &Socket::open().unwrap());
        // A handle's program may itself read the answers, so the library cannot rely on an empty
        // socket.
        call_while_a_thread_is_held(&lab, nfqnl::open().unwrap().socket());
    });
}

fn call_while_a_thread_is_held(lab: &Lab, socket: &Socket) {
    /// Much longer than any call takes; the thread is held until the call has returned
    const AT_ONCE: Duration = Duration::from_millis(700);
    let queue = socket.bind(QUEUE).unwrap();
    let is_over = AtomicBool::new(false);
    let received = AtomicU32::new(0);
    let answer = |events: nfqnl::Events<'_>| {
        for packet in events.filter_map(Event::packet) {
            socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
            received.fetch_add(1, Ordering::SeqCst);
        }
    };
    let (send, thread) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            send.send(thread_id().unwrap()).unwrap();
            let mut batch = RecvBatch::default();
            while !is_over.load(Ordering::SeqCst) {
                answer(socket.recv(&mut batch).unwrap());
            }
        });
        let thread = thread.recv().unwrap();
        let mut batch = RecvBatch::default();
        let mut sent = 0;
        for call in 0..10 {
            wait_until_asleep(thread);
            let held = Held::new(thread).unwrap();
            lab.send_numbered(sent..sent + 3);
            sent += 3;
            let begin = Instant::now();
            println!("call {call}"); // to know a call without an end
            match call % 5 {
                0 => answer(socket.try_recv(&mut batch).unwrap()),
                1 => {
                    let timeout = Duration::from_millis(10);
                    answer(socket.recv_timeout(&mut batch, timeout).unwrap());
                }
                2 => queue.set_maxlen(3000 + call).unwrap(),
                3 => socket.sync().unwrap(),
                _ => socket.bind(QUEUE + 1).unwrap().destroy().unwrap(),
            }
            let took = begin.elapsed();
            assert!(took < AT_ONCE, "call {call} took {took:?}");
            drop(held);
            let end = Instant::now() + TIMEOUT;
            while received.load(Ordering::SeqCst) < sent {
                answer(socket.try_recv(&mut batch).unwrap());
                assert!(Instant::now() < end, "packets are missing");
            }
        }
        is_over.store(true, Ordering::SeqCst);
        socket.waker().wake_all();
        assert_eq!(lab.v4.drain(), usize::try_from(sent).unwrap());
    });
    let stats = socket.stats();
    assert_eq!((stats.missing_packets, stats.refused_verdicts), (0, 0));
    queue.destroy().unwrap();
}

/// Until this call only the held thread has used the socket
#[test]
fn the_first_call_of_a_thread_is_not_delayed() {
    isolated(|| {
        let _watchdog = Watchdog::new(Duration::from_secs(60));
        let lab = Lab::new();
        for call in 0..5 {
            let (give, receiver) = mpsc::channel();
            let is_over = AtomicBool::new(false);
            let is_over = &is_over;
            thread::scope(|scope| {
                scope.spawn(move || {
                    let socket = Arc::new(Socket::open().unwrap());
                    let queue = socket.bind(QUEUE).unwrap();
                    let id = thread_id().unwrap();
                    give.send((socket.clone(), queue, id)).unwrap();
                    let mut batch = RecvBatch::default();
                    while !is_over.load(Ordering::SeqCst) {
                        for event in socket.recv(&mut batch).unwrap() {
                            let packet = event.packet().expect("only packets were sent");
                            socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
                        }
                    }
                });
                let (socket, queue, id) = receiver.recv().unwrap();
                wait_until_asleep(id);
                let held = Held::new(id).unwrap();
                lab.send_numbered(0..1);
                println!("call {call}"); // to know a call without an end
                let mut batch = RecvBatch::default();
                let begin = Instant::now();
                let timeout = Duration::from_millis(10);
                match call {
                    0 => drop(socket.try_recv(&mut batch).unwrap()),
                    1 => drop(socket.recv_timeout(&mut batch, timeout).unwrap()),
                    2 => queue.set_maxlen(1000).unwrap(),
                    3 => socket.sync().unwrap(),
                    _ => socket.bind(QUEUE + 1).unwrap().destroy().unwrap(),
                }
                let took = begin.elapsed();
                assert!(took < Duration::from_secs(1), "call {call}: {took:?}");
                drop(held);
                for packet in batch.events().filter_map(Event::packet) {
                    socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
                }
                is_over.store(true, Ordering::SeqCst);
                // The thread may be on its way into `recv`.
                while Arc::strong_count(&socket) > 1 {
                    socket.waker().wake();
                    thread::sleep(Duration::from_millis(1));
                }
                lab.expect_numbered(0..1);
            });
        }
    });
}

/// The child has a copy of the state "a thread receives", but not the thread
#[test]
fn a_forked_child_waits_for_no_thread() {
    isolated(|| {
        let _watchdog = Watchdog::new(Duration::from_secs(60));
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let (send, threads) = mpsc::channel();
        let (mut parent, mut child) = UnixStream::pair().unwrap();
        let serve = || {
            let mut batch = RecvBatch::default();
            let begin = Instant::now();
            assert!(socket.try_recv(&mut batch).unwrap().next().is_none());
            assert!(begin.elapsed() < Duration::from_secs(1));
            let (begin, timeout) = (Instant::now(), Duration::from_millis(200));
            let mut events = socket.recv_timeout(&mut batch, timeout).unwrap();
            assert!(events.next().is_none());
            let took = begin.elapsed();
            assert!((timeout..TIMEOUT).contains(&took), "{took:?}");

            // From here on the parent does not receive, and the child serves the queue.
            child.write_all(b"1").unwrap();
            child.read_exact(&mut [0]).unwrap();
            for call in 0..4 {
                lab.send_numbered(call..call + 1);
                let mut events = match call {
                    0 => socket.try_recv(&mut batch).unwrap(),
                    1 => socket.recv_timeout(&mut batch, TIMEOUT).unwrap(),
                    2 => socket.recv(&mut batch).unwrap(),
                    _ => {
                        queue.set_maxlen(1000).unwrap();
                        socket.try_recv(&mut batch).unwrap()
                    }
                };
                let packet = events.next().and_then(Event::packet).expect("a packet");
                socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
                lab.expect_numbered([call]);
            }
        };
        thread::scope(|scope| {
            let receivers = [(); 2].map(|()| {
                let (socket, send) = (&socket, send.clone());
                scope.spawn(move || {
                    send.send(thread_id().unwrap()).unwrap();
                    let mut batch = RecvBatch::default();
                    assert_eq!(socket.recv(&mut batch).unwrap().count(), 0);
                })
            });
            for _ in &receivers {
                wait_until_asleep(threads.recv().unwrap());
            }
            let forked = fork(serve).unwrap();
            // The child has made its first calls before anything wakes the threads.
            parent.read_exact(&mut [0]).unwrap();
            while receivers.iter().any(|thread| !thread.is_finished()) {
                socket.waker().wake_all();
                thread::sleep(Duration::from_millis(1));
            }
            parent.write_all(b"1").unwrap();
            assert!(forked.wait().unwrap());
        });
    });
}

/// A packet wakes one thread, not all of them
#[test]
fn many_threads_in_recv_cost_little_cpu_time() {
    isolated(|| {
        const FEW: usize = 4;
        const MANY: usize = 64;
        const ROUNDS: usize = 3;
        let _watchdog = Watchdog::new(Duration::from_secs(120));
        let lab = Lab::new();
        // Other programs can only add to the measured time, so the least of several is closest.
        let mut best = [Duration::MAX; 2];
        for _ in 0..ROUNDS {
            for (best, threads) in best.iter_mut().zip([FEW, MANY]) {
                *best = cpu_time_of_packets(&lab, threads).min(*best);
            }
        }
        let [few, many] = best;
        println!("CPU time with {FEW} threads: {few:?}, with {MANY}: {many:?}");
        assert!(many <= 2 * few, "{many:?} > 2 * {few:?}");
    });
}

/// The CPU time of threads in `recv` for 300 packets, which come one by one
fn cpu_time_of_packets(lab: &Lab, threads: usize) -> Duration {
    const PACKETS: u32 = 300;
    let socket = Socket::open().unwrap();
    let _queue = socket.bind(QUEUE).unwrap();
    let is_over = AtomicBool::new(false);
    let (send, ids) = mpsc::channel();
    thread::scope(|scope| {
        let receivers = Vec::from_iter((0..threads).map(|_| {
            let (socket, is_over, send) = (&socket, &is_over, send.clone());
            scope.spawn(move || {
                send.send(thread_id().unwrap()).unwrap();
                let mut batch = RecvBatch::new(16, 2048);
                while !is_over.load(Ordering::SeqCst) {
                    let events = socket.recv(&mut batch).unwrap();
                    for packet in events.filter_map(Event::packet) {
                        socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
                    }
                }
            })
        }));
        for _ in 0..threads {
            wait_until_asleep(ids.recv().unwrap());
        }
        // The time of all threads except this one, which sends
        let time = || cpu::process_time() - cpu::time();
        let begin = time();
        for number in 0..PACKETS {
            lab.send_numbered(number..number + 1);
            lab.expect_numbered([number]);
            // Long enough for the threads to be back in `recv`
            thread::sleep(Duration::from_micros(200));
        }
        let took = time() - begin;
        is_over.store(true, Ordering::SeqCst);
        while receivers.iter().any(|thread| !thread.is_finished()) {
            socket.waker().wake_all();
            thread::sleep(Duration::from_millis(1));
        }
        took
    })
}

#[test]
fn a_forgotten_packet_gets_its_default_verdict() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let sender = socket.verdict_sender();
        let mut batch = RecvBatch::default();
        lab.send_numbered(0..4);
        let keys = next_keys(&socket, &mut batch, 4);
        let [dropped, answered, panicked, released] =
            [0, 1, 2, 3].map(|index: usize| sender.guard(keys[index], Verdict::Accept));
        drop(dropped);
        answered.set_verdict(Verdict::Drop).unwrap();
        let worker = thread::spawn(move || {
            let _guard = panicked;
            panic!("as intended");
        });
        assert!(worker.join().is_err());
        assert_eq!(queue.waiting(), 1);
        let key = released.release();
        socket.set_verdict(key, Verdict::Drop).unwrap();
        lab.expect_numbered([0, 2]);
        assert!(lab.v4.is_silent());
        let guard = sender.guard(key, Verdict::Accept);
        drop(queue);
        assert!(matches!(
            guard.set_verdict(Verdict::Accept),
            Err(Error::Unbound { .. })
        ));
    });
}

#[test]
fn held_packets_get_their_default_verdict_in_time() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
        let mut pending = Pending::new(Duration::from_millis(50), Verdict::Accept);
        lab.send_numbered(0..10);
        for key in next_keys(&socket, &mut batch, 10) {
            pending.hold(key, Instant::now());
        }
        assert!(pending.take(queue.key(3)));
        socket.set_verdict(queue.key(3), Verdict::Drop).unwrap();
        while !pending.is_empty() {
            pending.expired(Instant::now(), &mut verdicts);
            socket.send(&mut verdicts).unwrap();
            thread::sleep(Duration::from_millis(5));
        }
        lab.expect_numbered((0..2).chain(3..10));
        assert_eq!(queue.waiting(), 0);
    });
}
