//! `handle_packet` and the caller's own receive loop against the same loop on libnetfilter_queue
//!
//! ```text
//! apt-get install gcc libnetfilter-queue-dev
//! cargo bench --bench compare [-- --quick]
//! ```
//!
//! Two processes, one with each library, take turns: packets of 64 bytes are put in the queue of one, and it is told to
//! handle and accept them all while it keeps the time. What is reported is the ratio of the medians. The benchmark fails
//! if ours is clearly the slower one.

use std::error::Error;
use std::io::{BufRead, BufReader, Lines, Write};
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use nfqnl::{CopyMode, RecvBatch, Verdict};
use nfqnl_testkit::netns;
use nfqnl_testkit::rules::{Family, Hook, Rule, Table};
use nfqnl_testkit::traffic::{Udp, V4};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// So many small packets fit a default receive buffer
const PACKETS: usize = 200;
const PACKET_LEN: usize = 64;
const IP_AND_UDP: usize = 28;
const ROUNDS: usize = 300;
const QUICK_ROUNDS: usize = 30;
/// Less is not noise any more
const LEAST_RATIO: f64 = 0.9;
const PORT: u16 = 5000;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--peer", queue] => queue.parse().map_err(Into::into).and_then(peer),
        [] => compare(ROUNDS),
        ["--quick"] => compare(QUICK_ROUNDS),
        _ => Err("usage: compare [--quick]".into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compare: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Our side, statement for statement as `peer.c`
fn peer(queue_num: u16) -> Result<()> {
    let bytes = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&bytes);
    let mut handle = nfqnl::open()?;
    let queue = handle.create_queue(queue_num, move |data| {
        // Nobody else writes it: an addition as in `peer.c`.
        let sum = counter.load(Ordering::Relaxed) + data.get_payload().len() as u64;
        counter.store(sum, Ordering::Relaxed);
        data.set_verdict(Verdict::Accept, None);
    })?;
    queue.set_mode(CopyMode::PACKET, 0xffff)?;
    // Only for its `recv`, which is the system call that `peer.c` makes.
    let socket = UdpSocket::from(handle.as_fd().try_clone_to_owned()?);
    let mut buf = vec![0; RecvBatch::DEFAULT_SLOT_LEN];
    println!("ready");
    for line in std::io::stdin().lines() {
        let wanted: usize = line?.parse()?;
        let begin = Instant::now();
        bytes.store(0, Ordering::Relaxed);
        let mut handled = 0;
        while handled < wanted {
            let len = socket.recv(&mut buf)?;
            handled += handle.handle_packet(&buf[..len])?;
        }
        println!(
            "{} {}",
            begin.elapsed().as_nanos(),
            bytes.load(Ordering::Relaxed)
        );
    }
    Ok(())
}

fn compare(rounds: usize) -> Result<()> {
    let theirs = build_peer()?;
    netns::enter()?;
    let table = Table::new(Family::Ip, "compare")?;
    let chain = table.chain("c", Hook::Input, 0)?;
    let mut theirs = Side::start(Command::new(theirs), 1, &chain)?;
    let mut ours = Command::new(std::env::current_exe()?);
    ours.arg("--peer");
    let mut ours = Side::start(ours, 2, &chain)?;
    for round in 0..rounds {
        // By turns, who is first
        let sides = if round % 2 == 0 {
            [&mut theirs, &mut ours]
        } else {
            [&mut ours, &mut theirs]
        };
        for side in sides {
            side.run_round()?;
        }
    }
    let [theirs, ours] = [theirs, ours].map(|side| side.median());
    let ratio = theirs / ours;
    println!(
        "{rounds} rounds of {PACKETS} packets of {PACKET_LEN} bytes each, UDP over IPv4, accepted; medians:"
    );
    println!("  libnetfilter_queue  {theirs:7.0} ns per packet");
    println!("  nfqnl               {ours:7.0} ns per packet");
    println!("  nfqnl handles {ratio:.3} times the packets of libnetfilter_queue");
    if ratio < LEAST_RATIO {
        return Err(format!("slower than libnetfilter_queue: {ratio:.3}").into());
    }
    Ok(())
}

/// Compiles `peer.c`; says what is missing if that fails
fn build_peer() -> Result<std::path::PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/compare/peer.c");
    let program = std::env::current_exe()?.with_file_name("compare-peer-c");
    let status = Command::new("gcc")
        .args(["-O2", "-Wall", "-Wextra", "-o"])
        .args([&program, &source])
        .arg("-lnetfilter_queue")
        .status();
    match status {
        Ok(status) if status.success() => Ok(program),
        Ok(status) => Err(format!("gcc: {status}; is libnetfilter-queue-dev installed?").into()),
        Err(error) => Err(format!("gcc: {error}").into()),
    }
}

/// A process that handles packets, the socket that sends them to it, and its times
struct Side {
    socket: Udp,
    commands: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    nanoseconds: Vec<f64>,
    _process: Child,
}

impl Side {
    fn start(
        mut command: Command,
        queue: u16,
        chain: &nfqnl_testkit::rules::Chain<'_>,
    ) -> Result<Self> {
        let port = PORT + queue;
        chain.add(&Rule::new().udp().dport(port).queue(queue))?;
        let mut process = command
            .arg(queue.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let answers = process.stdout.take().ok_or("no output")?;
        let mut side = Self {
            socket: Udp::bind(V4, port)?,
            commands: process.stdin.take().ok_or("no input")?,
            answers: BufReader::new(answers).lines(),
            nanoseconds: Vec::new(),
            _process: process,
        };
        side.answer()?; // "ready"
        Ok(side)
    }

    fn answer(&mut self) -> Result<String> {
        Ok(self.answers.next().ok_or("the peer has ended")??)
    }

    fn run_round(&mut self) -> Result<()> {
        let payload = [0; PACKET_LEN - IP_AND_UDP];
        for _ in 0..PACKETS {
            self.socket.send(&payload, self.socket.address())?;
        }
        writeln!(self.commands, "{PACKETS}")?;
        let answer = self.answer()?;
        let (nanoseconds, bytes) = answer.split_once(' ').ok_or("no answer")?;
        if bytes.parse() != Ok(PACKETS * PACKET_LEN) {
            return Err(format!("{bytes} bytes handled").into());
        }
        for _ in 0..PACKETS {
            self.socket.recv().ok_or("a packet was not accepted")?;
        }
        self.nanoseconds.push(nanoseconds.parse()?);
        Ok(())
    }

    /// Per packet
    fn median(mut self) -> f64 {
        self.nanoseconds.sort_by(f64::total_cmp);
        self.nanoseconds[self.nanoseconds.len() / 2] / PACKETS as f64
    }
}
