//! How many system calls a batch loop makes, as the kernel sees them
//!
//! The test starts itself again, as a program that handles packets. It puts a stop to each of that program's system
//! calls, so it counts them where they are made: no library is asked, and none has a say in it.
#![allow(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use nfqnl::{CopyMode, Handle, QueueConfig, RecvBatch, Verdict, VerdictBatch};
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::rules::{Family, Hook, Rule, Table};
use nfqnl_testkit::trace::{SystemCalls, mark, thread_id};
use nfqnl_testkit::traffic::{Udp, V4};

const PORT: u16 = 5000;
const QUEUE: u16 = 1;
/// So many packets fill default batches to the last slot
const PACKETS: usize = 192;
/// What is allowed for so many packets
const AT_MOST: usize = 2;
const IN: usize = 32;
/// Set in the process that handles packets; the value says how
const STYLE: &str = "NFQNL_TEST_STYLE";
/// Comes before the id of the thread to be traced, in what that process prints
const READY: &str = "handles packets as thread ";

#[derive(Clone, Copy)]
enum Style {
    /// Every packet is accepted
    Accept,
    /// The same without reports of overruns: the kernel's count is asked for before each send
    Unreported,
    /// One in eight is dropped, and one in eight marked
    Mixed,
    /// Every packet is accepted, by a callback
    RunOnce,
    /// Every packet is accepted, each by a call of its own: what the others have to be told from
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
            .add(&Rule::new().udp().dport(PORT).queue(QUEUE))
            .unwrap();
        for (name, style) in Style::ALL {
            let calls = count(name);
            let total: usize = calls.values().sum();
            println!("{name}: {total} system calls for {PACKETS} packets, by number {calls:?}");
            if matches!(style, Style::OneByOne) {
                let receives = PACKETS / RecvBatch::DEFAULT_SLOTS;
                assert_eq!(total, PACKETS + receives, "the tracer sees every call");
            } else {
                assert!(0 < total && total * IN <= AT_MOST * PACKETS, "{name}");
            }
        }
    });
}

/// Counts the system calls, by number, of a process that handles [`PACKETS`] packets which wait for it
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
        .expect("the process says which thread to trace");
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
    // A default receive buffer is not enough on s390x, where each packet takes more of it.
    let mut handle = Handle::builder()
        .recv_buffer(1 << 20)
        .report_overruns(!matches!(style, Style::Unreported))
        .open()
        .unwrap();
    let mut batch = RecvBatch::default();
    let mut verdicts = VerdictBatch::new();
    let _queue = match style {
        Style::RunOnce => {
            let config = QueueConfig::new().copy_mode(CopyMode::PACKET, u32::MAX);
            handle.create_queue_with(QUEUE, &config, |data| {
                data.set_verdict(Verdict::Accept, None);
            })
        }
        _ => handle.bind_queue(QUEUE),
    }
    .unwrap();
    // At first a handle looks at the clock, too, which some machines take a system call for.
    std::thread::sleep(Duration::from_secs(2));
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
            for packet in handle.recv(&mut batch).unwrap().packets() {
                handled += 1;
                let decision = match (style, packet.id() % 8) {
                    (Style::OneByOne, _) => {
                        handle.verdict(packet.key(), Verdict::Accept).unwrap();
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
            handle.send(&mut verdicts).unwrap();
        }
        if has_marks {
            mark();
        }
        assert_eq!(socket.drain(), PACKETS - dropped);
    };
    round(false); // in which the batches get their memory
    round(true);
}
