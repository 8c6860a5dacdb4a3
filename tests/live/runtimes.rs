//! Event loops of other libraries: mio and async-io by the descriptor, tokio by its feature

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use async_io::{Async, Timer};
use futures_lite::future;
use mio::unix::SourceFd;
use mio::{Interest, Poll, Token};
use nfqnl::{Event, RecvBatch, Socket, Verdict};
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::traffic::TIMEOUT;

use crate::lab::{Lab, QUEUE, Watchdog, is_silent, number};

/// A setting receives the packet, and the loop is woken for it
#[test]
fn an_edge_triggered_loop_gets_all_packets() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        let mut poll = Poll::new().unwrap();
        let fd = socket.as_raw_fd();
        let registry = poll.registry();
        registry
            .register(&mut SourceFd(&fd), Token(0), Interest::READABLE)
            .unwrap();
        let mut ready = mio::Events::with_capacity(1);
        assert!(is_silent(&socket, &mut batch));
        poll.poll(&mut ready, Some(Duration::from_millis(50)))
            .unwrap();

        for round in 0..10_u32 {
            lab.send(&round.to_be_bytes());
            // The packet's edge is spent before the setting receives the packet.
            poll.poll(&mut ready, Some(TIMEOUT)).unwrap();
            queue.set_maxlen(10 + round).unwrap();
            poll.poll(&mut ready, Some(TIMEOUT)).unwrap();
            assert!(!ready.is_empty(), "asleep while a packet is set aside");
            let mut seen = 0;
            for packet in socket
                .try_recv(&mut batch)
                .unwrap()
                .filter_map(Event::packet)
            {
                assert_eq!(number(&packet), round);
                seen += 1;
            }
            assert_eq!(seen, 1);
            assert!(is_silent(&socket, &mut batch), "the loop reads all of it");
        }
    });
}

/// The same while another thread changes settings: an edge comes only once
#[test]
fn settings_of_a_thread_spend_no_edge() {
    isolated(|| {
        const N: u32 = 500;
        let _watchdog = Watchdog::new(Duration::from_secs(60));
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let mut poll = Poll::new().unwrap();
        let fd = socket.as_raw_fd();
        poll.registry()
            .register(&mut SourceFd(&fd), Token(0), Interest::READABLE)
            .unwrap();
        let mut ready = mio::Events::with_capacity(1);
        let mut batch = RecvBatch::default();
        thread::scope(|scope| {
            scope.spawn(|| {
                for number in 0..N {
                    lab.send(&number.to_be_bytes());
                    queue.set_maxlen(1000 + number).unwrap();
                    // The next packet is sent only when this one has been answered.
                    lab.expect_numbered([number]);
                }
            });
            let mut next = 0;
            while next < N {
                poll.poll(&mut ready, Some(TIMEOUT)).unwrap();
                assert!(!ready.is_empty(), "asleep while packet {next} waits");
                // The documented loop: until a call has no events
                loop {
                    let mut is_empty = true;
                    for event in socket.try_recv(&mut batch).unwrap() {
                        is_empty = false;
                        let packet = event.packet().expect("only packets were sent");
                        assert_eq!(number(&packet), next);
                        socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
                        next += 1;
                    }
                    if is_empty {
                        break;
                    }
                }
            }
        });
    });
}

/// A level-triggered loop: `try_recv` once per report of the descriptor
#[test]
fn a_level_triggered_loop_gets_all_packets() {
    isolated(|| {
        const N: u32 = 500;
        let _watchdog = Watchdog::new(Duration::from_secs(60));
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let is_over = AtomicBool::new(false);
        let mut batch = RecvBatch::default();
        thread::scope(|scope| {
            scope.spawn(|| {
                for number in 0..N {
                    lab.send(&number.to_be_bytes());
                    queue.set_maxlen(1000 + number).unwrap();
                    lab.expect_numbered([number]);
                }
                is_over.store(true, Ordering::SeqCst);
            });
            let mut next = 0;
            while !is_over.load(Ordering::SeqCst) {
                if !crate::lab::is_readable(&socket) {
                    continue;
                }
                for event in socket.try_recv(&mut batch).unwrap() {
                    let packet = event.packet().expect("only packets were sent");
                    assert_eq!(number(&packet), next);
                    socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
                    next += 1;
                }
            }
            assert_eq!(next, N);
        });
        // What is left to read are answers at most, and reading them ends.
        for _ in 0..3 {
            assert_eq!(socket.try_recv(&mut batch).unwrap().count(), 0);
        }
        assert!(!crate::lab::is_readable(&socket), "a loop would spin");
    });
}

/// async-io arms the descriptor anew for each wait
#[test]
fn an_async_io_task_gets_packets_of_a_setting() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Async::new(Socket::open().unwrap()).unwrap();
        let queue = socket.get_ref().bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        async_io::block_on(async {
            for round in 0..10_u32 {
                assert!(is_silent(socket.get_ref(), &mut batch));
                // The wait begins before the packet comes and the setting receives it, or
                // afterwards.
                let mut readable = std::pin::pin!(socket.readable());
                if round % 2 == 0 {
                    assert!(future::poll_once(&mut readable).await.is_none());
                }
                lab.send(&round.to_be_bytes());
                queue.set_maxlen(10 + round).unwrap();
                let in_time = future::or(async { Some(readable.await) }, async {
                    Timer::after(TIMEOUT).await;
                    None
                });
                in_time.await.expect("the wait ends").unwrap();
                let events = socket.get_ref().try_recv(&mut batch).unwrap();
                let packets = events.filter_map(Event::packet);
                let numbers: Vec<_> = packets.map(|packet| number(&packet)).collect();
                assert_eq!(numbers, [round]);
            }
        });
    });
}

#[cfg(feature = "tokio")]
mod tokio {
    use std::future::Future;
    use std::pin::pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    use std::thread;
    use std::time::{Duration, Instant};

    use futures_lite::{StreamExt, future};
    use nfqnl::{
        AsyncSocket, Event, OwnedPacket, PacketStream, RecvBatch, SendBatch, Socket, Verdict,
    };
    use nfqnl_testkit::cpu;
    use nfqnl_testkit::netns::isolated;
    use nfqnl_testkit::traffic::TIMEOUT;
    use tokio::runtime::{Builder, Runtime};
    use tokio::time::{sleep, timeout};

    use crate::lab::{
        Dice, Lab, QUEUE, is_silent, next_packet, number, steal_past_the_library, udp_payload,
    };

    fn one_thread() -> Runtime {
        Builder::new_current_thread().enable_all().build().unwrap()
    }

    fn several_threads() -> Runtime {
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(4).enable_all().build().unwrap()
    }

    /// Needs a runtime
    fn open() -> AsyncSocket {
        AsyncSocket::new(Socket::open().unwrap()).unwrap()
    }

    async fn in_time<T>(future: impl Future<Output = T>) -> T {
        timeout(TIMEOUT, future).await.expect("in time")
    }

    /// The numbers of the next packets: at least one
    async fn numbers(socket: &AsyncSocket, batch: &mut RecvBatch) -> Vec<u32> {
        let receive = async {
            loop {
                let events = socket.recv(batch).await.unwrap();
                let packets = events.map(|event| event.packet().expect("only packets were sent"));
                let numbers: Vec<_> = packets.map(|packet| number(&packet)).collect();
                if !numbers.is_empty() {
                    return numbers;
                }
            }
        };
        in_time(receive).await
    }

    async fn next(packets: &mut PacketStream<'_>) -> OwnedPacket {
        in_time(packets.next()).await.unwrap().unwrap()
    }

    #[test]
    fn a_task_gets_packets_of_a_setting() {
        isolated(|| {
            one_thread().block_on(async {
                let lab = Lab::new();
                let socket = open();
                let queue = socket.get_ref().bind(QUEUE).unwrap();
                let mut batch = RecvBatch::default();
                for round in 0..12_u32 {
                    // The wait begins before the packet comes and the setting receives it, or
                    // afterwards. The runtime has noticed the packet, or has not.
                    let mut received = pin!(numbers(&socket, &mut batch));
                    if round % 2 == 0 {
                        assert!(future::poll_once(&mut received).await.is_none());
                    }
                    lab.send(&round.to_be_bytes());
                    if round % 3 == 0 {
                        sleep(Duration::from_millis(1)).await;
                    }
                    queue.set_maxlen(10 + round).unwrap();
                    assert_eq!(received.await, [round]);
                }
            });
        });
    }

    #[test]
    fn a_task_gets_packets_of_a_threads_settings() {
        isolated(|| {
            const N: u32 = 300;
            let lab = Lab::new();
            let runtime = several_threads();
            let _in_runtime = runtime.enter();
            let socket = Arc::new(open());
            let queue = socket.get_ref().bind(QUEUE).unwrap();
            let receiver = runtime.spawn({
                let socket = socket.clone();
                async move {
                    let (mut batch, mut next) = (RecvBatch::default(), 0);
                    while next < N {
                        for event in in_time(socket.recv(&mut batch)).await.unwrap() {
                            let packet = event.packet().expect("only packets were sent");
                            assert_eq!(number(&packet), next);
                            next += 1;
                            socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
                        }
                    }
                }
            });
            for number in 0..N {
                lab.send(&number.to_be_bytes());
                queue.set_maxlen(1000 + number).unwrap();
                lab.expect_numbered([number]);
            }
            runtime.block_on(receiver).unwrap();
        });
    }

    #[test]
    fn a_dropped_receive_call_loses_no_packet() {
        isolated(|| {
            const ROUND: u32 = 500;
            const DROPPED: u32 = 200;
            let lab = Lab::new();
            let runtime = several_threads();
            let _in_runtime = runtime.enter();
            let socket = open();
            let _queue = socket.get_ref().bind(QUEUE).unwrap();
            let received = AtomicU32::new(0);
            let (mut dice, mut batch) = (Dice(1), RecvBatch::default());
            let (mut dropped, mut next, mut total) = (0, 0, 0);
            // The scheduler decides how many are dropped in a round.
            while dropped < DROPPED {
                total += ROUND;
                let receive_all = async {
                    while next < total {
                        let (polls, by_timer) = (dice.roll(4), dice.roll(4) == 0);
                        let give_up = async {
                            if by_timer {
                                sleep(Duration::from_millis(1)).await;
                            }
                            for _ in 0..polls {
                                future::yield_now().await;
                            }
                        };
                        tokio::select! {
                            biased;
                            events = socket.recv(&mut batch) => {
                                // Some of them; the others come with the next call.
                                let some = usize::try_from(1 + dice.roll(8)).unwrap();
                                let packets = events.unwrap().filter_map(Event::packet);
                                for packet in packets.take(some) {
                                    assert_eq!(number(&packet), next);
                                    next += 1;
                                    socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
                                }
                                received.store(next, Ordering::SeqCst);
                            }
                            () = give_up => dropped += 1,
                        }
                    }
                };
                thread::scope(|scope| {
                    scope.spawn(|| lab.send_in_bursts(total - ROUND..total, &received));
                    runtime.block_on(receive_all);
                });
            }
            let stats = socket.get_ref().stats();
            assert_eq!((stats.packets, stats.missing_packets), (total.into(), 0));
            assert_eq!(lab.drain(), usize::try_from(total).unwrap());
        });
    }

    #[test]
    fn a_dropped_stream_loses_no_packet() {
        isolated(|| {
            const N: u32 = 1000;
            let lab = Lab::new();
            let received = AtomicU32::new(0);
            let mut dice = Dice(3);
            let mut next_number = 0;
            thread::scope(|scope| {
                several_threads().block_on(async {
                    let socket = open();
                    let _queue = socket.get_ref().bind(QUEUE).unwrap();
                    scope.spawn(|| lab.send_in_bursts(0..N, &received));
                    while next_number < N {
                        let mut packets = socket.packets();
                        for _ in 0..dice.roll(30) {
                            match timeout(Duration::from_millis(1), packets.next()).await {
                                Ok(packet) => {
                                    let packet = packet.unwrap().unwrap();
                                    assert_eq!(number(&packet.packet()), next_number);
                                    next_number += 1;
                                    received.store(next_number, Ordering::SeqCst);
                                    socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
                                }
                                Err(_) => assert!(next_number <= N),
                            }
                        }
                    }
                    let stats = socket.get_ref().stats();
                    assert_eq!((stats.packets, stats.missing_packets), (N.into(), 0));
                });
            });
            assert_eq!(lab.drain(), usize::try_from(N).unwrap());
        });
    }

    /// The backlog fills most of a small receive buffer: each answered packet brings another one
    #[test]
    fn a_stream_made_anew_per_packet_loses_none() {
        isolated(|| {
            const N: u32 = 2000;
            // This many fill most of the buffer on s390x, where a message takes more of it.
            const CASES: [(u32, usize); 2] = [(40, 1400), (100, 4)];
            let lab = Lab::new();
            one_thread().block_on(async {
                for (backlog, len) in CASES {
                    let builder = Socket::builder().recv_buffer(106_496);
                    let socket = AsyncSocket::new(builder.open().unwrap()).unwrap();
                    let queue = socket.get_ref().bind(QUEUE).unwrap();
                    let send = |number: u32| {
                        let mut payload = vec![0; len];
                        payload[..4].copy_from_slice(&number.to_be_bytes());
                        lab.send(&payload);
                    };
                    (0..backlog).for_each(send);
                    for expected in 0..N {
                        let packet = next(&mut socket.packets()).await;
                        let number = &udp_payload(&packet.packet())[..4];
                        assert_eq!(number, expected.to_be_bytes(), "lost");
                        socket.set_verdict(packet.key(), Verdict::Drop).unwrap();
                        if expected + backlog < N {
                            send(expected + backlog);
                        }
                    }
                    let stats = socket.get_ref().stats();
                    assert_eq!((stats.packets, stats.overruns), (N.into(), 0));
                    queue.destroy().unwrap();
                }
            });
        });
    }

    /// Each dropped stream leaves packets behind, and the task has to be woken for them
    #[test]
    fn dropped_streams_pile_up_no_wakes() {
        isolated(|| {
            const N: u32 = 60;
            let lab = Lab::new();
            one_thread().block_on(async {
                let socket = open();
                let queue = socket.get_ref().bind(QUEUE).unwrap();
                lab.send_numbered(0..N);
                queue.set_maxlen(1000).unwrap(); // sets them aside
                for expected in 0..N - 1 {
                    let packet = next(&mut socket.packets()).await;
                    assert_eq!(number(&packet.packet()), expected);
                }
                let datagrams =
                    std::iter::from_fn(|| steal_past_the_library(&socket).then_some(()));
                assert!(datagrams.count() <= 1);
                let packet = next(&mut socket.packets()).await;
                assert_eq!(number(&packet.packet()), N - 1);
            });
        });
    }

    #[test]
    fn packets_of_a_stream_are_answered_in_any_order() {
        isolated(|| {
            const N: u32 = 100;
            let lab = Lab::new();
            one_thread().block_on(async {
                let socket = open();
                let _queue = socket.get_ref().bind(QUEUE).unwrap();
                let mut packets = socket.packets();
                let mut kept = Vec::new();
                for round in 0..N {
                    lab.send(&round.to_be_bytes());
                    kept.push(next(&mut packets).await);
                }
                // The kernel delivers in the order of the verdicts only if all are sent from one
                // CPU.
                let cpu = cpu::allowed().unwrap()[0];
                let verdicts = || {
                    for (round, packet) in kept.iter().enumerate().rev() {
                        assert_eq!(usize::try_from(number(&packet.packet())), Ok(round));
                        socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
                    }
                };
                cpu::on(cpu, verdicts).unwrap();
            });
            lab.expect_numbered((0..N).rev());
        });
    }

    #[test]
    fn packets_not_yielded_by_a_stream_come_next() {
        isolated(|| {
            let lab = Lab::new();
            one_thread().block_on(async {
                let socket = open();
                let queue = socket.get_ref().bind(QUEUE).unwrap();
                let mut batch = RecvBatch::default();
                for is_set_aside in [false, true] {
                    lab.send_numbered(0..3);
                    if is_set_aside {
                        queue.set_maxlen(100).unwrap();
                    }
                    for expected in [0, 1] {
                        let packet = next(&mut socket.packets()).await;
                        assert_eq!(number(&packet.packet()), expected);
                    }
                    lab.send_numbered(3..5);
                    let mut all = Vec::new();
                    while all.len() < 3 {
                        all.extend(numbers(&socket, &mut batch).await);
                    }
                    assert_eq!(all, [2, 3, 4]);
                    assert!(is_silent(socket.get_ref(), &mut batch));
                }
            });
        });
    }

    #[test]
    fn an_overrun_not_reached_by_a_stream_comes_next() {
        isolated(|| {
            let lab = Lab::new();
            one_thread().block_on(async {
                let small = Socket::builder().recv_buffer(1 << 14).open().unwrap();
                let socket = AsyncSocket::new(small).unwrap();
                let queue = socket.get_ref().bind(QUEUE).unwrap();
                lab.send_numbered(0..1);
                queue.set_maxlen(500).unwrap();
                lab.send_numbered(1..200);
                queue.set_maxlen(500).expect_err("its answer is lost");
                let packet = next(&mut socket.packets()).await;
                assert_eq!(number(&packet.packet()), 0);
                let mut batch = RecvBatch::default();
                let mut next_event = async || {
                    loop {
                        let event = in_time(socket.recv(&mut batch)).await.unwrap().next();
                        match event {
                            Some(Event::Packet(packet)) => return Some(number(&packet)),
                            Some(Event::Overrun) => return None,
                            Some(other) => panic!("{other:?}"),
                            None => {}
                        }
                    }
                };
                assert_eq!(next_event().await, None, "an overrun");
                assert_eq!(next_event().await, Some(1));
            });
        });
    }

    #[test]
    fn a_task_sends_a_batch_of_verdicts() {
        isolated(|| {
            const N: u32 = 50;
            let lab = Lab::new();
            let runtime = several_threads();
            let sent = runtime.spawn(async move {
                let socket = open();
                let queue = socket.bind(QUEUE).await.unwrap();
                let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
                lab.send_numbered(0..N);
                let mut seen = 0;
                while seen < N {
                    let events = in_time(socket.recv(&mut batch)).await.unwrap();
                    for packet in events.filter_map(Event::packet) {
                        verdicts.push(packet.key(), Verdict::Accept).unwrap();
                        seen += 1;
                    }
                    socket.send(&mut verdicts).unwrap();
                    assert!(verdicts.is_empty());
                }
                socket.get_ref().sync().unwrap();
                assert!(
                    is_silent(socket.get_ref(), &mut batch),
                    "a verdict was refused"
                );
                assert_eq!(lab.drain(), usize::try_from(N).unwrap());

                lab.send(b"dropped with its queue");
                let key = in_time(socket.packets().next()).await.unwrap();
                verdicts.push(key.unwrap().key(), Verdict::Accept).unwrap();
                queue.destroy().unwrap();
                socket.send(&mut verdicts).unwrap();
                assert_eq!(socket.get_ref().stats().late_verdicts, 1);
            });
            runtime.block_on(sent).unwrap();
        });
    }

    /// Each packet goes to one of them, and none of them sleeps while packets are there
    #[test]
    fn many_tasks_receive_from_one_socket() {
        isolated(|| {
            const N: u32 = 1000;
            let lab = Lab::new();
            let received = Arc::new(AtomicU32::new(0));
            let runtime = several_threads();
            runtime.block_on(async {
                let socket = Arc::new(open());
                let _queue = socket.get_ref().bind(QUEUE).unwrap();
                let tasks: Vec<_> = (0..8)
                    .map(|_| {
                        let (socket, received) = (socket.clone(), received.clone());
                        tokio::spawn(async move {
                            let mut batch = RecvBatch::new(2, RecvBatch::DEFAULT_SLOT_LEN);
                            loop {
                                let events = socket.recv(&mut batch).await.unwrap();
                                for packet in events.filter_map(Event::packet) {
                                    socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
                                    received.fetch_add(1, Ordering::SeqCst);
                                }
                            }
                        })
                    })
                    .collect();
                thread::scope(|scope| {
                    scope.spawn(|| lab.send_in_bursts(0..N, &received));
                });
                let all = async {
                    while received.load(Ordering::SeqCst) < N {
                        sleep(Duration::from_millis(1)).await;
                    }
                };
                in_time(all).await;
                tasks.iter().for_each(tokio::task::JoinHandle::abort);
                let stats = socket.get_ref().stats();
                assert_eq!((stats.packets, stats.missing_packets), (N.into(), 0));
            });
            assert_eq!(lab.drain(), usize::try_from(N).unwrap());
        });
    }

    /// A repeated packet is back at once
    #[test]
    fn a_loop_that_never_waits_lets_other_tasks_run() {
        isolated(|| {
            let lab = Lab::new();
            one_thread().block_on(async {
                let socket = open();
                let _queue = socket.get_ref().bind(QUEUE).unwrap();
                let mut batch = RecvBatch::default();
                lab.send(b"round and round");
                let first = next(&mut socket.packets()).await; // waits for the runtime once
                socket.set_verdict(first.key(), Verdict::Repeat).unwrap();

                let has_run = Arc::new(AtomicBool::new(false));
                tokio::spawn({
                    let has_run = has_run.clone();
                    async move { has_run.store(true, Ordering::SeqCst) }
                });
                let mut rounds = 0;
                while !has_run.load(Ordering::SeqCst) {
                    assert!(rounds < 10_000, "the other task never ran");
                    let events = socket.recv(&mut batch).await.unwrap();
                    for packet in events.filter_map(Event::packet) {
                        socket.set_verdict(packet.key(), Verdict::Repeat).unwrap();
                        rounds += 1;
                    }
                }
                assert!(rounds > 0);
            });
        });
    }

    /// The same for a stream
    #[test]
    fn a_stream_that_never_waits_lets_other_tasks_run() {
        isolated(|| {
            let lab = Lab::new();
            one_thread().block_on(async {
                let socket = open();
                let _queue = socket.get_ref().bind(QUEUE).unwrap();
                lab.send(b"round and round");
                let has_run = Arc::new(AtomicBool::new(false));
                tokio::spawn({
                    let has_run = has_run.clone();
                    async move { has_run.store(true, Ordering::SeqCst) }
                });
                let mut packets = socket.packets();
                let mut rounds = 0;
                while !has_run.load(Ordering::SeqCst) {
                    assert!(rounds < 10_000, "the other task never ran");
                    let packet = packets.next().await.unwrap().unwrap();
                    socket.set_verdict(packet.key(), Verdict::Repeat).unwrap();
                    rounds += 1;
                }
            });
        });
    }

    #[test]
    fn events_left_in_a_batch_need_no_socket() {
        isolated(|| {
            let lab = Lab::new();
            one_thread().block_on(async {
                let socket = open();
                let _queue = socket.get_ref().bind(QUEUE).unwrap();
                let (mut batch, mut other) = (RecvBatch::default(), RecvBatch::default());
                lab.send_numbered(0..3);
                while !batch.has_events() {
                    drop(in_time(socket.recv(&mut batch)).await.unwrap());
                }
                assert!(batch.events().next().is_some());
                let mut all = Vec::new();
                while all.len() < 2 {
                    all.extend(numbers(&socket, &mut batch).await);
                }
                assert_eq!(all, [1, 2]);

                lab.send_numbered(0..1);
                while !batch.has_events() {
                    drop(in_time(socket.recv(&mut batch)).await.unwrap());
                }
                let waiting = future::poll_once(socket.recv(&mut other)).await;
                assert!(waiting.is_none(), "the socket is empty");
                assert_eq!(numbers(&socket, &mut batch).await, [0]);
            });
        });
    }

    #[test]
    fn a_socket_comes_back_from_the_runtime() {
        isolated(|| {
            let lab = Lab::new();
            let mut socket = Socket::open().unwrap();
            let _queue = socket.bind(QUEUE).unwrap();
            let mut batch = RecvBatch::default();
            for round in 0..3_u32 {
                socket = one_thread().block_on(async {
                    let in_runtime = AsyncSocket::new(socket).unwrap();
                    lab.send(&round.to_be_bytes());
                    assert_eq!(numbers(&in_runtime, &mut batch).await, [round]);
                    in_runtime.into_inner()
                });
                lab.send(b"outside");
                assert_eq!(udp_payload(&next_packet(&socket, &mut batch)), b"outside");
            }
            socket.close().unwrap();
        });
    }

    /// Binding a number again waits for the kernel; the runtime's only thread does not wait
    #[test]
    fn a_bind_does_not_block_the_runtime() {
        isolated(|| {
            const ROUNDS: u32 = 20;
            let lab = Lab::new();
            one_thread().block_on(async {
                let socket = open();
                let ticks = Arc::new(AtomicU32::new(0));
                tokio::spawn({
                    let ticks = ticks.clone();
                    async move {
                        loop {
                            sleep(Duration::from_millis(1)).await;
                            ticks.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                });
                let config = nfqnl::QueueConfig::new().maxlen(100);
                let (mut waited, mut ticked) = (Duration::ZERO, 0);
                for round in 0..ROUNDS {
                    let (begin, before) = (Instant::now(), ticks.load(Ordering::SeqCst));
                    let queue = match round % 2 {
                        0 => in_time(socket.bind(QUEUE)).await.unwrap(),
                        _ => in_time(socket.bind_with(QUEUE, &config)).await.unwrap(),
                    };
                    waited += begin.elapsed();
                    ticked += ticks.load(Ordering::SeqCst) - before;
                    queue.destroy().unwrap();
                }
                println!("{ticked} ticks in {waited:?}");
                // A timer of tokio's takes up to two milliseconds. A blocked thread has no ticks.
                let expected = u128::from(ROUNDS).min(waited.as_millis() / 8);
                assert!(u128::from(ticked) >= expected, "{ticked} in {waited:?}");
                let _queue = in_time(socket.bind(QUEUE)).await.unwrap();
                lab.send_numbered(0..1);
                let mut batch = RecvBatch::default();
                assert_eq!(numbers(&socket, &mut batch).await, [0]);
            });
        });
    }

    /// Wakers end blocking calls only: a task goes on waiting, and does not spin
    #[test]
    fn a_waker_does_not_disturb_a_task() {
        isolated(|| {
            let lab = Lab::new();
            one_thread().block_on(async {
                let socket = open();
                let _queue = socket.get_ref().bind(QUEUE).unwrap();
                let waker = socket.get_ref().waker();
                let mut batch = RecvBatch::default();
                for round in 0..3 {
                    let mut received = pin!(numbers(&socket, &mut batch));
                    assert!(future::poll_once(&mut received).await.is_none());
                    waker.wake();
                    waker.wake_all();
                    let begin = cpu::time();
                    let wait = Duration::from_millis(200);
                    assert!(timeout(wait, &mut received).await.is_err());
                    let took = cpu::time() - begin;
                    assert!(took < wait / 2, "it runs all the time: {took:?}");
                    lab.send_numbered(round..round + 1);
                    assert_eq!(received.await, [round]);
                }
            });
        });
    }
}
