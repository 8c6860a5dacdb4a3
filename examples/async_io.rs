//! An async task on async-io, the reactor of smol
//!
//! ```text
//! iptables -A INPUT -p udp -j NFQUEUE --queue-num 1      # or: nft … queue num 1
//! cargo run --release --example async_io
//! ```
//!
//! All packets are accepted. `--queue N` selects the queue (default 1); `--count N` ends after N
//! packets.

use std::error::Error;

use async_io::Async;
use nfqnl::{Event, RecvBatch, SendBatch, Socket, Verdict};

mod support;

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let [number, count] = support::numbers([("--queue", 1), ("--count", usize::MAX)])?;
    let socket = Socket::open()?;
    let queue = socket.bind(number.try_into()?)?;
    println!("queue {} is bound", queue.num());

    async_io::block_on(accept(socket, count))
}

async fn accept(socket: Socket, count: usize) -> Result<(), Box<dyn Error + Send + Sync>> {
    let socket = Async::new(socket)?;
    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
    let mut seen = 0;
    while seen < count {
        let mut is_empty = true;
        for event in socket.get_ref().try_recv(&mut batch)? {
            is_empty = false;
            match event {
                Event::Packet(packet) => {
                    verdicts.push(packet.key(), Verdict::Accept)?;
                    seen += 1;
                }
                other => eprintln!("{other}"),
            }
        }
        socket.get_ref().send(&mut verdicts)?;
        // Wait only after `try_recv` has returned no events.
        if is_empty {
            socket.readable().await?;
        }
    }
    Ok(())
}
