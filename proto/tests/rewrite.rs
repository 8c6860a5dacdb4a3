//! Rewritten packets have the lengths and checksums that etherparse computes
#![allow(clippy::unwrap_used, reason = "a test's helpers may fail the test")]

mod common;

use common::{MessageBuilder, PACKET_HDR, QUEUE, config};
use etherparse::icmpv4::DestUnreachableHeader;
use etherparse::{
    IcmpEchoHeader, Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type, IpDscp, IpEcn,
    IpFragOffset, IpHeaders, IpNumber, Ipv4Header, Ipv4Options, Ipv6Extensions, Ipv6FlowLabel,
    Ipv6FragmentHeader, Ipv6Header, Ipv6RawExtHeader, Ipv6RoutingExtensions, TcpHeader,
    TransportHeader, UdpHeader,
};
use nfqnl_proto::consts::*;
use nfqnl_proto::rewrite::{Rewrite, RewriteError, Rewriter, complete_checksums};
use nfqnl_proto::{Family, IpProtocol, Packet, SkbInfo};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::Index;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const GSO: SkbInfo = SkbInfo::GSO;
const UNFINISHED: SkbInfo = SkbInfo::CSUM_NOT_READY;
const FINISHED: SkbInfo = SkbInfo::empty();

/// A packet as etherparse has it
#[derive(Clone, Debug)]
struct Model {
    ip: IpHeaders,
    transport: TransportHeader,
    payload: Vec<u8>,
    /// UDP without a checksum
    unchecked: bool,
}

impl Model {
    fn new(ip: IpHeaders, transport: TransportHeader, payload: &[u8]) -> Self {
        Self {
            ip,
            transport,
            payload: payload.to_vec(),
            unchecked: false,
        }
    }

    fn protocol(&self) -> IpNumber {
        match self.transport {
            TransportHeader::Udp(_) => IpNumber::UDP,
            TransportHeader::Tcp(_) => IpNumber::TCP,
            TransportHeader::Icmpv4(_) => IpNumber::ICMP,
            TransportHeader::Icmpv6(_) => IpNumber::IPV6_ICMP,
        }
    }

    /// The packet with all lengths and checksums
    fn bytes(&self) -> Vec<u8> {
        let Self {
            mut ip,
            mut transport,
            payload,
            unchecked,
        } = self.clone();
        ip.set_next_headers(self.protocol());
        let len = transport.header_len() + payload.len();
        ip.set_payload_len(len).unwrap();
        if let TransportHeader::Udp(udp) = &mut transport {
            udp.length = u16::try_from(len).unwrap();
        }
        match &mut ip {
            IpHeaders::Ipv4(ip, _) => {
                ip.header_checksum = ip.calc_header_checksum();
                transport.update_checksum_ipv4(ip, &payload).unwrap();
            }
            IpHeaders::Ipv6(ip, _) => transport.update_checksum_ipv6(ip, &payload).unwrap(),
        }
        if let (true, TransportHeader::Udp(udp)) = (unchecked, &mut transport) {
            udp.checksum = 0;
        }
        let mut bytes = Vec::new();
        ip.write(&mut bytes).unwrap();
        transport.write(&mut bytes).unwrap();
        bytes.extend(payload);
        bytes
    }

    /// The offset of the transport header
    fn header(&self) -> usize {
        self.ip.header_len()
    }

    /// The offset of the transport checksum
    fn checksum(&self) -> usize {
        let offset = match self.transport {
            TransportHeader::Udp(_) => 6,
            TransportHeader::Tcp(_) => 16,
            TransportHeader::Icmpv4(_) | TransportHeader::Icmpv6(_) => 2,
        };
        self.header() + offset
    }

    /// The sum of the pseudo-header
    fn pseudo_header(&self) -> u16 {
        let len = u16::try_from(self.transport.header_len() + self.payload.len()).unwrap();
        let rest = [[0, self.protocol().0], len.to_be_bytes()].concat();
        match &self.ip {
            _ if self.protocol() == IpNumber::ICMP => 0,
            IpHeaders::Ipv4(ip, _) => sum(&[&ip.source, &ip.destination, &rest[..]].concat()),
            IpHeaders::Ipv6(ip, _) => sum(&[&ip.source, &ip.destination, &rest[..]].concat()),
        }
    }

    /// The packet as it is queued with `CSUM_NOT_READY`
    fn unfinished_bytes(&self) -> Vec<u8> {
        let mut bytes = self.bytes();
        put(&mut bytes, self.checksum(), self.pseudo_header());
        bytes
    }

    /// Makes the same change, and returns true if the packet can have it
    fn apply(&mut self, edit: &Edit) -> bool {
        let udp_or_tcp = match &mut self.transport {
            TransportHeader::Udp(udp) => Some((&mut udp.source_port, &mut udp.destination_port)),
            TransportHeader::Tcp(tcp) => Some((&mut tcp.source_port, &mut tcp.destination_port)),
            TransportHeader::Icmpv4(_) | TransportHeader::Icmpv6(_) => None,
        };
        match (edit, &mut self.ip, udp_or_tcp) {
            (Edit::Source(IpAddr::V4(to)), IpHeaders::Ipv4(ip, _), _) => ip.source = to.octets(),
            (Edit::Source(IpAddr::V6(to)), IpHeaders::Ipv6(ip, _), _) => ip.source = to.octets(),
            (Edit::Destination(IpAddr::V4(to)), IpHeaders::Ipv4(ip, _), _) => {
                ip.destination = to.octets();
            }
            (Edit::Destination(IpAddr::V6(to)), IpHeaders::Ipv6(ip, _), _) => {
                ip.destination = to.octets();
            }
            (Edit::SourcePort(to), _, Some((port, _))) => *port = *to,
            (Edit::DestinationPort(to), _, Some((_, port))) => *port = *to,
            (Edit::Ttl(to), IpHeaders::Ipv4(ip, _), _) => ip.time_to_live = *to,
            (Edit::Ttl(to), IpHeaders::Ipv6(ip, _), _) => ip.hop_limit = *to,
            (Edit::Dscp(to), ip, _) => {
                let Ok(to) = IpDscp::try_new(*to) else {
                    return false;
                };
                match ip {
                    IpHeaders::Ipv4(ip, _) => ip.dscp = to,
                    IpHeaders::Ipv6(ip, _) => ip.set_dscp(to),
                }
            }
            (Edit::Ecn(to), ip, _) => {
                let Ok(to) = IpEcn::try_new(*to) else {
                    return false;
                };
                match ip {
                    IpHeaders::Ipv4(ip, _) => ip.ecn = to,
                    IpHeaders::Ipv6(ip, _) => ip.set_ecn(to),
                }
            }
            (Edit::Replace(start, end, bytes), ..) => {
                let range = range(&self.payload, *start, *end);
                self.payload.splice(range, bytes.iter().copied());
            }
            _ => return false,
        }
        true
    }
}

/// A change of a packet
#[derive(Clone, Debug)]
enum Edit {
    Source(IpAddr),
    Destination(IpAddr),
    SourcePort(u16),
    DestinationPort(u16),
    Ttl(u8),
    Dscp(u8),
    Ecn(u8),
    Replace(Index, Index, Vec<u8>),
}

impl Edit {
    fn apply(&self, rewrite: &mut Rewrite<'_, '_>) -> Result<(), RewriteError> {
        match self {
            Self::Source(to) => rewrite.set_source(*to),
            Self::Destination(to) => rewrite.set_destination(*to),
            Self::SourcePort(to) => rewrite.set_source_port(*to),
            Self::DestinationPort(to) => rewrite.set_destination_port(*to),
            Self::Ttl(to) => {
                rewrite.set_ttl(*to);
                Ok(())
            }
            Self::Dscp(to) => rewrite.set_dscp(*to),
            Self::Ecn(to) => rewrite.set_ecn(*to),
            Self::Replace(start, end, bytes) => {
                let range = range(rewrite.payload().unwrap_or_default(), *start, *end);
                rewrite.replace(range, bytes)
            }
        }
    }
}

/// A range in `payload`, which may be empty
fn range(payload: &[u8], start: Index, end: Index) -> std::ops::Range<usize> {
    let [start, end] = [start, end].map(|at| at.index(payload.len() + 1));
    start.min(end)..start.max(end)
}

/// The ones' complement sum, the slow way
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|word| u64::from(word[0]) << 8 | u64::from(*word.get(1).unwrap_or(&0)));
    let mut sum: u64 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap()
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// The packet message of a payload
fn message(payload: &[u8], info: SkbInfo) -> Vec<u8> {
    let is_v6 = payload.first().is_some_and(|first| first >> 4 == 6);
    let family = if is_v6 { Family::INET6 } else { Family::INET };
    MessageBuilder::packet(family, QUEUE)
        .attr(NFQA_PACKET_HDR, PACKET_HDR)
        .attr(NFQA_SKB_INFO, info.bits().to_be_bytes())
        .attr(NFQA_PAYLOAD, payload)
        .build()
}

/// Rewrites a payload by `edit`, which must succeed, in a buffer with room for growth
fn rewritten<'a>(
    payload: &[u8],
    info: SkbInfo,
    edit: impl FnOnce(&mut Rewrite<'_, '_>) -> Result<(), RewriteError>,
    buf: &'a mut Vec<u8>,
) -> Result<&'a [u8], RewriteError> {
    let message = message(payload, info);
    buf.resize(MAX_PAYLOAD, 0xa5);
    let packet = Packet::parse(&message).unwrap();
    let mut rewriter = Rewriter::new(buf);
    let mut rewrite = rewriter.begin(&packet)?;
    edit(&mut rewrite)?;
    let len = rewrite.finish()?.len();
    Ok(&buf[..len])
}

/// The error of [`Rewriter::begin`]
#[track_caller]
fn refused(payload: &[u8], info: SkbInfo) -> RewriteError {
    let message = message(payload, info);
    let mut buf = [0; MAX_PAYLOAD];
    let mut rewriter = Rewriter::new(&mut buf);
    let refused = rewriter.begin(&Packet::parse(&message).unwrap());
    refused.map(|_| ()).expect_err("refused")
}

/// Checks the error of a change, and that the packet stays as it was
#[track_caller]
fn assert_refused(
    payload: &[u8],
    edit: impl FnOnce(&mut Rewrite<'_, '_>) -> Result<(), RewriteError>,
    error: RewriteError,
) {
    let check = |rewrite: &mut Rewrite<'_, '_>| {
        assert_eq!(edit(rewrite), Err(error));
        Ok(())
    };
    let mut buf = Vec::new();
    assert_eq!(rewritten(payload, FINISHED, check, &mut buf), Ok(payload));
}

fn v4(last: u8) -> IpAddr {
    Ipv4Addr::new(192, 0, 2, last).into()
}

fn v6(last: u16) -> IpAddr {
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last).into()
}

fn ipv4_headers() -> IpHeaders {
    let header = Ipv4Header::new(0, 9, IpNumber::TCP, [10, 0, 0, 1], [10, 0, 0, 2]);
    IpHeaders::Ipv4(header.unwrap(), Default::default())
}

fn ipv6_headers() -> IpHeaders {
    let header = Ipv6Header {
        hop_limit: 9,
        source: [0xfd; 16],
        destination: [0xfe; 16],
        ..Default::default()
    };
    IpHeaders::Ipv6(header, Default::default())
}

fn tcp(payload: &[u8]) -> Model {
    let tcp = TcpHeader::new(1000, 2000, 1, 500);
    Model::new(ipv4_headers(), TransportHeader::Tcp(tcp), payload)
}

fn udp(payload: &[u8]) -> Model {
    let udp = UdpHeader {
        source_port: 1000,
        destination_port: 2000,
        ..Default::default()
    };
    Model::new(ipv4_headers(), TransportHeader::Udp(udp), payload)
}

fn icmp(payload: &[u8]) -> Model {
    let unreachable = Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Port);
    let icmp = TransportHeader::Icmpv4(Icmpv4Header::new(unreachable));
    Model::new(ipv4_headers(), icmp, payload)
}

fn over_ipv6(model: Model) -> Model {
    Model {
        ip: ipv6_headers(),
        ..model
    }
}

fn with_extensions(model: Model, extensions: Ipv6Extensions) -> Model {
    let IpHeaders::Ipv6(header, _) = ipv6_headers() else {
        unreachable!();
    };
    Model {
        ip: IpHeaders::Ipv6(header, extensions),
        ..model
    }
}

/// An IPv6 packet with a routing header
fn routed(segments_left: u8) -> Model {
    let mut header = [0; 22];
    header[..2].copy_from_slice(&[2, segments_left]);
    let routing = Ipv6RoutingExtensions {
        routing: Ipv6RawExtHeader::new_raw(IpNumber::UDP, &header).unwrap(),
        final_destination_options: None,
    };
    let extensions = Ipv6Extensions {
        routing: Some(routing),
        ..Default::default()
    };
    with_extensions(udp(b"payload"), extensions)
}

/// The same packet as fragment, with the bytes from `offset` to `end` behind its IP header
fn fragment(model: &Model, offset: usize, end: usize) -> Vec<u8> {
    let bytes = model.bytes();
    let part = &bytes[model.header()..][offset..end];
    let more_fragments = end < bytes.len() - model.header();
    let fragment_offset = IpFragOffset::try_new(u16::try_from(offset / 8).unwrap()).unwrap();
    let mut ip = model.ip.clone();
    match &mut ip {
        IpHeaders::Ipv4(ip, _) => {
            (ip.dont_fragment, ip.more_fragments) = (false, more_fragments);
            ip.fragment_offset = fragment_offset;
        }
        IpHeaders::Ipv6(_, extensions) => {
            extensions.fragment = Some(Ipv6FragmentHeader {
                next_header: model.protocol(),
                fragment_offset,
                more_fragments,
                identification: 7,
            });
        }
    }
    ip.set_next_headers(model.protocol());
    ip.set_payload_len(part.len()).unwrap();
    if let IpHeaders::Ipv4(ip, _) = &mut ip {
        ip.header_checksum = ip.calc_header_checksum();
    }
    let mut fragment = Vec::new();
    ip.write(&mut fragment).unwrap();
    fragment.extend(part);
    fragment
}

/// An IPv4 or IPv6 packet of any protocol
fn other(ip: IpHeaders, protocol: u8, body: &[u8]) -> Vec<u8> {
    let mut model = tcp(body);
    model.ip = ip;
    let mut bytes = model.bytes();
    bytes.drain(model.header()..model.header() + model.transport.header_len());
    let len = u16::try_from(bytes.len()).unwrap();
    match &model.ip {
        IpHeaders::Ipv4(..) => {
            put(&mut bytes, 2, len);
            bytes[9] = protocol;
            put(&mut bytes, 10, 0);
            let checksum = !sum(&bytes[..20]);
            put(&mut bytes, 10, checksum);
        }
        IpHeaders::Ipv6(..) => {
            put(&mut bytes, 4, len - 40);
            bytes[6] = protocol;
        }
    }
    bytes
}

fn options(max: usize) -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..=max).prop_map(|mut options| {
        options.truncate(options.len() / 4 * 4);
        options
    })
}

prop_compose! {
    fn ipv4()(
        source: [u8; 4],
        destination: [u8; 4],
        (time_to_live, identification, dont_fragment) in any::<(u8, u16, bool)>(),
        (dscp, ecn) in (0..64u8, 0..4u8),
        options in options(40),
    ) -> IpHeaders {
        let header = Ipv4Header {
            source,
            destination,
            time_to_live,
            identification,
            dont_fragment,
            dscp: IpDscp::try_new(dscp).unwrap(),
            ecn: IpEcn::try_new(ecn).unwrap(),
            options: Ipv4Options::try_from(&options[..]).unwrap(),
            ..Default::default()
        };
        IpHeaders::Ipv4(header, Default::default())
    }
}

/// An extension header, with bytes at its start if it is a routing header
fn extension(start: &'static [u8]) -> impl Strategy<Value = Ipv6RawExtHeader> {
    (vec(any::<u8>(), 30), 0..3usize).prop_map(|(mut bytes, words)| {
        bytes.truncate(6 + 8 * words);
        bytes[..start.len()].copy_from_slice(start);
        Ipv6RawExtHeader::new_raw(IpNumber::UDP, &bytes).unwrap()
    })
}

prop_compose! {
    fn ipv6()(
        source: [u8; 16],
        destination: [u8; 16],
        (traffic_class, hop_limit) in any::<(u8, u8)>(),
        flow_label in 0..0x10_0000u32,
        hop_by_hop_options in option::weighted(0.3, extension(&[])),
        destination_options in option::weighted(0.3, extension(&[])),
        routing in option::weighted(0.3, (extension(&[2, 0]), option::of(extension(&[])))),
    ) -> IpHeaders {
        let header = Ipv6Header {
            source,
            destination,
            traffic_class,
            hop_limit,
            flow_label: Ipv6FlowLabel::try_new(flow_label).unwrap(),
            ..Default::default()
        };
        let routing = routing.map(|(routing, last)| Ipv6RoutingExtensions {
            routing,
            final_destination_options: last,
        });
        let extensions = Ipv6Extensions {
            hop_by_hop_options,
            destination_options,
            routing,
            ..Default::default()
        };
        IpHeaders::Ipv6(header, extensions)
    }
}

prop_compose! {
    fn any_tcp()(
        ports: (u16, u16),
        (sequence_number, acknowledgment_number) in any::<(u32, u32)>(),
        [ns, fin, syn, rst, psh, ack, urg, ece] in any::<[bool; 8]>(),
        (window_size, urgent_pointer) in any::<(u16, u16)>(),
        options in options(40),
    ) -> TcpHeader {
        let mut tcp = TcpHeader {
            source_port: ports.0,
            destination_port: ports.1,
            sequence_number,
            acknowledgment_number,
            ns, fin, syn, rst, psh, ack, urg, ece,
            window_size,
            urgent_pointer,
            ..Default::default()
        };
        tcp.set_options_raw(&options).unwrap();
        tcp
    }
}

fn models() -> impl Strategy<Value = Model> {
    let udp = any::<(u16, u16)>().prop_map(|(source_port, destination_port)| UdpHeader {
        source_port,
        destination_port,
        ..Default::default()
    });
    let echo = any::<(u16, u16)>().prop_map(|(id, seq)| IcmpEchoHeader { id, seq });
    let transport = prop_oneof![
        any_tcp().prop_map(TransportHeader::Tcp),
        udp.prop_map(TransportHeader::Udp),
        echo.prop_map(|echo| {
            TransportHeader::Icmpv4(Icmpv4Header::new(Icmpv4Type::EchoRequest(echo)))
        }),
    ];
    let ip = prop_oneof![ipv4(), ipv6()];
    let payload = vec(prop_oneof![Just(0), Just(0xff), any::<u8>()], 0..80);
    (ip, transport, payload, any::<bool>()).prop_map(|(ip, transport, payload, unchecked)| {
        let transport = match (&ip, transport) {
            (IpHeaders::Ipv6(..), TransportHeader::Icmpv4(icmp)) => {
                let Icmpv4Type::EchoRequest(echo) = icmp.icmp_type else {
                    unreachable!();
                };
                TransportHeader::Icmpv6(Icmpv6Header::new(Icmpv6Type::EchoRequest(echo)))
            }
            (_, transport) => transport,
        };
        Model {
            ip,
            transport,
            payload,
            unchecked,
        }
    })
}

fn edits() -> impl Strategy<Value = Vec<Edit>> {
    let addr = prop_oneof![
        any::<[u8; 4]>().prop_map(IpAddr::from),
        any::<[u8; 16]>().prop_map(IpAddr::from),
    ];
    let bytes = vec(prop_oneof![Just(0), Just(0xff), any::<u8>()], 0..60);
    let edit = prop_oneof![
        2 => addr.clone().prop_map(Edit::Source),
        2 => addr.prop_map(Edit::Destination),
        1 => any::<u16>().prop_map(Edit::SourcePort),
        1 => any::<u16>().prop_map(Edit::DestinationPort),
        1 => any::<u8>().prop_map(Edit::Ttl),
        1 => (0..80u8).prop_map(Edit::Dscp),
        1 => (0..6u8).prop_map(Edit::Ecn),
        4 => (any::<Index>(), any::<Index>(), bytes)
            .prop_map(|(start, end, bytes)| Edit::Replace(start, end, bytes)),
    ];
    vec(edit, 0..6)
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn edits_agree_with_etherparse(mut model in models(), edits in edits()) {
        let message = message(&model.bytes(), FINISHED);
        let mut buf = [0xa5; 2000];
        let mut rewriter = Rewriter::new(&mut buf);
        let mut rewrite = rewriter.begin(&Packet::parse(&message).unwrap()).unwrap();
        for edit in &edits {
            prop_assert_eq!(edit.apply(&mut rewrite).is_ok(), model.apply(edit), "{:?}", edit);
            prop_assert_eq!(rewrite.payload().unwrap(), &model.payload);
        }
        prop_assert_eq!(rewrite.finish().unwrap(), model.bytes());
    }

    #[test]
    fn unfinished_checksums_are_completed(mut model in models(), edits in edits()) {
        model.unchecked = false;
        let message = message(&model.unfinished_bytes(), UNFINISHED);
        let packet = Packet::parse(&message).unwrap();
        let mut buf = [0xa5; 2000];
        prop_assert_eq!(complete_checksums(&packet, &mut buf).unwrap(), model.bytes());
        let mut rewriter = Rewriter::new(&mut buf);
        let mut rewrite = rewriter.begin(&packet).unwrap();
        for edit in &edits {
            prop_assert_eq!(edit.apply(&mut rewrite).is_ok(), model.apply(edit), "{:?}", edit);
        }
        prop_assert_eq!(rewrite.finish().unwrap(), model.bytes());
    }

    #[test]
    fn bad_checksums_stay_bad(
        mut model in models(),
        edits in edits(),
        bad: u16,
        bad_header: u16,
    ) {
        model.unchecked = false;
        let is_v4 = matches!(model.ip, IpHeaders::Ipv4(..));
        let mut bytes = model.bytes();
        put(&mut bytes, model.checksum(), bad);
        if is_v4 {
            put(&mut bytes, 10, bad_header);
        }
        // In UDP, 0 is not a wrong checksum.
        prop_assume!(bad != 0 || model.protocol() != IpNumber::UDP);

        let good = model.bytes();
        // Equal differences in ones' complement, where 0 and 0xffff are equal.
        let difference = |bytes: &[u8], good: &[u8], at| {
            (i32::from(word(bytes, at)) - i32::from(word(good, at))).rem_euclid(0xffff)
        };
        let before = difference(&bytes, &good, model.checksum());
        let before_header = difference(&bytes, &good, 10);
        let message = message(&bytes, FINISHED);
        let mut buf = [0xa5; 2000];
        let mut rewriter = Rewriter::new(&mut buf);
        let mut rewrite = rewriter.begin(&Packet::parse(&message).unwrap()).unwrap();
        for edit in &edits {
            prop_assert_eq!(edit.apply(&mut rewrite).is_ok(), model.apply(edit));
        }
        let (bytes, good) = (rewrite.finish().unwrap(), model.bytes());
        prop_assert_eq!(difference(bytes, &good, model.checksum()), before);
        if is_v4 {
            prop_assert_eq!(difference(bytes, &good, 10), before_header);
        }
        prop_assert!(word(bytes, model.checksum()) != 0 || model.protocol() != IpNumber::UDP);
    }

    #[test]
    fn without_edits_the_packet_is_unchanged(model in models(), change: (Index, u8)) {
        let mut bytes = model.bytes();
        let at = model.header() + change.0.index(bytes.len() - model.header());
        bytes[at] = change.1;
        let message = message(&bytes, FINISHED);
        let mut buf = [0; 2000];
        let unchanged = complete_checksums(&Packet::parse(&message).unwrap(), &mut buf);
        prop_assert_eq!(unchanged, Ok(&bytes[..]));
    }

    /// Any bytes and damaged packets, in buffers of any size
    #[test]
    fn any_bytes_are_rewritten_or_refused(
        bytes in prop_oneof![
            vec(any::<u8>(), 0..120),
            models().prop_map(|model| model.bytes()),
            models().prop_map(|model| model.unfinished_bytes()),
        ],
        changes in vec(any::<(Index, u8)>(), 0..4),
        version in option::of(prop::sample::select(vec![0x45, 0x46, 0x60])),
        right_len in prop::bool::weighted(0.9),
        info in 0..8u32,
        edits in edits(),
        room in 0..300usize,
    ) {
        let mut bytes = bytes;
        let len = bytes.len();
        for (at, byte) in changes {
            if len > 0 {
                bytes[at.index(len)] = byte;
            }
        }
        if let (Some(version), Some(first)) = (version, bytes.first_mut()) {
            *first = version;
        }
        if right_len && len >= 40 {
            let is_v6 = bytes[0] >> 4 == 6;
            let (at, len) = if is_v6 { (4, len - 40) } else { (2, len) };
            put(&mut bytes, at, u16::try_from(len).unwrap());
        }
        let message = message(&bytes, SkbInfo::from_bits_retain(info));
        let packet = Packet::parse(&message).unwrap();
        let mut buf = vec![0; room];
        let mut rewriter = Rewriter::new(&mut buf);
        let Ok(mut rewrite) = rewriter.begin(&packet) else {
            return Ok(());
        };
        let mut accepted = Vec::new();
        for edit in &edits {
            if edit.apply(&mut rewrite).is_ok() {
                accepted.push(edit);
            }
        }
        let all = rewrite.finish();

        // Refused edits have changed nothing.
        let mut buf = vec![0; room];
        let mut rewriter = Rewriter::new(&mut buf);
        let mut rewrite = rewriter.begin(&packet).unwrap();
        for edit in &accepted {
            prop_assert_eq!(edit.apply(&mut rewrite), Ok(()));
        }
        prop_assert_eq!(rewrite.finish(), all);
        if let (Ok(all), true) = (all, accepted.is_empty()) {
            prop_assert_eq!(all.len(), bytes.len());
        }
    }
}

#[test]
fn lengths_change_at_odd_offsets() {
    for model in [
        tcp(b"abcdefg"),
        udp(b"abcdefg"),
        over_ipv6(tcp(b"abcdefg")),
        icmp(b"abcdefg"),
    ] {
        for (start, end) in [(0, 0), (1, 2), (3, 3), (2, 7), (0, 7), (7, 7)] {
            for with in [&b""[..], b"1", b"12", b"123", &[0xff; 601]] {
                let mut expected = model.clone();
                expected.payload.splice(start..end, with.iter().copied());
                for (bytes, info) in [
                    (model.bytes(), FINISHED),
                    (model.unfinished_bytes(), UNFINISHED),
                ] {
                    let replace = |rewrite: &mut Rewrite<'_, '_>| rewrite.replace(start..end, with);
                    let mut buf = Vec::new();
                    let changed = rewritten(&bytes, info, replace, &mut buf);
                    assert_eq!(changed, Ok(&expected.bytes()[..]));
                }
            }
        }
    }
}

#[test]
fn udp_without_checksum_stays_without() {
    for model in [udp(b"abc"), over_ipv6(udp(b"abc"))] {
        let mut expected = model;
        expected.unchecked = true;
        let bytes = expected.bytes();
        expected.payload = b"abcd".to_vec();
        expected.apply(&Edit::SourcePort(5));
        let edit = |rewrite: &mut Rewrite<'_, '_>| {
            rewrite.set_source_port(5)?;
            rewrite.replace(3..3, b"d")
        };
        let mut buf = Vec::new();
        let changed = rewritten(&bytes, FINISHED, edit, &mut buf).unwrap();
        assert_eq!(changed, expected.bytes());
        assert_eq!(word(changed, expected.checksum()), 0);
    }
}

/// A UDP checksum of 0 would mean that there is none
#[test]
fn computed_zero_is_written_as_ones() {
    for mut model in [udp(&[0; 4]), over_ipv6(udp(&[0; 4]))] {
        // The checksum in the payload makes the new one 0.
        let checksum = word(&model.bytes(), model.checksum());
        let replace =
            |rewrite: &mut Rewrite<'_, '_>| rewrite.replace(0..2, &checksum.to_be_bytes());
        for (bytes, info) in [
            (model.bytes(), FINISHED),
            (model.unfinished_bytes(), UNFINISHED),
        ] {
            let mut buf = Vec::new();
            let changed = rewritten(&bytes, info, replace, &mut buf).unwrap();
            assert_eq!(word(changed, model.checksum()), 0xffff);
        }
        // And the way back.
        model.payload[..2].copy_from_slice(&checksum.to_be_bytes());
        let back = |rewrite: &mut Rewrite<'_, '_>| rewrite.replace(0..2, &[0; 2]);
        let mut buf = Vec::new();
        let changed = rewritten(&model.bytes(), FINISHED, back, &mut buf).unwrap();
        assert_eq!(word(changed, model.checksum()), checksum);
    }
    // In TCP, 0 is a checksum like any other.
    let model = tcp(&[0; 4]);
    let checksum = word(&model.bytes(), model.checksum());
    let replace = |rewrite: &mut Rewrite<'_, '_>| rewrite.replace(0..2, &checksum.to_be_bytes());
    let mut buf = Vec::new();
    let changed = rewritten(&model.bytes(), FINISHED, replace, &mut buf).unwrap();
    assert_eq!(word(changed, model.checksum()), 0);
}

/// Receivers accept both forms of zero
#[test]
fn edits_without_effect_keep_the_checksum() {
    let model = tcp(b"abc");
    for zero in [0, 0xffff] {
        let mut bytes = model.bytes();
        put(&mut bytes, 10, zero);
        put(&mut bytes, model.checksum(), zero);
        let edit = |rewrite: &mut Rewrite<'_, '_>| {
            rewrite.set_ttl(9);
            rewrite.set_source_port(1000)?;
            rewrite.replace(1..3, b"bc")
        };
        let mut buf = Vec::new();
        assert_eq!(rewritten(&bytes, FINISHED, edit, &mut buf), Ok(&bytes[..]));
    }
}

#[test]
fn unfinished_zero_has_two_forms() {
    let mut model = udp(b"abc");
    let without = model.pseudo_header();
    let IpHeaders::Ipv4(ip, _) = &mut model.ip else {
        unreachable!();
    };
    // The first half of the source address, 10.0, makes the sum 0xffff.
    ip.source[..2].copy_from_slice(&(!without + 0x0a00).to_be_bytes());
    assert_eq!(model.pseudo_header(), 0xffff);
    for model in [model, icmp(b"abc")] {
        for zero in [0, 0xffff] {
            let mut bytes = model.bytes();
            put(&mut bytes, model.checksum(), zero);
            let mut buf = Vec::new();
            let completed = rewritten(&bytes, UNFINISHED, |_| Ok(()), &mut buf);
            assert_eq!(completed, Ok(&model.bytes()[..]));
        }
    }
}

#[test]
fn first_fragments_have_their_checksum_adjusted() {
    for model in [tcp(&[7; 40]), over_ipv6(tcp(&[7; 40]))] {
        let is_v4 = matches!(model.ip, IpHeaders::Ipv4(..));
        let to = if is_v4 { v4(1) } else { v6(1) };
        let mut expected = model.clone();
        assert!(expected.apply(&Edit::Source(to)) && expected.apply(&Edit::Destination(to)));
        assert!(expected.apply(&Edit::Ttl(3)));
        for (start, end) in [(0, 24), (24, 48), (48, 60), (0, 60)] {
            if is_v4 && end - start == 60 {
                continue;
            }
            let edit = |rewrite: &mut Rewrite<'_, '_>| {
                assert_eq!(rewrite.set_source_port(1), Err(RewriteError::Fragment));
                assert_eq!(rewrite.replace(0..0, b""), Err(RewriteError::Fragment));
                assert!(rewrite.payload().is_err());
                rewrite.set_source(to)?;
                rewrite.set_destination(to)?;
                rewrite.set_ttl(3);
                Ok(())
            };
            let bytes = fragment(&model, start, end);
            let mut buf = Vec::new();
            let changed = rewritten(&bytes, FINISHED, edit, &mut buf);
            assert_eq!(changed, Ok(&fragment(&expected, start, end)[..]));
            assert_eq!(refused(&bytes, UNFINISHED), RewriteError::Fragment);
        }
    }
}

#[test]
fn fragments_are_known_by_all_offset_bits() {
    let model = tcp(&[7; 5000]);
    let bytes = fragment(&model, 2048, 4096);
    let error = RewriteError::Fragment;
    assert_refused(&bytes, |rewrite| rewrite.set_source_port(1), error);
    let mut buf = Vec::new();
    let edit = |rewrite: &mut Rewrite<'_, '_>| rewrite.set_source(v4(1));
    let changed = rewritten(&bytes, FINISHED, edit, &mut buf).unwrap();
    assert_eq!(changed[20..], bytes[20..]);
}

/// The kernel ignores them too
#[test]
fn reserved_bits_of_fragments_are_ignored() {
    let model = over_ipv6(tcp(&[7; 40]));
    let mut bytes = fragment(&model, 0, 48);
    (bytes[41], bytes[43]) = (0xff, bytes[43] | 6);
    let mut expected = model;
    assert!(expected.apply(&Edit::Source(v6(1))));
    let mut expected = fragment(&expected, 0, 48);
    (expected[41], expected[43]) = (bytes[41], bytes[43]);
    let edit = |rewrite: &mut Rewrite<'_, '_>| rewrite.set_source(v6(1));
    let mut buf = Vec::new();
    assert_eq!(
        rewritten(&bytes, FINISHED, edit, &mut buf),
        Ok(&expected[..])
    );
}

/// An extension header behind the fragment header is in the first fragment only
#[test]
fn later_fragments_have_no_extension_headers() {
    let mut bytes = fragment(&over_ipv6(tcp(&[0; 64])), 24, 48);
    bytes[40] = 60;
    bytes[48] = 17;
    let error = RewriteError::Protocol {
        protocol: IpProtocol(60),
    };
    assert_refused(&bytes, |rewrite| rewrite.set_source(v6(1)), error);
}

/// The checksum is in another fragment
#[test]
fn tiny_first_fragments_keep_their_addresses() {
    let bytes = fragment(&tcp(&[7; 40]), 0, 8);
    let error = RewriteError::TransportHeader;
    assert_refused(&bytes, |rewrite| rewrite.set_source(v4(1)), error);
    assert_refused(&bytes, |rewrite| rewrite.set_source_port(1), error);
}

#[test]
fn protocols_without_pseudo_header_get_addresses() {
    for protocol in [4, 41, 47, 50, 132] {
        for (ip, to) in [(ipv4_headers(), v4(3)), (ipv6_headers(), v6(3))] {
            let bytes = other(ip.clone(), protocol, &[9; 30]);
            let mut expected = tcp(&[]);
            expected.ip = ip;
            assert!(expected.apply(&Edit::Source(to)) && expected.apply(&Edit::Dscp(5)));
            let expected = other(expected.ip, protocol, &[9; 30]);
            let edit = |rewrite: &mut Rewrite<'_, '_>| {
                let error = Err(RewriteError::Protocol {
                    protocol: IpProtocol(protocol),
                });
                assert_eq!(rewrite.set_source_port(1), error);
                assert_eq!(rewrite.replace(0..0, b""), error);
                rewrite.set_dscp(5)?;
                rewrite.set_source(to)
            };
            let mut buf = Vec::new();
            assert_eq!(
                rewritten(&bytes, FINISHED, edit, &mut buf),
                Ok(&expected[..])
            );
            let error = RewriteError::Protocol {
                protocol: IpProtocol(protocol),
            };
            assert_eq!(refused(&bytes, UNFINISHED), error);
        }
    }
}

/// UDP-Lite, DCCP, AH, no next header, and ICMP of the other IP version
#[test]
fn unknown_protocols_keep_their_addresses() {
    for (ip, to, protocols) in [
        (ipv4_headers(), v4(3), [136, 33, 51, 59, 58]),
        (ipv6_headers(), v6(3), [136, 33, 51, 59, 1]),
    ] {
        for protocol in protocols {
            let bytes = other(ip.clone(), protocol, &[6; 30]);
            let error = RewriteError::Protocol {
                protocol: IpProtocol(protocol),
            };
            assert_refused(&bytes, |rewrite| rewrite.set_source(to), error);
            assert_refused(&bytes, |rewrite| rewrite.set_destination(to), error);
            assert_refused(&bytes, |rewrite| rewrite.set_source_port(1), error);
            assert_refused(&bytes, |rewrite| rewrite.replace(0..0, b""), error);
            let edit = |rewrite: &mut Rewrite<'_, '_>| {
                rewrite.set_ttl(77);
                Ok(())
            };
            let mut buf = Vec::new();
            let changed = rewritten(&bytes, FINISHED, edit, &mut buf).unwrap();
            assert_eq!(changed[if bytes[0] == 0x60 { 7 } else { 8 }], 77);
        }
    }
}

#[test]
fn incomplete_transport_headers_are_kept() {
    let mut short_offset = tcp(b"").bytes();
    short_offset[32] = 0x40;
    let mut long_offset = tcp(b"abc").bytes();
    long_offset[32] = 0x60;
    for bytes in [
        short_offset,
        long_offset,
        other(ipv4_headers(), 6, &[0x50; 19]),
        other(ipv4_headers(), 6, b""),
        other(ipv6_headers(), 17, &[0; 7]),
        other(ipv6_headers(), 58, &[0; 7]),
    ] {
        let to = if bytes[0] == 0x60 { v6(1) } else { v4(1) };
        let error = RewriteError::TransportHeader;
        assert_refused(&bytes, |rewrite| rewrite.set_source(to), error);
        assert_refused(&bytes, |rewrite| rewrite.replace(0..0, b""), error);
        assert_eq!(refused(&bytes, UNFINISHED), error);
    }
}

#[test]
fn addresses_of_the_other_version_are_refused() {
    let error = RewriteError::AddressVersion;
    let bytes = tcp(b"").bytes();
    assert_refused(&bytes, |rewrite| rewrite.set_source(v6(1)), error);
    assert_refused(&bytes, |rewrite| rewrite.set_destination(v6(1)), error);
    let bytes = over_ipv6(tcp(b"")).bytes();
    assert_refused(&bytes, |rewrite| rewrite.set_source(v4(1)), error);
}

#[test]
fn icmp_has_no_ports() {
    let bytes = icmp(b"quoted").bytes();
    let error = RewriteError::Protocol {
        protocol: IpProtocol(1),
    };
    assert_refused(&bytes, |rewrite| rewrite.set_source_port(1), error);
    assert_refused(&bytes, |rewrite| rewrite.set_destination_port(1), error);
}

#[test]
fn traffic_class_values_are_bounded() {
    for bytes in [tcp(b"").bytes(), over_ipv6(tcp(b"")).bytes()] {
        let error = RewriteError::Value { value: 64, max: 63 };
        assert_refused(&bytes, |rewrite| rewrite.set_dscp(64), error);
        let error = RewriteError::Value { value: 4, max: 3 };
        assert_refused(&bytes, |rewrite| rewrite.set_ecn(4), error);
    }
}

#[test]
#[expect(clippy::reversed_empty_ranges, reason = "it is refused")]
fn ranges_outside_the_payload_are_refused() {
    let bytes = tcp(b"abc").bytes();
    for range in [0..4, 4..4, 2..1, usize::MAX..usize::MAX, 0..usize::MAX] {
        let error = RewriteError::Range {
            start: range.start,
            end: range.end,
            len: 3,
        };
        assert_refused(&bytes, |rewrite| rewrite.replace(range, b"x"), error);
    }
}

#[test]
fn wrong_udp_lengths_keep_the_payload() {
    for wrong in [0, 7, 10, 12] {
        let mut bytes = udp(b"abc").bytes();
        put(&mut bytes, 24, wrong);
        let error = RewriteError::UdpLength;
        assert_refused(&bytes, |rewrite| rewrite.replace(0..1, b"x"), error);
        let edit = |rewrite: &mut Rewrite<'_, '_>| {
            assert!(rewrite.payload().is_err());
            rewrite.set_source_port(9)
        };
        let mut buf = Vec::new();
        let changed = rewritten(&bytes, FINISHED, edit, &mut buf).unwrap();
        assert_eq!((word(changed, 20), word(changed, 24)), (9, wrong));
    }
}

#[test]
fn routing_headers_keep_the_destination() {
    let model = routed(1);
    let bytes = model.bytes();
    let error = RewriteError::RoutingHeader;
    assert_refused(&bytes, |rewrite| rewrite.set_destination(v6(1)), error);
    assert_eq!(refused(&model.unfinished_bytes(), UNFINISHED), error);
    // Other changes do not need the destination.
    let mut expected = model;
    assert!(expected.apply(&Edit::Source(v6(1))));
    expected.payload.push(b'x');
    let edit = |rewrite: &mut Rewrite<'_, '_>| {
        rewrite.set_source(v6(1))?;
        rewrite.replace(7..7, b"x")
    };
    let mut buf = Vec::new();
    assert_eq!(
        rewritten(&bytes, FINISHED, edit, &mut buf),
        Ok(&expected.bytes()[..])
    );

    let mut reached = routed(0);
    let mut buf = Vec::new();
    let edit = |rewrite: &mut Rewrite<'_, '_>| rewrite.set_destination(v6(1));
    let changed = rewritten(&reached.bytes(), FINISHED, edit, &mut buf).map(<[u8]>::to_vec);
    assert!(reached.apply(&Edit::Destination(v6(1))));
    assert_eq!(changed, Ok(reached.bytes()));
}

/// The outer checksum is finished or 0; that of a packet in the payload is not
#[test]
fn unfinished_tunnels_are_refused() {
    let mut vxlan = udp(&tcp(b"inner").unfinished_bytes());
    assert_eq!(refused(&vxlan.bytes(), UNFINISHED), RewriteError::Tunnel);
    vxlan.unchecked = true;
    assert_eq!(refused(&vxlan.bytes(), UNFINISHED), RewriteError::Tunnel);
    let bytes = over_ipv6(vxlan).bytes();
    assert_eq!(refused(&bytes, UNFINISHED), RewriteError::Tunnel);
    let bytes = icmp(b"finished").bytes();
    assert_eq!(refused(&bytes, UNFINISHED), RewriteError::Tunnel);
}

#[test]
fn unsegmented_packets_must_not_become_shorter() {
    let model = tcp(&[7; 5000]);
    let bytes = model.unfinished_bytes();
    let info = GSO | UNFINISHED;
    for (replaced, with) in [(10, 10), (10, 11), (0, 4000)] {
        let with = vec![1; with];
        let mut expected = model.clone();
        expected.payload.splice(..replaced, with.iter().copied());
        let edit = |rewrite: &mut Rewrite<'_, '_>| {
            // A shorter packet can grow again.
            rewrite.replace(0..replaced, b"")?;
            rewrite.replace(0..0, &with)
        };
        let mut buf = Vec::new();
        assert_eq!(
            rewritten(&bytes, info, edit, &mut buf),
            Ok(&expected.bytes()[..])
        );
    }
    let edit = |rewrite: &mut Rewrite<'_, '_>| rewrite.replace(0..10, &[1; 9]);
    let error = RewriteError::Shortened {
        needed: bytes.len(),
        had: bytes.len() - 1,
    };
    let mut buf = Vec::new();
    assert_eq!(rewritten(&bytes, info, edit, &mut buf), Err(error));
}

#[test]
fn unsegmented_udp_is_refused() {
    for info in [GSO, GSO | UNFINISHED] {
        let error = refused(&udp(&[7; 5000]).unfinished_bytes(), info);
        assert_eq!(error, RewriteError::UdpGso);
    }
}

#[test]
fn results_fit_a_verdict_and_the_buffer() {
    let model = udp(b"abc");
    let bytes = model.bytes();
    let message = message(&bytes, FINISHED);
    let packet = Packet::parse(&message).unwrap();
    let max = MAX_PAYLOAD - (bytes.len() - 3);

    let mut buf = vec![0; 2 * MAX_PAYLOAD];
    let mut rewriter = Rewriter::new(&mut buf);
    let mut rewrite = rewriter.begin(&packet).unwrap();
    let too_long = RewriteError::TooLong {
        needed: MAX_PAYLOAD + 1,
        max: MAX_PAYLOAD,
    };
    assert_eq!(rewrite.replace(0..3, &vec![1; max + 1]), Err(too_long));
    assert_eq!(rewrite.payload(), Ok(&b"abc"[..]));
    assert_eq!(rewrite.replace(0..3, &vec![1; max]), Ok(()));
    let mut expected = model;
    expected.payload = vec![1; max];
    assert_eq!(rewrite.finish(), Ok(&expected.bytes()[..]));

    let no_space = |needed, had| RewriteError::NoSpace { needed, had };
    let mut buf = vec![0; bytes.len() + 1];
    let mut rewriter = Rewriter::new(&mut buf);
    let mut rewrite = rewriter.begin(&packet).unwrap();
    let error = no_space(bytes.len() + 2, bytes.len() + 1);
    assert_eq!(rewrite.replace(1..1, b"xx"), Err(error));
    assert_eq!(rewrite.payload(), Ok(&b"abc"[..]));
    assert_eq!(rewrite.replace(1..1, b"x"), Ok(()));
    assert_eq!(rewrite.payload(), Ok(&b"axbc"[..]));

    let mut buf = vec![0; bytes.len() - 1];
    let error = no_space(bytes.len(), bytes.len() - 1);
    assert_eq!(complete_checksums(&packet, &mut buf), Err(error));
}

#[test]
fn packets_without_a_whole_payload_are_refused() {
    let bytes = tcp(b"abc").bytes();
    let new = |family, attrs: &[(u16, &[u8])]| {
        let message = MessageBuilder::packet(family, QUEUE)
            .attr(NFQA_PACKET_HDR, PACKET_HDR)
            .attrs(attrs.iter().copied())
            .build();
        let mut buf = [0; 100];
        let mut rewriter = Rewriter::new(&mut buf);
        let made = rewriter.begin(&Packet::parse(&message).unwrap());
        made.map(|_| ())
    };
    let payload = (NFQA_PAYLOAD, &bytes[..]);
    assert_eq!(new(Family::INET, &[payload]), Ok(()));
    assert_eq!(new(Family::INET, &[]), Err(RewriteError::NoPayload));
    let truncated = [(NFQA_CAP_LEN, &[0, 0, 5, 0][..]), payload];
    assert_eq!(new(Family::INET, &truncated), Err(RewriteError::Truncated));
    assert_eq!(new(Family::BRIDGE, &[payload]), Err(RewriteError::Bridged));
    for family in [Family::INET6, Family::ARP, Family::UNSPEC] {
        assert_eq!(new(family, &[payload]), Err(RewriteError::IpHeader));
    }
}

#[test]
fn broken_ip_headers_are_refused() {
    let v4 = tcp(b"abc").bytes();
    let v6 = routed(0).bytes();
    let changed = |bytes: &[u8], at: usize, byte| {
        let mut bytes = bytes.to_vec();
        bytes[at] = byte;
        bytes
    };
    for bytes in [
        v4[..19].to_vec(),
        changed(&v4, 0, 0x44),
        changed(&v4, 0, 0x4f),
        changed(&v4, 0, 0x55),
        v6[..39].to_vec(),
        v6[..47].to_vec(),
        changed(&v6, 41, 20),
    ] {
        assert_eq!(refused(&bytes, FINISHED), RewriteError::IpHeader);
    }
    for (bytes, at) in [(&v4, 3), (&v6, 5)] {
        for byte in [0, bytes[at] - 1, bytes[at] + 1] {
            let had = bytes.len();
            let stated = had - usize::from(bytes[at]) + usize::from(byte);
            let error = RewriteError::IpLength { stated, had };
            assert_eq!(refused(&changed(bytes, at, byte), FINISHED), error);
        }
    }
}
