//! Which packets of a binding may wait in the kernel: what makes it safe to answer many of them by one message
//!
//! A batch verdict (`NFQNL_MSG_VERDICT_BATCH`) falls on every waiting packet of its queue up to an id, whoever holds it.
//! So it may only be sent when each of these packets has that verdict. The kernel numbers packets and sends them in one
//! order, so whoever has received an id knows of every earlier one: it was received too, or it was lost and does not wait.
//! An id stays in this list until the verdict on it has been *sent*, not just decided: a verdict that another thread is
//! about to send must not find its packet taken.

use std::collections::VecDeque;

/// More packets than any sensible queue holds; beyond, somebody else must be answering them
const MAX_WAITING: usize = 1 << 20;

#[derive(Debug, Default)]
pub(crate) struct Waiting {
    /// The packets that were received and not answered, oldest first
    ids: VecDeque<u32>,
    /// Packets may wait that are not in the list, so nothing can be said about any
    is_blind: bool,
}

impl Waiting {
    /// Notes a packet, which is later than all before
    #[inline]
    pub(crate) fn receive(&mut self, id: u32) {
        let in_order = self.ids.back().is_none_or(|&last| is_before(last, id));
        if self.is_blind {
        } else if in_order && self.ids.len() < MAX_WAITING {
            self.ids.push_back(id);
        } else {
            self.go_blind();
        }
    }

    /// Notes that packets may wait which are not in the list
    pub(crate) fn go_blind(&mut self) {
        *self = Self {
            ids: VecDeque::new(),
            is_blind: true,
        };
    }

    /// Notes that the kernel has had the verdict on a packet
    #[inline]
    pub(crate) fn answer(&mut self, id: u32) {
        if self.ids.front() == Some(&id) {
            self.ids.pop_front();
        } else {
            let place = self.ids.partition_point(|&other| is_before(other, id));
            if self.ids.get(place) == Some(&id) {
                self.ids.remove(place);
            }
        }
    }

    /// The packet before which exactly `n` others wait
    #[inline]
    pub(crate) fn nth(&self, n: usize) -> Option<u32> {
        self.ids.get(n).copied()
    }
}

/// Whether the kernel has numbered `a` before `b`; numbers wrap
const fn is_before(a: u32, b: u32) -> bool {
    let step = b.wrapping_sub(a);
    step != 0 && step <= u32::MAX / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(ids: &[u32]) -> Waiting {
        let mut waiting = Waiting::default();
        for &id in ids {
            waiting.receive(id);
        }
        waiting
    }

    fn ids(waiting: &Waiting) -> Vec<u32> {
        (0..).map_while(|n| waiting.nth(n)).collect()
    }

    #[test]
    fn answers_in_any_order_across_the_wrap() {
        let all = [u32::MAX - 1, u32::MAX, 0, 1, 7];
        for first in all {
            for second in all {
                let mut waiting = waiting(&all);
                waiting.answer(first);
                waiting.answer(second);
                waiting.answer(3); // never received
                let left = all.into_iter().filter(|&id| id != first && id != second);
                assert_eq!(ids(&waiting), Vec::from_iter(left));
            }
        }
    }

    #[test]
    fn what_comes_out_of_order_blinds() {
        for order in [[1, 3, 2], [1, 2, 2]] {
            let mut waiting = waiting(&order);
            assert_eq!(ids(&waiting), []);
            waiting.receive(9);
            assert_eq!(ids(&waiting), [], "for good");
        }
    }
}
