//! IPv6 extension headers

use byteorder::{BigEndian, ByteOrder};

use crate::types::IpProtocol;

const HOP_BY_HOP: IpProtocol = IpProtocol(0);
pub(crate) const ROUTING: IpProtocol = IpProtocol(43);
pub(crate) const FRAGMENT: IpProtocol = IpProtocol(44);
pub(crate) const AUTHENTICATION: IpProtocol = IpProtocol(51);
const DESTINATION_OPTIONS: IpProtocol = IpProtocol(60);

/// Returns true for the headers that the kernel skips (`ipv6_ext_hdr` in `net/ipv6/exthdrs_core.c`)
pub(crate) const fn is_extension(number: IpProtocol) -> bool {
    matches!(
        number,
        HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION_OPTIONS
    )
}

/// Returns the length of an extension header; none is shorter than 8 bytes
pub(crate) fn extension_len(number: IpProtocol, header: &[u8; 8]) -> usize {
    match number {
        FRAGMENT => 8,
        AUTHENTICATION => (usize::from(header[1]) + 2) * 4,
        _ => (usize::from(header[1]) + 1) * 8,
    }
}

/// Returns the offset in a fragment header, in bytes; 0 for the first fragment
pub(crate) fn fragment_offset(header: &[u8; 8]) -> u16 {
    BigEndian::read_u16(&header[2..4]) & !7
}
