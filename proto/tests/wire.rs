//! Every byte of the requests, as laid out in `linux/netlink.h` and
//! `linux/netfilter/nfnetlink_queue.h`
//!
//! Lengths, types and numbers are literals here, to check the crate's constants. Netlink's own
//! integers are in host byte order (`20u32`, `0x0302u16`), and the integers of the queue subsystem
//! are big-endian (`[0, 0, 0, 7]`).

mod common;

use common::wire;
use nfqnl_proto::consts::MAX_PAYLOAD;
use nfqnl_proto::{
    ConfigFlags, ConfigRequest, Conntrack, ConntrackUpdate, CopyMode, Decision, EncodeError,
    Family, PlainVerdict, QueueConfig, RequestHeader, UnknownVerdict, Verdict, Vlan, encode_noop,
};

const HEADER: RequestHeader = RequestHeader {
    ack: true,
    seq: 0x0102_0304,
    pid: 0x0506_0708,
};
const QUEUE: u16 = 0x1122;
const ID: u32 = 0x3344_5566;

/// The initial bytes of a buffer: encoders must write padding, and nothing behind the message
const DIRT: u8 = 0xa5;

/// Checks the bytes from an encoder, and its errors for buffers that are too small
#[track_caller]
fn assert_encodes(
    expected: &[u8],
    encode: impl Fn(&mut [u8], RequestHeader) -> Result<usize, EncodeError>,
) {
    let needed = expected.len();
    for had in 0..needed {
        let refused = encode(&mut vec![DIRT; had], HEADER);
        assert_eq!(refused, Err(EncodeError::NoSpace { needed, had }));
    }
    let mut exact = vec![DIRT; needed];
    assert_eq!(encode(&mut exact, HEADER), Ok(needed));
    assert_eq!(exact, expected);

    let mut roomy = vec![DIRT; needed + 8];
    assert_eq!(encode(&mut roomy, HEADER), Ok(needed));
    let (message, behind) = roomy.split_at(needed);
    assert_eq!(message, expected);
    assert!(
        behind.iter().all(|&byte| byte == DIRT),
        "wrote behind the message"
    );
}

#[track_caller]
fn assert_config(request: ConfigRequest, expected: &[u8]) {
    assert_encodes(expected, |buf, header| request.encode(buf, header));
}

#[track_caller]
fn assert_decision(decision: Decision<'_>, expected: &[u8]) {
    assert_encodes(expected, |buf, header| {
        decision.encode(buf, QUEUE, ID, header)
    });
    assert!(decision.max_len() >= expected.len());
}

/// Checks both messages of a plain verdict, which differ only in the type
#[track_caller]
fn assert_plain(plain: PlainVerdict, expected: &[u8]) {
    assert_encodes(expected, |buf, header| plain.encode(buf, QUEUE, ID, header));
    let mut batch = expected.to_vec();
    batch[4..6].copy_from_slice(&0x0303u16.to_ne_bytes());
    assert_encodes(&batch, |buf, header| {
        plain.encode_batch(buf, QUEUE, ID, header)
    });
    assert!(PlainVerdict::MAX_LEN >= expected.len());
}

/// The netlink header of a request with [`HEADER`]
fn nlmsghdr(len: u32, kind: u16) -> Vec<u8> {
    wire![len, kind, 0x0005u16, 0x0102_0304u32, 0x0506_0708u32]
}

/// `struct nlattr`
fn nla(len: u16, kind: u16) -> Vec<u8> {
    wire![len, kind]
}

/// `nlmsghdr` and `nfgenmsg` of a CONFIG message about [`QUEUE`]
fn config(len: u32) -> Vec<u8> {
    wire![nlmsghdr(len, 0x0302), [0, 0, 0x11, 0x22]]
}

/// `nlmsghdr`, `nfgenmsg` and `NFQA_VERDICT_HDR` of a VERDICT on [`ID`]
fn verdict(len: u32, verdict: [u8; 4]) -> Vec<u8> {
    wire![
        nlmsghdr(len, 0x0301),
        [0, 0, 0x11, 0x22],
        nla(12, 2),
        verdict,
        [0x33, 0x44, 0x55, 0x66],
    ]
}

#[test]
fn noop() {
    assert_encodes(&nlmsghdr(16, 1), encode_noop);
}

#[test]
fn request_without_ack() {
    let header = RequestHeader {
        ack: false,
        ..HEADER
    };
    let expected = wire![16u32, 1u16, 0x0001u16, 0x0102_0304u32, 0x0506_0708u32];
    assert_encodes(&expected, |buf, _| encode_noop(buf, header));
}

#[test]
fn bind() {
    assert_config(
        ConfigRequest::bind(QUEUE, QueueConfig::new()),
        &wire![config(28), nla(8, 1), [1, 0, 0, 0]],
    );
}

#[test]
fn unbind() {
    assert_config(
        ConfigRequest::unbind(QUEUE),
        &wire![config(28), nla(8, 1), [2, 0, 0, 0]],
    );
}

#[test]
fn bind_pf() {
    assert_config(
        ConfigRequest::bind_pf(Family::INET6),
        &wire![nlmsghdr(28, 0x0302), [0, 0, 0, 0], nla(8, 1), [3, 0, 0, 10]],
    );
}

#[test]
fn unbind_pf() {
    assert_config(
        ConfigRequest::unbind_pf(Family::INET),
        &wire![nlmsghdr(28, 0x0302), [0, 0, 0, 0], nla(8, 1), [4, 0, 0, 2]],
    );
}

#[test]
fn copy_modes() {
    for (mode, raw, name) in [
        (CopyMode::None, 0, "none"),
        (CopyMode::Meta, 1, "meta"),
        (CopyMode::Packet, 2, "packet"),
    ] {
        assert_config(
            ConfigRequest::update(QUEUE, QueueConfig::new().copy_mode(mode, 0x0001_0203)),
            &wire![config(29), nla(9, 2), [0, 1, 2, 3], [raw]],
        );
        assert_eq!(mode.to_raw(), raw);
        assert_eq!(CopyMode::from_raw(raw), Some(mode));
        assert_eq!(mode.to_string(), name);
    }
    for unknown in 3..=u8::MAX {
        assert_eq!(CopyMode::from_raw(unknown), None);
    }
}

#[test]
fn maxlen() {
    assert_config(
        ConfigRequest::update(QUEUE, QueueConfig::new().maxlen(0x0a0b_0c0d)),
        &wire![config(28), nla(8, 3), [0x0a, 0x0b, 0x0c, 0x0d]],
    );
}

#[test]
fn mask_and_flags() {
    let cases = [
        (ConfigFlags::FAIL_OPEN, 0x01),
        (ConfigFlags::CONNTRACK, 0x02),
        (ConfigFlags::GSO, 0x04),
        (ConfigFlags::UID_GID, 0x08),
        (ConfigFlags::SECCTX, 0x10),
    ];
    for (flag, raw) in cases {
        assert_config(
            ConfigRequest::update(QUEUE, QueueConfig::new().flags(ConfigFlags::all(), flag)),
            &wire![
                config(36),
                nla(8, 4),
                [0xff, 0xff, 0xff, 0xff],
                nla(8, 5),
                [0, 0, 0, raw],
            ],
        );
    }
}

/// The kernel refuses an unknown flag even outside the mask, so those are not sent
#[test]
fn flags_outside_the_mask_are_left_out() {
    let settings = QueueConfig::new().flags(ConfigFlags::GSO, ConfigFlags::all());
    assert_eq!(
        settings.get_flags(),
        Some((ConfigFlags::GSO, ConfigFlags::GSO))
    );
    assert_config(
        ConfigRequest::update(QUEUE, settings),
        &wire![config(36), nla(8, 4), [0, 0, 0, 4], nla(8, 5), [0, 0, 0, 4]],
    );
}

#[test]
fn flags_of_several_calls_add_up() {
    let (gso, open, uid) = (
        ConfigFlags::GSO,
        ConfigFlags::FAIL_OPEN,
        ConfigFlags::UID_GID,
    );
    let off = ConfigFlags::empty();
    let none = QueueConfig::new();
    for (settings, mask, on) in [
        (none.enable(gso), gso, gso),
        (none.enable(gso | open), gso | open, gso | open),
        (none.enable(gso).enable(open), gso | open, gso | open),
        (none.enable(gso).enable(gso), gso, gso),
        (none.enable(gso).flags(open, off), gso | open, gso),
        (none.enable(gso).flags(gso, off), gso, off),
        (none.flags(gso, off).enable(gso), gso, gso),
        (
            none.flags(gso | open, open).flags(open | uid, uid),
            gso | open | uid,
            uid,
        ),
        (none.enable(off), off, off),
    ] {
        assert_eq!(settings.get_flags(), Some((mask, on)));
        assert_eq!(settings.get_optional_flags(), off);
    }
}

#[test]
fn optional_flags_are_not_sent() {
    let (gso, secctx) = (ConfigFlags::GSO, ConfigFlags::SECCTX);
    let settings = QueueConfig::new().enable_if_supported(gso);
    assert_eq!(settings.get_flags(), None);
    assert_eq!(settings.get_optional_flags(), gso);
    assert_config(
        ConfigRequest::bind(QUEUE, settings),
        &wire![config(28), nla(8, 1), [1, 0, 0, 0]],
    );

    let more = settings.enable_if_supported(secctx);
    assert_eq!(more.get_optional_flags(), gso | secctx);
    let asked = more.enable(more.get_optional_flags());
    assert_eq!(asked.get_flags(), Some((gso | secctx, gso | secctx)));
    assert_eq!(asked.get_optional_flags(), ConfigFlags::empty());
}

#[test]
fn last_call_decides_if_a_flag_is_optional() {
    let (gso, open) = (ConfigFlags::GSO, ConfigFlags::FAIL_OPEN);
    let off = ConfigFlags::empty();
    let optional = QueueConfig::new().enable_if_supported(gso | open);
    for (settings, named, rest) in [
        (optional.enable(gso), (gso, gso), open),
        (optional.flags(gso, off), (gso, off), open),
        (
            QueueConfig::new()
                .enable(gso | open)
                .enable_if_supported(gso),
            (open, open),
            gso,
        ),
        (
            QueueConfig::new().flags(gso, off).enable_if_supported(gso),
            (off, off),
            gso,
        ),
    ] {
        assert_eq!(settings.get_flags(), Some(named));
        assert_eq!(settings.get_optional_flags(), rest);
    }
}

#[test]
fn everything_in_one_config() {
    let settings = QueueConfig::new()
        .copy_mode(CopyMode::Packet, 0xffff)
        .maxlen(4096)
        .flags(ConfigFlags::GSO | ConfigFlags::FAIL_OPEN, ConfigFlags::GSO);
    let request = ConfigRequest::bind(QUEUE, settings);
    let expected = wire![
        config(64),
        nla(8, 1),
        [1, 0, 0, 0],
        nla(9, 2),
        [0, 0, 0xff, 0xff],
        [2, 0, 0, 0], // copy mode and padding
        nla(8, 3),
        [0, 0, 0x10, 0],
        nla(8, 4),
        [0, 0, 0, 5],
        nla(8, 5),
        [0, 0, 0, 4],
    ];
    assert_config(request, &expected);
    assert_eq!(expected.len(), ConfigRequest::MAX_LEN);
}

/// A setting of 0 or "off" is still named
#[test]
fn getters_of_a_config() {
    let none = QueueConfig::new();
    assert_eq!(
        (none.get_copy_mode(), none.get_maxlen(), none.get_flags()),
        (None, None, None)
    );
    let copy = none.copy_mode(CopyMode::Meta, 0x0001_0203);
    assert_eq!(
        (copy.get_copy_mode(), copy.get_maxlen(), copy.get_flags()),
        (Some((CopyMode::Meta, 0x0001_0203)), None, None)
    );
    let maxlen = none.maxlen(0);
    assert_eq!(
        (
            maxlen.get_copy_mode(),
            maxlen.get_maxlen(),
            maxlen.get_flags()
        ),
        (None, Some(0), None)
    );
    let (mask, off) = (ConfigFlags::GSO | ConfigFlags::SECCTX, ConfigFlags::empty());
    let flags = none.flags(mask, off);
    assert_eq!(
        (flags.get_copy_mode(), flags.get_maxlen(), flags.get_flags()),
        (None, None, Some((mask, off)))
    );
    let later = copy.copy_mode(CopyMode::None, 5).maxlen(6).maxlen(7);
    assert_eq!(
        (later.get_copy_mode(), later.get_maxlen()),
        (Some((CopyMode::None, 5)), Some(7)),
        "the last one counts"
    );
}

#[test]
fn every_verdict() {
    let cases = [
        (Verdict::Drop, [0, 0, 0, 0]),
        (Verdict::Accept, [0, 0, 0, 1]),
        (Verdict::Stolen, [0, 0, 0, 2]),
        (
            Verdict::Queue {
                num: 0x0708,
                bypass: false,
            },
            [7, 8, 0, 3],
        ),
        (
            Verdict::Queue {
                num: 0x0708,
                bypass: true,
            },
            [7, 8, 0x80, 3],
        ),
        (Verdict::Repeat, [0, 0, 0, 4]),
        (Verdict::Stop, [0, 0, 0, 5]),
    ];
    for (kind, raw) in cases {
        assert_decision(kind.into(), &verdict(32, raw));

        let number = u32::from_be_bytes(raw);
        assert_eq!(kind.to_raw(), number);
        assert_eq!(u32::from(kind), number);
        assert_eq!(Verdict::try_from(number), Ok(kind));
    }
}

/// The kernel takes only the low 8 bits as the verdict, but an ACCEPT with other bits acts as STOP
#[test]
fn verdict_with_stray_bits_is_refused() {
    const BYPASS: u32 = 1 << 15;
    let plain = [
        Verdict::Drop,
        Verdict::Accept,
        Verdict::Stolen,
        Verdict::Repeat,
        Verdict::Stop,
    ];
    let stray = plain.map(|verdict| (verdict, 8..u32::BITS));
    let queue = Verdict::Queue {
        num: 0,
        bypass: false,
    };
    for (verdict, bits) in stray
        .into_iter()
        .chain([(queue, 8..BYPASS.trailing_zeros())])
    {
        for bit in bits {
            let raw = verdict.to_raw() | 1 << bit;
            assert_eq!(Verdict::try_from(raw), Err(UnknownVerdict(raw)));
        }
    }
    for raw in Verdict::Stop.to_raw() + 1..=u32::from(u8::MAX) {
        assert_eq!(Verdict::try_from(raw), Err(UnknownVerdict(raw)));
    }
}

#[test]
fn verdict_with_mark() {
    assert_decision(
        Verdict::Accept.with_mark(0xdead_beef),
        &wire![
            verdict(40, [0, 0, 0, 1]),
            nla(8, 3),
            [0xde, 0xad, 0xbe, 0xef]
        ],
    );
}

#[test]
fn verdict_with_priority() {
    assert_decision(
        Decision::new(Verdict::Accept).with_priority(0x0001_0002),
        &wire![verdict(40, [0, 0, 0, 1]), nla(8, 21), [0, 1, 0, 2]],
    );
}

/// A mark of 0 clears the mark
#[test]
fn zero_is_sent() {
    assert_decision(
        Verdict::Accept.with_mark(0).with_priority(0),
        &wire![
            verdict(48, [0, 0, 0, 1]),
            nla(8, 3),
            [0; 4],
            nla(8, 21),
            [0; 4]
        ],
    );
}

/// The lengths exclude padding, because the kernel would take it as a part of the packet
#[test]
fn verdict_with_payload_of_any_length() {
    for len in 0..=5u16 {
        let payload: Vec<u8> = (1..).take(usize::from(len)).collect();
        assert_decision(
            Verdict::Accept.with_payload(&payload),
            &wire![
                verdict(36 + u32::from(len), [0, 0, 0, 1]),
                nla(4 + len, 10),
                payload
            ],
        );
    }
}

#[test]
fn verdict_with_vlan() {
    assert_decision(
        Decision::new(Verdict::Accept).with_vlan(Vlan {
            proto: 0x88a8,
            tci: 0x0456,
        }),
        &wire![
            verdict(52, [0, 0, 0, 1]),
            nla(20, 0x8000 | 19),
            nla(6, 1),
            [0x88, 0xa8, 0, 0], // protocol and padding
            nla(6, 2),
            [0x04, 0x56, 0, 0],
        ],
    );
}

#[test]
fn verdict_with_l2_header() {
    let header = *b"to MACfrMAC_\x08\x00";
    assert_decision(
        Decision::new(Verdict::Accept).with_l2_header(&header),
        &wire![verdict(50, [0, 0, 0, 1]), nla(18, 20), header],
    );
}

/// The encoder copies the nested bytes unchanged
#[test]
fn verdict_with_conntrack_and_expectation() {
    let (conntrack, expectation) = ([1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 12]);
    assert_decision(
        Decision::new(Verdict::Accept)
            .with_raw_conntrack(&conntrack)
            .with_expectation(&expectation),
        &wire![
            verdict(52, [0, 0, 0, 1]),
            nla(12, 0x8000 | 11),
            conntrack,
            nla(8, 0x8000 | 15),
            expectation,
        ],
    );
}

/// Every attribute at once, with padding behind odd lengths
#[test]
fn everything_in_one_verdict() {
    let decision = Verdict::Repeat
        .with_mark(1)
        .with_priority(2)
        .with_vlan(Vlan {
            proto: 0x8100,
            tci: 0xa123,
        })
        .with_l2_header(&[3; 5])
        .with_raw_conntrack(&[4; 6])
        .with_expectation(&[5; 7])
        .with_payload(&[6; 1]);
    let expected = wire![
        verdict(109, [0, 0, 0, 4]),
        nla(8, 3),
        [0, 0, 0, 1],
        nla(8, 21),
        [0, 0, 0, 2],
        nla(20, 0x8000 | 19),
        nla(6, 1),
        [0x81, 0, 0, 0],
        nla(6, 2),
        [0xa1, 0x23, 0, 0],
        nla(9, 20),
        [3, 3, 3, 3, 3, 0, 0, 0],
        nla(10, 0x8000 | 11),
        [4, 4, 4, 4, 4, 4, 0, 0],
        nla(11, 0x8000 | 15),
        [5, 5, 5, 5, 5, 5, 5, 0],
        nla(5, 10),
        [6],
    ];
    assert_decision(decision, &expected);
}

#[test]
fn plain_verdicts() {
    let drop = PlainVerdict::new(Verdict::Drop);
    assert_eq!(drop, Verdict::Drop.into());
    assert_plain(drop, &verdict(32, [0, 0, 0, 0]));
    assert_plain(
        drop.with_mark(7),
        &wire![verdict(40, [0, 0, 0, 0]), nla(8, 3), [0, 0, 0, 7]],
    );
    assert_plain(
        drop.with_priority(8),
        &wire![verdict(40, [0, 0, 0, 0]), nla(8, 21), [0, 0, 0, 8]],
    );
    let longest = wire![
        verdict(48, [0, 0, 0, 1]),
        nla(8, 3),
        [0, 0, 0, 7],
        nla(8, 21),
        [0, 0, 0, 8]
    ];
    assert_plain(
        PlainVerdict::new(Verdict::Accept)
            .with_mark(7)
            .with_priority(8),
        &longest,
    );
    assert_eq!(longest.len(), PlainVerdict::MAX_LEN);
}

#[test]
fn plain_decisions() {
    let accept = Decision::new(Verdict::Accept);
    assert_eq!(accept.as_plain(), Some(Verdict::Accept.into()));
    let plain = PlainVerdict::new(Verdict::Accept)
        .with_mark(0)
        .with_priority(1);
    let decision = accept.with_mark(0).with_priority(1);
    assert_eq!(decision.as_plain(), Some(plain));
    let vlan = Vlan { proto: 1, tci: 2 };
    for more in [
        decision.with_vlan(vlan),
        decision.with_l2_header(b""),
        decision.with_raw_conntrack(b""),
        decision.with_expectation(b""),
        decision.with_payload(b""),
    ] {
        assert_eq!(more.as_plain(), None);
    }
}

#[test]
fn getters_of_a_decision() {
    let none = Decision::from(Verdict::Stop);
    assert_eq!(none.verdict(), Verdict::Stop);
    assert_eq!(
        (none.mark(), none.priority(), none.vlan()),
        (None, None, None)
    );
    assert_eq!((none.l2_header(), none.payload()), (None, None));
    assert_eq!((none.raw_conntrack(), none.expectation()), (None, None));

    let vlan = Vlan { proto: 3, tci: 4 };
    let all = none
        .with_mark(1)
        .with_priority(2)
        .with_vlan(vlan)
        .with_l2_header(b"header")
        .with_raw_conntrack(b"conntrack")
        .with_expectation(b"expectation")
        .with_payload(b"payload");
    assert_eq!(all.verdict(), Verdict::Stop);
    assert_eq!((all.mark(), all.priority()), (Some(1), Some(2)));
    assert_eq!(all.vlan(), Some(vlan));
    assert_eq!(all.l2_header(), Some(&b"header"[..]));
    assert_eq!(all.raw_conntrack(), Some(&b"conntrack"[..]));
    assert_eq!(all.expectation(), Some(&b"expectation"[..]));
    assert_eq!(all.payload(), Some(&b"payload"[..]));
}

#[test]
fn decisions_from_a_verdict() {
    let (verdict, decision) = (Verdict::Repeat, Decision::new(Verdict::Repeat));
    assert_eq!(Decision::from(verdict), decision);
    assert_eq!(verdict.with_mark(1), decision.with_mark(1));
    assert_eq!(verdict.with_priority(2), decision.with_priority(2));
    let bytes = b"bytes";
    assert_eq!(verdict.with_ct_mark(1, 2), decision.with_ct_mark(1, 2));
    let update = ConntrackUpdate::new(&Conntrack::new(b""));
    assert_eq!(
        verdict.with_conntrack(&update),
        decision.with_conntrack(&update)
    );
    assert_eq!(verdict.with_payload(bytes), decision.with_payload(bytes));
}

#[test]
fn names_of_verdicts() {
    let queue = |bypass| Verdict::Queue { num: 3, bypass };
    for (verdict, name) in [
        (Verdict::Accept, "accept"),
        (Verdict::Drop, "drop"),
        (Verdict::Stolen, "stolen"),
        (queue(false), "queue 3"),
        (queue(true), "queue 3 or bypass"),
        (Verdict::Repeat, "repeat"),
        (Verdict::Stop, "stop"),
    ] {
        assert_eq!(verdict.to_string(), name);
    }
    assert_eq!(format!("[{:>7}]", Verdict::Drop), "[   drop]");
    assert_eq!(
        UnknownVerdict(0x0102_0304).to_string(),
        "0x01020304 is not a verdict"
    );
}

type Attach<'p> = fn(Decision<'p>, &'p [u8]) -> Decision<'p>;

/// The attributes of any length
fn raw_attributes<'p>() -> [(u16, Attach<'p>); 4] {
    [
        (10, Decision::with_payload),
        (11, Decision::with_raw_conntrack),
        (15, Decision::with_expectation),
        (20, Decision::with_l2_header),
    ]
}

#[test]
fn longest_value_is_sent() {
    let value = vec![0x5a; 65531];
    assert_eq!(value.len(), MAX_PAYLOAD);
    for (kind, attach) in raw_attributes() {
        let decision = attach(Decision::new(Verdict::Accept), &value);
        let mut buf = vec![DIRT; decision.max_len()];
        let len = decision.encode(&mut buf, QUEUE, ID, HEADER).unwrap();
        assert_eq!(len, 32 + 65535);
        assert_eq!(buf[..32], verdict(32 + 65535, [0, 0, 0, 1]));
        assert_eq!(buf[32..34], 65535u16.to_ne_bytes());
        let nested = if matches!(kind, 11 | 15) { 0x8000 } else { 0 };
        assert_eq!(buf[34..36], (kind | nested).to_ne_bytes());
        assert_eq!(buf[36..len], value);
    }
}

#[test]
fn value_over_the_limit_is_refused_first() {
    let value = vec![0x5a; 65532];
    for (kind, attach) in raw_attributes() {
        let decision = attach(Decision::new(Verdict::Accept), &value);
        let error = EncodeError::AttributeTooLong {
            kind,
            had: 65532,
            max: 65531,
        };
        let mut roomy = vec![DIRT; decision.max_len()];
        for room in [0, roomy.len()] {
            let buf = &mut roomy[..room];
            assert_eq!(decision.encode(buf, QUEUE, ID, HEADER), Err(error));
            assert!(
                buf.iter().all(|&byte| byte == DIRT),
                "the buffer was written to"
            );
        }
    }
}
