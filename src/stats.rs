//! Counters: the library's own, and the kernel's per queue

use std::fmt;
use std::io;

use nfqnl_proto::CopyMode;

use crate::error::{Error, Operation, Result};

/// What a handle has counted since it was opened
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Stats {
    /// Packets received; all but the `discarded` ones are handed on
    pub packets: u64,
    /// Packets that the kernel numbered and could not send, because the receive buffer was full: gaps in the ids, which
    /// the next packet shows. They were dropped, or with [`ConfigFlags::FAIL_OPEN`](crate::ConfigFlags::FAIL_OPEN)
    /// accepted
    pub lost_packets: u64,
    /// How often the kernel reported an overrun (`ENOBUFS`) to this library; not to the caller's own receive call
    pub overruns: u64,
    /// Verdicts that the kernel refused
    pub refused_verdicts: u64,
    /// Messages that were longer than their buffer
    pub truncated: u64,
    /// Messages that could not be decoded
    pub malformed: u64,
    /// Packets of queues that were unbound before they could be handed on; the kernel drops them with the queue. Also
    /// those of a queue that is not this handle's ([`HandleBuilder::open_fd`](crate::HandleBuilder::open_fd))
    pub discarded: u64,
    /// Packets given to `handle_packet` whose queue has no callback; they go on waiting
    pub unclaimed: u64,
    /// Datagrams that another process sent to the socket; they are thrown away
    pub foreign: u64,
}

impl Stats {
    pub(crate) fn discard(&mut self, packets: usize) {
        self.discarded += u64::try_from(packets).unwrap_or(u64::MAX);
    }
}

/// The kernel's counters of one queue, a line of `/proc/net/netfilter/nfnetlink_queue`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct QueueStats {
    /// The queue's number
    pub queue: u16,
    /// Port id of the socket that owns it
    pub port_id: u32,
    /// How many packets wait
    pub waiting: u32,
    /// What is copied of each
    pub copy_mode: CopyMode,
    /// Up to how many bytes
    pub copy_range: u32,
    /// Packets dropped because the queue was full
    pub queue_dropped: u32,
    /// Packets dropped because the socket's receive buffer was full
    pub user_dropped: u32,
    /// The id of the newest packet
    pub last_id: u32,
}

impl QueueStats {
    /// Reads the counters of all queues in the calling thread's network namespace, whoever owns them
    ///
    /// # Errors
    /// The file is readable by the initial user namespace's root alone; elsewhere the error is
    /// [`PermissionDenied`](io::ErrorKind::PermissionDenied).
    pub fn read_all() -> Result<Vec<Self>> {
        let text = std::fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_queue")
            .map_err(|source| Error::Io {
                op: Operation::ReadStats,
                source,
            })?;
        text.lines()
            .map(|line| {
                Self::parse(line).ok_or_else(|| Error::Io {
                    op: Operation::ReadStats,
                    source: io::ErrorKind::InvalidData.into(),
                })
            })
            .collect()
    }

    /// Reads one queue's counters; `None` if nobody has bound it
    ///
    /// # Errors
    /// As [`read_all`](Self::read_all).
    pub fn read(queue: u16) -> Result<Option<Self>> {
        Ok(Self::read_all()?
            .into_iter()
            .find(|stats| stats.queue == queue))
    }

    /// `seq_show` in the kernel's `nfnetlink_queue.c`; its columns widen when numbers do
    fn parse(line: &str) -> Option<Self> {
        let mut columns = line.split_ascii_whitespace();
        let mut column = || columns.next()?.parse::<u32>().ok();
        Some(Self {
            queue: column()?.try_into().ok()?,
            port_id: column()?,
            waiting: column()?,
            copy_mode: CopyMode(column()?.try_into().ok()?),
            copy_range: column()?,
            queue_dropped: column()?,
            user_dropped: column()?,
            last_id: column()?,
        })
    }
}

impl fmt::Display for QueueStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "queue {}: {} waiting, {} dropped by a full queue, {} by a full socket, last id {}",
            self.queue, self.waiting, self.queue_dropped, self.user_dropped, self.last_id
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_proc_is_split_by_its_spaces() {
        let stats =
            QueueStats::parse("    7 3989895615   12 2 65531     3    4       90  1").unwrap();
        assert_eq!(
            (stats.queue, stats.port_id, stats.waiting),
            (7, 3_989_895_615, 12)
        );
        assert_eq!(
            (stats.copy_mode, stats.copy_range),
            (CopyMode::PACKET, 65531)
        );
        assert_eq!(
            (stats.queue_dropped, stats.user_dropped, stats.last_id),
            (3, 4, 90)
        );
        assert!(QueueStats::parse("    7 12").is_none());
        assert!(
            QueueStats::parse("70000 12 1 2 3 4 5 6 1").is_none(),
            "no queue number"
        );
    }
}
