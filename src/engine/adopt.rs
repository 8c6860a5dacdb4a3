//! Taking over queues that another process has bound with the same socket

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use nfqnl_proto::{ConfigFlags, ConfigRequest, PacketKey, PlainVerdict, QueueConfig};

use super::Engine;
use super::bindings::Binding;
use super::requests::retry_lost_ack;
use crate::error::{Operation, Refusal, Result};
use crate::verdict::Outstanding;

impl Engine {
    /// Registers a queue that the socket has bound already
    ///
    /// `newest` is the newest packet of the process before, if known. The caller must register all
    /// queues before the first message is read.
    pub(crate) fn adopt(
        &self,
        queue: u16,
        newest: Option<u32>,
        flags: ConfigFlags,
        orphans: PlainVerdict,
    ) -> Result<Arc<Binding>> {
        let mut state = self.state();
        if state.bindings.get(queue).is_some() {
            return Err(Refusal::already_bound(Operation::Adopt(queue)).into());
        }
        // The process before may have read the report of an overrun, and not all packets behind it.
        state.is_in_overrun = true;
        let overruns = self.overruns.load(Relaxed).wrapping_sub(1);
        let outstanding = Outstanding::adopted(overruns, self.merges(), newest, orphans);
        let binding = Arc::new(Binding::new(queue, outstanding));
        binding.set_flags(ConfigFlags::all(), flags);
        self.register(&mut state, &binding);
        Ok(binding)
    }

    /// Fails if the socket has not bound one of these queues; answers the orphans that the handover
    /// names
    pub(crate) fn check_adopted(&self, bindings: &[Arc<Binding>]) -> Result<()> {
        // A request may read packets of any queue: then its orphans count as answered.
        let orphans: Vec<_> = bindings
            .iter()
            .map(|binding| binding.outstanding().orphans())
            .collect();
        for (binding, orphans) in bindings.iter().zip(orphans) {
            let request = ConfigRequest::update(binding.id.queue, QueueConfig::new());
            let op = Operation::Adopt(binding.id.queue);
            retry_lost_ack(|| self.configure(op, &request))?;
            let named = orphans.and_then(|orphans| Some((orphans.answered?, orphans.verdict)));
            if let Some((newest, verdict)) = named {
                self.answer_orphans(binding.id.queue, newest, verdict)?;
            }
        }
        Ok(())
    }

    /// Answers the packets of the process before; `first` is the first packet of this process, or
    /// a later one if the send failed then
    pub(super) fn answer_before(&self, binding: &Binding, first: u32) -> Result<()> {
        let due = binding.outstanding().orphans_due(first);
        if let Some((newest, verdict)) = due {
            self.answer_orphans(binding.id.queue, newest, verdict)?;
        }
        binding.outstanding().answer_orphans();
        Ok(())
    }

    /// Answers all packets of the process before, also if their ids are not known
    ///
    /// The caller has recorded all packets of the queue, and the kernel sends no more.
    pub(crate) fn answer_all_orphans(&self, binding: &Binding) -> Result<()> {
        let Some(orphans) = binding.outstanding().orphans() else {
            return Ok(());
        };
        // The kernel compares ids as a 32-bit sequence, and stops at the first newer one: the
        // messages cover both halves, in both orders. After a packet of this process only older
        // ones are orphans.
        let all = [u32::MAX / 2, u32::MAX, u32::MAX / 2];
        let up_to = orphans.due.as_ref().map_or(&all[..], std::slice::from_ref);
        for &newest in up_to {
            self.answer_orphans(binding.id.queue, newest, orphans.verdict)?;
        }
        Ok(())
    }

    /// Answers the packets of the process before up to this one
    ///
    /// The key belongs to no binding. So its refusal is known: no orphan waits.
    fn answer_orphans(&self, queue: u16, newest: u32, verdict: PlainVerdict) -> Result<()> {
        let key = PacketKey::new(queue, newest);
        self.send_plain(Operation::BatchVerdict(key), key, verdict, true)
    }

    /// Ends all bindings in this process, and keeps them in the kernel; returns number, newest id
    /// and flags of each
    pub(crate) fn give_away(&self) -> Vec<(u16, Option<u32>, ConfigFlags)> {
        // A verdict being sent by another thread must not read packets that the other process
        // would not know as orphans.
        self.state().is_given_away = true;
        let bindings = self.present_bindings();
        let given = bindings.iter().map(|binding| {
            self.end_here(binding.id);
            let newest = binding.outstanding().newest_if_known();
            (binding.id.queue, newest, binding.flags())
        });
        given.collect()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use nfqnl_proto::Verdict;
    use nfqnl_proto::consts::{NFQNL_MSG_PACKET, NFQNL_MSG_VERDICT_BATCH, message_type};

    use super::*;
    use crate::sys;

    /// A packet message of queue 7 with this id
    fn packet(id: u8) -> Vec<u8> {
        let kind = message_type(NFQNL_MSG_PACKET).to_ne_bytes();
        let header = [&32_u32.to_ne_bytes()[..], &kind, &[0; 10], &[2, 0, 0, 7]].concat();
        let attr = [11_u16.to_ne_bytes(), 1_u16.to_ne_bytes()].concat();
        [&header[..], &attr, &[0, 0, 0, id, 8, 0, 1, 0]].concat()
    }

    /// An engine over a socket that is not netlink, the other end, and a copy to fill the socket
    fn engine() -> (Engine, UnixDatagram, UnixDatagram) {
        let (here, kernel) = UnixDatagram::pair().unwrap();
        kernel.set_nonblocking(true).unwrap();
        let full = here.try_clone().unwrap();
        full.set_nonblocking(true).unwrap();
        let engine = Engine::new(sys::netlink_from(here.into()), true, true);
        (engine.unwrap(), kernel, full)
    }

    /// A merged verdict would answer the orphans too, with a verdict of other packets
    #[test]
    fn nothing_is_merged_until_orphans_are_answered() {
        let (engine, kernel, full) = engine();
        let orphans = PlainVerdict::new(Verdict::Drop);
        let binding = engine
            .adopt(7, None, ConfigFlags::empty(), orphans)
            .unwrap();
        let record = |id| engine.record_datagram(&mut engine.state(), &packet(id));
        let merges = || binding.outstanding().oldest(0).is_some();
        // The kernel has no memory for the message.
        while full.send(&[0; 16]).is_ok() {}
        record(5);
        assert!(!merges());
        let mut buf = [0; 64];
        while kernel.recv(&mut buf).is_ok() {}
        record(6);
        assert!(!merges(), "packets of an overrun may be unread");
        engine.found_empty(&mut engine.state());
        record(7);
        assert!(merges());
        assert_eq!(kernel.recv(&mut buf).unwrap(), 32);
        let kind = u16::from_ne_bytes([buf[4], buf[5]]);
        assert_eq!(kind, message_type(NFQNL_MSG_VERDICT_BATCH));
        assert_eq!(
            buf[28..32],
            [0, 0, 0, 4],
            "up to the packet before the first one"
        );
        assert!(kernel.recv(&mut buf).is_err(), "once");
        assert_eq!(engine.stats().missing_packets, 0);
        assert_eq!(engine.stats().packets, 3);
        assert!(binding.outstanding().merges());
    }

    /// The process before has read the report of the overrun, and not the packets behind it
    #[test]
    fn a_gap_at_an_adoption_is_explained() {
        let (engine, _kernel, _full) = engine();
        let orphans = PlainVerdict::new(Verdict::Accept);
        let binding = engine
            .adopt(7, Some(3), ConfigFlags::empty(), orphans)
            .unwrap();
        let record = |id| engine.record_datagram(&mut engine.state(), &packet(id));
        record(7);
        record(10);
        assert_eq!(engine.stats().missing_packets, 5);
        engine.found_empty(&mut engine.state());
        record(11);
        assert!(binding.outstanding().merges());
        record(13);
        assert!(!binding.outstanding().merges());
    }

    /// The kernel had no memory for the orphans' verdict when the first packet came
    #[test]
    fn only_older_packets_are_orphans() {
        let (engine, kernel, full) = engine();
        let orphans = PlainVerdict::new(Verdict::Drop);
        let adopt = |queue| {
            engine
                .adopt(queue, None, ConfigFlags::empty(), orphans)
                .unwrap()
        };
        let [binding, unseen] = [7, 8].map(adopt);
        while full.send(&[0; 16]).is_ok() {}
        engine.record_datagram(&mut engine.state(), &packet(5));
        let mut buf = [0; 64];
        while kernel.recv(&mut buf).is_ok() {}
        let mut sent = || {
            let mut ids = Vec::new();
            while kernel.recv(&mut buf).is_ok() {
                ids.push(u32::from_be_bytes(*buf[28..].first_chunk().unwrap()));
            }
            ids
        };
        engine.answer_all_orphans(&binding).unwrap();
        assert_eq!(sent(), [4]);
        engine.answer_all_orphans(&unseen).unwrap();
        assert_eq!(sent(), [u32::MAX / 2, u32::MAX, u32::MAX / 2]);
    }
}
