//! Accepts every packet of a queue, and looks at no more than its headers: how small such a program is
//!
//! ```text
//! iptables -A INPUT -j NFQUEUE --queue-num 1      # or: nft … queue num 1
//! scripts/static.sh mips-unknown-linux-musl       # builds it for a router, and says where it is
//! accept_all 1                                    # on the router
//! ```

use std::convert::Infallible;
use std::env;
use std::process::ExitCode;

use nfqnl::{CopyMode, Event, Handle, QueueConfig, RecvBatch, Result, Verdict, VerdictBatch};

/// As much of each packet as IP and transport headers take
const RANGE: u32 = 128;

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
    let handle = Handle::open()?;
    let config = QueueConfig::new().copy_mode(CopyMode::PACKET, RANGE);
    let _queue = handle.bind_queue_with(queue, &config)?;
    let mut batch = RecvBatch::for_copy(64, CopyMode::PACKET, RANGE);
    let mut verdicts = VerdictBatch::new();
    loop {
        for event in handle.recv(&mut batch)? {
            match event {
                Event::Packet(packet) => verdicts.push(packet.key(), Verdict::Accept)?,
                // Not received as they should be, but they wait.
                Event::Truncated { key: Some(key), .. }
                | Event::Malformed { key: Some(key), .. } => verdicts.push(key, Verdict::Accept)?,
                Event::Refused(refusal) => eprintln!("{refusal}"),
                Event::Overrun => eprintln!("receive buffer full: packets were lost"),
                _ => eprintln!("something came that is no packet"),
            }
        }
        handle.send(&mut verdicts)?;
    }
}
