//! Rules in a table of the program's own, and other network namespaces

use std::net::{IpAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use nfqnl::rules::{ChainConfig, ChainType, Queues, Rule, RuleError, Table, TableFamily};
use nfqnl::{
    Error, ErrorKind, Hook, InterfaceName, IpProtocol, Netns, Operation, RecvBatch, Socket, Verdict,
};
use nfqnl_testkit::kernel;
use nfqnl_testkit::netns::{Namespace, is_rootless, isolated};
use nfqnl_testkit::process::fork;
use nfqnl_testkit::rules::flush_ruleset;
use nfqnl_testkit::traffic::{self, TIMEOUT, Udp, V4, V6};
use nfqnl_testkit::user;

use crate::lab::{PORT, QUEUE, bridge, is_silent, next_keys, next_packet};

const ALL: u32 = u32::MAX;

fn rule() -> Rule {
    Rule::new()
}

/// Tables have an owner
fn has_owners() -> bool {
    kernel::is_at_least(5, 12)
}

fn name(name: &str) -> InterfaceName {
    name.parse().unwrap()
}

/// Returns how many packets each rule matches at a hook
fn counts<const N: usize>(
    place: impl Into<ChainConfig>,
    rules: [Rule; N],
    send: impl FnOnce(),
) -> [u64; N] {
    let table = Table::new("counts").unwrap();
    let chain = table.chain("c", place).unwrap();
    let labels: [String; N] = std::array::from_fn(|index| index.to_string());
    for (rule, label) in rules.into_iter().zip(&labels) {
        chain.add(&rule.counter(label)).unwrap();
    }
    send();
    let counts = labels.map(|label| chain.counter(&label).unwrap().unwrap().packets);
    table.remove().unwrap();
    counts
}

fn send_udp(address: IpAddr) {
    let udp = Udp::bind(address, PORT).unwrap();
    udp.send(b"a datagram", udp.address()).unwrap();
    assert!(udp.recv().is_some());
}

fn send_both() {
    send_udp(V4);
    send_udp(V6);
}

#[test]
fn protocols_and_ports() {
    isolated(|| {
        let rules = [
            rule(),
            rule().udp(),
            rule().tcp(),
            rule().udp_dport(PORT),
            rule().udp_sport(PORT),
            rule().udp_dport(PORT - 1..=PORT + 1),
            rule().udp_dport(PORT + 1..=PORT + 2),
            rule().udp_dport(PORT + 1),
            rule().tcp_dport(PORT),
        ];
        let counted = counts(Hook::OUTPUT, rules, send_both);
        assert_eq!(counted, [2, 2, 0, 2, 2, 2, 0, 0, 0]);
        // The last counter counts for the label.
        let rules = [rule().counter("first").tcp()];
        assert_eq!(counts(Hook::OUTPUT, rules, send_both), [0]);
        let rules = [
            rule().tcp_dport(PORT),
            rule().tcp_sport(PORT),
            rule().udp_dport(PORT),
        ];
        // The port is closed: a SYN, and a RST
        let counted = counts(Hook::OUTPUT, rules, || {
            assert!(TcpStream::connect((V4, PORT)).is_err());
        });
        assert_eq!(counted, [1, 1, 0]);
        let rules = [IpProtocol::ICMP, IpProtocol::ICMPV6].map(|p| rule().protocol(p));
        let counted = counts(Hook::OUTPUT, rules, || {
            assert!(traffic::ping(V4, b"ping", TIMEOUT).unwrap());
        });
        assert_eq!(counted, [2, 0]);
    });
}

#[test]
fn addresses_and_networks() {
    isolated(|| {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let rules = [
            rule().saddr(V4, 32),
            rule().daddr(V4, 32),
            rule().saddr(V6, 128),
            rule().daddr(V6, 255),
            rule().daddr(address("127.200.0.0"), 8),
            rule().daddr(address("127.0.0.0"), 31),
            rule().daddr(address("127.0.0.0"), 32),
            rule().daddr(address("126.0.0.0"), 7),
            rule().daddr(address("126.0.0.0"), 8),
            rule().daddr(address("::"), 127),
            rule().daddr(address("8000::"), 1),
            rule().daddr(address("0.0.0.0"), 0),
            rule().daddr(address("::"), 0),
        ];
        let counted = counts(Hook::OUTPUT, rules, send_both);
        assert_eq!(counted, [1, 1, 1, 1, 1, 1, 0, 1, 0, 1, 0, 1, 1]);
    });
}

#[test]
fn interfaces_marks_and_users() {
    isolated(|| {
        let send = || {
            let udp = Udp::bind(V4, PORT).unwrap();
            udp.set_mark(0x17).unwrap();
            udp.send(b"marked", udp.address()).unwrap();
            assert!(udp.recv().is_some()); // it has passed input
        };
        let rules = [
            rule().oifname(name("lo")),
            rule().oifname(name("l")),
            rule().iifname(name("lo")),
            rule().mark(0x17, ALL),
            rule().mark(0x7, ALL),
            rule().mark(0x7, 0xf),
            rule().mark_not(0x7, 0xf),
            rule().mark_not(0x7, ALL),
            rule().uid(0),
            rule().uid(1),
        ];
        let counted = counts(Hook::OUTPUT, rules, send);
        assert_eq!(counted, [1, 0, 0, 1, 0, 1, 0, 1, 1, 0]);
        let rules = [rule().iifname(name("lo")), rule().iifname(name("lo0"))];
        assert_eq!(counts(Hook::INPUT, rules, send), [1, 0]);
        for text in ["", "a/b", "a b", "a:b", "0123456789abcdef"] {
            assert!(text.parse::<InterfaceName>().is_err(), "{text:?}");
        }
        assert_eq!(name("0123456789abcde"), "0123456789abcde");
    });
}

#[test]
fn connections_and_their_marks() {
    isolated(|| {
        let udp = Udp::bind(V4, PORT).unwrap();
        let send = || {
            udp.send(b"to itself", udp.address()).unwrap();
            assert!(udp.recv().is_some());
        };
        let rules = [
            rule().ct_new(),
            rule().ct_mark(0, ALL),
            rule().set_mark(0xab, 0xff),
            rule().mark(0xab, ALL),
            rule().set_mark(0xff0, 0xf0),
            rule().mark(0xfb, ALL),
            rule().save_mark(),
            rule().ct_mark(0xfb, ALL),
            rule().ct_mark(0xb, 0xf),
            rule().ct_mark_not(0xb, 0xf),
        ];
        assert_eq!(
            counts(Hook::OUTPUT, rules, send),
            [1, 1, 1, 1, 1, 1, 1, 1, 1, 0]
        );
        // A connection without an entry is never new.
        let table = Table::new("notrack").unwrap();
        let raw = table
            .chain("raw", ChainConfig::new(Hook::OUTPUT).priority(-300))
            .unwrap();
        raw.add(&rule().notrack()).unwrap();
        assert_eq!(
            counts(Hook::OUTPUT, [rule().ct_new(), rule()], send),
            [0, 1]
        );
    });
}

#[test]
fn verdicts_families_and_types() {
    isolated(|| {
        let table = Table::new("t").unwrap();
        let output = Hook::OUTPUT;
        let ip = ChainConfig::new(output).family(TableFamily::Ip);
        let ip6 = ChainConfig::new(output)
            .family(TableFamily::Ip6)
            .priority(1);
        let route = ChainConfig::new(output)
            .chain_type(ChainType::Route)
            .priority(2);
        let ip = table.chain("ip", ip).unwrap();
        let ip6 = table.chain("ip6", ip6).unwrap();
        let route = table.chain("route", route).unwrap();
        ip.add(&rule().counter("before").accept()).unwrap();
        ip.add(&rule().counter("after")).unwrap();
        ip6.add(&rule().udp_dport(PORT + 1).drop()).unwrap();
        ip6.add(&rule().counter("six")).unwrap();
        route.add(&rule().counter("both")).unwrap();
        send_both();
        let dropped = Udp::bind(V6, PORT + 1).unwrap();
        let _ = dropped.send(b"dropped", dropped.address()); // EPERM
        let packets = |chain: &nfqnl::rules::Chain, label| chain.counter(label).unwrap().unwrap();
        assert_eq!(packets(&ip, "before").packets, 1);
        assert_eq!(packets(&ip, "before").bytes, 20 + 8 + 10);
        assert_eq!(packets(&ip, "after").packets, 0);
        assert_eq!(packets(&ip6, "six").packets, 1);
        assert_eq!(packets(&route, "both").packets, 2);
        assert_eq!(ip.counter("other").unwrap(), None);
        drop((table, ip, ip6));
        send_both();
        assert_eq!(
            packets(&route, "both").packets,
            4,
            "a chain keeps the table"
        );
    });
}

#[test]
fn queues_with_and_without_bypass() {
    isolated(|| {
        let table = Table::new("t").unwrap();
        let chain = table.chain("c", Hook::OUTPUT).unwrap();
        let to = |port| rule().udp_dport(port);
        chain.add(&to(PORT).queue(QUEUE)).unwrap();
        chain
            .add(&to(PORT + 1).queue(Queues::new(QUEUE).bypass()))
            .unwrap();
        chain
            .add(&to(PORT + 2).queue(Queues::range(7..=9).fanout()))
            .unwrap();
        for (address, is_last) in [(V4, false), (V6, true)] {
            let [held, passing, spread] = [0, 1, 2].map(|n| Udp::bind(address, PORT + n).unwrap());
            let _ = held.send(b"dropped", held.address());
            assert!(held.is_silent());
            passing.send(b"passing", passing.address()).unwrap();
            assert!(passing.recv().is_some());

            let socket = Socket::open().unwrap();
            let _queues = [QUEUE, 7, 8, 9].map(|num| socket.bind(num).unwrap());
            let mut batch = RecvBatch::default();
            for (udp, nums) in [
                (&held, QUEUE..=QUEUE),
                (&passing, QUEUE..=QUEUE),
                (&spread, 7..=9),
            ] {
                udp.send(b"queued", udp.address()).unwrap();
                let packet = next_packet(&socket, &mut batch);
                assert!(nums.contains(&packet.queue()));
                socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
                assert!(udp.recv().is_some());
            }
            // Packets in queues stay there without the rules.
            held.send(b"waiting", held.address()).unwrap();
            let keys = next_keys(&socket, &mut batch, 1);
            if is_last {
                chain.clear().unwrap();
            } else {
                chain
                    .replace(&[
                        to(PORT).queue(QUEUE),
                        to(PORT + 1).queue(Queues::new(QUEUE).bypass()),
                        to(PORT + 2).queue(Queues::range(7..=9).fanout()),
                    ])
                    .unwrap();
            }
            socket.set_verdict(keys[0], Verdict::Accept).unwrap();
            assert!(held.recv().is_some());
            assert!(is_silent(&socket, &mut batch));
        }
        send_both(); // no rule any more
    });
}

#[test]
fn a_replacement_is_made_as_a_whole_or_not() {
    isolated(|| {
        let table = Table::new("t").unwrap();
        let chain = table.chain("c", Hook::OUTPUT).unwrap();
        chain.add(&rule().counter("old")).unwrap();
        let unknown = rule().expression("nfqnl-unknown", &[]);
        let error = chain
            .replace(&[rule().counter("new"), unknown.clone(), rule()])
            .unwrap_err();
        assert_eq!(error.kind(), Some(ErrorKind::Unsupported));
        assert_eq!(
            error.to_string(),
            "replace rules: rule at index 1: unknown to this kernel"
        );
        assert!(matches!(&error, Error::Refused(refusal)
            if refusal.operation() == Operation::ReplaceRule(1)));
        let error = chain.add(&unknown).unwrap_err();
        assert_eq!(error.to_string(), "add rule: unknown to this kernel");
        send_udp(V4);
        assert_eq!(chain.counter("old").unwrap().unwrap().packets, 1);
        assert_eq!(chain.counter("new").unwrap(), None);
        chain.replace(&[rule().counter("new")]).unwrap();
        assert_eq!(chain.counter("old").unwrap(), None);
        assert!(chain.counter("new").unwrap().is_some());
    });
}

#[test]
fn faults_are_found_before_the_kernel_gets_them() {
    isolated(|| {
        let fault = |error: Error| match error {
            Error::InvalidRule { fault, .. } => fault,
            other => panic!("{other}"),
        };
        for bad in ["", "x\0y", &"x".repeat(256)] {
            assert_eq!(fault(Table::new(bad).unwrap_err()), RuleError::Name);
        }
        let table = Table::new("t").unwrap();
        assert_eq!(
            fault(table.chain("", Hook::INPUT).unwrap_err()),
            RuleError::Name
        );
        let chain = table.chain("c", Hook::OUTPUT).unwrap();
        let long = (0..1000).fold(rule(), |rule, _| rule.mark(1, 1));
        let error = chain.replace(&[rule(), long.drop()]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "replace rules: rule at index 1: longer than 65,531 bytes"
        );
        let long = rule().expression("counter", &[0; 70_000]).drop();
        assert_eq!(fault(chain.add(&long).unwrap_err()), RuleError::TooLong);
        assert!(passes());
        let ip6 = ChainConfig::new(Hook::OUTPUT).family(TableFamily::Ip6);
        let ip6 = table.chain("ip6", ip6).unwrap();
        assert_eq!(
            fault(ip6.add(&rule().saddr(V4, 8)).unwrap_err()),
            RuleError::Family
        );
        let empty = chain.add(&rule().queue(Queues::range(RANGE))).unwrap_err();
        assert_eq!(
            empty.to_string(),
            "add rule: the kernel refuses it as invalid"
        );
        let copy = table.clone();
        table.remove().unwrap();
        assert_eq!(fault(chain.add(&rule()).unwrap_err()), RuleError::Removed);
        assert_eq!(
            fault(copy.chain("c", Hook::INPUT).unwrap_err()),
            RuleError::Removed
        );
    });
}

#[test]
fn a_thousand_rules_are_replaced_at_once() {
    isolated(|| {
        let table = Table::new("t").unwrap();
        let chain = table.chain("c", Hook::OUTPUT).unwrap();
        let rules: Vec<Rule> = (1..=1000)
            .map(|port| {
                rule()
                    .udp_dport(port)
                    .saddr(V4, 8)
                    .counter(&port.to_string())
            })
            .collect();
        match chain.replace(&rules) {
            Ok(()) => assert_eq!(chain.counter("1000").unwrap().unwrap().packets, 0),
            // An ordinary user cannot have such a send buffer.
            Err(error) => {
                assert!(is_rootless(), "{error}");
                assert_eq!(
                    error.to_string(),
                    "replace rules: longer than the send buffer"
                );
            }
        }
    });
}

#[test]
fn addresses_on_a_bridge() {
    isolated(|| {
        let Some(bridge) = bridge() else { return };
        let table = Table::new("t").unwrap();
        let place = ChainConfig::new(Hook::FORWARD).family(TableFamily::Bridge);
        // The priority of nft's filter chains there. br_netfilter works at 0.
        let chain = table.chain("c", place.priority(-200)).unwrap();
        let IpAddr::V4(address) = bridge.right.v4 else {
            panic!("not IPv4");
        };
        chain
            .add(&rule().udp().daddr(address.into(), 32).counter("it"))
            .unwrap();
        chain
            .add(&rule().udp().daddr(V4, 8).counter("loopback"))
            .unwrap();
        chain
            .add(&rule().udp().daddr(V6, 0).counter("six"))
            .unwrap();
        let receiver = bridge
            .right
            .namespace
            .run(|| Udp::bind(bridge.right.v4, PORT).unwrap());
        let sender = bridge
            .left
            .namespace
            .run(|| Udp::bind(bridge.left.v4, 0).unwrap());
        sender.send(b"bridged", (address, PORT).into()).unwrap();
        assert!(receiver.recv().is_some());
        let packets = |label| chain.counter(label).unwrap().unwrap().packets;
        assert_eq!(["it", "loopback", "six"].map(packets), [1, 0, 0]);
    });
}

/// As for an upgrade by exec(2)
#[test]
fn a_table_goes_over_with_its_descriptor() {
    isolated(|| {
        let table = Table::new("t").unwrap();
        let chain = table.chain("c", Hook::OUTPUT).unwrap();
        chain.add(&rule().udp().queue(QUEUE)).unwrap();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let udp = Udp::bind(V4, PORT).unwrap();
        udp.send(b"waiting", udp.address()).unwrap();
        let mut batch = RecvBatch::default();
        let key = next_packet(&socket, &mut batch).key();
        let given = table.into_fd();
        if !has_owners() {
            assert_eq!(
                given.unwrap_err().to_string(),
                "hand the socket over: system call failed"
            );
            return;
        }
        let fd = given.unwrap();
        assert!(chain.clear().is_err());
        drop(chain);
        let table = Table::builder().open_fd(fd, "t").unwrap();
        let chain = table.chain("c", Hook::OUTPUT).unwrap();
        chain.replace(&[rule().counter("new")]).unwrap();
        socket.set_verdict(key, Verdict::Accept).unwrap();
        assert!(udp.recv().is_some(), "it waited all the time");
        table.remove().unwrap();
    });
}

/// Empty
#[expect(clippy::reversed_empty_ranges, reason = "the kernel refuses it")]
const RANGE: std::ops::RangeInclusive<u16> = 5..=4;

/// Drops all UDP
fn drop_udp(name: &str) -> Table {
    let table = Table::new(name).unwrap();
    let chain = table.chain("c", Hook::OUTPUT).unwrap();
    chain.add(&rule().udp().drop()).unwrap();
    table
}

fn passes() -> bool {
    let udp = Udp::bind(V4, PORT).unwrap();
    let _ = udp.send(b"a datagram", udp.address());
    udp.recv_within(Duration::from_millis(100)).is_some()
}

#[test]
fn a_table_vanishes_with_its_program() {
    isolated(|| {
        for round in 0..3 {
            let child = fork(|| {
                let table = drop_udp("t");
                assert!(!passes());
                match round {
                    0 => drop(table),
                    1 => table.remove().unwrap(),
                    _ => std::process::abort(),
                }
            })
            .unwrap();
            assert_eq!(child.wait().unwrap(), round < 2);
            if !has_owners() && round == 2 {
                assert!(!passes());
                drop(Table::new("t").unwrap()); // sweeps tables of ended processes
            }
            assert!(passes(), "round {round}");
        }
    });
}

#[test]
fn other_programs_cannot_change_a_table() {
    isolated(|| {
        let table = drop_udp("t");
        let child = fork(|| {
            let second = Table::new("t");
            if has_owners() {
                assert_eq!(second.unwrap_err().kind(), Some(ErrorKind::TableInUse));
                flush_ruleset().unwrap();
            } else {
                second.unwrap().remove().unwrap(); // another table of the same name
            }
            Table::new("another").unwrap().remove().unwrap();
        })
        .unwrap();
        assert!(child.wait().unwrap());
        assert!(!passes());
        table.remove().unwrap();
        assert!(passes());
    });
}

#[test]
fn a_table_of_another_program_is_not_removed() {
    isolated(|| {
        let bridge = ChainConfig::new(Hook::FORWARD).family(TableFamily::Bridge);
        // It has no owner when its program has ended.
        let child = fork(|| {
            let table = Table::builder().persistent().open("other");
            let chain = table.and_then(|table| table.chain("c", bridge).map(|_| ()));
            std::process::exit(i32::from(chain.is_err()));
        })
        .unwrap();
        if !child.wait().unwrap() {
            return; // not on this kernel
        }
        // A plain table of this name, in other families
        let refused = Table::new("other");
        assert_eq!(refused.unwrap_err().kind(), Some(ErrorKind::TableInUse));
        let table = Table::builder().persistent().open("other").unwrap();
        table.remove().unwrap();
        Table::new("other").unwrap().remove().unwrap();
    });
}

#[test]
fn a_persistent_table_survives_a_restart() {
    isolated(|| {
        let persistent = || Table::builder().persistent().open("t");
        if !kernel::is_at_least(6, 9) {
            assert_eq!(
                persistent().unwrap_err().kind(),
                Some(ErrorKind::Unsupported)
            );
            return;
        }
        let child = fork(|| {
            let table = persistent().unwrap();
            let chain = table.chain("c", Hook::OUTPUT).unwrap();
            chain.add(&rule().udp().counter("first").drop()).unwrap();
            std::process::abort();
        })
        .unwrap();
        assert!(!child.wait().unwrap());
        assert!(!passes());
        let table = persistent().unwrap();
        let chain = table.chain("c", Hook::OUTPUT).unwrap();
        assert_eq!(chain.counter("first").unwrap().unwrap().packets, 1);
        chain.replace(&[rule().counter("second")]).unwrap();
        assert!(passes());
        assert_eq!(chain.counter("first").unwrap(), None);
        let plain = Table::new("t").unwrap_err();
        assert_eq!(
            plain.to_string(),
            "add table: there is a table of this name"
        );
        drop((table, chain));
        let bridge = ChainConfig::new(Hook::FORWARD).family(TableFamily::Bridge);
        let child = fork(|| {
            let table = persistent().unwrap();
            let _ = table.chain("more", bridge); // not on all kernels
            std::process::abort();
        })
        .unwrap();
        assert!(!child.wait().unwrap());
        let table = persistent().unwrap();
        let chain = table.chain("c", Hook::OUTPUT).unwrap();
        assert!(chain.counter("second").unwrap().is_some());
        table.remove().unwrap(); // also the table of the bridge
        drop(Table::new("t").unwrap().chain("more", bridge));
    });
}

#[test]
fn a_vanishing_table_drops_what_waits() {
    isolated(|| {
        let table = Table::new("t").unwrap();
        let chain = table.chain("c", Hook::OUTPUT).unwrap();
        chain.add(&rule().udp().queue(QUEUE)).unwrap();
        let another = Table::new("another").unwrap();
        another.chain("c", Hook::INPUT).unwrap();
        let socket = Socket::open().unwrap();
        let _queue = socket.bind(QUEUE).unwrap();
        let udp = Udp::bind(V4, PORT).unwrap();
        let mut batch = RecvBatch::default();
        udp.send(b"waiting", udp.address()).unwrap();
        let keys = next_keys(&socket, &mut batch, 1);
        another.remove().unwrap();
        socket.set_verdict(keys[0], Verdict::Accept).unwrap();
        let refused = socket.recv_timeout(&mut batch, TIMEOUT).unwrap().next();
        assert!(
            matches!(refused, Some(nfqnl::Event::Refused(_))),
            "{refused:?}"
        );
    });
}

#[test]
fn rules_need_the_capability() {
    isolated(|| {
        let refused = user::without_net_admin(|| Table::new("t").map(|_| ()));
        assert_eq!(refused.unwrap_err().kind(), Some(ErrorKind::NoCapability));
    });
}

#[test]
fn one_program_filters_in_three_namespaces() {
    isolated(|| {
        let here = Namespace::current().unwrap();
        let others = [(); 2].map(|()| Namespace::new().unwrap());
        let namespaces = [&here, &others[0], &others[1]];
        let parts = namespaces.map(|namespace| {
            let netns = Netns::from(namespace.as_fd().try_clone_to_owned().unwrap());
            let socket = Socket::builder().netns(&netns).open().unwrap();
            let queue = socket.bind(QUEUE).unwrap();
            let table = Table::builder().netns(&netns).open("t").unwrap();
            let chain = table.chain("c", Hook::INPUT).unwrap();
            chain
                .add(&rule().udp_dport(PORT).counter("seen").queue(QUEUE))
                .unwrap();
            (socket, queue, table, chain)
        });
        let mut batch = RecvBatch::default();
        for (namespace, (socket, _, _, chain)) in namespaces.iter().zip(&parts) {
            let udp = namespace.run(|| Udp::bind(V4, PORT).unwrap());
            udp.send(b"in its namespace", udp.address()).unwrap();
            let packet = next_packet(socket, &mut batch);
            assert_eq!(packet.payload().get(28..), Some(&b"in its namespace"[..]));
            let device = socket.interface_name(packet.indev().unwrap()).unwrap();
            assert_eq!(device.unwrap(), "lo");
            socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
            assert!(udp.recv().is_some());
            assert_eq!(chain.counter("seen").unwrap().unwrap().packets, 1);
        }
    });
}

#[test]
fn namespaces_by_path_process_and_socket() {
    isolated(|| {
        let other = Namespace::new().unwrap();
        let inside = other.run(|| Socket::open().unwrap());
        let own = std::process::id();
        let here = [
            Netns::of_process(own).unwrap(),
            Netns::open("/proc/self/ns/net").unwrap(),
        ];
        let there = Netns::of_socket(&inside).unwrap();
        let _queue = inside.bind(QUEUE).unwrap();
        for netns in &here {
            let socket = Socket::builder().netns(netns).open().unwrap();
            drop(socket.bind(QUEUE).unwrap());
        }
        let socket = Socket::builder().netns(&there).open().unwrap();
        let in_use = socket.bind(QUEUE).unwrap_err();
        assert!(matches!(in_use.kind(), Some(ErrorKind::QueueInUse { .. })));
        let missing = Netns::named("nfqnl-missing").unwrap_err();
        assert_eq!(
            missing.to_string(),
            "enter network namespace: no such namespace"
        );
        let file = std::fs::File::open("/proc/self/status").unwrap();
        let not_one = Netns::from(std::os::fd::OwnedFd::from(file));
        let error = Socket::builder().netns(&not_one).open().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    });
}
