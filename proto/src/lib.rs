//! The NFQUEUE netlink protocol (`NFNL_SUBSYS_QUEUE`): no I/O, no allocation, no unsafe code
//!
//! Linux sends packets to a program over a netlink socket, and waits for its verdicts. This crate
//! reads and writes the messages; the crate `nfqnl` has the socket.
//!
//! # Receiving
//! [`Messages`] splits a datagram into [`Message`]s: a [`Packet`], a [`Reply`] to a request, or
//! something rarer.
//!
//! **Errors**: constructors check their input and may fail; getters never fail. No input makes
//! this crate panic or loop forever. Unknown values are data, not errors.
//!
//! **Lifetimes**: the slices returned by a view borrow the *buffer*, not the view.
//!
//! **Byte order**: all numbers are in host byte order. Bytes (payloads, link-layer headers, nested
//! attributes) keep their wire format.
//!
//! # Sending
//! [`Decision`] and [`PlainVerdict`] are verdicts, and [`ConfigRequest`] configures queues. Each
//! writes its message into the caller's buffer. [`EncodeError`] reports the size needed if the
//! buffer is too small.
//!
//! ```
//! use nfqnl_proto::{Message, Messages, RequestHeader, Verdict};
//!
//! # fn answer(datagram: &[u8]) -> Result<(), Box<dyn std::error::Error>> {
//! for message in Messages::new(datagram) {
//!     if let Message::Packet(packet) = message? {
//!         let mut buf = [0; 80];
//!         let is_long = packet.payload().len() > 1000;
//!         let verdict = if is_long { Verdict::Drop } else { Verdict::Accept };
//!         let header = RequestHeader { seq: packet.id(), ..Default::default() };
//!         let len = verdict.with_mark(7).encode(&mut buf, packet.queue(), packet.id(), header)?;
//!         // send(&buf[..len]) on the socket that bound the queue
//! #       assert_eq!(len, 40);
//!     }
//! }
//! # Ok(())
//! # }
//! # let packet = [
//! #     &32u32.to_ne_bytes()[..], &0x0300u16.to_ne_bytes(), &[0; 10], &[2, 0, 0, 1],
//! #     &11u16.to_ne_bytes(), &1u16.to_ne_bytes(), &[0, 0, 0, 9, 8, 0, 3, 0],
//! # ].concat();
//! # answer(&packet).unwrap();
//! ```
//!
//! # Kernels
//! Items without a version exist since Linux 2.6.14, the first with NFQUEUE. Older kernels omit
//! unknown attributes, ignore them in requests, and refuse unknown message types and (since 3.6)
//! unknown flags.
//!
//! # Features
//! * `std`: `Packet::time`; off by default.
//! * `netlink-packet-core`: owned messages for the rust-netlink stack, in `interop`. Needs `std`;
//!   off by default.
#![no_std]
#![forbid(unsafe_code)]
// No input may cause a panic.
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

#[cfg(feature = "std")]
extern crate std;

mod attr;
mod config;
mod conntrack;
pub mod consts;
mod error;
mod flow;
#[cfg(feature = "netlink-packet-core")]
#[path = "netlink_packet_core.rs"]
pub mod interop;
mod ip;
mod message;
mod packet;
pub mod rewrite;
mod types;
mod verdict;
mod vlan;
mod write;

pub use attr::{Attr, Attrs};
pub use config::{ConfigRequest, QueueConfig};
pub use conntrack::{
    Conntrack, ConntrackStatus, ConntrackUpdate, ConntrackUpdateError, Counters, CtState,
    Direction, Labels, TcpFlags, TcpInfo, TcpState, Tuple,
};
pub use error::{DecodeError, EncodeError, Header};
pub use flow::{FlowKey, Transport};
pub use message::{Message, Messages, Other, Reply};
pub use packet::{HwAddr, Packet, PacketKey, SkbInfo};
pub use types::{ConfigFlags, CopyMode, EtherType, Family, Hook, IpProtocol};
pub use verdict::{Decision, PlainVerdict, UnknownVerdict, Verdict};
pub use vlan::Vlan;
pub use write::{RequestHeader, encode_noop};
