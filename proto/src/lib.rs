//! The NFQUEUE netlink protocol (`NFNL_SUBSYS_QUEUE`) as bytes: no I/O, no allocation, no unsafe code
//!
//! Linux hands packets to a program over a netlink socket and waits for its verdict. This crate reads and writes the
//! messages; the crate `nfqnl` has the socket.
//!
//! # Receiving
//! [`Messages`] splits a datagram into [`Message`]s: a [`Packet`], a [`Reply`] to a request, or something rarer.
//!
//! **The guarantee**: a constructor checks, and may fail; a getter of what it returned never does. No bytes
//! whatsoever make this crate panic or loop. Slices that a view hands out borrow the *buffer*, not the view.
//! Values that this crate does not know are data, not errors.
//!
//! **Byte order**: every number that this crate hands out or takes is in host byte order; bytes (payloads, link-layer
//! headers, nested attributes) stay as they are on the wire.
//!
//! # Sending
//! [`Decision`] and [`BatchVerdict`] carry verdicts, [`ConfigRequest`] configures queues. Each encodes into a buffer
//! of the caller's, and an [`EncodeError`] says how much room it wanted.
//!
//! ```
//! use nfqnl_proto::{Message, Messages, RequestHeader, Verdict};
//!
//! # fn answer(datagram: &[u8]) -> Result<(), Box<dyn std::error::Error>> {
//! for message in Messages::new(datagram) {
//!     if let Message::Packet(packet) = message? {
//!         let mut buf = [0; 80];
//!         let verdict = if packet.payload().len() > 1000 { Verdict::Drop } else { Verdict::Accept };
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
//! What names no version is there since Linux 2.6.14, the first with NFQUEUE. A kernel leaves out attributes that it
//! does not know, and ignores them in requests. Message types that it does not know it refuses, and flags from Linux
//! 3.6 on.
//!
//! # Features
//! * `netlink-packet-core`: owned messages for the rust-netlink stack, in `interop`. Needs std; off by default.
#![no_std]
#![forbid(unsafe_code)]
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

#[cfg(feature = "netlink-packet-core")]
extern crate std;

mod attr;
mod config;
pub mod consts;
mod error;
#[cfg(feature = "netlink-packet-core")]
pub mod interop;
mod message;
mod packet;
mod types;
mod verdict;
mod vlan;
mod write;

pub use attr::{Attr, Attrs};
pub use config::{ConfigRequest, QueueConfig};
pub use error::{DecodeError, EncodeError, Header};
pub use message::{Message, Messages, Other, Reply};
pub use packet::{HwAddr, Packet, PacketIndex, PacketKey, SkbInfo};
pub use types::{ConfigFlags, CopyMode, Family, Hook};
pub use verdict::{BatchVerdict, Decision, UnknownVerdict, Verdict};
pub use vlan::Vlan;
pub use write::{RequestHeader, encode_noop};
