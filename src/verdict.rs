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
pub(crate) use send_batch::{check_decision, encode_plain};
pub use sender::{VerdictGuard, VerdictSender};
