//! The conntrack view beside netlink-packet-netfilter, for what that crate knows of an entry
#![cfg(all(test, target_endian = "little"))]

use std::net::Ipv4Addr;

use netlink_packet_core::{Emitable, Nla, NlasIterator, Parseable};
use netlink_packet_netfilter::conntrack::{
    self as theirs, ConntrackAttribute, IPTuple, ProtoInfoTCP, ProtoTuple, Protocol,
};
use nfqnl_proto::consts::NLA_TYPE_MASK;
use nfqnl_proto::{Conntrack, Direction, Tuple};

fn tuple(from: [u8; 4], to: [u8; 4], source: u16, destination: u16) -> Vec<theirs::Tuple> {
    let [from, to] = [from, to].map(|octets| Ipv4Addr::from(octets).into());
    vec![
        theirs::Tuple::Ip(vec![
            IPTuple::SourceAddress(from),
            IPTuple::DestinationAddress(to),
        ]),
        theirs::Tuple::Proto(vec![
            ProtoTuple::Protocol(Protocol::Tcp),
            ProtoTuple::SourcePort(source),
            ProtoTuple::DestinationPort(destination),
        ]),
    ]
}

/// Checks everything that netlink-packet-netfilter knows of an entry
fn compare(bytes: &[u8]) {
    let entry = Conntrack::new(bytes);
    for attr in NlasIterator::new(bytes) {
        match ConntrackAttribute::parse(&attr.unwrap()).unwrap() {
            ConntrackAttribute::CtaTupleOrig(theirs) => {
                compare_tuple(&theirs, entry.tuple(Direction::Original).unwrap());
            }
            ConntrackAttribute::CtaTupleReply(theirs) => {
                compare_tuple(&theirs, entry.tuple(Direction::Reply).unwrap());
            }
            ConntrackAttribute::CtaProtoInfo(theirs) => {
                let [theirs::ProtoInfo::TCP(theirs)] = &theirs[..] else {
                    panic!("{theirs:?}");
                };
                let ours = entry.tcp().unwrap();
                for info in theirs {
                    let (original, reply) = (Direction::Original, Direction::Reply);
                    match info {
                        ProtoInfoTCP::State(state) => assert_eq!(ours.state().unwrap().0, *state),
                        ProtoInfoTCP::OriginalWindowScale(scale) => {
                            assert_eq!(ours.window_scale(original), Some(*scale));
                        }
                        ProtoInfoTCP::ReplyWindowScale(scale) => {
                            assert_eq!(ours.window_scale(reply), Some(*scale));
                        }
                        ProtoInfoTCP::OriginalFlags(flags) => {
                            assert_eq!(ours.flags(original).unwrap().bits(), flags.flags);
                        }
                        ProtoInfoTCP::ReplyFlags(flags) => {
                            assert_eq!(ours.flags(reply).unwrap().bits(), flags.flags);
                        }
                        other => panic!("{other:?}"),
                    }
                }
            }
            ConntrackAttribute::CtaStatus(status) => {
                assert_eq!(entry.status().unwrap().bits(), status.bits());
            }
            ConntrackAttribute::CtaTimeout(seconds) => {
                assert_eq!(entry.timeout().unwrap().as_secs(), u64::from(seconds));
            }
            ConntrackAttribute::CtaMark(mark) => assert_eq!(entry.mark(), Some(mark)),
            ConntrackAttribute::Other(attr) => {
                assert!(entry.attr(attr.kind() & NLA_TYPE_MASK).is_some());
            }
            other => panic!("{other:?}"),
        }
    }
}

fn compare_tuple(theirs: &[theirs::Tuple], ours: Tuple<'_>) {
    for part in theirs {
        match part {
            theirs::Tuple::Ip(addresses) => {
                let [
                    IPTuple::SourceAddress(source),
                    IPTuple::DestinationAddress(destination),
                ] = addresses[..]
                else {
                    panic!("{addresses:?}");
                };
                assert_eq!(ours.source(), Some(source));
                assert_eq!(ours.destination(), Some(destination));
            }
            theirs::Tuple::Proto(proto) => {
                let [
                    ProtoTuple::Protocol(protocol),
                    ProtoTuple::SourcePort(source),
                    ProtoTuple::DestinationPort(destination),
                ] = &proto[..]
                else {
                    panic!("{proto:?}");
                };
                assert_eq!(ours.protocol().unwrap().0, u8::from(*protocol));
                assert_eq!(ours.source_port(), Some(*source));
                assert_eq!(ours.destination_port(), Some(*destination));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn another_parser_reads_the_same() {
    compare(include_bytes!("../../data/conntrack_5_10_x86_64_v4.bin"));
    compare(include_bytes!("../../data/conntrack_5_10_x86_64_v6.bin"));
    // A TCP connection: tuples, status, timeout, mark, and the state of the protocol
    let connection = [
        ConntrackAttribute::CtaTupleOrig(tuple([10, 0, 0, 2], [10, 0, 1, 2], 40000, 443)),
        ConntrackAttribute::CtaTupleReply(tuple([10, 0, 1, 2], [10, 0, 0, 2], 443, 40000)),
        ConntrackAttribute::CtaStatus(theirs::Status::from_bits_retain(0x18e)),
        ConntrackAttribute::CtaTimeout(431_999),
        ConntrackAttribute::CtaMark(0xabcd),
        ConntrackAttribute::CtaProtoInfo(vec![theirs::ProtoInfo::TCP(vec![
            ProtoInfoTCP::State(3),
            ProtoInfoTCP::OriginalWindowScale(7),
            ProtoInfoTCP::ReplyWindowScale(10),
        ])]),
    ];
    let mut bytes = vec![0; connection.as_slice().buffer_len()];
    connection.as_slice().emit(&mut bytes);
    compare(&bytes);
}
