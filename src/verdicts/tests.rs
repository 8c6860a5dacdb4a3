//! Runs against a model of the kernel's queues: whatever happens around a send, no packet gets a verdict that was not
//! meant for it, and every packet gets the one that was

use std::collections::BTreeMap;

use nfqnl_proto::Vlan;
use nfqnl_proto::consts::{
    NFQA_MARK, NFQA_VERDICT_HDR, NFQNL_MSG_VERDICT, NFQNL_MSG_VERDICT_BATCH, message_type,
};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::bindings::{Binding, Noted};

const QUEUES: u16 = 2;
const BATCHES: usize = 3;

/// What the model tells verdicts apart by
type Given = (u32, Option<u32>);

/// A message as the kernel reads it
#[derive(Debug, PartialEq)]
struct Sent {
    is_batch: bool,
    queue: u16,
    id: u32,
    given: Given,
}

fn out_of_memory() -> Error {
    Error::Io {
        op: crate::Operation::Receive,
        source: std::io::ErrorKind::OutOfMemory.into(),
    }
}

/// Splits what was sent into messages
fn read(mut bytes: &[u8]) -> Vec<Sent> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let len = usize::try_from(u32::from_ne_bytes(*bytes.first_chunk().unwrap())).unwrap();
        let (message, rest) = bytes.split_at(align(len).min(bytes.len()));
        let kind = u16::from_ne_bytes([message[4], message[5]]);
        let attrs = nfqnl_proto::Attrs::new(&message[20..len]);
        let hdr = attrs.clone().last(NFQA_VERDICT_HDR).unwrap().value;
        let be32 = |bytes: &[u8]| u32::from_be_bytes(*bytes.first_chunk().unwrap());
        assert!(
            [NFQNL_MSG_VERDICT, NFQNL_MSG_VERDICT_BATCH]
                .map(message_type)
                .contains(&kind)
        );
        all.push(Sent {
            is_batch: kind == message_type(NFQNL_MSG_VERDICT_BATCH),
            queue: u16::from_be_bytes([message[18], message[19]]),
            id: be32(&hdr[4..]),
            given: (
                be32(hdr),
                attrs.last(NFQA_MARK).map(|attr| be32(attr.value)),
            ),
        });
        bytes = rest;
    }
    all
}

/// What can be decided; the last two are no beginning of a run
#[derive(Clone, Copy, Debug)]
enum Choice {
    Accept,
    Drop,
    Mark,
    Rewrite,
    Stolen,
}

impl Choice {
    fn decision(self) -> Decision<'static> {
        match self {
            Self::Accept => Verdict::Accept.into(),
            Self::Drop => Verdict::Drop.into(),
            Self::Mark => Verdict::Accept.with_mark(7),
            Self::Rewrite => Verdict::Accept.with_payload(&[0x45; 21 * 4 + 1]),
            Self::Stolen => Verdict::Stolen.into(),
        }
    }

    fn given(self) -> Given {
        let decision = self.decision();
        let mark = matches!(self, Self::Mark).then_some(7);
        (decision.verdict().to_raw(), mark)
    }
}

/// What happens to a packet on its way from the kernel
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Received,
    /// The receive buffer was full
    Lost,
    /// Somebody else has it, and may answer it
    ReadElsewhere,
}

#[derive(Clone, Debug)]
enum Op {
    Arrive(u16, Way),
    /// Decides on one of the packets that are held, into a batch
    Push(usize, usize, Choice),
    /// The same, sent at once
    Verdict(usize, Choice),
    /// Sends a batch; other threads do something between the encoding and the kernel's work, and between that and its
    /// being noted
    Send(usize, Vec<Self>, Vec<Self>),
    /// A send that fails
    Fail(usize),
    /// The kernel drops a waiting packet
    Flush(u16, usize),
    Rebind(u16),
}

fn choice() -> impl Strategy<Value = Choice> {
    prop_oneof![
        8 => Just(Choice::Accept),
        2 => Just(Choice::Drop),
        1 => Just(Choice::Mark),
        1 => Just(Choice::Rewrite),
        1 => Just(Choice::Stolen),
    ]
}

/// Held packets are mostly decided on in their order
fn place() -> impl Strategy<Value = usize> {
    prop_oneof![5 => Just(0_usize), 1 => 0..8_usize]
}

fn op() -> impl Strategy<Value = Op> {
    let simple = prop_oneof![
        12 => (0..QUEUES).prop_map(|queue| Op::Arrive(queue, Way::Received)),
        1 => (0..QUEUES).prop_map(|queue| Op::Arrive(queue, Way::Lost)),
        10 => (0..BATCHES, place(), choice()).prop_map(|(b, p, c)| Op::Push(b, p, c)),
        2 => (place(), choice()).prop_map(|(p, c)| Op::Verdict(p, c)),
        1 => (0..QUEUES, 0..8_usize).prop_map(|(queue, place)| Op::Flush(queue, place)),
    ];
    let nested = prop_oneof![
        8 => simple,
        1 => (0..BATCHES).prop_map(|batch| Op::Send(batch, Vec::new(), Vec::new())),
    ];
    let around = || vec(nested.clone(), 0..4);
    prop_oneof![
        20 => nested.clone(),
        4 => (0..BATCHES, around(), around()).prop_map(|(b, before, after)| Op::Send(b, before, after)),
        1 => (0..BATCHES).prop_map(Op::Fail),
    ]
    .boxed()
}

/// Adds what is rare, and changes everything behind it
fn ops() -> impl Strategy<Value = Vec<Op>> {
    let rare = prop_oneof![
        (0..QUEUES).prop_map(|queue| Op::Arrive(queue, Way::ReadElsewhere)),
        (0..QUEUES).prop_map(Op::Rebind),
    ];
    vec(prop_oneof![60 => op(), 1 => rare], 0..300)
}

/// What a packet in the kernel waits for
#[derive(Clone, Debug, PartialEq)]
enum Fate {
    /// Nothing is decided
    Held,
    /// A verdict in this batch, or in no batch: one that is about to be sent
    Decided(Option<usize>, Given),
}

#[derive(Default)]
struct World {
    bindings: Bindings,
    /// The kernel's queues: the packets that wait, and the newest id
    queues: [(BTreeMap<u32, Fate>, u32); QUEUES as usize],
    /// Ids that were lost, of the present bindings
    lost: Vec<(u16, u32)>,
    /// Packets that nobody has decided on
    held: Vec<PacketKey>,
    batches: [VerdictBatch; BATCHES],
}

impl World {
    fn new() -> Self {
        let mut world = Self::default();
        for queue in 0..QUEUES {
            world.bindings.insert(Binding::new(queue, false));
        }
        world
    }

    fn run(&mut self, ops: &[Op]) {
        for op in ops {
            self.step(op);
        }
    }

    fn step(&mut self, op: &Op) {
        match *op {
            Op::Arrive(queue, way) => self.arrive(queue, way),
            Op::Push(batch, place, choice) => {
                if let Some(key) = self.take_held(place) {
                    self.decide(key, Fate::Decided(Some(batch), choice.given()));
                    self.batches[batch].push(key, choice.decision()).unwrap();
                }
            }
            Op::Verdict(place, choice) => {
                if let Some(key) = self.take_held(place) {
                    self.decide(key, Fate::Decided(None, choice.given()));
                    self.verdict(key, choice);
                }
            }
            Op::Send(batch, ref before, ref after) => self.send(batch, before, after),
            Op::Fail(index) => {
                let mut batch = std::mem::take(&mut self.batches[index]);
                let bindings = self.bindings.clone();
                let result = batch.send(
                    200,
                    true,
                    || Box::new(bindings.clone()),
                    |_, _| Err(out_of_memory()),
                );
                if !matches!(result, Err(Error::Io { .. })) {
                    assert!(batch.is_empty(), "nothing had to be sent");
                }
                self.batches[index] = batch;
            }
            Op::Flush(queue, place) => {
                let waiting = &mut self.queues[usize::from(queue)].0;
                let id = waiting.keys().nth(place).copied();
                id.map(|id| waiting.remove(&id));
            }
            Op::Rebind(queue) => {
                self.queues[usize::from(queue)] = Default::default();
                self.lost.retain(|&(other, _)| other != queue);
                self.held.retain(|key| key.queue != queue);
                let old = self.bindings.get(queue).unwrap().id;
                self.bindings.remove(old);
                self.bindings.insert(Binding::new(queue, false));
            }
        }
    }

    fn arrive(&mut self, queue: u16, way: Way) {
        let (waiting, newest) = &mut self.queues[usize::from(queue)];
        *newest += 1;
        let id = *newest;
        if way == Way::Lost {
            self.lost.push((queue, id));
            return;
        }
        waiting.insert(id, Fate::Held);
        if way == Way::ReadElsewhere {
            return;
        }
        // As `Shared::note_packet` does
        let binding = self.bindings.get(queue).unwrap();
        if let Noted::After { gap } = binding.note(id, id)
            && !(id - gap..id).all(|missing| self.lost.contains(&(queue, missing)))
        {
            binding.waiting().go_blind();
        }
        binding.waiting().receive(id, id);
        self.held.push(binding.key(id));
    }

    fn take_held(&mut self, place: usize) -> Option<PacketKey> {
        (place < self.held.len()).then(|| self.held.remove(place))
    }

    fn decide(&mut self, key: PacketKey, fate: Fate) {
        if let Some(packet) = self.queues[usize::from(key.queue)].0.get_mut(&key.id) {
            *packet = fate;
        }
    }

    /// As `Shared::common_verdict` does
    fn verdict(&mut self, key: PacketKey, choice: Choice) {
        let mut batch = VerdictBatch::new();
        batch.push(key, choice.decision()).unwrap();
        let bindings = self.bindings.clone();
        batch
            .send(
                usize::MAX,
                false,
                || Box::new(bindings.clone()),
                |_, bytes| {
                    self.execute(None, bytes);
                    Ok(())
                },
            )
            .unwrap();
        if !matches!(choice, Choice::Stolen) {
            self.bindings
                .get(key.queue)
                .unwrap()
                .waiting()
                .answer(key.id, key.id);
        }
    }

    fn send(&mut self, index: usize, before: &[Op], after: &[Op]) {
        // What others push meanwhile is for the next time.
        let mut batch = std::mem::take(&mut self.batches[index]);
        let bindings = self.bindings.clone();
        // Small parts, so that there are several
        let _stale = batch.send(
            200,
            true,
            || Box::new(bindings.clone()),
            |_, bytes| {
                self.run(before);
                self.execute(Some(index), bytes);
                self.run(after);
                Ok(())
            },
        );
        assert!(batch.is_empty());
    }

    /// What the kernel does with a send (`nfqnl_recv_verdict`, `nfqnl_recv_verdict_batch`)
    fn execute(&mut self, batch: Option<usize>, bytes: &[u8]) {
        for message in read(bytes) {
            let (waiting, _) = &mut self.queues[usize::from(message.queue)];
            if message.given.0 == Verdict::Stolen.to_raw() {
                assert!(!message.is_batch);
                // Refused: nothing is decided any more, and nobody tries again.
                waiting
                    .entry(message.id)
                    .and_modify(|fate| *fate = Fate::Held);
                continue;
            }
            let first = if message.is_batch { 0 } else { message.id };
            let hit: Vec<u32> = waiting
                .range(first..=message.id)
                .map(|(&id, _)| id)
                .collect();
            for id in hit {
                let fate = waiting.remove(&id).unwrap();
                assert_eq!(
                    fate,
                    Fate::Decided(batch, message.given),
                    "{message:?} on packet {id}"
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
    #[test]
    fn every_packet_gets_its_own_verdict(ops in ops()) {
        let mut world = World::new();
        world.run(&ops);
        for batch in 0..BATCHES {
            world.send(batch, &[], &[]);
        }
        for (waiting, _) in &world.queues {
            for (id, fate) in waiting {
                prop_assert_eq!(fate, &Fate::Held, "packet {} was not answered", id);
            }
        }
    }
}

/// The messages that these decisions become when packets 1.. of one queue wait
fn messages(waiting: u32, decisions: &[(u32, Decision<'_>)]) -> Vec<(bool, u32)> {
    let mut bindings = Bindings::default();
    bindings.insert(Binding::new(0, false));
    let binding = bindings.get(0).unwrap();
    for id in 1..=waiting {
        binding.waiting().receive(id, id);
    }
    let mut batch = VerdictBatch::new();
    for &(id, decision) in decisions {
        batch.push(binding.key(id), decision).unwrap();
    }
    let mut all = Vec::new();
    batch
        .send(
            usize::MAX,
            true,
            || &bindings,
            |_, bytes| {
                all.extend(read(bytes).into_iter().map(|m| (m.is_batch, m.id)));
                Ok(())
            },
        )
        .unwrap();
    all
}

#[test]
fn runs_are_as_long_as_they_may_be() {
    let accept = Decision::new(Verdict::Accept);
    let drop = Decision::new(Verdict::Drop);
    let (single, run) = (|id| (false, id), |id| (true, id));
    let all = |ids: &[u32]| Vec::from_iter(ids.iter().map(|&id| (id, accept)));

    assert_eq!(messages(9, &all(&[1, 2, 3])), [run(3)]);
    assert_eq!(
        messages(9, &all(&[1])),
        [single(1)],
        "a refusal of one names it"
    );
    assert_eq!(
        messages(9, &all(&[2, 3])),
        [single(2), single(3)],
        "1 is held"
    );
    assert_eq!(
        messages(9, &all(&[1, 2, 4, 5])),
        [run(2), single(4), single(5)],
        "3 is held"
    );
    assert_eq!(
        messages(2, &all(&[1, 2, 3])),
        [run(2), single(3)],
        "3 was never received"
    );
    assert_eq!(messages(9, &all(&[1, 2, 2])), [run(2), single(2)]);

    let mut mixed = all(&[1, 2, 3, 4, 5]);
    mixed[2].1 = drop;
    assert_eq!(messages(9, &mixed), [run(2), single(3), run(5)]);
    mixed[2].1 = Verdict::Accept.with_payload(&[0x45; 20]);
    assert_eq!(messages(9, &mixed), [run(2), single(3), run(5)]);
    mixed[2].1 = accept.with_priority(1);
    assert_eq!(messages(9, &mixed), [run(2), single(3), run(5)]);
    mixed[2].1 = accept.with_vlan(Vlan {
        proto: 0x8100,
        tci: 1,
    });
    assert_eq!(messages(9, &mixed), [run(2), single(3), run(5)]);
    mixed[2].1 = Verdict::Stolen.into();
    assert_eq!(
        messages(9, &mixed),
        [run(2), single(3), single(4), single(5)],
        "the kernel refuses, and 3 waits on"
    );
}

#[test]
fn queues_that_take_turns_have_a_run_each() {
    let mut bindings = Bindings::default();
    let mut batch = VerdictBatch::new();
    for queue in [5, 3] {
        bindings.insert(Binding::new(queue, false));
    }
    for id in 1..=10 {
        for queue in [5, 3] {
            let binding = bindings.get(queue).unwrap();
            binding.waiting().receive(id, id);
            batch.push(binding.key(id), Verdict::Accept).unwrap();
        }
    }
    let mut all = Vec::new();
    batch
        .send(
            usize::MAX,
            true,
            || &bindings,
            |_, bytes| {
                all.extend(read(bytes).into_iter().map(|m| (m.queue, m.is_batch, m.id)));
                Ok(())
            },
        )
        .unwrap();
    assert_eq!(all, [(3, true, 10), (5, true, 10)]);
}

#[test]
fn what_belongs_to_an_ended_binding_is_reported_and_the_rest_sent() {
    let mut bindings = Bindings::default();
    bindings.insert(Binding::new(0, false));
    let old = bindings.get(0).unwrap().key(1);
    bindings.remove(BindingId::from(old));
    bindings.insert(Binding::new(0, false));
    let new = bindings.get(0).unwrap().key(1);
    let mut batch = VerdictBatch::new();
    for key in [new, old] {
        batch.push(key, Verdict::Drop).unwrap();
    }
    let mut sent = Vec::new();
    let error = batch.send(
        usize::MAX,
        true,
        || &bindings,
        |_, bytes| {
            sent.extend(read(bytes));
            Ok(())
        },
    );
    assert!(matches!(error, Err(Error::Stale { key }) if key == old));
    assert_eq!(sent.len(), 1);
    assert!(batch.is_empty());
}

#[test]
fn a_send_is_split_and_what_fails_stays() {
    let mut bindings = Bindings::default();
    bindings.insert(Binding::new(0, false));
    let binding = bindings.get(0).unwrap();
    let mut batch = VerdictBatch::new();
    for id in 0..100 {
        batch
            .push(binding.key(id), Verdict::Accept.with_payload(&[0x45; 100]))
            .unwrap();
    }
    let mut sent = Vec::new();
    let mut sends = 0;
    let mut send = |batch: &mut VerdictBatch, fail_at: usize| {
        batch.send(
            1000,
            true,
            || &bindings,
            |_, bytes| {
                assert!(bytes.len() <= 1000);
                if sends == fail_at {
                    sends += 1;
                    return Err(out_of_memory());
                }
                sends += 1;
                sent.extend(read(bytes).into_iter().map(|message| message.id));
                Ok(())
            },
        )
    };
    assert!(send(&mut batch, 3).is_err());
    assert!(send(&mut batch, 5).is_err());
    send(&mut batch, usize::MAX).unwrap();
    assert_eq!(sent, Vec::from_iter(0..100));
}

#[test]
fn what_can_not_be_sent_takes_no_memory() {
    let mut batch = VerdictBatch::new();
    let long = vec![0x45; 1 << 24];
    let key = Binding::new(0, false).key(1);
    assert!(
        batch
            .push(key, Verdict::Accept.with_payload(&long))
            .is_err()
    );
    assert!(batch.is_empty() && batch.raw.capacity() < 1 << 10);
}
