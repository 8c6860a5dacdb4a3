//! The socket in a tokio runtime

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures_core::Stream;
use nfqnl_proto::{Decision, PacketKey, QueueConfig};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::engine::Wait;
use crate::error::{Error, Operation, Result};
use crate::event::Event;
use crate::owned_packet::OwnedPacket;
use crate::queue::Queue;
use crate::recv_batch::{Events, RecvBatch, Stashed};
use crate::socket::{Socket, whole_packets};
use crate::verdict::SendBatch;

/// Readable, or in error
///
/// An overrun can come right after the last message was read. The descriptor then has an error and
/// is not readable, and the kernel drops packets until the error is read (`netlink_overrun` in
/// `net/netlink/af_netlink.c`). Nothing else would wake the task.
const INTEREST: Interest = Interest::READABLE.add(Interest::ERROR);

/// A [`Socket`] for tokio: the same calls, `async` where they wait
///
/// Tasks can share it (`&`, `Arc`): some receive, each with its own batch, and others answer. Its
/// futures are `Send`. [`get_ref`](Self::get_ref) has everything else. Changing a setting does not
/// block the runtime's thread, because the kernel answers before the send returns.
/// [`bind`](Self::bind) can wait, so it uses a thread of tokio's blocking pool.
///
/// ```no_run
/// use nfqnl::{AsyncSocket, Event, RecvBatch, SendBatch, Socket, Verdict};
///
/// #[tokio::main]
/// async fn main() -> nfqnl::Result<()> {
///     let socket = AsyncSocket::new(Socket::open()?)?;
///     let _queue = socket.bind(1).await?;
///     let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
///     loop {
///         for event in socket.recv(&mut batch).await? {
///             match event {
///                 Event::Packet(packet) => verdicts.push(packet.key(), Verdict::Accept)?,
///                 other => eprintln!("{other}"),
///             }
///         }
///         socket.send(&mut verdicts)?;
///     }
/// }
/// ```
#[derive(Debug)]
pub struct AsyncSocket {
    /// Only shared references leave this type, so the registered socket cannot change
    fd: AsyncFd<Socket>,
}

impl AsyncSocket {
    /// Registers a socket with the caller's runtime
    ///
    /// # Errors
    /// [`Error::Io`] if the runtime's epoll instance refuses the descriptor; the socket is closed
    /// then.
    ///
    /// # Panics
    /// Outside a tokio runtime, or in one without I/O (`Builder::enable_io`).
    #[track_caller]
    pub fn new(socket: Socket) -> Result<Self> {
        // Newer tokio deprecates this constructor, because some types could change their
        // descriptor while it is registered. A `Socket` does not.
        #[allow(deprecated, reason = "`AsyncFd::register` is new in tokio 1.53.3")]
        let fd = AsyncFd::with_interest(socket, INTEREST);
        let fd = fd.map_err(Error::io(Operation::Register))?;
        Ok(Self { fd })
    }

    /// Binds a queue, as [`Socket::bind`] does
    ///
    /// If the future is dropped, the queue is unbound after the bind, as a dropped [`Queue`] is.
    ///
    /// # Errors
    /// As [`Socket::bind_with`].
    pub async fn bind(&self, num: u16) -> Result<Queue> {
        self.bind_with(num, &QueueConfig::new()).await
    }

    /// Binds a queue with its settings, as [`Socket::bind_with`] does
    ///
    /// # Errors
    /// As [`Socket::bind_with`].
    pub async fn bind_with(&self, num: u16, config: &QueueConfig) -> Result<Queue> {
        let engine = Arc::clone(&self.get_ref().engine);
        let config = whole_packets(config);
        let bound = tokio::task::spawn_blocking(move || {
            let binding = engine.bind(num, config, |_| ())?;
            Ok(Queue::new(&engine, binding))
        });
        let failed = Error::io(Operation::Bind(num));
        bound.await.map_err(|error| failed(error.into()))?
    }

    /// Receives what is there and waits if there is nothing, as [`Socket::recv`] does
    ///
    /// Cancel-safe: the future does not wait any more once it has received anything, so a dropped
    /// future has taken no packet. The call takes part in tokio's cooperative scheduling, so a
    /// loop over it lets other tasks run at any packet rate.
    ///
    /// ```
    /// # async fn f(socket: nfqnl::AsyncSocket, mut batch: nfqnl::RecvBatch) -> nfqnl::Result<()> {
    /// # let mut report = tokio::time::interval(std::time::Duration::from_secs(1));
    /// # use nfqnl::{Event, Verdict};
    /// loop {
    ///     tokio::select! {
    ///         events = socket.recv(&mut batch) => for event in events? {
    ///             match event {
    ///                 Event::Packet(packet) => socket.set_verdict(packet.key(), Verdict::Accept)?,
    ///                 other => eprintln!("{other}"),
    ///             }
    ///         },
    ///         _ = report.tick() => println!("{:?}", socket.get_ref().stats()),
    ///     }
    /// }
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Socket::recv`]; [`Error::Io`] also when the runtime is shut down.
    pub async fn recv<'b>(&self, batch: &'b mut RecvBatch) -> Result<Events<'b>> {
        // The descriptor does not report events left in a batch.
        if !batch.has_events() {
            let receive = |socket: &Socket| match socket.fill(batch, Wait::No) {
                // The socket is empty, so the runtime may wait for it again.
                Ok(false) => Err(io::ErrorKind::WouldBlock.into()),
                filled => Ok(filled),
            };
            let filled = self.fd.async_io(INTEREST, receive).await;
            filled.map_err(Error::io(Operation::Receive))??;
        } else {
            self.get_ref().fill(batch, Wait::No)?;
        }
        Ok(batch.events())
    }

    /// Sends collected verdicts, as [`Socket::send`] does; it does not block
    ///
    /// # Errors
    /// As [`Socket::send`].
    pub fn send(&self, verdicts: &mut SendBatch) -> Result<()> {
        self.get_ref().send(verdicts)
    }

    /// Answers a packet, as [`Socket::set_verdict`] does; it does not block
    ///
    /// # Errors
    /// As [`Socket::set_verdict`].
    pub fn set_verdict<'p>(&self, key: PacketKey, decision: impl Into<Decision<'p>>) -> Result<()> {
        self.get_ref().set_verdict(key, decision)
    }

    /// Returns the packets as a stream of copies, to keep or to send elsewhere
    ///
    /// The stream is for convenience: each packet costs a system call and a copy. The stream skips
    /// refusals and overruns; [`Socket::stats`] counts them. A malformed packet message is an
    /// error. The stream does not end, not even after an error.
    ///
    /// Cancel-safe: a stream holds no packet back, so it can be dropped and made again at any
    /// time.
    ///
    /// ```
    /// # async fn f(socket: nfqnl::AsyncSocket) -> nfqnl::Result<()> {
    /// use futures_lite::StreamExt; // or that of futures, or of tokio-stream
    /// use nfqnl::Verdict;
    ///
    /// let mut packets = socket.packets();
    /// while let Some(packet) = packets.next().await {
    ///     let packet = packet?;
    ///     println!("{} bytes", packet.packet().payload().len());
    ///     socket.set_verdict(packet.key(), Verdict::Accept)?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn packets(&self) -> PacketStream<'_> {
        PacketStream {
            socket: self,
            state: StreamState::Idle(vec![0; RecvBatch::DEFAULT_SLOT_LEN]),
        }
    }

    /// Receives one packet, and returns it with the buffer
    async fn next_packet(&self, mut buf: Vec<u8>) -> (Vec<u8>, Result<OwnedPacket>) {
        let packet = loop {
            let receive = |socket: &Socket| match socket.engine.receive_owned(&mut buf) {
                Ok(None) => Err(io::ErrorKind::WouldBlock.into()),
                received => Ok(received),
            };
            let stashed = match self.fd.async_io(INTEREST, receive).await {
                Ok(Ok(stashed)) => stashed,
                Ok(Err(error)) => break Err(error),
                Err(error) => break Err(Error::io(Operation::Receive)(error)),
            };
            match stashed.as_ref().and_then(Stashed::event) {
                Some(Event::Packet(packet)) => break Ok(packet.into()),
                Some(Event::BufferTooSmall { key, needed, had }) => {
                    break Err(Error::BufferTooSmall { key, needed, had });
                }
                Some(Event::Malformed { key, error: source }) => {
                    break Err(Error::Decode { key, source });
                }
                _ => {}
            }
        };
        (buf, packet)
    }

    /// Returns the socket
    #[must_use]
    pub fn get_ref(&self) -> &Socket {
        self.fd.get_ref()
    }

    /// Takes the socket from the runtime; its queues stay bound
    #[must_use]
    pub fn into_inner(self) -> Socket {
        self.fd.into_inner()
    }
}

impl AsFd for AsyncSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.get_ref().as_fd()
    }
}

/// The packets of an [`AsyncSocket`], copied; made by [`AsyncSocket::packets`]
#[must_use = "a stream does nothing until it is polled"]
pub struct PacketStream<'s> {
    socket: &'s AsyncSocket,
    state: StreamState<'s>,
}

enum StreamState<'s> {
    Idle(Vec<u8>),
    /// While this waits, it has received nothing
    Receiving(Receiving<'s>),
}

type Receiving<'s> = Pin<Box<dyn Future<Output = (Vec<u8>, Result<OwnedPacket>)> + Send + 's>>;

impl Stream for PacketStream<'_> {
    type Item = Result<OwnedPacket>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let socket = self.socket;
        if let StreamState::Idle(buf) = &mut self.state {
            let receiving = socket.next_packet(std::mem::take(buf));
            self.state = StreamState::Receiving(Box::pin(receiving));
        }
        let StreamState::Receiving(receiving) = &mut self.state else {
            return Poll::Pending;
        };
        let (buf, packet) = ready!(receiving.as_mut().poll(cx));
        self.state = StreamState::Idle(buf);
        Poll::Ready(Some(packet))
    }
}

impl fmt::Debug for PacketStream<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PacketStream")
            .field("socket", self.socket)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_and_its_futures_are_send() {
        const fn is_send_and_sync<T: Send + Sync>() {}
        is_send_and_sync::<AsyncSocket>();
        fn is_send<T: Send>(_: &T) {}
        let _ = |socket: &AsyncSocket, batch: &mut RecvBatch| {
            is_send(&socket.recv(batch));
            is_send(&socket.bind(1));
            is_send(&socket.packets());
        };
    }
}
