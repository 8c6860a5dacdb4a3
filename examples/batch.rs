//! Many packets in and many verdicts out at a time: the fastest loop
//!
//! ```text
//! iptables -A INPUT -p udp -j NFQUEUE --queue-num 1      # or: nft … queue num 1
//! cargo run --release --example batch
//! ```
//!
//! What goes to port 9 is dropped, what goes to port 53 is marked with 1, and everything else is accepted.
//! `--queue N` is the queue if it is not 1; `--count N` ends after N packets.

use std::error::Error;

use nfqnl::{Decision, Event, Handle, Packet, RecvBatch, Verdict, VerdictBatch};

mod support;

const DISCARD: u16 = 9;
const DNS: u16 = 53;
const MARK: u32 = 1;

fn decide(packet: &Packet<'_>) -> Decision<'static> {
    match support::destination_port(packet.payload()) {
        Some(DISCARD) => Verdict::Drop.into(),
        Some(DNS) => Verdict::Accept.with_mark(MARK),
        _ => Verdict::Accept.into(),
    }
}

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let [number, count] = support::numbers([("--queue", 1), ("--count", usize::MAX)])?;
    let handle = Handle::open()?;
    let queue = handle.bind_queue(number.try_into()?)?;
    println!("queue {} is bound", queue.num());

    let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
    let mut seen = 0;
    while seen < count {
        // Up to 64 packets by one system call
        for event in handle.recv(&mut batch)? {
            match event {
                Event::Packet(packet) => {
                    verdicts.push(packet.key(), decide(&packet))?;
                    seen += 1;
                }
                // Packets were lost, a verdict was refused: no reason to stop
                other => eprintln!("{other}"),
            }
        }
        // All verdicts by one system call, and runs of equal ones by one message
        handle.send(&mut verdicts)?;
    }

    queue.destroy()?;
    println!("{:?}", handle.stats());
    Ok(())
}
