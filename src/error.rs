//! Errors: the operation, the queue or packet, and the cause
//!
//! `Display` is one short line. `source()` is the operating system's error, and `Display` does not
//! repeat its text. Advice is in the documentation of the variants.

use std::fmt::{self, Write as _};
use std::io;

use nfqnl_proto::{ConfigFlags, DecodeError, EncodeError, Family, PacketKey, Reply};

/// The result of this crate's calls
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The failure of a call
///
/// `Debug` prints the text of `Display` and of the sources, because a `main` with an error prints
/// `Debug`.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel refused the request
    #[error(transparent)]
    Refused(
        /// The request and the cause
        #[from]
        Refusal,
    ),
    /// A system call failed
    ///
    /// * `EPROTONOSUPPORT` from opening: the kernel has no netfilter netlink. Load the module
    ///   nfnetlink_queue, or use a kernel with `CONFIG_NETFILTER_NETLINK_QUEUE`.
    /// * `EMFILE`: raise the process's limit of descriptors (`ulimit -n`).
    /// * `EMSGSIZE` from a verdict: it is longer than the send buffer. Raise `SO_SNDBUF` of the
    ///   descriptor, or `net.core.wmem_default` before the socket is opened.
    /// * `ENOBUFS` from a verdict: the kernel is out of memory. Try again.
    /// * `EACCES` from reading the counters: only root of the initial user namespace may read
    ///   them.
    /// * `ENOENT` from reading the counters: nfnetlink_queue is not loaded, or /proc is not
    ///   mounted, or /proc is mounted with `subset=pid`.
    #[error("{op}: {}", io_cause(*op, source))]
    #[non_exhaustive]
    Io {
        /// The operation
        op: Operation,
        /// The system's error
        source: io::Error,
    },
    /// The kernel's acknowledgement was lost: the socket's receive buffer was full, or other code
    /// received the acknowledgement and did not pass it on
    ///
    /// The kernel has most likely executed the request, and it is safe to repeat it. After a bind,
    /// the queue is unbound again. Other code is a receive call of the program itself, without
    /// [`Handle::handle_packet`](crate::Handle::handle_packet), or another process with the same
    /// socket.
    #[error("{op}: the acknowledgement was lost")]
    #[non_exhaustive]
    NoAck {
        /// The operation
        op: Operation,
    },
    /// This binding of the queue has ended: the queue was unbound or the socket closed
    ///
    /// The kernel has dropped the waiting packets, so nothing is left to answer. To change
    /// settings, bind the queue again.
    #[error("{op}: this binding of the queue has ended")]
    #[non_exhaustive]
    Unbound {
        /// The operation
        op: Operation,
    },
    /// A packet key or a batch belongs to another socket
    ///
    /// A socket accepts the keys of the packets it received, and
    /// keys from [`Queue::key`](crate::Queue::key). A key from `nfqnl::proto` belongs to no
    /// socket. A batch with events or unsent verdicts belongs to the socket that filled it.
    #[error("{op}: the key or the batch belongs to another socket")]
    #[non_exhaustive]
    WrongSocket {
        /// The operation
        op: Operation,
    },
    /// A callback called back into its own handle to receive
    #[error("receive: called by a callback of the same handle")]
    InCallback,
    /// A new payload for a truncated packet: the bytes that were not copied would be lost
    ///
    /// Raise the copy range.
    #[error("{}: only {had} of {needed} bytes were copied", Operation::Verdict(*key))]
    #[non_exhaustive]
    TruncatedPacket {
        /// The packet
        key: PacketKey,
        /// Its length
        needed: usize,
        /// The bytes that were copied
        had: usize,
    },
    /// A new payload of another length beside a change of the conntrack entry (allowed in UDP)
    ///
    /// The kernel would try to adjust TCP sequence numbers, which it can do only for connections
    /// with a helper. Change the entry with another packet of the connection, or set the mark of
    /// the packet ([`Verdict::with_mark`](crate::Verdict::with_mark)) and save it by a rule
    /// (`ct mark set mark`, `-j CONNMARK --save-mark`).
    #[error("{}: changes the packet's length and the conntrack entry", Operation::Verdict(*key))]
    #[non_exhaustive]
    ConntrackAndLength {
        /// The packet
        key: PacketKey,
    },
    /// A new payload shorter than its own network header, or, in a callback, shorter than the old
    /// packet's network header
    ///
    /// The packet still waits. Kernels before 5.10.135 and 5.18.16 crash on such a payload
    /// (CVE-2022-36946), and later ones drop the packet without a report. An answer by
    /// [`PacketKey`] is not compared with the old packet: the kernel drops the packet if the
    /// payload is shorter than the old network header with its options.
    #[error("{}: the payload has {had} bytes, its network header needs {needed}", Operation::Verdict(*key))]
    #[non_exhaustive]
    PayloadTooShort {
        /// The packet
        key: PacketKey,
        /// The minimum length
        needed: usize,
        /// The length given
        had: usize,
    },
    /// A message was longer than its receive buffer
    ///
    /// The packet still waits in the kernel, and its key can answer it. Use a larger buffer for
    /// later packets. A call for several packets returns only the first such error:
    /// [`Handle::on_event`](crate::Handle::on_event) gets all.
    #[error("receive: {}needs a buffer of {needed} bytes, had {had}", Of(*key))]
    #[non_exhaustive]
    BufferTooSmall {
        /// The packet, if the buffer has its id
        key: Option<PacketKey>,
        /// The length of the message
        needed: usize,
        /// The length of the buffer
        had: usize,
    },
    /// Bytes that are not messages of the queue subsystem
    ///
    /// A packet in these bytes still waits in the kernel, and its key can answer it.
    #[error("receive: {}malformed message", Of(*key))]
    #[non_exhaustive]
    Decode {
        /// The packet, if the bytes are a packet message up to its id
        key: Option<PacketKey>,
        /// The fault
        source: DecodeError,
    },
    /// The decision does not fit a netlink message
    #[error("{op}: does not fit a message")]
    #[non_exhaustive]
    Encode {
        /// The operation
        op: Operation,
        /// The fault
        source: EncodeError,
    },
    /// A rule, a chain or a table that cannot be
    #[cfg(feature = "rules")]
    #[error("{op}: {fault}")]
    #[non_exhaustive]
    InvalidRule {
        /// The operation
        op: Operation,
        /// The fault
        fault: crate::rules::RuleError,
    },
    /// The descriptor is not an `AF_NETLINK` socket of protocol `NETLINK_NETFILTER`
    #[error(
        "{}: not a netfilter netlink socket (domain {domain}, protocol {protocol})",
        Operation::Open
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
    /// Returns a wrapper for the failed system calls of this operation
    pub(crate) const fn io(op: Operation) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { op, source }
    }

    /// Returns the meaning of the kernel's refusal, if the kernel refused
    #[must_use]
    pub fn kind(&self) -> Option<ErrorKind> {
        match self {
            Self::Refused(refusal) => Some(refusal.kind()),
            _ => None,
        }
    }

    /// Returns the operating system's error number, if there is one
    #[must_use]
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Refused(refusal) => Some(refusal.errno()),
            Self::Io { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    /// Returns true if a verdict was not sent, and can be sent later
    pub(crate) const fn is_unsent(&self) -> bool {
        let op = match self {
            Self::Io { op, .. } | Self::WrongSocket { op } => op,
            _ => return false,
        };
        matches!(op, Operation::Verdict(_))
    }

    /// Returns true if a send failed because its messages were too long
    pub(crate) fn is_too_long(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.raw_os_error() == Some(libc::EMSGSIZE))
    }
}

/// Writes an error and its sources in one line
fn with_sources(error: &dyn std::error::Error, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    write!(f, "{error}")?;
    let mut source = error.source();
    while let Some(error) = source {
        write!(f, ": {error}")?;
        source = error.source();
    }
    Ok(())
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        with_sources(self, f)
    }
}

impl From<Error> for io::Error {
    /// Wraps the error; [`Error::raw_os_error`] returns its number
    fn from(error: Error) -> Self {
        let kind = error.raw_os_error().map_or(io::ErrorKind::Other, |errno| {
            Self::from_raw_os_error(errno).kind()
        });
        Self::new(kind, error)
    }
}

/// The operation that failed
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Operation {
    /// Opening the socket
    Open,
    /// Setting the receive buffer's size
    SetRecvBuffer,
    /// Reading the receive buffer's size
    GetRecvBuffer,
    /// Reading an interface's name: [`Socket::interface_name`](crate::Socket::interface_name)
    GetInterfaceName,
    /// Probing conntrack support: [`Socket::takes_conntrack`](crate::Socket::takes_conntrack)
    ProbeConntrack,
    /// Registering the descriptor with an asynchronous runtime
    Register,
    /// Binding a protocol family
    BindPf(Family),
    /// Unbinding a protocol family
    UnbindPf(Family),
    /// Binding a queue
    Bind(u16),
    /// Taking over a queue: [`Socket::adopt`](crate::Socket::adopt)
    Adopt(u16),
    /// Giving a socket away: [`Socket::into_fd`](crate::Socket::into_fd)
    HandOver,
    /// Unbinding a queue
    Unbind(u16),
    /// Setting a queue's copy mode
    SetMode(u16),
    /// Setting a queue's flags
    SetFlags(u16),
    /// Setting a queue's maximum length
    SetMaxlen(u16),
    /// Letting new packets pass by a queue
    PassBy(u16),
    /// Answering a packet
    Verdict(PacketKey),
    /// Answering all packets up to this one
    BatchVerdict(PacketKey),
    /// Waiting until all verdicts are executed
    Sync,
    /// Receiving
    Receive,
    /// Reading the kernel's counters
    ReadStats,
    /// Starting the thread of a queue: [`Workers`](crate::Workers)
    StartWorker(u16),
    /// Entering a network namespace: [`Netns`](crate::Netns)
    EnterNetns,
    /// Making a table of rules
    AddTable,
    /// Removing a table of rules
    RemoveTable,
    /// Making a chain of rules
    AddChain,
    /// Adding a rule
    AddRule,
    /// Removing the rules of a chain
    ClearRules,
    /// Replacing the rules of a chain
    ReplaceRules,
    /// Adding one of the new rules of a chain; the number is its index
    ReplaceRule(usize),
    /// Reading a rule's counter
    ReadCounter,
}

impl Operation {
    /// Returns the queue of the operation
    #[must_use]
    pub const fn queue(&self) -> Option<u16> {
        match *self {
            Self::Bind(queue)
            | Self::Adopt(queue)
            | Self::Unbind(queue)
            | Self::SetMode(queue)
            | Self::SetFlags(queue)
            | Self::SetMaxlen(queue)
            | Self::PassBy(queue)
            | Self::StartWorker(queue) => Some(queue),
            Self::Verdict(key) | Self::BatchVerdict(key) => Some(key.queue()),
            _ => None,
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open => f.write_str("open netfilter socket"),
            Self::SetRecvBuffer => f.write_str("set receive buffer"),
            Self::GetRecvBuffer => f.write_str("get receive buffer"),
            Self::GetInterfaceName => f.write_str("get interface name"),
            Self::ProbeConntrack => f.write_str("probe conntrack support"),
            Self::Register => f.write_str("register with the runtime"),
            Self::BindPf(family) => write!(f, "bind {family}"),
            Self::UnbindPf(family) => write!(f, "unbind {family}"),
            Self::Bind(queue) => write!(f, "bind queue {queue}"),
            Self::Adopt(queue) => write!(f, "adopt queue {queue}"),
            Self::HandOver => f.write_str("hand the socket over"),
            Self::Unbind(queue) => write!(f, "unbind queue {queue}"),
            Self::SetMode(queue) => write!(f, "set copy mode of queue {queue}"),
            Self::SetFlags(queue) => write!(f, "set flags of queue {queue}"),
            Self::SetMaxlen(queue) => write!(f, "set maximum length of queue {queue}"),
            Self::PassBy(queue) => write!(f, "let packets pass by queue {queue}"),
            Self::Verdict(key) => {
                write!(f, "verdict on packet {} of queue {}", key.id(), key.queue())
            }
            Self::BatchVerdict(key) => {
                let (id, queue) = (key.id(), key.queue());
                write!(f, "verdict on packets up to {id} of queue {queue}")
            }
            Self::Sync => f.write_str("sync"),
            Self::Receive => f.write_str("receive"),
            Self::ReadStats => f.write_str("read nfnetlink_queue counters"),
            Self::StartWorker(queue) => write!(f, "start worker of queue {queue}"),
            Self::EnterNetns => f.write_str("enter network namespace"),
            Self::AddTable => f.write_str("add table"),
            Self::RemoveTable => f.write_str("remove table"),
            Self::AddChain => f.write_str("add chain"),
            Self::AddRule => f.write_str("add rule"),
            Self::ClearRules => f.write_str("clear rules"),
            Self::ReplaceRules => f.write_str("replace rules"),
            Self::ReplaceRule(index) => write!(f, "replace rules: rule at index {index}"),
            Self::ReadCounter => f.write_str("read rule counter"),
        }
    }
}

/// The kernel's refusal of a request; `source()` is the OS error
pub struct Refusal {
    op: Operation,
    kind: ErrorKind,
    source: io::Error,
    text: Option<Box<str>>,
}

impl Refusal {
    pub(crate) fn new(op: Operation, reply: &Reply<'_>) -> Self {
        let text = reply.text.map(|text| String::from_utf8_lossy(text).into());
        Self {
            op,
            kind: ErrorKind::from_errno(reply.errno),
            source: io::Error::from_raw_os_error(reply.errno),
            text,
        }
    }

    /// Returns true if no orphan waited for its verdict
    pub(crate) fn is_of_orphans(&self) -> bool {
        matches!(self.op, Operation::BatchVerdict(key) if key.binding() == 0)
            && self.errno() == libc::ENOENT
    }

    /// Returns the kernel's answer to a second binding of a queue
    pub(crate) fn already_bound(op: Operation) -> Self {
        Self {
            op,
            kind: ErrorKind::AlreadyBound,
            source: io::Error::from_raw_os_error(libc::EBUSY),
            text: None,
        }
    }

    /// Returns the refusal with its actual cause
    pub(crate) const fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// Returns the refused operation
    #[must_use]
    pub const fn operation(&self) -> Operation {
        self.op
    }

    /// Returns the packet, if a verdict was refused
    #[must_use]
    pub const fn packet(&self) -> Option<PacketKey> {
        match self.op {
            Operation::Verdict(key) | Operation::BatchVerdict(key) => Some(key),
            _ => None,
        }
    }

    /// Returns the error number, in this machine's numbering; 524 is the kernel's internal
    /// `ENOTSUPP`
    #[must_use]
    pub fn errno(&self) -> i32 {
        self.source.raw_os_error().unwrap_or(0)
    }

    /// Returns the meaning of the error number for this operation
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Returns the kernel's own text (`NETLINK_EXT_ACK`), if there is one; since Linux 4.12
    #[must_use]
    pub fn kernel_text(&self) -> Option<&str> {
        self.text.as_deref()
    }
}

impl fmt::Debug for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        with_sources(self, f)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.op, self.kind) {
            (
                Operation::Verdict(_)
                | Operation::BatchVerdict(_)
                | Operation::AddTable
                | Operation::AddChain
                | Operation::AddRule
                | Operation::ReplaceRule(_),
                ErrorKind::Invalid,
            ) => {
                write!(f, "{}: the kernel refuses it as invalid", self.op)?;
            }
            (Operation::AddChain, ErrorKind::Unsupported) => {
                write!(
                    f,
                    "{}: unknown to this kernel, or it is at another place",
                    self.op
                )?;
            }
            (op, kind) => write!(f, "{op}: {kind}")?,
        }
        if let Some(text) = &self.text {
            f.write_str(" (kernel: ")?;
            // Replaces control characters, so the text stays on one line.
            let mut chars = text.chars();
            chars.try_for_each(|c| f.write_char(if c.is_control() { ' ' } else { c }))?;
            f.write_char(')')?;
        }
        Ok(())
    }
}

impl std::error::Error for Refusal {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// The meaning of the kernel's error numbers
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// `EPERM`: the thread lacks `CAP_NET_ADMIN` in the user namespace that owns the socket's
    /// network namespace
    ///
    /// Run as root, give the program the capability (`setcap cap_net_admin+ep PROGRAM`, `--cap-add
    /// NET_ADMIN` for a container, `AmbientCapabilities=CAP_NET_ADMIN` for a systemd unit), or use
    /// namespaces of its own (`unshare -Urn`). Every verdict needs it too. For a verdict, it is
    /// also possible that another socket has bound the queue in the meantime.
    NoCapability,
    /// `EPERM`: another socket has bound the queue
    #[non_exhaustive]
    QueueInUse {
        /// The port id of the other socket; the first netlink socket of a process has its process
        /// id as port id
        ///
        /// Absent if this process may not read the kernel's counters: only root of the initial user
        /// namespace may.
        owner: Option<u32>,
    },
    /// `EBUSY`: this socket has bound the queue already
    ///
    /// If a copy of the socket has unbound the queue since, drop the old
    /// [`Queue`](crate::Queue) first.
    AlreadyBound,
    /// `ENODEV`: the queue is not bound; for a verdict, the kernel has dropped the packet
    NotBound,
    /// `EINVAL`: for a request, the module nfnetlink_queue is not available
    ///
    /// For a verdict: STOLEN, which the kernel refuses from user space (the packet keeps waiting),
    /// or a link-layer header of another length (the kernel has dropped the packet).
    Invalid,
    /// The kernel does not support these flags; nothing was changed
    ///
    /// Before Linux 4.5 the kernel does not tell which flags these are, so the kind is
    /// [`Unsupported`](Self::Unsupported), and a refused bind leaves the queue bound until the
    /// socket is closed.
    ///
    /// `CONNTRACK` needs `CONFIG_NETFILTER_NETLINK_GLUE_CT`, `SECCTX` needs
    /// `CONFIG_NETWORK_SECMARK`. See
    /// [`QueueConfig::enable_if_supported`](crate::QueueConfig::enable_if_supported).
    UnsupportedFlags(ConfigFlags),
    /// `EOPNOTSUPP`, or 524 (`ENOTSUPP`) on some kernels
    Unsupported,
    /// `ENOENT`: the packet no longer waits: it was answered, or the kernel dropped it because its
    /// device went down, a base chain was deleted or the queue was unbound
    NoSuchPacket,
    /// `ENOBUFS`: from a receive call, the socket's receive buffer was full and messages were
    /// lost; otherwise the kernel is out of memory
    #[doc(alias = "ENOBUFS")]
    NoBuffers,
    /// `ENOMEM`
    OutOfMemory,
    /// `EPERM`, or `EOPNOTSUPP` before Linux 6.9: there is a table of this name already; another
    /// program owns it, or no program does
    TableInUse,
    /// `ERANGE`: an attribute of the request is too short for this kernel: a bug of this library
    OutOfRange,
    /// Any other number
    Other,
}

impl ErrorKind {
    /// The kernel's internal `ENOTSUPP`, which some versions return (`include/linux/errno.h`)
    pub(crate) const ENOTSUPP: i32 = 524;

    /// Returns the meaning of an OS error, for programs that receive on the descriptor themselves:
    /// there `ENOBUFS` reports lost packets
    #[must_use]
    pub fn of(error: &io::Error) -> Self {
        error.raw_os_error().map_or(Self::Other, Self::from_errno)
    }

    const fn from_errno(errno: i32) -> Self {
        match errno {
            libc::EPERM => Self::NoCapability,
            libc::EBUSY => Self::AlreadyBound,
            libc::ENODEV => Self::NotBound,
            libc::EINVAL => Self::Invalid,
            libc::EOPNOTSUPP | Self::ENOTSUPP => Self::Unsupported,
            libc::ENOENT => Self::NoSuchPacket,
            libc::ENOBUFS => Self::NoBuffers,
            libc::ENOMEM => Self::OutOfMemory,
            libc::ERANGE => Self::OutOfRange,
            _ => Self::Other,
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoCapability => "no CAP_NET_ADMIN in this network namespace",
            Self::QueueInUse { owner: Some(port) } => {
                return write!(f, "another socket has bound it (port id {port})");
            }
            Self::QueueInUse { owner: None } => "another socket has bound it",
            Self::AlreadyBound => "this socket has bound it already",
            Self::NotBound => "the queue is not bound",
            Self::Invalid => "invalid, or nfnetlink_queue is not available",
            Self::UnsupportedFlags(flags) => {
                f.write_str("the kernel does not support")?;
                let mut names = flags.iter_names();
                for (name, flag) in names.by_ref() {
                    let option = match flag {
                        ConfigFlags::CONNTRACK => " (CONFIG_NETFILTER_NETLINK_GLUE_CT)",
                        ConfigFlags::SECCTX => " (CONFIG_NETWORK_SECMARK)",
                        _ => "",
                    };
                    write!(f, " {name}{option}")?;
                }
                return match names.remaining().bits() {
                    0 => Ok(()),
                    unknown => write!(f, " {unknown:#x}"),
                };
            }
            Self::Unsupported => "unknown to this kernel",
            Self::NoSuchPacket => "the packet does not wait any more",
            Self::NoBuffers => "no buffer space",
            Self::OutOfMemory => "the kernel has no memory left",
            Self::TableInUse => "there is a table of this name",
            Self::OutOfRange => "an attribute is too short for this kernel",
            Self::Other => "refused by the kernel",
        })
    }
}

/// Returns the likely cause of a failed system call
fn io_cause(op: Operation, error: &io::Error) -> &'static str {
    match (error.raw_os_error(), op) {
        (Some(libc::EPROTONOSUPPORT), _) => "no netfilter netlink in this kernel",
        (Some(libc::EMFILE | libc::ENFILE), _) => "no file descriptor is left",
        (Some(libc::EMSGSIZE), _) => "longer than the send buffer",
        (Some(libc::ENOBUFS | libc::ENOMEM), _) => "the kernel has no memory left",
        (Some(libc::EPERM | libc::EACCES), Operation::ReadStats) => {
            "only root of the initial user namespace may"
        }
        (Some(libc::ENOENT), Operation::ReadStats) => "not available in /proc",
        (Some(libc::EPERM), Operation::EnterNetns) => "no CAP_SYS_ADMIN in its user namespace",
        (Some(libc::ENOENT), Operation::EnterNetns) => "no such namespace",
        _ => "system call failed",
    }
}

/// The packet of a message, if it is one
struct Of(Option<PacketKey>);

impl fmt::Display for Of {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(key) => write!(f, "packet {} of queue {}: ", key.id(), key.queue()),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
