//! The callback API, with the names of libnetfilter_queue and its wrappers; uses [`Socket`]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use nfqnl_proto::consts::{MESSAGE_HEADER_LEN, align};
use nfqnl_proto::{ConfigRequest, Family, Packet, QueueConfig};

use crate::data::QueueData;
use crate::engine::{Binding, BindingId, Wait};
use crate::error::{Error, Operation, Result};
use crate::event::{Event, decode};
use crate::queue::Queue;
use crate::recv_batch::RecvBatch;
use crate::socket::{Socket, timer, wait_for};
use crate::sys;
use crate::verdict::SendBatch;

/// A connection to the kernel's packet queues, with a callback for each queue
///
/// Receive on the descriptor ([`fd`](Self::fd)) and pass the bytes to
/// [`handle_packet`](Self::handle_packet), which calls back for each packet. Or let
/// [`run_once`](Self::run_once) receive many packets in one call, which is about twice as fast.
/// Use only one of the two.
///
/// ```no_run
/// use nfqnl::{CopyMode, RecvBatch, Verdict};
///
/// # fn main() -> nfqnl::Result<()> {
/// let mut seen = 0; // a callback may borrow what is declared before the handle
/// let handle = nfqnl::open()?;
/// let queue = handle.create_queue(1, |data| {
///     seen += 1;
///     data.set_verdict(Verdict::Accept, None);
/// })?;
/// queue.set_mode(CopyMode::Packet, 0xffff)?;
/// let mut batch = RecvBatch::default();
/// loop {
///     handle.run_once(&mut batch)?;
/// }
/// # }
/// ```
///
/// All methods take `&self`, so threads may share a handle. Each callback has its own lock: only
/// one thread at a time runs it, and a slow callback does not delay other threads' requests,
/// statistics or callbacks of other queues.
///
/// [`socket`](Self::socket) has everything else: counters, later verdicts, wakers.
#[doc(alias = "nfq_handle")]
pub struct Handle<'cb> {
    // Dropped before the socket: a callback may own a `Queue`.
    callbacks: Callbacks<'cb>,
    socket: Socket,
}

struct Callbacks<'cb> {
    entries: Mutex<BTreeMap<BindingId, Arc<Entry<'cb>>>>,
    /// [`Engine::endings`](crate::engine::Engine::endings) when ended entries were last removed
    endings: AtomicUsize,
    on_event: Mutex<Option<EventCallback<'cb>>>,
}

struct Entry<'cb> {
    binding: Arc<Binding>,
    callback: Mutex<Callback<'cb>>,
}

type Callback<'cb> = Box<dyn FnMut(&mut QueueData<'_>) + Send + 'cb>;
type EventCallback<'cb> = Box<dyn FnMut(Event<'_>) + Send + 'cb>;

/// Locks a mutex, also after a panic in a callback: the callback stays as it was
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'cb> Callbacks<'cb> {
    fn get(&self, id: BindingId) -> Option<Arc<Entry<'cb>>> {
        lock(&self.entries).get(&id).cloned()
    }

    fn insert(&self, binding: &Arc<Binding>, callback: Callback<'cb>) {
        let entry = Entry {
            binding: Arc::clone(binding),
            callback: Mutex::new(callback),
        };
        let before = lock(&self.entries).insert(binding.id, Arc::new(entry));
        drop(before); // after unlocking: its captures may use the handle
    }

    /// Drops the callbacks of queues that have ended
    fn remove_ended(&self, endings: usize) {
        // Two threads may both go on from here; the second one finds nothing.
        if self.endings.load(Relaxed) == endings {
            return;
        }
        self.endings.store(endings, Relaxed);
        let mut ended = Vec::new(); // dropped after unlocking: its captures may use the handle
        lock(&self.entries).retain(|_, entry| {
            let has_ended = entry.binding.has_ended();
            ended.extend(has_ended.then(|| Arc::clone(entry)));
            !has_ended
        });
    }
}

/// Opens a [`Handle`] with the default settings
///
/// # Errors
/// As [`SocketBuilder::open`](crate::SocketBuilder::open).
#[doc(alias = "nfq_open")]
pub fn open<'cb>() -> Result<Handle<'cb>> {
    Handle::open()
}

impl<'cb> Handle<'cb> {
    /// Opens a handle with the default settings
    ///
    /// # Errors
    /// As [`SocketBuilder::open`](crate::SocketBuilder::open).
    #[doc(alias = "nfq_open")]
    pub fn open() -> Result<Self> {
        Socket::open().map(Self::new)
    }

    /// Wraps a socket; [`Socket::builder`] has its settings
    #[must_use]
    pub fn new(socket: Socket) -> Self {
        let may_be_read = &socket.engine.may_be_read_outside;
        may_be_read.store(true, Relaxed);
        Self {
            callbacks: Callbacks {
                entries: Mutex::default(),
                endings: AtomicUsize::new(0),
                on_event: Mutex::default(),
            },
            socket,
        }
    }

    /// Returns the socket: counters, later verdicts, wakers, sync
    #[must_use]
    pub const fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Binds a protocol family, as was necessary before Linux 3.8; later kernels only acknowledge
    /// it
    ///
    /// # Errors
    /// [`Error::Refused`]: no `CAP_NET_ADMIN`. [`Error::NoAck`]; [`Error::Io`].
    #[doc(alias = "nfq_bind_pf")]
    pub fn bind_pf(&self, family: Family) -> Result<()> {
        let op = Operation::BindPf(family);
        self.socket
            .engine
            .configure(op, &ConfigRequest::bind_pf(family))
    }

    /// Unbinds a protocol family; see [`bind_pf`](Self::bind_pf)
    ///
    /// # Errors
    /// As [`bind_pf`](Self::bind_pf).
    #[doc(alias = "nfq_unbind_pf")]
    pub fn unbind_pf(&self, family: Family) -> Result<()> {
        let op = Operation::UnbindPf(family);
        self.socket
            .engine
            .configure(op, &ConfigRequest::unbind_pf(family))
    }

    /// Creates a queue with a callback for each packet; the kernel **drops its packets until
    /// [`set_mode`](Queue::set_mode)**, as with libnetfilter_queue
    ///
    /// [`create_queue_with`](Self::create_queue_with) sets the mode in the same message. The
    /// callback is dropped with the handle, or earlier, by the first call of the handle after its
    /// queue has ended.
    ///
    /// # Errors
    /// As [`Socket::bind_with`].
    #[doc(alias = "nfq_create_queue")]
    pub fn create_queue(
        &self,
        num: u16,
        callback: impl FnMut(&mut QueueData<'_>) + Send + 'cb,
    ) -> Result<Queue> {
        self.create_queue_with(num, &QueueConfig::new(), callback)
    }

    /// Same as [`create_queue`](Self::create_queue), with settings as in [`Socket::bind_with`]
    ///
    /// # Errors
    /// As [`Socket::bind_with`].
    pub fn create_queue_with(
        &self,
        num: u16,
        config: &QueueConfig,
        callback: impl FnMut(&mut QueueData<'_>) + Send + 'cb,
    ) -> Result<Queue> {
        self.create(num, config, Box::new(callback))
    }

    fn create(&self, num: u16, config: &QueueConfig, callback: Callback<'cb>) -> Result<Queue> {
        let engine = &self.socket.engine;
        // Another thread may handle a packet before this thread gets the acknowledgement.
        let binding = engine.bind(num, *config, |binding| {
            self.callbacks.insert(binding, callback);
        });
        self.callbacks.remove_ended(engine.endings());
        Ok(Queue::new(engine, binding?))
    }

    /// Sets the callback of a queue bound by [`Socket::bind`] or taken over by [`Socket::adopt`]
    ///
    /// Replaces an earlier callback. The callback must not call this method for its own queue.
    pub fn set_callback(
        &self,
        queue: &Queue,
        callback: impl FnMut(&mut QueueData<'_>) + Send + 'cb,
    ) {
        self.callbacks.insert(queue.binding(), Box::new(callback));
    }

    /// Returns the socket without its callbacks, for instance to give it away
    /// ([`Socket::into_fd`])
    ///
    /// The callbacks are dropped. A [`Queue`] that a callback owns is unbound then.
    #[must_use]
    pub fn into_socket(self) -> Socket {
        self.socket
    }

    /// Sets a callback for all other events: refused verdicts, overruns, packets of queues without
    /// a callback, packets longer than the buffer, malformed messages
    ///
    /// Without this callback [`Stats`](crate::Stats) counts these events. The last two kinds are
    /// also errors of the call that handles them; if there are several, it returns the first. The
    /// callback must not call this method. It answers packets with a
    /// [`VerdictSender`](crate::VerdictSender):
    ///
    /// ```no_run
    /// # fn main() -> nfqnl::Result<()> {
    /// use nfqnl::{Event, Verdict};
    ///
    /// let handle = nfqnl::open()?;
    /// let sender = handle.socket().verdict_sender();
    /// handle.on_event(move |event| match event {
    ///     Event::BufferTooSmall { key: Some(key), .. } => {
    ///         if let Err(error) = sender.set_verdict(key, Verdict::Drop) {
    ///             eprintln!("{error}");
    ///         }
    ///     }
    ///     other => eprintln!("{other}"),
    /// });
    /// # Ok(())
    /// # }
    /// ```
    pub fn on_event(&self, callback: impl FnMut(Event<'_>) + Send + 'cb) {
        let before = lock(&self.callbacks.on_event).replace(Box::new(callback));
        drop(before);
    }

    /// Returns the descriptor, to wait for or to receive from; [`AsFd`] returns it with a lifetime
    #[must_use]
    #[doc(alias = "nfq_fd")]
    pub fn fd(&self) -> RawFd {
        self.as_raw_fd()
    }

    /// Unbinds all queues, waits until the kernel has done so, and closes the socket
    ///
    /// # Errors
    /// As [`Socket::close`].
    #[doc(alias = "nfq_close")]
    pub fn close(self) -> Result<()> {
        self.socket.close()
    }

    /// Calls back for each packet in the received bytes, and returns the number of packets
    ///
    /// The example `print_packets` uses it.
    ///
    /// The caller receives the bytes on the descriptor. A buffer of
    /// [`RecvBatch::DEFAULT_SLOT_LEN`] bytes takes any packet. The receive call may fail with
    /// `ENOBUFS` (packets were lost) or `EINTR`; neither is a reason to stop. Pass on everything,
    /// from all threads: the bytes may be the answer to a request. So do not keep the handle in a
    /// mutex: a request that holds the mutex would wait for the thread that receives. The call also
    /// delivers packets read by earlier requests. Each verdict is sent when its callback exits.
    ///
    /// Pass on everything received so far before you bind a queue number again. Afterwards a
    /// packet of the old binding looks like a packet of the new one.
    ///
    /// From the first call on, verdicts of this handle are not merged, because the library does
    /// not know the order in which the kernel sent the packets.
    ///
    /// If a callback panics, its verdict is sent, and the next call delivers the remaining
    /// packets.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`]: the packet still waits. [`Error::Decode`] if the bytes are not
    /// netlink messages. [`Error::Io`] if a verdict could not be sent. The call handles all of the
    /// bytes before it returns the first error; [`on_event`](Self::on_event) gets all.
    /// [`Error::InCallback`]: nothing was done.
    #[doc(alias = "nfq_handle_packet")]
    pub fn handle_packet(&self, datagram: &[u8]) -> Result<usize> {
        let _inside = Inside::enter(self.socket.engine.id)?;
        let mut verdicts = self.socket.engine.take_spare();
        let handled = self.turn(&mut verdicts, true, |turn| {
            let engine = &turn.handle.socket.engine;
            let mut rest = datagram;
            let mut has_stash = datagram.is_empty();
            while let Some((message, behind)) = split_message(rest) {
                match engine.take_in(message, message.len() == datagram.len()) {
                    Some(kind) => {
                        if let Some(event) = decode(message, kind) {
                            turn.dispatch(event);
                        }
                    }
                    None => has_stash = true,
                }
                rest = behind;
            }
            while let Some(stashed) = has_stash.then(|| engine.pop_stash()).flatten() {
                if let Some(event) = stashed.event() {
                    turn.dispatch(event);
                }
            }
        });
        self.socket.engine.put_spare(verdicts);
        handled
    }

    /// Receives packets, calls back for each one, sends the verdicts, and returns the number of
    /// packets; waits if there is nothing
    ///
    /// This is one turn of the caller's loop: [`handle_packet`](Self::handle_packet) for many
    /// packets. The verdicts are sent together after the last callback of the batch, or once the
    /// oldest of them is a millisecond old. A callback calls [`QueueData::send_now`] before it
    /// waits.
    ///
    /// The number is 0 if only other events came, if a [`Waker`](crate::Waker) ended the call, or
    /// if the call first sent verdicts left by a failed call.
    ///
    /// If a callback panics, the verdicts set so far are sent, and the next call with this batch
    /// delivers the remaining packets.
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`]: the packet still waits. [`Error::Decode`] for malformed
    /// messages. [`Error::Io`] if the receive or the send fails; the next call with this batch
    /// sends the unsent verdicts. The call handles the whole batch before it returns the first
    /// error; [`on_event`](Self::on_event) gets all. [`Error::WrongSocket`] as [`Socket::recv`].
    /// [`Error::InCallback`].
    pub fn run_once(&self, batch: &mut RecvBatch) -> Result<usize> {
        self.run(batch, Wait::Forever)
    }

    /// Same as [`run_once`](Self::run_once), but waits for at most `timeout`
    ///
    /// # Errors
    /// As [`run_once`](Self::run_once).
    pub fn run_timeout(&self, batch: &mut RecvBatch, timeout: Duration) -> Result<usize> {
        self.run(batch, wait_for(timeout))
    }

    /// Same as [`run_once`](Self::run_once), without waiting
    ///
    /// 0 means an empty socket: after edge-triggered epoll, repeat the call until it returns 0.
    /// After an error, call again too: the socket may not be empty.
    ///
    /// # Errors
    /// As [`run_once`](Self::run_once).
    pub fn try_run_once(&self, batch: &mut RecvBatch) -> Result<usize> {
        // Packets may follow a batch that has only other events.
        loop {
            let (had_events, packets) = self.turn_of(batch, Wait::No)?;
            if packets > 0 || !had_events {
                return Ok(packets);
            }
        }
    }

    /// Stops a queue without losing a packet, with its callback: see [`Socket::drain`]
    ///
    /// Packets that other threads have received on the descriptor, and not yet passed to
    /// [`handle_packet`](Self::handle_packet), are lost: stop these threads first.
    ///
    /// # Errors
    /// As [`Queue::set_flags`], [`run_once`](Self::run_once) and [`Queue::destroy`]. After an error
    /// or a panic of the callback the queue is dropped: its packets are lost, except with
    /// [`SocketBuilder::unbind_on_drop`](crate::SocketBuilder::unbind_on_drop) set to `false`.
    pub fn drain(&self, queue: Queue, batch: &mut RecvBatch, timeout: Duration) -> Result<u64> {
        let _inside = Inside::enter(self.socket.engine.id)?;
        self.socket.check_owner(&queue)?;
        self.socket.fill(batch, Wait::No)?; // refuses the batch of another socket
        let call_back = |event: Event<'_>, verdicts: &mut SendBatch| {
            let turn = self.turn(verdicts, false, |turn| turn.dispatch(event));
            turn.map(|_| ())
        };
        let mut verdicts = std::mem::take(&mut batch.verdicts);
        let is_over = timer(timeout);
        let drained = self
            .socket
            .drain_with(&queue, batch, &mut verdicts, is_over, call_back);
        batch.verdicts = verdicts; // unsent ones, after an error
        let waiting = drained?;
        queue.destroy().map(|()| waiting)
    }

    fn run(&self, batch: &mut RecvBatch, wait: Wait) -> Result<usize> {
        self.turn_of(batch, wait).map(|(_, packets)| packets)
    }

    /// Fills the batch and handles its events; returns true if it had any, and the number of
    /// packets
    fn turn_of(&self, batch: &mut RecvBatch, wait: Wait) -> Result<(bool, usize)> {
        let _inside = Inside::enter(self.socket.engine.id)?;
        let mut wait = wait;
        if !batch.verdicts.is_empty() && batch.owner() == Some(self.socket.engine.id) {
            self.socket.engine.send_batch(&mut batch.verdicts)?;
            wait = Wait::No; // the send may have read what the descriptor reported
        }
        let filled = self.socket.fill(batch, wait)?;
        let (events, verdicts) = batch.parts();
        let packets = self.turn(verdicts, false, |turn| {
            events.for_each(|event| turn.dispatch(event));
        });
        packets.map(|packets| (filled, packets))
    }

    /// Runs callbacks and sends their verdicts
    fn turn(
        &self,
        verdicts: &mut SendBatch,
        sends_each: bool,
        run: impl FnOnce(&mut Turn<'_, 'cb>),
    ) -> Result<usize> {
        self.callbacks.remove_ended(self.socket.engine.endings());
        let mut turn = Turn {
            handle: self,
            verdicts,
            sends_each,
            last: None,
            due: None,
            packets: 0,
            error: None,
        };
        run(&mut turn);
        turn.end()
    }
}

/// Splits off the first message; if its length is wrong, the message is all of the bytes
fn split_message(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let len = bytes.first_chunk().map(|len| u32::from_ne_bytes(*len));
    let len = len.and_then(|len| usize::try_from(len).ok()).unwrap_or(0);
    let message = bytes
        .get(..len)
        .filter(|message| message.len() >= MESSAGE_HEADER_LEN);
    let behind = bytes.get(align(len)..).unwrap_or_default();
    match message {
        Some(message) => Some((message, behind)),
        None => (!bytes.is_empty()).then_some((bytes, &[])),
    }
}

/// Marks a thread that is inside the callbacks of a handle
struct Inside;

thread_local! {
    /// The engines with callbacks running on this thread, outermost first
    static INSIDE: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

impl Inside {
    fn enter(id: usize) -> Result<Self> {
        INSIDE.with_borrow_mut(|inside| {
            if inside.contains(&id) {
                return Err(Error::InCallback);
            }
            inside.push(id);
            Ok(Self)
        })
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.with_borrow_mut(|inside| inside.pop());
    }
}

/// One call of `handle_packet` or `run_once`: continues after an error, and returns the first
struct Turn<'t, 'cb> {
    handle: &'t Handle<'cb>,
    /// Unsent verdicts of callbacks
    verdicts: &'t mut SendBatch,
    /// Send each verdict when its callback exits
    sends_each: bool,
    /// The callback of the last packet
    last: Option<Arc<Entry<'cb>>>,
    /// The time at which the oldest verdict that was not sent must be sent
    due: Option<Instant>,
    packets: usize,
    error: Option<Error>,
}

/// The longest time that a decided verdict waits for callbacks of other packets
pub(crate) const MAX_DELAY: Duration = Duration::from_millis(1);

impl Turn<'_, '_> {
    #[inline]
    fn dispatch(&mut self, event: Event<'_>) {
        match &event {
            Event::Packet(packet) => self.call_back(packet),
            _ => self.pass_on(event),
        }
    }

    // Not inline. So `dispatch` is inline, and copies no event.
    #[inline(never)]
    fn call_back(&mut self, packet: &Packet<'_>) {
        let key = packet.key();
        let last = self.last.take();
        let entry = last
            .filter(|entry| entry.binding.id == key.into())
            .or_else(|| self.handle.callbacks.get(key.into()));
        let engine = &self.handle.socket.engine;
        let entry = match entry {
            Some(entry) if !entry.binding.has_ended() => entry,
            None if engine.is_bound(key) => return self.pass_on(Event::Packet(*packet)),
            // An earlier callback, or another thread, has ended the queue.
            _ => return engine.count(|stats| stats.after_unbind += 1),
        };
        self.packets += 1;
        let mut callback = match entry.callback.try_lock() {
            Ok(callback) => callback,
            Err(TryLockError::Poisoned(callback)) => callback.into_inner(),
            Err(TryLockError::WouldBlock) => {
                // Another thread runs it; decided packets do not wait for the thread.
                self.send();
                lock(&entry.callback)
            }
        };
        callback(&mut QueueData::new(packet, self.verdicts, self.handle));
        drop(callback);
        self.last = Some(entry);
        self.send_if_due();
    }

    /// Sends the verdicts, after each callback or once the oldest verdict is old enough
    fn send_if_due(&mut self) {
        if self.verdicts.is_empty() {
            self.due = None;
            return;
        }
        if !self.sends_each {
            let now = sys::now();
            match self.due {
                None => return self.due = Some(now + MAX_DELAY),
                Some(due) if now < due => return,
                Some(_) => {}
            }
        }
        self.send();
    }

    fn send(&mut self) {
        self.due = None;
        let sent = self.handle.socket.engine.send_batch(self.verdicts);
        self.note(sent);
    }

    fn pass_on(&mut self, event: Event<'_>) {
        let key = match event {
            Event::Packet(packet) => Some(packet.key()),
            Event::BufferTooSmall { key, needed, had } => {
                self.note(Err(Error::BufferTooSmall { key, needed, had }));
                key
            }
            Event::Malformed { key, error: source } => {
                self.note(Err(Error::Decode { key, source }));
                key
            }
            _ => None,
        };
        if let Some(callback) = &mut *lock(&self.handle.callbacks.on_event) {
            if !self.verdicts.is_empty() {
                self.send(); // the callback may wait
            }
            callback(event);
        } else if key.is_some() {
            let engine = &self.handle.socket.engine;
            engine.count(|stats| stats.no_callback += 1);
        }
    }

    fn note(&mut self, result: Result<()>) {
        if let Err(error) = result {
            self.error.get_or_insert(error);
        }
    }

    fn end(&mut self) -> Result<usize> {
        if !self.verdicts.is_empty() {
            self.send();
        }
        match self.error.take() {
            None => Ok(self.packets),
            Some(error) => Err(error),
        }
    }
}

/// Sends the verdicts after a panic in a callback
impl Drop for Turn<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.send();
            self.handle.socket.engine.announce_stash();
        }
    }
}

/// The handle inside its callbacks; made by [`QueueData::handle`]
///
/// Callbacks created here are `'static`.
#[derive(Clone, Copy)]
pub struct HandleRef<'a> {
    handle: &'a (dyn Callable + 'a),
}

/// A handle without the lifetime of its callbacks
pub(crate) trait Callable: Sync {
    fn socket(&self) -> &Socket;
    fn create(&self, num: u16, config: &QueueConfig, callback: Callback<'static>) -> Result<Queue>;
}

impl Callable for Handle<'_> {
    fn socket(&self) -> &Socket {
        &self.socket
    }

    fn create(&self, num: u16, config: &QueueConfig, callback: Callback<'static>) -> Result<Queue> {
        Handle::create(self, num, config, callback)
    }
}

impl<'a> HandleRef<'a> {
    pub(crate) const fn new(handle: &'a (dyn Callable + 'a)) -> Self {
        Self { handle }
    }

    /// Same as [`Handle::socket`]
    #[must_use]
    pub fn socket(&self) -> &'a Socket {
        self.handle.socket()
    }

    /// Same as [`Handle::create_queue`]
    ///
    /// # Errors
    /// The same.
    #[doc(alias = "nfq_create_queue")]
    pub fn create_queue(
        &self,
        num: u16,
        callback: impl FnMut(&mut QueueData<'_>) + Send + 'static,
    ) -> Result<Queue> {
        self.create_queue_with(num, &QueueConfig::new(), callback)
    }

    /// Same as [`Handle::create_queue_with`]
    ///
    /// # Errors
    /// The same.
    pub fn create_queue_with(
        &self,
        num: u16,
        config: &QueueConfig,
        callback: impl FnMut(&mut QueueData<'_>) + Send + 'static,
    ) -> Result<Queue> {
        self.handle.create(num, config, Box::new(callback))
    }
}

impl fmt::Debug for HandleRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HandleRef").field(self.socket()).finish()
    }
}

impl fmt::Debug for Handle<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle")
            .field("socket", &self.socket)
            .field("callbacks", &lock(&self.callbacks.entries).len())
            .finish_non_exhaustive()
    }
}

impl AsFd for Handle<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Handle<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(len: u32, room: usize) -> Vec<u8> {
        let mut message = vec![0xff; room];
        message[..4].copy_from_slice(&len.to_ne_bytes());
        message
    }

    #[test]
    fn the_types_are_for_all_threads() {
        const fn is_send_and_sync<T: Send + Sync>() {}
        is_send_and_sync::<Handle<'_>>();
        is_send_and_sync::<Socket>();
        is_send_and_sync::<Queue>();
        is_send_and_sync::<RecvBatch>();
        is_send_and_sync::<SendBatch>();
        is_send_and_sync::<crate::VerdictSender>();
        is_send_and_sync::<crate::Waker>();
        is_send_and_sync::<crate::OwnedPacket>();
        is_send_and_sync::<Error>();
    }

    #[test]
    fn a_buffer_is_split_at_its_messages() {
        let all = [message(17, 20), message(16, 16), message(19, 19)];
        let bytes = all.concat();
        let (first, rest) = split_message(&bytes).unwrap();
        let (second, rest) = split_message(rest).unwrap();
        let (third, rest) = split_message(rest).unwrap();
        assert_eq!([first, second, third], [&all[0][..17], &all[1], &all[2]]);
        assert!(split_message(rest).is_none());
    }

    #[test]
    fn bytes_with_a_wrong_length_stay_together() {
        for len in [0, 1, 15, 33, u32::MAX - 3, u32::MAX] {
            let bytes = message(len, 32);
            assert_eq!(split_message(&bytes), Some((&bytes[..], &[][..])), "{len}");
        }
        assert_eq!(split_message(&[1, 0]), Some((&[1, 0][..], &[][..])));
        assert_eq!(split_message(&[]), None);
    }
}
