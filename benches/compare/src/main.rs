//! nfqnl beside its rivals, in one run; `benches/compare/run` builds all sides and starts this
//!
//! Each side is a process with its own queue and port, in one network namespace. The sides take
//! turns, several hundred times, and a different side begins each round. The results are medians,
//! and ratios of medians.
//!
//! * Throughput: a number of UDP packets waits in the queue of one side, which then handles them
//!   all and measures the time.
//! * Latency: one UDP packet goes from a socket through the queue to the same socket, repeatedly.
//! * Goodput: a TCP connection over loopback with the MTU of Ethernet; each segment passes the
//!   queue.

mod peers;

use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use nfqnl_testkit::rules::{Chain, Family, Hook, Rule, Table};
use nfqnl_testkit::traffic::{TIMEOUT, Udp, V4};
use nfqnl_testkit::{cpu, link, netns};

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error>>;

const IP_AND_UDP: usize = 28;
const FIRST_PORT: u16 = 5000;
/// Packet length, and a number of packets that fits the default receive buffer of every side
const PACKETS: [(usize, usize); 2] = [(64, 192), (1400, 64)];
const KINDS: [&str; 3] = ["accept", "drop", "mixed"];
const LATENCY: &str = "latency";
const GOODPUT: &str = "goodput";
const MTU: u32 = 1500;

/// A rival, or a style of nfqnl
struct Program {
    name: &'static str,
    command: Vec<String>,
    /// Arguments after the common ones
    tail: &'static [&'static str],
}

/// The sides, in the order of the table; the first is the base of the ratios
fn programs(built: &Path) -> Result<Vec<Program>> {
    let of_c = |name: &str| vec![built.join(name).display().to_string()];
    let own = std::env::current_exe()?.display().to_string();
    let of_ours = |style: &str| vec![own.clone(), "--peer".into(), style.into()];
    let program = |name, command, tail| Program {
        name,
        command,
        tail,
    };
    let mut all = vec![
        program(C, of_c("libnetfilter_queue"), &[]),
        program("C libmnl", of_c("libmnl"), &[]),
        program(NFQ, of_ours("nfq"), &[]),
        program("floor: 32, single", of_c("floor"), &["32", "single"]),
        program("floor: 32, runs", of_c("floor"), &["32", "runs"]),
        program("floor: 64, runs", of_c("floor"), &["64", "runs"]),
        program("nfqnl handle_packet", of_ours("handle_packet"), &[]),
        program("nfqnl run_once", of_ours("run_once"), &[]),
        program(LOOP, of_ours("loop"), &[]),
    ];
    let python = built.join("python");
    if python.join("ok").exists() {
        let command = vec![
            python.join("bin/python").display().to_string(),
            concat!(env!("CARGO_MANIFEST_DIR"), "/peers/python.py").to_owned(),
        ];
        all.insert(3, program("python NetfilterQueue", command, &[]));
    }
    Ok(all)
}

const C: &str = "C libnetfilter_queue";
const NFQ: &str = "nfq 0.2.5";
const LOOP: &str = "nfqnl loop";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments[..] {
        ["--peer", ref arguments @ ..] => peers::run(arguments),
        [built, ref options @ ..] => Options::parse(options).and_then(|options| {
            netns::enter()?;
            compare(Path::new(built), &options)
        }),
        [] => Err("start this with benches/compare/run".into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compare: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The command line
struct Options {
    is_quick: bool,
    only: Option<String>,
    placement: Placement,
    /// The available CPUs
    cpus: Vec<usize>,
}

/// The CPUs of the sender and of the sides: caches matter more here than most other things
#[derive(Clone, Copy, PartialEq)]
enum Placement {
    /// All on one CPU
    Same,
    /// The sides on another CPU than the sender
    Apart,
    /// The scheduler decides
    Free,
}

impl Options {
    fn parse(arguments: &[&str]) -> Result<Self> {
        let mut options = Self {
            is_quick: false,
            only: None,
            placement: Placement::Same,
            cpus: cpu::allowed()?,
        };
        let mut arguments = arguments.iter();
        while let Some(&argument) = arguments.next() {
            match argument {
                "--quick" => options.is_quick = true,
                "--only" => options.only = arguments.next().map(|&what| what.to_owned()),
                "--same" => options.placement = Placement::Same,
                "--apart" => options.placement = Placement::Apart,
                "--free" => options.placement = Placement::Free,
                _ => return Err(format!("no option: {argument}").into()),
            }
        }
        let all = [&KINDS[..], &[LATENCY, GOODPUT]].concat();
        match options.only.as_deref() {
            Some(only) if !all.contains(&only) => Err(format!("--only what of {all:?}?").into()),
            _ if options.placement == Placement::Apart && options.cpus.len() < 2 => {
                Err("--apart with one CPU?".into())
            }
            _ => Ok(options),
        }
    }

    /// Calls a function on the CPU of the sides, or of the sender
    fn place<T: Send>(&self, is_side: bool, f: impl FnOnce() -> T + Send) -> Result<T> {
        let cpu = match self.placement {
            Placement::Free => None,
            Placement::Apart if is_side => self.cpus.last(),
            Placement::Apart | Placement::Same => self.cpus.first(),
        };
        match cpu {
            Some(&cpu) => Ok(cpu::on(cpu, f)?),
            None => Ok(f()),
        }
    }
}

fn compare(built: &Path, options: &Options) -> Result<()> {
    let compared = options.place(false, || {
        compare_here(built, options).map_err(|error| error.to_string())
    })?;
    Ok(compared?)
}

fn compare_here(built: &Path, options: &Options) -> Result<()> {
    let is_quick = options.is_quick;
    let is_wanted = |what: &str| options.only.as_deref().is_none_or(|only| only == what);
    link::set_mtu("lo", MTU)?;
    let table = Table::new(Family::Ip, "compare")?;
    let chain = table.chain("c", Hook::Input, 0)?;
    let programs = programs(built)?;
    let (rounds, round_trips, seconds) = if is_quick {
        (4, 50, 0.1)
    } else {
        (200, 200, 1.0)
    };
    let mut misses = Vec::new();

    for (len, packets) in PACKETS {
        for kind in KINDS.into_iter().filter(|kind| is_wanted(kind)) {
            let measured = throughput(&chain, &programs, options, kind, len, packets, rounds)?;
            print_throughput(kind, len, packets, rounds, &measured);
            misses.extend(missed(kind, len, &measured));
        }
    }
    if is_wanted(LATENCY) {
        let rounds = if is_quick { 2 } else { 20 };
        let measured = latency(&chain, &programs, options, round_trips, rounds)?;
        misses.extend(print_latency(&measured));
    }
    if is_wanted(GOODPUT) {
        let rounds = if is_quick { 1 } else { 7 };
        misses.extend(goodput(&chain, &programs, options, seconds, rounds)?);
    }

    if is_quick {
        println!("\nA quick run judges nothing.");
        return Ok(());
    }
    for miss in &misses {
        println!("\nMISSED: {miss}");
    }
    if misses.is_empty() {
        Ok(())
    } else {
        Err(format!("{} targets missed", misses.len()).into())
    }
}

/// The time of a side per packet, in nanoseconds: medians
struct Measured {
    name: &'static str,
    wall: f64,
    cpu: f64,
}

fn throughput(
    chain: &Chain<'_>,
    programs: &[Program],
    options: &Options,
    kind: &'static str,
    len: usize,
    packets: usize,
    rounds: usize,
) -> Result<Vec<Measured>> {
    let mut sides = Side::start_all(chain, programs, options, kind)?;
    for round in 0..rounds {
        let n = sides.len();
        for place in 0..n {
            let side = sides.get_mut((place + round) % n).ok_or("no side")?;
            side.run_round(kind, len, packets)?;
        }
    }
    chain.flush()?;
    let each = |samples: &mut Vec<f64>| median(samples) / packets as f64;
    Ok(sides
        .iter_mut()
        .map(|side| Measured {
            name: side.name,
            wall: each(&mut side.wall),
            cpu: each(&mut side.cpu),
        })
        .collect())
}

fn print_throughput(kind: &str, len: usize, packets: usize, rounds: usize, all: &[Measured]) {
    println!("\n### {kind}, {len} bytes ({rounds} rounds of {packets} packets)\n");
    println!("| | ns per packet | CPU ns per packet | packets, {C} = 1 |");
    println!("|---|---:|---:|---:|");
    let base = wall(all, C);
    for Measured { name, wall, cpu } in all {
        println!("| {name} | {wall:.0} | {cpu:.0} | {:.2} |", base / wall);
    }
}

fn wall(all: &[Measured], name: &str) -> f64 {
    all.iter()
        .find(|side| side.name == name)
        .map_or(f64::NAN, |side| side.wall)
}

/// The missed targets of throughput
fn missed(kind: &str, len: usize, all: &[Measured]) -> Vec<String> {
    let floor = all
        .iter()
        .filter(|side| side.name.starts_with("floor"))
        .map(|side| side.wall)
        .fold(f64::INFINITY, f64::min);
    let (c, nfq) = (wall(all, C), wall(all, NFQ));
    let targets: &[(&str, &str, f64, f64)] = match kind {
        "accept" => &[
            (LOOP, C, c, 1.7),
            (LOOP, NFQ, nfq, 1.45),
            (LOOP, "the best floor", floor, 0.95),
            ("nfqnl run_once", C, c, 1.6),
            ("nfqnl handle_packet", C, c, 0.98),
        ],
        "mixed" => &[(LOOP, C, c, 1.5)],
        _ => &[],
    };
    targets
        .iter()
        .filter_map(|&(ours, theirs, base, least)| {
            let ratio = base / wall(all, ours);
            (ratio < least).then(|| {
                format!("{kind}, {len} bytes: {ours} has {ratio:.2} times the packets of {theirs}, not {least}")
            })
        })
        .collect()
}

/// The time of a round trip, in microseconds
struct RoundTrips {
    name: &'static str,
    p50: f64,
    p99: f64,
}

fn latency(
    chain: &Chain<'_>,
    programs: &[Program],
    options: &Options,
    round_trips: usize,
    rounds: usize,
) -> Result<Vec<RoundTrips>> {
    let mut sides = Side::start_all(chain, programs, options, "accept")?;
    for round in 0..rounds {
        let n = sides.len();
        for place in 0..n {
            let side = sides.get_mut((place + round) % n).ok_or("no side")?;
            side.run_round_trips(round_trips)?;
        }
    }
    chain.flush()?;
    Ok(sides
        .iter_mut()
        .map(|side| {
            side.wall.sort_by(f64::total_cmp);
            let at = |percent: usize| {
                let index = side.wall.len() * percent / 100;
                side.wall.get(index).copied().unwrap_or(f64::NAN) / 1000.0
            };
            RoundTrips {
                name: side.name,
                p50: at(50),
                p99: at(99),
            }
        })
        .collect())
}

fn print_latency(all: &[RoundTrips]) -> Option<String> {
    println!("\n### latency of one 64-byte UDP packet through the queue\n");
    println!("| | p50 µs | p99 µs |\n|---|---:|---:|");
    for RoundTrips { name, p50, p99 } in all {
        println!("| {name} | {p50:.1} | {p99:.1} |");
    }
    let p50 = |name| {
        all.iter()
            .find(|side| side.name == name)
            .map_or(f64::NAN, |side| side.p50)
    };
    let (ours, theirs) = (p50(LOOP), p50(C));
    // The run does not resolve smaller differences.
    (ours > theirs * 1.02)
        .then(|| format!("latency: {LOOP} has a p50 of {ours:.1} µs, {C} {theirs:.1}"))
}

fn goodput(
    chain: &Chain<'_>,
    programs: &[Program],
    options: &Options,
    seconds: f64,
    rounds: usize,
) -> Result<Vec<String>> {
    println!("\n### TCP goodput over loopback, MTU {MTU}, every segment through the queue\n");
    println!("| | receive buffer | without GSO, Gbit/s | with GSO, Gbit/s | ratio |");
    println!("|---|---|---:|---:|---:|");
    // Rates with default buffers, of libnetfilter_queue and of the loop
    let mut defaults = Vec::new();
    let sides = programs
        .iter()
        .filter(|program| [C, LOOP].contains(&program.name));
    let sides = sides.flat_map(|program| RECV_BUFFERS.map(|buffer| (program, buffer)));
    for (program, (recv_buffer, name)) in sides {
        let mut rates = [Vec::new(), Vec::new()];
        for _ in 0..rounds {
            for (wants_gso, rates) in [false, true].into_iter().zip(&mut rates) {
                let queue = QueueOptions {
                    kind: "accept",
                    recv_buffer,
                    wants_gso,
                    rule: Rule::new().tcp(),
                };
                let side = Side::start(chain, program, options, 0, &queue)?;
                rates.push(side.tcp_rate(seconds)?);
                chain.flush()?;
            }
        }
        let [without, with] = rates.map(|mut rates| median(&mut rates));
        let ratio = with / without;
        println!(
            "| {} | {name} | {without:.2} | {with:.2} | {ratio:.1} |",
            program.name
        );
        if recv_buffer == 0 {
            defaults.push((without, with));
        }
    }
    let [(theirs, _), (ours, ours_with_gso)] = defaults[..] else {
        return Err("two sides have default buffers".into());
    };
    let targets = [
        ("without GSO, beside libnetfilter_queue", ours / theirs, 2.0),
        ("with GSO, beside that without", ours_with_gso / ours, 3.0),
    ];
    let missed = targets.iter().filter(|(_, ratio, least)| ratio < least);
    Ok(missed
        .map(|(what, ratio, least)| format!("goodput {what}: {ratio:.1} times, not {least}"))
        .collect())
}

/// Sizes in bytes, and their names
const RECV_BUFFERS: [(usize, &str); 2] = [(0, "default"), (1 << 20, "1 MiB")];

fn median(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The options of a side's queue
struct QueueOptions {
    /// One of [`KINDS`]
    kind: &'static str,
    /// In bytes; 0 for the default
    recv_buffer: usize,
    wants_gso: bool,
    /// The rule for its packets, without the port
    rule: Rule,
}

/// A process that handles packets, the socket that sends them, and the times
struct Side {
    name: &'static str,
    socket: Udp,
    port: u16,
    commands: ChildStdin,
    answers: Receiver<String>,
    process: Child,
    /// In nanoseconds
    wall: Vec<f64>,
    cpu: Vec<f64>,
    /// The packets so far; their ids begin at 1
    seen: usize,
}

impl Side {
    fn start_all(
        chain: &Chain<'_>,
        programs: &[Program],
        options: &Options,
        kind: &'static str,
    ) -> Result<Vec<Self>> {
        let queue = QueueOptions {
            kind,
            recv_buffer: 0,
            wants_gso: false,
            rule: Rule::new().udp(),
        };
        let start = |(index, program): (usize, &Program)| {
            Self::start(chain, program, options, u16::try_from(index)?, &queue)
        };
        programs.iter().enumerate().map(start).collect()
    }

    fn start(
        chain: &Chain<'_>,
        program: &Program,
        options: &Options,
        num: u16,
        queue: &QueueOptions,
    ) -> Result<Self> {
        let port = FIRST_PORT + num;
        chain.add(&queue.rule.clone().dport(port).queue(num))?;
        let [executable, leading @ ..] = &program.command[..] else {
            return Err("no command".into());
        };
        let mut command = Command::new(PathBuf::from(executable));
        command
            .args(leading)
            .args([&num.to_string(), queue.kind, &queue.recv_buffer.to_string()])
            .arg(if queue.wants_gso { "gso" } else { "-" })
            .args(program.tail)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut process = options
            .place(true, move || command.spawn())?
            .map_err(|error| format!("{executable}: {error}"))?;
        let output = BufReader::new(process.stdout.take().ok_or("no output")?);
        let (send, answers) = mpsc::channel();
        thread::spawn(move || {
            output
                .lines()
                .map_while(|line| line.ok())
                .try_for_each(|line| send.send(line))
        });
        let side = Self {
            name: program.name,
            socket: Udp::bind(V4, port)?,
            port,
            commands: process.stdin.take().ok_or("no input")?,
            answers,
            process,
            wall: Vec::new(),
            cpu: Vec::new(),
            seen: 0,
        };
        side.answer()?; // "ready"
        Ok(side)
    }

    fn answer(&self) -> Result<String> {
        let answer = self.answers.recv_timeout(2 * TIMEOUT);
        answer.map_err(|_| format!("{} does not answer", self.name).into())
    }

    fn run_round(&mut self, kind: &str, len: usize, packets: usize) -> Result<()> {
        let payload = vec![0; len - IP_AND_UDP];
        for _ in 0..packets {
            self.socket.send(&payload, self.socket.address())?;
        }
        writeln!(self.commands, "{packets}")?;
        let answer = self.answer()?;
        let mut numbers = answer.split(' ').map(str::parse::<f64>);
        let mut number = || {
            numbers
                .next()
                .ok_or("no number")?
                .map_err(|error| error.to_string())
        };
        self.wall.push(number()?);
        self.cpu.push(number()?);
        if number()? != (packets * len) as f64 {
            return Err(format!("{}: {answer:?}, wrong number of bytes", self.name).into());
        }
        let ids = self.seen + 1..=self.seen + packets;
        self.seen += packets;
        let accepted = match kind {
            "drop" => 0,
            "mixed" => ids.filter(|id| id % 8 != 0).count(),
            _ => packets,
        };
        let mut buf = [0; 2048];
        for _ in 0..accepted {
            let received = self.socket.recv_into(&mut buf, TIMEOUT);
            received.ok_or_else(|| format!("{}: a packet was not accepted", self.name))?;
        }
        if kind == "drop"
            && self
                .socket
                .recv_into(&mut buf, Duration::from_millis(1))
                .is_some()
        {
            return Err(format!("{}: a packet was not dropped", self.name).into());
        }
        Ok(())
    }

    fn run_round_trips(&mut self, round_trips: usize) -> Result<()> {
        let payload = [0; 64 - IP_AND_UDP];
        let to = self.socket.address();
        let mut buf = [0; 2048];
        writeln!(self.commands, "{round_trips}")?;
        for _ in 0..round_trips {
            let begin = Instant::now();
            self.socket.send(&payload, to)?;
            let received = self.socket.recv_into(&mut buf, TIMEOUT);
            received.ok_or_else(|| format!("{}: a packet was not accepted", self.name))?;
            self.wall.push(begin.elapsed().as_nanos() as f64);
        }
        self.answer()?;
        Ok(())
    }

    /// Measures a TCP connection for some seconds, in Gbit/s
    fn tcp_rate(mut self, seconds: f64) -> Result<f64> {
        writeln!(self.commands, "{}", u32::MAX)?; // until the process is killed
        let listener = TcpListener::bind((V4, self.port))?;
        let receiver = thread::spawn(move || -> std::io::Result<(u64, Duration)> {
            let (mut stream, _) = listener.accept()?;
            stream.set_read_timeout(Some(TIMEOUT))?;
            let mut buf = vec![0; 1 << 18];
            let (mut bytes, begin) = (0, Instant::now());
            loop {
                match stream.read(&mut buf)? {
                    0 => return Ok((bytes, begin.elapsed())),
                    len => bytes += len as u64,
                }
            }
        });
        let mut stream = TcpStream::connect_timeout(&(V4, self.port).into(), TIMEOUT)?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        let data = vec![0; 1 << 18];
        let end = Instant::now() + Duration::from_secs_f64(seconds);
        while Instant::now() < end {
            stream.write_all(&data)?;
        }
        drop(stream);
        let received = receiver.join().map_err(|_| "the receiver panicked")?;
        let (bytes, time) = received?;
        Ok(bytes as f64 * 8.0 / 1e9 / time.as_secs_f64())
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
