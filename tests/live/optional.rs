//! Features of only some kernels: in each test, the feature works or the kernel refuses it

use std::io::ErrorKind as IoErrorKind;

use nfqnl::{Decision, Family, Packet, RecvBatch, Socket, Verdict, Vlan};
use nfqnl_testkit::hosts::{Bridge, Host};
use nfqnl_testkit::netns::isolated;
use nfqnl_testkit::rules::{self, Hook, Rule, Table};
use nfqnl_testkit::traffic::Udp;
use nfqnl_testkit::{kernel, link};

use crate::lab::{PORT, bridge, is_silent, next_packet, udp_payload, with_udp_payload};

const ACCEPT: Decision<'_> = Decision::new(Verdict::Accept);
const ETH_P_IP: u16 = 0x0800;
const ETH_P_8021Q: u16 = 0x8100;

/// Makes a link of VLAN 5, and a UDP socket on it
fn on_vlan(host: &Host, address: &str) -> Udp {
    let address = address.parse().unwrap();
    host.namespace.run(|| {
        link::vlan("vlan5", "eth0", 5).unwrap();
        link::up("vlan5").unwrap();
        link::address("vlan5", address, 24).unwrap();
        Udp::bind(address, PORT).unwrap()
    })
}

/// Without `br_netfilter`, in the bridge family of nftables; xtables cannot queue there
#[test]
fn the_bridge_family_reads_and_sets_l2_and_vlan() {
    isolated(|| {
        let Some(bridge) = bridge() else { return };
        let (left, right) = (&bridge.left, &bridge.right);
        let table = Table::new(rules::Family::Bridge, "t").unwrap();
        let [forward, postrouting] = [Hook::Forward, Hook::Postrouting];
        for hook in [forward, postrouting] {
            // Before `br_netfilter`
            let chain = table.chain(&format!("{hook:?}"), hook, -300).unwrap();
            let rule = Rule::new().udp_dport(PORT).queue(u16::from(hook.number()));
            match (chain.add(&rule), kernel::has_function("nft_queue_eval")) {
                (Ok(()), Some(true) | None) => {}
                (Err(error), Some(false) | None) => {
                    return assert_eq!(error.kind(), IoErrorKind::NotFound, "{error}");
                }
                other => panic!("{other:?}"),
            }
        }
        let socket = Socket::open().unwrap();
        let _queues = [forward, postrouting].map(|hook| {
            let num = hook.number().into();
            socket.bind(num).unwrap()
        });
        let mut batch = RecvBatch::default();
        let accept = |batch: &mut _, decision: Decision<'_>, check: &dyn Fn(&Packet<'_>)| {
            let packet = next_packet(&socket, batch);
            check(&packet);
            socket.set_verdict(packet.key(), decision).unwrap();
        };

        let indexes = [Bridge::LINK, left.link, right.link].map(|name| link::index(name).unwrap());
        let [br0, from, to] = indexes.map(Some);
        let [from_mac, to_mac] =
            [left, right].map(|host| host.namespace.run(|| link::mac("eth0").unwrap()));
        let other_mac = [2, 0, 0, 0, 0, 9];
        let header = |source: &[u8]| [&to_mac, source, &ETH_P_IP.to_be_bytes()].concat();
        let (before, after) = (header(&from_mac), header(&other_mac));
        let receiver = right.namespace.run(|| Udp::bind(right.v4, PORT).unwrap());
        let sender = left.namespace.run(|| Udp::bind(left.v4, 0).unwrap());
        sender.send(b"bridged", receiver.address()).unwrap();
        accept(&mut batch, ACCEPT.with_l2_header(&after), &|packet| {
            assert_eq!(packet.hook().0, forward.number());
            assert_eq!(
                (packet.family(), packet.hw_protocol().0),
                (Family::BRIDGE, ETH_P_IP)
            );
            assert_eq!((packet.indev(), packet.physindev()), (br0, from));
            assert_eq!((packet.outdev(), packet.physoutdev()), (br0, to));
            assert_eq!(packet.hw_addr().unwrap().as_bytes(), from_mac);
            assert_eq!(
                (packet.l2_header(), packet.vlan()),
                (Some(&before[..]), None)
            );
            assert_eq!(udp_payload(packet), b"bridged");
        });
        accept(&mut batch, ACCEPT, &|packet| {
            assert_eq!(packet.hook().0, postrouting.number());
            assert_eq!((packet.indev(), packet.outdev()), (None, br0));
            assert_eq!(packet.l2_header(), Some(&after[..]));
        });
        assert_eq!(receiver.recv().as_deref(), Some(&b"bridged"[..]));

        // Since Linux 7.2 the kernel drops a bridged packet with a new payload.
        sender.send(b"bridged", receiver.address()).unwrap();
        let packet = next_packet(&socket, &mut batch);
        let new = with_udp_payload(packet.payload(), b"rewritten").unwrap();
        let decision = Verdict::Accept.with_payload(&new);
        socket.set_verdict(packet.key(), decision).unwrap();
        if kernel::is_at_least(7, 2) {
            assert!(is_silent(&socket, &mut batch) && receiver.is_silent());
        } else {
            accept(&mut batch, ACCEPT, &|packet| {
                assert_eq!(udp_payload(packet), b"rewritten");
            });
            assert_eq!(receiver.recv().as_deref(), Some(&b"rewritten"[..]));
        }

        let tag = |tci| Vlan {
            proto: ETH_P_8021Q,
            tci,
        };
        let [tagged, on_vlan] =
            [(left, "10.0.5.2"), (right, "10.0.5.3")].map(|(host, address)| on_vlan(host, address));
        tagged.send(b"tagged", on_vlan.address()).unwrap();
        accept(&mut batch, ACCEPT.with_vlan(tag(0xa006)), &|packet| {
            assert_eq!(
                (packet.vlan(), packet.hw_protocol().0),
                (Some(tag(5)), ETH_P_IP)
            );
            assert_eq!(packet.l2_header(), Some(&before[..]), "without the tag");
            assert_eq!(udp_payload(packet), b"tagged");
        });
        accept(&mut batch, ACCEPT.with_vlan(tag(5)), &|packet| {
            assert_eq!(packet.vlan(), Some(tag(0xa006)))
        });
        assert_eq!(on_vlan.recv().as_deref(), Some(&b"tagged"[..]));
    });
}
