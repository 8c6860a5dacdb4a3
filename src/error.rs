//! Errors as situations: what was tried, on which queue, what the kernel said, and what likely stands behind it

use std::fmt::{self, Write as _};
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
    #[error("{op}: {}", IoCause(*op, source))]
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
    /// The request was most likely carried out. Asking again is safe. A queue that was to be bound is given up then, unless
    /// this handle had it: that binding goes on.
    #[error(
        "{op}: no acknowledgement within {waited:?}: lost in an overrun of the receive buffer, or read by other code \
         and not passed to handle_packet; try again, and raise the receive buffer"
    )]
    #[non_exhaustive]
    NoAck {
        /// What was asked for
        op: Operation,
        /// How long the call waited, without the time in which this process did not run
        waited: Duration,
    },
    /// The packet belongs to a binding of its queue that has ended: the kernel dropped it then, and its id may by now
    /// be another packet's; or its key is not from this handle
    #[error(
        "{}: not a packet of a queue that this handle has bound now; if its binding has ended, the kernel has dropped it, \
         and nothing is left to answer", Operation::Verdict(*key)
    )]
    #[non_exhaustive]
    Stale {
        /// The key that was used
        key: PacketKey,
    },
    /// This binding of the queue has ended: its handle is closed, or the queue was unbound through a copy of the
    /// descriptor and has been bound anew
    #[error(
        "{op}: this binding of the queue has ended, with its handle or through another descriptor; bind it again"
    )]
    #[non_exhaustive]
    Ended {
        /// What was asked for
        op: Operation,
    },
    /// A length limit of 0
    #[error(
        "maximum length 0 for queue {queue}: the kernel would accept it and drop every packet; set 1 or more"
    )]
    #[non_exhaustive]
    ZeroMaxlen {
        /// The queue
        queue: u16,
    },
    /// A copy mode that the kernel does not know
    #[error(
        "copy {mode} for queue {queue}: the kernel would acknowledge it and change nothing; set none, meta or packet"
    )]
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
    #[error(
        "{}: new payload of {had} bytes, its network header alone takes {needed}", Operation::Verdict(*key)
    )]
    #[non_exhaustive]
    PayloadTooShort {
        /// The packet
        key: PacketKey,
        /// The least length
        needed: usize,
        /// The length given
        had: usize,
    },
    /// A datagram that was given to `handle_packet` is not whole: the buffer that it was received into was too small
    ///
    /// The packet still waits in the kernel, and can be answered by its key.
    #[error(
        "receive: {}message of {needed} bytes was cut to {had}: receive into a buffer of at least {needed} bytes",
        Whose(*key)
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
    ///
    /// If they are of a packet, it still waits in the kernel, and can be answered by its key.
    #[error("receive: {}{source}", Whose(*key))]
    #[non_exhaustive]
    Decode {
        /// The packet, if they are a packet message as far as its id
        key: Option<PacketKey>,
        /// What is wrong with them
        source: DecodeError,
    },
    /// The decision does not fit a netlink message
    #[error("{op}: {source}")]
    #[non_exhaustive]
    Encode {
        /// What was to be sent
        op: Operation,
        /// What does not fit
        source: EncodeError,
    },
    /// A descriptor that is no netfilter netlink socket
    #[error(
        "{}: the descriptor is no AF_NETLINK socket of protocol NETLINK_NETFILTER (domain {domain}, protocol {protocol})",
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
///
/// `Debug` has the words of `Display`, since they are what a `main` that returns an error prints.
pub struct Refusal {
    op: Operation,
    source: io::Error,
    text: Option<Box<str>>,
}

impl fmt::Debug for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Refusal")
            .field(&format_args!("{self}"))
            .finish()
    }
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
        let Some(text) = &self.text else {
            return Ok(());
        };
        f.write_str("; the kernel says: ")?;
        // One line, whatever it says
        let mut chars = text.chars();
        chars.try_for_each(|c| f.write_char(if c.is_control() { ' ' } else { c }))
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

    /// The likely causes, in words, and what to do
    fn cause(self, op: Operation) -> &'static str {
        use Operation as Op;
        match (self, op) {
            (Self::NotPermitted, Op::Verdict(_) | Op::BatchVerdict(_)) => {
                "not permitted (EPERM): the thread that sent it has no CAP_NET_ADMIN, which every verdict takes, or \
                 another socket has the queue now; with the capability, answer the packet again"
            }
            (Self::NotPermitted, _) if op.queue().is_none() => {
                "not permitted (EPERM): no CAP_NET_ADMIN over this network namespace; run as root, or give the program \
                 the capability (setcap cap_net_admin+ep)"
            }
            (Self::NotPermitted, _) => {
                "not permitted (EPERM): no CAP_NET_ADMIN over this network namespace (run as root, or give the program \
                 the capability by setcap cap_net_admin+ep), or another process or handle has the queue (the second \
                 column of /proc/net/netfilter/nfnetlink_queue is most often its pid)"
            }
            (Self::AlreadyBound, _) => {
                "already bound on this socket (EBUSY): go on with the Queue that has it, or destroy that first"
            }
            (Self::NotBound, Op::Verdict(_) | Op::BatchVerdict(_)) => {
                "the queue is not bound any more (ENODEV): the kernel has dropped the packet, and nothing is left to answer"
            }
            (Self::NotBound, _) => {
                "the queue is not bound (ENODEV): it was unbound through another descriptor; bind it again"
            }
            (Self::Invalid, Op::Verdict(_) | Op::BatchVerdict(_)) => {
                "invalid (EINVAL): STOLEN, which the kernel refuses from user space, or a link-layer header of \
                 another length; with STOLEN the packet goes on waiting"
            }
            (Self::Invalid, Op::SetFlags(_) | Op::Bind(_)) => {
                "invalid (EINVAL): a flag that this kernel does not know (ask for fewer), or nfnetlink_queue is not \
                 available (modprobe nfnetlink_queue)"
            }
            (Self::Invalid, _) => {
                "invalid (EINVAL): nfnetlink_queue is not available in this kernel (modprobe nfnetlink_queue)"
            }
            (Self::Unsupported, Op::SetFlags(_) | Op::Bind(_)) => {
                "not supported (EOPNOTSUPP): a flag that this kernel does not know or was built without (CONNTRACK needs \
                 nf_conntrack_netlink, SECCTX needs NETWORK_SECMARK); ask for fewer flags"
            }
            (Self::Unsupported, _) => "not supported by this kernel (EOPNOTSUPP)",
            (Self::NoSuchPacket, _) => {
                "no such packet (ENOENT): answered already, or dropped by the kernel because its device went down, a \
                 base chain was deleted or the queue was unbound; nothing is left to answer"
            }
            (Self::NoBuffers, _) => "the kernel is out of memory (ENOBUFS); try again",
            (Self::OutOfMemory, _) => "the kernel is out of memory (ENOMEM); try again",
            (Self::OutOfRange, _) => {
                "an attribute is too short for this kernel (ERANGE): please report it as a bug of this library"
            }
            (Self::Other, _) => "refused by the kernel",
        }
    }
}

/// What a failed system call likely means, and what to do
struct IoCause<'e>(Operation, &'e io::Error);

impl fmt::Display for IoCause<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(op, error) = self;
        f.write_str(match (error.raw_os_error(), op) {
            (Some(libc::EPROTONOSUPPORT), _) => {
                "this kernel has no netfilter netlink (EPROTONOSUPPORT): modprobe nfnetlink_queue, or take a kernel that \
                 has it (CONFIG_NETFILTER_NETLINK_QUEUE)"
            }
            (Some(libc::EMFILE), _) => {
                "no file descriptor is left to this process (EMFILE): raise its limit (ulimit -n), or close some"
            }
            (Some(libc::ENFILE), _) => {
                "no file descriptor is left in the system (ENFILE): raise fs.file-max"
            }
            (Some(libc::EMSGSIZE), _) => {
                "longer than the socket's send buffer (EMSGSIZE): raise it (SO_SNDBUF of the descriptor, or \
                 net.core.wmem_default before it is opened)"
            }
            (Some(libc::ENOBUFS), _) => "the kernel is out of memory (ENOBUFS); try again",
            (Some(libc::ENOMEM), _) => "out of memory (ENOMEM); try again",
            (Some(libc::EPERM | libc::EACCES), Operation::ReadStats) => {
                "not permitted (EACCES): root of the initial user namespace alone may read it"
            }
            (Some(libc::ENOENT), Operation::ReadStats) => {
                "no such file (ENOENT): nfnetlink_queue is not loaded (modprobe nfnetlink_queue), or /proc not mounted"
            }
            _ => return error.fmt(f),
        })
    }
}

/// The packet that a message is of, and waits, if it is of one
struct Whose(Option<PacketKey>);

impl fmt::Display for Whose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(key) => write!(
                f,
                "packet {} of queue {}, which still waits: ",
                key.id, key.queue
            ),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use nfqnl_proto::Header;

    use super::*;

    const QUEUE: u16 = 7;
    const KEY: PacketKey = PacketKey {
        queue: QUEUE,
        binding: 1,
        id: 42,
    };
    const OPERATIONS: [Operation; 17] = [
        Operation::Open,
        Operation::SetRecvBuffer,
        Operation::GetRecvBuffer,
        Operation::SetNonblocking,
        Operation::Register,
        Operation::BindPf(Family::INET),
        Operation::UnbindPf(Family::INET6),
        Operation::Bind(QUEUE),
        Operation::Unbind(QUEUE),
        Operation::SetMode(QUEUE),
        Operation::SetFlags(QUEUE),
        Operation::SetMaxlen(QUEUE),
        Operation::Verdict(KEY),
        Operation::BatchVerdict(KEY),
        Operation::Sync,
        Operation::Receive,
        Operation::ReadStats,
    ];
    /// More than Linux has, and the kernel's own behind them
    const ERRNOS: [std::ops::RangeInclusive<i32>; 2] = [1..=140, 512..=530];

    fn refused(op: Operation, errno: i32, text: Option<&str>) -> Error {
        let source = io::Error::from_raw_os_error(errno);
        let text = text.map(Into::into);
        Refusal { op, source, text }.into()
    }

    fn failed(op: Operation, errno: i32) -> Error {
        let source = io::Error::from_raw_os_error(errno);
        Error::Io { op, source }
    }

    /// All that stand for something that the system has said: each operation with each number
    fn system_errors() -> impl Iterator<Item = (Operation, i32, [Error; 3])> {
        let errnos = || ERRNOS.into_iter().flatten();
        let pairs = OPERATIONS
            .into_iter()
            .flat_map(move |op| errnos().map(move |errno| (op, errno)));
        pairs.map(|(op, errno)| {
            let text = "two\nlines\r\0";
            let errors = [
                refused(op, errno, None),
                refused(op, errno, Some(text)),
                failed(op, errno),
            ];
            (op, errno, errors)
        })
    }

    /// All the others, and what each must name
    fn other_errors() -> Vec<(&'static str, Error)> {
        let source = DecodeError::Short {
            what: Header::Message,
            offset: 0,
            needed: 16,
            had: 3,
        };
        let mode = CopyMode(9);
        let (op, waited) = (Operation::SetMode(QUEUE), Duration::from_millis(1500));
        vec![
            ("set copy mode of queue 7", Error::NoAck { op, waited }),
            ("verdict on packet 42 of queue 7", Error::Stale { key: KEY }),
            ("set copy mode of queue 7", Error::Ended { op }),
            (
                "maximum length 0 for queue 7",
                Error::ZeroMaxlen { queue: QUEUE },
            ),
            (
                "copy mode 9 for queue 7",
                Error::UnknownCopyMode { queue: QUEUE, mode },
            ),
            (
                "replacing packet 42 of queue 7",
                Error::CutPacket {
                    key: KEY,
                    needed: 1500,
                    had: 64,
                },
            ),
            (
                "verdict on packet 42 of queue 7",
                Error::PayloadTooShort {
                    key: KEY,
                    needed: 20,
                    had: 19,
                },
            ),
            (
                "receive: packet 42 of queue 7",
                Error::Truncated {
                    key: Some(KEY),
                    needed: 600,
                    had: 200,
                },
            ),
            (
                "receive: ",
                Error::Truncated {
                    key: None,
                    needed: 600,
                    had: 20,
                },
            ),
            (
                "receive: packet 42 of queue 7",
                Error::Decode {
                    key: Some(KEY),
                    source,
                },
            ),
            ("receive: ", Error::Decode { key: None, source }),
            (
                "verdict on packet 42 of queue 7",
                Error::Encode {
                    op: Operation::Verdict(KEY),
                    source: EncodeError::AttributeTooLong {
                        kind: 10,
                        had: 65532,
                        max: 65531,
                    },
                },
            ),
            (
                "open netfilter socket",
                Error::NotNetfilter {
                    domain: 2,
                    protocol: 17,
                },
            ),
        ]
    }

    /// A new variant has to come into the tests
    const fn is_tested(error: &Error) -> bool {
        match error {
            Error::Refused(_)
            | Error::Io { .. }
            | Error::NoAck { .. }
            | Error::Stale { .. }
            | Error::Ended { .. }
            | Error::ZeroMaxlen { .. }
            | Error::UnknownCopyMode { .. }
            | Error::CutPacket { .. }
            | Error::PayloadTooShort { .. }
            | Error::Truncated { .. }
            | Error::Decode { .. }
            | Error::Encode { .. }
            | Error::NotNetfilter { .. } => true,
        }
    }

    #[track_caller]
    fn expect_line(error: &Error, names: &str) {
        let text = error.to_string();
        assert!(is_tested(error));
        assert!(text.starts_with(names), "{text:?} names no {names:?}");
        assert!(text.len() > names.len() + 8, "{text:?} says nothing");
        assert!(!text.chars().any(char::is_control), "{text:?} is no line");
        assert!(!text.ends_with(['.', ' ', ';', ':', ',']), "{text:?}");
        assert!(!text.contains("  "), "{text:?}");
    }

    #[test]
    fn each_is_one_line_that_names_what_was_tried_and_where() {
        for (op, _, errors) in system_errors() {
            for error in errors {
                // What the kernel says comes last, whatever that is.
                let text = error.to_string();
                let own = text.split("; the kernel says: two lines").next();
                assert!(own.is_some_and(|own| own.starts_with(&format!("{op}: "))));
                assert!(!text.chars().any(char::is_control), "{text:?} is no line");
                if own == Some(&text) {
                    expect_line(&error, &op.to_string());
                }
            }
        }
        for (names, error) in other_errors() {
            expect_line(&error, names);
        }
    }

    #[test]
    fn an_operation_on_a_queue_names_it() {
        for op in OPERATIONS {
            let names = op.to_string().contains("queue 7");
            assert_eq!(names, op.queue() == Some(QUEUE), "{op}");
        }
    }

    #[test]
    fn the_source_is_the_systems_error_where_there_is_one() {
        for (_, errno, errors) in system_errors() {
            for error in errors {
                let source = error.source().and_then(|s| s.downcast_ref::<io::Error>());
                assert_eq!(source.and_then(io::Error::raw_os_error), Some(errno));
            }
        }
        for (_, error) in other_errors() {
            let source = error.source();
            match &error {
                Error::Decode { .. } => assert!(source.is_some_and(|s| s.is::<DecodeError>())),
                Error::Encode { .. } => assert!(source.is_some_and(|s| s.is::<EncodeError>())),
                _ => assert!(source.is_none()),
            }
        }
    }

    /// Those that users meet
    #[test]
    fn the_common_ones_word_by_word() {
        let [bind, flags, verdict] = [
            Operation::Bind(QUEUE),
            Operation::SetFlags(QUEUE),
            Operation::Verdict(KEY),
        ];
        let batch = Operation::BatchVerdict(KEY);
        let cases = [
            (
                refused(bind, libc::EPERM, None),
                "bind queue 7: not permitted (EPERM): no CAP_NET_ADMIN over this network namespace (run as root, or give \
                 the program the capability by setcap cap_net_admin+ep), or another process or handle has the queue (the \
                 second column of /proc/net/netfilter/nfnetlink_queue is most often its pid)",
            ),
            (
                refused(Operation::Sync, libc::EPERM, None),
                "sync: not permitted (EPERM): no CAP_NET_ADMIN over this network namespace; run as root, or give the \
                 program the capability (setcap cap_net_admin+ep)",
            ),
            (
                refused(verdict, libc::EPERM, None),
                "verdict on packet 42 of queue 7: not permitted (EPERM): the thread that sent it has no CAP_NET_ADMIN, \
                 which every verdict takes, or another socket has the queue now; with the capability, answer the packet \
                 again",
            ),
            (
                refused(bind, libc::EBUSY, None),
                "bind queue 7: already bound on this socket (EBUSY): go on with the Queue that has it, or destroy that \
                 first",
            ),
            (
                refused(flags, libc::ENODEV, None),
                "set flags of queue 7: the queue is not bound (ENODEV): it was unbound through another descriptor; bind it \
                 again",
            ),
            (
                refused(verdict, libc::ENODEV, None),
                "verdict on packet 42 of queue 7: the queue is not bound any more (ENODEV): the kernel has dropped the \
                 packet, and nothing is left to answer",
            ),
            (
                refused(flags, libc::EOPNOTSUPP, None),
                "set flags of queue 7: not supported (EOPNOTSUPP): a flag that this kernel does not know or was built \
                 without (CONNTRACK needs nf_conntrack_netlink, SECCTX needs NETWORK_SECMARK); ask for fewer flags",
            ),
            (
                refused(bind, libc::EINVAL, None),
                "bind queue 7: invalid (EINVAL): a flag that this kernel does not know (ask for fewer), or \
                 nfnetlink_queue is not available (modprobe nfnetlink_queue)",
            ),
            (
                refused(verdict, libc::ENOENT, None),
                "verdict on packet 42 of queue 7: no such packet (ENOENT): answered already, or dropped by the kernel \
                 because its device went down, a base chain was deleted or the queue was unbound; nothing is left to \
                 answer",
            ),
            (
                refused(batch, libc::ENOENT, None),
                "verdict on all packets up to 42 of queue 7: no such packet (ENOENT): answered already, or dropped by the \
                 kernel because its device went down, a base chain was deleted or the queue was unbound; nothing is left \
                 to answer",
            ),
            (
                refused(verdict, libc::EINVAL, None),
                "verdict on packet 42 of queue 7: invalid (EINVAL): STOLEN, which the kernel refuses from user space, or a \
                 link-layer header of another length; with STOLEN the packet goes on waiting",
            ),
            (
                refused(
                    verdict,
                    libc::ERANGE,
                    Some("Attribute failed policy validation"),
                ),
                "verdict on packet 42 of queue 7: an attribute is too short for this kernel (ERANGE): please report it as \
                 a bug of this library; the kernel says: Attribute failed policy validation",
            ),
            (
                refused(bind, libc::ENOMEM, None),
                "bind queue 7: the kernel is out of memory (ENOMEM); try again",
            ),
            (
                failed(Operation::Open, libc::EMFILE),
                "open netfilter socket: no file descriptor is left to this process (EMFILE): raise its limit (ulimit -n), \
                 or close some",
            ),
            (
                failed(Operation::Open, libc::ENFILE),
                "open netfilter socket: no file descriptor is left in the system (ENFILE): raise fs.file-max",
            ),
            (
                failed(Operation::Open, libc::EPROTONOSUPPORT),
                "open netfilter socket: this kernel has no netfilter netlink (EPROTONOSUPPORT): modprobe nfnetlink_queue, \
                 or take a kernel that has it (CONFIG_NETFILTER_NETLINK_QUEUE)",
            ),
            (
                failed(verdict, libc::EMSGSIZE),
                "verdict on packet 42 of queue 7: longer than the socket's send buffer (EMSGSIZE): raise it (SO_SNDBUF of \
                 the descriptor, or net.core.wmem_default before it is opened)",
            ),
            (
                failed(verdict, libc::ENOBUFS),
                "verdict on packet 42 of queue 7: the kernel is out of memory (ENOBUFS); try again",
            ),
            (
                failed(Operation::ReadStats, libc::EACCES),
                "read /proc/thread-self/net/netfilter/nfnetlink_queue: not permitted (EACCES): root of the initial user \
                 namespace alone may read it",
            ),
            (
                failed(Operation::ReadStats, libc::ENOENT),
                "read /proc/thread-self/net/netfilter/nfnetlink_queue: no such file (ENOENT): nfnetlink_queue is not \
                 loaded (modprobe nfnetlink_queue), or /proc not mounted",
            ),
        ];
        for (error, expected) in cases {
            assert_eq!(error.to_string(), expected);
        }
        let unknown = refused(bind, libc::EXDEV, None);
        let system = io::Error::from_raw_os_error(libc::EXDEV);
        assert_eq!(
            unknown.to_string(),
            format!("bind queue 7: refused by the kernel ({system})")
        );
        let others = other_errors()
            .into_iter()
            .map(|(_, error)| error.to_string());
        assert_eq!(
            Vec::from_iter(others),
            [
                "set copy mode of queue 7: no acknowledgement within 1.5s: lost in an overrun of the receive buffer, or \
                 read by other code and not passed to handle_packet; try again, and raise the receive buffer",
                "verdict on packet 42 of queue 7: not a packet of a queue that this handle has bound now; if its binding \
                 has ended, the kernel has dropped it, and nothing is left to answer",
                "set copy mode of queue 7: this binding of the queue has ended, with its handle or through another \
                 descriptor; bind it again",
                "maximum length 0 for queue 7: the kernel would accept it and drop every packet; set 1 or more",
                "copy mode 9 for queue 7: the kernel would acknowledge it and change nothing; set none, meta or packet",
                "replacing packet 42 of queue 7: only 64 of its 1500 bytes were copied, the rest would be lost; raise the \
                 copy range",
                "verdict on packet 42 of queue 7: new payload of 19 bytes, its network header alone takes 20",
                "receive: packet 42 of queue 7, which still waits: message of 600 bytes was cut to 200: receive into a \
                 buffer of at least 600 bytes",
                "receive: message of 600 bytes was cut to 20: receive into a buffer of at least 600 bytes",
                "receive: packet 42 of queue 7, which still waits: netlink header at byte 0 needs 16 bytes, 3 left",
                "receive: netlink header at byte 0 needs 16 bytes, 3 left",
                "verdict on packet 42 of queue 7: attribute 10 has 65532 bytes of value, at most 65531 fit",
                "open netfilter socket: the descriptor is no AF_NETLINK socket of protocol NETLINK_NETFILTER (domain 2, \
                 protocol 17)",
            ]
        );
    }
}
