//! Verdicts: collecting, merging and sending them

#[cfg(test)]
mod model_tests;
mod outstanding;
mod send_batch;
mod sender;

pub(crate) use outstanding::{Outstanding, Recorded, Seen};
pub use send_batch::SendBatch;
pub(crate) use send_batch::{Part, network_header_len, send_header};
pub use sender::VerdictSender;
