//! A task by async-io, the reactor of smol
//!
//! ```text
//! iptables -A INPUT -p udp -j NFQUEUE --queue-num 1      # or: nft … queue num 1
//! cargo run --release --example async_io
//! ```
//!
//! All packets are accepted. `--queue N` is the queue if it is not 1; `--count N` ends after N packets.

use std::error::Error;

use async_io::Async;
use nfqnl::{Event, Handle, RecvBatch, Verdict, VerdictBatch};

mod support;

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let [number, count] = support::numbers([("--queue", 1), ("--count", usize::MAX)])?;
    let handle = Handle::open()?;
    let queue = handle.bind_queue(number.try_into()?)?;
    println!("queue {} is bound", queue.num());

    async_io::block_on(accept(handle, count))
}

async fn accept(handle: Handle, count: usize) -> Result<(), Box<dyn Error + Send + Sync>> {
    let handle = Async::new(handle)?;
    let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
    let mut seen = 0;
    while seen < count {
        let mut any = false;
        for event in handle.get_ref().try_recv(&mut batch)? {
            any = true;
            match event {
                Event::Packet(packet) => {
                    verdicts.push(packet.key(), Verdict::Accept)?;
                    seen += 1;
                }
                other => eprintln!("{other}"),
            }
        }
        handle.get_ref().send(&mut verdicts)?;
        if !any {
            // The socket is empty, and nothing is left in the batch.
            handle.readable().await?;
        }
    }
    Ok(())
}
