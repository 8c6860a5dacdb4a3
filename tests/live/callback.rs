//! The API that users of libnetfilter_queue know: callbacks, and the caller's own receive loop

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nfqnl::{
    ConfigFlags, CopyMode, Error, Event, Family, Handle, PacketKey, Queue, QueueConfig, QueueData,
    RecvBatch, SkbInfo, Verdict,
};
use nfqnl_testkit::hosts::{Bridge, Router};
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::rules::{self, Hook, Rule, Table};
use nfqnl_testkit::traffic::{TIMEOUT, Udp};
use nfqnl_testkit::{kernel, link};

use crate::examples::with_udp_payload;
use crate::lab::{Lab, PORT, QUEUE, bridge, expect_rewritten, priority};

/// The caller's own receive loop
struct Loop {
    handle: Handle,
    socket: File,
    buf: Vec<u8>,
}

impl Loop {
    fn new() -> Self {
        let handle = nfqnl::open().unwrap();
        let socket = File::from(handle.as_fd().try_clone_to_owned().unwrap());
        Self {
            handle,
            socket,
            buf: vec![0; RecvBatch::DEFAULT_SLOT_LEN],
        }
    }

    /// A queue that copies whole packets
    fn create_queue(
        &mut self,
        num: u16,
        callback: impl FnMut(&mut QueueData<'_>) + Send + 'static,
    ) -> Queue {
        let config = QueueConfig::new().copy_mode(CopyMode::PACKET, 0xffff);
        self.handle
            .create_queue_with(num, &config, callback)
            .unwrap()
    }

    /// One turn: receives a datagram and passes it on
    fn turn(&mut self) -> nfqnl::Result<usize> {
        let len = self.socket.read(&mut self.buf).unwrap();
        self.handle.handle_packet(&self.buf[..len])
    }
}

#[test]
fn the_published_calls_in_the_published_order() {
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
        queue.set_mode(CopyMode::PACKET, 0xffff).unwrap();
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
        lab.send(b"nobody has it");
        assert!(lab.v4.is_silent());
        looping.handle.close().unwrap();
    });
}

/// Every getter says what the packet view says, with C's zeroes for what is absent
#[test]
fn the_getters_mirror_the_packet() {
    isolated(|| {
        let lab = Lab::with(Hook::Output, &Rule::new().udp().dport(PORT).queue(QUEUE));
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

/// The bridge itself both ways, and another port each way
#[test]
fn the_getters_tell_the_ports_of_a_bridge() {
    isolated(|| {
        let Some(bridge) = bridge() else { return };
        let (left, right) = (&bridge.left, &bridge.right);
        let devices = [Bridge::LINK, left.link, right.link].map(|name| link::index(name).unwrap());
        let [br0, from, to] = devices;
        let table = Table::new(rules::Family::Ip, "t").unwrap();
        let chain = table.chain("c", Hook::Forward, 0).unwrap();
        chain
            .add(&Rule::new().udp().dport(PORT).queue(QUEUE))
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

/// Of a packet that only passes through, they tell more than of a local one
#[test]
fn the_getters_tell_devices_mac_time_and_checksums_of_a_forwarded_packet() {
    isolated(|| {
        let router = Router::new().unwrap();
        let (client, server) = (&router.client, &router.server);
        let mac = client.namespace.run(|| link::mac("eth0").unwrap());
        let devices = [client.link, server.link].map(|name| link::index(name).unwrap());
        let table = Table::new(rules::Family::Ip, "t").unwrap();
        let chain = table.chain("c", Hook::Forward, 0).unwrap();
        chain
            .add(&Rule::new().udp().dport(PORT).queue(QUEUE))
            .unwrap();
        let mut looping = Loop::new();
        let (send, seen) = mpsc::channel();
        let queue = looping.create_queue(QUEUE, move |data| {
            assert_eq!([data.get_indev(), data.get_outdev()], devices);
            assert_eq!(data.get_packet_hw().unwrap().as_bytes(), mac);
            // Without GSO the kernel would have completed the checksum that the client has left to its device.
            assert_eq!(data.get_skbinfo(), SkbInfo::CSUM_NOT_READY);
            send.send(data.get_timestamp()).unwrap();
            data.set_verdict(Verdict::Accept, None);
        });
        queue.set_flags(ConfigFlags::GSO, ConfigFlags::GSO).unwrap();
        let receiver = server.namespace.run(|| Udp::bind(server.v4, PORT).unwrap());
        receiver.want_timestamps().unwrap();
        let sender = client.namespace.run(|| Udp::bind(client.v4, 0).unwrap());
        // The kernel begins to take times a moment later.
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
fn the_verdict_is_executed_once_the_callback_exits_and_the_last_one_counts() {
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
fn a_mark_set_in_a_callback_is_there_at_the_next_pass() {
    isolated(|| {
        let lab = Lab::with(
            Hook::Input,
            &Rule::new().udp().dport(PORT).mark_not(3).queue(QUEUE),
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
fn without_a_verdict_nothing_is_sent_and_the_packet_is_answered_later() {
    isolated(|| {
        let lab = Lab::new();
        let mut looping = Loop::new();
        let (send, keys) = mpsc::channel::<PacketKey>();
        let _queue = looping.create_queue(QUEUE, move |data| send.send(data.key()).unwrap());
        lab.send(b"later");
        assert_eq!(looping.turn().unwrap(), 1);
        assert!(lab.v4.is_silent());
        let key = keys.recv().unwrap();
        looping.handle.verdict(key, Verdict::Accept).unwrap();
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
            // IPv4 knows a UDP checksum of 0: none.
            new[26..28].fill(0);
            send.send(data.set_verdict_with_payload(Verdict::Accept, None, &new))
                .unwrap();
        });
        lab.send(b"head and tail");
        assert_eq!(looping.turn().unwrap(), 1);
        results.recv().unwrap().unwrap();
        expect_rewritten(&lab.v4, b"head and HEAD");

        // Of a packet that came cut, replacing it would lose the rest.
        queue.set_mode(CopyMode::PACKET, 40).unwrap();
        lab.send(b"head and tail");
        while looping.turn().unwrap() == 0 {}
        match results.recv().unwrap().unwrap_err() {
            Error::CutPacket { needed, had, .. } => assert_eq!((needed, had), (41, 40)),
            other => panic!("{other:?}"),
        }
        assert!(lab.v4.is_silent(), "nothing was sent, and it waits");
    });
}

/// All at once, seen by the callback of a later queue and by the receiver
#[test]
fn a_decision_of_a_callback_carries_mark_priority_and_payload() {
    isolated(|| {
        const MARK: u32 = 0xdead_beef;
        const PRIORITY: u32 = 6;
        const LATER: u16 = 2;
        let lab = Lab::with(Hook::Output, &Rule::new().udp().dport(PORT).queue(QUEUE));
        for table in lab.tables() {
            let chain = table.chain("later", Hook::Postrouting, 0).unwrap();
            chain
                .add(&Rule::new().udp().dport(PORT).queue(LATER))
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
fn a_decision_that_fails_leaves_what_was_set_before() {
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
fn a_panic_in_a_callback_reaches_the_caller_and_leaves_the_handle_usable() {
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
        // All three go through the stash, so that the panic comes amid them.
        queue.set_maxlen(10).unwrap();
        let panicked = catch_unwind(AssertUnwindSafe(|| looping.turn()));
        let panic = panicked.unwrap_err();
        assert!(
            panic
                .downcast_ref::<&str>()
                .is_some_and(|text| text.contains("on purpose"))
        );
        // Its verdict was sent all the same, and the third packet comes with the next call.
        assert_eq!(looping.turn().unwrap(), 1);
        for number in 0..N {
            assert_eq!(lab.recv().as_deref(), Some(&number.to_be_bytes()[..]));
        }
        lab.send(b"after");
        while looping.turn().unwrap() == 0 {}
        assert_eq!(lab.recv().as_deref(), Some(&b"after"[..]));
        assert_eq!(looping.handle.stats().packets, u64::from(N) + 1);
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
            send.send(("first", data.key().queue)).unwrap();
            data.set_verdict(
                Verdict::Queue {
                    num: 9,
                    bypass: false,
                },
                None,
            );
        });
        let _second = looping.create_queue(9, move |data| {
            second.send(("second", data.key().queue)).unwrap();
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
fn what_no_callback_takes_goes_to_the_event_handler_or_is_counted() {
    isolated(|| {
        let lab = Lab::new();
        let mut looping = Loop::new();
        let _no_callback = looping.handle.bind_queue(QUEUE).unwrap();
        lab.send(b"unclaimed");
        assert_eq!(looping.turn().unwrap(), 1);
        assert_eq!(looping.handle.stats().unclaimed, 1);

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
        assert_eq!(looping.turn().unwrap(), 1);
        let (what, key) = events.recv().unwrap();
        assert_eq!((what, key.id), ("packet", 2));
        for _ in 0..2 {
            looping.handle.verdict(key, Verdict::Accept).unwrap();
        }
        assert_eq!(looping.turn().unwrap(), 0);
        assert_eq!(events.recv().unwrap(), ("refused", key));
        assert_eq!(looping.handle.stats().unclaimed, 1);
        assert_eq!(lab.recv().as_deref(), Some(&b"to the handler"[..]));
    });
}

#[test]
fn a_datagram_that_was_cut_or_is_none_is_an_error_and_the_loop_goes_on() {
    isolated(|| {
        let lab = Lab::new();
        let mut looping = Loop::new();
        let queue = looping.create_queue(QUEUE, |data| data.set_verdict(Verdict::Accept, None));
        lab.send(&[6; 500]);
        let mut small = [0; 200];
        let len = looping.socket.read(&mut small).unwrap();
        let key = match looping.handle.handle_packet(&small[..len]).unwrap_err() {
            Error::Truncated {
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
        looping.handle.verdict(key, Verdict::Accept).unwrap();
        assert_eq!(lab.recv().as_deref(), Some(&[6; 500][..]));

        for garbage in [&[0xff; 20][..], &[1], &[16, 0, 0, 0]] {
            let error = looping.handle.handle_packet(garbage).unwrap_err();
            assert!(
                matches!(error, Error::Decode { .. } | Error::Truncated { .. }),
                "{error:?} for {garbage:?}"
            );
        }
        assert_eq!(looping.handle.handle_packet(&[]).unwrap(), 0);

        // A whole message, as far as its length says, of which an attribute is broken.
        lab.send(b"broken on the way");
        let mut buf = [0; 200];
        let len = looping.socket.read(&mut buf).unwrap();
        buf[32..34].copy_from_slice(&3_u16.to_ne_bytes()); // the second attribute's length
        let counted = looping.handle.stats().malformed;
        let error = looping.handle.handle_packet(&buf[..len]).unwrap_err();
        assert!(
            matches!(error, Error::Decode { key: Some(_), .. }),
            "{error:?}"
        );
        assert_eq!(looping.handle.stats().malformed, counted + 1);

        lab.send(b"after");
        assert_eq!(looping.turn().unwrap(), 1);
        assert_eq!(lab.recv().as_deref(), Some(&b"after"[..]));

        // The same once its queue has ended: nothing to answer, and no error, as with a packet that is not broken
        queue.destroy().unwrap();
        let before = looping.handle.stats();
        assert_eq!(looping.handle.handle_packet(&buf[..len]).unwrap(), 0);
        let after = looping.handle.stats();
        assert_eq!(after.discarded, before.discarded + 1);
        assert_eq!(after.packets, before.packets + 1);
        assert_eq!(after.malformed, before.malformed);
    });
}

/// The queue itself may live in its callback, and end there
#[test]
fn a_callback_may_end_its_own_queue() {
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

/// What was not looked at yet when a callback ended its queue and panicked is gone with the queue
#[test]
fn packets_of_an_ended_queue_are_not_given_to_the_next() {
    isolated(|| {
        let lab = Lab::new();
        let mut looping = Loop::new();
        let (give, queue) = mpsc::channel::<Queue>();
        let created = looping.create_queue(QUEUE, move |_| {
            queue.recv().unwrap().destroy().unwrap();
            panic!("on purpose");
        });
        lab.send_numbered(0..3);
        created.set_maxlen(10).unwrap(); // reads the three
        give.send(created).unwrap();
        catch_unwind(AssertUnwindSafe(|| looping.handle.handle_packet(&[]))).unwrap_err();
        assert_eq!(looping.handle.stats().discarded, 2);

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
