//! Event loops that are not ours: mio and async-io, by the descriptor

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
