//! Threads, in two ways: one for each queue of a range, and many for one queue
//!
//! ```text
//! iptables -A INPUT -p udp --dport 5000 -j NFQUEUE --queue-balance 1:4    # or: nft … queue num 1-4
//! iptables -A INPUT -p udp --dport 5001 -j NFQUEUE --queue-num 5          # or: nft … queue num 5
//! cargo run --release --example threads
//! ```
//!
//! **A range of queues** is what scales: each thread has a handle and a queue for itself, and shares nothing. The kernel
//! spreads packets over the range
//! * by their addresses, so that a connection stays in one queue (`--queue-balance`, `queue num 1-4`); or
//! * by the CPU they are on (`--queue-balance 1:4 --queue-cpu-fanout`, `queue num 1-4 fanout`): CPU c feeds the queue
//!   that is c modulo the length of the range behind the first. A thread that stays on that CPU finds its packets in
//!   that CPU's caches: `--pin 1`, and as many queues as there are CPUs.
//!
//! **Many threads for one queue** are for verdicts that take long to find: one thread receives, and gives copies of the
//! packets to others, who answer by themselves. Packets of one connection go to one thread, to keep their order.
//!
//! All packets are accepted. The first queue is `--queue N` (1), the range has `--queues N` (4), and the queue behind
//! it is the one with many threads, `--workers N` (4). `--count N` ends after N packets.

use std::error::Error;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use nfqnl::{Handle, OwnedPacket, RecvBatch, Verdict, VerdictBatch};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

mod support;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// How long a thread takes to see the flag at most
const LOOK: Duration = Duration::from_millis(100);

/// Tells all threads to stop
#[derive(Debug)]
struct Stop {
    flag: AtomicBool,
    seen: AtomicUsize,
    enough: usize,
}

impl Stop {
    fn is_set(&self) -> bool {
        self.flag.load(Ordering::Relaxed)
    }

    /// A handler of SIGTERM would do this, and nothing else
    fn set(&self) {
        self.flag.store(true, Ordering::Relaxed);
    }

    /// Sets it when enough packets have been seen
    fn count(&self, packets: usize) {
        if self.seen.fetch_add(packets, Ordering::Relaxed) + packets >= self.enough {
            self.set();
        }
    }
}

fn main() -> Result<()> {
    let [first, queues, workers, pin, count] = support::numbers([
        ("--queue", 1),
        ("--queues", 4),
        ("--workers", 4),
        ("--pin", 0),
        ("--count", usize::MAX),
    ])?;
    let first: u16 = first.try_into()?;
    let last = first
        .checked_add(queues.try_into()?)
        .ok_or("there are no queues beyond 65535")?;
    let stop = Stop {
        flag: AtomicBool::new(false),
        seen: AtomicUsize::new(0),
        enough: count,
    };

    thread::scope(|scope| {
        let stop = &stop;
        let mut threads: Vec<(u16, ScopedJoinHandle<'_, Result<usize>>)> = Vec::new();
        for (index, queue) in (first..last).enumerate() {
            let thread = scope.spawn(move || {
                let pinned = if pin > 0 {
                    stay_at(index, queues)
                } else {
                    Ok(())
                };
                stop_if_failed(stop, pinned.and_then(|()| serve(queue, stop)))
            });
            threads.push((queue, thread));
        }
        let thread = scope.spawn(move || stop_if_failed(stop, distribute(last, workers, stop)));
        threads.push((last, thread));
        for (queue, thread) in threads {
            let packets = thread.join().map_err(|_| "a thread has panicked")??;
            println!("queue {queue}: {packets} packets");
        }
        Ok(())
    })
}

/// Where one thread can't go on, the others shall not either
fn stop_if_failed(stop: &Stop, result: Result<usize>) -> Result<usize> {
    if result.is_err() {
        stop.set();
    }
    result
}

/// Keeps the calling thread on the CPUs that feed its queue, if it may run on any of them
fn stay_at(index: usize, queues: usize) -> Result<()> {
    let allowed = sched_getaffinity(None)?;
    let mut feeding = CpuSet::new();
    (index..CpuSet::MAX_CPU)
        .step_by(queues)
        .filter(|cpu| allowed.is_set(*cpu))
        .for_each(|cpu| feeding.set(cpu));
    if feeding.count() > 0 {
        sched_setaffinity(None, &feeding)?;
    }
    Ok(())
}

/// A thread with a queue for itself
fn serve(number: u16, stop: &Stop) -> Result<usize> {
    let handle = Handle::open()?;
    let queue = handle.bind_queue(number)?;
    println!("queue {number} is bound");

    let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
    let mut seen = 0;
    while !stop.is_set() {
        for packet in handle
            .recv_deadline(&mut batch, Instant::now() + LOOK)?
            .packets()
        {
            verdicts.push(packet.key(), Verdict::Accept)?;
        }
        seen += verdicts.len();
        stop.count(verdicts.len());
        handle.send(&mut verdicts)?;
    }
    // From here on, new packets are dropped; to lose none, take the rule away before you stop.
    queue.destroy()?;
    Ok(seen)
}

/// A thread that receives, and others that answer
fn distribute(number: u16, workers: usize, stop: &Stop) -> Result<usize> {
    let handle = Handle::open()?;
    let queue = handle.bind_queue(number)?;
    println!("queue {number} is bound");

    let seen = thread::scope(|scope| -> Result<usize> {
        let work: Vec<mpsc::Sender<OwnedPacket>> = (0..workers.max(1))
            .map(|worker| {
                let (give, work) = mpsc::channel::<OwnedPacket>();
                let sender = handle.verdict_sender();
                scope.spawn(move || {
                    for packet in work {
                        let verdict = look_into(&packet, worker);
                        if let Err(error) = sender.verdict(packet.key(), verdict) {
                            eprintln!("{error}");
                        }
                    }
                });
                give
            })
            .collect();

        let mut batch = RecvBatch::default();
        let mut seen = 0;
        while !stop.is_set() {
            let before = seen;
            for packet in handle
                .recv_deadline(&mut batch, Instant::now() + LOOK)?
                .packets()
            {
                let worker = connection(packet.payload()) % u64::try_from(work.len())?;
                work[usize::try_from(worker)?].send(packet.into())?;
                seen += 1;
            }
            stop.count(seen - before);
        }
        Ok(seen)
        // The channels close, and the threads end when they have answered what they were given.
    })?;
    queue.destroy()?;
    Ok(seen)
}

/// Takes its time
fn look_into(packet: &OwnedPacket, worker: usize) -> Verdict {
    let packet = packet.packet();
    let endpoints = support::endpoints(packet.payload());
    println!(
        "worker {worker} accepts packet {}: {endpoints}",
        packet.id()
    );
    Verdict::Accept
}

/// The same number for all packets of a connection in one direction
fn connection(packet: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    support::endpoints(packet).hash(&mut hasher);
    hasher.finish()
}
