//! nfqnl beside its rivals, in one run; `benches/compare/run` builds all sides and starts this
//!
//! Each side is a process with its own queue and port, in one network namespace. The sides take
//! turns, several hundred times, and a different side begins each round. The results are medians
//! of the rounds, then of the runs, and ratios of medians.
//!
//! * Throughput: a number of UDP packets waits in the queue of one side, which then handles them
//!   all and measures the time.
//! * Copies: the same with the loop and 1400-byte packets, of which the kernel copies a part.
//! * Latency: one UDP packet goes from a socket through the queue to the same socket, repeatedly.
//!   One side more polls busily before it waits.
//! * Queues: one or two processes of a side, each with a queue, handle waiting packets at the same
//!   time.
//! * Goodput: a TCP connection over loopback with the MTU of Ethernet; each segment passes the
//!   queue.
//! * First bytes: the same connection, of which the queue has nothing, the first 4 KiB, or all.
//! * Rewriting: a changed copy of a UDP packet, repeatedly, without a queue.

mod figures;
mod peers;
mod report;
mod rewrite;

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

use figures::{Case, Figures, Metric, TARGETS, median};

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error>>;

const IP_AND_UDP: usize = 28;
const FIRST_PORT: u16 = 5000;
/// The receive buffer of a TCP connection, in bytes
const TCP_BUFFER: usize = 1 << 20;
/// Packet length, and a number of packets fitting the default receive buffer of every side
pub(crate) const PACKETS: [(usize, usize); 2] = [(64, 192), (1400, 64)];
pub(crate) const KINDS: [&str; 3] = ["accept", "drop", "mixed"];
pub(crate) const LATENCY: &str = "latency";
pub(crate) const COPY: &str = "copy";
pub(crate) const QUEUES: &str = "queues";
pub(crate) const GOODPUT: &str = "goodput";
pub(crate) const FIRST_BYTES: &str = "first-bytes";
pub(crate) const REWRITE: &str = "rewrite";
pub(crate) const MTU: u32 = 1500;

/// A rival, or a style of nfqnl
pub(crate) struct Program {
    pub(crate) name: &'static str,
    command: Vec<String>,
    /// Arguments after the common ones
    tail: &'static [&'static str],
}

/// The sides, in the order of the table; the first is the base of the ratios
fn programs(built: &Path) -> Result<Vec<Program>> {
    let of_c = |name: &str| vec![built.join(name).display().to_string()];
    let own = std::env::current_exe()?;
    let of_ours = |style| own_command(&own, style);
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
        program(FLOOR_64, of_c("floor"), &["64", "runs"]),
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

/// The command of a side in `peers.rs`
fn own_command(own: &Path, style: &str) -> Vec<String> {
    vec![own.display().to_string(), "--peer".into(), style.into()]
}

pub(crate) const C: &str = "C libnetfilter_queue";
pub(crate) const NFQ: &str = "nfq 0.2.5";
pub(crate) const LOOP: &str = "nfqnl loop";
pub(crate) const FLOOR_64: &str = "floor: 64, runs";
pub(crate) const BUSY: &str = "nfqnl loop, busy polling";
/// Styles of the loop, each with the number of bytes that the kernel copies of a packet
pub(crate) const COPIES: [(&str, &str, usize); 3] = [
    ("whole packets", "loop", usize::MAX),
    ("128 bytes", "headers", HEADERS as usize),
    ("no bytes", "attributes", 0),
];
/// Enough bytes for all headers
const HEADERS: u32 = 128;
/// Layouts of queues on CPUs; each process has a queue
pub(crate) const ONE_QUEUE: &str = "1 queue";
pub(crate) const TWO_QUEUES: &str = "2 queues, 1 CPU";
pub(crate) const TWO_CPUS: &str = "2 queues, 2 CPUs";
/// The sides with two queues
pub(crate) const QUEUE_SIDES: [&str; 3] = [C, FLOOR_64, LOOP];
pub(crate) const LAYOUTS: [&str; 3] = [ONE_QUEUE, TWO_QUEUES, TWO_CPUS];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments[..] {
        ["--peer", ref arguments @ ..] => peers::run(arguments),
        [built, ref options @ ..] => Options::parse(options).and_then(|options| {
            if let Some(directory) = &options.write {
                report::check(directory, &options)?;
            }
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
pub(crate) struct Options {
    pub(crate) is_quick: bool,
    only: Option<String>,
    /// The directory of the report
    write: Option<PathBuf>,
    pub(crate) runs: usize,
    /// The placements of a run
    placements: Vec<Placement>,
    /// The available CPUs
    pub(crate) cpus: Vec<usize>,
}

/// The CPUs of the sender and of the sides: caches matter more here than most other things
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Placement {
    /// All on one CPU
    Same,
    /// The sides on another CPU than the sender
    Apart,
    /// The scheduler decides
    Free,
}

impl Placement {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Same => "on one CPU",
            Self::Apart => "on two CPUs",
            Self::Free => "placed by the scheduler",
        }
    }
}

impl Options {
    fn parse(arguments: &[&str]) -> Result<Self> {
        let mut options = Self {
            is_quick: false,
            only: None,
            write: None,
            runs: 0,
            placements: Vec::new(),
            cpus: cpu::allowed()?,
        };
        let mut arguments = arguments.iter().peekable();
        while let Some(&argument) = arguments.next() {
            match argument {
                "--quick" => options.is_quick = true,
                "--only" => options.only = arguments.next().map(|&what| what.to_owned()),
                "--write" => {
                    let directory = arguments.next_if(|next| !next.starts_with("--"));
                    options.write = Some(directory.copied().unwrap_or("docs").into());
                }
                "--runs" => options.runs = arguments.next().ok_or("--runs of what?")?.parse()?,
                "--same" => options.placements = vec![Placement::Same],
                "--apart" => options.placements = vec![Placement::Apart],
                "--free" => options.placements = vec![Placement::Free],
                _ => return Err(format!("no option: {argument}").into()),
            }
        }
        let is_partial = options.only.is_some() || !options.placements.is_empty();
        if options.write.is_some() && is_partial {
            return Err("--write is for everything".into());
        }
        if options.runs == 0 {
            options.runs = match options.write {
                Some(_) if !options.is_quick => 5,
                _ => 1,
            };
        }
        if options.placements.is_empty() {
            options.placements = match options.write {
                Some(_) => vec![Placement::Same, Placement::Apart, Placement::Free],
                None => vec![Placement::Same],
            };
        }
        let all = [
            &KINDS[..],
            &[COPY, LATENCY, QUEUES, GOODPUT, FIRST_BYTES, REWRITE],
        ]
        .concat();
        match options.only.as_deref() {
            Some(only) if !all.contains(&only) => Err(format!("--only what of {all:?}?").into()),
            _ if options.placements.contains(&Placement::Apart) && options.cpus.len() < 2 => {
                Err("two CPUs are needed".into())
            }
            _ => Ok(options),
        }
    }

    fn is_wanted(&self, what: &str) -> bool {
        self.only.as_deref().is_none_or(|only| only == what)
    }

    /// Returns how often and how long everything is measured in a run
    pub(crate) fn amount(&self) -> Amount {
        match self {
            Self { is_quick: true, .. } => Amount {
                rounds: 4,
                latency_rounds: 2,
                queue_rounds: 2,
                round_trips: 50,
                goodput_rounds: 1,
                seconds: 0.1,
                first_bytes_rounds: 1,
                first_bytes_seconds: 0.1,
                rewrites: 100,
            },
            _ => Amount {
                rounds: 200,
                latency_rounds: 20,
                queue_rounds: 100,
                round_trips: 200,
                goodput_rounds: if self.runs == 1 { 7 } else { 3 },
                seconds: 1.0,
                first_bytes_rounds: if self.runs == 1 { 3 } else { 1 },
                first_bytes_seconds: 5.0,
                rewrites: 5000,
            },
        }
    }

    /// Calls a function on the CPU of the sides, or of the sender
    fn place<T: Send>(
        &self,
        placement: Placement,
        is_side: bool,
        f: impl FnOnce() -> T + Send,
    ) -> Result<T> {
        let cpu = match placement {
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

/// How often and how long a run measures
#[derive(Clone, Copy)]
pub(crate) struct Amount {
    pub(crate) rounds: usize,
    latency_rounds: usize,
    queue_rounds: usize,
    round_trips: usize,
    goodput_rounds: usize,
    seconds: f64,
    first_bytes_rounds: usize,
    first_bytes_seconds: f64,
    rewrites: usize,
}

fn compare(built: &Path, options: &Options) -> Result<()> {
    link::set_mtu("lo", MTU)?;
    let programs = programs(built)?;
    let table = Table::new(Family::Ip, "compare")?;
    let chain = table.chain("c", Hook::Input, 0)?;
    let mut figures = Figures::default();
    for run in 0..options.runs {
        for &placement in &options.placements {
            if options.runs * options.placements.len() > 1 {
                println!("\n## run {}, {}", run + 1, placement.name());
            }
            let mut bench = Bench {
                options,
                built,
                programs: &programs,
                chain: &chain,
                run: (run, placement),
                figures: &mut figures,
            };
            let measured = options.place(placement, false, move || {
                bench.measure().map_err(|error| error.to_string())
            })?;
            measured?;
        }
    }
    if let Some(directory) = &options.write {
        report::write(directory, options, &programs, &figures)?;
        println!("\nWritten to {}", directory.display());
    }

    if options.is_quick {
        println!("\nA quick run judges nothing.");
        return Ok(());
    }
    let misses: Vec<String> = TARGETS
        .iter()
        .flat_map(|target| target.missed(&figures))
        .collect();
    for miss in &misses {
        println!("\nMISSED: {miss}");
    }
    if misses.is_empty() {
        Ok(())
    } else {
        Err(format!("{} targets missed", misses.len()).into())
    }
}

/// One run with one placement
struct Bench<'a> {
    options: &'a Options,
    built: &'a Path,
    programs: &'a [Program],
    chain: &'a Chain,
    run: (usize, Placement),
    figures: &'a mut Figures,
}

impl Bench<'_> {
    fn measure(&mut self) -> Result<()> {
        for (len, packets) in PACKETS {
            for kind in KINDS {
                if self.options.is_wanted(kind) {
                    self.throughput(kind, len, packets)?;
                }
            }
        }
        if self.options.is_wanted(COPY) {
            self.copy()?;
        }
        if self.options.is_wanted(LATENCY) {
            self.latency()?;
        }
        if self.options.is_wanted(QUEUES) && self.run.1 == Placement::Apart {
            self.queues()?;
        }
        if self.options.is_wanted(GOODPUT) {
            self.goodput()?;
        }
        if self.options.is_wanted(FIRST_BYTES) {
            self.first_bytes()?;
        }
        // The sender has no part in this, so that one placement is enough.
        let is_first = self.options.placements.first() == Some(&self.run.1);
        if self.options.is_wanted(REWRITE) && is_first {
            self.rewrite()?;
        }
        Ok(())
    }

    fn push(&mut self, case: Case, side: &'static str, metric: Metric, value: f64) {
        self.figures.push(self.run, case, side, metric, value);
    }

    fn throughput(&mut self, kind: &'static str, len: usize, packets: usize) -> Result<()> {
        let rounds = self.options.amount().rounds;
        let mut sides = self.start_all(kind)?;
        run_rounds(&mut sides, rounds, |side| {
            side.run_round(kind, len, packets)
        })?;
        self.chain.flush()?;

        let title = format!("{kind}, {len} bytes");
        self.record(Case::Throughput(kind, len), &title, packets, &mut sides);
        Ok(())
    }

    /// Measures the loop with copies of whole packets, of headers, and of nothing
    fn copy(&mut self) -> Result<()> {
        let rounds = self.options.amount().rounds;
        let own = std::env::current_exe()?;
        let [_, (len, packets)] = PACKETS;
        let mut sides = Vec::new();
        for (num, (name, style, copied)) in (0..).zip(COPIES) {
            let program = Program {
                name,
                command: own_command(&own, style),
                tail: &[],
            };
            let mut side = self.start(self.chain, &program, num, &accept_udp(0))?;
            side.copied = copied;
            sides.push(side);
        }
        run_rounds(&mut sides, rounds, |side| {
            side.run_round("accept", len, packets)
        })?;
        self.chain.flush()?;

        let title = format!("copies of {len} bytes");
        self.record(Case::Copy, &title, packets, &mut sides);
        Ok(())
    }

    /// Prints and records the times per packet of one case
    fn record(&mut self, case: Case, title: &str, packets: usize, sides: &mut [Side]) {
        let rounds = self.options.amount().rounds;
        println!("\n### {title} ({rounds} rounds of {packets} packets)\n");
        let first = sides.first().map_or("", |side| side.name);
        println!("| | ns per packet | CPU ns per packet | packets, {first} = 1 |");
        println!("|---|---:|---:|---:|");
        let mut base = None;
        for side in sides {
            let each = |samples: &mut Vec<f64>| median(samples) / packets as f64;
            let (name, wall, cpu) = (side.name, each(&mut side.wall), each(&mut side.cpu));
            let base = *base.get_or_insert(wall);
            println!("| {name} | {wall:.0} | {cpu:.0} | {:.2} |", base / wall);
            self.push(case, name, Metric::Wall, wall);
            self.push(case, name, Metric::Cpu, cpu);
        }
    }

    fn latency(&mut self) -> Result<()> {
        let amount = self.options.amount();
        let mut sides = self.start_all("accept")?;
        let busy = Program {
            name: BUSY,
            command: own_command(&std::env::current_exe()?, "busy"),
            tail: &[],
        };
        let num = u16::try_from(sides.len())?;
        let place = |command: &mut Command| -> Result<Child> {
            // On a CPU of its own the side may poll busily, and its process must know two.
            if self.run.1 == Placement::Apart {
                let [sender, side] = [self.options.cpus.first(), self.options.cpus.last()];
                let cpu = |cpu: Option<&usize>| cpu.map_or(String::new(), usize::to_string);
                command.env(peers::CPUS, format!("{} {}", cpu(sender), cpu(side)));
            }
            let placed = self.options.place(self.run.1, true, || command.spawn());
            Ok(placed??)
        };
        sides.push(Side::start(self.chain, &busy, place, num, &accept_udp(0))?);
        run_rounds(&mut sides, amount.latency_rounds, |side| {
            side.run_round_trips(amount.round_trips)
        })?;
        self.chain.flush()?;

        println!("\n### latency of one 64-byte UDP packet through the queue\n");
        println!("| | p50 µs | p99 µs | CPU µs |\n|---|---:|---:|---:|");
        for side in &mut sides {
            side.wall.sort_by(f64::total_cmp);
            let at = |percent: usize| {
                let index = side.wall.len() * percent / 100;
                side.wall.get(index).copied().unwrap_or(f64::NAN) / 1000.0
            };
            let (name, p50, p99) = (side.name, at(50), at(99));
            let cpu = median(&mut side.cpu) / amount.round_trips as f64 / 1000.0;
            println!("| {name} | {p50:.1} | {p99:.1} | {cpu:.1} |");
            self.push(Case::Latency, name, Metric::P50, p50);
            self.push(Case::Latency, name, Metric::P99, p99);
            self.push(Case::Latency, name, Metric::Cpu, cpu);
            // With one CPU a busy side is not busy.
            if self.run.1 == Placement::Apart && [C, BUSY].contains(&name) {
                self.push(Case::BusyLatency, name, Metric::P50, p50);
            }
        }
        Ok(())
    }

    /// Measures one and two queues, each with a process of its own
    fn queues(&mut self) -> Result<()> {
        const LEN: usize = 64;
        /// A queue holds 1024.
        const PACKETS: usize = 900;
        const RECV_BUFFER: usize = 1 << 22;
        let rounds = self.options.amount().queue_rounds;
        println!(
            "\n### one and two queues ({rounds} rounds of {PACKETS} packets for each queue)\n"
        );
        println!("| | | ns per packet | packets, {ONE_QUEUE} = 1 |\n|---|---|---:|---:|");
        for program in self
            .programs
            .iter()
            .filter(|program| QUEUE_SIDES.contains(&program.name))
        {
            // Two on the CPU of the sides, and one on the sender's CPU
            let mut sides = Vec::new();
            for (num, is_side) in (0..).zip([true, true, false]) {
                let queue = accept_udp(RECV_BUFFER);
                let place = |command: &mut Command| {
                    let spawned = self
                        .options
                        .place(Placement::Apart, is_side, || command.spawn());
                    Ok(spawned??)
                };
                sides.push(Side::start(self.chain, program, place, num, &queue)?);
            }
            let mut walls = LAYOUTS.map(|_| Vec::new());
            for _ in 0..rounds {
                for (layout, walls) in LAYOUTS.iter().zip(&mut walls) {
                    let picked: &[usize] = match *layout {
                        ONE_QUEUE => &[0],
                        TWO_QUEUES => &[0, 1],
                        _ => &[0, 2],
                    };
                    let is_picked = |(index, _): &(usize, _)| picked.contains(index);
                    let mut picked: Vec<_> =
                        sides.iter_mut().enumerate().filter(is_picked).collect();
                    for (_, side) in &mut picked {
                        side.preload(LEN, PACKETS)?;
                    }
                    for (_, side) in &mut picked {
                        side.begin(PACKETS)?;
                    }
                    let mut longest: f64 = 0.0;
                    for (_, side) in &mut picked {
                        side.finish("accept", LEN, PACKETS)?;
                        longest = longest.max(side.wall.last().copied().unwrap_or(f64::NAN));
                    }
                    walls.push(longest / (PACKETS * picked.len()) as f64);
                }
            }
            self.chain.flush()?;
            let mut base = f64::NAN;
            for (layout, mut walls) in LAYOUTS.into_iter().zip(walls) {
                let wall = median(&mut walls);
                if layout == ONE_QUEUE {
                    base = wall;
                }
                println!(
                    "| {} | {layout} | {wall:.0} | {:.2} |",
                    program.name,
                    base / wall
                );
                self.push(Case::Queues(layout), program.name, Metric::Wall, wall);
            }
        }
        Ok(())
    }

    fn goodput(&mut self) -> Result<()> {
        let amount = self.options.amount();
        println!("\n### TCP goodput over loopback, MTU {MTU}, every segment through the queue\n");
        println!("| | receive buffer | without GSO, Gbit/s | with GSO, Gbit/s | ratio |");
        println!("|---|---|---:|---:|---:|");
        let sides = self
            .programs
            .iter()
            .filter(|program| [C, LOOP].contains(&program.name));
        let sides = sides.flat_map(|program| RECV_BUFFERS.map(|buffer| (program, buffer)));
        for (program, (recv_buffer, name)) in sides {
            let mut rates = [Vec::new(), Vec::new()];
            for _ in 0..amount.goodput_rounds {
                for (wants_gso, rates) in [false, true].into_iter().zip(&mut rates) {
                    let queue = QueueOptions {
                        kind: "accept",
                        recv_buffer,
                        wants_gso,
                        rule: &|port| Rule::new().tcp_dport(port),
                    };
                    let side = self.start(self.chain, program, 0, &queue)?;
                    rates.push(side.tcp_rate(amount.seconds)?);
                    self.chain.flush()?;
                }
            }
            let [without, with] = rates.map(|mut rates| median(&mut rates));
            let ratio = with / without;
            println!(
                "| {} | {name} | {without:.2} | {with:.2} | {ratio:.1} |",
                program.name
            );
            self.push(Case::Goodput(name), program.name, Metric::Mtu, without);
            self.push(Case::Goodput(name), program.name, Metric::Gso, with);
        }
        Ok(())
    }

    /// Measures TCP with the chains of `examples/first_bytes.rs`
    fn first_bytes(&mut self) -> Result<()> {
        let amount = self.options.amount();
        let own = std::env::current_exe()?;
        let table = Table::new(Family::Ip, FIRST_BYTES)?;
        let chain = table.chain("inspect", Hook::Input, 0)?;
        // This rule turns on connection tracking for all ways.
        let save = table.chain("save", Hook::Input, 10)?;
        save.add(&Rule::new().tcp().mark(1, u32::MAX).save_mark())?;
        let mut ways = WAYS.map(|way| (way, Vec::new(), Vec::new()));
        for round in 0..amount.first_bytes_rounds {
            let n = ways.len();
            for place in 0..n {
                let ((name, style), rates, queued) =
                    ways.get_mut((place + round) % n).ok_or("no way")?;
                let rule = |port| {
                    let rule = Rule::new().tcp_dport(port);
                    let rule = match *name {
                        EVERY_SEGMENT => rule,
                        _ => rule.ct_mark_not(1, u32::MAX),
                    };
                    rule.counter(FIRST_BYTES)
                };
                if let Some(style) = style {
                    let program = Program {
                        name,
                        command: own_command(&own, style),
                        tail: &[],
                    };
                    let queue = QueueOptions {
                        kind: "accept",
                        recv_buffer: 0,
                        wants_gso: true,
                        rule: &rule,
                    };
                    let side = self.start(&chain, &program, 0, &queue)?;
                    rates.push(side.tcp_rate(amount.first_bytes_seconds)?);
                    queued.push(chain.count(FIRST_BYTES)? as f64);
                } else {
                    chain.add(&rule(FIRST_PORT))?;
                    rates.push(tcp_rate(FIRST_PORT, amount.first_bytes_seconds)?);
                    queued.push(0.0);
                }
                chain.flush()?;
            }
        }
        table.delete()?;

        println!("\n### TCP goodput with the first bytes queued, MTU {MTU}, GSO\n");
        println!("| | Gbit/s | {NO_QUEUE} = 1 | packets queued |");
        println!("|---|---:|---:|---:|");
        let mut base = f64::NAN;
        for ((name, _), mut rates, mut queued) in ways {
            let (rate, queued) = (median(&mut rates), median(&mut queued));
            if name == NO_QUEUE {
                base = rate;
            }
            println!("| {name} | {rate:.2} | {:.2} | {queued:.0} |", rate / base);
            self.push(Case::FirstBytes, name, Metric::Gso, rate);
            self.push(Case::FirstBytes, name, Metric::Queued, queued);
        }
        Ok(())
    }

    fn rewrite(&mut self) -> Result<()> {
        let Amount {
            rounds, rewrites, ..
        } = self.options.amount();
        let mut sides = rewrite::Sides::start(self.built)?;
        println!("\n### rewriting of UDP packets ({rounds} rounds of {rewrites} packets)\n");
        println!("| | | ns per packet | packets, {C} = 1 |\n|---|---|---:|---:|");
        for change @ (len, new_len) in rewrite::CHANGES {
            let mut samples = rewrite::SIDES.map(|name| (name, Vec::new()));
            let mut expected = None;
            for round in 0..rounds {
                let n = samples.len();
                for place in 0..n {
                    let (name, wall) = samples.get_mut((place + round) % n).ok_or("no side")?;
                    let (time, result) = sides.run(name, change, rewrites)?;
                    if *expected.get_or_insert_with(|| result.clone()) != result {
                        return Err(format!("{name}: not the bytes of another side").into());
                    }
                    wall.push(time / rewrites as f64);
                }
            }
            let case = Case::Rewrite(len, new_len);
            let mut base = f64::NAN;
            for (name, mut wall) in samples {
                let wall = median(&mut wall);
                if name == C {
                    base = wall;
                }
                println!(
                    "| {} | {name} | {wall:.0} | {:.2} |",
                    case.name(),
                    base / wall
                );
                self.push(case, name, Metric::Wall, wall);
            }
        }
        Ok(())
    }

    fn start_all(&self, kind: &'static str) -> Result<Vec<Side>> {
        let queue = QueueOptions {
            kind,
            ..accept_udp(0)
        };
        let start = |(index, program): (usize, &Program)| {
            self.start(self.chain, program, u16::try_from(index)?, &queue)
        };
        self.programs.iter().enumerate().map(start).collect()
    }

    fn start(
        &self,
        chain: &Chain,
        program: &Program,
        num: u16,
        queue: &QueueOptions<'_>,
    ) -> Result<Side> {
        let placement = self.run.1;
        let place = |command: &mut Command| -> Result<Child> {
            Ok(self
                .options
                .place(placement, true, || command.spawn())?
                .map_err(|error| format!("{}: {error}", program.name))?)
        };
        Side::start(chain, program, place, num, queue)
    }
}

/// Lets the sides take turns; a different side begins each round
fn run_rounds(
    sides: &mut [Side],
    rounds: usize,
    run: impl Fn(&mut Side) -> Result<()>,
) -> Result<()> {
    for round in 0..rounds {
        let n = sides.len();
        for place in 0..n {
            run(sides.get_mut((place + round) % n).ok_or("no side")?)?;
        }
    }
    Ok(())
}

pub(crate) const NO_QUEUE: &str = "without the queue";
pub(crate) const FIRST_4_KIB: &str = "the first 4 KiB queued";
pub(crate) const EVERY_SEGMENT: &str = "every segment queued";
/// The ways of a TCP connection, each with the style of the side that has the queue
pub(crate) const WAYS: [(&str, Option<&str>); 3] = [
    (NO_QUEUE, None),
    (FIRST_4_KIB, Some("first_bytes")),
    (EVERY_SEGMENT, Some("loop")),
];

/// Sizes in bytes, and their names
pub(crate) const RECV_BUFFERS: [(usize, &str); 2] = [(0, "default"), (1 << 20, "1 MiB")];

/// The options of a side's queue
struct QueueOptions<'r> {
    /// One of [`KINDS`]
    kind: &'static str,
    /// In bytes; 0 for the default
    recv_buffer: usize,
    wants_gso: bool,
    /// Returns the rule for packets to its port
    rule: &'r dyn Fn(u16) -> Rule,
}

/// Accepts the UDP packets to its port
fn accept_udp(recv_buffer: usize) -> QueueOptions<'static> {
    QueueOptions {
        kind: "accept",
        recv_buffer,
        wants_gso: false,
        rule: &|port| Rule::new().udp_dport(port),
    }
}

/// A packet-handling process, the sending socket, and the times
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
    /// The most bytes of a packet that the kernel copies
    copied: usize,
    /// The packets so far; their ids begin at 1
    seen: usize,
}

impl Side {
    /// Starts a side, by a function that spawns its process
    fn start(
        chain: &Chain,
        program: &Program,
        spawn: impl FnOnce(&mut Command) -> Result<Child>,
        num: u16,
        queue: &QueueOptions<'_>,
    ) -> Result<Self> {
        let port = FIRST_PORT + num;
        chain.add(&(queue.rule)(port).queue(num))?;
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
        let mut process = spawn(&mut command)?;
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
            copied: usize::MAX,
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
        self.preload(len, packets)?;
        self.begin(packets)?;
        self.finish(kind, len, packets)
    }

    /// Puts packets into the queue
    fn preload(&mut self, len: usize, packets: usize) -> Result<()> {
        let payload = vec![0; len - IP_AND_UDP];
        for _ in 0..packets {
            self.socket.send(&payload, self.socket.address())?;
        }
        Ok(())
    }

    /// Lets the process handle the packets
    fn begin(&mut self, packets: usize) -> Result<()> {
        Ok(writeln!(self.commands, "{packets}")?)
    }

    /// Records the times, and checks the packets
    fn finish(&mut self, kind: &str, len: usize, packets: usize) -> Result<()> {
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
        if number()? != (packets * len.min(self.copied)) as f64 {
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
        let answer = self.answer()?;
        let cpu = answer.split(' ').nth(1).ok_or("no CPU time")?;
        self.cpu.push(cpu.parse()?);
        Ok(())
    }

    /// Measures a TCP connection through this side; see [`tcp_rate`]
    fn tcp_rate(mut self, seconds: f64) -> Result<f64> {
        writeln!(self.commands, "{}", u32::MAX)?; // until the process is killed
        tcp_rate(self.port, seconds)
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Measures a TCP connection for some seconds, in Gbit/s
fn tcp_rate(port: u16, seconds: f64) -> Result<f64> {
    let listener = TcpListener::bind((V4, port))?;
    // By default TCP sizes the buffer by the connection's first round trips, and two equal
    // connections can end with unequal windows.
    rustix::net::sockopt::set_socket_recv_buffer_size(&listener, TCP_BUFFER)?;
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
    let mut stream = TcpStream::connect_timeout(&(V4, port).into(), TIMEOUT)?;
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
