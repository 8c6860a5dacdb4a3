//! What the receive buffer had no room for: the kernel's count of that
//!
//! It is looked at for two things. A gap in the numbers of packets was lost, or somebody else has received what is missing.
//! And a batch verdict must not find a packet that was numbered so long after those it is for that it passes for older:
//! numbers have 32 bits, and the kernel takes the nearer way around. Such a packet comes behind lost ones, and before it is
//! received no gap shows it: after a process was stopped for an hour amid a flood, say. So runs end when the count says that
//! there may be one.
//!
//! When an overrun ends is soon enough to ask: from the first loss until all that is in the buffer has been received the
//! kernel drops everything (`netlink_overrun` in `net/netlink/af_netlink.c`), and the first receive call after that loss
//! tells of it. So the count is looked at then, before and after each call that may end the overrun. Where the program wants no
//! such reports, the buffer takes packets again as soon as there is room, and the count is looked at before each send.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use super::{Shared, State};
use crate::sys;
use crate::waiting::MAX_SPAN;

/// More lost messages than this behind the last packet of a queue that was received may be too many
const MAX_UNEXPLAINED: u32 = 1 << 30;

// A batch verdict is for packets no further than `MAX_SPAN` behind the last one that was received. What no gap has shown
// yet may have come behind that one, and as many packets again as any receive buffer holds.
const _: () = assert!(MAX_SPAN as u64 + MAX_UNEXPLAINED as u64 + (1 << 28) < 1 << 31);

/// The count of messages that found no room, set against gaps in the numbers of packets
///
/// It has 32 bits too. Were it to go all the way around in one overrun, by losses of several queues together, nothing would
/// tell.
#[derive(Debug, Default)]
pub(crate) struct Losses {
    count: u32,
    /// Those that no gap has shown yet; answers are lost too, so not all will
    unexplained: u64,
    /// Those for which runs have ended in all bindings that there were, whose gaps may still show them
    given_up: u64,
    /// Whether there was an overrun, and the buffer was not seen empty since
    in_overrun: bool,
}

impl Losses {
    pub(super) fn new(count: u32) -> Self {
        Self {
            count,
            ..Self::default()
        }
    }

    /// Takes in the count, and says whether `gap` packets were lost, of a binding whose list is blind or not
    pub(crate) fn explain(&mut self, gap: u32, is_blind: bool, count: u32) -> bool {
        self.take_in(count);
        let gap = u64::from(gap);
        let from_given_up = if is_blind { self.given_up.min(gap) } else { 0 };
        match self.unexplained.checked_sub(gap - from_given_up) {
            Some(left) => {
                self.unexplained = left;
                self.given_up -= from_given_up;
                true
            }
            None => false,
        }
    }

    /// Takes in the count, and says whether runs must end, in all bindings that there are
    ///
    /// That is said once: the first packet of a later binding has the number 1.
    pub(crate) fn must_end_runs(&mut self, count: u32) -> bool {
        self.take_in(count);
        let are_many = self.unexplained > MAX_UNEXPLAINED.into();
        if are_many {
            self.given_up += std::mem::take(&mut self.unexplained);
        }
        are_many
    }

    fn take_in(&mut self, count: u32) {
        self.unexplained += u64::from(count.wrapping_sub(self.count));
        self.count = count;
    }
}

impl State {
    /// Whether there was an overrun, and more may have been lost since
    pub(super) fn is_in_overrun(&self) -> bool {
        self.losses.in_overrun
    }

    pub(super) fn note_overrun(&mut self) {
        self.stats.overruns += 1;
        self.losses.in_overrun = true;
    }
}

impl Shared {
    /// Looks at the count if the next receive call may end an overrun, so that no other thread's send comes between
    pub(super) fn look_before_receiving(&self, state: &mut State) {
        if state.losses.in_overrun {
            self.look_at_losses(state);
        }
    }

    /// The same after a receive call, which has left the buffer empty or not
    pub(super) fn look_after_receiving(&self, state: &mut State, is_empty: bool) {
        if state.losses.in_overrun {
            state.losses.in_overrun = !is_empty;
            self.look_at_losses(state);
        }
    }

    /// Looks at the count if no receive call tells of overruns; without a lock unless there are new ones
    pub(super) fn look_before_sending(&self) {
        if self.reports_overruns || !self.coalesces() {
            return;
        }
        let seen = self.losses_seen.load(Ordering::Acquire);
        if !sys::drops(self.as_fd()).is_ok_and(|count| count == seen) {
            self.look_at_losses(&mut self.state());
        }
    }

    /// Ends all runs if a packet may wait that passes for older than some that were received before it
    fn look_at_losses(&self, state: &mut State) {
        if !self.coalesces() {
            return;
        }
        let count = sys::drops(self.as_fd()).ok();
        if count.is_none_or(|count| state.losses.must_end_runs(count)) {
            self.end_runs(&state.bindings);
        }
        self.losses_seen
            .store(count.unwrap_or(0), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_set_against_the_count() {
        let mut losses = Losses::new(u32::MAX - 1);
        let mut explain = |gap, count| losses.explain(gap, false, count);
        assert!(explain(3, 1), "across the wrap");
        assert!(!explain(1, 1), "nothing was lost since");
        assert!(explain(1, 4), "two were not seen to be missing yet");
        assert!(explain(2, 4));
        assert!(!explain(1, 4));
    }

    #[test]
    fn very_many_losses_end_runs_before_a_gap_shows_them() {
        let mut losses = Losses::default();
        assert!(!losses.must_end_runs(MAX_UNEXPLAINED));
        assert!(losses.explain(1, false, MAX_UNEXPLAINED));
        assert!(!losses.must_end_runs(MAX_UNEXPLAINED + 1));
        assert!(losses.must_end_runs(MAX_UNEXPLAINED + 2));
        assert!(!losses.must_end_runs(MAX_UNEXPLAINED + 2), "that was said");
    }

    /// Or as many more could be lost since
    #[test]
    fn what_runs_have_ended_for_explains_no_later_gap_and_no_later_losses() {
        let mut losses = Losses::default();
        let before = MAX_UNEXPLAINED + 1;
        assert!(losses.must_end_runs(before));
        assert!(!losses.explain(1, false, before), "of a later binding");
        assert!(!losses.must_end_runs(before + MAX_UNEXPLAINED));
        assert!(losses.explain(before, true, before + MAX_UNEXPLAINED));
        assert!(losses.must_end_runs(before + MAX_UNEXPLAINED + 1));
    }
}
