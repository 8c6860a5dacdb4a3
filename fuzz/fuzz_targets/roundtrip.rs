//! Any request: reads every encoded message again, and checks the errors for short buffers
#![no_main]

use std::borrow::Cow;
use std::fmt::{self, Write};

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use nfqnl_proto::{
    Attrs, ConfigFlags, ConfigRequest, CopyMode, Decision, EncodeError, Family, Message, Messages,
    PlainVerdict, QueueConfig, RequestHeader, UnknownVerdict, Verdict, Vlan, encode_noop,
};

/// Attribute: number, flag for nested attributes, value
type Attribute<'v> = (u16, bool, Cow<'v, [u8]>);

/// The maximum length of a value, because the 16-bit length includes the header
const MAX: usize = 65_531;

/// The initial bytes of a buffer
const UNTOUCHED: u8 = 0xa5;

/// More of these bytes than in any buffer
static ALL_UNTOUCHED: [u8; 1 << 19] = [UNTOUCHED; 1 << 19];

fn is_untouched(bytes: &[u8]) -> bool {
    bytes == &ALL_UNTOUCHED[..bytes.len()]
}

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    queue: u16,
    ack: bool,
    seq: u32,
    pid: u32,
    request: Request<'a>,
    /// The length of a buffer, perhaps too short
    room: u16,
}

#[derive(Arbitrary, Debug)]
enum Request<'a> {
    Verdict {
        id: u32,
        verdict: AnyVerdict,
        mark: Option<u32>,
        priority: Option<u32>,
        vlan: Option<(u16, u16)>,
        l2_header: Option<Value<'a>>,
        conntrack: Option<Value<'a>>,
        expectation: Option<Value<'a>>,
        payload: Option<Value<'a>>,
    },
    Config {
        command: Command,
        copy: Option<(u8, u32)>,
        maxlen: Option<u32>,
        flags: Option<(u32, u32)>,
    },
    Noop,
    Number(u32),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Command {
    Bind,
    Unbind,
    BindPf(u8),
    UnbindPf(u8),
    Update,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum AnyVerdict {
    Drop,
    Accept,
    Stolen,
    Queue(u16, bool),
    Repeat,
    Stop,
}

impl AnyVerdict {
    fn verdict(self) -> Verdict {
        match self {
            Self::Drop => Verdict::Drop,
            Self::Accept => Verdict::Accept,
            Self::Stolen => Verdict::Stolen,
            Self::Queue(num, bypass) => Verdict::Queue { num, bypass },
            Self::Repeat => Verdict::Repeat,
            Self::Stop => Verdict::Stop,
        }
    }

    /// The number in `linux/netfilter.h`
    fn number(self) -> u32 {
        match self {
            Self::Drop => 0,
            Self::Accept => 1,
            Self::Stolen => 2,
            Self::Queue(num, bypass) => u32::from(num) << 16 | u32::from(bypass) << 15 | 3,
            Self::Repeat => 4,
            Self::Stop => 5,
        }
    }
}

/// Bytes, in a few cases of about the maximum length
#[derive(Clone, Debug)]
enum Value<'a> {
    Short(&'a [u8]),
    Long(Vec<u8>),
}

impl<'a> Arbitrary<'a> for Value<'a> {
    fn arbitrary(bytes: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        if bytes.ratio(1, 32)? {
            let len = bytes.int_in_range(MAX - 8..=MAX + 8)?;
            return Ok(Self::Long(vec![bytes.arbitrary()?; len]));
        }
        Ok(Self::Short(bytes.arbitrary()?))
    }
}

impl Value<'_> {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Short(bytes) => bytes,
            Self::Long(bytes) => bytes,
        }
    }
}

fuzz_target!(|input: Input<'_>| {
    let Input {
        queue,
        ack,
        seq,
        pid,
        ref request,
        room,
    } = input;
    let header = RequestHeader { ack, seq, pid };
    let check = |kind: u16, attrs: Option<Vec<Attribute<'_>>>, most, encode: &Encode<'_>| {
        let on = match kind {
            NOOP => None,
            _ => Some(queue),
        };
        check(kind, header, on, attrs, most, room.into(), encode)
    };
    match *request {
        Request::Verdict {
            id,
            verdict,
            mark,
            priority,
            vlan,
            ref l2_header,
            ref conntrack,
            ref expectation,
            ref payload,
        } => {
            let mut plain = PlainVerdict::new(verdict.verdict());
            let mut decision = Decision::new(verdict.verdict());
            let mut attrs = vec![(
                2,
                false,
                [verdict.number(), id].map(u32::to_be_bytes).concat().into(),
            )];
            if let Some(mark) = mark {
                plain = plain.with_mark(mark);
                decision = decision.with_mark(mark);
                attrs.push((3, false, mark.to_be_bytes().to_vec().into()));
            }
            if let Some(priority) = priority {
                plain = plain.with_priority(priority);
                decision = decision.with_priority(priority);
                attrs.push((21, false, priority.to_be_bytes().to_vec().into()));
            }
            assert_eq!(decision.as_plain(), Some(plain));
            let most = PlainVerdict::MAX_LEN;
            let batch = |buf: &mut [u8]| plain.encode_batch(buf, queue, id, header);
            let single = |buf: &mut [u8]| plain.encode(buf, queue, id, header);
            let small = |buf: &mut [u8]| decision.encode(buf, queue, id, header);
            check(VERDICT_BATCH, Some(attrs.clone()), most, &batch);
            check(VERDICT, Some(attrs.clone()), most, &single);
            check(VERDICT, Some(attrs.clone()), Decision::SMALL_LEN, &small);

            if let Some((proto, tci)) = vlan {
                decision = decision.with_vlan(Vlan { proto, tci });
                let half = |kind: u16, value: u16| {
                    let header = [6_u16.to_ne_bytes(), kind.to_ne_bytes()].concat();
                    [&header[..], &value.to_be_bytes(), &[0; 2]].concat()
                };
                attrs.push((19, true, [half(1, proto), half(2, tci)].concat().into()));
            }
            let is_long = |value: &Value<'_>| value.bytes().len() > MAX;
            let raw = [
                (20, l2_header),
                (11, conntrack),
                (15, expectation),
                (10, payload),
            ];
            let too_long = raw
                .iter()
                .find(|(_, value)| value.as_ref().is_some_and(is_long));
            for (kind, value) in raw {
                let Some(bytes) = value.as_ref().map(Value::bytes) else {
                    continue;
                };
                decision = match kind {
                    20 => decision.with_l2_header(bytes),
                    11 => decision.with_raw_conntrack(bytes),
                    15 => decision.with_expectation(bytes),
                    _ => decision.with_payload(bytes),
                };
                attrs.push((kind, [11, 15].contains(&kind), bytes.into()));
            }
            let is_plain = vlan.is_none() && raw.iter().all(|(_, value)| value.is_none());
            assert_eq!(decision.as_plain().is_some(), is_plain);
            assert_eq!(decision.verdict(), verdict.verdict());
            assert_eq!((decision.mark(), decision.priority()), (mark, priority));
            assert_eq!(
                decision.vlan(),
                vlan.map(|(proto, tci)| Vlan { proto, tci })
            );
            let getters = [
                decision.l2_header(),
                decision.raw_conntrack(),
                decision.expectation(),
                decision.payload(),
            ];
            assert_eq!(
                getters,
                raw.map(|(_, value)| value.as_ref().map(Value::bytes))
            );
            write!(Nowhere, "{} {decision:?}", decision.verdict()).expect("it has an end");
            let any = |buf: &mut [u8]| decision.encode(buf, queue, id, header);
            let Some((kind, value)) = too_long else {
                return check(VERDICT, Some(attrs), decision.max_len(), &any);
            };
            let mut buf = vec![UNTOUCHED; decision.max_len()];
            let error = EncodeError::AttributeTooLong {
                kind: *kind,
                had: value.as_ref().map_or(0, |value| value.bytes().len()),
                max: MAX,
            };
            assert_eq!(any(&mut buf), Err(error));
            assert_eq!(
                any(&mut []),
                Err(error),
                "reported first, for any length of the buffer"
            );
            assert!(is_untouched(&buf));
        }
        Request::Config {
            command,
            copy,
            maxlen,
            flags,
        } => {
            let mut config = QueueConfig::new();
            let mut attrs = Vec::new();
            let copy = copy.map(|(mode, range)| (mode % 3, range));
            if let Some((mode, range)) = copy {
                config = config.copy_mode(copy_mode(mode), range);
                attrs.push((
                    2,
                    false,
                    [&range.to_be_bytes()[..], &[mode]].concat().into(),
                ));
            }
            if let Some(maxlen) = maxlen {
                config = config.maxlen(maxlen);
                attrs.push((3, false, maxlen.to_be_bytes().to_vec().into()));
            }
            if let Some((mask, flags)) = flags {
                let flags_of = ConfigFlags::from_bits_retain;
                config = config.flags(flags_of(mask), flags_of(flags));
                attrs.push((4, false, mask.to_be_bytes().to_vec().into()));
                attrs.push((5, false, (flags & mask).to_be_bytes().to_vec().into()));
            }
            assert_eq!(
                config.get_copy_mode(),
                copy.map(|(mode, range)| (copy_mode(mode), range))
            );
            assert_eq!(config.get_maxlen(), maxlen);
            let bits = config
                .get_flags()
                .map(|(mask, flags)| (mask.bits(), flags.bits()));
            assert_eq!(bits, flags.map(|(mask, flags)| (mask, flags & mask)));
            assert_eq!(config.get_optional_flags(), ConfigFlags::empty());
            let cmd = |number, family| (1, false, vec![number, 0, 0, family].into());
            let (request, cmd, on) = match command {
                Command::Bind => (ConfigRequest::bind(queue, config), Some(cmd(1, 0)), queue),
                Command::Unbind => (ConfigRequest::unbind(queue), Some(cmd(2, 0)), queue),
                Command::BindPf(family) => (
                    ConfigRequest::bind_pf(Family(family)),
                    Some(cmd(3, family)),
                    0,
                ),
                Command::UnbindPf(family) => (
                    ConfigRequest::unbind_pf(Family(family)),
                    Some(cmd(4, family)),
                    0,
                ),
                Command::Update => (ConfigRequest::update(queue, config), None, queue),
            };
            if !matches!(command, Command::Bind | Command::Update) {
                attrs.clear();
            }
            attrs.extend(cmd);
            let encode = |buf: &mut [u8]| request.encode(buf, header);
            let most = ConfigRequest::MAX_LEN;
            self::check(
                CONFIG,
                header,
                Some(on),
                Some(attrs),
                most,
                room.into(),
                &encode,
            );
        }
        Request::Noop => check(NOOP, None, 16, &|buf| encode_noop(buf, header)),
        Request::Number(raw) => {
            let known = match raw & 0xff {
                3 => raw & 0x7f00 == 0,
                0..=5 => raw <= 5,
                _ => false,
            };
            match Verdict::try_from(raw) {
                Ok(verdict) => {
                    assert!(known);
                    assert_eq!((verdict.to_raw(), u32::from(verdict)), (raw, raw));
                }
                Err(UnknownVerdict(number)) => assert!(!known && number == raw),
            }
        }
    }
});

/// The mode with a number below 3
fn copy_mode(raw: u8) -> CopyMode {
    let mode = CopyMode::from_raw(raw).expect("a known number");
    assert_eq!(mode.to_raw(), raw);
    mode
}

/// Discards text
struct Nowhere;

impl Write for Nowhere {
    fn write_str(&mut self, _: &str) -> fmt::Result {
        Ok(())
    }
}

type Encode<'e> = dyn Fn(&mut [u8]) -> Result<usize, EncodeError> + 'e;

const VERDICT: u16 = 0x0301;
const CONFIG: u16 = 0x0302;
const VERDICT_BATCH: u16 = 0x0303;
const NOOP: u16 = 1;

/// Encodes a message into buffers of several lengths, and reads it again
///
/// The crate documents the size `most` as sufficient. A buffer of `room` bytes may be too short.
fn check(
    kind: u16,
    header: RequestHeader,
    queue: Option<u16>,
    attrs: Option<Vec<Attribute<'_>>>,
    most: usize,
    room: usize,
    encode: &Encode<'_>,
) {
    let mut buf = vec![UNTOUCHED; most];
    let len = encode(&mut buf).expect("enough room");
    assert!(is_untouched(&buf[len..]));
    buf.truncate(len);
    let mut again = vec![UNTOUCHED; len];
    assert_eq!(encode(&mut again), Ok(len), "a buffer of the exact length");
    assert_eq!(buf, again);
    for had in [0, 1, 15, 16, 20, room % len, len - 1] {
        if had < len {
            let error = EncodeError::NoSpace { needed: len, had };
            assert_eq!(encode(&mut again[..had]), Err(error));
        }
    }
    read_again(&buf, kind, header, queue, attrs);
}

/// Reads a message with the crate's parsers
fn read_again(
    message: &[u8],
    kind: u16,
    header: RequestHeader,
    queue: Option<u16>,
    attrs: Option<Vec<Attribute<'_>>>,
) {
    let number = |at: usize| u32::from_ne_bytes(*message[at..].first_chunk().expect("a header"));
    assert_eq!(number(0) as usize, message.len());
    assert_eq!([number(8), number(12)], [header.seq, header.pid]);
    let flags = 1 | if header.ack { 4 } else { 0 };
    let mut messages = Messages::new(message);
    let body = match messages.next() {
        Some(Ok(Message::Other(other))) => {
            assert_eq!((other.message_type, other.flags), (kind, flags));
            other.body
        }
        Some(Ok(Message::Noop)) => {
            assert_eq!(kind, NOOP);
            assert_eq!(message[6..8], flags.to_ne_bytes());
            &[]
        }
        other => panic!("{other:?}"),
    };
    assert!(messages.next().is_none());
    let Some(queue) = queue else {
        return assert!(body.is_empty());
    };
    let [high, low] = queue.to_be_bytes();
    let (family, rest) = body.split_at(4);
    assert_eq!(family, [0, 0, high, low]);
    let mut found: Vec<Attribute<'_>> = Attrs::new(rest)
        .map(|attr| {
            let attr = attr.expect("whole attributes");
            let flags = u16::from_ne_bytes([rest[attr.offset + 2], rest[attr.offset + 3]]) & 0xc000;
            assert!([0, 0x8000].contains(&flags));
            (attr.kind, flags != 0, attr.value.into())
        })
        .collect();
    let mut expected = attrs.expect("a message with attributes");
    found.sort();
    expected.sort();
    assert!(found == expected, "{found:?} is not {expected:?}");
}
