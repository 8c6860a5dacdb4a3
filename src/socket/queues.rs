//! Binding queues, changing their settings, unbinding them

use std::time::Duration;

use nfqnl_proto::{ConfigFlags, ConfigRequest, CopyMode, QueueConfig};

use super::requests::Pending;
use super::{Shared, State};
use crate::bindings::{Binding, BindingId, Bindings};
use crate::error::{Error, Operation, Refusal, Result, Situation};
use crate::sys;

impl Shared {
    /// Binds a queue with its settings, in one message
    pub(crate) fn bind(
        &self,
        queue: u16,
        config: QueueConfig,
        has_callback: bool,
    ) -> Result<BindingId> {
        check_config(queue, &config)?;
        let op = Operation::Bind(queue);
        let mut state = loop {
            let mut state = self.state();
            if state.ended.iter().any(|&(ended, _)| ended == queue) {
                drop(state);
                self.outwait_endings(op)?;
            } else if let Some(present) = state.bindings.get(queue).map(|binding| binding.id) {
                // Ours already, unless the queue was unbound through another descriptor of this socket: then the present
                // binding is at its end. To bind would tell too, but if the answer is lost, there is a queue in the
                // kernel whose packets would pass for the present binding's. This changes nothing.
                let none = ConfigFlags::empty();
                let question = ConfigRequest::update(queue, QueueConfig::new().flags(none, none));
                let pending = self.begin(&mut state, op, Some(&question))?;
                drop(state);
                match self.finish(pending) {
                    Ok(()) => return Err(Refusal::already_bound(op).into()),
                    Err(Error::Refused(refusal)) if refusal.situation() == Situation::NotBound => {
                        let mut state = self.state();
                        if self.forget(&mut state, present) {
                            state.note_ending(queue);
                        }
                    }
                    Err(error) => return Err(error),
                }
            } else {
                break state;
            }
        };
        // The binding is there before the kernel knows: its first packet may come before the acknowledgement.
        let binding = Binding::new(queue, has_callback);
        let id = binding.id;
        self.change_bindings(&mut state, |bindings| bindings.insert(binding));
        let pending = self.begin(&mut state, op, Some(&ConfigRequest::bind(queue, config)));
        let pending = match pending {
            Ok(pending) => pending,
            Err(error) => {
                self.forget(&mut state, id); // nothing was sent
                return Err(error);
            }
        };
        drop(state);
        let result = self.finish(pending);
        match &result {
            Ok(()) => {}
            Err(Error::Refused(_)) => {
                self.forget(&mut self.state(), id);
            }
            // The kernel may have bound it.
            Err(_) => self.post_unbind(id),
        }
        result.map(|()| id)
    }

    /// Waits until no packet can come any more of any queue that was unbound, so that none is taken for one of a later
    /// binding
    ///
    /// The kernel looks a packet's queue up, and sends the packet some time later, under no lock but an RCU read lock
    /// (`nfqnl_enqueue_packet` in `net/netfilter/nfnetlink_queue.c`). So it may come after the unbinding is
    /// acknowledged, and after the next binding is.
    fn outwait_endings(&self, op: Operation) -> Result<()> {
        /// Much longer than the kernel takes to queue a packet, where there is no better way: with one CPU the kernel
        /// answers the membarrier at once, though a sender may have been preempted amid that
        const LONG: Duration = Duration::from_millis(100);
        let endings = self.state().endings;
        if sys::wait_for_rcu().is_err() || sys::is_single_cpu() {
            std::thread::sleep(LONG);
        }
        self.sync(op)?; // reads them all, and sees that they belong to no queue
        self.state().ended.retain(|&(_, place)| place > endings);
        Ok(())
    }

    /// Changes a queue's settings
    pub(crate) fn update(&self, op: Operation, id: BindingId, config: QueueConfig) -> Result<()> {
        check_config(id.queue, &config)?;
        let mut state = self.state();
        if !state.bindings.is_current(id) {
            return Err(Error::Ended { op });
        }
        let request = ConfigRequest::update(id.queue, config);
        let pending = self.begin(&mut state, op, Some(&request))?;
        drop(state);
        self.finish(pending)
    }

    /// Unbinds a queue and waits for the acknowledgement; does nothing if this binding has ended
    pub(crate) fn unbind(&self, id: BindingId) -> Result<()> {
        self.end(id).map_or(Ok(()), |pending| self.finish(pending?))
    }

    /// Unbinds a queue without waiting; does nothing if this binding has ended
    pub(crate) fn post_unbind(&self, id: BindingId) {
        if let Some(Ok(pending)) = self.end(id) {
            // Nobody waits, so the answer is nobody's.
            let mut state = self.state();
            state.requests.retain(|request| request.seq != pending.seq);
        }
    }

    /// Ends a binding, if it has not ended: for this handle and for the kernel in one step, so that nothing comes between
    fn end(&self, id: BindingId) -> Option<Result<Pending>> {
        let mut state = self.state();
        self.forget(&mut state, id)
            .then(|| self.begin_unbind(&mut state, id.queue))
    }

    fn begin_unbind(&self, state: &mut State, queue: u16) -> Result<Pending> {
        state.note_ending(queue);
        let request = ConfigRequest::unbind(queue);
        self.begin(state, Operation::Unbind(queue), Some(&request))
    }

    /// Ends a binding for this handle: its keys are stale from here on, and what waits of it in the stash is gone in the
    /// kernel too, or will be
    ///
    /// Says whether it had not ended before.
    fn forget(&self, state: &mut State, id: BindingId) -> bool {
        let Some(binding) = state.bindings.current(id) else {
            return false;
        };
        binding.end();
        self.change_bindings(state, |bindings| bindings.remove(id));
        let before = state.stash.len();
        state
            .stash
            .retain(|stashed| stashed.key().is_none_or(|key| key.queue != id.queue));
        state.stats.discard(before - state.stash.len());
        true
    }

    /// The bindings that stand now
    pub(crate) fn present_bindings(&self) -> Bindings {
        self.state().bindings.clone()
    }
}

impl State {
    /// Notes that a queue was unbound: one entry for each number at most, since binding that again outwaits it first
    fn note_ending(&mut self, queue: u16) {
        debug_assert!(self.ended.iter().all(|&(ended, _)| ended != queue));
        self.endings += 1;
        self.ended.push((queue, self.endings));
    }
}

/// Refuses settings that the kernel would take in a way that nobody wants
fn check_config(queue: u16, config: &QueueConfig) -> Result<()> {
    if config.get_maxlen() == Some(0) {
        return Err(Error::ZeroMaxlen { queue });
    }
    match config.get_copy_mode() {
        Some((mode, _)) if mode.0 > CopyMode::PACKET.0 => {
            Err(Error::UnknownCopyMode { queue, mode })
        }
        _ => Ok(()),
    }
}
