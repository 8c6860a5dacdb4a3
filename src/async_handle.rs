//! The handle in a tokio runtime

use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_core::Stream;
use nfqnl_proto::{Decision, PacketKey};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::batch::{Events, RecvBatch};
use crate::error::{Error, Operation, Result};
use crate::handle::Handle;
use crate::owned::OwnedPacket;
use crate::sys::{self, Wait};
use crate::verdicts::VerdictBatch;

/// What tells that there is something to receive
///
/// An overrun can come right after the last message was read. The descriptor is not readable then, it has an error; and
/// the kernel drops packets until it is asked (`netlink_overrun` in `net/netlink/af_netlink.c`), so nothing else would
/// wake anybody.
pub(crate) const INTEREST: Interest = Interest::READABLE.add(Interest::ERROR);

/// A [`Handle`] in the loop style, for tokio: the same calls, and those that wait are `async`
///
/// It can be shared (`&`, `Arc`) among tasks that receive, each with its own batch, and tasks that answer; its futures
/// are `Send`. Everything else that a handle can do is reached by [`get_ref`](Self::get_ref): binding a queue and other
/// configuration calls have their answer from the kernel before they look for it, and only one whose answer was lost
/// holds up its thread ([`HandleBuilder::ack_timeout`](crate::HandleBuilder::ack_timeout)).
///
/// ```no_run
/// use nfqnl::{AsyncHandle, Handle, RecvBatch, Verdict, VerdictBatch};
///
/// #[tokio::main]
/// async fn main() -> nfqnl::Result<()> {
///     let handle = AsyncHandle::new(Handle::open()?)?;
///     let _queue = handle.get_ref().bind_queue(1)?;
///     let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
///     loop {
///         for packet in handle.recv(&mut batch).await?.packets() {
///             verdicts.push(packet.key(), Verdict::Accept)?;
///         }
///         handle.send(&mut verdicts).await?;
///     }
/// }
/// ```
#[derive(Debug)]
pub struct AsyncHandle {
    /// Lent out shared alone, so that nobody can put another handle in place of this one
    fd: AsyncFd<Handle>,
}

impl AsyncHandle {
    /// Registers a handle with the runtime that the caller runs in
    ///
    /// # Errors
    /// [`Error::Io`] if the runtime's epoll instance does not take the descriptor; the handle is closed then.
    ///
    /// # Panics
    /// Outside a tokio runtime, or in one without I/O (`Builder::enable_io`).
    #[track_caller]
    pub fn new(handle: Handle) -> Result<Self> {
        let fd = sys::register(handle).map_err(|source| Error::Io {
            op: Operation::Register,
            source,
        })?;
        Ok(Self { fd })
    }

    /// Receives what is there, and waits if nothing is, as [`Handle::recv`] does
    ///
    /// Cancel-safe: nothing is awaited once anything has been received, so a future that is dropped has taken no packet
    /// with it. It takes part in tokio's cooperative scheduling, so a loop over it lets other tasks run, however many
    /// packets come.
    ///
    /// ```
    /// # async fn f(handle: nfqnl::AsyncHandle, mut batch: nfqnl::RecvBatch) -> nfqnl::Result<()> {
    /// # let mut report = tokio::time::interval(std::time::Duration::from_secs(1));
    /// # use nfqnl::Verdict;
    /// loop {
    ///     tokio::select! {
    ///         events = handle.recv(&mut batch) => for packet in events?.packets() {
    ///             handle.verdict(packet.key(), Verdict::Accept)?;
    ///         },
    ///         _ = report.tick() => println!("{:?}", handle.get_ref().stats()),
    ///     }
    /// }
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Handle::recv`]; also when the runtime is shut down.
    pub async fn recv<'b>(&self, batch: &'b mut RecvBatch) -> Result<Events<'b>> {
        // The descriptor does not tell of what is left in a batch.
        if !batch.has_events() {
            let receive = |handle: &Handle| match handle.shared.fill(batch, Wait::No) {
                // The socket was empty, and the runtime may wait for it again.
                Ok(false) => Err(io::ErrorKind::WouldBlock.into()),
                filled => Ok(filled),
            };
            let filled = self.fd.async_io(INTEREST, receive).await;
            filled.map_err(|source| Error::Io {
                op: Operation::Receive,
                source,
            })??;
        }
        Ok(batch.events())
    }

    /// Sends collected verdicts, and empties the batch, as [`Handle::send`] does
    ///
    /// It never waits: the kernel takes verdicts at once, and has carried them out when their system call returns. Until
    /// the future is polled nothing is sent, and all verdicts are in the batch.
    ///
    /// # Errors
    /// As [`Handle::send`]; after [`Error::Io`], what was not sent is in the batch.
    pub async fn send(&self, verdicts: &mut VerdictBatch) -> Result<()> {
        self.get_ref().send(verdicts)
    }

    /// Answers a packet, as [`Handle::verdict`] does; the kernel does not make it wait
    ///
    /// # Errors
    /// As [`Handle::verdict`].
    pub fn verdict<'p>(&self, key: PacketKey, decision: impl Into<Decision<'p>>) -> Result<()> {
        self.get_ref().verdict(key, decision)
    }

    /// The packets as a stream of copies, which can be kept and sent elsewhere
    ///
    /// For convenience: each packet is copied to memory of its own. As with [`Events::packets`], everything that is no
    /// packet is passed over, and counted in [`Handle::stats`]. The stream does not end, not even after an error.
    ///
    /// Cancel-safe: what the stream has received and not yielded when it is dropped goes back to the handle, to be
    /// received next.
    ///
    /// ```
    /// # async fn f(handle: nfqnl::AsyncHandle) -> nfqnl::Result<()> {
    /// use futures_lite::StreamExt; // or that of futures, or of tokio-stream
    /// use nfqnl::Verdict;
    ///
    /// let mut packets = handle.packets();
    /// while let Some(packet) = packets.next().await {
    ///     let packet = packet?;
    ///     println!("{} bytes", packet.packet().payload().len());
    ///     handle.verdict(packet.key(), Verdict::Accept)?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn packets(&self) -> PacketStream<'_> {
        PacketStream {
            handle: self,
            state: State::Looking(RecvBatch::default()),
        }
    }

    /// The handle
    #[must_use]
    pub fn get_ref(&self) -> &Handle {
        self.fd.get_ref()
    }

    /// Takes the handle from the runtime; its queues go on
    #[must_use]
    pub fn into_inner(self) -> Handle {
        self.fd.into_inner()
    }
}

impl AsFd for AsyncHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.get_ref().as_fd()
    }
}

impl AsRawFd for AsyncHandle {
    fn as_raw_fd(&self) -> RawFd {
        self.get_ref().as_raw_fd()
    }
}

/// The packets of an [`AsyncHandle`], copied; made by [`AsyncHandle::packets`]
#[must_use = "a stream does nothing until it is polled"]
pub struct PacketStream<'h> {
    handle: &'h AsyncHandle,
    state: State<'h>,
}

enum State<'h> {
    /// The batch may have events
    Looking(RecvBatch),
    /// The future has the batch, in which there are none as long as it waits
    Receiving(Receiving<'h>),
}

type Receiving<'h> = Pin<Box<dyn Future<Output = (RecvBatch, Result<()>)> + Send + 'h>>;

impl Stream for PacketStream<'_> {
    type Item = Result<OwnedPacket>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let handle = self.handle;
        loop {
            match &mut self.state {
                State::Looking(batch) => {
                    if let Some(packet) = batch.events().packets().next() {
                        return Poll::Ready(Some(Ok(packet.into())));
                    }
                    let stand_in = RecvBatch::new(1, 0);
                    let mut batch = std::mem::replace(batch, stand_in);
                    self.state = State::Receiving(Box::pin(async move {
                        let received = handle.recv(&mut batch).await.map(drop);
                        (batch, received)
                    }));
                }
                State::Receiving(receiving) => {
                    let (batch, received) = ready!(receiving.as_mut().poll(cx));
                    self.state = State::Looking(batch);
                    if let Err(error) = received {
                        return Poll::Ready(Some(Err(error)));
                    }
                }
            }
        }
    }
}

impl Drop for PacketStream<'_> {
    fn drop(&mut self) {
        if let State::Looking(batch) = &mut self.state {
            let (rest, bindings) = batch.take_rest();
            self.handle.get_ref().shared.put_back(rest, bindings);
        }
    }
}

impl fmt::Debug for PacketStream<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_waiting = matches!(self.state, State::Receiving(_));
        f.debug_struct("PacketStream")
            .field("handle", self.handle)
            .field("is_waiting", &is_waiting)
            .finish_non_exhaustive()
    }
}

const _: () = {
    const fn is_send_and_sync<T: Send + Sync>() {}
    is_send_and_sync::<AsyncHandle>();
};

const _: fn(&AsyncHandle, &mut RecvBatch, &mut VerdictBatch) = |handle, batch, verdicts| {
    fn is_send(_: impl Send) {}
    is_send(handle.recv(batch));
    is_send(handle.send(verdicts));
    is_send(handle.packets());
};
