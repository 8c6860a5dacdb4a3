//! Firewall rules for tests: `nfqnl::rules`, with tables that last as long as the process

use std::io;
use std::sync::{Mutex, PoisonError};

use nfqnl::Hook as NfHook;
use nfqnl::rules::{self, ChainConfig, ChainType, TableFamily};
pub use nfqnl::rules::{Queues, Rule};

use crate::kernel;
use crate::netlink::{Message, NLM_F_ACK, attributes, nfgenmsg, transact};

const NFTA_CT_KEY: u16 = 2;
const NFTA_CT_SREG: u16 = 4;
const NFTA_IMMEDIATE_DREG: u16 = 1;
const NFTA_IMMEDIATE_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;
const NFT_REG_1: u32 = 1;
const NFT_CT_LABELS: u32 = 13;
/// `NF_CT_LABELS_MAX_SIZE` (`net/netfilter/nf_conntrack_labels.h`)
const LABELS_LEN: usize = 16;

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
    family: TableFamily,
    table: rules::Table,
}

impl Table {
    /// Makes a table
    ///
    /// # Errors
    /// The kernel's error.
    ///
    /// # Panics
    /// If a complete kernel seems to lack the expression `queue`.
    pub fn new(family: Family, name: &str) -> io::Result<Self> {
        let family = match family {
            Family::Ip => TableFamily::Ip,
            Family::Ip6 => TableFamily::Ip6,
            Family::Bridge => TableFamily::Bridge,
        };
        // A test may use a name again, and the tables last as long as the process.
        static KEPT: Mutex<Vec<rules::Table>> = Mutex::new(Vec::new());
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        let table = rules::Table::new(&format!("{name}-{}", kept.len()))?;
        let is_native = format!("{table:?}").contains("Native");
        assert!(is_native || !kernel::is_complete(), "{table:?}");
        kept.push(table.clone());
        Ok(Self { family, table })
    }

    /// Makes a base chain: its rules see every packet at the hook
    ///
    /// The chains of one hook run in the order of their priorities.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn chain(&self, name: &str, hook: Hook, priority: i32) -> io::Result<Chain> {
        self.typed_chain(name, ChainType::Filter, hook, priority)
    }

    /// Makes a base chain for address translation: its rules see the first packet of a connection
    ///
    /// # Errors
    /// The kernel's error.
    pub fn nat_chain(&self, name: &str, hook: Hook, priority: i32) -> io::Result<Chain> {
        self.typed_chain(name, ChainType::Nat, hook, priority)
    }

    fn typed_chain(
        &self,
        name: &str,
        kind: ChainType,
        hook: Hook,
        priority: i32,
    ) -> io::Result<Chain> {
        let place = ChainConfig::new(NfHook(hook.number())).family(self.family);
        let place = place.priority(priority).chain_type(kind);
        Ok(Chain(self.table.chain(name, place)?))
    }

    /// Deletes the table and its contents; the kernel drops all queued packets of this namespace
    ///
    /// # Errors
    /// The kernel's error.
    pub fn delete(self) -> io::Result<()> {
        Ok(self.table.remove()?)
    }
}

/// A base chain
#[derive(Debug)]
pub struct Chain(rules::Chain);

impl Chain {
    /// Appends a rule
    ///
    /// # Errors
    /// The kernel's error.
    pub fn add(&self, rule: &Rule) -> io::Result<()> {
        Ok(self.0.add(rule)?)
    }

    /// Deletes the chain's rules; packets stay in their queues
    ///
    /// # Errors
    /// The kernel's error.
    pub fn flush(&self) -> io::Result<()> {
        Ok(self.0.clear()?)
    }

    /// Returns the packet counter of the rule with this label
    ///
    /// # Errors
    /// The kernel's error; `NotFound` if no rule has the label.
    pub fn count(&self, label: &str) -> io::Result<u64> {
        let counter = self.0.counter(label)?;
        Ok(counter.ok_or(io::ErrorKind::NotFound)?.packets)
    }
}

/// Actions that only tests need
pub trait RuleExt {
    /// Gives connections the source address of the outgoing link; in a chain for translation
    #[must_use]
    fn masquerade(self) -> Self;

    /// Sets a label of the connection
    #[must_use]
    fn set_label(self, label: u8) -> Self;
}

impl RuleExt for Rule {
    fn masquerade(self) -> Self {
        self.expression("masq", &[])
    }

    fn set_label(self, label: u8) -> Self {
        let mut words = [0; LABELS_LEN / size_of::<usize>()];
        let bits = usize::BITS as usize;
        words[usize::from(label) / bits] = 1_usize << (usize::from(label) % bits);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let load = attributes(|data| {
            data.attr(NFTA_IMMEDIATE_DREG, &NFT_REG_1.to_be_bytes())
                .nest(NFTA_IMMEDIATE_DATA, |value| {
                    value.attr(NFTA_DATA_VALUE, &bytes);
                });
        });
        let store = attributes(|data| {
            data.attr(NFTA_CT_KEY, &NFT_CT_LABELS.to_be_bytes())
                .attr(NFTA_CT_SREG, &NFT_REG_1.to_be_bytes());
        });
        self.expression("immediate", &load).expression("ct", &store)
    }
}

/// Deletes all tables that this process may delete, as `nft flush ruleset` of another program
///
/// # Errors
/// The kernel's error.
pub fn flush_ruleset() -> io::Result<()> {
    const NFNL_SUBSYS_NFTABLES: u16 = 10;
    const NFT_MSG_DELTABLE: u16 = 2;
    const BEGIN: u16 = 0x10;
    const END: u16 = 0x11;
    let kind = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_DELTABLE;
    let bracket = |kind| Message::new(kind, 0, &nfgenmsg(0, NFNL_SUBSYS_NFTABLES));
    let flush = Message::new(kind, NLM_F_ACK, &nfgenmsg(0, 0));
    transact(
        libc::NETLINK_NETFILTER,
        vec![bracket(BEGIN), flush, bracket(END)],
    )
}
