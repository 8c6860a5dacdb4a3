//! What the kernel tells about a packet: families, hooks, devices, and every attribute that can be had here

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, TcpListener};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use etherparse::{SlicedPacket, TransportSlice};
use nfqnl::consts::NFQA_PACKET_HDR;
use nfqnl::{
    ConfigFlags, CopyMode, Event, Family, Handle, QueueConfig, RecvBatch, SkbInfo, Verdict,
};
use nfqnl_testkit::hosts::{Bridge, Router};
use nfqnl_testkit::netns::{is_rootless, isolated};
use nfqnl_testkit::rules::{self, Hook, QueueOptions, Rule, Table};
use nfqnl_testkit::traffic::{self, TIMEOUT, Udp, V4, V6};
use nfqnl_testkit::{cpu, link, rules::Chain};

use crate::lab::{Lab, PORT, QUEUE, bridge, is_silent, next_packet, priority, udp_payload};

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;

#[test]
fn the_hooks_of_a_local_packet_tell_family_devices_and_protocol() {
    isolated(|| {
        let lo = link::index("lo").unwrap();
        for hook in Hook::ALL.into_iter().filter(|hook| *hook != Hook::Forward) {
            let comes_in = matches!(hook, Hook::Prerouting | Hook::Input);
            let lab = Lab::with(hook, &Rule::new().udp().dport(PORT).queue(QUEUE));
            let handle = Handle::open().unwrap();
            let _queue = handle.bind_queue(QUEUE).unwrap();
            let mut batch = RecvBatch::default();
            let families = [(Family::INET, ETH_P_IP), (Family::INET6, ETH_P_IPV6)];
            for (socket, (family, protocol)) in lab.sockets().into_iter().zip(families) {
                socket.send(b"local", socket.address()).unwrap();
                let packet = next_packet(&handle, &mut batch);
                assert_eq!(packet.hook(), nfqnl::Hook(hook.number()));
                assert_eq!((packet.family(), packet.hw_protocol()), (family, protocol));
                assert_eq!(packet.indev(), comes_in.then_some(lo), "{hook:?}");
                assert_eq!(packet.outdev(), (!comes_in).then_some(lo), "{hook:?}");
                assert_eq!(packet.hw_addr().is_some(), comes_in, "{hook:?}");
                assert_eq!((packet.physindev(), packet.physoutdev()), (None, None));
                assert_eq!(packet.payload().len(), udp_len(family, b"local"));
                assert_eq!((packet.capture_len(), packet.is_cut()), (None, false));
                assert_eq!(udp_payload(&packet), b"local");
                handle.verdict(packet.key(), Verdict::Accept).unwrap();
                assert_eq!(socket.recv().as_deref(), Some(&b"local"[..]));
            }
            lab.delete_rules();
        }
    });
}

fn udp_len(family: Family, payload: &[u8]) -> usize {
    let ip = if family == Family::INET { 20 } else { 40 };
    ip + 8 + payload.len()
}

#[test]
fn a_forwarded_packet_passes_three_hooks_with_both_devices_and_its_senders_mac() {
    isolated(|| {
        let router = Router::new().unwrap();
        let (client, server) = (&router.client, &router.server);
        let mac = client.namespace.run(|| link::mac("eth0").unwrap());
        let [from, to] = [client.link, server.link].map(|name| link::index(name).unwrap());
        let handle = Handle::open().unwrap();
        let hooks = [Hook::Prerouting, Hook::Forward, Hook::Postrouting];
        let queues = hooks.map(|hook| handle.bind_queue(hook.number().into()).unwrap());
        for family in rules::Family::ALL {
            let table = Table::new(family, "t").unwrap();
            for hook in hooks {
                let chain = table.chain(&format!("{hook:?}"), hook, 0).unwrap();
                let rule = Rule::new().udp().dport(PORT).queue(hook.number().into());
                chain.add(&rule).unwrap();
            }
        }
        let mut batch = RecvBatch::default();
        for (source, destination) in [(client.v4, server.v4), (client.v6, server.v6)] {
            let receiver = server
                .namespace
                .run(|| Udp::bind(destination, PORT).unwrap());
            let sender = client.namespace.run(|| Udp::bind(source, 0).unwrap());
            sender.send(b"forwarded", receiver.address()).unwrap();
            for (hook, queue) in hooks.into_iter().zip(&queues) {
                let packet = next_packet(&handle, &mut batch);
                let routed = hook != Hook::Prerouting;
                assert_eq!(packet.queue(), queue.num());
                assert_eq!(packet.hook().0, hook.number());
                assert_eq!(packet.indev(), Some(from), "{hook:?}");
                assert_eq!(packet.outdev(), routed.then_some(to), "{hook:?}");
                // Once it has left the forwarding code, its link-layer header belongs to the way out.
                if hook != Hook::Postrouting {
                    let hw_addr = packet.hw_addr().expect("a source MAC");
                    assert_eq!(hw_addr.as_bytes(), mac, "{hook:?}");
                }
                handle.verdict(packet.key(), Verdict::Accept).unwrap();
            }
            assert_eq!(receiver.recv().as_deref(), Some(&b"forwarded"[..]));
        }
    });
}

/// Bridged packets pass the IP hooks where `br_netfilter` has them do so
#[test]
fn a_bridged_packet_tells_the_ports_of_the_bridge() {
    isolated(|| {
        let Some(bridge) = bridge() else { return };
        let (left, right) = (&bridge.left, &bridge.right);
        let indexes = [Bridge::LINK, left.link, right.link].map(|name| link::index(name).unwrap());
        let [br0, from, to] = indexes.map(Some);
        let mac = left.namespace.run(|| link::mac("eth0").unwrap());
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        let families = [
            (rules::Family::Ip, left.v4, right.v4),
            (rules::Family::Ip6, left.v6, right.v6),
        ];
        for (family, source, destination) in families {
            let table = Table::new(family, "t").unwrap();
            let rule = Rule::new().udp().dport(PORT).queue(QUEUE);
            for hook in [Hook::Prerouting, Hook::Forward] {
                let chain = table.chain(&format!("{hook:?}"), hook, 0).unwrap();
                chain.add(&rule).unwrap();
            }
            let receiver = right
                .namespace
                .run(|| Udp::bind(destination, PORT).unwrap());
            let sender = left.namespace.run(|| Udp::bind(source, 0).unwrap());
            sender.send(b"bridged", receiver.address()).unwrap();
            for (outdev, physoutdev) in [(None, None), (br0, to)] {
                let packet = next_packet(&handle, &mut batch);
                assert_eq!((packet.indev(), packet.outdev()), (br0, outdev));
                assert_eq!(
                    (packet.physindev(), packet.physoutdev()),
                    (from, physoutdev)
                );
                assert_eq!(packet.hw_addr().unwrap().as_bytes(), mac);
                handle.verdict(packet.key(), Verdict::Accept).unwrap();
            }
            assert_eq!(receiver.recv().as_deref(), Some(&b"bridged"[..]));
        }
    });
}

#[test]
fn a_packets_mark_and_priority_are_told() {
    isolated(|| {
        let lab = Lab::with(Hook::Output, &Rule::new().udp().dport(PORT).queue(QUEUE));
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.v4.set_mark(0xfedc_ba98).unwrap();
        lab.v4.set_priority(5).unwrap();
        lab.send(b"marked");
        let packet = next_packet(&handle, &mut batch);
        assert_eq!(packet.mark(), 0xfedc_ba98);
        assert_eq!(packet.priority(), priority(5));
    });
}

#[test]
fn the_time_of_receipt_is_told_while_anyone_wants_it() {
    isolated(|| {
        let lab = Lab::at_input();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.v4.want_timestamps().unwrap();
        // The kernel begins to take them a moment later.
        let deadline = Instant::now() + TIMEOUT;
        let timestamp = loop {
            lab.send(b"when");
            let packet = next_packet(&handle, &mut batch);
            match packet.timestamp() {
                Some(timestamp) => break timestamp,
                None => assert!(Instant::now() < deadline, "no timestamp"),
            }
            handle.verdict(packet.key(), Verdict::Drop).unwrap();
            thread::sleep(Duration::from_millis(1));
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let age = now.checked_sub(timestamp).expect("not in the future");
        assert!(age < TIMEOUT, "{age:?} old");
    });
}

#[test]
fn the_sender_is_told_when_asked_for() {
    isolated(|| {
        let lab = Lab::with(Hook::Output, &Rule::new().udp().dport(PORT).queue(QUEUE));
        let handle = Handle::open().unwrap();
        let queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"whose");
        let packet = next_packet(&handle, &mut batch);
        assert_eq!((packet.uid(), packet.gid()), (None, None));
        queue
            .set_flags(ConfigFlags::UID_GID, ConfigFlags::UID_GID)
            .unwrap();
        lab.send(b"mine");
        let packet = next_packet(&handle, &mut batch);
        // As the machine's root would see them: the kernel does not translate into user namespaces.
        let [uid, gid] = ["uid", "gid"].map(outside_id);
        assert_eq!((packet.uid(), packet.gid()), (Some(uid), Some(gid)));
        queue
            .set_flags(ConfigFlags::UID_GID, ConfigFlags::empty())
            .unwrap();
        lab.send(b"whose again");
        assert_eq!(next_packet(&handle, &mut batch).uid(), None);
    });
}

/// What id 0 of this user namespace is outside
fn outside_id(kind: &str) -> u32 {
    let map = std::fs::read_to_string(format!("/proc/self/{kind}_map")).unwrap();
    map.split_ascii_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap()
}

#[test]
fn meta_mode_tells_all_but_the_payload_and_packet_mode_copies_a_range() {
    isolated(|| {
        let lab = Lab::at_input();
        let handle = Handle::open().unwrap();
        let config = QueueConfig::new().copy_mode(CopyMode::META, 0);
        let queue = handle.bind_queue_with(QUEUE, &config).unwrap();
        let mut batch = RecvBatch::default();
        let whole = 20 + 8 + 1000;
        let mut expect = |copied: usize, told: Option<u32>| {
            lab.send(&[1; 1000]);
            let packet = next_packet(&handle, &mut batch);
            assert!(packet.attr(NFQA_PACKET_HDR).is_some());
            assert_eq!(packet.indev(), Some(1));
            assert_eq!(
                (packet.payload().len(), packet.capture_len()),
                (copied, told)
            );
            handle.verdict(packet.key(), Verdict::Accept).unwrap();
            assert_eq!(lab.recv().as_deref(), Some(&[1; 1000][..]));
        };
        expect(0, None);
        for range in [1, 2, 3, 64] {
            queue.set_mode(CopyMode::PACKET, range).unwrap();
            expect(range.try_into().unwrap(), Some(whole));
        }
        // 0 and everything from the packet's length on mean all of it.
        for range in [0, whole, 0xffff, u32::MAX] {
            queue.set_mode(CopyMode::PACKET, range).unwrap();
            expect(whole.try_into().unwrap(), None);
        }
    });
}

#[test]
fn mode_none_drops() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        queue.set_mode(CopyMode::NONE, 0).unwrap();
        lab.send(b"dropped");
        assert!(lab.v4.is_silent() && is_silent(&handle, &mut batch));
        queue.set_mode(CopyMode::PACKET, 0).unwrap();
        lab.send(b"held");
        assert_eq!(udp_payload(&next_packet(&handle, &mut batch)), b"held");
    });
}

/// The longest IPv4 packet there is, more than one message can hold
#[test]
fn the_longest_packet_comes_cut_and_is_delivered_whole() {
    isolated(|| {
        const LONGEST: usize = 65_535;
        const COPIED: usize = 65_531;
        link::set_mtu("lo", 65_536).unwrap();
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        let payload = vec![3; LONGEST - 28];
        lab.send(&payload);
        let packet = next_packet(&handle, &mut batch);
        assert_eq!(packet.payload().len(), COPIED);
        assert_eq!(packet.capture_len().map(u64::from), Some(LONGEST as u64));
        handle.verdict(packet.key(), Verdict::Accept).unwrap();
        assert_eq!(lab.recv(), Some(payload));
    });
}

fn queue_everything_from(listener: &TcpListener, table: &Table) {
    let port = listener.local_addr().unwrap().port();
    let chain: Chain<'_> = table.chain("in", Hook::Input, 0).unwrap();
    for rule in [Rule::new().tcp().dport(port), Rule::new().tcp().sport(port)] {
        chain.add(&rule.queue(QUEUE)).unwrap();
    }
}

#[test]
fn a_tcp_connection_goes_through_the_queue_whole() {
    isolated(|| {
        for (family, address) in [(rules::Family::Ip, V4), (rules::Family::Ip6, V6)] {
            let table = Table::new(family, "t").unwrap();
            let listener = TcpListener::bind((address, 0)).unwrap();
            let to = listener.local_addr().unwrap();
            queue_everything_from(&listener, &table);
            let handle = Handle::open().unwrap();
            let _queue = handle.bind_queue(QUEUE).unwrap();
            let echo = thread::spawn(move || traffic::tcp_echo(&listener).unwrap());
            let sent = vec![9; 100_000];
            let client = {
                let sent = sent.clone();
                thread::spawn(move || traffic::tcp_exchange(to, &sent).unwrap())
            };
            // TCP sends a SYN again whose answer is late.
            let (mut held, mut handshakes) = (0, BTreeSet::new());
            let mut batch = RecvBatch::default();
            while !client.is_finished() {
                let deadline = Instant::now() + Duration::from_millis(10);
                for packet in handle
                    .recv_deadline(&mut batch, deadline)
                    .unwrap()
                    .packets()
                {
                    let sliced = SlicedPacket::from_ip(packet.payload()).unwrap();
                    match sliced.transport {
                        Some(TransportSlice::Tcp(tcp)) if tcp.syn() => {
                            handshakes.insert((tcp.ack(), tcp.sequence_number()));
                        }
                        _ => {}
                    }
                    held += 1;
                    handle.verdict(packet.key(), Verdict::Accept).unwrap();
                }
            }
            assert_eq!(client.join().unwrap(), sent);
            assert_eq!(echo.join().unwrap(), sent.len());
            let kinds: Vec<_> = handshakes.iter().map(|(is_answer, _)| *is_answer).collect();
            assert_eq!(kinds, [false, true], "SYN and SYN-ACK");
            assert!(held > 2);
        }
    });
}

/// With GSO, packets come as large as the sender's stack made them, their checksums unfinished
#[test]
fn gso_hands_over_packets_larger_than_the_mtu() {
    isolated(|| {
        const MTU: u32 = 1500;
        link::set_mtu("lo", MTU).unwrap();
        let listener = TcpListener::bind((V4, 0)).unwrap();
        let to = listener.local_addr().unwrap();
        let table = Table::new(rules::Family::Ip, "t").unwrap();
        queue_everything_from(&listener, &table);
        let handle = Handle::open().unwrap();
        let config = QueueConfig::new()
            .copy_mode(CopyMode::PACKET, 0)
            .flags(ConfigFlags::GSO, ConfigFlags::GSO);
        let _queue = handle.bind_queue_with(QUEUE, &config).unwrap();
        let echo = thread::spawn(move || traffic::tcp_echo(&listener).unwrap());
        let client = thread::spawn(move || traffic::tcp_exchange(to, &[5; 200_000]).unwrap());
        let mut longest = 0;
        let mut batch = RecvBatch::default();
        while !client.is_finished() {
            let deadline = Instant::now() + Duration::from_millis(10);
            for packet in handle
                .recv_deadline(&mut batch, deadline)
                .unwrap()
                .packets()
            {
                let len = packet.payload().len();
                if len > MTU.try_into().unwrap() {
                    let both = SkbInfo::GSO | SkbInfo::CSUM_NOT_READY;
                    assert!(packet.skb_info().contains(both), "{:?}", packet.skb_info());
                }
                longest = longest.max(len);
                handle.verdict(packet.key(), Verdict::Accept).unwrap();
            }
        }
        assert_eq!(client.join().unwrap(), [5; 200_000]);
        assert_eq!(echo.join().unwrap(), 200_000);
        assert!(longest > MTU.try_into().unwrap(), "{longest} at most");
    });
}

#[test]
fn icmp_is_held_and_answered() {
    isolated(|| {
        let families = [
            (rules::Family::Ip, V4, Rule::new().icmp()),
            (rules::Family::Ip6, V6, Rule::new().icmp6()),
        ];
        for (family, address, rule) in families {
            let table = Table::new(family, "t").unwrap();
            let chain = table.chain("out", Hook::Output, 0).unwrap();
            chain.add(&rule.queue(QUEUE)).unwrap();
            let handle = Handle::open().unwrap();
            let _queue = handle.bind_queue(QUEUE).unwrap();
            let mut batch = RecvBatch::default();
            let ping = thread::spawn(move || traffic::ping(address, b"ping", TIMEOUT).unwrap());
            for part in ["request", "reply"] {
                let packet = next_packet(&handle, &mut batch);
                assert!(packet.payload().ends_with(b"ping"), "{part}");
                handle.verdict(packet.key(), Verdict::Accept).unwrap();
            }
            assert!(ping.join().unwrap());
        }
    });
}

/// The addresses choose, and what goes from one to another stays in its queue
#[test]
fn a_rule_spreads_addresses_over_the_queues_of_one_handle() {
    isolated(|| {
        let rule = Rule::new().udp().dport(PORT);
        let lab = Lab::with(
            Hook::Output,
            &rule.queue_with(10..=13, QueueOptions::default()),
        );
        let handle = Handle::open().unwrap();
        let _queues = [10, 11, 12, 13].map(|num| handle.bind_queue(num).unwrap());
        let mut batch = RecvBatch::default();
        let mut hit = BTreeSet::new();
        // So many that they all but can't fall on one queue.
        for host in 1..=32 {
            let sender = Udp::bind(Ipv4Addr::new(127, 0, 0, host).into(), 0).unwrap();
            let [first, second] = [host, 100 + host].map(|number| {
                sender.send(&[number], lab.v4.address()).unwrap();
                let packet = next_packet(&handle, &mut batch);
                assert_eq!(udp_payload(&packet), [number]);
                handle.verdict(packet.key(), Verdict::Accept).unwrap();
                assert_eq!(lab.recv().as_deref(), Some(&[number][..]));
                packet.queue()
            });
            assert_eq!(first, second, "from 127.0.0.{host}");
            hit.insert(first);
        }
        assert!(hit.len() > 1, "only {hit:?}");
    });
}

#[test]
fn with_fan_out_the_senders_cpu_chooses_among_the_queues() {
    isolated(|| {
        const QUEUES: [u16; 3] = [10, 11, 12];
        let options = QueueOptions {
            bypass: false,
            fanout: true,
        };
        let rule = Rule::new().udp().dport(PORT);
        let lab = Lab::with(Hook::Output, &rule.queue_with(10..=12, options));
        let handle = Handle::open().unwrap();
        let _queues = QUEUES.map(|num| handle.bind_queue(num).unwrap());
        let mut batch = RecvBatch::default();
        let cpus = cpu::allowed().unwrap();
        assert!(!cpus.is_empty());
        for cpu in cpus.into_iter().take(8) {
            for socket in lab.sockets() {
                cpu::on(cpu, || socket.send(b"from a CPU", socket.address()))
                    .unwrap()
                    .unwrap();
                let packet = next_packet(&handle, &mut batch);
                assert_eq!(packet.queue(), QUEUES[cpu % QUEUES.len()], "CPU {cpu}");
                handle.verdict(packet.key(), Verdict::Accept).unwrap();
                assert_eq!(socket.recv().as_deref(), Some(&b"from a CPU"[..]));
            }
        }
    });
}

/// Security contexts need a security module that labels packets; without one the attribute is absent
#[test]
fn every_attribute_of_a_packet_can_be_walked() {
    isolated(|| {
        let lab = Lab::at_input();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"walk");
        let packet = next_packet(&handle, &mut batch);
        let attrs: Vec<_> = packet.attrs().map(|attr| attr.unwrap()).collect();
        assert_eq!(attrs.first().map(|attr| attr.kind), Some(NFQA_PACKET_HDR));
        assert_eq!(attrs.last().map(|attr| attr.value), Some(packet.payload()));
        for attr in attrs {
            assert_eq!(packet.attr(attr.kind), Some(attr.value));
        }
    });
}

#[test]
fn the_kernels_counters_are_read_where_they_may_be() {
    isolated(|| {
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let config = QueueConfig::new()
            .copy_mode(CopyMode::PACKET, 100)
            .maxlen(2);
        let _queue = handle.bind_queue_with(QUEUE, &config).unwrap();
        lab.send_numbered(0..5);
        let stats = nfqnl::QueueStats::read(QUEUE);
        if is_rootless() {
            let error = stats.unwrap_err();
            let source = std::error::Error::source(&error).unwrap().to_string();
            assert!(source.contains("Permission denied"), "{source}");
            return;
        }
        let stats = stats.unwrap().expect("it is bound");
        assert_eq!(
            (stats.waiting, stats.queue_dropped, stats.user_dropped),
            (2, 3, 0)
        );
        assert_eq!((stats.copy_mode, stats.copy_range), (CopyMode::PACKET, 100));
        assert_eq!(stats.last_id, 2);
        let port = nfqnl_testkit::socket::netlink_port(&handle).unwrap();
        assert_eq!(stats.port_id, port);
        assert!(nfqnl::QueueStats::read(QUEUE + 1).unwrap().is_none());
    });
}

/// Packets that wait while nobody looks keep their order and their contents
#[test]
fn many_packets_come_in_order_in_few_calls() {
    isolated(|| {
        const N: u32 = 90;
        let lab = Lab::new();
        let handle = Handle::open().unwrap();
        let _queue = handle.bind_queue(QUEUE).unwrap();
        lab.send_numbered(0..N);
        let mut batch = RecvBatch::new(N.try_into().unwrap(), RecvBatch::DEFAULT_SLOT_LEN);
        let mut next = 0_u32;
        let mut calls = 0;
        while next < N {
            calls += 1;
            for event in handle.try_recv(&mut batch).unwrap() {
                let Event::Packet(packet) = event else {
                    panic!("no packet, but {event:?}");
                };
                assert_eq!(udp_payload(&packet), next.to_be_bytes());
                next += 1;
            }
        }
        assert!(calls <= 2, "{calls} calls for {N} packets");
        assert_eq!(handle.stats().packets, u64::from(N));
        assert_eq!(handle.stats().lost_packets, 0);
    });
}
