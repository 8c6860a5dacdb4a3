//! What the kernel counts as lost: it tells a gap in the numbers of packets that were lost from one that somebody else has
//! received, and that numbers are about to wrap

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use super::Shared;
use crate::sys;

/// In fewer seconds than this too few packets come for their numbers to wrap: 16 million a second make 2^29
const IDS_TELL: u32 = 30;

/// And too few are lost, of all queues together, for their count to wrap: 2^31
const COUNT_TELLS: u32 = 120;

/// So many messages were lost and no packet has come since: then the next one has a number that passes for older
const MAX_UNEXPLAINED: u64 = 1 << 29;

/// The count of messages that found no room in the receive buffer, set against gaps in the numbers of packets
///
/// Times are in seconds since the socket was opened.
#[derive(Debug, Default)]
pub(crate) struct Losses {
    count: u32,
    counted_at: u32,
    /// Those that no gap has shown yet; answers are lost too, so not all will
    unexplained: u64,
    /// Whether 2^32 more may be lost
    is_unknown: bool,
}

impl Losses {
    pub(super) fn new(count: u32) -> Self {
        Self {
            count,
            ..Self::default()
        }
    }

    /// Whether `gap` packets were lost
    pub(crate) fn explain(&mut self, gap: u32, count: u32, now: u32) -> bool {
        self.take_in(count, now);
        match self.unexplained.checked_sub(gap.into()) {
            Some(left) if !self.is_unknown => {
                self.unexplained = left;
                true
            }
            _ => false,
        }
    }

    /// Whether packets may wait that pass for older than some that were received before them
    ///
    /// If so, runs end in all bindings there are, and later ones begin with the number 1.
    pub(crate) fn may_wrap(&mut self, count: u32, now: u32) -> bool {
        self.take_in(count, now);
        let may_wrap = self.is_unknown || self.unexplained > MAX_UNEXPLAINED;
        if may_wrap {
            self.unexplained = 0;
            self.is_unknown = false;
        }
        may_wrap
    }

    fn take_in(&mut self, count: u32, now: u32) {
        let is_old = now.saturating_sub(self.counted_at) >= COUNT_TELLS;
        self.is_unknown |= is_old && count != self.count;
        self.unexplained += u64::from(count.wrapping_sub(self.count));
        self.count = count;
        self.counted_at = now;
    }
}

impl Shared {
    /// Ends all runs if packets may wait that pass for older than some that were received before them: after a process was
    /// stopped for an hour, say, amid a flood
    ///
    /// Nobody has received those yet, so no gap shows it.
    pub(super) fn look_at_losses(&self) {
        let now = self.age();
        let looked_at = self.looked_at.load(Ordering::Acquire);
        if now.saturating_sub(looked_at) < IDS_TELL || !self.coalesces() {
            return;
        }
        let mut state = self.state();
        let count = sys::drops(self.as_fd());
        if count.map_or(true, |count| state.losses.may_wrap(count, now)) {
            for binding in state.bindings.iter() {
                binding.waiting().go_blind();
            }
        }
        self.looked_at.store(now, Ordering::Release);
    }

    /// Seconds since the socket was opened
    pub(super) fn age(&self) -> u32 {
        let age = sys::now().saturating_duration_since(self.opened);
        age.as_secs().try_into().unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_set_against_the_count() {
        let mut losses = Losses::new(u32::MAX - 1);
        assert!(losses.explain(3, 1, 0), "across the wrap");
        assert!(!losses.explain(1, 1, 0), "nothing was lost since");
        assert!(
            losses.explain(1, 4, 0),
            "two were not seen to be missing yet"
        );
        assert!(losses.explain(2, 4, 0));
        assert!(!losses.explain(1, 4, 0));
    }

    #[test]
    fn very_many_losses_are_seen_before_any_gap() {
        let mut losses = Losses::default();
        let many = 1 << 29;
        assert!(!losses.may_wrap(many, 30));
        assert!(losses.may_wrap(many + 1, 60));
        assert!(!losses.may_wrap(many + 1, 90), "once");
        assert!(!losses.may_wrap(many + 1, 1000), "none since");
    }

    #[test]
    fn a_count_that_may_have_wrapped_says_nothing() {
        let mut losses = Losses::default();
        assert!(!losses.may_wrap(1, COUNT_TELLS - 1));
        assert!(losses.may_wrap(2, 2 * COUNT_TELLS));
        assert!(!losses.explain(1, 3, 3 * COUNT_TELLS));
        assert!(
            losses.may_wrap(3, 3 * COUNT_TELLS),
            "all bindings hear of it"
        );
        assert!(losses.explain(1, 4, 3 * COUNT_TELLS));
    }
}
