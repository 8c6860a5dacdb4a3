//! A small netlink client for links and rules: a message writer, and requests with their answers

use std::io;

use netlink_sys::{Socket, SocketAddr};

pub(crate) const NLM_F_REQUEST: u16 = 0x1;
pub(crate) const NLM_F_ACK: u16 = 0x4;
pub(crate) const NLM_F_DUMP: u16 = 0x300;
pub(crate) const NLM_F_CREATE: u16 = 0x400;
pub(crate) const NLM_F_EXCL: u16 = 0x200;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLA_F_NESTED: u16 = 1 << 15;
const HEADER_LEN: usize = 16;
const ATTR_HEADER_LEN: usize = 4;
/// Longer than every answer
const RECV_LEN: usize = 64 * 1024;

/// A netlink message under construction
pub(crate) struct Message {
    bytes: Vec<u8>,
    kind: u16,
    flags: u16,
}

impl Message {
    /// Begins a message; `fixed` is the family's own header
    pub(crate) fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER_LEN];
        bytes.extend(fixed);
        Self {
            bytes,
            kind,
            flags: flags | NLM_F_REQUEST,
        }
    }

    pub(crate) fn attr(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        self.nest_as(kind, |message| message.bytes.extend(value))
    }

    /// Appends a NUL-terminated string
    pub(crate) fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        self.nest_as(kind, |message| {
            message.bytes.extend(value.as_bytes());
            message.bytes.push(0);
        })
    }

    pub(crate) fn nest(&mut self, kind: u16, inner: impl FnOnce(&mut Self)) -> &mut Self {
        self.nest_as(kind | NLA_F_NESTED, inner)
    }

    fn nest_as(&mut self, kind: u16, inner: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.bytes.len();
        self.bytes.extend([0; ATTR_HEADER_LEN]);
        inner(self);
        let len = u16::try_from(self.bytes.len() - start).expect("attributes here are short");
        self.bytes[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        self.bytes[start + 2..start + ATTR_HEADER_LEN].copy_from_slice(&kind.to_ne_bytes());
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    /// Appends bytes without an attribute header
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend(bytes);
        self
    }

    fn finish(mut self, seq: u32) -> Vec<u8> {
        let len = u32::try_from(self.bytes.len()).expect("messages here are short");
        self.bytes[..4].copy_from_slice(&len.to_ne_bytes());
        self.bytes[4..6].copy_from_slice(&self.kind.to_ne_bytes());
        self.bytes[6..8].copy_from_slice(&self.flags.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&seq.to_ne_bytes());
        self.bytes
    }
}

/// Returns encoded attributes
pub(crate) fn attributes(write: impl FnOnce(&mut Message)) -> Vec<u8> {
    let mut message = Message::new(0, 0, &[]);
    write(&mut message);
    message.bytes.split_off(HEADER_LEN)
}

/// Returns `struct nfgenmsg`, the fixed header of netfilter's messages
pub(crate) fn nfgenmsg(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

/// Sends messages in one datagram, and waits for all requested acknowledgements
pub(crate) fn transact(protocol: libc::c_int, messages: Vec<Message>) -> io::Result<()> {
    let socket = open(protocol)?;
    let mut datagram = Vec::new();
    let mut wanted = 0;
    for (seq, message) in (1..).zip(messages) {
        wanted += usize::from(message.flags & NLM_F_ACK != 0);
        datagram.extend(message.finish(seq));
    }
    socket.send(&datagram, 0)?;
    let mut buf = vec![0; RECV_LEN];
    while wanted > 0 {
        let len = socket.recv(&mut &mut buf[..], 0)?;
        for (kind, body) in split(&buf[..len]) {
            if kind == NLMSG_ERROR {
                error_code(body)?;
                wanted -= 1;
            }
        }
    }
    Ok(())
}

/// Sends one request and returns the body of the answer, or of all answers of a dump
pub(crate) fn query(protocol: libc::c_int, message: Message) -> io::Result<Vec<Vec<u8>>> {
    let socket = open(protocol)?;
    let dump = message.flags & NLM_F_DUMP == NLM_F_DUMP;
    socket.send(&message.finish(1), 0)?;
    let mut buf = vec![0; RECV_LEN];
    let mut bodies = Vec::new();
    loop {
        let len = socket.recv(&mut &mut buf[..], 0)?;
        for (kind, body) in split(&buf[..len]) {
            match kind {
                NLMSG_ERROR => error_code(body)?,
                NLMSG_DONE => return Ok(bodies),
                _ => bodies.push(body.to_vec()),
            }
        }
        if !dump && !bodies.is_empty() {
            return Ok(bodies);
        }
    }
}

/// Returns kinds and values of attributes
pub(crate) fn attrs(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (header, _) = bytes.split_first_chunk::<ATTR_HEADER_LEN>()?;
        let [l0, l1, k0, k1] = *header;
        let len = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = bytes.get(ATTR_HEADER_LEN..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([k0, k1]) & !NLA_F_NESTED, value))
    })
}

pub(crate) fn attr(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attrs(bytes).find(|(k, _)| *k == kind).map(|(_, v)| v)
}

fn open(protocol: libc::c_int) -> io::Result<Socket> {
    let mut socket = Socket::new(isize::try_from(protocol).expect("a small number"))?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

fn split(mut datagram: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = u32::from_ne_bytes(*datagram.first_chunk()?);
        let len = usize::try_from(len).ok()?;
        let kind = u16::from_ne_bytes(*datagram.get(4..)?.first_chunk()?);
        let body = datagram.get(HEADER_LEN..len)?;
        datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

fn error_code(body: &[u8]) -> io::Result<()> {
    let code = body
        .first_chunk()
        .map_or(0, |code| i32::from_ne_bytes(*code));
    match code {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(-code)),
    }
}
