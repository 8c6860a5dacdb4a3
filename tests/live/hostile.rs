//! What other code and other processes can do to a handle's socket, and bytes that no kernel sends

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::process::Stdio;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use netlink_sys::{Socket, SocketAddr};
use nfqnl::consts::{
    MESSAGE_HEADER_LEN, NFQA_MARK, NFQA_PACKET_HDR, NFQA_PAYLOAD, NFQA_VLAN, NFQNL_MSG_CONFIG,
    NFQNL_MSG_PACKET, NFQNL_MSG_VERDICT, NFQNL_MSG_VERDICT_BATCH, NLM_F_CAPPED, NLMSG_DONE,
    NLMSG_ERROR, NLMSG_NOOP, NLMSG_OVERRUN, message_type,
};
use nfqnl::proto::ConfigRequest;
use nfqnl::{
    CopyMode, Error, Event, Family, Handle, Operation, Queue, QueueConfig, QueueData, RecvBatch,
    Situation, Stats, Verdict,
};
use nfqnl_testkit::cpu;
use nfqnl_testkit::netns::{isolated, part, part_in_another_process};
use nfqnl_testkit::socket;
use rustix::event::{PollFd, PollFlags};

use crate::common::{MessageBuilder, datagram, wire};
use crate::lab::{
    Lab, QUEUE, configure_past_the_library, is_free, is_silent, next_packet, recv_past_the_library,
    refusal, udp_payload,
};

/// A packet of a queue, as the kernel would send it
fn packet(queue: u16, id: u32) -> MessageBuilder {
    let header = wire![id.to_be_bytes(), [8, 0, 1]];
    MessageBuilder::packet(Family::INET, queue).attr(NFQA_PACKET_HDR, header)
}

/// The kernel's answer to a request: 0 or a negative error number
fn answer(code: i32, kind: u16, seq: u32, pid: u32) -> Vec<u8> {
    let request = wire![16_u32, kind, 5_u16, seq, pid];
    MessageBuilder::error(NLM_F_CAPPED, code, &request).build()
}

/// Everything that a handle would believe if the kernel said it: packets, answers to its first requests, refusals of
/// verdicts on its first packets, losses; and what is no message at all
fn forgeries() -> Vec<Vec<u8>> {
    let config = message_type(NFQNL_MSG_CONFIG);
    let mut all = vec![
        packet(QUEUE, 1).attr(NFQA_PAYLOAD, b"forged").build(),
        packet(QUEUE + 1, 1).build(),
        MessageBuilder::new(NLMSG_OVERRUN, 0).build(),
        MessageBuilder::new(NLMSG_NOOP, 0).build(),
        MessageBuilder::new(NLMSG_DONE, 0).field(0_i32).build(),
        MessageBuilder::new(NLMSG_ERROR, 0).build(),
        vec![7, 0, 0],
        vec![0; 64],
        vec![0xff; 64],
    ];
    for seq in 1..=4 {
        for kind in [config, NLMSG_NOOP] {
            all.extend([-libc::EPERM, 0].map(|code| answer(code, kind, seq, 0)));
        }
        let binding = 1_u32;
        let pid = binding << 16 | u32::from(QUEUE);
        for message in [NFQNL_MSG_VERDICT, NFQNL_MSG_VERDICT_BATCH] {
            all.push(answer(-libc::ENOENT, message_type(message), seq, pid));
        }
    }
    all
}

fn netfilter_socket() -> Socket {
    Socket::new(libc::NETLINK_NETFILTER.try_into().unwrap()).unwrap()
}

/// Starts a process that forges messages: part `how` of [`forge`]
fn forger(how: &str, port: u32, stdin: impl Into<Stdio>) -> std::process::Child {
    part_in_another_process(&format!("{how} {port}"), stdin).unwrap()
}

#[track_caller]
fn wait_for(mut forger: std::process::Child) {
    assert!(forger.wait().unwrap().success());
}

/// Does the part of a test that another process has, if this is one
///
/// "once" sends every forgery; "refused" finds that none can be sent; "from a copy" finds the same with a copy of the
/// handle's own descriptor; "to the groups" sends to whoever is in a multicast group; "for ever" until it is killed.
fn forge() -> bool {
    let Some(part) = part() else {
        return false;
    };
    let (how, port) = part.rsplit_once(' ').unwrap();
    let to = SocketAddr::new(port.parse().unwrap(), 0);
    let socket = match how {
        "from a copy" => socket::netlink(io::stdin().as_fd().try_clone_to_owned().unwrap()),
        _ => netfilter_socket(),
    };
    let all = forgeries();
    let send =
        |message: &[u8], to: &SocketAddr| match socket.send_to(message, to, libc::MSG_DONTWAIT) {
            Ok(_) => 0,
            Err(error) => error.raw_os_error().unwrap(),
        };
    match how {
        "once" => assert!(all.iter().all(|message| send(message, &to) == 0)),
        "refused" | "from a copy" => {
            for message in all.iter().cycle().take(100 * all.len()) {
                assert_eq!(send(message, &to), libc::ECONNREFUSED);
            }
        }
        "to the groups" => {
            for group in 0..u32::BITS {
                let members = SocketAddr::new(0, 1 << group);
                // ESRCH: nobody is in it.
                assert!(
                    all.iter()
                        .all(|m| [0, libc::ESRCH].contains(&send(m, &members)))
                );
            }
        }
        _ => loop {
            for message in &all {
                send(message, &to);
            }
        },
    }
    true
}

/// What a handle has counted that has heard the kernel alone, and nothing but acknowledgements
fn nothing_but(foreign: u64) -> Stats {
    let mut stats = Stats::default();
    stats.foreign = foreign;
    stats
}

/// Makes each kind of request once, which all succeed, and finds nothing to receive but so many messages of others
#[track_caller]
fn expect_the_kernel_alone(handle: &Handle, foreign: RangeInclusive<u64>) -> Queue {
    let queue = handle.bind_queue(QUEUE).unwrap();
    queue.set_maxlen(10).unwrap();
    handle.bind_pf(Family::INET).unwrap();
    handle.sync().unwrap();
    assert!(is_silent(handle, &mut RecvBatch::default()));
    let stats = handle.stats();
    assert!(foreign.contains(&stats.foreign), "{stats:?}");
    assert_eq!(stats, nothing_but(stats.foreign));
    queue
}

/// A packet of the kernel's comes out and goes on
#[track_caller]
fn expect_a_packet(lab: &Lab, handle: &Handle) {
    lab.send(b"of the kernel");
    let mut batch = RecvBatch::default();
    let packet = next_packet(handle, &mut batch);
    assert_eq!(
        (packet.id(), udp_payload(&packet)),
        (1, &b"of the kernel"[..])
    );
    handle.verdict(packet.key(), Verdict::Accept).unwrap();
    assert_eq!(lab.recv().as_deref(), Some(&b"of the kernel"[..]));
    assert!(is_silent(handle, &mut batch));
}

#[test]
fn what_another_process_forged_before_a_socket_was_taken_over_is_counted_and_nothing_more() {
    isolated(|| {
        if forge() {
            return;
        }
        let lab = Lab::new();
        let mut victim = netfilter_socket();
        let port = victim.bind_auto().unwrap().port_number();
        wait_for(forger("once", port, Stdio::null()));
        let fd = victim.as_fd().try_clone_to_owned().unwrap();
        drop(victim);
        let handle = Handle::builder().open_fd(fd).unwrap();
        let foreign = u64::try_from(forgeries().len()).unwrap();
        let _queue = expect_the_kernel_alone(&handle, foreign..=foreign);
        expect_a_packet(&lab, &handle);
    });
}

#[test]
fn another_process_can_not_send_to_a_handle_nor_answer_its_requests() {
    isolated(|| {
        if forge() {
            return;
        }
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let port = socket::netlink_port(&handle).unwrap();
        let mut forger = forger("refused", port, Stdio::null());
        let queue = expect_the_kernel_alone(&handle, 0..=0);
        while forger.try_wait().unwrap().is_none() {
            queue.set_maxlen(10).unwrap();
        }
        wait_for(forger);
        assert!(is_silent(&handle, &mut RecvBatch::default()));
        assert_eq!(handle.stats(), nothing_but(0));
        expect_a_packet(&lab, &handle);
    });
}

/// Who has that can do what the handle can, but not play the kernel
#[test]
fn nor_can_a_copy_of_the_descriptor_in_another_process() {
    isolated(|| {
        if forge() {
            return;
        }
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let port = socket::netlink_port(&handle).unwrap();
        let copy = handle.as_fd().try_clone_to_owned().unwrap();
        wait_for(forger("from a copy", port, copy));
        let _queue = expect_the_kernel_alone(&handle, 0..=0);
        expect_a_packet(&lab, &handle);
    });
}

/// Also by a group that the socket was in before
#[test]
fn nor_can_multicast_of_another_process() {
    isolated(|| {
        if forge() {
            return;
        }
        let lab = Lab::new();
        for has_port in [false, true] {
            let mut member = netfilter_socket();
            if has_port {
                member.bind_auto().unwrap();
            }
            for group in 1..=u32::BITS {
                // Not all of these exist.
                let _ = member.add_membership(group);
            }
            let fd = member.as_fd().try_clone_to_owned().unwrap();
            wait_for(forger("to the groups", 0, Stdio::null()));
            let handle = Handle::builder().open_fd(fd).unwrap();
            let foreign = handle.stats().foreign;
            // Without a port it hears nobody yet.
            assert_eq!(foreign > 0, has_port);
            wait_for(forger("to the groups", 0, Stdio::null()));
            let _queue = expect_the_kernel_alone(&handle, foreign..=foreign);
            expect_a_packet(&lab, &handle);
        }
    });
}

/// As what was on its way when the socket was connected, which nothing can time; for two seconds each sender is looked at
#[test]
fn what_comes_late_from_another_process_is_counted_and_nothing_more() {
    isolated(|| {
        if forge() {
            return;
        }
        let foreign = u64::try_from(forgeries().len()).unwrap();
        loop {
            let begin = Instant::now();
            let handle = Handle::open().unwrap();
            let port = socket::netlink_port(&handle).unwrap();
            rustix::net::connect_unspec(&handle).unwrap();
            // By a request, and by receiving
            wait_for(forger("once", port, Stdio::null()));
            let synced = handle.sync();
            wait_for(forger("once", port, Stdio::null()));
            let is_silent = is_silent(&handle, &mut RecvBatch::default());
            if begin.elapsed() < Duration::from_secs(2) {
                synced.unwrap();
                assert!(is_silent);
                assert_eq!(handle.stats(), nothing_but(2 * foreign));
                return;
            }
        }
    });
}

/// What is sent between any two steps of opening is thrown away, then or when it comes
#[test]
fn handles_that_are_opened_under_fire_hear_the_kernel_alone() {
    isolated(|| {
        if forge() {
            return;
        }
        let lab = Lab::new();
        // The first netlink socket of a process has its number for a port.
        let port = std::process::id();
        let mut forgers = [(); 2].map(|()| forger("for ever", port, Stdio::null()));
        let end = Instant::now() + Duration::from_secs(1);
        let mut is_taken_over = false;
        while !is_taken_over || Instant::now() < end {
            is_taken_over = !is_taken_over;
            let handle = if is_taken_over {
                let mut socket = netfilter_socket();
                socket.bind_auto().unwrap();
                let poll = PollFd::new(&socket, PollFlags::IN);
                assert_eq!(rustix::event::poll(&mut [poll], None).unwrap(), 1);
                let fd = socket.as_fd().try_clone_to_owned().unwrap();
                Handle::builder().open_fd(fd).unwrap()
            } else {
                Handle::open().unwrap()
            };
            assert_eq!(socket::netlink_port(&handle).unwrap(), port);
            let foreign = handle.stats().foreign;
            assert!(foreign > 0 || !is_taken_over);
            // Those that were being sent while it was connected may come later.
            let late = foreign + u64::try_from(forgers.len()).unwrap();
            let _queue = expect_the_kernel_alone(&handle, foreign..=late);
            expect_a_packet(&lab, &handle);
        }
        for forger in &mut forgers {
            forger.kill().unwrap();
        }
    });
}

/// What comes of a broken datagram: an error, and whether it names the packet, or nothing but a count
#[derive(Clone, Copy, Debug, PartialEq)]
enum Found {
    Malformed { names_packet: bool },
    Truncated { names_packet: bool },
    Discarded,
    Overrun,
    Nothing,
}

/// Each breaks another rule, and whether the messages behind it can't be found
fn broken_datagrams() -> Vec<(Vec<u8>, Found, bool)> {
    const PACKET: u16 = message_type(NFQNL_MSG_PACKET);
    // The id that the last packet had, so that none seems to be missing
    let good = |queue| packet(queue, 1);
    let no_mark = |queue, len: u16| good(queue).field([0]).field(wire![len, NFQA_MARK, [0; 4]]);
    let noop = MessageBuilder::new(NLMSG_NOOP, 0).build();
    let with_len = |len: u32, message: &[u8]| wire![len, message[4..]];
    let whole = good(QUEUE).attr(NFQA_PAYLOAD, [0; 64]).build();
    let malformed = |names_packet| Found::Malformed { names_packet };
    let truncated = |names_packet| Found::Truncated { names_packet };

    let mut all = Vec::new();
    for len in 1..MESSAGE_HEADER_LEN {
        all.push((vec![0; len], malformed(false), true));
    }
    for len in 0..16 {
        all.push((with_len(len, &noop), malformed(false), true));
        all.push((with_len(len, &whole), malformed(true), true));
    }
    for len in [1 << 20, u32::MAX - 3, u32::MAX] {
        all.push((with_len(len, &noop), truncated(false), true));
        all.push((with_len(len, &whole), truncated(true), true));
    }
    // Of an attribute behind the packet's header, and of that itself
    for len in [0, 1, 2, 3, 9, u16::MAX] {
        all.push((no_mark(QUEUE, len).build(), malformed(true), false));
        all.push((no_mark(QUEUE + 1, len).build(), Found::Discarded, false));
        let header = MessageBuilder::packet(Family::INET, QUEUE);
        let header = header.field(wire![len, NFQA_PACKET_HDR, [0; 4]]);
        all.push((header.build(), malformed(false), false));
    }
    let empty = MessageBuilder::packet(Family::INET, QUEUE);
    let vlan = good(QUEUE).attr(NFQA_VLAN, wire![9_u16, 1_u16, [0; 4]]);
    let twice = good(QUEUE).attr(NFQA_MARK, [0; 4]).attr(NFQA_MARK, [0; 3]);
    all.extend([
        (
            MessageBuilder::new(PACKET, 0).build(),
            malformed(false),
            false,
        ),
        (empty.build(), malformed(false), false),
        (vlan.build(), malformed(true), false),
        (twice.build(), malformed(true), false),
        (
            MessageBuilder::new(NLMSG_ERROR, 0).build(),
            malformed(false),
            false,
        ),
        (good(QUEUE + 1).build(), Found::Discarded, false),
        (
            MessageBuilder::new(NLMSG_OVERRUN, 0).build(),
            Found::Overrun,
            false,
        ),
        (
            MessageBuilder::new(NLMSG_DONE, 0).build(),
            Found::Nothing,
            false,
        ),
        (
            MessageBuilder::new(u16::MAX, u16::MAX).build(),
            Found::Nothing,
            false,
        ),
        (noop, Found::Nothing, false),
    ]);
    for (kind, seq) in [(PACKET, 1), (message_type(NFQNL_MSG_CONFIG), 1), (0, 0)] {
        all.push((answer(-libc::EPERM, kind, seq, 0), Found::Nothing, false));
    }
    all
}

/// By what the call says, and by what it has counted
fn found(result: &nfqnl::Result<usize>, before: Stats, after: Stats) -> Found {
    let counts = [
        after.malformed - before.malformed,
        after.truncated - before.truncated,
        after.discarded - before.discarded,
        after.overruns - before.overruns,
    ];
    match (result, counts) {
        (Err(Error::Decode { key, .. }), [1, 0, 0, 0]) => Found::Malformed {
            names_packet: key.is_some(),
        },
        (Err(Error::Truncated { key, .. }), [0, 1, 0, 0]) => Found::Truncated {
            names_packet: key.is_some(),
        },
        (Ok(0), [0, 0, 1, 0]) => Found::Discarded,
        (Ok(0), [0, 0, 0, 1]) => Found::Overrun,
        (Ok(0), [0, 0, 0, 0]) => Found::Nothing,
        _ => panic!("{result:?}, counted {counts:?}"),
    }
}

/// The packet that waits in the kernel meanwhile, those around it in one datagram, and those passed on later
#[test]
fn a_broken_datagram_is_an_error_or_skipped_and_loses_no_packet() {
    isolated(|| {
        let lab = Lab::new();
        let mut handle = nfqnl::open().unwrap();
        let (send, seen) = mpsc::channel();
        let config = QueueConfig::new().copy_mode(CopyMode::PACKET, 0);
        let _queue = handle
            .create_queue_with(QUEUE, &config, move |data| {
                send.send(udp_payload(data.packet()).to_vec()).unwrap();
                data.set_verdict(Verdict::Accept, None);
            })
            .unwrap();
        for (broken, expected, is_end) in broken_datagrams() {
            let what = format!("{expected:?} in {broken:?}");
            lab.send(b"waits");
            let before = handle.stats();
            let result = handle.handle_packet(&broken);
            assert_eq!(found(&result, before, handle.stats()), expected, "{what}");
            let waits = recv_past_the_library(&handle);
            assert_eq!(handle.handle_packet(&waits).unwrap(), 1, "{what}");

            let [front, behind] = [b"front" as &[u8], b"behind"].map(|payload| {
                lab.send(payload);
                recv_past_the_library(&handle)
            });
            let around = handle.handle_packet(&datagram([&front, &broken, &behind]));
            assert_eq!(around.is_err(), result.is_err(), "{what}");
            if is_end {
                assert_eq!(handle.handle_packet(&behind).unwrap(), 1, "{what}");
            } else if let Ok(packets) = around {
                assert_eq!(packets, 2, "{what}");
            }
            for payload in [b"waits" as &[u8], b"front", b"behind"] {
                assert_eq!(seen.try_recv().as_deref(), Ok(payload), "{what}");
                assert_eq!(lab.recv().as_deref(), Some(payload), "{what}");
            }
            assert!(seen.try_recv().is_err(), "{what}");
        }
        assert_eq!(handle.stats().refused_verdicts, 0);
        assert!(is_silent(&handle, &mut RecvBatch::default()));
    });
}

/// Neither do packets pile up in here that nobody receives: the kernel holds each until it is answered, and no more than its
/// limit
#[test]
fn what_requests_keep_for_later_is_no_more_than_may_wait() {
    isolated(|| {
        const MAXLEN: u32 = 50;
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let queue = handle.bind_queue(QUEUE).unwrap();
        for _ in 0..20 {
            queue.set_maxlen(MAXLEN).unwrap();
            lab.send_numbered(0..2 * MAXLEN);
        }
        handle.sync().unwrap();
        assert_eq!(handle.stats().packets, u64::from(MAXLEN));
        let mut batch = RecvBatch::default();
        for number in 0..MAXLEN {
            let packet = next_packet(&handle, &mut batch);
            assert_eq!(udp_payload(&packet), number.to_be_bytes());
        }
        assert!(is_silent(&handle, &mut batch));
    });
}

/// A handle whose callback accepts everything
fn accepting() -> (Handle, Queue) {
    let mut handle = nfqnl::open().unwrap();
    let config = QueueConfig::new().copy_mode(CopyMode::PACKET, 0);
    let accept = |data: &mut QueueData<'_>| data.set_verdict(Verdict::Accept, None);
    let queue = handle.create_queue_with(QUEUE, &config, accept).unwrap();
    (handle, queue)
}

/// Far more than any kernel sends: the time that it takes grows with their number, and not with its square
#[test]
fn a_datagram_of_very_many_messages_is_dealt_with_in_time() {
    isolated(|| {
        const FEW: usize = 1 << 13;
        const TIMES: usize = 16;
        const ATTEMPTS: usize = 10;
        let lab = Lab::new();
        let (mut handle, _queue) = accepting();
        let mut best = |number| {
            let rounds = [(); 3].map(|()| {
                lab.send(b"behind them all");
                let packet = recv_past_the_library(&handle);
                let overruns = MessageBuilder::new(NLMSG_OVERRUN, 0).build().repeat(number);
                let before = handle.stats().overruns;
                let datagram = datagram([overruns, packet]);
                let begin = cpu::time();
                let handled = handle.handle_packet(&datagram);
                let took = cpu::time() - begin;
                assert_eq!(handled.unwrap(), 1);
                let counted = handle.stats().overruns - before;
                assert_eq!(usize::try_from(counted), Ok(number));
                assert_eq!(lab.recv().as_deref(), Some(&b"behind them all"[..]));
                took
            });
            rounds.into_iter().min().unwrap()
        };
        // Midway, on a logarithmic scale
        let limit = (TIMES as f64).powf(1.5);
        // In a virtual machine the time that others have the CPU counts as well.
        let is_linear = (0..ATTEMPTS).any(|_| {
            let (few, many) = (best(FEW), best(TIMES * FEW));
            eprintln!("{few:?}, and {many:?} for {TIMES} times as many");
            many.as_secs_f64() / few.as_secs_f64() < limit
        });
        assert!(is_linear, "more than linear in every attempt");
    });
}

/// The second time it is gone, which is no more than a refusal
#[test]
fn a_datagram_that_is_passed_on_twice_is_answered_once() {
    isolated(|| {
        let lab = Lab::new();
        let (mut handle, _queue) = accepting();
        for refused in 1..3 {
            lab.send(b"once");
            let datagram = recv_past_the_library(&handle);
            for _ in 0..2 {
                assert_eq!(handle.handle_packet(&datagram).unwrap(), 1);
            }
            let answer = recv_past_the_library(&handle);
            assert_eq!(handle.handle_packet(&answer).unwrap(), 0);
            assert_eq!(handle.stats().refused_verdicts, refused);
            assert_eq!(lab.recv().as_deref(), Some(&b"once"[..]));
            assert!(lab.v4.is_silent());
        }
    });
}

/// Whatever has become of the queue in the kernel, which the answer would have told
#[test]
fn a_lost_answer_to_a_binding_leaves_no_key_from_before_that_hits_a_later_packet() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::builder().recv_buffer(1 << 14).open().unwrap();
        let before = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"before");
        let old = next_packet(&handle, &mut batch).key();
        configure_past_the_library(&handle, &ConfigRequest::unbind(QUEUE));
        for num in [QUEUE, QUEUE + 1] {
            // Refused each, until the receive buffer has no room for more answers.
            for _ in 0..200 {
                handle.verdict(old, Verdict::Accept).unwrap();
            }
            let error = handle.bind_queue(num).unwrap_err();
            let op = Operation::Bind(num);
            assert!(
                matches!(error, Error::NoAck { op: of, .. } if of == op),
                "{error:?}"
            );
            while !is_silent(&handle, &mut batch) {}
            assert!(is_free(num), "the handle has given it up");
        }
        let set = before.set_mode(CopyMode::PACKET, 0);
        lab.send(b"of a later binding, if there is one");
        while let Some(event) = handle.try_recv(&mut batch).unwrap().next() {
            if let Event::Packet(packet) = event {
                assert_ne!(packet.key(), old, "an earlier packet's key");
            }
        }
        assert_eq!(refusal(set).situation(), Situation::NotBound);

        let _queue = handle.bind_queue(QUEUE).expect("with room for the answer");
        lab.send(b"after");
        let packet = next_packet(&handle, &mut batch);
        assert_eq!((packet.id(), udp_payload(&packet)), (1, &b"after"[..]));
        let error = handle.verdict(old, Verdict::Drop).unwrap_err();
        assert!(
            matches!(error, Error::Stale { key, .. } if key == old),
            "{error}"
        );
        handle.verdict(packet.key(), Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"after"[..]));
    });
}

/// It may have been bound by who had the socket before: its last packets have the first numbers, as the next binding's have
#[test]
fn packets_of_who_had_the_socket_before_do_not_come_out_of_the_first_binding() {
    isolated(|| {
        let lab = Lab::new();
        let mut before = netfilter_socket();
        before.bind_auto().unwrap();
        let handle = Handle::builder()
            .open_fd(before.as_fd().try_clone_to_owned().unwrap())
            .unwrap();
        let config = QueueConfig::new().copy_mode(CopyMode::PACKET, 0);
        configure_past_the_library(&handle, &ConfigRequest::bind(QUEUE, config));
        for _ in 0..2 {
            lab.send(b"old");
        }
        configure_past_the_library(&handle, &ConfigRequest::unbind(QUEUE));
        let _queue = handle.bind_queue(QUEUE).unwrap();
        lab.send(b"new");
        let mut batch = RecvBatch::default();
        let packet = next_packet(&handle, &mut batch);
        assert_eq!((udp_payload(&packet), packet.id()), (&b"new"[..], 1));
        handle.verdict(packet.key(), Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"new"[..]));
        assert_eq!(handle.stats().discarded, 2);
    });
}
