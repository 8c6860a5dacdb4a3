//! One handle for millions of packets with mixed verdicts: each is accounted for, memory and descriptors stay as they are
//!
//! ```text
//! tests/soak/run [PACKETS]
//! ```
//!
//! One thread sends and takes in what is delivered, one receives and decides, and one answers what was held back, late and in
//! another order. Every so often all must be balanced.
#![allow(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};
use std::{panic, process, thread};

use nfqnl::{Event, Handle, PacketKey, RecvBatch, Situation, Verdict, VerdictBatch, VerdictSender};
use nfqnl_testkit::alloc::resident;
use nfqnl_testkit::ledger::{Ledger, number};
use nfqnl_testkit::netns;
use nfqnl_testkit::rules::{Family, Hook, Rule, Table};
use nfqnl_testkit::traffic::{Udp, V4};

const PORT: u16 = 5000;
const QUEUE: u16 = 1;
const MARK: u32 = 7;
const IP_AND_UDP: usize = 28;
/// After so many all must be balanced
const ROUND: u32 = 50_000;
/// So many are open at once, which fit an ordinary user's buffers with the refusals among them
const AT_ONCE: u32 = 256;
const BURST: u32 = 64;
/// Longer than any packet takes
const STUCK: Duration = Duration::from_secs(60);
/// What may be added to the resident memory after the first tenth
const GROWTH: usize = 256 << 10;

fn main() {
    netns::enter().unwrap();
    // The other threads would wait for ever for one that has panicked.
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        report(panic);
        process::exit(1);
    }));
    let packets = std::env::args().nth(1).map_or(50_000_000, |packets| {
        packets.parse().expect("a number of packets")
    });
    let rounds = u32::max(packets / ROUND, 10);

    let table = Table::new(Family::Ip, "soak").unwrap();
    let chain = table.chain("queue", Hook::Input, 0).unwrap();
    chain
        .add(&Rule::new().udp().dport(PORT).queue(QUEUE))
        .unwrap();
    let later = table.chain("later", Hook::Input, 10).unwrap();
    later
        .add(&Rule::new().mark(MARK).counted("marked"))
        .unwrap();
    let socket = Udp::bind(V4, PORT).unwrap();
    let handle = Handle::builder().recv_buffer(1 << 20).open().unwrap();
    let queue = handle.bind_queue(QUEUE).unwrap();

    let ledger = Ledger::new(ROUND);
    let mut samples = Vec::with_capacity(usize::try_from(rounds).unwrap());
    let begin = Instant::now();
    let is_over = AtomicBool::new(false);
    let tally = thread::scope(|scope| {
        let (late, to_answer) = sync_channel(AT_ONCE.try_into().unwrap());
        let (handle, ledger, is_over) = (&handle, &ledger, &is_over);
        scope.spawn(move || answer_late(&handle.verdict_sender(), ledger, &to_answer));
        let decided = scope.spawn(move || decide(handle, ledger, &late, is_over));
        for round in 1..=rounds {
            send(&socket, ledger);
            ledger.assert_balanced(&socket, 0, 0);
            ledger.clear();
            queue.set_maxlen(1000 + round % 2).unwrap();
            samples.push(Sample::now());
            if round % (rounds / 10) == 0 {
                let seconds = begin.elapsed().as_secs_f64();
                println!(
                    "{} packets, {seconds:.0} s, {:?}",
                    round * ROUND,
                    Sample::now()
                );
            }
        }
        handle.sync().unwrap(); // now every refusal has come
        is_over.store(true, Ordering::SeqCst);
        decided.join().unwrap()
    });

    let stats = handle.stats();
    let sent = u64::from(rounds) * u64::from(ROUND);
    println!("{tally:?}");
    assert_eq!(tally.total(), sent);
    assert_eq!((stats.packets, stats.lost_packets), (sent, 0));
    assert_eq!((stats.overruns, stats.discarded), (0, 0));
    assert_eq!(stats.refused_verdicts, tally.refused);
    assert_eq!(later.count("marked").unwrap(), tally.marked);
    let (warm_up, rest) = samples.split_at(samples.len() / 10);
    let warm = warm_up.last().unwrap();
    for sample in rest {
        assert!(
            sample.resident <= warm.resident + GROWTH,
            "{warm:?} has become {sample:?}"
        );
        assert_eq!(sample.descriptors, warm.descriptors);
    }
}

/// Sends a round, and takes in what is delivered
fn send(socket: &Udp, ledger: &Ledger) {
    let wait = |most: u32| {
        let begin = Instant::now();
        loop {
            ledger.collect(socket).unwrap();
            if ledger.open() <= most {
                return;
            }
            assert!(
                begin.elapsed() < STUCK,
                "{} packets are open",
                ledger.open()
            );
            thread::yield_now();
        }
    };
    while ledger.sent() < ROUND {
        wait(AT_ONCE - BURST);
        let burst = BURST.min(ROUND - ledger.sent());
        ledger.send(burst, |payload| {
            socket.send(payload, socket.address()).unwrap()
        });
    }
    wait(0);
}

/// Receives and decides, until it is over and nothing is left
fn decide(
    handle: &Handle,
    ledger: &Ledger,
    late: &SyncSender<(PacketKey, u32)>,
    is_over: &AtomicBool,
) -> Tally {
    let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
    let mut tally = Tally::default();
    let mut answered_twice = Vec::new();
    // Packets of whose verdicts one will be refused, and why
    let mut to_be_refused = VecDeque::new();
    loop {
        let is_last = is_over.load(Ordering::SeqCst);
        let mut is_empty = true;
        let deadline = Instant::now() + Duration::from_millis(10);
        for event in handle.recv_deadline(&mut batch, deadline).unwrap() {
            is_empty = false;
            let packet = match event {
                Event::Packet(packet) => packet,
                Event::Refused(refusal) => {
                    let refused = refusal.packet().map(|key| (key, refusal.situation()));
                    assert_eq!(refused, to_be_refused.pop_front());
                    tally.refused += 1;
                    continue;
                }
                other => panic!("{other:?}"),
            };
            let (key, number) = (packet.key(), number(&packet.payload()[IP_AND_UDP..]));
            match number % 16 {
                0 => {
                    tally.dropped += 1;
                    ledger.drop(number);
                    verdicts.push(key, Verdict::Drop).unwrap();
                }
                1 => {
                    tally.marked += 1;
                    ledger.accept(number);
                    verdicts.push(key, Verdict::Accept.with_mark(MARK)).unwrap();
                }
                2 => {
                    tally.held_back += 1;
                    late.send((key, number)).unwrap();
                }
                3 => {
                    // The kernel never takes this, and the packet waits on.
                    handle.verdict(key, Verdict::Stolen).unwrap();
                    to_be_refused.push_back((key, Situation::Invalid));
                    tally.dropped += 1;
                    ledger.drop(number);
                    handle.verdict(key, Verdict::Drop).unwrap();
                }
                rest => {
                    tally.accepted += 1;
                    ledger.accept(number);
                    verdicts.push(key, Verdict::Accept).unwrap();
                    if rest == 4 {
                        answered_twice.push(key);
                    }
                }
            }
        }
        handle.send(&mut verdicts).unwrap();
        for key in answered_twice.drain(..) {
            handle.verdict(key, Verdict::Drop).unwrap();
            to_be_refused.push_back((key, Situation::NoSuchPacket));
        }
        if is_last && is_empty {
            assert!(to_be_refused.is_empty(), "{to_be_refused:?} were not");
            return tally;
        }
    }
}

/// Answers packets some time later, the last ones first, one by one and in batches
fn answer_late(sender: &VerdictSender, ledger: &Ledger, to_answer: &Receiver<(PacketKey, u32)>) {
    let (mut held, mut verdicts) = (Vec::new(), VerdictBatch::new());
    loop {
        let next = to_answer.recv_timeout(Duration::from_millis(1));
        held.extend(next);
        if next.is_ok() && held.len() < 12 {
            continue;
        }
        while let Some((key, number)) = held.pop() {
            let verdict = if number % 32 < 16 {
                ledger.accept(number);
                Verdict::Accept
            } else {
                ledger.drop(number);
                Verdict::Drop
            };
            if held.len() % 2 == 0 {
                verdicts.push(key, verdict).unwrap();
            } else {
                sender.verdict(key, verdict).unwrap();
            }
        }
        sender.send(&mut verdicts).unwrap();
        if next == Err(RecvTimeoutError::Disconnected) {
            return;
        }
    }
}

/// What was decided
#[derive(Debug, Default)]
struct Tally {
    accepted: u64,
    marked: u64,
    dropped: u64,
    held_back: u64,
    /// Verdicts, of packets that are among the others
    refused: u64,
}

impl Tally {
    fn total(&self) -> u64 {
        self.accepted + self.marked + self.dropped + self.held_back
    }
}

/// What this process has taken
#[derive(Debug)]
struct Sample {
    /// In bytes
    resident: usize,
    descriptors: usize,
}

impl Sample {
    fn now() -> Self {
        Self {
            resident: resident().unwrap(),
            descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(),
        }
    }
}
