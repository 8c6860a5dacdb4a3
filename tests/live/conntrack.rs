//! Conntrack entries: what packets show of them, and what verdicts change
//!
//! A kernel without `CONFIG_NETFILTER_NETLINK_GLUE_CT` has neither; there the tests check that the
//! library knows.

use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nfqnl::rewrite::Rewriter;
use nfqnl::{
    ConfigFlags, Conntrack, ConntrackStatus, ConntrackUpdate, CtState, Decision, Direction, Error,
    ErrorKind, IpProtocol, Labels, Packet, Queue, QueueConfig, RecvBatch, SendBatch, Socket,
    TcpState, Verdict,
};
use nfqnl_testkit::hosts::Router;
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::rules::{self, Hook, Rule, RuleExt as _, Table};
use nfqnl_testkit::traffic::{self, Udp, V4, V6};
use nfqnl_testkit::{kernel, user};

use crate::lab::{PORT, QUEUE, WHOLE_PACKETS, is_silent, next_packet, refusal};

const TIMEOUT: Duration = Duration::from_secs(5);

/// A queue whose packets come with conntrack entries; `None` if the kernel cannot send them
fn tracked() -> Option<(Socket, Queue)> {
    let socket = Socket::open().unwrap();
    let config = QueueConfig::new().enable(ConfigFlags::CONNTRACK);
    match socket.takes_conntrack().unwrap() {
        true => {
            let queue = socket.bind_with(QUEUE, &config).unwrap();
            Some((socket, queue))
        }
        false => {
            let refused = refusal(socket.bind_with(QUEUE, &config));
            let kind = ErrorKind::UnsupportedFlags(ConfigFlags::CONNTRACK);
            assert_eq!(refused.kind(), kind);
            None
        }
    }
}

/// Queues what `rule` matches at a hook, in IPv4 and IPv6, and turns connection tracking on
fn queue_at(hook: Hook, priority: i32, rule: Rule) {
    for family in rules::Family::ALL {
        let table = Table::new(family, "queue").unwrap();
        let chain = table.chain("track", hook, priority - 1).unwrap();
        chain.add(&Rule::new().ct_new().counter("new")).unwrap();
        let chain = table.chain("queue", hook, priority).unwrap();
        chain.add(&rule.clone().queue(QUEUE)).unwrap();
    }
}

fn entry<'a>(packet: &Packet<'a>) -> Conntrack<'a> {
    packet.conntrack().expect("it is tracked")
}

#[test]
fn the_socket_knows_if_conntrack_is_taken() {
    isolated(|| {
        let socket = Socket::open().unwrap();
        let takes = socket.takes_conntrack().unwrap();
        if let Some(has_glue) = kernel::has_function("ctnetlink_glue_build") {
            assert_eq!(takes, has_glue);
        }
        let without = user::without_net_admin(|| socket.takes_conntrack());
        assert!(matches!(without, Err(Error::Refused(refusal))
            if refusal.kind() == ErrorKind::NoCapability));
    });
}

#[test]
fn an_entry_shows_a_connection_from_its_first_packet() {
    isolated(|| {
        let Some((socket, _queue)) = tracked() else {
            return;
        };
        queue_at(Hook::Input, 0, Rule::new().udp());
        let mut batch = RecvBatch::default();
        for address in [V4, V6] {
            let [client, server] = [(), ()].map(|()| Udp::bind(address, 0).unwrap());
            client.send(b"question", server.address()).unwrap();
            let packet = next_packet(&socket, &mut batch);
            assert_eq!(packet.ct_state(), Some(CtState::NEW));
            let first = entry(&packet);
            let flow = packet.flow().unwrap();
            assert_eq!(flow.protocol(), IpProtocol::UDP);
            assert_eq!(first.tuple(Direction::Original).unwrap().flow(), Some(flow));
            assert_eq!(
                first.tuple(Direction::Reply).unwrap().flow(),
                Some(flow.reversed())
            );
            assert_eq!(first.mark().unwrap_or(0), 0);
            assert!(
                first
                    .timeout()
                    .is_some_and(|timeout| timeout > Duration::ZERO)
            );
            assert!(
                !first
                    .status()
                    .unwrap()
                    .contains(ConntrackStatus::SEEN_REPLY)
            );
            assert!(first.id().is_some() && first.tcp().is_none());
            assert_eq!(
                (first.zone(), first.helper(), first.master()),
                (None, None, None)
            );
            println!("NFQA_CT {:02x?}", first.as_bytes());
            socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
            assert_eq!(server.recv().as_deref(), Some(&b"question"[..]));

            server.send(b"answer", client.address()).unwrap();
            let packet = next_packet(&socket, &mut batch);
            assert_eq!(packet.ct_state(), Some(CtState::ESTABLISHED_REPLY));
            assert_eq!(packet.ct_state().unwrap().direction(), Direction::Reply);
            let second = entry(&packet);
            assert_eq!(packet.flow(), Some(flow.reversed()));
            assert_eq!(
                second.tuple(Direction::Original).unwrap().flow(),
                Some(flow)
            );
            let status = second.status().unwrap();
            assert!(status.contains(ConntrackStatus::SEEN_REPLY | ConntrackStatus::CONFIRMED));
            socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
            assert_eq!(client.recv().as_deref(), Some(&b"answer"[..]));

            client.send(b"again", server.address()).unwrap();
            let packet = next_packet(&socket, &mut batch);
            assert_eq!(packet.ct_state(), Some(CtState::ESTABLISHED));
            assert_eq!(
                entry(&packet).tuple(Direction::Original).unwrap().flow(),
                Some(flow)
            );
            socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
        }
    });
}

#[test]
fn a_ct_mark_keeps_the_bits_of_others() {
    isolated(|| {
        let Some((socket, _queue)) = tracked() else {
            return;
        };
        queue_at(Hook::Input, 0, Rule::new().udp());
        let mut batch = RecvBatch::default();
        for address in [V4, V6] {
            let [client, server] = [(), ()].map(|()| Udp::bind(address, 0).unwrap());
            let marks = [
                (Verdict::Accept.with_ct_mark(0x1234_5678, u32::MAX), 0),
                (Verdict::Accept.with_ct_mark(0xffff_00aa, 0xff), 0x1234_5678),
                (Verdict::Drop.with_ct_mark(0, 0xf000_0000), 0x1234_56aa),
                (Verdict::Accept.into(), 0x0234_56aa),
            ];
            for (decision, mark) in marks {
                client.send(b"marked", server.address()).unwrap();
                let packet = next_packet(&socket, &mut batch);
                assert_eq!(entry(&packet).mark().unwrap_or(0), mark, "{decision:?}");
                socket.set_verdict(packet.key(), decision).unwrap();
            }
        }
    });
}

/// A program decides the first packet; a rule lets the others of the connection pass
#[test]
fn a_rule_passes_connections_with_the_mark() {
    isolated(|| {
        let Some((socket, _queue)) = tracked() else {
            return;
        };
        queue_at(
            Hook::Input,
            0,
            Rule::new().udp_dport(PORT).ct_mark_not(7, u32::MAX),
        );
        let mut batch = RecvBatch::default();
        let server = Udp::bind(V4, PORT).unwrap();
        let clients = [(), ()].map(|()| Udp::bind(V4, 0).unwrap());
        for client in &clients {
            client.send(b"first", server.address()).unwrap();
            let packet = next_packet(&socket, &mut batch);
            let decision = Verdict::Accept.with_ct_mark(7, u32::MAX);
            socket.set_verdict(packet.key(), decision).unwrap();
            assert_eq!(server.recv().as_deref(), Some(&b"first"[..]));
            client.send(b"second", server.address()).unwrap();
            assert_eq!(server.recv().as_deref(), Some(&b"second"[..]));
        }
        assert!(is_silent(&socket, &mut batch));
    });
}

#[test]
fn an_update_sets_timeout_status_and_labels() {
    isolated(|| {
        let Some((socket, _queue)) = tracked() else {
            return;
        };
        // Makes the kernel give room for labels to new entries.
        let table = Table::new(rules::Family::Ip, "labels").unwrap();
        let chain = table.chain("label", Hook::Output, 0).unwrap();
        chain.add(&Rule::new().udp().set_label(5)).unwrap();
        queue_at(Hook::Input, 0, Rule::new().udp());
        let mut batch = RecvBatch::default();
        let [client, server] = [(), ()].map(|()| Udp::bind(V4, 0).unwrap());
        let mut decide = |change: &dyn Fn(Conntrack<'_>) -> Option<ConntrackUpdate>| {
            client.send(b"changed", server.address()).unwrap();
            let packet = next_packet(&socket, &mut batch);
            let update = change(entry(&packet));
            let decision = match &update {
                Some(update) => Verdict::Accept.with_conntrack(update),
                None => Decision::new(Verdict::Accept),
            };
            socket.set_verdict(packet.key(), decision).unwrap();
            assert_eq!(server.recv().as_deref(), Some(&b"changed"[..]));
        };
        decide(&|_| None);
        let fixed = ConntrackStatus::FIXED_TIMEOUT;
        decide(&|entry| {
            assert!(entry.labels().unwrap().iter().eq([5]));
            let labels = [2, 127].into_iter().collect::<Labels>();
            let update = ConntrackUpdate::new(&entry)
                .timeout(Duration::from_secs(3600))
                .unwrap()
                .status(fixed)
                .unwrap()
                .labels(labels, labels.with(5))
                .unwrap()
                .mark(9, u32::MAX)
                .unwrap();
            Some(update)
        });
        decide(&|entry| {
            // The rule in front of the queue sets label 5 again.
            assert!(entry.labels().unwrap().iter().eq([2, 5, 127]));
            assert_eq!(entry.mark(), Some(9));
            let timeout = entry.timeout().unwrap();
            assert!(timeout > Duration::from_secs(3500), "{timeout:?}");
            assert!(entry.status().unwrap().contains(fixed));
            assert!(ConntrackUpdate::new(&entry).timeout(TIMEOUT).is_err());
            None
        });
    });
}

/// In TCP the kernel would try to adjust sequence numbers
#[test]
fn a_new_tcp_length_beside_a_ct_mark_is_refused() {
    isolated(|| {
        let handle = nfqnl::open().unwrap();
        let (send, results) = mpsc::channel();
        let _queue = handle
            .create_queue_with(QUEUE, &WHOLE_PACKETS, move |data| {
                let old = data.get_payload();
                let longer = [old, b"more"].concat();
                let decision = Verdict::Accept.with_ct_mark(1, 1);
                let results = [
                    data.set_decision(&decision.with_payload(&longer)),
                    data.set_decision(&decision.with_payload(old)),
                    data.set_decision(&decision),
                ];
                send.send(results).unwrap();
            })
            .unwrap();
        queue_at(Hook::Input, 0, Rule::new().tcp());
        let listener = TcpListener::bind((V4, 0)).unwrap();
        let to = listener.local_addr().unwrap();
        let client = thread::spawn(move || TcpStream::connect_timeout(&to, TIMEOUT));
        let mut batch = RecvBatch::default();
        while !client.is_finished() {
            handle
                .run_timeout(&mut batch, Duration::from_millis(10))
                .unwrap();
        }
        client.join().unwrap().unwrap();
        let results: Vec<_> = results.try_iter().collect();
        assert!(results.len() >= 2, "a SYN and an ACK");
        for [longer, equal, without] in results {
            let is_refused = matches!(longer, Err(Error::ConntrackAndLength { .. }));
            assert!(is_refused, "{longer:?}");
            equal.and(without).unwrap();
        }
    });
}

#[test]
fn a_udp_answer_changes_length_and_ct_mark() {
    isolated(|| {
        let Some((socket, _queue)) = tracked() else {
            return;
        };
        queue_at(Hook::Input, 0, Rule::new().udp());
        let [sender, receiver] = [0, PORT].map(|port| Udp::bind(V4, port).unwrap());
        let (mut batch, mut verdicts) = (RecvBatch::default(), SendBatch::new());
        let mut buf = [0; 100];
        for mark in [0, 1] {
            sender.send(b"short", receiver.address()).unwrap();
            let packet = next_packet(&socket, &mut batch);
            assert_eq!(entry(&packet).mark(), Some(mark));
            let mut rewriter = Rewriter::new(&mut buf);
            let mut rewrite = rewriter.begin(&packet).unwrap();
            rewrite.replace(0..5, b"much longer").unwrap();
            let decision = Verdict::Accept.with_payload(rewrite.finish().unwrap());
            verdicts
                .answer(&packet, decision.with_ct_mark(1, 1))
                .unwrap();
            socket.send(&mut verdicts).unwrap();
            if kernel::refuses_payloads() {
                assert!(receiver.is_silent());
                break;
            }
            assert_eq!(receiver.recv(), Some(b"much longer".to_vec()));
        }
    });
}

#[test]
fn a_tcp_entry_has_state_and_window_scale() {
    isolated(|| {
        let Some((socket, _queue)) = tracked() else {
            return;
        };
        queue_at(Hook::Input, 0, Rule::new().tcp());
        for address in [V4, V6] {
            let listener = TcpListener::bind((address, 0)).unwrap();
            let to = listener.local_addr().unwrap();
            let mut states = Vec::new();
            thread::scope(|scope| {
                scope.spawn(|| traffic::tcp_echo(&listener));
                let client = scope.spawn(move || traffic::tcp_exchange(to, &[7; 1000]));
                let mut batch = RecvBatch::default();
                while !client.is_finished() {
                    for event in socket.recv_timeout(&mut batch, TIMEOUT / 100).unwrap() {
                        let packet = event.packet().expect("only packets");
                        let tcp = entry(&packet).tcp().unwrap();
                        states.push(tcp.state().unwrap());
                        if tcp.state() == Some(TcpState::ESTABLISHED) {
                            for side in [Direction::Original, Direction::Reply] {
                                assert!(tcp.window_scale(side).is_some_and(|scale| scale > 0));
                                assert!(tcp.flags(side).is_some_and(|flags| !flags.is_empty()));
                            }
                        }
                        socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
                    }
                }
                assert_eq!(client.join().unwrap().unwrap(), [7; 1000]);
            });
            for state in [
                TcpState::SYN_SENT,
                TcpState::SYN_RECV,
                TcpState::ESTABLISHED,
            ] {
                assert!(states.contains(&state), "{state} in {states:?}");
            }
        }
    });
}

#[test]
fn a_ping_has_the_same_key_as_its_tuple() {
    isolated(|| {
        let Some((socket, _queue)) = tracked() else {
            return;
        };
        for (address, rule) in [
            (V4, Rule::new().protocol(IpProtocol::ICMP)),
            (V6, Rule::new().protocol(IpProtocol::ICMPV6)),
        ] {
            queue_at(Hook::Input, 0, rule);
            let ping = thread::spawn(move || traffic::ping(address, b"ping", TIMEOUT).unwrap());
            let mut batch = RecvBatch::default();
            for direction in [Direction::Original, Direction::Reply] {
                let packet = next_packet(&socket, &mut batch);
                assert_eq!(packet.ct_state().unwrap().direction(), direction);
                let tuple = entry(&packet).tuple(direction).unwrap();
                assert_eq!(tuple.flow(), packet.flow());
                assert!(tuple.icmp_id().is_some() && tuple.icmp_type().is_some());
                socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
            }
            assert!(ping.join().unwrap());
        }
    });
}

#[test]
fn an_untracked_packet_has_no_entry() {
    isolated(|| {
        let Some((socket, _queue)) = tracked() else {
            return;
        };
        queue_at(Hook::Input, 0, Rule::new().udp());
        let table = Table::new(rules::Family::Ip, "raw").unwrap();
        for hook in [Hook::Output, Hook::Prerouting] {
            let chain = table.chain(&format!("{hook:?}"), hook, -300).unwrap();
            chain.add(&Rule::new().udp_dport(PORT).notrack()).unwrap();
        }
        let mut batch = RecvBatch::default();
        let server = Udp::bind(V4, PORT).unwrap();
        let client = Udp::bind(V4, 0).unwrap();
        client.send(b"untracked", server.address()).unwrap();
        let packet = next_packet(&socket, &mut batch);
        assert!(packet.conntrack().is_none());
        assert_eq!(packet.ct_state(), None);
        // The kernel accepts the packet and ignores the mark.
        let decision = Verdict::Accept.with_ct_mark(1, 1);
        socket.set_verdict(packet.key(), decision).unwrap();
        assert_eq!(server.recv().as_deref(), Some(&b"untracked"[..]));
        assert!(is_silent(&socket, &mut batch));
    });
}

#[test]
fn a_translated_flow_shows_both_addresses() {
    isolated(|| {
        let Some((socket, _queue)) = tracked() else {
            return;
        };
        let Router { client, server } = Router::new().unwrap();
        let table = Table::new(rules::Family::Ip, "nat").unwrap();
        let chain = table.nat_chain("nat", Hook::Postrouting, 100).unwrap();
        chain.add(&Rule::new().udp().masquerade()).unwrap();
        queue_at(Hook::Postrouting, 200, Rule::new().udp());
        let sender = client.namespace.run(|| Udp::bind(client.v4, 0).unwrap());
        let receiver = server.namespace.run(|| Udp::bind(server.v4, PORT).unwrap());
        sender.send(b"translated", receiver.address()).unwrap();
        let mut batch = RecvBatch::default();
        let packet = next_packet(&socket, &mut batch);
        let entry = entry(&packet);
        let [original, reply] =
            [Direction::Original, Direction::Reply].map(|side| entry.tuple(side).unwrap());
        let router = IpAddr::from(Ipv4Addr::new(10, 0, 1, 1));
        assert_eq!(original.source(), Some(client.v4));
        assert_eq!(original.destination(), Some(server.v4));
        assert_eq!(reply.source(), Some(server.v4));
        assert_eq!(reply.destination(), Some(router));
        assert_eq!(packet.flow().unwrap().source(), router);
        assert_eq!(packet.flow().map(|flow| flow.reversed()), reply.flow());
        assert!(entry.status().unwrap().contains(ConntrackStatus::SRC_NAT));
        let decision = Verdict::Accept.with_ct_mark(1, u32::MAX);
        socket.set_verdict(packet.key(), decision).unwrap();
        assert_eq!(receiver.recv().as_deref(), Some(&b"translated"[..]));
    });
}
