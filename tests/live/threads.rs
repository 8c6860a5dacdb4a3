//! Receiving in one thread, and verdicts from others

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use nfqnl::{Error, Handle, OwnedPacket, QueueStats, RecvBatch, Verdict, VerdictBatch};
use nfqnl_testkit::netns::{is_rootless, isolated};
use nfqnl_testkit::traffic::TIMEOUT;

use crate::lab::{Lab, QUEUE, is_silent, next_packet, udp_payload};

/// Two threads send each verdict by itself, two send batches
#[test]
fn verdicts_of_four_threads_while_another_receives_are_all_carried_out() {
    isolated(|| {
        const N: u32 = 2000;
        const WORKERS: usize = 4;
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let (received, accepted) = (AtomicU32::new(0), AtomicU32::new(0));
        thread::scope(|scope| {
            let workers: Vec<_> = (0..WORKERS)
                .map(|worker| {
                    let (give, work) = mpsc::channel::<OwnedPacket>();
                    let (sender, accepted) = (handle.verdict_sender(), &accepted);
                    scope.spawn(move || {
                        let mut verdicts = VerdictBatch::new();
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
                                    sender.verdict(packet.key(), verdict).unwrap();
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
                let deadline = Instant::now() + TIMEOUT;
                let before = count;
                for packet in handle
                    .recv_deadline(&mut batch, deadline)
                    .unwrap()
                    .packets()
                {
                    let worker = usize::try_from(count).unwrap() % WORKERS;
                    workers[worker].send(packet.into()).unwrap();
                    count += 1;
                }
                assert!(count > before, "{count} packets in time");
                received.store(count, Ordering::SeqCst);
            }
        });
        handle.sync().unwrap();
        assert!(
            is_silent(&handle, &mut RecvBatch::default()),
            "no verdict was refused"
        );
        let stats = handle.stats();
        assert_eq!((stats.packets, stats.lost_packets), (N.into(), 0));
        if !is_rootless() {
            let queue = QueueStats::read(QUEUE).unwrap().unwrap();
            assert_eq!(queue.waiting, 0);
        }
        let accepted = usize::try_from(accepted.into_inner()).unwrap();
        assert_eq!(lab.drain(), accepted);
    });
}

#[test]
fn a_sender_of_a_handle_that_is_closed_says_that_its_packets_are_gone() {
    isolated(|| {
        let lab = Lab::new();
        for close in [true, false] {
            let handle = Handle::open().unwrap();
            let queue = handle.bind_queue(QUEUE).unwrap();
            lab.send(b"dropped with its queue");
            let key = next_packet(&handle, &mut RecvBatch::default()).key();
            let sender = handle.verdict_sender();
            let mut verdicts = VerdictBatch::new();
            verdicts.push(key, Verdict::Accept).unwrap();
            if close {
                handle.close().unwrap();
            } else {
                drop(handle);
            }
            let is_stale = |result: nfqnl::Result<()>| matches!(result, Err(Error::Stale { key: stale, .. }) if stale == key);
            assert!(is_stale(sender.verdict(key, Verdict::Accept)));
            assert!(is_stale(sender.clone().send(&mut verdicts)));
            assert!(verdicts.is_empty(), "given up");
            sender.send(&mut verdicts).expect("nothing to send");
            drop(queue);
            assert!(lab.v4.is_silent());
        }
    });
}
