//! Verdicts: collecting, merging and sending them

#[cfg(test)]
mod model_tests;
mod outstanding;
mod send_batch;
mod sender;

pub(crate) use outstanding::{Outstanding, Recorded, Seen};
pub use send_batch::SendBatch;
#[cfg(test)]
pub(crate) use send_batch::{Part, send_header};
pub(crate) use send_batch::{encode_plain, network_header_len};
pub use sender::VerdictSender;
