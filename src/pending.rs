//! Packets held for a later verdict, with a verdict for those that are forgotten

use std::collections::{HashSet, VecDeque};
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
/// Holding and taking a key takes constant time. The memory is used again: it grows to the largest
/// number of keys held within the time.
///
/// ```
/// use std::time::{Duration, Instant};
/// use nfqnl::{Event, Pending, RecvBatch, SendBatch, Socket, Verdict};
///
/// # fn f(socket: &Socket, answers: std::sync::mpsc::Receiver<(nfqnl::PacketKey, Verdict)>) -> nfqnl::Result<()> {
/// let mut pending = Pending::new(Duration::from_secs(2), Verdict::Drop);
/// let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
/// loop {
///     for event in socket.recv_timeout(&mut batch, Duration::from_millis(100))? {
///         if let Event::Packet(packet) = event {
///             pending.hold(packet.key(), Instant::now()); // and ask another thread
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
    /// The keys in the order of their deadlines; some may be answered
    order: VecDeque<(Instant, PacketKey)>,
    held: HashSet<PacketKey>,
}

impl Pending {
    /// Returns an empty list; its packets get the verdict `default` after `timeout`
    pub fn new(timeout: Duration, default: impl Into<PlainVerdict>) -> Self {
        Self {
            timeout,
            default: default.into(),
            order: VecDeque::new(),
            held: HashSet::new(),
        }
    }

    /// Holds a packet from `now` on; a packet that is held already keeps its deadline
    ///
    /// `now` must not be earlier than in the call before.
    pub fn hold(&mut self, key: PacketKey, now: Instant) {
        if self.held.insert(key) {
            self.order.push_back((now, key));
        }
    }

    /// Takes a packet out, to answer it; returns false if it is not held, or not any more
    #[must_use = "a packet that is not held has its verdict"]
    pub fn take(&mut self, key: PacketKey) -> bool {
        let is_held = self.held.remove(&key);
        self.forget_answered();
        is_held
    }

    /// Adds the default verdict of each packet whose time is over; returns their number
    pub fn expired(&mut self, now: Instant, verdicts: &mut SendBatch) -> usize {
        let mut expired = 0;
        while let Some(&(since, key)) = self.order.front() {
            if now.saturating_duration_since(since) < self.timeout {
                break;
            }
            if self.held.remove(&key) {
                verdicts.push_plain(key, self.default);
                expired += 1;
            }
            self.order.pop_front();
        }
        expired
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

    /// Removes answered keys from the front, so that the first one is held
    fn forget_answered(&mut self) {
        while let Some((_, key)) = self.order.front() {
            if self.held.contains(key) {
                return;
            }
            self.order.pop_front();
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

    /// A key is held again after its verdict, for instance a key made from an id
    #[test]
    fn a_key_can_be_held_again() {
        let begin = Instant::now();
        let mut pending = Pending::new(SECOND, Verdict::Accept);
        let mut verdicts = SendBatch::new();
        pending.hold(key(1), begin);
        pending.hold(key(2), begin);
        assert!(pending.take(key(2)));
        pending.hold(key(2), begin + SECOND / 2);
        assert_eq!(pending.expired(begin + SECOND, &mut verdicts), 2);
        assert_eq!(pending.expired(begin + 2 * SECOND, &mut verdicts), 0);
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
