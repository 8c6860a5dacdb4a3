//! An event loop by mio, whose epoll is edge-triggered: it tells of something new, and never again
//!
//! ```text
//! iptables -A INPUT -p udp -j NFQUEUE --queue-num 1      # or: nft … queue num 1
//! cargo run --release --example mio
//! ```
//!
//! All packets are accepted. `--queue N` is the queue if it is not 1; `--count N` ends after N packets.

use std::error::Error;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Interest, Poll, Token};
use nfqnl::{Event, Handle, RecvBatch, Verdict, VerdictBatch};

mod support;

const QUEUE: Token = Token(0);
/// After so many events it is the turn of the loop's other sources, if it has any
const TURN: usize = 16;

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let [number, count] = support::numbers([("--queue", 1), ("--count", usize::MAX)])?;
    let handle = Handle::open()?;
    let queue = handle.bind_queue(number.try_into()?)?;
    println!("queue {} is bound", queue.num());

    let mut poll = Poll::new()?;
    let fd = handle.as_raw_fd();
    poll.registry()
        .register(&mut SourceFd(&fd), QUEUE, Interest::READABLE)?;

    let mut ready = mio::Events::with_capacity(16);
    let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
    let mut has_more = false;
    let mut seen = 0;
    while seen < count {
        let timeout = has_more.then_some(Duration::ZERO);
        match poll.poll(&mut ready, timeout) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            polled => polled?,
        }
        if !has_more && ready.iter().all(|event| event.token() != QUEUE) {
            continue;
        }
        let mut any = false;
        for event in handle.try_recv(&mut batch)?.take(TURN) {
            any = true;
            match event {
                Event::Packet(packet) => {
                    verdicts.push(packet.key(), Verdict::Accept)?;
                    seen += 1;
                }
                other => eprintln!("{other}"),
            }
        }
        handle.send(&mut verdicts)?;
        // Nothing tells of what is left in the batch; nor of what is left in the socket, until a call finds it empty.
        has_more = any || batch.has_events();
    }

    queue.destroy()?;
    Ok(())
}
