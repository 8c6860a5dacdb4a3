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
//! let table = Table::new("filter-dns")?;
//! let input = table.chain("in", Hook::INPUT)?;
//! let socket = Socket::open()?;
//! let queue = socket.bind(1)?; // before the rule, because a queue without a socket drops packets
//! input.add(&Rule::new().udp_dport(53).queue(Queues::new(1).bypass()))?;
//! # Ok(())
//! # }
//! ```
//!
//! # Order
//! * To start without a loss: make the table and its chains, then bind the queues, then add the
//!   rules. Rust drops variables in the reverse order, so the table goes last also after an error.
//! * To stop without a loss: take the rules away ([`Chain::clear`]), then
//!   [drain](crate::Socket::drain) the queues, then remove the table ([`Table::remove`]).
//! * **When a table vanishes, the kernel drops the waiting packets of all queues in the network
//!   namespace, also of other programs' queues.** The kernel does so whenever a base chain goes
//!   away. Adding and removing rules drops nothing. So a program beside other programs keeps its
//!   chains for a long time, and clears them instead of removing them.
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
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nfqnl_proto::{Attrs, Counters, Hook};

pub use rule::{Ports, Queues, Rule};

use crate::error::{Error, ErrorKind, Operation, Result};
use crate::netns::Netns;
use crate::socket::check_netfilter;
use crate::sys;
use message::{
    Attributes, Connection, FAMILY_HEADER_LEN, NFT_MSG_DELCHAIN, NFT_MSG_DELRULE, NFT_MSG_DELTABLE,
    NFT_MSG_GETRULE, NFT_MSG_GETTABLE, NFT_MSG_NEWCHAIN, NFT_MSG_NEWRULE, NFT_MSG_NEWTABLE,
    NLM_F_APPEND, NLM_F_CREATE, Request,
};
use rule::{NFTA_EXPR_DATA, NFTA_EXPR_NAME, QueueExpression};

const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_FLAGS: u16 = 2;
const NFTA_TABLE_OWNER: u16 = 7;
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
    /// (`enum nf_ip_hook_priorities`). On a bridge take -200, as nft(8) does for filters:
    /// br_netfilter works at 0, and Linux 5.10 does not call a chain of 0 beside it.
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

/// The fault of a rule, a chain or a table
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum RuleError {
    /// The rule has too many conditions: its attributes are longer than 65,531 bytes
    #[error("longer than 65,531 bytes")]
    TooLong,
    /// The rule has an IPv4 address in a chain of IPv6, or an IPv6 address in a chain of IPv4
    #[error("an address of the other IP version")]
    Family,
    /// A name is empty, longer than 255 bytes, or contains a NUL
    #[error("not a name")]
    Name,
    /// The table was removed ([`Table::remove`]) or given away ([`Table::into_fd`])
    #[error("the table was removed")]
    Removed,
}

fn check_name(op: Operation, name: &str) -> Result<()> {
    match name.len() {
        1..=255 if !name.contains('\0') => Ok(()),
        _ => Err(Error::InvalidRule {
            op,
            fault: RuleError::Name,
        }),
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
    /// So the rules survive a restart. The next program sets its rules with [`Chain::replace`];
    /// chains that it does not make stay as they are. Meanwhile any program may change the table,
    /// and the kernel drops packets whose queue has no socket, except with
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
        check_name(Operation::AddTable, name)?;
        let connection = Connection::open(self.netns.as_ref())?;
        self.open_over(connection, name)
    }

    /// Makes the table with a netfilter netlink socket, for instance one opened in a namespace that
    /// this process cannot enter; or takes over the table from [`Table::into_fd`]
    ///
    /// # Errors
    /// As [`open`](Self::open); [`Error::NotNetfilter`].
    pub fn open_fd(self, fd: OwnedFd, name: &str) -> Result<Table> {
        check_name(Operation::AddTable, name)?;
        check_netfilter(fd.as_fd())?;
        let connection = Connection::over(sys::netlink_from(fd))?;
        self.open_over(connection, name)
    }

    fn open_over(self, connection: Connection, name: &str) -> Result<Table> {
        let persist = if self.is_persistent {
            NFT_TABLE_F_PERSIST
        } else {
            0
        };
        let mut shared = Shared {
            connection,
            name: name.to_owned(),
            process: std::process::id(),
            is_removed: false,
            flags: NFT_TABLE_F_OWNER | persist,
            queue: QueueExpression::Native,
        };
        match (shared.begin(), self.is_persistent) {
            (Err(Error::Refused(refusal)), true)
                if matches!(refusal.errno(), libc::EINVAL | libc::EOPNOTSUPP) =>
            {
                let kind = match shared.tables()?.is_empty() {
                    true => ErrorKind::Unsupported,
                    false => ErrorKind::TableInUse,
                };
                return Err(refusal.with_kind(kind).into());
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
        if self.is_persistent {
            shared.take_over()?;
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
        let op = Operation::AddChain;
        check_name(op, name)?;
        let mut shared = shared(&self.shared, op)?;
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
            requests.push(Request::new(
                op,
                family,
                NFT_MSG_NEWCHAIN,
                NLM_F_CREATE,
                attributes,
            ));
        }
        shared.connection.commit(op, requests)?;
        Ok(Chain {
            shared: Arc::clone(&self.shared),
            name: name.to_owned(),
            families,
        })
    }

    /// Removes the table with its chains and rules, also a persistent one
    ///
    /// Calls of its [`Chain`]s and clones fail afterwards.
    ///
    /// # Errors
    /// [`Error::Refused`]; [`Error::NoAck`]; [`Error::Io`].
    pub fn remove(self) -> Result<()> {
        shared(&self.shared, Operation::RemoveTable)?.remove()
    }

    /// Gives the table away: it belongs to the returned descriptor, and stays as it is
    ///
    /// The next process takes it over with [`TableBuilder::open_fd`] and the same name and
    /// settings, and sets its rules with [`Chain::replace`]. So an upgrade by exec(2) or
    /// `SCM_RIGHTS` keeps the rules, and packets keep waiting in their queues. Since Linux 5.12.
    ///
    /// # Errors
    /// [`Error::Io`]: no descriptor is left, or the kernel is older.
    pub fn into_fd(self) -> Result<OwnedFd> {
        let op = Operation::HandOver;
        let mut shared = shared(&self.shared, op)?;
        if shared.flags == 0 {
            let source = std::io::ErrorKind::Unsupported.into();
            return Err(Error::Io { op, source });
        }
        let fd = shared.connection.as_fd().try_clone_to_owned();
        let fd = fd.map_err(Error::io(op))?;
        shared.is_removed = true;
        Ok(fd)
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
        let op = Operation::AddRule;
        self.change(op, std::slice::from_ref(rule), |_| op)
    }

    /// Replaces all rules at once: each packet sees the old rules or the new ones
    ///
    /// The counters of the new rules begin at 0.
    ///
    /// # Errors
    /// As [`add`](Self::add), with the index of the rule in
    /// [`Refusal::operation`](crate::Refusal::operation). The old rules stay then.
    pub fn replace(&self, rules: &[Rule]) -> Result<()> {
        let op = match rules {
            [] => Operation::ClearRules,
            _ => Operation::ReplaceRules,
        };
        self.change(op, rules, Operation::ReplaceRule)
    }

    /// Removes all rules; packets stay in their queues
    ///
    /// # Errors
    /// [`Error::Refused`]; [`Error::NoAck`]; [`Error::Io`].
    pub fn clear(&self) -> Result<()> {
        self.replace(&[])
    }

    /// Returns the sum of the counters of all rules with this label; `None` if no rule has it
    ///
    /// The bytes of whole packets count.
    ///
    /// # Errors
    /// [`Error::Refused`]; [`Error::NoAck`]; [`Error::Io`].
    pub fn counter(&self, label: &str) -> Result<Option<Counters>> {
        let op = Operation::ReadCounter;
        let mut shared = shared(&self.shared, op)?;
        let mut sum = None;
        for &family in self.families {
            let request = self.request(&shared, op, family, NFT_MSG_GETRULE, 0, None);
            for rule in shared.connection.dump(request)? {
                if let Some(new) = counters(&rule, label) {
                    let sum: &mut Counters = sum.get_or_insert_default();
                    sum.packets = sum.packets.saturating_add(new.packets);
                    sum.bytes = sum.bytes.saturating_add(new.bytes);
                }
            }
        }
        Ok(sum)
    }

    /// Adds rules; `op_of` returns the operation of each rule
    fn change(
        &self,
        op: Operation,
        rules: &[Rule],
        op_of: impl Fn(usize) -> Operation,
    ) -> Result<()> {
        let mut shared = shared(&self.shared, op)?;
        let mut requests = Vec::new();
        if op != Operation::AddRule {
            let delete = |&family| self.request(&shared, op, family, NFT_MSG_DELRULE, 0, None);
            requests.extend(self.families.iter().map(delete));
        }
        for (place, rule) in rules.iter().enumerate() {
            let op = op_of(place);
            let before = requests.len();
            for &family in self.families {
                if let Some(encoded) = rule.encode(family, shared.queue) {
                    let rule = Some((encoded, rule.userdata()));
                    let flags = NLM_F_CREATE | NLM_F_APPEND;
                    requests.push(self.request(&shared, op, family, NFT_MSG_NEWRULE, flags, rule));
                }
            }
            if requests.len() == before {
                let fault = RuleError::Family;
                return Err(Error::InvalidRule { op, fault });
            }
        }
        shared.connection.commit(op, requests)
    }

    fn request(
        &self,
        shared: &Shared,
        op: Operation,
        family: TableFamily,
        message: u8,
        flags: u16,
        rule: Option<(Attributes, Option<Vec<u8>>)>,
    ) -> Request {
        Request::new(op, family, message, flags, |attributes| {
            attributes
                .text(NFTA_RULE_TABLE, &shared.name)
                .text(NFTA_RULE_CHAIN, &self.name);
            if let Some((expressions, userdata)) = rule {
                attributes.nested(NFTA_RULE_EXPRESSIONS, |list| {
                    list.append(&expressions);
                });
                if let Some(userdata) = userdata {
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

/// Returns the last counter of a rule with this label
fn counters(body: &[u8], label: &str) -> Option<Counters> {
    let rule = body.get(FAMILY_HEADER_LEN..)?;
    let value = |bytes, kind| Attrs::new(bytes).last(kind).map(|attr| attr.value);
    if value(rule, NFTA_RULE_USERDATA)? != rule::comment(label) {
        return None;
    }
    let expressions = Attrs::new(value(rule, NFTA_RULE_EXPRESSIONS)?).map_while(Result::ok);
    let counters = expressions.filter_map(|element| {
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
    counters.last()
}

/// The table, as its chains share it
struct Shared {
    connection: Connection,
    name: String,
    /// The process that made the table, because a forked one has a copy of this
    process: u32,
    is_removed: bool,
    /// `NFTA_TABLE_FLAGS`
    flags: u32,
    queue: QueueExpression,
}

impl Shared {
    /// Makes the table, and finds out how this kernel queues packets
    fn begin(&mut self) -> Result<()> {
        let op = Operation::AddTable;
        self.queue = QueueExpression::Native;
        match self.connection.commit(op, self.probe()) {
            Err(Error::Refused(refusal))
                if refusal.operation() == Operation::AddRule && refusal.errno() == libc::ENOENT =>
            {
                self.queue = QueueExpression::Xtables;
                let families = self.families_of(TableFamily::Inet);
                let tables = families.iter().map(|&family| self.new_table(family));
                self.connection.commit(op, tables.collect())
            }
            result => result,
        }
    }

    /// Returns the requests for a table, and for a rule that comes and goes: it is refused if the
    /// kernel lacks the expression `queue`
    fn probe(&self) -> Vec<Request> {
        let family = TableFamily::Inet;
        let name_probe = |attributes: &mut Attributes, kind| {
            attributes
                .text(NFTA_RULE_TABLE, &self.name)
                .text(kind, PROBE);
        };
        let chain = |message, flags| {
            let op = Operation::AddChain;
            Request::new(op, family, message, flags, |chain| {
                name_probe(chain, NFTA_CHAIN_NAME);
            })
        };
        let rule = |message, flags, queued: &Rule| {
            let op = Operation::AddRule;
            Request::new(op, family, message, flags, |rule| {
                name_probe(rule, NFTA_RULE_CHAIN);
                if let Some(expressions) = queued.encode(family, QueueExpression::Native) {
                    rule.nested(NFTA_RULE_EXPRESSIONS, |list| {
                        list.append(&expressions);
                    });
                }
            })
        };
        vec![
            self.new_table(family),
            chain(NFT_MSG_NEWCHAIN, NLM_F_CREATE),
            rule(NFT_MSG_NEWRULE, NLM_F_CREATE, &Rule::new().queue(0)),
            rule(NFT_MSG_DELRULE, 0, &Rule::new()),
            chain(NFT_MSG_DELCHAIN, 0),
        ]
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

    /// Returns the families that have a table of this name, and the port id of its owner
    fn tables(&mut self) -> Result<Vec<(TableFamily, Option<u32>)>> {
        let all = tables(&mut self.connection)?.into_iter();
        let named = all.filter(|(_, name, _)| *name == self.name);
        Ok(named.map(|(family, _, owner)| (family, owner)).collect())
    }

    /// Takes over what a program before has left in other families
    fn take_over(&mut self) -> Result<()> {
        for (family, owner) in self.tables()? {
            if owner.is_none() {
                // The kernel refuses this if the table is not one that was left.
                let _ = self
                    .connection
                    .commit(Operation::AddTable, vec![self.new_table(family)]);
            }
        }
        Ok(())
    }

    /// Removes the table of each family; other programs may have tables of this name
    fn remove(&mut self) -> Result<()> {
        self.is_removed = true;
        let op = Operation::RemoveTable;
        let port = (self.flags != 0).then_some(self.connection.port);
        let tables = self.tables()?.into_iter();
        let own = tables.filter(|(_, owner)| *owner == port);
        let requests = own.map(|(family, _)| delete_table(family, &self.name));
        self.connection.commit(op, requests.collect())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // A table without an owner stays otherwise; a forked process has a copy.
        if self.flags == 0 && !self.is_removed && self.process == std::process::id() {
            let _ = self.remove();
        }
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Locks a table that was not removed
fn shared(shared: &Mutex<Shared>, op: Operation) -> Result<MutexGuard<'_, Shared>> {
    let shared = lock(shared);
    match shared.is_removed {
        false => Ok(shared),
        true => Err(Error::InvalidRule {
            op,
            fault: RuleError::Removed,
        }),
    }
}

/// Returns all tables of the namespace: family, name, and the port id of the owner
fn tables(connection: &mut Connection) -> Result<Vec<(TableFamily, String, Option<u32>)>> {
    let all = Request::new(Operation::AddTable, None, NFT_MSG_GETTABLE, 0, |_| {});
    let bodies = connection.dump(all)?;
    let parse = |body: &Vec<u8>| {
        let family = TableFamily::from_number(*body.first()?)?;
        let attributes = Attrs::new(body.get(FAMILY_HEADER_LEN..)?);
        let name = attributes.clone().last(NFTA_TABLE_NAME)?.value;
        let name = String::from_utf8_lossy(name)
            .trim_end_matches('\0')
            .to_owned();
        let owner = attributes.last(NFTA_TABLE_OWNER);
        let owner = owner.and_then(|attr| attr.value.try_into().ok());
        Some((family, name, owner.map(u32::from_be_bytes)))
    };
    Ok(bodies.iter().filter_map(parse).collect())
}

fn delete_table(family: TableFamily, name: &str) -> Request {
    let op = Operation::RemoveTable;
    Request::new(op, family, NFT_MSG_DELTABLE, 0, |table| {
        table.text(NFTA_TABLE_NAME, name);
    })
}
