//! Datagrams from a real kernel, and their contents; `data/README.md` describes their origin
#![cfg(target_endian = "little")]

use std::time::Duration;

use nfqnl_proto::consts::{
    NFQA_PAYLOAD, NFQA_PRIORITY, NFQNL_MSG_CONFIG, NFQNL_MSG_VERDICT, NLM_F_ACK, NLM_F_REQUEST,
    NLMSG_NOOP, message_type,
};
use nfqnl_proto::{Family, Hook, Message, Messages, Packet, Reply, SkbInfo};

const QUEUE: u16 = 258;
const MARK: u32 = 0x0102_0304;
const PRIORITY: u32 = 5;
const IPV4_AND_UDP: usize = 20 + 8;
const IPV6_AND_UDP: usize = 40 + 8;
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;

macro_rules! golden {
    ($name:literal) => {
        include_bytes!(concat!("data/", $name, ".bin"))
    };
}

/// Decodes the only message of a datagram
fn only(datagram: &[u8]) -> Message<'_> {
    let mut messages = Messages::new(datagram);
    let message = messages.next().expect("a message").expect("a whole one");
    assert!(messages.next().is_none() && messages.rest().is_empty());
    message
}

fn packet(datagram: &[u8]) -> Packet<'_> {
    match only(datagram) {
        Message::Packet(packet) => packet,
        other => panic!("not a packet: {other:?}"),
    }
}

fn reply(datagram: &[u8]) -> Reply<'_> {
    match only(datagram) {
        Message::Reply(reply) => reply,
        other => panic!("not a reply: {other:?}"),
    }
}

/// Checks the attributes that are the same in every packet here
fn assert_plain(packet: &Packet<'_>) {
    assert_eq!(packet.queue(), QUEUE);
    assert_eq!(packet.security_context(), None);
    assert_eq!((packet.vlan(), packet.l2_header()), (None, None));
    assert_eq!(
        (
            packet.conntrack().map(|entry| entry.as_bytes()),
            packet.ct_state().map(|state| state.0)
        ),
        (None, None)
    );
    assert_eq!(
        (packet.expectation(), packet.cgroup_classid()),
        (None, None)
    );
    assert_eq!(packet.attr(NFQA_PRIORITY + 2), None);
    assert_eq!(
        packet.attr(NFQA_PAYLOAD).unwrap_or_default(),
        packet.payload()
    );
}

#[test]
fn ipv4_at_input() {
    let packet = packet(golden!("ipv4_input"));
    assert_plain(&packet);
    assert_eq!(
        (packet.family(), packet.hw_protocol().0),
        (Family::INET, ETH_P_IP)
    );
    assert_eq!((packet.hook(), packet.id()), (Hook::INPUT, 1));
    assert_eq!((packet.mark(), packet.priority()), (MARK, PRIORITY));
    assert_eq!((packet.indev(), packet.outdev()), (Some(1), None));
    assert_eq!((packet.physindev(), packet.physoutdev()), (None, None));
    assert_eq!(packet.hw_addr().unwrap().as_bytes(), [0; 6], "loopback's");
    assert_eq!(
        (packet.uid(), packet.gid()),
        (None, None),
        "not associated with a socket"
    );
    assert_eq!(packet.timestamp(), None);
    let len = IPV4_AND_UDP + b"golden!".len();
    assert_eq!((packet.len(), packet.is_truncated()), (Some(len), false));
    assert_eq!(packet.skb_info(), SkbInfo::empty());
    assert_eq!(packet.payload().len(), len);
    assert!(packet.payload().ends_with(b"golden!"));
}

#[test]
fn ipv6_at_output() {
    let packet = packet(golden!("ipv6_output"));
    assert_plain(&packet);
    assert_eq!(
        (packet.family(), packet.hw_protocol().0),
        (Family::INET6, ETH_P_IPV6)
    );
    assert_eq!((packet.hook(), packet.id()), (Hook::OUTPUT, 2));
    assert_eq!((packet.mark(), packet.priority()), (MARK, PRIORITY));
    assert_eq!((packet.indev(), packet.outdev()), (None, Some(1)));
    assert_eq!(packet.hw_addr(), None);
    assert_eq!(
        (packet.uid(), packet.gid()),
        (Some(0), Some(0)),
        "root, not absent"
    );
    assert_eq!(packet.payload().len(), IPV6_AND_UDP + b"golden!".len());
    assert!(packet.payload().ends_with(b"golden!"));
}

#[test]
fn packet_truncated_to_50_bytes() {
    let packet = packet(golden!("cut"));
    assert_plain(&packet);
    assert_eq!(packet.payload().len(), 50);
    assert!(packet.payload().ends_with(b"xx"));
    assert_eq!((packet.len(), packet.is_truncated()), (Some(148), true));
}

#[test]
fn packet_without_payload() {
    let packet = packet(golden!("meta"));
    assert_plain(&packet);
    assert_eq!((packet.id(), packet.mark()), (4, MARK));
    assert_eq!(packet.payload(), []);
    assert_eq!((packet.len(), packet.is_truncated()), (None, false));
    assert_eq!(packet.skb_info(), SkbInfo::CSUM_NOT_READY);
}

#[test]
fn forwarded_packet_with_timestamp() {
    let packet = packet(golden!("forward"));
    assert_plain(&packet);
    assert_eq!(
        (packet.family(), packet.hook()),
        (Family::INET, Hook::FORWARD)
    );
    assert_eq!((packet.indev(), packet.outdev()), (Some(2), Some(3)));
    assert_eq!(packet.hw_addr().unwrap().to_string(), "22:b1:de:4d:93:c7");
    let time = Duration::from_secs(0x6b05_a41c) + Duration::from_micros(0x000d_dbbf);
    assert_eq!(packet.timestamp(), Some(time));
    assert!(packet.payload().ends_with(b"through a router"));
}

#[test]
fn bridged_packet() {
    let packet = packet(golden!("bridge"));
    assert_plain(&packet);
    assert_eq!(
        (packet.family(), packet.hook()),
        (Family::INET6, Hook::FORWARD)
    );
    assert_eq!(
        (packet.indev(), packet.outdev()),
        (Some(6), Some(6)),
        "the bridge"
    );
    assert_eq!(
        (packet.physindev(), packet.physoutdev()),
        (Some(4), Some(5)),
        "its ports"
    );
    assert_eq!(packet.hw_addr().unwrap().to_string(), "2e:cc:93:c6:c7:77");
    assert!(packet.payload().ends_with(b"over a bridge"));
}

#[test]
fn acknowledgements() {
    for (datagram, request_type, seq) in [
        (&golden!("ack")[..], message_type(NFQNL_MSG_CONFIG), 1),
        (golden!("noop_ack"), NLMSG_NOOP, 3),
    ] {
        let reply = reply(datagram);
        assert!(reply.is_ack());
        assert_eq!((reply.errno, reply.seq), (0, seq));
        assert_eq!((reply.request_type, reply.pid), (request_type, 0));
        assert_eq!(reply.request_flags, NLM_F_REQUEST | NLM_F_ACK);
        assert_eq!((reply.text, reply.offset), (None, None));
    }
}

#[test]
fn refusals() {
    const ENOENT: i32 = 2;
    const EBUSY: i32 = 16;
    for (datagram, request, errno, seq) in [
        (&golden!("busy")[..], NFQNL_MSG_CONFIG, EBUSY, 2),
        (golden!("no_such_packet"), NFQNL_MSG_VERDICT, ENOENT, 4),
    ] {
        let reply = reply(datagram);
        assert!(!reply.is_ack());
        assert_eq!((reply.errno, reply.seq), (errno, seq));
        assert_eq!(reply.request_type, message_type(request));
        assert_eq!((reply.text, reply.offset), (None, None));
    }
}

#[test]
fn refusal_with_text() {
    const ERANGE: i32 = 34;
    let reply = reply(golden!("short_attribute"));
    assert_eq!((reply.errno, reply.seq), (ERANGE, 5));
    assert_eq!(reply.text, Some(&b"Attribute failed policy validation"[..]));
    assert_eq!(reply.offset, Some(20), "the attribute behind both headers");
}
