//! The handle: one socket, its queues, and the three ways to be driven

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use netlink_sys::{Socket, SocketAddr};
use nfqnl_proto::consts::NETLINK_NETFILTER;
use nfqnl_proto::{
    ConfigRequest, CopyMode, Decision, Family, Messages, Packet, PacketKey, QueueConfig,
};

use crate::batch::{Events, RecvBatch, Stashed};
use crate::bindings::{BindingId, Bindings};
use crate::data::QueueData;
use crate::error::{Error, Operation, Result};
use crate::event::{Event, next_event, packet_event, sole_packet};
use crate::owned::OwnedPacket;
use crate::queue::Queue;
use crate::sender::VerdictSender;
use crate::socket::{Origin, Shared};
use crate::stats::Stats;
use crate::sys::{self, Wait};
use crate::verdicts::VerdictBatch;

/// A connection to the kernel's packet queues
///
/// It owns no receive loop. Drive it in one of two styles, by any loop, thread or runtime, through its descriptor:
///
/// * **loop**: [`bind_queue`](Self::bind_queue), then [`recv`](Self::recv) or [`try_recv`](Self::try_recv) into a
///   [`RecvBatch`], and [`send`](Self::send) of a [`VerdictBatch`] or [`verdict`](Self::verdict) at any later time;
/// * **callback**: [`create_queue`](Self::create_queue), then receive on the descriptor yourself and pass what came to
///   [`handle_packet`](Self::handle_packet); or let [`run_once`](Self::run_once) receive and call back for many at once.
///
/// One style per handle. The descriptor is readable whenever there is something to receive, also when a configuration
/// call has read packets on its way; so waiting for it with poll, epoll or a runtime is always right, once the batch has
/// no more events ([`RecvBatch::has_events`]).
#[doc(alias = "nfq_handle")]
pub struct Handle {
    pub(crate) shared: Arc<Shared>,
    /// The bindings as of the last call of `handle_packet`
    bindings: Bindings,
    /// What callbacks have set and is not sent yet
    verdicts: VerdictBatch,
    /// In a mutex for `Sync` alone: they are only ever reached through `&mut self`
    callbacks: Mutex<Callbacks>,
}

#[derive(Default)]
struct Callbacks {
    /// By queue number
    packets: Vec<(BindingId, PacketHandler)>,
    events: Option<EventHandler>,
}

type PacketHandler = Box<dyn FnMut(&mut QueueData<'_>) + Send>;
type EventHandler = Box<dyn FnMut(Event<'_>) + Send>;

impl Callbacks {
    #[inline]
    fn get(&mut self, binding: BindingId) -> Option<&mut PacketHandler> {
        let index = self
            .packets
            .binary_search_by_key(&binding.queue, |(id, _)| id.queue)
            .ok()?;
        let (id, callback) = self.packets.get_mut(index)?;
        (*id == binding).then_some(callback)
    }

    fn insert(&mut self, binding: BindingId, callback: PacketHandler) {
        let place = self
            .packets
            .binary_search_by_key(&binding.queue, |(id, _)| id.queue);
        match place {
            Ok(index) | Err(index) => self.packets.insert(index, (binding, callback)),
        }
    }

    /// Drops those whose binding has ended
    fn retain(&mut self, bindings: &Bindings) {
        self.packets.retain(|(id, _)| bindings.is_current(*id));
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle")
            .field("shared", &self.shared)
            .finish_non_exhaustive()
    }
}

/// Opens a [`Handle`] with the default settings
///
/// # Errors
/// As [`HandleBuilder::open`].
#[doc(alias = "nfq_open")]
pub fn open() -> Result<Handle> {
    Handle::open()
}

/// Settings of a handle to be opened
#[derive(Clone, Debug)]
#[must_use]
pub struct HandleBuilder {
    recv_buffer: Option<usize>,
    report_overruns: bool,
    ack_timeout: Duration,
    coalesce: bool,
}

impl Default for HandleBuilder {
    fn default() -> Self {
        Self {
            recv_buffer: None,
            report_overruns: true,
            ack_timeout: Duration::from_secs(1),
            coalesce: true,
        }
    }
}

impl HandleBuilder {
    /// Size of the socket's receive buffer in bytes; the system's default (`net.core.rmem_default`) if not set
    ///
    /// The kernel doubles it, and charges each waiting message with 832 bytes, 2.3 KiB for a full Ethernet frame, and
    /// 66 KiB for a large packet with [`ConfigFlags::GSO`](crate::ConfigFlags::GSO); so the usual 212992 hold 237 to 277
    /// small packets (138 to 170 on s390x), 92 frames, or 3 large ones. Raise it for bursts; TCP sends in bursts, and 1 MiB is a good size for it
    /// (`benches/README.md` has what that brings). Beyond `net.core.rmem_max` it takes
    /// `CAP_NET_ADMIN` in the initial user namespace; without that, it ends there.
    #[doc(alias = "SO_RCVBUF")]
    #[doc(alias = "nfnl_rcvbufsiz")]
    pub const fn recv_buffer(mut self, bytes: usize) -> Self {
        self.recv_buffer = Some(bytes);
        self
    }

    /// Whether a full receive buffer is reported as [`Event::Overrun`]; it is, unless set otherwise
    ///
    /// Not only a matter of reporting: after a reported overrun the kernel drops every packet until the buffer is
    /// empty, and without reports it goes on as soon as there is room. Either way
    /// [`Stats::lost_packets`] counts what was lost. Without reports a send of several verdicts takes one system call more
    /// (for each 32 KiB), which asks for the kernel's count of losses: so set it here, not on the descriptor.
    #[doc(alias = "NETLINK_NO_ENOBUFS")]
    pub const fn report_overruns(mut self, report: bool) -> Self {
        self.report_overruns = report;
        self
    }

    /// How long a configuration call waits for its acknowledgement; one second if not set
    ///
    /// The kernel answers before the request's system call returns; only an answer that was lost takes this long. Time in
    /// which this process does not run, as when it is stopped, does not count.
    pub const fn ack_timeout(mut self, timeout: Duration) -> Self {
        self.ack_timeout = timeout;
        self
    }

    /// Whether runs of equal verdicts may leave as one message ([`VerdictBatch`]); they do, unless set otherwise
    ///
    /// A run is sent only when it is certain that every packet which it can reach has its verdict. Turn it off, which costs
    /// speed and nothing else, if
    /// * something reads packets from a copy of the descriptor behind this handle's back; passing them on to
    ///   [`handle_packet`](Handle::handle_packet) is no such thing, and ends runs by itself;
    /// * something takes the error of an overrun from the descriptor (`SO_ERROR`), or turns these errors off there
    ///   (`NETLINK_NO_ENOBUFS`) and not by [`report_overruns`](Self::report_overruns);
    /// * a security module (SELinux, AppArmor) forbids `CAP_NET_ADMIN` to single threads that send verdicts, though
    ///   `capget(2)` says that they have it.
    ///
    /// Before Linux 4.12, which does not count what a socket has lost, there are no runs.
    #[doc(alias = "nfq_set_verdict_batch")]
    pub const fn coalesce(mut self, coalesce: bool) -> Self {
        self.coalesce = coalesce;
        self
    }

    /// Opens a socket in the calling thread's network namespace
    ///
    /// # Errors
    /// [`Error::Io`]: no netfilter in this kernel, no descriptors left. Privileges are asked for later, by the first
    /// request.
    pub fn open(self) -> Result<Handle> {
        let socket = Socket::new(isize::from(NETLINK_NETFILTER)).map_err(open_error)?;
        self.set_up(socket, Origin::New)
    }

    /// Takes over a netfilter netlink socket that is open already, for instance one opened in another network
    /// namespace
    ///
    /// Queues that it has bound stay so, but are not this handle's: their packets are counted in
    /// [`Stats::discarded`], and binding them is refused as [`AlreadyBound`](crate::Situation::AlreadyBound). So any number
    /// may have been bound before, and to bind it takes as long as to bind it again ([`Handle::bind_queue`]).
    ///
    /// # Errors
    /// [`Error::NotNetfilter`]; [`Error::Io`].
    pub fn open_fd(self, fd: OwnedFd) -> Result<Handle> {
        let (domain, protocol) = sys::domain_and_protocol(fd.as_fd()).map_err(open_error)?;
        if domain != libc::AF_NETLINK || protocol != i32::from(NETLINK_NETFILTER) {
            return Err(Error::NotNetfilter { domain, protocol });
        }
        sys::set_cloexec(fd.as_fd()).map_err(open_error)?;
        self.set_up(sys::socket_from(fd), Origin::TakenOver)
    }

    fn set_up(self, mut socket: Socket, origin: Origin) -> Result<Handle> {
        if origin == Origin::TakenOver {
            // Out of all groups, to which other processes may send too
            let mut address = SocketAddr::new(0, 0);
            socket.get_address(&mut address).map_err(open_error)?;
            let in_none = SocketAddr::new(address.port_number(), 0);
            socket.bind(&in_none).map_err(open_error)?;
        }
        // From here on the kernel keeps other processes' messages away from this socket, which has a port now.
        socket.connect(&SocketAddr::new(0, 0)).map_err(open_error)?;
        // Errors shall not repeat the request, which may hold a whole packet; and shall carry the kernel's words. We
        // can do without: Linux has the first since 4.3 and the second since 4.12.
        for option in [socket.set_cap_ack(true), socket.set_ext_ack(true)] {
            match option {
                Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {}
                result => result.map_err(open_error)?,
            }
        }
        socket
            .set_no_enobufs(!self.report_overruns)
            .map_err(open_error)?;
        if let Some(bytes) = self.recv_buffer {
            let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX / 2);
            sys::set_recv_buffer(socket.as_fd(), bytes).map_err(|source| Error::Io {
                op: Operation::SetRecvBuffer,
                source,
            })?;
        }
        self.over(socket, origin)
    }

    fn over(self, socket: Socket, origin: Origin) -> Result<Handle> {
        let shared = Shared::new(
            socket,
            origin,
            self.ack_timeout,
            self.coalesce,
            self.report_overruns,
        );
        let shared = shared.map_err(open_error)?;
        shared.discard_foreign()?;
        Ok(Handle {
            shared: Arc::new(shared),
            bindings: Bindings::default(),
            verdicts: VerdictBatch::new(),
            callbacks: Mutex::default(),
        })
    }

    /// A handle over a socket that is left as it is, for a target's kernel to speak for
    #[cfg(fuzzing)]
    pub(crate) fn open_over(self, fd: OwnedFd, is_taken_over: bool) -> Result<Handle> {
        let origin = if is_taken_over {
            Origin::TakenOver
        } else {
            Origin::New
        };
        self.over(sys::socket_from(fd), origin)
    }
}

fn open_error(source: io::Error) -> Error {
    Error::Io {
        op: Operation::Open,
        source,
    }
}

impl Handle {
    /// Opens a handle with the default settings
    ///
    /// # Errors
    /// As [`HandleBuilder::open`].
    #[doc(alias = "nfq_open")]
    pub fn open() -> Result<Self> {
        Self::builder().open()
    }

    /// Settings for a handle to be opened
    pub fn builder() -> HandleBuilder {
        HandleBuilder::default()
    }

    /// Binds a protocol family, as programs did before Linux 3.8; since then the kernel acknowledges and does nothing
    ///
    /// # Errors
    /// [`Error::Refused`]: no `CAP_NET_ADMIN`. [`Error::NoAck`]; [`Error::Io`].
    #[doc(alias = "nfq_bind_pf")]
    pub fn bind_pf(&self, family: Family) -> Result<()> {
        self.shared
            .configure(Operation::BindPf(family), &ConfigRequest::bind_pf(family))
    }

    /// Unbinds a protocol family; see [`bind_pf`](Self::bind_pf)
    ///
    /// # Errors
    /// As [`bind_pf`](Self::bind_pf).
    #[doc(alias = "nfq_unbind_pf")]
    pub fn unbind_pf(&self, family: Family) -> Result<()> {
        self.shared.configure(
            Operation::UnbindPf(family),
            &ConfigRequest::unbind_pf(family),
        )
    }

    /// Waits until the kernel has processed every verdict sent so far, and every refusal has arrived
    ///
    /// The refusals are then there for the next receive call or [`handle_packet`](Self::handle_packet), unless they were
    /// lost in an overrun.
    ///
    /// # Errors
    /// [`Error::Refused`]: the process has dropped `CAP_NET_ADMIN`. [`Error::NoAck`]; [`Error::Io`].
    pub fn sync(&self) -> Result<()> {
        self.shared.sync(Operation::Sync)
    }

    /// What has been counted so far
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// The size of the socket's receive buffer in bytes, as the kernel counts it
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn recv_buffer(&self) -> Result<usize> {
        sys::recv_buffer(self.as_fd())
            .map(|bytes| usize::try_from(bytes).unwrap_or(0))
            .map_err(|source| Error::Io {
                op: Operation::GetRecvBuffer,
                source,
            })
    }

    /// Switches the descriptor to non-blocking, for callers who receive on it themselves
    ///
    /// The calls of this crate wait or don't by their own names, whatever is set here.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn set_nonblocking(&self, nonblocking: bool) -> Result<()> {
        self.shared
            .set_nonblocking(nonblocking)
            .map_err(|source| Error::Io {
                op: Operation::SetNonblocking,
                source,
            })
    }

    /// The descriptor, to wait for or to receive from; [`AsFd`] has it with a lifetime
    #[must_use]
    #[doc(alias = "nfq_fd")]
    pub fn fd(&self) -> RawFd {
        self.as_raw_fd()
    }

    /// Unbinds all queues, waits until the kernel has done so, and closes the socket
    ///
    /// The kernel drops what waits in the queues. Dropping the handle does the same without waiting or reporting.
    ///
    /// # Errors
    /// The first of the queues' [`Error::Refused`] or [`Error::NoAck`]; everything is closed all the same.
    #[doc(alias = "nfq_close")]
    pub fn close(self) -> Result<()> {
        let bindings = self.shared.present_bindings();
        let unbound = bindings.ids().map(|binding| self.shared.unbind(binding));
        unbound.fold(Ok(()), Result::and)
    }
}

/// Unbinds all queues without waiting, since the socket may live on in copies of the descriptor
impl Drop for Handle {
    fn drop(&mut self) {
        for binding in self.shared.present_bindings().ids() {
            self.shared.post_unbind(binding);
        }
    }
}

/// Answering, in either style
impl Handle {
    /// Answers a packet, now or at any later time, from any thread that has the handle; others use a
    /// [`verdict_sender`](Self::verdict_sender)
    ///
    /// In any order; but recent kernels drop a later segment of a new connection that is released before an earlier one.
    /// Before replacing a payload look at [`Packet::is_cut`](crate::Packet::is_cut): what was not copied would be lost.
    ///
    /// The kernel acts before this returns. If it refuses (most often because the packet has gone meanwhile), that
    /// comes out of the receive side as [`Event::Refused`] with the same key; [`sync`](Self::sync) waits for it.
    ///
    /// # Errors
    /// [`Error::Stale`] if the packet's binding of the queue has ended; [`Error::Encode`] or
    /// [`Error::PayloadTooShort`] for a payload that can't be; [`Error::Io`] if the send fails, with
    /// `EMSGSIZE` if the verdict is longer than the send buffer. Nothing was sent in any of these cases.
    #[doc(alias = "nfq_set_verdict")]
    #[doc(alias = "nfq_set_verdict2")]
    pub fn verdict<'p>(&self, key: PacketKey, decision: impl Into<Decision<'p>>) -> Result<()> {
        self.shared.verdict(key, &decision.into())
    }

    /// Sends collected verdicts, and empties the batch
    ///
    /// The kernel acts before this returns, as with [`verdict`](Self::verdict), and refusals come out of the receive
    /// side in the same way. What does not fit one system call takes more.
    ///
    /// # Errors
    /// [`Error::Stale`] names the first packet whose binding of its queue has ended; such verdicts are given up, and
    /// everything else has been sent. So is one that is longer than the socket's send buffer, with [`Error::Io`] and
    /// `EMSGSIZE`: its packet goes on waiting. Any other [`Error::Io`]: the send failed (`ENOBUFS`: the kernel is out of
    /// memory); what was not sent stays in the batch, and nothing of it was, so call again to go on.
    #[doc(alias = "nfq_set_verdict_batch")]
    #[doc(alias = "nfq_set_verdict_batch2")]
    pub fn send(&self, verdicts: &mut VerdictBatch) -> Result<()> {
        self.shared.send_verdicts(verdicts)
    }

    /// A way to answer packets that other threads can have, and outlives no handle
    #[must_use]
    pub fn verdict_sender(&self) -> VerdictSender {
        VerdictSender::new(&self.shared)
    }
}

/// The loop style
impl Handle {
    /// Binds a queue, to be received from: whole packets, and the kernel's defaults otherwise
    ///
    /// Binding a number again that this handle has had before takes some 20 ms, and 100 with one CPU: first all packets of the earlier
    /// binding have to be out of the kernel, so that none is taken for one of the new.
    ///
    /// # Errors
    /// As [`bind_queue_with`](Self::bind_queue_with).
    pub fn bind_queue(&self, num: u16) -> Result<Queue> {
        self.bind_queue_with(
            num,
            &QueueConfig::new().copy_mode(CopyMode::PACKET, u32::MAX),
        )
    }

    /// Binds a queue with its settings in one message: no packet finds it half made
    ///
    /// A copy mode other than [`CopyMode::NONE`] must be among the settings, now or soon: without one the kernel
    /// drops every packet.
    ///
    /// # Errors
    /// [`Error::Refused`] with [`Situation::NotPermitted`](crate::Situation::NotPermitted) if the process has no
    /// `CAP_NET_ADMIN`, or another socket has the queue; with [`AlreadyBound`](crate::Situation::AlreadyBound) if this
    /// handle has it; with [`Unsupported`](crate::Situation::Unsupported) if the kernel does not know a flag, and then
    /// nothing is bound. [`Error::ZeroMaxlen`]; [`Error::UnknownCopyMode`]; [`Error::NoAck`].
    pub fn bind_queue_with(&self, num: u16, config: &QueueConfig) -> Result<Queue> {
        let binding = self.shared.bind(num, *config, false)?;
        Ok(Queue::new(&self.shared, binding))
    }

    /// Receives what is there, and waits if nothing is
    ///
    /// What is left in the batch from the last call comes first, without asking the kernel. After calls that got a single
    /// packet, the next few ask for one only, which is faster for a packet that comes alone; what is behind it comes with the
    /// following call. Nothing but something to receive ends the wait, no signal either: to be able to stop, use
    /// [`recv_deadline`](Self::recv_deadline), or wait for the descriptor and something else.
    ///
    /// Several threads may call it on one handle, each with its own batch: one waits in the kernel, and the others for that
    /// one. Each gets its packets in their order.
    ///
    /// # Errors
    /// [`Error::Io`] if the system call fails in a way that is no [`Event`].
    pub fn recv<'b>(&self, batch: &'b mut RecvBatch) -> Result<Events<'b>> {
        while !self.shared.fill(batch, Wait::ForFirst)? {
            self.shared.wait(None)?;
        }
        Ok(batch.events())
    }

    /// Receives what is there, and waits until `deadline` if nothing is; no events if it passes
    ///
    /// # Errors
    /// As [`recv`](Self::recv).
    pub fn recv_deadline<'b>(
        &self,
        batch: &'b mut RecvBatch,
        deadline: Instant,
    ) -> Result<Events<'b>> {
        while !self.shared.fill(batch, Wait::No)? && self.shared.wait(Some(deadline))? {}
        Ok(batch.events())
    }

    /// Receives what is there; no events if nothing is
    ///
    /// No events means that the socket was empty, or that a thread which waits in [`recv`](Self::recv) has emptied it, so a loop that is told of readiness only once (edge-triggered epoll)
    /// calls this until then.
    ///
    /// # Errors
    /// As [`recv`](Self::recv).
    pub fn try_recv<'b>(&self, batch: &'b mut RecvBatch) -> Result<Events<'b>> {
        self.shared.fill(batch, Wait::No)?;
        Ok(batch.events())
    }
}

/// The callback style
impl Handle {
    /// Binds a queue, and has [`handle_packet`](Self::handle_packet) call back for each of its packets
    ///
    /// The callback is dropped when a call of the handle finds its queue ended, or with the handle.
    ///
    /// As in libnetfilter_queue the queue begins with [`CopyMode::NONE`], in which the kernel **drops** its packets:
    /// call [`Queue::set_mode`] next, or use [`create_queue_with`](Self::create_queue_with), which leaves no gap.
    ///
    /// # Errors
    /// As [`bind_queue_with`](Self::bind_queue_with).
    #[doc(alias = "nfq_create_queue")]
    pub fn create_queue(
        &mut self,
        num: u16,
        callback: impl FnMut(&mut QueueData<'_>) + Send + 'static,
    ) -> Result<Queue> {
        self.create_queue_with(num, &QueueConfig::new(), callback)
    }

    /// The same, with settings in the same message
    ///
    /// # Errors
    /// As [`bind_queue_with`](Self::bind_queue_with).
    pub fn create_queue_with(
        &mut self,
        num: u16,
        config: &QueueConfig,
        callback: impl FnMut(&mut QueueData<'_>) + Send + 'static,
    ) -> Result<Queue> {
        let binding = self.shared.bind(num, *config, true)?;
        let bindings = self.shared.present_bindings();
        let callbacks = self.callbacks();
        callbacks.retain(&bindings);
        callbacks.insert(binding, Box::new(callback));
        Ok(Queue::new(&self.shared, binding))
    }

    /// Calls `handler` for what [`handle_packet`](Self::handle_packet) meets and no callback takes: refused verdicts,
    /// overruns, packets of queues without a callback
    ///
    /// Without a handler they are counted in [`stats`](Self::stats), and nothing else.
    pub fn on_event(&mut self, handler: impl FnMut(Event<'_>) + Send + 'static) {
        self.callbacks().events = Some(Box::new(handler));
    }

    fn callbacks(&mut self) -> &mut Callbacks {
        self.callbacks
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one datagram that the caller has received on the descriptor, calls back for each packet in it (and for
    /// those that a configuration call has met before), sends the verdicts, and returns how many packets there were
    ///
    /// A receive buffer of [`RecvBatch::DEFAULT_SLOT_LEN`] bytes takes any packet. The caller's receive call may fail
    /// with `ENOBUFS` (packets were lost) and `EINTR`; both are no reason to stop.
    ///
    /// Pass on everything that was received before you bind a queue number once more: afterwards, a packet of the old
    /// binding can't be told from one of the new.
    ///
    /// A callback that panics leaves the handle as it was: the panic goes on to the caller, and what was not yet
    /// looked at comes with the next call.
    ///
    /// # Errors
    /// [`Error::Truncated`] if the buffer was too small: the packet still waits. [`Error::Decode`] if these are no
    /// netlink messages. [`Error::Io`] if a verdict could not be sent, as by [`send`](Self::send); one on a queue
    /// that has ended is no error, since its packet has ended with it. Everything else in the datagram is dealt with before
    /// the first error is returned.
    #[doc(alias = "nfq_handle_packet")]
    pub fn handle_packet(&mut self, datagram: &[u8]) -> Result<usize> {
        let packet = sole_packet(datagram);
        let taken_in = self
            .shared
            .take_in(datagram, packet.as_ref(), &mut self.bindings);
        let (was_old, stashed) = taken_in;
        if was_old {
            let bindings = self.bindings.clone();
            self.callbacks().retain(&bindings);
        }
        let mut turn = self.turn(None);
        match (stashed, packet) {
            (Some(all), _) => turn.rest = all,
            (None, Some(packet)) => {
                if let Some(event) = packet_event(packet, turn.bindings) {
                    turn.handle(event);
                }
            }
            (None, None) => turn.handle_datagram(datagram),
        }
        while let Some(next) = turn.rest.pop_front() {
            match next {
                Stashed::Datagram(bytes) => turn.handle_datagram(&bytes),
                Stashed::Overrun => turn.pass_on(Event::Overrun),
            }
        }
        turn.end()
    }

    /// Receives what is there, waits if nothing is, calls back for each packet, sends the verdicts, and returns how many
    /// packets there were
    ///
    /// The batched form of receiving and [`handle_packet`](Self::handle_packet): one turn of a loop that stays the
    /// caller's. The verdicts are executed when the callbacks of all packets in the batch have exited.
    ///
    /// A callback that panics leaves the handle as it was: what was set before is sent, the panic goes on to the caller,
    /// and the packets behind come with the next call that gets this batch.
    ///
    /// # Errors
    /// [`Error::Truncated`] if a slot of the batch was too small: the packet still waits. [`Error::Io`] if the receive
    /// or the send fails; verdicts that were not sent are sent by the next call, but for one that is too long, as by
    /// [`send`](Self::send). A queue that has ended under its packets is no error. [`Error::Decode`] for malformed messages. Everything in the batch is dealt with before the
    /// first error is returned.
    pub fn run_once(&mut self, batch: &mut RecvBatch) -> Result<usize> {
        while !self.fill(batch, Wait::ForFirst)? {
            self.shared.wait(None)?;
        }
        self.call_back(batch)
    }

    /// The same without waiting: 0 if no packet is there
    ///
    /// 0 means that the socket was empty, so a loop that is told of readiness only once (edge-triggered epoll) calls this
    /// until then. An error says nothing about that: call again.
    ///
    /// # Errors
    /// As [`run_once`](Self::run_once).
    pub fn try_run_once(&mut self, batch: &mut RecvBatch) -> Result<usize> {
        // What is no packet may be all that a batch has, with packets behind it.
        while self.fill(batch, Wait::No)? {
            match self.call_back(batch)? {
                0 => {}
                packets => return Ok(packets),
            }
        }
        Ok(0)
    }

    /// Fills the batch, and drops the callbacks of queues that have ended
    fn fill(&mut self, batch: &mut RecvBatch, wait: Wait) -> Result<bool> {
        let filled = self.shared.fill(batch, wait)?;
        let (_, bindings) = batch.parts();
        if !bindings.is(&self.bindings) {
            self.bindings.clone_from(bindings);
            self.callbacks().retain(bindings);
        }
        Ok(filled)
    }

    fn call_back(&mut self, batch: &mut RecvBatch) -> Result<usize> {
        let (events, bindings) = batch.parts();
        let mut turn = self.turn(Some(bindings));
        for event in events {
            turn.handle(event);
        }
        turn.end()
    }

    /// Begins a turn over packets of these bindings; if none are given, those of the last call of `take_in`
    fn turn<'h>(&'h mut self, bindings: Option<&'h Bindings>) -> Turn<'h> {
        Turn {
            shared: &self.shared,
            bindings: bindings.unwrap_or(&self.bindings),
            verdicts: &mut self.verdicts,
            callbacks: self
                .callbacks
                .get_mut()
                .unwrap_or_else(PoisonError::into_inner),
            rest: VecDeque::new(),
            packets: 0,
            error: None,
            has_ended: false,
        }
    }
}

/// One call of `handle_packet` or `run_once`: it goes on after an error, and reports the first
struct Turn<'h> {
    shared: &'h Shared,
    bindings: &'h Bindings,
    /// What callbacks have set
    verdicts: &'h mut VerdictBatch,
    callbacks: &'h mut Callbacks,
    /// What has not been looked at yet; goes back to the stash if a callback panics
    rest: VecDeque<Stashed>,
    packets: usize,
    error: Option<Error>,
    has_ended: bool,
}

/// When a callback has panicked, what was set is sent, and what was not seen is kept
impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if !self.has_ended {
            let _ = self.shared.send_verdicts(self.verdicts);
            self.shared
                .put_back(std::mem::take(&mut self.rest), self.bindings);
        }
    }
}

impl Turn<'_> {
    fn end(mut self) -> Result<usize> {
        match self.shared.send_verdicts(self.verdicts) {
            // A queue that ends has ended for the kernel too: no failure of this call.
            Err(Error::Stale { .. }) => {}
            sent => self.note(sent),
        }
        self.has_ended = true;
        match self.error.take() {
            None => Ok(self.packets),
            Some(error) => Err(error),
        }
    }

    /// Deals with the first event of a datagram, after laying by the messages that follow it, one by one
    fn handle_datagram(&mut self, datagram: &[u8]) {
        let mut messages = Messages::new(datagram);
        let event = next_event(&mut messages, self.bindings);
        let mut behind: VecDeque<_> = Stashed::each(messages.rest(), self.bindings).collect();
        // To append takes the time of what is appended.
        if !behind.is_empty() {
            behind.append(&mut self.rest);
            self.rest = behind;
        }
        if let Some(event) = event {
            self.handle(event);
        }
    }

    fn handle(&mut self, event: Event<'_>) {
        match event {
            Event::Packet(packet) => {
                self.packets += 1;
                self.call_back(packet);
            }
            Event::Truncated { key, needed, had } => {
                self.note(Err(Error::Truncated { key, needed, had }));
            }
            Event::Malformed { key, error: source } => {
                self.note(Err(Error::Decode { key, source }));
            }
            event => self.pass_on(event),
        }
    }

    fn call_back(&mut self, packet: Packet<'_>) {
        let Some(binding) = self.bindings.get(packet.queue()) else {
            return;
        };
        if binding.has_ended() {
            // By the callback on the packet before, or in another thread
            return self.shared.note_discarded();
        }
        match self.callbacks.get(binding.id) {
            Some(callback) => callback(&mut QueueData::new(packet, self.verdicts)),
            None => self.pass_on(Event::Packet(packet)),
        }
    }

    fn pass_on(&mut self, event: Event<'_>) {
        match &mut self.callbacks.events {
            Some(handler) => handler(event),
            None if matches!(event, Event::Packet(_)) => self.shared.note_unclaimed(),
            None => {}
        }
    }

    fn note(&mut self, result: Result<()>) {
        if let Err(error) = result {
            self.error.get_or_insert(error);
        }
    }
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.as_fd()
    }
}

impl AsRawFd for Handle {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

const _: () = {
    const fn is_send_and_sync<T: Send + Sync>() {}
    is_send_and_sync::<Handle>();
    is_send_and_sync::<Queue>();
    is_send_and_sync::<RecvBatch>();
    is_send_and_sync::<VerdictBatch>();
    is_send_and_sync::<VerdictSender>();
    is_send_and_sync::<OwnedPacket>();
    is_send_and_sync::<Error>();
};
