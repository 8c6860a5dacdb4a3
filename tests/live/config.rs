//! Settings of handles and queues, and what the kernel and the library refuse
//!
//! Errors of verdicts are in `verdicts.rs`, ENOBUFS is in `stream.rs`.

use std::error::Error as _;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Instant;

use nfqnl::proto::{Attrs, BatchVerdict, ConfigRequest, RequestHeader};
use nfqnl::{
    ConfigFlags, CopyMode, Error, Event, Family, Handle, Operation, QueueConfig, RecvBatch,
    Refusal, Situation, SkbInfo, Verdict,
};
use nfqnl_testkit::netns::{Namespace, is_rootless, isolated};
use nfqnl_testkit::rules::{Hook, Rule};
use nfqnl_testkit::traffic::{TIMEOUT, Udp, V4};
use nfqnl_testkit::{kernel, socket, user};

use crate::lab::{
    Lab, PORT, QUEUE, configure_past_the_library, is_silent, next_event, next_packet, refusal,
    udp_payload,
};

/// What every refusal has: what was tried, the errno as source, what it means, and words that name it
#[track_caller]
fn expect_refusal(refusal: &Refusal, op: Operation, errno: i32, situation: Situation, word: &str) {
    assert_eq!(refusal.operation(), op);
    assert_eq!(refusal.errno(), errno);
    assert_eq!(refusal.situation(), situation);
    let source = refusal.source().unwrap().downcast_ref::<std::io::Error>();
    assert_eq!(source.and_then(std::io::Error::raw_os_error), Some(errno));
    let text = refusal.to_string();
    assert!(
        text.contains(word) && text.contains(&op.to_string()),
        "{text}"
    );
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
fn the_socket_is_closed_on_exec_and_its_buffer_is_as_wanted() {
    isolated(|| {
        let default = Handle::open().unwrap();
        assert!(socket::is_cloexec(&default).unwrap());
        assert_eq!(default.fd(), default.as_fd().as_raw_fd());
        let wanted = 1 << 16;
        let small = Handle::builder().recv_buffer(wanted).open().unwrap();
        assert_eq!(
            small.recv_buffer().unwrap(),
            2 * wanted,
            "the kernel doubles it"
        );
        assert_ne!(default.recv_buffer().unwrap(), 2 * wanted);
        let huge = Handle::builder().recv_buffer(1 << 30).open().unwrap();
        let got = huge.recv_buffer().unwrap();
        if is_rootless() {
            assert!(
                got < 1 << 30,
                "beyond the limit only the machine's root goes: {got}"
            );
        } else {
            assert!(got >= 1 << 30, "root goes beyond the limit: {got}");
        }
    });
}

/// EPERM
#[test]
fn without_privilege_every_request_is_refused() {
    isolated(|| {
        let lab = Lab::new();
        let owner = Handle::open().unwrap();
        let queue = owner.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"held");
        let key = next_packet(&owner, &mut batch).key();
        let not_permitted = |refusal: &Refusal, op| {
            expect_refusal(
                refusal,
                op,
                libc::EPERM,
                Situation::NotPermitted,
                "CAP_NET_ADMIN",
            );
        };
        user::without_net_admin(|| {
            let handle = Handle::open().expect("opening takes no privilege");
            let op = Operation::BindPf(Family::INET);
            not_permitted(&refusal(handle.bind_pf(Family::INET)), op);
            not_permitted(&refusal(handle.bind_queue(7)), Operation::Bind(7));
            not_permitted(&refusal(handle.sync()), Operation::Sync);
            // As for a process that has dropped its privileges after binding.
            let op = Operation::SetMaxlen(QUEUE);
            not_permitted(&refusal(queue.set_maxlen(5)), op);
            owner.verdict(key, Verdict::Accept).unwrap();
        });
        match next_event(&owner, &mut batch) {
            nfqnl::Event::Refused(refusal) => not_permitted(&refusal, Operation::Verdict(key)),
            other => panic!("no refusal, but {other:?}"),
        }
        owner.verdict(key, Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"held"[..]));
    });
}

#[test]
fn who_opened_the_socket_needs_the_privilege_too() {
    isolated(|| {
        let handle = user::without_net_admin(|| Handle::open().unwrap());
        let op = Operation::Bind(QUEUE);
        let refusal = refusal(handle.bind_queue(QUEUE));
        let situation = Situation::NotPermitted;
        expect_refusal(&refusal, op, libc::EPERM, situation, "CAP_NET_ADMIN");
        drop(Handle::open().unwrap().bind_queue(QUEUE).unwrap());
    });
}

/// EPERM again
#[test]
fn a_queue_of_another_owner_is_refused_until_it_is_free() {
    isolated(|| {
        let lab = Lab::new();
        let owner = Handle::open().unwrap();
        let queue = owner.bind_queue(QUEUE).unwrap();
        let other = Handle::open().unwrap();
        let refused = refusal(other.bind_queue(QUEUE));
        let op = Operation::Bind(QUEUE);
        expect_refusal(
            &refused,
            op,
            libc::EPERM,
            Situation::NotPermitted,
            "another process",
        );
        queue.destroy().unwrap();
        let _queue = other.bind_queue(QUEUE).expect("it is free now");
        lab.send(b"for the new owner");
        let mut batch = RecvBatch::default();
        let packet = next_packet(&other, &mut batch);
        assert_eq!(udp_payload(&packet), b"for the new owner");
        assert!(is_silent(&owner, &mut RecvBatch::default()));
    });
}

/// EBUSY
#[test]
fn a_queue_that_this_handle_has_is_refused_and_goes_on() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"before");
        let key = next_packet(&handle, &mut batch).key();
        let refused = refusal(handle.bind_queue(QUEUE));
        let op = Operation::Bind(QUEUE);
        expect_refusal(
            &refused,
            op,
            libc::EBUSY,
            Situation::AlreadyBound,
            "already bound",
        );
        handle.verdict(key, Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"before"[..]));
        lab.send(b"after");
        assert_eq!(udp_payload(&next_packet(&handle, &mut batch)), b"after");
    });
}

/// ENODEV: something else has unbound the queue, through a copy of the descriptor
#[test]
fn a_queue_that_was_unbound_elsewhere_is_not_bound_and_can_be_bound_again() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let mut batch = RecvBatch::default();
        let queue = handle.bind_queue(QUEUE).unwrap();
        lab.send(b"lost");
        let old = next_packet(&handle, &mut batch).key();
        configure_past_the_library(&handle, &ConfigRequest::unbind(QUEUE));
        let refused = refusal(queue.set_maxlen(5));
        let op = Operation::SetMaxlen(QUEUE);
        expect_refusal(&refused, op, libc::ENODEV, Situation::NotBound, "not bound");
        handle.verdict(old, Verdict::Accept).unwrap();
        match next_event(&handle, &mut batch) {
            nfqnl::Event::Refused(refusal) => {
                assert_eq!(refusal.packet(), Some(old));
                assert_eq!(refusal.situation(), Situation::NotBound);
            }
            other => panic!("no refusal, but {other:?}"),
        }

        let _again = handle.bind_queue(QUEUE).expect("a new binding");
        lab.send(b"held");
        let new = next_packet(&handle, &mut batch).key();
        assert_eq!((old.id, new.id), (1, 1), "the ids began anew");
        let error = handle.verdict(old, Verdict::Drop).unwrap_err();
        assert!(
            matches!(error, Error::Stale { key, .. } if key == old),
            "{error}"
        );
        // The old binding's queue neither changes nor ends the new one.
        let error = queue.set_maxlen(5).unwrap_err();
        assert!(matches!(error, Error::Ended { .. }), "{error}");
        drop(queue);
        handle.verdict(new, Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"held"[..]));
    });
}

/// As the documentation of `HandleBuilder::recv_buffer` has it
#[test]
fn a_receive_buffer_of_the_usual_size_holds_so_many_small_packets() {
    isolated(|| {
        const USUAL: usize = 212_992;
        let lab = Lab::new();
        let handle = Handle::builder().recv_buffer(USUAL / 2).open().unwrap();
        assert_eq!(handle.recv_buffer().unwrap(), USUAL);
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let sockets = [(); 2].map(|()| Udp::bind(V4, 0).unwrap()); // One's send buffer has no room for so many.
        for _ in 0..150 {
            for socket in &sockets {
                socket.send(b"small", lab.v4.address()).unwrap();
            }
        }
        let mut batch = RecvBatch::default();
        let mut count = 0;
        loop {
            match handle.try_recv(&mut batch).unwrap().packets().count() {
                0 => break,
                some => count += some,
            }
        }
        // Where a CPU's cache has lines of 256 bytes, each message takes more.
        if cfg!(target_arch = "s390x") {
            assert!((130..=180).contains(&count), "{count}");
        } else {
            assert!((237..=277).contains(&count), "{count}");
            assert_eq!(count == 277, !kernel::is_at_least(6, 2), "{count}");
        }
    });
}

/// EOPNOTSUPP, and EINVAL since Linux 7.2, whose netlink policy knows them
#[test]
fn flags_that_the_kernel_does_not_know_are_refused_and_nothing_is_bound() {
    isolated(|| {
        let unknown = ConfigFlags::from_bits_retain(1 << 30);
        let expected = if kernel::is_at_least(7, 2) {
            (libc::EINVAL, Situation::Invalid)
        } else {
            (libc::EOPNOTSUPP, Situation::Unsupported)
        };
        let handle = Handle::open().unwrap();
        let config = QueueConfig::new().flags(unknown, unknown);
        let refused = refusal(handle.bind_queue_with(QUEUE, &config));
        assert_eq!(refused.operation(), Operation::Bind(QUEUE));
        assert_eq!((refused.errno(), refused.situation()), expected);
        assert!(refused.to_string().contains("flag"), "{refused}");

        let other = Handle::open().unwrap();
        let queue = other.bind_queue(QUEUE).expect("nobody has it");
        let refused = refusal(queue.set_flags(unknown, unknown));
        assert_eq!(refused.operation(), Operation::SetFlags(QUEUE));
        assert_eq!((refused.errno(), refused.situation()), expected);
    });
}

/// EOPNOTSUPP where the kernel was built without `NETLINK_GLUE_CT`, and conntrack attributes where it was not
#[test]
fn conntrack_is_told_or_refused() {
    isolated(|| {
        /// `CTA_TUPLE_ORIG` (`linux/netfilter/nfnetlink_conntrack.h`)
        const TUPLE_ORIG: u16 = 1;
        /// `IP_CT_NEW` (`linux/netfilter/nf_conntrack_common.h`)
        const NEW: u32 = 2;
        // Whatever comes through this rule is tracked.
        let rule = Rule::new().udp().dport(PORT).new_connection().queue(QUEUE);
        let lab = Lab::with(Hook::Input, &rule);
        let handle = Handle::open().unwrap();
        let queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"nobody asked");
        let packet = next_packet(&handle, &mut batch);
        assert_eq!((packet.conntrack(), packet.conntrack_info()), (None, None));
        // What a socket sends to itself is an answer to what it has sent before.
        let other = Udp::bind(V4, 0).unwrap();

        let told = match queue.set_flags(ConfigFlags::CONNTRACK, ConfigFlags::CONNTRACK) {
            Ok(()) => {
                other.send(b"tracked", lab.v4.address()).unwrap();
                let packet = next_packet(&handle, &mut batch);
                assert_eq!(packet.conntrack_info(), Some(NEW));
                let mut entry = Attrs::new(packet.conntrack().unwrap());
                let original = entry.next().unwrap().unwrap();
                assert_eq!(original.kind, TUPLE_ORIG);
                let (port, localhost) = (PORT.to_be_bytes(), [127, 0, 0, 1]);
                assert!(original.value.windows(2).any(|bytes| bytes == port));
                assert!(original.value.windows(4).any(|bytes| bytes == localhost));
                true
            }
            refused => {
                expect_refusal(
                    &refusal(refused),
                    Operation::SetFlags(QUEUE),
                    libc::EOPNOTSUPP,
                    Situation::Unsupported,
                    "nf_conntrack_netlink",
                );
                false
            }
        };
        if let Some(has_glue) = kernel::has_function("ctnetlink_glue_build") {
            assert_eq!(told, has_glue);
        }
    });
}

/// Told of packets that a SECMARK rule has labelled, which there is none of in a new namespace; refused where the
/// kernel has no such labels
#[test]
fn security_contexts_are_absent_without_a_label_or_refused() {
    isolated(|| {
        let lab = Lab::with(Hook::Output, &Rule::new().udp().dport(PORT).queue(QUEUE));
        let handle = Handle::open().unwrap();
        let queue = handle.bind_queue(QUEUE).unwrap();
        match queue.set_flags(ConfigFlags::SECCTX, ConfigFlags::SECCTX) {
            Ok(()) => {
                lab.send(b"not labelled");
                let mut batch = RecvBatch::default();
                let packet = next_packet(&handle, &mut batch);
                assert_eq!(packet.security_context(), None);
                assert_eq!(udp_payload(&packet), b"not labelled");
            }
            refused => {
                assert!(!kernel::is_complete(), "{refused:?}");
                expect_refusal(
                    &refusal(refused),
                    Operation::SetFlags(QUEUE),
                    libc::EOPNOTSUPP,
                    Situation::Unsupported,
                    "NETWORK_SECMARK",
                );
            }
        }
    });
}

/// At OUTPUT, where each setting shows: the range, the length, and all three flags
#[test]
fn all_settings_go_with_the_binding_in_one_message() {
    isolated(|| {
        const RANGE: u32 = 50;
        const LEN: u32 = 100;
        let lab = Lab::with(Hook::Output, &Rule::new().udp().dport(PORT).queue(QUEUE));
        let handle = Handle::open().unwrap();
        let flags = ConfigFlags::FAIL_OPEN | ConfigFlags::GSO | ConfigFlags::UID_GID;
        let config = QueueConfig::new()
            .copy_mode(CopyMode::PACKET, RANGE)
            .maxlen(3)
            .flags(flags, flags);
        let _queue = handle.bind_queue_with(QUEUE, &config).unwrap();
        let payloads = [0, 1, 2, 3, 4].map(|number| [number; LEN as usize]);
        for payload in &payloads {
            lab.send(payload);
        }
        // Fail-open: what found no room went on.
        for payload in &payloads[3..] {
            assert_eq!(lab.recv().as_deref(), Some(&payload[..]));
        }
        let mut batch = RecvBatch::default();
        for payload in &payloads[..3] {
            let packet = next_packet(&handle, &mut batch);
            assert_eq!(packet.payload().len(), RANGE as usize);
            assert!(packet.payload().ends_with(&payload[..RANGE as usize - 28]));
            assert_eq!(packet.capture_len(), Some(28 + LEN));
            assert!(packet.uid().is_some() && packet.gid().is_some());
            // Without GSO the kernel would have completed the checksum.
            assert_eq!(packet.skb_info(), SkbInfo::CSUM_NOT_READY);
        }
        assert!(is_silent(&handle, &mut batch));
    });
}

#[test]
fn maxlen_limits_what_waits_and_zero_is_refused() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        queue.set_maxlen(2).unwrap();
        lab.send_numbered(0..4);
        let keys = [(); 2].map(|()| next_packet(&handle, &mut batch).key());
        assert!(is_silent(&handle, &mut batch), "two were dropped");
        for error in [
            queue.set_maxlen(0).unwrap_err(),
            handle
                .bind_queue_with(9, &QueueConfig::new().maxlen(0))
                .unwrap_err(),
        ] {
            assert!(matches!(error, Error::ZeroMaxlen { .. }), "{error}");
            assert!(error.to_string().contains("drop every packet"), "{error}");
        }
        for key in keys {
            handle.verdict(key, Verdict::Accept).unwrap();
        }
        lab.send(b"room again");
        assert_eq!(
            udp_payload(&next_packet(&handle, &mut batch)),
            b"room again"
        );
    });
}

#[test]
fn a_copy_mode_that_the_kernel_would_silently_ignore_is_refused() {
    isolated(|| {
        let handle = Handle::open().unwrap();
        let queue = handle.bind_queue(QUEUE).unwrap();
        let error = queue.set_mode(CopyMode(3), 0).unwrap_err();
        assert!(
            matches!(
                error,
                Error::UnknownCopyMode {
                    queue: QUEUE,
                    mode: CopyMode(3),
                    ..
                }
            ),
            "{error}"
        );
    });
}

#[test]
fn flags_outside_the_mask_stay() {
    isolated(|| {
        let lab = Lab::with(Hook::Output, &Rule::new().udp().dport(PORT).queue(QUEUE));
        let handle = Handle::open().unwrap();
        let queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        queue
            .set_flags(ConfigFlags::UID_GID, ConfigFlags::UID_GID)
            .unwrap();
        queue
            .set_flags(ConfigFlags::GSO, ConfigFlags::empty())
            .unwrap();
        lab.send(b"whose");
        assert!(next_packet(&handle, &mut batch).uid().is_some());
    });
}

/// EMSGSIZE
#[test]
fn a_verdict_longer_than_the_send_buffer_is_an_error_and_the_packet_waits() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"waits");
        let key = next_packet(&handle, &mut batch).key();
        socket::set_send_buffer(&handle, 1).unwrap();
        let replaced = [0x45; 10_000];
        let error = handle
            .verdict(key, Verdict::Accept.with_payload(&replaced))
            .unwrap_err();
        assert!(
            matches!(&error, Error::Io { op: Operation::Verdict(of), source, .. }
                if *of == key && source.raw_os_error() == Some(libc::EMSGSIZE)),
            "{error:?}"
        );
        assert!(error.to_string().contains("send buffer"), "{error}");
        handle.verdict(key, Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"waits"[..]));
    });
}

#[test]
fn a_descriptor_from_another_namespace_serves_that_one() {
    isolated(|| {
        let there = Namespace::new().unwrap();
        let lab = there.run(Lab::new);
        let fd = there.run(netfilter_socket);
        let handle = Handle::builder().open_fd(fd).unwrap();
        assert!(socket::is_cloexec(&handle).unwrap());
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"over there");
        let packet = next_packet(&handle, &mut batch);
        assert_eq!(udp_payload(&packet), b"over there");
        handle.verdict(packet.key(), Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"over there"[..]));
        let here = Handle::open().unwrap();
        let _here = here.bind_queue(QUEUE).expect("here it is free");
    });
}

fn netfilter_socket() -> std::os::fd::OwnedFd {
    let socket = netlink_sys::Socket::new(libc::NETLINK_NETFILTER.try_into().unwrap()).unwrap();
    socket.as_fd().try_clone_to_owned().unwrap()
}

#[test]
fn a_descriptor_that_is_no_netfilter_socket_is_refused() {
    isolated(|| {
        let udp = std::net::UdpSocket::bind((V4, 0)).unwrap();
        let route = netlink_sys::Socket::new(libc::NETLINK_ROUTE.try_into().unwrap()).unwrap();
        let route = route.as_fd().try_clone_to_owned().unwrap();
        for fd in [udp.into(), route] {
            let error = Handle::builder().open_fd(fd).unwrap_err();
            assert!(matches!(error, Error::NotNetfilter { .. }), "{error}");
        }
        let file = std::fs::File::open("/dev/null").unwrap();
        let error = Handle::builder().open_fd(file.into()).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Io {
                    op: Operation::Open,
                    ..
                }
            ),
            "{error}"
        );
    });
}

#[test]
fn what_came_to_a_socket_before_it_was_taken_over_makes_it_readable() {
    isolated(|| {
        let protocol = libc::NETLINK_NETFILTER.try_into().unwrap();
        let socket = netlink_sys::Socket::new(protocol).unwrap();
        let mut buf = [0; BatchVerdict::MAX_LEN];
        let header = RequestHeader::default();
        let verdict = BatchVerdict::new(Verdict::Accept);
        let len = verdict.encode_single(&mut buf, QUEUE, 1, header).unwrap();
        socket.send(&buf[..len], 0).unwrap(); // refused: the queue is not bound
        let handle = Handle::builder()
            .open_fd(socket.as_fd().try_clone_to_owned().unwrap())
            .unwrap();
        let (mut batch, deadline) = (RecvBatch::default(), Instant::now() + TIMEOUT);
        let poll = rustix::event::PollFd::new(&handle, rustix::event::PollFlags::IN);
        assert_eq!(rustix::event::poll(&mut [poll], None).unwrap(), 1);
        let mut events = handle.recv_deadline(&mut batch, deadline).unwrap();
        assert!(matches!(events.next(), Some(Event::Refused(_))));
    });
}
