//! NFQUEUE in pure Rust: the kernel hands packets to a program and waits for its verdicts
//!
//! A rule in iptables (`-j NFQUEUE --queue-num 1`) or nftables (`queue num 1`) puts packets in a
//! queue. A program that has bound the queue receives each packet and decides what happens to it.
//! This crate speaks the kernel's netlink protocol itself, without a C library.
//!
//! # Where to begin
//! * [`Socket`] is the loop API: bind queues, receive [`Event`]s, send verdicts.
//! * [`Handle`] is the callback API, with the names of libnetfilter_queue; [`QueueData`] is the
//!   packet as a callback sees it.
//! * [`Queue`] is a bound queue: copy mode, flags, maximum length, end.
//! * [`Packet`] is a view of a waiting packet; its [`PacketKey`] answers it, from any thread.
//! * [`Workers`] are a thread and a socket for each queue of a range.
//! * [`Verdict`] and [`Decision`] are the answers. A [`SendBatch`] sends many together. A
//!   [`VerdictSender`] sends from other threads; an [`OwnedPacket`] is a copy for them.
//! * A [`Netns`] is another network namespace. The module `rules` (feature `rules`) adds rules.
//! * [`Socket::drain`] stops a queue without losing a packet; [`Socket::into_fd`] and
//!   [`Socket::adopt`] restart a program without losing one. [`Pending`] forgets no packet.
//! * A [`Waker`] ends a receive call from another thread or a signal handler.
//! * [`Conntrack`] is the packet's conntrack entry; [`FlowKey`] has its addresses and ports.
//!   [`Rewrite`](rewrite::Rewrite) changes packets.
//! * [`Error`], [`Refusal`] and [`ErrorKind`] describe failures; [`Stats`] and [`QueueStats`]
//!   count.
//!
//! ```no_run
//! use nfqnl::{Event, RecvBatch, SendBatch, Socket, Verdict};
//!
//! # fn main() -> nfqnl::Result<()> {
//! let socket = Socket::open()?;
//! let _queue = socket.bind(1)?;
//! let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
//! loop {
//!     for event in socket.recv(&mut batch)? {
//!         match event {
//!             Event::Packet(packet) => {
//!                 println!("{} bytes at {}", packet.payload().len(), packet.hook());
//!                 verdicts.push(packet.key(), Verdict::Accept)?;
//!             }
//!             other => eprintln!("{other}"),
//!         }
//!     }
//!     socket.send(&mut verdicts)?;
//! }
//! # }
//! ```
//!
//! # A rule
//! ```sh
//! nft add table inet filter
//! nft add chain inet filter in '{ type filter hook input priority 0; }'
//! nft add rule inet filter in tcp dport 80 queue flags bypass to 1
//! # or
//! iptables -A INPUT -p tcp --dport 80 -j NFQUEUE --queue-num 1 --queue-bypass
//! ```
//! With `bypass`, packets pass while no program has bound the queue. Without it the kernel drops
//! them. Bind the queue first, and add the rule then. If nft says "No such file or directory", the
//! kernel lacks `CONFIG_NFT_QUEUE`: use iptables or the module `rules`.
//!
//! # Privileges
//! Every request, verdicts included, needs `CAP_NET_ADMIN` in the user namespace that owns the
//! socket's network namespace. `unshare -Urn` gives an ordinary user one of each. Opening a socket
//! without the capability succeeds, but the kernel then refuses every request of this socket, also
//! if the process gets the capability later. Threads that send verdicts must agree in
//! `CAP_NET_ADMIN`; drop capabilities before you start threads.
//!
//! For a program of an ordinary user, give its file the capability:
//! `setcap cap_net_admin+ep target/release/program`.
//!
//! # Examples
//! The repository has them in `examples/`: `cargo run --example batch`.
//! * `demo` brings its own namespace, rules and traffic; `print_packets` has callbacks.
//! * `batch` sends different verdicts and marks together; `accept_all` is the smallest program.
//! * `rewrite` and `dns_filter` change packets; `rewrite` also prints the user, the interfaces, the
//!   flow and the connection state. `first_bytes` inspects the first bytes of each TCP connection.
//! * `rules` brings its own rules.
//! * `daemon` has signals, a worker and a clean stop; `upgrade` replaces itself and loses no
//!   packet.
//! * `workers` gives each CPU a queue and a thread.
//! * `mio`, `async_io` and `tokio` drive a socket by a runtime.
//! * `nf_queue` has the command line of the kernel's own test program.
//!
//! # Terms
//! * *Binding*: one period of a queue, from its bind to its unbind.
//! * *Copy range*: the number of bytes of each packet that the kernel sends.
//! * *Overrun*: the socket's receive buffer was full, and the kernel dropped packets.
//! * *Slot*: the place for one datagram in a [`RecvBatch`].
//! * *GSO*: the kernel sends large packets in one piece, and segments them later.
//!
//! # Losses
//! If the queue or the socket's receive buffer is full, the kernel drops packets, or accepts them
//! with [`ConfigFlags::FAIL_OPEN`]. It also drops waiting packets when their queue is unbound,
//! their device goes down or a base chain is deleted. [`Stats`] lists the counters of these
//! losses. The library itself loses no packets.
//!
//! # Fork
//! After fork(2) both processes have the socket. A drop then unbinds nothing in either process;
//! see [`Queue`]. Both may receive from queues that were bound before the fork, and each one
//! answers the packets it received. A process skips packets of queues that the other one bound
//! later. Fork while no other thread uses the socket, and after all events were read.
//!
//! # Features
//! mio, async-io and other runtimes need no feature: a [`Socket`] has a descriptor to wait for
//! ([`AsFd`](std::os::fd::AsFd)) and [`try_recv`](Socket::try_recv); there is an example for each.
//!
//! * `netlink-packet-core` (default): owned messages for the rust-netlink stack, in
//!   `nfqnl::proto::interop`. They follow the versions of `netlink-packet-core`: a release of this
//!   crate with a new version of it is not a breaking release.
//! * `rules`: the module `rules`, for programs that bring their own rules.
//! * `tokio`: `AsyncSocket`, with tokio's features `net` and `rt`.
#![cfg_attr(docsrs, feature(doc_cfg))]
// Data from outside must not cause a panic.
#![cfg_attr(
    not(test),
    warn(
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::string_slice,
        clippy::unreachable
    )
)]
#![deny(missing_docs)]
#![deny(unsafe_code)]

mod data;
mod engine;
mod error;
mod event;
mod handle;
mod handover;
mod interface_name;
mod netns;
mod owned_packet;
mod pending;
mod queue;
mod recv_batch;
#[cfg(feature = "rules")]
pub mod rules;
mod socket;
mod stats;
mod sys;
#[cfg(feature = "tokio")]
mod tokio;
mod verdict;
mod workers;

pub use nfqnl_proto as proto;
pub use nfqnl_proto::rewrite;

#[cfg(feature = "tokio")]
pub use crate::tokio::{AsyncSocket, PacketStream};
pub use data::QueueData;
pub use engine::Waker;
pub use error::{Error, ErrorKind, Operation, Refusal, Result};
pub use event::Event;
pub use handle::{Handle, HandleRef, open};
pub use handover::{Handover, Orphans, ParseHandoverError};
pub use interface_name::{InterfaceName, ParseInterfaceNameError};
pub use netns::Netns;
pub use nfqnl_proto::{
    ConfigFlags, Conntrack, ConntrackStatus, ConntrackUpdate, ConntrackUpdateError, CopyMode,
    Counters, CtState, Decision, Direction, EtherType, Family, FlowKey, Hook, HwAddr, IpProtocol,
    Labels, Packet, PacketKey, PlainVerdict, QueueConfig, SkbInfo, TcpFlags, TcpInfo, TcpState,
    Transport, Tuple, Verdict, Vlan, consts,
};
pub use owned_packet::OwnedPacket;
pub use pending::Pending;
pub use queue::Queue;
pub use recv_batch::{Events, RecvBatch};
pub use socket::{Socket, SocketBuilder};
pub use stats::{QueueStats, Stats};
pub use verdict::{SendBatch, VerdictGuard, VerdictSender};
pub use workers::{WorkerError, Workers, WorkersBuilder};

/// Only for the fuzz targets of this repository
#[cfg(nfqnl_fuzzing)]
#[doc(hidden)]
pub mod fuzzing {
    pub use crate::sys::{Kernel, with_kernel};

    /// Wraps a descriptor without setting its options, for a target's kernel
    ///
    /// # Errors
    /// As [`SocketBuilder::open_fd`](crate::SocketBuilder::open_fd).
    pub fn open_over(
        fd: std::os::fd::OwnedFd,
        builder: crate::SocketBuilder,
    ) -> crate::Result<crate::Socket> {
        builder.open_over(fd)
    }
}

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
