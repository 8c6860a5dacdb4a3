//! The memory of batches: resident, and on the heap
//!
//! ```text
//! cargo test --release --test memory -- --nocapture    # the figures of benches/README.md
//! ```
#![allow(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

use nfqnl::{ConfigFlags, CopyMode, Event, QueueConfig, RecvBatch, SendBatch, Socket, Verdict};
use nfqnl_testkit::alloc::{CountingAllocator, resident, touched};
use nfqnl_testkit::netns::{is_rootless, isolated};
use nfqnl_testkit::rules::{Family, Hook, Rule, Table};
use nfqnl_testkit::traffic::{TIMEOUT, Udp, V4};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new();

const PORT: u16 = 5000;
const QUEUE: u16 = 1;
const KIB: usize = 1024;
const PAGE: usize = 4 * KIB;
const IP_AND_UDP: usize = 28;

/// The memory of this process, in bytes
#[derive(Clone, Copy)]
struct Memory {
    heap: usize,
    /// Resident data, without code
    touched: usize,
}

impl Memory {
    fn now() -> Self {
        let heap = ALLOCATOR.bytes();
        // Twice, because the first reading touches memory itself.
        touched().unwrap();
        Self {
            heap,
            touched: touched().unwrap(),
        }
    }

    fn since(self, earlier: Self) -> Self {
        Self {
            heap: self.heap.saturating_sub(earlier.heap),
            touched: self.touched.saturating_sub(earlier.touched),
        }
    }
}

/// A queue, and a UDP socket sending to itself through the queue
struct Lab {
    udp: Udp,
    /// For sending and receiving: neither may allocate during a measurement
    buf: Vec<u8>,
    socket: Socket,
    _queue: nfqnl::Queue,
}

impl Lab {
    fn new(config: &QueueConfig) -> Self {
        let table = Table::new(Family::Ip, "t").unwrap();
        let chain = table.chain("c", Hook::Input, 0).unwrap();
        chain
            .add(&Rule::new().udp_dport(PORT).queue(QUEUE))
            .unwrap();
        let socket = Socket::builder().recv_buffer(1 << 25).open().unwrap();
        let queue = socket.bind_with(QUEUE, config);
        Self {
            udp: Udp::bind(V4, PORT).unwrap(),
            buf: vec![1; RecvBatch::DEFAULT_SLOT_LEN],
            socket,
            _queue: queue.unwrap(),
        }
    }

    /// Accepts packets of this length through a batch, in a few rounds
    fn handle_packets(
        &mut self,
        batch: &mut RecvBatch,
        verdicts: &mut SendBatch,
        packets: usize,
        len: usize,
    ) {
        const ROUNDS: usize = 4;
        for _ in 0..ROUNDS {
            for _ in 0..packets {
                let payload = &self.buf[..len - IP_AND_UDP];
                self.udp.send(payload, self.udp.address()).unwrap();
            }
            while verdicts.len() < packets {
                let events = self.socket.recv(batch).unwrap();
                for packet in events.filter_map(Event::packet) {
                    verdicts.push(packet.key(), Verdict::Accept).unwrap();
                }
            }
            self.socket.send(verdicts).unwrap();
            for _ in 0..packets {
                self.udp.recv_into(&mut self.buf, TIMEOUT).unwrap();
            }
        }
    }
}

#[test]
fn a_default_batch_costs_what_its_packets_cost() {
    isolated(|| {
        // Before other allocations: the C library would reuse freed, already touched memory.
        let before = Memory::now();
        let mut batch = RecvBatch::default();
        let mut verdicts = SendBatch::new();
        let empty = Memory::now().since(before);
        println!(
            "default batch: {} KiB of heap, {} KiB resident while empty",
            empty.heap / KIB,
            empty.touched / KIB
        );

        let config = QueueConfig::new()
            .copy_mode(CopyMode::Packet, u32::MAX)
            .enable(ConfigFlags::GSO);
        let mut lab = Lab::new(&config);
        // The buffers of an ordinary user hold only a few large packets.
        let large = if is_rootless() { 4 } else { 32 };
        // The first packets also allocate memory outside the batch.
        lab.handle_packets(
            &mut RecvBatch::new(1, 4 * KIB),
            &mut SendBatch::new(),
            4,
            64,
        );
        let before = Memory::now();
        let mut measure = |what, packets, len| {
            lab.handle_packets(&mut batch, &mut verdicts, packets, len);
            let touched = empty.touched + Memory::now().since(before).touched;
            println!(
                "default batch, after {packets} {what} at once: {} KiB resident",
                touched / KIB
            );
            touched
        };
        let small = measure("packets of 64 bytes", 32, 64);
        let full = measure("packets of 1500 bytes", 32, 1500);
        let large_total = measure("packets of 60000 bytes", large, 60000);

        // A packet may touch one page more than it fills, and the process touches other pages too.
        let others = 16 * PAGE;
        let slots = RecvBatch::DEFAULT_SLOTS;
        assert!(empty.touched <= others);
        // The first 2112 bytes of all slots lie together.
        assert!(small <= 32 * 2112 + others);
        assert!(full <= 32 * 2112 + others);
        assert!(large_total <= slots * RecvBatch::DEFAULT_SLOT_LEN + others);
        println!(
            "the whole process: {} KiB resident",
            resident().unwrap() / KIB
        );
    });
}

/// Memory freed by the process must not make later batches larger.
#[test]
fn later_batches_cost_what_the_first_one_costs() {
    const PACKETS: usize = 16;
    isolated(|| {
        let mut lab = Lab::new(&QueueConfig::new());
        lab.handle_packets(&mut RecvBatch::default(), &mut SendBatch::new(), 1, 64);
        for number in 2..=5 {
            let before = Memory::now();
            let mut batch = RecvBatch::default();
            lab.handle_packets(&mut batch, &mut SendBatch::new(), PACKETS, 64);
            let touched = Memory::now().since(before).touched;
            println!("default batch {number}: {} KiB resident", touched / KIB);
            assert!(touched <= 2 * (PACKETS + 16) * PAGE, "{touched} bytes");
        }
    });
}

#[test]
fn the_small_profile_fits_64_kib() {
    const AT_MOST: usize = 64 * KIB;
    isolated(|| {
        let range = 128;
        let config = QueueConfig::new().copy_mode(CopyMode::Packet, range);
        let mut lab = Lab::new(&config);
        lab.handle_packets(&mut RecvBatch::default(), &mut SendBatch::new(), 32, 1500);

        let before = Memory::now();
        let mut batch = RecvBatch::for_config(16, &config);
        let mut verdicts = SendBatch::new();
        lab.handle_packets(&mut batch, &mut verdicts, 16, 1500);
        let after = Memory::now().since(before);
        println!(
            "small profile, after packets of 1500 bytes: {} bytes of heap, {} KiB resident",
            after.heap,
            after.touched / KIB
        );
        assert!(after.heap <= AT_MOST, "{} bytes of heap", after.heap);
        assert!(after.touched <= AT_MOST, "{} bytes resident", after.touched);
    });
}
