//! Conntrack entries, flows and rewriting: getters never fail, and a checksum stays as right or as
//! wrong as it was
#![no_main]

use std::fmt::Write as _;
use std::net::IpAddr;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nfqnl_proto::consts::{
    NFQA_CT, NFQA_CT_INFO, NFQA_PACKET_HDR, NFQA_PAYLOAD, NFQA_SKB_INFO, NFQNL_MSG_PACKET,
    message_type,
};
use nfqnl_proto::rewrite::Rewriter;
use nfqnl_proto::{
    Conntrack, ConntrackStatus, ConntrackUpdate, Decision, Direction, FlowKey, Labels, Packet,
    RequestHeader, SkbInfo, Verdict,
};

#[derive(Arbitrary, Debug)]
enum Edit<'a> {
    Source(IpAddr),
    Destination(IpAddr),
    SourcePort(u16),
    DestinationPort(u16),
    Ttl(u8),
    Dscp(u8),
    Ecn(u8),
    Replace(u8, u8, &'a [u8]),
}

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    skb_info: u8,
    ct_info: u32,
    entry: &'a [u8],
    edits: Vec<Edit<'a>>,
    /// Gives the payload a right length and right checksums first
    is_repaired: bool,
    payload: &'a [u8],
}

/// A writer that drops the text
struct Nowhere;

impl std::fmt::Write for Nowhere {
    fn write_str(&mut self, _: &str) -> std::fmt::Result {
        Ok(())
    }
}

fn attr(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    message.resize(message.len().next_multiple_of(4), 0);
    message.extend(u16::try_from(value.len() + 4).unwrap().to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
}

/// The ones' complement sum of words, without the final complement
fn sum(bytes: &[u8]) -> u32 {
    let words = bytes
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | word.get(1).copied().map_or(0, u32::from));
    words.sum()
}

const fn fold(mut sum: u32) -> u32 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}

/// The place of the transport header, its protocol, and the place of its checksum
fn transport(packet: &[u8]) -> Option<(usize, u8, usize)> {
    let (at, protocol) = match packet.first()? >> 4 {
        4 => (usize::from(packet[0] & 15) * 4, *packet.get(9)?),
        // Without extension headers
        6 => (40, *packet.get(6)?),
        _ => return None,
    };
    let checksum = match protocol {
        6 => 16,
        17 => 6,
        1 | 58 => 2,
        _ => return None,
    };
    let has_room = packet.len() >= at + checksum + 2;
    has_room.then_some((at, protocol, at + checksum))
}

/// The error of the transport checksum: 0 or 0xffff if it is right
fn error(packet: &[u8]) -> Option<u32> {
    let (at, protocol, checksum) = transport(packet)?;
    let is_v4 = packet[0] >> 4 == 4;
    if is_v4 && protocol == 17 && packet[checksum..checksum + 2] == [0, 0] {
        return None; // no checksum
    }
    let addresses = if is_v4 {
        &packet[12..20]
    } else {
        &packet[8..40]
    };
    let pseudo = match (is_v4, protocol) {
        (true, 1) => 0,
        _ => sum(addresses) + u32::from(protocol) + u32::try_from(packet.len() - at).unwrap(),
    };
    Some(fold(pseudo + sum(&packet[at..])) % 0xffff)
}

/// Sets lengths and checksums
fn repair(packet: &mut [u8]) {
    let len = u16::try_from(packet.len()).unwrap();
    match packet.first().map(|first| first >> 4) {
        Some(4) if packet.len() >= 20 => {
            packet[2..4].copy_from_slice(&len.to_be_bytes());
            packet[6..8].copy_from_slice(&[0, 0]);
            packet[10..12].copy_from_slice(&[0, 0]);
            let header = (usize::from(packet[0] & 15) * 4).min(packet.len());
            let checksum = !fold(sum(&packet[..header])) as u16;
            packet[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
        Some(6) if packet.len() >= 40 => {
            packet[4..6].copy_from_slice(&(len - 40).to_be_bytes());
        }
        _ => return,
    }
    if let Some((at, protocol, checksum)) = transport(packet) {
        if protocol == 17 {
            let len = u16::try_from(packet.len() - at).unwrap();
            packet[at + 4..at + 6].copy_from_slice(&len.to_be_bytes());
        }
        packet[checksum..checksum + 2].copy_from_slice(&[0xff, 0xff]);
        if let Some(error) = error(packet) {
            let right = (0xffff + 0xffff - error) % 0xffff;
            let right = if right == 0 { 0xffff } else { right };
            packet[checksum..checksum + 2].copy_from_slice(&(right as u16).to_be_bytes());
        }
    }
}

fn visit(entry: Conntrack<'_>) {
    write!(Nowhere, "{entry:?} {:?} {:?}", entry.tcp(), entry.labels()).unwrap();
    for direction in [Direction::Original, Direction::Reply] {
        let _ = entry.counters(direction);
        let Some(tuple) = entry.tuple(direction) else {
            continue;
        };
        let _ = (tuple.icmp_id(), tuple.icmp_code(), tuple.zone());
        if let Some(flow) = tuple.flow() {
            assert_eq!(flow.reversed().reversed(), flow);
        }
        if let Some(tcp) = entry.tcp() {
            let _ = (tcp.window_scale(direction), tcp.flags(direction));
        }
    }
    let _ = (entry.zone(), entry.timeout(), entry.master(), entry.start());
    let _ = (entry.stop(), entry.helper(), entry.security_context());
    let labels = entry.labels().unwrap_or_default();
    assert_eq!(labels.iter().collect::<Labels>(), labels);
}

fn update(entry: Conntrack<'_>, input: &Input<'_>) {
    let mut update = ConntrackUpdate::new(&entry);
    let bits = ConntrackStatus::from_bits_retain(input.ct_info);
    let labels = entry.labels().unwrap_or_default();
    for change in [
        update.timeout(std::time::Duration::from_millis(input.ct_info.into())),
        update.status(bits),
        update.detach_helper(),
        update.labels(labels, labels.with(input.skb_info)),
        update.mark(input.ct_info, !input.ct_info),
    ] {
        update = change.unwrap_or(update);
    }
    for decision in [
        Verdict::Accept.with_conntrack(&update),
        Verdict::Accept.with_ct_mark(input.ct_info, 0xff),
        Decision::from(Verdict::Drop).with_raw_conntrack(input.entry),
    ] {
        let mut buf = vec![0; decision.max_len()];
        let header = RequestHeader::default();
        decision
            .encode(&mut buf, 1, 1, header)
            .expect("it has room");
    }
}

fuzz_target!(|input: Input<'_>| {
    let mut payload = input.payload.get(..2000).unwrap_or(input.payload).to_vec();
    if input.is_repaired {
        repair(&mut payload);
    }
    let entry = input.entry.get(..2000).unwrap_or(input.entry);
    let mut message = vec![0; 20];
    message[4..6].copy_from_slice(&message_type(NFQNL_MSG_PACKET).to_ne_bytes());
    message[16] = match payload.first() {
        Some(first) if first >> 4 == 6 => 10,
        _ => 2,
    };
    attr(&mut message, NFQA_PACKET_HDR, &[0, 0, 0, 1, 8, 0, 0]);
    attr(&mut message, NFQA_CT, entry);
    attr(&mut message, NFQA_CT_INFO, &input.ct_info.to_be_bytes());
    attr(&mut message, NFQA_SKB_INFO, &[0, 0, 0, input.skb_info]);
    attr(&mut message, NFQA_PAYLOAD, &payload);
    let len = u32::try_from(message.len()).unwrap();
    message[..4].copy_from_slice(&len.to_ne_bytes());
    let packet = Packet::parse(&message).expect("it is a packet");

    visit(packet.conntrack().expect("it has an entry"));
    update(packet.conntrack().expect("it has an entry"), &input);
    let _ = packet
        .ct_state()
        .map(|state| (state.direction(), state.is_new()));
    let flow = packet.flow();
    assert_eq!(flow, FlowKey::parse(&payload));
    if let Some(flow) = flow {
        assert_eq!(flow.reversed().reversed(), flow);
    }

    let mut buf = [0; 4096];
    let mut rewriter = Rewriter::new(&mut buf);
    let Ok(mut rewrite) = rewriter.begin(&packet) else {
        return;
    };
    for edit in &input.edits {
        let before = rewrite.payload().unwrap_or_default().to_vec();
        let result = match *edit {
            Edit::Source(address) => rewrite.set_source(address),
            Edit::Destination(address) => rewrite.set_destination(address),
            Edit::SourcePort(port) => rewrite.set_source_port(port),
            Edit::DestinationPort(port) => rewrite.set_destination_port(port),
            Edit::Ttl(ttl) => {
                rewrite.set_ttl(ttl);
                Ok(())
            }
            Edit::Dscp(dscp) => rewrite.set_dscp(dscp),
            Edit::Ecn(ecn) => rewrite.set_ecn(ecn),
            Edit::Replace(start, end, bytes) => {
                let range = usize::from(start)..usize::from(end);
                let result = rewrite.replace(range.clone(), bytes);
                if result.is_ok() {
                    let mut expected = before.clone();
                    expected.splice(range, bytes.iter().copied());
                    assert_eq!(rewrite.payload().expect("it was replaced"), expected);
                }
                result
            }
        };
        if result.is_err() {
            assert_eq!(
                rewrite.payload().unwrap_or_default(),
                before,
                "a refused edit changes nothing"
            );
        }
    }
    let Ok(new) = rewrite.finish() else {
        return;
    };
    // The same length in the IP header, and the same headers as Linux 7.2 compares
    match payload[0] >> 4 {
        4 => {
            assert_eq!(usize::from(u16::from_be_bytes([new[2], new[3]])), new.len());
            assert_eq!((new[0], &new[6..8]), (payload[0], &payload[6..8]));
            let header = usize::from(new[0] & 15) * 4;
            assert_eq!(new[20..header], payload[20..header]);
            let errors = [&payload, new].map(|packet| fold(sum(&packet[..header])) % 0xffff);
            assert_eq!(errors[0], errors[1], "the IP checksum");
        }
        _ => {
            assert_eq!(
                usize::from(u16::from_be_bytes([new[4], new[5]])) + 40,
                new.len()
            );
            assert_eq!(new[6], payload[6]);
        }
    }
    let is_fragment =
        payload[0] >> 4 == 4 && u16::from_be_bytes([payload[6], payload[7]]) & 0x3fff != 0;
    let is_unfinished = packet.skb_info().contains(SkbInfo::CSUM_NOT_READY);
    if let (Some(old), Some(new_error), false) = (error(&payload), error(new), is_fragment) {
        if is_unfinished {
            assert_eq!(new_error, 0, "a full checksum is right");
        } else {
            assert_eq!(old, new_error, "the checksum stays as wrong as it was");
        }
    }
});
