//! Families, hooks, copy modes and flags

use core::fmt;

use bitflags::bitflags;

use crate::consts::{
    NF_INET_FORWARD, NF_INET_LOCAL_IN, NF_INET_LOCAL_OUT, NF_INET_POST_ROUTING,
    NF_INET_PRE_ROUTING, NFPROTO_ARP, NFPROTO_BRIDGE, NFPROTO_IPV4, NFPROTO_IPV6, NFPROTO_UNSPEC,
    NFQA_CFG_F_CONNTRACK, NFQA_CFG_F_FAIL_OPEN, NFQA_CFG_F_GSO, NFQA_CFG_F_SECCTX,
    NFQA_CFG_F_UID_GID, NFQNL_COPY_META, NFQNL_COPY_NONE, NFQNL_COPY_PACKET,
};

/// A protocol family; any number is valid
///
/// `NFPROTO_*` in `linux/netfilter.h`, the same numbers as `AF_*` in `sys/socket.h`.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(clippy::exhaustive_structs, reason = "a number on the wire")]
pub struct Family(pub u8);

impl Family {
    /// No family in particular
    #[doc(alias = "AF_UNSPEC")]
    #[doc(alias = "NFPROTO_UNSPEC")]
    pub const UNSPEC: Self = Self(NFPROTO_UNSPEC);
    /// IPv4
    #[doc(alias = "AF_INET")]
    #[doc(alias = "NFPROTO_IPV4")]
    pub const INET: Self = Self(NFPROTO_IPV4);
    /// ARP (the `AF_*` constant with this number is AX.25)
    #[doc(alias = "NFPROTO_ARP")]
    pub const ARP: Self = Self(NFPROTO_ARP);
    /// Bridged frames
    #[doc(alias = "AF_BRIDGE")]
    #[doc(alias = "NFPROTO_BRIDGE")]
    pub const BRIDGE: Self = Self(NFPROTO_BRIDGE);
    /// IPv6
    #[doc(alias = "AF_INET6")]
    #[doc(alias = "NFPROTO_IPV6")]
    pub const INET6: Self = Self(NFPROTO_IPV6);
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::UNSPEC => f.write_str("unspecified"),
            Self::INET => f.write_str("IPv4"),
            Self::ARP => f.write_str("ARP"),
            Self::BRIDGE => f.write_str("bridge"),
            Self::INET6 => f.write_str("IPv6"),
            Self(number) => write!(f, "family {number}"),
        }
    }
}

impl fmt::Debug for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Family({}: {self})", self.0)
    }
}

/// The protocol of a frame's content; any number is valid
///
/// `ETH_P_*` in `linux/if_ether.h`.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(clippy::exhaustive_structs, reason = "a number on the wire")]
pub struct EtherType(pub u16);

impl EtherType {
    /// IPv4
    #[doc(alias = "ETH_P_IP")]
    pub const IPV4: Self = Self(0x0800);
    /// ARP
    #[doc(alias = "ETH_P_ARP")]
    pub const ARP: Self = Self(0x0806);
    /// IPv6
    #[doc(alias = "ETH_P_IPV6")]
    pub const IPV6: Self = Self(0x86dd);
}

impl fmt::Display for EtherType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::IPV4 => f.pad("IPv4"),
            Self::ARP => f.pad("ARP"),
            Self::IPV6 => f.pad("IPv6"),
            Self(number) => write!(f, "{number:#06x}"),
        }
    }
}

impl fmt::Debug for EtherType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EtherType({:#06x}: {self})", self.0)
    }
}

/// The transport protocol of an IP packet; any number is valid
///
/// `IPPROTO_*` in `linux/in.h` and `linux/in6.h`.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(clippy::exhaustive_structs, reason = "a number on the wire")]
pub struct IpProtocol(pub u8);

impl IpProtocol {
    /// ICMP
    #[doc(alias = "IPPROTO_ICMP")]
    pub const ICMP: Self = Self(1);
    /// TCP
    #[doc(alias = "IPPROTO_TCP")]
    pub const TCP: Self = Self(6);
    /// UDP
    #[doc(alias = "IPPROTO_UDP")]
    pub const UDP: Self = Self(17);
    /// DCCP
    #[doc(alias = "IPPROTO_DCCP")]
    pub const DCCP: Self = Self(33);
    /// GRE
    #[doc(alias = "IPPROTO_GRE")]
    pub const GRE: Self = Self(47);
    /// ESP
    #[doc(alias = "IPPROTO_ESP")]
    pub const ESP: Self = Self(50);
    /// ICMPv6
    #[doc(alias = "IPPROTO_ICMPV6")]
    pub const ICMPV6: Self = Self(58);
    /// SCTP
    #[doc(alias = "IPPROTO_SCTP")]
    pub const SCTP: Self = Self(132);
    /// UDP-Lite
    #[doc(alias = "IPPROTO_UDPLITE")]
    pub const UDPLITE: Self = Self(136);
}

impl fmt::Display for IpProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::ICMP => f.pad("ICMP"),
            Self::TCP => f.pad("TCP"),
            Self::UDP => f.pad("UDP"),
            Self::DCCP => f.pad("DCCP"),
            Self::GRE => f.pad("GRE"),
            Self::ESP => f.pad("ESP"),
            Self::ICMPV6 => f.pad("ICMPv6"),
            Self::SCTP => f.pad("SCTP"),
            Self::UDPLITE => f.pad("UDP-Lite"),
            Self(number) => write!(f, "protocol {number}"),
        }
    }
}

impl fmt::Debug for IpProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IpProtocol({}: {self})", self.0)
    }
}

/// A netfilter hook; any number is valid
///
/// `enum nf_inet_hooks` in `linux/netfilter.h`, the same numbers as `NF_BR_*` in
/// `linux/netfilter_bridge.h`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(clippy::exhaustive_structs, reason = "a number on the wire")]
pub struct Hook(pub u8);

impl Hook {
    /// Received, not yet routed
    #[doc(alias = "NF_INET_PRE_ROUTING")]
    #[doc(alias = "NF_BR_PRE_ROUTING")]
    pub const PREROUTING: Self = Self(NF_INET_PRE_ROUTING);
    /// Addressed to this host
    #[doc(alias = "NF_INET_LOCAL_IN")]
    #[doc(alias = "NF_BR_LOCAL_IN")]
    pub const INPUT: Self = Self(NF_INET_LOCAL_IN);
    /// Forwarded by this host
    #[doc(alias = "NF_INET_FORWARD")]
    #[doc(alias = "NF_BR_FORWARD")]
    pub const FORWARD: Self = Self(NF_INET_FORWARD);
    /// Sent by this host
    #[doc(alias = "NF_INET_LOCAL_OUT")]
    #[doc(alias = "NF_BR_LOCAL_OUT")]
    pub const OUTPUT: Self = Self(NF_INET_LOCAL_OUT);
    /// About to leave
    #[doc(alias = "NF_INET_POST_ROUTING")]
    #[doc(alias = "NF_BR_POST_ROUTING")]
    pub const POSTROUTING: Self = Self(NF_INET_POST_ROUTING);
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::PREROUTING => f.pad("PREROUTING"),
            Self::INPUT => f.pad("INPUT"),
            Self::FORWARD => f.pad("FORWARD"),
            Self::OUTPUT => f.pad("OUTPUT"),
            Self::POSTROUTING => f.pad("POSTROUTING"),
            Self(number) => write!(f, "hook {number}"),
        }
    }
}

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hook({}: {self})", self.0)
    }
}

/// The part of each packet to send to user space
///
/// `enum nfqnl_config_mode` in `linux/netfilter/nfnetlink_queue.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(
    clippy::exhaustive_enums,
    reason = "the kernel has had these three since Linux 2.6.14"
)]
pub enum CopyMode {
    /// Nothing: the kernel **drops** every packet of the queue, even with bypass or fail-open
    ///
    /// The mode of a new queue.
    #[doc(alias = "NFQNL_COPY_NONE")]
    None,
    /// All attributes except the payload
    #[doc(alias = "NFQNL_COPY_META")]
    Meta,
    /// All attributes, with a payload of at most the copy range
    #[doc(alias = "NFQNL_COPY_PACKET")]
    Packet,
}

impl CopyMode {
    /// The number on the wire
    #[must_use]
    pub const fn to_raw(self) -> u8 {
        match self {
            Self::None => NFQNL_COPY_NONE,
            Self::Meta => NFQNL_COPY_META,
            Self::Packet => NFQNL_COPY_PACKET,
        }
    }

    /// The mode with this number on the wire; `None` if the number is unknown
    #[must_use]
    pub const fn from_raw(raw: u8) -> Option<Self> {
        match raw {
            NFQNL_COPY_NONE => Some(Self::None),
            NFQNL_COPY_META => Some(Self::Meta),
            NFQNL_COPY_PACKET => Some(Self::Packet),
            _ => None,
        }
    }
}

impl fmt::Display for CopyMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::None => "none",
            Self::Meta => "meta",
            Self::Packet => "packet",
        })
    }
}

bitflags! {
    /// Flags of a queue; unknown bits are kept
    ///
    /// `NFQA_CFG_F_*` in `linux/netfilter/nfnetlink_queue.h`. The kernel refuses a flag unknown to
    /// it with `EOPNOTSUPP`, or with `EINVAL` since Linux 7.2.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct ConfigFlags: u32 {
        /// Accept packets instead of dropping them while the queue or the socket's receive buffer
        /// is full. Since Linux 3.6; for the receive buffer since Linux 4.6.
        #[doc(alias = "NFQA_CFG_F_FAIL_OPEN")]
        const FAIL_OPEN = NFQA_CFG_F_FAIL_OPEN;
        /// Send the conntrack entry. Needs a kernel with `CONFIG_NETFILTER_NETLINK_GLUE_CT`, and a
        /// rule that turns tracking on: see
        /// [`Decision::with_ct_mark`](crate::Decision::with_ct_mark). Since Linux 3.6.
        #[doc(alias = "NFQA_CFG_F_CONNTRACK")]
        const CONNTRACK = NFQA_CFG_F_CONNTRACK;
        /// Send large packets unsegmented, with incomplete checksums: much faster for TCP. Since
        /// Linux 3.10.
        #[doc(alias = "NFQA_CFG_F_GSO")]
        const GSO = NFQA_CFG_F_GSO;
        /// Send the user and the group of the packet's socket. Since Linux 3.14.
        #[doc(alias = "NFQA_CFG_F_UID_GID")]
        const UID_GID = NFQA_CFG_F_UID_GID;
        /// Send the security context. Since Linux 4.3.
        #[doc(alias = "NFQA_CFG_F_SECCTX")]
        const SECCTX = NFQA_CFG_F_SECCTX;
        const _ = !0;
    }
}
