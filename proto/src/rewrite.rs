//! Changed copies of packets, with right lengths and checksums

use core::net::IpAddr;
use core::ops::Range;

use thiserror::Error;

use crate::consts::MAX_PAYLOAD;
use crate::ip::{AUTHENTICATION, FRAGMENT, ROUTING, extension_len, fragment_offset, is_extension};
use crate::packet::{Packet, SkbInfo};
use crate::types::{Family, IpProtocol};

/// Protocols without a checksum over the addresses: IPv4 and IPv6 in IP, GRE, ESP and SCTP
const ADDRESSES_UNCOVERED: [IpProtocol; 5] = [
    IpProtocol(4),
    IpProtocol(41),
    IpProtocol::GRE,
    IpProtocol::ESP,
    IpProtocol::SCTP,
];

/// The offset of the header checksum in an IPv4 header
const IPV4_CHECKSUM: usize = 10;
const IPV6_HEADER_LEN: usize = 40;

/// A buffer for changed copies of packets, used again for each packet
///
/// A callback or a worker that must be `'static` keeps the buffer, and makes a rewriter for each
/// packet: [`Rewriter::new`] costs nothing.
///
/// ```
/// use nfqnl_proto::rewrite::{RewriteError, Rewriter};
/// use nfqnl_proto::{Decision, Packet, Verdict};
///
/// fn answer<'r>(
///     packet: &Packet<'_>,
///     rewriter: &'r mut Rewriter<'_>, // for all packets
/// ) -> Result<Decision<'r>, RewriteError> {
///     let mut rewrite = rewriter.begin(packet)?;
///     rewrite.set_ttl(64);
///     if rewrite.payload()?.starts_with(b"ping") {
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
/// # let mut rewriter = Rewriter::new(&mut buf);
/// # let payload = answer(&packet, &mut rewriter).unwrap().payload().unwrap();
/// # assert_eq!(payload[..12], [0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0x7c, 0xcb]);
/// # assert_eq!(payload[20..], *b"\0\x07\0\x07\0\x0c\0\0pong");
/// ```
///
#[derive(Debug)]
pub struct Rewriter<'b> {
    buf: &'b mut [u8],
    /// The length of the packet in `buf`
    len: usize,
    original_len: usize,
    ip: Ip,
    transport: Result<Transport, Fault>,
    /// The transport checksum has only the sum of the pseudo-header
    is_unfinished: bool,
    is_gso: bool,
}

impl<'b> Rewriter<'b> {
    /// A rewriter for packets that fit this buffer
    ///
    /// [`MAX_PAYLOAD`] bytes take any packet.
    #[must_use]
    pub const fn new(buf: &'b mut [u8]) -> Self {
        Self {
            buf,
            len: 0,
            original_len: 0,
            ip: Ip {
                is_v4: true,
                protocol: IpProtocol(0),
                transport: 0,
                fragment: Fragment::No,
                is_routed: false,
            },
            transport: Err(Fault::Protocol),
            is_unfinished: false,
            is_gso: false,
        }
    }

    /// Copies the packet's payload to the buffer
    ///
    /// # Errors
    /// The buffer is too small, or the packet cannot be rewritten.
    pub fn begin(&mut self, packet: &Packet<'_>) -> Result<Rewrite<'_, 'b>, RewriteError> {
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
        let ip = &mut self.ip;
        ip.read(packet.family(), bytes)
            .ok_or(RewriteError::IpHeader)?;
        let stated = ip.stated_len(bytes);
        if stated != bytes.len() {
            let had = bytes.len();
            return Err(RewriteError::IpLength { stated, had });
        }
        let info = packet.skb_info();
        let is_gso = info.contains(SkbInfo::GSO);
        if is_gso && ip.protocol == IpProtocol::UDP {
            return Err(RewriteError::UdpGso);
        }
        let (needed, had) = (bytes.len(), self.buf.len());
        let Some(copy) = self.buf.get_mut(..needed) else {
            return Err(RewriteError::NoSpace { needed, had });
        };
        copy.copy_from_slice(bytes);
        let transport = ip.find_transport(bytes);
        let is_unfinished = info.contains(SkbInfo::CSUM_NOT_READY);
        if is_unfinished {
            ip.check_unfinished(transport, bytes)?;
        }
        self.len = needed;
        self.original_len = needed;
        self.transport = transport;
        self.is_unfinished = is_unfinished;
        self.is_gso = is_gso;
        Ok(Rewrite(self))
    }
}

/// A changed copy of a packet, for [`Decision::with_payload`](crate::Decision::with_payload); begun
/// by [`Rewriter::begin`]
///
/// The copy is in the rewriter's buffer. Each change also sets the lengths and checksums that it
/// affects. A wrong checksum stays wrong by the same difference, so the receiver still finds the
/// damage. Unfinished checksums ([`SkbInfo::CSUM_NOT_READY`]) are completed.
///
/// Changes that the kernel or the receiver would not accept are refused: see [`RewriteError`]. An
/// error leaves the copy as it was.
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
pub struct Rewrite<'r, 'b>(&'r mut Rewriter<'b>);

impl<'r> Rewrite<'r, '_> {
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
        if self.0.ip.is_routed {
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
        self.set(if self.0.ip.is_v4 { 8 } else { 7 }, &[ttl], None);
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
    /// # Errors
    /// The protocol is unknown, the transport header is incomplete or has a wrong length, or the
    /// packet is a fragment.
    pub fn payload(&self) -> Result<&[u8], RewriteError> {
        let at = self.payload_offset()?;
        Ok(self.0.buf.get(at..self.0.len).unwrap_or_default())
    }

    /// Replaces a range of the [`payload`](Self::payload) by bytes of any length
    ///
    /// # Errors
    /// The range is not in the payload, the result is too long for a verdict or for the buffer,
    /// the protocol is unknown, or the packet is a fragment.
    pub fn replace(&mut self, range: Range<usize>, bytes: &[u8]) -> Result<(), RewriteError> {
        let Transport { checksum, .. } = self.whole_transport()?;
        let at = self.payload_offset()?;
        let payload_len = self.0.len.saturating_sub(at);
        if range.start > range.end || range.end > payload_len {
            return Err(RewriteError::Range {
                start: range.start,
                end: range.end,
                len: payload_len,
            });
        }
        let len = self.0.len - range.len() + bytes.len();
        if len > MAX_PAYLOAD {
            let max = MAX_PAYLOAD;
            return Err(RewriteError::TooLong { needed: len, max });
        }
        let had = self.0.buf.len();
        if len > had {
            return Err(RewriteError::NoSpace { needed: len, had });
        }
        let (start, end) = (at + range.start, at + range.end);
        if len == self.0.len {
            self.set(start, bytes, Some(checksum));
            return Ok(());
        }
        // The bytes behind the range move. By an odd distance, their sum changes too.
        let behind = match len % 2 == self.0.len % 2 {
            true => 0,
            false => self.sum(end..self.0.len),
        };
        let mut old = add(self.sum(start..end), behind);
        let mut new = add(sum(start, bytes), behind.swap_bytes());
        self.0.buf.copy_within(end..self.0.len, start + bytes.len());
        if let Some(place) = self.0.buf.get_mut(start..start + bytes.len()) {
            place.copy_from_slice(bytes);
        }
        let [old_len, new_len] = [self.0.len, len].map(|len| be16(len - self.0.ip.transport));
        self.0.len = len;
        if self.0.ip.is_v4 {
            self.set_word(2, be16(len), None);
        } else {
            self.set_word(4, be16(len - IPV6_HEADER_LEN), None);
        }
        if self.0.ip.protocol == IpProtocol::UDP {
            self.put(self.0.ip.transport + 4, new_len);
            (old, new) = (add(old, old_len), add(new, new_len));
        }
        if self.0.ip.has_pseudo_header() {
            (old, new) = (add(old, old_len), add(new, new_len));
        }
        self.adjust(checksum, old, new);
        Ok(())
    }

    /// Returns the changed packet
    ///
    /// # Errors
    /// [`RewriteError::Shortened`] if an unsegmented packet has become shorter.
    pub fn finish(mut self) -> Result<&'r [u8], RewriteError> {
        if self.0.is_gso && self.0.len < self.0.original_len {
            return Err(RewriteError::Shortened {
                needed: self.0.original_len,
                had: self.0.len,
            });
        }
        if self.0.is_unfinished {
            let at = self.whole_transport()?.checksum;
            self.put(at, 0);
            let sum = self.sum(self.0.ip.transport..self.0.len);
            let packet = self.0.buf.get(..self.0.len).unwrap_or_default();
            let pseudo_header = self.0.ip.pseudo_header_sum(packet);
            self.put_checksum(at, !add(pseudo_header, sum));
        }
        let Rewriter { buf, len, .. } = self.0;
        Ok(buf.get(..*len).unwrap_or_default())
    }

    fn whole_transport(&self) -> Result<Transport, RewriteError> {
        self.0.ip.whole(self.0.transport)
    }

    fn payload_offset(&self) -> Result<usize, RewriteError> {
        let transport = self.whole_transport()?;
        let (had, at) = (self.0.len - self.0.ip.transport, self.0.ip.transport + 4);
        if self.0.ip.protocol == IpProtocol::UDP && usize::from(self.word(at)) != had {
            return Err(RewriteError::UdpLength);
        }
        Ok(transport.payload)
    }

    fn set_address(&mut self, index: usize, addr: IpAddr) -> Result<(), RewriteError> {
        let checksum = match self.0.transport {
            Ok(transport) if self.0.ip.has_pseudo_header() => Some(transport.checksum),
            Ok(_) => None,
            // A later fragment has no transport header.
            Err(Fault::Fragment) => None,
            Err(_) if ADDRESSES_UNCOVERED.contains(&self.0.ip.protocol) => None,
            Err(fault) => return Err(self.0.ip.error(fault)),
        };
        match (addr, self.0.ip.is_v4) {
            (IpAddr::V4(addr), true) => self.set(12 + 4 * index, &addr.octets(), checksum),
            (IpAddr::V6(addr), false) => self.set(8 + 16 * index, &addr.octets(), checksum),
            _ => return Err(RewriteError::AddressVersion),
        }
        Ok(())
    }

    fn set_port(&mut self, offset: usize, port: u16) -> Result<(), RewriteError> {
        let transport = self.whole_transport()?;
        if !matches!(self.0.ip.protocol, IpProtocol::TCP | IpProtocol::UDP) {
            return Err(self.0.ip.error(Fault::Protocol));
        }
        self.set_word(self.0.ip.transport + offset, port, Some(transport.checksum));
        Ok(())
    }

    /// Sets the bits of `max` in the traffic class, shifted to the left by `shift`
    fn set_traffic_class(&mut self, value: u8, max: u8, shift: u32) -> Result<(), RewriteError> {
        if value > max {
            return Err(RewriteError::Value { value, max });
        }
        let [first, second] = self.word(0).to_be_bytes();
        let replaced = |class: u8| class & !(max << shift) | value << shift;
        if self.0.ip.is_v4 {
            self.set(1, &[replaced(second)], None);
        } else {
            // The class is between the version and the flow label, of 4 bits each here.
            let class = replaced(first << 4 | second >> 4);
            let word = [first & 0xf0 | class >> 4, class << 4 | second & 0x0f];
            self.set(0, &word, None);
        }
        Ok(())
    }

    /// Overwrites a word at an even offset, and adjusts the checksums like [`set`](Self::set)
    #[inline]
    fn set_word(&mut self, at: usize, new: u16, checksum: Option<usize>) {
        let old = self.word(at);
        self.put(at, new);
        if self.0.ip.is_v4 && at < self.0.ip.transport {
            self.adjust(IPV4_CHECKSUM, old, new);
        }
        if let Some(checksum) = checksum {
            self.adjust(checksum, old, new);
        }
    }

    /// Overwrites bytes, and adjusts the IPv4 header checksum or the transport checksum, or both
    fn set(&mut self, at: usize, bytes: &[u8], checksum: Option<usize>) {
        let Some(place) = self.0.buf.get_mut(at..at + bytes.len()) else {
            return;
        };
        let (old, new) = (sum(at, place), sum(at, bytes));
        place.copy_from_slice(bytes);
        if self.0.ip.is_v4 && at < self.0.ip.transport {
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

    fn is_udp_checksum(&self, at: usize) -> bool {
        self.0.ip.protocol == IpProtocol::UDP && at != IPV4_CHECKSUM
    }

    fn sum(&self, range: Range<usize>) -> u16 {
        sum(range.start, self.0.buf.get(range).unwrap_or_default())
    }

    fn word(&self, at: usize) -> u16 {
        word(self.0.buf, at)
    }

    fn put(&mut self, at: usize, value: u16) {
        let place = self.0.buf.get_mut(at..);
        if let Some(place) = place.and_then(<[u8]>::first_chunk_mut) {
            *place = value.to_be_bytes();
        }
    }
}

impl core::fmt::Debug for Rewrite<'_, '_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Rewrite")
            .field("ip", &self.0.ip)
            .field("len", &self.0.len)
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
/// As [`Rewriter::begin`].
pub fn complete_checksums<'b>(
    packet: &Packet<'_>,
    buf: &'b mut [u8],
) -> Result<&'b [u8], RewriteError> {
    let mut rewriter = Rewriter::new(buf);
    let len = rewriter.begin(packet)?.finish()?.len();
    Ok(rewriter.buf.get(..len).unwrap_or_default())
}

/// The facts of an IP header and its extension headers
#[derive(Clone, Copy, Debug)]
struct Ip {
    is_v4: bool,
    /// The protocol behind the extension headers
    protocol: IpProtocol,
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

/// The reason why a packet has no transport header that can be changed
#[derive(Clone, Copy, Debug)]
enum Fault {
    Protocol,
    TransportHeader,
    Fragment,
}

impl Ip {
    /// Reads the headers of a packet; `None` if they are incomplete
    ///
    /// It writes the fields one by one: a copy of the whole, right after such stores, would have to
    /// wait for them (a store forwarding stall).
    fn read(&mut self, family: Family, bytes: &[u8]) -> Option<()> {
        match (family, bytes.first()? >> 4) {
            (Family::INET, 4) => self.read_v4(bytes),
            (Family::INET6, 6) => self.read_v6(bytes),
            _ => None,
        }
    }

    fn read_v4(&mut self, bytes: &[u8]) -> Option<()> {
        let header = bytes.first_chunk::<20>()?;
        let flags_and_offset = word(header, 6);
        self.is_v4 = true;
        self.protocol = IpProtocol(header[9]);
        self.transport = usize::from(header[0] & 0xf) * 4;
        self.fragment = match (flags_and_offset & 0x2000, flags_and_offset & 0x1fff) {
            (0, 0) => Fragment::No,
            (_, 0) => Fragment::First,
            _ => Fragment::Later,
        };
        self.is_routed = false;
        (20..=bytes.len()).contains(&self.transport).then_some(())
    }

    fn read_v6(&mut self, bytes: &[u8]) -> Option<()> {
        let header = bytes.first_chunk::<IPV6_HEADER_LEN>()?;
        self.is_v4 = false;
        self.protocol = IpProtocol(header[6]);
        self.transport = IPV6_HEADER_LEN;
        self.fragment = Fragment::No;
        self.is_routed = false;
        // An authentication header does not allow a change behind it, so it counts as transport.
        while is_extension(self.protocol) && self.protocol != AUTHENTICATION {
            let header = bytes.get(self.transport..)?.first_chunk::<8>()?;
            let number = self.protocol;
            self.protocol = IpProtocol(header[0]);
            self.transport += extension_len(number, header);
            self.is_routed |= number == ROUTING && header[3] != 0;
            if number == FRAGMENT && fragment_offset(header) == 0 {
                self.fragment = Fragment::First;
            } else if number == FRAGMENT {
                self.fragment = Fragment::Later;
                break;
            }
        }
        (self.transport <= bytes.len()).then_some(())
    }

    /// The packet's length as the IP header states it
    fn stated_len(&self, bytes: &[u8]) -> usize {
        if self.is_v4 {
            usize::from(word(bytes, 2))
        } else {
            IPV6_HEADER_LEN + usize::from(word(bytes, 4))
        }
    }

    #[inline]
    fn find_transport(&self, bytes: &[u8]) -> Result<Transport, Fault> {
        let header = bytes.get(self.transport..).unwrap_or_default();
        let (checksum, min_len) = match (self.protocol, self.is_v4) {
            (IpProtocol::TCP, _) => (16, 20),
            (IpProtocol::UDP, _) => (6, 8),
            (IpProtocol::ICMP, true) | (IpProtocol::ICMPV6, false) => (2, 8),
            _ => return Err(Fault::Protocol),
        };
        if matches!(self.fragment, Fragment::Later) {
            return Err(Fault::Fragment);
        }
        let len = match (self.protocol, header.get(12)) {
            (IpProtocol::TCP, Some(offset)) => usize::from(offset >> 4) * 4,
            _ => min_len,
        };
        if len < min_len || len > header.len() {
            return Err(Fault::TransportHeader);
        }
        Ok(Transport {
            checksum: self.transport + checksum,
            payload: self.transport + len,
        })
    }

    /// The transport header of a packet that is not a fragment
    fn whole(&self, transport: Result<Transport, Fault>) -> Result<Transport, RewriteError> {
        match (self.fragment, transport) {
            (Fragment::No, Ok(transport)) => Ok(transport),
            (Fragment::First | Fragment::Later, Ok(_)) => Err(RewriteError::Fragment),
            (_, Err(fault)) => Err(self.error(fault)),
        }
    }

    /// Checks that an unfinished checksum is that of the outer transport header
    fn check_unfinished(
        &self,
        transport: Result<Transport, Fault>,
        bytes: &[u8],
    ) -> Result<(), RewriteError> {
        let at = self.whole(transport)?.checksum;
        if self.is_routed {
            return Err(RewriteError::RoutingHeader);
        }
        // Two forms of zero are equal.
        match add(word(bytes, at), !self.pseudo_header_sum(bytes)) {
            0 | 0xffff => Ok(()),
            _ => Err(RewriteError::Tunnel),
        }
    }

    fn has_pseudo_header(&self) -> bool {
        self.protocol != IpProtocol::ICMP
    }

    fn pseudo_header_sum(&self, packet: &[u8]) -> u16 {
        if !self.has_pseudo_header() {
            return 0;
        }
        let addrs = if self.is_v4 { 12..20 } else { 8..40 };
        let addrs = sum(0, packet.get(addrs).unwrap_or_default());
        let len = be16(packet.len() - self.transport);
        add(add(addrs, self.protocol.0.into()), len)
    }

    const fn error(&self, fault: Fault) -> RewriteError {
        match fault {
            Fault::Protocol => RewriteError::Protocol {
                protocol: self.protocol,
            },
            Fault::TransportHeader => RewriteError::TransportHeader,
            Fault::Fragment => RewriteError::Fragment,
        }
    }
}

/// The ones' complement sum of bytes at an offset from the start of the packet, which is even
fn sum(at: usize, bytes: &[u8]) -> u16 {
    // In ones' complement the bytes of a sum do not depend on the byte order or the size of the
    // numbers, so this adds 32 bits at a time.
    let words = bytes.chunks_exact(4);
    let mut last = [0; 4];
    for (to, from) in last.iter_mut().zip(words.remainder()) {
        *to = *from;
    }
    let number = |word: &[u8; 4]| u64::from(u32::from_ne_bytes(*word));
    let total = words.fold(number(&last), |total, word| {
        total + word.first_chunk().map_or(0, number)
    });
    let [a, b, c, d, e, f, g, h] = total.to_be_bytes();
    let high = add(u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
    let low = add(u16::from_be_bytes([e, f]), u16::from_be_bytes([g, h]));
    let sum = u16::from_be_bytes(add(high, low).to_ne_bytes());
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

/// The reason why a packet cannot be rewritten, or why a change is refused
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
    /// Linux 7.2 and later drop rewritten packets of this family. For older kernels, use
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
    #[error("{protocol} does not support this")]
    Protocol {
        /// The protocol behind the IP header and its extension headers
        protocol: IpProtocol,
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
