//! Names of interfaces, in the namespace of the socket

use std::net::IpAddr;
use std::thread;

use nfqnl::{InterfaceName, Packet, RecvBatch, Socket, Verdict};
use nfqnl_testkit::hosts::Router;
use nfqnl_testkit::link;
use nfqnl_testkit::netns::{Namespace, isolated};
use nfqnl_testkit::rules::{self, Hook, Rule, Table};
use nfqnl_testkit::traffic::Udp;

use crate::lab::{PORT, QUEUE, bridge, next_packet};

/// Queues a datagram that this host passes on; calls `check` with the packet and a way to name its
/// devices
fn with_passing_datagram(
    from: (&Namespace, IpAddr),
    to: IpAddr,
    check: impl FnOnce(Packet<'_>, &dyn Fn(Option<u32>) -> InterfaceName),
) {
    let socket = Socket::open().unwrap();
    let _queue = socket.bind(QUEUE).unwrap();
    let table = Table::new(rules::Family::Ip, "t").unwrap();
    let chain = table.chain("forward", Hook::Forward, 0).unwrap();
    let rule = Rule::new().udp_dport(PORT).queue(QUEUE);
    chain.add(&rule).unwrap();
    let (namespace, address) = from;
    let sender = namespace.run(|| Udp::bind(address, 0).unwrap());
    sender.send(b"named", (to, PORT).into()).unwrap();
    let mut batch = RecvBatch::default();
    let packet = next_packet(&socket, &mut batch);
    let name = |index: Option<u32>| socket.interface_name(index.unwrap()).unwrap().unwrap();
    check(packet, &name);
    socket.set_verdict(packet.key(), Verdict::Accept).unwrap();
}

#[test]
fn a_forwarded_packet_names_both_devices() {
    isolated(|| {
        let Router { client, server } = Router::new().unwrap();
        let from = (&client.namespace, client.v4);
        with_passing_datagram(from, server.v4, |packet, name| {
            assert_eq!(name(packet.indev()), "to-client");
            assert_eq!(name(packet.outdev()), "to-server");
            assert_eq!(name(packet.indev()).to_string(), "to-client");
            assert_eq!(format!("{:?}", name(packet.indev())), "\"to-client\"");
        });
    });
}

#[test]
fn a_bridged_packet_names_the_ports() {
    isolated(|| {
        let Some(bridge) = bridge() else { return };
        let (left, right) = (&bridge.left, &bridge.right);
        with_passing_datagram((&left.namespace, left.v4), right.v4, |packet, name| {
            assert_eq!(name(packet.physindev()), left.link);
            assert_eq!(name(packet.physoutdev()), right.link);
            assert_eq!(name(packet.indev()), "br0");
            assert_eq!(name(packet.outdev()), "br0");
        });
    });
}

/// The socket stays in its namespace when the thread moves, and sees a new name at once
#[test]
fn names_are_those_of_the_sockets_namespace() {
    isolated(|| {
        let other = Namespace::new().unwrap();
        let socket = Socket::open().unwrap();
        link::veth("here", "there", &other).unwrap();
        let index = link::index("here").unwrap();
        let name = || socket.interface_name(index).unwrap().unwrap();
        assert_eq!(name(), "here");
        assert_eq!(other.run(name), "here");
        link::rename("here", "renamed").unwrap();
        assert_eq!(name(), "renamed");
        assert_eq!(
            thread::scope(|scope| scope.spawn(name).join()).unwrap(),
            "renamed"
        );
        for index in [index + 1000, 0, u32::MAX] {
            assert_eq!(socket.interface_name(index).unwrap(), None);
        }
    });
}
