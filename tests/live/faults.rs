//! Faults of the network, the kernel and other processes: each packet is accepted, dropped by a
//! verdict, or lost and counted

use std::cell::Cell;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Barrier, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nfqnl::proto::{PlainVerdict, RequestHeader};
use nfqnl::{
    ConfigFlags, CopyMode, Error, ErrorKind, Event, Events, Operation, PacketKey, Queue,
    QueueConfig, QueueStats, RecvBatch, Refusal, SendBatch, Socket, Verdict,
};
use nfqnl_testkit::hosts::Router;
use nfqnl_testkit::ledger::{Ledger, number};
use nfqnl_testkit::netns::{Namespace, is_rootless, isolated};
use nfqnl_testkit::rules::{Family, Hook, Queues, Rule, Table};
use nfqnl_testkit::traffic::{TIMEOUT, Udp, V4};
use nfqnl_testkit::{kernel, link, process, signal, socket, user};

use crate::lab::{
    Dice, Lab, PORT, QUEUE, WHOLE_PACKETS, is_readable, next_event, next_events, next_keys,
    next_packet, recv_events, send_past_the_library, take_all, udp_payload,
};

/// Room for some 40 packets
const SMALL_BUFFER: usize = 1 << 14;

/// A packet without a verdict, and its number
type Held = (PacketKey, u32);

/// Numbered packets to a UDP socket, and their ledger
struct Books<'s> {
    receiver: &'s Udp,
    ledger: Ledger,
}

/// All received events
#[derive(Debug, Default)]
struct Received {
    packets: Vec<Held>,
    refusals: Vec<Refusal>,
    overruns: u64,
}

impl Received {
    fn add(&mut self, event: Event<'_>) {
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

    fn add_all(&mut self, events: Events<'_>) {
        for event in events {
            self.add(event);
        }
    }
}

impl<'s> Books<'s> {
    fn new(receiver: &'s Udp) -> Self {
        Self {
            receiver,
            ledger: Ledger::new(20_000),
        }
    }

    fn send(&self, packets: u32) {
        let to = self.receiver.address();
        let send = |payload: &[u8]| self.receiver.send(payload, to).unwrap();
        self.ledger.send(packets, send);
    }

    /// Receives all available events
    fn receive(&self, socket: &Socket) -> Received {
        self.receive_until(socket, |_| true)
    }

    /// Receives until `is_all`, and then all available events
    #[track_caller]
    fn receive_until(&self, socket: &Socket, is_all: impl Fn(&Received) -> bool) -> Received {
        let (mut batch, mut received) = (RecvBatch::default(), Received::default());
        while !is_all(&received) {
            received.add_all(next_events(socket, &mut batch));
        }
        take_all(socket, &mut batch, |event| received.add(event));
        received
    }

    /// Receives `count` packets, and nothing else
    #[track_caller]
    fn packets(&self, socket: &Socket, count: usize) -> Vec<Held> {
        let received = self.receive_until(socket, |received| received.packets.len() >= count);
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

    /// Answers packets with the verdicts of [`mixed`]
    fn answer(&self, socket: &Socket, packets: &[Held]) {
        for &(key, number) in packets {
            socket.set_verdict(key, mixed(number)).unwrap();
            self.decide(number, mixed(number));
        }
    }

    /// Sends more packets, and receives and answers them
    fn go_on(&self, socket: &Socket) {
        const MORE: u32 = 10;
        self.send(MORE);
        self.answer(socket, &self.packets(socket, 10));
    }

    /// Records the loss of packets, whatever their verdicts
    fn lose(&self, packets: &[Held]) {
        for &(_, number) in packets {
            self.ledger.lose(number);
        }
    }

    /// Receives one refusal for each of these packets, and nothing else
    #[track_caller]
    fn expect_refusals(&self, socket: &Socket, packets: &[Held], situation: ErrorKind) {
        let received = self.receive(socket);
        let refused = received.refusals.iter();
        let refused = Vec::from_iter(refused.map(|r| (r.packet(), r.kind())));
        let expected = packets.iter().map(|&(key, _)| (Some(key), situation));
        assert_eq!(refused, Vec::from_iter(expected));
        assert_eq!((received.packets, received.overruns), (vec![], 0));
    }

    #[track_caller]
    fn assert_balanced(&self, lost: u64, passed: u64) {
        self.ledger.assert_balanced(self.receiver, lost, passed);
    }
}

/// Drops one packet in three
fn mixed(number: u32) -> Verdict {
    if number % 3 == 0 {
        Verdict::Drop
    } else {
        Verdict::Accept
    }
}

/// Settings with or without `FAIL_OPEN`
fn fail_open(is_open: bool) -> QueueConfig {
    let flags = if is_open {
        ConfigFlags::FAIL_OPEN
    } else {
        ConfigFlags::empty()
    };
    WHOLE_PACKETS.flags(ConfigFlags::FAIL_OPEN, flags)
}

/// Returns the kernel's counts of packets dropped because of a full queue, and because of a full
/// receive buffer; only root may read them
fn kernel_drops() -> Option<(u64, u64)> {
    match QueueStats::read(QUEUE) {
        Err(_) if is_rootless() => None,
        stats => {
            let stats = stats.unwrap().unwrap();
            Some((stats.queue_dropped.into(), stats.user_dropped.into()))
        }
    }
}

/// Fails unless the kernel has dropped this many packets, if the counts are readable
#[track_caller]
fn expect_kernel_drops(full_queue: u64, full_socket: u64) {
    if let Some(drops) = kernel_drops() {
        assert_eq!(drops, (full_queue, full_socket));
    }
}

/// Queues packets to [`PORT`]
fn queueing_rule() -> Rule {
    Rule::new().udp_dport(PORT).queue(QUEUE)
}

/// Queues packets as they leave, within the send: at INPUT a busy machine queues them later, in a
/// softirq
fn lab() -> Lab {
    Lab::with(Hook::Output, &queueing_rule())
}

/// Makes and deletes a base chain: the kernel drops every waiting packet, although none passes the
/// chain
fn delete_a_chain() {
    let table = Table::new(Family::Ip, "another").unwrap();
    table.chain("chain", Hook::Forward, 0).unwrap();
    table.delete().unwrap();
}

#[test]
fn a_flood_beyond_the_receive_buffer() {
    isolated(|| {
        let lab = lab();
        for (reports, is_open) in [(true, false), (true, true), (false, false), (false, true)] {
            let books = Books::new(&lab.v4);
            let builder = Socket::builder().recv_buffer(SMALL_BUFFER);
            let socket = builder.report_overruns(reports).open().unwrap();
            let queue = socket.bind_with(QUEUE, &fail_open(is_open)).unwrap();
            let mut overruns = 0;
            for _ in 0..3 {
                books.send(150);
                let received = books.receive(&socket);
                overruns += received.overruns;
                books.answer(&socket, &received.packets);
                books.ledger.collect(books.receiver).unwrap();
            }
            books.go_on(&socket); // The packets show the gap before them.
            let stats = socket.stats();
            let lost = stats.missing_packets;
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
            let socket = Socket::open().unwrap();
            let config = fail_open(is_open).maxlen(maxlen);
            let queue = socket.bind_with(QUEUE, &config).unwrap();
            let (mut lost, mut passed) = (0, 0);
            for _ in 0..3 {
                books.send(N);
                books.answer(&socket, &books.packets(&socket, maxlen.try_into().unwrap()));
                *(if is_open { &mut passed } else { &mut lost }) += u64::from(N - maxlen);
                books.assert_balanced(lost, passed);
                expect_kernel_drops(lost, 0);
            }
            assert_eq!(socket.stats().missing_packets, 0, "they have no ids");
            queue.destroy().unwrap();
        }
    });
}

/// Packets arrive faster than they are received: the receive buffer is full, or the queue
#[test]
fn a_slow_consumer() {
    isolated(|| {
        const N: u32 = 2000;
        let lab = lab();
        for maxlen in [u32::MAX, 15] {
            let books = Books::new(&lab.v4);
            let socket = Socket::builder().recv_buffer(SMALL_BUFFER).open().unwrap();
            let config = WHOLE_PACKETS.maxlen(maxlen);
            let queue = socket.bind_with(QUEUE, &config).unwrap();
            thread::scope(|scope| {
                let sender = scope.spawn(|| books.send(N));
                let mut batch = RecvBatch::new(4, RecvBatch::DEFAULT_SLOT_LEN);
                let mut due = 0;
                loop {
                    // Each turn takes as long as 50 packets take to arrive.
                    due += 50;
                    while books.ledger.sent() < due && !sender.is_finished() {
                        thread::yield_now();
                    }
                    let (is_last, mut received) = (sender.is_finished(), Received::default());
                    received.add_all(socket.try_recv(&mut batch).unwrap());
                    let any = received.overruns > 0 || !received.packets.is_empty();
                    books.answer(&socket, &received.packets);
                    books.ledger.collect(books.receiver).unwrap();
                    if is_last && !any && !is_readable(&socket) {
                        break;
                    }
                }
            });
            books.go_on(&socket);
            let stats = socket.stats();
            let full_queue = u64::from(books.ledger.sent()) - stats.packets - stats.missing_packets;
            assert_eq!(full_queue > 0, maxlen == 15);
            assert!(full_queue + stats.missing_packets > 0, "it is not slow");
            books.assert_balanced(full_queue + stats.missing_packets, 0);
            expect_kernel_drops(full_queue, stats.missing_packets);
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
            let builder = Socket::builder().recv_buffer(SMALL_BUFFER);
            let socket = builder.report_overruns(reports).open().unwrap();
            let queue = socket.bind(QUEUE).unwrap();
            let is_lost = |request: &mut dyn FnMut() -> nfqnl::Result<()>, lost| {
                books.send(N);
                let begin = Instant::now();
                match request() {
                    Err(Error::NoAck { op, .. }) => assert_eq!(op, lost),
                    other => panic!("{other:?}"),
                }
                let took = begin.elapsed();
                assert!(took < TIMEOUT / 10, "{took:?} until {lost} failed");
            };
            let op = Operation::SetMaxlen(QUEUE);
            is_lost(&mut || queue.set_maxlen(2000), op);
            is_lost(&mut || socket.sync(), Operation::Sync);
            let op = Operation::Bind(QUEUE + 1);
            is_lost(&mut || socket.bind(QUEUE + 1).map(drop), op);
            let other = socket.bind(QUEUE + 1);
            let other = other.expect("the library unbound it again");
            other.destroy().unwrap();

            let received = books.receive(&socket);
            assert_eq!(received.overruns > 0, reports);
            books.answer(&socket, &received.packets);
            books.go_on(&socket);
            let lost = socket.stats().missing_packets;
            books.assert_balanced(lost, 0);

            books.send(N);
            queue.destroy().unwrap(); // the library asks again
            // Packets received before the end of the queue may be events; their verdicts are late.
            let received = books.receive(&socket);
            assert_eq!(received.overruns > 0, reports);
            for (key, _) in received.packets {
                let error = socket.set_verdict(key, Verdict::Accept).unwrap_err();
                assert!(matches!(error, Error::Unbound { .. }), "{error}");
            }
            let queue = socket.bind(QUEUE).unwrap();
            books.go_on(&socket);
            books.assert_balanced(lost + u64::from(N), 0);
            queue.destroy().unwrap();
        }
    });
}

#[test]
fn a_consumer_is_killed_and_another_takes_over() {
    isolated(|| {
        for bypass in [false, true] {
            let queues = Queues::new(QUEUE);
            let rule = queueing_rule().queue(if bypass { queues.bypass() } else { queues });
            let lab = Lab::with(Hook::Output, &rule);
            let books = Books::new(&lab.v4);
            let (mut here, mut there) = UnixStream::pair().unwrap();
            let consumer = process::fork(|| {
                let socket = Socket::open().unwrap();
                let _queue = socket.bind(QUEUE).unwrap();
                there.write_all(b"is bound").unwrap();
                let mut batch = RecvBatch::new(1, RecvBatch::DEFAULT_SLOT_LEN);
                for number in 0..15 {
                    let packet = next_packet(&socket, &mut batch);
                    if number < 10 {
                        socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
                    }
                }
                there.write_all(b"has work").unwrap();
                loop {
                    thread::park();
                }
            })
            .unwrap();
            drop(there); // If the consumer dies, the reads below fail.
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
                books.ledger.lose(number); // The consumer held it, or its socket contained it.
            }
            books.send(5);

            let socket = Socket::open().unwrap();
            let _queue = socket.bind(QUEUE).unwrap();
            books.go_on(&socket);
            let (lost, passed) = if bypass { (0, 5) } else { (5, 0) };
            books.assert_balanced(lost, passed);
            lab.delete_rules();
        }
    });
}

#[test]
fn a_socket_is_dropped_with_packets_held() {
    isolated(|| {
        let lab = lab();
        let books = Books::new(&lab.v4);
        for lost in [3, 6] {
            let socket = Socket::open().unwrap();
            let queue = socket.bind(QUEUE).unwrap();
            books.send(10);
            let held = books.packets(&socket, 10);
            books.answer(&socket, &held[..5]);
            books.lose(&held[5..]);
            drop(socket);
            books.send(3); // no queue is bound
            let socket = Socket::open().unwrap();
            let again = socket.bind(QUEUE).unwrap();
            drop(queue);
            books.go_on(&socket);
            books.assert_balanced(lost, 0);
            again.destroy().unwrap();
        }
    });
}

/// One thread accepts packets of the first binding while the second one begins with the same ids
#[test]
fn no_late_verdict_hits_a_packet_of_a_new_binding() {
    isolated(|| {
        const N: usize = 20;
        let lab = lab();
        let socket = Socket::open().unwrap();
        for round in 0..40 {
            let at_once = if round % 2 == 0 { 1 } else { N };
            let books = Books::new(&lab.v4);
            let queue = socket.bind(QUEUE).unwrap();
            books.send(20);
            let old = books.packets(&socket, N);
            let start = Barrier::new(2);
            let [has_ended, is_over] = [false; 2].map(AtomicBool::new);
            let (late, queue, new) = thread::scope(|scope| {
                let late = scope.spawn(|| {
                    let mut verdicts = SendBatch::new();
                    let mut accept = |packets: &[Held]| {
                        let before = socket.stats().late_verdicts;
                        for &(key, _) in packets {
                            verdicts.push(key, Verdict::Accept).unwrap();
                        }
                        socket.send(&mut verdicts).unwrap();
                        // All or none are late, because they have the same queue and system call.
                        let late = socket.stats().late_verdicts - before;
                        assert!(late == 0 || late == packets.len() as u64, "{late}");
                        late > 0
                    };
                    let mut late = Vec::new();
                    start.wait();
                    for packets in old.chunks(at_once) {
                        late.resize(late.len() + packets.len(), accept(packets));
                    }
                    while !has_ended.load(Ordering::SeqCst) {
                        thread::yield_now();
                    }
                    while !is_over.load(Ordering::SeqCst) {
                        for packets in old.chunks(at_once) {
                            assert!(accept(packets));
                        }
                    }
                    late
                });
                start.wait();
                queue.destroy().unwrap();
                has_ended.store(true, Ordering::SeqCst);
                let queue = socket.bind(QUEUE).unwrap();
                books.send(20);
                let new = books.receive_until(&socket, |received| received.packets.len() == N);
                is_over.store(true, Ordering::SeqCst);
                (late.join().unwrap(), queue, new)
            });
            socket.sync().unwrap();
            let rest = books.receive(&socket);
            assert_eq!(rest.packets, []);
            let refusals = new.refusals.iter().chain(&rest.refusals);
            let refused = Vec::from_iter(refusals.map(|refusal| {
                assert_eq!(refusal.kind(), ErrorKind::NotBound, "{refusal}");
                refusal.packet().unwrap()
            }));
            for (&(key, number), is_late) in old.iter().zip(late) {
                // The refusal of a batch verdict names its last packet.
                let is_refused = refused.contains(&key) || at_once == N && !refused.is_empty();
                if is_late || is_refused {
                    books.ledger.lose(number);
                } else {
                    books.ledger.accept(number);
                }
            }
            assert_eq!(new.packets.len(), N);
            for &(key, number) in &new.packets {
                socket.set_verdict(key, Verdict::Drop).unwrap();
                books.ledger.drop(number);
            }
            socket.sync().unwrap();
            // Each packet was waiting, and was dropped.
            books.expect_refusals(&socket, &[], ErrorKind::NotBound);
            books.assert_balanced(0, 0);
            queue.destroy().unwrap();
        }
    });
}

#[test]
fn packets_dropped_while_waiting_are_each_reported() {
    isolated(|| {
        let lab = lab();
        let faults: [&dyn Fn(); 2] = [
            // Any base chain, even one not passed by these packets
            &delete_a_chain,
            &|| {
                link::down("lo").unwrap();
                link::up("lo").unwrap();
            },
        ];
        let books = Books::new(&lab.v4);
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        for fault in faults {
            books.send(20);
            let held = books.packets(&socket, 20);
            books.answer(&socket, &held[..8]);
            fault();
            books.answer(&socket, &held[8..]);
            books.expect_refusals(&socket, &held[8..], ErrorKind::NoSuchPacket);
            books.lose(&held[8..]);
            books.go_on(&socket);
            books.assert_balanced(0, 0);
        }
    });
}

/// Packets go on waiting without their rule, but not without their chain
#[test]
fn rules_are_flushed_and_their_chain_is_deleted() {
    isolated(|| {
        let udp = Udp::bind(V4, PORT).unwrap();
        let books = Books::new(&udp);
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        for passed in [5, 10] {
            let table = Table::new(Family::Ip, "table").unwrap();
            let chain = table.chain("chain", Hook::Output, 0).unwrap();
            chain.add(&queueing_rule()).unwrap();
            books.send(20);
            let held = books.packets(&socket, 20);
            chain.flush().unwrap();
            books.send(2);
            books.answer(&socket, &held[..10]);
            table.delete().unwrap();
            books.send(3);
            books.answer(&socket, &held[10..]);
            books.expect_refusals(&socket, &held[10..], ErrorKind::NoSuchPacket);
            books.lose(&held[10..]);
            books.assert_balanced(0, passed);
        }
    });
}

/// The packets' outgoing device disappears with the namespace
#[test]
fn a_namespace_is_removed_with_packets_on_their_way() {
    isolated(|| {
        let Router { client, server } = Router::new().unwrap();
        let table = Table::new(Family::Ip, "table").unwrap();
        for hook in [Hook::Forward, Hook::Output] {
            let chain = table.chain(&format!("{hook:?}"), hook, 0).unwrap();
            chain.add(&queueing_rule()).unwrap();
        }
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();

        let there = server.namespace.run(|| Udp::bind(server.v4, PORT).unwrap());
        let sender = client.namespace.run(|| Udp::bind(client.v4, 0).unwrap());
        let books = Books::new(&there);
        let send = |payload: &[u8]| sender.send(payload, there.address()).unwrap();
        books.ledger.send(20, send);
        let held = books.packets(&socket, 20);
        books.answer(&socket, &held[..2]);
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
            socket.set_verdict(key, mixed(number)).unwrap();
        }
        Books::new(&sender).expect_refusals(&socket, &held[2..], ErrorKind::NoSuchPacket);

        let udp = Udp::bind(V4, PORT).unwrap();
        let books = Books::new(&udp);
        books.go_on(&socket);
        books.assert_balanced(0, 0);
    });
}

/// The sockets keep the namespace alive
#[test]
fn the_own_namespace_is_removed_with_packets_held() {
    isolated(|| {
        let there = Namespace::new().unwrap();
        let (lab, socket) = there.run(|| (lab(), Socket::open().unwrap()));
        let books = Books::new(&lab.v4);
        let _queue = socket.bind(QUEUE).unwrap();
        books.send(10);
        let held = books.packets(&socket, 10);
        drop(there);
        books.answer(&socket, &held);
        books.go_on(&socket);
        books.expect_refusals(&socket, &[], ErrorKind::NoSuchPacket);
        books.assert_balanced(0, 0);
    });
}

/// The kernel checks the capability for every request, but not for receiving
#[test]
fn one_thread_drops_its_privileges() {
    isolated(|| {
        let lab = lab();
        let books = Books::new(&lab.v4);
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        books.send(10);
        let held = books.packets(&socket, 10);
        user::without_net_admin(|| expect_no_privilege(&books, &socket, &queue, &held));
        books.answer(&socket, &held);
        books.go_on(&socket);
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
            let socket = Socket::open().unwrap();
            let queue = socket.bind(QUEUE).unwrap();
            books.send(10);
            let held = books.packets(&socket, 10);
            books.answer(&socket, &held[..4]);
            user::drop_net_admin();
            expect_no_privilege(&books, &socket, &queue, &held[4..]);
            books.send(5);
            let later = books.packets(&socket, 5);
            expect_no_privilege(&books, &socket, &queue, &later);
            drop((socket, queue)); // their requests fail; closing the socket ends the queue
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
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).expect("its udp is closed");
        books.go_on(&socket);
        books.assert_balanced(0, 0);
    });
}

/// Fails unless the kernel refuses verdicts and settings for lack of `CAP_NET_ADMIN`
fn expect_no_privilege(books: &Books<'_>, socket: &Socket, queue: &Queue, held: &[Held]) {
    for &(key, number) in held {
        socket.set_verdict(key, mixed(number)).unwrap();
    }
    books.expect_refusals(socket, held, ErrorKind::NoCapability);
    // The kernel refuses the whole send, and names only its first message.
    let mut verdicts = SendBatch::new();
    for &(key, number) in held {
        verdicts.push(key, mixed(number)).unwrap();
    }
    socket.send(&mut verdicts).unwrap();
    books.expect_refusals(socket, &held[..1], ErrorKind::NoCapability);
    for (result, op) in [
        (queue.set_maxlen(500), Operation::SetMaxlen(QUEUE)),
        (socket.sync(), Operation::Sync),
        (socket.bind(7).map(drop), Operation::Bind(7)),
    ] {
        match result {
            Err(Error::Refused(refusal)) => {
                assert_eq!(refusal.operation(), op);
                assert_eq!(refusal.kind(), ErrorKind::NoCapability);
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
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        books.send(10);
        let held = books.packets(&socket, 10);
        for &(key, number) in &held[..4] {
            let mut buf = [0; PlainVerdict::MAX_LEN];
            let verdict = PlainVerdict::new(mixed(number));
            let header = RequestHeader::default();
            let len = verdict.encode(&mut buf, QUEUE, key.id(), header).unwrap();
            send_past_the_library(&socket, &buf[..len]);
            books.decide(number, mixed(number));
        }
        books.answer(&socket, &held[4..]);
        books.go_on(&socket);

        let copy = socket.as_fd().try_clone_to_owned().unwrap();
        books.send(5);
        books.lose(&books.packets(&socket, 5));
        drop((socket, queue));
        books.send(3); // the copy keeps no queue bound
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        books.go_on(&socket);
        drop(copy);
        books.go_on(&socket);
        books.assert_balanced(3, 0);
    });
}

/// Both processes have the socket, and both may answer. The queue lives as long as one of them
#[test]
fn a_process_forks() {
    isolated(|| {
        let lab = lab();
        let books = Books::new(&lab.v4);
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        books.send(20);
        let held = books.packets(&socket, 20);
        let child = process::fork(|| {
            for &(key, number) in &held[..10] {
                socket.set_verdict(key, mixed(number)).unwrap();
            }
        });
        assert!(child.unwrap().wait().unwrap());
        for &(_, number) in &held[..10] {
            books.decide(number, mixed(number));
        }
        books.answer(&socket, &held[10..]);
        books.go_on(&socket);
        let child = process::fork(|| {
            loop {
                thread::park();
            }
        });
        books.go_on(&socket);
        child.unwrap().kill();
        books.go_on(&socket);
        books.assert_balanced(0, 0);
    });
}

/// A setting does not fail because the process was stopped in the middle of it
#[test]
fn a_stopped_process_gets_its_answers_later() {
    isolated(|| {
        const PAUSE: Duration = Duration::from_millis(200);
        const AHEAD: u32 = 50;
        let lab = lab();
        let child = process::fork(|| {
            let socket = Socket::open().unwrap();
            let queue = socket.bind(QUEUE).unwrap();
            let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
            let (mut stops, mut packets) = (0, 0);
            while stops < 2 {
                lab.send_numbered(0..AHEAD);
                packets += AHEAD;
                let begin = Instant::now();
                queue.set_maxlen(1000).unwrap();
                stops += u32::from(begin.elapsed() >= PAUSE);
                for _ in 0..AHEAD {
                    let key = next_packet(&socket, &mut batch).key();
                    verdicts.push(key, Verdict::Accept).unwrap();
                }
                socket.send(&mut verdicts).unwrap();
                let mut left = usize::try_from(AHEAD).unwrap();
                while left > 0 {
                    left -= lab.v4.drain_now().unwrap();
                }
            }
            let stats = socket.stats();
            assert_eq!((stats.packets, stats.missing_packets), (packets.into(), 0));
            assert_eq!(stats.refused_verdicts, 0);
        });
        let child = child.unwrap();
        assert!(child.wait_while_stopping(PAUSE, PAUSE / 20).unwrap());
    });
}

/// EINTR in every waiting call
#[test]
fn a_storm_of_signals() {
    isolated(|| {
        const N: u32 = 300;
        let lab = lab();
        let books = Books::new(&lab.v4);
        let storm = Duration::from_micros(100);
        // At least one signal comes before each packet, most likely while the other thread waits.
        let send_in_time = || {
            for _ in 0..N {
                let (begin, signals) = (Instant::now(), signal::count());
                while books.ledger.open() > 3 || signal::count() == signals {
                    assert!(begin.elapsed() < TIMEOUT, "no answers");
                    books.ledger.collect(books.receiver).unwrap();
                    thread::yield_now();
                }
                books.send(1);
            }
        };

        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let mut handled = 0;
        thread::scope(|scope| {
            scope.spawn(send_in_time);
            let storm = signal::interrupting_every(storm, || {
                let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
                while handled < N {
                    let mut received = Received::default();
                    let is_even = handled % 2 == 0;
                    received.add_all(if is_even {
                        recv_events(&socket, &mut batch)
                    } else {
                        next_events(&socket, &mut batch)
                    });
                    for &(key, number) in &received.packets {
                        handled += 1;
                        verdicts.push(key, mixed(number)).unwrap();
                        books.decide(number, mixed(number));
                    }
                    socket.send(&mut verdicts).unwrap();
                    queue.set_maxlen(1000 + handled).unwrap();
                    socket.sync().unwrap();
                    let other = u16::try_from(100 + handled).unwrap();
                    socket.bind(other).unwrap().destroy().unwrap();
                }
            });
            let signals = storm.unwrap().1;
            assert!(signals >= N.try_into().unwrap(), "{signals} signals");
        });
        queue.destroy().unwrap();
        drop(socket);

        let handle = nfqnl::open().unwrap();
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
        assert_eq!(handle.socket().stats().refused_verdicts, 0);
        books.assert_balanced(0, 0);
    });
}

#[test]
fn the_limit_of_descriptors_is_reached() {
    isolated(|| {
        let lab = lab();
        let books = Books::new(&lab.v4);
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        process::without_descriptors(|| {
            let opened = Socket::open().map(drop);
            let read = QueueStats::read(QUEUE).map(drop);
            for (result, op) in [(opened, Operation::Open), (read, Operation::ReadStats)] {
                let error = result.unwrap_err();
                assert!(
                    matches!(&error, Error::Io { op: of, source, .. }
                        if *of == op && source.raw_os_error() == Some(libc::EMFILE)),
                    "{error:?}"
                );
                assert!(error.to_string().contains("descriptor"), "{error}");
            }
            books.go_on(&socket);
            queue.set_maxlen(500).unwrap();
            socket.bind(QUEUE + 1).unwrap().destroy().unwrap();
            socket.sync().unwrap();
            books.go_on(&socket);
        })
        .unwrap();
        Socket::open().expect("there are descriptors again");
        books.go_on(&socket);
        books.assert_balanced(0, 0);
    });
}

/// With a limit of 0, poll(2) fails even for an open descriptor
#[test]
fn receiving_works_with_a_descriptor_limit_of_0() {
    isolated(|| {
        let lab = lab();
        let books = Books::new(&lab.v4);
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        process::with_descriptor_limit(0, || {
            let mut batch = RecvBatch::default();
            let (begin, wait) = (Instant::now(), Duration::from_millis(50));
            let events = socket.recv_timeout(&mut batch, wait).unwrap();
            assert_eq!(events.count(), 0);
            let took = begin.elapsed();
            assert!(took >= wait && took < TIMEOUT, "{took:?}");
            queue.set_maxlen(500).unwrap();
            socket.bind(QUEUE + 1).unwrap().destroy().unwrap();
            socket.sync().unwrap();
            for _ in 0..3 {
                books.send(1);
                let packet = next_packet(&socket, &mut batch);
                let number = number(udp_payload(&packet));
                books.answer(&socket, &[(packet.key(), number)]);
            }
        })
        .unwrap();
        books.assert_balanced(0, 0);
    });
}

/// Returns true for a failed system call of this operation with this error number
fn is_io<T>(result: &nfqnl::Result<T>, op: Operation, errno: u16) -> bool {
    matches!(result, Err(Error::Io { op: of, source, .. })
        if *of == op && source.raw_os_error() == Some(errno.into()))
}

/// The kernel has no memory for a message: nothing is sent, and nothing is lost
#[test]
fn sends_that_fail_can_be_made_again() {
    isolated(|| {
        let lab = lab();
        for errno in [libc::ENOBUFS, libc::EAGAIN] {
            let errno = u16::try_from(errno).unwrap();
            let books = Books::new(&lab.v4);
            let socket = Socket::open().unwrap();
            let queue = socket.bind(QUEUE).unwrap();
            books.send(30);
            let held = books.packets(&socket, 30);
            let mut verdicts = SendBatch::new();
            for &(key, number) in &held[1..] {
                verdicts.push(key, mixed(number)).unwrap();
            }
            process::without_sending(errno, || {
                let [first, second] = [held[0].0, held[1].0].map(Operation::Verdict);
                let sent = socket.set_verdict(held[0].0, Verdict::Accept);
                assert!(is_io(&sent, first, errno), "{sent:?}");
                let sent = socket.send(&mut verdicts);
                assert!(is_io(&sent, second, errno), "{sent:?}");
                let set = queue.set_maxlen(500);
                assert!(is_io(&set, Operation::SetMaxlen(QUEUE), errno), "{set:?}");
                let synced = socket.sync();
                assert!(is_io(&synced, Operation::Sync, errno), "{synced:?}");
            });
            socket.send(&mut verdicts).unwrap();
            books.answer(&socket, &held[..1]);
            for &(_, number) in &held[1..] {
                books.decide(number, mixed(number));
            }
            books.go_on(&socket);
            books.expect_refusals(&socket, &[], ErrorKind::NoSuchPacket);
            books.assert_balanced(0, 0);
            queue.destroy().unwrap();
        }
    });
}

/// The next call sends the verdicts set by callbacks
#[test]
fn sends_of_run_once_that_fail_are_made_again() {
    isolated(|| {
        let lab = lab();
        let books = Books::new(&lab.v4);
        let handle = nfqnl::open().unwrap();
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
        assert_eq!(error.raw_os_error(), Some(libc::ENOBUFS));
        books.send(1);
        while handle.try_run_once(&mut batch).unwrap() > 0 {}
        for number in 0..31 {
            books.decide(number, mixed(number));
        }
        books.assert_balanced(0, 0);
    });
}

/// The send buffer has room for some hundred verdicts, but not for a long payload
#[test]
fn the_send_buffer_is_too_small() {
    isolated(|| {
        let lab = lab();
        let books = Books::new(&lab.v4);
        let socket = Socket::builder().recv_buffer(1 << 20).open().unwrap(); // for s390x
        let _queue = socket.bind(QUEUE).unwrap();
        socket::set_send_buffer(&socket, 1).unwrap();
        books.send(200);
        let held = books.packets(&socket, 200);
        let long = [0x45; 10_000];
        let mut verdicts = SendBatch::new();
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
        let sent = socket.send(&mut verdicts);
        assert!(is_io(&sent, Operation::Verdict(long.0), errno), "{sent:?}");
        assert!(verdicts.is_empty(), "all the others were sent");
        books.answer(&socket, &[long]);
        books.go_on(&socket);
        books.expect_refusals(&socket, &[], ErrorKind::NoSuchPacket);
        books.assert_balanced(0, 0);
    });
}

#[test]
fn ten_thousand_packets_are_answered_in_reverse() {
    isolated(|| hold_ten_thousand_packets(<[Held]>::reverse));
}

#[test]
fn ten_thousand_packets_are_answered_in_any_order() {
    isolated(|| hold_ten_thousand_packets(shuffle));
}

fn hold_ten_thousand_packets(order: fn(&mut [Held])) {
    const N: usize = 10_000;
    const THREADS: usize = 8;
    /// The buffers of an ordinary user have room for this many packets
    const FIT: u32 = 100;
    let pause = || thread::sleep(Duration::from_micros(100));
    let lab = Lab::at_input(); // At INPUT packets are not charged to their sender.
    let books = Books::new(&lab.v4);
    let socket = Socket::open().unwrap();
    let config = WHOLE_PACKETS.maxlen(N.try_into().unwrap());
    let _queue = socket.bind_with(QUEUE, &config).unwrap();
    let mut held = Vec::new();
    while held.len() < N {
        books.send(FIT);
        held.extend(books.packets(&socket, 100));
    }
    books.assert_balanced(held.len().try_into().unwrap(), 0); // no packet has passed
    order(&mut held);
    let answered = AtomicU32::new(0);
    thread::scope(|scope| {
        let threads = Vec::from_iter((0..THREADS).map(|first| {
            let (held, answered) = (held.iter().skip(first).step_by(THREADS), &answered);
            let (books, socket) = (&books, &socket);
            scope.spawn(move || {
                let mut verdicts = SendBatch::new();
                for (turn, &(key, number)) in held.enumerate() {
                    if turn / 16 % 2 == 0 {
                        books.answer(socket, &[(key, number)]);
                    } else {
                        verdicts.push(key, mixed(number)).unwrap();
                        books.decide(number, mixed(number));
                    }
                    answered.fetch_add(1, Ordering::SeqCst);
                    if turn % 16 == 15 {
                        socket.send(&mut verdicts).unwrap();
                        let now = answered.load(Ordering::SeqCst);
                        while now > books.ledger.settled() + FIT {
                            pause();
                        }
                    }
                }
                socket.send(&mut verdicts).unwrap();
            })
        }));
        while threads.iter().any(|thread| !thread.is_finished()) {
            books.ledger.collect(books.receiver).unwrap();
            pause();
        }
    });
    books.expect_refusals(&socket, &[], ErrorKind::NoSuchPacket);
    books.go_on(&socket);
    books.assert_balanced(0, 0);
}

fn shuffle(held: &mut [Held]) {
    let mut dice = Dice(4);
    for place in (1..held.len()).rev() {
        let other = dice.roll(u32::try_from(place + 1).unwrap());
        held.swap(place, other.try_into().unwrap());
    }
}

/// The buffer has no room for 400 answers, so dropping a queue does not request an answer
#[test]
fn dropping_400_queues_loses_no_packet() {
    isolated(|| {
        const OTHERS: u16 = 400;
        const SMALL: usize = 212_992 / 2;
        let lab = lab();
        for buffer in [None, Some(SMALL)] {
            let books = Books::new(&lab.v4);
            let builder = match buffer {
                Some(bytes) => Socket::builder().recv_buffer(bytes),
                None => Socket::builder(),
            };
            let socket = builder.open().unwrap();
            let queue = socket.bind(QUEUE).unwrap();
            let others = (1000..1000 + OTHERS).map(|num| socket.bind(num).unwrap());
            drop(Vec::from_iter(others));
            books.go_on(&socket);
            books.assert_balanced(0, 0);
            let stats = socket.stats();
            assert_eq!((stats.overruns, stats.missing_packets), (0, 0));
            queue.destroy().unwrap();
        }
    });
}

/// The kernel refuses 1000 verdicts one by one; a small receive buffer has room for some 300 of
/// these refusals
#[test]
fn a_thousand_refusals_overrun_nothing() {
    isolated(|| {
        const HELD: usize = 1000;
        const LIVE: u32 = 10;
        // At INPUT packets are not charged to their sender, so an ordinary user can hold 1000.
        let lab = Lab::at_input();
        for buffer in [None, Some(1 << 17)] {
            let builder = match buffer {
                Some(bytes) => Socket::builder().recv_buffer(bytes),
                None => Socket::builder(),
            };
            let socket = builder.open().unwrap();
            let queue = socket.bind(QUEUE).unwrap();
            let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
            let mut held = Vec::new();
            while held.len() < HELD {
                lab.send_numbered(0..50);
                held.extend(next_keys(&socket, &mut batch, 50));
            }
            delete_a_chain();
            // In reverse, to prevent merging of verdicts
            for &key in held.iter().rev() {
                verdicts.push(key, Verdict::Accept).unwrap();
            }
            socket.send(&mut verdicts).unwrap();
            lab.send_numbered(0..LIVE);
            let mut received = Received::default();
            while received.packets.len() < 10 {
                received.add(next_event(&socket, &mut batch));
            }
            take_all(&socket, &mut batch, |event| received.add(event));
            let numbers = received.packets.iter().map(|&(_, number)| number);
            assert_eq!(Vec::from_iter(numbers), Vec::from_iter(0..LIVE));
            assert_eq!(received.overruns, 0);
            let refused = received.refusals.iter().map(|refusal| {
                assert_eq!(refusal.kind(), ErrorKind::NoSuchPacket);
                refusal.packet().unwrap()
            });
            held.reverse();
            assert_eq!(Vec::from_iter(refused), held);
            assert_eq!(socket.stats().refused_verdicts, HELD as u64);
            for &(key, _) in &received.packets {
                socket.set_verdict(key, Verdict::Accept).unwrap();
            }
            lab.expect_numbered(0..LIVE);
            queue.destroy().unwrap();
        }
    });
}

/// Newer kernels keep at most 65,536 packets waiting in a queue, whatever the `maxlen`
///
/// The kernel also gives ids to the dropped packets. The socket misses these ids, although its
/// receive buffer had room.
#[test]
fn packets_beyond_65536_waiting_are_missing() {
    isolated(|| {
        const SENT: u64 = 70_000;
        const MOST: u64 = 65_536;
        let lab = Lab::at_input();
        let socket = Socket::open().unwrap();
        let config = QueueConfig::new()
            .copy_mode(CopyMode::Meta, 0)
            .maxlen(200_000);
        let queue = socket.bind_with(QUEUE, &config).unwrap();
        let mut batch = RecvBatch::default();
        let mut held = Vec::new();
        let hold = |event: Event<'_>| match event {
            Event::Packet(packet) => packet.key(),
            other => panic!("not a packet: {other:?}"),
        };
        for _ in 0..SENT / 50 {
            lab.send_numbered(0..50);
            take_all(&socket, &mut batch, |event| held.push(hold(event)));
        }
        // The last packets may be queued somewhat later.
        thread::sleep(Duration::from_millis(100));
        take_all(&socket, &mut batch, |event| held.push(hold(event)));
        let waiting = held.len() as u64;
        // The next queued packet shows the gap before it.
        socket.set_verdict(held[0], Verdict::Drop).unwrap();
        lab.send(b"shows the gap");
        held.push(next_packet(&socket, &mut batch).key());
        let stats = socket.stats();
        let missing = SENT - waiting;
        eprintln!("{waiting} packets wait, {stats:?}");
        assert!(missing == 0 || waiting == MOST, "{waiting}");
        if kernel::is_at_least(7, 0) {
            assert_eq!(waiting, MOST);
        }
        assert_eq!(
            (stats.packets, stats.missing_packets),
            (waiting + 1, missing)
        );
        assert_eq!(stats.overruns, 0);
        // No overrun explains the gap, so another process may have these packets.
        assert_eq!(stats.merging_ended, u64::from(missing > 0));
        if kernel_drops().is_some() {
            expect_kernel_drops(missing, 0);
        }
        let mut verdicts = SendBatch::new();
        for &key in &held[1..] {
            verdicts.push(key, Verdict::Drop).unwrap();
        }
        socket.send(&mut verdicts).unwrap();
        socket.sync().unwrap();
        take_all(&socket, &mut batch, |event| panic!("{event:?}"));
        assert_eq!(socket.stats().refused_verdicts, 0);
        queue.destroy().unwrap();
    });
}

/// An answer is behind all earlier packets, so the library must read all of them
#[test]
fn settings_behind_a_large_backlog_are_acknowledged() {
    isolated(|| {
        // Root has time for one large backlog. Below are sizes for the buffers of an ordinary user.
        let mut backlogs = [60_000, 2000, 2000, 2000, 2000, 2000];
        if is_rootless() {
            backlogs = [200; 6];
        }
        let lab = lab();
        let socket = Socket::builder().recv_buffer(256 << 20).open().unwrap();
        let config = QueueConfig::new()
            .copy_mode(CopyMode::Meta, 0)
            .maxlen(65_000);
        let queue = socket.bind_with(QUEUE, &config).unwrap();
        let other = Cell::new(None);
        let requests: [&dyn Fn() -> nfqnl::Result<()>; 6] = [
            &|| queue.set_maxlen(65_000),
            &|| queue.set_flags(ConfigFlags::GSO, ConfigFlags::GSO),
            &|| queue.set_mode(CopyMode::Meta, 0),
            &|| socket.sync(),
            &|| socket.bind(QUEUE + 1).map(|queue| other.set(Some(queue))),
            &|| other.take().unwrap().destroy(),
        ];
        let mut batch = RecvBatch::default();
        for (request, backlog) in requests.into_iter().zip(backlogs) {
            lab.send_numbered(0..backlog);
            request().unwrap();
            let (mut packets, mut last) = (0, None);
            take_all(&socket, &mut batch, |event| match event {
                Event::Packet(packet) => {
                    packets += 1;
                    last = Some(packet.key());
                }
                other => panic!("not a packet: {other:?}"),
            });
            assert_eq!(packets, backlog);
            socket
                .set_verdict_up_to(last.unwrap(), Verdict::Drop)
                .unwrap();
        }
        let stats = socket.stats();
        assert_eq!((stats.overruns, stats.missing_packets), (0, 0));
    });
}

/// Reads a word from the other process
#[track_caller]
fn word(stream: &mut UnixStream) -> [u8; 4] {
    let mut word = [0; 4];
    stream.read_exact(&mut word).unwrap();
    word
}

/// Each process knows only its own received packets. A verdict on a range would include packets of
/// the other process: the gap in the ids reveals the other receiver
#[test]
fn two_processes_that_take_turns_keep_their_verdicts() {
    isolated(|| {
        const ROUNDS: u32 = 12;
        const EACH: usize = 4;
        let lab = lab();
        let books = Books::new(&lab.v4);
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let (mut here, mut there) = UnixStream::pair().unwrap();
        // With one slot a call receives one packet.
        let mut batch = RecvBatch::new(1, RecvBatch::DEFAULT_SLOT_LEN);
        let mut verdicts = SendBatch::new();
        let child = process::fork(|| {
            loop {
                match &word(&mut there) {
                    b"recv" => {
                        for key in next_keys(&socket, &mut batch, EACH) {
                            verdicts.push(key, Verdict::Drop).unwrap();
                        }
                    }
                    b"send" => socket.send(&mut verdicts).unwrap(),
                    _ => break,
                }
                there.write_all(b"done").unwrap();
            }
            let stats = socket.stats();
            assert_eq!((stats.merging_ended, stats.overruns), (1, 0));
        });
        drop(there);
        let mut child_does = |what: &[u8; 4]| {
            here.write_all(what).unwrap();
            if what != b"quit" {
                assert_eq!(&word(&mut here), b"done");
            }
        };
        for round in 0..ROUNDS {
            let first = books.ledger.sent();
            books.send(12);
            let mut here_receives = || {
                for key in next_keys(&socket, &mut batch, EACH) {
                    verdicts.push(key, Verdict::Accept).unwrap();
                }
            };
            // The round determines the child's four packets and the first process to answer.
            let childs = round % 3;
            for four in 0..3 {
                if four == childs {
                    child_does(b"recv");
                } else {
                    here_receives();
                }
            }
            if round % 2 == 0 {
                child_does(b"send");
            }
            socket.send(&mut verdicts).unwrap();
            if round % 2 == 1 {
                child_does(b"send");
            }
            for number in 0..12 {
                match number / 4 == childs {
                    true => books.ledger.drop(first + number),
                    false => books.ledger.accept(first + number),
                }
            }
            books.assert_balanced(0, 0);
        }
        child_does(b"quit");
        assert!(child.unwrap().wait().unwrap());
        books.expect_refusals(&socket, &[], ErrorKind::NoSuchPacket);
        let stats = socket.stats();
        assert_eq!((stats.merging_ended, stats.overruns), (1, 0));
    });
}

#[test]
fn two_processes_that_race_keep_their_verdicts() {
    isolated(|| {
        const N: u32 = 3000;
        const AHEAD: u32 = 60;
        let lab = lab();
        let books = Books::new(&lab.v4);
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let (mut here, there) = UnixStream::pair().unwrap();
        let wait = Duration::from_millis(20);
        // Receives until `is_over`, and reports the numbers of each send before the send
        let serve = |verdict, report: &dyn Fn(&[u32]), is_over: &dyn Fn() -> bool| {
            let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
            while !is_over() {
                let mut numbers = Vec::new();
                for event in socket.recv_timeout(&mut batch, wait).unwrap() {
                    let Event::Packet(packet) = event else {
                        panic!("not a packet: {event:?}");
                    };
                    numbers.push(number(udp_payload(&packet)));
                    verdicts.push(packet.key(), verdict).unwrap();
                }
                report(&numbers);
                socket.send(&mut verdicts).unwrap();
            }
        };
        there.set_nonblocking(true).unwrap();
        let child = process::fork(|| {
            let report = |numbers: &[u32]| {
                for number in numbers {
                    (&there).write_all(&number.to_be_bytes()).unwrap();
                }
            };
            let is_over = || (&there).read(&mut [0]).is_ok();
            serve(Verdict::Drop, &report, &is_over);
        });
        drop(there);
        here.set_nonblocking(true).unwrap();
        let is_over = AtomicBool::new(false);
        let accepted = AtomicU32::new(0);
        let dropped = Mutex::new(0);
        thread::scope(|scope| {
            let report = |numbers: &[u32]| {
                for &number in numbers {
                    books.ledger.accept(number);
                    accepted.fetch_add(1, Ordering::SeqCst);
                }
            };
            let (serve, is_over) = (&serve, &is_over);
            let receiver = scope.spawn(move || {
                serve(Verdict::Accept, &report, &|| is_over.load(Ordering::SeqCst));
            });
            let mut childs = Vec::new();
            let begin = Instant::now();
            let mut dice = Dice(3);
            loop {
                let mut bytes = [0; 4096];
                match here.read(&mut bytes) {
                    Ok(len) => childs.extend(&bytes[..len]),
                    Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
                }
                let whole = childs.len() / 4 * 4;
                for number in childs.drain(..whole).as_slice().chunks(4) {
                    books.ledger.drop(nfqnl_testkit::ledger::number(number));
                    *dropped.lock().unwrap() += 1;
                }
                let answered = accepted.load(Ordering::SeqCst) + *dropped.lock().unwrap();
                let sent = books.ledger.sent();
                if answered == N {
                    break;
                }
                if sent < N && sent < answered + AHEAD {
                    books.send((1 + dice.roll(20)).min(N - sent));
                }
                books.ledger.collect(books.receiver).unwrap();
                assert!(
                    begin.elapsed() < 6 * TIMEOUT,
                    "{answered} of {sent} answered"
                );
                assert!(!receiver.is_finished());
            }
            is_over.store(true, Ordering::SeqCst);
        });
        here.write_all(b"q").unwrap();
        assert!(child.unwrap().wait().unwrap());
        books.assert_balanced(0, 0);
        books.expect_refusals(&socket, &[], ErrorKind::NoSuchPacket);
        eprintln!("{accepted:?} accepted, {dropped:?} dropped");
    });
}
