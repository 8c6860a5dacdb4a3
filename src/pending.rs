//! Packets held for a later verdict, with a verdict for those that are forgotten

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use nfqnl_proto::{PacketKey, PlainVerdict};

use crate::verdict::SendBatch;

/// Packets held for a later verdict: each gets a default verdict after a time
///
/// A program [holds](Self::hold) the key of a packet that it cannot decide at once, and
/// [takes](Self::take) the key when it answers. [`expired`](Self::expired) adds the default
/// verdicts of the forgotten packets to a batch. Call it in each turn of the loop. All packets of
/// one `Pending` have the same time; use several for several times.
///
/// Holding and taking a key takes constant time. The memory is used again: it grows with the
/// largest number of keys held at once.
///
/// ```
/// use std::time::{Duration, Instant};
/// use nfqnl::{Event, Pending, RecvBatch, SendBatch, Socket, Verdict};
///
/// # fn f(socket: &Socket, answers: std::sync::mpsc::Receiver<(nfqnl::PacketKey, Verdict)>) -> nfqnl::Result<()> {
/// let mut pending = Pending::new(Duration::from_secs(2), Verdict::Drop);
/// let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
/// loop {
///     let deadline = pending.next_deadline().unwrap_or(Instant::now() + Duration::from_secs(1));
///     let timeout = deadline.saturating_duration_since(Instant::now());
///     for event in socket.recv_timeout(&mut batch, timeout)? {
///         if let Event::Packet(packet) = event {
///             pending.hold(packet.key(), Instant::now());
///             // Here another thread gets the work. It sends an answer, and wakes this thread.
///         }
///     }
///     for (key, verdict) in answers.try_iter() {
///         if pending.take(key) {
///             verdicts.push(key, verdict)?;
///         }
///     }
///     pending.expired(Instant::now(), &mut verdicts);
///     socket.send(&mut verdicts)?;
/// #   break;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Pending {
    timeout: Duration,
    default: PlainVerdict,
    /// The keys in the order of their deadlines; some are answered, or held again since
    order: VecDeque<(Instant, PacketKey)>,
    held: HashMap<PacketKey, Instant>,
}

impl Pending {
    /// Returns an empty list; its packets get the verdict `default` after `timeout`
    pub fn new(timeout: Duration, default: impl Into<PlainVerdict>) -> Self {
        Self {
            timeout,
            default: default.into(),
            order: VecDeque::new(),
            held: HashMap::new(),
        }
    }

    /// Holds a packet from `now` on; a packet that is held already keeps its deadline
    ///
    /// `now` must not be earlier than in the call before.
    pub fn hold(&mut self, key: PacketKey, now: Instant) {
        if let Entry::Vacant(place) = self.held.entry(key) {
            place.insert(now);
            self.order.push_back((now, key));
        }
    }

    /// Takes a packet out, to answer it; returns false if it is not held, or not any more
    #[must_use = "a packet that is not held has its verdict"]
    pub fn take(&mut self, key: PacketKey) -> bool {
        let is_held = self.held.remove(&key).is_some();
        self.forget_answered();
        is_held
    }

    /// Adds the default verdict of each packet whose time is over; returns their number
    pub fn expired(&mut self, now: Instant, verdicts: &mut SendBatch) -> usize {
        let timeout = self.timeout;
        self.answer_while(verdicts, |since| {
            now.saturating_duration_since(since) >= timeout
        })
    }

    /// Adds the default verdict of every packet, for instance before [`Socket::drain`]; returns
    /// their number
    ///
    /// [`Socket::drain`]: crate::Socket::drain
    pub fn answer_all(&mut self, verdicts: &mut SendBatch) -> usize {
        self.answer_while(verdicts, |_| true)
    }

    fn answer_while(
        &mut self,
        verdicts: &mut SendBatch,
        is_over: impl Fn(Instant) -> bool,
    ) -> usize {
        let before = self.held.len();
        while let Some(&(since, key)) = self.order.front() {
            if !is_over(since) {
                break;
            }
            if self.held.get(&key) == Some(&since) {
                self.held.remove(&key);
                verdicts.push_plain(key, self.default);
            }
            self.order.pop_front();
        }
        self.forget_answered();
        before - self.held.len()
    }

    /// Returns the time at which the next packet expires, for a poll timeout
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        let (since, _) = self.order.front()?;
        since.checked_add(self.timeout)
    }

    /// Returns the time since which the oldest packet is held
    #[must_use]
    pub fn oldest(&self) -> Option<Instant> {
        self.order.front().map(|&(since, _)| since)
    }

    /// Returns the number of packets held
    #[must_use]
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Returns true if no packet is held
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Removes answered keys from the front, so that the first one is held; and all, once they are
    /// the greater part
    fn forget_answered(&mut self) {
        let held = &self.held;
        let is_held = |(since, key): &(Instant, PacketKey)| held.get(key) == Some(since);
        while self.order.front().is_some_and(|entry| !is_held(entry)) {
            self.order.pop_front();
        }
        if self.order.len() > 64 + 2 * held.len() {
            self.order.retain(is_held);
        }
    }
}

#[cfg(test)]
mod tests {
    use nfqnl_proto::Verdict;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn key(id: u32) -> PacketKey {
        PacketKey::new(7, id)
    }

    #[test]
    fn forgotten_packets_expire_in_order() {
        let begin = Instant::now();
        let mut pending = Pending::new(SECOND, Verdict::Drop);
        let mut verdicts = SendBatch::new();
        for id in 1..=4 {
            pending.hold(key(id), begin + SECOND / 10 * id);
        }
        pending.hold(key(1), begin + SECOND);
        assert!(pending.take(key(2)) && !pending.take(key(2)));
        assert_eq!(
            (pending.len(), pending.oldest()),
            (3, Some(begin + SECOND / 10))
        );
        let mut expired = |after| pending.expired(begin + after, &mut verdicts);
        assert_eq!(expired(SECOND), 0);
        assert_eq!(expired(SECOND + SECOND / 10), 1);
        assert_eq!(expired(SECOND + SECOND / 2), 2);
        assert_eq!(expired(SECOND * 10), 0);
        assert_eq!(verdicts.len(), 3);
        assert!(pending.is_empty() && !pending.take(key(1)));
        assert_eq!((pending.oldest(), pending.next_deadline()), (None, None));
    }

    #[test]
    fn the_next_deadline_is_that_of_a_held_packet() {
        let begin = Instant::now();
        let mut pending = Pending::new(SECOND, Verdict::Accept);
        pending.hold(key(1), begin);
        pending.hold(key(2), begin + SECOND);
        assert_eq!(pending.next_deadline(), Some(begin + SECOND));
        assert!(pending.take(key(1)));
        assert_eq!(pending.next_deadline(), Some(begin + 2 * SECOND));
    }

    #[test]
    fn a_key_held_again_begins_anew() {
        let begin = Instant::now();
        let mut pending = Pending::new(SECOND, Verdict::Accept);
        let mut verdicts = SendBatch::new();
        pending.hold(key(1), begin);
        pending.hold(key(2), begin);
        assert!(pending.take(key(2)));
        pending.hold(key(2), begin + SECOND / 2);
        assert_eq!(pending.expired(begin + SECOND, &mut verdicts), 1);
        assert_eq!(pending.oldest(), Some(begin + SECOND / 2));
        assert_eq!(pending.expired(begin + 2 * SECOND, &mut verdicts), 1);
        assert_eq!((pending.oldest(), verdicts.len()), (None, 2));
    }

    #[test]
    fn an_answered_key_is_no_deadline() {
        let begin = Instant::now();
        let mut pending = Pending::new(SECOND, Verdict::Accept);
        let mut verdicts = SendBatch::new();
        pending.hold(key(1), begin);
        pending.hold(key(2), begin + SECOND / 2);
        assert!(pending.take(key(2)));
        assert_eq!(pending.expired(begin + SECOND, &mut verdicts), 1);
        assert_eq!((pending.oldest(), pending.next_deadline()), (None, None));
        pending.hold(key(3), begin + SECOND);
        assert_eq!(pending.answer_all(&mut verdicts), 1);
        assert!(pending.is_empty() && pending.oldest().is_none());
    }

    #[test]
    fn one_slow_packet_keeps_no_answered_keys() {
        let begin = Instant::now();
        let mut pending = Pending::new(SECOND, Verdict::Accept);
        pending.hold(key(0), begin);
        for id in 1..10_000 {
            pending.hold(key(id), begin);
            assert!(pending.take(key(id)));
        }
        assert!(pending.order.capacity() < 1000);
    }

    #[test]
    fn memory_is_used_again() {
        let begin = Instant::now();
        let mut pending = Pending::new(SECOND, Verdict::Accept);
        let mut verdicts = SendBatch::new();
        let mut capacity = None;
        for round in 0..20 {
            let now = begin + SECOND * round;
            (0..1000).for_each(|id| pending.hold(key(round * 1000 + id), now));
            (0..500).for_each(|id| assert!(pending.take(key(round * 1000 + id))));
            assert_eq!(pending.expired(now + SECOND, &mut verdicts), 500);
            verdicts.clear();
            let now = pending.order.capacity();
            assert_eq!(*capacity.get_or_insert(now), now);
            assert!(pending.held.capacity() < 4 * 1000);
        }
    }
}
