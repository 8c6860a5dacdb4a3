//! nf_tables messages, and transactions with their answers

use std::io;

use netlink_sys::{Socket as Netlink, SocketAddr};
use nfqnl_proto::consts::{
    ATTR_HEADER_LEN, MESSAGE_HEADER_LEN, NETLINK_NETFILTER, NLA_F_NESTED, NLM_F_ACK, NLM_F_REQUEST,
};
use nfqnl_proto::{Message as Received, Messages, Reply};

use super::TableFamily;
use crate::error::{Error, ErrorKind, Operation, Refusal, Result};
use crate::netns::{Netns, open_in};

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
pub(super) struct Attributes(Vec<u8>);

impl Attributes {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Appends complete attributes
    pub(super) fn append(&mut self, attributes: &[u8]) -> &mut Self {
        self.0.extend(attributes);
        self.pad();
        self
    }

    pub(super) fn attr(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        self.with_header(kind, |bytes| bytes.extend(value))
    }

    pub(super) fn be16(&mut self, kind: u16, value: u16) -> &mut Self {
        self.attr(kind, &value.to_be_bytes())
    }

    pub(super) fn be32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attr(kind, &value.to_be_bytes())
    }

    /// Appends a text with a NUL; the kernel refuses texts over 255 bytes, so also a cut one
    pub(super) fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        self.with_header(kind, |bytes| {
            bytes.extend(value.bytes().take(1000).chain([0]))
        })
    }

    pub(super) fn nested(&mut self, kind: u16, members: impl FnOnce(&mut Self)) -> &mut Self {
        let mut inner = Self::default();
        members(&mut inner);
        self.attr(kind | NLA_F_NESTED, &inner.0)
    }

    fn with_header(&mut self, kind: u16, value: impl FnOnce(&mut Vec<u8>)) -> &mut Self {
        let start = self.0.len();
        self.0.extend([0; ATTR_HEADER_LEN]);
        value(&mut self.0);
        // Longer only after thousands of conditions; the kernel refuses such a rule.
        let len = u16::try_from(self.0.len() - start).unwrap_or(0);
        let header = self.0.get_mut(start..).unwrap_or_default();
        let new = len.to_ne_bytes().into_iter().chain(kind.to_ne_bytes());
        header
            .iter_mut()
            .zip(new)
            .for_each(|(byte, new)| *byte = new);
        self.pad();
        self
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
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
    /// What it does, for its error
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
    seq: u32,
    buffer: Vec<u8>,
}

impl Connection {
    pub(super) fn open(netns: Option<&Netns>) -> Result<Self> {
        let open = || Netlink::new(isize::from(NETLINK_NETFILTER));
        let mut socket = open_in(netns, open)?;
        let set_up = |socket: &mut Netlink| {
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            socket.set_cap_ack(true)
        };
        set_up(&mut socket).map_err(Error::io(Operation::Open))?;
        // Linux 4.12
        let _ = socket.set_ext_ack(true);
        Ok(Self {
            socket,
            seq: 0,
            buffer: Vec::with_capacity(RECV_LEN),
        })
    }

    /// Makes all changes, or none; the error is that of the first refused one
    pub(super) fn commit(&mut self, mut requests: Vec<Request>) -> Result<()> {
        let last = requests.len();
        let Some(first) = requests.first().map(|request| request.op) else {
            return Ok(());
        };
        if let Some(last) = requests.last_mut() {
            last.flags |= NLM_F_ACK;
        }
        requests.insert(0, Request::bracket(NFNL_MSG_BATCH_BEGIN, first));
        requests.push(Request::bracket(NFNL_MSG_BATCH_END, first));
        let begin = self.send(&requests)?;
        let op_of = |seq: u32| {
            let index = usize::try_from(seq.wrapping_sub(begin)).unwrap_or(usize::MAX);
            requests.get(index).map(|request| (index, request.op))
        };
        let (mut refusal, mut is_done) = (None, false);
        self.receive(first, |received| {
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
            None => Err(Error::NoAck { op: first }),
        }
    }

    /// Sends a request for a list, and calls `f` for the body of each member
    pub(super) fn dump(&mut self, mut request: Request, mut f: impl FnMut(&[u8])) -> Result<()> {
        request.flags |= NLM_F_DUMP;
        let op = request.op;
        self.send(&[request])?;
        let mut refusal = None;
        self.receive(op, |received| match received {
            Received::Other(other) => f(other.body),
            Received::Reply(reply) => refusal = Some(refused(op, &reply, true)),
            _ => {}
        })?;
        refusal.map_or(Ok(()), |refusal| Err(refusal.into()))
    }

    /// Sends requests in one datagram, and returns the sequence number of the first
    fn send(&mut self, requests: &[Request]) -> Result<u32> {
        let begin = self.seq;
        let mut datagram = Vec::new();
        for request in requests {
            request.write(&mut datagram, self.seq);
            self.seq = self.seq.wrapping_add(1);
        }
        let op = requests
            .first()
            .map_or(Operation::Open, |request| request.op);
        self.socket.send(&datagram, 0).map_err(Error::io(op))?;
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
