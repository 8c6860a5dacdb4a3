//! Accepts every packet of a queue and copies only packet headers: a small static program
//!
//! ```text
//! iptables -A INPUT -j NFQUEUE --queue-num 1      # or: nft … queue num 1
//! scripts/static.sh mips-unknown-linux-musl       # builds it for a router and prints its path
//! accept_all 1                                    # on the router
//! ```

use std::convert::Infallible;
use std::env;
use std::process::ExitCode;

use nfqnl::{CopyMode, Event, QueueConfig, RecvBatch, Result, SendBatch, Socket, Verdict};

/// Bytes to copy of each packet: IP and transport headers
const RANGE: u32 = 128;
/// Room for 1024 copies of headers: the kernel charges 832 bytes for each, and doubles the size
const RECV_BUFFER: usize = 1024 * 832 / 2;

fn main() -> ExitCode {
    let argument = env::args_os().nth(1);
    let Some(queue) = argument.and_then(|queue| queue.to_str()?.parse().ok()) else {
        eprintln!("usage: accept_all QUEUE");
        return ExitCode::from(2);
    };
    let Err(error) = accept_all(queue);
    eprintln!("{error}");
    ExitCode::FAILURE
}

fn accept_all(queue: u16) -> Result<Infallible> {
    let socket = Socket::builder().recv_buffer(RECV_BUFFER).open()?;
    let config = QueueConfig::new().copy_mode(CopyMode::Packet, RANGE);
    let _queue = socket.bind_with(queue, &config)?;
    let mut batch = RecvBatch::for_config(64, &config);
    let mut verdicts = SendBatch::new();
    loop {
        for event in socket.recv(&mut batch)? {
            match event {
                Event::Packet(packet) => verdicts.push(packet.key(), Verdict::Accept)?,
                // Not received in full, but still waiting for a verdict
                Event::BufferTooSmall { key: Some(key), .. }
                | Event::Malformed { key: Some(key), .. } => verdicts.push(key, Verdict::Accept)?,
                Event::Refused(refusal) => eprintln!("{refusal}"),
                Event::Overrun => eprintln!("receive buffer full: packets were lost"),
                _ => eprintln!("a message that is not a packet"),
            }
        }
        socket.send(&mut verdicts)?;
    }
}
