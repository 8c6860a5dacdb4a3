//! Wakers: they end receive calls from other threads and from signal handlers

use std::fs::File;
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nfqnl::{Error, Event, RecvBatch, Socket, Verdict, Waker};
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::process::without_sending;
use nfqnl_testkit::signal;
use nfqnl_testkit::trace::thread_id;
use nfqnl_testkit::traffic::TIMEOUT;

use crate::lab::{
    Lab, QUEUE, WHOLE_PACKETS, Watchdog, is_readable, is_silent, next_packet,
    steal_past_the_library, udp_payload, wait_until_asleep,
};

const THREADS: usize = 8;
/// The time of a wait without a wake
const SHORT: Duration = Duration::from_millis(50);

/// Fails if a receive call returns early, or with an event
#[track_caller]
fn expect_timeout(socket: &Socket, batch: &mut RecvBatch) {
    let begin = Instant::now();
    let mut events = socket.recv_timeout(batch, SHORT).unwrap();
    assert!(events.next().is_none());
    assert!(begin.elapsed() >= SHORT, "a wake is left");
}

/// Waits until `count` has this value; fails if it gets higher within a moment
#[track_caller]
fn expect_count(count: &AtomicUsize, expected: usize) {
    let end = Instant::now() + TIMEOUT;
    while count.load(Ordering::SeqCst) < expected {
        assert!(Instant::now() < end, "no call has ended");
        thread::sleep(Duration::from_millis(1));
    }
    thread::sleep(SHORT);
    assert_eq!(count.load(Ordering::SeqCst), expected);
}

/// Runs a test while eight threads are in `recv`; each counts its return, and ends
fn with_threads_in_recv(socket: &Socket, test: impl FnOnce(&AtomicUsize)) {
    let _watchdog = Watchdog::new(Duration::from_secs(60));
    let returned = AtomicUsize::new(0);
    let (send, ids) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..THREADS {
            let (returned, send) = (&returned, send.clone());
            scope.spawn(move || {
                send.send(thread_id().unwrap()).unwrap();
                let mut batch = RecvBatch::new(1, 4096);
                let mut events = socket.recv(&mut batch).unwrap();
                assert!(events.next().is_none());
                returned.fetch_add(1, Ordering::SeqCst);
            });
        }
        for _ in 0..THREADS {
            wait_until_asleep(ids.recv().unwrap());
        }
        test(&returned);
    });
}

#[test]
fn a_wake_ends_one_recv() {
    isolated(|| {
        let socket = Socket::open().unwrap();
        let waker = socket.waker();
        with_threads_in_recv(&socket, |returned| {
            for number in 1..=THREADS {
                waker.clone().wake();
                expect_count(returned, number);
            }
        });
        expect_timeout(&socket, &mut RecvBatch::default());
    });
}

/// Wakes also end loops before their call of `recv`, in any number of threads
#[test]
fn wake_all_reaches_loops_outside_recv() {
    isolated(|| {
        let _lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let waker = socket.waker();
        let mut batches = [(); 3].map(|()| RecvBatch::default());
        for _ in 0..3 {
            waker.wake_all();
            for batch in &mut batches {
                assert!(socket.recv(batch).unwrap().next().is_none());
            }
            for batch in &mut batches {
                let begin = Instant::now();
                let wait = Duration::from_millis(20);
                assert!(socket.recv_timeout(batch, wait).unwrap().next().is_none());
                assert!(
                    begin.elapsed() >= wait,
                    "a loop ends once for each wake_all"
                );
            }
        }
    });
}

#[test]
fn wake_all_ends_every_recv() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let waker = socket.waker();
        for _ in 0..3 {
            with_threads_in_recv(&socket, |returned| {
                waker.wake_all();
                expect_count(returned, THREADS);
            });
        }
        lab.send(b"received as ever");
        let mut batch = RecvBatch::default();
        let packet = next_packet(&socket, &mut batch);
        assert_eq!(udp_payload(&packet), b"received as ever");
    });
}

/// Many wakes before a call end only one call
#[test]
fn a_wake_is_kept_for_the_next_recv() {
    isolated(|| {
        let _watchdog = Watchdog::new(Duration::from_secs(60));
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let waker = socket.waker();
        let mut batch = RecvBatch::default();
        for wakes in [1, 1, 1000] {
            for _ in 0..wakes {
                waker.wake();
            }
            let mut events = socket.recv(&mut batch).unwrap();
            assert!(events.next().is_none());
            expect_timeout(&socket, &mut batch);
            assert!(is_silent(&socket, &mut batch));
        }
        waker.wake_all();
        assert_eq!(socket.recv(&mut batch).unwrap().count(), 0);
        expect_timeout(&socket, &mut batch);

        // A packet is not lost behind a wake.
        waker.wake();
        lab.send(b"there");
        assert_eq!(udp_payload(&next_packet(&socket, &mut batch)), b"there");
    });
}

#[test]
fn wakes_do_not_pile_up() {
    isolated(|| {
        let socket = Socket::open().unwrap();
        let waker = socket.waker();
        for _ in 0..1000 {
            waker.wake();
            waker.wake_all();
        }
        let datagrams = std::iter::from_fn(|| steal_past_the_library(&socket).then_some(()));
        assert!(datagrams.count() <= 1);
    });
}

#[test]
fn a_wake_ends_every_kind_of_receive() {
    isolated(|| {
        let _watchdog = Watchdog::new(Duration::from_secs(60));
        let handle = nfqnl::open().unwrap();
        let _queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, |_| {})
            .unwrap();
        let waker = handle.socket().waker();
        let long = 100 * TIMEOUT;
        let calls: [&(dyn Fn(&mut RecvBatch) -> usize + Sync); 4] = [
            &|batch| handle.socket().recv(batch).unwrap().count(),
            &|batch| handle.socket().recv_timeout(batch, long).unwrap().count(),
            &|batch| handle.run_once(batch).unwrap(),
            &|batch| handle.run_timeout(batch, long).unwrap(),
        ];
        for call in calls {
            for is_asleep in [true, false] {
                if !is_asleep {
                    waker.wake();
                }
                let (send, id) = mpsc::channel();
                thread::scope(|scope| {
                    let receiver = scope.spawn(|| {
                        send.send(thread_id().unwrap()).unwrap();
                        call(&mut RecvBatch::new(1, 4096))
                    });
                    if is_asleep {
                        wait_until_asleep(id.recv().unwrap());
                        waker.wake();
                    }
                    assert_eq!(receiver.join().unwrap(), 0);
                });
            }
        }
    });
}

/// Another socket has the number of the descriptor by then
#[test]
fn a_waker_of_a_closed_socket_does_nothing() {
    isolated(|| {
        for close in [true, false] {
            let socket = Socket::open().unwrap();
            let wakers = [socket.waker(), socket.waker()];
            if close {
                socket.close().unwrap();
            } else {
                drop(socket);
            }
            let next = Socket::open().unwrap();
            for waker in &wakers {
                waker.wake();
                waker.wake_all();
            }
            assert!(!is_readable(&next));
            expect_timeout(&next, &mut RecvBatch::default());
        }
    });
}

/// While the socket is dropped in another thread
#[test]
fn a_waker_may_outlive_its_socket() {
    isolated(|| {
        for _ in 0..200 {
            let socket = Socket::open().unwrap();
            let waker = socket.waker();
            let is_over = AtomicBool::new(false);
            thread::scope(|scope| {
                scope.spawn(|| {
                    while !is_over.load(Ordering::SeqCst) {
                        waker.wake();
                    }
                });
                drop(socket);
                let next = Socket::open().unwrap();
                assert!(!is_readable(&next));
                is_over.store(true, Ordering::SeqCst);
            });
        }
    });
}

/// However the wakes meet the receiver: before its call, on its way into it, or asleep
#[test]
fn no_wake_is_lost() {
    isolated(|| {
        const N: u32 = 20_000;
        let _watchdog = Watchdog::new(Duration::from_secs(120));
        let socket = Socket::open().unwrap();
        let waker = socket.waker();
        let returned = AtomicU32::new(0);
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut batch = RecvBatch::new(1, 4096);
                while returned.load(Ordering::SeqCst) < N {
                    assert_eq!(socket.recv(&mut batch).unwrap().count(), 0);
                    returned.fetch_add(1, Ordering::SeqCst);
                }
            });
            let mut dice = crate::lab::Dice(5);
            loop {
                let before = returned.load(Ordering::SeqCst);
                if before >= N {
                    break;
                }
                waker.wake();
                while returned.load(Ordering::SeqCst) == before {
                    std::hint::spin_loop();
                }
                for _ in 0..dice.roll(200) {
                    std::hint::spin_loop();
                }
            }
        });
    });
}

/// The kernel drops the wake message; without overrun reports it does not report the drop
#[test]
fn a_wake_in_an_overrun_stops_no_later_one() {
    isolated(|| {
        let _watchdog = Watchdog::new(Duration::from_secs(60));
        let lab = Lab::new();
        for report in [true, false] {
            let builder = Socket::builder().recv_buffer(1 << 14);
            let socket = builder.report_overruns(report).open().unwrap();
            let _queue = socket.bind(QUEUE).unwrap();
            let waker = socket.waker();
            lab.send_numbered(0..200);
            waker.wake();
            // With one slot no call finds the socket empty.
            let mut batch = RecvBatch::new(1, 4096);
            while is_readable(&socket) {
                for event in socket.recv(&mut batch).unwrap() {
                    assert!(matches!(event, Event::Packet(_) | Event::Overrun));
                }
            }
            for _ in 0..2 {
                let (send, id) = mpsc::channel();
                thread::scope(|scope| {
                    let receiver = scope.spawn(|| {
                        send.send(thread_id().unwrap()).unwrap();
                        socket.recv(&mut batch).unwrap().count()
                    });
                    wait_until_asleep(id.recv().unwrap());
                    waker.wake();
                    assert_eq!(receiver.join().unwrap(), 0);
                });
            }
        }
    });
}

/// Another thread may read the wake message
#[test]
fn other_calls_do_not_take_a_wake() {
    isolated(|| {
        const N: u32 = 2000;
        let _watchdog = Watchdog::new(Duration::from_secs(120));
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let waker = socket.waker();
        let returned = AtomicU32::new(0);
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            let threads = [true, false].map(|has_timeout| {
                let (socket, returned, is_over) = (&socket, &returned, &is_over);
                scope.spawn(move || {
                    let mut batch = RecvBatch::new(1, 4096);
                    while !is_over.load(Ordering::SeqCst) {
                        let events = match has_timeout {
                            true => socket.recv_timeout(&mut batch, 100 * TIMEOUT).unwrap(),
                            false => socket.recv(&mut batch).unwrap(),
                        };
                        assert_eq!(events.count(), 0);
                        returned.fetch_add(1, Ordering::SeqCst);
                    }
                })
            });
            let mut batch = RecvBatch::new(1, 4096);
            for round in 0..N {
                let before = returned.load(Ordering::SeqCst);
                waker.wake();
                match round % 3 {
                    0 => assert_eq!(socket.try_recv(&mut batch).unwrap().count(), 0),
                    1 => queue.set_maxlen(1000 + round).unwrap(),
                    _ => socket.sync().unwrap(),
                }
                while returned.load(Ordering::SeqCst) == before {
                    thread::yield_now();
                }
            }
            is_over.store(true, Ordering::SeqCst);
            // A thread on its way into its call needs another wake.
            while threads.iter().any(|thread| !thread.is_finished()) {
                waker.wake_all();
                thread::sleep(Duration::from_millis(1));
            }
        });
    });
}

/// For programs with poll(2): a readable descriptor leads to a call of `try_recv`
#[test]
fn a_wake_makes_the_descriptor_readable() {
    isolated(|| {
        let socket = Socket::open().unwrap();
        let waker = socket.waker();
        let mut batch = RecvBatch::default();
        for _ in 0..3 {
            assert!(!is_readable(&socket));
            waker.wake();
            assert!(is_readable(&socket));
            assert_eq!(socket.try_recv(&mut batch).unwrap().count(), 0);
        }
    });
}

static WAKER: OnceLock<Waker> = OnceLock::new();

/// The handler interrupts the receiving thread anywhere, and the kernel drops wake messages in an
/// overrun
#[test]
fn a_signal_handler_may_wake_in_an_overrun() {
    isolated(|| {
        const ROUNDS: usize = 20;
        let _watchdog = Watchdog::new(Duration::from_secs(120));
        let lab = Lab::new();
        let socket = Socket::builder().recv_buffer(1 << 14).open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        WAKER.set(socket.waker()).unwrap();
        signal::call(|| {
            if let Some(waker) = WAKER.get() {
                waker.wake();
            }
        });
        let mut batch = RecvBatch::default();
        let (mut signals, mut calls) = (0, 0);
        for round in 0..ROUNDS {
            let is_over = AtomicBool::new(false);
            thread::scope(|scope| {
                scope.spawn(|| {
                    let end = Instant::now() + SHORT;
                    while Instant::now() < end {
                        for _ in 0..200 {
                            // Fails if too many packets wait, all charged to this socket.
                            let _ = lab.v4.send(b"flood", lab.v4.address());
                        }
                        let _ = lab.v4.drain_now();
                    }
                    is_over.store(true, Ordering::SeqCst);
                });
                // Every call has to end, by a packet or by a wake, also when the flood has ended.
                let receive = || {
                    let mut after = 0;
                    while after < 5 {
                        for event in socket.recv(&mut batch).unwrap() {
                            match event {
                                Event::Packet(packet) => {
                                    socket.set_verdict(packet.key(), Verdict::Drop).unwrap();
                                }
                                Event::Overrun => {}
                                other => panic!("{other:?}"),
                            }
                        }
                        after += usize::from(is_over.load(Ordering::SeqCst));
                        calls += 1;
                    }
                };
                let interval = Duration::from_micros(100);
                let ((), counted) = if round % 2 == 0 {
                    signal::interrupting_every(interval, receive).unwrap()
                } else {
                    // The signals interrupt this thread: only the wakes end the other one's calls.
                    let receiver = scope.spawn(receive);
                    let wait = || receiver.join().unwrap();
                    signal::interrupting_every(interval, wait).unwrap()
                };
                signals += counted;
            });
            // Its answer may be lost: the flood has filled the buffer.
            let maxlen = 1000 + u32::try_from(round).unwrap();
            match queue.set_maxlen(maxlen) {
                Ok(()) | Err(Error::NoAck { .. }) => {}
                Err(error) => panic!("{error:?}"),
            }
        }
        let stats = socket.stats();
        println!("{signals} signals, {calls} calls, {stats:?}");
        assert!(
            signals > ROUNDS && stats.overruns > 0,
            "{signals} {stats:?}"
        );
        // And then a single wake
        while !is_silent(&socket, &mut batch) {
            batch.events().for_each(drop);
        }
        let _ = socket.recv_timeout(&mut batch, SHORT);
        expect_timeout(&socket, &mut batch);
        WAKER.get().unwrap().wake();
        assert_eq!(socket.recv(&mut batch).unwrap().count(), 0);
    });
}

/// A signal handler must not change `errno`: it may interrupt a failed system call
#[test]
fn a_wake_that_cannot_send_keeps_errno() {
    isolated(|| {
        let errno = u16::try_from(libc::ENOBUFS).unwrap();
        let _watchdog = Watchdog::new(Duration::from_secs(60));
        let socket = Socket::open().unwrap();
        let waker = socket.waker();
        let wake_in_vain = || {
            without_sending(errno, || {
                let error = File::open("/nothing/is/here").unwrap_err();
                waker.wake();
                let errno = io::Error::last_os_error().raw_os_error();
                assert_eq!(errno, error.raw_os_error());
            });
        };
        wake_in_vain();
        // The wake is kept although no message was sent.
        let mut batch = RecvBatch::default();
        assert_eq!(socket.recv(&mut batch).unwrap().count(), 0);
        expect_timeout(&socket, &mut batch);

        // A sleeping thread does not notice, but the next wake ends its call.
        let (send, id) = mpsc::channel();
        thread::scope(|scope| {
            let receiver = scope.spawn(|| {
                send.send(thread_id().unwrap()).unwrap();
                socket.recv(&mut batch).unwrap().count()
            });
            wait_until_asleep(id.recv().unwrap());
            wake_in_vain();
            waker.wake();
            assert_eq!(receiver.join().unwrap(), 0);
        });
    });
}
