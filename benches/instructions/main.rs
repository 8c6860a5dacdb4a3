//! Instructions of user code per packet, counted by callgrind
//!
//! ```text
//! benches/instructions/run [--profile DIRECTORY]    # installs valgrind if needed
//! ```
//!
//! A process under valgrind handles real packets: it parses each packet, reads the common
//! attributes, and accepts it in a batch. It does this for few packets and then for many, and the
//! difference is the result: start and end of the process are in both. All packets wait in the
//! queue before they are received, so every batch is full.
//!
//! The count covers the whole process: this crate, the standard library, and libc around the system
//! calls, but not the kernel. A loop that parses, reads and accepts twice tells the cost of that
//! part.
//!
//! Fails if a packet takes more than [`LIMITS`].

use std::error::Error;
use std::hint::black_box;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use nfqnl::consts::{
    NFQA_CT, NFQA_CT_INFO, NFQA_PACKET_HDR, NFQA_PAYLOAD, NFQNL_MSG_PACKET, message_type,
};
use nfqnl::{CopyMode, Event, Handle, Packet, QueueConfig, RecvBatch, SendBatch, Socket, Verdict};
use nfqnl_testkit::netns;
use nfqnl_testkit::rules::{Family, Hook, Rule, Table};
use nfqnl_testkit::traffic::{Udp, V4};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// They fill three default batches, and fit a receive buffer of the system's default size.
const PACKETS: usize = 192;
const FEW_ROUNDS: usize = 10;
const MANY_ROUNDS: usize = 60;
const PORT: u16 = 5000;
const QUEUE: u16 = 1;
/// A loop: receive, parse, read, accept, send
const LOOP: &str = "loop";
/// The loop with parsing, reading and accepting every packet twice
const TWICE: &str = "loop that decides twice";
/// The loop, with a packet that has a conntrack entry parsed beside each packet
const CONNTRACK: &str = "loop with conntrack";
/// The same as the loop, with callbacks
const CALLBACK: &str = "run_once";
/// The same with the program's own receive calls
const HANDLE: &str = "handle_packet";
/// Limits per packet: parse, read and accept; parse a packet with a conntrack entry and read its
/// mark and state; receive and send too in a loop; the same with callbacks; with callbacks and one
/// receive call and one send per packet
///
/// `run_once` reads the clock after each callback, so that a decided packet waits for at most a
/// millisecond.
const LIMITS: [f64; 5] = [300.0, 400.0, 460.0, 660.0, 1520.0];

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

/// Reads the same attributes as a typical program
fn common_getters(packet: &Packet<'_>) {
    black_box((packet.id(), packet.mark(), packet.payload()));
    black_box((packet.indev(), packet.hook()));
}

/// A packet message with a conntrack entry, as on little-endian Linux 5.10
fn tracked_packet() -> Vec<u8> {
    let entry = include_bytes!("../../proto/tests/data/conntrack_5_10_x86_64_v4.bin");
    let mut message = vec![0; 20];
    for (kind, value) in [
        (NFQA_PACKET_HDR, &[0, 0, 0, 1, 8, 0, 1][..]),
        (NFQA_CT, entry),
        (NFQA_CT_INFO, &[0, 0, 0, 2]),
        (NFQA_PAYLOAD, &[0; 64]),
    ] {
        let len = u16::try_from(4 + value.len()).unwrap_or(0);
        message.resize(message.len().next_multiple_of(4), 0);
        message.extend(len.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(value);
    }
    let len = u32::try_from(message.len()).unwrap_or(0);
    message[..4].copy_from_slice(&len.to_ne_bytes());
    message[4..6].copy_from_slice(&message_type(NFQNL_MSG_PACKET).to_ne_bytes());
    message
}

/// Handles [`PACKETS`] packets for every byte of the input
fn peer(style: &str) -> Result<()> {
    let handle = Handle::new(Socket::open()?);
    let socket = handle.socket();
    let config = QueueConfig::new().copy_mode(CopyMode::Packet, u32::MAX);
    let _queue = if [CALLBACK, HANDLE].contains(&style) {
        handle.create_queue_with(QUEUE, &config, |data| {
            common_getters(data.packet());
            data.set_verdict(Verdict::Accept, None);
        })?
    } else {
        socket.bind_with(QUEUE, &config)?
    };
    let mut batch = RecvBatch::default();
    let (mut verdicts, mut unsent) = (SendBatch::new(), SendBatch::new());
    // For its `recv`
    let own = UdpSocket::from(handle.as_fd().try_clone_to_owned()?);
    let mut buf = vec![0; RecvBatch::DEFAULT_SLOT_LEN];
    println!("ready");
    let tracked = tracked_packet();
    let mut input = std::io::stdin().lock();
    while input.read(&mut [0])? > 0 {
        let mut handled = 0;
        while handled < PACKETS {
            if style == CALLBACK {
                handled += handle.run_once(&mut batch)?;
                continue;
            }
            if style == HANDLE {
                let len = own.recv(&mut buf)?;
                handled += handle.handle_packet(buf.get(..len).unwrap_or_default())?;
                continue;
            }
            for event in socket.recv(&mut batch)? {
                let Event::Packet(packet) = event else {
                    return Err(event.to_string().into());
                };
                common_getters(&packet);
                verdicts.push(packet.key(), Verdict::Accept)?;
                if style == TWICE {
                    let packet = Packet::parse(black_box(packet.as_bytes()))?;
                    common_getters(&packet);
                    unsent.push(packet.key(), Verdict::Accept)?;
                }
                if style == CONNTRACK {
                    let packet = Packet::parse(black_box(&tracked))?;
                    let mark = packet.conntrack().and_then(|entry| entry.mark());
                    black_box((mark, packet.ct_state()));
                }
            }
            unsent.clear();
            handled += verdicts.len();
            socket.send(&mut verdicts)?;
        }
    }
    Ok(())
}

fn count(profile: Option<&Path>) -> Result<()> {
    netns::enter()?;
    let table = Table::new(Family::Ip, "instructions")?;
    let chain = table.chain("c", Hook::Input, 0)?;
    chain.add(&Rule::new().udp_dport(PORT).queue(QUEUE))?;
    let socket = Udp::bind(V4, PORT)?;
    let each = |style| -> Result<f64> {
        let few = instructions(&socket, style, FEW_ROUNDS, None)?;
        let many = instructions(&socket, style, MANY_ROUNDS, profile)?;
        Ok((many - few) / ((MANY_ROUNDS - FEW_ROUNDS) * PACKETS) as f64)
    };
    let (of_loop, of_twice, of_callback) = (each(LOOP)?, each(TWICE)?, each(CALLBACK)?);
    let (of_conntrack, of_handle) = (each(CONNTRACK)?, each(HANDLE)?);
    let counted = [
        (
            "to parse a packet, read it and accept it",
            of_twice - of_loop,
        ),
        (
            "to parse a packet, and read its conntrack mark and state",
            of_conntrack - of_loop,
        ),
        ("to receive and send too, in a loop", of_loop),
        ("the same by run_once", of_callback),
        ("the same by handle_packet", of_handle),
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

/// Returns callgrind's count for a process handling some rounds of packets
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
