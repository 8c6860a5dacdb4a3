//! What nearly every test begins with: a rule, a socket that sends to itself, and ways to receive

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nfqnl::proto::{ConfigRequest, RequestHeader};
use nfqnl::{Error, Event, Handle, Packet, RecvBatch, Refusal, Situation};
use nfqnl_testkit::hosts::Bridge;
use nfqnl_testkit::kernel;
use nfqnl_testkit::rules::{Family, Hook, Rule, Table};
use nfqnl_testkit::traffic::{TIMEOUT, Udp, V4, V6};

/// Where the packets to be queued go
pub(crate) const PORT: u16 = 5000;
/// The queue they are put in
pub(crate) const QUEUE: u16 = 1;

/// UDP to [`PORT`] goes to [`QUEUE`], and sockets that send there
pub(crate) struct Lab {
    pub(crate) v4: Udp,
    pub(crate) v6: Udp,
    tables: Vec<Table>,
    /// How many datagrams have been taken from the IPv4 socket to make room for others
    drained: AtomicUsize,
}

impl Lab {
    /// Packets are queued as they leave, which is within the sender's system call
    pub(crate) fn new() -> Self {
        Self::at(Hook::Output)
    }

    /// Packets are queued as they come in, which on loopback may be some time after the sender's system call
    pub(crate) fn at_input() -> Self {
        Self::at(Hook::Input)
    }

    fn at(hook: Hook) -> Self {
        Self::with(hook, &Rule::new().udp().dport(PORT).queue(QUEUE))
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
            drained: AtomicUsize::new(0),
        }
    }

    /// Both sockets, which is both families
    pub(crate) fn sockets(&self) -> [&Udp; 2] {
        [&self.v4, &self.v6]
    }

    pub(crate) fn tables(&self) -> &[Table] {
        &self.tables
    }

    /// Takes the rules away; the kernel drops what waits
    pub(crate) fn delete_rules(self) {
        for table in self.tables {
            table.delete().unwrap();
        }
    }

    /// Sends to the IPv4 socket itself
    pub(crate) fn send(&self, payload: &[u8]) {
        self.v4.send(payload, self.v4.address()).unwrap();
    }

    /// Sends many datagrams with their number in them
    pub(crate) fn send_numbered(&self, numbers: std::ops::Range<u32>) {
        for number in numbers {
            self.send(&number.to_be_bytes());
        }
    }

    /// Sends numbers in small bursts, and never so many beyond those received that they do not fit the receive buffer;
    /// takes in what is delivered, which would not all fit an ordinary user's socket
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

    /// How many datagrams were delivered, those during the bursts and all until none comes for a moment
    pub(crate) fn drain(&self) -> usize {
        self.drained.swap(0, Ordering::Relaxed) + self.v4.drain()
    }

    pub(crate) fn recv(&self) -> Option<Vec<u8>> {
        self.v4.recv()
    }
}

/// Numbers that look random, the same ones each time
pub(crate) struct Dice(pub(crate) u32);

impl Dice {
    pub(crate) fn roll(&mut self, sides: u32) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 16) % sides
    }
}

/// A bridge whose packets pass the IP hooks; `None` where `NFQNL_SKIP_BRIDGE=1` says that there can be none
pub(crate) fn bridge() -> Option<Bridge> {
    const SKIP: &str = "NFQNL_SKIP_BRIDGE";
    if std::env::var_os(SKIP).is_some_and(|value| value == "1") {
        eprintln!("SKIPPED by {SKIP}=1: bridged packets");
        return None;
    }
    Some(Bridge::new().unwrap_or_else(|error| panic!("{error}, or set {SKIP}=1")))
}

/// What a priority comes to: before Linux 5.18 no packet tells one, and no verdict sets one
pub(crate) fn priority(priority: u32) -> u32 {
    if kernel::is_at_least(5, 18) {
        priority
    } else {
        0
    }
}

/// Fails unless this payload of a rewritten packet comes, or nothing does where the kernel refuses new payloads
#[track_caller]
pub(crate) fn expect_rewritten(socket: &Udp, payload: &[u8]) {
    if kernel::refuses_payloads() {
        assert!(socket.is_silent(), "refused, so dropped");
    } else {
        assert_eq!(socket.recv().as_deref(), Some(payload));
    }
}

/// The next event; fails if none comes in time
#[track_caller]
pub(crate) fn next_event<'b>(handle: &Handle, batch: &'b mut RecvBatch) -> Event<'b> {
    let mut events = handle
        .recv_deadline(batch, Instant::now() + TIMEOUT)
        .unwrap();
    events.next().expect("an event in time")
}

/// The next packet; fails if anything else comes
#[track_caller]
pub(crate) fn next_packet<'b>(handle: &Handle, batch: &'b mut RecvBatch) -> Packet<'b> {
    match next_event(handle, batch) {
        Event::Packet(packet) => packet,
        other => panic!("no packet, but {other:?}"),
    }
}

/// Whether somebody else could bind the queue now
pub(crate) fn is_free(num: u16) -> bool {
    let other = Handle::open().unwrap();
    match other.bind_queue(num) {
        Ok(queue) => {
            queue.destroy().unwrap();
            true
        }
        Err(Error::Refused(refusal)) if refusal.situation() == Situation::NotPermitted => false,
        Err(other) => panic!("{other:?}"),
    }
}

/// The kernel's refusal; fails if there is none
#[track_caller]
pub(crate) fn refusal<T: std::fmt::Debug>(result: nfqnl::Result<T>) -> Refusal {
    match result {
        Err(Error::Refused(refusal)) => refusal,
        other => panic!("no refusal, but {other:?}"),
    }
}

/// Whether nothing is there to be received
pub(crate) fn is_silent(handle: &Handle, batch: &mut RecvBatch) -> bool {
    handle.try_recv(batch).unwrap().next().is_none()
}

/// Sends on a copy of the descriptor, as other code that has one can
pub(crate) fn send_past_the_library(handle: &Handle, messages: &[u8]) {
    let mut copy = File::from(handle.as_fd().try_clone_to_owned().unwrap());
    assert_eq!(copy.write(messages).unwrap(), messages.len());
}

/// The same for a configuration request
pub(crate) fn configure_past_the_library(handle: &Handle, request: &ConfigRequest) {
    let mut buf = [0; ConfigRequest::MAX_LEN];
    let len = request.encode(&mut buf, RequestHeader::default()).unwrap();
    send_past_the_library(handle, &buf[..len]);
}

/// Receives a datagram on a copy of the descriptor; fails if none is there, for the kernel answers within the send
pub(crate) fn recv_past_the_library(handle: &Handle) -> Vec<u8> {
    handle.set_nonblocking(true).unwrap();
    let mut copy = File::from(handle.as_fd().try_clone_to_owned().unwrap());
    let mut datagram = vec![0; RecvBatch::DEFAULT_SLOT_LEN];
    let len = copy.read(&mut datagram).unwrap();
    datagram.truncate(len);
    datagram
}

/// What follows the network and UDP headers
pub(crate) fn udp_payload<'b>(packet: &Packet<'b>) -> &'b [u8] {
    let sliced = etherparse::SlicedPacket::from_ip(packet.payload()).unwrap();
    match sliced.transport {
        Some(etherparse::TransportSlice::Udp(udp)) => udp.payload(),
        other => panic!("no UDP, but {other:?}"),
    }
}

/// Receives a datagram on a copy of the descriptor if one is there, and says whether it was
pub(crate) fn steal_past_the_library(handle: &Handle) -> bool {
    handle.set_nonblocking(true).unwrap();
    let mut copy = File::from(handle.as_fd().try_clone_to_owned().unwrap());
    copy.read(&mut [0; 64]).is_ok()
}
