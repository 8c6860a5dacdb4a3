//! Attacks on a socket by other processes and other code, and bytes not sent by any kernel

use std::io;
use std::os::fd::AsFd;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use netlink_sys::{Socket as NetlinkSocket, SocketAddr};
use nfqnl::consts::{
    MESSAGE_HEADER_LEN, NFQA_MARK, NFQA_PACKET_HDR, NFQA_PAYLOAD, NFQA_VLAN, NFQNL_MSG_CONFIG,
    NFQNL_MSG_PACKET, NFQNL_MSG_VERDICT, NFQNL_MSG_VERDICT_BATCH, NLM_F_CAPPED, NLMSG_DONE,
    NLMSG_ERROR, NLMSG_NOOP, NLMSG_OVERRUN, message_type,
};
use nfqnl::proto::{ConfigRequest, PlainVerdict, RequestHeader};
use nfqnl::{
    CopyMode, Error, ErrorKind, Event, Family, Handle, Operation, Queue, QueueData, RecvBatch,
    Socket, Stats, Verdict,
};
use nfqnl_testkit::cpu;
use nfqnl_testkit::netns::{isolated, part, part_in_another_process};
use nfqnl_testkit::socket;
use rustix::event::{PollFd, PollFlags};

use crate::common::{MessageBuilder, datagram, wire};
use crate::lab::{
    Lab, QUEUE, WHOLE_PACKETS, configure_past_the_library, is_free, is_silent, next_packet,
    recv_past_the_library, refusal, send_past_the_library, take_all, udp_payload,
};

/// A packet of a queue, as the kernel sends it
fn packet(queue: u16, id: u32) -> MessageBuilder {
    let header = wire![id.to_be_bytes(), [8, 0, 1]];
    MessageBuilder::packet(Family::INET, queue).attr(NFQA_PACKET_HDR, header)
}

/// The kernel's answer to a request: 0 or a negative error number
fn answer(code: i32, kind: u16, seq: u32, pid: u32) -> Vec<u8> {
    let request = wire![16_u32, kind, 5_u16, seq, pid];
    MessageBuilder::error(NLM_F_CAPPED, code, &request).build()
}

/// Forged messages
///
/// From the kernel, a socket would accept them as packets, answers to its first requests,
/// refusals of verdicts on its first packets, and losses. The last bytes are not a message.
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

fn netfilter_socket() -> NetlinkSocket {
    NetlinkSocket::new(libc::NETLINK_NETFILTER.try_into().unwrap()).unwrap()
}

/// Starts a process for the part `how` of [`forge`]
fn forger(how: &str, port: u32, stdin: impl Into<Stdio>) -> std::process::Child {
    part_in_another_process(&format!("{how} {port}"), stdin).unwrap()
}

#[track_caller]
fn wait_for(mut forger: std::process::Child) {
    assert!(forger.wait().unwrap().success());
}

/// In the other process of a test: forges messages, and returns true
///
/// "once" sends every forgery. "refused" expects every send to fail, and "from a copy" expects
/// the same on a copy of the victim's own descriptor. "to the groups" sends to every multicast
/// group. "for ever" sends until it is killed.
fn forge() -> bool {
    let Some(part) = part() else {
        return false;
    };
    let (how, port) = part.rsplit_once(' ').unwrap();
    let to = SocketAddr::new(port.parse().unwrap(), 0);
    let forger = match how {
        "from a copy" => socket::netlink(io::stdin().as_fd().try_clone_to_owned().unwrap()),
        _ => netfilter_socket(),
    };
    let all = forgeries();
    let send =
        |message: &[u8], to: &SocketAddr| match forger.send_to(message, to, libc::MSG_DONTWAIT) {
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
                // ESRCH: the group has no members.
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

/// Returns the counters of a socket with only acknowledgements from the kernel, and this many
/// messages from other processes
fn nothing_but(foreign: u64) -> Stats {
    let mut stats = Stats::default();
    stats.from_other_process = foreign;
    stats
}

/// Makes each kind of request, and describes the first result explained only by a forgery
fn hears_only_the_kernel(socket: &Socket, foreign: u64) -> Result<Queue, String> {
    let words = |error: Error| error.to_string();
    let queue = socket.bind(QUEUE).map_err(words)?;
    queue.set_maxlen(10).map_err(words)?;
    socket.sync().map_err(words)?;
    let mut events = Vec::new();
    take_all(socket, &mut RecvBatch::default(), |event| {
        events.push(event.to_string());
    });
    let stats = socket.stats();
    if stats != nothing_but(foreign) || !events.is_empty() {
        return Err(format!("{stats:?}, {events:?}"));
    }
    Ok(queue)
}

#[track_caller]
fn expect_only_the_kernel(socket: &Socket, foreign: u64) -> Queue {
    hears_only_the_kernel(socket, foreign).unwrap()
}

/// Receives and accepts a packet from the kernel
#[track_caller]
fn expect_a_packet(lab: &Lab, socket: &Socket) {
    lab.send(b"of the kernel");
    let mut batch = RecvBatch::default();
    let packet = next_packet(socket, &mut batch);
    assert_eq!(
        (packet.id(), udp_payload(&packet)),
        (1, &b"of the kernel"[..])
    );
    socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
    assert_eq!(lab.recv().as_deref(), Some(&b"of the kernel"[..]));
    assert!(is_silent(socket, &mut batch));
}

#[test]
fn forgeries_before_open_fd_are_counted_and_dropped() {
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
        let socket = Socket::builder().open_fd(fd).unwrap();
        let foreign = u64::try_from(forgeries().len()).unwrap();
        let _queue = expect_only_the_kernel(&socket, foreign);
        expect_a_packet(&lab, &socket);
    });
}

#[test]
fn another_process_cannot_send_to_a_socket() {
    isolated(|| {
        if forge() {
            return;
        }
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let port = socket::netlink_port(&socket).unwrap();
        let mut forger = forger("refused", port, Stdio::null());
        let queue = expect_only_the_kernel(&socket, 0);
        while forger.try_wait().unwrap().is_none() {
            queue.set_maxlen(10).unwrap();
        }
        wait_for(forger);
        assert!(is_silent(&socket, &mut RecvBatch::default()));
        assert_eq!(socket.stats(), nothing_but(0));
        expect_a_packet(&lab, &socket);
    });
}

/// The copy has all abilities of the socket, but cannot send messages to the socket
#[test]
fn a_copy_of_the_descriptor_cannot_forge_either() {
    isolated(|| {
        if forge() {
            return;
        }
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let port = socket::netlink_port(&socket).unwrap();
        let copy = socket.as_fd().try_clone_to_owned().unwrap();
        wait_for(forger("from a copy", port, copy));
        let _queue = expect_only_the_kernel(&socket, 0);
        expect_a_packet(&lab, &socket);
    });
}

/// Also in earlier groups of the socket
#[test]
fn multicast_of_another_process_is_not_heard() {
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
                // Some of these do not exist.
                let _ = member.add_membership(group);
            }
            let fd = member.as_fd().try_clone_to_owned().unwrap();
            wait_for(forger("to the groups", 0, Stdio::null()));
            let socket = Socket::builder().open_fd(fd).unwrap();
            let foreign = socket.stats().from_other_process;
            // Without a port it receives nothing yet.
            assert_eq!(foreign > 0, has_port);
            wait_for(forger("to the groups", 0, Stdio::null()));
            let _queue = expect_only_the_kernel(&socket, foreign);
            expect_a_packet(&lab, &socket);
        }
    });
}

/// Messages sent between any two steps of opening are dropped
///
/// A message may arrive later if another CPU was sending it during the call of connect(2). The
/// library cannot distinguish it from the kernel's messages, so a few rounds in a thousand may
/// receive one.
#[test]
fn sockets_opened_under_fire_hear_only_the_kernel() {
    isolated(|| {
        if forge() {
            return;
        }
        // The first netlink socket of a process gets the process id as its port. Here the rules
        // must not have this socket.
        let mut first = netfilter_socket();
        first.bind_auto().unwrap();
        let lab = Lab::new();
        drop(first);
        let port = std::process::id();
        let mut forgers = [(); 2].map(|()| forger("for ever", port, Stdio::null()));
        let end = Instant::now() + Duration::from_secs(1);
        let (mut rounds, mut heard) = (0, Vec::new());
        while rounds % 2 == 1 || rounds < 20 || Instant::now() < end {
            rounds += 1;
            let is_taken_over = rounds % 2 == 0;
            let socket = if is_taken_over {
                let mut before = netfilter_socket();
                before.bind_auto().unwrap();
                let poll = PollFd::new(&before, PollFlags::IN);
                assert_eq!(rustix::event::poll(&mut [poll], None).unwrap(), 1);
                let fd = before.as_fd().try_clone_to_owned().unwrap();
                Socket::builder().open_fd(fd).unwrap()
            } else {
                Socket::open().unwrap()
            };
            assert_eq!(socket::netlink_port(&socket).unwrap(), port);
            let foreign = socket.stats().from_other_process;
            assert!(foreign > 0 || !is_taken_over);
            match hears_only_the_kernel(&socket, foreign) {
                Ok(_queue) => expect_a_packet(&lab, &socket),
                Err(forgery) => heard.push(forgery),
            }
        }
        for forger in &mut forgers {
            forger.kill().unwrap();
        }
        eprintln!("{rounds} rounds");
        assert!(heard.len() <= 1 + rounds / 100, "{heard:?}");
    });
}

/// The consequence of a broken datagram: an error with or without a packet's key, or only a count
#[derive(Clone, Copy, Debug, PartialEq)]
enum Found {
    Malformed { names_packet: bool },
    TooLong { names_packet: bool },
    AfterUnbind,
    Overrun,
    Nothing,
}

/// Each datagram breaks another rule. The last part is true if the messages behind the broken one
/// cannot be found
fn broken_datagrams() -> Vec<(Vec<u8>, Found, bool)> {
    const PACKET: u16 = message_type(NFQNL_MSG_PACKET);
    // The previous packet's id: otherwise packets would seem to be missing.
    let good = |queue| packet(queue, 1);
    let no_mark = |queue, len: u16| good(queue).field([0]).field(wire![len, NFQA_MARK, [0; 4]]);
    let noop = MessageBuilder::new(NLMSG_NOOP, 0).build();
    let with_len = |len: u32, message: &[u8]| wire![len, message[4..]];
    let whole = good(QUEUE).attr(NFQA_PAYLOAD, [0; 64]).build();
    let malformed = |names_packet| Found::Malformed { names_packet };
    let too_long = |names_packet| Found::TooLong { names_packet };

    let mut all = Vec::new();
    for len in 1..MESSAGE_HEADER_LEN {
        all.push((vec![0; len], malformed(false), true));
    }
    for len in 0..16 {
        all.push((with_len(len, &noop), malformed(false), true));
        all.push((with_len(len, &whole), malformed(true), true));
    }
    for len in [1 << 20, u32::MAX - 3, u32::MAX] {
        all.push((with_len(len, &noop), too_long(false), true));
        all.push((with_len(len, &whole), too_long(true), true));
    }
    // An attribute behind the packet's header, and the header itself
    for len in [0, 1, 2, 3, 9, u16::MAX] {
        all.push((no_mark(QUEUE, len).build(), malformed(true), false));
        all.push((no_mark(QUEUE + 1, len).build(), Found::AfterUnbind, false));
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
        (good(QUEUE + 1).build(), Found::AfterUnbind, false),
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

/// Returns the observed consequence, from the call's result and the counts
fn found(result: &nfqnl::Result<usize>, after_unbind: u64, overruns: u64) -> Found {
    match (result, after_unbind, overruns) {
        (Err(Error::Decode { key, .. }), 0, 0) => Found::Malformed {
            names_packet: key.is_some(),
        },
        (Err(Error::BufferTooSmall { key, .. }), 0, 0) => Found::TooLong {
            names_packet: key.is_some(),
        },
        (Ok(0), 1, 0) => Found::AfterUnbind,
        (Ok(0), 0, 1) => Found::Overrun,
        (Ok(0), 0, 0) => Found::Nothing,
        _ => panic!("{result:?}, {after_unbind} after the end, {overruns} overruns"),
    }
}

/// Counts the overruns reported by a handle
fn count_overruns(handle: &Handle<'_>) -> Arc<AtomicU64> {
    let count = Arc::new(AtomicU64::new(0));
    let reported = Arc::clone(&count);
    handle.on_event(move |event| {
        if matches!(event, Event::Overrun) {
            reported.fetch_add(1, Ordering::SeqCst);
        }
    });
    count
}

/// The waiting packet in the kernel is not lost, nor are the messages around the broken one in a
/// datagram, nor later datagrams
#[test]
fn a_broken_datagram_loses_no_packet() {
    isolated(|| {
        let lab = Lab::new();
        let handle = nfqnl::open().unwrap();
        let stats = || handle.socket().stats();
        let overruns = count_overruns(&handle);
        let (send, seen) = mpsc::channel();
        let _queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, move |data| {
                send.send(udp_payload(data.packet()).to_vec()).unwrap();
                data.set_verdict(Verdict::Accept, None);
            })
            .unwrap();
        for (broken, expected, is_end) in broken_datagrams() {
            let what = format!("{expected:?} in {broken:?}");
            lab.send(b"waits");
            let before = stats().after_unbind;
            overruns.store(0, Ordering::SeqCst);
            let result = handle.handle_packet(&broken);
            let after_unbind = stats().after_unbind - before;
            let reported = overruns.load(Ordering::SeqCst);
            let found = found(&result, after_unbind, reported);
            assert_eq!(found, expected, "{what}");
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
        assert_eq!(stats().refused_verdicts, 0);
        assert!(is_silent(handle.socket(), &mut RecvBatch::default()));
    });
}

/// Unread packets do not pile up: the kernel holds each packet until its verdict, and holds no
/// more packets than its limit
#[test]
fn requests_set_aside_no_more_than_may_wait() {
    isolated(|| {
        const MAXLEN: u32 = 50;
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        for _ in 0..20 {
            queue.set_maxlen(MAXLEN).unwrap();
            lab.send_numbered(0..2 * MAXLEN);
        }
        socket.sync().unwrap();
        assert_eq!(socket.stats().packets, u64::from(MAXLEN));
        let mut batch = RecvBatch::default();
        for number in 0..MAXLEN {
            let packet = next_packet(&socket, &mut batch);
            assert_eq!(udp_payload(&packet), number.to_be_bytes());
        }
        assert!(is_silent(&socket, &mut batch));
    });
}

/// Makes a handle with an accepting callback
fn accepting() -> (Handle<'static>, Queue) {
    let handle = nfqnl::open().unwrap();
    let accept = |data: &mut QueueData<'_>| data.set_verdict(Verdict::Accept, None);
    let queue = handle
        .create_queue_with(QUEUE, &WHOLE_PACKETS, accept)
        .unwrap();
    (handle, queue)
}

/// Far more messages than any kernel sends: the time grows with their number, not with its square
#[test]
fn a_datagram_of_many_messages_takes_linear_time() {
    isolated(|| {
        const FEW: usize = 1 << 13;
        const TIMES: usize = 16;
        const ATTEMPTS: usize = 10;
        let lab = Lab::new();
        let (handle, _queue) = accepting();
        let reported = count_overruns(&handle);
        let best = |number| {
            let rounds = [(); 3].map(|()| {
                lab.send(b"behind them all");
                let packet = recv_past_the_library(&handle);
                let overruns = MessageBuilder::new(NLMSG_OVERRUN, 0).build().repeat(number);
                reported.store(0, Ordering::SeqCst);
                let datagram = datagram([overruns, packet]);
                let begin = cpu::time();
                let handled = handle.handle_packet(&datagram);
                let took = cpu::time() - begin;
                assert_eq!(handled.unwrap(), 1);
                let counted = reported.load(Ordering::SeqCst);
                assert_eq!(usize::try_from(counted), Ok(number));
                assert_eq!(lab.recv().as_deref(), Some(&b"behind them all"[..]));
                took
            });
            rounds.into_iter().min().unwrap()
        };
        // Half way between linear and quadratic, on a logarithmic scale
        let limit = (TIMES as f64).powf(1.5);
        // In a virtual machine, the CPU time of other machines counts as well.
        let is_linear = (0..ATTEMPTS).any(|_| {
            let (few, many) = (best(FEW), best(TIMES * FEW));
            eprintln!("{few:?}, and {many:?} for {TIMES} times as many");
            many.as_secs_f64() / few.as_secs_f64() < limit
        });
        assert!(is_linear, "more than linear in every attempt");
    });
}

/// The kernel refuses the second verdict: the packet is gone
#[test]
fn a_datagram_passed_on_twice_is_answered_once() {
    isolated(|| {
        let lab = Lab::new();
        let (handle, _queue) = accepting();
        for refused in 1..3 {
            lab.send(b"once");
            let datagram = recv_past_the_library(&handle);
            for _ in 0..2 {
                assert_eq!(handle.handle_packet(&datagram).unwrap(), 1);
            }
            let answer = recv_past_the_library(&handle);
            assert_eq!(handle.handle_packet(&answer).unwrap(), 0);
            assert_eq!(handle.socket().stats().refused_verdicts, refused);
            assert_eq!(lab.recv().as_deref(), Some(&b"once"[..]));
            assert!(lab.v4.is_silent());
        }
    });
}

/// The library cannot know whether the kernel has bound the queue
#[test]
fn a_lost_bind_answer_leaves_no_valid_old_key() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::builder().recv_buffer(1 << 14).open().unwrap();
        let before = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"before");
        let old = next_packet(&socket, &mut batch).key();
        configure_past_the_library(&socket, &ConfigRequest::unbind(QUEUE));
        let set = before.set_mode(CopyMode::Packet, 0);
        assert_eq!(refusal(set).kind(), ErrorKind::NotBound);
        let mut verdict = [0; PlainVerdict::MAX_LEN];
        let len = PlainVerdict::new(Verdict::Accept)
            .encode(&mut verdict, QUEUE, old.id(), RequestHeader::default())
            .unwrap();
        for num in [QUEUE, QUEUE + 1] {
            // Each bind is refused, and soon the receive buffer has no room for more answers.
            send_past_the_library(&socket, &verdict[..len].repeat(200));
            let error = socket.bind(num).unwrap_err();
            let op = Operation::Bind(num);
            assert!(
                matches!(error, Error::NoAck { op: of, .. } if of == op),
                "{error:?}"
            );
            take_all(&socket, &mut batch, |event| drop(event));
            assert!(is_free(num), "the library has unbound it");
        }
        lab.send(b"of a later binding, if there is one");
        take_all(&socket, &mut batch, |event| {
            if let Event::Packet(packet) = event {
                assert_ne!(packet.key(), old, "the key of an earlier packet");
            }
        });

        let _queue = socket.bind(QUEUE).expect("with room for the answer");
        lab.send(b"after");
        let packet = next_packet(&socket, &mut batch);
        assert_eq!((packet.id(), udp_payload(&packet)), (1, &b"after"[..]));
        let error = socket.set_verdict(old, Verdict::Drop).unwrap_err();
        assert!(matches!(error, Error::Unbound { .. }), "{error}");
        socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"after"[..]));
    });
}
