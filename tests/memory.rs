//! What the batches take of memory: resident, and on the heap
//!
//! ```text
//! cargo test --release --test memory -- --nocapture    # the figures of benches/figures.md
//! ```
#![allow(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

use nfqnl::{ConfigFlags, CopyMode, Handle, QueueConfig, RecvBatch, Verdict, VerdictBatch};
use nfqnl_testkit::alloc::{CountingAllocator, resident, touched};
use nfqnl_testkit::netns::{is_rootless, isolated};
use nfqnl_testkit::rules::{Family, Hook, Rule, Table};
use nfqnl_testkit::traffic::{TIMEOUT, Udp, V4};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new();

const PORT: u16 = 5000;
const QUEUE: u16 = 1;
const KIB: usize = 1024;
const IP_AND_UDP: usize = 28;

/// What this process has taken, in bytes
#[derive(Clone, Copy)]
struct Memory {
    heap: usize,
    /// In memory, and data: a batch is not charged with the code that handles it
    touched: usize,
}

impl Memory {
    fn now() -> Self {
        let heap = ALLOCATOR.bytes();
        // Twice, since the first reading has to touch memory itself.
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

/// A queue, and a socket that sends packets through it to itself
struct Lab {
    socket: Udp,
    /// To send from and receive into, so that nothing is taken for it while the batches are measured
    buf: Vec<u8>,
    handle: Handle,
    _queue: nfqnl::Queue,
}

impl Lab {
    fn new(config: QueueConfig) -> Self {
        let table = Table::new(Family::Ip, "t").unwrap();
        let chain = table.chain("c", Hook::Input, 0).unwrap();
        chain
            .add(&Rule::new().udp().dport(PORT).queue(QUEUE))
            .unwrap();
        let handle = Handle::builder().recv_buffer(1 << 25).open().unwrap();
        let queue = handle.bind_queue_with(QUEUE, &config);
        Self {
            socket: Udp::bind(V4, PORT).unwrap(),
            buf: vec![1; RecvBatch::DEFAULT_SLOT_LEN],
            handle,
            _queue: queue.unwrap(),
        }
    }

    /// Has so many packets of this length accepted through a batch, a few times over
    fn handle_packets(
        &mut self,
        batch: &mut RecvBatch,
        verdicts: &mut VerdictBatch,
        packets: usize,
        len: usize,
    ) {
        const ROUNDS: usize = 4;
        for _ in 0..ROUNDS {
            for _ in 0..packets {
                let payload = &self.buf[..len - IP_AND_UDP];
                self.socket.send(payload, self.socket.address()).unwrap();
            }
            while verdicts.len() < packets {
                for packet in self.handle.recv(batch).unwrap().packets() {
                    verdicts.push(packet.key(), Verdict::Accept).unwrap();
                }
            }
            self.handle.send(verdicts).unwrap();
            for _ in 0..packets {
                self.socket.recv_into(&mut self.buf, TIMEOUT).unwrap();
            }
        }
    }
}

#[test]
fn a_default_batch_costs_what_its_packets_cost() {
    isolated(|| {
        // First of all: memory that was given back to the C library would be taken again, already touched.
        let before = Memory::now();
        let mut batch = RecvBatch::default();
        let mut verdicts = VerdictBatch::new();
        let empty = Memory::now().since(before);
        println!(
            "default batch: {} KiB of address space, {} KiB resident while empty",
            empty.heap / KIB,
            empty.touched / KIB
        );

        let config = QueueConfig::new()
            .copy_mode(CopyMode::PACKET, u32::MAX)
            .flags(ConfigFlags::GSO, ConfigFlags::GSO);
        let mut lab = Lab::new(config);
        // An ordinary user's buffers hold no more large packets.
        let large = if is_rootless() { 4 } else { 32 };
        // What the process takes at its first packets is not the batch's.
        lab.handle_packets(
            &mut RecvBatch::new(1, 4 * KIB),
            &mut VerdictBatch::new(),
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
        let page = 4 * KIB;
        let small = measure("packets of 64 bytes", 32, 64);
        let full = measure("packets of 1500 bytes", 32, 1500);
        let large_total = measure("packets of 60000 bytes", large, 60000);

        // A packet may touch one page more than it would fill, and a process does other things too.
        let others = 16 * page;
        let slots = RecvBatch::DEFAULT_SLOTS;
        assert!(empty.touched <= others);
        assert!(small <= slots * 2 * page + others);
        assert!(full <= slots * 2 * page + others);
        assert!(large_total <= slots * RecvBatch::DEFAULT_SLOT_LEN + others);
        println!(
            "the whole process: {} KiB resident",
            resident().unwrap() / KIB
        );
    });
}

#[test]
fn the_small_profile_fits_64_kib() {
    const AT_MOST: usize = 64 * KIB;
    isolated(|| {
        let range = 128;
        let config = QueueConfig::new().copy_mode(CopyMode::PACKET, range);
        let mut lab = Lab::new(config);
        lab.handle_packets(
            &mut RecvBatch::default(),
            &mut VerdictBatch::new(),
            32,
            1500,
        );

        let before = Memory::now();
        let mut batch = RecvBatch::for_copy(16, CopyMode::PACKET, range);
        let mut verdicts = VerdictBatch::new();
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
