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
        let table = Table::new("t").unwrap();
        for udp in &sockets::<3>(&table) {
            udp.send(b"a datagram", udp.address()).unwrap();
            assert!(udp.recv().is_some());
        }
        let expected = [(0, 3), (1, 4), (2, 5)].map(|(n, q)| (n, q, format!("nfqnl-{q}")));
        assert_eq!(*seen.lock().unwrap(), expected);
        assert_eq!(workers.stats().packets, 3);
        assert!(!workers.have_failed());
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
        let default = Workers::builder(100, Verdict::Drop)
            .start(|_| accept)
            .unwrap();
        let cpus = thread::available_parallelism().unwrap().get();
        assert_eq!(default.queues().count(), cpus);
    });
}

#[test]
fn a_stop_ends_workers_amid_their_packets() {
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
        assert!(
            begin.elapsed() < Duration::from_millis(100),
            "{:?}",
            begin.elapsed()
        );
        assert!(are_free(FIRST..=FIRST + 7));
    });
}

#[test]
fn a_panic_stops_all_and_answers_its_packets() {
    isolated(|| {
        for (on_panic, arrived) in [(Verdict::Accept, 30), (Verdict::Drop, 10)] {
            let is_open = Arc::new(AtomicBool::new(false));
            let workers = Workers::builder(FIRST, on_panic).count(2).start(|_| {
                let (is_open, mut seen) = (Arc::clone(&is_open), 0);
                move |event: Event<'_>, verdicts: &mut SendBatch| {
                    while !is_open.load(SeqCst) {
                        thread::sleep(Duration::from_millis(1));
                    }
                    seen += 1;
                    assert!(seen <= 10, "as intended");
                    accept(event, verdicts)
                }
            });
            let workers = workers.unwrap();
            let table = Table::new("t").unwrap();
            let [udp, _] = sockets::<2>(&table);
            for _ in 0..30 {
                udp.send(b"waiting", udp.address()).unwrap();
            }
            is_open.store(true, SeqCst);
            let error = workers.wait().unwrap_err();
            let text = format!("the worker of queue {FIRST} panicked: as intended");
            assert_eq!(error.to_string(), text);
            assert!(matches!(error, WorkerError::Panicked { .. }));
            assert_eq!(udp.drain(), arrived);
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
        let begin = Instant::now();
        while !workers.have_failed() {
            assert!(begin.elapsed() < TIMEOUT);
            thread::sleep(Duration::from_millis(1));
        }
        let error = workers.stop().unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("the worker of queue {} failed", FIRST + 1)
        );
        assert!(matches!(error, WorkerError::Failed { .. }));
        assert!(udp.recv().is_some(), "it gets the default");
    });
}

#[test]
fn workers_drain_without_losing_a_packet() {
    isolated(|| {
        let table = Table::new("t").unwrap();
        let [udp, _] = sockets::<2>(&table);
        let (is_over, gate) = (AtomicBool::new(false), Mutex::new(()));
        let seen = Arc::new(AtomicUsize::new(0));
        let (sent, lost) = thread::scope(|scope| {
            // The kernel may drop a packet during a bind: see `Socket::bind_with`.
            let closed = gate.lock().unwrap();
            let sender = scope.spawn(|| traffic::numbered(&udp, &is_over, &gate, PATIENCE));
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
            is_over.store(true, SeqCst);
            sender.join().unwrap()
        });
        assert!(sent >= 1000);
        assert_eq!(lost, 0);
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

/// The panic comes amid the drain
#[test]
fn a_panic_in_a_drain_answers_its_packets() {
    isolated(|| {
        let (tell, begun) = mpsc::channel();
        let workers = Workers::builder(FIRST, Verdict::Accept)
            .count(1)
            .start(|_| {
                let (tell, mut seen) = (tell.clone(), 0);
                move |event: Event<'_>, verdicts: &mut SendBatch| {
                    let _ = tell.send(());
                    thread::sleep(Duration::from_millis(5));
                    seen += 1;
                    assert!(seen <= 20, "as intended");
                    accept(event, verdicts)
                }
            });
        let workers = workers.unwrap();
        let table = Table::new("t").unwrap();
        let [udp] = sockets::<1>(&table);
        for _ in 0..50 {
            udp.send(b"waiting", udp.address()).unwrap();
        }
        begun.recv_timeout(TIMEOUT).unwrap();
        let error = workers.drain(TIMEOUT).unwrap_err();
        assert!(matches!(error, WorkerError::Panicked { .. }));
        assert_eq!(udp.drain(), 50);
    });
}

/// A slow function, a small receive buffer, and packets that keep coming
#[test]
fn a_panic_under_load_loses_only_overruns() {
    isolated(|| {
        let socket = Socket::builder().recv_buffer(8192);
        let workers = Workers::builder(FIRST, Verdict::Accept)
            .count(1)
            .socket(socket);
        let workers = workers.start(|_| {
            |_: Event<'_>, _: &mut SendBatch| {
                thread::sleep(Duration::from_millis(20));
                panic!("as intended")
            }
        });
        let workers = workers.unwrap();
        let table = Table::new("t").unwrap();
        let [udp] = sockets::<1>(&table);
        for _ in 0..50 {
            udp.send(b"waiting", udp.address()).unwrap();
        }
        let sockets = workers.stats();
        assert!(workers.wait().is_err());
        assert_eq!(sockets.refused_verdicts, 0);
        let arrived = udp.drain();
        assert!(arrived > 0);
    });
}
