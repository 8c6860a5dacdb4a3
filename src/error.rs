//! Errors as situations: what was tried, on which queue, what the kernel said, and what likely stands behind it

use std::fmt;
use std::io;
use std::time::Duration;

use nfqnl_proto::{CopyMode, DecodeError, EncodeError, Family, PacketKey, Reply};

/// The result of this crate's calls
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call failed
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel answered the request with an error
    #[error(transparent)]
    Refused(
        /// What was refused, and why
        #[from]
        Refusal,
    ),
    /// A system call failed
    #[error("{op}: {}", IoCause(source))]
    #[non_exhaustive]
    Io {
        /// What was being done
        op: Operation,
        /// What the system said
        source: io::Error,
    },
    /// The kernel's acknowledgement did not arrive: it was lost because the socket's receive buffer was full, or other
    /// code reads from the descriptor and does not pass on what it reads
    ///
    /// The request was most likely carried out. Asking again is safe; a queue whose binding ends so is given up.
    #[error(
        "{op}: no acknowledgement within {waited:?}: lost in an overrun of the receive buffer, or read by other code \
         and not passed to handle_packet; try again, or raise the receive buffer"
    )]
    #[non_exhaustive]
    NoAck {
        /// What was asked for
        op: Operation,
        /// How long the call waited
        waited: Duration,
    },
    /// The packet belongs to a binding of its queue that has ended: the kernel dropped it then, and its id may by now
    /// be another packet's; or its key is not from this handle
    #[error(
        "verdict on packet {} of queue {}: not a packet of a queue that this handle has bound now; if its binding has \
         ended, the kernel has dropped it", key.id, key.queue
    )]
    #[non_exhaustive]
    Stale {
        /// The key that was used
        key: PacketKey,
    },
    /// This binding of the queue has ended: its handle is closed, or the queue was unbound through a copy of the
    /// descriptor and has been bound anew
    #[error(
        "{op}: this binding of the queue has ended, with its handle or through another descriptor"
    )]
    #[non_exhaustive]
    Ended {
        /// What was asked for
        op: Operation,
    },
    /// A length limit of 0
    #[error("maximum length 0 for queue {queue}: the kernel would accept it and drop every packet")]
    #[non_exhaustive]
    ZeroMaxlen {
        /// The queue
        queue: u16,
    },
    /// A copy mode that the kernel does not know
    #[error("copy {mode} for queue {queue}: the kernel would acknowledge it and change nothing")]
    #[non_exhaustive]
    UnknownCopyMode {
        /// The queue
        queue: u16,
        /// The mode
        mode: CopyMode,
    },
    /// A new payload for a packet of which only the beginning was sent: the rest would be cut off
    #[error(
        "replacing packet {} of queue {}: only {had} of its {needed} bytes were copied, the rest would be lost; \
         raise the copy range", key.id, key.queue
    )]
    #[non_exhaustive]
    CutPacket {
        /// The packet
        key: PacketKey,
        /// Its length
        needed: usize,
        /// What the kernel sent of it
        had: usize,
    },
    /// A new payload that is shorter than its own network header
    ///
    /// Kernels before 5.10.135 and 5.18.16 crash on it (CVE-2022-36946).
    #[error("new payload of {had} bytes: its network header alone takes {needed}")]
    #[non_exhaustive]
    PayloadTooShort {
        /// The least length
        needed: usize,
        /// The length given
        had: usize,
    },
    /// A datagram that was given to `handle_packet` is not whole: the buffer that it was received into was too small
    ///
    /// The packet still waits in the kernel, and can be answered by its key.
    #[error(
        "datagram of {needed} bytes was cut to {had}: receive into a buffer of at least {needed} bytes"
    )]
    #[non_exhaustive]
    Truncated {
        /// The packet, if its id is among what was received
        key: Option<PacketKey>,
        /// The length of the whole message
        needed: usize,
        /// What was received of it
        had: usize,
    },
    /// The bytes given to `handle_packet` are no netlink messages of the queue subsystem
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The decision does not fit a netlink message
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// A descriptor that is no netfilter netlink socket
    #[error(
        "descriptor is no AF_NETLINK socket of protocol NETLINK_NETFILTER (domain {domain}, protocol {protocol})"
    )]
    #[non_exhaustive]
    NotNetfilter {
        /// Its `SO_DOMAIN`
        domain: i32,
        /// Its `SO_PROTOCOL`
        protocol: i32,
    },
}

impl Error {
    /// Whether a send failed for the length of what was sent
    pub(crate) fn is_too_long(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.raw_os_error() == Some(libc::EMSGSIZE))
    }
}

/// What was being done when an error came
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Operation {
    /// Opening the socket
    Open,
    /// Setting the receive buffer's size
    SetRecvBuffer,
    /// Reading the receive buffer's size
    GetRecvBuffer,
    /// Switching between blocking and non-blocking
    SetNonblocking,
    /// Registering the descriptor with an asynchronous runtime
    Register,
    /// Binding a protocol family
    BindPf(Family),
    /// Unbinding a protocol family
    UnbindPf(Family),
    /// Binding a queue
    Bind(u16),
    /// Unbinding a queue
    Unbind(u16),
    /// Setting a queue's copy mode
    SetMode(u16),
    /// Setting a queue's flags
    SetFlags(u16),
    /// Setting a queue's length limit
    SetMaxlen(u16),
    /// Answering a packet
    Verdict(PacketKey),
    /// Answering a run of packets, of which this is the last
    BatchVerdict(PacketKey),
    /// Waiting until all verdicts are processed
    Sync,
    /// Receiving
    Receive,
    /// Reading the kernel's counters
    ReadStats,
}

impl Operation {
    /// The queue that it is about
    #[must_use]
    pub const fn queue(&self) -> Option<u16> {
        match *self {
            Self::Bind(queue)
            | Self::Unbind(queue)
            | Self::SetMode(queue)
            | Self::SetFlags(queue)
            | Self::SetMaxlen(queue) => Some(queue),
            Self::Verdict(key) | Self::BatchVerdict(key) => Some(key.queue),
            _ => None,
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open => f.write_str("open netfilter socket"),
            Self::SetRecvBuffer => f.write_str("set receive buffer"),
            Self::GetRecvBuffer => f.write_str("read the receive buffer's size"),
            Self::SetNonblocking => f.write_str("set non-blocking"),
            Self::Register => f.write_str("register with the runtime"),
            Self::BindPf(family) => write!(f, "bind {family}"),
            Self::UnbindPf(family) => write!(f, "unbind {family}"),
            Self::Bind(queue) => write!(f, "bind queue {queue}"),
            Self::Unbind(queue) => write!(f, "unbind queue {queue}"),
            Self::SetMode(queue) => write!(f, "set copy mode of queue {queue}"),
            Self::SetFlags(queue) => write!(f, "set flags of queue {queue}"),
            Self::SetMaxlen(queue) => write!(f, "set maximum length of queue {queue}"),
            Self::Verdict(key) => write!(f, "verdict on packet {} of queue {}", key.id, key.queue),
            Self::BatchVerdict(key) => {
                write!(
                    f,
                    "verdict on all packets up to {} of queue {}",
                    key.id, key.queue
                )
            }
            Self::Sync => f.write_str("sync"),
            Self::Receive => f.write_str("receive"),
            Self::ReadStats => f.write_str("read /proc/thread-self/net/netfilter/nfnetlink_queue"),
        }
    }
}

/// The kernel's refusal of a request; `source()` is the OS error
#[derive(Debug)]
pub struct Refusal {
    op: Operation,
    source: io::Error,
    text: Option<Box<str>>,
}

impl Refusal {
    pub(crate) fn new(op: Operation, reply: &Reply<'_>) -> Self {
        let text = reply.text.map(|text| String::from_utf8_lossy(text).into());
        Self {
            op,
            source: io::Error::from_raw_os_error(reply.errno),
            text,
        }
    }

    /// What the kernel would answer
    pub(crate) fn already_bound(op: Operation) -> Self {
        Self {
            op,
            source: io::Error::from_raw_os_error(libc::EBUSY),
            text: None,
        }
    }

    /// What was refused
    #[must_use]
    pub const fn operation(&self) -> Operation {
        self.op
    }

    /// The packet, if a verdict was refused
    #[must_use]
    pub const fn packet(&self) -> Option<PacketKey> {
        match self.op {
            Operation::Verdict(key) | Operation::BatchVerdict(key) => Some(key),
            _ => None,
        }
    }

    /// The error number, as this machine's `errno` counts; 524 is the kernel's own `ENOTSUPP`
    #[must_use]
    pub fn errno(&self) -> i32 {
        self.source.raw_os_error().unwrap_or(0)
    }

    /// What the error number means here
    #[must_use]
    pub fn situation(&self) -> Situation {
        Situation::of(&self.source)
    }

    /// The kernel's own words (`NETLINK_EXT_ACK`), where it has any
    #[must_use]
    pub fn kernel_text(&self) -> Option<&str> {
        self.text.as_deref()
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let situation = self.situation();
        write!(f, "{}: {}", self.op, situation.cause(self.op))?;
        if situation == Situation::Other {
            write!(f, " ({})", self.source)?;
        }
        match &self.text {
            Some(text) => write!(f, "; the kernel says: {text}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Refusal {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// The kernel's error numbers as situations
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Situation {
    /// `EPERM`: no `CAP_NET_ADMIN` in the socket's network namespace, or another socket owns the queue
    NotPermitted,
    /// `EBUSY`: this handle has bound the queue already
    AlreadyBound,
    /// `ENODEV`: the queue is not bound
    NotBound,
    /// `EINVAL`
    Invalid,
    /// `EOPNOTSUPP`, or 524 (`ENOTSUPP`) on some kernels
    Unsupported,
    /// `ENOENT`: the packet does not wait, or not any more
    NoSuchPacket,
    /// `ENOBUFS`: from a receive call, that the socket's receive buffer was full and messages were lost; otherwise
    /// that the kernel is out of memory
    #[doc(alias = "ENOBUFS")]
    NoBuffers,
    /// `ENOMEM`
    OutOfMemory,
    /// `ERANGE`: an attribute of the request is too short for this kernel
    OutOfRange,
    /// Any other number
    Other,
}

/// The kernel's internal `ENOTSUPP`, which some versions let out (`include/linux/errno.h`)
const ENOTSUPP: i32 = 524;

impl Situation {
    /// What an OS error means in this field, for callers who receive on the descriptor themselves: `ENOBUFS` there
    /// means that packets were lost
    #[must_use]
    pub fn of(error: &io::Error) -> Self {
        error.raw_os_error().map_or(Self::Other, Self::from_errno)
    }

    fn from_errno(errno: i32) -> Self {
        match errno {
            libc::EPERM => Self::NotPermitted,
            libc::EBUSY => Self::AlreadyBound,
            libc::ENODEV => Self::NotBound,
            libc::EINVAL => Self::Invalid,
            libc::EOPNOTSUPP | ENOTSUPP => Self::Unsupported,
            libc::ENOENT => Self::NoSuchPacket,
            libc::ENOBUFS => Self::NoBuffers,
            libc::ENOMEM => Self::OutOfMemory,
            libc::ERANGE => Self::OutOfRange,
            _ => Self::Other,
        }
    }

    /// The likely causes, in words
    fn cause(self, op: Operation) -> &'static str {
        match (self, op) {
            (Self::NotPermitted, Operation::Verdict(_) | Operation::BatchVerdict(_)) => {
                "not permitted (EPERM): the process has dropped CAP_NET_ADMIN, which every verdict needs, or another \
                 socket owns the queue"
            }
            (Self::NotPermitted, _) => {
                "not permitted (EPERM): no CAP_NET_ADMIN in this network namespace, or another process (or another \
                 handle) owns the queue"
            }
            (Self::AlreadyBound, _) => "already bound by this handle (EBUSY)",
            (Self::NotBound, _) => {
                "the queue is not bound (ENODEV): it was unbound through another descriptor"
            }
            (Self::Invalid, Operation::Verdict(_) | Operation::BatchVerdict(_)) => {
                "invalid (EINVAL): STOLEN, which the kernel refuses from user space, or a link-layer header of \
                 another length; with STOLEN the packet goes on waiting"
            }
            (Self::Invalid, Operation::SetFlags(_) | Operation::Bind(_)) => {
                "invalid (EINVAL): a flag this kernel does not know, or nfnetlink_queue is not available"
            }
            (Self::Invalid, _) => {
                "invalid (EINVAL): nfnetlink_queue is not available in this kernel"
            }
            (Self::Unsupported, Operation::SetFlags(_) | Operation::Bind(_)) => {
                "not supported (EOPNOTSUPP): a flag this kernel does not know or was built without (CONNTRACK needs \
                 nf_conntrack_netlink, SECCTX needs NETWORK_SECMARK)"
            }
            (Self::Unsupported, _) => "not supported by this kernel (EOPNOTSUPP)",
            (Self::NoSuchPacket, _) => {
                "no such packet (ENOENT): answered already, or dropped by the kernel because its device went down, a \
                 base chain was deleted or the queue was unbound"
            }
            (Self::NoBuffers, _) => "the kernel is out of memory (ENOBUFS)",
            (Self::OutOfMemory, _) => "the kernel is out of memory (ENOMEM)",
            (Self::OutOfRange, _) => {
                "an attribute is too short for this kernel (ERANGE): please report it as a bug of this library"
            }
            (Self::Other, _) => "refused by the kernel",
        }
    }
}

/// What a failed system call likely means
struct IoCause<'e>(&'e io::Error);

impl fmt::Display for IoCause<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0.raw_os_error() {
            Some(libc::EPROTONOSUPPORT) => "this kernel has no netfilter netlink (EPROTONOSUPPORT)",
            Some(libc::EMFILE | libc::ENFILE) => "no file descriptors left",
            Some(libc::EMSGSIZE) => "longer than the socket's send buffer (EMSGSIZE)",
            Some(libc::ENOBUFS | libc::ENOMEM) => "out of memory",
            Some(libc::EPERM | libc::EACCES) => "not permitted",
            Some(libc::EAGAIN) => "would block",
            _ => return self.0.fmt(f),
        })
    }
}
