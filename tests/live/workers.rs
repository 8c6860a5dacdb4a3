//! A thread and a socket for each queue of a range

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nfqnl::rules::{Queues, Rule, Table};
use nfqnl::{ErrorKind, Event, Hook, Result, SendBatch, Socket, Verdict, WorkerError, Workers};
use nfqnl_testkit::cpu;
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::traffic::{self, TIMEOUT, Udp, V4};

use crate::lab::{PORT, is_free};

const FIRST: u16 = 3;
/// Longer than any datagram needs
const PATIENCE: Duration = Duration::from_millis(500);

fn accept(event: Event<'_>, verdicts: &mut SendBatch) -> Result<()> {
    match event {
        Event::Packet(packet) => verdicts.push(packet.key(), Verdict::Accept),
        other => panic!("{other}"),
    }
}

/// Queues datagrams to [`PORT`] + n in queue [`FIRST`] + n
fn sockets<const N: usize>(table: &Table) -> [Udp; N] {
    let chain = table.chain("c", Hook::OUTPUT).unwrap();
    let mut nums = 0..;
    [(); N].map(|()| {
        let n = nums.next().unwrap();
        let rule = Rule::new().udp_dport(PORT + n);
        let queue = Queues::new(FIRST + n).bypass();
        chain.add(&rule.queue(queue)).unwrap();
        Udp::bind(V4, PORT + n).unwrap()
    })
}

fn are_free(workers: std::ops::RangeInclusive<u16>) -> bool {
    workers.into_iter().all(is_free)
}

#[test]
fn each_queue_has_its_own_worker() {
    isolated(|| {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let workers = Workers::builder(FIRST, Verdict::Drop)
            .count(3)
            .start(|index| {
                let seen = Arc::clone(&seen);
                move |event: Event<'_>, verdicts: &mut SendBatch| {
                    if let Event::Packet(packet) = &event {
                        let thread = thread::current().name().map(str::to_owned);
                        seen.lock()
                            .unwrap()
                            .push((index, packet.queue(), thread.unwrap()));
                    }
                    accept(event, verdicts)
                }
            });
        let workers = workers.unwrap();
        assert_eq!(workers.queues(), 3..=5);
        assert!(!workers.queues().into_iter().any(is_free));
        let queue = workers.queue(FIRST + 1).unwrap();
        queue.set_maxlen(100).unwrap();
        assert!(workers.queue(FIRST + 3).is_none());
        let table = Table::new("t").unwrap();
        for udp in &sockets::<3>(&table) {
            udp.send(b"a datagram", udp.address()).unwrap();
            assert!(udp.recv().is_some());
        }
        let expected = [(0, 3), (1, 4), (2, 5)].map(|(n, q)| (n, q, format!("nfqnl-{q}")));
        assert_eq!(*seen.lock().unwrap(), expected);
        assert_eq!(workers.stats().packets, 3);
        assert!(!workers.wait_timeout(Duration::ZERO));
        drop(workers);
        assert!(are_free(FIRST..=FIRST + 2));

        let taken = Socket::open().unwrap();
        let _queue = taken.bind(FIRST + 1).unwrap();
        let refused = Workers::builder(FIRST, Verdict::Drop)
            .count(3)
            .start(|_| accept);
        let kind = refused.unwrap_err().kind();
        assert!(
            matches!(kind, Some(ErrorKind::QueueInUse { .. })),
            "{kind:?}"
        );
        assert!(is_free(FIRST) && is_free(FIRST + 2));
        let started = || {
            Workers::builder(100, Verdict::Drop)
                .start(|_| accept)
                .unwrap()
        };
        let cpus = cpu::allowed().unwrap();
        let count = thread::available_parallelism().unwrap().get();
        assert_eq!(started().queues().count(), count);
        let on_one = cpu::on(cpus[0], || started().queues());
        assert_eq!(on_one.unwrap(), 100..=100);
    });
}

#[test]
fn a_stop_ends_workers_with_waiting_packets() {
    isolated(|| {
        let (tell, begun) = mpsc::channel();
        let workers = Workers::builder(FIRST, Verdict::Drop).count(8).start(|_| {
            let tell = tell.clone();
            move |event: Event<'_>, verdicts: &mut SendBatch| {
                tell.send(()).unwrap();
                thread::sleep(Duration::from_millis(20));
                accept(event, verdicts)
            }
        });
        let workers = workers.unwrap();
        let table = Table::new("t").unwrap();
        let [udp] = sockets::<1>(&table);
        for _ in 0..50 {
            udp.send(b"slow", udp.address()).unwrap();
        }
        begun.recv_timeout(TIMEOUT).unwrap();
        let begin = Instant::now();
        workers.stop().unwrap();
        let took = begin.elapsed();
        assert!(took < Duration::from_millis(100), "{took:?}");
        assert!(are_free(FIRST..=FIRST + 7));
    });
}

#[test]
fn a_panic_stops_all_and_answers_their_packets() {
    isolated(|| {
        // The first worker handles 10 of 30 packets, the second one of 20.
        for (on_failure, arrived) in [(Verdict::Accept, [30, 20]), (Verdict::Drop, [10, 1])] {
            let is_open = Arc::new(AtomicBool::new(false));
            let workers = Workers::builder(FIRST, on_failure).count(2).start(|index| {
                let (is_open, mut seen) = (Arc::clone(&is_open), 0);
                move |event: Event<'_>, verdicts: &mut SendBatch| {
                    while !is_open.load(SeqCst) {
                        thread::sleep(Duration::from_millis(1));
                    }
                    if index == 1 {
                        thread::sleep(PATIENCE);
                    }
                    seen += 1;
                    assert!(seen <= 10, "as intended");
                    accept(event, verdicts)
                }
            });
            let workers = workers.unwrap();
            let table = Table::new("t").unwrap();
            let udps = sockets::<2>(&table);
            for (udp, count) in udps.iter().zip([30, 20]) {
                for _ in 0..count {
                    udp.send(b"waiting", udp.address()).unwrap();
                }
            }
            is_open.store(true, SeqCst);
            let error = workers.wait().unwrap_err();
            let text = format!("the worker of queue {FIRST} panicked: as intended");
            assert_eq!(error.to_string(), text);
            assert!(matches!(error, WorkerError::Panicked { .. }));
            assert_eq!(udps.map(|udp| udp.drain()), arrived);
            assert!(are_free(FIRST..=FIRST + 1));
        }
    });
}

#[test]
fn an_error_of_one_worker_stops_all() {
    isolated(|| {
        let workers = Workers::builder(FIRST, Verdict::Accept)
            .count(2)
            .start(|_| {
                |event: Event<'_>, verdicts: &mut SendBatch| {
                    let packet = event.packet().unwrap();
                    let too_short = Verdict::Accept.with_payload(&[0x45; 4]);
                    verdicts.push(packet.key(), too_short)
                }
            });
        let workers = workers.unwrap();
        let table = Table::new("t").unwrap();
        let [_, udp] = sockets::<2>(&table);
        udp.send(b"a datagram", udp.address()).unwrap();
        assert!(workers.wait_timeout(TIMEOUT));
        let error = workers.stop().unwrap_err();
        let text = error.to_string();
        let begin = format!(
            "the worker of queue {} failed: verdict on packet 1",
            FIRST + 1
        );
        assert!(text.starts_with(&begin), "{text}");
        assert_eq!(error.queue(), FIRST + 1);
        assert!(matches!(error, WorkerError::Failed { .. }));
        assert!(udp.recv().is_some(), "it gets the default");
    });
}

/// Calls `run` while numbered datagrams are sent to a queue; `run` may close the gate
fn loses_none(run: impl FnOnce(&Mutex<()>)) {
    let table = Table::new("t").unwrap();
    let [udp] = sockets::<1>(&table);
    let (is_over, gate) = (AtomicBool::new(false), Mutex::new(()));
    let (sent, lost) = thread::scope(|scope| {
        let sender = scope.spawn(|| traffic::numbered(&udp, &is_over, &gate, PATIENCE));
        run(&gate);
        is_over.store(true, SeqCst);
        sender.join().unwrap()
    });
    assert!(sent >= 1000, "{sent}");
    assert_eq!(lost, 0);
}

#[test]
fn workers_drain_without_losing_a_packet() {
    isolated(|| {
        loses_none(|gate| {
            // The kernel may drop a packet during a bind: see `Socket::bind_with`.
            let closed = gate.lock().unwrap();
            let seen = Arc::new(AtomicUsize::new(0));
            let workers = Workers::builder(FIRST, Verdict::Drop).count(2).start(|_| {
                let seen = Arc::clone(&seen);
                move |event: Event<'_>, verdicts: &mut SendBatch| {
                    seen.fetch_add(1, SeqCst);
                    accept(event, verdicts)
                }
            });
            let workers = workers.unwrap();
            drop(closed);
            while seen.load(SeqCst) < 1000 {
                thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(workers.drain(TIMEOUT).unwrap(), 0);
        });
    });
}

#[test]
fn pinned_workers_stay_on_their_cpus() {
    isolated(|| {
        let (tell, told) = mpsc::channel();
        let workers = Workers::builder(FIRST, Verdict::Drop)
            .count(2)
            .pin(true)
            .start(|index| {
                let tell = tell.clone();
                move |event: Event<'_>, verdicts: &mut SendBatch| {
                    tell.send((index, cpu::allowed().unwrap())).unwrap();
                    accept(event, verdicts)
                }
            });
        let workers = workers.unwrap();
        let all = cpu::allowed().unwrap();
        let table = Table::new("t").unwrap();
        let chain = table.chain("c", Hook::OUTPUT).unwrap();
        let queues = Queues::range(workers.queues()).fanout();
        chain.add(&Rule::new().udp().queue(queues)).unwrap();
        let udp = Udp::bind(V4, PORT).unwrap();
        for &sender in &all {
            let sent = cpu::on(sender, || udp.send(b"a datagram", udp.address()));
            sent.unwrap().unwrap();
            let (index, cpus) = told.recv_timeout(TIMEOUT).unwrap();
            assert_eq!(index, sender % 2, "CPU {sender} feeds this queue");
            assert!(cpus.contains(&sender) && cpus.iter().all(|cpu| cpu % 2 == index));
        }
        workers.stop().unwrap();
    });
}

/// The first worker panics; the second one would need two seconds
#[test]
fn a_panic_in_a_drain_stops_all() {
    isolated(|| {
        let is_open = Arc::new(AtomicBool::new(false));
        let workers = Workers::builder(FIRST, Verdict::Accept)
            .count(2)
            .start(|index| {
                let (is_open, mut seen) = (Arc::clone(&is_open), 0);
                move |event: Event<'_>, verdicts: &mut SendBatch| {
                    while !is_open.load(SeqCst) {
                        thread::sleep(Duration::from_millis(1));
                    }
                    thread::sleep(Duration::from_millis(20));
                    seen += 1;
                    assert!(index == 1 || seen <= 5, "as intended");
                    accept(event, verdicts)
                }
            });
        let workers = workers.unwrap();
        let table = Table::new("t").unwrap();
        let udps = sockets::<2>(&table);
        for udp in &udps {
            for _ in 0..100 {
                udp.send(b"waiting", udp.address()).unwrap();
            }
        }
        is_open.store(true, SeqCst);
        let begin = Instant::now();
        let error = workers.drain(TIMEOUT).unwrap_err();
        assert!(matches!(error, WorkerError::Panicked { .. }));
        let took = begin.elapsed();
        assert!(took < Duration::from_millis(1500), "{took:?}");
        assert_eq!(udps.map(|udp| udp.drain()), [100, 100]);
    });
}

/// Both panic, the first worker last
#[test]
fn the_first_failure_is_returned() {
    isolated(|| {
        let is_open = Arc::new(AtomicBool::new(false));
        let workers = Workers::builder(FIRST, Verdict::Drop)
            .count(2)
            .start(|index| {
                let is_open = Arc::clone(&is_open);
                move |_: Event<'_>, _: &mut SendBatch| {
                    while index == 0 && !is_open.load(SeqCst) {
                        thread::sleep(Duration::from_millis(1));
                    }
                    panic!("worker {index}")
                }
            });
        let workers = workers.unwrap();
        let table = Table::new("t").unwrap();
        assert!(!workers.wait_timeout(Duration::from_millis(1)));
        let udps = sockets::<2>(&table);
        udps[0].send(b"a datagram", udps[0].address()).unwrap();
        while workers.stats().packets == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        udps[1].send(b"a datagram", udps[1].address()).unwrap();
        assert!(workers.wait_timeout(TIMEOUT));
        is_open.store(true, SeqCst);
        let error = workers.wait().unwrap_err();
        assert_eq!(error.queue(), FIRST + 1, "{error}");
    });
}

#[test]
fn a_drain_ends_with_the_default() {
    isolated(|| {
        for (default, arrived) in [(Verdict::Accept, 100), (Verdict::Drop, 0)] {
            let is_open = Arc::new(AtomicBool::new(false));
            let workers = Workers::builder(FIRST, default).count(1).start(|_| {
                let is_open = Arc::clone(&is_open);
                move |event: Event<'_>, verdicts: &mut SendBatch| {
                    while !is_open.load(SeqCst) {
                        thread::sleep(Duration::from_millis(1));
                    }
                    thread::sleep(Duration::from_millis(20));
                    verdicts.push(event.packet().unwrap().key(), default)
                }
            });
            let workers = workers.unwrap();
            let table = Table::new("t").unwrap();
            let [udp] = sockets::<1>(&table);
            for _ in 0..100 {
                udp.send(b"waiting", udp.address()).unwrap();
            }
            assert_eq!(workers.sockets().len(), 1);
            is_open.store(true, SeqCst);
            let undecided = workers.drain(Duration::from_millis(100)).unwrap();
            assert!((1..100).contains(&undecided), "{undecided}");
            assert_eq!(udp.drain(), arrived);
            assert!(is_free(FIRST));
        }
    });
}

/// New packets pass by until the queue is unbound
#[test]
fn a_panic_under_load_loses_no_packet() {
    isolated(|| {
        loses_none(|gate| {
            for _ in 0..20 {
                // The kernel may drop a packet during a bind: see `Socket::bind_with`.
                let closed = gate.lock().unwrap();
                let workers = Workers::builder(FIRST, Verdict::Accept)
                    .count(1)
                    .start(|_| {
                        let mut seen = 0;
                        move |event: Event<'_>, verdicts: &mut SendBatch| {
                            seen += 1;
                            assert!(seen <= 50, "as intended");
                            accept(event, verdicts)
                        }
                    });
                let workers = workers.unwrap();
                drop(closed);
                assert!(workers.wait().is_err());
            }
        });
    });
}

/// A slow function fills the buffer, and the kernel has no room for the answer to the unbind
#[test]
fn a_stop_with_a_full_buffer_succeeds() {
    isolated(|| {
        let (tell, begun) = mpsc::channel();
        let workers = Workers::builder(FIRST, Verdict::Drop)
            .count(1)
            .socket(Socket::builder().recv_buffer(1 << 14));
        let workers = workers.start(|_| {
            let tell = tell.clone();
            move |_: Event<'_>, _: &mut SendBatch| {
                let _ = tell.send(());
                thread::sleep(Duration::from_millis(30));
                Ok(())
            }
        });
        let workers = workers.unwrap();
        let table = Table::new("t").unwrap();
        let [udp] = sockets::<1>(&table);
        for _ in 0..500 {
            udp.send(b"waiting", udp.address()).unwrap();
        }
        begun.recv_timeout(TIMEOUT).unwrap();
        workers.stop().unwrap();
        assert!(is_free(FIRST));
    });
}

#[test]
fn a_decided_packet_does_not_wait_for_others() {
    isolated(|| {
        let is_open = Arc::new(AtomicBool::new(false));
        let workers = Workers::builder(FIRST, Verdict::Drop).count(1).start(|_| {
            let is_open = Arc::clone(&is_open);
            move |event: Event<'_>, verdicts: &mut SendBatch| {
                while !is_open.load(SeqCst) {
                    thread::sleep(Duration::from_millis(1));
                }
                thread::sleep(Duration::from_millis(50));
                accept(event, verdicts)
            }
        });
        let workers = workers.unwrap();
        let table = Table::new("t").unwrap();
        let [udp] = sockets::<1>(&table);
        for _ in 0..20 {
            udp.send(b"waiting", udp.address()).unwrap();
        }
        let begin = Instant::now();
        is_open.store(true, SeqCst);
        assert!(udp.recv().is_some());
        let took = begin.elapsed();
        assert!(took < Duration::from_millis(500), "{took:?}");
        workers.stop().unwrap();
    });
}
