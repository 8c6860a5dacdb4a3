//! A thread and a socket for each CPU, and a rule that spreads packets over them
//!
//! ```text
//! cargo run --release --example workers -- --port 5000 --count 1000
//! ```
//!
//! The program accepts UDP to the port, prints its counters each second, and ends after `--count
//! N` packets, or at SIGTERM. `--workers N` sets the number of workers (default: the number of
//! CPUs), and `--pin 1` pins each one to its CPU. For the rule, your `Cargo.toml` needs nfqnl with
//! `features = ["rules"]`. A program without a rule of its own runs with `iptables … -j NFQUEUE
//! --queue-balance 1:4`.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use nfqnl::rules::{Queues, Rule, Table};
use nfqnl::{Event, Hook, Verdict, Workers};
use signal_hook::consts::{SIGINT, SIGTERM};

mod support;

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let options = [
        ("--port", 5000),
        ("--count", usize::MAX),
        ("--workers", 0),
        ("--pin", 0),
    ];
    let [port, count, number, pin] = support::numbers(options)?;
    // The table and its chain end after the workers: see the module `rules`.
    let table = Table::new("nfqnl-workers")?;
    let input = table.chain("input", Hook::INPUT)?;

    // Fail-open: if a worker fails, waiting packets are accepted, and `bypass` lets new ones pass.
    let mut builder = Workers::builder(1, Verdict::Accept).pin(pin > 0);
    if number > 0 {
        builder = builder.count(number.try_into()?);
    }
    let workers = builder.start(|_| {
        |event, verdicts| match event {
            Event::Packet(packet) => verdicts.push(packet.key(), Verdict::Accept),
            other => {
                eprintln!("{other}");
                Ok(())
            }
        }
    })?;

    // The queues are bound: now the rule. It spreads by addresses, or with fanout by CPUs.
    let queues = Queues::range(workers.queues()).bypass();
    let queues = if pin > 0 { queues.fanout() } else { queues };
    input.add(&Rule::new().udp_dport(u16::try_from(port)?).queue(queues))?;
    println!("queues {:?} are bound", workers.queues());

    let is_over = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&is_over))?;
    }
    let show = || {
        for (queue, socket) in workers.queues().zip(workers.sockets()) {
            println!("queue {queue}: {} packets", socket.stats().packets);
        }
    };
    while !is_over.load(Relaxed) && workers.stats().packets < count as u64 {
        if workers.wait_timeout(Duration::from_secs(1)) {
            break; // the drain returns the failure
        }
        show();
    }
    show();
    input.clear()?;
    let undecided = workers.drain(Duration::from_secs(5))?;
    println!("{undecided} packets undecided");
    Ok(())
}
