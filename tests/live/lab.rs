//! The parts of most live tests: a rule, UDP sockets as senders and receivers, and ways to receive

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::process;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use etherparse::{NetHeaders, PacketHeaders};
use nfqnl::proto::{ConfigRequest, RequestHeader};
use nfqnl::{
    Error, ErrorKind, Event, Events, Handle, Packet, PacketKey, QueueConfig, RecvBatch, Refusal,
    Socket,
};
use nfqnl_testkit::hosts::Bridge;
use nfqnl_testkit::kernel;
use nfqnl_testkit::rules::{Family, Hook, Rule, Table};
use nfqnl_testkit::traffic::{TIMEOUT, Udp, V4, V6};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::RecvFlags;

/// The UDP port of the queued packets
pub(crate) const PORT: u16 = 5000;
/// The queue of these packets
pub(crate) const QUEUE: u16 = 1;
/// Settings for callbacks with the payload
pub(crate) const WHOLE_PACKETS: QueueConfig =
    QueueConfig::new().copy_mode(nfqnl::CopyMode::Packet, u32::MAX);

/// A rule for UDP to [`PORT`] into [`QUEUE`], and sockets for sending
pub(crate) struct Lab {
    pub(crate) v4: Udp,
    pub(crate) v6: Udp,
    tables: Vec<Table>,
    hook: Hook,
    /// The number of datagrams received early to make room for others
    drained: AtomicUsize,
}

impl Lab {
    /// Queues packets as they leave, within the sender's system call
    pub(crate) fn new() -> Self {
        Self::at(Hook::Output)
    }

    /// Queues packets as they arrive, on loopback perhaps some time after the sender's system call
    pub(crate) fn at_input() -> Self {
        Self::at(Hook::Input)
    }

    fn at(hook: Hook) -> Self {
        Self::with(hook, &Rule::new().udp_dport(PORT).queue(QUEUE))
    }

    pub(crate) fn with(hook: Hook, rule: &Rule) -> Self {
        let tables = Family::ALL.map(|family| {
            let table = Table::new(family, "lab").unwrap();
            let chain = table.chain("queue", hook, 0).unwrap();
            chain.add(rule).unwrap();
            table
        });
        Self {
            v4: Udp::bind(V4, PORT).unwrap(),
            v6: Udp::bind(V6, PORT).unwrap(),
            tables: tables.into(),
            hook,
            drained: AtomicUsize::new(0),
        }
    }

    /// A socket for each IP version
    pub(crate) fn sockets(&self) -> [&Udp; 2] {
        [&self.v4, &self.v6]
    }

    pub(crate) fn tables(&self) -> &[Table] {
        &self.tables
    }

    /// Deletes the rules; the kernel drops the waiting packets
    pub(crate) fn delete_rules(self) {
        for table in self.tables {
            table.delete().unwrap();
        }
    }

    /// Queues one more port (IPv4) in another queue, and returns a socket for it
    pub(crate) fn add_queue(&self, num: u16) -> Udp {
        let port = PORT + num;
        let chain = self.tables[0]
            .chain(&format!("queue{num}"), self.hook, 0)
            .unwrap();
        chain.add(&Rule::new().udp_dport(port).queue(num)).unwrap();
        Udp::bind(V4, port).unwrap()
    }

    /// Sends from the IPv4 socket to itself
    pub(crate) fn send(&self, payload: &[u8]) {
        self.v4.send(payload, self.v4.address()).unwrap();
    }

    /// Sends datagrams with their number in them
    pub(crate) fn send_numbered(&self, numbers: std::ops::Range<u32>) {
        for number in numbers {
            self.send(&number.to_be_bytes());
        }
    }

    /// Sends numbers in small bursts
    ///
    /// Waits while the receiver is too far behind, because its buffer could overrun. Reads
    /// delivered datagrams meanwhile: an ordinary user's UDP socket does not have room for all of
    /// them.
    pub(crate) fn send_in_bursts(&self, numbers: std::ops::Range<u32>, received: &AtomicU32) {
        const FIT: u32 = 60;
        let mut dice = Dice(2);
        let mut sent = numbers.start;
        while sent < numbers.end {
            let burst = (1 + dice.roll(20)).min(numbers.end - sent);
            self.send_numbered(sent..sent + burst);
            sent += burst;
            thread::sleep(Duration::from_micros(dice.roll(500).into()));
            let drained = self.v4.drain_now().unwrap();
            self.drained.fetch_add(drained, Ordering::Relaxed);
            while sent > received.load(Ordering::SeqCst) + FIT {
                thread::yield_now();
            }
        }
    }

    /// Counts the delivered datagrams, including those during the bursts, until none arrives for a
    /// moment
    pub(crate) fn drain(&self) -> usize {
        self.drained.swap(0, Ordering::Relaxed) + self.v4.drain()
    }

    pub(crate) fn recv(&self) -> Option<Vec<u8>> {
        self.v4.recv()
    }

    /// Fails unless datagrams with these numbers are delivered, in this order
    #[track_caller]
    pub(crate) fn expect_numbered(&self, numbers: impl IntoIterator<Item = u32>) {
        for number in numbers {
            assert_eq!(self.recv().as_deref(), Some(&number.to_be_bytes()[..]));
        }
    }
}

/// Pseudorandom numbers, the same ones in each run
pub(crate) struct Dice(pub(crate) u32);

impl Dice {
    pub(crate) fn roll(&mut self, sides: u32) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 16) % sides
    }
}

/// Makes a bridge with its packets in the IP hooks; `None` if `NFQNL_SKIP_BRIDGE=1` is set
pub(crate) fn bridge() -> Option<Bridge> {
    const SKIP: &str = "NFQNL_SKIP_BRIDGE";
    if std::env::var_os(SKIP).is_some_and(|value| value == "1") {
        eprintln!("SKIPPED by {SKIP}=1: bridged packets");
        return None;
    }
    Some(Bridge::new().unwrap_or_else(|error| panic!("{error}, or set {SKIP}=1")))
}

/// Returns the priority of packets after a verdict with `priority`: Linux before 5.18 ignores it
pub(crate) fn priority(priority: u32) -> u32 {
    if kernel::is_at_least(5, 18) {
        priority
    } else {
        0
    }
}

/// Fails unless a rewritten packet with this payload arrives, or none on kernels without support
/// for new payloads
#[track_caller]
pub(crate) fn expect_rewritten(socket: &Udp, payload: &[u8]) {
    if kernel::refuses_payloads() {
        assert!(socket.is_silent(), "refused, so dropped");
    } else {
        assert_eq!(socket.recv().as_deref(), Some(payload));
    }
}

/// Receives until there are events; fails if none arrive in time
#[track_caller]
pub(crate) fn next_events<'b>(socket: &Socket, batch: &'b mut RecvBatch) -> Events<'b> {
    let end = Instant::now() + TIMEOUT;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        drop(socket.recv_timeout(batch, left).unwrap());
        if batch.has_events() {
            return batch.events();
        }
        assert!(!left.is_zero(), "no event in time");
    }
}

/// Blocks in [`Socket::recv`] until there are events
#[track_caller]
pub(crate) fn recv_events<'b>(socket: &Socket, batch: &'b mut RecvBatch) -> Events<'b> {
    loop {
        drop(socket.recv(batch).unwrap());
        if batch.has_events() {
            return batch.events();
        }
    }
}

/// Returns the next event; fails if none arrives in time
#[track_caller]
pub(crate) fn next_event<'b>(socket: &Socket, batch: &'b mut RecvBatch) -> Event<'b> {
    next_events(socket, batch).next().unwrap()
}

/// Returns the next packet; fails on another event
#[track_caller]
pub(crate) fn next_packet<'b>(socket: &Socket, batch: &'b mut RecvBatch) -> Packet<'b> {
    match next_event(socket, batch) {
        Event::Packet(packet) => packet,
        other => panic!("not a packet: {other:?}"),
    }
}

/// Returns the keys of the next `n` packets
#[track_caller]
pub(crate) fn next_keys(socket: &Socket, batch: &mut RecvBatch, n: usize) -> Vec<PacketKey> {
    Vec::from_iter((0..n).map(|_| next_packet(socket, batch).key()))
}

/// Returns true if another socket could bind the queue
pub(crate) fn is_free(num: u16) -> bool {
    let other = Socket::open().unwrap();
    match other.bind(num) {
        Ok(queue) => {
            queue.destroy().unwrap();
            true
        }
        Err(Error::Refused(refusal)) if is_in_use(&refusal) => false,
        Err(other) => panic!("{other:?}"),
    }
}

/// Returns true if another socket has bound the queue
pub(crate) fn is_in_use(refusal: &Refusal) -> bool {
    matches!(refusal.kind(), ErrorKind::QueueInUse { .. })
}

/// Returns the kernel's refusal; fails for other results
#[track_caller]
pub(crate) fn refusal<T: std::fmt::Debug>(result: nfqnl::Result<T>) -> Refusal {
    match result {
        Err(Error::Refused(refusal)) => refusal,
        other => panic!("not a refusal: {other:?}"),
    }
}

/// Returns true if the batch, the stash and the socket have no events
pub(crate) fn is_silent(socket: &Socket, batch: &mut RecvBatch) -> bool {
    loop {
        drop(socket.try_recv(batch).unwrap());
        if batch.has_events() {
            return false;
        }
        // A call may have read only an answer to a setting or to a wake, with events behind it.
        if !is_readable(socket) {
            return true;
        }
    }
}

/// Passes every event to `f`, without waiting
#[track_caller]
pub(crate) fn take_all(socket: &Socket, batch: &mut RecvBatch, mut each: impl FnMut(Event<'_>)) {
    while !is_silent(socket, batch) {
        batch.events().for_each(&mut each);
    }
}

/// Runs a handle's callbacks for `packets` packets; fails if fewer arrive in time, or more
#[track_caller]
pub(crate) fn run(handle: &Handle<'_>, batch: &mut RecvBatch, packets: usize) {
    let end = Instant::now() + TIMEOUT;
    let mut called = 0;
    while called < packets {
        let left = end.saturating_duration_since(Instant::now());
        called += handle.run_timeout(batch, left).unwrap();
        assert!(!left.is_zero(), "{called} of {packets} packets in time");
    }
    assert_eq!(called, packets);
}

/// Returns true if poll(2) reports the descriptor as readable now
pub(crate) fn is_readable(socket: &impl AsFd) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).unwrap() > 0
}

/// Sends on a copy of the descriptor, like other code with a copy
pub(crate) fn send_past_the_library(socket: &impl AsFd, messages: &[u8]) {
    let mut copy = File::from(socket.as_fd().try_clone_to_owned().unwrap());
    assert_eq!(copy.write(messages).unwrap(), messages.len());
}

/// Sends a configuration request on a copy of the descriptor
pub(crate) fn configure_past_the_library(socket: &impl AsFd, request: &ConfigRequest) {
    let mut buf = [0; ConfigRequest::MAX_LEN];
    let len = request.encode(&mut buf, RequestHeader::default()).unwrap();
    send_past_the_library(socket, &buf[..len]);
}

/// Receives a datagram on a copy of the descriptor; does not wait, because the kernel answers
/// within the send
pub(crate) fn recv_past_the_library(socket: &impl AsFd) -> Vec<u8> {
    let mut datagram = vec![0; RecvBatch::DEFAULT_SLOT_LEN];
    let (len, _) = rustix::net::recv(socket, &mut datagram[..], RecvFlags::DONTWAIT).unwrap();
    datagram.truncate(len);
    datagram
}

/// Receives a datagram on a copy of the descriptor; returns false if the socket is empty
pub(crate) fn steal_past_the_library(socket: &impl AsFd) -> bool {
    rustix::net::recv(socket, &mut [0; 64][..], RecvFlags::DONTWAIT).is_ok()
}

/// Returns the UDP payload of a packet
pub(crate) fn udp_payload<'b>(packet: &Packet<'b>) -> &'b [u8] {
    let sliced = etherparse::SlicedPacket::from_ip(packet.payload()).unwrap();
    match sliced.transport {
        Some(etherparse::TransportSlice::Udp(udp)) => udp.payload(),
        other => panic!("not UDP: {other:?}"),
    }
}

/// Returns the number in a packet of [`Lab::send_numbered`]
pub(crate) fn number(packet: &Packet<'_>) -> u32 {
    u32::from_be_bytes(udp_payload(packet).try_into().unwrap())
}

/// Ends the test as failed unless this is dropped in time, because calls may block forever
#[derive(Debug)]
pub(crate) struct Watchdog {
    _alive: mpsc::Sender<()>,
}

impl Watchdog {
    pub(crate) fn new(limit: Duration) -> Self {
        let (alive, dropped) = mpsc::channel::<()>();
        thread::spawn(move || {
            if dropped.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("the test did not end within {limit:?}");
                process::exit(101);
            }
        });
        Self { _alive: alive }
    }
}

/// Waits until a thread of this process is asleep and stays asleep, for instance in a blocking
/// receive
#[track_caller]
pub(crate) fn wait_until_asleep(thread: i32) {
    let sample = || {
        let status = fs::read_to_string(format!("/proc/self/task/{thread}/status")).unwrap();
        let lines = status
            .lines()
            .filter(|line| line.starts_with("State:") || line.contains("ctxt_switches:"));
        Vec::from_iter(lines.map(str::to_owned))
    };
    let end = Instant::now() + TIMEOUT;
    loop {
        let before = sample();
        thread::sleep(Duration::from_millis(5));
        if before == sample() && before[0].contains('S') && before[0].contains("sleeping") {
            return;
        }
        assert!(Instant::now() < end, "the thread never sleeps");
    }
}

/// Copies a UDP packet with a new payload, lengths and checksums; `None` for other protocols
pub(crate) fn with_udp_payload(packet: &[u8], payload: &[u8]) -> Option<Vec<u8>> {
    let PacketHeaders {
        net: Some(mut net),
        transport: Some(mut transport),
        ..
    } = PacketHeaders::from_ip_slice(packet).ok()?
    else {
        return None;
    };
    let len = transport.header_len() + payload.len();
    transport.mut_udp()?.length = len.try_into().ok()?;
    let mut new = Vec::new();
    match &mut net {
        NetHeaders::Ipv4(ip, _) => {
            ip.set_payload_len(len).ok()?;
            ip.header_checksum = ip.calc_header_checksum();
            ip.write(&mut new).ok()?;
            transport.update_checksum_ipv4(ip, payload).ok()?;
        }
        NetHeaders::Ipv6(ip, _) => {
            ip.set_payload_length(len).ok()?;
            ip.write(&mut new).ok()?;
            transport.update_checksum_ipv6(ip, payload).ok()?;
        }
        NetHeaders::Arp(_) => return None,
    }
    transport.write(&mut new).ok()?;
    new.extend(payload);
    Some(new)
}
