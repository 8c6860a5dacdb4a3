//! A check for bound queues, without /proc

use std::io;

use crate::netlink::{Message, NLM_F_ACK, nfgenmsg, transact};

const NFNL_SUBSYS_QUEUE: u16 = 3;
const NFQNL_MSG_CONFIG: u16 = 2;
const NFQA_CFG_MASK: u16 = 4;
const NFQA_CFG_FLAGS: u16 = 5;

/// Returns whether another socket has bound a queue
///
/// The request changes no flag, and the kernel refuses it to all sockets except the queue's
/// owner. Unlike the kernel's table in /proc, this also works for root of a user namespace.
/// Without `CAP_NET_ADMIN` the result is always true. A bound queue also has the settings from
/// the binding message.
///
/// # Errors
/// The kernel's other errors.
pub fn is_bound(queue: u16) -> io::Result<bool> {
    let mut message = Message::new(
        NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_CONFIG,
        NLM_F_ACK,
        &nfgenmsg(0, queue),
    );
    for kind in [NFQA_CFG_MASK, NFQA_CFG_FLAGS] {
        message.attr(kind, &[0; 4]);
    }
    match transact(libc::NETLINK_NETFILTER, vec![message]) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(false),
        result => result.map(|()| true),
    }
}
