//! Brings its own rules, and loses no packet when it starts and stops
//!
//! ```text
//! cargo run --example rules                         # UDP to port 5000 of this host
//! cargo run --example rules -- --port 53 --count 100
//! ```
//!
//! The program accepts packets, and ends after `--count N` of them (10). Its rules are in a table
//! of nf_tables that belongs to the program: other programs cannot change the table, and it
//! vanishes with the program, also after SIGKILL. Your `Cargo.toml` needs nfqnl with
//! `features = ["rules"]`.
//!
//! The order loses nothing: make the table, bind the queue, then add the rules. At the end take the
//! rules away, then answer what waits, and remove the table last: a table that vanishes drops the
//! waiting packets of all queues.

use std::error::Error;
use std::time::Duration;

use nfqnl::rules::{Queues, Rule, Table};
use nfqnl::{Event, Hook, RecvBatch, SendBatch, Socket, Verdict};

mod support;

const NUMBER: u16 = 1;

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let [port, count] = support::numbers([("--port", 5000), ("--count", 10)])?;
    let port = u16::try_from(port)?;
    let table = Table::new("nfqnl-example")?;
    let input = table.chain("input", Hook::INPUT)?;
    let socket = Socket::open()?;
    let queue = socket.bind(NUMBER)?;
    let queued = Rule::new().udp_dport(port).counter("queued");
    input.add(&queued.queue(Queues::new(NUMBER).bypass()))?;
    println!("UDP to port {port} is queued");

    let accept = |event: Event<'_>, verdicts: &mut SendBatch| match event {
        Event::Packet(packet) => verdicts.push(packet.key(), Verdict::Accept),
        other => {
            eprintln!("{other}");
            Ok(())
        }
    };
    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
    let mut accepted = 0;
    while accepted < count {
        for event in socket.recv(&mut batch)? {
            accept(event, &mut verdicts)?;
        }
        accepted += verdicts.len();
        socket.send(&mut verdicts)?;
    }
    let counter = input.counter("queued")?.unwrap_or_default();
    println!(
        "the rule has seen {} packets, {} bytes",
        counter.packets, counter.bytes
    );
    input.clear()?;
    let lost = socket.drain(queue, &mut batch, Duration::from_secs(1), accept)?;
    println!("{lost} packets lost");
    table.remove()?;
    Ok(())
}
