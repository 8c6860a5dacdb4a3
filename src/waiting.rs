//! Which packets of a binding may wait in the kernel: what makes it safe to answer many of them by one message
//!
//! A batch verdict (`NFQNL_MSG_VERDICT_BATCH`) falls on every waiting packet of its queue up to an id, whoever holds it.
//! So it may only be sent when each of these packets has that verdict. The kernel numbers packets and sends them in one
//! order, so whoever has received an id knows of every earlier one: it was received too, or it was lost and does not wait.
//! An id stays in this list until the verdict on it has been *sent*, not just decided: a verdict that another thread is
//! about to send must not find its packet taken.

use std::collections::VecDeque;

/// More packets than any sensible queue holds apart; beyond, somebody else must be answering them
const MAX_RUNS: usize = 1 << 18;

#[derive(Debug, Default)]
pub(crate) struct Waiting {
    /// The packets that were received and not answered, oldest first; no run is empty
    runs: VecDeque<Run>,
    /// Packets may wait that are not in the list, so nothing can be said about any
    is_blind: bool,
}

/// Packets that the kernel has numbered one after the other
#[derive(Clone, Copy, Debug)]
struct Run {
    first: u32,
    last: u32,
}

impl Waiting {
    /// Notes packets that were numbered one after the other, and later than all before
    pub(crate) fn receive(&mut self, first: u32, last: u32) {
        let has_room = self.runs.len() < MAX_RUNS;
        match self.runs.back_mut() {
            _ if self.is_blind => {}
            Some(newest) if newest.last.wrapping_add(1) == first => newest.last = last,
            Some(newest) if !has_room || !is_before(newest.last, first) => self.go_blind(),
            _ => self.runs.push_back(Run { first, last }),
        }
    }

    /// Notes that packets may wait which are not in the list
    pub(crate) fn go_blind(&mut self) {
        *self = Self {
            runs: VecDeque::new(),
            is_blind: true,
        };
    }

    /// Notes that the kernel has had the verdicts on packets that were numbered one after the other
    pub(crate) fn answer(&mut self, first: u32, last: u32) {
        match self.runs.front_mut() {
            Some(oldest) if oldest.first == first && oldest.last == last => {
                self.runs.pop_front();
            }
            Some(oldest) if oldest.first == first && is_before(last, oldest.last) => {
                oldest.first = last.wrapping_add(1);
            }
            Some(_) => {
                let mut id = first;
                self.answer_one(id);
                while id != last {
                    id = id.wrapping_add(1);
                    self.answer_one(id);
                }
            }
            None => {}
        }
    }

    fn answer_one(&mut self, id: u32) {
        let place = self.runs.partition_point(|run| is_before(run.last, id));
        let Some(run) = self.runs.get_mut(place) else {
            return;
        };
        let Run { first, last } = *run;
        if is_before(id, first) {
            return;
        }
        match (id == first, id == last) {
            (true, true) => {
                self.runs.remove(place);
            }
            (true, false) => run.first = id.wrapping_add(1),
            (false, true) => run.last = id.wrapping_sub(1),
            (false, false) => {
                run.last = id.wrapping_sub(1);
                let first = id.wrapping_add(1);
                self.runs.insert(place + 1, Run { first, last });
            }
        }
    }

    /// The waiting packets from the oldest on
    pub(crate) fn cursor(&self) -> Cursor<'_> {
        let mut cursor = Cursor {
            runs: &self.runs,
            run: 0,
            next: None,
            last: 0,
        };
        cursor.begin_run();
        cursor
    }
}

/// Goes through the waiting packets, oldest first
#[derive(Debug)]
pub(crate) struct Cursor<'w> {
    runs: &'w VecDeque<Run>,
    run: usize,
    next: Option<u32>,
    /// The last one of the run that `next` is in
    last: u32,
}

impl Cursor<'_> {
    /// Goes on to the packet behind this one if this is the next one; says whether it was
    #[inline]
    pub(crate) fn advance_over(&mut self, id: u32) -> bool {
        if self.next != Some(id) {
            return false;
        }
        if id == self.last {
            self.run += 1;
            self.begin_run();
        } else {
            self.next = Some(id.wrapping_add(1));
        }
        true
    }

    fn begin_run(&mut self) {
        let run = self.runs.get(self.run);
        self.next = run.map(|run| run.first);
        self.last = run.map_or(0, |run| run.last);
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
            waiting.receive(id, id);
        }
        waiting
    }

    fn ids(waiting: &Waiting) -> Vec<u32> {
        let mut ids = Vec::new();
        let mut cursor = waiting.cursor();
        while let Some(id) = cursor.next {
            ids.push(id);
            assert!(!cursor.advance_over(id.wrapping_sub(1)));
            assert!(cursor.advance_over(id));
        }
        ids
    }

    #[test]
    fn answers_in_any_order_across_the_wrap() {
        let all = [u32::MAX - 1, u32::MAX, 0, 1, 7];
        for first in all {
            for second in all {
                let mut waiting = waiting(&all);
                waiting.answer(first, first);
                waiting.answer(second, second);
                waiting.answer(3, 5); // never received
                let left = all.into_iter().filter(|&id| id != first && id != second);
                assert_eq!(ids(&waiting), Vec::from_iter(left));
            }
        }
    }

    #[test]
    fn answers_to_many_across_runs() {
        let all = [u32::MAX, 0, 1, 2, 5, 6, 9];
        for from in 0..all.len() {
            for to in from..all.len() {
                let mut waiting = waiting(&all);
                waiting.answer(all[from], all[to]);
                let left = [&all[..from], &all[to + 1..]].concat();
                assert_eq!(ids(&waiting), left);
            }
        }
    }

    #[test]
    fn what_comes_out_of_order_blinds() {
        for order in [[1, 3, 2], [1, 2, 2]] {
            let mut waiting = waiting(&order);
            assert_eq!(ids(&waiting), []);
            waiting.receive(9, 9);
            assert_eq!(ids(&waiting), [], "for good");
        }
    }
}
