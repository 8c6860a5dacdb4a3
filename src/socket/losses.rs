//! What the receive buffer had no room for: the kernel's count of that
//!
//! It is looked at for two things. A gap in the numbers of packets was lost, or somebody else has received what is missing.
//! And a batch verdict must not find a packet that was numbered so long after those it is for that it passes for older:
//! numbers have 32 bits, and the kernel takes the nearer way around. Such a packet comes behind lost ones, and before it is
//! received no gap shows it: after a process was stopped for an hour amid a flood, say. So runs end when the count says that
//! there may be one.
//!
//! The kernel has the count when an overrun is over, and that is soon enough: from the first loss until all that is in the
//! buffer has been received it drops everything (`netlink_overrun` in `net/netlink/af_netlink.c`), and the first receive
//! call after that loss tells of it. Where the program wants no such reports, the buffer takes packets again as soon as there
//! is room, and the count is looked at before each send.

use std::os::fd::AsFd;

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
    /// The same from before all runs ended for them
    settled: u64,
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

    /// Takes in the count, and says whether `gap` packets were lost
    pub(crate) fn explain(&mut self, gap: u32, count: u32) -> bool {
        self.take_in(count);
        let settled = self.settled.min(gap.into());
        match self.unexplained.checked_sub(u64::from(gap) - settled) {
            Some(left) => {
                self.unexplained = left;
                self.settled -= settled;
                true
            }
            None => false,
        }
    }

    /// Takes in the count, and says whether runs must end, in all bindings that there are
    ///
    /// That is said once: the first packet of a later binding has the number 1.
    pub(crate) fn end_runs(&mut self, count: u32) -> bool {
        self.take_in(count);
        let are_many = self.unexplained > MAX_UNEXPLAINED.into();
        if are_many {
            self.settled += std::mem::take(&mut self.unexplained);
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
}

impl Shared {
    pub(super) fn note_overrun(&self, state: &mut State) {
        state.stats.overruns += 1;
        state.losses.in_overrun = true;
        self.look_at_losses(state);
    }

    /// Notes that something was received, and whether the buffer is empty now
    pub(super) fn note_received(&self, state: &mut State, is_empty: bool) {
        if state.losses.in_overrun {
            state.losses.in_overrun = !is_empty;
            self.look_at_losses(state);
        }
    }

    /// Ends all runs if a packet may wait that passes for older than some that were received before it
    pub(super) fn look_at_losses(&self, state: &mut State) {
        let count = sys::drops(self.as_fd());
        if count.map_or(true, |count| state.losses.end_runs(count)) {
            for binding in state.bindings.iter() {
                binding.waiting().go_blind();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_set_against_the_count() {
        let mut losses = Losses::new(u32::MAX - 1);
        assert!(losses.explain(3, 1), "across the wrap");
        assert!(!losses.explain(1, 1), "nothing was lost since");
        assert!(losses.explain(1, 4), "two were not seen to be missing yet");
        assert!(losses.explain(2, 4));
        assert!(!losses.explain(1, 4));
    }

    #[test]
    fn very_many_losses_end_runs_before_a_gap_shows_them() {
        let mut losses = Losses::default();
        assert!(!losses.end_runs(MAX_UNEXPLAINED));
        assert!(losses.explain(1, MAX_UNEXPLAINED));
        assert!(!losses.end_runs(MAX_UNEXPLAINED + 1));
        assert!(losses.end_runs(MAX_UNEXPLAINED + 2));
        assert!(!losses.end_runs(MAX_UNEXPLAINED + 2), "that was said");
    }

    /// Or as many more could be lost since
    #[test]
    fn a_gap_that_ended_all_runs_explains_no_later_losses() {
        let mut losses = Losses::default();
        let before = MAX_UNEXPLAINED + 1;
        assert!(losses.end_runs(before));
        assert!(!losses.end_runs(before + MAX_UNEXPLAINED));
        assert!(losses.explain(before, before + MAX_UNEXPLAINED));
        assert!(losses.end_runs(before + MAX_UNEXPLAINED + 1));
    }
}
