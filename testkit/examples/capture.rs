//! Writes datagrams of the running kernel to files, for the golden tests of the wire crate
//!
//! ```text
//! cargo run -p nfqnl-testkit --example capture -- proto/tests/data
//! ```
//!
//! This program determines attributes, ports, marks and payloads. User ids, times and MACs are
//! those of the machine.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use netlink_sys::{Socket, SocketAddr};
use nfqnl_proto::{
    ConfigFlags, ConfigRequest, CopyMode, Decision, Message, Messages, QueueConfig, RequestHeader,
    Verdict, encode_noop,
};
use nfqnl_testkit::hosts::{Bridge, Router};
use nfqnl_testkit::netns;
use nfqnl_testkit::rules::{Family, Hook, Rule, Table};
use nfqnl_testkit::traffic::{TIMEOUT, Udp, V4, V6};

const PORT: u16 = 5000;
const QUEUE: u16 = 258; // Its two bytes differ.
const MARK: u32 = 0x0102_0304;
const PRIORITY: u8 = 5;

fn main() -> Result<(), Box<dyn Error>> {
    let directory = std::env::args_os()
        .nth(1)
        .ok_or("usage: capture DIRECTORY")?;
    netns::enter()?;
    let mut capture = Capture::new(directory.into())?;
    replies(&mut capture)?;
    local(&mut capture)?;
    routed(&mut capture)?;
    bridged(&mut capture)
}

/// The socket, and the directory for its datagrams
struct Capture {
    socket: Socket,
    directory: PathBuf,
    seq: u32,
}

impl Capture {
    fn new(directory: PathBuf) -> Result<Self, Box<dyn Error>> {
        let mut socket = Socket::new(libc::NETLINK_NETFILTER.try_into()?)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_cap_ack(true)?;
        socket.set_ext_ack(true)?;
        Ok(Self {
            socket,
            directory,
            seq: 0,
        })
    }

    /// Receives a datagram and writes it to a file
    fn write(&self, name: &str) -> Result<(), Box<dyn Error>> {
        let (datagram, _) = self.socket.recv_from_full()?;
        let path = self.directory.join(Path::new(name).with_extension("bin"));
        println!("{}: {} bytes", path.display(), datagram.len());
        Ok(fs::write(path, datagram)?)
    }

    fn header(&mut self) -> RequestHeader {
        self.seq += 1;
        RequestHeader {
            ack: true,
            seq: self.seq,
            pid: 0,
        }
    }

    /// Sends a configuration request and discards its answer
    fn configure(&mut self, request: &ConfigRequest) -> Result<(), Box<dyn Error>> {
        self.send(request)?;
        self.socket.recv_from_full()?;
        Ok(())
    }

    fn send(&mut self, request: &ConfigRequest) -> Result<(), Box<dyn Error>> {
        let mut buf = [0; ConfigRequest::MAX_LEN];
        let len = request.encode(&mut buf, self.header())?;
        self.socket.send(&buf[..len], 0)?;
        Ok(())
    }
}

/// Waits until packets have times of receipt, or until they have none
///
/// The kernel takes them for all packets while a socket wants them, and starts and stops with a
/// delay.
fn until_times_are(taken: bool, capture: &mut Capture) -> Result<(), Box<dyn Error>> {
    const PROBE: u16 = QUEUE + 1;
    let table = Table::new(Family::Ip, "probe")?;
    let rule = Rule::new().udp_dport(PROBE).queue(PROBE);
    table.chain("c", Hook::Input, 0)?.add(&rule)?;
    let config = QueueConfig::new().copy_mode(CopyMode::Meta, 0);
    capture.configure(&ConfigRequest::bind(PROBE, config))?;
    let udp = Udp::bind(V4, PROBE)?;
    let deadline = Instant::now() + TIMEOUT;
    loop {
        udp.send(b"", udp.address())?;
        let (datagram, _) = capture.socket.recv_from_full()?;
        let Some(Ok(Message::Packet(packet))) = Messages::new(&datagram).next() else {
            return Err("no packet came".into());
        };
        if packet.timestamp().is_some() == taken {
            break;
        }
        if Instant::now() >= deadline {
            let has = if taken { "have no" } else { "have" };
            return Err(format!("packets on this machine {has} times of receipt").into());
        }
        // The packet must not fill the queue.
        let mut buf = [0; Decision::SMALL_LEN];
        let drop = Decision::new(Verdict::Drop);
        let len = drop.encode(&mut buf, PROBE, packet.id(), RequestHeader::default())?;
        capture.socket.send(&buf[..len], 0)?;
        thread::sleep(Duration::from_millis(1));
    }
    capture.configure(&ConfigRequest::unbind(PROBE))?;
    Ok(table.delete()?)
}

fn replies(capture: &mut Capture) -> Result<(), Box<dyn Error>> {
    capture.send(&ConfigRequest::bind(QUEUE, QueueConfig::new()))?;
    capture.write("ack")?;
    capture.send(&ConfigRequest::bind(QUEUE, QueueConfig::new()))?;
    capture.write("busy")?;

    let mut buf = [0; 64];
    let len = encode_noop(&mut buf, capture.header())?;
    capture.socket.send(&buf[..len], 0)?;
    capture.write("noop_ack")?;

    let mut header = capture.header();
    header.ack = false; // Errors come anyway.
    let len = Decision::new(Verdict::Accept).encode(&mut buf, QUEUE, 77, header)?;
    capture.socket.send(&buf[..len], 0)?;
    capture.write("no_such_packet")?;

    // The first attribute is two bytes too short: the kernel's error has a text.
    let config = QueueConfig::new().maxlen(1);
    let header = capture.header();
    let len = ConfigRequest::update(QUEUE, config).encode(&mut buf, header)?;
    const ATTRIBUTE: usize = 20;
    let attribute_len = u16::from_ne_bytes([buf[ATTRIBUTE], buf[ATTRIBUTE + 1]]) - 2;
    buf[ATTRIBUTE..ATTRIBUTE + 2].copy_from_slice(&attribute_len.to_ne_bytes());
    capture.socket.send(&buf[..len], 0)?;
    capture.write("short_attribute")
}

fn local(capture: &mut Capture) -> Result<(), Box<dyn Error>> {
    until_times_are(false, capture)?;
    let rule = Rule::new().udp_dport(PORT).queue(QUEUE);
    let packet = QueueConfig::new().copy_mode(CopyMode::Packet, 0);
    capture.configure(&ConfigRequest::update(QUEUE, packet))?;
    let cases = [
        (Family::Ip, V4, Hook::Input, "ipv4_input"),
        (Family::Ip6, V6, Hook::Output, "ipv6_output"),
    ];
    for (family, address, hook, name) in cases {
        let table = Table::new(family, "capture")?;
        table.chain("c", hook, 0)?.add(&rule)?;
        let udp = Udp::bind(address, PORT)?;
        udp.set_mark(MARK)?;
        udp.set_priority(PRIORITY)?;
        let flags = ConfigFlags::UID_GID;
        let config = packet.enable(flags);
        capture.configure(&ConfigRequest::update(QUEUE, config))?;
        udp.send(b"golden!", udp.address())?;
        capture.write(name)?;

        if hook == Hook::Output {
            let truncating = QueueConfig::new().copy_mode(CopyMode::Packet, 50);
            capture.configure(&ConfigRequest::update(QUEUE, truncating))?;
            udp.send(&[b'x'; 100], udp.address())?;
            capture.write("cut")?;
            let meta = QueueConfig::new().copy_mode(CopyMode::Meta, 0);
            capture.configure(&ConfigRequest::update(QUEUE, meta))?;
            udp.send(b"meta", udp.address())?;
            capture.write("meta")?;
        }
    }
    let no_flags = packet.flags(ConfigFlags::UID_GID, ConfigFlags::empty());
    capture.configure(&ConfigRequest::update(QUEUE, no_flags))
}

fn routed(capture: &mut Capture) -> Result<(), Box<dyn Error>> {
    let router = Router::new()?;
    let table = Table::new(Family::Ip, "routed")?;
    let rule = Rule::new().udp_dport(PORT + 1).queue(QUEUE);
    table.chain("c", Hook::Forward, 0)?.add(&rule)?;
    let receiver = router
        .server
        .namespace
        .run(|| Udp::bind(router.server.v4, PORT + 1))?;
    receiver.want_timestamps()?;
    let sender = router
        .client
        .namespace
        .run(|| Udp::bind(router.client.v4, PORT))?;
    until_times_are(true, capture)?;
    sender.send(b"through a router", receiver.address())?;
    capture.write("forward")
}

fn bridged(capture: &mut Capture) -> Result<(), Box<dyn Error>> {
    until_times_are(false, capture)?; // the router's receiver is gone
    let bridge = Bridge::new()?;
    let table = Table::new(Family::Ip6, "bridged")?;
    let rule = Rule::new().udp_dport(PORT + 2).queue(QUEUE);
    table.chain("c", Hook::Forward, 0)?.add(&rule)?;
    let receiver = bridge
        .right
        .namespace
        .run(|| Udp::bind(bridge.right.v6, PORT + 2))?;
    let sender = bridge
        .left
        .namespace
        .run(|| Udp::bind(bridge.left.v6, PORT))?;
    sender.send(b"over a bridge", receiver.address())?;
    capture.write("bridge")
}
