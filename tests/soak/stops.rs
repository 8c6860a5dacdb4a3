//! Stops a queue under load again and again, and accounts for every datagram
//!
//! ```text
//! tests/soak/run --stops [STOPS]    # 20,000 by default, some minutes
//! ```
#![allow(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use nfqnl::{Event, RecvBatch, Result, SendBatch, Socket, Verdict};
use nfqnl_testkit::netns;
use nfqnl_testkit::rules::{Family, Hook, Queues, Rule, Table};
use nfqnl_testkit::traffic::{self, Udp, V4};

const PORT: u16 = 5000;
const QUEUE: u16 = 1;
/// Longer than any datagram needs
const STUCK: Duration = Duration::from_secs(10);

fn accept(event: Event<'_>, verdicts: &mut SendBatch) -> Result<()> {
    match event {
        Event::Packet(packet) => verdicts.push(packet.key(), Verdict::Accept),
        other => panic!("{other:?}"),
    }
}

fn main() {
    netns::enter().unwrap();
    let stops = std::env::args().nth(1).map_or(20_000, |stops| {
        stops.parse::<u32>().expect("a number of stops")
    });
    let table = Table::new(Family::Ip, "soak").unwrap();
    let chain = table.chain("queue", Hook::Output, 0).unwrap();
    let rule = Rule::new().udp_dport(PORT);
    chain.add(&rule.queue(Queues::new(QUEUE).bypass())).unwrap();
    let udp = Udp::bind(V4, PORT).unwrap();
    let socket = Socket::open().unwrap();
    let (is_over, gate) = (AtomicBool::new(false), Mutex::new(()));
    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
    let (sent, lost) = thread::scope(|scope| {
        let traffic = scope.spawn(|| traffic::numbered(&udp, &is_over, &gate, STUCK));
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
