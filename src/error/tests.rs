use std::error::Error as _;

use nfqnl_proto::Header;

use super::*;

const KEY: PacketKey = PacketKey::new(7, 42).with_binding(1);

/// The queue and the packet with the longest names
const LONGEST: PacketKey = PacketKey::new(u16::MAX, u32::MAX).with_binding(u16::MAX);

/// Linux's error numbers, and the kernel's internal ones
const ERRNOS: [std::ops::RangeInclusive<i32>; 2] = [1..=140, 512..=530];

const fn operations(key: PacketKey) -> [Operation; 20] {
    let queue = key.queue();
    [
        Operation::Open,
        Operation::SetRecvBuffer,
        Operation::GetRecvBuffer,
        Operation::GetInterfaceName,
        Operation::ProbeConntrack,
        Operation::Register,
        Operation::BindPf(Family::INET),
        Operation::UnbindPf(Family::INET6),
        Operation::Bind(queue),
        Operation::Adopt(queue),
        Operation::HandOver,
        Operation::Unbind(queue),
        Operation::SetMode(queue),
        Operation::SetFlags(queue),
        Operation::SetMaxlen(queue),
        Operation::Verdict(key),
        Operation::BatchVerdict(key),
        Operation::Sync,
        Operation::Receive,
        Operation::ReadStats,
    ]
}

fn refusal(op: Operation, errno: i32, text: Option<&str>) -> Refusal {
    Refusal {
        op,
        kind: ErrorKind::from_errno(errno),
        source: io::Error::from_raw_os_error(errno),
        text: text.map(Into::into),
    }
}

fn refused(op: Operation, errno: i32) -> Error {
    refusal(op, errno, None).into()
}

fn failed(op: Operation, errno: i32) -> Error {
    let source = io::Error::from_raw_os_error(errno);
    Error::Io { op, source }
}

/// Each operation with each error number of the system
fn system_errors(key: PacketKey) -> impl Iterator<Item = (Operation, i32, Error)> {
    operations(key).into_iter().flat_map(|op| {
        let errnos = ERRNOS.into_iter().flatten();
        errnos.flat_map(move |n| [(op, n, refused(op, n)), (op, n, failed(op, n))])
    })
}

/// Refusals with a cause that takes more than the error number to know
fn explained(key: PacketKey) -> [(Operation, Error); 4] {
    let (bind, flags) = (
        Operation::Bind(key.queue()),
        Operation::SetFlags(key.queue()),
    );
    let of = |op, errno, kind| (op, refusal(op, errno, None).with_kind(kind).into());
    let unsupported = ErrorKind::UnsupportedFlags;
    let owner = Some(u32::MAX);
    [
        of(bind, libc::EPERM, ErrorKind::QueueInUse { owner }),
        of(bind, libc::EPERM, ErrorKind::QueueInUse { owner: None }),
        of(flags, libc::EOPNOTSUPP, unsupported(ConfigFlags::CONNTRACK)),
        of(
            flags,
            libc::EINVAL,
            unsupported(ConfigFlags::GSO | ConfigFlags::FAIL_OPEN),
        ),
    ]
}

/// The errors that the system has no part in
fn own_errors(key: PacketKey) -> [(Operation, Error); 13] {
    let (op, verdict) = (Operation::SetMode(key.queue()), Operation::Verdict(key));
    let (open, receive) = (Operation::Open, Operation::Receive);
    let source = DecodeError::Short {
        what: Header::Message,
        offset: 0,
        needed: 16,
        had: 3,
    };
    let too_long = EncodeError::AttributeTooLong {
        kind: 10,
        had: 65532,
        max: 65531,
    };
    let is_short = |key| Error::BufferTooSmall {
        key,
        needed: 262_144,
        had: 65_536,
    };
    [
        (op, Error::NoAck { op }),
        (op, Error::Unbound { op }),
        (verdict, Error::Unbound { op: verdict }),
        (verdict, Error::WrongSocket { op: verdict }),
        (receive, Error::InCallback),
        (
            verdict,
            Error::TruncatedPacket {
                key,
                needed: 65_535,
                had: 65_531,
            },
        ),
        (verdict, Error::ConntrackAndLength { key }),
        (
            verdict,
            Error::PayloadTooShort {
                key,
                needed: 60,
                had: 59,
            },
        ),
        (receive, is_short(Some(key))),
        (receive, is_short(None)),
        (
            receive,
            Error::Decode {
                key: Some(key),
                source,
            },
        ),
        (
            verdict,
            Error::Encode {
                op: verdict,
                source: too_long,
            },
        ),
        (
            open,
            Error::NotNetfilter {
                domain: 2,
                protocol: 17,
            },
        ),
    ]
}

fn all_errors(key: PacketKey) -> impl Iterator<Item = (Operation, Error)> {
    let errors = system_errors(key).map(|(op, _, error)| (op, error));
    let errors = errors.chain(explained(key)).chain(own_errors(key));
    #[cfg(feature = "rules")]
    let errors = {
        let (op, fault) = (Operation::AddRule, crate::rules::RuleError::TooLong);
        errors.chain([(op, Error::InvalidRule { op, fault })])
    };
    errors
}

/// A new variant does not compile until it is here, and then it belongs into the lists above
const fn is_listed(error: &Error) -> bool {
    match error {
        Error::Refused(_)
        | Error::Io { .. }
        | Error::NoAck { .. }
        | Error::Unbound { .. }
        | Error::WrongSocket { .. }
        | Error::InCallback
        | Error::TruncatedPacket { .. }
        | Error::ConntrackAndLength { .. }
        | Error::PayloadTooShort { .. }
        | Error::BufferTooSmall { .. }
        | Error::Decode { .. }
        | Error::Encode { .. }
        | Error::NotNetfilter { .. } => true,
        #[cfg(feature = "rules")]
        Error::InvalidRule { .. } => true,
    }
}

/// The same for kinds, with the error numbers that they stand for
const fn errno_of(kind: ErrorKind) -> i32 {
    match kind {
        ErrorKind::NoCapability | ErrorKind::QueueInUse { .. } => libc::EPERM,
        ErrorKind::AlreadyBound => libc::EBUSY,
        ErrorKind::NotBound => libc::ENODEV,
        ErrorKind::Invalid => libc::EINVAL,
        ErrorKind::UnsupportedFlags(_) | ErrorKind::Unsupported => libc::EOPNOTSUPP,
        ErrorKind::NoSuchPacket => libc::ENOENT,
        ErrorKind::NoBuffers => libc::ENOBUFS,
        ErrorKind::OutOfMemory => libc::ENOMEM,
        ErrorKind::OutOfRange => libc::ERANGE,
        ErrorKind::TableInUse => libc::EPERM,
        ErrorKind::Other => libc::EXDEV,
    }
}

/// The words of the system's error, without its number
fn words_of(errno: i32) -> String {
    let text = io::Error::from_raw_os_error(errno).to_string();
    let words = text.split(" (os error").next();
    words.unwrap_or_default().to_lowercase()
}

#[test]
fn each_is_one_short_line() {
    for (op, error) in all_errors(KEY).chain(all_errors(LONGEST)) {
        let text = error.to_string();
        assert!(is_listed(&error));
        let cause = text.strip_prefix(&format!("{op}: "));
        assert!(cause.is_some_and(|cause| cause.len() > 6), "{text:?}");
        assert!(text.len() < 100, "{text:?} has {}", text.len());
        assert!(!text.contains(char::is_control), "{text:?}");
        assert!(!text.ends_with(['.', ' ', ';', ':', ',', '!']), "{text:?}");
        assert!(!text.contains("  "), "{text:?}");
    }
}

#[test]
fn the_systems_error_is_only_the_source() {
    for (_, errno, error) in system_errors(KEY) {
        let text = error.to_string().to_lowercase();
        assert!(!text.contains(&words_of(errno)), "{text:?}");
        let source = error.source().and_then(|s| s.downcast_ref::<io::Error>());
        assert_eq!(source.and_then(io::Error::raw_os_error), Some(errno));
        assert_eq!(error.raw_os_error(), Some(errno));
    }
    for (_, error) in own_errors(KEY) {
        let source = error.source();
        match &error {
            Error::Decode { .. } => assert!(source.is_some_and(|s| s.is::<DecodeError>())),
            Error::Encode { .. } => assert!(source.is_some_and(|s| s.is::<EncodeError>())),
            _ => assert!(source.is_none()),
        }
        assert_eq!(error.raw_os_error(), None);
    }
}

#[test]
fn debug_has_the_words_and_the_source() {
    for (_, error) in all_errors(KEY) {
        let source = error.source().map(|source| format!(": {source}"));
        let expected = format!("{error}{}", source.unwrap_or_default());
        assert_eq!(format!("{error:?}"), expected);
    }
    let refusal = refusal(Operation::Sync, libc::EPERM, None);
    assert!(format!("{refusal:?}").ends_with("(os error 1)"));
}

#[test]
fn io_errors_keep_kind_and_words() {
    for (_, error) in all_errors(KEY) {
        let (text, errno) = (error.to_string(), error.raw_os_error());
        let kind = errno.map(|errno| io::Error::from_raw_os_error(errno).kind());
        let converted = io::Error::from(error);
        assert_eq!(converted.kind(), kind.unwrap_or(io::ErrorKind::Other));
        assert_eq!(converted.to_string(), text);
        let inner = converted.get_ref().and_then(|e| e.downcast_ref::<Error>());
        assert_eq!(inner.and_then(Error::raw_os_error), errno);
    }
}

#[test]
fn each_kind_stands_for_its_error_number() {
    for (op, errno, error) in system_errors(KEY) {
        let of = ErrorKind::of(&io::Error::from_raw_os_error(errno));
        match errno {
            ErrorKind::ENOTSUPP => assert_eq!(of, ErrorKind::Unsupported),
            _ if of == ErrorKind::Other => {}
            _ => assert_eq!(errno_of(of), errno),
        }
        let is_refused = matches!(error, Error::Refused(_));
        assert_eq!(error.kind(), is_refused.then_some(of), "{op}");
    }
    let kinds = explained(KEY).map(|(_, error)| (error.kind(), error.raw_os_error()));
    assert_eq!(
        kinds[0].0,
        Some(ErrorKind::QueueInUse {
            owner: Some(u32::MAX)
        })
    );
    assert_eq!(kinds[0].1, Some(libc::EPERM));
    assert_eq!(
        ErrorKind::of(&io::Error::other("no number")),
        ErrorKind::Other
    );
}

#[test]
fn operations_on_a_queue_name_it() {
    for op in operations(KEY) {
        let names = op.to_string().contains("queue 7");
        assert_eq!(names, op.queue() == Some(7), "{op}");
        let of_packet = matches!(op, Operation::Verdict(_) | Operation::BatchVerdict(_));
        let refusal = refusal(op, libc::ENOENT, None);
        assert_eq!(refusal.packet(), of_packet.then_some(KEY));
        assert_eq!(refusal.operation(), op);
    }
}

#[test]
fn the_kernels_words_stay_in_the_line() {
    let text = "two\nlines\r\0\u{85}and \u{1b}[31mmore";
    let refusal = refusal(Operation::Bind(7), libc::ERANGE, Some(text));
    assert_eq!(refusal.kernel_text(), Some(text));
    let shown = "bind queue 7: an attribute is too short for this kernel \
        (kernel: two lines   and  [31mmore)";
    assert_eq!(refusal.to_string(), shown);
    assert!(!format!("{refusal:?}").contains(char::is_control));
}

#[test]
fn the_common_ones_word_by_word() {
    let [bind, flags] = [Operation::Bind(7), Operation::SetFlags(7)];
    let [verdict, batch] = [Operation::Verdict(KEY), Operation::BatchVerdict(KEY)];
    let [open, stats] = [Operation::Open, Operation::ReadStats];
    let cases = [
        (
            refused(bind, libc::EPERM),
            "bind queue 7: no CAP_NET_ADMIN in this network namespace",
        ),
        (
            refused(verdict, libc::EPERM),
            "verdict on packet 42 of queue 7: no CAP_NET_ADMIN in this network namespace",
        ),
        (
            refused(bind, libc::EBUSY),
            "bind queue 7: this socket has bound it already",
        ),
        (
            Refusal::already_bound(bind).into(),
            "bind queue 7: this socket has bound it already",
        ),
        (
            refused(flags, libc::ENODEV),
            "set flags of queue 7: the queue is not bound",
        ),
        (
            refused(bind, libc::EINVAL),
            "bind queue 7: invalid, or nfnetlink_queue is not available",
        ),
        (
            refused(flags, libc::EOPNOTSUPP),
            "set flags of queue 7: unknown to this kernel",
        ),
        (
            refused(verdict, libc::ENOENT),
            "verdict on packet 42 of queue 7: the packet does not wait any more",
        ),
        (
            refused(batch, libc::ENOENT),
            "verdict on packets up to 42 of queue 7: the packet does not wait any more",
        ),
        (
            refused(verdict, libc::EINVAL),
            "verdict on packet 42 of queue 7: the kernel refuses it as invalid",
        ),
        (
            refused(bind, libc::ENOMEM),
            "bind queue 7: the kernel has no memory left",
        ),
        (
            refused(bind, libc::EXDEV),
            "bind queue 7: refused by the kernel",
        ),
        (
            failed(open, libc::EMFILE),
            "open netfilter socket: no file descriptor is left",
        ),
        (
            failed(open, libc::EPROTONOSUPPORT),
            "open netfilter socket: no netfilter netlink in this kernel",
        ),
        (
            failed(verdict, libc::EMSGSIZE),
            "verdict on packet 42 of queue 7: longer than the send buffer",
        ),
        (
            failed(verdict, libc::ENOBUFS),
            "verdict on packet 42 of queue 7: the kernel has no memory left",
        ),
        (
            failed(Operation::Receive, libc::EBADF),
            "receive: system call failed",
        ),
        (
            failed(stats, libc::EACCES),
            "read nfnetlink_queue counters: only root of the initial user namespace may",
        ),
        (
            failed(stats, libc::ENOENT),
            "read nfnetlink_queue counters: not available in /proc",
        ),
    ];
    for (error, expected) in cases {
        assert_eq!(error.to_string(), expected);
    }
    assert_eq!(
        explained(KEY).map(|(_, error)| error.to_string()),
        [
            "bind queue 7: another socket has bound it (port id 4294967295)",
            "bind queue 7: another socket has bound it",
            "set flags of queue 7: the kernel does not support CONNTRACK \
                (CONFIG_NETFILTER_NETLINK_GLUE_CT)",
            "set flags of queue 7: the kernel does not support FAIL_OPEN GSO",
        ]
    );
    let unknown = ConfigFlags::from_bits_retain(0x8000_0200);
    assert_eq!(
        ErrorKind::UnsupportedFlags(ConfigFlags::CONNTRACK | ConfigFlags::SECCTX | unknown)
            .to_string(),
        "the kernel does not support CONNTRACK (CONFIG_NETFILTER_NETLINK_GLUE_CT) \
            SECCTX (CONFIG_NETWORK_SECMARK) 0x80000200"
    );
    assert_eq!(
        own_errors(KEY).map(|(_, error)| error.to_string()),
        [
            "set copy mode of queue 7: the acknowledgement was lost",
            "set copy mode of queue 7: this binding of the queue has ended",
            "verdict on packet 42 of queue 7: this binding of the queue has ended",
            "verdict on packet 42 of queue 7: the key or the batch belongs to another socket",
            "receive: called by a callback of the same handle",
            "verdict on packet 42 of queue 7: only 65531 of 65535 bytes were copied",
            "verdict on packet 42 of queue 7: changes the packet's length and the conntrack entry",
            "verdict on packet 42 of queue 7: the payload has 59 bytes, \
                its network header needs 60",
            "receive: packet 42 of queue 7: needs a buffer of 262144 bytes, had 65536",
            "receive: needs a buffer of 262144 bytes, had 65536",
            "receive: packet 42 of queue 7: malformed message",
            "verdict on packet 42 of queue 7: does not fit a message",
            "open netfilter socket: not a netfilter netlink socket (domain 2, protocol 17)",
        ]
    );
}
