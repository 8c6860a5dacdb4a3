//! The loop API: one socket, its queues, receiving and answering

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use netlink_sys::{Socket as Netlink, SocketAddr};
use nfqnl_proto::consts::NETLINK_NETFILTER;
use nfqnl_proto::{ConfigFlags, CopyMode, Decision, PacketKey, PlainVerdict, QueueConfig};

use crate::engine::{Engine, Wait, Waker};
use crate::error::{Error, Operation, Result};
use crate::event::Event;
use crate::netns::Netns;
use crate::queue::Queue;
use crate::recv_batch::{Events, RecvBatch};
use crate::stats::Stats;
use crate::sys;
use crate::verdict::{SendBatch, VerdictSender};

/// A connection to the kernel's packet queues
///
/// [`bind`](Self::bind) a queue, and receive its packets with [`recv`](Self::recv) into a
/// [`RecvBatch`]. Answer them together with [`send`](Self::send) of a [`SendBatch`], or one by one
/// with [`set_verdict`](Self::set_verdict), now or later. [`SendBatch`] shows the loop.
///
/// The socket has no receive loop of its own: any thread, loop or runtime can drive it. Its
/// descriptor is readable while there is something to receive, including packets that another call
/// has already read. After poll(2) or epoll(7), call [`try_recv`](Self::try_recv) until it returns
/// no events. While a batch has events ([`RecvBatch::has_events`]), do not wait for the
/// descriptor.
///
/// All methods take `&self`, so threads may share a socket. No other code may read from a copy of
/// the descriptor, except a forked process: it must answer the packets it receives.
///
/// Dropping the socket unbinds its queues, but not after a fork(2) (see [`Queue`]).
pub struct Socket {
    pub(crate) engine: Arc<Engine>,
}

/// Settings for opening a [`Socket`]
#[derive(Clone, Debug)]
#[must_use]
pub struct SocketBuilder {
    recv_buffer: Option<usize>,
    report_overruns: bool,
    merge_verdicts: bool,
    unbind_on_drop: bool,
    busy_poll: Duration,
    /// A namespace, and the way into it: a program without [`SocketBuilder::netns`] does not link
    /// the threads that this needs
    netns: Option<(Netns, OpenIn)>,
}

type OpenIn = fn(&Netns) -> Result<Netlink>;

impl Default for SocketBuilder {
    fn default() -> Self {
        Self {
            recv_buffer: None,
            report_overruns: true,
            merge_verdicts: true,
            unbind_on_drop: true,
            busy_poll: Duration::ZERO,
            netns: None,
        }
    }
}

/// Room for 1024 full Ethernet frames, as many as a queue holds by default: the kernel charges
/// 2304 bytes for each, and doubles the size it is given
const DEFAULT_RECV_BUFFER: libc::c_int = 1024 * 2304 / 2;

impl SocketBuilder {
    /// Sets the size of the socket's receive buffer in bytes; the kernel doubles it
    ///
    /// The default is 1,179,648: room for 1024 full Ethernet frames, as many as a queue holds by
    /// default. The buffer takes memory only while packets wait in it. The kernel charges 832
    /// bytes for a small packet or for attributes only, 2304 for a full frame, and 66 KiB for a
    /// large packet with [`ConfigFlags::GSO`](crate::ConfigFlags::GSO). A small router with a copy
    /// range of 128 bytes needs 425,984 for 1024 packets, and less with a shorter queue.
    ///
    /// Sizes above `net.core.rmem_max` need `CAP_NET_ADMIN` in the initial user namespace. Other
    /// processes get `rmem_max`.
    #[doc(alias = "SO_RCVBUF")]
    #[doc(alias = "nfnl_rcvbufsiz")]
    pub const fn recv_buffer(mut self, bytes: usize) -> Self {
        self.recv_buffer = Some(bytes);
        self
    }

    /// Reports a full receive buffer as [`Event::Overrun`](crate::Event::Overrun); `true` by
    /// default
    ///
    /// This setting also changes the kernel's behaviour. After a reported overrun the kernel drops
    /// every packet until the buffer has been read empty. Without reports it continues as soon as
    /// there is room. [`Stats::missing_packets`](crate::Stats::missing_packets) counts the losses
    /// either way.
    ///
    /// Without reports, merged verdicts ([`SendBatch`]) are safe under three conditions: nothing
    /// else reads from the socket, no socket filter is attached, and fewer than 2^31 packets pass
    /// between a receive and its send.
    #[doc(alias = "NETLINK_NO_ENOBUFS")]
    pub const fn report_overruns(mut self, report: bool) -> Self {
        self.report_overruns = report;
        self
    }

    /// Merges equal verdicts into one message ([`SendBatch`]); `true` by default
    ///
    /// Merging has one condition: the threads that send verdicts must not differ in
    /// `CAP_NET_ADMIN`. Drop capabilities before you start threads, because `capset(2)` changes
    /// only one thread. Turning merging off only costs speed.
    #[doc(alias = "nfq_set_verdict_batch")]
    pub const fn merge_verdicts(mut self, merge: bool) -> Self {
        self.merge_verdicts = merge;
        self
    }

    /// Unbinds queues when they or the socket are dropped; `true` by default
    ///
    /// With `false` a queue ends only by [`Queue::destroy`], [`Socket::drain`], or when the last
    /// copy of the descriptor is closed. Use it if a supervisor keeps a copy: the queues then stay
    /// bound also after a panic, or after an error that ends the program, and the next process can
    /// [`adopt`](Self::adopt) them. A dropped queue of a socket that lives on gets packets, and no
    /// process answers them.
    pub const fn unbind_on_drop(mut self, unbind: bool) -> Self {
        self.unbind_on_drop = unbind;
        self
    }

    /// Receives without blocking for this time before a receive call waits; off by default
    ///
    /// A packet that comes in this time does not have to wake the thread. If the thread has a CPU
    /// of its own, this can halve the time until the program has the packet (docs/performance.md,
    /// with a millisecond). Otherwise the time can grow. The price is CPU time: a thread without
    /// packets is busy all this time in each call.
    ///
    /// Deadlines, wakers and requests of other threads work as without it. While another thread
    /// waits in a receive call of the same socket, a call waits at once. It does nothing in
    /// [`try_recv`](Socket::try_recv) and in `AsyncSocket`, and if the thread has only one CPU when
    /// it calls this method. So call it first, and then pin the thread to its CPU.
    pub fn busy_poll(mut self, time: Duration) -> Self {
        // With one CPU the sender could not run meanwhile.
        let cpus = std::thread::available_parallelism();
        self.busy_poll = match cpus.is_ok_and(|cpus| cpus.get() > 1) {
            true => time,
            false => Duration::ZERO,
        };
        self
    }

    /// Opens the socket in another network namespace than the calling thread's
    ///
    /// Interface names ([`Socket::interface_name`]) and the kernel's counters ([`Queue::stats`])
    /// belong to this namespace. See [`Netns`] for privileges.
    pub fn netns(mut self, netns: &Netns) -> Self {
        self.netns = Some((netns.clone(), |netns| netns.open_in(new_netlink)));
        self
    }

    /// Opens a socket in the calling thread's network namespace, or in the namespace of
    /// [`netns`](Self::netns)
    ///
    /// # Errors
    /// [`Error::Io`] if the kernel has no netfilter, no descriptor is left, or the namespace
    /// cannot be entered. The kernel checks other privileges at the first request.
    pub fn open(self) -> Result<Socket> {
        let socket = match &self.netns {
            None => new_netlink().map_err(Error::io(Operation::Open)),
            Some((netns, open_in)) => open_in(netns),
        };
        self.set_up(socket?)
    }

    /// Takes over a netfilter netlink socket without queues, for instance one opened in another
    /// network namespace
    ///
    /// If the socket still has queues, their packets are counted in
    /// [`Stats::after_unbind`](crate::Stats::after_unbind), and the kernel refuses to bind these
    /// queues again.
    ///
    /// # Errors
    /// [`Error::NotNetfilter`]; [`Error::Io`].
    pub fn open_fd(self, fd: OwnedFd) -> Result<Socket> {
        check_netfilter(fd.as_fd())?;
        let mut socket = sys::netlink_from(fd);
        // Leaves all multicast groups: other processes may send to them.
        let mut address = SocketAddr::new(0, 0);
        socket
            .get_address(&mut address)
            .map_err(Error::io(Operation::Open))?;
        let in_no_group = SocketAddr::new(address.port_number(), 0);
        socket
            .bind(&in_no_group)
            .map_err(Error::io(Operation::Open))?;
        self.set_up(socket)
    }

    fn set_up(self, socket: Netlink) -> Result<Socket> {
        // The kernel rejects other processes' messages to a connected socket.
        socket
            .connect(&SocketAddr::new(0, 0))
            .map_err(Error::io(Operation::Open))?;
        // With the first option errors do not repeat the request, which may hold a whole packet
        // (Linux 4.3). With the second they carry the kernel's own text (Linux 4.12). Older
        // kernels lack them.
        for option in [socket.set_cap_ack(true), socket.set_ext_ack(true)] {
            match option {
                Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {}
                result => result.map_err(Error::io(Operation::Open))?,
            }
        }
        socket
            .set_no_enobufs(!self.report_overruns)
            .map_err(Error::io(Operation::Open))?;
        let wanted = self.recv_buffer.map_or(DEFAULT_RECV_BUFFER, |bytes| {
            libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX / 2)
        });
        // The system's default may be larger than ours.
        let has_more = sys::recv_buffer(socket.as_fd()).is_ok_and(|had| had / 2 >= wanted);
        if self.recv_buffer.is_some() || !has_more {
            sys::set_recv_buffer(socket.as_fd(), wanted)
                .map_err(Error::io(Operation::SetRecvBuffer))?;
        }
        self.over(socket)
    }

    fn over(self, socket: Netlink) -> Result<Socket> {
        let socket = self.engine_over(socket)?;
        socket.engine.discard_foreign()?;
        Ok(socket)
    }

    fn engine_over(self, socket: Netlink) -> Result<Socket> {
        sys::watch_forks();
        let engine = Engine::new(socket, self.merge_verdicts, self.report_overruns);
        let mut engine = engine.map_err(Error::io(Operation::Open))?;
        engine.unbinds_on_drop = self.unbind_on_drop;
        engine.busy_poll = self.busy_poll;
        let engine = Arc::new(engine);
        Ok(Socket { engine })
    }

    /// Wraps a netfilter socket of another process without reading from it
    pub(crate) fn wrap(mut self, fd: OwnedFd) -> Result<Socket> {
        check_netfilter(fd.as_fd())?;
        let socket = sys::netlink_from(fd);
        let hides_overruns = socket.get_no_enobufs();
        self.report_overruns = !hides_overruns.map_err(Error::io(Operation::Open))?;
        self.engine_over(socket)
    }

    /// Wraps a descriptor without setting its options, for a fuzz target's kernel
    #[cfg(nfqnl_fuzzing)]
    pub(crate) fn open_over(self, fd: OwnedFd) -> Result<Socket> {
        self.over(sys::netlink_from(fd))
    }
}

pub(crate) fn new_netlink() -> io::Result<Netlink> {
    Netlink::new(isize::from(NETLINK_NETFILTER))
}

/// Fails unless the descriptor is a netfilter socket, and sets close-on-exec
pub(crate) fn check_netfilter(fd: BorrowedFd<'_>) -> Result<()> {
    let (domain, protocol) = sys::domain_and_protocol(fd).map_err(Error::io(Operation::Open))?;
    if domain != libc::AF_NETLINK || protocol != i32::from(NETLINK_NETFILTER) {
        return Err(Error::NotNetfilter { domain, protocol });
    }
    sys::set_cloexec(fd).map_err(Error::io(Operation::Open))
}

/// Opening, binding, and the socket itself
impl Socket {
    /// Opens a socket with the default settings
    ///
    /// # Errors
    /// As [`SocketBuilder::open`].
    #[doc(alias = "nfq_open")]
    pub fn open() -> Result<Self> {
        Self::builder().open()
    }

    /// Returns the default settings for opening a socket
    pub fn builder() -> SocketBuilder {
        SocketBuilder::default()
    }

    /// Binds a queue that copies whole packets, with the kernel's defaults otherwise
    ///
    /// Binding a number again takes about 10 ms, or 100 ms with one CPU: the call waits until the
    /// kernel has sent the last packets of the earlier binding. One wait is enough for all numbers
    /// unbound so far. If the scheduler has stopped a thread inside a receive call, the bind waits
    /// until this thread continues. The time of a bind grows with the number of bound queues:
    /// binding all 65,536 takes about a minute.
    ///
    /// # Errors
    /// As [`bind_with`](Self::bind_with).
    pub fn bind(&self, num: u16) -> Result<Queue> {
        self.bind_with(num, &QueueConfig::new())
    }

    /// Binds a queue with these settings; copies whole packets unless `config` names a copy mode
    ///
    /// One message does both. The flags of
    /// [`enable_if_supported`](QueueConfig::enable_if_supported) follow in messages of their own.
    ///
    /// A new queue copies nothing for a moment, until the kernel has set the mode from the same
    /// message. It drops a packet that comes in this moment, even with bypass (seen about once in
    /// 100 binds under load). So bind before you add the rule; or keep the socket over a restart
    /// ([`into_fd`](Self::into_fd)).
    ///
    /// # Errors
    /// [`Error::Refused`] with [`NoCapability`](crate::ErrorKind::NoCapability),
    /// [`QueueInUse`](crate::ErrorKind::QueueInUse) if another socket has bound the queue,
    /// [`AlreadyBound`](crate::ErrorKind::AlreadyBound) if this socket has, or
    /// [`UnsupportedFlags`](crate::ErrorKind::UnsupportedFlags). The queue is not bound then.
    /// [`Error::NoAck`]; [`Error::Io`].
    pub fn bind_with(&self, num: u16, config: &QueueConfig) -> Result<Queue> {
        let binding = self.engine.bind(num, whole_packets(config), |_| ())?;
        Ok(Queue::new(&self.engine, binding))
    }

    /// Waits until the kernel has executed every verdict sent so far, and every refusal has
    /// arrived
    ///
    /// The next receive call returns the refusals, unless an overrun lost them.
    ///
    /// # Errors
    /// [`Error::Refused`]: no `CAP_NET_ADMIN`. [`Error::NoAck`]; [`Error::Io`].
    pub fn sync(&self) -> Result<()> {
        self.engine.sync(Operation::Sync)
    }

    /// Returns true if the kernel can send and change conntrack entries
    ///
    /// If not, it ignores [`Decision::with_ct_mark`] and [`Decision::with_conntrack`] without an
    /// error, and refuses [`ConfigFlags::CONNTRACK`]. It lacks
    /// `CONFIG_NETFILTER_NETLINK_GLUE_CT`, or the module `nf_conntrack_netlink`. The call makes
    /// the kernel load the module if it can. Before Linux 4.5 the answer is always true.
    ///
    /// The call uses a queue number without a binding, so any socket can ask: with
    /// [`Workers`](crate::Workers) open one for this question. The answer is about the kernel;
    /// whether it tracks connections depends on the rules ([`Decision::with_ct_mark`]).
    ///
    /// # Errors
    /// [`Error::Refused`]: no `CAP_NET_ADMIN`. [`Error::NoAck`]; [`Error::Io`].
    pub fn takes_conntrack(&self) -> Result<bool> {
        let op = Operation::ProbeConntrack;
        self.engine.sync(op)?; // without privileges every answer is EPERM
        let missing = self.engine.unsupported(op, ConfigFlags::CONNTRACK)?;
        Ok(missing.is_empty())
    }

    /// Returns the counters of this socket
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.engine.stats()
    }

    /// Returns the size of the socket's receive buffer in bytes, as the kernel counts it
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn recv_buffer(&self) -> Result<usize> {
        sys::recv_buffer(self.as_fd())
            .map(|bytes| usize::try_from(bytes).unwrap_or(0))
            .map_err(Error::io(Operation::GetRecvBuffer))
    }

    /// Unbinds all queues, waits until the kernel has done so, and closes the socket
    ///
    /// The kernel drops the packets that wait in the queues. Dropping the socket does the same
    /// without waiting or reporting, but not after a fork(2).
    ///
    /// # Errors
    /// The first [`Error::Refused`], [`Error::NoAck`] or [`Error::Io`] of a queue; all queues are
    /// unbound and the socket is closed anyway.
    #[doc(alias = "nfq_close")]
    pub fn close(self) -> Result<()> {
        let bindings = self.engine.present_bindings();
        let unbound = bindings
            .iter()
            .map(|binding| self.engine.unbind(binding.id));
        unbound.fold(Ok(()), Result::and)
    }
}

/// Adds the copying of whole packets, unless the settings name a copy mode
pub(crate) fn whole_packets(config: &QueueConfig) -> QueueConfig {
    match config.get_copy_mode() {
        Some(_) => *config,
        None => config.copy_mode(CopyMode::Packet, u32::MAX),
    }
}

/// Receiving
impl Socket {
    /// Receives what is there; waits if there is nothing
    ///
    /// Events left in the batch from the last call come first, without asking the kernel.
    /// Otherwise the call returns once it has read something, **perhaps without events**: the
    /// answer to another thread's request is not an event. So call it in a loop. A [`Waker`] ends
    /// the wait; a signal does not.
    ///
    /// Several threads may receive from one socket, each with its own batch: one waits in the
    /// kernel, and the others wait for that thread. Each thread gets its packets in order, unless
    /// another thread changes a setting while this thread does not run. This call can block even
    /// after poll(2) if other threads use the socket: call [`try_recv`](Self::try_recv) then.
    ///
    /// After a call with a single packet, the next few calls ask the kernel for one only. This is
    /// faster if packets come singly.
    ///
    /// # Errors
    /// [`Error::Io`] if the system call fails; an overrun is an event instead.
    /// [`Error::WrongSocket`] if the batch has events or unsent verdicts of another socket.
    pub fn recv<'b>(&self, batch: &'b mut RecvBatch) -> Result<Events<'b>> {
        self.receive(batch, Wait::Forever)
    }

    /// Receives what is there; waits for at most `timeout` if there is nothing
    ///
    /// Like [`recv`](Self::recv), it can return without events before the timeout.
    ///
    /// # Errors
    /// As [`recv`](Self::recv).
    pub fn recv_timeout<'b>(
        &self,
        batch: &'b mut RecvBatch,
        timeout: Duration,
    ) -> Result<Events<'b>> {
        self.receive(batch, wait_for(timeout))
    }

    /// Receives what is there, without waiting
    ///
    /// No events: the socket is empty, or a thread that waits in [`recv`](Self::recv) is about to
    /// empty it. After edge-triggered epoll, repeat the call until it returns no events.
    ///
    /// # Errors
    /// As [`recv`](Self::recv).
    pub fn try_recv<'b>(&self, batch: &'b mut RecvBatch) -> Result<Events<'b>> {
        self.receive(batch, Wait::No)
    }

    fn receive<'b>(&self, batch: &'b mut RecvBatch, wait: Wait) -> Result<Events<'b>> {
        self.fill(batch, wait)?;
        Ok(batch.events())
    }

    /// Fills the batch unless it has events; returns true if it had events or something was read
    pub(crate) fn fill(&self, batch: &mut RecvBatch, wait: Wait) -> Result<bool> {
        match batch.owner() {
            Some(owner) if owner != self.engine.id => Err(Error::WrongSocket {
                op: Operation::Receive,
            }),
            Some(_) if batch.has_events() => Ok(true),
            _ => self.engine.receive(batch.begin(self.engine.id), wait),
        }
    }

    /// Stops a queue without losing a packet: lets new packets pass by, hands out the waiting ones,
    /// and unbinds the queue when all are answered; returns the number of packets lost
    ///
    /// `decide` gets each event, also of other queues, and a batch for its verdicts, which the
    /// call sends. It runs only for events: answer the packets of a [`Pending`](crate::Pending)
    /// before ([`answer_all`](crate::Pending::answer_all)), and hold no new ones. Other threads may
    /// answer their packets. The call ends when every packet of the queue is answered
    /// ([`Queue::waiting`]), or after `timeout`. The packets that still wait then are lost, because
    /// the kernel drops the waiting packets of an unbound queue. The number is 0 if nothing was
    /// lost.
    ///
    /// New packets overtake the waiting ones. After the unbind, a rule with `bypass` lets packets
    /// pass; without it the kernel drops them. To stop several queues, call it for each in turn.
    /// Soon after an adoption without a handover, orphans may not be handed out: see
    /// [`Queue::pass_by`].
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # use nfqnl::{Event, Queue, RecvBatch, Result, Socket, Verdict};
    /// # fn f(socket: &Socket, queue: Queue, batch: &mut RecvBatch) -> Result<()> {
    /// let lost = socket.drain(queue, batch, Duration::from_secs(5), |event, verdicts| {
    ///     match event {
    ///         Event::Packet(packet) => verdicts.push(packet.key(), Verdict::Accept),
    ///         _ => Ok(()),
    ///     }
    /// })?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Queue::set_flags`], [`recv`](Self::recv), [`send`](Self::send) and
    /// [`Queue::destroy`]; and the errors of `decide`. After an error or a panic of `decide` the
    /// queue is dropped: its packets are lost, except with [`SocketBuilder::unbind_on_drop`] set to
    /// `false`. Unsent verdicts on packets of other queues are lost too, and these packets wait.
    pub fn drain(
        &self,
        queue: Queue,
        batch: &mut RecvBatch,
        timeout: Duration,
        decide: impl FnMut(Event<'_>, &mut SendBatch) -> Result<()>,
    ) -> Result<u64> {
        self.check_owner(&queue)?;
        let (mut verdicts, is_over) = (SendBatch::new(), timer(timeout));
        let waiting = self.drain_with(&queue, batch, &mut verdicts, is_over, decide)?;
        queue.destroy().map(|()| waiting)
    }

    /// [`drain`](Self::drain) without the unbind; verdicts that were not sent stay in `verdicts`
    pub(crate) fn drain_with(
        &self,
        queue: &Queue,
        batch: &mut RecvBatch,
        verdicts: &mut SendBatch,
        is_over: impl Fn() -> bool,
        mut decide: impl FnMut(Event<'_>, &mut SendBatch) -> Result<()>,
    ) -> Result<u64> {
        /// The time between two looks for packets that other threads have answered
        const PAUSE: Duration = Duration::from_millis(5);
        queue.pass_by()?; // all packets of the queue are received when it returns
        let mut wait = Wait::No;
        loop {
            let waiting = queue.waiting();
            if waiting == 0 || is_over() {
                return Ok(waiting);
            }
            self.fill(batch, wait)?;
            // One event: the timeout holds between events.
            let event = batch.events().next();
            let decided = event.map_or(Ok(()), |event| decide(event, verdicts));
            let sent = self.send(verdicts); // also after an error: of packets of other queues too
            decided.and(sent)?;
            wait = wait_for(PAUSE);
        }
    }

    pub(crate) fn check_owner(&self, queue: &Queue) -> Result<()> {
        let op = Operation::PassBy(queue.num());
        match queue.belongs_to(&self.engine) {
            true => Ok(()),
            false => Err(Error::WrongSocket { op }),
        }
    }

    /// Returns a waker: other threads and signal handlers end receive calls with it
    #[must_use]
    pub fn waker(&self) -> Waker {
        Waker::new(Arc::clone(&self.engine.wake))
    }
}

/// Returns a function; it returns true once this time has passed
pub(crate) fn timer(timeout: Duration) -> impl Fn() -> bool {
    let begin = sys::now();
    move || begin.elapsed() >= timeout
}

/// Returns a wait that ends after this time
pub(crate) fn wait_for(timeout: Duration) -> Wait {
    sys::now()
        .checked_add(timeout)
        .map_or(Wait::Forever, Wait::Until)
}

/// Answering
impl Socket {
    /// Answers a packet, now or at any later time, from any thread
    ///
    /// Packets may be answered in any order. For a new connection, recent kernels drop a segment
    /// that is released before an earlier one. Before you replace a payload, check
    /// [`Packet::is_truncated`](crate::Packet::is_truncated): bytes that were not copied would be
    /// lost.
    ///
    /// The kernel executes the verdict before this call returns. If it refuses the verdict
    /// (usually because the packet is gone), a receive call returns
    /// [`Event::Refused`](crate::Event::Refused) with the same key; [`sync`](Self::sync) waits for
    /// the refusal.
    ///
    /// # Errors
    /// [`Error::Unbound`] if the packet's binding of the queue has ended; [`Error::WrongSocket`]
    /// for a key of another socket; [`Error::Encode`] or [`Error::PayloadTooShort`] for an invalid
    /// payload; [`Error::Io`] if the send fails, with `EMSGSIZE` if the verdict is longer than the
    /// send buffer. Nothing was sent in any of these cases.
    #[doc(alias = "nfq_set_verdict")]
    #[doc(alias = "nfq_set_verdict2")]
    pub fn set_verdict<'p>(&self, key: PacketKey, decision: impl Into<Decision<'p>>) -> Result<()> {
        self.engine.set_verdict(key, &decision.into())
    }

    /// Sends collected verdicts in their order, and empties the batch
    ///
    /// As with [`set_verdict`](Self::set_verdict), the kernel executes the verdicts before this
    /// call returns, and receive calls return its refusals. Verdicts for queues unbound in the
    /// meantime are dropped and counted in [`Stats::late_verdicts`]; the kernel has dropped their
    /// packets.
    ///
    /// # Errors
    /// [`Error::WrongSocket`] for keys of another socket: their verdicts stay in the batch, and all
    /// others were sent. [`Error::Io`] with `EMSGSIZE` for a verdict longer than the send buffer
    /// (its packet still waits): all others were sent, and the batch is empty. After any other
    /// [`Error::Io`] (`ENOBUFS`: the kernel is out of memory) the batch keeps the unsent verdicts,
    /// so call again.
    #[doc(alias = "nfq_set_verdict_batch")]
    #[doc(alias = "nfq_set_verdict_batch2")]
    pub fn send(&self, verdicts: &mut SendBatch) -> Result<()> {
        self.engine.send_batch(verdicts)
    }

    /// Answers **every** waiting packet of a queue up to this one with one verdict
    ///
    /// This is for programs that track the order of packets themselves. The verdict also answers
    /// packets held by other threads, packets left in a batch, and packets still unread in the
    /// socket. [`send`](Self::send) merges equal verdicts without this danger.
    ///
    /// # Errors
    /// As [`set_verdict`](Self::set_verdict). The kernel refuses the verdict only if none of the
    /// packets was waiting.
    #[doc(alias = "nfq_set_verdict_batch")]
    #[doc(alias = "nfq_set_verdict_batch2")]
    #[doc(alias = "NFQNL_MSG_VERDICT_BATCH")]
    pub fn set_verdict_up_to(
        &self,
        last: PacketKey,
        verdict: impl Into<PlainVerdict>,
    ) -> Result<()> {
        self.engine.set_plain(last, verdict.into(), true)
    }

    /// Returns a sender of verdicts for other threads; it does not keep the socket open
    #[must_use]
    pub fn verdict_sender(&self) -> VerdictSender {
        VerdictSender::new(&self.engine)
    }
}

/// Unbinds all queues without waiting: copies of the descriptor may keep the socket open
impl Drop for Socket {
    fn drop(&mut self) {
        for binding in self.engine.present_bindings().iter() {
            if !binding.is_shared() && self.engine.unbinds_on_drop {
                self.engine.post_unbind(binding.id);
            }
        }
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bindings = self.engine.present_bindings();
        let queues: Vec<u16> = bindings.iter().take(16).map(|b| b.id.queue).collect();
        f.debug_struct("Socket")
            .field("fd", &self.as_raw_fd())
            .field("queues", &queues)
            .field("stats", &self.stats())
            .finish()
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.engine.as_fd()
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}
