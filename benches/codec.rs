//! The cost of the wire format (packets, attributes, verdicts, settings) and of held packets
//!
//! ```text
//! cargo bench --bench codec [-- FILTER]
//! ```
//!
//! The packets were captured from a kernel (`proto/tests/data`). Each bench has a counterpart that
//! does the same work on the same bytes with netlink-packet-core, as programs of the rust-netlink
//! stack do it: `NetlinkBuffer` for the header, `NlasIterator` for the attributes, `Emitable` for
//! requests. That crate has no packet type, so its side finds attributes by iteration. The
//! flow of a packet has its counterpart in etherparse.
//!
//! nfq 0.2.5 is not here: its parser and encoder work only on its own socket, through `Queue::recv`
//! and `Queue::verdict`. `benches/compare` measures it as a whole.
#![allow(clippy::unwrap_used, reason = "a benchmark may fail")]

use std::hint::black_box;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use netlink_packet_core::{Emitable, NetlinkBuffer, NetlinkHeader, Nla, NlasIterator};
use nfqnl::consts::{
    CTA_MARK, MESSAGE_HEADER_LEN, NFQA_CT, NFQA_CT_INFO, NFQA_IFINDEX_INDEV, NFQA_MARK,
    NFQA_PACKET_HDR, NFQA_PAYLOAD, NFQA_VERDICT_HDR, NFQNL_MSG_PACKET, NFQNL_MSG_VERDICT,
    NLM_F_REQUEST, message_type,
};
use nfqnl::proto::{ConfigRequest, Message, Messages, PlainVerdict, RequestHeader, encode_noop};
use nfqnl::{
    ConfigFlags, CopyMode, CtState, Decision, Direction, Packet, PacketKey, Pending, QueueConfig,
    SendBatch, Verdict,
};

macro_rules! golden {
    ($name:literal) => {
        (
            $name,
            include_bytes!(concat!("../proto/tests/data/", $name, ".bin")).as_slice(),
        )
    };
}

/// Packets: incoming, forwarded, truncated, without payload, bridged
const PACKETS: [(&str, &[u8]); 5] = [
    golden!("ipv4_input"),
    golden!("forward"),
    golden!("cut"),
    golden!("meta"),
    golden!("bridge"),
];
/// The length of `struct nfgenmsg`, between the netlink header and the attributes
const FAMILY_HEADER_LEN: usize = 4;
const HEADER: RequestHeader = RequestHeader {
    ack: false,
    seq: 7,
    pid: 0,
};
const QUEUE: u16 = 258;
const ID: u32 = 7;
const MARK: u32 = 3;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    parse(&mut criterion);
    attributes(&mut criterion);
    flow(&mut criterion);
    conntrack(&mut criterion);
    verdicts(&mut criterion);
    requests(&mut criterion);
    pending(&mut criterion);
    criterion.final_summary();
}

fn packet(datagram: &[u8]) -> Packet<'_> {
    match Messages::new(datagram).next() {
        Some(Ok(Message::Packet(packet))) => packet,
        other => panic!("no packet, but {other:?}"),
    }
}

/// The attributes of a packet, read by netlink-packet-core
fn their_attributes(datagram: &[u8]) -> NlasIterator<&[u8]> {
    let buffer = NetlinkBuffer::new_checked(datagram).unwrap();
    NlasIterator::new(&buffer.payload()[FAMILY_HEADER_LEN..])
}

fn parse(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("parse");
    group.throughput(Throughput::Elements(1));
    for (name, datagram) in PACKETS {
        // Every message of the datagram, as in a receive loop
        group.bench_function(format!("{name}/nfqnl"), |b| {
            b.iter(|| {
                for message in Messages::new(black_box(datagram)) {
                    black_box(message.unwrap());
                }
            });
        });
        // Only the key, as for a key table
        group.bench_function(format!("{name}/nfqnl-peek"), |b| {
            b.iter(|| PacketKey::peek(black_box(datagram)).unwrap());
        });
        // One iteration over the attributes, without an index of them
        group.bench_function(format!("{name}/netlink-packet-core"), |b| {
            b.iter(|| {
                for attribute in their_attributes(black_box(datagram)) {
                    black_box(attribute.unwrap());
                }
            });
        });
    }
    group.finish();
}

/// Reads the same attributes as a typical program
fn common_getters(packet: &Packet<'_>) -> (u32, u32, usize, Option<u32>, u8) {
    (
        packet.id(),
        packet.mark(),
        packet.payload().len(),
        packet.indev(),
        packet.hook().0,
    )
}

fn attributes(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attributes");
    group.throughput(Throughput::Elements(1));
    for (name, datagram) in PACKETS {
        let parsed = packet(datagram);
        group.bench_function(format!("{name}/nfqnl"), |b| {
            b.iter(|| common_getters(black_box(&parsed)));
        });
        group.bench_function(format!("{name}/nfqnl-with-parse"), |b| {
            b.iter(|| common_getters(&packet(black_box(datagram))));
        });
        group.bench_function(format!("{name}/netlink-packet-core-with-parse"), |b| {
            b.iter(|| {
                let (mut id, mut mark, mut payload, mut indev, mut hook) = (0, 0, 0, None, 0);
                for attribute in their_attributes(black_box(datagram)) {
                    let attribute = attribute.unwrap();
                    let value = attribute.value();
                    let be32 = || u32::from_be_bytes(*value.first_chunk().unwrap());
                    match attribute.kind() {
                        NFQA_PACKET_HDR => (id, hook) = (be32(), value[6]),
                        NFQA_MARK => mark = be32(),
                        NFQA_PAYLOAD => payload = value.len(),
                        NFQA_IFINDEX_INDEV => indev = Some(be32()),
                        _ => {}
                    }
                }
                (id, mark, payload, indev, hook)
            });
        });
    }
    let all = packet(PACKETS[0].1);
    group.bench_function("every-getter/nfqnl", |b| {
        b.iter(|| {
            let packet = black_box(&all);
            black_box((
                packet.key(),
                packet.family(),
                packet.hw_protocol().0,
                packet.hook(),
            ));
            black_box((packet.mark(), packet.priority(), packet.timestamp()));
            black_box((packet.indev(), packet.outdev(), packet.physindev()));
            black_box((
                packet.physoutdev(),
                packet.hw_addr(),
                packet.uid(),
                packet.gid(),
            ));
            black_box((packet.security_context(), packet.vlan(), packet.l2_header()));
            black_box((
                packet.conntrack().map(|entry| entry.as_bytes()),
                packet.ct_state().map(|state| state.0),
            ));
            black_box((packet.cgroup_classid(), packet.skb_info()));
            black_box((packet.payload(), packet.len(), packet.is_truncated()));
        });
    });
    group.finish();
}

/// The addresses and ports of a UDP packet, read by etherparse
fn their_flow(packet: &[u8]) -> Option<(IpAddr, IpAddr, u16, u16)> {
    let sliced = SlicedPacket::from_ip(packet).ok()?;
    let (source, destination) = match sliced.net? {
        NetSlice::Ipv4(ip) => (
            ip.header().source_addr().into(),
            ip.header().destination_addr().into(),
        ),
        NetSlice::Ipv6(ip) => (
            ip.header().source_addr().into(),
            ip.header().destination_addr().into(),
        ),
        NetSlice::Arp(_) => return None,
    };
    match sliced.transport? {
        TransportSlice::Udp(udp) => Some((
            source,
            destination,
            udp.source_port(),
            udp.destination_port(),
        )),
        _ => None,
    }
}

fn flow(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("flow");
    group.throughput(Throughput::Elements(1));
    for (name, datagram) in [golden!("ipv4_input"), golden!("ipv6_output")] {
        let parsed = packet(datagram);
        group.bench_function(format!("{name}/nfqnl"), |b| {
            b.iter(|| black_box(&parsed).flow());
        });
        group.bench_function(format!("{name}/etherparse"), |b| {
            b.iter(|| their_flow(black_box(parsed.payload())));
        });
        let ours = parsed.flow().and_then(|flow| {
            let (source, destination) = flow.ports()?;
            Some((flow.source(), flow.destination(), source, destination))
        });
        assert_eq!(ours, their_flow(parsed.payload()), "the same flow");
        assert!(ours.is_some(), "{name} has ports");
    }
    group.finish();
}

/// A message with a mark, a conntrack entry and the state of the packet there
fn message_with_conntrack() -> Vec<u8> {
    let (_, entry) = golden!("conntrack_5_10_x86_64_v4");
    let attributes = [
        TheirAttribute(NFQA_PACKET_HDR, &[0, 0, 0, 7, 8, 0, 1]),
        TheirAttribute(NFQA_MARK, &MARK.to_be_bytes()),
        TheirAttribute(NFQA_CT, entry),
        TheirAttribute(NFQA_CT_INFO, &CtState::NEW.0.to_be_bytes()),
    ];
    let mut message = vec![0; 256];
    let len = their_message(&mut message, NFQNL_MSG_PACKET, &attributes);
    message.truncate(len);
    message
}

fn conntrack(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("conntrack");
    group.throughput(Throughput::Elements(1));
    let message = message_with_conntrack();
    let ours = |message| {
        let packet = packet(message);
        let entry = packet.conntrack().and_then(|entry| entry.mark());
        (packet.mark(), packet.ct_state(), entry)
    };
    let theirs = |message| {
        let (mut mark, mut state, mut entry) = (0, None, None);
        let be32 = |value: &[u8]| u32::from_be_bytes(*value.first_chunk().unwrap());
        for attribute in their_attributes(message) {
            let attribute = attribute.unwrap();
            match attribute.kind() {
                NFQA_MARK => mark = be32(attribute.value()),
                NFQA_CT_INFO => state = Some(CtState(be32(attribute.value()))),
                NFQA_CT => {
                    entry = NlasIterator::new(attribute.value())
                        .map(|attribute| attribute.unwrap())
                        .find(|attribute| attribute.kind() == CTA_MARK)
                        .map(|attribute| be32(attribute.value()));
                }
                _ => {}
            }
        }
        (mark, state, entry)
    };
    group.bench_function("marks/nfqnl", |b| b.iter(|| ours(black_box(&message))));
    group.bench_function("marks/netlink-packet-core", |b| {
        b.iter(|| theirs(black_box(&message)));
    });
    assert_eq!(ours(&message), (MARK, Some(CtState::NEW), Some(0)));
    assert_eq!(ours(&message), theirs(&message));
    // The flow of the original direction
    group.bench_function("flow/nfqnl", |b| {
        b.iter(|| {
            let entry = packet(black_box(&message)).conntrack()?;
            entry.tuple(Direction::Original)?.flow()
        });
    });
    group.finish();
}

fn verdicts(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("verdict");
    group.throughput(Throughput::Elements(1));
    let payload = [0x45; 1400];
    for (name, mark, payload) in [
        ("accept", None, None),
        ("mark", Some(MARK), None),
        ("payload-1400", None, Some(&payload[..])),
    ] {
        let mut decision = Decision::new(Verdict::Accept);
        if let Some(mark) = mark {
            decision = decision.with_mark(mark);
        }
        if let Some(payload) = payload {
            decision = decision.with_payload(payload);
        }
        let mut ours = vec![0; decision.max_len()];
        group.bench_function(format!("{name}/nfqnl"), |b| {
            b.iter(|| {
                black_box(&decision)
                    .encode(&mut ours, QUEUE, ID, HEADER)
                    .unwrap()
            });
        });
        let mut theirs = vec![0; decision.max_len()];
        group.bench_function(format!("{name}/netlink-packet-core"), |b| {
            b.iter(|| {
                let (mark, payload) = black_box((mark, payload));
                their_verdict(&mut theirs, Verdict::Accept, mark, payload)
            });
        });
        let len = decision.encode(&mut ours, QUEUE, ID, HEADER).unwrap();
        assert_eq!(
            their_verdict(&mut theirs, Verdict::Accept, mark, payload),
            len
        );
        assert_eq!(ours[..len], theirs[..len], "the same message");
    }

    let plain = PlainVerdict::new(Verdict::Accept);
    let mut buf = [0; PlainVerdict::MAX_LEN];
    group.bench_function("batch/nfqnl", |b| {
        b.iter(|| {
            black_box(&plain)
                .encode_batch(&mut buf, QUEUE, ID, HEADER)
                .unwrap()
        });
    });

    const MANY: u32 = 32;
    let mut collected = SendBatch::new();
    group.throughput(Throughput::Elements(MANY.into()));
    group.bench_function("collect-32/nfqnl", |b| {
        b.iter(|| {
            collected.clear();
            for id in 0..MANY {
                let key = PacketKey::new(QUEUE, id);
                collected.push(black_box(key), Verdict::Accept).unwrap();
            }
        });
    });
    group.finish();
}

/// An attribute for netlink-packet-core's writer
struct TheirAttribute<'a>(u16, &'a [u8]);

impl Nla for TheirAttribute<'_> {
    fn kind(&self) -> u16 {
        self.0
    }

    fn value_len(&self) -> usize {
        self.1.len()
    }

    fn emit_value(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(self.1);
    }
}

/// The same message, written by netlink-packet-core
fn their_verdict(
    buf: &mut [u8],
    verdict: Verdict,
    mark: Option<u32>,
    payload: Option<&[u8]>,
) -> usize {
    let mut verdict_header = [0; 8];
    verdict_header[..4].copy_from_slice(&verdict.to_raw().to_be_bytes());
    verdict_header[4..].copy_from_slice(&ID.to_be_bytes());
    let mark = mark.map(u32::to_be_bytes);
    let attributes = [
        Some(TheirAttribute(NFQA_VERDICT_HDR, &verdict_header)),
        mark.as_ref().map(|mark| TheirAttribute(NFQA_MARK, mark)),
        payload.map(|payload| TheirAttribute(NFQA_PAYLOAD, payload)),
    ];
    let attributes = attributes.iter().flatten();
    their_message(buf, NFQNL_MSG_VERDICT, attributes)
}

/// A message written by netlink-packet-core
fn their_message<'a>(
    buf: &mut [u8],
    kind: u8,
    attributes: impl IntoIterator<Item = &'a TheirAttribute<'a>>,
) -> usize {
    let mut end = MESSAGE_HEADER_LEN + FAMILY_HEADER_LEN;
    for attribute in attributes {
        attribute.emit(&mut buf[end..]);
        end += attribute.buffer_len();
    }
    let [high, low] = QUEUE.to_be_bytes();
    buf[MESSAGE_HEADER_LEN..][..FAMILY_HEADER_LEN].copy_from_slice(&[0, 0, high, low]);
    let mut header = NetlinkHeader::default();
    header.length = u32::try_from(end).unwrap();
    header.message_type = message_type(kind);
    header.flags = NLM_F_REQUEST;
    header.sequence_number = HEADER.seq;
    header.port_number = HEADER.pid;
    header.emit(buf);
    end
}

fn requests(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("request");
    group.throughput(Throughput::Elements(1));
    let config = QueueConfig::new()
        .copy_mode(CopyMode::Packet, u32::MAX)
        .maxlen(4096)
        .enable(ConfigFlags::GSO);
    let mut buf = [0; ConfigRequest::MAX_LEN];
    group.bench_function("bind-with-settings/nfqnl", |b| {
        b.iter(|| {
            ConfigRequest::bind(QUEUE, black_box(config))
                .encode(&mut buf, HEADER)
                .unwrap()
        });
    });
    group.bench_function("noop/nfqnl", |b| {
        b.iter(|| encode_noop(&mut buf, black_box(HEADER)).unwrap());
    });
    group.finish();
}

/// Holding, answering and expiring a full queue of held packets, per packet and without the send
fn pending(criterion: &mut Criterion) {
    const HELD: u32 = 65_536;
    let timeout = Duration::from_secs(1);
    let mut group = criterion.benchmark_group("pending");
    group.throughput(Throughput::Elements(HELD.into()));
    let mut verdicts = SendBatch::new();
    let mut pending = Pending::new(timeout, Verdict::Drop);
    let mut next = 0_u32;
    let mut measure = |work: fn(&mut Pending, u32, Instant, &mut SendBatch), is_hold, n| {
        let mut total = Duration::ZERO;
        for _ in 0..n {
            let now = Instant::now();
            let first = next;
            next = first.wrapping_add(HELD);
            (0..HELD).for_each(|id| pending.hold(key(first.wrapping_add(id)), now));
            let held = now.elapsed();
            let begin = Instant::now();
            work(&mut pending, first, now + timeout, &mut verdicts);
            total += if is_hold { held } else { begin.elapsed() };
            assert!(pending.is_empty());
            verdicts.clear();
        }
        total
    };
    let expire: fn(&mut Pending, u32, Instant, &mut SendBatch) =
        |pending, _, now, verdicts| assert_eq!(pending.expired(now, verdicts), 65_536);
    group.bench_function("hold", |b| b.iter_custom(|n| measure(expire, true, n)));
    group.bench_function("expire", |b| b.iter_custom(|n| measure(expire, false, n)));
    group.bench_function("take", |b| {
        let take = |pending: &mut Pending, first: u32, _, _: &mut SendBatch| {
            (0..HELD).for_each(|id| assert!(pending.take(key(first.wrapping_add(id)))));
        };
        b.iter_custom(|n| measure(take, false, n));
    });
    group.finish();
}

fn key(id: u32) -> PacketKey {
    PacketKey::new(QUEUE, id)
}
