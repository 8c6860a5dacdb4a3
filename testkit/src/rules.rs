//! Firewall rules as nf_tables messages, without iptables or nft (`linux/netfilter/nf_tables.h`)
//!
//! Rules queue packets by the `queue` expression if the kernel has it (`CONFIG_NFT_QUEUE`).
//! Otherwise they use the `target` expression around the xtables target, like
//! `iptables-nft -j NFQUEUE`.

use std::io;
use std::ops::RangeInclusive;

use crate::kernel;
use crate::netlink::{
    Message, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, attr, attrs, nfgenmsg, query,
    transact,
};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_DELTABLE: u16 = 2;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_GETRULE: u16 = 7;
const NFT_MSG_DELRULE: u16 = 8;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_RULE_USERDATA: u16 = 7;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_META_DREG: u16 = 1;
const NFTA_META_KEY: u16 = 2;
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
const NFTA_CT_DREG: u16 = 1;
const NFTA_CT_KEY: u16 = 2;
const NFTA_CT_SREG: u16 = 4;
const NFTA_IMMEDIATE_DREG: u16 = 1;
const NFTA_IMMEDIATE_DATA: u16 = 2;
const NFTA_COUNTER_PACKETS: u16 = 2;
const NFTA_QUEUE_NUM: u16 = 1;
const NFTA_QUEUE_TOTAL: u16 = 2;
const NFTA_QUEUE_FLAGS: u16 = 3;
const NFTA_TARGET_NAME: u16 = 1;
const NFTA_TARGET_REV: u16 = 2;
const NFTA_TARGET_INFO: u16 = 3;
const NFT_REG_VERDICT: u32 = 0;
const NFT_REG_1: u32 = 1;
const NFT_META_MARK: u32 = 3;
const NFT_META_L4PROTO: u32 = 16;
const NFT_CT_STATE: u32 = 0;
const NFT_CT_MARK: u32 = 3;
const NFT_CT_LABELS: u32 = 13;
/// `NF_CT_LABELS_MAX_SIZE` (`net/netfilter/nf_conntrack_labels.h`)
const LABELS_LEN: usize = 16;
/// `NF_CT_STATE_BIT(IP_CT_NEW)` (`linux/netfilter/nf_conntrack_common.h`)
const CT_STATE_NEW: u32 = 1 << 3;
const NFT_CMP_EQ: u32 = 0;
const NFT_CMP_NEQ: u32 = 1;
const NFT_PAYLOAD_TRANSPORT_HEADER: u32 = 2;
/// The same in nf_tables and in xtables
const QUEUE_FLAG_BYPASS: u16 = 1;
const QUEUE_FLAG_CPU_FANOUT: u16 = 2;

/// The packets seen by a table
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4
    Ip,
    /// IPv6
    Ip6,
    /// Frames on a bridge; xtables cannot queue there
    Bridge,
}

impl Family {
    /// Both versions of IP
    pub const ALL: [Self; 2] = [Self::Ip, Self::Ip6];

    fn number(self) -> u8 {
        let number = match self {
            Self::Ip => libc::NFPROTO_IPV4,
            Self::Ip6 => libc::NFPROTO_IPV6,
            Self::Bridge => libc::NFPROTO_BRIDGE,
        };
        u8::try_from(number).expect("a small number")
    }
}

/// The place of a chain in the kernel (`enum nf_inet_hooks`)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// All arriving packets
    Prerouting,
    /// Packets to this host
    Input,
    /// Forwarded packets
    Forward,
    /// Packets sent by this host
    Output,
    /// All leaving packets
    Postrouting,
}

impl Hook {
    /// All five
    pub const ALL: [Self; 5] = [
        Self::Prerouting,
        Self::Input,
        Self::Forward,
        Self::Output,
        Self::Postrouting,
    ];

    /// Returns the hook's number in the kernel
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }
}

/// A table of rules in the calling thread's network namespace; dropping this keeps the table
#[derive(Debug)]
pub struct Table {
    family: Family,
    name: String,
}

impl Table {
    /// Makes a table
    ///
    /// # Errors
    /// The kernel's error.
    pub fn new(family: Family, name: &str) -> io::Result<Self> {
        let table = Self {
            family,
            name: name.to_owned(),
        };
        let mut message = table.message(NFT_MSG_NEWTABLE, NLM_F_CREATE);
        message.text(NFTA_TABLE_NAME, name);
        table.change(message)?;
        Ok(table)
    }

    /// Makes a base chain: its rules see every packet at the hook
    ///
    /// The chains of one hook run in the order of their priorities.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn chain(&self, name: &str, hook: Hook, priority: i32) -> io::Result<Chain<'_>> {
        self.typed_chain(name, "filter", hook, priority)
    }

    /// Makes a base chain for address translation: its rules see the first packet of a connection
    ///
    /// # Errors
    /// The kernel's error.
    pub fn nat_chain(&self, name: &str, hook: Hook, priority: i32) -> io::Result<Chain<'_>> {
        self.typed_chain(name, "nat", hook, priority)
    }

    fn typed_chain(
        &self,
        name: &str,
        kind: &str,
        hook: Hook,
        priority: i32,
    ) -> io::Result<Chain<'_>> {
        let mut message = self.message(NFT_MSG_NEWCHAIN, NLM_F_CREATE);
        message
            .text(NFTA_CHAIN_TABLE, &self.name)
            .text(NFTA_CHAIN_NAME, name)
            .nest(NFTA_CHAIN_HOOK, |attrs| {
                attrs
                    .attr(NFTA_HOOK_HOOKNUM, &u32::from(hook.number()).to_be_bytes())
                    .attr(NFTA_HOOK_PRIORITY, &priority.to_be_bytes());
            })
            .text(NFTA_CHAIN_TYPE, kind);
        self.change(message)?;
        Ok(Chain {
            table: self,
            name: name.to_owned(),
        })
    }

    /// Deletes the table and its contents; the kernel drops all queued packets of this namespace
    ///
    /// # Errors
    /// The kernel's error.
    pub fn delete(self) -> io::Result<()> {
        let mut message = self.message(NFT_MSG_DELTABLE, 0);
        message.text(NFTA_TABLE_NAME, &self.name);
        self.change(message)
    }

    fn message(&self, kind: u16, flags: u16) -> Message {
        let fixed = nfgenmsg(self.family.number(), 0);
        Message::new(NFNL_SUBSYS_NFTABLES << 8 | kind, flags | NLM_F_ACK, &fixed)
    }

    /// Runs one change as a transaction
    fn change(&self, message: Message) -> io::Result<()> {
        let fixed = nfgenmsg(0, NFNL_SUBSYS_NFTABLES);
        let batch = vec![
            Message::new(NFNL_MSG_BATCH_BEGIN, 0, &fixed),
            message,
            Message::new(NFNL_MSG_BATCH_END, 0, &fixed),
        ];
        transact(libc::NETLINK_NETFILTER, batch).map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("nf_tables, table {}: {error}", self.name),
            )
        })
    }
}

/// A base chain
#[derive(Debug)]
pub struct Chain<'t> {
    table: &'t Table,
    name: String,
}

impl Chain<'_> {
    /// Appends a rule
    ///
    /// # Errors
    /// The kernel's error; `ENOENT` if the kernel cannot queue packets.
    pub fn add(&self, rule: &Rule) -> io::Result<()> {
        let added = self.add_with(rule, QueueExpression::Native);
        let is_unknown = matches!(&added, Err(error) if error.kind() == io::ErrorKind::NotFound);
        if is_unknown && rule.queue.is_some() && !kernel::is_complete() {
            return self.add_with(rule, QueueExpression::Xtables);
        }
        added
    }

    fn add_with(&self, rule: &Rule, queue: QueueExpression) -> io::Result<()> {
        let mut message = self
            .table
            .message(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND);
        message
            .text(NFTA_RULE_TABLE, &self.table.name)
            .text(NFTA_RULE_CHAIN, &self.name)
            .nest(NFTA_RULE_EXPRESSIONS, |list| rule.write(list, queue));
        if let Some(label) = &rule.label {
            message.attr(NFTA_RULE_USERDATA, label.as_bytes());
        }
        self.table.change(message)
    }

    /// Deletes the chain's rules; packets stay in their queues
    ///
    /// # Errors
    /// The kernel's error.
    pub fn flush(&self) -> io::Result<()> {
        let mut message = self.table.message(NFT_MSG_DELRULE, 0);
        message
            .text(NFTA_RULE_TABLE, &self.table.name)
            .text(NFTA_RULE_CHAIN, &self.name);
        self.table.change(message)
    }

    /// Returns the packet counter of the rule with this label
    ///
    /// # Errors
    /// The kernel's error; `NotFound` if no rule has the label.
    pub fn count(&self, label: &str) -> io::Result<u64> {
        let fixed = nfgenmsg(self.table.family.number(), 0);
        let mut message = Message::new(
            NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETRULE,
            NLM_F_DUMP,
            &fixed,
        );
        message
            .text(NFTA_RULE_TABLE, &self.table.name)
            .text(NFTA_RULE_CHAIN, &self.name);
        let rules = query(libc::NETLINK_NETFILTER, message)?;
        rules
            .iter()
            .filter_map(|rule| rule.get(fixed.len()..))
            .find(|rule| attr(rule, NFTA_RULE_USERDATA) == Some(label.as_bytes()))
            .and_then(|rule| {
                let expressions = attrs(attr(rule, NFTA_RULE_EXPRESSIONS)?);
                expressions.map(|(_, expression)| expression).find_map(|e| {
                    let packets = attr(attr(e, NFTA_EXPR_DATA)?, NFTA_COUNTER_PACKETS)?;
                    let counter = attr(e, NFTA_EXPR_NAME)?.starts_with(b"counter");
                    counter.then_some(u64::from_be_bytes(packets.try_into().ok()?))
                })
            })
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// The expression for queueing in a rule
#[derive(Clone, Copy)]
enum QueueExpression {
    Native,
    Xtables,
}

/// Options of a queueing rule
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueOptions {
    /// Packets go on to the next hook while no socket has bound the queue
    pub bypass: bool,
    /// The CPU chooses within a range of queues, instead of the packet's addresses
    pub fanout: bool,
}

/// Conditions, and an action for packets meeting all of them
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct Rule {
    matches: Vec<Match>,
    label: Option<String>,
    queue: Option<(RangeInclusive<u16>, QueueOptions)>,
    action: Option<Action>,
    verdict: Option<u32>,
}

/// A change, before a verdict
#[derive(Clone, Copy, Debug)]
enum Action {
    /// No conntrack entry
    Untrack,
    /// The source address of the outgoing link
    Masquerade,
    /// A label of the connection
    Label(u8),
    /// The packet's mark as the connection's mark
    SaveMark,
}

#[derive(Clone, Debug)]
enum Match {
    Protocol(u8),
    /// An offset in the transport header, and the port there
    Port(u32, u16),
    Mark(u32, u32),
    ConnectionMark(u32, u32),
    NewConnection,
}

impl Rule {
    /// Matches everything and does nothing
    pub fn new() -> Self {
        Self::default()
    }

    /// Only UDP
    pub fn udp(self) -> Self {
        self.protocol(libc::IPPROTO_UDP)
    }

    /// Only TCP
    pub fn tcp(self) -> Self {
        self.protocol(libc::IPPROTO_TCP)
    }

    /// Only ICMP
    pub fn icmp(self) -> Self {
        self.protocol(libc::IPPROTO_ICMP)
    }

    /// Only ICMPv6
    pub fn icmp6(self) -> Self {
        self.protocol(libc::IPPROTO_ICMPV6)
    }

    fn protocol(self, number: libc::c_int) -> Self {
        self.matching(Match::Protocol(
            u8::try_from(number).expect("protocols are bytes"),
        ))
    }

    /// Only from this port; after [`udp`](Self::udp) or [`tcp`](Self::tcp)
    pub fn sport(self, port: u16) -> Self {
        self.matching(Match::Port(0, port))
    }

    /// Only to this port; after [`udp`](Self::udp) or [`tcp`](Self::tcp)
    pub fn dport(self, port: u16) -> Self {
        self.matching(Match::Port(2, port))
    }

    /// Only with this mark
    pub fn mark(self, mark: u32) -> Self {
        self.matching(Match::Mark(NFT_CMP_EQ, mark))
    }

    /// Only with another mark, or none
    pub fn mark_not(self, mark: u32) -> Self {
        self.matching(Match::Mark(NFT_CMP_NEQ, mark))
    }

    /// Only packets of connections with another mark, or none
    pub fn ct_mark_not(self, mark: u32) -> Self {
        self.matching(Match::ConnectionMark(NFT_CMP_NEQ, mark))
    }

    /// Only new connections; such a rule turns on connection tracking in the namespace
    pub fn new_connection(self) -> Self {
        self.matching(Match::NewConnection)
    }

    fn matching(mut self, condition: Match) -> Self {
        self.matches.push(condition);
        self
    }

    /// Counts the matching packets; see [`Chain::count`]
    pub fn counted(mut self, label: &str) -> Self {
        self.label = Some(label.to_owned());
        self
    }

    /// Sends the packets to a queue
    pub fn queue(self, number: u16) -> Self {
        self.queue_with(number..=number, QueueOptions::default())
    }

    /// Sends each packet to one queue of a range
    pub fn queue_with(mut self, numbers: RangeInclusive<u16>, options: QueueOptions) -> Self {
        self.queue = Some((numbers, options));
        self
    }

    /// Tracks no connection; in a chain of priority -300 at `Prerouting` or `Output`
    pub fn untrack(mut self) -> Self {
        self.action = Some(Action::Untrack);
        self
    }

    /// Gives connections the source address of the outgoing link; in a chain for translation
    pub fn masquerade(mut self) -> Self {
        self.action = Some(Action::Masquerade);
        self
    }

    /// Sets a label of the connection
    pub fn set_label(mut self, label: u8) -> Self {
        self.action = Some(Action::Label(label));
        self
    }

    /// Saves the packet's mark as the connection's mark
    pub fn save_mark(mut self) -> Self {
        self.action = Some(Action::SaveMark);
        self
    }

    /// Accepts the packets in this chain
    pub fn accept(mut self) -> Self {
        self.verdict = Some(1);
        self
    }

    /// Drops the packets
    pub fn drop(mut self) -> Self {
        self.verdict = Some(0);
        self
    }

    fn write(&self, list: &mut Message, queue: QueueExpression) {
        for condition in &self.matches {
            match *condition {
                Match::Protocol(number) => {
                    load_meta(list, NFT_META_L4PROTO);
                    compare(list, NFT_CMP_EQ, &[number]);
                }
                Match::Port(offset, port) => {
                    load_transport(list, offset, 2);
                    compare(list, NFT_CMP_EQ, &port.to_be_bytes());
                }
                Match::Mark(op, mark) => {
                    load_meta(list, NFT_META_MARK);
                    compare(list, op, &mark.to_ne_bytes());
                }
                Match::ConnectionMark(op, mark) => {
                    load_ct(list, NFT_CT_MARK);
                    compare(list, op, &mark.to_ne_bytes());
                }
                Match::NewConnection => {
                    load_ct(list, NFT_CT_STATE);
                    compare(list, NFT_CMP_EQ, &CT_STATE_NEW.to_ne_bytes());
                }
            }
        }
        if self.label.is_some() {
            expression(list, "counter", |_| {});
        }
        match self.action {
            Some(Action::Untrack) => expression(list, "notrack", |_| {}),
            Some(Action::Masquerade) => expression(list, "masq", |_| {}),
            Some(Action::Label(label)) => {
                let mut words = [0; LABELS_LEN / size_of::<usize>()];
                let bits = usize::BITS as usize;
                words[usize::from(label) / bits] = 1_usize << (usize::from(label) % bits);
                let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
                immediate(list, NFT_REG_1, |value| {
                    value.attr(NFTA_DATA_VALUE, &bytes);
                });
                store_ct(list, NFT_CT_LABELS);
            }
            Some(Action::SaveMark) => {
                load_meta(list, NFT_META_MARK);
                store_ct(list, NFT_CT_MARK);
            }
            None => {}
        }
        if let Some((numbers, options)) = &self.queue {
            match queue {
                QueueExpression::Native => queue_expression(list, numbers, *options),
                QueueExpression::Xtables => queue_target(list, numbers, *options),
            }
        }
        if let Some(code) = self.verdict {
            immediate(list, NFT_REG_VERDICT, |value| {
                value.nest(NFTA_DATA_VERDICT, |verdict| {
                    verdict.attr(NFTA_VERDICT_CODE, &code.to_be_bytes());
                });
            });
        }
    }
}

fn expression(list: &mut Message, name: &str, data: impl FnOnce(&mut Message)) {
    list.nest(NFTA_LIST_ELEM, |element| {
        element
            .text(NFTA_EXPR_NAME, name)
            .nest(NFTA_EXPR_DATA, data);
    });
}

fn immediate(list: &mut Message, register: u32, value: impl FnOnce(&mut Message)) {
    expression(list, "immediate", |data| {
        data.attr(NFTA_IMMEDIATE_DREG, &register.to_be_bytes())
            .nest(NFTA_IMMEDIATE_DATA, value);
    });
}

fn load_ct(list: &mut Message, key: u32) {
    expression(list, "ct", |data| {
        data.attr(NFTA_CT_KEY, &key.to_be_bytes())
            .attr(NFTA_CT_DREG, &NFT_REG_1.to_be_bytes());
    });
}

fn store_ct(list: &mut Message, key: u32) {
    expression(list, "ct", |data| {
        data.attr(NFTA_CT_KEY, &key.to_be_bytes())
            .attr(NFTA_CT_SREG, &NFT_REG_1.to_be_bytes());
    });
}

fn load_meta(list: &mut Message, key: u32) {
    expression(list, "meta", |data| {
        data.attr(NFTA_META_KEY, &key.to_be_bytes())
            .attr(NFTA_META_DREG, &NFT_REG_1.to_be_bytes());
    });
}

fn load_transport(list: &mut Message, offset: u32, len: u32) {
    expression(list, "payload", |data| {
        data.attr(NFTA_PAYLOAD_DREG, &NFT_REG_1.to_be_bytes())
            .attr(
                NFTA_PAYLOAD_BASE,
                &NFT_PAYLOAD_TRANSPORT_HEADER.to_be_bytes(),
            )
            .attr(NFTA_PAYLOAD_OFFSET, &offset.to_be_bytes())
            .attr(NFTA_PAYLOAD_LEN, &len.to_be_bytes());
    });
}

fn compare(list: &mut Message, op: u32, value: &[u8]) {
    expression(list, "cmp", |data| {
        data.attr(NFTA_CMP_SREG, &NFT_REG_1.to_be_bytes())
            .attr(NFTA_CMP_OP, &op.to_be_bytes())
            .nest(NFTA_CMP_DATA, |nested| {
                nested.attr(NFTA_DATA_VALUE, value);
            });
    });
}

/// Returns the number of the first queue, the number of queues, and the flags
fn queue_numbers(numbers: &RangeInclusive<u16>, options: QueueOptions) -> [u16; 3] {
    let bypass = if options.bypass { QUEUE_FLAG_BYPASS } else { 0 };
    let fanout = if options.fanout {
        QUEUE_FLAG_CPU_FANOUT
    } else {
        0
    };
    let total = numbers.end().saturating_sub(*numbers.start()) + 1;
    [*numbers.start(), total, bypass | fanout]
}

fn queue_expression(list: &mut Message, numbers: &RangeInclusive<u16>, options: QueueOptions) {
    let [first, total, flags] = queue_numbers(numbers, options);
    expression(list, "queue", |data| {
        data.attr(NFTA_QUEUE_NUM, &first.to_be_bytes())
            .attr(NFTA_QUEUE_TOTAL, &total.to_be_bytes())
            .attr(NFTA_QUEUE_FLAGS, &flags.to_be_bytes());
    });
}

/// Writes `struct xt_NFQ_info_v3` (`linux/netfilter/xt_NFQUEUE.h`), in host byte order, padded to
/// the alignment of xtables
fn queue_target(list: &mut Message, numbers: &RangeInclusive<u16>, options: QueueOptions) {
    const REVISION: u32 = 3;
    let mut info = queue_numbers(numbers, options)
        .map(u16::to_ne_bytes)
        .concat();
    info.resize(info.len().next_multiple_of(8), 0);
    expression(list, "target", |data| {
        data.text(NFTA_TARGET_NAME, "NFQUEUE")
            .attr(NFTA_TARGET_REV, &REVISION.to_be_bytes())
            .attr(NFTA_TARGET_INFO, &info);
    });
}
