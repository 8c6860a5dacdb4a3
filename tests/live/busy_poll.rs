//! Receiving without blocking for a time before a wait

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use nfqnl::{RecvBatch, Socket, Verdict};
use nfqnl_testkit::cpu;
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::traffic::TIMEOUT;
use rustix::time::{ClockId, clock_gettime};

use crate::lab::{Lab, QUEUE, next_packet, number};

const LONG: Duration = Duration::from_secs(600);

fn busy(time: Duration) -> Socket {
    Socket::builder().busy_poll(time).open().unwrap()
}

/// Returns the CPU time of this thread
fn cpu_time() -> Duration {
    clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap()
}

/// Waits for nothing, and returns the time and the CPU time
fn wait_in_vain(socket: &Socket, timeout: Duration) -> (Duration, Duration) {
    let (begin, cpu) = (Instant::now(), cpu_time());
    let mut batch = RecvBatch::default();
    let events = socket.recv_timeout(&mut batch, timeout).unwrap();
    assert_eq!(events.count(), 0);
    (begin.elapsed(), cpu_time() - cpu)
}

fn has_two_cpus() -> bool {
    thread::available_parallelism().unwrap().get() > 1
}

#[test]
fn a_busy_call_keeps_its_deadline() {
    isolated(|| {
        let timeout = Duration::from_millis(100);
        for (time, is_busy) in [(LONG, true), (timeout / 4, false), (Duration::ZERO, false)] {
            let (waited, cpu) = wait_in_vain(&busy(time), timeout);
            assert!(waited >= timeout && waited < TIMEOUT, "{waited:?}");
            // Another process may have had this CPU.
            assert!(cpu < waited / 2 || is_busy, "{cpu:?} of {waited:?}");
            assert!(
                cpu > waited / 20 || !is_busy || !has_two_cpus(),
                "{cpu:?} of {waited:?}"
            );
        }
    });
}

#[test]
fn a_wake_ends_a_busy_call() {
    isolated(|| {
        let socket = busy(LONG);
        let waker = socket.waker();
        for _ in 0..20 {
            thread::scope(|scope| {
                scope.spawn(|| {
                    thread::sleep(Duration::from_millis(2));
                    waker.wake();
                });
                assert_eq!(socket.recv(&mut RecvBatch::default()).unwrap().count(), 0);
            });
        }
    });
}

#[test]
fn busy_threads_share_a_socket() {
    isolated(|| {
        const N: u32 = 200;
        let lab = Lab::new();
        let socket = busy(LONG);
        let queue = socket.bind(QUEUE).unwrap();
        let begin = Instant::now();
        let answered = AtomicU32::new(0);
        thread::scope(|scope| {
            let threads = [(); 3].map(|()| {
                scope.spawn(|| {
                    let mut batch = RecvBatch::default();
                    let mut seen = Vec::new();
                    while answered.load(SeqCst) < N && begin.elapsed() < TIMEOUT {
                        let timeout = Duration::from_millis(100);
                        for event in socket.recv_timeout(&mut batch, timeout).unwrap() {
                            let packet = event.packet().unwrap();
                            seen.push(number(&packet));
                            answered.fetch_add(1, SeqCst);
                            socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
                        }
                    }
                    seen
                })
            });
            for number in 0..N {
                queue.set_maxlen(1024 + number % 2).unwrap(); // requests go on beside them
                lab.send_numbered(number..number + 1);
            }
            let mut all = threads.map(|thread| thread.join().unwrap()).concat();
            all.sort_unstable();
            assert!(all.into_iter().eq(0..N));
        });
        assert_eq!(lab.v4.drain(), usize::try_from(N).unwrap());
    });
}

#[test]
fn with_one_cpu_a_call_is_not_busy() {
    isolated(|| {
        let first = cpu::allowed().unwrap()[0];
        cpu::on(first, || {
            let lab = Lab::new();
            let socket = busy(LONG);
            let _queue = socket.bind(QUEUE).unwrap();
            let (waited, cpu) = wait_in_vain(&socket, Duration::from_millis(100));
            assert!(cpu < waited / 2, "{cpu:?} of {waited:?}");
            lab.send_numbered(0..1);
            let mut batch = RecvBatch::default();
            let key = next_packet(&socket, &mut batch).key();
            socket.set_verdict(key, Verdict::Accept).unwrap();
        })
        .unwrap();
    });
}
