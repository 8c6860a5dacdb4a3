//! A model of the kernel's side of one socket, with the expected verdict of each waiting packet
//!
//! The model follows `nfnetlink_queue.c`, `nfnetlink.c` and `af_netlink.c`. The fuzzer's bytes
//! choose the events: packets arrive and get lost, queues end, the receive buffer overflows, the
//! process loses its capability. The model acknowledges only executed requests. Its other answers
//! name only requests without a waiting caller.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::{io, mem};

use nfqnl::PacketKey;
use nfqnl::consts::{
    NFQA_CFG_CMD, NFQA_CFG_FLAGS, NFQA_CFG_MASK, NFQA_CFG_PARAMS, NFQA_MARK, NFQA_PACKET_HDR,
    NFQA_PAYLOAD, NFQA_VERDICT_HDR, NFQNL_MSG_CONFIG, NFQNL_MSG_PACKET, NFQNL_MSG_VERDICT,
    NFQNL_MSG_VERDICT_BATCH, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_REQUEST, NLMSG_DONE,
    NLMSG_ERROR, NLMSG_NOOP, NLMSG_OVERRUN, NLMSGERR_ATTR_MSG, message_type,
};
use nfqnl::proto::Attrs;

pub const QUEUES: usize = 3;

/// The length of the longest message
pub const LONGEST: usize = 512;

/// The kernel's charge for a message in the receive buffer
const CHARGE: usize = 832;

/// The part of the program with the decision on a packet
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sender {
    Batch(usize),
    Callback,
    Alone,
    /// A verdict on everything up to a packet
    UpTo,
    /// Another process with the same socket
    OtherProcess,
}

/// The compared parts of a verdict: verdict, mark, length of the new payload
pub type Given = (u32, Option<u32>, Option<usize>);

/// The state of a packet waiting in the kernel
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fate {
    Undecided,
    Decided(Sender, Given),
}

/// One binding of a queue
#[derive(Default)]
pub struct Bound {
    /// The number of this binding among all bindings
    pub generation: u32,
    flags: u32,
    last_id: u32,
    /// The number of packets lost since the last one with room in the buffer
    lost: u32,
    /// The copy mode is not `NFQNL_COPY_NONE`
    copies: bool,
    /// Oldest first
    pub waiting: VecDeque<(u32, Fate)>,
    /// Packets dropped by the kernel, or answered by a verdict on other packets
    gone: BTreeSet<u32>,
}

impl Bound {
    fn fate(&mut self, id: u32) -> Option<&mut Fate> {
        let packet = self.waiting.iter_mut().find(|packet| packet.0 == id);
        packet.map(|packet| &mut packet.1)
    }
}

/// Queue, generation and id of a packet
pub type Name = (u16, u32, u32);

#[derive(Default)]
struct Datagram {
    bytes: Vec<u8>,
    packet: Option<Name>,
    /// A packet with a broken attribute
    is_broken: bool,
    /// The number of the answered request; 0 for a wake message
    answers: Option<u32>,
    /// The refusal of a verdict whose packets may still wait
    ends_merging: bool,
}

/// A packet received by the library
pub struct Handed {
    /// How often it was yielded
    pub times: u32,
    /// It was neither cut nor broken
    pub is_sound: bool,
}

#[derive(Default)]
pub struct World {
    /// The fuzzer's bytes; zeros follow
    pub bytes: std::vec::IntoIter<u8>,
    pub queues: [Option<Bound>; QUEUES],
    generations: u32,
    /// Flags not supported by the kernel
    pub unsupported: u32,
    /// Packets of unbound queues on their way to the socket
    flying: Vec<Name>,

    buffer: VecDeque<Datagram>,
    /// In datagrams
    capacity: usize,
    /// `NETLINK_NO_ENOBUFS`
    pub hides_overruns: bool,
    /// An overrun has happened, and the buffer has not been empty since
    is_congested: bool,
    /// The next receive call reports an overrun
    has_overrun: bool,
    /// An overrun was reported, and the library has not seen the buffer empty since
    is_in_overrun: bool,
    /// Overruns reported to the library
    pub overruns: u64,
    /// Ids may have wrapped, because many packets were lost
    pub has_lost_many: bool,

    /// A later fork of the process also receives, answers, and unbinds
    pub is_shared: bool,
    pub has_forked: bool,
    /// The packets received by the other process
    taken: Vec<Name>,

    pub lacks_capability: bool,
    /// Verdicts were refused for lack of the capability
    were_refused: bool,
    /// The library must not merge verdicts any more
    pub merging_ended: bool,
    /// The error of the next send of verdicts
    pub send_error: Option<i32>,
    pub send_limit: Option<usize>,
    /// The error of the next configuration request
    pub refusal: Option<i32>,
    /// How often a wait is interrupted
    pub interruptions: u8,
    /// The program may receive too, so the library does not know when the socket is empty
    pub is_read_by_program: bool,
    /// A wake message was sent, and the library must not send another one yet
    wake_is_outstanding: bool,
    last_seq: u32,

    /// The senders in unfinished calls, innermost last
    pub senders: Vec<Sender>,
    /// Packets still waiting after the refusal of their verdict
    pub again: Vec<PacketKey>,
    pub handed: BTreeMap<Name, Handed>,
    /// The number of packets yielded with an unknown generation
    pub yielded_unread: u64,
    /// The generation behind the library's number for a binding
    bindings: BTreeMap<(u16, u16), u32>,
}

pub fn fail<T>(errno: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(errno))
}

/// Returns true if the kernel numbered `a` after `b`
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

/// Returns true if a datagram is one message of the right length
pub fn is_whole(bytes: &[u8]) -> bool {
    bytes.len() >= 16 && ne32(bytes, 0) as usize == bytes.len()
}

fn is_batch(message: &[u8]) -> bool {
    ne16(message, 4) == message_type(NFQNL_MSG_VERDICT_BATCH)
}

pub fn is_verdict(message: &[u8]) -> bool {
    is_batch(message) || ne16(message, 4) == message_type(NFQNL_MSG_VERDICT)
}

fn split(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let len = ne32(bytes.get(..4)?, 0) as usize;
        let message = &bytes[..len];
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        Some(message)
    })
}

fn message(kind: u16, flags: u16, parts: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(LONGEST);
    bytes.extend([0; 16]);
    parts.iter().for_each(|part| bytes.extend_from_slice(part));
    let len = u32::try_from(bytes.len()).expect("short");
    bytes[..4].copy_from_slice(&len.to_ne_bytes());
    bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
    bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
    bytes
}

/// The header of an attribute
fn attr(kind: u16, len: usize) -> [u8; 4] {
    let len = u16::try_from(4 + len).expect("short").to_ne_bytes();
    let kind = kind.to_ne_bytes();
    [len[0], len[1], kind[0], kind[1]]
}

/// `netlink_ack`
fn reply(errno: i32, request: &[u8], has_text: bool) -> Vec<u8> {
    const TEXT: &[u8] = b"why not\0";
    let error = (-errno).to_ne_bytes();
    let parts: [&[u8]; 4] = [
        &error,
        &request[..16],
        &attr(NLMSGERR_ATTR_MSG, TEXT.len()),
        TEXT,
    ];
    match has_text {
        true => message(NLMSG_ERROR, NLM_F_CAPPED | NLM_F_ACK_TLVS, &parts),
        false => message(NLMSG_ERROR, NLM_F_CAPPED, &parts[..2]),
    }
}

impl World {
    pub fn new(bytes: std::vec::IntoIter<u8>, recv_buffer: usize) -> Self {
        let capacity = recv_buffer / CHARGE + 1;
        Self {
            bytes,
            capacity,
            ..Self::default()
        }
    }

    pub fn byte(&mut self) -> u8 {
        self.bytes.next().unwrap_or(0)
    }

    pub fn below(&mut self, n: usize) -> usize {
        usize::from(self.byte()) % n
    }

    fn some(&mut self, most: usize) -> Vec<u8> {
        let n = self.below(most + 1);
        (0..n).map(|_| self.byte()).collect()
    }

    pub fn is_readable(&self) -> bool {
        self.has_overrun || !self.buffer.is_empty()
    }

    /// Returns true if the answer to a request is in the socket
    pub fn has_answer(&self) -> bool {
        let is_answer = |datagram: &Datagram| datagram.answers.is_some_and(|seq| seq != 0);
        self.buffer.iter().any(is_answer)
    }

    /// Gives the capability back, unless the library may not know of refused verdicts
    pub fn regain_capability(&mut self) {
        self.lacks_capability &= self.were_refused && !self.merging_ended;
    }

    /// Returns true if the kernel has this binding
    pub fn is_bound(&mut self, queue: u16, generation: u32) -> bool {
        self.of(queue, generation).is_some()
    }

    fn of(&mut self, queue: u16, generation: u32) -> Option<&mut Bound> {
        let bound = self.queues[usize::from(queue)].as_mut();
        bound.filter(|bound| bound.generation == generation)
    }

    /// Returns the queue of this key, if the key's binding still exists
    fn bound(&mut self, key: PacketKey) -> Option<&mut Bound> {
        let generation = *self.bindings.get(&(key.queue(), key.binding()))?;
        self.of(key.queue(), generation)
    }

    pub fn decide(&mut self, key: PacketKey, fate: Fate) {
        if let Some(before) = self.bound(key).and_then(|bound| bound.fate(key.id())) {
            *before = fate;
        }
    }

    /// Records the library's number for the present binding; returns its generation
    pub fn note_binding(&mut self, key: PacketKey, flags: u32) -> u32 {
        let bound = self.queues[usize::from(key.queue())].as_ref();
        let bound = bound.expect("it was acknowledged");
        assert_eq!(bound.flags, flags);
        let number = (key.queue(), key.binding());
        let known = self.bindings.insert(number, bound.generation);
        assert!(known.is_none_or(|known| known == bound.generation));
        bound.generation
    }

    /// Records a yielded packet, with its generation if the library could read it
    pub fn note(&mut self, key: PacketKey, generation: Option<u32>) {
        let number = (key.queue(), key.binding());
        let known = self.bindings.get(&number).copied();
        let Some(generation) = generation.or(known) else {
            // The acknowledgement of its binding was lost.
            self.yielded_unread += 1;
            return;
        };
        let name = (key.queue(), generation, key.id());
        let is_its = known.is_none_or(|known| known == generation);
        assert!(is_its, "{name:?} under another binding");
        self.bindings.insert(number, generation);
        let handed = self.handed.get_mut(&name).expect("it was received");
        handed.times += 1;
        assert_eq!(handed.times, 1, "{name:?} again");
    }
}

/// Messages from the kernel
impl World {
    /// `netlink_unicast`; returns whether there was room
    fn deliver(&mut self, datagram: Datagram) -> bool {
        let has_room = !self.is_congested && self.buffer.len() < self.capacity;
        match has_room {
            true => self.buffer.push_back(datagram),
            false => self.overrun(),
        }
        has_room
    }

    /// `netlink_overrun`
    fn overrun(&mut self) {
        if !self.hides_overruns && !self.is_congested {
            self.is_congested = true;
            self.has_overrun = true;
        }
    }

    fn send_packet(&mut self, name: Name) -> bool {
        const MARK: &[u8] = &[8, 0, 3, 0, 0, 0, 0, 7];
        let (queue, generation, id) = name;
        let shape = self.byte();
        let payload = [0, 20, 61, 300][usize::from(shape >> 6)];
        let mut payload_attr = attr(NFQA_PAYLOAD, 8 + payload);
        let is_broken = shape % 16 == 15;
        if is_broken {
            payload_attr[..2].copy_from_slice(&3_u16.to_ne_bytes()); // less than its header
        }
        let parts: [&[u8]; 10] = [
            &[2, 0],
            &queue.to_be_bytes(),
            &attr(NFQA_PACKET_HDR, 7),
            &id.to_be_bytes(),
            &[8, 0, 1, 0],
            if shape % 4 == 1 { MARK } else { &[] },
            &payload_attr,
            &generation.to_be_bytes(),
            &id.to_be_bytes(),
            &[0x45; LONGEST][..payload],
        ];
        self.deliver(Datagram {
            bytes: message(message_type(NFQNL_MSG_PACKET), 0, &parts),
            packet: Some(name),
            is_broken,
            ..Datagram::default()
        })
    }

    /// Sends a new packet to the queue
    pub fn arrive(&mut self, queue: usize) {
        let Some(bound) = self.queues[queue].as_mut().filter(|bound| bound.copies) else {
            return;
        };
        bound.last_id = bound.last_id.wrapping_add(1);
        let (generation, id) = (bound.generation, bound.last_id);
        let queue = u16::try_from(queue).expect("few queues");
        let waits = self.send_packet((queue, generation, id));
        let bound = self.of(queue, generation).expect("it is bound");
        if waits {
            bound.waiting.push_back((id, Fate::Undecided));
        }
        bound.lost = if waits { 0 } else { bound.lost + 1 };
    }

    /// Sends new packets while the kernel does something else
    pub fn arrive_meanwhile(&mut self) {
        let byte = self.byte();
        for _ in 0..(byte >> 6).saturating_sub(1) {
            self.arrive(usize::from(byte) % QUEUES);
        }
    }

    /// Loses many packets, so that ids wrap
    pub fn lose(&mut self, queue: usize, n: u32) {
        const MARGIN: u32 = 1 << 16;
        let Some(bound) = self.queues[queue].as_mut().filter(|bound| bound.copies) else {
            return;
        };
        // Two waiting packets must not have the same id. A program without overrun reports promises
        // to answer within half of the ids.
        let received = bound.last_id.wrapping_sub(bound.lost);
        let oldest = bound.waiting.front().map_or(received, |packet| packet.0);
        let (oldest, most) = match self.hides_overruns {
            true => (0, u32::MAX / 2 - MARGIN),
            false => (oldest, u32::MAX - MARGIN),
        };
        let span = bound.last_id.wrapping_sub(oldest);
        // An empty buffer cannot overflow.
        if !self.buffer.is_empty() && span.saturating_add(n) < most {
            bound.lost += n;
            bound.last_id = bound.last_id.wrapping_add(n);
            self.has_lost_many |= n > 1 << 20;
            self.overrun();
        }
    }

    /// Drops a waiting packet
    pub fn flush(&mut self, queue: usize, place: usize) {
        if let Some(bound) = &mut self.queues[queue]
            && let Some((id, _)) = bound.waiting.remove(place)
        {
            bound.gone.insert(id);
        }
    }

    /// Delivers the last packets of unbound queues
    pub fn land(&mut self) {
        for packet in mem::take(&mut self.flying) {
            self.send_packet(packet);
        }
    }

    /// Sends neither a packet of a bound queue nor the answer to a waiting request
    pub fn send_junk(&mut self) {
        let mut datagram = Datagram::default();
        let kind = self.byte();
        datagram.bytes = match kind % 9 {
            0 => message(NLMSG_OVERRUN, 0, &[]),
            1 => message(NLMSG_NOOP, 0, &[]),
            2 => message(NLMSG_DONE, 0, &[&[0; 4]]),
            3 => message(NLMSG_ERROR, 0, &[&self.some(19)]),
            4 => self.some(15), // too short for a header
            5 => {
                let mut broken = message(u16::from(kind) | 0x0400, 0, &[&self.some(15)]);
                let len = [16_u32, 20, 15, 0, u32::MAX][self.below(5)];
                broken[..4].copy_from_slice(&len.to_ne_bytes());
                broken
            }
            6 => {
                // A packet of an unbound queue, perhaps truncated
                let body = [&[2, 0, 1, kind], &self.some(31)[..]].concat();
                message(message_type(NFQNL_MSG_PACKET), 0, &[&body])
            }
            7 => {
                let errno = [libc::ENOENT, libc::EPERM, 524][self.below(3)];
                datagram.ends_merging = errno != libc::ENOENT;
                let mut request = message(message_type(NFQNL_MSG_VERDICT), 0, &[]);
                request[8..].copy_from_slice(&[0, 0, 0, self.byte(), 0, 0, 0, 1]);
                reply(errno, &request, false)
            }
            _ => {
                // The late answer to a request; 0 is the number of wake messages
                let seq = self.last_seq.saturating_sub(self.byte().into());
                let config = message_type(NFQNL_MSG_CONFIG);
                let config = if seq == 0 { 0x77 } else { config };
                let mut request = message(config, 0, &[]);
                request[8..12].copy_from_slice(&seq.to_ne_bytes());
                reply(self.byte().into(), &request, true)
            }
        };
        self.deliver(datagram);
    }

    /// Removes the oldest datagram from the buffer
    fn take(&mut self) -> Option<Datagram> {
        let datagram = self.buffer.pop_front();
        self.is_congested &= !self.buffer.is_empty();
        datagram
    }

    /// `netlink_recvmsg`, up to once per slot
    pub fn receive(
        &mut self,
        slots: &mut dyn Iterator<Item = [&mut [u8]; 2]>,
        lens: &mut [usize],
    ) -> io::Result<usize> {
        if mem::take(&mut self.has_overrun) {
            self.is_congested &= !self.buffer.is_empty();
            self.is_in_overrun = true;
            self.wake_is_outstanding = false;
            self.overruns += 1;
            return fail(libc::ENOBUFS);
        }
        let mut n = 0;
        for (len, [head, tail]) in lens.iter_mut().zip(slots) {
            let Some(datagram) = self.take() else {
                self.is_in_overrun = false;
                self.wake_is_outstanding = false;
                break;
            };
            *len = datagram.bytes.len().min(head.len() + tail.len());
            let (first, rest) = datagram.bytes[..*len].split_at(head.len().min(*len));
            head[..first.len()].copy_from_slice(first);
            tail[..rest.len()].copy_from_slice(rest);
            if let Some(name) = datagram.packet {
                let is_sound = !datagram.is_broken && *len == datagram.bytes.len();
                let before = self.handed.insert(name, Handed { times: 0, is_sound });
                assert!(before.is_none(), "ids are given once");
            }
            // The kernel may have dropped the answer without a report.
            let may_be_lost = self.hides_overruns || self.is_in_overrun;
            self.wake_is_outstanding &= datagram.answers != Some(0) && !may_be_lost;
            self.merging_ended |= datagram.ends_merging;
            n += 1;
        }
        if n == 0 { fail(libc::EAGAIN) } else { Ok(n) }
    }

    /// Makes the other process receive, answer, or unbind
    pub fn run_other_process(&mut self) {
        if !mem::replace(&mut self.has_forked, true) {
            return;
        }
        let byte = self.byte();
        match byte % 4 {
            0 if !self.taken.is_empty() => {
                let (queue, generation, id) = self.taken.remove(0);
                if let Some(bound) = self.of(queue, generation) {
                    bound.waiting.retain(|packet| packet.0 != id);
                }
            }
            1 if byte >= 192 => drop(self.unbind(usize::from(byte) % QUEUES)),
            _ if mem::take(&mut self.has_overrun) => {}
            _ => {
                for _ in 0..=byte >> 6 {
                    let name = self.take().and_then(|datagram| datagram.packet);
                    let Some(name @ (queue, generation, id)) = name else {
                        continue;
                    };
                    let bound = self.of(queue, generation);
                    if let Some(fate) = bound.and_then(|bound| bound.fate(id)) {
                        *fate = Fate::Decided(Sender::OtherProcess, (1, None, None));
                        self.taken.push(name);
                    }
                }
            }
        }
    }
}

/// Messages to the kernel
impl World {
    /// Returns the error of a send of verdicts, if the kernel does not read the messages
    pub fn send_error(&mut self, messages: &[u8]) -> Option<i32> {
        let sender = self.senders.last();
        let is_merged = split(messages).any(is_batch) && sender != Some(&Sender::UpTo);
        assert!(!is_merged || !self.merging_ended, "merging has ended");
        let is_too_long = self.send_limit.is_some_and(|limit| messages.len() > limit);
        let too_long = is_too_long.then_some(libc::EMSGSIZE);
        let errno = self.send_error.take().or(too_long)?;
        // The library does not repeat these sends.
        let is_given_up = match errno {
            libc::EMSGSIZE => split(messages).count() == 1,
            libc::ENOBUFS => sender == Some(&Sender::Alone),
            _ => false,
        };
        if is_given_up {
            self.give_back(messages);
        }
        Some(errno)
    }

    /// `nfnetlink_rcv`
    pub fn carry_out(&mut self, bytes: &[u8]) {
        if self.lacks_capability {
            split(bytes).for_each(|message| self.give_back(message));
            self.were_refused |= is_verdict(bytes);
            return self.answer(bytes, libc::EPERM);
        }
        for message in split(bytes) {
            let flags = ne16(message, 6);
            assert_eq!(flags & !NLM_F_ACK, NLM_F_REQUEST, "other flags");
            let errno = match ne16(message, 4) {
                NLMSG_NOOP => 0,
                _ if is_verdict(message) => self.execute(message),
                _ => self.configure(message),
            };
            if errno != 0 || flags & NLM_F_ACK != 0 {
                self.answer(message, errno);
            }
        }
    }

    fn answer(&mut self, request: &[u8], errno: i32) {
        let is_asked_for = ne16(request, 6) & NLM_F_ACK != 0;
        let answers = is_asked_for.then_some(ne32(request, 8));
        self.last_seq = answers.unwrap_or(self.last_seq);
        if answers == Some(0) {
            let may_be_second = self.is_read_by_program || self.has_forked;
            let is_second = mem::replace(&mut self.wake_is_outstanding, true);
            assert!(!is_second || may_be_second, "a second wake message");
        }
        let has_text = errno != 0 && self.byte() % 2 == 1;
        self.deliver(Datagram {
            bytes: reply(errno, request, has_text),
            answers,
            ends_merging: is_verdict(request) && errno == libc::EPERM,
            ..Datagram::default()
        });
    }

    /// Returns whether the queue was bound
    fn unbind(&mut self, queue: usize) -> bool {
        let Some(bound) = self.queues[queue].take() else {
            return false;
        };
        let flying = if bound.copies { self.byte() % 4 } else { 0 };
        let queue = u16::try_from(queue).expect("few queues");
        for n in 1..=flying.saturating_sub(1) {
            let id = bound.last_id.wrapping_add(n.into());
            self.flying.push((queue, bound.generation, id));
        }
        true
    }

    /// `nfqnl_recv_config`
    fn configure(&mut self, message: &[u8]) -> i32 {
        if let Some(errno) = self.refusal.take() {
            return errno;
        }
        let queue = usize::from(u16::from_be_bytes([message[18], message[19]]));
        let attrs = Attrs::new(&message[20..]);
        let value = |kind| attrs.clone().last(kind).map(|attr| attr.value);
        let number = |kind| value(kind).map_or(0, be32);
        let (mask, flags) = (number(NFQA_CFG_MASK), number(NFQA_CFG_FLAGS));
        if flags & mask & self.unsupported != 0 {
            return libc::EOPNOTSUPP;
        }
        let Some(place) = self.queues.get_mut(queue) else {
            return libc::ENODEV;
        };
        match value(NFQA_CFG_CMD).map(|command| command[0]) {
            Some(1) if place.is_some() => return libc::EBUSY,
            Some(1) => {
                self.generations += 1;
                place.get_or_insert_default().generation = self.generations;
            }
            Some(2) => return if self.unbind(queue) { 0 } else { libc::ENODEV },
            _ => {}
        }
        let Some(bound) = place else {
            return libc::ENODEV;
        };
        if let Some(params) = value(NFQA_CFG_PARAMS) {
            bound.copies = params[4] != 0;
        }
        bound.flags = bound.flags & !mask | flags & mask;
        0
    }

    /// Marks the packets of a verdict as undecided, because the kernel did not execute the verdict
    fn give_back(&mut self, message: &[u8]) {
        if !is_verdict(message) {
            return;
        }
        let sent = Sent::read(message);
        let fate = Fate::Decided(*self.senders.last().expect("a sender"), sent.given);
        let mut again = Vec::new();
        if let Some(bound) = self.bound(sent.key) {
            for (id, found) in &mut bound.waiting {
                if *found == fate && (*id == sent.key.id() || sent.covers(*id)) {
                    *found = Fate::Undecided;
                    again.push(sent.key.with_id(*id));
                }
            }
        }
        self.again.append(&mut again);
    }

    /// `nfqnl_recv_verdict` and `nfqnl_recv_verdict_batch`; the packets must wait for this verdict
    fn execute(&mut self, message: &[u8]) -> i32 {
        let sent = Sent::read(message);
        let (queue, id) = (sent.key.queue(), sent.key.id());
        let sender = *self.senders.last().expect("a sender");
        let fate = Fate::Decided(sender, sent.given);
        let generation = self.bindings.get(&(queue, sent.key.binding()));
        let generation = *generation.expect("a verdict on a packet that was yielded");
        let Some(bound) = &mut self.queues[usize::from(queue)] else {
            return libc::ENODEV;
        };
        assert_eq!(bound.generation, generation, "{sent:?}");
        match bound.fate(id) {
            _ if sender == Sender::UpTo => {}
            Some(found) => assert_eq!(*found, fate, "{sent:?}"),
            None => assert!(bound.gone.contains(&id), "{sent:?} again"),
        }
        if sent.given.0 == 2 {
            assert!(!sent.is_batch);
            self.give_back(message);
            return libc::EINVAL;
        }
        let before = bound.waiting.len();
        if !sent.is_batch {
            bound.waiting.retain(|packet| packet.0 != id);
        }
        while let Some(&(hit, found)) = bound.waiting.front()
            && sent.covers(hit)
        {
            match sender {
                Sender::UpTo => drop(bound.gone.insert(hit)),
                _ => assert_eq!(found, fate, "{sent:?} on packet {hit}"),
            }
            bound.waiting.pop_front();
        }
        if bound.waiting.len() < before {
            0
        } else {
            libc::ENOENT
        }
    }
}

/// A sent verdict
#[derive(Debug)]
struct Sent {
    is_batch: bool,
    key: PacketKey,
    given: Given,
}

impl Sent {
    fn read(message: &[u8]) -> Self {
        let attrs = Attrs::new(&message[20..]);
        assert!(attrs.clone().all(|attr| attr.is_ok()));
        let value = |kind| attrs.clone().last(kind).map(|attr| attr.value);
        let header = value(NFQA_VERDICT_HDR).expect("a verdict header");
        let [b0, b1, q0, q1] = ne32(message, 12).to_be_bytes();
        assert_eq!([q0, q1], message[18..20]);
        let id = be32(&header[4..]);
        assert_eq!(ne32(message, 8), id);
        let key = PacketKey::new(u16::from_be_bytes([q0, q1]), id);
        let payload = value(NFQA_PAYLOAD).map(<[u8]>::len);
        Self {
            is_batch: is_batch(message),
            key: key.with_binding(u16::from_be_bytes([b0, b1])),
            given: (be32(header), value(NFQA_MARK).map(be32), payload),
        }
    }

    /// Returns true if this is a batch verdict and includes packet `id`
    fn covers(&self, id: u32) -> bool {
        self.is_batch && !is_after(id, self.key.id())
    }
}
