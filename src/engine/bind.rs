//! Binding queues, changing their settings, unbinding them

use std::sync::atomic::Ordering::{Relaxed, Release};
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use nfqnl_proto::{ConfigFlags, ConfigRequest, QueueConfig};

use super::bindings::{Binding, BindingId};
use super::requests::retry_lost_ack;
use super::{Engine, State};
use crate::error::{Error, ErrorKind, Operation, Refusal, Result};
use crate::stats::QueueStats;
use crate::sys;
use crate::verdict::Outstanding;

impl Engine {
    /// Binds a queue with its settings, in one message; optional flags follow
    ///
    /// `register` gets the binding before the kernel has it. It must take no lock of the engine.
    pub(crate) fn bind(
        &self,
        queue: u16,
        config: QueueConfig,
        register: impl FnOnce(&Arc<Binding>),
    ) -> Result<Arc<Binding>> {
        let op = Operation::Bind(queue);
        let mut state = self.state();
        while state.has_ended(queue) {
            // Read under the lock: the kernel has executed every unbinding counted here.
            let endings = self.endings.load(Relaxed);
            drop(state);
            self.wait_for_last_packets(op, endings)?;
            state = self.state();
        }
        if state.bindings.get(queue).is_some() {
            return Err(Refusal::already_bound(op).into());
        }
        // The table has the binding before the kernel does: the first packet may come before the
        // acknowledgement.
        let overruns = self.overruns.load(Relaxed);
        let before = overruns.wrapping_sub(u32::from(state.is_in_overrun));
        let binding = Arc::new(Binding::new(queue, Outstanding::new(before, self.merges())));
        let (mask, flags) = config.get_flags().unwrap_or_default();
        binding.set_flags(mask, flags);
        register(&binding);
        self.register(&mut state, &binding);
        let request = ConfigRequest::bind(queue, config);
        let sent = self.begin(&mut state, op, Some(&request));
        let bound = sent.and_then(|seq| self.finish(state, op, seq));
        let bound = bound.map_err(|error| self.undo_bind(error, &binding, flags));
        bound.and_then(|()| self.set_optional_flags(op, &binding, config))?;
        Ok(binding)
    }

    /// Adds a binding to the table
    pub(super) fn register(&self, state: &mut State, binding: &Arc<Binding>) {
        if let Err(place) = state.issued.binary_search(&binding.id.number) {
            state.issued.insert(place, binding.id.number);
        }
        self.change_bindings(state, |bindings| bindings.insert(Arc::clone(binding)));
    }

    /// Ends a binding whose bind has failed, and returns the error with its cause
    fn undo_bind(&self, error: Error, binding: &Binding, flags: ConfigFlags) -> Error {
        let id = binding.id;
        match error {
            Error::Refused(refusal) => {
                match refusal.errno() {
                    // The queue may be bound by a copy of the socket: it stays.
                    libc::EBUSY => self.end_here(id),
                    _ => {
                        let mut state = self.state();
                        if self.end(&mut state, id) {
                            state.ended.pop(); // the kernel has sent no packets of this binding
                        }
                    }
                }
                self.explain(refusal, id.queue, flags)
            }
            // The kernel may have bound the queue.
            error => {
                self.post_unbind(id);
                error
            }
        }
    }

    /// Switches on the optional flags that the kernel supports
    fn set_optional_flags(
        &self,
        op: Operation,
        binding: &Binding,
        config: QueueConfig,
    ) -> Result<()> {
        let missing = config.get_optional_flags() & !binding.flags();
        for flag in missing.iter() {
            let config = QueueConfig::new().enable(flag);
            let request = ConfigRequest::update(binding.id.queue, config);
            match self.configure(op, &request) {
                Ok(()) => binding.set_flags(flag, flag),
                Err(Error::Refused(refusal)) if may_be_flags(refusal.errno()) => {}
                Err(error) => {
                    self.post_unbind(binding.id);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Finds the flags or the owner behind a refusal
    fn explain(&self, refusal: Refusal, queue: u16, flags: ConfigFlags) -> Error {
        let kind = match refusal.errno() {
            // If another request succeeds, the socket does not lack the privilege.
            libc::EPERM if self.sync(Operation::Sync).is_ok() => {
                let stats = QueueStats::read(queue).ok().flatten();
                let owner = stats.map(|stats| stats.port_id);
                ErrorKind::QueueInUse { owner }
            }
            errno if may_be_flags(errno) => match self.unsupported(refusal.operation(), flags) {
                Ok(missing) if missing.is_empty() => refusal.kind(),
                Ok(missing) => ErrorKind::UnsupportedFlags(missing),
                Err(error) => return error,
            },
            _ => refusal.kind(),
        };
        refusal.with_kind(kind).into()
    }

    /// Returns the flags not supported by the kernel
    ///
    /// Since Linux 4.5 the kernel checks flags before it looks for the queue, so each flag is tried
    /// on an unbound queue.
    pub(crate) fn unsupported(&self, op: Operation, flags: ConfigFlags) -> Result<ConfigFlags> {
        let mut missing = ConfigFlags::empty();
        for bit in flags.iter() {
            let mut state = self.state();
            let unbound = (0..=u16::MAX)
                .rev()
                .find(|&num| state.bindings.get(num).is_none());
            let config = QueueConfig::new().enable(bit);
            let request = ConfigRequest::update(unbound.unwrap_or(u16::MAX), config);
            let seq = self.begin(&mut state, op, Some(&request))?;
            match self.finish(state, op, seq) {
                Ok(()) => {}
                Err(Error::Refused(refusal)) if may_be_flags(refusal.errno()) => missing |= bit,
                // The kernel has checked the flag before it looked for the queue.
                Err(Error::Refused(refusal))
                    if matches!(refusal.errno(), libc::ENODEV | libc::EPERM) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(missing)
    }

    /// Waits until no more packets can come from any queue unbound so far
    ///
    /// The kernel looks up the queue of a packet, and later sends the packet, only under an RCU
    /// read lock (`nfqnl_enqueue_packet` in `net/netfilter/nfnetlink_queue.c`). So a packet may
    /// come after its queue was unbound, and even after the queue was bound again.
    fn wait_for_last_packets(&self, op: Operation, endings: usize) -> Result<()> {
        /// Much longer than the kernel takes to queue a packet; used if `membarrier` does not
        /// help. With one CPU the kernel answers it at once, although a sender may have been
        /// preempted.
        const LONG: Duration = Duration::from_millis(100);
        if sys::wait_for_rcu().is_err() || sys::is_single_cpu() {
            std::thread::sleep(LONG);
        }
        self.sync(op)?; // reads the last packets, which belong to no binding
        self.wait_for_reader(); // may have some of them
        self.state().ended.retain(|&(_, place)| place > endings);
        Ok(())
    }

    /// Changes a queue's settings
    pub(crate) fn update(
        &self,
        op: Operation,
        binding: &Binding,
        config: QueueConfig,
    ) -> Result<()> {
        let id = binding.id;
        let mut state = self.state();
        if state.bindings.current(id).is_none() {
            return Err(Error::Unbound { op });
        }
        let request = ConfigRequest::update(id.queue, config);
        let seq = self.begin(&mut state, op, Some(&request))?;
        let (mask, flags) = config.get_flags().unwrap_or_default();
        match self.finish(state, op, seq) {
            Ok(()) => {
                binding.set_flags(mask, flags);
                Ok(())
            }
            Err(Error::Refused(refusal)) => {
                if refusal.errno() == libc::ENODEV {
                    self.end_here(id); // unbound by a copy of the socket
                }
                Err(self.explain(refusal, id.queue, flags))
            }
            Err(error) => Err(error),
        }
    }

    /// Unbinds a queue and waits for the acknowledgement; does nothing if this binding has ended
    pub(crate) fn unbind(&self, id: BindingId) -> Result<()> {
        let mut state = self.state();
        match self.end(&mut state, id) {
            true => self.unbind_number(state, id.queue),
            false => Ok(()),
        }
    }

    /// Unbinds a queue that an earlier process has bound
    pub(crate) fn unbind_unadopted(&self, num: u16) -> Result<()> {
        let mut state = self.state();
        self.note_end(&mut state, num);
        self.unbind_number(state, num)
    }

    fn unbind_number<'s>(&'s self, state: MutexGuard<'s, State>, num: u16) -> Result<()> {
        let op = Operation::Unbind(num);
        let mut held = Some(state);
        retry_lost_ack(|| {
            let mut state = held.take().unwrap_or_else(|| self.state());
            if state.bindings.get(num).is_some() {
                return Ok(()); // another thread has bound it again
            }
            let seq = self.begin(&mut state, op, Some(&ConfigRequest::unbind(num)))?;
            match self.finish(state, op, seq) {
                Err(Error::Refused(refusal)) if refusal.errno() == libc::ENODEV => Ok(()),
                unbound => unbound,
            }
        })
    }

    /// Unbinds a queue without asking for an acknowledgement; does nothing if this binding has
    /// ended
    pub(crate) fn post_unbind(&self, id: BindingId) {
        let mut state = self.state();
        if self.end(&mut state, id) {
            let op = Operation::Unbind(id.queue);
            let request = ConfigRequest::unbind(id.queue);
            let _ = self.send_request(&mut state, op, Some(&request), false);
        }
    }

    /// Ends a binding in this process only
    pub(crate) fn end_here(&self, id: BindingId) {
        self.end(&mut self.state(), id);
    }

    /// Ends a binding for this socket: its keys are stale from here on, and its last packets may
    /// still come; returns true if it had not ended before
    fn end(&self, state: &mut State, id: BindingId) -> bool {
        let Some(binding) = state.bindings.current(id) else {
            return false;
        };
        binding.end();
        self.change_bindings(state, |bindings| bindings.remove(id));
        self.note_end(state, id.queue);
        true
    }

    /// Records that last packets of this number may come
    fn note_end(&self, state: &mut State, num: u16) {
        let place = self.endings.fetch_add(1, Release) + 1;
        state.ended.push((num, place));
    }
}

/// Returns true if the kernel may have refused a flag
const fn may_be_flags(errno: i32) -> bool {
    matches!(errno, libc::EINVAL | libc::EOPNOTSUPP | ErrorKind::ENOTSUPP)
}

impl State {
    /// Returns true if packets of an earlier binding of the queue may still come
    fn has_ended(&self, queue: u16) -> bool {
        self.ended.iter().any(|&(ended, _)| ended == queue)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;
    use crate::engine::Bindings;

    impl Bindings {
        /// Changes the table for the model of the verdicts
        pub(crate) fn replace(&mut self, binding: Arc<Binding>) {
            if let Some(old) = self.get(binding.id.queue) {
                self.remove(old.id);
            }
            self.insert(binding);
        }
    }

    #[test]
    fn a_queue_that_ends_during_a_wait_stays_listed() {
        let (here, kernel) = UnixDatagram::pair().unwrap();
        let engine = Engine::new(sys::netlink_from(here.into()), true, true).unwrap();
        let end = |queue| {
            let binding = Arc::new(Binding::new(queue, Outstanding::new(0, true)));
            let id = binding.id;
            engine.change_bindings(&mut engine.state(), |bindings| bindings.insert(binding));
            engine.end_here(id);
            engine.end_here(id);
        };
        end(1);
        end(2);
        let endings = engine.endings();
        assert_eq!(engine.state().ended, [(1, 1), (2, 2)]);
        end(1);

        // The kernel's answer to the request that the wait ends with
        let header = [&36_u32.to_ne_bytes()[..], &2_u16.to_ne_bytes(), &[0; 14]].concat();
        let request = [&16_u32.to_ne_bytes()[..], &1_u16.to_ne_bytes(), &[0; 2]].concat();
        let answer = [
            &header[..],
            &request,
            &1_u32.to_ne_bytes(),
            &engine.wake.mark().to_ne_bytes(),
        ]
        .concat();
        kernel.send(&answer).unwrap();
        engine
            .wait_for_last_packets(Operation::Bind(2), endings)
            .unwrap();
        assert_eq!(engine.state().ended, [(1, 3)]);
        assert!(engine.state().has_ended(1) && !engine.state().has_ended(2));
    }
}
