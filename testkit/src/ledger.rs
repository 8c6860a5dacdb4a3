//! The conservation law of tests: each sent packet is accepted, dropped by a verdict, or counted
//! as lost
//!
//! Each packet contains its number, counted from 0. Its entry records the verdict and the delivery.

use std::io;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::thread;
use std::time::Instant;

use crate::traffic::{TIMEOUT, Udp};

/// The state of each packet; any thread may record events
#[derive(Debug)]
pub struct Ledger {
    packets: Vec<AtomicU8>,
    sent: AtomicU32,
    settled: AtomicU32,
}

const ACCEPTED: u8 = 1;
const DROPPED: u8 = 2;
const GONE: u8 = 4;
const DELIVERED: u8 = 8;

/// Returns the number in a packet
///
/// # Panics
/// If the payload is too short for a number.
#[must_use]
pub fn number(payload: &[u8]) -> u32 {
    let number = payload.first_chunk().expect("a packet has its number");
    u32::from_be_bytes(*number)
}

impl Ledger {
    /// Makes a ledger for this many packets
    #[must_use]
    pub fn new(packets: u32) -> Self {
        Self {
            packets: (0..packets).map(|_| AtomicU8::new(0)).collect(),
            sent: AtomicU32::new(0),
            settled: AtomicU32::new(0),
        }
    }

    /// Forgets all packets; none may be open
    pub fn clear(&self) {
        for entry in &self.packets {
            entry.store(0, Ordering::SeqCst);
        }
        for count in [&self.sent, &self.settled] {
            count.store(0, Ordering::SeqCst);
        }
    }

    /// Sends the next `packets` packets; only one thread may send
    pub fn send(&self, packets: u32, mut send: impl FnMut(&[u8])) {
        for _ in 0..packets {
            let number = self.sent.fetch_add(1, Ordering::SeqCst);
            send(&number.to_be_bytes());
        }
    }

    /// Returns the number of sent packets
    #[must_use]
    pub fn sent(&self) -> u32 {
        self.sent.load(Ordering::SeqCst)
    }

    /// Returns the number of packets known to be delivered, dropped by a verdict, or lost
    #[must_use]
    pub fn settled(&self) -> u32 {
        self.settled.load(Ordering::SeqCst)
    }

    /// Returns the number of sent packets without a known end
    #[must_use]
    pub fn open(&self) -> u32 {
        self.sent() - self.settled()
    }

    /// Records an accepting verdict
    pub fn accept(&self, number: u32) {
        self.note(number, ACCEPTED);
    }

    /// Records a dropping verdict
    pub fn drop(&self, number: u32) {
        self.note(number, DROPPED);
    }

    /// Records the loss of this packet, whatever its verdict: the verdict was refused, or the queue
    /// ended
    pub fn lose(&self, number: u32) {
        self.note(number, GONE);
    }

    /// Records the packets delivered to a socket
    ///
    /// # Errors
    /// The system call's error.
    pub fn collect(&self, socket: &Udp) -> io::Result<()> {
        socket.take_in(|payload| self.note(number(payload), DELIVERED))
    }

    fn note(&self, number: u32, what: u8) {
        assert!(number < self.sent(), "packet {number} was never sent");
        let before = self.entry(number).fetch_or(what, Ordering::SeqCst);
        let now = before | what;
        let is_possible = now & DELIVERED == 0 || now & (DROPPED | GONE) == 0;
        assert!(
            before & what == 0 && is_possible,
            "packet {number} was {}, and now is {}",
            describe(before),
            describe(what)
        );
        // The delivery may be recorded before the verdict.
        if what != ACCEPTED && before & !ACCEPTED == 0 {
            self.settled.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn entry(&self, number: u32) -> &AtomicU8 {
        &self.packets[usize::try_from(number).expect("not so many")]
    }

    /// Waits for outstanding deliveries, and panics unless every packet is accounted for
    ///
    /// The caller's counters must explain the packets without a verdict: `lost` of them are lost,
    /// and `passed` of them were delivered.
    ///
    /// # Panics
    /// If a packet, or a count, can't be explained.
    #[track_caller]
    pub fn assert_balanced(&self, socket: &Udp, lost: u64, passed: u64) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            self.collect(socket).expect("a socket to receive from");
            match self.imbalance(lost, passed) {
                None => return,
                Some(imbalance) => assert!(Instant::now() < deadline, "{imbalance}"),
            }
            thread::yield_now();
        }
    }

    /// Returns a description of unexplained packets, if there are any
    fn imbalance(&self, lost: u64, passed: u64) -> Option<String> {
        let mut missing = self.that_are(ACCEPTED);
        if let Some(first) = missing.next() {
            let more = missing.count();
            return Some(format!(
                "packet {first} and {more} more were accepted, and not delivered"
            ));
        }
        let [is_lost, has_passed] = [0, DELIVERED].map(|entry| self.that_are(entry).count() as u64);
        let is_balanced = is_lost == lost && has_passed == passed;
        (!is_balanced).then(|| {
            format!(
                "without a verdict, {is_lost} packets of {} are lost, and {lost} counted; {has_passed} have passed, and \
                 {passed} are counted",
                self.sent()
            )
        })
    }

    /// Returns the packets with this entry
    fn that_are(&self, entry: u8) -> impl Iterator<Item = u32> {
        (0..self.sent()).filter(move |&number| self.entry(number).load(Ordering::SeqCst) == entry)
    }
}

fn describe(entry: u8) -> String {
    let words = ["accepted", "dropped", "gone", "delivered"];
    let all = words.iter().enumerate();
    let set = all.filter_map(|(bit, word)| (entry & 1 << bit != 0).then_some(*word));
    let set = Vec::from_iter(set);
    if set.is_empty() {
        "open".to_owned()
    } else {
        set.join(" and ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(packets: u32) -> Ledger {
        let ledger = Ledger::new(packets);
        ledger.send(packets, |_| {});
        ledger
    }

    #[test]
    fn all_is_balanced_when_each_packet_is_accounted_for() {
        let ledger = ledger(6);
        ledger.accept(0);
        ledger.note(0, DELIVERED);
        ledger.note(1, DELIVERED); // The delivery may be recorded first.
        ledger.accept(1);
        ledger.drop(2);
        ledger.accept(3);
        ledger.lose(3);
        ledger.note(4, DELIVERED);
        assert_eq!(ledger.imbalance(1, 1), None);
        assert_eq!((ledger.settled(), ledger.open()), (5, 1));
        for wrong in [(0, 1), (2, 1), (1, 0), (1, 2), (0, 2), (2, 0)] {
            let imbalance = ledger.imbalance(wrong.0, wrong.1).expect("not so");
            assert!(imbalance.contains("without a verdict, 1 packets of 6 are lost"));
        }
        ledger.accept(5);
        let imbalance = ledger.imbalance(0, 1).expect("it was not delivered");
        assert!(imbalance.starts_with("packet 5 and 0 more were accepted"));
        ledger.clear();
        assert_eq!((ledger.sent(), ledger.imbalance(0, 0)), (0, None));
    }

    #[test]
    #[should_panic(expected = "packet 1 was delivered, and now is delivered")]
    fn a_packet_is_delivered_once() {
        let ledger = ledger(2);
        ledger.note(1, DELIVERED);
        ledger.note(1, DELIVERED);
    }

    #[test]
    #[should_panic(expected = "packet 1 was dropped, and now is delivered")]
    fn a_dropped_packet_is_not_delivered() {
        let ledger = ledger(2);
        ledger.drop(1);
        ledger.note(1, DELIVERED);
    }

    #[test]
    #[should_panic(expected = "packet 0 was accepted and delivered, and now is gone")]
    fn a_delivered_packet_is_not_lost() {
        let ledger = ledger(1);
        ledger.accept(0);
        ledger.note(0, DELIVERED);
        ledger.lose(0);
    }

    #[test]
    #[should_panic(expected = "packet 2 was never sent")]
    fn a_packet_that_was_not_sent_is_not_delivered() {
        ledger(2).note(2, DELIVERED);
    }
}
