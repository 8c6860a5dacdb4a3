//! Tests of the test kit itself
//!
//! No test binds a queue, so the fate of a packet shows whether the rules work.

use std::io::ErrorKind;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::thread;

use nfqnl_testkit::hosts::Router;
use nfqnl_testkit::netns::{Namespace, isolated};
use nfqnl_testkit::rules::{Family, Hook, Queues, Rule, Table};
use nfqnl_testkit::traffic::{self, SILENCE, TIMEOUT, Udp, V4, V6};
use nfqnl_testkit::{link, user};

const PORT: u16 = 5000;

const BOTH: [(Family, IpAddr); 2] = [(Family::Ip, V4), (Family::Ip6, V6)];

#[test]
fn a_test_has_a_namespace_of_its_own() {
    isolated(|| {
        assert_eq!(link::index("lo").unwrap(), 1);
        assert_eq!(link::name(1).as_deref(), Some("lo"));
        assert!(link::index("eth0").is_err(), "only lo is here");
        assert_eq!(link::mac("lo").unwrap(), [0; 6]);
    });
}

#[test]
#[should_panic(expected = "failed")]
fn a_test_that_fails_in_there_fails_out_here() {
    isolated(|| panic!("on purpose"));
}

#[test]
#[should_panic(expected = "did not run")]
fn a_test_whose_name_is_not_found_fails() {
    fn elsewhere() {}
    isolated(elsewhere);
}

#[test]
fn traffic_of_all_protocols_flows() {
    isolated(|| {
        for address in [V4, V6] {
            let udp = Udp::bind(address, 0).unwrap();
            udp.send(b"hello", udp.address()).unwrap();
            assert_eq!(udp.recv().as_deref(), Some(&b"hello"[..]));
            assert!(udp.is_silent());

            let listener = TcpListener::bind((address, 0)).unwrap();
            let to = listener.local_addr().unwrap();
            let echo = thread::spawn(move || traffic::tcp_echo(&listener).unwrap());
            assert_eq!(
                traffic::tcp_exchange(to, b"there and back").unwrap(),
                b"there and back"
            );
            assert_eq!(echo.join().unwrap(), b"there and back".len());

            assert!(traffic::ping(address, b"ping", TIMEOUT).unwrap());
        }
    });
}

#[test]
fn tcp_echo_fails_without_a_peer_or_its_data() {
    isolated(|| {
        let listener = TcpListener::bind((V4, 0)).unwrap();
        let alone = traffic::tcp_echo_within(&listener, SILENCE).unwrap_err();
        assert_eq!(alone.kind(), ErrorKind::WouldBlock);
        let _silent = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let silent = traffic::tcp_echo_within(&listener, SILENCE).unwrap_err();
        assert_eq!(silent.kind(), ErrorKind::WouldBlock);
    });
}

#[test]
fn rules_match_count_drop_and_end() {
    isolated(|| {
        for (family, address) in BOTH {
            let table = Table::new(family, "t").unwrap();
            let chain = table.chain("c", Hook::Input, 0).unwrap();
            let marked = Rule::new().udp_dport(PORT).mark(7, u32::MAX);
            chain.add(&marked.counter("marked").accept()).unwrap();
            let others = Rule::new().udp_dport(PORT).mark_not(8, u32::MAX);
            chain.add(&others.counter("others").drop()).unwrap();

            let udp = Udp::bind(address, PORT).unwrap();
            udp.send(b"unmarked", udp.address()).unwrap();
            udp.set_mark(7).unwrap();
            udp.send(b"accepted", udp.address()).unwrap();
            udp.set_mark(8).unwrap();
            udp.send(b"no rule", udp.address()).unwrap();
            assert_eq!(udp.recv().as_deref(), Some(&b"accepted"[..]));
            assert_eq!(udp.recv().as_deref(), Some(&b"no rule"[..]));
            assert_eq!(chain.count("marked").unwrap(), 1);
            assert_eq!(chain.count("others").unwrap(), 1);
            assert!(chain.count("nobody").is_err());

            chain.flush().unwrap();
            udp.set_mark(9).unwrap();
            udp.send(b"flushed", udp.address()).unwrap();
            assert_eq!(udp.recv().as_deref(), Some(&b"flushed"[..]));
            table.delete().unwrap();
        }
    });
}

#[test]
fn an_unbound_queue_drops_or_bypasses_packets() {
    isolated(|| {
        for (family, address) in BOTH {
            let table = Table::new(family, "t").unwrap();
            let chain = table.chain("c", Hook::Output, 0).unwrap();
            let to = Rule::new().udp_dport(PORT + 1);
            chain
                .add(&to.queue(Queues::range(4..=5).bypass().fanout()))
                .unwrap();
            chain.add(&Rule::new().udp_sport(PORT).queue(1)).unwrap();

            let held = Udp::bind(address, PORT).unwrap();
            let passing = Udp::bind(address, PORT + 1).unwrap();
            held.send(b"to nobody", held.address()).unwrap();
            assert!(held.is_silent());
            passing.send(b"past nobody", passing.address()).unwrap();
            assert_eq!(passing.recv().as_deref(), Some(&b"past nobody"[..]));
        }
    });
}

#[test]
fn a_router_forwards_between_its_hosts() {
    isolated(|| {
        let router = Router::new().unwrap();
        let (client, server) = (&router.client, &router.server);
        for (from, to) in [(client.v4, server.v4), (client.v6, server.v6)] {
            let receiver = server.namespace.run(|| Udp::bind(to, PORT).unwrap());
            let sender = client.namespace.run(|| Udp::bind(from, 0).unwrap());
            sender
                .send(b"through the router", receiver.address())
                .unwrap();
            assert_eq!(receiver.recv().as_deref(), Some(&b"through the router"[..]));

            let listener = server.namespace.run(|| TcpListener::bind((to, 0)).unwrap());
            let listening = listener.local_addr().unwrap();
            let sent = vec![7; 100_000];
            let echo = thread::spawn(move || traffic::tcp_echo(&listener).unwrap());
            let back = client
                .namespace
                .run(|| traffic::tcp_exchange(listening, &sent).unwrap());
            assert_eq!(back.len(), sent.len());
            assert!(back == sent, "what comes back is what was sent");
            assert_eq!(echo.join().unwrap(), sent.len());

            let ping = || traffic::ping(to, b"there", TIMEOUT).unwrap();
            assert!(client.namespace.run(ping), "{to}");
        }
        let mac = client.namespace.run(|| link::mac("eth0").unwrap());
        assert_ne!(mac, link::mac(client.link).unwrap());
        link::set_mtu(server.link, 1400).unwrap();
        link::down(server.link).unwrap();
        assert!(
            !client
                .namespace
                .run(|| traffic::ping(server.v4, b"gone", SILENCE))
                .unwrap()
        );
    });
}

#[test]
fn without_net_admin_there_are_no_rules() {
    isolated(|| {
        user::without_net_admin(|| {
            let error = Table::new(Family::Ip, "t").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        });
        Table::new(Family::Ip, "t").expect("the other threads keep it");
        let other = Namespace::new().unwrap();
        other.run(|| Table::new(Family::Ip, "t").expect("another namespace, another table"));
    });
}
