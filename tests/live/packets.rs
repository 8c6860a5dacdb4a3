//! What the kernel reports about packets: families, hooks, devices and attributes; and streams of
//! packets

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant, UNIX_EPOCH};

use etherparse::{SlicedPacket, TransportSlice};
use nfqnl::consts::NFQA_PACKET_HDR;
use nfqnl::{
    ConfigFlags, CopyMode, Event, Family, IpProtocol, QueueConfig, QueueStats, RecvBatch,
    SendBatch, SkbInfo, Socket, Verdict,
};
use nfqnl_testkit::hosts::{Bridge, Router};
use nfqnl_testkit::netns::{is_rootless, isolated};
use nfqnl_testkit::rules::{self, Hook, Queues, Rule, Table};
use nfqnl_testkit::traffic::{self, TIMEOUT, Udp, V4, V6};
use nfqnl_testkit::{alloc, cpu, link, rules::Chain, socket};

use crate::lab::{
    Lab, PORT, QUEUE, WHOLE_PACKETS, bridge, is_silent, next_packet, number, priority, take_all,
    udp_payload,
};

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
/// The pause between two checks of a loop
const SHORT: Duration = Duration::from_millis(10);

#[test]
fn a_local_packet_has_family_devices_and_protocol() {
    isolated(|| {
        let lo = link::index("lo").unwrap();
        for hook in Hook::ALL.into_iter().filter(|hook| *hook != Hook::Forward) {
            let comes_in = matches!(hook, Hook::Prerouting | Hook::Input);
            let lab = Lab::with(hook, &Rule::new().udp_dport(PORT).queue(QUEUE));
            let socket = Socket::open().unwrap();
            let _queue = socket.bind(QUEUE).unwrap();
            let mut batch = RecvBatch::default();
            let families = [(Family::INET, ETH_P_IP), (Family::INET6, ETH_P_IPV6)];
            for (udp, (family, protocol)) in lab.sockets().into_iter().zip(families) {
                udp.send(b"local", udp.address()).unwrap();
                let packet = next_packet(&socket, &mut batch);
                assert_eq!(packet.hook(), nfqnl::Hook(hook.number()));
                assert_eq!(
                    (packet.family(), packet.hw_protocol().0),
                    (family, protocol)
                );
                assert_eq!(packet.indev(), comes_in.then_some(lo), "{hook:?}");
                assert_eq!(packet.outdev(), (!comes_in).then_some(lo), "{hook:?}");
                assert_eq!(packet.hw_addr().is_some(), comes_in, "{hook:?}");
                assert_eq!((packet.physindev(), packet.physoutdev()), (None, None));
                assert_eq!(packet.payload().len(), udp_len(family, b"local"));
                assert_eq!(packet.len(), Some(packet.payload().len()));
                assert!(!packet.is_truncated());
                assert_eq!(udp_payload(&packet), b"local");
                socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
                assert_eq!(udp.recv().as_deref(), Some(&b"local"[..]));
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
fn a_forwarded_packet_has_both_devices_and_a_mac() {
    isolated(|| {
        let router = Router::new().unwrap();
        let (client, server) = (&router.client, &router.server);
        let mac = client.namespace.run(|| link::mac("eth0").unwrap());
        let [from, to] = [client.link, server.link].map(|name| link::index(name).unwrap());
        let socket = Socket::open().unwrap();
        let hooks = [Hook::Prerouting, Hook::Forward, Hook::Postrouting];
        let queues = hooks.map(|hook| socket.bind(hook.number().into()).unwrap());
        for family in rules::Family::ALL {
            let table = Table::new(family, "t").unwrap();
            for hook in hooks {
                let chain = table.chain(&format!("{hook:?}"), hook, 0).unwrap();
                let rule = Rule::new().udp_dport(PORT).queue(u16::from(hook.number()));
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
                let packet = next_packet(&socket, &mut batch);
                let routed = hook != Hook::Prerouting;
                assert_eq!(packet.queue(), queue.num());
                assert_eq!(packet.hook().0, hook.number());
                assert_eq!(packet.indev(), Some(from), "{hook:?}");
                assert_eq!(packet.outdev(), routed.then_some(to), "{hook:?}");
                // After FORWARD, the link-layer header belongs to the outgoing device.
                if hook != Hook::Postrouting {
                    let hw_addr = packet.hw_addr().expect("a source MAC");
                    assert_eq!(hw_addr.as_bytes(), mac, "{hook:?}");
                }
                socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
            }
            assert_eq!(receiver.recv().as_deref(), Some(&b"forwarded"[..]));
        }
    });
}

/// With `br_netfilter`, bridged packets pass the IP hooks
#[test]
fn a_bridged_packet_has_the_ports_of_the_bridge() {
    isolated(|| {
        let Some(bridge) = bridge() else { return };
        let (left, right) = (&bridge.left, &bridge.right);
        let indexes = [Bridge::LINK, left.link, right.link].map(|name| link::index(name).unwrap());
        let [br0, from, to] = indexes.map(Some);
        let mac = left.namespace.run(|| link::mac("eth0").unwrap());
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        let families = [
            (rules::Family::Ip, left.v4, right.v4),
            (rules::Family::Ip6, left.v6, right.v6),
        ];
        for (family, source, destination) in families {
            let table = Table::new(family, "t").unwrap();
            let rule = Rule::new().udp_dport(PORT).queue(QUEUE);
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
                let packet = next_packet(&socket, &mut batch);
                assert_eq!((packet.indev(), packet.outdev()), (br0, outdev));
                assert_eq!(
                    (packet.physindev(), packet.physoutdev()),
                    (from, physoutdev)
                );
                assert_eq!(packet.hw_addr().unwrap().as_bytes(), mac);
                socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
            }
            assert_eq!(receiver.recv().as_deref(), Some(&b"bridged"[..]));
        }
    });
}

#[test]
fn a_packet_has_its_mark_and_priority() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.v4.set_mark(0xfedc_ba98).unwrap();
        lab.v4.set_priority(5).unwrap();
        lab.send(b"marked");
        let packet = next_packet(&socket, &mut batch);
        assert_eq!(packet.mark(), 0xfedc_ba98);
        assert_eq!(packet.priority(), priority(5));
    });
}

#[test]
fn a_timestamp_is_there_if_any_socket_wants_it() {
    isolated(|| {
        let lab = Lab::at_input();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.v4.want_timestamps().unwrap();
        // The kernel begins to take timestamps a moment later.
        let deadline = Instant::now() + TIMEOUT;
        let timestamp = loop {
            lab.send(b"when");
            let packet = next_packet(&socket, &mut batch);
            match packet.time() {
                Some(time) => {
                    let since_epoch = time.duration_since(UNIX_EPOCH).unwrap();
                    assert_eq!(packet.timestamp(), Some(since_epoch));
                    break time;
                }
                None => assert!(Instant::now() < deadline, "no timestamp"),
            }
            socket.set_verdict(packet.key(), Verdict::Drop).unwrap();
            thread::sleep(Duration::from_millis(1));
        };
        let age = timestamp.elapsed().expect("not in the future");
        assert!(age < TIMEOUT, "{age:?} old");
    });
}

#[test]
fn the_sender_is_reported_if_asked_for() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"whose");
        let packet = next_packet(&socket, &mut batch);
        assert_eq!((packet.uid(), packet.gid()), (None, None));
        queue
            .set_flags(ConfigFlags::UID_GID, ConfigFlags::UID_GID)
            .unwrap();
        lab.send(b"mine");
        let packet = next_packet(&socket, &mut batch);
        // The ids outside: the kernel does not translate them into the user namespace.
        let [uid, gid] = ["uid", "gid"].map(outside_id);
        assert_eq!((packet.uid(), packet.gid()), (Some(uid), Some(gid)));
        queue
            .set_flags(ConfigFlags::UID_GID, ConfigFlags::empty())
            .unwrap();
        lab.send(b"whose again");
        assert_eq!(next_packet(&socket, &mut batch).uid(), None);
    });
}

/// At INPUT a packet of another host has the owner of the connected socket that will receive it
#[test]
fn the_owner_is_that_of_the_packets_socket() {
    isolated(|| {
        let Router { client, server } = Router::new().unwrap();
        let socket = Socket::open().unwrap();
        let flags = ConfigFlags::UID_GID;
        let config = QueueConfig::new().enable(flags);
        let config = config.copy_mode(CopyMode::Packet, u32::MAX);
        let _queue = socket.bind_with(QUEUE, &config).unwrap();
        let table = Table::new(rules::Family::Ip, "t").unwrap();
        for hook in Hook::ALL {
            let chain = table.chain(&format!("{hook:?}"), hook, 0).unwrap();
            chain.add(&Rule::new().udp().queue(QUEUE)).unwrap();
        }
        let router = Ipv4Addr::new(10, 0, 0, 1);
        let [here, inside] = [(), ()].map(|()| Udp::bind(V4, 0).unwrap());
        let outside = server.namespace.run(|| Udp::bind(server.v4, PORT).unwrap());
        let far = client.namespace.run(|| Udp::bind(client.v4, PORT).unwrap());
        let unconnected = Udp::bind(router.into(), 0).unwrap();
        let connected = UdpSocket::bind((router, 0)).unwrap();
        connected.connect(far.address()).unwrap();
        let connected_to = connected.local_addr().unwrap();
        let uid = outside_id("uid");
        let mut batch = RecvBatch::default();
        use Hook::{Forward, Input, Output, Postrouting, Prerouting};
        type Seen<'a> = &'a [(Hook, bool)];
        let cases: [(&Udp, SocketAddr, Seen<'_>); 4] = [
            (
                &here,
                inside.address(),
                &[
                    (Output, true),
                    (Postrouting, true),
                    (Prerouting, false),
                    (Input, false),
                ],
            ),
            (
                &far,
                unconnected.address(),
                &[(Prerouting, false), (Input, false)],
            ),
            (&far, connected_to, &[(Prerouting, false), (Input, true)]),
            (
                &far,
                outside.address(),
                &[(Prerouting, false), (Forward, false), (Postrouting, false)],
            ),
        ];
        for (sender, to, hooks) in cases {
            sender.send(b"whose", to).unwrap();
            for &(hook, has_owner) in hooks {
                let packet = next_packet(&socket, &mut batch);
                assert_eq!(packet.hook().0, hook.number());
                assert_eq!(packet.uid(), has_owner.then_some(uid), "{hook:?} of {to}");
                socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
            }
        }
    });
}

/// The id outside of this user namespace's id 0
fn outside_id(kind: &str) -> u32 {
    let map = std::fs::read_to_string(format!("/proc/self/{kind}_map")).unwrap();
    map.split_ascii_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap()
}

#[test]
fn copy_modes_decide_what_is_copied() {
    isolated(|| {
        let lab = Lab::at_input();
        let socket = Socket::open().unwrap();
        let config = QueueConfig::new().copy_mode(CopyMode::Meta, 0);
        let queue = socket.bind_with(QUEUE, &config).unwrap();
        let mut batch = RecvBatch::default();
        let whole = 20 + 8 + 1000;
        let mut expect = |copied: usize, len: Option<usize>| {
            lab.send(&[1; 1000]);
            let packet = next_packet(&socket, &mut batch);
            assert!(packet.attr(NFQA_PACKET_HDR).is_some());
            assert_eq!(packet.indev(), Some(1));
            assert_eq!((packet.payload().len(), packet.len()), (copied, len));
            assert_eq!(packet.is_truncated(), (1..whole).contains(&copied));
            socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
            assert_eq!(lab.recv().as_deref(), Some(&[1; 1000][..]));
        };
        // Without a payload the kernel does not report the length.
        expect(0, None);
        for range in [1, 2, 3, 64] {
            queue.set_mode(CopyMode::Packet, range).unwrap();
            expect(range.try_into().unwrap(), Some(whole));
        }
        // 0, and everything from the length of the packet on, mean the whole packet.
        for range in [0, whole.try_into().unwrap(), 0xffff, u32::MAX] {
            queue.set_mode(CopyMode::Packet, range).unwrap();
            expect(whole, Some(whole));
        }
    });
}

#[test]
fn mode_none_drops() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        queue.set_mode(CopyMode::None, 0).unwrap();
        lab.send(b"dropped");
        assert!(lab.v4.is_silent() && is_silent(&socket, &mut batch));
        queue.set_mode(CopyMode::Packet, 0).unwrap();
        lab.send(b"held");
        assert_eq!(udp_payload(&next_packet(&socket, &mut batch)), b"held");
    });
}

/// The longest IPv4 packet is longer than a message can be
#[test]
fn the_longest_packet_is_truncated_but_delivered() {
    isolated(|| {
        const LONGEST: usize = 65_535;
        const COPIED: usize = 65_531;
        link::set_mtu("lo", 65_536).unwrap();
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        let payload = vec![3; LONGEST - 28];
        lab.send(&payload);
        let packet = next_packet(&socket, &mut batch);
        assert_eq!(packet.payload().len(), COPIED);
        assert_eq!(packet.len(), Some(LONGEST));
        assert!(packet.is_truncated());
        socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
        assert_eq!(lab.recv(), Some(payload));
    });
}

fn queue_everything_from(listener: &TcpListener, table: &Table) {
    let port = listener.local_addr().unwrap().port();
    let chain: Chain = table.chain("in", Hook::Input, 0).unwrap();
    for rule in [Rule::new().tcp_dport(port), Rule::new().tcp_sport(port)] {
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
            let socket = Socket::open().unwrap();
            let _queue = socket.bind(QUEUE).unwrap();
            let echo = thread::spawn(move || traffic::tcp_echo(&listener).unwrap());
            let sent = vec![9; 100_000];
            let client = {
                let sent = sent.clone();
                thread::spawn(move || traffic::tcp_exchange(to, &sent).unwrap())
            };
            // TCP repeats a SYN if the answer is late.
            let (mut held, mut handshakes) = (0, BTreeSet::new());
            let mut batch = RecvBatch::default();
            while !client.is_finished() {
                let events = socket.recv_timeout(&mut batch, SHORT).unwrap();
                for packet in events.filter_map(Event::packet) {
                    let sliced = SlicedPacket::from_ip(packet.payload()).unwrap();
                    match sliced.transport {
                        Some(TransportSlice::Tcp(tcp)) if tcp.syn() => {
                            handshakes.insert((tcp.ack(), tcp.sequence_number()));
                        }
                        _ => {}
                    }
                    held += 1;
                    socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
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

/// With GSO, packets arrive as large as the sender made them, with unfinished checksums
#[test]
fn gso_hands_over_packets_larger_than_the_mtu() {
    isolated(|| {
        const MTU: u32 = 1500;
        link::set_mtu("lo", MTU).unwrap();
        let listener = TcpListener::bind((V4, 0)).unwrap();
        let to = listener.local_addr().unwrap();
        let table = Table::new(rules::Family::Ip, "t").unwrap();
        queue_everything_from(&listener, &table);
        let socket = Socket::open().unwrap();
        let config = QueueConfig::new()
            .copy_mode(CopyMode::Packet, 0)
            .flags(ConfigFlags::GSO, ConfigFlags::GSO);
        let _queue = socket.bind_with(QUEUE, &config).unwrap();
        let echo = thread::spawn(move || traffic::tcp_echo(&listener).unwrap());
        let client = thread::spawn(move || traffic::tcp_exchange(to, &[5; 200_000]).unwrap());
        let mut longest = 0;
        let mut batch = RecvBatch::default();
        while !client.is_finished() {
            let events = socket.recv_timeout(&mut batch, SHORT).unwrap();
            for packet in events.filter_map(Event::packet) {
                let len = packet.payload().len();
                if len > MTU.try_into().unwrap() {
                    let both = SkbInfo::GSO | SkbInfo::CSUM_NOT_READY;
                    assert!(packet.skb_info().contains(both), "{:?}", packet.skb_info());
                }
                longest = longest.max(len);
                socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
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
            (
                rules::Family::Ip,
                V4,
                Rule::new().protocol(IpProtocol::ICMP),
            ),
            (
                rules::Family::Ip6,
                V6,
                Rule::new().protocol(IpProtocol::ICMPV6),
            ),
        ];
        for (family, address, rule) in families {
            let table = Table::new(family, "t").unwrap();
            let chain = table.chain("out", Hook::Output, 0).unwrap();
            chain.add(&rule.queue(QUEUE)).unwrap();
            let socket = Socket::open().unwrap();
            let _queue = socket.bind(QUEUE).unwrap();
            let mut batch = RecvBatch::default();
            let ping = thread::spawn(move || traffic::ping(address, b"ping", TIMEOUT).unwrap());
            for part in ["request", "reply"] {
                let packet = next_packet(&socket, &mut batch);
                assert!(packet.payload().ends_with(b"ping"), "{part}");
                socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
            }
            assert!(ping.join().unwrap());
        }
    });
}

/// The addresses choose the queue: all packets between two hosts go to one queue
#[test]
fn a_rule_spreads_addresses_over_queues() {
    isolated(|| {
        let rule = Rule::new().udp_dport(PORT);
        let lab = Lab::with(Hook::Output, &rule.queue(Queues::range(10..=13)));
        let socket = Socket::open().unwrap();
        let _queues = [10, 11, 12, 13].map(|num| socket.bind(num).unwrap());
        let mut batch = RecvBatch::default();
        let mut hit = BTreeSet::new();
        // This many addresses practically never choose the same queue.
        for host in 1..=32 {
            let sender = Udp::bind(Ipv4Addr::new(127, 0, 0, host).into(), 0).unwrap();
            let [first, second] = [host, 100 + host].map(|number| {
                sender.send(&[number], lab.v4.address()).unwrap();
                let packet = next_packet(&socket, &mut batch);
                assert_eq!(udp_payload(&packet), [number]);
                socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
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
fn with_fan_out_the_cpu_of_the_sender_decides() {
    isolated(|| {
        const QUEUES: [u16; 3] = [10, 11, 12];
        let rule = Rule::new().udp_dport(PORT);
        let lab = Lab::with(Hook::Output, &rule.queue(Queues::range(10..=12).fanout()));
        let socket = Socket::open().unwrap();
        let _queues = QUEUES.map(|num| socket.bind(num).unwrap());
        let mut batch = RecvBatch::default();
        let cpus = cpu::allowed().unwrap();
        assert!(!cpus.is_empty());
        for cpu in cpus.into_iter().take(8) {
            for udp in lab.sockets() {
                cpu::on(cpu, || udp.send(b"from a CPU", udp.address()))
                    .unwrap()
                    .unwrap();
                let packet = next_packet(&socket, &mut batch);
                assert_eq!(packet.queue(), QUEUES[cpu % QUEUES.len()], "CPU {cpu}");
                socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
                assert_eq!(udp.recv().as_deref(), Some(&b"from a CPU"[..]));
            }
        }
    });
}

#[test]
fn every_attribute_of_a_packet_can_be_walked() {
    isolated(|| {
        let lab = Lab::at_input();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        lab.send(b"walk");
        let packet = next_packet(&socket, &mut batch);
        let attrs: Vec<_> = packet.attrs().map(|attr| attr.unwrap()).collect();
        assert_eq!(attrs.first().map(|attr| attr.kind), Some(NFQA_PACKET_HDR));
        assert_eq!(attrs.last().map(|attr| attr.value), Some(packet.payload()));
        for attr in attrs {
            assert_eq!(packet.attr(attr.kind), Some(attr.value));
        }
    });
}

#[test]
fn the_counters_of_the_kernel_are_read_by_root() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let config = QueueConfig::new()
            .copy_mode(CopyMode::Packet, 100)
            .maxlen(2);
        let _queue = socket.bind_with(QUEUE, &config).unwrap();
        lab.send_numbered(0..5);
        let other = Socket::open().unwrap();
        let _other = other.bind(QUEUE + 1).unwrap();
        let stats = QueueStats::read(QUEUE);
        if is_rootless() {
            for error in [stats.map(drop), QueueStats::read_all().map(drop)] {
                let error = error.unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EACCES), "{error}");
            }
            return;
        }
        let stats = stats.unwrap().expect("it is bound");
        assert_eq!(
            (stats.waiting, stats.queue_dropped, stats.user_dropped),
            (2, 3, 0)
        );
        assert_eq!((stats.copy_mode, stats.copy_range), (CopyMode::Packet, 100));
        assert_eq!(stats.last_id, 2);
        let ports = [&socket, &other].map(|socket| socket::netlink_port(socket).unwrap());
        assert_eq!(stats.port_id, ports[0]);
        assert!(QueueStats::read(QUEUE + 2).unwrap().is_none());
        let all = QueueStats::read_all().unwrap();
        let mut all = Vec::from_iter(all.iter().map(|stats| (stats.queue, stats.port_id)));
        all.sort_unstable();
        assert_eq!(all, [(QUEUE, ports[0]), (QUEUE + 1, ports[1])]);
    });
}

/// Packets in the socket keep their order and their contents
#[test]
fn many_packets_come_in_order_in_few_calls() {
    isolated(|| {
        const N: u32 = 90;
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        lab.send_numbered(0..N);
        let mut batch = RecvBatch::new(N.try_into().unwrap(), RecvBatch::DEFAULT_SLOT_LEN);
        let mut next = 0;
        let mut calls = 0;
        while next < N {
            calls += 1;
            for event in socket.try_recv(&mut batch).unwrap() {
                let Event::Packet(packet) = event else {
                    panic!("not a packet: {event:?}");
                };
                assert_eq!(number(&packet), next);
                next += 1;
            }
        }
        assert!(calls <= 2, "{calls} calls for {N} packets");
        assert_eq!(socket.stats().packets, u64::from(N));
        assert_eq!(socket.stats().missing_packets, 0);
    });
}

/// Sends for two seconds or 300 MB, and returns the number of arrived bytes
fn tcp_stream(listener: TcpListener) -> u64 {
    const TIME: Duration = Duration::from_secs(2);
    const BYTES: u64 = 300_000_000;
    let to = listener.local_addr().unwrap();
    let sender = thread::spawn(move || {
        let mut stream = TcpStream::connect_timeout(&to, TIMEOUT).unwrap();
        stream.set_write_timeout(Some(TIMEOUT)).unwrap();
        let (begin, chunk, mut sent) = (Instant::now(), vec![7; 1 << 16], 0);
        while sent < BYTES && begin.elapsed() < TIME {
            stream.write_all(&chunk).unwrap();
            sent += chunk.len() as u64;
        }
        sent
    });
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    let (mut buf, mut received) = (vec![0; 1 << 16], 0);
    loop {
        match stream.read(&mut buf).unwrap() {
            0 => break,
            len => received += len as u64,
        }
    }
    assert_eq!(received, sender.join().unwrap());
    received
}

/// Only `bind`: the receive buffer has room for as many full frames as the queue
#[test]
fn a_bulk_tcp_stream_loses_nothing_by_default() {
    isolated(|| {
        link::set_mtu("lo", 1500).unwrap();
        let table = Table::new(rules::Family::Ip, "t").unwrap();
        let listener = TcpListener::bind((V4, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let chain = table.chain("out", Hook::Output, 0).unwrap();
        chain
            .add(&Rule::new().tcp_dport(port).queue(QUEUE))
            .unwrap();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let stream = thread::spawn(|| tcp_stream(listener));
        let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
        let (mut packets, mut overruns) = (0_u64, 0_u64);
        while !stream.is_finished() {
            for event in socket.recv_timeout(&mut batch, SHORT).unwrap() {
                match event {
                    Event::Packet(packet) => {
                        packets += 1;
                        verdicts.push(packet.key(), Verdict::Accept).unwrap();
                    }
                    Event::Overrun => overruns += 1,
                    other => panic!("{other:?}"),
                }
            }
            socket.send(&mut verdicts).unwrap();
        }
        let bytes = stream.join().unwrap();
        let stats = socket.stats();
        eprintln!("{bytes} bytes in {packets} packets, {overruns} overruns, {stats:?}");
        // An ordinary user gets a smaller receive buffer.
        if !is_rootless() {
            assert_eq!((overruns, stats.missing_packets), (0, 0));
            let kernel = QueueStats::read(QUEUE).unwrap().unwrap();
            assert_eq!((kernel.queue_dropped, kernel.user_dropped), (0, 0));
        }
    });
}

/// A batch reserves address space, and the kernel gives memory only for what packets touch
#[test]
fn a_third_batch_costs_address_space_only() {
    isolated(|| {
        const LITTLE: usize = 256 << 10;
        // Resident memory without the program's code, which comes in as it is used
        let resident = || alloc::touched().unwrap();
        resident(); // The first call allocates the function's own buffers.
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        for _ in 0..4 {
            let before = resident();
            let mut batch = RecvBatch::default();
            let made = resident();
            assert!(made < before + LITTLE, "{before} to {made}");
            lab.send(b"touches a page");
            let key = next_packet(&socket, &mut batch).key();
            socket.set_verdict(key, Verdict::Accept).unwrap();
            let used = resident();
            assert!(used < before + LITTLE, "{before} to {used}");
        }
        let before = resident();
        let batches = [(); 3].map(|()| RecvBatch::default());
        let made = resident();
        assert!(made < before + LITTLE, "{before} to {made}");
        drop(batches);
    });
}

#[test]
fn absurd_batch_sizes_are_clamped() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let sizes = [0, 1, 64, usize::MAX / 64, usize::MAX];
        for slots in sizes {
            for slot_len in sizes {
                let mut batch = RecvBatch::new(slots, slot_len);
                if slot_len > 64 {
                    lab.send(b"received");
                    let packet = next_packet(&socket, &mut batch);
                    assert_eq!(udp_payload(&packet), b"received");
                    socket.set_verdict(packet.key(), Verdict::Drop).unwrap();
                }
            }
        }
    });
}

/// A log of a batch, a socket or a handle is short, and has no contents of packets
#[test]
fn debug_output_is_short_and_has_no_packet_contents() {
    isolated(|| {
        const MOST: usize = 4096;
        const SECRET: [u8; 1000] = [b's'; 1000];
        #[track_caller]
        fn check(what: &str, value: &impl std::fmt::Debug) {
            for text in [format!("{value:?}"), format!("{value:#?}")] {
                assert!(text.len() < MOST, "{what} has {} bytes", text.len());
                let text = text.replace(char::is_whitespace, "");
                assert!(!text.contains("115,115,115"), "{what}: {text}");
                assert!(!text.contains("ssss"), "{what}: {text}");
            }
        }
        let lab = Lab::new();
        let handle = nfqnl::open().unwrap();
        let queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, |data| {
                check("QueueData", data);
                data.set_verdict(Verdict::Drop, None);
            })
            .unwrap();
        let socket = handle.socket();
        let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
        // The buffer of an ordinary user holds this many packets.
        for _ in 0..100 {
            lab.send(&SECRET);
        }
        // Reads the packets and sets them aside
        queue.set_maxlen(1000).unwrap();
        check("Queue", &queue);
        check("Socket", socket);
        check("Handle", &handle);
        let events = socket.try_recv(&mut batch).unwrap();
        check("Events", &events);
        drop(events);
        check("RecvBatch", &batch);
        assert!(batch.has_events());
        let mut held = Vec::new();
        take_all(socket, &mut batch, |event| {
            check("Event", &event);
            let packet = event.packet().unwrap();
            let new = packet.payload().to_vec();
            let decision = Verdict::Accept.with_payload(&new);
            verdicts.push(packet.key(), decision).unwrap();
            held.push(packet.key());
        });
        assert_eq!(held.len(), 100);
        check("RecvBatch", &batch);
        check("SendBatch", &verdicts);
        verdicts.clear();
        for key in held {
            verdicts.push(key, Verdict::Drop).unwrap();
        }
        socket.send(&mut verdicts).unwrap();
        check("SendBatch", &verdicts);
        check("Stats", &socket.stats());
        lab.send(&SECRET);
        while handle.run_once(&mut batch).unwrap() == 0 {}
    });
}
