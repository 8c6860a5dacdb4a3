//! Upgrades a filter every ten seconds under mixed traffic, and accounts for every datagram
//!
//! ```text
//! tests/soak/run --upgrades [SECONDS]    # an hour by default
//! ```
//!
//! Two of three upgrades are orderly: the filter gives the socket away ([`Socket::into_fd`]), and
//! starts its program again by exec(2). The third is a crash: SIGKILL, and a new process adopts the
//! copy of the descriptor that the parent keeps. The filter has packets in hand at each.
#![allow(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};
use std::{panic, process, thread};

use nfqnl::{Event, IpProtocol, Orphans, Packet, Pending, RecvBatch, SendBatch, Socket, Verdict};
use nfqnl_testkit::netns;
use nfqnl_testkit::rules::{Family, Hook, Rule, Table};
use nfqnl_testkit::traffic::{Udp, V4, V6};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGHUP, SIGTERM};

const PORT: u16 = 5000;
const QUEUE: u16 = 1;
const MARK: u32 = 7;
const HANDOVER: &str = "NFQNL_HANDOVER";
const EVERY: Duration = Duration::from_secs(10);
/// Longer than any packet needs
const STUCK: Duration = Duration::from_secs(60);
/// One datagram of each family in a millisecond, and bursts
const MOST_IN_A_SECOND: u32 = 3_000;
const BURST: u32 = 30;
/// A write of the TCP stream
const CHUNK: usize = 16 << 10;

fn main() {
    match std::env::args().nth(1).as_deref() {
        Some("filter") => filter(),
        seconds => soak(seconds.map_or(3600, |n| n.parse().expect("a number of seconds"))),
    }
}

/// The filter: takes over, filters, and gives away
fn filter() {
    let [is_upgrade, is_stop] = [SIGHUP, SIGTERM].map(|signal| {
        let flag = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(signal, Arc::clone(&flag)).unwrap();
        flag
    });
    let handover = std::env::var(HANDOVER).ok();
    let handover = handover.map(|text| text.parse().unwrap());
    let fd = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let queues = [(QUEUE, Orphans::Again)];
    let (socket, mut queues) = Socket::adopt(fd, handover.as_ref(), &queues).unwrap();
    println!("adopted");

    let mut pending = Pending::new(Duration::from_millis(30), Verdict::Accept);
    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
    loop {
        let timeout = Duration::from_millis(5);
        for event in socket.recv_timeout(&mut batch, timeout).unwrap() {
            let packet = packet(event);
            match number(&packet) {
                Some(number) if number % 16 == 2 => pending.hold(packet.key(), Instant::now()),
                number => decide(&packet, number, &mut verdicts).unwrap(),
            }
        }
        pending.expired(Instant::now(), &mut verdicts);
        // Packets that were received and not answered are in hand here.
        if is_upgrade.load(SeqCst) {
            let (fd, handover) = socket.into_fd().unwrap();
            let error = Command::new(std::env::current_exe().unwrap())
                .arg("filter")
                .env(HANDOVER, handover.to_string())
                .stdin(fd)
                .exec();
            panic!("{error}"); // exec returns only if it fails
        }
        socket.send(&mut verdicts).unwrap();
        if is_stop.load(SeqCst) {
            pending.expired(Instant::now() + STUCK, &mut verdicts);
            socket.send(&mut verdicts).unwrap();
            let queue = queues.pop().unwrap();
            let decide = |event: Event<'_>, verdicts: &mut SendBatch| {
                let packet = packet(event);
                decide(&packet, number(&packet), verdicts)
            };
            let lost = socket.drain(queue, &mut batch, STUCK, decide).unwrap();
            println!("stopped, {lost} lost");
            return;
        }
    }
}

fn packet(event: Event<'_>) -> Packet<'_> {
    match event {
        Event::Packet(packet) => packet,
        other => panic!("{other}"),
    }
}

/// Returns the number at the end of a datagram; `None` for TCP
fn number(packet: &Packet<'_>) -> Option<u32> {
    match packet.flow().unwrap().protocol() {
        IpProtocol::UDP => Some(u32::from_be_bytes(*packet.payload().last_chunk().unwrap())),
        _ => None,
    }
}

fn decide(packet: &Packet<'_>, number: Option<u32>, verdicts: &mut SendBatch) -> nfqnl::Result<()> {
    match number.map(|number| number % 16) {
        Some(0) => verdicts.push(packet.key(), Verdict::Drop),
        Some(1) => verdicts.push(packet.key(), Verdict::Accept.with_mark(MARK)),
        _ => verdicts.push(packet.key(), Verdict::Accept),
    }
}

/// The datagrams that were sent and that arrived, by number
struct Account {
    sent: AtomicU32,
    arrived: Vec<AtomicBool>,
}

impl Account {
    /// Sends the next datagram, of a size that changes
    fn send(&self, udp: &Udp) {
        let number = self.sent.fetch_add(1, SeqCst);
        let mut payload = vec![0; usize::try_from(number % 1400).unwrap()];
        payload.extend(number.to_be_bytes());
        udp.send(&payload, udp.address()).unwrap();
    }

    /// Receives until the end, and fails if a datagram arrives twice or should not arrive
    fn receive(&self, udp: &Udp, is_over: &AtomicBool) {
        let mut buf = [0; 2000];
        loop {
            let Some(len) = udp.recv_into(&mut buf, Duration::from_secs(1)) else {
                if is_over.load(SeqCst) {
                    return;
                }
                continue;
            };
            let number = u32::from_be_bytes(*buf[..len].last_chunk().unwrap());
            assert_ne!(number % 16, 0, "datagram {number} was dropped");
            let is_known = self.arrived[usize::try_from(number).unwrap()].swap(true, SeqCst);
            assert!(!is_known, "datagram {number} arrives twice");
        }
    }
}

/// Writes a stream of bytes that count
fn write_stream(mut stream: TcpStream, is_over: &AtomicBool) -> u64 {
    let bytes: Vec<u8> = (0..CHUNK).map(|n| n.to_le_bytes()[0]).collect();
    let mut written = 0;
    while !is_over.load(SeqCst) {
        stream.write_all(&bytes).unwrap();
        written += 1;
        thread::sleep(Duration::from_millis(10));
    }
    written * u64::try_from(CHUNK).unwrap()
}

fn read_stream(mut stream: TcpStream) -> u64 {
    let (mut read, mut buf) = (0_u64, [0; CHUNK]);
    loop {
        let len = stream.read(&mut buf).unwrap();
        if len == 0 {
            return read;
        }
        for byte in &buf[..len] {
            assert_eq!(*byte, read.to_le_bytes()[0], "byte {read} of the stream");
            read += 1;
        }
    }
}

/// The filter's process, with the lines that it prints
struct Filter {
    process: Child,
    lines: std::io::Lines<BufReader<process::ChildStdout>>,
}

impl Filter {
    fn start(fd: OwnedFd) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .arg("filter")
            .stdin(fd)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let mut filter = Self { process, lines };
        filter.expect("adopted");
        filter
    }

    fn expect(&mut self, line: &str) {
        assert_eq!(self.lines.next().unwrap().unwrap(), line);
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }
}

fn soak(seconds: u32) {
    netns::enter().unwrap();
    // After a panic the other threads would wait forever.
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        report(panic);
        process::exit(1);
    }));
    let tables = [Family::Ip, Family::Ip6].map(|family| Table::new(family, "soak").unwrap());
    let later = tables.each_ref().map(|table| {
        let chain = table.chain("queue", Hook::Input, 0).unwrap();
        chain.add(&Rule::new().udp().queue(QUEUE)).unwrap();
        chain.add(&Rule::new().tcp().queue(QUEUE)).unwrap();
        let later = table.chain("later", Hook::Input, 10).unwrap();
        later
            .add(&Rule::new().mark(MARK, u32::MAX).counter("marked"))
            .unwrap();
        later
    });
    let socket = Socket::open().unwrap();
    let _queue = socket.bind(QUEUE).unwrap();
    let (fd, _handover) = socket.into_fd().unwrap();
    let mut filter = Filter::start(fd.try_clone().unwrap());

    let udp = [V4, V6].map(|address| Udp::bind(address, PORT).unwrap());
    let listener = TcpListener::bind((V4, PORT)).unwrap();
    let account = Account {
        sent: AtomicU32::new(0),
        arrived: (0..(seconds + 60) * MOST_IN_A_SECOND)
            .map(|_| AtomicBool::new(false))
            .collect(),
    };
    let (is_sent, is_over) = (AtomicBool::new(false), AtomicBool::new(false));
    let begin = Instant::now();
    let (mut upgrades, mut kills) = (0, 0);
    let (written, read) = thread::scope(|scope| {
        for udp in &udp {
            scope.spawn(|| account.receive(udp, &is_over));
        }
        let reader = scope.spawn(|| read_stream(listener.accept().unwrap().0));
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let writer = scope.spawn(|| write_stream(stream, &is_sent));
        let sender = scope.spawn(|| {
            let mut turn = 0_u32;
            while !is_sent.load(SeqCst) {
                turn = turn.wrapping_add(1);
                let times = if turn % 100 == 0 { BURST } else { 1 };
                (0..times).for_each(|_| udp.iter().for_each(|udp| account.send(udp)));
                thread::sleep(Duration::from_millis(1));
            }
        });
        let end = begin + Duration::from_secs(seconds.into());
        while Instant::now() + EVERY < end {
            thread::sleep(EVERY);
            if upgrades % 3 == 2 {
                filter.signal(Signal::KILL);
                filter.process.wait().unwrap();
                filter = Filter::start(fd.try_clone().unwrap());
                kills += 1;
            } else {
                filter.signal(Signal::HUP);
                filter.expect("adopted");
            }
            upgrades += 1;
            if upgrades % 30 == 0 {
                println!(
                    "{} s, {} datagrams",
                    begin.elapsed().as_secs(),
                    account.sent.load(SeqCst)
                );
            }
        }
        is_sent.store(true, SeqCst);
        sender.join().unwrap();
        let totals = (writer.join().unwrap(), reader.join().unwrap());
        filter.signal(Signal::TERM);
        filter.expect("stopped, 0 lost");
        assert!(filter.process.wait().unwrap().success());
        is_over.store(true, SeqCst);
        totals
    });

    let sent = account.sent.load(SeqCst);
    let (mut dropped, mut lost) = (0, 0);
    for (number, arrived) in (0..sent).zip(&account.arrived) {
        match number % 16 {
            0 => dropped += 1,
            _ if arrived.load(SeqCst) => {}
            _ => lost += 1,
        }
    }
    let marked: u64 = later
        .iter()
        .map(|later| later.count("marked").unwrap())
        .sum();
    println!(
        "{upgrades} upgrades, {kills} of them after a SIGKILL; {sent} datagrams, {dropped} dropped, \
         {marked} marked, {lost} unaccounted for; {read} bytes of TCP"
    );
    assert_eq!((lost, read), (0, written));
    assert_eq!(marked, u64::from((sent + 14) / 16));
}
