//! NFQUEUE in pure Rust: the kernel hands a program its packets and waits for the verdict
//!
//! A rule in iptables (`-j NFQUEUE --queue-num 1`) or nftables (`queue num 1`) puts packets in a queue. A program that
//! has bound the queue sees each packet, and says what becomes of it. This crate speaks the kernel's netlink protocol
//! itself; there is no C library under it.
//!
//! # Where to begin
//! * [`Handle`] is the connection to the kernel, and explains the two styles: a **loop** over [`Event`]s, or
//!   **callbacks** with [`QueueData`] as in libnetfilter_queue.
//! * [`Queue`] is a bound queue: copy mode, flags, length, end.
//! * [`Packet`] is a view of a waiting packet; [`PacketKey`] is what it is answered by, from anywhere.
//! * [`Verdict`] and [`Decision`] are the answers; a [`VerdictBatch`] sends many together, a [`VerdictSender`] from other
//!   threads, to which an [`OwnedPacket`] can go.
//! * [`Error`], [`Refusal`] and [`Situation`] say what went wrong; [`Stats`] and [`QueueStats`] count.
//!
//! ```no_run
//! use nfqnl::{Handle, RecvBatch, Verdict, VerdictBatch};
//!
//! # fn main() -> nfqnl::Result<()> {
//! let handle = Handle::open()?;
//! let queue = handle.bind_queue(1)?;
//! let (mut batch, mut verdicts) = (RecvBatch::default(), VerdictBatch::new());
//! loop {
//!     for packet in handle.recv(&mut batch)?.packets() {
//!         println!("{} bytes at {}", packet.payload().len(), packet.hook());
//!         verdicts.push(packet.key(), Verdict::Accept)?;
//!     }
//!     handle.send(&mut verdicts)?;
//! }
//! # }
//! ```
//!
//! # Privileges
//! Every request, verdicts included, takes `CAP_NET_ADMIN` in the user namespace that owns the socket's network
//! namespace; so does opening the socket, which shows at the first request. `unshare -Urn` gives an ordinary user one of
//! each.
//!
//! # Losses
//! The kernel drops packets that find the queue or the socket's receive buffer full (or accepts them, with
//! [`ConfigFlags::FAIL_OPEN`]), and those that wait when their queue is unbound, their device goes down or a base
//! chain is deleted. [`Event::Overrun`], [`Event::Refused`] and [`Stats::lost_packets`] tell of it; the library itself
//! loses none.
//!
//! # Features
//! None is on by default. mio, async-io and other runtimes need none: a [`Handle`] has a descriptor to wait for
//! ([`AsFd`](std::os::fd::AsFd)) and [`try_recv`](Handle::try_recv); there is an example for each.
//!
//! * `netlink-packet-core`: owned messages for the rust-netlink stack, in `nfqnl::proto::interop`. They follow the
//!   versions of that crate; a release of this one that raises it is no breaking one.
//! * `tokio`: `AsyncHandle`, for tokio 1.53.3 and later.
#![cfg_attr(docsrs, feature(doc_cfg))]
// Nothing from outside makes it panic.
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

#[cfg(feature = "tokio")]
mod async_handle;
mod batch;
mod bindings;
mod data;
mod error;
mod event;
mod handle;
mod owned;
mod queue;
mod sender;
mod socket;
mod stats;
#[cfg_attr(fuzzing, path = "fuzzed_sys.rs")]
mod sys;
mod verdicts;
mod waiting;

pub use nfqnl_proto as proto;

#[cfg(feature = "tokio")]
pub use async_handle::{AsyncHandle, PacketStream};
pub use batch::{Events, Packets, RecvBatch};
pub use data::QueueData;
pub use error::{Error, Operation, Refusal, Result, Situation};
pub use event::Event;
pub use handle::{Handle, HandleBuilder, open};
pub use nfqnl_proto::{
    ConfigFlags, CopyMode, Decision, Family, Hook, HwAddr, Packet, PacketKey, QueueConfig, SkbInfo,
    Verdict, Vlan, consts,
};
pub use owned::OwnedPacket;
pub use queue::Queue;
pub use sender::VerdictSender;
pub use stats::{QueueStats, Stats};
pub use verdicts::VerdictBatch;

/// For the fuzz targets of this repository alone
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing {
    pub use crate::sys::{Kernel, with_kernel};

    /// A handle over a socket that is left as it is, for a target's kernel to speak for, taken over or new
    ///
    /// # Errors
    /// As [`HandleBuilder::open_fd`](crate::HandleBuilder::open_fd).
    pub fn open_over(
        fd: std::os::fd::OwnedFd,
        builder: crate::HandleBuilder,
        is_taken_over: bool,
    ) -> crate::Result<crate::Handle> {
        builder.open_over(fd, is_taken_over)
    }
}

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
