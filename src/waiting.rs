//! Which packets of a binding may wait in the kernel: what makes it safe to answer many of them by one message
//!
//! A batch verdict (`NFQNL_MSG_VERDICT_BATCH`) falls on every waiting packet of its queue up to an id, whoever holds it.
//! So it may only be sent when each of these packets has that verdict.
//!
//! * The kernel numbers packets and sends them in one order, so whoever has received an id knows of every earlier one: it
//!   was received too, or it was lost and does not wait.
//! * An id stays in this list until the verdict on it has been *sent*, not just decided: a verdict that another thread is
//!   about to send must not find its packet taken.
//! * A send of a thread without `CAP_NET_ADMIN` is refused as a whole, and its packets go on waiting. That is known only
//!   when the refusal is received, or never, if it is lost. So a thread that sends verdicts has its capability looked at
//!   before and after; all but one verdict of each binding, the *usual* one. A send of nothing else is never looked at,
//!   and its packets may wait still: no harm for a run of the same verdict, and before a run of another one the usual
//!   verdict is said again, in the same send. So the most common of all programs, which gives nearly all packets the same
//!   verdict, pays nothing.

use std::collections::VecDeque;

use nfqnl_proto::BatchVerdict;

/// More packets than any sensible queue holds apart; beyond, somebody else must be answering them
const MAX_RUNS: usize = 1 << 18;

/// Numbers that are further apart may not tell any more which came first, since they wrap
pub(crate) const MAX_SPAN: u32 = 1 << 29;

#[derive(Debug, Default)]
pub(crate) struct Waiting {
    /// The packets that were received and not answered, oldest first; no run is empty
    runs: VecDeque<Run>,
    /// Packets may wait that are not in the list, so nothing can be said about any
    is_blind: bool,
    /// The first verdict that was sent
    usual: Option<BatchVerdict>,
    /// The last packet that was given the usual verdict by a send that was not looked at
    last_unproven: Option<u32>,
    /// Whether verdicts were ever sent together
    expects_runs: bool,
}

/// The usual verdict was sent on packets up to this one, and they may wait still
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unproven {
    pub(crate) verdict: BatchVerdict,
    pub(crate) last: u32,
}

impl Unproven {
    /// Whether a run of this verdict may begin with this packet, the oldest one in the list
    pub(crate) fn lets_pass(&self, verdict: BatchVerdict, first: u32) -> bool {
        self.verdict == verdict || is_before(self.last, first)
    }

    /// Whether a run of the same verdict up to this packet carries it out
    pub(crate) fn is_within(&self, last: u32) -> bool {
        !is_before(last, self.last)
    }
}

/// Packets that the kernel has numbered one after the other
#[derive(Clone, Copy, Debug)]
struct Run {
    first: u32,
    last: u32,
}

impl Waiting {
    /// A list that knows of no packet
    pub(crate) fn blind() -> Self {
        Self {
            is_blind: true,
            ..Self::default()
        }
    }

    /// Notes packets that were numbered one after the other, and later than all before
    pub(crate) fn receive(&mut self, first: u32, last: u32) {
        let is_far = |id: u32| last.wrapping_sub(id) > MAX_SPAN;
        let oldest = self.runs.front().map(|run| run.first);
        if oldest.is_some_and(is_far) || self.last_unproven.is_some_and(is_far) {
            return self.go_blind();
        }
        let has_room = self.runs.len() < MAX_RUNS;
        match self.runs.back_mut() {
            _ if self.is_blind => {}
            Some(newest) if newest.last.wrapping_add(1) == first => newest.last = last,
            Some(newest) if !has_room || !is_before(newest.last, first) => self.go_blind(),
            _ => self.runs.push_back(Run { first, last }),
        }
    }

    /// Whether nothing can be said about any packet
    pub(crate) fn is_blind(&self) -> bool {
        self.is_blind
    }

    /// Notes that packets may wait which are not in the list
    pub(crate) fn go_blind(&mut self) {
        *self = Self::blind();
    }

    /// Whether it will matter that the kernel has carried out a send of these verdicts, `None` for those that no batch
    /// verdict can say; each is an answer
    pub(crate) fn needs_proof(
        &mut self,
        verdicts: impl IntoIterator<Item = Option<BatchVerdict>>,
    ) -> bool {
        self.expects_runs = true;
        !self.is_blind && self.are_unusual(verdicts)
    }

    /// The same for a verdict that is sent alone
    ///
    /// A program that sends none together, and not always the same, has no use for the list, and for being looked at.
    pub(crate) fn needs_proof_alone(&mut self, verdict: Option<BatchVerdict>) -> bool {
        let is_unusual = !self.is_blind && self.are_unusual([verdict]);
        if is_unusual && !self.expects_runs {
            self.go_blind();
        }
        is_unusual && !self.is_blind
    }

    fn are_unusual(&mut self, verdicts: impl IntoIterator<Item = Option<BatchVerdict>>) -> bool {
        let usual = &mut self.usual;
        verdicts
            .into_iter()
            .any(|verdict| verdict.is_none_or(|verdict| *usual.get_or_insert(verdict) != verdict))
    }

    /// Notes that a verdict was sent on packets that were numbered one after the other, and whether it is certain that the
    /// kernel has carried it out
    pub(crate) fn note_sent(
        &mut self,
        first: u32,
        last: u32,
        verdict: Option<BatchVerdict>,
        is_proven: bool,
    ) {
        if is_proven {
            return self.answer(first, last);
        }
        if verdict.is_none() || verdict != self.usual {
            return self.go_blind();
        }
        self.answer(first, last);
        match self.last_unproven {
            Some(newest) if is_before(last, newest) => {}
            _ => self.last_unproven = Some(last),
        }
    }

    /// Notes that the kernel has carried out the usual verdict on all packets up to this one
    pub(crate) fn note_settled(&mut self, last: u32) {
        self.last_unproven.take_if(|newest| *newest == last);
    }

    /// What the kernel may not have carried out
    pub(crate) fn unproven(&self) -> Option<Unproven> {
        Some(Unproven {
            verdict: self.usual?,
            last: self.last_unproven?,
        })
    }

    /// Takes packets off the list that were numbered one after the other
    fn answer(&mut self, first: u32, last: u32) {
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
        let has_room = self.runs.len() < MAX_RUNS;
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
            (false, false) if !has_room => self.go_blind(),
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
    /// Goes on over packets that are numbered one after the other, as far as they are the next ones; says how many are
    #[inline]
    pub(crate) fn advance_over(&mut self, first: u32, most: u32) -> u32 {
        if self.next != Some(first) {
            return 0;
        }
        let behind = self.last.wrapping_sub(first);
        if most > behind {
            self.run += 1;
            self.begin_run();
            behind + 1
        } else {
            self.next = Some(first.wrapping_add(most));
            most
        }
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
    use nfqnl_proto::Verdict;

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
            assert_eq!(cursor.advance_over(id.wrapping_sub(1), 1), 0);
            assert_eq!(cursor.advance_over(id, 1), 1);
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
    fn a_cursor_goes_no_further_than_its_run_at_once() {
        let waiting = waiting(&[u32::MAX, 0, 1, 4]);
        let mut cursor = waiting.cursor();
        assert_eq!(cursor.advance_over(u32::MAX, 2), 2);
        assert_eq!(cursor.advance_over(0, 9), 0, "it is past that");
        assert_eq!(cursor.advance_over(1, 9), 1);
        assert_eq!(cursor.advance_over(2, 9), 0, "no such packet waits");
        assert_eq!(cursor.advance_over(4, 9), 1);
        assert_eq!(cursor.advance_over(5, 1), 0);
    }

    #[test]
    fn the_usual_verdict_is_unproven_until_said_again_or_something_later_is() {
        let (accept, drop) = (
            BatchVerdict::new(Verdict::Accept),
            BatchVerdict::new(Verdict::Drop),
        );
        let mut waiting = waiting(&[1, 2, 3, 4, 5]);
        assert!(!waiting.needs_proof([Some(accept)]));
        waiting.note_sent(2, 2, Some(accept), false);
        waiting.note_sent(1, 1, Some(accept), false);
        assert_eq!(waiting.unproven().map(|unproven| unproven.last), Some(2));
        waiting.note_sent(3, 3, Some(accept), false);
        waiting.note_settled(2); // by another thread, which did not know of 3
        let unproven = waiting.unproven().unwrap();
        assert_eq!((unproven.verdict, unproven.last), (accept, 3));
        assert!(unproven.lets_pass(accept, 1) && unproven.lets_pass(drop, 4));
        assert!(
            !unproven.lets_pass(drop, 2),
            "3 would be accepted before it"
        );
        waiting.note_settled(3);
        assert!(waiting.unproven().is_none());
        assert!(waiting.needs_proof([Some(accept), Some(drop)]));
        assert!(waiting.needs_proof([None]));
        assert_eq!(ids(&waiting), [4, 5]);
        waiting.note_sent(4, 4, Some(drop), true);
        assert_eq!(ids(&waiting), [5]);
        waiting.note_sent(5, 5, Some(drop), false);
        assert!(
            !waiting.needs_proof([None]),
            "blind: there is nothing to lose"
        );
    }

    #[test]
    fn a_program_that_sends_each_verdict_alone_is_not_looked_at() {
        let (accept, drop) = (
            BatchVerdict::new(Verdict::Accept),
            BatchVerdict::new(Verdict::Drop),
        );
        let mut alone = waiting(&[1, 2]);
        assert!(!alone.needs_proof_alone(Some(accept)));
        assert!(!alone.needs_proof_alone(Some(drop)));
        assert_eq!(ids(&alone), [], "and has no runs");
        let mut together = waiting(&[1, 2]);
        together.needs_proof([Some(accept)]);
        assert!(!together.needs_proof_alone(Some(accept)));
        assert!(together.needs_proof_alone(Some(drop)));
        assert_eq!(ids(&together), [1, 2]);
    }

    /// A list without end would be no use either
    #[test]
    fn too_many_apart_blind_however_they_come_to_be_apart() {
        let most = u32::try_from(MAX_RUNS).unwrap();
        let mut apart = Waiting::default();
        for id in 0..=most {
            apart.receive(2 * id, 2 * id);
            assert!(apart.runs.len() <= MAX_RUNS);
        }
        assert!(apart.is_blind && apart.runs.is_empty());

        let mut split = Waiting::default();
        split.receive(0, 2 * most + 2);
        for id in 0..=most {
            split.answer(2 * id + 1, 2 * id + 1);
            assert!(split.runs.len() <= MAX_RUNS);
        }
        assert!(split.is_blind && split.runs.is_empty());
    }

    /// Found by fuzzing: half the numbers later it would count as newer than those that came after it
    #[test]
    fn a_packet_that_waits_while_very_many_pass_blinds() {
        let mut waiting = waiting(&[7]);
        waiting.receive(7 + MAX_SPAN, 7 + MAX_SPAN);
        assert_eq!(ids(&waiting), [7, 7 + MAX_SPAN]);
        waiting.receive(8 + MAX_SPAN, 8 + MAX_SPAN);
        assert_eq!(ids(&waiting), []);
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
