//! Inspects the first bytes of each TCP connection, and lets the kernel do the rest
//!
//! A connection with `blocked` in the client's first `--bytes N` (4096) is cut. The others get
//! connection mark 1, and a rule keeps their later packets out of the queue. Where the kernel takes
//! no connection mark in verdicts, the chain `save` saves the packet's.
//!
//! ```text
//! nft add table inet t
//! nft add chain inet t inspect '{ type filter hook input priority 0; }'
//! nft add rule inet t inspect ct state invalid drop
//! nft add rule inet t inspect tcp dport 8080 ct mark != 1 queue flags bypass to 1
//! nft add chain inet t save '{ type filter hook input priority 10; }'
//! nft add rule inet t save mark 1 ct mark set mark
//! cargo run --release --example first_bytes
//! ```

use std::collections::HashMap;
use std::error::Error;
use std::time::{Duration, Instant};

use etherparse::{SlicedPacket, TransportSlice};
use nfqnl::{
    ConfigFlags, Decision, Event, FlowKey, Packet, QueueConfig, RecvBatch, SendBatch, Socket,
    Verdict,
};

mod support;

const FORBIDDEN: &[u8] = b"blocked";
const MAX_STREAMS: usize = 65_536;
const IDLE: Duration = Duration::from_secs(60);
/// The bytes of a connection so far
struct Stream {
    /// The sequence number of the first byte
    start: u32,
    bytes: Vec<u8>,
    seen: Instant,
}

type Streams = HashMap<FlowKey, Stream>;

/// Returns the verdict on a packet; `None` once its connection needs no more inspection
fn decide(streams: &mut Streams, enough: usize, packet: &Packet<'_>) -> Option<Verdict> {
    let sliced = SlicedPacket::from_ip(packet.payload())
        .ok()
        .and_then(|packet| packet.transport);
    let (Some(flow), Some(TransportSlice::Tcp(tcp))) = (packet.flow(), sliced) else {
        return Some(Verdict::Drop); // a fragment: without its header it cannot be inspected
    };
    let (is_syn, data, now) = (tcp.syn(), tcp.payload(), Instant::now());
    if !is_syn && data.is_empty() {
        return Some(Verdict::Accept);
    }
    if tcp.urg() || is_syn && !data.is_empty() {
        return Some(Verdict::Drop); // the server may read other bytes than this program
    }
    let is_idle = |stream: &Stream| now - stream.seen > IDLE;
    if streams.len() >= MAX_STREAMS || is_syn && streams.get(&flow).is_some_and(is_idle) {
        streams.retain(|_, stream| !is_idle(stream));
    }
    if streams.len() >= MAX_STREAMS && !streams.contains_key(&flow) {
        return Some(Verdict::Drop);
    }
    // A connection that began before this program is inspected from here on.
    let start = tcp.sequence_number().wrapping_add(is_syn.into());
    let (bytes, seen) = (Vec::new(), now);
    let stream = streams.entry(flow).or_insert(Stream { start, bytes, seen });
    stream.seen = now;
    let offset = usize::try_from(start.wrapping_sub(stream.start)).unwrap_or(usize::MAX);
    let is_new_syn = is_syn && offset != 0; // servers ignore it inside a connection
    let Some(known) = stream.bytes.get(offset..).filter(|_| !is_new_syn) else {
        return Some(Verdict::Drop); // a hole, which the sender fills by sending again
    };
    let (again, more) = data.split_at(known.len().min(data.len()));
    if !known.starts_with(again) {
        return Some(Verdict::Drop); // other bytes in the same place
    }
    let before = stream.bytes.len();
    stream.bytes.extend_from_slice(more);
    let mut words = stream.bytes.windows(FORBIDDEN.len());
    if words.any(|word| word == FORBIDDEN) {
        println!("cut: {flow}");
        stream.bytes.truncate(before); // so the word is found again
        return Some(Verdict::Drop);
    }
    if stream.bytes.len() < enough {
        return Some(Verdict::Accept);
    }
    println!("inspected: {flow}");
    streams.remove(&flow);
    None
}

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let [number, enough] = support::numbers([("--queue", 1), ("--bytes", 4096)])?;
    let socket = Socket::open()?;
    let pass: Decision<'_> = match socket.takes_conntrack()? {
        true => Verdict::Accept.with_ct_mark(1, u32::MAX),
        false => Verdict::Accept.with_mark(1), // a rule saves it
    };
    let config = QueueConfig::new().enable_if_supported(ConfigFlags::GSO);
    let queue = socket.bind_with(number.try_into()?, &config)?;
    println!("queue {} is bound", queue.num());
    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
    let mut streams = HashMap::new();
    loop {
        for event in socket.recv(&mut batch)? {
            match event {
                Event::Packet(packet) => {
                    let verdict = decide(&mut streams, enough, &packet);
                    let decision = verdict.map_or(pass, Decision::from);
                    verdicts.push(packet.key(), decision)?;
                }
                other => eprintln!("{other}"),
            }
        }
        socket.send(&mut verdicts)?;
    }
}
