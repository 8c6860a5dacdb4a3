//! The conntrack view and its changes, against attributes written by hand from the kernel's headers
#![allow(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

use core::net::IpAddr;
use core::time::Duration;

use nfqnl_proto::consts::*;
use nfqnl_proto::{
    Conntrack, ConntrackStatus, ConntrackUpdate, ConntrackUpdateError, CtState, Decision,
    Direction, FlowKey, IpProtocol, Labels, RequestHeader, TcpFlags, TcpState, Verdict,
};
use proptest::prelude::*;

mod common;
use common::wire;

/// One attribute with its padding
fn attr(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = u16::try_from(4 + value.len()).unwrap();
    let mut bytes = wire![len, kind, value];
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn nested(kind: u16, attrs: &[Vec<u8>]) -> Vec<u8> {
    attr(kind | NLA_F_NESTED, &attrs.concat())
}

fn tuple(kind: u16, source: IpAddr, destination: IpAddr, proto: &[Vec<u8>]) -> Vec<u8> {
    let ip = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            [attr(1, &source.octets()), attr(2, &destination.octets())]
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            [attr(3, &source.octets()), attr(4, &destination.octets())]
        }
        _ => unreachable!(),
    };
    nested(kind, &[nested(1, &ip), nested(2, proto)])
}

fn ports(number: u8, source: u16, destination: u16) -> [Vec<u8>; 3] {
    let be = u16::to_be_bytes;
    [
        attr(1, &[number]),
        attr(2, &be(source)),
        attr(3, &be(destination)),
    ]
}

fn addresses(v6: bool) -> [IpAddr; 2] {
    match v6 {
        false => ["10.0.0.2", "10.0.1.2"],
        true => ["fd00::2", "fd01::2"],
    }
    .map(|address| address.parse().unwrap())
}

/// The entry of a TCP connection with everything that a kernel sends
fn tcp_entry(v6: bool) -> Vec<u8> {
    let [client, server] = addresses(v6);
    let state = [
        attr(1, &[3]),
        attr(2, &[7]),
        attr(3, &[10]),
        attr(4, &[0x23, 0]),
        attr(5, &[0x0b, 0]),
    ];
    let pad = attr(5, &[]);
    let counters = |packets: u64, bytes: u64| {
        [
            pad.clone(),
            attr(1, &packets.to_be_bytes()),
            attr(2, &bytes.to_be_bytes()),
        ]
    };
    [
        tuple(1, client, server, &ports(6, 40000, 443)),
        tuple(2, server, client, &ports(6, 443, 40000)),
        attr(18, &7_u16.to_be_bytes()),
        attr(12, &[0xde, 0xad, 0xbe, 0xef]),
        attr(3, &0x18e_u32.to_be_bytes()),
        attr(7, &431_999_u32.to_be_bytes()),
        nested(4, &[nested(1, &state)]),
        nested(9, &counters(3, 180)),
        nested(10, &counters(2, 1 << 40)),
        nested(20, &[attr(1, &1_700_000_000_123_456_789_u64.to_be_bytes())]),
        nested(5, &[attr(1, b"ftp\0")]),
        nested(19, &[attr(1, b"system_u:object_r:x\0")]),
        tuple(14, client, server, &ports(6, 40000, 21)),
        attr(8, &0xabcd_u32.to_be_bytes()),
        attr(22, &Labels::empty().with(1).with(127).to_wire()),
    ]
    .concat()
}

#[test]
fn every_field_of_an_entry_is_read() {
    for v6 in [false, true] {
        let bytes = tcp_entry(v6);
        let entry = Conntrack::new(&bytes);
        let [client, server] = addresses(v6);
        assert_eq!(entry.as_bytes(), bytes);
        assert_eq!(entry.attrs().count(), 15);
        assert_eq!(entry.id(), Some(0xdead_beef));
        assert_eq!(entry.mark(), Some(0xabcd));
        let status = ConntrackStatus::SEEN_REPLY
            | ConntrackStatus::ASSURED
            | ConntrackStatus::CONFIRMED
            | ConntrackStatus::SRC_NAT_DONE
            | ConntrackStatus::DST_NAT_DONE;
        assert_eq!(entry.status(), Some(status));
        assert_eq!(entry.zone(), Some(7));
        assert_eq!(entry.timeout(), Some(Duration::from_secs(431_999)));
        let sides = [
            (Direction::Original, client, server, 40000, 443),
            (Direction::Reply, server, client, 443, 40000),
        ];
        for (direction, source, destination, source_port, destination_port) in sides {
            let tuple = entry.tuple(direction).unwrap();
            assert_eq!(tuple.source(), Some(source));
            assert_eq!(tuple.destination(), Some(destination));
            assert_eq!(tuple.protocol(), Some(IpProtocol::TCP));
            assert_eq!(tuple.source_port(), Some(source_port));
            assert_eq!(tuple.destination_port(), Some(destination_port));
            assert_eq!((tuple.icmp_id(), tuple.zone()), (None, None));
        }
        assert_eq!(entry.master().unwrap().destination_port(), Some(21));
        let tcp = entry.tcp().unwrap();
        assert_eq!(tcp.state(), Some(TcpState::ESTABLISHED));
        assert_eq!(tcp.window_scale(Direction::Original), Some(7));
        assert_eq!(tcp.window_scale(Direction::Reply), Some(10));
        let flags = TcpFlags::WINDOW_SCALE | TcpFlags::SACK_PERM | TcpFlags::MAXACK_SET;
        assert_eq!(tcp.flags(Direction::Original), Some(flags));
        assert_eq!(tcp.flags(Direction::Reply).unwrap().bits(), 0x0b);
        let counters = entry.counters(Direction::Original).unwrap();
        assert_eq!((counters.packets, counters.bytes), (3, 180));
        assert_eq!(entry.counters(Direction::Reply).unwrap().bytes, 1 << 40);
        let start = Duration::from_nanos(1_700_000_000_123_456_789);
        assert_eq!((entry.start(), entry.stop()), (Some(start), None));
        assert_eq!(entry.helper(), Some(&b"ftp"[..]));
        assert_eq!(entry.security_context(), Some(&b"system_u:object_r:x"[..]));
        assert!(entry.labels().unwrap().iter().eq([1, 127]));
    }
}

/// The first packet of a UDP connection over loopback at INPUT, as two kernels sent it
#[test]
fn an_entry_of_a_real_kernel_is_read() {
    macro_rules! golden {
        ($name:literal) => {
            include_bytes!(concat!("data/conntrack_", $name, ".bin")).as_slice()
        };
    }
    let (entries, ports, ids) = match cfg!(target_endian = "little") {
        true => (
            [golden!("5_10_x86_64_v4"), golden!("5_10_x86_64_v6")],
            [(40595, 39085), (52922, 35230)],
            [0x2584_6714, 0x7390_f264],
        ),
        false => (
            [golden!("6_12_s390x_v4"), golden!("6_12_s390x_v6")],
            [(58777, 32831), (45740, 56396)],
            [0x9b37_1700, 0xa86c_b154],
        ),
    };
    let loopback = ["127.0.0.1", "::1"].map(|address| address.parse::<IpAddr>().unwrap());
    for (((bytes, ports), address), id) in entries.into_iter().zip(ports).zip(loopback).zip(ids) {
        let entry = Conntrack::new(bytes);
        let flow = entry.tuple(Direction::Original).unwrap().flow().unwrap();
        assert_eq!((flow.source(), flow.destination()), (address, address));
        assert_eq!(flow.protocol(), IpProtocol::UDP);
        assert_eq!(flow.ports(), Some(ports));
        let reply = entry.tuple(Direction::Reply).unwrap().flow().unwrap();
        assert_eq!(reply, flow.reversed());
        assert_eq!(entry.id(), Some(id));
        assert_eq!(entry.status(), Some(ConntrackStatus::CONFIRMED));
        assert_eq!(entry.timeout(), Some(Duration::from_secs(30)));
        assert_eq!((entry.mark(), entry.zone()), (Some(0), None));
        assert_eq!(entry.attrs().count(), 6);
        assert!(entry.attrs().all(|attr| attr.is_ok()));
    }
}

#[test]
fn icmp_tuples_have_id_type_and_code() {
    let kinds = [(1, [4, 5, 6]), (58, [7, 8, 9])];
    for (v6, (number, [id, kind, code])) in [false, true].into_iter().zip(kinds) {
        let [source, destination] = addresses(v6);
        let proto = [
            attr(1, &[number]),
            attr(id, &[1, 2]),
            attr(kind, &[8]),
            attr(code, &[3]),
        ];
        let bytes = tuple(1, source, destination, &proto);
        let tuple = Conntrack::new(&bytes).tuple(Direction::Original).unwrap();
        assert_eq!(tuple.icmp_id(), Some(0x0102));
        assert_eq!((tuple.icmp_type(), tuple.icmp_code()), (Some(8), Some(3)));
        assert_eq!(
            (tuple.source_port(), tuple.destination_port()),
            (None, None)
        );
        assert!(tuple.flow().is_some());
    }
}

#[test]
fn a_zone_of_one_direction_is_in_its_tuple() {
    let bytes = nested(2, &[attr(3, &[0, 9])]);
    let entry = Conntrack::new(&bytes);
    assert_eq!(entry.zone(), None);
    assert_eq!(entry.tuple(Direction::Reply).unwrap().zone(), Some(9));
}

#[test]
fn absent_and_short_attributes_are_none() {
    let kinds = [1, 2, 3, 4, 5, 7, 8, 9, 10, 12, 14, 18, 19, 20];
    let short: Vec<u8> = kinds.iter().flat_map(|&kind| attr(kind, &[1])).collect();
    for bytes in [&[][..], &short, &short[..5], &[9, 0, 8, 0, 1]] {
        let entry = Conntrack::new(bytes);
        assert_eq!(
            (entry.id(), entry.mark(), entry.status()),
            (None, None, None)
        );
        assert_eq!((entry.zone(), entry.timeout()), (None, None));
        assert_eq!((entry.start(), entry.stop()), (None, None));
        assert_eq!(entry.helper(), None);
        assert_eq!(entry.security_context(), None);
        assert!(entry.tcp().and_then(|tcp| tcp.state()).is_none());
        for direction in [Direction::Original, Direction::Reply] {
            assert_eq!(entry.counters(direction), None);
            if let Some(tuple) = entry.tuple(direction) {
                assert_eq!((tuple.source(), tuple.protocol()), (None, None));
                assert_eq!((tuple.source_port(), tuple.flow()), (None, None));
            }
        }
    }
}

#[test]
fn states_have_direction_and_relation() {
    let cases = [
        (
            CtState::ESTABLISHED,
            [false, true, false],
            Direction::Original,
            "established",
        ),
        (
            CtState::RELATED,
            [false, false, true],
            Direction::Original,
            "related",
        ),
        (
            CtState::NEW,
            [true, false, false],
            Direction::Original,
            "new",
        ),
        (
            CtState::ESTABLISHED_REPLY,
            [false, true, false],
            Direction::Reply,
            "established, reply",
        ),
        (
            CtState::RELATED_REPLY,
            [false, false, true],
            Direction::Reply,
            "related, reply",
        ),
        (
            CtState(5),
            [true, false, false],
            Direction::Reply,
            "state 5",
        ),
        (CtState(77), [false; 3], Direction::Reply, "state 77"),
    ];
    for (state, [is_new, is_established, is_related], direction, text) in cases {
        assert_eq!(state.is_new(), is_new, "{state}");
        assert_eq!(state.is_established(), is_established, "{state}");
        assert_eq!(state.is_related(), is_related, "{state}");
        assert_eq!(state.direction(), direction, "{state}");
        assert_eq!(state.to_string(), text);
    }
}

#[test]
fn label_numbers_follow_the_kernels_words() {
    // `set_bit` of the kernel on an array of `unsigned long`
    for label in 0..Labels::COUNT {
        let mut words = [0_usize; 16 / size_of::<usize>()];
        words[usize::from(label) / usize::BITS as usize] |= 1 << (u32::from(label) % usize::BITS);
        let wire: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let bytes = attr(22, &wire);
        let labels = Conntrack::new(&bytes).labels().unwrap();
        assert!(labels.iter().eq([label]));
        assert!(labels.contains(label));
        assert_eq!(Labels::empty().with(label), labels);
    }
    assert_eq!(Labels::empty().with(128), Labels::empty());
    assert!(!Labels::from_iter(0..128).contains(128));
}

#[test]
fn short_labels_leave_the_others_unset() {
    let word = 5_usize.to_ne_bytes();
    let bytes = attr(22, &word);
    assert!(Conntrack::new(&bytes).labels().unwrap().iter().eq([0, 2]));
}

/// Encodes a decision and returns the value of its `NFQA_CT`
fn encoded_change(decision: &Decision<'_>) -> Vec<u8> {
    let mut buf = vec![0; decision.max_len()];
    let len = decision
        .encode(&mut buf, 1, 2, RequestHeader::default())
        .unwrap();
    let attrs = nfqnl_proto::Attrs::new(&buf[ATTRS_OFFSET..len]);
    attrs.last(NFQA_CT).unwrap().value.to_vec()
}

#[test]
fn a_ct_mark_is_sent_with_its_mask() {
    let change = encoded_change(&Verdict::Accept.with_ct_mark(0x1234_5678, 0x0000_ffff));
    let be = u32::to_be_bytes;
    // The kernel would toggle bits of the value outside the mask.
    assert_eq!(
        change,
        [attr(8, &be(0x5678)), attr(21, &be(0xffff))].concat()
    );
}

#[test]
fn an_update_writes_what_was_set() -> Result<(), ConntrackUpdateError> {
    let bytes = tcp_entry(false);
    let update = ConntrackUpdate::new(&Conntrack::new(&bytes));
    assert_eq!(encoded_change(&Verdict::Accept.with_conntrack(&update)), []);
    let labels = |labels: &[u8]| labels.iter().copied().collect::<Labels>();
    let update = update
        .mark(5, 7)?
        .labels(labels(&[3, 9]), labels(&[3, 4]))?
        .detach_helper()?
        .status(ConntrackStatus::FIXED_TIMEOUT)?
        .timeout(Duration::from_millis(9999))?;
    let decision = Verdict::Drop.with_conntrack(&update);
    assert_eq!(decision.conntrack(), Some(&update));
    assert_eq!((decision.ct_mark(), decision.raw_conntrack()), (None, None));
    let be = u32::to_be_bytes;
    let expected = [
        attr(7, &be(9)),
        attr(3, &be(0x18e | 1 << 10)),
        nested(5, &[attr(1, b"\0")]),
        attr(22, &labels(&[3]).to_wire()),
        attr(23, &labels(&[3, 4]).to_wire()),
        attr(8, &be(5)),
        attr(21, &be(7)),
    ];
    assert_eq!(encoded_change(&decision), expected.concat());
    Ok(())
}

#[test]
fn changes_that_the_kernel_drops_are_refused() -> Result<(), ConntrackUpdateError> {
    let fixed = attr(3, &0x408_u32.to_be_bytes());
    let update = ConntrackUpdate::new(&Conntrack::new(&fixed));
    let some = Labels::empty().with(1);
    assert_eq!(
        update.mark(1, 1)?.labels(some, some),
        Err(ConntrackUpdateError::LabelsBesideMark)
    );
    assert_eq!(
        update.labels(some, some)?.mark(1, 1),
        Err(ConntrackUpdateError::LabelsBesideMark)
    );
    assert_eq!(
        update.timeout(Duration::from_secs(1)),
        Err(ConntrackUpdateError::FixedTimeout)
    );
    assert_eq!(update.detach_helper(), Err(ConntrackUpdateError::NoHelper));
    let expected = [
        nested(5, &[attr(1, b"ftp\0")]),
        attr(3, &0x201_u32.to_be_bytes()),
    ]
    .concat();
    let update = ConntrackUpdate::new(&Conntrack::new(&expected));
    assert_eq!(update.detach_helper(), Err(ConntrackUpdateError::NoHelper));
    assert_eq!(
        update.timeout(Duration::from_secs(1)),
        Err(ConntrackUpdateError::FixedTimeout)
    );
    let dying = ConntrackStatus::DYING;
    assert_eq!(
        update.status(dying | ConntrackStatus::ASSURED),
        Err(ConntrackUpdateError::Status(dying))
    );
    Ok(())
}

#[test]
fn the_last_change_of_the_entry_counts() {
    let bytes = tcp_entry(false);
    let update = ConntrackUpdate::new(&Conntrack::new(&bytes));
    let decision = Verdict::Accept.with_ct_mark(1, 1).with_conntrack(&update);
    assert_eq!(
        (decision.ct_mark(), decision.conntrack()),
        (None, Some(&update))
    );
    let decision = decision.with_raw_conntrack(b"raw!").with_ct_mark(1, 1);
    assert_eq!(
        (decision.ct_mark(), decision.raw_conntrack()),
        (Some((1, 1)), None)
    );
}

#[test]
fn a_tuple_gives_the_key_of_its_packets() {
    for v6 in [false, true] {
        let bytes = tcp_entry(v6);
        let entry = Conntrack::new(&bytes);
        let original = entry.tuple(Direction::Original).unwrap().flow().unwrap();
        let reply = entry.tuple(Direction::Reply).unwrap().flow().unwrap();
        assert_eq!(original.reversed(), reply);
        let [source, destination] = addresses(v6);
        assert_eq!(
            (original.source(), original.destination()),
            (source, destination)
        );
        assert_eq!(original.protocol(), IpProtocol::TCP);
        assert_eq!(original.ports(), Some((40000, 443)));
    }
}

proptest! {
    #![proptest_config(common::config())]

    #[test]
    fn no_entry_makes_a_getter_panic(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
        let entry = Conntrack::new(&bytes);
        let _ = format!("{entry:?} {:?} {:?}", entry.tcp(), entry.labels());
        let _ = (entry.zone(), entry.timeout(), entry.master(), entry.helper(), entry.start());
        let _ = entry.tuple(Direction::Original).and_then(|tuple| tuple.flow());
        let _ = FlowKey::parse(&bytes);
    }
}
