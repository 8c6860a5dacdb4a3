//! Changed copies of packets, with right lengths and checksums

use core::net::IpAddr;
use core::ops::Range;

use thiserror::Error;

use crate::consts::MAX_PAYLOAD;
use crate::packet::{Packet, SkbInfo};
use crate::types::Family;

const HOP_BY_HOP: u8 = 0;
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const ICMPV6: u8 = 58;
const DESTINATION_OPTIONS: u8 = 60;

/// Protocols without a checksum over the addresses: IPv4 and IPv6 in IP, GRE, ESP and SCTP
const ADDRESSES_UNCOVERED: [u8; 5] = [4, 41, 47, 50, 132];

/// The offset of the header checksum in an IPv4 header
const IPV4_CHECKSUM: usize = 10;
const IPV6_HEADER_LEN: usize = 40;

/// A changed copy of a packet, for [`Decision::with_payload`](crate::Decision::with_payload)
///
/// The copy is in the caller's buffer. Each change also sets the lengths and checksums that it
/// affects. A wrong checksum stays wrong by the same difference, so the receiver still finds the
/// damage. Unfinished checksums ([`SkbInfo::CSUM_NOT_READY`]) are completed.
///
/// Changes that the kernel or the receiver would not accept are refused: see [`RewriteError`]. An
/// error leaves the copy as it was.
///
/// ```
/// use nfqnl_proto::rewrite::{Rewrite, RewriteError};
/// use nfqnl_proto::{Decision, Packet, Verdict};
///
/// fn answer<'b>(packet: &Packet<'_>, buf: &'b mut [u8]) -> Result<Decision<'b>, RewriteError> {
///     let mut rewrite = Rewrite::new(packet, buf)?;
///     rewrite.set_ttl(64);
///     if rewrite.payload().starts_with(b"ping") {
///         rewrite.replace(1..2, b"o")?;
///     }
///     Ok(Verdict::Accept.with_payload(rewrite.finish()?))
/// }
/// # let message = [
/// #     &68u32.to_ne_bytes()[..], &0x0300u16.to_ne_bytes(), &[0; 10], &[2, 0, 0, 1],
/// #     &11u16.to_ne_bytes(), &1u16.to_ne_bytes(), &[0, 0, 0, 9, 8, 0, 3, 0],
/// #     &36u16.to_ne_bytes(), &10u16.to_ne_bytes(),
/// #     &[0x45, 0, 0, 32, 0, 0, 0, 0, 2, 17, 0xba, 0xcb, 127, 0, 0, 1, 127, 0, 0, 1],
/// #     &[0, 7, 0, 7, 0, 12, 0, 0], b"ping",
/// # ].concat();
/// # let packet = Packet::parse(&message).unwrap();
/// # let mut buf = [0; 32];
/// # let payload = answer(&packet, &mut buf).unwrap().payload().unwrap();
/// # assert_eq!(payload[..12], [0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0x7c, 0xcb]);
/// # assert_eq!(payload[20..], *b"\0\x07\0\x07\0\x0c\0\0pong");
/// ```
///
/// # Left to the caller
/// * TCP sequence numbers, if the length of a TCP payload changes. The kernel does not adjust
///   them, and its connection tracking then finds later segments out of window.
/// * The MTU. The kernel may fragment or drop a packet that has become too long.
/// * The flow. The kernel knows it by the old addresses and ports, and its NAT still applies.
/// * The order of verdicts. Answer the first packets of a flow in the order of their arrival.
/// * Inner packets. Those in ICMP errors and in tunnels stay as they are, as do the encrypted
///   checksums of ESP in transport mode, which cover the addresses.
///
/// Since Linux 7.1 the kernel drops rewritten packets in a network namespace of a user namespace
/// other than the initial one.
#[must_use]
pub struct Rewrite<'b> {
    buf: &'b mut [u8],
    /// The length of the packet in `buf`
    len: usize,
    original_len: usize,
    ip: Ip,
    transport: Result<Transport, RewriteError>,
    /// The transport checksum has only the sum of the pseudo-header
    is_unfinished: bool,
    is_gso: bool,
}

impl<'b> Rewrite<'b> {
    /// Copies the packet's payload to the front of `buf`
    ///
    /// # Errors
    /// The buffer is too small, or the packet cannot be rewritten. `buf` may have changed.
    pub fn new(packet: &Packet<'_>, buf: &'b mut [u8]) -> Result<Self, RewriteError> {
        let bytes = packet.payload();
        if bytes.is_empty() {
            return Err(RewriteError::NoPayload);
        }
        if packet.is_truncated() {
            return Err(RewriteError::Truncated);
        }
        if packet.family() == Family::BRIDGE {
            return Err(RewriteError::Bridged);
        }
        let ip = Ip::parse(packet.family(), bytes).ok_or(RewriteError::IpHeader)?;
        let stated = ip.stated_len(bytes);
        if stated != bytes.len() {
            let had = bytes.len();
            return Err(RewriteError::IpLength { stated, had });
        }
        let info = packet.skb_info();
        let is_gso = info.contains(SkbInfo::GSO);
        if is_gso && ip.protocol == UDP {
            return Err(RewriteError::UdpGso);
        }
        let (needed, had) = (bytes.len(), buf.len());
        let Some(copy) = buf.get_mut(..needed) else {
            return Err(RewriteError::NoSpace { needed, had });
        };
        copy.copy_from_slice(bytes);
        let rewrite = Self {
            buf,
            len: bytes.len(),
            original_len: bytes.len(),
            ip,
            transport: ip.find_transport(bytes),
            is_unfinished: info.contains(SkbInfo::CSUM_NOT_READY),
            is_gso,
        };
        if rewrite.is_unfinished {
            rewrite.check_unfinished()?;
        }
        Ok(rewrite)
    }

    /// Sets the source address
    ///
    /// # Errors
    /// The address is of the other IP version, or the transport header is unknown or incomplete.
    pub fn set_source(&mut self, addr: IpAddr) -> Result<(), RewriteError> {
        self.set_address(0, addr)
    }

    /// Sets the destination address
    ///
    /// # Errors
    /// The address is of the other IP version, the transport header is unknown or incomplete, or a
    /// routing header has the final destination.
    pub fn set_destination(&mut self, addr: IpAddr) -> Result<(), RewriteError> {
        if self.ip.is_routed {
            return Err(RewriteError::RoutingHeader);
        }
        self.set_address(1, addr)
    }

    /// Sets the source port
    ///
    /// # Errors
    /// The protocol is neither TCP nor UDP, or the packet is a fragment.
    pub fn set_source_port(&mut self, port: u16) -> Result<(), RewriteError> {
        self.set_port(0, port)
    }

    /// Sets the destination port
    ///
    /// # Errors
    /// The protocol is neither TCP nor UDP, or the packet is a fragment.
    pub fn set_destination_port(&mut self, port: u16) -> Result<(), RewriteError> {
        self.set_port(2, port)
    }

    /// Sets the TTL, or the hop limit of IPv6
    #[doc(alias = "set_hop_limit")]
    pub fn set_ttl(&mut self, ttl: u8) {
        self.set(if self.ip.is_v4 { 8 } else { 7 }, &[ttl], None);
    }

    /// Sets the differentiated services code point, a number below 64
    ///
    /// # Errors
    /// The number is too large.
    #[doc(alias = "tos")]
    pub fn set_dscp(&mut self, dscp: u8) -> Result<(), RewriteError> {
        self.set_traffic_class(dscp, 0x3f, 2)
    }

    /// Sets the congestion notification, a number below 4
    ///
    /// 0: not supported, 1: ECT(1), 2: ECT(0), 3: congestion experienced.
    ///
    /// # Errors
    /// The number is too large.
    pub fn set_ecn(&mut self, ecn: u8) -> Result<(), RewriteError> {
        self.set_traffic_class(ecn, 3, 0)
    }

    /// The transport payload: the bytes behind the TCP or UDP header, or behind 8 bytes of ICMP
    ///
    /// Empty if [`replace`](Self::replace) cannot change it.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        let bytes = self.payload_offset().map(|at| self.buf.get(at..self.len));
        bytes.unwrap_or_default().unwrap_or_default()
    }

    /// Replaces a range of the [`payload`](Self::payload) by bytes of any length
    ///
    /// # Errors
    /// The range is not in the payload, the result is too long for a verdict or for the buffer,
    /// the protocol is unknown, or the packet is a fragment.
    pub fn replace(&mut self, range: Range<usize>, bytes: &[u8]) -> Result<(), RewriteError> {
        let at = self.payload_offset()?;
        let payload_len = self.len.saturating_sub(at);
        if range.start > range.end || range.end > payload_len {
            return Err(RewriteError::Range {
                start: range.start,
                end: range.end,
                len: payload_len,
            });
        }
        let len = self.len - range.len() + bytes.len();
        if len > MAX_PAYLOAD {
            let max = MAX_PAYLOAD;
            return Err(RewriteError::TooLong { needed: len, max });
        }
        let had = self.buf.len();
        if len > had {
            return Err(RewriteError::NoSpace { needed: len, had });
        }
        let (start, end) = (at + range.start, at + range.end);
        if len == self.len {
            self.set(start, bytes, Some(self.transport?.checksum));
            return Ok(());
        }
        // The bytes behind the range move. By an odd distance, their sum changes too.
        let old = self.sum(start..self.len);
        self.buf.copy_within(end..self.len, start + bytes.len());
        if let Some(place) = self.buf.get_mut(start..start + bytes.len()) {
            place.copy_from_slice(bytes);
        }
        let new = self.sum(start..len);
        self.adjust(self.transport?.checksum, old, new);
        self.set_len(len)
    }

    /// Returns the changed packet
    ///
    /// # Errors
    /// [`RewriteError::Shortened`] if an unsegmented packet has become shorter.
    pub fn finish(mut self) -> Result<&'b [u8], RewriteError> {
        if self.is_gso && self.len < self.original_len {
            return Err(RewriteError::Shortened {
                needed: self.original_len,
                had: self.len,
            });
        }
        if self.is_unfinished {
            let at = self.transport?.checksum;
            self.put(at, 0);
            let sum = self.sum(self.ip.transport..self.len);
            self.put_checksum(at, !add(self.pseudo_header_sum(), sum));
        }
        let buf: &'b [u8] = self.buf;
        Ok(buf.get(..self.len).unwrap_or_default())
    }

    /// Checks that an unfinished checksum is that of the outer transport header
    fn check_unfinished(&self) -> Result<(), RewriteError> {
        let at = self.whole_transport()?.checksum;
        if self.ip.is_routed {
            return Err(RewriteError::RoutingHeader);
        }
        // Two forms of zero are equal.
        match add(self.word(at), !self.pseudo_header_sum()) {
            0 | 0xffff => Ok(()),
            _ => Err(RewriteError::Tunnel),
        }
    }

    /// The transport header of a packet that is not a fragment
    fn whole_transport(&self) -> Result<Transport, RewriteError> {
        match self.ip.fragment {
            Fragment::No => self.transport,
            Fragment::First | Fragment::Later => self.transport.and(Err(RewriteError::Fragment)),
        }
    }

    fn payload_offset(&self) -> Result<usize, RewriteError> {
        let transport = self.whole_transport()?;
        let (had, at) = (self.len - self.ip.transport, self.ip.transport + 4);
        if self.ip.protocol == UDP && usize::from(self.word(at)) != had {
            return Err(RewriteError::UdpLength);
        }
        Ok(transport.payload)
    }

    fn set_address(&mut self, index: usize, addr: IpAddr) -> Result<(), RewriteError> {
        let checksum = match self.transport {
            Ok(transport) if self.has_pseudo_header() => Some(transport.checksum),
            Ok(_) => None,
            // A later fragment has no transport header.
            Err(RewriteError::Fragment) => None,
            Err(_) if ADDRESSES_UNCOVERED.contains(&self.ip.protocol) => None,
            Err(error) => return Err(error),
        };
        match (addr, self.ip.is_v4) {
            (IpAddr::V4(addr), true) => self.set(12 + 4 * index, &addr.octets(), checksum),
            (IpAddr::V6(addr), false) => self.set(8 + 16 * index, &addr.octets(), checksum),
            _ => return Err(RewriteError::AddressVersion),
        }
        Ok(())
    }

    fn set_port(&mut self, offset: usize, port: u16) -> Result<(), RewriteError> {
        let transport = self.whole_transport()?;
        if !matches!(self.ip.protocol, TCP | UDP) {
            return Err(self.ip.unknown());
        }
        let (at, checksum) = (self.ip.transport + offset, transport.checksum);
        self.set(at, &port.to_be_bytes(), Some(checksum));
        Ok(())
    }

    /// Sets the bits of `max` in the traffic class, shifted to the left by `shift`
    fn set_traffic_class(&mut self, value: u8, max: u8, shift: u32) -> Result<(), RewriteError> {
        if value > max {
            return Err(RewriteError::Value { value, max });
        }
        let [first, second] = self.word(0).to_be_bytes();
        let replaced = |class: u8| class & !(max << shift) | value << shift;
        if self.ip.is_v4 {
            self.set(1, &[replaced(second)], None);
        } else {
            // The class is between the version and the flow label, of 4 bits each here.
            let class = replaced(first << 4 | second >> 4);
            let word = [first & 0xf0 | class >> 4, class << 4 | second & 0x0f];
            self.set(0, &word, None);
        }
        Ok(())
    }

    /// Sets the lengths in the headers, after the payload has changed
    fn set_len(&mut self, len: usize) -> Result<(), RewriteError> {
        let checksum = self.transport?.checksum;
        let [old, new] = [self.len, len].map(|len| be16(len - self.ip.transport));
        self.len = len;
        if self.ip.is_v4 {
            self.set(2, &be16(len).to_be_bytes(), None);
        } else {
            self.set(4, &be16(len - IPV6_HEADER_LEN).to_be_bytes(), None);
        }
        if self.ip.protocol == UDP {
            self.set(self.ip.transport + 4, &new.to_be_bytes(), Some(checksum));
        }
        if self.has_pseudo_header() {
            self.adjust(checksum, old, new);
        }
        Ok(())
    }

    /// Overwrites bytes, and adjusts the IPv4 header checksum or the transport checksum, or both
    fn set(&mut self, at: usize, bytes: &[u8], checksum: Option<usize>) {
        let Some(place) = self.buf.get_mut(at..at + bytes.len()) else {
            return;
        };
        let (old, new) = (sum(at, place), sum(at, bytes));
        place.copy_from_slice(bytes);
        if self.ip.is_v4 && at < self.ip.transport {
            self.adjust(IPV4_CHECKSUM, old, new);
        }
        if let Some(checksum) = checksum {
            self.adjust(checksum, old, new);
        }
    }

    /// Adjusts the checksum at `at` (RFC 1624) to the changed sum of some of its bytes
    ///
    /// `finish` overwrites an unfinished one.
    fn adjust(&mut self, at: usize, old: u16, new: u16) {
        let checksum = self.word(at);
        let is_none = checksum == 0 && self.is_udp_checksum(at);
        // Equal sums must not change one form of zero into the other.
        if old != new && !is_none {
            self.put_checksum(at, !add(add(!checksum, !old), new));
        }
    }

    /// Writes a checksum; 0 in UDP would mean that it has none
    fn put_checksum(&mut self, at: usize, checksum: u16) {
        let is_zero = checksum == 0 && self.is_udp_checksum(at);
        self.put(at, if is_zero { 0xffff } else { checksum });
    }

    const fn is_udp_checksum(&self, at: usize) -> bool {
        self.ip.protocol == UDP && at != IPV4_CHECKSUM
    }

    const fn has_pseudo_header(&self) -> bool {
        self.ip.protocol != ICMP
    }

    fn pseudo_header_sum(&self) -> u16 {
        if !self.has_pseudo_header() {
            return 0;
        }
        let addrs = if self.ip.is_v4 { 12..20 } else { 8..40 };
        let len = be16(self.len - self.ip.transport);
        add(add(self.sum(addrs), self.ip.protocol.into()), len)
    }

    fn sum(&self, range: Range<usize>) -> u16 {
        sum(range.start, self.buf.get(range).unwrap_or_default())
    }

    fn word(&self, at: usize) -> u16 {
        word(self.buf, at)
    }

    fn put(&mut self, at: usize, value: u16) {
        let place = self.buf.get_mut(at..);
        if let Some(place) = place.and_then(<[u8]>::first_chunk_mut) {
            *place = value.to_be_bytes();
        }
    }
}

impl core::fmt::Debug for Rewrite<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Rewrite")
            .field("ip", &self.ip)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// Copies a packet to the front of `buf`, and completes its checksums
///
/// Use it for packets with [`SkbInfo::CSUM_NOT_READY`] before you write them into a capture, or
/// send them back as a payload. Without a payload in the verdict, the kernel completes the
/// checksums itself.
///
/// # Errors
/// The documentation of [`Rewrite::new`] applies.
pub fn complete_checksums<'b>(
    packet: &Packet<'_>,
    buf: &'b mut [u8],
) -> Result<&'b [u8], RewriteError> {
    Rewrite::new(packet, buf)?.finish()
}

/// The facts of an IP header and its extension headers
#[derive(Clone, Copy, Debug)]
struct Ip {
    is_v4: bool,
    /// The protocol behind the extension headers
    protocol: u8,
    /// The offset of the transport header
    transport: usize,
    fragment: Fragment,
    /// A routing header has the final destination, which the transport checksum covers
    is_routed: bool,
}

#[derive(Clone, Copy, Debug)]
enum Fragment {
    No,
    First,
    Later,
}

/// The offsets of the checksum and of the payload, from the start of the packet
#[derive(Clone, Copy, Debug)]
struct Transport {
    checksum: usize,
    payload: usize,
}

impl Ip {
    fn parse(family: Family, bytes: &[u8]) -> Option<Self> {
        match (family, bytes.first()? >> 4) {
            (Family::INET, 4) => Self::parse_v4(bytes),
            (Family::INET6, 6) => Self::parse_v6(bytes),
            _ => None,
        }
    }

    fn parse_v4(bytes: &[u8]) -> Option<Self> {
        let header = bytes.first_chunk::<20>()?;
        let transport = usize::from(header[0] & 0xf) * 4;
        let flags_and_offset = word(header, 6);
        let fragment = match (flags_and_offset & 0x2000, flags_and_offset & 0x1fff) {
            (0, 0) => Fragment::No,
            (_, 0) => Fragment::First,
            _ => Fragment::Later,
        };
        (20..=bytes.len()).contains(&transport).then_some(Self {
            is_v4: true,
            protocol: header[9],
            transport,
            fragment,
            is_routed: false,
        })
    }

    fn parse_v6(bytes: &[u8]) -> Option<Self> {
        let header = bytes.first_chunk::<IPV6_HEADER_LEN>()?;
        let mut ip = Self {
            is_v4: false,
            protocol: header[6],
            transport: IPV6_HEADER_LEN,
            fragment: Fragment::No,
            is_routed: false,
        };
        // An authentication header (51) ends the list: it does not allow a change behind it.
        while let (
            HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION_OPTIONS,
            Fragment::No | Fragment::First,
        ) = (ip.protocol, ip.fragment)
        {
            let header = bytes.get(ip.transport..)?.first_chunk::<8>()?;
            let mut len = (usize::from(header[1]) + 1) * 8;
            if ip.protocol == ROUTING {
                ip.is_routed |= header[3] != 0;
            }
            if ip.protocol == FRAGMENT {
                len = 8;
                ip.fragment = match word(header, 2) & !7 {
                    0 => Fragment::First,
                    _ => Fragment::Later,
                };
            }
            ip.protocol = header[0];
            ip.transport += len;
        }
        (ip.transport <= bytes.len()).then_some(ip)
    }

    /// The packet's length as the IP header states it
    fn stated_len(&self, bytes: &[u8]) -> usize {
        if self.is_v4 {
            usize::from(word(bytes, 2))
        } else {
            IPV6_HEADER_LEN + usize::from(word(bytes, 4))
        }
    }

    fn find_transport(&self, bytes: &[u8]) -> Result<Transport, RewriteError> {
        let header = bytes.get(self.transport..).unwrap_or_default();
        let (checksum, min_len) = match (self.protocol, self.is_v4) {
            (TCP, _) => (16, 20),
            (UDP, _) => (6, 8),
            (ICMP, true) | (ICMPV6, false) => (2, 8),
            _ => return Err(self.unknown()),
        };
        if matches!(self.fragment, Fragment::Later) {
            return Err(RewriteError::Fragment);
        }
        let len = match (self.protocol, header.get(12)) {
            (TCP, Some(offset)) => usize::from(offset >> 4) * 4,
            _ => min_len,
        };
        if len < min_len || len > header.len() {
            return Err(RewriteError::TransportHeader);
        }
        Ok(Transport {
            checksum: self.transport + checksum,
            payload: self.transport + len,
        })
    }

    const fn unknown(&self) -> RewriteError {
        RewriteError::Protocol {
            protocol: self.protocol,
        }
    }
}

/// The ones' complement sum of bytes at an offset from the start of the packet, which is even
fn sum(at: usize, bytes: &[u8]) -> u16 {
    let pairs = bytes.chunks_exact(2);
    let odd = pairs.remainder().first();
    let odd = odd.map_or(0, |byte| u32::from(*byte) << 8);
    // 64 KiB of bytes cannot overflow 32 bits.
    let total = pairs.fold(odd, |total, pair| total + u32::from(word(pair, 0)));
    let [a, b, c, d] = total.to_be_bytes();
    let sum = add(u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
    if at % 2 == 0 { sum } else { sum.swap_bytes() }
}

/// Adds in ones' complement: 0 only for two zeros
const fn add(a: u16, b: u16) -> u16 {
    let (sum, carry) = a.overflowing_add(b);
    if carry { sum.wrapping_add(1) } else { sum }
}

fn word(bytes: &[u8], at: usize) -> u16 {
    let word = bytes.get(at..).and_then(<[u8]>::first_chunk);
    word.map_or(0, |word| u16::from_be_bytes(*word))
}

/// A length for a 16-bit field; no packet is longer
fn be16(len: usize) -> u16 {
    u16::try_from(len).unwrap_or(u16::MAX)
}

/// A reason why a packet cannot be rewritten, or not so
///
/// The packet can still have any verdict without a payload, and
/// [`Decision::with_payload`](crate::Decision::with_payload) takes any bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum RewriteError {
    /// The kernel sent no payload: bind the queue with
    /// [`CopyMode::Packet`](crate::CopyMode::Packet)
    #[error("the packet has no payload")]
    NoPayload,
    /// The payload is only the beginning of the packet: raise the queue's copy range
    #[error("the payload is truncated")]
    Truncated,
    /// The packet is bridged
    ///
    /// Linux 7.1 and later drop rewritten packets of this family. For older kernels, use
    /// [`Decision::with_payload`](crate::Decision::with_payload).
    #[error("the packet is bridged")]
    Bridged,
    /// The payload does not begin with a whole IP header of the packet's family
    #[error("the IP header is incomplete")]
    IpHeader,
    /// The length in the IP header is not the payload's: the kernel drops such packets
    #[error("the IP header states {stated} bytes, the payload has {had}")]
    IpLength {
        /// The length of the packet in its IP header
        stated: usize,
        /// The length of the payload
        had: usize,
    },
    /// The buffer is too small
    #[error("the packet needs {needed} bytes, the buffer has {had}")]
    NoSpace {
        /// The length of the packet
        needed: usize,
        /// The length of the buffer
        had: usize,
    },
    /// The result is too long for a verdict: replace by fewer bytes
    #[error("the packet would have {needed} bytes, at most {max} fit")]
    TooLong {
        /// The length of the packet after the change
        needed: usize,
        /// The limit, 65531
        max: usize,
    },
    /// The protocol has no ports, or its checksum is unknown
    ///
    /// For an unknown protocol, or one that forbids changes (AH), only the TTL and the traffic
    /// class can be set. With unfinished checksums nothing can be set: turn
    /// [`ConfigFlags::GSO`](crate::ConfigFlags::GSO) off to receive finished ones.
    #[error("protocol {protocol} does not support this")]
    Protocol {
        /// The number of the protocol behind the IP header and its extension headers
        protocol: u8,
    },
    /// The packet ends within its transport header: only the TTL and the traffic class can be set
    #[error("the transport header is incomplete")]
    TransportHeader,
    /// The packet is a fragment: only its IP header can be changed
    ///
    /// To receive whole packets, load connection tracking, which reassembles them.
    #[error("the packet is a fragment")]
    Fragment,
    /// The length in the UDP header is not that of the datagram: its payload cannot be changed
    #[error("the length in the UDP header is wrong")]
    UdpLength,
    /// A routing header has the final destination
    ///
    /// The destination cannot be changed, and unfinished checksums cannot be completed.
    #[error("a routing header has the final destination")]
    RoutingHeader,
    /// The unfinished checksum is in an inner header, probably of a tunnel
    ///
    /// Turn [`ConfigFlags::GSO`](crate::ConfigFlags::GSO) off to receive finished checksums.
    #[error("the unfinished checksum is in an inner header")]
    Tunnel,
    /// An unsegmented series of UDP datagrams: the kernel would segment it with wrong checksums
    ///
    /// Turn [`ConfigFlags::GSO`](crate::ConfigFlags::GSO) off to receive single datagrams.
    #[error("the packet is an unsegmented series of UDP datagrams")]
    UdpGso,
    /// An unsegmented packet ([`SkbInfo::GSO`]) has become shorter
    ///
    /// The kernel drops it if one segment has room for all of it. Keep the length, or turn
    /// [`ConfigFlags::GSO`](crate::ConfigFlags::GSO) off.
    #[error("an unsegmented packet of {needed} bytes was shortened to {had}")]
    Shortened {
        /// The original length of the packet
        needed: usize,
        /// The length of the changed packet
        had: usize,
    },
    /// The address is not of the packet's IP version
    #[error("the address is of the other IP version")]
    AddressVersion,
    /// The range is not in the payload
    #[error("bytes {start}..{end} are not in a payload of {len}")]
    Range {
        /// The first byte of the range
        start: usize,
        /// The end of the range
        end: usize,
        /// The length of the payload
        len: usize,
    },
    /// The value has too many bits for its field
    #[error("value {value} does not fit, the largest is {max}")]
    Value {
        /// The value
        value: u8,
        /// The largest value of the field
        max: u8,
    },
}
