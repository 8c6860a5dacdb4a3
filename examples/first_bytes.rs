//! Inspects the first bytes of each TCP connection, and lets the kernel do the rest
//!
//! The program reads the client's side of each connection until it has seen `--bytes N` (4096). A
//! connection with the word `blocked` in them is cut; the others get connection mark 1, and a rule
//! keeps their later packets out of the queue. So the program costs nothing for a long download.
//!
//! ```text
//! nft -f - <<END
//! table inet first_bytes {
//!     chain inspect { type filter hook input priority 0; tcp dport 8080 ct mark != 1 queue num 1 bypass; }
//!     chain save { type filter hook input priority 10; mark 1 ct mark set mark; }
//! }
//! END
//! cargo run --release --example first_bytes
//! ```
//!
//! The chain `save` is the way for kernels that take no connection mark in verdicts; then the
//! program marks the packet, and the rule saves the mark.

use std::collections::HashMap;
use std::error::Error;

use etherparse::{SlicedPacket, TransportSlice};
use nfqnl::{
    ConfigFlags, Decision, Event, FlowKey, Packet, QueueConfig, RecvBatch, SendBatch, Socket,
    Verdict,
};

mod support;

const FORBIDDEN: &[u8] = b"blocked";
const INSPECTED: u32 = 1;

/// The bytes of a connection so far
struct Stream {
    bytes: Vec<u8>,
    /// The sequence number of the next byte
    next: u32,
}

struct Inspector {
    streams: HashMap<FlowKey, Stream>,
    /// The number of bytes to inspect
    enough: usize,
    /// The verdict for a connection that needs no more inspection
    pass: Decision<'static>,
}

impl Inspector {
    fn decide(&mut self, packet: &Packet<'_>) -> Decision<'static> {
        let sliced = SlicedPacket::from_ip(packet.payload()).ok();
        let tcp = sliced.and_then(|packet| packet.transport);
        let (Some(flow), Some(TransportSlice::Tcp(tcp))) = (packet.flow(), tcp) else {
            return Verdict::Drop.into(); // a fragment: without its header it cannot be inspected
        };
        if tcp.rst() {
            self.streams.remove(&flow);
            return Verdict::Accept.into();
        }
        if tcp.syn() {
            let (bytes, next) = (Vec::new(), tcp.sequence_number().wrapping_add(1));
            self.streams.insert(flow, Stream { bytes, next });
            return Verdict::Accept.into();
        }
        let Some(stream) = self.streams.get_mut(&flow) else {
            return self.pass; // it began before this program
        };
        // Bytes that were inspected before, or a hole: the sender fills it by sending again.
        let known = stream.next.wrapping_sub(tcp.sequence_number());
        let Some(new) = usize::try_from(known)
            .ok()
            .and_then(|known| tcp.payload().get(known..))
        else {
            let is_old = known < u32::MAX / 2;
            return if is_old {
                Verdict::Accept
            } else {
                Verdict::Drop
            }
            .into();
        };
        stream.bytes.extend_from_slice(new);
        stream.next = stream
            .next
            .wrapping_add(u32::try_from(new.len()).unwrap_or(0));
        if stream
            .bytes
            .windows(FORBIDDEN.len())
            .any(|window| window == FORBIDDEN)
        {
            println!("cut: {} -> {}", flow.source(), flow.destination());
            stream.bytes.clear();
            stream.next = tcp.sequence_number(); // the same bytes are inspected again
            return Verdict::Drop.into();
        }
        if stream.bytes.len() >= self.enough || tcp.fin() {
            println!(
                "inspected {} bytes of {}",
                stream.bytes.len(),
                flow.source()
            );
            self.streams.remove(&flow);
            return self.pass;
        }
        Verdict::Accept.into()
    }
}

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let [number, enough] = support::numbers([("--queue", 1), ("--bytes", 4096)])?;
    let socket = Socket::open()?;
    let pass = match socket.takes_conntrack()? {
        true => Verdict::Accept.with_ct_mark(INSPECTED, u32::MAX),
        false => Verdict::Accept.with_mark(INSPECTED), // a rule saves it
    };
    let config = QueueConfig::new().enable_if_supported(ConfigFlags::GSO);
    let queue = socket.bind_with(number.try_into()?, &config)?;
    println!("queue {} is bound", queue.num());
    let mut inspector = Inspector {
        streams: HashMap::new(),
        enough,
        pass,
    };
    let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
    loop {
        for event in socket.recv(&mut batch)? {
            match event {
                Event::Packet(packet) => verdicts.push(packet.key(), inspector.decide(&packet))?,
                other => eprintln!("{other}"),
            }
        }
        socket.send(&mut verdicts)?;
    }
}
