//! Event loops that are not ours: mio and async-io by the descriptor, tokio by the feature of that name

use std::os::fd::AsRawFd;
use std::time::Duration;

use async_io::{Async, Timer};
use futures_lite::future;
use mio::unix::SourceFd;
use mio::{Interest, Poll, Token};
use nfqnl::{Handle, RecvBatch};
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::traffic::TIMEOUT;

use crate::lab::{Lab, QUEUE, is_silent, udp_payload};

/// A loop that sleeps on the descriptor is woken for what a configuration call has read
#[test]
fn an_edge_triggered_loop_gets_packets_that_a_setting_met() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        let mut poll = Poll::new().unwrap();
        let fd = handle.as_raw_fd();
        let registry = poll.registry();
        registry
            .register(&mut SourceFd(&fd), Token(0), Interest::READABLE)
            .unwrap();
        let mut ready = mio::Events::with_capacity(1);
        assert!(is_silent(&handle, &mut batch));
        poll.poll(&mut ready, Some(Duration::from_millis(50)))
            .unwrap();

        for round in 0..10_u32 {
            lab.send(&round.to_be_bytes());
            // The packet's edge is spent before the setting reads the packet.
            poll.poll(&mut ready, Some(TIMEOUT)).unwrap();
            queue.set_maxlen(10 + round).unwrap();
            poll.poll(&mut ready, Some(TIMEOUT)).unwrap();
            assert!(!ready.is_empty(), "asleep while a packet is in the stash");
            let mut seen = 0;
            for packet in handle.try_recv(&mut batch).unwrap().packets() {
                assert_eq!(udp_payload(&packet), round.to_be_bytes());
                seen += 1;
            }
            assert_eq!(seen, 1);
            assert!(is_silent(&handle, &mut batch), "and the loop drains it");
        }
    });
}

/// The same for async-io, whose reactor arms the descriptor anew for each wait
#[test]
fn an_async_io_task_gets_packets_that_a_setting_met() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Async::new(Handle::open().unwrap()).unwrap();
        let queue = handle.get_ref().bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        async_io::block_on(async {
            for round in 0..10_u32 {
                assert!(is_silent(handle.get_ref(), &mut batch));
                // The wait has begun before the packet comes and the setting reads it, or begins afterwards.
                let mut readable = std::pin::pin!(handle.readable());
                if round % 2 == 0 {
                    assert!(future::poll_once(&mut readable).await.is_none());
                }
                lab.send(&round.to_be_bytes());
                queue.set_maxlen(10 + round).unwrap();
                let in_time = future::or(async { Some(readable.await) }, async {
                    Timer::after(TIMEOUT).await;
                    None
                });
                in_time.await.expect("no wait without an end").unwrap();
                let events = handle.get_ref().try_recv(&mut batch).unwrap();
                let payloads: Vec<_> = events.packets().map(|p| udp_payload(&p).to_vec()).collect();
                assert_eq!(payloads, [round.to_be_bytes()]);
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
    use std::time::Duration;

    use futures_lite::{StreamExt, future};
    use nfqnl::{
        AsyncHandle, Error, Event, Handle, OwnedPacket, Packet, PacketStream, RecvBatch, Verdict,
        VerdictBatch,
    };
    use nfqnl_testkit::cpu;
    use nfqnl_testkit::netns::isolated;
    use nfqnl_testkit::traffic::TIMEOUT;
    use tokio::runtime::{Builder, Runtime};
    use tokio::time::{sleep, timeout};

    use crate::lab::{Dice, Lab, QUEUE, is_silent, next_packet, udp_payload};

    fn one_thread() -> Runtime {
        Builder::new_current_thread().enable_all().build().unwrap()
    }

    fn several_threads() -> Runtime {
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(4).enable_all().build().unwrap()
    }

    /// Within a runtime
    fn open() -> AsyncHandle {
        AsyncHandle::new(Handle::open().unwrap()).unwrap()
    }

    fn number(packet: &Packet<'_>) -> u32 {
        u32::from_be_bytes(udp_payload(packet).try_into().unwrap())
    }

    async fn in_time<T>(future: impl Future<Output = T>) -> T {
        timeout(TIMEOUT, future).await.expect("in time")
    }

    /// The next batch's numbers
    async fn numbers(handle: &AsyncHandle, batch: &mut RecvBatch) -> Vec<u32> {
        let events = in_time(handle.recv(batch)).await.unwrap();
        events.packets().map(|packet| number(&packet)).collect()
    }

    async fn next(packets: &mut PacketStream<'_>) -> OwnedPacket {
        in_time(packets.next()).await.unwrap().unwrap()
    }

    #[test]
    fn a_task_gets_packets_that_a_setting_met() {
        isolated(|| {
            one_thread().block_on(async {
                let lab = Lab::new();
                let handle = open();
                let queue = handle.get_ref().bind_queue(QUEUE).unwrap();
                let mut batch = RecvBatch::default();
                for round in 0..12_u32 {
                    // The wait has begun before the packet comes and the setting reads it, or begins afterwards; and
                    // the runtime has seen the packet come, or has not.
                    let mut events = pin!(handle.recv(&mut batch));
                    if round % 2 == 0 {
                        assert!(future::poll_once(&mut events).await.is_none());
                    }
                    lab.send(&round.to_be_bytes());
                    if round % 3 == 0 {
                        sleep(Duration::from_millis(1)).await;
                    }
                    queue.set_maxlen(10 + round).unwrap();
                    let events = in_time(events).await.unwrap();
                    let numbers: Vec<_> = events.packets().map(|packet| number(&packet)).collect();
                    assert_eq!(numbers, [round]);
                }
            });
        });
    }

    #[test]
    fn a_task_that_waits_gets_packets_that_settings_of_another_thread_met() {
        isolated(|| {
            const N: u32 = 300;
            let lab = Lab::new();
            let runtime = several_threads();
            let _in_runtime = runtime.enter();
            let handle = Arc::new(open());
            let queue = handle.get_ref().bind_queue(QUEUE).unwrap();
            let receiver = runtime.spawn({
                let handle = handle.clone();
                async move {
                    let (mut batch, mut next) = (RecvBatch::default(), 0);
                    while next < N {
                        for packet in in_time(handle.recv(&mut batch)).await.unwrap().packets() {
                            assert_eq!(number(&packet), next);
                            next += 1;
                            handle.verdict(packet.key(), Verdict::Accept).unwrap();
                        }
                    }
                }
            });
            for number in 0..N {
                lab.send(&number.to_be_bytes());
                queue.set_maxlen(1000 + number).unwrap();
                assert_eq!(lab.recv().as_deref(), Some(&number.to_be_bytes()[..]));
            }
            runtime.block_on(receiver).unwrap();
        });
    }

    #[test]
    fn a_receive_call_dropped_at_any_moment_loses_no_packet() {
        isolated(|| {
            const ROUND: u32 = 500;
            const DROPPED: u32 = 200;
            let lab = Lab::new();
            let runtime = several_threads();
            let _in_runtime = runtime.enter();
            let handle = open();
            let _queue = handle.get_ref().bind_queue(QUEUE).unwrap();
            let received = AtomicU32::new(0);
            let (mut dice, mut batch) = (Dice(1), RecvBatch::default());
            let (mut dropped, mut next, mut total) = (0, 0, 0);
            // How many are dropped in a round is up to the scheduler.
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
                            events = handle.recv(&mut batch) => {
                                // Some of them; the others come with the next call.
                                let some = usize::try_from(1 + dice.roll(8)).unwrap();
                                for packet in events.unwrap().packets().take(some) {
                                    assert_eq!(number(&packet), next);
                                    next += 1;
                                    handle.verdict(packet.key(), Verdict::Accept).unwrap();
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
            let stats = handle.get_ref().stats();
            assert_eq!((stats.packets, stats.lost_packets), (total.into(), 0));
            assert_eq!(lab.drain(), usize::try_from(total).unwrap());
        });
    }

    #[test]
    fn a_stream_dropped_at_any_moment_loses_no_packet() {
        isolated(|| {
            const N: u32 = 1000;
            let lab = Lab::new();
            let received = AtomicU32::new(0);
            let mut dice = Dice(3);
            let mut next_number = 0;
            thread::scope(|scope| {
                several_threads().block_on(async {
                    let handle = open();
                    let _queue = handle.get_ref().bind_queue(QUEUE).unwrap();
                    scope.spawn(|| lab.send_in_bursts(0..N, &received));
                    while next_number < N {
                        let mut packets = handle.packets();
                        for _ in 0..dice.roll(30) {
                            match timeout(Duration::from_millis(1), packets.next()).await {
                                Ok(packet) => {
                                    let packet = packet.unwrap().unwrap();
                                    assert_eq!(number(&packet.packet()), next_number);
                                    next_number += 1;
                                    received.store(next_number, Ordering::SeqCst);
                                    handle.verdict(packet.key(), Verdict::Accept).unwrap();
                                }
                                Err(_) => assert!(next_number <= N),
                            }
                        }
                    }
                    let stats = handle.get_ref().stats();
                    assert_eq!((stats.packets, stats.lost_packets), (N.into(), 0));
                });
            });
            assert_eq!(lab.drain(), usize::try_from(N).unwrap());
        });
    }

    #[test]
    fn packets_of_a_stream_can_be_kept_and_answered_in_any_order() {
        isolated(|| {
            const N: u32 = 100;
            let lab = Lab::new();
            one_thread().block_on(async {
                let handle = open();
                let _queue = handle.get_ref().bind_queue(QUEUE).unwrap();
                let mut packets = handle.packets();
                let mut kept = Vec::new();
                for round in 0..N {
                    lab.send(&round.to_be_bytes());
                    kept.push(next(&mut packets).await);
                }
                // On one CPU, or what is accepted could be delivered in another order
                let cpu = cpu::allowed().unwrap()[0];
                let verdicts = || {
                    for (round, packet) in kept.iter().enumerate().rev() {
                        assert_eq!(usize::try_from(number(&packet.packet())), Ok(round));
                        handle.verdict(packet.key(), Verdict::Accept).unwrap();
                    }
                };
                cpu::on(cpu, verdicts).unwrap();
            });
            for round in (0..N).rev() {
                assert_eq!(lab.recv().as_deref(), Some(&round.to_be_bytes()[..]));
            }
        });
    }

    #[test]
    fn what_a_dropped_stream_has_not_yielded_is_received_next() {
        isolated(|| {
            let lab = Lab::new();
            one_thread().block_on(async {
                let handle = open();
                let queue = handle.get_ref().bind_queue(QUEUE).unwrap();
                let mut batch = RecvBatch::default();
                for stashed in [false, true] {
                    lab.send_numbered(0..3);
                    if stashed {
                        queue.set_maxlen(100).unwrap();
                    }
                    for expected in [0, 1] {
                        let packet = next(&mut handle.packets()).await;
                        assert_eq!(number(&packet.packet()), expected);
                    }
                    lab.send_numbered(3..5);
                    let mut all = Vec::new();
                    while all.len() < 3 {
                        all.extend(numbers(&handle, &mut batch).await);
                    }
                    assert_eq!(all, [2, 3, 4]);
                    assert!(is_silent(handle.get_ref(), &mut batch));
                }
            });
        });
    }

    #[test]
    fn an_overrun_that_a_dropped_stream_has_not_come_to_is_received_next() {
        isolated(|| {
            let lab = Lab::new();
            one_thread().block_on(async {
                let small = Handle::builder().recv_buffer(1 << 14).open().unwrap();
                let handle = AsyncHandle::new(small).unwrap();
                let queue = handle.get_ref().bind_queue(QUEUE).unwrap();
                lab.send_numbered(0..1);
                queue.set_maxlen(500).unwrap();
                lab.send_numbered(1..200);
                queue.set_maxlen(500).expect_err("its answer is lost");
                let packet = next(&mut handle.packets()).await;
                assert_eq!(number(&packet.packet()), 0);
                let mut batch = RecvBatch::default();
                let mut events = in_time(handle.recv(&mut batch)).await.unwrap();
                assert!(matches!(events.next(), Some(Event::Overrun)));
                assert_eq!(
                    events.packets().next().map(|packet| number(&packet)),
                    Some(1)
                );
            });
        });
    }

    #[test]
    fn verdicts_leave_a_batch_in_a_task() {
        isolated(|| {
            const N: u32 = 50;
            let lab = Lab::new();
            let runtime = several_threads();
            let sent = runtime.spawn(async move {
                let handle = open();
                let queue = handle.get_ref().bind_queue(QUEUE).unwrap();
                let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
                lab.send_numbered(0..N);
                let mut seen = 0;
                while seen < N {
                    for packet in in_time(handle.recv(&mut batch)).await.unwrap().packets() {
                        verdicts.push(packet.key(), Verdict::Accept).unwrap();
                        seen += 1;
                    }
                    drop(handle.send(&mut verdicts));
                    assert!(!verdicts.is_empty(), "unsent until it is polled");
                    handle.send(&mut verdicts).await.unwrap();
                    assert!(verdicts.is_empty());
                }
                handle.get_ref().sync().unwrap();
                assert!(is_silent(handle.get_ref(), &mut batch), "none was refused");
                assert_eq!(lab.drain(), usize::try_from(N).unwrap());

                lab.send(b"dropped with its queue");
                let key = in_time(handle.packets().next()).await.unwrap();
                verdicts.push(key.unwrap().key(), Verdict::Accept).unwrap();
                queue.destroy().unwrap();
                let error = handle.send(&mut verdicts).await.unwrap_err();
                assert!(matches!(error, Error::Stale { .. }), "{error}");
            });
            runtime.block_on(sent).unwrap();
        });
    }

    /// Each packet goes to one of them, and none of them sleeps while packets are there
    #[test]
    fn many_tasks_receive_from_one_handle() {
        isolated(|| {
            const N: u32 = 1000;
            let lab = Lab::new();
            let received = Arc::new(AtomicU32::new(0));
            let runtime = several_threads();
            runtime.block_on(async {
                let handle = Arc::new(open());
                let _queue = handle.get_ref().bind_queue(QUEUE).unwrap();
                let tasks: Vec<_> = (0..8)
                    .map(|_| {
                        let (handle, received) = (handle.clone(), received.clone());
                        tokio::spawn(async move {
                            let mut batch = RecvBatch::new(2, RecvBatch::DEFAULT_SLOT_LEN);
                            loop {
                                for packet in handle.recv(&mut batch).await.unwrap().packets() {
                                    handle.verdict(packet.key(), Verdict::Accept).unwrap();
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
                let stats = handle.get_ref().stats();
                assert_eq!((stats.packets, stats.lost_packets), (N.into(), 0));
            });
            assert_eq!(lab.drain(), usize::try_from(N).unwrap());
        });
    }

    /// A packet that is sent through its chain again is there at once
    #[test]
    fn a_loop_that_never_waits_lets_other_tasks_run() {
        isolated(|| {
            let lab = Lab::new();
            one_thread().block_on(async {
                let handle = open();
                let _queue = handle.get_ref().bind_queue(QUEUE).unwrap();
                let mut batch = RecvBatch::default();
                lab.send(b"round and round");
                let first = next(&mut handle.packets()).await; // which waits for the runtime to look, once
                handle.verdict(first.key(), Verdict::Repeat).unwrap();

                let has_run = Arc::new(AtomicBool::new(false));
                tokio::spawn({
                    let has_run = has_run.clone();
                    async move { has_run.store(true, Ordering::SeqCst) }
                });
                let mut rounds = 0;
                while !has_run.load(Ordering::SeqCst) {
                    assert!(rounds < 10_000, "the other task never ran");
                    for packet in handle.recv(&mut batch).await.unwrap().packets() {
                        handle.verdict(packet.key(), Verdict::Repeat).unwrap();
                        rounds += 1;
                    }
                }
                assert!(rounds > 0);
            });
        });
    }

    #[test]
    fn what_is_left_in_a_batch_is_there_without_the_socket() {
        isolated(|| {
            let lab = Lab::new();
            one_thread().block_on(async {
                let handle = open();
                let _queue = handle.get_ref().bind_queue(QUEUE).unwrap();
                let (mut batch, mut other) = (RecvBatch::default(), RecvBatch::default());
                lab.send_numbered(0..3);
                let mut events = in_time(handle.recv(&mut batch)).await.unwrap();
                assert!(events.next().is_some());
                let waiting = future::poll_once(handle.recv(&mut other)).await;
                assert!(waiting.is_none(), "the socket is empty");
                assert_eq!(numbers(&handle, &mut batch).await, [1, 2]);
            });
        });
    }

    #[test]
    fn a_handle_comes_back_from_the_runtime_and_goes_on() {
        isolated(|| {
            let lab = Lab::new();
            let mut handle = Handle::open().unwrap();
            let _queue = handle.bind_queue(QUEUE).unwrap();
            let mut batch = RecvBatch::default();
            for round in 0..3_u32 {
                handle = one_thread().block_on(async {
                    let in_runtime = AsyncHandle::new(handle).unwrap();
                    lab.send(&round.to_be_bytes());
                    assert_eq!(numbers(&in_runtime, &mut batch).await, [round]);
                    in_runtime.into_inner()
                });
                lab.send(b"outside");
                assert_eq!(udp_payload(&next_packet(&handle, &mut batch)), b"outside");
            }
            handle.close().unwrap();
        });
    }
}
