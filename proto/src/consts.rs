//! Raw numbers of the protocol, with their names in the kernel's headers
//!
//! The types of this crate cover most of them. Use the raw numbers in ported code, and for
//! attributes without a getter. Each constant names its header, as of Linux 6.18. `be32` and
//! `be16` are big-endian integers of 32 and 16 bits.

/// Defines constants from one place in the kernel's headers, which their documentation names
macro_rules! from_header {
    ($place:literal: $($(#[$doc:meta])* pub const $name:ident: $type:ty = $value:expr;)*) => {
        $(
            $(#[$doc])*
            #[doc = concat!("\n\nFrom ", $place)]
            pub const $name: $type = $value;
        )*
    };
}

from_header! {"`linux/netlink.h`":
    /// The netlink family of the socket
    pub const NETLINK_NETFILTER: u8 = 12;
}

from_header! {"`linux/netfilter/nfnetlink.h`":
    /// The queue subsystem of netfilter: the high byte of every message type here
    pub const NFNL_SUBSYS_QUEUE: u8 = 3;
}

from_header! {"`linux/netlink.h`":
    /// Does nothing; with [`NLM_F_ACK`] the kernel acknowledges it
    pub const NLMSG_NOOP: u16 = 1;
    /// An error, or with code 0 an acknowledgement
    pub const NLMSG_ERROR: u16 = 2;
    /// The end of a dump
    pub const NLMSG_DONE: u16 = 3;
    /// Data was lost
    pub const NLMSG_OVERRUN: u16 = 4;
    /// Types below this one are control messages
    pub const NLMSG_MIN_TYPE: u16 = 0x10;
}

from_header! {"`linux/netlink.h`":
    /// A request to the kernel, which ignores messages without this flag
    pub const NLM_F_REQUEST: u16 = 0x01;
    /// Asks for an acknowledgement; the kernel reports errors even without it
    pub const NLM_F_ACK: u16 = 0x04;
    /// Asks for a notification about one's own request; the queue subsystem ignores it
    pub const NLM_F_ECHO: u16 = 0x08;
    /// On an error: the message repeats only the header of the request
    pub const NLM_F_CAPPED: u16 = 0x100;
    /// On an error: extended-ack attributes follow
    pub const NLM_F_ACK_TLVS: u16 = 0x200;
}

from_header! {"`linux/netlink.h`":
    /// Flag on an attribute's type: it nests others
    pub const NLA_F_NESTED: u16 = 1 << 15;
    /// Flag on an attribute's type: its value is big-endian
    pub const NLA_F_NET_BYTEORDER: u16 = 1 << 14;
    /// Masks the flags of an attribute's type
    pub const NLA_TYPE_MASK: u16 = !(NLA_F_NESTED | NLA_F_NET_BYTEORDER);
    /// Extended ack: the kernel's error text, NUL-terminated
    pub const NLMSGERR_ATTR_MSG: u16 = 1;
    /// Extended ack: offset of the offending attribute in the request
    pub const NLMSGERR_ATTR_OFFS: u16 = 2;
}

from_header! {"`enum nfqnl_msg_types` in `linux/netfilter/nfnetlink_queue.h`":
    /// Kernel to user: a packet waits for a verdict
    pub const NFQNL_MSG_PACKET: u8 = 0;
    /// User to kernel: the verdict on one packet
    pub const NFQNL_MSG_VERDICT: u8 = 1;
    /// User to kernel: configuration of a queue
    pub const NFQNL_MSG_CONFIG: u8 = 2;
    /// User to kernel: one verdict on all packets up to an id. Since Linux 3.1.
    pub const NFQNL_MSG_VERDICT_BATCH: u8 = 3;
}

/// The netlink message type of a message of the queue subsystem
///
/// The reverse of `NFNL_SUBSYS_ID` and `NFNL_MSG_TYPE` in `linux/netfilter/nfnetlink.h`.
#[must_use]
pub const fn message_type(message: u8) -> u16 {
    u16::from_be_bytes([NFNL_SUBSYS_QUEUE, message])
}

from_header! {"`enum nfqnl_attr_type` in `linux/netfilter/nfnetlink_queue.h`":
    /// `struct nfqnl_msg_packet_hdr`
    pub const NFQA_PACKET_HDR: u16 = 1;
    /// `struct nfqnl_msg_verdict_hdr`
    pub const NFQA_VERDICT_HDR: u16 = 2;
    /// Packet mark, be32
    pub const NFQA_MARK: u16 = 3;
    /// `struct nfqnl_msg_packet_timestamp`
    pub const NFQA_TIMESTAMP: u16 = 4;
    /// Input device, be32
    pub const NFQA_IFINDEX_INDEV: u16 = 5;
    /// Output device, be32
    pub const NFQA_IFINDEX_OUTDEV: u16 = 6;
    /// Input bridge port, be32
    pub const NFQA_IFINDEX_PHYSINDEV: u16 = 7;
    /// Output bridge port, be32
    pub const NFQA_IFINDEX_PHYSOUTDEV: u16 = 8;
    /// `struct nfqnl_msg_packet_hw`
    pub const NFQA_HWADDR: u16 = 9;
    /// The packet from its network header on
    pub const NFQA_PAYLOAD: u16 = 10;
    /// Conntrack entry, nested `CTA_*`
    pub const NFQA_CT: u16 = 11;
    /// `enum ip_conntrack_info`, be32
    pub const NFQA_CT_INFO: u16 = 12;
    /// Length of the whole packet, be32, only if the payload is truncated
    pub const NFQA_CAP_LEN: u16 = 13;
    /// `NFQA_SKB_*` bits, be32
    pub const NFQA_SKB_INFO: u16 = 14;
    /// Conntrack expectation, nested `CTA_EXPECT_*`
    pub const NFQA_EXP: u16 = 15;
    /// User id of the packet's socket, be32
    pub const NFQA_UID: u16 = 16;
    /// Group id of the packet's socket, be32
    pub const NFQA_GID: u16 = 17;
    /// Security context, bytes
    pub const NFQA_SECCTX: u16 = 18;
    /// VLAN tag, nested `NFQA_VLAN_*`
    pub const NFQA_VLAN: u16 = 19;
    /// The whole link-layer header
    pub const NFQA_L2HDR: u16 = 20;
    /// `skb->priority`, be32
    pub const NFQA_PRIORITY: u16 = 21;
    /// net_cls cgroup class id, be32
    pub const NFQA_CGROUP_CLASSID: u16 = 22;
}

/// The highest number of an attribute with a getter in this crate
///
/// The `NFQA_MAX` in `linux/netfilter/nfnetlink_queue.h` is the highest number in the kernel.
pub const NFQA_MAX: u16 = NFQA_CGROUP_CLASSID;

from_header! {"`linux/netfilter/nfnetlink_queue.h`, bits of `NFQA_SKB_INFO`":
    /// The checksums in the payload are incomplete
    pub const NFQA_SKB_CSUMNOTREADY: u32 = 1 << 0;
    /// A large packet, to be segmented later
    pub const NFQA_SKB_GSO: u32 = 1 << 1;
    /// The checksums have not been verified yet
    pub const NFQA_SKB_CSUM_NOTVERIFIED: u32 = 1 << 2;
}

from_header! {"`enum nfqnl_vlan_attr` in `linux/netfilter/nfnetlink_queue.h`":
    /// Tag protocol (EtherType), be16
    pub const NFQA_VLAN_PROTO: u16 = 1;
    /// Tag control information, be16
    pub const NFQA_VLAN_TCI: u16 = 2;
}

from_header! {"`enum ctattr_type` in `linux/netfilter/nfnetlink_conntrack.h`":
    /// Tuple of the original direction, nested `CTA_TUPLE_*`
    pub const CTA_TUPLE_ORIG: u16 = 1;
    /// Tuple of the reply direction, nested `CTA_TUPLE_*`
    pub const CTA_TUPLE_REPLY: u16 = 2;
    /// `IPS_*` bits, be32
    pub const CTA_STATUS: u16 = 3;
    /// State of the transport protocol, nested `CTA_PROTOINFO_*`
    pub const CTA_PROTOINFO: u16 = 4;
    /// Helper, nested `CTA_HELP_*`
    pub const CTA_HELP: u16 = 5;
    /// Seconds until the entry is removed, be32
    pub const CTA_TIMEOUT: u16 = 7;
    /// Connection mark, be32
    pub const CTA_MARK: u16 = 8;
    /// Counters of the original direction, nested `CTA_COUNTERS_*`
    pub const CTA_COUNTERS_ORIG: u16 = 9;
    /// Counters of the reply direction, nested `CTA_COUNTERS_*`
    pub const CTA_COUNTERS_REPLY: u16 = 10;
    /// Id of the entry, 4 bytes
    pub const CTA_ID: u16 = 12;
    /// Original tuple of the expecting connection, nested `CTA_TUPLE_*`
    pub const CTA_TUPLE_MASTER: u16 = 14;
    /// Sequence number adjustment of the original direction, nested
    pub const CTA_SEQ_ADJ_ORIG: u16 = 15;
    /// Sequence number adjustment of the reply direction, nested
    pub const CTA_SEQ_ADJ_REPLY: u16 = 16;
    /// Zone, be16
    pub const CTA_ZONE: u16 = 18;
    /// Security context, nested `CTA_SECCTX_*`
    pub const CTA_SECCTX: u16 = 19;
    /// Begin and end of the connection, nested `CTA_TIMESTAMP_*`
    pub const CTA_TIMESTAMP: u16 = 20;
    /// Only in verdicts: the bits of the mark to change, be32
    pub const CTA_MARK_MASK: u16 = 21;
    /// Labels, 16 bytes of the kernel's words in host byte order
    pub const CTA_LABELS: u16 = 22;
    /// Only in verdicts: the labels to change, as [`CTA_LABELS`]
    pub const CTA_LABELS_MASK: u16 = 23;
    /// State of the SYN proxy, nested
    pub const CTA_SYNPROXY: u16 = 24;
}

from_header! {"`enum ctattr_tuple` in `linux/netfilter/nfnetlink_conntrack.h`":
    /// Addresses, nested `CTA_IP_*`
    pub const CTA_TUPLE_IP: u16 = 1;
    /// Transport protocol, nested `CTA_PROTO_*`
    pub const CTA_TUPLE_PROTO: u16 = 2;
    /// Zone of the direction, be16
    pub const CTA_TUPLE_ZONE: u16 = 3;
}

from_header! {"`enum ctattr_ip` in `linux/netfilter/nfnetlink_conntrack.h`":
    /// IPv4 source, 4 bytes
    pub const CTA_IP_V4_SRC: u16 = 1;
    /// IPv4 destination, 4 bytes
    pub const CTA_IP_V4_DST: u16 = 2;
    /// IPv6 source, 16 bytes
    pub const CTA_IP_V6_SRC: u16 = 3;
    /// IPv6 destination, 16 bytes
    pub const CTA_IP_V6_DST: u16 = 4;
}

from_header! {"`enum ctattr_l4proto` in `linux/netfilter/nfnetlink_conntrack.h`":
    /// Number of the transport protocol, 1 byte
    pub const CTA_PROTO_NUM: u16 = 1;
    /// Source port, be16
    pub const CTA_PROTO_SRC_PORT: u16 = 2;
    /// Destination port, be16
    pub const CTA_PROTO_DST_PORT: u16 = 3;
    /// ICMP id, be16
    pub const CTA_PROTO_ICMP_ID: u16 = 4;
    /// ICMP type, 1 byte
    pub const CTA_PROTO_ICMP_TYPE: u16 = 5;
    /// ICMP code, 1 byte
    pub const CTA_PROTO_ICMP_CODE: u16 = 6;
    /// ICMPv6 id, be16
    pub const CTA_PROTO_ICMPV6_ID: u16 = 7;
    /// ICMPv6 type, 1 byte
    pub const CTA_PROTO_ICMPV6_TYPE: u16 = 8;
    /// ICMPv6 code, 1 byte
    pub const CTA_PROTO_ICMPV6_CODE: u16 = 9;
}

from_header! {"`enum ctattr_protoinfo` in `linux/netfilter/nfnetlink_conntrack.h`":
    /// TCP, nested `CTA_PROTOINFO_TCP_*`
    pub const CTA_PROTOINFO_TCP: u16 = 1;
    /// DCCP, nested
    pub const CTA_PROTOINFO_DCCP: u16 = 2;
    /// SCTP, nested
    pub const CTA_PROTOINFO_SCTP: u16 = 3;
}

from_header! {"`enum ctattr_protoinfo_tcp` in `linux/netfilter/nfnetlink_conntrack.h`":
    /// State, 1 byte of `enum tcp_conntrack`
    pub const CTA_PROTOINFO_TCP_STATE: u16 = 1;
    /// Window scale of the original direction, 1 byte
    pub const CTA_PROTOINFO_TCP_WSCALE_ORIGINAL: u16 = 2;
    /// Window scale of the reply direction, 1 byte
    pub const CTA_PROTOINFO_TCP_WSCALE_REPLY: u16 = 3;
    /// Flags of the original direction, `struct nf_ct_tcp_flags`
    pub const CTA_PROTOINFO_TCP_FLAGS_ORIGINAL: u16 = 4;
    /// Flags of the reply direction, `struct nf_ct_tcp_flags`
    pub const CTA_PROTOINFO_TCP_FLAGS_REPLY: u16 = 5;
}

from_header! {"`linux/netfilter/nfnetlink_conntrack.h`, inside other attributes":
    /// In [`CTA_HELP`]: name of the helper, a string
    pub const CTA_HELP_NAME: u16 = 1;
    /// In [`CTA_COUNTERS_ORIG`]: packets, be64
    pub const CTA_COUNTERS_PACKETS: u16 = 1;
    /// In [`CTA_COUNTERS_ORIG`]: bytes, be64
    pub const CTA_COUNTERS_BYTES: u16 = 2;
    /// In [`CTA_TIMESTAMP`]: nanoseconds since the Unix epoch, be64
    pub const CTA_TIMESTAMP_START: u16 = 1;
    /// In [`CTA_TIMESTAMP`]: nanoseconds since the Unix epoch, be64
    pub const CTA_TIMESTAMP_STOP: u16 = 2;
    /// In [`CTA_SECCTX`]: security context, a string
    pub const CTA_SECCTX_NAME: u16 = 1;
}

from_header! {"`enum ip_conntrack_info` in `linux/netfilter/nf_conntrack_common.h`":
    /// Packets were seen in both directions
    pub const IP_CT_ESTABLISHED: u32 = 0;
    /// Belongs to another connection
    pub const IP_CT_RELATED: u32 = 1;
    /// No answer was seen
    pub const IP_CT_NEW: u32 = 2;
    /// [`IP_CT_ESTABLISHED`], in the reply direction
    pub const IP_CT_ESTABLISHED_REPLY: u32 = 3;
    /// [`IP_CT_RELATED`], in the reply direction
    pub const IP_CT_RELATED_REPLY: u32 = 4;
    /// [`IP_CT_NEW`], in the reply direction
    pub const IP_CT_NEW_REPLY: u32 = 5;
}

from_header! {"`enum nfqnl_msg_config_cmds` in `linux/netfilter/nfnetlink_queue.h`":
    /// Bind a queue to this socket
    pub const NFQNL_CFG_CMD_BIND: u8 = 1;
    /// Unbind a queue; the kernel drops its waiting packets
    pub const NFQNL_CFG_CMD_UNBIND: u8 = 2;
    /// Bind a protocol family; does nothing since Linux 3.8
    pub const NFQNL_CFG_CMD_PF_BIND: u8 = 3;
    /// Unbind a protocol family; does nothing since Linux 3.8
    pub const NFQNL_CFG_CMD_PF_UNBIND: u8 = 4;
}

from_header! {"`enum nfqnl_config_mode` in `linux/netfilter/nfnetlink_queue.h`":
    /// Send nothing, and drop every packet
    pub const NFQNL_COPY_NONE: u8 = 0;
    /// Send attributes without the payload
    pub const NFQNL_COPY_META: u8 = 1;
    /// Send attributes and payload
    pub const NFQNL_COPY_PACKET: u8 = 2;
}

from_header! {"`enum nfqnl_attr_config` in `linux/netfilter/nfnetlink_queue.h`":
    /// `struct nfqnl_msg_config_cmd`
    pub const NFQA_CFG_CMD: u16 = 1;
    /// `struct nfqnl_msg_config_params`
    pub const NFQA_CFG_PARAMS: u16 = 2;
    /// Maximum length of the queue, be32
    pub const NFQA_CFG_QUEUE_MAXLEN: u16 = 3;
    /// Mask of the flags to change by [`NFQA_CFG_FLAGS`], be32
    pub const NFQA_CFG_MASK: u16 = 4;
    /// `NFQA_CFG_F_*` bits, be32
    pub const NFQA_CFG_FLAGS: u16 = 5;
}

from_header! {"`linux/netfilter/nfnetlink_queue.h`, bits of `NFQA_CFG_FLAGS`":
    /// Accept instead of drop when the queue or the socket's buffer is full
    pub const NFQA_CFG_F_FAIL_OPEN: u32 = 1 << 0;
    /// Send the conntrack entry
    pub const NFQA_CFG_F_CONNTRACK: u32 = 1 << 1;
    /// Send large packets unsegmented
    pub const NFQA_CFG_F_GSO: u32 = 1 << 2;
    /// Send user and group of the packet's socket
    pub const NFQA_CFG_F_UID_GID: u32 = 1 << 3;
    /// Send the security context
    pub const NFQA_CFG_F_SECCTX: u32 = 1 << 4;
}

from_header! {"`linux/netfilter.h`":
    /// Drop
    pub const NF_DROP: u32 = 0;
    /// Accept
    pub const NF_ACCEPT: u32 = 1;
    /// Forget the packet; the kernel refuses this from user space
    pub const NF_STOLEN: u32 = 2;
    /// Queue it again
    pub const NF_QUEUE: u32 = 3;
    /// Run the same base chain again
    pub const NF_REPEAT: u32 = 4;
    /// Accept, and skip the later base chains of this hook
    pub const NF_STOP: u32 = 5;
    /// Masks everything but the verdict itself
    pub const NF_VERDICT_MASK: u32 = 0x0000_00ff;
    /// With [`NF_QUEUE`]: let the packet go on if the queue is not bound
    pub const NF_VERDICT_FLAG_QUEUE_BYPASS: u32 = 0x0000_8000;
    /// With [`NF_QUEUE`]: the position of the queue number
    pub const NF_VERDICT_QBITS: u32 = 16;
}

from_header! {"`enum nf_inet_hooks` in `linux/netfilter.h`":
    /// Received, not yet routed
    pub const NF_INET_PRE_ROUTING: u8 = 0;
    /// Addressed to this host
    pub const NF_INET_LOCAL_IN: u8 = 1;
    /// Forwarded by this host
    pub const NF_INET_FORWARD: u8 = 2;
    /// Sent by this host
    pub const NF_INET_LOCAL_OUT: u8 = 3;
    /// About to leave
    pub const NF_INET_POST_ROUTING: u8 = 4;
}

from_header! {"`linux/netfilter.h`":
    /// No family in particular
    pub const NFPROTO_UNSPEC: u8 = 0;
    /// IPv4
    pub const NFPROTO_IPV4: u8 = 2;
    /// ARP
    pub const NFPROTO_ARP: u8 = 3;
    /// Bridged frames
    pub const NFPROTO_BRIDGE: u8 = 7;
    /// IPv6
    pub const NFPROTO_IPV6: u8 = 10;
}

/// The maximum payload of one message: an attribute's length has 16 bits and includes its header
///
/// The kernel truncates payloads to this length, even if the copy range is longer
/// (`nfqnl_set_mode` in `net/netfilter/nfnetlink_queue.c`).
pub const MAX_PAYLOAD: usize = u16::MAX as usize - ATTR_HEADER_LEN;

from_header! {"`linux/netlink.h`":
    /// `sizeof(struct nlmsghdr)`
    pub const MESSAGE_HEADER_LEN: usize = 4 + 2 + 2 + 4 + 4;
    /// `sizeof(struct nlmsgerr)`: the error number, and the header of the request
    pub const ERROR_LEN: usize = 4 + MESSAGE_HEADER_LEN;
    /// `sizeof(struct nlattr)`
    pub const ATTR_HEADER_LEN: usize = 2 + 2;
}

from_header! {"`linux/netfilter/nfnetlink.h`":
    /// `sizeof(struct nfgenmsg)`
    pub const FAMILY_HEADER_LEN: usize = 1 + 1 + 2;
}

/// The offset of a message's attributes, behind its two headers
pub const ATTRS_OFFSET: usize = MESSAGE_HEADER_LEN + FAMILY_HEADER_LEN;

from_header! {"`linux/netfilter/nfnetlink_queue.h`":
    /// `sizeof(struct nfqnl_msg_packet_hdr)`, which is packed
    pub const PACKET_HDR_LEN: usize = 4 + 2 + 1;
    /// `sizeof(struct nfqnl_msg_packet_hw)`
    pub const PACKET_HW_LEN: usize = 2 + 2 + 8;
    /// `sizeof(struct nfqnl_msg_packet_timestamp)`
    pub const TIMESTAMP_LEN: usize = 8 + 8;
    /// `sizeof(struct nfqnl_msg_verdict_hdr)`
    pub const VERDICT_HDR_LEN: usize = 4 + 4;
    /// `sizeof(struct nfqnl_msg_config_cmd)`
    pub const CONFIG_CMD_LEN: usize = 1 + 1 + 2;
    /// `sizeof(struct nfqnl_msg_config_params)`, which is packed
    pub const CONFIG_PARAMS_LEN: usize = 4 + 1;
}

/// Rounds up to a multiple of 4: `NLMSG_ALIGN` and `NLA_ALIGN` in `linux/netlink.h`
#[must_use]
pub const fn align(len: usize) -> usize {
    len.saturating_add(3) & !3
}

const _: () = {
    assert!(MESSAGE_HEADER_LEN == 16 && ATTRS_OFFSET == 20 && ATTR_HEADER_LEN == 4);
    assert!(PACKET_HDR_LEN == 7 && align(ATTR_HEADER_LEN + PACKET_HDR_LEN) == 12);
    assert!(PACKET_HW_LEN == 12 && TIMESTAMP_LEN == 16 && VERDICT_HDR_LEN == 8);
    assert!(CONFIG_CMD_LEN == 4 && CONFIG_PARAMS_LEN == 5);
    assert!(ATTRS_OFFSET == align(ATTRS_OFFSET) && MAX_PAYLOAD == 65531);
    assert!(message_type(NFQNL_MSG_VERDICT_BATCH) == 0x0303);
};
