//! Rules: conditions, actions, and a verdict

use std::net::IpAddr;
use std::ops::RangeInclusive;

use nfqnl_proto::{EtherType, IpProtocol};

use super::TableFamily;
use super::message::Attributes;
use crate::interface_name::InterfaceName;

const NFTA_LIST_ELEM: u16 = 1;
pub(super) const NFTA_EXPR_NAME: u16 = 1;
pub(super) const NFTA_EXPR_DATA: u16 = 2;
const NFTA_META_DREG: u16 = 1;
const NFTA_META_KEY: u16 = 2;
const NFTA_META_SREG: u16 = 3;
const NFTA_CMP_SREG: u16 = 1;
const NFTA_CMP_OP: u16 = 2;
const NFTA_CMP_DATA: u16 = 3;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFTA_PAYLOAD_DREG: u16 = 1;
const NFTA_PAYLOAD_BASE: u16 = 2;
const NFTA_PAYLOAD_OFFSET: u16 = 3;
const NFTA_PAYLOAD_LEN: u16 = 4;
const NFTA_BITWISE_SREG: u16 = 1;
const NFTA_BITWISE_DREG: u16 = 2;
const NFTA_BITWISE_LEN: u16 = 3;
const NFTA_BITWISE_MASK: u16 = 4;
const NFTA_BITWISE_XOR: u16 = 5;
const NFTA_CT_DREG: u16 = 1;
const NFTA_CT_KEY: u16 = 2;
const NFTA_CT_SREG: u16 = 4;
const NFTA_IMMEDIATE_DREG: u16 = 1;
const NFTA_IMMEDIATE_DATA: u16 = 2;
const NFTA_QUEUE_NUM: u16 = 1;
const NFTA_QUEUE_TOTAL: u16 = 2;
const NFTA_QUEUE_FLAGS: u16 = 3;
const NFTA_TARGET_NAME: u16 = 1;
const NFTA_TARGET_REV: u16 = 2;
const NFTA_TARGET_INFO: u16 = 3;
const NFT_REG_VERDICT: u32 = 0;
const NFT_REG_1: u32 = 1;
const NFT_META_PROTOCOL: u32 = 1;
const NFT_META_MARK: u32 = 3;
const NFT_META_IIFNAME: u32 = 6;
const NFT_META_OIFNAME: u32 = 7;
const NFT_META_SKUID: u32 = 10;
const NFT_META_NFPROTO: u32 = 15;
const NFT_META_L4PROTO: u32 = 16;
const NFT_CT_STATE: u32 = 0;
const NFT_CT_MARK: u32 = 3;
/// `NF_CT_STATE_BIT(IP_CT_NEW)` (`linux/netfilter/nf_conntrack_common.h`)
const CT_STATE_NEW: u32 = 1 << 3;
const NFT_CMP_EQ: u32 = 0;
const NFT_CMP_NEQ: u32 = 1;
const NFT_CMP_LTE: u32 = 3;
const NFT_CMP_GTE: u32 = 5;
const NFT_PAYLOAD_NETWORK_HEADER: u32 = 1;
const NFT_PAYLOAD_TRANSPORT_HEADER: u32 = 2;
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;
/// The same in nf_tables and in xtables
const QUEUE_FLAG_BYPASS: u16 = 1;
const QUEUE_FLAG_CPU_FANOUT: u16 = 2;
/// Type of a comment in the user data of a rule, as nft(8) writes and prints it
const NFTNL_UDATA_RULE_COMMENT: u8 = 0;
/// The longest comment of nft(8), without the NUL
const COMMENT_MAX: usize = 127;

/// The queues of a rule: one, or a range of which each packet goes to one
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use]
#[doc(alias = "queue-balance")]
pub struct Queues {
    first: u16,
    total: u16,
    flags: u16,
}

impl Queues {
    /// One queue
    pub const fn new(num: u16) -> Self {
        Self {
            first: num,
            total: 1,
            flags: 0,
        }
    }

    /// A range of queues; the addresses of a packet choose the queue, so a connection keeps it
    ///
    /// The kernel refuses an empty range, and one of all 65,536 queues.
    pub fn range(nums: RangeInclusive<u16>) -> Self {
        Self {
            first: *nums.start(),
            total: u16::try_from(nums.len()).unwrap_or(0),
            flags: 0,
        }
    }

    /// Lets packets pass while no socket has bound the queue; without it the kernel drops them
    #[doc(alias = "queue-bypass")]
    #[doc(alias = "NFT_QUEUE_FLAG_BYPASS")]
    pub const fn bypass(mut self) -> Self {
        self.flags |= QUEUE_FLAG_BYPASS;
        self
    }

    /// Lets the CPU choose the queue of a range, instead of the addresses: CPU c feeds queue
    /// `first + c % number of queues`
    #[doc(alias = "queue-cpu-fanout")]
    #[doc(alias = "NFT_QUEUE_FLAG_CPU_FANOUT")]
    pub const fn fanout(mut self) -> Self {
        self.flags |= QUEUE_FLAG_CPU_FANOUT;
        self
    }
}

impl From<u16> for Queues {
    fn from(num: u16) -> Self {
        Self::new(num)
    }
}

/// A port, or a range of ports
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    first: u16,
    last: u16,
}

impl From<u16> for Ports {
    fn from(port: u16) -> Self {
        Self {
            first: port,
            last: port,
        }
    }
}

impl From<RangeInclusive<u16>> for Ports {
    /// An empty range matches no port
    fn from(ports: RangeInclusive<u16>) -> Self {
        Self {
            first: *ports.start(),
            last: *ports.end(),
        }
    }
}

/// The way to queue a packet
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QueueExpression {
    /// `queue` of nf_tables
    Native,
    /// The target `NFQUEUE` of xtables, as in `iptables-nft -j NFQUEUE`
    Xtables,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Accept,
    Drop,
    Queue(Queues),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// Expressions of any table
    Expressions(Attributes),
    /// A condition on an address, which depends on the family of the table
    Address(Address),
}

/// A network, at its offset in a header of its IP version
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Address {
    address: IpAddr,
    prefix: u8,
    offset: u32,
}

/// Conditions, actions, and a verdict on the packets that meet all conditions
///
/// The conditions and actions take effect in the order of the calls: a counter before a condition
/// counts packets that the condition refuses. The verdict comes last. A rule without one lets the
/// packet go on to the next rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Rule {
    steps: Vec<Step>,
    label: Option<String>,
    verdict: Option<Verdict>,
}

/// Conditions
impl Rule {
    /// Returns a rule that matches every packet and does nothing
    pub fn new() -> Self {
        Self::default()
    }

    /// Matches packets of an IP protocol
    pub fn protocol(self, protocol: IpProtocol) -> Self {
        self.load_meta(NFT_META_L4PROTO)
            .compare(NFT_CMP_EQ, &[protocol.0])
    }

    /// Matches UDP
    pub fn udp(self) -> Self {
        self.protocol(IpProtocol::UDP)
    }

    /// Matches UDP to a port, or to a range of ports
    pub fn udp_dport(self, ports: impl Into<Ports>) -> Self {
        self.udp().port(2, ports.into())
    }

    /// Matches UDP from a port, or from a range of ports
    pub fn udp_sport(self, ports: impl Into<Ports>) -> Self {
        self.udp().port(0, ports.into())
    }

    /// Matches TCP
    pub fn tcp(self) -> Self {
        self.protocol(IpProtocol::TCP)
    }

    /// Matches TCP to a port, or to a range of ports
    pub fn tcp_dport(self, ports: impl Into<Ports>) -> Self {
        self.tcp().port(2, ports.into())
    }

    /// Matches TCP from a port, or from a range of ports
    pub fn tcp_sport(self, ports: impl Into<Ports>) -> Self {
        self.tcp().port(0, ports.into())
    }

    fn port(self, offset: u32, Ports { first, last }: Ports) -> Self {
        let rule = self.load_payload(NFT_PAYLOAD_TRANSPORT_HEADER, offset, 2);
        if first == last {
            return rule.compare(NFT_CMP_EQ, &first.to_be_bytes());
        }
        rule.compare(NFT_CMP_GTE, &first.to_be_bytes())
            .compare(NFT_CMP_LTE, &last.to_be_bytes())
    }

    /// Matches packets from a network: an address, and the number of its bits that count
    ///
    /// An IPv4 address matches IPv4 only, and an IPv6 address IPv6 only. 32 and 128 bits are one
    /// address; a larger number means the same.
    pub fn saddr(self, address: IpAddr, prefix: u8) -> Self {
        self.address(address, prefix, [12, 8])
    }

    /// Matches packets to a network, as [`saddr`](Self::saddr)
    pub fn daddr(self, address: IpAddr, prefix: u8) -> Self {
        self.address(address, prefix, [16, 24])
    }

    /// Compares an address at this offset of an IPv4 header, or of an IPv6 header
    fn address(mut self, address: IpAddr, prefix: u8, [v4, v6]: [u32; 2]) -> Self {
        self.steps.push(Step::Address(Address {
            address,
            prefix,
            offset: if address.is_ipv4() { v4 } else { v6 },
        }));
        self
    }

    /// Matches packets that came in by an interface; in chains before the routing decision, at
    /// input, and forwarded
    #[doc(alias = "iif")]
    pub fn iifname(self, name: InterfaceName) -> Self {
        self.load_meta(NFT_META_IIFNAME)
            .compare(NFT_CMP_EQ, name.padded())
    }

    /// Matches packets that leave by an interface; in chains after the routing decision
    #[doc(alias = "oif")]
    pub fn oifname(self, name: InterfaceName) -> Self {
        self.load_meta(NFT_META_OIFNAME)
            .compare(NFT_CMP_EQ, name.padded())
    }

    /// Matches packets of a mark: `packet's mark & mask == value`
    pub fn mark(self, value: u32, mask: u32) -> Self {
        self.load_meta(NFT_META_MARK)
            .masked(NFT_CMP_EQ, value, mask)
    }

    /// Matches packets of other marks: `packet's mark & mask != value`
    pub fn mark_not(self, value: u32, mask: u32) -> Self {
        self.load_meta(NFT_META_MARK)
            .masked(NFT_CMP_NEQ, value, mask)
    }

    /// Matches packets of connections with a mark: `connection's mark & mask == value`
    ///
    /// Such a rule turns on connection tracking in the namespace.
    pub fn ct_mark(self, value: u32, mask: u32) -> Self {
        self.load_ct(NFT_CT_MARK).masked(NFT_CMP_EQ, value, mask)
    }

    /// Matches packets of connections with other marks: `connection's mark & mask != value`
    ///
    /// A packet without a connection does not match. Such a rule turns on connection tracking in
    /// the namespace.
    pub fn ct_mark_not(self, value: u32, mask: u32) -> Self {
        self.load_ct(NFT_CT_MARK).masked(NFT_CMP_NEQ, value, mask)
    }

    /// Matches packets of new connections: before a reply was seen; in a chain of a priority above
    /// -200
    ///
    /// Such a rule turns on connection tracking in the namespace.
    pub fn ct_new(self) -> Self {
        self.load_ct(NFT_CT_STATE)
            .masked(NFT_CMP_EQ, CT_STATE_NEW, CT_STATE_NEW)
    }

    /// Matches packets of this user's sockets; at output and postrouting
    #[doc(alias = "skuid")]
    pub fn uid(self, uid: u32) -> Self {
        self.load_meta(NFT_META_SKUID)
            .compare(NFT_CMP_EQ, &uid.to_ne_bytes())
    }
}

/// Actions
impl Rule {
    /// Counts the packets that come to this place; nft(8) prints the label as the rule's comment
    ///
    /// [`Chain::counter`](super::Chain::counter) reads it. If you call this twice, both count, but
    /// only the last one can be read. Labels differ in their first 127 bytes.
    pub fn counter(mut self, label: &str) -> Self {
        self.label = Some(label.to_owned());
        self.expression("counter", &[])
    }

    /// Sets the bits of `mask` in the packet's mark to the bits of `value`
    pub fn set_mark(self, value: u32, mask: u32) -> Self {
        self.load_meta(NFT_META_MARK)
            .mask(&(!mask).to_ne_bytes(), &(value & mask).to_ne_bytes())
            .with("meta", |data| {
                data.be32(NFTA_META_KEY, NFT_META_MARK)
                    .be32(NFTA_META_SREG, NFT_REG_1);
            })
    }

    /// Copies the packet's mark to its connection, all 32 bits
    ///
    /// A packet without a mark clears the mark of its connection: put [`mark`](Self::mark) before
    /// this. It overwrites bits of other programs.
    ///
    /// With a packet mark in the verdict and this rule in a later chain, a program marks
    /// connections also on kernels that take no conntrack changes
    /// ([`Socket::takes_conntrack`](crate::Socket::takes_conntrack)). Such a rule turns on
    /// connection tracking in the namespace.
    pub fn save_mark(self) -> Self {
        self.load_meta(NFT_META_MARK).with("ct", |data| {
            data.be32(NFTA_CT_KEY, NFT_CT_MARK)
                .be32(NFTA_CT_SREG, NFT_REG_1);
        })
    }

    /// Tracks no connection; in a chain of priority -300 at prerouting or output
    pub fn notrack(self) -> Self {
        self.expression("notrack", &[])
    }

    /// Adds any expression of nf_tables: its name, and its encoded attributes
    ///
    /// The attributes follow `linux/netfilter/nf_tables.h`. The kernel checks them.
    pub fn expression(self, name: &str, attributes: &[u8]) -> Self {
        self.with(name, |data| {
            data.append_bytes(attributes);
        })
    }
}

/// Verdicts; a rule has one, and the last call counts
impl Rule {
    /// Sends the packets to a queue
    #[doc(alias = "NFQUEUE")]
    pub fn queue(mut self, queues: impl Into<Queues>) -> Self {
        self.verdict = Some(Verdict::Queue(queues.into()));
        self
    }

    /// Accepts the packets: they leave this chain, and go on to the next one
    pub const fn accept(mut self) -> Self {
        self.verdict = Some(Verdict::Accept);
        self
    }

    /// Drops the packets
    pub const fn drop(mut self) -> Self {
        self.verdict = Some(Verdict::Drop);
        self
    }
}

/// Encoding
impl Rule {
    /// Returns the expressions for a table of this family, for `NFTA_RULE_EXPRESSIONS`; `None` if
    /// no packet there can match
    pub(super) fn encode(&self, family: TableFamily, queue: QueueExpression) -> Option<Attributes> {
        let mut list = Attributes::default();
        for step in &self.steps {
            match step {
                Step::Expressions(expressions) => list.append(expressions),
                Step::Address(address) => list.append(&address.encode(family)?),
            };
        }
        match (self.verdict, queue) {
            (None, _) => {}
            (Some(Verdict::Accept), _) => append_verdict(&mut list, NF_ACCEPT),
            (Some(Verdict::Drop), _) => append_verdict(&mut list, NF_DROP),
            (Some(Verdict::Queue(queues)), QueueExpression::Native) => {
                append_queue(&mut list, queues);
            }
            (Some(Verdict::Queue(queues)), QueueExpression::Xtables) => {
                append_target(&mut list, queues);
            }
        }
        Some(list)
    }

    /// Returns the label, for `NFTA_RULE_USERDATA`
    pub(super) fn userdata(&self) -> Option<Vec<u8>> {
        self.label.as_deref().map(comment)
    }

    fn with(mut self, name: &str, data: impl FnOnce(&mut Attributes)) -> Self {
        let mut expression = Attributes::default();
        append(&mut expression, name, data);
        match self.steps.last_mut() {
            Some(Step::Expressions(expressions)) => {
                expressions.append(&expression);
            }
            _ => self.steps.push(Step::Expressions(expression)),
        }
        self
    }

    fn load_meta(self, key: u32) -> Self {
        self.with("meta", |data| {
            data.be32(NFTA_META_KEY, key)
                .be32(NFTA_META_DREG, NFT_REG_1);
        })
    }

    fn load_ct(self, key: u32) -> Self {
        self.with("ct", |data| {
            data.be32(NFTA_CT_KEY, key).be32(NFTA_CT_DREG, NFT_REG_1);
        })
    }

    fn load_payload(self, base: u32, offset: u32, len: u32) -> Self {
        self.with("payload", |data| {
            data.be32(NFTA_PAYLOAD_DREG, NFT_REG_1)
                .be32(NFTA_PAYLOAD_BASE, base)
                .be32(NFTA_PAYLOAD_OFFSET, offset)
                .be32(NFTA_PAYLOAD_LEN, len);
        })
    }

    fn compare(self, op: u32, value: &[u8]) -> Self {
        self.with("cmp", |data| {
            data.be32(NFTA_CMP_SREG, NFT_REG_1)
                .be32(NFTA_CMP_OP, op)
                .nested(NFTA_CMP_DATA, |nested| {
                    nested.attr(NFTA_DATA_VALUE, value);
                });
        })
    }

    /// Changes the register: `register & mask ^ xor`
    fn mask(self, mask: &[u8], xor: &[u8]) -> Self {
        self.with("bitwise", |data| {
            data.be32(NFTA_BITWISE_SREG, NFT_REG_1)
                .be32(NFTA_BITWISE_DREG, NFT_REG_1)
                .be32(
                    NFTA_BITWISE_LEN,
                    u32::try_from(mask.len()).unwrap_or_default(),
                );
            for (kind, value) in [(NFTA_BITWISE_MASK, mask), (NFTA_BITWISE_XOR, xor)] {
                data.nested(kind, |nested| {
                    nested.attr(NFTA_DATA_VALUE, value);
                });
            }
        })
    }

    /// Compares the bits of `mask` with `value`, in host byte order
    fn masked(self, op: u32, value: u32, mask: u32) -> Self {
        let rule = match mask {
            u32::MAX => self,
            mask => self.mask(&mask.to_ne_bytes(), &[0; 4]),
        };
        rule.compare(op, &value.to_ne_bytes())
    }
}

impl Address {
    /// Returns the expressions for a table of this family; `None` if it has the other IP version
    fn encode(&self, family: TableFamily) -> Option<Attributes> {
        let (bytes, nfproto, ethertype) = match self.address {
            IpAddr::V4(address) => (
                address.octets().to_vec(),
                libc::NFPROTO_IPV4,
                EtherType::IPV4,
            ),
            IpAddr::V6(address) => (
                address.octets().to_vec(),
                libc::NFPROTO_IPV6,
                EtherType::IPV6,
            ),
        };
        let rule = match (family, self.address) {
            (TableFamily::Ip, IpAddr::V4(_)) | (TableFamily::Ip6, IpAddr::V6(_)) => Rule::new(),
            (TableFamily::Ip | TableFamily::Ip6, _) => return None,
            (TableFamily::Inet, _) => Rule::new()
                .load_meta(NFT_META_NFPROTO)
                .compare(NFT_CMP_EQ, &[u8::try_from(nfproto).unwrap_or_default()]),
            (TableFamily::Bridge, _) => Rule::new()
                .load_meta(NFT_META_PROTOCOL)
                .compare(NFT_CMP_EQ, &ethertype.0.to_be_bytes()),
        };
        let bits_of = |index| usize::from(self.prefix).saturating_sub(8 * index).min(8);
        let shift_of = |index| u32::try_from(bits_of(index)).unwrap_or(8);
        let mask: Vec<u8> = (0..bytes.len())
            .map(|index| !0xff_u8.checked_shr(shift_of(index)).unwrap_or(0))
            .collect();
        let network: Vec<u8> = bytes
            .iter()
            .zip(&mask)
            .map(|(byte, mask)| byte & mask)
            .collect();
        let len = u32::try_from(bytes.len()).unwrap_or_default();
        let rule = rule.load_payload(NFT_PAYLOAD_NETWORK_HEADER, self.offset, len);
        let rule = match mask.iter().all(|&byte| byte == 0xff) {
            true => rule,
            false => rule.mask(&mask, &vec![0; bytes.len()]),
        };
        match rule.compare(NFT_CMP_EQ, &network).steps.pop() {
            Some(Step::Expressions(expressions)) => Some(expressions),
            _ => None,
        }
    }
}

/// Encodes a label as a comment: type, length and text with a NUL
pub(super) fn comment(label: &str) -> Vec<u8> {
    let mut len = label.len().min(COMMENT_MAX);
    while !label.is_char_boundary(len) {
        len -= 1;
    }
    let head = [
        NFTNL_UDATA_RULE_COMMENT,
        u8::try_from(len + 1).unwrap_or_default(),
    ];
    head.into_iter()
        .chain(label.bytes().take(len))
        .chain([0])
        .collect()
}

fn append(list: &mut Attributes, name: &str, data: impl FnOnce(&mut Attributes)) {
    list.nested(NFTA_LIST_ELEM, |element| {
        element
            .text(NFTA_EXPR_NAME, name)
            .nested(NFTA_EXPR_DATA, data);
    });
}

fn append_verdict(list: &mut Attributes, code: u32) {
    append(list, "immediate", |data| {
        data.be32(NFTA_IMMEDIATE_DREG, NFT_REG_VERDICT)
            .nested(NFTA_IMMEDIATE_DATA, |data| {
                data.nested(NFTA_DATA_VERDICT, |verdict| {
                    verdict.be32(NFTA_VERDICT_CODE, code);
                });
            });
    });
}

fn append_queue(list: &mut Attributes, queues: Queues) {
    append(list, "queue", |data| {
        data.be16(NFTA_QUEUE_NUM, queues.first)
            .be16(NFTA_QUEUE_TOTAL, queues.total)
            .be16(NFTA_QUEUE_FLAGS, queues.flags);
    });
}

/// Appends `struct xt_NFQ_info_v3` (`linux/netfilter/xt_NFQUEUE.h`): host byte order, padded to the
/// alignment of xtables
fn append_target(list: &mut Attributes, queues: Queues) {
    const REVISION: u32 = 3;
    let mut info = [queues.first, queues.total, queues.flags]
        .map(u16::to_ne_bytes)
        .concat();
    info.resize(info.len().next_multiple_of(8), 0);
    append(list, "target", |data| {
        data.text(NFTA_TARGET_NAME, "NFQUEUE")
            .be32(NFTA_TARGET_REV, REVISION)
            .attr(NFTA_TARGET_INFO, &info);
    });
}
