//! Taking over queues that another process has bound with the same socket

use std::sync::Arc;

use nfqnl_proto::{ConfigFlags, ConfigRequest, PacketKey, PlainVerdict, QueueConfig};

use super::bindings::Binding;
use super::{Engine, State};
use crate::error::{Operation, Result};
use crate::verdict::{Outstanding, encode_plain};

impl Engine {
    /// Registers a queue that the socket has bound already
    ///
    /// `newest` is the newest packet of the process before, if known. The caller must register all
    /// queues before the first message is read.
    pub(crate) fn adopt(
        &self,
        queue: u16,
        newest: Option<u32>,
        flags: ConfigFlags,
        orphans: PlainVerdict,
    ) -> Arc<Binding> {
        let mut state = self.state();
        let outstanding = Outstanding::adopted(self.merges(), newest, orphans);
        let binding = Arc::new(Binding::new(queue, outstanding));
        binding.set_flags(ConfigFlags::all(), flags);
        self.register(&mut state, &binding);
        binding
    }

    /// Fails if the socket has not bound this queue; answers the orphans if the newest is known
    pub(crate) fn check_adopted(&self, binding: &Binding) -> Result<()> {
        let request = ConfigRequest::update(binding.id.queue, QueueConfig::new());
        let checked = self.configure(Operation::Adopt(binding.id.queue), &request);
        if checked.is_err() {
            self.end_here(binding.id);
        }
        checked?;
        let mut state = self.state();
        if let Some((newest, orphans)) = binding.outstanding().take_orphans(None) {
            self.answer_orphans(&mut state, binding, newest, orphans);
        }
        Ok(())
    }

    /// Unbinds a queue of the process before
    pub(crate) fn unbind_orphan(&self, queue: u16) -> Result<()> {
        self.configure(Operation::Unbind(queue), &ConfigRequest::unbind(queue))
    }

    /// Answers all packets up to an id, which the process before has received
    pub(super) fn answer_orphans(
        &self,
        state: &mut State,
        binding: &Binding,
        newest: u32,
        orphans: PlainVerdict,
    ) {
        let key = binding.key(newest);
        let mut out = [0; PlainVerdict::MAX_LEN];
        let len = encode_plain(&mut out, orphans, key, true).unwrap_or(0);
        let message = out.get(..len).unwrap_or_default();
        if self.send(Operation::BatchVerdict(key), message).is_ok() {
            // The kernel refuses it if no packet waited; that is no event of the program.
            state.orphans.push(key);
        }
    }

    /// Ends all bindings in this process, and keeps them in the kernel; returns number, newest id
    /// and flags of each
    pub(crate) fn give_away(&self) -> Vec<(u16, Option<u32>, ConfigFlags)> {
        let bindings = self.present_bindings();
        let given = bindings.iter().map(|binding| {
            self.end_here(binding.id);
            let newest = binding.outstanding().newest_if_known();
            (binding.id.queue, newest, binding.flags())
        });
        given.collect()
    }
}

impl State {
    /// Returns true if this was the answer to orphans, and forgets it
    pub(super) fn take_orphans_key(&mut self, key: PacketKey) -> bool {
        let before = self.orphans.len();
        self.orphans.retain(|orphan| *orphan != key);
        self.orphans.len() < before
    }
}
