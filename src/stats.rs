//! Counters: the library's own, and the kernel's per queue

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

use nfqnl_proto::CopyMode;

use crate::error::{Error, Operation, Result};
use crate::netns::Netns;

/// The counters of a [`Socket`](crate::Socket)
///
/// The kernel counts packets dropped by a full queue ([`QueueStats::queue_dropped`]). Two kinds of
/// packets are not counted: waiting packets dropped because their queue is unbound, their device
/// goes down or a base chain is deleted, and packets of a queue in [`CopyMode::None`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Stats {
    /// Packets received; each one becomes an event, unless [`after_unbind`](Self::after_unbind)
    /// counts it
    pub packets: u64,
    /// Packets received and not answered, of all queues
    /// ([`Queue::waiting`](crate::Queue::waiting))
    pub waiting: u64,
    /// Packets with an id from the kernel that this socket did not receive: id gaps, counted at
    /// the next packet
    ///
    /// There are three causes: the receive buffer was full, more than 65,536 packets waited in the
    /// queue, or another process received the packets from the same socket. In the first two cases
    /// the kernel dropped the packets, or accepted them with
    /// [`ConfigFlags::FAIL_OPEN`](crate::ConfigFlags::FAIL_OPEN).
    pub missing_packets: u64,
    /// Overruns (`ENOBUFS`) reported by the kernel to this library's receive calls
    pub overruns: u64,
    /// Verdicts refused by the kernel
    pub refused_verdicts: u64,
    /// Verdicts not sent because their queue was unbound, and their packets were dropped
    pub late_verdicts: u64,
    /// Packets of queues that this socket has not bound, or has unbound. The kernel drops them when
    /// the queue is unbound, if it was not yet
    pub after_unbind: u64,
    /// Packets that reached no callback of a [`Handle`](crate::Handle), and keep waiting: of
    /// queues without a callback, longer than the buffer, or malformed
    pub no_callback: u64,
    /// Datagrams from other processes, sent before the socket was connected; they were dropped
    pub from_other_process: u64,
    /// Bindings for which merging of verdicts has ended ([`SendBatch`](crate::SendBatch))
    pub merging_ended: u64,
}

impl std::iter::Sum for Stats {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, stats| Self {
            packets: sum.packets + stats.packets,
            waiting: sum.waiting + stats.waiting,
            missing_packets: sum.missing_packets + stats.missing_packets,
            overruns: sum.overruns + stats.overruns,
            refused_verdicts: sum.refused_verdicts + stats.refused_verdicts,
            late_verdicts: sum.late_verdicts + stats.late_verdicts,
            after_unbind: sum.after_unbind + stats.after_unbind,
            no_callback: sum.no_callback + stats.no_callback,
            from_other_process: sum.from_other_process + stats.from_other_process,
            merging_ended: sum.merging_ended + stats.merging_ended,
        })
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} packets, {} waiting, {} missing, {} overruns, {} verdicts refused",
            self.packets, self.waiting, self.missing_packets, self.overruns, self.refused_verdicts
        )
    }
}

/// The kernel's counters of one queue, a line of `/proc/net/netfilter/nfnetlink_queue`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct QueueStats {
    /// The queue's number
    pub queue: u16,
    /// The port id of the socket that owns the queue
    pub port_id: u32,
    /// Waiting packets
    pub waiting: u32,
    /// The copied part of each packet
    pub copy_mode: CopyMode,
    /// The maximum number of copied bytes
    pub copy_range: u32,
    /// Packets dropped because the queue was full
    pub queue_dropped: u32,
    /// Packets dropped because the socket's receive buffer was full
    pub user_dropped: u32,
    /// The id of the newest packet
    pub last_id: u32,
}

impl QueueStats {
    /// Reads the counters of all queues in the calling thread's network namespace
    ///
    /// Since Linux 3.17.
    ///
    /// # Errors
    /// [`Error::Io`]: only root of the initial user namespace may read the file; the error of
    /// other users is [`PermissionDenied`](io::ErrorKind::PermissionDenied).
    pub fn read_all() -> Result<Vec<Self>> {
        let failed = Error::io(Operation::ReadStats);
        let text = std::fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_queue");
        text.map_err(&failed)?
            .lines()
            .map(|line| Self::parse(line).ok_or_else(|| failed(io::ErrorKind::InvalidData.into())))
            .collect()
    }

    /// Reads the counters of a queue in the network namespace of a socket
    pub(crate) fn read_of(socket: BorrowedFd<'_>, queue: u16) -> Result<Option<Self>> {
        let read = Netns::of_socket(socket)?.enter(|| Self::read(queue));
        read.map_err(Error::io(Operation::ReadStats))?
    }

    /// Reads one queue's counters; `None` if no socket has bound it
    ///
    /// # Errors
    /// As [`read_all`](Self::read_all).
    pub fn read(queue: u16) -> Result<Option<Self>> {
        let all = Self::read_all()?;
        Ok(all.into_iter().find(|stats| stats.queue == queue))
    }

    /// Parses a line of `seq_show` in the kernel's `nfnetlink_queue.c`; columns grow with the
    /// numbers
    fn parse(line: &str) -> Option<Self> {
        let mut columns = line.split_ascii_whitespace();
        let mut column = || columns.next()?.parse::<u32>().ok();
        Some(Self {
            queue: column()?.try_into().ok()?,
            port_id: column()?,
            waiting: column()?,
            copy_mode: CopyMode::from_raw(column()?.try_into().ok()?)?,
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
    fn a_line_of_proc_is_split_at_spaces() {
        let stats =
            QueueStats::parse("    7 3989895615   12 2 65531     3    4       90  1").unwrap();
        assert_eq!(
            (stats.queue, stats.port_id, stats.waiting),
            (7, 3_989_895_615, 12)
        );
        assert_eq!(
            (stats.copy_mode, stats.copy_range),
            (CopyMode::Packet, 65531)
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
