//! nf_tables messages, and transactions with their answers

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_sys::{Socket as Netlink, SocketAddr};
use nfqnl_proto::consts::{
    ATTR_HEADER_LEN, MESSAGE_HEADER_LEN, NLA_F_NESTED, NLM_F_ACK, NLM_F_REQUEST,
};
use nfqnl_proto::{Message as Received, Messages, Reply};

use super::{RuleError, TableFamily};
use crate::error::{Error, ErrorKind, Operation, Refusal, Result};
use crate::netns::Netns;
use crate::socket::new_netlink;
use crate::sys;

const NFNL_SUBSYS_NFTABLES: u8 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
pub(super) const NFT_MSG_NEWTABLE: u8 = 0;
pub(super) const NFT_MSG_GETTABLE: u8 = 1;
pub(super) const NFT_MSG_DELTABLE: u8 = 2;
pub(super) const NFT_MSG_NEWCHAIN: u8 = 3;
pub(super) const NFT_MSG_DELCHAIN: u8 = 5;
pub(super) const NFT_MSG_NEWRULE: u8 = 6;
pub(super) const NFT_MSG_GETRULE: u8 = 7;
pub(super) const NFT_MSG_DELRULE: u8 = 8;
pub(super) const NLM_F_CREATE: u16 = 0x400;
pub(super) const NLM_F_APPEND: u16 = 0x800;
const NLM_F_DUMP: u16 = 0x300;
/// `struct nfgenmsg`
pub(super) const FAMILY_HEADER_LEN: usize = 4;
/// Longer than every answer: the kernel sends a dump in pieces of at most 32 KiB
const RECV_LEN: usize = 64 << 10;

/// Attributes under construction
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    bytes: Vec<u8>,
    /// A value is longer than its length field allows
    is_too_long: bool,
}

impl Attributes {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Appends complete attributes
    pub(super) fn append(&mut self, attributes: &Self) -> &mut Self {
        self.is_too_long |= attributes.is_too_long;
        self.append_bytes(attributes.bytes())
    }

    /// Appends encoded attributes
    pub(super) fn append_bytes(&mut self, attributes: &[u8]) -> &mut Self {
        self.bytes.extend(attributes);
        self.pad();
        self
    }

    pub(super) fn attr(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let len = u16::try_from(ATTR_HEADER_LEN + value.len());
        self.is_too_long |= len.is_err();
        self.bytes.extend(len.unwrap_or(0).to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.append_bytes(value)
    }

    pub(super) fn be16(&mut self, kind: u16, value: u16) -> &mut Self {
        self.attr(kind, &value.to_be_bytes())
    }

    pub(super) fn be32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attr(kind, &value.to_be_bytes())
    }

    /// Appends a text with a NUL
    pub(super) fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        self.attr(kind, &[value.as_bytes(), &[0]].concat())
    }

    pub(super) fn nested(&mut self, kind: u16, members: impl FnOnce(&mut Self)) -> &mut Self {
        let mut inner = Self::default();
        members(&mut inner);
        self.is_too_long |= inner.is_too_long;
        self.attr(kind | NLA_F_NESTED, &inner.bytes)
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// A request
#[derive(Debug)]
pub(super) struct Request {
    kind: u16,
    flags: u16,
    family: u8,
    /// `res_id` of `struct nfgenmsg`
    resource: u16,
    attributes: Attributes,
    /// The operation that an error names
    op: Operation,
}

impl Request {
    pub(super) fn new(
        op: Operation,
        family: impl Into<Option<TableFamily>>,
        message: u8,
        flags: u16,
        attributes: impl FnOnce(&mut Attributes),
    ) -> Self {
        let mut request = Self {
            kind: u16::from_be_bytes([NFNL_SUBSYS_NFTABLES, message]),
            flags,
            family: family.into().map_or(0, TableFamily::number),
            resource: 0,
            attributes: Attributes::default(),
            op,
        };
        attributes(&mut request.attributes);
        request
    }

    /// The begin or end of a transaction
    fn bracket(kind: u16, op: Operation) -> Self {
        Self {
            kind,
            flags: 0,
            family: 0,
            resource: NFNL_SUBSYS_NFTABLES.into(),
            attributes: Attributes::default(),
            op,
        }
    }

    fn write(&self, datagram: &mut Vec<u8>, seq: u32) {
        let body = self.attributes.bytes();
        let len = MESSAGE_HEADER_LEN + FAMILY_HEADER_LEN + body.len();
        let flags = self.flags | NLM_F_REQUEST;
        datagram.extend(u32::try_from(len).unwrap_or(u32::MAX).to_ne_bytes());
        datagram.extend(self.kind.to_ne_bytes());
        datagram.extend(flags.to_ne_bytes());
        datagram.extend(seq.to_ne_bytes());
        datagram.extend([0; 4]); // the kernel knows the port id
        datagram.extend([self.family, 0]); // NFNETLINK_V0
        datagram.extend(self.resource.to_be_bytes());
        datagram.extend(body);
    }
}

/// A netfilter socket for rules
pub(super) struct Connection {
    socket: Netlink,
    /// The port id, which owns tables
    pub(super) port: u32,
    seq: u32,
    buffer: Vec<u8>,
}

impl Connection {
    pub(super) fn open(netns: Option<&Netns>) -> Result<Self> {
        let socket = match netns {
            None => new_netlink().map_err(Error::io(Operation::Open)),
            Some(netns) => netns.open_in(new_netlink),
        };
        Self::over(socket?)
    }

    /// Takes over a socket, perhaps with tables
    pub(super) fn over(mut socket: Netlink) -> Result<Self> {
        let set_up = |socket: &mut Netlink| {
            let mut address = SocketAddr::new(0, 0);
            socket.get_address(&mut address)?;
            if address.port_number() == 0 {
                address = socket.bind_auto()?;
            }
            socket.connect(&SocketAddr::new(0, 0))?;
            socket.set_cap_ack(true)?;
            Ok(address.port_number())
        };
        let port = set_up(&mut socket).map_err(Error::io(Operation::Open))?;
        // Linux 4.12
        let _ = socket.set_ext_ack(true);
        Ok(Self {
            socket,
            port,
            seq: 0,
            buffer: Vec::with_capacity(RECV_LEN),
        })
    }

    /// Makes all changes, or none
    ///
    /// The error names the first refused change. An error of all changes names `op`.
    pub(super) fn commit(&mut self, op: Operation, mut requests: Vec<Request>) -> Result<()> {
        let last = requests.len();
        match requests.last_mut() {
            Some(last) => last.flags |= NLM_F_ACK,
            None => return Ok(()),
        }
        requests.insert(0, Request::bracket(NFNL_MSG_BATCH_BEGIN, op));
        requests.push(Request::bracket(NFNL_MSG_BATCH_END, op));
        if let Some(long) = requests
            .iter()
            .find(|request| request.attributes.is_too_long)
        {
            let op = long.op;
            let fault = RuleError::TooLong;
            return Err(Error::InvalidRule { op, fault });
        }
        let begin = self.send(op, &requests)?;
        let op_of = |seq: u32| {
            let index = usize::try_from(seq.wrapping_sub(begin)).unwrap_or(usize::MAX);
            requests.get(index).map(|request| (index, request.op))
        };
        let (mut refusal, mut is_done) = (None, false);
        self.receive(op, |received| {
            let Received::Reply(reply) = received else {
                return;
            };
            match op_of(reply.seq) {
                Some((index, _)) if reply.is_ack() => is_done |= index == last,
                Some((index, op)) if refusal.is_none() => {
                    refusal = Some(refused(op, &reply, index == 0));
                }
                _ => {}
            }
        })?;
        match refusal {
            Some(refusal) => Err(refusal.into()),
            None if is_done => Ok(()),
            None => Err(Error::NoAck { op }),
        }
    }

    /// Requests a list, and returns the body of each member
    pub(super) fn dump(&mut self, mut request: Request) -> Result<Vec<Vec<u8>>> {
        /// The list changed meanwhile
        const NLM_F_DUMP_INTR: u16 = 0x10;
        const TRIES: usize = 10;
        request.flags |= NLM_F_DUMP;
        let (op, requests) = (request.op, [request]);
        let mut bodies = Vec::new();
        for _ in 0..TRIES {
            bodies.clear();
            self.send(op, &requests)?;
            let (mut refusal, mut is_interrupted) = (None, false);
            self.receive(op, |received| match received {
                Received::Other(other) => {
                    is_interrupted |= other.flags & NLM_F_DUMP_INTR != 0;
                    bodies.push(other.body.to_vec());
                }
                Received::Reply(reply) => refusal = Some(refused(op, &reply, true)),
                _ => {}
            })?;
            match refusal {
                Some(refusal) => return Err(refusal.into()),
                None if is_interrupted => {}
                None => break,
            }
        }
        Ok(bodies)
    }

    /// Sends requests in one datagram, and returns the sequence number of the first
    fn send(&mut self, op: Operation, requests: &[Request]) -> Result<u32> {
        let begin = self.seq;
        let mut datagram = Vec::new();
        for request in requests {
            request.write(&mut datagram, self.seq);
            self.seq = self.seq.wrapping_add(1);
        }
        sys::make_send_buffer(self.socket.as_fd(), datagram.len());
        sys::send(self.socket.as_fd(), &datagram).map_err(Error::io(op))?;
        Ok(begin)
    }

    /// Receives all answers; the kernel has queued them before a send returns
    fn receive(&mut self, op: Operation, mut f: impl FnMut(Received<'_>)) -> Result<()> {
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, libc::MSG_DONTWAIT) {
                Ok(_) => Messages::new(&self.buffer)
                    .map_while(Result::ok)
                    .for_each(&mut f),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(Error::Io { op, source }),
            }
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Returns the meaning of a refusal; the kernel checks the capability at the begin
fn refused(op: Operation, reply: &Reply<'_>, is_begin: bool) -> Refusal {
    let refusal = Refusal::new(op, reply);
    match reply.errno {
        libc::EPERM if is_begin => refusal,
        libc::EPERM => refusal.with_kind(ErrorKind::TableInUse),
        libc::EOPNOTSUPP if op == Operation::AddTable => refusal.with_kind(ErrorKind::TableInUse),
        // An expression that the kernel does not know
        libc::ENOENT => refusal.with_kind(ErrorKind::Unsupported),
        _ => refusal,
    }
}
