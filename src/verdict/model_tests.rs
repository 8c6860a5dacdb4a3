//! A model of the kernel's queues, and of the threads and processes around them
//!
//! Whatever happens around a send, each packet gets the verdict that was decided for it, in the
//! order of the decisions, and no other verdict.

use std::cell::Cell;
use std::collections::VecDeque;
use std::mem::{replace, take};
use std::sync::Arc;

use nfqnl_proto::consts::{
    NFQA_MARK, NFQA_PAYLOAD, NFQA_VERDICT_HDR, NFQNL_MSG_VERDICT, NFQNL_MSG_VERDICT_BATCH, align,
    message_type,
};
use nfqnl_proto::{Attrs, Decision, PacketKey, PlainVerdict, Verdict};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::*;
use crate::engine::{Binding, Bindings};

/// The shortest send that an engine has room for
const MAX_LEN: usize = 64 * PlainVerdict::MAX_LEN;

const ACCEPT: Decision<'_> = Decision::new(Verdict::Accept);
const DROP: Decision<'_> = Decision::new(Verdict::Drop);
const MARK: Decision<'_> = ACCEPT.with_mark(7);
/// A batch verdict cannot carry it; two fill a send
const REWRITE: Decision<'_> = ACCEPT.with_payload(&[0x45; 1401]);
/// The kernel refuses it, and the packet waits on
const STOLEN: Decision<'_> = Decision::new(Verdict::Stolen);

/// A message as the kernel reads it: its verdict, mark, and whether it has a payload
#[derive(Debug)]
struct Sent {
    is_batch: bool,
    queue: u16,
    id: u32,
    given: (u32, Option<u32>, bool),
}

fn given(decision: Decision<'_>) -> (u32, Option<u32>, bool) {
    let verdict = decision.verdict().to_raw();
    (verdict, decision.mark(), decision.payload().is_some())
}

fn read(mut bytes: &[u8]) -> Vec<Sent> {
    let be32 = |bytes: &[u8]| u32::from_be_bytes(*bytes.first_chunk().unwrap());
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let len = usize::try_from(u32::from_ne_bytes(*bytes.first_chunk().unwrap())).unwrap();
        let (message, rest) = bytes.split_at(align(len));
        let kind = u16::from_ne_bytes([message[4], message[5]]);
        let is_batch = kind == message_type(NFQNL_MSG_VERDICT_BATCH);
        assert!(is_batch || kind == message_type(NFQNL_MSG_VERDICT));
        let attr = |kind| Attrs::new(&message[20..len]).last(kind);
        let header = attr(NFQA_VERDICT_HDR).unwrap().value;
        let mark = attr(NFQA_MARK).map(|mark| be32(mark.value));
        all.push(Sent {
            is_batch,
            queue: u16::from_be_bytes([message[18], message[19]]),
            id: be32(&header[4..]),
            given: (be32(header), mark, attr(NFQA_PAYLOAD).is_some()),
        });
        bytes = rest;
    }
    all
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Packet {
    key: PacketKey,
    /// The id, which does not wrap here
    number: u64,
    /// How often another process had bound the queue before
    life: u32,
}

/// The kernel's queue
#[derive(Default)]
struct Queue {
    waiting: Vec<Packet>,
    first: Option<u64>,
    newest: u64,
    life: u32,
}

impl Queue {
    /// As `nfqnl_recv_verdict` and `nfqnl_recv_verdict_batch`
    fn answer(&mut self, id: u32, is_batch: bool) -> Vec<Packet> {
        let is_after = |packet: &Packet| packet.key.id().wrapping_sub(id).cast_signed() > 0;
        let mut waiting = self.waiting.iter();
        let hit = match is_batch {
            true => 0..waiting.take_while(|packet| !is_after(packet)).count(),
            false => match waiting.position(|packet| packet.key.id() == id) {
                Some(index) => index..index + 1,
                None => 0..0,
            },
        };
        self.waiting.drain(hit).collect()
    }
}

type Decided = (Packet, Decision<'static>);

#[derive(Default)]
struct World {
    /// Random numbers, which choose what happens
    tape: std::vec::IntoIter<u16>,
    /// Another process reads from the socket too
    is_shared: bool,
    /// Packets are lost. The engine then knows of the other process, or an overrun would explain
    /// the gap of the packets in its hands.
    has_losses: bool,
    queues: [Queue; 2],
    buffer: VecDeque<Packet>,
    /// `NETLINK_S_CONGESTED`
    is_congested: bool,
    /// `ENOBUFS` in `sk_err`
    has_error: bool,

    /// The engine's part
    bindings: Bindings,
    reports_overruns: bool,
    overruns: u32,
    is_in_overrun: bool,
    is_reading: bool,
    /// Sends that have begun
    sends: usize,

    /// All packets of the present bindings that were read
    recorded: [Vec<Packet>; 2],
    /// Packets that were read and not decided on
    held: Vec<Packet>,
    /// Batches, each with the same decisions; the last one is sent at once
    batches: [(SendBatch, Vec<Decided>); 3],
    /// All packets that have been decided on
    decided: Vec<Packet>,
    /// Messages that answered several packets
    merged: usize,
    /// Operations inside others
    depth: usize,
}

impl World {
    const MAX_DEPTH: usize = 2;

    /// Queues whose next ids come after `base`
    fn new(tape: Vec<u16>, base: u32, family: u16) -> Self {
        let mut world = Self {
            tape: tape.into_iter(),
            is_shared: family < 3,
            has_losses: family > 0,
            reports_overruns: family % 3 != 1,
            ..Self::default()
        };
        for queue in [0, 1] {
            world.bind(queue);
            let (mut seen, binding) = (world.seen(), world.bindings.get(queue).unwrap());
            seen.reports_overruns = false;
            for n in (1..=8).filter(|_| base > 0) {
                let id = u32::try_from(u64::from(base) * n / 8).unwrap();
                binding.outstanding().record(id, id, seen);
                binding.outstanding().answer(id, id);
            }
            world.queues[usize::from(queue)].newest = base.into();
        }
        world
    }

    fn pick(&mut self, n: u16) -> u16 {
        self.tape.next().unwrap_or(0) % n
    }

    fn step(&mut self) {
        let queue = self.pick(2);
        match self.pick(50) {
            0..13 => (0..=self.pick(3)).for_each(|_| self.arrive(queue)),
            13..20 => {
                let n = 1 + self.pick(5);
                self.receive(n.into());
            }
            20..33 => {
                let n = 1 + self.pick(3);
                self.decide(queue.into(), n);
            }
            33..38 => self.send(queue.into(), usize::MAX),
            38 => self.send(queue.into(), 1),
            39 => {
                self.decide(2, 1);
                self.send(2, usize::MAX);
            }
            40..42 => self.answer_up_to(),
            42 => {
                // The kernel drops a packet, or another process has answered it.
                let place = usize::from(self.pick(8));
                let waiting = &mut self.queues[usize::from(queue)].waiting;
                if place < waiting.len() {
                    waiting.remove(place);
                }
            }
            43 if self.sends == 0 && !self.is_reading => {
                self.receive_all();
                self.bind(queue);
            }
            44 if self.is_shared && self.sends == 0 && !self.is_reading => {
                // The other process binds the queue again. Until its first packet is read, the new
                // ids are like old ones.
                self.receive_all();
                let queue_of_other = &mut self.queues[usize::from(queue)];
                queue_of_other.life = 1 + take(queue_of_other).life;
                let depth = replace(&mut self.depth, Self::MAX_DEPTH);
                self.arrive(queue);
                self.receive_all();
                self.depth = depth;
            }
            45 if self.is_shared => {
                let n = u16::from(!take(&mut self.has_error)) * (1 + self.pick(3));
                self.take_messages(n.into());
            }
            46..48 => {
                let n = [1, 3, (1 << 30) + 1, (1 << 31) + 1][usize::from(self.pick(4))];
                self.lose(queue, n);
            }
            48.. => {
                // Half a billion packets are lost again and again.
                for _ in 0..self.pick(7) {
                    self.lose(queue, (1 << 29) - 2);
                    self.receive_all();
                    self.arrive(queue);
                    self.receive_all();
                }
            }
            _ => {}
        }
    }

    /// Other threads act, while one is between two steps
    fn others(&mut self) {
        self.depth += 1;
        for _ in 0..self.pick(6).saturating_sub(2) {
            if self.depth <= Self::MAX_DEPTH {
                self.step();
            }
        }
        self.depth -= 1;
    }

    fn seen(&self) -> Seen {
        Seen {
            overruns: self.overruns,
            is_drained: !self.is_in_overrun,
            reports_overruns: self.reports_overruns,
            in_order: true,
            is_shared: self.is_shared && self.has_losses,
        }
    }

    /// As `Engine::bind`
    fn bind(&mut self, queue: u16) {
        let overruns = self.overruns - u32::from(self.is_in_overrun);
        let binding = Binding::new(queue, Outstanding::new(overruns, true));
        self.bindings.replace(Arc::new(binding));
        self.queues[usize::from(queue)] = Queue::default();
        self.recorded[usize::from(queue)].clear();
        self.held.retain(|packet| packet.key.queue() != queue);
    }

    /// Gives packets their ids, unless that breaks a condition: no id is used again, and no 2^31
    /// packets pass during a send, or from a receive to its send if the reader has no reports of
    /// its own
    fn number(&mut self, queue: u16, n: u64) -> Option<Packet> {
        let binding = self.bindings.get(queue)?;
        let queue = &mut self.queues[usize::from(queue)];
        let (number, life) = (queue.newest + n, queue.life);
        let knows_losses = self.reports_overruns && !self.is_shared;
        let far = 1 << (31 + u32::from(knows_losses && self.sends == 0));
        if queue.first.is_some_and(|first| number - first >= far) {
            return None;
        }
        queue.newest = number;
        let key = binding.key(u32::try_from(number % (1 << 32)).unwrap());
        Some(Packet { key, number, life })
    }

    fn arrive(&mut self, queue: u16) {
        if self.is_congested {
            self.lose(queue, 1);
        } else if let Some(packet) = self.number(queue, 1) {
            let queue = &mut self.queues[usize::from(queue)];
            queue.first.get_or_insert(packet.number);
            queue.waiting.push(packet);
            self.buffer.push_back(packet);
        }
    }

    /// As `netlink_overrun`; an empty buffer has room for a packet
    fn lose(&mut self, queue: u16, n: u64) {
        if self.has_losses && self.buffer.is_empty() {
            self.arrive(queue);
        }
        if self.has_losses && self.number(queue, n).is_some() && self.reports_overruns {
            self.has_error |= !replace(&mut self.is_congested, true);
        }
    }

    /// As `netlink_recvmsg`
    fn take_messages(&mut self, n: usize) -> Vec<Packet> {
        let read = Vec::from_iter(self.buffer.drain(..n.min(self.buffer.len())));
        self.is_congested &= !self.buffer.is_empty();
        read
    }

    /// As `Engine::record` and `Engine::record_slots`
    fn receive(&mut self, n: usize) {
        if replace(&mut self.is_reading, true) {
            return;
        }
        if take(&mut self.has_error) {
            self.take_messages(0);
            self.others();
            self.overruns += 1;
            self.is_in_overrun = true;
        } else {
            let read = self.take_messages(n);
            self.others();
            let next = |packet: &Packet| packet.key.with_id(packet.key.id().wrapping_add(1));
            for stretch in read.chunk_by(|a, b| next(a) == b.key) {
                let (first, last) = (stretch[0].key, stretch[stretch.len() - 1].key);
                let binding = self.bindings.get(first.queue()).unwrap();
                let (first, last, seen) = (first.id(), last.id(), self.seen());
                binding.outstanding().record(first, last, seen);
                self.recorded[usize::from(stretch[0].key.queue())].extend(stretch);
            }
            self.is_in_overrun &= read.len() == n;
            self.held.extend(read);
        }
        self.is_reading = false;
    }

    fn receive_all(&mut self) {
        while !self.is_reading && (self.has_error || !self.buffer.is_empty()) {
            self.receive(usize::MAX);
        }
    }

    /// Decides on so many packets of one queue, mostly in their order, into a batch
    fn decide(&mut self, index: usize, n: u16) {
        let place = usize::from(self.pick(10).saturating_sub(7));
        let queue = self.held.get(place).map(|packet| packet.key.queue());
        let decision = match self.pick(9) {
            0..4 => ACCEPT,
            4..6 => DROP,
            n => [MARK, REWRITE, STOLEN][usize::from(n - 6)],
        };
        for _ in 0..n {
            let mut rest = self.held.iter().skip(place);
            let Some(next) = rest.position(|packet| Some(packet.key.queue()) == queue) else {
                return;
            };
            let packet = self.held.remove(place + next);
            self.batches[index].0.push(packet.key, decision).unwrap();
            self.batches[index].1.push((packet, decision));
            if decision != STOLEN {
                self.decided.push(packet);
            }
        }
    }

    /// As `Engine::set_plain` for a batch verdict, also on ids that no packet has yet
    fn answer_up_to(&mut self) {
        let Some(Packet { key, .. }) = self.held.first().copied() else {
            return;
        };
        let last = key.id().wrapping_add(self.pick(9).into());
        let binding = Arc::clone(self.bindings.get(key.queue()).unwrap());
        let newest = binding.outstanding().newest();
        self.sends += 1;
        self.others();
        let hit = self.queues[usize::from(key.queue())].answer(last, true);
        self.held.retain(|packet| !hit.contains(packet));
        self.others();
        self.sends -= 1;
        binding.outstanding().answer_up_to(last, newest);
        self.check_lists();
    }

    /// As `Engine::send_batch`; with a limit it ends after the first part, as if the second failed
    fn send(&mut self, index: usize, max_entries: usize) {
        let (mut batch, all) = take(&mut self.batches[index]);
        let (mut done, mut rest) = (0, &all[..]);
        self.sends += 1;
        while batch.has_more(done) {
            let overruns = self.overruns;
            self.others();
            let bindings = self.bindings.clone();
            let part = batch.encode_part(done, &bindings, overruns, MAX_LEN, max_entries);
            assert!(part.entries > 0 && batch.encoded().len() <= MAX_LEN);
            self.others();
            rest = self.execute(&part, &read(batch.encoded()), rest);
            self.others();
            batch.record_sent(done, part.entries, &bindings);
            done += part.entries;
            if max_entries == 1 && self.batches[index].0.is_empty() {
                break;
            }
        }
        self.sends -= 1;
        self.check_lists();
        batch.remove_first(done);
        assert_eq!(batch.len(), rest.len());
        if !rest.is_empty() {
            self.batches[index] = (batch, rest.to_vec());
        }
    }

    /// Argument 4 of `outstanding.rs`: a packet that was read and waits is in the list
    fn check_lists(&self) {
        for (queue, recorded) in (0..).zip(&self.recorded) {
            let outstanding = self.bindings.get(queue).unwrap().outstanding();
            let mut cursor = (0..=self.overruns).find_map(|n| outstanding.oldest(n));
            for packet in recorded.iter().filter(|_| outstanding.merges()) {
                let is_in = outstanding.advance(&mut cursor, packet.key.id(), 1) == 1;
                let waits = || self.queues[usize::from(queue)].waiting.contains(packet);
                assert!(is_in || !waits(), "{packet:?} waits unlisted");
            }
        }
    }

    /// Executes the messages, which must be the next decisions in their order; returns the others
    fn execute<'d>(&mut self, part: &Part, all: &[Sent], rest: &'d [Decided]) -> &'d [Decided] {
        assert!(part.messages <= 64 && usize::try_from(part.messages) == Ok(all.len()));
        let bindings = self.bindings.clone();
        let is_bound = |decided: &&Decided| bindings.current(decided.0.key.into()).is_some();
        let bound = Vec::from_iter(rest.iter().filter(is_bound));
        let mut done = 0;
        for message in all {
            let is_last = |decided: &&Decided| decided.0.key.id() == message.id;
            let last = bound[done..].iter().position(is_last).unwrap();
            let its = &bound[done..=done + last];
            for (packet, decision) in its {
                assert_eq!(
                    (packet.key.queue(), given(*decision)),
                    (message.queue, message.given)
                );
            }
            assert_eq!(message.is_batch, last > 0);
            self.answer(message, its);
            done += last + 1;
        }
        assert_eq!(
            part.first,
            bound[..done].first().map(|decided| decided.0.key)
        );
        let (done, rest) = rest.split_at(done + part.unbound.len());
        let unbound = done.iter().filter(|decided| !is_bound(decided));
        assert!(unbound.map(|(packet, _)| &packet.key).eq(&part.unbound));
        rest
    }

    fn answer(&mut self, message: &Sent, all: &[&Decided]) {
        let queue = &mut self.queues[usize::from(message.queue)];
        if message.given == given(STOLEN) {
            // Refused, so something else is decided.
            let waiting = all
                .iter()
                .filter(|(packet, _)| queue.waiting.contains(packet));
            return self.held.extend(waiting.map(|(packet, _)| packet));
        }
        let hit = queue.answer(message.id, message.is_batch);
        self.merged += usize::from(hit.len() > 1);
        for packet in hit {
            // In a binding of another process only the id names a packet.
            let is_it = |(decided, _): &&Decided| {
                *decided == packet || packet.life > 0 && decided.key == packet.key
            };
            assert!(all.iter().any(is_it), "{message:?} on {packet:?}: {all:?}");
        }
    }
}

#[test]
fn each_packet_gets_its_own_verdict() {
    let mut config = ProptestConfig::default(); // PROPTEST_CASES changes the number
    config.cases *= 16;
    config.failure_persistence = None;
    let cases = usize::try_from(config.cases).unwrap();
    let merged = Cell::new(0);
    let base = prop_oneof![Just(0), Just(u32::MAX - 12), Just(u32::MAX / 2 - 12)];
    let tape = proptest::collection::vec(any::<u16>(), 0..1000);
    let tried = TestRunner::new(config).run(&(tape, base, 0..6_u16), |(tape, base, family)| {
        let mut world = World::new(tape, base, family);
        while world.tape.len() > 0 {
            world.step();
        }
        (0..2).for_each(|index| world.send(index, usize::MAX));
        for packet in world.queues.iter().flat_map(|queue| &queue.waiting) {
            prop_assert!(!world.decided.contains(packet), "not answered: {packet:?}");
        }
        merged.set(merged.get() + world.merged);
        Ok(())
    });
    tried.unwrap_or_else(|error| panic!("{error}"));
    // Or the test would show nothing
    assert!(merged.get() > cases / 4, "{} merged", merged.get());
}

/// Bindings with these queues, in each of which the packets 1 to `waiting` wait
fn bindings(queues: &[u16], waiting: u32) -> Bindings {
    let mut bindings = Bindings::default();
    for &queue in queues {
        let binding = Binding::new(queue, Outstanding::new(0, true));
        let seen = World::new(Vec::new(), 0, 0).seen();
        binding.outstanding().record(1, waiting, seen);
        bindings.replace(Arc::new(binding));
    }
    bindings
}

/// The messages of each send of a batch: queue, id, `is_batch`
fn sends(
    bindings: &Bindings,
    decisions: impl IntoIterator<Item = (u16, u32, Decision<'static>)>,
) -> Vec<Vec<(u16, u32, bool)>> {
    let mut batch = SendBatch::new();
    for (queue, id, decision) in decisions {
        let key = bindings.get(queue).unwrap().key(id);
        batch.push(key, decision).unwrap();
    }
    let (mut all, mut done) = (Vec::new(), 0);
    while batch.has_more(done) {
        let part = batch.encode_part(done, bindings, 0, 1 << 15, usize::MAX);
        assert!(part.messages <= 64 && batch.encoded().len() <= 1 << 15);
        let messages = read(batch.encoded()).into_iter();
        all.push(messages.map(|m| (m.queue, m.id, m.is_batch)).collect());
        batch.record_sent(done, part.entries, bindings);
        done += part.entries;
    }
    all
}

#[test]
fn messages_are_as_few_as_they_may_be() {
    let messages = |ids: &[u32], third: Decision<'static>| {
        let decisions = ids
            .iter()
            .map(|&id| (0, id, if id == 3 { third } else { ACCEPT }));
        let sent = sends(&bindings(&[0], 9), decisions).concat();
        Vec::from_iter(sent.into_iter().map(|(_, id, is_batch)| (id, is_batch)))
    };
    let (one, many) = (|id| (id, false), |id| (id, true));
    assert_eq!(messages(&[1, 2, 3], ACCEPT), [many(3)]);
    assert_eq!(messages(&[1], ACCEPT), [one(1)]);
    assert_eq!(messages(&[2, 3], ACCEPT), [one(2), one(3)]);
    assert_eq!(messages(&[1, 2, 4, 5], ACCEPT), [many(2), one(4), one(5)]);
    assert_eq!(messages(&[1, 2, 2], ACCEPT), [many(2), one(2)]);
    let unread = [many(9), one(10), one(11)];
    assert_eq!(messages(&Vec::from_iter(1..12), ACCEPT), unread);
    for third in [DROP, MARK, REWRITE, ACCEPT.with_priority(1)] {
        let different = [many(2), one(3), many(5)];
        assert_eq!(messages(&[1, 2, 3, 4, 5], third), different);
    }
    let waits_on = [many(2), one(3), one(4), one(5)];
    assert_eq!(messages(&[1, 2, 3, 4, 5], STOLEN), waits_on);
}

#[test]
fn queues_that_take_turns_keep_the_order() {
    let order = [(5, 1), (5, 2), (3, 1), (3, 2), (3, 3), (5, 3), (3, 4)];
    let decisions = order.map(|(queue, id)| (queue, id, ACCEPT));
    let sent = sends(&bindings(&[5, 3], 9), decisions);
    let expected = [(5, 2, true), (3, 3, true), (5, 3, false), (3, 4, false)];
    assert_eq!(sent, [expected]);
}

#[test]
fn a_send_has_at_most_64_messages() {
    let pairs = |id| if id / 2 % 2 == 0 { ACCEPT } else { DROP };
    let merged = (1..=1000).map(|id| (0, id, pairs(id)));
    let singles = (2..=1000).map(|id| (0, id, ACCEPT));
    let long = (1..=100).map(|id| (0, id, REWRITE));
    let [merged, singles, long] = [Vec::from_iter(merged), singles.collect(), long.collect()]
        .map(|decisions| sends(&bindings(&[0], 1000), decisions));
    let ids = |sends: &[Vec<_>]| Vec::from_iter(sends.iter().flatten().map(|&(_, id, _)| id));
    assert_eq!(merged.iter().map(Vec::len).max(), Some(64));
    assert_eq!(merged.len(), 8);
    assert_eq!(
        ids(&merged),
        Vec::from_iter((1..1000).step_by(2).chain([1000]))
    );
    assert_eq!(singles.len(), 999_usize.div_ceil(64));
    assert_eq!(ids(&singles), Vec::from_iter(2..=1000));
    assert_eq!(long.len(), 5);
    assert_eq!(ids(&long), Vec::from_iter(1..=100));
}

#[test]
fn a_payload_too_long_changes_nothing() {
    let (mut batch, long) = (SendBatch::new(), vec![0x45; 1 << 17]);
    let result = batch.push(PacketKey::new(0, 1), ACCEPT.with_payload(&long));
    assert!(matches!(result, Err(crate::Error::Encode { .. })));
    assert!(batch.is_empty() && !batch.has_more(0));
}
