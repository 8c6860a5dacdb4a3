//! Binding queues, changing their settings, unbinding them

use std::time::Duration;

use nfqnl_proto::{ConfigFlags, ConfigRequest, CopyMode, QueueConfig};

use super::requests::Pending;
use super::{Origin, Shared, State};
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
        let mut had_ended = false;
        let mut state = loop {
            let mut state = self.state();
            // The first time only: meanwhile it may be unbound and bound once more by who had the socket, without end.
            let was_anothers = state.origin == Origin::TakenOver && !had_ended;
            if was_anothers || state.has_ended(queue) {
                drop(state);
                self.outwait_endings(op, queue)?;
                had_ended = true;
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
                self.refuse(&mut state, id, had_ended); // nothing was sent
                return Err(error);
            }
        };
        drop(state);
        let result = self.finish(pending);
        match &result {
            Ok(()) => {}
            Err(Error::Refused(refusal)) => {
                let is_there = refusal.situation() == Situation::AlreadyBound;
                self.refuse(&mut self.state(), id, had_ended || is_there);
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
    fn outwait_endings(&self, op: Operation, queue: u16) -> Result<()> {
        /// Much longer than the kernel takes to queue a packet, where there is no better way: with one CPU the kernel
        /// answers the membarrier at once, though a sender may have been preempted amid that
        const LONG: Duration = Duration::from_millis(100);
        let endings = self.state().endings;
        if sys::wait_for_rcu().is_err() || sys::is_single_cpu() {
            std::thread::sleep(LONG);
        }
        self.sync(op)?; // reads them all, and sees that they belong to no queue
        self.state().note_outwaited(queue, endings);
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

    /// Takes a binding back that the kernel has not made
    ///
    /// If the socket may have the queue all the same, that may end at any time, and nothing will tell: it was said to be so,
    /// or had ended before, but an unbinding can be refused too. Another thread that has ended this binding has noted that.
    fn refuse(&self, state: &mut State, id: BindingId, may_end: bool) {
        if self.forget(state, id) && may_end {
            state.note_ending(id.queue);
        }
    }

    /// The bindings that stand now
    pub(crate) fn present_bindings(&self) -> Bindings {
        self.state().bindings.clone()
    }
}

impl State {
    /// Whether a queue was unbound of which packets may still come
    fn has_ended(&self, queue: u16) -> bool {
        self.ended.iter().any(|&(ended, _)| ended == queue)
    }

    /// Notes that a queue was unbound: one entry for each number at most, since binding that again outwaits it first
    fn note_ending(&mut self, queue: u16) {
        debug_assert!(!self.has_ended(queue));
        self.endings += 1;
        self.ended.push((queue, self.endings));
    }

    /// Notes that no packet can come any more of a queue that was unbound when the count of endings stood so, or before
    ///
    /// Of this one, which is about to be bound: others may still be in the kernel, since an unbinding can be refused.
    fn note_outwaited(&mut self, queue: u16, endings: u64) {
        self.ended
            .retain(|&(ended, place)| ended != queue || place > endings);
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

#[cfg(test)]
mod tests {
    use netlink_sys::{Socket, protocols::NETLINK_ROUTE};
    use nfqnl_proto::consts::{NFQNL_MSG_PACKET, NLMSG_NOOP, message_type};

    use super::*;

    /// Over a socket by which nothing is sent: one that emulators have too
    fn shared() -> Shared {
        let socket = Socket::new(NETLINK_ROUTE).unwrap();
        Shared::new(socket, Origin::New, Duration::ZERO, true, true).unwrap()
    }

    fn insert(shared: &Shared, state: &mut State, queue: u16) -> BindingId {
        let binding = Binding::new(queue, false);
        let id = binding.id;
        shared.change_bindings(state, |bindings| bindings.insert(binding));
        id
    }

    /// Or a later binding of the queue would have it for one of its own
    #[test]
    fn a_stashed_packet_goes_with_its_queue_wherever_in_a_datagram_it_was() {
        let shared = shared();
        let message = |kind: u16, body: &[u8]| {
            let len = u32::try_from(16 + body.len()).unwrap().to_ne_bytes();
            [&len[..], &kind.to_ne_bytes(), &[0; 10], body].concat()
        };
        let packet_of = |queue: u8| {
            let header = [11_u16.to_ne_bytes(), 1_u16.to_ne_bytes()].concat();
            let body = [&[2, 0, 0, queue][..], &header, &[0, 0, 0, 1, 8, 0, 1, 0]].concat();
            message(message_type(NFQNL_MSG_PACKET), &body)
        };
        let noop = message(NLMSG_NOOP, &[]);
        let datagram = [noop, packet_of(7), packet_of(8), packet_of(7)].concat();

        let mut state = shared.state();
        let [seventh, eighth] = [7, 8].map(|queue| insert(&shared, &mut state, queue));
        assert!(!shared.stash(&mut state, Ok(&datagram)).unwrap());
        assert!(shared.forget(&mut state, seventh));
        assert_eq!((state.stats.packets, state.stats.discarded), (3, 2));
        assert!(shared.forget(&mut state, eighth));
        assert_eq!((state.stats.packets, state.stats.discarded), (3, 3));
    }

    /// Its last packets could come under a later binding
    #[test]
    fn a_queue_that_the_socket_has_and_the_handle_has_not_may_end_before_it_is_bound() {
        let shared = shared();
        let mut state = shared.state();
        for (queue, may_end) in [(7, false), (8, true)] {
            let id = insert(&shared, &mut state, queue);
            shared.refuse(&mut state, id, may_end);
        }
        assert_eq!(state.ended, [(8, 1)]);
    }

    /// Who was refused comes late
    #[test]
    fn a_refused_binding_that_another_thread_has_ended_says_nothing_of_the_next() {
        let shared = shared();
        let mut state = shared.state();
        let refused = insert(&shared, &mut state, 7);
        assert!(shared.forget(&mut state, refused));
        state.note_ending(7);
        let endings = state.endings;
        state.note_outwaited(7, endings);
        insert(&shared, &mut state, 7);
        shared.refuse(&mut state, refused, true);
        assert_eq!(state.ended, []);
    }

    /// Its unbinding may have been refused, so that it ends later
    #[test]
    fn a_queue_is_outwaited_for_itself_alone() {
        let mut state = State::default();
        state.note_ending(7);
        state.note_ending(8);
        state.note_outwaited(8, state.endings);
        assert_eq!(state.ended, [(7, 1)]);
        state.note_outwaited(7, 0);
        assert_eq!(state.ended, [(7, 1)], "it was unbound after that");
    }
}
