//! The kernel's side of one socket, as far as the queue subsystem goes, and a ledger of what the library and the program
//! have done with each packet
//!
//! It does what `nfnetlink_queue.c`, `nfnetlink.c` and `af_netlink.c` do, when the fuzzer says: packets come and get lost,
//! queues end, the receive buffer overflows, the capability comes and goes. It tells no lies: it acknowledges what it has
//! done. What wrong answers there are name no request that is waited for.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;

use nfqnl::PacketKey;
use nfqnl_proto::Attrs;

pub const QUEUES: usize = 3;

/// No message is longer
pub const LONGEST: usize = 512;

/// So many come in one datagram at most
pub const JOINED: usize = 4;

/// More bindings than this there are never
pub const GENERATIONS: usize = 64;

/// Who decides on packets: two batches, callbacks, and verdicts that are sent alone
pub const BATCHES: usize = 2;
pub const CALLBACKS: usize = 2;
pub const ALONE: usize = 3;

/// What verdicts are told apart by: verdict, mark, length of the new payload
pub type Given = (u32, Option<u32>, Option<usize>);

/// The fuzzer's bytes, taken one at a time; zeroes when they are used up
#[derive(Default)]
pub struct Bytes {
    data: Vec<u8>,
    at: usize,
}

impl Bytes {
    pub fn new(data: &[u8]) -> Self {
        let (data, at) = (data.to_vec(), 0);
        Self { data, at }
    }

    pub fn is_empty(&self) -> bool {
        self.at >= self.data.len()
    }

    pub fn next(&mut self) -> u8 {
        let byte = self.data.get(self.at).copied();
        self.at += 1;
        byte.unwrap_or(0)
    }

    pub fn below(&mut self, n: usize) -> usize {
        usize::from(self.next()) % n
    }

    fn some(&mut self, most: usize) -> Vec<u8> {
        let n = self.below(most + 1);
        (0..n).map(|_| self.next()).collect()
    }
}

/// What a packet in the kernel waits for
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fate {
    /// Nothing is decided
    Held,
    /// This verdict, by one of those who decide
    Decided(usize, Given),
    /// It was given this verdict, and the kernel refused it for want of the capability
    Refused(Given),
}

/// One binding of a queue
pub struct Bound {
    pub generation: u32,
    last_id: u32,
    /// Lost one after the other, the newest
    lost: u32,
    /// Not `NFQNL_COPY_NONE`
    copies: bool,
    /// Oldest first
    pub waiting: VecDeque<(u32, Fate)>,
    /// Gone without a verdict
    flushed: BTreeSet<u32>,
}

impl Bound {
    pub fn fate(&mut self, id: u32) -> Option<&mut Fate> {
        let packet = self.waiting.iter_mut().find(|packet| packet.0 == id);
        packet.map(|packet| &mut packet.1)
    }
}

/// A packet that the library has been handed
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    pub queue: u16,
    pub generation: u32,
    pub id: u32,
}

struct Datagram {
    bytes: Vec<u8>,
    packet: Option<Name>,
    /// Whether it is a message of the right length; so others can follow in the same datagram
    is_whole: bool,
    /// Whether the packet can be read
    is_sound: bool,
    /// Whether the next message comes in the same datagram, if the receiver has room
    joins: bool,
}

impl Datagram {
    fn new(bytes: Vec<u8>) -> Self {
        Self {
            is_whole: bytes.len() >= 16 && ne32(&bytes, 0) as usize == bytes.len(),
            bytes,
            packet: None,
            is_sound: true,
            joins: false,
        }
    }
}

/// What has become of a packet that the library has been handed
pub struct Handed {
    /// How often it was yielded
    pub times: u32,
    /// Whether it came uncut, and can be read
    pub is_sound: bool,
}

pub struct World {
    pub bytes: Bytes,
    pub queues: [Option<Bound>; QUEUES],
    generations: u32,
    /// Whether somebody else has the socket too, and had it before, who may bind and unbind any queue
    pub is_shared: bool,

    receive_buffer: VecDeque<Datagram>,
    capacity: usize,
    /// `NETLINK_NO_ENOBUFS`
    hides_overruns: bool,
    /// Since an overrun, until the buffer is empty
    is_congested: bool,
    error: Option<i32>,
    pub dropped: u32,
    /// Of these, how many since the buffer was last empty, where that ends an overrun
    pub dropped_at_once: u32,
    /// Whether so many were lost that runs may end for that, which waits for all sends that are on their way
    pub may_end_runs: bool,
    pub interruptions: u8,
    /// How many of the next messages come in one datagram with what follows them
    pub joins: usize,
    /// Of the last request
    last_seq: u32,
    /// Sent while their queue was unbound, and not there yet
    flying: Vec<Name>,

    pub is_capable: bool,
    /// Whether that changes before and after the kernel's next work
    pub changes: [bool; 2],
    /// The next send of verdicts fails
    pub send_error: Option<i32>,
    /// The next configuration request is refused
    pub refusal: Option<i32>,
    pub send_limit: usize,
    /// Whether a send was too long since this was last asked
    pub was_too_long: bool,

    /// Whether nothing happens by itself any more
    pub is_frozen: bool,
    /// Who sends verdicts, innermost last
    pub senders: Vec<usize>,
    /// What the library has been handed, and how often it has yielded that
    pub handed: BTreeMap<Name, Handed>,
    /// Which binding of the kernel the library means by a queue and a number
    pub bindings: BTreeMap<(u16, u16), u32>,
}

fn fail<T>(errno: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(errno))
}

/// Whether `a` was numbered after `b`
fn is_after(a: u32, b: u32) -> bool {
    a.wrapping_sub(b).cast_signed() > 0
}

fn ne16(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes(*bytes[at..].first_chunk().expect("two bytes"))
}

fn ne32(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(*bytes[at..].first_chunk().expect("four bytes"))
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(*bytes.first_chunk().expect("four bytes"))
}

/// A message in the making; all in one piece of memory, since many are made
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16) -> Self {
        let mut bytes = Vec::with_capacity(LONGEST);
        bytes.extend_from_slice(&[0; 16]);
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        Self(bytes)
    }

    fn put(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// The header of an attribute, and the padding of what was before
    fn attr(mut self, kind: u16, len: usize) -> Self {
        self.0.resize(self.0.len().div_ceil(4) * 4, 0);
        let len = u16::try_from(4 + len).expect("short");
        self.put(&len.to_ne_bytes()).put(&kind.to_ne_bytes())
    }

    fn end(mut self) -> Vec<u8> {
        let len = u32::try_from(self.0.len()).expect("short");
        self.0[..4].copy_from_slice(&len.to_ne_bytes());
        self.0
    }
}

fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    Message::new(kind, flags).put(body).end()
}

const PACKET: u16 = 0x0300;
pub const VERDICT: u16 = 0x0301;
const CONFIG: u16 = 0x0302;
pub const VERDICT_BATCH: u16 = 0x0303;
const NOOP: u16 = 1;

const REQUEST: u16 = 1;
const ACK: u16 = 4;
/// Looked at by nobody: how the library marks what it says again
const ECHO: u16 = 8;

impl World {
    pub fn new(mut bytes: Bytes, hides_overruns: bool) -> Self {
        let byte = bytes.next();
        Self {
            capacity: 4 + usize::from(byte % 32),
            bytes,
            queues: [const { None }; QUEUES],
            generations: 0,
            is_shared: byte >= 192,
            receive_buffer: VecDeque::new(),
            hides_overruns,
            is_congested: false,
            error: None,
            dropped: 0,
            dropped_at_once: 0,
            may_end_runs: false,
            interruptions: 0,
            joins: 0,
            last_seq: 0,
            flying: Vec::new(),
            is_capable: true,
            changes: [false; 2],
            send_error: None,
            refusal: None,
            send_limit: usize::MAX,
            was_too_long: false,
            is_frozen: false,
            senders: Vec::new(),
            handed: BTreeMap::new(),
            bindings: BTreeMap::new(),
        }
    }

    pub fn is_readable(&self) -> bool {
        self.error.is_some() || !self.receive_buffer.is_empty()
    }

    /// The bound queue that this key belongs to, if it is that binding of it
    pub fn bound(&mut self, key: PacketKey) -> Option<&mut Bound> {
        let generation = *self.bindings.get(&(key.queue, key.binding))?;
        let bound = self.queues[usize::from(key.queue)].as_mut()?;
        (bound.generation == generation).then_some(bound)
    }

    /// What the library calls a packet; it has yielded one of the same binding
    pub fn key(&self, queue: u16, generation: u32, id: u32) -> Option<PacketKey> {
        let mut all = self.bindings.iter();
        let (&(_, binding), _) = all.find(|(name, of)| name.0 == queue && **of == generation)?;
        Some(PacketKey { queue, binding, id })
    }

    /// Whether a message that asks for the capability in the receive buffer, or might, makes the library take locks that
    /// a sender has
    pub fn has_bad_news(&self) -> bool {
        let is_bad = |datagram: &Datagram| datagram.packet.is_none();
        self.receive_buffer.iter().any(is_bad)
    }
}

/// What comes
impl World {
    /// `netlink_unicast` and `netlink_overrun`
    fn deliver(&mut self, mut datagram: Datagram) {
        if self.is_congested || self.receive_buffer.len() >= self.capacity {
            self.dropped = self.dropped.wrapping_add(1);
            return self.overrun();
        }
        if datagram.is_whole && self.joins > 0 {
            self.joins -= 1;
            datagram.joins = true;
        }
        self.receive_buffer.push_back(datagram);
    }

    fn send_packet(&mut self, packet: Name) {
        let Name {
            queue,
            generation,
            id,
        } = packet;
        let mut message = Message::new(PACKET, 0)
            .put(&[2, 0])
            .put(&queue.to_be_bytes())
            .attr(1, 7)
            .put(&id.to_be_bytes())
            .put(&[8, 0, 1]);
        let shape = self.bytes.next();
        if (1..4).contains(&(shape % 16)) {
            message = message.attr(3, 4).put(&[0, 0, 0, 7]);
        }
        let more = match shape >> 4 {
            0 => 300,
            1 => 61,
            n => usize::from(n),
        };
        let payload = message.0.len().div_ceil(4) * 4 + 4;
        let len = payload + 8 + more;
        // Which generation it is of, its length says, for one that is cut
        let missing = (GENERATIONS + generation as usize - len % GENERATIONS) % GENERATIONS;
        let len = len + missing;
        let mut bytes = message
            .attr(10, len - payload)
            .put(&generation.to_be_bytes())
            .put(&id.to_be_bytes())
            .put(&[0x45; LONGEST][..len - payload - 8])
            .end();
        if shape.is_multiple_of(16) {
            // And its error, for one that is broken: an attribute of this number is shorter than its header.
            let kind = u16::try_from(generation).expect("few");
            bytes[payload - 4..payload - 2].copy_from_slice(&3_u16.to_ne_bytes());
            bytes[payload - 2..payload].copy_from_slice(&kind.to_ne_bytes());
        }
        self.deliver(Datagram {
            packet: Some(packet),
            is_sound: !shape.is_multiple_of(16),
            ..Datagram::new(bytes)
        });
    }

    /// A packet is queued and sent; says whether there is such a queue
    pub fn arrive(&mut self, queue: usize) -> bool {
        let Some(bound) = self.queues[queue].as_mut().filter(|bound| bound.copies) else {
            return false;
        };
        bound.last_id = bound.last_id.wrapping_add(1);
        let (generation, id) = (bound.generation, bound.last_id);
        let queue = u16::try_from(queue).expect("few queues");
        let before = self.dropped;
        self.send_packet(Name {
            queue,
            generation,
            id,
        });
        let is_lost = self.dropped != before;
        if let Some(bound) = &mut self.queues[usize::from(queue)] {
            match is_lost {
                true => bound.lost += 1,
                false => {
                    bound.lost = 0;
                    bound.waiting.push_back((id, Fate::Held));
                }
            }
        }
        true
    }

    /// Many packets are lost, so that numbers come to wrap
    pub fn lose(&mut self, queue: usize, n: u32) {
        // A buffer that is full has something in it.
        if self.receive_buffer.is_empty() {
            return;
        }
        let Some(bound) = self.queues[queue].as_mut().filter(|bound| bound.copies) else {
            return;
        };
        // The kernel can't tell packets apart that have the same number, and nobody how often the count has wrapped.
        let oldest = bound
            .waiting
            .front()
            .map_or(bound.last_id, |packet| packet.0);
        let span = bound.last_id.wrapping_sub(oldest).max(bound.lost);
        let most = span.max(self.dropped_at_once);
        if most.saturating_add(n) < u32::MAX - (1 << 16) {
            bound.lost += n;
            bound.last_id = bound.last_id.wrapping_add(n);
            self.dropped = self.dropped.wrapping_add(n);
            self.dropped_at_once += n;
            self.may_end_runs |= n > 1 << 20;
            self.overrun();
        }
    }

    /// `netlink_overrun`
    fn overrun(&mut self) {
        if !self.hides_overruns && !self.is_congested {
            self.is_congested = true;
            self.error = Some(libc::ENOBUFS);
        }
    }

    /// Some packets come while the kernel does something else
    pub fn arrive_meanwhile(&mut self) {
        if self.is_frozen {
            return;
        }
        let byte = self.bytes.next();
        for _ in 0..(byte >> 6).saturating_sub(1) {
            self.arrive(usize::from(byte) % QUEUES);
        }
    }

    /// The kernel drops a waiting packet
    pub fn flush(&mut self, queue: usize, place: usize) {
        if let Some(bound) = &mut self.queues[queue]
            && let Some((id, _)) = bound.waiting.remove(place)
        {
            bound.flushed.insert(id);
        }
    }

    pub fn land(&mut self) {
        for packet in std::mem::take(&mut self.flying) {
            self.send_packet(packet);
        }
    }

    /// The queue is bound; says whether it could be
    pub fn bind(&mut self, queue: usize, copies: bool) -> bool {
        let is_free = self.queues[queue].is_none() && self.generations as usize + 1 < GENERATIONS;
        if is_free {
            self.generations += 1;
            self.queues[queue] = Some(Bound {
                generation: self.generations,
                last_id: 0,
                lost: 0,
                copies,
                waiting: VecDeque::new(),
                flushed: BTreeSet::new(),
            });
        }
        is_free
    }

    /// The queue ends, with packets on their way
    pub fn unbind(&mut self, queue: usize) -> bool {
        let Some(bound) = self.queues[queue].take() else {
            return false;
        };
        let flying = if bound.copies && !self.is_frozen {
            self.bytes.next() % 4
        } else {
            0
        };
        for n in 1..=flying.saturating_sub(1) {
            self.flying.push(Name {
                queue: u16::try_from(queue).expect("few queues"),
                generation: bound.generation,
                id: bound.last_id.wrapping_add(n.into()),
            });
        }
        true
    }

    /// Something that is no packet, and answers no request that is waited for
    pub fn send_junk(&mut self) {
        let bytes = match self.bytes.next() % 10 {
            0 => message(4, 0, &[]), // NLMSG_OVERRUN
            8 => {
                // A packet of a queue that nobody has bound, or no packet
                let queue = u16::try_from(QUEUES).expect("few") + u16::from(self.bytes.next());
                let body = [&[2, 0][..], &queue.to_be_bytes(), &self.bytes.some(31)].concat();
                message(PACKET, 0, &body)
            }
            9 => {
                // Several messages of no kind, and a break
                let len = [16_u32, 20, 15, 0, u32::MAX][self.bytes.below(5)];
                let mut head = message(0x0405, 0, &[]);
                head[..4].copy_from_slice(&len.to_ne_bytes());
                [message(NOOP, 0, &[]), head, self.bytes.some(31)].concat()
            }
            1 => message(NOOP, 0, &[]),
            2 => message(3, 0, &[0; 4]), // NLMSG_DONE
            3 => self.bytes.some(15),    // no header
            4 => {
                let kind = u16::from(self.bytes.next()) | 0x0400;
                message(kind, 0, &self.bytes.some(15))
            }
            5 => message(2, 0, &self.bytes.some(19)), // too short an error
            6 => {
                // A refusal of some verdict, which may never have been
                let errno = [
                    libc::ENOENT,
                    libc::EINVAL,
                    libc::EPERM,
                    libc::ENODEV,
                    0,
                    524,
                ];
                let errno = errno[self.bytes.below(6)];
                let kind = [VERDICT, VERDICT_BATCH][self.bytes.below(2)];
                let head = [&[0; 4][..], &kind.to_ne_bytes(), &[0; 2]].concat();
                let key = [0, 0, 0, self.bytes.next(), 0, 0, 0, 1];
                reply(-errno, &[&head[..], &key].concat(), true, None)
            }
            _ => {
                // An answer to no request, or to one that has given up
                let kind = [CONFIG, NOOP, 0x77][self.bytes.below(3)];
                let seq = self.last_seq.saturating_sub(self.bytes.next().into());
                let head = [&[16, 0, 0, 0][..], &kind.to_ne_bytes(), &[0; 2]].concat();
                let head = [&head[..], &seq.to_ne_bytes(), &[0; 4]].concat();
                reply(-i32::from(self.bytes.next()), &head, false, Some("no"))
            }
        };
        self.deliver(Datagram::new(bytes));
    }

    /// `netlink_recvmsg`, once or as often as there are slots
    pub fn receive(
        &mut self,
        slots: &mut dyn Iterator<Item = &mut [u8]>,
        lens: &mut [usize],
    ) -> io::Result<usize> {
        if self.interruptions > 0 {
            self.interruptions -= 1;
            return fail(libc::EINTR);
        }
        if let Some(errno) = self.error.take() {
            return fail(errno);
        }
        let mut n = 0;
        for (len, slot) in lens.iter_mut().zip(slots) {
            let Some(mut datagram) = self.receive_buffer.pop_front() else {
                break;
            };
            let mut begin = 0;
            loop {
                let room = &mut slot[begin..];
                let cut = datagram.bytes.len().min(room.len());
                room[..cut].copy_from_slice(&datagram.bytes[..cut]);
                *len = begin + cut;
                if let Some(name) = datagram.packet {
                    let is_sound = datagram.is_sound && cut == datagram.bytes.len();
                    let before = self.handed.insert(name, Handed { times: 0, is_sound });
                    assert!(before.is_none(), "ids are given once");
                }
                begin = len.div_ceil(4) * 4;
                let fits = |next: &Datagram| begin + next.bytes.len() <= slot.len();
                if !datagram.joins || !self.receive_buffer.front().is_some_and(fits) {
                    break;
                }
                datagram = self.receive_buffer.pop_front().expect("it is there");
            }
            n += 1;
        }
        if self.receive_buffer.is_empty() {
            self.is_congested = false;
            if !self.hides_overruns {
                self.dropped_at_once = 0;
            }
        }
        match n {
            0 => fail(libc::EAGAIN),
            n => Ok(n),
        }
    }
}

/// `netlink_ack`
fn reply(code: i32, header: &[u8], is_capped: bool, text: Option<&str>) -> Vec<u8> {
    let flags = if is_capped { 0x100 } else { 0 } | if text.is_some() { 0x200 } else { 0 };
    let reply = Message::new(2, flags)
        .put(&code.to_ne_bytes())
        .put(&header[..16]);
    match text {
        Some(text) => reply
            .attr(1, text.len() + 1)
            .put(text.as_bytes())
            .put(&[0])
            .end(),
        None => reply.end(),
    }
}

/// What is sent
impl World {
    fn answer(&mut self, header: &[u8], errno: i32) {
        let text = (errno != 0 && self.bytes.next() % 2 == 1).then_some("why not");
        self.deliver(Datagram::new(reply(-errno, header, true, text)));
    }

    /// `nfnetlink_rcv`
    pub fn carry_out(&mut self, bytes: &[u8]) {
        if !self.is_capable {
            self.refuse(bytes);
            return self.answer(bytes, libc::EPERM);
        }
        for message in split(bytes) {
            let (kind, flags) = (ne16(message, 4), ne16(message, 6));
            assert_eq!(
                flags & !(ACK | ECHO),
                REQUEST,
                "a request, and nothing beyond an acknowledgement and a mark of one's own"
            );
            if [NOOP, CONFIG].contains(&kind) {
                self.last_seq = ne32(message, 8);
            }
            let errno = match kind {
                NOOP => 0,
                CONFIG => self.configure(message),
                _ => self.execute(message),
            };
            if errno != 0 || flags & ACK != 0 {
                self.answer(message, errno);
            }
        }
    }

    /// `nfqnl_recv_config`
    fn configure(&mut self, message: &[u8]) -> i32 {
        if let Some(errno) = self.refusal.take() {
            return errno;
        }
        let queue = usize::from(u16::from_be_bytes([message[18], message[19]]));
        let attrs = Attrs::new(&message[20..]);
        let value = |kind| attrs.clone().last(kind).map(|attr| attr.value);
        match value(1).map(|cmd| cmd[0]) {
            Some(1) if self.queues[queue].is_some() => return libc::EBUSY,
            Some(1) if !self.bind(queue, false) => return libc::ENOMEM,
            Some(2) => return if self.unbind(queue) { 0 } else { libc::ENODEV },
            Some(3 | 4) => return 0,
            _ => {}
        }
        let Some(bound) = &mut self.queues[queue] else {
            return libc::ENODEV;
        };
        if let Some(params) = value(2) {
            bound.copies = params[4] != 0;
        }
        0
    }

    fn refuse(&mut self, bytes: &[u8]) {
        for message in split(bytes) {
            if ![VERDICT, VERDICT_BATCH].contains(&ne16(message, 4)) {
                continue;
            }
            let sent = Sent::read(message);
            let sender = *self.senders.last().expect("somebody sends");
            let Some(bound) = self.bound(sent.key) else {
                continue;
            };
            for (id, fate) in &mut bound.waiting {
                let is_meant = *id == sent.key.id || sent.is_batch && !is_after(*id, sent.key.id);
                if is_meant && *fate == Fate::Decided(sender, sent.given) {
                    *fate = Fate::Refused(sent.given);
                }
            }
        }
    }

    /// `nfqnl_recv_verdict` and `nfqnl_recv_verdict_batch`, which must find what was meant
    fn execute(&mut self, message: &[u8]) -> i32 {
        let sent = Sent::read(message);
        let Sent { key, given, .. } = sent;
        let sender = *self.senders.last().expect("somebody sends");
        let generation = self.bindings.get(&(key.queue, key.binding)).copied();
        let generation = generation.expect("a verdict on a packet that was yielded");
        let Some(bound) = &mut self.queues[usize::from(key.queue)] else {
            return libc::ENODEV;
        };
        if !bound.copies {
            // Bound once more after another descriptor had unbound it, and the answer was lost: no packet comes.
            return libc::ENOENT;
        }
        assert_eq!(
            bound.generation, generation,
            "{sent:?} is for an earlier binding"
        );
        let is_meant =
            |fate: Fate| [Fate::Decided(sender, given), Fate::Refused(given)].contains(&fate);
        let named = bound.waiting.iter().find(|packet| packet.0 == key.id);
        match named {
            Some(&(_, fate)) => assert!(is_meant(fate), "{sent:?} on {fate:?}"),
            None if sent.is_said_again => {}
            None => assert!(bound.flushed.contains(&key.id), "{sent:?} twice"),
        }
        if given.0 == 2 {
            assert!(!sent.is_batch);
            if let Some(fate) = bound.fate(key.id) {
                *fate = Fate::Held;
            }
            return libc::EINVAL;
        }
        let mut hit = 0;
        if sent.is_batch {
            while let Some(&(id, fate)) = bound.waiting.front()
                && !is_after(id, key.id)
            {
                assert!(is_meant(fate), "{sent:?} on packet {id}, which is {fate:?}");
                bound.waiting.pop_front();
                hit += 1;
            }
        } else if let Some(place) = bound.waiting.iter().position(|packet| packet.0 == key.id) {
            bound.waiting.remove(place);
            hit = 1;
        }
        if hit == 0 { libc::ENOENT } else { 0 }
    }
}

fn split(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let len = ne32(bytes.get(..4)?, 0) as usize;
        let message = &bytes[..len];
        bytes = bytes.get(len.div_ceil(4) * 4..).unwrap_or(&[]);
        Some(message)
    })
}

/// A verdict as it was sent
#[derive(Debug)]
struct Sent {
    is_batch: bool,
    is_said_again: bool,
    key: PacketKey,
    given: Given,
}

impl Sent {
    fn read(message: &[u8]) -> Self {
        let is_batch = ne16(message, 4) == VERDICT_BATCH;
        let attrs = Attrs::new(&message[20..]);
        assert!(attrs.clone().all(|attr| attr.is_ok()));
        let value = |kind| attrs.clone().last(kind).map(|attr| attr.value);
        let header = value(2).expect("a verdict header");
        let [b0, b1, q0, q1] = ne32(message, 12).to_be_bytes();
        assert_eq!([q0, q1], message[18..20]);
        let key = PacketKey {
            queue: u16::from_be_bytes([q0, q1]),
            binding: u16::from_be_bytes([b0, b1]),
            id: be32(&header[4..]),
        };
        let is_said_again = ne16(message, 6) & ECHO != 0;
        assert!(is_batch || !is_said_again);
        assert!(is_said_again || ne32(message, 8) == key.id);
        Self {
            is_batch,
            is_said_again,
            key,
            given: (be32(header), value(3).map(be32), value(10).map(<[u8]>::len)),
        }
    }
}
