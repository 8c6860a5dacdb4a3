//! How many instructions of user code a packet takes, counted by callgrind
//!
//! ```text
//! benches/instructions/run [--profile DIRECTORY]    # installs valgrind if it is not there
//! ```
//!
//! A process under valgrind handles real packets: it parses each, reads what programs commonly read, and accepts it
//! through a batch. It does so for few packets and then again for many, and the difference counts: what starts and ends the
//! process is in both. Every packet waits before it is asked for, so that every batch is full.
//!
//! Counted is everything in the process: this crate, the standard library, and libc around the system calls. The kernel is
//! not. What parsing, reading and accepting take of it is told by a loop that does these twice.
//!
//! Fails if a packet takes more than [`LIMITS`] say.

use std::error::Error;
use std::hint::black_box;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use nfqnl::{CopyMode, Handle, Packet, QueueConfig, RecvBatch, Verdict, VerdictBatch};
use nfqnl_testkit::netns;
use nfqnl_testkit::rules::{Family, Hook, Rule, Table};
use nfqnl_testkit::traffic::{Udp, V4};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// So many small packets fit a default receive buffer, and fill default batches to the last slot
const PACKETS: usize = 192;
const FEW_ROUNDS: usize = 10;
const MANY_ROUNDS: usize = 60;
const PORT: u16 = 5000;
const QUEUE: u16 = 1;
/// Receives, parses, reads, accepts, sends
const LOOP: &str = "loop";
/// The same, and parses, reads and accepts every packet once more, for nobody
const TWICE: &str = "loop that decides twice";
/// The same as the loop, by callbacks
const CALLBACK: &str = "run_once";
/// What a packet may take: to be parsed, read and accepted, and to be received and answered too, by loop and callback
const LIMITS: [f64; 3] = [300.0, 450.0, 560.0];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--peer", style] => peer(style),
        [] => count(None),
        ["--profile", directory] => count(Some(Path::new(directory))),
        _ => Err("usage: instructions [--profile DIRECTORY]".into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("instructions: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What a typical program looks at
fn common_getters(packet: &Packet<'_>) {
    black_box((packet.id(), packet.mark(), packet.payload()));
    black_box((packet.indev(), packet.hook()));
}

/// Handles [`PACKETS`] packets for every byte of the input
fn peer(style: &str) -> Result<()> {
    let mut handle = Handle::open()?;
    let config = QueueConfig::new().copy_mode(CopyMode::PACKET, u32::MAX);
    let _queue = if style == CALLBACK {
        handle.create_queue_with(QUEUE, &config, |data| {
            common_getters(data.packet());
            data.set_verdict(Verdict::Accept, None);
        })?
    } else {
        handle.bind_queue_with(QUEUE, &config)?
    };
    let mut batch = RecvBatch::default();
    let (mut verdicts, mut unsent) = (VerdictBatch::new(), VerdictBatch::new());
    println!("ready");
    let mut input = std::io::stdin().lock();
    while input.read(&mut [0])? > 0 {
        let mut handled = 0;
        while handled < PACKETS {
            if style == CALLBACK {
                handled += handle.run_once(&mut batch)?;
                continue;
            }
            for packet in handle.recv(&mut batch)?.packets() {
                common_getters(&packet);
                verdicts.push(packet.key(), Verdict::Accept)?;
                if style == TWICE {
                    let packet = Packet::parse(black_box(packet.as_bytes()))?;
                    common_getters(&packet);
                    unsent.push(packet.key(), Verdict::Accept)?;
                }
            }
            unsent.clear();
            handled += verdicts.len();
            handle.send(&mut verdicts)?;
        }
    }
    Ok(())
}

fn count(profile: Option<&Path>) -> Result<()> {
    netns::enter()?;
    let table = Table::new(Family::Ip, "instructions")?;
    let chain = table.chain("c", Hook::Input, 0)?;
    chain.add(&Rule::new().udp().dport(PORT).queue(QUEUE))?;
    let socket = Udp::bind(V4, PORT)?;
    let each = |style| -> Result<f64> {
        let few = instructions(&socket, style, FEW_ROUNDS, None)?;
        let many = instructions(&socket, style, MANY_ROUNDS, profile)?;
        Ok((many - few) / ((MANY_ROUNDS - FEW_ROUNDS) * PACKETS) as f64)
    };
    let (of_loop, of_twice, of_callback) = (each(LOOP)?, each(TWICE)?, each(CALLBACK)?);
    let counted = [
        (
            "to parse a packet, read it and accept it",
            of_twice - of_loop,
        ),
        ("to receive and send too, in a loop", of_loop),
        ("the same by run_once", of_callback),
    ];
    let mut is_too_much = false;
    for ((what, count), limit) in counted.into_iter().zip(LIMITS) {
        println!("{what}: {count:.0} instructions of user code");
        is_too_much |= count > limit;
    }
    match is_too_much {
        true => Err(format!("the limits are {LIMITS:?}").into()),
        false => Ok(()),
    }
}

/// What callgrind counts while a process handles so many rounds of packets
fn instructions(socket: &Udp, style: &str, rounds: usize, profile: Option<&Path>) -> Result<f64> {
    let program = std::env::current_exe()?;
    let directory: PathBuf = match profile {
        Some(directory) => directory.into(),
        None => std::env::temp_dir(),
    };
    let counts = directory.join(format!(
        "callgrind.{}.{}",
        std::process::id(),
        style.replace(' ', "_")
    ));
    let mut process = Command::new("valgrind")
        .args(["--quiet", "--tool=callgrind"])
        .arg(format!("--callgrind-out-file={}", counts.display()))
        .arg(program)
        .args(["--peer", style])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("valgrind: {error}"))?;
    let mut input = process.stdin.take().ok_or("no input")?;
    let output = process.stdout.take().ok_or("no output")?;
    BufReader::new(output)
        .lines()
        .next()
        .ok_or("the peer has ended")??;
    for _ in 0..rounds {
        for _ in 0..PACKETS {
            socket.send(&[0; 36], socket.address())?;
        }
        input.write_all(b"\n")?;
        for _ in 0..PACKETS {
            socket.recv().ok_or("a packet was not accepted")?;
        }
    }
    drop(input);
    let status = process.wait()?;
    if !status.success() {
        return Err(format!("valgrind: {status}").into());
    }
    let text = std::fs::read_to_string(&counts)?;
    if profile.is_some() {
        println!("{}", counts.display());
    } else {
        std::fs::remove_file(&counts)?;
    }
    let total = text.lines().find_map(|line| line.strip_prefix("totals:"));
    Ok(total.ok_or("no totals")?.trim().parse()?)
}
