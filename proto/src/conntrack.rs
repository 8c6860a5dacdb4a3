//! The conntrack entry of a packet, and changes to it by a verdict
//!
//! [`Conntrack`] and [`Tuple`] are views of nested `CTA_*` attributes. A getter looks for its
//! attribute when it is called. An attribute that is absent or too short gives `None`. Attributes
//! without a getter are found by number, with [`Conntrack::attr`].

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::time::Duration;

use bitflags::bitflags;
use thiserror::Error;

use crate::attr::Attrs;
use crate::consts::{
    CTA_COUNTERS_BYTES, CTA_COUNTERS_ORIG, CTA_COUNTERS_PACKETS, CTA_COUNTERS_REPLY, CTA_HELP,
    CTA_HELP_NAME, CTA_ID, CTA_IP_V4_DST, CTA_IP_V4_SRC, CTA_IP_V6_DST, CTA_IP_V6_SRC, CTA_LABELS,
    CTA_LABELS_MASK, CTA_MARK, CTA_MARK_MASK, CTA_PROTO_DST_PORT, CTA_PROTO_ICMP_CODE,
    CTA_PROTO_ICMP_ID, CTA_PROTO_ICMP_TYPE, CTA_PROTO_ICMPV6_CODE, CTA_PROTO_ICMPV6_ID,
    CTA_PROTO_ICMPV6_TYPE, CTA_PROTO_NUM, CTA_PROTO_SRC_PORT, CTA_PROTOINFO, CTA_PROTOINFO_TCP,
    CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, CTA_PROTOINFO_TCP_FLAGS_REPLY, CTA_PROTOINFO_TCP_STATE,
    CTA_PROTOINFO_TCP_WSCALE_ORIGINAL, CTA_PROTOINFO_TCP_WSCALE_REPLY, CTA_SECCTX, CTA_SECCTX_NAME,
    CTA_STATUS, CTA_TIMEOUT, CTA_TIMESTAMP, CTA_TIMESTAMP_START, CTA_TIMESTAMP_STOP, CTA_TUPLE_IP,
    CTA_TUPLE_MASTER, CTA_TUPLE_ORIG, CTA_TUPLE_PROTO, CTA_TUPLE_REPLY, CTA_TUPLE_ZONE, CTA_ZONE,
    IP_CT_ESTABLISHED, IP_CT_ESTABLISHED_REPLY, IP_CT_NEW, IP_CT_NEW_REPLY, IP_CT_RELATED,
    IP_CT_RELATED_REPLY,
};
use crate::flow::FlowKey;
use crate::types::IpProtocol;
use crate::write::MessageWriter;

/// A side of a connection: the one that began it, or the other one
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(clippy::exhaustive_enums, reason = "a connection has two sides")]
pub enum Direction {
    /// The direction of the first packet
    #[doc(alias = "IP_CT_DIR_ORIGINAL")]
    Original,
    /// The direction of the answers
    #[doc(alias = "IP_CT_DIR_REPLY")]
    Reply,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Original => "original",
            Self::Reply => "reply",
        })
    }
}

/// The relation of a packet to its conntrack entry; any number is valid
///
/// `enum ip_conntrack_info` in `linux/netfilter/nf_conntrack_common.h`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[doc(alias = "ip_conntrack_info")]
#[expect(clippy::exhaustive_structs, reason = "a number on the wire")]
pub struct CtState(pub u32);

impl CtState {
    /// A connection with packets in both directions; a packet of the original direction
    #[doc(alias = "IP_CT_ESTABLISHED")]
    pub const ESTABLISHED: Self = Self(IP_CT_ESTABLISHED);
    /// A new connection that belongs to another one, or an ICMP error about one
    #[doc(alias = "IP_CT_RELATED")]
    pub const RELATED: Self = Self(IP_CT_RELATED);
    /// A connection without packets in the reply direction so far
    #[doc(alias = "IP_CT_NEW")]
    pub const NEW: Self = Self(IP_CT_NEW);
    /// As [`ESTABLISHED`](Self::ESTABLISHED), for a packet of the reply direction
    #[doc(alias = "IP_CT_ESTABLISHED_REPLY")]
    pub const ESTABLISHED_REPLY: Self = Self(IP_CT_ESTABLISHED_REPLY);
    /// As [`RELATED`](Self::RELATED), for a packet of the reply direction
    #[doc(alias = "IP_CT_RELATED_REPLY")]
    pub const RELATED_REPLY: Self = Self(IP_CT_RELATED_REPLY);

    /// True for the first packets of a connection, until an answer is seen
    #[must_use]
    pub const fn is_new(self) -> bool {
        matches!(self.0, IP_CT_NEW | IP_CT_NEW_REPLY)
    }

    /// True for a packet of a connection with packets in both directions
    #[must_use]
    pub const fn is_established(self) -> bool {
        matches!(self.0, IP_CT_ESTABLISHED | IP_CT_ESTABLISHED_REPLY)
    }

    /// True for a connection that belongs to another one, and for an ICMP error about one
    #[must_use]
    pub const fn is_related(self) -> bool {
        matches!(self.0, IP_CT_RELATED | IP_CT_RELATED_REPLY)
    }

    /// The direction of the packet
    #[must_use]
    #[doc(alias = "CTINFO2DIR")]
    pub const fn direction(self) -> Direction {
        match self.0 {
            ..IP_CT_ESTABLISHED_REPLY => Direction::Original,
            _ => Direction::Reply,
        }
    }
}

impl fmt::Display for CtState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::ESTABLISHED => f.pad("established"),
            Self::RELATED => f.pad("related"),
            Self::NEW => f.pad("new"),
            Self::ESTABLISHED_REPLY => f.pad("established, reply"),
            Self::RELATED_REPLY => f.pad("related, reply"),
            Self(number) => write!(f, "state {number}"),
        }
    }
}

impl fmt::Debug for CtState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CtState({}: {self})", self.0)
    }
}

bitflags! {
    /// The status of a conntrack entry; unknown bits are kept
    ///
    /// `IPS_*` in `linux/netfilter/nf_conntrack_common.h`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    #[doc(alias = "ip_conntrack_status")]
    pub struct ConntrackStatus: u32 {
        /// A helper expected this connection
        #[doc(alias = "IPS_EXPECTED")]
        const EXPECTED = 1 << 0;
        /// Packets in the reply direction were seen
        #[doc(alias = "IPS_SEEN_REPLY")]
        const SEEN_REPLY = 1 << 1;
        /// The kernel keeps the entry when the table is full
        #[doc(alias = "IPS_ASSURED")]
        const ASSURED = 1 << 2;
        /// The first packet has passed the last hook: the entry is in the table
        #[doc(alias = "IPS_CONFIRMED")]
        const CONFIRMED = 1 << 3;
        /// The source address is translated
        #[doc(alias = "IPS_SRC_NAT")]
        const SRC_NAT = 1 << 4;
        /// The destination address is translated
        #[doc(alias = "IPS_DST_NAT")]
        const DST_NAT = 1 << 5;
        /// TCP sequence numbers are adjusted
        #[doc(alias = "IPS_SEQ_ADJUST")]
        const SEQ_ADJUST = 1 << 6;
        /// The rules for the source address have run
        #[doc(alias = "IPS_SRC_NAT_DONE")]
        const SRC_NAT_DONE = 1 << 7;
        /// The rules for the destination address have run
        #[doc(alias = "IPS_DST_NAT_DONE")]
        const DST_NAT_DONE = 1 << 8;
        /// The entry is being removed
        #[doc(alias = "IPS_DYING")]
        const DYING = 1 << 9;
        /// Packets do not renew the timeout
        #[doc(alias = "IPS_FIXED_TIMEOUT")]
        const FIXED_TIMEOUT = 1 << 10;
        /// A template, not a connection
        #[doc(alias = "IPS_TEMPLATE")]
        const TEMPLATE = 1 << 11;
        /// Marks an untracked packet. Until Linux 4.11.
        #[doc(alias = "IPS_UNTRACKED")]
        const UNTRACKED = 1 << 12;
        /// A rule or a program chose the helper
        #[doc(alias = "IPS_HELPER")]
        const HELPER = 1 << 13;
        /// A flowtable forwards the connection
        #[doc(alias = "IPS_OFFLOAD")]
        const OFFLOAD = 1 << 14;
        /// Hardware forwards the connection
        #[doc(alias = "IPS_HW_OFFLOAD")]
        const HW_OFFLOAD = 1 << 15;
        const _ = !0;
    }
}

/// The conntrack entry of a packet: a view of nested `CTA_*` attributes
///
/// The view is small and `Copy`. Its slices borrow the buffer, not the view. Attributes without a
/// version exist since Linux 3.6, the first that sends the entry with packets.
#[derive(Clone, Copy, PartialEq, Eq)]
#[doc(alias = "NFQA_CT")]
pub struct Conntrack<'a> {
    nested: &'a [u8],
}

impl<'a> Conntrack<'a> {
    /// A view of the attributes nested in `NFQA_CT`
    #[must_use]
    pub const fn new(nested: &'a [u8]) -> Self {
        Self { nested }
    }

    /// The nested attributes in wire format
    #[must_use]
    pub const fn as_bytes(&self) -> &'a [u8] {
        self.nested
    }

    /// All attributes in wire order
    #[must_use]
    pub const fn attrs(&self) -> Attrs<'a> {
        Attrs::new(self.nested)
    }

    /// The value of any attribute by its `CTA_*` number, in wire format
    ///
    /// `None` if the kernel did not send the attribute.
    #[must_use]
    #[inline]
    pub fn attr(&self, kind: u16) -> Option<&'a [u8]> {
        value(self.nested, kind)
    }

    /// The entry's id; compare it only for equality
    ///
    /// It stays the same for the life of the entry since Linux 5.3; before, the first packet of a
    /// connection may have another id. The kernel uses ids again after an entry is gone.
    #[must_use]
    #[doc(alias = "CTA_ID")]
    #[doc(alias = "nfct_get_attr_u32")]
    pub fn id(&self) -> Option<u32> {
        be32(self.nested, CTA_ID)
    }

    /// The mark of the connection (`ct mark`, `CONNMARK`)
    ///
    /// `None` if the kernel has no connection marks (`CONFIG_NF_CONNTRACK_MARK`), and on older
    /// kernels also if the mark is 0 (seen on 4.x, not on 6.1).
    #[must_use]
    #[doc(alias = "CTA_MARK")]
    #[doc(alias = "CONNMARK")]
    #[inline]
    pub fn mark(&self) -> Option<u32> {
        be32(self.nested, CTA_MARK)
    }

    /// The status bits
    #[must_use]
    #[doc(alias = "CTA_STATUS")]
    pub fn status(&self) -> Option<ConntrackStatus> {
        be32(self.nested, CTA_STATUS).map(ConntrackStatus::from_bits_retain)
    }

    /// The zone of both directions
    ///
    /// `None` in the default zone, and if only one direction has a zone: see [`Tuple::zone`].
    #[must_use]
    #[doc(alias = "CTA_ZONE")]
    pub fn zone(&self) -> Option<u16> {
        be16(self.nested, CTA_ZONE)
    }

    /// The time until the entry is removed, in whole seconds
    ///
    /// For the first packet of a connection the whole timeout.
    #[must_use]
    #[doc(alias = "CTA_TIMEOUT")]
    pub fn timeout(&self) -> Option<Duration> {
        be32(self.nested, CTA_TIMEOUT).map(|seconds| Duration::from_secs(seconds.into()))
    }

    /// The addresses and ports of one direction
    ///
    /// The original direction has them as they were before address translation.
    #[must_use]
    #[doc(alias = "CTA_TUPLE_ORIG")]
    #[doc(alias = "CTA_TUPLE_REPLY")]
    pub fn tuple(&self, direction: Direction) -> Option<Tuple<'a>> {
        let kind = match direction {
            Direction::Original => CTA_TUPLE_ORIG,
            Direction::Reply => CTA_TUPLE_REPLY,
        };
        self.attr(kind).map(Tuple::new)
    }

    /// The original tuple of the connection that this one belongs to
    ///
    /// `None` unless the status has [`EXPECTED`](ConntrackStatus::EXPECTED).
    #[must_use]
    #[doc(alias = "CTA_TUPLE_MASTER")]
    pub fn master(&self) -> Option<Tuple<'a>> {
        self.attr(CTA_TUPLE_MASTER).map(Tuple::new)
    }

    /// The state of a TCP connection
    ///
    /// `None` for other protocols.
    #[must_use]
    #[doc(alias = "CTA_PROTOINFO_TCP")]
    pub fn tcp(&self) -> Option<TcpInfo<'a>> {
        let nested = value(self.attr(CTA_PROTOINFO)?, CTA_PROTOINFO_TCP)?;
        Some(TcpInfo { nested })
    }

    /// The name of the helper, without a NUL at the end
    ///
    /// `None` for connections without a helper.
    #[must_use]
    #[doc(alias = "CTA_HELP_NAME")]
    pub fn helper(&self) -> Option<&'a [u8]> {
        value(self.attr(CTA_HELP)?, CTA_HELP_NAME).map(until_nul)
    }

    /// The labels of the connection
    ///
    /// `None` if no label is set. Since Linux 3.9.
    #[must_use]
    #[doc(alias = "CTA_LABELS")]
    #[doc(alias = "connlabel")]
    pub fn labels(&self) -> Option<Labels> {
        self.attr(CTA_LABELS).map(Labels::from_wire)
    }

    /// The packets and bytes of one direction
    ///
    /// `None` unless the sysctl `net.netfilter.nf_conntrack_acct` was on when the connection
    /// began. Since Linux 5.15.
    #[must_use]
    #[doc(alias = "CTA_COUNTERS_ORIG")]
    #[doc(alias = "CTA_COUNTERS_REPLY")]
    pub fn counters(&self, direction: Direction) -> Option<Counters> {
        let nested = self.attr(match direction {
            Direction::Original => CTA_COUNTERS_ORIG,
            Direction::Reply => CTA_COUNTERS_REPLY,
        })?;
        Some(Counters {
            packets: be64(nested, CTA_COUNTERS_PACKETS)?,
            bytes: be64(nested, CTA_COUNTERS_BYTES)?,
        })
    }

    /// The time of the first packet since the Unix epoch
    ///
    /// `None` unless the sysctl `net.netfilter.nf_conntrack_timestamp` was on when the connection
    /// began. Since Linux 5.15.
    #[must_use]
    #[doc(alias = "CTA_TIMESTAMP_START")]
    pub fn start(&self) -> Option<Duration> {
        be64(self.attr(CTA_TIMESTAMP)?, CTA_TIMESTAMP_START).map(Duration::from_nanos)
    }

    /// The time since the Unix epoch at which the entry ended
    ///
    /// `None` where [`start`](Self::start) is `None`, and while the entry is in the table.
    #[must_use]
    #[doc(alias = "CTA_TIMESTAMP_STOP")]
    pub fn stop(&self) -> Option<Duration> {
        be64(self.attr(CTA_TIMESTAMP)?, CTA_TIMESTAMP_STOP).map(Duration::from_nanos)
    }

    /// The security context of the connection, without a NUL at the end
    ///
    /// `None` for connections without a security mark (`ct secmark`).
    #[must_use]
    #[doc(alias = "CTA_SECCTX_NAME")]
    pub fn security_context(&self) -> Option<&'a [u8]> {
        value(self.attr(CTA_SECCTX)?, CTA_SECCTX_NAME).map(until_nul)
    }
}

impl fmt::Debug for Conntrack<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Conntrack")
            .field("id", &self.id())
            .field("mark", &self.mark())
            .field("status", &self.status())
            .field("original", &self.tuple(Direction::Original))
            .field("reply", &self.tuple(Direction::Reply))
            .finish_non_exhaustive()
    }
}

/// The addresses, the protocol and the ports of one direction of a connection
#[derive(Clone, Copy, PartialEq, Eq)]
#[doc(alias = "nf_conntrack_tuple")]
pub struct Tuple<'a> {
    nested: &'a [u8],
}

impl<'a> Tuple<'a> {
    /// A view of the attributes nested in a `CTA_TUPLE_*` attribute
    #[must_use]
    pub const fn new(nested: &'a [u8]) -> Self {
        Self { nested }
    }

    /// The nested attributes in wire format
    #[must_use]
    pub const fn as_bytes(&self) -> &'a [u8] {
        self.nested
    }

    /// The source address
    #[must_use]
    #[doc(alias = "CTA_IP_V4_SRC")]
    #[doc(alias = "CTA_IP_V6_SRC")]
    pub fn source(&self) -> Option<IpAddr> {
        self.address(CTA_IP_V4_SRC, CTA_IP_V6_SRC)
    }

    /// The destination address
    #[must_use]
    #[doc(alias = "CTA_IP_V4_DST")]
    #[doc(alias = "CTA_IP_V6_DST")]
    pub fn destination(&self) -> Option<IpAddr> {
        self.address(CTA_IP_V4_DST, CTA_IP_V6_DST)
    }

    fn address(&self, v4: u16, v6: u16) -> Option<IpAddr> {
        let ip = value(self.nested, CTA_TUPLE_IP)?;
        match fixed::<4>(ip, v4) {
            Some(octets) => Some(Ipv4Addr::from(octets).into()),
            None => fixed::<16>(ip, v6).map(|octets| Ipv6Addr::from(octets).into()),
        }
    }

    /// The transport protocol
    #[must_use]
    #[doc(alias = "CTA_PROTO_NUM")]
    pub fn protocol(&self) -> Option<IpProtocol> {
        self.proto_u8(CTA_PROTO_NUM).map(IpProtocol)
    }

    /// The source port; for GRE a key
    ///
    /// `None` for protocols without ports.
    #[must_use]
    #[doc(alias = "CTA_PROTO_SRC_PORT")]
    pub fn source_port(&self) -> Option<u16> {
        be16(self.proto()?, CTA_PROTO_SRC_PORT)
    }

    /// The destination port; for GRE a key
    ///
    /// `None` for protocols without ports.
    #[must_use]
    #[doc(alias = "CTA_PROTO_DST_PORT")]
    pub fn destination_port(&self) -> Option<u16> {
        be16(self.proto()?, CTA_PROTO_DST_PORT)
    }

    /// The id of ICMP and ICMPv6 messages
    ///
    /// `None` for other protocols.
    #[must_use]
    #[doc(alias = "CTA_PROTO_ICMP_ID")]
    #[doc(alias = "CTA_PROTO_ICMPV6_ID")]
    pub fn icmp_id(&self) -> Option<u16> {
        let proto = self.proto()?;
        be16(proto, CTA_PROTO_ICMP_ID).or_else(|| be16(proto, CTA_PROTO_ICMPV6_ID))
    }

    /// The type of ICMP and ICMPv6 messages; the reply tuple has the type of the answer
    ///
    /// `None` for other protocols.
    #[must_use]
    #[doc(alias = "CTA_PROTO_ICMP_TYPE")]
    #[doc(alias = "CTA_PROTO_ICMPV6_TYPE")]
    pub fn icmp_type(&self) -> Option<u8> {
        self.proto_u8(CTA_PROTO_ICMP_TYPE)
            .or_else(|| self.proto_u8(CTA_PROTO_ICMPV6_TYPE))
    }

    /// The code of ICMP and ICMPv6 messages
    ///
    /// `None` for other protocols.
    #[must_use]
    #[doc(alias = "CTA_PROTO_ICMP_CODE")]
    #[doc(alias = "CTA_PROTO_ICMPV6_CODE")]
    pub fn icmp_code(&self) -> Option<u8> {
        self.proto_u8(CTA_PROTO_ICMP_CODE)
            .or_else(|| self.proto_u8(CTA_PROTO_ICMPV6_CODE))
    }

    /// The zone of this direction
    ///
    /// `None` in the default zone, and if both directions have the same zone: see
    /// [`Conntrack::zone`]. Since Linux 4.3.
    #[must_use]
    #[doc(alias = "CTA_TUPLE_ZONE")]
    pub fn zone(&self) -> Option<u16> {
        be16(self.nested, CTA_TUPLE_ZONE)
    }

    /// The same as a key: without address translation, equal to
    /// [`Packet::flow`](crate::Packet::flow) of the direction's packets
    ///
    /// `None` if an attribute is missing.
    #[must_use]
    pub fn flow(&self) -> Option<FlowKey> {
        FlowKey::of_tuple(self)
    }

    fn proto(&self) -> Option<&'a [u8]> {
        value(self.nested, CTA_TUPLE_PROTO)
    }

    fn proto_u8(&self, kind: u16) -> Option<u8> {
        fixed::<1>(self.proto()?, kind).map(|[byte]| byte)
    }
}

impl fmt::Debug for Tuple<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tuple")
            .field("source", &self.source())
            .field("destination", &self.destination())
            .field("protocol", &self.protocol())
            .field("source_port", &self.source_port())
            .field("destination_port", &self.destination_port())
            .finish_non_exhaustive()
    }
}

/// The state of a TCP connection, as conntrack sees it
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TcpInfo<'a> {
    nested: &'a [u8],
}

impl TcpInfo<'_> {
    /// The state of the connection
    #[must_use]
    #[doc(alias = "CTA_PROTOINFO_TCP_STATE")]
    pub fn state(&self) -> Option<TcpState> {
        fixed::<1>(self.nested, CTA_PROTOINFO_TCP_STATE).map(|[state]| TcpState(state))
    }

    /// The window scale of one direction
    #[must_use]
    #[doc(alias = "CTA_PROTOINFO_TCP_WSCALE_ORIGINAL")]
    #[doc(alias = "CTA_PROTOINFO_TCP_WSCALE_REPLY")]
    pub fn window_scale(&self, direction: Direction) -> Option<u8> {
        let kind = match direction {
            Direction::Original => CTA_PROTOINFO_TCP_WSCALE_ORIGINAL,
            Direction::Reply => CTA_PROTOINFO_TCP_WSCALE_REPLY,
        };
        fixed::<1>(self.nested, kind).map(|[scale]| scale)
    }

    /// The flags of one direction
    #[must_use]
    #[doc(alias = "CTA_PROTOINFO_TCP_FLAGS_ORIGINAL")]
    #[doc(alias = "CTA_PROTOINFO_TCP_FLAGS_REPLY")]
    pub fn flags(&self, direction: Direction) -> Option<TcpFlags> {
        let kind = match direction {
            Direction::Original => CTA_PROTOINFO_TCP_FLAGS_ORIGINAL,
            Direction::Reply => CTA_PROTOINFO_TCP_FLAGS_REPLY,
        };
        fixed::<2>(self.nested, kind).map(|[flags, _mask]| TcpFlags::from_bits_retain(flags))
    }
}

impl fmt::Debug for TcpInfo<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TcpInfo")
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

/// The state of a TCP connection; any number is valid
///
/// `enum tcp_conntrack` in `linux/netfilter/nf_conntrack_tcp.h`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[doc(alias = "tcp_conntrack")]
#[expect(clippy::exhaustive_structs, reason = "a number on the wire")]
pub struct TcpState(pub u8);

impl TcpState {
    /// The kernel has accepted no packet yet
    #[doc(alias = "TCP_CONNTRACK_NONE")]
    pub const NONE: Self = Self(0);
    /// A SYN was seen
    #[doc(alias = "TCP_CONNTRACK_SYN_SENT")]
    pub const SYN_SENT: Self = Self(1);
    /// A SYN-ACK was seen
    #[doc(alias = "TCP_CONNTRACK_SYN_RECV")]
    pub const SYN_RECV: Self = Self(2);
    /// The handshake is complete
    #[doc(alias = "TCP_CONNTRACK_ESTABLISHED")]
    pub const ESTABLISHED: Self = Self(3);
    /// A FIN was seen
    #[doc(alias = "TCP_CONNTRACK_FIN_WAIT")]
    pub const FIN_WAIT: Self = Self(4);
    /// A FIN was acknowledged
    #[doc(alias = "TCP_CONNTRACK_CLOSE_WAIT")]
    pub const CLOSE_WAIT: Self = Self(5);
    /// FINs of both sides were seen
    #[doc(alias = "TCP_CONNTRACK_LAST_ACK")]
    pub const LAST_ACK: Self = Self(6);
    /// The last ACK was seen
    #[doc(alias = "TCP_CONNTRACK_TIME_WAIT")]
    pub const TIME_WAIT: Self = Self(7);
    /// A RST was seen
    #[doc(alias = "TCP_CONNTRACK_CLOSE")]
    pub const CLOSE: Self = Self(8);
    /// SYNs of both sides were seen
    #[doc(alias = "TCP_CONNTRACK_SYN_SENT2")]
    pub const SYN_SENT2: Self = Self(9);
}

impl fmt::Display for TcpState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self.0 {
            0 => "NONE",
            1 => "SYN_SENT",
            2 => "SYN_RECV",
            3 => "ESTABLISHED",
            4 => "FIN_WAIT",
            5 => "CLOSE_WAIT",
            6 => "LAST_ACK",
            7 => "TIME_WAIT",
            8 => "CLOSE",
            9 => "SYN_SENT2",
            number => return write!(f, "TCP state {number}"),
        })
    }
}

impl fmt::Debug for TcpState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TcpState({}: {self})", self.0)
    }
}

bitflags! {
    /// The facts that conntrack knows of one side of a TCP connection; unknown bits are kept
    ///
    /// `IP_CT_TCP_FLAG_*` in `linux/netfilter/nf_conntrack_tcp.h`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct TcpFlags: u8 {
        /// The side has a window scale
        #[doc(alias = "IP_CT_TCP_FLAG_WINDOW_SCALE")]
        const WINDOW_SCALE = 0x01;
        /// The side permits selective acknowledgements
        #[doc(alias = "IP_CT_TCP_FLAG_SACK_PERM")]
        const SACK_PERM = 0x02;
        /// The side sent the first FIN
        #[doc(alias = "IP_CT_TCP_FLAG_CLOSE_INIT")]
        const CLOSE_INIT = 0x04;
        /// Packets outside the window are accepted
        #[doc(alias = "IP_CT_TCP_FLAG_BE_LIBERAL")]
        const BE_LIBERAL = 0x08;
        /// Data of the side is not acknowledged yet
        #[doc(alias = "IP_CT_TCP_FLAG_DATA_UNACKNOWLEDGED")]
        const DATA_UNACKNOWLEDGED = 0x10;
        /// The highest acknowledgement is known
        #[doc(alias = "IP_CT_TCP_FLAG_MAXACK_SET")]
        const MAXACK_SET = 0x20;
        /// A challenge acknowledgement is expected (RFC 5961)
        #[doc(alias = "IP_CT_EXP_CHALLENGE_ACK")]
        const CHALLENGE_ACK = 0x40;
        /// Both sides opened the connection at once
        #[doc(alias = "IP_CT_TCP_SIMULTANEOUS_OPEN")]
        const SIMULTANEOUS_OPEN = 0x80;
        const _ = !0;
    }
}

/// The packets and bytes of one direction of a connection
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Counters {
    /// Packets
    #[doc(alias = "CTA_COUNTERS_PACKETS")]
    pub packets: u64,
    /// Bytes, with IP headers
    #[doc(alias = "CTA_COUNTERS_BYTES")]
    pub bytes: u64,
}

/// The 128 labels of a connection, each set or not
///
/// `ct label` in nftables and `connlabel` in iptables name them by number. On the wire they are
/// words of the kernel's `long` in host byte order. This type takes the kernel's `long` to have
/// the size of `usize`. So on big-endian machines a 32-bit program under a 64-bit kernel sees
/// wrong numbers.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
#[doc(alias = "connlabel")]
pub struct Labels {
    wire: [u8; Self::WIRE_LEN],
}

impl Labels {
    /// The number of labels
    #[doc(alias = "XT_CONNLABEL_MAXBIT")]
    pub const COUNT: u8 = 128;

    const WIRE_LEN: usize = Self::COUNT as usize / 8;

    /// No labels
    #[must_use]
    pub const fn empty() -> Self {
        Self {
            wire: [0; Self::WIRE_LEN],
        }
    }

    /// The same labels, and this one; a number above 127 changes nothing
    #[must_use]
    pub fn with(mut self, label: u8) -> Self {
        let (at, bit) = place(label);
        if let Some(byte) = self.wire.get_mut(at) {
            *byte |= bit;
        }
        self
    }

    /// True if this label is set
    #[must_use]
    pub fn contains(&self, label: u8) -> bool {
        let (at, bit) = place(label);
        self.wire.get(at).is_some_and(|byte| byte & bit != 0)
    }

    /// The labels that are set, in ascending order
    pub fn iter(&self) -> impl Iterator<Item = u8> + use<> {
        let labels = *self;
        (0..Self::COUNT).filter(move |&label| labels.contains(label))
    }

    /// Reads the kernel's words; before Linux 4.8 there may be fewer than 16 bytes
    fn from_wire(bytes: &[u8]) -> Self {
        let mut labels = Self::empty();
        for (to, from) in labels.wire.iter_mut().zip(bytes) {
            *to = *from;
        }
        labels
    }

    /// The labels as the kernel writes them
    #[must_use]
    pub const fn to_wire(self) -> [u8; 16] {
        self.wire
    }

    fn masked(mut self, mask: Self) -> Self {
        for (byte, mask) in self.wire.iter_mut().zip(mask.wire) {
            *byte &= mask;
        }
        self
    }
}

/// The byte and the bit of a label in the kernel's words
const fn place(label: u8) -> (usize, u8) {
    const WORD: usize = size_of::<usize>();
    let at = label as usize / 8;
    let at = match cfg!(target_endian = "big") {
        true => at / WORD * WORD + (WORD - 1 - at % WORD),
        false => at,
    };
    (at, 1 << (label % 8))
}

impl FromIterator<u8> for Labels {
    fn from_iter<I: IntoIterator<Item = u8>>(labels: I) -> Self {
        labels.into_iter().fold(Self::empty(), Self::with)
    }
}

impl fmt::Debug for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// Changes to a conntrack entry, for [`Decision::with_conntrack`](crate::Decision::with_conntrack)
///
/// **The kernel reports no error here**: it acknowledges the verdict even if it cannot change the
/// entry. It makes the changes in the order timeout, status, helper, labels, mark, and stops at
/// the first that fails. So this type refuses changes that the kernel would drop for the entry as
/// the packet showed it. If the entry changes before the verdict, the kernel may still drop a
/// change: most of all [`status`](Self::status), after the first answer of a connection. Send a
/// mark that must not be lost in a verdict of its own.
///
/// To change only the mark, use [`Decision::with_ct_mark`](crate::Decision::with_ct_mark).
///
/// ```
/// use core::time::Duration;
/// use nfqnl_proto::{ConntrackUpdate, ConntrackUpdateError, Packet};
///
/// fn short_lived(packet: &Packet<'_>) -> Result<Option<ConntrackUpdate>, ConntrackUpdateError> {
///     let Some(entry) = packet.conntrack() else {
///         return Ok(None); // untracked, or the kernel does not send entries
///     };
///     let update = ConntrackUpdate::new(&entry);
///     Ok(Some(update.timeout(Duration::from_secs(10))?.mark(0x1, 0xff)?))
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use]
pub struct ConntrackUpdate {
    old_status: ConntrackStatus,
    had_labels: bool,
    had_helper: bool,
    timeout: Option<u32>,
    status: Option<ConntrackStatus>,
    detaches_helper: bool,
    labels: Option<(Labels, Labels)>,
    mark: Option<(u32, u32)>,
}

/// A change that the kernel would drop without an error
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[non_exhaustive]
pub enum ConntrackUpdateError {
    /// Labels and a mark together, for an entry without labels
    ///
    /// New entries have room for labels only if a rule of the namespace sets labels. Without the
    /// room the kernel stops at the labels, and the mark is lost. Change only one of the two.
    #[error("labels and a mark for an entry without labels")]
    LabelsBesideMark,
    /// The entry's timeout is fixed ([`ConntrackStatus::FIXED_TIMEOUT`]), or the entry is being
    /// removed ([`ConntrackStatus::DYING`])
    #[error("the timeout of the entry is fixed")]
    FixedTimeout,
    /// Verdicts cannot set these status bits
    #[error("the kernel does not let verdicts set status {0:?}")]
    Status(ConntrackStatus),
    /// The entry has no helper, or its helper cannot be detached: a helper expected the connection
    /// ([`ConntrackStatus::EXPECTED`])
    #[error("the entry has no helper to detach")]
    NoHelper,
}

impl ConntrackUpdate {
    /// A buffer of this size has room for all changes
    pub(crate) const MAX_LEN: usize = 2 * 8 + 12 + 2 * 20 + 2 * 8;

    /// No changes yet to this entry
    pub fn new(entry: &Conntrack<'_>) -> Self {
        Self {
            old_status: entry.status().unwrap_or_default(),
            had_labels: entry.labels().is_some(),
            had_helper: entry.helper().is_some(),
            timeout: None,
            status: None,
            detaches_helper: false,
            labels: None,
            mark: None,
        }
    }

    /// Sets the time until the entry is removed, in whole seconds
    ///
    /// A packet of the connection renews the timeout, unless [`status`](Self::status) sets
    /// [`FIXED_TIMEOUT`](ConntrackStatus::FIXED_TIMEOUT). Before Linux 6.2 the first packet of a
    /// connection sets a wrong timeout: do it at a later packet.
    ///
    /// # Errors
    /// [`ConntrackUpdateError::FixedTimeout`].
    #[doc(alias = "CTA_TIMEOUT")]
    pub fn timeout(mut self, timeout: Duration) -> Result<Self, ConntrackUpdateError> {
        let cannot_change = ConntrackStatus::FIXED_TIMEOUT | ConntrackStatus::DYING;
        if self.old_status.intersects(cannot_change) {
            return Err(ConntrackUpdateError::FixedTimeout);
        }
        self.timeout = Some(u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX));
        Ok(self)
    }

    /// Sets status bits, and keeps the others
    ///
    /// Four can be set: [`SEEN_REPLY`](ConntrackStatus::SEEN_REPLY),
    /// [`ASSURED`](ConntrackStatus::ASSURED),
    /// [`FIXED_TIMEOUT`](ConntrackStatus::FIXED_TIMEOUT) and
    /// [`HELPER`](ConntrackStatus::HELPER).
    ///
    /// # Errors
    /// [`ConntrackUpdateError::Status`] with the bits that cannot be set.
    #[doc(alias = "CTA_STATUS")]
    pub fn status(mut self, bits: ConntrackStatus) -> Result<Self, ConntrackUpdateError> {
        const SETTABLE: ConntrackStatus = ConntrackStatus::SEEN_REPLY
            .union(ConntrackStatus::ASSURED)
            .union(ConntrackStatus::FIXED_TIMEOUT)
            .union(ConntrackStatus::HELPER);
        let refused = bits.difference(SETTABLE);
        if !refused.is_empty() {
            return Err(ConntrackUpdateError::Status(refused));
        }
        // The kernel clears the bits that are not sent.
        self.status = Some(self.status.unwrap_or(self.old_status) | bits);
        Ok(self)
    }

    /// Detaches the helper, and drops its expectations
    ///
    /// Since Linux 3.12.
    ///
    /// # Errors
    /// [`ConntrackUpdateError::NoHelper`].
    #[doc(alias = "CTA_HELP")]
    pub const fn detach_helper(mut self) -> Result<Self, ConntrackUpdateError> {
        if !self.had_helper || self.old_status.contains(ConntrackStatus::EXPECTED) {
            return Err(ConntrackUpdateError::NoHelper);
        }
        self.detaches_helper = true;
        Ok(self)
    }

    /// Sets the labels in `mask` to those in `labels`, and keeps the others
    ///
    /// The kernel ignores it if the entry has no room for labels: see
    /// [`ConntrackUpdateError::LabelsBesideMark`]. Since Linux 3.9.
    ///
    /// # Errors
    /// [`ConntrackUpdateError::LabelsBesideMark`].
    #[doc(alias = "CTA_LABELS")]
    pub fn labels(mut self, labels: Labels, mask: Labels) -> Result<Self, ConntrackUpdateError> {
        self.labels = Some((labels.masked(mask), mask));
        self.checked()
    }

    /// Sets the bits in `mask` of the connection's mark to those of `value`, and keeps the others
    ///
    /// Since Linux 3.9; before, the kernel ignores the mask and replaces the mark.
    ///
    /// # Errors
    /// [`ConntrackUpdateError::LabelsBesideMark`].
    #[doc(alias = "CTA_MARK")]
    pub fn mark(mut self, value: u32, mask: u32) -> Result<Self, ConntrackUpdateError> {
        self.mark = Some((value, mask));
        self.checked()
    }

    const fn checked(self) -> Result<Self, ConntrackUpdateError> {
        if self.labels.is_some() && self.mark.is_some() && !self.had_labels {
            return Err(ConntrackUpdateError::LabelsBesideMark);
        }
        Ok(self)
    }

    /// Appends the changes
    pub(crate) fn write(&self, message: &mut MessageWriter<'_>) {
        if let Some(timeout) = self.timeout {
            message.be32(CTA_TIMEOUT, timeout);
        }
        if let Some(status) = self.status {
            message.be32(CTA_STATUS, status.bits());
        }
        if self.detaches_helper {
            message.nested(CTA_HELP, |message| message.attr(CTA_HELP_NAME, b"\0"));
        }
        if let Some((labels, mask)) = self.labels {
            message.attr(CTA_LABELS, &labels.wire);
            message.attr(CTA_LABELS_MASK, &mask.wire);
        }
        if let Some((value, mask)) = self.mark {
            write_mark(message, value, mask);
        }
    }
}

/// Appends a new mark of a connection
pub(crate) fn write_mark(message: &mut MessageWriter<'_>, value: u32, mask: u32) {
    message.be32(CTA_MARK, value & mask); // the kernel toggles bits of the value outside the mask
    message.be32(CTA_MARK_MASK, mask);
}

/// Finds the value of the last attribute with this number, as the kernel's parser does
#[inline]
fn value(nested: &[u8], kind: u16) -> Option<&[u8]> {
    Attrs::new(nested).last(kind).map(|attr| attr.value)
}

fn fixed<const N: usize>(nested: &[u8], kind: u16) -> Option<[u8; N]> {
    value(nested, kind)?.first_chunk().copied()
}

fn be16(nested: &[u8], kind: u16) -> Option<u16> {
    fixed(nested, kind).map(u16::from_be_bytes)
}

#[inline]
fn be32(nested: &[u8], kind: u16) -> Option<u32> {
    fixed(nested, kind).map(u32::from_be_bytes)
}

fn be64(nested: &[u8], kind: u16) -> Option<u64> {
    fixed(nested, kind).map(u64::from_be_bytes)
}

/// Returns the bytes before the first NUL
fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|&byte| byte == 0).next().unwrap_or_default()
}
