//! The flow of a packet: its addresses, its protocol and its ports

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::conntrack::Tuple;
use crate::ip::{FRAGMENT, extension_len, fragment_offset, is_extension};
use crate::types::IpProtocol;

/// Addresses, protocol and ports of a packet, as a key for tables
///
/// [`Packet::flow`](crate::Packet::flow) reads it from the payload, and
/// [`Tuple::flow`](crate::Tuple::flow) from a conntrack entry. Both give equal keys for the same
/// packet without address translation. [`reversed`](Self::reversed) is the key of the answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowKey {
    source: IpAddr,
    destination: IpAddr,
    protocol: IpProtocol,
    transport: Transport,
}

/// The part of a [`FlowKey`] from the transport header
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Transport {
    /// TCP, UDP, UDP-Lite, SCTP and DCCP
    #[non_exhaustive]
    Ports {
        /// The source port
        source: u16,
        /// The destination port
        destination: u16,
    },
    /// ICMP and ICMPv6
    #[non_exhaustive]
    Icmp {
        /// The type
        kind: u8,
        /// The code
        code: u8,
        /// The id of an echo or another query; bytes 4 and 5 of other messages
        id: u16,
    },
    /// A fragment other than the first: it has no transport header
    #[non_exhaustive]
    Fragment {
        /// The identification in the IP header, the same in all fragments of a packet
        id: u32,
    },
    /// Another protocol
    Other,
}

impl FlowKey {
    /// The key of packets between two ports, for instance from a configuration
    #[must_use]
    pub const fn new(protocol: IpProtocol, source: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            source: source.ip(),
            destination: destination.ip(),
            protocol,
            transport: Transport::Ports {
                source: source.port(),
                destination: destination.port(),
            },
        }
    }

    /// Reads the beginning of an IP packet
    ///
    /// `None` if the bytes are not IPv4 or IPv6, or end before the ports.
    #[must_use]
    #[inline]
    pub fn parse(packet: &[u8]) -> Option<Self> {
        match packet.first()? >> 4 {
            4 => Self::parse_v4(packet),
            6 => Self::parse_v6(packet),
            _ => None,
        }
    }

    fn parse_v4(packet: &[u8]) -> Option<Self> {
        let header = packet.first_chunk::<20>()?;
        let [version, _, _, _, id0, id1, flags, offset, _, protocol, ..] = *header;
        let header_len = usize::from(version & 0xf) * 4;
        let protocol = IpProtocol(protocol);
        let is_later_fragment = u16::from_be_bytes([flags, offset]) & 0x1fff != 0;
        let transport = match is_later_fragment {
            true => Transport::Fragment {
                id: u16::from_be_bytes([id0, id1]).into(),
            },
            false => Transport::parse(protocol, packet.get(header_len.max(20)..)?)?,
        };
        let addresses = header.last_chunk::<8>()?;
        Some(Self {
            source: Ipv4Addr::from(*addresses.first_chunk::<4>()?).into(),
            destination: Ipv4Addr::from(*addresses.last_chunk::<4>()?).into(),
            protocol,
            transport,
        })
    }

    fn parse_v6(packet: &[u8]) -> Option<Self> {
        let (header, mut rest) = packet.split_first_chunk::<40>()?;
        let addresses = header.last_chunk::<32>()?;
        let mut protocol = IpProtocol(header[6]);
        let transport = loop {
            if !is_extension(protocol) {
                break Transport::parse(protocol, rest)?;
            }
            let header = rest.first_chunk::<8>()?;
            let is_fragment = protocol == FRAGMENT;
            rest = rest.get(extension_len(protocol, header)..)?;
            protocol = IpProtocol(header[0]);
            if is_fragment && fragment_offset(header) != 0 {
                let [.., i0, i1, i2, i3] = *header;
                let id = u32::from_be_bytes([i0, i1, i2, i3]);
                break Transport::Fragment { id };
            }
        };
        Some(Self {
            source: Ipv6Addr::from(*addresses.first_chunk::<16>()?).into(),
            destination: Ipv6Addr::from(*addresses.last_chunk::<16>()?).into(),
            protocol,
            transport,
        })
    }

    /// The source address
    #[must_use]
    pub const fn source(&self) -> IpAddr {
        self.source
    }

    /// The destination address
    #[must_use]
    pub const fn destination(&self) -> IpAddr {
        self.destination
    }

    /// The transport protocol
    #[must_use]
    pub const fn protocol(&self) -> IpProtocol {
        self.protocol
    }

    /// The ports, or the fields of a protocol without ports
    #[must_use]
    pub const fn transport(&self) -> Transport {
        self.transport
    }

    /// The source and the destination port
    ///
    /// `None` for protocols without ports, and for fragments other than the first.
    #[must_use]
    pub const fn ports(&self) -> Option<(u16, u16)> {
        match self.transport {
            Transport::Ports {
                source,
                destination,
            } => Some((source, destination)),
            _ => None,
        }
    }

    /// The key of packets in the other direction
    ///
    /// For an ICMP query, the key of its answer; other ICMP messages keep their type.
    #[must_use]
    pub const fn reversed(self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            protocol: self.protocol,
            transport: match self.transport {
                Transport::Ports {
                    source,
                    destination,
                } => Transport::Ports {
                    source: destination,
                    destination: source,
                },
                Transport::Icmp { kind, code, id } => Transport::Icmp {
                    kind: reversed_type(self.protocol, kind),
                    code,
                    id,
                },
                other => other,
            },
        }
    }

    /// The key of a conntrack tuple
    pub(crate) fn of_tuple(tuple: &Tuple<'_>) -> Option<Self> {
        let protocol = tuple.protocol()?;
        let transport = match protocol {
            _ if has_ports(protocol) => Transport::Ports {
                source: tuple.source_port()?,
                destination: tuple.destination_port()?,
            },
            IpProtocol::ICMP | IpProtocol::ICMPV6 => Transport::Icmp {
                kind: tuple.icmp_type()?,
                code: tuple.icmp_code()?,
                id: tuple.icmp_id()?,
            },
            _ => Transport::Other,
        };
        Some(Self {
            source: tuple.source()?,
            destination: tuple.destination()?,
            protocol,
            transport,
        })
    }
}

impl fmt::Display for FlowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            source,
            destination,
            protocol,
            ..
        } = *self;
        match self.ports() {
            Some((from, to)) => {
                let from = SocketAddr::new(source, from);
                let to = SocketAddr::new(destination, to);
                write!(f, "{protocol} {from} -> {to}")
            }
            None => write!(f, "{protocol} {source} -> {destination}"),
        }
    }
}

impl Transport {
    fn parse(protocol: IpProtocol, header: &[u8]) -> Option<Self> {
        Some(match protocol {
            _ if has_ports(protocol) => {
                let [s0, s1, d0, d1] = *header.first_chunk()?;
                Self::Ports {
                    source: u16::from_be_bytes([s0, s1]),
                    destination: u16::from_be_bytes([d0, d1]),
                }
            }
            IpProtocol::ICMP | IpProtocol::ICMPV6 => {
                let [kind, code, _, _, id0, id1] = *header.first_chunk()?;
                Self::Icmp {
                    kind,
                    code,
                    id: u16::from_be_bytes([id0, id1]),
                }
            }
            _ => Self::Other,
        })
    }
}

const fn has_ports(protocol: IpProtocol) -> bool {
    matches!(
        protocol,
        IpProtocol::TCP
            | IpProtocol::UDP
            | IpProtocol::DCCP
            | IpProtocol::SCTP
            | IpProtocol::UDPLITE
    )
}

/// Returns the type of the answer to an ICMP query
const fn reversed_type(protocol: IpProtocol, kind: u8) -> u8 {
    match (protocol, kind) {
        (IpProtocol::ICMP, 0) => 8, // echo
        (IpProtocol::ICMP, 8) => 0,
        (IpProtocol::ICMP, 13) => 14, // timestamp
        (IpProtocol::ICMP, 14) => 13,
        (IpProtocol::ICMP, 15) => 16, // information
        (IpProtocol::ICMP, 16) => 15,
        (IpProtocol::ICMP, 17) => 18, // address mask
        (IpProtocol::ICMP, 18) => 17,
        (IpProtocol::ICMPV6, 128) => 129, // echo
        (IpProtocol::ICMPV6, 129) => 128,
        (IpProtocol::ICMPV6, 139) => 140, // node information
        (IpProtocol::ICMPV6, 140) => 139,
        (_, kind) => kind,
    }
}
