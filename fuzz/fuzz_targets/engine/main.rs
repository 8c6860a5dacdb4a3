//! A whole handle in every style, over a kernel that does what the fuzzer says ([`world`])
//!
//! What must hold: every packet that the library is handed it yields exactly once, under the binding it belongs to, or
//! counts as discarded if that has ended; the kernel gets every verdict at most once, and no packet one that was not
//! meant for it; in the end each that was decided on has its verdict. And nothing hangs or panics.
#![no_main]

mod world;

use std::cell::{Cell, RefCell};
use std::fmt::{self, Write};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use nfqnl::fuzzing::{Kernel, open_over, with_kernel};
use nfqnl::{
    CopyMode, Decision, Error, Event, Handle, PacketKey, Queue, QueueConfig, QueueData, RecvBatch,
    Verdict, VerdictBatch, VerdictSender,
};
use nfqnl_proto::DecodeError;
use world::{
    ALONE, BATCHES, Bytes, CALLBACKS, Fate, GENERATIONS, Given, JOINED, LONGEST, Name, QUEUES,
    VERDICT, VERDICT_BATCH, World,
};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Style {
    Loop,
    /// The program receives, and passes on what came
    Passing,
    RunOnce,
}

/// Takes text, and keeps none
struct Nowhere;

impl Write for Nowhere {
    fn write_str(&mut self, _: &str) -> fmt::Result {
        Ok(())
    }
}

/// The kernel, and the program that is driven
struct Fuzz {
    world: RefCell<World>,
    style: Style,
    handle: RefCell<Option<Handle>>,
    sender: RefCell<Option<VerdictSender>>,
    /// With the kernel's binding that it is
    queues: RefCell<[Option<(Queue, u32)>; QUEUES]>,
    received: [RefCell<RecvBatch>; BATCHES],
    verdicts: [RefCell<VerdictBatch>; BATCHES],
    /// Packets that nobody has decided on
    held: RefCell<Vec<PacketKey>>,
    /// Overruns, refusals, messages that were cut or broken
    events: Cell<[u64; 3]>,
    is_nested: Cell<bool>,
    now: Cell<Instant>,
    /// Whether callbacks decided what could not be sent
    gave_up: Cell<bool>,
}

thread_local! {
    /// For callbacks, which have to be `Send`
    static FUZZ: RefCell<Option<Rc<Fuzz>>> = const { RefCell::new(None) };
}

fuzz_target!(|data: &[u8]| {
    let mut bytes = Bytes::new(data);
    let setup = bytes.next();
    let style = match setup % 4 {
        0 | 1 => Style::Loop,
        2 => Style::Passing,
        _ => Style::RunOnce,
    };
    let slot_len = [64, 100, 160, LONGEST][usize::from(setup >> 2 & 3)];
    let slots = [1, 2, 7, 64][usize::from(setup >> 4 & 3)];
    let hides_overruns = setup >> 6 & 1 == 1;
    let coalesce = setup >> 7 == 0;
    let fuzz = Rc::new(Fuzz {
        world: RefCell::new(World::new(bytes, hides_overruns)),
        style,
        handle: RefCell::default(),
        sender: RefCell::default(),
        queues: RefCell::default(),
        received: [(); BATCHES].map(|()| RefCell::new(RecvBatch::new(slots, slot_len))),
        verdicts: Default::default(),
        held: RefCell::default(),
        events: Cell::default(),
        is_nested: Cell::new(false),
        now: Cell::new(Instant::now()),
        gave_up: Cell::new(false),
    });
    FUZZ.set(Some(fuzz.clone()));
    with_kernel(fuzz.clone(), || {
        let builder = Handle::builder()
            .coalesce(coalesce)
            .report_overruns(!hides_overruns);
        let is_taken_over = fuzz.world.borrow().is_shared;
        if is_taken_over {
            fuzz.begin_as_another();
        }
        let mut handle = open_over(socket(), builder, is_taken_over).expect("a socket");
        handle.on_event(|event| this(|fuzz| fuzz.note(event)));
        fuzz.sender.replace(Some(handle.verdict_sender()));
        fuzz.handle.replace(Some(handle));
        while !fuzz.world.borrow().bytes.is_empty() {
            fuzz.step();
        }
        fuzz.end();
    });
    FUZZ.set(None);
});

/// Another descriptor of the one socket that all runs have, as it costs more than a run to open one; it is never used
fn socket() -> OwnedFd {
    thread_local! {
        static SOCKET: OwnedFd = {
            let handle = Handle::open().expect("a socket");
            handle.as_fd().try_clone_to_owned().expect("a descriptor")
        };
    }
    SOCKET.with(|socket| socket.try_clone().expect("a descriptor"))
}

fn this<T>(run: impl FnOnce(&Fuzz) -> T) -> T {
    let fuzz = FUZZ.with_borrow(Clone::clone).expect("a run");
    run(&fuzz)
}

impl Kernel for Fuzz {
    fn send(&self, messages: &[u8]) -> io::Result<usize> {
        let kind = u16::from_ne_bytes([messages[4], messages[5]]);
        let is_verdict = [VERDICT, VERDICT_BATCH].contains(&kind);
        if is_verdict {
            let world = &mut *self.world.borrow_mut();
            if let Some(errno) = world.send_error.take() {
                return Err(io::Error::from_raw_os_error(errno));
            }
            if messages.len() > world.send_limit {
                world.was_too_long = true;
                return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
            }
        }
        // Privileges come and go, but not there and back within a moment.
        let (mut before, mut after) = (false, false);
        if !self.is_nested.get() {
            [before, after] = std::mem::take(&mut self.world.borrow_mut().changes);
            after &= !before;
        }
        self.others(is_verdict);
        {
            let world = &mut *self.world.borrow_mut();
            world.is_capable ^= before;
            world.carry_out(messages);
            world.is_capable ^= after;
        }
        self.others(is_verdict);
        Ok(messages.len())
    }

    fn receive(
        &self,
        _: bool,
        slots: &mut dyn Iterator<Item = &mut [u8]>,
        lens: &mut [usize],
    ) -> io::Result<usize> {
        self.world.borrow_mut().receive(slots, lens)
    }

    fn wait_readable(&self, timeout: libc::c_int) -> io::Result<bool> {
        let world = &mut *self.world.borrow_mut();
        let Ok(timeout) = u64::try_from(timeout) else {
            // Nothing would ever end this wait.
            let ended = io::Error::from_raw_os_error(libc::EBADF);
            return if world.is_readable() {
                Ok(true)
            } else {
                Err(ended)
            };
        };
        if timeout > 0 && !world.is_readable() {
            world.arrive_meanwhile();
            let time = Duration::from_millis(timeout);
            self.now.set(self.now.get() + time);
        }
        Ok(world.is_readable())
    }

    fn drops(&self) -> io::Result<u32> {
        Ok(self.world.borrow().dropped)
    }

    fn has_net_admin(&self) -> bool {
        self.world.borrow().is_capable
    }

    fn wait_for_rcu(&self) -> io::Result<()> {
        self.world.borrow_mut().land();
        Ok(())
    }

    fn longest(&self) -> usize {
        LONGEST * JOINED
    }

    fn now(&self) -> Instant {
        self.now.get()
    }

    fn pass(&self, time: Duration) {
        // An answer that is lost is waited for only where the library can't know of it.
        assert!(self.style != Style::Loop, "a wait that nothing ends");
        self.now.set(self.now.get() + time);
    }
}

fn choose(byte: u8) -> Decision<'static> {
    const LONG: &[u8] = &[0x45; 301];
    match byte % 16 {
        0..=6 => Verdict::Accept.into(),
        7..=9 => Verdict::Drop.into(),
        10 => Verdict::Accept.with_mark(7),
        11 => Verdict::Accept.with_mark(8),
        12 => Verdict::Accept.with_payload(&LONG[..85]),
        13 => Verdict::Drop.with_payload(LONG),
        14 => Verdict::Stolen.into(),
        _ => Verdict::Repeat.into(),
    }
}

fn given(byte: u8) -> Given {
    let decision = choose(byte);
    let mark = match byte % 16 {
        10 => Some(7),
        11 => Some(8),
        _ => None,
    };
    let raw = decision.verdict().to_raw();
    (raw, mark, decision.payload().map(<[u8]>::len))
}

impl Fuzz {
    fn byte(&self) -> u8 {
        self.world.borrow_mut().bytes.next()
    }

    fn below(&self, n: usize) -> usize {
        self.world.borrow_mut().bytes.below(n)
    }

    /// What goes on while a send is on its way; who sends verdicts leaves other threads room to do something
    fn others(&self, is_verdict: bool) {
        self.world.borrow_mut().arrive_meanwhile();
        // One of this thread's own would never end.
        let waits = self.world.borrow().may_end_runs;
        if !is_verdict || waits || self.world.borrow().is_frozen || self.is_nested.replace(true) {
            return;
        }
        for _ in 0..(self.byte() >> 6).saturating_sub(1) {
            self.step();
        }
        self.is_nested.set(false);
    }

    fn step(&self) {
        let is_nested = self.is_nested.get();
        let world = || self.world.borrow_mut();
        match self.byte() % 40 {
            0..=8 => {
                let byte = self.byte();
                for _ in 0..=byte >> 6 {
                    world().arrive(usize::from(byte) % QUEUES);
                }
            }
            9..=15 => self.receive(),
            16..=22 => self.push(),
            23..=25 => self.answer_alone(),
            26..=28 => self.send(),
            29 => {
                let (queue, place) = (self.below(QUEUES), self.below(8));
                world().flush(queue, place);
            }
            30 => world().send_junk(),
            31 => {
                let byte = self.byte();
                let lost = match byte >> 6 {
                    n @ (0 | 1) => 1 << n,
                    // Nobody is stopped for minutes amid a send.
                    2 | 3 if is_nested => 1 << 20,
                    n => 1 << (27 + n),
                };
                world().lose(usize::from(byte) % QUEUES, lost);
            }
            32 => {
                let place = self.below(2);
                world().changes[place] = true;
            }
            // Everything below needs locks that a sender has.
            _ if is_nested => {}
            33 | 34 => self.bind(),
            35 => self.unbind(),
            36 => {
                let queue = self.below(QUEUES);
                if let Some((queue, _)) = &self.queues.borrow()[queue] {
                    let _ = queue.set_maxlen(7);
                }
            }
            37 => {
                let handle = self.handle.borrow();
                let _ = handle.as_ref().expect("it is open").sync();
            }
            38 => match self.below(9) {
                8 => world().joins = JOINED - 1,
                0 => world().interruptions = 2,
                1 => world().send_error = Some(libc::ENOBUFS),
                2 => world().send_error = Some(libc::EINTR),
                3 => world().send_limit = 200,
                4 => world().send_limit = usize::MAX,
                5 => world().refusal = Some(libc::EPERM),
                6 => world().land(),
                _ => {
                    let handle = self.handle.borrow();
                    let _ = handle.as_ref().expect("it is open").stats();
                }
            },
            _ => self.act_as_another(),
        }
    }

    /// What has happened to a socket before it is taken over
    fn begin_as_another(&self) {
        for _ in 0..self.below(8) {
            self.act_as_another();
            let queue = self.below(QUEUES);
            self.world.borrow_mut().arrive(queue);
        }
    }

    /// Through another descriptor of the same socket
    fn act_as_another(&self) {
        let byte = self.byte();
        let queue = usize::from(byte) % QUEUES;
        let world = &mut *self.world.borrow_mut();
        // What the handle has bound nobody may bind for it.
        if world.is_shared && byte >= 128 && self.queues.borrow()[queue].is_none() {
            world.bind(queue, true);
        } else {
            world.unbind(queue);
        }
    }

    fn bind(&self) {
        let queue = self.below(QUEUES);
        let num = u16::try_from(queue).expect("few queues");
        let config = QueueConfig::new().copy_mode(CopyMode::PACKET, u32::MAX);
        let mut handle = self.handle.borrow_mut();
        let handle = handle.as_mut().expect("it is open");
        let bound = match self.style {
            Style::Loop => handle.bind_queue_with(num, &config),
            _ => handle.create_queue_with(num, &config, |data| this(|fuzz| fuzz.call_back(data))),
        };
        let generation = self.world.borrow().queues[queue]
            .as_ref()
            .map(|bound| bound.generation);
        if let (Ok(bound), Some(generation)) = (bound, generation) {
            let old = self.queues.borrow_mut()[queue].replace((bound, generation));
            drop(old);
        }
    }

    fn unbind(&self) {
        let byte = self.byte();
        let queue = self.queues.borrow_mut()[usize::from(byte) % QUEUES].take();
        match queue {
            Some((queue, _)) if byte >= 128 => drop(queue),
            Some((queue, _)) => {
                let _ = queue.destroy();
            }
            None => {}
        }
    }
}

/// Receiving
impl Fuzz {
    fn receive(&self) {
        let byte = self.byte();
        match self.style {
            Style::Loop => self.receive_batch(byte),
            // Nobody else has the handle.
            _ if self.is_nested.get() => {}
            Style::Passing if byte < 240 => self.pass_on(),
            _ => self.run_once(usize::from(byte) % BATCHES),
        }
    }

    fn receive_batch(&self, byte: u8) {
        // A refusal waits for all sends that are on their way: one of this thread's own would never end.
        if self.is_nested.get() && self.world.borrow().has_bad_news() {
            return;
        }
        let Ok(mut batch) = self.received[usize::from(byte) % BATCHES].try_borrow_mut() else {
            return;
        };
        let handle = self.handle.borrow();
        let handle = handle.as_ref().expect("it is open");
        let events = match byte >> 1 & 3 {
            0 => handle.recv(&mut batch),
            1 => {
                let time = Duration::from_micros(u64::from(byte >> 6) * 700);
                handle.recv_deadline(&mut batch, self.now.get() + time)
            }
            _ => handle.try_recv(&mut batch),
        };
        let most = match byte >> 3 {
            n @ 0..8 => usize::from(n),
            _ => usize::MAX,
        };
        match events {
            Ok(events) => events.take(most).for_each(|event| self.note(event)),
            Err(error) => assert!(matches!(error, Error::Io { .. }), "{error}"),
        }
    }

    fn pass_on(&self) {
        let mut slot = vec![0; 100 + 10 * self.below(40)];
        let mut len = [0];
        let came = self
            .world
            .borrow_mut()
            .receive(&mut std::iter::once(&mut slot[..]), &mut len);
        if came.is_ok() {
            let mut handle = self.handle.borrow_mut();
            let handle = handle.as_mut().expect("it is open");
            self.call(|| handle.handle_packet(&slot[..len[0]]));
        }
    }

    fn run_once(&self, batch: usize) {
        let mut batch = self.received[batch].borrow_mut();
        let mut handle = self.handle.borrow_mut();
        let handle = handle.as_mut().expect("it is open");
        self.call(|| handle.try_run_once(&mut batch));
    }

    /// Calls back; what callbacks decide is sent when all have exited
    fn call(&self, run: impl FnOnce() -> nfqnl::Result<usize>) {
        let outer = self.begin(CALLBACKS);
        if let Err(error) = run() {
            write!(Nowhere, "{error}").expect("it has an end");
            let is_expected = matches!(
                error,
                Error::Io { .. } | Error::Truncated { .. } | Error::Decode { .. }
            );
            assert!(is_expected, "{error:?}");
        }
        if self.end_of(outer) {
            self.gave_up.set(true);
        }
    }

    /// Somebody begins to send; returns what `end_of` wants
    fn begin(&self, sender: usize) -> bool {
        let world = &mut *self.world.borrow_mut();
        world.senders.push(sender);
        std::mem::take(&mut world.was_too_long)
    }

    /// Says whether something was too long for a send call
    fn end_of(&self, outer: bool) -> bool {
        let world = &mut *self.world.borrow_mut();
        world.senders.pop();
        std::mem::replace(&mut world.was_too_long, outer)
    }

    /// What the library yields comes once, and is what it was handed
    fn note(&self, event: Event<'_>) {
        let mut events = self.events.get();
        write!(Nowhere, "{event:?}").expect("it has an end");
        match event {
            Event::Packet(packet) => {
                self.note_whole(packet.key(), packet.payload());
                self.held.borrow_mut().push(packet.key());
            }
            Event::Truncated { key, needed, .. } => {
                events[2] += 1;
                self.note_broken(key, needed % GENERATIONS);
            }
            Event::Malformed { key, error, .. } => {
                events[2] += 1;
                let generation = match error {
                    DecodeError::AttributeLength { kind, .. } => usize::from(kind),
                    _ => 0,
                };
                self.note_broken(key, generation);
            }
            Event::Refused(refusal) => {
                events[1] += 1;
                write!(Nowhere, "{refusal}").expect("it has an end");
                self.try_again(refusal.packet(), refusal.errno());
            }
            Event::Overrun => events[0] += 1,
            _ => {}
        }
        self.events.set(events);
    }

    fn note_broken(&self, key: Option<PacketKey>, generation: usize) {
        if let Some(key) = key {
            self.note_packet(key, u32::try_from(generation).expect("few"));
            self.held.borrow_mut().push(key);
        }
    }

    fn note_whole(&self, key: PacketKey, payload: &[u8]) {
        let be = |at: usize| u32::from_be_bytes(*payload[at..].first_chunk().expect("a number"));
        assert_eq!(be(4), key.id, "its own payload");
        self.note_packet(key, be(0));
    }

    fn note_packet(&self, key: PacketKey, generation: u32) {
        let world = &mut *self.world.borrow_mut();
        assert!(key.binding != 0);
        let PacketKey { queue, id, .. } = key;
        let name = Name {
            queue,
            generation,
            id,
        };
        let handed = world.handed.get_mut(&name).expect("it was handed out");
        handed.times += 1;
        assert_eq!(handed.times, 1, "{name:?} again");
        let of = world.bindings.insert((queue, key.binding), generation);
        assert!(
            of.is_none_or(|of| of == generation),
            "{name:?} under an earlier binding"
        );
    }

    /// The program tries again what was refused, and may think otherwise
    fn try_again(&self, refused: Option<PacketKey>, errno: i32) {
        let world = &mut *self.world.borrow_mut();
        let mut again = Vec::new();
        if errno == libc::EPERM {
            for (queue, bound) in (0..).zip(&mut world.queues) {
                let Some(bound) = bound else { continue };
                for (id, fate) in &mut bound.waiting {
                    if let Fate::Refused(_) = fate {
                        *fate = Fate::Held;
                        again.push((queue, bound.generation, *id));
                    }
                }
            }
        }
        let mut held = self.held.borrow_mut();
        let again = again
            .into_iter()
            .filter_map(|(queue, generation, id)| world.key(queue, generation, id));
        held.extend(again);
        if let (Some(key), libc::EINVAL) = (refused, errno) {
            let fate = world.bound(key).and_then(|bound| bound.fate(key.id));
            if fate == Some(&mut Fate::Held)
                && world.bindings.contains_key(&(key.queue, key.binding))
            {
                let name = (key.queue, key.binding);
                let handed = world.handed.get(&Name {
                    queue: key.queue,
                    generation: world.bindings[&name],
                    id: key.id,
                });
                if handed.is_some_and(|handed| handed.times == 1) && !held.contains(&key) {
                    held.push(key);
                }
            }
        }
    }
}

/// Answering
impl Fuzz {
    /// Takes a packet that is held, mostly the oldest
    fn take_held(&self) -> Option<PacketKey> {
        let byte = self.byte();
        let place = usize::from(byte).saturating_sub(200);
        let mut held = self.held.borrow_mut();
        (place < held.len()).then(|| held.remove(place))
    }

    fn decide(&self, key: PacketKey, fate: Fate) {
        let world = &mut *self.world.borrow_mut();
        if let Some(packet) = world.bound(key).and_then(|bound| bound.fate(key.id)) {
            *packet = fate;
        }
    }

    fn push(&self) {
        let byte = self.byte();
        let index = usize::from(byte >> 4) % BATCHES;
        let Ok(mut batch) = self.verdicts[index].try_borrow_mut() else {
            return;
        };
        for _ in 0..=byte >> 6 {
            if let Some(key) = self.take_held() {
                self.decide(key, Fate::Decided(index, given(byte)));
                batch.push(key, choose(byte)).expect("it can be sent");
            }
        }
    }

    fn answer_alone(&self) {
        let byte = self.byte();
        let Some(key) = self.take_held() else {
            return;
        };
        self.decide(key, Fate::Decided(ALONE, given(byte)));
        let was_too_long = self.begin(ALONE);
        let sender = self.sender.borrow().clone().expect("it is open");
        let sent = sender.verdict(key, choose(byte));
        self.end_of(was_too_long);
        let world = &mut *self.world.borrow_mut();
        match sent {
            Ok(()) | Err(Error::Stale { .. }) => {}
            Err(Error::Io { .. }) => {
                // Nothing was sent.
                if let Some(fate) = world.bound(key).and_then(|bound| bound.fate(key.id)) {
                    *fate = Fate::Held;
                }
                self.held.borrow_mut().push(key);
            }
            Err(error) => panic!("{error:?}"),
        }
    }

    fn send(&self) {
        let index = self.below(BATCHES);
        let Ok(mut batch) = self.verdicts[index].try_borrow_mut() else {
            return;
        };
        let outer = self.begin(index);
        let sender = self.sender.borrow().clone().expect("it is open");
        let before = batch.len();
        let sent = sender.send(&mut batch);
        let was_too_long = self.end_of(outer);
        let world = &mut *self.world.borrow_mut();
        assert!(batch.len() <= before);
        match sent {
            Ok(()) | Err(Error::Stale { .. }) => assert!(batch.is_empty()),
            Err(Error::Io { .. }) => {}
            Err(error) => panic!("{error:?}"),
        }
        if was_too_long && !batch.is_empty() {
            // What was given up and what stays can't be told apart.
            batch.clear();
        } else if !was_too_long {
            return;
        }
        let mut held = self.held.borrow_mut();
        let mut left = Vec::new();
        for (queue, bound) in (0..).zip(&mut world.queues) {
            let Some(bound) = bound else { continue };
            for (id, fate) in &mut bound.waiting {
                if matches!(fate, Fate::Decided(by, _) if *by == index) {
                    *fate = Fate::Held;
                    left.push((queue, bound.generation, *id));
                }
            }
        }
        held.extend(
            left.into_iter()
                .filter_map(|(queue, generation, id)| world.key(queue, generation, id)),
        );
    }

    fn call_back(&self, data: &mut QueueData<'_>) {
        let key = data.key();
        self.note_whole(key, data.get_payload());
        let byte = self.byte();
        if byte >= 192 {
            self.held.borrow_mut().push(key);
            if byte >= 240 {
                self.answer_alone();
            }
            return;
        }
        if byte >= 160 {
            data.set_decision(&choose(byte >> 4))
                .expect("it can be sent"); // and thinks again
        }
        self.decide(key, Fate::Decided(CALLBACKS, given(byte)));
        data.set_decision(&choose(byte)).expect("it can be sent");
    }
}

/// In the end
impl Fuzz {
    fn end(&self) {
        {
            let world = &mut *self.world.borrow_mut();
            world.is_frozen = true;
            world.is_capable = true;
            world.changes = [false; 2];
            world.send_error = None;
            world.refusal = None;
            world.send_limit = usize::MAX;
            world.interruptions = 0;
        }
        // Who looks at what is left in the batches, and then waits for the descriptor, gets to see everything.
        for batch in &self.received {
            batch
                .borrow_mut()
                .events()
                .for_each(|event| self.note(event));
        }
        while self.world.borrow().is_readable() {
            match self.style {
                Style::Loop => self.receive_batch(0xfe),
                Style::Passing => self.pass_on(),
                Style::RunOnce => self.run_once(0),
            }
        }
        for index in 0..BATCHES {
            let outer = self.begin(index);
            let handle = self.handle.borrow();
            let handle = handle.as_ref().expect("it is open");
            let mut batch = self.verdicts[index].borrow_mut();
            let sent = handle.send(&mut batch);
            assert!(
                matches!(sent, Ok(()) | Err(Error::Stale { .. })),
                "{sent:?}"
            );
            assert!(batch.is_empty());
            self.end_of(outer);
        }
        if self.style != Style::Loop {
            // What callbacks could not send before
            let mut handle = self.handle.borrow_mut();
            let handle = handle.as_mut().expect("it is open");
            self.call(|| handle.handle_packet(&[]));
        }
        self.check();
        self.queues.take();
        let handle = self.handle.take().expect("it is open");
        drop(handle);
    }

    fn check(&self) {
        let handle = self.handle.borrow();
        let stats = handle.as_ref().expect("it is open").stats();
        let world = &mut *self.world.borrow_mut();
        for (queue, held) in self.queues.borrow().iter().enumerate() {
            let (Some((_, generation)), Some(bound)) = (held, &world.queues[queue]) else {
                continue;
            };
            if bound.generation != *generation {
                continue;
            }
            for (name, handed) in &world.handed {
                let is_of_it = usize::from(name.queue) == queue && name.generation == *generation;
                // Callbacks get no packet that can't be read.
                let is_meant = handed.is_sound || self.style == Style::Loop;
                assert!(
                    !is_of_it || !is_meant || handed.times == 1,
                    "{name:?} was never yielded"
                );
            }
            for (id, fate) in &bound.waiting {
                let may_wait = match fate {
                    Fate::Decided(CALLBACKS, _) => self.gave_up.get(),
                    Fate::Decided(..) => false,
                    _ => true,
                };
                assert!(may_wait, "packet {id} was not answered: {fate:?}");
            }
        }
        if self.style == Style::Loop {
            let yielded = world
                .handed
                .values()
                .map(|handed| u64::from(handed.times))
                .sum::<u64>();
            assert_eq!(stats.packets, yielded + stats.discarded, "{stats:?}");
            let [overruns, refused, broken] = self.events.get();
            assert_eq!(stats.overruns, overruns);
            assert_eq!(stats.refused_verdicts, refused);
            assert!(
                stats.truncated + stats.malformed >= broken,
                "{stats:?} {broken}"
            );
        }
    }
}
