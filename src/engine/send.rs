//! Sending verdicts

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering::Relaxed;

use nfqnl_proto::{Decision, PacketKey, PlainVerdict, Verdict};

use super::{BindingId, Engine};
use crate::error::{Error, Operation, Result};
use crate::sys;
use crate::verdict::{SendBatch, encode_plain};

impl Engine {
    /// Sends one verdict
    pub(crate) fn set_verdict(&self, key: PacketKey, decision: &Decision<'_>) -> Result<()> {
        match decision.as_plain() {
            Some(verdict) => self.set_plain(key, verdict, false),
            None => self.set_long(key, decision),
        }
    }

    /// Sends one plain verdict, on this packet or on all packets up to it
    pub(crate) fn set_plain(
        &self,
        key: PacketKey,
        verdict: PlainVerdict,
        is_batch: bool,
    ) -> Result<()> {
        let id = key.id();
        let op = match is_batch {
            false => Operation::Verdict(key),
            true => Operation::BatchVerdict(key),
        };
        let bindings = self.bindings();
        let Some(binding) = bindings.current(key.into()) else {
            drop(bindings);
            return Err(self.unbound(key, op));
        };
        let newest = is_batch.then(|| binding.outstanding().newest());
        self.send_plain(op, key, verdict, is_batch)?;
        if verdict.verdict() != Verdict::Stolen {
            let mut outstanding = binding.outstanding();
            match newest {
                None => outstanding.answer(id, id),
                Some(newest) => outstanding.answer_up_to(id, newest),
            }
        }
        drop(bindings);
        self.note_sent(1)
    }

    /// Sends the message of one plain verdict, and records nothing
    #[inline]
    pub(super) fn send_plain(
        &self,
        op: Operation,
        key: PacketKey,
        verdict: PlainVerdict,
        is_batch: bool,
    ) -> Result<()> {
        let mut out = [0; PlainVerdict::MAX_LEN];
        let encoded = encode_plain(&mut out, verdict, key, is_batch);
        let len = encoded.map_err(|source| Error::Encode { op, source })?;
        self.send(op, out.get(..len).unwrap_or_default())
    }

    /// Sends one verdict of any length
    fn set_long(&self, key: PacketKey, decision: &Decision<'_>) -> Result<()> {
        if self.bindings().current(key.into()).is_none() {
            return Err(self.unbound(key, Operation::Verdict(key)));
        }
        let mut batch = self.take_spare();
        batch.clear(); // drops an unsent verdict, which was reported
        let pushed = batch.push(key, *decision);
        let sent = pushed.and_then(|()| self.send_batch(&mut batch));
        batch.clear();
        self.put_spare(batch);
        sent
    }

    /// Returns the reason for a key without a binding
    fn unbound(&self, key: PacketKey, op: Operation) -> Error {
        match self.state().issued.binary_search(&key.binding()) {
            Ok(_) => Error::Unbound { op },
            Err(_) => Error::WrongSocket { op },
        }
    }

    /// Sends collected verdicts, in their order, and empties the batch
    ///
    /// Verdicts of ended bindings are counted and dropped. Verdicts of another socket stay, and if
    /// a send fails, all unsent verdicts stay.
    pub(crate) fn send_batch(&self, batch: &mut SendBatch) -> Result<()> {
        if let Some((key, verdict)) = batch.single_plain() {
            match self.set_plain(key, verdict, false) {
                Err(Error::Unbound { .. }) => {} // counted below
                Err(error) if error.is_unsent() => return Err(error),
                sent => {
                    batch.clear();
                    return sent;
                }
            }
        }
        let mut foreign: Vec<BindingId> = Vec::new();
        let mut first_error = None;
        let mut done = 0;
        let mut max_entries = usize::MAX;
        while batch.has_more(done) {
            let overruns = self.overruns.load(Relaxed);
            let bindings = self.bindings();
            let part = batch.encode_part(done, &bindings, overruns, self.max_send, max_entries);
            let sent = match part.first {
                Some(first) => self.send(Operation::Verdict(first), batch.encoded()),
                None => Ok(()),
            };
            match sent {
                Ok(()) => batch.record_sent(done, part.entries, &bindings),
                // Send one at a time, to find the verdict that is too long.
                Err(error) if error.is_too_long() && part.sent_entries > 1 => {
                    max_entries = 1;
                    continue;
                }
                Err(error) if error.is_too_long() => {
                    first_error.get_or_insert(error);
                }
                Err(error) => {
                    batch.remove_first(done);
                    return Err(error);
                }
            }
            drop(bindings);
            let mut late = 0;
            for key in part.unbound {
                match self.unbound(key, Operation::Verdict(key)) {
                    Error::Unbound { .. } => late += 1,
                    error => {
                        foreign.push(key.into());
                        first_error.get_or_insert(error);
                    }
                }
            }
            if late > 0 {
                self.count(|stats| stats.late_verdicts += late);
            }
            done += part.entries;
            max_entries = usize::MAX;
            if let Err(error) = self.note_sent(part.messages) {
                first_error.get_or_insert(error);
            }
        }
        batch.keep(&foreign);
        first_error.map_or(Ok(()), Err)
    }

    /// Counts messages that the kernel may have refused; reads once the refusals could fill a
    /// quarter of the receive buffer
    #[inline]
    fn note_sent(&self, messages: u32) -> Result<()> {
        let unread = self
            .unread
            .fetch_add(messages, Relaxed)
            .saturating_add(messages);
        if unread > self.max_unread {
            return self.drain_to_stash();
        }
        Ok(())
    }

    pub(super) fn send(&self, op: Operation, message: &[u8]) -> Result<()> {
        loop {
            match sys::send(self.as_fd(), message) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io(op)(error)),
            }
        }
    }
}
