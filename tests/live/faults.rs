//! What the network, the kernel and other processes do to a consumer: each packet is accepted, dropped by a verdict, or lost
//! and counted

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Barrier, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nfqnl::proto::{BatchVerdict, RequestHeader};
use nfqnl::{
    ConfigFlags, CopyMode, Error, Event, Events, Handle, Operation, PacketKey, Queue, QueueConfig,
    QueueStats, RecvBatch, Refusal, Situation, Verdict, VerdictBatch,
};
use nfqnl_testkit::hosts::Router;
use nfqnl_testkit::ledger::{Ledger, number};
use nfqnl_testkit::netns::{Namespace, is_rootless, isolated};
use nfqnl_testkit::rules::{Family, Hook, QueueOptions, Rule, Table};
use nfqnl_testkit::traffic::{TIMEOUT, Udp, V4};
use nfqnl_testkit::{link, process, signal, socket, user};

use crate::lab::{Dice, Lab, PORT, QUEUE, next_packet, send_past_the_library, udp_payload};

const WHOLE_PACKETS: QueueConfig = QueueConfig::new().copy_mode(CopyMode::PACKET, 0);
/// Holds some 20 packets
const SMALL_BUFFER: usize = 1 << 14;

/// A packet that waits for its verdict, and its number
type Held = (PacketKey, u32);

/// Numbered packets to a socket, and what is known of each
struct Books<'s> {
    socket: &'s Udp,
    ledger: Ledger,
}

/// What was received
#[derive(Debug, Default)]
struct Received {
    packets: Vec<Held>,
    refusals: Vec<Refusal>,
    overruns: u64,
}

impl Received {
    /// Says whether there was anything
    fn add(&mut self, events: Events<'_>) -> bool {
        let mut any = false;
        for event in events {
            any = true;
            match event {
                Event::Packet(packet) => {
                    let number = number(udp_payload(&packet));
                    self.packets.push((packet.key(), number));
                }
                Event::Refused(refusal) => self.refusals.push(refusal),
                Event::Overrun => self.overruns += 1,
                other => panic!("{other:?}"),
            }
        }
        any
    }
}

impl<'s> Books<'s> {
    fn new(socket: &'s Udp) -> Self {
        Self {
            socket,
            ledger: Ledger::new(20_000),
        }
    }

    fn send(&self, packets: u32) {
        let to = self.socket.address();
        let send = |payload: &[u8]| self.socket.send(payload, to).unwrap();
        self.ledger.send(packets, send);
    }

    /// Receives whatever is there
    fn receive(&self, handle: &Handle) -> Received {
        self.receive_until(handle, |_| true)
    }

    /// Receives whatever is there, and waits for it until `is_all`
    #[track_caller]
    fn receive_until(&self, handle: &Handle, is_all: impl Fn(&Received) -> bool) -> Received {
        let (mut batch, mut received) = (RecvBatch::default(), Received::default());
        while !is_all(&received) {
            let events = handle.recv_deadline(&mut batch, Instant::now() + TIMEOUT);
            assert!(
                received.add(events.unwrap()),
                "only {} packets and {} overruns in time",
                received.packets.len(),
                received.overruns
            );
        }
        while received.add(handle.try_recv(&mut batch).unwrap()) {}
        received
    }

    /// Receives so many packets, and nothing else
    #[track_caller]
    fn packets(&self, handle: &Handle, count: usize) -> Vec<Held> {
        let received = self.receive_until(handle, |received| received.packets.len() >= count);
        assert!(received.refusals.is_empty(), "{:?}", received.refusals);
        let packets = received.packets;
        assert_eq!((packets.len(), received.overruns), (count, 0));
        packets
    }

    fn decide(&self, number: u32, verdict: Verdict) {
        match verdict {
            Verdict::Drop => self.ledger.drop(number),
            _ => self.ledger.accept(number),
        }
    }

    /// Answers packets, each with what [`mixed`] says
    fn answer(&self, handle: &Handle, packets: &[Held]) {
        for &(key, number) in packets {
            handle.verdict(key, mixed(number)).unwrap();
            self.decide(number, mixed(number));
        }
    }

    /// Sends packets, which are received and answered
    fn go_on(&self, handle: &Handle) {
        const MORE: u32 = 10;
        self.send(MORE);
        self.answer(handle, &self.packets(handle, 10));
    }

    /// Packets that are lost, with whatever verdicts they have
    fn lose(&self, packets: &[Held]) {
        for &(_, number) in packets {
            self.ledger.lose(number);
        }
    }

    /// Receives the refusals of verdicts on these packets, one for each, and nothing else
    #[track_caller]
    fn expect_refusals(&self, handle: &Handle, packets: &[Held], situation: Situation) {
        let received = self.receive(handle);
        let refused = received.refusals.iter();
        let refused = Vec::from_iter(refused.map(|r| (r.packet(), r.situation())));
        let expected = packets.iter().map(|&(key, _)| (Some(key), situation));
        assert_eq!(refused, Vec::from_iter(expected));
        assert_eq!((received.packets, received.overruns), (vec![], 0));
    }

    #[track_caller]
    fn assert_balanced(&self, lost: u64, passed: u64) {
        self.ledger.assert_balanced(self.socket, lost, passed);
    }
}

/// One in three is dropped
fn mixed(number: u32) -> Verdict {
    if number % 3 == 0 {
        Verdict::Drop
    } else {
        Verdict::Accept
    }
}

/// With failing open, or not
fn fail_open(is_open: bool) -> QueueConfig {
    let flags = if is_open {
        ConfigFlags::FAIL_OPEN
    } else {
        ConfigFlags::empty()
    };
    WHOLE_PACKETS.flags(ConfigFlags::FAIL_OPEN, flags)
}

/// How many packets the kernel dropped, because the queue was full and because the socket was; it tells the machine's root
/// alone
fn kernel_drops() -> Option<(u64, u64)> {
    match QueueStats::read(QUEUE) {
        Err(_) if is_rootless() => None,
        stats => {
            let stats = stats.unwrap().unwrap();
            Some((stats.queue_dropped.into(), stats.user_dropped.into()))
        }
    }
}

/// Fails unless the kernel has dropped so many, if it says
#[track_caller]
fn expect_kernel_drops(full_queue: u64, full_socket: u64) {
    if let Some(drops) = kernel_drops() {
        assert_eq!(drops, (full_queue, full_socket));
    }
}

/// What puts packets to [`PORT`] in the queue
fn queueing_rule() -> Rule {
    Rule::new().udp().dport(PORT).queue(QUEUE)
}

/// Packets are queued, or not, as they leave: by their sender, and not by a softirq that may come later on a busy machine
fn lab() -> Lab {
    Lab::with(Hook::Output, &queueing_rule())
}

#[test]
fn a_flood_beyond_the_receive_buffer() {
    isolated(|| {
        let lab = lab();
        for (reports, is_open) in [(true, false), (true, true), (false, false), (false, true)] {
            let books = Books::new(&lab.v4);
            let builder = Handle::builder().recv_buffer(SMALL_BUFFER);
            let handle = builder.report_overruns(reports).open().unwrap();
            let queue = handle.bind_queue_with(QUEUE, &fail_open(is_open)).unwrap();
            let mut overruns = 0;
            for _ in 0..3 {
                books.send(150);
                let received = books.receive(&handle);
                overruns += received.overruns;
                books.answer(&handle, &received.packets);
                books.ledger.collect(books.socket).unwrap();
            }
            books.go_on(&handle); // and shows the gap before
            let stats = handle.stats();
            let lost = stats.lost_packets;
            assert!(lost > 0, "it all fits the buffer");
            assert_eq!(stats.packets + lost, books.ledger.sent().into());
            assert_eq!(overruns > 0, reports);
            assert_eq!(stats.overruns, overruns);
            if is_open {
                books.assert_balanced(0, lost);
                expect_kernel_drops(0, 0);
            } else {
                books.assert_balanced(lost, 0);
                expect_kernel_drops(0, lost);
            }
            queue.destroy().unwrap();
        }
    });
}

#[test]
fn a_full_queue() {
    isolated(|| {
        const N: u32 = 20;
        let lab = lab();
        for (maxlen, is_open) in [(1, false), (1, true), (7, false), (7, true)] {
            let books = Books::new(&lab.v4);
            let handle = Handle::open().unwrap();
            let config = fail_open(is_open).maxlen(maxlen);
            let queue = handle.bind_queue_with(QUEUE, &config).unwrap();
            let (mut lost, mut passed) = (0, 0);
            for _ in 0..3 {
                books.send(N);
                books.answer(&handle, &books.packets(&handle, maxlen.try_into().unwrap()));
                *(if is_open { &mut passed } else { &mut lost }) += u64::from(N - maxlen);
                books.assert_balanced(lost, passed);
                expect_kernel_drops(lost, 0);
            }
            assert_eq!(handle.stats().lost_packets, 0, "they have no ids");
            queue.destroy().unwrap();
        }
    });
}

/// A consumer that takes longer than packets take to come: its socket is full, or its queue
#[test]
fn a_slow_consumer() {
    isolated(|| {
        const N: u32 = 2000;
        let lab = lab();
        for maxlen in [u32::MAX, 15] {
            let books = Books::new(&lab.v4);
            let handle = Handle::builder().recv_buffer(SMALL_BUFFER).open().unwrap();
            let config = WHOLE_PACKETS.maxlen(maxlen);
            let queue = handle.bind_queue_with(QUEUE, &config).unwrap();
            thread::scope(|scope| {
                let sender = scope.spawn(|| books.send(N));
                let mut batch = RecvBatch::new(4, RecvBatch::DEFAULT_SLOT_LEN);
                let mut due = 0;
                loop {
                    // For a few packets it takes longer than so many take to come.
                    due += 50;
                    while books.ledger.sent() < due && !sender.is_finished() {
                        thread::yield_now();
                    }
                    let (is_last, mut received) = (sender.is_finished(), Received::default());
                    let any = received.add(handle.try_recv(&mut batch).unwrap());
                    books.answer(&handle, &received.packets);
                    books.ledger.collect(books.socket).unwrap();
                    if is_last && !any {
                        break;
                    }
                }
            });
            books.go_on(&handle);
            let stats = handle.stats();
            let full_queue = u64::from(books.ledger.sent()) - stats.packets - stats.lost_packets;
            assert_eq!(full_queue > 0, maxlen == 15);
            assert!(full_queue + stats.lost_packets > 0, "it is not slow");
            books.assert_balanced(full_queue + stats.lost_packets, 0);
            expect_kernel_drops(full_queue, stats.lost_packets);
            queue.destroy().unwrap();
        }
    });
}

#[test]
fn acknowledgements_lost_in_an_overrun() {
    isolated(|| {
        const N: u32 = 150;
        let lab = lab();
        for reports in [true, false] {
            let books = Books::new(&lab.v4);
            let builder = Handle::builder().recv_buffer(SMALL_BUFFER);
            let builder = builder.ack_timeout(TIMEOUT).report_overruns(reports);
            let handle = builder.open().unwrap();
            let queue = handle.bind_queue(QUEUE).unwrap();
            let is_lost = |result: nfqnl::Result<()>, op| match result {
                Err(Error::NoAck { op: of, .. }) => assert_eq!(of, op),
                other => panic!("{other:?}"),
            };
            books.send(N);
            is_lost(queue.set_maxlen(2000), Operation::SetMaxlen(QUEUE));
            books.send(N);
            is_lost(handle.sync(), Operation::Sync);
            books.send(N);
            let other = handle.bind_queue(QUEUE + 1);
            is_lost(other.map(drop), Operation::Bind(QUEUE + 1));
            let other = handle.bind_queue(QUEUE + 1);
            other
                .expect("it was given up, so it is free")
                .destroy()
                .unwrap();

            let received = books.receive(&handle);
            assert_eq!(received.overruns > 0, reports);
            books.answer(&handle, &received.packets);
            books.go_on(&handle);
            let lost = handle.stats().lost_packets;
            books.assert_balanced(lost, 0);

            books.send(N);
            is_lost(queue.destroy(), Operation::Unbind(QUEUE));
            let received = books.receive(&handle);
            assert_eq!(received.packets, []);
            assert_eq!(received.overruns > 0, reports);
            let queue = handle.bind_queue(QUEUE).unwrap();
            books.go_on(&handle);
            books.assert_balanced(lost + u64::from(N), 0);
            queue.destroy().unwrap();
        }
    });
}

#[test]
fn a_consumer_is_killed_and_another_takes_over() {
    isolated(|| {
        for bypass in [false, true] {
            let options = QueueOptions {
                bypass,
                ..QueueOptions::default()
            };
            let rule = queueing_rule().queue_with(QUEUE..=QUEUE, options);
            let lab = Lab::with(Hook::Output, &rule);
            let books = Books::new(&lab.v4);
            let (mut here, mut there) = UnixStream::pair().unwrap();
            let consumer = process::fork(|| {
                let handle = Handle::open().unwrap();
                let _queue = handle.bind_queue(QUEUE).unwrap();
                there.write_all(b"is bound").unwrap();
                let mut batch = RecvBatch::new(1, RecvBatch::DEFAULT_SLOT_LEN);
                for number in 0..15 {
                    let packet = next_packet(&handle, &mut batch);
                    if number < 10 {
                        handle.verdict(packet.key(), Verdict::Accept).unwrap();
                    }
                }
                there.write_all(b"has work").unwrap();
                loop {
                    thread::park();
                }
            })
            .unwrap();
            drop(there); // so that no more is read once the consumer has ended
            let mut word = [0; 8];
            here.read_exact(&mut word).unwrap();
            books.send(20);
            here.read_exact(&mut word).unwrap();
            assert_eq!(&word, b"has work");
            consumer.kill();
            for number in 0..10 {
                books.ledger.accept(number);
            }
            for number in 10..20 {
                books.ledger.lose(number); // in its hands, and in its socket
            }
            books.send(5);

            let handle = Handle::open().unwrap();
            let _queue = handle.bind_queue(QUEUE).unwrap();
            books.go_on(&handle);
            let (lost, passed) = if bypass { (0, 5) } else { (5, 0) };
            books.assert_balanced(lost, passed);
            lab.delete_rules();
        }
    });
}

#[test]
fn a_handle_is_dropped_with_packets_held() {
    isolated(|| {
        let lab = lab();
        let books = Books::new(&lab.v4);
        for lost in [3, 6] {
            let handle = Handle::open().unwrap();
            let queue = handle.bind_queue(QUEUE).unwrap();
            books.send(10);
            let held = books.packets(&handle, 10);
            books.answer(&handle, &held[..5]);
            books.lose(&held[5..]);
            drop(handle);
            books.send(3); // for nobody
            let handle = Handle::open().unwrap();
            let again = handle.bind_queue(QUEUE).unwrap();
            drop(queue);
            books.go_on(&handle);
            books.assert_balanced(lost, 0);
            again.destroy().unwrap();
        }
    });
}

/// While another thread accepts packets of the first binding, a second one begins, whose packets have the same ids
#[test]
fn no_verdict_of_an_ended_binding_hits_a_packet_of_the_next() {
    isolated(|| {
        const N: usize = 20;
        let lab = lab();
        let handle = Handle::open().unwrap();
        for round in 0..40 {
            let at_once = if round % 2 == 0 { 1 } else { N };
            let books = Books::new(&lab.v4);
            let queue = handle.bind_queue(QUEUE).unwrap();
            books.send(20);
            let old = books.packets(&handle, N);
            let start = Barrier::new(2);
            let [has_ended, is_over] = [false; 2].map(AtomicBool::new);
            let (stale, queue, new) = thread::scope(|scope| {
                let stale = scope.spawn(|| {
                    let mut verdicts = VerdictBatch::new();
                    let mut accept = |packets: &[Held]| {
                        for &(key, _) in packets {
                            verdicts.push(key, Verdict::Accept).unwrap();
                        }
                        match handle.send(&mut verdicts) {
                            Ok(()) => false,
                            Err(Error::Stale { .. }) => true,
                            Err(other) => panic!("{other:?}"),
                        }
                    };
                    let mut stale = Vec::new();
                    start.wait();
                    for packets in old.chunks(at_once) {
                        stale.resize(stale.len() + packets.len(), accept(packets));
                    }
                    while !has_ended.load(Ordering::SeqCst) {
                        thread::yield_now();
                    }
                    while !is_over.load(Ordering::SeqCst) {
                        for packets in old.chunks(at_once) {
                            assert!(accept(packets));
                        }
                    }
                    stale
                });
                start.wait();
                queue.destroy().unwrap();
                has_ended.store(true, Ordering::SeqCst);
                let queue = handle.bind_queue(QUEUE).unwrap();
                books.send(20);
                let new = books.receive_until(&handle, |received| received.packets.len() == N);
                is_over.store(true, Ordering::SeqCst);
                (stale.join().unwrap(), queue, new)
            });
            handle.sync().unwrap();
            let rest = books.receive(&handle);
            assert_eq!(rest.packets, []);
            let refusals = new.refusals.iter().chain(&rest.refusals);
            let refused = Vec::from_iter(refusals.map(|refusal| {
                assert_eq!(refusal.situation(), Situation::NotBound, "{refusal}");
                refusal.packet().unwrap()
            }));
            for (&(key, number), is_stale) in old.iter().zip(stale) {
                // A run that was refused names its last packet.
                let is_refused = refused.contains(&key) || at_once == N && !refused.is_empty();
                if is_stale || is_refused {
                    books.ledger.lose(number);
                } else {
                    books.ledger.accept(number);
                }
            }
            assert_eq!(new.packets.len(), N);
            for &(key, number) in &new.packets {
                handle.verdict(key, Verdict::Drop).unwrap();
                books.ledger.drop(number);
            }
            handle.sync().unwrap();
            books.expect_refusals(&handle, &[], Situation::NotBound); // each was there to be dropped
            books.assert_balanced(0, 0);
            queue.destroy().unwrap();
        }
    });
}

#[test]
fn packets_that_the_kernel_drops_while_they_wait_are_told_of_one_by_one() {
    isolated(|| {
        let lab = lab();
        let delete_chain = |name| {
            let table = Table::new(Family::Ip, name).unwrap();
            table.chain("chain", Hook::Forward, 0).unwrap();
            table.delete().unwrap();
        };
        let faults: [&dyn Fn(); 2] = [
            // Any base chain, also one that no packet has to do with
            &|| delete_chain("another"),
            &|| {
                link::down("lo").unwrap();
                link::up("lo").unwrap();
            },
        ];
        let books = Books::new(&lab.v4);
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        for fault in faults {
            books.send(20);
            let held = books.packets(&handle, 20);
            books.answer(&handle, &held[..8]);
            fault();
            books.answer(&handle, &held[8..]);
            books.expect_refusals(&handle, &held[8..], Situation::NoSuchPacket);
            books.lose(&held[8..]);
            books.go_on(&handle);
            books.assert_balanced(0, 0);
        }
    });
}

/// Without its rules a queue gets no more packets; those that wait go on waiting, unless their chain is gone too
#[test]
fn rules_are_flushed_and_their_chain_is_deleted() {
    isolated(|| {
        let socket = Udp::bind(V4, PORT).unwrap();
        let books = Books::new(&socket);
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        for passed in [5, 10] {
            let table = Table::new(Family::Ip, "table").unwrap();
            let chain = table.chain("chain", Hook::Output, 0).unwrap();
            chain.add(&queueing_rule()).unwrap();
            books.send(20);
            let held = books.packets(&handle, 20);
            chain.flush().unwrap();
            books.send(2);
            books.answer(&handle, &held[..10]);
            table.delete().unwrap();
            books.send(3);
            books.answer(&handle, &held[10..]);
            books.expect_refusals(&handle, &held[10..], Situation::NoSuchPacket);
            books.lose(&held[10..]);
            books.assert_balanced(0, passed);
        }
    });
}

/// With the namespace goes the device that packets wait to leave by
#[test]
fn a_network_namespace_is_removed_while_packets_wait_to_go_there() {
    isolated(|| {
        let Router { client, server } = Router::new().unwrap();
        let table = Table::new(Family::Ip, "table").unwrap();
        for hook in [Hook::Forward, Hook::Output] {
            let chain = table.chain(&format!("{hook:?}"), hook, 0).unwrap();
            chain.add(&queueing_rule()).unwrap();
        }
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();

        let there = server.namespace.run(|| Udp::bind(server.v4, PORT).unwrap());
        let sender = client.namespace.run(|| Udp::bind(client.v4, 0).unwrap());
        let books = Books::new(&there);
        let send = |payload: &[u8]| sender.send(payload, there.address()).unwrap();
        books.ledger.send(20, send);
        let held = books.packets(&handle, 20);
        books.answer(&handle, &held[..2]);
        for &(_, number) in &held[2..] {
            books.ledger.lose(number);
        }
        books.assert_balanced(0, 0);
        drop(there);
        drop(server);
        let deadline = Instant::now() + 6 * TIMEOUT;
        while link::index("to-server").is_ok() {
            assert!(Instant::now() < deadline, "the link lives on");
            thread::sleep(Duration::from_millis(10));
        }
        for &(key, number) in &held[2..] {
            handle.verdict(key, mixed(number)).unwrap();
        }
        Books::new(&sender).expect_refusals(&handle, &held[2..], Situation::NoSuchPacket);

        let socket = Udp::bind(V4, PORT).unwrap();
        let books = Books::new(&socket);
        books.go_on(&handle);
        books.assert_balanced(0, 0);
    });
}

/// A handle keeps its namespace, when nothing else does any more but the sockets of those who send
#[test]
fn the_handles_own_network_namespace_is_removed_while_packets_wait() {
    isolated(|| {
        let there = Namespace::new().unwrap();
        let (lab, handle) = there.run(|| (lab(), Handle::open().unwrap()));
        let books = Books::new(&lab.v4);
        let _queue = handle.bind_queue(QUEUE).unwrap();
        books.send(10);
        let held = books.packets(&handle, 10);
        drop(there);
        books.answer(&handle, &held);
        books.go_on(&handle);
        books.expect_refusals(&handle, &[], Situation::NoSuchPacket);
        books.assert_balanced(0, 0);
    });
}

/// The kernel asks for the capability with every request; packets go on coming without
#[test]
fn one_thread_drops_its_privileges() {
    isolated(|| {
        let lab = lab();
        let books = Books::new(&lab.v4);
        let handle = Handle::open().unwrap();
        let queue = handle.bind_queue(QUEUE).unwrap();
        books.send(10);
        let held = books.packets(&handle, 10);
        user::without_net_admin(|| expect_no_privilege(&books, &handle, &queue, &held));
        books.answer(&handle, &held);
        books.go_on(&handle);
        books.assert_balanced(0, 0);
    });
}

#[test]
fn a_process_drops_its_privileges() {
    isolated(|| {
        let lab = lab();
        let books = Books::new(&lab.v4);
        let (mut here, mut there) = UnixStream::pair().unwrap();
        let consumer = process::fork(|| {
            let handle = Handle::open().unwrap();
            let queue = handle.bind_queue(QUEUE).unwrap();
            books.send(10);
            let held = books.packets(&handle, 10);
            books.answer(&handle, &held[..4]);
            user::drop_net_admin();
            expect_no_privilege(&books, &handle, &queue, &held[4..]);
            books.send(5);
            let later = books.packets(&handle, 5);
            expect_no_privilege(&books, &handle, &queue, &later);
            drop((handle, queue)); // which fails without a word, since the socket may do it
            books.lose(&held[4..]);
            books.lose(&later);
            books.assert_balanced(0, 0);
            there.write_all(b"balanced").unwrap();
        })
        .unwrap();
        drop(there);
        let mut word = [0; 8];
        here.read_exact(&mut word).unwrap();
        assert!(consumer.wait().unwrap());
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).expect("its socket is closed");
        books.go_on(&handle);
        books.assert_balanced(0, 0);
    });
}

/// What the documentation says of a thread without `CAP_NET_ADMIN`, whose packets these are
fn expect_no_privilege(books: &Books<'_>, handle: &Handle, queue: &Queue, held: &[Held]) {
    for &(key, number) in held {
        handle.verdict(key, mixed(number)).unwrap();
    }
    books.expect_refusals(handle, held, Situation::NotPermitted);
    // Together the kernel refuses them in the name of the first.
    let mut verdicts = VerdictBatch::new();
    for &(key, number) in held {
        verdicts.push(key, mixed(number)).unwrap();
    }
    handle.send(&mut verdicts).unwrap();
    books.expect_refusals(handle, &held[..1], Situation::NotPermitted);
    for (result, op) in [
        (queue.set_maxlen(500), Operation::SetMaxlen(QUEUE)),
        (handle.sync(), Operation::Sync),
        (handle.bind_queue(7).map(drop), Operation::Bind(7)),
    ] {
        match result {
            Err(Error::Refused(refusal)) => {
                assert_eq!(refusal.operation(), op);
                assert_eq!(refusal.situation(), Situation::NotPermitted);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_descriptor_is_duplicated() {
    isolated(|| {
        let lab = lab();
        let books = Books::new(&lab.v4);
        let handle = Handle::open().unwrap();
        let queue = handle.bind_queue(QUEUE).unwrap();
        books.send(10);
        let held = books.packets(&handle, 10);
        for &(key, number) in &held[..4] {
            let mut buf = [0; BatchVerdict::MAX_LEN];
            let verdict = BatchVerdict::new(mixed(number));
            let header = RequestHeader::default();
            let len = verdict
                .encode_single(&mut buf, QUEUE, key.id, header)
                .unwrap();
            send_past_the_library(&handle, &buf[..len]);
            books.decide(number, mixed(number));
        }
        books.answer(&handle, &held[4..]);
        books.go_on(&handle);

        let copy = handle.as_fd().try_clone_to_owned().unwrap();
        books.send(5);
        books.lose(&books.packets(&handle, 5));
        drop((handle, queue));
        books.send(3); // for nobody: the copy is no consumer
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        books.go_on(&handle);
        drop(copy);
        books.go_on(&handle);
        books.assert_balanced(3, 0);
    });
}

/// Both processes have the socket, and may answer; the queue ends with neither as long as the other is there
#[test]
fn a_process_forks() {
    isolated(|| {
        let lab = lab();
        let books = Books::new(&lab.v4);
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        books.send(20);
        let held = books.packets(&handle, 20);
        let child = process::fork(|| {
            for &(key, number) in &held[..10] {
                handle.verdict(key, mixed(number)).unwrap();
            }
        });
        assert!(child.unwrap().wait().unwrap());
        for &(_, number) in &held[..10] {
            books.decide(number, mixed(number));
        }
        books.answer(&handle, &held[10..]);
        books.go_on(&handle);
        let child = process::fork(|| {
            loop {
                thread::park();
            }
        });
        books.go_on(&handle);
        child.unwrap().kill();
        books.go_on(&handle);
        books.assert_balanced(0, 0);
    });
}

/// Time in which nobody could look for an answer is no waiting for it
#[test]
fn a_process_that_is_stopped_amid_its_requests_gets_their_answers() {
    isolated(|| {
        const PAUSE: Duration = Duration::from_millis(200);
        const AHEAD: u32 = 50;
        let lab = lab();
        let child = process::fork(|| {
            let handle = Handle::builder().ack_timeout(PAUSE / 2).open().unwrap();
            let queue = handle.bind_queue(QUEUE).unwrap();
            let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
            let (mut stops, mut packets) = (0, 0);
            while stops < 2 {
                lab.send_numbered(0..AHEAD);
                packets += AHEAD;
                let begin = Instant::now();
                queue.set_maxlen(1000).unwrap();
                stops += u32::from(begin.elapsed() >= PAUSE);
                for _ in 0..AHEAD {
                    let key = next_packet(&handle, &mut batch).key();
                    verdicts.push(key, Verdict::Accept).unwrap();
                }
                handle.send(&mut verdicts).unwrap();
                let mut left = usize::try_from(AHEAD).unwrap();
                while left > 0 {
                    left -= lab.v4.drain_now().unwrap();
                }
            }
            let stats = handle.stats();
            assert_eq!((stats.packets, stats.lost_packets), (packets.into(), 0));
            assert_eq!(stats.refused_verdicts, 0);
        });
        let child = child.unwrap();
        assert!(child.wait_while_stopping(PAUSE, PAUSE / 20).unwrap());
    });
}

/// EINTR wherever a call can wait, at any moment
#[test]
fn a_storm_of_signals() {
    isolated(|| {
        const N: u32 = 300;
        let lab = lab();
        let books = Books::new(&lab.v4);
        let storm = Duration::from_micros(100);
        // Each packet comes after one more signal at least, for which the others are likely to wait.
        let send_in_time = || {
            for _ in 0..N {
                let (begin, signals) = (Instant::now(), signal::count());
                while books.ledger.open() > 3 || signal::count() == signals {
                    assert!(begin.elapsed() < TIMEOUT, "nobody answers");
                    books.ledger.collect(books.socket).unwrap();
                    thread::yield_now();
                }
                books.send(1);
            }
        };

        let handle = Handle::open().unwrap();
        let queue = handle.bind_queue(QUEUE).unwrap();
        let mut handled = 0;
        thread::scope(|scope| {
            scope.spawn(send_in_time);
            let storm = signal::interrupting_every(storm, || {
                let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
                while handled < N {
                    let mut received = Received::default();
                    let is_even = handled % 2 == 0;
                    received.add(if is_even {
                        handle.recv(&mut batch).unwrap()
                    } else {
                        let deadline = Instant::now() + TIMEOUT;
                        handle.recv_deadline(&mut batch, deadline).unwrap()
                    });
                    for &(key, number) in &received.packets {
                        handled += 1;
                        verdicts.push(key, mixed(number)).unwrap();
                        books.decide(number, mixed(number));
                    }
                    handle.send(&mut verdicts).unwrap();
                    queue.set_maxlen(1000 + handled).unwrap();
                    handle.sync().unwrap();
                    let other = u16::try_from(100 + handled).unwrap();
                    handle.bind_queue(other).unwrap().destroy().unwrap();
                }
            });
            let signals = storm.unwrap().1;
            assert!(signals >= N.try_into().unwrap(), "{signals} signals");
        });
        queue.destroy().unwrap();
        drop(handle);

        let mut handle = Handle::open().unwrap();
        let (tell, decided) = mpsc::channel();
        let _queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, move |data| {
                let number = number(udp_payload(data.packet()));
                data.set_verdict(mixed(number), None);
                tell.send(number).unwrap();
            })
            .unwrap();
        thread::scope(|scope| {
            scope.spawn(send_in_time);
            let storm = signal::interrupting_every(storm, || {
                let (mut batch, mut handled) = (RecvBatch::default(), 0);
                while handled < N {
                    handled += u32::try_from(handle.run_once(&mut batch).unwrap()).unwrap();
                    for number in decided.try_iter() {
                        books.decide(number, mixed(number));
                    }
                }
            });
            let signals = storm.unwrap().1;
            assert!(signals >= N.try_into().unwrap(), "{signals} signals");
        });
        assert_eq!(handle.stats().refused_verdicts, 0);
        books.assert_balanced(0, 0);
    });
}

#[test]
fn the_limit_of_descriptors_is_reached() {
    isolated(|| {
        let lab = lab();
        let books = Books::new(&lab.v4);
        let handle = Handle::open().unwrap();
        let queue = handle.bind_queue(QUEUE).unwrap();
        process::without_descriptors(|| {
            let opened = Handle::open().map(drop);
            let read = QueueStats::read(QUEUE).map(drop);
            for (result, op) in [(opened, Operation::Open), (read, Operation::ReadStats)] {
                let error = result.unwrap_err();
                assert!(
                    matches!(&error, Error::Io { op: of, source, .. }
                        if *of == op && source.raw_os_error() == Some(libc::EMFILE)),
                    "{error:?}"
                );
                assert!(
                    error.to_string().contains("no file descriptor is left"),
                    "{error}"
                );
            }
            books.go_on(&handle);
            queue.set_maxlen(500).unwrap();
            handle.bind_queue(QUEUE + 1).unwrap().destroy().unwrap();
            handle.sync().unwrap();
            books.go_on(&handle);
        })
        .unwrap();
        Handle::open().expect("there are descriptors again");
        books.go_on(&handle);
        books.assert_balanced(0, 0);
    });
}

/// Whether this is the failure of a system call with this number, in this operation
fn is_io<T>(result: &nfqnl::Result<T>, op: Operation, errno: u16) -> bool {
    matches!(result, Err(Error::Io { op: of, source, .. })
        if *of == op && source.raw_os_error() == Some(errno.into()))
}

/// The kernel has no memory for a message: nothing was sent, and nothing is lost
#[test]
fn sends_that_fail_can_be_made_again() {
    isolated(|| {
        let lab = lab();
        for errno in [libc::ENOBUFS, libc::EAGAIN] {
            let errno = u16::try_from(errno).unwrap();
            let books = Books::new(&lab.v4);
            let handle = Handle::open().unwrap();
            let queue = handle.bind_queue(QUEUE).unwrap();
            books.send(30);
            let held = books.packets(&handle, 30);
            let mut verdicts = VerdictBatch::new();
            for &(key, number) in &held[1..] {
                verdicts.push(key, mixed(number)).unwrap();
            }
            process::without_sending(errno, || {
                let [first, second] = [held[0].0, held[1].0].map(Operation::Verdict);
                let sent = handle.verdict(held[0].0, Verdict::Accept);
                assert!(is_io(&sent, first, errno), "{sent:?}");
                let sent = handle.send(&mut verdicts);
                assert!(is_io(&sent, second, errno), "{sent:?}");
                let set = queue.set_maxlen(500);
                assert!(is_io(&set, Operation::SetMaxlen(QUEUE), errno), "{set:?}");
                let synced = handle.sync();
                assert!(is_io(&synced, Operation::Sync, errno), "{synced:?}");
            });
            handle.send(&mut verdicts).unwrap();
            books.answer(&handle, &held[..1]);
            for &(_, number) in &held[1..] {
                books.decide(number, mixed(number));
            }
            books.go_on(&handle);
            books.expect_refusals(&handle, &[], Situation::NoSuchPacket);
            books.assert_balanced(0, 0);
            queue.destroy().unwrap();
        }
    });
}

/// What callbacks have set is sent by the next call
#[test]
fn sends_of_run_once_that_fail_are_made_again() {
    isolated(|| {
        let lab = lab();
        let books = Books::new(&lab.v4);
        let mut handle = Handle::open().unwrap();
        let _queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, |data| {
                let number = number(udp_payload(data.packet()));
                data.set_verdict(mixed(number), None);
            })
            .unwrap();
        books.send(30);
        let mut batch = RecvBatch::default();
        let errno = u16::try_from(libc::ENOBUFS).unwrap();
        let error = process::without_sending(errno, || handle.run_once(&mut batch).unwrap_err());
        assert!(error.to_string().contains("out of memory"), "{error}");
        books.send(1);
        while handle.try_run_once(&mut batch).unwrap() > 0 {}
        for number in 0..31 {
            books.decide(number, mixed(number));
        }
        books.assert_balanced(0, 0);
    });
}

/// A send buffer that takes no more than some hundred verdicts, or none with a long payload
#[test]
fn the_send_buffer_is_too_small() {
    isolated(|| {
        let lab = lab();
        let books = Books::new(&lab.v4);
        let handle = Handle::builder().recv_buffer(1 << 20).open().unwrap(); // for s390x
        let _queue = handle.bind_queue(QUEUE).unwrap();
        socket::set_send_buffer(&handle, 1).unwrap();
        books.send(200);
        let held = books.packets(&handle, 200);
        let long = [0x45; 10_000];
        let mut verdicts = VerdictBatch::new();
        for &(key, number) in &held {
            if number == 100 {
                verdicts
                    .push(key, Verdict::Accept.with_payload(&long))
                    .unwrap();
            } else {
                verdicts.push(key, mixed(number)).unwrap();
                books.decide(number, mixed(number));
            }
        }
        let (errno, long) = (u16::try_from(libc::EMSGSIZE).unwrap(), held[100]);
        let sent = handle.send(&mut verdicts);
        assert!(is_io(&sent, Operation::Verdict(long.0), errno), "{sent:?}");
        assert!(verdicts.is_empty(), "all the others were sent");
        books.answer(&handle, &[long]);
        books.go_on(&handle);
        books.expect_refusals(&handle, &[], Situation::NoSuchPacket);
        books.assert_balanced(0, 0);
    });
}

#[test]
fn ten_thousand_packets_are_held_and_answered_in_reverse_by_eight_threads() {
    isolated(|| hold_ten_thousand_packets(<[Held]>::reverse));
}

#[test]
fn ten_thousand_packets_are_held_and_answered_in_any_order_by_eight_threads() {
    isolated(|| hold_ten_thousand_packets(shuffle));
}

fn hold_ten_thousand_packets(order: fn(&mut [Held])) {
    const N: usize = 10_000;
    const THREADS: usize = 8;
    /// So many fit an ordinary user's buffers
    const FIT: u32 = 100;
    let pause = || thread::sleep(Duration::from_micros(100));
    let lab = Lab::at_input(); // where no packet is charged to its sender any more
    let books = Books::new(&lab.v4);
    let handle = Handle::open().unwrap();
    let config = WHOLE_PACKETS.maxlen(N.try_into().unwrap());
    let _queue = handle.bind_queue_with(QUEUE, &config).unwrap();
    let mut held = Vec::new();
    while held.len() < N {
        books.send(FIT);
        held.extend(books.packets(&handle, 100));
    }
    books.assert_balanced(held.len().try_into().unwrap(), 0); // not one has passed
    order(&mut held);
    let answered = AtomicU32::new(0);
    thread::scope(|scope| {
        let threads = Vec::from_iter((0..THREADS).map(|first| {
            let (held, answered) = (held.iter().skip(first).step_by(THREADS), &answered);
            let (books, handle) = (&books, &handle);
            scope.spawn(move || {
                let mut verdicts = VerdictBatch::new();
                for (turn, &(key, number)) in held.enumerate() {
                    if turn / 16 % 2 == 0 {
                        books.answer(handle, &[(key, number)]);
                    } else {
                        verdicts.push(key, mixed(number)).unwrap();
                        books.decide(number, mixed(number));
                    }
                    answered.fetch_add(1, Ordering::SeqCst);
                    if turn % 16 == 15 {
                        handle.send(&mut verdicts).unwrap();
                        let now = answered.load(Ordering::SeqCst);
                        while now > books.ledger.settled() + FIT {
                            pause();
                        }
                    }
                }
                handle.send(&mut verdicts).unwrap();
            })
        }));
        while threads.iter().any(|thread| !thread.is_finished()) {
            books.ledger.collect(books.socket).unwrap();
            pause();
        }
    });
    books.expect_refusals(&handle, &[], Situation::NoSuchPacket);
    books.go_on(&handle);
    books.assert_balanced(0, 0);
}

fn shuffle(held: &mut [Held]) {
    let mut dice = Dice(4);
    for place in (1..held.len()).rev() {
        let other = dice.roll(u32::try_from(place + 1).unwrap());
        held.swap(place, other.try_into().unwrap());
    }
}
