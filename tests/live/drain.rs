//! Stopping a queue without losing a packet

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nfqnl::{
    ConfigFlags, Error, Event, PacketKey, QueueConfig, QueueStats, RecvBatch, Result, SendBatch,
    Socket, Verdict,
};
use nfqnl_testkit::netns::{Namespace, is_rootless, isolated};
use nfqnl_testkit::rules::{Hook, Queues, Rule};
use nfqnl_testkit::traffic::{self, TIMEOUT};

use crate::lab::{Lab, PORT, QUEUE, WHOLE_PACKETS, is_free, next_keys, next_packet};

/// Longer than any datagram needs
const PATIENCE: Duration = Duration::from_millis(500);

fn with_bypass() -> Lab {
    let rule = Rule::new().udp_dport(PORT);
    Lab::with(Hook::Output, &rule.queue(Queues::new(QUEUE).bypass()))
}

fn accept(event: Event<'_>, verdicts: &mut SendBatch) -> Result<()> {
    match event {
        Event::Packet(packet) => verdicts.push(packet.key(), Verdict::Accept),
        other => panic!("{other:?}"),
    }
}

/// Binds, filters for some packets, and stops, again and again; returns the number lost
fn lost_in_stops(stops: u32, stop_queue: impl Fn(&Socket, nfqnl::Queue, &mut RecvBatch)) -> usize {
    let lab = with_bypass();
    let socket = Socket::open().unwrap();
    let (is_over, gate) = (AtomicBool::new(false), Mutex::new(()));
    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
    thread::scope(|scope| {
        let traffic = scope.spawn(|| traffic::numbered(&lab.v4, &is_over, &gate, PATIENCE));
        for _ in 0..stops {
            // The kernel may drop a packet during a bind: see `Socket::bind_with`.
            let closed = gate.lock().unwrap();
            let queue = socket.bind(QUEUE).unwrap();
            drop(closed);
            let mut seen = 0;
            while seen < 5 {
                for event in socket.recv_timeout(&mut batch, TIMEOUT).unwrap() {
                    seen += 1;
                    accept(event, &mut verdicts).unwrap();
                }
                socket.send(&mut verdicts).unwrap();
            }
            stop_queue(&socket, queue, &mut batch);
        }
        is_over.store(true, Relaxed);
        let (_sent, lost) = traffic.join().unwrap();
        lost
    })
}

#[test]
fn stops_under_load_lose_no_packet() {
    isolated(|| {
        let lost = lost_in_stops(200, |socket, queue, batch| {
            queue.pass_by().unwrap(); // a drain does this first
            let dropped = QueueStats::read(QUEUE);
            if let Ok(Some(stats)) = dropped {
                assert_eq!((stats.queue_dropped, stats.user_dropped), (0, 0));
            } else {
                assert!(is_rootless(), "{dropped:?}");
            }
            let lost = socket.drain(queue, batch, TIMEOUT, accept).unwrap();
            assert_eq!(lost, 0);
        });
        assert_eq!(lost, 0);
    });
}

#[test]
fn a_destroy_under_load_loses_packets() {
    isolated(|| {
        let lost = lost_in_stops(50, |_, queue, _| queue.destroy().unwrap());
        assert!(lost > 0);
    });
}

#[test]
fn a_drain_hands_out_all_waiting_packets() {
    isolated(|| {
        let lab = with_bypass();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        lab.send_numbered(0..100);
        let mut batch = RecvBatch::default();
        let held = next_keys(&socket, &mut batch, 10);
        assert!(queue.waiting() >= 10, "the batch may have more");
        let mut seen = 0;
        let sender = socket.verdict_sender();
        thread::scope(|scope| {
            // Another thread holds packets, and answers them later.
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(50));
                for key in held {
                    sender.set_verdict(key, Verdict::Accept).unwrap();
                }
            });
            let decide = |event: Event<'_>, verdicts: &mut SendBatch| {
                seen += 1;
                accept(event, verdicts)
            };
            let lost = socket.drain(queue, &mut batch, TIMEOUT, decide).unwrap();
            assert_eq!(lost, 0);
        });
        assert_eq!(seen, 90);
        lab.expect_numbered((10..100).chain(0..10));
        assert!(is_free(QUEUE));
        lab.send_numbered(100..101);
        lab.expect_numbered(100..101);
    });
}

#[test]
fn a_drain_ends_at_its_deadline() {
    isolated(|| {
        let lab = with_bypass();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        lab.send_numbered(0..3);
        let mut batch = RecvBatch::default();
        let begin = Instant::now();
        let timeout = Duration::from_millis(50);
        let lost = socket.drain(queue, &mut batch, timeout, |_, _| Ok(()));
        assert_eq!(lost.unwrap(), 3);
        assert!(begin.elapsed() >= timeout && begin.elapsed() < TIMEOUT);
        assert!(is_free(QUEUE));
        assert!(lab.v4.is_silent());
    });
}

#[test]
fn a_drain_waits_for_a_thread_in_recv() {
    isolated(|| {
        const N: u32 = 40;
        for _ in 0..20 {
            let lab = with_bypass();
            let socket = Socket::open().unwrap();
            let queue = socket.bind(QUEUE).unwrap();
            let waker = socket.waker();
            thread::scope(|scope| {
                scope.spawn(|| {
                    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
                    loop {
                        let mut is_woken = true;
                        for event in socket.recv(&mut batch).unwrap() {
                            is_woken = false;
                            accept(event, &mut verdicts).unwrap();
                        }
                        socket.send(&mut verdicts).unwrap();
                        if is_woken && is_free(QUEUE) {
                            return;
                        }
                    }
                });
                lab.send_numbered(0..N);
                let mut batch = RecvBatch::default();
                let lost = socket.drain(queue, &mut batch, TIMEOUT, accept).unwrap();
                assert_eq!(lost, 0);
                waker.wake_all();
            });
            let mut received: Vec<u32> = (0..N)
                .map(|_| u32::from_be_bytes(lab.recv().unwrap().try_into().unwrap()))
                .collect();
            received.sort_unstable();
            assert!(received.into_iter().eq(0..N));
            lab.delete_rules();
        }
    });
}

#[test]
fn a_handle_drains_by_its_callback() {
    isolated(|| {
        let lab = with_bypass();
        let handle = nfqnl::open().unwrap();
        let (send, ids) = mpsc::channel();
        let queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, move |data| {
                send.send(data.get_packet_id()).unwrap();
                data.set_verdict(Verdict::Accept, None);
            })
            .unwrap();
        lab.send_numbered(0..50);
        let mut batch = RecvBatch::default();
        assert_eq!(handle.drain(queue, &mut batch, TIMEOUT).unwrap(), 0);
        assert!(ids.try_iter().eq(1..=50));
        lab.expect_numbered(0..50);
        assert!(is_free(QUEUE));
    });
}

#[test]
fn new_packets_pass_by_until_it_is_undone() {
    isolated(|| {
        let lab = with_bypass();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        queue.pass_by().unwrap();
        assert_eq!(queue.flags(), ConfigFlags::FAIL_OPEN);
        lab.send_numbered(0..3);
        lab.expect_numbered(0..3);
        queue.set_maxlen(1024).unwrap();
        queue
            .set_flags(ConfigFlags::FAIL_OPEN, ConfigFlags::empty())
            .unwrap();
        lab.send_numbered(3..4);
        let mut batch = RecvBatch::default();
        let key = next_packet(&socket, &mut batch).key();
        assert_eq!(queue.waiting(), 1);
        socket.set_verdict(key, Verdict::Accept).unwrap();
        assert_eq!(queue.waiting(), 0);
        lab.expect_numbered(3..4);
    });
}

/// As merged, as single verdicts, and up to an id
#[test]
fn waiting_packets_are_counted() {
    isolated(|| {
        for merges in [true, false] {
            let lab = Lab::new();
            let socket = Socket::builder().merge_verdicts(merges).open().unwrap();
            let queue = socket.bind_with(QUEUE, &QueueConfig::new()).unwrap();
            let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
            lab.send_numbered(0..20);
            let keys: Vec<PacketKey> = next_keys(&socket, &mut batch, 20);
            assert_eq!(queue.waiting(), 20);
            socket.set_verdict(keys[3], Verdict::Accept).unwrap();
            assert_eq!(queue.waiting(), 19);
            for &key in &keys[10..15] {
                verdicts.push(key, Verdict::Accept).unwrap();
            }
            assert_eq!(queue.waiting(), 19, "not sent yet");
            socket.send(&mut verdicts).unwrap();
            assert_eq!(queue.waiting(), 14);
            socket
                .set_verdict_up_to(keys[19], nfqnl::PlainVerdict::new(Verdict::Drop))
                .unwrap();
            assert_eq!(queue.waiting(), 0);
            lab.delete_rules();
        }
    });
}

#[test]
fn a_queue_reads_its_counters_from_anywhere() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        lab.send_numbered(0..3);
        let elsewhere = Namespace::new().unwrap();
        for stats in [queue.stats(), elsewhere.run(|| queue.stats())] {
            match stats {
                Ok(stats) => {
                    let stats = stats.expect("it is bound");
                    assert_eq!((stats.queue, stats.waiting), (QUEUE, 3));
                }
                Err(error) => assert!(is_rootless(), "{error}"),
            }
        }
    });
}

/// The kernel drops the answer to a request too
#[test]
fn a_drain_survives_a_full_receive_buffer() {
    isolated(|| {
        let lab = with_bypass();
        let socket = Socket::builder().recv_buffer(1 << 16).open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        lab.send_numbered(0..400);
        let (mut packets, mut overruns) = (0, 0);
        let decide = |event: Event<'_>, verdicts: &mut SendBatch| match event {
            Event::Packet(packet) => {
                packets += 1;
                verdicts.push(packet.key(), Verdict::Accept)
            }
            _ => {
                overruns += 1;
                Ok(())
            }
        };
        let mut batch = RecvBatch::default();
        let lost = socket.drain(queue, &mut batch, TIMEOUT, decide).unwrap();
        assert!((1..400).contains(&packets));
        assert_eq!((lost, overruns, lab.v4.drain()), (0, 1, packets));
    });
}

#[test]
fn a_drains_deadline_holds_within_a_batch() {
    isolated(|| {
        let lab = with_bypass();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        lab.send_numbered(0..100);
        let mut batch = RecvBatch::default();
        let mut seen = 0;
        let begin = Instant::now();
        let decide = |event: Event<'_>, verdicts: &mut SendBatch| {
            thread::sleep(Duration::from_millis(10));
            seen += 1;
            accept(event, verdicts)
        };
        let timeout = Duration::from_millis(50);
        let lost = socket.drain(queue, &mut batch, timeout, decide).unwrap();
        assert!(begin.elapsed() < Duration::from_millis(500));
        assert_eq!(lost + seen, 100);
    });
}

#[test]
fn a_second_verdict_hides_no_waiting_packet() {
    isolated(|| {
        let lab = with_bypass();
        let socket = Socket::builder().merge_verdicts(false).open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        lab.send_numbered(0..2);
        let mut batch = RecvBatch::default();
        let keys = next_keys(&socket, &mut batch, 2);
        for _ in 0..2 {
            socket.set_verdict(keys[0], Verdict::Accept).unwrap();
        }
        assert_eq!((queue.waiting(), socket.stats().waiting), (1, 1));
        let lost = socket.drain(queue, &mut batch, Duration::ZERO, |_, _| Ok(()));
        assert_eq!(lost.unwrap(), 1);
        lab.expect_numbered(0..1);
    });
}

#[test]
fn a_drain_beside_a_busy_queue_ends() {
    isolated(|| {
        let lab = with_bypass();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let other = lab.add_queue(2);
        let _busy = socket.bind(2).unwrap();
        lab.send_numbered(0..3);
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Relaxed) {
                    let _ = other.send(&[1], other.address());
                    other.drain_now().unwrap();
                }
            });
            let begin = Instant::now();
            let mut batch = RecvBatch::default();
            let lost = socket.drain(queue, &mut batch, TIMEOUT, accept).unwrap();
            assert!(begin.elapsed() < TIMEOUT);
            assert_eq!(lost, 0);
            is_over.store(true, Relaxed);
        });
    });
}

#[test]
fn a_queue_of_another_socket_is_not_drained() {
    isolated(|| {
        let [one, other] = [(); 2].map(|()| Socket::open().unwrap());
        let queue = other.bind(QUEUE).unwrap();
        let drained = one.drain(queue, &mut RecvBatch::default(), TIMEOUT, accept);
        assert!(matches!(drained, Err(Error::WrongSocket { .. })));
    });
}
