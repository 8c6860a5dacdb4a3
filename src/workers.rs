//! A thread and a socket for each queue of a range

use std::any::Any;
use std::fmt;
use std::ops::RangeInclusive;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
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
    on_failure: PlainVerdict,
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
    /// `make` gets the number of the worker, from 0. The worker's function gets each event, and a
    /// batch for its verdicts. It may keep state: only its own thread calls it.
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
            is_stopped: AtomicBool::new(false),
            has_failed: AtomicBool::new(false),
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
                on_failure: self.on_failure,
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
/// The workers use all CPUs: a rule spreads packets over the queues, and each thread shares nothing
/// with the others. Each one has its own receive buffer and its own [`RecvBatch`], so their memory
/// grows with the number of workers. All queues are bound when [`start`](WorkersBuilder::start)
/// returns, so add the rule then.
///
/// * A rule for a range (`queue num 1-4`, `--queue-balance 1:4`) chooses the queue by the packet's
///   addresses and protocol. A connection keeps its queue, in both directions.
/// * With fanout (`--queue-cpu-fanout`) the CPU that handles the packet chooses. This helps only
///   where the network card or RPS spreads packets over the CPUs, and packets of one connection may
///   then be in several queues and change their order.
///
/// The verdicts on the packets of a batch are sent together, or once the oldest of them is a
/// millisecond old. If a worker panics or fails, all stop, and the waiting packets of all queues
/// get a default verdict; with `panic = "abort"` the kernel drops them. Dropping this value stops
/// all too. Stopping waits until running functions return.
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
    /// If a worker panics or fails, the waiting packets of all queues get the verdict `on_failure`.
    /// With Accept, new packets pass by until the queues are unbound, without a mark. With another
    /// verdict the kernel drops new packets until the unbind.
    pub fn builder(first: u16, on_failure: impl Into<PlainVerdict>) -> WorkersBuilder {
        WorkersBuilder {
            first,
            count: None,
            is_pinned: false,
            socket: Socket::builder(),
            config: QueueConfig::new(),
            on_failure: on_failure.into(),
        }
    }

    /// Returns the numbers of the queues
    #[must_use]
    pub fn queues(&self) -> RangeInclusive<u16> {
        self.queues.clone()
    }

    /// Returns the sums of the counters of all sockets
    #[must_use]
    pub fn stats(&self) -> Stats {
        let sockets = self.shared.sockets.iter();
        sockets.map(|socket| socket.stats()).sum()
    }

    /// Returns true if a worker has panicked or failed: all workers stop then
    #[must_use]
    pub fn have_failed(&self) -> bool {
        self.shared.has_failed.load(SeqCst)
    }

    /// Waits until a worker panics or fails
    ///
    /// To stop at a signal, look at [`have_failed`](Self::have_failed) and at a flag in a loop, and
    /// call [`drain`](Self::drain).
    ///
    /// # Errors
    /// [`WorkerError`], the failure.
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
    /// returns the number of packets lost at the end of `timeout`
    ///
    /// The drain calls a function only with events. If a function holds packets for a later
    /// verdict, these packets are lost.
    ///
    /// # Errors
    /// [`WorkerError`]: a worker has panicked or failed.
    pub fn drain(mut self, timeout: Duration) -> Result<u64, WorkerError> {
        self.shared.drain.get_or_init(|| (sys::now(), timeout));
        self.shared.stop();
        self.join()
    }

    /// Waits for all threads; returns the number of packets lost by drains
    fn join(&mut self) -> Result<u64, WorkerError> {
        let mut lost = Ok(0);
        for thread in self.threads.drain(..) {
            // The worker catches panics of its function.
            let ended = thread
                .join()
                .unwrap_or_else(|payload| resume_unwind(payload));
            lost = lost.and_then(|lost| ended.map(|more| lost + more));
        }
        lost
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.stop();
        let _ = self.join();
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

impl fmt::Display for WorkerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed { queue, .. } => write!(f, "the worker of queue {queue} failed"),
            Self::Panicked { queue, message } => {
                write!(f, "the worker of queue {queue} panicked: {message}")
            }
        }
    }
}

impl fmt::Debug for WorkerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed { source, .. } => write!(f, "{self}: {source:?}"),
            Self::Panicked { .. } => write!(f, "{self}"),
        }
    }
}

impl std::error::Error for WorkerError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Failed { source, .. } => Some(source),
            Self::Panicked { .. } => None,
        }
    }
}

/// Shared by all threads
#[derive(Debug)]
struct Shared {
    sockets: Vec<Arc<Socket>>,
    is_stopped: AtomicBool,
    has_failed: AtomicBool,
    /// The begin and the timeout of a drain
    drain: OnceLock<(Instant, Duration)>,
}

impl Shared {
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

struct Worker<F> {
    socket: Arc<Socket>,
    queue: Queue,
    batch: RecvBatch,
    shared: Arc<Shared>,
    on_failure: PlainVerdict,
    function: F,
}

impl<F: FnMut(Event<'_>, &mut SendBatch) -> Result<()>> Worker<F> {
    /// Runs until a stop or a failure; returns the number of packets lost by a drain
    fn run(mut self) -> Result<u64, WorkerError> {
        let mut verdicts = SendBatch::new();
        let worked = catch_unwind(AssertUnwindSafe(|| self.work(&mut verdicts)));
        let Self {
            socket,
            queue,
            shared,
            on_failure,
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
            shared.has_failed.store(true, SeqCst);
            shared.stop();
        }
        if !shared.has_failed.load(SeqCst) {
            queue.destroy().map_err(failed)?;
            return result;
        }
        // Decided packets keep their verdicts, and all others get the default.
        let _ = socket.send(&mut verdicts);
        if verdicts.is_empty() {
            if on_failure.verdict() == Verdict::Accept {
                let _ = queue.pass_by();
            }
            let _ = queue.answer_all(on_failure);
        }
        let _ = queue.destroy();
        result
    }

    /// Calls the function until a stop, and in a drain; returns the number of packets lost by it
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
            let mut due = None;
            for event in socket.recv(batch)? {
                function(event, verdicts)?;
                let now = sys::now();
                if now >= *due.get_or_insert(now + MAX_DELAY) {
                    socket.send(verdicts)?;
                    due = None;
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
        let is_over = || begin.elapsed() >= *timeout || shared.has_failed.load(SeqCst);
        socket.drain_with(queue, batch, verdicts, is_over, function)
    }
}
