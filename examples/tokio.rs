//! A receive loop beside other tasks on tokio; some packets wait for a slow verdict
//!
//! ```text
//! iptables -A INPUT -p udp -j NFQUEUE --queue-num 1      # or: nft … queue num 1
//! cargo run --release --features tokio --example tokio
//! ```
//!
//! A task of its own looks up each packet to port 53; all others are accepted at once.
//! `--queue N` selects the queue (default 1); `--count N` ends after N packets.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use nfqnl::{AsyncSocket, Event, OwnedPacket, RecvBatch, SendBatch, Socket, Verdict};
use tokio::task::JoinSet;

mod support;

const DNS: u16 = 53;

/// Stands for a query to a database or to another host
async fn look_up(_packet: &OwnedPacket) -> Verdict {
    tokio::time::sleep(Duration::from_millis(20)).await;
    Verdict::Accept
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let [number, count] = support::numbers([("--queue", 1), ("--count", usize::MAX)])?;
    let socket = Arc::new(AsyncSocket::new(Socket::open()?)?);
    let queue = socket.bind(number.try_into()?).await?;
    println!("queue {} is bound", queue.num());

    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
    let mut look_ups = JoinSet::new();
    let mut report = tokio::time::interval(Duration::from_secs(1));
    let mut seen = 0;
    while seen < count {
        // `select!` drops the unfinished futures. A dropped `recv` does not lose packets.
        tokio::select! {
            events = socket.recv(&mut batch) => {
                for event in events? {
                    match event {
                        Event::Packet(packet) => {
                            seen += 1;
                            let ports = packet.flow().and_then(|flow| flow.ports());
                            if ports.is_some_and(|(_, to)| to == DNS) {
                                let (socket, packet) = (socket.clone(), OwnedPacket::from(packet));
                                look_ups.spawn(async move {
                                    let verdict = look_up(&packet).await;
                                    socket.set_verdict(packet.key(), verdict)
                                });
                            } else {
                                verdicts.push(packet.key(), Verdict::Accept)?;
                            }
                        }
                        other => eprintln!("{other}"),
                    }
                }
                socket.send(&mut verdicts)?;
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
