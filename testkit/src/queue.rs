//! Who has a queue, where nobody tells

use std::io;

use crate::netlink::{Message, NLM_F_ACK, nfgenmsg, transact};

const NFNL_SUBSYS_QUEUE: u16 = 3;
const NFQNL_MSG_CONFIG: u16 = 2;
const NFQA_CFG_MASK: u16 = 4;
const NFQA_CFG_FLAGS: u16 = 5;

/// Whether another socket has bound a queue, and set what it set in the same message
///
/// Asks for a change of no flags, which is refused to all but the queue's owner. Unlike the kernel's table in /proc, it
/// also answers root of a user namespace; to who has no `CAP_NET_ADMIN` it always says yes.
///
/// # Errors
/// What else the kernel says.
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
