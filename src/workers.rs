//! A thread and a socket for each queue of a range

use std::any::Any;
use std::fmt;
use std::ops::RangeInclusive;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nfqnl_proto::{PlainVerdict, QueueConfig, Verdict};

use crate::error::{Error, Operation, Result};
use crate::event::Event;
use crate::handle::MAX_DELAY;
use crate::queue::Queue;
use crate::recv_batch::RecvBatch;
use crate::socket::{Socket, SocketBuilder};
use crate::stats::Stats;
use crate::sys;
use crate::verdict::SendBatch;

/// Settings for starting [`Workers`]
#[derive(Clone, Debug)]
#[must_use]
pub struct WorkersBuilder {
    first: u16,
    count: Option<u16>,
    is_pinned: bool,
    socket: SocketBuilder,
    config: QueueConfig,
    default: PlainVerdict,
}

impl WorkersBuilder {
    /// Sets the number of queues, and so of threads; by default
    /// [`available_parallelism`](std::thread::available_parallelism)
    ///
    /// The number is at least 1, and the last queue is at most 65535: [`Workers::queues`] returns
    /// the range.
    pub const fn count(mut self, count: u16) -> Self {
        self.count = Some(count);
        self
    }

    /// Pins each thread to its CPUs; `false` by default
    ///
    /// Worker i stays on those CPUs c of the calling thread's mask with `c % count == i`. These
    /// feed its queue in a rule with fanout (`Queues::fanout` in the module `rules`), so the thread
    /// finds the packets in the caches of its CPU. A worker without such a CPU is not pinned.
    pub const fn pin(mut self, pin: bool) -> Self {
        self.is_pinned = pin;
        self
    }

    /// Sets the settings of all sockets; each one has its own receive buffer
    pub fn socket(mut self, socket: SocketBuilder) -> Self {
        self.socket = socket;
        self
    }

    /// Sets the settings of all queues; they copy whole packets by default
    pub const fn config(mut self, config: &QueueConfig) -> Self {
        self.config = *config;
        self
    }

    /// Binds all queues, and starts the threads; `make` returns the function of each worker
    ///
    /// The calling thread calls `make` with the number of each worker, from 0. The worker's
    /// function gets each event, and a batch for its verdicts. It may keep state: only its own
    /// thread calls it. An error of the function stops all workers. If a push of a new payload
    /// fails, push another verdict instead of returning the error.
    ///
    /// # Errors
    /// As [`SocketBuilder::open`] and [`Socket::bind_with`]; [`Error::Io`] if a thread cannot be
    /// started. No queue is bound then.
    pub fn start<F>(self, mut make: impl FnMut(usize) -> F) -> Result<Workers>
    where
        F: FnMut(Event<'_>, &mut SendBatch) -> Result<()> + Send + 'static,
    {
        let cpus = std::thread::available_parallelism();
        let cpus = cpus.map_or(1, |cpus| u16::try_from(cpus.get()).unwrap_or(u16::MAX));
        let count = self.count.unwrap_or(cpus).max(1);
        let last = self.first.saturating_add(count - 1);
        let mut parts = Vec::new();
        for num in self.first..=last {
            let socket = Arc::new(self.socket.clone().open()?);
            let queue = socket.bind_with(num, &self.config)?;
            parts.push((socket, queue));
        }
        let shared = Shared {
            sockets: parts.iter().map(|(socket, _)| Arc::clone(socket)).collect(),
            queues: parts.iter().map(|(_, queue)| queue.share()).collect(),
            is_stopped: AtomicBool::new(false),
            failed: Mutex::default(),
            has_failed: Condvar::new(),
            drain: OnceLock::new(),
        };
        let mut workers = Workers {
            queues: self.first..=last,
            shared: Arc::new(shared),
            threads: Vec::new(),
        };
        for (index, (socket, queue)) in parts.into_iter().enumerate() {
            let num = queue.num();
            let worker = Worker {
                socket,
                queue,
                batch: RecvBatch::for_config(RecvBatch::DEFAULT_SLOTS, &self.config),
                shared: Arc::clone(&workers.shared),
                default: self.default,
                function: make(index),
            };
            let pin = self.is_pinned.then_some((index, workers.queues.len()));
            let run = move || {
                if let Some((index, count)) = pin {
                    sys::pin_to_cpus(|cpu| cpu % count == index);
                }
                worker.run()
            };
            let thread = std::thread::Builder::new().name(format!("nfqnl-{num}"));
            let thread = thread
                .spawn(run)
                .map_err(Error::io(Operation::StartWorker(num)))?;
            workers.threads.push(thread);
        }
        Ok(workers)
    }
}

/// One thread and one socket for each queue of a range
///
/// A rule spreads packets over the queues, so the workers can use all CPUs. No worker waits for
/// another one. Each worker has its own receive buffer and its own [`RecvBatch`], so their memory
/// grows with the number of workers. All queues are bound when [`start`](WorkersBuilder::start)
/// returns, so add the rule then.
///
/// * A rule for a range (`queue num 1-4`, `--queue-balance 1:4`) chooses the queue by the packet's
///   addresses, for IPv4 with the protocol. A connection keeps its queue, in both directions.
/// * With fanout (`--queue-cpu-fanout`) the CPU that handles the packet chooses. This helps only
///   where the network card or RPS spreads packets over the CPUs, and packets of one connection may
///   then be in several queues and change their order.
///
/// The verdicts of a batch are sent together at its end. If a batch takes longer than a
/// millisecond, they are sent earlier, after an event. If a worker panics or fails, all stop, and
/// the waiting packets of all queues get a default verdict; with `panic = "abort"` the kernel drops
/// them. Dropping this value stops all too. Every stop waits until running functions return;
/// meanwhile new packets wait too.
///
/// ```no_run
/// use nfqnl::{Event, Verdict, Workers};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let workers = Workers::builder(1, Verdict::Drop).count(4).start(|_| {
///     |event, verdicts| match event {
///         Event::Packet(packet) => verdicts.push(packet.key(), Verdict::Accept),
///         other => {
///             eprintln!("{other}");
///             Ok(())
///         }
///     }
/// })?;
/// println!("queues {:?} are bound", workers.queues()); // now add the rule
/// workers.wait()?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Workers {
    queues: RangeInclusive<u16>,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Result<u64, WorkerError>>>,
}

impl Workers {
    /// Returns the default settings, for queues from `first` on
    ///
    /// If a worker panics or fails, the waiting packets of all queues get the verdict `default`.
    /// With Accept, new packets pass by until the queues are unbound, without a mark. With another
    /// verdict the kernel drops new packets until the unbind. After the unbind the rule decides:
    /// with `bypass` packets pass, otherwise the kernel drops them.
    ///
    /// In a [`drain`](Self::drain) new packets always pass by. Packets that are still undecided at
    /// the end of the drain get `default`.
    pub fn builder(first: u16, default: impl Into<PlainVerdict>) -> WorkersBuilder {
        WorkersBuilder {
            first,
            count: None,
            is_pinned: false,
            socket: Socket::builder(),
            config: QueueConfig::new(),
            default: default.into(),
        }
    }

    /// Returns the numbers of the queues
    #[must_use]
    pub fn queues(&self) -> RangeInclusive<u16> {
        self.queues.clone()
    }

    /// Returns the queue with this number, for its flags, its settings and the kernel's counters
    ///
    /// Do not raise the copy range: the batches of the workers have room for the range of
    /// [`config`](WorkersBuilder::config).
    #[must_use]
    pub fn queue(&self, num: u16) -> Option<&Queue> {
        self.shared.queues.iter().find(|queue| queue.num() == num)
    }

    /// Returns the sums of the counters of all sockets
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.sockets().map(Socket::stats).sum()
    }

    /// Returns the socket of each worker, in the order of the queues, for its counters, or for a
    /// [`VerdictSender`](crate::VerdictSender) for later verdicts
    ///
    /// A receive call on it takes packets away from the worker.
    pub fn sockets(&self) -> impl ExactSizeIterator<Item = &Socket> {
        self.shared.sockets.iter().map(|socket| &**socket)
    }

    /// Waits until a worker panics or fails, for at most `timeout`; returns true if one has
    ///
    /// To stop at a signal, call this in a loop, check the flag of the signal handler each time,
    /// and then call [`drain`](Self::drain).
    #[must_use]
    pub fn wait_timeout(&self, timeout: Duration) -> bool {
        let (begin, mut failed) = (sys::now(), self.shared.failed());
        loop {
            let left = timeout.saturating_sub(begin.elapsed());
            if failed.is_some() || left.is_zero() {
                return failed.is_some();
            }
            failed = sys::wait_for(&self.shared.has_failed, failed, left);
        }
    }

    /// Waits until a worker panics or fails; without a failure it does not return
    ///
    /// # Errors
    /// [`WorkerError`], the first failure.
    pub fn wait(mut self) -> Result<(), WorkerError> {
        self.join().map(|_| ())
    }

    /// Stops all threads, and unbinds the queues: the kernel drops their waiting packets
    ///
    /// A worker finishes its present event, and sends its verdicts.
    ///
    /// # Errors
    /// [`WorkerError`]: a worker has panicked or failed, or a queue cannot be unbound.
    pub fn stop(mut self) -> Result<(), WorkerError> {
        self.shared.stop();
        self.join().map(|_| ())
    }

    /// Stops all threads without losing a packet: each drains its queue ([`Socket::drain`]);
    /// returns the number of packets that have no verdict at the end of `timeout`
    ///
    /// New packets pass by meanwhile. The packets without a verdict get the default. So do packets
    /// that a function holds for a later verdict, because the drain calls functions only with
    /// events. The call takes at most `timeout`, the time of one event, and the time to end the
    /// queues.
    ///
    /// # Errors
    /// [`WorkerError`]: a worker has panicked or failed, or a queue cannot be unbound.
    pub fn drain(mut self, timeout: Duration) -> Result<u64, WorkerError> {
        self.shared.drain.get_or_init(|| (sys::now(), timeout));
        self.shared.stop();
        self.join()
    }

    /// Waits for all threads; returns the number of packets without a verdict after drains, or the
    /// first failure
    fn join(&mut self) -> Result<u64, WorkerError> {
        let mut undecided = Ok(0);
        for thread in self.threads.drain(..) {
            // The worker catches panics of its function.
            let ended = thread
                .join()
                .unwrap_or_else(|payload| resume_unwind(payload));
            undecided = match (undecided, ended) {
                (Ok(sum), ended) => ended.map(|more| sum + more),
                (Err(_), Err(error)) if *self.shared.failed() == Some(error.queue()) => Err(error),
                (error, _) => error,
            };
        }
        undecided
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.stop();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// The failure of a worker
#[non_exhaustive]
pub enum WorkerError {
    /// A call failed, or the worker's function returned an error
    #[non_exhaustive]
    Failed {
        /// The worker's queue
        queue: u16,
        /// The error
        source: Error,
    },
    /// The worker's function panicked
    #[non_exhaustive]
    Panicked {
        /// The worker's queue
        queue: u16,
        /// The text of the panic
        message: String,
    },
}

impl WorkerError {
    /// Returns the number of the worker's queue
    #[must_use]
    pub const fn queue(&self) -> u16 {
        match self {
            Self::Failed { queue, .. } | Self::Panicked { queue, .. } => *queue,
        }
    }
}

impl fmt::Display for WorkerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed { queue, source } => {
                write!(f, "the worker of queue {queue} failed: {source}")
            }
            Self::Panicked { queue, message } => {
                write!(f, "the worker of queue {queue} panicked: {message}")
            }
        }
    }
}

impl fmt::Debug for WorkerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed { queue, source } => {
                write!(f, "the worker of queue {queue} failed: {source:?}")
            }
            Self::Panicked { .. } => write!(f, "{self}"),
        }
    }
}

impl std::error::Error for WorkerError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Failed { source, .. } => source.source(),
            Self::Panicked { .. } => None,
        }
    }
}

/// Shared by all threads
#[derive(Debug)]
struct Shared {
    sockets: Vec<Arc<Socket>>,
    /// The workers unbind them.
    queues: Vec<Queue>,
    is_stopped: AtomicBool,
    /// The queue of the worker that failed first
    failed: Mutex<Option<u16>>,
    has_failed: Condvar,
    /// The begin and the timeout of a drain
    drain: OnceLock<(Instant, Duration)>,
}

impl Shared {
    fn failed(&self) -> MutexGuard<'_, Option<u16>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, queue: u16) {
        self.failed().get_or_insert(queue);
        self.has_failed.notify_all();
        self.stop();
    }

    fn stop(&self) {
        self.is_stopped.store(true, SeqCst);
        let sockets = self.sockets.iter();
        sockets.for_each(|socket| socket.waker().wake_all());
    }
}

/// Returns the text of a panic
fn text_of(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no text").to_owned()
}

/// Answers all waiting packets of a queue
fn give_default(queue: &Queue, default: PlainVerdict) -> Result<()> {
    let passes = match default.verdict() {
        Verdict::Accept => queue.pass_by(),
        _ => Ok(()),
    };
    queue.answer_all(default).and(passes)
}

struct Worker<F> {
    socket: Arc<Socket>,
    queue: Queue,
    batch: RecvBatch,
    shared: Arc<Shared>,
    default: PlainVerdict,
    function: F,
}

impl<F: FnMut(Event<'_>, &mut SendBatch) -> Result<()>> Worker<F> {
    /// Runs until a stop or a failure; returns the number of packets without a verdict after a
    /// drain
    fn run(mut self) -> Result<u64, WorkerError> {
        let mut verdicts = SendBatch::new();
        let worked = catch_unwind(AssertUnwindSafe(|| self.work(&mut verdicts)));
        let Self {
            socket,
            queue,
            shared,
            default,
            ..
        } = self;
        let num = queue.num();
        let failed = |source| WorkerError::Failed { queue: num, source };
        let result = match worked {
            Ok(worked) => worked.map_err(failed),
            Err(payload) => Err(WorkerError::Panicked {
                queue: num,
                message: text_of(&*payload),
            }),
        };
        if result.is_err() {
            shared.fail(num);
        }
        if matches!(result, Ok(0)) && shared.failed().is_none() {
            return queue.destroy().map(|()| 0).map_err(failed);
        }
        let defaulted = match socket.send(&mut verdicts) {
            // The default would be a wrong verdict on decided packets.
            Err(error @ Error::Io { .. }) if !verdicts.is_empty() => Err(error),
            _ => give_default(&queue, default),
        };
        let ended = defaulted.and(queue.destroy()).map_err(failed);
        result.and_then(|undecided| ended.map(|()| undecided))
    }

    /// Calls the function until a stop, and in a drain; returns the number of packets without a
    /// verdict after the drain
    fn work(&mut self, verdicts: &mut SendBatch) -> Result<u64> {
        let Self {
            socket,
            queue,
            batch,
            shared,
            function,
            ..
        } = self;
        while !shared.is_stopped.load(SeqCst) {
            let events = socket.recv(batch)?;
            let mut due = sys::now() + MAX_DELAY;
            for event in events {
                function(event, verdicts)?;
                let now = sys::now();
                if now >= due {
                    socket.send(verdicts)?;
                    due = now + MAX_DELAY;
                }
                if shared.is_stopped.load(SeqCst) {
                    break; // the rest stays in the batch
                }
            }
            socket.send(verdicts)?;
        }
        let Some((begin, timeout)) = shared.drain.get() else {
            return Ok(0);
        };
        let is_over = || begin.elapsed() >= *timeout || shared.failed().is_some();
        socket.drain_with(queue, batch, verdicts, is_over, function)
    }
}
