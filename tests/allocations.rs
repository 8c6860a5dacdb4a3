//! No packet costs a heap allocation, in any way of handling packets
//!
//! Each test has a warm-up, which allocates the memory for reuse. After the warm-up no thread may
//! allocate.
#![allow(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::sync::{Condvar, Mutex};
use std::thread;
use std::time::Duration;

use nfqnl::{
    CopyMode, Decision, Event, Handle, Packet, PacketKey, QueueConfig, QueueData, RecvBatch,
    SendBatch, Socket, Verdict,
};
use nfqnl_testkit::alloc::CountingAllocator;
use nfqnl_testkit::kernel;
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::rules::{Family, Hook, Rule, Table};
use nfqnl_testkit::traffic::{Udp, V4};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new();

const PORT: u16 = 5000;
const QUEUE: u16 = 1;
const SECOND_QUEUE: u16 = 2;
const WARM_UP: usize = 3;
const ROUNDS: usize = 5;
const IP_AND_UDP: usize = 28;
const SENT: u8 = b's';
const REWRITTEN: u8 = b'r';

/// Sockets sending to themselves through queues
struct Lab {
    sockets: Vec<Udp>,
    /// Packets per round; they have to fit the receive buffer
    packets: usize,
    payload: Vec<u8>,
}

impl Lab {
    /// With packets long enough for more than one send of a round's rewritten packets
    fn new() -> Self {
        Self::with(&[QUEUE], 90, 600)
    }

    fn with(queues: &[u16], packets: usize, payload_len: usize) -> Self {
        let table = Table::new(Family::Ip, "t").unwrap();
        let chain = table.chain("c", Hook::Input, 0).unwrap();
        let sockets = queues.iter().map(|&queue| {
            let port = PORT + queue;
            chain
                .add(&Rule::new().udp_dport(port).queue(queue))
                .unwrap();
            Udp::bind(V4, port).unwrap()
        });
        Self {
            sockets: sockets.collect(),
            packets,
            payload: vec![SENT; payload_len],
        }
    }

    /// Runs rounds of waiting packets; fails if a round after the warm-up allocates
    ///
    /// `handle` gets the number of waiting packets and returns the number of accepted ones.
    #[track_caller]
    fn run(&self, name: &str, payload: u8, mut handle: impl FnMut(usize) -> usize) {
        let mut total = 0;
        for round in 0..WARM_UP + ROUNDS {
            for socket in self.sockets.iter().cycle().take(self.packets) {
                socket.send(&self.payload, socket.address()).unwrap();
            }
            let before = ALLOCATOR.allocations();
            let accepted = handle(self.packets);
            let taken = ALLOCATOR.allocations() - before;
            if round >= WARM_UP {
                total += taken;
            }
            let mut arrived = 0;
            for socket in &self.sockets {
                // The kernel delivers a packet before the call with its verdict returns.
                while let Some(got) = socket.recv_within(Duration::from_millis(1)) {
                    assert_eq!(got[0], payload, "{name}");
                    arrived += 1;
                }
            }
            let refused = payload == REWRITTEN && kernel::refuses_payloads();
            assert_eq!(arrived, if refused { 0 } else { accepted }, "{name}");
        }
        println!(
            "{name}: {total} allocations for {} packets",
            ROUNDS * self.packets
        );
        assert_eq!(total, 0, "{name}");
    }
}

/// Checks the counter itself
#[test]
fn an_allocation_is_counted() {
    let before = ALLOCATOR.allocations();
    let kept = std::hint::black_box(vec![1_u8; 10]);
    assert!(ALLOCATOR.allocations() > before);
    assert!(ALLOCATOR.bytes() >= kept.len());
}

/// One in eight is dropped, and one in eight marked
fn mixed(id: u32) -> Decision<'static> {
    match id % 8 {
        0 => Verdict::Drop.into(),
        1 => Verdict::Accept.with_mark(id),
        _ => Verdict::Accept.into(),
    }
}

fn accept(_: u32) -> Decision<'static> {
    Verdict::Accept.into()
}

/// Copies a packet with a new content; a UDP checksum of 0 means none
fn rewrite<'b>(buf: &'b mut [u8], packet: &[u8]) -> &'b [u8] {
    let new = &mut buf[..packet.len()];
    new.copy_from_slice(packet);
    new[IP_AND_UDP - 2..IP_AND_UDP].fill(0);
    new[IP_AND_UDP..].fill(REWRITTEN);
    new
}

fn is_accepted(decision: &Decision<'_>) -> bool {
    decision.verdict() == Verdict::Accept
}

/// Receives waiting packets and passes them to `each`; returns the number of accepted ones
fn receive(
    socket: &Socket,
    batch: &mut RecvBatch,
    verdicts: &mut SendBatch,
    wanted: usize,
    mut each: impl FnMut(&Packet<'_>, &mut SendBatch) -> bool,
) -> usize {
    let (mut handled, mut accepted) = (0, 0);
    while handled < wanted {
        for packet in socket.recv(batch).unwrap().filter_map(Event::packet) {
            accepted += usize::from(each(&packet, verdicts));
            handled += 1;
        }
        socket.send(verdicts).unwrap();
    }
    accepted
}

#[test]
fn loop_with_batches() {
    isolated(|| {
        let lab = Lab::new();
        for (name, decide) in [("equal", accept as fn(u32) -> _), ("mixed", mixed)] {
            for slots in [1, 8, 32, 64] {
                let socket = Socket::open().unwrap();
                let _queue = socket.bind(QUEUE).unwrap();
                let mut batch = RecvBatch::new(slots, RecvBatch::DEFAULT_SLOT_LEN);
                let mut verdicts = SendBatch::new();
                lab.run(&format!("{name}, {slots} slots"), SENT, |wanted| {
                    let each = |packet: &Packet<'_>, verdicts: &mut SendBatch| {
                        let decision = decide(packet.id());
                        verdicts.push(packet.key(), decision).unwrap();
                        is_accepted(&decision)
                    };
                    receive(&socket, &mut batch, &mut verdicts, wanted, each)
                });
            }
        }
    });
}

#[test]
fn loop_over_two_queues() {
    isolated(|| {
        // Short packets fit the receive buffer of an ordinary user.
        let lab = Lab::with(&[QUEUE, SECOND_QUEUE], 192, 10);
        let socket = Socket::builder().recv_buffer(1 << 20).open().unwrap();
        let _queues = [QUEUE, SECOND_QUEUE].map(|queue| socket.bind(queue).unwrap());
        let mut batch = RecvBatch::new(64, RecvBatch::DEFAULT_SLOT_LEN);
        let mut verdicts = SendBatch::new();
        lab.run("two queues in a batch", SENT, |wanted| {
            let each = |packet: &Packet<'_>, verdicts: &mut SendBatch| {
                let decision = mixed(packet.id());
                verdicts.push(packet.key(), decision).unwrap();
                is_accepted(&decision)
            };
            receive(&socket, &mut batch, &mut verdicts, wanted, each)
        });
    });
}

#[test]
fn loop_with_single_verdicts() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        let mut none = SendBatch::new();
        lab.run("single verdicts", SENT, |wanted| {
            receive(&socket, &mut batch, &mut none, wanted, |packet, _| {
                let decision = mixed(packet.id());
                socket.set_verdict(packet.key(), decision).unwrap();
                is_accepted(&decision)
            })
        });
        let mut buf = vec![0; RecvBatch::DEFAULT_SLOT_LEN];
        lab.run("single rewrites", REWRITTEN, |wanted| {
            receive(&socket, &mut batch, &mut none, wanted, |packet, _| {
                let new = rewrite(&mut buf, packet.payload());
                let decision = Verdict::Accept.with_payload(new);
                socket.set_verdict(packet.key(), decision).unwrap();
                true
            })
        });
    });
}

#[test]
fn loop_with_rewrites() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        let mut verdicts = SendBatch::new();
        let mut buf = vec![0; RecvBatch::DEFAULT_SLOT_LEN];
        lab.run("rewrites in batches", REWRITTEN, |wanted| {
            let each = |packet: &Packet<'_>, verdicts: &mut SendBatch| {
                let new = rewrite(&mut buf, packet.payload());
                let decision = Verdict::Accept.with_payload(new);
                verdicts.push(packet.key(), decision).unwrap();
                true
            };
            receive(&socket, &mut batch, &mut verdicts, wanted, each)
        });
    });
}

const CONFIG: QueueConfig = QueueConfig::new().copy_mode(CopyMode::Packet, u32::MAX);

/// The task of a callback
#[derive(Clone, Copy)]
enum Act {
    Accept,
    Mixed,
    Rewrite,
}

impl Act {
    const ALL: [(&str, Self); 3] = [
        ("accept", Self::Accept),
        ("mixed", Self::Mixed),
        ("rewrite", Self::Rewrite),
    ];

    /// The content of accepted packets
    fn payload(self) -> u8 {
        match self {
            Self::Rewrite => REWRITTEN,
            _ => SENT,
        }
    }

    /// The number of accepted packets among `packets` with ids from `first` on
    fn accepted(self, first: usize, packets: usize) -> usize {
        let dropped = match self {
            Self::Mixed => (first..first + packets).filter(|id| id % 8 == 0).count(),
            _ => 0,
        };
        packets - dropped
    }

    fn callback(self) -> impl FnMut(&mut QueueData<'_>) + Send + 'static {
        let mut buf = vec![0; RecvBatch::DEFAULT_SLOT_LEN];
        move |data| match self {
            Self::Accept => data.set_verdict(Verdict::Accept, None),
            Self::Mixed => data.set_decision(&mixed(data.get_packet_id())).unwrap(),
            Self::Rewrite => {
                let new = rewrite(&mut buf, data.get_payload());
                data.set_verdict_with_payload(Verdict::Accept, None, new)
                    .unwrap();
            }
        }
    }
}

#[test]
fn callbacks_by_run_once() {
    isolated(|| {
        let lab = Lab::new();
        for (name, act) in Act::ALL {
            let handle = Handle::open().unwrap();
            let queue = handle.create_queue_with(QUEUE, &CONFIG, act.callback());
            let _queue = queue.unwrap();
            let mut batch = RecvBatch::default();
            let mut next = 1;
            lab.run(&format!("run_once, {name}"), act.payload(), |wanted| {
                let mut handled = 0;
                while handled < wanted {
                    handled += handle.run_once(&mut batch).unwrap();
                }
                let accepted = act.accepted(next, wanted);
                next += wanted;
                accepted
            });
        }
    });
}

#[test]
fn callbacks_by_handle_packet() {
    isolated(|| {
        let lab = Lab::new();
        for (name, act) in Act::ALL {
            let handle = Handle::open().unwrap();
            let queue = handle.create_queue_with(QUEUE, &CONFIG, act.callback());
            let _queue = queue.unwrap();
            // For its `recv`
            let socket = UdpSocket::from(handle.as_fd().try_clone_to_owned().unwrap());
            let mut buf = vec![0; RecvBatch::DEFAULT_SLOT_LEN];
            let mut next = 1;
            lab.run(&format!("handle_packet, {name}"), act.payload(), |wanted| {
                let mut handled = 0;
                while handled < wanted {
                    let len = socket.recv(&mut buf).unwrap();
                    handled += handle.handle_packet(&buf[..len]).unwrap();
                }
                let accepted = act.accepted(next, wanted);
                next += wanted;
                accepted
            });
        }
    });
}

/// Packets between the receiving thread and the answering thread
///
/// A channel of std would allocate when a thread first waits on it.
#[derive(Default)]
struct Work {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    keys: Vec<PacketKey>,
    /// The least number of packets to answer at once
    at_least: usize,
    answered: usize,
    is_over: bool,
}

impl Work {
    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
        self.changed.notify_all();
    }

    fn wait(&self, is_due: impl Fn(&State) -> bool) -> std::sync::MutexGuard<'_, State> {
        let state = self.state.lock().unwrap();
        self.changed.wait_while(state, |s| !is_due(s)).unwrap()
    }

    /// Answers packets until the end
    fn answer(&self, mut verdicts: impl FnMut(&[PacketKey])) {
        let mut keys = Vec::with_capacity(self.state.lock().unwrap().keys.capacity());
        loop {
            let mut state = self.wait(|s| s.is_over || s.keys.len() >= s.at_least);
            std::mem::swap(&mut keys, &mut state.keys);
            drop(state);
            if keys.is_empty() {
                return;
            }
            verdicts(&keys);
            self.change(|state| state.answered += keys.len());
            keys.clear();
        }
    }
}

#[test]
fn verdicts_from_another_thread() {
    isolated(|| {
        let lab = Lab::new();
        for is_batched in [false, true] {
            let socket = Socket::open().unwrap();
            let _queue = socket.bind(QUEUE).unwrap();
            let sender = socket.verdict_sender();
            let work = Work::default();
            work.change(|state| {
                state.keys.reserve(lab.packets);
                state.at_least = lab.packets;
            });
            let mut batch = RecvBatch::default();
            let mut none = SendBatch::new();
            thread::scope(|scope| {
                scope.spawn(|| {
                    let mut verdicts = SendBatch::new();
                    work.answer(|keys| {
                        for &key in keys {
                            let decision = mixed(key.id());
                            if is_batched {
                                verdicts.push(key, decision).unwrap();
                            } else {
                                sender.set_verdict(key, decision).unwrap();
                            }
                        }
                        sender.send(&mut verdicts).unwrap();
                    });
                });
                let name = format!("another thread, batched: {is_batched}");
                let mut round = 0;
                lab.run(&name, SENT, |wanted| {
                    round += 1;
                    if round == WARM_UP {
                        // The buffers have their size now. From here on, answer at once.
                        work.change(|state| state.at_least = 1);
                    }
                    let accepted = receive(&socket, &mut batch, &mut none, wanted, |packet, _| {
                        work.change(|state| state.keys.push(packet.key()));
                        is_accepted(&mixed(packet.id()))
                    });
                    work.wait(|state| state.answered == wanted).answered = 0;
                    accepted
                });
                work.change(|state| state.is_over = true);
            });
        }
    });
}
