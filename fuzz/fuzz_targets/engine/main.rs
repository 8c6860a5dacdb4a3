//! A whole socket in each style, over a kernel controlled by the fuzzer ([`world`])
//!
//! The target asserts: The library yields each received packet once, under its binding, or counts
//! the packet if its queue was not bound. No packet gets another packet's verdict. In the end each
//! decided packet has its verdict. No call hangs, and only callbacks panic.
#![no_main]

mod world;

use std::cell::{Cell, Ref, RefCell, RefMut};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use nfqnl::fuzzing::{Kernel, open_over, with_kernel};
use nfqnl::{
    ConfigFlags, CopyMode, Decision, Error, Event, Handle, Packet, PacketKey, Queue, QueueConfig,
    QueueData, RecvBatch, Result, SendBatch, Socket, Verdict,
};
use world::{Fate, LONGEST, QUEUES, Sender, World, fail, is_verdict, is_whole};

const BATCHES: usize = 2;

/// Sizes of the receive buffer, as the kernel counts them; the first is the least possible
const BUFFERS: [usize; 3] = [2304, 8192, 32768];

/// The longest send with the smallest send buffer
const SEND_LIMIT: usize = 4608 - 32;

#[derive(Clone, Copy, Default, PartialEq)]
enum Style {
    /// `Socket`
    #[default]
    Loop,
    /// `Handle` receives
    Run,
    /// The program receives and passes datagrams to `Handle`
    Pass,
}

enum Library {
    Socket(Socket),
    Handle(Handle<'static>),
}

impl Library {
    fn socket(&self) -> &Socket {
        match self {
            Self::Socket(socket) => socket,
            Self::Handle(handle) => handle.socket(),
        }
    }
}

/// The kernel and the program
#[derive(Default)]
struct Fuzz {
    world: RefCell<World>,
    style: Style,
    library: RefCell<Option<Library>>,
    /// With the generation of the binding
    queues: RefCell<[Option<(Queue, u32)>; QUEUES]>,
    received: [RefCell<Option<RecvBatch>>; BATCHES],
    verdicts: [RefCell<SendBatch>; BATCHES],
    /// The keys of the verdicts in these batches
    pushed: [RefCell<Vec<PacketKey>>; BATCHES],
    /// Yielded packets without a decision
    held: RefCell<Vec<PacketKey>>,
    refusals: Cell<u64>,
    late_verdicts: Cell<u64>,
    /// A callback's verdict may have been dropped after an error
    gave_up: Cell<bool>,
    /// Unfinished sends of verdicts
    sends: Cell<u32>,
    /// Threads waiting in poll(2)
    polls: Cell<u32>,
    /// Threads waiting in a receive call
    receives: Cell<u32>,
    /// The program has received more than it has passed on
    holds_messages: Cell<bool>,
    /// The number of calls with possible reads: receive calls, and sends of verdicts
    calls: Cell<u32>,
    /// A waker was used, and no waiting receive call has returned since
    is_woken: Cell<bool>,
    /// Calls of `Waker::wake_all` so far
    wakes_of_all: Cell<u32>,
    elapsed: Cell<Duration>,
}

thread_local! {
    /// For callbacks, because `Rc` is not `Send`
    static FUZZ: RefCell<Option<Rc<Fuzz>>> = const { RefCell::new(None) };

    static START: Instant = Instant::now();

    /// One for each size of buffer, because opening takes longer than a run; a run uses only the
    /// descriptor
    static SOCKETS: [OwnedFd; BUFFERS.len()] = BUFFERS.map(|bytes| {
        let socket = Socket::builder().recv_buffer(bytes / 2).open().expect("a socket");
        assert_eq!(socket.recv_buffer().expect("a size"), bytes);
        socket.as_fd().try_clone_to_owned().expect("a descriptor")
    });
}

fuzz_target!(|data: &[u8]| {
    let mut bytes = Vec::from(data).into_iter();
    let [style, slots, options] = [(); 3].map(|()| usize::from(bytes.next().unwrap_or(0)));
    let style = [Style::Loop, Style::Run, Style::Loop, Style::Pass][style % 4];
    let slot_len = [LONGEST, 64, 100, 160][slots % 4];
    let slots = [1, 2, 7, 64][slots >> 2 & 3];
    let buffer = options >> 5;
    let option = |n: u8| options >> n & 1 == 1;
    let mut world = World::new(bytes, BUFFERS[buffer % BUFFERS.len()]);
    world.merging_ended = option(0);
    world.hides_overruns = option(1);
    world.is_shared = option(2) && style != Style::Pass && !world.hides_overruns;
    world.is_read_by_program = style != Style::Loop;
    for (n, flag) in [(3, ConfigFlags::CONNTRACK), (4, ConfigFlags::GSO)] {
        world.unsupported |= if option(n) { flag.bits() } else { 0 };
    }
    let builder = Socket::builder()
        .merge_verdicts(!world.merging_ended)
        .report_overruns(!world.hides_overruns);
    let batch = |()| RefCell::new(Some(RecvBatch::new(slots, slot_len)));
    let fuzz = Rc::new(Fuzz {
        world: RefCell::new(world),
        style,
        received: [(); BATCHES].map(batch),
        ..Fuzz::default()
    });
    let fd = SOCKETS.with(|fds| fds[buffer % BUFFERS.len()].try_clone());
    FUZZ.set(Some(Rc::clone(&fuzz)));
    with_kernel(Rc::<Fuzz>::clone(&fuzz), || {
        let socket = open_over(fd.expect("a descriptor"), builder).expect("a socket");
        let library = match style {
            Style::Loop => Library::Socket(socket),
            _ => Library::Handle(Handle::new(socket)),
        };
        if let Library::Handle(handle) = &library {
            handle.on_event(|event| this(|fuzz| fuzz.note(event)));
        }
        fuzz.library.replace(Some(library));
        while fuzz.world().bytes.len() > 0 {
            fuzz.step();
        }
        fuzz.end();
    });
    FUZZ.set(None);
});

fn this<T>(run: impl FnOnce(&Fuzz) -> T) -> T {
    let fuzz = FUZZ.with_borrow(Clone::clone).expect("a run");
    run(&fuzz)
}

impl Kernel for Fuzz {
    fn send(&self, messages: &[u8]) -> io::Result<usize> {
        let is_verdict = is_verdict(messages);
        let sends = is_verdict.then_some(&self.sends);
        if is_verdict {
            add(&self.calls);
            let error = self.world().send_error(messages);
            self.hold_again();
            if let Some(errno) = error {
                let is_callback = self.world().senders.last() == Some(&Sender::Callback);
                let is_last = self.style == Style::Pass && is_callback;
                self.gave_up.set(self.gave_up.get() || is_last);
                return fail(errno);
            }
        }
        self.meanwhile(sends);
        self.world().carry_out(messages);
        self.hold_again();
        self.meanwhile(sends);
        Ok(messages.len())
    }

    fn receive(
        &self,
        may_block: bool,
        slots: &mut dyn Iterator<Item = [&mut [u8]; 2]>,
        lens: &mut [usize],
    ) -> io::Result<usize> {
        self.world().arrive_meanwhile();
        if may_block {
            self.block(&self.receives)?;
        }
        self.world().receive(slots, lens)
    }

    fn wait_readable(&self, timeout: libc::c_int) -> io::Result<bool> {
        let wakes_of_all = self.wakes_of_all.get();
        if timeout != 0 {
            self.block(&self.polls)?;
        }
        let is_readable = self.world().is_readable();
        match u64::try_from(timeout) {
            _ if is_readable => {}
            Ok(timeout) => self.pass(Duration::from_millis(timeout)),
            Err(_) => {
                let is_woken = self.is_woken.get() || self.wakes_of_all.get() != wakes_of_all;
                assert!(!is_woken || self.world().is_shared, "a wake was lost");
                return fail(libc::EBADF); // Nothing would end this wait.
            }
        }
        Ok(is_readable)
    }

    fn wait_for_rcu(&self) -> io::Result<()> {
        self.world().land();
        Ok(())
    }

    fn longest(&self) -> usize {
        LONGEST
    }

    fn now(&self) -> Instant {
        START.with(|start| *start + self.elapsed.get())
    }

    fn forks(&self) -> u32 {
        u32::from(self.world().has_forked)
    }

    fn pass(&self, time: Duration) {
        let elapsed = self.elapsed.get().checked_add(time);
        self.elapsed.set(elapsed.expect("a wait that has an end"));
    }
}

fn add(count: &Cell<u32>) -> u32 {
    count.set(count.get() + 1);
    count.get()
}

/// Steps, chosen by the fuzzer
impl Fuzz {
    fn world(&self) -> RefMut<'_, World> {
        self.world.borrow_mut()
    }

    fn library(&self) -> Ref<'_, Library> {
        let library = self.library.borrow();
        Ref::map(library, |library| library.as_ref().expect("it is open"))
    }

    fn byte(&self) -> u8 {
        self.world().byte()
    }

    fn below(&self, n: usize) -> usize {
        self.world().below(n)
    }

    /// Delivers packets during a call; other threads take steps if the call holds no needed lock
    fn meanwhile(&self, count: Option<&Cell<u32>>) {
        self.world().arrive_meanwhile();
        let Some(count) = count else { return };
        // A send never lasts as long as 2^29 packets.
        let is_long = self.world().has_lost_many && std::ptr::eq(count, &self.sends);
        let depth = self.sends.get() + self.polls.get() + self.receives.get();
        if is_long || depth == 2 {
            return;
        }
        add(count);
        for _ in 0..(self.byte() >> 6).saturating_sub(1) {
            self.step();
        }
        count.set(count.get() - 1);
    }

    /// Lets a thread wait in the kernel
    fn block(&self, count: &Cell<u32>) -> io::Result<()> {
        if self.world().is_readable() {
            return Ok(());
        }
        assert!(!self.is_woken.get(), "a receive call waits after a wake");
        self.meanwhile(Some(count));
        let world = &mut *self.world();
        if world.interruptions > 0 && !world.is_readable() {
            world.interruptions -= 1;
            return fail(libc::EINTR);
        }
        Ok(())
    }

    fn step(&self) {
        let byte = self.byte();
        match byte % 32 {
            0..=6 => {
                let byte = self.byte();
                for _ in 0..=byte >> 6 {
                    self.world().arrive(usize::from(byte) % QUEUES);
                }
            }
            7..=12 => self.receive(self.byte()),
            13..=17 => self.push(),
            18..=20 => self.answer_alone(),
            21..=23 => self.send(self.below(BATCHES)),
            24 => {
                let (queue, place) = (self.below(QUEUES), self.below(8));
                self.world().flush(queue, place);
            }
            25 => self.world().send_junk(),
            26 => {
                let byte = self.byte();
                let is_short = self.sends.get() > 0 || self.world().is_shared;
                let many = if is_short { 1 << 20 } else { 1 << 29 };
                let n = [1, 2, many, 1 << 20][usize::from(byte >> 6)];
                self.world().lose(usize::from(byte) % QUEUES, n);
            }
            27 if self.world().is_shared => self.world().run_other_process(),
            27 | 28 => self.bind(|num, config| match &*self.library() {
                Library::Socket(socket) => socket.bind_with(num, config),
                Library::Handle(handle) if byte >= 224 => handle.socket().bind_with(num, config),
                Library::Handle(handle) => handle.create_queue_with(num, config, call_back),
            }),
            29 => self.unbind(),
            30 => self.wake(byte >= 128),
            _ => self.set(),
        }
    }

    fn wake(&self, all: bool) {
        let waker = self.library().socket().waker();
        self.is_woken.set(true);
        if all {
            add(&self.wakes_of_all);
            waker.wake_all();
        } else {
            waker.wake();
        }
    }

    /// Changes a setting of the model, or a setting of the socket or a queue
    fn set(&self) {
        const REFUSALS: [i32; 3] = [libc::EPERM, libc::ENOMEM, libc::EINVAL];
        let byte = self.byte();
        let mut world = self.world();
        match byte % 16 {
            0 => world.interruptions = 2,
            1 => world.send_error = Some(libc::ENOBUFS),
            2 => world.send_error = Some(libc::EINTR),
            3 => world.send_limit = Some(SEND_LIMIT),
            4 => world.send_limit = None,
            5 => world.refusal = Some(REFUSALS[usize::from(byte >> 4) % 3]),
            6 => world.land(),
            7 | 8 => world.lacks_capability = true,
            9 if self.sends.get() == 0 => world.regain_capability(),
            // The waiting thread should receive the answer, but it is now playing the other
            // threads.
            _ if self.receives.get() > 0 => {}
            10 | 11 => {
                drop(world);
                self.check_answer(self.library().socket().sync());
            }
            // A setting waits for senders if it finds that the other process has unbound the queue.
            _ if world.has_forked && self.sends.get() > 0 => {}
            _ => {
                drop(world);
                let place = usize::from(byte >> 4) % QUEUES;
                let queues = self.queues.borrow();
                let Some((queue, _)) = &queues[place] else {
                    return;
                };
                let answer = match byte % 4 {
                    0 => queue.set_mode(CopyMode::Packet, u32::MAX),
                    1 => queue.set_flags(ConfigFlags::GSO, ConfigFlags::GSO),
                    _ => queue.set_maxlen(7),
                };
                drop(queues);
                if answer
                    .as_ref()
                    .is_err_and(|error| error.raw_os_error() == Some(libc::ENODEV))
                {
                    // The other process has unbound the queue.
                    self.queues.borrow_mut()[place] = None;
                }
                self.check_answer(answer);
            }
        }
    }
}

/// Binding
impl Fuzz {
    fn check_answer<T>(&self, answer: Result<T>) -> Option<T> {
        match answer {
            Ok(answer) => return Some(answer),
            Err(Error::Refused(_)) => {}
            Err(Error::NoAck { .. }) => assert!(!self.world().has_answer(), "it was not lost"),
            Err(error) => panic!("{error:?}"),
        }
        None
    }

    fn bind(&self, bind: impl FnOnce(u16, &QueueConfig) -> Result<Queue>) {
        // A bind waits for senders, and for an answer. A program passes everything on before it.
        if self.sends.get() + self.receives.get() > 0 || self.holds_messages.get() {
            return;
        }
        let byte = self.byte();
        let num = u16::from(byte) % QUEUES as u16;
        let mut config = QueueConfig::new();
        if byte < 240 {
            config = config.copy_mode(CopyMode::Packet, u32::MAX);
        }
        let flags = ConfigFlags::CONNTRACK | ConfigFlags::GSO;
        config = match byte >> 4 & 3 {
            0 => config,
            1 => config.enable(ConfigFlags::GSO),
            _ => config.enable_if_supported(flags),
        };
        let bound = self.check_answer(bind(num, &config)).map(|queue| {
            let (key, flags) = (queue.key(0), queue.flags().bits());
            (queue, self.world().note_binding(key, flags))
        });
        // The library may have noticed an unbind by the other process.
        let place = &mut self.queues.borrow_mut()[usize::from(num)];
        let has_ended = |queue: &mut (Queue, u32)| !self.world().is_bound(num, queue.1);
        let ended = place.take_if(has_ended);
        assert!(ended.is_none() || self.world().has_forked);
        *place = place.take().or(bound);
    }

    fn unbind(&self) {
        let byte = self.byte();
        if self.sends.get() > 0 {
            return;
        }
        let queue = self.queues.borrow_mut()[usize::from(byte) % QUEUES].take();
        let Some((queue, _)) = queue else { return };
        if byte < 128 && self.receives.get() == 0 {
            self.check_answer(queue.destroy());
        }
    }

    /// Returns true if the key's binding still exists
    fn is_bound(&self, key: PacketKey) -> bool {
        let queue = &self.queues.borrow()[usize::from(key.queue())];
        let binding = queue.as_ref().map(|(queue, _)| queue.key(0).binding());
        binding == Some(key.binding())
    }
}

/// Receiving
impl Fuzz {
    fn receive(&self, byte: u8) {
        if self.style == Style::Pass {
            // The caller must not receive inside a callback.
            if !self.world().senders.contains(&Sender::Callback) {
                self.pass_on(byte);
            }
            return;
        }
        let Ok(mut batch) = self.received[usize::from(byte) % BATCHES].try_borrow_mut() else {
            return;
        };
        let batch = batch.as_mut().expect("it was made");
        let is_only_one = self.receives.get() + self.polls.get() == 0;
        let (was_readable, call) = (self.world().is_readable(), add(&self.calls));
        let timeout = Duration::from_micros(u64::from(byte >> 6) * 700);
        let how = byte >> 1 & 3;
        let received = match &*self.library() {
            Library::Socket(socket) => {
                let received = match how {
                    0 if is_only_one => socket.recv(batch).err(),
                    1 => socket.recv_timeout(batch, timeout).err(),
                    _ => socket.try_recv(batch).err(),
                };
                let most = match usize::from(byte >> 3 & 7) {
                    0 => usize::MAX,
                    n => n,
                };
                let events = batch.events().take(most).map(|event| self.note(event));
                received.map_or(Ok(events.count()), Err)
            }
            Library::Handle(handle) => self.call(|| match how {
                0 if is_only_one => handle.run_once(batch),
                1 => handle.run_timeout(batch, timeout),
                _ => handle.try_run_once(batch),
            }),
        };
        if how < 2 {
            self.is_woken.set(false);
        }
        match received {
            Ok(0) if how >= 2 && is_only_one => {
                assert!(!self.world().is_readable(), "the socket is not empty");
            }
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => {
                let is_last = self.calls.get() == call;
                assert!(!was_readable || !is_last, "a call waits though it need not");
            }
            Err(error) => assert!(
                self.style == Style::Run && is_of_callbacks(&error),
                "{error:?}"
            ),
        }
    }

    /// Receives on the descriptor and passes the datagrams on, perhaps in another order
    fn pass_on(&self, byte: u8) {
        let mut messages = Vec::new();
        for _ in 0..=byte >> 6 {
            let mut slot = vec![0; LONGEST - 64 * usize::from(byte >> 3 & 7)];
            let (mut slots, mut len) = (std::iter::once([&mut slot[..], &mut []]), [0]);
            if self.world().receive(&mut slots, &mut len).is_err() {
                break;
            }
            slot.truncate(len[0]);
            messages.push(slot);
        }
        if byte % 2 == 1 {
            messages.reverse();
        }
        // A message with a wrong length must be the last one.
        let count = messages.len();
        let mut passed = 0;
        for messages in messages.chunk_by(|message, _| is_whole(message)) {
            passed += messages.len();
            self.holds_messages.set(passed < count);
            let mut buffer = Vec::new();
            for message in messages {
                buffer.resize(buffer.len().next_multiple_of(4), 0);
                buffer.extend(message);
            }
            if let Library::Handle(handle) = &*self.library() {
                let handled = self.call(|| handle.handle_packet(&buffer));
                self.world().merging_ended = true;
                handled.unwrap_or_else(|error| {
                    assert!(is_of_callbacks(&error), "{error:?}");
                    0
                });
            }
        }
    }

    /// Runs callbacks, which may panic
    fn call(&self, run: impl FnOnce() -> Result<usize>) -> Result<usize> {
        self.send_as(Sender::Callback, || {
            catch_unwind(AssertUnwindSafe(run)).unwrap_or(Ok(1))
        })
    }

    fn note(&self, event: Event<'_>) {
        let key = match event {
            Event::Packet(packet) => {
                self.note_packet(&packet);
                packet.key()
            }
            Event::BufferTooSmall { key: Some(key), .. }
            | Event::Malformed { key: Some(key), .. } => {
                self.world().note(key, None);
                key
            }
            Event::Refused(_) => return self.refusals.set(self.refusals.get() + 1),
            _ => return,
        };
        self.held.borrow_mut().push(key);
    }

    fn note_packet(&self, packet: &Packet<'_>) {
        let number = |at: usize| {
            let bytes = packet.payload()[at..].first_chunk();
            u32::from_be_bytes(*bytes.expect("a number"))
        };
        assert_eq!(number(4), packet.id(), "its own payload");
        self.world().note(packet.key(), Some(number(0)));
    }
}

/// Returns true if `run_once` or `handle_packet` may report this
fn is_of_callbacks(error: &Error) -> bool {
    match error {
        Error::Io { .. } | Error::BufferTooSmall { .. } | Error::Decode { .. } => true,
        // Another thread runs the callbacks; here it is the same thread.
        Error::InCallback => this(|fuzz| fuzz.world().senders.contains(&Sender::Callback)),
        _ => false,
    }
}

fn choose(byte: u8) -> Decision<'static> {
    const LONG: &[u8] = &[0x45; SEND_LIMIT];
    match byte % 16 {
        0..=6 => Verdict::Accept.into(),
        7..=9 => Verdict::Drop.into(),
        10 => Verdict::Accept.with_mark(7),
        11 => Verdict::Accept.with_mark(8),
        12 => Verdict::Accept.with_payload(&LONG[..1500]),
        13 => Verdict::Drop.with_payload(LONG),
        14 => Verdict::Stolen.into(),
        _ => Verdict::Repeat.into(),
    }
}

/// Answering
impl Fuzz {
    fn hold_again(&self) {
        self.held.borrow_mut().append(&mut self.world().again);
    }

    /// Takes a held packet, mostly the oldest
    fn take_held(&self) -> Option<PacketKey> {
        let place = usize::from(self.byte()).saturating_sub(200);
        let mut held = self.held.borrow_mut();
        (place < held.len()).then(|| held.remove(place))
    }

    fn decide(&self, key: PacketKey, sender: Sender, byte: u8) -> Decision<'static> {
        let decision = choose(byte);
        let (verdict, mark) = (decision.verdict().to_raw(), decision.mark());
        let given = (verdict, mark, decision.payload().map(<[u8]>::len));
        self.world().decide(key, Fate::Decided(sender, given));
        decision
    }

    fn send_as<T>(&self, sender: Sender, send: impl FnOnce() -> T) -> T {
        self.world().senders.push(sender);
        let sent = send();
        self.world().senders.pop();
        sent
    }

    fn push(&self) {
        let byte = self.byte();
        let index = usize::from(byte >> 4) % BATCHES;
        let Ok(mut batch) = self.verdicts[index].try_borrow_mut() else {
            return;
        };
        for _ in 0..=byte >> 6 {
            if let Some(key) = self.take_held() {
                let decision = self.decide(key, Sender::Batch(index), byte);
                batch.push(key, decision).expect("it can be sent");
                self.pushed[index].borrow_mut().push(key);
            }
        }
    }

    fn send(&self, index: usize) {
        let Ok(mut batch) = self.verdicts[index].try_borrow_mut() else {
            return;
        };
        let library = self.library();
        let sent = self.send_as(Sender::Batch(index), || library.socket().send(&mut batch));
        match sent {
            Ok(()) => assert!(batch.is_empty()),
            Err(error) => assert!(matches!(error, Error::Io { .. }), "{error:?}"),
        }
        let mut pushed = self.pushed[index].borrow_mut();
        let done = pushed.len() - batch.len();
        for key in pushed.drain(..done) {
            let late = u64::from(!self.is_bound(key));
            self.late_verdicts.set(self.late_verdicts.get() + late);
        }
    }

    fn answer_alone(&self) {
        let byte = self.byte();
        let Some(key) = self.take_held() else {
            return;
        };
        let is_bound = self.is_bound(key);
        let sender = self.library().socket().verdict_sender();
        let sent = if byte < 240 {
            let decision = self.decide(key, Sender::Alone, byte);
            self.send_as(Sender::Alone, || sender.set_verdict(key, decision))
        } else {
            let verdict = [Verdict::Accept, Verdict::Drop][usize::from(byte % 2)];
            self.send_as(Sender::UpTo, || sender.set_verdict_up_to(key, verdict))
        };
        match sent {
            Ok(()) => assert!(is_bound),
            Err(Error::Unbound { .. }) => assert!(!is_bound),
            Err(error) => assert!(matches!(error, Error::Io { .. }), "{error:?}"),
        }
    }

    fn call_back(&self, data: &mut QueueData<'_>) {
        self.note_packet(data.packet());
        let (key, byte) = (data.key(), self.byte());
        if byte >= 192 {
            self.held.borrow_mut().push(key);
        } else {
            let first = if byte >= 160 { byte >> 4 } else { byte };
            data.set_decision(&choose(first)).expect("it can be sent");
            let decision = self.decide(key, Sender::Callback, byte);
            data.set_decision(&decision).expect("it can be sent");
        }
        match self.byte() % 32 {
            16..=18 => drop(data.send_now()),
            19 => self.pass(Duration::from_millis(1)),
            20..=22 => self.answer_alone(),
            23 => self.send(0),
            24 => self.unbind(),
            25 => self.bind(|num, config| data.handle().create_queue_with(num, config, call_back)),
            26 => self.set(),
            27..=29 => resume_unwind(Box::new("a callback's own panic")),
            _ => {}
        }
    }
}

fn call_back(data: &mut QueueData<'_>) {
    this(|fuzz| fuzz.call_back(data));
}

/// In the end
impl Fuzz {
    fn end(&self) {
        self.world().send_error = None;
        self.world().refusal = None;
        self.world().send_limit = None;
        self.world().interruptions = 0;
        self.receive_all();
        self.world().regain_capability();
        (0..BATCHES).for_each(|index| self.send(index));
        self.receive_all();
        self.check();
        self.queues.take();
        drop(self.library.take());
    }

    /// Takes all events from the batches, and receives while the descriptor is readable
    fn receive_all(&self) {
        /// `try_recv` or `try_run_once` into the first batch
        const TRY: u8 = 4;
        for (batch, index) in self.received.iter().zip(TRY..) {
            let has_events = || batch.borrow().as_ref().is_some_and(RecvBatch::has_events);
            // A batch without events may have a callback's verdicts.
            let mut is_first = self.style == Style::Run;
            while has_events() || is_first {
                self.receive(index);
                is_first = false;
            }
        }
        // The other process may have received the message behind the descriptor's readiness.
        if self.world().is_shared {
            self.receive(TRY);
        }
        while self.world().is_readable() {
            self.receive(TRY);
        }
    }

    fn check(&self) {
        let stats = self.library().socket().stats();
        let (world, queues) = (&*self.world(), &*self.queues.borrow());
        for (bound, queue) in world.queues.iter().zip(queues) {
            let (Some(bound), Some((_, generation))) = (bound, queue) else {
                continue;
            };
            let may_wait = |fate| match fate {
                Fate::Undecided | Fate::Decided(Sender::OtherProcess, _) => true,
                Fate::Decided(Sender::Callback, _) => self.gave_up.get(),
                Fate::Decided(..) => bound.generation != *generation,
            };
            for (id, fate) in &bound.waiting {
                assert!(may_wait(*fate), "packet {id} has no verdict: {fate:?}");
            }
        }
        let (mut yielded, mut may_lack) = (world.yielded_unread, 0);
        for (name, handed) in &world.handed {
            // A handle reports only the first unreadable packet of a call.
            let is_reported = handed.is_sound || self.style == Style::Loop;
            let queue = queues[usize::from(name.0)].as_ref();
            let is_bound = queue.is_some_and(|queue| queue.1 == name.1);
            let is_lost = handed.times == 0 && is_bound && is_reported;
            assert!(!is_lost, "{name:?} was not yielded");
            yielded += u64::from(handed.times);
            may_lack += u64::from(handed.times == 0 && !is_reported);
        }
        let lack = stats.packets - stats.after_unbind - yielded;
        assert!(lack <= may_lack, "{lack} packets are missing: {stats:?}");
        assert_eq!(stats.refused_verdicts, self.refusals.get());
        if self.style == Style::Loop {
            assert_eq!(stats.overruns, world.overruns);
            assert_eq!(stats.late_verdicts, self.late_verdicts.get());
        }
    }
}
