//! Rewritten packets, as receivers that verify checksums in software see them

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;

use nfqnl::consts::MAX_PAYLOAD;
use nfqnl::rewrite::{Rewrite, RewriteError, Rewriter, complete_checksums};
use nfqnl::{
    ConfigFlags, CopyMode, Error, Event, IpProtocol, Packet, QueueConfig, RecvBatch, SendBatch,
    SkbInfo, Socket, Verdict,
};
use nfqnl_testkit::hosts::Router;
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::rules::{self, Hook, Rule, Table};
use nfqnl_testkit::traffic::{TIMEOUT, Udp, V4, V6};
use nfqnl_testkit::{kernel, link};

use crate::lab::{Lab, PORT, QUEUE, next_packet};

/// Queues what `rule` matches at a hook, in IPv4 and IPv6
fn queue_at(hook: Hook, rule: &Rule) -> [Table; 2] {
    rules::Family::ALL.map(|family| {
        let table = Table::new(family, "queue").unwrap();
        let chain = table.chain("queue", hook, 0).unwrap();
        chain.add(&rule.clone().queue(QUEUE)).unwrap();
        table
    })
}

/// Accepts a packet with changes
fn accept_with(
    socket: &Socket,
    packet: &Packet<'_>,
    change: impl FnOnce(&mut Rewrite<'_, '_>) -> Result<(), RewriteError>,
) {
    let mut buf = vec![0; MAX_PAYLOAD];
    let mut rewriter = Rewriter::new(&mut buf);
    let mut rewrite = rewriter.begin(packet).unwrap();
    change(&mut rewrite).unwrap();
    let new = rewrite.finish().unwrap();
    let decision = Verdict::Accept.with_payload(new);
    socket.set_verdict(packet.key(), decision).unwrap();
}

const PAYLOADS: [(&[u8], &[u8]); 5] = [
    (b"same size", b"SAME SIZE"),
    (b"grows", b"grows by an odd number"),
    (b"grows!", b"grows by an even number!"),
    (b"shrinks a lot", b"odd"),
    (b"disappears", b""),
];

/// Through this host, to this host, from this host
#[test]
fn datagrams_grow_and_shrink_at_every_hook() {
    isolated(|| {
        let Router { client, server } = Router::new().unwrap();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        let here = [
            IpAddr::from(Ipv4Addr::new(10, 0, 0, 1)),
            IpAddr::from(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1)),
        ];
        let mut port = PORT;
        for hook in Hook::ALL {
            let tables = queue_at(hook, &Rule::new().udp());
            for (index, far) in [(client.v4, server.v4), (client.v6, server.v6)]
                .into_iter()
                .enumerate()
            {
                port += 1;
                let bind = |address| move || Udp::bind(address, port).unwrap();
                let (sender, receiver) = match hook {
                    Hook::Prerouting | Hook::Forward | Hook::Postrouting => (
                        client.namespace.run(bind(far.0)),
                        server.namespace.run(bind(far.1)),
                    ),
                    Hook::Input => (client.namespace.run(bind(far.0)), bind(here[index])()),
                    Hook::Output => (bind(here[index])(), client.namespace.run(bind(far.0))),
                };
                for (sent, received) in PAYLOADS {
                    sender.send(sent, receiver.address()).unwrap();
                    let packet = next_packet(&socket, &mut batch);
                    assert_eq!(packet.hook().0, hook.number());
                    accept_with(&socket, &packet, |rewrite| {
                        assert_eq!(rewrite.payload()?, sent);
                        rewrite.set_ttl(7);
                        rewrite.set_dscp(46)?;
                        rewrite.replace(0..sent.len(), received)
                    });
                    if kernel::refuses_payloads() {
                        assert!(receiver.is_silent(), "refused, so dropped");
                        return;
                    }
                    assert_eq!(receiver.recv().as_deref(), Some(received), "{hook:?}");
                }
            }
            for table in tables {
                table.delete().unwrap();
            }
        }
    });
}

#[test]
fn addresses_and_ports_lead_to_another_socket() {
    isolated(|| {
        let lab = Lab::at_input();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let mut batch = RecvBatch::default();
        let (v4, v6) = (IpAddr::from([127, 0, 0, 77]), V6);
        for (sender, to, other) in [(&lab.v4, v4, v4), (&lab.v6, V6, v6)] {
            let other = Udp::bind(other, PORT + 1).unwrap();
            sender.send(b"redirected", sender.address()).unwrap();
            let packet = next_packet(&socket, &mut batch);
            accept_with(&socket, &packet, |rewrite| {
                rewrite.set_source(to)?;
                rewrite.set_destination(to)?;
                rewrite.set_source_port(9)?;
                rewrite.set_destination_port(PORT + 1)
            });
            if kernel::refuses_payloads() {
                return assert!(other.is_silent());
            }
            assert_eq!(other.recv().as_deref(), Some(&b"redirected"[..]));
        }
    });
}

/// Sends a stream while the queue changes each byte of it; returns the packets with GSO
fn rewritten_stream(
    socket: &Socket,
    listener: &TcpListener,
    connect: impl FnOnce() -> TcpStream + Send,
) -> usize {
    const LEN: usize = 2 << 20;
    let byte = |at: usize| u8::try_from(at % 251).unwrap();
    let change = |byte: u8| byte.rotate_left(3) ^ 0x55;
    let mut large = 0;
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut client = connect();
            let sent: Vec<u8> = (0..LEN).map(byte).collect();
            client.write_all(&sent).unwrap();
        });
        let server = scope.spawn(|| {
            let (mut server, _) = listener.accept().unwrap();
            server.set_read_timeout(Some(TIMEOUT)).unwrap();
            let mut received = Vec::new();
            server.read_to_end(&mut received).unwrap();
            received
        });
        let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
        let mut buf = vec![0; MAX_PAYLOAD];
        while !server.is_finished() {
            for event in socket.recv_timeout(&mut batch, TIMEOUT / 100).unwrap() {
                let Event::Packet(packet) = event else {
                    continue; // the sender sends lost segments again
                };
                large += usize::from(packet.skb_info().contains(SkbInfo::GSO));
                let mut rewriter = Rewriter::new(&mut buf);
                let mut rewrite = rewriter.begin(&packet).unwrap();
                let new: Vec<u8> = rewrite
                    .payload()
                    .unwrap()
                    .iter()
                    .map(|&byte| change(byte))
                    .collect();
                rewrite.replace(0..new.len(), &new).unwrap();
                let new = rewrite.finish().unwrap();
                let decision = Verdict::Accept.with_payload(new);
                verdicts.push(packet.key(), decision).unwrap();
            }
            socket.send(&mut verdicts).unwrap();
        }
        let received = server.join().unwrap();
        assert_eq!(received.len(), LEN);
        let expected = (0..LEN).map(|at| change(byte(at)));
        assert!(received.into_iter().eq(expected), "another stream");
    });
    large
}

/// Equal lengths, so sequence numbers stay right
#[test]
fn a_tcp_stream_is_changed_with_gso() {
    isolated(|| {
        if kernel::refuses_payloads() {
            return;
        }
        let Router { client, server } = Router::new().unwrap();
        let socket = Socket::open().unwrap();
        let config = QueueConfig::new().enable(ConfigFlags::GSO);
        let _queue = socket.bind_with(QUEUE, &config).unwrap();
        let through = [server.v4, server.v6];
        let here = [
            IpAddr::from(Ipv4Addr::new(10, 0, 0, 1)),
            IpAddr::from(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1)),
        ];
        for (hook, [v4, v6]) in [
            (Hook::Prerouting, through),
            (Hook::Forward, through),
            (Hook::Postrouting, through),
            (Hook::Input, here),
            (Hook::Output, [V4, V6]),
        ] {
            let tables = queue_at(hook, &Rule::new().tcp_dport(PORT));
            link::set_mtu("lo", 1500).unwrap();
            for address in [v4, v6] {
                let to = SocketAddr::new(address, PORT);
                let listen = || TcpListener::bind(to).unwrap();
                let connect = || TcpStream::connect_timeout(&to, TIMEOUT).unwrap();
                let large = match hook {
                    Hook::Output => rewritten_stream(&socket, &listen(), connect),
                    Hook::Input => {
                        let connect = || client.namespace.run(connect);
                        rewritten_stream(&socket, &listen(), connect)
                    }
                    _ => {
                        let listener = server.namespace.run(listen);
                        rewritten_stream(&socket, &listener, || client.namespace.run(connect))
                    }
                };
                assert!(large > 0, "no large packet at {hook:?}");
            }
            for table in tables {
                table.delete().unwrap();
            }
        }
    });
}

/// Without a change, the checksums are completed
#[test]
fn an_unfinished_checksum_is_completed() {
    isolated(|| {
        let lab = Lab::at_input();
        let socket = Socket::open().unwrap();
        let config = QueueConfig::new().enable(ConfigFlags::GSO);
        let _queue = socket.bind_with(QUEUE, &config).unwrap();
        let mut batch = RecvBatch::default();
        for udp in lab.sockets() {
            udp.send(b"unfinished", udp.address()).unwrap();
            let packet = next_packet(&socket, &mut batch);
            assert!(packet.skb_info().contains(SkbInfo::CSUM_NOT_READY));
            let mut buf = [0; 100];
            let new = complete_checksums(&packet, &mut buf).unwrap();
            let decision = Verdict::Accept.with_payload(new);
            socket.set_verdict(packet.key(), decision).unwrap();
            if kernel::refuses_payloads() {
                assert!(udp.is_silent(), "refused, so dropped");
            } else {
                assert_eq!(udp.recv().as_deref(), Some(&b"unfinished"[..]));
            }
        }
    });
}

#[test]
fn fragments_and_cut_copies_are_refused() {
    isolated(|| {
        let Router { client, server } = Router::new().unwrap();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let _tables = queue_at(Hook::Forward, &Rule::new());
        let sender = client.namespace.run(|| Udp::bind(client.v4, PORT).unwrap());
        let receiver = server.namespace.run(|| Udp::bind(server.v4, PORT).unwrap());
        let mut batch = RecvBatch::default();
        let mut buf = vec![0; MAX_PAYLOAD];
        sender.send(&[7; 4000], receiver.address()).unwrap();
        for _ in 0..3 {
            let packet = next_packet(&socket, &mut batch);
            assert_eq!(packet.flow().unwrap().protocol(), IpProtocol::UDP);
            let mut rewriter = Rewriter::new(&mut buf);
            let mut rewrite = rewriter.begin(&packet).unwrap();
            assert_eq!(rewrite.set_source_port(1), Err(RewriteError::Fragment));
            assert_eq!(rewrite.replace(0..1, b"x"), Err(RewriteError::Fragment));
            rewrite.set_ttl(9);
            let new = rewrite.finish().unwrap();
            let decision = Verdict::Accept.with_payload(new);
            socket.set_verdict(packet.key(), decision).unwrap();
        }
        if kernel::refuses_payloads() {
            assert!(receiver.is_silent());
        } else {
            assert_eq!(receiver.recv(), Some(vec![7; 4000]));
        }
        queue.set_mode(nfqnl::CopyMode::Packet, 40).unwrap();
        sender.send(&[7; 100], receiver.address()).unwrap();
        let packet = next_packet(&socket, &mut batch);
        let refused = Rewriter::new(&mut buf).begin(&packet).unwrap_err();
        assert_eq!(refused, RewriteError::Truncated);
        socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
        assert_eq!(receiver.recv(), Some(vec![7; 100]));
    });
}

/// A batch with the packet checks what a batch with the key cannot
#[test]
fn an_answer_is_checked_against_its_packet() {
    isolated(|| {
        let lab = Lab::new();
        let socket = Socket::open().unwrap();
        let queue = socket.bind(QUEUE).unwrap();
        let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
        lab.send(b"whole");
        let packet = next_packet(&socket, &mut batch);
        let longer = [packet.payload(), b"more"].concat();
        let decision = Verdict::Drop.with_ct_mark(1, 1);
        let refused = verdicts.answer(&packet, Verdict::Drop.with_payload(&longer[..10]));
        assert!(matches!(refused, Err(Error::PayloadTooShort { .. })));
        assert!(verdicts.is_empty());
        let decision = decision.with_payload(packet.payload());
        verdicts.answer(&packet, decision).unwrap();
        queue.set_mode(CopyMode::Packet, 30).unwrap();
        lab.send(b"cut");
        let packet = next_packet(&socket, &mut batch);
        let refused = verdicts.answer(&packet, Verdict::Drop.with_payload(&longer));
        assert!(matches!(refused, Err(Error::TruncatedPacket { .. })));
        verdicts.answer(&packet, Verdict::Drop).unwrap();
        assert_eq!(verdicts.len(), 2);
        socket.send(&mut verdicts).unwrap();
        assert!(lab.v4.is_silent());
    });
}

/// The kernel would segment it with wrong checksums
#[test]
fn an_unsegmented_udp_series_is_refused() {
    isolated(|| {
        let lab = Lab::new();
        link::set_mtu("lo", 1500).unwrap();
        let socket = Socket::open().unwrap();
        let config = QueueConfig::new().enable(ConfigFlags::GSO);
        let _queue = socket.bind_with(QUEUE, &config).unwrap();
        let mut batch = RecvBatch::default();
        lab.v4.send_segmented(500).unwrap();
        lab.v4.send(&[3; 2000], lab.v4.address()).unwrap();
        let packet = next_packet(&socket, &mut batch);
        assert!(packet.skb_info().contains(SkbInfo::GSO));
        let mut buf = vec![0; MAX_PAYLOAD];
        let refused = Rewriter::new(&mut buf).begin(&packet).unwrap_err();
        assert_eq!(refused, RewriteError::UdpGso);
        socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
        let mut received = 0;
        while received < 2000 {
            received += lab.v4.recv().expect("more datagrams").len();
        }
        assert_eq!(received, 2000);
    });
}
