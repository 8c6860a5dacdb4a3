//! Threads in two ways: one thread per queue of a range, and many threads for one queue
//!
//! ```text
//! iptables -A INPUT -p udp --dport 5000 -j NFQUEUE --queue-balance 1:4   # or: nft … queue num 1-4
//! iptables -A INPUT -p udp --dport 5001 -j NFQUEUE --queue-num 5         # or: nft … queue num 5
//! cargo run --release --example threads
//! ```
//!
//! **A range of queues** scales: each thread has its own socket and queue, and shares nothing.
//! The kernel spreads packets over the range
//! * by their addresses, so that a connection stays in one queue (`--queue-balance`,
//!   `queue num 1-4`); or
//! * by CPU (`--queue-balance 1:4 --queue-cpu-fanout`, `queue num 1-4 fanout`): CPU c feeds queue
//!   `first + c % number of queues`. A thread that stays on that CPU finds its packets in the
//!   caches of that CPU: use `--pin 1` and as many queues as CPUs.
//!
//! **Many threads for one queue** suit slow decisions: one thread receives and gives copies of the
//! packets to workers, and the workers send the verdicts. All packets of a connection go to the
//! same worker, which keeps their order.
//!
//! All packets are accepted. `--queue N` selects the first queue (1), `--queues N` the length of
//! the range (4). The next queue is the one with many threads, `--workers N` of them (4).
//! `--count N` ends after N packets.

use std::error::Error;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread::{self, ScopedJoinHandle};

use nfqnl::{Event, OwnedPacket, Packet, RecvBatch, SendBatch, Socket, Verdict, Waker};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

mod support;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Stops all threads
#[derive(Debug)]
struct Stop {
    flag: AtomicBool,
    wakers: Vec<Waker>,
    seen: AtomicUsize,
    limit: usize,
}

impl Stop {
    fn is_set(&self) -> bool {
        self.flag.load(Ordering::SeqCst)
    }

    /// Ends the current or next `recv` of each thread; a handler of SIGTERM may call this too
    fn set(&self) {
        self.flag.store(true, Ordering::SeqCst);
        self.wakers.iter().for_each(Waker::wake);
    }

    /// Counts packets, and stops the threads at the limit
    fn count(&self, packets: usize) {
        if self.seen.fetch_add(packets, Ordering::Relaxed) + packets >= self.limit {
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
        .ok_or("the last queue number is 65535")?;
    let mut sockets = Vec::new();
    for number in first..=last {
        let socket = Socket::open()?;
        let queue = socket.bind(number)?;
        println!("queue {number} is bound");
        sockets.push((socket, queue));
    }
    let stop = Stop {
        flag: AtomicBool::new(false),
        wakers: sockets.iter().map(|(socket, _)| socket.waker()).collect(),
        seen: AtomicUsize::new(0),
        limit: count,
    };

    thread::scope(|scope| {
        let stop = &stop;
        let mut threads: Vec<(u16, ScopedJoinHandle<'_, Result<usize>>)> = Vec::new();
        for (index, (socket, queue)) in sockets.into_iter().enumerate() {
            let number = queue.num();
            let thread = scope.spawn(move || {
                let result = if number == last {
                    distribute(&socket, workers, stop)
                } else if pin > 0 {
                    stay_at(index, queues).and_then(|()| serve(&socket, stop))
                } else {
                    serve(&socket, stop)
                };
                stop.set(); // A failed thread stops the others too.
                // From here on the kernel drops new packets. To lose none, remove the rule first.
                queue.destroy()?;
                result
            });
            threads.push((number, thread));
        }
        let ended = threads
            .into_iter()
            .map(|(number, thread)| (number, thread.join()));
        // All threads end before the first total is printed.
        for (number, result) in ended.collect::<Vec<_>>() {
            let packets = result.map_err(|_| "a thread has panicked")??;
            println!("queue {number}: {packets} packets");
        }
        Ok(())
    })
}

/// Binds the calling thread to the CPUs of its queue, if it may run on any of them
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

/// A thread with its own queue
fn serve(socket: &Socket, stop: &Stop) -> Result<usize> {
    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
    let mut seen = 0;
    while !stop.is_set() {
        for event in socket.recv(&mut batch)? {
            match event {
                Event::Packet(packet) => verdicts.push(packet.key(), Verdict::Accept)?,
                other => eprintln!("{other}"),
            }
        }
        seen += verdicts.len();
        stop.count(verdicts.len());
        socket.send(&mut verdicts)?;
    }
    Ok(seen)
}

/// Runs one receiving thread, and workers for the verdicts
fn distribute(socket: &Socket, workers: usize, stop: &Stop) -> Result<usize> {
    thread::scope(|scope| {
        let work: Vec<mpsc::Sender<OwnedPacket>> = (0..workers.max(1))
            .map(|worker| {
                let (give, work) = mpsc::channel::<OwnedPacket>();
                let sender = socket.verdict_sender();
                scope.spawn(move || {
                    for packet in work {
                        let verdict = look_into(&packet, worker);
                        if let Err(error) = sender.set_verdict(packet.key(), verdict) {
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
            for event in socket.recv(&mut batch)? {
                match event {
                    Event::Packet(packet) => {
                        let worker = connection(&packet) % u64::try_from(work.len())?;
                        work[usize::try_from(worker)?].send(packet.into())?;
                        seen += 1;
                    }
                    other => eprintln!("{other}"),
                }
            }
            stop.count(seen - before);
        }
        Ok(seen)
        // The channels close here. The workers answer their remaining packets, and end.
    })
}

/// A slow decision
fn look_into(packet: &OwnedPacket, worker: usize) -> Verdict {
    let packet = packet.packet();
    if let Some(flow) = packet.flow() {
        println!("worker {worker} accepts packet {}: {flow}", packet.id());
    }
    Verdict::Accept
}

/// The same number for all packets of a connection in one direction
fn connection(packet: &Packet<'_>) -> u64 {
    let mut hasher = DefaultHasher::new();
    packet.flow().hash(&mut hasher);
    hasher.finish()
}
