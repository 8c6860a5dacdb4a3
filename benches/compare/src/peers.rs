//! The Rust sides of the comparison: processes with the protocol of `peers/peer.h`

use std::cell::Cell;
use std::collections::HashMap;
use std::io::Write;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use etherparse::{SlicedPacket, TransportSlice};
use nfqnl::{
    ConfigFlags, CopyMode, Decision, Event, FlowKey, Packet, QueueConfig, QueueData, RecvBatch,
    SendBatch, Socket, SocketBuilder, Verdict,
};
use rustix::thread::{CpuSet, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

use crate::{HEADERS, Result};

const MIXED_MARK: u32 = 7;
/// Longer than a round trip
const BUSY_POLL: Duration = Duration::from_millis(1);

/// The decisions on packets
#[derive(Clone, Copy)]
enum Kind {
    Accept,
    Drop,
    Mixed,
}

impl Kind {
    /// Verdict and mark. Mixed: one packet in eight is dropped, and one in eight marked.
    fn decide(self, id: u32) -> (Verdict, Option<u32>) {
        match (self, id % 8) {
            (Self::Drop, _) | (Self::Mixed, 0) => (Verdict::Drop, None),
            (Self::Mixed, 4) => (Verdict::Accept, Some(MIXED_MARK)),
            _ => (Verdict::Accept, None),
        }
    }
}

/// Runs one side
pub(crate) fn run(arguments: &[&str]) -> Result<()> {
    let [style, queue, kind, recv_buffer, gso] = *arguments else {
        return Err("usage: --peer STYLE QUEUE KIND RECEIVE_BUFFER gso|-".into());
    };
    let queue = queue.parse()?;
    let wants_gso = gso == "gso";
    let recv_buffer = recv_buffer.parse()?;
    let kind = match kind {
        "accept" => Kind::Accept,
        "drop" => Kind::Drop,
        "mixed" => Kind::Mixed,
        _ => return Err("unknown kind".into()),
    };
    let config = config(wants_gso);
    match style {
        "loop" => batch_loop(Socket::builder(), queue, kind, recv_buffer, &config),
        "headers" | "attributes" => {
            let config = match style {
                "headers" => config.copy_mode(CopyMode::Packet, HEADERS),
                _ => config.copy_mode(CopyMode::Meta, 0),
            };
            batch_loop(Socket::builder(), queue, kind, recv_buffer, &config)
        }
        "busy" => {
            let cpus = std::env::var(CPUS).unwrap_or_default();
            let cpus: Vec<usize> = cpus.split(' ').filter_map(|cpu| cpu.parse().ok()).collect();
            stay_on(&cpus)?;
            let builder = Socket::builder().busy_poll(BUSY_POLL);
            stay_on(cpus.last().map_or(&[], std::slice::from_ref))?;
            batch_loop(builder, queue, kind, recv_buffer, &config)
        }
        _ if recv_buffer != 0 => Err("only the loop sets its receive buffer here".into()),
        "first_bytes" => first_bytes(queue, wants_gso),
        "handle_packet" => handle_packet(queue, kind, wants_gso),
        "run_once" => run_once(queue, kind, wants_gso),
        "nfq" => nfq(queue, kind, wants_gso),
        _ => Err("unknown style".into()),
    }
}

/// The CPUs of the sender and of the busy side, if they are two
pub(crate) const CPUS: &str = "COMPARE_CPUS";

/// Keeps the calling thread on these CPUs, if there are any
fn stay_on(cpus: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    cpus.iter().for_each(|&cpu| set.set(cpu));
    if !cpus.is_empty() {
        sched_setaffinity(None, &set)?;
    }
    Ok(())
}

/// Handles packets on request; `handle` receives once and returns its packets and bytes
fn serve(mut handle: impl FnMut() -> Result<(usize, u64)>) -> Result<()> {
    println!("ready");
    for line in std::io::stdin().lines() {
        let wanted: usize = line?.trim().parse()?;
        let (cpu, begin) = (cpu_time(), Instant::now());
        let (mut packets, mut bytes) = (0, 0);
        while packets < wanted {
            let (more_packets, more_bytes) = handle()?;
            packets += more_packets;
            bytes += more_bytes;
        }
        let elapsed = begin.elapsed().as_nanos();
        println!("{elapsed} {} {bytes}", cpu_time() - cpu);
        std::io::stdout().flush()?;
    }
    Ok(())
}

/// User and system time of this process, in nanoseconds
fn cpu_time() -> i64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

fn config(wants_gso: bool) -> QueueConfig {
    let gso = if wants_gso {
        ConfigFlags::GSO
    } else {
        ConfigFlags::empty()
    };
    QueueConfig::new()
        .copy_mode(CopyMode::Packet, 0xffff)
        .flags(ConfigFlags::GSO, gso)
}

fn callback(kind: Kind, bytes: &Arc<AtomicU64>) -> impl FnMut(&mut QueueData<'_>) + Send + 'static {
    let bytes = Arc::clone(bytes);
    move |data| {
        // A plain addition as in C, because only this thread writes.
        let sum = bytes.load(Ordering::Relaxed) + data.get_payload().len() as u64;
        bytes.store(sum, Ordering::Relaxed);
        let (verdict, mark) = kind.decide(data.get_packet_id());
        data.set_verdict(verdict, mark);
    }
}

/// Returns the sum of the callbacks and resets it, without a locked instruction, as in C
fn take(bytes: &AtomicU64) -> u64 {
    let sum = bytes.load(Ordering::Relaxed);
    bytes.store(0, Ordering::Relaxed);
    sum
}

/// Callbacks, and the caller's own `recv`
fn handle_packet(queue: u16, kind: Kind, wants_gso: bool) -> Result<()> {
    let bytes = Arc::new(AtomicU64::new(0));
    let handle = nfqnl::open()?;
    let _queue = handle.create_queue_with(queue, &config(wants_gso), callback(kind, &bytes))?;
    // For its `recv`, the system call of the C programs
    let socket = UdpSocket::from(handle.as_fd().try_clone_to_owned()?);
    let mut buf = vec![0; RecvBatch::DEFAULT_SLOT_LEN];
    serve(|| {
        let Ok(len) = socket.recv(&mut buf) else {
            return Ok((0, 0));
        };
        let packets = handle.handle_packet(buf.get(..len).unwrap_or_default())?;
        Ok((packets, take(&bytes)))
    })
}

/// Callbacks, batched
fn run_once(queue: u16, kind: Kind, wants_gso: bool) -> Result<()> {
    let bytes = Arc::new(AtomicU64::new(0));
    let handle = nfqnl::open()?;
    let _queue = handle.create_queue_with(queue, &config(wants_gso), callback(kind, &bytes))?;
    let mut batch = RecvBatch::default();
    serve(|| {
        let packets = handle.run_once(&mut batch)?;
        Ok((packets, take(&bytes)))
    })
}

/// A loop with batches
fn batch_loop(
    builder: SocketBuilder,
    queue: u16,
    kind: Kind,
    recv_buffer: usize,
    config: &QueueConfig,
) -> Result<()> {
    let socket = match recv_buffer {
        0 => builder.open(),
        bytes => builder.recv_buffer(bytes).open(),
    }?;
    let _queue = socket.bind_with(queue, config)?;
    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
    let bytes = Cell::new(0);
    serve(|| {
        for event in socket.recv(&mut batch)? {
            match event {
                Event::Packet(packet) => {
                    bytes.set(bytes.get() + packet.payload().len() as u64);
                    match kind.decide(packet.id()) {
                        (verdict, None) => verdicts.push(packet.key(), verdict)?,
                        (verdict, Some(mark)) => {
                            verdicts.push(packet.key(), verdict.with_mark(mark))?;
                        }
                    }
                }
                other => eprintln!("{other}"),
            }
        }
        let packets = verdicts.len();
        socket.send(&mut verdicts)?;
        Ok((packets, bytes.take()))
    })
}

/// Reads the first bytes of each TCP connection, and marks it for the rules to pass the rest by
fn first_bytes(queue: u16, wants_gso: bool) -> Result<()> {
    let socket = Socket::open()?;
    let pass = match socket.takes_conntrack()? {
        true => Verdict::Accept.with_ct_mark(1, u32::MAX),
        false => Verdict::Accept.with_mark(1), // a rule saves it
    };
    let _queue = socket.bind_with(queue, &config(wants_gso))?;
    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
    let mut flows = HashMap::new();
    serve(|| {
        let mut bytes = 0;
        for packet in socket.recv(&mut batch)?.filter_map(Event::packet) {
            bytes += packet.payload().len() as u64;
            verdicts.push(packet.key(), inspect(&mut flows, &packet, pass))?;
        }
        let packets = verdicts.len();
        socket.send(&mut verdicts)?;
        Ok((packets, bytes))
    })
}

/// Counts the bytes of a packet's flow, and returns `pass` after the first 4 KiB
fn inspect(
    flows: &mut HashMap<FlowKey, usize>,
    packet: &Packet<'_>,
    pass: Decision<'static>,
) -> Decision<'static> {
    let sliced = SlicedPacket::from_ip(packet.payload()).ok();
    let tcp = sliced.and_then(|packet| packet.transport);
    let (Some(flow), Some(TransportSlice::Tcp(tcp))) = (packet.flow(), tcp) else {
        return Verdict::Accept.into();
    };
    let bytes = flows.entry(flow).or_default();
    *bytes += tcp.payload().len();
    if *bytes < 4096 {
        return Verdict::Accept.into();
    }
    flows.remove(&flow);
    pass
}

/// The crate `nfq`
fn nfq(queue: u16, kind: Kind, wants_gso: bool) -> Result<()> {
    let mut nfq = nfq::Queue::open()?;
    nfq.bind(queue)?;
    nfq.set_copy_range(queue, 0xffff)?;
    nfq.set_recv_gso(queue, wants_gso)?;
    serve(|| {
        let mut message = nfq.recv()?;
        let bytes = message.get_payload().len() as u64;
        let (verdict, mark) = kind.decide(message.get_packet_id());
        if let Some(mark) = mark {
            message.set_nfmark(mark);
        }
        message.set_verdict(match verdict {
            Verdict::Drop => nfq::Verdict::Drop,
            _ => nfq::Verdict::Accept,
        });
        nfq.verdict(message)?;
        Ok((1, bytes))
    })
}
