//! An event loop on mio, with edge-triggered epoll: epoll reports new packets once
//!
//! ```text
//! iptables -A INPUT -p udp -j NFQUEUE --queue-num 1      # or: nft … queue num 1
//! cargo run --release --example mio
//! ```
//!
//! All packets are accepted. `--queue N` selects the queue (default 1); `--count N` ends after N
//! packets.

use std::error::Error;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Interest, Poll, Token};
use nfqnl::{Event, RecvBatch, SendBatch, Socket, Verdict};

mod support;

const QUEUE: Token = Token(0);

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let [number, count] = support::numbers([("--queue", 1), ("--count", usize::MAX)])?;
    let socket = Socket::open()?;
    let queue = socket.bind(number.try_into()?)?;
    println!("queue {} is bound", queue.num());

    let mut poll = Poll::new()?;
    let fd = socket.as_raw_fd();
    poll.registry()
        .register(&mut SourceFd(&fd), QUEUE, Interest::READABLE)?;

    let mut ready = mio::Events::with_capacity(16);
    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
    // epoll does not report again what is left in the socket, so the loop goes on until `try_recv`
    // returns no events. Until then it polls its other sources without waiting.
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
        has_more = false;
        for event in socket.try_recv(&mut batch)? {
            has_more = true;
            match event {
                Event::Packet(packet) => {
                    verdicts.push(packet.key(), Verdict::Accept)?;
                    seen += 1;
                }
                other => eprintln!("{other}"),
            }
        }
        socket.send(&mut verdicts)?;
    }

    queue.destroy()?;
    Ok(())
}
