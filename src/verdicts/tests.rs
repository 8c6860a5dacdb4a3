//! Runs against a model of the kernel's queues: whatever happens around a send, no packet gets a verdict that was not
//! meant for it, and every packet gets the one that was

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering;

use nfqnl_proto::Vlan;
use nfqnl_proto::consts::{
    NFQA_MARK, NFQA_PAYLOAD, NFQA_VERDICT_HDR, NFQNL_MSG_VERDICT, NFQNL_MSG_VERDICT_BATCH,
    NLM_F_ECHO, message_type,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use super::*;
use crate::bindings::{Binding, Stretch};
use crate::socket::Losses;

const QUEUES: u16 = 2;
const BATCHES: usize = 2;

/// What the model tells verdicts apart by: verdict, mark, and whether there is a new payload
type Given = (u32, Option<u32>, bool);

/// A message as the kernel reads it
#[derive(Debug, PartialEq)]
struct Sent {
    is_batch: bool,
    is_said_again: bool,
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
            is_said_again: u16::from_ne_bytes([message[6], message[7]]) & NLM_F_ECHO != 0,
            queue: u16::from_be_bytes([message[18], message[19]]),
            id: be32(&hdr[4..]),
            given: (
                be32(hdr),
                attrs.clone().last(NFQA_MARK).map(|attr| be32(attr.value)),
                attrs.last(NFQA_PAYLOAD).is_some(),
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
        let verdict = decision.verdict().to_raw();
        (verdict, mark, decision.payload().is_some())
    }
}

/// What happens to a packet on its way from the kernel
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// Into the receive buffer
    Sent,
    /// The receive buffer was full
    Lost,
    /// Somebody else reads it from there, and may answer it
    ReadElsewhere,
}

/// Whether the sending thread has `CAP_NET_ADMIN` a moment before its send, during it, and after
#[derive(Clone, Copy, Debug)]
struct Capable {
    before: bool,
    during: bool,
    after: bool,
}

const ALWAYS: Capable = Capable {
    before: true,
    during: true,
    after: true,
};

#[derive(Clone, Debug)]
enum Op {
    Arrive(u16, Way),
    /// Very many packets are lost, so that numbers come to wrap
    Lose(u16, u32),
    /// The library receives so many messages
    Receive(usize),
    /// Decides on one of the packets that are held, into a batch
    Push(usize, usize, Choice),
    /// The same, sent at once; other threads do something before the kernel's work, and between that and its being noted
    Verdict(usize, Choice, Capable, Vec<Self>, Vec<Self>),
    /// Sends a batch, likewise
    Send(usize, Capable, Vec<Self>, Vec<Self>),
    /// A send that fails
    Fail(usize),
    /// The kernel drops a waiting packet
    Flush(u16, usize),
    /// The receive buffer is full, and the answers in it, which are the last, are lost
    LoseAnswers,
    Rebind(u16),
}

fn choice() -> impl Strategy<Value = Choice> {
    prop_oneof![
        8 => Just(Choice::Accept),
        3 => Just(Choice::Drop),
        1 => Just(Choice::Mark),
        1 => Just(Choice::Rewrite),
        1 => Just(Choice::Stolen),
    ]
}

/// Held packets are mostly decided on in their order
fn place() -> impl Strategy<Value = usize> {
    prop_oneof![5 => Just(0_usize), 1 => 0..8_usize]
}

/// Privileges come and go, but not there and back within a moment
fn capable(mostly: u32) -> impl Strategy<Value = Capable> {
    let of = |before, during, after| {
        Just(Capable {
            before,
            during,
            after,
        })
    };
    prop_oneof![
        mostly => Just(ALWAYS),
        2 => of(false, false, false),
        1 => of(true, false, false),
        1 => of(true, true, false),
        1 => of(false, false, true),
        1 => of(false, true, true),
    ]
}

fn op(mostly_capable: u32) -> impl Strategy<Value = Op> {
    let capable = || capable(mostly_capable);
    let simple = prop_oneof![
        12 => (0..QUEUES).prop_map(|queue| Op::Arrive(queue, Way::Sent)),
        6 => (1..9_usize).prop_map(Op::Receive),
        16 => (0..BATCHES, place(), choice()).prop_map(|(b, p, c)| Op::Push(b, p, c)),
        1 => (0..QUEUES, 0..8_usize).prop_map(|(queue, place)| Op::Flush(queue, place)),
    ];
    let nested = prop_oneof![
        40 => simple,
        1 => (place(), choice(), capable())
            .prop_map(|(p, d, c)| Op::Verdict(p, d, c, Vec::new(), Vec::new())),
        5 => (0..BATCHES, capable()).prop_map(|(b, c)| Op::Send(b, c, Vec::new(), Vec::new())),
    ];
    let around = || vec(nested.clone(), 0..4);
    prop_oneof![
        40 => nested.clone(),
        1 => (place(), choice(), capable(), around(), around())
            .prop_map(|(p, d, c, before, after)| Op::Verdict(p, d, c, before, after)),
        4 => (0..BATCHES, capable(), around(), around())
            .prop_map(|(b, c, before, after)| Op::Send(b, c, before, after)),
        1 => (0..BATCHES).prop_map(Op::Fail),
    ]
    .boxed()
}

/// Adds what is rare, and changes everything behind it
///
/// Where somebody else reads packets, none are lost: the kernel's count of losses does not tell one from the other, which
/// is why nobody may ([`HandleBuilder::coalesce`](crate::HandleBuilder::coalesce)).
fn ops() -> impl Strategy<Value = Vec<Op>> {
    let rebind = || (0..QUEUES).prop_map(Op::Rebind);
    let with_losses = || {
        prop_oneof![
            3 => (0..QUEUES).prop_map(|queue| Op::Arrive(queue, Way::Lost)),
            1 => (0..QUEUES, any::<u8>()).prop_map(|(queue, bits)| Op::Lose(queue, (1 << (28 + bits % 4)) + 1)),
            1 => Just(Op::LoseAnswers),
            1 => rebind(),
        ]
    };
    let with_others = prop_oneof![
        1 => (0..QUEUES).prop_map(|queue| Op::Arrive(queue, Way::ReadElsewhere)),
        1 => rebind(),
    ];
    prop_oneof![
        3 => vec(prop_oneof![20 => op(400), 1 => with_losses()], 0..200),
        2 => vec(prop_oneof![20 => op(15), 1 => with_losses()], 0..200),
        1 => vec(prop_oneof![60 => op(400), 1 => with_others], 0..200),
    ]
}

/// From where ids don't wrap, do, or pass the middle
fn base() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), Just(u32::MAX - 12), Just(u32::MAX / 2 - 12)]
}

/// What a packet in the kernel waits for
#[derive(Clone, Debug, PartialEq)]
enum Fate {
    /// Nothing is decided
    Held,
    /// This verdict, which is in this batch, or in none: about to be sent
    Decided(Option<usize>, Given),
    /// It was given this verdict, and the kernel refused it
    Refused(Given),
}

/// Whether the kernel has numbered `a` after `b`, as it sees that itself (`nfq_id_after`)
fn is_after(a: u32, b: u32) -> bool {
    a.wrapping_sub(b).cast_signed() > 0
}

/// A message in the receive buffer
#[derive(Debug)]
enum Message {
    Packet(PacketKey),
    /// The refusal of a whole send, for want of `CAP_NET_ADMIN`
    NotPermitted,
}

#[derive(Default)]
struct World {
    /// The id before the first of a binding: the kernel begins with 0
    base: u32,
    bindings: Bindings,
    /// The kernel's queues: the packets that wait, and the newest, by how far their ids are from `base`
    queues: [(BTreeMap<u32, Fate>, u32); QUEUES as usize],
    receive_buffer: VecDeque<Message>,
    /// The kernel's count of messages that found no room there
    dropped: u32,
    losses: Losses,
    /// How many since that was looked at
    dropped_since: u64,
    /// Packets that nobody has decided on
    held: Vec<PacketKey>,
    batches: [VerdictBatch; BATCHES],
    sends_on_their_way: usize,
    /// How many messages answered several packets
    runs: usize,
    /// How many answered none, being said again
    said_again: usize,
}

impl World {
    fn new(base: u32) -> Self {
        let mut world = Self {
            base,
            ..Self::default()
        };
        for queue in 0..QUEUES {
            world.bind(queue);
        }
        world
    }

    fn bind(&mut self, queue: u16) {
        let binding = Binding::new(queue, false);
        binding.last_id.store(self.base, Ordering::Relaxed);
        self.bindings.insert(binding);
    }

    fn key(&self, queue: u16, place: u32) -> PacketKey {
        let binding = self.bindings.get(queue).unwrap();
        binding.key(self.base.wrapping_add(place))
    }

    fn place(&self, id: u32) -> u32 {
        id.wrapping_sub(self.base)
    }

    fn run(&mut self, ops: &[Op]) {
        for op in ops {
            self.step(op);
        }
    }

    fn step(&mut self, op: &Op) {
        match *op {
            Op::Arrive(queue, way) => self.arrive(queue, way),
            Op::Lose(queue, n) => {
                let newest = &mut self.queues[usize::from(queue)].1;
                // Fewer than there are numbers: the kernel can't tell packets apart that have the same one, and nobody how
                // often the count has wrapped.
                if *newest < u32::MAX - (1 << 16) - n && self.dropped_since < (1 << 31) {
                    *newest += n;
                    self.dropped = self.dropped.wrapping_add(n);
                    self.dropped_since += u64::from(n);
                }
            }
            Op::Receive(n) => self.receive(n),
            Op::Push(batch, place, choice) => {
                if let Some(key) = self.take_held(place) {
                    self.decide(key, Fate::Decided(Some(batch), choice.given()));
                    self.batches[batch].push(key, choice.decision()).unwrap();
                }
            }
            Op::Verdict(place, choice, capable, ref before, ref after) => {
                if let Some(key) = self.take_held(place) {
                    self.decide(key, Fate::Decided(None, choice.given()));
                    self.verdict(key, choice, capable, before, after);
                }
            }
            Op::Send(batch, capable, ref before, ref after) => {
                self.send(batch, capable, before, after);
            }
            Op::Fail(index) => {
                let mut batch = std::mem::take(&mut self.batches[index]);
                let (len, bindings) = (batch.len(), self.bindings.clone());
                let result = batch.send(
                    200,
                    true,
                    || Box::new(bindings.clone()),
                    |_, _, _| Err(out_of_memory()),
                );
                if !matches!(result, Err(Error::Io { .. })) {
                    assert!(batch.is_empty(), "nothing had to be sent");
                }
                assert!(batch.len() <= len);
                self.batches[index] = batch;
            }
            Op::Flush(queue, place) => {
                let waiting = &mut self.queues[usize::from(queue)].0;
                let id = waiting.keys().nth(place).copied();
                id.map(|id| waiting.remove(&id));
            }
            Op::LoseAnswers => {
                while let Some(Message::NotPermitted) = self.receive_buffer.back() {
                    self.receive_buffer.pop_back();
                    self.dropped = self.dropped.wrapping_add(1);
                }
            }
            Op::Rebind(queue) => {
                // First everything is received that belongs to the old binding.
                self.receive(usize::MAX);
                self.queues[usize::from(queue)] = Default::default();
                self.held.retain(|key| key.queue != queue);
                let old = self.bindings.get(queue).unwrap().id;
                self.bindings.remove(old);
                self.bind(queue);
            }
        }
    }

    fn arrive(&mut self, queue: u16, way: Way) {
        let (waiting, newest) = &mut self.queues[usize::from(queue)];
        *newest += 1;
        if way == Way::Lost {
            self.dropped = self.dropped.wrapping_add(1);
            return;
        }
        let place = *newest;
        waiting.insert(place, Fate::Held);
        if way == Way::Sent {
            let key = self.key(queue, place);
            self.receive_buffer.push_back(Message::Packet(key));
        }
    }

    /// As `Shared::note_slots` does
    fn receive(&mut self, n: usize) {
        // A refusal is seen when no send is on its way: `Shared::note_refusal` waits for that.
        let first_refusal = self.receive_buffer.iter().position(|message| {
            matches!(message, Message::NotPermitted) && self.sends_on_their_way > 0
        });
        let n = n.min(first_refusal.unwrap_or(self.receive_buffer.len()));
        let mut run: Option<Stretch> = None;
        let messages = Vec::from_iter(self.receive_buffer.drain(..n));
        for message in messages {
            let key = match message {
                Message::Packet(key) => Some(key),
                Message::NotPermitted => None,
            };
            let goes_on = match (&mut run, key) {
                (Some(stretch), Some(key)) => stretch.extend(key),
                _ => false,
            };
            if !goes_on {
                self.note_packets(run.take());
                run = key.map(Stretch::new);
            }
            match key {
                Some(key) => self.held.push(key),
                None => self.hear_refusal(),
            }
        }
        self.note_packets(run);
    }

    /// As `Shared::note_packets` does
    fn note_packets(&mut self, stretch: Option<Stretch>) {
        if let Some(Stretch { first, last }) = stretch {
            let binding = self.bindings.get(first.queue).unwrap();
            let is_lost = |gap, is_blind| self.losses.explain(gap, is_blind, self.dropped);
            binding.note_received(first.id, last, true, true, is_lost);
        }
    }

    /// As `Shared::note_refusal` does; the program tries again, and may think otherwise
    fn hear_refusal(&mut self) {
        for binding in self.bindings.iter() {
            binding.waiting().go_blind();
        }
        for (queue, (waiting, _)) in (0..).zip(&mut self.queues) {
            let refused = waiting
                .iter_mut()
                .filter(|(_, fate)| matches!(fate, Fate::Refused(_)));
            let binding = self.bindings.get(queue).unwrap();
            for (&place, fate) in refused {
                *fate = Fate::Held;
                self.held.push(binding.key(self.base.wrapping_add(place)));
            }
        }
    }

    fn take_held(&mut self, place: usize) -> Option<PacketKey> {
        (place < self.held.len()).then(|| self.held.remove(place))
    }

    fn decide(&mut self, key: PacketKey, fate: Fate) {
        let place = self.place(key.id);
        let waiting = &mut self.queues[usize::from(key.queue)].0;
        waiting.entry(place).and_modify(|packet| *packet = fate);
    }

    /// As `Shared::common_verdict` and `long_verdict` do
    fn verdict(
        &mut self,
        key: PacketKey,
        choice: Choice,
        capable: Capable,
        before: &[Op],
        after: &[Op],
    ) {
        let verdict = choice.decision().as_batch();
        let binding = BindingId::from(key);
        let is_tracked = !matches!(choice, Choice::Stolen);
        let bindings = self.bindings.clone();
        let waiting = || bindings.current(binding).unwrap().waiting();
        let needs_proof = is_tracked && waiting().needs_proof_alone(verdict);
        let mut batch = VerdictBatch::new();
        batch.push(key, choice.decision()).unwrap();
        let (is_common, all) = (verdict.is_some(), bindings.clone());
        let send = |_, bytes: &[u8], needs_too: bool| {
            self.sends_on_their_way += 1;
            self.run(before);
            let is_proven = self.execute(None, capable, bytes, needs_proof || needs_too);
            self.run(after);
            self.sends_on_their_way -= 1;
            if is_common && is_tracked {
                waiting().note_sent(key.id, key.id, verdict, is_proven);
            }
            Ok(is_proven)
        };
        batch
            .send(usize::MAX, !is_common, || Box::new(all.clone()), send)
            .unwrap();
    }

    fn send(&mut self, index: usize, capable: Capable, before: &[Op], after: &[Op]) {
        self.look_at_losses();
        // What others push meanwhile is for the next time.
        let mut batch = std::mem::take(&mut self.batches[index]);
        let bindings = self.bindings.clone();
        // Small parts, so that there are several
        let _stale = batch.send(
            200,
            true,
            || Box::new(bindings.clone()),
            |_, bytes, needs_proof| {
                self.sends_on_their_way += 1;
                self.run(before);
                let is_proven = self.execute(Some(index), capable, bytes, needs_proof);
                self.run(after);
                self.sends_on_their_way -= 1;
                Ok(is_proven)
            },
        );
        assert!(batch.is_empty());
    }

    /// As `Shared::look_at_losses` does
    fn look_at_losses(&mut self) {
        self.dropped_since = 0;
        if self.losses.must_end_runs(self.dropped) {
            for binding in self.bindings.iter() {
                binding.waiting().go_blind();
            }
        }
    }

    /// As `Shared::send_and_prove` does
    fn execute(
        &mut self,
        batch: Option<usize>,
        capable: Capable,
        bytes: &[u8],
        needs_proof: bool,
    ) -> bool {
        if capable.during {
            self.carry_out(batch, bytes);
        } else {
            self.refuse(batch, bytes);
        }
        needs_proof && capable.before && capable.after
    }

    /// What the kernel does with a send of a thread without `CAP_NET_ADMIN` (`nfnetlink_rcv`)
    fn refuse(&mut self, batch: Option<usize>, bytes: &[u8]) {
        self.receive_buffer.push_back(Message::NotPermitted);
        for message in read(bytes) {
            let last = self.place(message.id);
            let (waiting, _) = &mut self.queues[usize::from(message.queue)];
            let decided = Fate::Decided(batch, message.given);
            let meant = waiting.iter_mut().filter(|(place, fate)| {
                let is_meant = **place == last || message.is_batch && !is_after(**place, last);
                is_meant && **fate == decided
            });
            meant.for_each(|(_, fate)| *fate = Fate::Refused(message.given));
        }
    }

    /// What the kernel does with any other (`nfqnl_recv_verdict`, `nfqnl_recv_verdict_batch`)
    fn carry_out(&mut self, batch: Option<usize>, bytes: &[u8]) {
        for message in read(bytes) {
            let last = self.place(message.id);
            let (waiting, _) = &mut self.queues[usize::from(message.queue)];
            if message.given.0 == Verdict::Stolen.to_raw() {
                assert!(!message.is_batch);
                // Refused: nothing is decided any more, and nobody tries again.
                waiting.entry(last).and_modify(|fate| *fate = Fate::Held);
                continue;
            }
            let mut hit: Vec<u32> = waiting.keys().copied().collect();
            if message.is_batch {
                let beyond = hit.iter().position(|&place| is_after(place, last));
                hit.truncate(beyond.unwrap_or(hit.len()));
            } else {
                hit.retain(|&place| place == last);
            }
            self.runs += usize::from(hit.len() > 1);
            self.said_again += usize::from(message.is_said_again);
            for id in hit {
                let fate = waiting.remove(&id).unwrap();
                let expected = [
                    Fate::Decided(batch, message.given),
                    Fate::Refused(message.given),
                ];
                assert!(
                    expected.contains(&fate),
                    "{message:?} on packet {id}: {fate:?}"
                );
            }
        }
    }
}

#[test]
fn every_packet_gets_its_own_verdict() {
    let mut config = ProptestConfig::default(); // PROPTEST_CASES asks for more, or for less
    config.cases *= 16;
    let cases = usize::try_from(config.cases).unwrap();
    config.failure_persistence = None;
    let (runs, said_again) = (Cell::new(0), Cell::new(0));
    let tried = TestRunner::new(config).run(&(base(), ops()), |(base, ops)| {
        let mut world = World::new(base);
        world.run(&ops);
        for batch in 0..BATCHES {
            world.send(batch, ALWAYS, &[], &[]);
        }
        for (waiting, _) in &world.queues {
            for (id, fate) in waiting {
                let is_left = matches!(fate, Fate::Decided(..));
                prop_assert!(!is_left, "packet {} was not answered: {:?}", id, fate);
            }
        }
        runs.set(runs.get() + world.runs);
        said_again.set(said_again.get() + world.said_again);
        Ok(())
    });
    tried.unwrap_or_else(|error| panic!("{error}"));
    // Or it would show nothing.
    println!("{} runs, {} said again", runs.get(), said_again.get());
    assert!(runs.get() > cases / 4, "{} runs", runs.get());
    assert!(
        said_again.get() > cases / 40,
        "{} verdicts said again",
        said_again.get()
    );
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
            |_, bytes, _| {
                all.extend(read(bytes).into_iter().map(|m| (m.is_batch, m.id)));
                Ok(true)
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

/// Or it would end all runs when it is far behind
#[test]
fn a_run_of_the_usual_verdict_settles_what_was_unproven() {
    let mut bindings = Bindings::default();
    bindings.insert(Binding::new(0, false));
    let binding = bindings.get(0).unwrap();
    let send = |first: u32, verdicts: &[Verdict], is_capable: bool| {
        let mut batch = VerdictBatch::new();
        for (id, &verdict) in (first..).zip(verdicts) {
            binding.waiting().receive(id, id);
            batch.push(binding.key(id), verdict).unwrap();
        }
        let lend = || &bindings;
        let prove = |_, _: &[u8], needs_proof| Ok(needs_proof && is_capable);
        batch.send(usize::MAX, true, lend, prove).unwrap();
        binding.waiting().unproven().map(|unproven| unproven.last)
    };
    let mixed = [Verdict::Drop, Verdict::Accept, Verdict::Accept];
    assert_eq!(send(1, &mixed[1..], true), Some(2), "nothing else is in it");
    assert_eq!(send(3, &mixed, true), None);
    assert_eq!(send(6, &mixed[1..], false), Some(7));
    binding.waiting().receive(8, 8); // is held
    assert_eq!(send(9, &mixed, true), Some(7), "no run");
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
            |_, bytes, _| {
                all.extend(read(bytes).into_iter().map(|m| (m.queue, m.is_batch, m.id)));
                Ok(true)
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
        |_, bytes, _| {
            sent.extend(read(bytes));
            Ok(true)
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
            |_, bytes, _| {
                assert!(bytes.len() <= 1000);
                if sends == fail_at {
                    sends += 1;
                    return Err(out_of_memory());
                }
                sends += 1;
                sent.extend(read(bytes).into_iter().map(|message| message.id));
                Ok(true)
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
