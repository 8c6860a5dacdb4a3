//! The API of libnetfilter_queue: callbacks, and the caller's own receive loop

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nfqnl::{
    ConfigFlags, CopyMode, Error, Event, Family, Handle, PacketKey, Queue, QueueData, RecvBatch,
    SkbInfo, Verdict,
};
use nfqnl_testkit::hosts::{Bridge, Router};
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::rules::{self, Hook, Rule, Table};
use nfqnl_testkit::traffic::{TIMEOUT, Udp};
use nfqnl_testkit::{kernel, link};
use rustix::net::RecvFlags;

use crate::lab::{
    Lab, PORT, QUEUE, WHOLE_PACKETS, Watchdog, bridge, expect_rewritten, is_readable, next_packet,
    priority, run, with_udp_payload,
};

/// The caller's own receive loop
struct Loop<'cb> {
    handle: Handle<'cb>,
    socket: File,
    buf: Vec<u8>,
}

impl<'cb> Loop<'cb> {
    fn new() -> Self {
        let handle = nfqnl::open().unwrap();
        let socket = File::from(handle.as_fd().try_clone_to_owned().unwrap());
        Self {
            handle,
            socket,
            buf: vec![0; RecvBatch::DEFAULT_SLOT_LEN],
        }
    }

    /// A queue with whole packets
    fn create_queue(
        &self,
        num: u16,
        callback: impl FnMut(&mut QueueData<'_>) + Send + 'cb,
    ) -> Queue {
        self.handle
            .create_queue_with(num, &WHOLE_PACKETS, callback)
            .unwrap()
    }

    /// One turn: receives a datagram and passes it on
    fn turn(&mut self) -> nfqnl::Result<usize> {
        let len = self.socket.read(&mut self.buf).unwrap();
        self.handle.handle_packet(&self.buf[..len])
    }
}

#[test]
fn published_calls_in_published_order() {
    isolated(|| {
        let lab = Lab::new();
        let mut looping = Loop::new();
        for family in [Family::INET, Family::INET6] {
            looping.handle.unbind_pf(family).unwrap();
            looping.handle.bind_pf(family).unwrap();
        }
        let (send, payloads) = mpsc::channel();
        let queue = looping
            .handle
            .create_queue(QUEUE, move |data| {
                send.send(data.get_payload().to_vec()).unwrap();
                data.set_verdict(Verdict::Accept, None);
            })
            .unwrap();
        assert_eq!(queue.num(), QUEUE);
        queue.set_mode(CopyMode::Packet, 0xffff).unwrap();
        queue.set_maxlen(100).unwrap();
        queue
            .set_flags(ConfigFlags::FAIL_OPEN, ConfigFlags::FAIL_OPEN)
            .unwrap();
        for socket in lab.sockets() {
            socket.send(b"hello", socket.address()).unwrap();
            while looping.turn().unwrap() == 0 {}
            assert!(payloads.recv().unwrap().ends_with(b"hello"));
            assert_eq!(socket.recv().as_deref(), Some(&b"hello"[..]));
        }
        queue.destroy().unwrap();
        lab.send(b"dropped without a queue");
        assert!(lab.v4.is_silent());
        looping.handle.close().unwrap();
    });
}

/// With C's zeroes for what is absent
#[test]
fn the_getters_mirror_the_packet() {
    isolated(|| {
        let lab = Lab::with(Hook::Output, &Rule::new().udp_dport(PORT).queue(QUEUE));
        let mut looping = Loop::new();
        let lo = link::index("lo").unwrap();
        let queue = looping.create_queue(QUEUE, move |data| {
            let packet = *data.packet();
            assert_eq!(data.key(), packet.key());
            assert_eq!((data.get_packet_id(), data.get_hw_protocol()), (1, 0x0800));
            assert_eq!(data.get_hook(), Hook::Output.number());
            assert_eq!((data.get_indev(), data.get_outdev()), (0, lo));
            assert_eq!((data.get_physindev(), data.get_physoutdev()), (0, 0));
            assert_eq!(data.get_nfmark(), 77);
            assert_eq!(data.get_packet_hw(), None);
            assert_eq!(data.get_timestamp(), None);
            assert_eq!(data.get_payload(), packet.payload());
            assert!(data.get_payload().ends_with(b"look at me"));
            assert!(data.get_uid().is_some() && data.get_uid() == packet.uid());
            assert!(data.get_gid().is_some() && data.get_gid() == packet.gid());
            assert_eq!(data.get_secctx(), packet.security_context());
            assert_eq!(data.get_skbinfo(), SkbInfo::empty());
            data.set_verdict(Verdict::Accept, 1);
        });
        queue
            .set_flags(ConfigFlags::UID_GID, ConfigFlags::UID_GID)
            .unwrap();
        lab.v4.set_mark(77).unwrap();
        lab.send(b"look at me");
        while looping.turn().unwrap() == 0 {}
        assert_eq!(lab.recv().as_deref(), Some(&b"look at me"[..]));
    });
}

/// The bridge is the device on both sides, its ports are the physical devices
#[test]
fn the_getters_report_the_ports_of_a_bridge() {
    isolated(|| {
        let Some(bridge) = bridge() else { return };
        let (left, right) = (&bridge.left, &bridge.right);
        let devices = [Bridge::LINK, left.link, right.link].map(|name| link::index(name).unwrap());
        let [br0, from, to] = devices;
        let table = Table::new(rules::Family::Ip, "t").unwrap();
        let chain = table.chain("c", Hook::Forward, 0).unwrap();
        chain
            .add(&Rule::new().udp_dport(PORT).queue(QUEUE))
            .unwrap();
        let mut looping = Loop::new();
        let (send, seen) = mpsc::channel();
        let _queue = looping.create_queue(QUEUE, move |data| {
            let logical = [data.get_indev(), data.get_outdev()];
            let physical = [data.get_physindev(), data.get_physoutdev()];
            send.send((logical, physical)).unwrap();
            data.set_verdict(Verdict::Accept, None);
        });
        let receiver = right.namespace.run(|| Udp::bind(right.v4, PORT).unwrap());
        let sender = left.namespace.run(|| Udp::bind(left.v4, 0).unwrap());
        sender.send(b"bridged", receiver.address()).unwrap();
        assert_eq!(looping.turn().unwrap(), 1);
        assert_eq!(seen.recv().unwrap(), ([br0, br0], [from, to]));
        assert_eq!(receiver.recv().as_deref(), Some(&b"bridged"[..]));
    });
}

/// A forwarded packet has both devices, a MAC address, a time and checksums
#[test]
fn the_getters_report_a_forwarded_packet() {
    isolated(|| {
        let router = Router::new().unwrap();
        let (client, server) = (&router.client, &router.server);
        let mac = client.namespace.run(|| link::mac("eth0").unwrap());
        let devices = [client.link, server.link].map(|name| link::index(name).unwrap());
        let table = Table::new(rules::Family::Ip, "t").unwrap();
        let chain = table.chain("c", Hook::Forward, 0).unwrap();
        chain
            .add(&Rule::new().udp_dport(PORT).queue(QUEUE))
            .unwrap();
        let mut looping = Loop::new();
        let (send, seen) = mpsc::channel();
        let queue = looping.create_queue(QUEUE, move |data| {
            assert_eq!([data.get_indev(), data.get_outdev()], devices);
            assert_eq!(data.get_packet_hw().unwrap().as_bytes(), mac);
            // The client leaves the checksum to its device; without GSO the kernel would complete
            // it.
            assert_eq!(data.get_skbinfo(), SkbInfo::CSUM_NOT_READY);
            send.send(data.get_timestamp()).unwrap();
            data.set_verdict(Verdict::Accept, None);
        });
        queue.set_flags(ConfigFlags::GSO, ConfigFlags::GSO).unwrap();
        let receiver = server.namespace.run(|| Udp::bind(server.v4, PORT).unwrap());
        receiver.want_timestamps().unwrap();
        let sender = client.namespace.run(|| Udp::bind(client.v4, 0).unwrap());
        // The kernel begins to record times a moment later.
        let deadline = Instant::now() + TIMEOUT;
        let timestamp = loop {
            sender.send(b"forwarded", receiver.address()).unwrap();
            assert_eq!(looping.turn().unwrap(), 1);
            assert_eq!(receiver.recv().as_deref(), Some(&b"forwarded"[..]));
            match seen.recv().unwrap() {
                Some(timestamp) => break timestamp,
                None => assert!(Instant::now() < deadline, "no timestamp"),
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let age = now.checked_sub(timestamp).expect("not in the future");
        assert!(age < TIMEOUT, "{age:?} old");
    });
}

#[test]
fn the_last_verdict_is_sent_when_the_callback_exits() {
    isolated(|| {
        let lab = Lab::new();
        let mut looping = Loop::new();
        let (done, continued) = mpsc::sync_channel::<()>(0);
        let _queue = looping.create_queue(QUEUE, move |data| {
            data.set_verdict(Verdict::Drop, 5);
            data.set_verdict(Verdict::Accept, None);
            done.send(()).unwrap(); // waits until the test has looked
        });
        lab.send(b"held");
        std::thread::scope(|scope| {
            scope.spawn(|| looping.turn().unwrap());
            assert!(lab.v4.is_silent(), "the callback has not returned");
            continued.recv().unwrap();
            assert_eq!(lab.recv().as_deref(), Some(&b"held"[..]));
        });
    });
}

#[test]
fn a_mark_set_in_a_callback_stays() {
    isolated(|| {
        let lab = Lab::with(
            Hook::Input,
            &Rule::new()
                .udp_dport(PORT)
                .mark_not(3, u32::MAX)
                .queue(QUEUE),
        );
        let mut looping = Loop::new();
        let (send, marks) = mpsc::channel();
        let _queue = looping.create_queue(QUEUE, move |data| {
            send.send(data.get_nfmark()).unwrap();
            data.set_verdict(Verdict::Repeat, data.get_nfmark() + 1);
        });
        lab.send(b"marked");
        while lab.v4.recv_within(Duration::from_millis(1)).is_none() {
            looping.turn().unwrap();
        }
        assert_eq!(Vec::from_iter(marks.try_iter()), [0, 1, 2]);
    });
}

#[test]
fn a_packet_without_a_verdict_is_answered_later() {
    isolated(|| {
        let lab = Lab::new();
        let mut looping = Loop::new();
        let (send, keys) = mpsc::channel::<PacketKey>();
        let _queue = looping.create_queue(QUEUE, move |data| send.send(data.key()).unwrap());
        lab.send(b"later");
        assert_eq!(looping.turn().unwrap(), 1);
        assert!(lab.v4.is_silent());
        let key = keys.recv().unwrap();
        looping
            .handle
            .socket()
            .set_verdict(key, Verdict::Accept)
            .unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&b"later"[..]));
    });
}

#[test]
fn a_callback_rewrites_a_packet() {
    isolated(|| {
        let lab = Lab::new();
        let mut looping = Loop::new();
        let (send, results) = mpsc::channel();
        let queue = looping.create_queue(QUEUE, move |data| {
            let mut new = data.get_payload().to_vec();
            let end = new.len();
            new[end - 4..].copy_from_slice(b"HEAD");
            // In IPv4, 0 stands for no UDP checksum.
            new[26..28].fill(0);
            send.send(data.set_verdict_with_payload(Verdict::Accept, None, &new))
                .unwrap();
        });
        lab.send(b"head and tail");
        assert_eq!(looping.turn().unwrap(), 1);
        results.recv().unwrap().unwrap();
        expect_rewritten(&lab.v4, b"head and HEAD");

        // The callback has only a part of this packet: a new payload would drop the rest.
        queue.set_mode(CopyMode::Packet, 40).unwrap();
        lab.send(b"head and tail");
        while looping.turn().unwrap() == 0 {}
        match results.recv().unwrap().unwrap_err() {
            Error::TruncatedPacket { needed, had, .. } => assert_eq!((needed, had), (41, 40)),
            other => panic!("{other:?}"),
        }
        assert!(lab.v4.is_silent(), "nothing was sent, and it waits");
    });
}

/// All of them together, as seen by the callback of a later queue and by the receiver
#[test]
fn a_decision_has_mark_priority_and_payload() {
    isolated(|| {
        const MARK: u32 = 0xdead_beef;
        const PRIORITY: u32 = 6;
        const LATER: u16 = 2;
        let lab = Lab::with(Hook::Output, &Rule::new().udp_dport(PORT).queue(QUEUE));
        for table in lab.tables() {
            let chain = table.chain("later", Hook::Postrouting, 0).unwrap();
            chain
                .add(&Rule::new().udp_dport(PORT).queue(LATER))
                .unwrap();
        }
        let mut looping = Loop::new();
        let _first = looping.create_queue(QUEUE, |data| {
            let new = with_udp_payload(data.get_payload(), b"decided").unwrap();
            let decision = Verdict::Accept.with_payload(&new).with_mark(MARK);
            data.set_decision(&decision.with_priority(PRIORITY))
                .unwrap();
        });
        let (send, seen) = mpsc::channel();
        let _later = looping.create_queue(LATER, move |data| {
            send.send((data.get_nfmark(), data.packet().priority()))
                .unwrap();
            data.set_verdict(Verdict::Accept, None);
        });
        for socket in lab.sockets() {
            socket.send(b"not decided yet", socket.address()).unwrap();
            let reaches_second = !kernel::refuses_payloads();
            let mut handled = 0;
            while handled < 1 + usize::from(reaches_second) {
                handled += looping.turn().unwrap();
            }
            if reaches_second {
                assert_eq!(seen.recv().unwrap(), (MARK, priority(PRIORITY)));
            }
            expect_rewritten(socket, b"decided");
        }
    });
}

#[test]
fn a_failed_decision_keeps_the_verdict_before() {
    isolated(|| {
        let lab = Lab::new();
        let mut looping = Loop::new();
        let (send, results) = mpsc::channel();
        let _queue = looping.create_queue(QUEUE, move |data| {
            data.set_verdict(Verdict::Accept, 9);
            let too_short = Verdict::Drop.with_payload(&[0x45; 19]);
            send.send(data.set_decision(&too_short)).unwrap();
        });
        lab.send(b"accepted");
        assert_eq!(looping.turn().unwrap(), 1);
        match results.recv().unwrap().unwrap_err() {
            Error::PayloadTooShort { needed, had, .. } => assert_eq!((needed, had), (20, 19)),
            other => panic!("{other:?}"),
        }
        assert_eq!(lab.recv().as_deref(), Some(&b"accepted"[..]));
    });
}

#[test]
fn a_panic_in_a_callback_reaches_the_caller() {
    isolated(|| {
        const N: u32 = 3;
        let lab = Lab::new();
        let mut looping = Loop::new();
        let queue = looping.create_queue(QUEUE, |data| {
            data.set_verdict(Verdict::Accept, None);
            assert!(
                !data.get_payload().ends_with(&1_u32.to_be_bytes()),
                "on purpose"
            );
        });
        lab.send_numbered(0..N);
        // The setting sets all three aside: one call has them when the callback panics.
        queue.set_maxlen(10).unwrap();
        let panicked = catch_unwind(AssertUnwindSafe(|| looping.turn()));
        let panic = panicked.unwrap_err();
        assert!(
            panic
                .downcast_ref::<&str>()
                .is_some_and(|text| text.contains("on purpose"))
        );
        // The verdict set before the panic is sent, and the third packet comes with the next call.
        assert_eq!(looping.turn().unwrap(), 1);
        for number in 0..N {
            assert_eq!(lab.recv().as_deref(), Some(&number.to_be_bytes()[..]));
        }
        lab.send(b"after");
        while looping.turn().unwrap() == 0 {}
        assert_eq!(lab.recv().as_deref(), Some(&b"after"[..]));
        assert_eq!(looping.handle.socket().stats().packets, u64::from(N) + 1);
    });
}

#[test]
fn two_queues_of_a_handle_have_a_callback_each() {
    isolated(|| {
        let lab = Lab::at_input();
        let mut looping = Loop::new();
        let (send, seen) = mpsc::channel();
        let second = send.clone();
        let _first = looping.create_queue(QUEUE, move |data| {
            send.send(("first", data.key().queue())).unwrap();
            data.set_verdict(
                Verdict::Queue {
                    num: 9,
                    bypass: false,
                },
                None,
            );
        });
        let _second = looping.create_queue(9, move |data| {
            second.send(("second", data.key().queue())).unwrap();
            data.set_verdict(Verdict::Accept, None);
        });
        lab.send(b"twice");
        while lab.v4.recv_within(Duration::from_millis(1)).is_none() {
            looping.turn().unwrap();
        }
        assert_eq!(
            Vec::from_iter(seen.try_iter()),
            [("first", QUEUE), ("second", 9)]
        );
    });
}

#[test]
fn packets_beyond_their_slots_are_all_reported() {
    isolated(|| {
        const N: u32 = 4;
        let lab = Lab::new();
        let handle = nfqnl::open().unwrap();
        let callback = |_: &mut QueueData<'_>| panic!("it got a packet");
        let _queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, callback)
            .unwrap();
        let mut batch = RecvBatch::new(8, 64);
        lab.send_numbered(0..N);
        let error = handle.run_once(&mut batch).unwrap_err();
        assert!(matches!(error, Error::BufferTooSmall { key: Some(key), .. } if key.id() == 1));
        assert_eq!(handle.socket().stats().no_callback, u64::from(N));

        let (send, keys) = mpsc::channel();
        handle.on_event(move |event| match event {
            Event::BufferTooSmall { key, .. } => send.send(key.unwrap()).unwrap(),
            other => panic!("{other:?}"),
        });
        lab.send_numbered(N..2 * N);
        assert!(handle.run_once(&mut batch).is_err());
        for id in N + 1..=2 * N {
            let key = keys.recv().unwrap();
            assert_eq!(key.id(), id);
            handle.socket().set_verdict(key, Verdict::Accept).unwrap();
        }
        assert_eq!(handle.socket().stats().no_callback, u64::from(N));
        lab.expect_numbered(N..2 * N);
    });
}

#[test]
fn packets_without_a_callback_are_counted() {
    isolated(|| {
        let lab = Lab::new();
        let mut looping = Loop::new();
        let _no_callback = looping.handle.socket().bind(QUEUE).unwrap();
        lab.send(b"without a callback");
        assert_eq!(looping.turn().unwrap(), 0);
        assert_eq!(looping.handle.socket().stats().no_callback, 1);

        let (send, events) = mpsc::channel();
        looping.handle.on_event(move |event| {
            let what = match event {
                Event::Packet(packet) => ("packet", packet.key()),
                Event::Refused(refusal) => ("refused", refusal.packet().unwrap()),
                other => panic!("{other:?}"),
            };
            send.send(what).unwrap();
        });
        lab.send(b"to the handler");
        assert_eq!(looping.turn().unwrap(), 0);
        let (what, key) = events.recv().unwrap();
        assert_eq!((what, key.id()), ("packet", 2));
        for _ in 0..2 {
            looping
                .handle
                .socket()
                .set_verdict(key, Verdict::Accept)
                .unwrap();
        }
        assert_eq!(looping.turn().unwrap(), 0);
        assert_eq!(events.recv().unwrap(), ("refused", key));
        assert_eq!(looping.handle.socket().stats().no_callback, 1);
        assert_eq!(lab.recv().as_deref(), Some(&b"to the handler"[..]));
    });
}

#[test]
fn a_bad_datagram_is_an_error_and_the_loop_goes_on() {
    isolated(|| {
        let lab = Lab::new();
        let mut looping = Loop::new();
        let queue = looping.create_queue(QUEUE, |data| data.set_verdict(Verdict::Accept, None));
        lab.send(&[6; 500]);
        let mut small = [0; 200];
        let len = looping.socket.read(&mut small).unwrap();
        let key = match looping.handle.handle_packet(&small[..len]).unwrap_err() {
            Error::BufferTooSmall {
                key: Some(key),
                needed,
                had,
                ..
            } => {
                assert_eq!(had, small.len());
                assert!(needed > 500, "{needed}");
                key
            }
            other => panic!("{other:?}"),
        };
        looping
            .handle
            .socket()
            .set_verdict(key, Verdict::Accept)
            .unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&[6; 500][..]));

        for garbage in [&[0xff; 20][..], &[1], &[16, 0, 0, 0]] {
            let error = looping.handle.handle_packet(garbage).unwrap_err();
            assert!(
                matches!(error, Error::Decode { .. } | Error::BufferTooSmall { .. }),
                "{error:?} for {garbage:?}"
            );
        }
        assert_eq!(looping.handle.handle_packet(&[]).unwrap(), 0);

        // A message of the right length with a broken attribute
        lab.send(b"broken on the way");
        let mut buf = [0; 200];
        let len = looping.socket.read(&mut buf).unwrap();
        buf[32..34].copy_from_slice(&3_u16.to_ne_bytes()); // the second attribute's length
        let error = looping.handle.handle_packet(&buf[..len]).unwrap_err();
        assert!(
            matches!(error, Error::Decode { key: Some(_), .. }),
            "{error:?}"
        );

        lab.send(b"after");
        assert_eq!(looping.turn().unwrap(), 1);
        assert_eq!(lab.recv().as_deref(), Some(&b"after"[..]));

        // After its queue has ended it is not an error, because it needs no answer.
        queue.destroy().unwrap();
        let before = looping.handle.socket().stats();
        assert_eq!(looping.handle.handle_packet(&buf[..len]).unwrap(), 0);
        let after = looping.handle.socket().stats();
        assert_eq!(after.after_unbind, before.after_unbind + 1);
        assert_eq!(after.packets, before.packets + 1);
    });
}

/// The callback may own the queue
#[test]
fn a_callback_may_destroy_its_own_queue() {
    isolated(|| {
        let lab = Lab::new();
        let mut looping = Loop::new();
        let (give, queue) = mpsc::channel::<Queue>();
        let created = looping.create_queue(QUEUE, move |data| {
            data.set_verdict(Verdict::Accept, None);
            queue.recv().unwrap().destroy().unwrap();
        });
        give.send(created).unwrap();
        lab.send(b"goes with its queue");
        assert_eq!(looping.turn().unwrap(), 1);
        assert!(lab.v4.is_silent(), "the kernel has dropped it");
        let _again = looping.create_queue(QUEUE, |data| data.set_verdict(Verdict::Accept, None));
        lab.send(b"a new queue");
        while looping.turn().unwrap() == 0 {}
        assert_eq!(lab.recv().as_deref(), Some(&b"a new queue"[..]));
    });
}

/// A callback destroys its queue and panics; the packets behind it are dropped with the queue
#[test]
fn packets_of_an_ended_queue_skip_the_next() {
    isolated(|| {
        let lab = Lab::new();
        let mut looping = Loop::new();
        let (give, queue) = mpsc::channel::<Queue>();
        let created = looping.create_queue(QUEUE, move |_| {
            queue.recv().unwrap().destroy().unwrap();
            panic!("on purpose");
        });
        lab.send_numbered(0..3);
        created.set_maxlen(10).unwrap(); // sets the three aside
        give.send(created).unwrap();
        catch_unwind(AssertUnwindSafe(|| looping.handle.handle_packet(&[]))).unwrap_err();
        assert_eq!(looping.handle.handle_packet(&[]).unwrap(), 0);
        assert_eq!(looping.handle.socket().stats().after_unbind, 2);

        let (send, seen) = mpsc::channel();
        let _again = looping.create_queue(QUEUE, move |data| {
            send.send(data.get_payload().to_vec()).unwrap();
            data.set_verdict(Verdict::Accept, None);
        });
        lab.send(b"of the next");
        while looping.turn().unwrap() == 0 {}
        let seen = Vec::from_iter(seen.try_iter());
        assert!(
            seen.len() == 1 && seen[0].ends_with(b"of the next"),
            "{seen:?}"
        );
        assert_eq!(lab.recv().as_deref(), Some(&b"of the next"[..]));
    });
}

/// A later callback destroys the queue; the verdicts before it are executed
#[test]
fn each_verdict_leaves_when_its_callback_exits() {
    isolated(|| {
        let lab = Lab::new();
        let looping = Loop::new();
        let (give, queue) = mpsc::channel::<Queue>();
        let mut seen = 0;
        let created = looping.create_queue(QUEUE, move |data| {
            data.set_verdict(Verdict::Accept, None);
            seen += 1;
            if seen == 3 {
                queue.recv().unwrap().destroy().unwrap();
            }
        });
        lab.send_numbered(0..3);
        created.set_maxlen(10).unwrap(); // sets the three aside
        give.send(created).unwrap();
        assert_eq!(looping.handle.handle_packet(&[]).unwrap(), 3);
        lab.expect_numbered(0..2);
        assert!(lab.v4.is_silent(), "the third is dropped with its queue");
    });
}

/// The verdicts of a batch leave together, so those before it come too late, and are counted
#[test]
fn verdicts_before_a_destroy_in_run_once_are_late() {
    isolated(|| {
        let lab = Lab::new();
        for sends_now in [false, true] {
            let handle = nfqnl::open().unwrap();
            let (give, queue) = mpsc::channel::<Queue>();
            let mut seen = 0;
            let created = handle
                .create_queue_with(QUEUE, &WHOLE_PACKETS, move |data| {
                    data.set_verdict(Verdict::Accept, None);
                    seen += 1;
                    if seen == 3 {
                        if sends_now {
                            data.send_now().unwrap();
                        }
                        queue.recv().unwrap().destroy().unwrap();
                    }
                })
                .unwrap();
            lab.send_numbered(0..5);
            created.set_maxlen(10).unwrap(); // sets the five aside
            give.send(created).unwrap();
            handle.try_run_once(&mut RecvBatch::default()).unwrap();
            let delivered = lab.v4.drain();
            // A slow machine sends some of them before: a decision waits for a millisecond only.
            assert!(delivered >= if sends_now { 2 } else { 0 });
            let stats = handle.socket().stats();
            assert_eq!(stats.late_verdicts + delivered as u64, 3, "{delivered}");
            assert_eq!(stats.after_unbind, 2);
            assert_eq!((stats.packets, stats.refused_verdicts), (5, 0));
        }
    });
}

/// As the loop over `recv` in `stream`
#[test]
fn run_once_never_blocks_after_poll() {
    isolated(|| {
        let _watchdog = Watchdog::new(Duration::from_secs(30));
        let lab = Lab::new();
        let handle = nfqnl::open().unwrap();
        let queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, |data| {
                data.set_verdict(Verdict::Drop, None);
            })
            .unwrap();
        let mut batch = RecvBatch::default();
        for round in 0..20_u32 {
            let packets = round % 4;
            lab.send_numbered(0..packets);
            queue.set_maxlen(1000 + round).unwrap();
            let mut called = 0;
            while is_readable(&handle) {
                called += handle.run_once(&mut batch).unwrap();
            }
            assert_eq!(called, usize::try_from(packets).unwrap());
        }
    });
}

#[test]
fn callbacks_may_borrow_local_state() {
    isolated(|| {
        let lab = Lab::new();
        let prefix = b"look ".to_vec();
        let (mut lens, count) = (Vec::new(), AtomicUsize::new(0));
        let mut events = 0;
        let mut looping = Loop::new();
        looping.handle.on_event(|_| events += 1);
        let queue = looping.create_queue(QUEUE, |data| {
            assert!(data.get_payload()[28..].starts_with(&prefix));
            lens.push(data.get_payload().len());
            count.fetch_add(1, Ordering::SeqCst);
            data.set_verdict(Verdict::Accept, None);
        });
        for payload in [&b"look here"[..], b"look there"] {
            lab.send(payload);
            while looping.turn().unwrap() == 0 {}
            assert_eq!(lab.recv().as_deref(), Some(payload));
        }
        assert_eq!(count.load(Ordering::SeqCst), 2);
        queue.destroy().unwrap();
        drop(looping);
        assert_eq!(lens, [28 + 9, 28 + 10]);
        assert_eq!(events, 0);
    });
}

/// Sets a flag when it is dropped
struct SetOnDrop(Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn a_callback_binds_sets_and_destroys_queues() {
    isolated(|| {
        const OTHER: u16 = 2;
        let _watchdog = Watchdog::new(Duration::from_secs(60));
        let lab = Lab::new();
        for by_run_once in [false, true] {
            let mut looping = Loop::new();
            let mut batch = RecvBatch::default();
            let (give, own) = mpsc::channel::<Queue>();
            let (keep, other) = mpsc::channel::<Queue>();
            let (send, seen) = mpsc::channel();
            let is_dropped = Arc::new(AtomicBool::new(false));
            let guard = SetOnDrop(is_dropped.clone());
            let created = looping.create_queue(QUEUE, move |data| {
                let send = send.clone();
                let handle = data.handle();
                let other = handle
                    .create_queue_with(OTHER, &WHOLE_PACKETS, move |data| {
                        send.send(data.get_payload().len()).unwrap();
                        data.set_verdict(Verdict::Accept, None);
                    })
                    .unwrap();
                other.set_maxlen(77).unwrap();
                handle.socket().sync().unwrap();
                assert_eq!(handle.socket().stats().packets, 1);
                keep.send(other).unwrap();
                // A queue without packets
                let third = handle.create_queue(OTHER + 1, |_| {}).unwrap();
                third.destroy().unwrap();

                let num = OTHER;
                data.set_verdict(Verdict::Queue { num, bypass: false }, None);
                data.send_now().unwrap();
                let own = own.recv().unwrap();
                own.set_flags(ConfigFlags::FAIL_OPEN, ConfigFlags::FAIL_OPEN)
                    .unwrap();
                own.destroy().unwrap();
                assert!(!guard.0.load(Ordering::SeqCst), "dropped while it runs");
            });
            give.send(created).unwrap();
            lab.send(b"requeued");
            let end = Instant::now() + TIMEOUT;
            while lab.v4.recv_within(Duration::from_millis(1)).is_none() {
                match by_run_once {
                    true => looping.handle.run_timeout(&mut batch, TIMEOUT).unwrap(),
                    false => looping.turn().unwrap(),
                };
                assert!(Instant::now() < end);
            }
            assert_eq!(Vec::from_iter(seen.try_iter()), [28 + 8]);
            looping.handle.try_run_once(&mut batch).unwrap();
            assert!(is_dropped.load(Ordering::SeqCst), "once it has exited");
            let other = other.recv().unwrap();
            other.set_maxlen(78).expect("it is still bound");
            assert_eq!(looping.handle.socket().stats().refused_verdicts, 0);
        }
    });
}

#[test]
fn a_callback_that_runs_its_handle_is_an_error() {
    isolated(|| {
        let _watchdog = Watchdog::new(Duration::from_secs(60));
        let lab = Lab::new();
        let handle = Arc::new(nfqnl::open().unwrap());
        // The callback does not own the handle: the handle owns the callback.
        let own = Arc::downgrade(&handle);
        let (send, results) = mpsc::channel();
        let _queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, move |data| {
                data.set_verdict(Verdict::Accept, None);
                let handle = own.upgrade().unwrap();
                let mut batch = RecvBatch::new(1, 4096);
                let other = handle.socket().bind(QUEUE + 1).unwrap();
                let drained = handle.drain(other, &mut batch, TIMEOUT);
                let calls = [
                    drained.map(|_| 0),
                    handle.handle_packet(&[]),
                    handle.run_once(&mut batch),
                    handle.try_run_once(&mut batch),
                    handle.run_timeout(&mut batch, TIMEOUT),
                ];
                send.send(calls).unwrap();
                // The handle's other calls work, and so does another handle.
                handle.bind_pf(Family::INET).unwrap();
                let other = nfqnl::open().unwrap();
                assert_eq!(other.try_run_once(&mut batch).unwrap(), 0);
            })
            .unwrap();
        let mut batch = RecvBatch::default();
        let mut buf = vec![0; RecvBatch::DEFAULT_SLOT_LEN];
        for by_run_once in [false, true] {
            lab.send(b"accepted");
            if by_run_once {
                run(&handle, &mut batch, 1);
            } else {
                let (len, _) =
                    rustix::net::recv(&*handle, &mut buf[..], RecvFlags::empty()).unwrap();
                assert_eq!(handle.handle_packet(&buf[..len]).unwrap(), 1);
            }
            for result in results.try_recv().unwrap() {
                assert!(matches!(result, Err(Error::InCallback)), "{result:?}");
            }
            assert_eq!(lab.recv().as_deref(), Some(&b"accepted"[..]));
        }
    });
}

/// A program with a receiving thread, as with libnetfilter_queue; the thread may read the answers
/// to all calls
#[test]
fn calls_succeed_beside_a_reading_thread() {
    isolated(|| {
        const CALLS: u16 = 40;
        let _watchdog = Watchdog::new(Duration::from_secs(120));
        let lab = Lab::new();
        let handle = Arc::new(nfqnl::open().unwrap());
        let queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, |data| {
                data.set_verdict(Verdict::Accept, None);
            })
            .unwrap();
        let is_over = Arc::new(AtomicBool::new(false));
        let reader = thread::spawn({
            let (handle, is_over) = (handle.clone(), is_over.clone());
            move || {
                let mut buf = vec![0; RecvBatch::DEFAULT_SLOT_LEN];
                while !is_over.load(Ordering::SeqCst) {
                    let (len, _) =
                        rustix::net::recv(&*handle, &mut buf[..], RecvFlags::empty()).unwrap();
                    handle.handle_packet(&buf[..len]).unwrap();
                }
            }
        });
        let mut queues = Vec::new();
        let mut slowest = Duration::ZERO;
        for number in 0..CALLS {
            let calls: [&mut dyn FnMut() -> nfqnl::Result<()>; 5] = [
                &mut || queue.set_maxlen(1000 + u32::from(number)),
                &mut || handle.bind_pf(Family::INET),
                &mut || handle.unbind_pf(Family::INET),
                &mut || handle.socket().sync(),
                &mut || {
                    let created = handle.create_queue(100 + number, |_| {});
                    created.map(|queue| queues.push(queue))
                },
            ];
            for call in calls {
                let begin = Instant::now();
                call().unwrap();
                slowest = slowest.max(begin.elapsed());
                // Long enough for the thread to be back in recv(2)
                thread::sleep(Duration::from_micros(500));
            }
            lab.send_numbered(0..1);
            lab.expect_numbered(0..1);
        }
        println!("the slowest call took {slowest:?}");
        assert!(slowest < Duration::from_millis(900), "a call waited");
        is_over.store(true, Ordering::SeqCst);
        while !reader.is_finished() {
            lab.send(b"ends the read");
            thread::sleep(Duration::from_millis(1));
        }
        reader.join().unwrap();
    });
}

#[test]
fn a_slow_callback_delays_no_other_thread() {
    isolated(|| {
        let _watchdog = Watchdog::new(Duration::from_secs(60));
        let lab = Lab::new();
        let other = lab.add_queue(2);
        for by_run_once in [false, true] {
            let looping = Loop::new();
            let (began, running) = mpsc::channel();
            let (end, ended) = mpsc::channel::<()>();
            let queue = looping.create_queue(QUEUE, move |data| {
                began.send(()).unwrap();
                ended.recv().unwrap();
                data.set_verdict(Verdict::Accept, None);
            });
            let (handle, mut copy) = (&looping.handle, &looping.socket);
            let turn = |batch: &mut RecvBatch, buf: &mut [u8]| {
                if by_run_once {
                    return handle.run_once(batch).unwrap();
                }
                let len = copy.read(buf).unwrap();
                handle.handle_packet(&buf[..len]).unwrap()
            };
            let mut turn = turn;
            lab.send_numbered(0..1);
            thread::scope(|scope| {
                scope.spawn(|| {
                    let mut buf = vec![0; RecvBatch::DEFAULT_SLOT_LEN];
                    let mut batch = RecvBatch::default();
                    while turn(&mut batch, &mut buf) == 0 {}
                });
                running.recv().unwrap();
                // The callback runs until all of these calls have returned.
                queue.set_maxlen(100).unwrap();
                queue.set_mode(CopyMode::Packet, 0xffff).unwrap();
                handle.bind_pf(Family::INET).unwrap();
                handle.socket().sync().unwrap();
                assert_eq!(handle.socket().stats().packets, 1);
                handle.on_event(|_| {});
                let (send, seen) = mpsc::channel();
                let second = handle
                    .create_queue_with(2, &WHOLE_PACKETS, move |data| {
                        send.send(()).unwrap();
                        data.set_verdict(Verdict::Accept, None);
                    })
                    .unwrap();
                // This thread may run other callbacks meanwhile.
                other.send(b"other", other.address()).unwrap();
                run(handle, &mut RecvBatch::default(), 1);
                assert_eq!(seen.try_iter().count(), 1);
                assert_eq!(other.recv().as_deref(), Some(&b"other"[..]));
                second.destroy().unwrap();
                end.send(()).unwrap();
            });
            lab.expect_numbered(0..1);
        }
    });
}

/// One callback is never run by two threads at once, and each packet is called back for once
#[test]
fn threads_that_run_a_handle_share_its_callbacks() {
    isolated(|| {
        const N: u32 = 1000;
        const THREADS: usize = 4;
        let _watchdog = Watchdog::new(Duration::from_secs(60));
        let lab = Lab::new();
        let received = AtomicU32::new(0);
        let (is_running, is_over) = (AtomicBool::new(false), AtomicBool::new(false));
        let mut seen = Vec::new();
        let handle = nfqnl::open().unwrap();
        let queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, |data| {
                assert!(!is_running.swap(true, Ordering::SeqCst), "it runs already");
                let number = data.get_payload()[28..].try_into().unwrap();
                seen.push(u32::from_be_bytes(number));
                data.set_verdict(Verdict::Accept, None);
                is_running.store(false, Ordering::SeqCst);
                received.fetch_add(1, Ordering::SeqCst);
            })
            .unwrap();
        thread::scope(|scope| {
            let threads = [(); THREADS].map(|()| {
                scope.spawn(|| {
                    let mut batch = RecvBatch::new(4, 4096);
                    while !is_over.load(Ordering::SeqCst) {
                        handle.run_once(&mut batch).unwrap();
                    }
                })
            });
            lab.send_in_bursts(0..N, &received);
            while received.load(Ordering::SeqCst) < N {
                thread::yield_now();
            }
            is_over.store(true, Ordering::SeqCst);
            while threads.iter().any(|thread| !thread.is_finished()) {
                handle.socket().waker().wake_all();
                thread::sleep(Duration::from_millis(1));
            }
        });
        assert_eq!(lab.drain(), usize::try_from(N).unwrap());
        assert_eq!(handle.socket().stats().refused_verdicts, 0);
        queue.destroy().unwrap();
        drop(handle);
        seen.sort_unstable();
        assert_eq!(seen, Vec::from_iter(0..N));
    });
}

/// A callback sends the verdicts on the packets before it, and then waits
#[test]
fn send_now_sends_what_was_decided_before() {
    isolated(|| {
        let _watchdog = Watchdog::new(Duration::from_secs(60));
        let lab = Lab::new();
        for is_set_aside in [false, true] {
            let handle = nfqnl::open().unwrap();
            let (began, waiting) = mpsc::channel();
            let (end, ended) = mpsc::channel::<()>();
            let mut seen = 0;
            let queue = handle
                .create_queue_with(QUEUE, &WHOLE_PACKETS, move |data| {
                    if seen == 3 {
                        data.send_now().unwrap();
                        began.send(()).unwrap();
                        ended.recv().unwrap();
                    }
                    data.set_verdict(Verdict::Accept, None);
                    seen += 1;
                })
                .unwrap();
            lab.send_numbered(0..6);
            if is_set_aside {
                queue.set_maxlen(10).unwrap();
            }
            thread::scope(|scope| {
                scope.spawn(|| run(&handle, &mut RecvBatch::default(), 6));
                waiting.recv().unwrap();
                lab.expect_numbered(0..3);
                assert!(lab.v4.is_silent(), "the fourth is not decided");
                end.send(()).unwrap();
                lab.expect_numbered(3..6);
            });
            assert_eq!(handle.socket().stats().refused_verdicts, 0);
        }
    });
}

/// A decision waits for the callbacks of other packets for about a millisecond only
#[test]
fn short_callbacks_do_not_delay_a_verdict() {
    isolated(|| {
        const N: u32 = 64;
        const CALLBACK: Duration = Duration::from_millis(3);
        let lab = Lab::new();
        let (mut decided, mut delivered) = (Vec::new(), Vec::new());
        let handle = nfqnl::open().unwrap();
        let queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, |data| {
                thread::sleep(CALLBACK);
                data.set_verdict(Verdict::Accept, None);
                decided.push(Instant::now());
            })
            .unwrap();
        lab.send_numbered(0..N);
        thread::scope(|scope| {
            scope.spawn(|| {
                for number in 0..N {
                    lab.expect_numbered([number]);
                    delivered.push(Instant::now());
                }
            });
            run(&handle, &mut RecvBatch::default(), 64);
        });
        queue.destroy().unwrap();
        drop(handle);
        let delays = decided.iter().zip(&delivered);
        let mut delays = Vec::from_iter(delays.map(|(decided, at)| *at - *decided));
        delays.sort_unstable();
        let median = delays[delays.len() / 2];
        println!("delays of {median:?}, and {:?} at most", delays.last());
        // Until all 64 callbacks have run, it is a hundred milliseconds.
        assert!(median < 5 * CALLBACK, "{delays:?}");
    });
}

/// A batch may have packets from before a queue was created
#[test]
fn a_batch_from_before_drops_no_callback() {
    isolated(|| {
        let lab = Lab::new();
        let second = lab.add_queue(2);
        for other_turns in [false, true] {
            let handle = nfqnl::open().unwrap();
            let mut packets = 0;
            let first = handle
                .create_queue_with(QUEUE, &WHOLE_PACKETS, move |data| {
                    data.set_verdict(Verdict::Accept, None);
                    packets += 1;
                    assert!(packets != 1, "on purpose");
                })
                .unwrap();
            lab.send_numbered(0..3);
            first.set_maxlen(10).unwrap(); // sets the three aside
            let mut batch = RecvBatch::default();
            catch_unwind(AssertUnwindSafe(|| run(&handle, &mut batch, 3))).unwrap_err();

            let (send, seen) = mpsc::channel();
            let _second = handle
                .create_queue_with(2, &WHOLE_PACKETS, move |data| {
                    send.send(()).unwrap();
                    data.set_verdict(Verdict::Accept, None);
                })
                .unwrap();
            if other_turns {
                let mut other = RecvBatch::default();
                handle.try_run_once(&mut other).unwrap();
            }
            handle.try_run_once(&mut batch).unwrap();
            lab.expect_numbered(0..3);
            for _ in 0..3 {
                second.send(b"second", second.address()).unwrap();
            }
            run(&handle, &mut batch, 3);
            assert_eq!(seen.try_iter().count(), 3);
            assert_eq!(handle.socket().stats().no_callback, 0);
            for _ in 0..3 {
                assert_eq!(second.recv().as_deref(), Some(&b"second"[..]));
            }
        }
    });
}

/// A receive loop of the handle's socket leaves a batch early, and a queue is created
#[test]
fn a_batch_of_a_receive_loop_drops_no_callback() {
    isolated(|| {
        let lab = Lab::new();
        let second = lab.add_queue(2);
        let handle = nfqnl::open().unwrap();
        let socket = handle.socket();
        let first = socket.bind(QUEUE).unwrap();
        lab.send_numbered(0..3);
        first.set_maxlen(10).unwrap(); // sets the three aside
        let mut batch = RecvBatch::default();
        let key = next_packet(socket, &mut batch).key();
        socket.set_verdict(key, Verdict::Accept).unwrap();
        let (send, seen) = mpsc::channel();
        let _second = handle
            .create_queue_with(2, &WHOLE_PACKETS, move |data| {
                send.send(()).unwrap();
                data.set_verdict(Verdict::Accept, None);
            })
            .unwrap();
        // The other two have no callback.
        assert_eq!(handle.try_run_once(&mut batch).unwrap(), 0);
        assert_eq!(handle.socket().stats().no_callback, 2);
        second.send(b"second", second.address()).unwrap();
        run(&handle, &mut batch, 1);
        assert_eq!(seen.try_iter().count(), 1);
        assert_eq!(second.recv().as_deref(), Some(&b"second"[..]));
        assert_eq!(handle.socket().stats().no_callback, 2);
    });
}

#[test]
fn a_batch_of_another_socket_is_an_error() {
    isolated(|| {
        let lab = Lab::new();
        let second = lab.add_queue(2);
        let (a, b) = (nfqnl::open().unwrap(), nfqnl::open().unwrap());
        let first = a.socket().bind(QUEUE).unwrap();
        let (send, seen) = mpsc::channel();
        let _second = b
            .create_queue_with(2, &WHOLE_PACKETS, move |data| {
                send.send(()).unwrap();
                data.set_verdict(Verdict::Accept, None);
            })
            .unwrap();
        lab.send_numbered(0..3);
        first.set_maxlen(10).unwrap(); // sets the three aside
        let mut batch = RecvBatch::default();
        let key = next_packet(a.socket(), &mut batch).key();
        a.socket().set_verdict(key, Verdict::Accept).unwrap();
        assert!(batch.has_events());
        let results = [
            b.run_once(&mut batch),
            b.try_run_once(&mut batch),
            b.run_timeout(&mut batch, TIMEOUT),
            b.socket().recv(&mut batch).map(Iterator::count),
            b.socket().try_recv(&mut batch).map(Iterator::count),
            b.socket()
                .recv_timeout(&mut batch, TIMEOUT)
                .map(Iterator::count),
        ];
        for result in results {
            assert!(
                matches!(result, Err(Error::WrongSocket { .. })),
                "{result:?}"
            );
        }
        for _ in 0..2 {
            let key = next_packet(a.socket(), &mut batch).key();
            a.socket().set_verdict(key, Verdict::Accept).unwrap();
        }
        lab.expect_numbered(0..3);
        // An empty batch may be used with any socket.
        second.send(b"second", second.address()).unwrap();
        run(&b, &mut batch, 1);
        assert_eq!(seen.try_iter().count(), 1);
        assert_eq!(second.recv().as_deref(), Some(&b"second"[..]));
    });
}

/// Its captures may use the handle when they are dropped
#[test]
fn a_replaced_callback_is_dropped_without_locks() {
    struct UsesHandle(&'static Handle<'static>);
    impl Drop for UsesHandle {
        fn drop(&mut self) {
            assert!(format!("{:?}", self.0).contains("Handle"));
        }
    }
    isolated(|| {
        static HANDLE: OnceLock<Handle<'static>> = OnceLock::new();
        let handle = HANDLE.get_or_init(|| nfqnl::open().unwrap());
        let queue = handle.socket().bind(QUEUE).unwrap();
        let captured = UsesHandle(handle);
        handle.set_callback(&queue, move |_| {
            let _ = &captured;
        });
        handle.set_callback(&queue, |_| {});
    });
}
