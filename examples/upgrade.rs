//! Replaces itself by a new process of the same program, and loses no packet
//!
//! ```text
//! iptables -A INPUT -p udp --dport 5000 -j NFQUEUE --queue-num 1
//! cargo run --example upgrade
//! ```
//!
//! The program accepts packets. After each `--packets N` (100) it starts its program file again
//! with exec(2), as a daemon does for an upgrade, `--upgrades N` times (3). The new process gets
//! the socket as its standard input, and the handover in an environment variable. Each time a few
//! packets are in hand, without a verdict: the new process receives them again.

use std::error::Error;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nfqnl::{Event, Handover, Orphans, Queue, RecvBatch, SendBatch, Socket, Verdict};

mod support;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const NUMBER: u16 = 1;
const HANDOVER: &str = "NFQNL_HANDOVER";

/// Takes over from the process before, or begins
fn start() -> Result<(Socket, Queue)> {
    let Ok(handover) = std::env::var(HANDOVER) else {
        let socket = Socket::open()?;
        let queue = socket.bind(NUMBER)?;
        println!("queue {NUMBER} is bound");
        return Ok((socket, queue));
    };
    let handover: Handover = handover.parse()?;
    let fd = std::io::stdin().as_fd().try_clone_to_owned()?;
    let queues = [(NUMBER, Orphans::Again)];
    let (socket, mut queues) = Socket::adopt(fd, Some(&handover), &queues)?;
    println!("queue {NUMBER} is taken over");
    Ok((socket, queues.pop().ok_or("no queue")?))
}

fn main() -> Result<()> {
    let [packets, upgrades] = support::numbers([("--packets", 100), ("--upgrades", 3)])?;
    let (socket, _queue) = start()?;
    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
    let mut accepted = 0;
    while accepted < packets {
        for event in socket.recv(&mut batch)? {
            match event {
                Event::Packet(packet) if accepted < packets => {
                    accepted += 1;
                    verdicts.push(packet.key(), Verdict::Accept)?;
                }
                Event::Packet(_) => {} // in hand: the next process receives it again
                other => eprintln!("{other}"),
            }
        }
        socket.send(&mut verdicts)?;
    }
    if upgrades == 0 {
        return Ok(());
    }
    let (fd, handover) = socket.into_fd()?;
    let error = Command::new(std::env::current_exe()?)
        .args(["--packets", &packets.to_string()])
        .args(["--upgrades", &(upgrades - 1).to_string()])
        .env(HANDOVER, handover.to_string())
        .stdin(fd)
        .exec();
    Err(error.into()) // exec returns only if it fails
}
