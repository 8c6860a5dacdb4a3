//! Small wire values: families, hooks, copy modes, flags. Any number is a value; unknown ones are kept

use core::fmt;

use bitflags::bitflags;

use crate::consts::{
    NF_INET_FORWARD, NF_INET_LOCAL_IN, NF_INET_LOCAL_OUT, NF_INET_POST_ROUTING,
    NF_INET_PRE_ROUTING, NFPROTO_ARP, NFPROTO_BRIDGE, NFPROTO_IPV4, NFPROTO_IPV6, NFPROTO_UNSPEC,
    NFQA_CFG_F_CONNTRACK, NFQA_CFG_F_FAIL_OPEN, NFQA_CFG_F_GSO, NFQA_CFG_F_SECCTX,
    NFQA_CFG_F_UID_GID, NFQNL_COPY_META, NFQNL_COPY_NONE, NFQNL_COPY_PACKET,
};

/// A protocol family: `NFPROTO_*` in `linux/netfilter.h`, the same numbers as `AF_*` in `sys/socket.h`
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
    /// ARP (among `AF_*` this number means AX.25)
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

/// The netfilter hook that a packet was queued at: `enum nf_inet_hooks` in `linux/netfilter.h`, the same numbers as
/// `NF_BR_*` in `linux/netfilter_bridge.h`
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(clippy::exhaustive_structs, reason = "a number on the wire")]
pub struct Hook(pub u8);

impl Hook {
    /// Came in, not yet routed
    #[doc(alias = "NF_INET_PRE_ROUTING")]
    #[doc(alias = "NF_BR_PRE_ROUTING")]
    pub const PREROUTING: Self = Self(NF_INET_PRE_ROUTING);
    /// For this host
    #[doc(alias = "NF_INET_LOCAL_IN")]
    #[doc(alias = "NF_BR_LOCAL_IN")]
    pub const INPUT: Self = Self(NF_INET_LOCAL_IN);
    /// Through this host
    #[doc(alias = "NF_INET_FORWARD")]
    #[doc(alias = "NF_BR_FORWARD")]
    pub const FORWARD: Self = Self(NF_INET_FORWARD);
    /// Made here
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

/// How much of each packet the kernel sends: `enum nfqnl_config_mode` in `linux/netfilter/nfnetlink_queue.h`
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[expect(clippy::exhaustive_structs, reason = "a number on the wire")]
pub struct CopyMode(pub u8);

impl CopyMode {
    /// Nothing: the kernel **drops** every packet of the queue, bypass and fail-open or not. A queue is born so
    #[doc(alias = "NFQNL_COPY_NONE")]
    pub const NONE: Self = Self(NFQNL_COPY_NONE);
    /// Every attribute but the payload
    #[doc(alias = "NFQNL_COPY_META")]
    pub const META: Self = Self(NFQNL_COPY_META);
    /// Everything, and as much of the packet as the range says
    #[doc(alias = "NFQNL_COPY_PACKET")]
    pub const PACKET: Self = Self(NFQNL_COPY_PACKET);
}

impl fmt::Display for CopyMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NONE => f.write_str("none"),
            Self::META => f.write_str("meta"),
            Self::PACKET => f.write_str("packet"),
            Self(number) => write!(f, "mode {number}"),
        }
    }
}

impl fmt::Debug for CopyMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CopyMode({}: {self})", self.0)
    }
}

bitflags! {
    /// Switches of a queue: `NFQA_CFG_F_*` in `linux/netfilter/nfnetlink_queue.h`; unknown bits are kept
    ///
    /// A kernel that does not know a bit refuses it: `EOPNOTSUPP`, or `EINVAL` from Linux 7.2 on.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct ConfigFlags: u32 {
        /// Accept instead of drop when the queue or the socket's buffer is full. Linux 3.6
        #[doc(alias = "NFQA_CFG_F_FAIL_OPEN")]
        const FAIL_OPEN = NFQA_CFG_F_FAIL_OPEN;
        /// Send the conntrack entry; needs the kernel's nf_conntrack_netlink glue. Linux 3.6
        #[doc(alias = "NFQA_CFG_F_CONNTRACK")]
        const CONNTRACK = NFQA_CFG_F_CONNTRACK;
        /// Send large packets unsegmented, with unfinished checksums: the big gain for TCP. Linux 3.10
        #[doc(alias = "NFQA_CFG_F_GSO")]
        const GSO = NFQA_CFG_F_GSO;
        /// Send user and group of the sending socket. Linux 3.14
        #[doc(alias = "NFQA_CFG_F_UID_GID")]
        const UID_GID = NFQA_CFG_F_UID_GID;
        /// Send the security context. Linux 4.3
        #[doc(alias = "NFQA_CFG_F_SECCTX")]
        const SECCTX = NFQA_CFG_F_SECCTX;
        const _ = !0;
    }
}
