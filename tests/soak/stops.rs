//! Stops a queue under load again and again, and accounts for every datagram
//!
//! ```text
//! tests/soak/run --stops [STOPS]    # 20,000 by default, some minutes
//! ```
#![allow(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use nfqnl::{Event, RecvBatch, Result, SendBatch, Socket, Verdict};
use nfqnl_testkit::netns;
use nfqnl_testkit::rules::{Family, Hook, QueueOptions, Rule, Table};
use nfqnl_testkit::traffic::{Udp, V4};

const PORT: u16 = 5000;
const QUEUE: u16 = 1;
/// Datagrams on their way at once; they fit the buffers of an ordinary user
const AT_ONCE: usize = 100;
/// Longer than any datagram needs
const STUCK: Duration = Duration::from_secs(10);

fn accept(event: Event<'_>, verdicts: &mut SendBatch) -> Result<()> {
    match event {
        Event::Packet(packet) => verdicts.push(packet.key(), Verdict::Accept),
        other => panic!("{other:?}"),
    }
}

/// Sends and receives numbered datagrams until `stop`; returns the numbers sent and lost
fn traffic(udp: &Udp, stop: &AtomicBool, gate: &Mutex<()>) -> (u32, usize) {
    let mut missing: VecDeque<u32> = VecDeque::new();
    let (mut number, mut last) = (0_u32, Instant::now());
    while !stop.load(Relaxed) || (!missing.is_empty() && last.elapsed() < STUCK) {
        while !stop.load(Relaxed) && missing.len() < AT_ONCE {
            let _open = gate.lock().unwrap();
            udp.send(&number.to_be_bytes(), udp.address()).unwrap();
            missing.push_back(number);
            number += 1;
        }
        if let Some(payload) = udp.recv_within(Duration::from_millis(5)) {
            let number = u32::from_be_bytes(payload.try_into().unwrap());
            // New packets overtake waiting ones.
            let place = missing.iter().position(|&missing| missing == number);
            missing.remove(place.expect("each arrives once"));
            last = Instant::now();
        }
    }
    (number, missing.len())
}

fn main() {
    netns::enter().unwrap();
    let stops = std::env::args().nth(1).map_or(20_000, |stops| {
        stops.parse::<u32>().expect("a number of stops")
    });
    let table = Table::new(Family::Ip, "soak").unwrap();
    let chain = table.chain("queue", Hook::Output, 0).unwrap();
    let options = QueueOptions {
        bypass: true,
        fanout: false,
    };
    let rule = Rule::new().udp().dport(PORT);
    chain.add(&rule.queue_with(QUEUE..=QUEUE, options)).unwrap();
    let udp = Udp::bind(V4, PORT).unwrap();
    let socket = Socket::open().unwrap();
    let (is_over, gate) = (AtomicBool::new(false), Mutex::new(()));
    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
    let (sent, lost) = thread::scope(|scope| {
        let traffic = scope.spawn(|| traffic(&udp, &is_over, &gate));
        for _ in 0..stops {
            // The kernel may drop a packet during a bind: see `Socket::bind_with`.
            let closed = gate.lock().unwrap();
            let queue = socket.bind(QUEUE).unwrap();
            drop(closed);
            let mut seen = 0;
            while seen < 5 {
                for event in socket.recv(&mut batch).unwrap() {
                    seen += 1;
                    accept(event, &mut verdicts).unwrap();
                }
                socket.send(&mut verdicts).unwrap();
            }
            let lost = socket.drain(queue, &mut batch, STUCK, accept).unwrap();
            assert_eq!(lost, 0, "packets without a verdict");
        }
        is_over.store(true, Relaxed);
        traffic.join().unwrap()
    });
    println!(
        "{stops} stops, {sent} datagrams, {lost} lost; {:?}",
        socket.stats()
    );
    assert_eq!(lost, 0);
}
