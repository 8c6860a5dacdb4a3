//! Measures the memory of a program accepting all packets of queue 1 under full load
//!
//! ```text
//! cargo run --release -p nfqnl-testkit --example resident -- PROGRAM [ARGUMENT...]
//! ```
//!
//! The program runs in its own network namespace, while threads send packets as fast as possible.
//! Prints the peak of the program's resident memory in KiB, and fails if a packet is lost.

use std::error::Error;
use std::fs;
use std::net::UdpSocket;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use nfqnl_testkit::netns;
use nfqnl_testkit::rules::{Chain, Family, Hook, Rule, Table};
use nfqnl_testkit::traffic::{TIMEOUT, V4};

const PORT: u16 = 5000;
const QUEUE: u16 = 1;
const SENDERS: usize = 2;
const FOR: Duration = Duration::from_secs(2);
/// The least number of packets for a full load
const AT_LEAST: u64 = 10_000;
/// Waiting packets stay charged to their sender's buffer. Packets of this size fill the sender's
/// buffer before their headers fill the program's receive buffer.
const PAYLOAD: [u8; 4000] = [1; 4000];

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

/// A running program; dropping this kills it
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let name = arguments
        .next()
        .ok_or("usage: resident PROGRAM [ARGUMENT...]")?;
    netns::enter()?;
    let table = Table::new(Family::Ip, "t")?;
    let output = table.chain("out", Hook::Output, 0)?;
    output.add(&Rule::new().udp_dport(PORT).queue(QUEUE))?;
    let later = table.chain("later", Hook::Output, 10)?;
    later.add(&Rule::new().udp_dport(PORT).counter("came").drop())?;

    let mut program = Program(Command::new(name).args(arguments).spawn()?);
    wait_until("the program binds the queue", is_bound)?;
    let begin = Instant::now();
    let senders: Vec<_> = (0..SENDERS).map(|_| thread::spawn(send)).collect();
    let mut sent = 0;
    for sender in senders {
        sent += sender.join().map_err(|_| "a sender panicked")??;
    }
    wait_until("all packets come through", || came(&later, sent))?;
    let seconds = begin.elapsed().as_secs_f64();
    if sent < AT_LEAST {
        return Err(format!("no load: {sent} packets").into());
    }
    if let Some(status) = program.0.try_wait()? {
        return Err(format!("the program ended: {status}").into());
    }
    eprintln!("{sent} packets in {seconds:.1} s");
    println!("{}", peak(program.0.id())?);
    Ok(())
}

/// Sends packets for a while, and returns their number
fn send() -> Result<u64> {
    let socket = UdpSocket::bind((V4, 0))?;
    socket.set_write_timeout(Some(TIMEOUT))?;
    let begin = Instant::now();
    let mut sent = 0;
    while begin.elapsed() < FOR {
        socket.send_to(&PAYLOAD, (V4, PORT))?;
        sent += 1;
    }
    Ok(sent)
}

fn is_bound() -> Result<bool> {
    let queues = fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_queue")?;
    let mut numbers = queues
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    Ok(numbers.any(|number| number == QUEUE.to_string()))
}

fn came(chain: &Chain, sent: u64) -> Result<bool> {
    Ok(chain.count("came")? == sent)
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    while !is_so()? {
        if Instant::now() > deadline {
            return Err(format!("not in {TIMEOUT:?}: {what}").into());
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Returns the peak resident memory of a process in KiB, including its program
fn peak(process: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.strip_suffix("kB"));
    Ok(peak.ok_or("no VmHWM")?.trim().parse()?)
}
