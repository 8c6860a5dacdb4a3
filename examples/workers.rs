//! A thread and a socket for each CPU, and a rule that spreads packets over them
//!
//! ```text
//! cargo run --release --example workers -- --port 5000 --count 1000
//! ```
//!
//! The program accepts UDP to the port, prints its counters each second, and ends after `--count
//! N` packets. `--workers N` sets the number of workers (default: the number of CPUs), and `--pin
//! 1` pins each one to its CPU. For the rule, your `Cargo.toml` needs nfqnl with `features =
//! ["rules"]`. A program without a rule of its own runs with `iptables … -j NFQUEUE
//! --queue-balance 1:4`.

use std::error::Error;
use std::thread;
use std::time::Duration;

use nfqnl::rules::{Queues, Rule, Table};
use nfqnl::{Event, Hook, Verdict, Workers};

mod support;

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let options = [
        ("--port", 5000),
        ("--count", usize::MAX),
        ("--workers", 0),
        ("--pin", 0),
    ];
    let [port, count, number, pin] = support::numbers(options)?;
    let mut builder = Workers::builder(1, Verdict::Drop).pin(pin > 0);
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

    // The queues are bound: now the rule. With fanout the CPU chooses the queue.
    let table = Table::new("nfqnl-workers")?;
    let input = table.chain("input", Hook::INPUT)?;
    let queues = Queues::range(workers.queues()).bypass();
    let queues = if pin > 0 { queues.fanout() } else { queues };
    input.add(&Rule::new().udp_dport(u16::try_from(port)?).queue(queues))?;
    println!("queues {:?} are bound", workers.queues());

    while workers.stats().packets < count as u64 && !workers.have_failed() {
        thread::sleep(Duration::from_secs(1));
        println!("{:?}", workers.stats());
    }
    input.clear()?;
    println!("{} packets lost", workers.drain(Duration::from_secs(5))?);
    Ok(())
}
