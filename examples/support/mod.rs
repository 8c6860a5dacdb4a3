//! Shared by the examples: their command line, and IP packets read with etherparse
#![allow(dead_code, reason = "each example uses a part of it")]

use std::error::Error;

use etherparse::{NetHeaders, NetSlice, PacketHeaders, SlicedPacket, TransportSlice};

/// Protocol, source and destination of an IP packet, with ports if present
pub(crate) fn endpoints(packet: &[u8]) -> String {
    let Ok(packet) = SlicedPacket::from_ip(packet) else {
        return "not IP, or not all of it".to_owned();
    };
    let (from, to) = match &packet.net {
        Some(NetSlice::Ipv4(ip)) => (
            ip.header().source_addr().to_string(),
            ip.header().destination_addr().to_string(),
        ),
        Some(NetSlice::Ipv6(ip)) => (
            format!("[{}]", ip.header().source_addr()),
            format!("[{}]", ip.header().destination_addr()),
        ),
        _ => return "not IP".to_owned(),
    };
    match &packet.transport {
        Some(TransportSlice::Udp(udp)) => {
            let (source, destination) = (udp.source_port(), udp.destination_port());
            format!("UDP {from}:{source} -> {to}:{destination}")
        }
        Some(TransportSlice::Tcp(tcp)) => {
            let (source, destination) = (tcp.source_port(), tcp.destination_port());
            format!("TCP {from}:{source} -> {to}:{destination}")
        }
        Some(TransportSlice::Icmpv4(_) | TransportSlice::Icmpv6(_)) => {
            format!("ICMP {from} -> {to}")
        }
        _ => format!("{from} -> {to}"),
    }
}

/// The destination port of a UDP or TCP packet
pub(crate) fn destination_port(packet: &[u8]) -> Option<u16> {
    match SlicedPacket::from_ip(packet).ok()?.transport? {
        TransportSlice::Udp(udp) => Some(udp.destination_port()),
        TransportSlice::Tcp(tcp) => Some(tcp.destination_port()),
        _ => None,
    }
}

/// Reads a number after each name on the command line; absent numbers have the given defaults
pub(crate) fn numbers<const N: usize>(
    options: [(&str, usize); N],
) -> Result<[usize; N], Box<dyn Error + Send + Sync>> {
    let names = options.map(|(name, _)| name);
    let mut numbers = options.map(|(_, default)| default);
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let place = names.iter().position(|known| *known == name);
        let number = arguments.next().and_then(|number| number.parse().ok());
        match (place, number) {
            (Some(place), Some(number)) => numbers[place] = number,
            _ => return Err(format!("these take a number each: {}", names.join(", ")).into()),
        }
    }
    Ok(numbers)
}

/// Copies a UDP packet with a new payload, lengths and checksums; `None` for other protocols
pub(crate) fn with_udp_payload(packet: &[u8], payload: &[u8]) -> Option<Vec<u8>> {
    let PacketHeaders {
        net: Some(mut net),
        transport: Some(mut transport),
        ..
    } = PacketHeaders::from_ip_slice(packet).ok()?
    else {
        return None;
    };
    let len = transport.header_len() + payload.len();
    transport.mut_udp()?.length = len.try_into().ok()?;
    let mut new = Vec::new();
    match &mut net {
        NetHeaders::Ipv4(ip, _) => {
            ip.set_payload_len(len).ok()?;
            ip.header_checksum = ip.calc_header_checksum();
            ip.write(&mut new).ok()?;
            transport.update_checksum_ipv4(ip, payload).ok()?;
        }
        NetHeaders::Ipv6(ip, _) => {
            ip.set_payload_length(len).ok()?;
            ip.write(&mut new).ok()?;
            transport.update_checksum_ipv6(ip, payload).ok()?;
        }
        NetHeaders::Arp(_) => return None,
    }
    transport.write(&mut new).ok()?;
    new.extend(payload);
    Some(new)
}
