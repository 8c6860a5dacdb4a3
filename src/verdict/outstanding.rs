//! The outstanding packets of a binding, and the rules for merging equal verdicts
//!
//! A batch verdict (`NFQNL_MSG_VERDICT_BATCH`) answers every waiting packet of its queue up to an
//! id. It may be sent only if each of these packets has this verdict. The reasons why this is
//! certain:
//!
//! 1. The kernel numbers the packets of a binding and sends them in one order.
//! 2. A packet does not wait if there was no room for its message: the kernel dropped the packet
//!    or let it by.
//! 3. A thread records its datagrams before another thread reads, or else `Seen::in_order` is
//!    false, and then every gap ends merging.
//! 4. So this list has each waiting packet with an id up to the newest recorded one. A packet
//!    stays in the list until its verdict was *sent*: another thread may be about to send it.
//! 5. A batch verdict is sent only on consecutive entries from the oldest one on.
//! 6. Two refusals leave a packet waiting: `EPERM` ends merging for the socket, and `EINVAL` for
//!    STOLEN does not count as an answer.
//!
//! Four guards end merging for the binding:
//! * an id gap without an overrun: another process reads from the same socket, or a socket filter
//!   hides waiting packets. After a fork every gap counts;
//! * an id not newer than the newest one: a copy of the socket was used to bind the queue again.
//!   Until the first new packet is read, the two bindings look alike;
//! * a packet that waits while 2^29 others pass: ids wrap, and the kernel compares them as a
//!   32-bit sequence;
//! * more than 65,536 ranges: another program answers these packets.
//!
//! In an adopted queue packets of the process before may wait, which this list does not have. No
//! verdicts are merged until these packets have their verdict.
//!
//! After an overrun an unknown number of ids is missing. Verdicts are sent singly until the socket
//! was seen empty and a later packet has shown the gap. Before then no packet with an id beyond
//! the gap can wait: from the first loss on, the kernel drops everything until the buffer has been
//! read empty (`netlink_overrun` in `net/netlink/af_netlink.c`), and the first receive call after
//! the loss reports it. A socket that hides overruns has no such report. Merging is then safe
//! under the documented conditions: nothing else reads from the socket, no filter is attached, and
//! fewer than 2^31 packets pass between a receive and its send.

use std::collections::VecDeque;

use nfqnl_proto::PlainVerdict;

/// The largest distance between ids with a certain order
const MAX_SPAN: u32 = 1 << 29;

/// The maximum number of ranges
const MAX_RANGES: usize = 1 << 16;

#[derive(Debug)]
pub(crate) struct Outstanding {
    /// The outstanding ids, oldest first; empty if packets are not listed
    ranges: VecDeque<Range>,
    /// The newest recorded id, 0 before the first
    newest: u32,
    /// The gaps up to the newest id account for the overruns up to this count
    overruns: u32,
    merges: bool,
    /// Ids have come in order, and not too many wait; merging needs the list
    is_listed: bool,
    /// The number of packets without a sent verdict since the list ended
    unlisted: u64,
    /// Until the packets of the process before have their verdict
    orphans: Option<Orphans>,
}

/// The packets of a process before this one, in an adopted queue
#[derive(Clone, Copy, Debug)]
pub(crate) struct Orphans {
    pub(crate) verdict: PlainVerdict,
    /// The newest packet of the process before, as the handover names it
    pub(crate) answered: Option<u32>,
    /// The packet before the first one of this process
    pub(crate) due: Option<u32>,
}

/// Consecutive ids; never empty
#[derive(Clone, Copy, Debug, PartialEq)]
struct Range {
    first: u32,
    last: u32,
}

impl Range {
    fn len(&self) -> u64 {
        u64::from(self.last.wrapping_sub(self.first)) + 1
    }
}

/// The state of the socket when packets are recorded
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    /// Overruns reported so far
    pub(crate) overruns: u32,
    /// The socket was seen empty since the last overrun
    pub(crate) is_drained: bool,
    /// The kernel reports overruns to this socket
    pub(crate) reports_overruns: bool,
    /// The engine itself received the packets, in the kernel's order
    pub(crate) in_order: bool,
    /// The process was forked since the socket was opened
    pub(crate) is_shared: bool,
}

/// The place of recorded packets among the earlier ones
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Recorded {
    /// This many ids are missing before them
    After(u32),
    /// Their ids were missing before: the program passes packets on out of order
    Late,
}

impl Outstanding {
    /// Returns an empty list; overruns after this count explain missing ids
    pub(crate) const fn new(overruns: u32, merges: bool) -> Self {
        Self {
            ranges: VecDeque::new(),
            newest: 0,
            overruns,
            merges,
            is_listed: true,
            unlisted: 0,
            orphans: None,
        }
    }

    /// Returns the list of a binding made by a process before this one; `newest` is the newest id
    /// that it has received, if known
    pub(crate) const fn adopted(
        overruns: u32,
        merges: bool,
        newest: Option<u32>,
        orphans: PlainVerdict,
    ) -> Self {
        let mut list = Self::new(overruns, merges);
        list.newest = match newest {
            Some(newest) => newest,
            None => 0,
        };
        list.orphans = Some(Orphans {
            verdict: orphans,
            answered: newest,
            due: None,
        });
        list
    }

    /// Returns true until all packets of the process before have their verdict
    #[inline]
    pub(crate) const fn has_orphans(&self) -> bool {
        self.orphans.is_some()
    }

    /// Returns the packets of the process before
    pub(crate) const fn orphans(&self) -> Option<Orphans> {
        self.orphans
    }

    /// Returns the id up to which orphans have no verdict yet, and the verdict; `first` is a packet
    /// of this process
    ///
    /// The first such packet shows the id: all older packets are orphans. With a handover most
    /// have their verdict already. A process that was killed after the handover may have left more.
    pub(crate) fn orphans_due(&mut self, first: u32) -> Option<(u32, PlainVerdict)> {
        let orphans = self.orphans.as_mut()?;
        let before = first.wrapping_sub(1);
        let due = *orphans.due.get_or_insert_with(|| {
            self.newest = orphans.answered.unwrap_or(before);
            before
        });
        (orphans.answered != Some(due)).then_some((due, orphans.verdict))
    }

    /// Records that the verdict on all packets of the process before was sent
    pub(crate) const fn answer_orphans(&mut self) {
        self.orphans = None;
    }

    /// Returns the number of packets without a sent verdict
    pub(crate) fn waiting(&self) -> u64 {
        let listed = self.ranges.iter().map(Range::len);
        self.unlisted + listed.sum::<u64>()
    }

    /// Records packets with consecutive ids
    pub(crate) fn record(&mut self, first: u32, last: u32, seen: Seen) -> Recorded {
        let recorded = self.place(first, last, seen);
        if self.is_listed {
            self.append(Range { first, last });
        } else {
            self.unlisted += Range { first, last }.len();
        }
        recorded
    }

    /// Finds the place of packets among the earlier ones, and ends merging if the list may be wrong
    fn place(&mut self, first: u32, last: u32, seen: Seen) -> Recorded {
        if !is_before(self.newest, first) {
            self.end_list();
            if seen.in_order {
                self.newest = last;
                return Recorded::After(0);
            }
            return match first == self.newest {
                true => Recorded::After(0),
                false => Recorded::Late,
            };
        }
        let missing = first.wrapping_sub(self.newest) - 1;
        self.newest = last;
        // Another process, or a thread that does not run, may have packets of the gap beside those
        // that were lost.
        let may_be_lost = self.overruns != seen.overruns || !seen.reports_overruns;
        let is_explained = missing == 0 || (may_be_lost && seen.in_order && !seen.is_shared);
        if !is_explained || missing > MAX_SPAN {
            self.end_merging();
        }
        if seen.is_drained {
            self.overruns = seen.overruns;
        }
        Recorded::After(missing)
    }

    fn append(&mut self, range: Range) {
        let oldest = self
            .ranges
            .front()
            .map_or(range.first, |oldest| oldest.first);
        if range.last.wrapping_sub(oldest) > MAX_SPAN || self.ranges.len() >= MAX_RANGES {
            self.end_list();
            self.unlisted += range.len();
            return;
        }
        match self.ranges.back_mut() {
            Some(newest) if newest.last.wrapping_add(1) == range.first => newest.last = range.last,
            _ => self.ranges.push_back(range),
        }
    }

    /// Returns true if verdicts are merged at all
    pub(crate) const fn merges(&self) -> bool {
        self.merges
    }

    /// Sends verdicts singly from here on
    pub(crate) const fn end_merging(&mut self) {
        self.merges = false;
    }

    /// Only counts packets from here on, and does not merge
    fn end_list(&mut self) {
        self.merges = false;
        self.is_listed = false;
        self.unlisted = self.waiting();
        self.ranges = VecDeque::new();
    }

    /// Returns a cursor at the oldest packet, if verdicts may be merged at this count of overruns
    pub(crate) fn oldest(&self, overruns: u32) -> Option<Cursor> {
        let oldest = self.ranges.front()?;
        let is_complete = self.overruns == overruns && self.orphans.is_none();
        (self.merges && is_complete).then_some(Cursor {
            range: 0,
            id: oldest.first,
        })
    }

    /// Advances the cursor over packets with consecutive ids, as far as it is at them; returns the
    /// number of packets
    #[inline]
    pub(crate) fn advance(&self, cursor: &mut Option<Cursor>, first: u32, len: u32) -> u32 {
        let at = cursor.as_mut().filter(|at| at.id == first);
        let Some((at, range)) = at.and_then(|at| self.ranges.get(at.range).map(|r| (at, r))) else {
            return 0;
        };
        let left = range.last.wrapping_sub(first);
        if len <= left {
            at.id = first.wrapping_add(len);
            return len;
        }
        at.range += 1;
        match self.ranges.get(at.range) {
            Some(next) => at.id = next.first,
            None => *cursor = None,
        }
        left + 1
    }

    /// Records sent verdicts on packets with consecutive ids
    #[inline]
    pub(crate) fn answer(&mut self, first: u32, last: u32) {
        if !self.is_listed {
            self.unlisted = self.unlisted.saturating_sub(Range { first, last }.len());
            return;
        }
        match self.ranges.front_mut() {
            Some(oldest) if oldest.first == first && oldest.last == last => {
                self.ranges.pop_front();
            }
            Some(oldest) if oldest.first == first && is_before(last, oldest.last) => {
                oldest.first = last.wrapping_add(1);
            }
            Some(_) => {
                let len = last.wrapping_sub(first);
                (0..=len).for_each(|n| self.answer_one(first.wrapping_add(n)));
            }
            None => {}
        }
    }

    /// Records a sent verdict on any packet
    fn answer_one(&mut self, id: u32) {
        let index = self
            .ranges
            .partition_point(|range| is_before(range.last, id));
        let Some(range) = self.ranges.get_mut(index) else {
            return;
        };
        let Range { first, last } = *range;
        if is_before(id, first) {
            return;
        }
        match (id == first, id == last) {
            (true, true) => {
                self.ranges.remove(index);
            }
            (true, false) => range.first = id.wrapping_add(1),
            (false, true) => range.last = id.wrapping_sub(1),
            (false, false) => {
                range.last = id.wrapping_sub(1);
                let first = id.wrapping_add(1);
                self.ranges.insert(index + 1, Range { first, last });
                if self.ranges.len() > MAX_RANGES {
                    self.end_list();
                }
            }
        }
    }

    /// Returns the newest id that this process or the one before has received, if known
    pub(crate) const fn newest_if_known(&self) -> Option<u32> {
        match self.orphans {
            Some(Orphans {
                due: None,
                answered,
                ..
            }) => answered,
            _ => Some(self.newest),
        }
    }

    /// Returns the newest recorded id
    pub(crate) const fn newest(&self) -> u32 {
        self.newest
    }

    /// Records a sent verdict on every packet up to this one; `newest` was the newest id before
    /// the send: later packets may have come after the verdict
    pub(crate) fn answer_up_to(&mut self, last: u32, newest: u32) {
        let last = if is_before(newest, last) {
            newest
        } else {
            last
        };
        // At most the packets behind it still wait.
        let behind = self.newest.wrapping_sub(last);
        self.unlisted = self.unlisted.min(behind.into());
        while let Some(oldest) = self.ranges.front_mut() {
            if is_before(last, oldest.first) {
                return;
            }
            if is_before(last, oldest.last) {
                oldest.first = last.wrapping_add(1);
                return;
            }
            self.ranges.pop_front();
        }
    }
}

/// A place in the list, to find consecutive entries from the oldest on
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cursor {
    range: usize,
    id: u32,
}

/// Returns true if the kernel numbered `a` before `b`; ids wrap
const fn is_before(a: u32, b: u32) -> bool {
    let step = b.wrapping_sub(a);
    step != 0 && step <= u32::MAX / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEEN: Seen = Seen {
        overruns: 0,
        is_drained: true,
        reports_overruns: true,
        in_order: true,
        is_shared: false,
    };

    /// Returns a list of these ids; overruns explain their gaps
    fn outstanding(ids: &[u32]) -> Outstanding {
        let mut list = Outstanding::new(0, true);
        for (overruns, &id) in (1..).zip(ids) {
            if id.wrapping_sub(list.newest) > MAX_SPAN {
                list.newest = id.wrapping_sub(1); // ids about to wrap
            }
            list.record(id, id, Seen { overruns, ..SEEN });
        }
        list
    }

    fn ids(list: &Outstanding) -> Vec<u32> {
        let mut ids = Vec::new();
        let mut cursor = list.oldest(list.overruns);
        while let Some(at) = cursor {
            ids.push(at.id);
            assert_eq!(list.advance(&mut cursor, at.id.wrapping_sub(1), 2), 0);
            assert_eq!(list.advance(&mut cursor, at.id, 1), 1);
        }
        ids
    }

    #[test]
    fn answers_in_any_order_across_the_wrap() {
        let all = [u32::MAX - 1, u32::MAX, 0, 1, 7];
        for first in all {
            for second in all {
                let mut list = outstanding(&all);
                assert_eq!(ids(&list), all);
                list.answer(first, first);
                list.answer(second, second);
                list.answer(3, 3); // never received
                let left = all.into_iter().filter(|&id| id != first && id != second);
                assert_eq!(ids(&list), Vec::from_iter(left));
            }
        }
    }

    #[test]
    fn answers_to_many_across_ranges() {
        let all = [u32::MAX, 0, 1, 2, 5, 6, 9];
        for from in 0..all.len() {
            for to in from..all.len() {
                let mut list = outstanding(&all);
                list.answer(all[from], all[to]);
                assert_eq!(ids(&list), [&all[..from], &all[to + 1..]].concat());
            }
        }
    }

    #[test]
    fn a_cursor_stops_at_the_end_of_its_range() {
        let list = outstanding(&[u32::MAX, 0, 1, 4]);
        let mut cursor = list.oldest(list.overruns);
        assert_eq!(list.advance(&mut cursor, u32::MAX, 2), 2);
        assert_eq!(list.advance(&mut cursor, 0, 9), 0, "the cursor is past it");
        assert_eq!(list.advance(&mut cursor, 1, 9), 1);
        assert_eq!(list.advance(&mut cursor, 2, 9), 0, "no such packet waits");
        assert_eq!(list.advance(&mut cursor, 4, 9), 1);
        assert_eq!(list.advance(&mut cursor, 5, 1), 0);
    }

    #[test]
    fn answers_up_to_an_id_take_all_before() {
        let all = [u32::MAX, 0, 1, 2, 5, 6, 9];
        for (index, last) in all.into_iter().enumerate() {
            let mut list = outstanding(&all);
            list.answer_up_to(last, list.newest());
            assert_eq!(ids(&list), all[index + 1..]);
        }
        let mut list = outstanding(&all);
        for _ in 0..2 {
            list.answer_up_to(4, list.newest());
            assert_eq!(ids(&list), [5, 6, 9]);
        }
        list.answer_up_to(100, 6);
        assert_eq!(ids(&list), [9], "it came after the verdict");
    }

    #[test]
    fn a_gap_without_an_overrun_ends_merging() {
        let mut list = outstanding(&[1, 2]);
        let seen = Seen {
            overruns: 2,
            ..SEEN
        };
        assert_eq!(list.record(3, 4, seen), Recorded::After(0));
        assert_eq!(list.record(6, 6, seen), Recorded::After(1));
        assert!(!list.merges());
        list.record(7, 7, seen);
        assert!(ids(&list).is_empty(), "for good");
    }

    #[test]
    fn a_gap_after_a_fork_ends_merging() {
        let mut list = Outstanding::new(0, true);
        let seen = Seen {
            overruns: 1,
            is_shared: true,
            ..SEEN
        };
        list.record(2, 2, seen);
        assert!(!list.merges());
    }

    #[test]
    fn a_gap_beside_a_thread_with_packets_ends_merging() {
        for reports_overruns in [false, true] {
            let mut list = Outstanding::new(0, true);
            let seen = Seen {
                overruns: 1,
                in_order: false,
                reports_overruns,
                ..SEEN
            };
            list.record(4, 10, seen);
            assert!(!list.merges());
        }
    }

    #[test]
    fn hidden_overruns_explain_every_gap() {
        let mut list = Outstanding::new(0, true);
        let seen = Seen {
            reports_overruns: false,
            ..SEEN
        };
        list.record(1, 1, seen);
        assert_eq!(list.record(9, 9, seen), Recorded::After(7));
        assert_eq!(ids(&list), [1, 9]);
    }

    #[test]
    fn an_overrun_pauses_merging_until_its_gap_shows() {
        let mut list = Outstanding::new(0, true);
        list.record(1, 1, SEEN);
        assert!(list.oldest(0).is_some());
        assert!(list.oldest(1).is_none(), "an overrun was read since");
        let during = Seen {
            overruns: 1,
            is_drained: false,
            ..SEEN
        };
        list.record(2, 2, during);
        assert!(list.oldest(1).is_none(), "more may be missing");
        let after = Seen {
            overruns: 1,
            ..SEEN
        };
        assert_eq!(list.record(7, 7, after), Recorded::After(4));
        assert!(list.oldest(1).is_some());
        assert_eq!(ids(&list), [1, 2, 7]);
    }

    #[test]
    fn a_gap_of_half_a_billion_ends_merging() {
        let seen = Seen {
            overruns: 1,
            ..SEEN
        };
        let mut list = Outstanding::new(0, true);
        list.record(1, 1, SEEN);
        list.answer(1, 1);
        list.record(2 + MAX_SPAN, 2 + MAX_SPAN, seen);
        assert!(list.merges());
        let mut list = Outstanding::new(0, true);
        list.record(1, 1, SEEN);
        list.answer(1, 1);
        list.record(3 + MAX_SPAN, 3 + MAX_SPAN, seen);
        assert!(!list.merges());
    }

    #[test]
    fn a_packet_that_waits_for_very_long_ends_merging() {
        let mut list = outstanding(&[7]);
        let seen = Seen {
            reports_overruns: false,
            ..SEEN
        };
        list.record(7 + MAX_SPAN, 7 + MAX_SPAN, seen);
        assert_eq!(ids(&list), [7, 7 + MAX_SPAN]);
        list.record(8 + MAX_SPAN, 8 + MAX_SPAN, seen);
        assert!(!list.merges());
    }

    #[test]
    fn an_older_id_ends_merging() {
        for id in [1, 2] {
            let mut list = Outstanding::new(0, true);
            list.record(1, 2, SEEN);
            assert_eq!(list.record(id, id, SEEN), Recorded::After(0));
            assert!(!list.merges());
            assert_eq!(list.newest, id, "numbers begin again");
        }
    }

    #[test]
    fn packets_passed_on_out_of_order_are_late() {
        let seen = Seen {
            in_order: false,
            ..SEEN
        };
        let mut list = Outstanding::new(0, true);
        assert_eq!(list.record(1, 1, seen), Recorded::After(0));
        assert_eq!(list.record(3, 3, seen), Recorded::After(1));
        assert_eq!(list.record(2, 2, seen), Recorded::Late);
        assert_eq!(list.record(3, 3, seen), Recorded::After(0), "once more");
        assert_eq!(list.record(4, 4, seen), Recorded::After(0));
    }

    #[test]
    fn too_many_ranges_end_merging() {
        let most = u32::try_from(MAX_RANGES).unwrap();
        let mut list = Outstanding::new(0, true);
        list.record(1, 2 * most + 2, SEEN);
        for id in 1..=most {
            assert!(list.merges() && list.ranges.len() <= MAX_RANGES);
            list.answer(2 * id, 2 * id);
        }
        assert!(!list.merges());
        let seen = Seen {
            reports_overruns: false,
            ..SEEN
        };
        let mut list = Outstanding::new(0, true);
        for id in 0..=most {
            list.record(2 * id + 1, 2 * id + 1, seen);
        }
        assert!(!list.merges() && list.ranges.is_empty());
    }
}
