//! Settings of sockets and queues, and requests refused by the kernel or the library
//!
//! Refused verdicts are in `verdicts.rs`, overruns in `stream.rs` and `faults.rs`.

use std::error::Error as _;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::mpsc;

use nfqnl::proto::{Attrs, ConfigRequest, PlainVerdict, RequestHeader};
use nfqnl::{
    ConfigFlags, CopyMode, Error, ErrorKind, Event, Family, Handle, Operation, QueueConfig,
    QueueData, QueueStats, RecvBatch, Refusal, SkbInfo, Socket, Verdict,
};
use nfqnl_testkit::netns::{Namespace, is_rootless, isolated};
use nfqnl_testkit::rules::{Hook, Rule};
use nfqnl_testkit::traffic::{Udp, V4};
use nfqnl_testkit::{kernel, process, socket, user};

use crate::lab::{
    Lab, PORT, QUEUE, configure_past_the_library, is_free, is_readable, is_silent, next_event,
    next_packet, number, refusal, take_all, udp_payload,
};

/// No released kernel has this flag
const UNKNOWN_FLAG: ConfigFlags = ConfigFlags::from_bits_retain(1 << 30);

/// Checks a refusal: what was tried, the errno as source, its kind, and one short line without the
/// text of the OS error
#[track_caller]
fn expect_refusal(refusal: &Refusal, op: Operation, errno: i32, kind: ErrorKind) {
    assert_eq!(refusal.operation(), op);
    assert_eq!(refusal.errno(), errno);
    assert_eq!(refusal.kind(), kind);
    let source = refusal.source().unwrap();
    let source = source.downcast_ref::<io::Error>().unwrap();
    assert_eq!(source.raw_os_error(), Some(errno));
    let text = refusal.to_string();
    assert!(text.starts_with(&format!("{op}: ")), "{text}");
    let os_text = io::Error::from_raw_os_error(errno).to_string();
    let os_text = os_text.split(" (").next().unwrap();
    assert!(!text.contains(os_text) && !text.contains('\n'), "{text}");
    assert!(text.len() < 160, "{text}");
}

#[test]
fn protocol_families_are_bound_and_unbound() {
    isolated(|| {
        let handle = nfqnl::open().unwrap();
        for family in [Family::INET, Family::INET6, Family::BRIDGE] {
            handle.unbind_pf(family).unwrap();
            handle.bind_pf(family).unwrap();
        }
        handle.close().unwrap();
    });
}

#[test]
fn the_socket_is_cloexec_and_has_the_buffer_wanted() {
    isolated(|| {
        let handle = Handle::open().unwrap();
        assert_eq!(handle.fd(), handle.as_fd().as_raw_fd());
        assert_eq!(handle.fd(), handle.socket().as_raw_fd());
        assert!(socket::is_cloexec(&handle).unwrap());
        let wanted = 1 << 16;
        let small = Socket::builder().recv_buffer(wanted).open().unwrap();
        assert!(socket::is_cloexec(&small).unwrap());
        let got = small.recv_buffer().unwrap();
        assert_eq!(got, 2 * wanted, "the kernel doubles it");
        let huge = Socket::builder().recv_buffer(1 << 30).open().unwrap();
        let got = huge.recv_buffer().unwrap();
        if is_rootless() {
            assert!(got < 1 << 30, "an ordinary user has a limit: {got}");
        } else {
            assert!(got >= 1 << 30, "root has no limit: {got}");
        }
    });
}

/// The kernel counts 2304 bytes for a frame of 1500 bytes, and perhaps a little more in some
/// versions
#[test]
fn the_default_buffer_holds_1024_frames() {
    isolated(|| {
        const FRAME: usize = 1500;
        const FRAMES: usize = 1024;
        const WANTED: usize = 2_359_296;
        let lab = Lab::new();
        let plain = netfilter_socket();
        let system_default = rustix::net::sockopt::socket_recv_buffer_size(&plain).unwrap();
        let socket = Socket::open().unwrap();
        let got = socket.recv_buffer().unwrap();
        assert!(got >= system_default, "{got}, less than {system_default}");
        if is_rootless() {
            assert!(got <= WANTED.max(system_default), "{got}");
            return;
        }
        assert!(got >= WANTED, "{got}");
        let _queue = socket.bind(QUEUE).unwrap();
        for _ in 0..FRAMES {
            lab.send(&[0; FRAME - 28]);
        }
        let mut batch = RecvBatch::default();
        let (mut packets, mut others) = (0, 0);
        take_all(&socket, &mut batch, |event| match event {
            Event::Packet(packet) => {
                assert_eq!(packet.len(), Some(FRAME));
                packets += 1;
            }
            _ => others += 1,
        });
        eprintln!("{packets} frames fit");
        // On s390x each message takes more: a cache line has 256 bytes.
        if cfg!(not(target_arch = "s390x")) {
            assert!(packets >= FRAMES * 9 / 10, "{packets}");
        }
        if packets == FRAMES {
            assert_eq!(others, 0);
        }
    });
}

/// EPERM
#[test]
fn without_privilege_every_request_is_refused() {
    isolated(|| {
        let lab = Lab::new();
        let owner = Socket::open().unwrap();
        let queue = owner.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"held");
        let key = next_packet(&owner, &mut batch).key();
        let no_capability = |refusal: &Refusal, op| {
            expect_refusal(refusal, op, libc::EPERM, ErrorKind::NoCapability);
            assert!(refusal.to_string().contains("CAP_NET_ADMIN"), "{refusal}");
        };
        user::without_net_admin(|| {
            let handle = Handle::open().expect("opening takes no privilege");
            let op = Operation::BindPf(Family::INET);
            no_capability(&refusal(handle.bind_pf(Family::INET)), op);
            let socket = handle.socket();
            no_capability(&refusal(socket.bind(7)), Operation::Bind(7));
            no_capability(&refusal(socket.sync()), Operation::Sync);
            // Another socket has bound this queue, but this thread could not bind any other.
            no_capability(&refusal(socket.bind(QUEUE)), Operation::Bind(QUEUE));
            // A process in this situation has dropped its privileges after binding.
            let op = Operation::SetMaxlen(QUEUE);
            no_capability(&refusal(queue.set_maxlen(5)), op);
            owner.set_verdict(key, Verdict::Accept).unwrap();
        });
        match next_event(&owner, &mut batch) {
            Event::Refused(refusal) => no_capability(&refusal, Operation::Verdict(key)),
            other => panic!("not a refusal: {other:?}"),
        }
        owner.set_verdict(key, Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"held"[..]));
    });
}

#[test]
fn a_child_without_the_capability_is_told_so() {
    isolated(|| {
        let child = process::fork(|| {
            user::drop_net_admin();
            let socket = Socket::open().unwrap();
            let refused = refusal(socket.bind(QUEUE));
            let op = Operation::Bind(QUEUE);
            expect_refusal(&refused, op, libc::EPERM, ErrorKind::NoCapability);
        });
        assert!(child.unwrap().wait().unwrap());
    });
}

/// The kernel checks the capabilities of the opener as well as those of the caller
#[test]
fn the_opener_needs_the_privilege_too() {
    isolated(|| {
        let socket = user::without_net_admin(|| Socket::open().unwrap());
        let refused = refusal(socket.bind(QUEUE));
        let op = Operation::Bind(QUEUE);
        expect_refusal(&refused, op, libc::EPERM, ErrorKind::NoCapability);
        drop(Socket::open().unwrap().bind(QUEUE).unwrap());
    });
}

/// EPERM again
#[test]
fn a_queue_in_use_is_refused_until_it_is_free() {
    isolated(|| {
        let lab = Lab::new();
        let owner = Socket::open().unwrap();
        let queue = owner.bind(QUEUE).unwrap();
        let other = Socket::open().unwrap();
        let in_use = |port| {
            let refused = refusal(other.bind(QUEUE));
            let kind = refused.kind();
            assert!(
                matches!(kind, ErrorKind::QueueInUse { owner, .. } if owner == port),
                "{kind:?}"
            );
            expect_refusal(&refused, Operation::Bind(QUEUE), libc::EPERM, kind);
        };
        // The kernel's table in /proc names the owner, and only root may read it.
        let port = socket::netlink_port(&owner).unwrap();
        in_use((!is_rootless()).then_some(port));
        process::without_descriptors(|| in_use(None)).unwrap();
        queue.destroy().unwrap();
        let _queue = other.bind(QUEUE).expect("it is free now");
        lab.send(b"for the new owner");
        let mut batch = RecvBatch::default();
        let packet = next_packet(&other, &mut batch);
        assert_eq!(udp_payload(&packet), b"for the new owner");
        assert!(is_silent(&owner, &mut RecvBatch::default()));
    });
}

/// EBUSY
#[test]
fn a_second_bind_is_refused_and_the_first_goes_on() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"before");
        let key = next_packet(&socket, &mut batch).key();
        let refused = refusal(socket.bind(QUEUE));
        let op = Operation::Bind(QUEUE);
        expect_refusal(&refused, op, libc::EBUSY, ErrorKind::AlreadyBound);
        socket.set_verdict(key, Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"before"[..]));
        lab.send(b"after");
        assert_eq!(udp_payload(&next_packet(&socket, &mut batch)), b"after");
    });
}

/// ENODEV: other code has unbound the queue, through a copy of the descriptor
#[test]
fn a_queue_unbound_elsewhere_can_be_bound_again() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let mut batch = RecvBatch::default();
        let queue = socket.bind(QUEUE).unwrap();
        lab.send(b"lost");
        let old = next_packet(&socket, &mut batch).key();
        configure_past_the_library(&socket, &ConfigRequest::unbind(QUEUE));
        socket.set_verdict(old, Verdict::Accept).unwrap();
        match next_event(&socket, &mut batch) {
            Event::Refused(refusal) => {
                assert_eq!(refusal.packet(), Some(old));
                assert_eq!(refusal.kind(), ErrorKind::NotBound);
            }
            other => panic!("not a refusal: {other:?}"),
        }
        let refused = refusal(queue.set_maxlen(5));
        let op = Operation::SetMaxlen(QUEUE);
        expect_refusal(&refused, op, libc::ENODEV, ErrorKind::NotBound);

        let _again = socket.bind(QUEUE).expect("a new binding");
        lab.send(b"held");
        let new = next_packet(&socket, &mut batch).key();
        assert_eq!((old.id(), new.id()), (1, 1), "the ids start again");
        let error = socket.set_verdict(old, Verdict::Drop).unwrap_err();
        let op = Operation::Verdict(old);
        assert!(
            matches!(error, Error::Unbound { op: of, .. } if of == op),
            "{error}"
        );
        // The `Queue` of the old binding neither changes nor ends the new one.
        let error = queue.set_maxlen(5).unwrap_err();
        assert!(matches!(error, Error::Unbound { .. }), "{error}");
        drop(queue);
        socket.set_verdict(new, Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"held"[..]));
    });
}

/// The numbers are in the documentation of `SocketBuilder::recv_buffer`
#[test]
fn the_usual_buffer_holds_some_250_small_packets() {
    isolated(|| {
        const USUAL: usize = 212_992;
        let lab = Lab::new();
        let socket = Socket::builder().recv_buffer(USUAL / 2).open().unwrap();
        assert_eq!(socket.recv_buffer().unwrap(), USUAL);
        let _queue = socket.bind(QUEUE).unwrap();
        // The send buffer of one socket has no room for this many.
        let senders = [(); 2].map(|()| Udp::bind(V4, 0).unwrap());
        for _ in 0..150 {
            for sender in &senders {
                sender.send(b"small", lab.v4.address()).unwrap();
            }
        }
        let mut batch = RecvBatch::default();
        let mut count = 0;
        take_all(&socket, &mut batch, |event| {
            count += usize::from(matches!(event, Event::Packet(_)));
        });
        // Where a cache line has 256 bytes, each message takes more.
        if cfg!(target_arch = "s390x") {
            assert!((130..=180).contains(&count), "{count}");
        } else {
            assert!((237..=277).contains(&count), "{count}");
            assert_eq!(count == 277, !kernel::is_at_least(6, 2), "{count}");
        }
    });
}

/// EOPNOTSUPP; EINVAL since Linux 7.2, because its netlink policy lists the known flags
#[test]
fn a_refused_flag_is_named_and_nothing_is_bound() {
    isolated(|| {
        let known = ConfigFlags::GSO | ConfigFlags::UID_GID;
        let errno = if kernel::is_at_least(7, 2) {
            libc::EINVAL
        } else {
            libc::EOPNOTSUPP
        };
        let unsupported = ErrorKind::UnsupportedFlags(UNKNOWN_FLAG);
        let socket = Socket::open().unwrap();
        let config = QueueConfig::new().enable(known | UNKNOWN_FLAG);
        let refused = refusal(socket.bind_with(QUEUE, &config));
        expect_refusal(&refused, Operation::Bind(QUEUE), errno, unsupported);
        assert!(is_free(QUEUE));
        if !is_rootless() {
            let bound = QueueStats::read_all().unwrap();
            assert!(bound.is_empty(), "the probe binds nothing: {bound:?}");
        }

        let queue = socket.bind(QUEUE).expect("it is free");
        let all = known | UNKNOWN_FLAG;
        let refused = refusal(queue.set_flags(all, all));
        expect_refusal(&refused, Operation::SetFlags(QUEUE), errno, unsupported);
        assert_eq!(queue.flags(), ConfigFlags::empty());
        queue.set_flags(known, known).unwrap();
        assert_eq!(queue.flags(), known);
    });
}

/// The flags in effect show whether the kernel supports `CONNTRACK`
#[test]
fn optional_flags_are_left_out_where_missing() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let optional = ConfigFlags::CONNTRACK | ConfigFlags::UID_GID | UNKNOWN_FLAG;
        let config = QueueConfig::new()
            .enable(ConfigFlags::GSO)
            .enable_if_supported(optional);
        let queue = socket.bind_with(QUEUE, &config).unwrap();
        let expected = ConfigFlags::GSO | ConfigFlags::UID_GID;
        assert_eq!(queue.flags() - ConfigFlags::CONNTRACK, expected);
        if let Some(has_glue) = kernel::has_function("ctnetlink_glue_build") {
            assert_eq!(queue.flags().contains(ConfigFlags::CONNTRACK), has_glue);
        }
        lab.send(b"from this user");
        let mut batch = RecvBatch::default();
        let packet = next_packet(&socket, &mut batch);
        assert!(packet.uid().is_some());
        assert_eq!(packet.skb_info(), SkbInfo::CSUM_NOT_READY, "GSO");
        socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
        // The kernel refuses a required flag, and the error names only this flag.
        queue.destroy().unwrap();
        let config = config.enable(UNKNOWN_FLAG);
        let refused = refusal(socket.bind_with(QUEUE, &config));
        assert_eq!(refused.kind(), ErrorKind::UnsupportedFlags(UNKNOWN_FLAG));
    });
}

/// EOPNOTSUPP on kernels without `NETFILTER_NETLINK_GLUE_CT`, and conntrack attributes on others
#[test]
fn conntrack_is_reported_or_refused() {
    isolated(|| {
        /// `CTA_TUPLE_ORIG` (`linux/netfilter/nfnetlink_conntrack.h`)
        const TUPLE_ORIG: u16 = 1;
        /// `IP_CT_NEW` (`linux/netfilter/nf_conntrack_common.h`)
        const NEW: u32 = 2;
        // The kernel tracks every packet matched by this rule.
        let rule = Rule::new().udp_dport(PORT).ct_new().queue(QUEUE);
        let lab = Lab::with(Hook::Input, &rule);
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"without the flag");
        let packet = next_packet(&socket, &mut batch);
        assert_eq!(
            (
                packet.conntrack().map(|entry| entry.as_bytes()),
                packet.ct_state().map(|state| state.0)
            ),
            (None, None)
        );
        // A packet from a socket to itself would be a reply to the first one.
        let other = Udp::bind(V4, 0).unwrap();

        let is_reported = match queue.set_flags(ConfigFlags::CONNTRACK, ConfigFlags::CONNTRACK) {
            Ok(()) => {
                other.send(b"tracked", lab.v4.address()).unwrap();
                let packet = next_packet(&socket, &mut batch);
                assert_eq!(packet.ct_state().map(|state| state.0), Some(NEW));
                let mut entry =
                    Attrs::new(packet.conntrack().map(|entry| entry.as_bytes()).unwrap());
                let original = entry.next().unwrap().unwrap();
                assert_eq!(original.kind, TUPLE_ORIG);
                let (port, localhost) = (PORT.to_be_bytes(), [127, 0, 0, 1]);
                assert!(original.value.windows(2).any(|bytes| bytes == port));
                assert!(original.value.windows(4).any(|bytes| bytes == localhost));
                true
            }
            refused => {
                let refused = refusal(refused);
                let kind = ErrorKind::UnsupportedFlags(ConfigFlags::CONNTRACK);
                expect_refusal(&refused, Operation::SetFlags(QUEUE), libc::EOPNOTSUPP, kind);
                let option = "NETFILTER_NETLINK_GLUE_CT";
                assert!(refused.to_string().contains(option), "{refused}");
                false
            }
        };
        if let Some(has_glue) = kernel::has_function("ctnetlink_glue_build") {
            assert_eq!(is_reported, has_glue);
        }
    });
}

/// Only a SECMARK rule labels packets, and a new namespace has none. Kernels without such labels
/// refuse the flag
#[test]
fn security_contexts_are_absent_or_refused() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        match queue.set_flags(ConfigFlags::SECCTX, ConfigFlags::SECCTX) {
            Ok(()) => {
                lab.send(b"not labelled");
                let mut batch = RecvBatch::default();
                let packet = next_packet(&socket, &mut batch);
                assert_eq!(packet.security_context(), None);
                assert_eq!(udp_payload(&packet), b"not labelled");
            }
            refused => {
                assert!(!kernel::is_complete(), "{refused:?}");
                let refused = refusal(refused);
                let kind = ErrorKind::UnsupportedFlags(ConfigFlags::SECCTX);
                expect_refusal(&refused, Operation::SetFlags(QUEUE), libc::EOPNOTSUPP, kind);
                assert!(refused.to_string().contains("NETWORK_SECMARK"), "{refused}");
            }
        }
    });
}

/// At OUTPUT each setting shows: the range, the length, and all three flags
#[test]
fn all_settings_go_with_the_binding_in_one_message() {
    isolated(|| {
        const RANGE: usize = 50;
        const LEN: usize = 100;
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let flags = ConfigFlags::FAIL_OPEN | ConfigFlags::GSO | ConfigFlags::UID_GID;
        let config = QueueConfig::new()
            .copy_mode(CopyMode::Packet, RANGE.try_into().unwrap())
            .maxlen(3)
            .enable(flags);
        let queue = socket.bind_with(QUEUE, &config).unwrap();
        assert_eq!(queue.flags(), flags);
        let payloads = [0, 1, 2, 3, 4].map(|number| [number; LEN]);
        for payload in &payloads {
            lab.send(payload);
        }
        // Fail-open: packets without room in the queue pass.
        for payload in &payloads[3..] {
            assert_eq!(lab.recv().as_deref(), Some(&payload[..]));
        }
        let mut batch = RecvBatch::default();
        for payload in &payloads[..3] {
            let packet = next_packet(&socket, &mut batch);
            assert_eq!(packet.payload().len(), RANGE);
            assert!(packet.payload().ends_with(&payload[..RANGE - 28]));
            assert_eq!(packet.len(), Some(28 + LEN));
            assert!(packet.is_truncated());
            assert!(packet.uid().is_some() && packet.gid().is_some());
            // Without GSO the kernel would have completed the checksum.
            assert_eq!(packet.skb_info(), SkbInfo::CSUM_NOT_READY);
        }
        assert!(is_silent(&socket, &mut batch));
    });
}

#[test]
fn bind_with_copies_whole_packets_unless_told() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let mut batch = RecvBatch::default();
        let payload = [7; 3000];
        let configs = [
            QueueConfig::new(),
            QueueConfig::new().maxlen(5000),
            QueueConfig::new().enable(ConfigFlags::UID_GID),
            QueueConfig::new().enable_if_supported(UNKNOWN_FLAG),
        ];
        for config in configs {
            let queue = socket.bind_with(QUEUE, &config).unwrap();
            lab.send(&payload);
            let packet = next_packet(&socket, &mut batch);
            assert_eq!(udp_payload(&packet), payload, "{config:?}");
            assert!(!packet.is_truncated());
            queue.destroy().unwrap();
        }
        let config = QueueConfig::new().copy_mode(CopyMode::None, 0);
        let queue = socket.bind_with(QUEUE, &config).unwrap();
        lab.send(&payload);
        assert!(is_silent(&socket, &mut batch), "a mode that is named stays");
        queue.destroy().unwrap();
    });
}

/// As in libnetfilter_queue: the kernel drops packets until a copy mode is set
#[test]
fn create_queue_begins_with_nothing_copied() {
    isolated(|| {
        let lab = Lab::new();
        let configs = [
            None,
            Some(QueueConfig::new().maxlen(5000)),
            Some(QueueConfig::new().copy_mode(CopyMode::Packet, 0)),
        ];
        for config in configs {
            let handle = nfqnl::open().unwrap();
            let (send, seen) = mpsc::channel();
            let accept = move |data: &mut QueueData<'_>| {
                send.send(data.get_payload().len()).unwrap();
                data.set_verdict(Verdict::Accept, None);
            };
            let queue = match &config {
                None => handle.create_queue(QUEUE, accept),
                Some(config) => handle.create_queue_with(QUEUE, config, accept),
            };
            let queue = queue.unwrap();
            let names_a_mode = config.is_some_and(|config| config.get_copy_mode().is_some());
            let mut batch = RecvBatch::default();
            if !names_a_mode {
                lab.send(b"dropped");
                assert_eq!(handle.try_run_once(&mut batch).unwrap(), 0);
                assert!(lab.v4.is_silent());
                queue.set_mode(CopyMode::Packet, 0).unwrap();
            }
            lab.send(b"copied");
            while handle.run_once(&mut batch).unwrap() == 0 {}
            assert_eq!(seen.try_iter().collect::<Vec<_>>(), [28 + 6]);
            assert_eq!(lab.recv().as_deref(), Some(&b"copied"[..]));
            queue.destroy().unwrap();
        }
    });
}

#[test]
fn maxlen_limits_what_waits() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        queue.set_maxlen(2).unwrap();
        lab.send_numbered(0..4);
        let keys = [(); 2].map(|()| next_packet(&socket, &mut batch).key());
        assert!(is_silent(&socket, &mut batch), "two were dropped");
        for key in keys {
            socket.set_verdict(key, Verdict::Accept).unwrap();
        }
        lab.send(b"room again");
        assert_eq!(
            udp_payload(&next_packet(&socket, &mut batch)),
            b"room again"
        );
    });
}

/// The only way to end a queue without a loss: no new packet waits, and each waiting packet is
/// answered
#[test]
fn maxlen_zero_with_fail_open_lets_all_by() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let config = QueueConfig::new().maxlen(0).enable(ConfigFlags::FAIL_OPEN);
        let queue = socket.bind_with(QUEUE, &config).unwrap();
        let mut batch = RecvBatch::default();
        lab.send_numbered(0..3);
        lab.expect_numbered(0..3);
        assert!(is_silent(&socket, &mut batch));

        queue.set_maxlen(1024).unwrap();
        lab.send_numbered(3..6);
        let held = [(); 3].map(|()| next_packet(&socket, &mut batch).key());
        queue.set_maxlen(0).unwrap();
        lab.send_numbered(6..9);
        lab.expect_numbered(6..9);
        for key in held {
            socket.set_verdict(key, Verdict::Accept).unwrap();
        }
        lab.expect_numbered(3..6);
        assert!(is_silent(&socket, &mut batch));
        if !is_rootless() {
            let stats = QueueStats::read(QUEUE).unwrap().unwrap();
            assert_eq!((stats.queue_dropped, stats.user_dropped), (0, 0));
        }
        assert_eq!(socket.stats().missing_packets, 0);
        queue.destroy().unwrap();
    });
}

#[test]
fn maxlen_zero_without_fail_open_drops_all() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        queue.set_maxlen(0).unwrap();
        lab.send_numbered(0..3);
        assert!(lab.v4.is_silent() && is_silent(&socket, &mut batch));
        if !is_rootless() {
            let stats = QueueStats::read(QUEUE).unwrap().unwrap();
            assert_eq!((stats.queue_dropped, stats.user_dropped), (3, 0));
        }
        queue.set_maxlen(1).unwrap();
        lab.send_numbered(3..4);
        assert_eq!(number(&next_packet(&socket, &mut batch)), 3);
    });
}

#[test]
fn flags_outside_the_mask_stay() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        queue
            .set_flags(ConfigFlags::UID_GID, ConfigFlags::UID_GID)
            .unwrap();
        queue
            .set_flags(ConfigFlags::GSO, ConfigFlags::empty())
            .unwrap();
        assert_eq!(queue.flags(), ConfigFlags::UID_GID);
        lab.send(b"whose");
        assert!(next_packet(&socket, &mut batch).uid().is_some());
    });
}

/// EMSGSIZE
#[test]
fn a_verdict_beyond_the_send_buffer_is_an_error() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"waits");
        let key = next_packet(&socket, &mut batch).key();
        socket::set_send_buffer(&socket, 1).unwrap();
        let replaced = [0x45; 10_000];
        let error = socket
            .set_verdict(key, Verdict::Accept.with_payload(&replaced))
            .unwrap_err();
        assert!(
            matches!(&error, Error::Io { op: Operation::Verdict(of), source, .. }
                if *of == key && source.raw_os_error() == Some(libc::EMSGSIZE)),
            "{error:?}"
        );
        assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
        assert!(error.to_string().contains("send buffer"), "{error}");
        socket.set_verdict(key, Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"waits"[..]));
    });
}

#[test]
fn a_descriptor_serves_the_namespace_it_is_from() {
    isolated(|| {
        let there = Namespace::new().unwrap();
        let lab = there.run(Lab::new);
        let fd = there.run(netfilter_socket);
        let socket = Socket::builder().open_fd(fd).unwrap();
        assert!(socket::is_cloexec(&socket).unwrap());
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"over there");
        let packet = next_packet(&socket, &mut batch);
        assert_eq!(udp_payload(&packet), b"over there");
        socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"over there"[..]));
        let here = Socket::open().unwrap();
        let _here = here.bind(QUEUE).expect("it is free in this namespace");
    });
}

fn netfilter_socket() -> OwnedFd {
    let socket = netlink_sys::Socket::new(libc::NETLINK_NETFILTER.try_into().unwrap()).unwrap();
    socket.as_fd().try_clone_to_owned().unwrap()
}

#[test]
fn descriptors_of_other_kinds_are_refused() {
    isolated(|| {
        let udp = std::net::UdpSocket::bind((V4, 0)).unwrap();
        let route = netlink_sys::Socket::new(libc::NETLINK_ROUTE.try_into().unwrap()).unwrap();
        let route = route.as_fd().try_clone_to_owned().unwrap();
        for fd in [udp.into(), route] {
            let error = Socket::builder().open_fd(fd).unwrap_err();
            assert!(matches!(error, Error::NotNetfilter { .. }), "{error}");
        }
        let file = std::fs::File::open("/dev/null").unwrap();
        let error = Socket::builder().open_fd(file.into()).unwrap_err();
        let op = Operation::Open;
        assert!(
            matches!(error, Error::Io { op: of, .. } if of == op),
            "{error}"
        );
    });
}

/// A refusal already in the socket; poll(2) reports it as before
#[test]
fn messages_from_before_open_fd_are_received() {
    isolated(|| {
        let protocol = libc::NETLINK_NETFILTER.try_into().unwrap();
        let before = netlink_sys::Socket::new(protocol).unwrap();
        let mut buf = [0; PlainVerdict::MAX_LEN];
        let header = RequestHeader::default();
        let verdict = PlainVerdict::new(Verdict::Accept);
        let len = verdict.encode(&mut buf, QUEUE, 1, header).unwrap();
        before.send(&buf[..len], 0).unwrap(); // refused: the queue is not bound
        let socket = Socket::builder()
            .open_fd(before.as_fd().try_clone_to_owned().unwrap())
            .unwrap();
        assert!(is_readable(&socket));
        let mut batch = RecvBatch::default();
        let event = next_event(&socket, &mut batch);
        assert!(matches!(event, Event::Refused(_)), "{event:?}");
    });
}
