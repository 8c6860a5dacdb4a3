//! A receive loop beside other tasks, by tokio; some packets wait for a verdict that takes its time
//!
//! ```text
//! iptables -A INPUT -p udp -j NFQUEUE --queue-num 1      # or: nft … queue num 1
//! cargo run --release --features tokio --example tokio
//! ```
//!
//! What goes to port 53 is looked up by a task of its own, everything else is accepted at once. `--queue N` is the queue
//! if it is not 1; `--count N` ends after N packets.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use nfqnl::{AsyncHandle, Event, Handle, OwnedPacket, RecvBatch, Verdict, VerdictBatch};
use tokio::task::JoinSet;

mod support;

const DNS: u16 = 53;

/// Stands for a question to a database, or to another host
async fn look_up(_packet: &OwnedPacket) -> Verdict {
    tokio::time::sleep(Duration::from_millis(20)).await;
    Verdict::Accept
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let [number, count] = support::numbers([("--queue", 1), ("--count", usize::MAX)])?;
    let handle = Arc::new(AsyncHandle::new(Handle::open()?)?);
    let queue = handle.get_ref().bind_queue(number.try_into()?)?;
    println!("queue {} is bound", queue.num());

    let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
    let mut look_ups = JoinSet::new();
    let mut report = tokio::time::interval(Duration::from_secs(1));
    let mut seen = 0;
    while seen < count {
        // Whichever comes first; the others are dropped, and `recv` loses nothing by it.
        tokio::select! {
            events = handle.recv(&mut batch) => {
                for event in events? {
                    match event {
                        Event::Packet(packet) => {
                            seen += 1;
                            if support::destination_port(packet.payload()) == Some(DNS) {
                                let (handle, packet) = (handle.clone(), OwnedPacket::from(packet));
                                look_ups.spawn(async move {
                                    let verdict = look_up(&packet).await;
                                    handle.verdict(packet.key(), verdict)
                                });
                            } else {
                                verdicts.push(packet.key(), Verdict::Accept)?;
                            }
                        }
                        other => eprintln!("{other}"),
                    }
                }
                handle.send(&mut verdicts).await?;
            }
            Some(answered) = look_ups.join_next() => answered??,
            _ = report.tick() => println!("{seen} packets, {} look-ups", look_ups.len()),
        }
    }

    while let Some(answered) = look_ups.join_next().await {
        answered??;
    }
    queue.destroy()?;
    Ok(())
}
