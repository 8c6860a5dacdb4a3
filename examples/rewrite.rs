//! Rewrites packets on their way out, and prints their senders
//!
//! ```text
//! iptables -A OUTPUT -p udp --dport 5000 -j NFQUEUE --queue-num 1   # or: nft … queue num 1
//! cargo run --release --example rewrite
//! ```
//!
//! Each packet gets TTL or hop limit 42, and the word `secret` in its payload becomes `(hidden)`.
//! Lengths and checksums follow. `--queue N` selects the queue (1); `--count N` ends after N
//! packets.

use std::error::Error;

use nfqnl::consts::MAX_PAYLOAD;
use nfqnl::rewrite::{RewriteError, Rewriter};
use nfqnl::{ConfigFlags, Event, Packet, QueueConfig, RecvBatch, SendBatch, Socket, Verdict};

mod support;

const OLD: &[u8] = b"secret";
const NEW: &[u8] = b"(hidden)";

/// Returns the changed packet
fn rewrite<'r>(
    packet: &Packet<'_>,
    rewriter: &'r mut Rewriter<'_>,
) -> Result<&'r [u8], RewriteError> {
    let mut rewrite = rewriter.begin(packet)?;
    rewrite.set_ttl(42);
    let found = rewrite
        .payload()?
        .windows(OLD.len())
        .position(|word| word == OLD);
    if let Some(at) = found {
        rewrite.replace(at..at + OLD.len(), NEW)?;
    }
    rewrite.finish()
}

/// Describes the sender: user, device, flow, connection
fn describe(socket: &Socket, packet: &Packet<'_>) -> nfqnl::Result<String> {
    let mut text = match packet.flow() {
        Some(flow) => flow.to_string(),
        None => packet.hw_protocol().to_string(),
    };
    if let Some(uid) = packet.uid() {
        text += &format!(", user {uid}");
    }
    for index in [packet.indev(), packet.outdev()].into_iter().flatten() {
        match socket.interface_name(index)? {
            Some(name) => text += &format!(", {name}"),
            None => text += &format!(", interface {index}"),
        }
    }
    if let Some(state) = packet.ct_state() {
        text += &format!(", connection {state}");
    }
    Ok(text)
}

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let [number, count] = support::numbers([("--queue", 1), ("--count", usize::MAX)])?;
    let socket = Socket::open()?;
    let wanted = ConfigFlags::UID_GID | ConfigFlags::CONNTRACK;
    let config = QueueConfig::new().enable_if_supported(wanted);
    let queue = socket.bind_with(number.try_into()?, &config)?;
    println!("queue {} is bound", queue.num());

    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
    let mut buf = vec![0; MAX_PAYLOAD];
    let mut rewriter = Rewriter::new(&mut buf);
    let mut seen = 0;
    while seen < count {
        for event in socket.recv(&mut batch)? {
            let Event::Packet(packet) = event else {
                eprintln!("{event}");
                continue;
            };
            seen += 1;
            println!("{}", describe(&socket, &packet)?);
            match rewrite(&packet, &mut rewriter) {
                Ok(new) => verdicts.answer(&packet, Verdict::Accept.with_payload(new))?,
                // A fragment, a truncated copy, …: it goes on unchanged.
                Err(error) => {
                    eprintln!("{error}");
                    verdicts.push(packet.key(), Verdict::Accept)?;
                }
            }
        }
        socket.send(&mut verdicts)?;
    }
    queue.destroy()?;
    Ok(())
}
