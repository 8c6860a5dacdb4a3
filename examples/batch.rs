//! Many packets per receive call and many verdicts per send call: the fastest loop
//!
//! ```text
//! iptables -A INPUT -p udp -j NFQUEUE --queue-num 1      # or: nft … queue num 1
//! cargo run --release --example batch
//! ```
//!
//! Packets to port 9 are dropped, packets to port 53 get mark 1, and all others are accepted.
//! `--queue N` selects the queue (default 1); `--count N` ends after N packets.

use std::error::Error;

use nfqnl::{Decision, Event, Packet, RecvBatch, SendBatch, Socket, Verdict};

mod support;

const DISCARD: u16 = 9;
const DNS: u16 = 53;
const MARK: u32 = 1;

fn decide(packet: &Packet<'_>) -> Decision<'static> {
    match packet.flow().and_then(|flow| flow.ports()) {
        Some((_, DISCARD)) => Verdict::Drop.into(),
        Some((_, DNS)) => Verdict::Accept.with_mark(MARK),
        _ => Verdict::Accept.into(),
    }
}

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let [number, count] = support::numbers([("--queue", 1), ("--count", usize::MAX)])?;
    let socket = Socket::open()?;
    let queue = socket.bind(number.try_into()?)?;
    println!("queue {} is bound", queue.num());

    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
    let mut seen = 0;
    while seen < count {
        // One system call receives up to 64 packets.
        for event in socket.recv(&mut batch)? {
            match event {
                Event::Packet(packet) => {
                    verdicts.push(packet.key(), decide(&packet))?;
                    seen += 1;
                }
                // Lost packets and refused verdicts do not end the loop.
                other => eprintln!("{other}"),
            }
        }
        // One system call sends all verdicts. Consecutive equal verdicts become one message.
        socket.send(&mut verdicts)?;
    }

    queue.destroy()?;
    println!("{:?}", socket.stats());
    Ok(())
}
