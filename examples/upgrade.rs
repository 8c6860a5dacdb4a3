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
//! packets are in hand, without a verdict: the new process receives them again. If the file cannot
//! be started, the old process goes on.
//!
//! A daemon that does this at a signal blocks the signal before exec, and unblocks it when the new
//! process has its handler: exec resets handlers.

use std::error::Error;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nfqnl::{Event, Handover, Orphans, Queue, RecvBatch, SendBatch, Socket, Verdict};

mod support;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const NUMBER: u16 = 1;
const HANDOVER: &str = "NFQNL_HANDOVER";

/// Takes over from the process before, or begins
fn start() -> Result<(Socket, Vec<Queue>)> {
    let Ok(handover) = std::env::var(HANDOVER) else {
        let socket = Socket::open()?;
        let queue = socket.bind(NUMBER)?;
        println!("queue {NUMBER} is bound");
        return Ok((socket, vec![queue]));
    };
    let handover: Handover = handover.parse()?;
    let fd = std::io::stdin().as_fd().try_clone_to_owned()?;
    close_stdin()?;
    let adopted = Socket::adopt(fd, Some(&handover), &[(NUMBER, Orphans::Again)])?;
    println!("queue {NUMBER} is taken over");
    Ok(adopted)
}

/// Programs that this one starts would inherit the socket.
fn close_stdin() -> Result<()> {
    Ok(rustix::stdio::dup2_stdin(File::open("/dev/null")?)?)
}

/// Gives the socket to a new process; returns it if there is none
fn upgrade(
    program: &Path,
    socket: Socket,
    [packets, upgrades]: [usize; 2],
) -> Result<(Socket, Vec<Queue>)> {
    let (fd, handover) = socket.into_fd()?;
    let error = Command::new(program)
        .args(["--packets", &packets.to_string()])
        .args(["--upgrades", &upgrades.to_string()])
        .env(HANDOVER, handover.to_string())
        .stdin(fd.try_clone()?)
        .exec();
    // exec returns only if it fails. It has changed the standard input by then.
    close_stdin()?;
    eprintln!("{}: {error}", program.display());
    Ok(Socket::adopt(
        fd,
        Some(&handover),
        &[(NUMBER, Orphans::Again)],
    )?)
}

fn main() -> Result<()> {
    let [packets, mut upgrades] = support::numbers([("--packets", 100), ("--upgrades", 3)])?;
    let program = std::env::current_exe()?; // now: a later file may have this name
    let (mut socket, mut _queues) = start()?;
    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
    let mut accepted = 0;
    loop {
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
        if accepted == packets {
            if upgrades == 0 {
                return Ok(());
            }
            upgrades -= 1;
            (socket, _queues) = upgrade(&program, socket, [packets, upgrades])?;
            (batch, accepted) = (RecvBatch::default(), 0);
        }
    }
}
