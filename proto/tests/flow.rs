//! Flow keys, against etherparse and against headers written by hand
#![allow(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::{
    IpFragOffset, Ipv6FragmentHeader, NetSlice, PacketBuilder, SlicedPacket, TransportSlice,
};
use nfqnl_proto::{Family, FlowKey, IpProtocol, Packet, Transport};
use proptest::prelude::*;

mod common;

const V4: [[u8; 4]; 2] = [[192, 0, 2, 1], [198, 51, 100, 9]];
const V6: [[u8; 16]; 2] = [[0x20; 16], [0xfd; 16]];

type Fields = (IpAddr, IpAddr, u8, Option<(u16, u16)>);

/// The addresses, the protocol and the ports that etherparse finds
fn expected(packet: &[u8]) -> Option<Fields> {
    let sliced = SlicedPacket::from_ip(packet).ok()?;
    let ports = match sliced.transport? {
        TransportSlice::Tcp(tcp) => Some((tcp.source_port(), tcp.destination_port())),
        TransportSlice::Udp(udp) => Some((udp.source_port(), udp.destination_port())),
        _ => None,
    };
    match sliced.net? {
        NetSlice::Ipv4(ip) => Some((
            ip.header().source_addr().into(),
            ip.header().destination_addr().into(),
            ip.payload().ip_number.0,
            ports,
        )),
        NetSlice::Ipv6(ip) => Some((
            ip.header().source_addr().into(),
            ip.header().destination_addr().into(),
            ip.payload().ip_number.0,
            ports,
        )),
        NetSlice::Arp(_) => None,
    }
}

fn build(v6: bool, kind: u8, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let builder = match v6 {
        false => PacketBuilder::ipv4(V4[0], V4[1], 64),
        true => PacketBuilder::ipv6(V6[0], V6[1], 64),
    };
    let mut packet = Vec::new();
    match kind {
        0 => builder
            .tcp(ports.0, ports.1, 1, 2)
            .write(&mut packet, payload),
        1 => builder.udp(ports.0, ports.1).write(&mut packet, payload),
        2 => builder
            .icmpv4_echo_request(ports.0, ports.1)
            .write(&mut packet, payload),
        _ => builder
            .icmpv6_echo_request(ports.0, ports.1)
            .write(&mut packet, payload),
    }
    .unwrap();
    packet
}

/// An IPv6 packet with these extension headers and a UDP header
fn with_extensions(headers: &[(u8, Vec<u8>)]) -> Vec<u8> {
    let mut packet = build(true, 1, (53, 4242), b"data");
    let udp = packet.split_off(40);
    let mut next_at = 6;
    for (number, header) in headers {
        packet[next_at] = *number;
        next_at = packet.len();
        packet.extend(header);
    }
    packet[next_at] = 17;
    packet.extend(udp);
    packet
}

#[test]
fn an_icmp_echo_and_its_answer_are_reversed_keys() {
    for (v6, kind, types) in [(false, 2, (8, 0)), (true, 3, (128, 129))] {
        let packet = build(v6, kind, (0x0102, 5), b"ping");
        let key = FlowKey::parse(&packet).unwrap();
        let Transport::Icmp { kind, code, id, .. } = key.transport() else {
            panic!("{key:?}");
        };
        assert_eq!((kind, code, id), (types.0, 0, 0x0102));
        let mut answer = packet.clone();
        let (at, size) = if v6 { (8, 16) } else { (12, 4) };
        answer[at..at + 2 * size].rotate_left(size);
        answer[if v6 { 40 } else { 20 }] = types.1;
        let answer = FlowKey::parse(&answer).unwrap();
        assert_eq!(answer, key.reversed());
        assert_eq!(answer.reversed(), key);
        assert_eq!(key.ports(), None);
    }
}

#[test]
fn ipv6_extension_headers_are_skipped() {
    let plain = FlowKey::parse(&with_extensions(&[])).unwrap();
    let options = |words: u8| {
        let mut header = vec![0; (usize::from(words) + 1) * 8];
        header[1] = words;
        header
    };
    let mut authentication = vec![0; 24];
    authentication[1] = 4;
    let first_fragment = vec![0, 0, 0, 1, 0, 0, 0, 9];
    let cases: [&[(u8, Vec<u8>)]; 4] = [
        &[(0, options(0))],
        &[(0, options(2)), (60, options(1)), (43, options(0))],
        &[(51, authentication)],
        &[(44, first_fragment)],
    ];
    for headers in cases {
        let packet = with_extensions(headers);
        assert_eq!(FlowKey::parse(&packet), Some(plain), "{headers:?}");
        for len in 0..packet.len() - 8 {
            assert_eq!(FlowKey::parse(&packet[..len]), None, "{len}");
        }
    }
    assert_eq!(plain.ports(), Some((53, 4242)));
}

#[test]
fn later_fragments_have_their_own_keys() {
    let whole = build(false, 1, (53, 4242), &[7; 64]);
    let mut first = whole.clone();
    first[6] = 0x20;
    assert_eq!(FlowKey::parse(&first), FlowKey::parse(&whole));
    let mut later = whole.clone();
    later[4..8].copy_from_slice(&[0x12, 0x34, 0x00, 0x03]);
    let key = FlowKey::parse(&later).unwrap();
    assert!(matches!(
        key.transport(),
        Transport::Fragment { id: 0x1234, .. }
    ));
    assert_eq!(key.protocol(), IpProtocol::UDP);
    assert_eq!(FlowKey::parse(&later[..20]), Some(key), "it needs no ports");

    let offset = IpFragOffset::try_new(3).unwrap();
    let header = Ipv6FragmentHeader::new(etherparse::IpNumber::UDP, offset, false, 77);
    let later = with_extensions(&[(44, header.to_bytes().to_vec())]);
    let key = FlowKey::parse(&later).unwrap();
    assert!(matches!(
        key.transport(),
        Transport::Fragment { id: 77, .. }
    ));
    assert_eq!(key.protocol(), IpProtocol::UDP);
}

#[test]
fn protocols_without_ports_have_their_number() {
    let mut packet = build(false, 1, (1, 2), b"");
    packet[9] = 47;
    let key = FlowKey::parse(&packet[..20]).unwrap();
    assert_eq!(
        (key.protocol(), key.transport()),
        (IpProtocol::GRE, Transport::Other)
    );
    assert_eq!(key.source(), IpAddr::from(Ipv4Addr::from(V4[0])));
    assert_eq!(key.destination(), IpAddr::from(Ipv4Addr::from(V4[1])));
    let mut packet = build(true, 1, (1, 2), b"");
    packet[6] = 59; // no next header
    let key = FlowKey::parse(&packet[..40]).unwrap();
    assert_eq!(
        (key.protocol(), key.transport()),
        (IpProtocol(59), Transport::Other)
    );
    assert_eq!(key.source(), IpAddr::from(Ipv6Addr::from(V6[0])));
}

#[test]
fn a_bridged_frame_of_another_type_has_no_flow() {
    let payload = build(false, 1, (1, 2), b"");
    for (hw_protocol, family, is_flow) in [
        (0x8100_u16, Family::BRIDGE, false),
        (0x0800, Family::BRIDGE, true),
        (0x0800, Family::INET, true),
    ] {
        let [high, low] = hw_protocol.to_be_bytes();
        let message = common::MessageBuilder::packet(family, 1)
            .attr(1, [0, 0, 0, 1, high, low, 0])
            .attr(10, &payload)
            .build();
        assert_eq!(Packet::parse(&message).unwrap().flow().is_some(), is_flow);
    }
}

#[test]
fn a_key_can_be_made_by_hand() {
    let packet = build(true, 0, (53, 4242), b"");
    let [source, destination] = V6.map(|address| IpAddr::from(Ipv6Addr::from(address)));
    let key = FlowKey::new(
        IpProtocol::TCP,
        (source, 53).into(),
        (destination, 4242).into(),
    );
    assert_eq!(FlowKey::parse(&packet), Some(key));
    assert_eq!(
        key.to_string(),
        format!("TCP [{source}]:53 -> [{destination}]:4242")
    );
}

#[test]
fn other_bytes_have_no_flow() {
    for bytes in [&[][..], &[0; 64], &[0x50; 64], &[0x45; 19], &[0x60; 39]] {
        assert_eq!(FlowKey::parse(bytes), None);
    }
}

proptest! {
    #![proptest_config(common::config())]

    #[test]
    fn ports_are_those_of_etherparse(
        v6: bool,
        kind in 0_u8..2,
        ports: (u16, u16),
        payload in proptest::collection::vec(any::<u8>(), 0..64),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
    ) {
        let mut packet = build(v6, kind, ports, &payload);
        let key = FlowKey::parse(&packet).unwrap();
        prop_assert_eq!(key.ports(), Some(ports));
        let back = key.reversed();
        prop_assert_eq!(back.ports(), Some((ports.1, ports.0)));
        prop_assert_eq!(back.reversed(), key);
        for (at, byte) in changes {
            let at = at.index(packet.len());
            packet[at] = byte;
        }
        let key = FlowKey::parse(&packet);
        if let Some((source, destination, protocol, ports)) = expected(&packet) {
            let key = key.unwrap();
            prop_assert_eq!((key.source(), key.destination()), (source, destination));
            prop_assert_eq!(key.protocol(), IpProtocol(protocol));
            if ports.is_some() {
                prop_assert_eq!(key.ports(), ports);
            }
        }
    }
}
