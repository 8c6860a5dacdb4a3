//! The system calls of a batch loop
//!
//! The test starts itself again as a packet-handling program, and counts the program's system
//! calls with ptrace(2).
#![allow(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::Instant;

use nfqnl::{CopyMode, Event, Handle, QueueConfig, RecvBatch, SendBatch, Socket, Verdict};
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::rules::{Family, Hook, Rule, Table};
use nfqnl_testkit::trace::{SystemCalls, mark, thread_id};
use nfqnl_testkit::traffic::{Udp, V4};

const PORT: u16 = 5000;
const QUEUE: u16 = 1;
/// They fill three default batches.
const PACKETS: usize = 3 * RecvBatch::DEFAULT_SLOTS;
/// The promise: at most 2 system calls for 32 packets
const AT_MOST: usize = 2;
const IN: usize = 32;
/// On machines of 32 bits (`asm-generic/unistd.h`)
const SYS_CLOCK_GETTIME64: libc::c_long = 403;
const _: () = assert!(2 * IN <= AT_MOST * RecvBatch::DEFAULT_SLOTS);
/// The environment variable with the style of the started program
const STYLE: &str = "NFQNL_TEST_STYLE";
/// The text before the thread id in the program's output
const READY: &str = "handles packets as thread ";

#[derive(Clone, Copy)]
enum Style {
    /// Every packet is accepted.
    Accept,
    /// Every packet is accepted, without reports of overruns.
    Unreported,
    /// One packet in eight is dropped, and one in eight marked.
    Mixed,
    /// Every packet is accepted by a callback.
    RunOnce,
    /// Every packet is accepted by its own call, to check the counter.
    OneByOne,
}

impl Style {
    const ALL: [(&str, Self); 5] = [
        ("accept", Self::Accept),
        ("without reports", Self::Unreported),
        ("mixed", Self::Mixed),
        ("run_once", Self::RunOnce),
        ("one by one", Self::OneByOne),
    ];
}

#[test]
fn two_for_32_packets_at_saturation() {
    isolated(|| {
        if let Ok(name) = std::env::var(STYLE) {
            let (_, style) = Style::ALL.into_iter().find(|(n, _)| *n == name).unwrap();
            return handle_packets(style);
        }
        let table = Table::new(Family::Ip, "t").unwrap();
        let chain = table.chain("c", Hook::Input, 0).unwrap();
        chain
            .add(&Rule::new().udp_dport(PORT).queue(QUEUE))
            .unwrap();
        for (name, style) in Style::ALL {
            let begin = Instant::now();
            let mut calls = count(name);
            let took = begin.elapsed();
            // A machine without a clock in user space asks the kernel.
            for clock in [libc::SYS_clock_gettime, SYS_CLOCK_GETTIME64] {
                calls.remove(&u64::try_from(clock).unwrap());
            }
            let total: usize = calls.values().sum();
            println!("{name}: {total} system calls for {PACKETS} packets, by number {calls:?}");
            let receives = PACKETS / RecvBatch::DEFAULT_SLOTS;
            match style {
                Style::OneByOne => assert_eq!(total, PACKETS + receives, "{name}"),
                // It sends earlier if the first verdict of a batch is a millisecond old.
                Style::RunOnce => {
                    let slow = usize::try_from(took.as_millis()).unwrap();
                    let most = (AT_MOST * PACKETS / IN).max(2 * receives + slow);
                    assert!(total <= most, "{name}: {total} in {took:?}");
                }
                // One receive and one send per batch, whatever the verdicts are
                _ => assert_eq!(total, 2 * receives, "{name}"),
            }
        }
    });
}

/// Counts the system calls, by number, of a process handling [`PACKETS`] waiting packets
fn count(style: &str) -> BTreeMap<u64, usize> {
    // The same arguments lead to the same test.
    let mut process = Command::new(std::env::current_exe().unwrap())
        .args(std::env::args_os().skip(1))
        .env(STYLE, style)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
    let thread = lines
        .by_ref()
        .find_map(|line| line.unwrap().split_once(READY)?.1.parse().ok())
        .expect("the process prints its thread id");
    let mut calls = SystemCalls::of(thread).unwrap();
    process.stdin.take().unwrap().write_all(b"\n").unwrap();
    let counted = calls.between_marks().unwrap();
    drop(calls);
    lines.for_each(drop); // libtest's
    assert!(process.wait().unwrap().success(), "{style}");
    counted
}

fn handle_packets(style: Style) {
    let socket = Udp::bind(V4, PORT).unwrap();
    let nfqueue = Socket::builder()
        .report_overruns(!matches!(style, Style::Unreported))
        .open()
        .unwrap();
    let handle = Handle::new(nfqueue);
    let mut batch = RecvBatch::default();
    let mut verdicts = SendBatch::new();
    let _queue = match style {
        Style::RunOnce => {
            let config = QueueConfig::new().copy_mode(CopyMode::Packet, u32::MAX);
            handle.create_queue_with(QUEUE, &config, |data| {
                data.set_verdict(Verdict::Accept, None);
            })
        }
        _ => handle.socket().bind(QUEUE),
    }
    .unwrap();
    let mut round = |has_marks: bool| {
        for _ in 0..PACKETS {
            socket.send(b"small", socket.address()).unwrap();
        }
        if has_marks {
            println!("{READY}{}", thread_id().unwrap());
            std::io::stdin().read_line(&mut String::new()).unwrap();
            mark();
        }
        let (mut handled, mut dropped) = (0, 0);
        while handled < PACKETS {
            if let Style::RunOnce = style {
                handled += handle.run_once(&mut batch).unwrap();
                continue;
            }
            let nfqueue = handle.socket();
            let events = nfqueue.recv(&mut batch).unwrap();
            for packet in events.filter_map(Event::packet) {
                handled += 1;
                let decision = match (style, packet.id() % 8) {
                    (Style::OneByOne, _) => {
                        nfqueue.set_verdict(packet.key(), Verdict::Accept).unwrap();
                        continue;
                    }
                    (Style::Mixed, 0) => {
                        dropped += 1;
                        Verdict::Drop.into()
                    }
                    (Style::Mixed, 1) => Verdict::Accept.with_mark(7),
                    _ => Verdict::Accept.into(),
                };
                verdicts.push(packet.key(), decision).unwrap();
            }
            nfqueue.send(&mut verdicts).unwrap();
        }
        if has_marks {
            mark();
        }
        assert_eq!(socket.drain(), PACKETS - dropped);
    };
    round(false); // The batches allocate their memory.
    round(true);
}
