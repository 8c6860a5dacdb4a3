//! Packets per second through the real kernel: task × packet size × style × batch size
//!
//! ```text
//! cargo bench --bench throughput [-- FILTER]    # FILTER as in 'accept/64/loop'
//! cargo bench --bench throughput -- --test      # every cell once, as a test
//! ```
//!
//! The bench runs in its own network namespace, as root or as an ordinary user. The packets of a
//! round wait in the queue before the clock starts, and the clock stops after the last verdict, so
//! the sender's work is not measured. After each round the bench receives the accepted packets and
//! checks their order and content, and that no others arrive.
//!
//! The packets of 60000 bytes use segmentation offload: one packet in the queue, 44 UDP datagrams
//! on the wire.
#![allow(clippy::unwrap_used, reason = "a benchmark may fail")]

use std::fmt;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use nfqnl::{
    ConfigFlags, CopyMode, Decision, Event, Handle, OwnedPacket, Packet, PacketKey, Queue,
    QueueConfig, QueueData, RecvBatch, SendBatch, SkbInfo, Socket, Verdict, VerdictSender,
};
use nfqnl_testkit::netns;
use nfqnl_testkit::rules::{Chain, Family, Hook, Rule, Table};
use nfqnl_testkit::traffic::{TIMEOUT, Udp, V4};

const PORT: u16 = 5000;
const QUEUE: u16 = 1;
const MARK: u32 = 7;
const IP_AND_UDP: usize = 28;
const SENT: u8 = b's';
const REWRITTEN: u8 = b'r';
/// Offset of the byte marking a rewritten payload, behind the packet's number
const STATE: usize = 4;

/// The decisions on packets, which are numbered from 1
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Task {
    Drop,
    Accept,
    /// One in eight is dropped, one in eight marked, and the others are accepted
    Mixed,
    Mark,
    /// Every packet gets a new content of the same length
    Rewrite,
}

impl Task {
    const ALL: [Self; 5] = [
        Self::Drop,
        Self::Accept,
        Self::Mixed,
        Self::Mark,
        Self::Rewrite,
    ];

    fn drops(self, number: u32) -> bool {
        match self {
            Self::Drop => true,
            Self::Mixed => number % 8 == 0,
            _ => false,
        }
    }

    fn marks(self, number: u32) -> bool {
        match self {
            Self::Mark => true,
            Self::Mixed => number % 8 == 1,
            _ => false,
        }
    }

    /// Decides on a packet; `buf` has room for a new payload
    #[inline]
    fn decide<'b>(self, packet: &Packet<'_>, size: Size, buf: &'b mut [u8]) -> Decision<'b> {
        let is_large = packet.skb_info().contains(SkbInfo::GSO);
        assert!(packet.payload().len() == size.len() && is_large == (size == Size::Large));
        let number = packet.id();
        if self == Self::Rewrite {
            Verdict::Accept.with_payload(rewrite(buf, packet.payload()))
        } else if self.drops(number) {
            Verdict::Drop.into()
        } else if self.marks(number) {
            Verdict::Accept.with_mark(MARK)
        } else {
            Verdict::Accept.into()
        }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

/// Copies a packet with a new content; a UDP checksum of 0 means none
fn rewrite<'b>(buf: &'b mut [u8], packet: &[u8]) -> &'b [u8] {
    let new = &mut buf[..packet.len()];
    new.copy_from_slice(packet);
    new[IP_AND_UDP - 2..IP_AND_UDP].fill(0);
    new[IP_AND_UDP + STATE] = REWRITTEN;
    new
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Size {
    Small,
    Full,
    /// One large packet of a sender with segmentation offload
    Large,
}

impl Size {
    const ALL: [Self; 3] = [Self::Small, Self::Full, Self::Large];

    /// Bytes from the network header on
    const fn len(self) -> usize {
        match self {
            Self::Small => 64,
            Self::Full => 1400,
            Self::Large => 60000,
        }
    }

    /// Number of packets waiting at once; the buffers of an ordinary user are small
    fn packets(self) -> u32 {
        match (netns::is_rootless(), self) {
            (false, _) => 128,
            (true, Self::Small | Self::Full) => 64,
            (true, Self::Large) => 4,
        }
    }
}

/// A way to handle packets; the number is the batch size
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    /// Callbacks; the program receives, and calls `handle_packet`
    OwnRecv,
    /// Callbacks with `run_once`
    RunOnce(usize),
    /// A loop of `recv` and `send`
    Loop(usize),
    /// The same, but another thread decides and sends
    OtherThread(usize),
    // A style for tokio would go here, and in `all` and `Driver::new` below.
}

impl Style {
    const BATCHES: [usize; 4] = [1, 8, 32, 64];

    fn all() -> impl Iterator<Item = Self> {
        let batched = [Self::RunOnce, Self::Loop, Self::OtherThread];
        let batched = batched
            .into_iter()
            .flat_map(|style| Self::BATCHES.map(style));
        std::iter::once(Self::OwnRecv).chain(batched)
    }

    fn id(self) -> BenchmarkId {
        match self {
            Self::OwnRecv => BenchmarkId::new("handle_packet", 1),
            Self::RunOnce(batch) => BenchmarkId::new("run_once", batch),
            Self::Loop(batch) => BenchmarkId::new("loop", batch),
            Self::OtherThread(batch) => BenchmarkId::new("other_thread", batch),
        }
    }
}

fn main() {
    netns::enter().unwrap();
    let table = Table::new(Family::Ip, "throughput").unwrap();
    let chain = table.chain("queue", Hook::Input, 0).unwrap();
    let rule = Rule::new().udp_dport(PORT).queue(QUEUE);
    chain.add(&rule).unwrap();
    let later = table.chain("later", Hook::Input, 10).unwrap();
    later
        .add(&Rule::new().mark(MARK, u32::MAX).counter("marked"))
        .unwrap();

    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500))
        .configure_from_args();
    for size in Size::ALL {
        let mut lab = Lab::new(size, &later);
        for task in Task::ALL {
            let mut group = criterion.benchmark_group(format!("{task}/{}", size.len()));
            group.sampling_mode(SamplingMode::Flat);
            group.throughput(Throughput::Elements(size.packets().into()));
            for style in Style::all() {
                let mut driver = None;
                group.bench_function(style.id(), |b| {
                    let driver = driver.get_or_insert_with(|| {
                        lab.next = 1;
                        Driver::new(task, size, style)
                    });
                    b.iter_custom(|rounds| lab.measure(task, driver, rounds));
                });
            }
            group.finish();
        }
    }
    criterion.final_summary();
}

/// A socket sending packets to itself through the queue
struct Lab<'t> {
    socket: Udp,
    size: Size,
    /// Counts the marked packets
    later: &'t Chain,
    /// Number of the next packet, and its packet id
    next: u32,
    buf: Vec<u8>,
}

impl<'t> Lab<'t> {
    fn new(size: Size, later: &'t Chain) -> Self {
        const SEGMENT: u16 = 1372;
        let socket = Udp::bind(V4, PORT).unwrap();
        if size == Size::Large {
            socket.send_segmented(SEGMENT).unwrap();
        }
        Self {
            socket,
            size,
            later,
            next: 1,
            buf: vec![SENT; RecvBatch::DEFAULT_SLOT_LEN],
        }
    }

    /// Measures the handling of waiting packets; checks the result of each packet
    fn measure(&mut self, task: Task, driver: &mut Driver, rounds: u64) -> Duration {
        let marked_before = self.later.count("marked").unwrap();
        let first = self.next;
        let mut total = Duration::ZERO;
        for _ in 0..rounds {
            let numbers = self.next..self.next + self.size.packets();
            self.next = numbers.end;
            self.send(numbers.clone());
            let begin = Instant::now();
            driver.handle(numbers.clone().count());
            total += begin.elapsed();
            self.expect(numbers.filter(|number| !task.drops(*number)), task);
        }
        let silence = Duration::from_millis(1);
        assert_eq!(self.socket.recv_into(&mut self.buf, silence), None);
        let marked = self.later.count("marked").unwrap() - marked_before;
        let expected = (first..self.next).filter(|number| task.marks(*number));
        assert_eq!(usize::try_from(marked), Ok(expected.count()));
        total
    }

    fn send(&mut self, numbers: impl Iterator<Item = u32>) {
        let payload = &mut self.buf[..self.size.len() - IP_AND_UDP];
        payload[STATE] = SENT;
        for number in numbers {
            payload[..STATE].copy_from_slice(&number.to_be_bytes());
            self.socket.send(payload, self.socket.address()).unwrap();
        }
    }

    /// Receives packets; fails if they do not have these numbers, in this order
    fn expect(&mut self, numbers: impl Iterator<Item = u32>, task: Task) {
        let state = if task == Task::Rewrite {
            REWRITTEN
        } else {
            SENT
        };
        for number in numbers {
            let len = self.socket.recv_into(&mut self.buf, TIMEOUT);
            assert_eq!(len, Some(self.size.len() - IP_AND_UDP), "packet {number}");
            assert_eq!(self.buf[..STATE], number.to_be_bytes());
            assert_eq!(self.buf[STATE], state, "packet {number}");
        }
    }
}

/// The running style
enum Driver {
    OwnRecv {
        handle: Handle<'static>,
        fd: UdpSocket,
        buf: Vec<u8>,
        _queue: Queue,
    },
    RunOnce {
        handle: Handle<'static>,
        batch: RecvBatch,
        _queue: Queue,
    },
    Loop {
        socket: Socket,
        batch: RecvBatch,
        verdicts: SendBatch,
        task: Task,
        size: Size,
        buf: Vec<u8>,
        _queue: Queue,
    },
    OtherThread {
        socket: Socket,
        batch: RecvBatch,
        task: Task,
        /// `None` ends the thread
        work: Option<SyncSender<Vec<Work>>>,
        done: Receiver<Vec<Work>>,
        worker: Option<thread::JoinHandle<()>>,
        _queue: Queue,
    },
}

/// A packet for the other thread
enum Work {
    Key(PacketKey),
    /// For a rewrite
    Packet(OwnedPacket),
}

impl Driver {
    fn new(task: Task, size: Size, style: Style) -> Self {
        const RECV_BUFFER: usize = 1 << 25;
        let socket = Socket::builder().recv_buffer(RECV_BUFFER).open().unwrap();
        let config = QueueConfig::new()
            .copy_mode(CopyMode::Packet, u32::MAX)
            .enable(ConfigFlags::GSO);
        let room = || vec![0; RecvBatch::DEFAULT_SLOT_LEN];
        let batch = |slots| RecvBatch::new(slots, RecvBatch::DEFAULT_SLOT_LEN);
        let mut scratch = room();
        let callback = move |data: &mut QueueData<'_>| {
            let decision = task.decide(data.packet(), size, &mut scratch);
            data.set_decision(&decision).unwrap();
        };
        match style {
            Style::OwnRecv => {
                let handle = Handle::new(socket);
                Self::OwnRecv {
                    _queue: handle.create_queue_with(QUEUE, &config, callback).unwrap(),
                    // For its `recv`
                    fd: UdpSocket::from(handle.as_fd().try_clone_to_owned().unwrap()),
                    buf: room(),
                    handle,
                }
            }
            Style::RunOnce(slots) => {
                let handle = Handle::new(socket);
                Self::RunOnce {
                    _queue: handle.create_queue_with(QUEUE, &config, callback).unwrap(),
                    batch: batch(slots),
                    handle,
                }
            }
            Style::Loop(slots) => Self::Loop {
                _queue: socket.bind_with(QUEUE, &config).unwrap(),
                batch: batch(slots),
                verdicts: SendBatch::new(),
                task,
                size,
                buf: room(),
                socket,
            },
            Style::OtherThread(slots) => {
                let (work, to_do) = sync_channel(Style::BATCHES[3]);
                let (done, is_done) = sync_channel(Style::BATCHES[3]);
                let sender = socket.verdict_sender();
                let worker = move || answer(task, size, &sender, &to_do, &done);
                Self::OtherThread {
                    _queue: socket.bind_with(QUEUE, &config).unwrap(),
                    batch: batch(slots),
                    task,
                    work: Some(work),
                    done: is_done,
                    worker: Some(thread::spawn(worker)),
                    socket,
                }
            }
        }
    }

    /// Handles packets, and returns after the last verdict
    fn handle(&mut self, wanted: usize) {
        let mut handled = 0;
        match self {
            Self::OwnRecv {
                handle, fd, buf, ..
            } => {
                while handled < wanted {
                    let len = fd.recv(buf).unwrap();
                    handled += handle.handle_packet(&buf[..len]).unwrap();
                }
            }
            Self::RunOnce { handle, batch, .. } => {
                while handled < wanted {
                    handled += handle.run_once(batch).unwrap();
                }
            }
            Self::Loop {
                socket,
                batch,
                verdicts,
                task,
                size,
                buf,
                ..
            } => {
                while handled < wanted {
                    for packet in socket.recv(batch).unwrap().filter_map(Event::packet) {
                        let decision = task.decide(&packet, *size, buf);
                        verdicts.push(packet.key(), decision).unwrap();
                        handled += 1;
                    }
                    socket.send(verdicts).unwrap();
                }
            }
            Self::OtherThread {
                socket,
                batch,
                task,
                work,
                done,
                ..
            } => {
                let work = work.as_ref().unwrap();
                let mut on_their_way = 0;
                while handled < wanted {
                    let mut packets = Vec::new();
                    if let Ok(emptied) = done.try_recv() {
                        on_their_way -= 1;
                        packets = emptied;
                    }
                    let received = socket.recv(batch).unwrap();
                    let received = received.filter_map(Event::packet);
                    packets.extend(received.map(|packet| match task {
                        Task::Rewrite => Work::Packet(packet.into()),
                        _ => Work::Key(packet.key()),
                    }));
                    handled += packets.len();
                    on_their_way += 1;
                    work.send(packets).unwrap();
                }
                for _ in 0..on_their_way {
                    done.recv().unwrap();
                }
            }
        }
    }
}

/// The other thread: decides and sends until the channel closes, and gives the empty lists back
fn answer(
    task: Task,
    size: Size,
    sender: &VerdictSender,
    to_do: &Receiver<Vec<Work>>,
    done: &SyncSender<Vec<Work>>,
) {
    let mut verdicts = SendBatch::new();
    let mut buf = vec![0; RecvBatch::DEFAULT_SLOT_LEN];
    for mut packets in to_do {
        for work in packets.drain(..) {
            let (key, decision) = match &work {
                Work::Key(key) if task.drops(key.id()) => (*key, Verdict::Drop.into()),
                Work::Key(key) if task.marks(key.id()) => (*key, Verdict::Accept.with_mark(MARK)),
                Work::Key(key) => (*key, Verdict::Accept.into()),
                Work::Packet(packet) => {
                    let packet = packet.packet();
                    (packet.key(), task.decide(&packet, size, &mut buf))
                }
            };
            verdicts.push(key, decision).unwrap();
        }
        sender.send(&mut verdicts).unwrap();
        // The other end is closed after a failed check.
        let _ = done.send(packets);
    }
}

/// Ends the other thread
impl Drop for Driver {
    fn drop(&mut self) {
        if let Self::OtherThread { work, worker, .. } = self {
            drop(work.take());
            worker.take().map(thread::JoinHandle::join);
        }
    }
}
