//! Rules that send packets to queues, without nft or iptables
//!
//! A [`Table`] belongs to the program: other programs cannot change it, and it vanishes with the
//! program, also after SIGKILL. It speaks nf_tables itself, so no other program is needed.
//!
//! ```no_run
//! use nfqnl::rules::{Queues, Rule, Table};
//! use nfqnl::{Hook, Socket};
//!
//! # fn main() -> nfqnl::Result<()> {
//! let socket = Socket::open()?;
//! let queue = socket.bind(1)?; // first, because a queue without a socket drops packets
//! let table = Table::new("filter-dns")?;
//! let input = table.chain("in", Hook::INPUT)?;
//! input.add(&Rule::new().udp_dport(53).queue(Queues::new(1).bypass()))?;
//! # Ok(())
//! # }
//! ```
//!
//! # Order
//! * To start without a loss: bind the queues, then add the rules.
//! * To stop without a loss: take the rules away ([`Chain::clear`]), or give them
//!   [`bypass`](Queues::bypass); then [drain](crate::Socket::drain) the queues; then drop the
//!   table.
//! * **A table that vanishes drops the waiting packets of all queues in the network namespace, also
//!   those of other programs**: the kernel does so whenever a base chain goes away. Adding and
//!   removing rules does not. So a program that others should not notice keeps its chains for a
//!   long time, and clears them instead of removing them.
//!
//! # Kernels
//! nf_tables with the expression `queue` (`CONFIG_NFT_QUEUE`). Kernels without it use the xtables
//! target `NFQUEUE` (`CONFIG_NFT_COMPAT`), as iptables-nft does; a chain for both IP versions is
//! then a chain in each of two tables.
//!
//! Before Linux 5.12 tables have no owner. The name of the table then contains the process, and
//! dropping the table removes it. A table that a killed process has left is removed when a table
//! of this name is made again.
//!
//! Every call needs `CAP_NET_ADMIN` in the user namespace that owns the network namespace.

mod message;
mod rule;
mod unowned;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nfqnl_proto::{Attrs, Counters, Hook};

pub use rule::{Ports, Queues, Rule};

use crate::error::{Error, ErrorKind, Operation, Result};
use crate::netns::Netns;
use message::{
    Attributes, Connection, FAMILY_HEADER_LEN, NFT_MSG_DELCHAIN, NFT_MSG_DELRULE, NFT_MSG_DELTABLE,
    NFT_MSG_GETRULE, NFT_MSG_NEWCHAIN, NFT_MSG_NEWRULE, NFT_MSG_NEWTABLE, NLM_F_APPEND,
    NLM_F_CREATE, Request,
};
use rule::{NFTA_EXPR_DATA, NFTA_EXPR_NAME, QueueExpression};

const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_FLAGS: u16 = 2;
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
const NFTA_COUNTER_BYTES: u16 = 1;
const NFTA_COUNTER_PACKETS: u16 = 2;
const NFT_TABLE_F_OWNER: u32 = 2;
const NFT_TABLE_F_PERSIST: u32 = 4;
/// The chain of the rule that shows whether the kernel has the expression `queue`
const PROBE: &str = "nfqnl-probe";

/// The packets that a chain sees (the families of nf_tables)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TableFamily {
    /// IPv4 and IPv6
    Inet,
    /// IPv4
    Ip,
    /// IPv6
    Ip6,
    /// Frames on a bridge; only the expression `queue` works there, not the xtables target
    Bridge,
}

impl TableFamily {
    fn number(self) -> u8 {
        let number = match self {
            Self::Inet => libc::NFPROTO_INET,
            Self::Ip => libc::NFPROTO_IPV4,
            Self::Ip6 => libc::NFPROTO_IPV6,
            Self::Bridge => libc::NFPROTO_BRIDGE,
        };
        u8::try_from(number).unwrap_or_default()
    }

    fn from_number(number: u8) -> Option<Self> {
        let all = [Self::Inet, Self::Ip, Self::Ip6, Self::Bridge];
        all.into_iter().find(|family| family.number() == number)
    }
}

/// The type of a chain
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ChainType {
    /// Sees every packet
    Filter,
    /// Sees every packet, and routes it again if its mark has changed; at output
    Route,
    /// Sees the first packet of a connection, for address translation
    Nat,
}

/// The place of a chain: hook, family, priority and type
///
/// A [`Hook`] alone means both IP versions, priority 0 and [`ChainType::Filter`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use]
pub struct ChainConfig {
    hook: Hook,
    family: TableFamily,
    priority: i32,
    kind: ChainType,
}

impl ChainConfig {
    /// A chain at this hook
    pub const fn new(hook: Hook) -> Self {
        Self {
            hook,
            family: TableFamily::Inet,
            priority: 0,
            kind: ChainType::Filter,
        }
    }

    /// Sets the packets that the chain sees; both IP versions by default
    pub const fn family(mut self, family: TableFamily) -> Self {
        self.family = family;
        self
    }

    /// Sets the priority; 0 by default
    ///
    /// The chains of a hook see a packet in the order of their priorities. The kernel's own parts
    /// have priorities too: -200 connection tracking, -100 and 100 address translation
    /// (`enum nf_ip_hook_priorities`).
    pub const fn priority(mut self, priority: i32) -> Self {
        self.priority = priority;
        self
    }

    /// Sets the type; [`ChainType::Filter`] by default
    pub const fn chain_type(mut self, kind: ChainType) -> Self {
        self.kind = kind;
        self
    }
}

impl From<Hook> for ChainConfig {
    fn from(hook: Hook) -> Self {
        Self::new(hook)
    }
}

/// Settings for making a [`Table`]
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct TableBuilder {
    netns: Option<Netns>,
    is_persistent: bool,
}

impl TableBuilder {
    /// Makes the table in another network namespace than the calling thread's
    pub fn netns(mut self, netns: &Netns) -> Self {
        self.netns = Some(netns.clone());
        self
    }

    /// Keeps the table when the program ends; the next program that makes a table of this name
    /// takes it over, with its chains and rules
    ///
    /// So the rules survive a restart. The next program sets its rules with [`Chain::replace`].
    /// Meanwhile the kernel drops packets whose queue has no socket, except with
    /// [`bypass`](Queues::bypass). [`Table::remove`] removes the table. Since Linux 6.9; older
    /// kernels refuse it.
    #[doc(alias = "NFT_TABLE_F_PERSIST")]
    pub const fn persistent(mut self) -> Self {
        self.is_persistent = true;
        self
    }

    /// Makes the table
    ///
    /// # Errors
    /// [`Error::Refused`] with [`NoCapability`](ErrorKind::NoCapability), with
    /// [`TableInUse`](ErrorKind::TableInUse) if there is a table of this name, or with
    /// [`Unsupported`](ErrorKind::Unsupported) if the kernel has no nf_tables, or the table is
    /// persistent and the kernel has no such tables. [`Error::NoAck`]; [`Error::Io`].
    pub fn open(self, name: &str) -> Result<Table> {
        let persist = if self.is_persistent {
            NFT_TABLE_F_PERSIST
        } else {
            0
        };
        let mut shared = Shared {
            connection: Connection::open(self.netns.as_ref())?,
            name: name.to_owned(),
            flags: NFT_TABLE_F_OWNER | persist,
            queue: QueueExpression::Native,
            families: Vec::new(),
        };
        match (shared.begin(), self.is_persistent) {
            (Err(Error::Refused(refusal)), true)
                if matches!(refusal.errno(), libc::EINVAL | libc::EOPNOTSUPP) =>
            {
                return Err(refusal.with_kind(ErrorKind::Unsupported).into());
            }
            // Before Linux 5.12
            (Err(error), false) if error.raw_os_error() == Some(libc::EINVAL) => {
                unowned::sweep(&mut shared.connection, name)?;
                shared.name = unowned::name(name).map_err(Error::io(Operation::AddTable))?;
                shared.flags = 0;
                shared.begin()?;
            }
            (result, _) => result?,
        }
        Ok(Table {
            shared: Arc::new(Mutex::new(shared)),
        })
    }
}

/// The table of a program: chains and rules that vanish with it
///
/// The kernel removes the table when the `Table` and all its [`Chain`]s are dropped, or the process
/// has ended. This drops the waiting packets of all queues in the namespace: see the
/// [module](self). After fork(2) the table lasts as long as one of the processes.
#[derive(Clone)]
pub struct Table {
    shared: Arc<Mutex<Shared>>,
}

impl Table {
    /// Makes a table in the calling thread's network namespace
    ///
    /// # Errors
    /// As [`TableBuilder::open`].
    pub fn new(name: &str) -> Result<Self> {
        Self::builder().open(name)
    }

    /// Returns the default settings
    pub fn builder() -> TableBuilder {
        TableBuilder::default()
    }

    /// Makes a chain at a hook; a persistent table may have it already
    ///
    /// # Errors
    /// [`Error::Refused`], for instance with [`Unsupported`](ErrorKind::Unsupported) if the chain
    /// of this name is at another place; [`Error::NoAck`]; [`Error::Io`].
    pub fn chain(&self, name: &str, place: impl Into<ChainConfig>) -> Result<Chain> {
        let place = place.into();
        let mut shared = lock(&self.shared);
        let families = shared.families_of(place.family);
        let mut requests = Vec::new();
        for &family in families {
            requests.push(shared.new_table(family));
            let attributes = |chain: &mut Attributes| {
                chain
                    .text(NFTA_CHAIN_TABLE, &shared.name)
                    .text(NFTA_CHAIN_NAME, name)
                    .nested(NFTA_CHAIN_HOOK, |hook| {
                        hook.be32(NFTA_HOOK_HOOKNUM, place.hook.0.into())
                            .attr(NFTA_HOOK_PRIORITY, &place.priority.to_be_bytes());
                    })
                    .text(
                        NFTA_CHAIN_TYPE,
                        match place.kind {
                            ChainType::Filter => "filter",
                            ChainType::Route => "route",
                            ChainType::Nat => "nat",
                        },
                    );
            };
            let op = Operation::AddChain;
            requests.push(Request::new(
                op,
                family,
                NFT_MSG_NEWCHAIN,
                NLM_F_CREATE,
                attributes,
            ));
        }
        shared.connection.commit(requests)?;
        shared.remember(families);
        Ok(Chain {
            shared: Arc::clone(&self.shared),
            name: name.to_owned(),
            families,
        })
    }

    /// Removes the table with its chains and rules, also a persistent one
    ///
    /// # Errors
    /// [`Error::Refused`]; [`Error::NoAck`]; [`Error::Io`].
    pub fn remove(self) -> Result<()> {
        lock(&self.shared).remove()
    }
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shared = lock(&self.shared);
        f.debug_struct("Table")
            .field("name", &shared.name)
            .field("queue", &shared.queue)
            .finish_non_exhaustive()
    }
}

/// A chain of rules at a hook, made by [`Table::chain`]
#[derive(Clone)]
pub struct Chain {
    shared: Arc<Mutex<Shared>>,
    name: String,
    families: &'static [TableFamily],
}

impl Chain {
    /// Appends a rule
    ///
    /// # Errors
    /// [`Error::Refused`] with [`Unsupported`](ErrorKind::Unsupported) if the kernel lacks a part
    /// of the rule; [`Error::NoAck`]; [`Error::Io`].
    pub fn add(&self, rule: &Rule) -> Result<()> {
        self.change(false, std::slice::from_ref(rule), |_| Operation::AddRule)
    }

    /// Replaces all rules at once: each packet sees the old rules or the new ones
    ///
    /// # Errors
    /// As [`add`](Self::add), with the place of the rule in
    /// [`Refusal::operation`](crate::Refusal::operation). The old rules stay then.
    pub fn replace(&self, rules: &[Rule]) -> Result<()> {
        self.change(true, rules, Operation::ReplaceRules)
    }

    /// Removes all rules; packets stay in their queues
    ///
    /// # Errors
    /// [`Error::Refused`]; [`Error::NoAck`]; [`Error::Io`].
    pub fn clear(&self) -> Result<()> {
        self.replace(&[])
    }

    /// Returns the counter of the rule with this label; `None` if no rule has the label
    ///
    /// Bytes are those of whole packets.
    ///
    /// # Errors
    /// [`Error::Refused`]; [`Error::NoAck`]; [`Error::Io`].
    pub fn counter(&self, label: &str) -> Result<Option<Counters>> {
        let mut shared = lock(&self.shared);
        let mut sum = None;
        for &family in self.families {
            let op = Operation::ReadCounter;
            let request = self.request(&shared, op, family, NFT_MSG_GETRULE, 0, None);
            shared.connection.dump(request, |rule| {
                if let Some(new) = counters(rule, label) {
                    let sum: &mut Counters = sum.get_or_insert_default();
                    sum.packets = sum.packets.saturating_add(new.packets);
                    sum.bytes = sum.bytes.saturating_add(new.bytes);
                }
            })?;
        }
        Ok(sum)
    }

    fn change(
        &self,
        is_replaced: bool,
        rules: &[Rule],
        op: impl Fn(usize) -> Operation,
    ) -> Result<()> {
        let mut shared = lock(&self.shared);
        let mut requests = Vec::new();
        for &family in self.families {
            if is_replaced {
                requests.push(self.request(&shared, op(0), family, NFT_MSG_DELRULE, 0, None));
            }
            requests.extend(rules.iter().enumerate().map(|(place, rule)| {
                let flags = NLM_F_CREATE | NLM_F_APPEND;
                self.request(
                    &shared,
                    op(place),
                    family,
                    NFT_MSG_NEWRULE,
                    flags,
                    Some(rule),
                )
            }));
        }
        shared.connection.commit(requests)
    }

    fn request(
        &self,
        shared: &Shared,
        op: Operation,
        family: TableFamily,
        message: u8,
        flags: u16,
        rule: Option<&Rule>,
    ) -> Request {
        Request::new(op, family, message, flags, |attributes| {
            attributes
                .text(NFTA_RULE_TABLE, &shared.name)
                .text(NFTA_RULE_CHAIN, &self.name);
            if let Some(rule) = rule {
                attributes.nested(NFTA_RULE_EXPRESSIONS, |list| {
                    list.append(rule.encode(shared.queue).bytes());
                });
                if let Some(userdata) = rule.userdata() {
                    attributes.attr(NFTA_RULE_USERDATA, &userdata);
                }
            }
        })
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain")
            .field("name", &self.name)
            .field("families", &self.families)
            .finish_non_exhaustive()
    }
}

/// Returns the first counter of a rule with this label
fn counters(body: &[u8], label: &str) -> Option<Counters> {
    let rule = body.get(FAMILY_HEADER_LEN..)?;
    let value = |bytes, kind| Attrs::new(bytes).last(kind).map(|attr| attr.value);
    if value(rule, NFTA_RULE_USERDATA)? != rule::comment(label) {
        return None;
    }
    let expressions = Attrs::new(value(rule, NFTA_RULE_EXPRESSIONS)?).map_while(Result::ok);
    let mut counters = expressions.filter_map(|element| {
        if !value(element.value, NFTA_EXPR_NAME)?.starts_with(b"counter") {
            return None;
        }
        let data = value(element.value, NFTA_EXPR_DATA)?;
        let number = |kind| Some(u64::from_be_bytes(value(data, kind)?.try_into().ok()?));
        let mut counters = Counters::default();
        counters.packets = number(NFTA_COUNTER_PACKETS)?;
        counters.bytes = number(NFTA_COUNTER_BYTES)?;
        Some(counters)
    });
    counters.next()
}

/// The table, as its chains share it
struct Shared {
    connection: Connection,
    name: String,
    /// `NFTA_TABLE_FLAGS`
    flags: u32,
    queue: QueueExpression,
    /// The families that have a table of this name
    families: Vec<TableFamily>,
}

impl Shared {
    /// Makes the table, and finds out how this kernel queues packets
    fn begin(&mut self) -> Result<()> {
        let is_unknown = |error: &Error| {
            matches!(error, Error::Refused(refusal)
                if refusal.operation() == Operation::AddRule && refusal.errno() == libc::ENOENT)
        };
        let op = Operation::AddRule;
        let mut probe = vec![self.new_table(TableFamily::Inet)];
        for (message, flags) in [
            (NFT_MSG_NEWCHAIN, NLM_F_CREATE),
            (NFT_MSG_NEWRULE, NLM_F_CREATE),
            (NFT_MSG_DELRULE, 0),
            (NFT_MSG_DELCHAIN, 0),
        ] {
            let is_chain = matches!(message, NFT_MSG_NEWCHAIN | NFT_MSG_DELCHAIN);
            probe.push(Request::new(
                op,
                TableFamily::Inet,
                message,
                flags,
                |attributes| {
                    let name = if is_chain {
                        NFTA_CHAIN_NAME
                    } else {
                        NFTA_RULE_CHAIN
                    };
                    attributes
                        .text(NFTA_RULE_TABLE, &self.name)
                        .text(name, PROBE);
                    if message == NFT_MSG_NEWRULE {
                        attributes.nested(NFTA_RULE_EXPRESSIONS, |list| {
                            list.append(
                                Rule::new().queue(0).encode(QueueExpression::Native).bytes(),
                            );
                        });
                    }
                },
            ));
        }
        self.queue = QueueExpression::Native;
        match self.connection.commit(probe) {
            Err(error) if is_unknown(&error) => {
                self.queue = QueueExpression::Xtables;
                let families = self.families_of(TableFamily::Inet);
                let tables = families.iter().map(|&family| self.new_table(family));
                self.connection.commit(tables.collect())?;
            }
            result => result?,
        }
        self.remember(self.families_of(TableFamily::Inet));
        Ok(())
    }

    fn new_table(&self, family: TableFamily) -> Request {
        let op = Operation::AddTable;
        Request::new(op, family, NFT_MSG_NEWTABLE, NLM_F_CREATE, |table| {
            table.text(NFTA_TABLE_NAME, &self.name);
            if self.flags != 0 {
                table.be32(NFTA_TABLE_FLAGS, self.flags);
            }
        })
    }

    /// Returns the tables of a chain; the xtables target does not know the family `inet`
    const fn families_of(&self, family: TableFamily) -> &'static [TableFamily] {
        match (family, self.queue) {
            (TableFamily::Inet, QueueExpression::Native) => &[TableFamily::Inet],
            (TableFamily::Inet, QueueExpression::Xtables) => &[TableFamily::Ip, TableFamily::Ip6],
            (TableFamily::Ip, _) => &[TableFamily::Ip],
            (TableFamily::Ip6, _) => &[TableFamily::Ip6],
            (TableFamily::Bridge, _) => &[TableFamily::Bridge],
        }
    }

    fn remember(&mut self, families: &[TableFamily]) {
        for family in families {
            if !self.families.contains(family) {
                self.families.push(*family);
            }
        }
    }

    /// Removes the table
    fn remove(&mut self) -> Result<()> {
        let op = Operation::RemoveTable;
        let name = |table: &mut Attributes| {
            table.text(NFTA_TABLE_NAME, &self.name);
        };
        let remove = |family| Request::new(op, family, NFT_MSG_DELTABLE, 0, name);
        let requests = self.families.iter().copied().map(remove).collect();
        self.families.clear();
        self.connection.commit(requests)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.flags == 0 {
            let _ = self.remove();
        }
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
