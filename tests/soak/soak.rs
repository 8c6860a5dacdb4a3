//! One socket for millions of packets with mixed verdicts
//!
//! ```text
//! tests/soak/run [PACKETS]
//! ```
//!
//! Every packet must be accounted for, and memory and descriptors must not grow. One thread sends
//! packets and collects the delivered ones. A second thread receives and decides. A third thread
//! answers held packets late and in another order. After each round the account must be balanced.
#![allow(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};
use std::{panic, process, thread};

use nfqnl::{ErrorKind, Event, PacketKey, RecvBatch, SendBatch, Socket, Verdict, VerdictSender};
use nfqnl_testkit::alloc::resident;
use nfqnl_testkit::ledger::{Ledger, number};
use nfqnl_testkit::netns;
use nfqnl_testkit::rules::{Family, Hook, Rule, Table};
use nfqnl_testkit::traffic::{Udp, V4};

const PORT: u16 = 5000;
const QUEUE: u16 = 1;
const MARK: u32 = 7;
const IP_AND_UDP: usize = 28;
/// Packets per round
const ROUND: u32 = 50_000;
/// Open packets at once. With their refusals they fit the buffers of an ordinary user.
const AT_ONCE: u32 = 256;
const BURST: u32 = 64;
/// Longer than any packet needs
const STUCK: Duration = Duration::from_secs(60);
/// The resident memory may grow by this after the first tenth.
const GROWTH: usize = 256 << 10;

fn main() {
    netns::enter().unwrap();
    // After a panic the other threads would wait forever.
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
        .add(&Rule::new().udp_dport(PORT).queue(QUEUE))
        .unwrap();
    let later = table.chain("later", Hook::Input, 10).unwrap();
    later
        .add(&Rule::new().mark(MARK, u32::MAX).counter("marked"))
        .unwrap();
    let udp = Udp::bind(V4, PORT).unwrap();
    let socket = Socket::open().unwrap();
    let queue = socket.bind(QUEUE).unwrap();

    let ledger = Ledger::new(ROUND);
    let mut samples = Vec::with_capacity(usize::try_from(rounds).unwrap());
    let begin = Instant::now();
    let is_over = AtomicBool::new(false);
    let tally = thread::scope(|scope| {
        let (late, to_answer) = sync_channel(AT_ONCE.try_into().unwrap());
        let (socket, ledger, is_over) = (&socket, &ledger, &is_over);
        scope.spawn(move || answer_late(&socket.verdict_sender(), ledger, &to_answer));
        let decided = scope.spawn(move || decide(socket, ledger, &late, is_over));
        for round in 1..=rounds {
            send(&udp, ledger);
            ledger.assert_balanced(&udp, 0, 0);
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
        socket.sync().unwrap(); // After this every refusal has come.
        is_over.store(true, Ordering::SeqCst);
        decided.join().unwrap()
    });

    let stats = socket.stats();
    let sent = u64::from(rounds) * u64::from(ROUND);
    println!("{tally:?}");
    assert_eq!(tally.total(), sent);
    assert_eq!((stats.packets, stats.missing_packets), (sent, 0));
    assert_eq!((stats.overruns, stats.after_unbind), (0, 0));
    assert_eq!(stats.refused_verdicts, tally.refused);
    assert_eq!((stats.late_verdicts, stats.merging_ended), (0, 0));
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

/// Sends the packets of a round and collects the delivered ones
fn send(udp: &Udp, ledger: &Ledger) {
    let wait = |most: u32| {
        let begin = Instant::now();
        loop {
            ledger.collect(udp).unwrap();
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
        ledger.send(burst, |payload| udp.send(payload, udp.address()).unwrap());
    }
    wait(0);
}

/// Receives and decides until the end, when no packet is left
fn decide(
    socket: &Socket,
    ledger: &Ledger,
    late: &SyncSender<(PacketKey, u32)>,
    is_over: &AtomicBool,
) -> Tally {
    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
    let mut tally = Tally::default();
    let mut answered_twice = Vec::new();
    // Packets with one refused verdict, and the expected error
    let mut to_be_refused = VecDeque::new();
    let mut last_event = Instant::now();
    loop {
        let is_last = is_over.load(Ordering::SeqCst);
        let timeout = Duration::from_millis(10);
        for event in socket.recv_timeout(&mut batch, timeout).unwrap() {
            last_event = Instant::now();
            let packet = match event {
                Event::Packet(packet) => packet,
                Event::Refused(refusal) => {
                    let refused = refusal.packet().map(|key| (key, refusal.kind()));
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
                    // The kernel refuses this verdict, and the packet still waits.
                    socket.set_verdict(key, Verdict::Stolen).unwrap();
                    to_be_refused.push_back((key, ErrorKind::Invalid));
                    tally.dropped += 1;
                    ledger.drop(number);
                    socket.set_verdict(key, Verdict::Drop).unwrap();
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
        socket.send(&mut verdicts).unwrap();
        for key in answered_twice.drain(..) {
            socket.set_verdict(key, Verdict::Drop).unwrap();
            to_be_refused.push_back((key, ErrorKind::NoSuchPacket));
        }
        // One call without events proves nothing: an answer to a setting ends a call too.
        if is_last && last_event.elapsed() > Duration::from_millis(100) {
            assert!(to_be_refused.is_empty(), "not refused: {to_be_refused:?}");
            return tally;
        }
    }
}

/// Answers packets later, the last ones first, one by one and in batches
fn answer_late(sender: &VerdictSender, ledger: &Ledger, to_answer: &Receiver<(PacketKey, u32)>) {
    let (mut held, mut verdicts) = (Vec::new(), SendBatch::new());
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
                sender.set_verdict(key, verdict).unwrap();
            }
        }
        sender.send(&mut verdicts).unwrap();
        if next == Err(RecvTimeoutError::Disconnected) {
            return;
        }
    }
}

/// Counts of the decisions
#[derive(Debug, Default)]
struct Tally {
    accepted: u64,
    marked: u64,
    dropped: u64,
    held_back: u64,
    /// Verdicts. Their packets are in the other counts.
    refused: u64,
}

impl Tally {
    fn total(&self) -> u64 {
        self.accepted + self.marked + self.dropped + self.held_back
    }
}

/// The resources of this process
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
