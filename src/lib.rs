//! NFQUEUE in pure Rust: the kernel hands a program its packets and waits for the verdict
#![deny(missing_docs)]
#![deny(unsafe_code)]

mod batch;
mod bindings;
mod callback;
mod data;
mod error;
mod event;
mod handle;
mod queue;
mod socket;
mod stats;
mod sys;

pub use nfqnl_proto as proto;

pub use batch::{Events, RecvBatch};
pub use data::QueueData;
pub use error::{Error, Operation, Refusal, Result, Situation};
pub use event::Event;
pub use handle::{Handle, HandleBuilder, open};
pub use nfqnl_proto::{
    ConfigFlags, CopyMode, Decision, Family, Hook, HwAddr, Packet, PacketKey, QueueConfig, SkbInfo,
    Verdict, Vlan, consts,
};
pub use queue::Queue;
pub use stats::{QueueStats, Stats};
