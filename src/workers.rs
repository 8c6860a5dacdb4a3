//! A thread and a socket for each queue of a range

use std::any::Any;
use std::fmt;
use std::ops::RangeInclusive;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nfqnl_proto::{PlainVerdict, QueueConfig, Verdict};

use crate::engine::Waker;
use crate::error::{Error, Operation, Result};
use crate::event::Event;
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
    on_panic: PlainVerdict,
}

impl WorkersBuilder {
    /// Sets the number of queues, and so of threads; by default the number of CPUs that the process
    /// may use
    ///
    /// The number is at least 1, and the last queue is at most 65535: [`Workers::queues`] returns
    /// the range.
    pub const fn count(mut self, count: u16) -> Self {
        self.count = Some(count);
        self
    }

    /// Keeps each thread on its CPUs; `false` by default
    ///
    /// Worker i stays on those CPUs c of the process's mask with `c % count == i`. These feed its
    /// queue in a rule with fanout (`Queues::fanout` in the module `rules`), so the thread finds
    /// the packets in the caches of its CPU. A worker without such a CPU is not pinned.
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
            is_stopped: AtomicBool::new(false),
            drain_until: Mutex::new(None),
            wakers: parts.iter().map(|(socket, _)| socket.waker()).collect(),
        };
        let mut workers = Workers {
            queues: self.first..=last,
            sockets: parts.iter().map(|(socket, _)| Arc::clone(socket)).collect(),
            shared: Arc::new(shared),
            threads: Vec::new(),
        };
        for (index, (socket, queue)) in parts.into_iter().enumerate() {
            let num = queue.num();
            let worker = Worker {
                socket,
                queue,
                shared: Arc::clone(&workers.shared),
                on_panic: self.on_panic,
                function: make(index),
            };
            let pin = self.is_pinned.then_some((index, workers.queues.len()));
            let run = move || {
                if let Some((index, count)) = pin {
                    sys::stay_on_cpus(|cpu| cpu % count == index);
                }
                worker.run()
            };
            let thread = std::thread::Builder::new().name(format!("nfqnl-{num}"));
            let thread = thread
                .spawn(run)
                .map_err(Error::io(Operation::StartWorker(num)))?;
            workers.threads.push((num, thread));
        }
        Ok(workers)
    }
}

/// One thread and one socket for each queue of a range
///
/// This uses all CPUs: a rule spreads packets over the queues, and each thread shares nothing with
/// the others. All queues are bound when [`start`](WorkersBuilder::start) returns, so add the rule
/// then.
///
/// * A rule for a range (`queue num 1-4`, `--queue-balance 1:4`) chooses the queue by the packet's
///   addresses and protocol. A connection keeps its queue, in both directions.
/// * With fanout (`--queue-cpu-fanout`) the CPU that handles the packet chooses. This helps only
///   where the network card or RPS spreads packets over the CPUs, and packets of one connection may
///   then be in several queues and change their order.
///
/// If a worker panics or fails, all stop, and the kernel drops the waiting packets of the other
/// queues. Dropping this value stops all too. Every end waits for functions that are running.
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
    sockets: Vec<Arc<Socket>>,
    shared: Arc<Shared>,
    threads: Vec<(u16, JoinHandle<Result<u64, Failure>>)>,
}

impl Workers {
    /// Returns the default settings, for queues from `first` on
    ///
    /// If a worker panics or fails, the waiting packets of its queue get the verdict `on_panic`.
    /// With Accept, new packets pass by until the queue is unbound. With another verdict the kernel
    /// drops the packets of this moment.
    pub fn builder(first: u16, on_panic: impl Into<PlainVerdict>) -> WorkersBuilder {
        WorkersBuilder {
            first,
            count: None,
            is_pinned: false,
            socket: Socket::builder(),
            config: QueueConfig::new(),
            on_panic: on_panic.into(),
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
        self.sockets.iter().map(|socket| socket.stats()).sum()
    }

    /// Returns true if a worker has panicked or failed: all have stopped then, or stop now
    #[must_use]
    pub fn have_failed(&self) -> bool {
        self.shared.is_stopped.load(SeqCst)
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
    /// A worker stops after the event that it handles, and sends its verdicts.
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
    /// # Errors
    /// [`WorkerError`]: a worker has panicked or failed.
    pub fn drain(mut self, timeout: Duration) -> Result<u64, WorkerError> {
        let end = sys::now().checked_add(timeout);
        *self.shared.drain_until() = Some(end);
        self.shared.stop();
        self.join()
    }

    /// Waits for all threads; returns the number of packets lost by drains
    fn join(&mut self) -> Result<u64, WorkerError> {
        let mut lost = Ok(0);
        for (queue, thread) in self.threads.drain(..) {
            let ended = thread
                .join()
                .unwrap_or_else(|payload| Err(panicked(&*payload)));
            lost = match (lost, ended) {
                (Ok(lost), Ok(more)) => Ok(lost + more),
                (Err(first), _) => Err(first),
                (_, Err(Failure::Error(source))) => Err(WorkerError::Failed { queue, source }),
                (_, Err(Failure::Panic(message))) => Err(WorkerError::Panicked { queue, message }),
            };
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
    is_stopped: AtomicBool,
    /// Each queue is drained until then; `Some(None)` has no end
    drain_until: Mutex<Option<Option<Instant>>>,
    wakers: Vec<Waker>,
}

impl Shared {
    fn stop(&self) {
        self.is_stopped.store(true, SeqCst);
        self.wakers.iter().for_each(Waker::wake_all);
    }

    fn drain_until(&self) -> std::sync::MutexGuard<'_, Option<Option<Instant>>> {
        self.drain_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

enum Failure {
    Error(Error),
    Panic(String),
}

/// Returns the failure of a caught panic
fn panicked(payload: &(dyn Any + Send)) -> Failure {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    Failure::Panic(text.unwrap_or("no text").to_owned())
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

struct Worker<F> {
    socket: Arc<Socket>,
    queue: Queue,
    shared: Arc<Shared>,
    on_panic: PlainVerdict,
    function: F,
}

impl<F: FnMut(Event<'_>, &mut SendBatch) -> Result<()>> Worker<F> {
    /// Runs until a stop or a failure; returns the number of packets lost by a drain
    fn run(self) -> Result<u64, Failure> {
        let Self {
            socket,
            queue,
            shared,
            on_panic,
            mut function,
        } = self;
        let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
        let worked = catch_unwind(AssertUnwindSafe(|| {
            while !shared.is_stopped.load(SeqCst) {
                for event in socket.recv(&mut batch)? {
                    function(event, &mut verdicts)?;
                    if shared.is_stopped.load(SeqCst) {
                        break; // the rest stays in the batch
                    }
                }
                socket.send(&mut verdicts)?;
            }
            let Some(end) = *shared.drain_until() else {
                return Ok(0);
            };
            let left = end.map_or(Duration::MAX, |end| {
                end.saturating_duration_since(sys::now())
            });
            socket.drain_with(&queue, &mut batch, &mut verdicts, left, &mut function)
        }));
        let failure = match worked {
            Ok(Ok(lost)) => return Ok(queue.destroy().map(|()| lost)?),
            Ok(Err(error)) => Failure::Error(error),
            Err(payload) => panicked(&*payload),
        };
        shared.stop();
        // Decided packets keep their verdicts; all others get the default.
        let _ = socket.send(&mut verdicts);
        if on_panic.verdict() == Verdict::Accept {
            let _ = queue.pass_by();
        }
        let _ = queue.answer_all(on_panic);
        let _ = queue.destroy();
        Err(failure)
    }
}
